"""``python -m gvsl_lightning features``: segment by local features, without training."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset

from gvsl_lightning.cli.diagnosis import call
from gvsl_lightning.data.find import find_volumes
from gvsl_lightning.data.source import VolumeFile, anonymous, describe
from gvsl_lightning.datamodules.pretrain import PretrainDataModule
from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation.feature_figures import draw_embedding, draw_features
from gvsl_lightning.evaluation.probes import (
    FeatureColours,
    OneShotSegmenter,
    class_indices,
    embed,
    label_values,
    local_features,
    name_classes,
    sample_features,
    silhouette,
    standardise,
)
from gvsl_lightning.export.card import read_card
from gvsl_lightning.nn.backbones import Backbone, build_backbone
from gvsl_lightning.runs.files import require_writable, save_figure, write_csv
from gvsl_lightning.transforms.intensity import Modality
from gvsl_lightning.weights import load_backbone_weights, local_file, read_architecture

METHODS = {"prototype": "Prototype Dice", "neighbours": "k-NN Dice"}
"""Ways of one-shot segmentation in the tables' columns, and their titles."""


def main(args: Sequence[str]) -> None:
    """Run the command: `evaluate_features` with its arguments as ``--name value``."""
    call(evaluate_features, "python -m gvsl_lightning features", args)


def evaluate_features(
    root: str,
    weights: str,
    label_root: str | None = None,
    modality: Modality | None = None,
    window: tuple[float, float] | None = None,
    spacing: tuple[float, float, float] | None = None,
    support: list[str] | None = None,
    cases: PositiveInt = 20,
    class_names: list[str] | None = None,
    backbone: str = "unet",
    backbone_options: dict[str, Any] | None = None,
    seed: int = 0,
    samples: PositiveInt = 500,
    neighbours: PositiveInt = 15,
    drawn: PositiveInt = 3,
    patch_size: tuple[int, int, int] | None = None,
    device: str = "auto",
    out: str | None = None,
    anonymise: bool = False,
) -> None:
    """Segment volumes from one labelled volume by feature similarity, and draw the features.

    Each figure of a pre-trained backbone stands beside that of an untrained one of the same
    architecture: random features segment a little too, and only the difference has been learnt.
    Features are standardised. The command prints a table and writes it to features.csv, the Dice of
    every case to cases.csv, t-SNE to tsne.png and features as colours to features.png. Dice is that
    of the volumes as the network sees them: turned to RAS, and resampled if spacing is given.

    Args:
        root: folder, pattern, list or dataset.json of volumes with labels.
        weights: backbone.safetensors, a Hugging Face repository (owner/name), a checkpoint of this
            package or of the released code; none for an untrained backbone alone.
        label_root: folder of label maps named like the images, if root does not name them.
        modality: intensity preset ct, mri or none; otherwise that of the weights, or none.
        window: lower and upper limit of the preset ct in HU; otherwise that of the weights.
        spacing: voxel size in mm to which the volumes are resampled; otherwise that of the weights,
            or as stored.
        support: names of labelled volumes (path below root, without suffix). Each one
            alone segments all cases, and the mean is given. Otherwise the first volume by name.
        cases: how many volumes are segmented: the last ones by name that are not in support.
        class_names: names of the structures in the order of their label values.
        backbone: architecture, if the weights do not name it.
        backbone_options: options of that architecture.
        seed: of the untrained backbone, the sampling and t-SNE.
        samples: voxels of each structure that are drawn: of a labelled volume, as neighbours, and
            of all cases together, for silhouette, t-SNE and colours.
        neighbours: nearest voxels that vote.
        drawn: cases in features.png.
        patch_size: size in voxels of overlapping windows in which features are computed; otherwise
            whole volumes at once.
        device: cpu, cuda, cuda:1, or auto: a GPU if there is one.
        out: folder of the results; otherwise the folder features beside the weights.
        anonymise: pseudonyms in the place of names of volumes, see `gvsl_lightning.runs.privacy`.

    Raises:
        InputError: a path, a file or an option is wrong; the sentence names it.
    """
    console = Console()
    backbones = _backbones(weights, backbone, backbone_options or {}, seed)
    folder = _folder(weights) if out is None else Path(out)
    require_writable(folder)
    files = find_volumes(root, label_root, duplicates="refuse")
    supports, targets = _choose(files, support, cases)
    if anonymise:
        supports, targets = anonymous(supports), anonymous(targets)
    given = {"modality": modality, "window": window, "spacing": spacing}
    volumes = _LabelledVolumes(
        [*supports, *targets],
        channels=backbones["untrained"].in_channels,
        **_preparation(weights, given),
    ).configure_datasets()[1]
    reading = track(range(len(supports) + len(targets)), "reading labels", console=console)
    values = label_values(volumes[index]["label"] for index in reading)
    study = _Study(
        volumes=volumes,
        supports=[file.name for file in supports],
        targets=[file.name for file in targets],
        values=values,
        class_names=name_classes(values, class_names),
        samples=samples,
        neighbours=neighbours,
        drawn=drawn,
        seed=seed,
        patch_size=patch_size,
        device=_device(device),
    )
    console.print(
        f"{len(targets)} volumes, each segmented from one labelled volume: "
        f"{', '.join(study.supports)}"
    )
    results = [study.evaluate(title, network, console) for title, network in backbones.items()]
    console.print(_table(results, study.class_names))
    with console.status("Drawing"):
        embedding = study.draw_embedding(results)
        pictures = study.draw_features(results, backbones)
    for name, rows in (
        ("features.csv", [result.summary for result in results]),
        ("cases.csv", [row for result in results for row in result.cases]),
    ):
        write_csv(folder / name, list(rows[0]), rows)
    save_figure(embedding, folder / "tsne.png", dpi=150)
    save_figure(pictures, folder / "features.png", dpi=150)
    console.print(f"{folder}: features.csv, cases.csv, tsne.png, features.png")


@dataclass(frozen=True)
class _Result:
    """Scores of the features of one backbone; vectors (n, C) and their classes for the figures."""

    title: str
    cases: list[dict[str, Any]]
    dice: dict[str, Tensor]
    silhouette: float
    vectors: Tensor
    labels: Tensor
    summary: dict[str, Any]


@dataclass(frozen=True)
class _Study:
    """Labelled volumes, the supports first, and the options of their evaluation."""

    volumes: Dataset[dict[str, Any]]
    supports: list[str]
    targets: list[str]
    values: Tensor
    class_names: Mapping[int, str]
    samples: int
    neighbours: int
    drawn: int
    seed: int
    patch_size: tuple[int, int, int] | None
    device: torch.device

    def label(self, item: Mapping[str, Any]) -> Tensor:
        return class_indices(item["label"], self.values)

    def features(self, network: Backbone, item: Mapping[str, Any]) -> Tensor:
        return standardise(local_features(network, item["image"], self.patch_size))

    def evaluate(self, title: str, network: Backbone, console: Console) -> _Result:
        """Segment each target from each support; keep some features of the targets."""
        network.to(self.device)
        share = math.ceil(self.samples / len(self.targets))
        segmenters: dict[str, OneShotSegmenter] = {}
        cases, dice = [], {method: list[Tensor]() for method in METHODS}
        drawn: list[tuple[Tensor, Tensor]] = []
        names = [*self.supports, *self.targets]
        for index, name in enumerate(track(names, title, console=console)):
            item = self.volumes[index]
            features, label = self.features(network, item), self.label(item)
            if index < len(self.supports):
                segmenters[name] = OneShotSegmenter(
                    features, label, self.samples, self.neighbours, self.seed
                )
                continue
            for support, segmenter in segmenters.items():
                scores = segmenter.dice(features, label, len(self.class_names))
                heading = {"features": title, "support": support, "case": name}
                cases.append({**heading, **self._columns(scores)})
                for method in METHODS:
                    dice[method].append(scores[method])
            vectors, labels = sample_features(features, label, share, self.seed + index)
            drawn.append((vectors.cpu(), labels.cpu()))
        vectors, labels = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        score = silhouette(vectors[labels > 0], labels[labels > 0])
        # without undefined scores
        means = {method: torch.stack(scores).nanmean(dim=0) for method, scores in dice.items()}
        summary = {"features": title, **self._columns(means), "silhouette": score}
        return _Result(title, cases, means, score, vectors, labels, summary)

    def draw_embedding(self, results: Sequence[_Result]) -> Figure:
        points = {
            f"{result.title}\nsilhouette {result.silhouette:.3f}": embed(result.vectors, self.seed)
            for result in results
        }
        title = "t-SNE of local features, standardised"
        return draw_embedding(points, results[0].labels, self.class_names, title)

    def draw_features(
        self, results: Sequence[_Result], backbones: Mapping[str, Backbone]
    ) -> Figure:
        first = len(self.supports)
        names = self.targets[: self.drawn]
        items = [self.volumes[first + index] for index in range(len(names))]
        colours = {}
        for result in results:
            paint, network = FeatureColours(result.vectors), backbones[result.title]
            colours[f"{result.title}\nprincipal components"] = [
                paint(self.features(network, item)) for item in items
            ]
        return draw_features(
            [item["image"] for item in items],
            colours,
            labels=[self.label(item) for item in items],
            class_names={value: name for value, name in self.class_names.items() if value > 0},
            names=names,
        )

    def _columns(self, dice: Mapping[str, Tensor]) -> dict[str, float]:
        columns = {}
        for method, scores in dice.items():
            for name, score in zip(list(self.class_names.values())[1:], scores, strict=True):
                columns[f"{method}_dice_{name}"] = float(score)
            columns[f"{method}_dice_mean"] = float(scores.nanmean())
        return columns


class _LabelledVolumes(PretrainDataModule):
    """Volumes with labels, prepared as for pre-training."""

    def __init__(self, files: list[VolumeFile], **options: Any) -> None:
        super().__init__("", **options)
        self.files = files

    def configure_files(self) -> tuple[list[VolumeFile], list[VolumeFile]]:
        return [], self.files


def _preparation(weights: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the preparation: those of the weights' card, or those given if it has none."""
    data: Mapping[str, Any] = {}
    if weights.lower() != "none":
        with suppress(InputError):  # a file without a card
            data = read_card(local_file(weights))["data"]
    options = {name: value for name, value in given.items() if value is not None}
    for name in given:
        known = data.get(name)
        if known is None or (name == "window" and data.get("modality") != "ct"):
            continue
        if name in options and list(options[name]) != list(known):
            raise InputError(
                f"{name} is {options[name]} and {weights} was trained with {known}; leave the "
                "option out."
            )
        options[name] = tuple(known) if isinstance(known, list) else known
    return options


def _device(name: str) -> torch.device:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"There is no device {name}; give cpu, cuda or cuda:0.") from error
    return device


def _folder(weights: str) -> Path:
    """The folder features beside the weights, or in runs if they are no local file."""
    path = Path(weights)
    if not path.exists():
        return Path("runs", "features")
    return (path if path.is_dir() else path.parent) / "features"


def _backbones(
    weights: str, name: str, options: Mapping[str, Any], seed: int
) -> dict[str, Backbone]:
    """An untrained backbone and, if there are weights, the same architecture with them."""
    path = None if weights.lower() == "none" else local_file(weights)
    known = {} if path is None else read_architecture(path)
    architecture = {"name": name, "in_channels": 1, "options": options, **known}
    backbones = {}
    for title in ("untrained",) if path is None else ("untrained", "pre-trained"):
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                backbones[title] = build_backbone(
                    architecture["name"], architecture["in_channels"], **architecture["options"]
                )
        except (InputError, TypeError) as error:
            if not known:
                raise
            raise InputError(f"The card of {path} is wrong ({error}): save it again.") from error
    if path is not None:
        load_backbone_weights(backbones["pre-trained"], path)
    return backbones


def _choose(
    files: Sequence[VolumeFile], support: Sequence[str] | None, cases: int
) -> tuple[list[VolumeFile], list[VolumeFile]]:
    """The labelled volumes and those to segment."""
    by_name = {file.name: file for file in files}
    names = list(dict.fromkeys(support or [files[0].name]))
    for name in names:
        if name not in by_name:
            raise InputError(
                f"There is no volume {name} to take as support; give names such as "
                f"{', '.join(list(by_name)[:3])}."
            )
    targets = [file for file in files if file.name not in names][-cases:]
    if not targets:
        raise InputError(
            f"There is no volume to segment beside {', '.join(names)}; add volumes or give fewer "
            "as support."
        )
    supports = [by_name[name] for name in names]
    for file in (*supports, *targets):
        if file.label is None:
            raise InputError(
                f"{describe(file.image)} has no label map; give label_root, or a dataset.json or "
                "list with labels as root."
            )
    return supports, targets


def _table(results: Sequence[_Result], class_names: Mapping[int, str]) -> Table:
    table = Table(title="Local features, standardised; nothing is trained on them")
    table.add_column("")
    for result in results:
        table.add_column(result.title, justify="right")
    for method, title in METHODS.items():
        scores = [result.dice[method] for result in results]
        table.add_row(title, style="italic")
        for value, name in list(class_names.items())[1:]:
            table.add_row(f"  {name}", *(f"{score[value - 1]:.3f}" for score in scores))
        means = (f"{score.nanmean():.3f}" for score in scores)
        table.add_row("  mean", *means, style="bold", end_section=True)
    table.add_row("Silhouette of structures", *(f"{result.silhouette:.3f}" for result in results))
    return table
