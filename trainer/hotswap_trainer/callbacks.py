"""What happens beside the steps of a run: the bar, the stop on NaN, the completed checkpoints."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hotswap_trainer.errors import TrainingDivergedError
from hotswap_trainer.workdir import mark_complete


class StopOnDivergence(TrainerCallback):
    """Raises `TrainingDivergedError`, in every process, at the first loss or gradient that is not finite."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        for name, what in (("loss", "loss"), ("grad_norm", "gradient"), ("eval_loss", "evaluation loss")):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise TrainingDivergedError(
                    f"the {what} became {value} at step {state.global_step}; nothing was published: "
                    "try a lower --learning-rate or a longer --warmup, and look for broken examples"
                )


class AlreadyFinished(Exception):
    """The checkpoint that a run was to go on from is its last one."""


class NoStepTooMany(TrainerCallback):
    """Raises `AlreadyFinished`, once the checkpoint is loaded: the Trainer would make one more step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            raise AlreadyFinished


class CompleteCheckpoints(TrainerCallback):
    """Marks each checkpoint once all of its files are written, with the training time so far."""

    def __init__(self, seconds_before: float) -> None:
        self.started = time.monotonic() - seconds_before

    def seconds(self) -> float:
        """Training time so far, that before a resume included."""
        return time.monotonic() - self.started

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.world_size > 1:
            args.distributed_state.wait_for_everyone()  # each process writes its own random state
        if state.is_world_process_zero:
            mark_complete(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", self.seconds())


class ProgressBar(TrainerCallback):
    """One bar with the newest losses; where the output is no terminal, a line at each tenth of the run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task: TaskID | None = None
        self.losses: dict[str, float] = {}
        self.tenth = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.tenth = 10 * state.global_step // max(1, state.max_steps)
        self.task = self.progress.add_task(
            "training", total=state.max_steps, completed=state.global_step, losses=""
        )
        self.progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        for name, label in (("loss", "loss"), ("eval_loss", "eval")):
            if logs and name in logs:
                self.losses[label] = logs[name]
        text = "  ".join(f"{label} {value:.3f}" for label, value in self.losses.items())
        if self.task is not None:
            self.progress.update(self.task, losses=text)
        tenth = 10 * state.global_step // max(1, state.max_steps)
        if not self.console.is_terminal and tenth > self.tenth:
            self.tenth = tenth
            self.console.print(f"step {state.global_step}/{state.max_steps}  {text}", highlight=False)

    def stop(self) -> None:
        """Leave the terminal as it was, also after an exception."""
        self.progress.stop()
