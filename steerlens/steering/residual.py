"""Steering the residual stream: one edit per steered layer, one plan per row of the batch.

    h  <-  h + (offset + slope * (h . read)) * write        at the positions of each step, row by row

A batch of rows with their plans becomes one edit per layer: for each row and each of its interventions there, a direction to
read, a direction to write, an offset and a slope (see `operators.rank_one`), and a window of positions. The tables are built on
the host once per batch; the hook only multiplies and adds, so rows that differ in layer, operator, strength or vector cost the
same as rows that do not. A row without an intervention at a layer has zeros there and comes back bit for bit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens.models.facts import resid_post
from steerlens.models.rows import Rows
from steerlens.steering.interventions import Intervention, tables_digest
from steerlens.steering.operators import rank_one
from steerlens.steering.positions import FOREVER


@dataclass(frozen=True, eq=False)
class ResidualEdit:
    """What happens to each row at one layer; `step` counts a row's interventions there, in order."""

    site: str
    read: Float[Tensor, "step row d_model"]
    write: Float[Tensor, "step row d_model"]
    offset: Float[Tensor, "step row"]
    slope: Float[Tensor, "step row"]
    low: Int[Tensor, "step row"]
    """The first position that a step changes."""
    high: Int[Tensor, "step row"]
    """The first position after it that the step leaves alone."""
    reads: bool = field(kw_only=True)
    """Whether any slope is not 0, so that what is there already matters."""
    ends: bool = field(kw_only=True)
    """Whether any step leaves a position alone that a row may come to."""
    memo: dict[torch.device, list["_Step"]] = field(default_factory=dict, init=False, repr=False)
    """The tables of each step, ready for the pass; layers may live on several devices."""

    def __call__(self, activation: Float[Tensor, "row pos d_model"], rows: Rows) -> Float[Tensor, "row pos d_model"]:
        """The residual after every step of this layer; padding, below position zero, is never changed."""
        device = activation.device
        if device not in self.memo:
            with torch.inference_mode(False):  # copies made in it could not be part of a later pass with gradients
                self.memo[device] = self._steps(device)
        positions = rows.positions.to(device)
        for step in self.memo[device]:
            activation = step(activation, positions)
        return activation

    def _steps(self, device: torch.device) -> list["_Step"]:
        found = []
        for tables in zip(*(table.to(device) for table in self._tables), strict=True):
            read, write, offset, slope, low, high = (table[:, None] for table in tables)
            push = None if self.reads else offset[..., None] * write
            found.append(_Step(read, write, offset, slope, push, low, high if self.ends else None))
        return found

    @property
    def digest(self) -> str:
        """16 hex digits of the site and of every number in the tables."""
        return tables_digest(self.site, self._tables)

    def select(self, keep: Int[Tensor, " kept"]) -> "ResidualEdit":
        """The edit of some rows."""
        tables = (table.index_select(1, keep.to(table.device)) for table in self._tables)
        return ResidualEdit(self.site, *tables, reads=self.reads, ends=self.ends)

    def weakened(self, strength: Float[Tensor, " row"]) -> "ResidualEdit":
        """The edit at a share of its strength, of each row's own; 0 is none."""
        share = strength.to(self.offset.device)
        return replace(self, offset=self.offset * share, slope=self.slope * share)

    def starting(self, low: Int[Tensor, " row"]) -> "ResidualEdit":
        """The edit from these positions on, each row's own."""
        return replace(self, low=torch.maximum(self.low, low.to(self.low.device)))

    @property
    def _tables(self) -> list[Tensor]:
        return [self.read, self.write, self.offset, self.slope, self.low, self.high]


@dataclass(frozen=True, eq=False)
class _Step:
    """A step of each row, its tables as wide as the activation where that differs by position."""

    read: Float[Tensor, "row 1 d_model"]
    write: Float[Tensor, "row 1 d_model"]
    offset: Float[Tensor, "row 1"]
    slope: Float[Tensor, "row 1"]
    push: Float[Tensor, "row 1 d_model"] | None
    """What is added, where no slope is."""
    low: Int[Tensor, "row 1"]
    high: Int[Tensor, "row 1"] | None
    """None where no step ends."""

    def __call__(
        self, activation: Float[Tensor, "row pos d_model"], positions: Int[Tensor, "row pos"]
    ) -> Float[Tensor, "row pos d_model"]:
        inside: Bool[Tensor, "row pos"] = positions >= self.low
        if self.high is not None:
            inside = inside & (positions < self.high)
        if self.push is not None:
            return activation + (self.push * inside[..., None]).to(activation.dtype)
        return rank_one(activation, self.read, self.write, self.offset * inside, self.slope * inside)


def residual_edits(
    rows: Sequence[Iterable[Intervention]],
    prompt_lengths: Sequence[int],
    *,
    d_model: int,
    device: torch.device | str = "cpu",
) -> list[ResidualEdit]:
    """One edit per layer that any row steers, in float32 on `device`; of each row the interventions in order."""
    rows = [[step for step in steps if step.acts] for steps in rows]
    return [
        _residual_edit(
            resid_post(layer),
            [[step for step in steps if step.layer == layer] for steps in rows],
            prompt_lengths,
            d_model,
            device,
        )
        for layer in sorted({step.layer for steps in rows for step in steps})
    ]


def _residual_edit(
    site: str,
    rows: list[list[Intervention]],
    prompt_lengths: Sequence[int],
    d_model: int,
    device: torch.device | str,
) -> ResidualEdit:
    shape = (max(map(len, rows)), len(rows))
    read, write = torch.zeros(*shape, d_model), torch.zeros(*shape, d_model)
    offset, slope = torch.zeros(shape), torch.zeros(shape)
    low, high = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for row, (steps, length) in enumerate(zip(rows, prompt_lengths, strict=True)):
        for index, step in enumerate(steps):
            read[index, row] = step.direction
            write[index, row] = step.direction if step.write is None else step.write
            offset[index, row], slope[index, row] = step.affine
            low[index, row], high[index, row] = step.bounds(length)
    acts = (offset != 0) | (slope != 0)
    reads, ends = bool(slope.any()), bool((high < FOREVER)[acts].any())
    tables = (table.to(device) for table in (read, write, offset, slope, low, high))
    return ResidualEdit(site, *tables, reads=reads, ends=ends)
