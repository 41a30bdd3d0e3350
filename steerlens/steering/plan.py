"""Steering plans: what is done to one row of a batch, and where.

A plan is an ordered list of interventions, on the residual stream or on attention scores, and perhaps a gate, which holds
more of them and takes them only where the result is plausible (see `gates`). Plans are values: they compare, compose with `+`,
and hash by content, so that a run's identity covers the very numbers that steer it.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens._typing import WholeNumber, whole
from steerlens.errors import SteerlensError
from steerlens.files import derived_seed
from steerlens.steering.gates import Gate
from steerlens.steering.interventions import AttentionIntervention, Intervention
from steerlens.steering.positions import Window

Step = Intervention | AttentionIntervention
"""What a plan is made of."""


@dataclass(frozen=True)
class Plan:
    """Interventions in the order in which they act, and what a gate lets pass; the empty plan is no steering.

    >>> Plan() + Plan()
    Plan(no steering)
    """

    interventions: tuple[Step, ...] = ()
    """What always acts."""
    gate: Gate | None = None
    """What acts where it is plausible, after the others."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "interventions", tuple(self.interventions))
        for step in self.steps:
            if not isinstance(step, Step):
                raise SteerlensError(f"a plan is made of interventions, got {type(step).__name__}; add plans up with +")

    def __add__(self, other: "Plan") -> "Plan":
        if self.gate and other.gate:
            raise SteerlensError(
                "a plan has one gate, got the sum of two gated plans; gate their sum: plausible(one + other)"
            )
        return Plan(self.interventions + other.interventions, self.gate or other.gate)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def steps(self) -> tuple[Step, ...]:
        """All interventions: those that always act, then the gate's."""
        return self.interventions + (self.gate.interventions if self.gate else ())

    @property
    def residual(self) -> tuple[Intervention, ...]:
        """The interventions on the residual stream."""
        return tuple(step for step in self if isinstance(step, Intervention))

    @property
    def attention(self) -> tuple[AttentionIntervention, ...]:
        """The interventions on attention scores."""
        return tuple(step for step in self if isinstance(step, AttentionIntervention))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are named; a step on every layer names none."""
        named = [(step.layer,) if isinstance(step, Intervention) else step.layers or () for step in self]
        return tuple(sorted({layer for layers in named for layer in layers}))

    @property
    def active(self) -> "Plan":
        """The plan without steps that change nothing (a residual's `coeff` 0, a bias of 0, a factor of 1)."""
        gate = self.gate
        if gate is not None:
            left = tuple(step for step in gate.interventions if step.acts)
            # From beta 1 on, no token but the unsteered one passes; half types tie where numbers differ.
            closed = gate.criterion == "min_p" and gate.beta >= 1
            gate = replace(gate, interventions=left) if left and not closed else None
        return Plan(tuple(step for step in self.interventions if step.acts), gate)

    @property
    def ungated(self) -> "Plan":
        """What always acts."""
        return Plan(self.interventions)

    @property
    def digest(self) -> str:
        """16 hex digits of the plan's content, the directions' numbers included; "" for no steering."""
        active = self.active
        if not active:
            return ""
        content: Any = [step.record() for step in active.interventions]
        if active.gate is not None:
            content = [content, active.gate.record()]
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def each(self, change: Callable[[Step], Step]) -> "Plan":
        """The plan with every intervention changed, the gate's as well."""
        gate = self.gate
        if gate is not None:
            gate = replace(gate, interventions=tuple(map(change, gate.interventions)))
        return Plan(tuple(map(change, self.interventions)), gate)

    def part(self, of: Literal["residual", "attention"]) -> "Plan":
        """What the plan does to the residual stream, or to attention, alone."""
        kind = Intervention if of == "residual" else AttentionIntervention
        if all(isinstance(step, kind) for step in self):
            return self
        gate = self.gate
        if gate is not None:
            left = tuple(step for step in gate.interventions if isinstance(step, kind))
            gate = replace(gate, interventions=left) if left else None
        return Plan(tuple(step for step in self.interventions if isinstance(step, kind)), gate)

    def at_positions(self, positions: str | Window) -> "Plan":
        """The same plan at other positions."""
        return self.each(lambda step: replace(step, positions=positions))

    def on(self, *spans: Any) -> "Plan":
        """The same plan with its attention steered towards these spans of the prompt; steps on the residual stay as they are.

        Args:
            spans: Texts that stand in the prompt, wherever they do; characters (start, stop); or a pair, whose instruction it is.

        Raises:
            SteerlensError: for no span, an empty one, or one that is neither.
            DataError: for a pair whose instruction stands nowhere in its prompt.
        """
        if not self.attention:
            return self
        return self.each(lambda step: step.on(*spans) if isinstance(step, AttentionIntervention) else step)

    def filled(self, *spans: Any) -> "Plan":
        """The plan with steps on attention that were not told where the instruction stands told so; see `on`."""
        return self.each(
            lambda step: (
                step.on(*spans)
                if isinstance(step, AttentionIntervention) and step.spans is None and not step.weights
                else step
            )
        )

    @property
    def unbound(self) -> bool:
        """Whether a step on attention does not know yet where in the prompt the instruction stands."""
        return any(step.spans is None and step.weights is None for step in self.attention)

    def placebo(self, *, seed: WholeNumber) -> "Plan":
        """The plan's control: the amount that each step would add along its direction goes along a random one instead.

        A step that reads the residual (`set_projection`, `ablate`) finds in it what earlier steps wrote: the plan's along u, the
        placebo's along r, with the angles of u between them. So a step after the first reads r as well, without which each
        would push by the full amount once more, and the part of u in the span of all r (projector P) is left out:

            amount = offset + slope * h.(u - Pu + r)            (u - Pu + r_k).r_j = r_k.r_j = u_k.u_j

        One step changes every token by the plan's own norm. Several do so where blocks leave residuals alone and h has no part
        in the span of r; what blocks make of a change, which differs between directions, later steps answer in the placebo, too.
        An effect that the placebo shares is not the direction's. Attention is steered as much towards random tokens of the
        prompt, as many as the instruction has, or all others where there are fewer.

        Args:
            seed: Decides the random directions, and nothing else does but the number of steps, the width, and the angles
                between the plan's directions.
        """
        seed = whole(seed, "seed")
        drawn = iter(self._random_writes(seed))

        def control(step: Step) -> Step:
            if isinstance(step, AttentionIntervention):
                # One draw for all, as the plan's steps have one instruction.
                return replace(step, placebo=derived_seed(seed, "tokens"), weights=None)
            return next(drawn)

        return self.each(control)

    def _random_writes(self, seed: int) -> tuple[Intervention, ...]:
        """The placebo's steps on the residual stream, in order."""
        steps = self.residual
        if not steps:
            return ()
        # float64: what is left of rounding is far below the float32 that a step keeps, so processors agree on the control.
        directions = torch.stack([step.direction for step in steps], dim=1).double()
        writes = random_directions(directions, seed=seed)
        gram = writes.T @ writes + 1e-9 * torch.eye(len(steps))  # where directions repeat, it is singular
        reads = directions - writes @ torch.linalg.solve(gram, writes.T @ directions) + writes
        first = min(range(len(steps)), key=lambda place: steps[place].layer)
        return tuple(
            replace(step, write=write, direction=step.direction if place == first or step.operator == "add" else read)
            for place, (step, write, read) in enumerate(zip(steps, writes.T, reads.T, strict=True))
        )

    def __str__(self) -> str:
        return "; ".join(map(str, [*self.interventions, *([self.gate] if self.gate else [])])) or "no steering"

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
