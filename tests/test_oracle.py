"""diffusion.VelocityField and solvers.odeint against an exact oracle: what the sampler must produce is known without any training.

Over a finite vocabulary with prior p(y), p(y|x_t) ∝ p(y)·N(x_t; t·V_y, (1−t)²σ²I) has a closed form. A denoiser that
returns it takes the place of the network: solvers must converge with their order, sampled tokens must follow the prior.
"""

import math

import pytest
import torch

from data.tiny.oracle import LINE as FOUR_TOKENS
from data.tiny.oracle import Oracle
from diffusion import VelocityField, draw_tokens
from solvers import odeint

F64 = torch.float64


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def p_value(counts, p) -> float:
    """Of Pearson's χ² test that `counts` were drawn from the distribution p."""
    expected = p.double() * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(p) - 1) / 2, dtype=F64), statistic / 2))


LINE = Oracle(*FOUR_TOKENS, sigma=2.0)
PLANE = Oracle(
    [[2.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [1.5, -2.0], [-2.0, 2.0]],
    [0.35, 0.05, 0.25, 0.2, 0.15], sigma=4.0)


def nearest(oracle, x):
    """The token whose vector is closest, (...,)."""
    return (x[..., None, :] - oracle.vectors).square().sum(-1).argmin(-1)


def exact_state(oracle, x_0, t):
    """On a line trajectories cannot cross, so each keeps its quantile of the marginal of x_t.

    That is solved by bisection, without any solver.
    """
    def quantile(x, t):
        z = (x - t * oracle.vectors[:, 0]) / ((1 - t) * oracle.config.sigma)
        return (oracle.prior * torch.special.ndtr(z)).sum(-1, keepdim=True)

    low, high = torch.full_like(x_0, -50), torch.full_like(x_0, 50)
    for _ in range(60):
        middle = (low + high) / 2
        below = quantile(middle, t) < quantile(x_0, 0.0)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def line_problem(end=0.6, batch=4, tokens=16):
    """The oracle's field on a line, run to t = `end`.

    At t = 1 all has collapsed to tokens and no error is left to see.
    """
    quantiles = (torch.arange(batch * tokens, dtype=F64) + 0.5) / (batch * tokens)
    x_0 = LINE.config.sigma * torch.special.ndtri(quantiles).view(tokens, batch, 1).transpose(0, 1)
    flow = VelocityField(LINE, None, "average")

    def scaled(s, x):
        velocity, guess = flow(end * s, x)
        return end * velocity, guess

    return scaled, x_0, exact_state(LINE, x_0, end)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_solvers_converge_with_their_order_to_the_exact_trajectory(solver, order):
    f, x_0, exact = line_problem()
    errors = []
    for steps in (8, 16, 32):
        errors.append(float((odeint(f, x_0, solver, steps).x - exact).abs().mean()))
    assert all(abs(math.log2(a / b) - order) < 0.2 for a, b in zip(errors, errors[1:])), errors


def test_adaptive_solver_keeps_its_tolerance_on_the_exact_trajectory():
    f, x_0, exact = line_problem()
    nfe = []
    for tolerance in (1e-3, 1e-5, 1e-7):
        solution = odeint(f, x_0, "dopri5", rtol=tolerance, atol=tolerance)
        assert float((solution.x - exact).abs().max()) < 10 * tolerance
        nfe.append(int(solution.nfe.max()))
    # a second-order rule would need 100 times as many
    assert nfe[0] < nfe[1] < nfe[2] < 6 * nfe[0]


@pytest.mark.parametrize("solver, steps", [
    ("euler", 64), ("midpoint", 16), ("heun", 16), ("rk4", 8), ("dopri5", 1)])
def test_every_noise_flows_to_the_token_of_its_quantile(solver, steps):
    _, x_0, _ = line_problem(tokens=50)
    solution = odeint(VelocityField(LINE, None, "average"), x_0, solver, steps)
    edges = LINE.prior.cumsum(0)[:-1]
    expected = torch.bucketize(torch.special.ndtr(x_0 / LINE.config.sigma).squeeze(-1).contiguous(), edges)
    assert (nearest(LINE, solution.x) == expected).float().mean() >= 0.98


def sampled(estimate, solver="euler", steps=4, temperature=1.0, batch=4, tokens=5000):
    """Counts of the final tokens of 20,000 draws of noise."""
    flow = VelocityField(PLANE, None, estimate, temperature, generators=generators(batch, 10))
    x_0 = PLANE.config.sigma * torch.randn(batch, tokens, 2, generator=torch.Generator().manual_seed(1))
    x_1 = odeint(flow, x_0, solver, steps).x
    return nearest(PLANE, x_1).flatten().bincount(minlength=len(PLANE.prior))


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_sampled_estimate_draws_tokens_from_the_prior(steps):
    """With Euler's rule exactly, for any number of steps.

    The way to a sample of p(y|x_t) is the line that x_t itself lies on.
    """
    assert p_value(sampled("sample", steps=steps), PLANE.prior) > 1e-3


def test_average_estimate_draws_tokens_from_the_prior_too():
    assert p_value(sampled("average", "midpoint", 16), PLANE.prior) > 1e-3


@pytest.mark.parametrize("options", [
    dict(estimate="argmax"),
    dict(estimate="sample", temperature=0.7),
    dict(estimate="sample", temperature="1-t"),
    dict(estimate="average", steps=1),
])
def test_the_distribution_test_notices_a_wrong_sampler(options):
    assert p_value(sampled(**options), PLANE.prior) < 1e-6


def test_evidence_for_the_chosen_token_grows_with_t():
    seen = []
    flow = VelocityField(PLANE, None, "sample", generators=generators(4))
    x_0 = PLANE.config.sigma * torch.randn(4, 2000, 2, generator=torch.Generator().manual_seed(2))
    tokens = nearest(PLANE, odeint(flow, x_0, "euler", 8,
                                   watch=lambda rows, t, x, log_p: seen.append(log_p)).x)
    evidence = [float(log_p.gather(-1, tokens[..., None]).mean()) for log_p in seen]
    assert len(evidence) == 8 and all(a < b for a, b in zip(evidence, evidence[1:])), evidence
    # at first there is the prior alone
    prior = float((PLANE.prior * PLANE.prior.log()).sum())
    assert evidence[0] == pytest.approx(prior, abs=0.03)


# --- from logits to the clean point -----------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature, t", [
    (1.0, 0.3), (0.5, 0.3), (2.0, 0.0), ("1-t", 0.75), ("1-t", torch.tensor([[[0.75]]]))])
def test_sampled_estimate_has_the_softmax_distribution(temperature, t):
    flow = VelocityField(PLANE, None, "sample", temperature, generators=generators(1))
    logits = torch.tensor([1.0, -1.0, 0.5, 0.0, -0.3])
    points = flow.clean_point(logits.expand(1, 20000, 5), 1 - t)
    assert torch.equal(points, PLANE.vectors[nearest(PLANE, points)])
    p = (logits / (0.25 if temperature == "1-t" else temperature)).softmax(-1)
    assert p_value(nearest(PLANE, points).flatten().bincount(minlength=5), p) > 1e-3


def test_draws_of_one_sequence_do_not_depend_on_the_others():
    p = torch.rand(3, 50, 9, generator=torch.Generator().manual_seed(3))
    together = draw_tokens(p, generators(3))
    assert all(torch.equal(together[i], draw_tokens(p[i:i + 1], generators(1, i))[0]) for i in range(3))


def test_unknown_estimate_is_refused():
    with pytest.raises(ValueError, match="estimate 'mode' is not supported; allowed: argmax, sample, average"):
        VelocityField(PLANE, None, "mode")
