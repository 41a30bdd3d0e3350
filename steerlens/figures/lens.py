"""The logit lens of a text, layer by position: what the model would say next after each layer, and what steering changes in it.

Tokens stand as they are written, with · for a space. Where the colour is of what steering changes, the tokens are the steered
ones, bold where they are others than without steering.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from steerlens.errors import DataError, nearest
from steerlens.figures.marks import colorbar, with_subtitle
from steerlens.figures.multiples import require_table
from steerlens.figures.theme import INK, theme
from steerlens.figures.tokens import LETTER, PAGE, only
from steerlens.figures.words import shown

_COLORS = {
    "probability": ("probability", "probability of the most likely token"),
    "entropy": ("nats", "entropy of the next token"),
    "log_prob": ("nats", "log-probability of \u201c{target}\u201d"),
    "rank": ("log10 (1 + rank)", "rank of \u201c{target}\u201d"),
    "kl": ("nats", "KL from the lens without steering"),
    "entropy_change": ("nats", "entropy, steered minus unsteered"),
    "top_change": ("nats", "log-probability of the steered token, steered minus unsteered"),
    "log_prob_change": ("nats", "log-probability of \u201c{target}\u201d, steered minus unsteered"),
    "rank_change": ("ranks", "rank of \u201c{target}\u201d, steered minus unsteered"),
}
"""What the cells' colour may stand for, with its unit and in words."""
_OF_TARGETS = ("log_prob", "rank", "log_prob_change", "rank_change")
_SIGNED = ("entropy_change", "top_change", "log_prob_change", "rank_change")
_CHANGES = ("kl", *_SIGNED)
_NEEDED = ("row", "layer", "position", "token", "generated", "top", "probability", "entropy")
_LIGHT_TO_BLUE = [[0, "#FFFFFF"], [1, "#5FA3D3"]]


def lens_heatmap(
    table: pd.DataFrame,
    targets: pd.DataFrame | None = None,
    *,
    row: int = 0,
    color: str | None = None,
    target: str | None = None,
    last: int | None = 14,
    title: str | None = None,
) -> go.Figure:
    """The lens of one text, layer by position: in each cell the most likely next token, colour for its numbers.

    Args:
        table: the frame of `prompt_lens`.
        targets: its frame of targets.
        row: which text.
        color: what the cells' colour stands for: "probability" or "entropy", of a target "log_prob" or "rank"; where the text is
            steered "kl", "entropy_change" or "top_change", of a target "log_prob_change" or "rank_change". Default: the
            probability; of a steered text the target's log_prob_change, without targets kl.
        target: which of the targets; default the first.
        last: how many positions from the end are shown; None shows all, and beyond some forty only their colours.
        title: what the figure is about; a phrase by default.

    Returns:
        A figure with one cell per layer and position.

    Raises:
        DataError: a missing column, or an unknown row, colour or target.

    Example:
        >>> lens_heatmap(sl.prompt_lens(model, "What is iron?").table).layout.xaxis.title.text
        'token that was read'
    """
    require_table(table, _NEEDED, what="the lens frame")
    steered, followed = "kl" in table, targets is not None and not targets.empty
    known = [name for name in _COLORS if (steered or name not in _CHANGES) and (followed or name not in _OF_TARGETS)]
    color = color or ("probability" if not steered else "log_prob_change" if followed else "kl")
    if color not in known:
        raise DataError(f"color must be a column of this lens, got {color!r}; {nearest(color, known)}")
    cells = only(table, "row", row)
    if targets is not None and followed:
        target = str(targets["target"].iloc[0]) if target is None else target
        cells = cells.merge(only(targets, "target", target), on=["row", "layer", "position"])
    positions = sorted(set(cells["position"]))[-last if last else None :]
    cells = cells[cells["position"].isin(positions)]
    unit, phrase = _COLORS[color]
    fig = go.Figure(_heatmap(cells, color, unit, len(positions)), layout={"template": theme()})
    tokens = cells.drop_duplicates("position").sort_values("position")
    labels = [shown(token, 10) for token in tokens["token"]]
    layers = sorted(set(cells["layer"]))
    step = math.ceil(len(positions) / 40)
    ticks = {
        "tickvals": positions[::step],
        "ticktext": labels[::step],
        "tickfont_size": 12 if len(positions) <= 20 else 10,
    }
    fig.update_xaxes(**ticks, tickangle=-45, title_text="token that was read")
    fig.update_yaxes(type="category", tickfont_size=_font_size(len(layers)), dtick=1, title_text="layer")
    fig.update_xaxes(showgrid=False, ticks="").update_yaxes(showgrid=False, ticks="")
    begins = tokens.loc[tokens["generated"], "position"]
    if 0 < len(begins) < len(positions):
        fig.add_vline(x=begins.min() - 0.5, line={"color": INK, "width": 1.5, "dash": "dot"})
    what = "What steering changes in the lens" if color in _CHANGES else "What each layer would say next"
    height = max(340, 26 * len(layers) + 170)
    heading = with_subtitle(title or what, phrase.format(target=shown(target or "")))
    return fig.update_layout(title=heading, height=height, margin={"l": 8, "r": 8, "t": 68, "b": 34})


def _heatmap(cells: pd.DataFrame, color: str, unit: str, n_positions: int) -> go.Heatmap:
    """Colour by layer and position, with the most likely token in each cell and its numbers on hovering."""
    size = _font_size(cells["layer"].nunique())
    width = int(PAGE / (LETTER * size / 11 * n_positions))
    said = cells["top_steered" if color in _CHANGES else "top"]
    text = [_in_cell(token, width, bold=moved) for token, moved in zip(said, said != cells["top"], strict=True)]
    values = np.log10(1 + cells["rank"]) if color == "rank" else cells[color]
    cells = cells.assign(cell=text, hover=_hovers(cells), value=values)
    grid = {name: cells.pivot(index="layer", columns="position", values=name) for name in ("value", "cell", "hover")}
    largest = max(float(values.abs().max()), 1e-9)
    signed = {"colorscale": "RdBu_r", "zmin": -largest, "zmid": 0, "zmax": largest}
    plain = {"colorscale": _LIGHT_TO_BLUE, "reversescale": color == "rank"}
    if color in ("probability", "kl"):
        plain |= {"zmin": 0, "zmax": 1 if color == "probability" else largest}
    return go.Heatmap(
        z=grid["value"],
        x=grid["value"].columns,
        y=[str(layer) for layer in grid["value"].index],
        text=grid["cell"],
        hovertext=grid["hover"],
        texttemplate="%{text}",
        textfont_size=size,
        hovertemplate="%{hovertext}<extra></extra>",
        xgap=1,
        ygap=1,
        colorbar=colorbar(unit),
        **(signed if color in _SIGNED else plain),
    )


def _in_cell(token: str, width: int, *, bold: bool) -> str:
    """The token, where there is room for two letters."""
    text = shown(token, width) if width >= 2 else ""
    return f"<b>{text}</b>" if bold and text else text


def _font_size(n_layers: int) -> int:
    return 11 if n_layers <= 16 else 9


def _hovers(cells: pd.DataFrame) -> list[str]:
    return ["<br>".join(_hover(record)) for record in cells.to_dict("records")]


def _hover(record: dict[Any, Any]) -> list[str]:
    """The numbers of a cell, line by line."""
    kind = "generated" if record["generated"] else "prompt"
    lines = [
        f"layer {record['layer']}, position {record['position']}, after {shown(record['token'])} ({kind})",
        f"<b>{shown(record['top'])}</b>: {record['probability']:.3g}, entropy {record['entropy']:.3g} nats",
    ]
    if "kl" in record:
        steered = f"{record['probability_steered']:.3g}, entropy {record['entropy_steered']:.3g} nats"
        lines += [f"steered <b>{shown(record['top_steered'])}</b>: {steered}", f"KL {record['kl']:.3g} nats"]
    if "target" in record:
        lines.append(f"{shown(record['target'])}: log-probability {record['log_prob']:.3g}, rank {record['rank']}")
    if "kl" in record and "target" in record:
        lines.append(f"steered: log-probability {record['log_prob_steered']:.3g}, rank {record['rank_steered']}")
    return lines
