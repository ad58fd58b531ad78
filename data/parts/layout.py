"""The order of a matrix in memory, for products with few rows: a token of each sequence.

A Linear stores its matrix output by output. On a CPU a product with 1 to 15 rows is faster where it
is stored input by input, a large head up to twice as fast, and with 4 rows or more the bits are the
same. sample.py lays out the models that it loads, lora.py the matrices that it merges.
"""

import torch
import torch.nn as nn


def by_inputs(weight):
    """The same matrix (out, in), on a CPU in the order of its transpose."""
    return weight.T.contiguous().T if weight.device.type == "cpu" else weight


@torch.no_grad()
def lay_out(lm):
    """The same model, laid out for sampling: its weights must not change any more."""
    for module in lm.blocks.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = by_inputs(module.weight)
    lm.head_copy = by_inputs(lm.head.weight)
    # one that is the embedding too is looked up by rows, so both stay
    if not lm.config.tied:
        lm.head.weight.data = lm.head_copy
    return lm
