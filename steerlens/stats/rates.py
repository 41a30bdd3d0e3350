"""Rates with their intervals, and tables of them: what a study shows of each group of responses.

For `k` of `n` responses that follow their instruction, the rate is `p = k / n`. Its Wilson score interval is
the set of rates `q` that the data do not reject at the given confidence,

    (p - q)^2 <= z^2 q (1 - q) / n
    low, high = (k + z^2/2  -+  z sqrt(k (n - k) / n + z^2/4)) / (n + z^2)

with `z` the normal quantile of (1 + confidence) / 2. It stays inside [0, 1] and has a width even at `k = 0` or
`k = n` (Wilson 1927, "Probable inference, the law of succession, and statistical inference").

Several samples of one prompt are not independent. Where a table is told which of the `n` responses belong together, in `m`
clusters with `k_j` of `n_j` that follow, the interval is that of the same rate among `effective_n` responses,

    deff = m / (m - 1) sum_j (k_j - n_j p)^2 / (n p (1 - p))        kept in [1, n / m]
    effective_n = n / deff

(Korn & Graubard 1998, "Confidence intervals for proportions with small expected number of positive counts").

What these do not show: an interval is about other prompts of the same kind, and says nothing about other kinds; and a response
that follows its instruction may still be a bad answer. Words and repetition are explained in `words`.
"""

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, overload

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from steerlens.errors import DataError, SteerlensError
from steerlens.files import query_key

RATE_COLUMNS = ("n", "followed", "rate", "low", "high")

GATED = ("gate_accepted", "gate_weakened", "gate_rejected", "gate_skipped", "mean_active_layers", "extra_passes")
"""What scores say of a response that was generated behind a gate; missing for others."""


@overload
def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]: ...


@overload
def wilson_interval(
    successes: "NDArray[Any] | pd.Series[Any]",
    n: "NDArray[Any] | pd.Series[Any] | int",
    confidence: float = 0.95,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...


def wilson_interval(successes: Any, n: Any, confidence: float = 0.95) -> tuple[Any, Any]:
    """The Wilson score interval of a rate, as (low, high); element by element for arrays.

    Args:
        successes: how many of the `n` succeeded.
        n: how many were tried; where it is zero, both ends are nan.
        confidence: 0.95 by default, as in every table and figure here.

    Returns:
        Both ends in [0, 1]: two numbers, or two arrays of the shape that the counts share.

    Raises:
        SteerlensError: a count outside [0, n], or a confidence outside (0, 1).

    Example:
        >>> low, high = wilson_interval(5, 10)
        >>> round(low, 3), round(high, 3)
        (0.237, 0.763)
    """
    if not 0 < confidence < 1:
        raise SteerlensError(f"confidence must be in (0, 1), got {confidence}; 95 % is written 0.95")
    k, total = np.broadcast_arrays(np.asarray(successes, dtype=float), np.asarray(n, dtype=float))
    if not ((k >= 0) & (k <= total)).all():  # also catches nan
        raise SteerlensError(f"successes must be in [0, n], got {successes} of {n}; the count comes first")
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = np.where(total > 0, (k + z2 / 2) / (total + z2), np.nan)
        half = np.sqrt(z2 * (k * (total - k) / total + z2 / 4)) / (total + z2)
    # Rounding leaves some 1e-17 of these two ends, which are zero and one.
    low = np.where((k == 0) & (total > 0), 0.0, centre - half)
    high = np.where((k == total) & (total > 0), 1.0, centre + half)
    return (low, high) if low.ndim else (float(low), float(high))


def rate_table(
    frame: pd.DataFrame, by: Sequence[str], value: str = "followed", *, clusters: str | None = None
) -> pd.DataFrame:
    """The rate of a yes/no column in each group: columns `by`, then n, followed (count), rate, low, high.

    Groups keep the order in which they are first seen. A missing key, such as the layer of an unsteered row,
    is a group of its own.

    Args:
        frame: one row per response.
        by: the columns to group by; none of them gives one row for the whole frame.
        value: the yes/no column, "followed" or "followed_strict".
        clusters: the column that says which responses belong together, such as "prompt_id" where a prompt has several
            trials; the interval then counts `effective_n` responses. Spellings of one "query" belong together.

    Returns:
        One row per group; rate, low and high in [0, 1].

    Raises:
        DataError: a missing column, or a response without a verdict, which is neither yes nor no.

    Example:
        >>> rate_table(scores, by=["condition"])[["condition", "n"]].values.tolist()
        [['none', 6], ['vector', 6]]
    """
    require_columns(frame, [*by, value, *([clusters] if clusters else [])], what="the scores frame")
    unscored = int(frame[value].isna().sum())
    if unscored:
        raise DataError(f"every row needs a verdict in {value!r}, got {unscored} without one; score or drop those rows")
    verdict = frame[value].astype(bool).to_numpy()
    table: pd.DataFrame = _grouped(frame.assign(_verdict=verdict), by).agg(
        n=("_verdict", "size"), followed=("_verdict", "sum")
    )
    table = table.reset_index(drop=not by).astype({"n": int, "followed": int})
    effective = table["n"].astype(float)
    if clusters is not None:
        groups = _grouped(frame.assign(_verdict=verdict, _cluster=unit_labels(frame, clusters)), by)
        effective = groups[["_verdict", "_cluster"]].apply(lambda g: effective_n(g["_verdict"], g["_cluster"]))
        effective = effective.reset_index(drop=True)
    # The same rate, of as many responses as these are worth.
    low, high = wilson_interval(table["followed"] * effective / table["n"], effective)
    return table.assign(rate=table["followed"] / table["n"], low=low, high=high)


def unit_labels(frame: pd.DataFrame, column: str) -> "pd.Series[Any]":
    """Which unit each row belongs to: the values of a column, and of the column query what its spellings have in common."""
    if column != "query":
        return frame[column]
    return frame[column].map(lambda query: query_key(query) if isinstance(query, str) else query)


def effective_n(verdicts: "pd.Series[Any]", clusters: "pd.Series[Any]") -> float:
    """How many independent responses the responses of some clusters (the trials of prompts) are worth, for an interval.

    `n / deff`, where deff is the variance of the rate between clusters over what it would be without clusters, kept in
    [1, mean cluster size]; see the module's equation. With equal verdicts throughout, nothing tells the trials of a prompt apart,
    and each prompt counts once.

    Args:
        verdicts: yes or no for each response.
        clusters: what each response belongs to.

    Returns:
        A number of responses, between the number of clusters and that of responses.

    >>> effective_n(pd.Series([1, 1, 0, 0]), pd.Series(["a", "a", "b", "b"]))
    2.0
    """
    sizes = verdicts.groupby(clusters.to_numpy()).agg(["size", "sum"]).to_numpy(dtype=float)
    size, followed = sizes.T
    k, n = len(size), size.sum()
    rate = followed.sum() / n
    # Each response alone; no variance at all; or no second cluster to see any between.
    if n == k or rate in (0, 1) or k == 1:
        return float(k)
    between = k / (k - 1) * ((followed - size * rate) ** 2).sum() / n**2
    return float(n / np.clip(between / (rate * (1 - rate) / n), 1.0, n / k))


def trial_spread(frame: pd.DataFrame, by: Sequence[str], value: str = "followed") -> pd.DataFrame:
    """How the rate varies from trial to trial: columns `by`, then n_trials and trial_sd (n - 1; nan for one trial).

    Args:
        frame: one row per response, with the column "trial".
        by: the columns to group by.
        value: the yes/no column.

    Returns:
        One row per group; trial_sd is a share.

    Raises:
        DataError: a missing column.

    Example:
        >>> trial_spread(scores, by=["condition"])["n_trials"].tolist()
        [1, 1]
    """
    require_columns(frame, [*by, "trial", value], what="the scores frame")
    rates = _grouped(frame, [*by, "trial"])[value].mean().rename("_rate").reset_index()
    table: pd.DataFrame = _grouped(rates, by).agg(n_trials=("_rate", "size"), trial_sd=("_rate", "std"))
    return table.reset_index(drop=not by)


def quality_table(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """How the responses of each group read: columns `by`, then mean_words, mean_repetition, mean_distinct_2,
    median_perplexity and cut (the share of responses that ended at the length limit); where they were measured, mean_kl,
    mean_reward and low_perplexity (a share), and of gated responses the means of the columns in GATED, too.

    Missing values are left out of a mean; a group that has only missing values stays missing.

    Args:
        frame: one row per response.
        by: the columns to group by; none of them gives one row.

    Returns:
        One row per group; words are counts, kl is in nats per token, repetition, distinct_2 and cut are shares.

    Raises:
        DataError: a missing column.

    Example:
        >>> list(quality_table(scores, by=["condition"]))[:3]
        ['condition', 'mean_words', 'mean_repetition']
    """
    columns = ["n_words", "repetition", "distinct_2", "perplexity", "finish_reason"]
    require_columns(frame, [*by, *columns], what="the scores frame")
    extra = {f"mean_{name}": (name, "mean") for name in ("kl", "reward") if name in frame}
    extra |= {name: (name, "mean") for name in ("low_perplexity", *GATED) if name in frame}
    numbers = {name: pd.to_numeric(frame[name]).astype("Float64").astype(float) for name in columns[:-1]}
    cut = (frame["finish_reason"] == "length").astype(float)
    table: pd.DataFrame = _grouped(frame.assign(**numbers, _cut=cut), by).agg(
        mean_words=("n_words", "mean"),
        mean_repetition=("repetition", "mean"),
        mean_distinct_2=("distinct_2", "mean"),
        median_perplexity=("perplexity", "median"),
        cut=("_cut", "mean"),
        **extra,
    )
    return table.reset_index(drop=not by)


def rates_and_quality(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """What a study shows of each group of responses: the columns of `rate_table` and `quality_table` side by side.

    The interval is over base queries: responses to one query, be they trials or several instructions, are not independent.
    Where the frame can say so, strict (the rate of the strict verdicts), degenerate (the share of broken responses),
    n_trials and trial_sd stand beside them.

    Args:
        frame: one row per response, as `score` gives them.
        by: the columns to group by; none of them gives one row.

    Returns:
        One row per group, in the order in which groups are first seen. Rates and shares are in [0, 1].

    Raises:
        DataError: a missing column, or a response without a verdict.

    Example:
        >>> rates_and_quality(scores, by=["condition"])[["condition", "n"]].values.tolist()
        [['none', 6], ['vector', 6]]
    """
    table = rate_table(frame, by, clusters="query")
    parts = [quality_table(frame, by)]
    for value, name in (("followed_strict", "strict"), ("degenerate", "degenerate")):
        if value in frame:
            parts.append(rate_table(frame, by, value)[["rate"]].rename(columns={"rate": name}))
    if "trial" in frame:
        parts.append(trial_spread(frame, by))
    # Every part has the same groups in the same order.
    return pd.concat([table, *(part.drop(columns=list(by), errors="ignore") for part in parts)], axis=1)


def require_columns(frame: pd.DataFrame, columns: Sequence[str], *, what: str) -> None:
    """Refuse a table that lacks one of `columns`.

    Raises:
        DataError: naming what is missing and what is there, or for what is no table.
    """
    if not isinstance(frame, pd.DataFrame):
        raise DataError(
            f"{what} must be a table, got {type(frame).__name__}; give the table of a result, as to_frame() does"
        )
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise DataError(
            f"{what} needs the columns {', '.join(columns)}; missing: {', '.join(missing)}; "
            f"got: {', '.join(map(str, frame.columns)) or 'no column'}"
        )


def _grouped(frame: pd.DataFrame, by: Sequence[str]) -> Any:
    # groupby refuses an empty list of keys; a constant key makes the whole frame one group. `dropna` would drop the unsteered
    # rows, whose layer is missing, and without `observed` a categorical column makes groups of categories that no row has.
    keys = list(by) or np.zeros(len(frame), dtype=int)
    return frame.groupby(keys, sort=False, dropna=False, observed=True)
