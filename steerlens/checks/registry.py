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

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from steerlens.checks.arguments import ARGUMENTS, TYPES, Argument
from steerlens.checks.ifeval import checker, ifeval_accepts, variants
from steerlens.errors import SteerlensError, nearest


@dataclass(frozen=True)
class CheckResult:
    """Whether one response follows one instruction.

    >>> check("No comma here.", "punctuation:no_comma").loose
    True
    """

    strict: bool
    """The response as it stands follows."""
    loose: bool
    """One of its eight variants follows (see the module's docstring); True whenever `strict` is."""


def instruction_types() -> tuple[str, ...]:
    """The ids that `check` knows, sorted: IFEval's 25, and those that `register_check` added in this process.

    >>> "punctuation:no_comma" in instruction_types()
    True
    """
    return tuple(sorted([*ARGUMENTS, *_REGISTERED]))


def check(response: str, instruction_id: str, kwargs: Mapping[str, Any] | None = None) -> CheckResult:
    """Whether `response` follows the instruction, strictly and loosely, as IFEval judges it.

    Args:
        kwargs: The checker's arguments under lm-eval's names. All that it reads are required; None counts as absent.

    Returns:
        The strict and the loose verdict.

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
    return CheckResult(strict, strict or any(accepts(text) for text in variants(response)))


def check_all(response: str, instruction_ids: Sequence[str], kwargs: Sequence[Mapping[str, Any]]) -> list[CheckResult]:
    """The verdict for each of a prompt's instructions, in their order.

    The prompt's own verdict is their conjunction, strict with strict and loose with loose.

    Args:
        instruction_ids, kwargs: As in `check`, one dict of arguments per id.

    Returns:
        One verdict per id, in their order.

    Raises:
        SteerlensError: as for `check`, or if ids and dicts differ in number.

    >>> ids = ["punctuation:no_comma", "startend:quotation"]
    >>> [one.strict for one in check_all('"Rain, or snow."', ids, [{}, {}])]
    [False, True]
    """
    if isinstance(instruction_ids, str) or len(instruction_ids) != len(kwargs):
        raise SteerlensError(
            f"check_all needs one dict of arguments per instruction id, got ids {instruction_ids!r} and "
            f"{len(kwargs)} dicts; pass {{}} for an instruction without arguments"
        )
    return [check(response, name, arguments) for name, arguments in zip(instruction_ids, kwargs, strict=True)]


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

    Returns:
        The decorator; it gives the function back as it was.

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
    known = list(TYPES)  # compared one by one: what came need not have a hash
    if unknown := [name for name, kind in argument_types.items() if kind not in known]:
        raise SteerlensError(
            f"an argument of a check must be of type str, int, float, bool or list[str]; got {unknown[0]}="
            f"{argument_types[unknown[0]]!r}; pass the type itself, as in {unknown[0]}=str"
        )
    arguments = {name: TYPES[kind] for name, kind in argument_types.items()}

    def register(function: _Check) -> _Check:
        name = _full_name(function)
        owner = _REGISTERED[instruction_id].name if instruction_id in _REGISTERED else None
        owner = "IFEval" if instruction_id in ARGUMENTS else owner
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


_ID = re.compile(r"[^\s:+]+:[^\s:+]+")  # "+" joins the ids of a prompt with several instructions


@dataclass(frozen=True)
class _Registered:
    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, Argument]


_REGISTERED: dict[str, _Registered] = {}


def _arguments_of(instruction_id: str) -> Mapping[str, Argument]:
    own = _REGISTERED.get(instruction_id)
    return ARGUMENTS[instruction_id] if own is None else own.arguments


def _read_argument(instruction_id: str, name: str, value: Any) -> Any:
    argument = _arguments_of(instruction_id)[name]
    if (read_value := argument.read(value)) is None:
        came = "nothing" if value is None else f"{value!r} ({type(value).__name__})"
        fix = f"put {name} into kwargs" if value is None or argument.hint is None else argument.hint(value)
        raise SteerlensError(f"{instruction_id} needs {name}: {argument.expected}; got {came}; {fix}")
    return read_value


def _accepts(instruction_id: str, arguments: Mapping[str, Any]) -> Callable[[str], bool]:
    """The verdict on one text that is not empty."""
    own = _REGISTERED.get(instruction_id)
    if own is None:
        return functools.partial(ifeval_accepts, checker(instruction_id, arguments))
    return functools.partial(_own_accepts, instruction_id, own, arguments)


def _own_accepts(instruction_id: str, own: _Registered, arguments: Mapping[str, Any], text: str) -> bool:
    verdict = own.function(text, **arguments)
    if not isinstance(verdict, bool):
        raise SteerlensError(
            f"a check must return True or False, and {own.name}, the check of {instruction_id!r}, returned {verdict!r} "
            f"({type(verdict).__name__}); return bool(...)"
        )
    return verdict
