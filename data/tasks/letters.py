"""Multiple choice: the letter that an answer means, and the common part of its tasks.

The problems of a `Letters` task have letters as answers; data/tasks/mmlu.py and data/tasks/arc.py
write its questions. eval.py compares the probabilities of the letters, or generates a text, in
which `find_letter` finds the letter.
"""

import re
import string

from data.tasks.task import Task
from data.text.answer import cut, without_thoughts

ALPHABET = "ABCDEFGHIJ"
# A letter that begins no word; a small one only at the end of a sentence: "a" is mostly a word.
UPPER = r"([A-J])(?![A-Za-z])"
QUOTES = "\"'`_\u2018\u2019\u201c\u201d"
EITHER = rf"([A-J](?![A-Za-z])|[a-j](?=\s*(?:[.,;:!?)\]}}*<{QUOTES}]|$)))"
# Signs between a claim and its letter.
SIGNS = rf"[\s:*(\[{{${QUOTES}]*(?:\\boxed\{{|\\text\{{|\\textbf\{{)*[\s*({QUOTES}]*"
CLAIM = re.compile(r"(?i:answer is)" + SIGNS + EITHER)
LABEL = re.compile(r"(?i:answer)[^A-Za-z]*" + SIGNS + EITHER)
FIRST_LINE = re.compile(rf"^[\s*(\[{QUOTES}]*{UPPER}[\s*)\].:{QUOTES}]*"
                        rf"(?:$|(?<=[.):*\]{QUOTES}])\s)")
BOX = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?" + EITHER)
ALONE = re.compile(r"(?<![A-Za-z'’])" + UPPER)
# Letters that are no answers: an article, a pronoun, an option that is ruled out.
WORDS = re.compile(
    r"(?<![A-Za-z])(?:A(?= [a-z])|I(?= [a-z])|I(?=['’])|not \(?[A-J]\)?(?![A-Za-z]))")
# The options once more: a line for each, in their order from A on.
REPEATED = ""
for option in reversed(ALPHABET[2:]):
    REPEATED = rf"(?:\n\W*{option}[.):\]].*{REPEATED})?"
REPEATED = re.compile(r"(?im)^\W*A[.):\]].*\n\W*B[.):\]].*" + REPEATED)


def find_letter(text: str, options: int) -> str | None:
    """The letter that a text answers with, one of the first `options`, or None."""
    # the question once more, and not the next one
    text = without_thoughts(text).strip().removeprefix("Question:")
    text = cut(text, ("Question:", "</s>"))
    line = REPEATED.sub("", text).strip().partition("\n")[0]
    alone = line.strip(string.whitespace + string.punctuation + QUOTES)
    letter = ""
    # the last claim: the answer is (X)
    if claims := CLAIM.findall(text):
        letter = claims[-1].upper()
    # else the last label: Answer: X
    elif labels := LABEL.findall(text):
        letter = labels[-1].upper()
    # else a first line that is a letter, or begins with one and its sign
    elif len(alone) == 1 and alone.upper() in ALPHABET:
        letter = alone.upper()
    elif found := FIRST_LINE.match(line) or BOX.match(line.lstrip("$ ")):
        letter = found[1].upper()
    else:
        # else a letter alone; two of them are ambiguous
        others = set(ALONE.findall(WORDS.sub(" ", REPEATED.sub("", text))))
        if len(others) == 1:
            letter = others.pop()
    return letter if letter and letter in ALPHABET[:options] else None


def check_letter(letter: str, options: int):
    """Raise ValueError for a reference that is none of the options."""
    if not 1 <= options <= len(ALPHABET):
        raise ValueError(f"has {options} options; allowed: 1 to {len(ALPHABET)}")
    if letter not in list(ALPHABET[:options]):
        raise ValueError(f"has the answer {letter[:20]!r}; allowed: A to {ALPHABET[options - 1]}")


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

    def chat_question(self, problem: dict) -> str:
        return f"Question:\n{problem['question']}\nChoices:\n{self.lines(problem)}\n\nAnswer:"

    def short(self, problem: dict) -> dict:
        return {"reference": problem["answer"], "options": len(problem["options"])}

    def restore(self, record: dict) -> dict:
        options = record.get("options", 4)
        if options not in range(1, len(ALPHABET) + 1):
            raise ValueError(f"options of a record are {str(options)[:20]!r}; allowed: 1 to 10")
        problem = {**super().restore(record), "options": [""] * options}
        check_letter(problem["answer"], options)
        return problem

    def strict(self, problem: dict, text: str) -> bool:
        """The whole first line is the letter, case and punctuation aside (`mmlu_generative`)."""
        line = cut(text, self.stops["plain"]).strip()
        bare = line.translate(str.maketrans("", "", string.punctuation))
        return bare.lower() == problem["answer"].lower()

    def grade(self, problem: dict, text: str) -> dict:
        """strict, flexible, and the letter that was found."""
        letter = find_letter(text, len(problem["options"]))
        return {"strict": self.strict(problem, text), "flexible": letter == problem["answer"],
                "letter": letter}

    def extract(self, problem: dict, text: str) -> str | None:
        return find_letter(text, len(problem["options"]))
