"""A replica without its cluster: the settings that it takes, and the relay to the server in it."""

from __future__ import annotations

from types import SimpleNamespace

import grpc
import pytest
import yaml
from hotswap.v1 import adapters_pb2, inference_pb2
from hotswap_server.config import SettingsError, load_settings
from support.deployed import RAY_CONFIG

pytest.importorskip("ray")
from hotswap_server.ray_serve import edge, replica
from ray.serve._private.utils import _callable_uses_multiplexing
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.schema import ServeDeploySchema


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("port", 50052),
        ("host", "0.0.0.0"),
        ("admin_port", 1),
        ("health_port", 1),
        ("reflection", True),
        ("max_connection_age", 60),
    ],
)
def test_settings_of_ports_are_refused(setting, value, tmp_path):
    with pytest.raises(SettingsError, match=rf"^{setting}: has no effect in Ray Serve: .*Ray's proxy"):
        replica.application({"store": str(tmp_path), setting: value})


def test_tls_is_refused(tmp_path):
    files = {"tls_cert": "cert.pem", "tls_key": "key.pem"}
    with pytest.raises(SettingsError, match=r"^tls_cert: .*has no TLS; end it in a proxy before it"):
        replica.application({"store": str(tmp_path), **files})


def test_a_wrong_setting_is_named():
    with pytest.raises(SettingsError, match=r"^max_batch_size: "):
        replica.application({"store": "x", "max_batch_size": 0})


def test_the_deployed_file_names_what_is_there(tmp_path):
    config = ServeDeploySchema(**yaml.safe_load(RAY_CONFIG.read_text()))
    options = config.grpc_options.model_dump()
    names = {path.rpartition(".")[2] for path in options["grpc_servicer_functions"]}
    assert names == {name for name in vars(edge) if name.startswith("add_")}
    [application] = config.applications
    assert application.import_path == f"{replica.__name__}:{replica.application.__name__}"
    built = replica.application({**application.args, "store": str(tmp_path)})
    deployment = built._bound_deployment
    assert [deployment.name] == [deployment.name for deployment in application.deployments]
    assert deployment.max_ongoing_requests == 2 * application.args["max_batch_size"]
    assert _callable_uses_multiplexing(deployment.func_or_class)


def context(**metadata: str) -> RayServegRPCContext:
    """A call's context as a replica gets it."""
    return RayServegRPCContext(
        SimpleNamespace(
            auth_context=dict,
            code=lambda: 0,
            details=lambda: "",
            invocation_metadata=lambda: tuple(metadata.items()),
            peer=lambda: "",
            peer_identities=lambda: None,
            peer_identity_key=lambda: None,
            trailing_metadata=tuple,
        )
    )


class Replica(replica.Replica):
    held: tuple[str, ...] = ()

    async def hold(self, adapter: str) -> str:
        self.held += (adapter,)
        return adapter


async def test_calls_are_relayed(tiny_base, write_lora, tmp_path):
    write_lora(tmp_path / "acme/a/1")
    settings = load_settings(
        base=str(tiny_base), store=str(tmp_path), kv_cache_bytes="1MiB", threads=1, port=0, metrics_port=0
    )
    relay = Replica.__new__(Replica)
    await relay.__init__(settings)
    try:
        await relay.check_health()
        about = {"adapter": "acme/a", "input": {"prompt": "hello"}, "sampling": {"max_new_tokens": 3}}
        carried = context(**{"x-request-id": "7", edge.MODEL_ID_KEY: "acme/a", edge.TIMEOUT_KEY: "60.0"})
        reply = await relay.Generate(inference_pb2.GenerateRequest(**about), carried)
        assert reply.completion.adapter.name == "acme/a"
        assert dict(carried.trailing_metadata())["x-request-id"] == "7"
        assert not carried.code()

        *messages, last = [
            message
            async for message in relay.GenerateStream(inference_pb2.GenerateStreamRequest(**about), carried)
        ]
        assert messages[-1].HasField("completion")
        assert last == inference_pb2.GenerateStreamResponse()
        assert relay.held == ("acme/a",) * 2

        unknown = context(**{edge.MODEL_ID_KEY: "acme/b"})
        assert not (await relay.GetAdapter(adapters_pb2.GetAdapterRequest(name="acme/b"), unknown)).ByteSize()
        assert unknown.code() is grpc.StatusCode.NOT_FOUND
        assert "grpc-status-details-bin" in dict(unknown.trailing_metadata())
        assert relay.held == ("acme/a",) * 2, "what is not there is not held"
    finally:
        await relay.close()
    with pytest.raises(RuntimeError, match="the server has ended"):
        await relay.check_health()
