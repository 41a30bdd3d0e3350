"""Points of pairs and numbers over the layers: what the figures hold, how a slider moves them, and how they are labelled."""

import numpy as np
import pandas as pd
import pytest

from steerlens.errors import DataError
from steerlens.figures.geometry import embedding_scatter, line_scatter
from steerlens.figures.measures import measure_curves, projection_profiles
from steerlens.figures.theme import CONDITION_COLORS, instruction_style, number_text

NAMES = ["punctuation:no_comma", "startend:quotation"]


def points(layers: tuple[int, ...] = (1, 4, 6), *, deep: bool = False) -> pd.DataFrame:
    parts = []
    for layer in layers:
        rows = {"instruction": np.repeat(NAMES, 3), "prompt_id": [f"p{i}" for i in range(6)], "query": "Why <b> & how?"}
        axes = {axis: layer * (1.0 + i) * np.arange(6) for i, axis in enumerate("xyz"[: 2 + deep])}
        parts.append(pd.DataFrame({"layer": layer, **rows, **axes}))
    return pd.concat(parts, ignore_index=True)


def test_every_instruction_is_a_trace_in_its_colour_and_symbol_with_the_query_on_hover() -> None:
    fig = embedding_scatter(points())
    styles = instruction_style(NAMES)
    assert [trace.name for trace in fig.data] == ["no comma", "quotation"]
    for trace, name in zip(fig.data, NAMES, strict=True):
        assert (trace.marker.color, trace.marker.symbol) == styles[name]
        assert set(trace.customdata) == {"Why &lt;b&gt; &amp; how?"}


def test_the_slider_moves_the_points_of_the_same_traces_to_each_layer() -> None:
    table = points()
    fig = embedding_scatter(table, notes={1: "a", 4: "b", 6: "c"})
    (slider,) = fig.layout.sliders
    assert [step.label for step in slider.steps] == ["1", "4", "6"]
    assert slider.active == 1
    for step, layer in zip(slider.steps, (1, 4, 6), strict=True):
        data, layout = step.args
        rows = table[table["layer"] == layer]
        for index, name in enumerate(NAMES):
            assert data["x"][index] == rows[rows["instruction"] == name]["x"].tolist()
            assert data["y"][index] == rows[rows["instruction"] == name]["y"].tolist()
        assert layout["title.subtitle.text"] == f"layer {layer}: " + {1: "a", 4: "b", 6: "c"}[layer]
        low, high = layout["xaxis.range"]
        assert low < rows["x"].min() < rows["x"].max() < high


def test_the_layer_that_is_shown_first_is_the_middle_one_or_the_one_asked_for() -> None:
    assert list(embedding_scatter(points()).data[0].x) == [0.0, 4.0, 8.0]
    fig = embedding_scatter(points(), layer=6)
    assert list(fig.data[0].x) == [0.0, 6.0, 12.0]
    assert fig.layout.sliders[0].active == 2
    assert fig.layout.title.subtitle.text == "layer 6"


def test_one_instruction_is_named_in_the_legend() -> None:
    one = points()
    (trace,) = embedding_scatter(one[one["instruction"] == NAMES[0]]).data
    assert trace.showlegend


def test_the_legend_of_many_instructions_has_the_height_of_the_page() -> None:
    table = pd.concat([points().assign(instruction=f"own:{number}") for number in range(40)], ignore_index=True)
    fig = embedding_scatter(table.sort_values("layer", kind="stable"))
    assert fig.layout.legend.maxheight >= 19 * 40  # plotly's own bound is the height of the points
    assert fig.layout.height >= fig.layout.margin.t + 19 * 40


def test_one_layer_has_no_slider() -> None:
    assert not embedding_scatter(points((2,))).layout.sliders


def test_three_dimensions_have_symbols_that_plotly_knows_and_ranges_of_their_scene() -> None:
    table = points(deep=True)
    names = [f"own:{number}" for number in range(54)]
    many = pd.DataFrame(
        {"layer": 0, "instruction": names, "prompt_id": names, "query": "q", "x": 0.0, "y": 0.0, "z": 0.0}
    )
    assert len(embedding_scatter(many).data) == 54
    fig = embedding_scatter(table)
    assert {trace.type for trace in fig.data} == {"scatter3d"}
    assert "scene.zaxis.range" in fig.layout.sliders[0].steps[0].args[1]
    assert fig.layout.scene.zaxis.range[1] > 60
    assert fig.layout.scene.zaxis.title.text == "third"
    assert (
        embedding_scatter(table, method="pca", notes="PCA").layout.title.subtitle.text
        == "layer 4: PCA; axes: residual units"
    )


def test_t_sne_has_no_numbers_on_its_axes_and_pca_has_units() -> None:
    flat, metric = embedding_scatter(points()), embedding_scatter(points(), method="pca")
    assert flat.layout.xaxis.showticklabels is False
    assert flat.layout.xaxis.title.text == "first axis (no unit)"
    assert metric.layout.xaxis.title.text == "first axis (residual units)"
    assert metric.layout.yaxis.scaleanchor == "x"


def test_points_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(DataError, match="missing: y"):
        embedding_scatter(points().drop(columns="y"))
    with pytest.raises(DataError, match="at least one row"):
        embedding_scatter(points().head(0))
    with pytest.raises(DataError, match=r"layer must be one of the frame's \[1, 4, 6\], got 3"):
        embedding_scatter(points(), layer=3)
    with pytest.raises(
        DataError, match="every layer must have the same pairs in the same order, and layer 6 has others"
    ):
        embedding_scatter(points().iloc[:-1])


def numbered() -> tuple[pd.DataFrame, pd.DataFrame]:
    pairs = points((1, 4)).assign(number=np.tile([5.0, 5.0, 1.0, 1.0, 3.0, 3.0], 2)).drop(columns="instruction")
    rows = [
        {"layer": layer, "measure": name, "value": 1 / layer, "low": 0.1, "high": 1.0, "control": 0.5}
        for layer in (1, 4)
        for name in ("spearman", "share")
    ]
    return pairs, pd.DataFrame(rows)


def test_numbers_are_drawn_in_their_order_and_their_means_along_a_path() -> None:
    pairs, measures = numbered()
    fig = line_scatter(pairs, measures, layer=4)
    assert [trace.name for trace in fig.data] == ["1", "3", "5", "mean"]
    assert len({trace.marker.color for trace in fig.data[:3]}) == 3
    path = fig.data[3]
    assert path.text == ("<b>1</b>", "<b>3</b>", "<b>5</b>")
    means = pairs[pairs["layer"] == 4].groupby("number")["x"].mean()
    assert list(path.x) == means.tolist()
    assert [trace.marker.color for trace in fig.data[:3]] == list(path.marker.color)
    expected = (
        "rank correlation with the number 0.25 [0.1, 1], shuffled 0.50<br>share of the first component 0.25 [0.1, 1]"
    )
    assert fig.layout.title.subtitle.text.startswith(expected)
    moved, layout = fig.layout.sliders[0].steps[0].args
    assert moved["x"][3] == pairs[pairs["layer"] == 1].groupby("number")["x"].mean().tolist()
    assert "number 1 [0.1, 1]" in layout["title.subtitle.text"]


def test_a_line_needs_its_measures() -> None:
    pairs, measures = numbered()
    with pytest.raises(DataError, match="missing: control"):
        line_scatter(pairs, measures.drop(columns="control"))


def curves(layers: tuple[int, ...] = (0, 2, 5)) -> pd.DataFrame:
    rows = [
        {"instruction": name, "layer": layer, "value": 0.5 + i, "low": 0.4 + i, "high": 0.7 + i, "control": 0.0}
        | {"control_low": -0.1, "control_high": 0.2}
        for i, name in enumerate(NAMES)
        for layer in layers
    ]
    return pd.DataFrame(rows)


def test_curves_hold_each_number_with_its_interval_and_the_control_as_a_band() -> None:
    fig = measure_curves(curves().iloc[[2, 0, 1, 5, 4, 3]], unit="cosine", control="shuffled")
    values = [trace for trace in fig.data if trace.name == "value"]
    assert [trace.line.color for trace in values] == [instruction_style(NAMES)[name][0] for name in NAMES]
    for trace in values:
        assert list(trace.x) == [0, 2, 5]
        assert np.asarray(trace.error_y.array) == pytest.approx(np.full(3, 0.2))
        assert np.asarray(trace.error_y.arrayminus) == pytest.approx(np.full(3, 0.1))
        assert trace.customdata[0][1] == "0 [-0.1, 0.2]"
    bands = [trace for trace in fig.data if trace.name == "shuffled (middle 95\u00a0%)"]
    assert list(bands[0].y) == [0.2] * 5 + [-0.1] * 5
    assert list(bands[0].x[:5]) == [-0.4, 0, 2, 5, 5.4]
    assert [trace.showlegend for trace in bands] == [True, False]
    assert fig.layout.yaxis.title.text == "cosine"


def test_panels_share_a_scale_with_zero_and_the_lowest_says_the_layer() -> None:
    fig = measure_curves(pd.concat([curves().assign(panel=name) for name in "abcd"]), panels="panel", columns=2)
    assert len({axis.range for axis in fig.select_yaxes()}) == 1
    assert fig.layout.yaxis.range[0] < 0 < 1.7 < fig.layout.yaxis.range[1]
    assert [axis.title.text for axis in fig.select_xaxes()] == [None, None, "layer", "layer"]
    assert [axis.showticklabels for axis in fig.select_xaxes()] == [False, False, True, True]


def test_a_logarithmic_scale_holds_all_numbers_above_zero() -> None:
    table = curves().assign(value=5.0, low=2.0, high=9.0, control=100.0, control_low=90.0, control_high=120.0)
    axis = measure_curves(table, log=True).layout.yaxis
    assert axis.type == "log"
    assert 10 ** axis.range[0] < 2
    assert 120 < 10 ** axis.range[1] < 200


def test_missing_numbers_and_a_single_layer_are_drawn() -> None:
    table = curves((3,)).assign(control_low=np.nan, control_high=np.nan)
    assert {trace.name for trace in measure_curves(table).data} == {"value"}
    empty = curves().assign(**dict.fromkeys(["value", "low", "high", "control", "control_low", "control_high"], np.nan))
    assert measure_curves(empty).data[0].customdata[0][0] == "\u2013"
    assert len(measure_curves(empty, log=True).data) == 2


def test_curves_refuse_a_frame_without_their_columns() -> None:
    with pytest.raises(DataError, match="missing: control_high"):
        measure_curves(curves().drop(columns="control_high"))
    with pytest.raises(DataError, match="at least one row"):
        measure_curves(curves().head(0))


def test_profiles_draw_both_sides_and_the_gap_of_a_random_direction() -> None:
    rows = [
        {
            "instruction": name,
            "layer": layer,
            "side": side,
            "mean": mean,
            "std": 1.0,
            "low": mean - 0.2,
            "high": mean + 0.2,
        }
        for name in NAMES
        for layer in (0, 1)
        for side, mean in (("without", 1.0), ("with", 5.0))
    ]
    fig = projection_profiles(pd.DataFrame(rows).assign(random_gap=0.5))
    lines = {trace.name: trace for trace in fig.data if trace.mode == "lines+markers"}
    assert lines["with it"].line.color == CONDITION_COLORS["text"]
    assert list(lines["without the instruction"].y) == [1.0, 1.0]
    assert lines["with it"].customdata[0] == "5 [4.8, 5.2]"
    gap = next(trace for trace in fig.data if trace.name == "gap along a random direction")
    assert (min(gap.y), max(gap.y)) == (2.75, 3.25)
    deviation = next(trace for trace in fig.data if trace.name == "with it, deviation")
    assert (min(deviation.y), max(deviation.y)) == (4.0, 6.0)
    with pytest.raises(DataError, match="missing: random_gap"):
        projection_profiles(pd.DataFrame(rows))


def test_a_number_is_written_with_its_interval_where_it_has_one() -> None:
    assert number_text({"value": 0.314159, "low": 0.2, "high": 0.4}) == "0.314 [0.2, 0.4]"
    assert number_text({"value": 2.0, "low": float("nan"), "high": float("nan")}) == "2"
    assert number_text({"value": float("nan"), "low": 0.0, "high": 0.0}) == "\u2013"
