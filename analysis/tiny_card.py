"""What the embedded models can do: rates on held-out questions and phrasings, for `analysis/tiny_card.md`.

    python analysis/tiny_card.py --out runs/tiny/card

For every instruction of the tiny world, by steerlens itself and IFEval's checks:

    1. fit a vector on training prompts (48 pairs), in the model at hand;
    2. search layer, operator and positions on other training prompts (8 per candidate);
    3. answer held-out prompts (24: entities, questions and phrasings that no training had) in the four cells and the control.

So nothing is chosen on what is reported. Closing phrases, section marks and words to include or to avoid are ones that no
training asked for. An answer is *on topic* if it names its entity and states one true fact of it. Intervals are over questions:
the answers to one question are not independent. Prints the tables of `analysis/tiny_card.md`, writes `search.csv` and
`scores.jsonl`, and draws the first model's figures into `analysis/figures`. Answers are kept in `generations.jsonl`, so running
it again goes on where it stopped.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import tyro
from draw import save
from plotly.subplots import make_subplots
from tiny_corpus import Example, examples, names_entity, phrasing, true_facts, world

from steerlens.data.conditions import CONDITIONS
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.figures.theme import CONDITION_COLORS, percent, rate_text
from steerlens.files import Journal
from steerlens.models.load import load_model
from steerlens.stats.comparisons import compare_cells
from steerlens.stats.rates import rate_table
from steerlens.steering.candidates import Candidate, grid
from steerlens.steering.plan import Plan
from steerlens.study.quality import Quality
from steerlens.study.responses import Request, Sampler, requests_for
from steerlens.study.scores import score
from steerlens.study.sweeps import sweep
from steerlens.vectors.activations import record_activations
from steerlens.vectors.estimators import fit_steering_vector
from steerlens.vectors.vector import SteeringVector


def candidates(vector: SteeringVector) -> list[Candidate]:
    """Set the projection, or take one step as long as the layer's mean residual norm, at every layer."""
    everywhere = grid(layers=vector.layers, operators="set_projection", positions=["all", "prompt", "last"])
    return everywhere + grid(layers=vector.layers, operators="add", positions=["prompt", "last"], unit="resid_norm")


SHOWN = tuple(CONDITION_COLORS)
ARGUMENTS = ("end", "sections", "include", "avoid")
"""Instructions with a free argument, which no mean over different arguments can carry."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    out: Path = Path("runs/tiny/card")
    figures: Path = Path("analysis/figures")
    models: tuple[str, ...] = ("tiny", "tiny-half", "tiny-plain")
    """Names or folders of models with a chat template."""
    instructions: tuple[str, ...] = ()
    """Names as in tiny_world/instructions.txt; default: all."""
    n_train: int = 48
    n_valid: int = 8
    n_test: int = 24
    batch_size: int = 256
    max_new_tokens: int = 160


def pairs_of(split: str, name: str, seed: int, n: int) -> tuple[PairSet, dict[str, Example]]:
    """n different pairs of one instruction, and the example behind each, by prompt id."""
    found: dict[str, Example] = {}
    pairs: list[InstructionPair] = []
    for example in examples(split, seed, 3 * n, plain=0.0, two=0.0, only=(name,)):
        kwargs = tuple(dict(one) for one in example.kwargs)
        pair = InstructionPair(
            example.query, example.instruction_text, example.instruction_ids, kwargs, prompt=example.prompt
        )
        if pair.prompt_id not in found and len(pairs) < n:
            found[pair.prompt_id] = example
            pairs.append(pair)
    return PairSet(pairs), found


def fit(model: Any, names: tuple[str, ...], n: int) -> dict[str, SteeringVector]:
    """The vector of every instruction, from training prompts."""
    return {name: fit_steering_vector(record_activations(model, pairs_of("train", name, 11, n)[0])) for name in names}


def answers(
    sampler: Sampler, requests: Mapping[str, list[Request]], found: Mapping[str, Example] | None = None
) -> pd.DataFrame:
    """Scores of requests by instruction name, which becomes the `instruction` column; on topic where examples are given."""
    rows = [request for group in requests.values() for request in group]
    names = [name for name, group in requests.items() for _ in group]
    scores = score(sampler, rows, quality=Quality(perplexity=False)).assign(instruction=names)
    if found:
        entities = [found[row.prompt_id].entity for row in scores.itertuples()]
        named = [names_entity(text, one) for text, one in zip(scores["response"], entities, strict=True)]
        facts = [bool(true_facts(text, one)) for text, one in zip(scores["response"], entities, strict=True)]
        close = [is_close(row.instruction, found[row.prompt_id].phrasings[0]) for row in scores.itertuples()]
        scores = scores.assign(names_entity=named, true_fact=facts, close_phrasing=close)
        scores["on_topic"] = scores["names_entity"] & scores["true_fact"]
    return scores


def searched(
    sampler: Sampler, vectors: Mapping[str, SteeringVector], settings: Settings
) -> tuple[pd.DataFrame, dict[str, Plan]]:
    """The table of all candidates on validation prompts, and each instruction's chosen plan."""
    tables, plans = [], {}
    for name, vector in vectors.items():
        valid, _ = pairs_of("train", name, 12, settings.n_valid)
        found = sweep(sampler, vector, valid, candidates=candidates)
        tables.append(found.table.assign(instruction=name))
        plans[name] = vector.at(found.best())
    return pd.concat(tables, ignore_index=True), plans


def measure(model: Any, vectors: Mapping[str, SteeringVector], settings: Settings) -> tuple[pd.DataFrame, ...]:
    """Search table and test scores of one model with the given vectors."""
    journal = Journal(settings.out / "generations.jsonl")
    with journal:
        sampler = Sampler(
            model,
            journal=journal,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            progress=True,
        )
        table, plans = searched(sampler, vectors, settings)
        requests, found = {}, {}
        for name in vectors:
            test, examples_ = pairs_of("heldout", name, 13, settings.n_test)
            requests[name] = requests_for(test, plans[name], conditions=CONDITIONS)
            found |= examples_
        return table, answers(sampler, requests, found)


def main(settings: Settings) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    names = settings.instructions or tuple(world().instructions)
    searches, scores = [], []
    for name in settings.models:
        model = load_model(name, progress=False)
        frames = measure(model, fit(model, names, settings.n_train), settings)
        for kept, frame in zip((searches, scores), frames, strict=True):
            kept.append(frame.assign(model=Path(name).name))
    searched, frame = pd.concat(searches), pd.concat(scores)
    searched.to_csv(settings.out / "search.csv", index=False)
    frame.to_json(settings.out / "scores.jsonl", orient="records", lines=True)
    for text in (model_table(frame), *(instruction_table(frame, name) for name in frame["model"].unique())):
        print(text, end="\n\n", flush=True)
    for name, part in frame.groupby("model", sort=False):
        compared = compare_cells(part).query("instruction == 'all'")
        print(f"{name}\n{compared.drop(columns='instruction').to_string(index=False)}", flush=True)
    draw(settings.out, settings.figures, Path(settings.models[0]).name)
    if {"tiny-half", "tiny-plain"} <= set(frame["model"]):
        draw_twins(searched, frame, settings.figures)


def draw(out: Path, figures: Path, model: str) -> None:
    """The two figures of one model, from the saved tables: its cells, and the rate at every layer."""
    scores = pd.read_json(out / "scores.jsonl", lines=True)
    search = pd.read_csv(out / "search.csv")
    rates = scores[scores["model"] == model].pivot_table(index="instruction", columns="condition", values="followed")
    rates = rates.sort_values("vector")
    fig = go.Figure()
    for i, row in enumerate(rates.to_dict("records")):
        fig.add_shape(
            type="line",
            x0=row["none"],
            x1=row["vector"],
            y0=i,
            y1=i,
            layer="below",
            line={"color": "#E6E8EB", "width": 6},
        )
    symbols = {"none": "circle", "random": "x-thin-open", "vector": "diamond", "text": "circle-open"}
    for condition, symbol in symbols.items():
        marker = {"color": CONDITION_COLORS[condition], "size": 11, "symbol": symbol, "line": {"width": 2}}
        fig.add_scatter(x=rates[condition], y=rates.index, mode="markers", name=condition, marker=marker)
    fig.update_xaxes(tickformat=".0%", range=[-0.03, 1.03], title_text="held-out answers that follow the instruction")
    fig.update_layout(title_text=f"{model}: what a vector alone brings about")
    save(fig, figures, f"{model}_cells", width=900, height=640)
    one = search[
        (search["model"] == model) & (search["operator"] == "set_projection") & (search["positions"] == "last")
    ]
    grid = one.pivot_table(index="instruction", columns="layer", values="rate").loc[rates.index]
    heat = go.Heatmap(
        z=grid, x=[str(int(layer)) for layer in grid.columns], y=grid.index, colorscale="Oranges", zmin=0, zmax=1,
        colorbar={"tickformat": ".0%", "title": {"text": "followed"}}, xgap=1, ygap=1,
    )  # fmt: skip
    fig = go.Figure(heat).update_xaxes(title_text="layer whose residual is steered, at the last prompt token only")
    fig.update_layout(title_text=f"{model}: where each instruction can be set (validation prompts)")
    save(fig, figures, f"{model}_layers", width=760, height=640)


TWINS = {"tiny-half": "#D55E00", "tiny-plain": "#0072B2"}


def draw_twins(search: pd.DataFrame, scores: pd.DataFrame, figures: Path) -> None:
    """What hiding the instruction in training changes: the twins' vectors, by instruction and by layer."""
    fig = make_subplots(cols=2, column_widths=[0.6, 0.4], horizontal_spacing=0.1)
    cells = scores[scores["model"].isin(TWINS)].pivot_table(
        index="instruction", columns=["model", "condition"], values="followed"
    )
    cells = cells.sort_values([("tiny-half", "vector"), ("tiny-plain", "vector")])
    for name, color in TWINS.items():
        label = {"tiny-half": "hidden in 60 % of training", "tiny-plain": "never hidden"}[name]
        for condition, symbol, size in (("text", "line-ns-open", 12), ("vector", "diamond", 11)):
            marker = {"color": color, "symbol": symbol, "size": size, "line": {"width": 2, "color": color}}
            fig.add_scatter(
                x=cells[name, condition], y=cells.index, mode="markers", marker=marker, name=f"{label}: {condition}",
                row=1, col=1,
            )  # fmt: skip
        steered = search[(search["model"] == name) & search["layer"].notna() & (search["operator"] == "set_projection")]
        for positions, dash in (("last", "solid"), ("all", "dot")):
            rate = steered[steered["positions"] == positions].groupby("layer")["rate"].mean()
            line = {"color": color, "dash": dash}
            fig.add_scatter(
                x=rate.index, y=rate, mode="lines", line=line, name=f"{label}: {positions} tokens steered", row=1, col=2
            )
    fig.update_xaxes(tickformat=".0%", range=[-0.03, 1.03], title_text="held-out answers that follow", row=1, col=1)
    fig.update_xaxes(title_text="steered layer", dtick=1, row=1, col=2)
    fig.update_yaxes(
        tickformat=".0%", range=[0, 1], title_text="followed, mean over instructions (validation)", row=1, col=2
    )
    legend = {"y": -0.12, "yanchor": "top"}
    fig.update_layout(title_text="Twins: what hiding the instruction in training changes", legend=legend)
    save(fig, figures, "tiny_twins", width=1080, height=720)


def model_table(scores: pd.DataFrame) -> str:
    """A few lines per model, in markdown: rates over all prompts and over some, and on-topic shares
    (without fixed answers, which state no fact, and Spanish ones, many of whose values have other forms there)."""
    header = "| model | what | none | random | vector | text | text+vector |"
    lines = [header, "|---|---|---|---|---|---|---|"]
    for name, part in scores.groupby("model", sort=False):
        argued = part["instruction"].isin(ARGUMENTS)
        topical = part[~part["instruction"].isin(("constrained", "spanish"))]
        rows = {
            "all instructions": part,
            "without free arguments": part[~argued],
            "with free arguments": part[argued],
            "phrasings close to a training one": part[part["close_phrasing"]],
            "phrasings two words away or more": part[~part["close_phrasing"]],
            "on topic": topical.assign(followed=topical["on_topic"]),
        }
        for what, some in rows.items():
            if len(some):
                lines.append(f"| {name} | {what} | {' | '.join(intervals(some))} |")
    return "\n".join(lines)


def is_close(name: str, heldout: str, n: int = 4000) -> bool:
    """Whether one of n training phrasings of an instruction is at most one word away from a held-out one."""
    return not one_word_less(heldout).isdisjoint(near_training(name, n))


@cache
def near_training(name: str, n: int) -> frozenset[tuple[str, ...]]:
    rng, section = random.Random(name), world().instructions[name]
    return frozenset().union(*(one_word_less(phrasing(section, "train", rng)) for _ in range(n)))


def one_word_less(text: str) -> frozenset[tuple[str, ...]]:
    """The words of a text, and all of them but one: two texts that share one of these differ in one word or none."""
    words = tuple(re.findall(r"[\w{}]+", text.casefold()))
    return frozenset({words, *(words[:i] + words[i + 1 :] for i in range(len(words)))})


def intervals(scores: pd.DataFrame) -> list[str]:
    """The rate of each condition with its interval over questions."""
    table = rate_table(scores, ["condition"], clusters="query").set_index("condition").loc[list(SHOWN)]
    return [rate_text(row) for row in table.to_dict("records")]


def instruction_table(scores: pd.DataFrame, model: str) -> str:
    """One line per instruction, in markdown: followed in each cell, where the vector was applied, and on-topic shares."""
    part = scores[scores["model"] == model]
    header = " | ".join(SHOWN)
    lines = [f"**{model}** (n = {part.groupby(['instruction', 'condition']).size().min()} per cell)", ""]
    lines += [
        f"| instruction | {header} | vector at | on topic: none | vector | text |",
        "|---" * (len(SHOWN) + 5) + "|",
    ]
    for name, rows in part.groupby("instruction", sort=False):
        cells = rows.groupby("condition")[["followed", "on_topic"]].mean()
        rates = " | ".join(percent(cells.loc[condition, "followed"]) for condition in SHOWN)
        topic = " | ".join(percent(cells.loc[condition, "on_topic"]) for condition in ("none", "vector", "text"))
        first = rows[rows["condition"] == "vector"].iloc[0]
        where = (
            f"layer {first['layer']:.0f}, {first['operator']}, {first['positions']}"
            if first["operator"]
            else "not steered"
        )
        lines.append(f"| {name} | {rates} | {where} | {topic} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
