"""Candidates: grids, draws, and what they mean to a vector."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch

from steerlens.errors import SteerlensError
from steerlens.steering.candidates import UNSTEERED, Candidate, draws, grid
from steerlens.steering.positions import Window, as_window
from steerlens.vectors.vector import SteeringVector
from tests.unchecked import unchecked


def test_a_grid_is_every_combination_once_lower_layers_and_smaller_steps_first():
    found = grid(layers=[3, 1, 3], coeffs=[2.0, 1.0], operators=["add", "ablate"], unit="resid_norm")
    assert len(found) == len(set(found)) == 8
    assert [one.layer for one in found] == [1] * 4 + [3] * 4
    assert [one.coeff for one in found[:4]] == [1, 2, 1, 2]
    assert {one.operator: one.unit for one in found} == {"add": "resid_norm", "ablate": "absolute"}


def test_draws_are_nested_seeded_and_within_their_ranges():
    options = {
        "layers": [1, 3],
        "coeff_range": (0.5, 8.0),
        "operators": ["add", "ablate"],
        "positions": ["all", "last"],
    }
    few, many, other = draws(5, **options), draws(50, **options), draws(50, **options, seed=1)
    assert few == many[:5]
    assert many != other
    assert {one.layer for one in many} == {1, 3}
    assert {one.positions for one in many} == {"all", "last"}
    assert all(0.5 <= one.coeff <= 8 for one in many)
    below = sum(one.coeff < 2 for one in draws(400, **options))  # 2 is the middle of 0.5 and 8 on a log scale
    assert 160 < below < 240


@pytest.mark.parametrize("bad", [{"layers": []}, {"layers": [1], "coeffs": []}, {"layers": [1], "operators": []}])
def test_an_empty_grid_is_refused(bad):
    with pytest.raises(SteerlensError, match="a search needs a layer and a coefficient to try"):
        grid(**bad)


@pytest.mark.parametrize(
    "bad", [{"n": 0}, {"layers": []}, {"operators": []}, {"coeff_range": (2.0, 1.0)}, {"coeff_range": (-1.0, 1.0)}]
)
def test_impossible_draws_are_refused(bad):
    with pytest.raises(SteerlensError, match="draws need n of at least 1"):
        draws(**{"n": 3, "layers": [1], **bad})


def test_a_candidate_written_two_ways_is_one():
    assert Candidate(1, positions=Window(-1, 0, "generation")) == Candidate(1, positions="last")


def test_a_vector_takes_a_candidate_as_its_choice():
    vector = SteeringVector({2: torch.tensor([0.0, 3.0])}, proj_with={2: 4.0}, resid_norm={2: 10.0})
    (step,) = vector.at(Candidate(2, 0.5, "add", Window(-2, 3, "generation"), "resid_norm"))
    assert (step.layer, step.coeff, step.operator, str(step.positions)) == (2, 5.0, "add", "generation[-2:3]")
    assert len(vector.at(UNSTEERED)) == 0


@pytest.mark.parametrize(
    "window", [Window(-2, 3, "generation"), Window(1, None), Window(None, 5), Window(-1, 0, "generation")]
)
def test_a_window_is_read_back_as_it_is_printed(window):
    assert as_window(str(window)) == window


LAYERS = [np.array([3, 1]), pd.Series([1.0, 3.0]), torch.tensor([1, 3]), range(1, 4, 2)]
COEFFS = [np.array([2.0, 0.5], dtype=np.float32), pd.Series([0.5, 2.0]), torch.tensor([0.5, 2.0]), (0.5, 2)]


@pytest.mark.parametrize(
    ("layers", "coeffs"), list(zip(LAYERS, COEFFS, strict=True)), ids=["numpy", "pandas", "torch", "python"]
)
def test_arrays_make_the_same_candidates(layers, coeffs):
    expected = [Candidate(layer, coeff, "add") for layer in (1, 3) for coeff in (0.5, 2.0)]
    found = grid(layers=layers, coeffs=coeffs, operators="add")
    assert found == expected
    assert json.dumps([asdict(one) for one in found]) == json.dumps([asdict(one) for one in expected])
    options = {"layers": [1, 3], "coeff_range": (0.5, 2.0), "seed": 4}
    assert draws(np.int64(5), layers=layers, coeff_range=sorted(coeffs), seed=np.int64(4)) == draws(5, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer": True}, "layer must be a whole number, got True"),
        ({"layer": 1, "coeff": float("nan")}, "coeff must be a finite number, got nan"),
        ({"layer": 1, "operator": "subtract"}, "operator must be one of steerlens', got 'subtract'"),
        ({"layer": 1, "unit": "norms"}, "unit must be one of steerlens', got 'norms'"),
    ],
)
def test_a_candidate_that_could_not_be_tried_is_refused(fields, message):
    with pytest.raises(SteerlensError, match=message):
        unchecked(Candidate)(**fields)


@pytest.mark.parametrize("ends", [(3.0, 3.0), (7.0, 7.0), (0.1, 0.3)])
def test_draws_stay_in_their_range(ends: tuple[float, float]) -> None:
    assert all(ends[0] <= candidate.coeff <= ends[1] for candidate in draws(50, layers=[1], coeff_range=ends))
