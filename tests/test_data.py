"""The small files of data/: where answers end, the log, the embedded topics as a task."""

import json
from types import SimpleNamespace

import pytest

from data.checkpoints.hub import resolve
from data.tasks import TASKS
from data.text.answer import Stop
from data.text.tokenizer import load_tokenizer
from data.training.log import Log

TINY = TASKS["tiny"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("tiny"))


def test_an_empty_stop_string_is_refused(tokenizer):
    with pytest.raises(ValueError, match="--stop is empty"):
        Stop.of(tokenizer, [""])


def test_the_log_tells_the_time_left_from_the_pace_of_this_run(tmp_path, capsys, monkeypatch):
    clock = SimpleNamespace(time=lambda: 0.0)
    monkeypatch.setattr("data.training.log.time", clock)
    log = Log(tmp_path, done=10, updates=110, eval_every=50)
    assert log.pace() == ""
    clock.time = lambda: 20.0
    for update in range(11, 31):
        log.add(update, 1.0, lr=0.1)
    # 20 updates took 20 s; 80 are left
    assert "1000 ms/update" in log.pace() and "1.3 min left" in log.pace()
    # a validation of six seconds is no part of the pace; three more are to come
    log.pauses.append(6.0)
    assert "700 ms/update" in log.pace() and "1.2 min left" in log.pace()
    log.show({"update": 30, "val_loss": 2.0, "by_tenth": [None] + [1.0] * 9})
    log.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line).get("update") for line in lines] == [*range(11, 31), 30]
    assert "val  2.000" in capsys.readouterr().out


def test_a_task_grades_its_own_reference_as_right(tokenizer):
    for group in TINY.groups:
        problem = TINY.problem(group, 0)
        ids, mask, *_ = TINY.reference(problem, tokenizer)
        answer = [i for i, counted in zip(ids, mask) if counted]
        text = tokenizer.decode([i for i in answer if i not in tokenizer.stop_ids])
        assert TINY.grade(problem, text, ended=True)
        assert not TINY.grade(problem, text, ended=False)
        assert not TINY.grade(problem, text + "x", ended=True)
        prompt = TINY.prompt(problem, tokenizer)
        assert list(ids[:len(prompt)]) == prompt


def test_problems_of_different_splits_and_seeds_differ():
    group = TINY.groups[0]
    keys = {TINY.key(TINY.problem(group, 0, seed, split))
            for seed in (0, 1) for split in ("val", "test")}
    assert len(keys) == 4
    assert TINY.class_id(TINY.problem(group, 0)) == 0
