"""Fixtures shared by all tests."""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings

# the same examples every time; `--hypothesis-profile=search` draws many new ones
settings.register_profile("stable", derandomize=True, database=None, deadline=None, max_examples=20)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("stable")

sys.path.insert(0, str(Path(__file__).parent))  # for what tests share, such as `layouts`
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
# imported once for all processes that begin as a fork of one that has done nothing else
multiprocessing.set_forkserver_preload(["gvsl_lightning.cli.main", "wandb.sdk.launch"])


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder that stands for Hugging Face: one folder for each ``owner/name``."""

    def hf_hub_download(repo_id: str, filename: str) -> str:
        if not (path := tmp_path / "hub" / repo_id / filename).exists():
            raise ConnectionError("first line\nsecond line")
        return str(path)

    module: Any = ModuleType("huggingface_hub")
    module.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def _determinism() -> Iterator[None]:
    """PyTorch and Lightning switch determinism on for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
