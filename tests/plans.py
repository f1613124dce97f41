"""Small plans of a comparison and results as their runs leave them, for several tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gvsl_lightning.benchmark.case_scores import interval
from gvsl_lightning.benchmark.training import Run, digest

TASK: dict[str, Any] = {"config": "task.yaml", "metric": "test/dice", "monitor": "val/dice"}
PLAN: dict[str, Any] = {
    "methods": {"Scratch": {}, "GVSL": {"config": "pretrain.yaml"}},
    "tasks": {"hearts": TASK},
    "modes": {
        "linear": {"model.init_args.mode": "linear"},
        "fine-tuned": {"model.init_args.mode": "finetune"},
    },
    "seeds": [0, 1],
    "baseline": "Scratch",
}


def write(folder: Path, **changes: Any) -> Path:
    """A plan with two methods, two modes and two seeds, and its configurations."""
    for name in ("task.yaml", "pretrain.yaml"):
        (folder / name).write_text("trainer: null\n")
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN | changes, sort_keys=False))
    return path


def cases_of(scores: list[float]) -> list[dict[str, Any]]:
    """Rows of `test_cases.csv`."""
    return [{"name": f"{i:03d}", "dice mean": v, "dice a": v} for i, v in enumerate(scores)]


def finish(run: Run, scores: list[float], validations: tuple[float, ...] = (0.1, 0.4)) -> None:
    """Write the result of a run."""
    run.folder.mkdir(parents=True, exist_ok=True)
    metric = "val/dice" if run.task else "val/ncc_after"
    rows = [{"step": 9 + 10 * i, metric: value} for i, value in enumerate(validations)]
    content: dict[str, Any] = {
        "words": list(run.words),
        "files": run.files(),
        "config": run.fingerprint(),
        "version": "0",
        "seconds": 60.0,
        "steps": 20,
        "validations": rows,
    }
    if run.task:
        cases = cases_of(scores)
        score = {"test/dice": float(np.mean(scores))}
        content |= {"scores": score, "cases": cases, "interval": interval("test/dice", cases)}
    else:
        run.backbone.parent.mkdir(parents=True, exist_ok=True)
        run.backbone.write_bytes(f"{run.method} {run.seed}".encode())
        content["backbone"] = digest(run.backbone)
    (run.folder / "result.json").write_text(json.dumps(content))


def find(runs: list[Run], *identity: Any) -> Run:
    """The run of a method, task, mode and seed."""
    (run,) = [run for run in runs if (run.method, run.task, run.mode, run.seed) == identity]
    return run
