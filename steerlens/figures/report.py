"""One self-contained HTML page about a run: what followed its instruction, beside the controls, the texts, and the vectors.

Tables, figures of this room and sample texts, on a page of `page`. Every sentence of the summary is computed from the scores.

What the page does not show: the sample texts are the first prompts of each instruction, whatever their outcome,
and too few to judge by.
"""

import html
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from steerlens.errors import DataError
from steerlens.figures.cells import four_cells
from steerlens.figures.layers import layer_curve
from steerlens.figures.page import (
    Section,
    anchor,
    facts_table,
    figure,
    folded,
    note,
    number,
    rows_table,
    share,
    write_page,
)
from steerlens.figures.samples import samples_section
from steerlens.figures.sections import Frames, sections_of
from steerlens.figures.summary import summarize
from steerlens.figures.theme import CONDITION_COLORS, percent, rate_text, short_label
from steerlens.stats.comparisons import compare_cells
from steerlens.stats.rates import rates_and_quality, require_columns

_NEEDED = (
    "prompt_id", "trial", "instruction", "condition", "prompt", "response", "finish_reason", "followed", "followed_strict",
    "n_words", "repetition", "distinct_2", "perplexity",
)  # fmt: skip


_IN_PROMPT = {"vector": "without the instruction", "text+vector": "with the instruction in them"}


def write_report(
    path: str | Path,
    *,
    scores: pd.DataFrame,
    search: Mapping[str, pd.DataFrame] | None = None,
    seen: Mapping[str, Frames] | None = None,
    facts: Mapping[str, Any],
    title: str,
    n_samples: int = 3,
) -> Path:
    """Write the report page and return its path.

    Args:
        path: the HTML file; an existing one is replaced in one step, missing folders are made.
        scores: the scores frame, one row per response.
        search: the search tables by condition, "vector" and "text+vector"; without any, the page has no layer section.
        seen: the frames of folded sections, by "lens", "geometry" and "layers"; see `sections_of`.
        facts: what a reader needs to run this again: model, dtype, seeds, versions, command. Values may be text,
            numbers, lists or nested mappings.
        title: the heading of the page.
        n_samples: how many prompts of each instruction are shown with their texts.

    Returns:
        The path of the page.

    Raises:
        DataError: scores without rows or columns that the page needs.

    Example:
        >>> page = write_report(folder / "report.html", scores=scores, facts={"model": "tiny"}, title="A trial")
        >>> page.name
        'report.html'
    """
    require_columns(scores, _NEEDED, what="the scores frame")
    if scores.empty:
        raise DataError("the scores frame must have at least one row, got none; generate and score responses first")
    overall = _in_order(rates_and_quality(scores, ["condition"]))
    table = _in_order(rates_and_quality(scores, ["instruction", "condition"]))
    order = _by_gain(table)
    table = table.sort_values("instruction", key=lambda names: names.map(order.index), kind="stable")
    searched = "".join(_search_section(name, part, order) for name, part in (search or {}).items())
    sections = [
        Section("Overall", _overall_section(overall)),
        Section("By instruction", _instruction_section(table)),
        Section("Prompt by prompt", _comparison_section(scores)),
        Section("Layer search", searched),
        *sections_of(seen or {}, order=order),
        Section("Sample texts", samples_section(scores, table, order, n_samples)),
        Section("How this was run", facts_table(facts)),
    ]
    return write_page(path, sections, title=title, summary=summarize(overall, table, (search or {}).get("vector")))


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    """The rows in the order in which conditions are always shown."""
    rank = {name: index for index, name in enumerate(CONDITION_COLORS)}
    return table.sort_values("condition", key=lambda names: names.map(rank), kind="stable")


def _by_gain(table: pd.DataFrame) -> list[str]:
    """The instructions by how much the vector adds to the unsteered rate, the most first."""
    rates = table.pivot(index="instruction", columns="condition", values="rate").reindex(columns=["vector", "none"])
    gain = (rates["vector"] - rates["none"]).loc[list(dict.fromkeys(table["instruction"]))]
    return [str(name) for name in gain.sort_values(ascending=False, kind="stable").index]


def _overall_section(overall: pd.DataFrame) -> str:
    about = "Bars: share of responses that pass their check. Whiskers and brackets: Wilson 95&nbsp;% intervals."
    return figure(four_cells(overall), "overall-figure") + note(about) + _rates(overall) + _gate(overall)


def _gate(table: pd.DataFrame) -> str:
    """What a gate made of the tokens of each condition; nothing where no response was gated."""
    if "gate_accepted" not in table:
        return ""
    about = (
        "The gate: tokens that were taken as steered (in full, or weakened), those that were not plausible enough and came "
        "unsteered, and those for which nothing else was plausible, so that steering was not tried."
    )
    columns: dict[str, Callable[[Mapping[Any, Any]], str]] = {
        "taken": lambda row: percent(row["gate_accepted"]),
        "weakened": lambda row: percent(row["gate_weakened"]),
        "refused": lambda row: percent(row["gate_rejected"]),
        "not tried": lambda row: percent(row["gate_skipped"]),
        "active layers": lambda row: number(row["mean_active_layers"]),
        "extra passes per token": lambda row: number(row["extra_passes"]),
    }
    rows = table[table["gate_accepted"].notna()].to_dict("records")
    lines = [[html.escape(row["condition"]), *(show(row) for show in columns.values())] for row in rows]
    return note(about) + rows_table(("condition", *columns), lines, names=1)


def _instruction_section(table: pd.DataFrame) -> str:
    about = "Ordered by how much the vector adds to the rate without steering."
    rows = folded("All rates and quality measures, by instruction", _rates(table))
    return note(about) + figure(four_cells(table), "instruction-figure") + rows


def _comparison_section(scores: pd.DataFrame) -> str:
    """Paired differences between the cells; the instructions one by one behind a fold."""
    table = compare_cells(scores)
    if table.empty:
        return ""
    about = (
        "Differences between two cells on the same prompts: how many responses only the second cell gets right, and only "
        "the first. Where each base query has one response: Tango&rsquo;s 95&nbsp;% interval and McNemar&rsquo;s test, "
        "corrected after Holm for single instructions; where it has several: a bootstrap over queries and a sign-flip test."
    )
    last = table.groupby(["baseline", "condition"], sort=False).tail(1)  # over all, or the only instruction
    others = table.drop(last.index)
    rest = "" if others.empty else folded("By instruction", _differences(others))
    return note(about) + _differences(last) + rest


def _differences(table: pd.DataFrame) -> str:
    head = ("instruction", "from", "to", "queries", "gained", "lost", "difference in points [95&nbsp;%]", "test", "p")
    lines = []
    for row in table.to_dict("records"):
        names = (short_label(row["instruction"]), row["baseline"], row["condition"])
        span = f"{100 * row['difference']:+.0f} [{100 * row['low']:+.0f}, {100 * row['high']:+.0f}]"
        p_value = row["p_value"] if row["instruction"] == "all" else row["p_holm"]
        shown = "&lt;&nbsp;0.001" if p_value < 0.001 else f"{p_value:.3f}"
        values = (row["n_prompts"], row["gained"], row["lost"], span, row["test"], shown)
        lines.append([*map(html.escape, names), *map(str, values)])
    return rows_table(head, lines, names=3)


def _search_section(condition: str, search: pd.DataFrame, order: list[str]) -> str:
    if search.empty:
        return ""
    rank = {name: index for index, name in enumerate(order)}
    ordered = search.sort_values("instruction", key=lambda names: names.map(rank).fillna(len(rank)), kind="stable")
    about = (
        f"Scored on validation prompts {_IN_PROMPT[condition]}. The ring marks the chosen layer, the dashed"
        " line the rate without steering; the bars below show the share of degenerate texts at each layer."
    )
    return note(about) + figure(layer_curve(ordered), f"search-figure-{anchor(condition)}")


def _rates(table: pd.DataFrame) -> str:
    """The table of rates and quality; one body per instruction where there are several."""
    faceted = "instruction" in table.columns
    columns: dict[str, Callable[[Mapping[Any, Any]], str]] = {
        "followed": lambda row: f"{row['followed']} of {row['n']}",
        "rate [95&nbsp;%]": rate_text,
        "strict rate": lambda row: percent(row["strict"]),
        "mean words": lambda row: number(row["mean_words"]),
        "mean repetition": lambda row: share(row["mean_repetition"]),
        "distinct&#8209;2": lambda row: share(row["mean_distinct_2"]),
        "median perplexity": lambda row: number(row["median_perplexity"]),
        "cut at length limit": lambda row: percent(row["cut"]),
    }
    names = (["instruction"] if faceted else []) + ["condition"]
    head = "".join([f'<th class="name">{name}</th>' for name in names] + [f"<th>{name}</th>" for name in columns])
    bodies = []
    for name, rows in table.groupby("instruction", sort=False) if faceted else [("", table)]:
        lines: list[str] = []
        for row in rows.to_dict("records"):
            span = f'<th class="name" rowspan="{len(rows)}">{html.escape(short_label(str(name)))}</th>'
            chip = f'<span class="chip" style="background:{CONDITION_COLORS[row["condition"]]}"></span>'
            cells = "".join(f"<td>{show(row)}</td>" for show in columns.values())
            opening = span if faceted and not lines else ""
            lines.append(f'<tr>{opening}<td class="name">{chip}{html.escape(row["condition"])}</td>{cells}</tr>')
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    return f'<div class="scroll"><table class="rates"><thead><tr>{head}</tr></thead>{"".join(bodies)}</table></div>'
