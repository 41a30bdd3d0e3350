"""How alike directions are: cosines between instructions at a layer, and between the layers of one vector.

    cos(a, b) = a . b / (|a| |b|)        of mean differences

Instructions stand in the order of a hierarchical clustering (average linkage of 1 - cosine) whose leaves are ordered so that
neighbours are most alike (Bar-Joseph et al. 2001); layers stand in theirs.

The control is a random direction. In `d` dimensions, the squared cosine of two random directions is Beta(1/2, (d - 1) / 2), so
the middle 95 % of cosines lie within the square root of its 95 % quantile, about 1.96 / sqrt(d). With activations instead of
vectors, intervals by bootstrap over queries stand beside the cosines; see `examples`.

What a cosine does not show: all instructions have something in common (there is more text, and it asks for something), so
high cosines between unlike instructions are usual; and noise in both vectors pulls a cosine towards zero.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from scipy.stats import beta

from steerlens._results import Result
from steerlens._typing import WholeNumber, whole, whole_numbers
from steerlens.errors import DataError, SteerlensError
from steerlens.figures.matrices import cosine_heatmap
from steerlens.figures.words import shown_name
from steerlens.reading.examples import (
    CONFIDENCE,
    examples_of,
    generator,
    mean_products,
    recorded_layers,
    require_instructions,
    resamples,
    spread,
)
from steerlens.vectors.activations import Activations
from steerlens.vectors.vector import SteeringVector

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class Cosines(Result):
    """One row per two directions: first, second, cosine, low, high (nan without activations), control_low, control_high.

    >>> layer_cosines(vector).matrix.shape
    (8, 8)
    """

    matrix: pd.DataFrame
    """All cosines, square, in the order of the table."""
    about: str
    """What the directions are, for the title of the picture."""
    axis: str
    """What tells the directions apart: "instruction" or "layer"."""

    def plot(self, **options: Any) -> "go.Figure":
        """A heat map in the order of the matrix."""
        bound = self.table["control_high"].iloc[0]
        note = f"cosine of mean differences; random directions: within \u00b1{bound:.2f}"
        labels = list(map(str, self.matrix.index))
        about = {"title": self.about, "note": note, "axis": self.axis, "intervals": self.table}
        return cosine_heatmap(self.matrix, labels, **{**about, **options})


def cosines(
    vectors: Mapping[str, SteeringVector] | Activations, *, layer: WholeNumber, seed: WholeNumber = 0
) -> Cosines:
    """Cosines between the directions of instructions at a layer, in hierarchical order.

    Args:
        vectors: Name -> vector; or activations of several instructions, whose mean differences are compared, with intervals.
        seed: Decides the resamples of the intervals.

    Raises:
        SteerlensError: for fewer than two instructions, a layer that one does not have, a direction that is zero, or vectors
            of models that cannot be compared.

    Example:
        >>> found = cosines({"one": vector, "other": -vector}, layer=4)
        >>> found.table["cosine"].round(6).tolist()
        [-1.0]
    """
    number, seed = whole(layer, "layer"), whole(seed, "seed")
    if isinstance(vectors, Activations):
        names, found = _of_activations(vectors, number, seed)
    else:
        if not isinstance(vectors, Mapping):
            raise SteerlensError(
                f"cosines compares vectors by name, or activations, got {type(vectors).__name__}; give a dict of vectors"
            )
        names = list(vectors)
        require_instructions(names, "cosines")
        first, *others = vectors.values()
        for other in others:
            first.shared_layers(other)
        units = np.stack([vector.unit(number).double().numpy() for vector in vectors.values()])
        found = _plain(units)
    order = hierarchical_order(found.value)
    return _cosines(
        found.reordered(order),
        [names[i] for i in order],
        f"How alike the directions of instructions are at layer {number}",
        "instruction",
    )


def layer_cosines(
    vector: SteeringVector | Activations,
    *,
    layers: Iterable[WholeNumber] | None = None,
    seed: WholeNumber = 0,
) -> Cosines:
    """Cosines between the directions of one vector at its layers, in the order of the layers.

    Args:
        vector: A vector; or activations of one instruction, whose mean differences are compared, with intervals.
        layers: Default: all at which the direction is not zero.
        seed: Decides the resamples of the intervals.

    Raises:
        SteerlensError: for fewer than two layers, one that is not there or where the direction is zero, or activations of
            several instructions.

    Example:
        >>> layer_cosines(vector).to_frame()[["first", "second"]].head(2).values.tolist()
        [[0, 1], [0, 2]]
    """
    chosen = _layers(vector, layers)
    if len(chosen) < 2:
        got = f"layer {chosen[0]} alone" if chosen else "none"
        raise SteerlensError(f"cosines between layers need at least two with a direction, got {got}; record others")
    if isinstance(vector, Activations):
        names = list(dict.fromkeys(vector.instructions))
        if len(names) > 1:
            raise DataError(
                f"cosines between layers are of one instruction, got {len(names)}; take a part of by_instruction()"
            )
        examples = examples_of(vector, chosen)
        rows = np.concatenate([examples.differences(layer) for layer in chosen])
        item, query = np.repeat(np.arange(len(chosen)), len(examples.query)), np.tile(examples.query, len(chosen))
        found = _resampled(rows, item, query, chosen, whole(seed, "seed"))
        about = names[0]
    else:
        found = _plain(np.stack([vector.unit(layer).double().numpy() for layer in chosen]))
        about = vector.name
    return _cosines(
        found, list(chosen), f"How alike the directions of {shown_name(about, 30)} are, layer by layer", "layer"
    )


def _layers(vector: SteeringVector | Activations, layers: Iterable[WholeNumber] | None) -> tuple[int, ...]:
    """The layers asked for, in order; by default those where there is a direction."""
    if layers is not None:
        return tuple(sorted(set(whole_numbers(layers, "layer"))))
    if isinstance(vector, Activations):
        moved = recorded_layers(vector, None)
        means = vector.differences.double().mean(dim=0)
        return tuple(layer for layer, mean in zip(moved, means, strict=True) if bool(mean.any()))
    return tuple(layer for layer in vector.layers if bool(vector[layer].any()))


def random_cosine(d_model: int) -> float:
    """Within which distance of zero the cosines of 95 % of random directions lie.

    >>> round(random_cosine(160), 3)
    0.155
    """
    return float(np.sqrt(beta.ppf(CONFIDENCE, 0.5, (d_model - 1) / 2))) if d_model > 1 else 1.0


def hierarchical_order(cosines: Float[np.ndarray, "item item"]) -> list[int]:
    """The order of the leaves of a clustering, in which neighbours are as alike as they can be."""
    distances = squareform(np.clip(1 - cosines, 0, None), checks=False)
    order: list[int] = leaves_list(linkage(distances, "average", optimal_ordering=True)).tolist()
    return order


@dataclass(frozen=True)
class _Found:
    value: Float[np.ndarray, "item item"]
    low: Float[np.ndarray, "item item"]
    high: Float[np.ndarray, "item item"]
    d_model: int

    def reordered(self, order: list[int]) -> "_Found":
        value, low, high = (part[np.ix_(order, order)] for part in (self.value, self.low, self.high))
        return _Found(value, low, high, self.d_model)


def _plain(units: Float[np.ndarray, "item d_model"]) -> _Found:
    value = np.clip(units @ units.T, -1, 1)
    return _Found(value, np.full_like(value, np.nan), np.full_like(value, np.nan), units.shape[1])


def _of_activations(activations: Activations, layer: int, seed: int) -> tuple[list[str], _Found]:
    examples = examples_of(activations, [layer])
    require_instructions(examples.instructions, "cosines")
    names = examples.instructions
    return list(names), _resampled(examples.differences(layer), examples.label, examples.query, names, seed)


def _resampled(
    rows: Float[np.ndarray, "pair d_model"],
    item: Int[np.ndarray, " pair"],
    query: Int[np.ndarray, " pair"],
    names: tuple[Any, ...],
    seed: int,
) -> _Found:
    n_queries, items = int(query.max()) + 1, len(names)
    value = _normalised(mean_products(rows, item, query, np.ones((1, n_queries))))[0]
    zero = [name for name, size in zip(names, np.diagonal(value), strict=True) if np.isnan(size)]
    if zero:
        raise SteerlensError(
            f"a cosine needs directions, and that of {zero[0]} is zero; were both sides the same prompts?"
        )
    draws = resamples(n_queries, generator(seed, "bootstrap", "cosines"))
    drawn = _normalised(mean_products(rows, item, query, draws))
    ends = np.array([[spread(drawn[:, i, j]) for j in range(items)] for i in range(items)])
    return _Found(value, ends[..., 0], ends[..., 1], rows.shape[1])


def _normalised(products: Float[np.ndarray, "resample item item"]) -> Float[np.ndarray, "resample item item"]:
    squares = np.diagonal(products, axis1=1, axis2=2)
    sizes = np.sqrt(np.where(squares > 0, squares, np.nan))
    found: Float[np.ndarray, "resample item item"] = products / (sizes[:, :, None] * sizes[:, None, :])
    return found.clip(-1, 1)


def _cosines(found: _Found, names: list[Any], about: str, axis: str) -> Cosines:
    bound = random_cosine(found.d_model)
    rows = [
        {
            "first": names[i],
            "second": names[j],
            "cosine": found.value[i, j],
            "low": found.low[i, j],
            "high": found.high[i, j],
            "control_low": -bound,
            "control_high": bound,
        }
        for i, j in combinations(range(len(names)), 2)
    ]
    return Cosines(pd.DataFrame(rows), pd.DataFrame(found.value, index=names, columns=names), about, axis)
