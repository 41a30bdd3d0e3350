"""Which backend runs a pass: the plain modules below a bridge, or its hook points.

The plain modules are used for passes that edit and read nothing but blocks' outputs and attention's scores, input and output,
where they were seen to give what the hook points give: random rows are run both ways, padded on either side, whole and with a
cache, while every layer is nudged, and what is at these sites and the logits must agree. That is tried once for a model, and
again when parts of it were replaced.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from steerlens.errors import ModelError, SteerlensError
from steerlens.models.backends import Backend, LeanBackend, backend_of, per_head
from steerlens.models.facts import (
    attn_in,
    attn_out,
    attn_scores,
    is_hooked_transformer,
    model_device,
    model_id,
    resid_post,
    tolerance,
)
from steerlens.models.lean import NotSharedError, Parts, Tree, plain_tree
from steerlens.models.rows import Rows, pad, pad_id, random_rows

BackendName = Literal["auto", "hooks", "lean", "graphs"]
"""The lean pass where it may be, the bridge's hook points always, or an error where the lean pass may not be; "graphs" is "lean"
with decoding steps over fixed tensors, which a GPU records and replays (see `static`)."""


@dataclass(eq=False)
class _Known:
    """What is known of a model's plain modules."""

    tree: Tree | None
    parts: Parts
    """What the model consisted of then."""
    reasons: dict[Any, str]
    """By dtype, device and kind of sites: why the tree is not used, or nothing."""

    def __reduce__(self) -> Any:  # a copy of the model finds out for itself
        return type(None), ()


KNOWN = "_steerlens_known"
"""Kept on the model, which its parts hold on to: in a table beside it, the model would never be let go."""
_ASKED: "WeakKeyDictionary[Any, BackendName]" = WeakKeyDictionary()


def use_backend(model: Any, backend: BackendName) -> None:
    """Say how a model is run from now on: "auto", "hooks" (always through TransformerLens' hook points), "lean", or "graphs".

    Raises:
        ModelError: for "lean" and "graphs", if the model's plain modules do not give what its hook points give.

    Example:
        >>> use_backend(model, "hooks")
        >>> backend_used(model)
        'hooks (as asked)'
        >>> use_backend(model, "auto")
        >>> backend_used(model)
        'lean'
    """
    if backend not in get_args(BackendName):
        raise SteerlensError(f'backend must be "auto", "hooks", "lean" or "graphs", got {backend!r}')
    before = _ASKED.pop(model, "auto")
    if backend in ("lean", "graphs") and (reason := _chosen(model, ())[1]):
        _ASKED[model] = before
        raise ModelError(
            f'backend "{backend}" needs modules that can be run without hook points, and those of {model_id(model)} cannot '
            f'({reason}); use "auto", which runs the hook points then'
        )
    _ASKED[model] = backend


def backend_used(model: Any, sites: Iterable[str] = ()) -> str:
    """ "lean", "graphs", or "hooks" with the reason, for passes that edit or read these sites.

    Example:
        >>> backend_used(model, ["blocks.3.hook_resid_post"])
        'lean'
        >>> backend_used(model, ["blocks.3.attn.hook_pattern"])
        'hooks (blocks.3.attn.hook_pattern is seen there alone)'
    """
    return choose_backend(model, sites)[1]


def choose_backend(model: Any, sites: Iterable[str]) -> tuple[Backend, str]:
    """What runs passes that edit or read these sites, and what `backend_used` says of it."""
    tree, reason = _chosen(model, sites)
    if tree is None:
        return backend_of(model), f"hooks ({reason})"
    graphs = _ASKED.get(model) == "graphs"
    return LeanBackend(model, tree, graphs), "graphs" if graphs else "lean"


def _chosen(model: Any, sites: Iterable[str]) -> tuple[Tree | None, str]:
    """The plain modules to run, or None and why not."""
    if _ASKED.get(model) == "hooks":
        return None, "as asked"
    if is_hooked_transformer(model):
        return None, "a HookedTransformer has no other modules"
    sites = set(sites)
    named = {kind: _sites(model, kind) for kind in KINDS}
    if others := sorted(sites.difference(*named.values())):
        return None, f"{others[0]} is seen there alone"
    known = _known(model)
    if known.parts.hooked:
        return None, "it has hooks of the caller's, which a lean pass would skip"
    if known.tree is None:
        return None, known.reasons[None]
    weights = next(model.parameters())
    for kind in KINDS:
        if kind != "blocks" and sites.isdisjoint(named[kind]):
            continue
        key = (weights.dtype, weights.device, kind)
        if key not in known.reasons:
            known.reasons[key] = _prove(model, known.tree, kind)
        if known.reasons[key]:
            return None, known.reasons[key]
    return known.tree, ""


def _known(model: Any) -> _Known:
    known: _Known | None = model.__dict__.get(KNOWN)
    if known is None or known.parts.model is not model or not known.parts.same:
        try:
            known = _Known(plain_tree(model), Parts(model), {})
        except NotSharedError as error:
            known = _Known(None, Parts(model), {None: str(error)})
        model.__dict__[KNOWN] = known
    return known


# --- proof -----------------------------------------------------------------------------------------------------------

LENGTHS = (13, 6, 9)
"""Tokens of the rows that are run both ways."""

ATTENTION = ("sdpa", "eager")
"""transformers' attention functions that are tried, the fastest first."""

Kind = Literal["blocks", "scores", "attention"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Sites that a tree is proved at together: blocks' outputs; attention scores; what goes into attention, and comes out."""


def _prove(model: Any, tree: Tree, kind: Kind) -> str:
    """Why a tree does not give what the hook points give, or nothing; it is left with the attention that does."""
    sites = list(dict.fromkeys([*_sites(model, "blocks"), *_sites(model, kind)]))
    wanted = [_attempt(model, backend_of(model), way, sites) for way in (_whole, _cached)]
    if all(isinstance(found, str) for found in wanted):
        return str(wanted[0])
    if kind != "blocks":  # which attention the layers have was found out before
        return _difference(model, LeanBackend(model, tree), wanted, sites)
    reasons = []
    for attention in ATTENTION:
        tree.choose(attention)
        reason = _difference(model, LeanBackend(model, tree), wanted, sites)
        if not reason:
            return ""
        reasons.append(reason)
    return reasons[-1]


def _difference(model: Any, lean: Backend, wanted: Sequence[Any], sites: Sequence[str]) -> str:
    for way, its in zip((_whole, _cached), wanted, strict=True):
        # A way that the hook points cannot go is not gone.
        if not isinstance(its, str) and (reason := _contrast(model, _attempt(model, lean, way, sites), its)):
            return reason
    return ""


def _contrast(model: Any, found: dict[str, Tensor] | str, wanted: dict[str, Tensor]) -> str:
    """What one way of running gives otherwise than another, if anything."""
    if isinstance(found, str):
        return found
    for name, its in wanted.items():
        one = found.get(name)
        if one is None:
            return f"{name} is not computed there"
        # Written so that nan is no agreement.
        if one.shape != its.shape or not float((one - its).norm()) <= tolerance(model) * float(its.norm()):
            return f"its plain modules compute another {name}"
    return ""


def _attempt(model: Any, backend: Backend, way: Callable[..., Any], sites: Sequence[str]) -> dict[str, Tensor] | str:
    """What a way of running gives: its logits, and each site's last column; or in words, why it does not run."""
    found: dict[str, Tensor] = {}

    def nudge(site: str) -> Callable[..., Tensor]:
        def hook(activation: Tensor, hook: Any) -> Tensor:
            if per_head(site):
                found[site] = activation[:, :, -1].float().clamp(min=-1e4)
                return activation + 0.5 * (torch.arange(activation.shape[-1], device=activation.device) % 2)
            found[site] = activation[:, -1].float()
            return activation + 0.05 * activation.roll(1, -1)

        return hook

    try:
        with torch.inference_mode(), backend.hooked({site: nudge(site) for site in sites}):
            logits = way(model, backend)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever an architecture raises there
        return f"it does not run so: {type(error).__name__}: {error}"
    return {"logits": logits.float(), **found}


def _sites(model: Any, kind: Kind) -> list[str]:
    layers = range(int(model.cfg.n_layers))
    if kind == "attention":
        return [name(model, layer) for name in (attn_in, attn_out) for layer in layers]
    return [resid_post(layer) if kind == "blocks" else attn_scores(layer) for layer in layers]


def _whole(model: Any, backend: Backend) -> Tensor:
    rows = pad(random_rows(model, LENGTHS, seed=2), side="right", pad_id=pad_id(model)).to(model_device(model))
    return backend.forward(rows, None, keep_cache=False, logits="last")[0]


def _cached(model: Any, backend: Backend) -> Tensor:
    """Padded on the left; the last two tokens come one by one."""
    ids = random_rows(model, LENGTHS, seed=2)
    rows: Rows = pad([row[:-2] for row in ids], pad_id=pad_id(model)).to(model_device(model))
    _, cache = backend.forward(rows, None, keep_cache=True, logits="last")
    for place in (slice(-2, -1), slice(-1, None)):
        rows = rows.then(torch.tensor([row[place] for row in ids], device=rows.tokens.device))
        logits, cache = backend.forward(rows, cache, keep_cache=True, logits="last")
    return logits
