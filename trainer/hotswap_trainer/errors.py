"""What can go wrong in training by a user's doing. Each message names the option or field and the remedy."""

from __future__ import annotations


class TrainerError(Exception):
    """Base of the trainer's typed errors; `exit_code` is what the command line returns for it."""

    exit_code = 2


class OptionError(TrainerError):
    """An option is unknown, missing, or has a value that cannot work."""


class DataError(TrainerError):
    """The training data cannot be used; the message names file, line and field."""


class RunInProgressError(TrainerError):
    """Another process is training exactly this run."""


class TrainingDivergedError(TrainerError):
    """The loss or the gradient became NaN or infinite. Nothing is published."""

    exit_code = 1


class CheckpointError(TrainerError):
    """A checkpoint of another library cannot be imported; the message names the file, field or tensor."""
