"""Properties of the comparison on generated answers."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from common.verifier import Outcome, VerifierPool, grade
from common.verifier.evaluate import Evaluator
from common.verifier.grammar import parse_answer
from common.verifier.nodes import canonical
from common.verifier.normalise import normalise

INTEGERS = st.integers(-(10**12), 10**12)
FRACTIONS = st.fractions(max_denominator=10**6).filter(lambda f: abs(f) < 10**9)


def _correct(answer: str, gold: object) -> bool:
    return grade(rf"Hence $\boxed{{{answer}}}$.", gold, level="full").verdict is Outcome.CORRECT  # type: ignore[arg-type]


def _frac(f: Fraction) -> str:
    sign = "-" if f < 0 else ""
    return rf"{sign}\frac{{{abs(f.numerator)}}}{{{f.denominator}}}"


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> str:
    """LaTeX of a random expression in x and y."""
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(["x", "y", r"\pi", "2", "3", "7", "0.5"]))
    left, right = draw(expressions(depth=depth - 1)), draw(expressions(depth=depth - 1))
    form = draw(
        st.sampled_from(
            ["({}+{})", "({}-{})", r"{}\cdot {}", r"\frac{{{}}}{{{}}}", r"{}^2+{}", r"\sqrt{{{}}}+{}"]
        )
    )
    return form.format(left if "^" not in form else f"({left})", right)


@given(st.text(max_size=40))
def test_no_text_raises_and_every_answer_equals_itself(text: str) -> None:
    verdict = grade(rf"\boxed{{{text}}}", text, level="full")
    if text.count("{") == text.count("}") == 0 and "\\boxed" not in text:
        assert (verdict.verdict is Outcome.CORRECT) == (True if text.strip() else not text.strip())


@given(st.text(alphabet=r"\{}[]()^_|=<>,;.+-*/!%&'$ 0129axyefrcsqtpimd", max_size=60))
def test_no_mathematical_soup_raises(text: str) -> None:
    for gold in ("1", r"\frac{x}{2}", "(1,2)"):
        grade(text, gold, level="full", template="auto")
        grade(rf"\boxed{{{text}}}", gold, level="full")


@given(INTEGERS)
def test_spellings_of_an_integer(n: int) -> None:
    for spelling in (
        f"{n}",
        f"{n:,}",
        f"{n:,}".replace(",", "{,}"),
        f"{n}.0",
        f"x={n}",
        rf"\text{{{n}}}",
        f"{n}.",
        rf"{n}\text{{ cm}}",
    ):
        assert _correct(spelling, str(n)), spelling


@given(INTEGERS, st.integers(1, 10**6))
def test_other_integers_differ(n: int, step: int) -> None:
    for other in (
        f"{n + step}",
        f"{n}.5",
        rf"\pm {step}",
        f"{n}, {n + step}",
        rf"{n}\text{{ or }}{n + step}",
        f"[{n}, {n + step}]",
        f"{n}x",
    ):
        if n != 0 or "x" not in other:
            assert not _correct(other, str(n)), other


@given(FRACTIONS)
def test_spellings_of_a_fraction(f: Fraction) -> None:
    gold = _frac(f)
    double = rf"\frac{{{2 * f.numerator}}}{{{2 * f.denominator}}}"
    for spelling in (
        f"{f.numerator}/{f.denominator}",
        gold.replace("frac", "dfrac"),
        double,
        rf"\left({gold}\right)",
    ):
        assert _correct(spelling, gold), spelling


@given(FRACTIONS, FRACTIONS)
def test_fractions_are_equal_exactly_when_their_values_are(f: Fraction, g: Fraction) -> None:
    assert _correct(_frac(f), _frac(g)) == (f == g)


@given(st.decimals(-(10**6), 10**6, places=4), st.integers(1, 9))
def test_a_decimal_with_another_last_digit_differs(d: object, step: int) -> None:
    value = Fraction(str(d))
    assert _correct(str(d), _frac(value))
    assert not _correct(f"{float(value + Fraction(step, 10**4)):.4f}", f"{d}")


@settings(max_examples=60)
@given(expressions())
def test_an_expression_equals_its_rewritings_and_not_its_successor(source: str) -> None:
    tree = canonical(parse_answer(normalise(source)))
    assert _correct(f"  {source} ", source)
    assert not _correct(f"{source}+1", source)
    assert canonical(parse_answer(normalise(source.replace("+", " + ")))) == tree


@settings(max_examples=60)
@given(expressions(), expressions())
def test_sums_commute(a: str, b: str) -> None:
    assert _correct(f"({a})+({b})", f"({b})+({a})")
    assert _correct(rf"({a})\cdot({b})", f"({b})({a})")


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=6, unique=True), st.randoms())
def test_lists_and_sets_have_no_order_but_tuples_do(items: list[int], random: object) -> None:
    shuffled = list(items)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    gold, other = (", ".join(map(str, x)) for x in (items, shuffled))
    assert _correct(other, gold)
    assert _correct(rf"\{{{other}\}}", rf"\{{{gold}\}}")
    assert _correct(f"({other})", f"({gold})") == (items == shuffled)
    assert not _correct(", ".join(map(str, items[:-1])), gold)


@given(FRACTIONS, FRACTIONS)
def test_arithmetic_is_exact(a: Fraction, b: Fraction) -> None:
    tree = parse_answer(f"{_frac(a)} + 3({_frac(b)}) - {_frac(a)} \\cdot ({_frac(b)})")
    assert Evaluator(20)(tree) == a + 3 * b - a * b


def test_a_pool_agrees_with_the_plain_function() -> None:
    pairs = [
        (rf"\boxed{{{k}/{m}}}", rf"\frac{{{k * 2}}}{{{n}}}")
        for k in range(1, 5)
        for m in (2, 3)
        for n in (4, 6)
    ]
    with VerifierPool(workers=1, level="full") as pool:
        pooled = [v.verdict for v in pool.grade_many(pairs)]
    assert pooled == [grade(*pair, level="full").verdict for pair in pairs]
