"""Steering vectors: one direction per layer, with what is needed to apply it and to know where it came from.

For a layer, `direction` is the mean difference of residuals with and without the instruction (not normalised), `u` its unit
vector, and `proj_with`, `proj_without` the means of `h.u` over the prompts on each side: `proj_with` is the target `z` of the
paper's format steering. A vector is a value: `a + b`, `a - b`, `2 * a`, saved to one safetensors file, never changed in place.
It is valid only in the coordinates of the model it was fitted in, and its metadata says which.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steerlens._typing import Operator
from steerlens.errors import ModelError, SteerlensError
from steerlens.files import atomic_path
from steerlens.models.facts import check_layer, check_origin, resid_post
from steerlens.steering.plan import Intervention, Plan
from steerlens.steering.positions import Window

FORMAT_VERSION = "1"


PROJECTIONS = ("proj_with", "proj_without", "std_with", "std_without", "resid_norm")


NAN = float("nan")


@runtime_checkable
class Choice(Protocol):
    """Where and how strongly to steer; a search returns these. `layer` None means that no steering was best."""

    @property
    def layer(self) -> int | None: ...
    @property
    def coeff(self) -> float: ...
    @property
    def operator(self) -> Operator: ...
    @property
    def positions(self) -> str | Window: ...
    @property
    def unit(self) -> str: ...


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """Directions per layer, with projections along each direction's unit vector."""

    directions: Mapping[int, Float[Tensor, " d_model"]]
    """Layer -> direction, not normalised; float32 on the CPU."""
    proj_with: Mapping[int, float] = field(default_factory=dict)
    """Layer -> mean of `h.u` over prompts with the instruction."""
    proj_without: Mapping[int, float] = field(default_factory=dict)
    """Layer -> mean of `h.u` over prompts without it."""
    std_with: Mapping[int, float] = field(default_factory=dict)
    """Layer -> standard deviation of `h.u` with the instruction (n - 1); nan where only sums were kept."""
    std_without: Mapping[int, float] = field(default_factory=dict)
    """Layer -> the same without the instruction."""
    resid_norm: Mapping[int, float] = field(default_factory=dict)
    """Layer -> mean norm of the residual without the instruction, the unit for relative coefficients."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Model, data and method; all strings."""

    def __post_init__(self) -> None:
        if not self.directions:
            raise SteerlensError("a steering vector needs at least one layer, got none")
        clean = {}
        for layer, direction in sorted(self.directions.items()):
            tensor = direction.detach().to("cpu", torch.float32, copy=True)
            if not torch.isfinite(tensor).all():
                raise SteerlensError(
                    f"directions must be finite, got nan or infinity at layer {layer}; was the model in float16?"
                )
            clean[int(layer)] = tensor
        widths = {tuple(direction.shape) for direction in clean.values()}
        if len(widths) > 1:
            raise SteerlensError(f"every layer's direction must have the same width, got shapes {sorted(widths)}")
        object.__setattr__(self, "directions", clean)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.directions)

    @property
    def d_model(self) -> int:
        return next(iter(self.directions.values())).shape[0]

    def unit(self, layer: int) -> Float[Tensor, " d_model"]:
        """The unit direction of a layer.

        Raises:
            SteerlensError: if the vector has no such layer, or its direction there is zero.
        """
        if layer not in self.directions:
            raise SteerlensError(
                f"layer must be one of the vector's {list(self.layers)}, got {layer}; layers count from zero"
            )
        norm = self.directions[layer].norm()
        if norm == 0:
            raise SteerlensError(
                f"the direction at layer {layer} is zero, so it cannot steer; were both sides the same prompts?"
            )
        unit: Tensor = self.directions[layer] / norm
        return unit

    def at(
        self,
        layer: SupportsIndex | Sequence[int] | Choice,
        *,
        coeff: float | None = None,
        operator: Operator | None = None,
        positions: str | Window | None = None,
        target: float | None = None,
        unit: str | None = None,
    ) -> Plan:
        """The plan that applies this vector.

        Args:
            layer: One layer, several, or what a search returned: then the rest is its choice, too, unless given.
            coeff: `add`: the step along the unit direction, which must be given; others: the share of the full change,
                by default 1.
            operator: Default "set_projection", the paper's format steering.
            positions: A position rule; default "all", as in the paper.
            target: `set_projection`: the projection to reach. Default: the mean with the instruction.
            unit: "absolute", or "resid_norm" to give an `add` coefficient in units of the layer's mean residual norm.

        Raises:
            SteerlensError: if the layer is not in the vector, or what the operator needs is not known.
        """
        if isinstance(layer, Choice):
            layers = [] if layer.layer is None else [layer.layer]
            coeff = layer.coeff if coeff is None else coeff
            operator = operator or layer.operator
            positions = positions or layer.positions
            unit = unit or layer.unit
        else:
            layers = [index(one) for one in (layer if isinstance(layer, Sequence) else [layer])]
        operator = operator or "set_projection"
        if coeff is None and operator == "add":
            raise SteerlensError('operator="add" needs coeff, the length of the step; see also unit="resid_norm"')
        coeff = 1.0 if coeff is None else coeff
        positions, unit = positions or "all", unit or "absolute"
        return Plan(tuple(self._intervention(one, coeff, operator, positions, target, unit) for one in layers))

    def _intervention(
        self,
        layer: int,
        coeff: float,
        operator: Operator,
        positions: str | Window,
        target: float | None,
        unit: str,
    ) -> Intervention:
        direction = self.unit(layer)
        norm = self.resid_norm.get(layer, NAN)
        if unit not in ("absolute", "resid_norm"):
            raise SteerlensError(f'unit must be "absolute" or "resid_norm", got {unit!r}')
        if unit == "resid_norm":
            if operator != "add":
                raise SteerlensError(
                    f'unit="resid_norm" scales the step of operator="add"; {operator!r} takes a share, without unit'
                )
            if norm != norm:
                raise SteerlensError(
                    f'unit="resid_norm" needs the mean residual norm of layer {layer}, and this vector has none'
                )
            coeff = coeff * norm
        if operator == "set_projection" and target is None:
            target = self.proj_with.get(layer, NAN)
        return Intervention(
            layer=layer,
            direction=direction,
            operator=operator,
            coeff=coeff,
            target=0.0 if target is None else target,
            positions=positions,
            resid_norm=norm,
            origin=self.origin,
        )

    def cosine(self, other: "SteeringVector") -> dict[int, float]:
        """Cosine similarity per shared layer."""
        shared = self._shared_layers(other)
        return {layer: float(self.unit(layer) @ other.unit(layer)) for layer in shared}

    def _shared_layers(self, other: "SteeringVector") -> list[int]:
        if self.d_model != other.d_model:
            raise SteerlensError(
                f"vectors must have one width, got {self.d_model} and {other.d_model}; are they of different models?"
            )
        for key in ("n_layers", "frame"):
            mine, theirs = self.metadata.get(key), other.metadata.get(key)
            if mine and theirs and mine != theirs:
                raise SteerlensError(
                    f"vectors must be of models with one {key}, got {mine} and {theirs}; fit them in one model"
                )
        shared = [layer for layer in self.layers if layer in other.directions]
        if not shared:
            raise SteerlensError(f"vectors must share a layer, got {list(self.layers)} and {list(other.layers)}")
        return shared

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        """The sum of directions on shared layers. Projections belong to the old directions and are dropped."""
        shared = self._shared_layers(other)
        return SteeringVector(
            directions={layer: self.directions[layer] + other.directions[layer] for layer in shared},
            resid_norm={layer: self.resid_norm[layer] for layer in shared if layer in self.resid_norm},
            metadata=_combined_metadata(self.metadata, other.metadata),
        )

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        return self + (-1 * other)

    def __mul__(self, factor: int | float) -> "SteeringVector":
        """Directions scaled by a number; a negative one also turns the sign of the projections."""
        sign = -1.0 if factor < 0 else 1.0
        return SteeringVector(
            directions={layer: direction * factor for layer, direction in self.directions.items()},
            proj_with={layer: sign * value for layer, value in self.proj_with.items()},
            proj_without={layer: sign * value for layer, value in self.proj_without.items()},
            std_with=self.std_with,
            std_without=self.std_without,
            resid_norm=self.resid_norm,
            metadata={**self.metadata, "method": f"{factor:g} * ({self.metadata.get('method', 'vector')})"},
        )

    __rmul__ = __mul__

    def __neg__(self) -> "SteeringVector":
        return -1 * self

    def with_metadata(self, **entries: str) -> "SteeringVector":
        """The same vector with more metadata."""
        return replace(self, metadata={**self.metadata, **entries})

    def check_fits(self, model: Any) -> None:
        """Refuse a model of another width, depth or coordinate frame; warn of another model.

        Raises:
            ModelError: if the vector cannot be applied to the model.
        """
        d_model = int(model.cfg.d_model)
        if self.d_model != d_model:
            raise ModelError(
                f"a vector's width must be the model's d_model {d_model}, got {self.d_model}; fit it in this model"
            )
        for layer in self.layers:
            check_layer(model, layer)
        check_origin(model, self.origin)

    @property
    def origin(self) -> dict[str, str]:
        """Which model the vector was fitted in: "model", "n_layers" and "frame", as far as they are known."""
        return {key: self.metadata[key] for key in ("model", "n_layers", "frame") if key in self.metadata}

    def save(self, path: str | Path) -> Path:
        """Write the vector to one safetensors file; it appears whole or not at all."""
        path = Path(path)
        tensors = {resid_post(layer): direction.contiguous() for layer, direction in self.directions.items()}
        for name in PROJECTIONS:
            values = getattr(self, name)
            tensors[name] = torch.tensor([values.get(layer, NAN) for layer in self.layers], dtype=torch.float64)
        metadata = {
            **self.metadata,
            "format_version": FORMAT_VERSION,
            "site": "resid_post",
            "d_model": str(self.d_model),
            "layers": json.dumps(list(self.layers)),
        }
        with atomic_path(path) as scratch:
            save_file(tensors, scratch, metadata=metadata)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Read a vector written by `save`.

        Raises:
            SteerlensError: if the file is missing, no vector, or of a newer format.
        """
        path = Path(path)
        if not path.is_file():
            raise SteerlensError(f"a vector file must exist, got {str(path)!r}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise SteerlensError(f"a vector file must be safetensors, got {str(path)!r}: {error}") from error
        if metadata.get("format_version") != FORMAT_VERSION or "layers" not in metadata:
            raise SteerlensError(
                f"{str(path)!r} is not a steerlens vector of format {FORMAT_VERSION} "
                f"(it says {metadata.get('format_version')!r}); fit it again or update steerlens"
            )
        layers: list[int] = json.loads(metadata["layers"])
        return cls(
            directions={layer: tensors[resid_post(layer)] for layer in layers},
            metadata={key: value for key, value in metadata.items() if key not in ("format_version", "layers")},
            **{
                name: {
                    layer: value for layer, value in zip(layers, tensors[name].tolist(), strict=True) if value == value
                }
                for name in PROJECTIONS
            },
        )

    def __repr__(self) -> str:
        what = self.metadata.get("instruction", "unnamed")
        model = self.metadata.get("model", "an unnamed model")
        return f"SteeringVector({what}, {len(self.directions)} layers x {self.d_model}, {model})"


def _combined_metadata(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """What two vectors agree on; where they differ, both, joined."""
    keys: Iterable[str] = dict.fromkeys([*first, *second])
    return {
        key: first.get(key, "")
        if first.get(key) == second.get(key)
        else f"{first.get(key, '')} + {second.get(key, '')}"
        for key in keys
    }
