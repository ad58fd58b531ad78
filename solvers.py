"""Integrate dx/dt = f(t, x) from t = 0 (noise) to t = 1 (data).

Euler, midpoint, Heun, RK4 and adaptive Dormand-Prince, by hand. No network in sight: f is any
function of time and state. Read this file first, then diffusion.py, which supplies the f of the
method (L2D paper, Algorithm 1). Run alone it measures the order of every solver, the number of
times that its error halves when its steps do:

    python solvers.py
    midpoint     64  128   1.1e-03   1.97
    rk4          64  255   2.4e-07   3.94

First the loop, for one sequence and equal steps; then the rules for one step; then what a batch
adds. `steps` counts intervals, `nfe` evaluations of f.
"""

from functools import lru_cache
from typing import Callable, NamedTuple

import torch


# --- the loop -------------------------------------------------------------------------------------

def integrate(f, x, steps: int, step):
    """From x at t = 0 to x at t = 1, for one sequence, in equal steps by a rule `step` below."""
    h = 1 / steps
    for n in range(steps):
        t = n / steps
        x = step(f, t, x, h, f(t, x)).x
    return x


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

# The rule for all intervals but the last, and the rule for the last one, which may not evaluate f
# at t = 1: the velocity of the method, (x̂ − x)/(1 − t), is 0/0 there, and any number in its place
# would bias the end point. All of them end a straight path exactly.
SOLVERS = {
    # never evaluate at t = 1
    "euler": (EULER, EULER),
    "midpoint": (MIDPOINT, MIDPOINT),
    # midpoint has the same order, so nothing is lost
    "heun": (HEUN, MIDPOINT),
    # order 3 for order 4: its error in one interval, h⁴, is what all the others add up to anyway
    "rk4": (RK4, RALSTON),
    # order 3 for order 5: the tolerance shortens the last interval where that matters
    "dopri5": (DORMAND_PRINCE, RALSTON),
}
ADAPTIVE = ("dopri5",)
FIXED = tuple(name for name in SOLVERS if name not in ADAPTIVE)


# --- a batch of sequences -------------------------------------------------------------------------

class Sequences:
    """A batch under way: one row for every sequence. `odeint` returns it.

    x                        (B, ...) state; in the end the end point
    t                        (B,) time reached: 1, unless a sequence stopped before it; x is then
                             the straight line from the state reached to t = 1
    prediction               (B, ..., V) scores of candidates at the last evaluation, or None
    unchanged                (B,) evaluations since the best candidate changed
    nfe, accepted, rejected  (B,) evaluations of f, and steps
    running, finished        (B,) bool; not finished: `max_nfe` was too small
    calls                    of f, where several evaluations were made in one, see Ahead
    """

    def __init__(self, f, x_0, watch):
        self.x = x_0.clone()
        self.t = x_0.new_zeros(len(x_0))
        self.prediction = None
        self.rows = torch.arange(len(x_0), device=x_0.device)      # (n,) those that f is of
        self.unchanged = torch.zeros_like(self.rows)
        self.nfe = torch.zeros_like(self.rows)
        self.accepted = torch.zeros_like(self.rows)
        self.rejected = torch.zeros_like(self.rows)
        self.running = torch.ones_like(self.rows, dtype=torch.bool)
        self.finished = torch.ones_like(self.running)
        self.calls = None
        self.f_of_all = self.f = f
        self.watch = watch

    def select(self, rows):
        """From now on the velocity is that of the sequences `rows` (n,)."""
        # selecting copies keys and values, so it is done only where the rows change
        if torch.equal(rows, self.rows):
            return
        self.rows = rows
        self.f = self.f_of_all
        if hasattr(self.f, "rows") and len(rows) < len(self.x):
            self.f = self.f.rows(rows)

    def velocity(self, t, x):
        """dx/dt of the selected sequences. The only caller of f; it counts, and notes predictions.

        t  a float, or (n, 1, ...) where every sequence is at a time of its own
        """
        if torch.is_tensor(t):
            t = t.flatten()
        before = self.prediction
        everyone = len(self.rows) == len(self.x)
        if before is not None and not everyone:
            before = before[self.rows]
        velocity, prediction = self.f(t, x, before)
        self.nfe[self.rows] += 1
        if before is not None:
            same = prediction.argmax(-1) == before.argmax(-1)
            same = same.view(len(same), -1).all(1)
            self.unchanged[self.rows] = torch.where(same, self.unchanged[self.rows] + 1, 0)
        if before is None or everyone:
            self.prediction = prediction
        else:
            self.prediction[self.rows] = prediction
        if self.watch:
            self.watch(self.rows, t, x, prediction)
        return velocity

    def stop(self, rows, velocity, finished: bool):
        """These sequences go straight on to t = 1."""
        remaining = columns(1 - self.t[rows], self.x)
        self.x[rows] += remaining * velocity
        self.running[rows] = False
        self.finished[rows] = finished


def columns(values, x):
    """(n,) -> (n, 1, ...), to go with x (n, ...)."""
    ones = [1] * (x.dim() - 1)
    return values.view(-1, *ones)


NEVER = 1 << 62      # evaluations


def odeint(f, x_0, solver: str = "midpoint", steps: int = 8, rtol: float = 1e-3,
           atol: float = 1e-3, max_nfe: int | None = None, stop_unchanged: int | None = None,
           watch=None) -> Sequences:
    """Integrate every sequence of a batch over t in [0, 1].

    f(t, x, before)  (dx/dt, prediction) at states x (B, ...). t is one float for all, below 1, or
                     (B,) where every sequence has its own time; before (B, ..., V) is the
                     prediction of the last evaluation, None at the first. If f is not the same for
                     all sequences it has f.rows(index), the f of the sequences `index` (n,).
    x_0              (B, ...) float32 or float64; the state keeps this type.
    solver, steps    one of SOLVERS; `steps` equal intervals (1 or more) for all but dopri5, which
    rtol, atol       chooses its own, so that the error of a step stays below atol + rtol·|x| (both
                     > 0), separately for every sequence.
    max_nfe          most evaluations of f for one sequence (1 or more), or None.
    stop_unchanged   a sequence stops after so many evaluations in a row that leave its best
                     candidate unchanged (1 or more), or None.
    watch            called as watch(rows, t, x, prediction) after every evaluation, or None.

    The orders of the solvers hold where f does not use `before`; a path with self-conditioning
    does, so its f changes from one evaluation to the next.

    Raises ValueError for an unknown solver, a number out of range, or a state of another type.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; allowed: {', '.join(SOLVERS)}")
    if x_0.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x_0 has type {x_0.dtype}; allowed: float32 and float64, "
                         "or small steps are lost")
    counts = {"steps": steps, "max_nfe": max_nfe, "stop_unchanged": stop_unchanged}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value} is out of range; allowed: 1 or more")
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"rtol = {rtol} and atol = {atol} are out of range; "
                         "allowed: greater than 0")
    sequences = Sequences(f, x_0, watch)
    limits = (max_nfe or NEVER, stop_unchanged or NEVER)
    if solver in ADAPTIVE:
        integrate_adaptive(sequences, SOLVERS[solver], rtol, atol, *limits)
    else:
        integrate_fixed(sequences, SOLVERS[solver], steps, *limits)
    return sequences


def integrate_fixed(s: Sequences, rules, steps: int, max_nfe: int, stop_unchanged: int):
    """Equal steps, shared by the sequences that are still running."""
    inner, last = rules
    h = 1 / steps
    for n in range(steps):
        rule = last if n == steps - 1 else inner
        rows = s.rows
        t = n / steps
        x = s.x[rows]
        k1 = s.velocity(t, x)
        # the rest of this step, and the k1 that begins the next one
        needed = rule.more + (n < steps - 1)
        # all that are running have made as many evaluations
        if s.nfe[rows[0]] + needed > max_nfe:
            return s.stop(rows, k1, finished=False)
        s.x[rows] = rule.step(s.velocity, t, x, h, k1).x
        s.t[rows] = (n + 1) / steps
        s.accepted[rows] += 1
        done = s.unchanged[rows] >= stop_unchanged
        if done.any():
            # x is the end of a step, from which k1 still points well
            s.stop(rows[done], k1[done], finished=True)
            if done.all():
                return
            s.select(rows[~done])


# --- the adaptive solver --------------------------------------------------------------------------

# A prediction may change late, when the noise has faded, and a longer step would not notice.
LONGEST_STEP = 0.25
# Where the velocity jumps because an argmax changes, no step is small enough; one this short is
# taken. A path that reads its own prediction may jump to and fro for ever, so this also bounds the
# cost of a token.
SHORTEST_STEP = 1 / 32      # times rtol^(1/order): 1/128 at rtol = 1e-3


def error_ratio(error, x, x_new, rtol: float, atol: float):
    """Root mean square of error/tolerance of each sequence, (n,): 1 is just good (Hairer II.4)."""
    largest = torch.maximum(x.abs(), x_new.abs())
    scale = atol + rtol * largest
    ratio = (error / scale).flatten(1)                                  # (n, numbers of a state)
    return ratio.square().mean(1).sqrt()


def next_step(h, ratio, order: int, after_rejection):
    """The controller: the length of the next step of each sequence, (n,), after one of length h.

    ratio            (n,) of the step just taken, see error_ratio
    after_rejection  (n,) True where the step before this one was rejected
    """
    # h' = h·0.9·ratio^(−1/order): the step that would just have been good, and a little less
    factor = 0.9 * ratio.clamp_min(1e-10) ** (-1 / order)
    factor = factor.clamp(0.2, 10)
    # no growth right after a rejection, or the step would be rejected again; nor where ratio is NaN
    held = factor.nan_to_num(1.0).clamp_max(1)
    factor = torch.where(after_rejection | ratio.isnan(), held, factor)
    return (h * factor).clamp_max(LONGEST_STEP)


def integrate_adaptive(s: Sequences, rules, rtol: float, atol: float, max_nfe: int,
                       stop_unchanged: int):
    """A step size for each sequence: its cost does not depend on its neighbours.

    Where the prediction does not change a token takes four steps, 21 evaluations; where it changes,
    the steps become shorter.
    """
    # a good step is as long as the order-th root of its tolerance
    shortest = SHORTEST_STEP * rtol ** (1 / rules[0].order)
    k1 = s.velocity(0.0, s.x.clone())
    h = torch.full_like(s.t, LONGEST_STEP)
    after_rejection = torch.zeros_like(s.running)
    while s.running.any():
        # 1. Which sequences step? First those on the way, together; then those that arrive. A step
        #    that would leave less than a hundredth of itself takes the rest too.
        arriving = s.running & (s.t + 1.01 * h >= 1)
        on_the_way = s.running & ~arriving
        last = not on_the_way.any()
        rule = rules[1] if last else rules[0]
        rows = (arriving if last else on_the_way).nonzero().flatten()
        over_budget = rows[s.nfe[rows] + rule.more > max_nfe]
        if len(over_budget):
            s.stop(over_budget, k1[over_budget], finished=False)
            continue
        s.select(rows)
        # 2. Step.
        x, t = s.x[rows], s.t[rows]
        length = 1 - t if last else h[rows]
        before, unchanged = None, s.unchanged[rows]
        if s.prediction is not None:
            before = s.prediction[rows]
        step = rule.step(s.velocity, columns(t, x), x, columns(length, x), k1[rows])
        # 3. Was it good? A state that is not a number passes, and stays visible.
        ratio = error_ratio(step.error, x, step.x, rtol, atol)
        good = ~(ratio > 1) | (length <= shortest)
        done, again = rows[good], rows[~good]
        s.x[done] = step.x[good]
        s.t[done] = 1.0 if last else (t + length)[good]
        s.accepted[done] += 1
        s.running[done] = not last
        if not last:
            k1[done] = step.k_end[good]
        # 4. A rejected step leaves nothing behind but its cost.
        s.rejected[again] += 1
        s.unchanged[again] = unchanged[~good]
        if before is not None:
            s.prediction[again] = before[~good]
        # 5. The next step; without a shortest one, steps across a jump would shrink for ever.
        wanted = next_step(length, ratio, rule.order, after_rejection[rows])
        h[rows] = wanted.clamp_min(shortest)
        after_rejection[rows] = ~good
        # 6. Sequences whose prediction no longer changes stop.
        same = (s.running & (s.unchanged >= stop_unchanged)).nonzero().flatten()
        s.stop(same, k1[same], finished=True)


# --- many evaluations in one call -----------------------------------------------------------------

@lru_cache(maxsize=16)      # the same for every token
def times_of(solver: str, steps: int, rtol: float, atol: float) -> tuple:
    """The times at which a solver evaluates a velocity that does not change."""
    times = []

    def constant(t, x, before):
        times.append(float(t))
        return torch.ones_like(x), None

    odeint(constant, torch.zeros(1, 1), solver, steps, rtol, atol)
    return tuple(times)


class Ahead:
    """The velocity of one sequence, evaluated at all later times in one call, while it is constant.

    dx/dt = (x̂ − x)/(1 − t) is constant along its own solution as long as x̂ is. With the vector of
    the best candidate as x̂, every later state therefore lies on a line that is known, and can be
    evaluated before the solver comes there. What lies beyond the first other best candidate is
    thrown away, and so is a state that the solver does not come to: it finds what it would find
    alone, up to rounding, in about as many calls as there are lines.

    f      uses no prediction before; f.many(t, x) gives the (velocities, predictions) of the
           sequence at times (K,) and states (K, ...); `calls` counts both
    times  at which it may be evaluated, see `times_of`
    """

    def __init__(self, f, times):
        self.f = f
        self.times = times
        self.known = {}         # time -> state, velocity, prediction, on the present line
        self.end = None         # of this line, at t = 1
        self.best = None        # candidate, whose vector that is
        self.calls = 0

    def __call__(self, t, x, before=None):
        t = float(t)
        state = self.known[t][0] if t in self.known else None
        if state is None or (x - state).abs().max() > 1e-5 * x.abs().max():
            self.look_ahead(t, x)
        _, velocity, prediction = self.known[t]
        best = prediction.argmax(-1)
        if self.best is None or not torch.equal(best, self.best):
            self.known, self.best = {}, best
            self.end = x + (1 - t) * velocity
        return velocity, prediction

    def look_ahead(self, t: float, x):
        """Evaluate at (t, x), and at all later times on the line from there, if there is one."""
        times, states = [t], x
        if self.end is not None and t < 1:
            times += [later for later in self.times if later > t]
            # x(t') = x + (end − x)·(t' − t)/(1 − t)
            shares = (x.new_tensor(times) - t) / (1 - t)
            states = x + columns(shares, x) * (self.end - x)
        if len(times) == 1:
            found = self.f(t, x, None)
        else:
            found = self.f.many(x.new_tensor(times), states)
        self.calls += 1
        self.known = dict(zip(times, zip(*(part.split(1) for part in (states, *found)))))


# --- run alone ------------------------------------------------------------------------------------

def main():
    """Error on dx/dt = (1 + t)·x, x(0) = 1 when the interval is halved: the order is the slope."""
    def growth(t, x, before):
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
