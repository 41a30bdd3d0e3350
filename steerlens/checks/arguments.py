"""The arguments of IFEval's 25 checks: which each takes, what is a value of it, and what to say where one is not."""

import difflib
import functools
import math
import numbers
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LANGUAGE = "language:response_language"
"""IFEval's name of the check that every language shares."""

# Arguments: what each checker reads.


@dataclass(frozen=True)
class Argument:
    expected: str
    """What a value must be, for messages."""
    read: Callable[[Any], Any]
    """The value as the checker wants it, or None to refuse it."""
    hint: Callable[[Any], str] | None = None
    """How to mend a value that was refused; None: nothing to add."""


def _integer(value: Any, *, least: int | None = None) -> int | None:
    # pandas and Arrow turn a column of integers with gaps into floats, hence 3.0; a bool is an int to Python only.
    if isinstance(value, bool):
        return None
    if isinstance(value, numbers.Integral):
        number = int(value)
    elif (real := _number(value)) is not None and real.is_integer():
        number = int(real)
    else:
        return None
    return number if least is None or number >= least else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _texts(value: Any) -> list[str] | None:
    if not isinstance(value, list | tuple) or not value:
        return None
    return None if any(_text(item) is None for item in value) else list(value)


def _character(value: Any) -> str | None:
    # The checker lowers the letter, and some become two then, as the Turkish capital dotted I does.
    return value if isinstance(value, str) and len(value.strip()) == len(value.lower()) == 1 else None


_RELATIONS = ("less than", "at least")


# What lm-eval's checker accepts (instructions_util.LANGUAGE_CODES; a test compares them). All have a profile in langdetect.
# fmt: off
LANGUAGES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "de": "German", "en": "English", "es": "Spanish",
    "fa": "Persian", "fi": "Finnish", "fr": "French", "gu": "Gujarati", "he": "Hebrew", "hi": "Hindi", "it": "Italian",
    "ja": "Japanese", "kn": "Kannada", "ko": "Korean", "ml": "Malayalam", "mr": "Marathi", "ne": "Nepali",
    "pa": "Punjabi", "pl": "Polish", "pt": "Portuguese", "ru": "Russian", "sw": "Swahili", "ta": "Tamil",
    "te": "Telugu", "th": "Thai", "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese",
}


# fmt: on


def _nearest_language(value: Any) -> str:
    """The code that a name ("German"), a regional code ("pt-BR") or a slip ("de ") stands for, where one is near."""
    asked = re.split("[-_]", str(value).strip().casefold())[0]
    codes = {name.casefold(): code for code, name in LANGUAGES.items()} | {code: code for code in LANGUAGES}
    close = difflib.get_close_matches(asked, codes, n=1, cutoff=0.6)
    hint = f"did you mean {codes[close[0]]!r} ({LANGUAGES[codes[close[0]]]})? " if close else ""
    return f"{hint}IFEval detects {', '.join(LANGUAGES)}"


def _one_of(choices: tuple[str, ...]) -> Argument:
    return Argument(f"one of {', '.join(choices)}", lambda value: value if value in choices else None)


_INTEGER = Argument("an integer >= 0", functools.partial(_integer, least=0))


_POSITION = Argument("an integer >= 1", functools.partial(_integer, least=1))


_TEXT = Argument("a text that is not empty", _text)


_TEXTS = Argument("a list of texts, not empty", _texts)


_CHARACTER = Argument("a single character", _character)


_RELATION = _one_of(_RELATIONS)


_LANGUAGE = Argument(
    "a language's code",
    lambda value: value if isinstance(value, str) and value in LANGUAGES else None,
    _nearest_language,
)


ARGUMENTS: dict[str, dict[str, Argument]] = {
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
    LANGUAGE: {"language": _LANGUAGE},
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


# Checks of one's own.

TYPES: dict[Any, Argument] = {
    str: Argument("a text", lambda value: value if isinstance(value, str) else None),
    int: Argument("an integer", _integer),
    float: Argument("a finite number", _number),
    bool: Argument("True or False", lambda value: value if isinstance(value, bool) else None),
    list[str]: _TEXTS,
}
