"""One training of a comparison: its process and its result."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gvsl_lightning import __version__
from gvsl_lightning.benchmark.case_scores import interval, read_cases
from gvsl_lightning.errors import InputError
from gvsl_lightning.runs import processes
from gvsl_lightning.runs.files import read_metrics, write_text

RESULT = "result.json"
"""Written into the folder of a run at its very end."""


@dataclass(frozen=True)
class Run:
    """One training: a pre-training, or a transfer to labels with its test.

    Attributes:
        folder: of all files of the run.
        words: of the command line behind ``fit``.
        task: name; empty in a pre-training, as are ``mode`` and ``metric``, that of the test.
        needs: the pre-training whose backbone it starts from.
    """

    folder: Path
    method: str
    seed: int
    words: tuple[str, ...]
    task: str = ""
    mode: str = ""
    metric: str = ""
    needs: "Run | None" = None

    def __str__(self) -> str:
        kind = f"{self.mode}, {self.task}" if self.task else "pre-training"
        return f"{self.method}, {kind}, seed {self.seed}"

    @property
    def log_folder(self) -> Path:
        """Folder of the trainer's logger."""
        return self.folder / "fit" / "run"

    @property
    def backbone(self) -> Path:
        """Weights that a pre-training exports."""
        return self.log_folder / "backbone.safetensors"

    def is_done(self) -> bool:
        """Whether it has a result of the same words and of the same files named in them."""
        if self.needs is not None and not self.needs.is_done():
            return False
        result = self.result()
        return (
            result.get("words") == list(self.words)
            and result.get("files") == self.files()
            and (bool(self.task) or result.get("backbone") == digest(self.backbone))
        )

    def files(self) -> dict[str, str]:
        """SHA-256 of the files that the words name: the configuration, weights."""
        paths = (word.partition("=")[2] for word in self.words)
        return {path: found for path in paths if (found := digest(path))}

    def fingerprint(self) -> str:
        """Short SHA-256 of the words and of the files that they name."""
        content = json.dumps([self.words, self.files()])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def result(self) -> dict[str, Any]:
        """The content of ``result.json``; empty if it cannot be read."""
        try:
            content = json.loads((self.folder / RESULT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def execute(self, environment: Mapping[str, str], locks: Sequence[int]) -> None:
        """Remove the files of an interrupted try; train and test in a process of its own.

        Args:
            environment: variables of the process, added to those of this one.
            locks: descriptors of locked files, which stay locked while the process lives.

        Raises:
            InputError: with the last sentence of a process that failed.
        """
        files = self.files()
        (self.folder / RESULT).unlink(missing_ok=True)  # first: no result without its files
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        start = time.monotonic()
        self._train(environment, locks)
        content = {
            "words": list(self.words),
            "files": files,
            "config": self.fingerprint(),
            "version": __version__,
            "seconds": round(time.monotonic() - start, 1),
            **self._measurements(),
        }
        write_text(self.folder / RESULT, json.dumps(content, indent=1))

    def _train(self, environment: Mapping[str, str], locks: Sequence[int]) -> None:
        logger = "--trainer.logger.init_args"
        words = [
            *(*self.words, f"--test_after_fit={'true' if self.task else 'false'}"),
            *(f"{logger}.save_dir={self.folder}", f"{logger}.name=fit", f"{logger}.version=run"),
        ]
        log = self.folder / "fit.log"
        with open(log, "w", encoding="utf-8") as file:
            status = processes.run(
                [sys.executable, "-m", "gvsl_lightning", "fit", *words],
                {**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=locks,
            )
        if status:
            raise InputError(processes.describe_failure(status, log))

    def _measurements(self) -> dict[str, Any]:
        folder = self.log_folder
        rows = read_metrics(folder)
        tested = _with_prefix(rows, "test/")
        trained = [row["step"] for row in rows if "step" in row and row not in tested]
        measured: dict[str, Any] = {
            "steps": int(max(trained, default=-1)) + 1,
            "validations": _with_prefix(rows, "val/"),
        }
        if not self.task:
            if not self.backbone.is_file():
                raise InputError(
                    f"{folder} has no backbone.safetensors: add BackboneExporter to the callbacks "
                    f"of the pre-training of {self.method}."
                )
            return {**measured, "backbone": digest(self.backbone)}
        if not tested:
            # a process that is asked to end exits with 0
            raise InputError(
                f"{folder} was not tested: it was ended early, or nothing logs a test; give the "
                "same command again, or add a report to the callbacks."
            )
        scores = {name: value for name, value in tested[-1].items() if name.startswith("test/")}
        cases = read_cases(folder / "test_cases.csv")
        bounds = interval(self.metric, cases)
        return {**measured, "scores": scores, "interval": bounds, "cases": cases}


def digest(path: str | Path) -> str:
    """SHA-256 of a file; empty if there is none."""
    if not os.path.isfile(path):
        return ""
    status = os.stat(path)
    return _digest(str(path), status.st_mtime_ns, status.st_size)


@cache
def _digest(path: str, modified: int, size: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _with_prefix(rows: Sequence[dict[str, float]], prefix: str) -> list[dict[str, float]]:
    """Rows that hold metrics of a prefix."""
    return [row for row in rows if any(name.startswith(prefix) for name in row)]
