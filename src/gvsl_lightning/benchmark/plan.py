"""Plan of a comparison: methods x tasks x modes x seeds, and the runs that it consists of."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gvsl_lightning import __version__
from gvsl_lightning.benchmark import paper
from gvsl_lightning.benchmark.case_scores import interval, read_cases
from gvsl_lightning.cli.diagnosis import read_yaml
from gvsl_lightning.errors import InputError, unknown_option
from gvsl_lightning.runs import processes
from gvsl_lightning.runs.files import read_metrics, write_text
from gvsl_lightning.weights import SUFFIXES

RESULT = "result.json"
"""Written into a run's folder when all of the run is done."""

Changes = Mapping[str, Any]
"""Key of a configuration, such as ``model.init_args.learning_rate`` -> value."""


@dataclass(frozen=True)
class Method:
    """A way to get a backbone, a row of the table.

    Attributes:
        config: configuration of its pre-training; None: there is none.
        weights: ready weights instead, as ``model.init_args.weights`` takes them.
        pretrain: what it changes in its pre-training.
        transfer: mode -> what it changes when it is transferred.
    """

    config: Path | None = None
    weights: str | None = None
    pretrain: Changes = field(default_factory=dict)
    transfer: Mapping[str, Changes] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What the backbones are transferred to, a column of the table.

    Attributes:
        config: configuration of ``fit``, which is tested at its end.
        metric: of the test.
        monitor: of the validation, to compare how fast the methods learn.
        changes: of the configuration.
        paper: the paper's name of the task, if the data are the paper's.
    """

    config: Path
    metric: str
    monitor: str
    changes: Changes = field(default_factory=dict)
    paper: str | None = None


@dataclass(frozen=True)
class Run:
    """One training: a pre-training, or one on labels with its test.

    Attributes:
        folder: where it leaves what it leaves.
        method: name.
        seed: of everything random.
        words: of the command line behind ``fit``.
        task: name; empty in a pre-training.
        mode: name; empty in a pre-training.
        metric: of the test.
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
    def backbone(self) -> Path:
        """What a pre-training leaves."""
        return self.folder / "fit" / "run" / "backbone.safetensors"

    def is_done(self) -> bool:
        """Whether it has a result that these very words, and the files in them, gave."""
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
        """Short SHA-256 of what identifies a result: the words and the files that they name."""
        text = json.dumps([self.words, self.files()])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def result(self) -> dict[str, Any]:
        """What :meth:`execute` wrote, or nothing."""
        try:
            content = json.loads((self.folder / RESULT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def execute(self, environment: Mapping[str, str], locks: Sequence[int]) -> None:
        """Train and test in a process of its own; what an interrupted try left is removed first.

        Args:
            environment: variables of the process beside those of this one.
            locks: descriptors of locked files, which stay locked while the process lives.

        Raises:
            InputError: if it fails; the sentence is the process's own.
        """
        files = self.files()
        (self.folder / RESULT).unlink(missing_ok=True)  # first: no result without its files
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        start = time.monotonic()
        self._process(environment, locks)
        content = {
            "words": list(self.words),
            "files": files,
            "config": self.fingerprint(),
            "version": __version__,
            "seconds": round(time.monotonic() - start, 1),
            **self._measured(),
        }
        write_text(self.folder / RESULT, json.dumps(content, indent=1))

    def _process(self, environment: Mapping[str, str], locks: Sequence[int]) -> None:
        logger = "--trainer.logger.init_args"
        words = [*self.words, f"{logger}.save_dir={self.folder}", f"{logger}.name=fit"]
        words += [f"{logger}.version=run", f"--test_after_fit={'true' if self.task else 'false'}"]
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
            raise InputError(processes.last_words(status, log))

    def _measured(self) -> dict[str, Any]:
        folder = self.folder / "fit" / "run"
        rows = read_metrics(folder / "metrics.csv")
        tested = _named(rows, "test/")
        trained = [row["step"] for row in rows if "step" in row and row not in tested]
        measured: dict[str, Any] = {
            "steps": int(max(trained, default=-1)) + 1,
            "validations": _named(rows, "val/"),
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
        last = tested[-1]
        scores = {name: value for name, value in last.items() if name.startswith("test/")}
        cases = read_cases(folder / "test_cases.csv")
        bounds = interval(self.metric, cases)
        return {**measured, "scores": scores, "interval": bounds, "cases": cases}


@dataclass(frozen=True)
class Plan:
    """What to run: every method with every task, mode and seed.

    Attributes:
        methods: the table's rows by name.
        tasks: its columns by name.
        modes: its groups of columns by name: what each changes in the tasks' configurations.
        seeds: of ``seed_everything``.
        baseline: the method that the others are compared with.
        pretrain: changes of every method's pre-training.
        pretrain_seed: one pre-training of each method with this seed serves all seeds, as in the
            paper; None: every seed has one of its own.
        figures: figure -> the methods in it; see :mod:`gvsl_lightning.benchmark.report`.
    """

    methods: Mapping[str, Method]
    tasks: Mapping[str, Task]
    modes: Mapping[str, Changes]
    seeds: tuple[int, ...]
    baseline: str
    pretrain: Changes = field(default_factory=dict)
    pretrain_seed: int | None = None
    figures: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> "Plan":
        """Read a plan with the attributes' names as keys; paths in it are relative to its file.

        ``${oc.env:NAME}`` stands for an environment variable, such as the folder of the data.

        Raises:
            InputError: if it is unreadable, incomplete or contradicts itself.
        """
        folder = Path(path).parent

        def place(options: dict[str, Any]) -> dict[str, Any]:
            given = {key: value for key, value in options.items() if value is not None}
            if "config" in given:
                given["config"] = (folder / given["config"]).resolve()
            return given

        content: Any = OmegaConf.create(read_yaml(str(path)))
        try:
            content = OmegaConf.to_container(content, resolve=True)
            _check_keys(content, cls, "", path)
            for group in ("methods", "tasks", "modes", "pretrain", "figures"):
                _check_mapping(content.get(group), group, path)
            for group, kind in (("methods", Method), ("tasks", Task)):
                for name, options in (content.get(group) or {}).items():
                    _check_mapping(options, f"{group}.{name}", path)
                    _check_keys(options or {}, kind, f"{group}.{name}.", path)
                    required = {"config", "metric", "monitor"} if kind is Task else set()
                    if missing := required - set(options or {}):
                        raise InputError(
                            f"{group}.{name} in {path} lacks {', '.join(sorted(missing))}; see "
                            "configs/benchmark for a plan."
                        )
            for name, changes in (content.get("modes") or {}).items():
                _check_mapping(changes, f"modes.{name}", path)
            given = {key for key, value in content.items() if value is not None}
            if missing := {"methods", "tasks", "modes", "seeds", "baseline"} - given:
                raise InputError(
                    f"{path} lacks {', '.join(sorted(missing))}; see configs/benchmark for a plan."
                )
            pretrain_seed = content.pop("pretrain_seed", None)
            named = {key: content.pop(key) or {} for key in ("methods", "tasks", "modes")}
            seeds, baseline = content.pop("seeds"), content.pop("baseline")
            rest: Any = {key: value or {} for key, value in content.items()}
            plan = cls(
                methods={
                    str(name): Method(**place(dict(options or {})))
                    for name, options in named["methods"].items()
                },
                tasks={
                    str(name): Task(**place(dict(options or {})))
                    for name, options in named["tasks"].items()
                },
                modes={str(name): dict(changes or {}) for name, changes in named["modes"].items()},
                seeds=tuple(int(seed) for seed in seeds),
                baseline=str(baseline),
                pretrain_seed=None if pretrain_seed is None else int(pretrain_seed),
                **rest,
            )
            plan.check(path)
        except InputError:
            raise
        except (
            OmegaConfBaseException,
            AttributeError,
            TypeError,
            ValueError,
        ) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{path} cannot be read as a plan ({reason}); correct it.") from error
        return plan

    def check(self, path: str | Path) -> None:
        """Compare what the parts of a plan say.

        Args:
            path: the plan's file, for the sentence.

        Raises:
            InputError: if they contradict each other.
        """
        if self.baseline not in self.methods:
            raise InputError(
                f"{path} has the baseline {self.baseline} and the methods "
                f"{', '.join(self.methods)}; choose one of them."
            )
        if not (self.tasks and self.modes and self.seeds):
            raise InputError(f"{path} has no task, mode or seed; give one or more of each.")
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"{path} has a seed twice; give every seed once.")
        for name, method in self.methods.items():
            if method.config is not None and method.weights is not None:
                raise InputError(
                    f"{path} gives {name} a config and weights, which are ready; drop one of them."
                )
            if unknown := set(method.transfer) - set(self.modes):
                raise InputError(
                    f"{path} changes the mode {unknown.pop()} of {name} and has the modes "
                    f"{', '.join(self.modes)}; choose one of them."
                )
        for name, task in self.tasks.items():
            if not (task.metric.startswith("test/") and task.monitor.startswith("val/")):
                raise InputError(
                    f"{path} compares {name} by {task.metric} and {task.monitor}; give a metric "
                    "that begins with test/ and a monitor that begins with val/."
                )
            if task.paper is not None and task.paper not in paper.TASKS:
                raise InputError(
                    f"{path} gives {name} the paper's task {task.paper}; choose one of "
                    f"{', '.join(paper.TASKS)}."
                )
        for name, method in self.methods.items():
            weights = Path(str(method.weights))
            if weights.suffix in SUFFIXES and not weights.is_file():
                raise InputError(
                    f"{method.weights}, the weights of {name} in {path}, does not exist; correct "
                    "its path."
                )
        configs = [method.config for method in self.methods.values()]
        configs += [task.config for task in self.tasks.values()]
        for config in configs:
            if config is not None and not config.is_file():
                raise InputError(f"{config}, named in {path}, does not exist; correct config.")
        for figure, names in self.figures.items():
            if figure not in FIGURES or (unknown := set(names) - set(self.methods)):
                raise InputError(
                    f"{path} draws {figure} of {', '.join(map(str, names))}; choose of the figures "
                    f"{', '.join(FIGURES)} and of the methods {', '.join(self.methods)}."
                )
        for given in (self.methods, self.tasks, self.modes):
            if len({_folder_name(name) for name in given}) < len(given):
                raise InputError(
                    f"{path} has names that give one folder: {', '.join(given)}; let them differ "
                    "in letters or digits."
                )

    def runs(self, out: Path, words: Sequence[str]) -> list[Run]:
        """All runs, each after the one that it needs; the first seed of everything comes first.

        Args:
            out: folder of all of them.
            words: of the command line, for every run.
        """
        return [run for seed in self.seeds for run in self._runs(out.resolve(), words, seed)]

    def is_linear(self, mode: str) -> bool:
        """Whether a mode probes frozen features, as the paper's linear evaluation does."""
        return self.modes[mode].get("model.init_args.mode") == "linear"

    def _runs(self, out: Path, words: Sequence[str], seed: int) -> Iterator[Run]:
        pretrainings: dict[str, Run] = {}
        pretrain_seed = seed if self.pretrain_seed is None else self.pretrain_seed
        for name, method in self.methods.items():
            if method.config is not None:
                pretrainings[name] = Run(
                    folder=out / _folder_name(name) / "pretrain" / str(pretrain_seed),
                    method=name,
                    seed=pretrain_seed,
                    words=(
                        f"--config={method.config}",
                        f"--seed_everything={pretrain_seed}",
                        *_words(self.pretrain),
                        *_words(method.pretrain),
                        *words,
                    ),
                )
        if self.pretrain_seed is None or seed == self.seeds[0]:
            yield from pretrainings.values()
        for task_name, task in self.tasks.items():
            for mode in self.modes:
                for name, method in self.methods.items():
                    needs = pretrainings.get(name)
                    weights = str(needs.backbone) if needs else method.weights
                    yield Run(
                        folder=out
                        / _folder_name(name)
                        / _folder_name(mode)
                        / _folder_name(task_name)
                        / str(seed),
                        method=name,
                        seed=seed,
                        words=(
                            f"--config={task.config}",
                            f"--seed_everything={seed}",
                            *self._transfer_words(task, mode, method, weights),
                            *words,
                        ),
                        task=task_name,
                        mode=mode,
                        metric=task.metric,
                        needs=needs,
                    )

    def _transfer_words(
        self, task: Task, mode: str, method: Method, weights: str | None
    ) -> list[str]:
        """Changes of the task, then of the mode, then of the method, and the weights."""
        levels = (task.changes, self.modes[mode], method.transfer.get(mode) or {})
        key = "model.init_args.mode"
        chosen = [changes[key] for changes in levels if key in changes]
        scratch = weights is None and (chosen or [_configured_mode(task.config)])[-1] == "finetune"
        left_out = _OF_FINE_TUNING if scratch else ()
        changed = [
            word
            for changes in levels
            for word in _words({k: v for k, v in changes.items() if k not in left_out})
        ]
        if scratch:
            changed.append(f"--{key}=scratch")
        return [*changed, f"--model.init_args.weights={weights or 'null'}"]


FIGURES = ("convergence", "ncc", "tsne")
"""What a plan can have drawn."""

_OF_FINE_TUNING = ("model.init_args.layer_decay", "model.init_args.frozen_epochs")
"""Without weights there is nothing to be careful with, and the task refuses them."""


def digest(path: str | Path) -> str:
    """SHA-256 of a file; empty if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ""
    return _digest(str(path), status.st_mtime_ns, status.st_size) if os.path.isfile(path) else ""


@cache
def _digest(path: str, modified: int, size: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@cache
def _configured_mode(config: Path) -> str:
    """Mode of a transfer's configuration."""
    mode = OmegaConf.select(OmegaConf.load(config), "model.init_args.mode")
    return "finetune" if mode is None else str(mode)


def _check_mapping(given: Any, key: str, path: str | Path) -> None:
    if given is not None and not isinstance(given, dict):
        raise InputError(f"{key} in {path} is {given!r}; give lines of the form NAME: VALUE.")


def _check_keys(given: Mapping[str, Any], kind: type, above: str, path: str | Path) -> None:
    known = [attribute.name for attribute in fields(kind)]
    for key in given:
        if key not in known:
            raise unknown_option(f"{above}{key}", f"a {kind.__name__.lower()}", known, f"in {path}")


def _words(changes: Changes) -> list[str]:
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in changes.items()
    ]


def _named(rows: Sequence[dict[str, float]], prefix: str) -> list[dict[str, float]]:
    """Rows that hold metrics of a prefix."""
    return [row for row in rows if any(name.startswith(prefix) for name in row)]


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("._").lower() or "_"
