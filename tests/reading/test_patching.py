"""Patching equals one run per cell on the raw model, whatever the batch and the way of running, and finds what was planted."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import DataError, ModelError, SteerlensError
from steerlens.models.backends import BridgeCache
from steerlens.models.load import load_model
from steerlens.models.passes import Read, run_pass
from steerlens.models.probe import Abilities
from steerlens.models.prompts import PromptFormat, encode
from steerlens.models.rows import pad
from steerlens.reading import patching
from steerlens.reading.patches import INSTRUCTED, NOTHING, Cell, Patch, PatchedRuns, Prompts
from steerlens.reading.patching import VARIED, PatchingMap, patch
from steerlens.stats.comparisons import bootstrap_mean
from steerlens.steering.sampling import generate
from steerlens.steering.settings import SamplingConfig
from tests.conftest import LOADED, Passes, Subject, hooks_on
from tests.near_ties import assert_same_text
from tests.planted import READER_MLP, WRITER_HEAD, planted_pairs, save_planted
from tests.reference.plain_loop import PlainText
from tests.reference.plain_patch import patched_greedy, patched_logits, read_at
from tests.unchecked import unchecked
from tests.zoo import save_animal

QUERIES = ["Describe rain in a word.", "Why is it so?", "Name a river in the north.", "Hm, where is it?"]
INSTRUCTION = "Use capitals."
PAIRS = PairSet(
    InstructionPair(query, INSTRUCTION, "change_case:english_capital", prompt=f"{INSTRUCTION} {query}")
    for query in QUERIES
)
"""The instruction comes first, so that the query's tokens align, too: bytes, of which the shortest query has 13."""
N = 6
EOS_ID = 1


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def sides(subject: Subject, pair: InstructionPair) -> tuple[list[int], list[int]]:
    without, with_ = (encode(subject.model, pair.text(condition)) for condition in ("none", "text"))
    return without, with_


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = load_model(save_planted(tmp_path_factory.mktemp("planted")), progress=False)
    LOADED.append(model)
    return model


def at_last(found: PatchingMap, column: str = "restored") -> list[float]:
    return found.table.query("position == -1").sort_values("layer")[column].tolist()


# --- the planted world ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["kl", "logit_difference", "followed"])
def test_the_planted_instruction_passes_the_last_token_from_the_layer_that_writes_it_on(
    planted: Any, metric: Any
) -> None:
    found = patch(planted, planted_pairs(), metric=metric, sampling=SamplingConfig(max_new_tokens=1))
    written = WRITER_HEAD[0]
    assert at_last(found) == pytest.approx([float(layer >= written) for layer in range(4)], abs=1e-5)
    assert at_last(found, "control_restored") == pytest.approx([0.0] * 4, abs=1e-5)
    assert set(found.table["token"]) == {"<turn>"}
    assert set(found.table["n"]) == {6}


@pytest.mark.parametrize(("site", "writer"), [("attn", WRITER_HEAD[0]), ("mlp", READER_MLP)])
def test_of_outputs_only_the_planted_writers_restore_anything(planted: Any, site: Any, writer: int) -> None:
    # What the writer's attention adds makes the MLP above answer; what that MLP adds is the answer itself.
    found = patch(planted, planted_pairs(), site=site, metric="followed", sampling=SamplingConfig(max_new_tokens=1))
    assert at_last(found) == [float(layer == writer) for layer in range(4)]
    found = patch(planted, planted_pairs(), site=site)
    assert at_last(found) == pytest.approx([float(layer == writer) for layer in range(4)], abs=1e-3)


# --- against one run per cell ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["resid", "attn", "mlp"])
def test_every_cell_equals_a_run_of_its_own_on_the_raw_model(tiny: Subject, site: Any) -> None:
    layers = (0, 2, 3)
    found = patch(tiny.model, PAIRS, layers=layers, positions=N, site=site)
    assert len(found.cells) == len(PAIRS) * len(layers) * N
    cells = found.cells.set_index(["prompt_id", "layer", "position"])
    for index, pair in enumerate(PAIRS):
        without, with_ = sides(tiny, pair)
        other, _ = sides(tiny, PAIRS[(index + 1) % len(PAIRS)])
        with torch.no_grad():
            plain, instructed = (tiny.hf(torch.tensor([ids])).logits[0, -1] for ids in (without, with_))
        for layer, offset in product(layers, range(-N, 0)):
            cell = cells.loc[(pair.prompt_id, layer, offset)]
            for source, column in ((with_, "value"), (other, "control")):
                value = read_at(tiny.hf, source, layer, site, offset)
                logits = patched_logits(tiny.hf, without, value, layer, site, len(without) + offset)
                assert cell[column] == pytest.approx(kl(instructed, logits), rel=1e-3, abs=1e-4)
            assert cell["plain"] == pytest.approx(kl(instructed, plain), rel=1e-3, abs=1e-4)
            assert cell["instructed"] == 0
            assert cell["token"] == tiny.model.tokenizer.decode([without[offset]])


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_the_batch_changes_nothing(tiny: Subject, batch_size: int) -> None:
    options: dict[str, Any] = {"layers": [0, 2, 3], "positions": [-6, -2, -1]}
    one, other = (patch(tiny.model, PAIRS[:3], batch_size=size, **options).cells for size in (64, batch_size))
    for column in ("value", "control"):
        assert one[column].to_numpy() == pytest.approx(other[column].to_numpy(), rel=1e-3, abs=1e-4)
    assert one.drop(columns=["value", "control", "plain"]).equals(other.drop(columns=["value", "control", "plain"]))


@pytest.mark.parametrize("able", [Abilities(False, True), Abilities(False, False)])
def test_models_without_a_cache_or_batches_are_run_whole_and_give_the_same(
    tiny: Subject, able: Abilities, monkeypatch: pytest.MonkeyPatch, passes: Passes
) -> None:
    expected = patch(tiny.model, PAIRS[:2], layers=[1, 3], positions=[-5, -1])
    lengths = [len(sides(tiny, pair)[0]) for pair in PAIRS[:2]]
    assert any(rows.tokens.shape[1] == 5 for rows, _ in passes)
    passes.clear()
    monkeypatch.setattr(patching, "abilities", lambda *_: able)
    found = patch(tiny.model, PAIRS[:2], layers=[1, 3], positions=[-5, -1])
    assert found.cells["value"].to_numpy() == pytest.approx(expected.cells["value"].to_numpy(), rel=1e-3, abs=1e-4)
    assert all(rows.tokens.shape[1] >= min(lengths) for rows, _ in passes)
    if not able.batch:
        assert all(len(rows.tokens) == 1 for rows, _ in passes)


def test_a_cache_that_gives_something_else_is_found_out_and_rows_are_run_whole(
    llama: Subject, monkeypatch: pytest.MonkeyPatch, passes: Passes
) -> None:
    expected = patch(llama.model, PAIRS[:2], positions=[-5, -1])

    def wrong(self: BridgeCache, keep: torch.Tensor) -> BridgeCache:
        self.cache.batch_select_indices(keep.flip(0))  # rows get the keys of others
        return self

    passes.clear()
    monkeypatch.setattr(BridgeCache, "select", wrong)
    found = patch(llama.model, PAIRS[:2], positions=[-5, -1])
    assert found.cells["value"].to_numpy() == pytest.approx(expected.cells["value"].to_numpy(), rel=1e-3, abs=1e-4)
    assert max(len(rows.tokens) for rows, _ in passes if rows.tokens.shape[1] > 5) > 6


ANIMALS = ("llama4-chunked", "gemma3", "pythia", "mpt", "bloom", "mamba", "recurrent-gemma", "zamba2", "phi3-longrope")


@pytest.mark.parametrize("name", ANIMALS)
def test_windows_chunks_states_and_biases_come_out_as_in_a_run_per_cell(name: str, tmp_path: Path) -> None:
    model = load_model(save_animal(name, tmp_path / name), progress=False)
    before = hooks_on(model)
    found = patch(model, PAIRS[:2], layers=[1, 2], positions=[-12, -4, -1], control=False).cells
    assert hooks_on(model) == before
    for row in found.to_dict("records"):
        (pair,) = (pair for pair in PAIRS if pair.prompt_id == row["prompt_id"])
        without, with_ = (encode(model, pair.text(condition)) for condition in ("none", "text"))
        site = f"blocks.{row['layer']}.hook_resid_post"
        source = run_pass(model, pad([with_]), reads=[Read(site, at="all")])
        value = source.reads[site][0, row["position"]][None]
        one = Patch(site, value, torch.tensor([0]), torch.tensor([len(without) + row["position"]]))
        alone = run_pass(model, pad([without]), edits=[one]).logits[0]
        assert row["value"] == pytest.approx(kl(source.logits[0], alone), rel=5e-3, abs=1e-4)


# --- everything and nothing ------------------------------------------------------------------------------------------


def test_the_last_layers_last_token_is_the_instructed_run_and_its_other_tokens_are_nothing(tiny: Subject) -> None:
    seen: list[torch.Tensor] = []

    def largest(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits)
        return logits.amax(-1)

    patch(tiny.model, PAIRS[:1], layers=[3], positions=[-3, -1], metric=largest, control=False)
    plain, instructed, third, last = seen
    torch.testing.assert_close(last, instructed, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(third, plain, rtol=1e-4, atol=1e-4)
    assert (plain - instructed).abs().max() > 0.1


def test_patching_a_run_with_itself_is_the_plain_run(tiny: Subject) -> None:
    without, _ = sides(tiny, PAIRS[0])
    runs = PatchedRuns(
        tiny.model,
        [Prompts(without, without, without)],
        sites=[f"blocks.{layer}.hook_resid_post" for layer in range(4)],
        offsets=[-4, -1],
        able=Abilities(True, True),
        batch_size=3,
    )
    cells = [Cell(0, source, site, at) for source in (NOTHING, INSTRUCTED) for site in range(4) for at in range(2)]
    for places, logits in runs.logits(cells):
        torch.testing.assert_close(logits, runs.plain_logits.expand(len(places), -1), rtol=1e-4, atol=1e-4)


def test_a_patch_writes_one_token_of_its_rows_and_no_other_and_leaves_its_input_alone() -> None:
    rows = pad([[5, 6, 7], [8, 9]])
    before = torch.zeros(2, 3, 2)
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    one = Patch("site", values, chosen=torch.tensor([1, -1]), position=torch.tensor([0, 0]))
    after = one(before, rows)
    expected = torch.zeros(2, 3, 2)
    expected[0, 0] = values[1]
    assert after.equal(expected)
    assert not before.any()
    swapped = one.select(torch.tensor([1, 0, 0]))
    assert swapped.chosen.tolist() == [-1, 1, 1]
    assert one.digest == Patch("site", values + 0, one.chosen + 0, one.position + 0).digest
    changed = [
        Patch("other", values, one.chosen, one.position),
        Patch("site", values + 1, one.chosen, one.position),
        Patch("site", values, torch.tensor([-1, 1]), one.position),
        Patch("site", values, one.chosen, one.position + 1),
    ]
    assert len({one.digest, *(other.digest for other in changed)}) == 5


# --- followed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("able", [Abilities(True, True), Abilities(False, False)])
def test_text_after_a_patched_prompt_equals_the_plain_loop_cached_or_whole(
    tiny: Subject, able: Abilities, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steerlens.steering.sampling.abilities", lambda *_: able)
    prompts = [sides(tiny, pair) for pair in PAIRS[:2]]
    cells = [Cell(pair, INSTRUCTED, layer, at) for pair in range(2) for layer in (0, 2) for at in range(2)]
    offsets = [-3, -1]
    runs = PatchedRuns(
        tiny.model,
        [Prompts(without, with_, without) for without, with_ in prompts],
        sites=[f"blocks.{layer}.hook_resid_post" for layer in range(4)],
        offsets=offsets,
        able=Abilities(True, True),
        batch_size=64,
    )
    rows = [*cells, Cell(0, NOTHING, 0, 0)]
    texts = generate(
        tiny.model, [QUERIES[cell.pair] for cell in rows], edits=runs.edits(rows), max_new_tokens=6, batch_size=5
    )
    plain = []
    for cell in cells:
        without, with_ = prompts[cell.pair]
        value = read_at(tiny.hf, with_, cell.site, "resid", offsets[cell.offset])
        where = (cell.site, "resid", len(without) + offsets[cell.offset])
        tokens, gaps = patched_greedy(tiny.hf, without, value, *where, max_new_tokens=6, stop_ids=[EOS_ID])
        plain.append(PlainText(tokens, gaps, 0))
    assert_same_text(plain, [text.tokens for text in texts[: len(cells)]])
    assert texts[-1].tokens == generate(tiny.model, QUERIES[:1], max_new_tokens=6)[0].tokens
    assert len({one.tokens for one in texts}) > 2


def test_rows_of_one_prompt_with_patches_share_no_prefill(planted: Any) -> None:
    # Two rows of one prompt, of which only one is patched, before the last token, where the "!" would stand.
    without, with_ = (planted.tokenizer.encode(text, add_special_tokens=False) for text in ("<bos><turn>ab", "!"))
    site = f"blocks.{WRITER_HEAD[0]}.hook_resid_pre"
    value = run_pass(planted, pad([[*without, *with_]]), reads=[Read(site)]).reads[site]
    patched = Patch(site, value, torch.tensor([0, -1]), torch.tensor([2, 2]))
    texts = generate(planted, ["abc"] * 2, edits=[patched], max_new_tokens=1).texts
    assert texts == ["A", "C"]  # the writer's head finds the "!" that was put there


def test_followed_is_the_loose_verdict_on_each_text(planted: Any) -> None:
    found = patch(planted, planted_pairs(2), metric="followed", sampling=SamplingConfig(max_new_tokens=3)).cells
    assert found["value"].tolist() == [0.0, 1.0, 1.0, 1.0] * 2
    assert set(found["plain"]) == {0.0}
    assert set(found["instructed"]) == {1.0}
    assert set(found["control"]) == {0.0}


# --- metrics, means, positions ---------------------------------------------------------------------------------------


def test_the_logit_difference_is_of_the_tokens_asked_for_or_of_each_sides_likeliest(planted: Any) -> None:
    pairs = planted_pairs(3)
    given = patch(planted, pairs, metric="logit_difference", tokens=("A", "C"))
    ids = [planted.tokenizer.convert_tokens_to_ids(token) for token in "AC"]
    assert given.cells.equals(patch(planted, pairs, metric="logit_difference", tokens=ids).cells)
    assert given.cells.equals(patch(planted, pairs, metric="logit_difference").cells)  # with "!" it says "A", else "C"
    logits = run_pass(planted, pad([encode(planted, pairs[0].text("none"))])).logits[0]
    assert given.cells["plain"][0] == pytest.approx(float(logits[ids[0]] - logits[ids[1]]), abs=1e-4)


def test_pairs_whose_likeliest_tokens_agree_have_no_logit_difference_and_are_left_out(planted: Any) -> None:
    # "x" instructs nothing, so that both sides say "C".
    idle = InstructionPair("abc", "x", "keywords:existence", {"keywords": ["A"]})
    found = patch(planted, planted_pairs(3) + PairSet([idle]), metric="logit_difference")
    assert set(found.table["n"]) == {3}
    assert found.cells.query("prompt_id == @idle.prompt_id")["value"].isna().all()
    with pytest.raises(
        DataError, match=r"logit_difference is for none of 1; .* give two tokens, or take metric=\"kl\""
    ):
        patch(planted, PairSet([idle]), metric="logit_difference")
    kl_of_nothing = patch(planted, PairSet([idle]))
    assert kl_of_nothing.table["restored"].isna().all()  # nothing to restore, and not zero
    assert kl_of_nothing.table["value"].abs().max() < 1e-6


def test_means_are_over_pairs_and_intervals_over_queries(tiny: Subject) -> None:
    found = patch(tiny.model, PAIRS, layers=[2], positions=[-1])
    (row,) = found.table.to_dict("records")
    cells = found.cells
    expected = bootstrap_mean(cells["value"], clusters=cells["query"], n_resamples=2000)
    assert [row["value"], row["low"], row["high"]] == pytest.approx([expected.mean, expected.low, expected.high])
    gap = cells["instructed"].mean() - cells["plain"].mean()
    assert row["restored"] == pytest.approx((cells["value"].mean() - cells["plain"].mean()) / gap)
    assert row["control_restored"] == pytest.approx((cells["control"].mean() - cells["plain"].mean()) / gap)
    assert row["restored_low"] <= row["restored"] <= row["restored_high"]


def test_each_instruction_has_a_map_of_its_own_and_controls_stay_within_it(tiny: Subject) -> None:
    loud = PairSet(InstructionPair(query, "Be loud.", prompt=f"Be loud. {query}") for query in QUERIES[:2])
    both = patch(tiny.model, PAIRS[:3] + loud, layers=[1, 2], positions=2)
    for pairs in (PAIRS[:3], loud):
        alone = patch(tiny.model, pairs, layers=[1, 2], positions=2)
        (name,) = pairs.instructions
        part = both.table[both.table["instruction"] == name]
        for column in ("value", "restored", "control"):
            assert part[column].to_numpy() == pytest.approx(alone.table[column].to_numpy(), rel=1e-3, abs=1e-4)
    assert both.table["instruction"].tolist() == ["change_case:english_capital"] * 4 + ["Be loud."] * 4


def test_one_query_has_no_control_and_no_interval_and_none_is_made_up(tiny: Subject) -> None:
    found = patch(tiny.model, PAIRS[:1], layers=[2], positions=[-1])
    (row,) = found.table.to_dict("records")
    assert np.isnan([row["control"], row["control_restored"], row["low"], row["restored_high"]]).all()
    assert found.cells["control"].isna().all()
    assert np.isfinite([row["value"], row["restored"]]).all()


def test_the_control_is_of_another_query_and_not_of_another_spelling_of_the_same(tiny: Subject) -> None:
    spelled = PairSet(
        InstructionPair(query, INSTRUCTION, prompt=f"{INSTRUCTION} {query}")
        for query in ("Why is it so?", "why is it  so?")
    )
    assert patch(tiny.model, spelled, layers=[2], positions=[-1]).cells["control"].isna().all()
    three = patch(tiny.model, spelled + PairSet([InstructionPair("Hm?", INSTRUCTION, prompt=f"{INSTRUCTION} Hm?")]))
    assert three.cells["control"].notna().all()


def test_a_control_can_be_left_out(tiny: Subject, passes: Passes) -> None:
    patch(tiny.model, PAIRS[:2], layers=[2], positions=[-1], control=False)
    rows = sum(len(rows.tokens) for rows, _ in passes if rows.tokens.shape[1] == 1)
    assert rows == 2 + 2  # a cell of each pair, and the plain prompts beside them


def test_positions_may_be_counted_or_named_and_all_that_align_are_taken_by_default(gpt2: Subject) -> None:
    shared = min(len(query) for query in QUERIES)  # bytes; the token before a query is a space on one side only
    by_default = patch(gpt2.model, PAIRS, layers=[3]).table
    assert by_default["position"].tolist() == [*range(-shared, 0)]
    assert set(by_default["token"][: -shared // 2]) == {VARIED}
    named = patch(gpt2.model, PAIRS, layers=np.array([3, 3]), positions=[-1, -4, -1]).table
    assert named[["layer", "position"]].values.tolist() == [[3, -4], [3, -1]]
    assert patch(gpt2.model, PAIRS, layers=[3], positions=-2).table["position"].tolist() == [-2]


def test_a_query_that_is_its_whole_prompt_may_be_patched_from_its_first_token(gpt2: Subject) -> None:
    model, text = gpt2.model, "Why?"
    whole = len(encode(model, text))
    pairs = PairSet([InstructionPair(text, "Hm", prompt=f"Hm{text}")])
    found = patch(model, pairs, layers=[1], positions=whole - 1)  # all but the token that begins every text
    assert len(found) == whole - 1
    # Without that token nothing is left before the first position, of which keys could be kept.
    bare = patch(model, pairs, layers=[1], positions=whole - 1, prompt_format=PromptFormat(bos=False))
    without, with_ = (pairs[0].text(condition) for condition in ("none", "text"))
    ids, longer = (encode(model, text, PromptFormat(bos=False)) for text in (without, with_))
    value = read_at(gpt2.hf, longer, 1, "resid", -4)
    logits = patched_logits(gpt2.hf, ids, value, 1, "resid", 0)
    instructed = run_pass(model, pad([longer])).logits[0]
    assert bare.cells["value"][0] == pytest.approx(kl(instructed, logits), rel=1e-3, abs=1e-4)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_prompts_that_do_not_end_alike_are_refused_by_name(tiny: Subject) -> None:
    late = PairSet([InstructionPair("Hm", "Say A", prompt_id="late")])
    with pytest.raises(DataError, match=r"prompts of pair late share their last \d+ only, got -30; ask for fewer"):
        patch(tiny.model, PAIRS + late, positions=30)


def test_prompts_with_no_common_end_are_refused_by_name(gpt2: Subject) -> None:
    late = PairSet([InstructionPair("Hm", "Say A", prompt_id="late")])
    for positions in (None, [-1]):
        with pytest.raises(DataError, match=r"prompts of pair late share their last 0 only.* come before the query"):
            patch(gpt2.model, PAIRS + late, positions=positions)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "site": ({"site": "head"}, "site must be one of resid, attn, mlp, got 'head'"),
    "metric": ({"metric": "accuracy"}, "metric must be one of kl, logit_difference, followed, or a function"),
    "position": ({"positions": [0]}, "positions count from the end, -1 the last token, got 0"),
    "positions": ({"positions": []}, r"patching needs at least one position, got \[\]"),
    "none": ({"positions": 0}, "patching needs at least one position, got 0"),
    "fraction": ({"positions": 1.5}, "position must be a whole number, got 1.5"),
    "layer": ({"layers": [4]}, r"layer must be in \[0, 4\), got 4"),
    "layers": ({"layers": []}, "patching needs at least one layer, got none"),
    "tokens": ({"tokens": ("a", "b")}, r'tokens are for metric="logit_difference"'),
    "one": ({"metric": "logit_difference", "tokens": ["a"]}, "tokens must be two that differ"),
    "same": ({"metric": "logit_difference", "tokens": ["a", "a"]}, "tokens must be two that differ"),
    "long": (
        {"metric": "logit_difference", "tokens": ["yes", "n"]},
        "a target must be one token of the tokenizer, got 'yes', which is 3",
    ),
    "id": ({"metric": "logit_difference", "tokens": [5, 10**6]}, "a token must be one of the 260 .* got 1000000"),
    "shape": ({"metric": lambda logits: logits}, "a metric must give one number for each of 1 rows of logits"),
    "batch": ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_patched_is_refused_in_one_sentence(llama: Subject, what: str) -> None:
    options, sentence = WRONG[what]
    with pytest.raises(SteerlensError, match=sentence):
        unchecked(patch)(llama.model, PAIRS[:1], **options)


def test_no_pairs_and_pairs_that_nothing_checks_are_refused(llama: Subject) -> None:
    with pytest.raises(DataError, match="patching needs at least one pair"):
        patch(llama.model, PairSet([]))
    with pytest.raises(DataError, match="must know how to check an instruction"):
        patch(llama.model, PairSet([InstructionPair("Hm?", "Be loud.")]), metric="followed")


def test_a_model_without_the_site_is_refused(tmp_path: Path) -> None:
    model = load_model(save_animal("mamba", tmp_path / "mamba"), progress=False)
    with pytest.raises(ModelError, match=r"a hook point must be one of .* got 'blocks.0.hook_attn_out'"):
        patch(model, PAIRS[:1], site="attn", positions=1)


def test_an_error_in_the_callers_metric_travels_and_leaves_no_hook(llama: Subject) -> None:
    def broken(logits: torch.Tensor) -> torch.Tensor:
        if len(logits) > 1:
            assert not hooks_on(llama.model)  # the model may be used in it
            raise KeyError("mine")
        return logits[:, 0]

    with pytest.raises(KeyError, match="mine"):
        patch(llama.model, PAIRS[:1], metric=broken)
    assert not hooks_on(llama.model)
