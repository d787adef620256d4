"""A server that answers by script, on a loopback port: what the client sends and does is seen in it."""

import threading
import tomllib
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import status_pb2
from grpc_status import rpc_status
from hotswap.v1 import adapters_pb2, adapters_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
RESOLVED = common_pb2.ResolvedAdapter(name="acme/support", version=3, digest="ab" * 32, method="lora")
COMPLETION = inference_pb2.Completion(
    adapter=RESOLVED,
    path=common_pb2.SERVING_PATH_BATCHED,
    finish_reason=inference_pb2.FINISH_REASON_STOP_TOKEN,
    usage=common_pb2.Usage(prompt_tokens=5, generated_tokens=3),
    timings=common_pb2.Timings(queue_seconds=1, load_seconds=2, prefill_seconds=3, decode_seconds=4),
)
LOGPROB = common_pb2.TokenLogprob(
    token_id=7, logprob=-0.5, top=[common_pb2.TopLogprob(token_id=8, logprob=-0.25)]
)
ADAPTER = adapters_pb2.Adapter(
    name="acme/support",
    version=3,
    digest="ab" * 32,
    method="lora",
    size_bytes=3 * 2**20,
    num_parameters=1000,
    method_config={"r": "16", "target_modules": '["q_proj"]', "odd": "not json"},
    residency=adapters_pb2.RESIDENCY_DEVICE,
    pinned=True,
    running_requests=2,
)


def fail(code: grpc.StatusCode, message: str, *details: Any) -> Callable[[Any, grpc.ServicerContext], Any]:
    """A script that aborts with a rich status."""

    def abort(request: Any, context: grpc.ServicerContext) -> Any:
        packed = []
        for detail in details:
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
        status = status_pb2.Status(code=code.value[0], message=message, details=packed)
        context.abort_with_status(rpc_status.to_status(status))

    return abort


@dataclass
class FakeServer:
    """`scripts[rpc]` replaces a reply; `requests` and `metadata` hold what arrived, the newest last."""

    target: str = ""
    scripts: dict[str, Callable[[Any, grpc.ServicerContext], Any]] = field(default_factory=dict)
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def answer(self, rpc: str, request: Any, context: grpc.ServicerContext, reply: Any) -> Any:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        return self.scripts[rpc](request, context) if rpc in self.scripts else reply


def _list(request: adapters_pb2.ListAdaptersRequest) -> adapters_pb2.ListAdaptersResponse:
    older = adapters_pb2.Adapter(
        name="acme/old", version=1, residency=adapters_pb2.RESIDENCY_STORE, error="acme/old@1: is damaged"
    )
    if request.page_token == "":
        return adapters_pb2.ListAdaptersResponse(adapters=[older], next_page_token="more")
    return adapters_pb2.ListAdaptersResponse(adapters=[ADAPTER])


REPLIES: dict[str, Callable[[Any], Any]] = {
    "Generate": lambda _: inference_pb2.GenerateResponse(
        text="hi!", token_ids=[7, 8, 2], logprobs=[LOGPROB], completion=COMPLETION
    ),
    "Score": lambda _: inference_pb2.ScoreResponse(
        logprobs=[LOGPROB],
        total_logprob=-0.5,
        adapter=RESOLVED,
        path=common_pb2.SERVING_PATH_MERGED,
        usage=common_pb2.Usage(prompt_tokens=4),
    ),
    "Tokenize": lambda _: inference_pb2.TokenizeResponse(token_ids=[1, 2], count=2),
    "ListAdapters": _list,
    "GetAdapter": lambda _: adapters_pb2.GetAdapterResponse(adapter=ADAPTER),
    "LoadAdapter": lambda _: adapters_pb2.LoadAdapterResponse(adapter=ADAPTER, load_seconds=0.25),
    "UnloadAdapter": lambda _: adapters_pb2.UnloadAdapterResponse(adapters=[ADAPTER], cancelled_requests=2),
    "PinAdapter": lambda _: adapters_pb2.PinAdapterResponse(adapter=ADAPTER),
    "UnpinAdapter": lambda _: adapters_pb2.UnpinAdapterResponse(adapters=[ADAPTER]),
    "MergeAdapter": lambda _: adapters_pb2.MergeAdapterResponse(adapter=ADAPTER, merge_seconds=0.5),
    "UnmergeAdapter": lambda _: adapters_pb2.UnmergeAdapterResponse(adapter=ADAPTER, unmerge_seconds=0.75),
    "CalibrateMethods": lambda _: adapters_pb2.CalibrateMethodsResponse(
        costs=[
            adapters_pb2.MethodCost(
                method="none",
                path=common_pb2.SERVING_PATH_BASE,
                batch_size=8,
                overhead_ratio=1,
                step_seconds=0.01,
            ),
            adapters_pb2.MethodCost(
                method="lora",
                path=common_pb2.SERVING_PATH_BATCHED,
                batch_size=8,
                overhead_ratio=1.25,
                step_seconds=0.0125,
                adapters=4,
                made_up=True,
            ),
        ],
        calibration_seconds=2,
    ),
}


def _stream(fake: FakeServer, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    context.add_callback(fake.ended.set)
    default = [
        inference_pb2.GenerateStreamResponse(
            delta=inference_pb2.Delta(text="hi", token_ids=[7], logprobs=[LOGPROB])
        ),
        inference_pb2.GenerateStreamResponse(delta=inference_pb2.Delta(text="!", token_ids=[8, 2])),
        inference_pb2.GenerateStreamResponse(completion=COMPLETION),
    ]
    yield from fake.answer("GenerateStream", request, context, default)


def endless(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    """A stream that ends only with its call."""
    while context.is_active():
        yield inference_pb2.GenerateStreamResponse(delta=inference_pb2.Delta(text="x", token_ids=[1]))


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    fake = FakeServer()

    def unary(name: str) -> Callable[..., Any]:
        return lambda self, request, context: fake.answer(name, request, context, REPLIES[name](request))

    inference = {name: unary(name) for name in ("Generate", "Score", "Tokenize")}
    inference["GenerateStream"] = lambda self, request, context: _stream(fake, request, context)
    admin = {name: unary(name) for name in REPLIES if "Adapter" in name or name == "CalibrateMethods"}
    server = grpc.server(futures.ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(
        type("Inference", (inference_pb2_grpc.InferenceServiceServicer,), inference)(), server
    )
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(
        type("Admin", (adapters_pb2_grpc.AdapterServiceServicer,), admin)(), server
    )
    fake.target = f"localhost:{server.add_insecure_port('localhost:0')}"
    server.start()
    yield fake
    server.stop(None).wait()


@pytest.fixture
def verbs(tmp_path: Path) -> Path:
    """A folder that, on the path, makes the project's verbs discoverable as an installed package does."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = tmp_path / "site" / f"hotswap-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: hotswap\nVersion: {project['version']}\n")
    lines = []
    for group in ("hotswap.verbs", "hotswap.variants"):
        points = project["entry-points"][group]
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return info.parent
