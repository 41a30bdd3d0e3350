"""The cells of an evaluation: what asks for the instruction, the text, the vector, both or neither."""

from typing import Literal, get_args

Condition = Literal[
    "none",
    "vector",
    "text",
    "text+vector",
    "random",
    "text+attention",
    "text+vector+attention",
    "text+random",
]
"""A cell of the evaluation: what asks for the instruction. "vector" stands for what a plan does to the residual stream,
"attention" for what it does to attention; "random" is the control, a random vector of equal norm, and "text+random" that of a
whole plan with the instruction in the prompt: as much attention on random other tokens of it."""


ALL_CONDITIONS: tuple[Condition, ...] = get_args(Condition)


CONDITIONS: tuple[Condition, ...] = ("none", "vector", "text", "text+vector", "random")
"""The cells of a plan that leaves attention alone."""


WITH_TEXT: frozenset[Condition] = frozenset(one for one in ALL_CONDITIONS if one.startswith("text"))
"""The conditions whose prompt carries the instruction."""


STEERED: frozenset[str] = frozenset(ALL_CONDITIONS) - {"none", "text"}
"""Conditions that run with a plan."""
