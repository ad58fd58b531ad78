"""Many evaluations of a constant velocity in one call: what a solver finds alone, in fewer calls."""

import pytest
import torch

import sample
from data.tasks import TASKS
from data.text.answer import Stop
from diffusion import L2D
from sample import Settings, generate, load_model
from solvers import SOLVERS, Ahead, columns, odeint, times_of


class Jumping:
    """A velocity towards one of eight points, chosen anew by every state and time."""

    def __init__(self, seed, jumps):
        g = torch.Generator().manual_seed(seed)
        self.points = torch.randn(8, 4, generator=g)
        self.weights = jumps * torch.randn(4, 8, generator=g)
        self.bias = torch.randn(8, generator=g)
        self.times = []

    def __call__(self, t, x, before=None):
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        self.times += t.tolist()
        scores = torch.sin(x @ self.weights + columns(10 * t, x)) + self.bias
        return (self.points[scores.argmax(-1)] - x) / columns(1 - t, x), scores

    many = __call__


@pytest.mark.parametrize("options", [{}, {"max_nfe": 5}, {"stop_unchanged": 2}])
@pytest.mark.parametrize("jumps", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_finds_the_same_ahead(solver, jumps, options):
    for seed in range(8):
        x_0 = 8 * torch.randn(1, 4, generator=torch.Generator().manual_seed(seed))
        f = Jumping(seed, jumps)
        alone = odeint(f, x_0, solver, 6, 1e-2, 1e-2, **options)
        ahead = Ahead(Jumping(seed, jumps), times_of(solver, 6, 1e-2, 1e-2))
        found = odeint(ahead, x_0, solver, 6, 1e-2, 1e-2, **options)
        torch.testing.assert_close(found.x, alone.x, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found.prediction, alone.prediction, atol=1e-2, rtol=1e-2)
        assert found.nfe == alone.nfe and found.finished == alone.finished
        assert ahead.calls <= alone.nfe
        if not jumps and not options and solver in ("euler", "midpoint"):
            # a new line for each best candidate; two calls for the first, with which nothing is known
            best = [float(torch.sin(torch.tensor(10 * t) + f.bias).argmax()) for t in f.times]
            lines = 1 + sum(a != b for a, b in zip(best, best[1:]))
            assert ahead.calls <= 2 * lines


def test_a_velocity_that_stays_needs_two_calls():
    f = Jumping(0, 0.0)
    f.bias[3] = 10.0
    for solver in SOLVERS:
        ahead = Ahead(f, times_of(solver, 8, 1e-3, 1e-3))
        found = odeint(ahead, torch.zeros(1, 4), solver, 8)
        assert ahead.calls == 2 < int(found.nfe)
        torch.testing.assert_close(found.x, f.points[3:4])


@pytest.mark.parametrize("way", [
    {"solver": "euler", "steps": 8}, {"solver": "midpoint", "steps": 7}, {"solver": "dopri5"},
    {"solver": "midpoint", "steps": 15, "temperature": 1.0, "stop_unchanged": 3},
    {"solver": "rk4", "steps": 3, "max_nfe": 8}])
def test_the_papers_path_says_the_same_with_fewer_calls(way, monkeypatch):
    model, tokenizer = load_model("data/tiny/paper", device="cpu")
    problems = [TASKS["tiny"].problem(group, 0) for group in TASKS["tiny"].groups[::4]]
    prompts = [tokenizer.encode_start(problem.prompt) for problem in problems]
    calls = []
    predict = L2D.predict
    monkeypatch.setattr(L2D, "predict", lambda *args: calls.append(1) or predict(*args))

    def answers():
        calls.clear()
        return [generate(model, [ids], Settings(**way), Stop.of(tokenizer), seeds=[row])[0]
                for row, ids in enumerate(prompts)]

    ahead, fewer = answers(), len(calls)
    # as many as evaluations
    monkeypatch.setattr(sample, "Ahead", lambda velocity, times: Alone(velocity))
    alone = answers()
    assert [a.ids for a in ahead] == [a.ids for a in alone]
    assert [a.nfe for a in ahead] == [a.nfe for a in alone]
    assert fewer < 0.6 * len(calls) == 0.6 * sum(map(sum, (a.nfe for a in alone)))


class Alone:
    """The velocity as it is, with the one thing more that Ahead has."""

    def __init__(self, f):
        self.f = f
        self.calls = 0

    def __call__(self, t, x, before=None):
        if t == 1.0:
            return None, self.f.final_logits(x)
        return self.f(t, x, before)
