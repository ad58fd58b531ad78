"""What the embedded problems are worth without training: the rows that stand beside every result."""

import json

import pytest
import torch

import train
from data.checkpoints.hub import resolve
from conftest import exit_status
from data.experiments import finetune, forms, harness, headline, untrained
from data.flags.train import PRESETS
from data.results import figures
from data.tasks import TASKS
from data.text.tokenizer import load_tokenizer
from data.tiny.topics import Problem
from model import LM


@pytest.fixture(scope="module")
def frozen():
    lm = LM.from_pretrained("tiny", torch.float32, "cpu")
    return lm, load_tokenizer(resolve("tiny"), lm.config.vocab_size)


def problems(topic, level, count=8):
    return [TASKS["tiny"].problem((topic, level), i) for i in range(count)]


def test_the_frozen_model_called_again_goes_one_hop_further_each_time(frozen):
    for level, calls in ((1, 1), (2, 2), (5, 5)):
        *shares, by_rule = untrained.repeated_calls(*frozen, problems("chains", level))
        found = dict(zip(untrained.CALLS, shares, strict=True))
        assert found[calls] >= 7 / 8 and by_rule == found[calls]
        # it walks on behind the end
        assert all(share <= 5 / 8 for call, share in found.items() if call != calls)
        assert all(share == 0 for call, share in found.items() if call < calls)


def test_chains_of_names_are_walked_as_those_of_letters(monkeypatch):
    def hop(lm, tokenizer, prompts, most):
        texts = []
        for told, start in (prompt.rsplit(" ", 1) for prompt in prompts):
            pairs = [sentence.split(" tells ") for sentence in told.split(". ")[:-1]]
            texts.append(" " + dict(pairs).get(start, "Nobody"))
        return texts

    monkeypatch.setattr(untrained, "answer", hop)
    some = [TASKS["chains"].make("test", 3, i) for i in range(8)]
    *shares, by_rule = untrained.repeated_calls(None, None, some)
    assert [shares[call] for call in range(4)] == [0, 0, 1, 0] and by_rule == 1
    # every question has three chains
    assert [untrained.shortcut(problem) for problem in some] == [1 / 3] * 8


def test_the_shortcut_is_one_of_the_places_that_no_pair_begins_with():
    # b leads to the end a, c over e to the end d
    text = "ba ed ce;b"
    assert untrained.shortcut(Problem("chains", 1, "chains", text, "a")) == 1 / 2


def test_the_frozen_model_knows_the_operations_by_name(frozen):
    some = problems("strings", 1)
    texts = untrained.answer(*frozen, [f"{p.label} {p.prompt[:-1]}: " for p in some])
    assert sum(text.strip() == p.answer for text, p in zip(texts, some)) >= 7


def test_the_command_prints_a_row_for_every_level(capsys):
    untrained.main(["--problems=2"])
    lines = capsys.readouterr().out.splitlines()
    for name in ("chains 1 ", "chains 12", "strings 2", "chains 1-8", "chains 9-12"):
        assert sum(line.startswith(name) for line in lines) == 1


@pytest.mark.parametrize("places, chains", forms.SHAPES)
def test_a_map_of_another_size_has_its_places_and_chains(places, chains):
    for level in (1, 8):
        text, start = forms.problem_of(level, 3, places, chains)[0].split(";")
        following = dict(text.split())
        # a chain of one place has no pair
        ends = set(following.values()) - set(following)
        assert len(ends) <= chains and len(following) == places - chains
        for _ in range(level):
            start = following[start]
        assert start == forms.problem_of(level, 3, places, chains)[1] in ends


def test_every_form_has_a_row(capsys, monkeypatch):
    monkeypatch.setattr(forms, "STEPS", (0, 8))
    monkeypatch.setattr(forms, "SHAPES", ((12, 4),))
    forms.main(["--problems=1"])
    first, trained, *others = capsys.readouterr().out.splitlines()
    assert first.split() == ["steps", "0", "8"] and len(others) == len(forms.TEXTS)
    # the path brings what it brings elsewhere
    assert float(trained.split()[-1]) >= 75 > 30 > float(trained.split()[-2])


@pytest.mark.parametrize("main, flags, words", [
    (untrained.main, ["--problems=0"], "--problems = 0 is out of range"),
    (forms.main, ["--problems=0"], "--problems = 0 is out of range"),
    (headline.main, ["--print", "--seeds=1"], "--print shows all results"),
    (headline.main, ["--print"], "holds no results"),
    (headline.main, ["--lr=-1"], "--lr = -1.0 is out of range"),
    (finetune.main, ["--init_from=none", "--sweep", "1", "--limit=3"], "--limit would do nothing"),
    (finetune.main, ["--init_from=none", "--methods=lora", "--steps=2"], "--steps would do nothing"),
    (finetune.main, ["--init_from=none", "--data_dir=x"], "--data_dir would do nothing"),
    (finetune.main, ["--init_from=none", "--warmup=-1"], "--warmup = -1 is out of range"),
    (harness.main, ["--init_from=tiny", "--tasks=x", "--draws=4"], "--draws would do nothing"),
    (harness.main, ["--init_from=tiny", "--tasks=x", "--limit=0"], "--limit = 0 is out of range"),
    (figures.main, ["log", "log.jsonl", "--topic=chains"], "--topic would do nothing"),
])
def test_what_would_do_nothing_is_refused_before_anything_is_written(
        main, flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_status(main, flags) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_finetuning_asks_the_training_questions_of_one_task(tmp_path, capsys, monkeypatch):
    for split in ("train", "test"):
        row = {"question": f"of {split}", "answer": "#### 1"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    text = finetune.conversations(TASKS["gsm8k"], tmp_path)
    assert "of train" in text and "of test" not in text

    out = tmp_path / "out"
    out.mkdir()
    (out / "made_of.json").write_text('{"task": "sums"}')
    monkeypatch.setattr(finetune, "run", pytest.fail)
    flags = [f"--init_from={resolve('tiny')}", "--task=chains", f"--out_dir={out}"]
    assert exit_status(finetune.main, flags) == 2
    assert "holds results of another task or model" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["made_of.json"]


def test_a_path_beside_a_finetuned_model_begins_with_its_finetuning(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(headline, "run", lambda *words: None)
    monkeypatch.setattr(headline, "train_once", lambda *words: trained.append(words))
    headline.train_and_measure("lora_refine", 7, tmp_path, [])
    (base, *base_flags), (path, *path_flags) = trained
    assert base == tmp_path / "lora-7" and "--method=lora" in base_flags
    assert path == tmp_path / "lora_refine-7" and f"--init_from={base}" in path_flags
    # as the embedded model itself learns
    args = train.parse([*path_flags, f"--out_dir={path}"])
    assert {name: getattr(args, name) for name in PRESETS["tiny"]} == PRESETS["tiny"]


def test_levels_without_training_have_a_row_of_their_own(tmp_path, capsys):
    for seed, right in ((1, 0.5), (2, 0.7)):
        rows = [{"temperature": 0, "topic": "chains", "column": "euler 8", "unseen": unseen,
                 "accuracy": accuracy}
                for unseen, accuracy in ((False, right), (False, right + 0.1), (True, 0.2))]
        (tmp_path / f"refine-{seed}.json").write_text(json.dumps({"accuracy": rows}))
    headline.main(["--print", f"--out_dir={tmp_path}"])
    found = capsys.readouterr().out
    assert "chains, temperature 0: euler 8 65.0 [55.0, 75.0]\n" in found
    assert "chains unseen, temperature 0: euler 8 20.0 [20.0, 20.0]\n" in found


def test_a_training_goes_on_with_its_own_flags_alone(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="3"):
        headline.run("-c", "raise SystemExit(3)")
    out = tmp_path / "lora-1"
    more = ["--rank=2", "--updates=1", "--batch_size=2", "--val_rows=2", "--device=cpu"]
    words = [*headline.METHODS["lora"], "--seed=1", "--report=0", *more]
    train.main([*words, f"--out_dir={out}"])
    commands = []
    monkeypatch.setattr(headline, "run", lambda *words: commands.append(words[:2]))
    with pytest.raises(ValueError, match="was begun with another --lr"):
        headline.train_once(out, *words, "--lr=0.5")
    (out / "done").write_text("--lr=0.5")
    with pytest.raises(ValueError, match="was trained with other flags"):
        headline.train_once(out, *words)
    (out / "done").unlink()
    # of a training before this one
    (tmp_path / "lora-1.json").write_text("{}")
    headline.train_and_measure("lora", 1, tmp_path, more)
    assert commands == [("train.py", "--init_from=resume"), ("eval.py", f"--init_from={out}")]
