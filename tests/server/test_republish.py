"""Names whose content changes while requests run: a response's digest is that of the weights behind it."""

import shutil
import threading

import pytest
from hotswap.layout import publish
from hotswap.names import AdapterName
from hotswap_server.adapters.checkpoint import AdapterChangedError
from hotswap_server.adapters.residency import InUse
from support.adapters import write_lora, write_prefix
from support.models import random_prompt
from support.running import Running, wait_until

PROMPT = random_prompt(6, seed=0)
VERSIONS = 4


@pytest.fixture(scope="module")
def sources(llama, tmp_path_factory):
    """Contents by adapter: LoRAs, and prefixes of pages that are full and shared."""
    scratch = tmp_path_factory.mktemp("sources")
    loras = [
        write_lora(llama, scratch / f"a{n}", seed=n, r=4, target_modules=["q_proj", "v_proj"])
        for n in range(VERSIONS)
    ]
    prefixes = [write_prefix(llama, scratch / f"p{n}", 33, seed=n) for n in range(VERSIONS)]
    return {"a": loras, "p": prefixes}


def put(store, name, source):
    publish(store, AdapterName("acme", name), lambda to: shutil.copytree(source, to, dirs_exist_ok=True))


def test_a_digest_is_of_the_weights_that_answered(llama_base, tokenizer, sources, tmp_path):
    for name, contents in sources.items():
        put(tmp_path, name, contents[0])
    with Running(llama_base, tokenizer, tmp_path, slots=2, kv_pages=64) as running:
        outcomes = []
        published = threading.Event()

        def request() -> None:
            while not published.is_set() or len(outcomes) % 20:
                outcomes.append(
                    running.generate(PROMPT, f"acme/{'ap'[len(outcomes) % 2]}", max_new_tokens=20)
                )
                wait_until(lambda: sum(not outcome.ended for outcome in outcomes[-40:]) < 12)

        requests = threading.Thread(target=request)
        requests.start()
        for version in range(1, VERSIONS):
            seen = len(outcomes)
            wait_until(lambda seen=seen: len(outcomes) > seen + 10)
            for name, contents in sources.items():
                put(tmp_path, name, contents[version])
        published.set()
        requests.join()
        results = [(outcome.request.adapter, tuple(outcome.result().tokens)) for outcome in outcomes]

    used = {ref.digest: ref for ref, _ in results}
    assert {ref.name for ref in used.values()} == {"acme/a", "acme/p"}
    assert len(used) > VERSIONS
    with Running(llama_base, tokenizer, tmp_path, kv_pages=64) as running:
        alone = {
            digest: tuple(running.generate(PROMPT, ref, max_new_tokens=20).result().tokens)
            for digest, ref in used.items()
        }
    assert len(set(alone.values())) == len(alone), "a mix-up must show"
    assert [ref for ref, tokens in results if alone[ref.digest] != tokens] == []


@pytest.mark.parametrize("name", ["a", "p"])
def test_content_that_changes_under_its_number_is_another_adapter(
    llama_base, tokenizer, sources, tmp_path, name
):
    """Same name, same version, and pages, slots and host memory of the old content that must not serve it."""
    directory = tmp_path / "acme" / name / "1"
    alone = []
    for content in sources[name][:2]:
        shutil.rmtree(tmp_path / "acme", ignore_errors=True)
        shutil.copytree(content, directory)
        with Running(llama_base, tokenizer, tmp_path) as running:
            alone.append(running.generate(PROMPT, f"acme/{name}", max_new_tokens=50).result().tokens)
    assert alone[0] != alone[1]

    def replace(content) -> None:
        shutil.rmtree(directory)
        shutil.copytree(content, directory)

    replace(sources[name][0])
    with Running(llama_base, tokenizer, tmp_path) as running:
        before = running.generate(PROMPT, f"acme/{name}", max_new_tokens=50)
        wait_until(lambda: before.deltas)
        replace(sources[name][1])
        after = running.generate(PROMPT, f"acme/{name}", max_new_tokens=50)
        assert after.request.adapter.version == before.request.adapter.version == 1
        assert after.request.adapter.digest != before.request.adapter.digest
        assert [before.result().tokens, after.result().tokens] == alone
        # Only what is in memory still is what it was; from the store it is told to be another.
        old = before.request.adapter
        assert running.generate(PROMPT, old, max_new_tokens=50).result().tokens == alone[0]
        running.adapters.unload(f"acme/{name}", None, in_use=InUse.WAIT).result()
        with pytest.raises(AdapterChangedError):
            running.generate(PROMPT, old).result()
