"""The cells of an evaluation, as bars with their intervals, one panel per instruction."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from steerlens.errors import DataError, nearest
from steerlens.figures.marks import whiskers
from steerlens.figures.multiples import Cell, by_instruction, instruction_label, require_table, small_multiples
from steerlens.figures.theme import CONDITION_COLORS, INK, PERCENT_TICKS, percent, rate_text
from steerlens.figures.words import shown_name
from steerlens.stats.rates import RATE_COLUMNS


def four_cells(table: pd.DataFrame, *, title: str | None = None, columns: int = 3) -> go.Figure:
    """Bars of the rate per condition with intervals; a panel per instruction if the table has that column.

    Args:
        table: `rate_table(scores, by=["condition"])`, or by `["instruction", "condition"]`. Conditions are
            shown in the order of `CONDITION_COLORS`, instructions in the order of the table.
        title: what the figure is about; a phrase by default.
        columns: panels side by side. Three still leave room for the names on a narrow page.

    Returns:
        A figure with a bar, its interval and its rate in words for every row.

    Raises:
        DataError: a missing column, an unknown condition, an empty table, or two rows for one bar.

    Example:
        >>> from steerlens.stats import rate_table
        >>> [bar.y for bar in four_cells(rate_table(scores, by=["condition"])).select_traces("bar")]
        [('none',), ('vector',)]
    """
    faceted = "instruction" in table.columns
    keys = ["instruction", "condition"] if faceted else ["condition"]
    require_table(table, [*keys, *RATE_COLUMNS], what="the rate table")
    for name in table["condition"].unique():
        if name not in CONDITION_COLORS:
            known = nearest(str(name), CONDITION_COLORS)
            raise DataError(f"the rate table holds a condition that does not exist, {name!r}; {known}")
    if table.duplicated(keys).any():
        raise DataError(f"the rate table must have one row per {' and '.join(keys)}; group by these only")
    shown = [name for name in CONDITION_COLORS if name in set(table["condition"])]
    groups = by_instruction(table) if faceted else {"": table}
    height = (21 if faceted else 34) * len(shown) + 8
    labels = [instruction_label(name) if faceted else "" for name in groups]
    fig, cells = small_multiples(labels, columns=columns, panels=(height,))
    for label, rows, (cell,) in zip(labels, groups.values(), cells, strict=True):
        _draw_bars(fig, cell, rows, shown, label=shown_name(label))
    where = "on each instruction" if faceted else "overall"
    title = title or f"How often responses follow their instruction, {where}"
    return fig.update_layout(title_text=title, barmode="overlay")


def _draw_bars(fig: go.Figure, cell: Cell, rows: pd.DataFrame, shown: Sequence[str], *, label: str) -> None:
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
            error_x=whiskers([record["rate"]], [record["low"]], [record["high"]], color=INK),
            hovertemplate=f"{what}: {rate_text(record)}<br>{count_text(record)}<extra></extra>",
        )
        fig.add_trace(bar, **cell.place)
    in_words = go.Scatter(
        x=[1.03] * len(present),  # beyond 100 %
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
        range=[len(shown) - 0.5, -0.5],  # downwards, so that the first condition is on top
        showgrid=False,
        showticklabels=cell.col == 1,
        ticksuffix=" ",
        title_text=None if label else "condition",
        **cell.place,
    )
    room = 1.24 if label else 1.4
    title = "responses that follow (%)" if cell.last else None
    ticks = {**PERCENT_TICKS, "tickvals": [0, 0.5, 1]} if label else PERCENT_TICKS
    fig.update_xaxes(range=[0, room], title_text=title, **ticks, **cell.place)


def count_text(record: Mapping[Any, Any]) -> str:
    """A rate's counts in words."""
    return f"{record['followed']} of {record['n']} responses"
