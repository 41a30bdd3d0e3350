"""What sampling gives: tokens as they are drawn, and finished continuations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import pandas as pd

from steerlens.steering.gates import GatedToken

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Token:
    """One sampled token, as soon as it is there.

    Example:
        >>> next(sl.steering.stream_tokens(model, ["What is iron?"], max_new_tokens=4)).index
        0
    """

    index: int
    """Its row's place in the request."""
    id: int
    log_prob: float
    """Of the token after what stands before it, in the model as it ran, steered or not, at temperature 1; in nats."""


@dataclass(frozen=True)
class Generation:
    """One sampled continuation.

    Example:
        >>> sl.generate(model, ["What is iron?"], max_new_tokens=4)[0].index
        0
    """

    index: int
    """The row's place in the request."""
    text: str
    """The new text, without special tokens and without a stop text."""
    prompt_tokens: tuple[int, ...]
    """The ids that were fed to the model."""
    tokens: tuple[int, ...]
    """The new ids, the stopping one included."""
    finish_reason: FinishReason
    seed: int
    n_steered: int
    """How many (position, intervention) places of this row were steered; under a gate, also the tokens that passed it."""
    gated: tuple[GatedToken, ...] = ()
    """What a gate made of each new token; empty where there was none."""


class Generations(Sequence[Generation]):
    """Continuations in their prompts' order; shows prompt and text in a notebook.

    >>> rows = sl.generate(model, ["What colour is snow?", "What is iron?"], max_new_tokens=8)
    >>> len(rows), len(rows[:1]), rows.texts == [row.text for row in rows]
    (2, 1, True)
    """

    def __init__(self, rows: Sequence[Generation], prompts: Sequence[str], backend: str = "") -> None:
        self._rows, self.prompts, self.backend = tuple(rows), tuple(prompts), backend
        """`backend` says how the model was run; see `steerlens.models.backend_used`."""

    @property
    def texts(self) -> list[str]:
        """The new text of each prompt."""
        return [row.text for row in self]

    def to_frame(self) -> pd.DataFrame:
        """One row per continuation: prompt, text, n_tokens, finish_reason, seed, n_steered."""
        columns = ["prompt", "text", "n_tokens", "finish_reason", "seed", "n_steered"]
        values = [
            (prompt, row.text, len(row.tokens), row.finish_reason, row.seed, row.n_steered)
            for prompt, row in zip(self.prompts, self, strict=True)
        ]
        return pd.DataFrame(values, columns=columns)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Generation: ...
    @overload
    def __getitem__(self, index: slice) -> "Generations": ...
    def __getitem__(self, index: int | slice) -> "Generation | Generations":
        if isinstance(index, slice):
            return Generations(self._rows[index], self.prompts[index], self.backend)
        return self._rows[index]

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Generations | list) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # compared by content, as a list is

    def _repr_html_(self) -> str:
        with pd.option_context("display.max_colwidth", None):
            return str(self.to_frame()[["prompt", "text", "finish_reason"]].to_html(index=False))

    def __repr__(self) -> str:
        lines = [f"  {prompt[:40]!r} -> {row.text[:60]!r}" for prompt, row in zip(self.prompts[:5], self, strict=False)]
        return "\n".join([f"Generations({len(self)} texts)", *lines, *(["  …"] if len(self) > 5 else [])])
