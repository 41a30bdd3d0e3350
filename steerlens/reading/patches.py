"""Patched runs: many copies of a prompt in one batch, each with one activation of another run in the place of its own.

    h[row, position(row)]  <-  value(row)        at the one site that the row is for; a cell is (pair, source, site, position)

TransformerLens' `interchange.run_with_intervention` and `patching.generic_activation_patch` do one hook point's patch to all rows
of a pass, so a map of cells is a pass per cell; here a row carries its own edit, and all cells are rows of shared batches.

    begun    the plain prompts are run up to the position once, and every row patched there goes on from their keys and values:
             what comes before a patched position is as it was
    whole    every row is run from its first token, for models whose cache gives something else

Which of the two is right is seen on the model itself: the first batch of every position holds the plain prompts, too, and they
must come out as they do alone.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from steerlens.models.backends import Cache
from steerlens.models.facts import tolerance
from steerlens.models.passes import Edit, Read, Runner
from steerlens.models.probe import Abilities
from steerlens.models.rows import Rows, pad, pad_id

NOTHING, INSTRUCTED, OTHER = -1, 0, 1
"""Where the activation of a cell comes from: nowhere, the run with the instruction, or another query's run without it."""


class Cell(NamedTuple):
    """What one row has patched; places count the pairs of a batch of prompts, their sites, and so on."""

    pair: int
    source: int
    """NOTHING, INSTRUCTED or OTHER."""
    site: int
    """Which of the sites; one per layer."""
    offset: int
    """Which of the positions."""


class Prompts(NamedTuple):
    """Token ids of a pair's prompts, and of another query's prompt without the instruction."""

    without: list[int]
    with_: list[int]
    other: list[int]


@dataclass(frozen=True, eq=False)
class Patch:
    """An edit that writes a value over one token's activation, for some of its rows."""

    site: str
    values: Float[Tensor, "value d"]
    chosen: Int[Tensor, " row"]
    """Which value each row gets; -1 for a row that is left alone."""
    position: Int[Tensor, " row"]
    """Of the token that is written over, counted from the row's first."""

    def __call__(self, activation: Float[Tensor, "row pos d"], rows: Rows) -> Float[Tensor, "row pos d"]:
        """The activation after the patch; rows whose token is not among the columns come back as they are."""
        at = torch.where(self.chosen < 0, -2, self.position)  # no position is below -1, that of padding
        row, column = (rows.positions == at[:, None].to(rows.positions.device)).nonzero(as_tuple=True)
        values = self.values[self.chosen[row.cpu()]].to(activation)
        return activation.index_put((row.to(activation.device), column.to(activation.device)), values)

    @property
    def digest(self) -> str:
        """16 hex digits of the site, the positions and the values."""
        written = self.values[self.chosen.clamp(min=0)].float() * (self.chosen >= 0)[:, None]
        content = hashlib.sha256(self.site.encode())
        for table in (written, self.position, self.chosen >= 0):
            content.update(table.contiguous().numpy().tobytes())
        return content.hexdigest()[:16]

    def select(self, keep: Int[Tensor, " kept"]) -> "Patch":
        """The patch of some rows."""
        return replace(self, chosen=self.chosen[keep.cpu()], position=self.position[keep.cpu()])


class PatchedRuns:
    """The runs of a few pairs: what is patched is recorded once, then cells are run in any number.

    Args:
        sites: The hook points that cells patch.
        offsets: The positions that cells patch, counted from the end, -1 the last token; ascending.
        batch_size: Rows per pass.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Prompts],
        *,
        sites: Sequence[str],
        offsets: Sequence[int],
        able: Abilities,
        batch_size: int,
    ) -> None:
        self.model, self.able, self.batch_size = model, able, batch_size
        self.sites, self.offsets = list(sites), list(offsets)
        self.plain = [one.without for one in prompts]
        self._record(prompts)

    def _record(self, prompts: Sequence[Prompts]) -> None:
        """Both sides' logits, and the values of the cells; the prompts are run whole."""
        ids = [row for one in prompts for row in (one.with_, one.other, one.without)]
        parts = [ids] if self.able.cache or self.able.batch else [[row] for row in ids]
        logits, values = [], []
        with Runner(self.model, self.sites) as runner:
            for part in parts:
                at = torch.tensor([[len(row) + offset for offset in self.offsets] for row in part])
                rows = pad(part, side=self.able.side, pad_id=pad_id(self.model))
                found = runner.run(rows, reads=[Read(site, at=at) for site in self.sites])
                logits.append(found.logits.float().cpu())
                values.append([found.reads[site] for site in self.sites])
        self.values: list[Float[Tensor, "value d"]] = []
        """Of each site; a cell's value is at `_places`."""
        for each in zip(*values, strict=True):
            runs = rearrange(torch.cat(each), "(pair run) offset d -> pair run offset d", run=3)
            self.values.append(rearrange(runs[:, :2], "pair source offset d -> (pair source offset) d"))
        of_run = rearrange(torch.cat(logits), "(pair run) d_vocab -> run pair d_vocab", run=3)
        self.instructed_logits: Float[Tensor, "pair d_vocab"] = of_run[0]
        self.plain_logits: Float[Tensor, "pair d_vocab"] = of_run[2]

    def edits(self, cells: Sequence[Cell]) -> list[Edit]:
        """One patch per site that any of the cells patches; the cells are the rows."""
        position = torch.tensor([len(self.plain[cell.pair]) + self.offsets[cell.offset] for cell in cells])
        site = torch.tensor([NOTHING if cell.source == NOTHING else cell.site for cell in cells])
        value = torch.tensor([(cell.pair * 2 + cell.source) * len(self.offsets) + cell.offset for cell in cells])
        return [
            Patch(self.sites[one], self.values[one], torch.where(site == one, value, -1), position)
            for one in sorted({*site.tolist()} - {NOTHING})
        ]

    def logits(self, cells: Sequence[Cell]) -> Iterator[tuple[list[int], Float[Tensor, "cell d_vocab"]]]:
        """The next-token logits of every cell, batch by batch, with the places of the batch's cells; float32 on the CPU."""
        by_offset: dict[int, list[int]] = {place: [] for place in range(len(self.offsets))}
        for place, cell in enumerate(cells):
            by_offset[cell.offset].append(place)
        runner = Runner(self.model, self.sites)
        begun = _Begun(self, runner) if self.able.cache else None
        for places in by_offset.values():
            for start in range(0, len(places), self.batch_size):
                batch = places[start : start + self.batch_size]
                rows = [cells[place] for place in batch]
                with runner:  # never while a batch is in the caller's hands
                    found = begun.logits(rows, checked=start > 0) if begun else None
                    if found is None:
                        begun, found = None, self._whole(runner, rows)
                yield batch, found

    def _whole(self, runner: Runner, cells: Sequence[Cell]) -> Float[Tensor, "cell d_vocab"]:
        """Logits of cells, every row from its first token."""
        together = self.able.cache or self.able.batch
        parts = [cells] if together else [[cell] for cell in cells]
        found = []
        for part in parts:
            rows = pad([self.plain[cell.pair] for cell in part], side=self.able.side, pad_id=pad_id(self.model))
            found.append(runner.run(rows, edits=self.edits(part)).logits.float().cpu())
        return torch.cat(found)


class _Begun:
    """Keys and values of the plain prompts up to the position that is patched now; it moves on, from position to position."""

    def __init__(self, runs: PatchedRuns, runner: Runner) -> None:
        self.runs, self.runner = runs, runner
        self.rows: Rows | None = None
        self.cache: Cache | None = None
        self.until = 0
        """The position, counted from the end, before which all tokens are cached."""

    def logits(self, cells: Sequence[Cell], *, checked: bool) -> Float[Tensor, "cell d_vocab"] | None:
        """Logits of cells of one position; None where the plain prompts beside them do not come out as they do alone."""
        plain = [Cell(pair, NOTHING, 0, cells[0].offset) for pair in range(len(self.runs.plain))]
        try:
            self._move_to(self.runs.offsets[cells[0].offset])
            found = self._ends([*cells, *([] if checked else plain)])
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except (
            Exception
        ):  # single tokens after a cache may be all that an architecture takes; a prompt may have no beginning
            return None
        alone, beside = self.runs.plain_logits, found[len(cells) :]
        if not checked and bool(
            ((beside - alone).norm(dim=-1) > tolerance(self.runs.model) * alone.norm(dim=-1)).any()
        ):
            return None
        return found[: len(cells)]

    def _move_to(self, offset: int) -> None:
        """Run the plain prompts up to the position, from where they are."""
        if offset == self.until:
            return
        if self.rows is None:
            rows = pad([ids[:offset] for ids in self.runs.plain], pad_id=pad_id(self.runs.model))
        else:
            rows = self.rows.then(torch.tensor([ids[self.until : offset] for ids in self.runs.plain]))
        self.cache = self.runner.run(rows, cache=self.cache, keep_cache=True).cache
        self.rows, self.until = rows, offset

    def _ends(self, cells: Sequence[Cell]) -> Float[Tensor, "cell d_vocab"]:
        """From the position to the end of the prompt, patched."""
        assert self.rows is not None
        assert self.cache is not None
        pairs = torch.tensor([cell.pair for cell in cells])
        ends = torch.tensor([self.runs.plain[cell.pair][self.until :] for cell in cells])
        rows = self.rows.select(pairs).then(ends)
        found = self.runner.run(rows, edits=self.runs.edits(cells), cache=self.cache.copy().select(pairs))
        return found.logits.float().cpu()
