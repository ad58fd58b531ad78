"""The frozen model never changes, so what it makes of a row can be made once and kept.

For several epochs over small data: hidden states, keys and values of every row in one file,
out_dir/frozen.bin, mapped into memory. train.py --cache_frozen; diffusion.py reads from it.
"""

import shutil
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from tqdm import tqdm

from data.batches import Batch, Kept, collate
from data.disk import appearing, present, read_json, write_json

NAMES = ("frozen.bin", "frozen.json")


class FrozenCache:
    """One line of numbers a token: its hidden state, then keys and values layer by layer.

    base_sha256  of the frozen weights, which the path has hashed already
    """

    def __init__(self, lm, base_sha256: str, data, out_dir):
        config = lm.config
        self.lm = lm
        self.data = data
        self.path = Path(out_dir) / NAMES[0]
        self.form = (config.layers, 2, config.kv_heads, config.head_dim)
        self.hidden = config.hidden_size
        self.width = self.hidden + torch.Size(self.form).numel()
        # the last token of a row is only a target
        self.starts = [0, *accumulate(len(data[row][0]) - 1 for row in range(len(data)))]
        self.dtype = lm.embed.weight.dtype
        self.bytes = self.starts[-1] * self.width * self.dtype.itemsize
        # what it was made of: another model's is made again
        self.facts = {"base": base_sha256, "data": data.fingerprint, "dtype": str(self.dtype),
                      "bytes": self.bytes}

    def fill(self, batch_size: int):
        """Make the file, unless an earlier run has. Raises ValueError where the disk is full."""
        note = self.path.with_suffix(".json")
        if present(self.path) and present(note) and read_json(note) == self.facts:
            return
        print(f"keeping what the frozen model makes of {self.starts[-1]:,} tokens: "
              f"{self.bytes / 1e9:.1f} GB in {self.path}")
        free = shutil.disk_usage(self.path.parent).free
        if free < self.bytes:
            raise ValueError(f"--cache_frozen needs {self.bytes / 1e9:.1f} GB in "
                             f"{self.path.parent}, which has {free / 1e9:.1f}; make room, or go "
                             "without it")
        with appearing(self.path) as part:
            lines = self.map(part)
            for first in tqdm(range(0, len(self.data), batch_size), disable=None, unit="batch"):
                self.write(lines, range(first, min(first + batch_size, len(self.data))))
        write_json(self.facts, note)

    def map(self, path) -> torch.Tensor:
        """(tokens, width), in memory as far as the system likes."""
        size = self.starts[-1] * self.width
        flat = torch.from_file(str(path), shared=True, size=size, dtype=self.dtype)
        return flat.view(-1, self.width)

    @torch.no_grad()
    def write(self, lines, places):
        batch = collate([self.data[place] for place in places])
        batch = batch.to(self.lm.embed.weight.device)
        reading = self.lm.read(batch.ids, batch.documents)
        pairs = [torch.stack(pair, 1) for pair in zip(reading.keys, reading.values)]
        numbers = torch.stack(pairs, 1)                                 # (B, L, 2, G, T, D)
        numbers = numbers.movedim(4, 1).flatten(2)                      # (B, T, L·2·G·D)
        found = torch.cat((reading.hidden, numbers), -1).cpu()
        for row, place in zip(found, places):
            start, end = self.starts[place:place + 2]
            lines[start:end] = row[:end - start]

    def recall(self, batch: Batch, places: list) -> Batch:
        """The batch of the rows at these places, read already."""
        lines = self.map(self.path)
        found = torch.zeros(*batch.ids.shape, self.width, dtype=self.dtype)
        for row, place in enumerate(places):
            start, end = self.starts[place:place + 2]
            found[row, :end - start] = lines[start:end]
        hidden = found[..., :self.hidden]
        numbers = found[..., self.hidden:].unflatten(-1, self.form)     # (B, T, L, 2, G, D)
        keys, values = numbers.movedim(1, 4).unbind(2)                  # (B, L, G, T, D) each
        return replace(batch, kept=Kept(hidden, keys.unbind(1), values.unbind(1)))
