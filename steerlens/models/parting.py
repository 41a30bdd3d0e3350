"""Rows that are alike up to a layer are run as one up to it.

    layer             0   1   2   3   4   5 ...
    prompt            p --------+ p --------+ p
    + a after 2                 + p + a ----- p + a
    + b after 4                             + p + b

What a step changes after a layer is seen by the layers above it alone. So a prompt that is run with several strengths, at several
layers, is run once up to the lowest of them: its residual is then copied, and each copy goes on by itself. The cache comes out as
if every row had been run: at each layer, rows that were one there get the same keys and values.

It needs blocks that are given nothing of each row but the residual and what `PER_ROW` names, and that keep keys and values, each
its own: whether a model's are so is tried on the model itself (`probe.can_part`).
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

PER_ROW = {"attention_mask": (2, 4), "position_ids": (2,), "position_embeddings": (3,)}
"""What Hugging Face's blocks are given of each row beside its residual, with the numbers of axes it has where the first one is
rows."""


@dataclass(frozen=True, eq=False)
class Stage:
    """The rows that are run between two layers after which some part."""

    after: int
    """The layer that they come out of; -1 for those that a pass begins with."""
    parents: Int[Tensor, " here"]
    """Of each the one it was in the stage before; in the first stage, itself."""
    rows: Int[Tensor, " here"]
    """Of each a row of the pass that it stands for, the first one."""
    share: Int[Tensor, " row"]
    """Of each row of the pass the one that stands for it."""


def stages(starts: Sequence[Hashable], steps: Sequence[Mapping[int, Hashable]]) -> list[Stage]:
    """How the rows of a pass part.

    Args:
        starts: Of each row what tells it from others where the pass begins.
        steps: Of each row what is done to it after a layer, by layer.

    Example:
        >>> found = stages(["p", "p", "q", "p"], [{2: "a"}, {4: "b"}, {}, {}])
        >>> [(stage.after, stage.rows.tolist()) for stage in found]
        [(-1, [0, 2]), (2, [0, 1, 2]), (4, [0, 1, 2, 3])]
    """
    found: list[Stage] = []
    classes = numbered(starts)
    layers = sorted({layer for its in steps for layer in its})
    for layer in [-1, *layers]:
        before = classes
        classes = numbered([(one, its.get(layer)) for one, its in zip(classes, steps, strict=True)])
        if not found or max(classes) > max(before):
            rows = firsts(classes)
            parents = [before[row] for row in rows] if found else range(len(rows))
            found.append(Stage(layer, *map(torch.tensor, (parents, rows, classes))))
    return found


def numbered(keys: Sequence[Hashable]) -> list[int]:
    """Equal keys by one number, in the order in which they come.

    >>> numbered(["b", "a", "b"])
    [0, 1, 0]
    """
    number = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return [number[key] for key in keys]


def firsts(numbers: Sequence[int]) -> list[int]:
    """Where each of them comes first, in order.

    >>> firsts([0, 1, 0, 2])
    [0, 1, 3]
    """
    place = {number: place for place, number in reversed(list(enumerate(numbers)))}
    return [place[number] for number in sorted(place)]


def spared(found: Sequence[Stage], n_layers: int) -> float:
    """The share of the rows' blocks that need not be run."""
    ends = [*(stage.after + 1 for stage in found[1:]), n_layers]
    run = sum(len(stage.rows) * (end - stage.after - 1) for stage, end in zip(found, ends, strict=True))
    return 1 - run / (len(found[0].share) * n_layers)


def stage_of(found: Sequence[Stage], layer: int, *, output: bool = False) -> Stage:
    """The stage of a layer's block, or of what comes out of it."""
    return next(stage for stage in reversed(found) if stage.after < layer + output)


@contextmanager
def parting(blocks: Sequence[nn.Module], found: Sequence[Stage]) -> Iterator[None]:
    """Inside the block, rows that a pass over these modules begins with part as they should; hooks are gone after it."""
    here = _Here(found[0])
    handles = []
    try:
        for stage in found[1:]:
            # Before any other hook: what is done after this layer is done to rows that have parted.
            handles.append(blocks[stage.after].register_forward_hook(partial(here.part, stage), prepend=True))
        for block in blocks[found[1].after + 1 :] if len(found) > 1 else []:
            handles.append(block.register_forward_pre_hook(here.widen, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Here:
    """The rows that there are in a pass, as far as it has come."""

    def __init__(self, first: Stage) -> None:
        self.first = self.stage = first
        self.known: dict[int, tuple[Tensor, Tensor]] = {}
        """What the first rows' tensors became for these rows, by number, with the first rows' own, so that the number stays its:
        blocks are given the same ones."""

    def part(self, stage: Stage, module: nn.Module, args: Any, output: Any) -> Any:
        """A block's output, of more rows from now on."""
        self.stage, self.known = stage, {}
        if isinstance(output, Tensor):
            return output.index_select(0, stage.parents.to(output.device))
        return (output[0].index_select(0, stage.parents.to(output[0].device)), *output[1:])

    def widen(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What a block is given beside the residual, of these rows instead of those that the pass began with."""
        names = _argument_names(type(module).forward)
        args = [self._of_rows(name, value) for name, value in zip(names, args, strict=False)] + list(args[len(names) :])
        return tuple(args), {name: self._of_rows(name, value) for name, value in kwargs.items()}

    def _of_rows(self, name: str, value: Any) -> Any:
        if name not in PER_ROW:
            return value
        if isinstance(value, tuple):
            return tuple(self._of_rows(name, one) for one in value)
        if not isinstance(value, Tensor) or value.ndim not in PER_ROW[name]:
            return value
        if len(value) != len(self.first.rows) or len(value) == 1:
            return value  # the same for all rows, which an axis of one or none says
        if id(value) not in self.known:
            origin = self.first.share[self.stage.rows]
            self.known[id(value)] = value, value.index_select(0, origin.to(value.device))
        return self.known[id(value)][1]


@cache
def _argument_names(forward: Any) -> tuple[str, ...]:
    return tuple(signature(forward).parameters)[1:]
