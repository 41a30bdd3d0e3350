"""The formulas of notebooks, $...$ and $$...$$, as MathML, which browsers draw without a script or a font of ours.

What LaTeX can do besides is refused by name: a formula is never shown half read.
"""

# ruff: noqa: RUF001, SIM905 - signs are meant as they are, and their names read best in a row
import re
from collections.abc import Iterator

GREEK = "alpha beta gamma delta epsilon lambda mu pi rho sigma theta phi Delta ell infty".split()
SYMBOLS = dict(zip(GREEK, "αβγδελμπρσθφΔℓ∞", strict=True))
SIGNS = dict(
    zip(
        "cdot times sum prod leftarrow rightarrow to mapsto approx neq ne le leq ge geq in pm lVert rVert | mid lvert rvert "
        "langle rangle sim odot { } parallel perp top ldots dots cdots".split(),
        "⋅×∑∏←→→↦≈≠≠≤≤≥≥∈±‖‖‖|||⟨⟩∼⊙{}∥⊥⊤……⋯",
        strict=True,
    )
)
NAMES = {"min", "max", "arg", "exp", "log", "cos", "sin", "softmax", "Pr", "var"}
OVER = {"hat": "^", "bar": "¯", "tilde": "~", "vec": "→"}
SPACES = {",": "0.17em", ";": "0.28em", " ": "0.25em", "quad": "1em", "!": "0em", ":": "0.22em"}
WEIGHTS = {"mathbf": "bold", "mathrm": "normal", "operatorname": "normal"}

TOKEN = re.compile(r"\\text\{[^{}]*\}|\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|[^\s]")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", flags=re.DOTALL)
FORMULA = re.compile(
    r"\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^$\s](?:[^$\n]*[^$\s])?)\$(?![\w$])", flags=re.DOTALL
)


def with_formulas(markdown: str) -> str:
    """Markdown with its formulas as MathML; code is left alone."""
    parts = CODE.split(markdown)
    parts[::2] = [FORMULA.sub(_replaced, part) for part in parts[::2]]
    return "".join(parts)


def _replaced(found: re.Match[str]) -> str:
    return mathml(found["block"] or found["inline"], block=bool(found["block"]))


def mathml(formula: str, *, block: bool = False) -> str:
    """A formula as MathML.

    Raises:
        ValueError: for a command that is not known here, or braces that do not match.

    >>> mathml("h_i^2")
    '<math><mrow><msubsup><mi>h</mi><mi>i</mi><mn>2</mn></msubsup></mrow></math>'
    """
    tokens = iter(TOKEN.findall(formula))
    try:
        content = _row(tokens, end=None)
    except StopIteration:
        raise ValueError(f"a formula must be whole, got {formula!r}; something is missing at its end") from None
    except ValueError as error:
        raise ValueError(f"{error}, in the formula {formula!r}") from None
    display = ' display="block"' if block else ""
    return f"<math{display}>{content}</math>"


def _row(tokens: Iterator[str], end: str | None) -> str:
    """Atoms with their scripts, up to the closing token."""
    atoms: list[list[str]] = []  # base, subscript, superscript
    for token in tokens:
        if token == end:
            break
        if token in "_^" and atoms:
            atoms[-1]["_^".index(token) + 1] = _atom(next(tokens), tokens)
        elif token not in (r"\left", r"\right"):
            atoms.append([_atom(token, tokens), "", ""])
    else:
        if end is not None:
            raise ValueError(f"a group must end in {end!r}")
    return f"<mrow>{''.join(map(_scripted, atoms))}</mrow>"


def _scripted(atom: list[str]) -> str:
    base, below, above = atom
    limits = base in ("<mo>∑</mo>", "<mo>∏</mo>")
    kind = {
        (True, True): ("msubsup", "munderover"),
        (True, False): ("msub", "munder"),
        (False, True): ("msup", "mover"),
    }
    if not below and not above:
        return base
    name = kind[bool(below), bool(above)][limits]
    return f"<{name}>{base}{below}{above}</{name}>"


def _atom(token: str, tokens: Iterator[str]) -> str:
    if token == "{":
        return _row(tokens, end="}")
    if token.startswith(r"\text{"):
        return f"<mtext>{token[6:-1]}</mtext>"
    if not token.startswith("\\"):
        kind = "mn" if token[0].isdigit() else "mi" if token.isalpha() else "mo"
        shown = {"-": "−", "*": "∗", "<": "&lt;", ">": "&gt;", "&": "&amp;", "'": "′"}.get(token, token)
        return f"<{kind}>{shown}</{kind}>"
    name = token[1:]
    if name == "frac":
        return f"<mfrac>{_atom(next(tokens), tokens)}{_atom(next(tokens), tokens)}</mfrac>"
    if name == "sqrt":
        return f"<msqrt>{_atom(next(tokens), tokens)}</msqrt>"
    if name in OVER:
        return f'<mover accent="true">{_atom(next(tokens), tokens)}<mo>{OVER[name]}</mo></mover>'
    if name in WEIGHTS:
        return (
            f'<mstyle style="font-weight: {WEIGHTS[name]}; font-style: normal">{_atom(next(tokens), tokens)}</mstyle>'
        )
    if name in SPACES:
        return f'<mspace width="{SPACES[name]}"></mspace>'
    if name in SYMBOLS or name in NAMES:
        return f"<mi>{SYMBOLS.get(name, name)}</mi>"
    if name in SIGNS:
        return f"<mo>{SIGNS[name]}</mo>"
    raise ValueError(f"a command of a formula must be a known one, got {token!r}; add it to docs/formulas.py")
