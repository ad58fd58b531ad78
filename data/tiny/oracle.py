"""The exact oracle: a vocabulary of a few tokens for which p(y|x_t) is known without any training.

diffusion.py lets noise flow to its tokens when it is run alone; the tests hold the whole sampler
against it, since what it must produce is known: solvers converge with their order, sampled tokens
follow the prior.
"""

from types import SimpleNamespace

import torch

# Four tokens on a line: their vectors, and how likely they are.
LINE = ([[-2.0], [-0.5], [1.0], [3.0]], [0.4, 0.1, 0.3, 0.2])


class Oracle:
    """The exact answer over a small vocabulary, where L2D has a network.

    p(y|x_t) ∝ p(y)·N(x_t; t·V_y, (1−t)²σ²I) for the prior p(y) and the vectors V (V, Z).
    """

    def __init__(self, vectors, prior, sigma: float):
        self.vectors = torch.tensor(vectors)
        self.prior = torch.tensor(prior, dtype=torch.float64)
        self.config = SimpleNamespace(width=self.vectors.shape[1], classes=0, sigma=sigma)

    def vocabulary(self):
        return self.vectors

    def predict(self, x_t, t, class_ids, states, before=None):
        """log p(y|x_t), (n, T, V)."""
        if torch.is_tensor(t):
            t = t.double().view(-1, 1, 1)
        # every token is a normal distribution around t·V_y
        means = torch.as_tensor(t)[..., None] * self.vectors
        variance = ((1 - t) * self.config.sigma) ** 2
        away = x_t.double()[..., None, :] - means                       # (n, T, V, Z)
        distance = away.square().sum(-1)
        log_p = self.prior.log() - distance / (2 * variance)
        return log_p.log_softmax(-1).float()
