"""GVSL as the released code trains it, to measure the effect of its defects.

Source: https://github.com/YutingHe-list/GVSL, He et al., CVPR 2023. Add
``--model.class_path=DetachedGVSL`` to the command of a GVSL run.
"""

from torch import Tensor

from gvsl_lightning.nn.heads import AffineHead
from gvsl_lightning.tasks.gvsl import GVSL


class DetachedGVSL(GVSL):
    """GVSL whose affine head never learns, as in the released code.

    The released code copies the predicted numbers into a new matrix, which cuts the gradient. The
    last layers of both heads start with PyTorch's default weights, and so not near the identity.

    Args:
        **gvsl: see :class:`gvsl_lightning.tasks.gvsl.GVSL`.
    """

    def configure_heads(self) -> None:
        super().configure_heads()
        if self.matching_head is None:
            return
        if self.hparams["affine"]:
            head = _DetachedAffineHead(
                self.backbone.global_channels, self.hparams["affine_channels"]
            )
            self.matching_head.affine_head = head
            for layer in (head.rotation, head.scale, head.shear, head.translation):
                layer.reset_parameters()
        if self.matching_head.deformable_head is not None:
            self.matching_head.deformable_head.displacement.reset_parameters()


class _DetachedAffineHead(AffineHead):
    def forward(self, moving: Tensor, fixed: Tensor, shape: tuple[int, int, int]) -> Tensor:
        return super().forward(moving, fixed, shape).detach()
