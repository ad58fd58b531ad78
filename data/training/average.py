"""An exponential average of the weights: calmer than the weights of any one update.

train.py lets it follow, and measures and saves the average in place of the weights.
"""

from contextlib import contextmanager

import torch


class Average:
    """Of `trainable`, name -> tensor; decay in [0, 1), where 0 keeps no average at all."""

    def __init__(self, trainable: dict, decay: float):
        self.trainable = trainable
        self.decay = decay
        self.tensors = {}
        if decay:
            self.tensors = {name: p.detach().clone() for name, p in trainable.items()}

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
        kept = {name: self.trainable[name].detach().clone() for name in self.tensors}
        self.put_in_place()
        yield
        for name, weights in kept.items():
            self.trainable[name].data.copy_(weights)
