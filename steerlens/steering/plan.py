"""Steering plans: what is done to one row of a batch, and where.

A plan is an ordered list of interventions, each one operator at one layer's `resid_post`. Plans are values: they compare,
compose with `+`, and hash by content, so that a run's identity covers the very numbers that steer it.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens._typing import OPERATORS, Operator
from steerlens.errors import SteerlensError, nearest
from steerlens.steering.operators import affine
from steerlens.steering.positions import Window, as_window

UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Intervention:
    """One operator at one layer."""

    layer: int
    """Block index; the site is `blocks.{layer}.hook_resid_post`."""
    direction: Float[Tensor, " d_model"]
    """The unit direction that is read, and written unless `write` is given; float32 on the CPU."""
    operator: Operator = "add"
    coeff: float = 1.0
    """`add`: the step in absolute units along the direction; other operators: the share of the full change."""
    target: float = 0.0
    """`set_projection`: the projection to reach, in absolute units."""
    positions: str | Window = "all"
    write: Float[Tensor, " d_model"] | None = None
    """Where the change goes, if not along `direction`: the placebo of equal norm."""
    resid_norm: float = float("nan")
    """Mean residual norm at this layer where the direction was fitted, to read `coeff` in those units; nan if unknown."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """"model", "n_layers" and "frame" of the model that the direction was fitted in, as far as they are known."""

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise SteerlensError(f"layer counts blocks from zero, got {self.layer}")
        if self.operator not in OPERATORS:
            raise SteerlensError(
                f"operator must be one of steerlens', got {self.operator!r}; {nearest(self.operator, OPERATORS)}"
            )
        for name, value in (("coeff", self.coeff), ("target", self.target)):
            if not torch.isfinite(torch.tensor(float(value))):
                raise SteerlensError(
                    f"{name} must be a finite number, got {value}; a combined vector has no projection target: "
                    'use operator="add", or pass target='
                )
        object.__setattr__(self, "positions", as_window(self.positions))
        for name in ("direction", "write"):
            vector = getattr(self, name)
            if vector is None:
                continue
            vector = vector.detach().to("cpu", torch.float32, copy=True)
            if vector.ndim != 1 or abs(vector.norm().item() - 1.0) > UNIT_TOLERANCE:
                raise SteerlensError(
                    f"{name} must be one unit vector, got shape {list(vector.shape)} and norm {vector.norm():.4g}; "
                    "divide it by its norm and keep the norm in coeff"
                )
            object.__setattr__(self, name, vector)

    @property
    def affine(self) -> tuple[float, float]:
        """The (offset, slope) of the operator; see `operators.rank_one`."""
        return affine(self.operator, coeff=self.coeff, target=self.target)

    def bounds(self, prompt_length: int) -> tuple[int, int]:
        """The positions [low, high) that are steered in a row whose prompt has `prompt_length` tokens."""
        return as_window(self.positions).bounds(prompt_length)

    @property
    def coeff_in_norms(self) -> float:
        """For `add`, the step in units of the layer's mean residual norm; nan if that is unknown."""
        return self.coeff / self.resid_norm

    def record(self) -> dict[str, Any]:
        """The intervention as plain data, the vectors by their digest."""
        return {
            "layer": self.layer,
            "operator": self.operator,
            "coeff": float(self.coeff),
            "target": float(self.target),
            "positions": str(self.positions),
            "direction": tensor_digest(self.direction),
            "write": None if self.write is None else tensor_digest(self.write),
        }


@dataclass(frozen=True)
class Plan:
    """Interventions in the order in which they act; the empty plan is no steering."""

    interventions: tuple[Intervention, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "interventions", tuple(self.interventions))

    def __add__(self, other: "Plan") -> "Plan":
        return Plan(self.interventions + other.interventions)

    def __iter__(self) -> Iterator[Intervention]:
        return iter(self.interventions)

    def __len__(self) -> int:
        return len(self.interventions)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({step.layer for step in self}))

    @property
    def active(self) -> "Plan":
        """The plan without steps that change nothing (`coeff` 0)."""
        return Plan(tuple(step for step in self if step.coeff != 0))

    @property
    def digest(self) -> str:
        """16 hex digits of the plan's content, the directions' numbers included; "" for no steering."""
        if not self.active:
            return ""
        return hashlib.sha256(repr([step.record() for step in self.active]).encode()).hexdigest()[:16]

    def at_positions(self, positions: str | Window) -> "Plan":
        """The same plan at other positions."""
        return Plan(tuple(replace(step, positions=positions) for step in self))

    def placebo(self, *, seed: int) -> "Plan":
        """The plan's control: the amount that each step would add along its direction goes along a random one instead.

        With one step the change has the same norm at every token. With several, the random directions have the same angles
        between them as the plan's own, but a later step reads a residual that went another way, so norms only agree about.
        An effect that the placebo shares is not the direction's.
        """
        if not self.interventions:
            return self
        directions = torch.stack([step.direction for step in self], dim=1).double()
        random = torch.randn(directions.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        writes = torch.linalg.qr(random).Q @ torch.linalg.qr(directions).R
        return Plan(tuple(replace(step, write=write) for step, write in zip(self, writes.T, strict=True)))

    def __repr__(self) -> str:
        steps = [f"{s.operator} layer {s.layer} coeff {s.coeff:g} at {s.positions}" for s in self]
        return f"Plan({'; '.join(steps) or 'no steering'})"


def tensor_digest(tensor: Tensor) -> str:
    """16 hex digits of a tensor's float32 content."""
    return hashlib.sha256(tensor.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()[:16]
