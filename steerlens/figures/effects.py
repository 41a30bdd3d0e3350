"""What a vector does to the next token, by layer: directly and in all, beside random directions of the same length."""

import math

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlens.errors import DataError, nearest
from steerlens.figures.marks import band, whiskers
from steerlens.figures.multiples import require_table
from steerlens.figures.theme import CONDITION_COLORS, number_text, theme
from steerlens.figures.words import shown

_NEEDED = ("layer", "condition", "effect", "measure", "target", "mean", "low", "high", "n")
_DASHES = {"total": "solid", "direct": "dot", "both": "solid"}


def effect_curves(table: pd.DataFrame, *, target: str | None = None, title: str | None = None) -> go.Figure:
    """Total and direct effects of a vector by layer, with intervals, beside those of random directions, in panels:

    how far the next token's distribution moves (KL), how alike direct and total changes of the logits are, and where targets were
    followed, how the logit of one of them changes.

    Args:
        table: the frame of `vector_effects`.
        target: which of the targets; default the first.
        title: what the figure is about; a phrase by default.

    Returns:
        Solid lines for total effects, dotted ones for direct ones; grey is random.

    Raises:
        DataError: a missing column, an empty table, or an unknown target.

    Example:
        >>> effects = sl.reading.vector_effects(model, vector, queries, layers=[4, 6], coeff=2)
        >>> len(effect_curves(effects.table).data) > 4
        True
    """
    require_table(table, _NEEDED, what="the effects frame")
    followed = [name for name in dict.fromkeys(table["target"]) if name]
    if target is not None and target not in followed:
        raise DataError(f"target must be one that was followed, got {target!r}; {nearest(target, followed)}")
    target = target or next(iter(followed), None)
    panels = [("kl", "", "KL (nats)"), ("correlation", "", "direct to total<br>correlation")]
    panels += [("logit_change", target, f"logit of<br>{shown(target, 12)}")] if target else []
    layers = sorted(set(table["layer"].tolist()))
    fig = make_subplots(len(panels), 1, shared_xaxes=True, vertical_spacing=0.06)
    for line, (measure, of, label) in enumerate(panels, 1):
        part = table[(table["measure"] == measure) & (table["target"] == of)]
        for place, ((condition, effect), curve) in enumerate(part.groupby(["condition", "effect"], sort=False)):
            # Points of one layer stand side by side, with whiskers where a band would have no width.
            aside = 0.1 * place - 0.15 if len(layers) == 1 else 0.0
            _draw(fig, curve.sort_values("layer"), str(condition), str(effect), line, aside=aside)
        fig.update_yaxes(title_text=label, row=line, col=1)
    fig.update_yaxes(range=[-1.05, 1.05], row=2, col=1)
    fig.update_xaxes(title_text="layer at which the vector is added", row=len(panels), col=1)
    ends = [min(layers) - 0.4, max(layers) + 0.4]
    fig.update_xaxes(showgrid=False, range=ends, tickformat="d", dtick=math.ceil((max(layers) - min(layers) + 1) / 10))
    prompts = int(table["n"].max())
    title = title or f"What the vector does to the next token, directly and in all ({prompts} prompts)"
    margin = {"l": 8, "r": 8, "t": 84, "b": 34}
    return fig.update_layout(template=theme(), title_text=title, height=150 * len(panels) + 120, margin=margin)


def _draw(fig: go.Figure, curve: pd.DataFrame, condition: str, effect: str, row: int, *, aside: float) -> None:
    """A line with its interval."""
    color, name = CONDITION_COLORS[condition], f"{condition}, {effect}"
    interval = band(curve["layer"], curve["low"], curve["high"], color, name=name, showlegend=False, legendgroup=name)
    texts = [[row["layer"], number_text({**row, "value": row["mean"]})] for row in curve.to_dict("records")]
    line = go.Scatter(
        x=curve["layer"] + aside,
        y=curve["mean"],
        error_y=whiskers(curve["mean"], curve["low"], curve["high"], thickness=1, visible=len(curve) == 1),
        mode="lines+markers",
        line={"color": color, "width": 2, "dash": _DASHES[effect]},
        marker_size=5,
        name=name,
        legendgroup=name,
        showlegend=row == 1,
        customdata=texts,
        hovertemplate=f"layer %{{customdata[0]}}, {name}: <b>%{{customdata[1]}}</b><extra></extra>",
    )
    fig.add_traces([interval, line], rows=row, cols=1)
