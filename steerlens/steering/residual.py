"""Steering through hook points: one hook per steered layer, one plan per row of the batch.

A batch of rows with their plans becomes one table per layer: for each row and each of its interventions there, a direction to
read, a direction to write, an offset and a slope (see `operators.rank_one`), and a window of positions. Tables are built on the
host once per batch; a hook only multiplies and adds, so rows that differ in layer, operator, strength or vector cost the same
as rows that do not. A row without an intervention at a layer has zeros there and comes back bit for bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens.errors import ModelError, SteerlensError
from steerlens.models.facts import check_layer, check_origin, resid_post
from steerlens.models.rows import token_positions
from steerlens.steering.operators import rank_one
from steerlens.steering.plan import Intervention, Plan, as_plan


@dataclass(frozen=True, eq=False)
class LayerTable:
    """What happens to each row at one layer; `step` counts a row's interventions there, in order."""

    read: Float[Tensor, "step batch d_model"]
    write: Float[Tensor, "step batch d_model"]
    offset: Float[Tensor, "step batch"]
    slope: Float[Tensor, "step batch"]
    low: Int[Tensor, "step batch"]
    high: Int[Tensor, "step batch"]

    def apply(
        self, resid: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual after every step of this layer; positions below zero are padding and never steered."""
        for read, write, offset, slope, low, high in zip(
            self.read, self.write, self.offset, self.slope, self.low, self.high, strict=True
        ):
            inside: Bool[Tensor, "batch pos"] = (positions >= low[:, None]) & (positions < high[:, None])
            resid = rank_one(resid, read[:, None], write[:, None], offset[:, None] * inside, slope[:, None] * inside)
        return resid

    def rows(self, keep: Int[Tensor, " kept"]) -> "LayerTable":
        """The table of some rows."""
        parts = (getattr(self, name) for name in self.__dataclass_fields__)
        return LayerTable(*(part.index_select(1, keep.to(part.device)) for part in parts))


def build_tables(
    plans: Sequence[Plan], prompt_lengths: Sequence[int], *, d_model: int, device: torch.device | str = "cpu"
) -> dict[int, LayerTable]:
    """One table per layer that any row steers, in float32 on `device`."""
    return {
        layer: _build_table(
            [[step for step in plan.active if step.layer == layer] for plan in plans],
            prompt_lengths,
            d_model,
            device,
        )
        for layer in sorted({step.layer for plan in plans for step in plan.active})
    }


def _build_table(
    rows: list[list[Intervention]], prompt_lengths: Sequence[int], d_model: int, device: torch.device | str
) -> LayerTable:
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
    return LayerTable(*(tensor.to(device) for tensor in (read, write, offset, slope, low, high)))


class Steering:
    """What the hooks of one call read: the current batch's tables and positions. Only the sampling loop changes it."""

    def __init__(self, tables: dict[int, LayerTable]) -> None:
        self.tables = tables
        self.positions: Tensor | None = None

    def rows(self, keep: Int[Tensor, " kept"]) -> None:
        """Go on with some of the rows."""
        if self.positions is not None:
            self.positions = self.positions[keep.to(self.positions.device)]
        self.tables = {layer: table.rows(keep) for layer, table in self.tables.items()}

    def hooks(self) -> list[tuple[str, Any]]:
        """Hooks for `model.hooks(fwd_hooks=...)`, one per steered layer."""
        return [(resid_post(layer), partial(self._steer, layer=layer)) for layer in self.tables]

    def _steer(self, resid: Tensor, hook: Any, layer: int) -> Tensor:
        assert self.positions is not None
        if self.positions.shape != resid.shape[:2]:
            raise SteerlensError(
                f"steering was set up for tokens of shape {list(self.positions.shape)}, and the model was run on "
                f"{list(resid.shape[:2])}; run the tokens that were announced, or use generate() to sample"
            )
        table = self.tables[layer]
        if table.read.device != resid.device:  # layers may live on several devices
            table = LayerTable(*(getattr(table, name).to(resid.device) for name in table.__dataclass_fields__))
            self.tables[layer] = table
        return table.apply(resid, self.positions.to(resid.device))


def check_plan(model: Any, plan: Plan) -> None:
    """Refuse a plan that does not fit the model.

    Raises:
        ModelError: if a direction has another width, or comes from a model of another depth or coordinate frame.
        SteerlensError: if a layer is out of range.
    """
    d_model = int(model.cfg.d_model)
    for step in plan:
        check_origin(model, step.origin)
        check_layer(model, step.layer)
        if step.direction.shape[0] != d_model:
            raise ModelError(
                f"a direction's width must be the model's d_model {d_model}, got {step.direction.shape[0]}; "
                "fit the vector in this model"
            )


@contextmanager
def steer(
    model: Any,
    plan: Plan | Sequence[Plan],
    *,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> Iterator[Any]:
    """Steer every single forward pass inside the block; on any exit the model is as it was.

    Args:
        plan: One plan for every row, or one per row.
        attention_mask: The mask that the model is run with, where rows are padded on the left. Without it every column is a
            token. All tokens of a pass count as prompt, so "generated" steers none of them: sample with `generate`.

    Raises:
        ModelError, SteerlensError: if the plan does not fit the model (nothing is left behind).

    Example:
        >>> with steer(model, vector.at(3)):                                 # doctest: +SKIP
        ...     logits = model(tokens)
    """
    plans = [as_plan(one) for one in (plan if isinstance(plan, Sequence) else [plan])]
    for one in plans:
        check_plan(model, one)
    single = _SinglePass(model, plans, one_for_all=isinstance(plan, Plan), attention_mask=attention_mask)
    with model.hooks(fwd_hooks=single.hooks()):
        yield model


class _SinglePass:
    """Hooks that build their tables from the shape of the pass they meet."""

    def __init__(self, model: Any, plans: list[Plan], *, one_for_all: bool, attention_mask: Tensor | None) -> None:
        self.model, self.plans, self.one_for_all, self.mask = model, plans, one_for_all, attention_mask
        self.steering: Steering | None = None

    def hooks(self) -> list[tuple[str, Any]]:
        layers = sorted({step.layer for plan in self.plans for step in plan.active})
        return [(resid_post(layer), partial(self._steer, layer=layer)) for layer in layers]

    def _steer(self, resid: Tensor, hook: Any, layer: int) -> Tensor:
        if self.steering is None or self.steering.positions is None or self.steering.positions.shape != resid.shape[:2]:
            self.steering = self._set_up(resid)
        return self.steering._steer(resid, hook, layer)

    def _set_up(self, resid: Tensor) -> Steering:
        batch, width = resid.shape[:2]
        plans = self.plans * batch if self.one_for_all else self.plans
        mask = torch.ones(batch, width, dtype=torch.long) if self.mask is None else self.mask.cpu()
        if len(plans) != batch or tuple(mask.shape) != (batch, width):
            raise SteerlensError(
                f"steering was set up for {len(plans)} rows and a mask of shape {list(mask.shape)}, and the model was run on "
                f"{[batch, width]}; give one plan, or one per row, and the mask of the same tokens"
            )
        steering = Steering(build_tables(plans, mask.sum(1).tolist(), d_model=resid.shape[-1], device=resid.device))
        steering.positions = token_positions(mask)
        return steering
