"""What steering costs, instruction by instruction (the reviewers' question to Stolfo et al. 2025).

    python analysis/quality_by_instruction.py --out runs/analysis/quality_by_instruction
    python analysis/quality_by_instruction.py --judge-url http://localhost:8000/v1 --judge-model NAME
    python analysis/quality_by_instruction.py --reward-model FOLDER

Format instructions in the four cells, as `format_four_cells.py` has them. For each instruction and cell: the rate, and beside it
the perplexity under the unsteered model given the bare query (the median), repetition, distinct bigrams, words, divergence from
the unsteered model in nats per token, and where they are given a reward model's score and a judge's. The figure sets what is
gained in following against what is lost in quality.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import tyro
from study import FormatStudy, Frames, conduct, run_cells

from steerlens.figures.theme import CONDITION_COLORS, short_label
from steerlens.study.judge import Judge, judge_frame


@dataclass(frozen=True)
class Settings(FormatStudy):
    out: Path = Path("runs/analysis/quality_by_instruction")
    reward_model: str | None = None
    """A reward model's folder or hub id."""
    judge_url: str | None = None
    """A server that speaks the OpenAI protocol."""
    judge_model: str = ""
    """The judge's name there."""


def measure(settings: Settings) -> Frames:
    evaluation = run_cells(settings, reward_model=settings.reward_model)
    table = evaluation.table
    if settings.judge_url is not None:
        judge = Judge(settings.judge_url, settings.judge_model, cache=settings.out / "judged.jsonl")
        judged = judge_frame(evaluation.scores, judge)
        judged = pd.concat([judged, judged.assign(instruction="all")])
        means = (
            judged.groupby(["instruction", "condition"])["quality"]
            .agg(mean_judge="mean", n_judged="count")
            .reset_index()
        )
        table = table.merge(means, on=["instruction", "condition"], how="left")
    return {"quality": table}


def draw(frames: Frames) -> dict[str, go.Figure]:
    table = frames["quality"]
    table = table[table["instruction"] != "all"]
    figure = go.Figure()
    for before, after in (("none", "vector"), ("text", "text+vector")):
        one, two = (table[table["condition"] == name].set_index("instruction") for name in (before, after))
        gain = two["rate"] - one["rate"]
        cost = np.log2(two["median_perplexity"] / one["median_perplexity"])
        # What the vector did not change has no room for a name: it all lies at the origin.
        names = [short_label(name) if abs(gain[name]) > 0.01 or abs(cost[name]) > 0.1 else "" for name in gain.index]
        sides = np.where(cost < 1.5, "middle right", "middle left")  # away from the edges
        figure.add_scatter(
            x=cost, y=gain, mode="markers+text", text=names, name=f"{after} against {before}", hovertext=gain.index,
            textposition=sides, textfont={"size": 10}, marker={"size": 10, "color": CONDITION_COLORS[after]},
        )  # fmt: skip
    figure.add_hline(y=0, line={"color": "#858B94", "width": 1})
    figure.add_vline(x=0, line={"color": "#858B94", "width": 1})
    figure.update_xaxes(title_text="perplexity of the answers, doublings")
    figure.update_yaxes(title_text="change of the rate", tickformat="+.0%")
    title = "What each vector gains in following, and what it costs"
    return {"quality": figure.update_layout(title_text=title, width=1000, height=600, margin={"t": 90})}


if __name__ == "__main__":
    conduct(tyro.cli(Settings, description=__doc__), measure, draw, ["quality"])
