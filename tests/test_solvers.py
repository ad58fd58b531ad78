"""solvers.py: order, number of evaluations, the rule for t = 1, the controller, step sizes."""

import math

import pytest
import torch

from conftest import generator
from solvers import FIXED, SOLVERS, dormand_prince, error_ratio, integrate, next_step, odeint

F64 = torch.float64


def column(t, x):
    """Times, one for all or one each, to go with states (n, ...)."""
    return torch.as_tensor(t, dtype=x.dtype).view(-1, 1)


def growth(t, x, before=None):
    """dx/dt = (1 + t)·x, x(t) = x(0)·exp(t + t²/2)."""
    return (1 + column(t, x)) * x, None


def smooth(t, x, before=None):
    """dx/dt = t·x², x(t) = 1/(1/x(0) − t²/2)."""
    return column(t, x) * x ** 2, None


def wiggle(t, x, before=None):
    """Oscillates faster and faster, so that steps must become shorter."""
    return 40 * torch.sin(30 * column(t, x) ** 2) - x, None


class Straight:
    """The velocity of the method with one prediction throughout, and the times of its calls."""

    def __init__(self, target, times=None):
        self.target = target
        self.times = [] if times is None else times

    def __call__(self, t, x, before=None):
        self.times.append(float(torch.as_tensor(t).max()))
        return (self.target - x) / (1 - column(t, x)), None

    def rows(self, index):
        return Straight(self.target[index], self.times)


JUMPS = [2.0, 0.35, 0.6, 0.8, 0.9]


class Hesitant:
    """A prediction that changes at a time of its own for every sequence; that of 0 never does."""

    def __init__(self, numbers=range(5), counts=None):
        self.numbers = torch.tensor(list(numbers))
        self.counts = counts            # evaluations of every sequence
        self.selections = []

    def __call__(self, t, x, before=None):
        assert len(x) == len(self.numbers)
        if self.counts is not None:
            self.counts[self.numbers] += 1
        jump = torch.tensor(JUMPS, dtype=x.dtype)[self.numbers].view(-1, 1)
        t = column(t, x)
        sign = torch.where(t < jump, 1.0, -1.0)
        prediction = sign * (1 + self.numbers.view(-1, 1))
        return (prediction - x) / (1 - t), prediction

    def rows(self, index):
        self.selections.append(index.tolist())
        return Hesitant(self.numbers[index].tolist(), self.counts)


# --- order and cost -------------------------------------------------------------------------------

def slopes(values):
    """log2 of each value over the next."""
    return [math.log2(a / b) for a, b in zip(values, values[1:])]


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_error_falls_with_the_order_of_the_solver(solver, order):
    """Over all of [0, 1], with the cheaper rule of the last interval."""
    x_0 = torch.ones(1, 1, dtype=F64)
    errors = []
    for steps in (32, 64, 128):
        x = odeint(growth, x_0, solver, steps).x
        errors.append(float((x - math.exp(1.5)).abs()))
    assert slopes(errors) == pytest.approx([order, order], abs=0.1)


def test_a_batch_takes_the_steps_of_the_plain_loop_integrate():
    x_0 = torch.randn(3, 2, generator=generator())
    for solver in ("euler", "midpoint"):
        rule = SOLVERS[solver][0].step
        batch = odeint(wiggle, x_0, solver, 7).x
        for i in range(3):
            alone = integrate(lambda t, x: wiggle(t, x)[0], x_0[i:i + 1], 7, rule)
            assert torch.equal(batch[i:i + 1], alone)


def test_dormand_prince_is_of_order_five_and_estimates_its_error():
    def velocity(t, x):
        return growth(t, x)[0].view(1)

    errors = []
    estimates = []
    for n in (16, 32, 64):
        x = torch.ones(1, dtype=F64)
        k1 = velocity(0.0, x)
        for i in range(n):
            x, error, k1 = dormand_prince(velocity, i / n, x, 1 / n, k1)
        errors.append(abs(float(x) - math.exp(1.5)))
        estimates.append(float(error.abs()))
    assert slopes(errors) == pytest.approx([5, 5], abs=0.3)
    # the estimate is of the fourth-order rule's step: h⁵
    assert slopes(estimates) == pytest.approx([5, 5], abs=0.3)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7, 1e-9])
def test_adaptive_error_follows_the_tolerance(tolerance):
    x_0 = torch.ones(1, 1, dtype=F64)
    solution = odeint(smooth, x_0, "dopri5", rtol=tolerance, atol=tolerance)
    assert bool(solution.finished)
    assert float((solution.x - 2).abs()) < 20 * tolerance


@pytest.mark.parametrize("solver, per_step, last", [
    ("euler", 1, 1), ("midpoint", 2, 2), ("heun", 2, 2), ("rk4", 4, 3)])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_evaluations_are_counted(solver, per_step, last, steps):
    calls = []

    def field(t, x, before=None):
        calls.append(t)
        return -x, None

    solution = odeint(field, torch.ones(3, 2), solver, steps)
    assert len(calls) == per_step * (steps - 1) + last
    assert solution.nfe.tolist() == [len(calls)] * 3
    assert solution.accepted.tolist() == [steps] * 3
    assert solution.rejected.tolist() == [0] * 3


# --- the last interval ----------------------------------------------------------------------------

@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_straight_path_is_exact_and_never_evaluated_at_one(solver, steps):
    x_0 = torch.randn(2, 5, dtype=F64) * 64
    field = Straight(torch.randn(2, 5, dtype=F64))
    solution = odeint(field, x_0, solver, steps)
    assert max(field.times) < 1
    torch.testing.assert_close(solution.x, field.target, atol=1e-12, rtol=0)


def test_last_points_of_euler_and_midpoint_are_the_closed_forms():
    """Last Euler point = last estimate; last midpoint point = 2·x̂(mid) − x̂(start of interval)."""
    estimates = []

    def field(t, x, before=None):
        estimate = torch.full_like(x, math.sin(5 * t))
        estimates.append(estimate)
        return (estimate - x) / (1 - t), None

    x_0 = torch.randn(1, 4, dtype=F64)
    x = odeint(field, x_0, "euler", 6).x
    assert torch.allclose(x, estimates[-1], atol=1e-14)
    for solver in ("midpoint", "heun"):      # Heun's last interval is the midpoint rule's
        x = odeint(field, x_0, solver, 6).x
        assert torch.allclose(x, 2 * estimates[-1] - estimates[-2], atol=1e-14)


# --- the controller -------------------------------------------------------------------------------

def costs(solution):
    """(evaluations, accepted, rejected) of every sequence."""
    return list(zip(
        solution.nfe.tolist(),
        solution.accepted.tolist(),
        solution.rejected.tolist(),
    ))


def states(*rows):
    return torch.tensor(rows, dtype=F64)


# field, initial states, (rtol, atol), and the costs of every sequence, found by running. The states
# are chosen so: changing any number of the controller by a tenth, or the factor 1.01 of the last
# step to 1 or 1.02, changes some entry; changing the states by a millionth changes none.
GOLDEN = {
    "smooth": (
        smooth, states([1.65], [0.48], [0.7]), (1e-7, 1e-8),
        [(275, 28, 21), (89, 13, 5), (129, 17, 9)],
    ),
    # two coordinates of different size: another norm gives other costs
    "wiggle": (
        wiggle, states([-7, 0], [-10, 5], [-8, 20]), (1e-4, 1e-3),
        [(161, 20, 10), (141, 18, 8), (105, 12, 6)],
    ),
    "hesitant": (
        Hesitant(), torch.ones(5, 3, dtype=F64), (1e-3, 1e-3),
        [(21, 4, 0), (45, 5, 3), (63, 7, 4), (47, 7, 2), (61, 9, 3)],
    ),
    # no step is accepted where the field jumps: it shrinks to the shortest, then grows by the limit
    "strict": (
        Hesitant(), torch.ones(5, 3, dtype=F64), (1e-9, 1e-9),
        [(21, 4, 0), (129, 15, 7), (129, 15, 7), (119, 14, 7), (169, 19, 11)],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_controller_takes_these_steps(name):
    field, x_0, (rtol, atol), expected = GOLDEN[name]
    assert costs(odeint(field, x_0, "dopri5", rtol=rtol, atol=atol)) == expected


def test_a_step_grows_and_shrinks_within_its_limits():
    def step(h, ratio, order=5, after_rejection=False):
        h = torch.tensor([h], dtype=F64)
        ratio = torch.tensor([ratio], dtype=F64)
        return float(next_step(h, ratio, order, torch.tensor([after_rejection])))

    assert step(0.01, 1.0) == pytest.approx(0.009)
    assert step(0.01, 32.0) == pytest.approx(0.0045)          # 32^(1/5) = 2
    assert step(0.01, 8.0, order=3) == pytest.approx(0.0045)  # 8^(1/3) = 2
    assert step(0.01, 1 / 32) == pytest.approx(0.018)
    # never below a fifth, nor above ten times, nor above the longest
    assert step(0.01, 1e9) == pytest.approx(0.002)
    assert step(0.01, float("inf")) == pytest.approx(0.002)
    assert step(0.01, 0.0) == pytest.approx(0.1)
    assert step(0.2, 0.0) == pytest.approx(0.25)
    # right after a rejection it may shrink, not grow
    assert step(0.01, 0.0, after_rejection=True) == pytest.approx(0.01)
    assert step(0.01, 32.0, after_rejection=True) == pytest.approx(0.0045)
    # an error that is not a number changes nothing
    for order in (3, 5):
        for after_rejection in (False, True):
            assert step(0.01, float("nan"), order, after_rejection) == pytest.approx(0.01)


def test_error_ratio_is_a_root_mean_square_over_the_tolerance():
    error = states([3e-3, 0, 0, 0], [1e-3, 1e-3, 1e-3, 1e-3])
    x = states([1, 0, 0, 0], [1, -1, 2, 0])
    x_new = states([-2, 0, 0, 0], [0, 0, 0, 0])
    found = error_ratio(error, x, x_new, 1e-3, 1e-3)
    # 3e-3 is allowed where |x| = 2, and 1e-3 where it is zero
    first = math.sqrt(1 / 4)
    second = math.sqrt((1/4 + 1/4 + 1/9 + 1) / 4)
    assert found.tolist() == pytest.approx([first, second])
    # ten times the relative tolerance: 21e-3 where |x| = 2
    loose = error_ratio(error, x, x_new, 1e-2, 1e-3)
    assert float(loose[0]) == pytest.approx(3 / 21 / 2)


@pytest.mark.parametrize("longest, steps", [(0.25, 4), (0.2495, 4), (0.249, 5)])
def test_a_step_that_would_leave_almost_nothing_takes_the_rest_too(longest, steps, monkeypatch):
    monkeypatch.setattr("solvers.LONGEST_STEP", longest)
    solution = odeint(Straight(torch.ones(1, 2)), torch.zeros(1, 2), "dopri5")
    assert int(solution.accepted) == steps


def test_sequences_at_the_end_wait_for_the_others():
    """So that all take the last step in one call."""
    shown = []
    odeint(Hesitant(range(3)), torch.ones(3, 3), "dopri5",
           watch=lambda rows, t, x, prediction: shown.append(rows.tolist()))
    assert shown[-2:] == [[0, 1, 2]] * 2
    assert shown[-3] != [0, 1, 2]


# --- a step size for every sequence ---------------------------------------------------------------

def test_adaptive_result_is_the_same_alone_and_in_a_batch_to_the_bit():
    x_0 = 8 * torch.randn(5, 3, generator=generator())
    batch = odeint(Hesitant(), x_0, "dopri5", rtol=1e-2, atol=1e-2)
    for i in range(5):
        alone = odeint(Hesitant([i]), x_0[i:i + 1], "dopri5", rtol=1e-2, atol=1e-2)
        assert torch.equal(alone.x[0], batch.x[i])
        assert costs(alone)[0] == costs(batch)[i]


def test_a_changing_prediction_costs_evaluations_and_a_constant_one_does_not():
    nfe = odeint(Hesitant(), torch.ones(5, 3), "dopri5").nfe
    assert int(nfe[0]) == 21
    assert int(nfe[1:].min()) > 40


def test_adaptive_evaluates_only_the_sequences_still_running():
    counts = torch.zeros(5, dtype=torch.long)
    solution = odeint(Hesitant(counts=counts), torch.ones(5, 3), "dopri5")
    assert torch.equal(solution.nfe, counts)


def test_rows_are_selected_only_when_the_running_set_changes():
    field = Hesitant()
    shown = []
    odeint(field, torch.ones(5, 3), "dopri5",
           watch=lambda rows, t, x, prediction: shown.append(rows.tolist()))
    changes = [rows for before, rows in zip(shown, shown[1:]) if rows != before]
    # the whole batch needs no copy
    assert field.selections == [rows for rows in changes if rows != [0, 1, 2, 3, 4]]
    assert len(field.selections) > 3


def test_rows_are_not_selected_where_all_take_the_same_steps(monkeypatch):
    monkeypatch.setattr(Straight, "rows", lambda *_: pytest.fail("the running set is the same"))
    odeint(Straight(torch.ones(3, 2)), torch.zeros(3, 2), "dopri5")


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_every_evaluation_is_shown_once_to_the_watcher(solver):
    made = []
    shown = []

    class Recorded(Hesitant):
        def __call__(self, t, x, before=None):
            velocity, prediction = super().__call__(t, x)
            made.append((self.numbers, t, x, prediction))
            return velocity, prediction

        def rows(self, index):
            return Recorded(self.numbers[index].tolist())

    solution = odeint(Recorded(), torch.ones(5, 3), solver, steps=4,
                      watch=lambda *values: shown.append(values))
    assert len(shown) == len(made)
    counts = torch.zeros(5, dtype=torch.long)
    for (rows, *seen), (numbers, *true) in zip(shown, made):
        assert torch.equal(rows, numbers)
        assert all(a is b for a, b in zip(seen, true))
        counts[rows] += 1
    assert torch.equal(counts, solution.nfe)
    # the first is at the noise
    rows, t, x, prediction = shown[0]
    assert float(torch.as_tensor(t).max()) == 0
    assert torch.equal(x, torch.ones(5, 3))


# --- budgets --------------------------------------------------------------------------------------

@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("budget", [1, 2, 5, 8])
def test_a_spent_budget_extends_the_last_velocity_to_the_end(solver, budget):
    """Also where the budget suffices for whole intervals and for nothing after them."""
    x_0 = torch.full((5, 3), 7.0)
    solution = odeint(Hesitant(), x_0, solver, steps=20, max_nfe=budget)
    assert int(solution.nfe.max()) <= budget
    assert torch.isfinite(solution.x).all()
    assert not solution.finished.any()
    assert float(solution.t.max()) < 1
    if solver in FIXED:
        assert solution.t.tolist() == pytest.approx((solution.accepted / 20).tolist())
    # the prediction of sequence 0 is always 1
    assert solution.x[0].tolist() == pytest.approx([1, 1, 1], abs=1e-5)


def test_a_budget_that_suffices_changes_nothing():
    free = odeint(Hesitant(), torch.ones(5, 3), "rk4", 5)
    tight = odeint(Hesitant(), torch.ones(5, 3), "rk4", 5, max_nfe=19)
    assert torch.equal(free.x, tight.x)
    assert tight.finished.all()
    assert tight.t.tolist() == [1.0] * 5
    assert int(tight.nfe[0]) == 19


def test_a_budget_that_just_suffices_is_enough_for_the_adaptive_solver():
    """A straight path takes 1 + 6 + 6 + 6 + 2 evaluations."""
    for budget, enough in ((21, True), (20, False)):
        solution = odeint(Straight(torch.ones(2, 3)), torch.zeros(2, 3), "dopri5", max_nfe=budget)
        assert bool(solution.finished.all()) == enough


def test_a_sequence_over_budget_does_not_change_the_others():
    x_0 = torch.ones(5, 3)
    free = odeint(Hesitant(), x_0, "dopri5")
    limited = odeint(Hesitant(), x_0, "dopri5", max_nfe=50)
    done = limited.finished
    assert done.tolist() == [True, True, False, True, False]
    assert torch.equal(done, free.nfe <= 50)
    assert torch.equal(limited.x[done], free.x[done])
    assert bool((limited.t[~done] < 1).all())


# --- states that are not numbers ------------------------------------------------------------------

@pytest.mark.parametrize("solver", list(SOLVERS))
def test_nan_comes_back_instead_of_hanging(solver):
    solution = odeint(lambda t, x, before: (x * float("nan"), None), torch.ones(2, 2), solver)
    assert solution.x.isnan().all()


def test_nan_that_comes_later_never_makes_a_step_longer():
    """Steps are short because the field oscillates fast; when it becomes NaN they stay short."""
    times = []

    def field(t, x, before=None):
        t = column(t, x)
        times.append(float(t.max()))
        velocity = 100 * torch.sin(40 * t) - x
        return torch.where(t > 0.5, float("nan"), velocity), None

    odeint(field, torch.ones(1, 2), "dopri5", rtol=1e-6, atol=1e-6)
    gaps = [b - a for a, b in zip(times, times[1:])]
    before = max(gap for gap, t in zip(gaps, times) if t < 0.4)
    after = max(gap for gap, t in zip(gaps, times) if 0.55 < t < 0.9)
    assert after < 1.5 * before


def test_a_velocity_that_jumps_at_every_evaluation_ends():
    """No step is ever within the tolerance."""
    def field(t, x, prediction):
        new = torch.ones(1, 1, 1) if prediction is None else -prediction
        return 100 * new[0] * torch.ones_like(x), new

    solution = odeint(field, torch.zeros(1, 2), "dopri5")
    assert bool(solution.finished)
    assert float(solution.t) == 1
    # 128 steps of the shortest length, six evaluations each
    assert 128 <= int(solution.accepted) <= 140
    assert int(solution.nfe) < 6 * 160


# --- predictions ----------------------------------------------------------------------------------

def test_a_rejected_step_leaves_no_prediction():
    """The prediction is the number of its evaluation, so each call shows the one before."""
    seen = []

    def field(t, x, prediction):
        seen.append((float(t) if torch.is_tensor(t) else t, prediction))
        number = torch.full((1, 1, 1), float(len(seen) - 1))
        # a jump, at which steps are rejected
        return torch.where(torch.as_tensor(t) > 0.4, -30.0, 1.0) * torch.ones_like(x), number

    solution = odeint(field, torch.zeros(1, 2), "dopri5")
    assert int(solution.rejected) > 0
    # evaluation 0 begins the first step; a step has six more, the last one two
    received = [int(prediction) for _, prediction in seen[1::6]]
    accepted = 1
    for step, (before, number) in enumerate(zip(received, received[1:]), start=1):
        assert number in (before, 6 * step)
        accepted += number != before
    assert accepted == int(solution.accepted)
    assert len(received) == accepted + int(solution.rejected)


def test_evaluations_of_a_rejected_step_count_neither_as_changed_nor_as_unchanged():
    def jump(t, x, before):
        late = (torch.as_tensor(t) > 0.4).float().view(1, 1, 1)
        return (1 - 31 * late[..., 0]) * torch.ones_like(x), torch.cat((1 - late, late), -1)

    solution = odeint(jump, torch.zeros(1, 2), "dopri5", stop_unchanged=10)
    # six of the step before them and six of the one behind them
    assert int(solution.rejected) == 2 and int(solution.unchanged) == 12


class Walker:
    """Predicts token 0, 1, 2, ... at every evaluation, up to a last token for each sequence."""

    def __init__(self, last):
        self.last = torch.tensor(last)

    def __call__(self, t, x, prediction):
        token = torch.full_like(self.last, -1)
        if prediction is not None:
            token = prediction.argmax(-1)[:, 0]
        new = torch.minimum(token + 1, self.last)
        return torch.ones_like(x), torch.nn.functional.one_hot(new, 9)[:, None].float()

    def rows(self, index):
        return Walker(self.last[index].tolist())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_sequence_with_an_unchanged_prediction_stops(count):
    walker = Walker([0, 3, 1])
    solution = odeint(walker, torch.zeros(3, 1), "euler", 8, stop_unchanged=count)
    # token `last` is first predicted at evaluation last + 1
    assert solution.nfe.tolist() == [1 + count, 4 + count, 2 + count]
    assert solution.finished.all()
    assert torch.allclose(solution.t, solution.nfe / 8)
    # extended to t = 1
    assert torch.allclose(solution.x, torch.ones(3, 1))
    assert solution.prediction.argmax(-1)[:, 0].tolist() == [0, 3, 1]


def test_without_the_rule_no_sequence_stops():
    solution = odeint(Walker([0, 3, 1]), torch.zeros(3, 1), "euler", 8)
    assert solution.nfe.tolist() == [8, 8, 8]


@pytest.mark.parametrize("solver", ["euler", "midpoint", "dopri5"])
def test_a_sequence_alone_stops_as_in_a_batch(solver):
    last = [0, 5, 2]
    batch = odeint(Walker(last), torch.zeros(3, 1), solver, 8, stop_unchanged=2)
    for i in range(3):
        alone = odeint(Walker(last[i:i + 1]), torch.zeros(1, 1), solver, 8, stop_unchanged=2)
        assert costs(alone)[0] == costs(batch)[i]
        assert torch.equal(alone.x[0], batch.x[i])


# --- bad input ------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    (dict(solver="rk5"), "'rk5' is unknown; allowed: euler, midpoint, heun, rk4, dopri5"),
    (dict(steps=0), "steps = 0 is out of range; allowed: 1 or more"),
    (dict(max_nfe=0), "max_nfe = 0 is out of range; allowed: 1 or more"),
    (dict(stop_unchanged=0), "stop_unchanged = 0 is out of range; allowed: 1 or more"),
    (dict(rtol=0.0), "rtol = 0.0 and atol = 0.001 are out of range"),
    (dict(atol=0.0), "rtol = 0.001 and atol = 0.0 are out of range"),
    (dict(atol=float("nan")), "out of range"),
])
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        odeint(smooth, torch.ones(1, 1), **options)


def test_half_precision_state_is_refused():
    with pytest.raises(ValueError, match="allowed: float32 and float64"):
        odeint(smooth, torch.ones(1, 1, dtype=torch.bfloat16))
