"""Search: candidates, eligibility, ties, and the choice."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import DataError, ModelError, SteerlensError
from steerlens.steering.attention import pasta, spotlight
from steerlens.steering.candidates import Candidate, draws, grid
from steerlens.steering.directer import plausible
from steerlens.steering.positions import Window
from steerlens.steering.sampling import generate
from steerlens.study import responses
from steerlens.study.quality import Quality
from steerlens.study.responses import Sampler
from steerlens.study.scores import Evaluation
from steerlens.study.sweeps import Best, Sweep, candidate_layers, choose, sweep
from steerlens.vectors.vector import SteeringVector
from tests.study.cut_short import assert_goes_on
from tests.unchecked import unchecked

NO_COMMA = "punctuation:no_comma"


def scores(*candidates, instruction="x:y"):
    """Made-up scores: each candidate is (layer, coeff, verdicts, degenerate flags)."""
    rows = [
        {
            "instruction": instruction,
            "layer": layer,
            "coeff": coeff,
            "operator": "add",
            "positions": "all",
            "unit": "absolute",
            "prompt_id": str(index),
            "prompt": str(index),
            "query": str(index),
            "trial": 0,
            "followed": bool(verdict),
            "degenerate": bool(flag),
            "n_words": 3,
            "repetition": 0.0,
            "distinct_2": 1.0,
            "perplexity": float("nan"),
            "finish_reason": "eos",
        }
        for layer, coeff, verdicts, flags in candidates
        for index, (verdict, flag) in enumerate(zip(verdicts, flags, strict=True))
    ]
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def best(*candidates):
    frame = scores(*candidates)
    return Sweep(frame, choose(frame)).best()


def test_the_highest_rate_is_chosen():
    found = best((None, 0.0, [0, 0], [0, 0]), (2, 1.0, [0, 1], [0, 0]), (4, 1.0, [1, 1], [0, 0]))
    assert (found.layer, found.coeff, found.rate) == (4, 1.0, 1.0)


def test_a_layer_that_degenerates_more_than_no_steering_is_out_however_well_it_follows():
    assert best((None, 0.0, [0, 0], [0, 0]), (2, 1.0, [1, 1], [0, 1]), (4, 1.0, [0, 1], [0, 0])).layer == 4


def test_a_layer_may_degenerate_as_often_as_no_steering_does():
    assert best((None, 0.0, [0, 0], [0, 1]), (2, 1.0, [1, 1], [1, 0])).layer == 2


def test_ties_go_to_no_steering_then_to_the_lowest_layer_then_to_the_first_coefficient():
    assert best((None, 0.0, [0, 1], [0, 0]), (2, 1.0, [1, 0], [0, 0])).layer is None
    tied = best(
        (None, 0.0, [0, 0], [0, 0]), (2, 1.0, [1, 0], [0, 0]), (2, 2.0, [1, 0], [0, 0]), (4, 1.0, [1, 0], [0, 0])
    )
    assert (tied.layer, tied.coeff) == (2, 1.0)


def test_no_steering_as_the_choice_is_an_empty_plan():
    vector = SteeringVector({0: torch.tensor([1.0, 0.0])})
    assert len(vector.at(Best(None, 0.0, "add"))) == 0


def test_best_wants_a_name_where_there_are_several_and_knows_only_what_was_searched():
    frame = pd.concat([scores((None, 0.0, [0], [0]), instruction=name) for name in ("a:a", "b:b")])
    found = Sweep(frame, choose(frame))
    assert found.best("a:a").layer is None
    with pytest.raises(SteerlensError, match="best\\(\\) needs the name of one of the searched instructions: a:a, b:b"):
        found.best()
    with pytest.raises(SteerlensError, match="did not cover 'c:c'"):
        found.best("c:c")


def test_candidate_layers_are_the_papers():
    assert candidate_layers(32) == list(range(6, 32, 2))
    assert candidate_layers(26) == list(range(5, 26, 2))


@pytest.fixture
def vector(llama):
    directions = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    return SteeringVector(dict(enumerate(directions)), proj_with=dict.fromkeys(range(4), 3.0))


@pytest.fixture
def pairs():
    return PairSet(InstructionPair(query, "Use no commas.", NO_COMMA) for query in ("Describe rain.", "Why?", "Go on."))


def test_every_candidate_is_what_the_same_plan_gives_on_its_own(llama, vector, pairs):
    found = sweep(llama.model, vector, pairs, layers=[1, 3], coeffs=[1.0, 2.0], max_new_tokens=8, batch_size=5)
    assert len(found.table) == 1 + 2 * 2
    for (layer, coeff), group in found.scores.dropna(subset=["layer"]).groupby(["layer", "coeff"]):
        alone = generate(
            llama.model,
            pairs.prompts("none"),
            steering=vector.at(int(layer), coeff=coeff),
            max_new_tokens=8,
            batch_size=1,
        )
        assert group["response"].tolist() == [row.text for row in alone]


def test_with_the_instruction_in_the_prompt_the_reference_has_it_too(llama, vector, pairs):
    found = sweep(llama.model, vector, pairs, layers=[1], condition="text+vector", max_new_tokens=4)
    assert set(found.scores["prompt"]) == set(pairs.prompts("text"))
    assert set(found.scores.loc[found.scores["layer"].isna(), "condition"]) == {"text"}


def test_all_layers_are_those_of_the_vector(llama, vector, pairs):
    found = sweep(llama.model, vector, pairs, layers="all", max_new_tokens=2)
    assert found.table["layer"].dropna().tolist() == [0, 1, 2, 3]


def test_the_choice_keeps_the_positions_and_the_unit_that_were_searched(llama, vector, pairs):
    normed = replace(vector, resid_norm=dict.fromkeys(range(4), 5.0))
    options = {"layers": [1], "coeffs": [0.5], "operators": "add", "positions": "last", "unit": "resid_norm"}
    found = sweep(llama.model, normed, pairs, max_new_tokens=3, **options)
    (step,) = normed.at(found.best(subject_to="layer == 1"))
    assert (str(step.positions), step.operator, step.coeff) == ("last", "add", 2.5)


def test_candidates_are_sorted_and_counted_once(llama, vector, pairs):
    found = sweep(llama.model, vector, pairs, layers=[3, 1, 3], coeffs=[2.0, 1.0, 2.0], max_new_tokens=2)
    steered = found.table.dropna(subset=["layer"])
    assert list(zip(steered["layer"], steered["coeff"], strict=True)) == [(1, 1.0), (1, 2.0), (3, 1.0), (3, 2.0)]
    assert (found.table["n"] == len(pairs)).all()


@pytest.mark.parametrize("nothing", [{"layers": []}, {"coeffs": []}, {"candidates": []}])
def test_a_search_without_candidates_is_refused_and_not_taken_for_no_steering(llama, vector, pairs, nothing):
    with pytest.raises(SteerlensError, match=r"a search needs a (layer|candidate)"):
        sweep(llama.model, vector, pairs, **nothing)


def test_the_papers_layers_must_be_in_the_vector(llama, vector, pairs):
    one_layer = SteeringVector({1: vector.directions[1]}, proj_with={1: 1.0})
    with pytest.raises(SteerlensError, match=r"needs a layer to try, got 'paper' for .* of \[1\]"):
        sweep(llama.model, one_layer, pairs, layers="paper")


def test_a_vector_of_another_model_is_refused(llama, vector, pairs):
    with pytest.raises(ModelError, match="must have this model's 4 layers, got 40"):
        sweep(llama.model, vector.with_metadata(n_layers="40"), pairs)


def test_bad_searches_are_refused_before_anything_is_generated(llama, vector, pairs, monkeypatch):
    monkeypatch.setattr("steerlens.study.responses.generate", None)
    with pytest.raises(DataError, match="a search needs at least one validation prompt"):
        sweep(llama.model, vector, PairSet([]))
    with pytest.raises(SteerlensError, match=r"layer must be in \[0, 4\), got 9"):
        sweep(llama.model, vector, pairs, layers=[9])
    with pytest.raises(DataError, match="every instruction needs a vector, got none for 'punctuation:no_comma'"):
        sweep(llama.model, {"a:b": vector}, pairs)


def test_operators_and_positions_are_searched_together_and_come_back_as_they_were(llama, vector, pairs):
    window = Window(-3, None, "generation")
    candidates = grid(layers=[2], operators=["add", "set_projection"], positions=["last", window])
    found = sweep(llama.model, vector, pairs, candidates=candidates, max_new_tokens=2)
    tried = found.table.dropna(subset=["layer"])
    assert tried[["operator", "positions"]].drop_duplicates().shape[0] == 4
    for candidate, row in zip(candidates, tried.to_dict("records"), strict=True):
        again = found.best(subject_to=f"operator == {row['operator']!r} and positions == {row['positions']!r}")
        assert vector.at(again).digest == vector.at(candidate).digest


def test_a_function_a_list_and_random_draws_are_specs_too(llama, vector, pairs):
    listed = [Candidate(1), Candidate(3, coeff=0.5)]
    by_list = sweep(llama.model, vector, pairs, candidates=listed, max_new_tokens=2)
    by_function = sweep(llama.model, vector, pairs, candidates=lambda v: listed, max_new_tokens=2)
    pd.testing.assert_frame_equal(by_list.scores, by_function.scores)
    drawn = draws(3, layers=vector.layers, coeff_range=(1.0, 4.0))
    random = sweep(llama.model, vector, pairs, candidates=drawn, max_new_tokens=2)
    assert random.table.dropna(subset=["layer"])["coeff"].tolist() == [one.coeff for one in drawn]


def test_the_best_may_be_asked_for_another_objective_under_conditions():
    frame = scores((None, 0.0, [0, 0], [0, 0]), (2, 1.0, [1, 1], [1, 1]), (4, 1.0, [0, 1], [0, 1]))
    found = Sweep(frame, choose(frame))
    assert found.best().layer is None
    assert found.best(subject_to="degenerate <= 0.5").layer == 4
    assert found.best(subject_to="n > 0").layer == 2
    assert found.best(objective="-degenerate", subject_to="rate > 0").layer == 4
    with pytest.raises(SteerlensError, match="no candidate meets 'rate > 2'"):
        found.best(subject_to="rate > 2")
    with pytest.raises(SteerlensError, match="subject_to must be a condition on the table's columns"):
        found.best(subject_to="speed > 2")
    with pytest.raises(SteerlensError, match="the objective must be a number in the table, got 'operator'"):
        found.best(objective="operator")


def test_the_front_is_over_all_instructions_and_trades_following_for_quality():
    frame = scores(
        (None, 0.0, [0, 0], [0, 0]), (2, 1.0, [1, 1], [1, 1]), (4, 1.0, [0, 1], [0, 1]), (5, 1.0, [0, 1], [1, 1])
    )
    front = Sweep(frame, choose(frame)).pareto(minimize=["degenerate"])
    assert [None if pd.isna(layer) else layer for layer in front["layer"]] == [None, 2, 4]


def test_nested_scores_are_chosen_on_other_prompts():
    """Layer 2 follows on the first half only, layer 4 on the second: what looks best on the rest fails where it is tried."""
    frame = scores((None, 0.0, [0] * 4, [0] * 4), (2, 1.0, [1, 1, 0, 0], [0] * 4), (4, 1.0, [0, 0, 1, 1], [0] * 4))
    sweep_ = Sweep(frame, choose(frame))
    nested = sweep_.nested(folds=4)
    assert sorted(nested["prompt"]) == ["0", "1", "2", "3"]
    for row in nested.to_dict("records"):
        others = frame[frame["prompt"] != row["prompt"]]
        chosen = choose(others)
        assert row["layer"] == chosen.loc[chosen["chosen"], "layer"].iloc[0]
    assert nested["followed"].mean() == 0.0 < sweep_.best().rate
    with pytest.raises(SteerlensError, match=r"folds must be in \[2, 4\]"):
        sweep_.nested(folds=5)


def test_nested_scores_deal_spellings_of_one_query_into_one_fold():
    frame = scores((None, 0.0, [0] * 6, [0] * 6), (2, 1.0, [1] * 6, [0] * 6))
    frame["query"] = frame["query"].map(
        dict(zip("012345", ["Caf\u00e9", "cafe\u0301", "B", "b ", "c", "C"], strict=True))
    )
    nested = Sweep(frame, choose(frame)).nested(folds=3)
    assert nested.groupby(nested["prompt"].astype(int) // 2)["fold"].nunique().tolist() == [1, 1, 1]
    with pytest.raises(SteerlensError, match=r"folds must be in \[2, 3\]"):
        Sweep(frame, choose(frame)).nested(folds=4)


def test_the_papers_gate_refuses_low_perplexity_and_needs_it_measured(llama, vector, pairs):
    frame = scores((None, 0.0, [0, 0], [0, 0]), (2, 1.0, [1, 1], [0, 0]), (4, 1.0, [0, 1], [0, 0]))
    for gate in ("low_perplexity", "no_low_perplexity"):
        with pytest.raises(DataError, match="needs the column 'low_perplexity'"):
            choose(frame, gate)
        looping = frame.assign(low_perplexity=frame["layer"].eq(2).fillna(False).astype(bool))
        table = choose(looping, gate)
        assert table.loc[table["chosen"], "layer"].tolist() == [4]
    # Where unsteered answers loop as well, the base model's gate allows as much, the instruction-tuned model's none.
    always = frame.assign(low_perplexity=True)
    assert choose(always, "low_perplexity").query("chosen")["layer"].tolist() == [2]
    assert choose(always, "no_low_perplexity").query("chosen")["layer"].isna().tolist() == [True]
    found = sweep(llama.model, vector, pairs, layers=[1], gate="low_perplexity", max_new_tokens=4)
    assert found.scores["low_perplexity"].tolist() == (found.scores["perplexity"] < 2.5).tolist()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"gate": "low_perplexity", "quality": Quality(perplexity=False)}, "gate must be"),
        ({"trials": 0}, "trials must be at least 1"),
    ],
)
def test_a_search_that_cannot_be_chosen_from_is_refused_before_anything_is_generated(
    llama, vector, pairs, bad, message, monkeypatch
):
    monkeypatch.setattr("steerlens.study.responses.generate", None)
    sampler = responses.Sampler(llama.model)
    with pytest.raises(SteerlensError, match=message):
        sweep(sampler, vector, pairs, candidates=[Candidate(1)], **bad)


def test_a_sampler_searches_as_its_model_does_and_keeps_its_own_settings(llama, vector, pairs, tmp_path):
    options = {"layers": [1, 3], "coeffs": [0.5, 1.0]}
    by_model = sweep(llama.model, vector, pairs, max_new_tokens=5, stop="e", **options)
    sampler = Sampler(llama.model, max_new_tokens=5, stop="e")
    by_sampler = sweep(sampler, vector, pairs, **options)
    pd.testing.assert_frame_equal(by_sampler.scores, by_model.scores)
    assert not by_model.scores["response"].str.contains("e").any()
    assert len(sampler.records) == len(by_model.scores)
    for given in ({"max_new_tokens": 4}, {"batch_size": 2}, {"out": tmp_path}):
        with pytest.raises(
            SteerlensError, match=f"a sampler has settings .* of its own, got {next(iter(given))} as well"
        ):
            sweep(sampler, vector, pairs, **options, **given)


@pytest.mark.parametrize(
    ("gate", "quality_model", "measured"),
    [("degenerate", None, False), ("degenerate", "tiny", True), ("low_perplexity", None, True)],
)
def test_a_search_measures_perplexity_where_its_gate_or_a_model_named_for_it_asks(gate, quality_model, measured):
    assert Quality.for_gate(gate, quality_model) == Quality(perplexity=measured, quality_model=quality_model)


def test_a_folder_says_what_was_searched_and_keeps_no_results_of_another_search(
    llama, vector, pairs, tmp_path, monkeypatch
):
    sweep(llama.model, vector, pairs, layers=[1], max_new_tokens=4, out=tmp_path)
    first = json.loads((tmp_path / "config.json").read_text())
    assert first["sampling"]["max_new_tokens"] == 4
    sweep(llama.model, vector, pairs, layers=[1], max_new_tokens=4, out=tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == first
    monkeypatch.setattr(
        "steerlens.study.sweeps.score", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        sweep(llama.model, vector, pairs, layers=[1], max_new_tokens=5, out=tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["identity"] != first["identity"]
    assert not (tmp_path / "table.csv").exists()
    assert (tmp_path / "generations.jsonl").stat().st_size


def test_what_nothing_can_check_is_refused_before_anything_is_generated(llama, vector, monkeypatch):
    monkeypatch.setattr("steerlens.study.responses.generate", None)
    unknown = PairSet([InstructionPair("Describe rain.", "Rhyme.", "poetry:rhyme")])
    with pytest.raises(SteerlensError, match="unknown instruction"):
        sweep(llama.model, vector, unknown, layers=[1], max_new_tokens=4)


def test_candidates_that_not_every_instruction_tried_are_not_on_the_front():
    hard = scores((None, 0.0, [0, 0], [0, 0]), (2, 1.0, [0, 1], [0, 0]), instruction="a:hard")
    easy = scores((None, 0.0, [0, 0], [0, 0]), (2, 1.0, [0, 1], [0, 0]), (4, 1.0, [1, 1], [0, 0]), instruction="a:easy")
    frame = pd.concat([hard, easy], ignore_index=True)
    found = Sweep(frame, choose(frame))
    assert found.configurations.set_index("layer")["n_instructions"].to_dict()[4] == 1
    assert 4 not in found.pareto()["layer"].tolist()


def test_trials_are_rows_of_their_own_and_their_spread_is_reported(llama, vector, pairs):
    options = {"layers": [1], "temperature": 1.0, "max_new_tokens": 6}
    one, three = (sweep(llama.model, vector, pairs, trials=trials, **options) for trials in (1, 3))
    assert len(three.scores) == 3 * len(one.scores)
    first = three.scores[three.scores["trial"] == 0].reset_index(drop=True)
    assert first["response"].tolist() == one.scores["response"].tolist()
    assert (three.table["n_trials"] == 3).all()
    assert three.table["trial_sd"].notna().all()
    assert one.table["trial_sd"].isna().all()


def test_a_sweep_with_a_folder_goes_on_where_it_was_cut_short(llama, vector, pairs, tmp_path, monkeypatch):
    options = {"layers": [1, 3], "coeffs": [1.0, 2.0], "max_new_tokens": 6, "batch_size": 4}

    def ask(folder):
        return sweep(llama.model, vector, pairs, out=folder, **options)

    whole = assert_goes_on(ask, tmp_path, monkeypatch, kept_rows=8, files=("scores.jsonl", "table.csv"))
    lines = (tmp_path / "cut" / "generations.jsonl").read_text().count("\n")
    more = sweep(llama.model, vector, pairs, out=tmp_path / "cut", **{**options, "layers": [1, 2, 3]})
    assert len(more.table) == len(whole.table) + 2
    assert (tmp_path / "cut" / "generations.jsonl").read_text().count("\n") == lines + 2 * len(pairs)


def test_a_sweep_is_a_sequence_of_candidates_that_a_vector_takes(llama, vector, pairs):
    found = sweep(llama.model, vector, pairs, layers=[1, 3], max_new_tokens=2)
    assert len(found) == len(list(found)) == 3
    assert [one.layer for one in found] == [None, 1, 3]
    assert vector.at(found[-1]).layers == (3,)
    assert [one.rate for one in found[:2]] == found.table["rate"].tolist()[:2]
    assert repr(found).startswith(f"Sweep(3 candidates, 9 responses; {NO_COMMA}: ")
    assert "\n" not in repr(found)
    pd.testing.assert_frame_equal(found.to_frame(), found.table)


def test_a_sweep_loads_from_its_folder_with_its_gate(llama, vector, pairs, tmp_path):
    options = {"layers": [1, 3], "max_new_tokens": 4, "gate": "no_low_perplexity", "out": tmp_path}
    found = sweep(llama.model, vector, pairs, **options)
    with pytest.raises(DataError, match=r"got that of a sweep, .*; use Sweep\.load"):
        Evaluation.load(tmp_path)
    read = Sweep.load(tmp_path)
    assert read.gate == "no_low_perplexity"
    pd.testing.assert_frame_equal(read.scores, found.scores, atol=1e-9)
    pd.testing.assert_frame_equal(read.table, found.table, atol=1e-9)
    assert read.best() == found.best()
    (tmp_path / "table.csv").unlink()
    with pytest.raises(DataError, match=r"must hold table\.csv with its gate"):
        Sweep.load(tmp_path)


@pytest.mark.parametrize(
    "layers", [np.array([3, 1]), torch.tensor([3, 1]), pd.Series([1.0, 3.0]), range(1, 4, 2)], ids=repr
)
def test_layers_and_coefficients_may_be_arrays(llama, vector, pairs, layers, tmp_path):
    options = {"layers": layers, "coeffs": np.array([1.0], dtype=np.float32), "max_new_tokens": 2}
    found = sweep(llama.model, vector, pairs, seed=np.int64(0), trials=np.int64(1), out=tmp_path, **options)
    assert found.table["layer"].dropna().tolist() == [1, 3]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("some", 'layers must be numbers, "paper" or "all", got \'some\''),
        ([1.5], "layer must be a whole number, got 1.5"),
    ],
)
def test_layers_that_are_none_are_refused(llama, vector, pairs, layers, message):
    with pytest.raises(SteerlensError, match=message):
        unchecked(sweep)(llama.model, vector, pairs, layers=layers)


def test_the_strengths_of_a_method_are_searched_with_the_instruction_in_the_prompt(llama, pairs):
    found = sweep(llama.model, spotlight, pairs, coeffs=[0.5, 0.2], max_new_tokens=4)
    assert found.table[["coeff", "operator"]].values.tolist() == [[0.0, "set_projection"], [0.5, "mass"], [0.2, "mass"]]
    assert found.table["layer"].isna().all()
    expected = generate(
        llama.model, pairs.prompts("text"), steering=[spotlight(0.5).on(pair) for pair in pairs], max_new_tokens=4
    )
    assert found.scores.query("coeff == 0.5")["response"].tolist() == expected.texts
    assert found.plot().layout.xaxis.ticktext == ("0.2", "0.5")


def test_what_is_put_around_candidates_steers_with_them_and_is_another_sweep(llama, vector, pairs, tmp_path):
    options = {"layers": [1], "operators": "add", "coeffs": [40.0], "max_new_tokens": 4}
    plain = sweep(llama.model, vector, pairs, **options)
    gated = sweep(llama.model, vector, pairs, around=plausible, out=tmp_path, **options)
    assert gated.table["layer"].tolist() == plain.table["layer"].tolist()
    assert gated.scores.query("layer == 1")["response"].tolist() == [
        one.text
        for one in generate(
            llama.model,
            pairs.prompts("none"),
            steering=plausible(vector.at(1, operator="add", coeff=40.0)),
            max_new_tokens=4,
        )
    ]
    assert gated.table["gate_accepted"].notna().tolist() == [False, True]
    assert "gate_accepted" not in plain.table
    identity = json.loads((tmp_path / "config.json").read_text())["identity"]
    sweep(llama.model, vector, pairs, out=tmp_path, **options)
    assert json.loads((tmp_path / "config.json").read_text())["identity"] != identity


def test_a_gated_method_is_searched_too(llama, pairs):
    found = sweep(llama.model, pasta, pairs, coeffs=[0.1], around=plausible, max_new_tokens=2)
    assert found.scores["plan"].str.startswith("if plausible").tolist() == [False] * len(pairs) + [True] * len(pairs)
