"""Names for small choices that the command line shares with the library; imports nothing heavy."""

from typing import Literal, get_args

Operator = Literal["add", "set_projection", "ablate"]
"""What is done to a residual; see `operators`."""
OPERATORS: tuple[Operator, ...] = get_args(Operator)

RuleName = Literal["all", "prompt", "generated", "last"]
"""Which positions are steered; see `positions`."""

Style = Literal["auto", "chat", "plain"]
"""How a prompt becomes what the model reads; see `prompts.PromptFormat`."""
Gate = Literal["degenerate", "low_perplexity", "no_low_perplexity"]
