"""data/tiny/topics.py: answers are exact, splits disjoint, everything repeats from its seed."""

import re

import numpy as np
import pytest

from data.hub import resolve
from data.tiny.topics import CLASSES, LEVELS, OPERATIONS, ROW, VALUES, WORLD, Documents, Problems, final_answer, make_problem, split_of
from data.tokenizer import load_tokenizer

PAIRS = [(topic, level) for topic in LEVELS for level in LEVELS[topic]]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("tiny"))


def key(problem):
    """What identifies a question, whatever the order of its choices."""
    return problem.prompt.split(", ")[-1].rstrip(":?") if problem.topic == "knowledge" else problem.prompt


@pytest.mark.parametrize("level", LEVELS["math"])
def test_math_is_right_at_every_step(level):
    for i in range(200):
        problem = make_problem("train", i, topic="math", level=level)
        steps, answer = problem.response.split(" #### ")
        values = [eval(term) for term in steps.split("=")]      # digits and signs only: made a line above by our own generator
        assert set(values) == {eval(problem.prompt.rstrip("?"))} and str(values[0]) == answer and min(values) >= 0
        assert problem.prompt.count("*") == (1, 2, 2)[level - 1]


@pytest.mark.parametrize("level", LEVELS["strings"])
def test_strings_follow_the_operation_that_only_the_class_names(level):
    seen = {}
    for i in range(300):
        problem = make_problem("train", i, topic="strings", level=level)
        word = problem.prompt.rstrip("?")
        assert problem.response == "".join(OPERATIONS[problem.label](word)) and not any(name in problem.prompt for name in OPERATIONS)
        assert len({"".join(change(word)) for change in OPERATIONS.values()}) == 3
        seen[problem.label] = seen.get(problem.label, 0) + 1
    assert all(seen[name] > 60 for name in OPERATIONS)


def test_knowledge_agrees_with_the_world():
    for level in LEVELS["knowledge"]:
        for i in range(200):
            problem = make_problem("train", i, topic="knowledge", level=level)
            attribute, name = re.search(r", (\w+) of (?:friend of )?(\w+):$", problem.prompt).groups()
            name = WORLD[name]["friend"] if level == 2 else name
            assert f"{problem.answer} {WORLD[name][attribute]}" in problem.prompt and WORLD[name][attribute] in VALUES[attribute]
            assert (name in problem.response) == (level == 2)


@pytest.mark.parametrize("topic, level", PAIRS)
def test_splits_are_disjoint(topic, level):
    questions = {split: {key(make_problem(split, i, seed, topic, level)) for i in range(150) for seed in (0, 1)} for split in ("train", "val", "test")}
    assert not questions["train"] & questions["val"] and not questions["train"] & questions["test"] and not questions["val"] & questions["test"]
    assert min(map(len, questions.values())) > 10


def test_a_word_is_in_one_split_whatever_is_done_to_it():
    assert {split_of(f"word{i}") for i in range(100)} == {"train", "val", "test"}
    words = lambda split: {make_problem(split, i, topic="strings", level=1).prompt for i in range(300)}
    assert not words("train") & words("test")


def test_everything_repeats_from_its_seed(tokenizer):
    assert make_problem("val", 3, 1) == make_problem("val", 3, 1) != make_problem("val", 3, 2)
    for kind in (Problems, Documents):
        first, again, other = kind(tokenizer)[5], kind(tokenizer)[5], kind(tokenizer, seed=1)[5]
        assert np.array_equal(first[0], again[0]) and not np.array_equal(first[0], other[0])


def test_problem_rows_mask_the_answer_and_its_end(tokenizer):
    ids, mask, segments, label = Problems(tokenizer, "val")[7]
    problem = make_problem("val", 7)
    assert tokenizer.decode(ids[mask == 1][:-1]) == problem.response and ids[-1] == tokenizer.eos_id and ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids[mask == 0][1:]) == problem.prompt and set(segments) == {1} and CLASSES[label] == problem.label


def test_document_rows_are_full_and_every_document_has_its_segment(tokenizer):
    for i in range(20):
        ids, mask, segments, _ = Documents(tokenizer)[i]
        assert len(ids) == len(mask) == len(segments) == ROW and segments[0] == 1
        assert np.array_equal(ids == tokenizer.bos_id, np.diff(segments, prepend=0) == 1) and np.array_equal(mask == 0, ids == tokenizer.bos_id)


def test_composed_problems_are_rare_in_the_text(tokenizer):
    text = "".join(tokenizer.decode(Documents(tokenizer)[i][0]) for i in range(400))
    documents = text.split("<|end_of_text|>")
    composed = sum("?" in document for document in documents)
    assert 0 < composed < 0.01 * len(documents)


@pytest.mark.parametrize("text, answer", [("56+15=71 #### 71", "71"), ("abc", "abc"), (" goat #### B", "B"), ("1 #### 2 #### 3 ", "3"), ("", "")])
def test_final_answer(text, answer):
    assert final_answer(text) == answer
