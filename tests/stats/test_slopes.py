"""Slopes, agreement and d', against planted lines and directions, polyfit and scipy."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from steerlens.errors import DataError, SteerlensError
from steerlens.stats.rates import wilson_interval
from steerlens.stats.slopes import agreement, d_prime, pair_cosines, sample_slopes, steerability_summary

COEFFS = np.array([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5])


def curves(slopes: np.ndarray, noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Lines with the given slopes and random offsets, in shuffled order."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(len(slopes), 1)) + slopes[:, None] * COEFFS
    values = values + noise * rng.normal(size=values.shape)
    names = [f"p{number}" for number in range(len(slopes))]
    frame = pd.DataFrame(values, index=pd.Index(names, name="prompt_id"), columns=pd.Index(COEFFS, name="coeff"))
    return frame.stack().rename("propensity").reset_index().sample(frac=1, random_state=seed)


def test_planted_slopes_are_found_with_no_residual() -> None:
    slopes = np.array([2.0, -0.5, 0.0, 11.0])
    table = sample_slopes(curves(slopes)).set_index("prompt_id").loc[[f"p{number}" for number in range(4)]]
    assert list(table["slope"]) == pytest.approx(slopes, abs=1e-12)
    assert list(table["residual"]) == pytest.approx(np.zeros(4), abs=1e-24)
    assert list(table["spearman"])[:2] == pytest.approx([1.0, -1.0])
    assert list(table["n"]) == [7] * 4


def test_noisy_slopes_residuals_and_rank_correlations_agree_with_polyfit_and_scipy() -> None:
    frame = curves(np.linspace(-1, 3, 9), noise=1.0)
    table = sample_slopes(frame)
    assert list(table["prompt_id"]) == list(frame["prompt_id"].unique()), "in the order first seen"
    for row in table.itertuples():
        sample = frame[frame["prompt_id"] == row.prompt_id]
        (slope, _), (residual,), *_ = np.polyfit(sample["coeff"], sample["propensity"], 1, full=True)
        assert row.slope == pytest.approx(slope)
        assert row.residual == pytest.approx(residual)
        assert row.spearman == pytest.approx(stats.spearmanr(sample["coeff"], sample["propensity"]).statistic)


def test_tied_values_share_their_rank() -> None:
    frame = pd.DataFrame({"prompt_id": "a", "coeff": [0.0, 1.0, 2.0, 3.0], "propensity": [1.0, 1.0, 0.0, 4.0]})
    expected = stats.spearmanr(frame["coeff"], frame["propensity"]).statistic
    assert sample_slopes(frame)["spearman"][0] == pytest.approx(expected)


def test_the_slope_of_the_mean_curve_is_the_mean_of_the_slopes() -> None:
    frame = curves(np.linspace(-1, 3, 9), noise=1.0)
    table, summary = sample_slopes(frame), steerability_summary(frame)
    mean_curve = frame.groupby("coeff")["propensity"].mean()
    (slope, _), (residual,), *_ = np.polyfit(mean_curve.index, mean_curve, 1, full=True)
    assert summary.slope == pytest.approx(slope) == pytest.approx(table["slope"].mean())
    assert summary.residual == pytest.approx(residual)
    assert summary.spearman == pytest.approx(stats.spearmanr(mean_curve.index, mean_curve).statistic)
    assert summary.slope_sd == pytest.approx(np.std(table["slope"], ddof=1))


def test_the_anti_steerable_share_counts_negative_slopes_with_its_interval() -> None:
    summary = steerability_summary(curves(np.array([-1.0, -0.1, 0.1, 1.0, 5.0])))
    assert (summary.n, summary.anti_steerable) == (5, 0.4)
    assert (summary.anti_steerable_low, summary.anti_steerable_high) == wilson_interval(2, 5)


@pytest.mark.parametrize("level", [0.1, 0.7, 1 / 3, -2.3, 1e9 / 7])
def test_a_flat_curve_is_never_anti_steerable_and_has_no_rank_correlation(level: float) -> None:
    coeffs = [0.1, 0.2, 0.3, 0.5, 0.6, 0.9, 1.3]  # with some of these levels, rounding would leave a slope of -1e-33
    frame = pd.DataFrame({"prompt_id": "a", "coeff": coeffs, "propensity": level})
    row = sample_slopes(frame).iloc[0]
    assert (row["slope"], row["residual"]) == (0.0, 0.0)
    assert math.isnan(row["spearman"])
    assert steerability_summary(frame).anti_steerable == 0.0
    assert math.isnan(steerability_summary(frame).slope_sd)


def test_other_column_names_and_integer_columns_work_and_the_frame_stays_as_it_was() -> None:
    frame = pd.DataFrame({"item": [1, 1, 2, 2], "scale": [0, 2, 0, 2], "logit": [0, 4, 0, -2]})
    before = frame.copy()
    table = sample_slopes(frame, coeff="scale", value="logit", sample="item")
    assert table[["item", "slope"]].to_numpy().tolist() == [[1, 2.0], [2, -1.0]]
    assert steerability_summary(frame, coeff="scale", value="logit", sample="item").slope == 0.5
    pd.testing.assert_frame_equal(frame, before)


def test_curves_that_cannot_be_fitted_are_refused() -> None:
    frame = curves(np.array([1.0, 2.0]))
    with pytest.raises(DataError, match="missing: propensity"):
        sample_slopes(frame.drop(columns="propensity"))
    with pytest.raises(DataError, match="at least one sample"):
        sample_slopes(frame.head(0))
    for bad in (np.nan, np.inf):
        with pytest.raises(DataError, match=f"every row needs a finite propensity, got .*{bad}"):
            sample_slopes(frame.assign(propensity=bad))
    with pytest.raises(DataError, match=r"one value per coefficient, got prompt_id 'p\d' twice at"):
        sample_slopes(pd.concat([frame, frame.head(1)]))
    with pytest.raises(DataError, match="a slope needs two coefficients, got one for prompt_id"):
        sample_slopes(frame[frame["coeff"] == 0.5])


def test_a_mean_curve_of_different_samples_at_different_coefficients_is_refused() -> None:
    frame = curves(np.array([1.0, 2.0]))
    partial = frame[(frame["prompt_id"] == "p0") | (frame["coeff"] != 0.5)]
    assert list(sample_slopes(partial)["n"].sort_values()) == [6, 7]
    with pytest.raises(DataError, match=r"every sample needs every coefficient, got 1 of 2 samples at 0\.5"):
        steerability_summary(partial)


# Agreement


def test_agreement_is_one_on_a_planted_direction_and_zero_between_orthogonal_pairs() -> None:
    direction = np.random.default_rng(0).normal(size=16)
    lengths = np.array([0.1, 1.0, 40.0])
    assert agreement(np.outer(lengths, direction)) == pytest.approx(1.0)
    assert agreement(np.eye(5)) == pytest.approx(1 / math.sqrt(5))
    assert agreement(np.eye(5), leave_one_out=True) == pytest.approx(0.0)


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_cosines_agree_with_a_loop_over_pairs(leave_one_out: bool, dtype: type) -> None:
    differences = (np.random.default_rng(1).normal(size=(7, 12)) + 0.5).astype(dtype)
    cosines = pair_cosines(differences, leave_one_out=leave_one_out)
    for number, row in enumerate(differences.astype(float)):
        others = np.delete(differences, number, axis=0) if leave_one_out else differences
        mean = others.astype(float).mean(axis=0)
        assert cosines[number] == pytest.approx(row @ mean / (np.linalg.norm(row) * np.linalg.norm(mean)))
    assert agreement(differences, leave_one_out=leave_one_out) == pytest.approx(cosines.mean())


def test_noise_agrees_with_itself_and_not_with_the_others() -> None:
    noise = np.random.default_rng(2).normal(size=(25, 4000))
    assert agreement(noise) == pytest.approx(1 / math.sqrt(25), abs=0.01)
    assert agreement(noise, leave_one_out=True) == pytest.approx(0.0, abs=0.01)


def test_one_pair_agrees_with_itself_and_has_no_others() -> None:
    one = np.array([[3.0, 4.0]])
    assert agreement(one) == 1.0
    with pytest.raises(SteerlensError, match="needs 2 pairs or more, got 1"):
        agreement(one, leave_one_out=True)
    with pytest.raises(SteerlensError, match="needs 1 pairs or more, got 0"):
        agreement(np.zeros((0, 2)))


def test_differences_without_a_direction_are_refused() -> None:
    with pytest.raises(SteerlensError, match="got 1 of 2 that are zero"):
        agreement(np.array([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(SteerlensError, match="the pairs cancel"):
        agreement(np.array([[0.1, 0.2], [0.2, 0.1], [-0.3, -0.3]]))
    with pytest.raises(SteerlensError, match="finite"):
        agreement(np.array([[1.0, np.nan]]))


# d'


def test_d_prime_of_planted_distributions_is_their_distance_in_standard_deviations() -> None:
    rng = np.random.default_rng(0)
    far, near = rng.normal(5.0, 3.0, size=40_000), rng.normal(2.0, 1.0, size=50_000)
    assert d_prime(far, near) == pytest.approx(3 / math.sqrt((9 + 1) / 2), abs=0.03)
    # For normal projections of equal spread, the chance that a random pair is in order is Phi(d' / sqrt 2).
    wide = rng.normal(5.0, 1.0, size=20_000)
    in_order = stats.mannwhitneyu(wide, near).statistic / (len(wide) * len(near))
    assert stats.norm.cdf(d_prime(wide, near) / math.sqrt(2)) == pytest.approx(in_order, abs=0.005)


def test_d_prime_has_unbiased_variances_and_a_sign_and_no_unit() -> None:
    with_, without = np.array([3.0, 5.0, 7.0]), np.array([-1.0, 1.0, 3.0])
    assert d_prime(with_, without) == pytest.approx(4 / 2)
    assert d_prime(without, with_) == pytest.approx(-2)
    assert d_prime(10 * with_ + 7, 10 * without + 7) == pytest.approx(2)
    assert d_prime(with_, np.array([1.0, 1.0])) == pytest.approx(4 / math.sqrt(2)), "the mean of variances 4 and 0"


def test_d_prime_without_spread_is_missing_and_of_nan_is_refused() -> None:
    assert math.isnan(d_prime(np.array([1.0]), np.array([0.0, 2.0])))
    assert math.isnan(d_prime(np.array([0.1, 0.1, 0.1]), np.array([0.7, 0.7, 0.7])))
    with pytest.raises(SteerlensError, match="finite"):
        d_prime(np.array([1.0, np.nan]), np.array([0.0, 2.0]))
