"""What prompts have in common is run once.

    stem      a prompt before its last token, and what steers it there
    prefix    the tokens that all rows of a batch begin with, such as a template and its system prompt, and what steers them

Rows of one stem have the same keys and values there: trials, or strengths that steer only the last token or the generated ones.
They are run up to it, to go on with beside other rows. Rows of several stems may still begin alike: all that are not steered
there, and all that one vector steers. And rows of one prompt, or one prefix, are alike up to the lowest layer at which they are
steered differently (see `models.parting`).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from steerlens.models.backends import Cache
from steerlens.models.parting import Stage, firsts, numbered, spared, stages
from steerlens.models.prefixes import after_prefix, common_prefix, held_prefixes, holds_all, pays
from steerlens.models.probe import can_part
from steerlens.models.rows import Rows, n_hidden, pad, pad_id
from steerlens.steering.batches import Job, Row, edits_of
from steerlens.steering.interventions import Intervention

PASS_OVER_PARTING = 8
"""How many times more beginning a pass costs than letting its rows part: on a processor, `tiny` breaks even where 4 to 14 tokens
are spared. On a GPU it is a guess."""


@dataclass(frozen=True, eq=False)
class Begun:
    """Rows whose prompts were run up to their last tokens."""

    cache: Cache | None
    """None where there is nothing before these."""
    mask: Int[Tensor, "row past"]

    def select(self, keep: Int[Tensor, " kept"]) -> "Begun":
        """Some of the rows, as often as they come; this one stays as it is."""
        return Begun(None if self.cache is None else self.cache.fork().select(keep), self.mask[keep])

    def trimmed(self) -> "Begun":
        """Without columns that are padding in every row; this one is used up."""
        n = n_hidden(self.mask)
        return Begun(None if self.cache is None else self.cache.without(n), self.mask[:, n:])


def begin(job: Job, rows: Sequence[Row]) -> Begun:
    """Run rows' prompts up to their last tokens, once per stem."""
    share = numbered(stems(job, rows))
    once = firsts(share)
    chosen = [rows[place] for place in once]
    fed = feed(job, chosen, [row.prompt[:-1] for row in chosen])
    begun = Begun(None, fed.rows.mask)
    if fed.rows.tokens.shape[1]:
        edits = edits_of(job, chosen)
        result = job.runner.run(fed.rows, edits=edits, cache=fed.cache, keep_cache=True, stages=fed.stages)
        begun = Begun(result.cache, fed.rows.mask)
    if len(once) == len(rows):
        return begun
    again = torch.tensor(share)
    # Not every cache can be forked, and this one is wanted no more.
    return Begun(None if begun.cache is None else begun.cache.select(again), begun.mask[again])


@dataclass(frozen=True, eq=False)
class Fed:
    """A pass to be run."""

    cache: Cache | None
    """Of what its rows begin with, if that was run by itself."""
    rows: Rows
    stages: list[Stage]
    """How these part; none where that spares too little."""


def feed(job: Job, rows: Sequence[Row], ids: Sequence[list[int]]) -> Fed:
    """The first tokens of some rows, to be run; what all begin with is run here, if that pays, once for each way in which it is
    steered.

    Args:
        ids: Of each row its prompt, or that without its last token.
    """
    # Windows count from the whole prompt's end, though its last token may come later.
    prompt_lengths = [len(row.prompt) for row in rows]
    whole = pad(ids, pad_id=pad_id(job.model), prompt_lengths=prompt_lengths)
    parting = _stages(job, rows, ids, n_columns=whole.tokens.shape[1])
    at_once = Fed(None, whole, parting)
    width = common_prefix(ids) if len(ids) > 1 and splits(job, rows) else 0
    if width < 1 or job.able is None or not job.able.prefix:
        return at_once
    held, share = held_prefixes(ids, width), numbered([_way(row, width) for row in rows])
    once = firsts(share)
    chosen, begins = [rows[place] for place in once], [ids[place][:width] for place in once]
    parting_first = _stages(job, chosen, begins, n_columns=width)
    n_within = sum(held) * (1 - _spared(job, parting))
    n_apart = len(chosen) * width * (1 - _spared(job, parting_first))
    if min(held) < 1 or not pays(job.model, int(n_within - n_apart)):
        return at_once
    prefixes = pad(begins, prompt_lengths=[len(row.prompt) for row in chosen])
    cache = job.runner.run(prefixes, edits=edits_of(job, chosen), keep_cache=True, stages=parting_first).cache
    if cache is None or not holds_all(cache, width):
        return at_once
    return Fed(*after_prefix(cache, share, ids, width=width, prompt_lengths=prompt_lengths), parting)


def _stages(job: Job, rows: Sequence[Row], ids: Sequence[list[int]], *, n_columns: int) -> list[Stage]:
    """How rows part in a pass, where that spares enough of it.

    Args:
        ids: Of each row all its tokens up to the end of the pass.
        n_columns: Those of the pass.
    """
    if len(rows) < 2 or not job.runner.plain_modules or not splits(job, rows):
        return []
    steered = [_steered(row, len(its)) for row, its in zip(rows, ids, strict=True)]
    # Attention is steered within a layer, and rows part after one: such a row is run by itself.
    starts = [
        row.index if attention else tuple(its) for row, its, (_, attention) in zip(rows, ids, steered, strict=True)
    ]
    found = stages(starts, [residual for residual, _ in steered])
    n_spared = _spared(job, found) * len(rows) * n_columns
    return found if pays(job.model, int(PASS_OVER_PARTING * n_spared)) and can_part(job.model) else []


def _spared(job: Job, found: Sequence[Stage]) -> float:
    """The share of a pass that need not be run."""
    return spared(found, int(job.model.cfg.n_layers)) if found else 0.0


def _steered(row: Row, end: int) -> tuple[dict[int, Hashable], tuple[Hashable, ...]]:
    """What tells how the first tokens of a row are steered: after each layer, and in attention."""
    residual: dict[int, Hashable] = {}
    attention: list[Hashable] = []
    for step, digest, low, high in row.always:
        if low < end and high > low:
            what = (digest, max(low, 0), min(high, end))
            if isinstance(step, Intervention):
                residual[step.layer] = (residual.get(step.layer), what)
            else:
                attention.append(what)
    return residual, tuple(attention)


def _way(row: Row, end: int) -> Hashable:
    """The same as one key."""
    residual, attention = _steered(row, end)
    return frozenset(residual.items()), attention


class Beginner:
    """Begins rows a few at a time, and runs a stem once, however many of its rows still wait.

    Args:
        waiting: The rows that are still to come, the next one last; those of one prompt are side by side.
    """

    def __init__(self, job: Job, waiting: Sequence[Row]) -> None:
        self.job, self.waiting = job, waiting
        self.stem: Any = None
        self.kept: Begun | None = None
        """The one row of that stem, while others of it wait."""

    def begin(self, rows: Sequence[Row]) -> list[tuple[list[int], Begun]]:
        """Rows, begun, in parts: their places among those that were given, and what they go on from."""
        keys = stems(self.job, rows)
        again = [place for place, key in enumerate(keys) if key == self.stem]
        fresh = [place for place, key in enumerate(keys) if key != self.stem]
        parts = []
        if again and self.kept is not None:
            parts.append((again, self.kept.select(torch.zeros(len(again), dtype=torch.long))))
        if fresh:
            parts.append((fresh, begin(self.job, [rows[place] for place in fresh])))
        self.keep(keys[-1], parts[-1][1])
        return parts

    def keep(self, stem: Any, begun: Begun) -> None:
        """Remember the last of some rows, if the next one that waits has its stem."""
        wanted = bool(self.waiting) and stems(self.job, [self.waiting[-1]]) == [stem]
        last = torch.tensor([len(begun.mask) - 1])
        self.stem, self.kept = (stem, begun.select(last).trimmed()) if wanted else (None, None)


def stems(job: Job, rows: Sequence[Row]) -> list[Any]:
    """What tells each row's stem from others; a row that shares nothing has its own."""
    # Only what acts before the last token: rows that differ at it, or after it, still have the same keys and values here.
    return [
        (tuple(row.prompt), _way(row, len(row.prompt) - 1)) if splits(job, [row]) and len(row.prompt) > 1 else row.index
        for row in rows
    ]


def splits(job: Job, rows: Sequence[Row]) -> bool:
    """Whether prompts may be run in two parts: queries that pool must be run at once, and what more edits do is not known."""
    return not job.more_edits and not pools(rows)


def pools(rows: Sequence[Row]) -> bool:
    """Whether queries of a prompt depend on each other in any row, by what always acts on it."""
    return any(step.pooled for row in rows for step in row.plan.ungated.attention)
