"""Files: names and keys made of content, whole or not at all, and journals of generations that a rerun finds again.

A generation's key is a hash of all that decides its text: model weights, prompt, format, sampling settings, seed, and the plan
with the numbers of its vectors. The file is a journal of JSON lines, one batch at a time, flushed to the disk; a line cut short
by a kill is dropped when the file is opened again. So a rerun finds exactly what is missing, and a changed setting finds nothing
stale, because it asks for other keys.
"""

import errno
import hashlib
import importlib
import json
import os
import re
import tempfile
import unicodedata
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from steerlens.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


def content_key(content: Any) -> str:
    """16 hex digits of plain data (numbers, NumPy's too, strings, lists, dicts), whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=_plain_number)
    # A text may hold half of a surrogate pair, which strict UTF-8 refuses: it must have a key of its own all the same.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def _plain_number(value: Any) -> Any:
    if not hasattr(value, "tolist"):
        raise TypeError(f"a key is made of numbers, strings, lists and dicts, got {value!r} ({type(value).__name__})")
    return value.tolist()


_QUOTES = str.maketrans("‘’‚‛“”„‟", "'" * 4 + '"' * 4)  # noqa: RUF001


def query_key(text: str) -> str:
    """What two spellings of one query have in common: their text up to case, white space, quotes and Unicode form.

    Wherever queries are told apart (splits, what was trained on, the clusters of an interval), they are told apart by this.

    >>> query_key("Say  “É”!") == query_key("say \\"e\\u0301\\"!")
    True
    """
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_QUOTES)
    # Folding can undo a composed form; format characters (a soft hyphen, a byte order mark) are not seen.
    seen = "".join(sign for sign in unicodedata.normalize("NFKC", folded) if unicodedata.category(sign) != "Cf")
    return " ".join(seen.split()) or text  # a text of nothing that is seen is like no other


def file_name(name: str, suffix: str) -> str:
    """A file's name for content of this name: readable, safe on every file system, at most 64 characters and the suffix.

    Names that differ, if only in case, have different files: the name's hash is part of it.

    >>> file_name("punctuation:no_comma", ".safetensors")
    'punctuation.no_comma-bd7cd47c.safetensors'
    """
    readable = re.sub(r"[^a-z0-9_]+", ".", name.lower()).strip(".")[:55]
    return f"{readable}-{content_key(name)[:8]}{suffix}"


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path that a user gave, with `~` for the home folder."""
    return Path(path).expanduser()


def derived_seed(*parts: Any) -> int:
    """A seed below 2**31 that depends on all of its parts, and on nothing else."""
    return int(content_key([str(part) for part in parts])[:8], 16) >> 1


def writable_folder(path: str | Path) -> Path:
    """The folder, made if need be.

    Raises:
        DataError: if it cannot be made or written to.
    """
    folder = user_path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # permission bits alone do not say: not to root, nor of a mount
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"an output folder must be writable, got {str(folder)!r}: {reason}; choose another") from error
    return folder


def start_folder(folder: Path, kind: str, identity: str, settings: Mapping[str, Any], results: Iterable[str]) -> None:
    """Write a folder's settings (config.json) before its work begins.

    Results of another identity are removed, so that they are never read as those of these settings.

    Args:
        kind: "run", "sweep", "evaluation" or a script's "measurement"; results share names, so a folder holds one kind.
        results: Files in the folder, or in folders of it.

    Raises:
        DataError: if the folder holds another kind.
    """
    path = user_path(folder) / "config.json"
    # Results go first. A kill in between then leaves settings without results, not results under others' settings.
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if before.get("kind", kind) != kind:
        raise DataError(
            f"a folder holds one kind of results, and {str(folder)!r} holds a {before['kind']}; choose another for a {kind}"
        )
    if before.get("identity") != identity:
        for name in results:
            (path.parent / name).unlink(missing_ok=True)
    write_atomically(path, json.dumps({"kind": kind, "identity": identity, **settings}, indent=2, default=str) + "\n")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch path beside `path`, whose file takes its place if the block succeeds and is gone if it does not."""
    path = user_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the file, since a name is only replaced in one step within a file system; by process, since two may write at once.
    scratch = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], text: str | Iterable[str]) -> Path:
    """Write a text file, of a text or of its parts, that appears whole or not at all."""
    with (
        atomic_path(path) as scratch,
        # What is no character (half of a surrogate pair) is escaped, as in JSON: nothing is lost for it.
        scratch.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
    ):
        file.writelines([text] if isinstance(text, str) else text)
    return user_path(path)


def json_lines(frame: "pd.DataFrame") -> Iterator[str]:
    """A frame as JSON lines, one row each; the text of some rows at a time."""
    for start in range(0, len(frame), 1024):
        yield str(frame.iloc[start : start + 1024].to_json(orient="records", lines=True, force_ascii=False))


class Records(Mapping[str, dict[str, Any]]):
    """The records of a journal by key. They stay on the disk: in memory is where each one stands.

    A record is read each time that it is asked for, and is the caller's own.

    >>> with Journal(folder / "generations.jsonl") as journal:
    ...     journal.append([{"key": "a", "text": "It rains."}])
    >>> len(journal.records), journal.records["a"]["text"]
    (1, 'It rains.')
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[str, int] = {}
        self._ends = array("q")
        self._file: IO[bytes] | None = None

    def add(self, key: str, size: int) -> None:
        """Say that the file's next line, of so many bytes, is the record of this key; of two, the later one counts."""
        self._lines[key] = len(self._ends)
        self._ends.append(self.end + size)

    @property
    def end(self) -> int:
        """Where the last line ends, in bytes."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, key: str) -> dict[str, Any]:
        line = self._lines[key]
        start = self._ends[line - 1] if line else 0
        # Unbuffered: what a buffer holds is mostly not the next record. Closed with the journal, it is opened for each one.
        with nullcontext(self._file) if self._file else self._path.open("rb", buffering=0) as file:
            file.seek(start)
            record: dict[str, Any] = json.loads(file.read(self._ends[line] - start))
        return record

    def __contains__(self, key: object) -> bool:
        return key in self._lines

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def __repr__(self) -> str:
        return f"Records({str(self._path)!r}, {len(self)} records)"

    def open(self) -> None:
        """Keep the file open for reading."""
        self._file = self._path.open("rb", buffering=0)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Journal:
    """A JSONL file of records by key, open for appending by one process at a time.

    Example:
        >>> with Journal(folder / "generations.jsonl") as journal:
        ...     journal.append([{"key": "a", "text": "It rains."}])
        ...     journal.records["a"]["text"]
        'It rains.'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        self.records = Records(self.path)
        # Unbuffered, so that a batch is one write to the system.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        try:
            # The lock comes first: what looks like a line cut short may be one that another process is writing.
            self._take()
            self._recover()
            self.records.open()
        except BaseException:
            self._file.close()
            raise

    def _take(self) -> None:
        """Lock the file; where it cannot be locked, go on and say so, since work is worth more than the guard."""
        try:
            _lock(self._file)
        except OSError as error:
            if error.errno in _HELD:
                raise DataError(
                    f"one run writes to {str(self.path)!r} at a time, and another holds it; wait for it, or choose "
                    "another folder"
                ) from error
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"{str(self.path)!r} cannot be locked ({error.strerror}): see to it that one run writes to it at a time",
                stacklevel=4,
            )

    def _recover(self) -> None:
        """Read what is whole; cut off a last line that a kill left unfinished."""
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self.records.add(json.loads(line)["key"], len(line))
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f"{self.path}, line {number}: every line must be a record with a key, got {line[:60]!r}; "
                        "restore the file, or start in another folder"
                    ) from error
        self._file.truncate(self.records.end)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records and wait until they are on the disk; a key that is already there is not written again."""
        new = {
            # Half of a surrogate pair becomes its JSON escape.
            record["key"]: (json.dumps(dict(record), ensure_ascii=False) + "\n").encode(errors="backslashreplace")
            for record in records
            if record["key"] not in self.records
        }
        data = b"".join(new.values())
        if (written := self._file.write(data)) != len(data):  # one call, so that a kill leaves all of it or nothing
            raise DataError(
                f"{self.path}: wrote {written} of {len(data)} bytes; is the disk full? Make room, and run again"
            )
        os.fsync(self._file.fileno())
        for key, line in new.items():
            self.records.add(key, len(line))

    def close(self) -> None:
        self.records.close()
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_HELD = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)
"""What a lock is refused with where another process holds it."""


_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What it is refused with where there are no locks: on some network and cloud file systems."""


_LOCKED_BYTE = 2**31 - 2
"""On Windows a locked byte cannot be read, so the one that stands for the file lies beyond its end."""


def _lock(file: IO[bytes]) -> None:
    """Take the file for this process. The lock goes with the file's closing, also by a kill.

    Raises:
        OSError: if another process holds it, or the file system or the platform has no locks.
    """
    try:
        import fcntl
    except ImportError:
        _lock_byte(file)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock_byte(file: IO[bytes]) -> None:
    try:
        msvcrt: Any = importlib.import_module("msvcrt")
    except ImportError as error:
        raise OSError(errno.ENOSYS, "this platform has no locks") from error
    os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)  # appending is at the file's end all the same
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
