"""Format instructions and the check that says "followed".

The twelve format instructions of Stolfo et al., "Improving Instruction-Following in Language Models through
Activation Steering" (ICLR 2025), as a catalogue of phrasings and arguments, and the verdict on a response for each
of IFEval's 25 instruction types (Zhou et al., "Instruction-Following Evaluation for Large Language Models", 2023):

    strict(y) = the checker accepts y
    loose(y)  = the checker accepts any of eight variants of y: {y, y without its first line, without its last line,
                without both} x {as it is, asterisks removed}

An empty response, or an empty variant, never follows. The checkers are those of lm-eval's registry; they are imported
on the first check of theirs, because that takes seconds. They run offline and always give one text the same answer:

* Every argument that a checker reads is required. lm-eval draws a random requirement where one is missing.
* `langdetect` is seeded at every call. A text without any letters counts as being in the right language, as in IFEval.
* Words that IFEval puts into regular expressions match literally ("C++"); for plain words that changes nothing. A
  forbidden word is looked for as a whole word also where it starts or ends with another sign than a letter or a digit.
* `keywords:letter_frequency` counts the character asked for, also "#" and "!" (two IFEval prompts), for which lm-eval
  draws a random letter.
* Where NLTK's `punkt_tab` is not installed, pysbd splits the sentences (line breaks do not end one, as in Punkt), also
  before words are tokenized. `sentence_splitter()` says which; counts may differ by a sentence.
* Words are what Python's `re` takes for runs of letters, as in IFEval; NLTK from 3.10 on keeps Indic words in one piece.

`register_check` adds checks of one's own, which are judged strictly and loosely in the same way.

A check sees format only: it does not say whether the response answers the query, or makes sense.
"""

import difflib
import functools
import importlib.metadata
import importlib.resources
import inspect
import json
import logging
import math
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
from typing import Any, TypeVar

from steerlens.errors import SteerlensError, nearest

LANGUAGE = "language:response_language"
"""IFEval's name of the check that every language shares."""


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


@functools.cache
def language_instructions() -> Mapping[str, Instruction]:
    """To answer in each language that IFEval detects, read-only: `language:response_language_de` and so on.

    They share one check, and each needs a vector of its own, so tables and vectors go by these names, as in Stolfo et al.
    """
    file = importlib.resources.files("steerlens") / "bundled" / "languages.json"
    wordings: list[str] = json.loads(file.read_text(encoding="utf-8"))
    return types.MappingProxyType(
        {
            f"{LANGUAGE}_{code}": Instruction(
                id=LANGUAGE,
                title=name,
                phrasings=tuple(wording.replace("{name}", name) for wording in wordings),
                arguments={"language": (code,)},
            )
            for code, name in _LANGUAGES.items()
        }
    )


def instruction_types() -> tuple[str, ...]:
    """The ids that `check` knows, sorted: IFEval's 25, and those that `register_check` added in this process."""
    return tuple(sorted([*_ARGUMENTS, *_REGISTERED]))


def check(
    response: str, instruction_id: str, kwargs: Mapping[str, Any] | None = None, *, prompt: str = ""
) -> CheckResult:
    """Whether `response` follows the instruction, strictly and loosely, as IFEval judges it.

    Args:
        kwargs: The checker's arguments under lm-eval's names. All that it reads are required; None counts as absent.
        prompt: The request. No checker reads it: what `combination:repeat_prompt` compares with is its argument
            `prompt_to_repeat`, the request without the instruction to repeat it.

    Raises:
        SteerlensError: for an unknown id, an argument that is missing, unknown or of the wrong type, or a registered
            check that returns something other than True or False. Other exceptions of a registered check travel.

    >>> check("no capitals here, as you asked me.", "change_case:english_lowercase")
    CheckResult(strict=True, loose=True)
    """
    if not isinstance(response, str):
        raise SteerlensError(f"a response must be text, got {response!r} ({type(response).__name__})")
    accepts = _accepts(instruction_id, check_arguments(instruction_id, kwargs))
    strict = bool(response.strip()) and accepts(response)
    return CheckResult(strict, strict or any(accepts(text) for text in _variants(response)))


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
    if instruction_id not in instruction_types():
        raise SteerlensError(
            f"unknown instruction id {instruction_id!r}; {nearest(instruction_id, instruction_types())}; "
            "a check of your own is known once register_check has run"
        )
    needed = _arguments_of(instruction_id)
    given = {name: value for name, value in (kwargs or {}).items() if value is not None}
    if unknown := sorted(given.keys() - set(needed)):
        accepted = ", ".join(needed) or "no arguments"
        raise SteerlensError(f"{instruction_id} takes {accepted}; got {unknown[0]}={given[unknown[0]]!r}; remove it")
    values = {name: _read_argument(instruction_id, name, given.get(name)) for name in needed}
    if (
        instruction_id == "length_constraints:nth_paragraph_first_word"
        and values["nth_paragraph"] > values["num_paragraphs"]
    ):
        raise SteerlensError(
            f"{instruction_id} needs nth_paragraph in [1, num_paragraphs]; got {values['nth_paragraph']} of "
            f"{values['num_paragraphs']}; paragraphs count from one"
        )
    return values


_Check = TypeVar("_Check", bound=Callable[..., bool])


def register_check(instruction_id: str, /, **argument_types: Any) -> Callable[[_Check], _Check]:
    """A decorator that makes `check`, `load_pairs` and what stands on them know an instruction of one's own.

    The function takes the response and returns True or False. It is judged as IFEval's are: `strict` is its verdict on
    the response, `loose` its verdict on any of the eight variants, and an empty one never follows. It must depend on
    its arguments alone, since scores are computed again from stored responses.

    Registering a function of the same module and name again replaces it, so that a notebook's cell can be run twice.
    The registration lasts as long as the process.

    Args:
        instruction_id: "group:name", not one of IFEval's.
        argument_types: For each argument of the check, passed by name and required: str, int, float, bool or list[str].

    Raises:
        SteerlensError: for an id that is taken or not of this form, a type that is not one of these, or a function that
            has no name or cannot be called so.

    >>> @register_check("my:mentions", word=str)
    ... def mentions(response, *, word) -> bool:
    ...     return word in response.split()
    >>> check("Sure:\\nrain *falls*", "my:mentions", {"word": "falls"})
    CheckResult(strict=False, loose=True)
    """
    if not _ID.fullmatch(instruction_id):
        raise SteerlensError(
            f"an instruction id must be 'group:name' without spaces or '+', got {instruction_id!r}; "
            "write for example 'my:rhymes'"
        )
    known = list(_TYPES)  # compared one by one: what came need not have a hash
    if unknown := [name for name, kind in argument_types.items() if kind not in known]:
        raise SteerlensError(
            f"an argument of a check must be of type str, int, float, bool or list[str]; got {unknown[0]}="
            f"{argument_types[unknown[0]]!r}; pass the type itself, as in {unknown[0]}=str"
        )
    arguments = {name: _TYPES[kind] for name, kind in argument_types.items()}

    def register(function: _Check) -> _Check:
        name = _full_name(function)
        owner = _REGISTERED[instruction_id].name if instruction_id in _REGISTERED else None
        owner = "IFEval" if instruction_id in _ARGUMENTS else owner
        if owner not in (None, name):
            raise SteerlensError(
                f"an instruction id names one check, and {instruction_id!r} is that of {owner}; got {name}; "
                "register it under another id"
            )
        try:
            inspect.signature(function).bind("", **argument_types)
        except TypeError as error:
            raise SteerlensError(
                f"a check must take the response, and by name {', '.join(arguments) or 'nothing else'}; got "
                f"{function.__qualname__}{inspect.signature(function)} ({error}); register_check names the arguments"
            ) from error
        _REGISTERED[instruction_id] = _Registered(name, function, arguments)
        return function

    return register


def _full_name(function: Callable[..., Any]) -> str:
    """Module and name: what tells a cell that ran twice from two checks of one id."""
    name = getattr(function, "__qualname__", None)
    if not inspect.isfunction(function) or not name or "<lambda>" in name:
        raise SteerlensError(f"a check must be a function with a name, got {function!r}; write it with def")
    return f"{function.__module__}.{name}"


def sentence_splitter() -> str:
    """What splits sentences in this process: "nltk punkt_tab" as in IFEval, or "pysbd VERSION" where it is absent."""
    return "nltk punkt_tab" if _has_punkt() else f"pysbd {importlib.metadata.version('pysbd')}"


# Arguments: what each checker reads.


@dataclass(frozen=True)
class _Argument:
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
    return value if isinstance(value, str) and len(value.strip()) == len(value.lower()) == 1 else None


_RELATIONS = ("less than", "at least")

# What lm-eval's checker accepts (instructions_util.LANGUAGE_CODES; a test compares them). All have a profile in langdetect.
# fmt: off
_LANGUAGES = {
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
    codes = {name.casefold(): code for code, name in _LANGUAGES.items()} | {code: code for code in _LANGUAGES}
    close = difflib.get_close_matches(asked, codes, n=1, cutoff=0.6)
    hint = f"did you mean {codes[close[0]]!r} ({_LANGUAGES[codes[close[0]]]})? " if close else ""
    return f"{hint}IFEval detects {', '.join(_LANGUAGES)}"


def _one_of(choices: tuple[str, ...]) -> _Argument:
    return _Argument(f"one of {', '.join(choices)}", lambda value: value if value in choices else None)


_INTEGER = _Argument("an integer >= 0", functools.partial(_integer, least=0))
_POSITION = _Argument("an integer >= 1", functools.partial(_integer, least=1))
_TEXT = _Argument("a text that is not empty", _text)
_TEXTS = _Argument("a list of texts, not empty", _texts)
_CHARACTER = _Argument("a single character", _character)
_RELATION = _one_of(_RELATIONS)
_LANGUAGE = _Argument(
    "a language's code",
    lambda value: value if isinstance(value, str) and value in _LANGUAGES else None,
    _nearest_language,
)

_ARGUMENTS: dict[str, dict[str, _Argument]] = {
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

_TYPES: dict[Any, _Argument] = {
    str: _Argument("a text", lambda value: value if isinstance(value, str) else None),
    int: _Argument("an integer", _integer),
    float: _Argument("a finite number", _number),
    bool: _Argument("True or False", lambda value: value if isinstance(value, bool) else None),
    list[str]: _TEXTS,
}

_ID = re.compile(r"[^\s:+]+:[^\s:+]+")  # "+" joins the ids of a prompt with several instructions


@dataclass(frozen=True)
class _Registered:
    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, _Argument]


_REGISTERED: dict[str, _Registered] = {}


def _arguments_of(instruction_id: str) -> Mapping[str, _Argument]:
    own = _REGISTERED.get(instruction_id)
    return _ARGUMENTS[instruction_id] if own is None else own.arguments


def _read_argument(instruction_id: str, name: str, value: Any) -> Any:
    argument = _arguments_of(instruction_id)[name]
    if (read_value := argument.read(value)) is None:
        came = "nothing" if value is None else f"{value!r} ({type(value).__name__})"
        fix = f"put {name} into kwargs" if value is None or argument.hint is None else argument.hint(value)
        raise SteerlensError(f"{instruction_id} needs {name}: {argument.expected}; got {came}; {fix}")
    return read_value


# Verdicts.


def _variants(response: str) -> list[str]:
    """IFEval's variants other than the response itself, without repeats and empty ones."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    texts = cut[1:] + [text.replace("*", "") for text in cut]
    return [text for text in dict.fromkeys(texts) if text.strip()]


def _accepts(instruction_id: str, arguments: Mapping[str, Any]) -> Callable[[str], bool]:
    """The verdict on one text that is not empty."""
    own = _REGISTERED.get(instruction_id)
    if own is None:
        return functools.partial(_ifeval_accepts, _checker(instruction_id, arguments))
    return functools.partial(_own_accepts, instruction_id, own, arguments)


def _ifeval_accepts(checker: Any, text: str) -> bool:
    try:
        return bool(checker.check_following(text))
    except RecursionError:  # json.loads of a degenerate "[[[[[[": not a document
        return False


def _own_accepts(instruction_id: str, own: _Registered, arguments: Mapping[str, Any], text: str) -> bool:
    verdict = own.function(text, **arguments)
    if not isinstance(verdict, bool):
        raise SteerlensError(
            f"a check must return True or False, and {own.name}, the check of {instruction_id!r}, returned {verdict!r} "
            f"({type(verdict).__name__}); return bool(...)"
        )
    return verdict


# The pieces that lm-eval puts into a regular expression as they are.
_IN_REGEX = {"keyword", "keywords", "forbidden_words", "section_spliter", "postscript_marker"}
# lm-eval has regular expressions of its own for these two.
_POSTSCRIPTS = ("P.S.", "P.P.S")


def _checker(instruction_id: str, arguments: Mapping[str, Any]) -> Any:
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
    instructions_util.count_words = lambda text: len(re.findall(r"\w+", text))
    if not _has_punkt():
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


def split_sentences(text: str) -> list[str]:
    """The sentences of an English text, by pysbd; line breaks do not end one."""
    import pysbd

    # A new segmenter each time, since it keeps the text. Line breaks end a sentence in pysbd, but not in Punkt.
    sentences: list[str] = pysbd.Segmenter(language="en", clean=False).segment(" ".join(text.split()))
    return sentences
