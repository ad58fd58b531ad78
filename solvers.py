"""Integrate dx/dt = f(t, x) from t = 0 (noise) to t = 1 (data).

Euler, midpoint, Heun, RK4 and adaptive Dormand-Prince, by hand. No network in sight: f is any
function that returns (dx/dt, guess). The guess is what f takes the end point for: scores of
candidates, handed on to the next evaluation. Read this file first, then diffusion.py, which
supplies the f of the method (L2D paper, Algorithm 1). Run alone it measures the order of every
solver, the times that its error halves when its steps do:

    python solvers.py
    midpoint     64  128   1.1e-03   1.97
    rk4          64  255   2.4e-07   3.94

First the rules, each one step long, then the table of solvers, then the two drivers.
"""

from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch

# --- one step of each rule ------------------------------------------------------------------------
#
# From (t, x), where k1 = f(t, x) is known, over an interval h. f gives the velocity alone.


class Step(NamedTuple):
    """What a rule returns: the new state, and from the adaptive rules two things more."""
    x: torch.Tensor
    error: torch.Tensor | None = None     # estimate of the local error, of the shape of x
    k_end: torch.Tensor | None = None     # f(t + h, x'), where the rule has computed it anyway


def euler(f, t, x, h, k1) -> Step:
    # x' = x + h·k1
    return Step(x + h * k1)


def midpoint(f, t, x, h, k1) -> Step:
    k2 = f(t + h / 2, x + h / 2 * k1)
    # x' = x + h·k2
    return Step(x + h * k2)


def heun(f, t, x, h, k1) -> Step:
    k2 = f(t + h, x + h * k1)
    total = k1 + k2
    # x' = x + h·(k1 + k2)/2
    return Step(x + h * total / 2)


def rk4(f, t, x, h, k1) -> Step:
    k2 = f(t + h / 2, x + h / 2 * k1)
    k3 = f(t + h / 2, x + h / 2 * k2)
    k4 = f(t + h, x + h * k3)
    total = k1 + 2 * k2 + 2 * k3 + k4
    # x' = x + h·(k1 + 2k2 + 2k3 + k4)/6
    return Step(x + h * total / 6)


def ralston3(f, t, x, h, k1) -> Step:
    """Ralston (1962): order 3 with nodes 0, ½, ¾. The midpoint rule stands inside it."""
    k2 = f(t + h / 2, x + h / 2 * k1)
    k3 = f(t + 3 * h / 4, x + 3 * h / 4 * k2)
    total = 2 * k1 + 3 * k2 + 4 * k3
    # x' = x + h·(2k1 + 3k2 + 4k3)/9
    new = x + h * total / 9
    # error = x' − midpoint
    difference = 2 * k1 - 6 * k2 + 4 * k3
    return Step(new, h * difference / 9)


# Dormand and Prince (1980), table 2: the nodes c, the stages a, and b − b̂ for the error estimate.
DP_C = (1/5, 3/10, 4/5, 8/9, 1, 1)
DP_A = (
    (1/5,),
    (3/40, 9/40),
    (44/45, -56/15, 32/9),
    (19372/6561, -25360/2187, 64448/6561, -212/729),
    (9017/3168, -355/33, 46732/5247, 49/176, -5103/18656),
    (35/384, 0, 500/1113, 125/192, -2187/6784, 11/84),
)
DP_E = (71/57600, 0, -71/16695, 71/1920, -17253/339200, 22/525, -1/40)


def dormand_prince(f, t, x, h, k1) -> Step:
    k = [k1]
    for c, row in zip(DP_C, DP_A):
        total = sum(a * k_j for a, k_j in zip(row, k))
        y = x + h * total
        # k_i = f(t + c_i·h, x + h·Σ a_ij·k_j)
        k_i = f(t + c * h, y)
        k.append(k_i)
    total = sum(e * k_i for e, k_i in zip(DP_E, k))
    # error = h·Σ (b_i − b̂_i)·k_i
    error = h * total
    # the last row of a equals b, so x' is the last y and its velocity begins the next step
    return Step(y, error, k[-1])


# --- the solvers ----------------------------------------------------------------------------------

class Rule(NamedTuple):
    step: Callable
    order: int       # the error of a whole solution is O(h^order), of one step O(h^(order + 1))
    more: int        # evaluations beyond k1


EULER = Rule(euler, order=1, more=0)
MIDPOINT = Rule(midpoint, order=2, more=1)
HEUN = Rule(heun, order=2, more=1)
RK4 = Rule(rk4, order=4, more=3)
RALSTON = Rule(ralston3, order=3, more=2)
DORMAND_PRINCE = Rule(dormand_prince, order=5, more=6)

# The rule for all intervals but the last, and the rule for the last one, which may not evaluate at
# t = 1: the field of the method, (x̂ − x)/(1 − t), is 0/0 there, and any number put in its place
# would bias the end point. All of them end a straight path exactly.
SOLVERS = {
    # never ask for t = 1
    "euler": (EULER, EULER),
    "midpoint": (MIDPOINT, MIDPOINT),
    # midpoint has the same order, so nothing is lost
    "heun": (HEUN, MIDPOINT),
    # order 3 for order 4: its error in one interval, h⁴, is what all the others add up to anyway
    "rk4": (RK4, RALSTON),
    # order 3 for order 5: the tolerance is in charge, and shortens the interval where that matters
    "dopri5": (DORMAND_PRINCE, RALSTON),
}
ADAPTIVE = ("dopri5",)
FIXED = tuple(name for name in SOLVERS if name not in ADAPTIVE)


@dataclass
class Solution:
    """Where every sequence arrived, and what it cost.

    x                        (B, ...) the end point
    guess                    (B, ..., V) what the last evaluation took it for, or None
    t                        (B,) how far it got: 1, unless it was settled or its budget ran out
    nfe, accepted, rejected  (B,) evaluations of f, and steps
    finished                 (B,) False where `max_nfe` ran out; x is then, as where a sequence was
                             settled, the straight line from the state reached
    """
    x: torch.Tensor
    prediction: torch.Tensor | None
    t: torch.Tensor
    nfe: torch.Tensor
    accepted: torch.Tensor
    rejected: torch.Tensor
    finished: torch.Tensor


def odeint(f, x_0, solver: str = "midpoint", steps: int = 8, rtol: float = 1e-3,
           atol: float = 1e-3, max_nfe: int | None = None, stop_unchanged: int | None = None,
           watch=None) -> Solution:
    """Integrate every sequence of a batch over t in [0, 1].

    f(t, x, guess)  (dx/dt, new guess) at states x (B, ...). t is one float for all, below 1, or
                    (B,) where every sequence has its own time; guess (B, ..., V) is that of the
                    evaluation before, None at the first. If f is not the same for all sequences
                    it has f.rows(index), the f of the sequences `index` (n,).
    x_0             (B, ...) float32 or float64; the state keeps this type.
    solver, steps   one of SOLVERS; `steps` equal intervals (1 or more) for all but dopri5, which
    rtol, atol      chooses its own, so that the error of a step stays below atol + rtol·|x| (both
                    > 0), separately for every sequence.
    max_nfe         most evaluations of f for one sequence (1 or more), or None.
    stop_unchanged  a sequence whose best candidate has stood for so many evaluations after the
                    one that brought it is settled (1 or more), or None.
    watch           called as watch(rows, t, x, guess) after every evaluation, or None.

    Raises ValueError for an unknown solver, a number out of range, or a state of another type.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; allowed: {', '.join(SOLVERS)}")
    if x_0.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x_0 has type {x_0.dtype}; allowed: float32 and float64, "
                         "or small steps are lost")
    if steps < 1:
        raise ValueError(f"steps = {steps} is out of range; allowed: 1 or more")
    if max_nfe is not None and max_nfe < 1:
        raise ValueError(f"max_nfe = {max_nfe} is out of range; allowed: 1 or more")
    if stop_unchanged is not None and stop_unchanged < 1:
        raise ValueError(f"stop_unchanged = {stop_unchanged} is out of range; "
                         "allowed: 1 or more")
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"rtol = {rtol} and atol = {atol} are out of range; "
                         "allowed: greater than 0")
    limits = Limits(max_nfe or NEVER, stop_unchanged or NEVER)
    field = Field(f, torch.arange(len(x_0), device=x_0.device), watch)
    if solver in ADAPTIVE:
        return integrate_adaptive(field, x_0, SOLVERS[solver], (rtol, atol), limits)
    return integrate_fixed(field, x_0, SOLVERS[solver], steps, limits)


NEVER = 1 << 62      # evaluations


class Limits(NamedTuple):
    """When a sequence is done before t = 1, in evaluations."""
    nfe: int
    unchanged: int


class Field:
    """What the rules call: the velocity of some rows of the batch, shown to whoever watches.

    It remembers the guess (n, ..., V) of the last evaluation and for how many it has `stood` (n,).
    """

    def __init__(self, f, rows, watch):
        self.f = f
        self.rows = rows
        self.watch = watch
        self.prediction = None
        self.stood = torch.zeros_like(rows)

    def __call__(self, t, x):
        if torch.is_tensor(t):
            t = t.flatten()     # the rules hold times as columns, to go with x
        velocity, prediction = self.f(t, x, self.prediction)
        self.count(prediction)
        if self.watch:
            self.watch(self.rows, t, x, prediction)
        return velocity

    def count(self, prediction):
        """Take note of a new guess: has the best candidate of each sequence stood?"""
        if prediction is not None and self.prediction is not None:
            same = prediction.argmax(-1) == self.prediction.argmax(-1)
            same = same.view(len(same), -1).all(1)
            self.stood = torch.where(same, self.stood + 1, 0)
        self.prediction = prediction

    def of(self, index) -> "Field":
        """The same for some of its rows, index (n,)."""
        f = self.f
        if hasattr(f, "rows") and len(index) < len(self.rows):
            f = f.rows(index)
        part = Field(f, self.rows[index], self.watch)
        part.recall(self, index)
        return part

    def recall(self, whole: "Field", index):
        """Go on from what the whole batch remembers of these rows."""
        self.stood = whole.stood[index]
        self.prediction = None if whole.prediction is None else whole.prediction[index]

    def tell(self, whole: "Field", index, chosen):
        """Let the whole batch remember this of the `chosen` among these rows."""
        whole.stood[index[chosen]] = self.stood[chosen]
        if whole.prediction is not None:
            whole.prediction[index[chosen]] = self.prediction[chosen]


# --- the two drivers ------------------------------------------------------------------------------

class Run:
    """Where every sequence of a batch stands: one row each, written back after every step."""

    def __init__(self, field: Field, x_0):
        n = len(x_0)
        self.x = x_0.clone()
        self.t = x_0.new_zeros(n)
        self.nfe = torch.zeros_like(field.rows)
        self.accepted = torch.zeros_like(field.rows)
        self.rejected = torch.zeros_like(field.rows)
        self.running = torch.ones_like(field.rows, dtype=torch.bool)
        self.finished = torch.ones_like(self.running)

    def leave(self, rows, velocity, finished: bool):
        """These rows go straight on to t = 1 and stop."""
        remaining = column(1 - self.t[rows], self.x)
        self.x[rows] += remaining * velocity
        self.running[rows] = False
        self.finished[rows] = finished

    def solution(self, prediction) -> Solution:
        return Solution(self.x, prediction, self.t, self.nfe, self.accepted, self.rejected,
                        self.finished)


def column(values, x):
    """(n,) -> (n, 1, ...), to go with x (n, ...)."""
    ones = [1] * (x.dim() - 1)
    return values.view(-1, *ones)


def integrate_fixed(field, x_0, rules, steps, limits) -> Solution:
    """Equal intervals, shared by the sequences that are still running."""
    inner, last = rules
    run = Run(field, x_0)
    f = field
    h = 1 / steps
    rows = field.rows
    for taken in range(steps):
        t = taken / steps
        rule = inner
        # and one evaluation more, or the end of the interval could not be left
        needed = inner.more + 1
        if taken == steps - 1:
            rule = last
            needed = last.more
        x = run.x[rows]
        k1 = f(t, x)
        run.nfe[rows] += 1
        # all that are running have paid the same
        if run.nfe[rows[0]] + needed > limits.nfe:
            # no whole interval is left: go straight on from here
            run.leave(rows, k1, finished=False)
            break
        run.x[rows] = rule.step(f, t, x, h, k1).x
        run.nfe[rows] += rule.more
        run.t[rows] = (taken + 1) / steps
        run.accepted[rows] += 1
        if f is not field:
            f.tell(field, rows, slice(None))
        # who has settled leaves; x is the end of an interval, from which k1 still points well
        settled = f.stood >= limits.unchanged
        if settled.any():
            run.leave(rows[settled], k1[settled], finished=True)
            rows = rows[~settled]
            f = field.of(rows)
            if not len(rows):
                break
    return run.solution(field.prediction)


# A guess may change late, when the noise has faded, and a longer step would not notice.
LONGEST_STEP = 0.25
# Where the field jumps because an argmax flips, no step is small enough; one this short is taken. A
# path that reads its own guess may jump to and fro for ever, so it also bounds what a token costs.
SHORTEST_STEP = 1 / 32      # times rtol^(1/order): 1/128 at rtol = 1e-3


def error_ratio(error, x, x_new, tolerance):
    """Root mean square of error/tolerance of each sequence, (n,): 1 is just good (Hairer II.4)."""
    rtol, atol = tolerance
    largest = torch.maximum(x.abs(), x_new.abs())
    scale = atol + rtol * largest
    ratio = (error / scale).flatten(1)                                  # (n, numbers of a state)
    return ratio.square().mean(1).sqrt()


def next_step(h, ratio, order: int, repelled):
    """The controller: how long the next step of each sequence is, (n,), after one of length h.

    ratio     (n,) of the step just taken, see error_ratio
    repelled  (n,) True where the step before this one was rejected
    """
    # h' = h·0.9·ratio^(−1/order): the step that would just have been good, and a little less
    factor = 0.9 * ratio.clamp_min(1e-10) ** (-1 / order)
    factor = factor.clamp(0.2, 10)
    # no growth right after a rejection, or the step would be rejected again; nor where ratio is NaN
    held = factor.nan_to_num(1.0).clamp_max(1)
    factor = torch.where(repelled | ratio.isnan(), held, factor)
    return (h * factor).clamp_max(LONGEST_STEP)


class AdaptiveRun(Run):
    """Steps and times of their own: the next step, and the velocity with which it begins."""

    def __init__(self, field, x_0):
        super().__init__(field, x_0)
        self.k1 = field(0.0, x_0)
        self.nfe += 1
        self.h = torch.full_like(self.t, LONGEST_STEP)
        self.repelled = torch.zeros_like(self.running)

    def choose(self):
        """(rows, is it their last step?): those in the middle of the way, then those at its end."""
        # a step that would leave less than a hundredth of itself takes the rest too
        arriving = self.running & (self.t + 1.01 * self.h >= 1)
        on_the_way = self.running & ~arriving
        last = not on_the_way.any()
        chosen = arriving if last else on_the_way
        return chosen.nonzero().flatten(), last

    def pay(self, rows, more: int, budget):
        """The rows that can pay `more` evaluations; the others go straight on to t = 1 and stop."""
        able = self.nfe[rows] + more <= budget
        broke = rows[~able]
        self.leave(broke, self.k1[broke], finished=False)
        self.nfe[rows[able]] += more
        return rows[able]

    def accept(self, rows, t, step: Step, good, last: bool):
        """Write back the steps that are good: state, time, the velocity of the next one."""
        done = rows[good]
        self.x[done] = step.x[good]
        self.t[done] = t[good]
        self.accepted[done] += 1
        self.rejected[rows[~good]] += 1
        self.running[done] = not last
        if not last:
            self.k1[done] = step.k_end[good]


def integrate_adaptive(field, x_0, rules, tolerance, limits) -> Solution:
    """A step size per sequence: what one costs does not depend on its neighbours.

    A token on which the model does not hesitate takes four steps, 21 evaluations; hesitation makes
    the steps shorter.
    """
    run = AdaptiveRun(field, x_0)
    f = field
    # a good step is as long as the order-th root of what it may err
    shortest = SHORTEST_STEP * tolerance[0] ** (1 / rules[0].order)
    while run.running.any():
        # 1. who takes the next step, by which rule, and can pay for it?
        rows, last = run.choose()
        rule = rules[1] if last else rules[0]
        rows = run.pay(rows, rule.more, limits.nfe)
        if not len(rows):
            continue
        if f is field or not torch.equal(rows, f.rows):
            f = field.of(rows)      # selecting copies keys and values, so only on change
        # a step that was rejected has left no guess behind
        f.recall(field, rows)
        # 2. step
        x = run.x[rows]
        t = run.t[rows]
        t_new = torch.ones_like(t) if last else t + run.h[rows]
        h = 1 - t if last else run.h[rows]
        step = rule.step(f, column(t, x), x, column(h, x), run.k1[rows])
        # 3. judge; a state that is not a number passes, and stays visible
        ratio = error_ratio(step.error, x, step.x, tolerance)
        good = ~(ratio > 1) | (h <= shortest)
        # 4. write back
        wanted = next_step(h, ratio, rule.order, run.repelled[rows])
        # or the steps across a field that never settles would shrink for ever
        run.h[rows] = wanted.clamp_min(shortest)
        run.repelled[rows] = ~good
        run.accept(rows, t_new, step, good, last)
        f.tell(field, rows, good)
        # 5. who has settled need not go on
        settled = (run.running & (field.stood >= limits.unchanged)).nonzero().flatten()
        run.leave(settled, run.k1[settled], finished=True)
    return run.solution(field.prediction)


def main():
    """Error on dx/dt = (1 + t)·x, x(0) = 1 when the interval is halved: the order is the slope."""
    def growth(t, x, prediction):
        return (1 + torch.as_tensor(t).view(-1, 1)) * x, None

    x_0 = torch.ones(1, 1, dtype=torch.float64)
    exact = torch.tensor(1.5, dtype=torch.float64).exp()      # x = exp(t + t²/2)
    print(f"{'solver':9} {'steps':>5} {'nfe':>4} {'error':>9} {'order':>6}")
    for solver in FIXED:
        before = None
        for steps in (8, 16, 32, 64):
            solution = odeint(growth, x_0, solver, steps)
            error = (solution.x - exact).abs()
            order = "" if before is None else f"{float((before / error).log2()):6.2f}"
            print(f"{solver:9} {steps:5} {int(solution.nfe):4} {float(error):9.1e} {order}")
            before = error
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        solution = odeint(growth, x_0, "dopri5", rtol=tolerance, atol=tolerance)
        print(f"dopri5 {tolerance:.0e}: {int(solution.accepted)} steps, "
              f"{int(solution.rejected)} rejected, nfe {int(solution.nfe)}, "
              f"error {float((solution.x - exact).abs()):.1e}")


if __name__ == "__main__":
    main()
