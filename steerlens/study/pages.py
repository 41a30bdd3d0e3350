"""Pages of a folder: the report of a run with what has been seen of its vectors, and the page of saved vectors.

Both are made of the files in the folder alone, so that a command that adds tables to a run writes its report anew.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from steerlens.errors import DataError
from steerlens.figures.page import Section, facts_table, write_page
from steerlens.figures.report import write_report
from steerlens.figures.sections import sections_of
from steerlens.files import user_path, write_atomically
from steerlens.study.arms import LayerStudy
from steerlens.study.scores import Evaluation
from steerlens.study.seeing import GEOMETRY, LENS, SEEN, STUDIES, Subject, read_table

RESULTS = (
    *("scores.jsonl", "search_scores.jsonl", "table.csv", "comparisons.csv", "search.csv", "facts.json", "report.html"),
    *SEEN,
)
"""What a run leaves in its folder, besides vectors and generations."""


def tables_in(folder: Path) -> dict[str, dict[str, pd.DataFrame]]:
    """What has been seen of the vectors in a folder, as far as it is finished: tables by "lens", "geometry" and "layers"."""
    found: dict[str, dict[str, pd.DataFrame]] = {}
    for kind, names in (("lens", LENS), ("geometry", GEOMETRY)):
        paths = {name: folder / kind / f"{name}.csv" for name in names}
        if all(path.is_file() for path in paths.values()):
            found[kind] = {name: read_table(path) for name, path in paths.items()}
    studied = [study for study in STUDIES if (folder / "layers" / study / "table.csv").is_file()]
    return found | {"layers": {study: LayerStudy.load(folder / "layers" / study).table for study in studied}}


def write_run_report(folder: str | Path) -> Path:
    """Write report.html of a finished run from its folder's files.

    Raises:
        DataError: if the run is not finished.
    """
    folder = user_path(folder)
    about = require_run(folder)
    search = pd.read_csv(folder / "search.csv", keep_default_na=False, na_values=[""]).astype({"layer": "Int64"})
    return write_report(
        folder / "report.html",
        scores=Evaluation.load(folder).scores,
        search={str(name): part.drop(columns="condition") for name, part in search.groupby("condition", sort=False)},
        seen=tables_in(folder),
        facts=about["facts"],
        title=about["title"],
    )


def write_facts(folder: Path, title: str, facts: Mapping[str, Any]) -> None:
    """Keep what the report says of a run besides its results: facts.json. It is written last, and marks a finished run."""
    write_atomically(folder / "facts.json", json.dumps({"title": title, "facts": facts}, indent=2, default=str) + "\n")


def require_run(folder: Path) -> dict[str, Any]:
    """The title and the facts of a finished run.

    Raises:
        DataError: if the folder holds something else, or the run is not finished.
    """
    settings = folder / "config.json"
    kind = json.loads(settings.read_text(encoding="utf-8")).get("kind") if settings.is_file() else None
    if kind != "run":
        held = f"that of a {kind}" if kind else "one without a run"
        fix = (
            f"give vectors of it: {folder}/vectors/*.safetensors"
            if kind == "sweep"
            else "give a run's folder, or vectors"
        )
        raise DataError(f"a folder to look at must be that of a run, got {held}, {str(folder)!r}; {fix}")
    if not (folder / "facts.json").is_file():
        raise DataError(f"a run must be finished to be looked at, got {str(folder)!r}; give its own command again")
    about: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return about


def write_vector_page(subject: Subject, kind: str) -> Path:
    """Write the page of saved vectors: the section of this kind ("lens", "geometry" or "layers"), and what they are."""
    seen = {kind: tables_in(subject.folder).get(kind, {})}
    sections = [replace(section, fold="") for section in sections_of(seen)]
    facts = {
        name: {key: value if len(value) <= 200 else f"{value[:190]}\u2026" for key, value in vector.metadata.items()}
        for name, vector in subject.vectors.items()
    }
    (about, *_) = sections
    title = f"{about.name}: {', '.join(subject.vectors)}"
    return write_page(
        subject.folder / f"{kind}.html", [*sections, Section("The vectors", facts_table(facts))], title=title
    )
