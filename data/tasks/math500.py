"""MATH-500: 500 problems of the MATH competition set (Hendrycks et al. 2021; Lightman et al. 2023).

    python eval.py --task math500 --init_from=DIR --limit 100

Not MATH, which has 5,000 problems. Shots are the four of Minerva (Lewkowycz et al. 2022): as turns
for "chat", in the text of lm-evaluation-harness (`minerva_math500`, version 3.1) for "plain".
data/tasks/math/equal.py decides when two answers are equal.
"""

from pathlib import Path

from data.tasks.files import read_jsonl
from data.tasks.math.equal import equal, extract, grade
from data.tasks.task import Task
from data.text.answer import cut

SHOTS = Path(__file__).with_name("minerva_shots.jsonl")
ROW = {"problem": str, "solution": str, "answer": str}


def check_answer(row: dict):
    """Raise ValueError for an empty answer, which no box could hold."""
    if not row["answer"].strip():
        raise ValueError("has an empty answer")


class Math500(Task):
    name = "math500"
    folder = "math500"
    kind = "text"
    solution = "solution"
    shots = {"chat": 4, "plain": 4}
    # a quarter of the reference solutions are longer than the paper's 256
    max_new_tokens = 1024
    stops = {"chat": (), "plain": ("Problem:",)}

    def load(self, folder: Path) -> list:
        """Rows with an id. Raises ValueError for missing or other files."""
        rows = read_jsonl(folder / "test.jsonl", ROW, check_answer)
        return [{"id": f"math500/{number}", **row} for number, row in enumerate(rows)]

    def scored(self, problems: list, shots: int, style: str) -> list:
        return problems

    def examples(self, problems: list, problem: dict, count: int, style: str) -> list:
        """The same four for every problem."""
        return read_jsonl(SHOTS, ROW)[:count]

    def chat_question(self, problem: dict) -> str:
        return problem["problem"]

    def question(self, problem: dict) -> str:
        return f"Problem:\n{problem['problem']}\n\nSolution:"

    def worked(self, shot: dict) -> str:
        return (f"{shot['solution']}\n"
                f"Final Answer: The final answer is ${shot['answer']}$. I hope it is correct.")

    def grade(self, problem: dict, text: str) -> dict:
        """strict: the last box, equal as a text; flexible: any form, equal in value."""
        return grade(text, problem["answer"])

    def extract(self, problem: dict, text: str) -> str | None:
        """The answer that a vote compares; None without any."""
        return extract(cut(text, self.stops["plain"])) or None

    def equal(self, a: str, b: str) -> bool:
        return equal(a, b)
