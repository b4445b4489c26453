"""The words of the language: every name that the lexer and the parser know.

Invariant: a closed list. A name that is not here is a variable, a unit or a parse error; it is never looked up.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


FUNCTIONS = _names("""
    arcsin arccos arctan arccot arcsec arccsc arcsinh arccosh arctanh asin acos atan sinh cosh tanh coth
    sin cos tan cot sec csc log ln lg exp sqrt cbrt gcd lcm max min abs floor ceil
""")
PREFIXES = ("sqrt", "sin", "cos", "tan", "log", "exp", "ln", "pi")
"""Functions recognised at the start of a run of plain letters (`sinx`)."""

PLAIN_NAMES = FUNCTIONS | _names("inf infinity infty oo pi mod")
FUNCTION_COMMANDS = FUNCTIONS | {"Gamma"}

CONNECTORS = _names("and or und oder et ou")
DISJUNCTIONS = _names("or oder ou")
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
PERCENT_WORDS = frozenset({"percent", "pct", "percentage", "per cent", "percents"})
UNIT_WORDS = _names("""
    cm mm km dm nm kg mg lb lbs oz ft yd mi hr hrs min mins sec secs ms mph kph kmh rpm hz khz mhz ghz ev kev mev gev
    kj kw kwh pa kpa mpa mol ml rad sq unit units deg degs pct usd eur rs
""")
"""Plain words of two or three letters that are units even without white space before them."""

TEXT_COMMANDS = _names("""
    text textbf textit textrm textsf texttt textnormal mbox hbox emph mathrm mathnormal
""")
FONT_COMMANDS = _names("mathbf mathit mathsf boldsymbol bm pmb mathcal mathscr mathfrak boxed fbox")
DECORATIONS = _names("""
    vec hat bar overline dot ddot tilde widehat widetilde overrightarrow overleftarrow underline check
""")
SYMBOLS = _names("""
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi omega
    Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega infty hbar ell emptyset ldots vdots e i partial nabla Re Im
    aleph odot oplus otimes star ast imath jmath circ triangle square angle heartsuit spadesuit clubsuit diamondsuit
    prime dagger lnot top bot wp Box Diamond sharp flat natural
""")
ALIASES = {
    "tg": "tan", "ctg": "cot", "asin": "arcsin", "acos": "arccos", "atan": "arctan", "infinity": "infty", "inf": "infty",
    "oo": "infty", "exponentialE": "e", "imaginaryI": "i", "varphi": "phi", "varepsilon": "epsilon", "vartheta": "theta",
    "O": "emptyset",
}  # fmt: skip

RELATIONS = {
    "=": "=", "<": "<", ">": ">", "le": "<=", "ge": ">=", "ne": "!=", "approx": "~", "in": "in", "equiv": "==",
    "sim": "~", "simeq": "~", "cong": "==", "to": "to", "rightarrow": "to", "notin": "notin", "subset": "subset",
    "subseteq": "subseteq", "implies": "to", "Rightarrow": "to", "approxeq": "~", "propto": "propto",
    "parallel": "parallel", "perp": "perp",
}  # fmt: skip
OPENING = {"(": "(", "[": "[", "lgroup": "(", "lbrack": "[", "lparen": "(", "langle": "<"}
CLOSING = {")": ")", "]": "]", "rgroup": ")", "rbrack": "]", "rparen": ")", "rangle": ">"}
FENCES = {
    "lfloor": ("rfloor", "floor"), "lceil": ("rceil", "ceil"), "ulcorner": ("urcorner", "ceil"),
    "llcorner": ("lrcorner", "floor"), "vert": ("vert", "abs"), "lvert": ("rvert", "abs"), "|": ("|", "abs"),
    "Vert": ("Vert", "norm"), "lVert": ("rVert", "norm"),
}  # fmt: skip
MATRICES = _names("pmatrix bmatrix matrix vmatrix array Bmatrix smallmatrix")
