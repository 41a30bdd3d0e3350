"""Rows of a batch: token ids with their mask, and the positions that follow from it. Nothing else pads.

A row is one text. Columns hold its tokens, one after another, and padding on either side or in between:

    mask      1 for a token, 0 for padding; it also covers the columns that a key-value cache holds already
    position  how many tokens of the row come before this one; below zero for padding

Positions count tokens and never columns, so they are the same alone, beside longer rows, padded on the left or on the right,
and while a cache is decoded.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from steerlens.data.pairs import InstructionPair
from steerlens.errors import SteerlensError
from steerlens.models.prompts import PromptFormat, encode_all, token_span

Side = Literal["left", "right"]
Span = tuple[int, int]
"""The positions [start, stop) of some tokens of a row."""


@dataclass(frozen=True, eq=False)
class Rows:
    """What one pass feeds: new columns, and the mask of these and of all columns before them.

    Example:
        >>> rows = pad([[5, 6, 7], [8]])
        >>> rows.then(torch.tensor([[9], [9]])).positions.tolist()
        [[3], [1]]
    """

    tokens: Int[Tensor, "row pos"]
    mask: Int[Tensor, "row past_and_pos"]
    """1 for tokens, 0 for padding, in the columns that are cached and then in those of `tokens`."""
    prompt_lengths: tuple[int, ...]
    """How many tokens of each row are its prompt; what comes after them counts as generated."""
    spans: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)
    """Named spans, one per row: "instruction" for the tokens of the instruction."""

    @cached_property
    def positions(self) -> Int[Tensor, "row pos"]:
        """The position of each new column; -1 for padding."""
        return self.key_positions[:, -self.tokens.shape[1] :]

    @cached_property
    def key_positions(self) -> Int[Tensor, "row past_and_pos"]:
        """The position of each column so far, the cached ones included; -1 for padding."""
        return token_positions(self.mask)

    @cached_property
    def lengths(self) -> Int[Tensor, " row"]:
        """How many tokens each row has so far, the cached ones included."""
        return self.mask.sum(1)

    @cached_property
    def last(self) -> Int[Tensor, " row"]:
        """The new column that holds each row's last token."""
        # Not the last column: rows may be padded on the right, and a row may have no token in it.
        return self.positions.argmax(1) if self.tokens.shape[1] > 1 else self.tokens.new_zeros(len(self.tokens))

    @cached_property
    def padding(self) -> Side | None:
        """ "left" where a hidden column comes before a token, as a gap within a row does; None where no column is hidden."""
        if bool(self.mask.all()):
            return None
        moved = self.key_positions != torch.arange(self.mask.shape[1], device=self.mask.device)
        return "left" if bool((moved & (self.mask == 1)).any()) else "right"

    def select(self, keep: Int[Tensor, " kept"]) -> "Rows":
        """Some of the rows, in the given order."""
        chosen = keep.tolist()
        return Rows(
            tokens=self.tokens[keep.to(self.tokens.device)],
            mask=self.mask[keep.to(self.mask.device)],
            prompt_lengths=tuple(self.prompt_lengths[row] for row in chosen),
            spans={name: tuple(spans[row] for row in chosen) for name, spans in self.spans.items()},
        )

    def then(self, tokens: Int[Tensor, "row new"], mask: Int[Tensor, "row new"] | None = None) -> "Rows":
        """The rows that go on with these columns, once those here are in the cache; without a mask all are tokens."""
        if mask is not None:
            return replace(self, tokens=tokens, mask=torch.cat([self.mask, mask.to(self.mask.device)], dim=1))
        n = tokens.shape[1]
        rows = replace(self, tokens=tokens, mask=torch.nn.functional.pad(self.mask, (0, n), value=1))
        # What is known here goes on, and need not be found anew at every step.
        known: dict[str, Any] = {"lengths": self.lengths + n, "positions": self.lengths[:, None]}
        if n > 1:
            known["positions"] = known["positions"] + torch.arange(n, device=self.mask.device)
        if self.padding != "right":  # a token after such padding makes a gap
            known["padding"] = self.padding
        rows.__dict__.update(known)
        return rows

    def to(self, device: torch.device | str) -> "Rows":
        """The same rows on another device."""
        wanted = torch.device(device)
        # "cuda" is whichever of them is current: what lies on one of them lies there.
        if all(
            has.type == wanted.type and wanted.index in (None, has.index)
            for has in (self.tokens.device, self.mask.device)
        ):
            return self
        return replace(self, tokens=self.tokens.to(device), mask=self.mask.to(device))


def pad(
    ids: Sequence[Sequence[int]],
    *,
    side: Side = "left",
    pad_id: int = 0,
    prompt_lengths: Sequence[int] | None = None,
    spans: Mapping[str, Sequence[Span]] | None = None,
) -> Rows:
    """Lists of token ids as rows of one width, padded on a side.

    Args:
        pad_id: What stands in padded columns; the mask hides it, so any id of the vocabulary does.
        prompt_lengths: Default: every token belongs to the prompt.

    Example:
        >>> pad([[5, 6, 7], [8]]).tokens.tolist()
        [[5, 6, 7], [0, 0, 8]]
    """
    lengths = [len(row) for row in ids]
    width = max(lengths)
    tokens = torch.full((len(ids), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(ids), width), dtype=torch.long)
    for index, row in enumerate(ids):
        start = width - len(row) if side == "left" else 0
        tokens[index, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, start : start + len(row)] = 1
    return Rows(
        tokens=tokens,
        mask=mask,
        prompt_lengths=tuple(lengths if prompt_lengths is None else prompt_lengths),
        spans={name: tuple(found) for name, found in (spans or {}).items()},
    )


def pair_rows(
    model: Any, pairs: Iterable[InstructionPair], prompt_format: PromptFormat = PromptFormat(), *, side: Side = "left"
) -> Rows:
    """The prompts with their instructions, one row each; the span "instruction" holds the instruction's tokens.

    Raises:
        DataError: naming the pair whose instruction stands nowhere in its prompt, or is woven into the query.
        SteerlensError: if a prompt does not fit the context, or the template changes it.

    Example:
        >>> rows = pair_rows(model, pairs[:2])
        >>> len(rows.spans["instruction"])
        2
    """
    pairs = list(pairs)
    ids = encode_all(model, [pair.text("text") for pair in pairs], prompt_format)
    spans = [token_span(model, pair.prompt, pair.instruction_span, prompt_format) for pair in pairs]
    return pad(ids, side=side, pad_id=pad_id(model), spans={"instruction": spans})


def token_positions(mask: Int[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """How many tokens of the row come before each column; -1 for padding, wherever it stands."""
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, -1)


def n_hidden(mask: Int[Tensor, "row past"]) -> int:
    """How many first columns are padding in every row."""
    return int(mask.any(0).int().argmax())


def pad_id(model: Any) -> int:
    """A token id for padding. The mask hides it, so any id of the vocabulary does."""
    tokenizer = model.tokenizer
    # A padding token that was added to a tokenizer alone has no embedding.
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(found) if found is not None and found < int(model.cfg.d_vocab) else 0


def random_rows(model: Any, lengths: Iterable[int], *, seed: int) -> list[list[int]]:
    """Rows of random ids that both the model and its tokenizer know: a vocabulary may be padded, and a tokenizer be larger."""
    generator = torch.Generator().manual_seed(seed)
    limit = min(int(model.cfg.d_vocab), len(model.tokenizer))
    return [torch.randint(limit, (length,), generator=generator).tolist() for length in lengths]


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices grouped so that rows of like length share a batch, longest first (an out-of-memory shows at once)."""
    if batch_size < 1:
        raise SteerlensError(f"batch_size must be at least 1, got {batch_size}")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
