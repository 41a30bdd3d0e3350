"""Vectors of one model in another: as they are, and through a ridge map (Stolfo et al. 2025, section 7, and beyond).

    python analysis/cross_model.py --out runs/analysis/cross_model                                      # tiny -> tiny-base
    python analysis/cross_model.py --out runs/analysis/cross_real --source smollm2-135m --model tiny    # other architecture

Format vectors are fitted in the source and applied to the target (`--model`), whose layers are searched anew. "as it is" needs
equal widths and depths; "mapped" fits the vector on activations that went through a ridge map, fitted on residuals of the same
training texts in both models, without those of the instruction that is carried (with them, the map would know the target's own
vector). `maps.csv` says how well each of these maps predicts residuals of unseen texts with and without that instruction (R2),
and how near the mapped vector comes to the target's own (cosine); its rows "all" are of a map fitted on every instruction. The
target's own vectors and random directions of equal norm stand beside them; tests are bare queries.
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import torch
import tyro
from plotly.subplots import make_subplots
from study import FormatStudy, Frames, conduct, lab

from steerlens.models.load import load_model
from steerlens.stats.comparisons import compare_cells
from steerlens.stats.rates import rate_table
from steerlens.steering.candidates import grid
from steerlens.study.quality import Quality
from steerlens.study.responses import requests_for
from steerlens.study.scores import score
from steerlens.study.sweeps import sweep
from steerlens.vectors.activations import Activations, record_activations
from steerlens.vectors.estimators import fit_steering_vector
from steerlens.vectors.transfer import fit_ridge_map


@dataclass(frozen=True)
class Settings(FormatStudy):
    out: Path = Path("runs/analysis/cross_model")
    model: str = "tiny-base"
    """The target."""
    source: str = "tiny"
    """Where the vectors come from."""


def measure(settings: Settings) -> Frames:
    quality = Quality(perplexity=False)
    source = load_model(settings.source, dtype=settings.dtype)
    with lab(settings) as here, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was fitted in")  # that is the experiment
        train, valid, test = here.format_pairs()
        theirs = record_activations(source, train, progress=True)
        own = record_activations(here.model, train, progress=True)
        unseen = record_activations(source, test), record_activations(here.model, test)
        mapped, maps = mapped_without_itself(theirs, own, *unseen)
        fits = {"own": own.by_instruction(), "mapped": mapped}
        same = all(getattr(source.cfg, size) == getattr(here.model.cfg, size) for size in ("d_model", "n_layers"))
        if same:
            fits["as it is"] = theirs.by_instruction()
        frames, compared = [], []
        for kind, parts in fits.items():
            vectors = {name: fit_steering_vector(part) for name, part in parts.items()}
            candidates = grid(layers=here.layers, positions=list(settings.positions))
            found = sweep(here.sampler, vectors, valid, candidates=candidates)
            plans = {name: vector.at(found.best(name)) for name, vector in vectors.items()}
            requests = requests_for(test, plans, conditions=["none", "vector", "random"], seed=settings.seed)
            scores = score(here.sampler, requests, quality=quality).assign(vectors=kind)
            overall, keys = scores.assign(instruction="all"), ["vectors", "instruction", "condition"]
            frames.append(rate_table(pd.concat([scores, overall]), keys, clusters="query"))
            compared.append(compare_cells(scores).assign(vectors=kind))
        return {"cells": pd.concat(frames), "comparisons": pd.concat(compared), "maps": maps}


def mapped_without_itself(
    theirs: Activations, own: Activations, their_test: Activations, own_test: Activations
) -> tuple[dict[str, Activations], pd.DataFrame]:
    """Each instruction's source activations through a map fitted on the other instructions' texts; and how good the maps are."""
    tests = their_test.by_instruction(), own_test.by_instruction()
    whole = fit_ridge_map(theirs, own)
    found, rows = {}, [whole.scores(their_test, own_test).assign(instruction="all")]
    for name, part in theirs.by_instruction().items():
        others = [index for index, one in enumerate(theirs.instructions) if one != name]
        ridge = fit_ridge_map(*(subset(one, others) for one in (theirs, own)))
        found[name] = ridge.transform(part)
        mapped, target = (one.differences.mean(0) for one in (found[name], own.by_instruction()[name]))
        near = torch.cosine_similarity(mapped, target, dim=-1).tolist()
        rows.append(ridge.scores(*(test[name] for test in tests)).assign(instruction=name, cosine=near))
    return found, pd.concat(rows)


def subset(activations: Activations, indices: list[int]) -> Activations:
    return replace(
        activations,
        resid=activations.resid[indices],
        prompt_ids=tuple(activations.prompt_ids[index] for index in indices),
        instructions=tuple(activations.instructions[index] for index in indices),
    )


def draw(frames: Frames) -> dict[str, go.Figure]:
    table = frames["cells"]
    figure = make_subplots(cols=2, column_widths=[0.62, 0.38], horizontal_spacing=0.14)
    overall = table[table["instruction"] == "all"]
    bars = [("no vector", "own", "none", "#C2C6CC")]
    colors = {"own": "#0072B2", "mapped": "#009E73", "as it is": "#D55E00"}
    for kind in ("own", "as it is", "mapped"):
        bars += [(kind, kind, "vector", colors[kind]), (f"{kind}, random", kind, "random", "#858B94")]
    for label, kind, condition, color in bars:
        rows = overall[(overall["vectors"] == kind) & (overall["condition"] == condition)]
        if len(rows):
            error = {"type": "data", "array": rows["high"] - rows["rate"], "arrayminus": rows["rate"] - rows["low"]}
            figure.add_bar(x=[label], y=rows["rate"], error_y=error, marker_color=color, showlegend=False, row=1, col=1)
    maps = frames["maps"][frames["maps"]["instruction"] != "all"].groupby("layer")[["r2", "cosine"]].mean()
    for name, dash, label in (("r2", "solid", "R² of residuals"), ("cosine", "dot", "cosine of vectors")):
        figure.add_scatter(
            x=maps.index, y=maps[name], mode="lines+markers", line={"color": colors["mapped"], "dash": dash}, name=label,
            row=1, col=2,
        )  # fmt: skip
    figure.update_yaxes(title_text="followed", tickformat=".0%", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(
        title_text="mean over the carried instructions", range=[min(0, maps.min().min()) - 0.02, 1.02], row=1, col=2
    )
    figure.update_xaxes(tickangle=-30, row=1, col=1)
    figure.update_xaxes(title_text="target layer", row=1, col=2)
    figure.update_layout(
        title_text="Vectors of another model, bare queries",
        width=1000,
        height=480,
        legend={"x": 0.68, "y": 1.02, "yanchor": "bottom"},
    )
    return {"cross_model": figure}


if __name__ == "__main__":
    conduct(tyro.cli(Settings, description=__doc__), measure, draw, ["cells", "comparisons", "maps"])
