"""Steering the residual stream: one edit per steered layer, one plan per row of the batch.

    h  <-  h + (offset + slope * (h . read)) * write        at the positions of each step, row by row

A batch of rows with their plans becomes one edit per layer: for each row and each of its interventions there, a direction to
read, a direction to write, an offset and a slope (see `operators.rank_one`), and a window of positions. The tables are built on
the host once per batch; the hook only multiplies and adds, so rows that differ in layer, operator, strength or vector cost the
same as rows that do not. A row without an intervention at a layer has zeros there and comes back bit for bit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens.models.facts import resid_post
from steerlens.models.rows import Rows
from steerlens.steering.interventions import Intervention, tables_digest
from steerlens.steering.operators import rank_one


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

    def __call__(self, activation: Float[Tensor, "row pos d_model"], rows: Rows) -> Float[Tensor, "row pos d_model"]:
        """The residual after every step of this layer; padding, below position zero, is never changed."""
        positions = rows.positions.to(activation.device)
        tables = (table.to(activation.device) for table in self._tables)  # layers may live on several devices
        for read, write, offset, slope, low, high in zip(*tables, strict=True):
            inside: Bool[Tensor, "row pos"] = (positions >= low[:, None]) & (positions < high[:, None])
            activation = rank_one(
                activation, read[:, None], write[:, None], offset[:, None] * inside, slope[:, None] * inside
            )
        return activation

    @property
    def digest(self) -> str:
        """16 hex digits of the site and of every number in the tables."""
        return tables_digest(self.site, self._tables)

    def select(self, keep: Int[Tensor, " kept"]) -> "ResidualEdit":
        """The edit of some rows."""
        return ResidualEdit(self.site, *(table.index_select(1, keep.to(table.device)) for table in self._tables))

    def weakened(self, strength: Float[Tensor, " row"]) -> "ResidualEdit":
        """The edit at a share of its strength, of each row's own; 0 is none."""
        share = strength.to(self.offset.device)
        return replace(self, offset=self.offset * share, slope=self.slope * share)

    def starting(self, low: Int[Tensor, " row"]) -> "ResidualEdit":
        """The edit from these positions on, each row's own."""
        return replace(self, low=torch.maximum(self.low, low.to(self.low.device)))

    @property
    def _tables(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self) if field.name != "site"]


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
    return ResidualEdit(site, *(table.to(device) for table in (read, write, offset, slope, low, high)))
