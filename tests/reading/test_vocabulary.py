"""Vocabulary projections: by hand from the weights, with ranks, spellings and a range of random directions."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from steerlens.errors import ModelError, SteerlensError
from steerlens.models.load import load_model
from steerlens.reading import readout, vocabulary
from steerlens.reading.vocabulary import N_RANDOM, logit_lens
from steerlens.vectors.vector import SteeringVector
from tests.conftest import Subject
from tests.planted import DIRECTION
from tests.reading.conftest import Animals
from tests.steps import unit
from tests.tiny_models import D_MODEL, byte_tokenizer, save_llama
from tests.unchecked import unchecked

LAYERS = (1, 3)


def vector(seed: int = 0, layers: tuple[int, ...] = LAYERS, length: float = 7.0) -> SteeringVector:
    return SteeringVector({layer: length * unit(10 * seed + layer) for layer in layers}, metadata={"name": f"v{seed}"})


def by_hand(subject: Subject, direction: torch.Tensor, norm: str) -> torch.Tensor:
    """Logits of a direction in float64 from Hugging Face's modules."""
    hf = subject.hf
    if norm == "none":
        return hf.get_output_embeddings().weight.detach().double() @ direction.double()
    final = hf.transformer.ln_f if subject.name == "gpt2" else hf.model.norm
    with torch.no_grad():
        normed = final(math.sqrt(D_MODEL) * direction[None]).double()
        logits = hf.get_output_embeddings().weight.double() @ normed[0]
    cap = getattr(hf.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def part(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    for name, value in values.items():
        table = table[table[name] == value]
    return table


@pytest.mark.parametrize("norm", ["model", "none"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "llama-tied"])
def test_every_logit_and_rank_is_that_of_the_weights_by_hand(animals: Animals, name: str, norm: Any) -> None:
    subject, one = animals(name), vector()
    table = logit_lens(subject.model, one, norm=norm, top_k=7, targets="rain").table
    for (layer, sign, kind), rows in table.groupby(["layer", "sign", "kind"]):
        logits = by_hand(subject, sign * one.unit(layer), norm)
        for row in rows.itertuples():
            assert row.logit == pytest.approx(float(logits[row.token_id]), rel=1e-4, abs=1e-4)
            assert row.rank == int((logits > logits[row.token_id]).sum())
        order = logits.argsort(descending=kind != "suppressed", stable=True)
        if kind != "target":
            assert rows["token_id"].tolist() == order[:7].tolist()


def test_the_frame_holds_every_vector_layer_sign_and_token_once(llama: Subject) -> None:
    lens = logit_lens(llama.model, {"a": vector(0), "b": vector(1, (2,))}, top_k=4, targets=["x", "yz"])
    assert lens.n_tokens == 260
    # Top and bottom; "x", " x", "X" and " X"; "yz" in three cases, of two tokens, or three with a space.
    per_place = 2 * 4 + (1 + 2) * 2 + (2 + 3) * 3
    places = lens.table.groupby(["vector", "layer", "sign"], sort=False).size()
    assert places.index.tolist() == [(*place, sign) for place in [("a", 1), ("a", 3), ("b", 2)] for sign in (1, -1)]
    assert set(places) == {per_place}
    assert not lens.table.duplicated(["vector", "layer", "sign", "kind", "rank", "text", "piece"]).any()
    assert lens.table["norm"].unique().tolist() == ["model"]


def test_target_rows_name_the_word_its_spelling_and_its_piece(llama: Subject) -> None:
    table = part(logit_lens(llama.model, vector(), layer=1, targets="ab").table, kind="target", sign=1)
    spelled = table.groupby("text", sort=False)["token"].apply("".join)
    assert spelled.tolist() == spelled.index.tolist() == ["ab", " ab", "Ab", " Ab", "AB", " AB"]
    assert part(table, text=" Ab")[["target", "case", "with_space", "piece"]].to_numpy().tolist() == [
        ["ab", "capital", True, piece] for piece in range(3)
    ]


def test_minus_a_vector_says_what_the_vector_suppresses_where_a_model_has_no_biases(llama: Subject) -> None:
    table = logit_lens(llama.model, vector(), layer=3).table
    promoted, suppressed = part(table, kind="promoted", sign=-1), part(table, kind="suppressed", sign=1)
    assert promoted["token_id"].tolist() == suppressed["token_id"].tolist()
    assert promoted["logit"].tolist() == pytest.approx((-suppressed["logit"]).tolist(), rel=1e-5)
    swapped = logit_lens(llama.model, -vector(), layer=3).table
    assert part(swapped, sign=1)["token_id"].tolist() == part(table, sign=-1)["token_id"].tolist()


def test_the_readout_of_a_direction_forgets_its_length(llama: Subject) -> None:
    short, long = (logit_lens(llama.model, vector(length=length)).table for length in (1e-3, 1e3))
    pd.testing.assert_frame_equal(short, long, rtol=1e-4)


def test_an_rms_norm_orders_tokens_as_the_papers_product_with_the_folded_gain_does(llama: Subject) -> None:
    one = vector()
    folded = (llama.hf.lm_head.weight * llama.hf.model.norm.weight).detach()
    expected = (folded.double() @ one.unit(3).double()).argsort(descending=True)[:10]
    table = part(logit_lens(llama.model, one, layer=3).table, kind="promoted", sign=1)
    assert table["token_id"].tolist() == expected.tolist()


def test_chunks_and_companions_change_nothing(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    several = {f"v{seed}": vector(seed) for seed in range(3)}
    together = {norm: logit_lens(llama.model, several, norm=norm, targets="x").table for norm in ("model", "none")}
    monkeypatch.setattr(readout, "CHUNK_MEMORY", 4 * 260)
    for norm, table in together.items():
        alone = [logit_lens(llama.model, {name: one}, norm=norm, targets="x").table for name, one in several.items()]
        pd.testing.assert_frame_equal(table, pd.concat(alone, ignore_index=True), rtol=1e-4, atol=1e-4)


def test_the_planted_direction_says_b_and_what_is_made_of_it_says_a(planted: Any) -> None:
    direction = SteeringVector({layer: torch.eye(D_MODEL)[DIRECTION] for layer in range(4)})
    table = part(logit_lens(planted, direction, targets=["b", "a"]).table, sign=1)
    assert part(table, kind="promoted", rank=0)["token"].tolist() == ["B"] * 4
    only_b = part(table, kind="promoted").query("rank > 0")["logit"]
    assert only_b.abs().max() == 0
    assert part(table, text="B", kind="target")["rank"].tolist() == [0] * 4
    assert part(table, text="A", kind="target")["logit"].tolist() == [0.0] * 4


def test_a_further_random_direction_is_beyond_the_range_one_time_in_twenty(llama: Subject) -> None:
    drawn = {f"r{seed}": SteeringVector({1: unit(1000 + seed)}) for seed in range(200)}
    table = part(logit_lens(llama.model, drawn, top_k=1, targets=["r", "s"]).table, sign=1)
    outside = (table["logit"] < table["random_low"]) | (table["logit"] > table["random_high"])
    # Of all tokens and directions; the 39 are the same for all, so that the share of a single token varies more.
    assert 2 / (N_RANDOM + 1) / 4 < outside.mean() < 3 * 2 / (N_RANDOM + 1)


def test_the_range_is_of_the_seed_and_of_no_vector(llama: Subject) -> None:
    columns = ["random_low", "random_high"]
    one, other = (logit_lens(llama.model, vector(seed), layer=1).table[columns] for seed in (0, 1))
    pd.testing.assert_frame_equal(one, other)
    assert not one.equals(logit_lens(llama.model, vector(0), layer=1, seed=1).table[columns])


def test_tokens_that_only_pad_the_vocabulary_are_never_said(tmp_path: Path) -> None:
    model = load_model(save_llama(tmp_path / "padded", byte_tokenizer(), d_vocab=400), progress=False)
    lens = logit_lens(model, vector(layers=(0,)), top_k=200, targets="x")
    assert lens.n_tokens == 260
    assert lens.table["token_id"].max() < 260
    assert lens.table["rank"].max() == 259
    logits = by_hand(Subject("llama", tmp_path / "padded", model), vector(layers=(0,)).unit(0), "model")[:260]
    row = part(lens.table, kind="target", text="X", sign=1).iloc[0]
    assert row["rank"] == int((logits > logits[row["token_id"]]).sum())


def test_ids_are_the_models_own_where_some_between_them_are_no_tokens(
    llama: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = logit_lens(llama.model, vector(), layer=1, top_k=20, targets="xy").table
    best = whole["token_id"][0]
    monkeypatch.setattr(vocabulary, "forbidden_ids", lambda model: (0, 1, best))
    table = logit_lens(llama.model, vector(), layer=1, top_k=19, targets="xy").table
    assert best not in set(table["token_id"])
    one, other = (part(each, sign=1, kind="promoted").query("rank < 19") for each in (whole, table))
    assert other["token_id"].tolist()[:18] == one["token_id"].tolist()[1:]
    said = part(table, kind="target").set_index(["sign", "text", "piece"])["token_id"]
    assert said.equals(part(whole, kind="target").set_index(["sign", "text", "piece"])["token_id"])


def test_layers_are_the_vectors_own_but_for_those_where_it_is_zero(llama: Subject) -> None:
    one = SteeringVector({0: torch.zeros(D_MODEL), 2: unit(1), 3: unit(2)})
    assert logit_lens(llama.model, one).table["layer"].unique().tolist() == [2, 3]
    assert logit_lens(llama.model, one, layer="all").table["layer"].unique().tolist() == [2, 3]
    assert logit_lens(llama.model, one, layer=[3, 2, 3]).table["layer"].unique().tolist() == [3, 2]
    with pytest.raises(SteerlensError, match="the direction at layer 0 is zero"):
        logit_lens(llama.model, one, layer=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 2}, r"layer must be one of \[1, 3\], those of the vector 'v0', got 2; layers count from zero"),
        ({"layer": []}, r"layer must be one of \[1, 3\], those of the vector 'v0', got none; leave layer out"),
        ({"layer": "last"}, r"layer must be a number, several, or \"all\", got 'last'"),
        ({"top_k": 0}, r"top_k must be in \[1, 260\], the tokens of the model, got 0"),
        ({"top_k": 261}, r"top_k must be in \[1, 260\]"),
        ({"norm": "rms"}, r"norm must be \"model\" or \"none\", got 'rms'"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_a_sentence(llama: Subject, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SteerlensError, match=message):
        unchecked(logit_lens)(llama.model, vector(), **options)


def test_what_is_no_vector_or_no_vector_of_the_model_is_refused(llama: Subject) -> None:
    lens = unchecked(logit_lens)
    with pytest.raises(
        SteerlensError, match=r"vectors must be a steering vector, or several by name, got \[SteeringVector"
    ):
        lens(llama.model, [vector()])
    with pytest.raises(SteerlensError, match="a lens needs a vector, got none"):
        lens(llama.model, {})
    with pytest.raises(SteerlensError, match="a direction must not be zero, and 'flat' is zero at every layer"):
        lens(llama.model, {"flat": SteeringVector({0: torch.zeros(D_MODEL)})})
    with pytest.raises(ModelError, match="a vector's width must be the model's d_model 32, got 8"):
        lens(llama.model, SteeringVector({0: torch.ones(8)}))


def test_a_lens_says_in_one_line_per_vector_what_is_promoted(planted: Any) -> None:
    lens = logit_lens(planted, {"asks": SteeringVector({1: torch.eye(D_MODEL)[DIRECTION]})}, top_k=1)
    assert repr(lens) == f"VocabularyLens({len(lens)} rows), most promoted tokens:\n  asks at layer 1: 'B'"
