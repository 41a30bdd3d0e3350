"""Plans are values: they compose, hash by content, and refuse what could not be applied."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from steerlens.errors import SteerlensError
from steerlens.steering.interventions import Intervention, tensor_digest
from steerlens.steering.operators import rank_one
from steerlens.steering.plan import Plan, as_plan, random_directions
from steerlens.steering.positions import Window, as_window
from tests.steps import OPERATORS, unit
from tests.unchecked import unchecked

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
    own, writes = torch.stack([step.direction for step in plan]), torch.stack([step.write for step in placebo])
    torch.testing.assert_close(writes @ writes.T, own @ own.T, rtol=1e-4, atol=1e-5)
    assert (writes * own).sum(-1).abs().max() < 0.8
    back = [replace(step, write=None, direction=own) for step, own in zip(placebo, own, strict=True)]
    assert back == list(plan)
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
        ({"target": math.nan}, "target must be a finite number, got nan"),
        ({"layer": 1.5}, "layer must be a whole number, got 1.5"),
        ({"layer": True}, "layer must be a whole number, got True"),
        ({"coeff": "2"}, "coeff must be a finite number, got '2'"),
        ({"unit": "metres"}, "unit must be one of steerlens', got 'metres'"),
        ({"direction": 2 * unit(0)}, "direction must be one unit vector, .*norm 2"),
        ({"write": torch.zeros(32)}, "write must be one unit vector, .*norm 0"),
        ({"positions": "sometimes"}, "positions must be a rule's name"),
    ],
    ids=str,
)
def test_a_step_that_could_not_be_applied_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(SteerlensError, match=message):
        unchecked(Intervention)(**{"layer": 1, "direction": unit(0), **changes})


def test_a_plan_prints_what_it_does() -> None:
    assert repr(Plan((STEP,))) == "Plan(set_projection 0.5 at layer 1, positions last)"
    step = replace(STEP, operator="add", coeff=5.0, unit="resid_norm", name="a:b")
    assert str(Plan((step,))) == "add 0.5 norms (5) along a:b at layer 1, positions last"
    assert str(Plan((STEP,)).placebo(seed=0)).endswith("positions last, written along another direction")
    assert repr(Plan()) == "Plan(no steering)"


def test_a_tensors_digest_is_of_its_numbers_not_of_its_layout() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert tensor_digest(matrix.T) == tensor_digest(matrix.T.contiguous()) != tensor_digest(matrix)


# --- values --------------------------------------------------------------------------------------------------------


def test_plans_and_steps_that_do_the_same_are_equal_and_have_one_hash() -> None:
    again = replace(
        STEP, direction=unit(0).clone(), resid_norm=99.0, name="x", unit="resid_norm", origin={"model": "m"}
    )
    assert again == STEP
    assert Plan((again,)) == Plan((STEP,))
    assert len({STEP, again, replace(STEP, layer=2)}) == 2
    assert len({Plan((STEP,)), Plan((again,)), Plan()}) == 2
    assert STEP != "a step"


@pytest.mark.parametrize("name", CHANGES)
def test_steps_that_differ_in_what_they_do_are_not_equal(name: str) -> None:
    assert replace(STEP, **{name: CHANGES[name]}) != STEP


@pytest.mark.parametrize("operator", ["add", "ablate"])
def test_what_an_operator_does_not_read_changes_neither_digest_nor_equality(operator: str) -> None:
    one, other = (replace(STEP, operator=operator, target=target) for target in (0.0, 3.0))
    assert one == other
    assert Plan((one,)).digest == Plan((other,)).digest


def test_one_change_written_two_ways_is_one_step() -> None:
    assert replace(STEP, write=STEP.direction.clone()) == STEP
    assert replace(STEP, operator="add", coeff=-0.0) == replace(STEP, operator="add", coeff=0.0)
    for window in (Window(0), Window(None, None, "generation")):
        assert replace(STEP, positions=window) == replace(STEP, positions="all")


NUMBERS = [
    (np.int64(1), np.float32(0.5), np.float64(3.0)),
    (torch.tensor(1), torch.tensor(0.5), torch.tensor(3.0, dtype=torch.float64)),
    (pd.Series([1])[0], pd.Series([0.5])[0], np.array(3)),
    (1.0, 0.5, 3),
]


@pytest.mark.parametrize(("layer", "coeff", "target"), NUMBERS, ids=["numpy", "torch", "pandas", "python"])
def test_numbers_of_other_libraries_make_the_same_step(layer: object, coeff: object, target: object) -> None:
    step = Intervention(layer, unit(0), "set_projection", coeff=coeff, target=target, positions="last")
    assert step == STEP
    assert json.dumps(step.record()) == json.dumps(STEP.record())
    assert (type(step.layer), type(step.coeff), type(step.target)) == (int, float, float)


def test_both_sizes_of_a_step_are_told_apart_and_the_given_one_is_kept() -> None:
    step = replace(STEP, operator="add", coeff=0.3 * 42.9, resid_norm=42.9, unit="resid_norm")
    assert (step.given, step.coeff_in_norms, step.coeff_absolute) == (0.3, 0.3, 0.3 * 42.9)
    assert replace(step, unit="absolute").given == step.coeff
    assert STEP.given == 0.5
    assert math.isnan(STEP.coeff_absolute)
    assert math.isnan(STEP.coeff_in_norms)


@pytest.mark.parametrize("steering", [unit(0), STEP, "vector", None], ids=["tensor", "step", "text", "nothing"])
def test_what_is_no_plan_is_refused_where_one_is_asked_for(steering: object) -> None:
    with pytest.raises(SteerlensError, match=r"(?s)steering must be a plan, got .*vector.at\(layer\)"):
        as_plan(steering)


# --- the placebo ---------------------------------------------------------------------------------------------------


def rounded_otherwise(direction: torch.Tensor, seed: int) -> torch.Tensor:
    """The direction as another processor might have rounded it."""
    noise = 1e-7 * torch.randn(direction.shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(direction + noise, dim=0)


def first_is_nearly_zero() -> torch.Tensor:
    direction = unit(1)
    direction[0] = 0.0
    return torch.nn.functional.normalize(direction, dim=0)


@pytest.mark.parametrize(
    "directions",
    [[unit(0)], [first_is_nearly_zero()], [unit(0), unit(0), unit(5)], [unit(0), unit(1), -unit(0), unit(1), unit(9)]],
    ids=["one", "first coordinate zero", "repeated", "several"],
)
def test_a_placebo_is_the_same_direction_to_rounding_when_the_vector_is_rounded_otherwise(directions: list) -> None:
    plans = [
        Plan(tuple(Intervention(1, rounded_otherwise(one, seed), coeff=2.0) for one in directions)).placebo(seed=3)
        for seed in range(6)
    ]
    writes = [torch.stack([step.write for step in plan]) for plan in plans]
    for other in writes[1:]:
        torch.testing.assert_close(other, writes[0], rtol=0, atol=2e-5)


def through(resid: torch.Tensor, plan: Plan) -> torch.Tensor:
    """How far a plan has moved each residual after each of its steps, in a model whose blocks do nothing."""
    changed, moved = resid, []
    for step in sorted(plan, key=lambda step: step.layer):
        write = step.direction if step.write is None else step.write
        changed = rank_one(changed, step.direction, write, *step.affine)
        moved.append((changed - resid).norm(dim=-1))
    return torch.stack(moved)


U, V = torch.eye(32)[0], 0.6 * torch.eye(32)[0] + 0.8 * torch.eye(32)[1]
SEVERAL = {
    "one": [(2, U)],
    "repeated": [(layer, U) for layer in range(8)],
    "related": [(0, U), (1, V), (2, U), (3, V)],
    "opposite": [(1, U), (2, -U), (3, U)],
    "at one layer": [(1, U), (1, V), (1, unit(3))],
    "not in order": [(3, U), (0, V), (2, unit(3))],
}


@pytest.mark.parametrize("operator", [*OPERATORS, "mixed"])
@pytest.mark.parametrize("steps", SEVERAL.values(), ids=SEVERAL)
def test_a_placebo_moves_every_token_as_far_as_the_plan_does_at_every_layer(steps: list, operator: str) -> None:
    operators = (
        [operator] * len(steps) if operator != "mixed" else [OPERATORS[place % 3] for place in range(len(steps))]
    )
    plan = Plan(
        tuple(
            Intervention(layer, direction, one, coeff=0.75, target=9.0)
            for (layer, direction), one in zip(steps, operators, strict=True)
        )
    )
    for seed in range(4):
        placebo = plan.placebo(seed=seed)
        span = torch.linalg.svd(torch.stack([step.write for step in placebo]), full_matrices=False)
        basis = span.Vh[span.S > 1e-3]
        tokens = 5.0 * torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
        tokens = tokens - tokens @ basis.T @ basis  # nothing of theirs lies along the random directions
        torch.testing.assert_close(through(tokens, placebo), through(tokens, plan), rtol=1e-4, atol=1e-4)


def test_a_placebo_of_repeated_steps_by_hand() -> None:
    """At 3 along u, to be set to 9: the first step writes 6 and all later ones nothing, along u and along r."""
    plan = Plan(tuple(Intervention(layer, U, "set_projection", target=9.0) for layer in range(8)))
    placebo = plan.placebo(seed=0)
    across = placebo.interventions[0].write
    token = 3.0 * U - 3.0 * (U @ across) * across
    token = token * 3.0 / (token @ U)
    torch.testing.assert_close(through(token[None], placebo), torch.full((8, 1), 6.0))
    each_reads_the_plans_own = Plan(tuple(replace(step, direction=U) for step in placebo))
    assert through(token[None], each_reads_the_plans_own)[-1] > 12.0


def test_a_placebo_leaves_what_an_added_or_a_first_step_reads_as_it_is() -> None:
    added = Plan(tuple(Intervention(layer, unit(layer), "add", coeff=2.0) for layer in range(3)))
    single = Plan((Intervention(1, U, "set_projection", target=5.0),))
    for plan in (added, single, single + added):
        for step, own in zip(plan.placebo(seed=4), plan, strict=True):
            assert torch.equal(step.direction, own.direction) or (step.operator, step.layer) == ("set_projection", 1)
    (step,) = single.placebo(seed=4)
    assert torch.equal(step.direction, U)


def test_a_placebo_of_more_steps_than_coordinates_keeps_their_angles() -> None:
    directions = torch.nn.functional.normalize(torch.randn(4, 7, generator=torch.Generator().manual_seed(0)), dim=0)
    writes = random_directions(directions, seed=1)
    torch.testing.assert_close(writes.T @ writes, directions.T @ directions, rtol=1e-4, atol=1e-5)


def test_placebos_of_many_seeds_point_everywhere() -> None:
    writes = torch.stack([random_directions(unit(0)[:, None], seed=seed)[:, 0] for seed in range(400)])
    assert writes.mean(0).norm() < 0.12
    assert (writes.T @ writes / 400 * 32 - torch.eye(32)).abs().max() < 0.35
