"""The operators' equations, against the plain ones and by what they must leave behind."""

from typing import Any

import pytest
import torch

from steerlens.steering.operators import ablate, add, affine, rank_one, set_projection
from tests.reference.plain_loop import Step, changed
from tests.steps import OPERATORS, unit

U = unit(0)


def residuals(*shape: int, seed: int = 1) -> torch.Tensor:
    return 10 * torch.randn(*shape, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("coeff", [-1.5, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_is_its_equation_at_every_position(operator: Any, coeff: float, shape: tuple[int, ...]) -> None:
    resid = residuals(*shape)
    got = {
        "add": lambda: add(resid, U, coeff=coeff),
        "set_projection": lambda: set_projection(resid, U, target=7.0, coeff=coeff),
        "ablate": lambda: ablate(resid, U, coeff=coeff),
    }[operator]()
    plain = Step(layer=0, operator=operator, direction=U, coeff=coeff, target=7.0)
    expected = torch.stack([changed(h, plain) for h in resid.reshape(-1, 32)]).reshape(resid.shape)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_set_projection_reaches_its_target_and_leaves_the_rest() -> None:
    resid = residuals(4)
    steered = set_projection(resid, U, target=-3.0)
    torch.testing.assert_close(steered @ U, torch.full((4,), -3.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(ablate(steered, U), ablate(resid, U), rtol=0, atol=1e-4)


def test_half_a_coefficient_goes_half_the_way_to_the_target() -> None:
    resid = residuals(4)
    half = set_projection(resid, U, target=5.0, coeff=0.5) @ U
    torch.testing.assert_close(half, (resid @ U + 5.0) / 2, rtol=1e-4, atol=1e-4)


def test_ablation_leaves_no_component_and_twice_of_it_reflects() -> None:
    resid = residuals(4)
    assert (ablate(resid, U) @ U).abs().max() < 1e-4
    torch.testing.assert_close(ablate(resid, U, coeff=2.0) @ U, -(resid @ U), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_coefficient_of_zero_returns_the_same_bits(operator: Any, dtype: torch.dtype) -> None:
    resid = residuals(3, 4).to(dtype)
    assert torch.equal(rank_one(resid, U, U, *affine(operator, coeff=0.0, target=5.0)), resid)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_change_is_computed_in_float32_and_added_in_the_residuals_dtype(dtype: torch.dtype) -> None:
    resid = residuals(3, 4).to(dtype)
    steered = set_projection(resid, U, target=2.0)
    assert steered.dtype == dtype
    change = (2.0 - resid.float() @ U)[..., None] * U
    assert torch.equal(steered, resid + change.to(dtype))


def test_the_callers_tensors_are_left_alone() -> None:
    resid, direction = residuals(3), U.clone()
    before = resid.clone()
    add(resid, direction, coeff=2.0)
    assert torch.equal(resid, before)
    assert torch.equal(direction, U)


def test_a_change_written_along_another_direction_has_the_same_norm() -> None:
    resid, other = residuals(6), unit(9)
    offset, slope = affine("set_projection", coeff=1.0, target=4.0)
    own = rank_one(resid, U, U, offset, slope) - resid
    placebo = rank_one(resid, U, other, offset, slope) - resid
    torch.testing.assert_close(own.norm(dim=-1), placebo.norm(dim=-1), rtol=1e-4, atol=1e-4)
    assert (torch.cosine_similarity(placebo, other.expand(6, -1)).abs() > 0.999).all()


def test_offset_and_slope_may_differ_by_row_and_position() -> None:
    resid = residuals(2, 3)
    offset = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, -1.0]])
    steered = rank_one(resid, U, U, offset, torch.zeros(2, 3))
    torch.testing.assert_close((steered - resid) @ U, offset, rtol=0, atol=1e-4)
