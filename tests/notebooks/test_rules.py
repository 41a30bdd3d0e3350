"""Each rule, broken once: a notebook that breaks it is told so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.notebooks.rules import exercise_problems, file_problems, run_problems

SOLUTION = "<details><summary>Solution</summary>\n\n```python\nanswer = 3\n```\n\n</details>"
EXERCISE = [
    ("markdown", "### Exercise {n} (●○○, 2 minutes)\n\nGuess.", []),
    ("code", "answer = ...", ["exercise-{n}"]),
    ("code", "exercises.check_00_{n}(answer)", ["check-{n}"]),
    ("markdown", SOLUTION, []),
]
START = """\
MODEL = "tiny"
import exercises
is_three = exercises.check("a number")(lambda answer: None if answer == 3 else "guess again")
exercises.check_00_1 = exercises.check_00_2 = is_three
"""


@pytest.fixture
def notebook() -> Any:
    """A notebook that keeps all rules."""
    cells = [("markdown", "# A question", []), ("code", START, []), ("markdown", "Then.", []), ("code", "1 + 1", [])]
    for n in (1, 2):
        cells += [(kind, text.replace("{n}", str(n)), [t.format(n=n) for t in tags]) for kind, text, tags in EXERCISE]
    cells += [("markdown", "## What was not shown\n\nMuch.", [])]
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    made = [
        make[kind](text, id=f"c{i + 1:02}", metadata={"tags": tags} if tags else {})
        for i, (kind, text, tags) in enumerate(cells)
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    found = nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": kernel})
    found.nbformat_minor = 5
    return found


def test_a_notebook_that_keeps_all_rules_passes(notebook: Any, tmp_path: Path) -> None:
    assert file_problems(notebook) + exercise_problems(notebook) == []
    path = tmp_path / "kept.ipynb"
    nbformat.write(notebook, path)
    (tmp_path / "run").mkdir()
    assert run_problems(path, tmp_path / "run") == []


def store_an_output(notebook: Any) -> None:
    notebook.cells[3].outputs = [nbformat.v4.new_output("stream", text="2")]


def count_executions(notebook: Any) -> None:
    notebook.cells[3].execution_count = 1


def be_of_an_old_format(notebook: Any) -> None:
    notebook.nbformat_minor = 4


def name_another_kernel(notebook: Any) -> None:
    notebook.metadata.kernelspec.name = "ir"


def have_random_ids(notebook: Any) -> None:
    notebook.cells[3].id = "f3a9"


def choose_no_model(notebook: Any) -> None:
    notebook.cells[1].source = "import exercises"


def write_long_cells(notebook: Any) -> None:
    notebook.cells[3].source = "1 + 1\n" * 9


def say_nothing_before_code(notebook: Any) -> None:
    del notebook.cells[2]


def show_everything(notebook: Any) -> None:
    del notebook.cells[-1]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (store_an_output, "without outputs"),
        (count_executions, "without outputs"),
        (be_of_an_old_format, "4.5"),
        (name_another_kernel, "python3"),
        (have_random_ids, "ids c01"),
        (choose_no_model, "choose the model"),
        (write_long_cells, "at most 8 lines"),
        (say_nothing_before_code, "a sentence"),
        (show_everything, "What was not shown"),
    ],
)
def test_a_broken_rule_of_the_file_is_found(notebook: Any, break_it: Callable[[Any], None], said: str) -> None:
    break_it(notebook)
    (problem,) = file_problems(notebook)
    assert said in problem


def begin_solved(notebook: Any) -> None:
    notebook.cells[5].source = "answer = 3"


def have_no_heading(notebook: Any) -> None:
    notebook.cells[4].source = "Guess."


def have_no_solution(notebook: Any) -> None:
    notebook.cells[7].source = "answer = 3"


def check_by_hand(notebook: Any) -> None:
    notebook.cells[6].source = "answer == 3"


def have_one_exercise(notebook: Any) -> None:
    del notebook.cells[8:12]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (begin_solved, "dots"),
        (have_no_heading, "heading"),
        (have_no_solution, "folded solution"),
        (check_by_hand, "one call"),
        (have_one_exercise, "two to four"),
    ],
)
def test_a_broken_rule_of_exercises_is_found(notebook: Any, break_it: Callable[[Any], None], said: str) -> None:
    break_it(notebook)
    (problem,) = exercise_problems(notebook)
    assert said in problem


def fail(notebook: Any) -> None:
    notebook.cells[3].source = "1 / 0"


def warn(notebook: Any) -> None:
    notebook.cells[3].source = "import warnings\nwarnings.warn('beware')"


def solve_wrongly(notebook: Any) -> None:
    notebook.cells[7].source = SOLUTION.replace("3", "4")


def accept_dots(notebook: Any) -> None:
    notebook.cells[1].source += "exercises.check_00_1 = lambda answer: exercises.Verdict(True)"


def need_a_solution(notebook: Any) -> None:
    notebook.cells[9].source = "assert answer == 3\nanswer = ..."


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (fail, "ZeroDivisionError"),
        (warn, "cell c04 writes to stderr"),
        (solve_wrongly, "solution 1 does not pass: Not yet: guess again"),
        (accept_dots, "an empty attempt 1 passes"),
        (need_a_solution, "AssertionError"),
    ],
)
def test_a_broken_rule_of_running_is_found(
    notebook: Any, break_it: Callable[[Any], None], said: str, tmp_path: Path
) -> None:
    break_it(notebook)
    path = tmp_path / "broken.ipynb"
    nbformat.write(notebook, path)
    (tmp_path / "run").mkdir()
    (problem,) = run_problems(path, tmp_path / "run")
    assert said in problem
