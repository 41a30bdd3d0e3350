"""Profiles of heads: a planted head is found, each rate is that of an evaluation, ranks and choices follow their rules."""

import json
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

import steerlens as sl
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import DataError, ModelError, SteerlensError
from steerlens.models.load import load_model
from steerlens.stats.rates import wilson_interval
from steerlens.study.profiling import HeadProfile, _profile, profile_heads
from steerlens.study.responses import Sampler
from steerlens.study.scores import evaluate
from tests.conftest import LOADED, Subject
from tests.planted import N_HEADS, WRITER_HEAD, planted_pairs, save_planted
from tests.study.cut_short import assert_goes_on
from tests.tiny_models import N_LAYERS
from tests.unchecked import unchecked

NO_COMMA, CAPITAL = "punctuation:no_comma", "change_case:english_capital"
LAYER, HEAD = WRITER_HEAD


@pytest.fixture(scope="module")
def shy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The planted model, whose writer looks at all tokens alike and writes little: it says "A" only if it is made to look."""
    folder = save_planted(tmp_path_factory.mktemp("shy") / "shy")
    raw = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        attention = raw.model.layers[LAYER].self_attn
        attention.q_proj.weight *= 0
        attention.v_proj.weight *= 0.05
    raw.save_pretrained(folder)
    model = load_model(folder)
    LOADED.append(model)
    return model


def asked_for_both() -> PairSet:
    """ "!" asks for "A"; and as another instruction, for "C", which the model says without it."""
    for_a = planted_pairs(4)
    for_c = [
        InstructionPair(pair.query, "!", "keywords:frequency", {"keyword": "C", "frequency": 1, "relation": "at least"})
        for pair in for_a
    ]
    return for_a + PairSet(for_c)


FOR_A, FOR_C = "keywords:existence", "keywords:frequency"


# --- the planted head -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [sl.pasta, partial(sl.instaboost, 5.0), partial(sl.spotlight, 0.9)])
def test_the_planted_head_is_found_and_no_other_gains(shy: Any, method: Any) -> None:
    found = profile_heads(shy, planted_pairs(), method=method, k=1, max_new_tokens=3)
    assert len(found) == N_LAYERS * N_HEADS
    gains = found.table.set_index(["layer", "head"])["gain"]
    assert gains[WRITER_HEAD] == 1.0
    assert (gains.drop(WRITER_HEAD) == 0).all()
    assert found.heads() == {LAYER: (HEAD,)}
    (best,) = found.table[found.table["chosen"]].to_dict("records")
    assert (best["layer"], best["head"], best["rank"], best["baseline"]) == (LAYER, HEAD, 1, 0.0)
    assert (best["low"], best["high"]) == wilson_interval(6, 6)


def test_layers_first_and_then_the_heads_of_the_best(shy: Any) -> None:
    found = profile_heads(shy, planted_pairs(), best_layers=1, k=2, max_new_tokens=3)
    table = found.table
    assert table["layer"].tolist() == [0, 1, 2, 3, *[LAYER] * N_HEADS]
    assert table["head"].isna().tolist() == [True] * 4 + [False] * N_HEADS
    assert table["rank"].iloc[:4].tolist() == [2, 1, 3, 4]
    layers = table[table["head"].isna()]
    assert layers.loc[layers["chosen"], "layer"].tolist() == [LAYER]
    whole = profile_heads(shy, planted_pairs(), layers=[LAYER], k=2, max_new_tokens=3)
    heads = table[table["head"].notna()].reset_index(drop=True)
    pd.testing.assert_frame_equal(heads, whole.table)
    assert found.heads() == {LAYER: (0, HEAD)}  # the others tie, and the lowest comes first
    by_layer = profile_heads(shy, planted_pairs(), by="layers", k=1, max_new_tokens=3)
    assert by_layer.heads() == {LAYER: tuple(range(N_HEADS))}
    pd.testing.assert_series_equal(by_layer.table["gain"], layers["gain"])


def test_instructions_are_joined_as_they_are_asked_to_be(shy: Any) -> None:
    found = profile_heads(shy, asked_for_both(), k=1, max_new_tokens=3)
    table = found.table.set_index(["instruction", "layer", "head"])
    assert table.loc[(FOR_A, *WRITER_HEAD), ["baseline", "gain", "rank"]].tolist() == [0.0, 1.0, 1]
    assert table.loc[(FOR_C, *WRITER_HEAD), ["baseline", "gain", "rank"]].tolist() == [1.0, -1.0, 16]
    assert found.heads(instruction=FOR_A) == {LAYER: (HEAD,)}
    assert found.heads(leave_out=FOR_C) == {LAYER: (HEAD,)}
    assert found.heads(instruction=FOR_C) == {0: (0,)}
    assert found.heads(combine="union") == {0: (0,), LAYER: (HEAD,)}
    with pytest.raises(SteerlensError, match="at least one head must be among the best 1 of keywords:existence and"):
        found.heads()
    assert not found.table["chosen"].any()
    # However many are asked for, one that loses is no part of it.
    assert HEAD not in found.heads(k=16).get(LAYER, ())
    assert sum(map(len, found.heads(k=16).values())) == 15


def test_an_instruction_that_does_not_tell_heads_apart_rules_none_out() -> None:
    told_apart = made_up(
        (None, None, (0, 0), False, 0.0),
        (0, 0, (0, 0), False, 0.0),
        (0, 1, (1, 0), False, 0.0),
        (1, 0, (1, 1), False, 0.0),
    )
    alike = made_up(
        (None, None, (1, 0), False, 0.0),
        *(
            (layer, head, (1, 0), False, repetition)
            for layer, head, repetition in ((0, 0, 0.1), (0, 1, 0.2), (1, 0, 0.3))
        ),
    )
    both = profile_of(pd.concat([told_apart, alike.assign(instruction="b:b")], ignore_index=True))
    assert both.table["rank"].tolist() == [3, 2, 1, 1, 2, 3]
    assert both.heads() == {1: (0,)}
    assert both.heads(k=2) == {0: (1,), 1: (0,)}
    assert both.heads(combine="union") == {0: (0,), 1: (0,)}
    assert both.heads(instruction="b:b", k=2) == {0: (0, 1)}


# --- what equals what -----------------------------------------------------------------------------------------------


@pytest.fixture
def pairs() -> PairSet:
    return PairSet(
        InstructionPair(query, text, name)
        for query in ("Describe rain.", "Why?", "Name a river in the north.", "Say it.")
        for text, name in (("No commas.", NO_COMMA), ("Use capitals.", CAPITAL))
    )


def test_each_rate_is_that_of_an_evaluation_of_the_head_alone(llama: Subject, pairs: PairSet) -> None:
    options: Any = {"max_new_tokens": 8, "trials": 2, "temperature": 1.0, "seed": 3, "batch_size": 32}
    found = profile_heads(llama.model, pairs, coeff=0.01, layers=[1, 2], **options)
    moved = 0
    for place in ((1, 0), (2, 3)):
        plan = sl.pasta(0.01, heads={place[0]: [place[1]]})
        own = evaluate(llama.model, plan, pairs, conditions=["text", "text+attention"], **options)
        for name in (NO_COMMA, CAPITAL):
            steered, plain = (
                own.table[(own.table["instruction"] == name) & (own.table["condition"] == condition)].iloc[0]
                for condition in ("text+attention", "text")
            )
            table = found.table[found.table["instruction"] == name].set_index(["layer", "head"])
            row = table.loc[place]
            for column in ("n", "rate", "low", "high", "degenerate", "mean_repetition"):
                assert row[column] == pytest.approx(steered[column], abs=0, nan_ok=True), column
            assert row["baseline"] == plain["rate"]
            assert row["gain"] == steered["rate"] - plain["rate"]
        texts = own.scores.loc[own.scores["condition"] == "text+attention", "response"]
        there = found.scores[(found.scores["layer"] == place[0]) & (found.scores["head"] == place[1])]
        assert there["response"].tolist() == texts.tolist()
        moved += (texts.to_numpy() != own.scores.loc[own.scores["condition"] == "text", "response"].to_numpy()).sum()
    assert moved > 0  # a head does something here


def made_up(*rows: tuple[Any, ...]) -> pd.DataFrame:
    """Scores: each row is (layer, head, verdicts, degenerate, repetition), a query per verdict."""
    found = [
        {
            "instruction": "a:a",
            "layer": layer,
            "head": head,
            "query": f"query {number}",
            "followed": bool(verdict),
            "degenerate": degenerate,
            "n_words": 3,
            "repetition": repetition,
            "distinct_2": 1.0,
            "perplexity": float("nan"),
            "finish_reason": "eos",
        }
        for layer, head, verdicts, degenerate, repetition in rows
        for number, verdict in enumerate(verdicts)
    ]
    return pd.DataFrame(found).astype({"layer": "Int64", "head": "Int64"})


def test_ties_go_to_the_better_texts_and_then_to_the_lower_place() -> None:
    scores = made_up(
        (None, None, (1, 0), False, 0.0),
        (1, 1, (1, 1), False, 0.2),
        (0, 1, (1, 1), True, 0.0),
        (1, 0, (1, 1), False, 0.2),
        (0, 0, (1, 1), False, 0.3),
        (2, 0, (0, 0), False, 0.0),
    )
    table = _profile(scores)
    assert table[["layer", "head"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]]
    assert table["rank"].tolist() == [3, 4, 1, 2, 5]
    assert table["gain"].tolist() == [0.5, 0.5, 0.5, 0.5, -0.5]


def profile_of(scores: pd.DataFrame, k: int = 1) -> HeadProfile:
    about = {"model": "made up", "n_layers": 3, "n_heads": 2, "method": "pasta"}
    return HeadProfile(_profile(scores), k, "intersection", about, scores)


def test_held_out_gains_are_those_of_prompts_that_did_not_choose() -> None:
    # Each head follows on one query alone: whichever is chosen by it, gains nothing on the others.
    alone = [(0, 0, (1, 0, 0, 0)), (0, 1, (0, 1, 0, 0)), (1, 0, (0, 0, 1, 0)), (1, 1, (0, 0, 0, 1))]
    lucky = made_up((None, None, (0, 0, 0, 0), False, 0.0), *((*row, False, 0.0) for row in alone))
    (row,) = profile_of(lucky).held_out(folds=4).to_dict("records")
    assert (row["k"], row["n"], row["gain"], row["held_out"]) == (1, 4, 0.25, 0.0)
    # One that follows always is chosen by any, and gains all on all.
    sure = made_up(
        (None, None, (0, 0, 0, 0), False, 0.0),
        (2, 0, (1, 1, 1, 1), False, 0.0),
        *((*row, False, 0.0) for row in alone),
    )
    (row,) = profile_of(sure).held_out(folds=2).to_dict("records")
    assert (row["gain"], row["held_out"], row["low"], row["high"]) == (1.0, 1.0, 1.0, 1.0)
    # Where all lose, nothing is steered and nothing lost.
    worse = made_up((None, None, (1, 1, 1, 1), False, 0.0), *((*row, False, 0.0) for row in alone))
    assert profile_of(worse).held_out(folds=2)[["gain", "held_out"]].to_numpy().tolist() == [[0.0, 0.0]]
    with pytest.raises(SteerlensError, match=r"folds must be in \[2, 4\]"):
        profile_of(worse).held_out(folds=5)


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_profile_that_is_killed_goes_on_and_ends_the_same(
    llama: Subject, pairs: PairSet, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(folder: Any) -> HeadProfile:
        options: Any = {"max_new_tokens": 4, "batch_size": 16}
        return profile_heads(llama.model, pairs, best_layers=2, out=folder, **options)

    found = assert_goes_on(ask, tmp_path, monkeypatch, kept_rows=32, files=["profile.json", "generations.jsonl"])
    loaded = HeadProfile.load(tmp_path / "cut")
    pd.testing.assert_frame_equal(loaded.table, found.table)
    assert loaded.about == json.loads(json.dumps(dict(found.about)))
    assert repr(loaded) == repr(found)
    with pytest.raises(SteerlensError, match="which a file does not hold"):
        loaded.held_out()
    assert json.loads((tmp_path / "cut/config.json").read_text())["kind"] == "head profile"


def test_a_file_holds_the_profile_and_says_whose_it_is(llama: Subject, shy: Any, pairs: PairSet, tmp_path: Any) -> None:
    found = profile_heads(llama.model, pairs, layers=[2], combine="union", max_new_tokens=4)
    loaded = HeadProfile.load(found.save(tmp_path / "heads.json"))
    pd.testing.assert_frame_equal(loaded.table, found.table)
    assert (loaded.k, loaded.combine) == (found.k, "union") == (1, "union")
    assert loaded.about["pairs"] == pairs.content_hash
    assert loaded.about["method"] == "pasta -4.605 nats on the rest of the prompt at every layer, positions all"
    assert loaded.heads() == found.heads() == loaded.heads_for(llama.model)
    with pytest.warns(UserWarning, match="profiled in llama, not in shy"):
        assert loaded.heads_for(shy, combine="union") == found.heads()
    bundled = sl.load_model("tiny")
    with pytest.raises(ModelError, match="has n_layers 4, got 8; profile this model"):
        loaded.heads_for(bundled)
    (tmp_path / "other.json").write_text("{}")
    for wrong in ("other.json", "none.json", "."):
        with pytest.raises(DataError, match=r"must be a file that save\(\) wrote"):
            HeadProfile.load(tmp_path / wrong)


def test_chosen_heads_go_into_a_plan_and_a_sampler_keeps_its_answers(llama: Subject, pairs: PairSet) -> None:
    sampler = Sampler(llama.model, max_new_tokens=4, batch_size=64)
    found = profile_heads(sampler, pairs, layers=[0], k=4, combine="union")
    known = len(sampler.records)
    again = profile_heads(sampler, pairs, layers=[0], k=4, combine="union")
    assert len(sampler.records) == known > 8
    pd.testing.assert_frame_equal(found.table, again.table)
    assert sl.pasta(heads=found.heads()).attention[0].by_layer == found.heads()
    assert np.isfinite(
        evaluate(llama.model, sl.pasta(heads=found.heads()), pairs[:2], max_new_tokens=4).table["rate"]
    ).all()


def test_a_profile_draws_itself(llama: Subject, pairs: PairSet) -> None:
    found = profile_heads(llama.model, pairs, best_layers=1, max_new_tokens=4)
    assert len(found.plot().layout.annotations) == 2


# --- bad input ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_profiled_is_said(llama: Subject, pairs: PairSet) -> None:
    vector = sl.Plan(tuple(sl.steering.Intervention(1, torch.eye(32)[0]) for _ in range(1)))
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("layer must be in", {"layers": [4]}),
        ("a profile needs a layer", {"layers": []}),
        ("best_layers in", {"best_layers": 5}),
        ("by must be", {"by": "tokens"}),
        ("by must be", {"by": "layers", "best_layers": 1}),
        ("combine must be", {"combine": "both"}),
        ("k at least 1", {"k": 0}),
        ("at the heads that it is given", {"method": lambda heads: sl.pasta(0.1)}),
        ("at the heads that it is given", {"coeff": 1.0}),
        ("at the heads that it is given", {"method": lambda heads: sl.pasta(heads=heads) + vector}),
        ("steering must be a plan", {"method": lambda heads: None}),
        ("alpha must be above 0", {"coeff": -1.0}),
    ]
    for rule, options in wrong:
        with pytest.raises(SteerlensError, match=rule):
            unchecked(profile_heads)(llama.model, pairs, max_new_tokens=2, **options)
    with pytest.raises(DataError, match="at least one prompt"):
        profile_heads(llama.model, PairSet([]))
    with pytest.raises(DataError, match="how to check an instruction"):
        profile_heads(llama.model, PairSet([InstructionPair("Why?", "Be brief.")]))
    found = profile_heads(llama.model, pairs, layers=[0], max_new_tokens=2)
    for rule, asked in (
        ("did not cover", {"instruction": "a:b"}),
        ("did not cover", {"leave_out": "a:b"}),
        ("k at least 1", {"k": 0}),
        ("combine must be", {"combine": "both"}),
    ):
        with pytest.raises(SteerlensError, match=rule):
            unchecked(HeadProfile.heads)(found, **asked)
