"""Geometry of the planted model, whose instruction writes nothing below layer 1 and then along known axes."""

import numpy as np
import pytest

from steerlens.models.load import load_model
from steerlens.reading.diagnosis import diagnose
from steerlens.reading.embedding import embed
from steerlens.reading.similarity import layer_cosines
from steerlens.vectors.activations import Activations, record_activations
from steerlens.vectors.estimators import fit_steering_vector
from tests.planted import planted_pairs, save_planted


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Activations:
    folder = save_planted(tmp_path_factory.mktemp("planted"))
    return record_activations(load_model(folder), planted_pairs(8))


def test_pairs_agree_on_one_direction_from_the_layer_that_writes_it(acts: Activations) -> None:
    table = diagnose(acts).table.set_index(["measure", "layer"])
    assert np.isnan(table.loc[("agreement", 0), "value"])
    assert table.loc[("norm", 0), "value"] == 0
    for layer in (1, 2, 3):
        assert table.loc[("agreement", layer), "value"] == pytest.approx(1, abs=1e-3)
        assert table.loc[("effective_rank", layer), "value"] == pytest.approx(1, abs=1e-2)
        assert table.loc[("norm", layer), "low"] > table.loc[("norm", layer), "control"]


def test_the_direction_turns_where_the_answer_is_added_and_nowhere_else(acts: Activations) -> None:
    matrix = layer_cosines(fit_steering_vector(acts)).matrix
    assert list(matrix.index) == [1, 2, 3]  # nothing differs at layer 0
    assert matrix.loc[2, 3] == pytest.approx(1, abs=1e-3)
    assert 0.1 < matrix.loc[1, 2] < 0.99


def test_a_layer_without_differences_is_one_point(acts: Activations) -> None:
    table = embed(acts, method="pca").table
    assert not table[table["layer"] == 0][["x", "y"]].to_numpy().any()
