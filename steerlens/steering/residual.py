"""Steering the residual stream: one edit per steered layer, one plan per row of the batch.

    h  <-  h + (offset + slope * (h . read)) * write        at the positions of each step, row by row

A batch of rows with their plans becomes one edit per layer: for each row and each of its interventions there, a direction to
read, a direction to write, an offset and a slope (see `operators.rank_one`), and a window of positions. The tables are built on
the host once per batch; the hook only multiplies and adds, so rows that differ in layer, operator, strength or vector cost the
same as rows that do not. A row without an intervention at a layer has zeros there and comes back bit for bit.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens.errors import ModelError, SteerlensError
from steerlens.models.facts import check_layer, check_origin, resid_post
from steerlens.models.passes import steered_by_caller
from steerlens.models.rows import Rows
from steerlens.steering.operators import rank_one
from steerlens.steering.plan import Intervention, Plan, as_plan


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
        content = hashlib.sha256(self.site.encode())
        for table in self._tables:
            content.update(table.cpu().contiguous().numpy().tobytes())
        return content.hexdigest()[:16]

    def select(self, keep: Int[Tensor, " kept"]) -> "ResidualEdit":
        """The edit of some rows."""
        return ResidualEdit(self.site, *(table.index_select(1, keep.to(table.device)) for table in self._tables))

    @property
    def _tables(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self) if field.name != "site"]


def residual_edits(
    plans: Sequence[Plan], prompt_lengths: Sequence[int], *, d_model: int, device: torch.device | str = "cpu"
) -> list[ResidualEdit]:
    """One edit per layer that any row steers, in float32 on `device`."""
    return [
        _residual_edit(
            resid_post(layer),
            [[step for step in plan.active if step.layer == layer] for plan in plans],
            prompt_lengths,
            d_model,
            device,
        )
        for layer in sorted({step.layer for plan in plans for step in plan.active})
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

    Only passes of the caller's own: `record_activations`, `generate` and `evaluate` run passes of theirs and refuse the block.

    Args:
        plan: One plan for every row, or one per row.
        attention_mask: Of rows padded on either side, where the model is run without it, as right-padded rows may be.
            Default: the mask of each pass, or where it has none, every column is a token. All tokens of a pass count as
            prompt, so "generated" steers none of them: sample with `generate`.

    Raises:
        ModelError, SteerlensError: if the plan does not fit the model (nothing is left behind); inside the block, for a pass that
            goes on from a cache, since its tokens are no prompt.

    Example:
        >>> with steer(model, vector.at(3)):                                 # doctest: +SKIP
        ...     logits = model(tokens)
    """
    plans = [as_plan(one) for one in (plan if isinstance(plan, Sequence) else [plan])]
    if not plans:
        raise SteerlensError("steering needs a plan, or one per row, got none; Plan() is no steering")
    for one in plans:
        check_plan(model, one)
    single = _SinglePass(plans, one_for_all=isinstance(plan, Plan), attention_mask=attention_mask)
    layers = {step.layer for one in plans for step in one.active}
    sites = [resid_post(layer) for layer in sorted(layers)]
    functions = {site: partial(single.edit, site=site) for site in sites}
    with steered_by_caller(model, functions, single.announce):
        yield model


class _SinglePass:
    """Edits that are built from the shape of the pass they meet."""

    def __init__(self, plans: list[Plan], *, one_for_all: bool, attention_mask: Tensor | None) -> None:
        self.plans, self.one_for_all, self.mask = plans, one_for_all, attention_mask
        self.mask_of_pass: Tensor | None = None
        self.rows: Rows | None = None
        self.edits: dict[str, ResidualEdit] = {}

    def announce(self, arguments: Mapping[str, Any]) -> None:
        """A pass begins: its mask is read, and what was built for the last one is gone."""
        cache = arguments.get("past_key_values")
        own = arguments.get("past_kv_cache_entry")  # a HookedTransformer's, as its blocks get it
        if (cache is not None and cache.get_seq_length() > 0) or (own is not None and own.past_keys.shape[1] > 0):
            raise SteerlensError(
                "steer() is for passes over whole prompts, and this one goes on from a cache, where positions would start anew; "
                "sample with generate(steering=plan)"
            )
        mask = arguments.get("attention_mask")
        self.mask_of_pass = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.rows = None

    def edit(self, resid: Tensor, hook: Any, site: str) -> Tensor:
        # The first hook of a pass meets its shape; the layers after it, and passes of one shape, share the tables.
        if self.rows is None or self.rows.tokens.shape != resid.shape[:2]:
            self._set_up(resid)
        assert self.rows is not None
        return self.edits[site](resid, self.rows)

    def _set_up(self, resid: Tensor) -> None:
        batch, width = resid.shape[:2]
        plans = self.plans * batch if self.one_for_all else self.plans
        mask = self.mask_of_pass if self.mask is None else self.mask
        mask = torch.ones(batch, width, dtype=torch.long) if mask is None else mask.long()
        if len(plans) != batch or tuple(mask.shape) != (batch, width):
            raise SteerlensError(
                f"steering was set up for {len(plans)} rows and a mask of shape {list(mask.shape)}, and the model was run on "
                f"{[batch, width]}; give one plan, or one per row, and the mask of the same tokens"
            )
        lengths = tuple(mask.sum(1).tolist())
        with torch.inference_mode(False):  # tensors made in it could not be part of a later pass with gradients
            self.rows = Rows(torch.zeros_like(mask), mask.clone(), lengths).to(resid.device)
            edits = residual_edits(plans, lengths, d_model=resid.shape[-1], device=resid.device)
        self.edits = {edit.site: edit for edit in edits}
