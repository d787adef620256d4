"""`hotswap adapters publish|alias|rollback|delete|verify`, run as a user runs them."""

import json
import shutil
from pathlib import Path

import pytest
from hotswap.layout import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from hotswap.storage import open_storage
from hotswap_client.cli._app import app
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, llama):
    from support.adapters import write_lora

    directory = write_lora(llama, tmp_path_factory.mktemp("peft"), r=2, target_modules=["q_proj"])
    (directory / "README.md").write_text("a card")
    (directory / "optimizer.pt").write_bytes(b"\x80\x02")
    (directory / ".hidden").touch()
    (directory / "checkpoint-1").mkdir(exist_ok=True)
    return directory


def runner(store):
    """Runs a verb on a store; its exit status, output and errors."""

    def command(verb, *arguments, status=0, store=store):
        result = CliRunner().invoke(app, ["adapters", verb, *arguments, "--store", store])
        assert result.exit_code == status, result.output
        return result

    return command


@pytest.fixture
def local(tmp_path):
    """A store in a directory."""
    return tmp_path / "store"


@pytest.fixture
def run_local(local):
    return runner(str(local))


@pytest.mark.parametrize("kind", ["tmp_path", "s3_url"])
def test_the_life_of_an_adapter(request, checkpoint, kind):
    store_url = str(request.getfixturevalue(kind))
    run = runner(store_url)
    publish = ("publish", str(checkpoint), "--name", "acme/triage")
    assert f"acme/triage@1 is in {store_url}" in run(*publish).stdout
    files = open_storage(store_url).files("acme/triage/1")
    assert set(files) == {CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE, "README.md"}
    assert "alias stable is 2" in run(*publish, "--alias", "stable").stdout
    assert "still get 2, by alias stable" in run(*publish).stdout
    shown = run("alias", "acme/triage", "stable", "2", "--canary", "3", "--percent", "5").stdout
    assert "alias stable is 2, and 3 for 5 % of the requests (was 2)" in shown
    assert "latest: 3 (the highest)" in run("alias", "acme/triage").stdout
    assert "alias stable is 2 (was 2, and 3" in run("rollback", "acme/triage").stdout
    assert "alias stable is 3" in run("alias", "acme/triage", "stable", "latest").stdout
    refused = run("delete", "acme/triage@3", status=1)
    assert "is what requests get by stable" in refused.stderr
    assert "acme/triage@1 is deleted" in run("delete", "acme/triage@1").stdout
    verified = run("verify").stdout
    assert verified.count("ok (lora, ") == 2
    deleted = run("delete", "acme/triage@3", "--force")
    assert "alias stable still points at it" in deleted.stderr
    wrong = run("verify", "acme/triage", status=1).stdout
    assert "acme/triage: WRONG: alias stable points at version 3, which is not there" in wrong
    assert "no longer set" in run("alias", "acme/triage", "stable", "--unset").stdout
    assert run("verify", "acme/triage@2").stdout.startswith("acme/triage@2: ok")


def test_json(run_local, checkpoint, local):
    def run(*arguments, status=0):
        return json.loads(run_local(*arguments, "--json", status=status).stdout)

    published = run("publish", str(checkpoint), "--name", "acme/triage", "--alias", "stable")
    assert published == {
        "adapter": "acme/triage",
        "version": 1,
        "where": f"{local}/acme/triage/1",
        "aliases": ["stable"],
    }
    run("publish", str(checkpoint), "--name", "acme/triage")
    target = {"version": 1, "canary": None, "percent": 0.0}
    assert run("alias", "acme/triage") == {
        "adapter": "acme/triage",
        "versions": [1, 2],
        "aliases": {"stable": target},
        "default": "stable",
    }
    changed = run("alias", "acme/triage", "stable", "2")
    assert changed == {
        "adapter": "acme/triage",
        "alias": "stable",
        "before": target,
        "after": target | {"version": 2},
    }
    assert run("rollback", "acme/triage")["after"] == target
    (finding, _) = run("verify")
    assert (finding["adapter"], finding["version"], finding["problem"]) == ("acme/triage", 1, "")
    assert len(finding["digest"]) == 64
    assert run("delete", "acme/triage@2") == {"adapter": "acme/triage", "version": 2, "dangling": []}


def damage(store: Path, kind: str) -> None:
    version = store / "acme/triage/1"
    if kind == "weights":
        content = bytearray((version / WEIGHTS_FILE).read_bytes())
        content[-1] ^= 1
        (version / WEIGHTS_FILE).write_bytes(content)
    elif kind == "truncated":
        (version / WEIGHTS_FILE).write_bytes((version / WEIGHTS_FILE).read_bytes()[:-1])
    elif kind == "config":
        (version / CONFIG_FILE).write_bytes((version / CONFIG_FILE).read_bytes().replace(b"LORA", b"VERA"))
    elif kind == "manifest":
        (version / MANIFEST_FILE).write_bytes(b"{}")
    elif kind == "card":
        (version / "README.md").unlink()
    elif kind == "aliases":
        (store / "acme/triage/aliases.json").write_bytes(b"x")


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("weights", f"{WEIGHTS_FILE} is not the content that was published"),
        ("truncated", f"{WEIGHTS_FILE} has "),
        ("config", f"{CONFIG_FILE} is not the content"),
        ("manifest", f"{MANIFEST_FILE} must be a JSON object"),
        ("card", "README.md is missing"),
        ("aliases", "aliases.json is no JSON object"),
    ],
)
def test_verify_names_what_is_wrong(run_local, checkpoint, local, kind, problem):
    for name in ("acme/triage", "acme/whole"):
        run_local("publish", str(checkpoint), "--name", name)
    damage(local, kind)
    output = run_local("verify", status=1).stdout
    assert problem in output
    assert output.count("WRONG") == 1
    assert "acme/whole@1: ok" in output


def test_verify_tells_of_what_has_no_manifest(run_local, checkpoint, local):
    shutil.copytree(checkpoint, local / "acme/triage")
    assert "it has no manifest" in run_local("verify").stdout


@pytest.mark.parametrize(
    ("arguments", "status", "problem"),
    [
        (["publish", "PEFT", "--name", "triage"], 2, "--name"),
        (["publish", "PEFT", "--name", "acme/triage", "--alias", "9"], 2, "--alias"),
        (["publish", "PEFT", "--name", "acme/.."], 2, "must start with"),
        (["publish", "/nonexistent", "--name", "acme/triage"], 2, "does not exist"),
        (["publish", "EMPTY", "--name", "acme/triage"], 1, f"has no {CONFIG_FILE}"),
        (["publish", "BROKEN", "--name", "acme/triage"], 1, "not a valid safetensors file"),
        (["publish", "OTHER", "--name", "acme/triage"], 1, "VERA"),
        (["alias", "acme/none"], 1, "no adapter acme/none"),
        (["alias", "acme/none", "stable"], 2, "give the version"),
        (["alias", "acme/none", "stable", "1"], 1, "no adapter acme/none"),
        (["alias", "acme/none", "stable", "1", "--canary", "2"], 2, "go together"),
        (["alias", "acme/none", "stable", "1", "--canary", "1", "--percent", "5"], 2, "another version"),
        (["alias", "acme/none", "Stable", "1"], 2, "an alias is"),
        (["alias", "acme/none", "--unset"], 2, "say which alias"),
        (["rollback", "acme/none"], 1, "the store has no adapter acme/none"),
        (["delete", "acme/none"], 2, "say which version"),
        (["delete", "acme/none@1"], 1, "no version 1; it has none"),
        (["verify", "acme/none"], 2, "no adapter acme/none"),
        (["verify", "acme/none@stable"], 2, "a version's number"),
    ],
)
def test_wrong_input_is_said_in_one_line(run_local, checkpoint, tmp_path, arguments, status, problem):
    (tmp_path / "store").mkdir()
    for name in ("empty", "broken", "other"):
        (tmp_path / name).mkdir()
    for name in ("broken", "other"):
        shutil.copyfile(checkpoint / CONFIG_FILE, tmp_path / name / CONFIG_FILE)
    (tmp_path / "broken" / WEIGHTS_FILE).write_bytes(b"x" * 100)
    shutil.copyfile(checkpoint / WEIGHTS_FILE, tmp_path / "other" / WEIGHTS_FILE)
    config = json.loads((checkpoint / CONFIG_FILE).read_text()) | {"peft_type": "VERA"}
    (tmp_path / "other" / CONFIG_FILE).write_text(json.dumps(config))
    places = {"PEFT": str(checkpoint), **{n.upper(): str(tmp_path / n) for n in ("empty", "broken", "other")}}
    result = run_local(*(places.get(argument, argument) for argument in arguments), status=status)
    assert problem in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_a_missing_package_is_named_with_its_extra(run_local):
    refused = run_local("verify", store="gs://bucket/store", status=2)
    assert "pip install 'hotswap[gcs]'" in refused.stderr
    assert "no file system for this URL" in run_local("alias", "acme/x", store="nope://x/y", status=2).stderr


def test_a_store_that_is_not_there_is_an_error(run_local, tmp_path):
    assert "missing" in run_local("verify", store=str(tmp_path / "gone"), status=2).stderr
