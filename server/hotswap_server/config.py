"""What `hotswap serve` can be told: by flag, else by environment, else by a YAML file, else by default."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from hotswap.names import AdapterReference
from pydantic import ByteSize, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

ENV_PREFIX: Final = "HOTSWAP_SERVE_"


class SettingsError(ValueError):
    """A setting is missing or wrong. The message is one line that names it, its value and the remedy."""


class ServeSettings(BaseSettings):
    """Settings of a server. Every field is also a flag, a variable `HOTSWAP_SERVE_…` and a key in YAML.

    Sizes are in bytes; numbers with a unit, such as `512MiB` or `2GB`, are accepted. Times are in seconds.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, validate_default=True
    )

    base: str = Field(
        "smollm2", min_length=1, description="Base model: a transformers directory, a hub id, or smollm2."
    )
    store: str = Field(min_length=1, description="Adapter store: a directory or an fsspec URL.")
    store_refresh: float = Field(
        2.0,
        ge=0,
        description="Longest that a look at a store's URL holds, in seconds; a directory is looked at anew.",
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on, for metrics too.")
    port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    metrics_port: int = Field(9400, ge=0, le=65535, description="Prometheus port; 0 switches metrics off.")

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the weights; auto is float32 on a CPU and bfloat16 on a GPU."
    )
    quantize: Literal["nf4", "fp4", "int8"] | None = Field(
        None,
        description="Hold the base's linear layers in 4 bits (nf4, fp4) or 8; default: as they are stored.",
    )
    kernels: Literal["auto", "native", "onednn", "triton", "reference"] = Field(
        "auto", description="Which implementation of the operations runs."
    )
    eager: bool = Field(
        False, description="On a GPU, neither compile the layers nor record steps as CUDA graphs."
    )
    graph_timeout: float = Field(
        300.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds after which no more graphs are recorded at the start, nor code compiled.",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of the model; default: physical cores.")
    tensor_parallel: int = Field(
        1,
        ge=1,
        description="Devices that the base is cut over; more than 1 is refused, with what to do instead.",
    )

    max_batch_size: int = Field(64, ge=1, description="Most requests in one step.")
    max_batch_tokens: int = Field(
        512, ge=1, description="Most tokens in one step; longer prompts take several."
    )
    page_size: int = Field(16, ge=1, le=1024, description="Tokens per page of the key-value cache.")
    kv_cache_bytes: ByteSize = Field(
        ByteSize(1 << 30), gt=0, description="Size of the key-value cache in bytes."
    )
    max_context: int | None = Field(
        None, ge=2, description="Most tokens of prompt and output together; default: what the base can."
    )

    adapter_slots: int = Field(16, ge=1, description="Adapters that are ready on the device at once.")
    max_lora_rank: int = Field(64, ge=1, description="Largest LoRA rank; adapters over it are refused.")
    max_bottleneck_size: int = Field(
        256, ge=1, description="Largest width of a bottleneck adapter; adapters over it are refused."
    )
    max_prefix_tokens: int = Field(
        512, ge=1, description="Longest prefix in tokens; adapters over it are refused."
    )
    device_adapter_bytes: ByteSize | None = Field(
        None,
        gt=0,
        description="Most device memory for slots of all methods; fewer are made where it is too little.",
    )
    host_cache_bytes: ByteSize = Field(
        ByteSize(1 << 30), ge=0, description="Host memory for loaded adapters in bytes."
    )
    load_workers: int = Field(2, ge=1, le=256, description="Adapters that are loaded at the same time.")
    load_deadline: float = Field(
        60.0, gt=0, description="Longest that the store may take to find or load an adapter, in seconds."
    )

    pin: Annotated[tuple[str, ...], NoDecode] | None = Field(
        None,
        description="Adapters that are brought to the device at the start and stay: tenant/name[@version],…",
    )
    preload: Annotated[tuple[str, ...], NoDecode] | None = Field(
        None, description="Adapters that are brought to memory at the start, the first ones to the device."
    )
    merge_policy: Literal["off", "manual", "auto"] = Field(
        "manual", description="Who merges a LoRA into the base: nobody, MergeAdapter, or also the traffic."
    )
    merge_share: float = Field(
        0.9, gt=0.5, le=1, description="With auto: the share of all tokens that one adapter must have."
    )
    merge_window: float = Field(
        30.0, gt=0, description="With auto: the time for which it must have had it, in seconds."
    )

    max_running_per_tenant: int | None = Field(
        None, ge=1, description="Most requests of one tenant in the batch; default: no limit of its own."
    )
    tenant_weights: Annotated[dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]], NoDecode] = (
        Field({}, description="Shares of tenants under load, such as acme=2,globex=0.5; others have 1.")
    )
    input_token_weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="What a prompt's token costs its tenant."
    )
    output_token_weight: float = Field(
        2.0, gt=0, allow_inf_nan=False, description="What a generated token costs its tenant."
    )
    tenant_metrics: bool = Field(False, description="Whether metrics tell the load of each tenant.")

    calibrate: bool = Field(
        False, description="Whether to measure what each method costs before the server is ready."
    )
    calibrate_interval: float = Field(
        3600.0, ge=0, description="While idle, measure that again after this many seconds; 0 never does."
    )

    max_queue: int = Field(
        1024, ge=1, description="Most waiting requests; more are answered RESOURCE_EXHAUSTED."
    )
    max_queue_tokens: int = Field(
        1 << 20, ge=1, description="Most tokens of waiting prompts; more are answered RESOURCE_EXHAUSTED."
    )
    early_refusal: bool = Field(
        True, description="Whether to refuse at once what cannot be done before its deadline."
    )
    max_calls: int = Field(
        4096, ge=1, description="Most inference calls at once; more are answered RESOURCE_EXHAUSTED."
    )
    max_inflight_bytes: ByteSize = Field(
        ByteSize(256 << 20), ge=1024, description="Most bytes of requests that are being answered."
    )
    step_timeout: float = Field(
        120.0, gt=0, description="Seconds after which a step counts as stuck and health as NOT_SERVING."
    )
    max_timeout: float = Field(3600.0, gt=0, description="Longest that a call may take, in seconds.")
    max_message_bytes: ByteSize = Field(
        ByteSize(8 << 20), ge=1024, le=2**31 - 1, description="Largest request message in bytes."
    )
    drain_timeout: float = Field(
        30.0, ge=0, description="Longest that a stop waits for running requests, in seconds."
    )
    max_connection_age: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Age in seconds at which clients are asked to connect anew; calls go on. Default: none.",
    )
    tls_cert: Path | None = Field(
        None, description="Certificate with its chain, PEM; with tls_key it switches TLS on."
    )
    tls_key: Path | None = Field(None, description="The certificate's key, PEM, without a passphrase.")
    tls_client_ca: Path | None = Field(
        None, description="Authority whose certificates clients must present, PEM."
    )
    keys_file: Path | None = Field(
        None, description="Keys and certificates of those who may call; without it everybody may."
    )
    admin_port: int | None = Field(
        None, ge=0, le=65535, description="Port of AdapterService alone; default: with the rest on port."
    )
    admin_host: str | None = Field(
        None, min_length=1, description="Address that admin_port listens on; default: host."
    )
    health_port: int | None = Field(
        None, ge=0, le=65535, description="Further port for health alone, without TLS, for probes."
    )
    reflection: bool | None = Field(
        None, description="Whether clients may ask for the API's description; default: without keys_file."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log line."
    )
    log_format: Literal["json", "console"] = Field("console", description="Form of a log line.")
    otlp_endpoint: str | None = Field(
        None,
        description="OpenTelemetry collector that takes spans by gRPC, http(s)://HOST:4317; default: none.",
    )

    @field_validator("tensor_parallel")
    @classmethod
    def _whole(cls, value: int) -> int:
        if value > 1:
            raise ValueError(
                "the base has to fit one device, as kernels and adapters' banks hold whole weights; make it "
                "smaller with --quantize nf4, or take a larger device; for throughput run more servers"
            )
        return value

    @field_validator("tenant_weights", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """`acme=2,globex=0.5`, as flags and variables have it, is a map in YAML."""
        if not isinstance(value, str):
            return value
        pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
        if not all(name.strip() and equals for name, equals, _ in pairs):
            raise ValueError("input should be pairs such as acme=2,globex=0.5")
        return {name.strip(): weight.strip() for name, _, weight in pairs}

    @field_validator("pin", "preload", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        names = (
            [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value
        )
        for name in names if isinstance(names, list | tuple) else ():
            AdapterReference.parse(str(name))
        return names

    @field_validator(
        "store_refresh",
        "load_deadline",
        "step_timeout",
        "merge_window",
        "max_timeout",
        "drain_timeout",
        "calibrate_interval",
    )
    @classmethod
    def _finite(cls, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError("input should be a finite number of seconds")
        return value

    @field_validator("tls_key", "tls_client_ca", "admin_host")
    @classmethod
    def _not_alone(cls, value: Any, info: ValidationInfo) -> Any:
        needed = "admin_port" if info.field_name == "admin_host" else "tls_cert"
        given = info.data.get(needed) is not None
        if value is not None and not given:
            raise ValueError(f"has no effect without {needed}; give that too")
        if info.field_name == "tls_key" and value is None and given:
            raise ValueError("is needed beside tls_cert")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings


def load_settings(config: Path | None = None, **flags: Any) -> ServeSettings:
    """The settings of `flags`, the environment and the YAML file `config`, in this order of precedence.

    A flag that is None was not given.

    Raises:
        SettingsError: a value is wrong or missing, or the file is; a key of it that is no setting included.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    from_file = {} if config is None else _read_yaml(config)

    class Layered(ServeSettings):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *args: Any, **sources: PydanticBaseSettingsSource
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            file = InitSettingsSource(settings_cls, init_kwargs=from_file)
            return *super().settings_customise_sources(settings_cls, *args, **sources), file

    try:
        values = Layered(**given).model_dump()
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise SettingsError(_describe(problem, given, config)) from None
    return ServeSettings.model_construct(**values)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError(f"--config {path}: cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"--config {path}: is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path}: must map settings to values, such as `port: 50051`")
    known = ServeSettings.model_fields
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else "see `hotswap serve --help` for the settings"
            raise SettingsError(f"--config {path}: unknown setting {key!r}; {remedy}")
    return {key: value for key, value in content.items() if value is not None}


def _describe(problem: Mapping[str, Any], given: Mapping[str, Any], config: Path | None) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else "settings"
    flag, variable = flag_of(name), f"{ENV_PREFIX}{name.upper()}"
    if problem["type"] == "missing":
        return f"{name}: is required; give {flag}, set {variable}, or write {name!r} into the --config file"
    if name in given:
        source = flag
    elif os.environ.get(variable) or variable.lower() in os.environ:
        source = variable
    else:
        source = f"--config {config}"
    rule = str(problem["msg"]).removeprefix("Value error, ")
    return f"{name}: {rule[0].lower()}{rule[1:]}, got {problem['input']!r}; correct it in {source}"
