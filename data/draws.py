"""Random times and tokens, from explicit generators on their own device.

So a seed means the same everywhere, and no sequence's draw moves another's. diffusion.py trains
with the times; sample.py chooses with the tokens.
"""

import math

import torch


def draw_times(shape, distribution: str, generator) -> torch.Tensor:
    """Training times t in [0, 1): uniform, or "cosmap", more near 1 (the paper's appendix)."""
    u = torch.rand(shape, generator=generator, device=generator.device)
    if distribution == "uniform":
        return u
    slope = torch.tan(math.pi / 2 * u)
    # t = 1 − 1/(tan(πu/2) + 1)
    return 1 - 1 / (slope + 1)


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
