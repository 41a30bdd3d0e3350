"""Rows: padding on either side, positions that count tokens, and rows that go on, stop or change places."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steerlens.data.pairs import InstructionPair
from steerlens.errors import DataError, SteerlensError
from steerlens.models.rows import length_sorted_batches, pad, pad_id, pair_rows, token_positions
from tests.conftest import Subject


def test_rows_are_padded_on_the_left_with_a_mask() -> None:
    rows = pad([[5, 6, 7], [8], []], pad_id=2)
    assert rows.tokens.tolist() == [[5, 6, 7], [2, 2, 8], [2, 2, 2]]
    assert rows.mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert rows.tokens.dtype == rows.mask.dtype == torch.long
    assert rows.prompt_lengths == (3, 1, 0)


def test_rows_are_padded_on_the_right_where_that_is_asked_for() -> None:
    rows = pad([[5, 6, 7], [8]], side="right", pad_id=2, prompt_lengths=[2, 1])
    assert rows.tokens.tolist() == [[5, 6, 7], [8, 2, 2]]
    assert rows.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert rows.prompt_lengths == (2, 1)


@pytest.mark.parametrize(
    ("mask", "positions"),
    [
        ([[0, 0, 1, 1], [1, 1, 1, 1]], [[-1, -1, 0, 1], [0, 1, 2, 3]]),
        ([[1, 1, 0, 0], [1, 1, 1, 1]], [[0, 1, -1, -1], [0, 1, 2, 3]]),
        ([[1, 0, 0, 1], [0, 1, 0, 1]], [[0, -1, -1, 1], [-1, 0, -1, 1]]),
    ],
    ids=["left", "right", "gap"],
)
def test_positions_count_tokens_and_padding_is_below_zero(mask: list[list[int]], positions: list[list[int]]) -> None:
    assert token_positions(torch.tensor(mask)).tolist() == positions


@pytest.mark.parametrize(("side", "last"), [("left", [2, 2]), ("right", [2, 0])])
def test_the_last_token_is_found_on_either_side(side: Any, last: list[int]) -> None:
    assert pad([[5, 6, 7], [8]], side=side).last.tolist() == last


@pytest.mark.parametrize(("side", "found"), [("left", "left"), ("right", "right")])
def test_rows_say_where_their_padding_is(side: Any, found: str) -> None:
    assert pad([[5, 6], [8]], side=side).padding == found
    assert pad([[5, 6], [8, 9]], side=side).padding is None
    assert pad([[5, 6], [8], []], side=side).padding == found


def test_rows_that_go_on_count_from_where_they_were_whatever_stands_between() -> None:
    rows = pad([[5, 6, 7], [8]]).then(*(lambda new: (new.tokens, new.mask))(pad([[1], [2, 3]])))
    assert rows.tokens.tolist() == [[0, 1], [2, 3]]
    assert rows.mask.tolist() == [[1, 1, 1, 0, 1], [0, 0, 1, 1, 1]]
    assert rows.positions.tolist() == [[-1, 3], [1, 2]]
    assert rows.lengths.tolist() == [4, 3]
    assert rows.padding == "left"
    assert rows.then(torch.tensor([[4], [4]])).positions.tolist() == [[4], [3]]


def test_chosen_rows_keep_all_that_is_theirs_in_the_new_order() -> None:
    rows = pad([[5, 6, 7], [8], [9, 9]], prompt_lengths=[1, 1, 2], spans={"instruction": [(0, 1), (0, 0), (1, 2)]})
    kept = rows.select(torch.tensor([2, 0]))
    assert kept.tokens.tolist() == [[0, 9, 9], [5, 6, 7]]
    assert kept.mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert kept.prompt_lengths == (2, 1)
    assert kept.spans == {"instruction": ((1, 2), (0, 1))}


@pytest.mark.parametrize(
    ("pad_token", "eos", "expected"), [(7, 3, 7), (None, 3, 3), (None, None, 0), (0, 3, 0), (12, 3, 0)]
)
def test_padding_uses_the_pad_token_or_else_any_id_of_the_vocabulary(pad_token: Any, eos: Any, expected: int) -> None:
    tokenizer = SimpleNamespace(pad_token_id=pad_token, eos_token_id=eos)
    assert pad_id(SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(d_vocab=10))) == expected


def test_batches_hold_every_row_once_longest_first() -> None:
    assert length_sorted_batches([3, 9, 3, 5, 1], 2) == [[1, 3], [0, 2], [4]]
    assert length_sorted_batches([], 4) == []
    with pytest.raises(SteerlensError, match="batch_size must be at least 1, got 0"):
        length_sorted_batches([1], 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_pairs_know_the_tokens_of_their_instructions(tiny: Subject, side: Any) -> None:
    pairs = [
        InstructionPair("Describe rain.", "Use capitals."),
        InstructionPair("Why is rain wet?", "Be brief.", "a:b", prompt="Be brief. Why is rain wet?"),
    ]
    rows = pair_rows(tiny.model, pairs, side=side)
    for row, pair in enumerate(pairs):
        start, stop = rows.spans["instruction"][row]
        inside = (rows.positions[row] >= start) & (rows.positions[row] < stop)
        assert tiny.model.tokenizer.decode(rows.tokens[row][inside]) == pair.instruction


def test_a_pair_whose_instruction_is_woven_into_the_query_has_no_span(llama: Subject) -> None:
    woven = InstructionPair("Describe rain.", "", "a:b", prompt="In capitals, describe rain.")
    with pytest.raises(DataError, match=woven.prompt_id):
        pair_rows(llama.model, [woven])
