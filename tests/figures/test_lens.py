"""Figures of lenses and effects: what their cells, bars and lines hold, and how they are named."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from steerlens.errors import DataError
from steerlens.figures.effects import effect_curves
from steerlens.figures.lens import lens_heatmap
from steerlens.figures.theme import CONDITION_COLORS
from steerlens.figures.tokens import SIGNS, token_table
from steerlens.stats.rates import require_columns
from tests.unchecked import unchecked

VECTORS = ["change_case:english_capital", "detectable_format:number_highlighted_sections", "my own"]


def vocabulary(vectors: list[str], layers: list[int], *, top_k: int = 12, words: tuple[str, ...] = ()) -> pd.DataFrame:
    """A lens frame: the token of rank 3 of the second vector at layer 2 is " 1.2.3"."""
    rows: list[dict[str, Any]] = []
    for index, vector in enumerate(vectors):
        for layer in layers:
            for sign in (1, -1):
                place = {"vector": vector, "layer": layer, "sign": sign, "norm": "model"}
                for rank in range(top_k):
                    logit, token = 10.0 + index - rank, f" {index}.{layer}.{rank}" if sign == 1 else f"m{rank}"
                    ranges = {"random_low": 1.0, "random_high": 10.5, "text": "", "piece": pd.NA}
                    rows.append({**place, "kind": "promoted", "rank": rank, "token": token, "logit": logit, **ranges})
                for word in words:
                    for piece, token in enumerate((word[:2], word[2:])):
                        ranges = {"random_low": -2.0, "random_high": 2.0, "text": word, "piece": piece}
                        logit = 3.0 if index == 1 else -1.0
                        rows.append({**place, "kind": "target", "rank": 40, "token": token, "logit": logit, **ranges})
    return pd.DataFrame(rows).astype({"piece": "Int64"})


def lens(*, steered: bool = False, n_positions: int = 4, n_layers: int = 3) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows, targets = [], []
    for row in (0, 1):
        for layer in range(n_layers):
            for position in range(n_positions):
                place = {"row": row, "layer": layer, "position": position}
                said = {"token": f" p{position}", "generated": position >= 2, "top": f"{layer}:{position}"}
                cell = {**place, **said, "probability": 0.1 * layer, "entropy": 1.0 + row}
                target = {**place, "target": " x", "log_prob": -1.0 - layer, "rank": 9 - layer}
                if steered:
                    top = "other" if layer == 2 else cell["top"]
                    changes = {"kl": 0.5 * layer, "entropy_change": -0.2 * layer, "top_change": 0.1 * layer}
                    cell |= {"top_steered": top, "probability_steered": 0.3, "entropy_steered": 1.0, **changes}
                    target |= {
                        "log_prob_steered": -1.0,
                        "rank_steered": 7,
                        "log_prob_change": layer * 1.0,
                        "rank_change": layer - 2,
                    }
                rows.append(cell)
                targets += [target, {**target, "target": "y<", "log_prob": -5.0}]
    return pd.DataFrame(rows), pd.DataFrame(targets)


def effects(*targets: str) -> pd.DataFrame:
    rows = []
    for layer in (2, 0, 1):
        for condition in ("vector", "random"):
            names = [("direct", "kl", ""), ("total", "kl", ""), ("both", "correlation", "")]
            names += [(effect, "logit_change", one) for one in targets for effect in ("direct", "total")]
            for effect, measure, target in names:
                numbers = {"mean": layer + 0.5, "low": layer + 0.25, "high": layer + 1.0, "n": 9}
                rows.append(
                    {
                        "layer": layer,
                        "condition": condition,
                        "effect": effect,
                        "measure": measure,
                        "target": target,
                        **numbers,
                    }
                )
    return pd.DataFrame(rows)


def grid(trace: Any, name: str = "text") -> list[list[Any]]:
    return np.asarray(trace[name], dtype=object).tolist()


def test_one_vector_at_one_layer_is_bars_over_the_range_of_random_directions() -> None:
    fig = token_table(vocabulary(VECTORS[:1], [4]))
    assert [annotation.text for annotation in fig.layout.annotations] == [f"<b>{SIGNS[sign]}</b>" for sign in (1, -1)]
    random, logits, *_ = fig.data
    assert (random.base[0], random.base[0] + random.x[0]) == (1.0, 10.5)
    assert list(logits.x) == [10.0 - rank for rank in range(10)]
    assert [label.strip() for label in fig.layout.yaxis.ticktext] == [f"·0.4.{rank}" for rank in range(10)]
    assert "logit 10, rank 0" in logits.hovertext[0]
    assert fig.layout.title.text == "What the english capital vector says in the vocabulary at layer 4"


def test_several_vectors_are_lines_of_cells_bold_where_no_random_direction_reaches() -> None:
    fig = token_table(vocabulary(VECTORS, [2]))
    added, subtracted = fig.data
    assert grid(added)[1][:2] == ["<b>·1.2.0</b>", "·1.2.1"]  # 11 and 10, and the range ends at 10.5
    assert grid(subtracted)[0] == [f"m{rank}" for rank in range(5)]
    assert grid(added, "z")[2] == [12.0, 11.0, 10.0, 9.0, 8.0]
    labels = [label.strip() for label in fig.layout.yaxis.ticktext]
    assert labels == ["english capital", "number highlighted se…", "my own"]
    assert fig.layout.yaxis.autorange == "reversed"
    assert "number highlighted sections, layer 2, adding it says" in grid(added, "hovertext")[1][0]


def test_one_vector_at_several_layers_is_a_line_for_each_layer_from_below() -> None:
    fig = token_table(vocabulary(VECTORS[:1], [5, 2]), top=3)
    assert [label.strip() for label in fig.layout.yaxis.ticktext] == ["2", "5"]
    assert [len(line) for line in grid(fig.data[0])] == [3, 3]
    assert "0.2.0" in grid(fig.data[0])[0][0]
    assert fig.layout.yaxis.autorange is True


def test_a_slider_moves_through_the_layers_of_several_vectors() -> None:
    fig = token_table(vocabulary(VECTORS, [1, 3, 6]))
    (slider,) = fig.layout.sliders
    assert [step.label for step in slider.steps] == ["1", "3", "6"]
    assert [trace.visible for trace in fig.data] == [False] * 4 + [True] * 2
    for step, layer in zip(slider.steps, (1, 3, 6), strict=True):
        seen = [trace for trace, visible in zip(fig.data, step.args[0]["visible"], strict=True) if visible]
        assert len(seen) == 2
        assert f"0.{layer}.0" in grid(seen[0])[0][0]


def test_a_vector_and_a_layer_can_be_chosen() -> None:
    table = vocabulary(VECTORS, [1, 3])
    assert token_table(table, layer=3).layout.sliders == ()
    assert [trace.type for trace in token_table(table, layer=3, vector="my own").data] == ["bar"] * 4
    with pytest.raises(DataError, match=r"layer must be in the frame, got 2; .*known: 1, 3"):
        token_table(table, layer=2)
    with pytest.raises(DataError, match="vector must be in the frame, got 'my'; did you mean 'my own'"):
        token_table(table, vector="my")


def test_targets_are_the_first_tokens_of_their_spellings_with_ranks_and_signed_colours() -> None:
    fig = token_table(vocabulary(VECTORS, [2], words=("rain", " tea")), show="targets")
    (cells,) = fig.data
    assert grid(cells) == [["40", "40"], ["<b>40</b>", "<b>40</b>"], ["40", "40"]]
    assert list(fig.layout.xaxis.ticktext) == ["rain: ra", "·tea: ·t"]
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmid, fig.layout.coloraxis.cmax) == (-3, 0, 3)
    with pytest.raises(DataError, match="targets can be shown where they were looked up, and this frame has none"):
        token_table(vocabulary(VECTORS, [2]), show="targets")


def test_what_cannot_be_shown_is_refused_by_name() -> None:
    with pytest.raises(DataError, match='show must be "tokens" or "targets", got \'target\''):
        unchecked(token_table)(vocabulary(VECTORS, [2]), show="target")
    with pytest.raises(DataError, match="the lens frame must be a table, got dict; give the table of a result"):
        unchecked(require_columns)({}, ["layer"], what="the lens frame")


def test_ranks_are_only_written_where_they_fit() -> None:
    fig = token_table(vocabulary(VECTORS, [2], words=tuple(f"word{i}" for i in range(40))), show="targets")
    widths = {len(text.replace("<b>", "").replace("</b>", "")) for line in grid(fig.data[0]) for text in line}
    assert widths <= {0, 2}
    many = vocabulary(VECTORS, [2], words=tuple(f"word{i}" for i in range(40))).assign(rank=12345)
    assert {
        text.replace("<b></b>", "") for line in grid(token_table(many, show="targets").data[0]) for text in line
    } == {""}


def test_a_heat_map_has_a_cell_per_layer_and_position_with_the_top_token() -> None:
    fig = lens_heatmap(*lens())
    (cells,) = fig.data
    assert grid(cells)[1] == ["1:0", "1:1", "1:2", "1:3"]
    assert grid(cells, "z")[2] == pytest.approx([0.2] * 4)
    assert list(cells.y) == ["0", "1", "2"]
    assert list(fig.layout.xaxis.ticktext) == ["·p0", "·p1", "·p2", "·p3"]
    assert (cells.zmin, cells.zmax) == (0, 1)
    (line,) = fig.layout.shapes
    assert line.x0 == line.x1 == 1.5
    assert "generated" in grid(cells, "hovertext")[0][2]
    assert "log-probability -1, rank 9" in grid(cells, "hovertext")[0][0]


@pytest.mark.parametrize(("color", "value"), [("entropy", 2.0), ("log_prob", -3.0), ("rank", np.log10(8))])
def test_the_colour_may_stand_for_another_number_of_another_row(color: str, value: float) -> None:
    (cells,) = lens_heatmap(*lens(), row=1, color=color).data
    assert grid(cells, "z")[2] == pytest.approx([value] * 4)


def test_a_steered_lens_shows_what_changes_centred_on_zero_with_the_tokens_that_are_others_in_bold() -> None:
    (cells,) = lens_heatmap(*lens(steered=True)).data
    assert grid(cells, "z")[2] == [2.0] * 4  # the target's log_prob_change
    assert (cells.zmin, cells.zmid, cells.zmax) == (-2, 0, 2)
    assert grid(cells)[2] == ["<b>other</b>"] * 4
    assert grid(cells)[1] == ["1:0", "1:1", "1:2", "1:3"]
    assert grid(lens_heatmap(lens(steered=True)[0]).data[0], "z")[2] == [1.0] * 4  # kl, without targets
    assert grid(lens_heatmap(*lens(steered=True), color="probability").data[0])[2] == ["2:0", "2:1", "2:2", "2:3"]
    assert "steered <b>other</b>" in grid(cells, "hovertext")[2][0]


def test_only_the_last_positions_are_shown_unless_all_are_asked_for() -> None:
    table, targets = lens(n_positions=30)
    assert list(lens_heatmap(table, targets).data[0].x) == list(range(16, 30))
    assert len(lens_heatmap(table, targets, last=None).data[0].x) == 30
    assert lens_heatmap(table, targets).layout.shapes == ()  # all of them are generated


def test_very_many_positions_are_shown_by_their_colours_alone() -> None:
    fig = lens_heatmap(*lens(n_positions=100), last=None)
    assert {text for line in grid(fig.data[0]) for text in line} == {""}
    assert list(fig.layout.xaxis.tickvals) == list(range(0, 100, 3))
    assert fig.layout.xaxis.ticktext[1] == "·p3"


def test_a_target_may_be_chosen_and_an_unknown_one_or_another_colour_is_refused() -> None:
    table, targets = lens()
    assert grid(lens_heatmap(table, targets, target="y<", color="log_prob").data[0], "z")[0] == [-5.0] * 4
    assert "y&lt;" in lens_heatmap(table, targets, target="y<", color="log_prob").layout.title.subtitle.text
    for options, message in (
        ({"target": "z"}, "target must be in the frame, got 'z'"),
        (
            {"color": "kl"},
            "color must be a column of this lens, got 'kl'; .*known: probability, entropy, log_prob, rank",
        ),
        ({"row": 5}, "row must be in the frame, got 5"),
    ):
        with pytest.raises(DataError, match=message):
            lens_heatmap(table, targets, **options)
    with pytest.raises(DataError, match="color must be a column of this lens, got 'rank'"):
        lens_heatmap(table, color="rank")


def lines_of(fig: go.Figure) -> dict[tuple[str, str], go.Scatter]:
    return {(trace.name, trace.yaxis): trace for trace in fig.data if trace.mode == "lines+markers"}


def test_effects_are_lines_by_layer_with_intervals_and_the_controls_colour() -> None:
    fig = effect_curves(effects(" x", "y"))
    found = lines_of(fig)
    assert {name for name, _ in found} == {
        f"{condition}, {effect}" for condition in ("vector", "random") for effect in ("direct", "total", "both")
    }
    total = found["vector, total", "y"]
    assert (list(total.x), list(total.y)) == ([0, 1, 2], [0.5, 1.5, 2.5])
    assert total.customdata[0] == [0, "0.5 [0.25, 1]"]
    assert (total.line.color, total.line.dash) == (CONDITION_COLORS["vector"], "solid")
    assert found["vector, direct", "y"].line.dash == "dot"
    assert found["random, total", "y3"].line.color == CONDITION_COLORS["random"]
    bands = [trace for trace in fig.data if trace.mode == "lines"]
    assert list(bands[0].y) == [1.0, 2.0, 3.0, 2.25, 1.25, 0.25]
    assert "9 prompts" in fig.layout.title.text
    assert fig.layout.yaxis3.title.text.endswith("·x")


def test_effects_at_one_layer_are_points_side_by_side_with_whiskers() -> None:
    fig = effect_curves(effects().query("layer == 1"))
    points = [trace for (_, panel), trace in lines_of(fig).items() if panel == "y"]
    assert len({point.x[0] for point in points}) == len(points) == 4
    for point in points:
        assert point.error_y.visible
        assert (point.error_y.array[0], point.error_y.arrayminus[0]) == (0.5, 0.25)
        assert point.customdata[0][0] == 1
    assert fig.layout.xaxis.dtick == 1


def test_effects_without_targets_have_two_panels_and_a_target_may_be_chosen() -> None:
    assert {axis for _, axis in lines_of(effect_curves(effects()))} == {"y", "y2"}
    assert effect_curves(effects(" x", "y"), target="y").layout.yaxis3.title.text.endswith("y")
    with pytest.raises(DataError, match=r"target must be one that was followed, got 'z'; .*known:  x, y"):
        effect_curves(effects(" x", "y"), target="z")


@pytest.mark.parametrize("figure", [token_table, lens_heatmap, effect_curves])
def test_another_frame_or_an_empty_one_is_refused(figure: Any) -> None:
    with pytest.raises(DataError):
        figure(pd.DataFrame({"a": [1]}))
    empty = {token_table: vocabulary(VECTORS, [1]), lens_heatmap: lens()[0], effect_curves: effects()}[figure].iloc[:0]
    with pytest.raises(DataError, match="must have at least one row"):
        figure(empty)
