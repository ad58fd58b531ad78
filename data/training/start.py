"""The weights from which a base of our own begins: `train.py --method=pretrain`."""

import math

import torch
import torch.nn as nn


def init_weights(lm: nn.Module, generator: torch.Generator):
    """GPT-2's: N(0, 0.02²), the matrices that write to the residual stream smaller by √(2L)."""
    for name, p in lm.named_parameters():
        std = 0.02
        if name.endswith((".o.weight", ".down.weight")):
            std /= math.sqrt(2 * lm.config.layers)
        # norms have one dimension too, and start at one
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.dim() == 1:
            nn.init.ones_(p)
        else:
            nn.init.normal_(p, std=std, generator=generator)
