"""sample.py: generate() against plain loops without cache or batch, the cost of a token, sampling.

The command line is in test_cli.py.
"""

from functools import partial

import pytest
import torch

from conftest import (
    PROMPTS, ROOT, generator, make_ids, make_l2d, make_lm, p_value, path_logits)
from data.text.answer import Stop, TraceFirst
from data.text.tokenizer import load_tokenizer
from diffusion import L2D
from model import LM
from sample import Settings, choose, generate, next_p
from solvers import odeint

# predictions of random models change often; a loose tolerance keeps the tests short
ADAPTIVE = dict(solver="dopri5", rtol=0.5, atol=0.5)
SAMPLED = dict(temperature=1.0, estimate="sample")
SEEDS = [3, 4, 5, 6]


def ids_of(answers):
    return [answer.ids for answer in answers]


@torch.no_grad()
def greedy_by_hand(lm, prompt, count):
    """The frozen model, one sequence, everything computed again for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(lm(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


@torch.no_grad()
def l2d_by_hand(l2d, prompt, count, settings, seed, class_id=None):
    """The same with the diffusion path: no cache, no batch.

    The whole text goes through the path at every evaluation.
    """
    ids, g, Z = list(prompt), generator(seed), l2d.config.width
    mixture = [(1.0, None)]
    if class_id is not None:
        mixture = [(settings.guidance, class_id), (1 - settings.guidance, None)]
    for _ in range(count):
        text = torch.tensor([ids])

        def logits(x, t, label):
            whole = torch.cat((torch.zeros(1, len(ids) - 1, Z), x), dim=1)
            class_ids = None if label is None else torch.tensor([label])
            times = torch.full(text.shape, float(t))
            return path_logits(l2d, text, whole, times, class_ids)[:, -1:]

        def velocity(t, x, before):
            total = 0
            for weight, label in mixture:
                prediction = logits(x, t, label)
                point = prediction.softmax(-1) @ l2d.vocabulary()
                if settings.estimate == "argmax":
                    point = l2d.vocabulary()[prediction.argmax(-1)]
                total = total + weight * (point - x) / (1 - float(t))
            return total, None

        x_0 = l2d.config.sigma * torch.randn(1, Z, generator=g)[None]
        x_1 = odeint(velocity, x_0, settings.solver, settings.steps, settings.rtol, settings.atol).x
        ids.append(int(sum(weight * logits(x_1, 1.0, label) for weight, label in mixture).argmax()))
    return ids[len(prompt):]


# --- against plain loops --------------------------------------------------------------------------

def test_no_steps_is_the_frozen_model_greedily(family):
    l2d = make_l2d(family)
    expected = [greedy_by_hand(l2d.lm, prompt, 8) for prompt in PROMPTS]
    for model in (l2d, l2d.lm):
        answers = generate(model, PROMPTS, Settings(steps=0, max_new_tokens=8))
        assert ids_of(answers) == expected
        assert all(answer.nfe == [0] * 8 and not answer.stopped for answer in answers)


@pytest.mark.parametrize("options", [
    dict(solver="euler", steps=3),
    dict(solver="midpoint", steps=2),
    dict(solver="heun", steps=2),
    dict(solver="rk4", steps=2),
    dict(ADAPTIVE, max_new_tokens=2),
    dict(estimate="average", steps=3),
])
def test_cached_and_batched_equals_everything_computed_again(family, options):
    l2d, settings = make_l2d(family), Settings(**{"max_new_tokens": 3, **options})
    count = settings.max_new_tokens
    found = ids_of(generate(l2d, PROMPTS, settings, seeds=SEEDS))
    assert found == [l2d_by_hand(l2d, prompt, count, settings, seed)
                     for prompt, seed in zip(PROMPTS, SEEDS)]
    # the path matters
    assert found != [greedy_by_hand(l2d.lm, prompt, count) for prompt in PROMPTS]


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guided_text_equals_everything_computed_again(guidance):
    l2d, settings = make_l2d(classes=3), Settings(steps=3, guidance=guidance, max_new_tokens=4)
    classes = [0, 2, 1, 3]
    found = ids_of(generate(l2d, PROMPTS, settings, class_ids=classes, seeds=SEEDS))
    assert found == [l2d_by_hand(l2d, prompt, 4, settings, seed, class_id)
                     for prompt, seed, class_id in zip(PROMPTS, SEEDS, classes)]


# --- seeds, batches, stopping ---------------------------------------------------------------------

def test_the_class_reaches_the_probabilities_of_the_next_token():
    l2d, settings = make_l2d(classes=3), Settings(steps=3, guidance=2.5, max_new_tokens=1)
    classes = [0, 2, 1, 3]
    p, nfe = next_p(l2d, PROMPTS, settings, SEEDS, 1, classes)
    assert nfe == [8] * 4
    expected = ids_of(generate(l2d, PROMPTS, settings, class_ids=classes, seeds=SEEDS))
    assert p[0].argmax(-1)[:, None].tolist() == expected
    # the last class is none
    without, _ = next_p(l2d, PROMPTS, settings, SEEDS, 1)
    same = [torch.allclose(*pair, atol=1e-5) for pair in zip(p[0], without[0])]
    assert same == [False, False, False, True]


@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_same_seeds_same_answers(options):
    l2d, settings = make_l2d(), Settings(max_new_tokens=4, **options)
    first, again = (generate(l2d, PROMPTS, settings, seeds=[1, 2, 3, 4]) for _ in range(2))
    assert first == again
    assert ids_of(generate(l2d, PROMPTS, settings, seeds=[5, 6, 7, 8])) != ids_of(first)


@pytest.mark.parametrize("way", [
    dict(steps=0),
    dict(solver="midpoint", steps=3),
    # the likeliest token jumps, and the last bits decide about a step across a jump; they depend
    # on the size of the batch, so the adaptive solver is compared with the estimate without jumps
    dict(ADAPTIVE, estimate="average", stop_unchanged=2),
    dict(ADAPTIVE, estimate="average"),
    dict(SAMPLED, steps=5),
    # some sequences go on with their own generators when others have finished
    dict(SAMPLED, steps=8, stop_unchanged=1, estimate_temperature=5.0),
    dict(steps=6, stop_unchanged=2, guidance=2.0),
])
@pytest.mark.parametrize("path", [
    dict(),
    dict(self_conditioning=True),
    dict(self_conditioning=True, own_kv=True),
    # by larger weights its predictions are chaotic: they change the keys that make the next ones
    dict(self_conditioning=True, self_kv=True, perturb=0.1),
])
def test_a_sequence_alone_equals_the_same_sequence_in_a_batch(family, path, way):
    """Tokens and costs, not bits: products of batched matrices are rounded differently."""
    l2d, settings = make_l2d(family, classes=3, **path), Settings(max_new_tokens=3, **way)
    classes = [0, 2, 1, 1]
    batch = generate(l2d, PROMPTS, settings, class_ids=classes, seeds=SEEDS)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(l2d, [prompt], settings, class_ids=[classes[i]], seeds=[SEEDS[i]])
        assert alone == batch[i:i + 1]


@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 4, 2), (3, 40, 1)])
@pytest.mark.parametrize("path", [dict(), dict(own_kv=True)])
def test_a_common_beginning_is_read_once_and_changes_nothing(family, path, lengths, monkeypatch):
    l2d, settings = make_l2d(family, **path), Settings(steps=2, max_new_tokens=3)
    start = make_ids(1, 20)[0].tolist()
    prompts = [start + make_ids(1, n, seed=n)[0].tolist() for n in lengths]
    shapes = watched_reads(monkeypatch)
    batch = generate(l2d, prompts, settings, seeds=[1, 2, 3])
    assert shapes[:2] == [(1, 20), (3, max(lengths))]
    for i, prompt in enumerate(prompts):
        alone = generate(l2d, [prompt], settings, seeds=[i + 1])
        assert alone[0].ids == batch[i].ids


def watched_reads(monkeypatch):
    """A list that every call of LM.read extends by the shape of its ids."""
    shapes, read = [], LM.read

    def watched(self, ids, *rest, **more):
        shapes.append(tuple(ids.shape))
        return read(self, ids, *rest, **more)

    monkeypatch.setattr(LM, "read", watched)
    return shapes


@pytest.mark.parametrize("options", [
    dict(steps=0), dict(steps=4), ADAPTIVE, dict(steps=4, guidance=2.0), dict(SAMPLED, steps=4)])
def test_finished_sequences_leave_and_the_others_do_not_change(family, options, monkeypatch):
    l2d, classes = make_l2d(family, classes=3), [0, 1, 2, 1]
    settings = Settings(max_new_tokens=6, **options)
    free = generate(l2d, PROMPTS, settings, class_ids=classes)

    def lengths(stop):
        return [answer.ids.index(stop) if stop in answer.ids else 6 for answer in free]

    # the token at which they stop at the most different times
    stop = max((token for answer in free for token in answer.ids),
               key=lambda token: len(set(lengths(token))))
    expected = lengths(stop)
    assert len(set(expected)) > 1
    shapes = watched_reads(monkeypatch)
    answers = generate(l2d, PROMPTS, settings, Stop({stop}), class_ids=classes)
    for answer, whole, length in zip(answers, free, expected):
        assert answer.ids == whole.ids[:length]
        assert answer.stopped == (length < 6)
        # the stop token has a cost too
        assert answer.nfe == whole.nfe[:length + 1]
    running = [sum(length > n for length in expected) for n in range(5)]
    assert [rows for rows, _ in shapes] == [4, *filter(None, running)]


def test_a_watcher_sees_every_evaluation_and_every_token():
    model, settings = make_l2d(), Settings(steps=3, max_new_tokens=8)
    seen, evaluations = {}, []

    def watch(batch, rows, t, logits, tokens=None, solution=None):
        assert logits.shape == (len(rows), 1, 258)
        evaluations.append(len(rows))
        if tokens is None:
            return
        assert t == 1.0
        assert len(tokens) == len(batch.answers)
        for answer, token in zip(batch.answers, tokens):
            seen.setdefault(id(answer), []).append(token)

    free = generate(model, PROMPTS, settings)
    answers = generate(model, PROMPTS, settings, Stop({free[0].ids[3]}), watch=watch)
    assert answers[0].stopped
    assert sum(evaluations) == sum(sum(answer.nfe) for answer in answers)
    for answer in answers:
        # the stop token is seen too
        assert seen[id(answer)][:len(answer.ids)] == answer.ids
        assert len(seen[id(answer)]) == len(answer.nfe)


# --- stop strings ---------------------------------------------------------------------------------

class Letters:
    """A tokenizer whose token i is a piece of text."""

    def __init__(self, pieces):
        self.pieces = [piece.encode() for piece in pieces]

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


PIECES = ["a", "\n\n", "Que", "stion", ":", "x\n", "\nQ", "é", "b"]


@pytest.mark.parametrize("ids, strings, at, text", [
    ([0, 1, 2, 3, 4, 8], ["\n\nQuestion:"], 4, "a"),  # over four tokens
    ([0, 5, 6, 8], ["\nQ"], 2, "ax\n"),               # begins and ends with a token
    ([0, 5, 6, 8], ["\n\n"], 2, "ax"),                # begins and ends inside tokens
    ([8, 7, 0], ["é"], 1, "b"),                       # two bytes, one token
    ([0, 8, 0], ["zz", "b"], 1, "a"),                 # any of several
    ([0, 5], ["\n", "x"], 1, "a"),                    # of two in one token the earlier
    ([0, 8, 0], ["zz"], None, "aba"),
])
def test_a_stop_string_is_found_at_the_token_that_completes_it(ids, strings, at, text):
    stop = Stop(set(), strings, Letters(PIECES))
    found = [n for n in range(len(ids)) if stop.found(ids[:n + 1])]
    assert found[:1] == ([] if at is None else [at])
    end = len(ids) if at is None else at + 1
    assert stop.text(ids[:end]) == text


@pytest.mark.parametrize("steps", [0, 4])
def test_a_stop_string_ends_its_answer_and_no_other(steps):
    l2d, settings = make_l2d(), Settings(steps=steps, max_new_tokens=8)
    tokenizer = Letters([f"<{i}>" for i in range(258)])
    free = generate(l2d, PROMPTS, settings)
    ids = free[0].ids
    # from inside one token into the next
    string = f"{ids[2]}><{ids[3]}"
    assert all(string not in tokenizer.decode(answer.ids) for answer in free[1:])
    cut = generate(l2d, PROMPTS, settings, Stop(set(), [string], tokenizer))
    assert cut[0].stopped
    assert cut[0].ids == ids[:4]
    assert cut[0].nfe == free[0].nfe[:4]
    assert cut[0].text == tokenizer.decode(ids[:2]) + "<"
    assert ids_of(cut[1:]) == ids_of(free[1:])


def test_stop_texts_of_the_command_line_may_name_special_tokens():
    tokenizer = load_tokenizer(ROOT / "data" / "tiny")
    stop = Stop.of(tokenizer, ["<|end_of_text|>", "xy"])
    assert stop.strings == ["xy"]
    assert stop.ids == set(tokenizer.stop_ids)
    assert tokenizer.special["<|end_of_text|>"] in stop.ids


# --- costs ----------------------------------------------------------------------------------------

# 4 intervals and the final evaluation
@pytest.mark.parametrize("solver, cost", [("euler", 5), ("midpoint", 9), ("heun", 9), ("rk4", 16)])
@pytest.mark.parametrize("guidance, copies", [(0, 1), (1, 1), (2, 2)])
def test_cost_of_a_token(solver, cost, guidance, copies, monkeypatch):
    """The reported cost against every call of the network.

    With guidance both copies are one call, of twice the batch. The evaluation at t = 0 is counted
    though it costs nothing: it is the frozen model's.
    """
    sizes, original = [], L2D.last_hidden

    def last_hidden(self, x_t, *rest):
        sizes.append(len(x_t))
        return original(self, x_t, *rest)

    monkeypatch.setattr(L2D, "last_hidden", last_hidden)
    settings = Settings(steps=4, solver=solver, guidance=guidance, max_new_tokens=3)
    answers = generate(make_l2d(classes=2), PROMPTS[:2], settings, class_ids=[0, 1])
    assert [answer.nfe for answer in answers] == [[copies * cost] * 3] * 2
    assert sizes == [2 * copies] * (3 * (cost - 1))


@pytest.mark.parametrize("max_nfe, calls", [(1, 1), (2, 1), (6, 3), (7, 3), (16, 8)])
def test_a_budget_counts_both_copies_of_guidance(max_nfe, calls):
    """8 Euler steps would cost 16 with guidance; the final evaluation is not part of the budget."""
    settings = Settings(steps=8, guidance=2.0, max_nfe=max_nfe, max_new_tokens=2)
    answers = generate(make_l2d(classes=2), PROMPTS[:2], settings, class_ids=[0, 1])
    assert all(answer.nfe == [2 * (calls + 1)] * 2 for answer in answers)
    assert all(answer.unfinished == (0 if calls == 8 else 2) for answer in answers)


@pytest.mark.parametrize("options", [
    dict(solver="euler", steps=8, max_nfe=3),
    dict(solver="dopri5", rtol=1e-6, atol=1e-6, max_nfe=5),
])
def test_a_spent_budget_is_counted_and_the_text_goes_on(options):
    answers = generate(make_l2d(), PROMPTS, Settings(max_new_tokens=5, **options))
    for answer in answers:
        assert len(answer.ids) == answer.unfinished == 5
        assert max(answer.nfe) <= options["max_nfe"] + 1


# --- traces ---------------------------------------------------------------------------------------

def test_a_trace_holds_the_predictions_of_every_token_of_the_first_answer():
    l2d, settings = make_l2d(), Settings(steps=4, max_new_tokens=3)
    traced = generate(l2d, PROMPTS, settings, watch=TraceFirst())
    plain = generate(l2d, PROMPTS, settings)
    assert ids_of(traced) == ids_of(plain)
    assert [len(answer.traces) for answer in (*traced, *plain)] == [3] + [0] * 7
    predictions = traced[0].traces[1].predictions
    assert [t for t, _, _ in predictions] == [0.0, 0.25, 0.5, 0.75, 1.0]
    # at t = 0 the prediction is the frozen model's
    logits = l2d.lm(torch.tensor([PROMPTS[0] + traced[0].ids[:1]]))[0, -1]
    p, token = logits.softmax(-1).max(-1)
    assert predictions[0] == (0.0, int(token), pytest.approx(float(p), abs=1e-5))


def test_times_of_an_adaptive_trace_run_from_noise_to_data():
    settings = Settings(max_new_tokens=1, **ADAPTIVE)
    for l2d in (make_l2d(), make_l2d(perturb=0)):
        traced, = generate(l2d, PROMPTS[:1], settings, watch=TraceFirst())
        times = [t for t, _, _ in traced.traces[0].predictions]
        assert times[0] == 0
        assert times[-1] == 1
        assert max(times[:-1]) < 1
        assert len(times) == traced.nfe[0]
    # predictions without a change: Dormand and Prince's nodes, three steps of 1/4, then ½ and ¾
    nodes = [1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1]
    expected = [0.0] + [k / 4 + c / 4 for k in range(3) for c in nodes] + [0.875, 0.9375, 1.0]
    assert times == pytest.approx(expected)


# --- choosing the token ---------------------------------------------------------------------------

# a draw uses up a number, so with a path the second token's noise is another
@pytest.mark.parametrize("steps, count", [(0, 8), (2, 1)])
def test_the_narrowest_sampling_is_greedy(steps, count):
    l2d = make_l2d()

    def ids(**options):
        settings = Settings(steps=steps, max_new_tokens=count, **options)
        return ids_of(generate(l2d, PROMPTS, settings))

    for options in (dict(top_k=1), dict(top_p=1e-6), dict(top_k=1, top_p=0.5)):
        assert ids(temperature=1.0, **options) == ids()
    assert ids(temperature=1.0) != ids()
    # of two equal tokens the first reaches top_p alone
    settings = Settings(temperature=1.0, top_p=0.5)
    tokens = choose(torch.zeros(20, 2), settings, [generator(seed) for seed in range(20)])
    assert not tokens.any()


@pytest.mark.parametrize("options", [
    dict(temperature=1.0),
    dict(temperature=0.5),
    dict(temperature=2.0, top_k=6),
    dict(temperature=1.0, top_p=0.6),
    dict(temperature=2.0, top_k=5, top_p=0.4),
])
@torch.no_grad()
def test_sampled_tokens_follow_the_softmax(options):
    """3,000 first tokens of one prompt, a seed each; rare tokens are counted together."""
    lm, n = make_lm(), 3000
    settings = Settings(steps=0, max_new_tokens=1, **options)
    answers = generate(lm, [[7, 8]] * n, settings, seeds=range(n))
    counts = torch.tensor([answer.ids[0] for answer in answers]).bincount(minlength=258)
    p = (lm(torch.tensor([[7, 8]]))[0, -1] / options["temperature"]).softmax(-1)
    p, order = p.sort(descending=True)
    counts = counts[order]
    allowed = torch.arange(258) < options.get("top_k", 258)
    allowed &= p.cumsum(0) - p < options.get("top_p", 1.1)
    assert not counts[~allowed].any()
    p = p[allowed] / p[allowed].sum()
    counts = counts[allowed]
    common = int((p * n >= 10).sum())
    if common < len(p):
        p = torch.cat((p[:common], p[common:].sum(0, keepdim=True)))
        counts = torch.cat((counts[:common], counts[common:].sum(0, keepdim=True)))
    assert len(p) >= 3
    assert p_value(counts, p) > 1e-3


# --- refusals -------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    (dict(steps=-1), "steps = -1 is out of range; allowed: 0 to 1000000"),
    (dict(max_new_tokens=0), "max_new_tokens = 0"),
    (dict(temperature=-0.1), "temperature = -0.1"),
    (dict(temperature=float("nan")), "temperature = nan"),
    (dict(top_k=0), "top_k = 0"),
    (dict(top_p=0.0), "top_p = 0.0"),
    (dict(top_p=1.5), "top_p = 1.5 .* to 1"),
    (dict(max_nfe=0), "max_nfe = 0"),
    (dict(max_nfe=10**30), "max_nfe = 10{30} is out of range; allowed: 1 to 10{9}$"),
    (dict(top_k=10**30), "top_k = 10{30}"),
    (dict(steps=10**30), "steps = 10{30}"),
    (dict(rtol=1e308), "rtol = 1e\\+308"),
    (dict(temperature=1e308), "temperature = 1e\\+308"),
    (dict(rtol=0.0), "rtol = 0.0"),
    (dict(atol=0.0), "atol = 0.0"),
    (dict(stop_unchanged=0), "stop_unchanged = 0"),
    (dict(solver="rk5"), "solver 'rk5' is not supported; allowed: euler"),
    (dict(estimate="mode"), "estimate 'mode'"),
    (dict(estimate_temperature=0.0), "estimate_temperature = 0.0"),
    (dict(guidance=float("nan")), "guidance = nan"),
])
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


@pytest.mark.parametrize("make, prompts, steps, class_ids, message", [
    (make_lm, [[1]], 1, None, "no diffusion path, so --steps must be 0"),
    (make_lm, [[1], []], 0, None, "a prompt is empty"),
    (make_lm, [], 0, None, "a prompt is empty"),
    (make_l2d, [[1]], 1, [0], "this path has no classes"),
    (partial(make_l2d, classes=2), [[1]], 1, [3], "out of range; allowed: 0 to 2"),
])
def test_a_request_that_cannot_be_answered_is_refused(make, prompts, steps, class_ids, message):
    with pytest.raises(ValueError, match=message):
        generate(make(), prompts, Settings(steps=steps), class_ids=class_ids)
