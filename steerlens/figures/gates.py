"""What a gate did to a generated text: which tokens it let steering choose, and how much of the steering was active.

    gated_text      the text itself, token by token, in the colour of what the gate decided
    active_layers   how many layers, or which share of the steering, were active over the steps

A token counts as changed where it is not the raw run's most likely one after the same text. What follows a changed token is
another text, so that the share of changed tokens says little about how far two texts are apart.
"""

import math
import textwrap
from collections.abc import Mapping
from typing import Any, Literal, get_args
from unicodedata import combining, east_asian_width

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlens.errors import DataError, nearest
from steerlens.figures.marks import with_subtitle
from steerlens.figures.multiples import require_once, require_table, show_each_name_once
from steerlens.figures.theme import INK, MISSING, MUTED, theme
from steerlens.figures.tokens import only
from steerlens.figures.words import escaped, shown

OUTCOMES = {
    "skipped": ("skipped (sure)", "#EEF0F2"),
    "accepted": ("accepted", "#A9D3EE"),
    "weakened": ("weakened", "#F7CE8B"),
    "rejected": ("rejected (raw token)", "#D55E00"),
}
"""What a gate may decide at a step, as the legend says it, and its colour.

It skips a step where the model is sure; else it accepts the token of full or of weakened steering, or rejects all of them."""

Active = Literal["n_layers", "strength"]

_NEEDED = (
    *("row", "prompt", "position", "token", "outcome", "strength", "n_layers", "n_trials"),
    *("proposed", "raw", "p_proposed", "p_raw"),
)
_MONO = "'DejaVu Sans Mono', Menlo, Consolas, 'Liberation Mono', monospace"
_SIZE, _LETTER, _LINE = 12, 7.4, 23
"""Pixels: of the letters, of a letter's width in the widest of these fonts, and from line to line."""

_LONGEST = 24
"""Letters of a token that are shown."""

_ACTIVE = "#0072B2"

_FEW = 8
"""Up to so many texts have a line each; the lines of more would cover each other."""


def gated_text(
    table: pd.DataFrame, *, row: int | None = None, top: int = 6, width: int = 88, title: str | None = None
) -> go.Figure:
    """Generated texts token by token, coloured by what the gate decided; bold and underlined where steering changed the token.

    Args:
        table: one row per prompt and generated token: row, the place of the prompt; prompt; position, 0 the first new token;
            token; outcome, "skipped", "accepted", "weakened" or "rejected"; strength and n_layers, which were active; n_trials;
            proposed, the token of steering at full strength; raw, the raw argmax; p_proposed and p_raw, their raw probabilities.
        row: only this prompt's text.
        top: how many texts are shown, the first ones.
        width: letters in a line, which make the figure's width: a letter has the same width wherever it is shown.
        title: what the figure is about; a phrase by default.

    Returns:
        A figure with a trace per outcome, which the legend can hide, and the prompts as headings.

    Raises:
        DataError: a missing column, no row, an unknown row or outcome, or less than one text or 20 letters.

    Example:
        >>> step = {"row": 0, "prompt": "Why?", "position": 0, "token": " rain", "raw": " snow", "proposed": " rain"}
        >>> gate = {"outcome": "accepted", "strength": 1.0, "n_layers": 4, "n_trials": 1, "p_proposed": 0.2, "p_raw": 0.3}
        >>> [trace.text for trace in gated_text(pd.DataFrame([{**step, **gate}])).data if trace.name.startswith("accepted")]
        [('\xa0<b><u>rain</u></b>',)]
    """
    require_table(table, _NEEDED, what="the frame of gated steps")
    _require_outcomes(table)
    if top < 1 or width < 20:
        raise DataError(f"a text needs top of at least 1 and width of at least 20 letters, got {top} and {width}")
    texts = {place: part.sort_values("position") for place, part in only(table, "row", row).groupby("row", sort=False)}
    lines, headings, placed = 0, [], []
    for part in [*texts.values()][:top]:
        headings.append({"line": lines, **_heading(part, width)})
        placed.append(_placed(part, width, lines + 1))
        lines = int(placed[-1]["line"].max()) + 2
    tokens, fig = pd.concat(placed), go.Figure(layout={"template": theme()})
    for outcome, (name, color) in OUTCOMES.items():
        fig.add_trace(_tokens(tokens[tokens["outcome"] == outcome], name, color))
    fig.add_trace(_headings(headings))
    fig.update_xaxes(range=[0, width], visible=False, fixedrange=True)
    fig.update_yaxes(range=[lines - 0.6, -0.6], visible=False, fixedrange=True)
    margin = {"l": 8, "r": 8, "t": 104, "b": 8}
    size = {"width": round(width * _LETTER) + 16, "height": _LINE * lines + margin["t"] + margin["b"]}
    fig.update_layout(**size, margin=margin, barmode="overlay", bargap=0, showlegend=True)
    show_each_name_once(fig, size["width"] - 40)
    left = len(texts) - len(headings)
    note = "bold, underlined: not the raw run's token" + f"; {left} more texts in the frame" * (left > 0)
    return fig.update_layout(title=with_subtitle(title or "What the gate let through", note))


def active_layers(
    table: pd.DataFrame, *, n_layers: int | None = None, value: Active = "n_layers", title: str | None = None
) -> go.Figure:
    """How much of the steering was active over the steps: a thin line per text, the mean of those still running as a thick one.

    Of more than 8 texts, squares instead of lines, the darker the more texts. Steps that the gate skipped or rejected count as
    zero. Below stand the texts still running, by outcome.

    Args:
        table: of `gated_text`.
        n_layers: how many layers could be active, for the scale; by default the most that were.
        value: "n_layers", or "strength", the active share of the steering.
        title: what the figure is about; a phrase by default.

    Returns:
        A figure of two panels over the steps; of up to 8 texts with a cross where a step was rejected.

    Raises:
        DataError: a missing column, no row, an unknown outcome or value, or fewer layers than were active.

    Example:
        >>> step = {"row": 0, "prompt": "Why?", "position": 0, "token": " rain", "raw": " snow", "proposed": " rain"}
        >>> gate = {"outcome": "weakened", "strength": 0.5, "n_layers": 4, "n_trials": 2, "p_proposed": 0.2, "p_raw": 0.3}
        >>> active_layers(pd.DataFrame([{**step, **gate}]), n_layers=8).layout.yaxis.range
        (-0.4, 8.4)
    """
    require_table(table, _NEEDED, what="the frame of gated steps")
    _require_outcomes(table)
    if value not in get_args(Active):
        raise DataError(f'value must be "n_layers" or "strength", got {value!r}')
    most = max(int(table["n_layers"].max()), 1)
    if n_layers is not None and n_layers < most:
        raise DataError(f"n_layers must be at least the {most} that were active, got {n_layers}")
    largest = 1.0 if value == "strength" else float(n_layers or most)
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.68, 0.32], vertical_spacing=0.07)
    texts = [part.sort_values("position") for _, part in table.groupby("row", sort=False)]
    if len(texts) <= _FEW:
        _draw_steps(fig, texts, value)
    else:
        _draw_squares(fig, table, value)
    if len(texts) > 1:
        _draw_mean(fig, table, value)
    if len(texts) <= _FEW:
        _draw_rejected(fig, table)
    _draw_outcomes(fig, table)
    unit = "active layers" if value == "n_layers" else "active share (%)"
    room = 0.05 * largest
    whole = {"tickformat": ".0%"} if value == "strength" else {"tickformat": "d", "dtick": math.ceil(largest / 8)}
    fig.update_yaxes(title_text=unit, range=[-room, largest + room], zeroline=False, **whole, row=1, col=1)
    running = {"rangemode": "tozero", "tickformat": "d", **({"dtick": 1} if len(texts) < 4 else {"nticks": 4})}
    fig.update_yaxes(title_text="texts", **running, row=2, col=1)
    first, last = int(table["position"].min()), int(table["position"].max())
    axis = {"range": [first - 0.6, last + 0.6], "tickformat": "d", "dtick": math.ceil((last - first + 1) / 12)}
    fig.update_xaxes(**axis, showgrid=False, zeroline=False).update_xaxes(title_text="step (new token)", row=2, col=1)
    fig.update_layout(
        template=theme(), height=460, margin={"l": 8, "r": 8, "t": 84, "b": 34}, barmode="stack", bargap=0
    )
    show_each_name_once(fig)
    what = "Active layers" if value == "n_layers" else "Active share of the steering"
    return fig.update_layout(title_text=title or f"{what}, step by step")


def _require_outcomes(table: pd.DataFrame) -> None:
    for outcome in table["outcome"].unique():
        if outcome not in OUTCOMES:
            raise DataError(f"outcome must be known, got {outcome!r}; {nearest(str(outcome), OUTCOMES)}")
    require_once(table, ["row", "position"])


def _changed(record: Mapping[Any, Any]) -> bool:
    """Whether steering made the token another one; what was sampled without it is not meant."""
    return record["outcome"] in ("accepted", "weakened") and record["token"] != record["raw"]


# --- the text -------------------------------------------------------------------------------------------------------


def _placed(part: pd.DataFrame, width: int, first: int) -> pd.DataFrame:
    """The tokens of a text with their line and place in it: broken where a line is full, and after a line break."""
    places, line, column = [], first, 0.0
    for record in part.to_dict("records"):
        text = _word(record["token"], min(_LONGEST, width - 2))
        size = _letters(text) + 0.4
        if column + size > width:
            line, column = line + 1, 0.0
        places.append((line, column, size, text))
        column += size
        if "\n" in record["token"]:
            line, column = line + 1, 0.0
    return part.assign(
        **{name: [place[at] for place in places] for at, name in enumerate(("line", "at", "size", "word"))}
    )


def _word(token: str, width: int) -> str:
    """A token as it stands in a text: a space before a word is a gap, all other spaces and breaks are seen."""
    gap = token[:1] == " " and token[1:2].strip() != ""
    return "\u00a0" * gap + _cut(token[gap:], width)


def _cut(token: str, width: int) -> str:
    """As `shown`, but not yet safe in markup, so that its letters can be counted."""
    return shown(token, width).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def _letters(text: str) -> int:
    """The width of a text in letters of a monospaced font: East Asian ones and emoji take two, combining ones none."""
    return sum(0 if combining(sign) else 2 if east_asian_width(sign) in "WF" else 1 for sign in text)


def _tokens(rows: pd.DataFrame, name: str, color: str) -> go.Bar:
    """The tokens of an outcome as boxes with their text."""
    records = rows.to_dict("records")
    words = [escaped(record["word"]) for record in records]
    texts = [_underlined(word) if _changed(record) else word for word, record in zip(words, records, strict=True)]
    return go.Bar(
        x=rows["size"],
        base=rows["at"],
        y=rows["line"],
        width=0.86,
        orientation="h",
        text=texts,
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        constraintext="none",
        insidetextfont={"family": _MONO, "size": _SIZE, "color": "white" if name.startswith("rejected") else INK},
        marker={"color": color, "line": {"color": "white", "width": 1}},
        name=name,
        hovertext=[_step_hover(record) for record in records],
        hovertemplate="%{hovertext}<extra></extra>",
    )


def _underlined(word: str) -> str:
    """Bold and underlined, but for the gap before it."""
    gap = "\u00a0" * word.startswith("\u00a0")
    return f"{gap}<b><u>{word[len(gap) :]}</u></b>"


def _heading(part: pd.DataFrame, width: int) -> dict[str, str]:
    """The prompt on one line, what became of its tokens, and the whole of it for the hover."""
    prompt = str(part["prompt"].iloc[0])
    changed = sum(_changed(record) for record in part.to_dict("records"))
    rejected = int((part["outcome"] == "rejected").sum())
    counts = f"{len(part)} tokens, {changed} changed, {rejected} rejected"
    one = textwrap.shorten(prompt, max(12, width - len(counts) - 4), placeholder="\u2026")
    whole = "<br>".join(escaped(line) for line in textwrap.wrap(prompt, 70)[:12])
    return {"text": f"<b>{escaped(one)}</b>\u2002<span style='color:{MUTED}'>{counts}</span>", "hover": whole}


def _headings(headings: list[dict[str, Any]]) -> go.Scatter:
    return go.Scatter(
        x=[0.0] * len(headings),
        y=[heading["line"] for heading in headings],
        mode="text",
        text=[heading["text"] for heading in headings],
        textposition="middle right",
        textfont={"size": 13, "color": INK},
        cliponaxis=False,
        name="prompts",
        showlegend=False,
        customdata=[heading["hover"] for heading in headings],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _step_hover(record: Mapping[Any, Any]) -> str:
    first = f"step {record['position']}, <b>{shown(record['token'], 40)}</b>: {record['outcome']}"
    raw = f"raw: {shown(record['raw'], 40)} ({_probability(record['p_raw'])})"
    if record["outcome"] == "skipped":
        return f"{first}<br>{raw}"
    proposed = f"steering at full strength: {shown(record['proposed'], 40)} ({_probability(record['p_proposed'])})"
    active = f"{_count(record['n_layers'], 'layer')} active, strength {100 * record['strength']:.3g}\u00a0%"
    return "<br>".join([first, proposed, raw, f"{active}, {_count(record['n_trials'], 'trial')}"])


def _probability(value: float) -> str:
    return MISSING if math.isnan(value) else f"raw probability {value:.2g}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


# --- steps ----------------------------------------------------------------------------------------------------------


def _draw_steps(fig: go.Figure, texts: list[pd.DataFrame], value: str) -> None:
    """A stepped line per text."""
    alone = len(texts) == 1
    for part in texts:
        prompt = escaped(textwrap.shorten(str(part["prompt"].iloc[0]), 60, placeholder="\u2026"))
        line = go.Scatter(
            x=part["position"],
            y=part[value],
            mode="lines+markers" if len(part) == 1 else "lines",
            line={"color": _ACTIVE, "width": 2 if alone else 1, "shape": "hvh"},
            opacity=1.0 if alone else 0.6,
            name="this text" if alone else "each text",
            customdata=[f"{prompt}<br>{_step_hover(record)}" for record in part.to_dict("records")],
            hovertemplate="%{customdata}<extra></extra>",
        )
        fig.add_trace(line, row=1, col=1)


def _draw_squares(fig: go.Figure, table: pd.DataFrame, value: str) -> None:
    """A square at each step and number, the darker the larger the share of the texts still running."""
    counts = table.groupby(["position", value]).size().rename("n").reset_index()
    counts["share"] = counts["n"] / counts.groupby("position")["n"].transform("sum")
    said = "{:g} layers" if value == "n_layers" else "{:.0%} of the steering"
    squares = go.Scatter(
        x=counts["position"],
        y=counts[value],
        mode="markers",
        marker={"symbol": "square", "size": 7, "color": _ACTIVE, "opacity": counts["share"].clip(0.06, 1.0)},
        name="texts (darker: more)",
        cliponaxis=False,
        customdata=[
            f"step {row['position']:.0f}: {_count(int(row['n']), 'text')} ({row['share']:.0%}) with {said.format(row[value])}"
            for row in counts.to_dict("records")
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )
    fig.add_trace(squares, row=1, col=1)


def _draw_mean(fig: go.Figure, table: pd.DataFrame, value: str) -> None:
    by = table.groupby("position")[value]
    means, counts = by.mean(), by.count()
    unit = "layers" if value == "n_layers" else "of the steering"
    said = means.map("{:.3g}".format if value == "n_layers" else "{:.0%}".format)
    line = go.Scatter(
        x=means.index,
        y=means,
        mode="lines",
        line={"color": INK, "width": 3},
        name="mean of those running",
        customdata=[
            f"step {step}: <b>{text} {unit}</b> on average<br>{_count(count, 'text')} still running"
            for step, text, count in zip(means.index, said, counts, strict=True)
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )
    fig.add_trace(line, row=1, col=1)


def _draw_rejected(fig: go.Figure, table: pd.DataFrame) -> None:
    """Crosses at zero where steps were rejected."""
    counts = table[table["outcome"] == "rejected"].groupby("position").size()
    name, color = OUTCOMES["rejected"]
    crosses = go.Scatter(
        x=counts.index,
        y=[0.0] * len(counts),
        mode="markers",
        marker={"symbol": "x", "color": color, "size": 8},
        name=name,
        cliponaxis=False,
        customdata=[f"step {step}: {_count(count, 'text')} rejected" for step, count in counts.items()],
        hovertemplate="%{customdata}<extra></extra>",
    )
    fig.add_trace(crosses, row=1, col=1)


def _draw_outcomes(fig: go.Figure, table: pd.DataFrame) -> None:
    """The texts that are still running at each step, a stack of outcomes."""
    counts = table.groupby(["position", "outcome"]).size().unstack(fill_value=0)
    for outcome in reversed(OUTCOMES):
        if outcome not in counts:
            continue
        bars = go.Bar(
            x=counts.index,
            y=counts[outcome],
            width=1,
            marker={"color": OUTCOMES[outcome][1], "line_width": 0},
            name=OUTCOMES[outcome][0],
            hovertemplate=f"step %{{x}}: %{{y}} {outcome}<extra></extra>",
        )
        fig.add_trace(bars, row=2, col=1)
