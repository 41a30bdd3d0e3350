"""Methods of steering beside each other: what is asked of each, what is chosen, compared and timed, what a folder gives back."""

import pandas as pd
import pytest

import steerlens as sl
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import DataError, SteerlensError
from steerlens.stats.comparisons import holm
from steerlens.stats.rates import wilson_interval
from steerlens.steering.interventions import Intervention
from steerlens.steering.plan import Plan
from steerlens.study.methods import MethodComparison, Setting, compare_methods, measure_speed, swept
from steerlens.study.scores import Evaluation
from tests.steps import unit
from tests.study.cut_short import assert_goes_on
from tests.unchecked import unchecked

TITLE, LOWER = "detectable_format:title", "change_case:english_lowercase"


WORDS = {TITLE: "Give it a title.", LOWER: "No capitals."}
QUERIES = ["Describe rain.", "Name a fox.", "What is iron?", "What is snow?", "Name a city."]


def asked(queries):
    return PairSet(InstructionPair(query, text, name) for query in queries for name, text in WORDS.items())


@pytest.fixture
def pairs():
    return asked(QUERIES)


@pytest.fixture
def parts():
    return asked(QUERIES[:3]), asked(QUERIES[3:])


def step(layer=1, width=32, coeff=4.0):
    return Plan((Intervention(layer, unit(layer, width), "add", coeff=coeff),))


# --- what is asked -------------------------------------------------------------------------------------------------


def test_the_instruction_stands_in_the_prompt_where_attention_needs_it_or_a_setting_says_so(pairs):
    settings = {
        "vector": Setting(step()),
        "text+vector": Setting(step(), with_text=True),
        "text+attention": Setting(sl.pasta(10, scale="include")),
        "text+vector+attention": Setting(step() + sl.spotlight(0.2)),
        "none": Setting(Plan()),
        "text": Setting(Plan(), with_text=True),
    }
    for condition, setting in settings.items():
        (request,) = setting.requests(pairs[:1])
        assert request.condition == condition
        assert request.prompt == (pairs[0].prompt if "text" in condition else pairs[0].query)
        assert not request.plan.unbound
    assert [one.requests(pairs[:1], control=True)[0].condition for one in settings.values()] == [
        *("random", "text+random", "text+random", "text+random", "none", "text")
    ]


def test_a_plan_may_be_that_of_the_instruction_or_made_of_the_pair(pairs):
    plans = {TITLE: step(1), LOWER: step(2)}
    by_id = Setting(plans).requests(pairs)
    by_pair = Setting(lambda pair: plans[pair.instruction_id]).requests(pairs)
    assert [request.plan.layers for request in by_id] == [request.plan.layers for request in by_pair]
    assert {request.plan.layers for request in by_id} == {(1,), (2,)}


def test_what_cannot_be_compared_is_refused_in_a_sentence(llama, pairs):
    cases = {
        "and none and text are always part of it": {"none": sl.pasta(10, scale="include")},
        "needs methods": {},
        "settings with names that differ": {"PASTA": [Setting(Plan(), "a"), Setting(Plan(), "a")]},
        "attention is steered towards the instruction in the prompt": {"a": [Setting(sl.pasta(0.1), with_text=False)]},
        "every instruction needs a plan": {"a": {TITLE: step()}},
    }
    for sentence, methods in cases.items():
        with pytest.raises(SteerlensError, match=sentence):
            compare_methods(llama.model, methods, pairs[:2], max_new_tokens=2)
    with pytest.raises(DataError, match="at least one prompt"):
        compare_methods(llama.model, {"a": step()}, pairs[:0])
    with pytest.raises(SteerlensError, match="verdict must be loose or strict"):
        unchecked(compare_methods)(llama.model, {"a": step()}, pairs[:2], verdict="lenient")
    with pytest.raises(SteerlensError, match="strength must be a finite number"):
        Setting(Plan(), strength=float("inf"))


def test_responses_are_those_that_an_evaluation_gives(llama, pairs):
    plan, test = step(), pairs[:3]
    found = compare_methods(llama.model, {"vector": plan}, test, max_new_tokens=6).scores
    wanted = sl.evaluate(llama.model, plan, test, conditions=["none", "text", "vector", "random"], max_new_tokens=6)
    label = found["method"].where(~found["control"], "random")
    for condition, rows in wanted.scores.groupby("condition"):
        assert found.loc[label == condition, "response"].tolist() == rows["response"].tolist()


# --- what is made of it --------------------------------------------------------------------------------------------


def scores(*rows):
    """Made-up scores: (split, method, setting, control, verdicts, degenerate), a prompt per verdict."""
    found = [
        {
            "split": split, "method": method, "setting": setting, "strength": float("nan"), "control": control,
            "instruction": "a:b", "prompt_id": f"{split} {number}", "query": f"{split} {number}", "trial": 0,
            "condition": "x", "followed": True, "followed_strict": bool(verdict), "degenerate": number < degenerate,
            "n_words": 3, "repetition": 0.0, "distinct_2": 1.0, "perplexity": perplexity, "finish_reason": "eos",
        }
        for split, method, setting, control, verdicts, degenerate, perplexity in rows
        for number, verdict in enumerate(verdicts)
    ]  # fmt: skip
    return pd.DataFrame(found)


MADE = scores(
    ("valid", "text", "", False, (1, 0, 0), 1, 2.0),
    ("valid", "a", "weak", False, (1, 1, 0), 1, 2.0),
    ("valid", "a", "strong", False, (1, 1, 0), 1, 2.0),
    ("valid", "a", "looping", False, (1, 1, 1), 2, 1.0),
    ("valid", "b", "broken", False, (1, 1, 1), 3, 2.0),
    ("valid", "b", "less", False, (0, 0, 0), 2, 2.0),
    ("test", "text", "", False, (1, 0, 0, 0), 0, 2.0),
    ("test", "a", "weak", False, (1, 1, 1, 0), 0, 4.0),
    ("test", "a", "strong", False, (1, 1, 1, 1), 0, 8.0),
    ("test", "a", "looping", False, (1, 1, 1, 1), 2, 1.0),
    ("test", "b", "broken", False, (0, 0, 0, 0), 4, 9.0),
    ("test", "b", "less", False, (0, 1, 0, 0), 0, 9.0),
    ("test", "a", "weak", True, (1, 1, 0, 0), 0, 4.0),
)


def row(table, **where):
    for name, value in where.items():
        table = table[table[name] == value]
    (found,) = table.to_dict("records")
    return found


def test_the_first_of_the_best_settings_on_validation_prompts_that_breaks_no_more_than_the_instruction_is_chosen():
    found = MethodComparison.of(MADE, "strict")
    assert found.table.loc[found.table["chosen"], ["method", "setting"]].to_numpy().tolist() == [
        ["text", ""], ["a", "weak"], ["b", "less"],
    ]  # fmt: skip
    assert row(found.table, method="a", setting="weak", control=False)["valid_rate"] == pytest.approx(2 / 3)


def test_rates_are_those_of_the_verdict_on_the_test_prompts_and_the_other_verdict_stands_beside():
    strict, loose = (
        row(MethodComparison.of(MADE, one).table, method="a", setting="weak", control=False)
        for one in ("strict", "loose")
    )
    assert (strict["n"], strict["rate"], strict["strict"], strict["loose"]) == (4, 0.75, 0.75, 1.0)
    assert (strict["low"], strict["high"]) == wilson_interval(3, 4)
    assert (loose["rate"], loose["strict"], loose["loose"]) == (1.0, 0.75, 1.0)
    assert strict["quality"] == pytest.approx(-pd.Series([4.0]).apply("log").item())


def test_the_front_leaves_out_what_breaks_more_often_than_the_instruction():
    table = MethodComparison.of(MADE, "strict").table
    assert table.loc[table["pareto"], "setting"].tolist() == ["", "weak", "strong"]


def test_chosen_settings_stand_beside_the_instruction_and_their_own_control_with_holms_correction():
    found = MethodComparison.of(MADE, "strict").comparisons
    a, b = (row(found, baseline="text", method=name) for name in ("a", "b"))
    assert (a["setting"], a["gained"], a["lost"], a["test"]) == ("weak", 2, 0, "mcnemar exact")
    assert (b["setting"], b["gained"], b["lost"]) == ("less", 1, 1)
    assert [a["p_holm"], b["p_holm"]] == holm([a["p_value"], b["p_value"]]).tolist()
    control = row(found, baseline="control")
    assert (control["method"], control["gained"], control["lost"]) == ("a", 1, 0)


def test_without_validation_every_setting_is_compared_and_an_only_one_needs_no_choice():
    found = MethodComparison.of(MADE[MADE["split"] == "test"], "strict")
    assert len(found.validation) == 0
    assert found.table.loc[found.table["chosen"], "method"].tolist() == ["text"]
    assert found.comparisons.query("baseline == 'text'")["setting"].tolist() == [
        "weak",
        "strong",
        "looping",
        "broken",
        "less",
    ]


# --- files, time and picture ---------------------------------------------------------------------------------------


def methods():
    return {"PASTA": swept(sl.pasta, [2, 50], "alpha", scale="include"), "gated": sl.plausible(step(), beta=0.9)}


def test_a_comparison_that_was_cut_short_goes_on_and_reads_back_from_its_folder(llama, parts, tmp_path, monkeypatch):
    test, valid = parts

    def ask(folder):
        options = {"valid": valid, "verdict": "strict", "out": folder, "batch_size": 8, "max_new_tokens": 5}
        return compare_methods(llama.model, methods(), test, **options)

    files = ["scores.jsonl", "table.csv", "comparisons.csv"]
    found = assert_goes_on(ask, tmp_path, monkeypatch, kept_rows=16, files=files)
    again = MethodComparison.load(tmp_path / "whole")
    pd.testing.assert_frame_equal(again.table, found.table, check_dtype=False)
    pd.testing.assert_frame_equal(again.comparisons, found.comparisons, check_dtype=False)
    assert repr(again) == repr(found)
    with pytest.raises(DataError, match="its verdict"):
        MethodComparison.load(tmp_path)
    only = (found.scores["method"] == "none") & (found.scores["split"] == "test")
    Evaluation(found.scores[only]).save(tmp_path / "other")
    with pytest.raises(DataError, match="its verdict"):
        MethodComparison.load(tmp_path / "other")


def test_chosen_settings_are_timed_and_the_picture_shows_every_setting(llama, parts):
    found = compare_methods(llama.model, methods(), parts[0], valid=parts[1], rounds=1, max_new_tokens=4)
    timed = found.table.dropna(subset=["tokens_per_second"])
    assert timed["method"].tolist() == found.table.loc[found.table["chosen"], "method"].tolist()
    assert (timed[["tokens_per_second", "first_token"]] > 0).all(axis=None)
    figure = found.plot(title="Methods")
    assert {"PASTA", "gated", "none", "text"} <= {trace.name for trace in figure.data}
    untimed = MethodComparison.of(found.scores, found.verdict)
    assert "tokens_per_second" not in untimed.table
    assert untimed.plot().data


def test_the_speed_of_a_run_counts_its_tokens(llama):
    runs = {("one", ""): [("Describe rain.", Plan())], ("two", "x"): [("Describe rain.", step())] * 2}
    found = measure_speed(llama.model, runs, max_new_tokens=3, rounds=2)
    assert found[["method", "setting"]].to_numpy().tolist() == [["one", ""], ["two", "x"]]
    assert (found["tokens_per_second"] > 0).all()
