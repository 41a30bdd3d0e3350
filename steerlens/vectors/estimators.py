"""Estimators: from activations to a direction.

`MeanDifference` is the paper's estimator in scikit-learn's clothes: `direction_ = mean(X | y = 1) - mean(X | y = 0)`. It also
classifies, by the side of the midpoint on which a projection falls, so that `cross_val_score` says how separable two sets of
activations are along that direction. `fit_steering_vector` runs an estimator at every layer of recorded activations.

Activations can be separable along a direction that steers nothing: a classifier's direction separates best, and the model need
not read it. Only generation beside the controls says whether a direction acts.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin, clone
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from tqdm import tqdm

from steerlens.data.pairs import PairSet
from steerlens.errors import SteerlensError
from steerlens.files import content_key, file_name, user_path
from steerlens.models.facts import model_digest
from steerlens.models.prompts import PromptFormat, encode_all, pinned, template_digest
from steerlens.vectors.activations import ActivationMeans, Activations, record_activations
from steerlens.vectors.formats import PROJECTIONS
from steerlens.vectors.vector import SteeringVector

ArrayLike = Any
"""Anything may come in: scikit-learn's validation refuses what is no array, in the words its conventions ask for."""


class MeanDifference(ClassifierMixin, TransformerMixin, BaseEstimator):
    """The difference of two class means, as a direction and as a classifier.

    Attributes:
        direction_: `mean(X | second class) - mean(X | first class)`, shape `[n_features]`, not normalised.
        threshold_: The projection half-way between the class means.
        classes_: The two labels, sorted.

    Example:
        >>> import numpy as np
        >>> MeanDifference().fit(np.array([[0.0, 0.0], [0.0, 2.0]]), [0, 1]).direction_
        array([0., 2.])
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> "MeanDifference":  # noqa: N803 (scikit-learn's name)
        """Fit on activations `[n_samples, n_features]` and two labels.

        Raises:
            ValueError: if there are not exactly two classes.
        """
        samples, labels = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(labels)
        kind = type_of_target(labels, input_name="y")
        self.classes_ = np.unique(labels)
        if kind != "binary":  # in the words that scikit-learn's check_classifier_not_supporting_multiclass asks for
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
        if len(self.classes_) < 2:
            raise ValueError(f"MeanDifference needs two classes, got one class, {self.classes_[0]!r}")
        low, high = (samples[labels == label].mean(axis=0, dtype=np.float64) for label in self.classes_)
        self.direction_ = (high - low).astype(samples.dtype)
        norm = np.linalg.norm(high - low)
        self._unit = (high - low) / norm if norm > 0 else high - low
        self.threshold_ = float(self._unit @ (low + high) / 2)
        return self

    def transform(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """Projections on the unit direction, `[n_samples, 1]`, in the units of X."""
        check_is_fitted(self)
        samples = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        projection: NDArray[Any] = samples @ self._unit
        return projection[:, None]

    def decision_function(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """Projections counted from the midpoint of the class means, `[n_samples]`."""
        distance: NDArray[Any] = self.transform(X)[:, 0] - self.threshold_
        return distance

    def predict(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """The class on whose side of the midpoint each sample falls, `[n_samples]`."""
        side = self.decision_function(X) > 0
        labels: NDArray[Any] = self.classes_[side.astype(int)]
        return labels

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False  # its conformance suite then tests that three classes are refused
        return tags


def fit_steering_vector(activations: Activations | ActivationMeans, *, estimator: Any | None = None) -> SteeringVector:
    """One direction per layer, with projection means and deviations on both sides.

    Args:
        activations: Kept examples, or running means (then only the mean difference can be fitted, and deviations are unknown).
        estimator: What has `direction_` after `fit(X, y)`, or the `coef_` of a linear model of two classes, such as
            `LogisticRegression()`, `LinearDiscriminantAnalysis()` or `LinearSVC()`; a fresh copy is fitted at each layer.
            Default `MeanDifference()`.

    Returns:
        Directions not normalised, `[d_model]` per layer, as long as the estimator made them; projections along the unit
        direction, in absolute units.

    Raises:
        SteerlensError: if the activations are of several instructions, an estimator is asked of running means, or it gives
            no direction.

    Example:
        >>> fit_steering_vector(acts).directions[4].shape
        torch.Size([160])
    """
    if isinstance(activations, ActivationMeans):
        if estimator is not None:
            raise SteerlensError(
                "running means only carry the mean difference; use record_activations for another estimator"
            )
        return _from_means(activations)
    if len(set(activations.instructions)) > 1:
        raise SteerlensError(
            f"a vector is of one instruction, got activations of {len(set(activations.instructions))}; "
            "fit each part of activations.by_instruction()"
        )
    estimator = MeanDifference() if estimator is None else estimator
    n_pairs = activations.resid.shape[0]
    labels = np.repeat([0, 1], n_pairs)
    fields: dict[str, dict[int, Any]] = {name: {} for name in ("directions", *PROJECTIONS)}
    for index, layer in enumerate(activations.layers):
        without, with_ = activations.resid[:, 0, index], activations.resid[:, 1, index]
        samples = torch.cat([without, with_]).double().numpy()
        direction = torch.as_tensor(_direction(_fitted(estimator, samples, labels), samples.shape[1])).float()
        fields["directions"][layer] = direction
        for name, value in projection_statistics(without, with_, direction).items():
            fields[name][layer] = value
    return SteeringVector(**fields, metadata={**activations.metadata, "method": type(estimator).__name__})


def _fitted(estimator: Any, samples: NDArray[Any], labels: NDArray[Any]) -> Any:
    """A fitted copy; the caller's estimator is left alone.

    Raises:
        SteerlensError: for what is no estimator.
    """
    if isinstance(estimator, type) or not hasattr(estimator, "fit"):
        raise SteerlensError(
            f"an estimator must be an object with fit(X, y), got {estimator!r}; make one, such as LinearSVC()"
        )
    copy = clone(estimator, safe=False)  # what has fit, but not scikit-learn's get_params, is copied whole
    copy.fit(samples, labels)
    return copy


def _direction(fitted: Any, width: int) -> NDArray[Any]:
    """The direction of a fitted estimator, `[d_model]`: its `direction_`, or the coefficients of a linear model of two classes.

    Raises:
        SteerlensError: if it has neither, or not one number per coordinate.
    """
    name = next((name for name in ("direction_", "coef_") if hasattr(fitted, name)), None)
    if name is None:
        raise SteerlensError(
            f"an estimator must have direction_ or a linear model's coef_ after fit, and {type(fitted).__name__} has neither; "
            "a pipeline's last step reads scaled activations, so give an estimator that reads the residuals themselves"
        )
    value = np.array(getattr(fitted, name), dtype=np.float64)  # a copy: some are read-only
    if value.shape not in ((width,), (1, width)):
        raise SteerlensError(
            f"{name} must hold one number for each of the {width} coordinates, got shape {list(value.shape)} "
            f"of {type(fitted).__name__}"
        )
    return value.reshape(width)


def fit_vectors(
    model: Any,
    sets: Mapping[str, PairSet],
    *,
    folder: str | Path | None = None,
    metadata: Mapping[str, str] | None = None,
    batch_size: int = 32,
    prompt_format: PromptFormat = PromptFormat(),
    progress: bool = False,
) -> dict[str, SteeringVector]:
    """One mean-difference vector per named set of pairs; those that the folder holds already are read from there.

    A file's name ends in a hash of the model's weights, the prompt format, the batch size (another batch rounds differently), the
    metadata and the pairs, so a vector is found again exactly when it would come out the same, under whatever name. Each set is
    recorded on its own: a vector does not depend on the others.

    Args:
        sets: Name -> pairs, as `PairSet.by_instruction` gives them.
        folder: Where vectors are kept; None fits all anew.
        metadata: What each vector's metadata says besides.
        batch_size: Pairs per batch.

    Returns:
        Name -> vector, in the order of the sets.

    Raises:
        DataError: for an empty set, or a pair without a base query.

    Example:
        >>> list(fit_vectors(model, {word: sl.keyword_pairs(queries, word) for word in ("harbor", "tree")}))
        ['harbor', 'tree']
    """
    prompt_format, about = pinned(model, prompt_format), dict(metadata or {})
    template = template_digest(model, prompt_format)
    settings = [model_digest(model), str(model.cfg.dtype), template, batch_size, about]
    found: dict[str, SteeringVector] = {}
    for name, pairs in tqdm(sets.items(), desc="fit", unit="vector", disable=not progress):
        # The tokens, too: a tokenizer may be changed, and the template's digest only sees what stands around a prompt.
        fed = [encode_all(model, pairs.prompts(condition), prompt_format) for condition in ("none", "text")]
        ending = f"-{content_key([*settings, pairs.content_hash, fed])}.safetensors"
        path = None if folder is None else user_path(folder) / file_name(name, ending)
        kept = [] if path is None else sorted(path.parent.glob(f"*{ending}"))
        if kept:
            found[name] = _named(SteeringVector.load(kept[0]), name)
            continue
        activations = record_activations(model, pairs, batch_size=batch_size, prompt_format=prompt_format)
        # A set is one instruction here, also where its pairs differ in their ids.
        vector = fit_steering_vector(replace(activations, instructions=(name,) * len(pairs))).with_metadata(**about)
        found[name] = _named(vector, name)
        if path is not None:
            found[name].save(path)
    return found


def _named(vector: SteeringVector, name: str) -> SteeringVector:
    """The vector under a set's name; an instruction's own vector is named as one that is fitted alone, with its arguments."""
    return vector if name == vector.metadata.get("instruction") else vector.with_metadata(name=name)


def projection_statistics(
    without: Float[Tensor, "pair d_model"],
    with_: Float[Tensor, "pair d_model"],
    direction: Float[Tensor, " d_model"],
) -> dict[str, float]:
    """Means and deviations of projections on the unit direction, and the mean residual norm without the instruction.

    A deviation needs two pairs; with one it is left out, not zero. So is every projection on a zero direction.
    """
    statistics = {"resid_norm": without.double().norm(dim=-1).mean().item()}
    norm = direction.double().norm()
    if norm == 0:
        return statistics
    for side, resid in (("without", without), ("with", with_)):
        projection = resid.double() @ (direction.double() / norm)
        statistics[f"proj_{side}"] = projection.mean().item()
        if len(projection) > 1:
            statistics[f"std_{side}"] = projection.std().item()
    return statistics


def _from_means(means: ActivationMeans) -> SteeringVector:
    without, with_ = means.mean
    directions = dict(zip(means.layers, with_ - without, strict=True))
    # As for kept examples, a zero direction has no projections.
    units = {
        layer: direction.double() / direction.double().norm()
        for layer, direction in directions.items()
        if direction.any()
    }
    return SteeringVector(
        directions=directions,
        proj_with={
            layer: float(with_[i].double() @ units[layer]) for i, layer in enumerate(means.layers) if layer in units
        },
        proj_without={
            layer: float(without[i].double() @ units[layer]) for i, layer in enumerate(means.layers) if layer in units
        },
        resid_norm={layer: float(means.mean_norm[0, i]) for i, layer in enumerate(means.layers)},
        metadata={**means.metadata, "method": "MeanDifference"},
    )
