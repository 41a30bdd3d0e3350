"""Masses on the instruction are the raw model's own, the same in every batch, and move as each method says it moves them."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import steerlens as sl
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import SteerlensError
from steerlens.models.load import load_model
from steerlens.models.probe import Abilities
from steerlens.models.prompts import token_span
from steerlens.models.rows import Rows
from steerlens.reading import attention
from steerlens.reading.attention import attention_mass
from steerlens.reading.gating import COLUMNS, gate_table
from steerlens.steering.interventions import Intervention
from steerlens.steering.plan import Plan
from tests.conftest import Subject
from tests.steps import unit

SAID = "Use capitals."
QUERIES = ["Describe rain.", "Why?", "Name a river in the far north."]
PAIRS = PairSet(InstructionPair(query, SAID, "change_case:english_capital") for query in QUERIES)
BEFORE, AFTER = "condition == 'before'", "condition == 'after'"


def masses(table: pd.DataFrame, condition: str) -> np.ndarray:
    return table.loc[table["condition"] == condition, "mass"].to_numpy()


def answered(model: Any, pairs: PairSet = PAIRS, **options: Any) -> Any:
    return sl.generate(model, pairs.prompts("text"), max_new_tokens=5, **options)


def patterns(hf: Any, ids: list[int]) -> np.ndarray:
    """[layer head query key] of a plain pass over one row."""
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        found = hf(torch.tensor([ids]), output_attentions=True).attentions
    return torch.cat(list(found)).double().numpy()


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.bridge
@pytest.mark.parametrize("positions", ["response", "after", "last", "all", "generated"])
def test_masses_are_those_of_the_raw_model(tiny: Subject, positions: str) -> None:
    out = answered(tiny.model)
    found = attention_mass(tiny.model, PAIRS, answers=out, positions=positions, batch_size=2)
    for row, (pair, one) in enumerate(zip(PAIRS, out, strict=True)):
        start, stop = token_span(tiny.model, pair.prompt, pair.instruction_span)
        end, new = len(one.prompt_tokens), len(one.tokens)
        queries = {
            "response": slice(end - 1, end + new - 1),
            "after": slice(stop - 1, end),
            "last": slice(end - 1, end),
            "all": slice(0, end + new),
            "generated": slice(end, end + new),
        }[positions]
        pattern = patterns(tiny.hf, [*one.prompt_tokens, *one.tokens])
        expected = pattern[:, :, queries, start:stop].sum(-1).mean(-1)
        own = found.per_prompt[found.per_prompt["row"] == row]
        assert own["mass"].to_numpy() == pytest.approx(expected.ravel(), abs=1e-5)
        assert set(own["n_queries"]) == {pattern[:, :, queries].shape[2]}
        even = np.tril(np.ones(pattern.shape[-2:]))
        even = even / even.sum(1, keepdims=True)
        assert own["uniform"].iloc[0] == pytest.approx(even[queries, start:stop].sum(1).mean())
    of_one = found.per_prompt.groupby(["layer", "head"])["mass"].mean()
    assert found.table["mass"].to_numpy() == pytest.approx(of_one.to_numpy())
    assert (found.table["low"] <= found.table["mass"]).all()
    assert (found.table["mass"] <= found.table["high"]).all()


@pytest.mark.parametrize("positions", ["response", "all"])
def test_the_prompt_and_all_other_tokens_hold_all_attention(tiny: Subject, positions: str) -> None:
    prompt, out = PAIRS[0].prompt, answered(tiny.model, PAIRS[:1])
    found = attention_mass(tiny.model, out, on=(0, len(prompt)), positions=positions)
    # Tokens of the template, and generated ones, are named by no text.
    (one,), end = out, len(out[0].prompt_tokens)
    first, last = token_span(tiny.model, prompt, (0, len(prompt)))
    tokens = (*one.prompt_tokens, *one.tokens)
    others = tuple(not first <= position < last for position in range(len(tokens)))
    queries = range(len(tokens)) if positions == "all" else range(end - 1, len(tokens) - 1)
    rest = attention._Text(prompt, tokens, end, Plan(), others, queries)
    left = attention._masses(tiny.model, [rest], range(4), 1, steered=False)["before"]
    assert found.table["mass"].to_numpy() + left.ravel() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("plan", [sl.pasta(0.1), sl.spotlight(0.4, granularity="layer")], ids=str)
def test_a_batch_gives_what_each_text_gives_alone(
    tiny: Subject, plan: Plan, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = answered(tiny.model)
    monkeypatch.setattr(attention, "abilities", lambda *_: Abilities(cache=side == "left", batch=True))
    together = attention_mass(tiny.model, PAIRS, answers=out, steering=plan, batch_size=8)
    for row in range(len(PAIRS)):
        alone = attention_mass(tiny.model, PAIRS[row : row + 1], answers=out[row : row + 1], steering=plan)
        own = together.per_prompt[together.per_prompt["row"] == row]
        assert own["mass"].to_numpy() == pytest.approx(alone.table["mass"].to_numpy(), abs=1e-5)
        assert alone.table["low"].isna().all()  # a single query has no interval


def test_half_precision_gives_nearly_the_same(llama: Subject) -> None:
    half = load_model(llama.folder, dtype=torch.bfloat16)
    full = attention_mass(llama.model, PAIRS, steering=sl.pasta(0.1), layers=[0], batch_size=8)
    found = attention_mass(half, PAIRS, steering=sl.pasta(0.1), layers=[0], batch_size=8)
    assert found.table["mass"].to_numpy() == pytest.approx(full.table["mass"].to_numpy(), abs=0.02)


def test_rounded_shares_are_no_more_than_all_attention() -> None:
    pattern = torch.full((1, 1, 3, 3), 1 / 3, dtype=torch.bfloat16)
    assert pattern.float().sum(-1).min() > 1
    rows = Rows(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long), (3,))
    every = torch.tensor([[True, True, True, False]])
    assert attention.MassRead("pattern", "all", keys=every, queries=every)(pattern, rows).tolist() == [[1.0]]


def test_texts_and_pairs_are_the_same_question(llama: Subject) -> None:
    of_pairs = attention_mass(llama.model, PAIRS, steering=sl.pasta(0.1))
    texts, starts = PAIRS.prompts("text"), [pair.instruction_span for pair in PAIRS]
    of_texts = attention_mass(llama.model, texts, on=SAID, steering=sl.pasta(0.1))
    of_plans = attention_mass(llama.model, texts, steering=[sl.pasta(0.1, on=start) for start in starts])
    one = attention_mass(llama.model, texts[0], on=starts[0]).table
    assert masses(of_pairs.table, "after") == pytest.approx(masses(of_texts.table, "after"))
    assert masses(of_pairs.table, "after") == pytest.approx(masses(of_plans.table, "after"))
    first = of_pairs.per_prompt.query(f"row == 0 and {BEFORE}")["mass"].to_numpy()
    assert one["mass"].to_numpy() == pytest.approx(first, abs=1e-6)


# --- what steering makes of it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.2, 0.6, 0.95])
def test_spotlight_takes_the_mass_near_its_target_and_not_beyond(tiny: Subject, target: float) -> None:
    options: Any = {"steering": sl.spotlight(target), "positions": "last"}
    found = attention_mass(tiny.model, PAIRS, **options).per_prompt
    after = found.query(AFTER)["mass"].to_numpy()
    assert (after >= target / (1 + target) - 1e-5).all()  # everywhere: the last token sees the instruction
    # Below layer 0 nothing is steered, so that "before" is the mass that SpotLight met there.
    first = found[found["layer"] == 0]
    before, after = (first.query(name)["mass"].to_numpy() for name in (BEFORE, AFTER))
    low = before < target
    assert low.any()
    assert (after[low] <= target + 1e-5).all()
    assert after[low] == pytest.approx(target / (1 + target - before[low]), abs=1e-5)
    assert after[~low] == pytest.approx(before[~low], abs=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 3.0])
def test_pasta_divides_the_odds_of_the_rest_by_alpha_at_the_first_layer(llama: Subject, alpha: float) -> None:
    plan = sl.pasta(alpha, heads={0: [1, 2]})
    found = attention_mass(llama.model, PAIRS, steering=plan, positions="last").per_prompt
    first = found[found["layer"] == 0]
    before, after = (first.query(name).set_index(["row", "head"])["mass"] for name in (BEFORE, AFTER))
    steered = before.index.get_level_values("head").isin([1, 2])
    odds = after / (1 - after) / (before / (1 - before))
    assert odds[steered].to_numpy() == pytest.approx(1 / alpha, rel=1e-3)
    assert odds[~steered].to_numpy() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("plan", [sl.pasta(1.0), sl.instaboost(0.0), sl.spotlight(0.0), Plan()], ids=str)
def test_a_plan_that_does_nothing_leaves_attention_alone(tiny: Subject, plan: Plan) -> None:
    table = attention_mass(tiny.model, PAIRS, steering=plan).table
    assert list(masses(table, "after")) == list(masses(table, "before"))


def test_a_vector_moves_attention_above_its_layer_only(llama: Subject) -> None:
    plan = Plan((Intervention(1, unit(3), coeff=5.0),))
    table = attention_mass(llama.model, PAIRS, steering=plan).table
    change = np.abs(masses(table, "after") - masses(table, "before")).reshape(4, 4).max(1)
    assert list(change[:2]) == [0, 0]
    assert (change[2:] > 1e-3).all()


def test_whole_patterns_are_not_kept(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    read = attention.MassRead.__call__

    def spy(self: Any, *args: Any) -> Any:
        kept.append(read(self, *args))
        return kept[-1]

    monkeypatch.setattr(attention.MassRead, "__call__", spy)
    attention_mass(llama.model, PAIRS, batch_size=8)
    assert {tuple(one.shape) for one in kept} == {(3, 4)}


def test_masses_draw_themselves_before_after_and_their_change(llama: Subject) -> None:
    found = attention_mass(llama.model, PAIRS, steering=sl.pasta(0.1))
    said = [str(note.text) for note in found.plot().layout.annotations]
    assert said == ["<b>before</b>", "<b>after</b>", "<b>after minus before</b>"]


# --- bad input ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_said(llama: Subject) -> None:
    model, texts = llama.model, PAIRS.prompts("text")
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("a gate decides token by token", {"prompts": PAIRS, "steering": sl.directer()}),
        ("needs to know where it stands in text 0", {"prompts": texts}),
        ("needs to know where it stands", {"prompts": texts, "steering": sl.pasta()}),
        ("is not in that of text 1", {"prompts": texts, "on": "Describe rain."}),
        ("answers must be to the same prompts", {"prompts": PAIRS[:2], "answers": answered(model)}),
        ("and 0 generated", {"prompts": PAIRS, "positions": "generated"}),
        ("layer must be in", {"prompts": PAIRS, "layers": [4]}),
        ("one layer at least", {"prompts": PAIRS, "layers": []}),
        ("one prompt at least", {"prompts": []}),
        ("pairs know where", {"prompts": PAIRS, "on": SAID}),
        ("head must be in", {"prompts": PAIRS, "steering": sl.pasta(heads={0: [4]})}),
    ]
    for rule, options in wrong:
        with pytest.raises(SteerlensError, match=rule):
            attention_mass(model, **options)
    plain = sl.generate(model, texts, max_new_tokens=2, prompt_format=sl.PromptFormat(style="plain"))
    with pytest.raises(SteerlensError, match="answers must be to prompts in this format"):
        attention_mass(model, PAIRS, answers=plain)
    found = attention_mass(model, PAIRS, answers=plain, prompt_format=sl.PromptFormat(style="plain"))
    assert len(found) == 16


# --- gates ----------------------------------------------------------------------------------------------------------


def test_a_table_of_gates_has_a_row_per_new_token_that_says_what_was_decided(llama: Subject) -> None:
    plans = [sl.directer(alpha=20.0, beta=0.02, on=SAID), Plan(), sl.directer(alpha=20.0, beta=0.02, on=SAID)]
    out = answered(llama.model, steering=plans)
    table = gate_table(llama.model, out)
    assert list(table) == list(COLUMNS)
    assert set(table["row"]) == {0, 2}  # one was not gated
    assert len(set(table["outcome"])) > 1
    for row in (0, 2):
        own = table[table["row"] == row]
        assert set(own["prompt"]) == {out.prompts[row]}
        assert list(own["position"]) == list(range(len(out[row].tokens)))
        for said, step, token in zip(own.to_dict("records"), out[row].gated, out[row].tokens, strict=True):
            assert said["token"] == llama.model.tokenizer.decode([token])
            assert said["raw"] == llama.model.tokenizer.decode([step.raw])
            tried = step.proposed is not None
            assert said["proposed"] == (llama.model.tokenizer.decode([step.proposed]) if tried else "")
            assert np.isnan(said["p_proposed"]) != tried
            for name in ("outcome", "strength", "n_layers", "n_trials", "p_raw"):
                assert said[name] == getattr(step, name)


def test_texts_without_a_gate_have_no_table(llama: Subject) -> None:
    with pytest.raises(SteerlensError, match="needs texts that were generated under one, got 3 without"):
        gate_table(llama.model, answered(llama.model))
