"""Activations equal what a plain hook on the raw model reads, whatever the batch, the padding and the shared prefixes."""

import weakref
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from steerlens.data.families import keyword_pairs
from steerlens.data.load import load_pairs
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.data.splits import query_ids
from steerlens.errors import DataError, SteerlensError
from steerlens.models import prefixes, probe
from steerlens.models.backends import BridgeBackend
from steerlens.models.choice import BackendName, use_backend
from steerlens.models.facts import stop_ids
from steerlens.models.load import load_model
from steerlens.models.passes import Read, run_pass
from steerlens.models.prefixes import common_prefix
from steerlens.models.prompts import PromptFormat, encode
from steerlens.models.rows import pad
from steerlens.steering.sampling import generate
from steerlens.vectors import activations
from steerlens.vectors.activations import (
    SIDES,
    Activations,
    capture_metadata,
    record_activations,
    record_means,
)
from steerlens.vectors.estimators import fit_steering_vector
from tests.conftest import Passes, Subject, hooks_on
from tests.near_ties import assert_same_text
from tests.reference.plain_capture import last_residuals, mean_difference
from tests.reference.plain_loop import Step, plain_greedy
from tests.steps import unit
from tests.tiny_models import D_MODEL, N_CTX, byte_tokenizer, special_ids
from tests.zoo import save_animal

QUERIES = ["Describe rain.", "Why?", "Name a river in the north.", "Hm", "Describe snow.", "Tell me about tea, please."]
INSTRUCTION = "Use capitals."
PAIRS = PairSet([InstructionPair(query, INSTRUCTION, "change_case:english_capital") for query in QUERIES])
MARK = "~"


def by_hand(
    subject: Subject,
    pairs: PairSet = PAIRS,
    prompt_format: PromptFormat = PromptFormat(),
    *,
    hf_model: Any = None,
) -> torch.Tensor:
    """`[pair, side, layer, d_model]` in float64, one prompt at a time."""
    hf_model = subject.hf if hf_model is None else hf_model
    return torch.stack(
        [
            torch.stack(
                [
                    last_residuals(hf_model, encode(subject.model, pair.text(condition), prompt_format))
                    for condition in ("none", "text")
                ]
            )
            for pair in pairs
        ]
    )


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of any `[..., d_model]` vector, in units of that vector's largest entry."""
    error = (got.double() - expected).abs().amax(-1) / expected.abs().amax(-1)
    return float(error.max())


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 32])
def test_activations_equal_the_plain_hooks_whatever_the_batch_and_sharing(
    tiny: Subject, batch_size: int, share_prefixes: bool
) -> None:
    acts = record_activations(tiny.model, PAIRS, batch_size=batch_size, share_prefixes=share_prefixes)
    assert acts.resid.shape == (len(PAIRS), 2, 4, 32)
    assert relative_error(acts.resid, by_hand(tiny)) < 1e-5


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_the_vector_equals_the_mean_difference_by_hand(tiny: Subject, batch_size: int, share_prefixes: bool) -> None:
    acts = record_activations(tiny.model, PAIRS, batch_size=batch_size, share_prefixes=share_prefixes)
    vector = fit_steering_vector(acts)
    sides = [[encode(tiny.model, pair.text(condition)) for pair in PAIRS] for condition in ("none", "text")]
    expected = mean_difference(tiny.hf, *sides)
    assert relative_error(torch.stack(list(vector.directions.values())), expected) < 1e-5


def test_projections_are_the_means_and_deviations_along_the_unit_direction(tiny: Subject) -> None:
    vector = fit_steering_vector(record_activations(tiny.model, PAIRS))
    resid = by_hand(tiny)
    for layer in range(4):
        direction = (resid[:, 1, layer] - resid[:, 0, layer]).mean(0)
        along = resid[:, :, layer] @ (direction / direction.norm())
        found = [vector.proj_without, vector.proj_with, vector.std_without, vector.std_with, vector.resid_norm]
        expected = [*along.mean(0), *along.std(0), resid[:, 0, layer].norm(dim=-1).mean()]
        for got, value in zip(found, expected, strict=True):
            assert got[layer] == pytest.approx(float(value), rel=1e-4)


@pytest.mark.parametrize("prompt_format", [PromptFormat(style="plain"), PromptFormat(system="Be brief.")], ids=str)
def test_activations_are_of_the_prompt_format_that_was_asked_for(llama: Subject, prompt_format: PromptFormat) -> None:
    acts = record_activations(llama.model, PAIRS[:3], prompt_format=prompt_format)
    assert relative_error(acts.resid, by_hand(llama, PAIRS[:3], prompt_format)) < 1e-5
    assert relative_error(acts.resid, by_hand(llama, PAIRS[:3])) > 1e-3


def test_pairs_that_share_nothing_but_the_bos_are_read_right(gpt2: Subject) -> None:
    pairs = PairSet(
        [
            InstructionPair("Describe rain.", "x", "a:b", prompt="Use capitals. Describe rain."),
            InstructionPair("Why?", "x", "a:b", prompt="Why"),
            InstructionPair("One two", "x", "a:b", prompt="One two"),
        ]
    )
    assert relative_error(record_activations(gpt2.model, pairs).resid, by_hand(gpt2, pairs)) < 1e-5


@pytest.mark.parametrize("layers", [[2], [3, 0], [1, 1], [0, 1, 2, 3]], ids=str)
def test_only_the_wanted_layers_are_kept_once_in_the_order_given(tiny: Subject, layers: list[int]) -> None:
    acts = record_activations(tiny.model, PAIRS, layers=layers)
    kept = list(dict.fromkeys(layers))
    assert acts.layers == tuple(kept)
    assert relative_error(acts.resid, by_hand(tiny)[:, :, kept]) < 1e-5


def test_running_sums_equal_the_kept_examples(tiny: Subject) -> None:
    acts = record_activations(tiny.model, PAIRS)
    means = record_means(tiny.model, PAIRS, batch_size=2)
    assert means.count == len(PAIRS)
    assert relative_error(means.mean, acts.resid.double().mean(0)) < 1e-5
    torch.testing.assert_close(means.mean_norm, acts.resid.norm(dim=-1).mean(0), rtol=1e-5, atol=0)
    kept, summed = fit_steering_vector(acts), fit_steering_vector(means)
    for layer in kept.layers:
        assert relative_error(summed.directions[layer], kept.directions[layer].double()) < 1e-5
        for name in ("proj_with", "proj_without", "resid_norm"):
            assert getattr(summed, name)[layer] == pytest.approx(getattr(kept, name)[layer], rel=1e-4)
    assert summed.std_with == {}
    assert summed.metadata == kept.metadata


@pytest.mark.bridge
def test_a_planted_direction_is_recovered(tiny: Subject) -> None:
    """Every token that reads the mark, which only instructions hold, gets a known direction added at layer 1."""
    planted, strength = unit(77), 400.0
    pairs = PairSet([InstructionPair(query, f"Do it {MARK}", "a:b") for query in QUERIES])
    mark = tiny.model.tokenizer(MARK, add_special_tokens=False)["input_ids"][0]
    seen: list[torch.Tensor] = []

    def note(tokens: torch.Tensor, hook: Any) -> None:
        seen.append((tokens == mark).any(1, keepdim=True))

    def plant(resid: torch.Tensor, hook: Any) -> torch.Tensor:
        return resid + strength * seen[-1][..., None] * planted

    points = [("embed.hook_in", note), ("blocks.1.hook_resid_post", plant)]
    with tiny.model.hooks(fwd_hooks=points):
        acts = record_activations(tiny.model, pairs, share_prefixes=False, layers=[0, 1])
    vector = fit_steering_vector(acts)
    assert float(vector.unit(1) @ planted) > 0.99
    assert abs(float(vector.unit(0) @ planted)) < 0.9
    assert vector.proj_with[1] - vector.proj_without[1] == pytest.approx(strength, rel=0.2)


def test_activations_are_float32_whatever_the_models_dtype(llama: Subject) -> None:
    model = load_model(llama.folder, dtype="bfloat16", progress=False)
    acts = record_activations(model, PAIRS[:2])
    assert acts.resid.dtype == torch.float32
    exact = by_hand(llama, PAIRS[:2]).float()
    assert torch.cosine_similarity(acts.resid, exact, dim=-1).min() > 0.99


def test_a_read_keeps_no_view_of_the_whole_activation(tiny: Subject) -> None:
    rows = pad([[0, 5, 6], [0, 7, 8]])
    storages: list[int] = []

    def watch(resid: torch.Tensor, hook: Any) -> None:
        storages.append(resid.untyped_storage().data_ptr())

    with tiny.model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", watch)]):
        (kept,) = run_pass(tiny.model, rows, reads=[Read("blocks.1.hook_resid_post")]).reads.values()
    assert kept.untyped_storage().nbytes() == 2 * 32 * 4
    assert kept.untyped_storage().data_ptr() not in storages


def test_running_sums_keep_one_batch_at_a_time(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref] = []
    most = 0
    real = activations.iter_activations

    def watched(*args: Any, **options: Any) -> Any:
        nonlocal most
        for batch in real(*args, **options):
            alive.append(weakref.ref(batch))
            most = max(most, sum(ref() is not None for ref in alive))
            yield batch
            del batch

    monkeypatch.setattr(activations, "iter_activations", watched)
    record_means(tiny.model, PAIRS, batch_size=1)
    assert len(alive) == len(PAIRS)
    assert most <= 2


@pytest.mark.parametrize("backend", [pytest.param("auto", marks=pytest.mark.bridge), "hooks"])
def test_shared_beginnings_are_run_once(backend: BackendName, llama: Subject, passes: Passes) -> None:
    use_backend(llama.model, backend)
    record_activations(llama.model, PAIRS, batch_size=1, share_prefixes=True)
    use_backend(llama.model, "auto")
    fed = sum(rows.tokens.numel() for rows, _ in passes)
    pairs = [[encode(llama.model, pair.text(condition)) for condition in ("none", "text")] for pair in PAIRS]
    trunk = shared_length([row for pair in pairs for row in pair])

    def cost(pair: list[list[int]]) -> int:
        return sum(map(len, pair)) - shared_length(pair) - trunk

    shared = trunk + sum(map(cost, pairs))
    assert shared < sum(len(row) for pair in pairs for row in pair)
    assert fed == shared


@pytest.mark.bridge
def test_prompts_are_run_whole_where_too_little_is_shared(
    llama: Subject, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [[encode(llama.model, pair.text(condition)) for condition in ("none", "text")] for pair in PAIRS]
    trunk = shared_length([row for pair in pairs for row in pair])
    firsts = max(len(first) for first, _ in pairs)
    rests = max(len(pair[1]) - shared_length(pair) for pair in pairs)
    longest = max(len(second) for _, second in pairs)
    spared = len(pairs) * (2 * longest - firsts - rests)  # all rows of a pass are as wide as the longest
    by_trunk = (len(pairs) - 1) * trunk
    assert by_trunk < spared
    for least, n_passes in ((by_trunk, 3), (by_trunk + 1, 2), (spared, 2), (spared + 1, 1)):
        monkeypatch.setattr(prefixes, "SPARED", {"cpu": least})
        passes.clear()
        record_activations(llama.model, PAIRS, batch_size=len(PAIRS))
        assert len(passes) == n_passes


@pytest.mark.bridge
def test_pairs_share_a_pass_where_both_prompts_own_tokens_are_as_many(tiny: Subject, passes: Passes) -> None:
    """Prompts of all four lengths come twice: a pass of two is never padded, and the widest two come first."""
    pairs = PairSet(
        InstructionPair(letter * query, "Use " + "z" * instruction, "change_case:english_capital")
        for letter in "xy"
        for query, instruction in ((4, 20), (20, 4), (4, 4), (20, 20))
    )
    plain = PromptFormat(style="plain")
    found = record_activations(tiny.model, pairs, batch_size=2, share_prefixes=True, prompt_format=plain)
    pairwise = [rows for rows, _ in passes if rows.tokens.shape[0] == 2]
    assert len(pairwise) == 8
    assert all(bool(rows.mask[:, -rows.tokens.shape[1] :].all()) for rows in pairwise)
    widths = [rows.mask.shape[1] for rows in pairwise[1::2]]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[1] == widths[2] > widths[3]
    assert relative_error(found.resid, by_hand(tiny, pairs, plain)) < 1e-4


def shared_length(rows: list[list[int]]) -> int:
    """How many first tokens all rows share, one at a time."""
    length = 0
    while len({tuple(row[: length + 1]) for row in rows}) == 1:
        length += 1
    return length


@pytest.mark.bridge
def test_no_hook_is_left_after_a_failure_in_the_middle(tiny: Subject) -> None:
    def failing(resid: torch.Tensor, hook: Any) -> None:
        assert len(hooks_on(tiny.model)) > 1
        raise KeyboardInterrupt

    record_activations(tiny.model, PAIRS)  # the model is known from here on
    for share_prefixes in (True, False):
        with tiny.model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", failing)]), pytest.raises(KeyboardInterrupt):
            record_activations(tiny.model, PAIRS, share_prefixes=share_prefixes)
        assert hooks_on(tiny.model) == []


def test_results_name_their_pairs_and_where_they_come_from(tiny: Subject) -> None:
    acts = record_activations(tiny.model, PAIRS)
    assert acts.prompt_ids == tuple(pair.prompt_id for pair in PAIRS)
    assert acts.metadata == capture_metadata(tiny.model, PAIRS, PromptFormat())
    assert acts.metadata["model"] == tiny.name
    assert acts.metadata["n_layers"] == "4"
    assert acts.metadata["frame"] == "raw"
    assert all(isinstance(value, str) for value in acts.metadata.values())
    assert SIDES == ("without", "with")
    assert torch.equal(acts.differences, acts.resid[:, 1] - acts.resid[:, 0])
    assert "6 pairs x 2 sides x 4 layers x 32" in repr(acts)


def test_activations_part_by_instruction(tiny: Subject) -> None:
    pairs = PairSet(
        [InstructionPair(query, INSTRUCTION, name) for query, name in zip(QUERIES, ["a:b", "c:d"] * 3, strict=True)]
    )
    acts = record_activations(tiny.model, pairs)
    parts = acts.by_instruction()
    assert list(parts) == ["a:b", "c:d"]
    assert torch.equal(parts["c:d"].resid, acts.resid[1::2])
    assert parts["c:d"].prompt_ids == acts.prompt_ids[1::2]
    assert parts["c:d"].metadata["instruction"] == "c:d"
    assert isinstance(parts["a:b"], Activations)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [record_activations, record_means])
def test_an_empty_pair_set_is_refused(tiny: Subject, record: Any) -> None:
    with pytest.raises(DataError, match="at least one pair, got an empty pair set; check the filter and the split"):
        record(tiny.model, PairSet([]))


@pytest.mark.parametrize("record", [record_activations, record_means])
@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_out_of_range_is_refused(tiny: Subject, record: Any, layer: int) -> None:
    with pytest.raises(SteerlensError, match=rf"layer must be in \[0, 4\), got {layer}; layers count from zero"):
        record(tiny.model, PAIRS, layers=[0, layer])


@pytest.mark.parametrize("record", [record_activations, record_means])
def test_no_layer_at_all_is_refused(tiny: Subject, record: Any) -> None:
    with pytest.raises(SteerlensError, match="at least one layer, got none; leave layers out to keep all"):
        record(tiny.model, PAIRS, layers=[])


def test_a_vector_of_several_instructions_is_refused(tiny: Subject) -> None:
    names = ["a:b", "c:d"] * 3
    pairs = PairSet([InstructionPair(query, INSTRUCTION, name) for query, name in zip(QUERIES, names, strict=True)])
    with pytest.raises(
        SteerlensError, match=r"of one instruction, got activations of 2; fit each part of activations\.by_"
    ):
        fit_steering_vector(record_activations(tiny.model, pairs))


def test_a_prompt_longer_than_the_context_is_refused(tiny: Subject) -> None:
    with pytest.raises(SteerlensError, match="fit the context of 160 tokens"):
        record_activations(tiny.model, PairSet([InstructionPair("b" * 170, INSTRUCTION, "a:b")]))


def test_a_pair_without_its_bare_query_is_refused(tiny: Subject) -> None:
    pairs = PairSet([InstructionPair(None, "", "a:b", prompt="Describe rain in capitals.")])
    with pytest.raises(DataError, match="needs the base query"):
        record_activations(tiny.model, pairs)


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),
        ([[1, 2], [1, 2, 3]], 1),
        ([[1], [1, 2]], 0),
        ([[2, 1], [1, 2]], 0),
        ([[1, 2, 9], [1, 2, 3, 4], [1, 5]], 1),
        ([[4, 5, 6]], 2),
    ],
)
def test_a_common_prefix_leaves_every_row_a_token_of_its_own(rows: list[list[int]], shared: int) -> None:
    assert common_prefix(rows) == shared


@pytest.mark.smollm2
@pytest.mark.parametrize("share_prefixes", [True, False])
def test_the_real_models_means_equal_those_by_hand_and_its_vector_to_the_noise_of_float32(
    smollm2: Subject, share_prefixes: bool
) -> None:
    """Means of hidden states are compared to 1e-5. Their difference is small beside them (about 1 % at layer 0), so in float32
    it cannot be had to 1e-5 of itself: the plain loop misses float64 by about 5e-5. It may not be worse than that."""
    pairs = PAIRS[:4]
    acts = record_activations(smollm2.model, pairs, share_prefixes=share_prefixes)
    plain = by_hand(smollm2, pairs)
    assert relative_error(acts.resid.double().mean(0), plain.mean(0)) < 1e-5

    exact_model = AutoModelForCausalLM.from_pretrained(
        smollm2.folder, dtype=torch.float64, local_files_only=True
    ).eval()
    exact = by_hand(smollm2, pairs, hf_model=exact_model)
    truth = (exact[:, 1] - exact[:, 0]).mean(0)
    noise = relative_error((plain[:, 1] - plain[:, 0]).mean(0), truth)
    vector = torch.stack(list(fit_steering_vector(acts).directions.values()))
    error = relative_error(vector, truth)
    assert error < 2 * noise < 5e-4, f"error {error:.1e}, float32 noise {noise:.1e}"


@pytest.mark.smollm2
def test_the_papers_method_by_its_defaults_is_the_computation_by_hand(smollm2: Subject) -> None:
    """32 pairs: the same directions, the same projection means, and under them the same greedy text as the plain loop."""
    pairs = load_pairs("format", instructions="detectable_format:title")[:32]
    vector = fit_steering_vector(record_activations(smollm2.model, pairs))
    means = by_hand(smollm2, pairs).mean(0)
    directions = means[1] - means[0]
    units = directions / directions.norm(dim=-1, keepdim=True)
    for side, found in ((0, vector.proj_without), (1, vector.proj_with)):
        expected = (means[side] * units).sum(-1)
        torch.testing.assert_close(torch.tensor(list(found.values())).double(), expected, rtol=2e-3, atol=2e-3)
    fitted = torch.stack(list(vector.directions.values())).double()
    assert torch.cosine_similarity(fitted, directions, dim=-1).min() > 1 - 1e-6

    layer, prompt = 18, "Describe rain."
    target = float((means[1, layer] * units[layer]).sum())
    by_hand_step = Step(layer, "set_projection", units[layer].float(), coeff=1.0, target=target)
    stops = stop_ids(smollm2.model)
    expected_text = plain_greedy(
        smollm2.hf, encode(smollm2.model, prompt), [by_hand_step], max_new_tokens=16, stop_ids=stops
    )
    (row,) = generate(smollm2.model, [prompt], steering=vector.at(layer), max_new_tokens=16)
    assert_same_text([expected_text], [row.tokens])
    (plain,) = generate(smollm2.model, [prompt], max_new_tokens=16)
    assert row.tokens != plain.tokens  # the step says something


def test_a_sliding_window_model_is_recorded_right_with_prefixes_of_any_length(tmp_path: Path) -> None:
    """Windows count columns, gaps included, so rows with a gap must not outgrow one."""
    tokenizer = byte_tokenizer()
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=40,
        max_position_embeddings=N_CTX,
        **special_ids(tokenizer),
    )
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(tmp_path, progress=False)
    lengths = [(3, 30), (28, 4), (12, 18)]
    pairs = PairSet(InstructionPair("q" * a + str(a), "i" * b, "punctuation:no_comma") for a, b in lengths)
    shared = record_activations(model, pairs, share_prefixes=True)
    whole = record_activations(model, pairs, batch_size=1, share_prefixes=False)
    torch.testing.assert_close(shared.resid, whole.resid, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("animal", ["mistral", "llama4-chunked"])
def test_a_later_batch_that_is_wider_than_the_first_is_checked_too(tmp_path: Path, animal: str) -> None:
    """No prompt outgrows the window, and the first batch fits it with its gaps; only the second does not."""
    window = {"mistral": "sliding_window", "llama4-chunked": "attention_chunk_size"}[animal]
    model = load_model(save_animal(animal, tmp_path, **{window: 40}), progress=False)
    plain = PromptFormat(style="plain")
    sizes = [(18, 17), (18, 16), (33, 1), (1, 32)]
    pairs = PairSet(
        InstructionPair(letter * stem, "i", "a:b", prompt=letter * stem + "i" * tail)
        for letter, (stem, tail) in zip("abcd", sizes, strict=True)
    )
    found = [
        record_activations(model, pairs, batch_size=2, prompt_format=plain, share_prefixes=share).resid
        for share in (True, False)
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("animal", "window", "sizes"),
    [("llama4-chunked", 40, [(50, 3, 4), (22, 14, 10)]), ("mistral", 10, [(30, 45, 45), (30, 10, 3)])],
)
def test_a_later_batch_that_is_narrower_and_has_the_wider_gap_is_right(
    animal: str, window: int, sizes: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    """Whether a gap is in reach does not follow from the width."""
    name = {"mistral": "sliding_window", "llama4-chunked": "attention_chunk_size"}[animal]
    longer = {"max_position_embeddings": 256}
    model = load_model(save_animal(animal, tmp_path, **{name: window}, **longer), progress=False)
    found = both_ways(model, [("a" * stem + "b" * one, "a" * stem + "c" * two) for stem, one, two in sizes], 1)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_window_that_is_wide_enough_is_no_reason_to_run_prompts_whole(tmp_path: Path, passes: Passes) -> None:
    longer = {"max_position_embeddings": 256}
    model = load_model(save_animal("mistral", tmp_path, sliding_window=128, **longer), progress=False)
    found = both_ways(model, [("a" * 60 + "b" * 5, "a" * 60 + "c" * 9)], 1)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert [tuple(rows.tokens.shape) for rows, _ in passes][-4:] == [(1, 61), (1, 5), (1, 9), (2, 70)]


@pytest.mark.parametrize(
    ("first", "second"), [("abcdef", "abc"), ("abc", "abcdef"), ("abc", "abc"), ("abcdefgh", "abcxy"), ("a", "b")]
)
def test_prompts_of_any_two_lengths_share_what_they_have_in_common(llama: Subject, first: str, second: str) -> None:
    torch.testing.assert_close(*both_ways(llama.model, [(first, second), ("xyz", "xw")], 2), rtol=1e-4, atol=1e-4)


def both_ways(model: Any, texts: list[tuple[str, str]], batch_size: int) -> list[torch.Tensor]:
    """Residuals of plain texts, a query and a prompt each, with what they share run once, and whole."""
    pairs = PairSet(InstructionPair(query, "i", "a:b", prompt=prompt) for query, prompt in texts)
    plain = PromptFormat(style="plain")
    return [
        record_activations(model, pairs, batch_size=batch_size, prompt_format=plain, share_prefixes=share).resid
        for share in (True, False)
    ]


def test_gaps_that_would_outgrow_the_context_are_not_made(tmp_path: Path) -> None:
    """GPT-Neo has a mask of as many columns as its context."""
    model = load_model(save_animal("gpt-neo", tmp_path, max_position_embeddings=64, window_size=60), progress=False)
    plain = PromptFormat(style="plain")
    pairs = PairSet(
        InstructionPair(letter * stem, "i", "a:b", prompt=letter * stem + "i" * tail)
        for letter, (stem, tail) in zip("ab", [(50, 2), (1, 50)], strict=True)
    )
    found = [
        record_activations(model, pairs, prompt_format=plain, share_prefixes=share).resid for share in (True, False)
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.bridge
def test_a_cache_that_takes_no_more_than_single_tokens_is_not_shared(tiny: Subject, monkeypatch: Any) -> None:
    expected = record_activations(tiny.model, PAIRS, share_prefixes=False).resid
    real, refused = BridgeBackend.forward, []

    def single(self: BridgeBackend, rows: Any, cache: Any, **options: Any) -> Any:
        if cache is not None and rows.tokens.shape[1] > 1:
            refused.append(rows)
            raise NotImplementedError
        return real(self, rows, cache, **options)

    monkeypatch.setattr(BridgeBackend, "forward", single)
    monkeypatch.setattr(probe, "_KNOWN", WeakKeyDictionary())
    use_backend(tiny.model, "hooks")
    found = record_activations(tiny.model, PAIRS, batch_size=2, share_prefixes=True).resid
    use_backend(tiny.model, "auto")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert refused  # by the probe


def test_no_layers_are_refused(llama: Subject) -> None:
    pairs = PairSet([InstructionPair("a", "b", "punctuation:no_comma")])
    with pytest.raises(SteerlensError, match="activations need at least one layer"):
        record_activations(llama.model, pairs, layers=[])


def test_activations_are_a_sequence_of_pairs_and_show_norms_by_layer(llama: Subject) -> None:
    acts = record_activations(llama.model, PAIRS)
    assert len(acts) == len(list(acts)) == len(PAIRS)
    assert torch.equal(acts[-1], acts.resid[-1])
    part = acts[1:3]
    assert (part.prompt_ids, part.metadata["n_pairs"]) == (acts.prompt_ids[1:3], "2")
    assert torch.equal(part.resid, acts.resid[1:3])
    frame = acts.to_frame().set_index(["prompt_id", "layer"])
    assert len(frame) == len(PAIRS) * 4
    row = frame.loc[(acts.prompt_ids[2], 3)]
    assert row["instruction"] == acts.instructions[2]
    assert row["norm_with"] == pytest.approx(float(acts.resid[2, 1, 3].norm()))
    assert row["norm_difference"] == pytest.approx(float(acts.differences[2, 3].norm()))
    assert "means over pairs" in acts._repr_html_()


def test_a_part_says_which_pairs_are_in_it(tiny):
    pairs = load_pairs("tiny", instructions=["punctuation:no_comma", "detectable_format:title"], n_queries=2)
    parts = record_activations(tiny.model, pairs, layers=[1]).by_instruction()
    for name, group in pairs.by_instruction().items():
        alone = record_activations(tiny.model, group, layers=[1])
        assert parts[name].metadata == alone.metadata
        assert parts[name].metadata["data"] == group.content_hash
        assert set(parts[name].metadata["queries"].split()) == query_ids(group)
        assert parts[name].pairs == group
    acts = record_activations(tiny.model, pairs, layers=[1])
    assert acts[1:3].metadata == record_activations(tiny.model, pairs[1:3], layers=[1]).metadata


def test_running_sums_of_several_instructions_are_refused_before_the_model_runs(llama: Subject) -> None:
    mixed = PairSet([*PAIRS, InstructionPair("Hm", "No commas.", "punctuation:no_comma")])
    with pytest.raises(SteerlensError, match="means are of one instruction, got pairs of 2; record each part"):
        record_means(llama.model, mixed)


@pytest.mark.parametrize("layers", [np.array([2, 0]), torch.tensor([2, 0]), (2.0, 0)], ids=["numpy", "torch", "floats"])
def test_layers_may_be_an_array(llama: Subject, layers: Any) -> None:
    assert record_activations(llama.model, PAIRS[:1], layers=layers).layers == (2, 0)


def test_metadata_name_the_arguments_that_all_pairs_share_once(llama: Subject) -> None:
    def arguments(pairs: PairSet) -> str | None:
        return capture_metadata(llama.model, pairs, PromptFormat()).get("arguments")

    tea, dog = keyword_pairs(QUERIES, "tree"), keyword_pairs(QUERIES, "dog")
    assert arguments(tea) == "tree"
    assert arguments(PairSet([*tea, *dog])) is None
    assert arguments(PAIRS) is None
    german = InstructionPair("Why?", "In German.", "language:response_language", {"language": "de"})
    assert arguments(PairSet([german])) is None
