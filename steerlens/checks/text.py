"""Sentences: how a text is split where NLTK's punkt_tab data are not installed."""

import functools
import importlib.metadata
import importlib.resources


def sentence_splitter() -> str:
    """What splits sentences in this process: "nltk punkt_tab" as in IFEval, or "pysbd VERSION" where it is absent."""
    return "nltk punkt_tab" if has_punkt() else f"pysbd {importlib.metadata.version('pysbd')}"


@functools.cache
def has_punkt() -> bool:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        return False
    return True


def split_sentences(text: str) -> list[str]:
    """The sentences of an English text, by pysbd; line breaks do not end one."""
    import pysbd

    # A new segmenter each time, since it keeps the text. Line breaks end a sentence in pysbd, but not in Punkt.
    sentences: list[str] = pysbd.Segmenter(language="en", clean=False).segment(" ".join(text.split()))
    return sentences
