"""Search: candidates, eligibility, ties, and the choice."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from steerlens.data import InstructionPair, PairSet
from steerlens.errors import DataError, ModelError, SteerlensError
from steerlens.sampling import generate
from steerlens.sweeps import Best, Sweep, candidate_layers, choose, sweep
from steerlens.vectors import SteeringVector

NO_COMMA = "punctuation:no_comma"


def scores(*candidates, instruction="x:y"):
    """Made-up scores: each candidate is (layer, coeff, verdicts, degenerate flags)."""
    rows = [
        {
            "instruction": instruction,
            "layer": layer,
            "coeff": coeff,
            "operator": "add",
            "followed": bool(verdict),
            "degenerate": bool(flag),
            "n_words": 3,
            "repetition": 0.0,
            "distinct_2": 1.0,
            "perplexity": float("nan"),
            "finish_reason": "eos",
        }
        for layer, coeff, verdicts, flags in candidates
        for verdict, flag in zip(verdicts, flags, strict=True)
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
    assert len(vector.at(Best(None, 0.0, "add", 0.0))) == 0


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
    options = {"layers": [1], "coeffs": [0.5], "operator": "add", "positions": "last", "unit": "resid_norm"}
    found = sweep(llama.model, normed, pairs, max_new_tokens=3, **options)
    chosen = replace(found.best(), layer=1, coeff=0.5)
    (step,) = normed.at(chosen)
    assert (str(step.positions), step.operator, step.coeff) == ("last", "add", 2.5)


def test_candidates_are_sorted_and_counted_once(llama, vector, pairs):
    found = sweep(llama.model, vector, pairs, layers=[3, 1, 3], coeffs=[2.0, 1.0, 2.0], max_new_tokens=2)
    steered = found.table.dropna(subset=["layer"])
    assert list(zip(steered["layer"], steered["coeff"], strict=True)) == [(1, 1.0), (1, 2.0), (3, 1.0), (3, 2.0)]
    assert (found.table["n"] == len(pairs)).all()


@pytest.mark.parametrize("nothing", [{"layers": []}, {"coeffs": []}])
def test_a_search_without_candidates_is_refused_and_not_taken_for_no_steering(llama, vector, pairs, nothing):
    with pytest.raises(SteerlensError, match="a search needs a layer and a coefficient to try"):
        sweep(llama.model, vector, pairs, **nothing)


def test_the_papers_layers_must_be_in_the_vector(llama, vector, pairs):
    one_layer = SteeringVector({1: vector.directions[1]}, proj_with={1: 1.0})
    with pytest.raises(SteerlensError, match=r"for a vector with layers \[1\]"):
        sweep(llama.model, one_layer, pairs, layers="paper")


def test_a_vector_of_another_model_is_refused(llama, vector, pairs):
    with pytest.raises(ModelError, match="must have this model's 4 layers, got 40"):
        sweep(llama.model, vector.with_metadata(n_layers="40"), pairs)


def test_bad_searches_are_refused_before_anything_is_generated(llama, vector, pairs, monkeypatch):
    monkeypatch.setattr("steerlens.evaluation.stream", None)
    with pytest.raises(DataError, match="a search needs at least one validation prompt"):
        sweep(llama.model, vector, PairSet([]))
    with pytest.raises(SteerlensError, match=r"layer must be in \[0, 4\), got 9"):
        sweep(llama.model, vector, pairs, layers=[9])
    with pytest.raises(DataError, match="every instruction needs a vector, got none for 'punctuation:no_comma'"):
        sweep(llama.model, {"a:b": vector}, pairs)
