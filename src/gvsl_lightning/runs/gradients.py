"""Norms of the gradients of a task."""

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn


def gradient_norms(task: LightningModule) -> dict[str, Tensor]:
    """Euclidean norm of the gradient of each part of a task that has one.

    A part is a child module. A child that consists of heads (children whose names end in
    ``_head``) counts as these heads, so that a matching head becomes ``affine_head`` and
    ``deformable_head``.

    Args:
        task: after its backward pass.

    Returns:
        Name of the part -> scalar, float32.
    """
    parts: dict[str, nn.Module] = {}
    for name, child in task.named_children():
        heads = {n: head for n, head in child.named_children() if n.endswith("_head")}
        parts |= heads or {name: child}
    norms: dict[str, Tensor] = {}
    for name, part in parts.items():
        gradients = [p.grad.float() for p in part.parameters() if p.grad is not None]
        if gradients:
            lengths = [torch.linalg.vector_norm(gradient) for gradient in gradients]
            norms[name] = torch.linalg.vector_norm(torch.stack(lengths))
    return norms
