"""Rows of a batch: token ids padded on the left, with their mask and positions. Nothing else pads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from steerlens.errors import SteerlensError


@dataclass(frozen=True)
class TokenBatch:
    """Left-padded token ids with their mask."""

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    """1 for real tokens, 0 for padding."""


def left_pad(rows: Sequence[Sequence[int]], *, pad_id: int = 0) -> TokenBatch:
    """Rows of ids as one batch whose last column holds every row's last token."""
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        tokens[index, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, width - len(row) :] = 1
    return TokenBatch(tokens, mask)


def pad_id(model: Any) -> int:
    """A token id for padding. The mask hides it, so any valid id does."""
    tokenizer = model.tokenizer
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(found or 0)


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices grouped so that rows of like length share a batch, longest first (an out-of-memory shows at once)."""
    if batch_size < 1:
        raise SteerlensError(f"batch_size must be at least 1, got {batch_size}")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def token_positions(attention_mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """The absolute position of each column, counting real tokens of left-padded rows; padding is below zero."""
    width = attention_mask.shape[1]
    padding = width - attention_mask.sum(1, keepdim=True)
    return torch.arange(width, device=attention_mask.device)[None] - padding
