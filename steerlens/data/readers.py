"""The schemas that files of instruction pairs come in, read line by line into the fields of a pair.

A file is JSONL, one JSON object a line, or Parquet, one row of the same keys; an empty cell of a table is an absent key.

| schema | known by | base query | instruction |
|---|---|---|---|
| own (`PairSet.save`) | `instruction_ids`, or `query` and `instruction` | `query` | `instruction` |
| llm-steer-instruct | `prompt_without_instruction` | that | the rest of `prompt` |
| Split-IFEval | `separated_prompt` | that | the rest of `prompt`, or from the first to the last of `instructions` |
| IFEval | `prompt`, `instruction_id_list`, `kwargs` | unknown, or joined by `key` | the rest of `prompt` |

"The rest" is what the prompt says before or after the query; where the two are woven together the instruction is "".
IFEval is Zhou et al., "Instruction-Following Evaluation for Large Language Models" (2023); llm-steer-instruct holds the
data of Stolfo et al. (ICLR 2025); Split-IFEval is ibm-research/Split-IFEval on the hub. Its `prompt` is the task, a line
that announces instructions, and IFEval's own instructions as a list in `instructions`; one of these may ask for several
things, or for one that no id checks, so their number need not be that of the ids. Its `original_prompt`, IFEval's wording,
is checked to be a text and not kept.

What is wrong with a line is said with the file and the line. Whether the instructions can be checked is not looked at.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlens.checks.registry import instruction_types
from steerlens.data.cells import absent, own_types
from steerlens.errors import DataError, SteerlensError, nearest
from steerlens.files import user_path

_Row = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One line of a file of pairs."""

    number: int
    """Counted from one, as editors do."""
    fields: dict[str, Any]
    """The arguments of `InstructionPair`."""
    key: Any = None
    """What the file calls the row; None where it has no name of its own."""


def read_lines(path: Path, queries: str | os.PathLike[str] | None = None) -> Iterator[Line]:
    """The lines of a JSONL or Parquet file of pairs, each in the schema that its keys say.

    Args:
        queries: For official IFEval, a JSONL file with `key` and `model_output`, the prompt without its instructions.

    Raises:
        DataError: for a file or a line that cannot be read.
    """
    joined = None if queries is None else _queries_by_key(existing(queries))
    for number, row in _rows(path):
        with at_line(path, number):
            # A file's name need not be Unicode: Python keeps its odd bytes as halves of surrogate pairs, which no pair may hold.
            line = _line(number, row, path.name.encode(errors="replace").decode(), joined)
        yield line


def _line(number: int, row: _Row, source: str, joined: Mapping[Any, str] | None) -> Line:
    if "instruction_ids" in row or {"query", "instruction"} <= row.keys():
        if joined is not None:
            raise DataError("own pairs have what base query there is; remove queries=, which is for IFEval files")
        return Line(number, _own_fields(row, source))
    if "instruction_id_list" in row and "kwargs" in row:
        return Line(number, _ifeval_fields(row, source, _base_query(row, joined)), row.get("key"))
    hint = "; pass this file as queries= beside the IFEval file" if "model_output" in row else ""
    raise DataError(
        f"keys {sorted(row)} are of no known schema; a row needs query and instruction (own format), or prompt, "
        f"instruction_id_list and kwargs (IFEval){hint}"
    )


def _own_fields(row: _Row, source: str) -> _Row:
    return {
        "query": None if absent(row.get("query")) else _field(row, "query", str),
        "instruction": _field(row, "instruction", str, default=""),
        "instruction_ids": _strings(row, "instruction_ids") if row.get("instruction_ids") else (),
        "kwargs": _dicts(row, "kwargs") if row.get("instruction_ids") else (),
        "prompt": _field(row, "prompt", str, default=""),
        "prompt_id": _field(row, "prompt_id", str, default=""),
        "source": _field(row, "source", str, default=source),
    }


def _ifeval_fields(row: _Row, source: str, query: str | None) -> _Row:
    prompt = _field(row, "prompt", str)
    instruction = "" if query is None else instruction_in(prompt, query)
    if "separated_prompt" in row:
        _field(row, "original_prompt", str, default="")
        listed = _strings(row, "instructions") if "instructions" in row else ()
        instruction = instruction or _span_of(prompt, listed)
    return {
        "query": query,
        "instruction": instruction,
        "instruction_ids": _checkable_ids(row),
        "kwargs": _dicts(row, "kwargs"),
        "prompt": prompt,
        "source": source,
    }


def _base_query(row: _Row, joined: Mapping[Any, str] | None) -> str | None:
    own = next((name for name in ("prompt_without_instruction", "separated_prompt") if name in row), None)
    if joined is None:
        return None if own is None else str(_field(row, own, str))
    if own is not None:
        raise DataError(f"{own} is this row's base query; remove queries=, which is for official IFEval files")
    key = row.get("key")
    if isinstance(key, list | dict) or key not in joined:
        raise DataError(f"key {key!r} is not in the file of queries; are both of one data set?")
    return joined[key]


def instruction_in(prompt: str, query: str) -> str:
    """What `prompt` says before or after `query`; "" where the instruction is woven into it."""
    if prompt.startswith(query):
        return prompt[len(query) :].strip()
    return prompt[: -len(query)].strip() if prompt.endswith(query) else ""


def _span_of(prompt: str, instructions: Sequence[str]) -> str:
    """The part of `prompt` from the first to the last of the instructions, up to white space; "" if one is not there."""
    start, end = len(prompt), 0
    for instruction in filter(str.strip, instructions):
        found = re.search(r"\s+".join(map(re.escape, instruction.split())), prompt)
        if found is None:
            return ""
        start, end = min(start, found.start()), max(end, found.end())
    return prompt[start:end]


def _checkable_ids(row: _Row) -> tuple[str, ...]:
    ids = _strings(row, "instruction_id_list")
    fallback = _strings(row, "instruction_id_list_for_eval") if "instruction_id_list_for_eval" in row else ids
    known = instruction_types()
    if len(fallback) != len(ids):
        raise DataError(f"instruction_id_list has {len(ids)} ids and instruction_id_list_for_eval {len(fallback)}")
    chosen = tuple(a if a in known else b for a, b in zip(ids, fallback, strict=True))
    if unknown := [name for name in chosen if name not in known]:
        raise DataError(
            f"unknown instruction id {unknown[0]!r}; {nearest(unknown[0], known)}; "
            "a check of your own must be registered (register_check) before its file is loaded"
        )
    return chosen


def _queries_by_key(path: Path) -> dict[Any, str]:
    queries: dict[Any, str] = {}
    for number, row in _rows(path):
        with at_line(path, number):
            key = row.get("key")
            if key is None or isinstance(key, list | dict):
                raise DataError(f"needs a key (a number or a text) and model_output; got the keys {sorted(row)}")
            if key in queries:
                raise DataError(f"key {key!r} comes twice, so that its query is ambiguous; remove one of the lines")
            queries[key] = _field(row, "model_output", str)
    return queries


@contextmanager
def at_line(path: Path, number: int) -> Iterator[None]:
    """Says the file and the line with whatever is wrong in the block."""
    try:
        yield
    except SteerlensError as error:
        unit = "row" if path.suffix == PARQUET else "line"
        raise DataError(f"{path}, {unit} {number}: {error}") from error


def _rows(path: Path) -> Iterator[tuple[int, _Row]]:
    """Line numbers, from one, and the objects on them; blank lines are skipped."""
    if path.suffix == PARQUET:
        yield from _parquet_rows(path)
        return
    try:
        with path.open(encoding="utf-8-sig") as file:  # editors on Windows begin a file with a byte order mark
            lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8 text, and byte {error.start} is not; save it as UTF-8") from error
    if not lines:
        raise DataError(f"{path} is empty; a file of pairs has one JSON object a line")
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); each line must be one JSON object") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: must be a JSON object, got {type(row).__name__}; one row a line")
        yield number, row


PARQUET = ".parquet"


def _parquet_rows(path: Path) -> Iterator[tuple[int, _Row]]:
    try:
        import pandas as pd

        table = pd.read_parquet(path)
    except ImportError as error:
        raise DataError(
            f"reading {path} needs pyarrow, which is not installed; pip install pyarrow, or convert the file with "
            "to_json(path, orient='records', lines=True)"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} must be a Parquet file, and it cannot be read: {error}") from error
    if table.empty:
        raise DataError(f"{path} is empty; a file of pairs has one row a pair")
    for number, row in enumerate(table.to_dict("records"), start=1):
        yield number, {str(name): own for name, cell in row.items() if not absent(own := own_types(cell))}


def existing(source: str | os.PathLike[str]) -> Path:
    """The file's path, or an error that says what is there instead."""
    path = user_path(source)
    if path.is_file():
        return path
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a .jsonl or .parquet file in it")
    if path.suffix or len(path.parts) > 1 or not isinstance(source, str):
        beside = [item.name for item in path.parent.glob("*") if item.suffix in (".jsonl", PARQUET)]
        close = difflib.get_close_matches(path.name, beside, n=1)
        raise DataError(f"no file {path}; " + (f"did you mean {close[0]!r} beside it?" if close else "check the path"))
    raise DataError(
        f"unknown set of pairs {source!r}; {nearest(source, ['format', 'tiny'])}, or the path of a .jsonl or .parquet file"
    )


def _field(row: _Row, name: str, kind: type, default: Any = None) -> Any:
    value = row.get(name, default)
    if not isinstance(value, kind):
        came = f"{value!r} ({type(value).__name__})" if name in row else f"only the keys {sorted(row)}"
        raise DataError(f"{name} must be a {kind.__name__}; got {came}")
    return value


def _strings(row: _Row, name: str) -> tuple[str, ...]:
    values = _field(row, name, list)
    if not values or not all(isinstance(value, str) for value in values):
        raise DataError(f"{name} must be a list of texts, not empty; got {values!r}")
    return tuple(values)


def _dicts(row: _Row, name: str) -> tuple[_Row, ...]:
    values = _field(row, name, list)
    if not all(isinstance(value, dict) for value in values):
        raise DataError(f"{name} must be a list of JSON objects, one per instruction id; got {values!r}")
    return tuple(values)
