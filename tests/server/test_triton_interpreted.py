"""The Triton kernels in Triton's interpreter, on a CPU: a choice of their own tests, in a process of its own.

Triton must find TRITON_INTERPRET when it is first imported, and torch may have imported it here already.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

# Each kernel once or twice: the interpreter runs programs one after another, in Python.
CHOSEN = (
    "test_triton_kernels.py::test_head_sizes[float32-80]",
    "test_triton_kernels.py::test_windows_and_softcaps[float32-17-2.0]",
    "test_triton_kernels.py::test_padding_writes_nothing_and_gives_zeros",
    "test_triton_kernels.py::test_lora[float32-True-50-shared]",
    "test_triton_kernels.py::test_lora[float32-False-50-decodes]",
    "test_triton_kernels.py::test_bottleneck[float32-True-each]",
    "test_triton_kernels.py::test_bottleneck[float32-False-each]",
    "test_triton_kernels.py::test_bottlenecks_beside_the_wide_halves_of_loras[float32-apart-40]",
    "test_triton_kernels.py::test_tiles",
    "test_triton_kernels.py::test_tiles_of_no_tokens_are_passed_over",
    "test_triton_steps.py::test_answers_are_those_of_the_cpu[True]",
    "test_triton_linear.py::test_linear[float32-index2-columns_by_rows]",
    "test_triton_linear.py::test_linear[float32-None-rows_by_columns]",
    "test_triton_four_bit.py::test_four_bit_linear[torch.float32-index2-288-in_parts]",
    "test_triton_four_bit.py::test_unpacked_is_what_bitsandbytes_unpacks[torch.float32-True-nf4-96]",
    "test_triton_four_bit.py::test_the_groups_of_a_base",
    "test_triton_four_bit.py::test_members_in_one_projection[torch.float32-fp4-100]",
)


def run(tests: list[str]) -> str:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    return done.stdout


def test_a_choice():
    assert f"{len(CHOSEN)} passed" in run([f"tests/server/triton/{name}" for name in CHOSEN])


@pytest.mark.slow
def test_all():
    assert "passed" in run(["tests/server/triton"])
