"""Backends: how each kind of model is run, and what its key-value cache is.

    TransformerBridge     Hugging Face modules with Hugging Face's cache (TransformerLens 4, and 3)
    HookedTransformer     TransformerLens' own modules with its own cache (TransformerLens 3; version 4 has dropped it)

Both have the same hook names, so edits and reads do not know which one they meet. A HookedTransformer has no Hugging Face model
inside: what a bridge is asked there (what stops a text, windows, the settings of the weights) is asked of its `cfg` and its
tokenizer's files, and `facts.coordinate_frame` tells whether its weights were folded or centred.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlens.models.facts import is_hooked_transformer, model_device
from steerlens.models.rows import Rows

Columns = Literal["last", "all"]
"""Which columns' logits are wanted: of each row's last token, or all."""


@dataclass(frozen=True, eq=False)
class Table:
    """One tensor of a cache, its rows first, with an axis of columns."""

    tensor: Tensor
    axis: int

    def newest(self, rows: Int[Tensor, " some"]) -> Tensor:
        """A copy of some rows' newest column."""
        return self.tensor.select(self.axis, -1)[rows.to(self.tensor.device)]

    def put_newest(self, rows: Int[Tensor, " some"], column: Tensor) -> None:
        """Write some rows' newest column."""
        self.tensor.select(self.axis, -1)[rows.to(self.tensor.device)] = column

    def step_back(self, rows: Int[Tensor, " some"], before: "Table | None") -> None:
        """Give some rows what they held before the newest column, with one more column of padding on their left."""
        rows = rows.to(self.tensor.device)
        width = self.tensor.shape[self.axis]
        padding = torch.zeros_like(self.tensor[rows].narrow(self.axis, 0, 1))
        held = padding if before is None else torch.cat([padding, before.tensor[rows]], dim=self.axis)
        # A window that is full keeps no padding.
        self.tensor[rows] = held.narrow(self.axis, held.shape[self.axis] - width, width)


@runtime_checkable
class Cache(Protocol):
    """Keys and values of the columns so far."""

    def select(self, keep: Int[Tensor, " kept"]) -> "Cache":
        """The cache of some rows, in the given order and as often as they come; this one is used up."""

    def copy(self) -> "Cache":
        """The same again, sharing nothing."""

    @property
    def forks(self) -> bool:
        """Whether the cache grows by new tensors, so that `fork` is right."""

    def fork(self) -> "Cache":
        """The cache as it is now, to go on from in another way; neither sees what the other appends."""

    def first(self, n: int) -> "Cache":
        """The first n rows, as they lie in this one's tensors; this one is used up."""

    @property
    def tables(self) -> list["Table"]:
        """What the cache holds, to be written into."""


@runtime_checkable
class Backend(Protocol):
    """How one kind of model is run."""

    def forward(
        self, rows: Rows, cache: Any, *, keep_cache: bool, logits: Columns
    ) -> tuple[Float[Tensor, "row d_vocab"] | Float[Tensor, "row pos d_vocab"], Cache | None]:
        """Logits of the columns that are wanted, and the cache with the new columns in it, if it is to be kept."""


def backend_of(model: Any) -> Backend:
    """The backend of a model."""
    return HookedTransformerBackend(model) if is_hooked_transformer(model) else BridgeBackend(model)


@dataclass(frozen=True, eq=False)
class BridgeCache:
    """A Hugging Face cache."""

    cache: Any

    def select(self, keep: Int[Tensor, " kept"]) -> "BridgeCache":
        if not self.forks:
            self.cache.batch_select_indices(keep.cpu())  # each layer may be on another device
            return self
        for layer in self.cache.layers:
            if layer.get_seq_length() > 0:  # twice as fast as indexing, which batch_select_indices does
                chosen = keep.to(layer.keys.device)
                layer.keys, layer.values = layer.keys.index_select(0, chosen), layer.values.index_select(0, chosen)
        return self

    def copy(self) -> "BridgeCache":
        return BridgeCache(copy.deepcopy(self.cache))

    @property
    def forks(self) -> bool:
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        kinds = (DynamicLayer, DynamicSlidingWindowLayer)  # states and fixed tensors are written in place
        return all(type(layer) in kinds for layer in getattr(self.cache, "layers", [None]))

    def fork(self) -> "BridgeCache":
        forked = copy.copy(self.cache)
        forked.layers = [copy.copy(layer) for layer in self.cache.layers]
        return BridgeCache(forked)

    def first(self, n: int) -> "BridgeCache":
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:n], layer.values[:n]
        return self

    @property
    def tables(self) -> list["Table"]:
        return [Table(table, -2) for layer in self.cache.layers for table in (layer.keys, layer.values)]


@dataclass(frozen=True, eq=False)
class BridgeBackend:
    """TransformerLens' bridge over a Hugging Face model."""

    model: Any

    def forward(
        self, rows: Rows, cache: BridgeCache | None, *, keep_cache: bool, logits: Columns
    ) -> tuple[Tensor, BridgeCache | None]:
        options: dict[str, Any] = {"use_cache": keep_cache}
        if rows.padding == "left":
            # Without a hidden column before a token, no mask is what Hugging Face runs one prompt alone with.
            options["attention_mask"] = rows.mask
        if cache is not None:
            options["past_key_values"] = cache.cache
        last, columns = rows.last, None
        if logits == "last" and _keeps_logits(type(getattr(self.model, "original_model", self.model)).forward):
            columns = torch.unique(last)
            options["logits_to_keep"] = 1 if columns.tolist() == [rows.tokens.shape[1] - 1] else columns
        out, kept = self.model(rows.tokens, return_type="logits_and_cache", **options)
        if logits == "last":
            place = last if columns is None else torch.searchsorted(columns, last)
            out = out[torch.arange(len(out)), place.to(out.device)]
        return out, BridgeCache(kept) if keep_cache and kept is not None else None


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

    def copy(self) -> "HookedCache":
        # Entries are replaced when they grow and never written into, so their tensors may be shared.
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

    @property
    def tables(self) -> list["Table"]:
        held = [table for entry in self.cache.entries for table in (entry.past_keys, entry.past_values)]
        return [Table(table, 1) for table in (*held, self.cache.previous_attention_mask)]


@dataclass(frozen=True, eq=False)
class HookedTransformerBackend:
    """TransformerLens 3's HookedTransformer."""

    model: Any

    def forward(
        self, rows: Rows, cache: HookedCache | None, *, keep_cache: bool, logits: Columns
    ) -> tuple[Tensor, HookedCache | None]:
        n_rows, n_columns = rows.tokens.shape
        if keep_cache and cache is None:
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            fresh = TransformerLensKeyValueCache.init_cache(self.model.cfg, model_device(self.model), n_rows)
            cache = HookedCache(fresh)
        # The cache remembers the mask of its columns. Without a mask, the model would guess one from the padding token.
        mask = rows.mask[:, -n_columns:]
        past = None if cache is None else cache.cache
        n_layers = int(self.model.cfg.n_layers)
        resid = self.model(rows.tokens, attention_mask=mask, past_kv_cache=past, stop_at_layer=n_layers)
        if logits == "last":  # a vocabulary is wide: the other columns go no further
            resid = resid[torch.arange(n_rows), rows.last.to(resid.device)][:, None]
        out = self.model(resid, start_at_layer=n_layers, return_type="logits")
        return out[:, 0] if logits == "last" else out, cache if keep_cache else None
