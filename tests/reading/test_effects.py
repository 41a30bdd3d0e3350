"""Direct and total effects: by plain hooks and by hand, alike at the last layer, and known in the planted world."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from steerlens.errors import ModelError, SteerlensError
from steerlens.models.prompts import encode
from steerlens.reading.effects import effect_numbers, vector_effects
from steerlens.steering.positions import Window
from steerlens.vectors.activations import record_activations
from steerlens.vectors.estimators import fit_steering_vector
from steerlens.vectors.vector import SteeringVector
from tests.conftest import Passes, Subject
from tests.planted import DIRECTION, planted_pairs
from tests.reading.conftest import Animals
from tests.reference.plain_capture import last_residuals
from tests.reference.plain_loop import Step, plain_logits
from tests.steps import unit
from tests.tiny_models import D_MODEL
from tests.unchecked import unchecked

PROMPTS = ["Why?", "Name a river in the north.", "Describe rain.", "Hm"]
VECTOR = SteeringVector({layer: 3 * unit(layer) for layer in range(4)}, resid_norm=dict.fromkeys(range(4), 2.0))
COEFF = 12.0


def of(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    for name, value in values.items():
        table = table[table[name] == value]
    return table


def numbers(table: pd.DataFrame, column: str, **values: Any) -> np.ndarray:
    return of(table, **values)[column].to_numpy()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_total_and_direct_effects_are_those_of_plain_hooks_and_of_the_weights(animals: Animals, name: str) -> None:
    subject, hf = animals(name), animals(name).hf
    found = vector_effects(subject.model, VECTOR, PROMPTS, coeff=COEFF, layers=[1, 3], targets="a").per_prompt
    final = hf.transformer.ln_f if name == "gpt2" else hf.model.norm
    cap = getattr(hf.config, "final_logit_softcapping", None)
    token = subject.model.tokenizer.convert_tokens_to_ids("a")
    for layer in (1, 3):
        for prompt in PROMPTS:
            ids = encode(subject.model, prompt)
            base, _ = plain_logits(hf, ids, [], len(ids))
            total, _ = plain_logits(hf, ids, [Step(layer, "add", VECTOR.unit(layer), COEFF)], len(ids))
            with torch.no_grad():
                moved = last_residuals(hf, ids)[-1].float() + COEFF * VECTOR.unit(layer)
                direct = hf.get_output_embeddings()(final(moved[None]))[0]
            direct = cap * torch.tanh(direct / cap) if cap else direct
            rows = of(found, layer=layer, prompt=prompt, condition="vector")
            for effect, logits in (("direct", direct), ("total", total)):
                p, q = logits.double().log_softmax(-1), base.double().log_softmax(-1)
                assert numbers(rows, "value", effect=effect, measure="kl") == pytest.approx(
                    float((p.exp() * (p - q)).sum()), abs=1e-4
                )
                changes = [float(logits[token] - base[token]), float(p[token] - q[token])]
                got = [
                    numbers(rows, "value", effect=effect, measure=f"{kind}_change")[0] for kind in ("logit", "log_prob")
                ]
                assert got == pytest.approx(changes, abs=1e-4)
            expected = np.corrcoef((direct - base).numpy(), (total - base).numpy())[0, 1]
            assert numbers(rows, "value", measure="correlation") == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "llama-tied"])
def test_added_at_the_last_layer_the_total_effect_is_the_direct_one(animals: Animals, name: str) -> None:
    found = vector_effects(animals(name).model, VECTOR, PROMPTS, coeff=COEFF, targets=["a", "b"]).per_prompt
    at_last, below = of(found, layer=3), of(found, layer=0)
    for measure in ("kl", "logit_change", "log_prob_change"):
        direct, total = (numbers(at_last, "value", measure=measure, effect=effect) for effect in ("direct", "total"))
        assert np.abs(direct - total).max() < 1e-4
        direct, total = (numbers(below, "value", measure=measure, effect=effect) for effect in ("direct", "total"))
        assert np.abs(direct - total).max() > 0.1
    assert numbers(at_last, "value", measure="correlation") == pytest.approx(1.0)


def test_the_planted_direction_says_b_itself_and_a_through_the_layer_that_reads_it(planted: Any) -> None:
    direction = SteeringVector({layer: torch.eye(D_MODEL)[DIRECTION] for layer in range(4)})
    prompts = planted_pairs(15).prompts("none")
    table = vector_effects(planted, direction, prompts, coeff=1, targets=["A", "B"]).table
    table = table[table["measure"] == "logit_change"]
    change = table.set_index(["condition", "effect", "target", "layer"])["mean"]
    for layer in range(4):
        assert change["vector", "direct", "B", layer] > 1.5
        assert abs(change["vector", "direct", "A", layer]) < 0.1
        made = change["vector", "total", "A", layer]
        assert made > 10 if layer < 2 else abs(made) < 0.1
        assert abs(change["random", "total", "A", layer]) < 4
    assert change["vector", "total", "B", 1] < 0.5 < 1.5 < change["vector", "total", "B", 2]


def test_the_control_is_as_long_in_another_direction_for_each_prompt_and_layer(
    llama: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    from steerlens.reading import effects

    build = effects.residual_edits
    monkeypatch.setattr(
        effects, "residual_edits", lambda plans, *args, **options: seen.extend(plans) or build(plans, *args, **options)
    )
    vector_effects(llama.model, VECTOR, PROMPTS, coeff=COEFF)
    writes = [step.write for plan in seen for step in plan if step.write is not None]
    assert len(writes) == len(seen) / 2 == len(PROMPTS) * 4
    assert {round(float(write.norm()), 4) for write in writes} == {1.0}
    assert all(step.coeff == COEFF for plan in seen for step in plan)
    cosines = torch.stack(writes) @ torch.stack(writes).T
    assert cosines.fill_diagonal_(0).abs().max() < 0.9


def test_numbers_depend_on_no_companion_and_random_ones_on_the_seed(llama: Subject) -> None:
    options: dict[str, Any] = {"coeff": COEFF, "targets": "a"}
    whole = vector_effects(llama.model, VECTOR, PROMPTS, **options).per_prompt
    for prompt in PROMPTS:
        alone = vector_effects(llama.model, VECTOR, [prompt], layers=2, batch_size=1, **options).per_prompt
        part = of(whole, prompt=prompt, layer=2)
        pd.testing.assert_frame_equal(part.reset_index(drop=True), alone, rtol=1e-3, atol=1e-4)
    other = vector_effects(llama.model, VECTOR, PROMPTS, seed=1, **options).per_prompt
    assert np.allclose(
        numbers(whole, "value", condition="vector"), numbers(other, "value", condition="vector"), atol=1e-4
    )
    assert not np.allclose(
        numbers(whole, "value", condition="random"), numbers(other, "value", condition="random"), atol=0.1
    )


def test_a_table_row_is_the_mean_over_prompts_with_its_interval(llama: Subject) -> None:
    found = vector_effects(llama.model, VECTOR, [*PROMPTS, "WHY?"], coeff=COEFF, layers=[0], targets="a")
    keys = ["layer", "condition", "effect", "measure", "target"]
    means = found.per_prompt.groupby(keys)["value"].mean()
    assert found.table.set_index(keys)["mean"].sort_index().to_numpy() == pytest.approx(means.sort_index().to_numpy())
    assert (found.table["low"] <= found.table["mean"]).all()
    assert (found.table["mean"] <= found.table["high"]).all()
    assert set(found.table["n"]) == {5}
    assert not found.table.duplicated(keys).any()


def test_spellings_of_a_prompt_are_one_query_of_the_interval(llama: Subject) -> None:
    options: dict[str, Any] = {"coeff": COEFF, "layers": [0]}
    assert vector_effects(llama.model, VECTOR, ["Why?", "WHY?"], **options).table[["low", "high"]].isna().all(axis=None)
    assert vector_effects(llama.model, VECTOR, ["Why?", "Hm"], **options).table[["low", "high"]].notna().all(axis=None)


def test_every_prompt_layer_and_condition_is_a_row_of_shared_batches(llama: Subject, passes: Passes) -> None:
    vector_effects(llama.model, VECTOR, PROMPTS, coeff=COEFF, batch_size=16)
    assert [len(rows.tokens) for rows, _ in passes][-3:] == [4, 16, 16]


def test_a_step_may_be_given_in_residual_norms(llama: Subject) -> None:
    norms = vector_effects(llama.model, VECTOR, PROMPTS, coeff=COEFF / 2, unit="resid_norm").table
    pd.testing.assert_frame_equal(norms, vector_effects(llama.model, VECTOR, PROMPTS, coeff=COEFF).table)


def test_layers_at_which_the_direction_is_zero_are_left_out(planted: Any) -> None:
    vector = fit_steering_vector(record_activations(planted, planted_pairs()))
    found = vector_effects(planted, vector, planted_pairs().prompts("none"), coeff=1)
    assert found.table["layer"].unique().tolist() == [1, 2, 3]


def test_no_step_has_no_effect_and_no_correlation(llama: Subject) -> None:
    table = vector_effects(llama.model, VECTOR, PROMPTS, coeff=0, layers=1, targets="a").table
    assert table.query("measure == 'correlation'")["mean"].isna().all()
    assert table.query("measure != 'correlation'")["mean"].abs().max() < 1e-4


def test_numbers_are_those_by_hand() -> None:
    base, direct, total = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, 1.0]])
    ((*values,),) = ([value for _, value in line] for line in effect_numbers(base, direct, total, targets=[0]))
    p = torch.tensor([1.0, -1.0]).softmax(-1)
    kl = float((p * (p / 0.5).log()).sum())
    log_prob = float((p[0] / 0.5).log())
    assert values == pytest.approx([kl, 1.0, log_prob, kl, 3.0, log_prob, 1.0], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "effects need at least one prompt, got none"),
        ({"prompts": "Why?"}, "prompts must be a list of texts, got 'Why"),
        ({"layers": []}, "effects need at least one layer with a direction, got none; leave layers out"),
        ({"layers": 7}, r"layer must be one of the vector's \[0, 1, 2, 3\], got 7"),
        ({"targets": "ab"}, "a target must be one token of the tokenizer, got 'ab'"),
        ({"vector": SteeringVector({1: unit(1)}), "unit": "resid_norm"}, "needs the mean residual norm of layer 1"),
        ({"coeff": float("nan")}, "coeff must be a finite number, got nan"),
        ({"positions": "generated"}, r"positions must be among the tokens of each prompt, got generated for the \d+ of 'Why\?'"),
        ({"positions": Window(90, 99)}, r"each prompt, got start\[90:99\] for the \d+ of 'Why\?'; effects are"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_sentence(llama: Subject, options: dict[str, Any], message: str) -> None:
    arguments = {"vector": VECTOR, "prompts": PROMPTS, "coeff": COEFF, **options}
    with pytest.raises(SteerlensError, match=message):
        unchecked(vector_effects)(llama.model, **arguments)


def test_a_vector_of_another_model_is_refused(llama: Subject) -> None:
    with pytest.raises(ModelError, match="a vector's width must be the model's d_model 32, got 8"):
        vector_effects(llama.model, SteeringVector({1: torch.ones(8)}), PROMPTS, coeff=1)
