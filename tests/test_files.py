"""The journal of generations: nothing lost, nothing doubled, nothing half-written."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
import types

import numpy as np
import pytest

from steerlens.errors import DataError
from steerlens.files import (
    Journal,
    atomic_path,
    content_key,
    derived_seed,
    file_name,
    query_key,
    start_folder,
    writable_folder,
    write_atomically,
)
from steerlens.models.load import NAMED_MODELS
from steerlens.study.config import TINY, pairs_for


def test_keys_depend_on_content_and_not_on_the_order_of_dictionaries():
    assert content_key({"a": 1, "b": [2, 3]}) == content_key({"b": [2, 3], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    assert content_key(["1"]) != content_key([1])


def test_seeds_are_31_bit_and_depend_on_every_part():
    seeds = {derived_seed(run, query, trial) for run in range(3) for query in ("a", "b") for trial in range(3)}
    assert len(seeds) == 18
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_numpy_numbers_make_the_keys_of_plain_ones():
    assert content_key([np.int64(3), np.float32(0.5), np.array([1, 2])]) == content_key([3, 0.5, [1, 2]])
    with pytest.raises(TypeError, match="a key is made of numbers, strings, lists and dicts"):
        content_key([object()])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Name a bird.", "  name\tA\nBIRD. "),
        ("Caf\u00e9?", "cafe\u0301?"),
        ("Ask \u201cwho\u2019s there\u201d.", 'Ask "who\'s there".'),
        ("\uff26\uff55\uff4c\uff4c width", "full\u00a0width"),
        ("The of\u00adfice", "\ufeffThe o\ufb03ce".replace("o\ufb03", "of\u200bfi")),
        ("STRASSE", "straße"),
    ],
)
def test_spellings_of_one_query_have_one_key(first: str, second: str) -> None:
    assert query_key(first) == query_key(second) == query_key(query_key(first))


@pytest.mark.parametrize("other", ["Name a bird?", "Name birds.", "Name a-bird.", "Name á bird.", "Namea bird."])
def test_other_queries_have_other_keys(other: str) -> None:
    assert query_key("Name a bird.") != query_key(other)


NAMES = [
    "my.x:y",
    "my:x.y",
    "MY:x.y",
    "my:x/y",
    "my:x\\y",
    "my:x+y:z",
    "con",
    "..",
    "+".join(["keywords:existence"] * 30),
    "мой:чек",
]


def test_names_that_differ_have_files_that_differ_on_any_file_system(tmp_path):
    files = [file_name(name, ".safetensors") for name in NAMES]
    assert len({name.lower() for name in files}) == len(NAMES)
    assert max(map(len, files)) <= 64 + len(".safetensors")
    for name in files:
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")
        write_atomically(tmp_path / name, name)
    assert len(list(tmp_path.iterdir())) == len(NAMES)


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert writable_folder("~/run") == tmp_path / "home" / "run"
    assert write_atomically("~/table.csv", "x") == tmp_path / "home" / "table.csv"
    with Journal("~/journal.jsonl") as journal:
        journal.append([{"key": "a"}])
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"run", "table.csv", "journal.jsonl"}
    assert not (tmp_path / "~").exists()


def test_half_of_a_surrogate_pair_is_kept_and_stops_no_run(tmp_path):
    text = "broken \ud83d emoji, whole \U0001f600"
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.append([{"key": content_key(text), "text": text}])
    with Journal(tmp_path / "journal.jsonl") as journal:
        assert journal.records[content_key(text)]["text"] == text
    (tmp_path / "journal.jsonl").read_text(encoding="utf-8")
    assert "\\ud83d" in write_atomically(tmp_path / "table.csv", text).read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, number):
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    with (
        pytest.warns(UserWarning, match=r"journal\.jsonl' cannot be locked .*: see to it that one run"),
        Journal(tmp_path / "journal.jsonl") as journal,
    ):
        journal.append([{"key": "a"}])
    assert (tmp_path / "journal.jsonl").read_text() == '{"key": "a"}\n'


def test_another_error_of_a_lock_travels(tmp_path, monkeypatch):
    def refused(*_: object) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(OSError, match="broken disk"):
        Journal(tmp_path / "journal.jsonl")


@pytest.mark.parametrize("held", [False, True])
def test_without_fcntl_a_byte_beyond_the_end_is_locked_as_windows_does_it(tmp_path, monkeypatch, held):
    locked: list[int] = []

    def locking(descriptor: int, mode: int, n: int) -> None:
        locked.append(os.lseek(descriptor, 0, os.SEEK_CUR))
        if held:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    path = tmp_path / "journal.jsonl"
    if held:
        with pytest.raises(DataError, match="one run writes to"):
            Journal(path)
    else:
        for key in "ab":
            with Journal(path) as journal:
                journal.append([{"key": key}])
        assert path.read_text() == '{"key": "a"}\n{"key": "b"}\n'
    assert min(locked) > 2**30


def test_the_package_can_be_imported_where_nothing_locks(tmp_path):
    code = (
        "import sys, warnings; sys.modules['fcntl'] = None; warnings.simplefilter('ignore')\n"
        "from steerlens.files import Journal\n"
        f"with Journal({str(tmp_path / 'journal.jsonl')!r}) as journal: journal.append([{{'key': 'a'}}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "journal.jsonl").read_text() == '{"key": "a"}\n'


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
        ("auto", "trained/tiny-base", "tiny"),
        ("auto", "~/trained/tiny-base", "tiny"),
        ("auto", "tinyllama-1.1b", "format"),
        ("auto", "someone/tiny-gpt2", "format"),
        ("auto", "someone/tiny", "format"),
        ("auto", "smollm2-135m", "format"),
        ("auto", "someone/giant", "format"),
        ("format", "tiny", "format"),
        ("mine.jsonl", "tiny", "mine.jsonl"),
    ],
)
def test_the_tiny_models_are_asked_what_they_can_know_unless_told_otherwise(
    pairs: str, model: str, found: str, tmp_path, monkeypatch
) -> None:
    (tmp_path / "trained" / "tiny-base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pairs_for(pairs, model) == found


def test_the_tiny_models_are_those_of_the_package() -> None:
    assert list(TINY) == [name for name, model in NAMED_MODELS.items() if not model.hub_id]


def test_a_folder_holds_one_kind_of_results(tmp_path):
    start_folder(tmp_path, "sweep", "a", {}, ["table.csv"])
    (tmp_path / "table.csv").write_text("kept")
    with pytest.raises(DataError, match="holds a sweep; choose another for a run"):
        start_folder(tmp_path, "run", "b", {}, ["table.csv"])
    assert (tmp_path / "table.csv").read_text() == "kept"
    start_folder(tmp_path, "sweep", "b", {}, ["table.csv"])
    assert not (tmp_path / "table.csv").exists()
