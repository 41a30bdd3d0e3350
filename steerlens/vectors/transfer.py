"""Vectors across models: within one family as they are, between architectures through a ridge map.

Two models read the same texts; row i of `X` (source) and `Y` (target) is the residual of text i's last token at a layer of each.

    W, b = argmin |Y - X W - b|^2 + alpha |W|^2        alpha by leave-one-out error (scikit-learn's RidgeCV)
    R^2  = 1 - |Y - X W - b|^2 / |Y - mean(Y)|^2       on texts that the map was not fitted on

A mapped vector is fitted on mapped activations, `X W + b` of both sides, so its direction is `W^T` times the source's and its
projections are in the target's units. A good R^2 does not say that the direction survives: much of the variance is about
position and topic. Nor does a mapped vector that works say that the direction crossed over, if the map was fitted on texts with
that very instruction: it has then learned, from the target itself, where such texts lie. Fit the map on texts without the
instruction that it is to carry, and steer beside a random direction of equal norm.

Models with residuals that correspond (a base model and what was fine-tuned from it) need no map: Stolfo et al. (2025) use an
instruct model's vectors in its base model as they are, and search the layer anew.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.linear_model import RidgeCV
from torch import Tensor

from steerlens._typing import WholeNumber, whole, whole_numbers
from steerlens.errors import DataError, SteerlensError
from steerlens.vectors.activations import Activations

ALPHAS = tuple(10.0**power for power in range(-3, 5))
"""Ridge penalties that are tried, in units of the mean variance of the source's residual coordinates times the number of rows."""


SAME = 1e-4
"""Two residuals nearer than this share of the median norm are of one text."""


@dataclass(frozen=True, eq=False)
class RidgeMap:
    """From the residuals of one model to those of another, for each target layer.

    Example:
        >>> fit_ridge_map(acts, acts, layers=[4]).source_layers
        {4: 4}
    """

    source_layers: Mapping[int, int]
    """Target layer -> the source layer it is read from."""
    weights: Mapping[int, Float[Tensor, "d_source d_target"]]
    biases: Mapping[int, Float[Tensor, " d_target"]]
    alphas: Mapping[int, float]
    """The penalty chosen for each target layer, in the units of `ALPHAS`."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of the target's activations: what a mapped vector belongs to."""

    def transform(self, source: Activations) -> Activations:
        """The source's activations in the target's coordinates; fit vectors on them as on any.

        Raises:
            SteerlensError: if a layer that the map reads was not recorded, or has another width.
        """
        parts = []
        for layer, origin in self.source_layers.items():
            resid = _at_layer(source, origin)
            if resid.shape[-1] != self.weights[layer].shape[0]:
                raise SteerlensError(
                    f"the map reads residuals of width {self.weights[layer].shape[0]}, got {resid.shape[-1]}; "
                    "give it activations of its source model"
                )
            parts.append(resid @ self.weights[layer] + self.biases[layer])
        metadata = {**self.metadata, "mapped_from": source.metadata.get("model", "an unnamed model")}
        for key in ("instruction", "n_pairs", "data"):
            if key in source.metadata:
                metadata[key] = source.metadata[key]
        return replace(source, resid=torch.stack(parts, dim=2), layers=tuple(self.source_layers), metadata=metadata)

    def scores(self, source: Activations, target: Activations) -> pd.DataFrame:
        """How well the map fits texts it has not seen: one row per target layer with source_layer, alpha and r2.

        r2 is over all coordinates together, so it weighs them by their variance; 0 is the mean residual, below 0 is worse.
        """
        _same_texts(source, target)
        mapped = self.transform(source)
        rows = []
        for index, (layer, origin) in enumerate(self.source_layers.items()):
            true = _rows(_at_layer(target, layer))
            error = true - _rows(mapped.resid[:, :, index])
            r2 = 1 - (error**2).sum() / ((true - true.mean(0)) ** 2).sum()
            rows.append({"layer": layer, "source_layer": origin, "alpha": self.alphas[layer], "r2": float(r2)})
        return pd.DataFrame(rows)


def fit_ridge_map(
    source: Activations,
    target: Activations,
    *,
    layers: Iterable[WholeNumber] | None = None,
    source_layers: Mapping[WholeNumber, WholeNumber] | None = None,
) -> RidgeMap:
    """The map from one model's residuals to another's, from activations of the same texts in the same order.

    Args:
        layers: Target layers; default all that were recorded.
        source_layers: The source layer for each target layer; default: the one at the same relative depth.

    Returns:
        The map; weights are `[d_source, d_target]` per target layer.

    Raises:
        DataError: if the texts differ.
        SteerlensError: if a layer was not recorded.

    Example:
        >>> mapped = fit_ridge_map(acts, acts, layers=[4]).transform(acts)
        >>> mapped.resid.shape
        torch.Size([8, 2, 1, 160])
    """
    _same_texts(source, target)
    chosen = tuple(target.layers if layers is None else dict.fromkeys(whole_numbers(layers, "layer")))
    if source_layers is None:
        origins = matched_layers(chosen, source, target)
    else:
        origins = {whole(layer, "layer"): whole(origin, "layer") for layer, origin in source_layers.items()}
    if missing := [layer for layer in chosen if layer not in origins]:
        raise SteerlensError(f"source_layers must name a source layer for each target layer, got none for {missing}")
    weights, biases, alphas = {}, {}, {}
    for layer in chosen:
        x, y = _rows(_at_layer(source, origins[layer])), _rows(_at_layer(target, layer))
        # A bare query stands once per instruction: leaving one copy out would leave nothing out.
        once = _distinct(x)
        x, y = x[once], y[once]
        # |X|^2 grows with the rows and with the residuals' units; a penalty in these units is as strong in every model.
        scale = float(x.var(axis=0).mean()) * len(x)
        ridge = RidgeCV(alphas=[alpha * scale for alpha in ALPHAS]).fit(x, y)
        weights[layer] = torch.as_tensor(ridge.coef_.T).float()
        biases[layer] = torch.as_tensor(ridge.intercept_).float()
        alphas[layer] = float(ridge.alpha_) / scale
    return RidgeMap({layer: origins[layer] for layer in chosen}, weights, biases, alphas, target.metadata)


def matched_layers(layers: Sequence[int], source: Activations, target: Activations) -> dict[int, int]:
    """For each target layer the recorded source layer whose share of its model's depth is nearest."""
    depths = [int(one.metadata.get("n_layers", max(one.layers) + 1)) for one in (source, target)]
    return {
        # The output of block l is l + 1 blocks deep.
        layer: min(source.layers, key=lambda one: abs((one + 1) / depths[0] - (layer + 1) / depths[1]))
        for layer in layers
    }


def _distinct(rows: np.ndarray) -> list[int]:
    """The rows that are no copies of an earlier one but for rounding, which is far below the distance of two texts."""
    tensor = torch.as_tensor(rows)
    close = torch.cdist(tensor, tensor) < SAME * tensor.norm(dim=1).median()
    return [place for place in range(len(rows)) if not close[place, :place].any()]


def _at_layer(activations: Activations, layer: int) -> Float[Tensor, "pair side d_model"]:
    if layer not in activations.layers:
        raise SteerlensError(f"layer must be one that was recorded, {list(activations.layers)}, got {layer}")
    return activations.resid[:, :, activations.layers.index(layer)]


def _rows(resid: Float[Tensor, "pair side d_model"]) -> np.ndarray:
    rows: np.ndarray = resid.flatten(0, 1).double().numpy()
    return rows


def _same_texts(source: Activations, target: Activations) -> None:
    if source.prompt_ids != target.prompt_ids:
        raise DataError(
            f"a map needs the same texts in the same order in both models, got {len(source.prompt_ids)} and "
            f"{len(target.prompt_ids)} pairs that differ; record both on one pair set"
        )
