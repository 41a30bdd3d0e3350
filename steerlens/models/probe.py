"""What a model does right, found out on the model itself: may rows be padded, may they share a pass, may a cache be kept?

Architectures count columns in their own ways (ALiBi, local windows, attention chunks), keep a state instead of keys and values,
or change with the length of the batch. No list of names is complete, so two random rows of unequal length are run in every way
that sampling runs them, and each way must give, at every layer and in the logits, what Hugging Face's plain pass over one row
alone gives:

    cache   the rows padded on the left, their last tokens fed one by one with a cache, rows swapped and dropped on the way
    batch   the rows whole, side by side, padded on the right: no real token sees padding

A model that fails `cache` is run whole for every token, and one that fails `batch`, a row at a time: slow, and right. A model is
probed once, when it is first used, and again where rows outgrow a window that the rows of the first probe fitted in.

    width-dependent rotary scaling (longrope, dynamic) changes a row's own keys once it passes a length, so beyond it every
    row is run whole and alone, as Hugging Face does when it recomputes its cache
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from steerlens.errors import ModelError, SteerlensError
from steerlens.models.backends import Cache
from steerlens.models.facts import is_hooked_transformer, model_id, resid_post
from steerlens.models.passes import PassResult, Read, Runner
from steerlens.models.rows import Side, length_sorted_batches, pad, pad_id

LENGTHS = (13, 6)
"""Tokens of the two rows, where no window asks for more: unequal, so that one is padded, and few, since a probe costs passes."""


@dataclass(frozen=True)
class Abilities:
    """Which ways of running a model give what one row alone gives."""

    cache: bool
    """Rows padded on the left may be decoded with a key-value cache."""
    batch: bool
    """Whole rows may share a pass, padded on the right."""

    @property
    def side(self) -> Side:
        """Where rows of this model are padded: on the left, so that the last column is every row's last token, if it may be."""
        return "left" if self.cache else "right"

    def batches(self, lengths: Sequence[int], batch_size: int) -> list[list[int]]:
        """Indices of rows that share a pass, longest first."""
        return length_sorted_batches(lengths, batch_size if self.cache or self.batch else 1)


Fingerprint = tuple[Tensor, Tensor]
"""Of one row: unit residuals `[layer, d_model]` and the unit vector of its logits `[d_vocab]`."""

_KNOWN: "WeakKeyDictionary[Any, dict[tuple[int, int], Abilities]]" = WeakKeyDictionary()


def abilities(model: Any, width: int) -> Abilities:
    """What the model may do for rows of up to `width` tokens.

    Raises:
        ModelError: if even a row alone does not run, or gives no finite logits.

    Example:
        >>> abilities(model, 100)
        Abilities(cache=True, batch=True)
    """
    if width > _rotary_limit(model):
        return Abilities(cache=False, batch=False)
    crossed = max((window for window in _windows(model) if window < width), default=0)
    lengths = (crossed + LENGTHS[0], LENGTHS[1])
    known = _KNOWN.setdefault(model, {})
    if lengths not in known:
        known[lengths] = _probe(model, lengths)
    return known[lengths]


def tolerance(model: Any) -> float:
    """The largest relative difference of residuals that is rounding; the faults looked for are a hundred times as large."""
    return 1e-3 if model.cfg.dtype == torch.float32 else 0.1


def _config(model: Any) -> dict[str, Any]:
    if is_hooked_transformer(model):
        return dict(model.cfg.to_dict())
    config: Any = getattr(getattr(model, "original_model", None), "config", None)
    # Of a model that reads pictures, too, the text model's settings lie within.
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return config.to_dict() if config is not None else {}


def _rotary_limit(model: Any) -> float:
    """The length from which on rotary scaling depends on the width of the batch; infinite where it never does."""
    config = _config(model)
    if config.get("use_dynamic_ntk_rope") or config.get("use_logn_attn"):  # HookedTransformer's names
        return float(config.get("train_seq_length") or config["n_ctx"])
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = {scaling.get("rope_type"), scaling.get("type")}
    if not kinds & {"longrope", "dynamic", "su", "yarn_dynamic"}:  # su: longrope's name in its first checkpoints
        return float("inf")
    own = scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return float(own or config.get("max_position_embeddings") or float("inf"))


def _windows(model: Any) -> set[int]:
    """Numbers of columns after which attention may look elsewhere: whatever the configuration calls a window or a chunk."""
    named = {name: value for name, value in _config(model).items() if "window" in name or "chunk" in name}
    return {value for value in named.values() if type(value) is int and value > 0}  # use_sliding_window is a bool


def _probe(model: Any, lengths: tuple[int, int]) -> Abilities:
    """Run two random rows in every way."""
    generator = torch.Generator().manual_seed(0)
    # Ids that both know: a vocabulary may be padded beyond its tokenizer, and a tokenizer be larger than its model.
    limit = min(int(model.cfg.d_vocab), len(model.tokenizer))
    rows = [torch.randint(limit, (length,), generator=generator).tolist() for length in lengths]
    sites = [resid_post(layer) for layer in range(int(model.cfg.n_layers))]
    with _without_callers_hooks(model), Runner(model, sites) as runner:
        try:
            alone = [_whole(runner, [row])[0] for row in rows]
        except SteerlensError:  # logits that are not finite: said already
            raise
        except Exception as error:  # whatever an architecture raises
            raise ModelError(
                f"a model must run with hooks on its residual stream, and {model_id(model)} does not: "
                f"{type(error).__name__}: {error}; TransformerLens may bridge its architecture only in part"
            ) from error
        return Abilities(
            cache=_holds(lambda: _cached(runner, rows), alone, tolerance(model)),
            batch=_holds(lambda: _whole(runner, rows), alone, tolerance(model)),
        )


def _whole(runner: Runner, rows: Sequence[list[int]]) -> list[Fingerprint]:
    """From one pass over whole rows, without a cache."""
    whole = pad(rows, side="right", pad_id=pad_id(runner.model))
    return _fingerprints(runner.run(whole, reads=[Read(site) for site in runner.sites]))


def _cached(runner: Runner, rows: Sequence[list[int]]) -> list[Fingerprint]:
    """Padded on the left; the last two tokens come one by one, the rows change places before them, and one leaves between."""
    reads = [Read(site) for site in runner.sites]
    start = pad([row[:-2] for row in rows], pad_id=pad_id(runner.model))
    swap, first = torch.tensor([1, 0]), torch.tensor([0])
    cache = _kept(runner.run(start, keep_cache=True)).select(swap)
    now = start.select(swap).then(torch.tensor([row[-2:-1] for row in reversed(rows)]))
    cache = _kept(runner.run(now, cache=cache, keep_cache=True))
    last = torch.tensor([row[-1:] for row in reversed(rows)])
    # Going on uses a cache up, and this one is gone on from twice.
    both = runner.run(now.then(last), reads=reads, cache=cache.copy(), keep_cache=True)
    one = runner.run(now.select(first).then(last[:1]), reads=reads, cache=cache.select(first), keep_cache=True)
    return [_fingerprints(both)[1], *_fingerprints(one)]


def _kept(result: PassResult) -> Cache:
    assert result.cache is not None  # a model that keeps none fails here
    return result.cache


def _fingerprints(result: PassResult) -> list[Fingerprint]:
    """Of each row: its last token's residuals and logits, scaled so that every layer counts alike."""
    resid = torch.stack(list(result.reads.values()), dim=1)
    parts = [torch.nn.functional.normalize(part, dim=-1) for part in (resid, result.logits.float().cpu())]
    return list(zip(*parts, strict=True))


def _holds(way: Callable[[], list[Fingerprint]], alone: Sequence[Fingerprint], largest: float) -> bool:
    """Whether a way of running gives what the rows alone gave; a way that raises does not."""
    try:
        found = way()
    except Exception:  # whatever an architecture raises there, the way is not to be gone
        return False
    differences = [a - b for line, own in zip(found, alone, strict=True) for a, b in zip(line, own, strict=True)]
    return all(bool((difference.norm(dim=-1) <= largest).all()) for difference in differences)


@contextmanager
def _without_callers_hooks(model: Any) -> Iterator[None]:
    """Hooks of the caller's neither see a probe nor change it."""
    points = {id(point): point for point in model.hook_dict.values()}.values()
    kept = [(point, point._forward_hooks) for point in points]
    for point in points:
        point._forward_hooks = type(point._forward_hooks)()
    try:
        yield
    finally:
        for point, hooks in kept:
            point._forward_hooks = hooks
