"""Numbers of NumPy, pandas and PyTorch become Python's own; what is no number is refused."""

import numpy as np
import pandas as pd
import pytest
import torch

from steerlens._typing import real, real_numbers, several, whole, whole_numbers
from steerlens.errors import SteerlensError


@pytest.mark.parametrize("value", [3, 3.0, np.int64(3), np.uint8(3), np.float32(3), np.array(3), torch.tensor(3)])
def test_a_whole_number_is_an_int_wherever_it_came_from(value):
    assert whole(value, "layer") == 3
    assert type(whole(value, "layer")) is int


@pytest.mark.parametrize(
    "value",
    [True, np.True_, torch.tensor(False), 1.5, np.float64("nan"), float("inf"), "3", None, pd.NA, [3], np.arange(2)],
    ids=repr,
)
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(SteerlensError, match="layer must be a whole number, got"):
        whole(value, "layer")


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5, dtype=torch.bfloat16)])
def test_a_real_number_is_a_float_wherever_it_came_from(value):
    assert real(value, "coeff") == 0.5
    assert type(real(value, "coeff")) is float
    assert str(real(-0.0, "coeff")) == "0.0"


@pytest.mark.parametrize("value", [True, "0.5", None, float("nan"), -float("inf"), 1j, torch.ones(2)], ids=repr)
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(SteerlensError, match="coeff must be a finite number, got"):
        real(value, "coeff")


@pytest.mark.parametrize(
    "values",
    [[1, 2], (1, 2), range(1, 3), np.arange(1, 3), torch.arange(1, 3), pd.Series([1.0, 2.0]), pd.Index([1, 2])],
)
def test_several_numbers_are_a_list_of_pythons_own(values):
    assert whole_numbers(values, "layer") == real_numbers(values, "coeff") == [1, 2]
    assert {type(one) for one in whole_numbers(values, "layer")} == {int}


def test_one_value_counts_as_several_and_a_text_is_one():
    assert several(np.int64(4)) == [4]
    assert several("all") == ["all"]
    assert several({2: "a", 1: "b"}) == [2, 1]
