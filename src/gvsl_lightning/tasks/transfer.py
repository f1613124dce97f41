"""Base of segmentation and classification: how a backbone enters and how it is trained."""

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric

from gvsl_lightning.errors import InputError, check_choice, check_range
from gvsl_lightning.nn.backbones import Backbone
from gvsl_lightning.runs.loggers import wandb_loggers
from gvsl_lightning.tasks.base import BaseTask
from gvsl_lightning.weights import (
    load_backbone_weights,
    local_file,
    read_architecture,
    read_head,
)

Mode = Literal["finetune", "linear", "scratch"]


class TransferTask(BaseTask):
    """Base of the tasks that train on labels.

    Args:
        class_names: name of every class, in the order of their indices.
        mode: ``finetune`` trains the pre-trained backbone and the head; ``linear`` trains a linear
            head on a frozen backbone in eval mode; ``scratch`` trains everything from random
            weights.
        weights: the pre-trained backbone, see
            :func:`gvsl_lightning.weights.load_backbone_weights`. Read when training begins; a
            checkpoint of this task does not need the file. Without ``backbone_options``, the file
            names the backbone. ``linear`` without weights probes an untrained backbone.
        pretrained: load the whole ``backbone``, or its ``encoder`` before a random decoder.
        layer_decay: in ``finetune``, factor in (0, 1] between the learning rates of each stage of
            the backbone and the next one.
        frozen_epochs: in ``finetune``, first epochs in which the backbone has no gradient.
        head_from_weights: load the head too, from a checkpoint of this task or the released GVSL
            segmenter; test and predict then need no training.
        **base: see :class:`gvsl_lightning.tasks.base.BaseTask`.

    Raises:
        InputError: if mode and weights contradict each other or an option is out of range.
    """

    head: nn.Module
    _restored = False
    weights_file: Path | None = None
    _frozen_steps = 0

    def __init__(
        self,
        class_names: list[str],
        mode: Mode = "finetune",
        weights: str | None = None,
        pretrained: Literal["backbone", "encoder"] = "backbone",
        layer_decay: float = 1.0,
        frozen_epochs: int = 0,
        head_from_weights: bool = False,
        **base: Any,
    ) -> None:
        check_choice("mode", mode, ("finetune", "linear", "scratch"))
        check_choice("pretrained", pretrained, ("backbone", "encoder"))
        check_range("layer_decay", layer_decay, above=0, high=1)
        check_range("frozen_epochs", frozen_epochs, 0)
        if mode == "scratch" and weights is not None:
            raise InputError("mode is scratch and weights are given; use finetune, or drop them.")
        if mode == "finetune" and weights is None:
            raise InputError("mode is finetune and needs weights: give them, or use scratch.")
        if pretrained == "encoder" and (mode == "linear" or head_from_weights):
            raise InputError(
                "pretrained is encoder, which leaves the decoder untrained: use it in mode "
                "finetune, without head_from_weights."
            )
        if mode != "finetune" and (layer_decay != 1 or frozen_epochs != 0):
            raise InputError(f"layer_decay and frozen_epochs do nothing in mode {mode}: drop them.")
        if head_from_weights and weights is None:
            raise InputError("head_from_weights needs weights: give them.")
        if len(set(class_names)) < len(class_names):
            raise InputError(f"class_names is {class_names}; give every class a name of its own.")
        super().__init__(**base)
        if self.linear:
            self.backbone.requires_grad_(False).eval()

    def configure_backbone(self) -> Backbone:
        """Build the backbone of the weights, unless the options name another one."""
        weights, options = self.hparams["weights"], self.hparams["backbone_options"]
        if weights is not None and options is None:
            with suppress(InputError):  # named when the weights are loaded
                known = read_architecture(local_file(weights))
                if known and self.hparams["backbone"] in ("unet", known["name"]):
                    self.save_hyperparameters(
                        {"backbone": known["name"], "backbone_options": known["options"]}
                    )
        return super().configure_backbone()

    @property
    def class_names(self) -> list[str]:
        """Names in the order of the classes' indices."""
        return list(self.hparams["class_names"])

    @property
    def linear(self) -> bool:
        """Whether the backbone never learns."""
        return bool(self.hparams["mode"] == "linear")

    @property
    def frozen(self) -> bool:
        """Whether the backbone does not learn now: in a frozen epoch, or in mode ``linear``."""
        return self.linear or (self.training and self.global_step < self._frozen_steps)

    def setup(self, stage: str) -> None:
        self.check_classes(self.trainer.datamodule)  # type: ignore[attr-defined]

    def check_classes(self, datamodule: Any) -> None:
        """Raise an InputError if a data module, after its setup, has other classes."""
        names = getattr(datamodule, "class_names", self.class_names)
        if list(names) != self.class_names:
            raise InputError(
                f"The model has the classes {', '.join(self.class_names)} and the data "
                f"{', '.join(names)}; give both the same class_names."
            )

    def load_weights(self) -> None:
        """Load the pre-trained weights, once, unless a checkpoint of this task was loaded.

        Every run calls this method when it starts.

        Raises:
            InputError: if they do not fit.
        """
        if self.hparams["weights"] is None or self._restored or self.weights_file is not None:
            return
        path = local_file(self.hparams["weights"])
        encoder_only = self.hparams["pretrained"] == "encoder"
        report = load_backbone_weights(self.backbone, path, encoder_only)
        if self.hparams["head_from_weights"]:
            self._load_head(path)
        rank_zero_only(print)(report)
        self.weights_file = path

    def _load_head(self, path: Path) -> None:
        own = {name: value.shape for name, value in self.head.state_dict().items()}
        for name in ("out_conv", "head"):
            found = read_head(path, name)
            if {entry: value.shape for entry, value in found.items()} == own:
                self.head.load_state_dict(found)
                return
        shapes = ", ".join(f"{entry} {tuple(shape)}" for entry, shape in own.items())
        raise InputError(
            f"{path} has no head of this task's shape ({shapes}): set head_from_weights to false, "
            "or give as many classes as the file has."
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored = True

    def on_fit_start(self) -> None:
        self.load_weights()
        if self.weights_file is None or self._restored:
            return
        self._restored = True
        for logger in wandb_loggers(self.trainer):
            logger.use_weights(self.hparams["weights"], self.weights_file)

    def on_test_start(self) -> None:
        untrained = not self._restored and not self.hparams["head_from_weights"]
        if untrained and self.global_step == 0:
            rank_zero_warn(
                f"The head of {type(self).__name__} is untrained: give --ckpt_path, the checkpoint "
                "of a training run, or weights with head_from_weights."
            )
        self.on_fit_start()

    def on_predict_start(self) -> None:
        self.on_test_start()

    def train(self, mode: bool = True) -> "TransferTask":
        """Switch to training mode; the backbone of mode ``linear`` stays in eval mode."""
        super().train(mode)
        if self.linear:
            self.backbone.eval()
        return self

    def configure_metrics(self) -> None:
        self.validation_loss = MeanMetric(nan_strategy="disable")

    def log_validation_loss(self, loss: Tensor, batch: dict[str, Any]) -> None:
        """Log the loss of a validation batch: its mean over the cases of all processes."""
        self.name_evaluated("val", {"total": loss}, batch)
        # Lightning's own mean rounds the number of cases if the processes have not as many
        self.validation_loss.update(loss.to(self.device).expand(len(batch["image"])))
        self.log("val/loss", self.validation_loss)

    def configure_parameters(self) -> list[dict[str, Any]]:
        """The head, and the backbone's stages with their learning rates."""
        head = {"params": list(self.head.parameters())}
        if self.linear:
            return [head]
        rate, decay = self.hparams["learning_rate"], self.hparams["layer_decay"]
        self._frozen_steps = self._count_frozen_steps()
        stages: dict[str, list[Tensor]] = {}
        for name, parameter in self.backbone.named_parameters():
            if not parameter.requires_grad:
                continue
            # a stage is an entry of a module list: encoder.0, encoder.1, ..., in their order
            first, second = name.split(".")[:2]
            stage = f"{first}.{second}" if second.isdigit() else first
            stages.setdefault(stage, []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": rate * decay ** (len(stages) - place),
                "frozen_steps": self._frozen_steps,
            }
            for place, parameters in enumerate(stages.values())
        ] + [head]

    def _count_frozen_steps(self) -> int:
        epochs: int = self.hparams["frozen_epochs"]
        if epochs == 0:
            return 0
        self.trainer.fit_loop.setup_data()
        batches = self.trainer.num_training_batches
        if math.isinf(batches):
            raise InputError("frozen_epochs needs epochs of a known length: set it to 0.")
        return epochs * math.ceil(batches / self.trainer.accumulate_grad_batches)

    def on_after_backward(self) -> None:
        # a frozen backbone has nothing to clip and takes no step
        if self.frozen:
            for parameter in self.backbone.parameters():
                parameter.grad = None

    def compute_features(self, network: Callable[[Tensor], Tensor], volume: Tensor) -> Tensor:
        """Features of volumes (N, in_channels, D, H, W), without gradient in a frozen backbone.

        ``network`` is the backbone, or the part of it that the task uses.
        """
        if not self.frozen:
            return network(volume)
        with torch.no_grad():
            features = network(volume)
        if not self.linear and torch.is_grad_enabled() and self.trainer.world_size > 1:
            # several processes wait for a gradient of every parameter that trains later: it is zero
            trained = [part for part in self.backbone.parameters() if part.requires_grad]
            features = (
                features + 0 * torch.stack([part[(0,) * part.ndim] for part in trained]).sum()
            )
        return features
