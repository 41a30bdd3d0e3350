"""Numbers of a direction against plain loops, planted worlds and their controls."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from steerlens.errors import DataError, SteerlensError
from steerlens.reading.diagnosis import (
    TITLES,
    _halves,
    _held_out,
    _Products,
    _sizes,
    _stability,
    _Sum,
    diagnose,
)
from steerlens.reading.examples import examples_of
from steerlens.stats.slopes import agreement, d_prime
from steerlens.vectors.activations import Activations
from steerlens.vectors.estimators import fit_steering_vector
from tests.reading.points import activations, planted, reordered
from tests.unchecked import unchecked


def one(acts: Activations, layer: int = 0) -> pd.DataFrame:
    """The measures of the only instruction at a layer, by name."""
    return diagnose(acts, layers=layer).table.set_index("measure")


def alone(**options: object) -> Activations:
    return unchecked(planted)(instructions=("a:one",), **{"layers": (0,), **options})


def by_hand(acts: Activations) -> dict[str, float]:
    """Every measure at layer 0 by loops over pairs, each pair against the pairs of other queries."""
    without, with_ = (acts.resid[:, side, 0].double().numpy() for side in (0, 1))
    d, queries = with_ - without, np.array(acts.prompt_ids)
    cosines, plus, minus = [], [], []
    for i in range(len(d)):
        others = d[queries != queries[i]].mean(axis=0)
        cosines.append(d[i] @ others / np.linalg.norm(d[i]) / np.linalg.norm(others))
        plus.append(with_[i] @ others / np.linalg.norm(others))
        minus.append(without[i] @ others / np.linalg.norm(others))
    apart = [(i, j) for i in range(len(d)) for j in range(len(d)) if queries[i] != queries[j]]
    norm = np.linalg.norm(d.mean(axis=0))
    return {
        "agreement": float(np.mean(cosines)),
        "d_prime": d_prime(np.array(plus), np.array(minus)),
        "norm": norm,
        "relative_norm": norm / np.linalg.norm(without, axis=1).mean(),
        "effective_rank": np.mean([d[i] @ d[i] * (d[j] @ d[j]) for i, j in apart])
        / np.mean([(d[i] @ d[j]) ** 2 for i, j in apart]),
    }


@pytest.mark.parametrize("pairs_per_query", [1, 3])
def test_measures_equal_plain_loops_over_pairs(pairs_per_query: int) -> None:
    rng = np.random.default_rng(0)
    queries = [f"q{i}" for i in range(7) for _ in range(pairs_per_query)]
    acts = activations(1 + rng.normal(size=(len(queries), 1, 10)), ["a:a"] * len(queries), queries)
    found = one(acts)["value"]
    for name, expected in by_hand(acts).items():
        assert found[name] == pytest.approx(expected, rel=1e-5), name


def test_agreement_and_norm_are_those_that_vectors_know() -> None:
    acts = alone()
    found = one(acts)["value"]
    assert found["agreement"] == pytest.approx(agreement(acts.differences[:, 0].numpy(), leave_one_out=True), rel=1e-5)
    vector = fit_steering_vector(acts)
    assert found["norm"] == pytest.approx(float(vector[0].norm()), rel=1e-5)
    assert found["relative_norm"] == pytest.approx(float(vector[0].norm()) / vector.resid_norm[0], rel=1e-5)


def test_swapped_sides_are_what_the_measures_say_of_activations_whose_sides_were_swapped() -> None:
    acts, signs = alone(size=2.0), np.array([1, -1, -1, 1, 1, -1, 1, 1])
    part = examples_of(acts)
    products, halves, loads = _Products.of(part, 0), _halves(part, 0, "a:one"), signs[None].astype(float)
    total = _Sum.of(products, loads)
    found = {**_held_out(products, loads, total), **_sizes(products, loads, total)}
    found["stability"] = _stability(products, loads, halves, total)
    for index, sign in enumerate(signs):
        if sign < 0:
            acts.resid[index] = acts.resid[index].flip(0)
    for name, expected in one(acts)["value"].items():
        assert found[str(name)][0] == pytest.approx(expected, rel=1e-4), name


def test_stability_is_the_mean_cosine_of_all_halves() -> None:
    acts = alone(size=1.5, n_queries=10)
    d = acts.differences[:, 0].double().numpy()
    halves = []
    for half in combinations(range(10), 5):
        a, b = d[list(half)].sum(axis=0), d[[i for i in range(10) if i not in half]].sum(axis=0)
        halves.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert one(acts).loc["stability", "value"] == pytest.approx(np.mean(halves), abs=0.02)


def test_pairs_that_move_one_way_agree_and_lie_on_one_line_without_doubt() -> None:
    acts = alone(noise=0.0, n_queries=8)
    found = one(acts)
    for name in ("agreement", "stability", "effective_rank"):
        assert found.loc[name, ["value", "low", "high"]].tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    assert found.loc["norm", ["value", "low", "high"]].tolist() == pytest.approx([6, 6, 6], abs=1e-4)


def test_noise_says_nothing_that_its_controls_do_not_say() -> None:
    found = one(alone(size=0.0, n_queries=40, d_model=60, seed=1))
    assert ((found["control_low"] <= found["value"]) & (found["value"] <= found["control_high"])).all()
    assert found.loc["agreement", "low"] < 0 < found.loc["agreement", "high"]
    assert found.loc["d_prime", "low"] < 0 < found.loc["d_prime", "high"]
    assert found.loc["effective_rank", "value"] == pytest.approx(60, rel=0.15)
    assert found.loc["effective_rank", "control"] == pytest.approx(60, rel=0.02)


def test_a_planted_direction_is_beyond_its_controls_and_within_its_intervals() -> None:
    found = one(alone(size=4.0, n_queries=30))
    assert ((found["low"] <= found["value"]) & (found["value"] <= found["high"])).all()
    for name in ("agreement", "d_prime", "norm", "relative_norm", "stability"):
        assert found.loc[name, "low"] > found.loc[name, "control_high"], name
    assert found.loc["effective_rank", "high"] < found.loc["effective_rank", "control_low"]


def test_intervals_hold_the_expected_number_about_as_often_as_they_say() -> None:
    tables = [one(alone(size=2.0, n_queries=20, seed=seed)) for seed in range(40)]
    for name in ("agreement", "norm", "stability"):
        expected = np.mean([table.loc[name, "value"] for table in tables])
        held = [table.loc[name, "low"] <= expected <= table.loc[name, "high"] for table in tables]
        assert np.mean(held) >= 0.85, name


@pytest.mark.parametrize(("n_queries", "missing"), [(4, set(TITLES)), (7, {"stability"}), (8, set())])
def test_too_few_queries_have_numbers_and_no_interval(n_queries: int, missing: set[str]) -> None:
    found = diagnose(alone(size=2.0, n_queries=n_queries))
    table = found.table.set_index("measure")
    assert table[["value", "control_low", "control_high"]].notna().all(axis=None)
    assert set(table.index[table["low"].isna() & table["high"].isna()]) == missing
    assert found.profiles["low"].isna().all() == (n_queries < 5)


def test_effective_rank_does_not_depend_on_the_number_of_pairs() -> None:
    few, many = (
        np.mean([one(alone(size=0, n_queries=n, d_model=30, seed=s)).loc["effective_rank", "value"] for s in range(12)])
        for n in (12, 48)
    )
    assert few == pytest.approx(many, rel=0.12)
    planes = 5 * np.random.default_rng(0).normal(size=(60, 1, 2)) @ np.eye(2, 30)
    found = one(activations(planes, ["a:a"] * 60, [f"q{i}" for i in range(60)]))
    assert found.loc["effective_rank", "value"] == pytest.approx(2, rel=0.1)


def test_profiles_are_held_out_projections_of_both_sides() -> None:
    acts = alone(layers=(0, 3), n_queries=12)
    found = diagnose(acts).profiles.set_index(["layer", "side"])
    vector = fit_steering_vector(acts)
    for layer in (0, 3):
        gap = found.loc[(layer, "with"), "mean"] - found.loc[(layer, "without"), "mean"]
        in_sample = vector.proj_with[layer] - vector.proj_without[layer]
        assert 0.8 * in_sample < gap < in_sample
        assert found.loc[(layer, "with"), "std"] == pytest.approx(vector.std_with[layer], rel=0.5)
        assert found.loc[(layer, "with"), "random_gap"] == pytest.approx(
            float(vector[layer].norm()) / 24**0.5, rel=1e-5
        )
        for side in ("without", "with"):
            row = found.loc[(layer, side)]
            assert row["low"] < row["mean"] < row["high"]


def test_each_instruction_and_layer_has_every_measure_and_does_not_depend_on_the_others() -> None:
    acts = planted()
    table = diagnose(acts).table
    assert len(table) == 3 * 2 * len(TITLES)
    part = diagnose(acts.by_instruction()["b:two"], layers=5).table.reset_index(drop=True)
    same = table[(table["instruction"] == "b:two") & (table["layer"] == 5)].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, same)


def test_another_order_of_the_pairs_changes_nothing() -> None:
    acts = planted()
    other = diagnose(reordered(acts, np.random.default_rng(0).permutation(len(acts))))
    keys = ["instruction", "layer", "measure"]
    one, two = (found.table.sort_values(keys).reset_index(drop=True) for found in (diagnose(acts), other))
    pd.testing.assert_frame_equal(one, two)


def test_sides_that_do_not_differ_have_no_direction_and_so_no_numbers_but_a_norm_of_zero() -> None:
    found = one(alone(size=0, noise=0))
    assert found.loc[["norm", "relative_norm"], "value"].tolist() == [0.0, 0.0]
    missing = found.loc[["agreement", "d_prime", "effective_rank", "stability"], ["value", "low", "high", "control"]]
    assert missing.isna().all(axis=None)


def test_projections_that_do_not_vary_have_no_d_prime() -> None:
    acts = alone(noise=0)
    acts.resid[:, 0] = 1.0
    acts.resid[:, 1] = 3.0
    assert np.isnan(one(acts).loc["d_prime", "value"])
    assert one(acts).loc["agreement", "value"] == pytest.approx(1)


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(DataError, match="judged by other queries than it is fitted on, and 'a:a' has one; record more"):
        diagnose(activations(np.ones((2, 1, 3)), ["a:a"] * 2, ["q", "q"]))
    with pytest.raises(SteerlensError, match=r"layers must be among the recorded \[0\], got \[1\]"):
        diagnose(alone(), layers=1)
    with pytest.raises(SteerlensError, match="a diagnosis has no measure 'agreemnt'; did you mean 'agreement'"):
        unchecked(diagnose(alone()).plot.__func__)(diagnose(alone()), "agreemnt")


@pytest.mark.parametrize("measure", TITLES)
def test_every_measure_has_a_picture_with_its_title_unit_and_panels(measure: str) -> None:
    found = diagnose(planted())
    fig = unchecked(found.plot.__func__)(found, measure)
    assert (fig.layout.title.text, fig.layout.yaxis.title.text) == TITLES[measure]  # type: ignore[index]
    assert [note.text for note in fig.layout.annotations] == ["<b>one</b>", "<b>two</b>", "<b>three</b>"]


def test_profiles_have_a_picture() -> None:
    fig = diagnose(planted()).plot_profiles()
    assert {trace.name for trace in fig.data} >= {"with it", "without the instruction", "gap along a random direction"}
