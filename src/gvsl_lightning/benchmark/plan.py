"""Plan of a comparison: methods x tasks x modes x seeds, and the runs that follow from it."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gvsl_lightning.benchmark import paper
from gvsl_lightning.benchmark.training import Run
from gvsl_lightning.cli.sources import read_yaml
from gvsl_lightning.errors import InputError, check_choice, unknown_option
from gvsl_lightning.weights import SUFFIXES

FIGURES = ("convergence", "ncc", "tsne")
"""Figures that a plan can ask for."""

Changes = Mapping[str, Any]
"""Key of a configuration, such as ``model.learning_rate`` -> value."""


@dataclass(frozen=True)
class Method:
    """A way to get a backbone, a row of the table.

    Attributes:
        config: configuration of its pre-training; None: there is none.
        weights: ready weights instead, as ``model.weights`` takes them.
        pretrain: changes of its pre-training.
        transfer: mode -> changes of its transfers in this mode.
    """

    config: Path | None = None
    weights: str | None = None
    pretrain: Changes = field(default_factory=dict)
    transfer: Mapping[str, Changes] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Labelled data that the backbones are transferred to, a column of the table.

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
class Plan:
    """All runs of a comparison: every method with every task, mode and seed.

    Attributes:
        methods: rows of the table.
        tasks: its columns.
        modes: its groups of columns: changes of the tasks' configurations.
        seeds: of ``seed_everything``.
        baseline: the method that the others are compared with.
        pretrain: changes of every method's pre-training.
        pretrain_seed: one pre-training of each method with this seed serves all seeds, as in the
            paper; None: every seed has one of its own.
        figures: figure -> the methods in it; see :mod:`gvsl_lightning.benchmark.report`.
        title: of the report; by default the plan's file.
    """

    methods: Mapping[str, Method]
    tasks: Mapping[str, Task]
    modes: Mapping[str, Changes]
    seeds: tuple[int, ...]
    baseline: str
    pretrain: Changes = field(default_factory=dict)
    pretrain_seed: int | None = None
    figures: Mapping[str, Sequence[str]] = field(default_factory=dict)
    title: str = ""

    @classmethod
    def read(cls, path: str | Path) -> "Plan":
        """Read a plan with the attributes' names as keys; paths in it are relative to its file.

        ``${oc.env:NAME}`` stands for an environment variable, such as the folder of the data.

        Raises:
            InputError: if it is unreadable, incomplete or contradicts itself.
        """
        try:
            content: Any = OmegaConf.create(read_yaml(str(path)))
            content = OmegaConf.to_container(content, resolve=True)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path} cannot be read as a plan ({reason}); correct it.") from error
        options = _options(cls, content, "", path)
        for group, kind in (("methods", Method), ("tasks", Task)):
            options[group] = {
                str(name): kind(**_options(kind, given, f"{group}.{name}", path))
                for name, given in options[group].items()
            }
        options["modes"] = {
            str(name): _typed(dict, changes or {}, f"modes.{name}", path)
            for name, changes in options["modes"].items()
        }
        options["seeds"] = tuple(
            _typed(int, seed, f"seeds.{place}", path) for place, seed in enumerate(options["seeds"])
        )
        plan = cls(**{"title": str(path), **options})
        plan._check()
        return plan

    def _check(self) -> None:
        """Refuse parts that contradict each other, and files that do not exist."""
        for group in ("methods", "tasks", "modes", "seeds"):
            names = [str(name) for name in getattr(self, group)]
            if not names:
                raise InputError.about(group, "is empty; give one or more.")
            if len({_folder_name(name) for name in names}) < len(names):
                raise InputError.about(
                    group,
                    f"has names of the same folder: {', '.join(names)}; give every seed once, and "
                    "names that differ in letters or digits.",
                )
        check_choice("baseline", self.baseline, self.methods)
        for figure, methods in self.figures.items():
            check_choice("figures", figure, FIGURES)
            for name in methods:
                check_choice(f"figures.{figure}", name, self.methods)
        for name, method in self.methods.items():
            self._check_method(f"methods.{name}", method)
        for name, task in self.tasks.items():
            key = f"tasks.{name}"
            _require_file(f"{key}.config", task.config)
            _require_prefix(f"{key}.metric", task.metric, "test/")
            _require_prefix(f"{key}.monitor", task.monitor, "val/")
            if task.paper is not None:
                check_choice(f"{key}.paper", task.paper, paper.TASKS)

    def _check_method(self, key: str, method: Method) -> None:
        for mode in method.transfer:
            check_choice(f"{key}.transfer", mode, self.modes)
        if method.config is not None:
            _require_file(f"{key}.config", method.config)
            if method.weights is not None:
                raise InputError.about(
                    key, "has a config and weights, which are ready; drop one of them."
                )
        if (weights := Path(str(method.weights))).suffix in SUFFIXES:
            _require_file(f"{key}.weights", weights)

    def runs(self, out: Path, words: Sequence[str]) -> list[Run]:
        """All runs, each after the one that it needs; the first seed of everything comes first.

        Args:
            out: folder of all of them.
            words: of the command line, for every run.
        """
        return [run for seed in self.seeds for run in self._runs(out.resolve(), words, seed)]

    def is_linear(self, mode: str) -> bool:
        """Whether a mode probes frozen features, as the paper's linear evaluation does."""
        return _model_mode([self.modes[mode]]) == "linear"

    def _runs(self, out: Path, words: Sequence[str], seed: int) -> Iterator[Run]:
        pretrain_seed = seed if self.pretrain_seed is None else self.pretrain_seed
        pretrainings = {
            name: Run(
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
            for name, method in self.methods.items()
            if method.config is not None
        }
        if self.pretrain_seed is None or seed == self.seeds[0]:
            yield from pretrainings.values()
        for task_name, task in self.tasks.items():
            for mode in self.modes:
                for name, method in self.methods.items():
                    needs = pretrainings.get(name)
                    weights = str(needs.backbone) if needs else method.weights
                    place = (_folder_name(part) for part in (name, mode, task_name, str(seed)))
                    yield Run(
                        folder=out.joinpath(*place),
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
        levels = (task.changes, self.modes[mode], method.transfer.get(mode, {}))
        words = [word for changes in levels for word in _words(changes)]
        mode_of_model = _model_mode(levels) or _configured_mode(task.config)
        if weights is None and mode_of_model == "finetune":
            words = [word for word in words if not _IS_OF_FINE_TUNING(word)]
            words.append("--model.mode=scratch")
        return [*words, f"--model.weights={weights or 'null'}"]


_IS_OF_FINE_TUNING = re.compile(r"--model\.(init_args\.)?(layer_decay|frozen_epochs)=").match
"""Whether a word gives an option that a task without weights refuses."""


def _options(kind: type, given: Any, key: str, path: str | Path) -> dict[str, Any]:
    """Options of a part of a plan as the attributes of its class; null stands for the default."""
    above, known = f"{key}." if key else "", {one.name: one for one in fields(kind)}
    options: dict[str, Any] = {}
    for name, value in _typed(dict, given or {}, key, path).items():
        if name not in known:
            raise unknown_option(
                f"{above}{name}", f"a {kind.__name__.lower()}", known, f"in {path}"
            )
        if value is not None:
            options[name] = _typed(_KINDS.get(name, dict), value, f"{above}{name}", path)
    for name, attribute in known.items():
        is_required = attribute.default is attribute.default_factory is MISSING
        if is_required and name not in options:
            raise InputError(f"{path} lacks {above}{name}; see configs/benchmark for a plan.")
    if "config" in options:
        options["config"] = (Path(path).parent / options["config"]).resolve()
    return options


def _typed(kind: type, value: Any, key: str, path: str | Path) -> Any:
    if not isinstance(value, kind):
        raise InputError(f"{key} in {path} is {value!r}; give {_WANTED[kind]}.")
    return value


_WANTED = {
    str: "a text",
    int: "a whole number",
    list: "a list",
    dict: "lines of the form NAME: VALUE",
}
_KINDS: dict[str, type] = {
    **dict.fromkeys(("config", "weights", "metric", "monitor", "paper", "baseline"), str),
    "pretrain_seed": int,
    "seeds": list,
}
"""Types of the options; all others are mappings."""


def _require_file(key: str, path: Path) -> None:
    if not path.is_file():
        raise InputError.about(key, f"is {path}, which does not exist; correct the path.")


def _require_prefix(key: str, metric: str, prefix: str) -> None:
    if not metric.startswith(prefix):
        raise InputError.about(key, f"is {metric}; give one that begins with {prefix}")


def _model_mode(levels: Iterable[Changes]) -> str | None:
    """Mode of the model in the last of some changes that gives one."""
    modes = [
        str(value)
        for changes in levels
        for key, value in changes.items()
        if key in ("model.mode", "model.init_args.mode")
    ]
    return modes[-1] if modes else None


@cache
def _configured_mode(config: Path) -> str:
    """Mode of the model in the configuration of a transfer."""
    mode = OmegaConf.select(OmegaConf.load(config), "model.init_args.mode")
    return "finetune" if mode is None else str(mode)


def _words(changes: Changes) -> list[str]:
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in changes.items()
    ]


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("._").lower() or "_"
