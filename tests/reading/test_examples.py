"""Order, queries and layers of examples, and products of means that a query drawn twice does not inflate."""

import re

import numpy as np
import pytest
import torch

from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import DataError, SteerlensError
from steerlens.reading.examples import (
    examples_of,
    generator,
    mean_products,
    measured,
    queries_of,
    refill,
    resamples,
    shuffled,
)
from steerlens.vectors.activations import Activations
from tests.reading.points import activations, planted, reordered


def test_examples_have_an_order_of_their_own() -> None:
    acts = planted()
    first = examples_of(acts)
    again = examples_of(reordered(acts, np.random.default_rng(0).permutation(len(acts))))
    assert torch.equal(first.resid, again.resid)
    assert first.query_ids == again.query_ids == tuple(f"q{number}" for number in range(8))
    assert [first.instructions[label] for label in first.label] == [again.instructions[label] for label in again.label]


def test_differences_are_those_of_the_layer_asked_for() -> None:
    acts = planted(layers=(2, 5))
    found = examples_of(acts, [5]).of("b:two")
    assert found.differences(5) == pytest.approx(acts.by_instruction()["b:two"].differences[:, 1].numpy(), abs=1e-5)


def test_spellings_of_a_query_are_one_query() -> None:
    pairs = PairSet([InstructionPair("Why?", "Use capitals."), InstructionPair(" why? ", "No commas.")])
    acts = Activations(torch.zeros(2, 2, 1, 4), (0,), ("x", "y"), ("a", "b"), pairs=pairs)
    assert len(set(queries_of(acts))) == 1


def test_what_was_not_recorded_is_refused() -> None:
    acts = planted(layers=(2, 5))
    with pytest.raises(SteerlensError, match=r"layers must be among the recorded \[2, 5\], got \[3\]; record others"):
        examples_of(acts, [2, 3])
    with pytest.raises(SteerlensError, match=r"among the recorded \[2, 5\], got none"):
        examples_of(acts, [])
    with pytest.raises(DataError, match="needs recorded pairs, got activations of none"):
        examples_of(acts[:0])
    broken = planted()
    broken.resid[0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="activations must be finite, got nan or inf"):
        examples_of(broken)


def test_products_of_means_are_plain_where_every_query_counts_once() -> None:
    rows, item = np.random.default_rng(0).normal(size=(12, 5)), np.repeat([0, 1, 2], 4)
    query = np.tile(np.arange(4), 3)
    means = np.stack([rows[item == number].mean(axis=0) for number in range(3)])
    assert mean_products(rows, item, query, np.ones((1, 4)))[0] == pytest.approx(means @ means.T)


def test_products_of_means_weigh_draws_as_written() -> None:
    rng = np.random.default_rng(1)
    first, second, weights = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), np.array([2.0, 0.0, 1.0, 2.0, 0.0])
    rows, item, query = np.concatenate([first, second]), np.repeat([0, 1], 5), np.tile(np.arange(5), 2)
    products = mean_products(rows, item, query, weights[None])[0]
    for i, a in enumerate((first, second)):
        for j, b in enumerate((first, second)):
            others = [(weights[q] * weights[r], a[q] @ b[r]) for q in range(5) for r in range(5) if q != r]
            apart = sum(weight * product for weight, product in others) / sum(weight for weight, _ in others)
            own = weights @ (a * b).sum(axis=1) / 5
            assert products[i, j] == pytest.approx(0.8 * apart + 0.2 * own)


def test_resamples_of_equal_differences_give_their_own_product() -> None:
    rows, query = np.ones((6, 4)), np.arange(6)
    found = mean_products(rows, np.zeros(6, int), query, resamples(6, generator(0, "draws")))
    assert found.ravel() == pytest.approx(np.full(1000, 4.0))


def test_resamples_of_noise_do_not_make_it_look_like_signal() -> None:
    rows, query = np.random.default_rng(3).normal(size=(30, 50)), np.arange(30)
    draws = resamples(30, generator(0, "draws"))
    plain = (rows.mean(axis=0) ** 2).sum()
    found = mean_products(rows, np.zeros(30, int), query, draws).ravel()
    naive = (((draws @ rows) / 30) ** 2).sum(axis=1)
    assert found.mean() == pytest.approx(plain, rel=0.05)
    assert naive.mean() > 1.8 * plain


def test_an_item_that_is_not_drawn_and_a_query_alone_have_no_product() -> None:
    rows, item, query = np.eye(4), np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3])
    found = mean_products(rows, item, query, np.array([[2.0, 2.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0]]))
    assert np.isnan(found[0, 1, 1])
    assert found[0, 0, 0] == pytest.approx(0.25)
    assert np.isnan(found[1]).all()
    assert refill(np.array([1.0]), np.array([1.0]), np.array([1.0])).tolist() == [0.0]


def test_a_missing_number_has_no_interval_and_a_missing_control_is_missing() -> None:
    row = measured(float("nan"), np.arange(3.0), np.array([np.nan, 1.0, 3.0]))
    assert np.isnan([row["value"], row["low"], row["high"]]).all()
    assert row["control"] == 2.0
    assert np.isnan(measured(1.0, np.arange(3.0), np.full(2, np.nan))["control"])


def test_an_interval_is_the_middle_95_percent_and_missing_draws_are_left_out() -> None:
    drawn = np.concatenate([np.arange(1001.0), [np.nan] * 500])
    row = measured(1.0, drawn, 2 * drawn)
    assert [row["low"], row["high"]] == pytest.approx([25, 975])
    assert [row["control"], row["control_low"], row["control_high"]] == pytest.approx([1000, 50, 1950])


def test_draws_depend_on_seed_and_name_alone() -> None:
    first, same, other = (generator(seed, name).normal() for seed, name in ((1, "a"), (1, "a"), (1, "b")))
    assert first == same != other


def test_queries_of_one_instruction_are_numbered_anew() -> None:
    acts = activations(np.ones((3, 1, 2)), ["a:a", "b:b", "b:b"], ["q0", "q1", "q2"])
    part = examples_of(acts).of("b:b")
    assert part.query.tolist() == [0, 1]
    assert part.query_ids == ("q1", "q2")
    assert not re.search("a:a", " ".join(part.instructions))


def test_labels_are_dealt_out_anew_without_taking_queries_apart() -> None:
    query = np.array([2, 0, 1, 0, 2, 1, 3, 4, 5])
    labels = np.array(
        [0, 1, 1, 1, 0, 2, 0, 1, 2]
    )  # 0 and 2 have one label each, 1 has two; 3, 4 and 5 have one pair each
    drawn = np.stack([shuffled(labels, query, generator(0, number)) for number in range(300)])

    def held(row: np.ndarray) -> list[tuple[int, ...]]:
        return [tuple(sorted(row[query == number])) for number in range(6)]

    for row in drawn:
        assert sorted(held(row)[:3]) == [(0, 0), (1, 1), (1, 2)]
        assert sorted(held(row)[3:]) == [(0,), (1,), (2,)]
    assert len({tuple(held(row)[:3]) for row in drawn}) == len({tuple(held(row)[3:]) for row in drawn}) == 6
    assert {tuple(row[query == 1]) for row in drawn} >= {(1, 2), (2, 1)}
    assert labels.tolist() == [0, 1, 1, 1, 0, 2, 0, 1, 2]
