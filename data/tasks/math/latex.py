r"""The form of an answer: cleaned of all that is only notation, then taken apart.

    clean(r"\dfrac{17}{6}\text{ cm}.")      # \frac{17}{6}" cm"
    shape(r"x \in [-4,9]")                  # ("[]", ["-4", "9"]): an interval and its ends

The parts are texts again; data/tasks/math/value.py, the next file to read, evaluates them.
"""

import re
from functools import lru_cache

from data.tasks.math.value import NAMES

MOST_SIGNS = 4          # ± written out: 2^4 answers
ENDS = " \t\n.,;:"      # without meaning at the end of an answer

# --- cleaning -------------------------------------------------------------------------------------

SYMBOLS = str.maketrans({
    "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ", "√": r"\sqrt ", "°": r"^\circ ",
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/",
    "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∈": r"\in ", "≈": r"\approx ",
    "²": "^2", "³": "^3", "½": r"\frac12", "’": "'", "¢": "", "\u00a0": " ", "\u2009": " ",
})
# Regular expression -> replacement, in this order. \b after a command would let \leq pass for \le.
REPLACEMENTS = [
    # spaces and brackets
    (r"\s+", " "),
    # from here on a line break ends the row of a matrix, so that "\\ -1" is no space before -1
    (r"\\\\(?:\[[^\]]*\])?", "\n"),
    (r"\*\*(?=[^\d(]|$)|^\*\*", ""),
    (r"\\(?:boxed|fbox|displaystyle|textstyle|limits|bf|rm|it)(?![A-Za-z])", ""),
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?", ""),
    # thousands: 20,\!160 and 20{,}160 and 20\,160; a bare comma has its own rule
    (r"(?<=\d)(?:,? ?\\[!,] ?|\{,\} ?)(?=\d{3}(?!\d))", ""),
    (r"\{\.\}", "."),
    # text is kept between quotes, since units and words must not be read as products
    (r"\\(?:mathrm|operatorname)\*?\s*\{\s*([ei]|[a-z]*(?:sin|cos|tan|log|ln))\s*\}", r"\\\1 "),
    (r"\\(?:text|textbf|textit|textrm|textsf|mbox|hbox|emph|mathrm)\s*\{([^{}]*)\}", r'"\1"'),
    (r"\\(?:mathbf|mathit|mathsf|mathbb|boldsymbol|underline|operatorname)\s*(?=\{)", ""),
    (r"\\[,;:! ]|~|\\q?quad(?![A-Za-z])", " "),
    # a unit such as m/s, the name of a base or of a variable
    (r'\\[dt]?frac\s*\{\s*"[^"]*"\s*\}\s*\{\s*"[^"]*"\s*\}', '""'),
    (r'_\s*\{?\s*"(\w+)"\s*\}?', r"_{\1}"),
    (r'\\%| percent(?![a-z])|"\s*percent\s*"', "%"),
    (r"\\?\$", ""),
    (r'"\s*(?:and|or)\s*"|(?<![A-Za-z])(?:and|or)(?![A-Za-z])', ","),
    (r",(?:\s*,)+", ","),
    # one command for each sign
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\[dt]binom", r"\\binom"),
    (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\\(?:leqslant|leq|le)(?![A-Za-z])|<=", "≤"),
    (r"\\(?:geqslant|geq|ge)(?![A-Za-z])|>=", "≥"),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\cup(?![A-Za-z])|(?<=[)\]]) U (?=[(\[])", "∪"),
    (r"\\[lr]vert(?![A-Za-z])", "|"),
    (r"\\langle(?![A-Za-z])", "("),
    (r"\\rangle(?![A-Za-z])", ")"),
    (r"\\lbrace(?![A-Za-z])", r"\\{"),
    (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"(?<![A-Za-z\\])infinity(?![A-Za-z])", r"\\infty "),
    # the exact answer precedes the approximate one
    (r"\(? ?\\approx(?![A-Za-z]).*", ""),
    # numbers: "6.72e-5", but 2e-1 is twice Euler's number less one
    (r"(\d\.\d+)[eE]([+-]?\d+)|(\d)E([+-]?\d+)", r"\1\3\\cdot10^{\2\4}"),
    (r"(?<=\d) ?x ?(?=10 ?\^)", r"\\cdot "),
    # 0.333... is a repeating decimal
    (r"(\.\d*?)(\d)\2\2+(?:\.\.\.|…| ?\\[lc]?dots)", r"\1\\overline{\2}"),
    # 2 1/3
    (r"(?<![\d./^_])(\d+) +(\d+)/(\d+)(?![\d./])", r"\1\\frac{\2}{\3}"),
]
CLEAN = [(re.compile(old), new) for old, new in REPLACEMENTS]
DEGREE = re.compile(
    r'\^\s*\{\s*(?:\\circ|"o")\s*\}|\^\s*"o"|\^?\s*\\(?:degree|circ)(?![A-Za-z])')
TRIGONOMETRY = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
BRACKET = re.compile(r"[(\[]|\\\{")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:[, ]\d{3})+(?!,?\d)")


@lru_cache(maxsize=4000)
def clean(text: str) -> str:
    """An answer in one notation for each thing; text and units are between quotes."""
    text = text.translate(SYMBOLS)
    for old, new in CLEAN:
        text = old.sub(new, text)
    # a degree sign is a unit, but inside of a function it is a number
    degree = r"(\\pi/180)" if TRIGONOMETRY.search(text) else ""
    text = DEGREE.sub(degree, text)
    # (1,100) is a point and {100,200} a set, while 61,400 is a number
    if not BRACKET.search(text):
        text = THOUSANDS.sub(lambda found: re.sub("[, ]", "", found[0]), text)
    return text.lstrip().rstrip(ENDS)


# --- units and words ------------------------------------------------------------------------------

QUOTED = re.compile(r'\s*/?\s*"[^"]*"\s*(?:\^\s*\{?\s*-?\d+\s*\}?)?')
QUOTED_FIRST = re.compile(r'\s*"[^"]*"\s*[^\s=:"]')
# a bare unit is a word of four letters or more, or one of these
UNITS = set(
    "cm mm km in ft yd mi kg mg ml mL lb lbs oz hr hrs min sec mph rad deg sq cu per day".split())
BARE = re.compile(
    r"(?:(?<=[\d})%])|(?<=\\pi))\s*(?:per\s+|/\s*)?(?<![\\A-Za-z])([A-Za-z]{2,})\.?"
    r"(?:/[a-z]+|\^\{?\d\}?)*(?=[\s,;]|$)")
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
WORDS = re.compile(r"[A-Za-z(][A-Za-z' .:()-]*")
CHOICE = re.compile(r"\(?([A-J])(?:[).:]|$)")
ARTICLE = re.compile(r"^(?:an?|the|option|choice)\s+", re.IGNORECASE)


def without_units(text: str) -> str:
    """An item without the units behind its numbers and the words before its equals sign."""
    rest = QUOTED.sub(" ", text).strip()
    if re.search(r"[\d\\]", rest) or re.fullmatch(r"[a-z]", rest):
        # words before a number are no unit: June 20 is not May 20
        if QUOTED_FIRST.match(text):
            return text
        text = rest.lstrip("=: ")

    def remove_unit(found) -> str:
        word = found[1]
        is_unit = word in UNITS or (len(word) >= 4 and word not in NAMES)
        return "" if is_unit else found[0]

    # "miles per hour" is removed word by word
    previous = None
    while previous != text:
        previous = text
        text = BARE.sub(remove_unit, text)
    return text.lstrip().rstrip(ENDS)


def letters(text: str) -> str:
    """The letter of a choice such as "(D) Sphere", else all letters without article and case."""
    text = ARTICLE.sub("", text.replace('"', " ").strip())
    if choice := CHOICE.match(text):
        return choice[1].lower()
    return re.sub(r"[^a-z\d]", "", text.lower())


def prose(text: str, shortest: int = 2) -> bool:
    """Is there a word of at least `shortest` letters that names no function or Greek letter?"""
    return any(len(word) >= shortest and word not in NAMES for word in WORD.findall(text))


def is_words(text: str) -> bool:
    """Text in quotes; or bare words, one of them too long for a product of variables."""
    return '"' in text or bool(WORDS.fullmatch(text) and prose(text, 4))


# --- the parts of an answer -----------------------------------------------------------------------

MATRIX = re.compile(
    r"(.*?)\(?\[?\s*\\begin\{([pbBvV]?|small)(?:matrix|array)\}(?:\{[lcr| ]*\})?"
    r"([^\\]*(?:\\(?!begin|end)[^\\]*)*)\\end\{\w+\}\s*[)\]]?", re.DOTALL)
MEMBER = re.compile(r"[^\s\\{}]{1,10}\s*\\in(?![A-Za-z])")
BUILDER = re.compile(r"[A-Za-z]\s*(?:\\mid(?![A-Za-z])|\||:)(.*)", re.DOTALL)
BASE = re.compile(r"\(?([\dA-F]+)\)?\s*_\s*\{?\s*(\w+)\s*\}?")
PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])|\\mp(?![A-Za-z])")
# a list of only such parts is a union: x < 2 or x > 3; (-∞, 2) or (3, ∞)
UNITED = re.compile(r"[<>≤≥]|\\infty|^\[|\]$")
COMPARED = re.compile(r"([<>≤≥])")
REVERSED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}
VARIABLE = re.compile(r"\s*\\?[A-Za-z]+\s*")


def split(text: str, marks: str) -> list:
    """The parts of a text between any of these characters, where no bracket is open."""
    parts = []
    start = depth = 0
    for at, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif depth == 0 and character in marks:
            parts.append(text[start:at])
            start = at + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def inside(text: str, opening: str, ending: str) -> str | None:
    """The text between the first and the last character, if those are a pair such as ( and ]."""
    if len(text) < 2 or text[0] not in opening or text[-1] not in ending:
        return None
    depth = 0
    for character in text[:-1]:
        depth += (character in "([{") - (character in ")]}")
        # closed before the end: (0,1)(2,3)
        if depth == 0:
            return None
    return text[1:-1].strip()


def written_out(text: str) -> list:
    """1 ± x as two texts; with ∓ all signs change together, else each on its own."""
    signs = PLUS_MINUS.findall(text)
    if not signs or len(signs) > MOST_SIGNS:
        return [text]
    if len(set(signs)) == 2:
        upper = text.replace(r"\pm", "+").replace(r"\mp", "-")
        lower = text.replace(r"\pm", "-").replace(r"\mp", "+")
        return [upper, lower]
    texts = []
    for sign in "+-":
        texts += written_out(PLUS_MINUS.sub(sign, text, count=1))
    return texts


def unwrapped(text: str) -> str:
    """Without outer braces, those of a set too, and without "x ∈" before it."""
    text = text.lstrip().rstrip(ENDS)
    if member := MEMBER.match(text):
        text = text[member.end():].strip()
    if text.startswith(r"\{") and text.endswith(r"\}"):
        content = inside(text[1:-2] + "}", "{", "}")
        if content is not None:
            condition = BUILDER.fullmatch(content)
            return condition[1].strip() if condition else content
    content = inside(text, "{", "}")
    return text if content is None else unwrapped(content)


@lru_cache(maxsize=10000)
def shape(text: str) -> tuple:
    """(kind, parts) of a cleaned text; the parts are texts again.

    Kinds: "list", "union", the brackets of an interval or tuple, "matrix of n rows", "=" (two
    sides), "<" and "≤" (right − left), "base" (digits, base), "words", "value".
    """
    text = unwrapped(text)
    parts = split(text, "∪")
    if len(parts) > 1:
        return "union", parts
    parts = [sign for part in split(text, ",;") for sign in written_out(part)]
    if len(parts) > 1:
        return ("union" if all(map(UNITED.search, parts)) else "list"), parts

    # one item, no list
    text = without_units(text)
    if found := MATRIX.fullmatch(text):
        return matrix(*found.groups())
    content = inside(text, "([", ")]")
    if content is not None:
        parts = split(content, ",;")
        if len(parts) > 1:
            return text[0] + text[-1], parts
        if not is_words(text):
            return shape(content)

    # neither a matrix nor in brackets
    sides = COMPARED.split(text)
    if len(sides) in (3, 5):
        return interval(sides)
    sides = split(text, "=")
    if len(sides) > 1:
        # x = 28/6 = 14/3 ends with the answer
        return "=", [sides[0], sides[-1]]
    if found := BASE.fullmatch(text):
        return "base", list(found.groups())
    return ("words" if is_words(text) else "value"), [text]


def matrix(factor: str, kind: str, content: str) -> tuple:
    """Its cells; a factor before the matrix multiplies each of them, a name does not."""
    rows = [row.split("&") for row in content.split("\n") if row.strip()]
    cells = [cell.strip() for row in rows for cell in row]
    factor = factor.strip()
    if factor and not factor.endswith("="):
        cells = [f"{factor}({cell})" for cell in cells]
    # bars mean a determinant, brackets a matrix
    name = "determinant" if kind in ("v", "V") else "matrix"
    return f"{name} of {len(rows)} rows", cells


def interval(sides: list) -> tuple:
    """x > 2 or 1 ≤ x < 3, split at its signs; without a variable the difference of the sides."""
    if len(sides) == 3:
        left, sign, right = sides
        if not VARIABLE.fullmatch(left):
            left, sign, right = right, REVERSED[sign], left
        if not VARIABLE.fullmatch(left):
            if sign in ">≥":
                left, sign, right = right, REVERSED[sign], left
            return sign, [f"({right})-({left})"]
        # x < 3 is -∞ < x < 3, and x > 2 is ∞ > x > 2
        outer = [r"-\infty", "<"] if sign in "<≤" else [r"\infty", ">"]
        sides = [*outer, left, sign, right]
    low, first, _, second, high = sides
    if first in ">≥":
        low, first, second, high = high, REVERSED[second], REVERSED[first], low
    brackets = ("[" if first == "≤" else "(") + ("]" if second == "≤" else ")")
    return brackets, [low.strip(), high.strip()]
