"""Sentences: how a text is split where NLTK's punkt_tab data are not installed."""

import functools
import importlib.metadata
import importlib.resources
from itertools import pairwise


def sentence_splitter() -> str:
    """What splits sentences in this process: "nltk punkt_tab" as in IFEval, or "pysbd VERSION" where it is absent.

    >>> sentence_splitter().split()[0] in ("nltk", "pysbd")
    True
    """
    return "nltk punkt_tab" if has_punkt() else f"pysbd {importlib.metadata.version('pysbd')}"


@functools.cache
def has_punkt() -> bool:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        return False
    return True


PLACEHOLDERS = "ƪȸȹᓰᓱᓳᓴᓷᓸ∮∯⌬⎋☄☇☈☉☏☝♝♟♨♬♭✂"
"""What pysbd writes in the place of points, brackets and quotes while it works; in a text they would be taken for these."""


_STAND_INS = str.maketrans({sign: "ɐ" if sign.isalpha() else "✶" for sign in PLACEHOLDERS})


def split_sentences(text: str) -> list[str]:
    """The sentences of an English text, by pysbd; line breaks do not end one. Every sign of the text is in one of them."""
    import pysbd

    # A new segmenter each time, since it keeps the text. Line breaks end a sentence in pysbd, but not in Punkt.
    # It may change or drop signs, so only its places are taken, and a stand-in is one sign for one.
    line = " ".join(text.split())
    found = pysbd.Segmenter(language="en", clean=False, char_span=True).segment(line.translate(_STAND_INS))
    ends = [*(sentence.start for sentence in found[1:]), len(line)]
    return [line[start:end] for start, end in pairwise([0, *ends])] if found else []
