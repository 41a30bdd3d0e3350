"""Matrices between vectors, or between layers, as heat maps."""

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from steerlens.errors import DataError
from steerlens.figures.cells import count_text
from steerlens.figures.marks import colorbar, with_subtitle
from steerlens.figures.multiples import Cell, chosen_instructions, instruction_label, require_table, small_multiples
from steerlens.figures.theme import CONDITION_COLORS, INK, percent, rate_text, theme
from steerlens.figures.words import shown_name
from steerlens.stats.rates import RATE_COLUMNS

MOST_WRITTEN = 12
"""Up to this many layers each cell of a transfer has its number written in it, and each layer its tick."""

REFERENCES = {
    "random": "a random direction",
    "none": "no steering",
    "text": "the instruction in the prompt, no steering",
}
"""The rows below the matrix of a transfer, in their order, and what they are."""

MISSING_CELL = "#C2C6CC"
"""Of a cell without a number, which is no zero."""

REFERENCE_GAP = 0.4
"""Between the matrix and these rows, in rows."""


def cosine_heatmap(
    matrix: np.ndarray | pd.DataFrame,
    labels: Sequence[str],
    *,
    axis: str = "instruction",
    title: str | None = None,
    note: str = "",
    intervals: pd.DataFrame | None = None,
) -> go.Figure:
    """A heat map of cosine similarities: blue below zero, white at zero, red above, over all of [-1, 1].

    Args:
        matrix: square, row `i` and column `j` comparing `labels[i]` with `labels[j]`.
        labels: instruction ids or any names.
        axis: what the labels are.
        title: what the figure is about; a phrase by default.
        note: what stands below the title.
        intervals: one row per pair of labels, for the hover: first, second, low, high.

    Returns:
        A figure with one cell per pair of labels; grey where a cosine is missing.

    Raises:
        DataError: another shape than one row and column per label, or values outside [-1, 1].

    Example:
        >>> cosine_heatmap(np.eye(2), ["a", "b"]).data[0].zmin
        -1
    """
    values = np.asarray(matrix, dtype=float)
    if values.shape != (len(labels), len(labels)):
        raise DataError(f"matrix must have a row and a column for each of {len(labels)} labels, got {values.shape}")
    if (np.abs(values) > 1 + 1e-4).any():  # cosines in float32 may round to a little more than one
        raise DataError(f"cosines must be in [-1, 1], got {np.nanmax(np.abs(values)):.3g}; use unit directions")
    places, size = [*range(len(labels))], 12 if len(labels) <= 15 else 9
    cells = go.Heatmap(
        z=values,
        x=places,
        y=places,
        zmin=-1,
        zmid=0,
        zmax=1,
        colorscale="RdBu_r",
        xgap=1,
        ygap=1,
        texttemplate="%{z:.2f}" if len(labels) <= 15 else None,
        customdata=_cosine_hovers(values, labels, intervals),
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        colorbar={**colorbar("cosine"), "tickvals": [-1, -0.5, 0, 0.5, 1]},
    )
    fig = go.Figure(cells, layout={"template": theme(), "height": max(320, 44 * len(labels) + 140)})
    look = {"tickvals": places, "tickfont_size": size, "showgrid": False, "zeroline": False, "title_text": axis}
    names = [shown_name(label, 26) for label in labels]
    fig.update_xaxes(**look, ticktext=names, tickangle=-40 if max(map(len, labels)) > 3 else 0)
    # Plotly counts rows from below, and a matrix is read from above.
    fig.update_yaxes(**look, ticktext=[f"{name} " for name in names], autorange="reversed")
    if np.isnan(values).any():
        fig.update_layout(plot_bgcolor=MISSING_CELL)
    heading = with_subtitle(title or "How alike the steering directions are (cosine similarity)", note)
    return fig.update_layout(title=heading, margin_t=76 if note else None)


def _cosine_hovers(values: np.ndarray, labels: Sequence[str], intervals: pd.DataFrame | None) -> list[list[str]]:
    ends = {}
    for row in [] if intervals is None else intervals.dropna(subset=["low", "high"]).to_dict("records"):
        for pair in permutations((str(row["first"]), str(row["second"]))):
            ends[pair] = f" [{row['low']:.3f}, {row['high']:.3f}]"
    return [
        [
            f"{shown_name(one)} and {shown_name(other)}<br>cosine <b>{value:.3f}</b>{ends.get((one, other), '')}"
            for other, value in zip(labels, line, strict=True)
        ]
        for one, line in zip(labels, values, strict=True)
    ]


def transfer_matrix(
    table: pd.DataFrame,
    *,
    instructions: str | Sequence[str] | None = None,
    title: str | None = None,
    columns: int = 3,
) -> go.Figure:
    """The rate of the direction of each layer (rows) added at each layer (columns); below it what it must be compared with.

    The lowest rows are a random direction of the same length, no steering, and the instruction in the prompt. A star marks cells
    most of whose texts are degenerate.

    Args:
        table: of `transfer_between_layers`: instruction, from_layer, layer, condition, n, followed, rate, low, high, degenerate.
        instructions: which are drawn, one or several; default: all of the table's.
        title: what the figure is about; a phrase by default.
        columns: panels side by side.

    Returns:
        A figure with a heat map per instruction.

    Raises:
        DataError: a missing column, no row, or an instruction that the table does not hold.

    Example:
        >>> from steerlens.study import transfer_between_layers
        >>> found = transfer_between_layers(model, vector, valid[:2], layers=[3, 4], max_new_tokens=4)
        >>> transfer_matrix(found.table).layout.xaxis.title.text
        'added at layer'
    """
    needed = ["instruction", "from_layer", "layer", "condition", *RATE_COLUMNS, "degenerate"]
    require_table(table, needed, what="the transfer table")
    groups = chosen_instructions(table, instructions)
    layers = [int(layer) for layer in sorted(table["layer"].dropna().unique())]
    if not layers:
        raise DataError("the transfer table must have rows with a layer, got none; draw the table of a finished study")
    labels = [instruction_label(name) for name in groups]
    height = min(26, max(12, 320 // len(layers))) * (len(layers) + 4)
    fig, cells = small_multiples(labels, columns=columns, panels=(height,))
    for label, rows, (cell,) in zip(labels, groups.values(), cells, strict=True):
        steered = rows[rows["condition"] == "vector"]
        matrix = {f"direction of layer {one}": steered[steered["from_layer"] == one] for one in layers}
        references = {words: rows[rows["condition"] == name] for name, words in REFERENCES.items()}
        for part, start in ((matrix, 0.0), (references, len(layers) + REFERENCE_GAP)):
            fig.add_trace(_heat_map(part, layers, start=start, label=label), **cell.place)
        _style_matrix_axes(fig, cell, layers)
    bar = {**colorbar("follow (%)"), "tickvals": [0, 0.25, 0.5, 0.75, 1], "tickformat": ".0%"}
    scale = [[0, "#FFFFFF"], [0.5, "#F2A66B"], [1, CONDITION_COLORS["vector"]]]
    shared = {"cmin": 0, "cmax": 1, "colorscale": scale, "colorbar": bar}
    fig.update_layout(coloraxis=shared, margin_r=80)
    return fig.update_layout(title_text=title or "A layer's direction at other layers (*: most texts degenerate)")


def _heat_map(rows: Mapping[str, pd.DataFrame], layers: Sequence[int], *, start: float, label: str) -> go.Heatmap:
    """The rates of each row at each layer; what has no layer of its own is the same at all of them."""
    records = []
    for words, part in rows.items():
        found = {None if pd.isna(one["layer"]) else int(one["layer"]): one for one in part.to_dict("records")}
        cells = [found.get(layer, found.get(None)) for layer in layers]
        records.append(
            [
                (f"{shown_name(label)}<br>{words} at layer {layer}", cell)
                for layer, cell in zip(layers, cells, strict=True)
            ]
        )
    return go.Heatmap(
        x=[*range(len(layers))],
        y=[start + row for row in range(len(records))],
        z=[[math.nan if cell is None else cell["rate"] for _, cell in row] for row in records],
        text=[[_in_cell(cell, written=len(layers) <= MOST_WRITTEN) for _, cell in row] for row in records],
        texttemplate="%{text}",
        textfont={"size": 9 if len(layers) > 6 else 11, "color": INK},
        customdata=[[_transfer_hover(where, cell) for where, cell in row] for row in records],
        hovertemplate="%{customdata}<extra></extra>",
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
    )


def _in_cell(cell: Mapping[Any, Any] | None, *, written: bool) -> str:
    """The rate in percent, where there is room for it, and the star."""
    if cell is None:
        return ""
    star = "*" if cell["degenerate"] > 0.5 else ""
    return f"{100 * cell['rate']:.0f}{star}" if written else star


def _transfer_hover(where: str, cell: Mapping[Any, Any] | None) -> str:
    if cell is None:
        return where
    broken = f"{percent(cell['degenerate'])} degenerate texts"
    return f"{where}: <b>{rate_text(cell)}</b><br>{count_text(cell)}<br>{broken}"


def _style_matrix_axes(fig: go.Figure, cell: Cell, layers: Sequence[int]) -> None:
    shown = [place for place in range(len(layers)) if place % math.ceil(len(layers) / MOST_WRITTEN) == 0]
    names = [str(layers[place]) for place in shown]
    below = [len(layers) + REFERENCE_GAP + row for row in range(len(REFERENCES))]
    look = {
        "showgrid": False,
        "zeroline": False,
        "ticks": "",
        "tickfont_size": 12 if len(layers) <= MOST_WRITTEN else 10,
    }
    fig.update_xaxes(
        tickvals=shown, ticktext=names, title_text="added at layer" if cell.last else None, **look, **cell.place
    )
    fig.update_yaxes(
        tickvals=[*shown, *below],
        ticktext=[*names, *REFERENCES],
        autorange="reversed",
        showticklabels=cell.col == 1,
        title_text="direction of layer" if cell.col == 1 else None,
        **look,
        **cell.place,
    )
