"""Every notebook is as the rules say, runs in silence, refuses its empty attempts and accepts its solutions."""

from pathlib import Path

import pytest

from tests.notebooks.rules import FOLDER, exercise_problems, file_problems, read, run_problems

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each
def test_the_file_keeps_the_conventions(path: Path) -> None:
    notebook = read(path)
    assert file_problems(notebook) + exercise_problems(notebook) == []


@each
def test_it_runs_in_silence_and_its_exercises_can_be_solved(path: Path, tmp_path: Path) -> None:
    problems = run_problems(path, tmp_path)
    assert not problems, "\n".join(problems)
