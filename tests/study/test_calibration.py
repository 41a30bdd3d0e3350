"""Calibration: every layer's coefficient moves the model equally far."""

import numpy as np
import pytest
import torch

from steerlens.errors import SteerlensError
from steerlens.steering.sampling import generate
from steerlens.study.calibration import calibrate
from steerlens.study.quality import kl_from_unsteered
from steerlens.vectors.vector import SteeringVector

PROMPTS = ["Tell me about rain.", "Why?"]


@pytest.fixture
def vector():
    directions = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    norms = dict.fromkeys(range(4), 4.0)
    return SteeringVector(dict(enumerate(directions)), proj_with=dict.fromkeys(range(4), 6.0), resid_norm=norms)


@pytest.mark.parametrize("operator", ["add", "set_projection"])
def test_each_layer_is_moved_by_the_target(llama, vector, operator):
    found = calibrate(llama.model, vector, PROMPTS, target_kl=0.2, operator=operator, max_new_tokens=6)
    assert {one.layer for one in found} <= set(vector.layers)
    assert len(found) >= 3
    rows = generate(llama.model, PROMPTS, max_new_tokens=6)
    for one in found:
        steps = [(row.prompt_tokens, row.tokens, vector.at(one)) for row in rows]
        values = kl_from_unsteered(llama.model, steps)
        assert sum(values) / len(values) == pytest.approx(0.2, rel=0.05)
    assert len({round(one.coeff, 3) for one in found}) > 1


def test_a_layer_that_cannot_reach_the_target_is_left_out(llama, vector):
    found = calibrate(llama.model, vector, PROMPTS, target_kl=1e6, max_new_tokens=3)
    assert found == []


def test_a_layer_that_the_smallest_step_moves_too_far_is_left_out(llama, vector, monkeypatch):
    monkeypatch.setattr("steerlens.study.calibration.RANGE", (2.0, 32.0))
    assert calibrate(llama.model, vector, PROMPTS, target_kl=1e-4, max_new_tokens=3) == []


@pytest.mark.parametrize("bad", [{"prompts": []}, {"target_kl": 0.0}])
def test_impossible_calibrations_are_refused(llama, vector, bad):
    with pytest.raises(SteerlensError, match="calibration needs prompts and a target above 0 nats"):
        calibrate(llama.model, vector, **{"prompts": PROMPTS, **bad})


def test_numbers_of_other_libraries_calibrate_the_same(llama, vector):
    found = calibrate(llama.model, vector, PROMPTS, target_kl=np.float32(0.25), layers=np.array([1]), max_new_tokens=3)
    assert found == calibrate(llama.model, vector, PROMPTS, target_kl=0.25, layers=[1], max_new_tokens=3)
    assert [type(one.layer) for one in found] == [int]
