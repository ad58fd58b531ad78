"""Random times, noise, tokens and class ids, from explicit generators on the CPU, one a row.

So a seed means the same everywhere: the numbers of a row depend neither on its batch, nor on the
process that reads it, nor on earlier draws. diffusion.py trains with the times and the noise;
sample.py chooses with the tokens.
"""

import math

import torch

from data.system.command import check_range

LARGEST_SEED = (1 << 32) - 1        # of torch's generators and numpy's


def check_seed(seed: int):
    """Raise ValueError for a seed that a generator would not take."""
    check_range("--seed", seed, 0, LARGEST_SEED)


def row_generator(seed: int, number: int) -> torch.Generator:
    """The generator of row `number` of a training's endless data, or of its validation."""
    # torch keeps 32 bits of a seed; an odd factor gives each of 2³² rows another one
    mixed = (seed * 0x9E3779B1 + number) % (LARGEST_SEED + 1)
    return torch.Generator().manual_seed(mixed)


class RowDraws:
    """Random numbers for N positions: counts[b] of them from generators[b], row after row."""

    def __init__(self, counts: list, generators: list):
        self.rows = list(zip(counts, generators))

    @classmethod
    def of(cls, rows, generators: list) -> "RowDraws":
        """For N positions in the rows `rows` (N,), one row after another."""
        return cls(rows.bincount(minlength=len(generators)).tolist(), generators)

    def each(self, draw, shape) -> torch.Tensor:
        return torch.cat([draw(n, *shape, generator=g) for n, g in self.rows])

    def uniform(self, *shape) -> torch.Tensor:
        """(N, *shape) in [0, 1)."""
        return self.each(torch.rand, shape)

    def normal(self, *shape) -> torch.Tensor:
        """(N, *shape) of unit variance."""
        return self.each(torch.randn, shape)


def draw_times(draws: RowDraws, distribution: str) -> torch.Tensor:
    """Training times t (N,) in [0, 1): uniform, or "cosmap", mostly in the middle (appendix)."""
    u = draws.uniform()
    if distribution == "uniform":
        return u
    # t = 1 − 1/(tan(πu/2) + 1)
    return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)


def draw_schedule(draws: RowDraws, again, most: int) -> torch.Tensor:
    """Times of every position's evaluations: (N, most), rising, the last uniform in (0, 1].

    A position with fewer evaluations than `most` has zeros in front.
    again  (N,) True: 1 to `most` evaluations; False: one or two; None: 1 to `most` for all
    """
    limit = most
    if again is not None:
        limit = torch.where(again, most, 2)
    count = 1 + (limit * draws.uniform()).long()
    count = count.clamp(1, most)[:, None]
    # 1 − u: in (0, 1]
    last = 1 - draws.uniform(1)
    earlier = 1 - draws.uniform(most - 1)
    unused = torch.arange(most - 1) < most - count
    earlier = earlier.masked_fill(unused, 0).sort(-1).values
    return torch.cat((last * earlier, last), dim=-1)


def draw_tokens(p, generators):
    """A sample for every position of p (n, T, V): (n, T), each sequence from its own generator."""
    size = (p.shape[1], 1)
    draws = [torch.rand(size, generator=g, device=g.device) for g in generators]
    u = torch.stack(draws).to(p.device)                                 # (n, T, 1)
    # 0 would draw the first token even where its p is 0
    u = u.clamp_min(2 ** -25)
    cdf = p.cumsum(-1)                                                  # (n, T, V)
    # the sums end near 1, not at 1
    tokens = torch.searchsorted(cdf, u * cdf[..., -1:])
    return tokens.squeeze(-1).clamp_max(p.shape[-1] - 1)


# --- class ids of guidance: a topic for every token; the id behind the last one means no topic ----

def check_classes(class_ids, classes: int):
    """Raise ValueError for classes that the path does not have."""
    some = class_ids.flatten().tolist()[:4]
    if not classes:
        raise ValueError(f"class ids {some} were given, but this path has no classes; "
                         "allowed: None")
    if class_ids.min() < 0 or class_ids.max() > classes:
        raise ValueError(f"class ids {some} are out of range; allowed: 0 to {classes}")


def drop_classes(class_ids, share: float, no_class: int, draws):
    """Hide a share of the classes (N,), position by position as in the official code."""
    return class_ids.masked_fill(draws.uniform() < share, no_class)
