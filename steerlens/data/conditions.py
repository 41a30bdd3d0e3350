"""The cells of an evaluation: what asks for the instruction, the text, the vector, both or neither."""

from typing import Literal, get_args

Condition = Literal["none", "vector", "text", "text+vector", "random"]
"""A cell of the evaluation: what asks for the instruction. "random" is the control, a random vector of equal norm."""


CONDITIONS: tuple[Condition, ...] = get_args(Condition)


WITH_TEXT: frozenset[Condition] = frozenset({"text", "text+vector"})
"""The conditions whose prompt carries the instruction."""


STEERED: frozenset[str] = frozenset({"vector", "text+vector", "random"})
"""Conditions that run with a plan."""
