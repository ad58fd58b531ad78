"""A model whose weights are divided among the processes, by PyTorch's own FSDP2 (`fully_shard`).

Every process keeps a part of each layer, and has it whole only while it computes with it. What is
trained beside a frozen model is small and stays whole. train.py --shard; read processes.py
before.
"""

import warnings

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from data.system.processes import count


def shard(lm, path_blocks=None):
    """Divide the weights of `lm`; path_blocks: the layers of a path, each beside a frozen one."""
    mesh = init_device_mesh(lm.embed.weight.device.type, (count(),))
    # a layer gives back its keys and values, which nobody changes in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    trained_whole = set()
    if not lm.embed.weight.requires_grad:
        # a LoRA
        trained_whole = {p for p in lm.parameters() if p.requires_grad}
    for layer, block in enumerate(lm.blocks):
        if path_blocks is None:
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained_whole)
        else:
            shard_pair(block, path_blocks[layer], mesh)
    if lm.embed.weight.requires_grad:
        # embedding, final norm and head: they stay whole from the reading to the loss
        fully_shard(lm, mesh=mesh)
        register_fsdp_forward_method(lm, "read")
    for module in divided_modules(lm):
        # sums, as everywhere here, and no means
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)


def divided_modules(lm) -> list:
    return [module for module in lm.modules() if isinstance(module, FSDPModule)]


def shard_pair(block, path_block, mesh):
    """A frozen layer and the path's beside it, which takes the frozen one's weights along."""
    path_block.frozen = block
    trained = {p for p in path_block.parameters() if p.requires_grad}
    fully_shard(path_block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    register_fsdp_forward_method(path_block, "read")
    # the frozen layer reads before the path does, without a gradient
    block.register_forward_pre_hook(lambda *_: path_block.unshard())
    block.register_forward_hook(lambda *_: path_block.reshard())


def gather(lm):
    """All weights whole again on every process, to be saved."""
    for module in divided_modules(lm):
        module.unshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a divided tensor; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole one, if `like` is divided."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    return tensor
