"""A search: the rate of each candidate, and how many of its texts are broken, one panel per instruction.

layer_curve    against the steered layer
coeff_curve    against the coefficient, where candidates have no layer of their own: the strengths of a method such as `pasta`
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from steerlens._typing import ATTENTION_OPERATORS
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
    require_table(search, _NEEDED, what="the search frame")
    search = search.reset_index(drop=True)
    steered = search[search["layer"].notna()].astype({"layer": int})
    steered = steered.assign(at=steered["layer"], shown=steered["layer"].astype(str))
    keys = ["operator", "positions", "coeff", "unit"]
    axis = _Axis("layer", layer_span(search), {})
    fig = _curves(search, *_in_series(steered, keys), axis, columns=columns)
    return fig.update_layout(title_text=title or "How well each layer steers, on validation prompts")


def coeff_curve(search: pd.DataFrame, *, title: str | None = None, columns: int = 3) -> go.Figure:
    """Rate against the coefficient for each instruction, and the share of degenerate texts below it.

    As `layer_curve`, for a search of a method's strengths. Coefficients stand in their order, at equal distances, because some
    are shares and others factors over several magnitudes.

    Args:
        search: as for `layer_curve`; no steering is the row without a layer whose operator is one of vectors and coeff is 0.
        title, columns: as for `layer_curve`.

    Returns:
        A figure with two panels per instruction, the rate above the share of degenerate texts.

    Raises:
        DataError: a missing column, or no row.

    Example:
        >>> found = sl.sweep(model, sl.spotlight, valid[:2], coeffs=[0.2, 0.4], max_new_tokens=4)
        >>> coeff_curve(found.table).layout.xaxis.ticktext
        ('0.2', '0.4')
    """
    require_table(search, _NEEDED, what="the search frame")
    search = search.reset_index(drop=True)
    unsteered = (
        search["layer"].isna() & (search["coeff"].fillna(0) == 0) & ~search["operator"].isin(ATTENTION_OPERATORS)
    )
    steered = search[~unsteered]
    sizes = sorted(steered["coeff"].astype(float).unique())
    shown = [f"{size:g}" for size in sizes]
    places = steered["coeff"].astype(float).map(sizes.index)
    steered = steered.assign(at=places, shown=places.map(shown.__getitem__))
    ticks = {"tickvals": [*range(len(sizes))], "ticktext": shown, "zeroline": False}
    axis = _Axis("coefficient", [-0.6, len(sizes) - 0.4], ticks)
    fig = _curves(search, *_in_series(steered, ["operator", "positions", "unit"]), axis, columns=columns)
    return fig.update_layout(title_text=title or "How well each strength steers, on validation prompts")


_NEEDED = ["instruction", "layer", "operator", "positions", "coeff", *RATE_COLUMNS, "degenerate", "chosen"]


@dataclass(frozen=True)
class _Axis:
    """What runs along the bottom of every panel."""

    name: str
    span: list[float]
    ticks: Mapping[str, Any]


def _curves(
    search: pd.DataFrame, steered: pd.DataFrame, colors: Mapping[str, str], axis: _Axis, *, columns: int
) -> go.Figure:
    """Two panels per instruction.

    Args:
        steered: the rows of the search that are steered: `at` on the axis, which is `shown` as a text, and of which `series`.
        colors: of each series.
    """
    groups = by_instruction(search)
    fig, cells = small_multiples([*groups], columns=columns, panels=(140, 44), legend=True)
    for name, (top, bottom) in zip(groups, cells, strict=True):
        label, rows = shown_name(name), groups[name]
        unsteered = rows[~rows.index.isin(steered.index)]
        own = steered[steered["instruction"] == name].sort_values("at")
        for one, color in colors.items():
            line = own[own["series"] == one]
            _draw_rates(fig, top, line, one, color, label=label, axis=axis, as_band=len(colors) == 1)
            _draw_degenerate(fig, bottom, line, one, color, label=label, axis=axis, legend=len(colors) == 1)
        _draw_references(fig, top, unsteered, own, axis=axis, label=label)
        _style_curve_axes(fig, top, bottom, axis)
    show_each_name_once(fig)
    return fig


def _draw_rates(
    fig: go.Figure, cell: Cell, line: pd.DataFrame, series: str, color: str, *, label: str, axis: _Axis, as_band: bool
) -> None:
    """Rate against the axis. The interval is a band, or error bars where bands would cover each other."""
    if as_band:
        interval = band(line["at"], line["low"], line["high"], color)
        fig.add_trace(interval, **cell.place)
    ends = whiskers(line["rate"], line["low"], line["high"], width=2, thickness=1, visible=not as_band)
    where = f"{axis.name} %{{customdata[2]}}, {series}"
    hover = f"{label}<br>{where}: <b>%{{customdata[0]}}</b><br>%{{customdata[1]}}<extra></extra>"
    rates = go.Scatter(
        x=line["at"],
        y=line["rate"],
        error_y=ends,
        mode="lines+markers",
        line={"color": color, "width": 2},
        marker_size=5,
        name=f"rate, {series}",
        customdata=[[rate_text(record), count_text(record), record["shown"]] for record in line.to_dict("records")],
        hovertemplate=hover,
    )
    fig.add_trace(rates, **cell.place)


def _draw_degenerate(
    fig: go.Figure, cell: Cell, line: pd.DataFrame, series: str, color: str, *, label: str, axis: _Axis, legend: bool
) -> None:
    bars = go.Bar(
        x=line["at"],
        y=line["degenerate"],
        marker_color=MUTED if legend else color,
        name="degenerate texts" if legend else f"degenerate texts, {series}",
        showlegend=legend,
        customdata=line["shown"],
        hovertemplate=f"{label}<br>{axis.name} %{{customdata}}, {series}: %{{y:.0%}} degenerate<extra></extra>",
    )
    fig.add_trace(bars, **cell.place)


def _draw_references(
    fig: go.Figure,
    cell: Cell,
    unsteered: pd.DataFrame,
    steered: pd.DataFrame,
    *,
    axis: _Axis,
    label: str,
) -> None:
    """The unsteered rate as a dashed line; a ring with its number around the chosen point, or words if none was."""
    span = axis.span
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
        x=chosen["at"],
        y=chosen["rate"],
        mode="markers+text",
        text=[f"<b>{shown}</b>" for shown in chosen["shown"]],
        textposition=["bottom center" if rate > 0.8 else "top center" for rate in chosen["rate"]],
        marker={"symbol": "circle-open", "size": 13, "color": INK, "line": {"width": 2}},
        name=f"chosen {axis.name}",
        cliponaxis=False,
        hoverinfo="skip",
    )
    fig.add_trace(ring, **cell.place)


def _style_curve_axes(fig: go.Figure, top: Cell, bottom: Cell, axis: _Axis) -> None:
    first, look = top.col == 1, {"range": axis.span, "showgrid": False, **axis.ticks}
    fig.update_xaxes(**look, **top.place)
    fig.update_xaxes(**look, title_text=axis.name if bottom.last else None, **bottom.place)
    shared = {"range": [-0.03, 1.03], "showticklabels": first}
    fig.update_yaxes(**PERCENT_TICKS, **shared, title_text="follow (%)" if first else None, **top.place)
    ticks = {**PERCENT_TICKS, "tickvals": [0, 1]}
    fig.update_yaxes(**ticks, **shared, title_text="degen.<br>(%)" if first else None, **bottom.place)


def layer_span(search: pd.DataFrame) -> list[float]:
    """From the first layer to the last, with room for half a bar, whose width is the step between layers."""
    layers = np.unique(search["layer"].dropna().astype(int))
    room = 0.6 * float(np.diff(layers).min()) if len(layers) > 1 else 0.6
    return [float(layers[0]) - room, float(layers[-1]) + room] if len(layers) else [-0.5, 0.5]


def _in_series(steered: pd.DataFrame, keys: list[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    """The rows with the name of the line that each is on, those of equal keys on one; and the lines' colours."""
    steered = steered.assign(unit=_units(steered))
    kinds = steered[keys].drop_duplicates().sort_values(keys)
    several = {name for name in kinds if kinds[name].nunique() > 1}
    names: dict[tuple[Any, ...], str] = {}
    for kind in kinds.to_dict("records"):
        where = f" at {kind['positions']}" if "positions" in several else ""
        norms = " norms" if kind["unit"] == "resid_norm" else ""
        size = f", coeff {kind['coeff']:g}{norms}" if several & {"coeff", "unit"} and "coeff" in kind else ""
        names[tuple(kind.values())] = f"{kind['operator']}{where}{size}"
    colors = {name: _SERIES_COLORS[i % len(_SERIES_COLORS)] for i, name in enumerate(names.values())}
    if len(kinds) == 1:
        what = "attention" if kinds["operator"].iloc[0] in ATTENTION_OPERATORS else "vector"
        names = dict.fromkeys(names, what)
        colors = {what: CONDITION_COLORS["vector" if what == "vector" else "text+attention"]}
    series = [names[row] for row in steered[keys].itertuples(index=False, name=None)]
    return steered.assign(series=series), colors


def _units(search: pd.DataFrame) -> pd.Series:
    return search["unit"] if "unit" in search else pd.Series("absolute", index=search.index)
