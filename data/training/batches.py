"""Rows to batches: padding, next_ids, and the order in which rows are read.

A row is (ids, mask, documents), perhaps with a class id, one for all tokens or one for each; mask
is 1 on the tokens to be predicted, documents number the examples of a row. Data sets are in
data/text/tokens.py and data/tiny/topics.py; read train.py next.

    python -m data.training.batches
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from data.parts.positions import Packed

IGNORE = -100              # target of a position that does not count in the loss


@dataclass(frozen=True)
class Targets:
    """The N positions of a batch that count in the loss, and the random numbers of each."""
    index: tuple                       # rows and columns, two tensors (N,)
    y: torch.Tensor                    # (N,) the right tokens
    class_ids: torch.Tensor | None     # (N,)
    t: torch.Tensor | None = None      # (N,), or (N, K) times of up to K evaluations
    noise: torch.Tensor | None = None  # (N, Z) of unit variance
    again: torch.Tensor | None = None  # (N,) of a class that is asked again

    def each(self, change) -> "Targets":
        """The same with every tensor changed; None stays None."""
        index = tuple(change(places) for places in self.index)
        others = (self.y, self.class_ids, self.t, self.noise, self.again)
        return Targets(index, *(None if one is None else change(one) for one in others))

    def at(self, index) -> "Targets":
        """Some of the positions, in the order of index (n,) or of a slice."""
        return self.each(lambda values: values[index])


class CachedStates(NamedTuple):
    """What the frozen blocks computed: hidden (B, T, C), L keys and L values (B, G, T, D)."""
    hidden: torch.Tensor
    keys: tuple
    values: tuple


@dataclass(frozen=True)
class Batch:
    """Rows of different lengths as one, padded on the right."""
    ids: torch.Tensor                  # (B, T)
    documents: Packed | torch.Tensor | None    # only where a row holds more than one
    targets: Targets
    cached: CachedStates | None = None         # from the disk, see frozen.py

    def to(self, device) -> "Batch":
        def move(values):
            return values.to(device, non_blocking=True)

        documents = None if self.documents is None else self.documents.to(device)
        cached = self.cached
        if cached:
            hidden, keys, values = cached
            cached = CachedStates(move(hidden), tuple(map(move, keys)), tuple(map(move, values)))
        return Batch(move(self.ids), documents, self.targets.each(move), cached)


class Losses(NamedTuple):
    """Of the N positions that count, (N,) each."""
    values: torch.Tensor               # to be minimised
    last: torch.Tensor                 # at the last evaluation
    t: torch.Tensor | None             # time of the last evaluation


def pick(values, index):
    """values[index]; None stays None."""
    return None if values is None else values[index]


def collate(rows, packed: bool = True) -> Batch:
    """Rows -> a batch on the CPU, with nothing drawn yet.

    packed  documents of one row by their borders, or else by the number of every token
    """
    length = max(len(row[0]) for row in rows)
    tables = torch.zeros(4, len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        for table, values in zip(tables, row):
            # one class may stand for the whole row
            table[i, :len(row[0])] = torch.as_tensor(values)
    ids, mask, documents, class_ids = tables                            # (B, T + 1) each
    # position k predicts token k + 1: the last token is only a target, the first only an input
    next_ids = ids.masked_fill(mask == 0, IGNORE)[:, 1:]
    # of the tokens to be predicted
    class_ids = class_ids[:, 1:] if len(rows[0]) > 3 else None
    # padding on the right needs no mask: attention is causal
    several = bool(documents.max() > 1)
    documents = documents[:, :-1].contiguous() if several else None
    if several and packed:
        documents = Packed.of(documents)
    return Batch(ids[:, :-1].contiguous(), documents, find_targets(next_ids, class_ids))


def find_targets(next_ids, class_ids=None) -> Targets:
    """The positions of next_ids (B, T) that are not IGNORE; class_ids (B, T) or None.

    next_ids[b, k] is the token after ids[b, k], class_ids[b, k] its class.
    """
    rows, columns = (next_ids != IGNORE).nonzero(as_tuple=True)
    # two tensors of their own: torch.compile would see them as views of one
    index = (rows.clone(), columns.clone())
    return Targets(index, next_ids[index], pick(class_ids, index))


@functools.lru_cache(maxsize=1)     # one epoch: every row of an update needs the same order
def epoch_order(size: int, seed: int):
    """The order of the rows in one epoch, (size,)."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def draw_places(size: int, first: int, count: int, seed: int) -> list:
    """The rows at `count` places of the endless data, which is shuffled every epoch.

    The row at a place depends on nothing else, so a resumed run continues where it stopped.
    """
    places = []
    for number in range(first, first + count):
        epoch, index = divmod(number, size)
        places.append(int(epoch_order(size, seed + epoch)[index]))
    return places


def main():
    rows = [
        ([7, 8, 9, 10], [0, 0, 1, 1], [1, 1, 1, 1], 3),
        ([5, 6], [0, 1], [1, 1], 0),
    ]
    batch = collate(rows)
    print(f"ids        {batch.ids.tolist()}")
    print(f"index      {[place.tolist() for place in batch.targets.index]}")
    print(f"y          {batch.targets.y.tolist()}")
    print(f"class_ids  {batch.targets.class_ids.tolist()}")


if __name__ == "__main__":
    main()
