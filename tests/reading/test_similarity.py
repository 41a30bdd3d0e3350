"""Cosines of planted directions, their order, their intervals, and those of random directions."""

import numpy as np
import pandas as pd
import pytest
import torch

from steerlens.errors import DataError, SteerlensError
from steerlens.reading.similarity import cosines, layer_cosines, random_cosine
from steerlens.vectors.estimators import fit_steering_vector
from steerlens.vectors.vector import SteeringVector
from tests.reading.points import activations, planted, reordered


def vectors(directions: np.ndarray) -> dict[str, SteeringVector]:
    """A vector of one layer, 3, for each row."""
    return {f"v{i}": SteeringVector({3: torch.tensor(row).float()}) for i, row in enumerate(directions)}


def test_cosines_are_those_of_the_vectors() -> None:
    named = vectors(np.random.default_rng(0).normal(size=(4, 6)))
    found = cosines(named, layer=3)
    for row in found.table.to_dict("records"):
        expected = named[row["first"]].cosine(named[row["second"]])[3]
        assert row["cosine"] == pytest.approx(expected, abs=1e-6)
        assert found.matrix.loc[row["first"], row["second"]] == row["cosine"]
        assert np.isnan([row["low"], row["high"]]).all()
    assert len(found) == 6
    assert np.diagonal(found.matrix) == pytest.approx(np.ones(4))


def test_two_planted_families_stand_together_whatever_the_order_of_the_vectors() -> None:
    rng = np.random.default_rng(1)
    centres = np.eye(20)[[0, 1, 0, 1, 0, 1]]
    named = vectors(centres + 0.1 * rng.normal(size=(6, 20)))
    order = list(cosines(named, layer=3).matrix.index)
    assert {frozenset(order[:3]), frozenset(order[3:])} == {
        frozenset({"v0", "v2", "v4"}),
        frozenset({"v1", "v3", "v5"}),
    }


def test_activations_give_the_cosines_of_the_fitted_vectors_within_their_intervals() -> None:
    acts = planted(size=2)
    fitted = {name: fit_steering_vector(part) for name, part in acts.by_instruction().items()}
    found, by_vector = cosines(acts, layer=5), cosines(fitted, layer=5)
    assert found.matrix.to_numpy() == pytest.approx(
        by_vector.matrix.loc[found.matrix.index, found.matrix.columns], abs=1e-5
    )
    assert ((found.table["low"] < found.table["cosine"]) & (found.table["cosine"] < found.table["high"])).all()


def test_an_instruction_under_two_names_has_cosine_one() -> None:
    differences = np.tile(np.random.default_rng(0).normal(size=(6, 1, 8)), (2, 1, 1))
    acts = activations(differences, ["a:a"] * 6 + ["b:b"] * 6, [f"q{i}" for i in range(6)] * 2)
    (row,) = cosines(acts, layer=0).table.to_dict("records")
    assert [row["cosine"], row["low"], row["high"]] == pytest.approx([1, 1, 1])


def test_of_one_query_there_is_no_interval() -> None:
    acts = activations(np.eye(2)[:, None], ["a:a", "b:b"], ["q", "q"])
    (row,) = cosines(acts, layer=0).table.to_dict("records")
    assert row["cosine"] == pytest.approx(0, abs=1e-6)
    assert np.isnan([row["low"], row["high"]]).all()


def test_of_few_queries_there_is_no_interval() -> None:
    few, enough = (cosines(planted(size=2, n_queries=n), layer=2).table for n in (4, 5))
    assert few[["low", "high"]].isna().all(axis=None)
    assert (enough["low"] < enough["high"]).all()


def test_another_order_of_the_pairs_changes_nothing() -> None:
    acts = planted(size=2)
    other = reordered(acts, np.random.default_rng(0).permutation(len(acts)))
    keys = ["first", "second"]
    one, two = (
        {frozenset(row[key] for key in keys): row for row in cosines(each, layer=2).table.to_dict("records")}
        for each in (acts, other)
    )
    for pair, row in one.items():
        assert two[pair]["low"] == pytest.approx(row["low"])
        assert two[pair]["cosine"] == pytest.approx(row["cosine"])


def test_layers_stand_in_their_order() -> None:
    vector = SteeringVector({4: torch.tensor([1.0, 0.0]), 1: torch.tensor([1.0, 1.0]), 2: torch.tensor([-1.0, 0.0])})
    found = layer_cosines(vector)
    assert found.matrix.loc[4, 2] == pytest.approx(-1)
    assert found.matrix.loc[4, 1] == pytest.approx(0.5**0.5)
    assert list(found.matrix.index) == list(vector.layers)


def test_layers_may_be_chosen_and_those_without_a_direction_are_left_out() -> None:
    directions = {layer: torch.tensor([1.0, float(layer)]) for layer in range(4)}
    vector = SteeringVector({**directions, 0: torch.zeros(2)})
    assert list(layer_cosines(vector).matrix.index) == [1, 2, 3]
    assert list(layer_cosines(vector, layers=[3, 1]).matrix.index) == [1, 3]
    acts = planted(layers=(1, 2, 5)).by_instruction()["b:two"]
    acts.resid[:, 1, 0] = acts.resid[:, 0, 0]
    assert list(layer_cosines(acts).matrix.index) == [2, 5]
    whole, part = layer_cosines(acts).table, layer_cosines(acts, layers=(5, 2)).table
    pd.testing.assert_frame_equal(whole, part)
    with pytest.raises(SteerlensError, match="the direction at layer 0 is zero"):
        layer_cosines(vector, layers=[0, 1])
    with pytest.raises(SteerlensError, match=r"layer must be one of the vector's \[0, 1, 2, 3\], got 4"):
        layer_cosines(vector, layers=[1, 4])
    with pytest.raises(SteerlensError, match=r"layers must be among the recorded \[1, 2, 5\], got \[3\]"):
        layer_cosines(acts, layers=[2, 3])
    with pytest.raises(SteerlensError, match="need at least two with a direction, got none; record others"):
        layer_cosines(0 * vector)


def test_layers_of_activations_are_those_of_their_vector() -> None:
    part = planted().by_instruction()["b:two"]
    found = layer_cosines(part)
    assert found.matrix.to_numpy() == pytest.approx(
        layer_cosines(fit_steering_vector(part)).matrix.to_numpy(), abs=1e-5
    )
    (row,) = found.table.to_dict("records")
    assert row["low"] < row["cosine"] < row["high"]


@pytest.mark.parametrize("d_model", [3, 40, 160])
def test_random_directions_lie_within_the_control(d_model: int) -> None:
    drawn = np.random.default_rng(0).normal(size=(2, 20000, d_model))
    first, second = drawn / np.linalg.norm(drawn, axis=2, keepdims=True)
    assert (np.abs((first * second).sum(axis=1)) < random_cosine(d_model)).mean() == pytest.approx(0.95, abs=0.006)
    assert random_cosine(1) == 1.0


def test_what_cannot_be_compared_is_refused() -> None:
    one, two = vectors(np.eye(2)).values()
    with pytest.raises(DataError, match="cosines compares instructions and needs at least two, got a:b alone"):
        cosines({"a:b": one}, layer=3)
    with pytest.raises(DataError, match="needs at least two, got a:one alone"):
        cosines(planted(instructions=("a:one",)), layer=2)
    with pytest.raises(SteerlensError, match=r"layer must be one of the vector's \[3\], got 4"):
        cosines({"a": one, "b": two}, layer=4)
    with pytest.raises(SteerlensError, match=r"layers must be among the recorded \[2, 5\], got \[4\]"):
        cosines(planted(), layer=4)
    with pytest.raises(SteerlensError, match="vectors must have one width, got 2 and 3"):
        cosines({"a": one, "b": SteeringVector({3: torch.ones(3)})}, layer=3)
    with pytest.raises(
        SteerlensError, match="cosines between layers need at least two with a direction, got layer 3 alone"
    ):
        layer_cosines(one)
    with pytest.raises(DataError, match="cosines between layers are of one instruction, got 3"):
        layer_cosines(planted())
    with pytest.raises(SteerlensError, match="a cosine needs directions, and that of a:one is zero"):
        cosines(planted(size=0, noise=0, instructions=("a:one", "b:two")), layer=2)
    with pytest.raises(SteerlensError, match="the direction at layer 3 is zero"):
        cosines({"a": one, "b": SteeringVector({3: torch.zeros(2)})}, layer=3)


def test_the_picture_names_the_control_and_keeps_the_order() -> None:
    found = cosines(vectors(np.eye(3)[[0, 1, 0]]), layer=3)
    fig = found.plot()
    assert [name.strip() for name in fig.layout.xaxis.ticktext] == list(found.matrix.index)
    assert f"random directions: within \u00b1{random_cosine(3):.2f}" in fig.layout.title.subtitle.text
    assert layer_cosines(planted().by_instruction()["b:two"]).plot().layout.xaxis.title.text == "layer"
