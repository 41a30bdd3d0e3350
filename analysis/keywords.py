"""Keywords in the four cells: include a word by adding its vector, exclude it by subtracting it (Stolfo et al. 2025, section 5).

    python analysis/keywords.py --out runs/analysis/keywords
    python analysis/keywords.py --out runs/analysis/keywords_real --model smollm2-135m --batch-size 32 \\
        --data ifeval_single_keyword_include.jsonl --exclude-data ifeval_single_keyword_exclude.jsonl --n-test 40 \\
        --valid-data inclusion_validation.jsonl --exclude-valid-data exclusion_validation.jsonl

A word's vector is the mean difference over base queries with and without a request to include it, fitted when it is needed.
Layer, position and coefficient are chosen once for inclusion and once for exclusion, on validation queries and words that are not
tested. Checks are strict, as in the paper. Without data files, `--words` are to be included in bundled queries, and what is to be
excluded is a word that the model's own answer has. Prompts of a file about several words are left out and counted.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import tyro
from study import Frames, Lab, Study, conduct, lab

from steerlens.data.conditions import CONDITIONS
from steerlens.data.families import Mode, keyword_pairs
from steerlens.data.load import load_pairs
from steerlens.data.pairs import PairSet
from steerlens.data.splits import query_ids
from steerlens.errors import DataError
from steerlens.figures.cells import four_cells
from steerlens.stats.comparisons import compare_cells
from steerlens.stats.rates import rates_and_quality
from steerlens.study.responses import requests_for
from steerlens.study.scores import score
from steerlens.study.sweeps import Best
from steerlens.vectors.estimators import fit_vectors
from steerlens.vectors.vector import SteeringVector

VALIDATION_WORDS = ("simple", "school", "music", "question")


@dataclass(frozen=True)
class Settings(Study):
    out: Path = Path("runs/analysis/keywords")
    words: tuple[str, ...] = ("dream", "science", "garden", "number", "winter", "holiday", "river", "honey")
    """Words to ask for, where there are no data files."""
    exclude_data: Path | None = None
    """Test prompts that exclude a word."""
    valid_data: Path | None = None
    """Validation prompts that include a word; default: four words in bundled queries."""
    exclude_valid_data: Path | None = None
    """Validation prompts that exclude a word; default: words that the model's own answers have."""
    coeffs: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5)
    """Sizes of the steps to search, in mean residual norms; exclusion takes them with a minus sign."""


def measure(settings: Settings) -> Frames:
    tables, comparisons, notes = [], [], []
    with lab(settings) as here:
        for mode in ("include", "exclude"):
            groups, left_out = test_groups(here, settings, mode)
            valid = validation_groups(here, settings, mode, groups)
            vectors = word_vectors(here, [*valid, *groups])
            chosen = {one: choice(here, settings, vectors, valid, mode, one) for one in ("vector", "text+vector")}
            requests = [
                request
                for word, pairs in groups.items()
                for request in requests_for(
                    pairs,
                    vectors[word].at(chosen["vector"]),
                    text_plans=vectors[word].at(chosen["text+vector"]),
                    conditions=CONDITIONS,
                    seed=settings.seed,
                )
            ]
            scores = score(here.sampler, requests).assign(instruction=mode)
            scores["followed"] = scores["followed_strict"]
            keys = ["instruction", "condition"]
            tables.append(rates_and_quality(scores, keys))
            comparisons.append(compare_cells(scores))
            for condition, best in chosen.items():
                row = {"mode": mode, "condition": condition, "layer": best.layer, "coeff": best.coeff}
                notes.append(row | {"positions": best.positions, "validation_rate": best.rate, "left_out": left_out})
    return {"cells": pd.concat(tables), "comparisons": pd.concat(comparisons), "choices": pd.DataFrame(notes)}


def word_vectors(here: Lab, words: Sequence[str]) -> dict[str, SteeringVector]:
    """Each word's inclusion vector, kept in the output folder."""
    sets = {word: keyword_pairs(here.train[:20], word) for word in words}
    return fit_vectors(here.model, sets, folder=here.settings.out / "vectors", progress=True)


def validation_groups(here: Lab, settings: Settings, mode: Mode, tested: Mapping[str, PairSet]) -> dict[str, PairSet]:
    """Validation pairs by word, without the words and the queries that are tested."""
    file = settings.valid_data if mode == "include" else settings.exclude_valid_data
    if file is not None:
        queries = set().union(*map(query_ids, tested.values()))
        return file_groups(file, mode, settings.n_valid, settings.seed, words=set(tested), queries=queries)[0]
    if mode == "include":
        return {word: keyword_pairs(here.valid, word) for word in VALIDATION_WORDS if word not in tested}
    said = {word: query for query, word in here.said_words(here.valid).items() if word not in tested}
    return {word: keyword_pairs([query], word, mode) for word, query in said.items()}


def choice(
    here: Lab,
    settings: Settings,
    vectors: Mapping[str, SteeringVector],
    valid: Mapping[str, PairSet],
    mode: Mode,
    condition: Any,
) -> Best:
    """Layer, position and coefficient that do best for the validation words."""
    sign = 1.0 if mode == "include" else -1.0
    groups = [(vectors[word], pairs) for word, pairs in valid.items()]
    return here.best_for_all(groups, here.steps(*(sign * size for size in settings.coeffs)), condition, strict=True)


def test_groups(here: Lab, settings: Settings, mode: Mode) -> tuple[dict[str, PairSet], int]:
    """Test pairs by word, and how many prompts were left out because they name several words."""
    file = settings.data if mode == "include" else settings.exclude_data
    if file is None and mode == "include":
        dealt = {word: here.test[i :: len(settings.words)] for i, word in enumerate(settings.words)}
        return {word: keyword_pairs(part, word) for word, part in dealt.items() if part}, 0
    if file is None:
        said = here.said_words(here.test)
        return {word: keyword_pairs([query], word, mode) for query, word in said.items()}, 0
    return file_groups(file, mode, settings.n_test, settings.seed)


def file_groups(
    file: Path, mode: Mode, n: int, seed: int, *, words: Container[str] = (), queries: Container[str] = ()
) -> tuple[dict[str, PairSet], int]:
    """At most n of a file's pairs about one word, by word, without these words and queries; and how many name several.

    Raises:
        DataError: if no pair is left.
    """
    wanted, argument = {
        "include": ("keywords:existence", "keywords"),
        "exclude": ("keywords:forbidden_words", "forbidden_words"),
    }[mode]
    pairs = [pair for pair in load_pairs(file) if pair.query is not None and pair.instruction_ids == (wanted,)]
    single = [pair for pair in pairs if len(pair.kwargs[0][argument]) == 1]
    left = [pair for pair in single if pair.kwargs[0][argument][0] not in words and pair.query_id not in queries]
    if not left:
        raise DataError(f"{file} must hold prompts of {wanted} about one word each, with their base queries, got none")
    groups: dict[str, list[Any]] = {}
    for pair in PairSet(left).sample(min(n, len(left)), seed=seed):
        groups.setdefault(pair.kwargs[0][argument][0], []).append(pair)
    return {word: PairSet(group) for word, group in groups.items()}, len(pairs) - len(single)


def draw(frames: Frames) -> dict[str, go.Figure]:
    figure = four_cells(
        frames["cells"], title="Keywords: strict checks, vectors added to include and subtracted to exclude"
    )
    return {"cells": figure}


if __name__ == "__main__":
    conduct(tyro.cli(Settings, description=__doc__), measure, draw, ["cells", "comparisons", "choices"])
