"""To exclude a word: subtract its inclusion vector, or add an exclusion vector? (Stolfo et al. 2025, section 5 and appendix)

    python analysis/exclusion.py --out runs/analysis/exclusion

Words that the model says anyway are the ones worth excluding: for each test query, the longest word of its own unsteered answer
that is not in the query. Both vectors are fitted on other queries and applied at one layer over a range of coefficients, in
mean residual norms. As the words are chosen because they are said, any change of the text lowers their share: a random
direction of equal norm stands beside both. The paper found subtraction to work and exclusion vectors to promote the word they
name; `by_coefficient.csv` has the strict rate and the share of degenerate texts for all three.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import tyro
from study import Frames, Study, conduct, lab, line

from steerlens.data.families import keyword_pairs
from steerlens.figures.theme import CONDITION_COLORS
from steerlens.stats.rates import rates_and_quality
from steerlens.steering.plan import Plan
from steerlens.study.responses import Request, requests_for
from steerlens.study.scores import score
from steerlens.vectors.estimators import fit_vectors


@dataclass(frozen=True)
class Settings(Study):
    out: Path = Path("runs/analysis/exclusion")
    n_test: int = 12
    coeffs: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5, 2.0)
    """Sizes of the steps, in mean residual norms."""


def measure(settings: Settings) -> Frames:
    with lab(settings) as here:
        pairs = {word: keyword_pairs([query], word, "exclude") for query, word in here.said_words(here.test).items()}
        sets = {
            (word, mode): keyword_pairs(here.train[:20], word, mode)
            for word in pairs
            for mode in ("include", "exclude")
        }
        vectors = fit_vectors(here.model, {" ".join(key): one for key, one in sets.items()}, progress=True)
        layer, positions = here.layers[len(here.layers) // 2], settings.positions[-1]
        requests: list[Request] = []
        labels = []
        for word, one in pairs.items():
            for method, mode, sign in (("subtract inclusion", "include", -1.0), ("add exclusion", "exclude", 1.0)):
                for size in (0.0, *settings.coeffs):
                    plan = Plan()
                    if size:
                        vector = vectors[f"{word} {mode}"]
                        plan = vector.at(
                            layer, coeff=sign * size, operator="add", unit="resid_norm", positions=positions
                        )
                    label = {"size": size, "steered_layer": layer, "word": word}
                    requests += requests_for(one, plan, conditions=["vector"], seed=settings.seed)
                    labels += [label | {"method": method}] * len(one)
                    if sign < 0:
                        requests += requests_for(one, plan, conditions=["random"], seed=settings.seed)
                        labels += [label | {"method": "random direction"}] * len(one)
        scores = score(here.sampler, requests).join(pd.DataFrame(labels))
    scores["followed"] = scores["followed_strict"]
    words = scores[["word", "prompt"]].drop_duplicates()
    return {"by_coefficient": rates_and_quality(scores, ["method", "steered_layer", "size"]), "words": words}


def draw(frames: Frames) -> dict[str, go.Figure]:
    table = frames["by_coefficient"]
    figure = go.Figure()
    colors = {
        "subtract inclusion": CONDITION_COLORS["vector"],
        "add exclusion": CONDITION_COLORS["text"],
        "random direction": CONDITION_COLORS["random"],
    }
    for method, color in colors.items():
        rows = table[table["method"] == method]
        line(figure, rows, "size", method, color)
        line(figure, rows, "size", f"{method}: degenerate", color, y="degenerate", dash="dot")
    figure.update_xaxes(title_text="size of the step, in mean residual norms")
    figure.update_yaxes(title_text="answers", tickformat=".0%", range=[0, 1.03])
    layer = int(table["steered_layer"].iloc[0])
    title = f"Answers without the word, steered at layer {layer} (no instruction in the prompt)"
    return {"by_coefficient": figure.update_layout(title_text=title, width=900, height=460, margin={"t": 90})}


if __name__ == "__main__":
    conduct(tyro.cli(Settings, description=__doc__), measure, draw, ["by_coefficient"])
