"""Several vectors at once: who disturbs whom? (Stolfo et al. 2025, section 6)

    python analysis/composition.py --out runs/analysis/composition

Every format instruction's vector is applied alone and together with every other one, and with conciseness, to bare queries: row
A, column B of `pairs.csv` is the rate of A's check under both, next to A's under its own vector alone. Each vector keeps the
layer, position and operator that its own search chose (conciseness: by answers of one sentence); two vectors at one layer act
one after the other. `length.csv`: a format and "at most n sentences" together, each asked for by text, by vector, or by both.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import tyro
from study import FormatStudy, Frames, Lab, conduct, lab

from steerlens.checks.registry import check_all
from steerlens.data.families import length_pairs, sentence_pairs
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.figures.theme import short_label
from steerlens.stats.rates import rate_table
from steerlens.steering.plan import Plan
from steerlens.study.quality import Quality
from steerlens.study.responses import requests_for
from steerlens.study.scores import score
from steerlens.study.sweeps import sweep
from steerlens.vectors.estimators import fit_vectors

CONCISE = "conciseness"


@dataclass(frozen=True)
class Settings(FormatStudy):
    out: Path = Path("runs/analysis/composition")
    n_test: int = 12
    n_sentences: int = 2
    """Of the request "at most n sentences"."""
    coeffs: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Of conciseness, to search, in mean residual norms."""


def measure(settings: Settings) -> Frames:
    with lab(settings) as here:
        train, valid, test = here.format_pairs()
        vectors = fit_vectors(here.model, train.by_instruction(), progress=True)
        found = sweep(here.sampler, vectors, valid, layers=here.layers, positions=list(settings.positions))
        plans = {name: vector.at(found.best(name)) for name, vector in vectors.items()}
        concise = fit_vectors(here.model, {CONCISE: length_pairs(here.train, "extremely_short")})[CONCISE]
        brief = sentence_pairs(here.valid, "at_most", 1)
        short = concise.at(here.best_for_all([(concise, brief)], here.steps(*settings.coeffs), strict=True))
        return {
            "pairs": compared(here, test, plans, plans | {CONCISE: short}),
            "length": with_length(here, settings, test, plans, short),
        }


def compared(here: Lab, test: PairSet, plans: dict[str, Plan], others: dict[str, Plan]) -> pd.DataFrame:
    """Each instruction's rate under its own plan with each other plan; the instruction itself stands for "alone"."""
    requests, companions = [], []
    for name, pairs in test.by_instruction().items():
        for other, plan in others.items():
            both = plans[name] if other == name else plans[name] + plan
            rows = requests_for(pairs, both, conditions=["vector"])
            requests += rows
            companions += [other] * len(rows)
    scores = score(here.sampler, requests, quality=Quality(perplexity=False)).assign(companion=companions)
    table = rate_table(scores, ["instruction", "companion"])
    alone = table[table["instruction"] == table["companion"]].set_index("instruction")["rate"]
    table["mean_words"] = scores.groupby(["instruction", "companion"], sort=False)["n_words"].mean().to_numpy()
    table["alone"] = table["instruction"].map(alone)
    return table.assign(change=table["rate"] - table["alone"])


def with_length(here: Lab, settings: Settings, test: PairSet, plans: dict[str, Plan], short: Plan) -> pd.DataFrame:
    """Format and length asked for together: rates of each under no vector, one, and both, without and with the text."""
    lengths = {
        pair.query_key: pair
        for pair in sentence_pairs([str(pair.query) for pair in test], "at_most", settings.n_sentences)
    }
    both = PairSet(joined(pair, lengths[pair.query_key]) for pair in test)
    rows = []
    for steered in ("none", "format", "length", "format+length"):
        chosen = {
            name: Plan(((*plan,) if "format" in steered else ()) + ((*short,) if "length" in steered else ()))
            for name, plan in plans.items()
        }
        by_pair = {pair.instruction_id: chosen[pair.instruction_ids[0]] for pair in both}
        requests = requests_for(both, by_pair, conditions=["vector", "text+vector"])
        records = here.sampler.generate(requests)
        for part, index in (("format", 0), ("length", 1)):
            frame = pd.DataFrame(
                {
                    "text": "with the text" if request.condition == "text+vector" else "bare query",
                    "followed": verdict(request.pair, record["text"], index),
                    "query": request.pair.query,
                }
                for request, record in zip(requests, records, strict=True)
            )
            rows.append(rate_table(frame, ["text"], clusters="query").assign(vectors=steered, measured=part))
    return pd.concat(rows)


def verdict(pair: InstructionPair, text: str, index: int) -> bool:
    """Whether one of the pair's two instructions is followed: the format (the first id) loosely, a count strictly."""
    first, *rest = check_all(text, pair.instruction_ids, pair.kwargs)
    return first.loose if index == 0 else all(one.strict for one in rest)


def joined(one: InstructionPair, other: InstructionPair) -> InstructionPair:
    """One query with both instructions, one after the other."""
    return InstructionPair(
        one.query,
        f"{one.instruction} {other.instruction}",
        (*one.instruction_ids, *other.instruction_ids),
        (*one.kwargs, *other.kwargs),
    )


def draw(frames: Frames) -> dict[str, go.Figure]:
    table = frames["pairs"]
    order = [*table["instruction"].unique(), CONCISE]
    change = table.pivot(index="instruction", columns="companion", values="change").reindex(
        index=order[:-1], columns=order
    )
    rate = table.pivot(index="instruction", columns="companion", values="rate").reindex(index=order[:-1], columns=order)
    names = [short_label(name) for name in order]
    rates = [[f"{value:.0%}" for value in row] for row in rate.to_numpy()]
    heat = go.Heatmap(
        z=change, x=names, y=names[:-1], zmin=-1, zmid=0, zmax=1, colorscale="RdBu", xgap=1, ygap=1, text=rates,
        texttemplate="%{text}", colorbar={"tickformat": "+.0%", "title": {"text": "change"}},
    )  # fmt: skip
    figure = go.Figure(heat)
    figure.update_xaxes(title_text="together with the vector of", tickangle=-35)
    figure.update_yaxes(title_text="followed", autorange="reversed")
    title = "Two vectors at once: rates of the row's instruction, and the change by the second vector"
    return {
        "pairs": figure.update_layout(title_text=title, width=1040, height=680),
        "length": draw_length(frames["length"]),
    }


def draw_length(table: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    colors = {("format", "bare query"): "#F2A66B", ("format", "with the text"): "#D55E00"}
    colors |= {("length", "bare query"): "#8EC5E8", ("length", "with the text"): "#0072B2"}
    for (measured, text), color in colors.items():
        rows = table[(table["measured"] == measured) & (table["text"] == text)]
        bars = {"type": "data", "array": rows["high"] - rows["rate"], "arrayminus": rows["rate"] - rows["low"]}
        figure.add_bar(x=rows["vectors"], y=rows["rate"], error_y=bars, marker_color=color, name=f"{measured}, {text}")
    figure.update_xaxes(title_text="vectors applied")
    figure.update_yaxes(title_text="followed", tickformat=".0%", range=[0, 1.03])
    title = "A format and a length at once: how often each is followed"
    return figure.update_layout(title_text=title, barmode="group", width=900, height=460, margin={"t": 90})


if __name__ == "__main__":
    conduct(tyro.cli(Settings, description=__doc__), measure, draw, ["pairs", "length"])
