"""A model whose weights are divided among the processes, by PyTorch's own FSDP2 (`fully_shard`).

Every process stores a part of each layer, and gathers the whole only while it computes with it. The
small trained path beside a frozen model stays whole. train.py --shard; read processes.py before.
"""

import warnings

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from data.system.processes import count


def shard(lm, path_blocks=None, untrained_blocks=None):
    """Divide the weights of `lm`.

    path_blocks       the layers of a path, each beside a frozen one
    untrained_blocks  of L2D.untrained, which computes with the same frozen weights
    """
    mesh = init_device_mesh(lm.embed.weight.device.type, (count(),))
    # a layer returns its keys and values, which are never changed in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    trained_whole = set()
    if not lm.embed.weight.requires_grad:
        # a LoRA
        trained_whole = {p for p in lm.parameters() if p.requires_grad}
    for layer, block in enumerate(lm.blocks):
        if path_blocks is None:
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained_whole)
        else:
            others = [block] if untrained_blocks is None else [block, untrained_blocks[layer]]
            shard_pair(others, path_blocks[layer], mesh)
    if lm.embed.weight.requires_grad:
        # embedding, final norm and head stay whole until the loss is computed
        fully_shard(lm, mesh=mesh)
        register_fsdp_forward_method(lm, "read")
    for module in divided_modules(lm):
        # sums, as everywhere here, instead of means
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)


def divided_modules(lm) -> list:
    return [module for module in lm.modules() if isinstance(module, FSDPModule)]


def shard_pair(others, path_block, mesh):
    """Divide a frozen layer, others[0], together with the path's layer beside it."""
    path_block.frozen = others[0]
    trained = {p for p in path_block.parameters() if p.requires_grad}
    fully_shard(path_block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    # these compute apart from the path, without a gradient
    for block in others:
        block.register_forward_pre_hook(lambda *_: path_block.unshard())
        block.register_forward_hook(lambda *_: path_block.reshard())


def gather(lm):
    """Make all weights whole on every process, to save them."""
    for module in divided_modules(lm):
        module.unshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a divided tensor; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, if `like` is divided."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    return tensor
