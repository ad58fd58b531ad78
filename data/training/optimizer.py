"""The weights in training: initial weights of a base, AdamW, learning rate, moving average.

train.py uses it; read that next.
"""

import math
from contextlib import contextmanager
from itertools import product

import torch
import torch.nn as nn

BETAS = (0.9, 0.95)        # as in the paper


def build_optimizer(trainable: dict, lr: float, weight_decay: float, new_lr: float = 1.0):
    """AdamW on name -> parameter; matrices decay, biases and norms do not.

    new_lr  share of lr for a path's new layers, which stand on no frozen matrix; 1: all of it
    """
    def is_new(name):
        # not a LoRA, nor a copy of a frozen matrix: those are in the blocks beside the modulation
        return not name.startswith("blocks.") or ".modulation." in name

    groups = []
    for new, vector in product((False, True), (False, True)):
        some = [p for name, p in trainable.items()
                if is_new(name) == new and (p.dim() < 2) == vector]
        # decay pulls towards zero: good for a matrix, wrong for the scale of a norm
        groups.append({"params": some, "weight_decay": 0.0 if vector else weight_decay,
                       "share": new_lr if new else 1.0})
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)


def learning_rate(update: int, updates: int, warmup: int, lr: float, min_lr: float) -> float:
    """Linear warm-up, then linear decay from lr to min_lr at the last update."""
    if update < warmup:
        return lr * (update + 1) / warmup
    # a run as long as its warm-up has no decay to divide by
    progress = (update - warmup) / max(1, updates - warmup)
    return lr + progress * (min_lr - lr)


class EMA:
    """Exponential moving average of the weights, calmer than those of any one update.

    trainable  name -> tensor
    decay      in [0, 1); 0 keeps no average at all
    """

    def __init__(self, trainable: dict, decay: float):
        self.trainable = trainable
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in trainable.items() if decay}

    @torch.no_grad()
    def follow(self):
        """After an update."""
        for name, average in self.tensors.items():
            # a ← d·a + (1 − d)·w
            average.lerp_(self.trainable[name], 1 - self.decay)

    @torch.no_grad()
    def put_in_place(self):
        """The averages become the weights."""
        for name, average in self.tensors.items():
            self.trainable[name].copy_(average)

    @contextmanager
    def in_place(self):
        """The averages are the weights for a while; then training goes on with its own."""
        own = {name: self.trainable[name].detach().clone() for name in self.tensors}
        self.put_in_place()
        yield
        for name, weights in own.items():
            self.trainable[name].data.copy_(weights)


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
