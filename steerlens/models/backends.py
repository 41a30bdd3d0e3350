"""Backends: how each kind of model is run, and what its key-value cache is.

    TransformerBridge     Hugging Face modules with Hugging Face's cache (TransformerLens 4, and 3)
    its plain modules     the same without hook points, where these are not needed (see `lean`)
    HookedTransformer     TransformerLens' own modules with its own cache (TransformerLens 3; version 4 has dropped it)

All have the same hook names, so edits and reads do not know which one they meet. A HookedTransformer has no Hugging Face model
inside: what a bridge is asked there (what stops a text, windows, the settings of the weights) is asked of its `cfg` and its
tokenizer's files, and `facts.coordinate_frame` tells whether its weights were folded or centred.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from steerlens.errors import ModelError
from steerlens.models.facts import is_hooked_transformer, model_device
from steerlens.models.lean import Hook, Tree
from steerlens.models.parting import Stage, parting, stage_of
from steerlens.models.rows import Rows

Columns = Literal["last", "all"]
"""Which columns' logits are wanted: of each row's last token, or all."""


@dataclass(frozen=True, eq=False)
class Table:
    """One tensor of a cache, its rows first, with an axis of columns."""

    tensor: Tensor
    axis: int

    def put(self, rows: Int[Tensor, " some"], other: "Table | None") -> None:
        """Write some rows: those of another table, which is not wider, or nothing, with padding on their left."""
        rows = rows.to(self.tensor.device)
        self.tensor[rows] = 0
        if other is not None:
            width, new = self.tensor.shape[self.axis], other.tensor.shape[self.axis]
            self.tensor.narrow(self.axis, width - new, new)[rows] = other.tensor.to(self.tensor.device)

    def fallen(self, before: "Table") -> Tensor | None:
        """The column, a row's each, that left a full window when the newest came; None where none did.

        Args:
            before: The same table before that.
        """
        full = self.tensor.shape[self.axis] == before.tensor.shape[self.axis]
        return before.tensor.select(self.axis, 0).clone() if full else None

    def step_back(self, rows: Int[Tensor, " some"], fallen: Tensor | None) -> None:
        """Give some rows what they held before the newest column: on their left what had fallen from a window, or padding."""
        rows = rows.to(self.tensor.device)
        held = self.tensor.index_select(0, rows)
        held = held.narrow(self.axis, 0, held.shape[self.axis] - 1)
        self.tensor.narrow(self.axis, 1, held.shape[self.axis])[rows] = held
        self.tensor.select(self.axis, 0)[rows] = 0 if fallen is None else fallen


@runtime_checkable
class Cache(Protocol):
    """Keys and values of the columns so far."""

    def select(self, keep: Int[Tensor, " kept"]) -> "Cache":
        """The cache of some rows, in the given order and as often as they come; this one is used up."""

    def extended(self, rows: Sequence[int]) -> "Cache":
        """The cache with copies of some of its rows after its own; this one is used up."""

    def copy(self) -> "Cache":
        """The same again, sharing nothing."""

    @property
    def forks(self) -> bool:
        """Whether the cache grows by new tensors, so that `fork` is right."""

    def fork(self) -> "Cache":
        """The cache as it is now, to go on from in another way; neither sees what the other appends."""

    def first(self, n: int) -> "Cache":
        """The first n rows, as they lie in this one's tensors; this one is used up."""

    def without(self, n: int) -> "Cache":
        """Without the first n columns, which are padding in every row; this one is used up."""

    def writable(self) -> "Cache":
        """The cache to write into its tables; this one is used up."""

    @property
    def tables(self) -> list["Table"]:
        """What the cache holds."""


def put(cache: Cache, rows: Int[Tensor, " some"], other: Cache | None) -> Cache:
    """A cache, used up, with some rows as those of another that is not wider, or as padding; what may be written into `forks`."""
    cache = cache.writable()
    tables = cache.tables
    with torch.inference_mode():
        for table, new in zip(tables, other.tables if other else [None] * len(tables), strict=True):
            table.put(rows, new)
    return cache


@runtime_checkable
class Backend(Protocol):
    """How one kind of model is run: without dropout, whatever mode its modules are in."""

    def hooked(self, functions: Mapping[str, Hook]) -> AbstractContextManager[None]:
        """Hooks `(activation, hook)` at the named points inside the block, and none of them after it."""

    def forward(
        self, rows: Rows, cache: Any, *, keep_cache: bool, logits: Columns
    ) -> tuple[Float[Tensor, "row d_vocab"] | Float[Tensor, "row pos d_vocab"], Cache | None]:
        """Logits of the columns that are wanted, and the cache with the new columns in it, if it is to be kept."""


def backend_of(model: Any) -> Backend:
    """The backend that runs a model's hook points."""
    return HookedTransformerBackend(model) if is_hooked_transformer(model) else BridgeBackend(model)


def per_head(site: str) -> bool:
    """Whether a site holds `[row, head, query, key]`: attention before or after the softmax."""
    return site.endswith(("hook_attn_scores", "hook_pattern"))


@contextmanager
def hooks_on(model: Any, functions: Mapping[str, Hook]) -> Iterator[None]:
    """A hook `(tensor, hook)` at each named point inside the block, and none of them after it.

    Raises:
        ModelError: if the model has no hook point of such a name; not every TransformerLens says so itself.
    """
    points = model.hook_dict
    if missing := [site for site in functions if site not in points]:
        raise ModelError(
            f"a hook point must be one of the model's {len(points)}, got {missing[0]!r}; model.hook_dict names them"
        )
    with model.hooks(fwd_hooks=list(functions.items())):
        yield


@contextmanager
def _hooked(model: Any, functions: Mapping[str, Hook]) -> Iterator[None]:
    with evaluation_mode(model), hooks_on(model, functions):
        yield


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Dropout off inside the block; every module's mode is as it was afterwards."""
    # The bridge keeps the Hugging Face model outside its own submodules (TransformerLens 4.3), so its modules are named, too.
    # Each by itself: eval() and train() would give a module's children one mode, and a caller may have given them several.
    roots = [model, getattr(model, "original_model", model)]
    training = {module for root in roots for module in root.modules() if module.training}
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


SPARE = 32
"""Columns that a layer of a cache makes room for at once."""
ROOMY = 96
"""From so many columns on it does: fewer are soon copied, and attention reads rows that lie side by side faster."""


class RoomyLayer(DynamicLayer):
    """A layer of a cache that has room for columns and rows to come, once that pays: it copies what it holds once in `SPARE`
    columns, and not at each."""

    keys: Any
    values: Any

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        n_rows, start = len(self.keys), self.keys.shape[-2]
        if start < ROOMY and "room" not in self.__dict__:
            super().update(key_states, value_states, *args, **kwargs)
            return self.keys, self.values
        tables = self._with_room(n_rows, start + key_states.shape[-2])
        for table, new in zip(tables, (key_states, value_states), strict=True):
            table[..., start:, :].copy_(new)
        self.keys, self.values = tables
        return self.keys, self.values

    def extend(self, rows: Sequence[int]) -> None:
        """Copies of some rows after these; fastest where those of one row are side by side."""
        place = len(self.keys)
        tables = self._with_room(place + len(rows), self.keys.shape[-2])
        for row, copies in groupby(rows):
            n = len(list(copies))
            for table in tables:
                table.narrow(0, place, n).copy_(table[row])
            place += n
        self.keys, self.values = tables

    def _with_room(self, n_rows: int, n_columns: int) -> list[Tensor]:
        """So many rows and columns of the tables, the first of them those that are held."""
        held, room = (self.keys, self.values), self.__dict__.get("room")
        shape = (0, 0)
        # Else rows have left, or the tensors were replaced, and the room is another's.
        if room is not None and room[0].data_ptr() == held[0].data_ptr() and room[0].stride() == held[0].stride():
            shape = (len(room[0]), room[0].shape[-2])
        if shape[0] < n_rows or shape[1] < n_columns:
            rows, columns = max(shape[0], n_rows), max(shape[1], n_columns + SPARE)
            room = self.room = [one.new_empty(rows, *one.shape[1:-2], columns, one.shape[-1]) for one in held]
            for table, one in zip(room, held, strict=True):
                table.narrow(0, 0, len(one)).narrow(-2, 0, one.shape[-2]).copy_(one)
        assert room is not None
        return [table.narrow(0, 0, n_rows).narrow(-2, 0, n_columns) for table in room]


@dataclass(frozen=True, eq=False)
class BridgeCache:
    """A Hugging Face cache."""

    cache: Any

    def select(self, keep: Int[Tensor, " kept"]) -> "BridgeCache":
        if not self.forks:
            self.cache.batch_select_indices(keep.cpu())  # each layer may be on another device
            return self
        for layer in self._filled:
            _select(layer, keep)
        return self

    def select_by_layer(self, keep: Sequence[Int[Tensor, " _"]]) -> "BridgeCache":
        """The cache of some rows, of others at each layer; this one is used up."""
        if not self.forks or len(self._filled) != len(keep):
            raise ModelError(
                "rows that part need keys and values at every layer, and this model's cache holds something else"
            )
        for layer, its in zip(self.cache.layers, keep, strict=True):
            _select(layer, its)
        return self

    @property
    def _filled(self) -> list[Any]:
        """The layers that hold something: one may use another's keys, and keep none."""
        return [layer for layer in self.cache.layers if layer.get_seq_length() > 0]

    def extended(self, rows: Sequence[int]) -> "BridgeCache":
        for layer in self._filled:
            if type(layer) is RoomyLayer:
                layer.extend(rows)
            else:
                chosen = torch.tensor([*range(len(layer.keys)), *rows], device=layer.keys.device)
                layer.keys, layer.values = layer.keys.index_select(0, chosen), layer.values.index_select(0, chosen)
        return self

    def with_room(self) -> "BridgeCache":
        """The same cache, which from now on makes room where that pays; see `RoomyLayer`."""
        for layer in self.cache.layers:
            if type(layer) is DynamicLayer:
                layer.__class__ = RoomyLayer
        return self

    def copy(self) -> "BridgeCache":
        return BridgeCache(copy.deepcopy(self.cache))

    @property
    def forks(self) -> bool:
        kinds = (DynamicLayer, RoomyLayer, DynamicSlidingWindowLayer)  # states and fixed tensors are written in place
        return all(type(layer) in kinds for layer in getattr(self.cache, "layers", [None]))

    def fork(self) -> "BridgeCache":
        forked = copy.copy(self.cache)
        forked.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in forked.layers:
            layer.__dict__.pop("room", None)  # what this one appends next must not be what the other appends
        return BridgeCache(forked)

    def first(self, n: int) -> "BridgeCache":
        for layer in self._filled:
            layer.keys, layer.values = layer.keys[:n], layer.values[:n]
        return self

    def without(self, n: int) -> "BridgeCache":
        for layer in self._filled:
            width = layer.get_seq_length() - n
            if hasattr(layer, "cumulative_length"):  # a window's: it holds the last columns alone
                layer.cumulative_length = width
            layer.keys, layer.values = (table[..., -width:, :] for table in (layer.keys, layer.values))
        return self

    def writable(self) -> "BridgeCache":
        return self

    @property
    def tables(self) -> list["Table"]:
        return [Table(table, -2) for layer in self._filled for table in (layer.keys, layer.values)]


def _select(layer: Any, keep: Int[Tensor, " kept"]) -> None:
    chosen = keep.to(layer.keys.device)
    # Twice as fast as indexing, which batch_select_indices does.
    layer.keys, layer.values = layer.keys.index_select(0, chosen), layer.values.index_select(0, chosen)
    layer.__dict__.pop("room", None)


@dataclass(frozen=True, eq=False)
class BridgeBackend:
    """TransformerLens' bridge over a Hugging Face model."""

    model: Any

    def hooked(self, functions: Mapping[str, Hook]) -> AbstractContextManager[None]:
        return _hooked(self.model, functions)

    def forward(
        self, rows: Rows, cache: BridgeCache | None, *, keep_cache: bool, logits: Columns
    ) -> tuple[Tensor, BridgeCache | None]:
        options: dict[str, Any] = {"use_cache": keep_cache}
        if rows.padding == "left":
            # Without a hidden column before a token, no mask is what Hugging Face runs one prompt alone with.
            options["attention_mask"] = rows.mask
        if cache is not None:
            options["past_key_values"] = cache.cache
        columns = _wanted_columns(getattr(self.model, "original_model", self.model), rows, logits, options)
        out, kept = self.model(rows.tokens, return_type="logits_and_cache", **options)
        out = _chosen_columns(out, rows, logits, columns)
        return out, BridgeCache(kept) if keep_cache and kept is not None else None


@dataclass(frozen=True, eq=False)
class LeanBackend:
    """The plain Hugging Face modules below a bridge."""

    model: Any
    tree: Tree
    graphs: bool = False
    """Whether steps of one token are run over fixed tensors, and recorded on a GPU; see `static`."""

    def hooked(self, functions: Mapping[str, Hook]) -> AbstractContextManager[None]:
        return self.tree.hooked(functions)

    def forward(
        self, rows: Rows, cache: BridgeCache | None, *, keep_cache: bool, logits: Columns
    ) -> tuple[Tensor, BridgeCache | None]:
        out, columns, kept = self._run(rows, cache, keep_cache=keep_cache, logits=logits)
        return _chosen_columns(out, rows, logits, columns), kept

    def forward_parting(
        self, rows: Rows, cache: BridgeCache | None, stages: Sequence[Stage], *, keep_cache: bool, logits: Columns
    ) -> tuple[Tensor, BridgeCache | None]:
        """The same of rows that part on the way; see `parting`.

        Raises:
            ModelError: where a cache is not made of keys and values of every layer.
        """
        last, by_layer = stages[-1], [stage_of(stages, layer) for layer in range(len(self.tree.blocks))]
        if cache is not None:
            cache = cache.select_by_layer([stage.rows for stage in by_layer])
        with parting(self.tree.blocks, stages):
            first = rows.select(stages[0].rows)
            out, columns, kept = self._run(first, cache, keep_cache=keep_cache, logits=logits)
        out = _chosen_columns(out, rows.select(last.rows), logits, columns)[last.share.to(out.device)]
        return out, kept and kept.select_by_layer([stage.share for stage in by_layer])

    def _run(
        self, rows: Rows, cache: BridgeCache | None, *, keep_cache: bool, logits: Columns
    ) -> tuple[Tensor, Int[Tensor, " column"] | None, BridgeCache | None]:
        """The model's logits, of which columns they are (None: all), and the cache."""
        options: dict[str, Any] = {"use_cache": keep_cache}
        n_columns = rows.tokens.shape[1]
        if rows.padding == "left":
            options["attention_mask"] = rows.mask
            if self.model._accepts_derived_position_ids():
                options["position_ids"] = rows.positions.clamp(min=0)
                if n_columns == 1 and self.tree.causal_alone:
                    # One query sees every token so far, and the mask need not be built from the model's rules.
                    options["attention_mask"] = rows.mask[:, None, None, :].bool()
        if cache is not None:
            options["past_key_values"] = cache.cache
        columns = _wanted_columns(self.tree.root, rows, logits, options)
        result = self.tree.root(rows.tokens, **options)
        kept = getattr(result, "past_key_values", None)
        return result.logits, columns, BridgeCache(kept).with_room() if keep_cache and kept is not None else None


def _wanted_columns(module: Any, rows: Rows, logits: Columns, options: dict[str, Any]) -> Int[Tensor, " column"] | None:
    """Ask a Hugging Face model for no more columns' logits than are wanted; those, or None where it gives all."""
    if logits == "all" or not _keeps_logits(type(module).forward):
        return None
    last_column = rows.tokens.shape[1] - 1
    columns = torch.unique(rows.last) if last_column else rows.last[:1]
    options["logits_to_keep"] = 1 if not last_column or columns.tolist() == [last_column] else columns
    return columns


def _chosen_columns(
    out: Float[Tensor, "row column d_vocab"], rows: Rows, logits: Columns, columns: Int[Tensor, " column"] | None
) -> Float[Tensor, "row d_vocab"] | Float[Tensor, "row pos d_vocab"]:
    """The logits that are wanted, of those that a model gave."""
    if logits == "all":
        return out
    if out.shape[1] == 1:
        return out[:, 0]
    place = rows.last if columns is None else torch.searchsorted(columns, rows.last)
    return out[torch.arange(len(out)), place.to(out.device)]


@functools.cache
def _keeps_logits(model_forward: Callable[..., Any]) -> bool:
    """Whether a Hugging Face model can leave out the logits of columns that are not wanted: a vocabulary is wide."""
    return "logits_to_keep" in inspect.signature(model_forward).parameters


@dataclass(frozen=True, eq=False)
class HookedCache:
    """TransformerLens' own cache."""

    cache: Any

    def select(self, keep: Int[Tensor, " kept"]) -> "HookedCache":
        for entry in self.cache.entries:
            entry.past_keys = entry.past_keys[keep.to(entry.past_keys.device)]
            entry.past_values = entry.past_values[keep.to(entry.past_values.device)]
        mask = self.cache.previous_attention_mask
        self.cache.previous_attention_mask = mask[keep.to(mask.device)]
        return self

    def extended(self, rows: Sequence[int]) -> "HookedCache":
        return self.select(torch.tensor([*range(len(self.cache.previous_attention_mask)), *rows]))

    def copy(self) -> "HookedCache":
        # Entries are replaced when they grow, and written into only after that, so their tensors may be shared.
        entries = [replace(entry) for entry in self.cache.entries]
        return HookedCache(replace(self.cache, entries=entries))

    forks = True

    def fork(self) -> "HookedCache":
        return self.copy()

    def first(self, n: int) -> "HookedCache":
        for entry in self.cache.entries:
            entry.past_keys, entry.past_values = entry.past_keys[:n], entry.past_values[:n]
        self.cache.previous_attention_mask = self.cache.previous_attention_mask[:n]
        return self

    def without(self, n: int) -> "HookedCache":
        for entry in self.cache.entries:
            entry.past_keys, entry.past_values = entry.past_keys[:, n:], entry.past_values[:, n:]
        self.cache.previous_attention_mask = self.cache.previous_attention_mask[:, n:]
        return self

    def writable(self) -> "HookedCache":
        return self

    @property
    def tables(self) -> list["Table"]:
        held = [table for entry in self.cache.entries for table in (entry.past_keys, entry.past_values)]
        return [Table(table, 1) for table in (*held, self.cache.previous_attention_mask)]


@dataclass(frozen=True, eq=False)
class HookedTransformerBackend:
    """TransformerLens 3's HookedTransformer."""

    model: Any

    def hooked(self, functions: Mapping[str, Hook]) -> AbstractContextManager[None]:
        return _hooked(self.model, functions)

    def forward(
        self, rows: Rows, cache: HookedCache | None, *, keep_cache: bool, logits: Columns
    ) -> tuple[Tensor, HookedCache | None]:
        n_rows, n_columns = rows.tokens.shape
        if keep_cache and cache is None:
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            fresh = TransformerLensKeyValueCache.init_cache(self.model.cfg, model_device(self.model), n_rows)
            cache = HookedCache(fresh)
        # Without a mask, the model would guess one from the padding token. The cache remembers that of its columns, and some of
        # these may have been hidden since.
        mask = rows.mask[:, -n_columns:]
        past = None if cache is None else cache.cache
        if past is not None:
            past.previous_attention_mask = rows.mask[:, :-n_columns].to(past.previous_attention_mask)
        n_layers = int(self.model.cfg.n_layers)
        resid = self.model(rows.tokens, attention_mask=mask, past_kv_cache=past, stop_at_layer=n_layers)
        if logits == "last":  # a vocabulary is wide: the other columns go no further
            resid = resid[torch.arange(n_rows), rows.last.to(resid.device)][:, None]
        out = self.model(resid, start_at_layer=n_layers, return_type="logits")
        return out[:, 0] if logits == "last" else out, cache if keep_cache else None
