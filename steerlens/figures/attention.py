"""Attention, layer by head: how much of it is on the instruction, and which heads are worth steering.

    attention_mass_map        share of attention on the instruction's tokens, before and after, and the difference
    attention_mass_by_layer   the same over the layers: the mean over heads, and the range of the heads
    head_profile_map          what steering a single head, or a whole layer, gains in following

Layers go up, heads to the right. What the maps do not show: a head that attends to the instruction need not use what it reads
there, and the best of many heads that were tried on few prompts owe a part of their gain to luck.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from steerlens.errors import DataError
from steerlens.figures.layers import layer_span
from steerlens.figures.marks import band, colorbar, whiskers, with_subtitle
from steerlens.figures.matrices import MISSING_CELL
from steerlens.figures.multiples import (
    Cell,
    by_instruction,
    instruction_label,
    require_once,
    require_table,
    show_each_name_once,
    small_multiples,
)
from steerlens.figures.theme import INK, MISSING, MUTED, method_style, percent, theme
from steerlens.figures.words import shown_name

_MASS = ("condition", "layer", "head", "mass")
_PROFILE = ("layer", "head", "instruction", "rate", "baseline", "gain", "n", "rank", "chosen")
_WHOLE = "all"
"""What stands below the column of whole layers."""

_Texts = Mapping[tuple[Any, Any], str]
"""Layer and head -> what is said on hovering."""

_BAR = 74
"""Pixels that a bar of colours below the panels takes, with its unit."""


def attention_mass_map(table: pd.DataFrame, *, title: str | None = None, columns: int = 3) -> go.Figure:
    """Heat maps of layer by head: the share of attention on the instruction, a panel for each condition on one scale.

    Args:
        table: one row per condition, layer and head: mass, the share of attention after softmax that is on the instruction's
            tokens; with columns low and high, the interval is said on hovering.
        title: what the figure is about; a phrase by default.
        columns: panels side by side.

    Returns:
        A panel per condition in the table's order; of two conditions a third one has the second minus the first.

    Raises:
        DataError: a missing column, no row, two rows of one head, or a share outside [0, 1].

    Example:
        >>> table = pd.DataFrame({"condition": ["before", "after"], "layer": 0, "head": 0, "mass": [0.1, 0.4]})
        >>> [note.text for note in attention_mass_map(table).layout.annotations]
        ['<b>before</b>', '<b>after</b>', '<b>after minus before</b>']
    """
    groups = _by_condition(table)
    layers, heads = sorted(set(table["layer"])), [*range(int(table["head"].max()) + 1)]
    masses = {name: _grid(rows, "mass", layers, heads) for name, rows in groups.items()}
    hovers = {name: _mass_hovers(rows) for name, rows in groups.items()}
    names, change = [*groups], None
    if len(names) == 2:
        (before, after), (first, second) = masses.values(), hovers.values()
        change = after - before
        names.append(f"{names[1]} minus {names[0]}")
    fig, cells = small_multiples(names, columns=columns, panels=(_height(layers),))
    for name, (cell,) in zip(groups, cells, strict=False):
        fig.add_trace(_map(masses[name], hovers[name], "coloraxis"), **cell.place)
    places = [(0.5, 0.7)] if change is None else [(1 / 3, 0.5), (5 / 6, 0.3)]
    scale = {"cmin": 0, "cmax": _largest(table["mass"]), "colorscale": "Blues"}
    bar = _bar_below("on the instruction (%)", *places[0], ticks={"tickformat": ".2~%"})
    fig.update_layout(coloraxis={**scale, "colorbar": bar})
    if change is not None:
        fig.add_trace(_map(change, _change_hovers(first, second, change), "coloraxis2"), **cells[-1][0].place)
        largest = _largest(change)
        signed = {"cmin": -largest, "cmid": 0, "cmax": largest, "colorscale": "RdBu_r"}
        bar = _bar_below("change (points)", *places[1], ticks=_points(largest, 1))
        fig.update_layout(coloraxis2={**signed, "colorbar": bar})
    for (cell,) in cells:
        _style_layers(fig, cell, layers)
        _style_heads(fig, cell, heads)
    if any(grid.isna().any(axis=None) for grid in masses.values()):
        fig.update_layout(plot_bgcolor=MISSING_CELL)
    _make_room_below(fig)
    return fig.update_layout(title_text=title or "Attention on the instruction, by layer and head")


def attention_mass_by_layer(table: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """The share of attention on the instruction over the layers: a line per condition, the mean over heads.

    Args:
        table: of `attention_mass_map`: condition, layer, head, mass.
        title: what the figure is about; a phrase by default.

    Returns:
        Lines with bands from the head that attends least to the one that attends most, which are no intervals.

    Raises:
        DataError: a missing column, no row, two rows of one head, or a share outside [0, 1].

    Example:
        >>> heads = pd.DataFrame({"condition": "before", "layer": 0, "head": [0, 1], "mass": [0.1, 0.3]})
        >>> attention_mass_by_layer(heads).data[1].y.tolist()
        [0.2]
    """
    groups, fig = _by_condition(table), go.Figure(layout={"template": theme(), "height": 400})
    styles = method_style(groups)
    for place, (name, rows) in enumerate(groups.items()):
        by = rows.groupby("layer")["mass"]
        heads = pd.DataFrame({"mean": by.mean(), "low": by.min(), "high": by.max(), "n": by.count()})
        # Points of one layer stand side by side, with whiskers where a band would have no width.
        aside = 0.1 * (place - (len(groups) - 1) / 2) if table["layer"].nunique() == 1 else 0.0
        _draw_heads(fig, _line(name), heads, *styles[name], aside=aside)
    fig.update_yaxes(tickformat=".0%", rangemode="tozero", title_text="on the instruction (%)", zeroline=False)
    whole = {"tickformat": "d", "dtick": math.ceil((table["layer"].max() - table["layer"].min() + 1) / 10)}
    fig.update_xaxes(title_text="layer", range=layer_span(table), showgrid=False, zeroline=False, **whole)
    fig.update_layout(margin={"l": 8, "r": 8, "t": 92, "b": 34}, showlegend=True)
    show_each_name_once(fig)
    return fig.update_layout(title_text=title or "Attention on the instruction (mean, all heads)")


def head_profile_map(table: pd.DataFrame, *, title: str | None = None, columns: int = 3) -> go.Figure:
    """What steering one head gains in following: heat maps of layer by head, a panel per instruction, chosen heads outlined.

    Where only whole layers were steered, bars by layer; where heads and layers were, a column of layers beside the heads.

    Args:
        table: one row per instruction and head, or whole layer, whose head is missing: rate, baseline (the rate without
            steering), gain, n, rank (1 is the best), chosen.
        title: what the figure is about; a phrase by default.
        columns: panels side by side.

    Returns:
        A figure whose panels share one scale, centred on zero.

    Raises:
        DataError: a missing column, no row, or two rows of one head.

    Example:
        >>> best = {"rate": 0.5, "baseline": 0.25, "gain": 0.25, "n": 8, "rank": 1, "chosen": True}
        >>> fig = head_profile_map(pd.DataFrame([{**best, "instruction": "a:b", "layer": 0, "head": 3}]))
        >>> fig.data[0].z[0].tolist()
        [nan, nan, nan, 0.25]
    """
    require_table(table, _PROFILE, what="the head profile")
    require_once(table, ["instruction", "layer", "head"])
    groups = by_instruction(table)
    layers = sorted(set(table["layer"]))
    heads = [*range(int(table["head"].max()) + 1)] if table["head"].notna().any() else []
    whole = bool(table["head"].isna().any())
    fig, cells = small_multiples(
        [instruction_label(name) for name in groups], columns=columns, panels=(_height(layers),), legend=True
    )
    largest = _largest(table["gain"])
    for (name, rows), (cell,) in zip(groups.items(), cells, strict=True):
        rows = rows.assign(hover=[_profile_hover(name, row) for row in rows.to_dict("records")])
        if heads:
            _draw_profile(fig, cell, rows, layers, heads, whole=whole)
        else:
            _draw_bars(fig, cell, rows, layers, largest)
        _style_layers(fig, cell, layers)
    scale = {"cmin": -largest, "cmid": 0, "cmax": largest, "colorscale": "RdBu_r"}
    fig.update_layout(coloraxis={**scale, "showscale": bool(heads)})
    show_each_name_once(fig)
    if heads:
        bar = _bar_below("gain in following (points)", 0.5, 0.7, ticks=_points(largest, 2))
        fig.update_layout(coloraxis_colorbar=bar)
        _make_room_below(fig)
        if table["gain"].notna().sum() < len(groups) * len(layers) * (len(heads) + whole):
            fig.update_layout(plot_bgcolor=MISSING_CELL)
    fewest = int(table["n"].min())
    note = f"one prompt is worth {100 / fewest:.2g} points ({fewest} prompts)" if fewest else ""
    what = "each head" if heads else "each layer"
    heading = with_subtitle(title or f"What steering {what} alone gains in following", note)
    # Of the line below the title.
    return fig.update_layout(title=heading, margin_t=fig.layout.margin.t + 16, height=fig.layout.height + 16)


# --- mass -----------------------------------------------------------------------------------------------------------


def _by_condition(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each condition in the table's order, checked."""
    require_table(table, _MASS, what="the table of attention masses")
    require_once(table, ["condition", "layer", "head"])
    outside = table["mass"][(table["mass"] < -1e-6) | (table["mass"] > 1 + 1e-6)]
    if len(outside):
        raise DataError(f"mass must be a share in [0, 1], got {outside.iloc[0]:.3g}; average attention after softmax")
    return {str(name): rows for name, rows in table.groupby("condition", sort=False)}


def _mass_hovers(rows: pd.DataFrame) -> _Texts:
    return {
        (row["layer"], row["head"]): f"{_line(str(row['condition']))}: <b>{_share(row['mass'])}</b>{_interval(row)}"
        for row in rows.to_dict("records")
    }


def _share(value: float) -> str:
    return MISSING if math.isnan(value) else f"{100 * value:.3g}\u00a0%"


def _interval(row: Mapping[Any, Any]) -> str:
    if "low" not in row or math.isnan(row["low"]):
        return ""
    return f" [{100 * row['low']:.3g}, {100 * row['high']:.3g}]"


def _change_hovers(first: _Texts, second: _Texts, change: pd.DataFrame) -> _Texts:
    texts = {}
    for layer, row in change.iterrows():
        for head, value in row.dropna().items():
            both = [first[layer, head], second[layer, head]]
            texts[layer, head] = "<br>".join([f"<b>{100 * value:+.3g} points</b>", *both])
    return texts


def _draw_heads(fig: go.Figure, name: str, heads: pd.DataFrame, color: str, symbol: str, *, aside: float) -> None:
    """The mean over heads as a line, their range as a band."""
    area = band(heads.index, heads["low"], heads["high"], color, name=f"{name}, all heads", showlegend=False)
    texts = []
    for layer, row in heads.iterrows():
        ends = f"{row['n']:.0f} heads from {_share(row['low'])} to {_share(row['high'])}"
        texts.append(f"{name}, layer {layer}: <b>{_share(row['mean'])}</b><br>{ends}")
    line = go.Scatter(
        x=heads.index + aside,
        y=heads["mean"],
        error_y=whiskers(heads["mean"], heads["low"], heads["high"], visible=len(heads) == 1),
        mode="lines+markers",
        line={"color": color, "width": 2},
        marker={"size": 6, "symbol": symbol},
        name=name,
        customdata=texts,
        hovertemplate="%{customdata}<extra></extra>",
    )
    fig.add_traces([area.update(legendgroup=name), line.update(legendgroup=name)])


# --- profiles -------------------------------------------------------------------------------------------------------


def _draw_profile(
    fig: go.Figure, cell: Cell, rows: pd.DataFrame, layers: list[Any], heads: list[int], *, whole: bool
) -> None:
    """The gain of each head, of whole layers beside them, and an outline about what was chosen."""
    beside = len(heads) + 0.5  # a column of its own, half a cell from the heads
    placed = rows.assign(head=rows["head"].astype(float).fillna(beside))
    texts = {(row["layer"], row["head"]): row["hover"] for row in placed.to_dict("records")}
    # Two maps, since one with an uneven step would draw its last cells wider.
    for columns in ([*map(float, heads)], [beside] * whole):
        if columns:
            fig.add_trace(_map(_grid(placed, "gain", layers, columns), texts, "coloraxis", where=False), **cell.place)
    chosen = placed[placed["chosen"].astype(bool)]
    fig.add_trace(
        _outlines([(row["head"], layers.index(row["layer"])) for row in chosen.to_dict("records")]), **cell.place
    )
    _style_heads(fig, cell, heads, beside=beside if whole else None)


def _draw_bars(fig: go.Figure, cell: Cell, rows: pd.DataFrame, layers: list[Any], largest: float) -> None:
    """The gain of each layer as a bar, with a thick edge where it was chosen."""
    chosen = rows["chosen"].astype(bool)
    bars = go.Bar(
        x=rows["gain"],
        y=[layers.index(layer) for layer in rows["layer"]],
        orientation="h",
        marker={
            "color": rows["gain"],
            "coloraxis": "coloraxis",
            "line": {"color": INK, "width": [2 * one for one in chosen]},
        },
        customdata=rows["hover"],
        hovertemplate="%{customdata}<extra></extra>",
        name="bars",
        showlegend=False,
    )
    fig.add_trace(bars, **cell.place)
    fig.add_trace(_outlines([]), **cell.place)  # for the legend
    look = {"range": [-1.08 * largest, 1.08 * largest], "zerolinecolor": MUTED, **_points(largest, 1)}
    fig.update_xaxes(**look, title_text="gain (points)" if cell.last else None, **cell.place)


def _outlines(cells: Sequence[tuple[Any, Any]]) -> go.Scatter:
    """A rectangle about each cell, as a single line."""
    xs: list[float | None] = [None]
    ys: list[float | None] = [None]
    for across, up in cells:
        xs += [across - 0.5, across + 0.5, across + 0.5, across - 0.5, across - 0.5, None]
        ys += [up - 0.5, up - 0.5, up + 0.5, up + 0.5, up - 0.5, None]
    return go.Scatter(
        x=xs, y=ys, mode="lines", line={"color": INK, "width": 2}, name="chosen", hoverinfo="skip", cliponaxis=False
    )


def _profile_hover(name: str, row: Mapping[Any, Any]) -> str:
    where = f"layer {row['layer']}" + ("" if pd.isna(row["head"]) else f", head {int(row['head'])}")
    chosen = ", chosen" if row["chosen"] else ""
    return (
        f"{shown_name(instruction_label(name))}<br>{where}: <b>{100 * row['gain']:+.0f} points</b><br>"
        f"{percent(row['rate'])}, without steering {percent(row['baseline'])}, {row['n']} prompts<br>"
        f"rank {row['rank']}{chosen}"
    )


# --- maps of layer by head ------------------------------------------------------------------------------------------


def _largest(values: "pd.Series[Any] | pd.DataFrame") -> float:
    """The largest size, for a scale, which needs one above zero."""
    sizes = np.abs(values.to_numpy(float))
    return float(sizes[np.isfinite(sizes)].max(initial=0.0)) or 1.0


def _points(largest: float, steps: int) -> dict[str, list[Any]]:
    """Ticks at zero and at so many steps to either side, in points with their sign."""
    values = [largest * step / steps for step in range(-steps, steps + 1)]
    return {"tickvals": values, "ticktext": [f"{100 * value:+.2g}" if value else "0" for value in values]}


def _line(name: str) -> str:
    """A name of a condition on one line."""
    return shown_name(name, 40)


def _height(layers: list[Any]) -> int:
    """Of a panel, in pixels."""
    return min(420, 13 * len(layers) + 70)


def _grid(rows: pd.DataFrame, values: str, layers: list[Any], columns: list[Any]) -> pd.DataFrame:
    """A column by layer and head, empty where there is no row."""
    return rows.pivot(index="layer", columns="head", values=values).reindex(index=layers, columns=columns)


def _map(values: pd.DataFrame, texts: _Texts, colors: str, *, where: bool = True) -> go.Heatmap:
    """Cells by layer and head with their hover texts, which `where` begins with both."""
    hovers = [
        [f"layer {layer}, head {head}<br>" * where + texts.get((layer, head), MISSING) for head in values.columns]
        for layer in values.index
    ]
    return go.Heatmap(
        z=values.to_numpy(float),
        x=[*values.columns],
        y=[*range(len(values))],
        customdata=hovers,
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        coloraxis=colors,
        name="cells",
        showlegend=False,
        xgap=1,
        ygap=1,
    )


def _style_layers(fig: go.Figure, cell: Cell, layers: list[Any]) -> None:
    """Layers by their place, so that those with gaps between them have cells of one height."""
    first, step = cell.col == 1, math.ceil(len(layers) / 16)
    ticks = {"tickvals": [*range(0, len(layers), step)], "ticktext": [str(layer) for layer in layers[::step]]}
    look = {"range": [-0.5, len(layers) - 0.5], "showticklabels": first, "tickfont_size": 10, "ticks": ""}
    fig.update_yaxes(
        **ticks, **look, title_text="layer" if first else None, showgrid=False, zeroline=False, **cell.place
    )


def _style_heads(fig: go.Figure, cell: Cell, heads: Sequence[int], *, beside: float | None = None) -> None:
    step = math.ceil(len(heads) / 8)
    ticks = {float(head): str(head) for head in heads[::step]} | ({} if beside is None else {beside: _WHOLE})
    fig.update_xaxes(
        tickvals=[*ticks],
        ticktext=[*ticks.values()],
        range=[-0.5, (len(heads) - 1 if beside is None else beside) + 0.5],
        tickfont_size=10,
        tickangle=0,
        showgrid=False,
        zeroline=False,
        title_text="head" if cell.last else None,
        **cell.place,
    )


def _make_room_below(fig: go.Figure) -> None:
    """Room for bars of colours below the panels, and the bars moved there, whose place plotly counts in heights of the panels."""
    inner = fig.layout.height - fig.layout.margin.t - fig.layout.margin.b
    fig.update_layout(height=fig.layout.height + _BAR, margin_b=fig.layout.margin.b + _BAR)
    for axis in fig.select_coloraxes():
        axis.colorbar.y = -46 / inner


def _bar_below(unit: str, x: float, length: float, ticks: Mapping[str, Any]) -> dict[str, Any]:
    """A bar of colours that lies below the panels, with its unit above it."""
    bar = colorbar(unit)
    lying = {"orientation": "h", "x": x, "xanchor": "center", "len": length, "yanchor": "top", "ypad": 0}
    return {**bar, **lying, "title": {**bar["title"], "side": "top"}, **ticks}
