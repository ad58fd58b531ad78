"""eval.py and the embedded model: intervals, counts of arithmetic, the table.

And that the shipped path does what is said of it.
"""

import hashlib
import json
import re
import shutil

import pytest
import torch
from conftest import LLAMA, make_l2d
from solvers import odeint
from torch.utils.flop_counter import FlopCounterMode

import eval as evaluation
from data.checkpoints.hub import resolve
from data.results import flops
from data.results.statistics import calibration, changes, rank_correlation, wilson
from data.tasks import TASKS
from data.tiny.topics import make_problem
from data.training.batches import collate
from diffusion import L2D, VelocityField
from sample import Settings, answer_problems, load_model

TINY = resolve("tiny")
TASK = TASKS["tiny"]


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (0, 100, 0.0, 0.0370),
        (50, 100, 0.4038, 0.5962),
        (100, 100, 0.9630, 1.0),
        (3, 8, 0.1368, 0.6943),
    ],
)
def test_wilson_interval_against_published_values(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=2e-4)


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("rank, merged", [(4, False), (4, True), (None, False)])
@pytest.mark.parametrize("estimate", ["argmax", "average"])
@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_arithmetic_is_what_torch_counts(rank, merged, estimate, solver, refined):
    """Matrix products of one evaluation of the path, from shapes alone (attention: one query).

    dopri5 costs the same: the modulation is looked up by its time, and V is made once.
    """
    l2d = make_l2d({**LLAMA, "num_key_value_heads": 4}, rank=rank, self_conditioning=refined)
    l2d.merge_lora(merged)
    length = 12
    with torch.no_grad():
        states = l2d.lm.read(torch.randint(258, (1, length))).last()
        field, x = VelocityField(l2d, states, estimate), torch.randn(1, 1, 16)
        t = torch.full((1,), 0.5) if solver == "dopri5" else 0.5
        _, prediction = field(t, x)  # fills the table of the modulation
        with FlopCounterMode(display=False) as counter:
            field(t, x, prediction)
    settings = Settings(steps=1, estimate=estimate, solver=solver)
    one, none = (flops.flops_per_token(l2d, nfe, length, settings) for nfe in (2, 1))
    attention = 4 * 2 * length * 32  # torch does not count fused attention on every device
    assert counter.get_total_flops() in (one - none, one - none - attention)


@pytest.mark.parametrize("rank, merged", [(4, False), (4, True), (None, False)])
def test_own_kv_costs_one_token_through_the_layers_of_the_path(rank, merged):
    l2d = make_l2d({**LLAMA, "num_key_value_heads": 4}, rank=rank, own_kv=True)
    l2d.merge_lora(merged)
    ids = torch.randint(258, (1, 1))
    with torch.no_grad():
        l2d.read(ids)  # fills the table of the modulation
        with FlopCounterMode(display=False) as counter:
            l2d.read(ids)
    attention = 4 * 2 * 1 * 32
    expected = flops.frozen_flops(l2d.lm, 1) + flops.own_kv_flops(l2d, 1)
    assert counter.get_total_flops() in (expected, expected - 2 * attention)


@pytest.mark.parametrize(
    "x, y, rho",
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207827),  # scipy.stats.spearmanr
        ([1, 2, 3], [5, 5, 5], None),
    ],
)
def test_rank_correlation_against_published_values(x, y, rho):
    assert rank_correlation(x, y) == (rho if rho is None else pytest.approx(rho))


def test_calibration_is_the_distance_of_belief_and_truth():
    # four tokens believed at 0.75, three of them right; one at 0.2 that is right
    found = calibration([0.75] * 4 + [0.2], [1, 1, 1, 0, 1])
    assert found == {"tokens": 5, "accuracy": 0.8, "confidence": pytest.approx(0.64),
                     "ece": pytest.approx(0.8 / 5)}
    assert calibration([1.0], [1])["ece"] == 0


def test_the_mean_of_several_noises_is_that_of_each_alone(tiny):
    model, tokenizer = tiny
    rows = [TASK.reference(make_problem("test", i, topic="math"), tokenizer) for i in range(2)]
    batch, settings = collate(rows), Settings(steps=2)
    with torch.no_grad():
        one = evaluation.solved(model, batch, settings, 0, 1)
        two = evaluation.solved(model, batch, settings, 0, 2)
    assert torch.allclose(two.sum(-1), torch.ones(len(two)), atol=1e-5)
    assert not torch.equal(one, two)
    # the second noise alone is what is left
    assert float((2 * two - one).min()) > -1e-6


def test_the_shipped_files_are_those_that_their_readme_describes():
    text = (TINY / "README.md").read_text(encoding="utf-8")
    for name in ("model.safetensors", "path.safetensors", "paper/path.safetensors"):
        assert hashlib.sha256((TINY / name).read_bytes()).hexdigest() in text, name
    assert all(path.stat().st_size <= 4e6 for path in TINY.rglob("*.safetensors"))


def test_the_shipped_base_is_small_and_the_path_was_trained_beside_it(tiny):
    model, _ = tiny
    assert isinstance(model, L2D) and 3 <= model.lm.config.layers <= 5
    assert sum(p.numel() for p in model.lm.parameters()) <= 1_000_000


@pytest.mark.parametrize("topic, level, least", [
    ("chains", 7, 0.9), ("math", 1, 0.6), ("strings", 1, 0.8)])
def test_the_shipped_path_answers_what_its_frozen_model_cannot(tiny, topic, level, least):
    """The claim of the README, on 40 test problems; the bounds lie far below what was measured."""
    model, tokenizer = tiny
    problems = [make_problem("test", i, topic=topic, level=level) for i in range(40)]
    frozen, ours = (
        [a.right for a in answer_problems(model, tokenizer, TASK, problems, Settings(steps=steps))]
        for steps in (0, 8)
    )
    assert sum(frozen) / 40 <= 0.1 and sum(ours) / 40 >= least


def test_harder_chains_need_more_steps_and_get_them(tiny):
    """Six hops: out of reach of two steps, and found by eight, by the stop rule and by dopri5."""
    model, tokenizer = tiny
    easy, hard = ([make_problem("test", i, topic="chains", level=level) for i in range(40)]
                  for level in (2, 6))
    ways = {
        "few": Settings(steps=2),
        "many": Settings(steps=8),
        "stopped": Settings(steps=16, stop_unchanged=2),
        "dopri5": Settings(solver="dopri5"),
    }
    right, spent = {}, {}
    for name, settings in ways.items():
        for level, problems in (("easy", easy), ("hard", hard)):
            answers = answer_problems(model, tokenizer, TASK, problems, settings)
            right[name, level] = sum(a.right for a in answers) / 40
            spent[name, level] = sum(a.nfe[0] for a in answers) / 40
    assert right["few", "hard"] <= 0.1 < 0.9 <= right["few", "easy"]
    for name in ("many", "stopped", "dopri5"):
        assert min(right[name, "easy"], right[name, "hard"]) >= 0.9
    # what was measured: 5 and 9, 22 and 39 evaluations
    assert spent["stopped", "hard"] >= spent["stopped", "easy"] + 3
    assert spent["dopri5", "hard"] >= 1.3 * spent["dopri5", "easy"]


def test_answers_are_graded_and_cut_off_ones_are_wrong(tiny):
    model, tokenizer = tiny
    problems = [make_problem("test", i, topic="strings", level=1) for i in range(6)]
    answers = answer_problems(model, tokenizer, TASK, problems, Settings(steps=4))
    assert all(a.right == (a.text == p.answer) for a, p in zip(answers, problems))


def test_an_answer_must_end_by_itself_to_be_right(tiny):
    """The right letters without the stop token behind them are wrong; one token more is enough."""
    model, tokenizer = tiny
    problems = [make_problem("test", i, topic="strings", level=1) for i in range(40)]
    answers = answer_problems(model, tokenizer, TASK, problems, Settings(steps=2))
    right = next(i for i, answer in enumerate(answers) if answer.right)
    problem, length = problems[right], len(answers[right].ids)
    for room, expected in ((length, False), (length + 1, True)):
        settings = Settings(steps=2, max_new_tokens=room)
        (again,) = answer_problems(model, tokenizer, TASK, [problem], settings)
        assert again.text == problem.answer and again.right == expected


def test_changes_are_counted_by_direction():
    before = torch.tensor([0, 0, 0, 1, 1, 1, 1]).bool()
    after = torch.tensor([1, 1, 0, 0, 1, 1, 1]).bool()
    assert changes(before, after) == {"tokens": 7, "fixed": 2, "broken": 1}


@torch.no_grad()
def test_forced_tokens_are_those_of_one_position_after_the_other(tiny):
    """Each position read alone, with the same noise, by the sampler's own functions."""
    model, tokenizer = tiny
    problems = [make_problem("test", i, topic="math", level=1) for i in range(2)]
    settings, expected = Settings(steps=3), []
    for number, problem in enumerate(problems):
        ids, mask, _, label, _ = TASK.reference(problem, tokenizer)
        places = [k for k in range(1, len(ids)) if mask[k]]
        noise = torch.randn(
            len(places), model.config.width, generator=torch.Generator().manual_seed(number)
        )
        for k, x_0 in zip(places, model.config.sigma * noise):
            states = model.read(torch.tensor(ids[None, :k])).last()
            field = VelocityField(model, states, class_ids=torch.tensor([label]))
            solution = odeint(field, x_0[None, None], "euler", 3)
            logits = field.final_logits(solution.x, solution.prediction)
            expected.append(int(logits.argmax()) == ids[k])
    _, found = evaluation.forced_tokens(model, tokenizer, TASK, problems, settings, 0)
    assert found.tolist() == expected and 0 < sum(expected)


def test_the_seed_of_eval_reaches_problems_and_noise(tiny):
    model, tokenizer = tiny
    problems = [make_problem("test", i, topic="math", level=2) for i in range(12)]
    settings = Settings(steps=2, temperature=1.0, estimate="sample")
    texts = [
        [a.text for a in answer_problems(model, tokenizer, TASK, problems, settings, seed)]
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert TASK.problem(("math", 1), 0, 0) != TASK.problem(("math", 1), 0, 1)


@pytest.mark.parametrize("estimate", ["argmax", "sample", "average"])
def test_eval_prints_the_table_and_writes_every_setting(tmp_path, capsys, estimate):
    out = tmp_path / "eval.json"
    evaluation.main(
        [
            "--problems",
            "3",
            "--steps",
            "1",
            "2",
            "--temperatures",
            "0",
            "1",
            "--topics",
            "strings",
            "--estimate",
            estimate,
            "--guidance",
            "0",
            "1",
            "--out",
            str(out),
            # no step size suits a field that is drawn anew at every call
            *(["--solvers", "euler"] if estimate == "sample" else ["--rtol", "0.3"]),
        ]
    )
    columns = 4 if estimate == "sample" else 5
    printed, result = capsys.readouterr().out, json.loads(out.read_text(encoding="utf-8"))
    for word in (
        "frozen",
        "euler 1",
        "euler 2",
        *(["dopri5"] if columns == 5 else []),
        "euler 2 stop 2",
        "calibration error",
        "strings 1-2",
        "strings    1",
        "NFE/token",
        "MFLOP/token",
        "temperature 1",
        "fixed",
        "broken",
        "w = 0",
    ):
        assert word in printed
    assert (
        len(result["accuracy"]) == 2 * 2 * columns
        and {"args", "commit", "torch", "machine", "base_sha256", "guidance", "fixed_and_broken"}
        <= result.keys()
    )
    cells = {(r["group"], r["temperature"], r["column"]): r for r in result["accuracy"]}
    assert (
        cells["strings    1", 0.0, "frozen"]["nfe_per_token"] == 0
        and cells["strings    1", 0.0, "euler 2"]["nfe_per_token"] == 3
    )
    assert all(
        0 <= r["low"] <= r["accuracy"] <= r["high"] <= 1 and r["seconds"] > 0
        for r in result["accuracy"]
    )
    assert not list(tmp_path.glob("*.part"))


def test_a_model_without_a_path_is_scored_alone(tmp_path, capsys):
    """What --method=lora and full leave behind.

    The baselines' numbers come from the same problems and the same command.
    """
    for name in ("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    evaluation.main(
        [
            f"--init_from={tmp_path}",
            "--problems",
            "3",
            "--topics",
            "math",
            "--temperatures",
            "0",
            "--out",
            str(tmp_path / "e.json"),
        ]
    )
    result = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert (
        {r["column"] for r in result["accuracy"]} == {"frozen"}
        and not result["guidance"]
        and not result["fixed_and_broken"]
    )
    assert "no diffusion path: only the model itself is scored" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--problems", "0"], r"--problems = 0 is out of range; allowed: 1 or more"),
        (["--steps", "0"], r"--steps = 0 is out of range"),
        (["--draws", "0"], r"--draws = 0 is out of range; allowed: 1 or more"),
        (["--init_from", "nowhere"], r"unknown model 'nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluation.main(flags)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and re.search(message, error)
