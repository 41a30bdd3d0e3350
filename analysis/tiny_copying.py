"""How well a tiny model copies, and which of its heads do it.

    python analysis/tiny_copying.py --out runs/analysis/tiny_copying

*Accuracy*: the share of tokens of a repetition that the model predicts, from the second token on (where a repetition begins
cannot be known), in texts of `tiny_copies` that no training had; beside it the same repetitions with nothing before them, which
is what language alone predicts. *Heads*: in lists of words that come twice, the mean attention from a token of the second time
to the token that followed the same one the first time, which is what an induction head attends to (Olsson et al. 2022,
"In-context Learning and Induction Heads"). *Ablation*: the accuracy on these lists when the outputs of the heads with the
highest scores are set to zero, one after another, against as many heads drawn at random from the others; on other lists than
those that the scores are from.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
import tyro
from draw import save
from plotly.subplots import make_subplots
from tiny_copies import VERBATIM, copies, some_words
from train_tiny import copy_tokens

from steerlens.figures.theme import rate_text
from steerlens.files import write_atomically
from steerlens.models.load import load_model
from steerlens.stats.rates import rate_table

UNSEEN = 1_000_003  # a seed that no training drew from
Head = tuple[int, int]  # layer, head


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    out: Path = Path("runs/analysis/tiny_copying")
    figures: Path = Path("analysis/figures")
    models: tuple[str, ...] = ("tiny-base", "tiny")
    """The heads of the first are drawn."""
    n_texts: int = 400
    n_lists: int = 60
    n_ablated: int = 6
    """Heads that are taken out, one after another."""


@torch.no_grad()
def accuracy(model: Any, n: int) -> pd.DataFrame:
    """One row per token of a repetition: its kind and text, and whether it is predicted with and without what came before."""
    rows = []
    for number, copy in enumerate(copies(UNSEEN, n)):
        ids, repetitions = copy_tokens(model.tokenizer, copy)
        inside = repetitions[0]
        alone = [ids[0], *ids[inside[0] : inside[-1] + 1]]
        best, best_alone = (model(torch.tensor([one]))[0].argmax(-1).tolist() for one in (ids, alone))
        for place, i in enumerate(inside[1:], 2):
            right = {"copied": best[i - 1] == ids[i], "alone": best_alone[place - 1] == ids[i]}
            rows.append({"kind": copy.kind, "text": number} | right)
    return pd.DataFrame(rows)


def word_lists(model: Any, n: int) -> list[tuple[list[int], int]]:
    """Token ids of a list of words that comes twice, and how far apart the two are."""
    rng = random.Random(UNSEEN)
    found = []
    for _ in range(n):
        once = model.tokenizer("\n" + " ".join(some_words(rng, 8, 16)), add_special_tokens=False)["input_ids"]
        found.append(([model.tokenizer.bos_token_id, *once, *once], len(once)))
    return found


@torch.no_grad()
def induction_scores(model: Any, lists: Sequence[tuple[list[int], int]]) -> pd.DataFrame:
    """Mean attention of every head from the second time to the token after the first time: layers by heads."""
    total = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    for ids, apart in lists:
        _, cache = model.run_with_cache(
            torch.tensor([ids]), names_filter=lambda name: name.endswith("attn.hook_pattern")
        )
        queries = torch.arange(apart + 2, len(ids) - 1)
        for layer in range(model.cfg.n_layers):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
            total[layer] += pattern[:, queries, queries - apart + 1].mean(-1)
    return pd.DataFrame(total.numpy() / len(lists))


@torch.no_grad()
def accuracy_without(model: Any, lists: Sequence[tuple[list[int], int]], heads: Collection[Head]) -> float:
    """Share of the second lists' tokens that are predicted while these heads write nothing."""

    def silence(z: torch.Tensor, hook: Any) -> torch.Tensor:
        layer = int(hook.name.split(".")[1])
        z[:, :, [head for at, head in heads if at == layer]] = 0.0
        return z

    hooks = [(f"blocks.{layer}.attn.hook_z", silence) for layer in sorted({layer for layer, _ in heads})]
    good = []
    for ids, apart in lists:
        best = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks)[0].argmax(-1).tolist()
        good += [best[i - 1] == ids[i] for i in range(apart + 3, len(ids))]
    return sum(good) / len(good)


def ablated(model: Any, lists: Sequence[tuple[list[int], int]], scores: pd.DataFrame, n: int) -> pd.DataFrame:
    """Accuracy without the n heads of highest score, one more at a time, and without as many others (a mean of five draws)."""
    ranked = [(int(layer), int(head)) for layer, head in scores.stack().sort_values(ascending=False).index]
    rng = random.Random(UNSEEN)
    draws = [rng.sample(ranked[n:], n) for _ in range(5)]
    rows = []
    for k in range(n + 1):
        others = [accuracy_without(model, lists, heads[:k]) for heads in draws]
        rows.append({"heads": "induction heads", "n": k, "accuracy": accuracy_without(model, lists, ranked[:k])})
        rows.append({"heads": "other heads", "n": k, "accuracy": sum(others) / len(others)})
    return pd.DataFrame(rows)


def table(frame: pd.DataFrame) -> str:
    """Accuracy by kind of text, in markdown."""
    lines = ["| repetition | tokens | copied | without the first time |", "|---|---|---|---|"]
    verbatim = frame[frame["kind"].isin(VERBATIM)]
    for name, part in [*frame.groupby("kind"), ("all but turned", verbatim), ("all", frame)]:
        cells = [rate_text(rate_table(part, [], value, clusters="text").iloc[0]) for value in ("copied", "alone")]
        lines.append(f"| {name} | {len(part)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(scores: pd.DataFrame, without: pd.DataFrame, name: str) -> go.Figure:
    """The heads' scores as a map, and what is left of copying without them."""
    fig = make_subplots(cols=2, column_widths=[0.5, 0.5], horizontal_spacing=0.18)
    heat = go.Heatmap(
        z=scores, x=[str(head) for head in scores.columns], y=[str(layer) for layer in scores.index], zmin=0, zmax=1,
        colorscale="Oranges", xgap=1, ygap=1, texttemplate="%{z:.2f}", showscale=False,
    )  # fmt: skip
    fig.add_trace(heat, row=1, col=1)
    for which, color in (("induction heads", "#D55E00"), ("other heads", "#858B94")):
        part = without[without["heads"] == which]
        fig.add_scatter(
            x=part["n"], y=part["accuracy"], name=which, mode="lines+markers", line_color=color, row=1, col=2
        )
    fig.update_xaxes(title_text="head", row=1, col=1).update_yaxes(title_text="layer", row=1, col=1)
    fig.update_xaxes(title_text="heads that write nothing", dtick=1, row=1, col=2)
    fig.update_yaxes(title_text="copied", tickformat=".0%", range=[0, 1.03], row=1, col=2)
    title = f"{name}: attention to the token after the last time, and copying without these heads"
    return fig.update_layout(title_text=title, legend={"y": -0.2, "yanchor": "top"})


def main(settings: Settings) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    for name in settings.models:
        model = load_model(name, progress=False)
        frame = accuracy(model, settings.n_texts)
        print(f"{name}\n\n{table(frame)}\n", flush=True)
        lists = word_lists(model, settings.n_lists)
        half = len(lists) // 2
        scores = induction_scores(model, lists[:half])
        without = ablated(model, lists[half:], scores, settings.n_ablated)
        label = Path(name).name
        for what, kept in (("accuracy", frame), ("heads", scores), ("ablated", without)):
            write_atomically(settings.out / f"{label}_{what}.csv", kept.to_csv(index=False))
        print(
            without.pivot_table(index="n", columns="heads", values="accuracy").to_string(float_format="{:.2f}".format)
        )
        if name == settings.models[0]:
            save(draw(scores, without, label), settings.figures, "tiny_copying", width=960, height=460)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
