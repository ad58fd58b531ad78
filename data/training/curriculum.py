"""What a refined training asks for next: harder problems, or more evaluations, as it goes on.

Where rows say how many evaluations they need (the embedded topics do), the hardest need grows by
one as soon as those of the hardest rows are right. Where they say nothing (data of one's own), the
number of evaluations grows with the updates. train.py asks before every update.
"""

import math

import torch

RIGHT = 0.9           # share of the hardest rows' tokens that must be right
MEMORY = 0.9          # of the average over updates


class Curriculum:
    """`hardest` need so far, and how many of the hardest rows' tokens were right recently."""

    def __init__(self, top: int):
        self.top = top
        self.hardest = 1
        self.recent = 0.0

    @property
    def state(self) -> list:
        return [self.hardest, self.recent]

    def restore(self, state: list):
        """Raises ValueError for what `state` never was."""
        types = [type(value) for value in state]
        if types != [int, float] or not 1 <= state[0] <= self.top or not 0 <= state[1] <= 1:
            raise ValueError(f"the state's curriculum {str(state)[:60]} is damaged; "
                             "start anew with another --out_dir")
        self.hardest, self.recent = state

    def count(self, hops, last):
        """(2,): how many of the counted tokens (N,) are the hardest, and how many of these right.

        last  (N,) their last losses
        """
        hard = hops == self.hardest
        # p > ½ is right whatever the others are
        right = hard & (last < math.log(2))
        return torch.stack((hard.sum(), right.sum()))

    def note(self, hard: int, right: int):
        """After an update: the counts of all its tokens."""
        if self.hardest >= self.top or not hard:
            return
        self.recent = MEMORY * self.recent + (1 - MEMORY) * right / hard
        if self.recent > RIGHT:
            self.hardest += 1
            self.recent = 0.0


def growing_unroll(update: int, updates: int, most: int) -> int:
    """From 1 to `most` evaluations over the first half of the updates."""
    return min(most, 1 + most * 2 * update // max(1, updates))
