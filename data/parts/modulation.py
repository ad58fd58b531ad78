"""The modulation of the path at each time, cached: sampling uses the same times for every token.

L2D.modulation in diffusion.py computes it; the table is dropped when weights have changed.
"""

from typing import NamedTuple

import torch

MOST = 128                # times in a table; the paper's longest run has 127


class Modulation(NamedTuple):
    """All that depends on the time (and class) alone."""
    blocks: list            # L tensors (..., 6·C): two scales, shifts and gates for every layer
    w_d: torch.Tensor       # (..., C) weight of the path in the last hidden state
    gate: torch.Tensor | None = None    # (..., C) of the prediction in place of the token


class TimeTable:
    """The modulation of an `l2d` at every time that has been used."""

    def __init__(self, l2d):
        self.l2d = l2d
        self.cached = {}

    def at(self, t, class_ids) -> Modulation:
        """Modulation (n, 1, ...) at t, a float or (n,); class_ids (n,) or None."""
        if class_ids is None:
            class_ids = torch.tensor([self.l2d.config.classes], device=self.l2d.to_z.weight.device)
        if torch.is_tensor(t):
            # every sequence is at a time of its own
            times = t.tolist()
            classes = class_ids.expand(len(times)).tolist()
            rows = [[part[c] for part in row] for row, c in zip(self.rows(times), classes)]
            parts = [torch.stack(values) for values in zip(*rows)]
        else:
            parts = [part[class_ids] for part in self.rows([t])[0]]
        blocks, *others = [part[:, None] for part in parts]             # (n, 1, L, 6·C), (n, 1, C)
        return Modulation(blocks.unbind(2), *others)

    def rows(self, times: list) -> list:
        """At each time, for each of K classes and for none: (K + 1, L, 6·C), (K + 1, C) each."""
        missing = [time for time in dict.fromkeys(times) if time not in self.cached]
        if missing:
            # in one call, which reads the large layers once
            classes = torch.arange(self.l2d.config.classes + 1, device=self.l2d.to_z.weight.device)
            t = torch.tensor(missing, device=classes.device).repeat_interleave(len(classes))
            made = self.l2d.modulation(t, classes.repeat(len(missing)))
            parts = [torch.stack(made.blocks, dim=1), made.w_d, made.gate]
            parts = [part.split(len(classes)) for part in parts if part is not None]
            self.cached.update(zip(missing, zip(*parts)))
        found = [self.cached[time] for time in times]
        # the oldest
        for time in list(self.cached)[:-MOST]:
            del self.cached[time]
        return found
