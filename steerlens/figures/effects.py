"""What a vector does to the next token, by layer: directly and in all, beside random directions of the same length."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from steerlens.errors import DataError, nearest
from steerlens.figures.multiples import require_table
from steerlens.figures.theme import CONDITION_COLORS, faded, theme
from steerlens.figures.tokens import shown

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
    fig = make_subplots(len(panels), 1, shared_xaxes=True, vertical_spacing=0.06)
    for line, (measure, of, label) in enumerate(panels, 1):
        part = table[(table["measure"] == measure) & (table["target"] == of)]
        for (condition, effect), curve in part.groupby(["condition", "effect"], sort=False):
            _draw(fig, curve.sort_values("layer"), str(condition), str(effect), line)
        fig.update_yaxes(title_text=label, row=line, col=1)
    fig.update_yaxes(range=[-1.05, 1.05], row=2, col=1)
    fig.update_xaxes(title_text="layer at which the vector is added", row=len(panels), col=1)
    fig.update_xaxes(showgrid=False)
    prompts = int(table["n"].max())
    title = title or f"What the vector does to the next token, directly and in all ({prompts} prompts)"
    margin = {"l": 8, "r": 8, "t": 84, "b": 34}
    return fig.update_layout(template=theme(), title_text=title, height=150 * len(panels) + 120, margin=margin)


def _draw(fig: go.Figure, curve: pd.DataFrame, condition: str, effect: str, row: int) -> None:
    """A line with its interval."""
    color, name = CONDITION_COLORS[condition], f"{condition}, {effect}"
    band = go.Scatter(
        x=[*curve["layer"], *curve["layer"][::-1]],
        y=[*curve["high"], *curve["low"][::-1]],
        fill="toself",
        fillcolor=faded(color),
        line_width=0,
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=name,
    )
    intervals = [f"[{low:.3g}, {high:.3g}]" for low, high in zip(curve["low"], curve["high"], strict=True)]
    line = go.Scatter(
        x=curve["layer"],
        y=curve["mean"],
        mode="lines+markers",
        line={"color": color, "width": 2, "dash": _DASHES[effect]},
        marker_size=5,
        name=name,
        legendgroup=name,
        showlegend=row == 1,
        customdata=intervals,
        hovertemplate=f"layer %{{x}}, {name}: <b>%{{y:.3g}}</b> %{{customdata}}<extra></extra>",
    )
    fig.add_traces([band, line], rows=row, cols=1)
