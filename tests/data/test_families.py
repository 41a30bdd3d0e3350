"""Length and keyword families: pairs, their checks, their vectors."""

import pytest
import torch

from steerlens.checks.registry import check_all
from steerlens.data.families import LENGTH_LEVELS, keyword_pairs, length_pairs, sentence_count, sentence_pairs
from steerlens.data.pairs import PairSet
from steerlens.errors import DataError
from steerlens.vectors.activations import record_activations
from steerlens.vectors.estimators import fit_steering_vector, fit_vectors

QUERIES = [f"Tell me about {word}." for word in ("rain", "the moon", "bread", "a fox", "Paris", "music")]


@pytest.mark.parametrize("level", LENGTH_LEVELS)
def test_every_level_asks_every_query_in_several_wordings(level):
    pairs = length_pairs(QUERIES * 2, level)
    assert [pair.query for pair in pairs] == QUERIES
    assert pairs.instructions == (f"length:{level}",)
    assert len({pair.instruction for pair in length_pairs([f"Query {i}." for i in range(60)], level)}) == 5


def responses(n: int) -> str:
    return " ".join(["It rains."] * n)


@pytest.mark.parametrize(("relation", "good"), [("exactly", {3}), ("at_most", {1, 2, 3}), ("at_least", {3, 4, 5})])
def test_the_check_of_a_number_of_sentences_is_that_number(relation, good):
    pair = sentence_pairs(QUERIES, relation, 3)[0]
    assert " 3 sentences" in pair.instruction
    followed = {
        n for n in range(1, 6) if all(v.strict for v in check_all(responses(n), pair.instruction_ids, pair.kwargs))
    }
    assert followed == good


def test_one_sentence_is_singular():
    assert all(
        "1 sentence" in pair.prompt and "1 sentences" not in pair.prompt
        for pair in sentence_pairs(QUERIES, "exactly", 1)
    )


def test_keyword_pairs_check_their_word_and_leave_out_queries_that_hold_it():
    include, exclude = (keyword_pairs(QUERIES, "Moon", mode) for mode in ("include", "exclude"))
    assert "Tell me about the moon." not in [pair.query for pair in include]
    assert len(include) == len(exclude) == len(QUERIES) - 1
    for text, has in (("The moon is far.", True), ("It is far.", False)):
        for pairs, wanted in ((include, has), (exclude, not has)):
            pair = pairs[0]
            assert check_all(text, pair.instruction_ids, pair.kwargs)[0].strict == wanted


def test_pairs_stand_in_the_order_in_which_their_queries_first_come():
    spelled = ["Describe rain.", "Describe snow.", "describe  RAIN."]
    assert [pair.query for pair in length_pairs(spelled, "short")] == spelled[:2]


def test_a_pairs_wording_depends_on_its_query_and_seed_alone():
    assert keyword_pairs(QUERIES[:3], "bird") == keyword_pairs(QUERIES, "bird")[:3]
    assert keyword_pairs(QUERIES, "bird", seed=1) != keyword_pairs(QUERIES, "bird")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keyword_pairs(["A moon."], "moon"), "queries that do not hold 'moon' themselves"),
        (lambda: keyword_pairs(QUERIES, " "), "a keyword must be a word"),
        (lambda: sentence_pairs(QUERIES, "exactly", 0), "a number of sentences must be at least 1, got 0"),
    ],
)
def test_impossible_families_are_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "n"), [("", 0), ("No end", 1), ("Mr. Fox ran. He hid!", 2), ("One\ntwo. Three.", 2), ("...", 0)]
)
def test_sentences_are_counted_with_abbreviations_and_without_bare_signs(text, n):
    assert sentence_count(text) == n


def test_vectors_are_fitted_once_per_content_and_found_again_under_any_name(llama, tmp_path, monkeypatch):
    sets = {word: keyword_pairs(QUERIES, word) for word in ("bird", "stone")}
    first = fit_vectors(llama.model, sets, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    alone = fit_steering_vector(record_activations(llama.model, sets["bird"]))
    assert all(torch.equal(first["bird"].directions[layer], alone.directions[layer]) for layer in alone.layers)
    monkeypatch.setattr("steerlens.vectors.estimators.record_activations", None)
    again = fit_vectors(llama.model, {"other name": sets["stone"]}, folder=tmp_path)["other name"]
    assert all(torch.equal(again.directions[layer], first["stone"].directions[layer]) for layer in again.layers)
    with pytest.raises(TypeError):  # other pairs are not there, and nothing can record them now
        fit_vectors(llama.model, {"bird": keyword_pairs(QUERIES, "bird", seed=1)}, folder=tmp_path)


def test_a_set_may_hold_pairs_of_several_checks(llama):
    mixed = PairSet([*sentence_pairs(QUERIES[:3], "at_most", 2), *sentence_pairs(QUERIES[:3], "at_most", 4)])
    vector = fit_vectors(llama.model, {"at_most": mixed})["at_most"]
    assert vector.metadata["n_pairs"] == "6"
