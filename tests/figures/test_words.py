"""Names and tokens in figures: whatever a reader calls a vector, it is seen as it is, and leaves room for what is drawn."""

import html
import re
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from steerlens.figures.attention import attention_mass_by_layer, attention_mass_map, head_profile_map
from steerlens.figures.cells import four_cells
from steerlens.figures.gates import active_layers, gated_text
from steerlens.figures.geometry import embedding_scatter
from steerlens.figures.layers import coeff_curve, layer_curve
from steerlens.figures.matrices import cosine_heatmap, transfer_matrix
from steerlens.figures.measures import measure_curves
from steerlens.figures.methods import instruction_strength_heatmap, method_comparison
from steerlens.figures.patching import attribution_map, patching_map
from steerlens.figures.studies import necessity_by_layer, steering_by_layer
from steerlens.figures.tokens import token_table
from steerlens.figures.words import name_lines, shown, shown_name
from tests.figures import test_attention, test_geometry, test_lens, test_patching, test_pictures, test_studies

HOSTILE = "<b>x</b> & a name of one's own that is much longer than anything that has room beside a picture or above it"
OTHER = "short:one"


def renamed(table: pd.DataFrame) -> pd.DataFrame:
    """The table of one instruction, or its first one, under both names."""
    one = table[table["instruction"] == table["instruction"].iloc[0]]
    return pd.concat([one.assign(instruction=name) for name in (HOSTILE, OTHER)], ignore_index=True)


FIGURES: dict[str, Callable[[], go.Figure]] = {
    "four_cells": lambda: four_cells(test_pictures.by_instruction([HOSTILE, OTHER])),
    "layer_curve": lambda: layer_curve(renamed(test_pictures.search_of("a:b", [1, 2]))),
    "coeff_curve": lambda: coeff_curve(renamed(test_pictures.strengths_of("a:b", [0.1, 0.2]))),
    "cosine_heatmap": lambda: cosine_heatmap(np.eye(2), [HOSTILE, OTHER]),
    "transfer_matrix": lambda: transfer_matrix(renamed(test_studies.transfer())),
    "measure_curves": lambda: measure_curves(renamed(test_geometry.curves())),
    "embedding_scatter": lambda: embedding_scatter(renamed(test_geometry.points((2,)))),
    "patching_map": lambda: patching_map(test_patching.patched(HOSTILE, OTHER)),
    "attribution_map": lambda: attribution_map(test_patching.written(HOSTILE, OTHER)),
    "steering_by_layer": lambda: steering_by_layer(renamed(test_studies.steering())),
    "necessity_by_layer": lambda: necessity_by_layer(renamed(test_studies.ablated())),
    "token_table": lambda: token_table(test_lens.vocabulary([HOSTILE, OTHER], [2])),
    "attention_mass_map": lambda: attention_mass_map(test_attention.masses(HOSTILE, OTHER)),
    "attention_mass_by_layer": lambda: attention_mass_by_layer(test_attention.masses(HOSTILE, OTHER)),
    "head_profile_map": lambda: head_profile_map(test_attention.profile(HOSTILE, OTHER)),
    "gated_text": lambda: gated_text(
        test_attention.steps("accepted", "rejected", prompt=HOSTILE, tokens=[HOSTILE, "a"])
    ),
    "active_layers": lambda: active_layers(test_attention.steps("accepted", prompt=HOSTILE)),
    "method_comparison": lambda: method_comparison(test_attention.compared(HOSTILE, alone=(OTHER,))),
    "instruction_strength_heatmap": lambda: instruction_strength_heatmap(
        test_attention.by_setting(HOSTILE, OTHER, methods=(HOSTILE,), alone=(HOSTILE + "!",))
    ),
    "token_bars": lambda: token_table(test_lens.vocabulary([HOSTILE], [2])),
}


def labels(fig: go.Figure) -> Iterator[str]:
    """What stands in the figure without being pointed at: titles, names of panels, of axes' ticks and of the legend."""
    yield fig.layout.title.text
    yield from (note.text for note in fig.layout.annotations)
    for axis in (*fig.select_xaxes(), *fig.select_yaxes()):
        yield from axis.ticktext or ()
    yield from (trace.name for trace in fig.data if trace.name and trace.showlegend is not False)


def lines(text: str) -> list[str]:
    """What is seen of a label, line by line."""
    return [html.unescape(re.sub(r"</?b>", "", line)) for line in text.split("<br>")]


@pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES)
def test_a_name_is_no_markup_and_leaves_room(figure: Callable[[], go.Figure]) -> None:
    fig = figure()
    text = fig.to_json().replace("\\u003c", "<").replace("\\u003e", ">")
    assert "<b>x" not in text
    assert "&lt;b&gt;x" in text
    for label in labels(fig):
        assert max(map(len, lines(label))) <= (85 if label == fig.layout.title.text else 50), label


@pytest.mark.parametrize(
    ("token", "seen"),
    [(" rain", "·rain"), ("\n", "\\n"), ("<b>&", "&lt;b&gt;&amp;"), ("", "∅"), ("é", "é"), ("a" * 30, "a" * 23 + "…")],
)
def test_a_token_is_seen_whole_and_is_no_markup(token: str, seen: str) -> None:
    assert shown(token) == seen


def test_names_are_cut_before_they_are_escaped() -> None:
    assert shown_name("<<<<<<", 4) == "&lt;&lt;&lt;…"
    assert name_lines("one two\nthree <four>", 6) == "one<br>two<br>three<br>&lt;four&gt;"


def test_a_name_of_too_many_lines_ends_in_a_sign_of_it() -> None:
    assert name_lines("one two three four", 5, most=2) == "one<br>two…"
    assert name_lines("one two", 5, most=2) == "one<br>two"
