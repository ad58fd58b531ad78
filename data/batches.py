"""Rows to batches: padding, targets, and the order in which rows are read.

A row is (ids, mask, documents), perhaps a class id, perhaps how many evaluations it is thought to
need; mask is 1 on the tokens to be predicted, documents number the examples packed into one row.
Data sets are in data/tokens.py and data/tiny/topics.py; read train.py next.

    python -m data.batches
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

IGNORE = -100              # target of a position that does not count in the loss


@dataclass(frozen=True)
class Counted:
    """The N positions of a batch that count, and what is asked there."""
    where: tuple                       # rows and columns, two tensors (N,)
    y: torch.Tensor                    # (N,) the tokens that are right
    class_ids: torch.Tensor | None     # (N,)

    def at(self, index) -> "Counted":
        """Some of them, or in another order: index (n,) or a slice."""
        where = tuple(place[index] for place in self.where)
        return Counted(where, self.y[index], pick(self.class_ids, index))


class Losses(NamedTuple):
    """Of the N positions that count, (N,) each."""
    values: torch.Tensor               # what is minimised
    last: torch.Tensor                 # at the last evaluation
    t: torch.Tensor | None             # and its time
    rows: torch.Tensor                 # of the batch


def pick(values, index):
    """values[index]; None stays None."""
    return None if values is None else values[index]


def collate(rows, device) -> dict:
    """Rows of different lengths -> one batch of tensors.

    ids, targets  (B, T), padded on the right; targets[b, k] is the token after ids[b, k], or IGNORE
    documents     (B, T), only where a row holds more than one
    class_ids     (B,), only where rows have one; needs (B,) likewise
    """
    length = max(len(row[0]) for row in rows)
    table = torch.zeros(3, len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        for kind in range(3):
            values = torch.as_tensor(row[kind])
            table[kind, i, :len(values)] = values
    ids, mask, documents = table                                        # (B, T + 1) each
    targets = ids.masked_fill(mask == 0, IGNORE)
    # position k answers for token k + 1: the last token is only a target, the first only a question
    batch = {
        "ids": ids[:, :-1],
        "targets": targets[:, 1:],
    }
    if documents.max() > 1:      # padding on the right needs no mask: nothing looks ahead
        batch["documents"] = documents[:, :-1]
    if len(rows[0]) > 3:
        batch["class_ids"] = torch.tensor([row[3] for row in rows])
    if len(rows[0]) > 4:
        batch["needs"] = torch.tensor([row[4] for row in rows])
    return {name: value.to(device) for name, value in batch.items()}


def common_start(prompts: list) -> int:
    """How many first tokens all prompts share, without the last one of any."""
    # the first and the last in order differ where any two do
    low, high = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if low[i] != high[i]), most)


def left_pad(prompts, device):
    """Prompts of different lengths -> ids and documents (B, T), right-aligned.

    Padding is document 0; documents are None where there is none.
    """
    length = max(map(len, prompts))
    ids, documents = torch.zeros(2, len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        start = length - len(prompt)
        ids[row, start:] = torch.tensor(prompt)
        documents[row, start:] = 1
    if documents.all():
        # nothing to hide, so the attention needs no mask
        return ids.to(device), None
    return ids.to(device), documents.to(device)


@functools.lru_cache(maxsize=1)     # of the epoch under way: it is asked for thousands of times
def epoch_order(size: int, seed: int):
    """The order of the rows in one epoch: (size,), another one for every seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)


def draw_rows(data, position: int, count: int, seed: int) -> list:
    """`count` rows from place `position` of the endless data, which is shuffled anew every epoch.

    What stands at a position depends on nothing else, so a resumed run reads on where it stopped.
    """
    rows = []
    for place in range(position, position + count):
        epoch, index = divmod(place, len(data))
        order = epoch_order(len(data), seed + epoch)
        rows.append(data[int(order[index])])
    return rows


def main():
    rows = [
        ([7, 8, 9, 10], [0, 0, 1, 1], [1, 1, 1, 1], 3),
        ([5, 6], [0, 1], [1, 1], 0),
    ]
    for name, value in collate(rows, "cpu").items():
        print(f"{name:10} {value.tolist()}")


if __name__ == "__main__":
    main()
