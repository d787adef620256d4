"""These run on a GPU, or in Triton's interpreter: TRITON_INTERPRET must be set before Triton is imported."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    if INTERPRETED:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 in the environment")
