"""`hotswap` that starts at once: each call is a fork of one process that has imported its libraries.

`python warm.py serve SOCKET` is that process; `python warm.py call SOCKET ARGUMENT…` stands for the command
and passes on arguments, directory, environment, standard streams, signals and exit status.
"""

import importlib
import json
import os
import signal
import socket
import struct
import sys
from typing import Any

_HEADER = struct.Struct("!I")
_LIBRARIES = (
    *("hotswap_client.cli._app", "hotswap_server.app", "hotswap_server.store_verbs", "hotswap_trainer.run"),
    *("hotswap_trainer.loop", "hotswap_trainer.methods.bottleneck.tuner", "hotswap_server.merged_base"),
    *("bitsandbytes", "matplotlib.pyplot", "matplotlib.backends.backend_agg", "peft.tuners.lora"),
    *(
        "transformers.trainer",
        "transformers.models.llama.modeling_llama",
        "transformers.models.auto.modeling_auto",
    ),
)


def call(path: str, arguments: list[str]) -> int:
    """Run `hotswap` with `arguments` in the warm process at `path`; its exit status."""
    message = json.dumps({"arguments": arguments, "directory": os.getcwd(), "environment": dict(os.environ)})
    payload = message.encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [_HEADER.pack(len(payload))], [0, 1, 2])
        connection.sendall(payload)
        child = _receive(connection)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: os.kill(child, number))
        return _receive(connection)


def serve(path: str) -> None:
    """Import, say so, and fork for each call until the process is ended."""
    for module in _LIBRARIES:
        importlib.import_module(module)

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(16)
    print("warm", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the children of calls wait for their own
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _handle(connection)
        connection.close()


def _handle(connection: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    header, descriptors, _, _ = socket.recv_fds(connection, _HEADER.size, 3)
    payload = b""
    while len(payload) < _HEADER.unpack(header)[0]:
        payload += connection.recv(1 << 16)
    child = os.fork()
    if child == 0:
        connection.close()
        _become_hotswap(json.loads(payload), descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(_HEADER.pack(child))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.sendall(_HEADER.pack(code if code >= 0 else 128 - code))
    os._exit(0)


def _become_hotswap(message: dict[str, Any], descriptors: list[int]) -> None:
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(message["directory"])
    os.environ.clear()
    os.environ.update(message["environment"])
    sys.argv = ["hotswap", *message["arguments"]]
    from hotswap_client.cli import main

    try:
        main()
    except SystemExit as error:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error.code, int) else int(error.code is not None))


def _receive(connection: socket.socket) -> int:
    received = b""
    while len(received) < _HEADER.size:
        part = connection.recv(_HEADER.size - len(received))
        if not part:
            return 255
        received += part
    number: int = _HEADER.unpack(received)[0]
    return number


if __name__ == "__main__":
    role, where, *rest = sys.argv[1:]
    if role == "serve":
        serve(where)
    else:
        sys.exit(call(where, rest))
