"""A study in a folder that is killed, and goes on when it is asked for again."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from steerlens.study import responses


def assert_goes_on(
    ask: Callable[[Path], Any], folder: Path, monkeypatch: pytest.MonkeyPatch, *, kept_rows: int, files: Sequence[str]
) -> Any:
    """What is asked for whole, in `folder / "whole"`; killed in its third batch, in `folder / "cut"`, it ends in the same files.

    Args:
        kept_rows: What the first two batches have answered.
    """
    whole, cut = folder / "whole", folder / "cut"
    found = ask(whole)
    original, calls = responses.answer, []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(responses, "answer", dies)
    with pytest.raises(KeyboardInterrupt):
        ask(cut)
    assert not (cut / "table.csv").exists()
    kept = (cut / "generations.jsonl").read_text()
    assert kept.count("\n") == kept_rows
    ask(cut)
    assert (cut / "generations.jsonl").read_text().startswith(kept)
    for name in files:
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    return found
