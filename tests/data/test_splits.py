"""Parts that share no query, however it is spelled and whatever file it comes from."""

import numpy as np
import pytest

from steerlens.data.families import keyword_pairs
from steerlens.data.load import load_pairs
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.data.splits import at_most, query_ids, three_parts, without_queries
from steerlens.errors import DataError

NO_COMMA = "punctuation:no_comma"
SPELLINGS = (
    "Caf\u00e9 {}: what\u2019s new?",
    "CAF\u00c9 {}:  what's new?",
    "cafe\u0301 {}:\u00a0what's\tnew?",
    "caf\u00e9 {}: \uff57hat's new?",
)


def spelled(n: int, spelling: str) -> PairSet:
    return PairSet(InstructionPair(spelling.format(i), "No commas.", NO_COMMA) for i in range(n))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_query_is_known_however_it_is_spelled(spelling: str) -> None:
    first = spelled(3, SPELLINGS[0])
    assert query_ids(spelled(3, spelling)) == query_ids(first)
    assert len(without_queries(first, query_ids(spelled(2, spelling)))) == 1


def test_spellings_of_a_query_are_in_one_part() -> None:
    every = PairSet(pair for spelling in SPELLINGS for pair in spelled(10, spelling))
    assert "10 queries" in repr(every)
    parts = [query_ids(part) for part in every.split(seed=0)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 10


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_is_tested_is_neither_fitted_nor_searched_on(spelling: str) -> None:
    pairs, test = spelled(12, SPELLINGS[0]), spelled(4, spelling)
    train, valid, tested = three_parts(pairs, test, seed=1)
    assert tested is test
    assert (len(train), len(valid)) == (6, 2)
    assert not query_ids(test) & query_ids(train + valid)
    assert not query_ids(train) & query_ids(valid)


def test_without_test_prompts_the_parts_are_a_split() -> None:
    pairs = spelled(10, SPELLINGS[0])
    assert three_parts(pairs, seed=3) == pairs.split(seed=3)


def test_numpy_counts_and_seeds_draw_what_plain_ones_draw() -> None:
    pairs = spelled(10, SPELLINGS[0])
    three, seed = np.int64(3), np.int32(7)
    assert at_most(pairs, three, seed) == at_most(pairs, 3, 7)
    assert pairs.sample(three, seed=seed) == pairs.sample_per_instruction(3, seed=7)
    assert pairs.split(seed=seed, fractions=np.array([0.5, 0.5])) == pairs.split(seed=7, fractions=(0.5, 0.5))
    drawn = load_pairs("tiny", instructions=NO_COMMA, n_queries=three, seed=seed)
    assert drawn == load_pairs("tiny", instructions=NO_COMMA, n_queries=3, seed=7)


def test_at_most_takes_all_where_there_are_fewer_and_refuses_none() -> None:
    pairs = spelled(3, SPELLINGS[0])
    assert at_most(pairs, 9, 0) == pairs
    with pytest.raises(DataError, match="numbers of prompts must be at least 1, got 0"):
        at_most(pairs, 0, 0)


def test_a_family_asks_a_query_once_in_its_first_spelling() -> None:
    asked = keyword_pairs(["Describe rain.", "describe  RAIN.", "Describe snow."], "harbor")
    assert [pair.query for pair in asked] == ["Describe rain.", "Describe snow."]
