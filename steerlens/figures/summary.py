"""What a run's rates say, in a few sentences: the vector beside its controls, over instructions, and at what cost."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from steerlens.figures.page import number, share
from steerlens.figures.theme import CONDITION_COLORS, percent, rate_text, short_label

_IN_WORDS = {
    "none": "without steering",
    "random": "with a random vector of equal norm",
    "vector": "with the steering vector",
    "text": "with the instruction in the prompt",
    "text+vector": "with the instruction in the prompt and the vector",
    "text+random": "with the instruction in the prompt and as much attention on random tokens",
    "text+attention": "with the instruction in the prompt and attention steered towards it",
    "text+vector+attention": "with the instruction in the prompt, attention steered towards it, and the vector",
}


def summarize(overall: pd.DataFrame, table: pd.DataFrame, search: pd.DataFrame | None = None) -> str:
    """What the rates say, in a few sentences: the vector beside its controls, over instructions, and at what cost.

    Args:
        overall: rates and quality per condition.
        table: rates and quality per instruction and condition.
        search: the search frame, which says where no steering was chosen.
    """
    rows = {row["condition"]: row for row in overall.to_dict("records")}
    lead = "vector" if "vector" in rows else next(iter(rows))
    n = rows[lead]["n"]
    first = f"{_IN_WORDS[lead].capitalize()}, {rate_text(rows[lead])} of {n} responses follow their instruction"
    others = [
        f"{_IN_WORDS[name]} {rate_text(rows[name])}" + (f" of {rows[name]['n']}" if rows[name]["n"] != n else "")
        for name in CONDITION_COLORS
        if name in rows and name != lead
    ]
    sentences = ["; ".join([first, *others])]
    if lead == "vector":
        sentences += [_against_control(rows), _over_instructions(table), _left_unsteered(search), _quality_change(rows)]
    return " ".join(f"{sentence}." for sentence in sentences if sentence)


def _against_control(rows: Mapping[str, Mapping[Any, Any]]) -> str:
    control = next((name for name in ("random", "none") if name in rows), None)
    if control is None:
        return ""
    vector, other = rows["vector"], rows[control]
    versus = f"that of {'a random vector of equal norm' if control == 'random' else 'the unsteered model'}"
    if vector["low"] > other["high"]:
        return f"The vector's interval lies above {versus}"
    if vector["high"] < other["low"]:
        return f"The vector's interval lies below {versus}"
    return f"The vector's interval overlaps {versus}, so these responses alone do not tell the two apart"


def _over_instructions(table: pd.DataFrame) -> str:
    rates = table.pivot(index="instruction", columns="condition", values="rate")
    both = rates.reindex(columns=["vector", "none"]).dropna()
    if len(both) < 2:
        return ""
    gain = both["vector"] - both["none"]
    higher = f"The rate is higher with the vector than without on {int((gain > 0).sum())} of {len(gain)} instructions"
    if not gain.any():
        return higher
    best = str(gain.abs().idxmax())
    from_to = f"{percent(float(both['none'][best]))} to {percent(float(both['vector'][best]))}"
    lower = f", lower on {int((gain < 0).sum())}" if (gain < 0).any() else ""
    return f"{higher}{lower}; the largest change is {from_to}, on {short_label(best)}"


def _left_unsteered(search: pd.DataFrame | None) -> str:
    if search is None or search.empty:
        return ""
    names = [short_label(str(name)) for name in search.loc[search["chosen"] & search["layer"].isna(), "instruction"]]
    of = f"{len(names)} of {search['instruction'].nunique()} instructions ({', '.join(names)})"
    return f"For {of} the search chose no steering, so the vector's responses there are unsteered ones" if names else ""


def _quality_change(rows: Mapping[str, Mapping[Any, Any]]) -> str:
    if "none" not in rows:
        return ""
    before, after = rows["none"], rows["vector"]
    changes = [
        f"{what} {form(after[column])} ({form(before[column])})"
        for column, what, form in (
            ("median_perplexity", "median perplexity", number),
            ("mean_repetition", "mean repetition", share),
            ("cut", "responses cut at the length limit", percent),
        )
        if not (math.isnan(before[column]) or math.isnan(after[column]))
    ]
    return f"With the vector (in brackets: without steering) {', '.join(changes)}" if changes else ""
