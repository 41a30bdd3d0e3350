"""What vectors say in the vocabulary: tokens in cells, a line for each vector or layer, or bars where that is one line.

Tokens stand as they are written, with · for a space. A token that no random direction promotes as much is bold; as bars, the
range of random directions lies behind them.
"""

from typing import Any, Literal, get_args

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlens.errors import DataError, nearest
from steerlens.figures.marks import colorbar, with_subtitle
from steerlens.figures.multiples import require_table
from steerlens.figures.theme import CONDITION_COLORS, theme
from steerlens.figures.words import shown, shown_name

PAGE, NAMES, LETTER = 520, 90, 7.0
"""Pixels that a narrow page leaves for cells side by side, those that names before them take, and those of a letter."""

Shown = Literal["tokens", "targets"]

SIGNS = {1: "adding it says", -1: "subtracting it says"}

_RAISED = [[0, "#FFFFFF"], [1, "#F2A66B"]]
_NEEDED = ("vector", "layer", "sign", "kind", "rank", "token", "logit", "random_low", "random_high", "text", "piece")


def token_table(
    table: pd.DataFrame,
    *,
    show: Shown = "tokens",
    vector: str | None = None,
    layer: int | None = None,
    top: int | None = None,
    title: str | None = None,
) -> go.Figure:
    """What each vector says: a row of tokens for each vector, or for each layer of one vector; bars where that is one row.

    Of several vectors at several layers, the rows are the vectors at one layer, and a slider moves through the layers.

    Args:
        table: the frame of `logit_lens`.
        show: "tokens": the most promoted ones, when the direction is added and when it is subtracted; "targets": the first token
            of each spelling of the target words, with its rank.
        vector: only this one.
        layer: only this one.
        top: how many tokens of each sign; default 5 in cells, 10 as bars.
        title: what the figure is about; a phrase by default.

    Returns:
        Cells coloured by the logit, bold where no random direction reaches it; or bars over the range of random directions.

    Raises:
        DataError: a missing column, an empty table, an unknown vector or layer, or targets where none were looked up.

    Example:
        >>> [bars.name for bars in token_table(sl.logit_lens(model, vector, layer=4).table).data[:2]]
        ['range of random directions', 'this direction']
    """
    require_table(table, _NEEDED, what="the lens frame")
    if show not in get_args(Shown):
        raise DataError(
            f'show must be "tokens" or "targets", got {show!r}; targets are those that were given to logit_lens'
        )
    rows = only(only(table, "vector", vector), "layer", layer)
    if show == "targets":
        rows = rows[(rows["kind"] == "target") & (rows["sign"] == 1) & (rows["piece"] == 0)]
        if rows.empty:
            raise DataError(
                "targets can be shown where they were looked up, and this frame has none; give logit_lens targets="
            )
    else:
        rows = rows[rows["kind"] == "promoted"]
    names, layers = list(dict.fromkeys(rows["vector"])), sorted(set(rows["layer"]))
    who = f"the {shown_name(names[0], 30)} vector" if len(names) == 1 else "each vector"
    where = f" at layer {layers[0]}" if len(layers) == 1 else ""
    what = "does to the target words" if show == "targets" else "says in the vocabulary"
    one = len(names) == len(layers) == 1
    rows = rows.assign(place=rows.groupby(["vector", "layer", "sign"]).cumcount(), hover=_hovers(rows))
    if show == "tokens":
        rows = rows[rows["place"] < (top or (10 if one else 5))]
    fig = _bars(rows) if one else _cells(rows)
    bold = "" if one else "bold: more than any of the random directions"
    bold = f"numbers: ranks, 0 is the most promoted; {bold}" if bold and show == "targets" else bold
    return fig.update_layout(template=theme(), title=with_subtitle(title or f"What {who} {what}{where}", bold))


def only(table: pd.DataFrame, column: str, value: Any) -> pd.DataFrame:
    """The rows with this value in a column; all of them for None.

    Raises:
        DataError: if there are none.
    """
    known = list(dict.fromkeys(table[column]))
    if value is not None and value not in known:
        raise DataError(f"{column} must be in the frame, got {value!r}; {nearest(str(value), map(str, known))}")
    return table if value is None else table[table[column] == value]


def _bars(rows: pd.DataFrame) -> go.Figure:
    """A panel per sign: the logit of each token, over the range of random directions."""
    fig = _panels(rows, 0.2)
    for col, (_, part) in enumerate(rows.groupby("sign", sort=False), 1):
        common = {"y": part["place"], "orientation": "h", "showlegend": col == 1}
        random = go.Bar(
            x=part["random_high"] - part["random_low"],
            base=part["random_low"],
            width=0.85,
            marker_color=CONDITION_COLORS["none"],
            opacity=0.55,
            name="range of random directions",
            hoverinfo="skip",
            **common,
        )
        logits = go.Bar(
            x=part["logit"],
            width=0.4,
            marker_color=CONDITION_COLORS["vector"],
            name="this direction",
            hovertext=part["hover"],
            hovertemplate="%{hovertext}<extra></extra>",
            **common,
        )
        fig.add_traces([random, logits], rows=1, cols=col)
        labels = [f"{_label(record, 14)} " for record in part.to_dict("records")]
        fig.update_yaxes(tickvals=part["place"], ticktext=labels, autorange="reversed", showgrid=False, row=1, col=col)
    fig.update_xaxes(title_text="logit")
    of_words = _of_words(rows)
    margin = {"l": 8, "r": 8, "t": 84 if of_words else 104, "b": 34}
    fig.update_layout(barmode="overlay", height=max(340, 24 * rows["place"].nunique() + 160), margin=margin)
    return fig.update_layout(legend={"y": 1 if of_words else 1.07})


def _cells(rows: pd.DataFrame) -> go.Figure:
    """A block of cells per sign: a line for each vector or layer, a column for each token."""
    by = "layer" if rows["vector"].nunique() == 1 else "vector"
    lines = sorted(set(rows["layer"])) if by == "layer" else list(dict.fromkeys(rows["vector"]))
    size = 11 if len(lines) <= 16 else 9
    letters = int(
        11 * (PAGE - NAMES * (by == "vector")) / (LETTER * size * rows["place"].nunique() * rows["sign"].nunique())
    )
    rows = rows.assign(cell=[_cell(record, max(3, letters)) for record in rows.to_dict("records")])
    pages = [None] if by == "layer" else sorted(set(rows["layer"]))
    fig = _panels(rows, 0.02)
    for page in pages:
        there = rows if page is None else rows[rows["layer"] == page]
        for col, (_, part) in enumerate(there.groupby("sign", sort=False), 1):
            fig.add_trace(_block(part, by, lines, size).update(visible=page == pages[-1]), row=1, col=col)
    _name_axes(fig, rows, by, lines)
    return _with_slider(fig, pages, below=120 if _of_words(rows) else 42) if len(pages) > 1 else fig


def _block(rows: pd.DataFrame, by: str, lines: list[Any], size: int) -> go.Heatmap:
    """The cells of one sign; a line without tokens stays empty."""
    grid = {
        name: rows.pivot(index=by, columns="place", values=name).reindex(lines) for name in ("logit", "cell", "hover")
    }
    return go.Heatmap(
        z=grid["logit"],
        text=grid["cell"].fillna(""),
        hovertext=grid["hover"],
        texttemplate="%{text}",
        textfont_size=size,
        hovertemplate="%{hovertext}<extra></extra>",
        hoverongaps=False,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
    )


def _name_axes(fig: go.Figure, rows: pd.DataFrame, by: str, lines: list[Any]) -> None:
    """Names of lines and columns, the scale of the colours, and room for them all."""
    of_words, largest = _of_words(rows), float(rows["logit"].abs().max())
    signed = {"colorscale": "RdBu_r", "cmin": -largest, "cmid": 0, "cmax": largest}
    raised = {"colorscale": _RAISED, "cmin": rows["random_low"].min(), "cmax": largest}
    scale = signed if of_words else raised
    names = [f"{line if by == 'layer' else shown_name(line, 22)} " for line in lines]
    # Vectors are read from above; layers go up, as in the lens of a text.
    direction = "reversed" if by == "vector" else True
    fig.update_yaxes(tickvals=[*range(len(lines))], ticktext=names, tickfont_size=11, autorange=direction)
    fig.update_yaxes(title_text=by, col=1)
    if of_words:
        words = [_label(record, 14) for record in rows.drop_duplicates("place").to_dict("records")]
        fig.update_xaxes(tickvals=[*range(len(words))], ticktext=words, tickangle=-45, title_text="token, and its rank")
    else:
        fig.update_xaxes(title_text="rank", dtick=1)
    fig.update_xaxes(showgrid=False, ticks="").update_yaxes(showgrid=False, ticks="")
    height = max(340, (22 if by == "layer" else 36) * len(lines) + 150)
    margin = {"l": 8, "r": 8, "t": 72 if of_words else 90, "b": 34}
    fig.update_layout(coloraxis={**scale, "colorbar": colorbar("logit")}, height=height, margin=margin)


def _panels(rows: pd.DataFrame, gap: float) -> go.Figure:
    """A panel per sign, side by side, with its name above it."""
    signs = list(dict.fromkeys(rows["sign"]))
    heads = [] if _of_words(rows) else [f"<b>{SIGNS[sign]}</b>" for sign in signs]
    fig = make_subplots(1, len(signs), horizontal_spacing=gap, shared_yaxes=gap < 0.1, subplot_titles=heads)
    return fig.update_annotations(font_size=13)


def _with_slider(fig: go.Figure, layers: list[Any], *, below: int) -> go.Figure:
    """A step of the slider for each layer, whose blocks it shows; the last layer is shown first.

    Args:
        below: Pixels from the cells to the slider, for labels.
    """
    each = len(fig.data) // len(layers)
    steps = [
        {
            "label": str(layer),
            "method": "restyle",
            "args": [{"visible": [index // each == place for index in range(len(fig.data))]}],
        }
        for place, layer in enumerate(layers)
    ]
    shown_first = {"active": len(layers) - 1, "currentvalue": {"prefix": "layer "}}
    slider = {**shown_first, "steps": steps, "pad": {"t": below}, "len": 0.9}
    return fig.update_layout(sliders=[slider], height=fig.layout.height + below + 38)


def _of_words(rows: pd.DataFrame) -> bool:
    return bool((rows["kind"] == "target").all())


def _cell(record: dict[Any, Any], width: int) -> str:
    """What stands in a cell, bold where no random direction promotes as much."""
    rank = str(record["rank"])
    said = (rank if len(rank) <= width else "") if record["kind"] == "target" else shown(record["token"], width)
    return f"<b>{said}</b>" if record["logit"] > record["random_high"] else said


def _label(record: dict[Any, Any], width: int) -> str:
    """The token; of a spelling in several tokens, the spelling and the token."""
    token = shown(record["token"], width)
    whole = record["kind"] != "target" or record["token"] == record["text"]
    return token if whole else f"{shown(record['text'], width)}: {token}"


def _hovers(rows: pd.DataFrame) -> list[str]:
    return [
        f"{shown_name(str(record['vector']))}, layer {record['layer']}, {SIGNS[record['sign']]}<br>"
        f"<b>{_label(record, 40)}</b>: logit {record['logit']:.3g}, rank {record['rank']}<br>"
        f"random directions: {record['random_low']:.3g} to {record['random_high']:.3g}"
        for record in rows.to_dict("records")
    ]
