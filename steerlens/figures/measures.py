"""Numbers over the layers beside their controls: one panel per instruction or per measure, intervals on both."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from steerlens.figures.marks import band, whiskers
from steerlens.figures.multiples import Cell, require_table, show_each_name_once, small_multiples
from steerlens.figures.theme import CONDITION_COLORS, INK, MUTED, instruction_style, number_text

SEPARABILITY: dict[str, Any] = {
    "panels": "measure",
    "names": {
        "probe": "linear probe (accuracy)",
        "nearest_centroid": "nearest centroid (accuracy)",
        "silhouette": "mean silhouette",
    },
    "control": "shuffled labels",
    "title": "How well each layer tells instructions apart",
}
"""How `measure_curves` draws the table of `separability`."""

_NEEDED = ("layer", "value", "low", "high", "control", "control_low", "control_high")


def measure_curves(
    table: pd.DataFrame,
    *,
    panels: str = "instruction",
    names: Mapping[str, str] | None = None,
    unit: str = "",
    control: str = "control",
    log: bool = False,
    title: str | None = None,
    columns: int = 4,
) -> go.Figure:
    """A measure over the layers with its interval, and its control in grey, one panel for each value of a column.

    Args:
        table: one row per panel and layer: the column `panels`, layer, value, low, high, control, control_low, control_high.
        panels: "instruction", whose panels have the colours of instructions, or another column.
        names: what panels are called; by default as they are.
        unit: what the numbers are, for the vertical axis.
        control: what the control is, for the legend.
        log: whether the scale is logarithmic, for numbers above zero.
        title: what the figure is about; a phrase by default.
        columns: panels side by side.

    Returns:
        A figure whose panels share one scale, with zero on it unless it is logarithmic.

    Raises:
        DataError: a missing column, or no row.

    Example:
        >>> row = {"instruction": "a:b", "value": 0.5, "low": 0.4, "high": 0.6, "control": 0.0, "control_low": -0.1}
        >>> fig = measure_curves(pd.DataFrame([{**row, "layer": layer, "control_high": 0.1} for layer in (0, 1)]))
        >>> [trace.name for trace in fig.data]
        ['control (middle 95\xa0%)', 'value']
    """
    require_table(table, [panels, *_NEEDED], what="the frame of measures")
    groups = {str(key): rows.sort_values("layer") for key, rows in table.groupby(panels, sort=False)}
    shown = [(names or {}).get(key, key) for key in groups]
    styles = instruction_style(groups) if panels == "instruction" else dict.fromkeys(groups, (INK, "circle"))
    fig, cells = small_multiples(shown, columns=columns, panels=(_height(groups, columns),), legend=True)
    span = _span(table, ["value", "low", "high", "control_low", "control_high"], log=log)
    for (key, rows), (cell,) in zip(groups.items(), cells, strict=True):
        layers, low, high = (rows[name].to_numpy() for name in ("layer", "control_low", "control_high"))
        _draw_band(fig, cell, layers, low, high, f"{control} (middle 95\u00a0%)", MUTED)
        _draw_value(fig, cell, rows, styles[key][0], control)
        _style(fig, cell, table["layer"], span, unit, log=log)
    return _finish(fig, title or "Each measure over the layers, beside its control")


def projection_profiles(profiles: pd.DataFrame, *, title: str | None = None, columns: int = 4) -> go.Figure:
    """Projections of both sides on the direction over the layers: mean and one deviation, one panel per instruction.

    The grey band about the middle of the two means is as wide as the gap that a random direction shows.

    Args:
        profiles: one row per instruction, layer and side: mean, std, low, high, random_gap, in residual units.
        title: what the figure is about; a phrase by default.
        columns: panels side by side.

    Returns:
        A figure whose panels share one scale.

    Raises:
        DataError: a missing column, or no row.

    Example:
        >>> rows = [{"side": side, "mean": mean, "low": mean, "high": mean} for side, mean in (("without", 0.0), ("with", 3.0))]
        >>> fig = projection_profiles(pd.DataFrame(rows).assign(instruction="a:b", layer=0, std=1.0, random_gap=0.2))
        >>> [trace.name for trace in fig.data if trace.showlegend is not False]
        ['gap along a random direction', 'without the instruction', 'with it']
    """
    needed = ["instruction", "layer", "side", "mean", "std", "low", "high", "random_gap"]
    require_table(profiles, needed, what="the frame of profiles")
    groups = {str(name): rows for name, rows in profiles.groupby("instruction", sort=False)}
    fig, cells = small_multiples([*groups], columns=columns, panels=(_height(groups, columns),), legend=True)
    ends = profiles.assign(below=profiles["mean"] - profiles["std"], above=profiles["mean"] + profiles["std"])
    span = _span(ends, ["mean", "below", "above"])
    for rows, (cell,) in zip(groups.values(), cells, strict=True):
        sides = {side: part.sort_values("layer") for side, part in rows.groupby("side")}
        middle = (sides["without"]["mean"].to_numpy() + sides["with"]["mean"].to_numpy()) / 2
        gap = sides["with"]["random_gap"].to_numpy() / 2
        layers = sides["with"]["layer"].to_numpy()
        _draw_band(fig, cell, layers, middle - gap, middle + gap, "gap along a random direction", MUTED)
        for side, name, condition in (("without", "without the instruction", "random"), ("with", "with it", "text")):
            _draw_side(fig, cell, sides[side], name, CONDITION_COLORS[condition])
        _style(fig, cell, profiles["layer"], span, "projection")
    return _finish(fig, title or "Where both sides lie along the direction (mean, deviation)")


def _draw_value(fig: go.Figure, cell: Cell, rows: pd.DataFrame, color: str, control: str) -> None:
    texts = [[number_text(row), _control_text(row)] for row in rows.to_dict("records")]
    line = go.Scatter(
        x=rows["layer"],
        y=rows["value"],
        error_y=whiskers(rows["value"], rows["low"], rows["high"], width=2),
        mode="lines+markers",
        line={"color": color, "width": 2},
        marker_size=5,
        name="value",
        showlegend=False,
        customdata=texts,
        hovertemplate=f"layer %{{x}}: <b>%{{customdata[0]}}</b><br>{control}: %{{customdata[1]}}<extra></extra>",
    )
    fig.add_trace(line, **cell.place)


def _control_text(row: Mapping[Any, Any]) -> str:
    return number_text({"value": row["control"], "low": row["control_low"], "high": row["control_high"]})


def _draw_side(fig: go.Figure, cell: Cell, rows: pd.DataFrame, name: str, color: str) -> None:
    low, high = rows["mean"] - rows["std"], rows["mean"] + rows["std"]
    _draw_band(
        fig, cell, rows["layer"].to_numpy(), low.to_numpy(), high.to_numpy(), f"{name}, deviation", color, legend=False
    )
    texts = [number_text({**row, "value": row["mean"]}) for row in rows.to_dict("records")]
    line = go.Scatter(
        x=rows["layer"],
        y=rows["mean"],
        mode="lines+markers",
        line={"color": color, "width": 2},
        marker_size=5,
        name=name,
        customdata=texts,
        hovertemplate=f"layer %{{x}}, {name}: <b>%{{customdata}}</b><extra></extra>",
    )
    fig.add_trace(line, **cell.place)


def _draw_band(
    fig: go.Figure,
    cell: Cell,
    layers: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    name: str,
    color: str,
    *,
    legend: bool = True,
) -> None:
    """A band that goes a little beyond the first and the last layer, so that it is seen where there is only one."""
    known = ~(np.isnan(low) | np.isnan(high))
    layers, low, high = layers[known], low[known], high[known]
    if not len(layers):
        return
    x = np.concatenate([[layers[0] - 0.4], layers, [layers[-1] + 0.4]])
    fig.add_trace(
        band(x, np.pad(low, 1, "edge"), np.pad(high, 1, "edge"), color, name=name, showlegend=legend), **cell.place
    )


def _height(groups: Collection[str], columns: int) -> int:
    """Of a panel, in pixels: a single row has room."""
    return 240 if len(groups) <= columns else 140


def _span(table: pd.DataFrame, columns: list[str], *, log: bool = False) -> list[float]:
    """From the lowest to the highest number, zero among them, with some room; of logarithms, without zero."""
    values = table[columns].to_numpy(dtype=float)
    known = values[~np.isnan(values)]
    ends = np.log10(known[known > 0]) if log else np.append(known, 0.0)
    low, high = (float(ends.min()), float(ends.max())) if len(ends) else (0.0, 1.0)
    room = 0.05 * (high - low) or 1.0
    return [low - room, high + room]


def _style(
    fig: go.Figure, cell: Cell, layers: "pd.Series[Any]", span: list[float], unit: str, *, log: bool = False
) -> None:
    first = cell.col == 1
    ends = [layers.min() - 0.6, layers.max() + 0.6]
    whole = {"tickformat": "d", "dtick": max(1, int(np.ceil((ends[1] - ends[0]) / 10)))}
    # All panels have the same layers, so the lowest one of a column says which.
    title = {"showticklabels": cell.last, "title_text": "layer" if cell.last else None}
    fig.update_xaxes(range=ends, showgrid=False, zeroline=False, **title, **whole, **cell.place)
    axis = {"range": span, "showticklabels": first, "zeroline": True, "title_text": unit if first and unit else None}
    scale = {"type": "log", "dtick": 1} if log else {}
    fig.update_yaxes(**axis, **scale, **cell.place)


def _finish(fig: go.Figure, title: str) -> go.Figure:
    show_each_name_once(fig)
    # Names of two lines reach above the panels where a figure is made lower than it wants to be.
    return fig.update_layout(title_text=title, legend_y=1.04, margin_t=fig.layout.margin.t + 16)
