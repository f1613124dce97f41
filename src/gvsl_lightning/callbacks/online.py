"""Callbacks that evaluate a backbone's local features while it is pre-trained, by any method."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from gvsl_lightning.callbacks.reporting import write_figure
from gvsl_lightning.errors import InputError, check_range
from gvsl_lightning.evaluation.feature_figures import draw_embedding, draw_features
from gvsl_lightning.evaluation.probes import (
    FeatureColours,
    OneShotSegmenter,
    class_indices,
    embed,
    fit_linear_probe,
    label_values,
    local_features,
    name_classes,
    sample_features,
    silhouette,
    standardise,
)
from gvsl_lightning.evaluation.scores import dice_scores
from gvsl_lightning.nn.backbones import Backbone
from gvsl_lightning.runs.folder import run_folder


class _ValidationVolumes(pl.Callback, ABC):
    """Keeps the first different fixed volumes of each validation that is due, on the CPU.

    A subclass evaluates them on rank 0; its scores are logged on all ranks.
    """

    def __init__(
        self, every_n_validations: int, num_volumes: int, class_names: list[str] | None
    ) -> None:
        check_range("every_n_validations", every_n_validations, 1)
        check_range("num_volumes", num_volumes, 1)
        self.every_n_validations = every_n_validations
        self.num_volumes = num_volumes
        self.class_names = class_names
        self._validations = 0
        self._volumes: dict[str, dict[str, Tensor]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Number of validations, so that a resumed run keeps the rhythm."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the task has a backbone, and this process all of it."""
        if not isinstance(getattr(pl_module, "backbone", None), Backbone):
            raise InputError(
                f"{type(self).__name__} looks at the backbone of a task and "
                f"{type(pl_module).__name__} has none: remove it from trainer.callbacks."
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise InputError(
                f"{type(self).__name__} runs the backbone in one process, and under "
                "ModelParallelStrategy none has all of it: remove it from trainer.callbacks."
            )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the volumes of the validation before."""
        self._volumes = {}

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep volumes that were not fixed before."""
        if not trainer.is_global_zero or dataloader_idx > 0 or not self._due(trainer):
            return
        if "fixed" not in batch or "fixed_name" not in batch:
            raise InputError(
                f"{type(self).__name__} needs validation pairs with fixed and fixed_name and got "
                f"{', '.join(batch)}: use it in pre-training."
            )
        for index, name in enumerate(batch["fixed_name"]):
            if len(self._volumes) < self.num_volumes and name not in self._volumes:
                self._volumes[name] = {
                    key: batch[key][index].cpu() for key in ("fixed", "fixed_label") if key in batch
                }

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate when it is due, and log the result."""
        if trainer.sanity_checking:
            return
        if self._due(trainer):
            backbone = cast(Backbone, pl_module.backbone)
            scores = self._evaluate(trainer, backbone) if trainer.is_global_zero else {}
            for name, value in trainer.strategy.broadcast(scores).items():
                if not math.isnan(value):
                    pl_module.log(name, value, batch_size=1, sync_dist=True)
            self._volumes = {}
        self._validations += 1

    @abstractmethod
    def _evaluate(self, trainer: pl.Trainer, backbone: Backbone) -> dict[str, float]:
        """Scores of the volumes by name; undefined ones (NaN) are not logged."""

    def _due(self, trainer: pl.Trainer) -> bool:
        return not trainer.sanity_checking and self._validations % self.every_n_validations == 0


class FeatureFigure(_ValidationVolumes):
    """Draws local features after validation and measures them without training.

    Writes ``figures/features_step=000300.png`` and, where the validation pairs have labels,
    ``figures/tsne_step=000300.png`` in the run's folder, and hands them to a W&B or TensorBoard
    logger. Features are standardised; colours are their first three principal components, fitted
    anew for each figure on all its volumes together. The volumes are the first different fixed ones
    of the validation data.

    With labels, it logs the scores of ``python -m gvsl_lightning features``: the mean Dice of
    segmenting the other volumes from the first one by name (``val/prototype_dice``,
    ``val/neighbours_dice``, and each with ``_NAME`` for each structure), and the silhouette of the
    structures in the t-SNE (``val/silhouette``). Without, it warns once.

    Args:
        every_n_validations: validations from one figure to the next; the first one is drawn.
        num_volumes: volumes in a figure.
        points: voxels of each structure: in the t-SNE and for the colours, of all volumes together,
            and as neighbours, of the one that segments the others.
        class_names: names of the structures in the order of their label values.

    Attributes:
        last_paths: the newest figures, once there are some.

    Raises:
        InputError: if an argument is out of range, the task has no backbone, or the validation
            data are no pairs.
    """

    def __init__(
        self,
        every_n_validations: int = 1,
        num_volumes: int = 3,
        points: int = 300,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__(every_n_validations, num_volumes, class_names)
        check_range("points", points, 4)
        self.points = points
        self.last_paths: tuple[Path, ...] = ()
        self._folder = Path()
        self._warned = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle the folder, on all ranks together."""
        super().setup(trainer, pl_module, stage)
        self._folder = run_folder(trainer) / "figures"

    def _evaluate(self, trainer: pl.Trainer, backbone: Backbone) -> dict[str, float]:
        if not self._volumes:
            return {}
        volumes = list(self._volumes.values())
        images = [volume["fixed"] for volume in volumes]
        labelled = all("fixed_label" in volume for volume in volumes)
        names: dict[int, str] = {}
        labels = [torch.zeros_like(image[:1]) for image in images]
        if labelled:
            names, labels = _classes(volumes, self.class_names)
        self._warn_of_missing_scores(labelled)
        features = [standardise(local_features(backbone, image)).cpu() for image in images]
        share = math.ceil(self.points / len(images))
        drawn = [
            sample_features(feature, label, share, seed=index)
            for index, (feature, label) in enumerate(zip(features, labels, strict=True))
        ]
        vectors, classes = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        title = f"step {trainer.global_step}"
        paint = FeatureColours(vectors)
        figures = {
            "features": draw_features(
                images,
                {"local features\nprincipal components": [paint(feature) for feature in features]},
                labels=labels if labelled else (),
                class_names={value: name for value, name in names.items() if value > 0},
                names=list(self._volumes),
                title=title,
            )
        }
        scores: dict[str, float] = {}
        if labelled:
            score = silhouette(vectors[classes > 0], classes[classes > 0])
            heading = f"{len(images)} volumes, silhouette of structures {score:.3f}"
            figures["tsne"] = draw_embedding({heading: embed(vectors)}, classes, names, title)
            device = next(backbone.parameters()).device
            scores = {"val/silhouette": score, **self._segment(features, labels, names, device)}
        paths = {
            name: self._folder / f"{name}_step={trainer.global_step:06d}.png" for name in figures
        }
        for name, figure in figures.items():
            write_figure(trainer, name, paths[name], figure, dpi=130)
        self.last_paths = tuple(paths.values())
        return scores

    def _segment(
        self,
        features: Sequence[Tensor],
        labels: Sequence[Tensor],
        names: Mapping[int, str],
        device: torch.device,
    ) -> dict[str, float]:
        """Dice of all volumes but the first one by name, which segments them."""
        first, *others = sorted(range(len(features)), key=list(self._volumes).__getitem__)
        segmenter = OneShotSegmenter(features[first].to(device), labels[first], self.points)
        dice = [
            segmenter.dice(features[index].to(device), labels[index], len(names))
            for index in others
        ]
        scores: dict[str, float] = {}
        for way in dice[0] if dice else ():
            scores |= _mean_dice(f"val/{way}_dice", [score[way] for score in dice], names)
        return scores

    def _warn_of_missing_scores(self, labelled: bool) -> None:
        if self._warned or (labelled and len(self._volumes) > 1):
            return
        self._warned = True
        rank_zero_warn(
            "FeatureFigure logs no Dice, since there is only one validation volume: give more, or "
            "num_volumes of 2 or more."
            if labelled
            else "FeatureFigure logs no Dice and silhouette, since not all validation volumes have "
            "labels."
        )


class OnlineProbe(_ValidationVolumes):
    """Measures by a linear probe, while pre-training, how well the features segment.

    At a validation that is due, a convolution 3x3x3 is trained on the frozen local features of the
    first half of the labelled validation volumes by name (Dice and cross-entropy, Adam), and its
    Dice on the other half is logged: ``val/probe_dice``, and ``val/probe_dice_NAME`` for each
    structure. The probe starts from the same weights each time, and neither the pre-training's
    weights nor its random numbers notice it. In a distributed run, the volumes are those that rank
    0 validates.

    Args:
        every_n_validations: validations from one probe to the next; the first one is probed.
        num_volumes: volumes at most; the features of half of them are kept in memory meanwhile.
        steps: steps of one volume.
        learning_rate: of the probe.
        class_names: names of the structures in the order of their label values, in place of the
            values.

    Raises:
        InputError: if an argument is out of range, the task has no backbone, or there are fewer
            than two labelled validation volumes.
    """

    def __init__(
        self,
        every_n_validations: int = 1,
        num_volumes: int = 20,
        steps: int = 200,
        learning_rate: float = 5e-2,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__(every_n_validations, num_volumes, class_names)
        check_range("num_volumes", num_volumes, 2)
        check_range("steps", steps, 1)
        check_range("learning_rate", learning_rate, above=0)
        self.steps = steps
        self.learning_rate = learning_rate

    def _evaluate(self, trainer: pl.Trainer, backbone: Backbone) -> dict[str, float]:
        volumes = [self._volumes[name] for name in sorted(self._volumes)]
        if len(volumes) < 2 or any("fixed_label" not in volume for volume in volumes):
            raise InputError(
                "OnlineProbe needs at least two validation volumes, all with labels: give them, or "
                "remove it from trainer.callbacks."
            )
        names, labels = _classes(volumes, self.class_names)
        half = len(volumes) // 2
        features = (standardise(local_features(backbone, one["fixed"])) for one in volumes)
        probe = fit_linear_probe(
            [feature.cpu() for feature in islice(features, half)],
            labels[:half],
            len(names),
            self.steps,
            self.learning_rate,
            device=next(backbone.parameters()).device,
        )
        structures = range(1, len(names))
        dice = [
            dice_scores(probe(feature[None]).argmax(dim=1), label, structures)[0]
            for feature, label in zip(features, labels[half:], strict=True)
        ]
        return _mean_dice("val/probe_dice", dice, names)


def _classes(
    volumes: Sequence[Mapping[str, Tensor]], class_names: Sequence[str] | None
) -> tuple[dict[int, str], list[Tensor]]:
    """Names of all classes, and the label maps as class indices."""
    labels = [volume["fixed_label"] for volume in volumes]
    values = label_values(labels)
    return name_classes(values, class_names), [class_indices(label, values) for label in labels]


def _mean_dice(name: str, dice: Sequence[Tensor], names: Mapping[int, str]) -> dict[str, float]:
    """Mean of the Dice (structures,) of several volumes, and the mean of each structure."""
    means = torch.stack(list(dice)).nanmean(dim=0)
    scores = {name: float(means.nanmean())}
    return scores | {f"{name}_{names[place + 1]}": float(mean) for place, mean in enumerate(means)}
