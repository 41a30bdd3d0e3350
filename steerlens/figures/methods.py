"""Methods of steering beside each other: following, quality and speed of each at every strength.

    method_comparison             rate and quality against strength, and the trade-offs of rate with quality and with speed
    instruction_strength_heatmap  rate by instruction and setting, a panel per method

Strengths of different methods have different units: a line says how its method goes, not that one is stronger than another. Of
many rows the luckiest stand on the Pareto front; their values are too good to be seen again on new prompts.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlens.figures.marks import colorbar, whiskers
from steerlens.figures.matrices import MISSING_CELL
from steerlens.figures.multiples import (
    Cell,
    instruction_label,
    require_once,
    require_table,
    show_each_name_once,
    small_multiples,
)
from steerlens.figures.theme import (
    CONDITION_COLORS,
    INK,
    MISSING,
    MUTED,
    faded,
    method_style,
    number_text,
    percent,
    rate_text,
    theme,
)
from steerlens.figures.words import shown_name

_COMPARED = (
    *("method", "setting", "strength", "rate", "rate_low", "rate_high"),
    *("quality", "quality_low", "quality_high", "tokens_per_second", "pareto"),
)
_BY_SETTING = ("instruction", "method", "setting", "rate", "n")
_SPREAD = 20
"""Strengths that differ by more than this factor have a logarithmic axis."""

_MOST_WRITTEN = 12
"""Up to this many settings a cell has its number written in it."""

_LEGEND = 520
"""Pixels of a narrow page that names of methods fill, since the legend begins at the panels and breaks between names."""

_PAGE, _SIGN, _LETTER = 680, 44, 6
"""Pixels: a narrow page, the sign of an entry in the legend of the front, and a letter of its name."""

_NAME, _TICK = 34, 18
"""Letters of a method and its setting, and of a setting below a column."""


def method_comparison(table: pd.DataFrame, *, quality: str = "quality", title: str | None = None) -> go.Figure:
    """Rate and quality against strength, and rate against quality and against speed, a colour and symbol per method.

    Args:
        table: one row per method and setting: method, setting, in words, strength, missing where a method has none, rate,
            rate_low, rate_high, quality, quality_low, quality_high, tokens_per_second, pareto, whether it is on the front.
        quality: what the quality is, with its unit, for the axes; more is better.
        title: what the figure is about; a phrase by default.

    Returns:
        Four panels. Methods without a strength are levels in the first two; the front is a line through numbered points, which a
        legend below names.

    Raises:
        DataError: a missing column, no row, or two rows of one method and setting.

    Example:
        >>> row = {"method": "PASTA", "setting": "alpha 10", "strength": 10.0, "rate": 0.5, "rate_low": 0.4, "rate_high": 0.6}
        >>> more = {"quality": 2.0, "quality_low": 1.9, "quality_high": 2.1, "tokens_per_second": 90.0, "pareto": True}
        >>> [trace.name for trace in method_comparison(pd.DataFrame([{**row, **more}])).data if trace.showlegend]
        ['PASTA', 'Pareto front', '1: PASTA, alpha 10']
    """
    require_table(table, _COMPARED, what="the comparison of methods")
    require_once(table, ["method", "setting"])
    table = table.assign(method=table["method"].astype(str), hover=[_hover(row) for row in table.to_dict("records")])
    styles = method_style(table["method"])
    groups = {str(key): rows for key, rows in table.groupby("method", sort=False)}
    strengths = table["strength"].dropna()
    log = bool(len(strengths)) and strengths.min() > 0 and bool(strengths.max() > _SPREAD * strengths.min())
    span = _span(strengths, log=log)
    timed = bool(table["tokens_per_second"].notna().any())
    below: list[dict[str, int] | None] = [{}, {}] if timed else [{"colspan": 2}, None]
    fig = make_subplots(rows=2, cols=2, specs=[[{}, {}], below], horizontal_spacing=0.13, vertical_spacing=0.16)
    for name, rows in groups.items():
        for col, value in enumerate(("rate", "quality"), 1):
            _draw_strengths(fig, name, rows, value, *styles[name], span=span, col=col)
    front = table[table["pareto"].astype(bool)].sort_values(["quality", "rate"])
    _draw_front(fig, front)
    for name, rows in groups.items():
        for col, value in enumerate(["quality"] + ["tokens_per_second"] * timed, 1):
            _draw_points(fig, name, rows, value, *styles[name], col=col)
    _style_comparison(fig, table, quality, span, log=log, timed=timed)
    show_each_name_once(fig, _LEGEND)
    _number_front(fig, front, {name: color for name, (color, _) in styles.items()})
    return fig.update_layout(title_text=title or "Following, quality and speed of each method")


def instruction_strength_heatmap(table: pd.DataFrame, *, title: str | None = None, columns: int = 2) -> go.Figure:
    """The rate by instruction and setting: a panel per method, those with a single setting together in the first one.

    Args:
        table: one row per instruction, method and setting: rate, n; with a column strength, settings stand in its order.
        title: what the figure is about; a phrase by default.
        columns: panels side by side.

    Returns:
        A figure whose panels share the instructions and a scale from 0 to 1; grey where there is no row.

    Raises:
        DataError: a missing column, no row, or two rows of one instruction, method and setting.

    Example:
        >>> rows = {"instruction": "a:b", "method": "PASTA", "setting": ["alpha 5", "alpha 10"], "rate": [0.4, 0.5], "n": 12}
        >>> instruction_strength_heatmap(pd.DataFrame(rows)).layout.xaxis.ticktext
        ('alpha 5', 'alpha 10')
    """
    require_table(table, _BY_SETTING, what="the table of rates by setting")
    require_once(table, ["instruction", "method", "setting"])
    table = table.fillna({"setting": ""}).astype({"instruction": str, "method": str, "setting": str})
    instructions = [*dict.fromkeys(table["instruction"])]
    several = table.groupby("method")["setting"].transform("nunique") > 1
    # Methods of one setting are told apart by their own names, side by side.
    single = table[~several]
    panels = [("", single, single["method"])] if len(single) else []
    for name, rows in table[several].groupby("method", sort=False):
        ordered = rows.sort_values("strength", kind="stable") if "strength" in rows else rows
        panels.append((str(name), ordered, ordered["setting"]))
    heads = ["one setting each" if not name and len(panels) > 1 else name for name, _, _ in panels]
    longest = max(len(shown_name(name, _TICK)) for _, _, names in panels for name in names)
    # The second, empty panel of each block is room for the names of settings, which may be long.
    height, below = 22 * len(instructions) + 8, max(1, 6 * longest - 40)
    fig, cells = small_multiples(heads, columns=columns, panels=(height, below))
    for (name, rows, names), (cell, room) in zip(panels, cells, strict=True):
        for cover in _rates(rows.assign(column=names), instructions):
            fig.add_trace(cover, **cell.place)
        _style_settings(fig, cell, room, [*dict.fromkeys(names)], instructions, "setting" if name else "method")
    scale = [[0, "#FFFFFF"], [0.5, "#F2A66B"], [1, CONDITION_COLORS["vector"]]]
    length = {"len": min(240, fig.layout.height - 100), "lenmode": "pixels", "y": 1, "yanchor": "top"}
    bar = {**colorbar("follow (%)"), **length, "tickvals": [0, 0.25, 0.5, 0.75, 1], "tickformat": ".0%"}
    fig.update_layout(coloraxis={"cmin": 0, "cmax": 1, "colorscale": scale, "colorbar": bar}, margin_r=80)
    return fig.update_layout(title_text=title or "Following by instruction, method and setting")


# --- methods --------------------------------------------------------------------------------------------------------


def _span(strengths: "pd.Series[Any]", *, log: bool) -> list[float]:
    """From below the least strength to above the largest."""
    if strengths.empty:
        return [0.0, 1.0]
    low, high = float(strengths.min()), float(strengths.max())
    if log:
        room = (high / low) ** 0.06
        return [low / room, high * room]
    room = 0.06 * (high - low) or 0.5
    return [low - room, high + room]


def _draw_strengths(
    fig: go.Figure, name: str, rows: pd.DataFrame, value: str, color: str, symbol: str, *, span: list[float], col: int
) -> None:
    """A line over the strengths of a method; a level for each setting that has none."""
    swept = rows[rows["strength"].notna()].sort_values("strength")
    look = {"name": shown_name(name, _NAME), "marker": {"symbol": symbol, "size": 7, "color": color}}
    hover = {"hovertemplate": "%{customdata}<extra></extra>"}
    if len(swept):
        line = go.Scatter(
            x=swept["strength"],
            y=swept[value],
            error_y=whiskers(swept[value], swept[f"{value}_low"], swept[f"{value}_high"], color=faded(color, 0.5)),
            mode="lines+markers",
            line={"color": color, "width": 2},
            customdata=swept["hover"],
            **look,
            **hover,
        )
        fig.add_trace(line, row=1, col=col)
    for row in rows[rows["strength"].isna()].to_dict("records"):
        level = go.Scatter(
            x=span,
            y=[row[value]] * 2,
            mode="lines+markers",
            line={"color": color, "width": 1.5, "dash": "dash"},
            customdata=[row["hover"]] * 2,
            cliponaxis=False,
            **look,
            **hover,
        )
        fig.add_trace(level, row=1, col=col)


def _draw_points(
    fig: go.Figure, name: str, rows: pd.DataFrame, value: str, color: str, symbol: str, *, col: int
) -> None:
    """The rate of each setting against its quality or its speed."""
    soft = faded(color, 0.4)
    ends = {"error_y": whiskers(rows["rate"], rows["rate_low"], rows["rate_high"], width=0, color=soft)}
    if f"{value}_low" in rows:
        ends["error_x"] = whiskers(rows[value], rows[f"{value}_low"], rows[f"{value}_high"], width=0, color=soft)
    points = go.Scatter(
        x=rows[value],
        y=rows["rate"],
        mode="markers",
        marker={"symbol": symbol, "size": 9, "color": color, "line": {"color": "white", "width": 1}},
        name=shown_name(name, _NAME),
        customdata=rows["hover"],
        hovertemplate="%{customdata}<extra></extra>",
        **ends,
    )
    fig.add_trace(points, row=2, col=col)


def _draw_front(fig: go.Figure, front: pd.DataFrame) -> None:
    line = go.Scatter(
        x=front["quality"],
        y=front["rate"],
        mode="lines",
        line={"color": MUTED, "width": 1.5, "dash": "dot"},
        name="Pareto front",
        hoverinfo="skip",
    )
    fig.add_trace(line, row=2, col=1)


def _number_front(fig: go.Figure, front: pd.DataFrame, colors: Mapping[str, str]) -> None:
    """Numbers on the points of the front, which a second legend below the panels names: names beside them would overlap."""
    letters = 0
    for number, row in enumerate(front.to_dict("records"), 1):
        name = f"{number}: {_configuration(row)}"
        letters += _SIGN + _LETTER * len(name)
        point = go.Scatter(
            x=[row["quality"]],
            y=[row["rate"]],
            mode="markers+text",
            marker={"size": 17, "color": "white", "line": {"color": colors[row["method"]], "width": 2}},
            text=[str(number)],
            textfont={"size": 10, "color": INK},
            name=name,
            legend="legend2",
            legendgroup=name,
            showlegend=True,
            customdata=[row["hover"]],
            hovertemplate="%{customdata}<extra></extra>",
        )
        fig.add_trace(point, row=2, col=1)
    room = 24 * math.ceil(letters / _PAGE)
    below = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom", "font_size": 11}
    fig.update_layout(legend2=below, margin_b=fig.layout.margin.b + room, height=fig.layout.height + room)


def _style_comparison(
    fig: go.Figure, table: pd.DataFrame, quality: str, span: list[float], *, log: bool, timed: bool
) -> None:
    unit = "strength (each method's own unit)"
    ends: dict[str, Any] = {"range": [math.log10(end) if log else end for end in span]}
    ends |= {"type": "log"} if log else {}
    if table["strength"].isna().all():
        unit, ends = "no method has a strength", {**ends, "showticklabels": False}
    fig.update_xaxes(**ends, title_text=unit, showgrid=False, zeroline=False, row=1)
    highest = np.nanmax(table[["rate", "rate_high"]].to_numpy(float), initial=0.0) or 1.0
    rates = {"range": [-0.03 * highest, 1.05 * highest], "tickformat": ".0%", "zeroline": False}
    for row, col in [(1, 1), (2, 1)] + [(2, 2)] * timed:
        fig.update_yaxes(**rates, title_text="follow (%)" if col == 1 else None, row=row, col=col)
    shown = shown_name(quality, 30)
    fig.update_yaxes(title_text=shown, zeroline=False, row=1, col=2)
    fig.update_xaxes(title_text=shown, zeroline=False, row=2, col=1)
    if timed:
        fig.update_xaxes(title_text="tokens per second", zeroline=False, row=2, col=2)
    margin = {"l": 8, "r": 8, "t": 84, "b": 48}
    fig.update_layout(template=theme(), height=720, margin=margin, showlegend=True)


def _configuration(row: Mapping[Any, Any]) -> str:
    """A method with its setting, where that says more."""
    setting = "" if pd.isna(row["setting"]) or row["setting"] == row["method"] else str(row["setting"])
    return shown_name(f"{row['method']}, {setting}" if setting else str(row["method"]), _NAME)


def _hover(row: Mapping[Any, Any]) -> str:
    speed = MISSING if math.isnan(row["tokens_per_second"]) else f"{row['tokens_per_second']:.3g} tokens per second"
    lines = [
        f"<b>{_configuration(row)}</b>",
        f"follow: {rate_text({'rate': row['rate'], 'low': row['rate_low'], 'high': row['rate_high']})}",
        f"quality: {number_text({'value': row['quality'], 'low': row['quality_low'], 'high': row['quality_high']})}",
        speed,
    ]
    return "<br>".join(lines + ["on the Pareto front"] * bool(row["pareto"]))


# --- instructions ---------------------------------------------------------------------------------------------------


def _rates(rows: pd.DataFrame, instructions: list[str]) -> list[go.Heatmap]:
    """The rate by instruction, downwards, and column, and grey cells where there is none, which is no zero."""
    columns = [*dict.fromkeys(rows["column"])]
    records = {(row["instruction"], row["column"]): row for row in rows.to_dict("records")}
    cells = [[records.get((name, column)) for column in columns] for name in instructions]
    rates = np.array([[math.nan if cell is None else cell["rate"] for cell in line] for line in cells])
    written = len(columns) <= _MOST_WRITTEN
    places = {"x": [*range(len(columns))], "y": [*range(len(instructions))], "xgap": 1, "ygap": 1}
    shown = go.Heatmap(
        **places,
        z=rates,
        text=[[f"{100 * rate:.0f}" if written and rate == rate else "" for rate in line] for line in rates],
        texttemplate="%{text}",
        textfont={"size": 10, "color": INK},
        customdata=[["" if cell is None else _cell_hover(cell) for cell in line] for line in cells],
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        coloraxis="coloraxis",
    )
    empty = np.where(np.isnan(rates), 1.0, math.nan)
    grey = [[0, MISSING_CELL], [1, MISSING_CELL]]
    return [
        shown,
        *(
            [go.Heatmap(**places, z=empty, colorscale=grey, showscale=False, hoverinfo="skip")]
            * bool(np.isnan(rates).any())
        ),
    ]


def _cell_hover(cell: Mapping[Any, Any]) -> str:
    return (
        f"{shown_name(instruction_label(cell['instruction']))}<br>{_configuration(cell)}: <b>{percent(cell['rate'])}</b><br>"
        f"{cell['n']} responses"
    )


def _style_settings(
    fig: go.Figure, cell: Cell, below: Cell, columns: list[str], instructions: list[str], unit: str
) -> None:
    look = {"showgrid": False, "zeroline": False, "ticks": "", "tickfont_size": 10}
    ticks = {"tickvals": [*range(len(columns))], "ticktext": [shown_name(name, _TICK) for name in columns]}
    angle = -90 if len(columns) > 6 else -45
    fig.update_xaxes(
        **ticks, **look, tickangle=angle, showticklabels=True, title_text=unit if below.last else None, **cell.place
    )
    names = [f"{shown_name(instruction_label(name), 28)} " for name in instructions]
    rows = {"tickvals": [*range(len(instructions))], "ticktext": names, "autorange": "reversed"}
    fig.update_yaxes(**rows, **look, showticklabels=cell.col == 1, **cell.place)
    fig.update_xaxes(visible=False, **below.place).update_yaxes(visible=False, **below.place)
