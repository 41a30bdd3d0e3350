"""Planted clusters are told apart, noise and shuffled labels are not, and no query helps."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import NearestCentroid

from steerlens.errors import DataError, SteerlensError
from steerlens.reading.examples import examples_of
from steerlens.reading.probes import PENALTY, _folds, separability, silhouettes
from steerlens.vectors.activations import Activations
from tests.reading.points import activations, planted, reordered


def values(acts: Activations, **options: int) -> pd.DataFrame:
    """One row per measure, of one layer."""
    return separability(acts, **options).table.set_index("measure")


def test_planted_clusters_are_told_apart_and_shuffled_labels_are_not() -> None:
    found = values(planted(layers=(0,)), folds=4)
    assert found["value"][["probe", "nearest_centroid"]].tolist() == [1.0, 1.0]
    assert found["control"][["probe", "nearest_centroid"]].tolist() == pytest.approx([1 / 3] * 2, abs=0.06)
    assert found.loc["silhouette", "value"] > 0.3
    assert (found["control_high"] < found["low"]).all()
    assert found.loc["silhouette", "control"] < 0.02


def test_noise_is_within_the_control() -> None:
    found = values(planted(layers=(0,), size=0, n_queries=20))
    assert ((found["control_low"] <= found["value"]) & (found["value"] <= found["control_high"])).all()


def test_what_queries_share_does_not_count_as_telling_instructions_apart() -> None:
    """Differences depend on the query alone, up to noise."""
    of_query = 10 * np.random.default_rng(0).normal(size=(10, 1, 30))
    noise = 0.1 * np.random.default_rng(1).normal(size=(30, 1, 30))
    names = [name for name in ("a:a", "b:b", "c:c") for _ in range(10)]
    acts = activations(np.tile(of_query, (3, 1, 1)) + noise, names, [f"q{i}" for i in range(10)] * 3)
    found = values(acts)
    assert found.loc["probe", "value"] < 0.55
    assert found.loc["nearest_centroid", "value"] < 0.55
    assert found.loc["silhouette", "value"] < 0


def test_several_pairs_of_a_query_under_one_label_do_not_look_like_an_instruction() -> None:
    """Each query has one of two labels, which mean nothing, and three pairs that lie close together."""
    beyond = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        differences = 3 * rng.normal(size=(16, 1, 10)).repeat(3, axis=0) + rng.normal(size=(48, 1, 10))
        names, queries = ["a:a"] * 24 + ["b:b"] * 24, [f"q{i // 3}" for i in range(48)]
        found = values(activations(differences, names, queries), folds=4)
        beyond.append(found["value"] > found["control_high"])
    assert np.mean(beyond) <= 0.1


def test_no_query_is_on_both_sides_and_every_instruction_is_in_all_folds() -> None:
    names = ["a:a"] * 6 + ["b:b"] * 6 + ["c:c"] * 6
    queries = [f"q{i}" for i in range(6)] * 2 + [f"other{i}" for i in range(6)]
    examples = examples_of(activations(np.ones((18, 1, 2)), names, queries))
    fold = _folds(examples, 3, seed=0)
    for number in range(12):
        assert len(set(fold[examples.query == number])) == 1
    for label in range(3):
        assert np.bincount(fold[examples.label == label]).tolist() == [2, 2, 2]


def test_accuracies_are_those_of_scikit_learns_classifiers_on_the_same_folds() -> None:
    acts = planted(layers=(0,), size=1.2, n_queries=15, d_model=12)
    examples = examples_of(acts)
    fold, x, y = _folds(examples, 5, seed=0), examples.differences(0), examples.label
    hits: dict[str, list[bool]] = {"probe": [], "nearest_centroid": []}
    for part in range(5):
        train, test = fold != part, fold == part
        alpha = PENALTY * x[train].var(axis=0).mean() * train.sum()
        for name, judge in (("probe", RidgeClassifier(alpha=alpha)), ("nearest_centroid", NearestCentroid())):
            hits[name] += (judge.fit(x[train], y[train]).predict(x[test]) == y[test]).tolist()
    found = values(acts)
    for name, verdicts in hits.items():
        assert found.loc[name, "value"] == pytest.approx(np.mean(verdicts))
        assert 0.4 < np.mean(verdicts) < 1
    assert found.loc["silhouette", "value"] == pytest.approx(silhouette_samples(x, y).mean(), abs=1e-6)


def test_silhouettes_equal_scikit_learns_under_every_labelling() -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(14, 3)), np.stack([rng.permutation(np.arange(14) % 3) for _ in range(4)])
    for found, labelling in zip(silhouettes(x, labels), labels, strict=True):
        assert found == pytest.approx(silhouette_samples(x, labelling), abs=1e-6)


def test_another_order_of_the_pairs_changes_nothing() -> None:
    acts = planted(size=1.5)
    other = reordered(acts, np.random.default_rng(0).permutation(len(acts)))
    pd.testing.assert_frame_equal(separability(acts, folds=4).table, separability(other, folds=4).table)


def test_an_instruction_under_two_names_is_told_apart_by_chance() -> None:
    differences = np.tile(planted(instructions=("a:one",), n_queries=12).differences.numpy(), (2, 1, 1))
    found = values(activations(differences, ["a:a"] * 12 + ["b:b"] * 12, [f"q{i}" for i in range(12)] * 2), layers=0)
    assert found.loc["nearest_centroid", "value"] == pytest.approx(0.5)
    assert found.loc["silhouette", "value"] < 0


def test_differences_that_are_all_the_same_tell_nothing_apart() -> None:
    acts = activations(np.zeros((12, 1, 4)), ["a:a"] * 6 + ["b:b"] * 6, [f"q{i}" for i in range(6)] * 2)
    acts.resid[:, 0] = 0.7
    acts.resid[:, 1] = 2.0
    assert values(acts, folds=3)["value"].tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("acts", "options", "message"),
    [
        (
            planted(instructions=("a:one",)),
            {},
            "separability compares instructions and needs at least two, got a:one alone",
        ),
        (planted(n_queries=4), {}, r"folds must be in \[2, 4\], the number of queries of 'a:one', got 5; take fewer"),
        (planted(), {"folds": 1}, r"folds must be in \[2, 8\], the number of queries of 'a:one', got 1"),
        (planted(), {"layers": 3}, r"layers must be among the recorded \[2, 5\], got \[3\]"),
    ],
)
def test_what_cannot_be_judged_is_refused(acts: Activations, options: dict[str, int], message: str) -> None:
    with pytest.raises(SteerlensError, match=message):
        separability(acts, **options)


def test_of_few_queries_there_is_no_interval() -> None:
    few, enough = (values(planted(layers=(0,), n_queries=n), folds=2) for n in (4, 5))
    assert few[["low", "high"]].isna().all(axis=None)
    assert (enough["low"] <= enough["value"]).all()


def test_an_instruction_with_fewer_queries_than_folds_is_named() -> None:
    acts = planted()
    with pytest.raises(DataError, match="the number of queries of 'c:three', got 3"):
        separability(acts[:18], folds=3)


def test_the_picture_has_a_panel_for_each_measure() -> None:
    fig = separability(planted(), folds=2).plot()
    assert [note.text for note in fig.layout.annotations] == [
        "<b>linear probe<br>(accuracy)</b>",
        "<b>nearest centroid<br>(accuracy)</b>",
        "<b>mean silhouette</b>",
    ]
