"""One self-contained HTML page about a run: what followed its instruction, beside the controls, and the texts.

The page is a string template filled with tables, figures of this room and sample texts. It holds
plotly.js once and refers to nothing outside itself (its content security policy forbids every request). It is
written to a temporary file that then takes the final name, so that a reader never sees half a page. Every
sentence of the summary is computed from the scores.

What the page does not show: the sample texts are the first prompts of each instruction, whatever their outcome,
and too few to judge by.
"""

import difflib
import html
import importlib.resources
import math
import re
import string
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from plotly.offline import get_plotlyjs

from steerlens.errors import DataError
from steerlens.figures.cells import four_cells
from steerlens.figures.layers import layer_curve
from steerlens.figures.theme import CONDITION_COLORS, MISSING, percent, rate_text, short_label
from steerlens.files import write_atomically
from steerlens.stats.comparisons import compare_cells
from steerlens.stats.rates import rates_and_quality, require_columns
from steerlens.stats.words import WORD

_NEEDED = (
    "prompt_id", "trial", "instruction", "condition", "prompt", "response", "finish_reason", "followed", "followed_strict",
    "n_words", "repetition", "distinct_2", "perplexity",
)  # fmt: skip


_EXACT_WORDS = 300
"""Up to this many words two texts are compared exactly; see `mark_changes`."""


_IN_WORDS = {
    "none": "without steering",
    "random": "with a random vector of equal norm",
    "vector": "with the steering vector",
    "text": "with the instruction in the prompt",
    "text+vector": "with the instruction in the prompt and the vector",
}


_IN_PROMPT = {"vector": "without the instruction", "text+vector": "with the instruction in them"}


def write_report(
    path: str | Path,
    *,
    scores: pd.DataFrame,
    search: Mapping[str, pd.DataFrame] | None = None,
    facts: Mapping[str, Any],
    title: str,
    n_samples: int = 3,
) -> Path:
    """Write the report page and return its path.

    Args:
        path: the HTML file; an existing one is replaced in one step, missing folders are made.
        scores: the scores frame, one row per response.
        search: the search tables by condition, "vector" and "text+vector"; without any, the page has no layer section.
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
    sections = {
        "Overall": _overall_section(overall),
        "By instruction": _instruction_section(table),
        "Prompt by prompt": _comparison_section(scores),
        "Layer search": "".join(_search_section(name, table, order) for name, table in (search or {}).items()),
        "Sample texts": _samples_section(scores, table, order, n_samples),
        "How this was run": _facts_table(facts),
    }
    sections = {name: content for name, content in sections.items() if content}
    links = [f'<a href="#{_anchor(name)}">{name}</a>' for name in sections]
    parts = [f'<h2 id="{_anchor(name)}">{name}</h2>\n{content}' for name, content in sections.items()]
    template = importlib.resources.files("steerlens") / "bundled" / "report.html.template"
    page = string.Template(template.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        summary=html.escape(summarize(overall, table, (search or {}).get("vector"))),
        plotly_js=get_plotlyjs(),
        body="\n".join([f"<nav>{''.join(links)}</nav>", *parts]),
    )
    return write_atomically(path, page)


def summarize(overall: pd.DataFrame, table: pd.DataFrame, search: pd.DataFrame | None = None) -> str:
    """What the rates say, in a few sentences: the vector beside its controls, over instructions, and at what cost.

    Args:
        overall: rates and quality per condition.
        table: rates and quality per instruction and condition.
        search: the search frame, which says where no steering was chosen.
    """
    rows = {row["condition"]: row for row in overall.to_dict("records")}
    lead = "vector" if "vector" in rows else next(iter(rows))
    n = rows[lead]["n"]
    first = f"{_IN_WORDS[lead].capitalize()}, {rate_text(rows[lead])} of {n} responses follow their instruction"
    others = [
        f"{_IN_WORDS[name]} {rate_text(rows[name])}" + (f" of {rows[name]['n']}" if rows[name]["n"] != n else "")
        for name in CONDITION_COLORS
        if name in rows and name != lead
    ]
    sentences = ["; ".join([first, *others])]
    if lead == "vector":
        sentences += [_against_control(rows), _over_instructions(table), _left_unsteered(search), _quality_change(rows)]
    return " ".join(f"{sentence}." for sentence in sentences if sentence)


def _against_control(rows: Mapping[str, Mapping[Any, Any]]) -> str:
    control = next((name for name in ("random", "none") if name in rows), None)
    if control is None:
        return ""
    vector, other = rows["vector"], rows[control]
    versus = f"that of {'a random vector of equal norm' if control == 'random' else 'the unsteered model'}"
    if vector["low"] > other["high"]:
        return f"The vector's interval lies above {versus}"
    if vector["high"] < other["low"]:
        return f"The vector's interval lies below {versus}"
    return f"The vector's interval overlaps {versus}, so these responses alone do not tell the two apart"


def _over_instructions(table: pd.DataFrame) -> str:
    rates = table.pivot(index="instruction", columns="condition", values="rate")
    both = rates.reindex(columns=["vector", "none"]).dropna()
    if len(both) < 2:
        return ""
    gain = both["vector"] - both["none"]
    higher = f"The rate is higher with the vector than without on {int((gain > 0).sum())} of {len(gain)} instructions"
    if not gain.any():
        return higher
    best = str(gain.abs().idxmax())
    from_to = f"{percent(float(both['none'][best]))} to {percent(float(both['vector'][best]))}"
    lower = f", lower on {int((gain < 0).sum())}" if (gain < 0).any() else ""
    return f"{higher}{lower}; the largest change is {from_to}, on {short_label(best)}"


def _left_unsteered(search: pd.DataFrame | None) -> str:
    if search is None or search.empty:
        return ""
    names = [short_label(str(name)) for name in search.loc[search["chosen"] & search["layer"].isna(), "instruction"]]
    of = f"{len(names)} of {search['instruction'].nunique()} instructions ({', '.join(names)})"
    return f"For {of} the search chose no steering, so the vector's responses there are unsteered ones" if names else ""


def _quality_change(rows: Mapping[str, Mapping[Any, Any]]) -> str:
    if "none" not in rows:
        return ""
    before, after = rows["none"], rows["vector"]
    changes = [
        f"{what} {form(after[column])} ({form(before[column])})"
        for column, what, form in (
            ("median_perplexity", "median perplexity", _number),
            ("mean_repetition", "mean repetition", _share),
            ("cut", "responses cut at the length limit", percent),
        )
        if not (math.isnan(before[column]) or math.isnan(after[column]))
    ]
    return f"With the vector (in brackets: without steering) {', '.join(changes)}" if changes else ""


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
    note = "Bars: share of responses that pass their check. Whiskers and brackets: Wilson 95&nbsp;% intervals."
    return _figure(four_cells(overall), "overall-figure") + _note(note) + _rates(overall)


def _instruction_section(table: pd.DataFrame) -> str:
    note = "Ordered by how much the vector adds to the rate without steering."
    rows = f"<details><summary>All rates and quality measures, by instruction</summary>{_rates(table)}</details>"
    return _note(note) + _figure(four_cells(table), "instruction-figure") + rows


def _comparison_section(scores: pd.DataFrame) -> str:
    """Paired differences between the cells; the instructions one by one behind a fold."""
    table = compare_cells(scores)
    if table.empty:
        return ""
    note = (
        "Differences between two cells on the same prompts: how many responses only the second cell gets right, and only "
        "the first. Where each base query has one response: Tango&rsquo;s 95&nbsp;% interval and McNemar&rsquo;s test, "
        "corrected after Holm for single instructions; where it has several: a bootstrap over queries and a sign-flip test."
    )
    last = table.groupby(["baseline", "condition"], sort=False).tail(1)  # over all, or the only instruction
    folded = table.drop(last.index)
    rest = "" if folded.empty else f"<details><summary>By instruction</summary>{_differences(folded)}</details>"
    return _note(note) + _differences(last) + rest


def _differences(table: pd.DataFrame) -> str:
    head = ("instruction", "from", "to", "queries", "gained", "lost", "difference in points [95&nbsp;%]", "test", "p")
    lines = []
    for row in table.to_dict("records"):
        names = (short_label(row["instruction"]), row["baseline"], row["condition"])
        cells = [f'<td class="name">{html.escape(name)}</td>' for name in names]
        span = f"{100 * row['difference']:+.0f} [{100 * row['low']:+.0f}, {100 * row['high']:+.0f}]"
        p_value = row["p_value"] if row["instruction"] == "all" else row["p_holm"]
        shown = "&lt;&nbsp;0.001" if p_value < 0.001 else f"{p_value:.3f}"
        values = (row["n_prompts"], row["gained"], row["lost"], span, row["test"], shown)
        lines.append(f"<tr>{''.join(cells)}{''.join(f'<td>{value}</td>' for value in values)}</tr>")
    heads = "".join(f"<th{' class=name' if i < 3 else ''}>{name}</th>" for i, name in enumerate(head))
    body = f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table class="rates">{body}</table></div>'


def _search_section(condition: str, search: pd.DataFrame, order: list[str]) -> str:
    if search.empty:
        return ""
    rank = {name: index for index, name in enumerate(order)}
    ordered = search.sort_values("instruction", key=lambda names: names.map(rank).fillna(len(rank)), kind="stable")
    note = (
        f"Scored on validation prompts {_IN_PROMPT[condition]}. The ring marks the chosen layer, the dashed"
        " line the rate without steering; the bars below show the share of degenerate texts at each layer."
    )
    return _note(note) + _figure(layer_curve(ordered), f"search-figure-{_anchor(condition)}")


def _samples_section(scores: pd.DataFrame, table: pd.DataFrame, order: list[str], n_samples: int) -> str:
    if n_samples < 1:
        return ""
    groups: list[str] = []
    for instruction in order:
        rows = scores[scores["instruction"] == instruction]
        counts = [
            f"{row['condition']} {row['followed']} of {row['n']}"
            for row in table[table["instruction"] == instruction].to_dict("records")
        ]
        samples = [_sample(rows[rows["prompt_id"] == key]) for key in rows["prompt_id"].unique()[:n_samples]]
        heading = f"<b>{html.escape(short_label(instruction))}</b> <span>{html.escape(' · '.join(counts))}</span>"
        groups.append(f"<details{'' if groups else ' open'}><summary>{heading}</summary>{''.join(samples)}</details>")
    note = (
        f"The first {n_samples} prompts of each instruction in the order of the data, whatever their outcome. In the"
        " vector column, <mark>words that differ</mark> from the text without steering are marked."
    )
    return _note(note) + "\n".join(groups)


def _sample(rows: pd.DataFrame) -> str:
    """One prompt with the response of each condition beside the others; the first trial where there are several."""
    # In reverse, so that of several trials the first is the one that stays.
    first = {row["condition"]: row for row in reversed(rows.to_dict("records"))}
    shown = [name for name in CONDITION_COLORS if name in first]
    bare = next((first[name]["prompt"] for name in ("none", "vector", "random") if name in first), None)
    full = next((first[name]["prompt"] for name in ("text", "text+vector") if name in first), None)
    unsteered = first["none"]["response"] if "none" in first else None
    cards = [_card(first[name], unsteered if name == "vector" else None) for name in shown]
    return f'<div class="sample">{_query(bare, full)}<div class="columns">{"".join(cards)}</div></div>'


def _query(bare: str | None, full: str | None) -> str:
    """The prompt, with the instruction that only the text conditions saw set apart."""
    if bare is None or full is None or not full.startswith(bare):
        prompts = [prompt for prompt in (bare, full) if prompt is not None]
        return "".join(f'<p class="query" dir="auto">{html.escape(prompt)}</p>' for prompt in prompts)
    instruction = html.escape(full[len(bare) :])
    return f'<p class="query" dir="auto">{html.escape(bare)}<b title="text conditions only">{instruction}</b></p>'


def _card(row: Mapping[Any, Any], unsteered: str | None) -> str:
    condition, response = row["condition"], row["response"]
    text = html.escape(response) if unsteered is None else mark_changes(unsteered, response)
    verdict = (
        '<span class="badge yes">✓ followed</span>'
        if row["followed"]
        else '<span class="badge no">✗ not followed</span>'
    )
    facts = [f"{int(row['n_words'])} words"]
    if row["followed"] and not row["followed_strict"]:
        facts.append("not strictly")
    if not _is_missing(row["perplexity"]):
        facts.append(f"perplexity {_number(row['perplexity'])}")
    if row["finish_reason"] == "length":
        facts.append("cut at the limit")
    return (
        f'<article class="card" style="border-top-color:{CONDITION_COLORS[condition]}">'
        f"<header><b>{html.escape(condition)}</b>{verdict}</header>"
        f'<p class="note">{" · ".join(facts)}</p>'
        f'<div class="response" dir="auto" tabindex="0">{text or "<i>(empty response)</i>"}</div></article>'
    )


def mark_changes(before: str, after: str) -> str:
    """`after` as HTML, with runs of words that are not in `before`, in order, inside <mark>.

    Case counts, since some instructions change nothing else. Long texts are compared by difflib's quick heuristic,
    which may mark a frequent word that did not change: the exact search takes minutes on a text that repeats itself.

    Example:
        >>> mark_changes("rain falls down", "rain FALLS down")
        'rain <mark>FALLS</mark> down'
    """
    old, matches = WORD.findall(before), list(WORD.finditer(after))
    new = [match.group() for match in matches]
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=max(len(old), len(new)) > _EXACT_WORDS)
    pieces, end = [], 0
    for tag, _, _, start_word, end_word in matcher.get_opcodes():
        if tag in ("replace", "insert"):
            start = matches[start_word].start()
            pieces.append(html.escape(after[end:start]))
            end = matches[end_word - 1].end()
            pieces.append(f"<mark>{html.escape(after[start:end])}</mark>")
    return "".join([*pieces, html.escape(after[end:])])


def _rates(table: pd.DataFrame) -> str:
    """The table of rates and quality; one body per instruction where there are several."""
    faceted = "instruction" in table.columns
    columns: dict[str, Callable[[Mapping[Any, Any]], str]] = {
        "followed": lambda row: f"{row['followed']} of {row['n']}",
        "rate [95&nbsp;%]": rate_text,
        "strict rate": lambda row: percent(row["strict"]),
        "mean words": lambda row: _number(row["mean_words"]),
        "mean repetition": lambda row: _share(row["mean_repetition"]),
        "distinct&#8209;2": lambda row: _share(row["mean_distinct_2"]),
        "median perplexity": lambda row: _number(row["median_perplexity"]),
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


def _facts_table(facts: Mapping[str, Any]) -> str:
    rows = [f"<tr><th>{html.escape(str(name))}</th><td>{_fact(name, value)}</td></tr>" for name, value in facts.items()]
    return f'<table class="facts"><tbody>{"".join(rows)}</tbody></table>' if rows else ""


def _fact(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return _facts_table(value) or MISSING
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return html.escape(", ".join(map(str, value))) or MISSING
    if _is_missing(value):
        return MISSING
    text = html.escape(str(value))
    return f"<code>{text}</code>" if name == "command" else text


def _figure(fig: Any, name: str) -> str:
    """A figure without its title, which the section's heading says already; plotly.js is in the page's head."""
    # 40 pixels are what the title took.
    label, top = fig.layout.title.text, fig.layout.margin.t - 40
    fig.update_layout(title_text=None, margin_t=top, height=fig.layout.height - 40)
    config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    drawn = fig.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, config=config, default_height=f"{fig.layout.height}px"
    )
    return f'<div class="figure" role="figure" aria-label="{html.escape(label)}">{drawn}</div>'


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def _anchor(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower())


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _number(value: float) -> str:
    """About three significant digits, with as many decimals for every value of the same size."""
    if _is_missing(value):
        return MISSING
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{decimals}f}"


def _share(value: float) -> str:
    return MISSING if _is_missing(value) else f"{value:.2f}"
