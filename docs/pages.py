"""Pages that are made of something else, as MkDocs' hooks.

    api/*.md          a page for each room, from its `__all__`; a public name that the built page lacks stops the build
    notebooks/*.md    the syllabus, and each notebook with its outputs
    analysis/*.md     the results, the tiny models' card and the log, with their figures
    CHANGELOG.md      the changelog

A notebook is executed once, and its outputs are kept in runs/docs/ until it or the package changes. With EXECUTE=no in the
environment none is executed, and what was not kept is shown without outputs. Its figures are drawn in the reader's browser by
the plotly.js of the installed plotly.

Paths are those of the repository, so that links between its files hold. A link to a file that the site does not have keeps its
text only.
"""

import hashlib
import importlib
import json
import os
import posixpath
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from plotly.offline import get_plotlyjs

import steerlens
from steerlens._lazy import exported

sys.path.append(str(Path(__file__).parent))
from docstrings import as_markdown
from formulas import with_formulas

ROOT = Path(steerlens.__file__).parents[1]
ROOMS = [name for name in steerlens.__all__ if (ROOT / "steerlens" / name / "__init__.py").is_file()]
TEXTS = ("analysis/RESULTS.md", "analysis/tiny_card.md", "analysis/LOG.md", "CHANGELOG.md", "notebooks/README.md")
KEPT = ROOT / "runs/docs"
AT_A_TIME = 2

_outputs: dict[str, list[str]] = {}
"""Page -> the HTML of its outputs, which stand in for marks when its Markdown has become HTML."""


# MkDocs' events, in their order.


def on_config(config: Any) -> Any:
    """The nav, with the notebooks and the rooms that there are."""
    notebooks = [f"notebooks/{path.stem}.md" for path in notebook_paths()]
    more = {"Notebooks": notebooks, "API": [f"api/{name}.md" for name in ROOMS]}
    for entry in config.nav:
        for title in set(entry) & set(more):
            entry[title] += more[title]
    return config


def on_files(files: Files, config: Any) -> Files:
    """All generated files."""
    for name, content in generated():
        files.append(File.generated(config, name, content=content))
    for path in sorted((ROOT / "analysis/figures").glob("*.png")):
        files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Sections of the README where a page asks for them, and links that the site can follow."""
    markdown = re.sub(r"^\{\{ README: (.+) \}\}$", lambda found: section(found[1]), markdown, flags=re.MULTILINE)
    if page.file.src_uri in TEXTS or page.file.src_uri.startswith("notebooks/"):
        markdown = with_site_links(markdown, page.file.src_uri, files)
    # Their code is indented, so that "# " begins a title; in a notebook's it begins a comment.
    return with_one_title(markdown) if page.file.src_uri.startswith("analysis/") else markdown


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Outputs in the place of their marks; and every public name is on its room's page."""
    name = page.file.src_uri
    for number, output in enumerate(_outputs.get(name, [])):
        html = html.replace(mark(number), output)
    if 'class="figure"' in html:
        up = "../" * name.count("/")
        html += "".join(f'<script src="{up}assets/{script}"></script>' for script in ("plotly.min.js", "figures.js"))
    if name.startswith("api/") and (missing := missing_names(html, Path(name).stem)):
        raise PluginError(f"every public name must be on its room's page, and {name} lacks {', '.join(missing)}")
    return html


# What is generated.


def generated() -> Iterator[tuple[str, str]]:
    """Path in the site and content of every generated text."""
    yield "api/index.md", api_index()
    for room in ROOMS:
        yield f"api/{room}.md", api_page(room)
    for name in TEXTS:
        if (ROOT / name).is_file():
            yield name, (ROOT / name).read_text(encoding="utf-8")
    if not (ROOT / "notebooks/README.md").is_file():
        yield "notebooks/README.md", "# Notebooks\n\nThere are none yet.\n"
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for path, notebook in zip(notebook_paths(), pool.map(executed, notebook_paths()), strict=True):
            name = f"notebooks/{path.stem}.md"
            markdown, _outputs[name] = notebook_page(notebook)
            yield name, markdown
    yield "assets/plotly.min.js", get_plotlyjs()


def section(title: str) -> str:
    """What stands under a heading of the README."""
    parts = re.split(r"^## (.+)\n", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    if title not in found:
        raise PluginError(f"a section must be one of the README's, got {title!r}; there are {', '.join(found)}")
    return found[title].strip()


def with_site_links(markdown: str, source: str, files: Files) -> str:
    """Links to notebooks lead to their pages; to the README, home; to other files that the site lacks, nowhere."""

    def replaced(found: re.Match[str]) -> str:
        text, target = found["text"], found["target"]
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path, _, anchor = target.removeprefix("./").partition("#")
        path = re.sub(r"\.ipynb$", ".md", path)
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if there == "README.md":
            return f"[{text}]({posixpath.relpath('index.md', posixpath.dirname(source) or '.')})"
        if files.get_file_from_path(there) is None:
            return text if (ROOT / there).exists() else found[0]
        return f"[{text}]({path}{'#' + anchor if anchor else ''})"

    return re.sub(r"(?<!!)\[(?P<text>[^\[\]]+)\]\((?P<target>[^()\s]+)\)", replaced, markdown)


def with_one_title(markdown: str) -> str:
    """Later titles become sections, and their sections lie below them: a page's table of contents has one title."""
    first, *others = (
        re.split(r"^(?=# )", markdown, flags=re.MULTILINE)[1:] if markdown.startswith("# ") else (markdown,)
    )
    return first + "".join(re.sub(r"^(#+ )", r"#\1", part, flags=re.MULTILINE) for part in others)


# The rooms.


def names_of(room: str) -> list[str]:
    """The public names that have their place on a room's page; on the first page, those that no room has."""
    if room != "index":
        return list(getattr(steerlens, room).__all__)
    in_rooms = {name for one in ROOMS for name in getattr(steerlens, one).__all__}
    return [name for name in steerlens.__all__ if name not in {*ROOMS, *in_rooms}]


def missing_names(html: str, room: str) -> list[str]:
    """The public names that a built page does not have."""
    package = "steerlens" if room == "index" else f"steerlens.{room}"
    return [name for name in names_of(room) if f'id="{package}.{name}"' not in html]


def api_page(room: str) -> str:
    """A room: what it is for, its names, then module by module what is computed, and each name with its docstring."""
    package = getattr(steerlens, room)
    names, homes = names_of(room), exported(package.__file__)
    listed = "\n".join(
        f"| [`{name}`][steerlens.{room}.{name}] | {first_line(getattr(package, name))} |" for name in names
    )
    parts = [f"# sl.{room}", package.__doc__.strip(), f"| name | what it is |\n|---|---|\n{listed}"]
    for home in sorted(set(homes.values()), key=list(homes.values()).index):
        parts += [f"## {home.rpartition('.')[2]}", as_markdown(importlib.import_module(home).__doc__ or "")]
        parts += [f"::: steerlens.{room}.{name}" for name in names if homes[name] == home]
    return "\n\n".join(parts) + "\n"


def api_index() -> str:
    """The names of every day, each with a link to its room, and the rooms."""
    rooms = "\n".join(f"| [`sl.{name}`]({name}.md) | {first_line(getattr(steerlens, name))} |" for name in ROOMS)
    own = names_of("index")
    homes = {name: room for room in ROOMS for name in names_of(room)}
    everyday = "\n".join(
        f"| [`sl.{name}`][steerlens.{homes[name]}.{name}] | {first_line(getattr(steerlens, name))} |"
        for name in steerlens.__all__
        if name in homes
    )
    blocks = "\n".join(f"::: steerlens.{name}" for name in own)
    about = "Everything is reached from `import steerlens as sl`, and imported when it is first used."
    tables = [f"## Names of every day\n\n| name | what it is |\n|---|---|\n{everyday}"]
    tables += [f"## Rooms\n\n| room | what it is for |\n|---|---|\n{rooms}", "## Errors", blocks]
    return "\n\n".join(["# API", about, *tables]) + "\n"


def first_line(value: Any) -> str:
    """The first sentence of a docstring, for a table's cell."""
    if not callable(value) and not getattr(value, "__name__", "").startswith("steerlens"):
        return ""  # a constant's docstring is its type's
    text = " ".join((value.__doc__ or "").strip().split("\n\n")[0].split())
    return text.split(" >>> ")[0].replace("|", "\\|")


# The notebooks.


def notebook_paths() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def executed(path: Path) -> Any:
    """A notebook with its outputs: kept ones, new ones, or none if none are to be made."""
    kept = KEPT / f"{path.stem}-{digest(path)}.ipynb"
    if not kept.is_file():
        notebook = nbformat.read(path, as_version=4)
        if os.environ.get("EXECUTE") == "no":
            return notebook
        environment = {"PLOTLY_RENDERER": "plotly_mimetype", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        client = NotebookClient(
            notebook,
            timeout=600,
            startup_timeout=180,
            kernel_name="python3",
            resources={"metadata": {"path": str(path.parent)}},
        )
        try:
            client.execute(env=os.environ | environment)
        except CellExecutionError as error:
            raise PluginError(f"a notebook must run from top to bottom, and {path.name} does not: {error}") from error
        KEPT.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, kept)
        for old in set(KEPT.glob(f"{path.stem}-*.ipynb")) - {kept}:
            old.unlink()
    return nbformat.read(kept, as_version=4)


def digest(path: Path) -> str:
    """What a notebook's outputs depend on: itself, what lies beside it, and the package."""
    content = hashlib.sha256(sys.version.encode())
    for file in [path, *sorted(path.parent.glob("*.py")), *sorted((ROOT / "steerlens").rglob("*.py"))]:
        content.update(file.read_bytes())
    return content.hexdigest()[:16]


def mark(number: int) -> str:
    return f'<div class="output" data-number="{number}"></div>'


def notebook_page(notebook: Any) -> tuple[str, list[str]]:
    """A notebook as Markdown with marks, and the HTML that stands in for each mark."""
    parts, outputs = [], []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    without = code and not any(cell.get("execution_count") for cell in code)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            # Markdown inside folded solutions is Markdown, too.
            parts.append(with_formulas(cell.source).replace("<details>", '<details markdown="1">'))
            if without:
                parts.append("!!! note\n\n    This page was built without running the notebook.")
                without = False
        elif cell.cell_type == "code":
            parts.append(f"```python\n{cell.source}\n```")
            shown = "".join(filter(None, map(output_html, cell.outputs)))
            if shown:
                parts.append(mark(len(outputs)))
                outputs.append(f'<div class="output">{shown}</div>')
    return "\n\n".join(parts) + "\n", outputs


def output_html(output: Any) -> str:
    """One output of a cell as HTML."""
    if output.output_type == "stream":
        return "" if output.name == "stderr" else f"<pre>{escaped(output.text)}</pre>"
    data = output.get("data", {})
    if figure := data.get("application/vnd.plotly.v1+json"):
        height = figure.get("layout", {}).get("height", 450)
        text = json.dumps(figure).replace("</", "<\\/")
        return f'<div class="figure" style="height: {height}px"><script type="application/json">{text}</script></div>'
    if "application/vnd.jupyter.widget-view+json" in data:
        if "%|" in data.get("text/plain", ""):
            return ""  # a progress bar
        return "<p><em>What is here can be used where the notebook runs.</em></p>"
    if "text/html" in data:
        return str(data["text/html"])
    if "image/png" in data:
        return f'<img alt="{escaped(data.get("text/plain", "a picture"))}" src="data:image/png;base64,{data["image/png"]}">'
    return f"<pre>{escaped(data['text/plain'])}</pre>" if "text/plain" in data else ""


def escaped(text: str) -> str:
    coloured = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return coloured.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
