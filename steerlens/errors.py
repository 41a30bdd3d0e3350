"""Errors that steerlens raises on bad input.

Each message states the rule, what came, and the usual fix. They are `ValueError`s, so notebooks that catch those keep
working; the command line turns them into one sentence and exit code 2.
"""

import difflib
from collections.abc import Iterable


class SteerlensError(ValueError):
    """Bad input to steerlens."""


class DataError(SteerlensError):
    """A file, pair set or table that breaks its contract."""


class ModelError(SteerlensError):
    """A model that cannot be found, loaded or steered as asked."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence for error messages: the closest known name, then all of them."""
    choices = list(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(choices)}"
