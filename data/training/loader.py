"""The batches of a training, with all that is random in them, made one update ahead.

A row's times, noise and hidden classes depend on the seed and its place in the endless, shuffled
data, so any process, batch or restart draws the same. train.py uses it; read that next.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from data.parts.draws import RowDraws, row_generator
from data.system import processes
from data.training.batches import collate, draw_places
from data.training.frozen import FrozenRows


@dataclass
class Loader:
    """Batches of `batch_size` rows on a device, `rows` of them in an update."""
    data: object
    rows: int
    batch_size: int
    seed: int
    device: torch.device
    # draw(batch, draws, update) -> the batch with its times and noise; update None: the validation.
    # None for a model without random numbers
    draw: Callable | None = None
    packed: bool = True     # documents of a row by their borders; else by the number of every token
    ahead: int = 0          # number of the first update that is not made early
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    coming: dict = field(default_factory=dict)      # the next update -> its batches

    def update(self, number: int) -> list:
        """The batches of an update; those of the next are made while this one is learned from."""
        coming = self.coming.pop(number, None)
        batches = coming.result() if coming else self.make(number)
        if number + 1 < self.ahead:
            self.coming = {number + 1: self.pool.submit(self.make, number + 1)}
        return batches

    def make(self, number: int) -> list:
        first = number * self.rows
        places = draw_places(len(self.data), first, self.rows, self.seed)
        return self.batches(self.data, places, first, self.seed, number)

    def validation(self, data, rows: int) -> list:
        """The first rows of other data, with the same times and noise every time.

        They are drawn again for every validation: cached they would fill memory.
        """
        return self.batches(data, range(min(rows, len(data))), 0, 0, None)

    def batches(self, data, places, first: int, seed: int, update: int | None) -> list:
        """This process's share of the rows at these places of the data, number `first` and on."""
        rows = [data[place] for place in places]
        # short ones first: a batch is as long as its longest row
        by_length = sorted(range(len(rows)), key=lambda number: len(rows[number][0]))
        mine = processes.share(by_length)
        batches = []
        for at in range(0, len(mine), self.batch_size):
            numbers = mine[at:at + self.batch_size]
            batch = collate([rows[number] for number in numbers], self.packed)
            if self.draw:
                generators = [row_generator(seed, first + number) for number in numbers]
                batch = self.draw(batch, RowDraws.of(batch.targets.index[0], generators), update)
            if isinstance(data, FrozenRows):
                batch = data.recall(batch, [places[number] for number in numbers])
            batches.append(batch.to(self.device))
        return batches
