"""Copying, measured: on the base model, whose training had every second row of this kind."""

import pytest
import tiny_copying as tcp
from tiny_copies import VERBATIM

import steerlens as sl
from tests.conftest import LOADED


@pytest.fixture(scope="module")
def base() -> object:
    model = sl.load_model("tiny-base", progress=False)
    LOADED.append(model)
    return model


def test_repetitions_are_predicted_from_what_came_before_and_not_without_it(base: object) -> None:
    found = tcp.accuracy(base, 60)
    rates = found.loc[found["kind"].isin(VERBATIM), ["copied", "alone"]].mean()
    assert rates["copied"] > 0.95  # what a training with instructions starts from
    assert rates["alone"] < 0.5


def test_a_few_heads_attend_to_the_token_after_the_last_time_and_copying_needs_them(base: object) -> None:
    lists = tcp.word_lists(base, 12)
    scores = tcp.induction_scores(base, lists)
    assert scores.shape == (8, 5)
    assert scores.to_numpy().max() > 0.5
    without = tcp.ablated(base, lists[:6], scores, 6).pivot_table(index="n", columns="heads", values="accuracy")
    assert without.loc[0].nunique() == 1
    assert without.loc[6, "induction heads"] < without.loc[6, "other heads"] - 0.2
