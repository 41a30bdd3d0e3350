"""What plans do to a model: their edits, for batches of rows and for passes of the caller's own.

A plan's interventions become one edit per layer of the residual stream and one per layer of attention scores (see `residual` and
`scores`), each serving every row of a batch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from steerlens.errors import ModelError, SteerlensError
from steerlens.models.attention import check_attention_abilities
from steerlens.models.backends import per_head
from steerlens.models.facts import attn_scores, check_layer, check_origin, model_device, resid_post
from steerlens.models.passes import steered_by_caller
from steerlens.models.rows import Rows
from steerlens.steering.interventions import AttentionIntervention, Intervention
from steerlens.steering.plan import Plan, Step, as_plan
from steerlens.steering.residual import ResidualEdit, residual_edits
from steerlens.steering.scores import ScoreEdit, check_attention, score_edits

PlanEdit = ResidualEdit | ScoreEdit


def plan_edits(model: Any, rows: Sequence[Iterable[Step]], prompt_lengths: Sequence[int]) -> list[PlanEdit]:
    """One edit per site that any row steers; of each row the interventions, those on attention bound to its prompt.

    Raises:
        SteerlensError: for a step on attention that was not bound to the row's prompt.
    """
    steps = [list(row) for row in rows]
    residual = [[step for step in row if isinstance(step, Intervention)] for row in steps]
    attention = [[step for step in row if isinstance(step, AttentionIntervention)] for row in steps]
    d_model, device = int(model.cfg.d_model), model_device(model)
    return [
        *residual_edits(residual, prompt_lengths, d_model=d_model, device=device),
        *score_edits(model, attention, prompt_lengths),
    ]


def edited_sites(model: Any, plans: Iterable[Plan]) -> set[str]:
    """The hook points that plans edit."""
    sites: set[str] = set()
    for plan in plans:
        for step in plan.active:
            if isinstance(step, Intervention):
                sites.add(resid_post(step.layer))
            else:
                layers = range(int(model.cfg.n_layers)) if step.layers is None else step.layers
                sites.update(map(attn_scores, layers))
    return sites


def check_plan(model: Any, plan: Plan) -> None:
    """Refuse a plan that does not fit the model.

    Raises:
        ModelError: if a direction has another width, or comes from a model of another depth or coordinate frame; or if the
            model's attention cannot be edited.
        SteerlensError: if a layer or head is out of range.
    """
    d_model = int(model.cfg.d_model)
    if plan.attention:
        check_attention(model, plan.attention)
        check_attention_abilities(model, scales=any(step.operator == "scale" for step in plan.attention))
    for step in plan.residual:
        check_origin(model, step.origin)
        check_layer(model, step.layer)
        if step.direction.shape[0] != d_model:
            raise ModelError(
                f"a direction's width must be the model's d_model {d_model}, got {step.direction.shape[0]}; "
                "fit the vector in this model"
            )


def require_ungated(plan: Plan) -> None:
    """Refuse a plan with a gate, where a single pass is to be steered.

    Raises:
        SteerlensError: if it has one.
    """
    if plan.active.gate is not None:
        raise SteerlensError(
            "a gate compares passes for every new token, and a single pass is steered here; sample with generate(steering=plan)"
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
        plan: One plan for every row, or one per row; steps on attention bound to the row's prompt, see `scores.bind`.
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
        require_ungated(one)
    single = _SinglePass(model, plans, one_for_all=isinstance(plan, Plan), attention_mask=attention_mask)
    functions = {site: partial(single.edit, site=site) for site in sorted(edited_sites(model, plans))}
    with steered_by_caller(model, functions, single.announce):
        yield model


class _SinglePass:
    """Edits that are built from the shape of the pass they meet."""

    def __init__(self, model: Any, plans: list[Plan], *, one_for_all: bool, attention_mask: Tensor | None) -> None:
        self.model, self.plans, self.one_for_all, self.mask = model, plans, one_for_all, attention_mask
        self.mask_of_pass: Tensor | None = None
        self.rows: Rows | None = None
        self.edits: dict[str, PlanEdit] = {}

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

    def edit(self, activation: Tensor, hook: Any, site: str) -> Tensor:
        # The first hook of a pass meets its shape; the layers after it, and passes of one shape, share the tables.
        shape = activation.shape[:: 2 if per_head(site) else 1][:2]
        if self.rows is None or self.rows.tokens.shape != shape:
            self._set_up(shape, activation.device)
        assert self.rows is not None
        return self.edits[site](activation, self.rows) if site in self.edits else activation

    def _set_up(self, shape: torch.Size, device: torch.device) -> None:
        batch, width = shape
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
            self.rows = Rows(torch.zeros_like(mask), mask.clone(), lengths).to(device)
            edits = plan_edits(self.model, plans, lengths)
        self.edits = {edit.site: edit for edit in edits}
