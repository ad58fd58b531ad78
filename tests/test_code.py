"""HumanEval and MBPP: exact prompts, the program in a text, verdicts, pass@k.

tests/test_benchmarks.py compares published verdicts and prompts.
"""

import gzip
import json
from fractions import Fraction
from itertools import combinations

import pytest

from data.results.statistics import pass_at_k
from data.tasks import code
from data.tasks.code import MBPP, HumanEval

PROMPT = '''import math


def half(x: float) -> float:
    return x / 2

def area(side: float,
         high: float) -> float:
    """ The area of a triangle,
    which is half a "rectangle".

    >>> area(2, 3)\\t# a comment
    3.0
    """
'''
AREA = {
    "task_id": "HumanEval/7",
    "prompt": PROMPT,
    "entry_point": "area",
    "canonical_solution": "    return half(side * high)\n",
    "test": "\n\ndef check(candidate):\n    assert candidate(2, 3) == 3\n",
}
TWICE = {
    "task_id": "HumanEval/8",
    "prompt": '\n\ndef twice(x):\n    """Two of x."""\n',
    "entry_point": "twice",
    "canonical_solution": "\n    return 2 * x\n\n",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n",
}


def mbpp_row(number, name="add", **more):
    return {
        "task_id": number,
        "text": f"Write number {number}.",
        "code": f"def {name}(a, b):\r\n  return a + b ",
        "test_list": [f"assert {name}(1, 2) == 3", f"assert set([{name}(2, 2)]) == set([4]) "],
        "test_setup_code": "",
        "challenge_test_list": [],
        **more,
    }


@pytest.fixture
def humaneval(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in (AREA, TWICE))
    (tmp_path / "HumanEval.jsonl").write_text(lines, encoding="utf-8")
    return HumanEval().load(tmp_path)


@pytest.fixture
def mbpp(tmp_path):
    rows = [mbpp_row(number) for number in (1, 2, 3, 4, 5, 10, 11, 510, 511)]
    (tmp_path / "mbpp.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return MBPP().load(tmp_path)


def ids(problems):
    return [problem["id"] for problem in problems]


# --- files ----------------------------------------------------------------------------------------

def test_rows_are_as_published_with_an_id(humaneval, mbpp):
    assert humaneval[0] == {"id": "HumanEval/7", **AREA}
    assert mbpp[0] == {"id": "mbpp/1", **mbpp_row(1)}


def test_a_packed_file_is_read_too(tmp_path):
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(AREA) + "\n")
    assert ids(HumanEval().load(tmp_path)) == ["HumanEval/7"]
    content = (tmp_path / "HumanEval.jsonl.gz").read_bytes()
    for place in (0, 40, len(content) - 1):
        (tmp_path / "HumanEval.jsonl.gz").write_bytes(content[:place] + b"?" + content[place + 1:])
        with pytest.raises(ValueError, match="HumanEval.jsonl.gz is damaged .*; get it again"):
            HumanEval().load(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="mbpp.jsonl does not exist, packed .* or not"):
        MBPP().load(tmp_path)


@pytest.mark.parametrize("change, words", [
    ({"prompt": "const f = (x) => {\n"}, "does not end in a Python function 'twice'"),
    ({"entry_point": "half"}, "does not end in a Python function 'half'"),
    ({"prompt": "def twice(x):\n    # two of x\n"}, "description in triple quotes"),
    ({"prompt": "def twice(x):\n    'two'\n"}, "description in triple quotes"),
    ({"canonical_solution": "  return }\n"}, "canonical_solution and its tests"),
    ({"test": "int main() {}"}, "canonical_solution and its tests"),
    ({"context": "a file"}, "has a column 'context'"),
])
def test_a_row_of_humaneval_that_is_no_program_is_refused(tmp_path, change, words):
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps({**TWICE, **change}))
    with pytest.raises(ValueError, match=f"line 1 of .*{words}.*; use the file as published"):
        HumanEval().load(tmp_path)


@pytest.mark.parametrize("change, words", [
    ({"test_list": []}, "has an empty test_list"),
    ({"test_list": ["assert 1 == 1"]}, "call nothing of its code"),
    ({"code": "function add(a, b) {}"}, "is no Python program"),
])
def test_a_row_of_mbpp_that_is_no_program_is_refused(tmp_path, change, words):
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(mbpp_row(11, **change)))
    with pytest.raises(ValueError, match=f"line 1 of .*{words}.*; use the file as published"):
        MBPP().load(tmp_path)


def test_which_problems_are_shots_and_which_are_scored(humaneval, mbpp):
    task = HumanEval()
    assert task.shots == {"chat": 5, "plain": 0}
    assert ids(task.examples(humaneval, None, 1, "chat")) == ["HumanEval/7"]
    assert ids(task.scored(humaneval, 1, "chat")) == ["HumanEval/8"]
    assert ids(task.scored(humaneval, 0, "plain")) == ["HumanEval/7", "HumanEval/8"]
    task = MBPP()
    assert task.shots == {"chat": 5, "plain": 3}
    chat = task.examples(mbpp, None, 5, "chat")
    assert ids(chat) == ["mbpp/1", "mbpp/2", "mbpp/3", "mbpp/4", "mbpp/5"]
    assert ids(task.examples(mbpp, None, 3, "plain")) == ["mbpp/2", "mbpp/3", "mbpp/4"]
    for style in ("chat", "plain"):
        assert ids(task.scored(mbpp, 3, style)) == ["mbpp/11", "mbpp/510"]


# --- prompts --------------------------------------------------------------------------------------

def test_humaneval_as_turns(humaneval):
    area, twice = humaneval
    assert HumanEval().prompt(area, [twice], "chat") == [
        {"role": "user", "content":
            "Write a function twice(x) to solve the following problem:\nTwo of x."},
        {"role": "assistant", "content": "def twice(x):\n\n    return 2 * x"},
        {"role": "user", "content":
            "Write a function area(side: float,\n         high: float) -> float to solve the "
            'following problem:\nThe area of a triangle,\nwhich is half a "rectangle".\n\n'
            ">>> area(2, 3)\\t# a comment\n3.0"},
        # an open turn: the model continues behind the colon
        {"role": "assistant", "content":
            "import math\n\n\ndef half(x: float) -> float:\n    return x / 2\n\n"
            "def area(side: float,\n         high: float) -> float:"},
    ]


def test_an_import_before_the_description_is_no_part_of_the_signature(humaneval):
    prompt = 'def f(x):\n    import math\n    """Text."""\n'
    problem = {**humaneval[0], "prompt": prompt, "entry_point": "f"}
    question, start = HumanEval().prompt(problem, [], "chat")
    assert question["content"].endswith("problem:\nText.")
    assert start["content"] == "def f(x):"


def test_humaneval_as_a_text(humaneval):
    area, twice = humaneval
    assert HumanEval().prompt(area, [], "plain") == PROMPT
    text = HumanEval().prompt(area, [twice], "plain")
    assert text == twice["prompt"] + twice["canonical_solution"] + "\n\n" + PROMPT


def test_mbpp_as_turns(mbpp):
    assert MBPP().prompt(mbpp[6], mbpp[:1], "chat") == [
        {"role": "user", "content": '"""\nWrite number 1.\nassert add(1, 2) == 3\n"""'},
        {"role": "assistant", "content": "def add(a, b):\r\n  return a + b"},
        {"role": "user", "content": '"""\nWrite number 11.\nassert add(1, 2) == 3\n"""'},
    ]


def test_mbpp_as_a_text(mbpp):
    text = ("You are an expert Python programmer, and here is your task: Write number {}. Your "
            "code should pass these tests:\n\nassert add(1, 2) == 3\n"
            "assert set([add(2, 2)]) == set([4]) \n[BEGIN]\n")
    solved = text.format(2) + "def add(a, b):\r\n  return a + b \n[DONE]\n\n"
    assert MBPP().prompt(mbpp[6], [mbpp[1]], "plain") == solved + text.format(11)
    assert MBPP().prompt(mbpp[6], [], "plain") == text.format(11)


# --- the program in a text ------------------------------------------------------------------------

BODY = "    return half(side * high)\n"
WHOLE = f"def area(side, high):\n{BODY}"
# text -> (strict, flexible)
AREAS = {
    "body": (BODY, True, True),
    "body on a new line": ("\n" + BODY, True, True),
    "body, windows": (BODY.replace("\n", "\r\n"), True, True),
    "whole function": (WHOLE, True, True),
    "helper behind": ("    return _a(side, high)\n\ndef _a(s, h):\n    return s * h / 2\n",
                      True, True),
    "main part": (BODY + "\nif __name__ == '__main__':\n    print(area(input()))\n", True, True),
    "chatter behind": (BODY + "\nprint(area(input()))\n", False, True),
    "cut in the middle": (BODY + "\ndef test_area():\n    assert area(", False, True),
    "fence": (f"Sure:\n```python\n{WHOLE}```\nThat is all.", False, True),
    "fence without an end": (f"```\n{WHOLE}", False, True),
    "fence cut in a line": (f"```\n{WHOLE}\nprint(area(1, ", False, True),
    "fence that only ends": (f"{BODY}```\nThat is all.", False, True),
    "second fence": (f"```python\nprint(area(1, 2))\n```\nand\n```python\n{WHOLE}```", False, True),
    "draft in a thought": (f"<think>\n```\n{WHOLE.replace('half', '')}```\nNo.\n</think>\n"
                           f"```python\n{WHOLE}```", False, True),
    "thought opened before": (f"```\n{WHOLE.replace('half', '')}```\n</think>\n{WHOLE}",
                              False, True),
    "thought alone": (f"<think>\n```\n{WHOLE}```\nOr is", False, False),
    "fence in a list": ("1. So:\n   ```python\n   def area(side, high):\n"
                        "       return half(side * high)\n   ```\n", False, True),
    "prose": (f"Here it is.\nimport of nothing needed\n{WHOLE}\nIt halves the product.",
              False, True),
    "imports, windows": (f"So:\r\nimport math as m\r\n{WHOLE}    assert m\r\nDone it is.",
                         False, True),
    "no indentation": (BODY.lstrip(), False, False),
    "other name": (f"```python\n{WHOLE.replace('area', 'surface')}```", False, False),
    "wrong": ("    return side\n", False, False),
    "wrong in a fence": (f"```\n{WHOLE.replace('half', '')}```", False, False),
    "own wrong test": (BODY + "\nassert area(1, 1) == 7\n", False, False),
    "nothing": ("", False, False),
    "prose only": ("I cannot do that.", False, False),
}


@pytest.mark.parametrize("text, strict, flexible", AREAS.values(), ids=AREAS)
def test_readings_of_a_humaneval_answer(text, strict, flexible, humaneval):
    result = "passed" if flexible else "failed"
    expected = {"strict": strict, "flexible": flexible, "result": result}
    assert HumanEval().grade(humaneval[0], text) == expected


ADD = "def add(a, b):\n    return a + b\n"
ADDS = {
    "code": (ADD, True, True),
    "lambda": ("add = lambda a, b: a + b", True, True),
    "end mark": (f"{ADD}[DONE]\n\nYou are", False, True),
    "both marks": (f"[BEGIN]\n{ADD}[DONE]", False, True),
    "marked constant": ("[BEGIN]\nZERO = 0\ndef add(a, b):\n    return a + b + ZERO\n[DONE]",
                        False, True),
    "marked lambda": ("[BEGIN]\nadd = lambda a, b: a + b\n[DONE]", False, True),
    "fenced constant": ("```python\nZERO = 0\ndef add(a, b):\n    return a + b + ZERO\n```",
                        False, True),
    "prose": (f"Sure! Here is the code:\n{ADD}", False, True),
    "prose and lambda": ("Sure:\nadd = lambda a, b: a + b\nSo it is.", False, True),
    "body": ("    return a + b", False, False),
    "own wrong test": (f"{ADD}\nassert add(1, 1) == 3\n", False, False),
}


@pytest.mark.parametrize("text, strict, flexible", ADDS.values(), ids=ADDS)
def test_readings_of_an_mbpp_answer(text, strict, flexible, mbpp):
    graded = MBPP().grade(mbpp[0], text)
    assert (graded["strict"], graded["flexible"]) == (strict, flexible)


def test_an_endless_answer_times_out_once(humaneval, monkeypatch):
    runs = []
    monkeypatch.setattr(code, "run", lambda program, seconds: runs.append(seconds) or "timed out")
    graded = HumanEval().grade(humaneval[0], "    while True:\n        pass\n", 0.5)
    assert graded == {"strict": False, "flexible": False, "result": "timeout"}
    assert runs == [0.5]


def test_a_function_may_be_called_like_one_of_python(mbpp):
    problem = {**mbpp[0], **mbpp_row(1, name="sum")}
    assert MBPP().names(problem) == ["sum"]
    assert MBPP().grade(problem, "```\ndef sum(a, b):\n    return a + b\n```")["flexible"]


def test_what_the_tests_need_is_there_for_the_flexible_rule_alone(mbpp):
    """The published rule forgets it, and strict is the published rule."""
    problem = {**mbpp[0], "test_setup_code": "two = add(1, 1)", "test_list": ["assert two == 2"]}
    assert MBPP().grade(problem, ADD) == {"strict": False, "flexible": True, "result": "passed"}


def test_no_warning_and_no_depth_disturbs_the_reading(recwarn):
    assert not code.broken_line("x = '\\d' is 1")
    assert code.broken_line("(" * 10_000)
    assert code.broken_line("-" * 100_000 + "1")
    assert code.broken_line("x = '\ud800'")
    assert code.broken_line("x = '\0'")
    assert not recwarn.list


def test_a_long_text_is_not_tried_line_by_line(humaneval, monkeypatch):
    tried = []
    broken_line = code.broken_line
    monkeypatch.setattr(code, "broken_line", lambda text: tried.append(1) or broken_line(text))
    HumanEval().programs(humaneval[0], "def area(side):\n    return (side\n" * 1000)
    # a few times for each of its 1,000 beginnings, not once more for each line behind them
    assert len(tried) < 5000


@pytest.mark.parametrize("text, kept", [
    ("x = 1\ny = (\nz", "x = 1"),
    ("x = 1\n\nProse, it is.\nMore.", "x = 1"),
    ("x = 1\r\nif x:\r\n    y = 1\r\n    z", "x = 1\r\nif x:\r\n    y = 1\r\n    z"),
    ("x = 'a\x0cb\u2028c'\nno way", "x = 'a\x0cb\u2028c'"),
    ("def f():\n    return 1\ndef g():\n    if 1:\n", "def f():\n    return 1"),
    ('x = 1\ny = """\n1\n2', "x = 1"),
    ("try:\n    x = 1\nx = 2", ""),
    ("return 1", ""),
])
def test_only_the_last_lines_go(text, kept):
    assert code.trimmed("# first\n", text) == kept


# --- references and records -----------------------------------------------------------------------

def test_references_pass_or_are_named(humaneval, mbpp):
    HumanEval().check_references(humaneval)
    broken = {**mbpp[1], "code": "def add(a, b): return 7"}
    with pytest.raises(ValueError, match="1 reference solutions of mbpp fail .*, first mbpp/2"):
        MBPP().check_references([mbpp[0], broken, mbpp[2]])


def test_only_a_program_is_plausible(humaneval):
    assert HumanEval().plausible(humaneval[0], BODY)
    assert not HumanEval().plausible(humaneval[0], "    return (")


# --- pass@k ---------------------------------------------------------------------------------------

def test_pass_at_k_counts_the_draws_that_hold_a_right_one():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations(range(n), k))
                # the right ones are the first c
                right = sum(min(draw) < c for draw in draws)
                assert pass_at_k(n, c, k) == float(Fraction(right, len(draws)))
    # too few samples
    assert pass_at_k(5, 5, 6) is None
    assert pass_at_k(200, 3, 100) == pytest.approx(
        1 - Fraction(100 * 99 * 98, 200 * 199 * 198), rel=1e-15)
