"""Rows that are alike up to a layer are run as one up to it, and come out as if each had been run."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from steerlens.errors import ModelError, SteerlensError
from steerlens.models import choice, parting
from steerlens.models.choice import use_backend
from steerlens.models.facts import resid_post
from steerlens.models.load import load_model
from steerlens.models.parting import Stage, spared, stage_of, stages
from steerlens.models.passes import PassResult, Read, Runner
from steerlens.models.probe import can_part
from steerlens.models.rows import Rows, pad
from steerlens.steering.edits import plan_edits
from tests.conftest import Subject, hooks_on
from tests.reference.plain_loop import Step
from tests.steps import as_plan, step
from tests.zoo import save_animal

pytestmark = pytest.mark.bridge

N_LAYERS = 4
SITES = [resid_post(layer) for layer in range(N_LAYERS)]
IDS = [
    [5, 6, 7, 8, 9, 10, 11],
    [10, 11, 12],
    [5, 6, 7, 8, 9, 10, 11],
    [10, 11, 12],
    [5, 6, 7, 8, 9, 10, 11],
    [13, 14, 15, 16],
]
STEPS: list[list[Step]] = [
    [step("add", "all", layer=1, seed=1)],
    [step("set_projection", "all", layer=2, seed=2)],
    [step("add", "all", layer=1, seed=1), step("ablate", "all", layer=3, seed=3)],
    [],
    [],
    [step("add", "all", layer=0, seed=4)],
]


def edits_of(model: Any) -> list[Any]:
    return plan_edits(model, [as_plan(its).interventions for its in STEPS], [len(its) for its in IDS])


FOUND = stages([tuple(its) for its in IDS], [{one.layer: repr(one) for one in its} for its in STEPS])
"""How these rows part."""


# --- which rows part where -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_one_as_long_as_nothing_tells_them_apart(seed: int) -> None:
    draw = random.Random(seed)
    n_rows, n_layers = draw.randrange(1, 12), draw.randrange(1, 7)
    starts = [draw.choice("pqr") for _ in range(n_rows)]
    steps = [{layer: draw.choice("ab") for layer in range(n_layers) if draw.random() < 0.3} for _ in range(n_rows)]
    found = stages(starts, steps)

    def history(row: int, layer: int, *, output: bool) -> Any:
        """What has been done to a row when a layer's block runs, or once what follows it is done."""
        return starts[row], [steps[row].get(below) for below in range(layer + output)]

    run = 0
    for layer in range(n_layers):
        for output in (False, True):
            stage = stage_of(found, layer, output=output)
            own = [history(row, layer, output=output) for row in range(n_rows)]
            for one in range(n_rows):
                assert [int(stage.share[one]) == int(stage.share[other]) for other in range(n_rows)] == [
                    own[one] == own[other] for other in range(n_rows)
                ]
                assert own[int(stage.rows[stage.share[one]])] == own[one]
        run += len(stage_of(found, layer).rows)
    for before, stage in itertools.pairwise(found):
        # The one that a row comes from is the one that stood for it.
        assert before.share[stage.rows].tolist() == stage.parents.tolist()
    assert spared(found, n_layers) == pytest.approx(1 - run / (n_rows * n_layers))


def test_rows_that_have_nothing_in_common_are_one_stage() -> None:
    (only,) = stages("pqr", [{1: "a"}, {}, {2: "b"}])
    assert (only.rows.tolist(), spared([only], 4)) == ([0, 1, 2], 0)


# --- what comes out --------------------------------------------------------------------------------------------------


def run(model: Any, found: Sequence[Stage], *, cut: int, side: Any = "left") -> list[PassResult]:
    """A pass over the rows' beginnings, one over more of them, and one of their last token, for which they are apart."""
    ids = IDS if cut == 0 else [its[:-1] for its in IDS]
    edits = edits_of(model)
    reads = [Read(site) for site in SITES]
    with Runner(model, SITES) as runner:
        if cut == 0:
            return [runner.run(pad(ids, side=side, pad_id=2), edits=edits, reads=reads, stages=found)]
        start = pad([its[:-cut] for its in ids], pad_id=2, prompt_lengths=[len(its) for its in IDS])
        first = runner.run(start, edits=edits, reads=reads, keep_cache=True, stages=found)
        more = start.then(torch.tensor([its[-cut:] for its in ids]))
        second = runner.run(more, edits=edits, reads=reads, cache=first.cache, keep_cache=True, stages=found)
        last = more.then(torch.tensor([its[-1:] for its in IDS]))
        return [first, second, runner.run(last, edits=edits, reads=reads, cache=second.cache)]


def assert_same(found: Sequence[PassResult], expected: Sequence[PassResult]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-4)
        assert one.reads.keys() == other.reads.keys()
        for site, its in one.reads.items():
            torch.testing.assert_close(its, other.reads[site], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("cut", "side"), [(0, "left"), (0, "right"), (1, "left")])
def test_a_pass_gives_each_row_what_it_gives_alone(tiny: Subject, cut: int, side: Any) -> None:
    assert_same(run(tiny.model, FOUND, cut=cut, side=side), run(tiny.model, [], cut=cut, side=side))


@pytest.mark.parametrize(
    "name", ["gpt2", "pythia", "gpt-neo", "opt", "gemma2", "gemma3", "mistral", "qwen3-moe", "llama4-chunked"]
)
def test_rows_part_in_any_architecture(name: str, tmp_path: Path) -> None:
    model = load_model(save_animal(name, tmp_path), progress=False)
    assert can_part(model)
    for cut in (0, 1):
        assert_same(run(model, FOUND, cut=cut), run(model, [], cut=cut))


def test_a_cache_is_used_where_none_is_kept(tiny: Subject) -> None:
    edits = edits_of(tiny.model)
    start = pad([its[:-1] for its in IDS], pad_id=2, prompt_lengths=[len(its) for its in IDS])
    last = start.then(torch.tensor([its[-1:] for its in IDS]))
    with Runner(tiny.model, SITES) as runner:
        expected = runner.run(pad(IDS, pad_id=2), edits=edits).logits
        cache = runner.run(start, edits=edits, keep_cache=True, stages=FOUND).cache
        found = runner.run(last, edits=edits, cache=cache, stages=FOUND)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    assert found.cache is None


def test_rows_that_are_the_same_to_the_end_come_out_as_many_times(tiny: Subject) -> None:
    rows = pad([[5, 6, 7]] * 3)
    with Runner(tiny.model, SITES) as runner:
        expected = runner.run(rows, keep_cache=True)
        found = runner.run(rows, keep_cache=True, stages=stages("ppp", [{}] * 3))
    torch.testing.assert_close(found.logits, expected.logits)
    assert found.cache is not None
    assert expected.cache is not None
    for one, other in zip(found.cache.tables, expected.cache.tables, strict=True):
        torch.testing.assert_close(one.tensor, other.tensor)


def test_blocks_run_no_row_twice(tiny: Subject) -> None:
    known = choice._known(tiny.model)
    with Runner(tiny.model, SITES) as runner:
        runner.run(pad(IDS))  # the modules are made, and proved
        assert known.tree is not None
        seen: list[int] = []
        handles = [
            block.register_forward_pre_hook(lambda _, args: seen.append(len(args[0]))) for block in known.tree.blocks
        ]
        try:
            edits = edits_of(tiny.model)
            runner.run(pad(IDS), edits=edits, stages=FOUND)
        finally:
            for handle in handles:
                handle.remove()
    assert seen == [3, 3, 4, 5]  # rows part after layers 1, 2 and 3


def test_positions_of_rows_that_part_are_not_read(tiny: Subject) -> None:
    rows, at = pad([[5, 6, 7]] * 2), torch.tensor([[0], [1]])
    with Runner(tiny.model, SITES) as runner, pytest.raises(SteerlensError, match="run them without stages"):
        runner.run(rows, reads=[Read(SITES[0], at)], stages=stages("pp", [{2: "a"}, {}]))


# --- whether it may be -----------------------------------------------------------------------------------------------


def test_a_model_that_gives_blocks_more_of_each_row_than_is_known_does_not_part(
    tiny: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert can_part(load_model(tiny.folder, progress=False))
    for name in ("attention_mask", "position_embeddings")[: 1 if tiny.name == "gpt2" else 2]:
        with monkeypatch.context() as patch:
            patch.delitem(parting.PER_ROW, name)
            assert not can_part(load_model(tiny.folder, progress=False))


def test_a_cache_that_gets_the_rows_of_another_layer_is_found_out(
    tiny: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stage_of
    monkeypatch.setattr("steerlens.models.backends.stage_of", lambda found, layer: real(found, max(0, layer - 1)))
    assert not can_part(load_model(tiny.folder, progress=False))


def test_a_model_that_is_run_by_its_hook_points_refuses_rows_that_part(tiny: Subject) -> None:
    use_backend(tiny.model, "hooks")
    try:
        with Runner(tiny.model, SITES) as runner:
            assert not runner.plain_modules
            with pytest.raises(ModelError, match="is run by its hook points"):
                runner.run(pad(IDS), stages=FOUND)
    finally:
        use_backend(tiny.model, "auto")


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_rows_together(tiny: Subject, failure: type[BaseException]) -> None:
    class Failing:
        site, digest = SITES[2], ""

        def __call__(self, activation: torch.Tensor, rows: Rows) -> torch.Tensor:
            raise failure("no")

        def select(self, keep: torch.Tensor) -> "Failing":
            return self

    with Runner(tiny.model, SITES) as runner:
        before = hooks_on(tiny.model)
        with pytest.raises(failure):
            runner.run(pad(IDS), edits=[Failing()], stages=FOUND)
        assert hooks_on(tiny.model) == before
        plain = runner.run(pad(IDS)).logits
    assert plain.shape[0] == len(IDS)
