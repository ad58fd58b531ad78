"""eval.py and the embedded model: intervals, counts of arithmetic, the table.

And the README's claims about the shipped path.
"""

import hashlib
import json
import re
import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import eval as evaluation
import sample
from conftest import LLAMA, exit_status, generator, make_ids, make_l2d
from data.checkpoints.hub import resolve
from data.flags.eval import fill_defaults
from data.parts.draws import row_generator
from data.results import flops
from data.results.statistics import calibration, changes, rank_correlation, ratio, wilson
from data.results.tables import print_changes
from data.tasks import TASKS
from data.text import chat
from data.tiny.topics import make_problem
from data.training.batches import collate
from diffusion import L2D, VelocityField
from sample import Settings, answer_problems, forced_log_p, knows_classes, load_model
from solvers import odeint

TINY = resolve("tiny")
TASK = TASKS["tiny"]


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


def some(count, **kind):
    """The first test problems of a topic and level."""
    return [make_problem("test", i, **kind) for i in range(count)]


# --- statistics -----------------------------------------------------------------------------------

@pytest.mark.parametrize("right, n, low, high", [
    (0, 100, 0.0, 0.0370),
    (50, 100, 0.4038, 0.5962),
    (100, 100, 0.9630, 1.0),
    (3, 8, 0.1368, 0.6943),
])
def test_wilson_interval_against_published_values(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=2e-4)


@pytest.mark.parametrize("x, y, rho", [
    ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
    ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
    ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207827),  # scipy.stats.spearmanr
    ([1, 2, 3], [5, 5, 5], None),
])
def test_rank_correlation_against_published_values(x, y, rho):
    assert rank_correlation(x, y) == (rho if rho is None else pytest.approx(rho))


def test_calibration_is_the_distance_of_confidence_and_accuracy():
    # four tokens predicted with probability 0.75, three of them right; one with 0.2, right; and one
    # with 0.9, wrong, which does not make up for it
    found = calibration([0.75] * 4 + [0.2, 0.9], [1, 1, 1, 0, 1, 0])
    assert found == {"tokens": 6, "accuracy": 4 / 6, "confidence": pytest.approx(4.1 / 6),
                     "ece": pytest.approx((0.8 + 0.9) / 6)}
    assert calibration([1.0], [1])["ece"] == 0


def test_changes_are_counted_by_direction():
    before = torch.tensor([0, 0, 0, 1, 1, 1, 1]).bool()
    after = torch.tensor([1, 1, 0, 0, 1, 1, 1]).bool()
    assert changes(before, after) == {"tokens": 7, "fixed": 2, "broken": 1}


def test_fixed_tokens_are_those_that_more_steps_made_right(monkeypatch, capsys):
    """Of three tokens 2 steps fix two and break one; 4 steps keep what they are."""
    right = {0: [0, 0, 1], 2: [1, 1, 0], 4: [1, 1, 0]}

    def forced(model, tokenizer, task, problems, settings, seed, noises):
        found = torch.tensor(right[settings.steps]).bool()
        return torch.full((3,), 0.5), found

    monkeypatch.setattr(evaluation, "forced_tokens", forced)
    broken, _ = evaluation.token_tables(None, None, None, [], "euler", [2, 4], {}, 1, 0)
    common = {"solver": "euler", "tokens": 3}
    assert broken == [
        {**common, "from": 0, "to": 2, "fixed": 2, "broken": 1},
        {**common, "from": 0, "to": 4, "fixed": 2, "broken": 1},
        {**common, "from": 2, "to": 4, "fixed": 0, "broken": 0}]
    print_changes(broken)
    assert "frozen ->   2 steps   fixed     2   broken     1\n" in capsys.readouterr().out


# --- arithmetic -----------------------------------------------------------------------------------

FULL_HEADS = {**LLAMA, "num_key_value_heads": 4}
MATRICES = [(4, False), (4, True), (None, False)]


@pytest.mark.parametrize("refined", [
    {}, {"self_conditioning": True}, {"self_conditioning": True, "prediction_words": 3}])
@pytest.mark.parametrize("rank, merged", MATRICES)
@pytest.mark.parametrize("estimate", ["argmax", "average"])
@pytest.mark.parametrize("solver", ["euler", "dopri5"])
@torch.no_grad()
def test_arithmetic_is_the_count_of_torch(rank, merged, estimate, solver, refined):
    """Matrix products of one evaluation of the path, from shapes alone (attention: one query).

    dopri5 costs the same: the modulation is looked up by its time, and V is made once.
    """
    l2d = make_l2d(FULL_HEADS, rank=rank, **refined)
    l2d.merge_lora(merged)
    length = 12
    field = VelocityField(l2d, l2d.lm.read(make_ids(1, length)).last(), estimate)
    x = torch.randn(1, 1, 16)
    t = torch.full((1,), 0.5) if solver == "dopri5" else 0.5
    # the first call fills the table of the modulation
    _, prediction = field(t, x)
    with FlopCounterMode(display=False) as counter:
        field(t, x, prediction)
    settings = Settings(steps=1, estimate=estimate, solver=solver)
    one, none = (flops.flops_per_token(l2d, nfe, length, settings) for nfe in (2, 1))
    # torch does not count fused attention on every device
    attention = 4 * 2 * length * 32
    assert counter.get_total_flops() in (one - none, one - none - attention)


@pytest.mark.parametrize("rank, merged", MATRICES)
@torch.no_grad()
def test_own_kv_costs_one_token_through_the_layers_of_the_path(rank, merged):
    l2d = make_l2d(FULL_HEADS, rank=rank, own_kv=True)
    l2d.merge_lora(merged)
    ids = make_ids(1, 1)
    # the first call fills the table of the modulation
    l2d.read(ids)
    with FlopCounterMode(display=False) as counter:
        l2d.read(ids)
    # in two layers of the frozen model, and in all of the path's but the last
    attention = 3 * 4 * 1 * 32
    # the evaluation at t = 0 is the head, which reading does not need
    expected = flops.flops_per_token(l2d, 1, 1, Settings()) - flops.matrix_flops(l2d.lm.head)
    assert counter.get_total_flops() in (expected, expected - attention)


def test_guidance_costs_all_evaluations_twice():
    l2d = make_l2d(FULL_HEADS, classes=2)
    reading = flops.frozen_flops(l2d.lm, 12)
    one, two = (flops.flops_per_token(l2d, nfe, 12, Settings(guidance=w)) - reading
                for nfe, w in ((9, 1), (18, 2)))
    assert two == 2 * one


# --- the shipped model ----------------------------------------------------------------------------

def test_the_shipped_files_are_those_of_their_readme():
    text = (TINY / "README.md").read_text(encoding="utf-8")
    for name in ("model.safetensors", "path.safetensors", "paper/path.safetensors"):
        assert hashlib.sha256((TINY / name).read_bytes()).hexdigest() in text, name
    assert all(path.stat().st_size <= 4e6 for path in TINY.rglob("*.safetensors"))


def test_the_shipped_base_is_small_and_has_a_path(tiny):
    model, _ = tiny
    assert isinstance(model, L2D)
    assert 3 <= model.lm.config.layers <= 5
    assert sum(p.numel() for p in model.lm.parameters()) <= 1_000_000


@pytest.mark.parametrize("topic, level, least", [
    ("chains", 7, 0.9), ("math", 1, 0.6), ("strings", 1, 0.8)])
def test_the_shipped_path_answers_problems_that_its_frozen_model_cannot(tiny, topic, level, least):
    """The claim of the README, on 40 test problems; the bounds lie far below the measurements."""
    model, tokenizer = tiny
    problems = some(40, topic=topic, level=level)
    frozen, ours = (
        [a.right for a in answer_problems(model, tokenizer, TASK, problems, Settings(steps=steps))]
        for steps in (0, 8))
    assert sum(frozen) / 40 <= 0.1
    assert sum(ours) / 40 >= least


def test_harder_chains_need_more_steps_and_get_them(tiny):
    """Six hops: out of reach of two steps, and found by eight, by the stop rule and by dopri5."""
    model, tokenizer = tiny
    ways = {
        "few": Settings(steps=2),
        "many": Settings(steps=8),
        "stopped": Settings(steps=16, stop_unchanged=2),
        "dopri5": Settings(solver="dopri5"),
    }
    right, spent = {}, {}
    for level in (2, 6):
        problems = some(40, topic="chains", level=level)
        for name, settings in ways.items():
            answers = answer_problems(model, tokenizer, TASK, problems, settings)
            right[name, level] = sum(a.right for a in answers) / 40
            spent[name, level] = sum(a.nfe[0] for a in answers) / 40
    assert right["few", 6] <= 0.1 < 0.9 <= right["few", 2]
    for name in ("many", "stopped", "dopri5"):
        assert min(right[name, 2], right[name, 6]) >= 0.9
    # measured: 5 and 9, 22 and 39 evaluations
    assert spent["stopped", 6] >= spent["stopped", 2] + 3
    assert spent["dopri5", 6] >= 1.3 * spent["dopri5", 2]


# --- answers and forced tokens --------------------------------------------------------------------

def test_an_answer_must_end_by_itself_to_be_right(tiny):
    """The right letters without the stop token behind them are wrong; one token more is enough."""
    model, tokenizer = tiny
    problems = some(40, topic="strings", level=1)
    answers = answer_problems(model, tokenizer, TASK, problems, Settings(steps=2))
    assert all(a.right == (a.text == p.answer) for a, p in zip(answers, problems))
    right = next(i for i, answer in enumerate(answers) if answer.right)
    problem, length = problems[right], len(answers[right].ids)
    for room, expected in ((length, False), (length + 1, True)):
        settings = Settings(steps=2, max_new_tokens=room)
        again, = answer_problems(model, tokenizer, TASK, [problem], settings)
        assert again.text == problem.answer
        assert again.right == expected


def test_the_seed_of_eval_reaches_problems_and_noise(tiny):
    model, tokenizer = tiny
    # sure of most tokens, so hot
    problems = some(12, topic="math", level=2)
    settings = Settings(steps=2, temperature=3.0, estimate="sample")
    texts = [
        [a.text for a in answer_problems(model, tokenizer, TASK, problems, settings, seed)]
        for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert TASK.problem(("math", 1), 0, 0) != TASK.problem(("math", 1), 0, 1)


def test_every_problem_has_a_noise_of_its_own_wherever_it_stands(tiny, monkeypatch):
    seeds, original = [], sample.generate

    def generate(*args):
        seeds.extend(args[-1])
        return original(*args)

    monkeypatch.setattr(sample, "generate", generate)
    problems = some(5, topic="strings", level=1)
    for order in (problems, problems[::-1]):
        answer_problems(*tiny, TASK, order, Settings(steps=1), 0, batch_size=3)
    assert len(set(seeds)) == 5
    assert seeds[5:] == seeds[4::-1]


def test_ratio_is_that_of_all_tokens_with_the_spread_of_examples():
    sums, counts = torch.tensor([2.0, 6.0, 1.0]), torch.tensor([2.0, 3.0, 1.0])
    middle, low, high = ratio(sums, counts)
    assert middle == pytest.approx(1.5)
    # residuals -1, 1.5, -0.5: √(3/2 · 3.5)/6
    assert high - middle == pytest.approx(1.959964 * (5.25 ** 0.5) / 6)
    assert middle - low == pytest.approx(high - middle)
    assert ratio(counts, counts) == (1.0, 1.0, 1.0)


# --- held-out text --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def text_dir(tmp_path_factory):
    """Held-out sums of different lengths, prepared by data/text/chat.py."""
    root = tmp_path_factory.mktemp("text")
    rows = [{"prompt": f"({i}*3)+{j}?", "response": f"{3 * i}+{j}={3 * i + j} #### {3 * i + j}"}
            for i in range(2, 9) for j in (4, 15)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [str(root / "rows.jsonl"), f"--tokenizer={TINY}", f"--out_dir={root / 'data'}",
             "--block_size=128", "--val_fraction=0.5"]
    assert exit_status(chat.main, words) == 0
    return root / "data"


def measured(text_dir, out, *more):
    words = ["--task=text", f"--data={text_dir}", f"--out={out}", *more]
    assert exit_status(evaluation.main, words) == 0
    return {row["column"]: row for row in json.loads(out.read_text())["text"]}


def test_nats_of_held_out_text_are_those_of_each_token_alone(tiny, text_dir, tmp_path):
    found = measured(text_dir, tmp_path / "a.json", "--steps", "2", "--draws=2", "--solvers",
                     "euler", "midpoint")
    model, tokenizer = tiny
    rows = TASKS["text"].rows(str(text_dir), tokenizer, None)
    nats = tokens = 0
    with torch.no_grad():
        for ids, mask, *_ in rows:
            log_p = model.lm(torch.tensor(ids[None])).log_softmax(-1)[0]
            places = [k for k in range(1, len(ids)) if mask[k]]
            nats -= sum(float(log_p[k - 1, ids[k]]) for k in places)
            tokens += len(places)
    assert found["frozen"]["tokens"] == tokens
    assert found["frozen"]["nats"][0] == pytest.approx(nats / tokens, rel=1e-4)
    assert found["frozen"]["gain"] == [0, 0, 0]
    for name, row in found.items():
        gain = found["frozen"]["nats"][0] - row["nats"][0]
        assert row["gain"][0] == pytest.approx(gain, abs=1e-6), name
    # two draws of two evaluations and the final one
    assert found["euler 2"]["nfe_per_token"] == 6
    assert found["euler 2"]["nats"] != found["frozen"]["nats"]
    # its neighbours change nothing
    again = measured(text_dir, tmp_path / "b.json", "--steps", "2", "--draws=2", "--batch_size=1",
                     "--solvers", "euler", "midpoint")
    for name, row in found.items():
        assert again[name]["nats"] == pytest.approx(row["nats"], rel=1e-3), name


@pytest.mark.parametrize("words, message", [
    ([], "--task text needs --data=DIR"),
    (["--data=DIR", "--shots=2"], "--shots"),
    (["--data=DIR", "--temperatures", "0"], "--temperatures = 0.0 is out of range; allowed: 0.01"),
    (["--data=DIR", "--steps=0", "--seed=1"], "--seed"),
    (["--data=DIR", "--problems=4"], "--problems"),
])
def test_text_refuses_what_would_do_nothing(text_dir, words, message, tmp_path, capsys):
    words = [word.replace("DIR", str(text_dir)) if "--data" in word else word for word in words]
    words += ["--task=text", f"--out={tmp_path / 'x.json'}"]
    assert exit_status(evaluation.main, words) == 2
    assert message in capsys.readouterr().err


def test_a_token_of_the_topics_stands_behind_the_prompt_and_half_of_the_answer(tiny, monkeypatch):
    monkeypatch.setattr(evaluation, "flops_per_token", lambda model, nfe, length, settings: length)
    model, tokenizer = tiny
    problems = some(4, topic="math", level=2)
    settings = Settings(steps=1)
    answers = answer_problems(model, tokenizer, TASK, problems, settings, 0)
    lengths = [len(TASK.prompt(problem, tokenizer)) + len(answer.nfe) / 2
               for problem, answer in zip(problems, answers)]
    cell = evaluation.measure(model, tokenizer, TASK, problems, settings, 0)
    assert cell["flops_per_token"] == pytest.approx(sum(lengths) / 4, abs=0.5)


def test_text_at_a_lower_temperature_is_of_the_sharpened_probabilities(
        tiny, text_dir, tmp_path, monkeypatch):
    out, solved = tmp_path / "a.json", []
    forced = evaluation.forced_log_p
    monkeypatch.setattr(evaluation, "forced_log_p", lambda model, batch, settings, *others:
                        solved.append(settings.steps) or forced(model, batch, settings, *others))
    measured(text_dir, out, "--steps", "1", "--draws=1", "--temperatures", "1", "0.5")
    table = json.loads(out.read_text())["text"]
    assert [(row["column"], row["settings"]["temperature"]) for row in table] == [
        ("frozen", 1), ("euler 1", 1), ("frozen", 0.5), ("euler 1", 0.5)]
    # the temperature changes no ODE
    assert solved == [0, 1]
    assert table[1]["seconds"] == table[3]["seconds"] > 0
    model, tokenizer = tiny
    nats = right = entropy = tokens = 0
    with torch.no_grad():
        for ids, mask, *_ in TASKS["text"].rows(str(text_dir), tokenizer, None):
            p = model.lm(torch.tensor(ids[None])).softmax(-1)[0] ** 2
            p /= p.sum(-1, keepdim=True)
            for k in (k for k in range(1, len(ids)) if mask[k]):
                nats -= float(p[k - 1, ids[k]].log())
                right += float(p[k - 1, ids[k]])
                entropy -= float(torch.xlogy(p[k - 1], p[k - 1]).sum())
                tokens += 1
    assert table[2]["nats"][0] == pytest.approx(nats / tokens, rel=1e-3)
    assert table[2]["p"][0] == pytest.approx(right / tokens, rel=1e-3)
    assert table[2]["entropy"] == pytest.approx(entropy / tokens, rel=1e-3)
    assert table[2]["gain"] == [0, 0, 0]
    assert table[2]["entropy"] < table[0]["entropy"]


@torch.no_grad()
def test_the_mean_of_several_noises_is_that_of_each_alone(tiny):
    model, tokenizer = tiny
    batch = collate([TASK.reference(problem, tokenizer) for problem in some(2, topic="math")])
    (one, nfe), (two, twice) = (forced_log_p(model, batch, Settings(steps=2), [0, 1], draws)
                                for draws in (1, 2))
    assert torch.equal(twice, 2 * nfe)
    one, two = one.exp(), two.exp()
    assert torch.allclose(two.sum(-1), torch.ones(len(two)), atol=1e-5)
    assert not torch.equal(one, two)
    # the second noise alone
    assert float((2 * two - one).min()) > -1e-6


@torch.no_grad()
def test_sampled_estimates_of_forced_tokens_have_generators_of_their_own(tiny, monkeypatch):
    """By seed and place: a row's neighbours change nothing, another seed does."""
    model, tokenizer = tiny
    rows = [TASK.reference(problem, tokenizer) for problem in some(2, topic="math", level=2)]
    settings = Settings(steps=3, estimate="sample", estimate_temperature=8.0)
    both, _ = forced_log_p(model, collate(rows), settings, [5, 5], 1)
    alone = [forced_log_p(model, collate([row]), settings, [5], 1)[0] for row in rows]
    assert torch.allclose(both, torch.cat(alone), atol=1e-3)
    other, _ = forced_log_p(model, collate(rows[1:]), settings, [6], 1)
    assert not torch.allclose(other, alone[1], atol=1e-3)
    made = []
    monkeypatch.setattr(sample, "row_generator",
                        lambda *of: made.append(of) or row_generator(*of))
    batch = collate(rows)
    forced_log_p(model, batch, settings, [5, 6], 1)
    # each place of a row once
    assert len(set(made)) == len(made) == len(batch.targets.y)
    assert [seed for seed, _ in made] == [5 + row for row in batch.targets.index[0].tolist()]


@torch.no_grad()
def test_forced_tokens_are_those_of_one_position_after_the_other(tiny):
    """Each position alone, with the same noise, by the sampler's own functions."""
    model, tokenizer = tiny
    problems = some(2, topic="math", level=1)
    expected = []
    for number, problem in enumerate(problems):
        ids, mask, _, label = TASK.reference(problem, tokenizer)
        places = [k for k in range(1, len(ids)) if mask[k]]
        noise = torch.randn(len(places), model.config.width, generator=generator(number))
        for k, x_0 in zip(places, model.config.sigma * noise):
            states = model.read(torch.tensor(ids[None, :k])).last()
            field = VelocityField(model, states, class_ids=torch.tensor([label]))
            solution = odeint(field, x_0[None, None], "euler", 3)
            logits = field.final_logits(solution.x, solution.prediction)
            expected.append(int(logits.argmax()) == ids[k])
    _, found = evaluation.forced_tokens(model, tokenizer, TASK, problems, Settings(steps=3), 0)
    assert found.tolist() == expected
    assert any(expected)


@pytest.mark.parametrize("names", [None, list("abcde")])
def test_a_path_with_other_classes_gets_none_of_the_topics(names, tiny):
    _, tokenizer = tiny
    other = make_l2d(classes=5 if names else 2, class_names=names)
    assert knows_classes(tiny[0], TASK) and not knows_classes(other, TASK)
    assert not knows_classes(tiny[0].lm, TASK)
    problems, settings = some(2, topic="strings"), Settings(steps=2)

    def found():
        p, _ = evaluation.forced_tokens(other, tokenizer, TASK, problems, settings, 0)
        answers = answer_problems(other, tokenizer, TASK, problems, settings)
        return p.tolist(), [answer.ids for answer in answers]

    before = found()
    # whatever it has learned of its own classes
    with torch.no_grad():
        other.class_embedding.weight[:-1] += 1
    assert found() == before


def test_weights_of_guidance_are_compared_where_the_class_matters(tiny):
    problems = {(topic, 1): some(1, topic=topic, level=1) for topic in ("math", "strings")}
    rows = evaluation.guidance_table(*tiny, TASK, problems, [0.5], {}, 0)
    assert [row["group"] for row in rows] == [TASK.title(("strings", 1))]


# --- the command ----------------------------------------------------------------------------------

@pytest.mark.parametrize("words, columns", [
    # no step size suits a field that is drawn anew at every call
    ("--estimate sample --solvers euler", 4),
    ("--estimate argmax --rtol 0.3", 5),
])
def test_eval_prints_the_table_and_writes_every_setting(words, columns, tmp_path, capsys):
    out = tmp_path / "eval.json"
    evaluation.main(["--problems=3", "--topics", "strings", "--steps", "1", "2", "--guidance", "0",
                     "1", "--temperatures", "0", "1", f"--out={out}", *words.split()])
    printed, result = capsys.readouterr().out, json.loads(out.read_text(encoding="utf-8"))
    names = ["frozen", "euler 1", "euler 2", "euler 2 stop 2", "dopri5"][:columns]
    for word in (*names, "strings 1-2", "strings    1", "NFE/token", "MFLOP/token",
                 "temperature 1", "calibration error", "fixed", "broken", "w = 0"):
        assert word in printed
    assert result.keys() >= {"args", "commit", "torch", "machine", "base_sha256", "guidance",
                             "fixed_and_broken"}
    cells = {(cell["group"], cell["temperature"], cell["column"]): cell
             for cell in result["accuracy"]}
    assert len(cells) == len(result["accuracy"]) == 2 * 2 * columns
    assert cells["strings    1", 0.0, "frozen"]["nfe_per_token"] == 0
    assert cells["strings    1", 0.0, "euler 2"]["nfe_per_token"] == 3
    for cell in cells.values():
        assert 0 <= cell["low"] <= cell["accuracy"] <= cell["high"] <= 1
    assert not list(tmp_path.glob("*.part"))


def test_a_model_without_a_path_is_scored_alone(tmp_path, capsys):
    """As --method=lora and full leave it: the baselines answer the same problems."""
    for name in ("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    out = tmp_path / "e.json"
    evaluation.main([f"--init_from={tmp_path}", "--problems=3", "--topics=math",
                     "--temperatures=0", f"--out={out}"])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {cell["column"] for cell in result["accuracy"]} == {"frozen"}
    assert not result["guidance"]
    assert not result["fixed_and_broken"]
    assert "no diffusion path: only the model itself is scored" in capsys.readouterr().out


@pytest.mark.parametrize("flag, message", [
    ("--problems=0", "--problems = 0 is out of range; allowed: 1 or more"),
    ("--steps=0", "--steps = 0 is out of range"),
    ("--draws=0", "--draws = 0 is out of range; allowed: 1 or more"),
    ("--init_from=nowhere", "unknown model 'nowhere'"),
    ("--task=sums --samples=100000", "--samples = 100000 is out of range; allowed: 1 to 10000"),
])
def test_bad_input_is_one_line_and_exit_status_2(flag, message, capsys):
    assert exit_status(evaluation.main, flag.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_a_column_asked_for_twice_is_measured_once():
    args = evaluation.build_parser().parse_args(["--steps", "2", "1", "2", "--topics", "math",
                                                 "math"])
    fill_defaults(args)
    assert (args.steps, args.topics, args.solvers) == ([2, 1], ["math"], ["euler", "dopri5"])
