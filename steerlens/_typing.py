"""Names and numbers that the command line shares with the library; imports nothing heavy.

Numbers come from notebooks: NumPy's, pandas' and PyTorch's scalars and arrays are taken at every public boundary and become
Python's own there, so that a layer, coefficient or seed is hashed, compared and written the same wherever it came from.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, TypeAlias, get_args

from steerlens.errors import SteerlensError

Operator = Literal["add", "set_projection", "ablate"]
"""What is done to a residual; see `operators`."""
OPERATORS: tuple[Operator, ...] = get_args(Operator)

AttentionOperator = Literal["bias", "scale", "mass"]
"""What is done to attention scores; see `interventions.AttentionIntervention`."""
ATTENTION_OPERATORS: tuple[AttentionOperator, ...] = get_args(AttentionOperator)

RuleName = Literal["all", "prompt", "generated", "last"]
"""Which positions are steered; see `positions`."""

Unit = Literal["absolute", "resid_norm"]
"""Of the coefficient of `add`: a length, or a multiple of the layer's mean residual norm."""
UNITS: tuple[Unit, ...] = get_args(Unit)

Style = Literal["auto", "chat", "plain"]
"""How a prompt becomes what the model reads; see `prompts.PromptFormat`."""
Gate = Literal["degenerate", "low_perplexity", "no_low_perplexity"]
"""What makes a candidate of a search too broken to be chosen; see `sweeps`."""

if TYPE_CHECKING:
    WholeNumber: TypeAlias = int
    RealNumber: TypeAlias = float
else:
    # Signatures are checked against these while tests run, and NumPy's integers are no `int`.
    WholeNumber = RealNumber = SupportsFloat
"""What is kept as an int or a float, and may come as a number of NumPy, pandas or PyTorch."""


def plain(value: Any) -> Any:
    """A scalar, array, series or tensor as Python's numbers and lists; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def whole(value: Any, name: str) -> int:
    """A layer, seed or count as a Python int; a whole float, as pandas makes of integers beside missing ones, is one.

    Raises:
        SteerlensError: for anything else, truth values among it.

    >>> whole(3.0, "layer")
    3
    """
    number = plain(value)
    # A bool is an int to Python. Nan and infinity differ from what `// 1` leaves of them.
    if isinstance(number, bool) or not isinstance(number, int | float) or number != number // 1:
        raise SteerlensError(f"{name} must be a whole number, got {value!r}; give an integer such as 3")
    return int(number)


def real(value: Any, name: str) -> float:
    """A coefficient or target as a Python float; minus zero is zero.

    Raises:
        SteerlensError: for what is no number, a truth value among it, and for nan and infinity.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < float("inf"):  # nor nan
        raise SteerlensError(f"{name} must be a finite number, got {value!r}; give one such as 1.5")
    return float(number) + 0.0  # -0.0 equals 0.0, but is written, and so hashed, in another way


def several(values: Any) -> list[Any]:
    """One value or any number of them, in an array, series, set or range, as a list; a text is one value.

    >>> several(range(2)), several("all")
    ([0, 1], ['all'])
    """
    values = plain(values)
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]


def whole_numbers(values: Any, name: str) -> list[int]:
    """One whole number or several as a list of ints.

    Raises:
        SteerlensError: if one is not whole.
    """
    return [whole(value, name) for value in several(values)]


def real_numbers(values: Any, name: str) -> list[float]:
    """One number or several as a list of floats.

    Raises:
        SteerlensError: if one is no finite number.
    """
    return [real(value, name) for value in several(values)]
