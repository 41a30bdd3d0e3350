"""The site builds with warnings as errors, has every public name, and asks nothing of the network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import steerlens as sl

ROOT = Path(__file__).parents[2]
ROOMS = [path.parent.name for path in (ROOT / "steerlens").glob("*/__init__.py")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"EXECUTE": "no", "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    # Not --quiet: with it MkDocs counts no warnings, and --strict lets them pass.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def html(site: Path) -> dict[str, str]:
    return {str(path.relative_to(site)): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def test_every_public_name_is_on_a_page(site: Path) -> None:
    everything = "".join(text for name, text in html(site).items() if name.startswith("api"))
    names = {f"steerlens.{room}.{name}" for room in ROOMS for name in getattr(sl, room).__all__}
    shown = {name.rpartition(".")[2] for name in names}
    names |= {f"steerlens.{name}" for name in sl.__all__ if name not in {*ROOMS, *shown}}
    assert [name for name in sorted(names) if f'id="{name}"' not in everything] == []


def test_every_page_and_figure_of_the_results_is_there(site: Path) -> None:
    for name in ("RESULTS", "tiny_card", "LOG"):
        pictures = re.findall(r"!\[.*?\]\((.+?)\)", (ROOT / f"analysis/{name}.md").read_text(encoding="utf-8"))
        page = (site / f"analysis/{name}.html").read_text(encoding="utf-8")
        assert [one for one in pictures if f'src="{one}"' not in page or not (site / "analysis" / one).is_file()] == []


def test_every_notebook_has_its_page(site: Path) -> None:
    assert [
        path for path in (ROOT / "notebooks").glob("*.ipynb") if not (site / f"notebooks/{path.stem}.html").is_file()
    ] == []


def test_no_script_style_font_or_picture_comes_from_elsewhere(site: Path) -> None:
    """Links lead elsewhere when they are followed; nothing else does."""
    for name, text in html(site).items():
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", text):
            if 'rel="canonical"' not in tag:
                assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), (name, tag)
    for path in [*site.rglob("*.css")]:
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), path


def test_no_mark_of_a_page_is_left_over(site: Path) -> None:
    for name, text in html(site).items():
        assert "{{ README" not in text, name
        assert "data-number=" not in text, name
