"""Batches with a key-value cache, whose places are filled again as rows stop.

    place 1   | prompt | token | token | token ........ stops |  (free)  | prompt | token ...
    place 2   | prompt | token ... stops |      (free)        | prompt | token ..............
    place 3   | prompt | token ............................................. stops |

Rows are padded on the left, so that the newest column is every row's newest token. A row that stops keeps its place, masked,
until enough are free for one pass over the prompts that wait: these are run up to their last tokens, their keys and values are
written into the free places, right-aligned, and their last tokens are fed beside the others' newest ones. The longest prompts
come first, so a later one is never wider than a row that is on its way. Once none waits, free places are dropped when there are
enough of them. Columns that are padding in every row are cut off, so a batch is as wide as its longest row, however long it runs.
"""

from collections.abc import Sequence, Set

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlens.models.backends import Cache, put
from steerlens.models.facts import model_device
from steerlens.models.parting import Stage
from steerlens.models.rows import Rows, n_hidden
from steerlens.steering.batches import Batch, Job, Row, edits_of
from steerlens.steering.prefill import Beginner, begin, feed, splits, stems

REFILL = 8
"""Places are filled again once one in so many is free: a pass over prompts costs about as much as a step of all rows."""
DROP = 4
"""Free places that nothing waits for are dropped once one in so many is free: that copies the cache of the others."""


class CachedBatch(Batch):
    """Rows padded on the left; after their prompts, one token a step, with a key-value cache."""

    def __init__(self, job: Job, rows: list[Row], waiting: list[Row]) -> None:
        """
        Args:
            waiting: Rows to fill places again with, from the end; their prompts are no longer than any of `rows`.
        """
        super().__init__(job, rows)
        self.size, self.waiting = len(rows), waiting if splits(job, waiting) else []
        self.free: list[int] = []
        """Places of rows that stopped."""
        self.live = torch.ones(len(rows), 1, dtype=torch.long, device=model_device(self.model))
        """0 for a free place, 1 for any other."""
        self.cache: Cache | None = None
        self.rest: Rows | None = None
        """The prompts, or what comes after the prefix that all begin with, until that was run."""
        self.stages: Sequence[Stage] = ()
        """How rows part there."""
        self.fed: Rows | None = None
        """What was run last, while its columns are the cache's."""
        self.beginner = Beginner(job, self.waiting)
        keys = stems(job, rows)
        if splits(job, rows) and len(set(keys)) < len(rows):
            begun = begin(job, rows)
            self.cache, self.mask = begun.cache, begun.mask.to(self.live.device)
            if self.cache is not None and self.cache.forks:
                self.beginner.keep(keys[-1], begun)
        else:
            fed = feed(job, rows, [row.prompt for row in rows])
            self.cache, self.rest, self.stages = fed.cache, fed.rows.to(self.live.device), fed.stages

    @property
    def n_left(self) -> int:
        return len(self.rows) - len(self.free)

    def next_logits(self) -> tuple[Sequence[int], Float[Tensor, "some d_vocab"]]:
        if self.free:
            self._settle()
        rows, stages = (self.rest, self.stages) if self.rest else (self._newest(), ())
        steady = self.job.hear is None
        result = self.runner.run(
            rows, edits=self.edits, cache=self.cache, keep_cache=True, steady=steady, stages=stages
        )
        self.cache, self.mask, self.rest, self.fed = result.cache, rows.mask, None, rows
        if not self.free:
            return range(len(self.rows)), result.logits
        places = [place for place in range(len(self.rows)) if place not in self.free]
        return places, result.logits[places]

    def _newest(self) -> Rows:
        """The newest token of each row, after what is cached."""
        newest = torch.tensor([[(row.tokens or row.prompt)[-1]] for row in self.rows], device=self.live.device)
        if self.fed is not None and not self.free:
            return self.fed.then(newest)
        lengths = tuple(len(row.prompt) for row in self.rows)
        return Rows(newest, torch.cat([self.mask, self.live], dim=1), lengths)

    def leave(self, places: Set[int]) -> None:
        assert self.cache is not None
        self.free = sorted({*self.free, *places})
        self.live[self.free] = 0
        if self.cache.forks and self.n_left:
            hidden = n_hidden(self.mask * self.live)
            if hidden:
                self.cache, self.mask, self.fed = self.cache.without(hidden), self.mask[:, hidden:], None

    def _settle(self) -> None:
        """Fill free places again, or drop them, where that pays."""
        assert self.cache is not None
        if self.waiting and self.cache.forks:
            if len(self.free) * REFILL >= self.size:
                self._fill()
        elif len(self.free) * DROP >= len(self.rows):
            super().leave({*self.free})
            self.free = []

    def _fill(self) -> None:
        """Rows that wait take free places."""
        assert self.cache is not None
        places = self.free[: len(self.waiting)]
        rows = [self.waiting.pop() for _ in places]
        self.mask, self.fed = self.mask.clone(), None
        for part, begun in self.beginner.begin(rows):
            where = torch.tensor([places[place] for place in part])
            self.cache = put(self.cache, where, begun.cache)
            padding = self.mask.shape[1] - begun.mask.shape[1]
            self.mask[where] = torch.nn.functional.pad(begun.mask, (padding, 0)).to(self.mask.device)
        for place, row in zip(places, rows, strict=True):
            self.rows[place] = row
        self.edits = edits_of(self.job, self.rows)
        self.free = self.free[len(places) :]
        self.live[places] = 1

    def select(self, keep: Int[Tensor, " kept"]) -> None:
        assert self.cache is not None
        self.cache, self.mask, self.live = self.cache.select(keep), self.mask[keep], self.live[keep]
        self.fed = None
