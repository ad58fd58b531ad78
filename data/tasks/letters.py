"""Which letter is an answer? Rules for multiple choice, and what its tasks have in common.

`Letters` is a task whose answers are letters; data/tasks/mmlu.py and data/tasks/arc.py say how its
questions are written. eval.py scores such a task by the probability of every letter, or reads the
letter out of a generated text by `find_letter`.
"""

import re
import string

from data.tasks.task import Task, one_text, turns
from data.text.answer import cut

ALPHABET = "ABCDEFGHIJ"
# A letter that no word goes on with, a small one only where a sentence ends: "a" is mostly a word.
UPPER = r"([A-J])(?![A-Za-z])"
EITHER = r"([A-J](?![A-Za-z])|[a-j](?=\s*(?:[.,;:!?)\]}*<]|$)))"
# Signs that stand between a claim and its letter.
SIGNS = r"[\s:*(\[{$]*(?:\\boxed\{|\\text\{|\\textbf\{)*[\s*(]*"
CLAIM = re.compile(r"(?i:answer is)" + SIGNS + EITHER)
LABEL = re.compile(r"(?i:answer)[^A-Za-z]*" + SIGNS + UPPER)
FIRST_LINE = re.compile(r"^[\s*(\[]*" + UPPER + r"[\s*)\].:]*(?:$|(?<=[.):*\]])\s)")
BOX = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?" + UPPER)
ALONE = re.compile(r"(?<![A-Za-z'’])" + UPPER)
# Letters that are no answers: an article, a pronoun, an option that is ruled out.
WORDS = re.compile(
    r"(?<![A-Za-z])(?:A(?= [a-z])|I(?= [a-z])|I(?=['’])|not \(?[A-J]\)?(?![A-Za-z]))")


def find_letter(text: str, options: int) -> str | None:
    """The letter that a text answers with, one of the first `options`, or None.

    The last claim wins, then a first line that is a letter, then a label, then a letter alone.
    """
    text = cut(text, ("Question:",))
    allowed = ALPHABET[:options]
    for rule in (last_claim, first_line, last_label, only_letter):
        letter = rule(text)
        if letter:
            return letter if letter in allowed else None
    return None


def last_claim(text: str) -> str | None:
    """the answer is (X)"""
    found = CLAIM.findall(text)
    return found[-1].upper() if found else None


def first_line(text: str) -> str | None:
    line = text.strip().partition("\n")[0]
    found = FIRST_LINE.match(line) or BOX.match(line.lstrip("$ "))
    return found[1] if found else None


def last_label(text: str) -> str | None:
    """Answer: X"""
    found = LABEL.findall(text)
    return found[-1] if found else None


def only_letter(text: str) -> str | None:
    """The only one that stands for itself; of two, nobody says which is meant."""
    found = set(ALONE.findall(WORDS.sub(" ", text)))
    return found.pop() if len(found) == 1 else None


class Letters(Task):
    """A task of multiple choice; a problem has question, options (texts) and answer (a letter)."""
    kind = "letters"
    shots = {"chat": 5, "plain": 5}
    max_new_tokens = 8
    stops = {"chat": (), "plain": ("\n", "</s>")}

    def options(self, problem: dict) -> list:
        """The letters to choose from."""
        return list(ALPHABET[:len(problem["options"])])

    def lines(self, problem: dict) -> str:
        """The options, a line each."""
        return "\n".join(f"{letter}. {option}"
                         for letter, option in zip(ALPHABET, problem["options"]))

    def prompt(self, problem: dict, shots: list, style: str):
        """Messages for "chat", a text for "plain"; in both a letter is the answer."""
        if style == "chat":
            return turns(problem, shots, self.chat_question, self.reference)
        return self.head(problem) + one_text(problem, shots, self.question, self.reference)

    def head(self, problem: dict) -> str:
        """What a text begins with."""
        return ""

    def short(self, problem: dict) -> dict:
        return {"reference": problem["answer"], "options": len(problem["options"])}

    def restore(self, record: dict) -> dict:
        options = record.get("options", 4)
        if options not in range(1, len(ALPHABET) + 1):
            raise ValueError(f"options of a record are {str(options)[:20]!r}; allowed: 1 to 10")
        return {**super().restore(record), "options": [""] * options}

    def reference(self, problem: dict) -> str:
        return problem["answer"]

    def strict(self, problem: dict, text: str) -> bool:
        """The whole first line is the letter, case and punctuation aside (`mmlu_generative`)."""
        line = cut(text, self.stops["plain"]).strip()
        bare = line.translate(str.maketrans("", "", string.punctuation))
        return bare.lower() == problem["answer"].lower()

    def grade(self, problem: dict, text: str) -> dict:
        """strict, flexible, and the letter that was understood."""
        letter = find_letter(text, len(problem["options"]))
        return {"strict": self.strict(problem, text), "flexible": letter == problem["answer"],
                "letter": letter}

    def extract(self, problem: dict, text: str) -> str | None:
        return find_letter(text, len(problem["options"]))
