"""Generations on disk: written before they are scored, found again by what they depend on.

A generation's key is a hash of all that decides its text: model weights, prompt, format, sampling settings, seed, and the plan
with the numbers of its vectors. The file is a journal of JSON lines, one batch at a time, flushed to the disk; a line cut short
by a kill is dropped when the file is opened again. So a rerun finds exactly what is missing, and a changed setting finds nothing
stale, because it asks for other keys.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerlens.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


def content_key(content: Any) -> str:
    """16 hex digits of plain data (numbers, strings, lists, dicts), whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def derived_seed(*parts: Any) -> int:
    """A seed below 2**31 that depends on all of its parts, and on nothing else."""
    return int(content_key([str(part) for part in parts])[:8], 16) >> 1


def writable_folder(path: str | Path) -> Path:
    """The folder, made if need be.

    Raises:
        DataError: if it cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"an output folder must be writable, got {str(folder)!r}: {reason}; choose another") from error
    return folder


def start_folder(folder: Path, identity: str, settings: Mapping[str, Any], results: Iterable[str]) -> None:
    """Write a folder's settings (config.json) before its work begins.

    Results of another identity are removed, so that they are never read as those of these settings.
    """
    path = folder / "config.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if before.get("identity") != identity:
        for name in results:
            (folder / name).unlink(missing_ok=True)
    write_atomically(path, json.dumps({"identity": identity, **settings}, indent=2, default=str) + "\n")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch path beside `path`, whose file takes its place if the block succeeds and is gone if it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file that appears whole or not at all."""
    with atomic_path(path) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def json_lines(frame: "pd.DataFrame") -> str:
    """A frame as JSON lines, one row each."""
    return str(frame.to_json(orient="records", lines=True, force_ascii=False))


class Journal:
    """A JSONL file of records by key, open for appending by one process at a time.

    Example:
        >>> with Journal(folder / "generations.jsonl") as journal:          # doctest: +SKIP
        ...     journal.append([{"key": "a", "text": "..."}])
        ...     journal.records["a"]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.records: dict[str, dict[str, Any]] = {}
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise DataError(
                f"one run writes to {str(self.path)!r} at a time, and another holds it; wait for it, or choose another folder"
            ) from error
        try:
            self._recover()
        except BaseException:
            self._file.close()
            raise

    def _recover(self) -> None:
        """Read what is whole; cut off a last line that a kill left unfinished."""
        end = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                    self.records[record["key"]] = record
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f"{self.path}, line {number}: every line must be a record with a key, got {line[:60]!r}; "
                        "restore the file, or start in another folder"
                    ) from error
                end += len(line)
        self._file.truncate(end)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records and wait until they are on the disk; a key that is already there is not written again."""
        new = [dict(record) for record in records if record["key"] not in self.records]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in new]
        data = "".join(lines).encode()
        if (written := self._file.write(data)) != len(data):  # one call, so that a kill leaves all of it or nothing
            raise DataError(
                f"{self.path}: wrote {written} of {len(data)} bytes; is the disk full? Make room, and run again"
            )
        os.fsync(self._file.fileno())
        self.records.update((record["key"], record) for record in new)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
