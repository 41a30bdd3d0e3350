"""The bundled instructions: ids, phrasings in words of our own, and how their arguments are drawn.

The twelve format instructions of Stolfo et al., "Improving Instruction-Following in Language Models through Activation Steering"
(ICLR 2025), and to answer in each of the languages that IFEval detects. Each has several phrasings, so that the mean difference
over pairs is that of the instruction and not of one wording.
"""

import functools
import importlib.metadata
import importlib.resources
import json
import random
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steerlens.checks.arguments import LANGUAGE, LANGUAGES


@dataclass(frozen=True)
class Instruction:
    """A format instruction in several wordings, for example `format_instructions()["punctuation:no_comma"]`.

    >>> format_instructions()["punctuation:no_comma"].title
    'No commas'
    """

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


@functools.cache
def format_instructions() -> Mapping[str, Instruction]:
    """The twelve format instructions of Stolfo et al. by IFEval id, read-only, in the catalogue's order.

    `capital_word_frequency` only asks for "at least" so many words: "less than" asks for the opposite behaviour, and
    the mean over both would point nowhere.

    >>> len(format_instructions())
    12
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

    >>> language_instructions()["language:response_language_de"].title
    'German'
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
            for code, name in LANGUAGES.items()
        }
    )
