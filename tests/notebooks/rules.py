"""What a notebook must be: rules of the file, of how it runs, and of its exercises. Each returns the sentences that are broken.

A notebook is executed once. Before each empty attempt of an exercise a cell is put in that runs the folded solution and the check
on a copy of the names as they stand there, so the solution is tried in place of the attempt and what follows does not see it.
"""

import ast
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
from nbmake.nb_run import NotebookRun

FOLDER = Path(__file__).parents[2] / "notebooks"
MAX_LINES = 8
HEADING = re.compile(r"^### Exercise (\d) \([●○]{3}, \d+ minutes\)", re.M)
SOLUTION = re.compile(r"<details><summary>Solution</summary>\n\n```python\n(.*?)\n```\n\n(?:.*?\n\n)?</details>", re.S)
COLOUR = re.compile(r"\x1b\[[\d;]*m")
TRIAL = """\
_scope = dict(globals())
exec(compile({solution!r}, "the solution", "exec"), _scope)
_verdict = eval({check!r}, _scope)
print(repr(_verdict))
"""


def read(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    return notebook


def file_problems(notebook: Any) -> list[str]:
    """Rules that can be seen without running: how the file is kept, and how it reads."""
    cells = notebook.cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    found = []
    if (notebook.nbformat, notebook.nbformat_minor) != (4, 5):
        found.append(f"the format must be 4.5, got {notebook.nbformat}.{notebook.nbformat_minor}")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel must be python3")
    if any(cell.outputs or cell.execution_count is not None for cell in code):
        found.append("a notebook is kept without outputs and execution counts; clear them")
    if not all(re.fullmatch(r"c\d\d+", cell.id) for cell in cells):
        found.append("cells must have the ids c01, c02, ...")
    if not code or 'MODEL = "' not in code[0].source:
        found.append('the first code cell must choose the model in a line: MODEL = "tiny"')
    for cell in code:
        if (lines := len(re.findall(r"^(?!import |from |\s*$).*$", cell.source, re.M))) > MAX_LINES:
            found.append(f"a cell must have at most {MAX_LINES} lines beside imports, cell {cell.id} has {lines}")
    for first, second in pairwise(cells):
        if first.cell_type == "code" == second.cell_type and not tags(first):
            found.append(f"a sentence must stand before each code cell, and none stands before {second.id}")
    headings = re.findall(r"^## (.*)$", "\n".join(cell.source for cell in cells if cell.cell_type == "markdown"), re.M)
    if not headings or headings[-1] != "What was not shown":
        found.append('the last section must be "What was not shown"')
    return found


def exercise_problems(notebook: Any) -> list[str]:
    """Each exercise has a heading, an attempt, its check and a folded solution, in that order."""
    cells, found = notebook.cells, []
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    numbers = [number for cell in cells for number in numbers_of("exercise", cell)]
    if numbers != [str(i + 1) for i in range(len(numbers))] or HEADING.findall(text) != numbers:
        found.append("exercises must be numbered from 1, each below a heading '### Exercise 1 (●●○, 5 minutes)'")
    if not 2 <= len(numbers) <= 4:
        found.append(f"a notebook must have two to four exercises, got {len(numbers)}")
    for i, cell in enumerate(cells):
        for number in numbers_of("exercise", cell):
            after = cells[i + 1 : i + 3]
            if "..." not in cell.source:
                found.append(f"exercise {number} must begin with dots to fill in")
            if len(after) < 2 or numbers_of("check", after[0]) != [number] or not SOLUTION.search(after[1].source):
                found.append(f"exercise {number} must be followed by its check and its folded solution")
            elif not is_check(after[0].source, number):
                found.append(f"the check of exercise {number} must be one call, exercises.check_NN_{number}(...)")
    return found


def is_check(source: str, number: str) -> bool:
    lines = ast.parse(source).body
    return len(lines) == 1 and bool(re.match(rf"exercises\.check_\d\d_{number}\(", source))


def run_problems(path: Path, folder: Path) -> list[str]:
    """Rules that show when it runs: no error, nothing on stderr, empty attempts are "Not yet", solutions are "Right.".

    Args:
        folder: An empty one, in which the notebook is run.
    """
    for module in FOLDER.glob("*.py"):
        shutil.copy(module, folder)
    nbformat.write(with_solutions(read(path)), folder / path.name)
    result = NotebookRun(folder / path.name, default_timeout=300).execute()
    found = [] if result.error is None else [f"a cell fails: {COLOUR.sub('', result.error.trace)}"]
    for cell in result.nb.cells:
        outputs = cell.get("outputs", [])
        found += [f"cell {cell.id} writes to stderr: {o.text}" for o in outputs if o.get("name") == "stderr"]
        if result.error is None:
            said = said_by(outputs)
            found += [f"solution {n} does not pass: {said}" for n in numbers_of("solution", cell) if said != "Right."]
            found += [
                f"an empty attempt {n} passes" for n in numbers_of("check", cell) if not said.startswith("Not yet")
            ]
    return found


def with_solutions(notebook: Any) -> Any:
    """The notebook with a trial of each solution before its empty attempt."""
    cells: list[Any] = []
    for i, cell in enumerate(notebook.cells):
        for number in numbers_of("exercise", cell):
            check, solution = notebook.cells[i + 1].source, SOLUTION.search(notebook.cells[i + 2].source)
            assert solution is not None, f"exercise {number} has no solution"
            trial = TRIAL.format(solution=solution.group(1), check=check)
            cells.append(nbformat.v4.new_code_cell(trial, metadata={"tags": [f"solution-{number}"]}))
        cells.append(cell)
    notebook.cells = cells
    return notebook


def tags(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", []))


def numbers_of(kind: str, cell: Any) -> list[str]:
    """The numbers in tags such as "exercise-1"."""
    return [tag.removeprefix(f"{kind}-") for tag in tags(cell) if tag.startswith(f"{kind}-")]


def said_by(outputs: list[Any]) -> str:
    """What a cell printed or showed as text."""
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "".join(texts).strip()
