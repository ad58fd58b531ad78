"""data/tiny/topics.py: answers are exact, splits disjoint, everything repeats from its seed."""

import random
import re
from collections import Counter

import numpy as np
import pytest

from data.checkpoints.hub import resolve
from data.text.tokenizer import load_tokenizer
from data.tiny import topics
from data.tiny.topics import (
    CLASSES, LEVELS, OPERATIONS, PLACES, ROW, UNSEEN, Documents, Problems, chains_problem,
    final_answer, make_document, make_problem, split_of, step_fact, steps_fact)

PAIRS = [(topic, level) for topic in LEVELS for level in LEVELS[topic]]
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("tiny"))


def read_map(text):
    """(place -> next place, start) of "ab bb;a", or of its pairs alone."""
    pairs, _, start = text.partition(";")
    assert all(len(pair) == 2 for pair in pairs.split())
    steps = dict(pairs.split())
    assert len(steps) == len(pairs.split())
    return steps, start


def key(problem):
    """The question, the same for any order of a chain's pairs."""
    if problem.topic == "chains":
        steps, start = read_map(problem.prompt)
        return tuple(sorted(steps.items())), start
    return problem.prompt


@pytest.mark.parametrize("level", LEVELS["math"])
def test_math_is_right_at_every_step(level):
    for i in range(200):
        problem = make_problem("train", i, topic="math", level=level)
        steps, answer = problem.response.split(" #### ")
        # digits and signs only: made two lines above by our own generator
        values = [eval(term) for term in steps.split("=")]
        assert set(values) == {eval(problem.prompt.rstrip("?"))}
        assert str(values[0]) == answer
        assert min(values) >= 0
        assert problem.prompt.count("*") == (1, 2, 2)[level - 1]


@pytest.mark.parametrize("level", LEVELS["strings"])
def test_strings_follow_the_operation_that_only_the_class_names(level):
    seen = Counter()
    for i in range(300):
        problem = make_problem("train", i, topic="strings", level=level)
        word = problem.prompt.rstrip("?")
        results = {name: "".join(change(word)) for name, change in OPERATIONS.items()}
        assert problem.response == results[problem.label]
        assert not any(name in problem.prompt for name in OPERATIONS)
        assert len(set(results.values())) == 3
        seen[problem.label] += 1
    assert all(seen[name] > 60 for name in OPERATIONS)


@pytest.mark.parametrize("level", LEVELS["chains"] + UNSEEN["chains"])
def test_a_chain_ends_after_as_many_hops_as_its_level(level):
    for i in range(100):
        problem = make_problem("train", i, topic="chains", level=level)
        steps, place = read_map(problem.prompt)
        # a chain of one place has no pair
        assert set(steps) | set(steps.values()) <= set(PLACES)
        walked = [place]
        while place in steps:
            place = steps[place]
            walked.append(place)
        assert len(walked) == level + 1
        assert problem.response == place
        # four chains, each with an end that no pair begins with
        assert len(steps) == len(PLACES) - 4
        assert all(a != b for a, b in steps.items())


def test_the_answer_of_a_chain_does_not_depend_on_its_place():
    """Each place is the answer about equally often, and so is each place in the text."""
    letters, places = Counter(), Counter()
    for i in range(1600):
        problem = make_problem("train", i, topic="chains", level=3)
        letters[problem.response] += 1
        pairs = problem.prompt.split(";")[0].split()
        places[[after for before, after in pairs].index(problem.response)] += 1
    for counts, most in ((letters, 150), (places, 190)):
        assert len(counts) == (16 if counts is letters else 12)
        assert max(counts.values()) < most


@pytest.mark.parametrize("fact", [step_fact, steps_fact])
def test_facts_for_the_base_are_single_steps(fact):
    rng = random.Random(0)
    for _ in range(200):
        pairs, *facts = re.split("[;,]", fact(rng))
        steps, _ = read_map(pairs)
        assert facts
        assert all(steps[a] == b for a, b in facts)


def test_other_facts_are_true():
    rng = random.Random(0)
    for _ in range(500):
        text = make_document(rng)
        if text[0] in "(0123456789" and "?" not in text:
            question, answer = text.split("=")
            assert eval(question) == int(answer)


@pytest.mark.parametrize("topic, level", PAIRS)
def test_splits_are_disjoint(topic, level):
    train, val, test = (
        {key(make_problem(split, i, seed, topic, level)) for i in range(150) for seed in (0, 1)}
        for split in SPLITS)
    assert not train & val
    assert not train & test
    assert not val & test
    assert min(len(train), len(val), len(test)) > 10


def test_a_word_is_in_one_split_with_every_operation():
    assert {split_of(f"word{i}") for i in range(100)} == set(SPLITS)
    train, test = (
        {make_problem(split, i, topic="strings", level=1).prompt for i in range(300)}
        for split in ("train", "test"))
    assert not train & test


@pytest.mark.parametrize("kind", [Problems, Documents])
def test_everything_repeats_from_its_seed(tokenizer, kind):
    assert make_problem("val", 3, 1) == make_problem("val", 3, 1) != make_problem("val", 3, 2)
    ids, again, other = (kind(tokenizer, seed=seed)[5][0] for seed in (0, 0, 1))
    assert np.array_equal(ids, again)
    assert not np.array_equal(ids, other)


def test_problem_rows_mask_the_answer_and_its_end(tokenizer):
    ids, mask, segments, label = Problems(tokenizer, "val")[7]
    problem = make_problem("val", 7)
    assert tokenizer.decode(ids[mask == 1][:-1]) == problem.response
    assert ids[-1] == tokenizer.eos_id
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids[mask == 0][1:]) == problem.prompt
    assert set(segments) == {1}
    assert CLASSES[label] == problem.label


def test_document_rows_are_full_and_every_document_has_its_segment(tokenizer):
    for i in range(20):
        ids, mask, segments = Documents(tokenizer)[i]
        assert len(ids) == len(mask) == len(segments) == ROW
        assert segments[0] == 1
        starts = ids == tokenizer.bos_id
        assert np.array_equal(starts, np.diff(segments, prepend=0) == 1)
        assert np.array_equal(mask == 0, starts)


def test_the_same_map_in_another_order_is_the_same_question():
    chosen, *_, prompt, _ = chains_problem(random.Random(1), 4)
    pairs, place = prompt.split(";")
    assert chosen == " ".join(sorted(pairs.split())) + place


def test_the_base_reads_composed_problems_of_the_training_split_alone(monkeypatch):
    monkeypatch.setattr(topics, "COMPOSED", 1)
    for seed in range(60):
        prompt = make_document(random.Random(seed)).split("?")[0]
        # a word is the key of its problem, a sum with its question mark
        assert split_of(prompt if prompt.isalpha() else f"{prompt}?") == "train"


def test_composed_problems_are_rare_in_the_text(tokenizer):
    text = "".join(tokenizer.decode(Documents(tokenizer)[i][0]) for i in range(400))
    documents = text.split("<|end_of_text|>")
    composed = sum("?" in document for document in documents)
    assert 0 < composed < 0.01 * len(documents)


@pytest.mark.parametrize("text, answer", [
    ("56+15=71 #### 71", "71"),
    ("abc", "abc"),
    (" goat #### B", "B"),
    ("1 #### 2 #### 3 ", "3"),
    ("", ""),
])
def test_final_answer(text, answer):
    assert final_answer(text) == answer
