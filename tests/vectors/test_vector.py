"""Vectors are values: saved bit for bit, added and scaled, applied only where they fit."""

import json
import math
import struct
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from steerlens.errors import ModelError, SteerlensError
from steerlens.steering.interventions import Intervention
from steerlens.steering.plan import Plan
from steerlens.steering.positions import Window, as_window
from steerlens.vectors import formats
from steerlens.vectors.formats import PROJECTIONS
from steerlens.vectors.vector import SteeringVector
from tests.conftest import Subject
from tests.steps import unit
from tests.unchecked import unchecked

LAYERS = (1, 3)


def vector(seed: int = 0, *, layers: tuple[int, ...] = LAYERS, width: int = 32, **metadata: str) -> SteeringVector:
    return SteeringVector(
        directions={layer: (2.0 + layer) * unit(seed + layer, width) for layer in layers},
        proj_with={layer: 5.0 + layer for layer in layers},
        proj_without={layer: 1.0 + layer for layer in layers},
        std_with=dict.fromkeys(layers, 0.1),
        std_without={layers[0]: 1 / 3},
        resid_norm={layer: 10.0 * layer for layer in layers},
        metadata={"model": "llama", "n_layers": "4", "instruction": "a:b", "method": "MeanDifference", **metadata},
    )


def same_numbers(one: SteeringVector, other: SteeringVector) -> bool:
    return one.layers == other.layers and all(
        torch.equal(one.directions[layer], other.directions[layer]) for layer in one.layers
    )


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_saved_vector_loads_bit_for_bit(tmp_path: Path) -> None:
    saved = vector()
    loaded = SteeringVector.load(saved.save(tmp_path / "deep" / "a.safetensors"))
    assert same_numbers(loaded, saved)
    for name in PROJECTIONS:
        assert getattr(loaded, name) == getattr(saved, name)
    assert loaded.metadata == {**saved.metadata, "site": "resid_post", "d_model": "32"}
    again = SteeringVector.load(loaded.save(tmp_path / "b.safetensors"))
    assert again.metadata == loaded.metadata
    assert loaded.at(3).digest == saved.at(3).digest


def test_a_file_holds_named_float32_directions_and_string_metadata(tmp_path: Path) -> None:
    path = vector().save(tmp_path / "a.safetensors")
    tensors = load_file(path)
    assert set(tensors) == {"blocks.1.hook_resid_post", "blocks.3.hook_resid_post", *PROJECTIONS}
    assert tensors["blocks.1.hook_resid_post"].dtype == torch.float32
    header = path.read_bytes()
    metadata = json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])["__metadata__"]
    assert metadata["format_version"] == "1"
    assert metadata["model"] == "llama"


def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = vector().save(tmp_path / "a.safetensors")
    before = path.read_bytes()

    def failing(tensors: Any, scratch: Any, metadata: Any) -> None:
        Path(scratch).write_bytes(b"half a fi")
        raise KeyboardInterrupt

    monkeypatch.setattr(formats, "save_file", failing)
    with pytest.raises(KeyboardInterrupt):
        vector(5).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_leaves_only_the_file(tmp_path: Path) -> None:
    path = vector().save(tmp_path / "a.safetensors")
    vector(5).save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert same_numbers(SteeringVector.load(path), vector(5))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SteerlensError, match=r"a vector file must exist, got .*none\.safetensors"):
        SteeringVector.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("content", [b"", b"not a tensor file", b"{}" * 100])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(SteerlensError, match="a vector file must be safetensors"):
        SteeringVector.load(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = vector().save(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SteerlensError, match="a vector file must be safetensors"):
        SteeringVector.load(path)


@pytest.mark.parametrize("metadata", [None, {"format_version": "2", "layers": "[0]"}], ids=["foreign", "newer"])
def test_a_safetensors_file_of_another_format_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(SteerlensError, match=r"is not a steerlens vector of format 1 .*fit it again or update"):
        SteeringVector.load(path)


def edited(path: Path, metadata: dict[str, Any] | None = None, **tensors: Any) -> Path:
    """The file of a vector with some metadata and tensors changed; None takes them out."""
    path = vector(d_model="32").save(path)
    with safe_open(path, framework="pt") as file:
        about = file.metadata() | (metadata or {})
    names = {"direction": "blocks.3.hook_resid_post"}
    found = load_file(path) | {names.get(name, name): tensor for name, tensor in tensors.items()}
    save_file(
        {name: tensor for name, tensor in found.items() if tensor is not None},
        path,
        metadata={key: value for key, value in about.items() if value is not None},
    )
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"layers": "[1, 3"}}, "metadata cannot be read"),
        ({"metadata": {"layers": "3"}}, "layers must be a list of block indices, got 3"),
        ({"metadata": {"layers": "[]"}}, "layers must be a list of block indices"),
        ({"metadata": {"layers": "[true, 3]"}}, "layers must be a list of block indices"),
        ({"metadata": {"layers": "[1, 3, 3]"}}, "layers must differ"),
        ({"metadata": {"layers": "[1]"}}, "it must hold"),
        ({"metadata": {"layers": "[1, 2]"}}, "it must hold"),
        ({"metadata": {"n_layers": "3"}}, "be below n_layers 3"),
        ({"metadata": {"n_layers": "many"}}, "metadata cannot be read"),
        ({"metadata": {"d_model": "48"}}, r"must be torch.float32 of shape \[48\], got torch.float32 of shape \[32\]"),
        ({"metadata": {"site": "mlp_out"}}, "its site must be resid_post, got 'mlp_out'"),
        ({"direction": None}, "it must hold"),
        ({"proj_with": None}, "it must hold"),
        ({"direction": torch.zeros(1, 32)}, r"got torch.float32 of shape \[1, 32\]"),
        ({"direction": torch.zeros(16)}, r"got torch.float32 of shape \[16\]"),
        ({"direction": torch.zeros(32, dtype=torch.float16)}, "got torch.float16"),
        ({"direction": torch.zeros(32, dtype=torch.long)}, "got torch.int64"),
        ({"std_with": torch.zeros(3, dtype=torch.float64)}, r"std_with must be torch.float64 of shape \[2\]"),
    ],
    ids=str,
)
def test_a_file_that_contradicts_itself_is_refused_in_a_sentence(tmp_path: Path, changes: dict, message: str) -> None:
    path = edited(tmp_path / "a.safetensors", **changes)
    with pytest.raises(SteerlensError, match=rf"a\.safetensors' is a damaged vector file: .*{message}"):
        SteeringVector.load(path)


def test_a_vector_cannot_be_saved_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "a.safetensors"):
        with pytest.raises(SteerlensError, match="a vector must be saved to a file that can be written, got"):
            vector().save(path)
    assert (tmp_path / "file").read_text() == ""


def test_metadata_are_kept_as_text(tmp_path: Path) -> None:
    one = vector().with_metadata(seed=np.int64(3))
    assert SteeringVector.load(one.save(tmp_path / "a.safetensors")).metadata["seed"] == "3"


# --- arithmetic ----------------------------------------------------------------------------------------------------


def test_vectors_add_and_subtract_on_shared_layers_and_drop_the_old_projections() -> None:
    one, other = vector(0), vector(50, layers=(0, 3))
    for combined, sign in ((one + other, 1.0), (one - other, -1.0)):
        assert combined.layers == (3,)
        torch.testing.assert_close(combined.directions[3], one.directions[3] + sign * other.directions[3])
        assert combined.proj_with == combined.std_with == {}
        assert combined.resid_norm == {3: 30.0}


def test_metadata_that_differ_are_joined() -> None:
    combined = vector(instruction="a:b") + vector(9, instruction="c:d")
    assert combined.metadata["instruction"] == "a:b + c:d"
    assert combined.metadata["model"] == "llama"


def test_scaling_keeps_projections_and_a_negative_factor_turns_them() -> None:
    one = vector()
    double, turned = 2 * one, -one
    assert torch.equal(double.directions[1], 2 * one.directions[1])
    assert torch.equal((one * 2).directions[1], double.directions[1])
    assert double.proj_with == one.proj_with
    assert torch.equal(turned.directions[3], -one.directions[3])
    assert turned.proj_with == {layer: -value for layer, value in one.proj_with.items()}
    assert turned.proj_without == {layer: -value for layer, value in one.proj_without.items()}
    assert turned.std_with == one.std_with


def test_a_turned_vector_sets_the_same_point_of_the_residual() -> None:
    [step], [turned] = vector().at(1), (-vector()).at(1)
    torch.testing.assert_close(step.target * step.direction, turned.target * turned.direction)


def test_cosine_is_per_shared_layer() -> None:
    one = vector()
    assert one.cosine(3 * one) == pytest.approx({1: 1.0, 3: 1.0})
    assert one.cosine(-one) == pytest.approx({1: -1.0, 3: -1.0})
    other = vector(50, layers=(3,))
    assert one.cosine(other) == pytest.approx({3: float(unit(3) @ unit(53))}, abs=1e-6)


@pytest.mark.parametrize("combine", [SteeringVector.__add__, SteeringVector.__sub__, SteeringVector.cosine])
def test_vectors_that_share_no_layer_or_width_are_not_combined(combine: Any) -> None:
    with pytest.raises(SteerlensError, match="must have one width, got 32 and 48; are they of different models"):
        combine(vector(), vector(width=48))
    with pytest.raises(SteerlensError, match=r"must share a layer, got \[1, 3\] and \[0, 2\]"):
        combine(vector(), vector(layers=(0, 2)))


@pytest.mark.parametrize(("key", "other"), [("n_layers", "30"), ("frame", "compatibility")])
def test_vectors_of_models_that_differ_in_depth_or_frame_are_not_combined(key: str, other: str) -> None:
    with pytest.raises(SteerlensError, match=f"of models with one {key}, got"):
        vector(frame="raw") + vector(**{"frame": "raw", key: other})


def test_the_operands_are_left_alone() -> None:
    one, before = vector(), vector()
    _ = (one + vector(9), one - vector(9), 2 * one, -one)
    assert same_numbers(one, before)
    assert one.metadata == before.metadata


def test_a_sum_says_what_its_parts_agree_on_and_keeps_what_is_true_of_one_part_apart() -> None:
    one = vector(instruction="a:b", n_pairs="48", data="x", frame="raw", fit="f").with_metadata(seed=0)
    other = vector(9, instruction="c:d", n_pairs="48", data="y", frame="raw").with_metadata(seed=0)
    combined = one - 2 * other
    assert combined.metadata["instruction"] == combined.name == "a:b - c:d"
    assert combined.metadata["method"] == "sum of 2 vectors"
    assert not {"n_pairs", "data", "fit", "name"} & set(combined.metadata)
    assert {key: combined.metadata[key] for key in ("model", "n_layers", "frame", "seed")} == {
        "model": "llama", "n_layers": "4", "frame": "raw", "seed": "0"
    }  # fmt: skip
    parts = json.loads(combined.metadata["parts"])
    assert [(part["name"], part["factor"], part["n_pairs"], part["data"]) for part in parts] == [
        ("a:b", 1.0, "48", "x"),
        ("c:d", -2.0, "48", "y"),
    ]
    assert repr(combined) == "SteeringVector(a:b - 2 * c:d, 2 layers x 32, llama)"
    assert repr(-combined / 2) == "SteeringVector(-0.5 * a:b + c:d, 2 layers x 32, llama)"


def test_a_sum_of_what_differs_says_neither_seed_nor_template() -> None:
    one, other = vector(template="t"), vector(9, template="u", model="base")
    combined = one.with_metadata(seed=0, queries="p q") + other.with_metadata(seed=1, queries="r q")
    assert combined.metadata["queries"] == "p q r"  # none of them may test the sum
    assert not {"seed", "template"} & set(combined.metadata)
    assert combined.metadata["model"] == "llama + base"
    assert combined.origin["n_layers"] == "4"


def test_a_sum_can_be_saved_summed_on_and_steered_with(tmp_path: Path) -> None:
    combined = vector().with_metadata(seed=0) + vector(9, instruction="c:d").with_metadata(seed=1)
    loaded = SteeringVector.load(combined.save(tmp_path / "sum.safetensors"))
    assert (loaded + vector(20, instruction="e:f")).name == "a:b + c:d + e:f"
    [step] = loaded.at(3, operator="add", coeff=1.0)
    assert step.name == "a:b + c:d"


def test_vectors_are_summed_by_sum_and_divided_by_numbers() -> None:
    vectors = [vector(seed, instruction=f"x:{seed}") for seed in range(3)]
    total = sum(vectors)
    torch.testing.assert_close(total[3], sum(one[3] for one in vectors))
    assert total.name == "x:0 + x:1 + x:2"
    assert torch.equal((vectors[0] / 4)[1], vectors[0][1] / 4)
    assert (vectors[0] / 4).proj_with == vectors[0].proj_with
    assert (2 * vectors[0] / 2).metadata == vectors[0].metadata
    assert sum([vectors[0]]) is vectors[0]


@pytest.mark.parametrize("two", [2, np.float32(2), np.int64(2), np.array(2.0), torch.tensor(2.0)], ids=repr)
def test_a_factor_may_be_a_number_of_any_library_on_either_side(two: Any) -> None:
    one = vector()
    for scaled in (two * one, one * two, one / (1 / two)):
        torch.testing.assert_close(scaled[3], 2 * one[3])
        assert scaled.name == "a:b"
        assert repr(scaled).startswith("SteeringVector(2 * a:b, ")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda v: v / 0, SteerlensError, "divided by a number other than zero"),
        (lambda v: v * math.nan, SteerlensError, "factor must be a finite number, got nan"),
        (lambda v: v * True, SteerlensError, "factor must be a finite number, got True"),
        (lambda v: v + 1, TypeError, "unsupported operand"),
        (lambda v: 1 + v, TypeError, "unsupported operand"),
        (lambda v: v - "a", TypeError, "unsupported operand"),
    ],
)
def test_what_vectors_cannot_be_combined_with_is_refused(call: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(vector())


def test_a_vector_times_zero_has_no_projections() -> None:
    nothing = 0 * vector()
    assert nothing.proj_with == nothing.proj_without == nothing.std_with == {}
    assert nothing.resid_norm == vector().resid_norm


def test_a_vector_of_one_word_is_called_by_it() -> None:
    tea, rain = (vector(instruction="keywords:existence", arguments=word) for word in ("tea", "rain"))
    assert (tea.name, rain.name) == ("keywords:existence tea", "keywords:existence rain")
    assert repr(tea) != repr(rain)
    assert (tea - rain).name == "keywords:existence tea - keywords:existence rain"
    assert vector(name="my own").name == "my own"


# --- as a collection of layers -------------------------------------------------------------------------------------


def test_a_vector_is_counted_gone_over_and_indexed_by_layer() -> None:
    one = vector()
    assert len(one) == 2
    assert list(one) == [1, 3]
    assert 3 in one
    assert 2 not in one
    assert torch.equal(one[np.int64(3)], one.directions[3])
    with pytest.raises(SteerlensError, match=r"layer must be one of the vector's \[1, 3\], got 2"):
        one[2]


def test_a_vector_is_shown_as_a_table_of_layers() -> None:
    frame = vector().to_frame()
    assert frame.columns.tolist() == ["layer", "norm", *PROJECTIONS]
    assert frame["layer"].tolist() == [1, 3]
    assert frame["norm"].tolist() == pytest.approx([3.0, 5.0])
    assert frame["proj_with"].tolist() == [6.0, 8.0]
    assert frame["std_without"].isna().tolist() == [False, True]
    shown = vector(instruction="<b>")._repr_html_()
    assert "&lt;b&gt;" in shown
    assert "<td>3.000</td>" in shown


# --- at ------------------------------------------------------------------------------------------------------------


def test_at_sets_the_projection_to_the_mean_with_the_instruction_at_every_token() -> None:
    [step] = vector().at(3)
    assert (step.layer, step.operator, step.coeff, step.target) == (3, "set_projection", 1.0, 8.0)
    assert step.positions == as_window("all")
    assert step.resid_norm == 30.0
    torch.testing.assert_close(step.direction, unit(3))


def test_at_takes_several_layers_and_keeps_their_order() -> None:
    plan = vector().at([3, 1], coeff=2.0, operator="add", positions="generated")
    assert [(step.layer, step.coeff, step.operator) for step in plan] == [(3, 2.0, "add"), (1, 2.0, "add")]
    assert {step.positions for step in plan} == {as_window("generated")}


def test_at_takes_whatever_counts_as_a_layer() -> None:
    assert vector().at(np.int64(3)).digest == vector().at(3).digest
    assert vector().at((1, 3)).digest == vector().at(range(1, 4, 2)).digest


@pytest.mark.parametrize(
    "layers",
    [
        [1, 3],
        np.arange(1, 4, 2),
        torch.tensor([1, 3]),
        pd.Series([1.0, 3.0]),
        range(1, 4, 2),
        (one for one in (1, 3)),
        "all",
    ],
    ids=lambda layers: type(layers).__name__,
)
def test_at_takes_layers_of_any_library_and_all(layers: Any) -> None:
    assert vector().at(layers, coeff=np.float32(0.5)) == vector().at((1, 3), coeff=0.5)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ([], r"a plan needs a layer, got none; this vector has \[1, 3\]"),
        (np.array([]), "a plan needs a layer, got none"),
        ("last", "layer must be a number, several, or \"all\", got 'last'"),
        (True, "layer must be a whole number, got True"),
        ([1, False], "layer must be a whole number, got False"),
        (1.5, "layer must be a whole number, got 1.5"),
    ],
    ids=repr,
)
def test_what_is_no_layer_is_refused(layer: Any, message: str) -> None:
    with pytest.raises(SteerlensError, match=message):
        vector().at(layer)


def test_a_step_knows_the_unit_and_the_name_it_was_asked_for_in() -> None:
    [step] = vector().at(3, operator="add", coeff=0.3, unit="resid_norm")
    assert (step.given, step.unit, step.coeff, step.name) == (0.3, "resid_norm", 0.3 * 30.0, "a:b")
    [turned] = (-vector()).at(3)
    assert turned.name == "-a:b"


def test_a_choice_keeps_the_unit_it_was_searched_in() -> None:
    best = SimpleNamespace(layer=1, coeff=0.5, operator="add", positions="all", unit="resid_norm")
    [step] = vector().at(best)
    assert step.coeff == 5.0


def test_an_add_step_needs_its_length() -> None:
    with pytest.raises(SteerlensError, match='operator="add" needs coeff, the length of the step'):
        vector().at(1, operator="add")


def test_at_takes_what_a_search_returned() -> None:
    best = SimpleNamespace(layer=1, coeff=0.5, operator="ablate", positions="last", unit="absolute")
    [step] = vector().at(best)
    assert (step.layer, step.coeff, step.operator) == (1, 0.5, "ablate")
    assert step.positions == as_window("last")
    [changed] = vector().at(best, coeff=2.0, operator="add")
    assert (changed.layer, changed.coeff, changed.operator) == (1, 2.0, "add")


def test_a_search_that_chose_no_steering_gives_the_empty_plan() -> None:
    assert (
        vector().at(SimpleNamespace(layer=None, coeff=1.0, operator="add", positions="all", unit="absolute")) == Plan()
    )


def test_a_step_can_be_given_in_units_of_the_residual_norm() -> None:
    [step] = vector().at(3, operator="add", coeff=0.5, unit="resid_norm")
    assert step.coeff == 15.0
    assert step.coeff_in_norms == 0.5
    with pytest.raises(SteerlensError, match='unit="resid_norm" scales the step of operator="add"'):
        vector().at(3, unit="resid_norm")
    with pytest.raises(SteerlensError, match="needs the mean residual norm of layer 3, and this vector has none"):
        SteeringVector({3: unit(0)}).at(3, operator="add", coeff=1.0, unit="resid_norm")
    with pytest.raises(SteerlensError, match='operator="add" needs coeff'):
        vector().at(3, operator="add")


def test_a_target_and_a_window_can_be_given() -> None:
    [step] = vector().at(1, target=-2.5, positions=Window(0, 4))
    assert step.target == -2.5
    assert step.positions == Window(0, 4)


def test_a_combined_vector_has_no_projection_to_set() -> None:
    combined = vector() + vector(9)
    with pytest.raises(
        SteerlensError, match='a combined vector has no projection target: use operator="add", or pass target='
    ):
        combined.at(1)
    assert combined.at(1, operator="add", coeff=1.0).layers == (1,)
    assert combined.at(1, target=3.0).interventions[0].target == 3.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: v.at(0), r"layer must be one of the vector's \[1, 3\], got 0; layers count from zero"),
        (lambda v: v.at(1, unit="metres"), "unit must be"),
        (lambda v: v.at(1, positions="never"), "positions must be a rule's name"),
        (lambda v: SteeringVector({0: torch.zeros(4)}).at(0), "direction at layer 0 is zero, so it cannot steer"),
    ],
    ids=["layer", "unit", "positions", "zero"],
)
def test_what_a_vector_cannot_do_is_refused(call: Any, message: str) -> None:
    with pytest.raises(SteerlensError, match=message):
        call(vector())


# --- construction, and the model -----------------------------------------------------------------------------------


def test_directions_are_kept_sorted_in_float32_on_their_own() -> None:
    made = SteeringVector({3: unit(1).double(), 0: unit(2).double()})
    assert made.layers == (0, 3)
    assert made.d_model == 32
    assert {direction.dtype for direction in made.directions.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ({}, "needs at least one layer, got none"),
        ({True: torch.ones(3)}, "layer must be a whole number, got True"),
        ({0: torch.ones(1, 3)}, r"a direction must be one vector, got shape \[1, 3\] at layer 0"),
        ({0: torch.full((3,), math.nan)}, "directions must be finite, got nan or infinity at layer 0"),
        ({0: torch.full((3,), math.inf)}, "directions must be finite"),
    ],
    ids=["none", "truth value", "matrix", "nan", "inf"],
)
def test_directions_that_cannot_steer_are_refused(directions: dict[int, torch.Tensor], message: str) -> None:
    with pytest.raises(SteerlensError, match=message):
        unchecked(SteeringVector)(directions=directions)


def test_a_vector_fits_its_own_model_silently(llama: Subject) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vector(frame="raw").check_fits(llama.model)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (vector(width=48), "width must be the model's d_model 32, got 48; fit it in this model"),
        (vector(n_layers="30"), "must have this model's 4 layers, got 30"),
        (vector(frame="compatibility"), r"coordinates it was fitted in \(compatibility\), and this model is in raw"),
    ],
    ids=["width", "depth", "frame"],
)
def test_a_vector_of_another_model_is_refused(llama: Subject, made: SteeringVector, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        made.check_fits(llama.model)


def test_a_layer_that_the_model_lacks_is_refused(llama: Subject) -> None:
    with pytest.raises(SteerlensError, match=r"layer must be in \[0, 4\), got 7"):
        SteeringVector({7: unit(0)}).check_fits(llama.model)


def test_a_model_of_another_name_is_warned_of(gpt2: Subject) -> None:
    with pytest.warns(UserWarning, match="the vector was fitted in llama, not in gpt2"):
        vector().check_fits(gpt2.model)


def test_a_vector_prints_in_one_line() -> None:
    assert repr(vector()) == "SteeringVector(a:b, 2 layers x 32, llama)"
    assert "unnamed" in repr(SteeringVector({0: unit(0)}))


def test_metadata_can_be_added_to_a_copy() -> None:
    one = vector()
    assert one.with_metadata(note="x").metadata["note"] == "x"
    assert "note" not in one.metadata


def test_vectors_of_models_of_another_depth_are_not_combined() -> None:
    with pytest.raises(SteerlensError, match="vectors must be of models with one n_layers, got 4 and 6"):
        vector().with_metadata(n_layers="4") + vector().with_metadata(n_layers="6")


def test_a_vector_keeps_its_numbers_when_the_callers_tensor_changes() -> None:
    tensor = unit(2)
    kept = SteeringVector({0: tensor})
    step = Intervention(0, tensor)
    tensor.zero_()
    assert kept.directions[0].norm() == step.direction.norm() == 1


def test_layers_and_numbers_of_other_libraries_are_kept_as_pythons_own() -> None:
    made = SteeringVector({np.int64(3): unit(0)}, proj_with={np.int64(3): np.float32(0.5)}, std_with={3: math.nan})
    assert (made.layers, made.proj_with, made.std_with) == ((3,), {3: 0.5}, {})
    assert type(made.layers[0]) is int


def test_a_tilde_in_a_vectors_path_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert vector().save("~/vectors/a.safetensors") == tmp_path / "home" / "vectors" / "a.safetensors"
    assert same_numbers(SteeringVector.load("~/vectors/a.safetensors"), vector())
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
