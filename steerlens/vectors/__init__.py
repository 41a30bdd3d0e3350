"""From recorded activations to steering vectors, their algebra, their files, and their transfer."""

from typing import TYPE_CHECKING

from steerlens._lazy import lazy_exports

if TYPE_CHECKING:
    from steerlens.vectors.activations import (
        ActivationMeans as ActivationMeans,
        Activations as Activations,
        record_activations as record_activations,
        record_means as record_means,
    )
    from steerlens.vectors.estimators import (
        MeanDifference as MeanDifference,
        fit_steering_vector as fit_steering_vector,
        fit_vectors as fit_vectors,
    )
    from steerlens.vectors.transfer import RidgeMap as RidgeMap, fit_ridge_map as fit_ridge_map
    from steerlens.vectors.vector import SteeringVector as SteeringVector

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
