"""Sums and products as short questions, made here: no file is read, and nothing is drawn.

    python eval.py --task sums --init_from=DIR --limit 300 --shots 0 --style chat

From easy to hard for a small model: SmolLM2-135M-Instruct, greedy, in turns, is right on 74 and
71 % of small sums and products, on 29 and 43 % of those just beyond, on 11 % of large sums (the
last number it says, 300 test questions). An answer is a number in digits.

No two numbers of a test question stand together in a training question, in whichever order and
under whichever sign.
"""

import hashlib
from pathlib import Path

from data.tasks.gsm8k import GSM8K, last_number, same
from data.text.answer import cut

# kind -> sign, range of the smaller number, range of the larger one; no two kinds share a question
KINDS = {
    "small_sums": ("+", (1, 9), (1, 9)),
    "sums": ("+", (1, 20), (10, 20)),
    "large_sums": ("+", (21, 99), (21, 99)),
    "small_products": ("*", (2, 9), (2, 9)),
    "products": ("*", (2, 9), (10, 30)),
}
# sign -> what it does
RESULT = {"+": int.__add__, "*": int.__mul__}
# Of most kinds there are fewer; without a limit hardly anything but large sums would be asked.
MOST = {"test": 100, "train": 2400}
# In these words a small model answers at once, while "What is 3 + 4?" makes it explain.
ASKED = "Reply with one number and nothing else. {} {} {} = ?"


class Sums(GSM8K):
    """Asked as GSM8K is, in turns or as a text; `flexible` is its rule too."""
    name = "sums"
    folder = ""         # nothing is read
    shots = {"chat": 0, "plain": 5}
    max_new_tokens = 16

    def load(self, folder: Path | None = None) -> list:
        """Test problems, then training problems, always the same; there is no folder to read."""
        return [problem for split in ("test", "train") for problem in of_all_kinds(split)]

    def grade(self, problem: dict, text: str) -> dict:
        """strict: is the text the number and nothing else? flexible: is its last number right?"""
        said = cut(text, self.stops["plain"]).strip()
        return {"strict": said == problem["answer"],
                "flexible": same(last_number(text), problem["answer"])}


def of_all_kinds(split: str) -> list:
    """The problems of "test" or "train", the kinds mixed, so that the first of them are of all."""
    problems = []
    for kind in KINDS:
        some = sorted(of_kind(kind, split), key=lambda problem: checksum(problem["id"]))
        problems += some[:MOST[split]]
    # of another text: by the same numbers a kind that was cut short would come first
    return sorted(problems, key=lambda problem: checksum(problem["question"]))


def of_kind(kind: str, split: str) -> list:
    """Every problem of a kind in a split, both orders of two numbers."""
    sign, smaller, larger = KINDS[kind]
    problems = []
    for a in numbers(smaller):
        for b in numbers(larger):
            # found once, as a <= b
            if a > b or split_of(a, b) != split:
                continue
            orders = {(a, b), (b, a)}       # one of them, where the two are the same
            problems += [make(split, kind, x, sign, y) for x, y in orders]
    return problems


def numbers(ends: tuple) -> range:
    """From the first to the last, both included."""
    first, last = ends
    return range(first, last + 1)


def make(split: str, kind: str, a: int, sign: str, b: int) -> dict:
    """A problem: id, question, and the answer in digits."""
    return {"id": f"sums/{split}/{kind}/{a}{sign}{b}", "question": ASKED.format(a, sign, b),
            "answer": str(RESULT[sign](a, b))}


def split_of(a: int, b: int) -> str:
    """Where two numbers belong, in any order and under any sign: a third of the pairs is "test"."""
    return "test" if checksum(f"{min(a, b)} {max(a, b)}") % 3 == 0 else "train"


def checksum(text: str) -> int:
    """A number that looks drawn, the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
