"""How instructions lie: t-SNE, cosines, and whether lengths lie on a line (Stolfo et al. 2025, figures of the appendix).

    python analysis/geometry.py --out runs/analysis/geometry
    python analysis/geometry.py --out runs/analysis/geometry_real --model smollm2-135m --batch-size 32 --n-queries 20

Of every bundled query with each of the twelve format instructions, with exactly n sentences, and with each level of length: the
difference of the last token's residuals with and without the instruction. The paper's pictures are of layer 20 (formats) and 12
(lengths) of 32; the layers at the same share of the depth are taken here.

    formats.csv, lengths.csv            t-SNE of the differences at one layer, a row per pair
    separability.csv                    held-out probe and nearest centroid, silhouette; by layer, beside shuffled labels
    cosines.csv                         between the formats' mean differences at that layer, beside random directions
    stability.csv                       cosine of the mean differences of two halves of the queries, beside swapped sides;
                                        both of the whole differences, and of what is each instruction's own (`part`): less the
                                        mean of all formats, what any instruction changes
    line.csv, line_points.csv           rank correlation of the first component of the means with their order, and its share of
                                        their variance; by layer, beside shuffled numbers

Intervals are over queries. Of k directions less their mean, the mean cosine is about -1 / (k - 1). What t-SNE shows has no
numbers of its own: read it beside the other tables. An instruction to write exactly n sentences holds the number n as a token,
so a line of numbers may be one of what was read and not of what will be said; of the levels only "a sentence or two" has one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import tyro
from plotly.colors import sample_colorscale
from study import Frames, Reading, at_depth, conduct

import steerlens as sl
from steerlens.data.families import LENGTH_LEVELS
from steerlens.figures.geometry import embedding_scatter, line_scatter
from steerlens.figures.matrices import cosine_heatmap
from steerlens.figures.measures import measure_curves
from steerlens.figures.theme import number_text

FORMAT_DEPTH, LENGTH_DEPTH = 20 / 32, 12 / 32
"""Where the paper's pictures are taken."""

MEASURES = {
    "probe": "linear probe (accuracy)",
    "nearest_centroid": "nearest centroid (accuracy)",
    "silhouette": "mean silhouette",
}
LINES = {"sentences": "exactly n sentences", "levels": "levels of length"}
LINE_MEASURES = {"spearman": "rank correlation", "share": "share of variance"}


@dataclass(frozen=True)
class Settings(Reading):
    out: Path = Path("runs/analysis/geometry")
    n_queries: int = 80
    """Base queries; each is asked with every instruction."""
    instructions: tuple[str, ...] = ()
    """Ids of format instructions; default: all twelve."""
    ns: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Numbers of sentences."""
    layer: int | None = None
    """Of the formats' picture and cosines; default: the paper's share of the depth."""
    length_layer: int | None = None
    """Of the lengths' picture; default: the paper's share of the depth."""


def measure(settings: Settings) -> Frames:
    model = sl.load_model(settings.model, dtype=settings.dtype)
    layer = at_depth(model, FORMAT_DEPTH) if settings.layer is None else settings.layer
    length_layer = at_depth(model, LENGTH_DEPTH) if settings.length_layer is None else settings.length_layer
    options = {"batch_size": settings.batch_size, "progress": True}
    pairs = sl.load_pairs(
        settings.pairs, instructions=settings.instructions or None, n_queries=settings.n_queries, seed=settings.seed
    )
    formats = sl.record_activations(model, pairs, **options)
    queries = list(dict.fromkeys(str(pair.query) for pair in pairs))
    numbers = {f"exactly {n}": sl.sentence_pairs(queries, "exactly", n, seed=settings.seed) for n in settings.ns}
    levels = {level.replace("_", " "): sl.length_pairs(queries, level, seed=settings.seed) for level in LENGTH_LEVELS}
    lengths = {name: sl.record_activations(model, part, **options) for name, part in (numbers | levels).items()}
    series = {
        "sentences": (named({name: lengths[name] for name in numbers}), dict(zip(numbers, settings.ns, strict=True))),
        "levels": (named({name: lengths[name] for name in levels}), {name: n for n, name in enumerate(levels)}),
    }
    found = {name: sl.reading.line(part, values, seed=settings.seed) for name, (part, values) in series.items()}
    embedded = {"formats": (formats, layer), "lengths": (named(lengths), length_layer)}
    separable = {"formats": formats, "lengths": series["sentences"][0]}
    parts = {"whole": formats, "own": less_mean(formats)}
    diagnosed = pd.concat(
        sl.reading.diagnose(one, layers=layer, seed=settings.seed).to_frame().assign(part=part)
        for part, one in parts.items()
    )
    return {
        **{name: embedding(part, at, settings.seed) for name, (part, at) in embedded.items()},
        "separability": pd.concat(
            sl.reading.separability(part, seed=settings.seed).to_frame().assign(of=name)
            for name, part in separable.items()
        ),
        "cosines": pd.concat(
            sl.cosines(one, layer=layer, seed=settings.seed).to_frame().assign(layer=layer, part=part)
            for part, one in parts.items()
        ),
        "stability": diagnosed[diagnosed["measure"].isin(["stability", "agreement"])],
        "line": pd.concat(one.to_frame().assign(of=name) for name, one in found.items()),
        "line_points": pd.concat(
            one.points[one.points["layer"] == length_layer].assign(of=name) for name, one in found.items()
        ),
    }


def named(parts: Mapping[str, sl.Activations]) -> sl.Activations:
    """Activations of several parts as one, each pair under the name of its part."""
    first, *_ = parts.values()
    return replace(
        first,
        resid=torch.cat([part.resid for part in parts.values()]),
        prompt_ids=tuple(name for part in parts.values() for name in part.prompt_ids),
        instructions=tuple(name for name, part in parts.items() for _ in part.prompt_ids),
        pairs=sl.data.PairSet(pair for part in parts.values() for pair in part.pairs or ()),
    )


def less_mean(activations: sl.Activations) -> sl.Activations:
    """The same pairs, the mean difference of all instructions taken from each difference; each instruction counts once."""
    means = torch.stack([part.differences.mean(dim=0) for part in activations.by_instruction().values()])
    resid = activations.resid.clone()
    resid[:, 1] -= means.mean(dim=0)
    return replace(activations, resid=resid)


def embedding(activations: sl.Activations, layer: int, seed: int) -> pd.DataFrame:
    """The t-SNE of one layer, with its perplexity in a column."""
    found = sl.embed(activations, layers=layer, seed=seed)
    return found.to_frame().assign(perplexity=found.perplexity)


def draw(frames: Frames) -> dict[str, go.Figure]:
    separability, cosines, line = frames["separability"], frames["cosines"], frames["line"]
    figures = {
        name: draw_embedding(frames[name], separability[separability["of"] == name], title)
        for name, title in (
            ("formats", "Format instructions: what each changes, one point per pair"),
            ("lengths", "Instructions of length: what each changes, one point per pair"),
        )
    }
    figures["lengths"] = in_order(figures["lengths"])
    about = {"panels": "measure", "columns": 3, "control": "shuffled labels"}
    figures["separability"] = measure_curves(
        separability[separability["of"] == "formats"],
        names=MEASURES,
        title="How well each layer tells format instructions apart",
        **about,
    )
    stability = frames["stability"]
    for part, name, what in (("whole", "cosines", ""), ("own", "cosines_own", ", less what all share")):
        rows = [one[one["part"] == part].drop(columns="part") for one in (cosines, stability)]
        figures[name] = draw_cosines(*rows, about=what)
    names = {f"{of} {measure}": f"{LINES[of]}\n{LINE_MEASURES[measure]}" for of in LINES for measure in LINE_MEASURES}
    figures["line_by_layer"] = measure_curves(
        line.assign(panel=line["of"] + " " + line["measure"]),
        **{**about, "panels": "panel", "columns": 2, "control": "shuffled numbers"},
        names=names,
        title="Whether lengths lie along a line in their order",
    )
    for of, words in LINES.items():
        points = frames["line_points"][frames["line_points"]["of"] == of]
        figures[f"line_{of}"] = line_scatter(
            points, line[line["of"] == of], title=f"{words[0].upper()}{words[1:]}, where their means differ most"
        )
    return {name: figure.update_layout(width=900) for name, figure in figures.items()}


def draw_embedding(points: pd.DataFrame, separability: pd.DataFrame, title: str) -> go.Figure:
    at = (separability["layer"] == points["layer"].iloc[0]) & (separability["measure"] == "nearest_centroid")
    (row,) = separability[at].to_dict("records")
    notes = (
        f"t-SNE, perplexity {points['perplexity'].iloc[0]:.3g}; nearest centroid right in {number_text(row)}, "
        f"shuffled {row['control']:.2f}"
    )
    return embedding_scatter(points, notes=notes, title=title)


def in_order(figure: go.Figure) -> go.Figure:
    """Lengths in the colours of a scale, from short to long: numbers as circles, levels as diamonds."""
    for symbol, scale, numbers in (("circle", "Viridis", True), ("diamond", "YlOrRd", False)):
        traces = [trace for trace in figure.data if trace.name.startswith("exactly") == numbers]
        # The ends of both scales are too light on white, one the last, the other the first.
        ends = (0.0, 0.9) if numbers else (0.25, 1.0)
        for trace, color in zip(traces, sample_colorscale(scale, np.linspace(*ends, len(traces))), strict=True):
            trace.marker.update(color=color, symbol=symbol)
    return figure


def draw_cosines(table: pd.DataFrame, measures: pd.DataFrame, about: str = "") -> go.Figure:
    """The matrix in the order of the table; on its diagonal the cosine of an instruction's own halves."""
    names = names_of(table)
    stability = measures[measures["measure"] == "stability"].set_index("instruction")["value"]
    matrix = pd.DataFrame(np.diag(stability[names]), index=names, columns=names)
    for row in table.to_dict("records"):
        matrix.loc[row["first"], row["second"]] = matrix.loc[row["second"], row["first"]] = row["cosine"]
    return cosine_heatmap(
        matrix,
        names,
        title=f"How alike instructions are at layer {table['layer'].iloc[0]}{about}",
        note=f"cosines; diagonal: two halves of the queries; random: within \u00b1{table['control_high'].iloc[0]:.2f}",
    )


def names_of(table: pd.DataFrame) -> Sequence[str]:
    """The instructions of a table of all pairs, in its order."""
    return list(dict.fromkeys([*table["first"], *table["second"]]))


TABLES = ["formats", "lengths", "separability", "cosines", "stability", "line", "line_points"]

if __name__ == "__main__":
    conduct(tyro.cli(Settings, description=__doc__), measure, draw, TABLES)
