"""Figures of the results: a tidy table in, a plotly Figure out. Nothing here runs a model.

    four_cells      rate of each condition with its Wilson interval, overall or one panel per instruction
    layer_curve     rate against the steered layer, the chosen layer, the unsteered rate, degenerate share
    coeff_curve     the same against the coefficient of a method
    cosine_heatmap  signed similarities, centred on zero

A condition has one colour everywhere. The two controls, `none` and `random`, are grey; what is under study is
coloured, in Okabe-Ito hues, which stay apart for colour-blind readers. Names stand on the axes, so that no
reading depends on colour alone.

What a figure does not show: two intervals that overlap do not prove the rates equal, and the chosen layer's
validation rate is no estimate of its rate on new prompts.
"""

import math
import re
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any
from zlib import crc32

import plotly.graph_objects as go

CONDITION_COLORS = {
    "none": "#C2C6CC",
    "random": "#858B94",
    "vector": "#D55E00",
    "text": "#0072B2",
    "text+vector": "#009E73",
    "text+random": "#6B7078",
    "text+attention": "#C2308F",
    "text+vector+attention": "#7A4F9A",
}
"""The conditions in the order in which they are shown, each with its colour."""


KNOWN = (
    *("change_case:english_capital", "change_case:english_lowercase", "detectable_format:json_format"),
    *("punctuation:no_comma", "detectable_format:number_highlighted_sections", "startend:end_checker"),
    *("detectable_format:number_bullet_lists", "startend:quotation", "detectable_format:title"),
    *("change_case:capital_word_frequency", "language:response_language", "detectable_format:multiple_sections"),
    *("detectable_format:constrained_response", "length_constraints:number_sentences", "keywords:existence"),
    *("keywords:forbidden_words", "length_constraints:number_words", "length_constraints:number_paragraphs"),
)
"""Instructions that have their colour and symbol in every figure."""
_HUES = (
    *("#CC6677", "#332288", "#117733", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499", "#DDCC77"),
)  # Paul Tol's "muted" scheme: apart for colour-blind readers, and from the conditions
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "star")
_METHOD_HUES = ("#E69F00", "#56B4E9", "#CC79A7", "#332288", "#882255", "#999933", "#6B4C2A")
_BESIDE_CONDITIONS = {"before": CONDITION_COLORS["random"], "after": CONDITION_COLORS["vector"]}


MISSING = "\u2013"
"""What stands in a table or figure for a number that does not exist."""


INK, MUTED, GRID = "#1F2328", "#59636E", "#E6E8EB"


_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


PERCENT_TICKS = {"tickvals": [0, 0.25, 0.5, 0.75, 1], "tickformat": ".0%", "zeroline": False}


def theme() -> go.layout.Template:
    """The look that every figure here shares: a template for `fig.update_layout(template=theme())`."""
    axis = {
        "gridcolor": GRID,
        "linecolor": GRID,
        "zerolinecolor": GRID,
        "automargin": True,
        "title": {"font": {"size": 13, "color": MUTED}, "standoff": 8},
        "tickfont": {"size": 12},
    }
    return go.layout.Template(
        layout={
            "font": {"family": _FONT, "size": 13, "color": INK},
            "title": {
                "font": {"size": 17},
                "x": 0,
                "xref": "container",
                "y": 1,
                "yanchor": "top",
                "pad": {"t": 14, "l": 8},
            },
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "colorway": list(CONDITION_COLORS.values()),
            "xaxis": axis,
            "yaxis": axis,
            "margin": {"l": 8, "r": 8, "t": 52, "b": 34},
            "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
            "hoverlabel": {"font": {"family": _FONT, "size": 13}, "align": "left"},
            "bargap": 0.25,
        }
    )


def short_label(instruction: str) -> str:
    """An instruction id in words: "change_case:english_capital" reads "english capital"; a text stays as it is."""
    if " " in instruction:
        return instruction
    names = [part.split(":", 1)[-1] for part in instruction.split("+")]
    return " + ".join(re.sub(r"[_:]+", " ", name).strip() for name in names)


def instruction_style(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and plotly symbol of each instruction: the same in every figure for those of KNOWN, told apart for all.

    Args:
        names: instruction ids or any names of vectors, in the order of the legend.

    Returns:
        Name -> colour and symbol, in the same order; no two share both, up to 54 names.

    Example:
        >>> instruction_style(["punctuation:no_comma", "my own"])["punctuation:no_comma"]
        ('#88CCEE', 'circle')
    """
    order = list(dict.fromkeys(names))
    styles = list(product(_SYMBOLS, _HUES))
    slots = {name: KNOWN.index(name) for name in order if name in KNOWN}
    for name in (name for name in order if name not in slots):
        start = crc32(name.encode()) % len(styles)  # a name of one's own has a place, too, unless it is taken
        free = [slot % len(styles) for slot in range(start, start + len(styles))]
        slots[name] = next((slot for slot in free if slot not in slots.values()), start)
    return {name: styles[slots[name]][::-1] for name in order}


def method_style(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and plotly symbol of each method of steering: conditions have theirs, others the next in line.

    Args:
        names: of methods or plans, in the order of the legend.

    Returns:
        Name -> colour and symbol, in the same order; no two share both, up to 42 names that are no conditions.

    Example:
        >>> method_style(["text", "PASTA"])
        {'text': ('#0072B2', 'circle'), 'PASTA': ('#E69F00', 'diamond')}
    """
    known = {**CONDITION_COLORS, **_BESIDE_CONDITIONS}
    order = list(dict.fromkeys(names))
    others = [name for name in order if name not in known]
    # Beginning with the second symbol, since conditions have the first one.
    symbols = (*_SYMBOLS[1:], _SYMBOLS[0])
    slots = {name: place % (len(symbols) * len(_METHOD_HUES)) for place, name in enumerate(others)}
    return {
        name: (known[name], _SYMBOLS[0])
        if name in known
        else (_METHOD_HUES[slots[name] % len(_METHOD_HUES)], symbols[slots[name] // len(_METHOD_HUES)])
        for name in order
    }


def percent(rate: float) -> str:
    """A share as text: "31 %", or a dash where it is missing."""
    return MISSING if math.isnan(rate) else f"{100 * rate:.0f}\u00a0%"


def rate_text(row: Mapping[Any, Any]) -> str:
    """A rate and interval: "31 % [24, 38]", or a dash where it is missing."""
    if math.isnan(row["rate"]):
        return MISSING
    return f"{percent(row['rate'])} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"


def number_text(row: Mapping[Any, Any]) -> str:
    """A number and its interval: "0.31 [0.24, 0.38]", or a dash where it is missing."""
    if math.isnan(row["value"]):
        return MISSING
    interval = "" if math.isnan(row["low"]) else f" [{row['low']:.3g}, {row['high']:.3g}]"
    return f"{row['value']:.3g}{interval}"


# Pixels: a line of the name above a panel, the tick labels below it, the gap to the panel that shares its x axis.
LINE, FOOTER, GAP = 16, 26, 14


def faded(color: str, opacity: float = 0.16) -> str:
    """A colour of six hex digits, by default so faint that lines and grid show through."""
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"
