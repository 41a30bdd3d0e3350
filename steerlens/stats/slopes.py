"""How a behaviour answers to the coefficient, and what the activations say about it before any steering.

With `m(c)` the propensity of one sample at coefficient `c` (for two continuations, `log p(y+) - log p(y-)`):

    slope            sum_c (c - c_mean) m(c) / sum_c (c - c_mean)^2        the sample's steerability (least squares)
    residual         sum_c (m(c) - intercept - slope c)^2                  how far from a line the answer is
    spearman         correlation of the ranks of c and m(c)                whether the answer is at least monotone
    anti-steerable   the share of samples with slope < 0, which steering moves the wrong way

(Tan et al. 2024, arXiv 2407.12404). With `d_i = h(with) - h(without)` the difference of pair i, `d` their mean, and
`+`, `-` the projections of the two sides on a direction:

    agreement        mean_i cos(d_i, d)
    d'               (mean(+) - mean(-)) / sqrt((var(+) + var(-)) / 2)

(Braun et al. 2025, arXiv 2505.22637), who find that both predict, before steering, how well a vector will steer.

What these do not show: a slope over a range of coefficients says nothing beyond that range, nor whether the text is
still good. A pair votes for the mean it is compared with: pure noise has an agreement of about 1 / sqrt(pairs), and
only with `leave_one_out` is it about zero. Likewise d' is too high on the pairs from which the direction was fitted;
take projections of others.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray

from steerlens.errors import DataError, SteerlensError
from steerlens.stats.rates import require_columns, wilson_interval


@dataclass(frozen=True)
class Steerability:
    """How a set of samples answers to the coefficient.

    Example:
        >>> frame = pd.DataFrame({"prompt_id": "a", "coeff": [0.0, 1.0, 2.0], "propensity": [0.0, 1.0, 2.0]})
        >>> steerability_summary(frame).spearman
        1.0
    """

    n: int
    """Samples."""
    slope: float
    """Slope of the mean curve, in propensity per unit of coefficient. It equals the mean of the samples' slopes."""
    slope_sd: float
    """Standard deviation of the samples' slopes; nan for one sample."""
    anti_steerable: float
    """Share of samples with a negative slope."""
    anti_steerable_low: float
    """Wilson 95 % interval of that share, low end."""
    anti_steerable_high: float
    """Wilson 95 % interval of that share, high end."""
    spearman: float
    """Rank correlation of the mean curve with the coefficient; nan for a flat curve."""
    residual: float
    """Sum of squared residuals of the mean curve."""


def sample_slopes(
    frame: pd.DataFrame, *, coeff: str = "coeff", value: str = "propensity", sample: str = "prompt_id"
) -> pd.DataFrame:
    """The steerability of each sample: columns `sample`, then n (coefficients), slope, spearman, residual.

    For an interval of the mean slope, give the column `slope` to `comparisons.bootstrap_mean`.

    Args:
        frame: one row per sample and coefficient.
        coeff: the column of coefficients.
        value: the column of propensities, in any unit; the slope has that unit per unit of coefficient.
        sample: the column that names the sample.

    Returns:
        One row per sample, in the order in which they are first seen; `spearman` is nan where the value never changes.

    Raises:
        DataError: a missing column, no row, a number that is missing or infinite, a sample twice at one coefficient,
            or at one coefficient only.

    Example:
        >>> frame = pd.DataFrame({"prompt_id": "a", "coeff": [-1.0, 0.0, 1.0], "propensity": [0.0, 3.0, 6.0]})
        >>> sample_slopes(frame).values.tolist()
        [['a', 3, 3.0, 1.0, 0.0]]
    """
    curves = _curves(frame, coeff, value, sample)
    rows = []
    for name, curve in curves.groupby(sample, sort=False, dropna=False, observed=True):
        if len(curve) < 2:
            raise DataError(f"a slope needs two coefficients, got one for {sample} {name!r}; steer it with another one")
        rows.append((name, len(curve), *_line(curve[coeff].to_numpy(), curve[value].to_numpy())))
    return pd.DataFrame(rows, columns=[sample, "n", "slope", "spearman", "residual"])


def steerability_summary(
    frame: pd.DataFrame, *, coeff: str = "coeff", value: str = "propensity", sample: str = "prompt_id"
) -> Steerability:
    """The steerability of the mean curve, and the share of anti-steerable samples with its interval.

    Args: as for `sample_slopes`.

    Returns:
        Slopes in units of the value per unit of coefficient.

    Raises:
        DataError: as for `sample_slopes`, and samples with different coefficients, whose mean curve would mix them.

    Example:
        >>> frame = pd.DataFrame({"prompt_id": ["a", "a", "b", "b"], "coeff": [0.0, 1.0] * 2, "propensity": [0, 3, 0, -1]})
        >>> summary = steerability_summary(frame)
        >>> summary.slope, summary.anti_steerable
        (1.0, 0.5)
    """
    slopes = sample_slopes(frame, coeff=coeff, value=value, sample=sample)
    mean_curve = _curves(frame, coeff, value, sample).groupby(coeff)[value].agg(["mean", "size"])
    partial = mean_curve.index[mean_curve["size"] < len(slopes)]
    if len(partial):
        raise DataError(
            f"every sample needs every coefficient, got {int(mean_curve['size'][partial[0]])} of {len(slopes)} samples "
            f"at {partial[0]:g}; steer the others with it too, or leave it out"
        )
    slope, spearman, residual = _line(mean_curve.index.to_numpy(), mean_curve["mean"].to_numpy())
    n, n_anti = len(slopes), int((slopes["slope"] < 0).sum())
    low, high = wilson_interval(n_anti, n)
    slope_sd = float(slopes["slope"].std())
    return Steerability(n, slope, slope_sd, n_anti / n, low, high, spearman, residual)


def pair_cosines(
    differences: Float[np.ndarray, "pair d_model"], *, leave_one_out: bool = False
) -> Float[np.ndarray, " pair"]:
    """The cosine of each pair's difference with the mean difference, in [-1, 1].

    Args:
        differences: activation with the instruction minus without, one row per pair, at one layer.
        leave_one_out: compare each pair with the mean of the others, so that it does not vote for itself. Off by
            default, as in Braun et al.

    Returns:
        One cosine per pair.

    Raises:
        SteerlensError: no pair (with `leave_one_out`, one), a number that is not finite, or a difference or mean that
            is zero and so has no direction.

    Example:
        >>> pair_cosines(np.array([[2.0, 0.0], [0.0, 2.0]]), leave_one_out=True).tolist()
        [0.0, 0.0]
    """
    rows = differences.astype(np.float64)
    if len(rows) < 1 + leave_one_out:
        raise SteerlensError(f"agreement needs {1 + leave_one_out} pairs or more, got {len(rows)}")
    if not np.isfinite(rows).all():
        raise SteerlensError("differences must be finite, got nan or inf; drop those pairs")
    # The sum has the direction of the mean, and leaving one out of it is a subtraction.
    total = rows.sum(axis=0)
    centre = total - rows if leave_one_out else np.broadcast_to(total, rows.shape)
    length, centre_length = np.linalg.norm(rows, axis=1), np.linalg.norm(centre, axis=1)
    if not length.all():
        raise SteerlensError(
            f"every difference must have a direction, got {int((length == 0).sum())} of {len(rows)} that are zero; "
            "are the two prompts of a pair the same?"
        )
    if (centre_length <= 1e-12 * length.sum()).any():  # what rounding leaves of differences that cancel
        raise SteerlensError("the mean difference must have a direction, got zero: the pairs cancel each other")
    cosines: NDArray[np.float64] = (rows * centre).sum(axis=1) / (length * centre_length)
    return np.clip(cosines, -1.0, 1.0)


def agreement(differences: Float[np.ndarray, "pair d_model"], *, leave_one_out: bool = False) -> float:
    """The mean of `pair_cosines`: 1 where all pairs differ in one direction, about 1 / sqrt(pairs) for noise.

    Args: as for `pair_cosines`; with `leave_one_out`, noise has about zero.

    Returns:
        A cosine, in [-1, 1].

    Raises:
        SteerlensError: as for `pair_cosines`.

    Example:
        >>> agreement(np.array([[1.0, 0.0], [3.0, 0.0]]))
        1.0
    """
    return float(pair_cosines(differences, leave_one_out=leave_one_out).mean())


def d_prime(
    projections_with: Float[np.ndarray, " n_with"], projections_without: Float[np.ndarray, " n_without"]
) -> float:
    """How many standard deviations apart the projections of the two sides lie; variances have n - 1 below.

    Braun et al. report the absolute value. The sign is kept here: negative where the activations without the
    instruction project further, which on held-out pairs is a direction that points the wrong way.

    Args:
        projections_with: `h . direction` of activations with the instruction, at one layer.
        projections_without: the same without it; the two need not be paired.

    Returns:
        d'; nan for fewer than two values on a side, or if neither side varies.

    Raises:
        SteerlensError: a projection that is not finite.

    Example:
        >>> d_prime(np.array([3.0, 5.0, 7.0]), np.array([-1.0, 1.0, 3.0]))
        2.0
    """
    plus, minus = projections_with.astype(np.float64), projections_without.astype(np.float64)
    if not (np.isfinite(plus).all() and np.isfinite(minus).all()):
        raise SteerlensError("projections must be finite, got nan or inf; drop those activations")
    # By their range, since rounding gives equal values a variance that is not quite zero.
    if min(len(plus), len(minus)) < 2 or not (np.ptp(plus) or np.ptp(minus)):
        return math.nan
    return float((plus.mean() - minus.mean()) / math.sqrt((plus.var(ddof=1) + minus.var(ddof=1)) / 2))


def _curves(frame: pd.DataFrame, coeff: str, value: str, sample: str) -> pd.DataFrame:
    require_columns(frame, [sample, coeff, value], what="the steerability frame")
    numbers = {name: pd.to_numeric(frame[name]).astype("Float64").astype(float) for name in (coeff, value)}
    curves = frame[[sample]].assign(**numbers)
    if curves.empty:
        raise DataError("steerability needs at least one sample, got an empty frame")
    for name in numbers:
        if not np.isfinite(curves[name]).all():
            raise DataError(f"every row needs a finite {name}, got {frame[name][~np.isfinite(curves[name])].iloc[0]!r}")
    twice = curves[curves.duplicated([sample, coeff])]
    if len(twice):
        raise DataError(
            f"a sample has one value per coefficient, got {sample} {twice[sample].iloc[0]!r} twice at "
            f"{twice[coeff].iloc[0]:g}; take one layer and one instruction at a time, and average trials first"
        )
    return curves


def _line(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float, float]:
    """Least-squares slope, Spearman correlation and sum of squared residuals of y on x."""
    dx = x - x.mean()
    # From the first value, not from the mean: of a flat curve nothing is left then, so rounding gives its slope no sign.
    dy = y - y[0]
    slope = float(dx @ dy / (dx @ dx))
    residual = float(((dy - dy.mean() - slope * dx) ** 2).sum())
    rank_x, rank_y = (pd.Series(side).rank().to_numpy() for side in (x, y))
    spearman = float(np.corrcoef(rank_x, rank_y)[0, 1]) if np.ptp(y) else math.nan
    return slope, spearman, residual
