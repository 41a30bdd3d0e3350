"""Points of pairs: embeddings of many instructions, and instructions with numbers along a line; with a slider over layers.

The slider moves the points of fixed traces, so that what a reader hid in the legend stays hidden. Each layer has its own ranges:
residuals grow with depth, and what is compared is the arrangement.
"""

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from steerlens.errors import DataError
from steerlens.figures.marks import with_subtitle
from steerlens.figures.multiples import require_table
from steerlens.figures.theme import INK, LINE, MUTED, instruction_style, number_text, theme
from steerlens.figures.words import escaped, name_lines, shown_name

_ENTRY = 19
"""Pixels of a line of the legend."""

_SYMBOLS_3D = {"triangle-up": "diamond-open", "star": "cross"}
"""What stands for a symbol that plotly does not have in three dimensions."""


def embedding_scatter(
    table: pd.DataFrame,
    *,
    method: str = "tsne",
    notes: Mapping[int, str] | str = "",
    layer: int | None = None,
    title: str | None = None,
) -> go.Figure:
    """A point for every pair, in the colour and with the symbol of its instruction; a slider if there are several layers.

    Args:
        table: one row per layer and pair: layer, instruction, prompt_id, query, x, y and, in three dimensions, z; every layer
            with the same pairs in the same order.
        method: "tsne" leaves the axes without numbers, since they have no unit; "pca" has residual units.
        notes: what stands below the title, for all layers or for each.
        layer: the one that is shown first; by default the middle one.
        title: what the figure is about; a phrase by default.

    Returns:
        A figure with one trace per instruction.

    Raises:
        DataError: a missing column, no row, a layer that is not there, or layers with different pairs.

    Example:
        >>> table = pd.DataFrame({"layer": [0, 1], "instruction": "a:b", "prompt_id": "p", "query": "Why?", "x": 0.0, "y": 1.0})
        >>> len(embedding_scatter(table).layout.sliders[0].steps)
        2
    """
    require_table(table, ["layer", "instruction", "prompt_id", "query", "x", "y"], what="the embedding frame")
    axes = [axis for axis in "xyz" if axis in table]
    layers = _by_layer(table, ["instruction", "prompt_id"])
    shown = _first_shown(layers, layer)
    fig = go.Figure(layout={"template": theme()})
    for name, (color, symbol) in instruction_style(table["instruction"]).items():
        rows = layers[shown][layers[shown]["instruction"] == name]
        flat = len(axes) == 2
        kind = go.Scatter if flat else go.Scatter3d
        marker = {"color": color, "symbol": symbol if flat else _SYMBOLS_3D.get(symbol, symbol)}
        points = kind(
            **{axis: rows[axis] for axis in axes},
            mode="markers",
            name=name_lines(name, 26, most=2),
            showlegend=True,  # also of one instruction, which nothing else would name
            marker={**marker, "size": 8 if flat else 4, "opacity": 0.85, "line": {"color": "white", "width": 0.5}},
            customdata=_wrapped(rows["query"]),
            hovertemplate=f"<b>{shown_name(name)}</b><br>%{{customdata}}<extra></extra>",
        )
        fig.add_trace(points)
    unit = "no unit" if method == "tsne" else "residual units"
    places = ("first", "second", "third")[: len(axes)]
    deep = len(axes) == 3  # where long names of axes are cut off, so that the unit stands below the title
    _name_axes(fig, [place if deep else f"{place} axis ({unit})" for place in places], method == "tsne")
    names = list(dict.fromkeys(table["instruction"]))
    steps = {}
    for number, rows in layers.items():
        parts = [rows[rows["instruction"] == name] for name in names]
        note = notes if isinstance(notes, str) else notes[number]
        note = "; ".join([note] * bool(note) + [f"axes: {unit}"] * deep)
        steps[number] = (_moved(parts, axes), _ranges(rows, axes), f"layer {number}" + f": {note}" * bool(note))
    _set_slider(fig, steps, shown)
    return fig.update_layout(title_text=title or "What each instruction changes: one point per pair")


def line_scatter(
    points: pd.DataFrame, measures: pd.DataFrame, *, layer: int | None = None, title: str | None = None
) -> go.Figure:
    """Pairs in the plane of the first two components of their means, coloured by number, and the means along a path.

    Args:
        points: one row per layer and pair: layer, number, prompt_id, query, x, y; every layer with the same pairs.
        measures: one row per layer and measure (spearman, share): value, low, high, control.
        layer: the one that is shown first; by default the middle one.
        title: what the figure is about; a phrase by default.

    Returns:
        A figure with one trace per number and one for the path of the means; a slider if there are several layers.

    Raises:
        DataError: a missing column, no row, a layer that is not there, or layers with different pairs.

    Example:
        >>> pairs = {"number": [1, 2, 3], "prompt_id": "p", "query": "Why?", "x": [0.0, 1.0, 2.0], "y": 0.0}
        >>> known = {"measure": ["spearman", "share"], "value": 1.0, "low": 1.0, "high": 1.0, "control": 0.5}
        >>> points, known = (pd.DataFrame({"layer": 0, **columns}) for columns in (pairs, known))
        >>> [trace.name for trace in line_scatter(points, known).data]
        ['1', '2', '3', 'mean']
    """
    require_table(points, ["layer", "number", "prompt_id", "query", "x", "y"], what="the frame of points")
    require_table(measures, ["layer", "measure", "value", "low", "high", "control"], what="the frame of measures")
    layers = _by_layer(points, ["number", "prompt_id"])
    shown = _first_shown(layers, layer)
    numbers = sorted(points["number"].unique())
    shades = sample_colorscale("Viridis", np.linspace(0, 0.88, len(numbers)))  # its last shades are too light on white
    fig = go.Figure(layout={"template": theme()})
    for number, color in zip(numbers, shades, strict=True):
        rows = layers[shown][layers[shown]["number"] == number]
        pairs = go.Scatter(
            x=rows["x"],
            y=rows["y"],
            mode="markers",
            name=f"{number:g}",
            marker={"color": color, "size": 7, "opacity": 0.45},
            customdata=_wrapped(rows["query"]),
            hovertemplate="<b>%{fullData.name}</b><br>%{customdata}<extra></extra>",
        )
        fig.add_trace(pairs)
    path = go.Scatter(
        mode="lines+markers+text",
        name="mean",
        text=[f"<b>{number:g}</b>" for number in numbers],
        textposition="top center",
        line={"color": MUTED, "width": 1.5},
        marker={"color": shades, "size": 14, "line": {"color": INK, "width": 1.5}},
        hovertemplate="mean of %{text}<extra></extra>",
    )
    fig.add_trace(path)
    _name_axes(
        fig, ["first component of the means (residual units)", "second component (residual units)"], hide_numbers=False
    )
    steps = {}
    for number, rows in layers.items():
        parts = [rows[rows["number"] == value] for value in numbers]
        means = pd.DataFrame([part[["x", "y"]].mean() for part in parts])
        steps[number] = (_moved([*parts, means], ["x", "y"]), _ranges(rows, ["x", "y"]), _line_note(number, measures))
    _set_slider(fig, steps, shown)
    fig.update_layout(legend_title_text="number")
    return fig.update_layout(title_text=title or "Instructions with numbers, where their means differ most")


def _line_note(layer: int, measures: pd.DataFrame) -> str:
    """The measures of a layer, a line each."""
    words = {"spearman": "rank correlation with the number", "share": "share of the first component"}
    rows = measures[measures["layer"] == layer].to_dict("records")
    return "<br>".join(f"{words[row['measure']]} {number_text(row)}, shuffled {row['control']:.2f}" for row in rows)


def _by_layer(table: pd.DataFrame, names: list[str]) -> dict[int, pd.DataFrame]:
    """The rows of each layer, which must be of the same pairs: the slider moves points and leaves their hover as it is."""
    layers = {number: table[table["layer"] == number] for number in table["layer"].unique().tolist()}
    first = next(iter(layers.values()))[names].to_numpy().tolist()
    for number, rows in layers.items():
        if rows[names].to_numpy().tolist() != first:
            raise DataError(f"every layer must have the same pairs in the same order, and layer {number} has others")
    return layers


def _first_shown(layers: Iterable[int], layer: int | None) -> int:
    known = list(layers)
    if layer is not None and layer not in known:
        raise DataError(f"layer must be one of the frame's {known}, got {layer}")
    return known[len(known) // 2] if layer is None else layer


def _wrapped(queries: "pd.Series[Any]") -> list[str]:
    return ["<br>".join(map(escaped, textwrap.wrap(query, 60))) for query in queries]


def _moved(parts: Iterable[pd.DataFrame], axes: list[str]) -> dict[str, list[list[float]]]:
    """The coordinates of each trace, in as many digits as a screen shows."""
    parts = list(parts)
    return {axis: [[float(f"{value:.5g}") for value in part[axis]] for part in parts] for axis in axes}


def _ranges(rows: pd.DataFrame, axes: list[str]) -> dict[str, list[float]]:
    """A range for each axis, with some room; the layout's names are those of two dimensions or of a scene."""
    found = {}
    for axis in axes:
        low, high = rows[axis].min(), rows[axis].max()
        room = 0.06 * (high - low) or 1.0
        found["scene." * (len(axes) == 3) + f"{axis}axis.range"] = [float(low - room), float(high + room)]
    return found


def _name_axes(fig: go.Figure, names: list[str], hide_numbers: bool) -> None:
    if len(names) == 3:
        axis = {"showticklabels": not hide_numbers, "nticks": 5, "tickfont_size": 10, "gridcolor": "#D0D4DA"}
        scene = {
            f"{key}axis": {**axis, "title": {"text": name, "font": {"size": 12}}}
            for key, name in zip("xyz", names, strict=True)
        }
        camera = {"eye": {"x": 1.5, "y": 1.5, "z": 1.0}, "center": {"x": 0, "y": 0, "z": -0.15}}
        fig.update_layout(scene={**scene, "aspectmode": "cube", "camera": camera})
        return
    fig.update_xaxes(title_text=names[0], showticklabels=not hide_numbers, zeroline=False)
    # Rotations are free, so both axes have one scale.
    fig.update_yaxes(title_text=names[1], showticklabels=not hide_numbers, zeroline=False, scaleanchor="x")


def _set_slider(fig: go.Figure, steps: Mapping[int, tuple[dict[str, Any], dict[str, Any], str]], shown: int) -> None:
    """Draw the layer that is shown first, and let a slider go to the others."""
    move, layout, note = steps[shown]
    for index, trace in enumerate(fig.data):
        trace.update({axis: values[index] for axis, values in move.items()})
    # The legend may reach down beside the slider, which leaves the points too little height for many names.
    needed = _ENTRY * sum(1 + trace.name.count("<br>") for trace in fig.data)
    legend = {
        "orientation": "v",
        "x": 1.02,
        "y": 1,
        "yanchor": "top",
        "maxheight": needed + 30,
        "itemsizing": "constant",
    }
    top = 76 + LINE * note.count("<br>")
    fig.update_layout(title=with_subtitle("", note), margin={"t": top, "b": 40}, legend=legend)
    fig.update_layout(height=max(560, top + needed + 50))
    fig.update_layout({name.replace(".", "_"): value for name, value in layout.items()})
    if len(steps) == 1:
        return
    entries = [
        {"label": str(number), "method": "update", "args": [data, {**ranges, "title.subtitle.text": text}]}
        for number, (data, ranges, text) in steps.items()
    ]
    slider = {
        "active": list(steps).index(shown),
        "steps": entries,
        "currentvalue": {"prefix": "layer "},
        "pad": {"t": 48, "b": 8},
    }
    fig.update_layout(sliders=[slider])
