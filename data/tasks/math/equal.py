r"""Is the answer at the end of a solution of a mathematics problem the right one?

    grade(r"So $x = \boxed{2.375}$.", r"2\frac{3}{8}")     # {"strict": False, "flexible": True}

`strict` is the published rule of the data set (Hendrycks et al. 2021): the last box, a few
replacements, equal strings. `flexible` is a fair reading: find the answer, clean it, compare its
parts (lists, intervals, matrices, equations, words), and in the end their values. Read
data/tasks/math/latex.py next, which cleans answers and takes them apart.
"""

import re

from data.tasks.math.latex import clean, letters, prose, shape
from data.tasks.math.value import (
    LONGEST, UNREADABLE, constant, same_value, same_values, values)
from data.text.answer import without_thoughts

STOP = "Problem:"       # the answer ends where the model writes a next problem
MOST_ITEMS = 64         # of a list that is matched in any order, in quadratic time


# --- strict: the last box and equal strings -------------------------------------------------------

def closing(text: str, start: int = 0) -> int:
    """The index of the brace that closes the one at `start`; -1 if there is none."""
    depth = 0
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start + brace.start()
    return -1


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed, or of the last \fbox where there is no \boxed.

    None if there is neither or its braces do not close. "\boxed 42$" without braces goes up to $.
    """
    name = r"\boxed" if r"\boxed" in text else r"\fbox"
    _, found, rest = text.rpartition(name)
    if found and name == r"\boxed" and rest.startswith(" "):
        return rest[1:].split("$")[0]
    end = closing(rest) if found and rest.startswith("{") else -1
    return rest[1:end] if end > 0 else None


def brace_fractions(text: str) -> str:
    r"""\frac12 and \frac1{72} with braces, \frac{72}1 as it is. IndexError if nothing follows."""
    for piece in text.split(r"\frac")[1:]:
        # a numerator alone: nothing is changed
        if piece[0] != "{" and len(piece) == 1:
            return text
    text = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text)
    return re.sub(r"\\frac([^{])\{", r"\\frac{\1}{", text)


# The replacements of the published code, in its order.
STRICT = [
    ("\n", ""), (r"\!", ""), (r"\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"),
    (r"\left", ""), (r"\right", ""), (r"^{\circ}", ""), (r"^\circ", ""), (r"\$", ""),
]


def published_form(text: str) -> str:
    """A text after the published replacements; ValueError or IndexError where these fail."""
    for old, new in STRICT:
        text = text.replace(old, new)
    if text.count(r"\text{ ") > 1:
        raise ValueError("two units")
    text = text.split(r"\text{ ")[0]
    text = text.replace(r"\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    # "x = 5" is 5
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    if re.search(r"\\sqrt(\\sqrt|$)", text):
        raise IndexError("a root of nothing")
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = brace_fractions(text)
    if text == "0.5":
        return r"\frac{1}{2}"
    return re.sub(r"^(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)\Z", r"\\frac{\1}{\2}", text)


def strict_equal(text: str, reference: str) -> bool:
    """Does the last box of a text hold the reference, by the published rule?"""
    answer = last_box(text)
    if answer is None:
        return False
    try:
        return published_form(answer) == published_form(reference)
    except (ValueError, IndexError):
        return answer == reference


# --- flexible, step 1: find the answer ------------------------------------------------------------

BOX = re.compile(r"\\boxed(?![A-Za-z])|\\fbox(?![A-Za-z])")
# between two boxes that are one answer: "$\boxed{1}$ or $x = \boxed{-2}$"
JOINED = re.compile(
    r"[\s$]*(?:,|,?\s*(?:\\text\s*\{\s*)?(?:and|or)\s*\}?)[\s$]*(?:[A-Za-z]\s*=\s*)?")
MARK = re.compile(r"answers?\s*(?:is|are|:|=)|####(?!\s*[A-Za-z]{2}|#)", re.IGNORECASE)
# the end of the sentence with the answer
ENDED = re.compile(
    r"\.\s|[,\s]\s*(?:which|because|since|so|where|as|hence|but|not)\b|\s\((?:about|approx|or)\b")
DISPLAY = re.compile(r"(?<!\\)\\[\[\]()]|\$\$")
EMPTY_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{\s*\}")
DOLLARS = re.compile(r"\$([^$]+)\$")
# words between "the answer is" and the answer
LEAD = re.compile(
    r"^(?:therefore|thus|simply|then|exactly|about|approximately|equal to|option|choice)\b\s*")
FINAL_NUMBER = re.compile(
    r"(?:(?<![\w)}])-\s?)?(?:\d*\s?\\[dt]?frac\{-?\d+\}\{\d+\}"
    r"|(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?(?:\\?%)?)"
    r"(?:\s?(?:\\pi|pi\b|π|\\?sqrt[{(]\d+[})]|√\d+))?")


def boxed(text: str) -> str:
    """The last box that is not empty, and those before it if "or", "and" or a comma joins them."""
    answers = []
    later = None
    for found in reversed(list(BOX.finditer(text))):
        rest = text[found.end():found.end() + 2 * LONGEST]
        brace = re.match(r"\s*\{", rest)
        size = closing(rest, brace.end() - 1) if brace else -1
        if size >= 0:
            content = rest[brace.end():size]
            size += 1
        else:
            # without a brace, or unclosed, it ends with its formula or line
            content = re.split(r"(?<!\\)\$|\n", rest, maxsplit=1)[0]
            content = content[brace.end():] if brace else content
            size = len(content)
        if later is not None and not JOINED.fullmatch(text, found.end() + size, later):
            break
        if content.strip():
            answers.insert(0, content)
            later = found.start()
        if len(answers) == MOST_ITEMS:
            break
    return ",".join(answers)


def extract(text: str) -> str:
    """The answer in a text, as it is written there; "" when there is none."""
    text = without_thoughts(text)
    answer = boxed(text)
    if answer:
        return answer.strip()
    text = EMPTY_BOX.sub("", text.replace(r"\$", ""))
    text = DISPLAY.sub("$", text.strip())
    # else the words behind the last "answer is" or "####", to the end of the sentence
    if marks := list(MARK.finditer(text)):
        tail = text[marks[-1].end():].lstrip(" :*\t\r\n$")
        line = tail[:LONGEST].split("\n")[0].replace("$", " ")
        sentence = ENDED.split(line + " ", maxsplit=1)[0]
        if answer := LEAD.sub("", sentence.strip(" *")):
            return answer
    # else the last formula between dollars
    formulas = [formula.strip() for formula in DOLLARS.findall(text)]
    if any(formulas):
        return list(filter(None, formulas))[-1]
    # else a last line that is no prose
    line = text.split("\n")[-1][-LONGEST:]
    if not prose(line):
        return line
    # else the last number, else the words behind the last "is"
    if numbers := FINAL_NUMBER.findall(text[-LONGEST:]):
        return numbers[-1]
    return line.split(" is ")[-1].strip(" .*#")


# --- flexible, steps 2 to 4: are they equal? ------------------------------------------------------

# x, AB, \theta, \angle ABC, area, x_1, f(x), f^{-1}(x), (x,y)
HEAD = re.compile(
    r'(?:"[^"]*"|\\[A-Za-z]+(?:\s*[A-Z]+)?|[A-Za-z]|[A-Z]{2,}|[A-Za-z]{3,})'
    r"(?:_\{?\w+\}?)?(?:\^\{-1\})?'*\s*(?:\([^()=]*\))?|\([A-Za-z, ]+\)")
SHORT_WORD = re.compile(r"[A-Za-z]{3}")


def squeezed(text: str) -> str:
    return "".join(text.split()).casefold()


def equal(a: str, b: str) -> bool:
    """Are two answers equal? Beyond LONGEST characters only the same text is.

    Symmetric; never raises, and False if one of them is empty.
    """
    if max(len(a), len(b)) > LONGEST:
        return bool(a.strip()) and a.split() == b.split()
    try:
        return same(clean(a), clean(b))
    except UNREADABLE:
        return False


def same(a: str, b: str) -> bool:
    """`equal` of cleaned texts or parts of them."""
    if not a or not b:
        return False
    if a == b:
        return True
    kind, parts = shape(a)
    other, others = shape(b)
    if (kind == "=") != (other == "="):
        return same_without_head(a, b) if kind == "=" else same_without_head(b, a)
    if "words" in (kind, other) and {kind, other} <= {"words", "value"}:
        return letters(a) == letters(b)
    if kind != other or len(parts) != len(others):
        return False
    if kind in ("list", "union"):
        return same_in_any_order(parts, others)
    if kind == "=":
        return same_equation(parts, others)
    if kind == "value":
        return same_number(parts[0], others[0])
    if kind == "base":
        return parts == others
    return all(map(same, parts, others))


def same_without_head(equation: str, answer: str) -> bool:
    """Is an answer the right side of an equation whose left side only names the unknown?"""
    left, right = shape(equation)[1]
    # x = …; the true 2 + 3 = 5; a + b = 42
    named = HEAD.fullmatch(left)
    true = same_value(left, right)
    sought = constant(right) and not re.search(r"\d", left)
    return bool(named or true or sought) and same(right, answer)


def same_in_any_order(parts: list, others: list) -> bool:
    """Has every part a partner of its own? Long lists must have the same order."""
    if len(parts) > MOST_ITEMS:
        return all(map(same, parts, others))
    others = list(others)
    for part in parts:
        partner = next((other for other in others if same(part, other)), None)
        if partner is None:
            return False
        others.remove(partner)
    return True


def same_equation(sides: list, others: list) -> bool:
    """Is left − right the same up to its sign, or do the same names have equal values?"""
    if squeezed(sides[0]) == squeezed(others[0]) and same(sides[1], others[1]):
        return True
    first = values(f"({sides[0]})-({sides[1]})")
    second = values(f"({others[0]})-({others[1]})")
    negative = values(f"({others[1]})-({others[0]})")
    return same_values(first, second) or same_values(first, negative)


def same_number(a: str, b: str) -> bool:
    """Equal values, equal texts where one has no value, or N % and N for N > 1."""
    if same_value(a, b):
        return True
    # "odd" could be a product of variables, but as a word its case has no meaning
    if not values(a) or not values(b) or SHORT_WORD.fullmatch(a):
        return squeezed(a) == squeezed(b)
    # "by what percent?": answers have the sign or not; a number up to 1 is a share
    if ("%" in a) == ("%" in b):
        return False
    percent, plain = (a, b) if "%" in a else (b, a)
    return abs(values(plain)[0]) > 1 and same_value(percent.replace("%", ""), plain)


def grade(text: str, reference: str) -> dict:
    """{"strict": bool, "flexible": bool} of a generated text, up to the next problem in it."""
    text = text.split(STOP)[0]
    return {
        "strict": strict_equal(text, reference),
        "flexible": equal(extract(text), reference),
    }
