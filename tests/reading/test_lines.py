"""A planted line is found, in whichever direction; shuffled numbers and noise are not."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.decomposition import PCA

from steerlens.errors import DataError, SteerlensError
from steerlens.reading.lines import _measures, _plane, line
from steerlens.vectors.activations import Activations
from tests.reading.points import activations, reordered

NUMBERS = {"length:short": 1, "length:medium": 2, "length:long": 4, "length:longest": 8}


def along(positions: list[float], *, noise: float = 1.0, n_queries: int = 10, bend: float = 0.0) -> Activations:
    """Instruction i moves every query along one axis to `positions[i]`, and along another by the square of it."""
    names = [name for name in NUMBERS for _ in range(n_queries)]
    rng = np.random.default_rng(0)
    x = np.repeat(positions, n_queries)
    planes = np.stack([x, bend * x**2], axis=1) @ np.eye(2, 20)
    differences = (3 + planes + noise * rng.normal(size=(len(names), 20)))[:, None]
    return activations(differences, names, [f"q{i}" for i in range(n_queries)] * 4, layers=(7,))


def measures(acts: Activations, values: object = NUMBERS) -> pd.DataFrame:
    return line(acts, values).table.set_index("measure")  # type: ignore[arg-type]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_line_is_found_in_either_direction(sign: int) -> None:
    found = measures(along([sign * value for value in (-9.0, -3.0, 3.0, 9.0)]))
    assert found.loc["spearman", ["value", "low", "high"]].tolist() == [1, 1, 1]
    assert found.loc["share", "low"] > 0.95
    assert found.loc["share", "control_high"] < 0.95
    assert found.loc["spearman", "control"] < 0.8


def test_noise_is_within_the_control() -> None:
    found = measures(along([0.0] * 4))
    assert (found["control_low"] <= found["value"]).all()
    assert (found["value"] <= found["control_high"]).all()


def test_what_tells_queries_apart_does_not_hide_a_line() -> None:
    """Every query has all numbers, so that its own axis, longer than the line, moves all means alike."""
    acts = along([-4.0, -1.5, 1.5, 4.0], n_queries=12)
    own = 20 * np.random.default_rng(1).normal(size=12)
    acts.resid[:, 1, 0, 5] += torch.tensor(np.tile(own, 4)).float()
    found = measures(acts)
    assert found.loc["share", "value"] > found.loc["share", "control_high"]


def test_a_line_in_another_order_is_a_line_but_not_of_the_numbers() -> None:
    found = measures(along([3.0, -9.0, 9.0, -3.0]))
    assert found.loc["share", "value"] > 0.95
    assert found.loc["spearman", "value"] < 0.5


def test_measures_equal_pca_and_rank_correlation_of_the_means() -> None:
    acts = along([-2.0, 0.0, 1.0, 2.0], bend=0.5)
    means = np.stack([part.differences[:, 0].mean(dim=0).numpy() for part in acts.by_instruction().values()])
    fitted = PCA().fit(means)
    expected = abs(spearmanr(fitted.transform(means)[:, 0], list(NUMBERS.values())).statistic)
    found = measures(acts)
    assert found.loc["share", "value"] == pytest.approx(fitted.explained_variance_ratio_[0], rel=1e-4)
    assert found.loc["spearman", "value"] == pytest.approx(expected)
    assert found.loc["share", "low"] < found.loc["share", "value"] < found.loc["share", "high"]


def test_numbers_may_be_given_for_every_pair_where_one_instruction_has_several() -> None:
    acts = along([-9.0, -3.0, 3.0, 9.0])
    numbers = [NUMBERS[name] for name in acts.instructions]
    same = Activations(acts.resid, acts.layers, acts.prompt_ids, ("a:b",) * len(acts))
    pd.testing.assert_frame_equal(line(same, numbers).table, line(acts, NUMBERS).table)
    pd.testing.assert_frame_equal(line(acts, np.array(numbers)).table, line(acts, NUMBERS).table)


def test_another_order_of_the_pairs_changes_nothing() -> None:
    acts = along([-2.0, 0.0, 1.0, 2.0])
    other = reordered(acts, np.random.default_rng(0).permutation(len(acts)))
    assert measures(other).drop(columns="layer").to_numpy() == pytest.approx(
        measures(acts).drop(columns="layer").to_numpy()
    )


def test_rank_correlation_has_no_sign_whatever_sign_a_component_comes_with() -> None:
    rng = np.random.default_rng(0)
    for means in rng.normal(size=(20, 5, 8)):
        found = _measures((means @ means.T)[None], np.arange(5.0))["spearman"][0]
        along = PCA(1).fit_transform(means)[:, 0]
        assert found == pytest.approx(abs(spearmanr(along, np.arange(5)).statistic))
        centre, plane = _plane(means, np.arange(5.0))
        assert spearmanr((means - centre) @ plane[:, 0], np.arange(5)).statistic == pytest.approx(found)


def test_points_lie_in_the_plane_of_the_means_and_grow_with_the_number() -> None:
    acts = along([9.0, 3.0, -3.0, -9.0], bend=0.1)
    points = line(acts, NUMBERS).points
    assert points.groupby("number")["x"].mean().to_numpy() == pytest.approx([-9, -3, 3, 9], abs=1.5)
    assert points["prompt_id"].tolist() == list(acts.prompt_ids)


def test_the_second_component_keeps_its_side_from_layer_to_layer() -> None:
    """From layer to layer it turns by 15 degrees, half a turn in all, which its sign at one layer cannot know."""
    first, arch, wave = (
        9 * np.array([[-2.0, -1, 0, 1, 2]]),
        np.array([2.0, -1, -2, -1, 2]),
        np.array([-1.0, 2, 0, -2, 1]),
    )
    angles = np.linspace(0, np.pi, 13)[:, None]
    second = 5 * (np.cos(angles) * arch / 14**0.5 + np.sin(angles) * wave / 10**0.5)
    planes = np.stack([np.broadcast_to(first, second.shape), second], axis=2) @ np.eye(2, 6)  # layer number d_model
    acts = activations(planes.swapaxes(0, 1), list("abcde"), ["q"] * 5)
    points = line(acts, range(5)).points.pivot_table(index="number", columns="layer", values="y").corr().to_numpy()
    assert (np.diagonal(points, offset=1) > 0.9).all()
    assert points[0, -1] == pytest.approx(-1, abs=1e-4)


def test_means_that_do_not_differ_have_no_line() -> None:
    found = measures(along([0.0] * 4, noise=0.0))
    assert found[["value", "low", "high", "control"]].isna().all(axis=None)


@pytest.mark.parametrize("n_queries", [1, 4])
def test_of_few_queries_there_is_no_interval(n_queries: int) -> None:
    found = measures(along([-9.0, -3.0, 3.0, 9.0], n_queries=n_queries))
    assert found.loc["spearman", "value"] == 1
    assert found[["low", "high"]].isna().all(axis=None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {**NUMBERS, "length:longest": 4, "length:medium": 1},
            "needs instructions with at least three numbers, got 1, 4; two",
        ),
        ({"length:short": 1}, "every instruction needs a number, got none for 'length:medium'"),
        ({**NUMBERS, "length:long": float("nan")}, "the number of 'length:long' must be a finite number"),
        ([1, 2, 3], "every pair needs a number, got 3 for 40 pairs; give one per pair, or a mapping"),
    ],
)
def test_numbers_that_make_no_line_are_refused(values: object, message: str) -> None:
    with pytest.raises(SteerlensError, match=message):
        measures(along([0.0] * 4), values)


def test_one_instruction_and_a_layer_that_was_not_recorded_are_refused() -> None:
    acts = along([0.0] * 4)
    with pytest.raises(DataError, match="at least three numbers, got 1"):
        line(acts.by_instruction()["length:short"], NUMBERS)
    with pytest.raises(SteerlensError, match=r"among the recorded \[7\], got \[2\]"):
        line(acts, NUMBERS, layers=2)


def test_pictures_show_the_plane_and_the_layers() -> None:
    found = line(along([-9.0, -3.0, 3.0, 9.0]), NUMBERS)
    assert "rank correlation with the number 1 [1, 1], shuffled" in found.plot().layout.title.subtitle.text
    assert found.plot_layers().layout.annotations[0].text == "<b>rank correlation</b>"
