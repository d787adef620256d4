"""`python -m hotswap_trainer` that shards on CPUs too, where accelerate shards nothing."""

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from hotswap_trainer import run
from hotswap_trainer.cli import train
from hotswap_trainer.sharding import gather
from torch.distributed.tensor import DTensor

_make = AcceleratorState.__init__


def _as_on_gpus(self: AcceleratorState, *arguments: Any, **options: Any) -> None:
    shared = PartialState._shared_state
    kind = shared.get("distributed_type")
    if kind is DistributedType.MULTI_CPU:
        shared["distributed_type"] = DistributedType.MULTI_GPU
    try:
        _make(self, *arguments, **options)
    finally:
        if kind is not None:
            shared["distributed_type"] = kind


def _gather_shards(model: Any, *, keep: bool) -> dict[str, Any]:
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters()), "nothing was sharded"
    return gather(model, keep=keep)


if __name__ == "__main__":
    import typer

    AcceleratorState.__init__ = _as_on_gpus  # type: ignore[method-assign]
    run.check_processes = lambda options: None
    run.gather = _gather_shards
    app = typer.Typer(add_completion=False)
    app.command()(train)
    app()
