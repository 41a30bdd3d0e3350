"""Pairs from rows of tables: absent values, arrays and NumPy's numbers are read as what they mean."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from steerlens.data.cells import absent
from steerlens.data.load import load_pairs
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import DataError

BULLETS, COMMA, KEYWORDS = "detectable_format:number_bullet_lists", "punctuation:no_comma", "keywords:existence"
NOTHING = (None, math.nan, np.float64("nan"))
ROWS = [
    {
        "key": 1000,
        "prompt": "Name a bird. Use two bullets and the word wing.",
        "instruction_id_list": [BULLETS, KEYWORDS],
        "kwargs": [{"num_bullets": 2, "keywords": None}, {"num_bullets": None, "keywords": ["wing"]}],
        "prompt_without_instruction": "Name a bird.",
    },
    {
        "key": 1001,
        "prompt": "Name a fish. Use no commas.",
        "instruction_id_list": [COMMA],
        "kwargs": [{"num_bullets": None, "keywords": None}],
        "prompt_without_instruction": "Name a fish.",
    },
]


def content(pairs: PairSet) -> str:
    """What pairs say, without the file they come from."""
    return pairs.content_hash


def test_a_parquet_file_holds_the_pairs_of_its_jsonl_file(tmp_path: Path) -> None:
    pd.DataFrame(ROWS).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    table = load_pairs(tmp_path / "rows.parquet")
    assert content(table) == content(load_pairs(tmp_path / "rows.jsonl"))
    assert table[0].kwargs == ({"num_bullets": 2}, {"keywords": ["wing"]})
    table.save(tmp_path / "saved.jsonl")
    assert load_pairs(tmp_path / "saved.jsonl") == table


def test_rows_of_other_schemas_may_share_a_parquet_file(tmp_path: Path) -> None:
    bare = {name: value for name, value in ROWS[1].items() if name != "prompt_without_instruction"}
    pd.DataFrame([ROWS[0], bare]).to_parquet(tmp_path / "rows.parquet")
    assert [pair.query for pair in load_pairs(tmp_path / "rows.parquet")] == ["Name a bird.", None]


def test_a_bad_row_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    pd.DataFrame([ROWS[0], {**ROWS[1], "instruction_id_list": ["no:such"]}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet, row 2: unknown instruction id 'no:such'"):
        load_pairs(tmp_path / "rows.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(DataError, match="must be a Parquet file, and it cannot be read"):
        load_pairs(tmp_path / "text.parquet")


def test_a_row_of_a_data_frame_makes_the_pair_of_its_plain_values() -> None:
    plain = InstructionPair(
        "Name a bird.", "Two bullets.", (BULLETS, KEYWORDS), ({"num_bullets": 2}, {"keywords": ["x"]})
    )
    kwargs = np.array([{"num_bullets": np.int64(2), "keywords": math.nan}, {"keywords": np.array(["x"])}])
    row = InstructionPair(np.str_("Name a bird."), "Two bullets.", np.array([BULLETS, KEYWORDS]), kwargs)
    assert row == plain
    assert row.prompt_id == plain.prompt_id
    assert [type(value) for values in row.kwargs for value in values.values()] == [int, list]
    row.require_check()


@pytest.mark.parametrize("nothing", NOTHING)
def test_an_absent_text_is_none_however_a_table_says_it(nothing: object) -> None:
    pair = InstructionPair(nothing, nothing, COMMA, nothing, prompt="Name a bird without commas.", source=nothing)
    assert pair == InstructionPair(None, "", COMMA, prompt="Name a bird without commas.")
    assert InstructionPair("Name a bird.", "No commas.", COMMA, [nothing]).kwargs == ({},)
    with pytest.raises(DataError, match=r"a pair needs a query and an instruction, or a prompt"):
        InstructionPair("Name a bird.", nothing, COMMA)
    with pytest.raises(DataError, match=r"a pair needs a query and an instruction, or a prompt"):
        InstructionPair(nothing, "No commas.", COMMA)


@pytest.mark.parametrize("cell", [*NOTHING, np.float32("nan"), pd.NA, pd.NaT])
def test_every_way_to_say_nothing_is_known(cell: object) -> None:
    assert absent(cell)
    assert not any(map(absent, ("", 0, False, "nan", [], np.array([math.nan]))))


@pytest.mark.parametrize("value", [3.0, 2.5, math.inf])
def test_what_is_no_text_is_refused_by_name(value: object) -> None:
    with pytest.raises(DataError, match="query must be a text, got"):
        InstructionPair(value, "No commas.", COMMA)
    with pytest.raises(DataError, match="instruction must be a text, got"):
        InstructionPair("Name a bird.", value, COMMA)


@pytest.mark.parametrize("field", ["query", "instruction", "prompt", "prompt_id"])
def test_half_of_a_surrogate_pair_is_refused_where_it_comes_in(field: str, tmp_path: Path) -> None:
    row = {"query": "Name a bird.", "instruction": "No commas.", "instruction_ids": [COMMA], "kwargs": [{}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "prompt": "Name a bird. No commas.", field: "x \ud83d y"}))
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 1: {field} must be Unicode text, and sign 2 of"):
        load_pairs(tmp_path / "rows.jsonl")


def test_a_tilde_in_a_path_of_pairs_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pairs = PairSet([InstructionPair("Name a bird.", "No commas.", COMMA)])
    pairs.save("~/pairs.jsonl")
    assert (tmp_path / "pairs.jsonl").is_file()
    assert load_pairs("~/pairs.jsonl").content_hash == pairs.content_hash
