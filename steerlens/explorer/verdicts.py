"""Was it followed? The check of each chosen vector's instruction, on a text that stands in the explorer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steerlens.checks.catalogue import language_instructions
from steerlens.checks.registry import check, instruction_types
from steerlens.errors import SteerlensError
from steerlens.vectors.vector import SteeringVector


@dataclass(frozen=True)
class Verdict:
    """What the check of a vector's instruction says of a text.

    >>> Verdict("commas", followed=True, strict=False).note
    ''
    """

    vector: str
    followed: bool | None
    """The check's loose verdict, on which rates stand; None where there is no check."""
    strict: bool | None
    note: str = ""
    """Why there is no verdict."""


def judge(
    text: str, name: str, vector: SteeringVector, arguments: Mapping[str, Mapping[str, Any]] | None = None
) -> Verdict:
    """The verdict of the instruction that a vector was fitted on.

    Args:
        name: The vector's name in the explorer.
        arguments: Of checks, by the vectors' names: a vector is a mean over pairs with several.

    >>> import torch
    >>> vector = SteeringVector({3: torch.tensor([0.0, 2.0])}, metadata={"instruction": "punctuation:no_comma"})
    >>> judge("Rain, snow.", "commas", vector).followed
    False
    """
    instruction = vector.metadata.get("instruction", "")
    given = dict((arguments or {}).get(name, {}))
    if instruction in (languages := language_instructions()):
        language = languages[instruction]
        instruction, given = language.id, {key: choices[0] for key, choices in language.arguments.items()} | given
    if instruction not in instruction_types():
        return Verdict(name, None, None, "no check: the vector names no instruction that one is registered for")
    try:
        found = check(text, instruction, given)
    except SteerlensError as error:  # arguments that are missing or wrong
        return Verdict(name, None, None, f"no check: {error} (explore takes arguments={{{name!r}: {{...}}}})")
    return Verdict(name, found.loose, found.strict)
