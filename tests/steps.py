"""Plain steps of the oracle, the steerlens plans that mean the same, and unit directions to make them of."""

from collections.abc import Sequence

import torch

from steerlens.steering.interventions import Intervention
from steerlens.steering.plan import Plan
from steerlens.steering.positions import Window
from tests.reference.plain_loop import Rule, Step

RULES: tuple[Rule, ...] = ("all", "prompt", "generated", "last", ("generation", -2, 3))
OPERATORS = ("add", "set_projection", "ablate")


def unit(seed: int, width: int = 32) -> torch.Tensor:
    """A seeded random unit direction."""
    direction = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return direction / direction.norm()


def step(operator: str, rule: Rule, *, layer: int = 1, strength: float = 16.0, seed: int = 0, width: int = 32) -> Step:
    """A step that moves a residual by about `strength`; ablation removes a multiple of the component, to be seen."""
    settings = {
        "add": {"coeff": strength},
        "set_projection": {"coeff": 1.0, "target": strength},
        "ablate": {"coeff": strength / 8},
    }
    return Step(layer=layer, operator=operator, direction=unit(seed, width), rule=rule, **settings[operator])


def as_plan(steps: Sequence[Step]) -> Plan:
    """The same steps in steerlens' terms."""
    return Plan(
        tuple(
            Intervention(
                layer=one.layer,
                direction=one.direction,
                operator=one.operator,
                coeff=one.coeff,
                target=one.target,
                positions=one.rule if isinstance(one.rule, str) else Window(one.rule[1], one.rule[2], one.rule[0]),
                write=one.write,
            )
            for one in steps
        )
    )
