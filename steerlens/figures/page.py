"""One self-contained HTML page: a contents list, then sections of tables and figures, some of them folded until they are opened.

The page is a string template. It holds plotly.js once and refers to nothing outside itself (its content security policy forbids
every request). It is written to a temporary file that then takes the final name, so that a reader never sees half a page.

A figure in a fold is kept as data, and drawn when the fold is opened: before that it has no width. A link of the contents list,
or an address that ends in a section's anchor, opens the fold.
"""

import html
import importlib.resources
import math
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from plotly.offline import get_plotlyjs

from steerlens.figures.theme import MISSING
from steerlens.files import write_atomically

if TYPE_CHECKING:
    import plotly.graph_objects as go

_CONFIG = '{"responsive": true, "displaylogo": false, "displayModeBar": false}'
"""Of every figure: plotly's own buttons are left out."""


@dataclass(frozen=True)
class Section:
    """A part of a page: its name, its HTML, and what its fold says besides the name; without that it is not folded."""

    name: str
    content: str
    fold: str = ""


def write_page(path: str | Path, sections: Iterable[Section], *, title: str, summary: str = "") -> Path:
    """Write a page of these sections, leaving out those without content, and return its path.

    Args:
        path: the HTML file; an existing one is replaced in one step, missing folders are made.
        title: the heading of the page.
        summary: a few sentences below it.

    Example:
        >>> write_page(folder / "page.html", [Section("Rain", "<p>It rains.</p>", "what falls")], title="Weather").name
        'page.html'
    """
    shown = [section for section in sections if section.content]
    links = [f'<a href="#{anchor(section.name)}">{section.name}</a>' for section in shown]
    template = importlib.resources.files("steerlens") / "bundled" / "report.html.template"
    page = string.Template(template.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        summary=html.escape(summary),
        plotly_js=get_plotlyjs(),
        body="\n".join([f"<nav>{''.join(links)}</nav>", *map(_section, shown)]),
    )
    return write_atomically(path, page)


def _section(section: Section) -> str:
    name = anchor(section.name)
    if not section.fold:
        return f'<h2 id="{name}">{section.name}</h2>\n{section.content}'
    summary = f"<summary><h2>{section.name}</h2> <span>{section.fold}</span></summary>"
    return f'<details class="section" id="{name}">{summary}\n{section.content}\n</details>'


def figure(fig: "go.Figure", name: str) -> str:
    """A figure without its title, which the section's heading says already; plotly.js is in the page's head."""
    # 40 pixels are what the title took.
    label, top = fig.layout.title.text, fig.layout.margin.t - 40
    fig.update_layout(title_text=None, margin_t=top, height=fig.layout.height - 40)
    return _drawing(fig, name, label)


def titled_figure(fig: "go.Figure", name: str) -> str:
    """A figure with its title, where a section has several."""
    return _drawing(fig, name, fig.layout.title.text)


def _drawing(fig: "go.Figure", name: str, label: str) -> str:
    """The place of a figure, and its data, from which the page's script draws it as soon as it can be seen."""
    # No text of a figure may end the script that holds it.
    data = f'{{"figure": {fig.to_json()}, "config": {_CONFIG}}}'.replace("<", "\\u003c")
    place = f'<div id="{name}" style="height:{fig.layout.height}px"></div>'
    return (
        f'<div class="figure" role="figure" aria-label="{html.escape(re.sub("<.*?>", " ", label))}">{place}'
        f'<script type="application/json" class="drawing">{data}</script></div>'
    )


def rows_table(head: Iterable[str], rows: Iterable[Iterable[str]], *, names: int = 1) -> str:
    """A table of HTML cells; the first `names` columns are names."""

    def line(cells: Iterable[str], tag: str) -> str:
        kinds = [f'{tag} class="name"'] * names
        return "".join(f"<{kind}>{cell}</{tag}>" for kind, cell in zip_longest(kinds, cells, fillvalue=tag))

    body = "".join(f"<tr>{line(cells, 'td')}</tr>" for cells in rows)
    top = f"<thead><tr>{line(head, 'th')}</tr></thead>"
    return f'<div class="scroll"><table class="rates">{top}<tbody>{body}</tbody></table></div>'


def folded(name: str, content: str) -> str:
    """What is read only when it is opened, within a section."""
    return f"<details><summary>{name}</summary>{content}</details>" if content else ""


def facts_table(facts: Mapping[str, Any]) -> str:
    """Names and values, one pair a line."""
    rows = [f"<tr><th>{html.escape(str(name))}</th><td>{_fact(name, value)}</td></tr>" for name, value in facts.items()]
    return f'<table class="facts"><tbody>{"".join(rows)}</tbody></table>' if rows else ""


def _fact(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return facts_table(value) or MISSING
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return html.escape(", ".join(map(str, value))) or MISSING
    if is_missing(value):
        return MISSING
    text = html.escape(str(value))
    return f"<code>{text}</code>" if name == "command" else text


def note(text: str) -> str:
    """What is said of a figure or a table, in HTML."""
    return f'<p class="note">{text}</p>'


def anchor(name: str) -> str:
    """A name as an address within the page.

    >>> anchor("What the vectors say")
    'what-the-vectors-say'
    """
    return re.sub(r"\W+", "-", name.lower())


def is_missing(value: Any) -> bool:
    """Whether a number does not exist."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def number(value: float) -> str:
    """About three significant digits, with as many decimals for every value of the same size.

    >>> number(3.14159), number(31.4159), number(314.159)
    ('3.14', '31.4', '314')
    """
    if is_missing(value):
        return MISSING
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{decimals}f}"


def share(value: float) -> str:
    """A share in [0, 1] in two decimals."""
    return MISSING if is_missing(value) else f"{value:.2f}"
