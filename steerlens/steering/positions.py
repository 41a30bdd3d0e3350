"""Position rules: which absolute token positions of a row are steered.

A position counts real tokens, so the first token of a prompt is 0 whatever the padding, and the first generated token is at
the prompt's length. Every rule is one half-open window `[start, stop)`, so a rule for a whole batch is two integers per row,
worked out once on the host, and holds unchanged while a key-value cache is decoded one token at a time:

    "all"        every token, prompt and generated (the paper's rule)
    "prompt"     the prompt's tokens
    "generated"  the generated tokens
    "last"       the last prompt token
    Window(start, stop, anchor)   anything else, counted from the first token or from the first generated one
"""

import re
from dataclasses import dataclass
from typing import Literal

from steerlens._typing import WholeNumber, whole
from steerlens.errors import SteerlensError, nearest

FOREVER = 2**31 - 1
"""Past any position a model can reach."""


@dataclass(frozen=True)
class Window:
    """The half-open window `[start, stop)` of positions; None leaves that end open.

    >>> as_window("generated") == Window(0, None, "generation")
    True
    """

    start: WholeNumber | None = None
    stop: WholeNumber | None = None
    anchor: Literal["start", "generation"] = "start"
    """Count from the row's first token, or from its first generated token (negative numbers reach into the prompt)."""

    def __post_init__(self) -> None:
        if self.anchor not in ("start", "generation"):
            raise SteerlensError(f'anchor must be "start" or "generation", got {self.anchor!r}')
        for name in ("start", "stop"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole(getattr(self, name), name))
        # One spelling per rule: a window from the first token on is open at its start, and one open at both ends has no anchor.
        if self.anchor == "start" and self.start == 0:
            object.__setattr__(self, "start", None)
        if self.start is None and self.stop is None:
            object.__setattr__(self, "anchor", "start")
        if self.anchor == "start" and min(self.start or 0, self.stop or 0) < 0:
            raise SteerlensError(
                f"a window from the start counts from 0, got [{self.start}, {self.stop}); "
                'use anchor="generation" to count back from the end of the prompt'
            )
        first = 0 if self.start is None and self.anchor == "start" else self.start
        if first is not None and self.stop is not None and first >= self.stop:
            raise SteerlensError(
                f"a window needs start < stop, got [{first}, {self.stop}); stop is the first one left out"
            )

    def bounds(self, prompt_length: int) -> tuple[int, int]:
        """The absolute `[low, high)` for a row whose prompt has `prompt_length` tokens."""
        origin = prompt_length if self.anchor == "generation" else 0
        low = 0 if self.start is None else max(0, origin + self.start)
        high = FOREVER if self.stop is None else max(0, origin + self.stop)
        return low, high

    def __str__(self) -> str:
        name = next((name for name, window in RULES.items() if window == self), None)
        ends = ["" if end is None else str(end) for end in (self.start, self.stop)]
        return name or f"{self.anchor}[{ends[0]}:{ends[1]}]"


RULES: dict[str, Window] = {
    "all": Window(),
    "prompt": Window(None, 0, "generation"),
    "generated": Window(0, None, "generation"),
    "last": Window(-1, 0, "generation"),
}


def as_window(rule: str | Window) -> Window:
    """The window a rule stands for; a window as it is printed, such as "generation[-2:3]", is read, too.

    Raises:
        SteerlensError: for a name that is no rule.
    """
    if isinstance(rule, Window):
        return rule
    if written := re.fullmatch(r"(start|generation)\[(-?\d*):(-?\d*)\]", rule):
        anchor, start, stop = written.groups()
        return Window(int(start) if start else None, int(stop) if stop else None, anchor)  # type: ignore[arg-type]
    if rule not in RULES:
        raise SteerlensError(f"positions must be a rule's name or a Window, got {rule!r}; {nearest(rule, RULES)}")
    return RULES[rule]
