"""Length: conciseness and verbosity, at most, exactly and at least n sentences (Stolfo et al. 2025, section 4).

    python analysis/length.py --out runs/analysis/length
    python analysis/length.py --out runs/analysis/length_real --model smollm2-135m --batch-size 32 --n-test 12 --ns 1 3 5 \\
        --data ifeval_single_keyword_include.jsonl

Vectors: one per level of length, and one per exact number of sentences. "At most n" is steered by the vector of the level
extremely_short, "at least n" by extremely_verbose, "exactly n" by n's own; all are added, at the layer, position and coefficient
(in mean residual norms) that do best on validation queries with the text in the prompt. `levels.csv`: words and sentences of
answers to bare queries under each level's vector. `sentences.csv`: the rate for each n with the text, and with text and vector.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import tyro
from plotly.subplots import make_subplots
from study import Frames, Lab, Study, conduct, lab, line

from steerlens.data.families import LENGTH_LEVELS, RELATIONS, length_pairs, sentence_count, sentence_pairs
from steerlens.figures.theme import CONDITION_COLORS
from steerlens.stats.comparisons import bootstrap_mean, compare_conditions
from steerlens.stats.rates import rate_table
from steerlens.stats.words import words
from steerlens.steering.plan import Plan
from steerlens.study.quality import Quality
from steerlens.study.responses import requests_for
from steerlens.study.scores import score
from steerlens.vectors.estimators import fit_vectors
from steerlens.vectors.vector import SteeringVector


@dataclass(frozen=True)
class Settings(Study):
    out: Path = Path("runs/analysis/length")
    ns: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Numbers of sentences."""
    coeffs: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Steps to search, in mean residual norms."""


def measure(settings: Settings) -> Frames:
    with lab(settings) as here:
        sets: dict[str, Any] = {level: length_pairs(here.train, level) for level in LENGTH_LEVELS}
        sets |= {f"exactly {n}": sentence_pairs(here.train, "exactly", n) for n in settings.ns}
        vectors = fit_vectors(here.model, sets, progress=True)
        plans = {relation: plan_for(here, settings, vectors, relation) for relation in RELATIONS}
        found = [rated(here, settings, relation, plans[relation]) for relation in RELATIONS]
        scores = pd.concat(frame for _, frame in found)
        compared = compare_conditions(
            scores, baseline="text", by=("relation", "sentences_asked"), value="followed_strict"
        )
        return {
            "sentences": pd.concat(table for table, _ in found),
            "comparisons": compared,
            "levels": levels(here, settings, vectors),
        }


def plan_for(
    here: Lab, settings: Settings, vectors: dict[str, SteeringVector], relation: Any
) -> dict[int, tuple[Plan, str]]:
    """For each n the plan, and in words where it acts: chosen over all n on validation queries."""
    levels = {"at_most": "extremely_short", "at_least": "extremely_verbose"}
    own = {n: vectors[levels.get(relation, f"exactly {n}")] for n in settings.ns}
    groups = [(own[n], sentence_pairs(here.valid, relation, n)) for n in settings.ns]
    best = here.best_for_all(groups, here.steps(*settings.coeffs), condition="text+vector", strict=True)
    where = "none" if best.layer is None else f"layer {best.layer}, {best.positions}, {best.coeff:g} norms"
    return {n: (vector.at(best), where) for n, vector in own.items()}


def rated(here: Lab, settings: Settings, relation: Any, plans: dict[int, tuple[Plan, str]]) -> tuple[pd.DataFrame, ...]:
    """The rate for each n, with the text alone and with the vector; and the scores behind it."""
    rows, answered = [], []
    for n, (plan, where) in plans.items():
        pairs = sentence_pairs(here.test, relation, n)
        requests = requests_for(pairs, plan, conditions=["text", "text+vector"], seed=settings.seed)
        scores = score(here.sampler, requests, quality=Quality(perplexity=False))
        counts = scores["response"].map(sentence_count)
        table = rate_table(scores, ["condition"], "followed_strict").assign(
            relation=relation, sentences_asked=n, steered_at=where
        )
        table["mean_sentences"] = counts.groupby(scores["condition"], sort=False).mean().to_numpy()
        table["mean_words"] = scores.groupby("condition", sort=False)["n_words"].mean().to_numpy()
        table["cut"] = scores["finish_reason"].eq("length").groupby(scores["condition"], sort=False).mean().to_numpy()
        rows.append(table)
        answered.append(scores.assign(relation=relation, sentences_asked=n))
    return pd.concat(rows), pd.concat(answered)


def levels(here: Lab, settings: Settings, vectors: dict[str, SteeringVector]) -> pd.DataFrame:
    """Words and sentences of answers to bare queries: as they are, and under each level's vector at each coefficient."""
    layer = here.layers[len(here.layers) // 2]
    pairs = length_pairs(here.test, "medium")  # any pairs of the test queries: only the queries are asked
    rows = []
    for level in LENGTH_LEVELS:
        for coeff in (0.0, *settings.coeffs):
            plan = vectors[level].at(
                layer, coeff=coeff, operator="add", unit="resid_norm", positions=settings.positions[-1]
            )
            requests = requests_for(pairs, plan, conditions=["vector"], seed=settings.seed)
            records = here.sampler.generate(requests)
            counts = [len(words(record["text"])) for record in records]
            mean = bootstrap_mean(counts)
            row = {"level": level, "coeff": coeff, "layer": layer, "n": len(counts), "mean_words": mean.mean}
            rows.append(row | {"low": mean.low, "high": mean.high})
            rows[-1]["cut"] = sum(record["finish_reason"] == "length" for record in records) / len(records)
            rows[-1]["mean_sentences"] = sum(sentence_count(record["text"]) for record in records) / len(records)
    return pd.DataFrame(rows)


def draw(frames: Frames) -> dict[str, go.Figure]:
    names = {"at_most": "at most n sentences", "exactly": "exactly n", "at_least": "at least n"}
    figure = make_subplots(cols=3, shared_yaxes=True, subplot_titles=list(names.values()), horizontal_spacing=0.04)
    for col, relation in enumerate(names, 1):
        table = frames["sentences"]
        table = table[table["relation"] == relation]
        for condition, rows in table.groupby("condition"):
            line(figure, rows, "sentences_asked", condition, CONDITION_COLORS[condition], row=1, col=col)
            figure.data[-1].showlegend = col == 1
    figure.update_xaxes(title_text="n", dtick=1)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.03])
    figure.update_yaxes(title_text="followed", col=1)
    figure.update_layout(
        title_text="Numbers of sentences", width=1000, height=440, margin={"t": 110}, legend={"y": 1.12}
    )
    return {"sentences": figure, "levels": draw_levels(frames["levels"])}


def draw_levels(table: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    colors = ("#7F2704", "#D55E00", "#858B94", "#56B4E9", "#0072B2")
    for color, level in zip(colors, LENGTH_LEVELS, strict=True):
        rows = table[table["level"] == level]
        bars = {
            "type": "data",
            "array": rows["high"] - rows["mean_words"],
            "arrayminus": rows["mean_words"] - rows["low"],
        }
        figure.add_scatter(
            x=rows["coeff"], y=rows["mean_words"], error_y=bars | {"thickness": 1}, name=level.replace("_", " "),
            mode="lines+markers", line={"color": color},
        )  # fmt: skip
    figure.update_xaxes(title_text="coefficient, in mean residual norms")
    figure.update_yaxes(title_text="words per answer", rangemode="tozero")
    layer = table["layer"].iloc[0]
    title = f"Length vectors added at layer {layer}, bare queries"
    return figure.update_layout(title_text=title, width=900, height=460, margin={"t": 90})


if __name__ == "__main__":
    conduct(tyro.cli(Settings, description=__doc__), measure, draw, ["sentences", "comparisons", "levels"])
