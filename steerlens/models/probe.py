"""What a model does right, found out on the model itself: may rows be padded, may they share a pass, may a cache be kept?

Architectures count columns in their own ways (ALiBi, local windows, attention chunks, the largest so many keys), keep a state
instead of keys and values, or change with the length of the batch. No list of names is complete, so random rows are run in the
ways that sampling runs them, and each way must give, at every layer and in the logits, what a plain pass over one row alone
gives:

    cache   the rows padded on the left, their last tokens fed one by one with a cache, rows turned round, dropped, and put in
            the place of others
    batch   the rows whole, side by side, padded on the right: no real token sees padding
    prefix  what two rows begin with run once, and the rest of both after it
    gaps    some tokens fed and then hidden, and the rest of each row after them

A model that fails `cache` is run whole for every token, and one that fails `batch`, a row at a time: slow, and right. The rows
are as long as those that are to be run, or longer: a model is probed when it is first used, and again where rows outgrow that.
Whether rows that are alike up to a layer may be run as one up to it is tried by itself, once some are (`can_part`).

    width-dependent rotary scaling (longrope, dynamic) changes a row's own keys once it passes a length, so beyond it every
    row is run whole and alone, as Hugging Face does when it recomputes its cache

What it does not show: that the plain pass over one row is Hugging Face's. Nor what hooks of the caller's do: they are off in a
probe, and one that counts columns (`resid[:, 0]`) sees padding there in a batch of unequal rows.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from steerlens.errors import ModelError, SteerlensError
from steerlens.models.backends import Cache, put
from steerlens.models.facts import attention_window, model_id, resid_post, text_config, tolerance
from steerlens.models.parting import stages
from steerlens.models.passes import PassResult, Read, Runner
from steerlens.models.prefixes import after_prefix, common_prefix, holds_all
from steerlens.models.rows import Rows, Side, length_sorted_batches, n_hidden, pad, pad_id, random_rows

SHORTEST = 13
"""Tokens of the longest row of the smallest probe; each next one is twice as long."""

LOGGER = logging.getLogger("steerlens")


@dataclass(frozen=True)
class Abilities:
    """Which ways of running a model give what one row alone gives."""

    cache: bool
    """Rows padded on the left may be decoded with a key-value cache."""
    batch: bool
    """Whole rows may share a pass, padded on the right."""
    prefix: bool = False
    """What rows begin with may be run once, where a cache may be kept."""
    gaps: int = 0
    """In rows of up to how many columns hidden ones may stand: what comes after them is as without them, where a cache may be
    kept."""

    @property
    def side(self) -> Side:
        """Where rows of this model are padded: on the left, so that the last column is every row's last token, if it may be."""
        return "left" if self.cache else "right"

    def batches(self, lengths: Sequence[int], batch_size: int) -> list[list[int]]:
        """Indices of rows that share a pass, longest first."""
        return length_sorted_batches(lengths, batch_size if self.cache or self.batch else 1)


Fingerprint = tuple[Tensor, Tensor]
"""Of one row: unit residuals `[layer, d_model]` and the unit vector of its logits `[d_vocab]`."""

_KNOWN: "WeakKeyDictionary[Any, dict[Any, Abilities]]" = WeakKeyDictionary()
"""Model -> (dtype, device, longest row of the probe) -> what it found."""


def abilities(model: Any, width: int) -> Abilities:
    """What the model may do for rows of up to `width` tokens.

    Raises:
        ModelError: if even a row alone does not run, or gives no finite logits.

    Example:
        >>> abilities(model, 100)
        Abilities(cache=True, batch=True, prefix=True, gaps=512)
    """
    limit = _rotary_limit(text_config(model))
    if width > limit:
        return Abilities(cache=False, batch=False)
    longest = SHORTEST
    while longest < width:
        longest *= 2
    longest = int(min(longest, limit, int(model.cfg.n_ctx)))
    weights = next(model.parameters())
    key = (weights.dtype, weights.device, longest)
    known = _KNOWN.setdefault(model, {})
    if key not in known:
        known[key] = _probe(model, longest)
        if not known[key].cache:
            way = "in batches" if known[key].batch else "one at a time"
            LOGGER.warning(
                "%s runs whole rows for every new token, %s: with a cache it gives something else", model_id(model), way
            )
    return known[key]


def _rotary_limit(config: Mapping[str, Any]) -> float:
    """The length from which on rotary scaling depends on the width of the batch; infinite where it never does.

    Scaling stands in `rope_parameters`, once or for each kind of layer; the smallest limit counts.
    """
    if config.get("use_dynamic_ntk_rope") or config.get("use_logn_attn"):  # HookedTransformer's names
        return float(config.get("train_seq_length") or config["n_ctx"])

    def limits(scaling: Any) -> Iterator[float]:
        if isinstance(scaling, Mapping):
            # su: longrope's name in its first checkpoints
            if {scaling.get("rope_type"), scaling.get("type")} & {"longrope", "dynamic", "su"}:
                own = scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
                yield float(own or config.get("max_position_embeddings") or 0)
            for part in scaling.values():
                yield from limits(part)

    found = [*limits(config.get("rope_parameters")), *limits(config.get("rope_scaling"))]
    return min(found, default=float("inf"))


def _probe(model: Any, longest: int) -> Abilities:
    """Run random rows in every way: two long ones, and a short one that is nearly all padding beside them."""
    lengths = (longest, max(3, longest - 7), min(6, longest))
    rows = random_rows(model, lengths, seed=0)
    sites = [resid_post(layer) for layer in range(int(model.cfg.n_layers))]
    try:
        with without_callers_hooks(model), Runner(model, sites) as runner:
            alone = [_whole(runner, [row])[0] for row in rows]
            cache = _holds(lambda: _cached(runner, rows), alone, tolerance(model))
            # Where a cache may be kept, rows are padded on the left, and the right does not matter.
            batch = cache or _holds(lambda: _whole(runner, rows), alone, tolerance(model))
            twin = [*rows[0][:-3], rows[2][-1]]
            begun = [alone[0], *_whole(runner, [twin])]
            prefix = cache and _holds(lambda: _after_prefix(runner, [rows[0], twin]), begun, tolerance(model))
            return Abilities(cache, batch, prefix, _widest_gapped(runner) if cache else 0)
    except (SteerlensError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever an architecture raises
        raise ModelError(
            f"a model must run with hooks on its residual stream, and {model_id(model)} does not: "
            f"{type(error).__name__}: {error}; TransformerLens may bridge its architecture only in part"
        ) from error


def _whole(runner: Runner, rows: Sequence[list[int]]) -> list[Fingerprint]:
    """From one pass over whole rows, without a cache."""
    whole = pad(rows, side="right", pad_id=pad_id(runner.model))
    return _fingerprints(runner.run(whole, reads=[Read(site) for site in runner.sites]))


def _cached(runner: Runner, rows: Sequence[list[int]]) -> list[Fingerprint]:
    """Padded on the left; the last two tokens come one by one, the rows are turned round before them, and one leaves between."""
    reads = [Read(site) for site in runner.sites]
    turned, some = torch.arange(len(rows) - 1, -1, -1), torch.arange(len(rows) - 1)
    start = pad([row[:-2] for row in rows], pad_id=pad_id(runner.model))
    cache = _kept(runner.run(start, keep_cache=True)).select(turned)
    now = start.select(turned).then(torch.tensor([row[-2:-1] for row in reversed(rows)]))
    cache = _kept(runner.run(now, cache=cache, keep_cache=True))
    last = torch.tensor([row[-1:] for row in reversed(rows)])
    all_ = _fingerprints(runner.run(now.then(last), reads=reads, cache=cache.copy(), keep_cache=True))
    if cache.forks:
        return [all_[-1], *_in_its_place(runner, rows, now, cache, reads)]
    # The first row, now the last, leaves; the others go on without it.
    left = runner.run(now.select(some).then(last[:-1]), reads=reads, cache=cache.select(some), keep_cache=True)
    return [all_[-1], *reversed(_fingerprints(left))]


def _in_its_place(
    runner: Runner, rows: Sequence[list[int]], now: Rows, cache: Cache, reads: Sequence[Read]
) -> list[Fingerprint]:
    """The first row, now the last, leaves its place to the second, run by itself, and its columns go; the others go on."""
    second, place = pad([rows[1][:-1]]), len(rows) - 1
    cache = put(cache, torch.tensor([place]), _kept(runner.run(second, keep_cache=True)))
    left = torch.nn.functional.pad(second.mask, (now.mask.shape[1] - second.mask.shape[1], 0)).to(now.mask)
    mask = torch.cat([now.mask[:place], left])
    n = n_hidden(mask)
    last = torch.tensor([row[-1:] for row in [*reversed(rows[1:]), rows[1]]])
    fed = Rows(last, torch.cat([mask[:, n:], torch.ones_like(mask[:, :1])], dim=1), tuple(map(len, rows)))
    found = _fingerprints(runner.run(fed, reads=reads, cache=cache.without(n), keep_cache=True))
    return [found[place], found[0]]


def _after_prefix(runner: Runner, rows: Sequence[list[int]]) -> list[Fingerprint]:
    """What rows begin with alone, then the rest of both."""
    width = common_prefix(rows)
    cache = _kept(runner.run(pad([rows[0][:width]]), keep_cache=True))
    if not holds_all(cache, width):
        raise ModelError("a cache must hold all tokens of a prefix, and a window leaves some out")
    cache, rest = after_prefix(cache, [0] * len(rows), rows, width=width, prompt_lengths=[len(row) for row in rows])
    reads = [Read(site) for site in runner.sites]
    return _fingerprints(runner.run(rest, reads=reads, cache=cache, keep_cache=True))


_CAN_PART: "WeakKeyDictionary[Any, dict[Any, bool]]" = WeakKeyDictionary()
"""Model -> (dtype, device) -> whether its rows may part."""


def can_part(model: Any) -> bool:
    """Whether rows that are alike up to a layer may be run as one up to it, where a cache may be kept; see `parting`.

    Example:
        >>> can_part(model)
        True
    """
    weights = next(model.parameters())
    known, key = _CAN_PART.setdefault(model, {}), (weights.dtype, weights.device)
    if key not in known:
        known[key] = _try_parting(model)
    return known[key]


def _try_parting(model: Any) -> bool:
    rows = random_rows(model, (7, 4, 5), seed=3)
    sites = [resid_post(layer) for layer in range(int(model.cfg.n_layers))]
    here = [place % len(rows) for place in range(len(rows) + len(sites))]
    with without_callers_hooks(model), Runner(model, sites) as runner:
        alone = [_whole(runner, [row])[0] for row in rows]
        return _holds(lambda: _parted(runner, rows, here), [alone[place] for place in here] * 2, tolerance(model))


def _parted(runner: Runner, rows: Sequence[list[int]], here: Sequence[int]) -> list[Fingerprint]:
    """Rows, of which after each layer one parts from another: whole, and in pieces, the last of which is a pass of rows apart.

    Args:
        here: Which of the rows are run; from the fourth on, they are alike some that come before.
    """
    found = stages(here, [{}] * len(rows) + [{layer: "apart"} for layer in range(len(runner.sites))])
    ids, reads = [rows[place] for place in here], [Read(site) for site in runner.sites]
    whole = runner.run(pad(ids, pad_id=pad_id(runner.model)), reads=reads, stages=found)
    start = pad([row[:-3] for row in ids], pad_id=pad_id(runner.model))
    cache = _kept(runner.run(start, keep_cache=True, stages=found))
    more = start.then(torch.tensor([row[-3:-1] for row in ids]))
    cache = _kept(runner.run(more, cache=cache, keep_cache=True, stages=found))
    last = more.then(torch.tensor([row[-1:] for row in ids]))
    apart = runner.run(last, reads=reads, cache=cache, keep_cache=True)
    return [*_fingerprints(whole), *_fingerprints(apart)]


GAP = 64
"""Hidden columns in a row that show whether they count: enough of them that rounding in half precision is not mistaken for it."""


def _widest_gapped(runner: Runner) -> int:
    """In rows of up to how many columns hidden ones are nothing: beyond its size a window or chunk counts columns."""
    model, config = runner.model, text_config(runner.model)
    widest = int(min(int(model.cfg.n_ctx), attention_window(config), _rotary_limit(config)))
    lengths = (13, 6, 9)
    if widest < max(lengths) + GAP:
        return 0
    rows = random_rows(model, lengths, seed=1)
    alone = [_whole(runner, [row])[0] for row in rows]
    return widest if _holds(lambda: _gapped(runner, rows), alone, tolerance(model)) else 0


def _gapped(runner: Runner, rows: Sequence[list[int]]) -> list[Fingerprint]:
    """Tokens that are seen, and hidden before the last three of each row: two of these come at once, then the last one."""
    reads = [Read(site) for site in runner.sites]
    start = pad([row[:-3] for row in rows], pad_id=pad_id(runner.model))
    cache = _kept(runner.run(start, keep_cache=True))
    fed = start.then(torch.tensor(random_rows(runner.model, [GAP] * len(rows), seed=2)))
    cache = _kept(runner.run(fed, cache=cache, keep_cache=True))
    hidden = replace(fed, mask=torch.nn.functional.pad(start.mask, (0, GAP)))
    two = hidden.then(torch.tensor([row[-3:-1] for row in rows]))
    cache = _kept(runner.run(two, cache=cache, keep_cache=True))
    last = two.then(torch.tensor([row[-1:] for row in rows]))
    return _fingerprints(runner.run(last, reads=reads, cache=cache, keep_cache=True))


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
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever an architecture raises there, the way is not to be gone
        LOGGER.debug("a way to run the model fails", exc_info=error)
        return False
    differences = [a - b for line, own in zip(found, alone, strict=True) for a, b in zip(line, own, strict=True)]
    return all(bool((difference.norm(dim=-1) <= largest).all()) for difference in differences)


@contextmanager
def without_callers_hooks(model: Any) -> Iterator[None]:
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
