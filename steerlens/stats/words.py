"""How a response reads: its words, and how much of it repeats.

Repetition is the share of word n-grams that occurred before in the same text, `1 - distinct / all` (seq-rep-n of Welleck et al.
2020, arXiv 1908.04319); distinct-n is `distinct / all` (Li et al. 2016, arXiv 1510.03055). Words are compared without regard to
case. A text can be free of repetition and still be nonsense, and short texts repeat less than long ones.
"""

import re
from collections.abc import Hashable, Sequence

from steerlens.errors import SteerlensError

# Thai, Lao, Burmese, Khmer, kana and CJK ideographs are written without spaces: there, a character is a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"


WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text: what stands between white space, or each character where words are not spaced."""
    return WORD.findall(text)


def distinct_share(items: Sequence[Hashable], n: int) -> float:
    """Distinct n-grams / all n-grams of a sequence, in (0, 1]; nan for fewer than `n` items."""
    if n < 1:
        raise SteerlensError(f"n must be at least 1, got {n}; 2 counts pairs")
    grams = [tuple(items[start : start + n]) for start in range(len(items) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def distinct_n(text: str, n: int = 2) -> float:
    """Distinct word n-grams / all word n-grams, in (0, 1]; nan for fewer than `n` words.

    Args:
        n: words per n-gram.

    Raises:
        SteerlensError: if n is below 1.

    Example:
        >>> distinct_n("rain and rain and rain")
        0.5
    """
    return distinct_share(words(text.casefold()), n)


def repetition(text: str, n: int = 3) -> float:
    """The share of word n-grams that repeat an earlier one, in [0, 1); nan for fewer than `n` words.

    Args:
        n: words per n-gram.

    Raises:
        SteerlensError: if n is below 1.

    Example:
        >>> repetition("one two three four")
        0.0
    """
    return 1.0 - distinct_n(text, n)
