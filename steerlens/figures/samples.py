"""Sample texts of a run: each prompt with the response of every condition beside the others, changed words marked.

The first prompts of each instruction, whatever their outcome, and too few to judge by.
"""

import difflib
import html
from collections.abc import Mapping
from typing import Any

import pandas as pd

from steerlens.figures.page import is_missing, note, number
from steerlens.figures.theme import CONDITION_COLORS, short_label
from steerlens.stats.words import WORD

_EXACT_WORDS = 300
"""Up to this many words two texts are compared exactly; see `mark_changes`."""


def samples_section(scores: pd.DataFrame, table: pd.DataFrame, order: list[str], n_samples: int) -> str:
    if n_samples < 1:
        return ""
    groups: list[str] = []
    for instruction in order:
        rows = scores[scores["instruction"] == instruction]
        counts = [
            f"{row['condition']} {row['followed']} of {row['n']}"
            for row in table[table["instruction"] == instruction].to_dict("records")
        ]
        samples = [_sample(rows[rows["prompt_id"] == key]) for key in rows["prompt_id"].unique()[:n_samples]]
        heading = f"<b>{html.escape(short_label(instruction))}</b> <span>{html.escape(' · '.join(counts))}</span>"
        groups.append(f"<details{'' if groups else ' open'}><summary>{heading}</summary>{''.join(samples)}</details>")
    about = (
        f"The first {n_samples} prompts of each instruction in the order of the data, whatever their outcome. In the"
        " vector column, <mark>words that differ</mark> from the text without steering are marked."
    )
    return note(about) + "\n".join(groups)


def _sample(rows: pd.DataFrame) -> str:
    """One prompt with the response of each condition beside the others; the first trial where there are several."""
    # In reverse, so that of several trials the first is the one that stays.
    first = {row["condition"]: row for row in reversed(rows.to_dict("records"))}
    shown = [name for name in CONDITION_COLORS if name in first]
    bare = next((first[name]["prompt"] for name in ("none", "vector", "random") if name in first), None)
    full = next((first[name]["prompt"] for name in ("text", "text+vector") if name in first), None)
    unsteered = first["none"]["response"] if "none" in first else None
    cards = [_card(first[name], unsteered if name == "vector" else None) for name in shown]
    return f'<div class="sample">{_query(bare, full)}<div class="columns">{"".join(cards)}</div></div>'


def _query(bare: str | None, full: str | None) -> str:
    """The prompt, with the instruction that only the text conditions saw set apart."""
    if bare is None or full is None or not full.startswith(bare):
        prompts = [prompt for prompt in (bare, full) if prompt is not None]
        return "".join(f'<p class="query" dir="auto">{html.escape(prompt)}</p>' for prompt in prompts)
    instruction = html.escape(full[len(bare) :])
    return f'<p class="query" dir="auto">{html.escape(bare)}<b title="text conditions only">{instruction}</b></p>'


def _card(row: Mapping[Any, Any], unsteered: str | None) -> str:
    condition, response = row["condition"], row["response"]
    text = html.escape(response) if unsteered is None else mark_changes(unsteered, response)
    verdict = (
        '<span class="badge yes">✓ followed</span>'
        if row["followed"]
        else '<span class="badge no">✗ not followed</span>'
    )
    facts = [f"{int(row['n_words'])} words"]
    if row["followed"] and not row["followed_strict"]:
        facts.append("not strictly")
    if not is_missing(row["perplexity"]):
        facts.append(f"perplexity {number(row['perplexity'])}")
    if row["finish_reason"] == "length":
        facts.append("cut at the limit")
    return (
        f'<article class="card" style="border-top-color:{CONDITION_COLORS[condition]}">'
        f"<header><b>{html.escape(condition)}</b>{verdict}</header>"
        f'<p class="note">{" · ".join(facts)}</p>'
        f'<div class="response" dir="auto" tabindex="0">{text or "<i>(empty response)</i>"}</div></article>'
    )


def mark_changes(before: str, after: str) -> str:
    """`after` as HTML, with runs of words that are not in `before`, in order, inside <mark>.

    Case counts, since some instructions change nothing else. Long texts are compared by difflib's quick heuristic,
    which may mark a frequent word that did not change: the exact search takes minutes on a text that repeats itself.

    Example:
        >>> mark_changes("rain falls down", "rain FALLS down")
        'rain <mark>FALLS</mark> down'
    """
    old, matches = WORD.findall(before), list(WORD.finditer(after))
    new = [match.group() for match in matches]
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=max(len(old), len(new)) > _EXACT_WORDS)
    pieces, end = [], 0
    for tag, _, _, start_word, end_word in matcher.get_opcodes():
        if tag in ("replace", "insert"):
            start = matches[start_word].start()
            pieces.append(html.escape(after[end:start]))
            end = matches[end_word - 1].end()
            pieces.append(f"<mark>{html.escape(after[start:end])}</mark>")
    return "".join([*pieces, html.escape(after[end:])])
