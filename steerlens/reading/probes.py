"""How well the differences tell instructions apart: three numbers per layer, each beside shuffled labels.

With `d_i = h(with) - h(without)` of pair i at one layer and its instruction as the label:

    probe             a linear probe (Alain & Bengio 2016): least squares on one column per instruction, the largest wins;
                      ridge penalty 0.1 x mean variance of a coordinate x pairs
    nearest_centroid  the instruction whose mean difference is nearest
    silhouette        mean over pairs of (b - a) / max(a, b): `a` the mean distance to pairs of the same instruction, `b` that
                      to pairs of the nearest other one (Rousseeuw 1987); in [-1, 1]

Probe and centroids are cross-validated: the queries are dealt into folds, and a pair is judged by what was fitted on other
queries, since two prompts with one query are alike whatever their instructions. The control repeats all of it with labels
that are dealt out anew, query by query (`examples.shuffled`). Least squares costs one fit for all of these together, which is why
it is the probe here.

Intervals resample the queries of the finished verdicts: a fit on a resample would be tested on queries that it was fitted on.

What this does not show: that instructions can be told apart does not mean that the model does, nor that their directions steer.
The silhouette is not held out: pairs of one query and instruction lie close for the query's sake, too, as in its control.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import euclidean_distances

from steerlens._results import Result
from steerlens._typing import WholeNumber, whole
from steerlens.errors import DataError
from steerlens.figures.measures import SEPARABILITY, measure_curves
from steerlens.files import derived_seed
from steerlens.reading.examples import (
    N_SHUFFLES,
    Examples,
    examples_of,
    generator,
    measured,
    require_instructions,
    resamples,
    shuffled,
)
from steerlens.vectors.activations import Activations

if TYPE_CHECKING:
    import plotly.graph_objects as go

PENALTY = 0.1
"""Of the probe, in mean variances of a coordinate times the number of pairs."""

Labels = Int[np.ndarray, "labelling pair"]
"""The instruction of each pair: first as it is, then shuffled."""


@dataclass(frozen=True, eq=False, repr=False)
class Separability(Result):
    """One row per layer and measure: value, low, high, control, control_low, control_high.

    >>> pairs = sl.load_pairs("tiny", instructions=["startend:quotation", "punctuation:no_comma"], n_queries=4)
    >>> separability(sl.record_activations(model, pairs), layers=4, folds=2).to_frame()["measure"].tolist()
    ['probe', 'nearest_centroid', 'silhouette']
    """

    def plot(self, **options: Any) -> "go.Figure":
        """Each measure over the layers, with its interval and that of shuffled labels."""
        return measure_curves(self.table, **{**SEPARABILITY, **options})


def separability(
    activations: Activations,
    *,
    layers: Iterable[WholeNumber] | WholeNumber | None = None,
    folds: WholeNumber = 5,
    seed: WholeNumber = 0,
) -> Separability:
    """How well differences tell instructions apart at each layer: linear probe, nearest centroid, silhouette.

    Args:
        activations: Of at least two instructions.
        layers: Default all that were recorded.
        folds: Parts that the queries are dealt into; each is judged by what was fitted on the others.
        seed: Decides the folds (with the queries' ids), the shuffled labels and the resamples.

    Returns:
        One row per layer and measure; accuracies are shares of pairs.

    Raises:
        SteerlensError: for one instruction, a layer that was not recorded, or an instruction with fewer queries than folds.

    Example:
        >>> pairs = sl.load_pairs("tiny", instructions=["startend:quotation", "punctuation:no_comma"], n_queries=4)
        >>> len(separability(sl.record_activations(model, pairs), folds=2))
        24
    """
    examples = examples_of(activations, layers)
    require_instructions(examples.instructions, "separability")
    folds, seed = whole(folds, "folds"), whole(seed, "seed")
    fold = _folds(examples, folds, seed)
    shuffle = generator(seed, "labels")
    dealt = [shuffled(examples.label, examples.query, shuffle) for _ in range(N_SHUFFLES)]
    labels = np.stack([examples.label, *dealt])
    draws = resamples(len(examples.query_ids), generator(seed, "bootstrap", "separability"))[:, examples.query]
    share = draws / draws.sum(axis=1, keepdims=True)
    rows = []
    for layer in examples.layers:
        x = examples.differences(layer)
        x = x - x[0]  # nothing depends on the origin, and what does not differ becomes exactly zero
        scores = {
            "probe": _held_out(_probe, x, labels, fold),
            "nearest_centroid": _held_out(_nearest_centroid, x, labels, fold),
            "silhouette": silhouettes(x, labels),
        }
        for name, found in scores.items():
            true, control = found[0], found[1:].mean(axis=1)
            rows.append({"layer": layer, "measure": name} | measured(true.mean(), share @ true, control))
    return Separability(pd.DataFrame(rows))


def _folds(examples: Examples, folds: int, seed: int) -> Int[np.ndarray, " pair"]:
    """The fold of each pair, by its query; the queries of every instruction are spread over the folds.

    Raises:
        DataError: if an instruction has fewer queries than folds, or folds is below 2.
    """
    asked = [frozenset(examples.label[examples.query == number]) for number in range(len(examples.query_ids))]
    for label, name in enumerate(examples.instructions):
        n = sum(label in labels for labels in asked)
        if not 2 <= folds <= n:
            raise DataError(
                f"folds must be in [2, {n}], the number of queries of {name!r}, got {folds}; take fewer, or record more queries"
            )
    # Queries with the same instructions are dealt one after the other.
    order = sorted(
        range(len(asked)), key=lambda number: (sorted(asked[number]), derived_seed(seed, examples.query_ids[number]))
    )
    fold = np.empty(len(asked), int)
    fold[order] = np.arange(len(asked)) % folds
    found: Int[np.ndarray, " pair"] = fold[examples.query]
    return found


Judge = Callable[[Any, Any, Any], NDArray[np.int64]]
"""From training rows, their labels and test rows to the labels predicted, for each labelling."""


def _held_out(
    judge: Judge, x: Float[np.ndarray, "pair d_model"], labels: Labels, fold: Int[np.ndarray, " pair"]
) -> Float[np.ndarray, "labelling pair"]:
    """1 where a pair's label is what is predicted from the other folds, else 0."""
    hits = np.empty(labels.shape)
    for part in np.unique(fold):
        test = fold == part
        hits[:, test] = judge(x[~test], labels[:, ~test], x[test]) == labels[:, test]
    return hits


def _probe(
    train: Float[np.ndarray, "train d_model"],
    labels: Int[np.ndarray, "labelling train"],
    test: Float[np.ndarray, "test d_model"],
) -> Int[np.ndarray, "labelling test"]:
    penalty = PENALTY * train.var(axis=0).sum() / train.shape[1] * len(train)
    if penalty == 0:
        return np.zeros((len(labels), len(test)), int)  # pairs that do not differ tell nothing apart
    target = _indicator(labels)
    n_labellings, n, classes = target.shape
    fitted = Ridge(alpha=penalty).fit(train, target.swapaxes(0, 1).reshape(n, -1))
    found: Int[np.ndarray, "labelling test"] = (
        fitted.predict(test).reshape(len(test), n_labellings, classes).argmax(axis=2).T
    )
    return found


def _nearest_centroid(
    train: Float[np.ndarray, "train d_model"],
    labels: Int[np.ndarray, "labelling train"],
    test: Float[np.ndarray, "test d_model"],
) -> Int[np.ndarray, "labelling test"]:
    target = _indicator(labels)
    with np.errstate(invalid="ignore"):
        centroids = np.einsum("lnc,nd->lcd", target, train, optimize=True) / target.sum(axis=1)[..., None]
    # |x - c|^2 without |x|^2, which all classes share; a class that is in no training pair is nan, and never nearest.
    distances = (centroids**2).sum(axis=2)[:, None] - 2 * np.einsum("td,lcd->ltc", test, centroids, optimize=True)
    found: Int[np.ndarray, "labelling test"] = np.where(np.isnan(distances), np.inf, distances).argmin(axis=2)
    return found


def silhouettes(x: Float[np.ndarray, "pair d_model"], labels: Labels) -> Float[np.ndarray, "labelling pair"]:
    """The silhouette of each pair under each labelling; 0 for a pair that is alone, or where nothing differs.

    >>> silhouettes(np.array([[0.0], [0.0], [2.0], [2.0]]), np.array([[0, 0, 1, 1]])).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """
    target = _indicator(labels)
    sizes = target.sum(axis=1)[:, None]
    total = np.einsum("ij,ljc->lic", euclidean_distances(x), target, optimize=True)
    own = target.astype(bool)
    with np.errstate(invalid="ignore", divide="ignore"):
        inside = (total / (sizes - 1))[own].reshape(labels.shape)
        outside = np.where(own, np.inf, total / sizes).min(axis=2)
        found: Float[np.ndarray, "labelling pair"] = np.nan_to_num((outside - inside) / np.maximum(outside, inside))
    return found


def _indicator(labels: Labels) -> Float[np.ndarray, "labelling pair instruction"]:
    found: Float[np.ndarray, "labelling pair instruction"] = np.eye(labels.max() + 1)[labels]
    return found
