"""The journal of generations: nothing lost, nothing doubled, nothing half-written."""

import json
import os
import stat
import subprocess
import sys

import pytest

from steerlens.errors import DataError
from steerlens.files import Journal, atomic_path, content_key, derived_seed, writable_folder, write_atomically
from steerlens.study.config import pairs_for


def test_keys_depend_on_content_and_not_on_the_order_of_dictionaries():
    assert content_key({"a": 1, "b": [2, 3]}) == content_key({"b": [2, 3], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    assert content_key(["1"]) != content_key([1])


def test_seeds_are_31_bit_and_depend_on_every_part():
    seeds = {derived_seed(run, query, trial) for run in range(3) for query in ("a", "b") for trial in range(3)}
    assert len(seeds) == 18
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_journal_gives_back_what_was_appended(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append([{"key": "a", "text": "ü\u2028 \n"}, {"key": "b", "text": ""}])
    with Journal(path) as journal:
        assert journal.records == {"a": {"key": "a", "text": "ü\u2028 \n"}, "b": {"key": "b", "text": ""}}


def test_a_key_is_written_once(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append([{"key": "a", "text": "first"}])
        journal.append([{"key": "a", "text": "second"}, {"key": "b", "text": "third"}])
        assert journal.records["a"]["text"] == "first"
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b"]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_cut_short_by_a_kill_is_dropped_and_its_place_used_again(tmp_path, cut):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append([{"key": "a", "text": "kept"}, {"key": "b", "text": "a long text that is cut"}])
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path) as journal:
        assert set(journal.records) == {"a"}
        journal.append([{"key": "b", "text": "again"}])
    with Journal(path) as journal:
        assert journal.records["b"]["text"] == "again"
    assert len(path.read_text().splitlines()) == 2


def test_a_broken_line_in_the_middle_is_an_error_with_its_number_and_nothing_is_changed(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"key": "a"}\nnot json\n{"key": "c"}\n')
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"journal\.jsonl, line 2: every line must be a record with a key"):
        Journal(path)
    assert path.read_bytes() == before


def test_a_second_process_is_refused_while_a_run_writes(tmp_path):
    path = tmp_path / "journal.jsonl"
    code = f"from steerlens.files import Journal; Journal({str(path)!r})"
    with Journal(path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert other.returncode != 0
    assert "one run writes to" in other.stderr
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_atomic_write_that_fails_leaves_the_old_file_and_no_scratch(tmp_path):
    path = write_atomically(tmp_path / "table.csv", "old")
    with pytest.raises(RuntimeError, match="half-way"), atomic_path(path) as scratch:  # noqa: PT012
        scratch.write_text("new")
        raise RuntimeError("half-way")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]


def test_an_atomic_write_gives_ordinary_permissions(tmp_path):
    expected = tmp_path / "plain"
    expected.write_text("")
    written = write_atomically(tmp_path / "table.csv", "x")
    assert stat.S_IMODE(os.stat(written).st_mode) == stat.S_IMODE(os.stat(expected).st_mode)


def test_an_output_folder_that_cannot_be_made_is_refused_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"an output folder must be writable, got .*file/run.*; choose another"):
        writable_folder(tmp_path / "file" / "run")


def test_an_output_folder_without_write_permission_is_refused(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere (root), so no folder is unwritable")
    with pytest.raises(DataError, match="an output folder must be writable"):
        writable_folder(folder)


@pytest.mark.parametrize(
    ("pairs", "model", "found"),
    [
        ("auto", "tiny", "tiny"),
        ("auto", "/somewhere/tiny-base", "tiny"),
        ("auto", "smollm2-135m", "format"),
        ("auto", "someone/giant", "format"),
        ("format", "tiny", "format"),
        ("mine.jsonl", "tiny", "mine.jsonl"),
    ],
)
def test_the_tiny_models_are_asked_what_they_can_know_unless_told_otherwise(pairs: str, model: str, found: str) -> None:
    assert pairs_for(pairs, model) == found
