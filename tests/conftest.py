"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of real volumes, named by the environment variable GVSL_DATA."""
    root = os.environ.get("GVSL_DATA")
    if not root:
        pytest.skip("GVSL_DATA does not name a folder of real volumes")
    return Path(root)


@pytest.fixture(scope="session")
def reference_root() -> Path:
    """Folder of golden tensors made with the released GVSL code, named by GVSL_REFERENCE."""
    root = os.environ.get("GVSL_REFERENCE")
    if not root:
        pytest.skip("GVSL_REFERENCE does not name a folder of reference tensors")
    return Path(root)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
