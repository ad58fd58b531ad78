"""solvers.py: order, evaluations counted, the rule for t = 1, and one step size per sequence."""

import math

import pytest
import torch

from solvers import FIXED, dormand_prince, odeint

F64 = torch.float64


def smooth(t, x, rows):
    """dx/dt = t·x², x(t) = 1/(1/x(0) − t²/2)."""
    return torch.as_tensor(t, dtype=x.dtype).view(-1, 1) * x ** 2


def straight(target):
    """The field of the method with one guess throughout, and a record of the times it was asked about."""
    times = []

    def f(t, x, rows):
        times.append(float(torch.as_tensor(t).max()))
        return (target[rows] - x) / (1 - torch.as_tensor(t, dtype=x.dtype).view(-1, 1))
    return f, times


def slope(solver, f, x0, exact, steps=(32, 64, 128)):
    errors = [float((odeint(f, x0, solver, n).x - exact).abs().max()) for n in steps]
    return [math.log2(a / b) for a, b in zip(errors, errors[1:])]


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_error_falls_with_the_order_of_the_solver(solver, order):
    """Over [0, 1] whole, so the cheaper rule of the last interval is part of what is measured. dx/dt = (1 + t)·x."""
    f = lambda t, x, rows: (1 + t) * x
    assert all(abs(s - order) < 0.1 for s in slope(solver, f, torch.ones(1, 1, dtype=F64), math.exp(1.5))), solver


def test_dormand_prince_is_of_order_five_and_estimates_its_error():
    f = lambda t, x: (1 + t) * x
    errors, estimates = [], []
    for n in (16, 32, 64):
        x, t, h = torch.ones(1, dtype=F64), 0.0, 1 / n
        k1 = f(t, x)
        for _ in range(n):
            x, error, k1 = dormand_prince(f, t, x, h, k1)
            t += h
        errors.append(abs(float(x) - math.exp(1.5)))
        estimates.append(float(error.abs()))
    for values in (errors, estimates):      # the estimate is of the fourth-order rule in one step: h⁵
        assert all(4.7 < math.log2(a / b) < 5.3 for a, b in zip(values, values[1:]))


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7, 1e-9])
def test_adaptive_error_follows_the_tolerance(tolerance):
    solution = odeint(smooth, torch.ones(1, 1, dtype=F64), "dopri5", rtol=tolerance, atol=tolerance)
    assert float((solution.x - 2).abs()) < 20 * tolerance and bool(solution.finished)


def test_adaptive_needs_few_more_evaluations_for_a_smaller_error():
    """Order 5: a tolerance 10⁴ times smaller costs about 10^(4/5) = 6 times as many steps, far from Euler's 10⁴."""
    nfe = [int(odeint(smooth, torch.ones(1, 1, dtype=F64), "dopri5", rtol=tol, atol=tol).nfe) for tol in (1e-6, 1e-10)]
    assert nfe[0] < nfe[1] < 7 * nfe[0]


@pytest.mark.parametrize("solver, per_step, last", [("euler", 1, 1), ("midpoint", 2, 2), ("heun", 2, 2), ("rk4", 4, 3)])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_evaluations_are_counted(solver, per_step, last, steps):
    calls = []
    solution = odeint(lambda t, x, rows: calls.append(1) or -x, torch.ones(3, 2), solver, steps)
    assert len(calls) == per_step * (steps - 1) + last
    assert solution.nfe.tolist() == [len(calls)] * 3 and solution.accepted.tolist() == [steps] * 3


@pytest.mark.parametrize("solver", [*FIXED, "dopri5"])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_straight_path_is_exact_and_never_evaluated_at_one(solver, steps):
    x0, target = torch.randn(2, 5, dtype=F64) * 64, torch.randn(2, 5, dtype=F64)
    f, times = straight(target)
    solution = odeint(f, x0, solver, steps)
    assert max(times) < 1
    torch.testing.assert_close(solution.x, target, atol=1e-12, rtol=0)


def test_last_points_of_euler_and_midpoint_are_the_closed_forms():
    """Last Euler point = last estimate; last midpoint point = 2·x̂(mid) − x̂(start of the last interval)."""
    estimates = []

    def f(t, x, rows):
        estimates.append(torch.full_like(x, math.sin(5 * t)))
        return (estimates[-1] - x) / (1 - t)
    x0 = torch.randn(1, 4, dtype=F64)
    assert torch.allclose(odeint(f, x0, "euler", 6).x, estimates[-1], atol=1e-14)
    x = odeint(f, x0, "midpoint", 6).x
    assert torch.allclose(x, 2 * estimates[-1] - estimates[-2], atol=1e-14)
    x = odeint(f, x0, "heun", 6).x      # its last interval is the midpoint rule's
    assert torch.allclose(x, 2 * estimates[-1] - estimates[-2], atol=1e-14)


@pytest.mark.parametrize("solver", ["heun", "rk4"])
def test_replacing_the_last_velocity_by_zero_would_be_biased(solver):
    """What the rule for the last interval is for: with zero at t = 1 instead, one interval ends far from the target."""
    target, x0 = torch.ones(1, 1, dtype=F64), torch.full((1, 1), 9.0, dtype=F64)
    f, _ = straight(target)
    zero_at_one = lambda t, x: torch.zeros_like(x) if t >= 1 else f(t, x, [0])
    rule = FIXED[solver][0]
    assert float((rule(zero_at_one, 0.0, x0, 1.0, zero_at_one(0.0, x0)) - target).abs()) > 1
    assert float((odeint(f, x0, solver, 1).x - target).abs()) < 1e-12


def hesitant(t, x, rows):
    """A guess that jumps at a time of its own for every sequence, as an argmax does; sequence 0 never hesitates."""
    jump = torch.tensor([2.0, 0.35, 0.6, 0.8, 0.9], dtype=x.dtype)[rows].view(-1, 1)
    t = torch.as_tensor(t, dtype=x.dtype).view(-1, 1)
    return (torch.where(t < jump, 1.0, -1.0) * (1 + rows.view(-1, 1)) - x) / (1 - t)


def test_adaptive_result_is_the_same_alone_and_in_a_batch_to_the_bit():
    x0 = 8 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    batch = odeint(hesitant, x0, "dopri5", rtol=1e-2, atol=1e-2)
    for i in range(5):
        alone = odeint(lambda t, x, rows: hesitant(t, x, rows + i), x0[i:i + 1], "dopri5", rtol=1e-2, atol=1e-2)
        assert torch.equal(alone.x[0], batch.x[i])
        assert (int(alone.nfe), int(alone.accepted), int(alone.rejected)) == (int(batch.nfe[i]), int(batch.accepted[i]), int(batch.rejected[i]))


def test_hesitation_costs_evaluations_and_certainty_does_not():
    solution = odeint(hesitant, torch.ones(5, 3), "dopri5", rtol=1e-3, atol=1e-3)
    assert int(solution.nfe[0]) == 21 and int(solution.nfe[1:].min()) > 40


def test_adaptive_evaluates_only_the_sequences_still_running():
    asked = torch.zeros(5, dtype=torch.long)

    def f(t, x, rows):
        asked[rows] += 1
        assert len(x) == len(rows) == len(t)
        return hesitant(t, x, rows)
    assert torch.equal(odeint(f, torch.ones(5, 3), "dopri5").nfe, asked)


@pytest.mark.parametrize("solver", [*FIXED, "dopri5"])
@pytest.mark.parametrize("budget", [1, 2, 5, 8])
def test_a_spent_budget_returns_a_state_and_says_so(solver, budget):
    solution = odeint(hesitant, torch.ones(5, 3), solver, steps=20, max_nfe=budget)
    assert int(solution.nfe.max()) <= budget and torch.isfinite(solution.x).all()
    assert not solution.finished.any()
    # going straight on along the last velocity reaches one of the guesses
    assert float(solution.x[0].abs().max()) == pytest.approx(1, abs=1e-5)


def test_budget_that_suffices_changes_nothing():
    free, tight = odeint(hesitant, torch.ones(5, 3), "rk4", 5), odeint(hesitant, torch.ones(5, 3), "rk4", 5, max_nfe=19)
    assert torch.equal(free.x, tight.x) and tight.finished.all() and int(tight.nfe[0]) == 19


@pytest.mark.parametrize("solver", [*FIXED, "dopri5"])
def test_trajectory_starts_at_noise_and_ends_at_the_result(solver):
    x0 = torch.randn(5, 3)
    solution = odeint(hesitant, x0, solver, steps=4, trajectory=True)
    assert torch.equal(solution.trajectory[0][2], x0)
    rows, t, x = solution.trajectory[-1]
    assert torch.equal(x, solution.x[rows]) and float(torch.as_tensor(t).min()) == 1
    assert odeint(hesitant, x0, solver, steps=4).trajectory == []


def test_nan_comes_back_instead_of_hanging():
    for solver in [*FIXED, "dopri5"]:
        assert odeint(lambda t, x, rows: x * float("nan"), torch.ones(2, 2), solver).x.isnan().all()


@pytest.mark.parametrize("options, message", [
    (dict(solver="rk5"), "solver 'rk5' is unknown; allowed: euler, midpoint, heun, rk4, dopri5"),
    (dict(steps=0), "steps = 0 is out of range; allowed: 1 or more"),
    (dict(max_nfe=0), "max_nfe = 0 is out of range"),
    (dict(rtol=0.0), "rtol = 0.0 and atol = 0.001 are out of range"),
])
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        odeint(smooth, torch.ones(1, 1), **options)


def test_half_precision_state_is_refused():
    with pytest.raises(ValueError, match="allowed: float32 and float64"):
        odeint(smooth, torch.ones(1, 1, dtype=torch.bfloat16))
