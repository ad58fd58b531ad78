"""Memory of the backward pass: how much autograd keeps, and how to keep less.

train.py --plan measures it, train.py --checkpointing saves it.
"""

import functools

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint


def recompute(blocks):
    """Activation checkpointing: backward computes the activations of these blocks once more."""
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def saved_bytes(forward) -> tuple:
    """(bytes that autograd keeps of forward(), without the weights; what forward() returns)."""
    sizes = {}

    def pack(tensor):
        # a matrix product keeps a transposed view of its weight
        if not any(isinstance(one, nn.Parameter) for one in (tensor, tensor._base)):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    return sum(sizes.values()), result
