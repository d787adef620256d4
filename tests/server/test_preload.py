"""Adapters that are there before the first request."""

import shutil

import pytest
import structlog
from hotswap_server.adapters.manager import AdapterManager
from hotswap_server.adapters.method import BankOptions
from hotswap_server.adapters.residency import Residency
from hotswap_server.config import SettingsError, load_settings
from hotswap_server.preload import preload
from support.adapters import write_lora


@pytest.fixture(scope="module")
def store(llama, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    source = write_lora(llama, store / "acme" / "a" / "1", r=2, target_modules=["q_proj"])
    for name in "bcd":
        shutil.copytree(source, store / "acme" / name / "1")
    broken = shutil.copytree(source, store / "acme" / "broken" / "1")
    (broken / "adapter_model.safetensors").write_bytes(b"x")
    return store


def test_preload_fills_the_device_then_host_memory_and_leaves_out_what_fails(llama_base, store):
    manager = AdapterManager(AdapterManager.open_store(str(store)), llama_base, BankOptions(num_slots=3))
    try:
        with structlog.testing.capture_logs() as logs:
            preload(
                manager,
                pinned=["acme/a@1", "acme/nobody"],
                names=["acme/b", "acme/broken", "acme/c", "acme/d@7"],
            )
        found = {info.ref.name[5:]: (info.residency, info.pinned) for info in manager.list()}
        failed = [entry["adapter"] for entry in logs if entry["event"] == "adapter_not_preloaded"]
    finally:
        manager.close()
    assert found == {
        "a": (Residency.DEVICE, True),
        "b": (Residency.DEVICE, False),
        "broken": (Residency.STORE, False),
        "c": (Residency.HOST, False),
        "d": (Residency.HOST, False),  # the same content as the others
    }
    assert failed == ["acme/nobody", "acme/d@7", "acme/broken"]


def test_the_lists_are_settings(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("pin: [acme/a, acme/b@2]\n")
    settings = load_settings(path, store="s", preload="acme/c, acme/d@3")
    assert settings.pin == ("acme/a", "acme/b@2")
    assert settings.preload == ("acme/c", "acme/d@3")
    with pytest.raises(SettingsError, match=r"pin: .*tenant/name.*correct it in --pin"):
        load_settings(store="s", pin="acme")
