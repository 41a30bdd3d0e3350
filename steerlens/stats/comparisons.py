"""Paired comparisons of conditions: tests, intervals and their correction, on arrays and tables only.

Two conditions answer the same prompts. Of `n` pairs, `g` are gained (second follows, first does not) and `l` lost:

    difference  d = (g - l) / n = rate(second) - rate(first)
    McNemar     g ~ Binomial(g + l, 1/2) if the two conditions are equal: exact two-sided p for g + l < 25, else the
                upper tail of chi-square(1) at max(|g - l| - 1, 0)^2 / (g + l)            (McNemar 1947; Edwards 1948)
    Tango       the differences `t` that the score test keeps:  (g - l - n t)^2 <= z^2 n (2 q + t - t^2),  with `q` the
                likeliest probability of a lost pair under `t`, the larger root of
                2 n q^2 + (t (2n - g + l) - (g + l)) q - l t (1 - t) = 0                                    (Tango 1998)
    sign flip   of the per-prompt differences d_i, the share of the sign choices s_i = +-1 with
                |sum s_i d_i| >= |sum d_i|                                                                (Fisher 1935)
    Holm        with p_(1) <= ... <= p_(m):  adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j))  (Holm 1979)
    bootstrap   quantiles of the mean over resamples with replacement                                     (Efron 1979)

Tango's interval is to a paired difference what Wilson's is to a rate: it stays inside [-1, 1], has a width without any
discordant pair, and leaves out zero just where McNemar's statistic without the continuity correction exceeds z^2.
The p-value here is the more careful one, so near the border an interval can leave out zero while p is above 0.05.

What these do not show: a difference on these prompts with this seed says nothing about other prompts of another kind.
McNemar and Tango take pairs as independent, which several trials of one prompt are not; `compare_conditions` then
compares per-prompt means. The percentile bootstrap is too narrow for few clusters (about 90 % instead of 95 % at ten).
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from steerlens.errors import DataError, SteerlensError, nearest
from steerlens.stats.rates import require_columns, unit_labels

EXACT_BELOW = 25
"""With fewer discordant pairs than this McNemar's test is exact, as is usual for the chi-square approximation."""


DRAWN_AT_ONCE = 1_000_000
"""Clusters that a bootstrap draws at a time, which keeps the table of them at a few megabytes."""


EXACT_FLIPS = 16
"""Up to this many non-zero differences all 2^n sign choices are counted; above, they are sampled."""


COMPARISON_COLUMNS = (
    "baseline", "condition", "n", "n_prompts", "rate_baseline", "rate", "difference", "low", "high", "gained", "lost",
    "test", "p_value", "p_holm",
)  # fmt: skip


CELLS = (
    ("none", "vector"),
    ("random", "vector"),
    ("none", "text"),
    ("text", "text+vector"),
    ("text", "text+attention"),
    ("text+random", "text+attention"),
    ("text+vector", "text+vector+attention"),
)
"""Which cells of an evaluation are set side by side, prompt by prompt: baseline first."""


@dataclass(frozen=True)
class McNemar:
    """McNemar's test of two conditions on the same prompts.

    Example:
        >>> mcnemar([False, True], [True, True]).gained
        1
    """

    n: int
    """Pairs."""
    gained: int
    """Pairs that only the second condition follows."""
    lost: int
    """Pairs that only the first condition follows."""
    difference: float
    """rate(second) - rate(first): positive where the second condition follows more often."""
    p_value: float
    """Two-sided."""
    exact: bool
    """Whether the p-value is binomial, not chi-square."""


@dataclass(frozen=True)
class BootstrapMean:
    """A mean with its percentile interval; the interval is nan for fewer than two clusters.

    Example:
        >>> bootstrap_mean([1.0, 3.0, 5.0]).mean
        3.0
    """

    mean: float
    low: float
    high: float
    n: int
    """How many values were used: those that are not nan."""
    n_clusters: int
    """How many clusters were resampled; `n` where no clusters were given."""


def mcnemar(first: Collection[Any], second: Collection[Any]) -> McNemar:
    """McNemar's test of paired yes/no results, with the sign of second minus first.

    Args:
        first: yes/no of each pair under the first condition, the baseline.
        second: yes/no of the same pairs, in the same order, under the second.

    Returns:
        The counts and the p-value: 1.0 without discordant pairs, nan without pairs.

    Raises:
        SteerlensError: lengths that differ, or a result that is missing or neither yes nor no.

    Example:
        >>> mcnemar([False, False, False, True], [True, True, True, True])
        McNemar(n=4, gained=3, lost=0, difference=0.75, p_value=0.25, exact=True)
    """
    if len(first) != len(second):
        raise SteerlensError(f"pairs need two results each, got {len(first)} and {len(second)}; match them by prompt")
    one, two = _verdicts(first, what="first"), _verdicts(second, what="second")
    n, gained, lost = len(one), int((two & ~one).sum()), int((one & ~two).sum())
    exact = gained + lost < EXACT_BELOW
    p_value = (_binomial_p if exact else _chi_square_p)(gained, lost) if n else math.nan
    return McNemar(n, gained, lost, (gained - lost) / n if n else math.nan, p_value, exact)


def tango_interval(n: int, gained: int, lost: int, confidence: float = 0.95) -> tuple[float, float]:
    """Tango's score interval of the paired difference (gained - lost) / n, as (low, high); nan for no pairs.

    Args:
        n: pairs, the concordant ones too.
        gained: pairs that only the second condition follows.
        lost: pairs that only the first condition follows.
        confidence: 0.95 by default, as in every table and figure here.

    Returns:
        Differences of rates, in [-1, 1].

    Raises:
        SteerlensError: a negative count, more discordant pairs than pairs, or a confidence outside (0, 1).

    Example:
        >>> low, high = tango_interval(161, gained=6, lost=16)
        >>> round(low, 3), round(high, 3)
        (-0.124, -0.005)
    """
    z2 = _z(confidence) ** 2
    if min(gained, lost) < 0 or gained + lost > n:
        raise SteerlensError(f"gained + lost must be in [0, n], got {gained} + {lost} of {n}; the pairs come first")
    if n == 0:
        return math.nan, math.nan

    def keeps(t: float) -> bool:
        b = t * (2 * n - gained + lost) - (gained + lost)
        # Zero under the root at t = -1 with every pair lost, and rounding can take it just below.
        q = (math.sqrt(max(b * b + 8 * n * lost * t * (1 - t), 0.0)) - b) / (4 * n)
        return (gained - lost - n * t) ** 2 <= z2 * n * (2 * q + t - t * t)

    difference = (gained - lost) / n
    # What is kept is one interval around the observed difference, so each end of it can be bisected for.
    return _last_kept(keeps, difference, -1.0), _last_kept(keeps, difference, 1.0)


def sign_flip(differences: Collection[Any], *, n_resamples: int = 10_000, seed: int = 0) -> float:
    """The two-sided sign-flip permutation p-value that the per-prompt differences are centred on zero.

    Exact for up to 16 non-zero differences. Above, `n_resamples` sign choices are drawn, and the observed one counts
    as one more, so that p is never zero (Phipson & Smyth 2010). For differences of -1, 0 and 1 it is exact McNemar.

    Args:
        differences: one number per prompt: second condition minus first.
        n_resamples: sign choices that are drawn where there are too many to count.
        seed: decides these draws.

    Returns:
        The p-value: 1.0 if all differences are zero, nan if there are none.

    Raises:
        SteerlensError: a missing or infinite difference.

    Example:
        >>> sign_flip([0.5, 0.25, 0.25, 0.0])
        0.25
    """
    values = _numbers(differences)
    if not np.isfinite(values).all():
        raise SteerlensError("every prompt needs a finite difference, got nan or inf; drop prompts without a pair")
    moved = values[values != 0]
    if not len(moved):
        return 1.0 if len(values) else math.nan
    # Equal sums differ by rounding when their terms come in another order; they are ties all the same.
    reached = abs(moved.sum()) - 1e-9 * np.abs(moved).sum()
    if len(moved) <= EXACT_FLIPS:
        sums = np.zeros(1)
        for step in moved:
            sums = np.concatenate([sums + step, sums - step])
        return float((np.abs(sums) >= reached).mean())
    # Differences of equal size flip together as one binomial: with few trials there are few sizes.
    sizes, counts = np.unique(np.abs(moved), return_counts=True)
    heads = np.random.default_rng(seed).binomial(counts, 0.5, size=(n_resamples, len(sizes)))
    sums = (2 * heads - counts) @ sizes
    return float((1 + (np.abs(sums) >= reached).sum()) / (1 + n_resamples))


def holm(p_values: Collection[Any]) -> NDArray[np.float64]:
    """Holm's adjusted p-values in the order given; nan stays nan and is not counted as a test.

    Args:
        p_values: one per test, in any order.

    Returns:
        One adjusted p-value per test, in [0, 1].

    Raises:
        SteerlensError: a p-value outside [0, 1].

    Example:
        >>> holm([0.5, 0.125, float("nan")]).tolist()
        [0.5, 0.25, nan]
    """
    p = _numbers(p_values)
    there = np.flatnonzero(~np.isnan(p))
    if ((p[there] < 0) | (p[there] > 1)).any():
        raise SteerlensError(f"p-values must be in [0, 1], got {p[there].min():g} to {p[there].max():g}")
    order = there[np.argsort(p[there], kind="stable")]
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(order), 0, -1) * p[order]))
    return adjusted


def bootstrap_mean(
    values: Collection[Any],
    *,
    clusters: Collection[Any] | None = None,
    confidence: float = 0.95,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> BootstrapMean:
    """The mean of the values with its percentile bootstrap interval; nan values are left out.

    Args:
        values: numbers or yes/no.
        clusters: one label per value, such as the prompt of each of several trials. Whole clusters are resampled,
            because values of one cluster are not independent. None makes each value its own cluster.
        confidence: 0.95 by default, as in every table and figure here.

    Returns:
        The mean and its interval in the unit of the values.

    Raises:
        SteerlensError: an infinite value, labels that are missing or not one per value, or a confidence outside (0, 1).

    Example:
        >>> bootstrap_mean([1.0, 1.0, float("nan"), 1.0])
        BootstrapMean(mean=1.0, low=1.0, high=1.0, n=3, n_clusters=3)
    """
    _z(confidence)
    numbers = _numbers(values)
    if np.isinf(numbers).any():
        raise SteerlensError("values must be finite, or nan where missing, got inf")
    labels = np.arange(len(numbers)) if clusters is None else pd.factorize(pd.Series(clusters, dtype=object))[0]
    if len(labels) != len(numbers) or (labels < 0).any():
        raise SteerlensError(
            f"every value needs its cluster, got {int((labels >= 0).sum())} labels for {len(numbers)} values"
        )
    used = ~np.isnan(numbers)
    _, label = np.unique(labels[used], return_inverse=True)
    sums, counts = np.bincount(label, weights=numbers[used]), np.bincount(label)
    n, n_clusters = int(used.sum()), len(counts)
    mean = float(sums.sum() / n) if n else math.nan
    if n_clusters < 2:
        return BootstrapMean(mean, math.nan, math.nan, n, n_clusters)
    means = _resampled_means(sums, counts, n_resamples, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return BootstrapMean(mean, float(low), float(high), n, n_clusters)


def bootstrap_columns(
    values: NDArray[np.float64], clusters: Collection[Any], *, n_resamples: int = 2000, seed: int = 0
) -> NDArray[np.float64]:
    """The mean of every column over resamples of whole clusters: what intervals of many means, or of their ratios, are read off.

    All columns see the same resamples, and so do all tables with the same clusters and seed.

    Args:
        values: `[row, column]`; nan values are left out.
        clusters: one label per row.

    Returns:
        Means `[resample, column]`; nan where a resample has no value, and throughout with fewer than two clusters.

    Example:
        >>> bootstrap_columns(np.array([[1.0], [3.0]]), ["a", "b"], n_resamples=500).min()
        np.float64(1.0)
    """
    labels = pd.factorize(pd.Series(clusters, dtype=object))[0]
    n_clusters = len(set(labels))
    if n_clusters < 2:
        return np.full((n_resamples, values.shape[1]), math.nan)
    there = ~np.isnan(values)
    sums, counts = np.zeros((2, n_clusters, values.shape[1]))
    np.add.at(sums, labels, np.where(there, values, 0.0))
    np.add.at(counts, labels, there)
    rng = np.random.default_rng(seed)
    means = np.empty((n_resamples, values.shape[1]))
    chunk = max(1, DRAWN_AT_ONCE // n_clusters)
    for start in range(0, n_resamples, chunk):
        drawn = rng.integers(n_clusters, size=(min(chunk, n_resamples - start), n_clusters))
        times = np.stack([np.bincount(row, minlength=n_clusters) for row in drawn]).astype(float)  # [resample, cluster]
        with np.errstate(invalid="ignore"):
            means[start : start + chunk] = (times @ sums) / (times @ counts)
    return means


def mean_intervals(scores: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Bootstrap intervals of the means in `rates.quality_table`, over base queries: columns `by`, then low and high of each.

    For words, repetition and distinct bigrams, and for divergence and reward where they were measured.

    Args:
        scores: one row per response.
        by: the columns to group by, at least one.

    Returns:
        One row per group: columns `by`, then mean_words_low, mean_words_high and so on.

    Example:
        >>> mean_intervals(scores, by=["condition"])["condition"].tolist()
        ['none', 'vector']
    """
    measured = [name for name in ("n_words", "repetition", "distinct_2", "kl", "reward") if name in scores]
    rows = []
    for keys, group in scores.groupby(list(by), sort=False, dropna=False, observed=True):
        row = dict(zip(by, keys, strict=True))
        for column in measured:
            found = bootstrap_mean(group[column], clusters=unit_labels(group, "query"), n_resamples=2000)
            name = f"mean_{column.removeprefix('n_')}"
            row |= {f"{name}_low": found.low, f"{name}_high": found.high}
        rows.append(row)
    return pd.DataFrame(rows)


def compare_conditions(
    frame: pd.DataFrame,
    *,
    baseline: str,
    against: Sequence[str] | None = None,
    by: Sequence[str] = ("instruction",),
    value: str = "followed",
    pair_on: Sequence[str] = ("prompt_id", "trial"),
    unpaired: Literal["error", "drop"] = "error",
    confidence: float = 0.95,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Each condition against the baseline on the same prompts: one row per group and condition.

    Where every pair of a group has its own prompt, low and high are Tango's interval, and `test` is "mcnemar exact" or
    "mcnemar". Where a prompt has several pairs (trials), they are not independent: the row then compares the per-prompt
    mean differences, with `test` "sign flip" and a percentile bootstrap over prompts, whose width is zero if all prompts
    differ alike. `gained` and `lost` count pairs in both cases. In rates and difference every prompt weighs the same.

    Args:
        frame: one row per response, with the columns `by`, `pair_on`, condition and `value`.
        baseline: the condition to compare with; `difference` is positive where the other condition follows more often.
        against: the other conditions; None takes all, in the order in which they are first seen.
        by: the columns to group by; none of them compares over the whole frame.
        value: the yes/no column.
        pair_on: the columns that identify a pair within its group; the first of them is the independent unit. Spellings of
            one "query" are one unit.
        unpaired: "drop" leaves out what only one of the two conditions has; by default that is an error.

    Returns:
        Columns `by`, then `COMPARISON_COLUMNS`: `n` counts pairs, `p_holm` is corrected over the groups of a condition.
        A group of which nothing pairs up keeps its row, with n = 0 and missing numbers.

    Raises:
        DataError: a missing column, condition or verdict, one pair scored twice, or a pair in one condition only.

    Example:
        >>> frame = pd.DataFrame({
        ...     "prompt_id": ["a", "b", "a", "b"], "trial": 0, "instruction": "no_comma",
        ...     "condition": ["none", "none", "vector", "vector"], "followed": [False, True, True, True],
        ... })
        >>> compare_conditions(frame, baseline="none")[["difference", "gained", "p_value"]].values.tolist()
        [[0.5, 1.0, 1.0]]
    """
    require_columns(frame, [*by, *pair_on, "condition", value], what="the scores frame")
    others = _other_conditions(frame, baseline, against)
    scores = frame[frame["condition"].isin([baseline, *others])]
    group = scores.groupby(list(by), sort=False, dropna=False, observed=True).ngroup() if by else 0
    scores = scores.assign(_group=group, _verdict=_verdicts(scores[value], what=f"column {value!r}"))
    scores = scores.assign(**{name: unit_labels(scores, name) for name in pair_on})
    keys = ["_group", *pair_on]
    _check_distinct(scores, [*keys, "condition"], shown=[*by, *pair_on, "condition"])
    heads = scores.drop_duplicates("_group")
    rows = []
    for condition in others:
        pairs = _paired(scores, keys, baseline, condition, unpaired)
        for number, head in zip(heads["_group"], heads[list(by)].itertuples(index=False), strict=True):
            part = pairs[pairs["_group"] == number]
            row = _compare(part, cluster=pair_on[0], confidence=confidence, n_resamples=n_resamples, seed=seed)
            rows.append(dict(zip(by, head, strict=True)) | {"baseline": baseline, "condition": condition} | row)
    table = pd.DataFrame(rows)
    table["p_holm"] = table.groupby("condition")["p_value"].transform(holm)
    return table[[*by, *COMPARISON_COLUMNS]]


def compare_cells(scores: pd.DataFrame) -> pd.DataFrame:
    """The comparisons in `CELLS` that the scores allow, per instruction with Holm's correction, then over all of them.

    The independent unit is the base query: over all instructions, its prompts count together.

    Args:
        scores: one row per response.

    Returns:
        Columns instruction ("all" over all of them), then `COMPARISON_COLUMNS`; no row where no two cells can be compared.

    Raises:
        DataError: as for `compare_conditions`.

    Example:
        >>> compare_cells(scores)[["baseline", "condition", "n"]].values.tolist()
        [['none', 'vector', 6]]
    """
    parts = []
    pair_on = ("query", "instruction", "prompt_id", "trial")
    for baseline, condition in CELLS:
        if {baseline, condition} <= set(scores["condition"]):
            parts.append(compare_conditions(scores, baseline=baseline, against=[condition], pair_on=pair_on))
            if scores["instruction"].nunique() > 1:
                overall = compare_conditions(scores, baseline=baseline, against=[condition], by=(), pair_on=pair_on)
                parts.append(overall.assign(instruction="all"))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["instruction", *COMPARISON_COLUMNS])


def _compare(pairs: pd.DataFrame, *, cluster: str, confidence: float, n_resamples: int, seed: int) -> dict[str, Any]:
    test = mcnemar(pairs["_first"], pairs["_second"])
    prompts = pairs.groupby(cluster, sort=False, dropna=False, observed=True)[["_first", "_second"]].mean()
    change = prompts["_second"] - prompts["_first"]
    if len(prompts) == len(pairs):
        low, high = tango_interval(test.n, test.gained, test.lost, confidence)
        p_value, name = test.p_value, "mcnemar exact" if test.exact else "mcnemar"
    else:
        over_prompts = bootstrap_mean(change, confidence=confidence, n_resamples=n_resamples, seed=seed)
        low, high = over_prompts.low, over_prompts.high
        p_value, name = sign_flip(change, n_resamples=n_resamples, seed=seed), "sign flip"
    return {
        "n": test.n,
        "n_prompts": len(prompts),
        "rate_baseline": prompts["_first"].mean(),
        "rate": prompts["_second"].mean(),
        "difference": change.mean(),
        "low": low,
        "high": high,
        "gained": test.gained,
        "lost": test.lost,
        "test": name if test.n else None,
        "p_value": p_value,
    }


def _paired(scores: pd.DataFrame, keys: list[str], baseline: str, condition: str, unpaired: str) -> pd.DataFrame:
    sides = [
        scores.loc[scores["condition"] == name, [*keys, "_verdict"]].rename(columns={"_verdict": side})
        for name, side in ((baseline, "_first"), (condition, "_second"))
    ]
    pairs = sides[0].merge(sides[1], on=keys, how="outer", indicator=True)
    alone = pairs[pairs["_merge"] != "both"]
    if len(alone) and unpaired == "error":
        only = {"left_only": baseline, "right_only": condition}[str(alone["_merge"].iloc[0])]
        which = ", ".join(f"{name} {alone[name].iloc[0]!r}" for name in keys[1:])
        raise DataError(
            f"every pair must be in both {baseline!r} and {condition!r}, got {len(alone)} in one of them only, the first "
            f"with {which} only in {only!r}; score what is missing, or pass unpaired='drop'"
        )
    return pairs[pairs["_merge"] == "both"].astype({"_first": bool, "_second": bool})


def _other_conditions(frame: pd.DataFrame, baseline: str, against: Sequence[str] | None) -> list[str]:
    known = [str(name) for name in frame["condition"].dropna().unique()]
    others = [name for name in known if name != baseline] if against is None else list(dict.fromkeys(against))
    for name in (baseline, *others):
        if name not in known:
            raise DataError(f"conditions must be in the frame, got {name!r}; {nearest(name, known)}")
    if not others or baseline in others:
        raise DataError(
            f"the baseline is compared with other conditions, got {others or 'none'} beside {baseline!r}; "
            f"known: {', '.join(known)}"
        )
    return others


def _check_distinct(scores: pd.DataFrame, keys: list[str], *, shown: list[str]) -> None:
    twice = scores[scores.duplicated(keys)]
    if len(twice):
        which = ", ".join(f"{name} {twice[name].iloc[0]!r}" for name in shown)
        raise DataError(
            f"a pair is scored once per condition, got {len(twice)} rows too many, the first with {which}; "
            "name the column that tells them apart in by or pair_on, or drop the repeats"
        )


def _verdicts(values: Collection[Any], *, what: str) -> NDArray[np.bool_]:
    column = pd.Series(values)
    wrong = column[~column.isin([True, False])]
    if len(wrong):
        raise DataError(
            f"{what} must be yes or no for every row, got {wrong.iloc[0]!r} ({len(wrong)} such); score or drop those rows"
        )
    return column.astype(bool).to_numpy()


def _numbers(values: Collection[Any]) -> NDArray[np.float64]:
    column = pd.to_numeric(pd.Series(values))
    return np.asarray(column.astype("Float64").to_numpy(dtype=float, na_value=np.nan), dtype=np.float64)


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise SteerlensError(f"confidence must be in (0, 1), got {confidence}; 95 % is written 0.95")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _binomial_p(gained: int, lost: int) -> float:
    discordant = gained + lost
    tail = sum(math.comb(discordant, k) for k in range(min(gained, lost) + 1))
    # Both tails, which share the middle where gained == lost; in whole numbers up to here, so that nothing is rounded twice.
    return min(1.0, math.ldexp(tail, 1 - discordant))


def _chi_square_p(gained: int, lost: int) -> float:
    # Half a pair towards zero on each side, but never past it: gained == lost is p = 1.
    statistic = max(abs(gained - lost) - 1, 0) ** 2 / (gained + lost)
    return math.erfc(math.sqrt(statistic / 2))  # the upper tail of chi-square with one degree of freedom


def _last_kept(keeps: Callable[[float], bool], inside: float, end: float) -> float:
    """The last point that `keeps` on the way from `inside`, which it keeps, to `end`, by bisection."""
    outside = end
    for _ in range(60):  # beyond float64's resolution of an interval of length two
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if keeps(middle) else (inside, middle)
    return inside


def _resampled_means(sums: NDArray[Any], counts: NDArray[Any], n_resamples: int, seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    means = np.empty(n_resamples, dtype=np.float64)
    chunk = max(1, DRAWN_AT_ONCE // len(sums))
    for start in range(0, n_resamples, chunk):
        drawn = rng.integers(len(sums), size=(min(chunk, n_resamples - start), len(sums)))
        means[start : start + chunk] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return means
