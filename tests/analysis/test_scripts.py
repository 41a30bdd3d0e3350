"""The scripts of the paper's figures, each run end to end on the embedded model, small; figures are drawn from what was saved."""

import dataclasses
import importlib
import json
import re

import pandas as pd
import plotly.graph_objects as go
import pytest
import study
import torch

from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import DataError

SMALL = {
    "layers": (2, 5),
    "n_train": 6,
    "n_valid": 2,
    "n_test": 3,
    "max_new_tokens": 20,
    "positions": ("last",),
    "instructions": ("change_case:english_lowercase", "detectable_format:title"),
}
# What each script saves, and settings of its own.
SCRIPTS = {
    "format_four_cells": (["table", "comparisons"], {}),
    "layer_search": (["layers", "nested"], {}),
    "coefficient_tradeoff": (["tradeoff", "calibrated", "steerability"], {"coeffs": (0.5, 1.0), "target_kl": (0.1,)}),
    "length": (["sentences", "comparisons", "levels"], {"ns": (1, 3), "coeffs": (0.5,)}),
    "keywords": (["cells", "comparisons", "choices"], {"words": ("dream", "garden"), "coeffs": (0.5,)}),
    "exclusion": (["by_coefficient", "words"], {"coeffs": (1.0,)}),
    "composition": (["pairs", "length"], {"coeffs": (0.5,)}),
    "cross_model": (["cells", "comparisons", "maps"], {}),
    "quality_by_instruction": (["quality"], {}),
    "geometry": (
        ["formats", "lengths", "separability", "cosines", "stability", "line", "line_points"],
        {"n_queries": 6},
    ),
    "vocabulary": (
        ["promoted", "ranks", "own_word", "formats", "effects"],
        {"words": ("dream", "garden"), "n_queries": 6, "n_prompts": 2},
    ),
    "attention_benchmark": (
        ["prompts", "methods", "validation", "comparisons", "by_instruction", "sensitivity", "heads", "examples"],
        {
            "instructions": ("keywords:forbidden_words", "language:response_language", "change_case:english_lowercase"),
            "methods": ("PASTA, profiled heads", "DIRECTER", "vector", "vector + gate", "text+vector + gate, KL 1"),
            "positions": ("all",),
            "pasta_alphas": (5.0, 30.0),
            "directer_betas": (0.5,),
            "coeffs": (0.5, 1.0),
            "text_coeffs": (0.25, 0.5),
            "gate_betas": (0.5,),
            "gate_kls": (1.0,),
            "n_profile": 1,
            "profile_layers": (2,),
            "rounds": 1,
        },
    ),
    "necessity": (["necessity", "transfer", "comparisons"], {"windows": ("1", "all")}),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_measures_saves_and_draws_from_what_it_saved(name, tmp_path, monkeypatch):
    tables, own = SCRIPTS[name]
    script = importlib.import_module(name)
    assert f"python analysis/{name}.py" in script.__doc__
    drawn: dict[str, go.Figure] = {}
    monkeypatch.setattr(study, "save", lambda figure, folder, name, **size: drawn.update({name: figure}))
    fields = {field.name for field in dataclasses.fields(script.Settings)}
    small = {key: value for key, value in SMALL.items() if key in fields} | own
    settings = script.Settings(out=tmp_path, **small)
    frames = study.conduct(settings, script.measure, script.draw, tables)
    assert {path.stem for path in tmp_path.glob("*.csv")} == set(tables)
    for frame in frames.values():
        assert len(frame)
        if {"low", "rate", "high"} <= set(frame) and "difference" not in frame:
            assert ((frame["low"] <= frame["rate"]) & (frame["rate"] <= frame["high"])).all()
    first = {name: figure.to_json() for name, figure in drawn.items()}
    assert first
    assert all(figure.layout.title.text and figure.data for figure in drawn.values())
    monkeypatch.setattr(study, "load_model", None)  # drawing again needs no model
    again = script.Settings(out=tmp_path, redraw=True, **small)
    study.conduct(again, lambda settings: pytest.fail("redrawing must not measure"), script.draw, tables)
    assert {name: figure.to_json() for name, figure in drawn.items()} == first


def test_queries_are_dealt_into_parts_that_share_none(tmp_path):
    import composition

    with study.lab(composition.Settings(out=tmp_path, n_train=8, n_valid=6, n_test=7)) as here:
        parts = [set(here.train), set(here.valid), set(here.test)]
        for queries, pairs in zip(parts, here.format_pairs(), strict=True):
            others = set.union(*parts) - queries
            assert not others & {pair.query for pair in pairs}
    assert all(parts)
    assert len(set.union(*parts)) == sum(map(len, parts))


def test_words_to_exclude_are_words_that_the_model_says(tmp_path):
    import exclusion

    with study.lab(exclusion.Settings(out=tmp_path, max_new_tokens=20)) as here:
        found = here.said_words(here.test[:4])
        texts = {record["prompt"]: record["text"] for record in here.sampler.records.values()}
    assert found
    assert len(set(found.values())) == len(found)
    for query, word in found.items():
        assert re.search(rf"\b{word}\b", texts[query])
        assert word not in query.lower()


def test_keyword_prompts_of_a_file_are_grouped_by_word_and_others_left_out(tmp_path):
    import keywords

    from steerlens.data.families import keyword_pairs
    from steerlens.data.splits import query_ids

    queries = ["Describe rain.", "Describe snow.", "Name a city."]
    two = InstructionPair("Name a fox.", "Say red and tail.", "keywords:existence", {"keywords": ["red", "tail"]})
    pairs = keyword_pairs(queries, "wet") + keyword_pairs(queries[:2], "cold") + PairSet([two])
    pairs.save(tmp_path / "pairs.jsonl")
    groups, left_out = keywords.file_groups(tmp_path / "pairs.jsonl", "include", 10, 0, queries=query_ids(pairs[:1]))
    assert {word: [pair.query for pair in group] for word, group in groups.items()} == {
        "wet": ["Describe snow.", "Name a city."],
        "cold": ["Describe snow."],
    }
    assert left_out == 1
    assert set(keywords.file_groups(tmp_path / "pairs.jsonl", "include", 10, 0, words={"wet"})[0]) == {"cold"}
    with pytest.raises(DataError, match="must hold prompts of keywords:forbidden_words about one word"):
        keywords.file_groups(tmp_path / "pairs.jsonl", "exclude", 10, 0)


def test_queries_of_a_data_file_are_tested_and_nothing_else_is_done_with_them(tmp_path):
    import length

    from steerlens.data.families import sentence_pairs
    from steerlens.data.load import bundled_queries

    taken = [bundled_queries("tiny")[0], "How many legs has an ant?"]
    sentence_pairs(taken, "exactly", 2).save(tmp_path / "data.jsonl")
    train, valid, test = study.parts_for(length.Settings(data=tmp_path / "data.jsonl"))
    assert [pair.query for pair in test] == taken
    keys = [{pair.query_key for pair in part} for part in (train, valid, test)]
    assert not (keys[0] | keys[1]) & keys[2]
    assert not keys[0] & keys[1]


def test_tables_of_other_settings_are_gone_before_a_script_can_be_cut_short(tmp_path):
    import length

    settings = length.Settings(out=tmp_path)
    frames = {"sentences": pd.DataFrame({"x": [1]})}
    study.conduct(settings, lambda _: frames, lambda _: {}, ["sentences"])
    study.conduct(settings, lambda _: frames, lambda _: {}, ["sentences"])
    assert (tmp_path / "sentences.csv").exists()
    with pytest.raises(KeyboardInterrupt):
        study.conduct(dataclasses.replace(settings, seed=1), interrupted, lambda _: {}, ["sentences"])
    assert not (tmp_path / "sentences.csv").exists()


def test_a_script_ends_with_one_line_where_its_input_will_not_do(tmp_path):
    import length

    settings = length.Settings(out=tmp_path, data=tmp_path / "nothing.jsonl")
    with pytest.raises(SystemExit, match=r"no file .*nothing\.jsonl"):
        study.conduct(settings, length.measure, length.draw, ["sentences"])


def interrupted(settings):
    raise KeyboardInterrupt


def test_a_slope_counts_no_steering_as_zero_and_stops_where_it_is_told_to():
    import coefficient_tradeoff

    rows = [("a", None, 1.0, False), ("a", 2, 0.5, True), ("a", 2, 1.0, True), ("a", 2, 4.0, False)]
    rows += [("b", None, 1.0, True), ("b", 2, 0.5, True), ("b", 2, 1.0, False), ("b", 2, 4.0, True)]
    scores = pd.DataFrame(rows, columns=["prompt_id", "layer", "coeff", "followed"]).astype({"layer": "Int64"})
    found = coefficient_tradeoff.slope_of(scores, largest=1.0)
    assert found["slope"] == pytest.approx(0.0)  # +1 and -1 per norm
    assert found["anti_steerable"] == 0.5
    assert found["n"] == 2


def test_pairs_that_agree_and_stand_apart_say_so():
    import coefficient_tradeoff

    from steerlens.vectors.activations import Activations

    def pairs(without, with_):
        resid = torch.stack([torch.tensor(without), torch.tensor(with_)], dim=1)[:, :, None]
        return Activations(resid, (3,), tuple("abc"), ("x",) * 3)

    fitted = pairs([[0.0, 0.0]] * 3, [[0.0, 2.0]] * 3)
    others = pairs([[5.0, -1.0], [5.0, 0.0], [5.0, 1.0]], [[0.0, 3.0], [0.0, 4.0], [0.0, 5.0]])
    assert coefficient_tradeoff.separability(fitted, others) == pytest.approx({"agreement": 1.0, "d_prime": 4.0})


def test_one_candidate_is_chosen_over_all_groups(tmp_path):
    import length

    from steerlens.data.families import sentence_pairs
    from steerlens.vectors.estimators import fit_vectors

    with study.lab(length.Settings(out=tmp_path, max_new_tokens=20, layers=(2,), positions=("last",))) as here:
        sets = {str(n): sentence_pairs(here.train[:6], "exactly", n) for n in (1, 2)}
        vectors = fit_vectors(here.model, sets)
        groups = [(vectors[str(n)], sentence_pairs(here.valid[:2], "exactly", n)) for n in (1, 2)]
        best = here.best_for_all(groups, here.steps(0.5, 1.0), strict=True)
        plans = [here.steps(0.5)[0], here.steps(1.0)[0]]
        rates = [pooled(here, groups, plan) for plan in (None, *plans)]
    assert best.rate == max(rates)
    assert best.coeff == (0.0, 0.5, 1.0)[rates.index(max(rates))]


def pooled(here, groups, candidate):
    """The strict rate over all groups' answers, asked for one by one."""
    from steerlens.checks.registry import check_all
    from steerlens.steering.plan import Plan
    from steerlens.study.responses import requests_for

    verdicts = []
    for vector, pairs in groups:
        plan = Plan() if candidate is None else vector.at(candidate)
        requests = requests_for(pairs, plan, conditions=["vector"])
        for request, record in zip(requests, here.sampler.generate(requests), strict=True):
            checks = check_all(record["text"], request.pair.instruction_ids, request.pair.kwargs)
            verdicts.append(all(check.strict for check in checks))
    return sum(verdicts) / len(verdicts)


def test_the_cosine_matrix_has_on_its_diagonal_what_an_instruction_has_with_itself():
    import geometry

    pairs = [("b", "a", 0.5), ("b", "c", -0.2), ("a", "c", 0.1)]
    cosines = pd.DataFrame(pairs, columns=["first", "second", "cosine"]).assign(layer=3, control_high=0.15)
    stability = pd.DataFrame({"instruction": ["a", "b", "c"], "value": [0.7, 0.8, 0.9]}).assign(measure="stability")
    other = stability.assign(measure="agreement", value=0.0)
    fig = geometry.draw_cosines(cosines, pd.concat([other, stability]))
    (cells,) = fig.data
    assert list(fig.layout.xaxis.ticktext) == ["b", "a", "c"]  # the order of the table, not of the names
    assert cells.z.tolist() == [[0.8, 0.5, -0.2], [0.5, 0.7, 0.1], [-0.2, 0.1, 0.9]]


def test_what_all_instructions_share_is_taken_from_each():
    import geometry

    from steerlens.vectors.activations import Activations

    # Two pairs of a, one of b: both instructions count once.
    with_ = torch.tensor([[1.0, 4.0], [1.0, 6.0], [-3.0, 5.0]])
    resid = torch.stack([torch.zeros(3, 2), with_], dim=1)[:, :, None]
    found = geometry.less_mean(Activations(resid, (3,), tuple("pqr"), ("a", "a", "b")))
    assert found.differences[:, 0].tolist() == [[2.0, -1.0], [2.0, 1.0], [-2.0, 0.0]]
    assert resid[0, 1, 0].tolist() == [1.0, 4.0]


def test_parts_of_activations_are_put_together_under_their_names(tmp_path):
    import geometry

    import steerlens as sl

    model = sl.load_model("tiny")
    parts = {
        f"exactly {n}": sl.record_activations(
            model, sl.sentence_pairs(["Describe rain.", "Name a bird."], "exactly", n)
        )
        for n in (1, 2)
    }
    both = geometry.named(parts)
    assert {name: part.resid.tolist() for name, part in both.by_instruction().items()} == {
        name: part.resid.tolist() for name, part in parts.items()
    }


def test_a_word_counts_once_over_its_spellings_and_beside_it_stand_the_words_of_other_vectors():
    import vocabulary

    # Vector and word, piece, logit: random directions reach 1.
    rows = [("a", "a", 0, 0.5), ("a", "a", 0, 2.0), ("a", "a", 1, 9.0)]  # one spelling promotes it
    rows += [("a", "b", 0, 0.0), ("a", "b", 0, 0.0), ("b", "a", 0, 3.0), ("b", "a", 0, 3.0)]
    rows += [("b", "b", 0, 0.5), ("b", "b", 1, 9.0)]  # a later piece of the word is not its beginning
    table = pd.DataFrame(rows, columns=["word", "target", "piece", "logit"])
    table = table.assign(rank=range(len(table)), kind="target", random_high=1.0, mode="exclude", part="whole", sign=1)
    found = vocabulary.own_words(table.assign(layer=4)).set_index("of")
    assert found["promoted"].to_dict() == {"own word": 1, "other words": 1}
    assert found["n"].to_dict() == {"own word": 2, "other words": 2}
    assert found["median_rank"].to_dict() == {"own word": (0 + 7) / 2, "other words": (3 + 5) / 2}


def test_what_is_a_words_own_is_what_all_words_do_not_share():
    import vocabulary

    from steerlens.vectors.vector import SteeringVector

    shared, apart = torch.tensor([0.0, 5.0]), torch.tensor([1.0, 0.0])
    vectors = {"a": SteeringVector({2: shared + apart}), "b": SteeringVector({2: shared - apart})}
    found = vocabulary.parts_of(vectors)
    assert found["whole"]["a"][2].tolist() == [1.0, 5.0]
    assert {word: vector[2].tolist() for word, vector in found["own"].items()} == {"a": [1.0, 0.0], "b": [-1.0, 0.0]}


def test_a_study_of_layers_reads_back_from_its_file_as_it_was(tmp_path):
    import necessity

    table = pd.DataFrame({"window": [None, "1", "all"], "layer": pd.array([None, 3, None], dtype="Int64")})
    for rows in (table, table[:2]):  # without "all", the file's windows read as numbers
        rows.to_csv(tmp_path / "table.csv", index=False)
        found = necessity.typed(pd.read_csv(tmp_path / "table.csv"))
        assert found["window"].dropna().tolist() == rows["window"].dropna().tolist()
        assert found["layer"].dropna().tolist() == [3]


def test_what_an_ablation_loses_is_shown_beyond_what_a_random_push_loses():
    import necessity

    rows = [(condition, layer, loss) for layer in (2, 3) for condition, loss in (("text+vector", 0.5), ("random", 0.2))]
    table = pd.DataFrame(rows, columns=["condition", "layer", "loss"]).astype({"layer": "Int64"})
    table.loc[len(table)] = ["text+vector", pd.NA, 1.0]
    table.loc[len(table)] = ["random", pd.NA, 0.0]
    table["window"] = table["layer"].map(lambda layer: "all" if pd.isna(layer) else "1")
    (cells,) = necessity.draw_by_instruction(table.assign(instruction="a:b", n=6)).data
    assert list(cells.x) == ["2", "3", "all"]
    assert cells.z.round(6).tolist() == [[30.0, 30.0, 100.0]]


def test_the_trade_off_has_a_panel_for_each_rule_that_was_steered_and_no_steering_in_each():
    import layer_search

    keys = ["condition", "layer", "positions", "rate", "median_perplexity"]
    rows = [("vector", None, "all", 0.1, 1.2), ("vector", 3, "last", 0.7, 1.9), ("vector", 1, "last", 0.5, 1.5)]
    figure = layer_search.draw_tradeoff(pd.DataFrame(rows, columns=keys))
    assert [note.text for note in figure.layout.annotations] == ["steering last tokens"]
    assert {trace.name: list(trace.x) for trace in figure.data} == {"vector": [1.5, 1.9], "none": [1.2]}
    assert list(figure.data[0].text) == ["1", "3"]


def test_prompts_whose_instruction_is_woven_into_the_query_are_left_out_and_counted(tmp_path):
    import attention_benchmark as script

    name, ends = "startend:end_checker", ["That is all.", "Done."]
    rows = [
        ("Describe rain.", f"Describe rain. End with {ends[0]!r}"),
        ("Name a fox.", f"Name, before {ends[1]!r}, a fox."),
    ]
    lines = [
        {"prompt": prompt, "instruction_id_list": [name], "kwargs": [{"end_phrase": end}], "prompt_without_instruction": query}
        for (query, prompt), end in zip(rows, ends, strict=True)
    ]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    settings = script.Settings(out=tmp_path, data=tmp_path / "data.jsonl", instructions=(name,), n_valid=3)
    with study.lab(settings) as here:
        found = script.gather(here, settings)
    assert [pair.query for pair in found.test] == ["Describe rain."]
    assert found.counts.to_dict("records") == [{"instruction": name, "n_test": 1, "n_valid": 3, "left_out": 1}]
    assert not {pair.query_key for pair in found.test} & {pair.query_key for pair in (*found.valid, *found.train[name])}


def test_types_of_the_benchmark_have_queries_of_their_own_and_languages_are_one_type(tmp_path):
    import attention_benchmark as script

    types = ("language:response_language", "change_case:english_lowercase", "detectable_format:title")
    settings = script.Settings(out=tmp_path, instructions=types)
    with study.lab(settings) as here:
        languages = [f"language:response_language_{code}" for code in ("es", "de")]
        pairs = script.dealt(here, types, languages, 1, 4)
    assert [pair.instruction_id for pair in pairs[:4]] == 2 * languages
    assert len({pair.query for pair in pairs}) == len(pairs) == 12
    assert [pair.instruction_ids[0] for pair in script.per_type(pairs, 3, 0)] == [
        name for name in types for _ in range(3)
    ]


def test_words_to_avoid_are_steered_away_from_one_by_one():
    import attention_benchmark as script

    from steerlens.data.pairs import InstructionPair
    from steerlens.vectors.vector import SteeringVector

    ones, twos = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    vectors = {
        name: SteeringVector({2: direction}, resid_norm={2: 3.0})
        for name, direction in {"include red": ones, "include wet": twos, "punctuation:no_comma": ones}.items()
    }
    avoid = InstructionPair("Why?", "No red, no wet.", "keywords:forbidden_words", {"forbidden_words": ["red", "wet"]})
    plan = script.steered(0.5, vectors, 2, "all")(avoid)
    assert [(step.direction.tolist(), step.coeff) for step in plan] == [([1.0, 0.0], -1.5), ([0.0, 1.0], -1.5)]
    comma = InstructionPair("Why?", "No commas.", "punctuation:no_comma")
    assert [step.coeff for step in script.steered(0.5, vectors, 2, "all", gate={"beta": 0.1})(comma)] == [1.5]
    assert script.steered(0.5, vectors, 2, "all", gate={"beta": 0.1})(comma).gate.beta == 0.1


def test_sensitivity_is_per_doubling_and_counts_prompts_that_go_the_other_way():
    import attention_benchmark as script

    verdicts = {1.0: [0, 0, 0, 1], 2.0: [1, 0, 0, 0], 4.0: [1, 1, 0, 0]}
    rows = [
        ("A", str(prompt), strength, bool(one))
        for strength, each in verdicts.items()
        for prompt, one in enumerate(each)
    ]
    rows += [("B", "0", 1.0, True)]  # one strength has no slope
    tested = pd.DataFrame(rows, columns=["method", "prompt_id", "strength", "followed_strict"]).assign(control=False)
    (row,) = script.sensitivity(tested).to_dict("records")
    assert (row["method"], row["n"], row["lowest_rate"], row["highest_rate"]) == ("A", 4, 0.25, 0.5)
    assert row["slope_per_doubling"] == pytest.approx(0.125)
    assert (row["anti_steerable"], row["unsettled"]) == (0.25, 0.75)
