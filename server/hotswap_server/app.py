"""A running server, put together from its settings: store, adapters, base, engine, gRPC, metrics."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import psutil
import structlog
import torch
from hotswap.bases import BaseConversionError, BaseNotFoundError, resolve_base

from hotswap_server.adapters.manager import AdapterManager
from hotswap_server.adapters.merges import MergeOptions
from hotswap_server.adapters.method import BankOptions, slots_within
from hotswap_server.config import ServeSettings, flag_of
from hotswap_server.engine.base import BaseModel, load_base
from hotswap_server.engine.compiling import compile_layers
from hotswap_server.engine.engine import EngineOptions
from hotswap_server.engine.fairness import FairnessOptions
from hotswap_server.engine.observer import EngineObserver, SeveralObservers
from hotswap_server.engine.overload import QueueOptions
from hotswap_server.engine.service import EngineService
from hotswap_server.errors import BaseModelError, HotswapError, InvalidRequestError
from hotswap_server.grpc.server import Bound, GrpcServer, PortInUseError
from hotswap_server.kernels import select_kernels
from hotswap_server.listening import PortError, address_of, check_ports, shown
from hotswap_server.metrics import Metrics, MetricsServer
from hotswap_server.preload import preload
from hotswap_server.progress import recording_progress
from hotswap_server.security.setup import (
    Security,
    SecuritySettingsError,
    exposure_warnings,
    open_security,
)
from hotswap_server.tracing import TracingSettingsError, check_tracing, open_tracing

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_FLUSH_S: Final = 5.0  # that the last spans may take to reach their collector
_CGROUP_LIMIT: Final = Path("/sys/fs/cgroup/cpu.max")

logger = structlog.stdlib.get_logger(__name__)


class StartupError(Exception):
    """The server cannot start with these settings. The message is one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What takes long to load and needs no event loop."""

    settings: ServeSettings
    base: BaseModel
    tokenizer: Any
    adapters: AdapterManager
    metrics: Metrics
    kernels: str
    num_stored: int
    started: float
    security: Security
    collector: str | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """A server that answers; the cache holds `kv_tokens`.

    `metrics_address` is empty without metrics, `admin_address` and `health_address` without own ports.
    `quantization` is nf4, fp4, int8 or None; `weight_bytes` is what the base's weights take so.
    """

    base: str
    address: str
    port: int
    metrics_address: str
    store: str
    num_stored: int
    kv_tokens: int
    max_context: int
    adapter_slots: int
    device: str
    dtype: str
    quantization: str | None
    weight_bytes: int
    kernels: str
    threads: int
    seconds: float
    security: str
    admin_address: str = ""
    health_address: str = ""


async def serve(
    settings: ServeSettings,
    ready: Callable[[Ready], None] = lambda ready: None,
    *,
    stop: asyncio.Event | None = None,
) -> None:
    """Load, serve, and return when SIGTERM, SIGINT or `stop` has come and running requests have ended.

    Raises:
        StartupError: the settings cannot be served.
    """
    await run(load(settings), ready, stop=stop)


def load(settings: ServeSettings) -> Loaded:
    """Open the store and load the base; blocks for seconds.

    Raises:
        StartupError: the settings cannot be served.
    """
    started = time.monotonic()
    try:
        check_ports(settings)
        security = open_security(settings)
        collector = check_tracing(settings.otlp_endpoint)
    except TracingSettingsError as error:
        raise StartupError(f"{error.name}: {error}") from error
    except (PortError, SecuritySettingsError) as error:
        raise StartupError(f"{flag_of(error.field)}: {error}") from error
    for warning in exposure_warnings(settings):
        logger.warning("open_to_the_network", problem=warning)
    torch.set_num_threads(settings.threads or usable_cores())
    try:
        store = AdapterManager.open_store(settings.store, settings.store_refresh)
        num_stored = len(store.list())
        device = _device(settings.device)
        dtype = _dtype(settings.dtype, device)
        kernels = select_kernels(device, dtype, settings.kernels)
        path = resolve_base(settings.base)
        tokenizer = _load_tokenizer(path)
        base = load_base(path, kernels=kernels, device=device, dtype=dtype, quantize=settings.quantize)
        if kernels.can_be_recorded and not settings.eager:
            compile_layers(base)
        metrics = Metrics(tenants=settings.tenant_metrics)
        adapters = AdapterManager(
            store,
            base,
            _bank_options(settings, base),
            host_cache_bytes=settings.host_cache_bytes,
            load_workers=settings.load_workers,
            load_deadline_s=settings.load_deadline,
            observer=metrics,
        )
    except InvalidRequestError as error:
        raise StartupError(f"{flag_of(error.field)}{str(error).removeprefix(error.field)}") from error
    except (HotswapError, BaseNotFoundError, BaseConversionError) as error:
        raise StartupError(str(error)) from error
    return Loaded(
        settings, base, tokenizer, adapters, metrics, kernels.name, num_stored, started, security, collector
    )


async def run(loaded: Loaded, ready: Callable[[Ready], None], *, stop: asyncio.Event | None = None) -> None:
    """Serve what was loaded until it is asked to stop; see `serve`."""
    settings, metrics = loaded.settings, loaded.metrics
    tracing = None if loaded.collector is None else open_tracing(loaded.collector, version=_version())
    observer: EngineObserver = metrics if tracing is None else SeveralObservers(metrics, tracing)
    try:
        with recording_progress() as progress:
            engine = EngineService(
                loaded.base,
                loaded.tokenizer,
                loaded.adapters,
                _engine_options(settings),
                observer=observer,
                merging=MergeOptions(settings.merge_policy, settings.merge_share, settings.merge_window),
                merge_observer=metrics,
                calibration_observer=metrics.calibrated,
                calibrate_interval=settings.calibrate_interval,
                progress=progress,
            )
    except InvalidRequestError as error:
        loaded.adapters.close()
        raise StartupError(f"{flag_of(error.field)}{str(error).removeprefix(error.field)}") from error
    metrics.watch_engine(engine.stats)
    if settings.tenant_metrics:
        metrics.watch_tenants(engine.tenants)
    metrics.watch_adapters(
        loaded.adapters.slot_stats, loaded.adapters.host_stats, loaded.adapters.adapters_in_memory
    )
    metrics.describe_build(
        version=_version(), torch=torch.__version__, device=str(loaded.base.device), base=settings.base
    )
    server = GrpcServer(
        engine,
        metrics,
        max_message_bytes=settings.max_message_bytes,
        max_timeout=settings.max_timeout,
        max_calls=settings.max_calls,
        max_inflight_bytes=settings.max_inflight_bytes,
        store_timeout=settings.load_deadline,
        security=loaded.security,
        admin=address_of(settings, "admin_port"),
        health_check=address_of(settings, "health_port"),
        reflect=not loaded.security.access.required if settings.reflection is None else settings.reflection,
        tracing=tracing,
        max_connection_age=settings.max_connection_age,
    )
    scraped: MetricsServer | None = None
    stop = asyncio.Event() if stop is None else stop
    try:
        if settings.metrics_port:
            scraped = MetricsServer(metrics, settings.host, settings.metrics_port)
        await asyncio.to_thread(
            preload, loaded.adapters, pinned=settings.pin or (), names=settings.preload or ()
        )
        if settings.calibrate:
            try:
                await asyncio.wrap_future(engine.calibrator.calibrate())
            except HotswapError as error:  # it serves as well without
                logger.warning("methods_not_calibrated", reason=str(error))
        bound = await server.start(settings.host, settings.port)
        with _StopSignals(stop) as signals:
            described = _describe(loaded, engine, bound)
            logger.info(
                "ready",
                address=described.address,
                dtype=described.dtype,
                quantization=described.quantization,
                weight_bytes=described.weight_bytes,
                seconds=round(described.seconds, 3),
            )
            ready(described)
            await stop.wait()
            logger.info("draining", running=engine.stats().running, waiting=engine.stats().waiting)
            await _stop(server, settings.drain_timeout, signals.again)
            logger.info("stopped")
    except PortInUseError as error:
        raise StartupError(f"--port: {error}; is another server running? Give another port") from error
    except OSError as error:
        raise StartupError(f"--metrics-port: cannot listen: {error}; give another port") from error
    finally:
        if scraped is not None:
            await asyncio.to_thread(scraped.close)
        await asyncio.to_thread(engine.close)
        if tracing is not None:
            await tracing.close(_FLUSH_S)


async def _stop(server: GrpcServer, drain_timeout: float, again: asyncio.Event) -> None:
    """Drain, unless the signal comes again: then stop at once."""
    draining = asyncio.create_task(server.stop(drain_timeout))
    impatient = asyncio.create_task(again.wait())
    await asyncio.wait({draining, impatient}, return_when=asyncio.FIRST_COMPLETED)
    impatient.cancel()
    if draining.done():
        await draining
        return
    logger.warning("stopped_without_draining")
    draining.cancel()
    with suppress(asyncio.CancelledError):
        await draining
    await server.stop(0)


class _StopSignals:
    """Sets `stop` on the first SIGTERM or SIGINT, `again` on the next. Only the main thread gets any."""

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self.again = asyncio.Event()

    def __enter__(self) -> _StopSignals:
        loop = asyncio.get_running_loop()
        with suppress(RuntimeError, ValueError):
            for number in _SIGNALS:
                loop.add_signal_handler(number, self._received)
        return self

    def __exit__(self, *exception: object) -> None:
        loop = asyncio.get_running_loop()
        with suppress(RuntimeError, ValueError):
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _received(self) -> None:
        (self.again if self._stop.is_set() else self._stop).set()


def usable_cores() -> int:
    """Physical cores that this process may use: the fewest of machine, affinity and container."""
    limits = [len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1]
    with suppress(OSError, ValueError):
        quota, period = _CGROUP_LIMIT.read_text().split()
        limits.append(max(1, int(quota) // int(period)))
    return min(limits)


def _bank_options(settings: ServeSettings, base: BaseModel) -> BankOptions:
    options = BankOptions(
        num_slots=settings.adapter_slots,
        max_lora_rank=settings.max_lora_rank,
        max_bottleneck_size=settings.max_bottleneck_size,
        max_prefix_tokens=settings.max_prefix_tokens,
    )
    budget = settings.device_adapter_bytes
    if budget is None:
        return options
    num_slots = slots_within(base, options, budget)
    if num_slots < options.num_slots:
        logger.warning("adapter_slots_reduced", asked=options.num_slots, slots=num_slots, budget=int(budget))
    return replace(options, num_slots=num_slots)


def _engine_options(settings: ServeSettings) -> EngineOptions:
    return EngineOptions(
        max_batch_size=settings.max_batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        page_size=settings.page_size,
        kv_cache_bytes=settings.kv_cache_bytes,
        max_context=settings.max_context,
        queue=QueueOptions(
            max_requests=settings.max_queue,
            max_tokens=settings.max_queue_tokens,
            early_refusal=settings.early_refusal,
        ),
        step_timeout=settings.step_timeout,
        fairness=FairnessOptions(
            input_token_weight=settings.input_token_weight,
            output_token_weight=settings.output_token_weight,
            tenant_weights=settings.tenant_weights,
            max_running_per_tenant=settings.max_running_per_tenant,
        ),
        graphs=not settings.eager,
        graph_timeout=settings.graph_timeout,
    )


def _describe(loaded: Loaded, engine: EngineService, bound: Bound) -> Ready:
    settings = loaded.settings
    return Ready(
        base=settings.base,
        address=shown(settings, "port", bound.port),
        port=bound.port,
        admin_address=shown(settings, "admin_port", bound.admin),
        health_address=shown(settings, "health_port", bound.health),
        security=loaded.security.summary,
        metrics_address=(
            f"http://{settings.host}:{settings.metrics_port}/metrics" if settings.metrics_port else ""
        ),
        store=settings.store,
        num_stored=loaded.num_stored,
        kv_tokens=engine.stats().kv_pages_total * settings.page_size,
        max_context=engine.max_context,
        adapter_slots=max(total for _, total in loaded.adapters.slot_counts().values()),
        device=str(loaded.base.device),
        dtype=str(loaded.base.dtype).removeprefix("torch."),
        quantization=loaded.base.quantization,
        weight_bytes=loaded.base.weight_bytes,
        kernels=loaded.kernels,
        threads=torch.get_num_threads(),
        seconds=time.monotonic() - loaded.started,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise StartupError("--device: torch sees no CUDA device; use --device cpu, or install a CUDA build")
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise BaseModelError(f"base: transformers cannot load its tokenizer: {reason}") from error


def _version() -> str:
    try:
        return importlib.metadata.version("hotswap")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
