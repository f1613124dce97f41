"""Parameters shared among processes (FSDP2)."""

from pytorch_lightning import LightningModule
from pytorch_lightning.strategies import ModelParallelStrategy

from gvsl_lightning.errors import InputError


def share_parameters(task: LightningModule) -> None:
    """Under Lightning's ``ModelParallelStrategy``, share the parameters of a task (FSDP2).

    Each process keeps a part of every parameter, of its gradient and of the optimiser's state; a
    child module of the task is whole from its forward to its backward pass. With other strategies
    nothing happens. Call it in the hook ``configure_model``.

    Args:
        task: with a trainer.

    Raises:
        InputError: if the strategy is to split the computation of a network, too.
    """
    strategy = task.trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return
    # slow to import
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = strategy.device_mesh
    if mesh["tensor_parallel"].size() > 1:
        raise InputError(
            f"ModelParallelStrategy has tensor_parallel_size={mesh['tensor_parallel'].size()}; "
            f"set it to 1 and data_parallel_size to {mesh.size()}, the number of processes."
        )
    for child in task.children():
        if any(True for _ in child.parameters()) and not isinstance(child, FSDPModule):
            fully_shard(child, mesh=mesh["data_parallel"])
            if hasattr(child, "encode"):  # a backbone's second way forward
                for method in ("encode", "pyramid"):
                    register_fsdp_forward_method(child, method)
