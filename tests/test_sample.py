"""sample.py: generate() against plain loops without cache or batch, what a token costs, sampling.

The command line is in test_cli.py.
"""

from pathlib import Path

import pytest
import torch
from conftest import make_ids, make_l2d, make_lm, path_logits
from test_oracle import p_value

from diffusion import L2D
from model import LM
from data.text.answer import Stop, TraceFirst
from data.text.tokenizer import load_tokenizer
from sample import Settings, generate
from solvers import odeint

TINY = Path(__file__).resolve().parent.parent / "data" / "tiny"
PROMPTS = [[5, 17, 200, 3], [9], [42, 43, 44, 45, 46, 47, 48], [100, 9]]
ADAPTIVE = dict(
    solver="dopri5", rtol=0.5, atol=0.5
)  # random models hesitate a lot; a loose tolerance keeps the tests short
SAMPLED = dict(temperature=1.0, estimate="sample")
COSTS = [
    ("euler", 5),
    ("midpoint", 9),
    ("heun", 9),
    ("rk4", 16),
]  # 4 intervals and the final evaluation


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def ids_of(answers):
    return [answer.ids for answer in answers]


@torch.no_grad()
def greedy_by_hand(lm, prompt, count):
    """The frozen model, one sequence, everything computed again for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(lm(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def l2d_by_hand(l2d, prompt, count, settings, seed, class_id=None):
    """The same with the diffusion path: no cache, no batch.

    The whole text goes through the path at every evaluation.
    """
    ids, g, Z = list(prompt), torch.Generator().manual_seed(seed), l2d.config.width
    mixture = (
        [(settings.guidance, class_id), (1 - settings.guidance, None)]
        if class_id is not None
        else [(1.0, None)]
    )
    for _ in range(count):
        text = torch.tensor([ids])

        def logits(x, t, label):
            whole = torch.cat((torch.zeros(1, len(ids) - 1, Z), x), dim=1)
            class_ids = None if label is None else torch.tensor([label])
            times = torch.full(text.shape, float(t))
            return path_logits(l2d, text, whole, times, class_ids)[:, -1:]

        def velocity(t, x, prediction):
            total = 0
            for weight, label in mixture:
                prediction = logits(x, t, label)
                point = (
                    l2d.vocabulary()[prediction.argmax(-1)]
                    if settings.estimate == "argmax"
                    else prediction.softmax(-1) @ l2d.vocabulary()
                )
                total = total + weight * (point - x) / (1 - float(t))
            return total, None

        x_0 = l2d.config.sigma * torch.randn(1, Z, generator=g)[None]
        x_1 = odeint(velocity, x_0, settings.solver, settings.steps, settings.rtol, settings.atol).x
        ids.append(int(sum(weight * logits(x_1, 1.0, label) for weight, label in mixture).argmax()))
    return ids[len(prompt) :]


# --- against plain loops --------------------------------------------------------------------------


def test_no_steps_is_the_frozen_model_greedily(family):
    l2d = make_l2d(family)
    expected = [greedy_by_hand(l2d.lm, prompt, 8) for prompt in PROMPTS]
    for model in (l2d, l2d.lm):
        answers = generate(model, PROMPTS, Settings(steps=0, max_new_tokens=8))
        assert ids_of(answers) == expected
        assert all(answer.nfe == [0] * 8 and not answer.stopped for answer in answers)


@pytest.mark.parametrize(
    "options",
    [
        dict(solver="euler", steps=3),
        dict(solver="midpoint", steps=2),
        dict(solver="heun", steps=2),
        dict(solver="rk4", steps=2),
        dict(ADAPTIVE, max_new_tokens=2),
        dict(estimate="average", steps=3),
    ],
)
def test_cached_and_batched_equals_everything_computed_again(family, options):
    l2d, settings = make_l2d(family), Settings(**{"max_new_tokens": 3, **options})
    answers = generate(l2d, PROMPTS, settings, seeds=[3, 4, 5, 6])
    assert ids_of(answers) == [
        l2d_by_hand(l2d, prompt, settings.max_new_tokens, settings, seed)
        for prompt, seed in zip(PROMPTS, (3, 4, 5, 6))
    ]
    assert ids_of(answers) != ids_of(
        generate(l2d, PROMPTS, Settings(steps=0, max_new_tokens=settings.max_new_tokens))
    )  # the path has a say


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guided_text_equals_everything_computed_again(guidance):
    l2d, settings, classes = (
        make_l2d(classes=3),
        Settings(steps=3, guidance=guidance, max_new_tokens=4),
        [0, 2, 1, 3],
    )
    answers = generate(l2d, PROMPTS, settings, class_ids=classes, seeds=[3, 4, 5, 6])
    assert ids_of(answers) == [
        l2d_by_hand(l2d, *job[:1], 4, settings, *job[1:])
        for job in zip(PROMPTS, (3, 4, 5, 6), classes)
    ]


def test_classes_and_guidance_change_the_text():
    l2d = make_l2d(classes=3)
    texts = [
        ids_of(
            generate(
                l2d, PROMPTS, Settings(steps=3, guidance=w, max_new_tokens=6), class_ids=[c] * 4
            )
        )
        for w, c in ((1, 0), (1, 1), (3, 1), (0, 1))
    ]
    assert all(a != b for i, a in enumerate(texts) for b in texts[:i])


# --- seeds, batches, stopping ---------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, SAMPLED, ADAPTIVE])
def test_same_seeds_same_answers(options):
    l2d, settings = make_l2d(), Settings(max_new_tokens=4, **options)
    first, again = (generate(l2d, PROMPTS, settings, seeds=[1, 2, 3, 4]) for _ in range(2))
    assert first == again
    assert ids_of(generate(l2d, PROMPTS, settings, seeds=[5, 6, 7, 8])) != ids_of(first)


@pytest.mark.parametrize(
    "options",
    [
        dict(steps=0),
        dict(steps=5),
        dict(solver="midpoint", steps=3),
        ADAPTIVE,
        dict(SAMPLED, steps=5),
    ],
)
def test_a_sequence_alone_equals_the_same_sequence_in_a_batch(family, options):
    """Tokens and costs, not bits: products of batched matrices are rounded differently."""
    l2d, settings = make_l2d(family), Settings(max_new_tokens=4, **options)
    batch = generate(l2d, PROMPTS, settings, seeds=[1, 2, 3, 4])
    for i, prompt in enumerate(PROMPTS):
        assert generate(l2d, [prompt], settings, seeds=[i + 1]) == batch[i : i + 1]


@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 4, 2), (3, 40, 1)])
@pytest.mark.parametrize("options", [dict(), dict(own_kv=True)])
def test_a_common_beginning_is_read_once_and_changes_nothing(
        family, options, lengths, monkeypatch):
    l2d = make_l2d(family, **options)
    start = make_ids(1, 20)[0].tolist()
    prompts = [start + make_ids(1, n, seed=n)[0].tolist() for n in lengths]
    settings = Settings(steps=2, max_new_tokens=3)
    read = []
    plain = LM.read

    def count(self, ids, *rest, **more):
        read.append(tuple(ids.shape))
        return plain(self, ids, *rest, **more)
    monkeypatch.setattr(LM, "read", count)
    batch = generate(l2d, prompts, settings, seeds=[1, 2, 3])
    assert read[0] == (1, 20) and read[1] == (3, max(lengths))
    for i, prompt in enumerate(prompts):
        alone = generate(l2d, [prompt], settings, seeds=[i + 1])
        assert alone[0].ids == batch[i].ids


@pytest.mark.parametrize(
    "options",
    [dict(steps=0), dict(steps=4), ADAPTIVE, dict(steps=4, guidance=2.0), dict(SAMPLED, steps=4)],
)
def test_finished_sequences_leave_and_the_others_do_not_notice(family, options, monkeypatch):
    l2d, sizes = make_l2d(family, classes=3), []
    settings, classes = Settings(max_new_tokens=6, **options), [0, 1, 2, 1]
    free = generate(l2d, PROMPTS, settings, class_ids=classes)
    lengths = lambda stop: [answer.ids.index(stop) if stop in answer.ids else 6 for answer in free]
    stop = max(
        (token for answer in free for token in answer.ids),
        key=lambda token: len(set(lengths(token))),
    )
    expected = lengths(stop)
    assert len(set(expected)) > 1  # the token at which they stop at the most different times
    original = LM.read
    monkeypatch.setattr(
        LM, "read", lambda self, ids, *rest: sizes.append(len(ids)) or original(self, ids, *rest)
    )
    answers = generate(l2d, PROMPTS, settings, Stop({stop}), class_ids=classes)
    for answer, whole, length in zip(answers, free, expected):
        assert answer.ids == whole.ids[:length] and answer.stopped == (length < 6)
        assert answer.nfe == whole.nfe[: length + 1]  # the stop token was paid for too
    assert sizes == [4] + [
        alive for n in range(5) if (alive := sum(length > n for length in expected))
    ]


def test_a_watcher_sees_every_evaluation_and_every_token():
    model, settings = make_l2d(), Settings(steps=3, max_new_tokens=8)
    told, seen = {}, []

    def watch(batch, rows, t, logits, tokens=None, solution=None):
        assert logits.shape == (len(rows), 1, 258)
        if tokens is None:
            seen.append(len(rows))
            return
        assert t == 1.0 and len(tokens) == len(batch.answers)
        seen.append(len(rows))
        for answer, token in zip(batch.answers, tokens):
            told.setdefault(id(answer), []).append(token)

    free = generate(model, PROMPTS, settings)
    stop = Stop({free[0].ids[3]})
    answers = generate(model, PROMPTS, settings, stop, watch=watch)
    assert answers[0].stopped and sum(seen) == sum(sum(answer.nfe) for answer in answers)
    for answer in answers:
        # the stop token is seen too
        assert told[id(answer)][:len(answer.ids)] == answer.ids
        assert len(told[id(answer)]) == len(answer.nfe)


# --- stop strings ---------------------------------------------------------------------------------


class Letters:
    """A tokenizer whose token i is a piece of text."""

    def __init__(self, pieces):
        self.pieces = [piece.encode() for piece in pieces]

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


PIECES = ["a", "\n\n", "Que", "stion", ":", "x\n", "\nQ", "é", "b"]


@pytest.mark.parametrize(
    "ids, strings, at, text",
    [
        ([0, 1, 2, 3, 4, 8], ["\n\nQuestion:"], 4, "a"),  # over four tokens
        ([0, 5, 6, 8], ["\nQ"], 2, "ax\n"),  # begins and ends with a token
        ([0, 5, 6, 8], ["\n\n"], 2, "ax"),  # begins and ends inside tokens
        ([8, 7, 0], ["é"], 1, "b"),  # two bytes, one token
        ([0, 8, 0], ["zz", "b"], 1, "a"),  # any of several
        ([0, 8, 0], ["zz"], None, "aba"),
    ],
)
def test_a_stop_string_is_found_at_the_token_that_completes_it(ids, strings, at, text):
    stop = Stop(set(), strings, Letters(PIECES))
    found = [n for n in range(len(ids)) if stop.found(ids[: n + 1])]
    assert found[:1] == ([] if at is None else [at])
    end = len(ids) if at is None else at + 1
    assert stop.text(ids[:end]) == text


@pytest.mark.parametrize("options", [dict(steps=0), dict(steps=4)])
def test_an_answer_that_ends_with_a_string_costs_nothing_more(options):
    """And the others in the batch stay as they are."""
    l2d, settings = make_l2d(), Settings(max_new_tokens=8, **options)
    tokenizer = Letters([f"<{i}>" for i in range(258)])
    free = generate(l2d, PROMPTS, settings)
    ids = free[0].ids
    string = f"{ids[2]}><{ids[3]}"  # from inside one token into the next
    assert all(string not in tokenizer.decode(answer.ids) for answer in free[1:])
    cut = generate(l2d, PROMPTS, settings, Stop(set(), [string], tokenizer))
    assert cut[0].stopped and cut[0].ids == ids[:4] and cut[0].nfe == free[0].nfe[:4]
    assert cut[0].text == tokenizer.decode(ids[:2]) + "<"
    assert ids_of(cut[1:]) == ids_of(free[1:])


def test_stop_texts_of_the_command_line_may_name_special_tokens():
    tokenizer = load_tokenizer(TINY)
    stop = Stop.of(tokenizer, ["<|end_of_text|>", "xy"])
    assert stop.strings == ["xy"] and stop.ids == set(tokenizer.stop_ids)
    assert tokenizer.special["<|end_of_text|>"] in stop.ids


# --- costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver, cost", COSTS)
@pytest.mark.parametrize("guidance, factor", [(0, 1), (1, 1), (2, 2), (0.5, 2)])
def test_cost_of_a_token(solver, cost, guidance, factor, monkeypatch):
    """What is reported is what was evaluated: every call of the network, counted at its door.

    With guidance both copies are one call, of twice the batch. The evaluation at t = 0 is counted
    though it costs nothing: it is the frozen model's.
    """
    l2d, sizes, original = make_l2d(classes=2), [], L2D.last_hidden

    def targets(self, x_t, *rest):
        sizes.append(len(x_t))
        return original(self, x_t, *rest)

    monkeypatch.setattr(L2D, "last_hidden", targets)
    settings = Settings(steps=4, solver=solver, guidance=guidance, max_new_tokens=3)
    answers = generate(l2d, PROMPTS[:2], settings, class_ids=[0, 1])
    assert [answer.nfe for answer in answers] == [[factor * cost] * 3] * 2
    assert sizes == [2 * factor] * (3 * (cost - 1))


@pytest.mark.parametrize("max_nfe, calls", [(1, 1), (2, 1), (6, 3), (7, 3), (16, 8)])
def test_a_budget_counts_both_copies_of_guidance(max_nfe, calls):
    """8 Euler steps would cost 16 with guidance; the final evaluation is not part of the budget."""
    settings = Settings(steps=8, guidance=2.0, max_nfe=max_nfe, max_new_tokens=2)
    answers = generate(make_l2d(classes=2), PROMPTS[:2], settings, class_ids=[0, 1])
    assert all(answer.nfe == [2 * (calls + 1)] * 2 for answer in answers)
    assert all(answer.unfinished == (0 if calls == 8 else 2) for answer in answers)


def test_adaptive_costs_differ_from_token_to_token():
    answers = generate(make_l2d(), PROMPTS, Settings(max_new_tokens=4, **ADAPTIVE))
    costs = [cost for answer in answers for cost in answer.nfe]
    assert min(costs) >= 22 and len(set(costs)) >= 3


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_modulation_is_computed_once_per_time(guidance, monkeypatch):
    calls, original = [], L2D.modulation
    monkeypatch.setattr(
        L2D,
        "modulation",
        lambda self, t, *rest: calls.append(float(t[0])) or original(self, t, *rest),
    )
    generate(
        make_l2d(classes=2),
        PROMPTS,
        Settings(steps=4, guidance=guidance, max_new_tokens=2),
        class_ids=[0, 1, 1, 0],
    )
    assert calls == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    "options, most",
    [
        (dict(solver="euler", steps=8, max_nfe=3), 4),
        (dict(solver="dopri5", rtol=1e-6, atol=1e-6, max_nfe=5), 6),
    ],
)
def test_a_spent_budget_is_counted_and_the_text_goes_on(options, most):
    answers = generate(make_l2d(), PROMPTS, Settings(max_new_tokens=5, **options))
    for answer in answers:
        assert len(answer.ids) == 5 and answer.unfinished == 5 and max(answer.nfe) <= most
    enough = generate(make_l2d(), PROMPTS, Settings(max_new_tokens=5, steps=8, max_nfe=8))
    assert all(answer.unfinished == 0 and answer.nfe == [9] * 5 for answer in enough)


def test_a_trace_holds_the_predictions_of_every_token_of_the_first_answer():
    l2d = make_l2d()
    traced = generate(l2d, PROMPTS, Settings(steps=4, max_new_tokens=3), watch=TraceFirst())
    plain = generate(l2d, PROMPTS, Settings(steps=4, max_new_tokens=3))
    assert ids_of(traced) == ids_of(plain) and all(
        answer.traces == [] for answer in (*plain, *traced[1:])
    )
    assert [t for t, _, _ in traced[0].traces[1].predictions] == [0.0, 0.25, 0.5, 0.75, 1.0]
    frozen = l2d.lm(torch.tensor([PROMPTS[0] + traced[0].ids[:1]]))[0, -1].softmax(
        -1
    )  # at t = 0 the prediction is the frozen model's
    assert traced[0].traces[1].predictions[0][1:] == (
        int(frozen.argmax()),
        pytest.approx(float(frozen.max()), abs=1e-5),
    )


def test_times_of_an_adaptive_trace_run_from_noise_to_data():
    settings = Settings(max_new_tokens=1, **ADAPTIVE)
    for l2d in (make_l2d(perturb=0), make_l2d()):
        (traced,) = generate(l2d, PROMPTS[:1], settings, watch=TraceFirst())
        times = [t for t, _, _ in traced.traces[0].predictions]
        assert times[0] == 0 and times[-1] == 1 and max(times[:-1]) < 1
        assert len(times) == traced.nfe[0]
    # a path that never hesitates: nodes of Dormand and Prince, three steps of 1/4, then ½ and ¾
    (calm,) = generate(make_l2d(perturb=0), PROMPTS[:1], settings, watch=TraceFirst())
    nodes = [1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1]
    expected = [0.0] + [k / 4 + c / 4 for k in range(3) for c in nodes] + [0.875, 0.9375, 1.0]
    assert [t for t, _, _ in calm.traces[0].predictions] == pytest.approx(expected)


# --- choosing the token ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, count", [(0, 8), (2, 1)]
)  # a draw uses up a number, so the second token's noise is another
def test_the_narrowest_sampling_is_greedy(steps, count):
    l2d = make_l2d()
    greedy = ids_of(generate(l2d, PROMPTS, Settings(steps=steps, max_new_tokens=count)))
    sampled = lambda **options: ids_of(
        generate(
            l2d, PROMPTS, Settings(steps=steps, temperature=1.0, max_new_tokens=count, **options)
        )
    )
    for options in (dict(top_k=1), dict(top_p=1e-6), dict(top_k=1, top_p=0.5)):
        assert sampled(**options) == greedy
    assert sampled() != greedy


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=1.0),
        dict(temperature=0.5),
        dict(temperature=2.0, top_k=6),
        dict(temperature=1.0, top_p=0.6),
        dict(temperature=2.0, top_k=5, top_p=0.4),
    ],
)
def test_sampled_tokens_follow_the_softmax(options):
    """3,000 first tokens of one prompt, a seed each; rare tokens counted together."""
    lm, n = make_lm(), 3000
    answers = generate(
        lm, [[7, 8]] * n, Settings(steps=0, max_new_tokens=1, **options), seeds=range(n)
    )
    counts = torch.tensor([answer.ids[0] for answer in answers]).bincount(minlength=258)
    p, order = (
        (lm(torch.tensor([[7, 8]]))[0, -1].detach() / options["temperature"])
        .softmax(-1)
        .sort(descending=True)
    )
    keep = torch.arange(258) < options.get("top_k", 258)
    keep &= p.cumsum(0) - p < options.get("top_p", 1.1)
    counts, p = counts[order], p * keep / (p * keep).sum()
    assert counts[~keep].sum() == 0
    common = int((p * n >= 10).sum())
    rest = lambda x: (
        torch.cat((x[:common], x[common:].sum()[None])) if common < keep.sum() else x[:common]
    )
    assert len(rest(p)) >= 3 and p_value(rest(counts), rest(p)) > 1e-3


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(steps=-1), "steps = -1 is out of range; allowed: 0 or more"),
        (dict(max_new_tokens=0), "max_new_tokens = 0"),
        (dict(temperature=-0.1), "temperature = -0.1"),
        (dict(temperature=float("nan")), "temperature = nan"),
        (dict(top_k=0), "top_k = 0"),
        (dict(top_p=0.0), "top_p = 0.0"),
        (dict(top_p=1.5), "top_p = 1.5 .* to 1"),
        (dict(max_nfe=0), "max_nfe = 0"),
        (dict(rtol=0.0), "rtol = 0.0"),
        (dict(stop_unchanged=0), "stop_unchanged = 0"),
        (dict(solver="rk5"), "solver 'rk5' is not supported; allowed: euler"),
        (dict(estimate="mode"), "estimate 'mode'"),
        (dict(estimate_temperature=0.0), "estimate_temperature = 0.0"),
        (dict(guidance=float("nan")), "guidance = nan"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: generate(make_lm(), [[1]], Settings(steps=1)),
            "no diffusion path, so --steps must be 0",
        ),
        (lambda: generate(make_lm(), [[1], []], Settings(steps=0)), "a prompt is empty"),
        (lambda: generate(make_lm(), [], Settings(steps=0)), "a prompt is empty"),
        (
            lambda: generate(make_l2d(), [[1]], Settings(), class_ids=[0]),
            "this path has no classes",
        ),
        (
            lambda: generate(make_l2d(classes=2), [[1]], Settings(), class_ids=[3]),
            "out of range; allowed: 0 to 2",
        ),
        (
            lambda: generate(make_l2d(classes=2), [[1]], Settings(), class_ids=[-1]),
            "out of range; allowed: 0 to 2",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
