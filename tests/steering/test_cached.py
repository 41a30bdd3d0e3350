"""Places of a batch are filled again: the same text as without, in as few passes and copies as the rule says, however it ends."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import steerlens as sl
from steerlens.models import prefixes
from steerlens.models.backends import BridgeCache, HookedCache, LeanBackend, Table, put
from steerlens.models.load import load_model
from steerlens.models.parting import stage_of
from steerlens.models.passes import run_pass
from steerlens.models.prefixes import common_prefix, held_prefixes
from steerlens.models.probe import abilities
from steerlens.models.prompts import encode
from steerlens.models.rows import n_hidden, pad
from steerlens.steering import cached, prefill
from steerlens.steering.generations import Generation, Token
from steerlens.steering.plan import Plan
from steerlens.steering.sampling import generate, stream, stream_tokens
from tests.conftest import Passes, Subject, hooks_on
from tests.near_ties import assert_same_text
from tests.steering.test_sampling import PROMPTS, oracle, save_all
from tests.steps import OPERATORS, RULES, as_plan, step
from tests.zoo import save_animal

STOP = [60, 75, 90, 101, 111, 120, 200]
"""Tokens at which rows end here, so that they end at different times."""


def prompts_of(draw: random.Random, n: int) -> list[str]:
    return [f"{draw.choice(PROMPTS)} {'x' * draw.randrange(20)}"[draw.randrange(3) :] for _ in range(n)]


def said_of(subject: Subject, prompts: Sequence[str], **options: Any) -> dict[int, list[Token]]:
    """The tokens of each row."""
    said: dict[int, list[Token]] = {}
    for one in stream_tokens(subject.model, prompts, **options):
        if isinstance(one, Token):
            said.setdefault(one.index, []).append(one)
    return said


# --- the same text -------------------------------------------------------------------------------------------------


# Seed 5 draws a token between two whose logits part at the sixth digit, and rounding decides.
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 6])
def test_refilled_rows_say_what_they_say_without(tiny: Subject, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    n = draw.randrange(8, 20)
    prompts = prompts_of(draw, n)
    if seed % 2:  # rows of one prompt, some of one stem
        prompts = [draw.choice(prompts[:4]) for _ in prompts]
    plans = [
        as_plan([step(draw.choice(OPERATORS), draw.choice(RULES), layer=draw.randrange(4), seed=row)])
        for row in range(n)
    ]
    options: dict[str, Any] = {
        "steering": [draw.choice([plan, as_plan([])]) for plan in plans],
        "stop_ids": draw.sample(range(3, 260), 20),
        "stop": ["q"] if seed % 3 else [],
        "temperature": 1.0,
        "seed": range(n),
        "max_new_tokens": draw.randrange(14, 28),
    }
    size = draw.randrange(2, 7)
    found = generate(tiny.model, prompts, batch_size=size, **options)
    assert len({len(row.tokens) for row in found}) > 2, "rows end together, and show nothing"
    assert found == generate(tiny.model, prompts, batch_size=1, **options)
    streamed = stream(tiny.model, prompts, batch_size=size, **options)
    assert sorted(streamed, key=lambda row: row.index) == found
    said, alone = (said_of(tiny, prompts, batch_size=some, **options) for some in (size, 1))
    assert {index: tuple(one.id for one in row) for index, row in said.items()} == {
        row.index: row.tokens for row in found
    }
    # Texts of a model with random weights hide small faults, probabilities do not.
    for index, row in said.items():
        assert [one.log_prob for one in row] == pytest.approx([one.log_prob for one in alone[index]], abs=1e-4)
    monkeypatch.setattr(cached, "REFILL", 0)
    assert found == generate(tiny.model, prompts, batch_size=size, **options)


def test_greedy_rows_that_come_in_later_say_what_the_plain_loop_says(tiny: Subject) -> None:
    steps = [[step(OPERATORS[row % 3], RULES[row % 5], layer=row % 4, seed=row)] for row in range(len(PROMPTS))]
    expected = oracle(tiny, PROMPTS, steps, max_new_tokens=20)
    plans = [as_plan(some) for some in steps]
    found = generate(tiny.model, PROMPTS, steering=plans, max_new_tokens=20, batch_size=4)
    assert_same_text(expected, [row.tokens for row in found])


@pytest.mark.bridge
@pytest.mark.parametrize("name", ["gemma2", "mistral", "bloom", "falcon", "gpt-neo", "gptj"])
def test_windows_and_positions_hold_in_a_row_that_comes_in_later(name: str, tmp_path: Path, passes: Passes) -> None:
    model = load_model(save_animal(name, tmp_path), progress=False)
    assert abilities(model, 40).cache
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 1.0, "seed": range(12), "stop_ids": STOP}
    found = generate(model, PROMPTS[:12], batch_size=3, **options)
    assert any(rows.tokens.shape[0] < 3 and rows.tokens.shape[1] > 1 for rows, _ in passes[1:]), (
        "nothing was filled again"
    )
    assert found == generate(model, PROMPTS[:12], batch_size=1, **options)


HEAD = "You are a careful assistant, and brief. "


def prefixed(head: str = HEAD) -> tuple[list[str], list[Plan]]:
    """Prompts that begin alike, and plans that steer the beginning in three ways, or only what comes after it."""
    plans = [as_plan([]), as_plan([step("add", "all", seed=1)]), as_plan([step("add", "all", layer=2, seed=2)])]
    later = [as_plan([step("add", rule, seed=3)]) for rule in ("generated", "last")]
    return [head + prompt for prompt in PROMPTS[:10]], [*plans, *plans, *later, *plans[:2]]


@pytest.mark.parametrize("gated", [False, True])
def test_what_rows_begin_with_is_run_once_for_each_way_of_steering_it(
    tiny: Subject, gated: bool, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, plans = prefixed()
    if gated:
        vector = sl.SteeringVector({1: torch.ones(32)})
        plans = [plan + sl.plausible(vector.at(1, operator="add", coeff=5.0), beta=0.1) for plan in plans]
    options: dict[str, Any] = {"steering": plans, "max_new_tokens": 12, "stop_ids": STOP, "batch_size": 10}
    whole = generate(tiny.model, prompts, **options)  # too little is spared
    monkeypatch.setattr(prefixes, "SPARED", {"cpu": 1})
    passes.clear()
    found = generate(tiny.model, prompts, **options)
    assert found == whole == generate(tiny.model, prompts, **options | {"batch_size": 1})
    ids = [list(row.prompt_tokens[: -1 if gated else None]) for row in found]
    width = common_prefix(ids)
    assert width >= len(HEAD)
    (first, _), (rest, _) = passes[:2]
    assert first.tokens.shape == (3, width)  # unsteered, and along each vector
    longest = max(map(len, ids))
    assert rest.tokens.shape == (10, longest - width)
    fed = [int(rows.mask[:, -rows.tokens.shape[1] :].sum()) for rows in (first, rest)]
    assert fed == [3 * width, 10 * (longest - width)]
    assert rest.mask.sum(1).tolist() == sorted(map(len, ids), reverse=True)
    assert not (rest.mask.diff(dim=1) < 0).any()  # padding is on the left alone


def test_a_prefix_is_run_by_itself_only_where_that_pays(
    llama: Subject, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, _ = prefixed()
    ids = [encode(llama.model, prompt) for prompt in prompts]
    width = common_prefix(ids)
    spared = sum(held_prefixes(ids, width)) - width
    for least, n in ((spared, 2), (spared + 1, 1)):
        monkeypatch.setattr(prefixes, "SPARED", {"cpu": least})
        passes.clear()
        generate(llama.model, prompts, max_new_tokens=3, batch_size=10)
        assert sum(rows.tokens.shape[1] > 1 for rows, _ in passes) == n
    # A row that is shorter than others by more than the prefix would begin with padding alone.
    monkeypatch.setattr(prefixes, "SPARED", {"cpu": 1})
    passes.clear()
    generate(llama.model, ["Tell me.", f"Tell {'x' * 40}", f"Tell {'y' * 40}"], max_new_tokens=3)
    assert sum(rows.tokens.shape[1] > 1 for rows, _ in passes) == 1


@pytest.mark.bridge
def test_what_rows_share_below_a_layer_counts_where_a_prefix_may_be_run_by_itself(
    llama: Subject, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, _ = prefixed()
    plans = [as_plan([step("add", "all", layer=3, seed=row)]) for row in range(10)]
    ids = [encode(llama.model, prompt) for prompt in prompts]
    width = common_prefix(ids)
    # Steered after the last block, each in its own way, the beginnings are one row in all blocks.
    spared = sum(held_prefixes(ids, width)) - width
    # A pass over one prompt is one row there in any case, its beginning as well as its end.
    for asked, least, n in ((prompts, spared, 2), (prompts, spared + 1, 1), (prompts[:1] * 10, 1, 1)):
        monkeypatch.setattr(prefixes, "SPARED", {"cpu": least})
        passes.clear()
        found = generate(llama.model, asked, steering=plans, max_new_tokens=3, batch_size=10)
        assert sum(rows.tokens.shape[1] > 1 for rows, _ in passes) == n
        assert found == generate(llama.model, asked, steering=plans, max_new_tokens=3, batch_size=1)


@pytest.mark.bridge
@pytest.mark.parametrize(
    "name", ["gemma2", "mistral", "bloom", "falcon", "gpt-neo", "gptj", "llama", "mamba", "phi3-longrope"]
)
def test_rows_that_begin_alike_say_the_same_in_any_architecture(
    name: str, tmp_path: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(save_animal(name, tmp_path), progress=False)
    monkeypatch.setattr(prefixes, "SPARED", {"cpu": 1})
    prompts = [f"{HEAD[-20:]}Describe {what}." for what in ("tea", "iron", "snow", "the sea", "wool", "a cat")]
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "seed": range(6)}
    alone = generate(model, prompts, batch_size=1, **options)
    passes.clear()
    assert generate(model, prompts, batch_size=6, **options) == alone
    able = abilities(model, max(map(len, (row.prompt_tokens for row in alone))) + 8)
    assert able.prefix == (name in ("bloom", "falcon", "gpt-neo", "gptj", "llama"))
    if able.cache:
        assert sum(rows.tokens.shape[1] > 1 for rows, _ in passes) == 1 + able.prefix


def parted(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How many rows go through each block of a pass whose rows part, from here on."""
    seen: list[list[int]] = []
    real = LeanBackend.forward_parting

    def spy(self: Any, rows: Any, cache: Any, stages: Any, **its: Any) -> Any:
        seen.append([len(stage_of(stages, layer).rows) for layer in range(len(self.tree.blocks))])
        return real(self, rows, cache, stages, **its)

    monkeypatch.setattr(LeanBackend, "forward_parting", spy)
    return seen


@pytest.mark.bridge
@pytest.mark.parametrize("gated", [False, True])
def test_rows_of_a_sweep_are_run_once_up_to_the_layer_that_tells_them_apart(
    tiny: Subject, gated: bool, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a prefix of their own, whether or not they go on under a gate."""
    some = [
        as_plan([step("add", "all", layer=layer, strength=16.0 + n, seed=layer)]) for layer in (1, 3) for n in range(3)
    ]
    plans = [*some, as_plan([]), as_plan([step("add", "all", layer=2), step("ablate", "last", layer=3)])]
    # What tells two of them apart may come before what they share, in one layer.
    plans += [as_plan([step("add", "all", seed=seed), step("add", "all", seed=9)]) for seed in (7, 8)]
    if gated:
        vector = sl.SteeringVector({1: torch.ones(32)})
        plans = [plan + sl.plausible(vector.at(1, operator="add", coeff=5.0), beta=0.1) for plan in plans]
    prompts = [HEAD + prompt for prompt in PROMPTS[:3] for _ in plans]
    options: dict[str, Any] = {"steering": plans * 3, "max_new_tokens": 10, "stop_ids": STOP, "batch_size": 30}
    alone = generate(tiny.model, prompts, **options | {"batch_size": 1})
    seen = parted(monkeypatch)
    for least in (10**6, 1):  # in one pass, and what all begin with by itself
        monkeypatch.setattr(prefixes, "SPARED", {"cpu": least})
        monkeypatch.setattr(prefill, "PASS_OVER_PARTING", 10**6)
        assert generate(tiny.model, prompts, **options) == alone
    assert seen == [[3, 3, 18, 21], [1, 1, 6, 7], [3, 3, 18, 21]]


@pytest.mark.bridge
def test_rows_whose_attention_is_steered_are_run_by_themselves(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [
        as_plan([step("add", "all", layer=2)]),
        as_plan([]),
        *(sl.pasta(alpha, on="about") for alpha in (0.1, 0.5)),
    ]
    prompts = ["Tell me all about tea, and about iron."] * 4
    alone = generate(tiny.model, prompts, steering=plans, max_new_tokens=10, batch_size=1)
    seen = parted(monkeypatch)
    assert generate(tiny.model, prompts, steering=plans, max_new_tokens=10, batch_size=4) == alone
    assert seen == [[3, 3, 3, 4]]


# --- what it takes -------------------------------------------------------------------------------------------------


def passes_of(prompt_lengths: Sequence[int], n_tokens: Sequence[int], size: int) -> tuple[list[tuple[int, int]], int]:
    """The shape of every pass over rows that say so many tokens, and how often free places are dropped."""
    waiting = sorted(zip(prompt_lengths, n_tokens, strict=True), key=lambda row: -row[0])
    shapes, n_dropped = [], 0
    while waiting:
        places, waiting = [list(row) for row in waiting[:size]], waiting[size:]
        whole, first = max(length for length, _ in places), True
        while any(left for _, left in places):
            free = [row for row in places if not row[1]]
            if waiting and 8 * len(free) >= size and free:
                new, waiting = waiting[: len(free)], waiting[len(free) :]
                shapes.append((len(new), max(length for length, _ in new) - 1))
                for row, one in zip(free, new, strict=False):
                    row[:] = one
            elif not waiting and free and 4 * len(free) >= len(places):
                places, n_dropped = [row for row in places if row[1]], n_dropped + 1
            shapes.append((len(places), whole if first else 1))
            first = False
            for row in places:
                row[1] = max(0, row[1] - 1)
    return shapes, n_dropped


@pytest.mark.parametrize("size", [2, 5, 12])
def test_every_pass_and_every_copy_of_the_cache_is_accounted_for(
    tiny: Subject, size: int, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = 0
    for kind in (BridgeCache, HookedCache):
        real = kind.select

        def counting(self: Any, keep: torch.Tensor, real: Any = real) -> Any:
            nonlocal copies
            copies += 1
            return real(self, keep)

        monkeypatch.setattr(kind, "select", counting)
    prompts = [f"{prompt} {'y' * number}" for number, prompt in enumerate(PROMPTS * 2)]
    options: dict[str, Any] = {"temperature": 1.0, "seed": range(len(prompts)), "stop_ids": STOP, "max_new_tokens": 24}
    # What is found out about a model is found out before.
    generate(tiny.model, prompts, max_new_tokens=24, stop_ids=range(260))
    passes.clear()
    copies = 0
    found = generate(tiny.model, prompts, batch_size=size, **options)
    lengths = [len(row.prompt_tokens) for row in found]
    shapes, n_dropped = passes_of(lengths, [len(row.tokens) for row in found], size)
    assert [tuple(rows.tokens.shape) for rows, _ in passes] == shapes
    assert copies == n_dropped
    # Each prompt is run once: padding aside, these are all the tokens that are fed.
    fed = sum(int((rows.mask[:, -rows.tokens.shape[1] :]).sum()) for rows, _ in passes)
    assert fed == sum(lengths) + sum(len(row.tokens) - 1 for row in found)


def test_a_batch_is_never_wider_than_its_longest_row(tiny: Subject, passes: Passes) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": range(36), "stop_ids": STOP, "max_new_tokens": 30}
    found = generate(tiny.model, PROMPTS * 2, batch_size=4, **options)
    decoded = [rows for rows, _ in passes if rows.tokens.shape[1] == 1]
    assert len(decoded) > 60
    for rows in decoded:
        assert n_hidden(rows.mask * rows.mask[:, -1:]) == 0
    assert max(rows.mask.shape[1] for rows in decoded) <= max(len(row.prompt_tokens) + len(row.tokens) for row in found)


def test_a_stem_is_run_once_however_its_rows_come_in(llama: Subject, passes: Passes) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": range(30), "stop_ids": STOP, "max_new_tokens": 12}
    for first, expected in ((20, [1, 1]), (2, [2])):  # of the first prompt; two prompts begin a batch together
        prompts = ["Tell me about it."] * first + ["Tell me of it."] * (30 - first)
        passes.clear()
        found = generate(llama.model, prompts, batch_size=4, **options)
        prefilled = [rows.tokens.shape[0] for rows, _ in passes if rows.tokens.shape[1] > 1]
        assert prefilled == expected
        assert found == generate(llama.model, prompts, batch_size=1, **options)


# --- however it ends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_while_places_are_filled_leaves_no_hook(
    llama: Subject, failure: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "steering": as_plan([step("add", "all")]),
        "temperature": 1.0,
        "seed": range(len(PROMPTS)),
        "stop_ids": STOP,
        "max_new_tokens": 20,
        "batch_size": 4,
    }
    whole = list(stream(llama.model, PROMPTS, **options))
    hooks_at_failure: list[str] = []

    def failing(*_: Any) -> None:
        hooks_at_failure.extend(hooks_on(llama.model))
        raise failure

    monkeypatch.setattr(cached, "put", failing)
    finished: list[Generation] = []
    with pytest.raises(failure):
        save_all(stream(llama.model, PROMPTS, **options), finished)
    assert hooks_at_failure, "the failure must come while hooks are on"
    assert hooks_on(llama.model) == []
    assert finished == whole[: len(finished)]
    assert finished


# --- parts ---------------------------------------------------------------------------------------------------------


def test_rows_are_written_right_aligned_and_what_is_left_of_them_is_empty() -> None:
    table = Table(torch.ones(3, 2, 4, 1), 2)
    table.put(torch.tensor([2, 0]), Table(torch.arange(2.0, 10).reshape(2, 2, 2, 1), 2))
    assert table.tensor[..., 0].tolist() == [
        [[0, 0, 6, 7], [0, 0, 8, 9]],
        [[1, 1, 1, 1], [1, 1, 1, 1]],
        [[0, 0, 2, 3], [0, 0, 4, 5]],
    ]
    table.put(torch.tensor([1]), None)
    assert not table.tensor[1].any()


def test_a_cache_without_its_padding_goes_on_alike(tiny: Subject) -> None:
    rows = pad([[5, 6, 7, 8, 9, 10, 11, 12], [7, 8, 9]]).to(tiny.model.cfg.device)
    begun = run_pass(tiny.model, rows, keep_cache=True).cache
    assert begun is not None
    short = rows.select(torch.tensor([1]))
    one = begun.select(torch.tensor([1]))
    wide = run_pass(tiny.model, short.then(torch.tensor([[4]])), cache=one.fork(), keep_cache=True)
    narrow = run_pass(tiny.model, pad([[7, 8, 9]]).then(torch.tensor([[4]])), cache=one.without(5), keep_cache=True)
    torch.testing.assert_close(narrow.logits, wide.logits)
    other = run_pass(tiny.model, pad([[3, 4]]), keep_cache=True).cache
    assert narrow.cache is not None
    put(narrow.cache, torch.tensor([0]), other)
    again = run_pass(
        tiny.model, pad([[3, 4]]).then(torch.tensor([[9]])), cache=narrow.cache.without(2), keep_cache=True
    )
    torch.testing.assert_close(again.logits, run_pass(tiny.model, pad([[3, 4, 9]])).logits)
