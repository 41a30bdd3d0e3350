"""Where an activation matters, and who writes a direction: heat maps over layers.

    patching_map      layer by position, for each instruction, the control beside it
    attribution_map   layer by head, with the MLPs, the biases and the embedding beside the heads

Colours are centred on zero wherever values have signs. What the maps do not show: cells of a patching map do not add up, and a
part without a contribution of its own may still be what makes another part write.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlens.errors import DataError
from steerlens.figures.marks import colorbar
from steerlens.figures.multiples import by_instruction, require_table
from steerlens.figures.theme import MUTED, theme
from steerlens.figures.words import name_lines, shown

PATCHING = (
    *("instruction", "metric", "layer", "position", "token", "n", "value", "low", "high"),
    *("restored", "restored_low", "restored_high", "control", "control_restored", "plain", "instructed"),
)
ATTRIBUTION = (
    *("instruction", "layer", "component", "head", "n", "contribution", "low", "high", "random_mean", "random_std"),
)
UNITS = {"kl": "KL (nats)", "logit_difference": "logit difference", "followed": "share that follows"}
TITLES = {
    "kl": "Where patching restores the instructed run's next-token distribution",
    "logit_difference": "Where patching restores the instructed run's logit difference",
    "followed": "Where patching makes the text follow the instruction",
}
BESIDE = {"mlp": "MLP", "attention bias": "bias", "embedding": "embed"}
"""Parts that are no head, and their columns."""
BEYOND = 3.0
"""A part stands out where it is so many standard deviations from what random directions have, its interval clear of zero."""


def patching_map(table: pd.DataFrame, *, value: str = "restored", title: str | None = None) -> go.Figure:
    """Heat maps of layer by position: how much the instructed run's activation restores there, and the control's.

    Args:
        table: one row per instruction, layer and position, as `reading.patch` gives it.
        value: "restored", the way from the plain (0) to the instructed run (1), colours from -1 to 1; or "value", the metric.
        title: what the figure is about; a phrase by default.

    Returns:
        For each instruction the map, and beside it the map of another query's activations, where there is a control.

    Raises:
        DataError: a missing column, no row, or another value.

    Example:
        >>> found = sl.reading.patch(model, pairs[:2])
        >>> len(patching_map(found.table).data)
        2
    """
    require_table(table, PATCHING, what="the table of a patching map")
    if value not in ("restored", "value"):
        raise DataError(f'value must be "restored" or "value", got {value!r}')
    control = "control_restored" if value == "restored" else "control"
    sides = {value: "from the run with the instruction"}
    if table[control].notna().any():
        sides[control] = "control: from another query's run"
    groups, width = by_instruction(table), 72 // len(sides)
    titles = [
        "<br>".join([name_lines(name, width)] * (len(groups) > 1) + [side] * (row == 0))
        for row, name in enumerate(groups)
        for side in sides.values()
    ]
    few = table["position"].nunique() < 4
    fig = _panels(titles, columns=len(sides), height=13 * table["layer"].nunique() + 60, below=60 if few else 130)
    for row, group in enumerate(groups.values(), start=1):
        for col, side in enumerate(sides, start=1):
            fig.add_trace(_cells(group, side), row=row, col=col)
            _style_positions(fig, group, angle=0 if few else -90, last=row == len(groups), row=row, col=col)
    metric = str(table["metric"].iloc[0])
    unit = "restored" if value == "restored" else UNITS.get(metric, metric)
    fig.update_layout(
        coloraxis=_colors(table[[*sides]].to_numpy(float), unit, limit=1.0 if value == "restored" else None)
    )
    return fig.update_layout(
        title_text=title or TITLES.get(metric, f"Where patching restores the instructed run's {metric}")
    )


def attribution_map(table: pd.DataFrame, *, title: str | None = None, columns: int = 2) -> go.Figure:
    """Heat maps of what each head and MLP adds along a direction, with the instruction minus without.

    A dot marks parts that stand out: three standard deviations from what random directions have, with an interval clear of zero.
    Where few parts outdo all others by far, the colours end below them; the hover has the numbers.

    Args:
        table: one row per instruction and part, as `reading.attribute` gives it.
        title: what the figure is about; a phrase by default.
        columns: panels side by side.

    Returns:
        A panel per instruction: layers upwards, heads to the right, and the other parts beside them.

    Raises:
        DataError: a missing column, or no row.

    Example:
        >>> found = sl.reading.attribute(model, vector, pairs[:2], layer=2)
        >>> attribution_map(found.table).layout.coloraxis.cmid
        0
    """
    require_table(table, ATTRIBUTION, what="the table of an attribution")
    groups = by_instruction(table)
    columns = min(columns, len(groups))
    titles = [name_lines(name, 72 // columns) for name in groups] if len(groups) > 1 else [""]
    fig = _panels(titles, columns=columns, height=13 * table["layer"].nunique() + 60, below=52)
    for place, group in enumerate(groups.values()):
        row, col = place // columns + 1, place % columns + 1
        fig.add_trace(_parts(group), row=row, col=col)
        _style_parts(fig, group, last=place + columns >= len(groups), row=row, col=col)
    sizes = table["contribution"].abs().to_numpy(float)
    limit = max(float(np.quantile(sizes, 0.98)), sizes.max() / 4) or 1.0
    fig.update_layout(coloraxis=_colors(sizes, "with minus without (residual units)", limit=limit))
    layer = int(table["layer"].max())
    return fig.update_layout(
        title_text=title or f"Who writes the direction at layer {layer} (dots stand out from random ones)"
    )


# --- panels ---------------------------------------------------------------------------------------------------------


def _panels(titles: list[str], *, columns: int, height: int, below: int) -> go.Figure:
    """A grid of panels; with one row the figure fills the page, with several it grows with them.

    Args:
        height: Of a panel, in pixels.
        below: Room for labels and the next title, in pixels.
    """
    rows = -(-len(titles) // columns)
    top = 52 + 17 * (1 + max(title.count("<br>") for title in titles)) * any(titles)
    total = top + rows * height + (rows - 1) * below + 80
    fig = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=titles,
        horizontal_spacing=0.03 if columns > 1 else 0,
        vertical_spacing=below / (total - top - 80) if rows > 1 else 0,
    )
    fig.update_annotations(font_size=13, yshift=2)
    margin = {"l": 8, "r": 8, "t": top, "b": 34}
    return fig.update_layout(template=theme(), margin=margin, height=total if rows > 1 else None)


def _colors(values: np.ndarray, title: str, *, limit: float | None = None) -> dict[str, object]:
    """A colour axis for all panels: from blue over white at zero to red where values have signs, else from white to blue."""
    known = values[np.isfinite(values)]
    largest = float(np.abs(known).max(initial=0.0)) or 1.0
    bar = colorbar(title)
    if limit is None and (known >= 0).all():
        return {"cmin": 0, "cmax": largest, "colorscale": "Blues", "colorbar": bar}
    limit = largest if limit is None else limit
    return {"cmin": -limit, "cmid": 0, "cmax": limit, "colorscale": "RdBu_r", "colorbar": bar}


# --- layer by position ----------------------------------------------------------------------------------------------


def _cells(group: pd.DataFrame, value: str) -> go.Heatmap:
    grid = group.pivot(index="layer", columns="position", values=value)
    texts = pd.Series([_cell_text(row) for row in group.to_dict("records")], index=group.index)
    hover = group.assign(text=texts).pivot(index="layer", columns="position", values="text")
    return go.Heatmap(
        z=grid.to_numpy(float),
        x=[*range(grid.shape[1])],
        y=[*grid.index],
        text=hover.to_numpy(),
        hovertemplate="%{text}<extra></extra>",
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
    )


def _cell_text(row: Mapping[Any, Any]) -> str:
    lines = [
        f"layer {row['layer']}, position {row['position']}: {shown(str(row['token']))}",
        f"restored <b>{row['restored']:.2f}</b> [{row['restored_low']:.2f}, {row['restored_high']:.2f}]",
        f"{row['metric']} {row['value']:.3g} [{row['low']:.3g}, {row['high']:.3g}], {row['n']} pairs",
        f"plain {row['plain']:.3g}, instructed {row['instructed']:.3g}",
        f"control: restored {row['control_restored']:.2f}, {row['metric']} {row['control']:.3g}",
    ]
    return "<br>".join(lines)


def _style_positions(fig: go.Figure, group: pd.DataFrame, *, angle: int, last: bool, row: int, col: int) -> None:
    tokens = group.drop_duplicates("position").sort_values("position")
    labels = [
        f"{shown(token, 14)} {position}" for token, position in zip(tokens["token"], tokens["position"], strict=True)
    ]
    ticks = {"tickvals": [*range(len(labels))], "ticktext": labels, "tickfont_size": 10, "showgrid": False}
    fig.update_xaxes(
        **ticks,
        tickangle=angle,
        zeroline=False,
        title_text="token, counted from the end" if last else None,
        row=row,
        col=col,
    )
    _style_layers(fig, group["layer"].nunique(), row=row, col=col)


def _style_layers(fig: go.Figure, layers: int, *, row: int, col: int) -> None:
    first = col == 1
    options = {"title_text": "layer" if first else None, "showticklabels": first, "tickfont_size": 10}
    # As categories, layers with gaps between them have cells of one height, and each tick is a layer that was run.
    options |= {"type": "category", "dtick": math.ceil(layers / 16)}
    fig.update_yaxes(**options, showgrid=False, zeroline=False, ticks="", row=row, col=col)


# --- layer by part --------------------------------------------------------------------------------------------------


def _parts(group: pd.DataFrame) -> go.Heatmap:
    placed = group.assign(
        x=_places(group),
        y=group["layer"].fillna(group["layer"].min()),
        text=[_part_text(row) for row in group.to_dict("records")],
        mark=np.where(_stands_out(group), "•", ""),
    )
    width = int(placed["x"].max()) + 1
    grids = {
        name: placed.pivot(index="y", columns="x", values=name).reindex(columns=range(width))
        for name in ("contribution", "text", "mark")
    }
    return go.Heatmap(
        z=grids["contribution"].to_numpy(float),
        x=[*range(width)],
        y=[*grids["contribution"].index],
        text=grids["mark"].fillna("").to_numpy(),
        customdata=grids["text"].fillna("").to_numpy(),
        texttemplate="%{text}",
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
    )


def _places(group: pd.DataFrame) -> pd.Series:
    """The column of each part: its head, or, after the heads, that of its kind."""
    n_heads = int(group["head"].max()) + 1
    kinds = [kind for kind in BESIDE if (group["component"] == kind).any()]
    beside = group["component"].map({kind: n_heads + place for place, kind in enumerate(kinds)})
    return group["head"].astype("Float64").fillna(beside.astype("Float64")).astype(int)


def _stands_out(group: pd.DataFrame) -> pd.Series:
    far = (group["contribution"] - group["random_mean"]).abs() > BEYOND * group["random_std"]
    return far & ((group["low"] > 0) | (group["high"] < 0))


def _part_text(row: Mapping[Any, Any]) -> str:
    name = {"embedding": "embedding, before layer 0", "head": f"layer {row['layer']}, head {row['head']}"}.get(
        str(row["component"]), f"layer {row['layer']}, {row['component']}"
    )
    lines = [
        name,
        f"<b>{row['contribution']:.3g}</b> [{row['low']:.3g}, {row['high']:.3g}], {row['n']} pairs",
        f"random directions: {row['random_mean']:.2g} ± {row['random_std']:.2g}",
    ]
    return "<br>".join(lines)


def _style_parts(fig: go.Figure, group: pd.DataFrame, *, last: bool, row: int, col: int) -> None:
    n_heads = int(group["head"].max()) + 1
    step = max(1, n_heads // 8)
    others = {
        int(x): BESIDE[kind] for x, kind in zip(_places(group), group["component"], strict=True) if kind in BESIDE
    }
    ticks = dict(sorted({**{head: str(head) for head in range(0, n_heads, step)}, **others}.items()))
    fig.update_xaxes(
        tickvals=[*ticks],
        ticktext=[*ticks.values()],
        tickfont={"size": 10, "color": MUTED},
        showgrid=False,
        zeroline=False,
        title_text="head, and other parts" if last else None,
        row=row,
        col=col,
    )
    _style_layers(fig, group["layer"].nunique(), row=row, col=col)
    fig.add_vline(x=n_heads - 0.5, line={"width": 5, "color": "white"}, row=row, col=col)
