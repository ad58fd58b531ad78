"""Integrate dx/dt = f(t, x) from t = 0 (noise) to t = 1 (data): Euler, midpoint, Heun, RK4 and adaptive Dormand-Prince.

No network in sight: `f` is any function. Read this file first, then diffusion.py, which supplies the `f` of the method
(L2D paper, Algorithm 1). Run alone it prints the order table:

    python solvers.py

**The rule for t = 1.** The field of the method, (x̂ − x)/(1 − t), is 0/0 at t = 1, so no solver evaluates there. Euler and
midpoint never ask for it. Heun, RK4 and Dormand-Prince do, in their last interval; putting zero there, or a time just
below 1 with the state meant for 1, would bias the end point. Instead the *last interval* uses a rule whose nodes all lie
inside it: for Heun the midpoint rule (nodes 0, ½), for RK4 and Dormand-Prince Ralston's third-order rule (nodes 0, ½, ¾).
One interval may be one order cheaper without lowering the order of the whole: its local error h^(p+1) is what p + 1
intervals of order p add up to. On a straight path both rules are exact, like everything else here.
"""

from dataclasses import dataclass, field

import torch

LONGEST_STEP = 0.25     # of dopri5: a guess may change late, when the noise has faded, and a longer step would not notice
SOLVERS = ("euler", "midpoint", "heun", "rk4", "dopri5")


@dataclass
class Solution:
    """x: the end point; t: (B,) how far each sequence got (1 unless its budget ran out, see `finished`).

    nfe, accepted, rejected: (B,) integers, evaluations of f and steps, per sequence.
    finished: (B,) False where `max_nfe` ran out: x is then the straight line from the state reached, along its last velocity.
    trajectory: list of (rows, t, x) after every accepted step, start included, where it was asked for.
    """
    x: torch.Tensor
    t: torch.Tensor
    nfe: torch.Tensor
    accepted: torch.Tensor
    rejected: torch.Tensor
    finished: torch.Tensor
    trajectory: list = field(default_factory=list)


# --- one step of each rule: from (t, x) with k1 = f(t, x) given, a step of h. `f` counts its own evaluations. ---------

def euler(f, t, x, h, k1):
    # x' = x + h·k1
    return x + h * k1


def midpoint(f, t, x, h, k1):
    k2 = f(t + h / 2, x + h / 2 * k1)
    # x' = x + h·k2
    return x + h * k2


def heun(f, t, x, h, k1):
    k2 = f(t + h, x + h * k1)
    # x' = x + h·(k1 + k2)/2
    return x + h * (k1 + k2) / 2


def rk4(f, t, x, h, k1):
    k2 = f(t + h / 2, x + h / 2 * k1)
    k3 = f(t + h / 2, x + h / 2 * k2)
    k4 = f(t + h, x + h * k3)
    # x' = x + h·(k1 + 2k2 + 2k3 + k4)/6
    return x + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6


def ralston3(f, t, x, h, k1):
    """Third order with nodes 0, ½, ¾, all inside the interval. Returns (x', error): the midpoint rule is embedded."""
    k2 = f(t + h / 2, x + h / 2 * k1)
    k3 = f(t + 3 * h / 4, x + 3 * h / 4 * k2)
    # x' = x + h·(2k1 + 3k2 + 4k3)/9,  error = x' − midpoint
    return x + h * (2 * k1 + 3 * k2 + 4 * k3) / 9, h * (2 * k1 - 6 * k2 + 4 * k3) / 9


# Dormand and Prince (1980), table 2: nodes c, stages a, the fifth-order weights b and b − b̂, which estimates the error.
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


def dormand_prince(f, t, x, h, k1):
    """One step of order 5. Returns (x', error, k7); k7 = f(t + h, x') is the next step's k1."""
    k = [k1]
    for c, row in zip(DP_C, DP_A):
        # k_i = f(t + c_i·h, x + h·Σ a_ij·k_j)
        y = x + h * sum(a * kj for a, kj in zip(row, k))
        k.append(f(t + c * h, y))
    # x' is the last y (its row of a equals b),  error = h·Σ (b_i − b̂_i)·k_i
    return y, h * sum(e * ki for e, ki in zip(DP_E, k)), k[-1]


# rule for all intervals but the last, rule for the last, evaluations of each
FIXED = {
    "euler": (euler, euler, 1, 1),
    "midpoint": (midpoint, midpoint, 2, 2),
    "heun": (heun, midpoint, 2, 2),
    "rk4": (rk4, lambda *args: ralston3(*args)[0], 4, 3),
}


# --- the two drivers --------------------------------------------------------------------------------------------------

def odeint(f, x0, solver: str = "midpoint", steps: int = 8, rtol: float = 1e-3, atol: float = 1e-3,
           max_nfe: int | None = None, trajectory: bool = False) -> Solution:
    """Integrate every sequence of a batch over t in [0, 1].

    f(t, x, rows)  velocity (n, ...) of the sequences `rows` (n,) of the batch at states x (n, ...). t is a float where all
                   of them are at the same time (fixed steps), else a tensor (n,).
    x0             (B, ...) float32 or float64; the state keeps this type.
    solver, steps  one of SOLVERS; `steps` equal intervals (1 or more) for all but dopri5, which chooses its own,
    rtol, atol     so that its local error stays below atol + rtol·|x| (both > 0), separately for every sequence.
    max_nfe        most evaluations of f for one sequence (1 or more), or None.

    Raises ValueError for an unknown solver, a number out of range, or a state that is not float32 or float64.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; allowed: {', '.join(SOLVERS)}")
    if x0.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x0 has type {x0.dtype}; allowed: float32 and float64, or small steps are lost")
    for name, value, least in (("steps", steps, 1), ("max_nfe", 1 if max_nfe is None else max_nfe, 1)):
        if value < least:
            raise ValueError(f"{name} = {value} is out of range; allowed: {least} or more")
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"rtol = {rtol} and atol = {atol} are out of range; allowed: greater than 0")
    budget = float("inf") if max_nfe is None else max_nfe
    if solver == "dopri5":
        return integrate_adaptive(f, x0, rtol, atol, budget, trajectory)
    return integrate_fixed(f, x0, solver, steps, budget, trajectory)


def integrate_fixed(f, x0, solver, steps, budget, trajectory) -> Solution:
    """Equal intervals, shared by the batch."""
    inner, last, cost, last_cost = FIXED[solver]
    rows = torch.arange(len(x0), device=x0.device)
    field = lambda t, x: f(t, x, rows)
    x, t, nfe, taken = x0, 0.0, 0, 0
    path = [(rows, 0.0, x0)] if trajectory else []
    while taken < steps and nfe + 1 <= budget:
        final = taken == steps - 1
        rule, price = (last, last_cost) if final else (inner, cost)
        k1, h = field(t, x), 1 / steps
        if nfe + price > budget:       # no whole interval is left: go straight from here
            x, nfe = x + (1 - t) * k1, nfe + 1
            break
        x, nfe, taken = rule(field, t, x, h, k1), nfe + price, taken + 1
        t = taken / steps
        if trajectory:
            path.append((rows, t, x))
    count = lambda value: torch.full((len(x0),), value, device=x0.device)
    return Solution(x, count(t), count(nfe), count(taken), count(0), count(taken == steps), path)


def error_ratio(error, x, x_new, rtol, atol):
    """Root mean square of error/tolerance over one sequence, (n,): a step is good where it is at most 1 (Hairer II.4)."""
    scale = atol + rtol * torch.maximum(x.abs(), x_new.abs())
    return (error / scale).flatten(1).square().mean(1).sqrt()


def next_step(h, ratio, order):
    # h' = h·min(10, max(0.2, 0.9·ratio^(−1/order))), at most LONGEST_STEP
    return (h * (0.9 * ratio.nan_to_num(0.0).clamp_min(1e-10) ** (-1 / order)).clamp(0.2, 10)).clamp_max(LONGEST_STEP)


def integrate_adaptive(f, x0, rtol, atol, budget, trajectory) -> Solution:
    """Dormand-Prince with a step size per sequence: what one sequence costs does not depend on its neighbours.

    A token on which the model does not hesitate takes four steps, 21 evaluations; hesitation makes the steps shorter. In
    each round the sequences about to arrive at t = 1 are stepped, then the others.
    """
    all_rows = torch.arange(len(x0), device=x0.device)
    x, t, h = x0.clone(), x0.new_zeros(len(x0)), x0.new_full((len(x0),), LONGEST_STEP)
    nfe, accepted, rejected = (torch.zeros_like(all_rows) for _ in range(3))
    repelled = all_rows < 0                                           # whose last step was rejected
    column = lambda value: value.view(-1, *[1] * (x0.dim() - 1))      # (n,) -> (n, 1, ...), to go with x

    def field(rows):
        def counted(t, x):
            nfe[rows] += 1
            return f(t.flatten(), x, rows)
        return counted

    k1, running = field(all_rows)(t, x), all_rows >= 0
    path = [(all_rows, t.clone(), x.clone())] if trajectory else []
    while running.any():
        # a step that would leave less than a hundredth of itself takes the rest too
        arriving = running & (t + 1.01 * h >= 1)
        for final, group in ((True, arriving), (False, running & ~arriving)):
            # beyond k1 a step costs 2 or 6 evaluations; who cannot pay goes straight on from here
            broke = group & (nfe + (2 if final else 6) > budget)
            x[broke] += column(1 - t[broke]) * k1[broke]
            running &= ~broke
            rows = (group & ~broke).nonzero().flatten()
            if not len(rows):
                continue
            start, step = x[rows], 1 - t[rows] if final else h[rows]
            rule, order = (ralston3, 3) if final else (dormand_prince, 5)
            x_new, error, *k7 = rule(field(rows), column(t[rows]), start, column(step), k1[rows])
            ratio = error_ratio(error, start, x_new, rtol, atol)
            # where the field jumps (an argmax flips) no step is small enough: accept at 1e-6; NaN passes and stays visible
            good = ~(ratio > 1) | (step <= 1e-6)
            accepted[rows] += good
            rejected[rows] += ~good
            proposed = next_step(step, ratio, order)
            # no growth right after a rejection, or the step would be rejected again (Hairer II.4)
            h[rows] = torch.where(repelled[rows], proposed.minimum(step), proposed)
            repelled[rows] = ~good
            done = rows[good]
            x[done], t[done] = x_new[good], 1.0 if final else t[done] + step[good]
            running[done] = not final
            if not final:
                k1[done] = k7[0][good]
            if trajectory and len(done):
                path.append((done, t[done], x[done]))
    return Solution(x, t, nfe, accepted, rejected, t >= 1, path)


def main():
    """Error on dx/dt = (1 + t)·x, x(0) = 1 when the interval is halved: the order is the slope."""
    f = lambda t, x, rows: torch.as_tensor(1 + t).view(-1, 1) * x
    x0 = torch.ones(1, 1, dtype=torch.float64)
    exact = torch.tensor(1.5, dtype=torch.float64).exp()   # x = exp(t + t²/2)
    print(f"{'solver':9} {'steps':>5} {'nfe':>4} {'error':>9} {'order':>6}")
    for solver in FIXED:
        errors = []
        for steps in (8, 16, 32, 64):
            solution = odeint(f, x0, solver, steps)
            errors.append(float((solution.x - exact).abs()))
            order = f"{torch.tensor(errors[-2] / errors[-1]).log2():6.2f}" if len(errors) > 1 else ""
            print(f"{solver:9} {steps:5} {int(solution.nfe):4} {errors[-1]:9.1e} {order}")
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        solution = odeint(f, x0, "dopri5", rtol=tolerance, atol=tolerance)
        print(f"dopri5 {tolerance:.0e}: {int(solution.accepted)} steps, {int(solution.rejected)} rejected, "
              f"nfe {int(solution.nfe)}, error {float((solution.x - exact).abs()):.1e}")


if __name__ == "__main__":
    main()
