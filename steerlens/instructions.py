"""Format instructions and the check that says "followed".

The twelve format instructions of Stolfo et al., "Improving Instruction-Following in Language Models through
Activation Steering" (ICLR 2025), as a catalogue of phrasings and arguments, and the verdict on a response for each
of IFEval's 25 instruction types (Zhou et al., "Instruction-Following Evaluation for Large Language Models", 2023):

    strict(y) = the checker accepts y
    loose(y)  = the checker accepts any of eight variants of y: {y, y without its first line, without its last line,
                without both} x {as it is, asterisks removed}

An empty response, or an empty variant, never follows. The checkers are those of lm-eval's registry; they are imported
on the first check, because that takes seconds. They run offline and always give one text the same answer:

* Every argument that a checker reads is required. lm-eval draws a random requirement where one is missing.
* `langdetect` is seeded at every call. A text without any letters counts as being in the right language, as in IFEval.
* Words that IFEval puts into regular expressions match literally ("C++"); for plain words that changes nothing.
* `keywords:letter_frequency` counts the character asked for, also "#" and "!" (two IFEval prompts), for which lm-eval
  draws a random letter.
* Where NLTK's `punkt_tab` is not installed, pysbd splits the sentences (line breaks do not end one, as in Punkt) and
  words are tokenized without splitting first. `sentence_splitter()` says which; counts may differ by a sentence.

A check sees format only: it does not say whether the response answers the query, or makes sense.
"""

import functools
import importlib.metadata
import importlib.resources
import json
import logging
import numbers
import os
import random
import re
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from steerlens.errors import SteerlensError, nearest


@dataclass(frozen=True)
class Instruction:
    """A format instruction in several wordings, for example `format_instructions()["punctuation:no_comma"]`."""

    id: str
    """IFEval's name of the instruction type."""
    title: str
    """Short label for figures."""
    phrasings: tuple[str, ...]
    """Ways to ask for it. Each states all that the checker requires, with an {argument} for each name in `arguments`."""
    arguments: Mapping[str, tuple[Any, ...]]
    """The choices for each argument of the checker, under lm-eval's names."""

    def render(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
        """One wording with arguments filled in, and the arguments to check it with.

        >>> text, kwargs = format_instructions()["punctuation:no_comma"].render(random.Random(0))
        """
        kwargs = {name: rng.choice(choices) for name, choices in self.arguments.items()}
        return rng.choice(self.phrasings).format(**kwargs), kwargs


@dataclass(frozen=True)
class CheckResult:
    """Whether one response follows one instruction."""

    strict: bool
    """The response as it stands follows."""
    loose: bool
    """One of its eight variants follows (see the module's docstring); True whenever `strict` is."""


@functools.cache
def format_instructions() -> Mapping[str, Instruction]:
    """The twelve format instructions of Stolfo et al. by IFEval id, read-only, in the catalogue's order.

    `capital_word_frequency` only asks for "at least" so many words: "less than" asks for the opposite behaviour, and
    the mean over both would point nowhere.
    """
    file = importlib.resources.files("steerlens") / "bundled" / "instructions.json"
    catalogue = {
        entry["id"]: Instruction(
            id=entry["id"],
            title=entry["title"],
            phrasings=tuple(entry["phrasings"]),
            arguments={name: tuple(choices) for name, choices in entry["arguments"].items()},
        )
        for entry in json.loads(file.read_text(encoding="utf-8"))
    }
    return types.MappingProxyType(catalogue)


def instruction_types() -> tuple[str, ...]:
    """The 25 IFEval ids that `check` knows, sorted."""
    return tuple(sorted(_ARGUMENTS))


def check(
    response: str, instruction_id: str, kwargs: Mapping[str, Any] | None = None, *, prompt: str = ""
) -> CheckResult:
    """Whether `response` follows the instruction, strictly and loosely, as IFEval judges it.

    Args:
        kwargs: The checker's arguments under lm-eval's names. All that it reads are required; None counts as absent.
        prompt: The request. None of the 25 checkers reads it: what `combination:repeat_prompt` compares with is its
            argument `prompt_to_repeat`, the request without the instruction to repeat it.

    Raises:
        SteerlensError: for an unknown id, or an argument that is missing, unknown or of the wrong type.

    >>> check("no capitals here, as you asked me.", "change_case:english_lowercase")
    CheckResult(strict=True, loose=True)
    """
    if not isinstance(response, str):
        raise SteerlensError(f"a response must be text, got {response!r} ({type(response).__name__})")
    checker = _checker(instruction_id, check_arguments(instruction_id, kwargs))
    strict = _follows(checker, response)
    return CheckResult(strict, strict or any(_follows(checker, text) for text in _variants(response)))


def check_all(
    response: str, instruction_ids: Sequence[str], kwargs: Sequence[Mapping[str, Any]], *, prompt: str = ""
) -> list[CheckResult]:
    """The verdict for each of a prompt's instructions, in their order.

    The prompt's own verdict is their conjunction, strict with strict and loose with loose.
    """
    if isinstance(instruction_ids, str) or len(instruction_ids) != len(kwargs):
        raise SteerlensError(
            f"check_all needs one dict of arguments per instruction id, got ids {instruction_ids!r} and "
            f"{len(kwargs)} dicts; pass {{}} for an instruction without arguments"
        )
    return [
        check(response, name, arguments, prompt=prompt) for name, arguments in zip(instruction_ids, kwargs, strict=True)
    ]


def check_arguments(instruction_id: str, kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arguments as the checker needs them (3.0 becomes 3, None is dropped). Does not import lm-eval.

    Raises:
        SteerlensError: for an unknown id, or an argument that is missing, unknown or of the wrong type.
    """
    if instruction_id not in _ARGUMENTS:
        raise SteerlensError(
            f"unknown instruction id {instruction_id!r}; {nearest(instruction_id, instruction_types())}"
        )
    needed = _ARGUMENTS[instruction_id]
    given = {name: value for name, value in (kwargs or {}).items() if value is not None}
    if unknown := sorted(given.keys() - set(needed)):
        accepted = ", ".join(needed) or "no arguments"
        raise SteerlensError(f"{instruction_id} takes {accepted}; got {unknown[0]}={given[unknown[0]]!r}; remove it")
    values = {name: _read_argument(instruction_id, name, given.get(name)) for name in needed}
    if "nth_paragraph" in values and values["nth_paragraph"] > values["num_paragraphs"]:
        raise SteerlensError(
            f"{instruction_id} needs nth_paragraph in [1, num_paragraphs]; got {values['nth_paragraph']} of "
            f"{values['num_paragraphs']}; paragraphs count from one"
        )
    return values


def sentence_splitter() -> str:
    """What splits sentences in this process: "nltk punkt_tab" as in IFEval, or "pysbd VERSION" where it is absent."""
    return "nltk punkt_tab" if _has_punkt() else f"pysbd {importlib.metadata.version('pysbd')}"


# Arguments: what each checker reads. A reader returns the value as the checker wants it, or None to refuse it.


def _integer(value: Any, *, least: int) -> int | None:
    # pandas and Arrow turn a column of integers with gaps into floats, hence 3.0; a bool is an int to Python only.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    number = float(value)
    return int(number) if number.is_integer() and number >= least else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _texts(value: Any) -> list[str] | None:
    if not isinstance(value, list | tuple) or not value:
        return None
    return None if any(_text(item) is None for item in value) else list(value)


def _character(value: Any) -> str | None:
    return value if isinstance(value, str) and len(value.strip()) == len(value.lower()) == 1 else None


_RELATIONS = ("less than", "at least")

# The codes that lm-eval's checker accepts (instructions_util.LANGUAGE_CODES; a test compares them).
# fmt: off
_LANGUAGES = (
    "ar", "bg", "bn", "de", "en", "es", "fa", "fi", "fr", "gu", "he", "hi", "it", "ja", "kn", "ko", "ml", "mr", "ne",
    "pa", "pl", "pt", "ru", "sw", "ta", "te", "th", "uk", "ur", "vi",
)
# fmt: on


def _one_of(choices: tuple[str, ...]) -> tuple[str, Callable[[Any], Any]]:
    return f"one of {', '.join(choices)}", lambda value: value if value in choices else None


_INTEGER = "an integer >= 0", functools.partial(_integer, least=0)
_POSITION = "an integer >= 1", functools.partial(_integer, least=1)
_TEXT = "a text that is not empty", _text
_TEXTS = "a list of texts, not empty", _texts
_CHARACTER = "a single character", _character
_RELATION = _one_of(_RELATIONS)

_ARGUMENTS: dict[str, dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "change_case:capital_word_frequency": {"capital_frequency": _INTEGER, "capital_relation": _RELATION},
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "combination:repeat_prompt": {"prompt_to_repeat": _TEXT},
    "combination:two_responses": {},
    "detectable_content:number_placeholders": {"num_placeholders": _INTEGER},
    "detectable_content:postscript": {"postscript_marker": _TEXT},
    "detectable_format:constrained_response": {},
    "detectable_format:json_format": {},
    "detectable_format:multiple_sections": {"section_spliter": _TEXT, "num_sections": _INTEGER},
    "detectable_format:number_bullet_lists": {"num_bullets": _INTEGER},
    "detectable_format:number_highlighted_sections": {"num_highlights": _INTEGER},
    "detectable_format:title": {},
    "keywords:existence": {"keywords": _TEXTS},
    "keywords:forbidden_words": {"forbidden_words": _TEXTS},
    "keywords:frequency": {"keyword": _TEXT, "frequency": _INTEGER, "relation": _RELATION},
    "keywords:letter_frequency": {"letter": _CHARACTER, "let_frequency": _INTEGER, "let_relation": _RELATION},
    "language:response_language": {"language": _one_of(_LANGUAGES)},
    "length_constraints:nth_paragraph_first_word": {
        "num_paragraphs": _INTEGER,
        "nth_paragraph": _POSITION,
        "first_word": _TEXT,
    },
    "length_constraints:number_paragraphs": {"num_paragraphs": _INTEGER},
    "length_constraints:number_sentences": {"num_sentences": _INTEGER, "relation": _RELATION},
    "length_constraints:number_words": {"num_words": _INTEGER, "relation": _RELATION},
    "punctuation:no_comma": {},
    "startend:end_checker": {"end_phrase": _TEXT},
    "startend:quotation": {},
}


def _read_argument(instruction_id: str, name: str, value: Any) -> Any:
    expected, read = _ARGUMENTS[instruction_id][name]
    if (read_value := read(value)) is None:
        came = "nothing" if value is None else f"{value!r} ({type(value).__name__})"
        raise SteerlensError(f"{instruction_id} needs {name}: {expected}; got {came}; put {name} into kwargs")
    return read_value


# Verdicts.


def _variants(response: str) -> list[str]:
    """IFEval's variants other than the response itself, without repeats."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return list(dict.fromkeys(cut[1:] + [text.replace("*", "") for text in cut]))


def _follows(checker: Any, text: str) -> bool:
    try:
        return bool(text.strip()) and bool(checker.check_following(text))
    except RecursionError:  # json.loads of a degenerate "[[[[[[": not a document
        return False


# The pieces that lm-eval puts into a regular expression as they are.
_IN_REGEX = {"keyword", "keywords", "forbidden_words", "section_spliter", "postscript_marker"}
# lm-eval has regular expressions of its own for these two.
_POSTSCRIPTS = ("P.S.", "P.P.S")


def _checker(instruction_id: str, arguments: Mapping[str, Any]) -> Any:
    """A fresh checker (they keep state), which has been told every requirement and drew none."""
    checker = _registry()[instruction_id](instruction_id)
    literal = {name: _escaped(value) if name in _IN_REGEX else value for name, value in arguments.items()}
    letter = literal.get("letter", "a").lower()
    if not ("a" <= letter <= "z"):
        literal["letter"] = "a"
    checker.build_description(**literal)
    if "letter" in literal:
        checker._letter = letter  # the only way past the random letter that replaces "#" or "é"
    return checker


def _escaped(value: Any) -> Any:
    if isinstance(value, list):
        return [re.escape(word) for word in value]
    text = value.strip()
    return text if text in _POSTSCRIPTS else re.escape(text)


# lm-eval, imported once and kept offline, silent and deterministic.

_IMPORT_LOCK = threading.Lock()


def _registry() -> Mapping[str, Any]:
    with _IMPORT_LOCK:
        return _import_registry()


@functools.cache
def _import_registry() -> Mapping[str, Any]:
    with warnings.catch_warnings(), _random_state():  # importing nltk draws from the global generator
        warnings.simplefilter("ignore")
        import langdetect.detector_factory
        import pysbd  # noqa: F401

        # Ranks other than 0 leave it to rank 0 to download punkt_tab, when they import instructions_util.
        with _environment("LOCAL_RANK", "1"):
            from lm_eval.tasks.ifeval import instructions, instructions_registry, instructions_util
        langdetect.detector_factory.init_factory()
    # Only names inside lm-eval's two IFEval modules are replaced; nltk, langdetect and logging stay as they are.
    instructions.langdetect = types.SimpleNamespace(
        detect=_detect_language, LangDetectException=langdetect.LangDetectException
    )
    instructions.logger = logging.Logger("steerlens.ifeval", level=logging.CRITICAL + 1)
    if not _has_punkt():
        nltk = instructions_util.nltk
        instructions_util.nltk = types.SimpleNamespace(
            tokenize=nltk.tokenize, word_tokenize=functools.partial(nltk.word_tokenize, preserve_line=True)
        )
        splitter = types.SimpleNamespace(tokenize=_split_sentences)
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


@functools.cache
def _has_punkt() -> bool:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        return False
    return True


def _detect_language(text: str) -> str:
    from langdetect import detector_factory

    detector = detector_factory._factory.create()
    detector.seed = 0
    detector.append(text)
    language: str = detector.detect()
    return language


def _split_sentences(text: str) -> list[str]:
    import pysbd

    # A new segmenter each time, since it keeps the text. Line breaks end a sentence in pysbd, but not in Punkt.
    sentences: list[str] = pysbd.Segmenter(language="en", clean=False).segment(" ".join(text.split()))
    return sentences
