"""Position rules as windows, against the plain loop's reading of the same rules."""

import numpy as np
import pytest
import torch

from steerlens.errors import SteerlensError
from steerlens.steering.positions import FOREVER, RULES, Window, as_window
from tests.reference.plain_loop import Rule, is_steered

WINDOWS: list[Rule] = [
    ("start", None, None),
    ("start", 0, 1),
    ("start", 2, None),
    ("start", None, 3),
    ("start", 1, 100),
    ("generation", -1, 0),
    ("generation", -3, None),
    ("generation", -50, -1),
    ("generation", 2, 4),
    ("generation", None, 1),
]


@pytest.mark.parametrize("prompt_length", [1, 2, 5, 9])
@pytest.mark.parametrize("rule", [*RULES, *WINDOWS], ids=str)
def test_a_window_covers_exactly_the_tokens_that_its_rule_names(rule: Rule, prompt_length: int) -> None:
    window = as_window(rule) if isinstance(rule, str) else Window(rule[1], rule[2], rule[0])
    low, high = window.bounds(prompt_length)
    covered = [position for position in range(16) if low <= position < high]
    assert covered == [position for position in range(16) if is_steered(rule, position, prompt_length)]


def test_bounds_are_never_negative_and_open_ends_are_past_any_position() -> None:
    assert Window(-5, -3, "generation").bounds(2) == (0, 0)
    assert Window().bounds(3) == (0, FOREVER)


@pytest.mark.parametrize("name", RULES)
def test_a_named_rule_prints_as_its_name(name: str) -> None:
    assert str(as_window(name)) == name


def test_other_windows_print_their_anchor_and_ends_and_differ() -> None:
    windows = [Window(1, 4), Window(1), Window(None, 4), Window(1, 4, "generation"), Window(-2, 4, "generation")]
    assert len({str(window) for window in windows}) == len(windows)
    assert str(windows[0]) == "start[1:4]"


def test_a_window_stands_for_itself() -> None:
    window = Window(1, 2)
    assert as_window(window) is window


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, None, "start"), 'counts from 0, got .*use anchor="generation"'),
        ((None, -1, "start"), "counts from 0"),
        ((3, 3, "start"), r"start < stop, got \[3, 3\)"),
        ((2, -1, "generation"), "start < stop"),
        ((None, 0, "start"), r"start < stop, got \[0, 0\)"),
        ((0, 0, "start"), r"start < stop, got \[0, 0\)"),
        ((1.5, None, "start"), "start must be a whole number, got 1.5"),
    ],
)
def test_a_window_that_covers_nothing_or_counts_wrongly_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(SteerlensError, match=message):
        Window(*arguments)


def test_an_unknown_rule_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(SteerlensError, match=r"got 'generate'; did you mean 'generated'\?.*all, prompt"):
        as_window("generate")


def test_windows_of_the_same_positions_are_one() -> None:
    assert Window(0) == Window(None, None, "generation") == as_window("all")
    assert Window(0, 4) == Window(None, 4) == as_window("start[0:4]")
    assert Window(np.int64(-2), torch.tensor(3), "generation") == Window(-2, 3, "generation")
