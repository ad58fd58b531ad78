"""What a training reads: rows into batches with all that is random in them, an update ahead.

A row's times, noise and hidden classes depend on the seed and its place in the endless, shuffled
data, so any process, batch or restart draws the same. train.py calls it; read that next.
"""

from concurrent.futures import ThreadPoolExecutor

from data.parts.draws import row_generator
from data.system import processes
from data.training.batches import by_length, collate, draw_places
from data.training.frozen import FrozenRows


class Loader:
    """Batches on a device.

    draw    L2D.draw, or None for a model that nothing is drawn for
    unroll  most evaluations by the number of an update, None for the validation; 0: the paper's
    """

    def __init__(self, data, args, device, draw, unroll):
        self.data = data
        self.args = args
        self.device = device
        self.draw = draw
        self.unroll = unroll
        # problems of the embedded topics grow harder with what is learned, which nobody knows yet
        self.ahead = args.data != "tiny"
        self.pool = ThreadPoolExecutor(1)
        self.coming = {}

    def update(self, number: int) -> list:
        """The batches of an update; those of the next are made while this one is learned from."""
        coming = self.coming.pop(number, None)
        batches = coming.result() if coming else self.make(number)
        if self.ahead and number + 1 < self.args.updates:
            self.coming = {number + 1: self.pool.submit(self.make, number + 1)}
        return batches

    def make(self, number: int) -> list:
        count = self.args.batch_size * self.args.accumulate
        first = number * count
        seed = self.args.seed
        places = draw_places(len(self.data), first, count, seed)
        return self.batches(self.data, places, first, seed, self.unroll(number))

    def validation(self, data) -> list:
        """The first rows of other data, with the same times and noise every time.

        They are drawn again at every look: next to what the look costs that is nothing, and held
        they would fill memory for all of the training.
        """
        places = range(min(self.args.val_rows, len(data)))
        # no class is hidden, as when the path is used
        return self.batches(data, places, 0, 0, self.unroll(None), hide=False)

    def batches(self, data, places, first: int, seed: int, unroll: int, hide=True) -> list:
        """This process's share of the rows at these places of the data, number `first` and on."""
        rows = [data[place] for place in places]
        mine = processes.share(by_length(rows))
        batches = []
        for at in range(0, len(mine), self.args.batch_size):
            numbers = mine[at:at + self.args.batch_size]
            # under torch.compile borders that change would compile the model anew for every batch
            batch = collate([rows[number] for number in numbers], packed=not self.args.compile)
            if self.draw:
                generators = [row_generator(seed, first + number) for number in numbers]
                batch = self.draw(batch, generators, unroll, hide)
            if isinstance(data, FrozenRows):
                batch = data.recall(batch, [places[number] for number in numbers])
            batches.append(batch.to(self.device))
        return batches
