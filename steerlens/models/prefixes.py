"""Rows that begin alike: what they have in common is run once, and the rest of each after it.

    row a    | prefix .............. | its rest .................... |
    row b    | padding | prefix .... | prefix | its rest ........... |

A row whose rest is shorter than another's runs the end of the prefix again, so that padding stands on its left and never within
it: where a model counts columns, a gap would count.
"""

from collections.abc import Sequence
from typing import Any

import torch

from steerlens.models.backends import Cache, Table
from steerlens.models.facts import model_device
from steerlens.models.rows import Rows

SPARED = {"cpu": 128}
"""Tokens that one more pass has to spare, by device: as many as a processor runs while it begins a pass, about."""
SPARED_ELSEWHERE = 8192
"""A GPU runs thousands in that time."""


def pays(model: Any, n_tokens: int) -> bool:
    """Whether it is worth one pass more to run so many tokens less."""
    return n_tokens >= SPARED.get(model_device(model).type, SPARED_ELSEWHERE)


def common_prefix(rows: Sequence[list[int]]) -> int:
    """How many first tokens all rows share, leaving each at least one of its own.

    >>> common_prefix([[5, 6, 7], [5, 6, 8, 9], [5, 6]])
    1
    """
    first, last = min(rows), max(rows)  # what the first and the last in order share, all between them share
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(shared, min(map(len, rows)) - 1)


def held_prefixes(ids: Sequence[Sequence[int]], width: int) -> list[int]:
    """How many of the first `width` tokens of each row a cache can hold; below 1 where the row is too short to share any.

    >>> held_prefixes([[5, 6, 7, 1], [5, 6, 7, 1, 2]], width=3)
    [2, 3]
    """
    rest = max(map(len, ids)) - width
    return [len(row) - rest for row in ids]


def holds_all(cache: Cache, width: int) -> bool:
    """Whether a cache of some tokens holds each of them at every layer; a window keeps the last ones alone."""
    return cache.forks and all(table.tensor.shape[table.axis] == width for table in cache.tables)


def after_prefix(
    cache: Cache, share: Sequence[int], ids: Sequence[Sequence[int]], *, width: int, prompt_lengths: Sequence[int]
) -> tuple[Cache, Rows]:
    """The rest of some rows, to be run after what they begin with, and the cache to run them with.

    Args:
        cache: Of one or several prefixes of `width` tokens each, without padding; it is used up.
        share: Which of them each row begins with.
        ids: The tokens of the rows, of each of which the cache can hold some.
    """
    held = held_prefixes(ids, width)
    with torch.inference_mode():
        cache = cache.select(torch.tensor(share)).writable()
        for n in {*held} - {width}:
            rows = torch.tensor([row for row, its in enumerate(held) if its == n])
            for table in cache.tables:
                first = table.tensor.index_select(0, rows.to(table.tensor.device)).narrow(table.axis, 0, n)
                table.put(rows, Table(first, table.axis))
    rest = max(map(len, ids)) - width
    mask = torch.ones(len(ids), width + rest, dtype=torch.long)
    for row, n in enumerate(held):
        mask[row, : width - n] = 0
    return cache, Rows(torch.tensor([list(row[-rest:]) for row in ids]), mask, tuple(prompt_lengths))
