"""A search over layers: the rate of each candidate, and how many of its texts are broken, one panel per instruction."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from steerlens.figures.cells import count_text
from steerlens.figures.marks import band, whiskers
from steerlens.figures.multiples import (
    Cell,
    by_instruction,
    require_table,
    show_each_name_once,
    small_multiples,
)
from steerlens.figures.theme import CONDITION_COLORS, INK, MUTED, PERCENT_TICKS, rate_text
from steerlens.figures.words import shown_name
from steerlens.stats.rates import RATE_COLUMNS

_SERIES_COLORS = ("#F2A66B", "#D55E00", "#8A3C00", "#4A2000")  # light to dark, as the coefficient grows


def layer_curve(search: pd.DataFrame, *, title: str | None = None, columns: int = 3) -> go.Figure:
    """Rate against the steered layer for each instruction, and the share of degenerate texts below it.

    The dashed line is the rate without steering (the row whose layer is missing), the ringed point the chosen
    layer. A search over several coefficients or operators draws one line for each.

    Args:
        search: one row per instruction and candidate: instruction, layer, operator, positions, coeff, n, followed, rate,
            low, high, degenerate, chosen; with a column unit, coefficients in mean residual norms are named so.
        title: what the figure is about; a phrase by default.
        columns: panels side by side.

    Returns:
        A figure with two panels per instruction, the rate above the share of degenerate texts.

    Raises:
        DataError: a missing column, or no row.

    Example:
        >>> found = sl.sweep(model, vector, valid[:2], layers=[3, 4], max_new_tokens=4)
        >>> layer_curve(found.table).layout.title.text != ""
        True
    """
    needed = ["instruction", "layer", "operator", "positions", "coeff", *RATE_COLUMNS, "degenerate", "chosen"]
    require_table(search, needed, what="the search frame")
    groups = by_instruction(search)
    fig, cells = small_multiples([*groups], columns=columns, panels=(140, 44), legend=True)
    colors = _series_colors(search)
    span = layer_span(search)
    for name, (top, bottom) in zip(groups, cells, strict=True):
        label, rows = shown_name(name), groups[name]
        unsteered = rows[rows["layer"].isna()]
        steered = rows[rows["layer"].notna()].astype({"layer": int}).sort_values("layer")
        for series, color in colors.items():
            same = (steered["operator"] == series.operator) & (steered["positions"] == series.positions)
            line = steered[same & (steered["coeff"] == series.coeff) & (_units(steered) == series.unit)]
            _draw_rates(fig, top, line, series.name, color, label=label, as_band=len(colors) == 1)
            _draw_degenerate(fig, bottom, line, series.name, color, label=label, legend=len(colors) == 1)
        _draw_references(fig, top, unsteered, steered, span=span, label=label)
        _style_curve_axes(fig, top, bottom, span)
    show_each_name_once(fig)
    return fig.update_layout(title_text=title or "How well each layer steers, on validation prompts")


@dataclass(frozen=True, order=True)
class _Series:
    """The candidates of a search that share everything but the layer: one line."""

    operator: str
    positions: str
    coeff: float
    unit: str
    name: str


def _draw_rates(
    fig: go.Figure, cell: Cell, line: pd.DataFrame, series: str, color: str, *, label: str, as_band: bool
) -> None:
    """Rate against layer. The interval is a band, or error bars where bands would cover each other."""
    if as_band:
        interval = band(line["layer"], line["low"], line["high"], color)
        fig.add_trace(interval, **cell.place)
    ends = whiskers(line["rate"], line["low"], line["high"], width=2, thickness=1, visible=not as_band)
    hover = f"{label}<br>layer %{{x}}, {series}: <b>%{{customdata[0]}}</b><br>%{{customdata[1]}}<extra></extra>"
    rates = go.Scatter(
        x=line["layer"],
        y=line["rate"],
        error_y=ends,
        mode="lines+markers",
        line={"color": color, "width": 2},
        marker_size=5,
        name=f"rate, {series}",
        customdata=[[rate_text(record), count_text(record)] for record in line.to_dict("records")],
        hovertemplate=hover,
    )
    fig.add_trace(rates, **cell.place)


def _draw_degenerate(
    fig: go.Figure, cell: Cell, line: pd.DataFrame, series: str, color: str, *, label: str, legend: bool
) -> None:
    bars = go.Bar(
        x=line["layer"],
        y=line["degenerate"],
        marker_color=MUTED if legend else color,
        name="degenerate texts" if legend else f"degenerate texts, {series}",
        showlegend=legend,
        hovertemplate=f"{label}<br>layer %{{x}}, {series}: %{{y:.0%}} degenerate<extra></extra>",
    )
    fig.add_trace(bars, **cell.place)


def _draw_references(
    fig: go.Figure,
    cell: Cell,
    unsteered: pd.DataFrame,
    steered: pd.DataFrame,
    *,
    span: list[float],
    label: str,
) -> None:
    """The unsteered rate as a dashed line; a ring with the layer's number around the chosen point, or words if none was."""
    for record in unsteered.head(1).to_dict("records"):
        hover = f"{label}<br>no steering: {rate_text(record)}<br>{count_text(record)}<extra></extra>"
        dashed = go.Scatter(
            x=span,
            y=[record["rate"]] * 2,
            mode="lines",
            line={"color": MUTED, "width": 1.5, "dash": "dash"},
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
    # Labels stand above their points, and near the top of a panel, where they would be cut off, below.
    chosen = steered[steered["chosen"].astype(bool)]
    ring = go.Scatter(
        x=chosen["layer"],
        y=chosen["rate"],
        mode="markers+text",
        text=[f"<b>{layer}</b>" for layer in chosen["layer"]],
        textposition=["bottom center" if rate > 0.8 else "top center" for rate in chosen["rate"]],
        marker={"symbol": "circle-open", "size": 13, "color": INK, "line": {"width": 2}},
        name="chosen layer",
        cliponaxis=False,
        hoverinfo="skip",
    )
    fig.add_trace(ring, **cell.place)


def _style_curve_axes(fig: go.Figure, top: Cell, bottom: Cell, span: list[float]) -> None:
    first = top.col == 1
    fig.update_xaxes(range=span, showgrid=False, **top.place)
    fig.update_xaxes(range=span, showgrid=False, title_text="layer" if bottom.last else None, **bottom.place)
    shared = {"range": [-0.03, 1.03], "showticklabels": first}
    fig.update_yaxes(**PERCENT_TICKS, **shared, title_text="follow (%)" if first else None, **top.place)
    ticks = {**PERCENT_TICKS, "tickvals": [0, 1]}
    fig.update_yaxes(**ticks, **shared, title_text="degen.<br>(%)" if first else None, **bottom.place)


def layer_span(search: pd.DataFrame) -> list[float]:
    """From the first layer to the last, with room for half a bar, whose width is the step between layers."""
    layers = np.unique(search["layer"].dropna().astype(int))
    room = 0.6 * float(np.diff(layers).min()) if len(layers) > 1 else 0.6
    return [float(layers[0]) - room, float(layers[-1]) + room] if len(layers) else [-0.5, 0.5]


def _series_colors(search: pd.DataFrame) -> dict[_Series, str]:
    steered = search[search["layer"].notna()]
    keys = ["operator", "positions", "coeff", "unit"]
    kinds = steered.assign(unit=_units(steered))[keys].drop_duplicates().sort_values(keys)
    kinds = kinds.astype({"operator": str, "positions": str, "coeff": float, "unit": str})
    several = {name for name in kinds if kinds[name].nunique() > 1}
    if len(kinds) == 1:
        operator, positions, coeff, unit = kinds.iloc[0]
        return {_Series(operator, positions, coeff, unit, name="vector"): CONDITION_COLORS["vector"]}
    found = {}
    for i, (operator, positions, coeff, unit) in enumerate(kinds.itertuples(index=False)):
        where = f" at {positions}" if "positions" in several else ""
        norms = " norms" if unit == "resid_norm" else ""
        size = f", coeff {coeff:g}{norms}" if several & {"coeff", "unit"} else ""
        color = _SERIES_COLORS[i % len(_SERIES_COLORS)]
        found[_Series(operator, positions, coeff, unit, name=f"{operator}{where}{size}")] = color
    return found


def _units(search: pd.DataFrame) -> pd.Series:
    return search["unit"] if "unit" in search else pd.Series("absolute", index=search.index)
