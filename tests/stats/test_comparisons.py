"""Paired tests and intervals, against enumeration, scipy, published numbers and simulated coverage."""

import math
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats
from scipy.special import xlogy

from steerlens.errors import DataError, SteerlensError
from steerlens.stats.comparisons import (
    COMPARISON_COLUMNS,
    bootstrap_columns,
    bootstrap_mean,
    compare_cells,
    compare_conditions,
    holm,
    mcnemar,
    mean_intervals,
    sign_flip,
    tango_interval,
)
from steerlens.stats.rates import wilson_interval

Z = stats.norm.ppf(0.975)


def paired(gained: int, lost: int, both: int = 2, neither: int = 3) -> tuple[list[bool], list[bool]]:
    first = [False] * gained + [True] * lost + [True] * both + [False] * neither
    second = [True] * gained + [False] * lost + [True] * both + [False] * neither
    return first, second


def test_mean_intervals_are_bootstraps_over_queries_of_each_measure_there_is() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"instruction": "a", "condition": ["none"] * 20 + ["vector"] * 20, "query": [*range(20)] * 2})
    frame["n_words"] = rng.integers(5, 50, 40)
    frame["kl"] = rng.random(40)
    table = mean_intervals(frame, ["instruction", "condition"]).set_index("condition")
    assert [name for name in table if name != "instruction"] == [
        "mean_words_low", "mean_words_high", "mean_kl_low", "mean_kl_high",
    ]  # fmt: skip
    for condition, group in frame.groupby("condition"):
        for column, name in (("n_words", "words"), ("kl", "kl")):
            spread = Z * group[column].std() / math.sqrt(20)
            assert table.loc[condition, f"mean_{name}_low"] == pytest.approx(
                group[column].mean() - spread, abs=spread / 3
            )
            assert table.loc[condition, f"mean_{name}_high"] == pytest.approx(
                group[column].mean() + spread, abs=spread / 3
            )


# McNemar


@pytest.mark.parametrize(("gained", "lost"), [(0, 1), (3, 0), (4, 4), (2, 7), (9, 3)])
def test_exact_mcnemar_counts_the_ways_in_which_discordant_pairs_can_fall(gained: int, lost: int) -> None:
    ways = [abs(2 * sum(way) - gained - lost) for way in product([0, 1], repeat=gained + lost)]
    as_extreme = sum(way >= abs(gained - lost) for way in ways) / len(ways)
    result = mcnemar(*paired(gained, lost))
    assert result.exact
    assert result.p_value == pytest.approx(as_extreme, abs=1e-15)


@pytest.mark.parametrize(("gained", "lost"), [(24, 0), (15, 9), (25, 0), (16, 9), (70, 41), (30, 30)])
def test_mcnemar_is_binomial_below_25_discordant_pairs_and_chi_square_from_25_on(gained: int, lost: int) -> None:
    result = mcnemar(*paired(gained, lost))
    assert result.exact == (gained + lost < 25)
    if result.exact:
        expected = stats.binomtest(gained, gained + lost).pvalue
    else:
        expected = stats.chi2.sf(max(abs(gained - lost) - 1, 0) ** 2 / (gained + lost), df=1)
    assert result.p_value == pytest.approx(expected, rel=1e-12)


def test_mcnemar_counts_second_minus_first_and_changes_sign_when_the_two_are_exchanged() -> None:
    first, second = paired(gained=4, lost=1, both=2, neither=3)
    forth, back = mcnemar(first, second), mcnemar(np.array(second), pd.Series(first))
    assert (forth.n, forth.gained, forth.lost) == (10, 4, 1)
    assert forth.difference == pytest.approx(np.mean(second) - np.mean(first))
    assert (back.gained, back.lost, back.difference) == (1, 4, -forth.difference)
    assert back.p_value == forth.p_value


def test_mcnemar_without_a_discordant_pair_is_one_and_without_a_pair_is_missing() -> None:
    assert mcnemar(*paired(0, 0)).p_value == 1.0
    nothing = mcnemar([], [])
    assert nothing.n == 0
    assert math.isnan(nothing.p_value)
    assert math.isnan(nothing.difference)


def test_mcnemar_refuses_pairs_without_a_partner_or_a_verdict() -> None:
    with pytest.raises(SteerlensError, match="two results each, got 2 and 1"):
        mcnemar([True, False], [True])
    for bad in (float("nan"), None, pd.NA, 0.5, "yes"):
        with pytest.raises(SteerlensError, match="second must be yes or no for every row"):
            mcnemar([True, False], pd.Series([True, bad], dtype=object))


# Tango's interval


def score_statistic(n: int, gained: int, lost: int, t: float) -> float:
    """Tango's statistic with the nuisance parameter found by numerical maximisation of the multinomial likelihood."""

    def minus_log_likelihood(q: float) -> float:
        return -xlogy([gained, lost, n - gained - lost], [q + t, q, 1 - 2 * q - t]).sum()

    bounds = (max(0.0, -t), (1 - t) / 2)
    q = optimize.minimize_scalar(minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return (gained - lost - n * t) / math.sqrt(n * (2 * q + t - t * t))


@pytest.mark.parametrize(
    ("n", "gained", "lost"), [(21, 1, 7), (40, 3, 0), (40, 0, 3), (40, 5, 5), (163, 32, 3), (10, 6, 4)]
)
def test_tango_bounds_are_the_differences_that_the_score_test_just_rejects(n: int, gained: int, lost: int) -> None:
    low, high = tango_interval(n, gained, lost)
    assert -1 <= low < (gained - lost) / n < high <= 1
    assert score_statistic(n, gained, lost, low) == pytest.approx(Z, abs=1e-4)
    assert score_statistic(n, gained, lost, high) == pytest.approx(-Z, abs=1e-4)


@pytest.mark.parametrize(
    ("n", "gained", "lost", "confidence", "low", "high"),
    # Published: Bentur 2009 and Cavo 2012 as in Fagerland et al., and an output of the R package PropCIs.
    [
        (21, 1, 7, 0.95, -0.517, -0.026),
        (161, 6, 16, 0.95, -0.1240, -0.0054),
        (618, 28, 25, 0.90, -0.0148, 0.0247),
    ],
)
def test_tango_agrees_with_published_intervals(
    n: int, gained: int, lost: int, confidence: float, low: float, high: float
) -> None:
    assert tango_interval(n, gained, lost, confidence) == pytest.approx((low, high), abs=5.1e-4 if n == 21 else 5.1e-5)


def test_tango_leaves_out_zero_just_where_the_uncorrected_mcnemar_statistic_exceeds_z_squared() -> None:
    for gained, lost in product(range(13), repeat=2):
        low, high = tango_interval(30, gained, lost)
        significant = (gained - lost) ** 2 > Z**2 * (gained + lost)
        assert (not low <= 0 <= high) == significant, (gained, lost)


def test_tango_without_discordant_pairs_is_wilson_of_none_on_both_sides() -> None:
    _, high = wilson_interval(0, 30)
    assert tango_interval(30, 0, 0) == pytest.approx((-high, high))


def test_tango_is_antisymmetric_and_ends_at_one_where_all_pairs_are_gained() -> None:
    low, high = tango_interval(50, 9, 4)
    assert tango_interval(50, 4, 9) == pytest.approx((-high, -low))
    assert tango_interval(12, 12, 0)[1] == 1.0
    assert tango_interval(12, 0, 12)[0] == -1.0


def test_tango_covers_the_true_difference_about_as_often_as_it_says() -> None:
    n, truths = 20, [(0.3, 0.1), (0.2, 0.2), (0.5, 0.05), (0.15, 0.05), (0.4, 0.3)]
    tables = [(gained, lost) for gained in range(n + 1) for lost in range(n + 1 - gained)]
    bounds = np.array([tango_interval(n, gained, lost) for gained, lost in tables])
    counts = np.array([(gained, lost, n - gained - lost) for gained, lost in tables])
    coverages = []
    for p_gained, p_lost in truths:
        chance = stats.multinomial.pmf(counts, n, [p_gained, p_lost, 1 - p_gained - p_lost])
        inside = (bounds[:, 0] <= p_gained - p_lost) & (p_gained - p_lost <= bounds[:, 1])
        coverages.append(chance[inside].sum())
    assert np.mean(coverages) == pytest.approx(0.95, abs=0.01)
    assert min(coverages) > 0.92


def test_tango_of_no_pairs_is_missing_and_impossible_counts_are_refused() -> None:
    assert all(math.isnan(bound) for bound in tango_interval(0, 0, 0))
    for n, gained, lost in [(3, 2, 2), (3, -1, 0)]:
        with pytest.raises(SteerlensError, match=r"gained \+ lost must be in \[0, n\]"):
            tango_interval(n, gained, lost)
    with pytest.raises(SteerlensError, match=r"confidence must be in \(0, 1\), got 95"):
        tango_interval(3, 1, 1, 95.0)


# Sign flip


def test_sign_flip_counts_every_sign_choice_when_there_are_few_prompts() -> None:
    rng = np.random.default_rng(0)
    for n in range(1, 11):
        differences = rng.integers(-3, 4, size=n) / 3  # three trials per prompt: many ties
        sums = [abs(np.dot(signs, differences)) for signs in product([-1, 1], repeat=n)]
        expected = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-12)
        assert sign_flip(differences) == pytest.approx(expected, abs=1e-15)


def test_sign_flip_of_single_trials_is_exact_mcnemar() -> None:
    first, second = paired(gained=9, lost=3)
    differences = np.array(second, dtype=int) - np.array(first, dtype=int)
    assert sign_flip(differences) == pytest.approx(mcnemar(first, second).p_value, abs=1e-15)


def test_sampled_sign_flip_agrees_with_scipys_permutation_test_and_depends_on_its_seed_alone() -> None:
    rng = np.random.default_rng(1)
    differences = rng.integers(-4, 7, size=60) / 4
    sampled = sign_flip(differences, n_resamples=20_000, seed=3)
    scipys = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=5_000, rng=rng, vectorized=True
    ).pvalue
    assert 0.001 < scipys < 0.2, "a p-value that can tell right from wrong"
    assert sampled == pytest.approx(scipys, abs=0.015)
    assert sign_flip(differences, n_resamples=20_000, seed=3) == sampled


def test_a_sampled_sign_flip_is_never_zero() -> None:
    assert sign_flip(np.ones(100), n_resamples=99) == pytest.approx(1 / 100)


def test_sign_flip_of_no_change_is_one_of_nothing_is_missing_and_of_nan_is_refused() -> None:
    assert sign_flip([0.0, 0.0]) == 1.0
    assert math.isnan(sign_flip([]))
    with pytest.raises(SteerlensError, match="finite difference"):
        sign_flip([0.5, float("nan")])


# Holm


def test_holm_agrees_with_the_steps_done_by_hand() -> None:
    # Sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04; the last may not fall below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.uniform(0, 0.2, size=8)
        rejected = np.zeros(8, dtype=bool)
        for step, index in enumerate(np.argsort(p)):
            if p[index] > 0.05 / (8 - step):
                break
            rejected[index] = True
        assert ((holm(p) <= 0.05) == rejected).all()


def test_holm_leaves_missing_p_values_missing_and_does_not_count_them() -> None:
    adjusted = holm([float("nan"), 0.02, float("nan"), 0.9])
    assert np.isnan(adjusted[[0, 2]]).all()
    assert adjusted[[1, 3]] == pytest.approx(holm([0.02, 0.9]))
    assert adjusted[1] == pytest.approx(0.04)
    assert len(holm([])) == 0
    assert holm([0.9, 0.8]).max() == 1.0


def test_holm_refuses_what_is_no_probability() -> None:
    for bad in (-0.1, 1.1):
        with pytest.raises(SteerlensError, match=r"p-values must be in \[0, 1\]"):
            holm([0.5, bad])


# Bootstrap


def test_the_bootstrap_interval_covers_a_known_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    results = [bootstrap_mean(rng.normal(2.0, 3.0, size=60), n_resamples=500, seed=run) for run in range(1000)]
    assert np.mean([r.low <= 2.0 <= r.high for r in results]) == pytest.approx(0.94, abs=0.02)


def test_clusters_widen_the_interval_as_much_as_their_shared_part_asks_for() -> None:
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40), 5)
    covered: dict[str, list[bool]] = {"clusters": [], "none": []}
    for run in range(600):
        values = rng.normal(size=40)[prompts] + 0.5 * rng.normal(size=200)
        for name, clusters in (("clusters", prompts), ("none", None)):
            result = bootstrap_mean(values, clusters=clusters, n_resamples=300, seed=run)
            covered[name].append(result.low <= 0 <= result.high)
    assert np.mean(covered["clusters"]) == pytest.approx(0.93, abs=0.02)
    assert np.mean(covered["none"]) < 0.75


def test_the_bootstrap_interval_agrees_with_all_resamples_of_a_few_values() -> None:
    values = [0.0, 1.0, 5.0, 6.0, 13.0]
    every_mean = np.mean(list(product(values, repeat=5)), axis=1)
    result = bootstrap_mean(values, confidence=0.8, n_resamples=40_000)
    assert result.mean == 5.0
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(every_mean, [0.1, 0.9])), abs=0.21)


def test_clusters_of_unequal_size_keep_the_mean_over_values() -> None:
    result = bootstrap_mean([0.0, 0.0, 0.0, 1.0], clusters=["a", "a", "a", "b"], n_resamples=2000)
    assert (result.mean, result.n, result.n_clusters) == (0.25, 4, 2)
    assert (result.low, result.high) == (0.0, 1.0), "either cluster is drawn twice in a quarter of the resamples"


def test_the_bootstrap_leaves_out_missing_values_and_says_how_many_it_used() -> None:
    values = pd.Series([1.0, None, 3.0, 2.0, None], dtype="Float64")
    result = bootstrap_mean(values, clusters=["a", "b", "c", "c", "c"])
    assert (result.mean, result.n, result.n_clusters) == (2.0, 3, 2)
    assert bootstrap_mean([1.0, 3.0, 2.0]) == bootstrap_mean(values)


def test_the_bootstrap_of_nothing_is_missing_and_of_one_cluster_has_no_interval() -> None:
    nothing = bootstrap_mean([float("nan")])
    assert nothing.n == bootstrap_mean([]).n == 0
    assert all(math.isnan(number) for number in (nothing.mean, nothing.low, nothing.high))
    for one in (bootstrap_mean([0.5]), bootstrap_mean([0.0, 1.0], clusters=["a", "a"])):
        assert one.mean == 0.5
        assert math.isnan(one.low)
        assert math.isnan(one.high)


def test_the_bootstrap_depends_on_its_seed_alone_and_leaves_the_global_generator() -> None:
    values = np.arange(20.0)
    state = np.random.get_state()[1].copy()
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, n_resamples=100, seed=1) != bootstrap_mean(values, n_resamples=100, seed=2)
    assert (np.random.get_state()[1] == state).all()


def test_the_bootstrap_refuses_bad_values_labels_and_confidences() -> None:
    with pytest.raises(SteerlensError, match="finite"):
        bootstrap_mean([1.0, float("inf")])
    for labels in (["a"], ["a", None]):
        with pytest.raises(SteerlensError, match="every value needs its cluster, got 1 labels for 2 values"):
            bootstrap_mean([1.0, 2.0], clusters=labels)
    with pytest.raises(SteerlensError, match="confidence must be in"):
        bootstrap_mean([1.0, 2.0], confidence=1.0)


# Conditions


def scores(trials: int = 1, n_prompts: int = 40, seed: int = 0) -> pd.DataFrame:
    """Random verdicts of three conditions on two instructions, in shuffled order."""
    rng = np.random.default_rng(seed)
    rates = {"none": 0.2, "vector": 0.5, "text": 0.9}
    rows = [
        (f"{instruction}-{prompt}", instruction, condition, trial, bool(rng.uniform() < rate))
        for instruction, prompt, (condition, rate), trial in product(
            ("title", "json"), range(n_prompts), rates.items(), range(trials)
        )
    ]
    frame = pd.DataFrame(rows, columns=["prompt_id", "instruction", "condition", "trial", "followed"])
    return frame.sample(frac=1, random_state=seed)


def verdicts_of(frame: pd.DataFrame, instruction: str, condition: str) -> "pd.Series[Any]":
    rows = frame[(frame["instruction"] == instruction) & (frame["condition"] == condition)]
    return rows.set_index(["prompt_id", "trial"])["followed"].sort_index()


def test_one_trial_per_prompt_is_compared_by_mcnemar_and_tango() -> None:
    frame = scores()
    table = compare_conditions(frame, baseline="none", against=["vector", "text"])
    assert list(table.columns) == ["instruction", *COMPARISON_COLUMNS]
    assert list(table["condition"]) == ["vector"] * 2 + ["text"] * 2
    for row in table.itertuples():
        first, second = (verdicts_of(frame, row.instruction, name) for name in ("none", row.condition))
        expected = mcnemar(first, second)
        assert (row.n, row.n_prompts, row.gained, row.lost) == (40, 40, expected.gained, expected.lost)
        assert row.p_value == expected.p_value
        assert row.test == ("mcnemar exact" if expected.exact else "mcnemar")
        assert (row.rate_baseline, row.rate) == pytest.approx((first.mean(), second.mean()))
        assert row.difference == pytest.approx(expected.difference)
        assert row.difference > 0, "positive where the condition follows more often than the baseline"
        assert (row.low, row.high) == tango_interval(40, expected.gained, expected.lost)
    assert set(table["test"]) == {"mcnemar exact", "mcnemar"}


def test_several_trials_are_compared_by_the_mean_of_each_prompt() -> None:
    frame = scores(trials=3, n_prompts=12)
    table = compare_conditions(frame, baseline="none", seed=5, n_resamples=500)
    assert set(table["test"]) == {"sign flip"}
    for row in table.itertuples():
        first, second = (verdicts_of(frame, row.instruction, name) for name in ("none", row.condition))
        change = second.groupby("prompt_id").mean() - first.groupby("prompt_id").mean()
        assert (row.n, row.n_prompts) == (36, 12)
        assert row.p_value == sign_flip(change)
        assert row.difference == pytest.approx(change.mean()) == pytest.approx(row.rate - row.rate_baseline)
        assert (row.gained - row.lost) / 36 == pytest.approx(row.difference)
        in_the_tables_order = change.reindex(frame["prompt_id"].unique()).dropna()
        around = bootstrap_mean(in_the_tables_order, n_resamples=20_000)
        assert (row.low, row.high) == pytest.approx((around.low, around.high), abs=0.03)


def test_copied_trials_do_not_make_a_result_more_certain() -> None:
    once = scores(n_prompts=15)
    copies = pd.concat([once.assign(trial=trial) for trial in range(4)])
    one, four = compare_conditions(once, baseline="none"), compare_conditions(copies, baseline="none")
    one, four = (table.sort_values(["condition", "instruction"]) for table in (one, four))
    assert list(four["p_value"]) == pytest.approx(list(one["p_value"])), "a sign flip of one trial is exact McNemar"
    assert list(four["difference"]) == pytest.approx(list(one["difference"]))
    assert list(four["n"]) == [60] * 4


def test_holm_runs_over_the_groups_of_each_condition() -> None:
    table = compare_conditions(scores(n_prompts=12), baseline="none")
    for _, rows in table.groupby("condition"):
        assert list(rows["p_holm"]) == list(holm(rows["p_value"]))
        assert (rows["p_holm"] >= rows["p_value"]).all()
    assert (table["p_holm"] > table["p_value"]).any()


def test_the_order_of_rows_does_not_matter_and_the_frame_stays_as_it_was() -> None:
    frame = scores()
    before = frame.copy()
    table = compare_conditions(frame, baseline="none", against=["text"])
    pd.testing.assert_frame_equal(frame, before)
    shuffled = compare_conditions(frame.sample(frac=1, random_state=9), baseline="none", against=["text"])
    both = (each.sort_values("instruction", ignore_index=True) for each in (table, shuffled))
    pd.testing.assert_frame_equal(*both)


def test_no_group_compares_over_the_whole_frame_and_several_keys_may_be_missing() -> None:
    frame = scores()
    whole = compare_conditions(frame, baseline="none", by=())
    assert list(whole.columns) == list(COMPARISON_COLUMNS)
    assert list(whole["n"]) == [80, 80]
    layered = frame.assign(layer=pd.array([None] * len(frame), dtype="Int64"))
    keyed = compare_conditions(layered, baseline="none", by=("instruction", "layer"))
    assert list(keyed["n"]) == [40] * 4
    assert keyed["layer"].isna().all()


@pytest.mark.parametrize(("absent", "left"), [("vector", "none"), ("none", "vector")])
def test_pairs_in_one_condition_only_are_an_error_unless_they_are_dropped(absent: str, left: str) -> None:
    frame = scores(n_prompts=10)
    gone = (frame["prompt_id"] == "json-3") & (frame["condition"] == absent)
    with pytest.raises(DataError, match=f"got 1 in one of them only, .* prompt_id 'json-3', trial .* only in '{left}'"):
        compare_conditions(frame[~gone], baseline="none", against=["vector", "text"])
    dropped = compare_conditions(frame[~gone], baseline="none", unpaired="drop")
    without = compare_conditions(frame[frame["prompt_id"] != "json-3"], baseline="none", against=["vector"])
    by_key = [table.set_index(["instruction", "condition"]).drop(columns="p_holm") for table in (dropped, without)]
    pd.testing.assert_series_equal(by_key[0].loc[("json", "vector")], by_key[1].loc[("json", "vector")])
    assert by_key[0].loc[("json", "text"), "n"] == (10 if absent == "vector" else 9)


def test_a_group_of_which_nothing_pairs_up_is_missing_and_not_a_test() -> None:
    frame = scores(n_prompts=10)
    frame = frame[(frame["instruction"] == "title") | (frame["condition"] != "vector")]
    table = compare_conditions(frame, baseline="none", against=["vector"], unpaired="drop").set_index("instruction")
    assert table.loc["json", "n"] == 0
    numbers = ["rate_baseline", "rate", "difference", "low", "high", "test", "p_value", "p_holm"]
    assert table.loc["json", numbers].isna().all()
    assert table.loc["title", "p_holm"] == table.loc["title", "p_value"]


def test_a_pair_scored_twice_is_refused_with_the_way_out() -> None:
    frame = scores(n_prompts=3)
    with pytest.raises(DataError, match=r"once per condition, got 1 rows too many.*instruction .* in by or pair_on"):
        compare_conditions(pd.concat([frame, frame.head(1)]), baseline="none")


def test_missing_conditions_columns_and_verdicts_are_refused() -> None:
    frame = scores(n_prompts=3)
    with pytest.raises(DataError, match=r"got 'vectr'; did you mean 'vector'\?"):
        compare_conditions(frame, baseline="none", against=["vectr"])
    with pytest.raises(DataError, match="conditions must be in the frame, got 'random'"):
        compare_conditions(frame, baseline="random")
    with pytest.raises(DataError, match=r"compared with other conditions, got \['none'\] beside 'none'"):
        compare_conditions(frame, baseline="none", against=["none"])
    with pytest.raises(DataError, match="got none beside 'none'"):
        compare_conditions(frame[frame["condition"] == "none"], baseline="none")
    with pytest.raises(DataError, match="missing: trial"):
        compare_conditions(frame.drop(columns="trial"), baseline="none")
    unscored = frame.astype({"followed": object})
    unscored.iloc[0, unscored.columns.get_loc("followed")] = None
    with pytest.raises(DataError, match="column 'followed' must be yes or no for every row, got None"):
        compare_conditions(unscored, baseline="none")


def test_spellings_of_one_query_are_one_unit_of_every_comparison() -> None:
    spellings = ("Caf\u00e9?", "CAF\u00c9?", "cafe\u0301?", " caf\u00e9?\n")
    texts = [f"{i} {text}" for i in range(6) for text in spellings]
    rows = [
        {"query": text, "prompt_id": text, "condition": condition, "followed": condition == "vector" and i % 3 > 0}
        for condition in ("none", "vector")
        for i, text in enumerate(texts)
    ]
    frame = pd.DataFrame(rows).assign(instruction="a", trial=0, n_words=range(48))
    plain = frame.assign(query=frame["query"].str[0])
    pd.testing.assert_frame_equal(compare_cells(frame), compare_cells(plain))
    assert compare_cells(frame)[["n", "n_prompts", "test"]].values.tolist() == [[24, 6, "sign flip"]]
    pd.testing.assert_frame_equal(mean_intervals(frame, ["condition"]), mean_intervals(plain, ["condition"]))


def test_columns_are_resampled_by_clusters_as_one_mean_is() -> None:
    rng = np.random.default_rng(0)
    values, clusters = rng.normal(size=(30, 3)), np.repeat(np.arange(10), 3)
    draws = bootstrap_columns(values, clusters)
    assert draws.shape == (2000, 3)
    for column in range(3):
        expected = bootstrap_mean(values[:, column], clusters=clusters, n_resamples=2000)
        found = np.quantile(draws[:, column], [0.025, 0.975])
        assert found == pytest.approx([expected.low, expected.high], abs=1e-12)  # the very same draws
    assert draws[:, 1] == pytest.approx(bootstrap_columns(values[:, 1:2], clusters)[:, 0])
    assert (draws != bootstrap_columns(values, clusters, seed=1)).any()


def test_missing_values_of_a_column_are_left_out_and_fewer_than_two_clusters_have_no_draws() -> None:
    values = np.array([[1.0, math.nan], [3.0, 5.0], [2.0, math.nan]])
    draws = bootstrap_columns(values, ["a", "b", "c"], n_resamples=200)
    assert np.nanmin(draws[:, 1]) == np.nanmax(draws[:, 1]) == 5
    assert np.isnan(draws[:, 1]).mean() == pytest.approx((2 / 3) ** 3, abs=0.12)  # without the one that is there
    assert not np.isnan(draws[:, 0]).any()
    assert np.isnan(bootstrap_columns(values, ["a"] * 3, n_resamples=5)).all()
    assert np.isnan(bootstrap_columns(values[:0], [], n_resamples=5)).all()
