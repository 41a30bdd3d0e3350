"""`MeanDifference` keeps scikit-learn's contract and finds what was planted."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks
from tokenizers import normalizers

from steerlens.data.families import keyword_pairs
from steerlens.data.pairs import PairSet, contrast, pair_set
from steerlens.errors import SteerlensError
from steerlens.steering.sampling import generate
from steerlens.vectors.activations import ActivationMeans, Activations, record_activations
from steerlens.vectors.estimators import MeanDifference, fit_steering_vector, fit_vectors, projection_statistics
from tests.steps import unit

N_PAIRS, LAYERS = 200, (2, 5)


@parametrize_with_checks([MeanDifference()])
def test_mean_difference_is_a_scikit_learn_estimator(estimator: Any, check: Any) -> None:
    check(estimator)


def activations(*, shift: float = 3.0, n_pairs: int = N_PAIRS, seed: int = 0) -> Activations:
    """Noise of width 1 per entry; layer `l` moves by `shift` along `unit(l)` with the instruction."""
    resid = torch.randn(n_pairs, 2, len(LAYERS), 32, generator=torch.Generator().manual_seed(seed))
    for index, layer in enumerate(LAYERS):
        resid[:, 1, index] += shift * unit(layer)
    return Activations(resid, LAYERS, tuple(map(str, range(n_pairs))), ("a:b",) * n_pairs, {"model": "planted"})


def test_a_planted_direction_is_found_at_its_layer() -> None:
    vector = fit_steering_vector(activations(n_pairs=3000))
    for layer in LAYERS:
        assert float(vector.unit(layer) @ unit(layer)) > 0.99
        assert float(vector.directions[layer].norm()) == pytest.approx(3.0, rel=0.05)
        assert vector.proj_with[layer] - vector.proj_without[layer] == pytest.approx(3.0, rel=0.05)
        assert vector.std_with[layer] == pytest.approx(1.0, rel=0.05)
    assert vector.metadata == {"model": "planted", "method": "MeanDifference"}


def test_the_direction_is_the_second_class_minus_the_first() -> None:
    samples = np.array([[0.0, 1.0], [2.0, 1.0], [5.0, 4.0], [7.0, 6.0]])
    fitted = MeanDifference().fit(samples, ["without", "without", "zwith", "zwith"])
    assert fitted.direction_.tolist() == [5.0, 4.0]
    assert list(fitted.classes_) == ["without", "zwith"]
    turned = MeanDifference().fit(samples, [1, 1, 0, 0])
    assert turned.direction_.tolist() == [-5.0, -4.0]


def test_the_threshold_is_half_way_and_predictions_fall_on_its_sides() -> None:
    fitted = MeanDifference().fit([[0.0, 0.0], [0.0, 4.0]], [0, 1])
    assert fitted.threshold_ == 2.0
    assert fitted.transform([[9.0, 3.0]]).tolist() == [[3.0]]
    assert fitted.decision_function([[9.0, 3.0]]).tolist() == [1.0]
    assert fitted.predict([[9.0, 3.0], [9.0, 1.0]]).tolist() == [1, 0]


def test_separability_is_high_along_a_planted_direction_and_chance_without() -> None:
    labels = np.repeat([0, 1], N_PAIRS)

    def accuracy(shift: float) -> float:
        acts = activations(shift=shift)
        samples = torch.cat([acts.resid[:, 0, 0], acts.resid[:, 1, 0]]).numpy()
        return float(cross_val_score(MeanDifference(), samples, labels, cv=5).mean())

    assert accuracy(6.0) > 0.98
    assert 0.35 < accuracy(0.0) < 0.65


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]], ids=["one class", "three classes"])
def test_other_than_two_classes_are_refused(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="class"):
        MeanDifference().fit(np.eye(3), labels)


def test_float32_activations_are_averaged_in_float64() -> None:
    samples = np.random.default_rng(0).normal(1e4, 1.0, size=(40_000, 4)).astype(np.float32)
    labels = np.repeat([0, 1], 20_000)
    low, high = (samples[labels == label].astype(np.float64).mean(axis=0) for label in (0, 1))
    fitted = MeanDifference().fit(samples, labels)
    assert fitted.direction_.dtype == np.float32
    np.testing.assert_allclose(fitted.direction_, high - low, rtol=1e-5)


class MedianDifference(BaseEstimator):
    """An estimator of someone else."""

    def fit(self, X: Any, y: Any) -> "MedianDifference":  # noqa: N803
        self.direction_ = np.median(X[y == 1], axis=0) - np.median(X[y == 0], axis=0)
        return self


def test_any_estimator_with_a_direction_can_be_fitted() -> None:
    acts = activations()
    vector = fit_steering_vector(acts, estimator=MedianDifference())
    samples = acts.resid[:, :, 0].double().numpy()
    expected = np.median(samples[:, 1], axis=0) - np.median(samples[:, 0], axis=0)
    np.testing.assert_allclose(vector.directions[2].numpy(), expected, rtol=1e-5)
    assert vector.metadata["method"] == "MedianDifference"


def means(with_: torch.Tensor, without: torch.Tensor) -> ActivationMeans:
    mean = torch.stack([without, with_])[:, None]
    return ActivationMeans(mean=mean, mean_norm=mean.norm(dim=-1), count=3, layers=(4,))


def test_running_means_refuse_another_estimator() -> None:
    with pytest.raises(ValueError, match="only carry the mean difference; use record_activations"):
        fit_steering_vector(means(unit(0), unit(1)), estimator=MeanDifference())


def test_one_pair_has_no_deviation_and_says_so_by_leaving_it_out() -> None:
    vector = fit_steering_vector(activations(n_pairs=1))
    assert vector.std_with == vector.std_without == {}
    assert set(vector.proj_with) == set(LAYERS)


@pytest.mark.parametrize("kept", [True, False], ids=["examples", "sums"])
def test_a_zero_direction_has_no_projections(kept: bool) -> None:
    acts = activations(n_pairs=3)
    acts.resid[:, 1] = acts.resid[:, 0]
    same = acts.resid[:, 0, 0].mean(0)
    vector = fit_steering_vector(acts if kept else means(same, same))
    layer = vector.layers[0]
    assert not vector.directions[layer].any()
    assert vector.proj_with == vector.proj_without == {}
    assert vector.resid_norm[layer] > 0


def test_statistics_do_not_depend_on_the_directions_length() -> None:
    acts = activations()
    one, three = (
        projection_statistics(acts.resid[:, 0, 0], acts.resid[:, 1, 0], scale * unit(2)) for scale in (1.0, 3.0)
    )
    assert one == pytest.approx(three, rel=1e-6)
    assert one["proj_with"] == pytest.approx(float((acts.resid[:, 1, 0] @ unit(2)).mean()), rel=1e-5)
    assert one["resid_norm"] == pytest.approx(float(acts.resid[:, 0, 0].norm(dim=-1).mean()), rel=1e-6)


def test_a_vector_of_several_instructions_at_once_is_refused() -> None:
    acts = Activations(torch.randn(4, 2, 1, 8), (0,), ("a", "b", "c", "d"), ("x:y", "x:y", "x:z", "x:z"))
    with pytest.raises(SteerlensError, match="a vector is of one instruction, got activations of 2"):
        fit_steering_vector(acts)
    assert set(acts.by_instruction()) == {"x:y", "x:z"}


def test_pairs_without_an_id_fit_a_vector_that_steers(llama):
    pairs = pair_set(["Describe rain.", "Describe snow.", "Describe fog."], "Shout.")
    vector = fit_steering_vector(record_activations(llama.model, pairs))
    assert vector.metadata["instruction"] == "Shout."
    prompts = pairs.prompts("none")
    steered = generate(llama.model, prompts, steering=vector.at(2, operator="add", coeff=8.0), max_new_tokens=4)
    assert [row.text for row in steered] != [row.text for row in generate(llama.model, prompts, max_new_tokens=4)]


def test_a_list_of_contrasts_is_one_instruction(llama):
    pairs = PairSet([contrast("True: A.", "False: A."), contrast("Truly B!", "Falsely B!")])
    assert fit_steering_vector(record_activations(llama.model, pairs)).metadata["instruction"] == "contrast"


LINEAR = [
    LogisticRegression(max_iter=2000),
    LinearDiscriminantAnalysis(),
    LinearSVC(max_iter=20_000),
    Ridge(),
    SVC(kernel="linear"),
]


@pytest.mark.parametrize("estimator", LINEAR, ids=lambda estimator: type(estimator).__name__)
def test_the_coefficients_of_a_linear_model_are_a_direction(estimator: Any) -> None:
    acts = activations(n_pairs=100)
    vector = fit_steering_vector(acts, estimator=estimator)
    samples = torch.cat([acts.resid[:, 0, 1], acts.resid[:, 1, 1]]).double().numpy()
    expected = clone(estimator).fit(samples, np.repeat([0, 1], 100)).coef_
    np.testing.assert_allclose(vector[5].numpy(), np.ravel(expected), rtol=1e-5, atol=1e-7)
    assert float(vector.unit(5) @ unit(5)) > 0.5
    assert vector.proj_with[5] > vector.proj_without[5]
    assert vector.metadata["method"] == type(estimator).__name__


@pytest.mark.parametrize("estimator", [MeanDifference(), LogisticRegression(), MedianDifference()], ids=repr)
def test_the_callers_estimator_is_left_alone(estimator: Any) -> None:
    before = dict(vars(estimator))
    fit_steering_vector(activations(n_pairs=10), estimator=estimator)
    assert vars(estimator) == before


def test_an_estimator_that_is_not_scikit_learns_is_fitted_and_left_alone() -> None:
    class Plain:
        def fit(self, samples: Any, labels: Any) -> None:
            self.direction_ = samples[labels == 1].mean(0) - samples[labels == 0].mean(0)

    acts, plain = activations(n_pairs=10), Plain()
    found = fit_steering_vector(acts, estimator=plain)
    torch.testing.assert_close(found[5], fit_steering_vector(acts)[5])
    assert not vars(plain)


class TwoDirections(BaseEstimator):
    def fit(self, X: Any, y: Any) -> "TwoDirections":  # noqa: N803
        self.direction_ = X[:2]
        return self


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (make_pipeline(StandardScaler(), LogisticRegression()), "must have direction_ .*and Pipeline has neither"),
        (KNeighborsClassifier(), "and KNeighborsClassifier has neither"),
        (SVC(), "and SVC has neither"),
        (TwoDirections(), r"direction_ must hold one number for each of the 32 coordinates, got shape \[2, 32\]"),
        (LogisticRegression, "an estimator must be an object with fit"),
        ("lda", "an estimator must be an object with fit"),
    ],
    ids=str,
)
def test_what_gives_no_direction_is_refused_in_a_sentence(estimator: Any, message: str) -> None:
    with pytest.raises(SteerlensError, match=message):
        fit_steering_vector(activations(n_pairs=10), estimator=estimator)


def test_two_words_make_vectors_of_two_names_also_when_they_are_found_again(llama, tmp_path):
    sets = {word: keyword_pairs(["Describe rain.", "Describe snow."], word) for word in ("tea", "dog")}
    for _ in range(2):
        found = fit_vectors(llama.model, sets, folder=tmp_path)
        assert {word: vector.name for word, vector in found.items()} == {"tea": "tea", "dog": "dog"}
    alone = fit_steering_vector(record_activations(llama.model, sets["tea"]))
    assert alone.name == "keywords:existence tea"


def test_a_vector_is_found_again_only_where_it_would_come_out_the_same(llama, tmp_path):
    sets = {"tea": keyword_pairs(["Describe rain.", "Describe snow.", "Describe a long and winding road."], "tea")}
    first = fit_vectors(llama.model, sets, folder=tmp_path, batch_size=2)["tea"]
    others = ({"batch_size": 3}, {"batch_size": 2, "metadata": {"seed": "1"}})
    for n_files, options in enumerate(others, start=2):
        fit_vectors(llama.model, sets, folder=tmp_path, **options)
        assert len(list(tmp_path.iterdir())) == n_files
    again = fit_vectors(llama.model, sets, folder=tmp_path, batch_size=2)["tea"]
    assert len(list(tmp_path.iterdir())) == 3
    assert all(torch.equal(again[layer], first[layer]) for layer in first.layers)
    assert first.metadata.items() <= again.metadata.items()


def test_a_vector_is_not_found_again_once_its_tokenizer_reads_otherwise(llama, tmp_path):
    sets = {"tea": keyword_pairs(["Describe rain.", "Describe snow."], "tea")}
    fit_vectors(llama.model, sets, folder=tmp_path)
    core = llama.model.tokenizer.backend_tokenizer
    core.normalizer = normalizers.Replace("tea", "ale")
    try:
        fit_vectors(llama.model, sets, folder=tmp_path)
    finally:
        core.normalizer = None
    assert len(list(tmp_path.iterdir())) == 2


def test_an_instructions_own_vector_is_named_as_one_that_is_fitted_alone(llama, tmp_path):
    pairs = keyword_pairs(["Describe rain.", "Describe snow."], "tea")
    alone = fit_steering_vector(record_activations(llama.model, pairs))
    (name,) = pairs.instructions
    for _ in range(2):
        assert fit_vectors(llama.model, {name: pairs}, folder=tmp_path)[name].name == alone.name
