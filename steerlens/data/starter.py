"""A folder to begin with: five pairs of one's own, a check of one's own, a notebook and a README, copied from the package."""

import contextlib
import importlib.resources
import os
import tempfile
from pathlib import Path

from steerlens.errors import DataError
from steerlens.files import user_path

FILES = ("pairs.jsonl", "my_check.py", "first_contact.ipynb", "README.md")


def new_folder(path: str | os.PathLike[str]) -> Path:
    """A folder that a newcomer can run; all of its files appear, or none.

    Args:
        path: A folder that does not exist yet, or is empty.

    Raises:
        DataError: if something is there already, or the folder cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as there:
    ...     sorted(file.name for file in new_folder(there).iterdir())
    ['README.md', 'first_contact.ipynb', 'my_check.py', 'pairs.jsonl']
    """
    folder = user_path(path)
    try:
        there = folder.is_dir()
        if os.path.lexists(folder) and not (there and not any(folder.iterdir())):
            came = "a folder with something in it" if there else "a file"
            raise DataError(f"a new folder must be absent or empty, got {str(folder)!r}, {came}; choose another name")
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Written beside the folder, since a rename, which is done whole or not at all, stays within a file system.
        with tempfile.TemporaryDirectory(dir=folder if there else folder.parent, prefix=".new-") as scratch:
            made = Path(scratch) / "made"
            _write(made)
            if there:  # it may be where the user's shell stands, so it stays the folder that it is
                _move(made, folder)
            else:
                os.replace(made, folder)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"a new folder must be writable, got {str(folder)!r}: {reason}; choose another") from error
    return folder


def _write(folder: Path) -> None:
    templates = importlib.resources.files("steerlens") / "bundled" / "new"
    folder.mkdir()
    for name in FILES:
        # A template that ends in .py would be imported by tools that look for modules.
        template = f"{name}.template" if name.endswith(".py") else name
        (folder / name).write_bytes((templates / template).read_bytes())


def _move(made: Path, folder: Path) -> None:
    moved: list[Path] = []
    try:
        for name in FILES:
            os.replace(made / name, folder / name)
            moved.append(folder / name)
    except BaseException:
        for file in moved:
            with contextlib.suppress(OSError):
                file.unlink()
        raise
