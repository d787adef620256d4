"""Greedy tokens that a step chooses on the device: the next one begins before the host has seen them.

A step that runs ahead was planned for sequences that may turn out to have ended in the one before. Then its
row is computed for nobody. What the row reads and writes is harmless even if its pages or its adapter's slot
have been given to others meanwhile: steps follow one another on one stream, pages are written before they are
read, and no row looks at another's slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Choice:
    """Tokens [rows] and their logits, in host memory once `copied` has happened."""

    tokens: torch.Tensor
    best: torch.Tensor
    copied: torch.cuda.Event | None = None

    def wait(self) -> list[int | None]:
        """The token of each row; None where it holds a NaN or no finite value."""
        if self.copied is not None:
            self.copied.synchronize()
        valid = self.best.isfinite().tolist()
        return [token if ok else None for token, ok in zip(self.tokens.tolist(), valid, strict=True)]


class NextTokens:
    """What the latest step chose, `tokens` [max_rows] int64 being where the next one looks it up."""

    def __init__(self, max_rows: int, device: torch.device, tokens: torch.Tensor | None = None) -> None:
        self.tokens = torch.zeros(max_rows, dtype=torch.int64, device=device) if tokens is None else tokens
        self._best = torch.zeros(max_rows, dtype=torch.float32, device=device)
        self._on_gpu = device.type == "cuda"
        # Two, since the next step is launched before the host has read what this one gave.
        self._hosts = [
            tuple(
                torch.empty_like(t, device="cpu", pin_memory=self._on_gpu) for t in (self.tokens, self._best)
            )
            for _ in range(2)
        ]

    def choose(self, logits: torch.Tensor) -> None:
        """Take the likeliest token of each row of `logits` [rows, vocabulary], the first of equals."""
        best, tokens = logits.max(dim=-1)
        self._best[: len(best)].copy_(best)
        self.tokens[: len(tokens)].copy_(tokens)

    def fetch(self, rows: int) -> Choice:
        """Have the first `rows` copied to the host, which is there to be read until the next call but one."""
        self._hosts.reverse()
        tokens, best = (host[:rows] for host in self._hosts[0])
        tokens.copy_(self.tokens[:rows], non_blocking=True)
        best.copy_(self._best[:rows], non_blocking=True)
        copied = None
        if self._on_gpu:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        return Choice(tokens, best, copied)
