"""Attribution sums to the residual's projection on many architectures, is the raw model's own, and finds the planted writer."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import DataError, ModelError, SteerlensError
from steerlens.models.load import load_model
from steerlens.models.probe import Abilities
from steerlens.models.prompts import encode
from steerlens.reading import attribution
from steerlens.reading.attribution import attribute
from steerlens.stats.comparisons import bootstrap_mean
from steerlens.vectors.activations import record_activations
from steerlens.vectors.estimators import fit_steering_vector
from steerlens.vectors.vector import SteeringVector
from tests.conftest import LOADED, Passes, Subject
from tests.planted import READER_MLP, WRITER_HEAD, planted_pairs, save_planted
from tests.reference.plain_loop import decoder_layers
from tests.tiny_models import D_MODEL
from tests.zoo import ZOO, save_animal

QUERIES = ["Describe rain.", "Why?", "Name a river in the north."]
PAIRS = PairSet(InstructionPair(query, "Use capitals.", "change_case:english_capital") for query in QUERIES)
LAYER = 2


def fitted(model: Any, pairs: PairSet = PAIRS) -> SteeringVector:
    return fit_steering_vector(record_activations(model, pairs))


def part(table: pd.DataFrame, component: str, layer: int, head: int | None = None) -> dict[str, Any]:
    rows = table[(table["component"] == component) & (table["layer"] == layer)]
    rows = rows if head is None else rows[rows["head"] == head]
    (row,) = rows.to_dict("records")
    return row


# --- the planted world ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = load_model(save_planted(tmp_path_factory.mktemp("planted")), progress=False)
    LOADED.append(model)
    return model


def test_the_planted_head_writes_all_of_the_direction_and_nothing_else_does(planted: Any) -> None:
    pairs = planted_pairs()
    vector = fitted(planted, pairs)
    table = attribute(planted, vector, pairs, layer=WRITER_HEAD[0]).table
    writer = part(table, "head", *WRITER_HEAD)
    assert writer["contribution"] == pytest.approx(float(vector[WRITER_HEAD[0]].norm()), rel=1e-5)
    others = table.drop(table[(table["layer"] == WRITER_HEAD[0]) & (table["head"] == WRITER_HEAD[1])].index)
    assert len(others) == len(table) - 1
    assert others[["contribution", "random_mean", "random_std"]].abs().to_numpy().max() < 1e-6


def test_above_it_the_planted_mlp_writes_the_answers_share(planted: Any) -> None:
    pairs = planted_pairs()
    vector = fitted(planted, pairs)
    table = attribute(planted, vector, pairs, layer=3).table
    # The direction is (a, b) on the axes of the head and of the MLP, so they write a^2 and b^2 over its length.
    written = vector[WRITER_HEAD[0]].norm()
    answered = (vector[READER_MLP] - vector[WRITER_HEAD[0]]).norm()
    length = vector[3].norm()
    assert part(table, "head", *WRITER_HEAD)["contribution"] == pytest.approx(float(written**2 / length), rel=1e-4)
    assert part(table, "mlp", READER_MLP)["contribution"] == pytest.approx(float(answered**2 / length), rel=1e-4)
    assert table["contribution"].sum() == pytest.approx(float(length), rel=1e-4)


def test_random_directions_get_of_the_planted_heads_output_what_chance_gives(planted: Any) -> None:
    pairs = planted_pairs()
    vector = fitted(planted, pairs)
    writer = part(attribute(planted, vector, pairs, layer=1, n_random=400).table, "head", *WRITER_HEAD)
    chance = writer["contribution"] / D_MODEL**0.5  # the standard deviation of a random unit vector's coordinate
    assert writer["random_std"] == pytest.approx(chance, rel=0.15)
    assert abs(writer["random_mean"]) < 4 * chance / 400**0.5


# --- sums -----------------------------------------------------------------------------------------------------------

ADD_UP = (
    *("llama", "gpt2", "pythia", "bloom", "falcon", "gemma2", "gemma3", "olmo2", "granite", "qwen3-moe", "phi"),
    *("opt", "mpt", "cohere", "glm-dsa", "mistral"),
)
"""Biases, groups of heads, parallel attention, norms after the attention, factors, experts, latent attention."""


@pytest.mark.parametrize("name", ADD_UP)
def test_parts_add_up_to_the_residuals_projections_and_their_difference(name: str, tmp_path: Path) -> None:
    model = load_model(save_animal(name, tmp_path / name), progress=False)
    acts = record_activations(model, PAIRS)
    vector = fit_steering_vector(acts)
    for layer in (0, LAYER):
        table = attribute(model, vector, PAIRS, layer=layer, n_random=2).table
        proj = acts.resid[:, :, layer].double() @ vector.unit(layer).double()
        without, with_ = proj.mean(0).tolist()
        scale = float(acts.resid[:, :, layer].norm(dim=-1).mean())
        assert abs(table["proj_without"].sum() - without) < 1e-5 * scale
        assert abs(table["proj_with"].sum() - with_) < 1e-5 * scale
        assert abs(table["contribution"].sum() - (with_ - without)) < 1e-5 * scale
        biases = (table["component"] == "attention bias").sum()
        assert len(table) == 1 + (layer + 1) * (4 + 1) + biases


def test_parts_add_up_along_random_directions_too(llama: Subject) -> None:
    vector = fitted(llama.model)
    table = attribute(llama.model, vector, PAIRS, layer=LAYER, n_random=1).table
    acts = record_activations(llama.model, PAIRS, layers=[LAYER])
    (direction,) = attribution._directions(llama.model, vector, PAIRS.instructions[0], LAYER, 1, 0).T[1:]
    assert float(direction.norm()) == pytest.approx(1)
    expected = float((acts.differences[:, 0].double() @ direction).mean())
    assert table["random_mean"].sum() == pytest.approx(expected, rel=1e-5)
    assert table["random_std"].isna().all()  # one direction has no spread


def plain_parts(subject: Any, hf_model: Any, ids: list[int], layer: int, direction: torch.Tensor) -> dict[Any, float]:
    """Heads and MLP of a block, from hooks on the raw model: each head alone through the output's weights and the frozen norm."""
    block = decoder_layers(hf_model)[layer]
    attention = getattr(block, "self_attn", None) or block.attn
    output = getattr(attention, "o_proj", None) or attention.c_proj
    norm = block.post_attention_layernorm if hasattr(block, "post_feedforward_layernorm") else None
    after_mlp = getattr(block, "post_feedforward_layernorm", block.mlp)
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, out: Any) -> None:
            seen[name], seen[f"{name} in"] = out[0, -1], inputs[0][0, -1]

        return hook

    modules = {"output": output, "mlp": after_mlp} | ({} if norm is None else {"norm": norm})
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    with torch.no_grad():
        hf_model(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        z = seen["output in"].reshape(4, -1)
        nothing = output(torch.zeros_like(seen["output in"])[None])[0]
        # What a norm without a mean does to its input is a factor for each coordinate.
        factor = torch.ones_like(nothing) if norm is None else seen["norm"] / seen["norm in"]
        found: dict[Any, float] = {"mlp": float(seen["mlp"] @ direction), "bias": float((factor * nothing) @ direction)}
        for head in range(4):
            alone = torch.zeros_like(z)
            alone[head] = z[head]
            found[head] = float((factor * (output(alone.flatten()[None])[0] - nothing)) @ direction)
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gemma2", "olmo2"])
def test_each_head_and_mlp_is_the_raw_models_own(name: str, tmp_path: Path) -> None:
    folder = save_animal(name, tmp_path / name)
    model = load_model(folder, progress=False)
    hf_model = ZOO[name].auto.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()
    vector = fitted(model)
    table = attribute(model, vector, PAIRS[:1], layer=LAYER, n_random=1).table
    for layer in range(LAYER + 1):
        for condition, column in (("none", "proj_without"), ("text", "proj_with")):
            expected = plain_parts(name, hf_model, encode(model, PAIRS[0].text(condition)), layer, vector.unit(LAYER))
            assert part(table, "mlp", layer)[column] == pytest.approx(expected["mlp"], rel=1e-3, abs=1e-4)
            for head in range(4):
                assert part(table, "head", layer, head)[column] == pytest.approx(expected[head], rel=1e-3, abs=1e-4)
            if name == "gpt2":
                assert part(table, "attention bias", layer)[column] == pytest.approx(expected["bias"], abs=1e-5)


def test_the_attention_bias_is_the_same_on_both_sides(gpt2: Subject) -> None:
    table = attribute(gpt2.model, fitted(gpt2.model), PAIRS, layer=LAYER).table
    biases = table[table["component"] == "attention bias"]
    assert biases["proj_with"].abs().min() > 1e-3
    assert biases["contribution"].abs().max() < 1e-9
    assert len(biases) == LAYER + 1


# --- running --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("able", [Abilities(True, True), Abilities(False, True), Abilities(False, False)])
def test_the_batch_and_the_way_of_running_change_nothing(
    tiny: Subject, able: Abilities, monkeypatch: pytest.MonkeyPatch, passes: Passes
) -> None:
    vector = fitted(tiny.model)
    expected = attribute(tiny.model, vector, PAIRS, layer=LAYER, n_random=2).table
    monkeypatch.setattr(attribution, "abilities", lambda *_: able)
    passes.clear()
    found = attribute(tiny.model, vector, PAIRS, layer=LAYER, n_random=2, batch_size=2).table
    for column in ("proj_without", "proj_with", "contribution", "low", "random_std"):
        assert found[column].to_numpy() == pytest.approx(expected[column].to_numpy(), rel=1e-4, abs=1e-4)
    sizes = {len(rows.tokens) for rows, _ in passes}
    assert sizes == ({4, 2} if able.batch else {1})


def test_intervals_are_bootstraps_over_queries(llama: Subject) -> None:
    vector = fitted(llama.model)
    row = part(attribute(llama.model, vector, PAIRS, layer=LAYER).table, "mlp", 1)
    alone = [
        part(attribute(llama.model, vector, PairSet([pair]), layer=LAYER, n_random=1).table, "mlp", 1)["contribution"]
        for pair in PAIRS
    ]
    expected = bootstrap_mean(alone, n_resamples=2000)
    assert [row["contribution"], row["low"], row["high"]] == pytest.approx(
        [expected.mean, expected.low, expected.high], rel=1e-4
    )
    assert row["n"] == 3


def test_spellings_of_a_query_are_one_query_of_the_interval(llama: Subject) -> None:
    spelled = PairSet(InstructionPair(query, "Use capitals.") for query in ("Why?", "WHY?"))
    table = attribute(llama.model, fitted(llama.model), spelled, layer=0, n_random=1).table
    assert table["n"].tolist() == [2] * len(table)
    assert table[["low", "high"]].isna().all(axis=None)


def test_every_instruction_is_asked_of_its_own_vector_and_one_query_has_no_interval(llama: Subject) -> None:
    loud = PairSet([InstructionPair("Why?", "Be loud.")])
    vectors = {name: fitted(llama.model, pairs) for name, pairs in (PAIRS + loud).by_instruction().items()}
    both = attribute(llama.model, vectors, PAIRS + loud, layer=LAYER).table
    for name, pairs in (PAIRS + loud).by_instruction().items():
        alone = attribute(llama.model, vectors[name], pairs, layer=LAYER).table
        some = both[both["instruction"] == name].reset_index(drop=True)
        pd.testing.assert_frame_equal(some, alone, rtol=1e-4, atol=1e-4)
    assert both[both["instruction"] == "Be loud."]["low"].isna().all()
    assert np.isfinite(both["contribution"]).all()


def test_random_directions_are_drawn_from_the_seed_and_the_names(llama: Subject) -> None:
    vector = fitted(llama.model)
    first, again, other = (
        attribute(llama.model, vector, PAIRS[:1], layer=1, seed=seed).table["random_std"] for seed in (0, 0, 1)
    )
    assert first.equals(again)
    assert not first.equals(other)
    turned = attribute(llama.model, 2 * vector, PAIRS[:1], layer=1).table
    assert turned["random_std"].equals(first)  # not from the direction's length


# --- what is refused ------------------------------------------------------------------------------------------------

SENTENCES = {
    "mamba": r"block 0 of mamba has no blocks.0.attn.hook_z; patch\(site=\"resid\"\) takes any model",
    "jamba": "block 0 of jamba has no blocks.0.attn.hook_z",
    "falcon-h1": "block 0 of falcon-h1 adds something else to the residual, too, or scales it",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_blocks_that_are_not_heads_and_an_mlp_are_refused_by_name(name: str, tmp_path: Path) -> None:
    model = load_model(save_animal(name, tmp_path / name), progress=False)
    with pytest.raises(ModelError, match=SENTENCES[name]):
        attribute(model, fitted(model), PAIRS[:1], layer=1)


def test_an_output_that_is_not_its_heads_is_refused(llama: Subject) -> None:
    vector = fitted(llama.model)

    def centred(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return activation - activation.mean(-1, keepdim=True)  # as a norm with a mean does

    with (
        llama.model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", centred)]),
        pytest.raises(
            ModelError, match="block 1 of llama does something else to its heads' sum than a norm or a factor"
        ),
    ):
        attribute(llama.model, vector, PAIRS[:1], layer=1)


def test_bad_requests_are_refused_in_one_sentence(llama: Subject) -> None:
    model, vector = llama.model, fitted(llama.model)
    with pytest.raises(SteerlensError, match=r"layer must be in \[0, 4\), got 4"):
        attribute(model, vector, PAIRS, layer=4)
    with pytest.raises(SteerlensError, match=r"layer must be one of the vector's \[1\], got 2"):
        attribute(model, SteeringVector({1: vector[1]}), PAIRS, layer=2)
    with pytest.raises(SteerlensError, match="the direction at layer 1 is zero"):
        attribute(model, 0 * vector, PAIRS, layer=1)
    with pytest.raises(DataError, match="every instruction needs a vector, got none for 'change_case:english_capital'"):
        attribute(model, {"a:b": vector}, PAIRS, layer=1)
    with pytest.raises(DataError, match="attribution needs at least one pair"):
        attribute(model, vector, PairSet([]), layer=1)
    with pytest.raises(SteerlensError, match="n_random must be at least 1, got 0"):
        attribute(model, vector, PAIRS, layer=1, n_random=0)
    with pytest.raises(ModelError, match="a vector's width must be the model's d_model 32, got 3"):
        attribute(model, SteeringVector({1: torch.ones(3)}), PAIRS, layer=1)
