"""Rates, intervals and text measures, against derived facts and independent slow versions."""

import math
from collections import Counter
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest

from steerlens.errors import DataError, SteerlensError
from steerlens.stats.pareto import pareto_front
from steerlens.stats.rates import quality_table, rate_table, rates_and_quality, trial_spread, wilson_interval
from steerlens.stats.words import distinct_n, repetition, words

COUNTS = [(0, 1), (1, 1), (0, 10), (3, 10), (10, 10), (50, 163), (162, 163), (5000, 10_000)]


@pytest.mark.parametrize(("k", "n"), COUNTS)
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_wilson_bounds_are_the_rates_that_the_data_just_reject(k: int, n: int, confidence: float) -> None:
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = k / n
    low, high = wilson_interval(k, n, confidence)
    assert 0 <= low <= p <= high <= 1
    for bound in (low, high):  # both solve the score equation; at k = 0 and k = n one of them is p itself
        assert (p - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / n, abs=1e-12)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    # Published values: 5 of 10; 0 of 10 (z^2 / (n + z^2)); 81 of 263 and 15 of 148 (Newcombe 1998, method 3).
    [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)
def test_wilson_agrees_with_published_intervals(k: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(k, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_covers_the_true_rate_about_as_often_as_it_says() -> None:
    n = 40
    ks = np.arange(n + 1)
    low, high = wilson_interval(ks, n)
    log_choose = np.array([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in ks])
    rates = np.linspace(0.02, 0.98, 97)
    log_p = log_choose + np.outer(np.log(rates), ks) + np.outer(np.log1p(-rates), n - ks)
    covered = (low <= rates[:, None]) & (rates[:, None] <= high)
    assert (np.exp(log_p) * covered).sum(axis=1).mean() == pytest.approx(0.95, abs=0.01)


def test_wilson_of_arrays_equals_wilson_one_by_one() -> None:
    ks, ns = (np.array(column) for column in zip(*COUNTS, strict=True))
    low, high = wilson_interval(ks, ns)
    assert list(zip(low, high, strict=True)) == [wilson_interval(int(k), int(n)) for k, n in COUNTS]
    series_low, _ = wilson_interval(pd.Series(ks), pd.Series(ns))
    assert (series_low == low).all()


def test_wilson_of_nothing_is_missing_and_does_not_spoil_its_neighbours() -> None:
    assert all(math.isnan(bound) for bound in wilson_interval(0, 0))
    low, high = wilson_interval(np.array([0, 5]), np.array([0, 10]))
    assert math.isnan(low[0])
    assert math.isnan(high[0])
    assert (low[1], high[1]) == wilson_interval(5, 10)


@pytest.mark.parametrize(("k", "n"), [(-1, 10), (11, 10), (1, 0)])
def test_wilson_refuses_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(SteerlensError, match=rf"successes must be in \[0, n\], got {k} of {n}"):
        wilson_interval(k, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_wilson_refuses_a_confidence_that_is_no_probability(confidence: float) -> None:
    with pytest.raises(SteerlensError, match=r"confidence must be in \(0, 1\)"):
        wilson_interval(1, 2, confidence)


def scores() -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "condition": ["vector"] * 4 + ["none"] * 3,
            "layer": [9, 9, 9, 10, pd.NA, pd.NA, pd.NA],
            "followed": [True, True, False, True, False, False, False],
            "followed_strict": [True, False, False, True, False, False, False],
            "n_words": [10, 20, 30, 40, 1, 2, 3],
            "repetition": [0.0, 0.5, float("nan"), 0.1, float("nan"), float("nan"), float("nan")],
            "distinct_2": [1.0] * 7,
            "perplexity": [1.0, 2.0, 90.0, 7.0, 3.0, float("nan"), 5.0],
            "finish_reason": ["length", "eos", "stop", "eos", "length", "length", "eos"],
        }
    )
    return frame.astype({"layer": "Int64"})


def test_rate_table_counts_each_group_in_first_seen_order() -> None:
    table = rate_table(scores(), by=["condition"])
    assert list(table.columns) == ["condition", "n", "followed", "rate", "low", "high"]
    assert table[["condition", "n", "followed", "rate"]].to_dict("list") == {
        "condition": ["vector", "none"],
        "n": [4, 3],
        "followed": [3, 0],
        "rate": [0.75, 0.0],
    }
    assert (table.loc[0, "low"], table.loc[0, "high"]) == wilson_interval(3, 4)


def test_rate_table_keeps_rows_without_a_layer() -> None:
    table = rate_table(scores(), by=["condition", "layer"])
    assert table["n"].tolist() == [3, 1, 3]
    assert table["layer"].isna().tolist() == [False, False, True]


def test_rate_table_without_keys_is_one_row() -> None:
    table = rate_table(scores(), by=[])
    assert list(table.columns) == ["n", "followed", "rate", "low", "high"]
    assert table[["n", "followed"]].to_numpy().tolist() == [[7, 3]]


def test_rate_table_of_another_verdict_leaves_the_frame_alone() -> None:
    frame = scores()
    before = frame.copy()
    assert rate_table(frame, by=["condition"], value="followed_strict")["followed"].tolist() == [2, 0]
    pd.testing.assert_frame_equal(frame, before)


def test_rate_table_of_no_rows_has_no_rows() -> None:
    table = rate_table(scores().head(0), by=["condition"])
    assert len(table) == 0
    assert list(table.columns) == ["condition", "n", "followed", "rate", "low", "high"]


def test_rate_table_refuses_rows_without_a_verdict_and_missing_columns() -> None:
    frame = scores().astype({"followed": "boolean"})
    frame.loc[0, "followed"] = pd.NA
    with pytest.raises(DataError, match="every row needs a verdict in 'followed', got 1 without one"):
        rate_table(frame, by=["condition"])
    with pytest.raises(DataError, match="missing: instruction"):
        rate_table(scores(), by=["instruction"])


def test_quality_table_leaves_missing_values_out_and_keeps_all_missing_missing() -> None:
    vector, none = quality_table(scores(), by=["condition"]).to_dict("records")
    assert vector == {
        "condition": "vector",
        "mean_words": 25.0,
        "mean_repetition": pytest.approx(0.2),
        "mean_distinct_2": 1.0,
        "median_perplexity": 4.5,
        "cut": 0.25,
    }
    assert math.isnan(none["mean_repetition"])
    assert none["median_perplexity"] == 4.0
    assert none["cut"] == pytest.approx(2 / 3)


def test_quality_table_accepts_nullable_columns() -> None:
    frame = scores().assign(perplexity=pd.array([1, 2, 90, 7, pd.NA, pd.NA, pd.NA], dtype="Float64"))
    vector, none = quality_table(frame, by=["condition"]).to_dict("records")
    assert vector["median_perplexity"] == 4.5
    assert math.isnan(none["median_perplexity"])


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("text", ["a b c a b c a b", "the The THE the", "one two three four five", "x " * 50])
def test_repetition_and_distinct_agree_with_counting_by_hand(text: str, n: int) -> None:
    tokens = text.lower().split()
    counts = Counter(" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    repeats = sum(count - 1 for count in counts.values())
    assert repetition(text, n) == pytest.approx(repeats / sum(counts.values()))
    assert distinct_n(text, n) == pytest.approx(len(counts) / sum(counts.values()))


def test_texts_too_short_for_an_n_gram_have_no_repetition() -> None:
    assert math.isnan(repetition("two words"))
    assert math.isnan(distinct_n("", 2))
    assert math.isnan(repetition(""))
    assert repetition("just three words") == 0.0


def test_scripts_without_spaces_are_read_character_by_character() -> None:
    assert words("hello 雨は降る world") == ["hello", "雨", "は", "降", "る", "world"]
    assert repetition("雨" * 10) == pytest.approx(7 / 8)
    assert words("ಮಳೆ ಬರುತ್ತದೆ") == ["ಮಳೆ", "ಬರುತ್ತದೆ"]
    assert words("مرحبا بالعالم") == ["مرحبا", "بالعالم"]


def test_n_gram_of_no_words_is_refused() -> None:
    with pytest.raises(SteerlensError, match="n must be at least 1, got 0"):
        distinct_n("a b", 0)


def trials(rows):
    return pd.DataFrame(rows, columns=["prompt_id", "trial", "followed"]).assign(condition="vector")


def test_one_trial_per_prompt_is_worth_what_it_counts():
    frame = trials([(str(i), 0, i < 3) for i in range(10)])
    (row,) = rate_table(frame, ["condition"], clusters="prompt_id").to_dict("records")
    assert (row["low"], row["high"]) == pytest.approx(wilson_interval(3, 10))


def test_trials_that_always_agree_are_worth_one_response_per_prompt():
    frame = trials([(str(i), trial, i < 3) for i in range(10) for trial in range(5)])
    (row,) = rate_table(frame, ["condition"], clusters="prompt_id").to_dict("records")
    assert row["n"] == 50
    assert (row["low"], row["high"]) == pytest.approx(wilson_interval(3, 10))


def test_trials_that_vary_as_if_independent_keep_their_number():
    frame = trials([(str(i), trial, trial % 2 == 0) for i in range(10) for trial in range(4)])
    (row,) = rate_table(frame, ["condition"], clusters="prompt_id").to_dict("records")
    assert (row["low"], row["high"]) == pytest.approx(wilson_interval(20, 40))


def test_clustered_intervals_cover_where_plain_ones_do_not():
    """Prompts with rates of their own, five trials each: the plain interval is too narrow, the clustered one is not."""
    rng = np.random.default_rng(0)
    covered = {"plain": 0, "clustered": 0}
    n_sets = 300
    for _ in range(n_sets):
        rates = rng.beta(0.5, 0.5, size=30)
        frame = trials([(str(i), t, bool(rng.random() < rate)) for i, rate in enumerate(rates) for t in range(5)])
        for name, clusters in (("plain", None), ("clustered", "prompt_id")):
            (row,) = rate_table(frame, ["condition"], clusters=clusters).to_dict("records")
            covered[name] += row["low"] <= 0.5 <= row["high"]
    assert covered["clustered"] / n_sets > 0.9
    assert covered["plain"] / n_sets < 0.85


def test_the_spread_of_trials_is_the_standard_deviation_of_their_rates():
    frame = trials([("a", 0, True), ("b", 0, True), ("a", 1, True), ("b", 1, False)])
    (row,) = trial_spread(frame, ["condition"]).to_dict("records")
    assert (row["n_trials"], row["trial_sd"]) == (2, pytest.approx(np.std([1.0, 0.5], ddof=1)))


def test_the_pareto_front_keeps_what_nothing_dominates_equals_included():
    frame = pd.DataFrame({"rate": [0.5, 0.5, 0.7, 0.2, 0.9], "cost": [1.0, 1.0, 2.0, 1.5, np.nan]})
    assert pareto_front(frame, maximize=["rate"], minimize=["cost"]).index.tolist() == [0, 1, 2]
    with pytest.raises(SteerlensError, match="needs a column"):
        pareto_front(frame)


def test_rates_and_quality_stand_side_by_side_for_the_same_groups():
    rng = np.random.default_rng(0)
    n = 60
    frame = pd.DataFrame({"layer": rng.choice([1.0, np.nan], n), "condition": rng.choice(["a", "b", "c"], n)})
    frame = frame.assign(query=rng.choice(list("pqrs"), n), trial=rng.integers(0, 3, n), finish_reason="eos")
    for name in ("followed", "followed_strict", "degenerate"):
        frame[name] = rng.random(n) < 0.5
    for name in ("n_words", "repetition", "distinct_2", "perplexity"):
        frame[name] = rng.random(n)
    table = rates_and_quality(frame, ["layer", "condition"])
    for row in table.to_dict("records"):
        same = frame["layer"].isna() if math.isnan(row["layer"]) else frame["layer"] == row["layer"]
        group = frame[same & (frame["condition"] == row["condition"])]
        assert row["n"] == len(group)
        assert row["n_trials"] == group["trial"].nunique()
        means = {"rate": "followed", "strict": "followed_strict", "degenerate": "degenerate", "mean_words": "n_words"}
        for column, value in means.items():
            assert row[column] == pytest.approx(group[value].mean())
    (whole,) = rates_and_quality(frame, []).to_dict("records")
    assert (whole["n"], whole["strict"]) == (n, pytest.approx(frame["followed_strict"].mean()))
    plain = rates_and_quality(frame.drop(columns=["followed_strict", "degenerate", "trial"]), ["condition"])
    assert not {"strict", "degenerate", "trial_sd"} & set(plain)


def test_spellings_of_one_query_are_one_cluster() -> None:
    spellings = ("Caf\u00e9?", "CAF\u00c9?", "cafe\u0301?", " caf\u00e9?\n")
    frame = pd.DataFrame({"query": [f"{i} {text}" for i in range(6) for text in spellings], "followed": False})
    plain = frame.assign(query=[str(i) for i in range(6) for _ in spellings])
    found = rate_table(frame, [], clusters="query")
    pd.testing.assert_frame_equal(found, rate_table(plain, [], clusters="query"))
    assert (found["low"][0], found["high"][0]) == wilson_interval(0, 6)


def test_other_columns_are_taken_as_they_are() -> None:
    frame = pd.DataFrame({"prompt_id": ["a", "A", "b", "B"], "followed": False})
    assert rate_table(frame, [], clusters="prompt_id")["high"][0] == wilson_interval(0, 4)[1]
