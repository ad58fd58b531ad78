"""The frozen model never changes, so its states of a row can be computed once and cached on disk.

For several epochs over small data: hidden states, keys and values of every row in one file a split,
out_dir/frozen-train.bin and frozen-val.bin, mapped into memory. train.py --cache_frozen wraps its
data sets so; loader.py adds the states to its batches, and diffusion.py finds them there.
"""

import hashlib
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.system import processes
from data.system.disk import appearing, present, read_json, sha256_of, write_json
from data.text.tokens import SPLITS
from data.training.batches import Batch, CachedStates, collate

NAMES = tuple(f"frozen-{split}.{kind}" for split in SPLITS for kind in ("bin", "json"))


def cache_states(l2d, sets: list, val_rows: int, batch_size: int, out_dir: Path,
                 plan: bool = False) -> list:
    """The two data sets again, each row with the states that the frozen model computes of it.

    plan  only print how large the files would be
    Raises ValueError where the disk has no room.
    """
    counts = len(sets[0]), min(val_rows, len(sets[1]))
    cached = [FrozenRows(l2d, data, count, out_dir / f"frozen-{split}.bin")
              for split, data, count in zip(SPLITS, sets, counts)]
    if plan:
        size = sum(rows.facts["bytes"] for rows in cached)
        print(f"--cache_frozen: {size / 1e9:.1f} GB on the disk, not made for a plan")
        return sets
    if processes.number() == 0:
        for rows in cached:
            rows.fill(batch_size)
    # the others wait for the first
    processes.any_of(False)
    return cached


class FrozenRows:
    """The first `count` rows of token files, and a file of the frozen model's states of them.

    The file has a line of numbers for every token: its hidden state, then keys and values layer by
    layer.
    """

    def __init__(self, l2d, data, count: int, path: Path):
        config = l2d.lm.config
        self.lm = l2d.lm
        self.dtype = self.lm.embed.weight.dtype
        self.data = data
        self.fingerprint = data.fingerprint
        self.path = path
        self.hidden_size = config.hidden_size
        self.kv_shape = (config.layers, 2, config.kv_heads, config.head_dim)
        self.width = self.hidden_size + math.prod(self.kv_shape)
        # the first line of every row, and the end; the last token of a row is only a target
        self.starts = [0, *np.cumsum(data.lengths[:count] - 1).tolist()]
        # what the file was made of: for another model or other data it is made again
        self.facts = {"base": l2d.base_sha256, "config": config.numbers, "data": data.fingerprint,
                      "dtype": str(self.dtype), "rows": count,
                      "bytes": self.starts[-1] * self.width * self.dtype.itemsize}

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, place: int) -> tuple:
        return self.data[place]

    @torch.no_grad()
    def fill(self, batch_size: int):
        """Make the file, unless an earlier run has made it. Raises ValueError for a full disk."""
        note = self.path.with_suffix(".json")
        # the digest too: a file of the right size may hold something else, or zeros
        if present(self.path) and present(note):
            if read_json(note) == {**self.facts, "sha256": sha256_of(self.path)}:
                return
        size = self.facts["bytes"]
        print(f"caching the frozen model's states of {self.starts[-1]:,} tokens: "
              f"{size / 1e9:.1f} GB in {self.path}", flush=True)
        free = shutil.disk_usage(self.path.parent).free
        if free < size:
            raise ValueError(f"--cache_frozen needs {size / 1e9:.1f} GB in {self.path.parent}, "
                             f"which has {free / 1e9:.1f}; make room, or go without it")
        digest = hashlib.sha256()
        # written and not mapped: where the disk is full, writing to a mapping kills the process
        with appearing(self.path) as part, open(part, "wb") as file:
            for first in tqdm(range(0, len(self), batch_size), disable=None, unit="batch"):
                places = range(first, min(first + batch_size, len(self)))
                batch = collate([self.data[place] for place in places])
                batch = batch.to(self.lm.embed.weight.device)
                states = self.lm.read(batch.ids, batch.documents)
                pairs = [torch.stack(pair, 1) for pair in zip(states.keys, states.values)]
                numbers = torch.stack(pairs, 1)                         # (B, L, 2, G, T, D)
                numbers = numbers.movedim(4, 1).flatten(2)              # (B, T, L·2·G·D)
                found = torch.cat((states.hidden, numbers), -1).cpu()
                for row, place in zip(found, places):
                    # without the padding
                    mine = row[:self.starts[place + 1] - self.starts[place]].contiguous()
                    content = mine.view(torch.uint8).numpy()
                    digest.update(content)
                    file.write(content)
        write_json({**self.facts, "sha256": digest.hexdigest()}, note)

    def recall(self, batch: Batch, places: list) -> Batch:
        """The batch of the rows at these places, with the cached states."""
        # mapped for every batch, one system call: Windows removes no file that is still mapped
        size = self.starts[-1] * self.width
        lines = torch.from_file(str(self.path), size=size, dtype=self.dtype).view(-1, self.width)
        found = torch.zeros(*batch.ids.shape, self.width, dtype=self.dtype)
        for row, place in zip(found, places):
            mine = lines[self.starts[place]:self.starts[place + 1]]
            row[:len(mine)] = mine
        hidden = found[..., :self.hidden_size]
        numbers = found[..., self.hidden_size:].unflatten(-1, self.kv_shape)    # (B, T, L, 2, G, D)
        keys, values = numbers.movedim(1, 4).unbind(2)                  # (B, L, G, T, D) each
        return replace(batch, cached=CachedStates(hidden, keys.unbind(1), values.unbind(1)))
