"""diffusion.VelocityField and solvers.odeint against an exact oracle, and the random draws.

Over a finite vocabulary with prior p(y), p(y|x_t) ∝ p(y)·N(x_t; t·V_y, (1−t)²σ²I) is known without
any training. A denoiser that returns it takes the place of the network: solvers must converge with
their order, sampled tokens must follow the prior.
"""

import math

import pytest
import torch

from conftest import generator, generators, p_value
from data.parts.draws import RowDraws, draw_times, draw_tokens
from data.tiny.oracle import LINE as FOUR_TOKENS, Oracle
from diffusion import VelocityField
from solvers import odeint

F64 = torch.float64


LINE = Oracle(*FOUR_TOKENS, sigma=2.0)
PLANE = Oracle(
    [[2.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [1.5, -2.0], [-2.0, 2.0]],
    [0.35, 0.05, 0.25, 0.2, 0.15],
    sigma=4.0,
)


def nearest(oracle, x):
    """(...,) token with the closest vector."""
    distance = (x[..., None, :] - oracle.vectors).square().sum(-1)
    return distance.argmin(-1)


def counted(oracle, x):
    """Of every token: the number of points to which it is the nearest."""
    return nearest(oracle, x).flatten().bincount(minlength=len(oracle.prior))


# --- the oracle itself ----------------------------------------------------------------------------

@pytest.mark.parametrize("t", [0.3, torch.tensor([0.3, 0.7])])
def test_the_oracle_follows_bayes_rule(t):
    """By torch's own normal distribution, one token at a time."""
    x = torch.randn(2, 3, 2, generator=generator())
    found = PLANE.predict(x, t, None, None)
    times = torch.as_tensor(t, dtype=F64).expand(2)
    for row, time in enumerate(times.tolist()):
        joint = []
        for vector, prior in zip(PLANE.vectors, PLANE.prior):
            normal = torch.distributions.Normal(time * vector.double(), (1 - time) * 4.0)
            joint.append(normal.log_prob(x[row].double()).sum(-1) + prior.log())
        expected = torch.stack(joint, dim=-1).log_softmax(-1)
        torch.testing.assert_close(found[row], expected.float(), atol=1e-5, rtol=1e-5)


# --- solvers on a field whose solution is known ---------------------------------------------------

def exact_state(oracle, x_0, t):
    """On a line trajectories cannot cross, so each keeps its quantile of the marginal of x_t.

    Found by bisection, without any solver.
    """
    def quantile(x, t):
        z = (x - t * oracle.vectors[:, 0]) / ((1 - t) * oracle.config.sigma)
        return (oracle.prior * torch.special.ndtr(z)).sum(-1, keepdim=True)

    low = torch.full_like(x_0, -50)
    high = torch.full_like(x_0, 50)
    for _ in range(60):
        middle = (low + high) / 2
        below = quantile(middle, t) < quantile(x_0, 0.0)
        low = torch.where(below, middle, low)
        high = torch.where(below, high, middle)
    return low


def even_noise(batch=4, tokens=16):
    """Noise (batch, tokens, 1) whose quantiles are spread evenly."""
    quantiles = (torch.arange(batch * tokens, dtype=F64) + 0.5) / (batch * tokens)
    z = torch.special.ndtri(quantiles).view(tokens, batch, 1).transpose(0, 1)
    return LINE.config.sigma * z


def line_problem(end=0.6):
    """The oracle's field on a line up to t = `end`: field, start, exact end.

    At t = 1 every trajectory ends at a token, so there would be no error.
    """
    field = VelocityField(LINE, None, "average")

    def scaled(s, x, prediction=None):
        velocity, prediction = field(end * s, x)
        return end * velocity, prediction

    x_0 = even_noise()
    return scaled, x_0, exact_state(LINE, x_0, end)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_solvers_converge_with_their_order_to_the_exact_trajectory(solver, order):
    f, x_0, exact = line_problem()
    errors = []
    for steps in (8, 16, 32):
        x = odeint(f, x_0, solver, steps).x
        errors.append(float((x - exact).abs().mean()))
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert slopes == pytest.approx([order, order], abs=0.2)


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
    x_0 = even_noise(tokens=50)
    x_1 = odeint(VelocityField(LINE, None, "average"), x_0, solver, steps).x
    edges = LINE.prior.cumsum(0)[:-1]
    quantiles = torch.special.ndtr(x_0 / LINE.config.sigma)[..., 0].contiguous()
    expected = torch.bucketize(quantiles, edges)
    assert (nearest(LINE, x_1) == expected).float().mean() >= 0.98


# --- sampled tokens -------------------------------------------------------------------------------

def sampled(estimate, solver="euler", steps=4, temperature=1.0, batch=4, tokens=5000):
    """Counts of the final tokens of 20,000 draws of noise."""
    field = VelocityField(PLANE, None, estimate, temperature, generators=generators(batch, 10))
    noise = torch.randn(batch, tokens, 2, generator=generator(1))
    x_1 = odeint(field, PLANE.config.sigma * noise, solver, steps).x
    return counted(PLANE, x_1)


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_sampled_estimate_draws_tokens_from_the_prior(steps):
    """With Euler's rule exactly, for any number of steps.

    A step towards a sample of p(y|x_t) stays on the straight line from some noise to that token.
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
def test_the_distribution_test_rejects_a_wrong_sampler(options):
    assert p_value(sampled(**options), PLANE.prior) < 1e-6


def test_log_p_of_the_final_token_grows_with_t():
    seen = []
    field = VelocityField(PLANE, None, "sample", generators=generators(4))
    noise = torch.randn(4, 2000, 2, generator=generator(2))
    x_1 = odeint(field, PLANE.config.sigma * noise, "euler", 8,
                 watch=lambda rows, t, x, log_p: seen.append(log_p)).x
    tokens = nearest(PLANE, x_1)[..., None]
    means = [float(log_p.gather(-1, tokens).mean()) for log_p in seen]
    assert len(means) == 8
    assert means == sorted(means)
    # at first only the prior is known
    prior = float((PLANE.prior * PLANE.prior.log()).sum())
    assert means[0] == pytest.approx(prior, abs=0.03)


# --- from logits to the clean point ---------------------------------------------------------------

@pytest.mark.parametrize("temperature, t", [
    (1.0, 0.3),
    (0.5, 0.3),
    (2.0, 0.0),
    ("1-t", 0.75),
    ("1-t", torch.tensor([[[0.75]]])),
])
def test_sampled_estimate_has_the_softmax_distribution(temperature, t):
    field = VelocityField(PLANE, None, "sample", temperature, generators=generators(1))
    logits = torch.tensor([1.0, -1.0, 0.5, 0.0, -0.3])
    points = field.clean_point(logits.expand(1, 20000, 5), 1 - t)
    assert torch.equal(points, PLANE.vectors[nearest(PLANE, points)])
    p = (logits / (0.25 if temperature == "1-t" else temperature)).softmax(-1)
    assert p_value(counted(PLANE, points), p) > 1e-3


def test_unknown_estimate_is_refused():
    message = "estimate 'mode' is unknown; allowed: argmax, sample, average"
    with pytest.raises(ValueError, match=message):
        VelocityField(PLANE, None, "mode")(0.5, torch.zeros(1, 1, 2))


# --- draws ----------------------------------------------------------------------------------------

def test_draws_of_one_sequence_do_not_depend_on_the_others():
    p = torch.rand(3, 50, 9, generator=generator(3))
    together = draw_tokens(p, generators(3))
    for i in range(3):
        alone = draw_tokens(p[i:i + 1], generators(1, seed=i))
        assert torch.equal(together[i], alone[0])


def test_the_largest_number_still_draws_a_token(monkeypatch):
    """The cumulative sums end near 1, not at 1; weights need not be normalised."""
    monkeypatch.setattr(torch, "rand", lambda size, **options: torch.full(size, 1.0))
    p = torch.full((1, 1, 7), 1 / 7)
    assert draw_tokens(p, generators(1)).tolist() == [[6]]
    assert draw_tokens(3 * p, generators(1)).tolist() == [[6]]


def test_the_smallest_number_draws_a_token_that_has_a_probability(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size, **options: torch.zeros(size))
    p = torch.tensor([[[0.0, 0.5, 0.5]]])
    assert draw_tokens(p, generators(1)).tolist() == [[1]]


def test_a_token_without_probability_is_never_drawn():
    p = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25]).expand(1, 4000, 5)
    counts = draw_tokens(p, generators(1))[0].bincount(minlength=5)
    assert counts[0] == counts[2] == 0
    assert p_value(counts[[1, 3, 4]], torch.tensor([0.5, 0.25, 0.25])) > 1e-3


def test_uniform_times():
    t = draw_times(RowDraws([20000], generators(1)), "uniform")
    assert 0 <= t.min() and t.max() < 1
    counts = (t * 20).long().bincount(minlength=20)
    assert p_value(counts, torch.full((20,), 1 / 20)) > 1e-3


def test_cosmap_times_follow_their_formula():
    """t = 1 − 1/(tan(πu/2) + 1) means P(t ≤ s) = 2/π·atan(s/(1 − s)).

    Kolmogorov's test at 0.1 %.
    """
    t = draw_times(RowDraws([20000], generators(1)), "cosmap")
    t = t.double().sort().values
    assert 0 <= t.min() and t.max() < 1
    cdf = 2 / math.pi * torch.atan(t / (1 - t))
    uniform = (torch.arange(20000) + 0.5) / 20000
    assert float((cdf - uniform).abs().max()) < 1.95 / math.sqrt(20000)


def test_largest_uniform_number_still_gives_a_time_below_one(monkeypatch):
    """torch.rand can return 1 − 2⁻²⁴, where tan(πu/2) is 10⁷ and rounding could reach 1."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, 1 - 2 ** -24))
    assert 0.9999 < float(draw_times(RowDraws([1], generators(1)), "cosmap")) < 1
