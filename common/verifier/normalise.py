r"""String level: the same answer typed in different ways becomes the same string.

Invariant: every rewrite keeps the mathematical content; in particular digits never join across a space, and no
letter that could be a variable is ever removed as if it were a unit.
"""

from __future__ import annotations

import re
import unicodedata

MAX_CHARS = 5000  # a longer answer is not an answer: the longest gold in the paper's sets has 204 characters

_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
    "∙": r"\cdot ", "•": r"\cdot ", "∗": "*", "÷": r"\div ", "⁄": "/", "∕": "/", "°": r"^\circ ", "º": r"^\circ ",
    "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∈": r"\in ",
    "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∞": r"\infty ", "±": r"\pm ", "∓": r"\mp ", "…": r"\ldots ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "′": "'", "’": "'", "％": "%", "，": ",", "；": ";", "：": ":", "（": "(", "）": ")",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}", "⅖": r"\frac{2}{5}", "⅗": r"\frac{3}{5}", "⅘": r"\frac{4}{5}", "⅙": r"\frac{1}{6}",
    "⅚": r"\frac{5}{6}", "⅛": r"\frac{1}{8}", "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}", "⅞": r"\frac{7}{8}",
    "\u200b": "", "\u200c": "", "\u200d": "", "\ufeff": "", "\u2060": "", "€": "", "£": "", "¥": "",
}  # fmt: skip
_GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho . sigma tau upsilon phi chi psi omega"
_CHARACTERS |= {chr(0x3B1 + k): rf"\{n} " for k, n in enumerate(_GREEK.split()) if n not in (".", "omicron")}
_CHARACTERS |= {
    chr(0x391 + k): rf"\{n.title()} " for k, n in enumerate(_GREEK.split()) if n not in (".", "omicron")
}
_TABLE = str.maketrans(_CHARACTERS)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
        (r"\\(?:left|right|mleft|mright|middle)(?![a-zA-Z])\s*\.?", ""),
        (r"\\(?:[bB]igg?[lrm]?)(?![a-zA-Z])", ""),
        (r"\\(?:display|text|script|scriptscript)style(?![a-zA-Z])", ""),
        (r"\\(?:rm|bf|it|normalfont|limits|nolimits|boldmath)(?![a-zA-Z])", ""),
        (r"\\(?:n?eq|ne)(?![a-zA-Z])", r"\\ne"),
        (r"\\(?:leq|leqslant|leqq|lt(?:e|eq))(?![a-zA-Z])", r"\\le"),
        (r"\\(?:geq|geqslant|geqq|gt(?:e|eq))(?![a-zA-Z])", r"\\ge"),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\(?:dots|cdots|dotsc|dotsb)(?![a-zA-Z])", r"\\ldots"),
        (r"\\(?:varnothing|O(?=\s*$))(?![a-zA-Z])", r"\\emptyset"),
        (r"\\color\s*\{[^{}]*\}|\\(?:phantom|vphantom|hspace|vspace)\*?\s*\{[^{}]*\}", ""),
        (r"\\v?phantom(?![a-zA-Z])", ""),
        (r"\s*(?:,\s*\\!|\{\s*,\s*\})\s*", "{,}"),
        (r"(?<=\d)\{,\}(?=\d{3})", ""),
        (r"(?<=\d)\\,(?=\d{3}(?!\d))", ""),
        (r"(?<!\\)\\[!,;:> ]|\\(?:thinspace|medspace|enspace|nobreak|hfill)(?![a-zA-Z])|~", " "),
        (r"\\(?:quad|qquad)(?![a-zA-Z])", r" \\quad "),
        (r"\\\$|\$", ""),
        (r"(?<!\\)\\[\[\]()]", ""),
        (r"\s+", " "),
    )
)
_DOUBLED = re.compile(r"\\\\(?=[a-zA-Z])")
_SUPER_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+")
_SUB_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_TAIL = " \t.。,;:\\"
_TEXTUAL = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|mathrm|mathbf|mathit|mathsf|mbox|hbox|bm|boldsymbol|operatorname\*?|emph|textnormal|mathnormal)\s*\{([^{}]*)\}"
)
_WORD_SEPARATOR = re.compile(r",? and |, ?")
_ARTICLE = re.compile(r"^(?:an?|the) (?!and |or )(?=\w{3})")
_LETTER = re.compile(r"^\(?([a-j])\)$")  # the label of a choice
_NOT_WORD = re.compile(r"[\s{}$.]+")


def _plain(text: str) -> str:
    """Unicode mathematics as LaTeX; full-width and styled letters and digits as plain ones."""
    if text.isascii():
        return text
    text = _SUPER_RUN.sub(lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _SUB_RUN.sub(lambda m: "_{" + m.group().translate(_SUBSCRIPTS) + "}", text)
    text = re.sub(r"√\s*(\([^()]*\)|\d+|\w)", r"\\sqrt{\1}", text).translate(_TABLE)
    return "".join(_compatible(c) for c in text)


def _compatible(char: str) -> str:
    code = ord(char)
    if 0x1D400 <= code <= 0x1D7FF or 0xFF00 <= code <= 0xFFEF or char.isspace():
        return unicodedata.normalize("NFKC", char)
    return char


def normalise(answer: str) -> str:
    """The answer with spacing commands, sizing, dollar signs and spelling variants of commands removed.

    Raises:
        ValueError: the answer is longer than MAX_CHARS or holds a NUL byte.
    """
    if len(answer) > MAX_CHARS or "\x00" in answer:
        raise ValueError("the answer is too long or binary")
    text = _plain(answer)
    if "\\\\" in text and "\\begin" not in text:
        text = _DOUBLED.sub(r"\\", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.rstrip(_TAIL).strip()


def text_key(normalised: str) -> str:
    """The answer as bare words, for answers that are words: no font commands, case or punctuation."""
    for _ in range(8):  # text inside text
        previous, normalised = normalised, _TEXTUAL.sub(r" \1 ", normalised)
        if previous == normalised:
            break
    words = _LETTER.sub(r"\1", _NOT_WORD.sub(" ", normalised).strip().casefold())
    words = _ARTICLE.sub("", words)
    if ", " in words or " and " in words:  # a list of words has no order
        words = ", ".join(sorted(_WORD_SEPARATOR.split(words)))
    return words


_BARE_WORDS = re.compile(r"[^\W\d_]+(?:['\-][^\W\d_]+)*(?:,? [^\W\d_]+(?:['\-][^\W\d_]+)*)*")


def is_words(normalised: str, key: str) -> bool:
    """Whether the answer is words rather than mathematics: typed as text, or a bare word of three letters or more."""
    if not _BARE_WORDS.fullmatch(key):
        return False
    return len(key) > 2 or _TEXTUAL.search(normalised) is not None
