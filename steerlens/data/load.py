"""Pairs by name or from a file: the bundled sets, and the files that `readers` knows."""

import importlib.resources
import os
import random
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

from steerlens._typing import WholeNumber, whole
from steerlens.checks.catalogue import Instruction, format_instructions, language_instructions
from steerlens.checks.registry import check_arguments, instruction_types
from steerlens.data.pairs import InstructionPair, PairSet, digest, known_ids, ranked
from steerlens.data.readers import Line, at_line, existing, read_lines
from steerlens.errors import DataError


def load_pairs(
    source: str | os.PathLike[str],
    *,
    instructions: str | Iterable[str] | None = None,
    n_queries: WholeNumber | None = None,
    seed: WholeNumber = 0,
    queries: str | os.PathLike[str] | None = None,
) -> PairSet:
    """Pairs from the bundled set or from a file.

    Args:
        source: "format" (everyday queries) or "tiny" (queries that the tiny models can answer), each with the bundled
            instructions; or a JSONL or Parquet file. Each line is recognised by its keys: `PairSet.save`'s own; llm-steer-
            instruct (`prompt_without_instruction`); Split-IFEval (`separated_prompt`); official IFEval (`prompt`,
            `instruction_id_list`, `kwargs`), whose base query is unknown. The module `readers` says what is read of each.
        instructions: Keep these instruction ids only. Default: all; of the bundled ones the twelve format instructions, to which
            any `language:response_language_{code}` can be added.
        n_queries: Keep this many base queries, drawn by `seed`; the draws of two numbers are nested.
        seed: For `n_queries`, and for each bundled pair's phrasing and arguments.
        queries: For official IFEval, a JSONL file with `key` and `model_output`, the prompt without its instructions
            (llm-steer-instruct's ifeval_wo_instructions.jsonl), which gives the base queries.

    A file's `prompt_id` is its `key`, where it has one, and the default hash, since some files share a key between rows.
    Two lines that agree in query, prompt, ids, arguments and key are an error, not dropped: a prompt would count twice.
    Where `instruction_id_list` and `instruction_id_list_for_eval` differ, the id that `check` knows is taken, the
    former first. Checks of one's own are registered before their file is loaded (`register_check`).

    Returns:
        The pairs in the file's order; bundled ones query by query.

    Raises:
        DataError: for an unknown name or instruction id, a missing or empty file, more queries than there are, and for
            a broken line, with its number: not JSON, of no known schema, or an instruction that cannot be checked.

    >>> load_pairs("format", instructions="punctuation:no_comma", n_queries=8)
    PairSet(8 pairs, 8 queries, 1 instruction)
    """
    if source in BUNDLED_QUERIES:
        if queries is not None:
            raise DataError(f"queries= joins base queries to an IFEval file; {source!r} has its own; remove it")
        pairs = _bundled_pairs(str(source), instructions, seed)
    else:
        pairs = _file_pairs(existing(source), queries)
        pairs = pairs if instructions is None else pairs.filter(instructions)
    return pairs if n_queries is None else _keep_queries(pairs, n_queries, seed)


BUNDLED_QUERIES = {"format": "queries.txt", "tiny": "tiny_queries.txt"}


@cache
def bundled_queries(source: str) -> tuple[str, ...]:
    """The base queries of a bundled set.

    Args:
        source: "format" or "tiny".

    >>> len(bundled_queries("format"))
    120
    """
    file = importlib.resources.files("steerlens") / "bundled" / BUNDLED_QUERIES[source]
    return tuple(file.read_text(encoding="utf-8").splitlines())


def _bundled_pairs(source: str, instructions: str | Iterable[str] | None, seed: WholeNumber) -> PairSet:
    catalogue = {**format_instructions(), **language_instructions()}
    ids = known_ids(format_instructions() if instructions is None else instructions, catalogue)
    queries = bundled_queries(source)
    return PairSet(
        _bundled_pair(source, query, name, catalogue[name], seed)
        for query in queries
        for name in catalogue
        if name in ids
    )


def _bundled_pair(source: str, query: str, name: str, instruction: Instruction, seed: WholeNumber) -> InstructionPair:
    text, kwargs = instruction.render(random.Random(int(digest(seed, query, name), 16)))
    return InstructionPair(query, text, (instruction.id,), (kwargs,), source=source)


def _keep_queries(pairs: PairSet, n_queries: WholeNumber, seed: WholeNumber) -> PairSet:
    keys = {pair.query_key for pair in pairs}
    if not 1 <= (n_queries := whole(n_queries, "n_queries")) <= len(keys):
        raise DataError(f"n_queries must be in [1, {len(keys)}], the number of base queries; got {n_queries}")
    kept = set(ranked(keys, seed)[:n_queries])
    return PairSet(pair for pair in pairs if pair.query_key in kept)


# Files.


def _file_pairs(path: Path, queries: str | os.PathLike[str] | None) -> PairSet:
    lines: dict[str, int] = {}
    pairs: list[InstructionPair] = []
    for line in read_lines(path, queries):
        with at_line(path, line.number):
            pairs.append(_line_pair(line))
        if (first := lines.setdefault(pairs[-1].prompt_id, line.number)) != line.number:
            raise DataError(
                f"{path}, line {line.number}: repeats line {first} (prompt_id {pairs[-1].prompt_id!r}), and its prompt "
                "would count twice; remove one of them"
            )
    return PairSet(pairs)


def _line_pair(line: Line) -> InstructionPair:
    pair = InstructionPair(**line.fields)
    for name, arguments in zip(pair.instruction_ids, pair.kwargs, strict=True):
        if name in instruction_types():  # an own file may hold instructions that nothing checks
            check_arguments(name, arguments)
    return pair if line.key is None else replace(pair, prompt_id=f"{line.key}-{pair.prompt_id}")
