"""Steering plans: what is done to one row of a batch, and where.

A plan is an ordered list of interventions, each one operator at one layer's `resid_post`. Plans are values: they compare,
compose with `+`, and hash by content, so that a run's identity covers the very numbers that steer it. What they are called and
where a direction came from is no part of that.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens._typing import OPERATORS, UNITS, Operator, RealNumber, Unit, WholeNumber, real, whole
from steerlens.errors import SteerlensError, nearest
from steerlens.steering.operators import affine
from steerlens.steering.positions import Window, as_window

UNIT_TOLERANCE = 1e-3
"""How far a unit vector's norm may be from one; rounding to bfloat16 moves it less than this from about 100 coordinates on."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """One operator at one layer; equal to any other that does the same.

    >>> Intervention(3, torch.tensor([0.0, 1.0]), coeff=2.0) == Intervention(3, torch.tensor([0.0, 1.0]), coeff=2.0)
    True
    """

    layer: WholeNumber
    """Block index; the site is `blocks.{layer}.hook_resid_post`."""
    direction: Float[Tensor, " d_model"]
    """The unit direction that is read and written; with `write`, what is read, of any norm; float32 on the CPU."""
    operator: Operator = "add"
    coeff: RealNumber = 1.0
    """`add`: the step in absolute units along the direction; other operators: the share of the full change."""
    target: RealNumber = 0.0
    """`set_projection`: the projection to reach, in absolute units; other operators do not read it."""
    positions: str | Window = "all"
    write: Float[Tensor, " d_model"] | None = None
    """Where the change goes, if not along `direction`: the placebo of equal norm."""
    resid_norm: RealNumber = float("nan")
    """Mean residual norm at this layer where the direction was fitted, to read `coeff` in those units; nan if unknown."""
    unit: Unit = "absolute"
    """The unit in which the coefficient was given; tables show it so. `coeff` itself is absolute."""
    name: str = ""
    """What the direction is called: its vector's name."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """"model", "n_layers" and "frame" of the model that the direction was fitted in, as far as they are known."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", whole(self.layer, "layer"))
        object.__setattr__(self, "resid_norm", float(self.resid_norm))
        if self.layer < 0:
            raise SteerlensError(f"layer counts blocks from zero, got {self.layer}")
        if self.operator not in OPERATORS:
            raise SteerlensError(
                f"operator must be one of steerlens', got {self.operator!r}; {nearest(self.operator, OPERATORS)}"
            )
        if self.unit not in UNITS:
            raise SteerlensError(f"unit must be one of steerlens', got {self.unit!r}; {nearest(self.unit, UNITS)}")
        for name in ("coeff", "target"):
            object.__setattr__(self, name, real(getattr(self, name), name))
        object.__setattr__(self, "positions", as_window(self.positions))
        for name in ("direction", "write"):
            vector = getattr(self, name)
            if vector is None:
                continue
            # A copy: what the caller does to the tensor later must not change what a plan says it does.
            vector = vector.detach().to("cpu", torch.float32, copy=True)
            free = name == "direction" and self.write is not None and 0 < vector.norm().item() < float("inf")
            if vector.ndim != 1 or not (free or abs(vector.norm().item() - 1.0) <= UNIT_TOLERANCE):
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
        """For `add`, the step in units of the layer's mean residual norm; nan for other operators, and where that is unknown."""
        if self.operator != "add" or not self.resid_norm > 0:
            return float("nan")
        return float(f"{self.coeff / self.resid_norm:.12g}")  # 0.3 times a norm, over that norm, is 0.3 again

    @property
    def coeff_absolute(self) -> float:
        """For `add`, the length of the step; nan for other operators, whose coefficient is a share."""
        return self.coeff if self.operator == "add" else float("nan")

    @property
    def given(self) -> float:
        """The coefficient in the unit in which it was given."""
        return self.coeff_in_norms if self.unit == "resid_norm" else self.coeff

    def record(self) -> dict[str, Any]:
        """What the intervention does as plain data, the vectors by their digest; what does not act is None."""
        # Written along what is read, a step is the step without `write`.
        along = self.write is None or torch.equal(self.write, self.direction)
        return {
            "layer": self.layer,
            "operator": self.operator,
            "coeff": self.coeff,
            "target": self.target if self.operator == "set_projection" else None,
            "positions": str(self.positions),
            "direction": tensor_digest(self.direction),
            "write": None if along or self.write is None else tensor_digest(self.write),
        }

    def __eq__(self, other: object) -> bool:
        return self.record() == other.record() if isinstance(other, Intervention) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.record().values()))

    def __str__(self) -> str:
        size = f"{self.given:g} norms ({self.coeff:g})" if self.unit == "resid_norm" else f"{self.coeff:g}"
        what = f" along {self.name}" if self.name else ""
        where = "" if self.write is None else ", written along another direction"
        return f"{self.operator} {size}{what} at layer {self.layer}, positions {self.positions}{where}"


@dataclass(frozen=True)
class Plan:
    """Interventions in the order in which they act; the empty plan is no steering.

    >>> Plan() + Plan()
    Plan(no steering)
    """

    interventions: tuple[Intervention, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "interventions", tuple(self.interventions))
        for step in self.interventions:
            if not isinstance(step, Intervention):
                raise SteerlensError(f"a plan is made of interventions, got {type(step).__name__}; add plans up with +")

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

    def placebo(self, *, seed: WholeNumber) -> "Plan":
        """The plan's control: the amount that each step would add along its direction goes along a random one instead.

        A step that reads the residual (`set_projection`, `ablate`) finds in it what earlier steps wrote: the plan's along u, the
        placebo's along r, with the angles of u between them. So a step after the first reads r as well, without which each
        would push by the full amount once more, and the part of u in the span of all r (projector P) is left out:

            amount = offset + slope * h.(u - Pu + r)            (u - Pu + r_k).r_j = r_k.r_j = u_k.u_j

        One step changes every token by the plan's own norm. Several do so where blocks leave residuals alone and h has no part
        in the span of r; what blocks make of a change, which differs between directions, later steps answer in the placebo, too.
        An effect that the placebo shares is not the direction's.

        Args:
            seed: Decides the random directions, and nothing else does but the number of steps, the width, and the angles
                between the plan's directions.
        """
        if not self.interventions:
            return self
        # float64: what is left of rounding is far below the float32 that a step keeps, so processors agree on the control.
        directions = torch.stack([step.direction for step in self], dim=1).double()
        writes = random_directions(directions, seed=whole(seed, "seed"))
        gram = writes.T @ writes + 1e-9 * torch.eye(len(self))  # where directions repeat, it is singular
        reads = directions - writes @ torch.linalg.solve(gram, writes.T @ directions) + writes
        first = min(range(len(self)), key=lambda place: self.interventions[place].layer)
        return Plan(
            tuple(
                replace(
                    step, write=write, direction=step.direction if place == first or step.operator == "add" else read
                )
                for place, (step, write, read) in enumerate(zip(self, writes.T, reads.T, strict=True))
            )
        )

    def __str__(self) -> str:
        return "; ".join(map(str, self)) or "no steering"

    def __repr__(self) -> str:
        return f"Plan({self})"


def as_plan(steering: Any) -> Plan:
    """The plan, where one is asked for.

    Raises:
        SteerlensError: for anything else, such as a vector, which does not say where it steers.
    """
    if not isinstance(steering, Plan):
        raise SteerlensError(
            f"steering must be a plan, got {steering!r:.80}; a vector becomes one by vector.at(layer), an intervention by "
            "Plan((intervention,))"
        )
    return steering


def random_directions(directions: Float[Tensor, "d_model step"], *, seed: int) -> Float[Tensor, "d_model step"]:
    """Random directions with the angles of the given ones between them: `Q G^(1/2)`, Q random, G the Gram matrix.

    The square root of G is unique and continuous, whereas a triangular factor has free signs, and free columns where directions
    repeat: another processor's rounding would turn a control round. So would Q, without its signs fixed by `diag(R) > 0`.
    """
    width, n = directions.shape
    random = torch.randn(width, min(width, n), generator=torch.Generator().manual_seed(seed), dtype=directions.dtype)
    q, r = torch.linalg.qr(random)
    q = q * r.diagonal().sign()
    if n > width:  # q is a rotation of the whole space
        rotated: Tensor = q @ directions
        return rotated
    values, vectors = torch.linalg.eigh(directions.T @ directions)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    turned: Tensor = q @ root
    return turned


def tensor_digest(tensor: Tensor) -> str:
    """16 hex digits of a tensor's float32 content."""
    return hashlib.sha256(tensor.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()[:16]
