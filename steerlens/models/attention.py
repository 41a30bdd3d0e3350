"""Attention scores of a model: where they are edited, and whether editing them there does what it should.

The hook point `blocks.{l}.attn.hook_attn_scores` holds `[row, head, query, key]` after scaling, softcap and mask, before the
softmax. Some architectures have no such point, or one that only shows what went on inside another kernel; others keep a state
that passes by attention. So what an edit does is tried on the model itself, once:

    cut       where every later query is kept from a token's key, what comes after does not depend on that token: not at all,
              whole or with a cache
    softmax   the pattern is the softmax of the edited scores
    keys      scaling a key scales its column of scores (no position bias in them); a softcap is taken off first
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.errors import ModelError, SteerlensError
from steerlens.models.facts import attn_scores, is_hooked_transformer, model_id, tolerance
from steerlens.models.passes import Read, Runner
from steerlens.models.probe import without_callers_hooks
from steerlens.models.rows import Rows, pad, pad_id, random_rows


def attn_pattern(layer: int) -> str:
    """The hook name of a layer's attention after the softmax: `blocks.{layer}.attn.hook_pattern`."""
    return f"blocks.{layer}.attn.hook_pattern"


def normed(model: Any, layer: int, found: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """What was read at `attn_in` with the norm's weight, which a HookedTransformer multiplies by only after its hook point."""
    norm = model.blocks[layer].ln1 if is_hooked_transformer(model) else None
    weight, bias = (getattr(norm, name, None) for name in ("w", "b"))
    found = found if weight is None else found * weight.detach().float().cpu()
    return found if bias is None else found + bias.detach().float().cpu()


def softcap(model: Any, layer: int) -> float | None:
    """The bound that a layer's scores are pressed under by a tanh (Gemma 2), if there is one."""
    block = model.blocks[layer]
    original = getattr(getattr(block, "attn", None), "original_component", None)
    found = getattr(original, "attn_logit_softcapping", None)
    own = getattr(model.cfg, "attn_scores_soft_cap", None)  # a HookedTransformer's; below 0 where there is none
    cap = found if found is not None else own
    return float(cap) if cap is not None and cap > 0 else None


@dataclass(frozen=True)
class AttentionAbilities:
    """What holds of a model's attention scores; a text says why not.

    Example:
        >>> attention_abilities(model)
        AttentionAbilities(edits='', scales='')
    """

    edits: str
    """Empty where scores may be edited."""
    scales: str
    """Empty where scaling scores is scaling keys."""


_KNOWN: "WeakKeyDictionary[Any, dict[Any, AttentionAbilities]]" = WeakKeyDictionary()


def attention_abilities(model: Any) -> AttentionAbilities:
    """What may be done to the attention of a model; found out when it is first asked.

    Example:
        >>> attention_abilities(model).edits
        ''
    """
    weights = next(model.parameters())
    known = _KNOWN.setdefault(model, {})
    key = (weights.dtype, weights.device)
    if key not in known:
        with without_callers_hooks(model):
            edits = _reason(model, _edits_hold)
            known[key] = AttentionAbilities(edits, edits or _reason(model, _keys_hold))
    return known[key]


def check_attention_abilities(model: Any, *, scales: bool) -> None:
    """Refuse a model whose attention cannot be steered.

    Args:
        scales: Whether keys are to be scaled.

    Raises:
        ModelError: with the reason.
    """
    able = attention_abilities(model)
    if reason := able.scales if scales else able.edits:
        what = "scaling keys" if scales and not able.edits else "steering attention"
        raise ModelError(
            f"{what} needs scores that can be edited before the softmax, and {model_id(model)} does not give them ({reason}); "
            "steer the residual stream, or use another model"
        )


def _reason(model: Any, holds: Callable[[Any], str]) -> str:
    try:
        with warnings.catch_warnings():  # TransformerLens may say itself that an edit is of no use here
            warnings.simplefilter("ignore")
            return holds(model)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except SteerlensError as error:
        return str(error)
    except Exception as error:  # whatever an architecture raises there
        return f"{type(error).__name__}: {error}"


CUT, LENGTH = 3, 9
"""The token whose key is cut off, and how long the rows of the trial are."""


@dataclass(frozen=True, eq=False)
class _Cut:
    """Keeps every later query from one key."""

    site: str
    digest: str = ""
    by: float = -1e4

    def __call__(self, scores: Tensor, rows: Rows) -> Tensor:
        keys, queries = rows.key_positions[:, -scores.shape[-1] :], rows.positions
        where = (keys[:, None, None, :] == CUT) & (queries[:, None, :, None] > CUT)
        return scores + self.by * where.to(scores.dtype)

    def select(self, keep: Tensor) -> "_Cut":
        return self


@dataclass(frozen=True, eq=False)
class _Scaled:
    """Multiplies a key wherever it is made."""

    site: str
    by: float
    digest: str = ""

    def __call__(self, keys: Tensor, rows: Rows) -> Tensor:
        keys = keys.clone()
        axis = 2 if keys.ndim == 4 and keys.shape[2] == rows.tokens.shape[1] else 1
        keys.select(axis, CUT).mul_(self.by)
        return keys

    def select(self, keep: Tensor) -> "_Scaled":
        return self


def _rows(model: Any) -> tuple[Rows, list[list[int]]]:
    (one,) = random_rows(model, [LENGTH], seed=1)
    limit = min(int(model.cfg.d_vocab), len(model.tokenizer))
    two = [*one[:CUT], (one[CUT] + 1) % limit, *one[CUT + 1 :]]
    return pad([one, two], pad_id=pad_id(model)), [one, two]


def _edits_hold(model: Any) -> str:
    layers = range(int(model.cfg.n_layers))
    scores, patterns = [attn_scores(layer) for layer in layers], [attn_pattern(layer) for layer in layers]
    if missing := [site for site in (*scores, *patterns) if site not in model.hook_dict]:
        return f"it has no hook point {missing[0]}"
    rows, (one, two) = _rows(model)
    largest = tolerance(model)
    with Runner(model, [*scores, *patterns]) as runner:
        cuts = [_Cut(site) for site in scores]
        cut = runner.run(rows, edits=cuts).logits.float().softmax(-1)
        if float((cut[0] - cut[1]).norm()) > largest * float(cut.norm()):
            return "what comes after a token depends on it though no query sees its key"
        begun = pad([one[:-1], two[:-1]], pad_id=pad_id(model), prompt_lengths=[LENGTH, LENGTH])
        cache = runner.run(begun, edits=cuts, keep_cache=True).cache
        if cache is not None:
            last = begun.then(torch.tensor([one[-1:], two[-1:]]))
            cached = runner.run(last, edits=cuts, cache=cache, keep_cache=True).logits.float().softmax(-1)
            if float((cached - cut).norm()) > largest * float(cut.norm()):
                return "with a cache an edit does something else"
        nudges = [_Cut(site, by=1.7) for site in scores]
        reads = [Read(site, "all") for site in (*scores, *patterns)]
        found = runner.run(rows, edits=nudges, reads=reads).reads
    for score, pattern in zip(scores, patterns, strict=True):
        if float((found[score].softmax(-1) - found[pattern]).abs().max()) > largest:
            return f"the pattern of {pattern} is not the softmax of the scores"
    return ""


def _keys_hold(model: Any) -> str:
    layers = range(int(model.cfg.n_layers))
    rows, _ = _rows(model)
    factor, largest = 2.0, tolerance(model)
    for layer in layers:
        names = [f"blocks.{layer}.attn.hook_rot_k", f"blocks.{layer}.attn.hook_k"]
        site, scores = attn_scores(layer), None
        for name in (name for name in names if name in model.hook_dict):
            try:
                with Runner(model, [site, name]) as runner:
                    plain = runner.run(rows, reads=[Read(site, "all")]).reads[site]
                    scores = runner.run(rows, edits=[_Scaled(name, factor)], reads=[Read(site, "all")]).reads[site]
                break
            except ModelError:  # a hook point that is there and does not fire
                continue
        if scores is None:
            return f"it does not show the keys of layer {layer}"
        cap = softcap(model, layer)
        column, got = (_uncapped(table[..., CUT:, CUT], cap) for table in (plain, scores))
        if float((got - factor * column).norm()) > 10 * largest * float(got.norm()):
            return f"scores of layer {layer} are no multiple of the keys, as where a position bias is added"
    return ""


def _uncapped(scores: Float[Tensor, "..."], cap: float | None) -> Float[Tensor, "..."]:
    return scores if cap is None else cap * torch.atanh(scores / cap)
