"""Whether instructions that carry a number (a length) lie along a line in the order of their numbers.

At one layer, of the mean differences of all pairs with the number n, each number counting once, about their centre:

    share       of their variance that the first principal component holds    1: the means lie on a straight line
    spearman    |rank correlation| of the first component with n              1: in the order of their numbers, either way

(Stolfo et al. 2025 see length instructions from short to long along a line of their t-SNE.) The control deals the numbers out
anew, query by query (`examples.shuffled`): a few means of noise have a first component, too, and with five numbers it is often
nearly in order. Intervals by bootstrap over queries, in which the means' own noise is not counted twice; see `examples`.

What these do not show: an order is not a scale, and a curve in one plane (an arch) has a high rank correlation, too; look at the
picture.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import rankdata

from steerlens._results import Result
from steerlens._typing import RealNumber, WholeNumber, plain, real, real_numbers, whole
from steerlens.errors import DataError, nearest
from steerlens.figures.geometry import line_scatter
from steerlens.figures.measures import measure_curves
from steerlens.reading.examples import (
    N_SHUFFLES,
    generator,
    mean_products,
    measured,
    queries_of,
    query_texts,
    recorded_layers,
    resamples,
    shuffled,
)
from steerlens.vectors.activations import Activations

if TYPE_CHECKING:
    import plotly.graph_objects as go


NAMES = {"spearman": "rank correlation", "share": "share of the first component"}


@dataclass(frozen=True, eq=False, repr=False)
class Line(Result):
    """One row per layer and measure (spearman, share): value, low, high, control, control_low, control_high.

    >>> found = line(acts, range(len(acts)), layers=4)  # numbers that mean nothing
    >>> found.points.columns.tolist()
    ['layer', 'instruction', 'number', 'prompt_id', 'query', 'x', 'y']
    """

    points: pd.DataFrame
    """Each pair's difference in the plane of the first two components of the means: layer, instruction, number, prompt_id, query,
    x, y, in residual units from the centre of the means; x grows with the number."""

    def plot(self, **options: Any) -> "go.Figure":
        """Pairs and means in the plane of the first two components, coloured by number, with a slider over layers."""
        return line_scatter(self.points, self.table, **options)

    def plot_layers(self, **options: Any) -> "go.Figure":
        """Both measures over the layers, with their intervals and shuffled numbers."""
        about = {
            "names": NAMES,
            "control": "shuffled numbers",
            "title": "Whether numbers lie along a line, layer by layer",
        }
        return measure_curves(self.table, **{"panels": "measure", **about, **options})


def line(
    activations: Activations,
    values: Mapping[str, RealNumber] | Iterable[RealNumber],
    *,
    layers: Iterable[WholeNumber] | WholeNumber | None = None,
    seed: WholeNumber = 0,
) -> Line:
    """Whether the differences of instructions with numbers lie along a line, in the order of the numbers.

    Args:
        activations: Of instructions with at least three numbers.
        values: The number of each instruction id; or of each pair, where one id has several (`sentence_pairs`).
        layers: Default all that were recorded.
        seed: Decides the resamples and the shuffled numbers.

    Returns:
        One row per layer and measure. Where the means do not differ, both are nan.

    Raises:
        SteerlensError: for fewer than three numbers, an instruction or pair without one, or a layer that was not recorded.

    Example:
        >>> levels = {f"length:{level}": n for n, level in enumerate(["short", "medium", "verbose"])}
        >>> asked = sl.data.PairSet(
        ...     pair for name in levels for pair in sl.length_pairs(queries, name.removeprefix("length:"))
        ... )
        >>> line(sl.record_activations(model, asked), levels, layers=4).to_frame()["measure"].tolist()
        ['spearman', 'share']
    """
    chosen, seed = recorded_layers(activations, layers), whole(seed, "seed")
    number = _numbers(activations, values)
    queries = queries_of(activations)
    order = np.lexsort(
        (np.array(activations.prompt_ids), number, np.array(queries))
    )  # in an order of their own, as the shuffles are
    ids, query = np.unique(np.array(queries)[order], return_inverse=True)
    numbers, item = np.unique(number[order], return_inverse=True)
    draws = resamples(len(ids), generator(seed, "bootstrap", "line"))
    shuffle = generator(seed, "numbers")
    dealt = [shuffled(item, query, shuffle) for _ in range(N_SHUFFLES)]
    rows: list[dict[str, Any]] = []
    points, before = [], None
    for layer in chosen:
        without, with_ = activations.resid[:, :, activations.layers.index(layer)].double().unbind(dim=1)
        differences = (with_ - without).numpy()
        x = differences[order]
        found = _measures(mean_products(x, item, query, np.ones((1, len(ids)))), numbers)
        resampled = _measures(mean_products(x, item, query, draws), numbers)
        control = _measures(np.stack([means @ means.T for means in (_means(x, one) for one in dealt)]), numbers)
        for name, value in found.items():
            row = measured(value[0], resampled[name], control[name])
            rows.append({"layer": layer, "measure": name} | row)
        centre, plane = _plane(_means(x, item), numbers)
        scores = (differences - centre) @ plane
        # The second component's sign is anyone's: as in the layer before.
        scores[:, 1] *= 1.0 if before is None or scores[:, 1] @ before >= 0 else -1.0
        before = scores[:, 1]
        points.append(_points(activations, layer, number, scores))
    return Line(pd.DataFrame(rows), pd.concat(points, ignore_index=True))


def _numbers(
    activations: Activations, values: Mapping[str, RealNumber] | Iterable[RealNumber]
) -> Float[np.ndarray, " pair"]:
    """The number of each pair.

    Raises:
        DataError: if one has none, or there are fewer than three.
    """
    if isinstance(values, Mapping):
        for name in dict.fromkeys(activations.instructions):
            if name not in values:
                raise DataError(f"every instruction needs a number, got none for {name!r}; {nearest(name, values)}")
        known = {name: real(value, f"the number of {name!r}") for name, value in values.items()}
        found = [known[name] for name in activations.instructions]
    else:
        found = real_numbers(plain(values), "a pair's number")
        if len(found) != len(activations):
            raise DataError(
                f"every pair needs a number, got {len(found)} for {len(activations)} pairs; give one per pair, "
                "or a mapping from instruction ids"
            )
    if len(different := sorted(set(found))) < 3:
        raise DataError(
            f"a line needs instructions with at least three numbers, got {', '.join(f'{n:g}' for n in different)}; "
            "two points always lie on one"
        )
    return np.array(found)


def _means(x: Float[np.ndarray, "pair d_model"], item: Int[np.ndarray, " pair"]) -> Float[np.ndarray, "number d_model"]:
    # One row of weights per number: a product, which is quick, as the means of every shuffle are taken.
    weights = np.eye(item.max() + 1)[item].T
    found: Float[np.ndarray, "number d_model"] = (weights @ x) / weights.sum(axis=1, keepdims=True)
    return found


def _measures(
    products: Float[np.ndarray, "draw number number"], numbers: Float[np.ndarray, " number"]
) -> dict[str, Float[np.ndarray, " draw"]]:
    """Both measures from the inner products of means, by the principal components of the centred means."""
    n = len(numbers)
    known = np.isfinite(products).all(axis=(1, 2))
    about = np.eye(n) - 1 / n
    sizes, vectors = np.linalg.eigh(about @ np.where(known[:, None, None], products, 0.0) @ about)
    sizes = np.clip(sizes, 0, None)
    total = sizes.sum(axis=1)
    varied = known & (total > 1e-12 * np.trace(products, axis1=1, axis2=2))
    ranks, order = rankdata(vectors[:, :, -1], axis=1), rankdata(numbers)
    ranks, order = ranks - ranks.mean(axis=1, keepdims=True), order - order.mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        spearman = np.abs(ranks @ order) / np.sqrt((ranks**2).sum(axis=1) * (order**2).sum())
        share = sizes[:, -1] / total
    return {"spearman": np.where(varied, spearman, np.nan), "share": np.where(varied, share, np.nan)}


def _plane(
    means: Float[np.ndarray, "number d_model"], numbers: Float[np.ndarray, " number"]
) -> tuple[Float[np.ndarray, " d_model"], Float[np.ndarray, "d_model axis"]]:
    """The centre of the means and their first two components, the first one turned to grow with the numbers."""
    centre = means.mean(axis=0)
    components = np.linalg.svd(means - centre, full_matrices=False)[2][:2].T
    along = (means - centre) @ components[:, 0]
    sign = -1.0 if rankdata(along) @ (rankdata(numbers) - (len(numbers) + 1) / 2) < 0 else 1.0
    return centre, components * [sign, 1.0]


def _points(
    activations: Activations,
    layer: int,
    number: Float[np.ndarray, " pair"],
    scores: Float[np.ndarray, "pair axis"],
) -> pd.DataFrame:
    x, y = scores.T
    about = {"layer": layer, "instruction": activations.instructions, "number": number}
    return pd.DataFrame(
        {**about, "prompt_id": activations.prompt_ids, "query": query_texts(activations), "x": x, "y": y}
    )
