"""The Python blocks of the site's own pages run, in their order and each page by itself."""

import re
from pathlib import Path

import pytest

import steerlens as sl
from steerlens.checks import registry

PAGES = Path(__file__).parents[2] / "docs"


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", [str(page.relative_to(PAGES)) for page in sorted(PAGES.rglob("*.md")) if blocks(page)])
def test_the_lines_of_a_page_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks(PAGES / name)):
        exec(compile(block, f"{name}, block {number + 1}", "exec"), names)


def test_the_readme_shows_how_a_check_of_ones_own_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    (block,) = [block for block in blocks(PAGES.parent / "README.md") if "register_check" in block]
    names: dict[str, object] = {"__name__": "page", "sl": sl, "queries": ["Describe rain.", "Describe snow."]}
    exec(block, names)
    assert isinstance(names["pairs"], sl.PairSet)
    assert names["pairs"].instructions == ("pirate:arr",)
