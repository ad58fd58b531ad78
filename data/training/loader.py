"""The batches of a training, with all that is random in them, made one update ahead.

A row's times, noise and hidden classes depend on the seed and its place in the endless, shuffled
data, so any process, batch or restart draws the same. train.py uses it; read that next.
"""

from concurrent.futures import ThreadPoolExecutor

from data.parts.draws import RowDraws, row_generator
from data.system import processes
from data.training.batches import by_length, collate, draw_places
from data.training.frozen import FrozenRows


class Loader:
    """Batches of `batch_size` rows on a device, `rows` of them in an update.

    draw    draw(batch, draws, update) -> the batch with its times and noise; update None is the
            validation. None for a model without random numbers
    packed  documents of a row by their borders; else by the number of every token
    ahead   number of updates that may be made before they are needed; 0: the data changes with
            what was learned
    """

    def __init__(self, data, rows: int, batch_size: int, seed: int, device, draw=None,
                 packed: bool = True, ahead: int = 0):
        self.data = data
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.draw = draw
        self.packed = packed
        self.ahead = ahead
        self.pool = ThreadPoolExecutor(1)
        self.coming = {}

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

        They are drawn again for every validation: that costs nothing beside the validation itself,
        and cached they would fill memory for all of the training.
        """
        return self.batches(data, range(min(rows, len(data))), 0, 0, None)

    def batches(self, data, places, first: int, seed: int, update: int | None) -> list:
        """This process's share of the rows at these places of the data, number `first` and on."""
        rows = [data[place] for place in places]
        mine = processes.share(by_length(rows))
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
