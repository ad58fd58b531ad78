"""What a refined training asks for next: harder problems, or more evaluations, as it goes on.

Where rows say how many evaluations they need (the embedded topics do), the hardest need grows by
one as soon as those of the hardest rows are right. Where they say nothing (data of one's own), the
number of evaluations grows with the updates. train.py asks before every update.
"""

import math

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

    def note(self, needs, last):
        """After an update: the need of every counted token (N,), and its last loss (N,)."""
        hard = needs == self.hardest
        if self.hardest >= self.top or not hard.any():
            return
        # p > ½ is right whatever the others are
        right = float((last[hard] < math.log(2)).float().mean())
        self.recent = MEMORY * self.recent + (1 - MEMORY) * right
        if self.recent > RIGHT:
            self.hardest += 1
            self.recent = 0.0


def growing_unroll(update: int, updates: int, most: int) -> int:
    """From 1 to `most` evaluations over the first half of the updates."""
    return min(most, 1 + most * 2 * update // max(1, updates))
