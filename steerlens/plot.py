"""Figures of the results: a tidy table in, a plotly Figure out. Nothing here runs a model.

    four_cells      rate of each condition with its Wilson interval, overall or one panel per instruction
    layer_curve     rate against the steered layer, the chosen layer, the unsteered rate, degenerate share
    cosine_heatmap  signed similarities, centred on zero

A condition has one colour everywhere. The two controls, `none` and `random`, are grey; what is under study is
coloured, in Okabe-Ito hues, which stay apart for colour-blind readers. Names stand on the axes, so that no
reading depends on colour alone.

What a figure does not show: two intervals that overlap do not prove the rates equal, and the chosen layer's
validation rate is no estimate of its rate on new prompts.
"""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlens.errors import DataError, nearest
from steerlens.metrics import RATE_COLUMNS, require_columns

CONDITION_COLORS = {
    "none": "#C2C6CC",
    "random": "#858B94",
    "vector": "#D55E00",
    "text": "#0072B2",
    "text+vector": "#009E73",
}
"""The conditions in the order in which they are shown, each with its colour."""

MISSING = "\u2013"
"""What stands in a table or figure for a number that does not exist."""

_INK, _MUTED, _GRID = "#1F2328", "#59636E", "#E6E8EB"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
_PERCENT_TICKS = {"tickvals": [0, 0.25, 0.5, 0.75, 1], "tickformat": ".0%", "zeroline": False}
_SERIES_COLORS = ("#F2A66B", "#D55E00", "#8A3C00", "#4A2000")  # light to dark, as the coefficient grows


def theme() -> go.layout.Template:
    """The look that every figure here shares: a template for `fig.update_layout(template=theme())`."""
    axis = {
        "gridcolor": _GRID,
        "linecolor": _GRID,
        "zerolinecolor": _GRID,
        "automargin": True,
        "title": {"font": {"size": 13, "color": _MUTED}, "standoff": 8},
        "tickfont": {"size": 12},
    }
    return go.layout.Template(
        layout={
            "font": {"family": _FONT, "size": 13, "color": _INK},
            "title": {
                "font": {"size": 17},
                "x": 0,
                "xref": "paper",
                "y": 1,
                "yanchor": "top",
                "pad": {"t": 14},
            },
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "colorway": list(CONDITION_COLORS.values()),
            "xaxis": axis,
            "yaxis": axis,
            "margin": {"l": 8, "r": 8, "t": 52, "b": 34},
            "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
            "hoverlabel": {"font": {"family": _FONT, "size": 13}, "align": "left"},
            "bargap": 0.25,
        }
    )


def short_label(instruction: str) -> str:
    """An instruction id in words: "change_case:english_capital" reads "english capital"."""
    names = [part.split(":", 1)[-1] for part in instruction.split("+")]
    return " + ".join(re.sub(r"[_:]+", " ", name).strip() for name in names)


def percent(rate: float) -> str:
    """A share as text: "31 %", or a dash where it is missing."""
    return MISSING if math.isnan(rate) else f"{100 * rate:.0f}\u00a0%"


def rate_text(row: Mapping[Any, Any]) -> str:
    """A rate and interval: "31 % [24, 38]", or a dash where it is missing."""
    if math.isnan(row["rate"]):
        return MISSING
    return f"{percent(row['rate'])} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"


def four_cells(table: pd.DataFrame, *, title: str | None = None, columns: int = 3) -> go.Figure:
    """Bars of the rate per condition with intervals; a panel per instruction if the table has that column.

    Args:
        table: `rate_table(scores, by=["condition"])`, or by `["instruction", "condition"]`. Conditions are
            shown in the order of `CONDITION_COLORS`, instructions in the order of the table.
        title: what the figure is about; a phrase by default.
        columns: panels side by side. Three still leave room for the names on a narrow page.

    Raises:
        DataError: a missing column, an unknown condition, an empty table, or two rows for one bar.
    """
    faceted = "instruction" in table.columns
    keys = ["instruction", "condition"] if faceted else ["condition"]
    _require_table(table, [*keys, *RATE_COLUMNS], what="the rate table")
    for name in table["condition"].unique():
        if name not in CONDITION_COLORS:
            known = nearest(str(name), CONDITION_COLORS)
            raise DataError(f"the rate table holds a condition that does not exist, {name!r}; {known}")
    if table.duplicated(keys).any():
        raise DataError(f"the rate table must have one row per {' and '.join(keys)}; group by these only")
    shown = [name for name in CONDITION_COLORS if name in set(table["condition"])]
    groups = _by_instruction(table) if faceted else {"": table}
    height = (21 if faceted else 34) * len(shown) + 8
    fig, cells = _small_multiples([*groups], columns=columns, panels=(height,))
    for (name, rows), (cell,) in zip(groups.items(), cells, strict=True):
        _draw_bars(fig, cell, rows, shown, label=short_label(name))
    where = "on each instruction" if faceted else "overall"
    title = title or f"How often responses follow their instruction, {where}"
    return fig.update_layout(title_text=title, barmode="overlay")


def layer_curve(search: pd.DataFrame, *, title: str | None = None, columns: int = 3) -> go.Figure:
    """Rate against the steered layer for each instruction, and the share of degenerate texts below it.

    The dashed line is the rate without steering (the row whose layer is missing), the ringed point the chosen
    layer. A search over several coefficients or operators draws one line for each.

    Args:
        search: one row per instruction and candidate: instruction, layer, operator, positions, coeff, n, followed, rate,
            low, high, degenerate, chosen.
        title: what the figure is about; a phrase by default.
        columns: panels side by side.

    Raises:
        DataError: a missing column, or no row.
    """
    needed = ["instruction", "layer", "operator", "positions", "coeff", *RATE_COLUMNS, "degenerate", "chosen"]
    _require_table(search, needed, what="the search frame")
    groups = _by_instruction(search)
    fig, cells = _small_multiples([*groups], columns=columns, panels=(140, 44), legend=True)
    colors = _series_colors(search)
    span = _layer_span(search)
    for name, (top, bottom) in zip(groups, cells, strict=True):
        label, rows = short_label(name), groups[name]
        unsteered = rows[rows["layer"].isna()]
        steered = rows[rows["layer"].notna()].astype({"layer": int}).sort_values("layer")
        for series, color in colors.items():
            same = (steered["operator"] == series.operator) & (steered["positions"] == series.positions)
            line = steered[same & (steered["coeff"] == series.coeff)]
            _draw_rates(fig, top, line, series.name, color, label=label, band=len(colors) == 1)
            _draw_degenerate(fig, bottom, line, series.name, color, label=label, legend=len(colors) == 1)
        _draw_references(fig, top, unsteered, steered, span=span, label=label)
        _style_curve_axes(fig, top, bottom, span)
    _show_each_name_once(fig)
    return fig.update_layout(title_text=title or "How well each layer steers, on validation prompts")


def cosine_heatmap(matrix: np.ndarray | pd.DataFrame, labels: Sequence[str], *, title: str | None = None) -> go.Figure:
    """A heat map of cosine similarities: blue below zero, white at zero, red above, over all of [-1, 1].

    Args:
        matrix: square, row `i` and column `j` comparing `labels[i]` with `labels[j]`.
        labels: instruction ids or any names.
        title: what the figure is about; a phrase by default.

    Raises:
        DataError: another shape than one row and column per label, or values outside [-1, 1].
    """
    values = np.asarray(matrix, dtype=float)
    if values.shape != (len(labels), len(labels)):
        raise DataError(f"matrix must have a row and a column for each of {len(labels)} labels, got {values.shape}")
    if (np.abs(values) > 1 + 1e-4).any():
        raise DataError(f"cosines must be in [-1, 1], got {np.nanmax(np.abs(values)):.3g}; use unit directions")
    names = [short_label(label) for label in labels]
    cells = go.Heatmap(
        z=values,
        x=names,
        y=names,
        zmin=-1,
        zmid=0,
        zmax=1,
        colorscale="RdBu_r",
        xgap=1,
        ygap=1,
        texttemplate="%{z:.2f}" if len(labels) <= 15 else None,
        hovertemplate="%{y} and %{x}<br>cosine %{z:.3f}<extra></extra>",
        colorbar={
            "title": {"text": "cosine", "side": "right"},
            "tickvals": [-1, -0.5, 0, 0.5, 1],
            "thickness": 14,
        },
    )
    fig = go.Figure(cells, layout={"template": theme(), "height": max(320, 44 * len(labels) + 140)})
    fig.update_xaxes(tickangle=-40, showgrid=False, title_text="instruction")
    fig.update_yaxes(autorange="reversed", showgrid=False, title_text="instruction")
    return fig.update_layout(title_text=title or "How alike the steering directions are (cosine similarity)")


@dataclass(frozen=True)
class _Cell:
    """One panel of a grid of small multiples."""

    row: int
    col: int
    last: bool
    """Nothing stands below it, so that it carries the title of the x axis."""

    @property
    def place(self) -> dict[str, int]:
        return {"row": self.row, "col": self.col}


@dataclass(frozen=True, order=True)
class _Series:
    """The candidates of a search that share everything but the layer: one line."""

    operator: str
    positions: str
    coeff: float
    name: str


# Pixels: a line of the name above a panel, the tick labels below it, the gap to the panel that shares its x axis.
_LINE, _FOOTER, _GAP = 16, 26, 14
_NAME_WIDTH = 22  # characters: what a third of a narrow page holds


def _small_multiples(
    instructions: Sequence[str], *, columns: int, panels: tuple[int, ...], legend: bool = False
) -> tuple[go.Figure, list[list[_Cell]]]:
    """An empty grid, a block per instruction; a block stacks `panels` (heights in pixels) over one x axis.

    `make_subplots` knows only fractions and a single spacing, so panels are placed here, in pixels from the
    top: the figure grows with the number of instructions while its panels keep their size.
    """
    columns = min(columns, len(instructions))
    blocks, depth = math.ceil(len(instructions) / columns), len(panels)
    names = ["<br>".join(textwrap.wrap(short_label(name), _NAME_WIDTH)) for name in instructions]
    tops, total = [], 0
    for block in range(blocks):
        lines = max(name.count("<br>") + 1 if name else 0 for name in names[block * columns :][:columns])
        tops.append(total + 12 + _LINE * lines)
        total = tops[-1] + sum(panels) + _GAP * (depth - 1) + _FOOTER
    filled = [[block * columns + col < len(instructions) for col in range(columns)] for block in range(blocks)]
    fig = make_subplots(
        rows=blocks * depth,
        cols=columns,
        horizontal_spacing=0.035 if columns > 1 else 0,
        vertical_spacing=0,
        specs=[[{} if there else None for there in filled[row // depth]] for row in range(blocks * depth)],
    )
    cells: list[list[_Cell]] = []
    for index, name in enumerate(names):
        block, col = divmod(index, columns)
        top = tops[block]
        stack = []
        for level, height in enumerate(panels):
            lowest = level == depth - 1
            cell = _Cell(block * depth + level + 1, col + 1, last=lowest and index + columns >= len(instructions))
            axes = fig.get_subplot(**cell.place)
            axes.yaxis.domain = [max(0.0, 1 - (top + height) / total), 1 - top / total]
            axes.xaxis.showticklabels = lowest
            if level == 0 and name:
                _write_above(fig, axes, name)
            stack.append(cell)
            top += height + _GAP
        cells.append(stack)
    margin = {"l": 8, "r": 8, "t": 84 if legend else 52, "b": 34}
    layout = {"height": total + margin["t"] + margin["b"], "margin": margin, "showlegend": legend}
    return fig.update_layout(template=theme(), **layout), cells


def _write_above(fig: go.Figure, axes: Any, text: str) -> None:
    corner = {"x": axes.xaxis.domain[0], "y": axes.yaxis.domain[1], "xref": "paper", "yref": "paper"}
    anchors = {"xanchor": "left", "yanchor": "bottom", "align": "left", "yshift": 3, "showarrow": False}
    fig.add_annotation(text=f"<b>{text}</b>", font_size=13, **corner, **anchors)


def _draw_bars(fig: go.Figure, cell: _Cell, rows: pd.DataFrame, shown: Sequence[str], *, label: str) -> None:
    """The bars of one panel, each with its rate in words to the right, where no error bar crosses it."""
    records = {record["condition"]: record for record in rows.to_dict("records")}
    present = [condition for condition in shown if condition in records]
    for condition in present:
        record = records[condition]
        what = f"{label}<br><b>{condition}</b>" if label else f"<b>{condition}</b>"
        bar = go.Bar(
            x=[record["rate"]],
            y=[condition],
            orientation="h",
            name=condition,
            marker_color=CONDITION_COLORS[condition],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [record["high"] - record["rate"]],
                "arrayminus": [record["rate"] - record["low"]],
                "color": _INK,
                "thickness": 1.2,
                "width": 3,
            },
            hovertemplate=f"{what}: {rate_text(record)}<br>{_count_text(record)}<extra></extra>",
        )
        fig.add_trace(bar, **cell.place)
    in_words = go.Scatter(
        x=[1.03] * len(present),
        y=present,
        mode="text",
        text=[
            percent(records[name]["rate"]) if label else f"{rate_text(records[name])} of {records[name]['n']}"
            for name in present
        ],
        textposition="middle right",
        textfont_size=12 if label else 13,
        cliponaxis=False,
        hoverinfo="skip",
    )
    fig.add_trace(in_words, **cell.place)
    fig.update_yaxes(
        type="category",
        categoryorder="array",
        categoryarray=list(shown),
        range=[len(shown) - 0.5, -0.5],
        showgrid=False,
        showticklabels=cell.col == 1,
        ticksuffix=" ",
        title_text=None if label else "condition",
        **cell.place,
    )
    room = 1.24 if label else 1.4
    title = "responses that follow (%)" if cell.last else None
    ticks = {**_PERCENT_TICKS, "tickvals": [0, 0.5, 1]} if label else _PERCENT_TICKS
    fig.update_xaxes(range=[0, room], title_text=title, **ticks, **cell.place)


def _draw_rates(
    fig: go.Figure, cell: _Cell, line: pd.DataFrame, series: str, color: str, *, label: str, band: bool
) -> None:
    """Rate against layer. The interval is a band, or error bars where bands would cover each other."""
    if band:
        interval = go.Scatter(
            x=[*line["layer"], *line["layer"][::-1]],
            y=[*line["high"], *line["low"][::-1]],
            fill="toself",
            fillcolor=_faded(color),
            line_width=0,
            mode="lines",
            hoverinfo="skip",
            name="95\u00a0% interval",
        )
        fig.add_trace(interval, **cell.place)
    whiskers = {
        "type": "data",
        "symmetric": False,
        "array": line["high"] - line["rate"],
        "arrayminus": line["rate"] - line["low"],
        "thickness": 1,
        "width": 2,
        "visible": not band,
    }
    hover = f"{label}<br>layer %{{x}}, {series}: <b>%{{customdata[0]}}</b><br>%{{customdata[1]}}<extra></extra>"
    rates = go.Scatter(
        x=line["layer"],
        y=line["rate"],
        error_y=whiskers,
        mode="lines+markers",
        line={"color": color, "width": 2},
        marker_size=5,
        name=f"rate, {series}",
        customdata=[[rate_text(record), _count_text(record)] for record in line.to_dict("records")],
        hovertemplate=hover,
    )
    fig.add_trace(rates, **cell.place)


def _draw_degenerate(
    fig: go.Figure, cell: _Cell, line: pd.DataFrame, series: str, color: str, *, label: str, legend: bool
) -> None:
    bars = go.Bar(
        x=line["layer"],
        y=line["degenerate"],
        marker_color=_MUTED if legend else color,
        name="degenerate texts" if legend else f"degenerate texts, {series}",
        showlegend=legend,
        hovertemplate=f"{label}<br>layer %{{x}}, {series}: %{{y:.0%}} degenerate<extra></extra>",
    )
    fig.add_trace(bars, **cell.place)


def _draw_references(
    fig: go.Figure,
    cell: _Cell,
    unsteered: pd.DataFrame,
    steered: pd.DataFrame,
    *,
    span: list[float],
    label: str,
) -> None:
    """The unsteered rate as a dashed line; a ring with the layer's number around the chosen point, or words if none was."""
    for record in unsteered.head(1).to_dict("records"):
        hover = f"{label}<br>no steering: {rate_text(record)}<br>{_count_text(record)}<extra></extra>"
        dashed = go.Scatter(
            x=span,
            y=[record["rate"]] * 2,
            mode="lines",
            line={"color": _MUTED, "width": 1.5, "dash": "dash"},
            name="no steering",
            hovertemplate=hover,
        )
        fig.add_trace(dashed, **cell.place)
        if record["chosen"]:
            refused = go.Scatter(
                x=[sum(span) / 2],
                y=[record["rate"]],
                mode="text",
                text=["<b>no steering chosen</b>"],
                textposition="bottom center" if record["rate"] > 0.8 else "top center",
                name="no steering",
                showlegend=False,
                hoverinfo="skip",
            )
            fig.add_trace(refused, **cell.place)
    chosen = steered[steered["chosen"].astype(bool)]
    ring = go.Scatter(
        x=chosen["layer"],
        y=chosen["rate"],
        mode="markers+text",
        text=[f"<b>{layer}</b>" for layer in chosen["layer"]],
        textposition=["bottom center" if rate > 0.8 else "top center" for rate in chosen["rate"]],
        marker={"symbol": "circle-open", "size": 13, "color": _INK, "line": {"width": 2}},
        name="chosen layer",
        cliponaxis=False,
        hoverinfo="skip",
    )
    fig.add_trace(ring, **cell.place)


def _style_curve_axes(fig: go.Figure, top: _Cell, bottom: _Cell, span: list[float]) -> None:
    first = top.col == 1
    fig.update_xaxes(range=span, showgrid=False, **top.place)
    fig.update_xaxes(range=span, showgrid=False, title_text="layer" if bottom.last else None, **bottom.place)
    shared = {"range": [-0.03, 1.03], "showticklabels": first}
    fig.update_yaxes(**_PERCENT_TICKS, **shared, title_text="follow (%)" if first else None, **top.place)
    ticks = {**_PERCENT_TICKS, "tickvals": [0, 1]}
    fig.update_yaxes(**ticks, **shared, title_text="degen.<br>(%)" if first else None, **bottom.place)


def _layer_span(search: pd.DataFrame) -> list[float]:
    """From the first layer to the last, with room for half a bar, whose width is the step between layers."""
    layers = np.unique(search["layer"].dropna().astype(int))
    room = 0.6 * float(np.diff(layers).min()) if len(layers) > 1 else 0.6
    return [float(layers[0]) - room, float(layers[-1]) + room] if len(layers) else [-0.5, 0.5]


def _show_each_name_once(fig: go.Figure) -> None:
    """One legend entry per name; a click on it hides that name in every panel."""
    seen: set[str] = set()
    for trace in fig.data:
        trace.update(legendgroup=trace.name, showlegend=trace.showlegend is not False and trace.name not in seen)
        seen.add(trace.name)


def _series_colors(search: pd.DataFrame) -> dict[_Series, str]:
    steered = search[search["layer"].notna()]
    kinds = (
        steered[["operator", "positions", "coeff"]].drop_duplicates().sort_values(["operator", "positions", "coeff"])
    )
    kinds = kinds.astype({"operator": str, "positions": str, "coeff": float})
    several = {name for name in kinds if kinds[name].nunique() > 1}
    if len(kinds) == 1:
        operator, positions, coeff = kinds.iloc[0]
        return {_Series(operator, positions, coeff, name="vector"): CONDITION_COLORS["vector"]}
    found = {}
    for i, (operator, positions, coeff) in enumerate(kinds.itertuples(index=False)):
        where = f" at {positions}" if "positions" in several else ""
        size = f", coeff {coeff:g}" if "coeff" in several else ""
        color = _SERIES_COLORS[i % len(_SERIES_COLORS)]
        found[_Series(operator, positions, coeff, name=f"{operator}{where}{size}")] = color
    return found


def _by_instruction(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {str(name): rows for name, rows in table.groupby("instruction", sort=False)}


def _faded(color: str) -> str:
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.16)"


def _count_text(record: Mapping[Any, Any]) -> str:
    return f"{record['followed']} of {record['n']} responses"


def _require_table(table: pd.DataFrame, columns: Sequence[str], *, what: str) -> None:
    require_columns(table, columns, what=what)
    if table.empty:
        raise DataError(f"{what} must have at least one row, got none")
