"""Pictures of many instructions: the difference of every pair as a point, at each layer.

Of the differences `d_i = h(with) - h(without)` of all pairs at one layer:

    pca    the plane (or space) of the largest variance of `d`, in the units of the residual
    tsne   points whose neighbours are those of `d` (van der Maaten & Hinton 2008); started from the first principal components

each by scikit-learn. Stolfo et al. (2025) show t-SNE of format instructions at one layer, with at most 300 pairs of each,
perplexity 50, learning rate 200 and 1000 iterations: the defaults here where there are as many pairs. With fewer, the perplexity
is at most a third of the pairs and the learning rate a tenth: points in three dimensions fly apart at the rate of thousands.

A picture is known up to a rotation or reflection, and the axes of neighbouring layers come out at random. So each layer's points
are turned onto those of the layer before (orthogonal Procrustes, Schönemann 1966: no stretching), and a slider over layers shows
what moves, not how the axes fell. Of a turned plane, only the share of variance that all its axes hold together is a fact.
t-SNE has many minima besides: data that differ in the last digit of a float end in different pictures, and no rotation undoes
that. So the first layer starts from PCA, as in the paper, and each other one from the picture of the layer before, without the
early exaggeration that would pull it apart. On twelve format instructions and on five lengths of `tiny`, points then move half as
far from layer to layer, to minima as deep. For a layer's picture as the paper would draw it, ask for that layer alone.

What a picture does not show: in t-SNE, sizes of clusters and distances between them mean little, and clusters can come out of
noise. Look at `separability` and `cosines` for numbers with controls.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from steerlens._results import Result
from steerlens._typing import RealNumber, WholeNumber, real, whole
from steerlens.errors import SteerlensError
from steerlens.figures.geometry import embedding_scatter
from steerlens.reading.examples import generator, measured, queries_of, query_texts, recorded_layers, resamples
from steerlens.vectors.activations import Activations

if TYPE_CHECKING:
    import plotly.graph_objects as go

AXES = ("x", "y", "z")
PERPLEXITY, LEARNING_RATE, ITERATIONS = 50.0, 200.0, 1000


@dataclass(frozen=True, eq=False, repr=False)
class Embedding(Result):
    """Points of all pairs at each layer: layer, instruction, prompt_id, query, x, y and, in three dimensions, z.

    >>> embed(acts, method="pca", layers=4).to_frame().columns.tolist()
    ['layer', 'instruction', 'prompt_id', 'query', 'x', 'y']
    """

    method: str
    perplexity: float | None
    """Of t-SNE."""
    explained: pd.DataFrame | None
    """Of PCA: per layer the share of variance in the plane, its interval, and the control: random directions of equal norms."""

    def plot(self, **options: Any) -> "go.Figure":
        """The points, one colour and symbol per instruction, with a slider if there are several layers."""
        notes = f"t-SNE, perplexity {self.perplexity:.3g}" if self.explained is None else self._shares()
        return embedding_scatter(self.table, **{"method": self.method, "notes": notes, **options})

    def _shares(self) -> dict[int, str]:
        assert self.explained is not None
        return {
            row["layer"]: f"PCA, {row['value']:.0%} of the variance; random directions {row['control']:.0%}"
            for row in self.explained.to_dict("records")
        }


def embed(
    activations: Activations,
    *,
    method: Literal["tsne", "pca"] = "tsne",
    n_components: WholeNumber = 2,
    layers: Iterable[WholeNumber] | WholeNumber | None = None,
    perplexity: RealNumber | None = None,
    seed: WholeNumber = 0,
) -> Embedding:
    """The difference of every pair as a point in 2 or 3 dimensions, each layer turned onto the one before.

    Args:
        method: "tsne" keeps neighbours, "pca" the largest variance.
        n_components: 2 or 3.
        layers: In the order in which they are to be aligned; default all that were recorded. Each costs a t-SNE: about a
            second for 240 pairs, and 20 for 3600.
        perplexity: How many neighbours of a point count, for t-SNE, below the number of pairs. Default: the paper's 50, or a
            third of the pairs where there are fewer than 150.
        seed: Decides t-SNE's random numbers, and the resamples and the control of PCA's share.

    Returns:
        One row per layer and pair, in the order of the activations. A layer at which the pairs do not differ is one point.

    Raises:
        SteerlensError: for another method or dimension, a layer that was not recorded, too few pairs, or a perplexity that t-SNE
            does not allow for so many.

    Example:
        >>> embed(acts, layers=[3, 4], perplexity=3)
        Embedding(16 rows: layer, instruction, prompt_id, query, x, y)
    """
    chosen, n = recorded_layers(activations, layers), len(activations)
    k, seed = whole(n_components, "n_components"), whole(seed, "seed")
    if method not in ("tsne", "pca") or k not in (2, 3):
        raise SteerlensError(f'an embedding is "tsne" or "pca" in 2 or 3 dimensions, got {method!r} in {k}')
    if n <= k:
        raise SteerlensError(f"an embedding in {k} dimensions needs at least {k + 1} pairs, got {n}; record more")
    neighbours = _perplexity(perplexity, n) if method == "tsne" else None
    points, explained, before = [], [], None
    for layer in chosen:
        without, with_ = activations.resid[:, :, activations.layers.index(layer)].double().unbind(dim=1)
        rows = (with_ - without).numpy()
        alike = not np.ptp(rows, axis=0).any()
        rows = rows - rows.mean(axis=0)
        if alike:
            found = np.zeros((n, k))
        elif neighbours is None:
            found = PCA(k, random_state=seed).fit_transform(rows)
        else:
            found = _tsne(rows, before, k, neighbours, seed)
        if neighbours is None:
            explained.append({"layer": layer, **_share(rows, found, queries_of(activations), seed)})
        found = aligned(found, before)
        # From a layer without any differences there is nothing to go on.
        before = found if found.any() else before
        points.append(found)
    table = _table(activations, chosen, points)
    return Embedding(table, method, neighbours, pd.DataFrame(explained) if explained else None)


def aligned(
    points: Float[np.ndarray, "point axis"], onto: Float[np.ndarray, "point axis"] | None
) -> Float[np.ndarray, "point axis"]:
    """The points about their mean, rotated or reflected to lie as near as they can to those of another picture.

    >>> turned = aligned(np.array([[0.0, 1.0], [0.0, -1.0]]), np.array([[2.0, 0.0], [-2.0, 0.0]]))
    >>> turned.round(6).tolist()
    [[1.0, 0.0], [-1.0, 0.0]]
    """
    centred: Float[np.ndarray, "point axis"] = points - points.mean(axis=0)
    if onto is None:
        return centred
    rotation, _ = orthogonal_procrustes(centred, onto)
    turned: Float[np.ndarray, "point axis"] = centred @ rotation
    return turned


def _perplexity(perplexity: RealNumber | None, n: int) -> float:
    if perplexity is None:
        return min(PERPLEXITY, (n - 1) / 3)
    value = real(perplexity, "perplexity")
    if not 0 < value < n:
        raise SteerlensError(
            f"perplexity must be above 0 and below the number of pairs, {n}, got {value:g}; "
            "it counts neighbours, and 5 to 50 are usual"
        )
    return value


def _tsne(
    rows: Float[np.ndarray, "pair d_model"],
    before: Float[np.ndarray, "pair axis"] | None,
    n_components: int,
    perplexity: float,
    seed: int,
) -> Float[np.ndarray, "pair axis"]:
    """t-SNE from the picture of the layer before, or from PCA where there is none."""
    start = {"init": "pca"} if before is None else {"init": before.astype(np.float32), "early_exaggeration": 1.0}
    model = TSNE(
        n_components,
        perplexity=perplexity,
        learning_rate=min(LEARNING_RATE, len(rows) / 10),
        max_iter=ITERATIONS,
        random_state=seed,
        **start,
    )
    found: Float[np.ndarray, "pair axis"] = model.fit_transform(rows).astype(np.float64)
    return found


def _share(
    rows: Float[np.ndarray, "pair d_model"], scores: Float[np.ndarray, "pair axis"], queries: list[str], seed: int
) -> dict[str, float]:
    """The share of variance along the components, resampled with the components held, and that of random directions.

    To first order, holding the components changes nothing: they maximise the share.
    """
    ids, query = np.unique(queries, return_inverse=True)
    weights = resamples(len(ids), generator(seed, "bootstrap", "share"))
    norms = np.sort(np.linalg.norm(rows, axis=1))  # in an order of their own, as the draws are
    random = generator(seed, "share").normal(size=rows.shape)
    random *= (norms / np.linalg.norm(random, axis=1))[:, None]
    fitted = PCA(scores.shape[1], random_state=seed)
    control = float(fitted.fit(random).explained_variance_ratio_.sum()) if scores.any() else np.nan
    plain = _weighted_share(rows, scores, query, np.ones((1, len(ids))))
    resampled = _weighted_share(rows, scores, query, weights)
    return measured(plain[0], resampled, np.array([control]))


def _weighted_share(
    rows: Float[np.ndarray, "pair d_model"],
    scores: Float[np.ndarray, "pair axis"],
    query: Int[np.ndarray, " pair"],
    weights: Float[np.ndarray, "resample query"],
) -> Float[np.ndarray, " resample"]:
    share = weights[:, query] / weights[:, query].sum(axis=1, keepdims=True)

    def variance(part: Float[np.ndarray, "pair axis"]) -> Float[np.ndarray, " resample"]:
        found: Float[np.ndarray, " resample"] = share @ (part**2).sum(axis=1) - ((share @ part) ** 2).sum(axis=1)
        return found

    with np.errstate(invalid="ignore", divide="ignore"):
        found: Float[np.ndarray, " resample"] = variance(scores) / variance(rows)
    return found


def _table(
    activations: Activations, layers: tuple[int, ...], points: list[Float[np.ndarray, "pair axis"]]
) -> pd.DataFrame:
    about = {
        "instruction": activations.instructions,
        "prompt_id": activations.prompt_ids,
        "query": query_texts(activations),
    }
    parts = [
        pd.DataFrame({"layer": layer, **about, **dict(zip(AXES, found.T, strict=False))})
        for layer, found in zip(layers, points, strict=True)
    ]
    return pd.concat(parts, ignore_index=True)
