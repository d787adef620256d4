"""From status codes and details to the error tree."""

import asyncio

import grpc
import hotswap_client as hc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from .conftest import fail

CODES = [
    (grpc.StatusCode.INVALID_ARGUMENT, hc.InvalidArgument),
    (grpc.StatusCode.OUT_OF_RANGE, hc.InvalidArgument),
    (grpc.StatusCode.NOT_FOUND, hc.NotFound),
    (grpc.StatusCode.FAILED_PRECONDITION, hc.FailedPrecondition),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, hc.ResourceExhausted),
    (grpc.StatusCode.DEADLINE_EXCEEDED, hc.DeadlineExceeded),
    (grpc.StatusCode.CANCELLED, hc.Cancelled),
    (grpc.StatusCode.UNAVAILABLE, hc.Unavailable),
    (grpc.StatusCode.UNAUTHENTICATED, hc.Unauthenticated),
    (grpc.StatusCode.PERMISSION_DENIED, hc.PermissionDenied),
    (grpc.StatusCode.UNIMPLEMENTED, hc.Unimplemented),
    (grpc.StatusCode.INTERNAL, hc.Internal),
    (grpc.StatusCode.DATA_LOSS, hc.Internal),
    (grpc.StatusCode.ABORTED, hc.HotswapError),
]


async def both_errors(target, retries=0):
    """The error of the same failing call, from both clients, unary and streaming."""

    def sync():
        with hc.Client(target, retries=retries) as client:
            with pytest.raises(hc.HotswapError) as unary:
                client.generate(prompt="x")
            with pytest.raises(hc.HotswapError) as stream:
                list(client.stream(prompt="x"))
            return [unary.value, stream.value]

    errors = await asyncio.to_thread(sync)
    async with hc.AsyncClient(target, retries=retries) as client:
        with pytest.raises(hc.HotswapError) as unary:
            await client.generate(prompt="x")
        with pytest.raises(hc.HotswapError) as stream:
            async for _ in client.stream(prompt="x"):
                pass
    return [*errors, unary.value, stream.value]


@pytest.mark.parametrize(("code", "kind"), CODES)
async def test_every_code_with_details(fake, code, kind):
    script = fail(
        code,
        "no",
        error_details_pb2.ErrorInfo(reason="WHY", domain="hotswap", metadata={"adapter": "acme/x"}),
        error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)),
    )
    fake.scripts.update(Generate=script, GenerateStream=script)
    for error in await both_errors(fake.target):
        assert type(error) is kind
        assert (error.code, str(error), error.message) == (code, "no", "no")
        assert (error.reason, error.metadata, error.retry_after) == ("WHY", {"adapter": "acme/x"}, 1.5)


async def test_a_bad_request_names_its_field(fake):
    violation = error_details_pb2.BadRequest.FieldViolation(field="sampling.top_p", description="too high")
    script = fail(
        grpc.StatusCode.INVALID_ARGUMENT, "no", error_details_pb2.BadRequest(field_violations=[violation])
    )
    fake.scripts.update(Generate=script, GenerateStream=script)
    for error in await both_errors(fake.target):
        assert isinstance(error, hc.InvalidArgument)
        assert error.field == "sampling.top_p"
        assert (error.reason, error.metadata, error.retry_after) == ("", {}, None)


@pytest.mark.parametrize("details", [b"\xff", b"\x08\x05"])
async def test_damaged_details_do_not_hide_the_error(fake, details):
    def script(request, context):
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        context.abort(grpc.StatusCode.NOT_FOUND, "gone")

    fake.scripts.update(Generate=script, GenerateStream=script)
    for error in await both_errors(fake.target):
        assert isinstance(error, hc.NotFound)
        assert str(error) == "gone"


async def test_no_server_is_unavailable():
    for error in await both_errors("localhost:1"):
        assert isinstance(error, hc.Unavailable)
