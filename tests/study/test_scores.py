"""Requests, cells, scores and their keys."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from steerlens.data.conditions import CONDITIONS
from steerlens.data.pairs import InstructionPair, PairSet, pair_set
from steerlens.errors import DataError, SteerlensError
from steerlens.files import Journal
from steerlens.models.lean import Tree
from steerlens.models.prompts import encode
from steerlens.models.rows import length_sorted_batches
from steerlens.steering.attention import pasta
from steerlens.steering.interventions import Intervention
from steerlens.steering.plan import Plan
from steerlens.steering.settings import SamplingConfig
from steerlens.study.quality import mean_log_probabilities
from steerlens.study.responses import Sampler, requests_for
from steerlens.study.scores import Evaluation, evaluate, is_degenerate, plan_columns, score
from steerlens.study.sweeps import sweep
from steerlens.vectors.vector import SteeringVector
from tests.unchecked import unchecked

CAPITAL = "change_case:english_capital"
NO_COMMA = "punctuation:no_comma"


@pytest.fixture
def pairs():
    queries = ("Describe rain.", "Why is it so?", "Name a bird.")
    return PairSet(
        InstructionPair(query, text, name)
        for query in queries
        for text, name in (("Use capitals.", CAPITAL), ("Use no commas.", NO_COMMA))
    )


@pytest.fixture
def plan():
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    return Plan((Intervention(1, direction / direction.norm(), "add", coeff=4.0),))


@pytest.mark.parametrize("trials", [0, -1])
def test_no_trials_are_refused_as_such(llama, pairs, plan, trials):
    with pytest.raises(DataError, match=f"trials must be at least 1, got {trials}"):
        requests_for(pairs, plan, trials=trials)
    with pytest.raises(DataError, match=f"trials must be at least 1, got {trials}"):
        evaluate(llama.model, plan, pairs, trials=trials)


def test_results_go_to_the_home_folder_where_a_tilde_says_so(llama, pairs, plan, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    found = evaluate(llama.model, plan, pairs[:1], conditions=["none"], max_new_tokens=2, out="~/cells")
    assert len(Evaluation.load("~/cells").scores) == len(found.scores)
    assert (tmp_path / "home" / "cells" / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_each_cell_gets_its_prompt_and_its_plan(pairs, plan):
    requests = {request.condition: request for request in requests_for(pairs[:1], plan)}
    assert set(requests) == set(CONDITIONS)
    bare = {condition for condition, request in requests.items() if request.prompt == "Describe rain."}
    assert bare == {"none", "vector", "random"}
    assert requests["text"].prompt == requests["text+vector"].prompt == "Describe rain. Use capitals."
    assert requests["vector"].plan is plan
    assert requests["text+vector"].plan is plan
    assert len(requests["none"].plan) == len(requests["text"].plan) == 0
    placebo = requests["random"].plan.interventions[0]
    assert torch.equal(placebo.direction, plan.interventions[0].direction)
    assert abs(float(placebo.write @ placebo.direction)) < 0.9


def test_conditions_of_one_query_and_trial_share_their_seed_and_trials_do_not(pairs, plan):
    requests = requests_for(pairs, plan, trials=2)
    seeds = {(request.pair.query, request.trial): set() for request in requests}
    for request in requests:
        seeds[request.pair.query, request.trial].add(request.seed)
    assert all(len(found) == 1 for found in seeds.values())
    assert len(set.union(*seeds.values())) == len(seeds) == 6


def test_an_instruction_without_a_plan_and_an_unknown_condition_are_refused(pairs, plan):
    with pytest.raises(DataError, match=f"every instruction needs a plan, got none for '{NO_COMMA}'"):
        requests_for(pairs, {CAPITAL: plan})
    with pytest.raises(DataError, match="got 'steered'"):
        requests_for(pairs, plan, conditions=["steered"])


def test_what_two_instructions_share_is_generated_once_and_scored_twice(llama, pairs, plan):
    sampler = Sampler(llama.model, sampling=SamplingConfig(4))
    scores = score(sampler, requests_for(pairs, plan, conditions=["none"]))
    assert len(scores) == 6
    assert len(sampler.records) == 3  # one per query


@pytest.mark.bridge
@pytest.mark.parametrize("positions", ["all", "generated"])
def test_a_batch_of_an_evaluation_is_hooked_once_and_runs_each_prompt_once(
    llama, pairs, plan, positions, passes, monkeypatch
):
    plan = Plan(tuple(replace(step, positions=positions) for step in plan.interventions))
    requests = requests_for(pairs, plan, conditions=["none", "vector", "text", "text+vector"])
    Sampler(llama.model, max_new_tokens=6).generate(requests)  # what is found out about a model is found out before
    hooked = []
    real = Tree.hooked
    monkeypatch.setattr(Tree, "hooked", lambda tree, sites: hooked.append(sorted(sites)) or real(tree, sites))
    passes.clear()
    sampler = Sampler(llama.model, max_new_tokens=6, batch_size=8)
    sampler.generate(requests)
    rows = list(dict(zip(sampler.keys(requests), requests, strict=True)).values())
    assert len(rows) == 18  # of three queries and two instructions; bare queries are shared
    ids = [tuple(sampler.encode(row.prompt)) for row in rows]
    batches = length_sorted_batches(list(map(len, ids)), 8)
    assert hooked == [["blocks.1.hook_resid_post"]] * len(batches)
    fed = 0
    for batch in batches:
        prompts = [ids[row] for row in batch]
        # What is steered after its prompt alone has the same prompt as what is not; its last token is run beside the others'.
        once = positions == "generated" and len(set(prompts)) < len(prompts)
        fed += sum(len(prompt) - 1 for prompt in set(prompts)) if once else sum(map(len, prompts))
    prefills = [rows for rows, _ in passes if rows.tokens.shape[1] > 1]
    assert sum(int(rows.mask.sum()) for rows in prefills) == fed
    assert len(prefills) == len(batches)


def test_a_key_changes_with_all_that_decides_the_text_and_with_nothing_else(llama, pairs, plan):
    def key(pair=pairs[0], plan=plan, condition="vector", seed=0, **sampling):
        sampler = Sampler(llama.model, sampling=SamplingConfig(**{"max_new_tokens": 4, **sampling}))
        return sampler.key(requests_for([pair], plan, conditions=[condition], seed=seed)[0])

    scaled = Plan(tuple(type(step)(step.layer, step.direction, "add", coeff=4.5) for step in plan))
    nudged = torch.nn.functional.normalize(plan.interventions[0].direction + 1e-6 * torch.arange(32), dim=0)
    keys = [
        key(),
        key(pair=pairs[2]),
        key(condition="none"),
        key(condition="random"),
        key(plan=scaled),
        key(plan=plan.at_positions("last")),
        key(plan=Plan((Intervention(1, nudged, "add", coeff=4.0),))),
        key(max_new_tokens=5),
        key(stop=("x",)),
        key(temperature=1.0),
        key(temperature=1.0, seed=1),
        key(temperature=1.0, top_k=3),
        key(temperature=1.0, top_p=0.9),
    ]
    assert len(set(keys)) == len(keys)
    assert key(seed=1) == key(top_k=3) == key(top_p=0.9) == key(), "greedy text depends on none of these"
    assert key(pair=pairs[1]) == key(), "the bare query is the same under another instruction"


def test_changed_weights_change_every_key(llama, pairs, plan):
    request = requests_for(pairs[:1], plan)[0]
    before = Sampler(llama.model).key(request)
    for weight in llama.model.parameters():
        saved = weight.detach().clone()
        for place in ((0,) * weight.ndim, (-1,) * weight.ndim, (weight.shape[0] // 3, *(5,) * (weight.ndim - 1))):
            with torch.no_grad():
                try:
                    weight[place] += 1.0
                    assert Sampler(llama.model).key(request) != before
                finally:
                    weight.copy_(saved)
    assert Sampler(llama.model).key(request) == before


def test_intervals_over_all_instructions_count_queries_not_responses(llama, plan):
    asked = [InstructionPair(f"Say {n}.", "Use no commas.", "punctuation:no_comma") for n in range(6)]
    asked += [InstructionPair(f"Say {n}.", "Use a title.", "detectable_format:title") for n in range(6)]
    found = evaluate(llama.model, plan, PairSet(asked), conditions=["none", "vector"], max_new_tokens=4)
    scores = found.scores.assign(followed=found.scores["query"].isin(["Say 0.", "Say 1.", "Say 2."]))
    table = Evaluation(scores).table.set_index(["instruction", "condition"])
    one, overall = table.loc[("detectable_format:title", "vector")], table.loc[("all", "vector")]
    assert (overall["n"], overall["rate"]) == (12, 0.5)
    assert (overall["low"], overall["high"]) == (one["low"], one["high"])  # both instructions of a query always agree
    differ = scores.assign(followed=scores["followed"] & (scores["condition"] == "vector"))
    compared = Evaluation(differ).comparisons.set_index("instruction")
    assert compared.loc["all", ["n", "n_prompts", "test"]].tolist() == [12, 6, "sign flip"]
    assert compared.loc["detectable_format:title", "test"] == "mcnemar exact"


def test_a_template_that_changes_the_tokens_changes_the_key(llama, pairs, plan, monkeypatch):
    request = requests_for(pairs[:1], plan)[0]
    before = Sampler(llama.model).key(request)
    monkeypatch.setattr(llama.model.tokenizer, "chat_template", "today " + llama.model.tokenizer.chat_template)
    assert Sampler(llama.model).key(request) != before


@pytest.mark.bridge
def test_another_stopping_token_changes_the_key(llama, pairs, plan, monkeypatch):
    request = requests_for(pairs[:1], plan)[0]
    before = Sampler(llama.model).key(request)
    monkeypatch.setattr(llama.model.original_model.generation_config, "eos_token_id", [1, 40])
    assert Sampler(llama.model).key(request) != before


def test_greedy_trials_are_refused_because_they_would_count_one_text_twice(llama, pairs, plan):
    with pytest.raises(SteerlensError, match="several trials need a temperature above 0"):
        evaluate(llama.model, plan, pairs, trials=2)


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("", [1], True),
        (" \n", [5, 5, 1], True),
        ("-" * 40, [7] * 40, True),
        ("ab" * 20, [7, 8] * 20, True),
        ("Yes.", [9, 10], False),
        ("a plain sentence", list(range(12)), False),
    ],
)
def test_empty_and_looping_responses_are_degenerate_also_without_spaces(text, tokens, expected):
    assert is_degenerate(text, tokens) is expected


def test_generations_are_on_disk_before_anything_is_scored(llama, pairs, plan, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise SteerlensError("the check is broken")

    monkeypatch.setattr("steerlens.study.scores.check_all", broken)
    requests = requests_for(pairs, plan)
    with Journal(tmp_path / "g.jsonl") as journal:
        sampler = Sampler(llama.model, sampling=SamplingConfig(4), journal=journal)
        with pytest.raises(SteerlensError, match="the check is broken"):
            score(sampler, requests)
    with Journal(tmp_path / "g.jsonl") as journal:
        assert set(journal.records) == {sampler.key(request) for request in requests}


def test_only_missing_rows_are_generated_and_more_trials_only_add_rows(llama, pairs, plan, tmp_path, monkeypatch):
    sampling = SamplingConfig(6, temperature=1.0)
    with Journal(tmp_path / "g.jsonl") as journal:
        sampler = Sampler(llama.model, sampling=sampling, journal=journal)
        first = score(sampler, requests_for(pairs, plan, trials=1))
        size = len(journal.records)
        more = score(sampler, requests_for(pairs, plan, trials=3))
        assert len(journal.records) == 3 * size
        kept = more[more["trial"] == 0].reset_index(drop=True)
        pd.testing.assert_frame_equal(kept, first, rtol=1e-5)
        monkeypatch.setattr("steerlens.study.responses.generate", None)
        score(sampler, requests_for(pairs, plan, trials=3))  # all there: nothing is generated


def test_scores_hold_verdict_quality_and_place(llama, pairs, plan):
    result = evaluate(llama.model, plan, pairs, max_new_tokens=6, batch_size=4)
    scores = result.scores
    assert len(scores) == len(pairs) * len(CONDITIONS)
    steered = scores["condition"].isin(["vector", "text+vector", "random"])
    assert (scores.loc[steered, "layer"] == 1).all()
    assert scores.loc[~steered, "layer"].isna().all()
    assert (scores.loc[~steered, "operator"] == "").all()
    assert (scores["followed"] >= scores["followed_strict"]).all()
    commas = scores[scores["instruction"] == NO_COMMA]
    expected = [bool(text.strip()) and "," not in text for text in commas["response"]]
    assert commas["followed_strict"].tolist() == expected
    assert {"all", CAPITAL, NO_COMMA} == set(result.table["instruction"])
    overall = result.table[result.table["instruction"] == "all"].set_index("condition")
    assert (overall["n"] == len(pairs)).all()


@pytest.mark.bridge
def test_perplexity_is_that_of_the_plain_model_over_the_whole_text(llama, gpt2):
    for model in (llama.model, gpt2.model):
        rows = [(encode(model, text), new) for text, new in (("a", [70, 71, 72]), ("longer text", [80]), ("b", []))]
        found = mean_log_probabilities(model, rows, batch_size=3)
        for (prompt, new), value in zip(rows, found.tolist(), strict=True):
            if not new:
                assert math.isnan(value)
                continue
            with torch.inference_mode():
                logits = model.original_model(torch.tensor([prompt + new])).logits[0].log_softmax(-1)
            steps = [float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(new)]
            assert value == pytest.approx(sum(steps) / len(steps), rel=1e-4)


def test_perplexity_is_the_same_however_few_rows_fit_into_memory(llama, monkeypatch):
    rows = [(encode(llama.model, "ab" * n), [70 + n, 80]) for n in range(1, 6)]
    whole = mean_log_probabilities(llama.model, rows, batch_size=5)
    monkeypatch.setattr("steerlens.study.quality.LOGITS_MEMORY", 1)
    assert mean_log_probabilities(llama.model, rows, batch_size=5).tolist() == pytest.approx(whole.tolist(), rel=1e-4)


def test_an_evaluation_without_prompts_is_refused(llama, plan):
    with pytest.raises(DataError, match="an evaluation needs at least one prompt"):
        evaluate(llama.model, plan, PairSet([]))


def test_a_steered_model_does_not_change_the_perplexity_of_the_same_text(llama, pairs, plan):
    """The quality model is the unsteered one: equal texts under `none` and under an inactive plan have equal perplexity."""
    inactive = Plan(tuple(type(step)(step.layer, step.direction, "add", coeff=0.0) for step in plan))
    scores = evaluate(llama.model, inactive, pairs[:2], conditions=["none", "vector"], max_new_tokens=5).scores
    none, vector = (scores[scores["condition"] == name].reset_index() for name in ("none", "vector"))
    assert none["response"].tolist() == vector["response"].tolist()
    assert none["perplexity"].tolist() == vector["perplexity"].tolist()
    assert (none["perplexity"] > 1).all()


def test_an_evaluation_asks_for_a_check_before_it_generates(llama):
    with pytest.raises(DataError, match=r"'Be brief\.' has no id; .*register_check"):
        evaluate(llama.model, Plan(), pair_set(["Describe rain."], "Be brief."))


def test_an_evaluation_in_a_folder_goes_on_and_generates_nothing_twice(llama, pairs, plan, tmp_path, monkeypatch):
    options = {"conditions": ["none", "vector"], "max_new_tokens": 6, "batch_size": 2}
    whole = evaluate(llama.model, plan, pairs, **options)
    evaluate(llama.model, plan, pairs[:3], out=tmp_path, **options)
    found = evaluate(llama.model, plan, pairs, out=tmp_path, **options)
    pd.testing.assert_frame_equal(found.scores, whole.scores, rtol=1e-5)
    monkeypatch.setattr("steerlens.study.responses.generate", None)
    again = evaluate(llama.model, plan, pairs, out=tmp_path, **options)
    pd.testing.assert_frame_equal(again.scores, found.scores)
    assert {"scores.jsonl", "table.csv", "comparisons.csv", "config.json"} < {path.name for path in tmp_path.iterdir()}


def test_a_changed_setting_leaves_no_tables_of_the_old_one(llama, pairs, plan, tmp_path, monkeypatch):
    options = {"conditions": ["none"], "max_new_tokens": 4, "out": tmp_path}
    evaluate(llama.model, plan, pairs, **options)
    monkeypatch.setattr("steerlens.study.scores.score", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(llama.model, plan, pairs, **options | {"max_new_tokens": 5})
    with pytest.raises(DataError, match="must hold scores"):
        Evaluation.load(tmp_path)


def test_a_saved_evaluation_loads_equal(llama, pairs, plan, tmp_path):
    odd = PairSet([InstructionPair("Line\u2028or 2024-01-01?", "Do.", NO_COMMA, prompt_id="007")])
    found = evaluate(llama.model, plan, pairs[:2] + odd, conditions=["none", "vector"], max_new_tokens=4)
    scores = found.scores.assign(response="12", perplexity=float("nan"))
    Evaluation(scores).save(tmp_path)
    pd.testing.assert_frame_equal(Evaluation.load(tmp_path).scores, scores, atol=1e-9)
    pd.testing.assert_frame_equal(Evaluation.load(tmp_path).table, Evaluation(scores).table, atol=1e-9)


def test_an_evaluation_is_a_sequence_of_responses_with_a_short_name(llama, pairs, plan):
    found = evaluate(llama.model, plan, pairs, conditions=["none", "vector"], max_new_tokens=4)
    assert len(found) == len(list(found)) == 12
    assert found[-1].response == list(found)[-1].response == found.scores["response"].iloc[-1]
    assert found[2:5].scores["prompt_id"].tolist() == [row.prompt_id for row in found][2:5]
    with pytest.raises(IndexError):
        found[12]
    assert repr(found).startswith("Evaluation(12 responses, 2 instructions; followed: none ")
    assert len(repr(found)) < 120
    assert "<table" in found._repr_html_()
    copy = found.to_frame()
    copy.loc[0, "followed"] = not copy.loc[0, "followed"]
    assert found.scores.loc[0, "followed"] != copy.loc[0, "followed"]


def test_tables_are_computed_once(llama, pairs, plan):
    found = evaluate(llama.model, plan, pairs[:2], conditions=["none", "vector"], max_new_tokens=4)
    assert found.table is found.table
    assert found.comparisons is found.comparisons


# --- the random control --------------------------------------------------------------------------------------------


def random_plan(pairs, plan, **options):
    requests = requests_for(pairs[:1], plan, conditions=["random"], **options)
    return requests[0].plan.interventions[0].write


def test_the_random_direction_is_drawn_from_names_and_seeds_and_never_from_a_vectors_numbers(pairs, plan):
    first = random_plan(pairs, plan)
    (step,) = plan
    other_processor = torch.nn.functional.normalize(step.direction + 1e-7 * torch.arange(32), dim=0)
    for changed in (
        replace(step, direction=other_processor),
        replace(step, direction=-step.direction),
        replace(step, coeff=4.0000001),
        replace(step, operator="set_projection", target=3.3, resid_norm=7.0),
    ):
        torch.testing.assert_close(random_plan(pairs, Plan((changed,))), first, rtol=0, atol=1e-6)
    for changed in (replace(step, layer=2), replace(step, name="keywords:existence tea")):
        assert abs(float(random_plan(pairs, Plan((changed,))) @ first)) < 0.8
    assert abs(float(random_plan(pairs, plan, seed=1) @ first)) < 0.8
    assert torch.equal(random_plan(pairs, plan, seed=np.int64(0)), first)


# --- what tables say of a plan ---------------------------------------------------------------------------------------


@pytest.fixture
def vector():
    directions = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    norms = {layer: 42.9 + layer for layer in range(4)}
    return SteeringVector(
        dict(enumerate(directions)), proj_with=dict.fromkeys(range(4), 3.0), resid_norm=norms, metadata={"name": "tea"}
    )


def test_one_setting_has_the_same_columns_in_a_sweep_and_in_an_evaluation(llama, pairs, vector):
    pairs = pairs.filter(NO_COMMA)
    swept = sweep(
        llama.model, vector, pairs, layers=[1], coeffs=[0.3], operators="add", unit="resid_norm", max_new_tokens=3
    )
    best = swept.best(subject_to="layer == 1")
    scores = evaluate(llama.model, vector.at(best), pairs, conditions=["vector"], max_new_tokens=3).scores
    expected = {"layer": 1, "operator": "add", "positions": "all", "coeff": 0.3, "unit": "resid_norm"}
    expected |= {"coeff_absolute": 0.3 * 43.9, "coeff_in_norms": 0.3}
    (tried,) = swept.table.dropna(subset="layer").to_dict("records")
    (configuration,) = swept.configurations.dropna(subset="layer").to_dict("records")
    for row in (tried, configuration, scores.iloc[0], swept.scores.dropna(subset="layer").iloc[0]):
        assert {name: row[name] for name in expected} == expected


def test_a_table_names_all_layers_of_a_plan_and_a_layer_only_where_there_is_one(llama, pairs, vector):
    plan = vector.at([1, 3], operator="add", coeff=0.5, unit="resid_norm") + vector.at(2)
    row = evaluate(llama.model, plan, pairs[:1], conditions=["vector"], max_new_tokens=2).scores.iloc[0]
    assert pd.isna(row["layer"])
    assert (row["layers"], row["operator"], row["n_interventions"]) == ("1, 2, 3", "add + set_projection", 3)
    assert math.isnan(row["coeff"])
    assert row["plan"] == (
        "add 0.5 norms (21.95) along tea at layer 1, positions all; "
        "add 0.5 norms (22.95) along tea at layer 3, positions all; "
        "set_projection 1 along tea at layer 2, positions all"
    )
    same = plan_columns(vector.at([1, 3], operator="add", coeff=0.5, unit="resid_norm"))
    assert (same["layers"], same["coeff"], same["unit"], same["coeff_in_norms"]) == ("1, 3", 0.5, "resid_norm", 0.5)
    assert math.isnan(same["coeff_absolute"])
    assert (plan_columns(Plan())["layers"], plan_columns(Plan())["layer"]) == ("", None)


def test_instructions_that_differ_in_a_steps_length_share_a_row_without_it(llama, pairs, vector):
    other = replace(vector, resid_norm=dict.fromkeys(range(4), 10.0))
    swept = sweep(
        llama.model,
        {CAPITAL: vector, NO_COMMA: other},
        pairs,
        layers=np.array([1]),
        coeffs=pd.Series([0.5]),
        operators="add",
        unit="resid_norm",
        max_new_tokens=2,
    )
    assert swept.table.dropna(subset="layer")["coeff_absolute"].tolist() == [21.95, 5.0]
    (row,) = swept.configurations.dropna(subset="layer").to_dict("records")
    assert math.isnan(row["coeff_absolute"])
    assert row["coeff_in_norms"] == 0.5


def test_a_sum_of_vectors_is_evaluated(llama, pairs, vector):
    total = vector.with_metadata(name="", instruction="a:b", seed="0", n_layers="4")
    total = total + total.with_metadata(instruction="c:d", seed="1")
    scores = evaluate(llama.model, total.at(1, operator="add", coeff=2.0), pairs[:1], max_new_tokens=2).scores
    assert len(scores) == len(CONDITIONS)


def test_a_vector_in_the_place_of_a_plan_is_told_how_to_become_one(pairs, vector):
    for steering in (vector, {CAPITAL: vector, NO_COMMA: vector}):
        with pytest.raises(
            SteerlensError, match=r"steering must be a plan, got SteeringVector\(.*by vector.at\(layer\)"
        ):
            unchecked(requests_for)(pairs, steering)


def test_each_instruction_runs_with_what_its_own_plan_has_for_a_cell(pairs, plan):
    plans = {CAPITAL: plan + pasta(0.1), NO_COMMA: pasta(0.1)}
    requests = requests_for(pairs[:2], plans)
    of = {(one.pair.instruction_id, one.condition): one.plan for one in requests}
    assert len(of) == 2 * 8
    assert of[CAPITAL, "vector"].residual == plan.interventions
    assert not of[NO_COMMA, "vector"]
    assert not of[NO_COMMA, "random"]
    assert of[NO_COMMA, "text+attention"] == of[NO_COMMA, "text+vector+attention"] == pasta(0.1).on(pairs[1])
    assert of[CAPITAL, "text+attention"] == pasta(0.1).on(pairs[0])


def test_a_cell_that_no_plan_has_anything_for_is_refused(pairs, plan):
    with pytest.raises(DataError, match=r"got 'vector' for pasta .*; conditions for it: none, text, text\+attention"):
        requests_for(pairs, pasta(0.1), conditions=["vector"])
    with pytest.raises(DataError, match=r"got 'text\+attention' for add 4"):
        requests_for(pairs, plan, conditions=["text+attention"])
