"""data/tasks/sums.py and chains.py: questions, the split, verdicts, eval.py."""

import json
import re
import subprocess
import sys

import pytest

import eval as evaluation
from conftest import ROOT, exit_status
from data.results import records, scores
from data.tasks import TASKS
from data.tasks.sums import HARD_KINDS, KINDS, MOST, of_all_kinds, of_kind
from data.tasks.task import of_split
from test_benchmarks import build_models
from test_formats import SMOLLM

TASK, HARD = TASKS["sums"], TASKS["hard_sums"]
FIRST = ("Kate tells Oscar. Nick tells Grace. Rose tells Kate. Lucy tells Jane. Jane tells Clara. "
         "Oscar tells Tom. Grace tells Sarah. The news starts with Oscar", "Tom")
PROBLEMS = TASK.load()
ALL = PROBLEMS + HARD.load()


def parts(problem: dict) -> tuple:
    """(kind, smaller, sign, larger), read from the id."""
    kind, numbers = problem["id"].split("/")[2:]
    sign = {**KINDS, **HARD_KINDS}[kind][0]
    a, b = sorted(map(int, numbers.split(sign)))
    return kind, a, sign, b


def pairs(problems: list) -> set:
    return {(a, b) for _, a, _, b in map(parts, problems)}


# --- questions ------------------------------------------------------------------------------------

def test_the_same_problems_every_time():
    assert TASK.load() == PROBLEMS
    # these go into records, so they must not change
    assert PROBLEMS[0] == {
        "id": "sums/test/sums/1+17", "answer": "18",
        "question": "Reply with one number and nothing else. 1 + 17 = ?"}
    assert len(of_split(PROBLEMS, "test")) == 348 and len(of_split(PROBLEMS, "train")) == 2907
    # in another process too: Python's own hash differs from run to run
    code = ("import json; from data.tasks import TASKS; "
            "print(json.dumps(TASKS['sums'].load()[:400]))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True, env={"PYTHONHASHSEED": "1"})
    assert json.loads(done.stdout) == PROBLEMS[:400]


def test_no_two_numbers_of_a_test_question_are_trained_on():
    test, train = (pairs(of_split(ALL, split)) for split in ("test", "train"))
    assert len(test) > 100 and not test & train
    # by construction: also of those that the limit leaves out
    for task in (TASK, HARD):
        for kind in task.kinds:
            test, train = (pairs(of_kind(kind, split, task.kinds, task.name))
                           for split in ("test", "train"))
            assert not test & train


def test_no_question_occurs_twice():
    assert len({one["question"] for one in ALL}) == len(ALL)
    assert len({one["id"] for one in ALL}) == len(ALL)


@pytest.mark.parametrize("task, kind", [(task, kind) for task in (TASK, HARD)
                                        for kind in task.kinds])
def test_a_kind_has_all_pairs_of_its_ranges_in_both_orders(task, kind):
    _, smaller, larger = task.kinds[kind]
    problems = [one for split in ("test", "train")
                for one in of_kind(kind, split, task.kinds, task.name)]
    assert pairs(problems) == {(a, b) for a in smaller for b in larger if a <= b}
    # of equal numbers there is one order
    equal = sum(a == b for a, b in pairs(problems))
    assert len(problems) == 2 * len(pairs(problems)) - equal


def test_answers_are_the_numbers():
    for problem in ALL:
        _, a, sign, b = parts(problem)
        assert problem["answer"] == str(a + b if sign == "+" else a * b)


@pytest.mark.parametrize("split", ["test", "train"])
def test_the_first_questions_are_of_all_kinds(split):
    counts = {kind: 0 for kind in KINDS}
    for problem in of_all_kinds(split, KINDS, "sums"):
        counts[parts(problem)[0]] += 1
    assert max(counts.values()) == MOST[split] and min(counts.values()) >= 20
    first = [parts(one)[0] for one in of_split(PROBLEMS, split)[:60]]
    assert set(first) == set(KINDS)


# --- chains of names ------------------------------------------------------------------------------

def walk(question: str, place: str) -> list:
    """The names after a place, up to one that tells nobody."""
    told = dict(re.findall(r"(\w+) tells (\w+)\.", question))
    # two other chains end elsewhere
    assert len(set(told.values()) - set(told)) == 3
    names = []
    while place in told:
        place = told[place]
        names.append(place)
    return names


def test_an_answer_lies_as_many_hops_away_as_its_level_says():
    chains, hops = TASKS["chains"].load(), TASKS["hops"].load()
    assert len(chains) == 1300 + 8000 and len(hops) == 300 + 4800
    assert TASKS["chains"].load() == chains
    assert chains[0] == {"id": "chains/test/1/0", "question": FIRST[0], "answer": FIRST[1]}
    for one in chains + hops:
        task, _, level, _ = one["id"].split("/")
        names = walk(one["question"], one["question"].split()[-1])
        assert len(names) == int(level)
        assert one["answer"].split() == (names[-1:] if task == "chains" else names[:3])
    test, train = ({" ".join(sorted(one["question"].split(". "))) for one in of_split(chains, split)}
                   for split in ("test", "train"))
    assert not test & train
    assert {one["id"].split("/")[2] for one in of_split(chains, "train")} == set("12345")


@pytest.mark.parametrize("text, strict, flexible", [
    (" Rose", True, True), ("Rose.", False, True), (" Rose tells Tom", False, True),
    (" Tom", False, False), ("", False, False), (" Rosemary", False, False)])
def test_which_names_are_right(text, strict, flexible):
    task = TASKS["chains"]
    assert task.grade({"answer": "Rose"}, text) == {"strict": strict, "flexible": flexible}
    assert task.extract({}, text) == (text.split() or [None])[0]


# --- prompts --------------------------------------------------------------------------------------

def test_the_chat_prompt():
    assert TASK.prompt(PROBLEMS[0], [], "chat") == [
        {"role": "user", "content": "Reply with one number and nothing else. 1 + 17 = ?"}]


def test_the_plain_prompt_and_its_shots():
    shots = TASK.examples(PROBLEMS, PROBLEMS[0], 1, "plain")
    assert shots == of_split(PROBLEMS, "train")[:1]
    assert TASK.prompt(PROBLEMS[0], shots, "plain") == (
        f"Question: {shots[0]['question']}\nAnswer: {shots[0]['answer']}\n\n"
        "Question: Reply with one number and nothing else. 1 + 17 = ?\nAnswer:")


# --- verdicts -------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, strict, flexible", [
    ("1018", True, True), (" 1018\n", True, True), ("1,018", False, True), ("1018.", False, True),
    ("The answer is 1018.", False, True), ("18 + 1000 = 1018", False, True),
    ("1018 is 18 + 1000", False, False), ("1017", False, False), ("-1018", False, False),
    ("01018", False, False), ("10 18", False, False), ("1018.0", False, False),
    ("one thousand and eighteen", False, False), ("", False, False),
    ("1018<|im_end|>7", True, True), ("1018\n\nQuestion: 1 + 1", True, True),
])
def test_which_answers_are_right(text, strict, flexible):
    assert TASK.grade({"answer": "1018"}, text) == {"strict": strict, "flexible": flexible}


# --- eval.py --------------------------------------------------------------------------------------

def test_eval_needs_no_file(tmp_path, capsys):
    _, path = build_models(tmp_path, SMOLLM)
    words = [f"--init_from={path}", "--task=sums", f"--out={tmp_path / 'out'}", "--device=cpu",
             "--limit=5", "--shots=0", "--style=chat", "--steps=2", "--max_new_tokens=3"]
    assert exit_status(evaluation.main, words) == 0
    lines = records.read_lines(tmp_path / "out" / "records.jsonl")[1:]
    expected = sorted(one["id"] for one in PROBLEMS[:5])
    for column in ("frozen", "euler 2"):
        assert sorted(line["id"] for line in lines if line["column"] == column) == expected
    said = capsys.readouterr().out
    assert "sums, 5 problems, chat prompts, 0 shots" in said
    # the kinds of the five; every one takes three evaluations a token, which are not repeated
    kinds = [kind for kind in KINDS if any(f"/{kind}/" in one["id"] for one in PROBLEMS[:5])]
    _, head, *columns = said.split("\nby kind")[1].split("\n\n")[0].splitlines()
    assert head.split() == kinds
    assert [line.split() for line in columns] == [
        [*name, *["0.0"] * len(kinds)] for name in (["frozen"], ["euler", "2"])]


def test_every_kind_has_its_own_share_and_its_own_cost(capsys):
    answers = [(1, 0, True, 6), (1, 1, False, 8), (12, 0, True, 40)]
    lines = [{"id": f"chains/test/{level}/{number}", "strict": right, "tokens": 2, "nfe": nfe}
             for level, number, right, nfe in answers]
    assert scores.kind_table(TASKS["chains"].kinds, lines) == {
        "1": {"n": 2, "strict": 0.5, "nfe_per_token": 3.5},
        "12": {"n": 1, "strict": 1.0, "nfe_per_token": 20.0}}
    scores.print_kinds([{"column": "euler 8 stop 2", "temperature": 0, "search": "",
                         "kinds": scores.kind_table(("1", "12"), lines)}])
    *_, right, nfe = capsys.readouterr().out.splitlines()
    assert right.split() == ["euler", "8", "stop", "2", "50.0", "100.0"]
    assert nfe.split() == ["(3.5)", "(20.0)"]
