"""What several figures draw alike: bands and whiskers of intervals, bars of colours, titles with a line below them."""

from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go

from steerlens.figures.theme import GRID, MUTED, faded

INTERVAL = "95\u00a0% interval"


def band(
    x: Iterable[Any], low: Iterable[Any], high: Iterable[Any], color: str, *, name: str = INTERVAL, **options: Any
) -> go.Scatter:
    """The area between two lines, faint.

    >>> band([0, 1], [2, 3], [4, 5], "#000000").y
    (4, 5, 3, 2)
    """
    look = {"fill": "toself", "fillcolor": faded(color), "line_width": 0, "mode": "lines", "hoverinfo": "skip"}
    there, below, above = list(x), list(low), list(high)
    return go.Scatter(x=[*there, *there[::-1]], y=[*above, *below[::-1]], name=name, **look, **options)


def whiskers(
    middle: Iterable[Any], low: Iterable[Any], high: Iterable[Any], *, width: int = 3, **options: Any
) -> dict[str, Any]:
    """Error bars from `low` to `high` about points at `middle`, for `error_x` or `error_y`.

    >>> whiskers([1.0], [0.5], [2.0])["arrayminus"]
    [0.5]
    """
    rows = list(zip(middle, low, high, strict=True))
    above, below = [end - value for value, _, end in rows], [value - end for value, end, _ in rows]
    ends = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    return {**ends, "thickness": 1.2, "width": width, **options}


def colorbar(unit: str) -> dict[str, Any]:
    """A narrow bar with its unit beside it.

    >>> colorbar("logit")["title"]["text"]
    'logit'
    """
    title = {"text": unit, "side": "right", "font": {"size": 13, "color": MUTED}}
    return {"title": title, "thickness": 14, "tickfont": {"size": 11}, "outlinewidth": 1, "outlinecolor": GRID}


def with_subtitle(title: str, subtitle: str) -> dict[str, Any]:
    """A figure's title with a line in small type below it.

    >>> with_subtitle("What it says", "bold: more")["subtitle"]["text"]
    'bold: more'
    """
    return {"text": title, "subtitle": {"text": subtitle, "font": {"size": 12, "color": MUTED}}}
