"""What the engine's tests share: one thread, no hub, and a tiny Llama with its tokenizer."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models run fastest on one thread, and the cores of a test machine are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer():
    from support.models import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture(scope="session")
def llama():
    """The reference model; `llama_base` is the engine's copy of it."""
    from support.models import FAMILIES, tiny_model

    return tiny_model(FAMILIES["llama"])


@pytest.fixture(scope="session")
def llama_directory(llama, tokenizer, tmp_path_factory):
    """The reference model with its tokenizer, for a server to load."""
    directory = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def llama_base(llama):
    from support.models import prepared

    return prepared(llama)


@pytest.fixture(scope="session")
def smollm2():
    """The embedded base's directory; the first use on a machine converts it, for half a minute."""
    from hotswap.bases import resolve_base

    return resolve_base("smollm2", progress=False)
