"""Verbs that other packages add to `hotswap adapters`."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib

import pytest

from .conftest import ROOT

GROUP = "hotswap.adapters_verbs"
MAIN = "from hotswap_client.cli import main; main()"
POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]


@pytest.fixture
def run(verbs, tmp_path):
    """Run the command with `hotswap adapters graft` contributed by a trainer whose library is absent."""
    (info,) = verbs.glob("*.dist-info")
    with (info / "entry_points.txt").open("a") as file:
        file.write(f"\n[{GROUP}]\ngraft = hotswap_trainer.graft:graft\n")
    package = tmp_path / "fake" / "hotswap_trainer"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "graft.py").write_text(
        'def graft(name: str) -> None:\n    """Graft a thing."""\n'
        '    print("grafting", name)\n    import absent_library\n'
    )
    folders = [package.parent, verbs, *(ROOT / name for name in ("proto", "server", "client"))]

    def spawn(*arguments):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "NO_COLOR": "1"}
        code = (
            f"import atexit, sys\n"
            f"atexit.register(lambda: print('TRAINER', 'hotswap_trainer.graft' in sys.modules))\n{MAIN}"
        )
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True
        )

    return spawn


def test_they_are_listed_beside_the_clients_own_without_being_imported(run):
    shown = run("adapters", "--help").stdout
    for verb in ("list", "unmerge", "graft"):
        assert f" {verb} " in shown
    assert "Graft a thing." in shown
    assert "TRAINER False" in shown


def test_they_run_and_say_which_extra_they_lack(run):
    result = run("adapters", "graft", "roses")
    assert result.returncode == 2
    assert "grafting roses" in result.stdout
    assert result.stderr == (
        "error: `hotswap adapters graft` needs absent_library, which is not installed: "
        "pip install 'hotswap[trainer]'\n"
    )


def test_one_that_does_not_exist_is_refused(run):
    result = run("adapters", "prune")
    assert result.returncode == 2
    assert "No such command 'prune'" in result.stderr


@pytest.mark.parametrize("verb", POINTS[GROUP].items(), ids=lambda verb: verb[0])
def test_the_projects_own_are_there(verb):
    assert callable(importlib.metadata.EntryPoint(*verb, GROUP).load())
