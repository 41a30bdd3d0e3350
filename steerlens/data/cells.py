"""What stands in a cell of a table, or in a call from a notebook: texts, lists, numbers and nothing, each in several types.

Rows of pandas and of Arrow say "nothing" as None, nan or NA, lists as arrays, and numbers in NumPy's types. Here they become
Python's own, once, so that equal content is equal everywhere.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any

from steerlens.errors import DataError

Text = str | float | None
"""A text as a cell holds it; nan, which pandas has for "nothing", is a float."""


def absent(value: Any) -> bool:
    """Whether a cell of a table is empty: None, nan, or pandas' NA."""
    # pandas' types by their names: a set of pairs is made without importing pandas.
    return (
        value is None
        or type(value).__name__ in ("NAType", "NaTType")
        or (isinstance(value, Real) and bool(value != value))
    )


def text_of(value: Any, what: str) -> str | None:
    """A text in Python's own type; None where it is absent.

    Raises:
        DataError: if it is no text, or no Unicode.
    """
    if absent(value):
        return None
    if not isinstance(value, str):
        raise DataError(f"{what} must be a text, got {value!r} ({type(value).__name__})")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} must be Unicode text, and sign {error.start} of {value!r} is half of a surrogate pair, which no "
            'tokenizer takes; mend the text, or drop it with text.encode(errors="ignore").decode()'
        ) from error
    return str(value)  # of NumPy's text, too


def listed(values: Any) -> tuple[Any, ...]:
    """One or several of something, as they stand in a call or in a cell of a table."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if absent(values):
        return ()
    return (values,) if isinstance(values, str | Mapping) else tuple(values)


def arguments_of(values: Any) -> dict[str, Any]:
    """A check's arguments without absent ones, in Python's own types.

    Raises:
        DataError: if they are no dict.
    """
    values = {} if absent(values) else values
    if not isinstance(values, Mapping):
        raise DataError(f"kwargs must be a dict of arguments for each id, got {values!r} ({type(values).__name__})")
    return {name: own for name, value in values.items() if not absent(own := own_types(value))}


def own_types(value: Any) -> Any:
    """A cell in Python's own types: NumPy's arrays are lists, and its numbers plain ones."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return [own_types(item) for item in value]
    if isinstance(value, Mapping):
        return {name: own_types(item) for name, item in value.items()}
    return text_of(value, "a value") if isinstance(value, str) else value
