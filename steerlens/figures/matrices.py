"""Matrices between vectors, as heat maps."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from steerlens.errors import DataError
from steerlens.figures.theme import short_label, theme


def cosine_heatmap(matrix: np.ndarray | pd.DataFrame, labels: Sequence[str], *, title: str | None = None) -> go.Figure:
    """A heat map of cosine similarities: blue below zero, white at zero, red above, over all of [-1, 1].

    Args:
        matrix: square, row `i` and column `j` comparing `labels[i]` with `labels[j]`.
        labels: instruction ids or any names.
        title: what the figure is about; a phrase by default.

    Returns:
        A figure with one cell per pair of labels.

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
    names = [short_label(label) for label in labels]
    cells = go.Heatmap(
        z=values,
        x=names,
        y=names,
        zmin=-1,
        zmid=0,
        zmax=1,
        colorscale="RdBu_r",
        xgap=1,
        ygap=1,
        texttemplate="%{z:.2f}" if len(labels) <= 15 else None,
        hovertemplate="%{y} and %{x}<br>cosine %{z:.3f}<extra></extra>",
        colorbar={
            "title": {"text": "cosine", "side": "right"},
            "tickvals": [-1, -0.5, 0, 0.5, 1],
            "thickness": 14,
        },
    )
    fig = go.Figure(cells, layout={"template": theme(), "height": max(320, 44 * len(labels) + 140)})
    fig.update_xaxes(tickangle=-40, showgrid=False, title_text="instruction")
    # Plotly counts rows from below, and a matrix is read from above.
    fig.update_yaxes(autorange="reversed", showgrid=False, title_text="instruction")
    return fig.update_layout(title_text=title or "How alike the steering directions are (cosine similarity)")
