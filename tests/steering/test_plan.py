"""Plans are values: they compose, hash by content, and refuse what could not be applied."""

import math
from dataclasses import replace

import pytest
import torch

from steerlens.errors import SteerlensError
from steerlens.steering.plan import Intervention, Plan, tensor_digest
from steerlens.steering.positions import Window, as_window
from tests.steps import unit

STEP = Intervention(1, unit(0), "set_projection", coeff=0.5, target=3.0, positions="last", resid_norm=10.0)


def test_a_plan_holds_its_steps_in_order_and_plans_add_up() -> None:
    other = Intervention(0, unit(1))
    assert list(Plan((STEP,)) + Plan((other, STEP))) == [STEP, other, STEP]
    assert Plan((STEP, other)).layers == (0, 1)
    assert len(Plan()) == 0


CHANGES = {
    "layer": 2,
    "direction": unit(5),
    "operator": "ablate",
    "coeff": 0.75,
    "target": 3.5,
    "positions": "all",
    "write": unit(6),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_digest_changes_with_every_field_that_steers(name: str) -> None:
    assert Plan((replace(STEP, **{name: CHANGES[name]}),)).digest != Plan((STEP,)).digest


def test_the_digest_is_the_contents_own() -> None:
    again = Intervention(
        1, unit(0).clone(), "set_projection", coeff=0.5, target=3.0, positions=Window(-1, 0, "generation")
    )
    assert Plan((again,)).digest == Plan((STEP,)).digest
    assert len(Plan((STEP,)).digest) == 16
    other = replace(STEP, layer=2)
    assert Plan((STEP, other)).digest != Plan((other, STEP)).digest


def test_a_plan_without_effect_has_the_digest_of_no_steering() -> None:
    idle = Plan((replace(STEP, coeff=0.0),))
    assert idle.digest == Plan().digest == ""
    assert len(idle.active) == 0
    assert (idle + Plan((STEP,))).digest == Plan((STEP,)).digest


def test_positions_become_windows_and_can_be_moved() -> None:
    assert STEP.positions == as_window("last")
    moved = Plan((STEP,)).at_positions("generated")
    assert [step.positions for step in moved] == [as_window("generated")]
    assert STEP.positions == as_window("last")


def test_a_direction_is_kept_in_float32_on_its_own() -> None:
    direction = unit(3).to(torch.bfloat16)
    direction = direction / direction.norm()
    assert Intervention(0, direction).direction.dtype == torch.float32


def test_the_placebo_is_seeded_and_its_directions_have_the_plans_own_angles() -> None:
    plan = Plan((STEP, replace(STEP, layer=2, direction=unit(8)), replace(STEP, layer=3)))
    placebo = plan.placebo(seed=4)
    own, writes = (
        torch.stack(vectors) for vectors in zip(*((step.direction, step.write) for step in placebo), strict=True)
    )
    torch.testing.assert_close(writes @ writes.T, own @ own.T, rtol=1e-4, atol=1e-5)
    assert (writes * own).sum(-1).abs().max() < 0.8
    assert [replace(step, write=None).record() for step in placebo] == [step.record() for step in plan]
    assert placebo.digest == plan.placebo(seed=4).digest != plan.placebo(seed=5).digest
    assert Plan().placebo(seed=0) == Plan()


def test_a_step_owns_its_direction() -> None:
    direction = unit(3)
    step = Intervention(0, direction)
    direction.zero_()
    assert torch.equal(step.direction, unit(3))


def test_an_add_step_can_be_read_in_units_of_the_residual_norm() -> None:
    assert replace(STEP, operator="add", coeff=5.0).coeff_in_norms == 0.5
    assert math.isnan(Intervention(0, unit(0)).coeff_in_norms)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": -1}, "layer counts blocks from zero, got -1"),
        ({"coeff": math.inf}, "coeff must be a finite number, got inf"),
        ({"target": math.nan}, 'target must be a finite number, got nan; a combined vector .*use operator="add"'),
        ({"direction": 2 * unit(0)}, "direction must be one unit vector, .*norm 2"),
        ({"write": torch.zeros(32)}, "write must be one unit vector, .*norm 0"),
        ({"positions": "sometimes"}, "positions must be a rule's name"),
    ],
    ids=str,
)
def test_a_step_that_could_not_be_applied_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(SteerlensError, match=message):
        replace(STEP, **changes)


def test_a_plan_prints_what_it_does() -> None:
    assert repr(Plan((STEP,))) == "Plan(set_projection layer 1 coeff 0.5 at last)"
    assert repr(Plan()) == "Plan(no steering)"


def test_a_tensors_digest_is_of_its_numbers_not_of_its_layout() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert tensor_digest(matrix.T) == tensor_digest(matrix.T.contiguous()) != tensor_digest(matrix)
