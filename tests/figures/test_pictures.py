"""Figures: what they hold and how it is labelled, not how it looks."""

import math
from itertools import pairwise

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from steerlens.errors import DataError
from steerlens.figures.cells import four_cells
from steerlens.figures.layers import coeff_curve, layer_curve
from steerlens.figures.matrices import MISSING_CELL, cosine_heatmap
from steerlens.figures.theme import CONDITION_COLORS, percent, rate_text, short_label, theme
from steerlens.stats.rates import wilson_interval

INSTRUCTIONS = ["change_case:english_capital", "detectable_format:number_highlighted_sections", "startend:quotation"]


def rates(followed: dict[str, int], n: int = 20, **columns: str) -> pd.DataFrame:
    rows = []
    for condition, count in followed.items():
        low, high = wilson_interval(count, n)
        row = {"condition": condition, "n": n, "followed": count, "rate": count / n, "low": low, "high": high}
        rows.append(columns | row)
    return pd.DataFrame(rows)


def by_instruction(names: list[str]) -> pd.DataFrame:
    counts = {"text": 12, "none": 1, "vector": 6, "text+vector": 15, "random": 2}
    return pd.concat([rates(counts, instruction=name) for name in names], ignore_index=True)


def search_of(
    instruction: str, layers: list[int], *, coeffs: tuple[float, ...] = (1.0,), chosen: int = 0
) -> pd.DataFrame:
    candidates = [(pd.NA, float("nan")), *((layer, coeff) for coeff in coeffs for layer in layers)]
    rows = []
    for index, (layer, coeff) in enumerate(candidates):
        low, high = wilson_interval(index, 20)
        row = {
            "instruction": instruction,
            "layer": layer,
            "operator": "add",
            "positions": "all",
            "coeff": coeff,
            "n": 20,
            "followed": index,
            "rate": index / 20,
            "low": low,
            "high": high,
            "degenerate": index / 40,
            "chosen": index == chosen + 1,
        }
        rows.append(row)
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def strengths_of(instruction: str, coeffs: list[float], *, chosen: int = 0) -> pd.DataFrame:
    """A search of a method's strengths, as `sweep` has it."""
    search = search_of(instruction, [*range(len(coeffs))], chosen=chosen)
    operators = ["set_projection", *["bias"] * len(coeffs)]
    return search.assign(layer=pd.NA, coeff=[0.0, *coeffs], operator=operators).astype({"layer": "Int64"})


def bars(fig: go.Figure) -> list[go.Bar]:
    return [trace for trace in fig.data if trace.type == "bar"]


def texts(fig: go.Figure) -> list[go.Scatter]:
    return [trace for trace in fig.data if trace.type == "scatter" and trace.mode == "text"]


def named(fig: go.Figure, name: str) -> list[go.Scatter]:
    return [trace for trace in fig.data if trace.name == name]


def test_overall_bars_show_each_rate_with_its_interval_in_the_fixed_order_and_colour() -> None:
    table = rates({"text": 12, "none": 1, "vector": 6, "text+vector": 15, "random": 2})
    fig = four_cells(table)
    assert [bar.name for bar in bars(fig)] == ["none", "random", "vector", "text", "text+vector"]
    rows = {row["condition"]: row for row in table.to_dict("records")}
    for bar in bars(fig):
        row = rows[bar.name]
        assert bar.x[0] == row["rate"]
        assert bar.x[0] + bar.error_x.array[0] == pytest.approx(row["high"])
        assert bar.x[0] - bar.error_x.arrayminus[0] == pytest.approx(row["low"])
        assert bar.marker.color == CONDITION_COLORS[bar.name]
        assert f"{row['followed']} of 20 responses" in bar.hovertemplate
    assert fig.layout.yaxis.categoryarray == ("none", "random", "vector", "text", "text+vector")
    assert fig.layout.xaxis.title.text == "responses that follow (%)"
    assert fig.layout.yaxis.title.text == "condition"
    assert "follow their instruction" in fig.layout.title.text


def test_overall_bars_say_rate_interval_and_n_in_words() -> None:
    (text,) = texts(four_cells(rates({"vector": 6})))
    assert text.text == ("30\u00a0% [15, 52] of 20",)


def test_every_instruction_has_a_panel_with_its_name_and_all_its_bars() -> None:
    fig = four_cells(by_instruction(INSTRUCTIONS))
    labels = [note.text for note in fig.layout.annotations]
    assert labels == ["<b>english capital</b>", "<b>number highlighted<br>sections</b>", "<b>quotation</b>"]
    assert len(bars(fig)) == 15
    assert {bar.xaxis for bar in bars(fig)} == {"x", "x2", "x3"}
    assert {bar.name: bar.marker.color for bar in bars(fig)}.items() <= CONDITION_COLORS.items()


@pytest.mark.parametrize("n", [1, 2, 4, 12, 31])
@pytest.mark.parametrize("columns", [1, 3, 4])
def test_panels_keep_their_height_and_never_overlap(n: int, columns: int) -> None:
    fig = four_cells(by_instruction([f"kind:name_{index}" for index in range(n)]), columns=columns)
    inner = fig.layout.height - fig.layout.margin.t - fig.layout.margin.b
    axes = [axis for axis in fig.select_yaxes() if axis.anchor]
    heights = {round((axis.domain[1] - axis.domain[0]) * inner) for axis in axes}
    assert len(axes) == n
    assert heights == {113}
    in_column: dict[tuple[float, ...], list[tuple[float, ...]]] = {}
    for axis, x_axis in zip(fig.select_yaxes(), fig.select_xaxes(), strict=True):
        in_column.setdefault(x_axis.domain, []).append(axis.domain)
    for domains in in_column.values():
        ordered = sorted(domains)
        assert all((above[0] - below[1]) * inner >= 40 for below, above in pairwise(ordered))


def test_the_lowest_panel_of_each_column_names_the_axis() -> None:
    fig = four_cells(by_instruction([f"kind:name_{index}" for index in range(4)]), columns=3)
    titles = [axis.title.text for axis in fig.select_xaxes()]
    assert titles == [None, *["responses that follow (%)"] * 3]


def test_an_instruction_without_some_condition_keeps_the_others_in_place() -> None:
    table = pd.concat([rates({"none": 1, "vector": 6}, instruction="a:b"), rates({"vector": 3}, instruction="c:d")])
    fig = four_cells(table)
    assert [(bar.xaxis, bar.name) for bar in bars(fig)] == [("x", "none"), ("x", "vector"), ("x2", "vector")]
    assert fig.layout.yaxis2.categoryarray == ("none", "vector")


def test_a_missing_rate_is_a_dash() -> None:
    assert percent(float("nan")) == "\u2013"
    assert rate_text({"rate": float("nan"), "low": float("nan"), "high": float("nan")}) == "\u2013"
    table = rates({"none": 1}).assign(n=0, followed=0, rate=math.nan, low=math.nan, high=math.nan)
    (text,) = texts(four_cells(table))
    assert text.text == ("\u2013 of 0",)


def test_tables_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(DataError, match=r"missing: rate"):
        four_cells(rates({"none": 1}).drop(columns="rate"))
    with pytest.raises(DataError, match=r"'vectr'; did you mean 'vector'\?"):
        four_cells(rates({"vectr": 1}))
    with pytest.raises(DataError, match="one row per condition"):
        four_cells(pd.concat([rates({"none": 1}), rates({"none": 2})]))
    with pytest.raises(DataError, match="at least one row"):
        four_cells(rates({"none": 1}).head(0))


def test_layer_curve_draws_the_rates_in_the_order_of_the_layers() -> None:
    search = search_of("a:b", [8, 4, 6])
    fig = layer_curve(search)
    (line,) = named(fig, "rate, vector")
    assert list(line.x) == [4, 6, 8]
    assert list(line.y) == [0.10, 0.15, 0.05]
    (band,) = named(fig, "95\u00a0% interval")
    rows = search.dropna(subset="layer").sort_values("layer")
    assert list(band.y) == [*rows["high"], *rows["low"][::-1]]
    (degenerate,) = named(fig, "degenerate texts")
    assert list(degenerate.y) == [2 / 40, 3 / 40, 1 / 40]
    assert degenerate.yaxis != line.yaxis


def test_layer_curve_marks_the_chosen_layer_and_the_unsteered_rate() -> None:
    search = search_of("a:b", [4, 6, 8], chosen=1)
    search.loc[search["layer"].isna(), ["rate", "followed"]] = [0.35, 7]
    fig = layer_curve(search)
    (ring,) = named(fig, "chosen layer")
    assert (list(ring.x), list(ring.y), ring.text) == ([6], [0.10], ("<b>6</b>",))
    (dashed,) = named(fig, "no steering")
    assert dashed.line.dash == "dash"
    assert list(dashed.y) == [0.35, 0.35]
    assert list(dashed.x) == list(fig.layout.xaxis.range)
    assert fig.layout.xaxis.range[0] < 4
    assert fig.layout.xaxis.range[1] > 8


def test_layer_curve_says_so_where_no_steering_was_chosen() -> None:
    fig = layer_curve(search_of("a:b", [4, 6], chosen=-1))
    (text,) = texts(fig)
    assert text.text == ("<b>no steering chosen</b>",)
    (ring,) = named(fig, "chosen layer")
    assert len(ring.x) == 0


def test_layer_curve_has_two_panels_and_one_name_per_instruction_and_one_legend() -> None:
    fig = layer_curve(pd.concat([search_of(name, [1, 2, 3]) for name in INSTRUCTIONS]))
    assert len(fig.layout.annotations) == len(INSTRUCTIONS)
    assert len(list(fig.select_yaxes())) == 2 * len(INSTRUCTIONS)
    in_legend = [trace.name for trace in fig.data if trace.showlegend]
    assert in_legend == ["95\u00a0% interval", "rate, vector", "degenerate texts", "no steering", "chosen layer"]
    assert [axis.title.text for axis in fig.select_xaxes()] == [None] * 3 + ["layer"] * 3
    assert fig.layout.yaxis.title.text == "follow (%)"


def test_layer_curve_names_the_unit_of_a_coefficient_and_keeps_two_units_apart() -> None:
    lengths, norms = (search_of("a:b", [1, 2], coeffs=(0.5,)).assign(unit=unit) for unit in ("absolute", "resid_norm"))
    fig = layer_curve(pd.concat([lengths, norms.dropna(subset="layer")]))
    lines = [trace for trace in fig.data if str(trace.name).startswith("rate")]
    assert [line.name for line in lines] == ["rate, add, coeff 0.5", "rate, add, coeff 0.5 norms"]
    assert all(len(line.x) == 2 for line in lines)


def test_layer_curve_draws_a_line_for_each_coefficient() -> None:
    fig = layer_curve(search_of("a:b", [1, 2], coeffs=(2.0, 0.5)))
    lines = [trace for trace in fig.data if str(trace.name).startswith("rate")]
    assert [line.name for line in lines] == ["rate, add, coeff 0.5", "rate, add, coeff 2"]
    assert len({line.line.color for line in lines}) == 2
    assert [list(line.y) for line in lines] == [[0.15, 0.20], [0.05, 0.10]]
    assert all(line.error_y.visible for line in lines)
    assert not named(fig, "95\u00a0% interval")


def test_coeff_curve_draws_strengths_in_their_order_at_equal_distances() -> None:
    fig = coeff_curve(strengths_of("a:b", [1.0, 0.01, 0.0], chosen=1))
    (line,) = named(fig, "rate, attention")
    assert list(line.x) == [0, 1, 2]
    assert list(line.y) == [0.15, 0.10, 0.05]  # a bias of 0 is a candidate, not the row without steering
    assert fig.layout.xaxis.ticktext == ("0", "0.01", "1")
    (ring,) = named(fig, "chosen coefficient")
    assert (list(ring.x), ring.text) == ([1], ("<b>0.01</b>",))
    (dashed,) = named(fig, "no steering")
    assert list(dashed.y) == [0.0, 0.0]
    assert {axis.title.text for axis in fig.select_xaxes()} == {None, "coefficient"}
    assert "coefficient %{customdata[2]}, attention" in line.hovertemplate
    assert [shown for *_, shown in line.customdata] == ["0", "0.01", "1"]


def test_coeff_curve_keeps_operators_and_instructions_apart() -> None:
    search = pd.concat([strengths_of(name, [0.1, 0.2]) for name in INSTRUCTIONS])
    fig = coeff_curve(pd.concat([search, search[search["operator"] == "bias"].assign(operator="scale", rate=0.9)]))
    assert [len(named(fig, f"rate, {name}")) for name in ("bias", "scale")] == [3, 3]
    assert {tuple(trace.y) for trace in named(fig, "rate, scale")} == {(0.9, 0.9)}
    assert len(named(fig, "no steering")) == 3


@pytest.mark.parametrize("layers", [[], [5]])
def test_layer_curve_of_one_layer_or_of_none_is_drawn(layers: list[int]) -> None:
    fig = layer_curve(search_of("a:b", layers))
    assert len(named(fig, "no steering")) == 1
    assert [list(trace.x) for trace in named(fig, "rate, vector")] == [[5] for _ in layers]


def test_layer_curve_refuses_a_frame_without_its_columns_or_rows() -> None:
    with pytest.raises(DataError, match="missing: degenerate"):
        layer_curve(search_of("a:b", [1]).drop(columns="degenerate"))
    with pytest.raises(DataError, match="at least one row"):
        layer_curve(search_of("a:b", [1]).head(0))


def test_cosine_heatmap_is_centred_on_zero_and_labelled_on_both_axes() -> None:
    matrix = np.array([[1.0, -0.2, 0.1], [-0.2, 1.0, 0.0], [0.1, 0.0, 1.0]])
    fig = cosine_heatmap(matrix, INSTRUCTIONS)
    (cells,) = fig.data
    assert (cells.zmin, cells.zmid, cells.zmax) == (-1, 0, 1)
    assert (np.asarray(cells.z) == matrix).all()
    names = ["english capital", "number highlighted sectio…", "quotation"]
    assert list(fig.layout.xaxis.ticktext) == [name.strip() for name in fig.layout.yaxis.ticktext] == names
    assert "english capital and number highlighted sections<br>cosine <b>-0.200</b>" in cells.customdata[0]
    assert fig.layout.yaxis.autorange == "reversed"
    assert cells.colorbar.title.text == "cosine"
    frame = pd.DataFrame(matrix, index=INSTRUCTIONS, columns=INSTRUCTIONS)
    assert (np.asarray(cosine_heatmap(frame, INSTRUCTIONS).data[0].z) == matrix).all()


def test_a_cosine_that_is_missing_is_grey_and_an_interval_is_said_on_hovering() -> None:
    matrix = np.array([[1.0, np.nan], [np.nan, 1.0]])
    assert cosine_heatmap(matrix, ["a", "b"]).layout.plot_bgcolor == MISSING_CELL
    assert cosine_heatmap(np.eye(2), ["a", "b"]).layout.plot_bgcolor is None
    intervals = pd.DataFrame([{"first": 3, "second": 4, "low": 0.4, "high": 0.6}])
    fig = cosine_heatmap(np.full((2, 2), 0.5), ["3", "4"], axis="layer", intervals=intervals)
    assert fig.data[0].customdata[0][1] == "3 and 4<br>cosine <b>0.500</b> [0.400, 0.600]"
    assert fig.data[0].customdata[1][0].endswith("[0.400, 0.600]")
    assert fig.layout.xaxis.tickangle == 0


def test_every_label_of_a_large_matrix_is_asked_for() -> None:
    names = [f"language:response_language_{number}" for number in range(22)]
    fig = cosine_heatmap(np.eye(22), names)
    assert len(fig.layout.yaxis.tickvals) == len(fig.layout.yaxis.ticktext) == 22
    assert fig.layout.yaxis.tickfont.size < 12


def test_a_legend_of_several_lines_has_room_above_the_panels() -> None:
    few, many = (layer_curve(search_of("a:b", [1, 2], coeffs=coeffs)) for coeffs in ((1.0,), tuple(range(1, 10))))
    assert many.layout.margin.t > few.layout.margin.t
    inner = {fig.layout.height - fig.layout.margin.t for fig in (few, many)}
    assert len(inner) == 1


def test_cosine_heatmap_refuses_other_shapes_and_values_that_are_no_cosines() -> None:
    with pytest.raises(DataError, match=r"each of 2 labels, got \(2, 3\)"):
        cosine_heatmap(np.zeros((2, 3)), ["a", "b"])
    with pytest.raises(DataError, match=r"cosines must be in \[-1, 1\], got 3"):
        cosine_heatmap(np.full((2, 2), -3.0), ["a", "b"])


def test_instruction_ids_read_as_words() -> None:
    assert short_label("change_case:english_capital") == "english capital"
    assert short_label("startend:quotation+punctuation:no_comma") == "quotation + no comma"
    assert short_label("language:response_language:de") == "response language de"
    assert short_label("plain") == "plain"
    assert short_label("Answer like this: a_b + c") == "Answer like this: a_b + c"


def test_a_theme_is_passed_not_registered() -> None:
    before = pio.templates.default
    assert four_cells(rates({"none": 1})).layout.template == theme()
    assert pio.templates.default == before
