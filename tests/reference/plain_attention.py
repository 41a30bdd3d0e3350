"""Greedy text under edited attention the slow way: one prompt, no cache, the whole prefix again for every token.

With s_ij the attention score of query row i and key j after scaling, softcap and causal mask, k_j the key after rotary
positions, P the keys of the prompt and I those of the spans in it,

    pasta       s_ij + log(alpha)            j in P without I ("exclude"), or in P ("generation")
                s_ij - log(alpha)            j in P without I ("include")
    instaboost  s_ij + bias                  j in I
    spotlight   s_ij + log(target / psi)     j in I, where psi = (mass on I) / (mass on all keys) is below the target
    scale_keys  alpha k_j                    j in I, before the product with the queries

and then softmax, in float32, and the product with the values. Keys of generated tokens are never touched; every query row is
affected, the prompt's own, too. The model is a Hugging Face decoder whose attention is `attend` below: see `load_plain`. This
is the oracle for every batch, cache and backend; it shares no code with steerlens.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import eager_mask

from tests.reference.plain_loop import PlainText, greedy

Spans = Sequence[tuple[int, int]]
"""Half-open token spans of the prompt, counted from its first token."""

Edit = Callable[[int, torch.Tensor], torch.Tensor]
"""From a layer's scores `[1, n_heads, q, k]`, or its keys `[1, n_kv_heads, k, d_head]`, to those it uses instead."""


def untouched(layer: int, tensor: torch.Tensor) -> torch.Tensor:
    """No edit."""
    return tensor


@dataclass(frozen=True)
class Change:
    """What a pass does to attention."""

    scores: Edit = untouched
    """On scores in float32 with the mask added: masked ones are near the dtype's smallest number."""
    keys: Edit = untouched
    """On keys after rotary positions and any norm of their own."""
    layers: frozenset[int] | None = None
    """Where; None for all layers."""
    newest: bool = False
    """Only the last query row: every earlier row, and so every earlier key and value of the next layers, is as in the model's
    own pass. This is a pass of one token over an unedited cache. The edit of scores is shown that row alone."""

    def at(self, layers: Collection[int], *, newest: bool = False) -> "Change":
        """The same in these layers."""
        return replace(self, layers=frozenset(layers), newest=newest)


NOTHING = Change()


# --- the edits -----------------------------------------------------------------------------------------------------


def with_tokens(spans: Spans) -> list[tuple[int, int]]:
    """The spans that hold a token."""
    return [(start, stop) for start, stop in spans if start < stop]


def on_spans(n_keys: int, spans: Spans) -> torch.Tensor:
    """Which keys the union of the spans holds, `[k]`."""
    held = torch.zeros(n_keys, dtype=torch.bool)
    for start, stop in spans:
        held[start:stop] = True
    return held


def pasta_bias(
    alpha: float, position: str, spans: Spans, prompt_length: int, n_keys: int, *, mode: str, exempt: Collection[int]
) -> torch.Tensor:
    """What PASTA adds to the scores of each key, `[k]`; see `pasta`."""
    bias = torch.zeros(n_keys)
    prompt = slice(0, prompt_length)
    sections = with_tokens(spans)
    if not sections:
        return bias
    if mode == "union":
        outside = ~on_spans(n_keys, sections)
        outside[prompt_length:] = False
        if position == "exclude":
            bias[outside] += math.log(alpha)
        elif position == "include":
            bias[outside] -= math.log(alpha)
        elif position == "generation":
            bias[prompt] += math.log(alpha)
        else:
            raise AssertionError(position)
    elif mode == "reference":
        for start, stop in sections:
            if position == "exclude":
                bias[:start] += math.log(alpha)
                bias[stop:prompt_length] += math.log(alpha)
            elif position == "include":
                bias[start:stop] += math.log(alpha)
            elif position == "generation":
                bias[prompt] += math.log(alpha)
            else:
                raise AssertionError(position)
        if position == "include":
            bias[prompt] -= math.log(alpha)
    else:
        raise AssertionError(mode)
    bias[sorted(exempt)] = 0.0
    return bias


def pasta(
    alpha: float,
    spans: Spans,
    *,
    prompt_length: int,
    position: str = "exclude",
    heads: Mapping[int, Sequence[int]] | Sequence[int] | None = None,
    mode: str = "union",
    exempt: Collection[int] = (),
) -> Change:
    """PASTA: s_ij + b_j, with L = log(alpha), G the union of the spans, and P the prompt's keys.

        union       exclude      b_j = +L for j in P outside G
                    include      b_j = -L for j in P outside G: exclude with 1 / alpha
                    generation   b_j = +L for j in P
        reference   exclude      b_j = +L times the number of spans that do not hold j, for j in P
                    include      b_j = +L times the number of spans that hold j, less L, for j in P
                    generation   b_j = +L times the number of spans, for j in P

    "reference" sums over spans as the published code does. b_j is 0 for generated keys and for the exempt positions. Where no
    span holds a token nothing is changed, whatever the position and the mode.

    Args:
        heads: Query heads of each layer, or layers, of which all heads; None for all.
    """

    def edit(layer: int, scores: torch.Tensor) -> torch.Tensor:
        n_heads, n_keys = scores.shape[1], scores.shape[-1]
        if heads is None:
            steered = list(range(n_heads))
        elif isinstance(heads, Mapping):
            steered = list(heads.get(layer, ()))
        else:
            steered = list(range(n_heads)) if layer in heads else []
        edited = scores.clone()
        edited[:, steered] += pasta_bias(alpha, position, spans, prompt_length, n_keys, mode=mode, exempt=exempt)
        return edited

    return Change(scores=edit)


def instaboost(bias: float, spans: Spans) -> Change:
    """InstABoost: s_ij + bias for j in the union of the spans, in all layers and heads."""
    return Change(scores=lambda layer, scores: scores + bias * on_spans(scores.shape[-1], spans))


def log_mean_mass(log_psi: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """log of (sum of mass on the span) / (sum of all mass), pooled over dims: every row of a softmax has a mass of 1."""
    n_rows = math.prod(log_psi.shape[dim] for dim in dims)
    return log_psi.logsumexp(dims, keepdim=True) - math.log(n_rows)


def spotlight(target: float, spans: Spans, *, granularity: str = "row", prompt_length: int | None = None) -> Change:
    """SpotLight: where psi < target, s_ij + log(target / psi) for j in the spans, in all layers and heads.

        row     psi_hi = sum_{j in I} A_hij, for each head h and query row i by itself
        head    psi_h  = mean over the rows i of a group of psi_hi
        layer   psi    = mean over the rows i of a group, and all heads, of psi_hi

    A is the model's own softmax(s), so that all mass on keys is 1 for each row. The prompt's rows are one group, those before
    the span included, and each generated row is a group of its own: what a cached run computes that takes the prompt in one
    pass and then one row at a time. Where psi is 0, as in rows that come before the span, nothing is changed. The mass after
    it is psi' = target / (1 - psi + target) in a row with its own psi: never above the target, and at least
    target / (1 + target).
    """

    def edit(layer: int, scores: torch.Tensor) -> torch.Tensor:
        held = on_spans(scores.shape[-1], spans)
        hidden = scores < torch.finfo(scores.dtype).min / 2
        log_all = scores.masked_fill(hidden, -math.inf).logsumexp(-1)
        log_span = scores.masked_fill(hidden | ~held, -math.inf).logsumexp(-1)
        log_psi = log_span - log_all  # [1, n_heads, q]
        if granularity != "row":
            assert prompt_length is not None
            rows = range(scores.shape[-2])
            for group in [rows[:prompt_length], *([row] for row in rows[prompt_length:])]:
                dims = {"head": (2,), "layer": (1, 2)}[granularity]
                log_psi[:, :, list(group)] = log_mean_mass(log_psi[:, :, list(group)], dims)
        is_low = (log_psi > -math.inf) & (log_psi < math.log(target))
        boost = torch.where(is_low, math.log(target) - log_psi, 0.0)
        return scores + boost[..., None] * held

    return Change(scores=edit)


def scale_keys(alpha: float, spans: Spans, layers: Collection[int] | None = None) -> Change:
    """Keys times alpha: s_ij = q_i . (alpha k_j) for j in the union of the spans, in all heads of the layers; None for all.

    Values stay as they are. The factor comes before the product, and so before a softcap.
    """

    def edit(layer: int, keys: torch.Tensor) -> torch.Tensor:
        factor = torch.where(on_spans(keys.shape[-2], spans), alpha, 1.0)
        return keys * factor[:, None].to(keys.dtype)

    return Change(keys=edit, layers=None if layers is None else frozenset(layers))


# --- attention, and the model with it ------------------------------------------------------------------------------


@dataclass
class Watched:
    """A change that is passed down to `attend`, and what `attend` noted."""

    change: Change
    patterns: list[torch.Tensor] = field(default_factory=list)
    n_changed: int = 0


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    plain: Watched,
    scaling: float,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(edit(q k^T scaling + mask)) v, in the form that transformers asks of an attention function.

    Args:
        query: `[1, n_heads, q, d_head]`.
        key: `[1, n_kv_heads, k, d_head]`; each key-value head serves the same number of query heads in a row.
        attention_mask: 0 or the dtype's smallest number, added to the scores after the softcap.

    Returns:
        What o_proj reads, `[1, q, n_heads, d_head]`, and the pattern, `[1, n_heads, q, k]`.
    """
    layer, change = module.layer_idx, plain.change
    n_shared = query.shape[1] // key.shape[1]

    def scores_of(keys: torch.Tensor) -> torch.Tensor:
        scores = query @ keys.repeat_interleave(n_shared, dim=1).mT * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        return (scores + attention_mask).float()

    raw = scores_of(key)
    edited = raw.clone()
    if change.layers is None or layer in change.layers:
        rows = slice(-1, None) if change.newest else slice(None)
        edited[:, :, rows] = change.scores(layer, scores_of(change.keys(layer, key))[:, :, rows])
    pattern = edited.softmax(-1).to(value.dtype)
    plain.patterns.append(pattern[0])
    plain.n_changed += not torch.equal(edited, raw)
    mixed = pattern @ value.repeat_interleave(n_shared, dim=1)
    return mixed.transpose(1, 2).contiguous(), pattern


ATTENTION = "plain_attention"
AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, eager_mask)


def load_plain(folder: str | Path) -> Any:
    """A fresh copy of a folder's model in float32, with `attend` as its attention; it runs only by `attention_pass`."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=ATTENTION, dtype=torch.float32, local_files_only=True
    )
    return model.eval()


@dataclass(frozen=True)
class PlainPass:
    """What a pass over a prefix gave."""

    logits: torch.Tensor
    """`[pos, d_vocab]`."""
    patterns: torch.Tensor
    """Attention after the softmax, `[layer, n_heads, q, k]`."""
    n_changed: int
    """Layers in which a score was changed."""


def attention_pass(plain_model: Any, ids: Sequence[int], change: Change = NOTHING) -> PlainPass:
    """One pass over a whole prefix under a change, by a model of `load_plain`."""
    watched = Watched(change)
    with torch.no_grad():
        logits = plain_model(torch.tensor([list(ids)]), use_cache=False, plain=watched).logits[0]
    return PlainPass(logits, torch.stack(watched.patterns), watched.n_changed)


def attention_greedy(
    plain_model: Any,
    prompt: Sequence[int],
    change: Change = NOTHING,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
) -> PlainText:
    """The most likely token under a change, again and again, until a stop id or the limit; `n_steered` counts layers."""

    def after(ids: Sequence[int]) -> tuple[torch.Tensor, int]:
        result = attention_pass(plain_model, ids, change)
        return result.logits[-1], result.n_changed

    return greedy(after, prompt, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
