"""The curriculum of our own objective: harder problems, or more evaluations, as training goes on.

Where rows are labelled with their hops (the embedded topics are), the hardest level grows by one as
soon as its rows are right. Without labels the number of evaluations grows with the updates.
train.py uses it before every update.
"""

import math
from dataclasses import dataclass

import torch

from data.system import processes

RIGHT = 0.9           # share of the hardest rows' tokens that must be right
MEMORY = 0.9          # of the average over updates


@dataclass
class Curriculum:
    """The hardest rows of a training so far, up to `top` hops."""
    top: int
    hardest: int = 1        # number of hops
    recent: float = 0.0     # share of these rows' tokens that was right

    @property
    def state(self) -> list:
        return [self.hardest, self.recent]

    def restore(self, state: list):
        """Raises ValueError for another form than that of `state`."""
        types = [type(value) for value in state]
        if types != [int, float] or not 1 <= state[0] <= self.top or not 0 <= state[1] <= 1:
            raise ValueError(f"the state's curriculum {str(state)[:60]} is damaged; "
                             "start anew with another --out_dir")
        self.hardest, self.recent = state

    def note(self, losses: list):
        """After an update: the Losses of all its batches."""
        counts = torch.zeros(2)
        for batch in losses:
            hard = batch.hops == self.hardest
            # p > ½ is right whatever the other tokens have
            right = hard & (batch.last < math.log(2))
            counts = counts + torch.stack((hard.sum(), right.sum())).cpu()
        hard, right = processes.total(counts).tolist()
        if self.hardest >= self.top or not hard:
            return
        self.recent = MEMORY * self.recent + (1 - MEMORY) * right / hard
        if self.recent > RIGHT:
            self.hardest += 1
            self.recent = 0.0


def unroll_of(objective: str, most: int, labelled: bool, update: int | None, updates: int) -> int:
    """Most evaluations in an update of our own objective; 0: the paper's.

    objective  "paper", "refine", or "both" by turns
    update     None: the validation, which is of the whole training
    """
    if objective == "paper" or (objective == "both" and update is not None and update % 2 == 0):
        return 0
    if labelled or update is None:
        return most
    # from 1 to `most` over the first half of the updates
    return min(most, 1 + most * 2 * update // max(1, updates))
