"""Decoding steps over fixed tensors: what a GPU can record once, as a CUDA graph, and play again at every step.

A step of one token a row launches hundreds of small kernels, and a GPU waits for Python between them. Where a batch goes on with
the same rows and edits, the step after this one is the same work on the same tensors: keys and values are written into columns
that are there already, the next one's number is itself on the GPU, and the mask hides those that are still to come. So the work
is recorded at the first step and replayed at the others, hooks and edits in it. On a processor the same step is run as it is.

Whoever changes rows or edits begins anew, from the cache as it then is.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from steerlens.models.backends import BridgeCache, Cache, LeanBackend, RoomyLayer, Table
from steerlens.models.rows import Rows

LOGGER = logging.getLogger("steerlens")

ROOM = 128
"""Columns to come that are made at once."""


class FixedLayer(DynamicLayer):
    """A layer of a cache whose columns are all there: new ones are written where a tensor says, and the mask hides the others."""

    keys: Any
    values: Any

    def __init__(self, keys: Tensor, values: Tensor, column: Int[Tensor, " one"]) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values, self.column = keys, values, column

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(-2, self.column, key_states)
        self.values.index_copy_(-2, self.column, value_states)
        return self.keys, self.values


class StaticSteps:
    """Steps of some rows that go on with the same edits, one new token for each row at each.

    Args:
        rows: The first step's: a token of each row, and the mask of all columns so far.
        cache: Of the columns before it.
        edits: What hooks do in these steps; only told apart here.
        enter: Tells the hooks which rows are run.
    """

    def __init__(
        self, backend: LeanBackend, rows: Rows, cache: BridgeCache, edits: Sequence[Any], enter: Callable[[Rows], None]
    ) -> None:
        self.backend, self.edits, self.enter = backend, list(edits), enter
        n_rows, self.n_columns = len(rows.tokens), rows.mask.shape[1] - 1
        self.width = self.n_columns + ROOM
        device = rows.tokens.device
        self.column = torch.tensor([self.n_columns], device=device)
        self.positions = rows.positions.clone()
        mask = torch.zeros(n_rows, self.width, dtype=rows.mask.dtype, device=device)
        mask[:, : self.n_columns] = rows.mask[:, :-1]
        key_positions = torch.full((n_rows, self.width), -1, device=device)
        key_positions[:, : self.n_columns] = rows.key_positions[:, :-1]
        self.rows = Rows(rows.tokens.clone(), mask, rows.prompt_lengths, rows.spans)
        self.rows.__dict__.update(key_positions=key_positions, positions=self.positions)
        self._moving = (self.column, self.positions, mask, key_positions)
        self._start = tuple(tensor.clone() for tensor in self._moving)
        self.held = DynamicCache()
        self.held.layers = [self._fixed(layer) for layer in cache.cache.layers]
        self.cache = StaticCache(self)
        self.over = False
        """Whether somebody has written into the cache since."""
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        if device.type == "cuda":
            self._record()

    def goes_on(self, cache: Cache, edits: Sequence[Any]) -> bool:
        """Whether the next step is one of these."""
        same = len(edits) == len(self.edits) and all(one is other for one, other in zip(edits, self.edits, strict=True))
        return cache is self.cache and same and self.n_columns < self.width and not self.over

    def step(self, tokens: Int[Tensor, "row 1"]) -> Float[Tensor, "row d_vocab"]:
        """The logits after one new token of each row."""
        self.rows.tokens.copy_(tokens)
        self.n_columns += 1
        if self.graph is None:
            return self._run()
        self.graph.replay()
        assert self.logits is not None
        return self.logits.clone()  # the next step writes there

    def _run(self) -> Float[Tensor, "row d_vocab"]:
        _, _, mask, key_positions = self._moving
        mask.index_fill_(1, self.column, 1)
        key_positions.index_copy_(1, self.column, self.positions)
        # Others than at the step before, for who remembers what was found for some rows: positions have moved on.
        rows = Rows(self.rows.tokens, mask, self.rows.prompt_lengths, self.rows.spans)
        rows.__dict__.update(key_positions=key_positions, positions=self.positions)
        self.enter(rows)
        logits: Tensor = self.backend.tree.root(
            self.rows.tokens,
            attention_mask=mask[:, None, None, :].bool(),
            position_ids=self.positions.clamp(min=0),
            past_key_values=self.held,
            use_cache=True,
        ).logits[:, -1]
        self.column.add_(1)
        self.positions.add_(1)
        return logits

    def _record(self) -> None:
        # What is set up at the first runs, such as workspaces of products, may not be set up in a recording.
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self._run()
        torch.cuda.current_stream().wait_stream(aside)
        for tensor, start in zip(self._moving, self._start, strict=True):
            tensor.copy_(start)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.logits = self._run()
        except RuntimeError as error:  # an edit that waits for the GPU, say
            LOGGER.warning("a step cannot be recorded, and is run as it is: %s", error)
            return
        self.graph = graph

    def _fixed(self, layer: Any) -> FixedLayer:
        keys, values = (
            torch.nn.functional.pad(table, (0, 0, 0, self.width - self.n_columns))
            for table in (layer.keys, layer.values)
        )
        return FixedLayer(keys, values, self.column)


@dataclass(frozen=True, eq=False)
class StaticCache:
    """The cache of such steps; what is done to it is done to a plain one of the same columns."""

    steps: StaticSteps

    def plain(self) -> BridgeCache:
        """The columns so far."""
        cache = DynamicCache()
        for held in self.steps.held.layers:
            layer = DynamicLayer()
            layer.dtype, layer.device, layer.is_initialized = held.dtype, held.device, True
            layer.keys, layer.values = (table[..., : self.steps.n_columns, :] for table in (held.keys, held.values))
            cache.layers.append(layer)
        return BridgeCache(cache)

    def writable(self) -> BridgeCache:
        self.steps.over = True
        return self.plain()

    def select(self, keep: Int[Tensor, " kept"]) -> BridgeCache:
        return self.plain().select(keep)

    def extended(self, rows: Sequence[int]) -> BridgeCache:
        return self.plain().extended(rows)

    def copy(self) -> BridgeCache:
        return self.plain().copy()

    forks = True

    def fork(self) -> BridgeCache:
        return self.plain()

    def first(self, n: int) -> BridgeCache:
        return self.plain().first(n)

    def without(self, n: int) -> BridgeCache:
        return self.plain().without(n)

    @property
    def tables(self) -> list[Table]:
        return self.plain().tables


def may_be_static(backend: Any, cache: Cache | None) -> TypeGuard[LeanBackend]:
    """Whether steps that go on from a cache can be run over fixed tensors."""
    if not isinstance(backend, LeanBackend) or not backend.graphs or not backend.tree.causal_alone:
        return False
    if isinstance(cache, StaticCache):
        return True
    layers = cache.cache.layers if isinstance(cache, BridgeCache) else []
    return bool(layers) and all(type(layer) in (DynamicLayer, RoomyLayer) for layer in layers)
