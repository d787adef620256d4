"""One training run from its options to a published version."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hotswap.bases import BaseConversionError, BaseNotFoundError, resolve_base
from hotswap.layout import PublishError, publish, version_location, version_path
from hotswap.names import AdapterName
from hotswap.storage import StorageError, open_storage
from rich.console import Console

from hotswap_trainer.config import Run, compute_dtype
from hotswap_trainer.data import Dataset, Encoder, Example, load, split
from hotswap_trainer.errors import OptionError, TrainerError, TrainingDivergedError
from hotswap_trainer.method import Trained
from hotswap_trainer.options import as_json
from hotswap_trainer.report import Parameters, Report
from hotswap_trainer.sharding import check_processes, gather, restore
from hotswap_trainer.workdir import Checkpoint, WorkDir


@dataclass(frozen=True, slots=True)
class Published:
    """A run's result in the store."""

    version: int
    path: Path | str  # a URL where the store is one
    report: Report


def train(run: Run, console: Console | None = None) -> Published | None:
    """Train and publish. Under `torchrun` and `accelerate launch`, every process but the first returns None.

    Raises:
        TrainerError: a bad option or example, a run that diverged, a store that cannot be written.
    """
    rank = int(os.environ.get("RANK", "0"))
    console = console or Console(stderr=True, quiet=rank != 0)
    check_processes(run.options)
    _check_writable(run.options.output)
    with _quiet_libraries():
        return _train(run, rank, console)


def _train(run: Run, rank: int, console: Console) -> Published | None:
    from transformers import set_seed

    options = run.options
    base = _resolve(options.base, progress=rank == 0)
    tokenizer = _tokenizer(base, options.base)
    data, eval_data, train_examples, eval_examples = _load_data(
        run, Encoder(tokenizer, _stop_ids(base, tokenizer))
    )
    for dataset, what in ((data, options.data), (eval_data, options.eval_data)):
        if dataset and dataset.num_truncated + dataset.num_dropped:
            console.print(
                f"[yellow]{what}: examples over {options.max_length} tokens: {dataset.num_truncated} cut, "
                f"{dataset.num_dropped} left out (--max-length, --overlong)[/]"
            )
    set_seed(options.seed)
    model = _model(run, base)
    parameters = _count(model)

    work = WorkDir(options.work_dir, _identity(run, base, data, eval_data))
    resume_from = _prepare(work, run, rank, console)

    from hotswap_trainer.loop import fit

    try:
        outcome = fit(
            model,
            tokenizer,
            run,
            train_examples,
            eval_examples,
            checkpoints=work.checkpoints,
            resume_from=resume_from,
            console=console,
        )
        if run.options.fsdp:
            whole = gather(model, keep=rank == 0)
        if rank != 0:
            return None
        if run.options.fsdp:  # the shards cannot be written as they lie
            model = _model(run, base)
            restore(model, whole)
        _check_finite(model)
    except TrainingDivergedError:
        if rank == 0:
            work.clear()  # a checkpoint may hold the damage already
        raise
    report = Report(run, parameters, data, eval_data, len(train_examples), len(eval_examples), outcome)
    version = _publish(run, Trained(model, tokenizer, options.base, compute_dtype(options)), report)
    work.remove()
    return Published(version, _location(options.output, run.name, version), report)


def _location(store: Path | str, name: AdapterName, version: int) -> Path | str:
    if isinstance(store, Path):
        return version_path(store, name, version)
    return version_location(store, name, version)


def _check_writable(store: Path | str) -> None:
    """Find out before the training that the store can be written."""
    try:
        open_storage(store).check_writable()
    except StorageError as error:
        raise OptionError(f"--output: {store} cannot be written: {error}; choose one that can") from error


def _resolve(base: str, *, progress: bool) -> Path:
    try:
        return resolve_base(base, progress=progress)
    except (BaseNotFoundError, BaseConversionError) as error:
        raise OptionError(f"--{error}") from error


def _tokenizer(base: Path, spec: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise OptionError(f"--base: {spec} has no tokenizer that loads: {_first_line(error)}") from error


def _stop_ids(base: Path, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a generation: those of the base's generation config, the tokenizer's own first."""
    from transformers import GenerationConfig

    own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if not (base / "generation_config.json").is_file():
        return tuple(own)
    eos = GenerationConfig.from_pretrained(base).eos_token_id
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return tuple(sorted(ids, key=lambda id: id not in own)) or tuple(own)


def _load_data(run: Run, encoder: Encoder) -> tuple[Dataset, Dataset | None, list[Example], list[Example]]:
    options = run.options
    data = load(options.data, encoder, max_length=options.max_length, overlong=options.overlong)
    if options.eval_data is None:
        return data, None, *split(data.examples, options.eval_fraction, options.seed)
    held_out = load(options.eval_data, encoder, max_length=options.max_length, overlong=options.overlong)
    return data, held_out, data.examples, held_out.examples


def _model(run: Run, base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    options = run.options
    arguments = run.method.base_arguments(run.method_options, compute_dtype(options))
    try:
        model = AutoModelForCausalLM.from_pretrained(base, **arguments)
    except (OSError, ValueError) as error:
        raise OptionError(f"--base: {options.base} cannot be loaded: {_first_line(error)}") from error
    model.config.use_cache = False
    if options.gradient_checkpointing:
        model.enable_input_require_grads()  # type: ignore[no-untyped-call]
    return run.method.attach(model, run.method_options)


def _count(model: Any) -> Parameters:
    if hasattr(model, "get_nb_trainable_parameters"):
        return Parameters(*model.get_nb_trainable_parameters())  # which knows that 4-bit weights lie packed
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Parameters(trainable, sum(p.numel() for p in model.parameters()))


def _identity(run: Run, base: Path, data: Dataset, eval_data: Dataset | None) -> dict[str, Any]:
    """What makes two commands the same run. Data counts by content, a base by its configuration and sizes."""
    output = run.options.output
    options = as_json(replace(run.options, output=output.absolute() if isinstance(output, Path) else output))
    for name in ("data", "eval_data", "resume", "work_dir"):
        del options[name]
    return {
        "options": options,
        "method_options": as_json(run.method_options),
        "data": [data.digest, eval_data.digest if eval_data else None],
        "base": (base / "config.json").read_text("utf-8"),
        "weights": sorted((path.name, path.stat().st_size) for path in base.glob("*.safetensors")),
        "processes": os.environ.get("WORLD_SIZE", "1"),
    }


def _prepare(work: WorkDir, run: Run, rank: int, console: Console) -> Checkpoint | None:
    """Open the work directory; the checkpoint to go on from, if there is one."""
    if rank == 0:
        work.open()
        if run.options.resume:
            work.discard_incomplete()
        else:
            work.clear()
    checkpoint = work.last_checkpoint() if run.options.resume else None
    if checkpoint is not None:
        console.print(f"Resuming the interrupted run at step {checkpoint.step} (--no-resume starts again).")
    return checkpoint


def _check_finite(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise TrainingDivergedError(
                f"{name} holds NaN or infinity after the last step; nothing was published: "
                "try a lower --learning-rate"
            )


def _publish(run: Run, trained: Trained, report: Report) -> int:
    def write(directory: Path) -> None:
        run.method.write(trained, directory)
        report.write(directory)

    try:
        return publish(run.options.output, run.name, write, required=run.method.files)
    except (PublishError, StorageError, OSError) as error:
        raise OptionError(
            f"--output: cannot publish into {run.options.output}: {error}; "
            "checkpoints are kept: mend the store and give the same command again"
        ) from error


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep the libraries' bars and notes away from the trainer's own output."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # PEFT imports it for every method, and on some processors it misses a package that nobody needs.
    bitsandbytes = logging.getLogger("bitsandbytes")
    level = bitsandbytes.level
    bitsandbytes.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate)\b")
            yield
    finally:
        bitsandbytes.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


__all__ = ["Published", "TrainerError", "train"]
