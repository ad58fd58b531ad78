"""Chains of names in words, generated: a question that needs as many hops as its level says.

    python eval.py --task chains --init_from=DIR --limit 800 --style plain

    Rose tells Tom. Jack tells Rose. Tom tells Anna. Emma tells Paul. The news starts with Jack
    chains: Anna, the last one to hear it, 3 hops away      hops: Rose Tom Anna, the next three

Both have the same prompts: `hops` teaches a model single hops, `chains` asks for all of them at
once. No sentence says where a chain ends: nobody is told by its last name. The embedded topic of
the same name is in data/tiny/topics.py.
"""

import random
from pathlib import Path

from data.tasks.sums import Sums, checksum
from data.text.answer import cut

# short and common: one token each, with a space before it, in the vocabularies of all families
NAMES = ("Adam Alice Anna Ben Bob Carl Clara Dan David Emma Eric Frank Fred Grace Henry Ivan Jack "
         "Jane John Kate Leo Lucy Mark Mary Nick Oscar Paul Peter Rose Ruth Sam Sarah Tom Victor "
         "Wendy Will").split()
PEOPLE = 10                 # in a question, unless its level needs more
CHAINS = 3                  # in a question; each has at least two names
LEVELS = (1, 2, 3, 4, 5)
UNSEEN = (6, 7, 8, 10, 12, 16, 20, 24)      # in no training question
MOST = {"test": 100, "train": 1600}     # questions of a level


class Chains(Sums):
    """Prompts are texts that end with a name; the answer is a name."""
    name = "chains"
    levels = {"test": LEVELS + UNSEEN, "train": LEVELS}
    kinds = tuple(map(str, levels["test"]))
    shots = {"chat": 0, "plain": 0}
    trained_style = "plain"     # nothing may stand behind the name
    max_new_tokens = 1      # a name

    def load(self, folder: Path | None = None) -> list:
        """Test problems, then training problems, always the same; the folder is not read."""
        return [self.make(split, level, number) for split in ("test", "train")
                for number in range(MOST[split]) for level in self.levels[split]]

    def make(self, split: str, level: int, number: int) -> dict:
        """Question `number` of a level in a split."""
        rng = random.Random(checksum(f"chains/{split}/{level}/{number}"))
        while True:
            count = max(PEOPLE, level + 1 + 2 * (CHAINS - 1))
            names = rng.sample(NAMES, count)
            # the asked chain has at least level + 1 names, every other one at least two
            first = rng.randint(level + 1, count - 2 * (CHAINS - 1))
            second = rng.randint(2, count - first - 2)
            chains = [names[:first], names[first:first + second], names[first + second:]]
            pairs = [pair for chain in chains for pair in zip(chain, chain[1:])]
            start = chains[0][-1 - level]
            # the same pairs in another order are the same question: a third is for the test
            key = f"{sorted(pairs)} {start}"
            if (checksum(key) % 3 == 0) == (split == "test"):
                break
        rng.shuffle(pairs)
        told = " ".join(f"{a} tells {b}." for a, b in pairs)
        return {"id": f"{self.name}/{split}/{level}/{number}",
                "question": f"{told} The news starts with {start}",
                "answer": self.answer(chains[0][-level:])}

    def answer(self, following: list) -> str:
        """From the names behind the start, the last one of the chain included."""
        return following[-1]

    def question(self, problem: dict) -> str:
        return problem["question"]

    def grade(self, problem: dict, text: str) -> dict:
        """strict: is the text the name and nothing else? flexible: is its first word the name?"""
        words = cut(text, self.stops["plain"]).split() or [""]
        return {"strict": words == [problem["answer"]],
                "flexible": words[0].strip(".,") == problem["answer"]}

    def extract(self, problem: dict, text: str) -> str | None:
        """The name that a vote compares, None without any."""
        return next(iter(cut(text, self.stops["plain"]).split()), None)


class Hops(Chains):
    """The next three names of a chain, which may end with them or go on."""
    name = "hops"
    levels = {"test": (3, 4, 5), "train": (3, 4, 5)}
    kinds = tuple(map(str, levels["test"]))
    max_new_tokens = 3

    def answer(self, following: list) -> str:
        return " ".join(following[:3])
