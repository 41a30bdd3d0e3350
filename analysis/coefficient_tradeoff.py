"""Following against quality as the coefficient grows (Stolfo et al. 2025, answers to reviewers; PASTA's sweep in AISteer360).

    python analysis/coefficient_tradeoff.py --out runs/analysis/coefficient_tradeoff

Format vectors are added at one layer, the best of a small search (the first where none beats no steering), with coefficients in
units of the layer's mean residual norm; a second series takes every layer at coefficients calibrated to equal divergence from
the unsteered model. Quality is the perplexity of the response under the unsteered model, its repetition, and the divergence in
nats per token. The front is what no configuration beats in following without losing in repetition. Instructions that no
coefficient moves as far as a divergence are left out of its series; `n` says how many responses remain.

The third table is each instruction's steerability (Tan et al. 2024): the slope of the share followed over the coefficient, from
none to `slope_to`, and the share of prompts that steering moves the wrong way. Beside it stands what the pairs said before any
steering (Braun et al. 2025): the agreement of the training pairs, each with the mean of the others, and d' of validation pairs
along the direction, both at the steered layer.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import tyro
from plotly.subplots import make_subplots
from study import FormatStudy, Frames, conduct, lab, line

from steerlens.errors import DataError
from steerlens.figures.theme import CONDITION_COLORS, short_label
from steerlens.stats.pareto import pareto_front
from steerlens.stats.rates import rates_and_quality
from steerlens.stats.slopes import agreement, d_prime, steerability_summary
from steerlens.steering.candidates import grid
from steerlens.study.calibration import calibrate
from steerlens.study.quality import Quality
from steerlens.study.sweeps import sweep
from steerlens.vectors.activations import Activations, record_activations
from steerlens.vectors.estimators import fit_vectors


@dataclass(frozen=True)
class Settings(FormatStudy):
    out: Path = Path("runs/analysis/coefficient_tradeoff")
    coeffs: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
    """In mean residual norms."""
    target_kl: tuple[float, ...] = (0.1, 0.5, 2.0)
    """Divergences to calibrate to, in nats per token."""
    slope_to: float = 1.0
    """The largest coefficient that counts for the slope, in mean residual norms."""


def measure(settings: Settings) -> Frames:
    quality = Quality(kl=True)
    with lab(settings) as here:
        train, valid, test = here.format_pairs()
        vectors = fit_vectors(here.model, train.by_instruction(), progress=True)
        best = here.best_for_all(
            [(vectors[name], pairs) for name, pairs in valid.by_instruction().items()], here.steps(0.5, 1.0)
        )
        layer = here.layers[0] if best.layer is None else best.layer
        rows = grid(
            layers=[layer], coeffs=settings.coeffs, operators="add", positions=best.positions, unit="resid_norm"
        )
        swept = sweep(here.sampler, vectors, test, candidates=rows, quality=quality)
        before = [record_activations(here.model, pairs, layers=[layer]).by_instruction() for pairs in (train, valid)]
        calibrated = []
        for target in settings.target_kl:
            options = {"target_kl": target, "layers": list(here.layers), "positions": best.positions}
            prompts = list(dict.fromkeys(valid.prompts("none")))[: settings.n_valid]
            found = [
                sweep(here.sampler, vector, test.filter(name), candidates=steps, quality=quality).scores.dropna(
                    subset=["layer"]
                )
                for name, vector in vectors.items()
                if (steps := calibrate(here.model, vector, prompts, **options))
            ]
            if found:
                calibrated.append(by_layer(pd.concat(found)).assign(target_kl=target))
    if not calibrated:
        raise DataError(f"no layer moves the model by any of {settings.target_kl} nats; lower --target-kl")
    return {
        "tradeoff": swept.configurations.assign(layer_was_best=best.layer is not None),
        "calibrated": pd.concat(calibrated),
        "steerability": pd.DataFrame(
            {
                "instruction": name,
                **slope_of(scores, settings.slope_to),
                **separability(before[0][name], before[1][name]),
            }
            for name, scores in swept.scores.groupby("instruction", sort=False)
        ),
    }


def slope_of(scores: pd.DataFrame, largest: float) -> dict[str, float]:
    """The share followed over coefficients from 0 to the largest: its slope, and how many prompts go down."""
    scores = scores.assign(coeff=scores["coeff"].where(scores["layer"].notna(), 0.0))
    found = steerability_summary(scores[scores["coeff"] <= largest], value="followed", sample="prompt_id")
    return {
        "n": found.n,
        "slope": found.slope,
        "slope_sd": found.slope_sd,
        "anti_steerable": found.anti_steerable,
        "anti_low": found.anti_steerable_low,
        "anti_high": found.anti_steerable_high,
        "spearman": found.spearman,
    }


def separability(fitted: Activations, others: Activations) -> dict[str, float]:
    """Agreement of the pairs that a vector is fitted on, and d' of other pairs along it; both hold one layer."""
    differences = fitted.differences[:, 0].double()
    direction = differences.mean(0) / differences.mean(0).norm()
    without, with_ = (others.resid[:, side, 0].double() @ direction for side in (0, 1))
    return {
        "agreement": agreement(differences.numpy(), leave_one_out=True),
        "d_prime": d_prime(with_.numpy(), without.numpy()),
    }


def by_layer(scores: pd.DataFrame) -> pd.DataFrame:
    """Each layer over all instructions, whose coefficients differ."""
    return rates_and_quality(scores, ["layer"])


def draw(frames: Frames) -> dict[str, go.Figure]:
    swept = frames["tradeoff"]
    front = pareto_front(swept, maximize=["rate"], minimize=["mean_repetition"]).sort_values("mean_repetition")
    figure = make_subplots(cols=2, horizontal_spacing=0.12)
    orange, grey = CONDITION_COLORS["vector"], CONDITION_COLORS["random"]
    steered = swept.dropna(subset=["layer"])
    line(figure, steered, "coeff", "followed", orange, row=1, col=1)
    line(figure, steered, "coeff", "degenerate", grey, y="degenerate", dash="dot", row=1, col=1)
    labels = [
        "none" if pd.isna(layer) else f"{coeff:g}" for layer, coeff in zip(swept["layer"], swept["coeff"], strict=True)
    ]
    figure.add_scatter(
        x=swept["mean_repetition"], y=swept["rate"], mode="markers+text", text=labels, textposition="top center",
        marker={"size": 10, "color": orange}, name="coefficient", showlegend=False, row=1, col=2,
    )  # fmt: skip
    figure.add_scatter(
        x=front["mean_repetition"], y=front["rate"], mode="lines", line={"color": "#1F2328", "dash": "dot"},
        name="Pareto front", row=1, col=2,
    )  # fmt: skip
    figure.update_yaxes(tickformat=".0%", range=[0, 1.05])
    figure.update_yaxes(title_text="responses", row=1, col=1)
    figure.update_xaxes(
        title_text="coefficient, in mean residual norms", type="log", tickvals=steered["coeff"].unique(), row=1, col=1
    )
    figure.update_xaxes(title_text="repeated trigrams", tickformat=".1%", row=1, col=2)
    layer = int(steered["layer"].iloc[0])
    figure.update_layout(
        title_text=f"Format vectors added at layer {layer}: following and quality",
        width=1000,
        height=460,
        margin={"t": 90},
    )
    return {
        "tradeoff": figure,
        "calibrated": draw_calibrated(frames["calibrated"]),
        "steerability": draw_steerability(frames["steerability"]),
    }


def draw_calibrated(table: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    for color, (target, rows) in zip(
        ("#F2A66B", "#D55E00", "#8A3C00", "#4A2000"), table.groupby("target_kl"), strict=False
    ):
        line(figure, rows, "layer", f"{target:g} nats per token", color)
    figure.update_xaxes(title_text="steered layer", dtick=1)
    figure.update_yaxes(title_text="followed", tickformat=".0%", range=[0, 1])
    return figure.update_layout(
        showlegend=True,
        title_text="Layers at equal force: format vectors at calibrated coefficients",
        width=900,
        height=440,
        margin={"t": 90},
    )


def draw_steerability(table: pd.DataFrame) -> go.Figure:
    figure = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.06)
    names = [short_label(str(name)) for name in table["instruction"]]
    for column, name, title in (
        (1, "agreement", "agreement of the pairs (cosine, leave one out)"),
        (2, "d_prime", "d' of unseen pairs, in standard deviations"),
    ):
        figure.add_scatter(
            x=table[name], y=table["slope"], mode="markers", marker={"size": 11, "color": CONDITION_COLORS["vector"]},
            hovertext=names, row=1, col=column,
        )  # fmt: skip
        varied = table[[name, "slope"]].nunique().min() > 1
        rho = f": rank correlation {table[name].corr(table['slope'], method='spearman'):.2f}" if varied else ""
        figure.update_xaxes(title_text=f"{title}{rho}", row=1, col=column)
    order = table["slope"].rank(method="first").tolist()  # neighbours have their labels above and below
    for (_, row), label, rank in zip(table.iterrows(), names, order, strict=True):
        figure.add_annotation(
            x=row["agreement"], y=row["slope"], text=label, showarrow=False, xanchor="left", xshift=8,
            yshift=7 if rank % 2 else -7, font={"size": 10},
            row=1, col=1,
        )  # fmt: skip
    figure.update_yaxes(title_text="slope: share followed per mean residual norm", row=1, col=1)
    return figure.update_layout(
        title_text="Does what the pairs say before steering tell how well it works?",
        showlegend=False, width=1100, height=520, margin={"t": 90},
    )  # fmt: skip


if __name__ == "__main__":
    conduct(tyro.cli(Settings, description=__doc__), measure, draw, ["tradeoff", "calibrated", "steerability"])
