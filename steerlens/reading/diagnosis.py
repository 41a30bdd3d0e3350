"""What the activations say about an instruction's direction before anything is steered: one number per instruction and layer.

With `d_i = h(with) - h(without)` of pair i at one layer, `d` their mean, and `m_i` the mean of the pairs of *other* queries:

    agreement       mean_i cos(d_i, m_i)                                   do the pairs move the same way?
    d_prime         (mean(+) - mean(-)) / sqrt((var(+) + var(-)) / 2)      does the direction part the two sides? +, - are the
                    projections of pair i's two sides on m_i / |m_i|
    norm            |d|, the length of the mean-difference vector
    relative_norm   |d| / mean |h(without)|
    effective_rank  E|d_i|^2 |d_j|^2 / E(d_i . d_j)^2 over pairs of different queries: the participation ratio
                    (sum of eigenvalues)^2 / (sum of their squares) of E[d d^T] (Gao et al. 2017), about zero, not the mean
                    (1: all differences lie on one line), and without the bias of few pairs: noise has d_model
    stability       the cosine of the mean differences of two halves of the queries, mean over `N_SPLITS` splits

(Agreement and d': Braun et al. 2025, arXiv 2505.22637, who find that they predict how well a vector steers; there, a pair is
part of the mean it is compared with, and noise seems to agree.) The profile over depth is of the same held-out projections.

Controls: the sides of each query swapped at random, as if no side had the instruction; for the effective rank, random directions
in place of the differences (d_model, with the spread of that estimate); for the profile, the gap between the two sides along a
random direction, |d| / sqrt(d_model) in the root mean square over all of them. Intervals by bootstrap over queries (`examples`);
that of stability, whose halves are half as many, needs `FEWEST_HALVED` of them.

What these do not show: a direction that all pairs share may still steer nothing, and a long one may only be far from the text.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray

from steerlens._results import Result
from steerlens._typing import WholeNumber, whole
from steerlens.errors import DataError, SteerlensError, nearest
from steerlens.figures.measures import measure_curves, projection_profiles
from steerlens.reading.examples import (
    N_SHUFFLES,
    Examples,
    examples_of,
    generator,
    measured,
    refill,
    resamples,
    spread,
)
from steerlens.vectors.activations import SIDES, Activations

if TYPE_CHECKING:
    import plotly.graph_objects as go

N_SPLITS = 50
FEWEST_HALVED = 8
"""Queries of an interval of the stability; from 6, those that say 95 % held the expected number in 68 % of 60 draws."""
_NOTHING = 1e-10
"""A sum of differences shorter than this share of their lengths is what rounding left."""

Measure = Literal["agreement", "d_prime", "norm", "relative_norm", "effective_rank", "stability"]
TITLES: dict[Measure, tuple[str, str]] = {
    "agreement": ("How much the pairs of an instruction agree", "cosine"),
    "d_prime": ("How far the direction parts the sides of held-out pairs", "d\u2032"),
    "norm": ("How long the mean difference is", "residual units"),
    "relative_norm": ("How long the mean difference is, against the residual", "share"),
    "effective_rank": ("In how many directions the pairs of an instruction differ", "rank"),
    "stability": ("How alike two halves of the queries make the direction", "cosine"),
}
"""The title and the unit of the picture of each measure."""


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis(Result):
    """One row per instruction, layer and measure: value, low, high, control, control_low, control_high.

    >>> found = diagnose(acts, layers=4).to_frame().set_index("measure")
    >>> bool(found.loc["agreement", "value"] > found.loc["agreement", "control_high"])
    True
    """

    profiles: pd.DataFrame
    """Held-out projections in residual units, one row per instruction, layer and side: mean, std (n - 1), low and high of the
    mean, and random_gap, the gap between the sides that a random direction shows."""

    def plot(self, measure: Measure = "agreement", **options: Any) -> "go.Figure":
        """One measure over the layers, a panel per instruction, with its interval and its control."""
        if measure not in TITLES:
            raise SteerlensError(f"a diagnosis has no measure {measure!r}; {nearest(measure, TITLES)}")
        table = self.table[self.table["measure"] == measure]
        title, unit = TITLES[measure]
        ranks = measure == "effective_rank"
        control = "random directions" if ranks else "sides swapped"
        return measure_curves(table, **{"unit": unit, "control": control, "log": ranks, "title": title, **options})

    def plot_profiles(self, **options: Any) -> "go.Figure":
        """The projections of both sides over the layers, a panel per instruction."""
        return projection_profiles(self.profiles, **options)


def diagnose(
    activations: Activations,
    *,
    layers: Iterable[WholeNumber] | WholeNumber | None = None,
    seed: WholeNumber = 0,
) -> Diagnosis:
    """Agreement, d', norms, effective rank and stability of each instruction at each layer, and projections over depth.

    Args:
        activations: Of one instruction or several, each with at least two queries.
        layers: Default all that were recorded.
        seed: Decides the resamples, the splits and the swapped sides, with the names of instructions.

    Returns:
        One row per instruction, layer and measure. A number that does not exist is nan: a cosine of differences that are zero,
        a d' of projections that do not vary.

    Raises:
        SteerlensError: for a layer that was not recorded, or an instruction with one query.

    Example:
        >>> diagnose(acts, layers=[3, 4])
        Diagnosis(12 rows: instruction, layer, measure, value, low, high, control, control_low, control_high)
    """
    examples, seed = examples_of(activations, layers), whole(seed, "seed")
    rows: list[dict[str, Any]] = []
    profiles: list[dict[str, Any]] = []
    for name in examples.instructions:
        part = examples.of(name)
        if len(part.query_ids) < 2:
            raise DataError(
                f"a direction is judged by other queries than it is fitted on, and {name!r} has one; record more queries"
            )
        loads, halves = _loads(part, seed, name), _halves(part, seed, name)
        for layer in part.layers:
            products = _Products.of(part, layer)
            total = _Sum.of(products, loads)
            found = {**_held_out(products, loads, total), **_sizes(products, loads, total)}
            found["stability"] = _stability(products, loads, halves, total)
            along = found["without"], found["with"]
            about = {"instruction": name, "layer": layer}
            random = _random_rank(products, generator(seed, "rank", name))
            for measure in TITLES:
                value, resampled, swapped = _thirds(found[measure])
                if measure == "stability" and len(part.query_ids) < FEWEST_HALVED:
                    resampled = resampled[:0]
                control = random if measure == "effective_rank" else swapped
                rows.append(about | {"measure": measure} | measured(value[0], resampled, control))
            profiles += _profile(along, loads, about, found["norm"][0] / np.sqrt(products.d_model))
    return Diagnosis(pd.DataFrame(rows), pd.DataFrame(profiles))


Loads = Float[np.ndarray, "load pair"]
"""How often each pair counts: once; then as often as its query is drawn in a resample; then 1, or -1 with its sides swapped."""


def _loads(part: Examples, seed: int, name: str) -> Loads:
    n = len(part.query_ids)
    draws = resamples(n, generator(seed, "bootstrap", name))
    signs = generator(seed, "sides", name).choice([-1.0, 1.0], size=(N_SHUFFLES, n))
    found: Loads = np.concatenate([np.ones((1, n)), draws, signs])[:, part.query]
    return found


def _thirds(found: Float[np.ndarray, " load"]) -> list[NDArray[np.float64]]:
    """The number itself, its resamples, and that of swapped sides."""
    return np.split(found, [1, len(found) - N_SHUFFLES])


def _halves(part: Examples, seed: int, name: str) -> Float[np.ndarray, "split pair"]:
    """+1 for the pairs of one half of the queries, -1 for those of the other."""
    n = len(part.query_ids)
    sides = np.tile(np.where(np.arange(n) < n // 2, 1.0, -1.0), (N_SPLITS, 1))
    return generator(seed, "halves", name).permuted(sides, axis=1)[:, part.query]


@dataclass(frozen=True, eq=False)
class _Products:
    """Inner products of one instruction's pairs at one layer: all that its numbers are made of."""

    same: Float[np.ndarray, "pair pair"]
    """1 for pairs of one query, themselves among them."""
    cross: Float[np.ndarray, "pair pair"]
    """`d_i . d_j` for pairs of different queries, else 0."""
    own: Float[np.ndarray, " pair"]
    """Sum of `d_i . d_j` over the pairs of pair i's query."""
    norms: Float[np.ndarray, " pair"]
    """`|d_i|`."""
    sides: Float[np.ndarray, "side pair pair"]
    """`h_i . d_j` for pairs of different queries, else 0."""
    resid_norms: Float[np.ndarray, "side pair"]
    d_model: int

    @classmethod
    def of(cls, part: Examples, layer: int) -> "_Products":
        resid = part.resid[:, :, part.layers.index(layer)].double().numpy()
        differences = resid[:, 1] - resid[:, 0]
        gram, same = differences @ differences.T, part.query[:, None] == part.query
        return cls(
            same=same.astype(float),
            cross=np.where(same, 0.0, gram),
            own=np.where(same, gram, 0.0).sum(axis=1),
            norms=np.sqrt(np.diagonal(gram)),
            sides=np.where(same, 0.0, np.einsum("isd,jd->sij", resid, differences, optimize=True)),
            resid_norms=np.linalg.norm(resid, axis=2).T,
            d_model=resid.shape[2],
        )


@dataclass(frozen=True, eq=False)
class _Sum:
    """What each pair adds to the squared length of the weighted sum of all differences."""

    weight: Loads
    crossed: Float[np.ndarray, "load pair"]
    """Products with pairs of other queries."""
    rest: Float[np.ndarray, "part load pair"]
    """Products with pairs of its own query; then, for `refill`, draws, products of a draw with itself, and within its query."""

    @classmethod
    def of(cls, products: _Products, loads: Loads) -> "_Sum":
        weight, size = np.abs(loads), products.same.sum(axis=1)
        rest = np.stack([weight * products.own, weight, weight * size, weight**2 * size])
        return cls(weight, loads * (loads @ products.cross), rest)


def _length(crossed: Float[np.ndarray, "..."], rest: Float[np.ndarray, "part ..."]) -> Float[np.ndarray, "..."]:
    """The length of a sum of differences, from its products between queries and the four parts of `_Sum.rest`."""
    own, drawn, once, twice = rest
    found: NDArray[np.float64] = np.sqrt(np.clip(crossed * refill(drawn**2, once, twice) + own, 0, None))
    return found


def _held_out(products: _Products, loads: Loads, total: _Sum) -> dict[str, Float[np.ndarray, "load ..."]]:
    """Agreement and d' of each row of loads, and the projections behind them, `[load, pair]`."""
    # All, less pair i's query, which is in products with others twice.
    crossed = total.crossed.sum(axis=-1, keepdims=True) - 2 * total.crossed @ products.same
    others = _length(crossed, total.rest.sum(axis=-1, keepdims=True) - total.rest @ products.same)
    others = np.where(others > _NOTHING * products.norms.sum(), others, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = np.clip(loads @ products.cross / (products.norms * others), -1, 1)
        without, with_ = ((loads @ side.T) / others for side in products.sides)
    swapped = loads < 0
    minus, plus = np.where(swapped, with_, without), np.where(swapped, without, with_)
    return {
        "agreement": _mean(cosines * np.sign(loads), total.weight),
        "d_prime": _d_prime(plus, minus, total.weight),
        "without": minus,
        "with": plus,
    }


def _d_prime(
    plus: Float[np.ndarray, "load pair"], minus: Float[np.ndarray, "load pair"], weight: Loads
) -> Float[np.ndarray, " load"]:
    means = [_mean(side, weight) for side in (minus, plus)]
    variances = [_variance(side, weight) for side in (minus, plus)]
    scale = np.abs(np.nan_to_num([minus, plus])).max(axis=(0, 2))
    pooled = sum(variances) / 2
    pooled = np.where(pooled > (1e-9 * scale) ** 2, pooled, np.nan)  # what rounding leaves of values that do not vary
    found: Float[np.ndarray, " load"] = (means[1] - means[0]) / np.sqrt(pooled)
    return found


def _sizes(products: _Products, loads: Loads, total: _Sum) -> dict[str, Float[np.ndarray, " load"]]:
    """Norms and the effective rank of each row of loads."""
    norm = _length(total.crossed.sum(axis=-1), total.rest.sum(axis=-1)) / total.weight.sum(axis=1)
    without = np.where(loads < 0, products.resid_norms[1], products.resid_norms[0])
    squared = products.norms**2
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = norm / _mean(without, total.weight)
        expected = _form(np.outer(squared, squared) * (1 - products.same), total.weight)
        rank = expected / _form(products.cross**2, total.weight)
    return {"norm": norm, "relative_norm": relative, "effective_rank": rank}


def _stability(
    products: _Products, loads: Loads, halves: Float[np.ndarray, "split pair"], total: _Sum
) -> Float[np.ndarray, " load"]:
    """Mean over splits of the cosine of the sums A and B of two halves, from |A + B|^2, |A - B|^2 and |A|^2 - |B|^2."""
    sums = total.crossed.sum(axis=1)
    cosines = []
    for half in halves:
        differences, excess = _form(products.cross, loads * half), total.crossed @ half
        a, b = (
            _length((sums + differences + 2 * sign * excess) / 4, total.rest @ ((1 + sign * half) / 2))
            for sign in (1, -1)
        )
        both = np.where(a * b > (_NOTHING * products.norms.sum()) ** 2, a * b, np.nan)
        cosines.append(np.clip((sums - differences) / 4 / both, -1, 1))
    found: NDArray[np.float64] = np.mean(cosines, axis=0)
    return found


def _random_rank(products: _Products, rng: np.random.Generator) -> Float[np.ndarray, " shuffle"]:
    """The effective rank of random directions with the norms of the differences, as often as the other controls are drawn.

    The squared cosine of two random directions has mean 1/d and variance 2(d - 1) / (d^2 (d + 2)), and those of any two pairs of
    them are independent: their weighted mean is drawn from the gamma distribution with its mean and variance.
    """
    squared, d = products.norms**2, products.d_model
    weights = np.triu(np.outer(squared, squared) * (1 - products.same))
    if not weights.any():
        return np.full(N_SHUFFLES, np.nan)
    deviation = np.sqrt(2 * (d - 1) / (d + 2) * (weights**2).sum()) / weights.sum()
    found: NDArray[np.float64] = d / rng.gamma(1 / deviation**2, deviation**2, size=N_SHUFFLES)
    return found


def _profile(
    along: tuple[Float[np.ndarray, "load pair"], Float[np.ndarray, "load pair"]],
    loads: Loads,
    about: dict[str, Any],
    random_gap: float,
) -> list[dict[str, Any]]:
    """Mean, deviation and interval of the projections of each side."""
    rows = []
    for side, projections in zip(SIDES, along, strict=True):
        means, weight = _thirds(_mean(projections, np.abs(loads))), np.ones((1, loads.shape[1]))
        low, high = spread(means[1])
        std = np.sqrt(_variance(projections[:1], weight))[0]
        found = {"side": side, "mean": means[0][0], "std": std, "low": low, "high": high, "random_gap": random_gap}
        rows.append(about | found)
    return rows


def _mean(values: Float[np.ndarray, "load pair"], weight: Loads) -> Float[np.ndarray, " load"]:
    found: Float[np.ndarray, " load"] = (values * weight).sum(axis=1) / weight.sum(axis=1)
    return found


def _variance(values: Float[np.ndarray, "load pair"], weight: Loads) -> Float[np.ndarray, " load"]:
    """With n - 1 below."""
    squares = weight * (values - _mean(values, weight)[:, None]) ** 2
    found: Float[np.ndarray, " load"] = squares.sum(axis=1) / (weight.sum(axis=1) - 1)
    return found


def _form(matrix: Float[np.ndarray, "pair pair"], weight: Loads) -> Float[np.ndarray, " load"]:
    """The quadratic form of each row of weights."""
    found: Float[np.ndarray, " load"] = (weight @ matrix * weight).sum(axis=1)
    return found
