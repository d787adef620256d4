"""Batches and their loss. The model computes logits only where some row of the batch has a label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers.trainer_pt_utils import get_length_grouped_indices

from hotswap_trainer.data import IGNORED, Example

Features = dict[str, list[int]]


class ExampleDataset(torch.utils.data.Dataset[Features]):
    """Encoded examples as the Trainer's loader wants them."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Features:
        example = self.examples[index]
        return {"input_ids": example.input_ids, "labels": example.labels}


class EpochSampler(torch.utils.data.Sampler[int]):
    """An order of the examples that depends on seed and epoch alone, so a resumed run finds its place again.

    With `group` examples of like length stay together in groups of that many, which are themselves shuffled.
    """

    def __init__(self, lengths: Sequence[int], seed: int, *, group: int | None) -> None:
        self.lengths = list(lengths)
        self.seed = seed
        self.group = group
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.group is None:
            return iter(torch.randperm(len(self.lengths), generator=generator).tolist())
        indices: list[int] = get_length_grouped_indices(  # type: ignore[no-untyped-call]
            self.lengths, self.group, generator=generator
        )
        return iter(indices)


class Collator:
    """Pads the rows of a batch on the right to its longest one.

    With `keep_logits`, adds `logits_to_keep`, the positions whose next token has a label in some row. Prompts
    and padding then cost no row of the output layer, whose vocabulary makes it the largest matrix by far.
    """

    def __init__(self, pad_id: int, *, keep_logits: bool) -> None:
        self.pad_id = pad_id
        self.keep_logits = keep_logits

    def __call__(self, rows: Sequence[Features]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> Tensor:
            return torch.stack(
                [pad(torch.tensor(row[name]), (0, longest - len(row[name])), value=value) for row in rows]
            )

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch = {
            "input_ids": padded("input_ids", self.pad_id),
            "labels": padded("labels", IGNORED),
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        }
        if self.keep_logits:
            batch["logits_to_keep"] = kept_positions(batch["labels"])
        return batch


def kept_positions(labels: Tensor) -> Tensor:
    """Positions `[kept]` whose next token has a label in some row of `labels` `[rows, tokens]`."""
    return (labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)


def completion_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross entropy of the labelled tokens: summed and divided by `num_items_in_batch`, or their mean.

    `outputs.logits` is `[rows, kept, vocabulary]`, or `[rows, tokens, vocabulary]` where the model keeps all.
    """
    positions, logits = kept_positions(labels), outputs.logits
    if logits.shape[1] != len(positions):
        logits = logits[:, positions]
    targets = labels[:, 1:][:, positions]
    total = cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / ((targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
