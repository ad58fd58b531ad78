"""HumanEval and MBPP: programs that a model writes, graded by running their tests.

    HumanEval().grade(problem, text)    # {"strict": False, "flexible": True, "result": "passed"}

Two styles: "chat" has the prompts of the L2D evaluation, "plain" those of lm-evaluation-harness, so
that numbers can be compared with either. Two rules: strict runs the model's text behind the prompt,
unchanged, as both publications do; flexible also extracts the program from prose, fences and
chatter around it. Read data/tasks/sandbox.py before: it runs the programs.
"""

import ast
import inspect
import io
import re
import sys
import textwrap
import warnings
from pathlib import Path

from data.tasks.files import read_jsonl
from data.tasks.sandbox import run, run_all
from data.tasks.task import Task
from data.text.answer import cut, without_thoughts

FENCE = re.compile(r"^[ \t]*```.*$", re.M)
# The first line of a program; "import" or "class" alone may begin a sentence.
OPENING = (r"@\w|(?:async )?def \w|class \w+[ \t]*[:(]|"
           r"import [\w.]+[ \t\r]*(?:$|,|as |#)|from [\w.]+ import ")
ASSIGNED = r"(?:%s)[ \t]*(?::[^=\n]*)?=(?!=)"


# --- extracting a program from a text -------------------------------------------------------------

def defines(text: str, names) -> bool:
    """Does a program define one of the names?"""
    either = "|".join(map(re.escape, names))
    defined = rf"^[ \t]*(?:async )?(?:def|class)[ \t]+(?:{either})\b"
    return bool(re.search(f"{defined}|^{ASSIGNED % either}", text, re.M))


def broken_line(program: str) -> int:
    """The line of the first syntax error, or 0 if there is none."""
    try:
        # warnings about a model's program are of no use to our user
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(program, "program", "exec")
    except SyntaxError as error:
        return error.lineno or sys.maxsize
    # invalid characters, or nested too deeply for Python
    except (ValueError, OverflowError, MemoryError, RecursionError):
        return sys.maxsize
    return 0


def trimmed(head: str, text: str) -> str:
    """The text without the last lines that keep head and text from being a program.

    Prose follows there, or the token limit cut the text in the middle of a line.
    """
    # lines as Python counts them: no other character ends one
    lines = list(io.StringIO(text, newline=""))
    before = head.count("\n")
    while lines:
        line = broken_line(head + "".join(lines))
        if not line:
            break
        # remove at least one line; as long as the broken one is there, the text is no program
        last = min(line - before, len(lines))
        del lines[max(0, last - 1):]
    return "".join(lines).rstrip()


def definitions(head: str, text: str, names):
    """Yield the programs in a text that define a name, at most two.

    The first such fenced block, then the text from the first line on that begins such a program.
    """
    # An unclosed block counts too, and one that was opened in the prompt: the text between two
    # fences may be a block or not, so the name decides. A block in a list is indented as a whole.
    blocks = map(textwrap.dedent, FENCE.split(text)[1:])
    either = "|".join(map(re.escape, names))
    opening = re.finditer(f"^(?:{OPENING}|{ASSIGNED % either})", text, re.M)
    tails = (text[match.start():] for match in opening)
    for candidates in (blocks, tails):
        for candidate in candidates:
            program = trimmed(head, candidate)
            if defines(program, names):
                yield program
                break


# --- the common part of both tasks ----------------------------------------------------------------

class Code(Task):
    """A task that is graded by running programs; the two below add their own parts."""
    kind = "code"
    max_new_tokens = 512
    between = ""

    def programs(self, problem, text: str) -> tuple:
        """(the strict program, others that a fair reader could mean, the likeliest first)."""
        # the text before the model's, with imports and helpers; MBPP has none
        head = problem.get("prompt", "")
        # a draft in a thought is not the answer; models repeat the marks of the harness's prompts
        marked = cut(without_thoughts(text), ["[DONE]"])
        marked = marked.partition("[BEGIN]")[2] or marked
        readings = [*definitions(head, marked, self.names(problem)),
                    trimmed(head, cut(marked, self.stops["plain"]))]
        others = [self.fair_program(problem, reading) for reading in readings if reading.strip()]
        # each once, and not the strict one again: an endless loop takes its full time
        done = self.program(problem, text.rstrip())
        others = [program for program in dict.fromkeys(others) if program != done]
        return self.program(problem, text), others

    def fair_program(self, problem, text: str) -> str:
        """The program with all that its tests need.

        Two tests of MBPP need a tree, which is made here. The published graders omit it, so by the
        strict rule no answer passes, not even the references.
        """
        setup = problem.get("test_setup_code")
        return self.program(problem, f"{text}\n{setup}" if setup else text)

    def grade(self, problem, text: str, seconds: float = 3.0) -> dict:
        """Does the text pass unchanged (strict), or as at least one fair reading (flexible)?

        result  of the better of the two: "passed", "timeout" or "failed"
        """
        strict, others = self.programs(problem, text)
        verdicts = [run(strict, seconds)]
        for program in others:
            if verdicts[-1] == "passed":
                break
            verdicts.append(run(program, seconds))
        flexible = verdicts[-1] == "passed"
        result = "timeout" if "timed out" in verdicts else "failed"
        return {
            "strict": verdicts[0] == "passed",
            "flexible": flexible,
            "result": "passed" if flexible else result,
        }

    def check_references(self, problems, seconds: float = 3.0):
        """Raise ValueError if a reference solution does not pass its tests.

        Then this machine is too slow, or too busy, for the limit, and every accuracy measured on it
        would be too low. mbpp/123 fails first: its reference finds amicable numbers by trying all,
        3 to 4 s on a core of a small server, while 3 s are usual.
        """
        programs = [self.fair_program(problem, self.reference(problem)) for problem in problems]
        failed = [problem["id"] for problem, verdict in zip(problems, run_all(programs, seconds))
                  if verdict != "passed"]
        if failed:
            raise ValueError(f"{len(failed)} reference solutions of {self.name} fail on this "
                             f"machine, first {failed[0]}; try --code_seconds of more than "
                             f"{seconds:g}")

    def check(self, row: dict):
        """Raise ValueError for a row whose reference is no program with tests."""
        if broken_line(self.fair_program(row, self.reference(row))):
            raise ValueError(f"is no Python program, its {self.solution} and its tests together")

    def plausible(self, problem, text: str) -> bool:
        """Is it a program at all? Nothing is run."""
        return not broken_line(self.program(problem, text))

    def short(self, problem) -> dict:
        # the tests of a problem are too long for every record: grading reads the files
        return {}


# --- HumanEval ------------------------------------------------------------------------------------

class HumanEval(Code):
    """164 functions to complete (Chen et al. 2021)."""
    name = "humaneval"
    folder = "humaneval"
    solution = "canonical_solution"
    shots = {"chat": 5, "plain": 0}
    stops = {"plain": ("\nclass", "\ndef", "\n#", "\nif", "\nprint"), "chat": ()}

    def load(self, folder: Path) -> list:
        """The problems as published. Raises FileNotFoundError or ValueError."""
        needed = dict.fromkeys(
            ("task_id", "prompt", "entry_point", "canonical_solution", "test"), str)
        rows = read_jsonl(folder / "HumanEval.jsonl", needed, self.check)
        return [{"id": row["task_id"], **row} for row in rows]

    def examples(self, problems, problem, count: int, style: str) -> list:
        """The shots: the first problems, since there are no others."""
        return problems[:count]

    def scored(self, problems, shots: int, style: str) -> list:
        """The problems that are no shots."""
        return problems[shots:]

    def check(self, row: dict):
        # first, since its message is closer to the cause
        instruction(row)
        super().check(row)

    def question(self, problem) -> str:
        return problem["prompt"]

    def chat_question(self, problem) -> str:
        return instruction(problem)[0]

    def chat_answer(self, shot) -> str:
        return f"{instruction(shot)[1]}\n{shot['canonical_solution']}".strip()

    def prompt(self, problem, shots, style: str):
        """A text to continue, or messages whose last is a turn of the assistant to continue."""
        prompt = super().prompt(problem, shots, style)
        if style == "chat":
            prompt.append({"role": "assistant", "content": instruction(problem)[1]})
        return prompt

    def names(self, problem) -> list:
        """The names that a right program defines."""
        return [problem["entry_point"]]

    def program(self, problem, text: str) -> str:
        test = f"check({problem['entry_point']})"
        return f"{problem['prompt']}{text}\n{problem['test']}\n{test}"


def instruction(problem) -> tuple:
    """(the user's message, the beginning of the assistant's), made from the plain prompt.

    Raises ValueError for a prompt that does not end in a function's description.
    """
    prompt, name = problem["prompt"], problem["entry_point"]
    lines = prompt.split("\n")
    function = None
    quoted = ""
    if not broken_line(prompt):
        function = next((node for node in ast.parse(prompt).body
                         if getattr(node, "name", None) == name and hasattr(node, "body")), None)
    if function:
        # as it is written, with its escapes
        quoted = ast.get_source_segment(prompt, function.body[-1])
    if not quoted.startswith(('"""', "'''")):
        raise ValueError(f"has a prompt that does not end in a Python function {name[:40]!r} with "
                         "a description in triple quotes")
    # up to the colon; in one problem an import precedes the description
    first = function.body[0].lineno - 1
    start = "\n".join(lines[:first]).strip()
    signature = "\n".join(lines[function.lineno - 1:first]).strip()
    signature = signature.removeprefix("def ").removesuffix(":")
    description = inspect.cleandoc(quoted[3:-3])
    question = f"Write a function {signature} to solve the following problem:\n{description}"
    # Llama's template removes blanks at both ends, so all models read the same
    return question.strip(), start


# --- MBPP -----------------------------------------------------------------------------------------

class MBPP(Code):
    """974 small tasks: 1 to 10 are shots, 11 to 510 the test (Austin et al. 2021)."""
    name = "mbpp"
    folder = "mbpp"
    solution = "code"
    shots = {"chat": 5, "plain": 3}
    stops = {"plain": ("[DONE]",), "chat": ()}

    def load(self, folder: Path) -> list:
        """All parts, as published. Raises FileNotFoundError or ValueError."""
        needed = {"task_id": int, "text": str, "code": str, "test_list": list}
        rows = read_jsonl(folder / "mbpp.jsonl", needed, self.check)
        return [{"id": f"mbpp/{row['task_id']}", **row} for row in rows]

    def check(self, row: dict):
        if not row["test_list"]:
            raise ValueError("has an empty test_list, which every answer would pass")
        super().check(row)
        if not self.names(row):
            raise ValueError("has tests that call nothing of its code")

    def examples(self, problems, problem, count: int, style: str) -> list:
        """The shots: tasks from 1 on in chat style, from 2 on in plain, as published."""
        numbers = range(2 if style == "plain" else 1, 11)[:count]
        return [shot for shot in problems if shot["task_id"] in numbers]

    def scored(self, problems, shots: int, style: str) -> list:
        return [problem for problem in problems if 11 <= problem["task_id"] <= 510]

    def chat_question(self, problem) -> str:
        return f'"""\n{problem["text"]}\n{problem["test_list"][0]}\n"""'

    def chat_answer(self, shot) -> str:
        return shot["code"].strip()

    def question(self, problem) -> str:
        tests = "\n".join(problem["test_list"])
        return (f"You are an expert Python programmer, and here is your task: {problem['text']} "
                f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n")

    def worked(self, shot) -> str:
        return f"{shot['code']}\n[DONE]"

    def names(self, problem) -> list:
        """The names that a right program defines: those the tests call, unless Python has them."""
        called = re.findall(r"(\w+)[ \t]*\(", "\n".join(problem["test_list"]))
        # one task needs a `sum` of its own, so the reference decides which names Python has
        return [name for name in dict.fromkeys(called) if defines(problem["code"], [name])]

    def program(self, problem, text: str) -> str:
        return "\n".join([text, *problem["test_list"]])
