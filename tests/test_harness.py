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


PAIRS = [("the in", " A"), ("the in", " B"), ("the in ", "the in"), ("12", " A"), ("x", "123 the")]


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


def test_a_whole_text_is_the_sum_of_its_windows(models):
    ours = adapter(models, steps=0)
    text = "the in 123 " * 120
    found, = ours.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    ids = ours.encode(text)
    assert len(ids) > 512
    first = ours.score([(ids[:1], ids[1:513])])[0][0]
    assert found < first < 0
