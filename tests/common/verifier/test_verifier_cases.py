r"""Hand-written pairs of answers, by failure class (see the verifier's docstrings)."""

from __future__ import annotations

import threading

import pytest

from common.errors import UserError
from common.verifier import Outcome, grade
from common.verifier.full import _ask

EQUAL = [
    # numbers
    ("05", "5"), ("025", "25"), ("142.0", "142"), ("1,000", "1000"), ("1{,}000", "1000"), (r"1,\!000", "1000"),
    ("1 000 000", "1000000"), (".5", "0.5"), ("5.", "5"), ("1e3", "1000"), (r"1.5\times 10^{-3}", "0.0015"), ("--5", "5"),
    (r"\frac{1}{2}", "0.5"), (r"\frac12", "1/2"), (r"\dfrac{2}{4}", r"\tfrac12"), ("1 1/2", "3/2"), (r"-3\frac{1}{2}", "-3.5"),
    (r"0.\overline{3}", r"\frac13"), (r"0.1\overline{6}", r"\frac16"), ("3+4", "7"), ("2^3", "8"), ("10^{2}", "100"),
    (r"\sqrt{8}", r"2\sqrt{2}"), (r"\sqrt[3]{-8}", "-2"), (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"), ("5!", "120"),
    (r"\sqrt{7+4\sqrt{3}}", r"2+\sqrt3"), (r"\binom{10}{3}", "120"), (r"\log_2 8", "3"), (r"\cos 60^\circ", r"\frac12"),
    ("3.33333333333", r"\frac{10}{3}"), (r"\frac{10}{3}", "3.3333333333"), (r"e^{i\pi}", "-1"), (r"\left|-3\right|", "3"),
    # percent, money, degrees, units
    (r"50\%", "50"), ("0.5", r"50\%"), (r"\$12", "12"), ("12 apples", "12"), (r"12\text{ cm}", "12"), ("12 dollars", "12"),
    (r"90^\circ", "90"), ("90°", r"90^{\circ}"), (r"5\,\mathrm{m/s}", "5"), ("2 million", "2000000"), (r"40\text{ min}", "40 minutes"),
    # equations and names
    ("x=5", "5"), ("5", "x = 5"), ("abc=5", "5"), (r"\text{Area} = 12", "12"), (r"P(X=1)=\frac13", r"\frac13"),
    (r"\frac{3}{7}\approx 0.43", r"\frac37"), ("y=2x+1", "y = 1+2x"), ("2x-y+1=0", "y=2x+1"), (r"a_{n}=2n+1", "a_n = 1+2n"),
    # lists, sets, tuples, intervals
    ("1 and 2", "1,2"), (r"1\text{ or }2", "2, 1"), (r"\{2,1\}", r"\{1,2\}"), (r"\pm 3", "-3,3"), (r"2\pm\sqrt3", r"2-\sqrt3,2+\sqrt3"),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3, \pi/2)"), (r"(x,y)=(1,2)", "(1,2)"), ("x=1, y=2", "(1,2)"), (r"(1,\infty)", "x>1"),
    (r"-1\le x<2", "[-1,2)"), (r"|x|\le 2", "[-2,2]"), (r"[0,1]\cup[1,2]", "[0,2]"), (r"\mathbb{R}\setminus\{0\}", r"(-\infty,0)\cup(0,\infty)"),
    (r"\emptyset", r"\{\}"), (r"\infty", "inf"), (r"\begin{bmatrix}1&2\\0.5&4\end{bmatrix}", r"\begin{pmatrix}1 & 2 \\ \frac12 & 4\end{pmatrix}"),
    # algebra
    ("-q+p", "p - q"), ("x^2+2x+1", "(x+1)^2"), (r"\frac{x^2-1}{x-1}", "x+1"), (r"\frac{3^n}{3}", "3^{n-1}"), (r"\sin 2x", r"2\sin x\cos x"),
    (r"\frac{n!}{(n-2)!}", "n(n-1)"), (r"\sqrt{\frac{2GM}{r}}", r"\frac{\sqrt{2GM}}{\sqrt r}"), (r"\ln(ab)", r"\ln a+\ln b"), ("ab", r"b\cdot a"),
    # words and letters
    (r"\text{Evelyn}", "evelyn"), ("(B)", r"\text{B}"), (r"\textbf{(C)}", "C"), ("A", "a"), (r"\text{even}", "even"), ("D", "(D) Alina"),
    # bases and clocks
    ("204_{5}", "204_5"), (r"4:30\text{ p.m.}", "4:30"),
]  # fmt: skip

DIFFERENT = [
    # hedging is never paid
    (r"5\text{ or }6", "5"), ("5 or 6", "5"), ("5, 6", "5"), ("5; 6", "5"), (r"5 \quad 6", "5"), (r"\{5,6\}", "5"), ("[4,6]", "5"),
    (r"\pm 5", "5"), (r"5 \lor 6", "5"), ("5|6", "5"), (r"5\text{ cm or 6 cm}", "5"), (r"1\text{ if even, }2\text{ if odd}", "1"),
    (r"\begin{cases}5\\6\end{cases}", "5"), ("x=5=6", "5"), (r"n\in\{5,6\}", "5"), (r"x\ne 5", "5"), ("x>5", "5"),
    # structure
    (r"\sqrt[3]{2}", r"\sqrt{2}"), ("3^{n-1}", "3^n-1"), (r"\frac{1}{s+a}", r"\frac1s+a"), ("x^{12}", "x^{1}2"), (r"\frac{1}{2x}", r"\frac12x"),
    (r"a_{12}", "a_{1}2"), (r"\sin^{-1}x", r"\frac{1}{\sin x}"), (r"\log_3 x", r"\log x"), (r"\lfloor x\rfloor", "x"),
    (r"\lfloor\sqrt{n}\rfloor", r"\lfloor n\rfloor"), (r"\sqrt{x^2}", "x"), ("(-2)^2", "-2^2"), ("5!", "5"), ("x'", "x"), (r"\overline{x}", "x"),
    # variables are no units
    ("c+b", "a+b"), ("3 a", "3 c"), (r"\frac mn", r"\frac sn"), ("t", "h"), ("0.64", "0.64N"), ("5e", "5"), ("g(x)", "h(x)"),
    # tolerance
    ("2.88e-19", "2.88e-20"), (r"10^{-12}", "0"), ("0.33", r"\frac13"), ("3.14", r"\pi"), ("3.14159", r"\pi"), ("7.0001", "7"), ("0.999999", "1"),
    ("600", "6"), ("1/3", "0.33"), ("99999999999", "100000000000"), ("9007199254740993", "9007199254740992"), (r"2^{1000}-1", "2^{1000}"),
    (r"2^{1000}+\pi", "2^{1000}"), (r"e^{-200}", "0"), ("2.23", "2.232"),
    # units, percent, scale
    (r"5\text{ hours}", r"5\text{ minutes}"), ("5 feet", "5 inches"), ("7 million", "7 billion"), (r"2800\%", r"28\%"), ("10 increase", "10 decrease"),
    (r"2\text{ h }30\text{ min}", "2"), (r"45^\circ", r"54^\circ"),
    # sets, pairs, intervals
    ("(1,2)", "(2,1)"), ("(1,2)", r"\{1,2\}"), ("(1,2)", "[1,2]"), ("[1,2)", "(1,2]"), ("(1,2,3)", "(1,2)"), ("((1,2),3)", "(1,(2,3))"), ("(1,2)", "12"),
    (r"\{1,2\}", r"\{1,2,3\}"), (r"x\ge 3", r"(3,\infty)"), ("(2,3)", "23"), ("-3", "-3,0"), ("32, 349", "32349"), ("x<3", "x>3"),
    # words, bases, clocks
    (r"\text{no}", r"\text{on}"), (r"\text{not even}", r"\text{even}"), (r"12\text{ men}", r"12\text{ women}"), ("AB", "B"), ("A, B", "B"), ("12_5", "12_6"),
    ("12:00", "1:00"), (r"\mathbb{N}", "N"), (r"\emptyset", "0"), (r"A\cap B", r"A\cup B"), ("C", "(A) Cecile"), ("²", "2"),
    # equations
    ("x=6", "x=5"), ("x=x", "5"), ("0=0", "x=5"), ("y=x", "x+1=y"), ("2x-y+1=0", "2x-y+2=0"), ("11a+c", "7 = 11a+c"), ("x=5", "y=5"), ("0", "a+3z=0"),
    # nothing
    ("", "5"), (r"\text{cm}", "0"), (r"\frac{1}{0}", "5"), ("0/0", "1"), ("nan", "5"), ("-5", "5"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), EQUAL)
@pytest.mark.parametrize("level", ["fast", "full"])
def test_equal_answers(answer: str, gold: str, level: str) -> None:
    assert grade(rf"so \boxed{{{answer}}}.", gold, level=level).verdict is Outcome.CORRECT  # type: ignore[arg-type]


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
@pytest.mark.parametrize("level", ["fast", "full"])
def test_different_answers(answer: str, gold: str, level: str) -> None:
    assert grade(rf"so \boxed{{{answer}}}.", gold, level=level).verdict is Outcome.WRONG  # type: ignore[arg-type]


@pytest.mark.parametrize(("answer", "gold"), [("1,2", "(1,2)"), ("(1,2)", "1,2"), (r"\sqrt4, 3", "(2,3)")])
def test_pairs_without_brackets_only_at_level_full(answer: str, gold: str) -> None:
    assert grade(rf"\boxed{{{answer}}}", gold, level="fast").verdict is Outcome.WRONG
    assert grade(rf"\boxed{{{answer}}}", gold, level="full").verdict is Outcome.CORRECT


def test_a_pair_without_brackets_keeps_its_order() -> None:
    assert grade(r"\boxed{2,1}", "(1,2)", level="full").verdict is Outcome.WRONG


@pytest.mark.parametrize("gold", ["7", 7, 7.0, ["8", "7"], [8, 7.0], r"\boxed{7}", "$7$", "7\n", [["7"]]])
def test_kinds_of_gold(gold: object) -> None:
    assert grade(r"\boxed{7}", gold).verdict is Outcome.CORRECT  # type: ignore[arg-type]
    assert grade(r"\boxed{6}", gold).verdict is Outcome.WRONG  # type: ignore[arg-type]


@pytest.mark.parametrize("gold", [None, {"a": 1}, True, [None], {1}])
def test_an_impossible_gold_is_the_callers_mistake(gold: object) -> None:
    with pytest.raises(UserError, match="gold"):
        grade(r"\boxed{7}", gold)  # type: ignore[arg-type]


def test_unknown_options_name_the_valid_ones() -> None:
    with pytest.raises(UserError, match="fast, full"):
        grade("x", "1", level="best")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="boxed, answer_tag"):
        grade("x", "1", template="box")  # type: ignore[arg-type]


HOSTILE = [
    "9**9**9**9", "(10^8)!", "((10!)!)!", r"2^{2^{2^{2^{2^2}}}}", r"\binom{10^9}{5\cdot10^8}", r"\sum_{k=1}^{10^9}k^k", r"\prod_{k=1}^{10^8}k",
    r"\sin(10^{10^{10}})", "1e999999999", "0.1^{10^9}", r"(1+\sqrt2)^{100000}", "1.0000001^{10^{12}}", r"\sqrt[10^9]{2}", r"\gcd(2^{10^7}-1,3)",
    "9" * 5000, "(" * 3000, "{" * 10 + "1" + "}" * 10, "-" * 4000, "x^" * 900 + "2", "1/" * 1500 + "1", r"\frac{1}" * 800, "|" * 999, "\\" * 4999,
    r"\text{" * 400 + "}" * 400, "x" * 100_000, "\x00", "4\x002", "😀", "_" * 50, "^", r"\begin{pmatrix}" * 300, "1=" * 2000 + "1", "1," * 2400 + "1",
    r"\sqrt{" * 200 + "2" + "}" * 200, "__import__('os').system('true')", "open('x','w')", "(1).__class__.__mro__", r"\input{/etc/passwd}", "x!!!", "1.2.3",
]  # fmt: skip


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("gold", ["42", r"\frac{\pi}{2}", "x+1", "(1,2)"])
def test_hostile_answers_are_wrong_and_harmless(answer: str, gold: str) -> None:
    assert grade(rf"\boxed{{{answer}}}", gold, level="full").verdict is not Outcome.CORRECT


def test_the_same_verdicts_off_the_main_thread() -> None:
    """Math-Verify's alarms raise there unless switched off, and its errors would pass for "wrong"."""
    found: list[bool] = []

    def work() -> None:
        found.append(grade(r"\boxed{\sqrt{8}}", r"2\sqrt2", level="full").verdict is Outcome.CORRECT)
        found.append(_ask(r"\frac{2}{4}", r"\frac{1}{2}"))
        found.append(not _ask(r"\frac{1}{4}", r"\frac{1}{2}"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True, True, True]
