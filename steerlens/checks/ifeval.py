"""lm-eval's IFEval checkers, imported once and kept offline, silent and deterministic.

What differs from lm-eval, and why, is listed in `registry`. As they come, its checkers fill in missing requirements at random,
download NLTK's data on import, and detect languages with an unseeded sampler.
"""

import functools
import logging
import os
import random
import re
import threading
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from steerlens.checks.text import has_punkt, split_sentences

# Verdicts.


def variants(response: str) -> list[str]:
    """IFEval's variants other than the response itself, without repeats and empty ones."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    texts = cut[1:] + [text.replace("*", "") for text in cut]
    return [text for text in dict.fromkeys(texts) if text.strip()]


def ifeval_accepts(checker: Any, text: str) -> bool:
    try:
        return bool(checker.check_following(text))
    except RecursionError:  # json.loads of a degenerate "[[[[[[": not a document
        return False


# The pieces that lm-eval puts into a regular expression as they are.
_IN_REGEX = {"keyword", "keywords", "forbidden_words", "section_spliter", "postscript_marker"}


# lm-eval has regular expressions of its own for these two.
_POSTSCRIPTS = ("P.S.", "P.P.S")


def checker(instruction_id: str, arguments: Mapping[str, Any]) -> Any:
    """A fresh checker (they keep state), which has been told every requirement and drew none."""
    checker = _registry()[instruction_id](instruction_id)
    literal = {name: _escaped(name, value) if name in _IN_REGEX else value for name, value in arguments.items()}
    letter = literal.get("letter", "a").lower()
    if not ("a" <= letter <= "z"):
        literal["letter"] = "a"
    checker.build_description(**literal)
    if "letter" in literal:
        checker._letter = letter  # the only way past the random letter that replaces "#" or "é"
    return checker


def _escaped(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_whole_word(word) if name == "forbidden_words" else re.escape(word) for word in value]
    text = value.strip()
    return text if text in _POSTSCRIPTS else re.escape(text)


def _whole_word(word: str) -> str:
    # lm-eval looks for \bWORD\b, and there is no \b between "C++" and a space. The outer alternatives never match: they
    # take up the two \b, and leave the middle one to say that no letter stands beside the word.
    escaped = re.escape(word)
    plain = all(re.match(r"[\w\s]", edge) for edge in (word[0], word[-1]))
    return escaped if plain else rf"(?!)|(?<!\w){escaped}(?!\w)|(?!)"


# lm-eval, imported once and kept offline, silent and deterministic.

_IMPORT_LOCK = threading.Lock()


def _registry() -> Mapping[str, Any]:
    with _IMPORT_LOCK:  # a cache alone lets two threads that come at once both import and patch
        return _import_registry()


@functools.cache
def _import_registry() -> Mapping[str, Any]:
    with warnings.catch_warnings(), _random_state():  # importing nltk draws from the global generator
        warnings.simplefilter("ignore")
        import langdetect.detector_factory
        import pysbd  # noqa: F401 (here, since its patterns warn of bad escapes where Python first compiles them)

        # Ranks other than 0 leave it to rank 0 to download punkt_tab, when they import instructions_util.
        with _environment("LOCAL_RANK", "1"):
            from lm_eval.tasks.ifeval import instructions, instructions_registry, instructions_util
        # Its profiles, which `_detect_language` takes for loaded: langdetect shows other threads a factory that it still fills.
        langdetect.detector_factory.init_factory()
    # Only names inside lm-eval's two IFEval modules are replaced; nltk, langdetect and logging stay as they are.
    instructions.langdetect = types.SimpleNamespace(
        detect=_detect_language, LangDetectException=langdetect.LangDetectException
    )
    instructions.logger = logging.Logger("steerlens.ifeval", level=logging.CRITICAL + 1)
    # What NLTK's RegexpTokenizer did before 3.10.
    instructions_util.count_words = lambda text: len(re.findall(r"\w+", text))
    if not has_punkt():
        nltk = instructions_util.nltk
        # NLTK splits "IT'S." into IT, 'S and a point at the end of a sentence only.
        instructions_util.nltk = types.SimpleNamespace(
            tokenize=nltk.tokenize,
            word_tokenize=lambda text: [
                word for part in split_sentences(text) for word in nltk.word_tokenize(part, preserve_line=True)
            ],
        )
        splitter = types.SimpleNamespace(tokenize=split_sentences)
        instructions_util._get_sentence_tokenizer = lambda: splitter
    registry: Mapping[str, Any] = instructions_registry.INSTRUCTION_DICT
    return registry


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextmanager
def _random_state() -> Iterator[None]:
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def _detect_language(text: str) -> str:
    from langdetect import detector_factory

    # A detector of our own, since its seed is otherwise that of the whole process: DetectorFactory.seed.
    detector = detector_factory._factory.create()
    detector.seed = 0
    detector.append(text)
    language: str = detector.detect()
    return language
