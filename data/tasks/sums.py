"""Sums and products as short questions, generated: no file is read, and nothing is random.

    python eval.py --task sums --init_from=DIR --limit 300 --shots 0 --style chat

From easy to hard for a small model: SmolLM2-135M-Instruct, greedy, in turns, answers 74 and 71 % of
small sums and products correctly, 29 and 43 % of those just beyond, 11 % of large sums (the last
number in its answer, 300 test questions). Answers are numbers in digits. `--task hard_sums`: sums
of three digits and products of two, where one look is not enough for such a model.

No two numbers of a test question occur together in a training question, in either order and under
either sign.
"""

import hashlib
from itertools import product
from pathlib import Path

from data.tasks.gsm8k import GSM8K, last_number, same
from data.text.answer import cut

# kind -> sign, the smaller numbers, the larger ones; no two kinds share a question
KINDS = {
    "small_sums": ("+", range(1, 10), range(1, 10)),
    "sums": ("+", range(1, 21), range(10, 21)),
    "large_sums": ("+", range(21, 100), range(21, 100)),
    "small_products": ("*", range(2, 10), range(2, 10)),
    "products": ("*", range(2, 10), range(10, 31)),
}
HARD_KINDS = {
    "three_digits": ("+", range(100, 1000, 9), range(100, 1000, 9)),
    "two_digits": ("*", range(11, 40), range(11, 100)),
}
# Most kinds have fewer; without a limit nearly all questions would be large sums.
MOST = {"test": 100, "train": 2400}
# A small model answers these words with a number, but "What is 3 + 4?" with an explanation.
WORDS = "Reply with one number and nothing else. {} {} {} = ?"


class Sums(GSM8K):
    """Prompts in the form of GSM8K, in turns or as a text; `flexible` is its rule too."""
    name = "sums"
    kinds = KINDS
    folder = ""         # no files
    shots = {"chat": 0, "plain": 5}
    max_new_tokens = 16

    def load(self, folder: Path | None = None) -> list:
        """Test problems, then training problems, always the same; the folder is not read."""
        return [problem for split in ("test", "train")
                for problem in of_all_kinds(split, self.kinds, self.name)]

    def grade(self, problem: dict, text: str) -> dict:
        """strict: is the text the number and nothing else? flexible: is its last number right?"""
        answer = cut(text, self.stops["plain"]).strip()
        return {"strict": answer == problem["answer"],
                "flexible": same(last_number(text), problem["answer"])}


class HardSums(Sums):
    name = "hard_sums"
    kinds = HARD_KINDS


def of_all_kinds(split: str, kinds: dict, task: str) -> list:
    """The problems of "test" or "train", mixed, so that the first of them are of all kinds."""
    problems = []
    for kind in kinds:
        some = sorted(of_kind(kind, split, kinds, task),
                      key=lambda problem: checksum(problem["id"]))
        problems += some[:MOST[split]]
    # by another text: after the cut above, the ids of a kind have low checksums
    return sorted(problems, key=lambda problem: checksum(problem["question"]))


def of_kind(kind: str, split: str, kinds: dict, task: str) -> list:
    """Every problem of a kind in a split, both orders of two numbers."""
    sign, smaller, larger = kinds[kind]
    problems = []
    for a, b in product(smaller, larger):
        # two numbers have one split under every sign: a third of the pairs is "test"
        its_split = "test" if checksum(f"{a} {b}") % 3 == 0 else "train"
        # each pair once, as a <= b
        if a > b or its_split != split:
            continue
        # both orders, or one if the numbers are equal
        for x, y in {(a, b), (b, a)}:
            problems.append({
                "id": f"{task}/{split}/{kind}/{x}{sign}{y}",
                "question": WORDS.format(x, sign, y),
                "answer": str(x + y if sign == "+" else x * y)})
    return problems


def checksum(text: str) -> int:
    """A number that looks random, the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
