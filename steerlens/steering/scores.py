"""Steering attention: edits of the scores before the softmax, row by row, and the keys that they are about.

With `s` the scores of a head after scaling, softcap and mask, i a query and j a key, `w` the keys' weights and S the keys where
w = 1 (see `interventions.AttentionIntervention`):

    bias     s_ij + coeff * w_j
    scale    s_ij * coeff, j in S          what scaling the keys gives, for q . (c k) = c (q . k); under a softcap t, which is
                                           taken off and put on again, t * tanh(coeff * atanh(s_ij / t))
    mass     s_ij + log(coeff / m_i), j in S, where m_i = sum_S softmax(s_i) < coeff

Masked keys stay masked. The new share of `mass` is coeff / (1 + coeff - m), which lies in [coeff / (1 + coeff), coeff].

Keys are told by their place in the prompt, through the tokenizer's character offsets; what a cache holds is not touched, so an
edit acts alike whether keys are cached or computed. Tables are built once per batch, and all layers share those of the keys.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens.errors import SteerlensError
from steerlens.models.attention import softcap
from steerlens.models.facts import attn_scores, check_layer, model_device
from steerlens.models.prompts import PromptFormat, encode, token_span
from steerlens.models.rows import Rows
from steerlens.steering.interventions import AttentionIntervention, tables_digest
from steerlens.steering.plan import Plan

# --- keys ------------------------------------------------------------------------------------------------------------


def bind(
    model: Any, plan: Plan, prompt: str, prompt_format: PromptFormat = PromptFormat(), *, what: str = "the prompt"
) -> Plan:
    """The plan whose attention steps know the weight of each token of a prompt; a plan that knows them comes back.

    Args:
        what: What errors call the prompt, such as "row 3".

    Raises:
        SteerlensError: for a span that does not stand in the prompt, or steps that were told of none.

    Example:
        >>> plan = bind(model, sl.instaboost(2.0, on="Use capitals."), "Describe rain. Use capitals.")
        >>> plan.attention[0].weights
        (0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0)
    """
    if all(step.weights is not None for step in plan.attention):
        return plan

    def bound(step: Any) -> Any:
        if not isinstance(step, AttentionIntervention) or step.weights is not None:
            return step
        return replace(step, weights=key_weights(model, step, prompt, prompt_format, what=what))

    return plan.each(bound)


def key_weights(
    model: Any, step: AttentionIntervention, prompt: str, prompt_format: PromptFormat, *, what: str
) -> tuple[float, ...]:
    """The weight of each token of a prompt under a step's spans, sections and exemptions."""
    length = len(encode(model, prompt, prompt_format))
    if step.spans is None:
        raise SteerlensError(
            f"attention is steered towards an instruction, and {what} was not told which; give plan.on(pair), or texts that "
            f"stand in the prompt: plan.on('Use capitals.'), got {prompt[:60]!r}"
        )
    count = torch.zeros(length)
    sections = [_sections(step, part, prompt, what) for part in step.spans]
    for section in sections:
        for low, high in section:
            start, stop = token_span(model, prompt, (low, high), prompt_format)
            count[start : stop + step.extra_tokens] += 1
    if step.sections == "union":
        count, n_sections = count.clamp(max=1), 1
    else:
        n_sections = len(sections)
    own = (0, length)
    if step.placebo is not None or "template" in step.exempt:
        first, last = len(prompt) - len(prompt.lstrip()), len(prompt.rstrip())
        own = token_span(model, prompt, (first, last), prompt_format)
    if step.placebo is not None:
        count = _elsewhere(count, own, step.placebo, what)
    weights = {"span": count, "rest": n_sections - count, "prompt": torch.full((length,), float(n_sections))}[step.keys]
    if "first" in step.exempt:
        weights[0] = 0
    if "template" in step.exempt:
        weights[: own[0]] = weights[own[1] :] = 0
    return tuple(weights.tolist())


def _sections(step: AttentionIntervention, part: Any, prompt: str, what: str) -> list[tuple[int, int]]:
    """The characters of one span: wherever its text stands, or the first time."""
    if not isinstance(part, str):
        return [part]
    found, start = [], prompt.find(part)
    while start >= 0:
        found.append((start, start + len(part)))
        start = -1 if step.sections == "reference" else prompt.find(part, start + 1)
    if not found:
        raise SteerlensError(
            f"a span must stand in its prompt as it is written, and {part[:60]!r} is not in that of {what}, {prompt[:60]!r}; "
            "was the instruction left out of the prompt, or reworded?"
        )
    return found


def _elsewhere(count: Float[Tensor, " pos"], own: tuple[int, int], seed: int, what: str) -> Float[Tensor, " pos"]:
    """As many other tokens of the prompt's own text, at random, or all of them where there are fewer; never those of the span,
    of the template, or the first, which many heads rest on."""
    n = int((count > 0).sum())
    others = [place for place in range(max(own[0], 1), own[1]) if count[place] == 0]
    if not others:
        raise SteerlensError(
            f"the control of steering attention needs tokens beside the instruction, and the prompt of {what} has none; leave "
            "the control out"
        )
    drawn = torch.zeros_like(count)
    drawn[random.Random(f"{seed} {len(count)} {n}").sample(others, min(n, len(others)))] = 1
    return drawn


# --- the edit --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class KeyTables:
    """The nth step on attention of each row: how strong, on which keys, for which queries; shared by all layers."""

    bias: Float[Tensor, " row"]
    log_scale: Float[Tensor, " row"]
    target: Float[Tensor, " row"]
    weights: Float[Tensor, "row prompt_and_one"]
    """Of each token of the prompt; the last column is that of padding and of generated tokens, 0."""
    low: Int[Tensor, " row"]
    high: Int[Tensor, " row"]
    """The first query that is steered, and the first after it that is not."""
    pooled_queries: Bool[Tensor, " row"]
    pooled_heads: Bool[Tensor, " row"]
    prompt_lengths: Int[Tensor, " row"]
    memo: dict[str, Any] = field(default_factory=dict, init=False)
    """What the layers of one pass, or of one selection, share."""

    @property
    def tables(self) -> list[Tensor]:
        return [getattr(self, one.name) for one in fields(self) if one.init]

    @property
    def kinds(self) -> tuple[bool, bool, bool, bool]:
        """Whether any row has a bias, a scale, a target, and pools; found out once, since that waits for a GPU."""
        if "kinds" not in self.memo:
            tables = (self.bias, self.log_scale, self.target, self.pooled_queries | self.pooled_heads)
            self.memo["kinds"] = tuple(bool(table.any()) for table in tables)
        found: tuple[bool, bool, bool, bool] = self.memo["kinds"]
        return found

    def of_pass(self, rows: Rows) -> "KeysOfPass":
        """What the tables come to for the keys and the queries of a pass."""
        if self.memo.get("rows") is not rows:
            keys, queries = rows.key_positions, rows.positions
            last = self.weights.shape[1] - 1
            weights = self.weights.gather(1, keys.masked_fill((keys < 0) | (keys > last), last))[:, None, None, :]
            steered = (queries >= self.low[:, None]) & (queries < self.high[:, None]) & (queries >= 0)
            steered = steered[:, None, :, None]
            in_prompt = (queries >= 0) & (queries < self.prompt_lengths[:, None])
            chosen = weights != 0
            # A kind of step that no row has costs nothing at any layer.
            tables = zip((self.bias, self.log_scale, self.target), self.kinds, strict=False)
            bias, log_scale, target = (table[:, None, None, None] if some else None for table, some in tables)
            self.memo.update(
                rows=rows,
                found=KeysOfPass(
                    added=None if bias is None else bias * weights * steered,
                    log_factor=None if log_scale is None else log_scale * chosen * steered,
                    target=None if target is None else target * steered,
                    chosen=chosen,
                    in_prompt=in_prompt,
                ),
            )
        found: KeysOfPass = self.memo["found"]
        return found

    def select(self, keep: Int[Tensor, " kept"]) -> "KeyTables":
        """The tables of some rows; every layer selects the same ones."""
        if self.memo.get("keep") is not keep:
            chosen = keep.to(self.bias.device)
            self.memo.update(keep=keep, selected=KeyTables(*(table[chosen] for table in self.tables)))
        selected: KeyTables = self.memo["selected"]
        return selected


@dataclass(frozen=True, eq=False)
class KeysOfPass:
    """The same for one pass; None for what no row has."""

    added: Float[Tensor, "row 1 query key"] | None
    log_factor: Float[Tensor, "row 1 query key"] | None
    target: Float[Tensor, "row 1 query 1"] | None
    chosen: Bool[Tensor, "row 1 1 key"]
    in_prompt: Bool[Tensor, "row query"]
    memo: dict[tuple[int, torch.device], "KeysOfPass"] = field(default_factory=dict, init=False)
    """What layers of the same width and place share."""

    def at(self, scores: Float[Tensor, "row head query key"]) -> "KeysOfPass":
        """The last keys, as many as a layer with a window keeps, where its scores are."""
        width, device = scores.shape[-1], scores.device
        if (width, device) in self.memo:
            return self.memo[width, device]

        def part(table: Tensor | None) -> Tensor | None:
            return None if table is None else table[..., -width:].to(device)

        chosen = self.chosen[..., -width:].to(device)
        target = None if self.target is None else self.target.to(device)
        found = KeysOfPass(part(self.added), part(self.log_factor), target, chosen, self.in_prompt.to(device))
        self.memo[width, device] = found
        return found


@dataclass(frozen=True, eq=False)
class ScoreEdit:
    """What happens to the attention scores of each row at one layer; `step` counts a row's attention steps, in order."""

    site: str
    keys: tuple[KeyTables, ...]
    """One per step."""
    heads: tuple[Float[Tensor, "row #head"], ...]
    """Per step, 1 for the heads that it steers; a single column where each row steers all of them or none."""
    strength: Float[Tensor, " row"]
    """The share at which every step acts; see `weakened`."""
    softcap: float | None = None

    def __call__(self, scores: Float[Tensor, "row head query key"], rows: Rows) -> Float[Tensor, "row head query key"]:
        """The scores after every step."""
        for tables, heads in zip(self.keys, self.heads, strict=True):
            scores = self._step(scores, tables, heads, rows)
        return scores

    def _step(self, scores: Tensor, tables: KeyTables, heads: Tensor, rows: Rows) -> Tensor:
        found = tables.of_pass(rows).at(scores)
        share = (heads * self.strength[:, None]).to(scores.device)[:, :, None, None]
        if found.added is not None:
            scores = scores + (share * found.added).to(scores.dtype)
        if found.log_factor is not None:
            scores = scaled(scores, (share * found.log_factor).exp(), self.softcap)
        if found.target is not None:
            mass = log_mass(scores, found.chosen)
            if tables.kinds[3]:
                which = (tables.pooled_queries.to(scores.device), tables.pooled_heads.to(scores.device))
                mass = pooled(mass, found.in_prompt, *which)
            push = ((share * found.target).log() - mass).clamp(min=0.0).masked_fill(mass == float("-inf"), 0.0)
            scores = scores + (push * found.chosen).to(scores.dtype)
        return scores

    @property
    def digest(self) -> str:
        """16 hex digits of the site and of every number in the tables."""
        tables = [*self.heads, self.strength, *(table for keys in self.keys for table in keys.tables)]
        return tables_digest(f"{self.site} {self.softcap}", tables)

    def select(self, keep: Int[Tensor, " kept"]) -> "ScoreEdit":
        """The edit of some rows."""
        chosen = keep.to(self.strength.device)
        return replace(
            self,
            keys=tuple(tables.select(keep) for tables in self.keys),
            heads=tuple(table[chosen] for table in self.heads),
            strength=self.strength[chosen],
        )

    def weakened(self, strength: Float[Tensor, " row"]) -> "ScoreEdit":
        """The edit at a share of its strength: of a bias, a target, or the logarithm of a factor; 0 is none."""
        return replace(self, strength=self.strength * strength.to(self.strength.device))

    def starting(self, low: Int[Tensor, " row"]) -> "ScoreEdit":
        """The edit of the last query, which is at these positions, each row's own."""
        keys = tuple(
            # One query a row is left, and pools with no other.
            replace(
                one,
                low=torch.maximum(one.low, low.to(one.low.device)),
                pooled_queries=torch.zeros_like(one.pooled_queries),
            )
            for one in self.keys
        )
        return replace(self, keys=keys)


def scaled(
    scores: Float[Tensor, "row head query key"],
    factor: Float[Tensor, "#row #head #query key"],
    cap: float | None = None,
) -> Float[Tensor, "row head query key"]:
    """The scores that keys times `factor` give; masked ones stay so.

    >>> scaled(torch.tensor([[[[1.0, -2.0]]]]), torch.tensor([[[[3.0, 1.0]]]])).tolist()
    [[[[3.0, -2.0]]]]
    """
    # A mask times a small factor would be none.
    factor = torch.where(visible(scores), factor, 1.0)
    if cap is None:
        return (scores.float() * factor).to(scores.dtype)
    raw = cap * torch.atanh((scores.float() / cap).clamp(-1 + 1e-6, 1 - 1e-6))
    capped = (cap * torch.tanh(raw * factor / cap)).to(scores.dtype)
    return torch.where(factor == 1, scores, capped)


def log_mass(
    scores: Float[Tensor, "row head query key"], chosen: Bool[Tensor, "row #head #query key"]
) -> Float[Tensor, "row head query 1"]:
    """The logarithm of the share of attention on the chosen keys; minus infinity where none of them is seen.

    >>> log_mass(torch.zeros(1, 1, 1, 4), torch.tensor([[[[True, False, False, False]]]])).exp().item()
    0.25
    """
    seen = scores.float().masked_fill(~visible(scores), float("-inf"))
    total = seen.logsumexp(-1, keepdim=True)
    found = seen.masked_fill(~chosen, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.where(found.isneginf(), found, found - total)


def pooled(
    log_share: Float[Tensor, "row head query 1"],
    in_prompt: Bool[Tensor, "row query"],
    queries: Bool[Tensor, " row"],
    heads: Bool[Tensor, " row"],
) -> Float[Tensor, "row head query 1"]:
    """The logarithm of the mean share over a prompt's queries, over all heads, or over both, where a row asks for it."""
    share = log_share.exp()
    inside = in_prompt[:, None, :, None].to(share.dtype)
    mean = (share * inside).sum(2, keepdim=True) / inside.sum(2, keepdim=True).clamp(min=1)
    share = torch.where(queries[:, None, None, None] & (inside > 0), mean, share)
    share = torch.where(heads[:, None, None, None], share.mean(1, keepdim=True), share)
    return share.log()


def visible(scores: Float[Tensor, "*batch key"]) -> Bool[Tensor, "*batch key"]:
    """Which scores are not masked: a mask is minus infinity, or added as the least number of the dtype."""
    return scores > torch.finfo(scores.dtype).min / 2


# --- from plans ------------------------------------------------------------------------------------------------------


def score_edits(
    model: Any, rows: Sequence[Sequence[AttentionIntervention]], prompt_lengths: Sequence[int]
) -> list[ScoreEdit]:
    """One edit per layer that any row steers; of each row the steps in order, bound to its prompt."""
    rows = [[step for step in steps if step.acts] for steps in rows]
    n_steps = max(map(len, rows), default=0)
    if not n_steps:
        return []
    device = model_device(model)
    slots = [[steps[place] if place < len(steps) else None for steps in rows] for place in range(n_steps)]
    keys = tuple(_key_tables(slot, prompt_lengths, device) for slot in slots)
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    everywhere = any(step.heads is None for steps in rows for step in steps)
    named = {layer for steps in rows for step in steps for layer in step.layers or ()}
    edits = []
    for layer in range(n_layers) if everywhere else sorted(named):
        heads = tuple(narrowed(_head_table(slot, layer, n_heads)).to(device) for slot in slots)
        if any(bool(table.any()) for table in heads):
            cap = softcap(model, layer)
            edits.append(ScoreEdit(attn_scores(layer), keys, heads, torch.ones(len(rows), device=device), cap))
    return edits


def _key_tables(
    slot: Sequence[AttentionIntervention | None], prompt_lengths: Sequence[int], device: torch.device
) -> KeyTables:
    n_rows = len(slot)
    zeros = [torch.zeros(n_rows) for _ in range(3)]
    bias, log_scale, target = zeros
    weights = torch.zeros(n_rows, max(prompt_lengths) + 1)
    low, high = torch.zeros(n_rows, dtype=torch.long), torch.zeros(n_rows, dtype=torch.long)
    queries, heads = torch.zeros(n_rows, dtype=torch.bool), torch.zeros(n_rows, dtype=torch.bool)
    for row, (step, length) in enumerate(zip(slot, prompt_lengths, strict=True)):
        if step is None:
            continue
        if step.weights is None or len(step.weights) != length:
            raise SteerlensError(
                f"steering attention needs the instruction's place among a row's {length} tokens of prompt, and row {row} has "
                f"{'none' if step.weights is None else f'{len(step.weights)} weights'}; give plan.on(...) and the prompt's text"
            )
        weights[row, :length] = torch.tensor(step.weights)
        low[row], high[row] = step.bounds(length)
        queries[row], heads[row] = step.operator == "mass" and step.pool != "row", step.pool == "layer"
        if step.operator == "bias":
            bias[row] = step.coeff
        elif step.operator == "scale":
            log_scale[row] = torch.tensor(step.coeff).log()
        else:
            target[row] = step.coeff
    lengths = torch.tensor(list(prompt_lengths))
    tables = (bias, log_scale, target, weights, low, high, queries, heads, lengths)
    return KeyTables(*(table.to(device) for table in tables))


def narrowed(heads: Float[Tensor, "row head"]) -> Float[Tensor, "row #head"]:
    """The first column alone where the others are the same."""
    return heads[:, :1] if bool((heads == heads[:, :1]).all()) else heads


def _head_table(slot: Sequence[AttentionIntervention | None], layer: int, n_heads: int) -> Float[Tensor, "row head"]:
    table = torch.zeros(len(slot), n_heads)
    for row, step in enumerate(slot):
        if step is None:
            continue
        by_layer = step.by_layer
        if by_layer is None or (layer in by_layer and by_layer[layer] is None):
            table[row] = 1
        elif layer in by_layer:
            table[row, list(by_layer[layer] or ())] = 1
    return table


def check_attention(model: Any, steps: Iterable[AttentionIntervention]) -> None:
    """Refuse steps that the model does not have the layers or heads for.

    Raises:
        SteerlensError: for a layer or head out of range.
    """
    n_heads = int(model.cfg.n_heads)
    for step in steps:
        for layer, heads in (step.by_layer or {}).items():
            check_layer(model, layer)
            if heads and heads[-1] >= n_heads:
                raise SteerlensError(
                    f"head must be in [0, {n_heads}), got {heads[-1]} at layer {layer}; heads count from zero"
                )
