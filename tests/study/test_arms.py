"""What a study of layers makes of its responses: controls, tables, comparisons, files."""

import json
from functools import partial

import pandas as pd
import pytest
import torch

from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import DataError
from steerlens.stats.comparisons import tango_interval
from steerlens.stats.rates import wilson_interval
from steerlens.steering.interventions import Intervention
from steerlens.steering.operators import rank_one
from steerlens.steering.plan import Plan
from steerlens.study.arms import LayerStudy, randomly_ablated
from steerlens.study.layers import necessity, steer_by_layer, transfer_between_layers
from steerlens.study.scores import Evaluation
from steerlens.study.sweeps import Sweep
from steerlens.vectors.vector import SteeringVector
from tests.steps import unit
from tests.study.cut_short import assert_goes_on

NO_COMMA, CAPITAL = "punctuation:no_comma", "change_case:english_capital"


# --- controls ------------------------------------------------------------------------------------------------------


def test_a_random_ablation_takes_away_what_the_placebo_writes_along():
    plan = Plan(tuple(Intervention(layer, unit(layer), "set_projection", target=5.0) for layer in range(3)))
    found = randomly_ablated(plan, 4)
    for step, control in zip(found, plan.placebo(seed=4), strict=True):
        assert torch.equal(step.direction, control.write)
        assert (step.operator, step.coeff, step.write, step.layer) == ("ablate", 1.0, None, control.layer)
        resid = rank_one(unit(9), step.direction, step.direction, *step.affine)
        assert abs(float(resid @ step.direction)) < 1e-6


# --- tables --------------------------------------------------------------------------------------------------------


def scores(kind, *rows):
    """Made-up scores: each row is (instruction, place, layer, condition, verdicts), a prompt per verdict."""
    first = {"steering": "mode", "necessity": "window", "transfer": "from_layer"}[kind]
    found = [
        {
            "instruction": instruction,
            first: place,
            "layer": layer,
            "condition": condition,
            "prompt_id": f"{instruction} {number}",
            "prompt": str(number),
            "query": str(number),
            "trial": 0,
            "followed": bool(verdict),
            "degenerate": False,
            "n_words": 3,
            "repetition": 0.0,
            "distinct_2": 1.0,
            "perplexity": float("nan"),
            "finish_reason": "eos",
        }
        for instruction, place, layer, condition, verdicts in rows
        for number, verdict in enumerate(verdicts)
    ]
    return pd.DataFrame(found).astype({"layer": "Int64"})


def needed(name, ablated=(0, 0, 1, 0)):
    text, none = (1, 1, 1, 0), (0, 0, 0, 0)
    return [
        (name, None, None, "none", none),
        (name, None, None, "text", text),
        (name, "1", 2, "text+vector", ablated),
        (name, "1", 2, "random", text),
        (name, "1", 2, "random ablated", (1, 1, 0, 1)),
    ]


def row(table, **where):
    for name, value in where.items():
        table = table[table[name].isna() if value is None else table[name] == value]
    (found,) = table.to_dict("records")
    return found


def test_a_loss_is_the_paired_difference_to_the_text_with_tangos_interval():
    study = LayerStudy.of(scores("necessity", *needed("a:a")), "necessity")
    ablated = row(study.table, condition="text+vector")
    low, high = tango_interval(4, gained=0, lost=2)
    assert (ablated["loss"], ablated["loss_low"], ablated["loss_high"]) == pytest.approx((0.5, -high, -low))
    assert row(study.table, condition="random")["loss"] == 0.0
    assert row(study.table, condition="random ablated")["loss"] == 0.0  # one lost, one gained
    assert pd.isna(row(study.table, condition="text")["loss"])
    beyond = row(study.comparisons, baseline="random", condition="text+vector")
    assert (beyond["difference"], beyond["lost"], beyond["gained"]) == (-0.5, 2, 0)
    assert len(study.comparisons) == 5


def test_rates_have_their_intervals_over_queries_and_all_instructions_stand_together():
    study = LayerStudy.of(scores("necessity", *needed("a:a"), *needed("b:b", (1, 1, 1, 1))), "necessity")
    assert set(study.table["instruction"]) == {"a:a", "b:b", "all"}
    single = row(study.table, instruction="a:a", condition="text+vector")
    assert (single["n"], single["low"], single["high"]) == (4, *wilson_interval(1, 4))
    together = row(study.table, instruction="all", condition="text")
    # Both instructions follow on the same three of four queries: eight responses are worth the four queries.
    assert (together["n"], together["rate"]) == (8, 0.75)
    assert (together["low"], together["high"]) == pytest.approx(wilson_interval(3, 4))
    both = row(study.comparisons, instruction="all", baseline="text", condition="text+vector")
    assert (both["n"], both["n_prompts"], both["test"]) == (8, 4, "sign flip")


def test_instructions_stand_together_only_in_cells_that_all_of_them_have():
    rows = [*needed("a:a"), *needed("b:b"), ("b:b", "1", 3, "text+vector", (0, 0, 0, 0))]
    study = LayerStudy.of(scores("necessity", *rows), "necessity")
    assert set(study.table.loc[study.table["instruction"] == "all", "layer"].dropna()) == {2}
    assert set(study.table.loc[study.table["instruction"] == "b:b", "layer"].dropna()) == {2, 3}


def test_a_transfers_control_stands_beside_every_direction_at_its_layer():
    rows = [
        ("a:a", None, None, "none", (0, 0)),
        ("a:a", 1, 1, "vector", (1, 1)),
        ("a:a", 2, 1, "vector", (1, 0)),
        ("a:a", None, 1, "random", (0, 1)),
        ("a:a", 2, 2, "vector", (0, 0)),
        ("a:a", None, 2, "random", (1, 1)),
    ]
    frame = scores("transfer", *rows).astype({"from_layer": "Int64"})
    found = LayerStudy.of(frame, "transfer").comparisons
    against = found[found["baseline"] == "random"].set_index(["from_layer", "layer"])
    assert against["difference"].to_dict() == {(1, 1): 0.5, (2, 1): 0.0, (2, 2): -1.0}
    assert against["lost"].to_dict() == {(1, 1): 0, (2, 1): 1, (2, 2): 2}


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def vector(llama):
    directions = 3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    known = dict.fromkeys(range(4), 3.0)
    return SteeringVector(dict(enumerate(directions)), proj_with=known, proj_without=dict.fromkeys(range(4), 0.0))


@pytest.fixture
def pairs():
    return PairSet(
        InstructionPair(query, *text)
        for query in ("Describe rain.", "Why?")
        for text in (("Use no commas.", NO_COMMA), ("Use capitals.", CAPITAL))
    )


STUDIES = [
    partial(steer_by_layer, modes=["alone", "from"]),
    partial(necessity, windows=[1, "all"]),
    transfer_between_layers,
]


@pytest.mark.parametrize("study", STUDIES, ids=["steering", "necessity", "transfer"])
def test_a_study_with_a_folder_goes_on_where_it_was_cut_short(llama, vector, pairs, tmp_path, monkeypatch, study):
    def ask(folder):
        return study(llama.model, vector, pairs, out=folder, layers=[1, 2], max_new_tokens=4, batch_size=8)

    files = ("scores.jsonl", "table.csv", "comparisons.csv")
    assert_goes_on(ask, tmp_path, monkeypatch, kept_rows=16, files=files)


@pytest.mark.parametrize("study", STUDIES, ids=["steering", "necessity", "transfer"])
def test_a_study_loads_from_its_folder_as_it_was_and_as_nothing_else(llama, vector, pairs, tmp_path, study):
    found = study(llama.model, vector, pairs, layers=[1, 2], max_new_tokens=4, out=tmp_path)
    read = LayerStudy.load(tmp_path)
    assert read.kind == found.kind
    for name in ("table", "scores", "comparisons"):
        pd.testing.assert_frame_equal(getattr(read, name), getattr(found, name), atol=1e-9)
    assert json.loads((tmp_path / "config.json").read_text())["kind"] == f"{found.kind} study"
    with pytest.raises(DataError, match=r"got that of a study of layers, .*; use LayerStudy\.load"):
        Evaluation.load(tmp_path)
    with pytest.raises(DataError, match=r"must hold table\.csv with its gate"):
        Sweep.load(tmp_path)
    other = next(one for one in STUDIES if one is not study)
    with pytest.raises(DataError, match=rf"a folder holds one kind of results, and .* holds a {found.kind} study"):
        other(llama.model, vector, pairs, layers=[1, 2], max_new_tokens=4, out=tmp_path)
    (tmp_path / "table.csv").unlink()
    with pytest.raises(DataError, match=r"must hold table\.csv with its study, got .*; let the study finish"):
        LayerStudy.load(tmp_path)


def test_a_study_shows_itself_in_one_line_and_as_a_table(llama, vector, pairs):
    found = transfer_between_layers(llama.model, vector, pairs, layers=[1], max_new_tokens=2)
    assert repr(found).startswith(
        "LayerStudy(transfer: 16 responses, 2 instructions, 3 cells; followed in the mean: none "
    )
    assert "\n" not in repr(found)
    assert "<table" in found._repr_html_()
    pd.testing.assert_frame_equal(found.to_frame(), found.table)
    assert found.plot(title="Mine").layout.title.text == "Mine"
