"""Random times and tokens, from explicit generators on their own device.

So a seed means the same everywhere, and no sequence's draw moves another's. diffusion.py trains
with the times and the noise; sample.py chooses with the tokens.
"""

import math

import torch

LARGEST_SEED = (1 << 32) - 1        # of every generator that is used here, numpy's too


def check_seed(seed: int):
    """Raise ValueError for a seed that some generator would not take."""
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"--seed {seed} is out of range; allowed: 0 to {LARGEST_SEED}")


def draw_times(shape, distribution: str, generator) -> torch.Tensor:
    """Training times t in [0, 1): uniform, or "cosmap", more near 1 (the paper's appendix)."""
    u = torch.rand(shape, generator=generator, device=generator.device)
    if distribution == "uniform":
        return u
    slope = torch.tan(math.pi / 2 * u)
    # t = 1 − 1/(tan(πu/2) + 1)
    return 1 - 1 / (slope + 1)


def draw_noise(shape, width: int, generator) -> torch.Tensor:
    """(*shape, width) of unit variance."""
    return torch.randn((*shape, width), generator=generator, device=generator.device)


def draw_noise_each(shape, generators) -> torch.Tensor:
    """(n, *shape) of unit variance, each sequence from its own generator."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def draw_schedule(shape, needs, most: int, generator) -> torch.Tensor:
    """Times of every position's evaluations: (*shape, most), rising, the last uniform in (0, 1].

    A position with fewer evaluations than `most` has zeros in front.
    needs  (B,) how many a row is thought to need: it gets one fewer to three more; None: 1 to most
    """
    u = torch.rand(shape, generator=generator, device=generator.device)
    if needs is None:
        count = 1 + (most * u).long()
    else:
        needs = needs.to(u.device)[:, None]
        count = needs - 1 + (5 * u).long()
    count = count.clamp(1, most)[..., None]
    # 1 − u: in (0, 1]
    last = 1 - torch.rand((*shape, 1), generator=generator, device=generator.device)
    earlier = 1 - torch.rand((*shape, most - 1), generator=generator, device=generator.device)
    unused = torch.arange(most - 1, device=u.device) < most - count
    earlier = earlier.masked_fill(unused, 0).sort(-1).values
    return torch.cat((last * earlier, last), dim=-1)


def draw_tokens(p, generators):
    """A sample for every position of p (n, T, V): (n, T), each sequence from its own generator.

    So no sequence's draw moves another's.
    """
    size = (p.shape[1], 1)
    draws = [torch.rand(size, generator=g, device=g.device) for g in generators]
    u = torch.stack(draws).to(p.device)                                 # (n, T, 1)
    # 0 would draw the first token even where its p is 0
    u = u.clamp_min(2 ** -25)
    cdf = p.cumsum(-1)                                                  # (n, T, V)
    # the sums end near 1, not at 1
    whole = cdf[..., -1:]
    tokens = torch.searchsorted(cdf, u * whole)
    return tokens.squeeze(-1).clamp_max(p.shape[-1] - 1)
