"""Heat maps of patching and attribution: what they hold, where it stands, and how it is labelled."""

from itertools import pairwise, product

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from steerlens.errors import DataError
from steerlens.figures.patching import attribution_map, patching_map
from steerlens.figures.theme import theme

NAN = float("nan")
TOKENS = {-3: "…", -2: " a", -1: "\n"}


def patched(*instructions: str, control: float = 0.0, metric: str = "kl") -> pd.DataFrame:
    """Layers 0, 4 and 8; restored is layer / 10 at the last token, and -0.5 at the others."""
    rows = []
    for name, layer, position in product(instructions or ("a:b",), (0, 4, 8), TOKENS):
        restored = layer / 10 if position == -1 else -0.5
        row = {
            "instruction": name,
            "layer": layer,
            "position": position,
            "metric": metric,
            "token": TOKENS[position],
            "n": 6,
        }
        row |= {"value": 2 * (1 - restored), "low": 0.1, "high": 3.0, "plain": 2.0, "instructed": 0.0}
        row |= {"restored": restored, "restored_low": restored - 0.1, "restored_high": restored + 0.1}
        rows.append(row | {"control": 2 * (1 - control), "control_restored": control})
    return pd.DataFrame(rows)


def written(*instructions: str, bias: bool = False) -> pd.DataFrame:
    """Two layers of three heads: head (1, 2) writes 4 and the MLP of layer 0 writes -1, beyond what is random."""
    rows = []
    parts = [(pd.NA, "embedding", pd.NA)]
    for layer in range(2):
        parts += [(layer, "head", head) for head in range(3)]
        parts += [(layer, "attention bias", pd.NA)] * bias + [(layer, "mlp", pd.NA)]
    for name in instructions or ("a:b",):
        for layer, component, head in parts:
            size = {(1, "head", 2): 4.0, (0, "mlp", None): -1.0}.get(
                (None if layer is pd.NA else layer, component, None if head is pd.NA else head), 0.01
            )
            low, high = (size - 0.5, size + 0.5)
            row = {
                "instruction": name,
                "layer": layer,
                "component": component,
                "head": head,
                "n": 6,
                "low": low,
                "high": high,
            }
            rows.append(row | {"contribution": size, "random_mean": 0.0, "random_std": 0.2})
    return pd.DataFrame(rows).astype({"layer": "Int64", "head": "Int64"})


def test_a_patching_map_has_layers_upwards_tokens_to_the_right_and_the_control_beside_it() -> None:
    fig = patching_map(patched(control=0.05))
    one, control = fig.data
    assert list(one.y) == [0, 4, 8]
    assert (fig.layout.yaxis.type, fig.layout.yaxis.dtick) == (
        "category",
        1,
    )  # cells of one height, and no layer between
    assert np.asarray(one.z)[:, -1] == pytest.approx([0, 0.4, 0.8])
    assert np.asarray(one.z)[:, 0] == pytest.approx([-0.5] * 3)
    assert np.asarray(control.z) == pytest.approx(np.full((3, 3), 0.05))
    assert list(fig.layout.xaxis.ticktext) == ["… -3", "·a -2", "\\n -1"]
    assert (fig.layout.xaxis.title.text, fig.layout.yaxis.title.text) == ("token, counted from the end", "layer")
    assert [note.text for note in fig.layout.annotations] == [
        "from the run with the instruction",
        "control: from another query's run",
    ]
    colors = fig.layout.coloraxis
    assert (colors.cmin, colors.cmid, colors.cmax, colors.colorbar.title.text) == (-1, 0, 1, "restored")
    assert "restores the instructed run's next-token distribution" in fig.layout.title.text
    assert fig.layout.template == theme()


def test_the_hover_of_a_cell_says_its_token_its_numbers_and_its_control() -> None:
    text = patching_map(patched(control=0.05)).data[0].text[2][2]
    for expected in ("layer 8, position -1: \\n", "<b>0.80</b> [0.70, 0.90]", "kl 0.4 [0.1, 3], 6 pairs", "plain 2, "):
        assert expected in text
    assert "control: restored 0.05" in text


def test_the_metric_itself_is_drawn_on_request_centred_on_zero_only_where_it_has_signs() -> None:
    fig = patching_map(patched(), value="value")
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (0, 3)
    assert fig.layout.coloraxis.colorbar.title.text == "KL (nats)"
    signed = patched(metric="logit_difference").assign(value=lambda table: table["value"] - 2.5, control=0.5)
    colors = patching_map(signed, value="value").layout.coloraxis
    assert (colors.cmin, colors.cmid, colors.cmax) == (-2.1, 0, 2.1)
    assert colors.colorbar.title.text == "logit difference"


def test_without_a_control_there_is_one_map_and_nothing_missing_is_drawn_as_a_number() -> None:
    fig = patching_map(patched(control=NAN))
    assert len(fig.data) == 1
    empty = patched(control=NAN).assign(restored=NAN)
    assert np.isnan(np.asarray(patching_map(empty).data[0].z)).all()


def test_titles_say_what_each_metric_restores() -> None:
    assert "makes the text follow" in patching_map(patched(metric="followed")).layout.title.text
    assert "logit difference" in patching_map(patched(metric="logit_difference")).layout.title.text
    assert "run's my_metric" in patching_map(patched(metric="my_metric")).layout.title.text
    assert patching_map(patched(), title="Mine").layout.title.text == "Mine"


def panels_overlap(fig: go.Figure, room: int) -> bool:
    """Whether panels one above the other leave less than so many pixels between them."""
    inner = fig.layout.height - fig.layout.margin.t - fig.layout.margin.b
    columns: dict[tuple[float, ...], list[tuple[float, ...]]] = {}
    for x_axis, y_axis in zip(fig.select_xaxes(), fig.select_yaxes(), strict=True):
        columns.setdefault(x_axis.domain, []).append(y_axis.domain)
    return any((high[0] - low[1]) * inner < room for one in columns.values() for low, high in pairwise(sorted(one)))


@pytest.mark.parametrize("n", [2, 3, 12])
def test_every_instruction_has_a_row_of_its_own_with_room_for_its_labels(n: int) -> None:
    fig = patching_map(patched(*(f"kind:name_{index}" for index in range(n))))
    assert len(fig.data) == 2 * n
    assert fig.layout.annotations[0].text == "name 0<br>from the run with the instruction"
    assert [note.text for note in fig.layout.annotations][2:4] == ["name 1"] * 2
    assert [axis.title.text for axis in fig.select_xaxes()] == [None] * (2 * n - 2) + [
        "token, counted from the end"
    ] * 2
    assert not panels_overlap(fig, 56)
    fig = attribution_map(written(*(f"kind:name_{index}" for index in range(n))))
    assert [note.text for note in fig.layout.annotations][:2] == ["name 0", "name 1"]
    assert n == 2 or not panels_overlap(fig, 48)


@pytest.mark.parametrize("bias", [False, True])
def test_an_attribution_map_has_heads_by_layers_and_the_other_parts_beside_them(bias: bool) -> None:
    fig = attribution_map(written(bias=bias))
    (cells,) = fig.data
    z, width = np.asarray(cells.z, float), 5 + bias
    assert z.shape == (2, width)
    assert z[1, 2] == 4
    assert z[0, 3] == -1
    assert np.isnan(z[1, -1])  # the embedding comes before the first layer only
    assert z[0, -1] == 0.01
    names = ["0", "1", "2", "MLP", *(["bias"] if bias else []), "embed"]
    assert list(fig.layout.xaxis.ticktext) == names
    assert list(fig.layout.xaxis.tickvals) == [*range(width)]
    assert "direction at layer 1" in fig.layout.title.text
    assert fig.layout.coloraxis.cmin == -fig.layout.coloraxis.cmax
    assert "layer 1, head 2<br><b>4</b> [3.5, 4.5], 6 pairs<br>random directions: 0 ± 0.2" in cells.customdata[1][2]
    assert "embedding, before layer 0" in cells.customdata[0][-1]


def test_a_dot_marks_parts_beyond_random_directions_whose_interval_is_clear_of_zero() -> None:
    table = written()
    marks = np.asarray(attribution_map(table).data[0].text)
    assert marks.tolist() == [["", "", "", "•", ""], ["", "", "•", "", ""]]
    wide = table.assign(low=-1.0, high=5.0)
    assert not (np.asarray(attribution_map(wide).data[0].text) == "•").any()
    spread = table.assign(random_std=2.0)
    assert not (np.asarray(attribution_map(spread).data[0].text) == "•").any()


def test_few_parts_that_outdo_all_others_do_not_leave_the_others_white() -> None:
    table = written()
    table.loc[table["component"] == "mlp", "contribution"] = [-1.0, 400.0]
    assert attribution_map(table).layout.coloraxis.cmax >= 100
    many = pd.concat([written(f"kind:name_{index}") for index in range(20)], ignore_index=True)
    many.loc[0, "contribution"] = 400.0
    assert attribution_map(many).layout.coloraxis.cmax == pytest.approx(100)


def test_tables_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(DataError, match=r"the table of a patching map .*missing: restored"):
        patching_map(patched().drop(columns="restored"))
    with pytest.raises(DataError, match="must have at least one row"):
        patching_map(patched().head(0))
    with pytest.raises(DataError, match='value must be "restored" or "value", got \'control\''):
        patching_map(patched(), value="control")
    with pytest.raises(DataError, match=r"the table of an attribution .*missing: random_std"):
        attribution_map(written().drop(columns="random_std"))
