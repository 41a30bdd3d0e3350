"""Pairs, sets of pairs, their splits, and the loaders of every schema."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from steerlens.checks.catalogue import format_instructions
from steerlens.checks.registry import check_arguments, register_check
from steerlens.data.conditions import ALL_CONDITIONS, WITH_TEXT
from steerlens.data.load import bundled_queries, load_pairs
from steerlens.data.pairs import LONGEST_NAME, InstructionPair, PairSet, contrast, pair_set
from steerlens.errors import DataError, SteerlensError

DATA = Path(os.environ.get("STEERLENS_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not (DATA / "ifeval" / "input_data.jsonl").is_file(),
    reason=f"needs ifeval/input_data.jsonl and llm-steer-instruct/*.jsonl in {DATA}; set STEERLENS_DATA",
)

CAPITAL, COMMA, BULLETS = (
    "change_case:english_capital",
    "punctuation:no_comma",
    "detectable_format:number_bullet_lists",
)

# One row of each schema, in the shape of the files.
IFEVAL = {
    "key": 7,
    "prompt": "Describe rain. Use no commas. Give 3 bullets.",
    "instruction_id_list": [COMMA, BULLETS],
    "kwargs": [{}, {"num_bullets": 3}],
}
STOLFO = {
    "key": 8,
    "prompt": "Describe rain. Use no commas.",
    "instruction_id_list": [COMMA],
    "kwargs": [{}],
    "instruction_id_list_for_eval": [COMMA],
    "prompt_without_instruction": "Describe rain.",
}
SPLIT = {
    "key": 9,
    "prompt": "Describe rain.\n\nYour response should follow the instructions below:\n- Give 3 bullets",
    "instruction_id_list": [BULLETS],
    "kwargs": [{"num_bullets": 3.0, "num_words": None, "relation": None}],
    "separated_prompt": "Describe rain.",
    "instructions": ["- Give 3 bullets"],
    "original_prompt": "Describe rain in 3 bullets.",
}
VALIDATION = {
    "question": "What is rain?",
    "unlikely_words": ["microwave"],
    "likely_words": ["water", "cloud"],
    "prompt_without_instruction": "What is rain?",
    "instruction_id_list": ["keywords:existence"],
    "instruction_id_list_for_eval": ["keywords:existence"],
    "kwargs": [{"keywords": ["water"]}],
    "prompt": 'What is rain? Include the word "water".',
}
BARE = {"key": 7, "prompt": "Remove the constraints from ...", "model_output": "Describe rain.", "is_valid": True}


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows, name="rows.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write_rows


def pairs_of(*queries, ids=(CAPITAL, COMMA)):
    return PairSet(InstructionPair(query, f"Do {name}.", name) for query in queries for name in ids)


def normalised(text):
    return " ".join(text.casefold().split())


# Pairs.


def test_a_pair_needs_only_query_instruction_and_id():
    pair = InstructionPair("Describe rain.", "Use capitals.", CAPITAL)
    assert pair.prompt == "Describe rain. Use capitals."
    assert pair.instruction_ids == (CAPITAL,)
    assert pair.instruction_id == CAPITAL
    assert pair.kwargs == ({},)
    assert re.fullmatch("[0-9a-f]{12}", pair.prompt_id)


def test_the_prompt_carries_the_instruction_exactly_in_the_text_conditions():
    pair = InstructionPair("Describe rain.", "Use capitals.", CAPITAL)
    with_text = {condition for condition in ALL_CONDITIONS if pair.text(condition) == pair.prompt}
    assert with_text == set(WITH_TEXT) == {condition for condition in ALL_CONDITIONS if "text" in condition}
    assert all(pair.text(condition) == pair.query for condition in {*ALL_CONDITIONS} - WITH_TEXT)


def test_ids_of_several_instructions_are_joined_and_none_arguments_dropped():
    pair = InstructionPair("Describe rain.", "Do.", (COMMA, BULLETS), ({}, {"num_bullets": 3, "relation": None}))
    assert pair.instruction_id == f"{COMMA}+{BULLETS}"
    assert pair.kwargs == ({}, {"num_bullets": 3})
    assert InstructionPair("Describe rain.", "Do.", BULLETS, {"num_bullets": 3}).kwargs == ({"num_bullets": 3},)


@pytest.mark.parametrize(
    "change",
    [
        {"query": "Describe snow."},
        {"prompt": "Describe rain.  Do."},
        {"instruction_ids": (COMMA,)},
        {"kwargs": ({"num_bullets": 4},)},
    ],
)
def test_prompt_id_changes_with_the_content(change):
    fields = {"query": "Describe rain.", "instruction": "Do.", "instruction_ids": (BULLETS,)}
    fields |= {"kwargs": ({"num_bullets": 3},), "prompt": "Describe rain. Do."}
    assert InstructionPair(**fields).prompt_id != InstructionPair(**(fields | change)).prompt_id


@pytest.mark.parametrize("three", [3.0, np.int64(3), np.float64(3.0)])
def test_prompt_id_does_not_depend_on_the_number_type_of_an_argument(three):
    def pair(n):
        return InstructionPair("Describe rain.", "Do.", BULLETS, ({"num_bullets": n},))

    assert pair(three).prompt_id == pair(3).prompt_id
    assert PairSet([pair(three)]).content_hash == PairSet([pair(3)]).content_hash


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "Do.", COMMA), "none of them empty"),
        (("Describe rain.", "", COMMA), "none of them empty"),
        ((None, "Do.", COMMA), "none of them empty"),
        (("Describe rain.", "Do.", (), {"num_bullets": 3}), "each has one dict of arguments"),
        (("Describe rain.", "Do.", ("",)), "ids must not be empty"),
        (("Describe rain.", "Do.", (COMMA, CAPITAL), ({},)), "each has one dict of arguments"),
        (("Describe rain.", "", (), (), "Describe heavy rain."), "an instruction or an id, by which tables name it"),
    ],
)
def test_a_pair_without_text_or_ids_is_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        InstructionPair(*arguments)


def test_a_pair_without_an_id_goes_by_its_text():
    pair = InstructionPair("Describe rain.", "Use  capitals.\nAll of them.")
    assert pair.instruction_ids == pair.kwargs == ()
    assert pair.instruction_id == "Use capitals. All of them."
    assert pair.prompt[slice(*pair.instruction_span)] == pair.instruction


def test_long_texts_are_cut_and_their_names_still_differ():
    texts = [f"Answer in the manner of someone who has lived by the sea for {n} years." for n in range(20)]
    names = {InstructionPair("Describe rain.", text).instruction_id for text in texts}
    assert len(names) == len(texts)
    assert all(len(name) <= LONGEST_NAME and name.startswith("Answer in the manner of") for name in names)


@pytest.mark.parametrize("ids", [(), "length:short"])
def test_a_pair_that_nothing_checks_says_how_to_give_it_a_check(ids):
    with pytest.raises(SteerlensError, match="register_check"):
        InstructionPair("Describe rain.", "Be brief.", ids).require_check()


def test_a_set_of_pairs_is_made_from_queries_and_one_instruction():
    pairs = pair_set(["Describe rain.", "Describe snow."], "Use capitals.")
    assert pairs.prompts("text") == ["Describe rain. Use capitals.", "Describe snow. Use capitals."]
    assert pairs.instructions == ("Use capitals.",)
    checked = pair_set(["Describe rain."], "Use 3 bullets.", instruction_ids=BULLETS, kwargs={"num_bullets": 3})
    checked[0].require_check()
    with pytest.raises(DataError, match="put it into a list"):
        pair_set("Describe rain.", "Use capitals.")


def test_two_prompts_that_differ_in_anything_are_a_pair():
    pair = contrast("Say only what is true of rain.", "Say only what is false of rain.")
    assert (pair.text("text"), pair.text("none")) == (pair.prompt, "Say only what is false of rain.")
    assert pair.instruction_id == "contrast"
    assert contrast("You are a pirate. Describe rain.", "Describe rain.").instruction == "You are a pirate."
    both = contrast(["A.", "B."], ["C.", "D."], instruction_id="my:truth")
    assert (both.prompts("text"), both.instructions) == (["A.", "B."], ("my:truth",))


@pytest.mark.parametrize("sides", [("A.", "A."), (["A."], "B."), ("A.", ["B."]), (["A.", "B."], ["C."])])
def test_sides_of_a_contrast_that_do_not_belong_together_are_refused(sides):
    with pytest.raises(DataError, match="a contrast"):
        contrast(*sides)


def test_pairs_without_ids_are_saved_and_read_also_from_a_file_of_ones_own(tmp_path, write):
    pairs = pair_set(["Describe rain.", "Describe snow."], "Use capitals.") + PairSet([contrast("A.", "B.")])
    pairs.save(tmp_path / "own.jsonl")
    assert load_pairs(tmp_path / "own.jsonl") == pairs
    (read,) = load_pairs(write({"query": "Describe rain.", "instruction": "Use capitals."}))
    assert (read.prompt, read.prompt_id, read.instruction_ids) == (pairs[0].prompt, pairs[0].prompt_id, ())


def test_a_set_shows_itself_as_a_table():
    pairs = pair_set([f"Describe {n} < 100." for n in range(12)], "Use capitals.")
    frame = pairs.to_frame()
    assert list(frame) == ["prompt_id", "instruction", "query", "prompt", "source"]
    assert frame["prompt"].tolist() == pairs.prompts("text")
    page = pairs._repr_html_()
    assert "12 pairs" in page
    assert "0 &lt; 100" in page
    assert "and 2 more" in page
    assert list(PairSet([]).to_frame()) == list(frame)


def test_a_pair_with_only_its_prompt_has_no_bare_text():
    pair = InstructionPair(None, "", COMMA, prompt="Describe rain without commas.")
    assert pair.text("text") == pair.prompt
    with pytest.raises(DataError, match="needs the base query"):
        pair.text("none")


def test_an_unknown_condition_names_the_nearest():
    with pytest.raises(DataError, match=r"did you mean 'text\+vector'"):
        InstructionPair("Describe rain.", "Do.", COMMA).text("text+vectors")


def test_pairs_and_sets_can_be_hashed_copied_and_pickled():
    pairs = pairs_of("One?", "Two?")
    assert copy.deepcopy(pairs) == pairs == pickle.loads(pickle.dumps(pairs))
    assert len({*pairs, *copy.deepcopy(pairs)}) == 4
    assert hash(copy.deepcopy(pairs)) == hash(pairs)


# Sets.


def test_a_set_behaves_as_a_sequence():
    pairs = pairs_of("One?", "Two?", "Three?")
    assert len(pairs) == 6
    assert [*pairs[2:4]] == [pairs[2], pairs[3]]
    assert isinstance(pairs[:2], PairSet)
    assert pairs[:2] + pairs[2:] == pairs
    assert pairs[-1] in pairs
    assert repr(pairs) == "PairSet(6 pairs, 3 queries, 2 instructions)"
    assert repr(pairs[:1]) == "PairSet(1 pair, 1 query, 1 instruction)"
    assert repr(pairs[:0]) == "PairSet(0 pairs, 0 queries, 0 instructions)"


def test_a_set_refuses_the_same_pair_twice():
    pairs = pairs_of("One?")
    with pytest.raises(DataError, match="comes twice"):
        pairs + pairs


def test_filter_and_groups_keep_the_order():
    pairs = pairs_of("One?", "Two?")
    assert pairs.instructions == (CAPITAL, COMMA)
    assert [*pairs.filter(COMMA)] == [pairs[1], pairs[3]] == [*pairs.by_instruction()[COMMA]]
    assert pairs.filter([COMMA, CAPITAL]) == pairs
    assert pairs.prompts("none") == ["One?", "One?", "Two?", "Two?"]
    assert pairs.prompts("text")[1] == f"One? Do {COMMA}."
    with pytest.raises(DataError, match=f"unknown instruction id.*did you mean '{COMMA}'"):
        pairs.filter("punctuation:no_commas")
    with pytest.raises(DataError, match="at least one id"):
        pairs.filter([])


def test_content_hash_sees_every_field_but_the_source():
    base = {"query": "One?", "instruction": "Do.", "instruction_ids": (BULLETS,), "kwargs": ({"num_bullets": 3},)}
    base |= {"prompt": "One? Do.", "prompt_id": "a"}

    def content(**change):
        return PairSet([InstructionPair(**(base | change))]).content_hash

    changes = [{"query": "Two?"}, {"instruction": "Do!"}, {"prompt": "One?  Do."}, {"prompt_id": "b"}]
    changes += [{"kwargs": ({"num_bullets": 4},)}, {"instruction_ids": (COMMA,)}]
    assert len({content(), *(content(**change) for change in changes)}) == 7
    assert content(source="elsewhere") == content()
    assert re.fullmatch("[0-9a-f]{16}", content())
    pairs = pairs_of("One?", "Two?")
    assert PairSet(reversed(pairs)).content_hash != pairs.content_hash


# Splits and samples.


@pytest.mark.parametrize("seed", range(5))
def test_splits_partition_the_pairs_and_share_no_query(seed):
    queries = [f"Query {i}?" for i in range(10)]
    pairs = pairs_of(*queries) + pairs_of(*(f"  QUERY\t{i}? " for i in range(10)), ids=(BULLETS,))
    parts = pairs.split(seed=seed)
    assert [len(part) for part in parts] == [18, 6, 6]
    assert sorted(pair.prompt_id for part in parts for pair in part) == sorted(pair.prompt_id for pair in pairs)
    keys = [{normalised(pair.query) for pair in part} for part in parts]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 10
    assert all(list(part) == [pair for pair in pairs if pair in part] for part in parts)


def test_a_split_depends_on_seed_and_queries_alone():
    pairs = pairs_of(*(f"Query {i}?" for i in range(20)))
    assert pairs.split(seed=1) == pairs.split(seed=1) != pairs.split(seed=2)
    for part, other in zip(pairs.split(), PairSet(reversed(pairs)).split(), strict=True):
        assert set(part) == set(other)
    for part, other in zip(pairs.split(), pairs.filter(COMMA).split(), strict=True):
        assert part.filter(COMMA) == other


def test_a_split_without_base_queries_goes_by_prompt():
    pairs = PairSet(InstructionPair(None, "", COMMA, prompt=f"Prompt {i}.") for i in range(10))
    assert [len(part) for part in pairs.split()] == [6, 2, 2]


@pytest.mark.parametrize(
    ("n", "fractions", "message"),
    [
        (0, (0.6, 0.2, 0.2), "each split needs a base query, and 0 queries"),
        (2, (0.6, 0.2, 0.2), "use more queries"),
        (9, (0.5, 0.2), "sum to 1"),
        (9, (1.2, -0.2), "must be positive"),
        (9, (), "must be positive"),
    ],
)
def test_a_split_that_would_be_empty_is_refused(n, fractions, message):
    with pytest.raises(DataError, match=message):
        pairs_of(*(f"Query {i}?" for i in range(n))).split(fractions=fractions)


def test_samples_are_nested_ordered_and_seeded():
    pairs = pairs_of(*(f"Query {i}?" for i in range(20)))
    small, large = pairs.sample(5, seed=3), pairs.sample(9, seed=3)
    assert len(small) == 5
    assert set(small) < set(large)
    assert list(large) == [pair for pair in pairs if pair in large]
    assert pairs.sample(5, seed=4) != small
    each = pairs.sample_per_instruction(4)
    assert {name: len(group) for name, group in each.by_instruction().items()} == {CAPITAL: 4, COMMA: 4}
    assert list(each) == [pair for pair in pairs if pair in each]
    for n in (0, 41):
        with pytest.raises(DataError, match=r"n must be in \[1, 40\]"):
            pairs.sample(n)
    with pytest.raises(DataError, match=f"{CAPITAL} has 20 pairs"):
        pairs.sample_per_instruction(21)


# The bundled set.


def test_the_bundled_set_is_the_product_of_queries_and_twelve_instructions():
    pairs = load_pairs("format")
    queries = bundled_queries("format")
    assert len({normalised(query) for query in queries}) == len(queries) >= 96
    assert len(pairs) == 12 * len(queries)
    assert pairs.instructions == tuple(format_instructions())
    for name, group in pairs.by_instruction().items():
        assert group.prompts("none") == list(queries)
        texts = {pair.instruction for pair in group}
        assert len(texts) >= len(format_instructions()[name].phrasings)  # every phrasing is drawn
        for pair in group:
            assert pair.source == "format"
            assert pair.prompt == f"{pair.query} {pair.instruction}"
            assert check_arguments(name, pair.kwargs[0]) == pair.kwargs[0]


def test_bundled_queries_are_single_short_sentences_without_format_demands():
    demands = re.compile(r"\b(words?|sentences?|paragraphs?|bullets?|json|uppercase|lowercase|capitals?|quotes?)\b")
    for query in bundled_queries("format"):
        assert query == query.strip()
        assert re.fullmatch(r"[A-Z][^.?!]*[.?]", query), query
        assert len(query.split()) <= 16
        assert not demands.search(query.lower()), query


def test_a_bundled_pair_stays_the_same_when_others_come_or_go():
    every = {pair.prompt_id for pair in load_pairs("format", seed=3)}
    some = load_pairs("format", instructions=[BULLETS, COMMA], n_queries=7, seed=3)
    assert len(some) == 14
    assert {pair.prompt_id for pair in some} < every
    assert some.instructions == (COMMA, BULLETS)  # the catalogue's order
    assert {pair.prompt_id for pair in load_pairs("format", seed=4)} != every
    fewer = load_pairs("format", instructions=COMMA, n_queries=5, seed=3)
    assert {pair.query for pair in fewer} < {pair.query for pair in some}


def test_everything_drawn_is_the_same_in_every_process():
    code = """
from steerlens.data.load import load_pairs
pairs = load_pairs("format", n_queries=30, seed=5)
parts = pairs.split(seed=5)
sets = [pairs, *parts, parts[0].sample(9), parts[0].sample_per_instruction(2)]
print(*(pairs.content_hash for pairs in sets))
"""
    outputs = set()
    for hash_seed in ("0", "1", "12345"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-W", "error", "-c", code]
        outputs.add(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)
    assert len(outputs) == 1
    assert len(set(outputs.pop().split())) == 6


@pytest.mark.parametrize("n_queries", [0, 100_000])
def test_a_number_of_queries_that_does_not_exist_is_refused(n_queries):
    with pytest.raises(DataError, match=r"n_queries must be in \[1, 120\]"):
        load_pairs("format", n_queries=n_queries)


def test_unknown_names_are_refused_with_what_exists():
    with pytest.raises(DataError, match="unknown set of pairs 'formats'; did you mean 'format'"):
        load_pairs("formats")
    with pytest.raises(DataError, match=f"unknown instruction id 'no_comma'; did you mean '{COMMA}'"):
        load_pairs("format", instructions="no_comma")
    with pytest.raises(DataError, match="remove it"):
        load_pairs("format", queries="queries.jsonl")


# Files.


def test_official_ifeval_has_prompts_without_base_queries(write):
    (pair,) = load_pairs(write(IFEVAL))
    assert pair.query is None
    assert pair.instruction == ""
    assert pair.prompt == IFEVAL["prompt"]
    assert pair.instruction_ids == (COMMA, BULLETS)
    assert pair.kwargs == ({}, {"num_bullets": 3})
    assert re.fullmatch("7-[0-9a-f]{12}", pair.prompt_id)
    assert pair.source == "rows.jsonl"


def test_base_queries_are_joined_by_key(write):
    (pair,) = load_pairs(write(IFEVAL), queries=write(BARE, name="bare.jsonl"))
    assert pair.query == "Describe rain."
    assert pair.instruction == "Use no commas. Give 3 bullets."
    assert pair.text("none") == "Describe rain."


def test_llm_steer_instruct_rows_separate_query_and_instruction(write):
    before = STOLFO | {"prompt": "Use no commas. Describe rain."}
    woven = STOLFO | {"prompt": "Describe rain without commas."}
    pairs = load_pairs(write(STOLFO, before, woven, VALIDATION))
    assert [pair.query for pair in pairs] == ["Describe rain."] * 3 + ["What is rain?"]
    assert [pair.instruction for pair in pairs] == ["Use no commas."] * 2 + ["", 'Include the word "water".']
    assert pairs[2].text("text") == woven["prompt"]
    assert pairs[3].kwargs == ({"keywords": ["water"]},)
    assert len({pair.prompt_id for pair in pairs}) == 4  # three of them share their key
    assert not pairs[3].prompt_id.startswith("None")


def test_split_ifeval_rows_keep_floats_and_drop_none(write):
    (pair,) = load_pairs(write(SPLIT))
    assert pair.query == "Describe rain."
    assert pair.instruction == "Your response should follow the instructions below:\n- Give 3 bullets"
    assert pair.kwargs == ({"num_bullets": 3.0},)


def test_a_split_ifeval_row_may_hold_several_instructions(write):
    """One of them without an id, one with line breaks at its end, and ids in another order: as in the published rows."""
    asked = ["- Write 300+ words", "- Use no commas", "- Finish with:\n\nPeace!\n\n"]
    tail = "Your response should follow the instructions below:\n" + "\n".join(asked)
    row = SPLIT | {
        "prompt": f"Describe rain.\n\n{tail}",
        "instruction_id_list": [COMMA, "startend:end_checker"],
        "kwargs": [{"end_phrase": None}, {"end_phrase": "Peace!", "num_words": None}],
        "instructions": asked,
        "original_prompt": "Describe rain in 300+ words without commas, and finish with:\n\nPeace!",
    }
    (pair,) = load_pairs(write(row))
    assert (pair.query, pair.prompt) == ("Describe rain.", row["prompt"])
    assert pair.instruction_ids == (COMMA, "startend:end_checker")
    assert pair.kwargs == ({}, {"end_phrase": "Peace!"})
    start, end = pair.instruction_span
    assert pair.prompt[start:end] == pair.instruction == tail.strip()
    assert all(instruction.strip() in pair.instruction for instruction in asked)


def test_split_instructions_are_found_where_the_query_is_not_word_for_word(write):
    row = SPLIT | {"prompt": SPLIT["prompt"].replace("rain.", "rain!"), "instructions": ["- Give  3\nbullets "]}
    (pair,) = load_pairs(write(row))
    assert pair.instruction == "- Give 3 bullets"
    assert pair.prompt[slice(*pair.instruction_span)] == pair.instruction
    (lost,) = load_pairs(write(row | {"instructions": ["- Give 3 bullets", "- Use no commas"]}))
    assert lost.instruction == ""
    with pytest.raises(DataError, match=r"stands in the prompt apart from the query.*leave out pairs"):
        _ = lost.instruction_span


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"separated_prompt": None}, r"separated_prompt must be a str; got None \(NoneType\)"),
        ({"separated_prompt": " "}, "none of them empty"),
        ({"instructions": "- Give 3 bullets"}, r"instructions must be a list; got '- Give 3 bullets' \(str\)"),
        ({"instructions": []}, "instructions must be a list of texts, not empty"),
        ({"instructions": [3]}, "instructions must be a list of texts, not empty"),
        ({"original_prompt": 3}, r"original_prompt must be a str; got 3 \(int\)"),
        ({"kwargs": [{}]}, "needs num_bullets.*got nothing"),
        ({"instruction_id_list": ["detectable_format:bullets"]}, "unknown instruction id"),
    ],
)
def test_a_broken_split_row_is_named_by_its_line(write, change, message):
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: .*{message}"):
        load_pairs(write(SPLIT | {"key": 1}, SPLIT | change))


@pytest.mark.parametrize(
    ("prompt", "instruction", "span"),
    [
        ("Describe rain. Use capitals.", "Use capitals.", (15, 28)),
        ("Use capitals. Describe rain.", "Use capitals.", (0, 13)),
        ("Say Do. twice. Do.", "Do.", (15, 18)),  # the one at the end
        ("Do. Say Do. twice.", "Do.", (0, 3)),  # the one at the start
        ("Describe, in capitals, rain.", "in capitals", (10, 21)),
        (" Describe rain. Do.\n", "Do.", (16, 19)),
    ],
)
def test_the_instruction_is_found_in_the_prompt(prompt, instruction, span):
    pair = InstructionPair("Describe rain.", instruction, COMMA, prompt=prompt)
    assert pair.instruction_span == span
    assert prompt[slice(*span)] == instruction


@pytest.mark.parametrize(
    ("prompt", "instruction"),
    [("Describe rain without commas.", ""), ("Describe rain.", "Do."), ("Rain: Do. and Do. and rain", "Do.")],
)
def test_an_instruction_that_stands_nowhere_or_twice_has_no_span(prompt, instruction):
    with pytest.raises(DataError, match="a span needs an instruction that stands in the prompt apart from the query"):
        _ = InstructionPair("Describe rain.", instruction, COMMA, prompt=prompt).instruction_span


def test_every_bundled_pair_has_its_span_after_the_query():
    for pair in load_pairs("format"):
        assert pair.instruction_span == (len(pair.query) + 1, len(pair.prompt))


def test_a_file_with_a_check_of_ones_own_loads_once_it_is_registered(write, monkeypatch):
    monkeypatch.setattr("steerlens.checks.registry._REGISTERED", {})
    path = write(STOLFO | {"instruction_id_list": ["my:rhymes"], "instruction_id_list_for_eval": ["my:rhymes"]})
    with pytest.raises(
        DataError, match=r"line 1: unknown instruction id 'my:rhymes'.*register_check.* before its file"
    ):
        load_pairs(path)

    @register_check("my:rhymes", word=str)
    def rhymes(response, *, word) -> bool:
        return response.endswith(word)

    with pytest.raises(DataError, match="line 1: my:rhymes needs word: a text; got nothing"):
        load_pairs(path)
    good = STOLFO | {"instruction_id_list": ["my:rhymes"], "kwargs": [{"word": "moon", "num_words": None}]}
    assert load_pairs(write(good), instructions="my:rhymes")[0].kwargs == ({"word": "moon"},)
    own = {"query": "Why?", "instruction": "Rhyme.", "instruction_ids": ["my:rhymes"], "kwargs": [{}]}
    with pytest.raises(DataError, match="line 1: my:rhymes needs word"):
        load_pairs(write(own))


def test_the_id_that_ifeval_knows_is_taken(write):
    language = {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "hi"}]}
    labelled = STOLFO | language | {"instruction_id_list_for_eval": ["language:response_language_hi"]}
    swapped = labelled | {
        "instruction_id_list": labelled["instruction_id_list_for_eval"],
        "instruction_id_list_for_eval": labelled["instruction_id_list"],
    }
    for row in (labelled, swapped):
        (pair,) = load_pairs(write(row))
        assert pair.instruction_ids == ("language:response_language",)
        assert pair.instruction_id == "language:response_language_hi"  # a vector of its own


def test_each_language_is_an_instruction_of_its_own():
    names = [f"language:response_language_{code}" for code in ("de", "sw")]
    pairs = load_pairs("tiny", instructions=[*names, "punctuation:no_comma"], n_queries=5)
    groups = pairs.by_instruction()
    assert set(groups) == {*names, "punctuation:no_comma"}
    for pair in groups[names[0]]:
        assert pair.instruction_ids == ("language:response_language",)
        assert pair.kwargs == ({"language": "de"},)
        assert "German" in pair.instruction
    assert len({pair.instruction for pair in load_pairs("tiny", instructions=names[1])}) == 8
    assert not [name for name in load_pairs("format", n_queries=1).instructions if name.startswith("language")]
    with pytest.raises(DataError, match="unknown instruction id 'language:response_language_xx'"):
        load_pairs("format", instructions="language:response_language_xx")


def test_files_can_be_filtered_by_instruction_and_query(write):
    rows = [STOLFO | {"key": i, "prompt_without_instruction": f"Query {i // 2}?"} for i in range(8)]
    path = write(*rows, VALIDATION)
    assert len(load_pairs(path, instructions=COMMA)) == 8
    assert len(load_pairs(path, instructions=COMMA, n_queries=3)) == 6
    with pytest.raises(DataError, match="unknown instruction id"):
        load_pairs(path, instructions=CAPITAL)


def test_a_saved_set_loads_equal(tmp_path):
    path = tmp_path / "deep" / "pairs.jsonl"
    odd = InstructionPair("Décrire\u2028la pluie?", "Être «poli»\n…", "custom:polite", ({"n": [1, 2.5]},), source="own")
    bare = InstructionPair(None, "", COMMA, prompt="Describe rain without commas.", prompt_id="7-x")
    pairs = load_pairs("format", n_queries=2) + PairSet([odd, bare])
    pairs.save(path)
    assert load_pairs(path) == pairs
    assert load_pairs(str(path)).content_hash == pairs.content_hash
    assert [file.name for file in path.parent.iterdir()] == ["pairs.jsonl"]


def test_a_failing_save_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    pairs_of("One?").save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("steerlens.files.os.replace", full)
    with pytest.raises(OSError, match="full"):
        pairs_of("Two?").save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + json.dumps(STOLFO).encode() + b"\r\n\r\n")
    assert len(load_pairs(path)) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"key": 1, "prompt": ', "not JSON .*each line must be one JSON object"),
        ("[1, 2]", "must be a JSON object, got list"),
        ({"text": "Hello"}, "of no known schema"),
        (BARE, "pass this file as queries="),
        ({**IFEVAL, "prompt": None}, r"prompt must be a str; got None \(NoneType\)"),
        ({key: IFEVAL[key] for key in IFEVAL if key != "prompt"}, "prompt must be a str; got only the keys"),
        ({**IFEVAL, "prompt": " "}, "none of them empty"),
        ({**IFEVAL, "kwargs": [{}]}, "each has one dict of arguments"),
        ({**IFEVAL, "kwargs": [{}, None]}, "list of JSON objects"),
        ({**IFEVAL, "kwargs": [{}, {"num_bullets": None}]}, "needs num_bullets.*got nothing"),
        ({**IFEVAL, "kwargs": [{}, {"num_bullets": 3.5}]}, "needs num_bullets.*got 3.5"),
        ({**IFEVAL, "instruction_id_list": []}, "list of texts, not empty"),
        ({**IFEVAL, "instruction_id_list": [COMMA, 3]}, "list of texts, not empty"),
        ({**IFEVAL, "instruction_id_list": [COMMA, "bullets"]}, "unknown instruction id 'bullets'"),
        ({**STOLFO, "instruction_id_list_for_eval": [COMMA, COMMA]}, "has 1 ids and .* 2"),
        ({**STOLFO, "prompt_without_instruction": ""}, "none of them empty"),
        (STOLFO | {"key": 1}, r"repeats line 2 \(prompt_id '1-"),
    ],
)
def test_a_broken_line_is_named_by_file_and_number(write, row, message):
    path = write(STOLFO, STOLFO | {"key": 1}, "", row)
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 4: .*{message}"):
        load_pairs(path)


@pytest.mark.parametrize(
    ("rows", "bare", "message"),
    [
        ([IFEVAL, {**IFEVAL, "key": 70}], [BARE], r"rows\.jsonl, line 2: key 70 is not in the file of queries"),
        ([STOLFO], [BARE], r"rows\.jsonl, line 1: prompt_without_instruction is this row's base query"),
        ([IFEVAL], [BARE, BARE], r"bare\.jsonl, line 2: key 7 comes twice"),
        ([IFEVAL], [{"key": 7}], r"bare\.jsonl, line 1: model_output must be a str"),
        ([IFEVAL], [{"model_output": "Describe rain."}], r"bare\.jsonl, line 1: needs a key"),
    ],
)
def test_a_join_that_does_not_fit_is_refused(write, rows, bare, message):
    with pytest.raises(DataError, match=message):
        load_pairs(write(*rows), queries=write(*bare, name="bare.jsonl"))


def test_queries_are_not_joined_to_own_pairs(write, tmp_path):
    pairs_of("One?").save(tmp_path / "own.jsonl")
    with pytest.raises(DataError, match=r"own\.jsonl, line 1: .*remove queries="):
        load_pairs(tmp_path / "own.jsonl", queries=write(BARE))


def test_missing_empty_and_unreadable_files_are_named(tmp_path, write):
    write(STOLFO, name="ifeval.jsonl")
    with pytest.raises(DataError, match=r"no file .*ifevl\.jsonl; did you mean 'ifeval\.jsonl'"):
        load_pairs(tmp_path / "ifevl.jsonl")
    with pytest.raises(DataError, match="no file nowhere/pairs; check the path"):
        load_pairs("nowhere/pairs")
    with pytest.raises(DataError, match="is a folder"):
        load_pairs(tmp_path)
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        load_pairs(write("", name="empty.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl must be UTF-8"):
        load_pairs(tmp_path / "latin.jsonl")


# Real files, where they are at hand.


@needs_data
@pytest.mark.parametrize(
    ("name", "n", "n_queries"),
    [
        ("ifeval/input_data.jsonl", 541, 541),
        ("llm-steer-instruct/ifeval_single_instr_format.jsonl", 163, 163),
        ("llm-steer-instruct/ifeval_single_keyword_include.jsonl", 86, 39),
        ("llm-steer-instruct/ifeval_single_keyword_exclude.jsonl", 117, 49),
        ("llm-steer-instruct/inclusion_validation.jsonl", 276, 55),
        ("llm-steer-instruct/exclusion_validation.jsonl", 276, 55),
    ],
)
def test_published_files_load_whole_and_can_be_checked(name, n, n_queries):
    pairs = load_pairs(DATA / name)
    assert len(pairs) == n
    assert f"{n_queries} queries" in repr(pairs)
    for pair in pairs:
        assert pair.instruction in pair.prompt
        for instruction_id, kwargs in zip(pair.instruction_ids, pair.kwargs, strict=True):
            check_arguments(instruction_id, kwargs)


@needs_data
@pytest.mark.parametrize(
    ("name", "n_prompts", "n_languages"),
    [("ifeval/input_data.jsonl", 31, 22), ("llm-steer-instruct/ifeval_single_instr_format.jsonl", 17, 14)],
)
def test_every_language_of_the_published_files_is_known(name, n_prompts, n_languages):
    asked = [
        check_arguments(instruction_id, kwargs)["language"]
        for pair in load_pairs(DATA / name)
        for instruction_id, kwargs in zip(pair.instruction_ids, pair.kwargs, strict=True)
        if instruction_id == "language:response_language"
    ]
    assert (len(asked), len(set(asked))) == (n_prompts, n_languages)


@needs_data
def test_published_base_queries_join_every_ifeval_prompt():
    bare = DATA / "llm-steer-instruct" / "ifeval_wo_instructions.jsonl"
    pairs = load_pairs(DATA / "ifeval" / "input_data.jsonl", queries=bare)
    assert len(pairs) == 541
    assert all(pair.query for pair in pairs)
    assert [len(part) for part in pairs.split()] == [325, 108, 108]


@needs_data
def test_no_bundled_query_is_one_of_ifeval():
    def grams(text):
        words = re.findall(r"\w+", text.casefold())
        size = min(4, len(words))
        return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}

    pairs = load_pairs(
        DATA / "ifeval" / "input_data.jsonl",
        queries=DATA / "llm-steer-instruct" / "ifeval_wo_instructions.jsonl",
    )
    known = [grams(text) for pair in pairs for text in (pair.prompt, str(pair.query))]
    for query in bundled_queries("format"):
        own = grams(query)
        overlap = max(len(own & other) / len(own) for other in known)
        assert overlap < 0.5, query  # "What is the difference between ..." is shared, a topic is not


def test_the_tiny_set_asks_its_own_queries_under_the_bundled_instructions() -> None:
    pairs = load_pairs("tiny", instructions="detectable_format:title")
    assert [pair.query for pair in pairs] == list(bundled_queries("tiny"))
    assert pairs.instructions == ("detectable_format:title",)
    assert all(pair.source == "tiny" and pair.instruction for pair in pairs)
    assert not set(bundled_queries("tiny")) & set(bundled_queries("format"))
