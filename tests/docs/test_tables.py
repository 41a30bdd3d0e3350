"""docs/tables.md explains every column that small real runs produce, and no other."""

import re
from pathlib import Path

from tests.docs.columns import all_columns

PAGE = Path(__file__).parents[2] / "docs/tables.md"
OPTIONAL = (
    "Where measured.",
    "With a plan.",
    "With three components.",
    "In a sweep's file.",
    "In the file of a comparison.",
    "Behind a gate.",
)


def slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def explained() -> dict[str, dict[str, bool]]:
    """Heading -> its columns, those of the tables that it refers to among them -> whether they are always there."""
    parts = re.split(r"^### (.+)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: dict[str, dict[str, bool]] = {}
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        columns: dict[str, bool] = {}
        for anchor in re.findall(r"columns of \[[^\]]+\]\(#([\w-]+)\)", text):
            columns |= next(known for name, known in found.items() if slug(name) == anchor)
        for names, meaning in re.findall(r"^\| (`.+?`) \| (.+) \|$", text, flags=re.MULTILINE):
            columns |= dict.fromkeys(re.findall(r"`(.+?)`", names), not meaning.endswith(OPTIONAL))
        found[heading] = columns
    return {heading.strip("`"): columns for heading, columns in found.items() if heading.startswith("`")}


def test_the_page_explains_the_tables_that_there_are_column_by_column(tmp_path: Path) -> None:
    page, made = explained(), all_columns(tmp_path)
    assert sorted(page) == sorted(made)
    for table, columns in page.items():
        always = {name for name, there in columns.items() if there}
        assert set(made[table]) - set(columns) == set(), f"{table} has columns that are not explained"
        assert always - set(made[table]) == set(), f"{table} lacks columns that are explained"
    everywhere = {name for columns in made.values() for name in columns}
    assert {name for columns in page.values() for name in columns} <= everywhere, "an optional column is met nowhere"
