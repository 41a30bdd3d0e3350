"""Steering single passes: what reaches the residual, whose rows, and that nothing is left behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from steerlens.errors import ModelError, SteerlensError
from steerlens.models.facts import resid_post
from steerlens.models.load import load_model
from steerlens.models.prompts import encode
from steerlens.models.rows import pad
from steerlens.steering.edits import steer
from steerlens.steering.interventions import Intervention
from steerlens.steering.plan import Plan
from steerlens.steering.residual import residual_edits
from tests.conftest import Subject, hooks_on
from tests.reference.plain_loop import Rule, Step, changed, is_steered, plain_logits
from tests.steps import OPERATORS, RULES, as_plan, step, unit

PROMPTS = ["Describe rain.", "a", "Why is the sky blue?"]


def padded(subject: Subject, prompts: list[str] = PROMPTS, side: Any = "left") -> tuple[torch.Tensor, torch.Tensor]:
    rows = pad([encode(subject.model, prompt) for prompt in prompts], side=side, pad_id=2)
    return rows.tokens, rows.mask


def residual(subject: Subject, tokens: torch.Tensor, layer: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The residual of one layer after all hooks that were set before."""
    found: list[torch.Tensor] = []

    def read(resid: torch.Tensor, hook: Any) -> None:
        found.append(resid.clone())

    with torch.inference_mode(), subject.model.hooks(fwd_hooks=[(resid_post(layer), read)]):
        subject.model(tokens, attention_mask=mask)
    return found[0]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_padded_on_either_side_is_changed_at_its_rules_tokens_and_never_at_padding(
    tiny: Subject, operator: str, rule: Rule, side: str
) -> None:
    tokens, mask = padded(tiny, side=side)
    one = step(operator, rule, seed=1)
    before = residual(tiny, tokens, 1, mask)
    with steer(tiny.model, as_plan([one]), attention_mask=mask):
        after = residual(tiny, tokens, 1, mask)
    for row in range(len(PROMPTS)):
        length = int(mask[row].sum())
        for column in range(tokens.shape[1]):
            position = column - (tokens.shape[1] - length if side == "left" else 0)
            position = position if position < length else -1
            h = before[row, column]
            if position >= 0 and is_steered(rule, position, length):
                torch.testing.assert_close(after[row, column], changed(h, one), rtol=1e-4, atol=1e-3)
            else:
                assert torch.equal(after[row, column], h), (row, position)


def test_steered_logits_equal_the_plain_passes(tiny: Subject) -> None:
    tokens, mask = padded(tiny)
    rows = [
        [step("add", "all", seed=1)],
        [],
        [step("ablate", "last", layer=3), step("set_projection", "prompt", layer=0)],
    ]
    with torch.inference_mode(), steer(tiny.model, [as_plan(row) for row in rows], attention_mask=mask):
        logits = tiny.model(tokens, attention_mask=mask)[:, -1]
    for row, steps in enumerate(rows):
        ids = encode(tiny.model, PROMPTS[row])
        expected, _ = plain_logits(tiny.hf, ids, steps, len(ids))
        torch.testing.assert_close(logits[row], expected, rtol=1e-3, atol=1e-3)


def test_set_projection_reaches_its_target_at_the_hook(tiny: Subject) -> None:
    tokens = torch.tensor([encode(tiny.model, "Describe rain.")])
    with steer(tiny.model, as_plan([step("set_projection", "all", layer=2, strength=-9.0, seed=3)])):
        assert ((residual(tiny, tokens, 2) @ unit(3)) + 9.0).abs().max() < 1e-3


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_placebo_changes_every_token_by_the_same_norm_elsewhere(tiny: Subject, operator: str) -> None:
    tokens = torch.tensor([encode(tiny.model, "Describe rain.")])
    plan = as_plan([step(operator, "all", seed=3)])
    before = residual(tiny, tokens, 1)
    with steer(tiny.model, plan):
        own = residual(tiny, tokens, 1) - before
    with steer(tiny.model, plan.placebo(seed=0)):
        placebo = residual(tiny, tokens, 1) - before
    torch.testing.assert_close(own.norm(dim=-1), placebo.norm(dim=-1), rtol=1e-3, atol=1e-3)
    assert torch.cosine_similarity(own, placebo, dim=-1).abs().max() < 0.7


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_coefficient_of_zero_is_no_steering_bit_for_bit(tiny: Subject, operator: Any) -> None:
    tokens, mask = padded(tiny)
    before = tiny.model(tokens, attention_mask=mask)
    zero = Plan((Intervention(1, unit(0), operator, coeff=0.0, target=3.0),))
    with steer(tiny.model, zero, attention_mask=mask):
        assert torch.equal(tiny.model(tokens, attention_mask=mask), before)
    beside = [zero, as_plan([step("add", "all")]), Plan()]
    with steer(tiny.model, beside, attention_mask=mask):
        after = tiny.model(tokens, attention_mask=mask)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    assert torch.equal(after[2], before[2])


def test_one_plan_serves_passes_of_any_shape(llama: Subject) -> None:
    with steer(llama.model, as_plan([step("add", "all")])):
        for shape in [(1, 3), (2, 5), (2, 4), (1, 3)]:
            llama.model(torch.full(shape, 9))


def test_two_blocks_steer_one_after_the_other(tiny: Subject) -> None:
    tokens = torch.tensor([encode(tiny.model, "Hm")])
    first, second = as_plan([step("set_projection", "all", seed=1)]), as_plan([step("ablate", "all", seed=2)])
    with steer(tiny.model, first + second):
        together = tiny.model(tokens)
    with steer(tiny.model, first), steer(tiny.model, second):
        torch.testing.assert_close(tiny.model(tokens), together)


def test_gradients_flow_through_a_steered_pass_and_leave_inputs_alone(llama: Subject) -> None:
    plan = as_plan([step("add", "all")])
    direction = plan.interventions[0].direction.clone()
    with steer(llama.model, plan):
        loss = llama.model(torch.tensor([[5, 6, 7]])).sum()
    assert loss.requires_grad
    assert torch.equal(plan.interventions[0].direction, direction)


def test_a_bfloat16_model_is_steered_in_its_own_dtype(llama: Subject) -> None:
    model = load_model(llama.folder, dtype="bfloat16", progress=False)
    subject = Subject("bfloat16", llama.folder, model)
    tokens = torch.tensor([encode(model, "Describe rain.")])
    with steer(model, as_plan([step("set_projection", "all", strength=20.0, seed=1)])):
        resid = residual(subject, tokens, 1)
    assert resid.dtype == torch.bfloat16
    assert ((resid.float() @ unit(1)) - 20.0).abs().max() < 1.0  # 8 bits of mantissa at a residual norm near 100
    assert hooks_on(model) == []


def test_the_mask_of_a_pass_says_where_its_tokens_are(tiny: Subject) -> None:
    tokens, mask = padded(tiny)
    plan = as_plan([step("add", "last")])
    with steer(tiny.model, plan, attention_mask=mask):
        told = tiny.model(tokens, attention_mask=mask)
    with steer(tiny.model, plan):
        assert torch.equal(tiny.model(tokens, attention_mask=mask), told)
        assert not torch.equal(tiny.model(tokens), told)  # the same shape without a mask: all columns are tokens
        again, _ = tiny.model.run_with_cache(tokens, attention_mask=mask)
        assert torch.equal(again, told)


@pytest.mark.bridge
def test_a_pass_that_goes_on_from_a_cache_is_refused(tiny: Subject) -> None:
    tokens = torch.tensor([[5, 6, 7]])
    with steer(tiny.model, as_plan([step("add", "last")])):
        _, cache = tiny.model(tokens, return_type="logits_and_cache", use_cache=True)
        with pytest.raises(SteerlensError, match="this one goes on from a cache"):
            tiny.model(tokens[:, :1], past_key_values=cache)
        with pytest.raises(SteerlensError, match=r"sample with generate\(steering=plan\)"):
            tiny.model.generate(tokens, max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)


def test_a_pass_with_gradients_may_follow_one_without(llama: Subject) -> None:
    tokens = torch.tensor([[5, 6, 7]])
    with steer(llama.model, as_plan([step("set_projection", "all")])):
        with torch.inference_mode():
            llama.model(tokens)
        llama.model(tokens).sum().backward()
    llama.model.zero_grad()


def test_no_plan_at_all_is_refused(llama: Subject) -> None:
    with pytest.raises(SteerlensError, match="steering needs a plan, or one per row, got none"), steer(llama.model, []):
        pytest.fail("the block must not start")


# --- nothing is left behind ----------------------------------------------------------------------------------------


def test_hooks_are_on_inside_the_block_and_gone_after_it(tiny: Subject) -> None:
    tokens = torch.tensor([[5, 6, 7]])
    before = tiny.model(tokens)
    with steer(tiny.model, as_plan([step("add", "all"), step("add", "all", layer=3)])) as model:
        assert model is tiny.model
        assert hooks_on(tiny.model)
        assert not torch.equal(tiny.model(tokens), before)
    assert hooks_on(tiny.model) == []
    assert torch.equal(tiny.model(tokens), before)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_exception_inside(tiny: Subject, failure: type[BaseException]) -> None:
    def fail(resid: torch.Tensor, hook: Any) -> None:
        assert hooks_on(tiny.model)
        raise failure

    with (
        pytest.raises(failure),
        steer(tiny.model, as_plan([step("add", "all")])),
        tiny.model.hooks(fwd_hooks=[(resid_post(2), fail)]),
    ):
        tiny.model(torch.tensor([[5, 6, 7]]))
    assert hooks_on(tiny.model) == []


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (
            Plan((Intervention(0, unit(0)), Intervention(4, unit(0)))),
            SteerlensError,
            r"layer must be in \[0, 4\), got 4",
        ),
        (
            Plan((Intervention(0, unit(0)), Intervention(1, unit(0, 16)))),
            ModelError,
            "d_model 32, got 16; fit the vector",
        ),
    ],
    ids=["layer", "width"],
)
def test_a_failed_start_leaves_no_hook(tiny: Subject, plan: Plan, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), steer(tiny.model, plan):
        pytest.fail("the block must not start")
    assert hooks_on(tiny.model) == []


@pytest.mark.parametrize(
    ("origin", "message"),
    [({"n_layers": "30"}, "this model's 4 layers, got 30"), ({"frame": "compatibility"}, "and this model is in raw")],
    ids=["depth", "frame"],
)
def test_a_plan_fitted_in_another_kind_of_model_is_refused(tiny: Subject, origin: dict[str, str], message: str) -> None:
    plan = Plan((Intervention(1, unit(0), coeff=1.0, origin=origin),))
    with pytest.raises(ModelError, match=message), steer(tiny.model, plan):
        pytest.fail("the block must not start")
    assert hooks_on(tiny.model) == []


def test_a_plan_fitted_in_a_model_of_another_name_is_warned_of(tiny: Subject) -> None:
    origin = {"model": "elsewhere", "n_layers": "4", "frame": "raw"}
    plan = Plan((Intervention(1, unit(0), coeff=1.0, origin=origin),))
    with pytest.warns(UserWarning, match=f"fitted in elsewhere, not in {tiny.name}"), steer(tiny.model, plan):
        pass


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        (lambda plan: {"plan": [plan, plan]}, (3, 4)),
        (lambda plan: {"plan": plan, "attention_mask": torch.ones(2, 4, dtype=torch.long)}, (2, 5)),
    ],
    ids=["plans", "mask"],
)
def test_a_pass_of_another_shape_than_announced_is_refused(
    tiny: Subject, arguments: Callable[[Plan], dict], shape: tuple[int, int]
) -> None:
    with (
        pytest.raises(SteerlensError, match="give one plan, or one per row, and the mask of the same tokens"),
        steer(tiny.model, **arguments(as_plan([step("add", "all")]))),
    ):
        tiny.model(torch.full(shape, 9))
    assert hooks_on(tiny.model) == []


# --- tables --------------------------------------------------------------------------------------------------------


def test_edits_exist_only_for_layers_that_some_row_steers_and_keep_chosen_rows() -> None:
    plans = [
        as_plan([step("add", "all", layer=2)]),
        Plan(),
        as_plan([step("ablate", "all", layer=0), step("add", "all", layer=0)]),
    ]
    edits = residual_edits(plans, [3, 3, 3], d_model=32)
    assert [edit.site for edit in edits] == [resid_post(0), resid_post(2)]
    assert edits[0].read.shape == (2, 3, 32)
    kept = edits[0].select(torch.tensor([2, 0]))
    assert kept.site == edits[0].site
    assert torch.equal(kept.slope, edits[0].slope[:, [2, 0]])
    assert torch.equal(kept.read, edits[0].read[:, [2, 0]])


def test_the_plain_step_and_the_plan_mean_the_same() -> None:
    one = Step(layer=2, operator="set_projection", direction=unit(1), coeff=0.5, target=2.0, rule=("start", 1, 3))
    [intervention] = as_plan([one])
    assert (intervention.layer, intervention.coeff, intervention.target) == (2, 0.5, 2.0)
    assert intervention.positions.bounds(9) == (1, 3)
