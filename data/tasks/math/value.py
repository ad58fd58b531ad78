r"""The value of a piece of LaTeX: a small recursive-descent parser, exact where it can be.

    same_value(r"\frac{34}{12}", "17/6")         # True: both are exactly 17/6
    same_value("(x+1)^2", "x^2 + 2x + 1")        # True: equal at three points

Rational numbers are fractions and compare exactly, so 2.833 is never 17/6. All others are complex
numbers in floating point. A variable has a value of its own at each of three fixed points: two
formulas that agree at all of them are taken as the same formula. Callers clean the text first, see
data/tasks/math/equal.py, which is also the next file to read.
"""

import cmath
import math
import random
import re
from fractions import Fraction
from functools import lru_cache

POINTS = 3
TOLERANCE = 1e-8        # relative; floating point itself loses far less
ZERO = 1e-14            # absolute: in floating point sin π is not quite 0
# Answers are short. These bounds keep a hostile one from taking time or memory.
LONGEST = 2000          # characters
DEEPEST = 40            # brackets inside brackets
BITS = 8000             # of a numerator or denominator
LARGEST_FACTORIAL = 300
LARGEST_ROOT = 64
# Errors while parsing. Callers need no details: the text has no value.
UNREADABLE = (ValueError, ArithmeticError, RecursionError)

FUNCTIONS = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan,
    "cot": lambda z: 1 / cmath.tan(z),
    "sec": lambda z: 1 / cmath.cos(z),
    "csc": lambda z: 1 / cmath.sin(z),
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan,
    "sinh": cmath.sinh, "cosh": cmath.cosh, "tanh": cmath.tanh,
    "ln": cmath.log, "exp": cmath.exp,
    "log": cmath.log10, "lg": cmath.log10,
}
CONSTANTS = {"pi": complex(math.pi), "e": complex(math.e), "i": 1j}
GREEK = ("alpha", "beta", "gamma", "delta", "theta", "lambda", "omega", "phi", "sigma", "tau")
# Names that are read without a backslash too.
NAMES = (*FUNCTIONS, *GREEK, "pi", "infty", "frac", "sqrt", "binom")

NUMBER = re.compile(r"\s*(\d*)(?:\.(\d*)(?:\\(?:overline|bar|dot)\s*\{?(\d+)\}?)?)?")
FRACTION = re.compile(
    r"\s*\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
# "pi" but not the start of "pie"; otherwise a run of letters is a product of variables
NAME = rf"\\?(?:{'|'.join(NAMES)})(?![A-Za-z])|\\[A-Za-z]+|[A-Za-z]"
SUBSCRIPT = r"_\s*(?:\{[^{}]*\}|\w)"
FUNCTION = rf"\\?(?:{'|'.join(FUNCTIONS)})(?![A-Za-z])"
TIMES = r"\\cdot(?![A-Za-z])|\\times(?![A-Za-z])|\\ast(?![A-Za-z])|\*"
OVER = r"/|\\div(?![A-Za-z])"
# the first character of a factor that needs no sign before it
FACTOR = r"[A-Za-z\\({\[]"


# --- arithmetic -----------------------------------------------------------------------------------

def bounded(value):
    """The value itself; ValueError if it is a fraction of more than BITS bits."""
    if isinstance(value, Fraction):
        bits = max(value.numerator.bit_length(), value.denominator.bit_length())
        if bits > BITS:
            raise ValueError(f"a number of {bits} bits; allowed: {BITS}")
    return value


def whole(value, most: int) -> int:
    """An integer in [0, most]; ValueError for any other value."""
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= most:
        raise ValueError(f"{value} is no integer in [0, {most}]")
    return int(value)


def whole_root(number: int, index: int) -> int | None:
    """The integer whose power is this number ≥ 0, if there is one."""
    # isqrt is exact at any size, a float is not
    nearest = math.isqrt(number) if index == 2 else round(number ** (1 / index))
    return nearest if nearest ** index == number else None


def root(value, index: int):
    """The real root where there is one, else the principal one; exact where that is rational."""
    if not 1 <= index <= LARGEST_ROOT:
        raise ValueError(f"root {index}; allowed: 1 to {LARGEST_ROOT}")
    if not isinstance(value, Fraction):
        return value ** (1 / index)
    # the usual cube root of -8 is -2, the principal one is complex
    if value < 0 and index % 2:
        return -root(-value, index)
    if value >= 0:
        top = whole_root(value.numerator, index)
        bottom = whole_root(value.denominator, index)
        if top is not None and bottom is not None:
            return Fraction(top, bottom)
    return complex(value) ** (1 / index)


def power(base, exponent):
    """base^exponent: exact for rational numbers if the result is one and has at most BITS bits."""
    if not isinstance(exponent, Fraction) or not isinstance(base, Fraction):
        return complex(base) ** complex(exponent)
    if exponent.denominator > 1:
        base = root(base, exponent.denominator)
    times = exponent.numerator
    if isinstance(base, Fraction):
        # refused before the work, not after it
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(times) > BITS:
            raise ValueError(f"{bits * abs(times)} bits; allowed: {BITS}")
    return base ** times


@lru_cache(maxsize=1000)
def variable(name: str, point: int) -> complex:
    """The value of a variable at a point, always the same one."""
    generator = random.Random(f"{name} at {point}")
    # near the unit circle x^2005 neither overflows nor vanishes; to the right of the imaginary
    # axis √(x²) is x
    return cmath.rect(generator.uniform(0.85, 1.2), generator.uniform(0.3, 1.2))


# --- the parser -----------------------------------------------------------------------------------

class Parser:
    """Parses a text from left to right; a method consumes what it names and returns its value.

    expression = term ± term …; term = factor · factor …; factor = ± power; power = primary^…
    All raise ValueError where the text does not follow this grammar.
    """

    def __init__(self, text: str, point: int):
        self.text = text
        self.point = point      # the variables have their values at this one
        self.at = 0
        self.depth = 0          # open brackets
        self.bars = 0           # open |

    def peek(self, pattern: str):
        """The match of a pattern here, behind spaces, or None."""
        return re.compile(rf"\s*({pattern})").match(self.text, self.at)

    def take(self, pattern: str) -> str:
        """The matched text, now consumed; "" where there is none."""
        found = self.peek(pattern)
        if not found:
            return ""
        self.at = found.end()
        return found[1]

    def need(self, pattern: str):
        if not self.take(pattern):
            raise ValueError(f"expected {pattern} at {self.at}")

    def expression(self):
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError(f"deeper than {DEEPEST} brackets")
        value = self.term()
        while sign := self.take(r"[+-]"):
            term = self.term()
            value = bounded(value + term if sign == "+" else value - term)
        self.depth -= 1
        return value

    def term(self):
        value = self.factor()
        while True:
            if self.take(TIMES):
                value = bounded(value * self.factor())
            elif self.take(OVER):
                value = bounded(value / self.factor())
            elif self.another_factor():
                value = bounded(value * self.power())
            else:
                return value

    def another_factor(self) -> bool:
        """Does a factor follow without a sign, as in 2x? Two numbers in a row are no product."""
        if self.peek(r"\|"):
            return not self.bars
        after_digit = self.text[self.at - 1].isdigit()
        return bool(self.peek(FACTOR) or (not after_digit and self.peek(r"[\d.]")))

    def factor(self):
        # a loop, since a recursion would be as deep as the row of signs is long
        sign = 1
        while found := self.take(r"[+-]"):
            sign = -sign if found == "-" else sign
        return sign * self.power()

    def power(self):
        value = self.primary()
        while mark := self.take(r"[!%]"):
            if mark == "!":
                value = Fraction(math.factorial(whole(value, LARGEST_FACTORIAL)))
            else:
                value = value / 100
        if self.take(r"\^"):
            return bounded(power(value, self.argument()))
        return value

    def primary(self):
        """A number, a group in brackets, |…|, or something with a name."""
        number = self.number()
        if number is not None:
            return number
        for opening, ending in ((r"\(", r"\)"), (r"\[", r"\]"), (r"\{", r"\}")):
            if self.take(opening):
                return self.group(ending)
        if self.take(r"\|"):
            self.bars += 1
            value = abs(self.expression())
            self.bars -= 1
            self.need(r"\|")
            return value if isinstance(value, Fraction) else complex(value)
        return self.named()

    def group(self, ending: str):
        """An expression and the bracket behind it."""
        # inside the brackets a bar opens again
        bars = self.bars
        self.bars = 0
        value = self.expression()
        self.bars = bars
        self.need(ending)
        return value

    def number(self) -> Fraction | None:
        """Digits, a repeating decimal, a mixed number; None, nothing consumed, without digits."""
        found = NUMBER.match(self.text, self.at)
        ones, places, period = found.groups("")
        if not ones + places + period:
            return None
        self.at = found.end()
        value = Fraction(int(ones + places or 0), 10 ** len(places))
        if period:
            # 0.(6) = 6/9, and one place further right a tenth of that
            nines = 10 ** len(period) - 1
            value += Fraction(int(period), nines * 10 ** len(places))
        # an integer before a proper fraction of integers is their sum: 1⅘
        found = FRACTION.match(self.text, self.at)
        if found and value.denominator == 1:
            top, bottom = (int(digits) for digits in found.groups() if digits)
            if 0 < top < bottom:
                self.at = found.end()
                value += Fraction(top, bottom)
        return value

    def argument(self, digits: str = r"\d+"):
        """What ^, \\frac or \\sqrt applies to: a group, a number of such digits, or one symbol."""
        if self.take(r"-"):
            return -self.argument(digits)
        if found := self.take(digits):
            return Fraction(int(found))
        return self.primary()

    def named(self):
        """A command, function, constant or variable."""
        name = self.take(NAME).lstrip("\\")
        if not name:
            raise ValueError(f"cannot read {self.text[self.at:]}")
        if name == "frac":
            # without braces \frac12 is one half
            return bounded(self.argument(r"\d") / self.argument(r"\d"))
        if name == "binom":
            n, k = (whole(self.argument(r"\d"), LARGEST_FACTORIAL) for _ in range(2))
            return Fraction(math.comb(n, k))
        if name == "sqrt":
            index = whole(self.group(r"\]"), LARGEST_ROOT) if self.take(r"\[") else 2
            return root(self.argument(), index)
        if name in FUNCTIONS:
            return self.function(name)
        subscript = self.take(SUBSCRIPT)
        if name in CONSTANTS and not subscript:
            return CONSTANTS[name]
        return variable(name + re.sub(r"[{}\s]", "", subscript), self.point)

    def function(self, name: str):
        base = self.argument() if self.take(r"_") else None
        exponent = self.argument() if self.take(r"\^") else Fraction(1)
        # sin⁻¹ is the inverse function, sin² the square of the value
        if exponent == -1 and "arc" + name in FUNCTIONS:
            name = "arc" + name
            exponent = Fraction(1)
        # applied to (…), or to all factors up to a sign or another function
        if self.peek(r"[({]"):
            z = self.primary()
        else:
            z = self.factor()
            while self.another_factor() and not self.peek(FUNCTION):
                z = bounded(z * self.power())
        value = FUNCTIONS[name](complex(z))
        if base is not None:
            value /= FUNCTIONS[name](complex(base))
        return power(value, exponent)


# --- comparison -----------------------------------------------------------------------------------

@lru_cache(maxsize=10000)
def values(text: str) -> tuple | None:
    """The values of a cleaned text at the fixed points; None if it cannot be read."""
    if len(text) > LONGEST:
        return None
    found = []
    try:
        for point in range(POINTS):
            parser = Parser(text, point)
            found.append(parser.expression())
            if text[parser.at:].strip():
                return None
    except UNREADABLE:
        return None
    return tuple(found)


def close(a, b) -> bool:
    """Equal if both are rational, else equal up to TOLERANCE."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    try:
        a = complex(a)
        b = complex(b)
        return abs(a - b) <= max(ZERO, TOLERANCE * max(abs(a), abs(b)))
    except OverflowError:
        return False


def same_values(first, second) -> bool:
    """Two results of `values`: do both exist, and are they close at every point?"""
    return bool(first and second) and all(map(close, first, second))


def same_value(a: str, b: str) -> bool:
    """Two cleaned texts: can both be read, and do they agree at every point?"""
    return same_values(values(a), values(b))


def constant(text: str) -> bool:
    """A cleaned text without variables, as far as its values tell."""
    found = values(text)
    return bool(found) and all(close(found[0], value) for value in found)
