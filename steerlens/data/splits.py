"""Parts that share no query, and draws from them: what a vector was fitted on, or its layer chosen on, is not tested.

A query is known by `InstructionPair.query_id`, so another file, and another spelling of the query, hide nothing.
"""

from collections.abc import Collection

from steerlens._typing import WholeNumber, whole
from steerlens.data.pairs import PairSet
from steerlens.errors import DataError


def query_ids(pairs: PairSet) -> set[str]:
    """The ids of the queries that pairs ask."""
    return {pair.query_id for pair in pairs}


def without_queries(pairs: PairSet, ids: Collection[str]) -> PairSet:
    """The pairs that ask none of these queries."""
    left_out = set(ids)
    return PairSet(pair for pair in pairs if pair.query_id not in left_out)


def three_parts(
    pairs: PairSet, test: PairSet | None = None, *, seed: WholeNumber = 0
) -> tuple[PairSet, PairSet, PairSet]:
    """Pairs to fit on, to search on and to test, without a common query.

    Args:
        test: What to test on; its queries are left out of the other two. Default: a fifth of the pairs' queries.

    Raises:
        DataError: if there are too few queries for the parts.
    """
    if test is None:
        train, valid, test = pairs.split(seed=seed)
    else:
        train, valid = without_queries(pairs, query_ids(test)).split(seed=seed, fractions=(0.75, 0.25))
    return train, valid, test


def at_most(pairs: PairSet, n: WholeNumber, seed: WholeNumber) -> PairSet:
    """Of each instruction n pairs, or all where there are fewer.

    Raises:
        DataError: if n is not a whole number of at least 1.
    """
    if (n := whole(n, "a number of prompts")) < 1:
        raise DataError(f"numbers of prompts must be at least 1, got {n}")
    groups = pairs.by_instruction().values()
    return PairSet(pair for group in groups for pair in group.sample(min(n, len(group)), seed=seed))
