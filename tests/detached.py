"""GVSL with a defect of the released code, to measure what mending it is worth.

Run it with ``PYTHONPATH=tests`` and ``--model.class_path=detached.DetachedGVSL`` behind
``python -m gvsl_lightning fit --config configs/pretrain/hippocampus.yaml``.
"""

from torch import Tensor

from gvsl_lightning.nn.heads import AffineHead, ZMatchingHead
from gvsl_lightning.tasks import GVSL


class _DetachedAffineHead(AffineHead):
    def forward(self, moving: Tensor, fixed: Tensor, shape: tuple[int, int, int]) -> Tensor:
        return super().forward(moving, fixed, shape).detach()


class DetachedGVSL(GVSL):
    """The affine matrix passes no gradient, and the heads start with PyTorch's default weights."""

    def configure_models(self) -> None:
        super().configure_models()
        assert isinstance(self.matching_head, ZMatchingHead)
        detached = _DetachedAffineHead(
            self.backbone.global_channels, self.hparams["affine_channels"]
        )
        self.matching_head.affine_head = detached
        linears = (detached.rotation, detached.scale, detached.shear, detached.translation)
        for layer in (*linears, self.matching_head.deformable_head.displacement):
            layer.reset_parameters()
