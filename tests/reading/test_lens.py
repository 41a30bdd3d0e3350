"""The lens of a text: the model's own logits after the last layer, by hand below it, whatever the batch, steered or not."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from steerlens.errors import ModelError, SteerlensError
from steerlens.models.facts import model_device
from steerlens.models.passes import run_pass
from steerlens.models.prompts import encode, encode_all
from steerlens.models.rows import pad
from steerlens.reading import lens as lens_module
from steerlens.reading.lens import lens_columns, prompt_lens
from steerlens.steering.plan import Plan
from steerlens.steering.positions import Window
from steerlens.steering.residual import residual_edits
from steerlens.steering.sampling import generate
from tests.conftest import Subject
from tests.planted import planted_pairs
from tests.reading.conftest import Animals
from tests.reference.plain_capture import last_residuals
from tests.steps import as_plan, step
from tests.unchecked import unchecked

PROMPTS = ["Why?", "Name a river in the north.", "Describe rain."]
READOUTS = ["llama", "gpt2", "gemma2", "llama-tied"]
PLAN = as_plan([step("add", "all", layer=2), step("ablate", "last", layer=1, seed=1)])
TARGETS = ["a", "b"]


def own_log_probs(subject: Subject, prompt: str, plan: Plan) -> torch.Tensor:
    """The model's own log-probabilities after every token of one prompt alone."""
    ids = encode(subject.model, prompt)
    edits = residual_edits([plan], [len(ids)], d_model=32, device=model_device(subject.model))
    return run_pass(subject.model, pad([ids]), edits=edits, logits="all").logits[0].log_softmax(-1)


def assert_frames_agree(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one.reset_index(drop=True), other.reset_index(drop=True), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", READOUTS)
@pytest.mark.parametrize("plan", [Plan(), PLAN], ids=["plain", "steered"])
def test_the_last_layer_says_what_the_model_says_at_every_position(animals: Animals, name: str, plan: Plan) -> None:
    subject = animals(name)
    lens = prompt_lens(subject.model, PROMPTS, steering=plan, targets=TARGETS)
    end = "_steered" if plan.active else ""
    for row, prompt in enumerate(PROMPTS):
        expected = own_log_probs(subject, prompt, plan)
        cells = lens.table.query(f"row == {row} and layer == 3")
        assert cells["position"].tolist() == list(range(len(expected)))
        assert cells[f"top_id{end}"].tolist() == expected.argmax(-1).tolist()
        assert np.allclose(cells[f"probability{end}"], expected.max(-1).values.exp(), atol=1e-5)
        assert np.allclose(cells[f"entropy{end}"], -(expected.exp() * expected).sum(-1), atol=1e-4)
        for target in TARGETS:
            token = subject.model.tokenizer.convert_tokens_to_ids(target)
            found = lens.targets.query(f"row == {row} and layer == 3 and target == {target!r}")
            assert np.allclose(found[f"log_prob{end}"], expected[:, token], atol=1e-4)
            assert found[f"rank{end}"].tolist() == (expected > expected[:, [token]]).sum(-1).tolist()


@pytest.mark.parametrize("name", READOUTS)
def test_every_layer_is_its_residual_through_hugging_faces_norm_and_unembedding(animals: Animals, name: str) -> None:
    subject, hf = animals(name), animals(name).hf
    table = prompt_lens(subject.model, PROMPTS, positions="last").table
    final = hf.transformer.ln_f if name == "gpt2" else hf.model.norm
    cap = getattr(hf.config, "final_logit_softcapping", None)
    for row, ids in enumerate(encode_all(subject.model, PROMPTS)):
        with torch.no_grad():
            logits = hf.get_output_embeddings()(final(last_residuals(hf, ids).float()))
        expected = (cap * torch.tanh(logits / cap) if cap else logits).softmax(-1)
        cells = table[table["row"] == row]
        assert cells["layer"].tolist() == [0, 1, 2, 3]
        assert cells["top_id"].tolist() == expected.argmax(-1).tolist()
        assert np.allclose(cells["probability"], expected.max(-1).values, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mpt", "falcon-h1"])
def test_texts_are_read_alike_in_a_batch_and_alone(animals: Animals, name: str) -> None:
    model = animals(name).model
    together = prompt_lens(model, PROMPTS, steering=PLAN, targets="a")
    for row, prompt in enumerate(PROMPTS):
        alone = prompt_lens(model, prompt, steering=PLAN, targets="a")
        assert_frames_agree(together.table.query(f"row == {row}").assign(row=0), alone.table)
        assert_frames_agree(together.targets.query(f"row == {row}").assign(row=0), alone.targets)


def test_batches_are_as_small_as_their_residuals_need_and_change_nothing(
    llama: Subject, monkeypatch: pytest.MonkeyPatch, passes: Any
) -> None:
    whole = prompt_lens(llama.model, PROMPTS)
    assert [len(rows.tokens) for rows, _ in passes] == [3]
    monkeypatch.setattr(lens_module, "RESID_MEMORY", 1)
    assert_frames_agree(prompt_lens(llama.model, PROMPTS).table, whole.table)
    assert [len(rows.tokens) for rows, _ in passes] == [3, 1, 1, 1]


def test_the_frame_names_tokens_positions_and_layers(llama: Subject) -> None:
    table = prompt_lens(llama.model, "Hm", layers=[3, 1]).table
    tokens = llama.model.tokenizer.convert_ids_to_tokens(encode(llama.model, "Hm"))
    first = table[table["layer"] == 3]
    assert table["layer"].unique().tolist() == [3, 1]
    assert "".join(first["token"]) == llama.model.tokenizer.decode(encode(llama.model, "Hm"))
    assert len(first) == len(tokens)
    assert not table["generated"].any()


def test_what_steering_changes_is_steered_minus_unsteered(llama: Subject) -> None:
    lens = prompt_lens(llama.model, PROMPTS, steering=PLAN, targets=TARGETS)
    plain = prompt_lens(llama.model, PROMPTS, targets=TARGETS)
    assert lens.steered
    assert not plain.steered
    assert_frames_agree(lens.table[plain.table.columns], plain.table)
    table, targets = lens.table, lens.targets
    assert np.allclose(table["entropy_change"], table["entropy_steered"] - table["entropy"], atol=1e-5)
    assert np.allclose(targets["log_prob_change"], targets["log_prob_steered"] - targets["log_prob"], atol=1e-5)
    assert (targets["rank_change"] == targets["rank_steered"] - targets["rank"]).all()
    assert (table.query("layer == 0")[["kl", "entropy_change", "top_change"]] == 0).all(axis=None)
    assert (table.query("layer >= 2")["kl"] > 0).all()
    # Only the last token is steered at layer 1, and all of them at layer 2.
    at_1 = table.query("layer == 1")
    last = at_1.groupby("row")["position"].transform("max") == at_1["position"]
    assert ((at_1["kl"] > 0) == last).all()


def test_changes_of_two_distributions_are_those_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.1, 0.1, 0.8])
    found = lens_columns(p.log()[None], q.log()[None], targets=[1])
    assert float(found["kl"]) == pytest.approx(
        sum(b * math.log(b / a) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    )
    assert float(found["entropy"]) == pytest.approx(1.5 * math.log(2))
    assert float(found["top_change"]) == pytest.approx(math.log(0.8 / 0.25))
    assert float(found["log_prob_change"]) == pytest.approx(math.log(0.1 / 0.25))
    assert (int(found["top_id"]), int(found["top_id_steered"]), int(found["rank"]), int(found["rank_change"])) == (
        0,
        2,
        1,
        0,
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_text_is_what_the_last_layer_says_one_token_before_steered_as_it_was(
    animals: Animals, name: str
) -> None:
    model = animals(name).model
    plan = as_plan([step("add", "generated", layer=1), step("set_projection", "prompt", layer=2)])
    texts = generate(model, PROMPTS, steering=plan, max_new_tokens=8)
    said = sorted({token for text in texts for token in text.tokens})
    lens = prompt_lens(model, texts, steering=plan, layers=3, targets=said)
    cells = lens.table.set_index(["row", "position"])
    followed = lens.targets.set_index(["row", "position", "target_id"])["log_prob_steered"]
    for row, text in enumerate(texts):
        assert cells.loc[row, "generated"].sum() == len(text.tokens)
        for place, token in enumerate(text.tokens, len(text.prompt_tokens)):
            assert cells.loc[(row, place), "token_id"] == token
            largest = math.log(cells.loc[(row, place - 1), "probability_steered"])
            assert followed[row, place - 1, token] > largest - 1e-4  # the largest, or a near tie


def test_positions_choose_what_is_read(llama: Subject) -> None:
    texts = generate(llama.model, PROMPTS, max_new_tokens=4)
    whole = prompt_lens(llama.model, texts).table
    for rule, wanted in (
        ("generated", whole["generated"]),
        ("prompt", ~whole["generated"]),
        (Window(2, 5), whole["position"].between(2, 4)),
    ):
        assert_frames_agree(prompt_lens(llama.model, texts, positions=rule).table, whole[wanted])
    last = prompt_lens(llama.model, PROMPTS, positions="last").table
    assert last.groupby("row")["position"].unique().tolist() == [
        [len(ids) - 1] for ids in encode_all(llama.model, PROMPTS)
    ]


def test_each_text_may_have_its_plan(llama: Subject) -> None:
    lens = prompt_lens(llama.model, PROMPTS, steering=[Plan(), PLAN, Plan()])
    assert lens.table.groupby("row")["kl"].max().gt(0).tolist() == [False, True, False]


def test_the_planted_answer_appears_at_the_layer_that_makes_it(planted: Any) -> None:
    for condition, tops in (("none", "CCCC"), ("text", "CCAA")):
        prompts = planted_pairs().prompts(condition)
        lens = prompt_lens(planted, prompts, positions="last", targets=["A", "B"])
        assert lens.table.groupby("row")["top"].apply("".join).tolist() == [tops] * len(prompts)
    ranks = lens.targets.groupby(["target", "layer"])["rank"].max()
    assert ranks["A"][2] == ranks["A"][3] == 0
    assert ranks["B"][0] > 100  # the direction is not there yet
    assert ranks["B"][1] == 1  # it is there, and its own unembedding says B


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "ab"}, r"a target must be one token of the tokenizer, got 'ab', which is 2"),
        ({"positions": "generated"}, r"positions must be among the tokens of each text, got generated for text 0 with \d+"),
        ({"layers": []}, r"a lens needs at least one layer, got none; leave layers out"),
        ({"layers": 4}, r"layer must be in \[0, 4\), got 4"),
        ({"prompts": []}, r"a lens needs at least one text, got none"),
        ({"steering": [PLAN]}, r"steering must be one for all prompts or one per prompt, got 1 for 3 prompts"),
        ({"steering": as_plan([step("add", "all", layer=4)])}, r"layer must be in \[0, 4\), got 4"),
        ({"steering": "all"}, r"steering must be a plan, got 'a'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_sentence(llama: Subject, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SteerlensError, match=message):
        unchecked(prompt_lens)(llama.model, **{"prompts": PROMPTS, **options})


def test_a_plan_of_another_width_is_refused(llama: Subject) -> None:
    with pytest.raises(ModelError, match="a direction's width must be the model's d_model 32, got 16"):
        prompt_lens(llama.model, PROMPTS, steering=as_plan([step("add", "all", width=16)]))
