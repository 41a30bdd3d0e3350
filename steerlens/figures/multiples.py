"""Small multiples: one panel per instruction, in a grid that stays readable on a narrow page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlens.errors import DataError, nearest
from steerlens.figures.theme import FOOTER, GAP, LINE, short_label, theme
from steerlens.figures.words import name_lines
from steerlens.stats.rates import require_columns


@dataclass(frozen=True)
class Cell:
    """One panel of a grid of small multiples."""

    row: int
    col: int
    last: bool
    """Nothing stands below it, so that it carries the title of the x axis."""

    @property
    def place(self) -> dict[str, int]:
        return {"row": self.row, "col": self.col}


_PAGE, _SIGN, _LETTER, _LEGEND_LINE = 680, 48, 7, 21
"""Pixels: a narrow page, the sign of a legend's entry, a letter of its name, and a line of the legend."""

_NAME_WIDTH, _ROW_WIDTH = 22, 72  # characters: of a name, and what a narrow page holds side by side


def small_multiples(
    instructions: Sequence[str], *, columns: int, panels: tuple[int, ...], legend: bool = False
) -> tuple[go.Figure, list[list[Cell]]]:
    """An empty grid, a block per instruction; a block stacks `panels` (heights in pixels) over one x axis.

    What stands after a line break in a name is a line of its own above its panel.

    `make_subplots` knows only fractions and a single spacing, so panels are placed here, in pixels from the
    top: the figure grows with the number of instructions while its panels keep their size.
    """
    columns = min(columns, len(instructions))
    blocks, depth = math.ceil(len(instructions) / columns), len(panels)
    width = min(_NAME_WIDTH, _ROW_WIDTH // columns)
    names = [name_lines(name, width) for name in instructions]
    tops, total = [], 0
    for block in range(blocks):
        tallest = max((name.count("<br>") + 1) * bool(name) for name in names[block * columns :][:columns])
        tops.append(total + 12 + LINE * tallest)
        total = tops[-1] + sum(panels) + GAP * (depth - 1) + FOOTER
    filled = [[block * columns + col < len(instructions) for col in range(columns)] for block in range(blocks)]
    fig = make_subplots(
        rows=blocks * depth,
        cols=columns,
        horizontal_spacing=0.035 if columns > 1 else 0,
        vertical_spacing=0,
        specs=[[{} if there else None for there in filled[row // depth]] for row in range(blocks * depth)],
    )
    cells: list[list[Cell]] = []
    for index, name in enumerate(names):
        block, col = divmod(index, columns)
        top = tops[block]
        stack = []
        for level, height in enumerate(panels):
            lowest = level == depth - 1
            cell = Cell(block * depth + level + 1, col + 1, last=lowest and index + columns >= len(instructions))
            axes = fig.get_subplot(**cell.place)
            # Rounding must not take the last panel below zero, which plotly refuses.
            axes.yaxis.domain = [max(0.0, 1 - (top + height) / total), 1 - top / total]
            axes.xaxis.showticklabels = lowest
            if level == 0 and name:
                _write_above(fig, axes, name)
            stack.append(cell)
            top += height + GAP
        cells.append(stack)
    margin = {"l": 8, "r": 8, "t": 84 if legend else 52, "b": 34}
    layout = {"height": total + margin["t"] + margin["b"], "margin": margin, "showlegend": legend}
    return fig.update_layout(template=theme(), **layout), cells


def _write_above(fig: go.Figure, axes: Any, text: str) -> None:
    corner = {"x": axes.xaxis.domain[0], "y": axes.yaxis.domain[1], "xref": "paper", "yref": "paper"}
    anchors = {"xanchor": "left", "yanchor": "bottom", "align": "left", "yshift": 3, "showarrow": False}
    fig.add_annotation(text=f"<b>{text}</b>", font_size=13, **corner, **anchors)


def show_each_name_once(fig: go.Figure, page: int = _PAGE) -> None:
    """One legend entry per name; a click on it hides that name in every panel. Room for its lines on a narrow page is made.

    Args:
        page: its width in pixels.
    """
    seen: set[str] = set()
    for trace in fig.data:
        trace.update(legendgroup=trace.name, showlegend=trace.showlegend is not False and trace.name not in seen)
        seen.add(trace.name)
    lines = math.ceil(sum(_SIGN + _LETTER * len(trace.name) for trace in fig.data if trace.showlegend) / page)
    more = _LEGEND_LINE * max(0, lines - 1)
    fig.update_layout(margin_t=fig.layout.margin.t + more, height=fig.layout.height + more)


def by_instruction(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each instruction, in the table's order."""
    return {str(name): rows for name, rows in table.groupby("instruction", sort=False)}


def chosen_instructions(table: pd.DataFrame, instructions: str | Sequence[str] | None) -> dict[str, pd.DataFrame]:
    """The rows of each instruction that is drawn: one, several, or for None all of the table's.

    Raises:
        DataError: for one that the table does not hold.
    """
    groups = by_instruction(table)
    wanted = [*groups] if instructions is None else [instructions] if isinstance(instructions, str) else instructions
    for name in wanted:
        if name not in groups:
            raise DataError(f"instructions must be in the table, got {name!r}; {nearest(str(name), groups)}")
    return {name: groups[name] for name in wanted}


def instruction_label(instruction: str) -> str:
    """What stands above the panel of an instruction, or of all of them together."""
    return "all instructions" if instruction == "all" else short_label(instruction)


def require_table(table: pd.DataFrame, columns: Sequence[str], *, what: str) -> None:
    """Refuse a table without rows, or without one of the columns.

    Raises:
        DataError: saying which.
    """
    require_columns(table, columns, what=what)
    if table.empty:
        raise DataError(f"{what} must have at least one row, got none")


def require_once(table: pd.DataFrame, keys: Sequence[str]) -> None:
    """Refuse a table with two rows of the same keys.

    Raises:
        DataError: saying which.
    """
    twice = table[table.duplicated([*keys])]
    if len(twice):
        found = ", ".join(f"{key} {twice.iloc[0][key]}" for key in keys)
        raise DataError(f"the table must have one row per {', '.join(keys)}, got several of {found}")
