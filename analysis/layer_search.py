"""At which layer do format vectors work, and what do they cost there? (Stolfo et al. 2025, figure 5 and appendix)

    python analysis/layer_search.py --out runs/analysis/layer_search

Every layer answers the same validation prompts of all format instructions, without and with the text. Beside the rate stands the
share of degenerate texts, and the median perplexity of the answers under the unsteered model given the bare query: the trade-off
on which the paper chooses layers. `nested.csv` reports each prompt under the layer that the *other* prompts chose, against the
winner's own rate: the difference is what searching flatters.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import tyro
from plotly.subplots import make_subplots
from study import FormatStudy, Frames, conduct, lab, line

from steerlens.figures.theme import CONDITION_COLORS
from steerlens.stats.rates import rate_table
from steerlens.steering.candidates import grid
from steerlens.study.quality import Quality
from steerlens.study.sweeps import CANDIDATE, sweep
from steerlens.vectors.estimators import fit_vectors


@dataclass(frozen=True)
class Settings(FormatStudy):
    out: Path = Path("runs/analysis/layer_search")


def measure(settings: Settings) -> Frames:
    tables, nested = [], []
    with lab(settings) as here:
        train, valid, _ = here.format_pairs()
        vectors = fit_vectors(here.model, train.by_instruction(), progress=True)
        layers = settings.layers or range(int(here.model.cfg.n_layers))
        candidates = grid(layers=layers, positions=list(settings.positions))
        for condition in ("vector", "text+vector"):
            found = sweep(here.sampler, vectors, valid, candidates=candidates, condition=condition, quality=Quality())
            tables.append(found.configurations.assign(condition=condition))
            others = found.nested(folds=min(4, settings.n_valid))
            winners = found.table.loc[found.table["chosen"], ["instruction", *CANDIDATE]]
            for chosen_on, scores in (("itself", found.scores.merge(winners)), ("others", others)):
                rates = rate_table(scores, [], clusters="query")
                nested.append(rates.assign(condition=condition, chosen_on=chosen_on))
    return {"layers": pd.concat(tables), "nested": pd.concat(nested)}


def draw(frames: Frames) -> dict[str, go.Figure]:
    table = frames["layers"]
    figure = make_subplots(rows=2, shared_xaxes=True, row_heights=[0.7, 0.3], vertical_spacing=0.06)
    steered = table.dropna(subset=["layer"])
    dashes = dict(zip(steered["positions"].unique(), ("solid", "dot", "dash", "dashdot"), strict=False))
    for (condition, positions), rows in steered.groupby(["condition", "positions"]):
        color, name = CONDITION_COLORS[condition], f"{condition}, {positions} tokens"
        line(figure, rows, "layer", name, color, dash=dashes[positions], row=1, col=1)
        line(figure, rows, "layer", name, color, y="degenerate", dash=dashes[positions], row=2, col=1)
        figure.data[-1].showlegend = False
    for condition, rows in table[table["layer"].isna()].groupby("condition"):
        name = {"vector": "none", "text+vector": "text"}[condition]
        figure.add_hline(
            y=rows["rate"].iloc[0], line={"color": CONDITION_COLORS[name], "width": 2, "dash": "dash"}, row=1, col=1,
            annotation={"text": name, "font": {"color": CONDITION_COLORS[name]}, "xanchor": "right"},
        )  # fmt: skip
    figure.update_yaxes(title_text="followed", tickformat=".0%", range=[0, 1], row=1, col=1)
    figure.update_yaxes(title_text="degenerate", tickformat=".0%", rangemode="tozero", row=2, col=1)
    figure.update_xaxes(title_text="steered layer", dtick=1 if steered["layer"].nunique() < 20 else None, row=2, col=1)
    figure.update_layout(
        title_text="Format instructions: rate by layer, validation prompts", height=560, width=960, margin={"t": 90}
    )
    return {"layers": figure, "tradeoff": draw_tradeoff(table)}


def draw_tradeoff(table: pd.DataFrame) -> go.Figure:
    """The rate of each layer against the perplexity of its answers, a panel per rule of positions, beside no steering."""
    rules = list(table.dropna(subset=["layer"])["positions"].unique())
    heads = [f"steering {name} tokens" for name in rules]
    figure = make_subplots(cols=len(rules), shared_yaxes=True, subplot_titles=heads, horizontal_spacing=0.04)
    for col, positions in enumerate(rules, 1):
        for condition, rows in table.groupby("condition", sort=False):
            unsteered = rows[rows["layer"].isna()]
            steered = rows[rows["layer"].notna() & (rows["positions"] == positions)].sort_values("layer")
            names = [f"{layer:.0f}" for layer in steered["layer"]]
            reference = {"vector": "none", "text+vector": "text"}[condition]
            for part, name, look in (
                (steered, condition, {"mode": "lines+markers+text", "text": names, "textposition": "top center"}),
                (unsteered, reference, {"mode": "markers", "marker": {"symbol": "x", "size": 11}}),
            ):
                trace = go.Scatter(
                    x=part["median_perplexity"],
                    y=part["rate"],
                    name=name,
                    showlegend=col == 1,
                    legendgroup=name,
                    **look,
                )
                color = CONDITION_COLORS[name]
                trace.update(marker_color=color, line={"color": color, "width": 1}, textfont_color=color)
                figure.add_trace(trace, row=1, col=col)
    figure.update_xaxes(title_text="median perplexity of the answers", type="log")
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.08])
    figure.update_yaxes(title_text="followed", col=1)
    title = "Following against perplexity, layer by layer (validation prompts)"
    return figure.update_layout(title_text=title, width=960, height=480, margin={"t": 110}, legend={"y": 1.1})


if __name__ == "__main__":
    conduct(tyro.cli(Settings, description=__doc__), measure, draw, ["layers", "nested"])
