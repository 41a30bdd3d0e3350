"""Passes: logits, reads and caches on either padding, edits as values, and nothing left behind however a pass ends."""

from typing import Any

import pytest
import torch
from torch import Tensor

from steerlens.errors import ModelError, SteerlensError
from steerlens.models.choice import choose_backend
from steerlens.models.facts import resid_post
from steerlens.models.load import load_model
from steerlens.models.passes import Read, Runner, run_pass
from steerlens.models.prompts import encode
from steerlens.models.rows import Rows, pad
from steerlens.steering.edits import steer
from steerlens.steering.residual import residual_edits
from steerlens.steering.sampling import generate
from steerlens.vectors.activations import record_activations
from tests.conftest import Subject, hooks_on
from tests.reference.plain_capture import last_residuals
from tests.steps import as_plan, step
from tests.unchecked import unchecked

PROMPTS = ["Describe rain.", "a", "Why is the sky blue?"]
SITE = resid_post(2)


def ids_of(subject: Subject) -> list[list[int]]:
    return [encode(subject.model, prompt) for prompt in PROMPTS]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_pass_in_pieces_over_the_cache_equals_the_whole_pass(tiny: Subject) -> None:
    (ids, *_) = ids_of(tiny)
    whole = run_pass(tiny.model, pad([ids])).logits
    rows = pad([ids[:4]])
    result = run_pass(tiny.model, rows, keep_cache=True)
    for start, stop in [(4, 5), (5, len(ids))]:
        rows = rows.then(torch.tensor([ids[start:stop]]))
        result = run_pass(tiny.model, rows, cache=result.cache, keep_cache=True)
    close(result.logits, whole)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(tiny: Subject, side: Any) -> None:
    reads = [Read(resid_post(layer)) for layer in range(4)]
    batch = run_pass(tiny.model, pad(ids_of(tiny), side=side, pad_id=2), reads=reads)
    for row, ids in enumerate(ids_of(tiny)):
        alone = run_pass(tiny.model, pad([ids]), reads=reads)
        close(batch.logits[row], alone.logits[0])
        for site in batch.reads:
            close(batch.reads[site][row], alone.reads[site][0])


def test_a_hidden_gap_within_a_row_does_not_count_as_positions(tiny: Subject) -> None:
    (ids, *_) = ids_of(tiny)
    alone = run_pass(tiny.model, pad([ids])).logits
    stem, rest = pad([ids[:5], [7] * 8], pad_id=2), pad([ids[5:], [9] * (len(ids) + 2)], pad_id=2)
    cache = run_pass(tiny.model, stem, keep_cache=True).cache
    close(run_pass(tiny.model, stem.then(rest.tokens, rest.mask), cache=cache).logits[0], alone[0])


def test_a_copied_cache_goes_its_own_way(tiny: Subject) -> None:
    (ids, *_) = ids_of(tiny)
    rows = pad([ids[:-1]])
    cache = run_pass(tiny.model, rows, keep_cache=True).cache
    assert cache is not None
    kept = cache.copy()
    run_pass(tiny.model, rows.then(torch.tensor([[9]])), cache=cache)
    close(
        run_pass(tiny.model, rows.then(torch.tensor([ids[-1:]])), cache=kept).logits,
        run_pass(tiny.model, pad([ids])).logits,
    )


def test_the_last_tokens_logits_are_those_of_all_columns(tiny: Subject) -> None:
    for side in ("left", "right"):
        rows = pad(ids_of(tiny), side=side, pad_id=2)
        every = run_pass(tiny.model, rows, logits="all").logits
        last = run_pass(tiny.model, rows).logits
        close(last, every[torch.arange(3), rows.last])


def test_only_the_last_tokens_logits_are_computed(tiny: Subject) -> None:
    shapes: list[tuple[int, ...]] = []
    with tiny.model.hooks(fwd_hooks=[("unembed.hook_out", lambda logits, hook: shapes.append(tuple(logits.shape)))]):
        run_pass(tiny.model, pad([[5, 6, 7]]))
    assert shapes == [(1, 1, 260)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_padded_row_has_finite_logits_near_its_own_in_every_dtype(tiny: Subject, dtype: str) -> None:
    model = load_model(tiny.folder, dtype=dtype, progress=False)
    ids = encode(model, "Hm")
    padded = run_pass(model, pad([ids, [9] * (len(ids) + 20)], pad_id=2)).logits
    torch.testing.assert_close(padded[0], run_pass(model, pad([ids])).logits[0], rtol=0.05, atol=0.2)


def test_reads_are_float32_copies_of_the_residuals_that_the_plain_hooks_find(tiny: Subject) -> None:
    result = run_pass(tiny.model, pad(ids_of(tiny), pad_id=2), reads=[Read(resid_post(layer)) for layer in range(4)])
    found = torch.stack(list(result.reads.values()), dim=1)
    assert found.dtype == torch.float32
    for row, ids in enumerate(ids_of(tiny)):
        torch.testing.assert_close(found[row].double(), last_residuals(tiny.hf, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_read_by_the_rows_own_count(tiny: Subject, side: Any) -> None:
    rows = pad(ids_of(tiny), side=side, pad_id=2)
    every = run_pass(tiny.model, rows, reads=[Read(SITE, "all")]).reads[SITE]
    wanted = torch.tensor([[0, 3], [1, 0], [2, 2]])
    found = run_pass(tiny.model, rows, reads=[Read(SITE, wanted)]).reads[SITE]
    for row in range(3):
        for place, position in enumerate(wanted[row].tolist()):
            column = rows.positions[row].tolist().index(position)
            close(found[row, place], every[row, column])


def test_a_position_that_a_row_has_not_got_is_refused(tiny: Subject) -> None:
    with pytest.raises(SteerlensError, match=r"positions to read must be among the tokens of the pass, got \[\[99\]\]"):
        run_pass(tiny.model, pad([[5, 6]]), reads=[Read(SITE, torch.tensor([[99]]))])
    assert hooks_on(tiny.model) == []


def test_reads_see_what_edits_have_made_of_the_activation(tiny: Subject) -> None:
    rows = pad(ids_of(tiny), pad_id=2)
    plan = as_plan([step("set_projection", "all", layer=2, strength=7.0, seed=1)])
    edits = residual_edits([plan] * 3, rows.prompt_lengths, d_model=32)
    found = run_pass(tiny.model, rows, edits=edits, reads=[Read(SITE)]).reads[SITE]
    torch.testing.assert_close(found @ plan.interventions[0].direction, torch.full((3,), 7.0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_edit_changes_the_same_tokens_on_either_padding(tiny: Subject, side: Any) -> None:
    rows = pad(ids_of(tiny), side=side, pad_id=2)
    edits = residual_edits([as_plan([step("add", "last", layer=2, seed=1)])] * 3, rows.prompt_lengths, d_model=32)
    before = run_pass(tiny.model, rows, reads=[Read(SITE, "all")]).reads[SITE]
    after = run_pass(tiny.model, rows, edits=edits, reads=[Read(SITE, "all")]).reads[SITE]
    changed = (after != before).any(-1)
    assert changed.sum(1).tolist() == [1, 1, 1]
    assert changed.int().argmax(1).tolist() == rows.last.tolist()


def test_an_edits_digest_covers_its_site_and_numbers() -> None:
    def digest(layer: int = 1, strength: float = 1.0, rule: str = "all", length: int = 3) -> str:
        plan = as_plan([step("add", rule, layer=layer, strength=strength)])
        (edit,) = residual_edits([plan], [length], d_model=32)
        return edit.digest

    assert digest() == digest()
    assert (
        len({digest(), digest(layer=2), digest(strength=2.0), digest(rule="last"), digest(rule="last", length=4)}) == 5
    )


# --- what must not be taken for a result ---------------------------------------------------------------------------


def test_a_model_in_training_mode_is_run_without_dropout_and_its_modes_come_back(tiny: Subject) -> None:
    model = load_model(tiny.folder, progress=False)
    hf = model.original_model
    rows, reads = pad(ids_of(tiny), pad_id=2), [Read(SITE)]
    expected = run_pass(model, rows, reads=reads)
    model.train()
    for module in hf.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    modes = [module.training for module in hf.modules()]
    assert any(modes)
    for _ in range(2):
        found = run_pass(model, rows, reads=reads)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.reads[SITE], expected.reads[SITE])
    assert [module.training for module in hf.modules()] == modes
    assert model.training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_and_never_a_text(tiny: Subject, value: float) -> None:
    def spoil(resid: Tensor, hook: Any) -> Tensor:
        return torch.full_like(resid, value)

    with tiny.model.hooks(fwd_hooks=[(resid_post(3), spoil)]):
        with pytest.raises(ModelError, match="logits must be finite, got nan in row 0 of 1 after 2 tokens"):
            run_pass(tiny.model, pad([[5, 6]]))
        with pytest.raises(ModelError, match="logits must be finite"):
            generate(tiny.model, ["a"], max_new_tokens=2)


def test_padding_may_have_any_logits(tiny: Subject) -> None:
    rows = pad([[5, 6, 7], [8]], pad_id=2)

    def spoil(resid: Tensor, hook: Any) -> Tensor:
        resid = resid.clone()
        resid[1, :2] = float("nan")
        return resid

    with tiny.model.hooks(fwd_hooks=[(resid_post(3), spoil)]):
        assert run_pass(tiny.model, rows, logits="all").logits[1, 2].isfinite().all()


def test_a_hook_point_that_does_not_exist_or_fire_is_an_error(tiny: Subject) -> None:
    with pytest.raises(Exception, match=r"blocks\.9"):
        run_pass(tiny.model, pad([[5]]), reads=[Read("blocks.9.hook_resid_post")])
    assert hooks_on(tiny.model) == []


@pytest.mark.parametrize("what", ["record", "generate", "pass"])
def test_a_block_of_steer_refuses_passes_that_would_be_steered_twice(tiny: Subject, what: str, request: Any) -> None:
    from steerlens.data.pairs import InstructionPair, PairSet

    pairs = PairSet([InstructionPair("Describe rain.", "Use capitals.", "change_case:english_capital")])
    runs = {
        "record": lambda: record_activations(tiny.model, pairs),
        "generate": lambda: generate(tiny.model, ["a"], max_new_tokens=1),
        "pass": lambda: run_pass(tiny.model, pad([[5]])),
    }
    with steer(tiny.model, as_plan([step("add", "all")])):
        with steer(tiny.model, as_plan([step("add", "all")])), pytest.raises(SteerlensError, match="steered twice"):
            runs[what]()
        with pytest.raises(SteerlensError, match="leave the block, and give the plan to the call"):
            runs[what]()
    runs[what]()


# --- nothing is left behind ----------------------------------------------------------------------------------------


def test_a_runner_puts_its_hooks_on_once_for_many_passes(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = 0
    kind = type(choose_backend(tiny.model, [SITE])[0])
    real = kind.hooked

    def counted(*args: Any) -> Any:
        nonlocal entered
        entered += 1
        return real(*args)

    generate(tiny.model, PROMPTS, max_new_tokens=4)  # the model is known from here on
    monkeypatch.setattr(kind, "hooked", counted)
    generate(tiny.model, PROMPTS * 3, steering=as_plan([step("add", "all")]), max_new_tokens=4, batch_size=2)
    assert entered == 1


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_no_hook_and_no_edit(tiny: Subject, failure: type[BaseException]) -> None:
    expected = run_pass(tiny.model, pad([[5, 6]])).logits

    class Failing:
        site, digest = SITE, ""

        def __call__(self, activation: Tensor, rows: Rows) -> Tensor:
            raise failure

        def select(self, keep: Tensor) -> "Failing":
            return self

    with pytest.raises(failure):
        run_pass(tiny.model, pad([[5, 6]]), edits=[Failing()])
    assert hooks_on(tiny.model) == []
    assert torch.equal(run_pass(tiny.model, pad([[5, 6]])).logits, expected)


def test_a_runner_that_cannot_set_all_hooks_sets_none(tiny: Subject) -> None:
    with pytest.raises(Exception, match="none"), Runner(tiny.model, ["blocks.0.hook_resid_post", "none"]):
        pytest.fail("the block must not start")
    assert hooks_on(tiny.model) == []


@pytest.mark.bridge
def test_an_activation_of_another_shape_than_the_tokens_is_refused(llama: Subject) -> None:
    # The rotary tables are one row for all.
    site, rows = "rotary_emb.hook_cos", pad([[5, 6, 7], [5, 6, 7]])
    with pytest.raises(ModelError, match="cannot be edited or read here"):
        run_pass(llama.model, rows, reads=[Read(site)])
    assert hooks_on(llama.model) == []


# --- what is asked for must come about -----------------------------------------------------------------------------


def test_a_site_that_a_runner_does_not_know_is_refused(tiny: Subject) -> None:
    rows = pad([[5, 6]])
    edits = residual_edits([as_plan([step("add", "all", layer=2)])], [2], d_model=32)
    with Runner(tiny.model, []) as runner:
        with pytest.raises(
            SteerlensError, match=r"must be made with the sites of its edits and reads, got \['blocks\.2"
        ):
            runner.run(rows, edits=edits)
        with pytest.raises(SteerlensError, match="must be made with the sites"):
            runner.run(rows, reads=[Read(SITE)])


def test_two_reads_of_one_site_are_refused(tiny: Subject) -> None:
    with pytest.raises(SteerlensError, match="a pass has one read for each site"):
        run_pass(tiny.model, pad([[5, 6]]), reads=[Read(SITE, "last"), Read(SITE, "all")])


def test_padding_cannot_be_read_as_a_position(tiny: Subject) -> None:
    with pytest.raises(SteerlensError, match="positions to read must be among the tokens"):
        run_pass(tiny.model, pad([[5, 6], [7]]), reads=[Read(SITE, torch.tensor([[-1], [-1]]))])


@pytest.mark.bridge
def test_an_edit_whose_hook_point_does_not_fire_is_an_error(llama: Subject) -> None:
    class Idle:
        site, digest = "blocks.1.attn.hook_hidden_states", ""

        def __call__(self, activation: Tensor, rows: Rows) -> Tensor:
            return activation

        def select(self, keep: Tensor) -> "Idle":
            return self

    with pytest.raises(ModelError, match=r"the hook point blocks\.1\.attn\.hook_hidden_states of .* did not fire"):
        run_pass(llama.model, pad([[5, 6]]), edits=[Idle()])


@pytest.mark.parametrize("where", ["first", "Last", ""])
def test_reading_at_an_unknown_place_is_refused(where: Any) -> None:
    with pytest.raises(SteerlensError, match=r'at must be "last", "all" or positions \[row, n\], got'):
        unchecked(Read)(SITE, where)


def test_unknown_columns_of_logits_are_refused(tiny: Subject) -> None:
    with (
        Runner(tiny.model, []) as runner,
        pytest.raises(SteerlensError, match='logits must be "last" or "all", got \'al\''),
    ):
        unchecked(Runner.run)(runner, pad([[5]]), logits="al")


def test_an_edit_without_a_return_is_refused(tiny: Subject) -> None:
    class Silent:
        site, digest = SITE, ""

        def __call__(self, activation: Tensor, rows: Rows) -> Any:
            activation * 2.0

        def select(self, keep: Tensor) -> "Silent":
            return self

    with pytest.raises(SteerlensError, match="returned None; does it lack a return"):
        run_pass(tiny.model, pad([[5]]), edits=[Silent()])
    assert hooks_on(tiny.model) == []
