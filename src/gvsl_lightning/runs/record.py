"""The record of a run: revision of the code, versions, seed, hash of the data, machine."""

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from gvsl_lightning import __version__

ARTIFACT = "wandb:"
"""Prefix of weights that are W&B artifacts."""


def record_run(trainer: pl.Trainer, data_hash: str | None) -> dict[str, Any]:
    """Everything that the results of a run depend on, except its configuration.

    Args:
        trainer: with its task, from ``setup`` on.
        data_hash: see :func:`gvsl_lightning.data.hashing.data_hash`.

    Returns:
        ``git_revision`` and ``versions``; ``seed``, None without ``seed_everything``;
        ``data_hash``; ``weights_hash`` of the weights that the run starts from; ``device``;
        ``processes``, and ``threads`` of each process, which change the rounding of sums.
    """
    seed = os.environ.get("PL_GLOBAL_SEED")
    task = trainer.lightning_module
    path = getattr(task, "weights_file", None) or Path(str(task.hparams.get("weights") or ""))
    weights = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None
    device = trainer.strategy.root_device
    return {
        "git_revision": git_revision(),
        "versions": package_versions(),
        "seed": None if seed is None else int(seed),
        "data_hash": data_hash,
        "weights_hash": weights,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),
    }


def git_revision() -> str | None:
    """Commit of this package's code, with ``+`` after local changes; None outside git."""
    folder = Path(__file__).parents[1]

    def ask(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # a package that is installed inside somebody else's repository is no part of it
        if not ask("ls-files", "__init__.py"):
            return None
        return ask("rev-parse", "HEAD") + ("+" if ask("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def package_versions() -> dict[str, str]:
    """Versions of this package, of Python and of the most important dependencies."""
    dependencies = ("torch", "monai", "pytorch-lightning")
    return {
        "gvsl-lightning": __version__,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in dependencies},
    }
