"""data/experiments/harness.py: the answers of our models to lm-evaluation-harness.

The harness itself is not needed: the tests call the adapter as it does.
"""

import zlib
from types import SimpleNamespace

import pytest
import torch

from conftest import exit_status
from data.experiments import harness
from data.experiments.harness import Adapter
from sample import Settings, generate, load_model
from test_benchmarks import build_models
from test_formats import SMOLLM


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return build_models(tmp_path_factory.mktemp("models"))


def test_without_the_harness_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(harness, "simple_evaluate", None)
    assert exit_status(harness.main, ["--init_from=tiny", "--tasks", "gsm8k"]) == 2
    assert "pip install lm_eval" in capsys.readouterr().err


def adapter(models, steps, batch_size=3) -> Adapter:
    model, tokenizer = load_model(str(models[1]), device="cpu")
    settings = Settings(steps=steps, solver="euler")
    return Adapter(model, tokenizer, settings, draws=2, batch_size=batch_size)


def requests(*args) -> list:
    return [SimpleNamespace(args=one) for one in args]


PAIRS = [("the in", " A"), ("the in", " B"), ("the in ", "the in"), ("12", " A"), ("x", "123 the"),
         *((letter, " A") for letter in "abcdefgh")]


def test_probabilities_of_the_frozen_model_are_its_log_softmax(models):
    ours = adapter(models, steps=0)
    found = ours.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (context, rest), (log_p, greedy) in zip(PAIRS, found):
        before, after = ours.encode_pair(context, rest)
        logits = ours.lm(torch.tensor([before + after]))[0, len(before) - 1:-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None]).sum()
        assert log_p == pytest.approx(float(expected), abs=1e-4)
        assert greedy == (logits.argmax(-1).tolist() == after)


@pytest.mark.parametrize("steps", [0, 2])
def test_nothing_depends_on_the_batch(steps, models):
    results = []
    for size in (1, 4):
        ours = adapter(models, steps, size)
        log_p = ours.loglikelihood(requests(*PAIRS), disable_tqdm=True)
        how = {"until": ["\n"], "max_gen_toks": 4}
        texts = ours.generate_until(requests(*((c, how) for c, _ in PAIRS)), disable_tqdm=True)
        results.append((log_p, texts))
    assert results[0][1] == results[1][1]
    for (a, greedy), (b, same) in zip(results[0][0], results[1][0]):
        assert a == pytest.approx(b, abs=1e-3) and greedy == same


def test_texts_are_those_of_sample_and_end_at_the_stop_strings(models):
    ours = adapter(models, steps=2)
    how = {"until": [], "max_gen_toks": 5}
    text, = ours.generate_until(requests(("the in", how)), disable_tqdm=True)
    seed = zlib.crc32(b"the in")
    settings = Settings(steps=2, max_new_tokens=5)
    answer, = generate(ours.model, [ours.encode("the in")], settings, seeds=[seed])
    assert ours.tokens.decode(answer.ids) == text
    half = text[:len(text) // 2 + 1][-1:]
    cut, = ours.generate_until(requests(("the in", {**how, "until": [half]})), disable_tqdm=True)
    assert cut == text[:text.index(half)]


def test_options_of_a_request_choose_the_tokens(models):
    ours = adapter(models, steps=0)
    # longer than the model's 512 positions
    context = "the in 123 " * 120
    prompt = ours.encode(context)[-(512 - 8):]
    greedy = {"until": [], "max_gen_toks": 8, "temperature": 5.0}
    for more in ({}, {"top_k": 9}, {"top_p": 0.1}):
        sampled = {**greedy, **more, "do_sample": True}
        texts = ours.generate_until(requests((context, sampled), (context, greedy)),
                                    disable_tqdm=True)
        for text, options in zip(texts, ({"temperature": 5.0, **more}, {})):
            settings = Settings(steps=0, max_new_tokens=8, **options)
            answer, = generate(ours.model, [prompt], settings, seeds=[zlib.crc32(context.encode())])
            assert ours.tokens.decode(answer.ids) == text
        assert texts[0] != texts[1]


def test_a_blank_between_context_and_rest_belongs_to_the_rest(models):
    ours = adapter(models, steps=0)
    before, after = ours.encode_pair("the in ", "A")
    assert (before, after) == ours.encode_pair("the in", " A") and len(after) == 1
    # no start of a text, no context: the first token cannot be predicted
    ours.encode = lambda text: list(text.encode())
    assert ours.encode_pair("", "the") == ([116], [104, 101])


def test_a_text_is_the_greedy_one_if_all_of_its_tokens_are(models):
    ours = adapter(models, steps=0)
    context = ours.encode("the in")
    answer, = generate(ours.model, [context], Settings(steps=0, max_new_tokens=2))
    first, second = answer.ids
    wrong = (second + 1) % 300
    results = ours.score([(context, [first, second]), (context, [first, wrong])])
    assert [greedy for _, greedy in results] == [True, False]


def test_special_tokens_are_read_as_such_in_a_chat_format_alone(tmp_path):
    model, tokenizer = load_model(str(build_models(tmp_path, SMOLLM)[0]), device="cpu")
    ours = Adapter(model, tokenizer, Settings(steps=0), draws=1, batch_size=1)
    assert 290 not in ours.encode("<|im_start|>user")
    text = ours.apply_chat_template([{"role": "user", "content": "the in"}])
    ids = ours.encode(text)
    assert text.count("<|im_start|>") == ids.count(290) >= 2
    # a text that begins with the start of all texts has it once
    start = tokenizer.encode_start("")
    assert ours.encode(tokenizer.decode(start) + "x")[:2] == [*start, ord("x")]


def test_a_whole_text_is_the_sum_of_its_windows(models):
    ours = adapter(models, steps=0)
    ids = ours.encode("the in 123 " * 120)
    expected = 0.0
    for at in range(0, len(ids) - 1, 512):
        window = torch.tensor(ids[at:at + 513])
        log_p = ours.lm(window[None, :-1])[0].log_softmax(-1)
        expected += float(log_p.gather(1, window[1:, None]).sum())
    found, = ours.loglikelihood_rolling(requests(("the in 123 " * 120,)), disable_tqdm=True)
    assert len(ids) > 513 and found == pytest.approx(expected, rel=1e-4)
    # a model without a start of texts reads its end token before them
    start = ours.tokens.bos_id
    ours.encode = lambda text: ids[1:]
    ours.tokens.bos_id, ours.tokens.eos_id = None, start
    again, = ours.loglikelihood_rolling(requests(("",)), disable_tqdm=True)
    assert again == pytest.approx(expected, rel=1e-4)
