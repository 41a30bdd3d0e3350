"""Pictures of studies of layers: what they hold and how it is labelled."""

import pandas as pd
import plotly.graph_objects as go
import pytest

from steerlens.errors import DataError
from steerlens.figures.matrices import transfer_matrix
from steerlens.figures.studies import necessity_by_layer, steering_by_layer
from steerlens.figures.theme import CONDITION_COLORS
from steerlens.stats.rates import wilson_interval

NAMES = ["change_case:english_capital", "startend:quotation"]


def row(instruction: str, condition: str, followed: int, n: int = 10, **columns: object) -> dict[str, object]:
    low, high = wilson_interval(followed, n)
    rate = {"n": n, "followed": followed, "rate": followed / n, "low": low, "high": high, "degenerate": followed / 20}
    return {"instruction": instruction, "condition": condition, **rate, **columns}


def steering(name: str = NAMES[0], modes: tuple[str, ...] = ("alone", "from"), layers: tuple[int, ...] = (2, 4, 6)):
    rows = [row(name, "none", 1, mode=None, layer=None), row(name, "text", 8, mode=None, layer=None)]
    for mode in modes:
        for layer in layers:
            rows += [
                row(name, "vector", min(layer, 10), mode=mode, layer=layer),
                row(name, "random", 1, mode=mode, layer=layer),
            ]
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def ablated(name: str = NAMES[0]):
    rows = [row(name, "none", 1, window=None, layer=None), row(name, "text", 9, window=None, layer=None)]
    places = [("1", 2), ("1", 3), ("3", 2), ("all", None)]
    for window, layer in places:
        for condition, followed in (("text+vector", 2), ("random", 7), ("random ablated", 9)):
            loss = (9 - followed) / 10
            lost = {"loss": loss, "loss_low": loss - 0.2, "loss_high": loss + 0.1}
            rows.append(row(name, condition, followed, window=window, layer=layer, **lost))
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def transfer(name: str = NAMES[0], layers: tuple[int, ...] = (1, 3)):
    rows = [row(name, "none", 1, from_layer=None, layer=None), row(name, "text", 9, from_layer=None, layer=None)]
    for layer in layers:
        for source in layers:
            followed = 10 if source == layer else min(source + layer, 9)
            rows.append(row(name, "vector", followed, from_layer=source, layer=layer))
        rows.append(row(name, "random", min(layer, 9), from_layer=None, layer=layer))
    return pd.DataFrame(rows).astype({"layer": "Int64", "from_layer": "Int64"})


def named(fig: go.Figure, name: str, kind: str = "scatter") -> list[go.Scatter]:
    return [trace for trace in fig.data if trace.name == name and trace.type == kind]


def test_steering_has_a_panel_per_instruction_and_mode_with_rates_controls_and_references() -> None:
    fig = steering_by_layer(pd.concat([steering(name) for name in NAMES]))
    notes = [note.text for note in fig.layout.annotations]
    assert notes[:2] == ["<b>english capital<br>at one layer</b>", "<b>english capital<br>from a layer on</b>"]
    assert len(notes) == 4
    vector, random = named(fig, "vector")[0], named(fig, "random")[0]
    assert (list(vector.x), list(vector.y)) == ([2, 4, 6], [0.2, 0.4, 0.6])
    assert list(random.y) == [0.1] * 3
    assert (vector.line.color, random.line.color) == (CONDITION_COLORS["vector"], CONDITION_COLORS["random"])
    assert [set(line.y) for line in named(fig, "no steering")] == [{0.1}] * 4
    assert [set(line.y) for line in named(fig, "instruction as text")] == [{0.8}] * 4
    band = named(fig, "95\u00a0% interval")[0]
    rows = steering()[steering()["condition"] == "vector"].head(3)
    assert list(band.y) == [*rows["high"], *rows["low"][::-1]]
    assert "english capital, at one layer<br>layer 4, vector: <b>40\u00a0%" in vector.customdata[1]
    assert [trace.name for trace in fig.data if trace.showlegend] == [
        *("95\u00a0% interval", "vector", "random", "no steering", "instruction as text"),
    ]


def test_degenerate_texts_stand_below_the_rates_of_the_same_condition() -> None:
    fig = steering_by_layer(steering(modes=("alone",)))
    (bars,) = named(fig, "vector", "bar")
    assert (list(bars.x), list(bars.y)) == ([2, 4, 6], [0.1, 0.2, 0.3])
    assert bars.yaxis != named(fig, "vector")[0].yaxis
    assert bars.marker.color == CONDITION_COLORS["vector"]


def test_one_layer_alone_is_drawn_as_points_side_by_side_with_whiskers() -> None:
    fig = steering_by_layer(steering(modes=("alone",), layers=(4,)))
    assert not named(fig, "95\u00a0% interval")
    (vector,), (random,) = named(fig, "vector"), named(fig, "random")
    assert vector.x[0] < 4 < random.x[0]
    assert vector.error_y.visible
    assert vector.error_y.array[0] == pytest.approx(wilson_interval(4, 10)[1] - 0.4)


def test_necessity_shows_losses_beside_two_controls_and_the_whole_effect() -> None:
    fig = necessity_by_layer(ablated())
    notes = [note.text for note in fig.layout.annotations]
    assert notes == [f"<b>english capital<br>{words} ablated</b>" for words in ("1 layer", "3 layers", "all layers")]
    found = {name: [list(line.y) for line in named(fig, name)] for name in ("ablated", "random push", "random ablated")}
    assert found["ablated"] == [[0.7, 0.7], [0.7], [0.7]]
    assert found["random push"] == [[0.2, 0.2], [0.2], [0.2]]
    assert found["random ablated"] == [[0.0, 0.0], [0.0], [0.0]]
    assert [line.y[0] for line in named(fig, "whole effect")] == pytest.approx([0.8] * 3)
    low, high = fig.layout.yaxis.range
    assert low < -0.2 < 0.8 < high
    assert "lost: 70 points [50, 80]" in named(fig, "ablated")[0].customdata[0]
    assert fig.layout.yaxis.title.text == "lost (points)"


def test_where_all_layers_are_ablated_there_is_no_layer_to_tell() -> None:
    fig = necessity_by_layer(ablated())
    everywhere = named(fig, "ablated")[2]
    axis = fig.layout["xaxis" + everywhere.xaxis[1:]]
    assert (axis.tickvals, axis.ticktext) == ((0,), ("all",))
    assert "all layers, ablated" in everywhere.customdata[0]


def test_a_transfer_is_a_matrix_over_its_references() -> None:
    fig = transfer_matrix(transfer())
    matrix, references = fig.data
    assert [list(cells) for cells in matrix.z] == [[1.0, 0.4], [0.4, 1.0]]
    assert [list(cells) for cells in references.z] == [[0.1, 0.3], [0.1, 0.1], [0.9, 0.9]]
    assert fig.layout.yaxis.ticktext == ("1", "3", "random", "none", "text")
    assert fig.layout.xaxis.ticktext == ("1", "3")
    assert fig.layout.yaxis.autorange == "reversed"
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (0, 1)
    # Rows say where a direction is from, columns where it is added.
    assert "direction of layer 1 at layer 3: <b>40\u00a0%" in matrix.customdata[0][1]
    assert "a random direction at layer 3: <b>30\u00a0%" in references.customdata[0][1]
    assert min(references.y) > max(matrix.y) + 1


def test_a_star_marks_cells_most_of_whose_texts_are_degenerate() -> None:
    table = transfer()
    table.loc[(table["from_layer"] == 1) & (table["layer"] == 3), "degenerate"] = 0.6
    matrix, _ = transfer_matrix(table).data
    assert [list(cells) for cells in matrix.text] == [["100", "40*"], ["40", "100"]]
    many, _ = transfer_matrix(transfer(layers=tuple(range(13))).assign(degenerate=0.6)).data
    assert {text for cells in many.text for text in cells} == {"*"}  # no room for numbers


def test_figures_draw_the_instructions_that_are_asked_for() -> None:
    table = pd.concat([steering(name) for name in [*NAMES, "all"]])
    fig = steering_by_layer(table, instructions=["all", NAMES[1]], title="Mine")
    assert [note.text.split("<br>")[0] for note in fig.layout.annotations][::2] == [
        "<b>all instructions",
        "<b>quotation",
    ]
    assert fig.layout.title.text == "Mine"
    assert len(steering_by_layer(table, instructions=NAMES[0]).layout.annotations) == 2
    with pytest.raises(
        DataError, match=r"instructions must be in the table, got 'startend:quote'; did you mean 'startend"
    ):
        steering_by_layer(table, instructions=["startend:quote"])


@pytest.mark.parametrize(
    ("draw", "table", "column"),
    [
        (steering_by_layer, steering(), "mode"),
        (necessity_by_layer, ablated(), "window"),
        (necessity_by_layer, ablated(), "loss"),
        (transfer_matrix, transfer(), "from_layer"),
    ],
)
def test_tables_that_cannot_be_drawn_are_refused(draw, table, column) -> None:
    with pytest.raises(DataError, match=f"missing: {column}"):
        draw(table.drop(columns=column))
    with pytest.raises(DataError, match="at least one row, got none"):
        draw(table.head(0))
    with pytest.raises(DataError, match=r"must have rows with a (mode|window|layer), got none"):
        draw(table.head(2))
