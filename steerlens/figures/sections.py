"""The folded sections of a page about vectors: what they say, how they lie, which layers matter.

Each is made of the frames of readings and studies, by name, and is left out where there are none:

    lens       tokens (of `logit_lens`, with `chosen`: whether the layer is the one that is used), effects (of `vector_effects`,
               with the vector's name)
    geometry   points and embeddings (of `embed`, by method), cosines (with the layer), separability
    layers     steering, necessity, transfer: the tables of the studies
"""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from steerlens.figures.effects import effect_curves
from steerlens.figures.geometry import embedding_scatter
from steerlens.figures.matrices import cosine_heatmap, transfer_matrix
from steerlens.figures.measures import SEPARABILITY, measure_curves
from steerlens.figures.page import Section, folded, note, number, rows_table, titled_figure
from steerlens.figures.studies import necessity_by_layer, steering_by_layer
from steerlens.figures.theme import short_label
from steerlens.figures.tokens import token_table
from steerlens.figures.words import shown

Frames = Mapping[str, pd.DataFrame]
"""Tables by name."""

N_SHOWN = 8
"""Tokens in a line of the table."""

METHODS = {"tsne": "t-SNE, one point per pair", "pca": "PCA, one point per pair"}


def sections_of(seen: Mapping[str, Frames], *, order: Sequence[str] = ()) -> list[Section]:
    """The sections that frames are there for.

    Args:
        seen: "lens", "geometry" and "layers": the frames of each, by name.
        order: of the instructions; by default the frames' own.

    Example:
        >>> tokens = sl.logit_lens(model, vector, layer=[3, 4]).table.assign(chosen=True)
        >>> [section.name for section in sections_of({"lens": {"tokens": tokens}})]
        ['What the vectors say']
    """
    lens, geometry, layers = (seen.get(name) or {} for name in ("lens", "geometry", "layers"))
    sections = [
        Section(
            "What the vectors say",
            _lens_section(lens, order) if lens else "",
            "tokens that each promotes and suppresses, and its effect on the next token",
        ),
        Section(
            "How they lie",
            _geometry_section(geometry) if geometry else "",
            "a point per pair at each layer, cosines, separability",
        ),
        Section(
            "Which layers matter",
            _layers_section(layers) if layers else "",
            "steered, ablated and moved, layer by layer",
        ),
    ]
    return [section for section in sections if section.content]


def _lens_section(frames: Frames, order: Sequence[str]) -> str:
    tokens, effects = frames["tokens"], frames.get("effects")
    tokens = _in_order(tokens, order)
    about = (
        "Each direction read through the model&rsquo;s own last norm and unembedding: the tokens that it raises most when it is "
        "added, and when it is subtracted. <b>Bold</b>: more than any of 39 random directions does at this rank. What the layers "
        "after it make of a direction is often another thing, which its effects below show."
    )
    parts = [note(about), _token_rows(tokens)]
    if effects is not None:
        parts.append(_effects(_in_order(effects, order)))
    if tokens["layer"].nunique() > 1:
        parts.append(titled_figure(token_table(tokens), "lens-figure"))
    if (tokens["kind"] == "target").any():
        parts.append(titled_figure(token_table(tokens, show="targets"), "targets-figure"))
    return "".join(parts)


def _in_order(table: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    rank = {name: place for place, name in enumerate(order)}
    return table.sort_values("vector", key=lambda names: names.map(rank).fillna(len(rank)), kind="stable")


def _token_rows(tokens: pd.DataFrame) -> str:
    """A line per vector: the tokens of both signs at the layer that is used."""
    used = tokens[tokens["chosen"] & (tokens["kind"] == "promoted")]
    rows = []
    for (name, layer), part in used.groupby(["vector", "layer"], sort=False):
        said = [_words(part[part["sign"] == sign].head(N_SHOWN)) for sign in (1, -1)]
        rows.append([html.escape(short_label(str(name))), str(layer), *said])
    return rows_table(["vector", "layer", "adding it says", "subtracting it says"], rows, names=4) if rows else ""


def _words(rows: pd.DataFrame) -> str:
    found = []
    for record in rows.to_dict("records"):
        beyond = record["logit"] > record["random_high"]
        token = f"<b>{shown(record['token'])}</b>" if beyond else shown(record["token"])
        found.append(f'<span class="token">{token}</span>')
    return f'<span class="words">{"".join(found)}</span>'


def _effects(effects: pd.DataFrame) -> str:
    """Curves over the layers of one vector; of several a line each, at its layer."""
    if effects["vector"].nunique() == 1 and effects["layer"].nunique() > 1:
        return titled_figure(effect_curves(effects), "effects-figure")
    n = int(effects["n"].max())
    about = (
        f"What adding the mean difference at that layer does to the token after {n} bare queries: how far the next token&rsquo;s "
        "distribution moves (KL in nats, mean [95&nbsp;%]), in all and by the direction&rsquo;s own unembedding alone, beside a "
        "random direction of the same length; and how alike both changes of the logits are."
    )
    wanted = {
        "in all": ("vector", "total", "kl"),
        "random, in all": ("random", "total", "kl"),
        "directly": ("vector", "direct", "kl"),
        "random, directly": ("random", "direct", "kl"),
        "correlation": ("vector", "both", "correlation"),
    }
    rows = []
    for (name, layer), part in effects.groupby(["vector", "layer"], sort=False):
        found = part.set_index(["condition", "effect", "measure"])
        values = [_mean(found.loc[[key]].to_dict("records")[0]) for key in wanted.values()]
        rows.append([html.escape(short_label(str(name))), str(layer), *values])
    return "<h3>Direct and total effect</h3>" + note(about) + rows_table(["vector", "layer", *wanted], rows)


def _mean(row: Mapping[Any, Any]) -> str:
    return f"{number(row['mean'])} [{number(row['low'])}, {number(row['high'])}]"


def _geometry_section(frames: Frames) -> str:
    points, embeddings = frames["points"], frames["embeddings"]
    about = (
        "The difference that the instruction makes at the last token of the prompt, for every pair; each layer is turned onto "
        "the one before, so that the slider shows what moves. In t-SNE sizes and distances of clusters mean little, and "
        "clusters can come out of noise: the numbers below have controls."
    )
    parts = [note(about)]
    for method in dict.fromkeys(points["method"]):
        shares = embeddings[embeddings["method"] == method]
        rows = points[points["method"] == method].drop(columns="method")
        notes = {row["layer"]: _note(row) for row in shares.to_dict("records")}
        title = f"What each instruction changes: {METHODS[method]}"
        fig = embedding_scatter(rows, method=method, notes=notes, title=title)
        parts.append(titled_figure(fig, f"{method}-figure"))
    cosines = frames["cosines"]
    bound, layer = float(cosines["control_high"].iloc[0]), cosines["layer"].iloc[0]
    names = list(dict.fromkeys([*cosines["first"], *cosines["second"]]))
    title = f"How alike the directions of instructions are at layer {layer}"
    random = f"cosine of mean differences; random directions: within \u00b1{bound:.2f}"
    parts.append(
        titled_figure(cosine_heatmap(_square(cosines, names), names, title=title, note=random), "cosines-figure")
    )
    if "separability" in frames:
        fig = measure_curves(frames["separability"], **SEPARABILITY)
        parts.append(titled_figure(fig, "separability-figure"))
    return "".join(parts)


def _note(row: Mapping[Any, Any]) -> str:
    """What stands above the points of a layer."""
    if row["method"] == "tsne":
        return f"perplexity {row['perplexity']:g}"
    return f"{row['value']:.0%} of the variance; random directions {row['control']:.0%}"


def _square(cosines: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """The matrix of a frame that has every pair once."""
    place = {name: index for index, name in enumerate(names)}
    matrix = np.eye(len(names))
    for row in cosines.to_dict("records"):
        i, j = place[row["first"]], place[row["second"]]
        matrix[i, j] = matrix[j, i] = row["cosine"]
    return matrix


STUDIES: dict[str, tuple[Callable[..., go.Figure], str]] = {
    "steering": (
        steering_by_layer,
        "The vector at each layer alone, from each layer on, and at all layers but one, on bare queries.",
    ),
    "necessity": (
        necessity_by_layer,
        "The instruction stands in the prompt, and its direction is ablated: how much of the following is lost, beside two "
        "random controls. Backup in later layers hides a loss, and a model that breaks feigns one.",
    ),
    "transfer": (
        transfer_matrix,
        "The direction of one layer added at another, as long as that layer&rsquo;s own mean difference.",
    ),
}


def _layers_section(studies: Frames) -> str:
    """Each study over all instructions, and folded by instruction."""
    parts = []
    for name, table in studies.items():
        draw, about = STUDIES[name]
        instructions = list(dict.fromkeys(table["instruction"]))
        first, *_ = ["all"] if "all" in instructions else instructions
        parts += [note(about), titled_figure(draw(table, instructions=first), f"{name}-figure")]
        if others := [one for one in instructions if one != first]:
            parts.append(
                folded("By instruction", titled_figure(draw(table, instructions=others), f"{name}-each-figure"))
            )
    return "".join(parts)
