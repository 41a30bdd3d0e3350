"""Studies of layers: where a vector steers, and what its ablation loses.

    steering_by_layer     rate against layer, a panel per instruction and mode
    necessity_by_layer    the rate that an ablation loses, against layer, a panel per instruction and window

The direction is coloured, its random controls are grey, and below each curve stands the share of degenerate texts of the same
responses: where it is high, a rate or a loss says little about the direction.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from steerlens.errors import DataError
from steerlens.figures.cells import count_text
from steerlens.figures.layers import layer_span
from steerlens.figures.marks import band, whiskers
from steerlens.figures.multiples import (
    Cell,
    chosen_instructions,
    instruction_label,
    require_table,
    show_each_name_once,
    small_multiples,
)
from steerlens.figures.theme import CONDITION_COLORS, INK, MUTED, PERCENT_TICKS, rate_text
from steerlens.figures.words import shown_name
from steerlens.stats.rates import RATE_COLUMNS

MODE_WORDS = {"alone": "at one layer", "from": "from a layer on", "without": "at all layers but one"}


@dataclass(frozen=True)
class _Series:
    """A condition as a line."""

    condition: str
    name: str
    color: str
    dash: str = "solid"
    symbol: str = "circle"


_STEERED = (
    _Series("vector", "vector", CONDITION_COLORS["vector"]),
    _Series("random", "random", CONDITION_COLORS["random"], symbol="diamond"),
)
_ABLATED = (
    _Series("text+vector", "ablated", CONDITION_COLORS["text+vector"]),
    _Series("random", "random push", CONDITION_COLORS["random"], symbol="diamond"),
    _Series("random ablated", "random ablated", "#5B6068", dash="dot", symbol="square-open"),
)


def steering_by_layer(
    table: pd.DataFrame, *, instructions: str | Sequence[str] | None = None, title: str | None = None
) -> go.Figure:
    """Rate against the steered layer beside its random control, the unsteered and the instructed rate, with degenerate texts.

    Args:
        table: of `steer_by_layer`: instruction, mode, layer, condition, n, followed, rate, low, high, degenerate.
        instructions: which are drawn, one or several; default: all of the table's.
        title: what the figure is about; a phrase by default.

    Returns:
        A figure with a row of panels per instruction, one for each mode.

    Raises:
        DataError: a missing column, no row, or an instruction that the table does not hold.

    Example:
        >>> from steerlens.study import steer_by_layer
        >>> found = steer_by_layer(model, vector, valid[:2], layers=[3, 4], max_new_tokens=4)
        >>> [note.text for note in steering_by_layer(found.table).layout.annotations][0]
        '<b>english lowercase<br>at one layer</b>'
    """
    fig, panels = _panels(table, "mode", instructions, MODE_WORDS, value="rate")
    for panel in panels:
        _draw_series(fig, panel, _STEERED, ("rate", "low", "high"))
        references = [
            ("none", "no steering", MUTED, "dash"),
            ("text", "instruction as text", CONDITION_COLORS["text"], "dot"),
        ]
        for condition, name, color, dash in references:
            for record in panel.references[panel.references["condition"] == condition].to_dict("records"):
                _level(fig, panel, record["rate"], name, color, dash, f"{rate_text(record)}<br>{count_text(record)}")
        first = panel.top.col == 1
        ticks = {**PERCENT_TICKS, "range": [-0.03, 1.03], "showticklabels": first}
        fig.update_yaxes(**ticks, title_text="follow (%)" if first else None, **panel.top.place)
    show_each_name_once(fig)
    return fig.update_layout(title_text=title or "Where the vector steers, layer by layer")


def necessity_by_layer(
    table: pd.DataFrame, *, instructions: str | Sequence[str] | None = None, title: str | None = None
) -> go.Figure:
    """The following that is lost against the ablated layer, beside two random controls, with degenerate texts.

    The dashed line is the whole effect of the instruction, all that there is to lose: the rate with it in the prompt minus the
    rate without. A random push is as large as the ablation's, along a random direction; the third line ablates a random one.

    Args:
        table: of `necessity`: instruction, window, layer, condition, n, followed, rate, low, high, loss, loss_low, loss_high,
            degenerate.
        instructions: which are drawn, one or several; default: all of the table's.
        title: what the figure is about; a phrase by default.

    Returns:
        A figure with a row of panels per instruction, one for each window.

    Raises:
        DataError: a missing column, no row, or an instruction that the table does not hold.

    Example:
        >>> from steerlens.study import necessity
        >>> found = necessity(model, vector, valid[:2], windows=[1], layers=[3, 4], max_new_tokens=4)
        >>> necessity_by_layer(found.table).layout.yaxis.title.text
        'lost (points)'
    """
    windows: list[str] = [*table["window"].dropna().unique()] if "window" in table else []
    words = {name: f"{name} layer{'s' * (name != '1')} ablated" for name in windows} | {"all": "all layers ablated"}
    fig, panels = _panels(table, "window", instructions, words, value="loss")
    low, high = _loss_range(panels)
    for panel in panels:
        _draw_series(fig, panel, _ABLATED, ("loss", "loss_low", "loss_high"))
        if panel.given is not None:
            hover = f"{100 * panel.given:.0f} points"
            _level(fig, panel, panel.given, "whole effect", MUTED, "dash", hover)
        first = panel.top.col == 1
        values = [-1.0, -0.5, 0.0, 0.5, 1.0]
        ticks = {"tickvals": values, "ticktext": [f"{100 * value:.0f}" for value in values], "range": [low, high]}
        look = {"showticklabels": first, "zerolinecolor": INK, "zerolinewidth": 1}
        fig.update_yaxes(**ticks, **look, title_text="lost (points)" if first else None, **panel.top.place)
    show_each_name_once(fig)
    return fig.update_layout(title_text=title or "How much following the direction's ablation loses")


@dataclass(frozen=True)
class _Panel:
    """One instruction in one mode or window: its curves above, its degenerate texts below."""

    label: str
    rows: pd.DataFrame
    references: pd.DataFrame
    top: Cell
    bottom: Cell
    span: list[float]

    @property
    def everywhere(self) -> bool:
        """Whether it has no layers to tell apart, since all are ablated at once."""
        return bool(self.rows["layer"].isna().all())

    @property
    def given(self) -> float | None:
        """The rate with the instruction's text minus the rate without."""
        rates = {record["condition"]: record["rate"] for record in self.references.to_dict("records")}
        return rates["text"] - rates["none"] if {"text", "none"} <= set(rates) else None


def _panels(
    table: pd.DataFrame,
    column: str,
    instructions: str | Sequence[str] | None,
    kind_words: Mapping[str, str],
    *,
    value: str,
) -> tuple[go.Figure, list[_Panel]]:
    """A figure with a panel per instruction and value of a column, in the table's order, and what belongs into each."""
    needed = ["instruction", column, "layer", "condition", *RATE_COLUMNS, value, "degenerate"]
    require_table(table, needed, what=f"the {'steering' if column == 'mode' else 'necessity'} table")
    groups = chosen_instructions(table, instructions)
    kinds = [str(name) for name in table[column].dropna().unique()]
    if not kinds:
        raise DataError(f"the table must have rows with a {column}, got none; draw the table of a finished study")
    names = [f"{instruction_label(name)}\n{kind_words[kind]}" for name in groups for kind in kinds]
    fig, cells = small_multiples(names, columns=len(kinds), panels=(140, 34), legend=True)
    span, panels = layer_span(table), []
    places = iter(zip(names, cells, strict=True))
    for rows in groups.values():
        references = rows[rows["condition"].isin(["none", "text"])]
        for kind in kinds:
            label, (top, bottom) = next(places)
            panel = _Panel(
                shown_name(label.replace("\n", ", ")), rows[rows[column] == kind], references, top, bottom, span
            )
            _style_axes(fig, panel)
            panels.append(panel)
    return fig, panels


def _style_axes(fig: go.Figure, panel: _Panel) -> None:
    look = {"range": panel.span, "showgrid": False, "zeroline": False}
    if panel.everywhere:
        look |= {"range": [-1.5, 1.5], "tickvals": [0], "ticktext": ["all"]}
    fig.update_xaxes(**look, **panel.top.place)
    fig.update_xaxes(**look, title_text="layer" if panel.bottom.last else None, **panel.bottom.place)
    first = panel.bottom.col == 1
    ticks = {**PERCENT_TICKS, "tickvals": [0, 1], "range": [-0.03, 1.03], "showticklabels": first}
    fig.update_yaxes(**ticks, title_text="degen.<br>(%)" if first else None, **panel.bottom.place)


def _draw_series(fig: go.Figure, panel: _Panel, series: Iterable[_Series], columns: tuple[str, str, str]) -> None:
    """A line with its interval for each condition, and its degenerate texts as bars below."""
    present = [one for one in series if (panel.rows["condition"] == one.condition).any()]
    for place, one in enumerate(present):
        rows = panel.rows[panel.rows["condition"] == one.condition].sort_values("layer")
        # Points without a line stand side by side, with whiskers where a band would have no width.
        aside = (place - (len(present) - 1) / 2) * (0.5 if panel.everywhere else 0.12) if len(rows) == 1 else 0.0
        x = [(0.0 if pd.isna(layer) else float(layer)) + aside for layer in rows["layer"]]
        middle, low, high = (rows[column].tolist() for column in columns)
        if len(rows) > 1:
            fig.add_trace(band(x, low, high, one.color), **panel.top.place)
        fig.add_trace(
            _line(x, middle, low, high, one, _hover(panel, one, rows), alone=len(rows) == 1), **panel.top.place
        )
        where = ["all layers" if pd.isna(layer) else f"layer {layer}" for layer in rows["layer"]]
        bars = go.Bar(
            x=[round(at - aside) for at in x],
            y=rows["degenerate"],
            marker_color=one.color,
            name=one.name,
            showlegend=False,
            customdata=where,
            hovertemplate=f"{panel.label}<br>%{{customdata}}, {one.name}: %{{y:.0%}} degenerate<extra></extra>",
        )
        fig.add_trace(bars, **panel.bottom.place)


def _line(
    x: Sequence[float],
    middle: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    series: _Series,
    hover: Sequence[str],
    *,
    alone: bool,
) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=middle,
        error_y=whiskers(middle, low, high, thickness=1, visible=alone),
        mode="lines+markers",
        line={"color": series.color, "width": 2, "dash": series.dash},
        marker={"size": 6, "symbol": series.symbol},
        name=series.name,
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
    )


def _hover(panel: _Panel, series: _Series, rows: pd.DataFrame) -> list[str]:
    found = []
    for record in rows.to_dict("records"):
        where = "all layers" if pd.isna(record["layer"]) else f"layer {record['layer']}"
        lost = ""
        if "loss" in record:
            ends = f"[{100 * record['loss_low']:.0f}, {100 * record['loss_high']:.0f}]"
            lost = f"<br>lost: {100 * record['loss']:.0f} points {ends}"
        found.append(
            f"{panel.label}<br>{where}, {series.name}: <b>{rate_text(record)}</b><br>{count_text(record)}{lost}"
        )
    return found


def _level(fig: go.Figure, panel: _Panel, value: float, name: str, color: str, dash: str, hover: str) -> None:
    """A horizontal line through a panel."""
    line = go.Scatter(
        x=[-1.5, 1.5] if panel.everywhere else panel.span,
        y=[value, value],
        mode="lines",
        line={"color": color, "width": 1.5, "dash": dash},
        name=name,
        hovertemplate=f"{panel.label}<br>{name}: {hover}<extra></extra>",
    )
    fig.add_trace(line, **panel.top.place)


def _loss_range(panels: Sequence[_Panel]) -> list[float]:
    """From the lowest to the highest interval of all panels, zero and what the text gives among them."""
    ends = [0.0, *(panel.given or 0.0 for panel in panels)]
    for panel in panels:
        ends += [*panel.rows["loss_low"].dropna(), *panel.rows["loss_high"].dropna()]
    return [min(ends) - 0.05, max(ends) + 0.05]
