"""An engine whose store is S3: published, switched by alias and deleted under it, and the answers PEFT's."""

import shutil

import pytest
from hotswap.aliases import Target
from hotswap.layout import publish
from hotswap.names import AdapterName
from hotswap.storage import open_storage
from hotswap.store_admin import delete, set_alias
from hotswap_server.errors import AdapterNotFoundError
from support.adapters import Oracle, write_lora
from support.models import random_prompt
from support.running import Running

NAME = AdapterName("acme", "triage")
PROMPT = random_prompt(9, seed=3)


def test_versions_come_and_go_under_a_running_engine(llama, llama_base, tokenizer, tmp_path, s3_url):
    directories = {
        str(seed): write_lora(llama, tmp_path / str(seed), seed=seed, r=2, target_modules=["q_proj"])
        for seed in (1, 2)
    }
    oracle = Oracle(llama, directories)
    expected = {version: oracle.generate(str(version), PROMPT, 12) for version in (1, 2)}
    assert expected[1] != expected[2]

    def publish_seed(seed: int) -> int:
        return publish(
            s3_url, NAME, lambda target: shutil.copytree(directories[str(seed)], target, dirs_exist_ok=True)
        )

    storage = open_storage(s3_url)
    with Running(llama_base, tokenizer, s3_url) as running:
        assert publish_seed(1) == 1
        first = running.generate(PROMPT, "acme/triage", max_new_tokens=12)
        assert publish_seed(2) == 2
        assert running.generate(PROMPT, "acme/triage", max_new_tokens=12).result().tokens == expected[2]
        assert first.result().tokens == expected[1], "what was asked before keeps its version"
        set_alias(storage, NAME, "stable", Target(1))
        assert running.generate(PROMPT, "acme/triage", max_new_tokens=12).result().tokens == expected[1]
        assert (
            running.generate(PROMPT, "acme/triage@latest", max_new_tokens=12).result().tokens == expected[2]
        )
        resolved = running.adapters.resolve("acme/triage@latest", None)
        delete(storage, NAME, 2, force=True)
        assert running.generate(PROMPT, resolved, max_new_tokens=12).result().tokens == expected[2], (
            "it is in memory"
        )
        with pytest.raises(AdapterNotFoundError):
            running.adapters.resolve("acme/triage@2", None)
        assert (
            running.generate(PROMPT, "acme/triage@latest", max_new_tokens=12).result().tokens == expected[1]
        )
