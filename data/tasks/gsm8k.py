"""GSM8K: 1,319 word problems of primary school; solutions end in `#### 18` (Cobbe et al. 2021).

    python eval.py --task gsm8k --init_from=DIR --shots 5 --limit 200

Chat: the turns of the official L2D code. Plain: the text of lm-evaluation-harness, version 3.0 of
`gsm8k`. Both take the first rows of the training file as shots; the harness draws others for every
problem. `strict` and `flexible` are exactly the two rules of the harness.
"""

import re
from pathlib import Path

from data.tasks.files import read_jsonl
from data.tasks.task import Task
from data.text.answer import cut, without_thoughts

STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
# Ignored by its exact match; the last is a final full stop.
IGNORED = re.compile(r",|\$|(?s:.*#### )|\.$")


class GSM8K(Task):
    name = "gsm8k"
    folder = "gsm8k"
    kind = "text"
    shots = {"chat": 5, "plain": 5}
    max_new_tokens = 256
    stops = {"chat": (), "plain": ("Question:", "</s>", "<|im_end|>")}

    def load(self, folder: Path) -> list:
        """Rows with an id, training rows last. Raises ValueError for missing or other files."""
        problems = []
        for split in ("test", "train"):
            rows = read_jsonl(folder / f"{split}.jsonl", {"question": str, "answer": str},
                              check_answer)
            problems += [{"id": f"gsm8k/{split}/{number}", **row}
                         for number, row in enumerate(rows)]
        return problems

    def chat_question(self, problem: dict) -> str:
        return problem["question"]

    def question(self, problem: dict) -> str:
        return f"Question: {problem['question']}\nAnswer:"

    def short(self, problem: dict) -> dict:
        return {"reference": IGNORED.sub("", problem["answer"])}

    def grade(self, problem: dict, text: str) -> dict:
        """strict: the first number behind `####`; flexible: the last number. Equal as texts?"""
        return {"strict": same(strict_number(text), problem["answer"]),
                "flexible": same(last_number(text), problem["answer"])}

    def extract(self, problem: dict, text: str) -> str | None:
        """The number that a vote compares: behind `####`, else the last one; None without any."""
        number = strict_number(without_thoughts(text)) or last_number(text)
        return IGNORED.sub("", number) if number else None


def check_answer(row: dict):
    """Raise ValueError for a solution without its number, with which no answer could agree."""
    if not STRICT.search(row["answer"]):
        raise ValueError(f"has the answer {row['answer'][-40:]!r}, without a number behind ####")


def strict_number(text: str) -> str | None:
    found = STRICT.search(cut(text, GSM8K.stops["plain"]))
    return found[1] if found else None


def last_number(text: str) -> str | None:
    found = FLEXIBLE.findall(cut(without_thoughts(text), GSM8K.stops["plain"]))
    return (found[-1][0] or found[-1][1]).strip() if found else None


def same(number: str | None, reference: str) -> bool:
    return number is not None and IGNORED.sub("", number) == IGNORED.sub("", reference)
