"""One pass: rows, edits and reads go in; logits, what was read, and a cache come out. Nothing else hooks a model.

    activation at a site = edit_n(... edit_1(what the model computed)), and reads see the edited activation

A site is the name of a hook point, such as `blocks.3.hook_resid_post`. An edit is a value: it knows its site, what it does to a
row, and a digest of both. Recording is a pass with reads, steering one with edits, patching one whose edits were read before.

`run_pass` is one pass; a `Runner` keeps its hooks on the model for many, as sampling does. Hooks of the caller's stay and fire
before ours. A model in training mode is in evaluation mode for the pass: with dropout no result could be had twice.

What differs between kinds of models is behind `backends`. A runner whose sites are blocks' outputs and attention's scores, input
and output runs the plain modules below the bridge, without its hook points, where these were seen to give the same; see `choice`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlens.errors import ModelError, SteerlensError
from steerlens.models.backends import (
    Backend,
    Cache,
    Columns,
    LeanBackend,
    backend_of,
    hooks_on,
    per_head,
)
from steerlens.models.choice import choose_backend
from steerlens.models.facts import is_hooked_transformer, layer_of, model_device, model_id, resid_post
from steerlens.models.parting import Stage, stage_of
from steerlens.models.rows import Rows
from steerlens.models.static import StaticCache, StaticSteps, may_be_static


@runtime_checkable
class Edit(Protocol):
    """What is done to the activations of one site, row by row."""

    @property
    def site(self) -> str:
        """The hook point's name."""

    @property
    def digest(self) -> str:
        """Changes with all that decides what the edit does."""

    def __call__(self, activation: Tensor, rows: Rows, /) -> Tensor:
        """The activation after the edit, a new tensor; its axes are the rows, then the new columns of `rows`, with one for heads
        between them where the site is one of attention."""

    def select(self, keep: Int[Tensor, " kept"]) -> "Edit":
        """The edit of some of the rows, in the given order."""


@dataclass(frozen=True, eq=False)
class Read:
    """What is kept of one site's activation: float32 copies on the CPU.

    Example:
        >>> Read("blocks.3.hook_resid_post").at
        'last'
    """

    site: str
    at: Literal["last", "all"] | Int[Tensor, "row n"] = "last"
    """Each row's last token, every column, or the tokens at these positions of each row."""

    def __post_init__(self) -> None:
        if isinstance(self.at, str) and self.at not in ("last", "all"):
            raise SteerlensError(f'at must be "last", "all" or positions [row, n], got {self.at!r}')

    def __call__(self, activation: Tensor, rows: Rows) -> Tensor:
        if self.at != "all" and per_head(self.site):
            activation = activation.transpose(1, 2)  # row query head key
        if isinstance(self.at, str):
            found = activation if self.at == "all" else activation[torch.arange(len(activation)), rows.last]
        else:
            where = rows.positions[:, None, :] == self.at[:, :, None].to(rows.positions.device)
            if bool((self.at < 0).any()) or not bool(where.any(-1).all()):
                raise SteerlensError(
                    f"positions to read must be among the tokens of the pass, got {self.at.tolist()} for rows of "
                    f"{rows.lengths.tolist()} tokens; positions count a row's tokens from 0"
                )
            # Of the one column that matches; argmax takes no truth values.
            found = activation[torch.arange(len(activation))[:, None], where.int().argmax(-1)]
        # .to() of a slice may return a view, and a view would keep the whole activation alive.
        return found.detach().to("cpu", torch.float32, copy=True)


@dataclass(frozen=True, eq=False)
class PassResult:
    """What one pass gave."""

    logits: Float[Tensor, "row d_vocab"] | Float[Tensor, "row pos d_vocab"]
    """After each row's last token; or of every column, if all were asked for."""
    reads: dict[str, Tensor]
    """Site -> what was read there: `[row, ...]` at the last token, else `[row, pos, ...]`."""
    cache: Cache | None
    """To go on from; None where none was kept."""


def run_pass(
    model: Any,
    rows: Rows,
    *,
    edits: Sequence[Edit] = (),
    reads: Sequence[Read] = (),
    cache: Cache | None = None,
    keep_cache: bool = False,
    logits: Columns = "last",
) -> PassResult:
    """One forward pass, with hooks for its edits and reads that are gone afterwards on every exit.

    Args:
        rows: The new columns; with a cache, `rows.mask` covers the cached columns, too.
        cache: Of the columns before; it is used up, and goes on in the result.
        keep_cache: Return a cache to go on from.

    Raises:
        ModelError: if the logits of a row's token are not finite, or a hook point does not exist or did not fire.
        SteerlensError: inside a block of `steer`, where a pass would be steered twice.

    Example:
        >>> from steerlens.models.prompts import encode_all
        >>> from steerlens.models.rows import pad
        >>> rows = pad(encode_all(model, queries))
        >>> result = run_pass(model, rows, reads=[Read("blocks.3.hook_resid_post")])
        >>> result.logits.shape[0], list(result.reads["blocks.3.hook_resid_post"].shape)
        (3, [3, 160])
    """
    with Runner(model, {edit.site for edit in edits} | {read.site for read in reads}) as runner:
        return runner.run(rows, edits=edits, reads=reads, cache=cache, keep_cache=keep_cache, logits=logits)


class Runner:
    """Runs passes with its hooks on the model, from entering its `with` block until leaving it, however it is left.

    Args:
        sites: The hook points that any of the passes edits or reads.
    """

    def __init__(self, model: Any, sites: Iterable[str]) -> None:
        self.model, self.sites = model, sorted(sites)
        self.backend: Backend = backend_of(model)
        self._stack = ExitStack()
        self._rows: Rows | None = None
        self._here: dict[str, tuple[Rows, Stage]] = {}
        """Of rows that part, those that are there at each site."""
        self._edits: dict[str, list[Edit]] = {}
        self._reads: Mapping[str, Read] = {}
        self._found: dict[str, Tensor] = {}
        self._fired: set[str] = set()
        self._steps: StaticSteps | None = None
        self.used = ""
        """What `backend_used` says of it."""

    def __enter__(self) -> "Runner":
        if self.model in _STEERED:
            raise SteerlensError(
                "record, generate and evaluate run the model themselves, and inside a block of steer() their passes would "
                "be steered twice; leave the block, and give the plan to the call (steering=plan)"
            )
        self.backend, self.used = choose_backend(self.model, self.sites)
        with ExitStack() as stack:
            stack.enter_context(self.backend.hooked({site: _SiteHook(self, site) for site in self.sites}))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exit_: Any) -> None:
        self._steps = None
        self._stack.close()

    def run(
        self,
        rows: Rows,
        *,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
        cache: Cache | None = None,
        keep_cache: bool = False,
        logits: Columns = "last",
        steady: bool = False,
        stages: Sequence[Stage] = (),
    ) -> PassResult:
        """One pass; see `run_pass`.

        Args:
            steady: The pass is a step of one token a row, and the next one is likely to have the same rows and edits.
            stages: How the rows part, where some are alike up to a layer (see `parting`): what the edits do is the same for rows
                that have not parted. What is read then is of the last token or of all columns.

        Raises:
            ModelError: also, where rows are to part and the model is not run by its plain modules.
        """
        rows = rows.to(model_device(self.model))
        if logits not in ("last", "all"):
            raise SteerlensError(f'logits must be "last" or "all", got {logits!r}')
        asked = [read.site for read in reads]
        wanted = {*asked, *(edit.site for edit in edits)}
        if unknown := wanted - {*self.sites}:
            raise SteerlensError(
                f"a runner must be made with the sites of its edits and reads, got {sorted(unknown)} besides {self.sites}"
            )
        if stages and any(isinstance(read.at, Tensor) for read in reads):
            raise SteerlensError(
                'rows that part may be read at "last" or "all", got positions; run them without stages'
            )
        if len(asked) > len(set(asked)):
            raise SteerlensError(f"a pass has one read for each site, got {asked}; read all columns there")
        self._edits = {site: [edit for edit in edits if edit.site == site] for site in self.sites}
        self._reads = {read.site: read for read in reads}
        self._rows, self._found, self._fired, self._here = rows, {}, set(), {}
        one_each = steady and rows.tokens.shape[1] == 1 and not reads
        try:
            with torch.inference_mode():
                if one_each and may_be_static(backend := self.backend, cache):
                    out, cache = self._static_step(backend, rows, cache, edits)
                    wanted = set()  # a recorded step fires nothing
                else:
                    cache = cache.plain() if isinstance(cache, StaticCache) else cache
                    forward = partial(self._forward_parting, stages) if stages else self.backend.forward
                    # A cache that is given is used, kept or not: TransformerLens 4.3 sees to that itself, 3.9 does not.
                    out, cache = forward(rows, cache, keep_cache=keep_cache or cache is not None, logits=logits)
        finally:
            self._rows = None
        if silent := sorted(wanted - self._fired):
            raise ModelError(f"the hook point {silent[0]} of {model_id(self.model)} did not fire; choose another site")
        check_finite(self.model, out, rows)
        return PassResult(out, self._found, cache if keep_cache else None)

    def _forward_parting(
        self, stages: Sequence[Stage], rows: Rows, cache: Any, *, keep_cache: bool, logits: Columns
    ) -> tuple[Tensor, Cache | None]:
        if not isinstance(self.backend, LeanBackend):
            raise ModelError(
                f"rows part in a model's plain modules alone, and {model_id(self.model)} is run by its hook points"
            )
        there = {stage.after: rows.select(stage.rows) for stage in stages}
        for site in self.sites:
            stage = stage_of(stages, layer_of(site), output=site == resid_post(layer_of(site)))
            self._here[site] = there[stage.after], stage
            self._edits[site] = [edit.select(stage.rows) for edit in self._edits[site]]
        return self.backend.forward_parting(rows, cache, stages, keep_cache=keep_cache, logits=logits)

    def _static_step(self, backend: LeanBackend, rows: Rows, cache: Any, edits: Sequence[Edit]) -> tuple[Tensor, Cache]:
        if self._steps is None or not self._steps.goes_on(cache, edits):
            before = cache.plain() if isinstance(cache, StaticCache) else cache
            self._steps = StaticSteps(backend, rows, before, edits, self._enter)
        return self._steps.step(rows.tokens), self._steps.cache

    def _enter(self, rows: Rows) -> None:
        self._rows = rows

    @property
    def plain_modules(self) -> bool:
        """Whether they run its passes, once it is entered: rows may part in these alone."""
        return isinstance(self.backend, LeanBackend)

    def idle(self, site: str) -> bool:
        """Whether the pass does nothing at a site."""
        # A pass of another runner's, inside this one's block, has no rows here.
        return self._rows is None or not (self._edits[site] or site in self._reads)

    def act(self, site: str, activation: Tensor) -> Tensor | None:
        """Edit and read at a site; None leaves a hook point's output alone."""
        rows = self._rows
        if rows is None:
            return None
        rows, stage = self._here.get(site, (rows, None))
        if not _fits(activation.shape, rows):
            raise ModelError(
                f"activations at {site} must be [row, pos, ...] for {list(rows.tokens.shape)} tokens, got "
                f"{list(activation.shape)}; this hook point cannot be edited or read here"
            )
        self._fired.add(site)
        edits = self._edits[site]
        for edit in edits:
            activation = edit(activation, rows)
            if not isinstance(activation, Tensor):
                raise SteerlensError(
                    f"an edit must return the activation after it, and that at {site} returned {activation!r:.40}; "
                    "does it lack a return?"
                )
        if site in self._reads:
            found = self._reads[site](activation, rows)
            self._found[site] = found if stage is None else found[stage.share]
        return activation if edits else None


@dataclass(frozen=True, eq=False)
class _SiteHook:
    """A runner's hook at one site."""

    runner: Runner
    site: str

    def __call__(self, activation: Tensor, hook: Any) -> Tensor | None:
        return self.runner.act(self.site, activation)

    @property
    def idle(self) -> bool:
        """Whether it does nothing in the pass that is running: attention need not show its scores then."""
        return self.runner.idle(self.site)


def _fits(shape: torch.Size, rows: Rows) -> bool:
    """Whether an activation is one of these rows and their new columns; heads may stand between them."""
    n_rows, n_columns = rows.tokens.shape
    columns = [shape[1], shape[2]] if len(shape) == 4 else [shape[1]] if len(shape) > 1 else []
    return shape[0] == n_rows and n_columns in columns


# Single passes of the caller's are steered by hooks of their own, and no pass of ours may meet those.
_STEERED: "WeakSet[Any]" = WeakSet()


@contextmanager
def steered_by_caller(
    model: Any, functions: Mapping[str, Callable[..., Any]], announce: Callable[[Mapping[str, Any]], None]
) -> Iterator[None]:
    """Hooks for passes that the caller runs; until the block is left, `Runner` refuses the model.

    Args:
        announce: Is told the keyword arguments of each pass before it runs.
    """
    outer = model in _STEERED  # blocks may be nested, and the model is steered until the outermost is left
    # Below the bridge, since run_with_cache and its like call the bridge's forward and not the bridge.
    # A HookedTransformer's own methods do so, too, and its first block is told the mask and the cache.
    module = model.blocks[0] if is_hooked_transformer(model) else getattr(model, "original_model", model)
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: announce(kwargs), with_kwargs=True)
    try:
        with hooks_on(model, functions):
            _STEERED.add(model)
            yield
    finally:
        handle.remove()
        if not outer:
            _STEERED.discard(model)


def check_finite(model: Any, logits: Tensor, rows: Rows) -> None:
    """Refuse logits that say nothing: a text or a number made of them would be one of nothing.

    Raises:
        ModelError: if the largest logit of any token is not finite.
    """
    # The largest says it all: nan prevails in it, and a single logit of minus infinity only rules a token out.
    largest = logits.amax(-1)
    if bool(largest.isfinite().all()):
        return
    padding = rows.positions < 0 if logits.ndim == 3 else (rows.positions < 0).all(1)
    largest = largest.masked_fill(padding.to(largest.device), 0.0)
    bad = ~largest.isfinite()
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ModelError(
            f"logits must be finite, got {largest[bad][0].item()} in row {row} of {len(bad)} after {int(rows.lengths[row])} "
            f"tokens; a strong coefficient or {model.cfg.dtype} may overflow: lower the one, or load the model with another dtype"
        )
