"""What vectors say in the vocabulary: do exclusion vectors promote the excluded word? (Stolfo et al. 2025, table 13)

    python analysis/vocabulary.py --out runs/analysis/vocabulary
    python analysis/vocabulary.py --out runs/analysis/vocabulary_real --model smollm2-135m --batch-size 32 \\
        --layers 5 10 16 22 28 --n-queries 12 --n-prompts 4

For each word an inclusion and an exclusion vector, mean differences over the same base queries, read through the model's last
norm and unembedding, added and subtracted; the paper's tables are of layer 24 of 32, and the layer at that share of the depth is
shown.

    promoted.csv     the ten most promoted tokens of each keyword vector at that layer
    ranks.csv        ranks and logits of every token of the word itself, in six spellings, at that layer
    own_word.csv     by layer: how many vectors promote their own word above random directions, and how often another's word
    formats.csv      the most promoted tokens of each format vector at that layer
    effects.csv      by layer: what adding a format vector does to the next token of bare queries, directly (by its own
                     unembedding) and in all, beside random directions of equal norm: the mean, its interval, and the middle
                     95 % of the single prompts

A word counts as promoted if the first token of one of its spellings has a larger logit than under any of 39 random directions.
Six spellings are six chances, and all keyword vectors share their wording: both hold for the words of other vectors, too, which
are the control. `part` says what is read: the whole vector, or what is its own, the vector less the mean of all words' vectors
of its mode. Where direct and total effect have nothing in common, what a vector says here is not what it does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import tyro
from plotly.subplots import make_subplots
from study import Frames, Reading, at_depth, conduct, line

import steerlens as sl
from steerlens.figures.measures import measure_curves
from steerlens.figures.theme import CONDITION_COLORS
from steerlens.figures.tokens import token_table
from steerlens.stats.rates import rate_table

DEPTH = 24 / 32
"""Where the paper's tables are taken."""
MODES = ("include", "exclude")


@dataclass(frozen=True)
class Settings(Reading):
    out: Path = Path("runs/analysis/vocabulary")
    words: tuple[str, ...] = (
        *("dream", "science", "garden", "number", "winter", "holiday", "river", "honey"),
        *("simple", "school", "music", "question"),
    )
    """Words to ask for, and not to say."""
    n_queries: int = 20
    """Base queries that vectors are fitted on."""
    n_prompts: int = 8
    """Other base queries, after which the next token is looked at."""
    instructions: tuple[str, ...] = ()
    """Ids of format instructions; default: all twelve."""
    layer: int | None = None
    """Of the tables of tokens; default: the paper's share of the depth."""
    layers: tuple[int, ...] = ()
    """Of the curves; default: all."""
    coeff: float = 0.5
    """Of the effects, in mean residual norms."""


def measure(settings: Settings) -> Frames:
    model = sl.load_model(settings.model, dtype=settings.dtype)
    layer = at_depth(model, DEPTH) if settings.layer is None else settings.layer
    layers = sorted({layer, *(settings.layers or range(int(model.cfg.n_layers)))})
    n = settings.n_queries + settings.n_prompts
    pairs = sl.load_pairs(settings.pairs, instructions=settings.instructions or None, n_queries=n, seed=settings.seed)
    queries = list(dict.fromkeys(str(pair.query) for pair in pairs))
    fitted, prompts = queries[: settings.n_queries], queries[settings.n_queries :]
    asked = {
        f"{mode} {word}": sl.keyword_pairs(fitted, word, mode, seed=settings.seed)
        for mode in MODES
        for word in settings.words
    }
    formats = sl.data.PairSet(pair for pair in pairs if pair.query in set(fitted)).by_instruction()
    options: dict[str, Any] = {"batch_size": settings.batch_size, "progress": True}
    vectors = sl.fit_vectors(model, asked | formats, folder=settings.out / "vectors", **options)
    lens: dict[str, Any] = {"layer": layers, "targets": settings.words, "seed": settings.seed}
    table = pd.concat(
        sl.logit_lens(model, {word: one[word] for word in settings.words}, **lens)
        .to_frame()
        .assign(mode=mode, part=part)
        for mode in MODES
        for part, one in parts_of({word: vectors[f"{mode} {word}"] for word in settings.words}).items()
    ).rename(columns={"vector": "word"})
    here = table[table["layer"] == layer]
    own = here[(here["kind"] == "target") & (here["target"] == here["word"])]
    steps: dict[str, Any] = {"coeff": settings.coeff, "unit": "resid_norm", "layers": layers, "seed": settings.seed}
    effects = [
        with_spread(sl.reading.vector_effects(model, vectors[name], prompts, batch_size=settings.batch_size, **steps))
        for name in formats
    ]
    return {
        "promoted": here[here["kind"] == "promoted"],
        "ranks": own.drop(columns=["kind", "target"]),
        "own_word": own_words(table),
        "formats": promoted(sl.logit_lens(model, {name: vectors[name] for name in formats}, layer=layer)),
        "effects": pd.concat(one.assign(instruction=name) for name, one in zip(formats, effects, strict=True)),
    }


def parts_of(vectors: Mapping[str, sl.SteeringVector]) -> dict[str, dict[str, sl.SteeringVector]]:
    """Each word's vector whole, and what is its own: less the mean of all."""
    mean = sum(vectors.values()) / len(vectors)
    return {"whole": dict(vectors), "own": {word: vector - mean for word, vector in vectors.items()}}


def with_spread(effects: Any) -> pd.DataFrame:
    """Means and their intervals, and between which values the middle 95 % of the prompts lie."""
    keys = ["layer", "condition", "effect", "measure", "target"]
    single = effects.per_prompt.groupby(keys)["value"]
    spread = pd.DataFrame({"single_low": single.quantile(0.025), "single_high": single.quantile(0.975)})
    return effects.to_frame().merge(spread.reset_index(), on=keys)


def promoted(lens: Any) -> pd.DataFrame:
    table: pd.DataFrame = lens.to_frame()
    return table[table["kind"] == "promoted"]


def own_words(table: pd.DataFrame) -> pd.DataFrame:
    """Of each mode, sign and layer: how many vectors promote their own word, and the words of the other vectors.

    Each vector is read for every word, so a vector is a cluster of the words of others. `median_rank`: of the best spelling.
    """
    first = table[(table["kind"] == "target") & (table["piece"] == 0)]
    first = first.assign(
        promoted=first["logit"] > first["random_high"],
        of=(first["word"] == first["target"]).map({True: "own word", False: "other words"}),
    )
    keys = ["mode", "part", "of", "sign", "layer"]
    words = first.groupby([*keys, "word", "target"], sort=False).agg(promoted=("promoted", "any"), rank=("rank", "min"))
    words = words.reset_index()
    rates = rate_table(words, keys, "promoted", clusters="word").rename(columns={"followed": "promoted"})
    ranks = words.groupby(keys, sort=False)["rank"].median().rename("median_rank").reset_index()
    return rates.merge(ranks, on=keys)


def draw(frames: Frames) -> dict[str, go.Figure]:
    table = frames["promoted"].rename(columns={"word": "vector"})
    layer = int(table["layer"].iloc[0])
    words = {"whole": "What exclusion vectors say", "own": "What is each exclusion vector's own says"}
    exclusion = {
        part: token_table(
            table[(table["mode"] == "exclude") & (table["part"] == part)], title=f"{what} at layer {layer}"
        )
        for part, what in words.items()
    }
    return {
        "exclusion": exclusion["whole"],
        "exclusion_own": exclusion["own"],
        "own_word": draw_own_word(frames["own_word"]),
        "formats": token_table(frames["formats"], title=f"What format vectors say at layer {layer}"),
        "effects": draw_effects(frames["effects"]),
    }


def draw_own_word(table: pd.DataFrame) -> go.Figure:
    """By layer, how many vectors promote their own word, added and subtracted, and how often other vectors' words."""
    modes = {"include": "inclusion vectors", "exclude": "exclusion vectors"}
    parts = {"whole": "", "own": ", less their mean"}
    heads = [modes[mode] + parts[part] for part in parts for mode in modes]
    space = {"horizontal_spacing": 0.04, "vertical_spacing": 0.12}
    figure = make_subplots(rows=2, cols=2, shared_yaxes=True, shared_xaxes=True, subplot_titles=heads, **space)
    styles = {
        ("own word", 1): ("own word, added", CONDITION_COLORS["vector"], "solid"),
        ("own word", -1): ("own word, subtracted", CONDITION_COLORS["text"], "solid"),
        ("other words", 1): ("others' words, added", CONDITION_COLORS["random"], "solid"),
        ("other words", -1): ("others' words, subtracted", CONDITION_COLORS["random"], "dot"),
    }
    for row, part in enumerate(parts, 1):
        for col, mode in enumerate(modes, 1):
            panel = table[(table["mode"] == mode) & (table["part"] == part)]
            for (of, sign), (name, color, dash) in styles.items():
                rows = panel[(panel["of"] == of) & (panel["sign"] == sign)]
                line(figure, rows, "layer", name, color, dash=dash, row=row, col=col)
                figure.data[-1].update(showlegend=row == col == 1, legendgroup=name)
    figure.update_xaxes(title_text="layer", row=2)
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.03])
    figure.update_yaxes(title_text="promoted", col=1)
    title = "Do keyword vectors promote their word?"
    # The legend takes two lines on a narrow page, above the names of the panels.
    return figure.update_layout(title_text=title, width=900, height=640, margin={"t": 130}, legend={"y": 1.06})


def draw_effects(table: pd.DataFrame) -> go.Figure:
    """How alike the direct and the total change of the logits are, by layer, beside random directions."""
    rows = table[table["measure"] == "correlation"]
    keys = ["instruction", "layer"]
    columns = {"mean": "control", "single_low": "control_low", "single_high": "control_high"}
    random = rows[rows["condition"] == "random"].rename(columns=columns)[[*keys, *columns.values()]]
    both = rows[rows["condition"] == "vector"].rename(columns={"mean": "value"}).merge(random, on=keys)
    return measure_curves(
        both,
        unit="correlation",
        control="random directions",
        title="How much of what a format vector does to the next token it says itself",
    ).update_layout(width=900)


TABLES = ["promoted", "ranks", "own_word", "formats", "effects"]

if __name__ == "__main__":
    conduct(tyro.cli(Settings, description=__doc__), measure, draw, TABLES)
