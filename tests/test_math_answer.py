r"""Equal and different answers of a mathematics problem, and the answer in a text.

All pairs here are invented. If NANOL2D_SHARED names a folder with MATH-500, its reference solutions
are graded too.
"""

import itertools
import json

import pytest

from data.tasks.math.equal import equal, extract, grade, last_box, strict_equal

# The first of a row is equal to all others of it.
EQUAL = [
    # fractions, mixed numbers, decimals
    (r"\frac{17}{6}", "17/6", r"\frac{34}{12}", r"\dfrac{17}{6}.", r"\tfrac{17}6", r"2\frac56",
     "2 5/6", r"2.8\overline{3}", "2.8333...", r"x = \frac{17}{6}", r"\frac{17}{6}\approx 2.83"),
    (r"-\frac{11}{4}", r"\frac{-11}{4}", r"-2\frac{3}{4}", "-2.75", "−11/4", r"\frac{11}{-4}"),
    (r"\frac38", ".375", "0.3750", r"37.5\%", "37.5 percent", r"3.75\cdot10^{-1}", r"\frac 38"),
    ("0.00047", r"4.7 \times 10^{-4}", "4.7e-4", "4.7 × 10^−4"),
    ("35", r"35\%", r"\boxed{35}", "**35**", "35.0", "{35}", r"\text{35}", "5 \\cdot 7 = 35"),
    # thousands, units, money, degrees
    (r"20,\!160", "20160", "20,160", "20{,}160", r"20\,160", r"8!/2", r"20160\text{ ways}"),
    (r"\$45.50", "45.5", r"45.50\text{ dollars}", "$45.50"),
    (r"24\mbox{ feet}^2", "24", r"24\text{ ft}^2", "24 square feet", r"24\,\mathrm{ft}^{2}"),
    ("70", "70 km/h", r"70\text{ miles per hour}", r"70\ \frac{\text{m}}{\text{s}}"),
    (r"54^\circ", "54°", "54", r"54\text{ degrees}", r"\angle ABC = 54^{\circ}", "54 degrees"),
    # roots, constants, functions
    (r"5\sqrt{7}", r"\sqrt{175}", "5√7", "5 sqrt(7)", r"\sqrt7\cdot5", r"5\cdot7^{1/2}"),
    (r"\sqrt[3]{-27}", "-3", r"-27^{\frac13}"),
    (r"40\pi", "40π", "40 pi", r"\pi\cdot 40", r"40\pi\text{ cm}^3"),
    (r"\sin 30^\circ", r"\frac12", r"\cos\frac{\pi}{3}", r"\sin^2 45^\circ"),
    (r"\tan^{-1} 1", r"\arctan 1", r"\frac{\pi}{4}"),
    (r"\sec x", r"\frac{1}{\cos x}"),
    (r"\log_2 32", "5", r"\binom{5}{4}", r"\frac{\ln 32}{\ln 2}", r"\ln e^5"),
    (r"4 - 9i", "-9i+4", r"4-9\mathrm{i}", "z = 4 - 9i"),
    (r"e^{i\pi/3}", r"\frac12+\frac{\sqrt3}{2}i"),
    # formulas
    ("m - n", "-n+m"),
    ("(a+3)(b-7)", "(b-7)(a+3)", "ab-7a+3b-21"),
    (r"\frac{x+4}{9}", r"\frac19x+\frac49", "(x+4)/9", r"f(x) = \frac{x+4}{9}"),
    ("|x-6|", "|6-x|", r"\lvert x-6\rvert"),
    ("x_1 + x_2", "x_{2}+x_{1}"),
    # lists, signs written out
    ("4,-9", "-9, 4", r"\{4,-9\}", r"x=4 \text{ or } x=-9", "x = 4, -9", "-9 and 4", "4; -9"),
    ("2, 11, 13", "13, 2, and 11", r"\left\{11,13,2\right\}"),
    (r"3 \pm \sqrt{6}", r"3-\sqrt{6}, 3+\sqrt{6}", r"x = 3±√6", r"\frac{6\pm2\sqrt6}{2}"),
    (r"\{2\pm\sqrt{3},-8\}", r"-8, 2+\sqrt3, 2-\sqrt3"),
    (r"\pm1\pm2", "3,-1,1,-3"),
    # pairs, intervals, unions
    ("(7,-20)", r"\left(7,\, -20\right)", "(x,y)=(7,-20)", r"\langle 7,-20\rangle"),
    (r"(5, \frac{\pi}{3})", "(5, π/3)", r"\left(5,\frac\pi3\right)"),
    ("(1,6]", r"1 < x \le 6", r"x \in (1,6]", r"6 \geq t > 1", r"\{x \mid 1<x\leq 6\}"),
    (r"[8,\infty)", r"x \ge 8", "8 ≤ x", "[8,∞)", r"[8,+\infty)"),
    (r"(-\infty,1)\cup(4,\infty)", r"(4,\infty)\cup(-\infty,1)", r"x<1 \text{ or } x>4",
     r"(-∞, 1) ∪ (4, ∞)"),
    # matrices
    (r"\begin{pmatrix} 2 & 0 \\ -1 & 1/2 \end{pmatrix}",
     r"\begin{bmatrix}2&0\\-1&0.5\end{bmatrix}",
     r"A = \left(\begin{array}{cc} 2 & 0 \\[2pt] -1 & \frac12 \end{array}\right)",
     r"\frac12\begin{pmatrix} 4 & 0 \\ -2 & 1 \end{pmatrix}"),
    # equations, number bases
    ("2x - 3y + z = 9", "9 = 2x-3y+z", "-2x+3y-z+9=0", "2x+z=3y+9"),
    ("y = 4x - 1", "4x-1", "y+1=4x", "y=-1+4x"),
    ("x=8", "8", "8 = x"),
    ("73_9", "73_{9}", "(73)_9", r"73_{\text{9}}"),
    # words
    (r"\text{Marta}", "marta", r"\textbf{Marta}.", r"\mathrm{Marta}", "**Marta**"),
    (r"\text{hyperbola}", "a hyperbola", r"\text{The Hyperbola}"),
    (r"\text{odd}", "Odd", "odd"),
    (r"\text{(D)}", "D", "(D)", r"\text{(D) Sphere}", "(D) Sphere", r"\textbf{D}", "D. Sphere"),
    (r"\text{no solution}", "No solution."),
]
DIFFERENT = [
    # rounded is not equal
    (r"\frac{17}{6}", "2.833"), (r"\frac{44}{100}", r"\frac49"), (r"\frac{\pi}{4}", "0.7854"),
    (r"5\sqrt7", "13.2288"), (r"40\pi", "125.66"), ("0.44", "0.444"), ("1000000001", "1000000000"),
    (r"10^{-15}", r"10^{-16}"),
    # a float would call these equal
    ("1/3", "0." + "3" * 40),
    # without a value
    ("2 +", "2"), ("1/0", "2/0"),
    # slips
    (r"\frac{17}{6}", r"\frac{6}{17}"), (r"\frac{17}{6}", r"-\frac{17}{6}"), (r"40\pi", "40"),
    (r"2\frac{5}{6}", r"2\cdot\frac56"), ("0.5", r"0.5\%"), (r"20,\!160", "20.160"),
    (r"\$45,\!678", "45.678"), ("3k+2", "3k+1"), ("3k", "3K"), ("4-9i", "4+9i"), ("x^4", "4x"),
    (r"\log 7", r"\ln 7"), (r"\infty", r"-\infty"),
    # lists
    ("4,-9", "4"), ("4,-9", "4,-9,0"), ("4,-9", "4,4"), ("4,4,-9", "4,-9,-9"), ("4,-9", "(4,-9)"),
    (r"3 \pm \sqrt{6}", r"3+\sqrt{6}"), ("n=2,3,4", "n=1,2,3"), ("x=8", "x=8, x=2"),
    # brackets and order
    ("(1,6]", "(1,6)"), ("(1,6]", "[1,6]"), (r"x \le 6", "x < 6"), ("(7,-20)", "(-20,7)"),
    (r"(0,4)\cup(4,9)", "(0,9)"), (r"(0,4)\cup(4,9)", "(0,4),(4,9)"), ("(1,100)", "1100"),
    (r"\begin{pmatrix}1\\3\end{pmatrix}", r"\begin{pmatrix}3\\1\end{pmatrix}"),
    (r"\begin{pmatrix}1\\3\end{pmatrix}", r"\begin{pmatrix}1&3\end{pmatrix}"),
    (r"\begin{pmatrix}1&3\end{pmatrix}", r"\begin{vmatrix}1&3\end{vmatrix}"),
    # equations, bases, words
    ("2x+y-3=0", "2x+5y-4=0"), ("2x+y-3=0", "0"), ("y=4x-1", "y=4x+1"), ("x=8", "y=8"),
    ("73_9", "73_{10}"), ("73_9", "66"), (r"\text{odd}", r"\text{even}"), ("east", "seat"),
    (r"\text{(D)}", r"\text{(B) Sphere}"), ("June 3", "May 3"), (r"\text{Marta}", "7"),
    ("", ""), ("7", ""),
]


@pytest.mark.parametrize("row", EQUAL, ids=lambda row: row[0])
def test_equal_answers(row):
    for other in row:
        assert equal(row[0], other) and equal(other, row[0]), other


@pytest.mark.parametrize("a, b", DIFFERENT)
def test_different_answers(a, b):
    assert not equal(a, b)
    assert not equal(b, a)


def test_no_row_of_the_table_equals_another():
    for row, other in itertools.combinations(EQUAL, 2):
        assert not equal(row[0], other[0]), (row[0], other[0])


# --- extraction -----------------------------------------------------------------------------------

@pytest.mark.parametrize("text, answer", [
    (r"So $\boxed{7}$. No: $\boxed{\frac{7}{2}}$.", r"\frac{7}{2}"),
    (r"$\boxed{\boxed{7}}$", "7"),
    (r"$x=\boxed{7}$ or $x = \boxed{-3}$", "7,-3"),
    (r"$\boxed 7$ it is", "7"),
    (r"$\boxed{\frac{7}{2}$ it is", r"\frac{7}{2}"),
    (r"\fbox{7}", "7"),
    ("The answer is $7$, not $8$.", "7"),
    ("The final answer is: **7**", "7"),
    ("The answer is\n\n\\[ 7.5 \\]\nas claimed.", "7.5"),
    ("The answer is $7$ or $-3$. Done.", "7,-3"),
    ("3 + 4 = 7\n#### 7\n", "7"),
    ("Hence $a = 3$ and $b = 4$.", "b=4"),
    (r"It costs \$7 and so \(x = 9\).", "9"),
    ("First 8, then 7.", "7"),
    ("That makes 1,700 in all.", "1700"),
    ("The area is 7 pi", r"7\pi"),
    ("7/2", r"\frac72"),
    ("x^2 + 7", "x^2+7"),
    ("The curve is a circle.", r"\text{circle}"),
    ("\\boxed{7}\nProblem: another one, \\boxed{8}", "7"),
    (r"<think>\boxed{7}? No.</think>So the answer is 8.", "8"),
])
def test_the_answer_is_found(text, answer):
    assert equal(extract(text.split("Problem:")[0]), answer)
    assert grade(text, answer)["flexible"]


@pytest.mark.parametrize("text", ["", " \n", r"\boxed{}", "Problem: 7"])
def test_no_answer_is_never_right(text):
    assert extract(text.split("Problem:")[0]) == ""
    assert grade(text, "7") == {"strict": False, "flexible": False}


# --- strict ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, box", [
    (r"\boxed{1} \boxed{2}", "2"),
    (r"\fbox{1}", "1"),
    (r"\boxed{1} \fbox{2}", "1"),
    (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"$\boxed 12$.", "12"),
    (r"\boxed{1", None),
    (r"\boxed12", None),
    ("12", None),
])
def test_last_box(text, box):
    assert last_box(text) == box


@pytest.mark.parametrize("answer, reference", [
    (r"\dfrac{3}{8}", r"\frac38"), ("3/8", r"\frac{3}{8}"), (r"\frac3{8}", r"\frac{3}{8}"),
    (".5", r"\frac{1}{2}"), (r"\left( 1, 2 \right)", "(1,2)"), (r"54^\circ", "54"),
    (r"\$9", "9"), (r"9\text{ cm}", "9"), (r"9\%", "9"), ("k = 9", "9"), (r"2\sqrt3", r"2\sqrt{3}"),
    (r"\sqrt", r"\sqrt"),
])
def test_strict_knows_these_ways_of_writing(answer, reference):
    assert strict_equal(rf"\boxed{{{answer}}}", reference)


@pytest.mark.parametrize("answer, reference", [
    (r"\frac{6}{16}", r"\frac{3}{8}"), ("0.375", r"\frac{3}{8}"), ("9.", "9"), ("2,1", "1,2"),
    (r"\frac{38}1", "38"), ("area = 9", "9"), (r"9\mbox{ cm}", "9"), ("54°", r"54^\circ"),
    (r"9\text{ cm}\text{ x}", "9"), ("9.0", "9"),
])
def test_strict_knows_no_others(answer, reference):
    assert not strict_equal(rf"\boxed{{{answer}}}", reference)
    assert not strict_equal(reference, reference), "no box"


# --- any text ------------------------------------------------------------------------------------

HOSTILE = [
    "(" * 2000, "{" * 10**6, "9" * 10**6, r"\boxed{" * 10**5, r"\boxed{} " * 10**5, "$" * 10**6,
    "answer is " * 10**5, "9^{9^{9^9}}", "((9^99)^99)^99", "99999^{99}" * 200, "1000000!",
    "((300!)!)!", r"\binom{300}{150}" * 120, r"\frac" * 400, r"\sqrt" * 400, r"\sin" * 400,
    "-" * 2000, "|" * 2000, "=" * 2000, "<" * 2000, "1," * 1000, r"\pm 1," * 300, "(1," * 600,
    r"\{" * 900, r"\begin{pmatrix}" * 130, '"a' * 900, r"\frac{1}{0}", r"\log 0", "10^{400}e",
    "x^{9999999999}", "1.5^{8000}", "0." + "3" * 1900, "\x00", "٤٢", ",".join(map(str, range(400))),
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12])
def test_hostile_answers_end(text):
    """No exception and no long wait, the same in both directions."""
    for other in (text, "42", text + "1", text[::-1]):
        assert equal(text, other) == equal(other, text)
    grade(text, "42")
    grade(rf"\boxed{{{text}}}", "42")


# --- the published data ---------------------------------------------------------------------------

def test_reference_solutions_are_right(shared):
    path = shared / "data" / "datasets" / "math500" / "test.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        right = grade(row["solution"], row["answer"])
        assert right == {"strict": True, "flexible": True}, row["unique_id"]
