"""Our departures: self-conditioning with our own objective, and own keys and values.

The start of the path, its objective against a plain loop, the classes that are asked again,
sampling. Most other tests are of the paper's path, without them.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from conftest import (
    LLAMA, PROMPTS, drawn, generator, generators, make_batch, make_ids, make_l2d, p_value)
from data.checkpoints.hub import resolve
from data.parts.draws import RowDraws, draw_schedule
from data.parts.positions import Packed
from data.parts.prediction import Prediction
from data.text.tokenizer import load_tokenizer
from data.tiny.topics import Problems
from data.training.batches import IGNORE, Batch, Targets
from data.training.evaluations import find_asked_again, unroll_of
from data.training.memory import saved_bytes
from data.training.optimizer import EMA
from diffusion import AGAIN_WEIGHT, L2D, L2DConfig, VelocityField, paper_losses, refined_losses
from sample import Settings, generate
from solvers import odeint

PREDICTION = {"self_conditioning": True}
OWN = {"own_kv": True}
BOTH = {**PREDICTION, **OWN}
SELF = {**PREDICTION, "self_kv": True}
FEW = {"prediction_words": 3}
ASKED_AGAIN = {"start": "frozen", **BOTH, "classes": 3, "asked_again": [1]}

# --- the start ------------------------------------------------------------------------------------

@torch.no_grad()
def test_own_keys_and_values_start_as_the_frozen_ones(family):
    l2d = make_l2d(family, perturb=0, **BOTH)
    ids = make_ids()
    states, frozen = l2d.read(ids), l2d.lm.read(ids)
    for own, theirs in zip(states.keys + states.values, frozen.keys + frozen.values):
        torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_gate_puts_the_prediction_in_place_of_the_current_token(family):
    l2d = make_l2d(family, perturb=0, start="frozen", **BOTH)
    ids, predicted = make_ids(), make_ids(seed=1)
    states = l2d.read(ids)
    t = torch.full(ids.shape, 0.4)
    x_t = torch.randn(*ids.shape, 16)
    sure = Prediction(1000 * F.one_hot(predicted, 258).float())
    closed = l2d.modulation(t)
    assert not closed.gate.any()
    opened = closed._replace(gate=torch.ones_like(closed.gate))
    found = l2d.last_hidden(x_t, t, opened, states, sure)
    # as if it were the token that is read
    other = replace(states, inputs=l2d.lm.embed(predicted))
    expected = l2d.last_hidden(x_t, t, closed, other, sure)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, states.hidden, atol=1e-2)


def each_alone(lm, ids, predicted, start=0):
    """Last hidden states (B, T - start, C) of texts whose last token is the predicted one."""
    ends = []
    for k in range(start, ids.shape[1]):
        text = torch.cat((ids[:, start:k], predicted[:, k:k + 1]), dim=1)
        ends.append(lm.read(text).hidden[:, -1])
    return torch.stack(ends, dim=1)


@pytest.mark.parametrize("layout", ["all", "index", "last", "copies", "copies of an index",
                                    "few of documents", "many of documents",
                                    "documents by a mask"])
@torch.no_grad()
def test_with_self_kv_it_is_the_frozen_model_that_reads_the_predicted_token(family, layout):
    l2d = make_l2d(family, perturb=0, asked_again=[0], **SELF)
    ids, predicted = make_ids(2, 9), make_ids(2, 9, seed=1)
    expected = each_alone(l2d.lm, ids, predicted)                       # (B, T, C)
    documents = None
    if "documents" in layout:
        expected = torch.cat((each_alone(l2d.lm, ids[:, :3], predicted[:, :3]),
                              each_alone(l2d.lm, ids, predicted, 3)), dim=1)
        documents = torch.tensor([[1] * 3 + [2] * 6] * 2)
        if layout != "documents by a mask":
            documents = Packed.of(documents)
    states = l2d.read(ids, documents)
    if layout in ("all", "documents by a mask"):
        rows, places = torch.arange(2)[:, None], torch.arange(9)
    elif layout == "index":
        rows, places = torch.tensor([0, 1, 1]), torch.tensor([8, 2, 5])
        states = states.at((rows, places))
    elif layout == "copies of an index":
        rows, places = torch.tensor([[0], [1], [0], [1]]), torch.tensor([[8], [2], [8], [2]])
        states = states.at((rows[:2, 0], places[:2, 0])).alone().copies(2)
        # each copy with a prediction of its own
        predicted = torch.cat((predicted, make_ids(2, 9, seed=2)))
        expected = torch.cat((expected, each_alone(l2d.lm, ids, predicted[2:])))
        rows = torch.arange(4)[:, None] % 2 + torch.tensor([[0], [0], [2], [2]])
    elif layout in ("last", "copies"):
        rows, places = torch.tensor([[0], [1]]), torch.tensor([[8], [8]])
        states = states.last()
        if layout == "copies":
            rows, places, states = rows.repeat(2, 1), places.repeat(2, 1), states.copies(2)
    else:
        few = layout == "few of documents"
        rows, places = torch.tensor([[0, 8], [0, 1], [1, 4], [1, 2], [1, 7], [0, 5], [0, 6]]).T
        if few:
            rows, places = rows[:3], places[:3]
        states = states.at((rows, places))
        assert (states.index is None) == few
    sure = Prediction(1000 * F.one_hot(predicted[rows, places], 258).float())
    t = torch.full(sure.logits.shape[:-1], 0.4)
    found = l2d.last_hidden(torch.randn(*t.shape, 16), t, l2d.modulation(t), states, sure)
    torch.testing.assert_close(found, expected[rows, places], atol=1e-4, rtol=1e-4)


def test_a_path_without_the_options_is_the_papers():
    l2d = make_l2d()
    assert l2d.config == L2DConfig(width=16, cond_dim=24, rank=4)
    assert l2d.from_prediction is None
    assert all(block.k is None for block in l2d.blocks)


@torch.no_grad()
def test_a_prediction_changes_the_next_one():
    l2d = make_l2d(**PREDICTION)
    states = l2d.read(make_ids()).last()
    x = torch.randn(3, 1, 16)
    first = l2d.predict(x, 0.5, None, states)
    # before the first evaluation it is the frozen model's
    frozen = l2d.lm.logits(states.hidden)
    assert torch.equal(l2d.predict(x, 0.5, None, states, frozen), first)
    assert not torch.allclose(l2d.predict(x, 0.5, None, states, first), first, atol=1e-2)


@torch.no_grad()
def test_own_kv_leaves_the_frozen_hidden_states_alone(family):
    l2d = make_l2d(family, **OWN)
    ids = make_ids()
    own, frozen = l2d.read(ids), l2d.lm.read(ids)
    assert torch.equal(own.hidden, frozen.hidden)
    assert not any(torch.equal(a, b) for a, b in zip(own.keys, frozen.keys))


# --- the objective --------------------------------------------------------------------------------

def handed_on(logits, words):
    """p of all words, or of the likeliest, renormalised."""
    if words is not None:
        least = logits.topk(words).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits.softmax(-1)


def by_hand(l2d, batch, backprop):
    """Loss and last loss of every position that counts, each with a loop of its own."""
    targets, found = batch.targets, {}
    again = torch.zeros_like(targets.y) if targets.again is None else targets.again
    untrained = L2D(l2d.lm, l2d.config)
    places = zip(*(place.tolist() for place in targets.index))
    for n, (b, k) in enumerate(places):
        y, times, noise = targets.y[n], targets.t[n], targets.noise[n]
        classes = None if targets.class_ids is None else targets.class_ids[n:n + 1]
        ids = batch.ids[b:b + 1, :k + 1]
        states, frozen = l2d.read(ids).last(), l2d.lm.read(ids).last()
        V = l2d.vocabulary()
        x = l2d.config.sigma * noise[None, None]
        prediction = l2d.lm.logits(states.hidden)
        t = 0.0
        losses = []
        for new_t in [t for t in times.tolist() if t]:
            x_hat = handed_on(prediction, l2d.config.prediction_words) @ V
            x = x + (x_hat - x) * (new_t - t) / (1 - t)
            t = new_t
            before = prediction
            prediction = l2d.predict(x, torch.tensor([t]), classes, states, before)
            log_p = prediction[0, 0].log_softmax(-1)
            last = loss = -float(log_p[y])
            if again[n]:
                p = handed_on(before, l2d.config.prediction_words)[0, 0, y]
                p = max(float(p), float(log_p[y].exp()))
                asked = untrained.predict(x, torch.tensor([t]), None, frozen, before)
                q = asked[0, 0].softmax(-1)
                loss = AGAIN_WEIGHT * (p * loss - (1 - p) * float((q * log_p).sum()))
            losses.append(loss)
        losses = losses[-backprop:]
        found[b, k] = sum(losses) / len(losses), last, t
    return found


@pytest.mark.parametrize("options", [PREDICTION, BOTH, {}, ASKED_AGAIN, {**BOTH, **FEW},
                                     {**ASKED_AGAIN, **FEW}, {**ASKED_AGAIN, **SELF}])
@torch.no_grad()
def test_refined_losses_are_those_of_a_plain_loop(family, options):
    l2d = make_l2d(family, **options)
    ids = make_ids()
    targets = make_ids(seed=1).masked_fill(torch.rand(ids.shape) < 0.5, IGNORE)
    classes = torch.tensor([0, 1, 2]) if "asked_again" in options else None
    batch = drawn(l2d, make_batch(ids, targets, classes), generators(3, 7), unroll=5)
    found = refined_losses(l2d, batch, backprop=2)
    expected = by_hand(l2d, batch, 2)
    assert len(found.values) == len(expected)
    # positions come in another order, so they are compared as a set
    rows = sorted(zip(*(x.tolist() for x in found[:3])))
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(sorted(expected.values())),
                               atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_the_papers_objective_lets_half_of_the_positions_read_their_own_prediction():
    l2d = make_l2d(**PREDICTION)
    ids = make_ids()
    batch = drawn(l2d, make_batch(ids, make_ids(seed=1)), generators(3))
    targets, t = batch.targets, batch.targets.t
    found = paper_losses(l2d, batch).values
    states = l2d.read(ids).at(targets.index)
    x_t = (t[:, None] * l2d.vectors(targets.y)
           + (1 - t[:, None]) * l2d.config.sigma * targets.noise)
    modulation = l2d.modulation(t)
    once = l2d.last_hidden(x_t, t, modulation, states)
    twice = l2d.last_hidden(x_t, t, modulation, states, Prediction(l2d.lm.logits(once)))
    own = targets.noise[:, 0] > 0
    assert 5 < int(own.sum()) < 25
    for some, hidden in ((own, twice), (~own, once)):
        expected = -l2d.lm.log_p(hidden, targets.y)
        torch.testing.assert_close(found[some], expected[some], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(once, twice, atol=1e-2)


@pytest.fixture
def gradients(monkeypatch):
    """Of every evaluation: has its prediction before a gradient (None: there is none), and it?"""
    original, recorded = L2D.last_hidden, []

    def last_hidden(self, x, t, modulation, states, before=None):
        hidden = original(self, x, t, modulation, states, before)
        recorded.append((before and before.logits.requires_grad, hidden.requires_grad))
        return hidden

    monkeypatch.setattr(L2D, "last_hidden", last_hidden)
    return recorded


@pytest.mark.parametrize("backprop", [1, 3])
def test_the_gradient_goes_through_the_last_evaluations_only(backprop, gradients):
    l2d = make_l2d(**BOTH).train()
    ids = make_ids()
    batch = drawn(l2d, make_batch(ids, make_ids(seed=1)), generators(3), unroll=6)
    losses = refined_losses(l2d, batch, backprop)
    losses.values.mean().backward()
    assert [new for _, new in gradients] == [False] * (6 - backprop) + [True] * backprop
    # the prediction before the first of them has no gradient
    assert not gradients[6 - backprop][0]
    reached = [name for name, p in l2d.path_parameters().items() if p.grad is not None]
    assert {"from_prediction.weight", "to_z.weight"} <= set(reached)
    assert not any(p.requires_grad for p in l2d.lm.parameters())


def test_the_papers_objective_does_not_learn_through_the_prediction_that_it_reads(gradients):
    l2d = make_l2d(**PREDICTION).train()
    paper_losses(l2d, drawn(l2d, make_batch(make_ids(), make_ids(seed=1)), generators(3)))
    assert gradients == [(None, False), (False, True)]


def test_who_is_asked_again_has_more_evaluations_and_all_a_uniform_last_time():
    again = torch.tensor([True, False]).repeat_interleave(20_000)
    times = draw_schedule(RowDraws([20_000] * 2, generators(2)), again, 8).view(2, 20_000, 8)
    for row, most in zip((times > 0).sum(-1), (8, 2)):
        assert p_value(row.bincount()[1:], torch.full((most,), 1 / most)) > 1e-3
    assert bool((times.diff(dim=-1) >= 0).all())
    # the last is uniform, however many there are before it
    for some in times[:, :, -1]:
        assert 0 < float(some.min()) and float(some.max()) <= 1
        tenths = (some * 10).long().clamp_max(9).bincount(minlength=10)
        assert p_value(tenths, torch.full((10,), 0.1)) > 1e-3
    unknown = (draw_schedule(RowDraws([20_000], generators(1)), None, 4) > 0).sum(-1)
    assert p_value(unknown.bincount()[1:], torch.full((4,), 0.25)) > 1e-3


def test_only_where_asking_again_helps_a_class_is_asked_again():
    """The right tokens of class 1 are the third answer, those of class 0 are no answer at all."""
    l2d = make_l2d(perturb=0, **{**ASKED_AGAIN, "classes": 2, "asked_again": [0, 1]})
    ids = make_ids()
    answers = [l2d.lm(ids)]
    for _ in range(3):
        states = l2d.read(ids)
        t = torch.full(ids.shape, 0.5)
        answers.append(l2d.lm.logits(l2d.last_hidden(
            torch.zeros(*ids.shape, 16), t, l2d.modulation(t), states, Prediction(answers[-1]))))
    y = answers[3].argmax(-1)
    y[0] = (torch.stack(answers).argmax(-1)[:, 0].amax(0) + 1) % 258
    batch = make_batch(ids, y, torch.tensor([0, 1, 1]))
    assert find_asked_again(l2d, batch, 3) == [1]
    assert find_asked_again(l2d, batch, 0) == []


def test_a_class_is_asked_again_if_most_of_its_first_mistakes_are_right_at_some_call():
    # of four tokens, all 0: at first, and after each of two calls
    answers = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1], [1, 0, 0, 1]])
    logits = iter(F.one_hot(answers, 2).float())
    states = SimpleNamespace(hidden=torch.zeros(4, 2), at=lambda index: states)
    l2d = SimpleNamespace(
        config=SimpleNamespace(width=3, prediction_words=None),
        lm=SimpleNamespace(logits=lambda hidden: next(logits)), read=lambda *_: states,
        modulation=lambda t: None, last_hidden=lambda *_: None)
    targets = Targets(None, torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, 1, 1]))
    assert find_asked_again(l2d, Batch(None, None, targets), 2) == [0]


@torch.no_grad()
def test_an_untrained_path_that_is_asked_again_reads_its_prediction_as_a_token(family):
    l2d = make_l2d(family, perturb=0, **ASKED_AGAIN)
    ids, predicted = make_ids(), make_ids(seed=1)
    frozen = l2d.lm.read(ids)
    sure = Prediction(1000 * F.one_hot(predicted, 258).float())
    t = torch.full(ids.shape, 0.4)
    found = l2d.last_hidden(torch.randn(*ids.shape, 16), t, l2d.modulation(t), frozen, sure)
    closed = L2D(l2d.lm, replace(l2d.config, asked_again=None))
    other = replace(frozen, inputs=l2d.lm.embed(predicted))
    expected = closed.last_hidden(torch.zeros(*ids.shape, 16), t, closed.modulation(t), other, sure)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("objective, unroll", [(paper_losses, 0), (refined_losses, 6)])
@pytest.mark.parametrize("options", [BOTH, ASKED_AGAIN])
def test_as_many_likeliest_words_as_there_are_teach_what_all_words_teach(
        family, options, objective, unroll):
    found = []
    for words in (None, 1000, 2):
        l2d = make_l2d(family, **{**options, "prediction_words": words}).train()
        classes = torch.tensor([0, 1, 2]) if "asked_again" in options else None
        batch = make_batch(make_ids(), make_ids(seed=1), classes)
        losses = objective(l2d, drawn(l2d, batch, generators(3), unroll))
        losses.values.mean().backward()
        found.append((losses.values, *(p.grad for p in l2d.path_parameters().values())))
    everything, all_words, two = found
    for one, other in zip(everything, all_words):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(everything[0], two[0], atol=1e-2)


@torch.no_grad()
def test_sampling_reads_the_likeliest_words_of_every_prediction():
    few, everything = make_l2d(**BOTH, **FEW), make_l2d(**BOTH)
    states = few.read(make_ids()).last()
    x = torch.randn(3, 1, 16)
    for before in (None, 3 * torch.randn(3, 1, 258)):
        logits = few.lm.logits(states.hidden) if before is None else before
        # log p of the likeliest, and of no other
        read = handed_on(logits, 3).log()
        torch.testing.assert_close(few.predict(x, 0.5, None, states, before),
                                   everything.predict(x, 0.5, None, states, read))
        assert not torch.allclose(few.predict(x, 0.5, None, states, before),
                                  everything.predict(x, 0.5, None, states, before), atol=1e-2)


def test_few_words_keep_little_for_the_backward_pass(monkeypatch):
    """No logits of all words: of the evaluations with a gradient, and of those without."""
    monkeypatch.setattr("data.parts.log_p.LOGITS", 1 << 12)
    sizes = []
    for words in (None, 3):
        l2d = make_l2d({**LLAMA, "vocab_size": 4096}, **BOTH, prediction_words=words).train()
        batch = drawn(l2d, make_batch(make_ids(), make_ids(seed=1)), generators(3), unroll=6)
        size, _ = saved_bytes(lambda: refined_losses(l2d, batch))
        sizes.append(size)
    logits = 4 * 30 * 4096
    assert sizes[1] < sizes[0] - 3 * 3 * logits


def test_the_memory_of_the_backward_pass_is_without_the_weights():
    matrix = torch.nn.Linear(64, 32).requires_grad_(False)
    x = torch.ones(2, 64, requires_grad=True)
    # the product keeps its matrix alone, exp its own result
    assert saved_bytes(lambda: matrix(x))[0] == 0
    assert saved_bytes(lambda: matrix(x).exp())[0] == 4 * 2 * 32


def test_without_targets_there_are_no_refined_losses():
    for words in (None, 3):
        l2d = make_l2d(**BOTH, prediction_words=words)
        ids = make_ids()
        batch = make_batch(ids, torch.full_like(ids, IGNORE))
        losses = refined_losses(l2d, drawn(l2d, batch, generators(3), unroll=4))
        assert [len(values) for values in losses[:3]] == [0, 0, 0]


# --- the number of evaluations, and the EMA ---------------------------------------------------------

def test_without_labels_the_evaluations_grow_over_the_first_half():
    grown = [unroll_of("refine", 8, False, update, 100) for update in range(100)]
    assert grown == sorted(grown)
    assert set(grown) == set(range(1, 9))
    assert grown[50] == 8


def test_both_objectives_alternate_and_validation_is_of_our_own():
    turns = [unroll_of("both", 6, True, update, 100) for update in range(4)]
    assert turns == [0, 6, 0, 6]
    assert unroll_of("both", 6, False, None, 100) == 6
    assert unroll_of("paper", 6, True, None, 100) == 0


def test_the_ema_follows_the_weights_and_takes_their_place():
    weights = {"w": torch.nn.Parameter(torch.zeros(2))}
    average = EMA(weights, 0.75)
    weights["w"].data += 4
    average.follow()
    with average.in_place():
        assert weights["w"].tolist() == [1, 1]
    assert weights["w"].tolist() == [4, 4]
    average.put_in_place()
    assert weights["w"].tolist() == [1, 1]
    assert not EMA(weights, 0.0).tensors


# --- while sampling -------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [PREDICTION, OWN, BOTH, SELF, {**BOTH, **SELF}])
@torch.no_grad()
def test_cached_and_batched_equals_everything_computed_again(family, options):
    l2d = make_l2d(family, **options)
    settings = Settings(steps=3, max_new_tokens=4)
    answers = generate(l2d, PROMPTS, settings, seeds=[3, 4, 5, 6])
    for prompt, seed, answer in zip(PROMPTS, (3, 4, 5, 6), answers):
        ids, g = list(prompt), generator(seed)
        for _ in range(4):
            velocity = VelocityField(l2d, l2d.read(torch.tensor([ids])).last())
            x_0 = l2d.config.sigma * torch.randn(1, 16, generator=g)[None]
            solution = odeint(velocity, x_0, "euler", 3)
            ids.append(int(velocity.final_logits(solution.x, solution.prediction).argmax()))
        assert answer.ids == ids[len(prompt):]


def test_own_keys_are_computed_once_for_both_copies_of_guidance():
    l2d = make_l2d(classes=3, **BOTH)
    calls = []
    for block in l2d.blocks:
        block.k.register_forward_hook(lambda *_: calls.append(1))
    settings = Settings(steps=3, guidance=2.0, max_new_tokens=4)
    generate(l2d, PROMPTS[:1], settings, class_ids=[1])
    # the prompt and three tokens, two layers each
    assert len(calls) == 2 * 4


def test_of_the_embedded_topics_chains_alone_are_asked_again():
    """Nothing in the rows says so: the base finds the ends of chains when it is asked again."""
    args = train.parse([])
    tokenizer = load_tokenizer(resolve("tiny"), 258)
    data = Problems(tokenizer, "val")
    model, _ = train.build_model(args, None, data.classes, data)
    names = [model.config.class_names[one] for one in model.config.asked_again]
    assert names == ["chains"]


def test_a_path_of_a_real_model_reads_few_words_where_it_reads_any(base):
    """The preset says how many; the embedded model's path reads them all."""
    for words, few in ((["--objective=refine"], 32), ([], None),
                       (["--objective=both", "--prediction_words=5"], 5),
                       (["--objective=both", "--prediction_words=0"], None)):
        args = train.parse(["--init_from", str(base), *words])
        tokenizer = load_tokenizer(base, 258)
        model, _ = train.build_model(args, None, (), Problems(tokenizer, "val"))
        assert model.config.prediction_words == few
    assert train.parse([]).prediction_words == 0
