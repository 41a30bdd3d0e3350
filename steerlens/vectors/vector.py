"""Steering vectors: one direction per layer, with what is needed to apply it and to know where it came from.

For a layer, `direction` is the mean difference of residuals with and without the instruction (not normalised), `u` its unit
vector, and `proj_with`, `proj_without` the means of `h.u` over the prompts on each side: `proj_with` is the target `z` of the
paper's format steering. A vector is a value: `a + b`, `a - b`, `2 * a`, `a / 2`, `sum(vectors)`, saved to one safetensors file,
never changed in place. It is valid only in the coordinates of the model it was fitted in, and its metadata says which.

Metadata of a sum say what its parts agree on, where they live above all; what is true of one part alone (its method, counts and
data) stands in "parts", one entry each with the factor it came with.
"""

import html
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens._typing import (
    OPERATORS,
    UNITS,
    AttentionOperator,
    Operator,
    RealNumber,
    WholeNumber,
    plain,
    real,
    whole,
    whole_numbers,
)
from steerlens.errors import ModelError, SteerlensError
from steerlens.models.facts import check_layer, check_origin
from steerlens.steering.interventions import Intervention
from steerlens.steering.plan import Plan
from steerlens.steering.positions import Window
from steerlens.vectors.formats import PROJECTIONS, read_vector, write_vector

NAN = float("nan")

OF_ONE_PART = ("method", "n_pairs", "data", "name", "arguments", "fit", "mapped_from", "factor")
"""Metadata that are true of one fitted vector and of no sum."""


@runtime_checkable
class Choice(Protocol):
    """Where and how strongly to steer; a search returns these. `layer` None means that no steering was best."""

    @property
    def layer(self) -> int | None: ...
    @property
    def coeff(self) -> float: ...
    @property
    def operator(self) -> Operator | AttentionOperator: ...
    @property
    def positions(self) -> str | Window: ...
    @property
    def unit(self) -> str: ...


def _of_residual(choice: Choice) -> Operator:
    """The operator of a choice, if a vector can be applied by it."""
    for operator in OPERATORS:
        if choice.operator == operator:
            return operator
    raise SteerlensError(
        f"a vector is applied by {', '.join(OPERATORS)}, and this choice is one of attention, {choice.operator!r}; make its plan "
        "anew, as by pasta(best.coeff)"
    )


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """Directions per layer, with projections along each direction's unit vector.

    `vector[layer]` is a direction, `for layer in vector` goes over the layers, `len(vector)` counts them.

    >>> vector = SteeringVector({3: torch.tensor([0.0, 2.0])}, metadata={"instruction": "a:b"})
    >>> vector, -vector / 2
    (SteeringVector(a:b, 1 layers x 2, an unnamed model), SteeringVector(-0.5 * a:b, 1 layers x 2, an unnamed model))
    """

    directions: Mapping[WholeNumber, Float[Tensor, " d_model"]]
    """Layer -> direction, not normalised; float32 on the CPU."""
    proj_with: Mapping[WholeNumber, RealNumber] = field(default_factory=dict)
    """Layer -> mean of `h.u` over prompts with the instruction."""
    proj_without: Mapping[WholeNumber, RealNumber] = field(default_factory=dict)
    """Layer -> mean of `h.u` over prompts without it."""
    std_with: Mapping[WholeNumber, RealNumber] = field(default_factory=dict)
    """Layer -> standard deviation of `h.u` with the instruction (n - 1); nan where only sums were kept."""
    std_without: Mapping[WholeNumber, RealNumber] = field(default_factory=dict)
    """Layer -> the same without the instruction."""
    resid_norm: Mapping[WholeNumber, RealNumber] = field(default_factory=dict)
    """Layer -> mean norm of the residual without the instruction, the unit for relative coefficients."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Model, data and method; all strings."""

    def __post_init__(self) -> None:
        if not self.directions:
            raise SteerlensError("a steering vector needs at least one layer, got none")
        clean: dict[int, Tensor] = {}
        for key, direction in self.directions.items():
            layer = whole(key, "layer")
            tensor = torch.as_tensor(direction).detach().to("cpu", torch.float32, copy=True)
            if tensor.ndim != 1:
                raise SteerlensError(f"a direction must be one vector, got shape {list(tensor.shape)} at layer {layer}")
            if not torch.isfinite(tensor).all():
                raise SteerlensError(
                    f"directions must be finite, got nan or infinity at layer {layer}; was the model in float16?"
                )
            clean[layer] = tensor
        widths = {tuple(direction.shape) for direction in clean.values()}
        if len(widths) > 1:
            raise SteerlensError(f"every layer's direction must have the same width, got shapes {sorted(widths)}")
        object.__setattr__(self, "directions", dict(sorted(clean.items())))
        for name in PROJECTIONS:  # unknown is left out
            values = {whole(layer, "layer"): float(plain(value)) for layer, value in getattr(self, name).items()}
            object.__setattr__(self, name, {layer: value for layer, value in values.items() if value == value})
        object.__setattr__(self, "metadata", {str(key): str(value) for key, value in self.metadata.items()})

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.directions)

    @property
    def d_model(self) -> int:
        return next(iter(self.directions.values())).shape[0]

    @property
    def name(self) -> str:
        """What the vector is called: its instruction or word, for a sum those of its parts, with their signs.

        Sizes of factors are left out: a plan takes the unit direction.
        """
        return _formula(self._parts, sizes=False)

    @property
    def _parts(self) -> list[dict[str, Any]]:
        """The fitted vectors of which this one is made, each with its factor."""
        if "parts" in self.metadata:
            found: list[dict[str, Any]] = json.loads(self.metadata["parts"])
            return found
        about = {key: self.metadata[key] for key in (*OF_ONE_PART, "seed") if key in self.metadata}
        return [{**about, "name": _name(self.metadata), "factor": float(self.metadata.get("factor", 1.0))}]

    def __len__(self) -> int:
        return len(self.directions)

    def __iter__(self) -> Iterator[int]:
        return iter(self.directions)

    def __contains__(self, layer: object) -> bool:
        return layer in self.directions

    def __getitem__(self, layer: WholeNumber) -> Float[Tensor, " d_model"]:
        """The direction of a layer, not normalised.

        Raises:
            SteerlensError: if the vector has no such layer.
        """
        number = whole(layer, "layer")
        if number not in self.directions:
            raise SteerlensError(
                f"layer must be one of the vector's {list(self.layers)}, got {number}; layers count from zero"
            )
        return self.directions[number]

    def unit(self, layer: WholeNumber) -> Float[Tensor, " d_model"]:
        """The unit direction of a layer.

        Raises:
            SteerlensError: if the vector has no such layer, or its direction there is zero.
        """
        norm = self[layer].norm()
        if norm == 0:
            raise SteerlensError(
                f"the direction at layer {layer} is zero, so it cannot steer; were both sides the same prompts?"
            )
        unit: Tensor = self[layer] / norm
        return unit

    def to_frame(self) -> pd.DataFrame:
        """One row per layer: layer, norm of the direction, and what is known of its projections, in absolute units."""
        rows = [
            {"layer": layer, "norm": float(direction.norm())}
            | {name: getattr(self, name).get(layer, NAN) for name in PROJECTIONS}
            for layer, direction in self.directions.items()
        ]
        return pd.DataFrame(rows)

    def at(
        self,
        layer: WholeNumber | Iterable[WholeNumber] | str | Choice,
        *,
        coeff: RealNumber | None = None,
        operator: Operator | None = None,
        positions: str | Window | None = None,
        target: RealNumber | None = None,
        unit: str | None = None,
    ) -> Plan:
        """The plan that applies this vector.

        Args:
            layer: One layer, several, "all" of the vector's, or what a search returned: then the rest is its choice, too,
                unless given.
            coeff: `add`: the step along the unit direction, which must be given; others: the share of the full change,
                by default 1.
            operator: Default "set_projection", the paper's format steering.
            positions: A position rule; default "all", as in the paper.
            target: `set_projection`: the projection to reach. Default: the mean with the instruction.
            unit: "absolute", or "resid_norm" to give an `add` coefficient in units of the layer's mean residual norm.

        Raises:
            SteerlensError: if there is no layer, one is not in the vector, or what the operator needs is not known.

        >>> SteeringVector({3: torch.tensor([0.0, 2.0])}).at(3, operator="add", coeff=6.0)
        Plan(add 6 along unnamed at layer 3, positions all)
        """
        if isinstance(layer, Choice):
            layers = [] if layer.layer is None else [layer.layer]
            coeff = layer.coeff if coeff is None else coeff
            operator = operator or _of_residual(layer)
            positions = positions or layer.positions
            unit = unit or layer.unit
        elif isinstance(layer, str):
            if layer != "all":
                raise SteerlensError(
                    f'layer must be a number, several, or "all", got {layer!r}; this vector has {self.layers}'
                )
            layers = list(self.layers)
        else:
            layers = whole_numbers(layer, "layer")
            if not layers:
                raise SteerlensError(
                    f"a plan needs a layer, got none; this vector has {list(self.layers)}, and Plan() is no steering"
                )
        operator = operator or "set_projection"
        if coeff is None and operator == "add":
            raise SteerlensError('operator="add" needs coeff, the length of the step; see also unit="resid_norm"')
        size = 1.0 if coeff is None else real(coeff, "coeff")
        goal = None if target is None else real(target, "target")
        positions, unit = positions or "all", unit or "absolute"
        return Plan(tuple(self._intervention(one, size, operator, positions, goal, unit) for one in layers))

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
        if unit not in UNITS:
            raise SteerlensError(f'unit must be "absolute" or "resid_norm", got {unit!r}')
        if unit == "resid_norm":
            if operator != "add":
                raise SteerlensError(
                    f'unit="resid_norm" scales the step of operator="add"; {operator!r} takes a share, without unit'
                )
            if math.isnan(norm):
                raise SteerlensError(
                    f'unit="resid_norm" needs the mean residual norm of layer {layer}, and this vector has none'
                )
            coeff = coeff * norm
        if operator == "set_projection" and target is None:
            if layer not in self.proj_with:
                raise SteerlensError(
                    f"the projection to set at layer {layer} must be known, and this vector has none; "
                    'a combined vector has no projection target: use operator="add", or pass target='
                )
            target = self.proj_with[layer]
        return Intervention(
            layer=layer,
            direction=direction,
            operator=operator,
            coeff=coeff,
            target=0.0 if target is None else target,
            positions=positions,
            resid_norm=norm,
            unit=unit,
            name=self.name,
            origin=self.origin,
        )

    def cosine(self, other: "SteeringVector") -> dict[int, float]:
        """Cosine similarity per shared layer."""
        shared = self.shared_layers(other)
        return {layer: float(self.unit(layer) @ other.unit(layer)) for layer in shared}

    def shared_layers(self, other: "SteeringVector") -> list[int]:
        """The layers that two vectors have in common.

        Raises:
            SteerlensError: if there is none, or the vectors are of models that cannot be compared.
        """
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

    __array_ufunc__ = None  # NumPy's scalars leave `number * vector` to the vector

    def __add__(self, other: object) -> "SteeringVector":
        """The sum of directions on shared layers. Projections belong to the old directions and are dropped."""
        if not isinstance(other, SteeringVector):
            return NotImplemented
        shared = self.shared_layers(other)
        norms = {layer: [one.resid_norm[layer] for one in (self, other) if layer in one.resid_norm] for layer in shared}
        return SteeringVector(
            directions={layer: self.directions[layer] + other.directions[layer] for layer in shared},
            # Both are mean norms without an instruction in one kind of model, and neither is the better unit.
            resid_norm={layer: sum(found) / len(found) for layer, found in norms.items() if found},
            metadata=_combined_metadata(self, other),
        )

    def __radd__(self, other: object) -> "SteeringVector":
        """`0 + vector`, with which `sum` begins."""
        return self if plain(other) == 0 and not isinstance(other, bool) else NotImplemented

    def __sub__(self, other: object) -> "SteeringVector":
        return self + -other if isinstance(other, SteeringVector) else NotImplemented

    def __mul__(self, factor: RealNumber) -> "SteeringVector":
        """Directions scaled by a number; a negative one also turns the sign of the projections.

        Raises:
            SteerlensError: for what is no finite number.
        """
        factor = real(factor, "factor")
        sign = -1.0 if factor < 0 else 1.0  # projections are along the unit direction, which only a sign can turn
        known = {} if factor == 0 else {name: getattr(self, name) for name in PROJECTIONS[:-1]}  # zero has no direction
        for name in ("proj_with", "proj_without"):
            known |= {name: {layer: sign * value for layer, value in known.get(name, {}).items()}}
        return SteeringVector(
            directions={layer: direction * factor for layer, direction in self.directions.items()},
            resid_norm=self.resid_norm,
            metadata=_scaled_metadata(self, factor),
            **known,
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: RealNumber) -> "SteeringVector":
        """Directions divided by a number.

        Raises:
            SteerlensError: for zero, and for what is no finite number.
        """
        divisor = real(divisor, "divisor")
        if divisor == 0:
            raise SteerlensError("a vector is divided by a number other than zero, got 0")
        return self * (1 / divisor)

    def __neg__(self) -> "SteeringVector":
        return -1 * self

    def with_metadata(self, **entries: Any) -> "SteeringVector":
        """The same vector with more metadata, kept as text."""
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
        """Write the vector to one safetensors file, which appears whole or not at all; see `formats`.

        Raises:
            SteerlensError: if the file cannot be written there.
        """
        return write_vector(path, self.directions, {name: getattr(self, name) for name in PROJECTIONS}, self.metadata)

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Read a vector written by `save`.

        Raises:
            SteerlensError: if the file is missing, no vector, of a newer format, or damaged.
        """
        return cls(**read_vector(path))

    def __repr__(self) -> str:
        model = self.metadata.get("model", "an unnamed model")
        return f"SteeringVector({_formula(self._parts)}, {len(self)} layers x {self.d_model}, {model})"

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, float_format="{:.3f}".format)
        return f"<p>{html.escape(repr(self))}</p>{table}"


def _name(metadata: Mapping[str, str]) -> str:
    """The name of a fitted vector: one that it was given, or its instruction with the arguments that all its pairs share."""
    if "name" in metadata:
        return metadata["name"]
    instruction = metadata.get("instruction", "unnamed")
    return f"{instruction} {metadata['arguments']}" if "arguments" in metadata else instruction


def _formula(parts: Iterable[Mapping[str, Any]], *, sizes: bool = True) -> str:
    """The parts as a sum, such as "a:b - 2 * c:d", or without `sizes` "a:b - c:d"."""
    terms = []
    for place, part in enumerate(parts):
        size = abs(part["factor"]) if sizes else 1
        sign = "-" if part["factor"] < 0 else "+"
        sign = f" {sign} " if place else sign.replace("+", "")
        terms.append(f"{sign}{'' if size == 1 else f'{size:g} * '}{part['name']}")
    return "".join(terms)


def _combined_metadata(first: SteeringVector, second: SteeringVector) -> dict[str, str]:
    """What two vectors agree on, as far as they say it; all models and queries they came from; and the parts."""
    parts = [*first._parts, *second._parts]
    said = [{key: one.metadata[key] for key in one.metadata if key not in OF_ONE_PART} for one in (first, second)]
    merged = said[1] | said[0]
    agreed = {key: value for key, value in merged.items() if all(one.get(key, value) == value for one in said)}
    models = dict.fromkeys(one["model"] for one in said if "model" in one)
    queries = {query for one in said for query in one.get("queries", "").split()}
    return {
        **agreed,
        **({"model": " + ".join(models)} if models else {}),
        **({"queries": " ".join(sorted(queries))} if queries else {}),  # none of them is to test the sum
        "method": f"sum of {len(parts)} vectors",
        "parts": json.dumps(parts),
        "instruction": _formula(parts, sizes=False),
    }


def _scaled_metadata(vector: SteeringVector, factor: float) -> dict[str, str]:
    metadata = {key: value for key, value in vector.metadata.items() if key != "factor"}
    parts = [{**part, "factor": factor * part["factor"]} for part in vector._parts]
    if "parts" in metadata:
        return metadata | {"parts": json.dumps(parts), "instruction": _formula(parts, sizes=False)}
    return metadata if parts[0]["factor"] == 1 else metadata | {"factor": repr(parts[0]["factor"])}
