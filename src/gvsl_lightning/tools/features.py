"""``python -m gvsl_lightning features``: segment by a backbone's local features, without training.

Each figure of a pre-trained backbone stands beside that of an untrained one of the same
architecture: random features segment a little too, and only the difference has been learnt.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

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
from gvsl_lightning.weights import load_backbone_weights, local_file


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: the words after ``features``: the arguments of :func:`evaluate_features`, each as
            ``--name value``.

    Raises:
        InputError: a path, a file or an option is wrong; the sentence names it.
    """
    call(evaluate_features, "python -m gvsl_lightning features", args)


def evaluate_features(
    root: str,
    weights: str,
    label_root: str | None = None,
    modality: Modality = "none",
    window: tuple[float, float] = (-1024.0, 1024.0),
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
    device: str | None = None,
    out: str | None = None,
    anonymise: bool = False,
) -> None:
    """Segment volumes from one labelled volume by feature similarity, and draw the features.

    Prints a table and writes it to features.csv, the Dice of every case to cases.csv, t-SNE to
    tsne.png and features as colours to features.png. Dice is that of the volumes as the network
    sees them: turned to RAS, and resampled if spacing is given.

    Args:
        root: folder, pattern, list or dataset.json of volumes with labels.
        weights: backbone.safetensors, a Hugging Face repository (owner/name), a checkpoint of this
            package or of the released code; none for an untrained backbone alone.
        label_root: folder of label maps named like the images, if root does not name them.
        modality: intensity preset ct, mri or none: that of the pre-training.
        window: lower and upper limit of the preset ct in HU.
        spacing: voxel size in mm to which the volumes are resampled.
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
        device: cpu, cuda or cuda:1; otherwise a GPU if there is one.
        out: folder of the results; otherwise the folder features beside the weights.
        anonymise: pseudonyms in the place of names of volumes, see `gvsl_lightning.runs.privacy`.

    Raises:
        InputError: a path, a file or an option is wrong; the sentence names it.
    """
    console, place = Console(), _device(device)
    backbones = _backbones(weights, backbone, backbone_options or {}, seed)
    folder = _folder(weights) if out is None else Path(out)
    require_writable(folder)
    volume_files = find_volumes(root, label_root, duplicates="refuse")
    supports, targets = _choose(volume_files, support, cases)
    if anonymise:
        supports, targets = anonymous(supports), anonymous(targets)
    volumes = _LabelledVolumes(
        [*supports, *targets],
        channels=backbones["untrained"].in_channels,
        modality=modality,
        window=window,
        spacing=spacing,
    ).configure_datasets()[1]
    names = [file.name for file in supports]
    count = len(supports) + len(targets)
    reading = track(range(count), "reading labels", console=console)
    values = label_values(volumes[index]["label"] for index in reading)
    classes = name_classes(values, class_names)
    console.print(
        f"{len(targets)} volumes, each segmented from one labelled volume: {', '.join(names)}"
    )
    results: list[_Result] = []
    for title, network in backbones.items():
        pair = [_Result(title, False, classes), _Result(title, True, classes)]
        for index in track(range(count), title, console=console):
            item = volumes[index]
            label = class_indices(item["label"], values)
            raw = local_features(network.to(place), item["image"], patch_size)
            for result in pair:
                found = standardise(raw) if result.standardised else raw
                if index < len(supports):
                    segmenter = OneShotSegmenter(found, label, samples, neighbours, seed)
                    result.segmenters[names[index]] = segmenter
                else:
                    share = math.ceil(samples / len(targets))
                    result.add_case(item["name"], found, label, share, seed + index)
        results += pair
    results.sort(key=lambda result: result.standardised)
    console.print(_table(results))
    with console.status("Drawing"):
        last = range(len(supports), count)[:drawn]
        items = [
            {**item, "label": class_indices(item["label"], values)}
            for item in (volumes[index] for index in last)
        ]
        shown = [result for result in results if result.standardised]
        embedding = _draw_embedding(shown, seed)
        pictures = _draw_features(shown, backbones, items, patch_size)
    for name, rows in (
        ("features.csv", [result.summary() for result in results]),
        ("cases.csv", [row for result in results for row in result.cases]),
    ):
        write_csv(folder / name, list(rows[0]), rows)
    save_figure(embedding, folder / "tsne.png", dpi=150)
    save_figure(pictures, folder / "features.png", dpi=150)
    console.print(f"{folder}: features.csv, cases.csv, tsne.png, features.png")


METHODS = {"prototype": "Prototype", "neighbours": "k-NN"}
"""Ways of one-shot segmentation in the tables' columns, and their titles."""


@dataclass
class _Result:
    """Scores of the features of one backbone."""

    title: str
    standardised: bool
    class_names: Mapping[int, str]
    segmenters: dict[str, OneShotSegmenter] = field(default_factory=dict)
    """By the name of the labelled volume."""
    cases: list[dict[str, Any]] = field(default_factory=list)
    """A row for each case and labelled volume."""
    _dice: dict[str, list[Tensor]] = field(default_factory=lambda: {key: [] for key in METHODS})
    _samples: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add_case(self, name: str, features: Tensor, label: Tensor, samples: int, seed: int) -> None:
        """Segment a case from each labelled volume; keep some of its features for the figures."""
        for support, segmenter in self.segmenters.items():
            scores = segmenter.dice(features, label, len(self.class_names))
            row = {**self._heading(), "support": support, "case": name}
            for method in METHODS:
                self._dice[method].append(scores[method])
                row |= self._columns(method, scores[method])
            self.cases.append(row)
        vectors, labels = sample_features(features, label, samples, seed)
        self._samples.append((vectors.cpu(), labels.cpu()))

    @property
    def vectors(self) -> Tensor:
        return torch.cat([vectors for vectors, _ in self._samples])

    @property
    def labels(self) -> Tensor:
        return torch.cat([labels for _, labels in self._samples])

    @cached_property
    def silhouettes(self) -> tuple[float, float]:
        """Of the structures among each other, and with the background as one of them."""
        structures = self.labels > 0
        return (
            silhouette(self.vectors[structures], self.labels[structures]),
            silhouette(self.vectors, self.labels),
        )

    def mean_dice(self, method: str) -> Tensor:
        """Mean over cases and labelled volumes of each structure, without undefined scores."""
        mean: Tensor = torch.stack(self._dice[method]).nanmean(dim=0)
        return mean

    def undefined(self, value: int) -> int:
        """Number of scores of a structure that are undefined."""
        return sum(bool(dice[value - 1].isnan()) for dice in self._dice["prototype"])

    def summary(self) -> dict[str, Any]:
        """A row for all cases."""
        row = self._heading()
        for method in METHODS:
            row |= self._columns(method, self.mean_dice(method))
        structures, everything = self.silhouettes
        return {**row, "silhouette": structures, "silhouette_with_background": everything}

    def _heading(self) -> dict[str, Any]:
        return {"features": self.title, "standardised": self.standardised}

    def _columns(self, method: str, dice: Tensor) -> dict[str, float]:
        columns = {
            f"{method}_dice_{name}": float(dice[value - 1])
            for value, name in self.class_names.items()
            if value
        }
        return {**columns, f"{method}_dice_mean": float(dice.nanmean())}


class _LabelledVolumes(PretrainDataModule):
    """Volumes with labels, prepared as for pre-training."""

    def __init__(self, files: list[VolumeFile], **options: Any) -> None:
        super().__init__("", **options)
        self.files = files

    def configure_files(self) -> tuple[list[VolumeFile], list[VolumeFile]]:
        return [], self.files


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
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
    given = {"name": name, "in_channels": 1, "options": options}
    known = {} if path is None else _architecture(path)
    architecture: dict[str, Any] = {**given, **known}
    backbones = {}
    for title in ("untrained",) if path is None else ("untrained", "pre-trained"):
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                backbones[title] = build_backbone(
                    architecture["name"],
                    in_channels=architecture["in_channels"],
                    **architecture["options"],
                )
        except (InputError, TypeError) as error:
            if not known:
                raise
            raise InputError(
                f"{path} describes its backbone wrongly ({error}): save the weights again."
            ) from error
    if path is not None:
        load_backbone_weights(backbones["pre-trained"], path)
    return backbones


def _architecture(path: Path) -> dict[str, Any]:
    """The backbone that the file describes; {} if it does not."""
    with suppress(InputError):
        architecture: dict[str, Any] = read_card(path)[0]["backbone"]
        return architecture
    return {}


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


def _draw_embedding(results: Sequence[_Result], seed: int) -> Figure:
    return draw_embedding(
        {
            f"{result.title}\nsilhouette {result.silhouettes[0]:.3f}": embed(result.vectors, seed)
            for result in results
        },
        results[0].labels,
        results[0].class_names,
        "t-SNE of local features, standardised",
    )


def _draw_features(
    results: Sequence[_Result],
    backbones: Mapping[str, Backbone],
    items: Sequence[Mapping[str, Any]],
    patch_size: tuple[int, int, int] | None,
) -> Figure:
    colours = {}
    for result in results:
        paint, network = FeatureColours(result.vectors), backbones[result.title]
        colours[f"{result.title}\nprincipal components"] = [
            paint(standardise(local_features(network, item["image"], patch_size))) for item in items
        ]
    return draw_features(
        [item["image"] for item in items],
        colours,
        labels=[item["label"] for item in items],
        class_names={value: name for value, name in results[0].class_names.items() if value > 0},
        names=[item["name"] for item in items],
    )


def _table(results: Sequence[_Result]) -> Table:
    table = Table(title="Local features, nothing trained on them")
    table.add_column("")
    for result in results:
        kind = "standardised" if result.standardised else "raw"
        table.add_column(f"{result.title}\n{kind}", justify="right")
    for method, title in METHODS.items():
        scores = [result.mean_dice(method) for result in results]
        table.add_row(f"{title} Dice", style="italic")
        for value, name in results[0].class_names.items():
            if value:
                missing = results[0].undefined(value)
                note = f" ({missing} undefined)" if missing else ""
                table.add_row(f"  {name}{note}", *(f"{score[value - 1]:.3f}" for score in scores))
        means = (f"{score.nanmean():.3f}" for score in scores)
        table.add_row("  mean", *means, style="bold", end_section=True)
    table.add_row("Silhouette", style="italic")
    for position, kind in enumerate(("of structures", "with background")):
        table.add_row(f"  {kind}", *(f"{result.silhouettes[position]:.3f}" for result in results))
    return table
