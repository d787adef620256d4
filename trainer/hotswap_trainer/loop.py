"""The training loop: transformers' Trainer, set up for one run."""

from __future__ import annotations

import inspect
import math
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hotswap_trainer.batching import Collator, EpochSampler, ExampleDataset, completion_loss
from hotswap_trainer.callbacks import (
    AlreadyFinished,
    CompleteCheckpoints,
    NoStepTooMany,
    ProgressBar,
    StopOnDivergence,
)
from hotswap_trainer.config import Run, compute_dtype
from hotswap_trainer.data import Example
from hotswap_trainer.sharding import gather, restore
from hotswap_trainer.workdir import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NUM_EVALUATIONS = 5
_NUM_CHECKPOINTS = 20
_NUM_POINTS = 200
_TRAINED_FILE = "trained.safetensors"


@dataclass(frozen=True, slots=True)
class Point:
    """A point of the loss curve: `kind` is `train` or `eval`."""

    step: int
    kind: str
    loss: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run measured. `peak_memory` is in bytes, by `host` and, on a GPU, `accelerator`."""

    num_steps: int
    seconds: float
    num_processes: int
    peak_memory: dict[str, int]
    history: tuple[Point, ...]

    def final(self, kind: str) -> float | None:
        """The last loss of a kind, or None where there is none."""
        return next((point.loss for point in reversed(self.history) if point.kind == kind), None)


def fit(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    run: Run,
    train: Sequence[Example],
    evaluation: Sequence[Example],
    *,
    checkpoints: Path,
    resume_from: Checkpoint | None,
    console: Console,
) -> Outcome:
    """Train `model` in place, writing checkpoints on the way.

    Raises:
        TrainingDivergedError: a loss became NaN or infinite.
    """
    arguments = _arguments(run, train, evaluation, checkpoints, resumed=resume_from is not None)
    forward = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collator = Collator(pad_id or 0, keep_logits="logits_to_keep" in forward.parameters)
    clock = CompleteCheckpoints(resume_from.seconds if resume_from else 0.0)
    bar = ProgressBar(console)
    sampler = EpochSampler(
        [len(example.input_ids) for example in train],
        run.options.seed,
        group=run.options.batch_size * run.options.accumulation if run.options.group_by_length else None,
    )
    trainer = _Trainer(
        sampler,
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=ExampleDataset(train),
        eval_dataset=ExampleDataset(evaluation) if evaluation else None,
        compute_loss_func=completion_loss,
        callbacks=[NoStepTooMany(), StopOnDivergence(), clock, _NextOrder(sampler)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if trainer.is_world_process_zero():
        trainer.add_callback(bar)
    try:
        with suppress(AlreadyFinished):
            trainer.train(resume_from_checkpoint=str(resume_from.path) if resume_from else None)
        if evaluation and not any(
            "eval_loss" in entry and entry["step"] == trainer.state.global_step
            for entry in trainer.state.log_history
        ):
            trainer.evaluate()
    finally:
        bar.stop()
    return Outcome(
        num_steps=trainer.state.global_step,
        seconds=clock.seconds(),
        num_processes=arguments.world_size,
        peak_memory=_peak_memory(),
        history=tuple(_history(trainer.state.log_history)),
    )


def count_steps(run: Run, num_examples: int, num_processes: int) -> int:
    """Optimiser steps of the whole run."""
    options = run.options
    if options.max_steps is not None:
        return options.max_steps
    batches = math.ceil(num_examples / (options.batch_size * num_processes))
    return max(1, math.ceil(options.epochs * math.ceil(batches / options.accumulation)))


class _Trainer(Trainer):
    def __init__(self, sampler: EpochSampler, **arguments: Any) -> None:
        self.sampler = sampler
        self.trained_model: torch.nn.Module = arguments["model"]
        super().__init__(**arguments)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.sampler

    # A checkpoint holds what is trained and nothing else. PEFT's own would not do for a prefix that has a
    # projection, of which it saves the product alone. Every process comes here, and one writes.
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        whole = gather(self.trained_model, keep=self.args.should_save)
        if self.args.should_save:
            directory = Path(output_dir or str(self.args.output_dir))
            directory.mkdir(parents=True, exist_ok=True)
            save_file(whole, directory / _TRAINED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(self.trained_model, load_file(Path(resume_from_checkpoint) / _TRAINED_FILE))


class _NextOrder(TrainerCallback):
    """Tells the sampler the epoch. accelerate's own way does not reach it in a resumed, distributed run."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.sampler.epoch = int((state.epoch or 0.0) + 1e-6)


def _arguments(
    run: Run,
    train: Sequence[Example],
    evaluation: Sequence[Example],
    checkpoints: Path,
    *,
    resumed: bool,
) -> TrainingArguments:
    options = run.options
    on_gpu = options.device == "auto" and torch.cuda.is_available()
    # Making one set of arguments starts the process group, which tells how many steps there will be.
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=run.learning_rate,
        lr_scheduler_type=options.scheduler if options.scheduler != "constant" else "constant_with_warmup",
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=not on_gpu,
        bf16=on_gpu and compute_dtype(options) == torch.bfloat16,
        fsdp=options.fsdp or None,  # type: ignore[arg-type]  # True is what it is now; its type lags behind
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        eval_strategy="steps" if evaluation else "no",
        eval_on_start=bool(evaluation) and not resumed,
        save_strategy="steps",
        save_total_limit=2,
        logging_strategy="steps",
        logging_first_step=True,
        logging_nan_inf_filter=False,
        label_names=["labels"],
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
        report_to=[],
    )
    steps = count_steps(run, len(train), arguments.world_size)
    arguments.warmup_steps = round(options.warmup * steps)
    arguments.eval_steps = options.eval_every or max(1, math.ceil(steps / _NUM_EVALUATIONS))
    arguments.save_steps = options.save_every or max(10, math.ceil(steps / _NUM_CHECKPOINTS))
    arguments.logging_steps = options.log_every or max(1, math.ceil(steps / _NUM_POINTS))
    # One process drives one GPU: DataParallel would cut `logits_to_keep` in pieces; use torchrun.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _history(log: Sequence[dict[str, Any]]) -> list[Point]:
    return [
        Point(int(entry["step"]), kind, float(entry[key]))
        for entry in log
        for key, kind in (("loss", "train"), ("eval_loss", "eval"))
        if key in entry
    ]


def _peak_memory() -> dict[str, int]:
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        peak["accelerator"] = torch.cuda.max_memory_allocated()
    return peak
