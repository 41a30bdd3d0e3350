"""Families of instructions beside format: length and keywords, as pairs to fit vectors on and to test them with.

    length      five levels from extremely short to extremely verbose; and exactly, at most or at least n sentences
    keywords    include a word, or do not use it

as in Stolfo et al. (2025), sections 4 and 5, with phrasings of our own. There, a length vector is added with a constant
coefficient at one layer ("conciseness" is the level extremely_short, "verbosity" extremely_verbose); a word's vector is fitted on
about twenty base queries when it is needed, added to include the word, and subtracted to exclude it.

    pairs = keyword_pairs(queries[:20], "harbor")
    vector = fit_vectors(model, {"harbor": pairs})["harbor"]
    vector.at(5, operator="add", coeff=-60.0)                  the word is avoided

Levels have no check of their own: count words or sentences of the responses (`sentence_count`).
"""

import functools
import importlib.resources
import json
import random
from collections.abc import Iterable
from typing import Any, Literal, get_args

from steerlens._typing import WholeNumber, whole
from steerlens.checks.text import split_sentences
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import DataError, nearest
from steerlens.files import derived_seed, query_key

Level = Literal["extremely_short", "short", "medium", "verbose", "extremely_verbose"]


LENGTH_LEVELS: tuple[Level, ...] = get_args(Level)


Relation = Literal["exactly", "at_most", "at_least"]


RELATIONS: tuple[Relation, ...] = get_args(Relation)


Mode = Literal["include", "exclude"]


SENTENCES = "length_constraints:number_sentences"


@functools.cache
def _phrasings(family: str) -> dict[str, list[str]]:
    file = importlib.resources.files("steerlens") / "bundled" / "families.json"
    found: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))[family]
    return found


def length_pairs(queries: Iterable[str], level: Level, *, seed: WholeNumber = 0) -> PairSet:
    """Each query with a level of length, instruction id "length:{level}".

    Args:
        queries: Base queries; one that comes twice is taken once.
        level: One of `LENGTH_LEVELS`.
        seed: Decides each query's phrasing.

    Returns:
        One pair per query, in their order.

    Raises:
        DataError: for an unknown level.

    >>> length_pairs(["Describe rain."], "short")[0].instruction_id
    'length:short'
    """
    _known(level, LENGTH_LEVELS, "level")
    return _pairs(queries, _phrasings("length")[level], [f"length:{level}"], [{}], seed)


def sentence_pairs(queries: Iterable[str], relation: Relation, n: WholeNumber, *, seed: WholeNumber = 0) -> PairSet:
    """Each query with exactly, at most or at least n sentences, checked by IFEval's sentence count.

    IFEval only knows "less than" and "at least", so "exactly" is both together.

    Args:
        queries: Base queries; one that comes twice is taken once.
        relation: "exactly", "at_most" or "at_least".
        n: Sentences, at least one.
        seed: Decides each query's phrasing.

    Returns:
        One pair per query, in their order.

    Raises:
        DataError: for an unknown relation, or n below 1.

    >>> sentence_pairs(["Describe rain."], "at_most", 2)[0].kwargs
    ({'num_sentences': 3, 'relation': 'less than'},)
    """
    _known(relation, RELATIONS, "relation")
    if (n := whole(n, "a number of sentences")) < 1:
        raise DataError(f"a number of sentences must be at least 1, got {n}")
    below = {"num_sentences": n + 1, "relation": "less than"}
    least = {"num_sentences": n, "relation": "at least"}
    checks = {"exactly": [least, below], "at_most": [below], "at_least": [least]}[relation]
    words = {"n": n, "sentences": "sentence" if n == 1 else "sentences"}
    return _pairs(queries, _phrasings("sentences")[relation], [SENTENCES] * len(checks), checks, seed, **words)


def keyword_pairs(queries: Iterable[str], word: str, mode: Mode = "include", *, seed: WholeNumber = 0) -> PairSet:
    """Each query with a word to include or to exclude; queries that hold the word themselves are left out.

    Args:
        queries: Base queries; one that comes twice is taken once.
        word: The word to say, or not to say.
        mode: "include" or "exclude".
        seed: Decides each query's phrasing.

    Returns:
        One pair per query that does not hold the word, in their order.

    Raises:
        DataError: if no query is left.

    >>> keyword_pairs(["Describe rain.", "Describe a harbor."], "harbor")
    PairSet(1 pair, 1 query, 1 instruction)
    """
    _known(mode, get_args(Mode), "mode")
    if not word.strip():
        raise DataError("a keyword must be a word, got an empty text")
    free = [query for query in queries if word.casefold() not in query.casefold()]
    if not free:
        raise DataError(f"keyword pairs need queries that do not hold {word!r} themselves, got none; use other queries")
    name, kwargs = (
        ("keywords:existence", {"keywords": [word]})
        if mode == "include"
        else ("keywords:forbidden_words", {"forbidden_words": [word]})
    )
    return _pairs(free, _phrasings("keywords")[mode], [name], [kwargs], seed, word=word)


def sentence_count(text: str) -> int:
    """How many sentences a text has, by pysbd; line breaks do not end one.

    >>> sentence_count("It rains. Dr. Smith is out! Why?")
    3
    """
    return len([part for part in split_sentences(text) if any(letter.isalnum() for letter in part)])


def _pairs(
    queries: Iterable[str],
    phrasings: list[str],
    ids: list[str],
    kwargs: list[dict[str, Any]],
    seed: WholeNumber,
    **words: Any,
) -> PairSet:
    def one(query: str) -> InstructionPair:
        # Of the text alone, so that a query keeps its phrasing when others come or go.
        rng = random.Random(derived_seed(seed, query, phrasings[0], *words.values()))
        return InstructionPair(query, rng.choice(phrasings).format(**words), ids, kwargs, source="families")

    first_spellings: dict[str, str] = {}
    for query in queries:
        first_spellings.setdefault(query_key(query), query)
    return PairSet(map(one, first_spellings.values()))


def _known(value: str, known: Iterable[str], what: str) -> None:
    known = list(known)
    if value not in known:
        raise DataError(f"{what} must be one of {', '.join(known)}, got {value!r}; {nearest(value, known)}")
