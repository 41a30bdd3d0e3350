"""Candidates of a search or sweep: where and how strongly a vector is tried.

One spec for all: a grid, a list, a function of the vector, or random draws; each comes down to a list of `Candidate`, in the
order in which ties are broken.

    grid(layers=[2, 4], coeffs=[1, 2], operators=["set_projection", "add"])      every combination
    draws(20, layers=range(8), coeff_range=(0.5, 4), seed=0)                     at random, coefficients evenly on a log scale
    [Candidate(3), Candidate(5, coeff=0.5)]                                      a list
    lambda vector: [Candidate(layer) for layer in vector.layers]                 a function of the vector
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from steerlens._typing import Operator
from steerlens.errors import SteerlensError
from steerlens.steering.positions import Window, as_window

Unit = Literal["absolute", "resid_norm"]


@dataclass(frozen=True)
class Candidate:
    """One way to apply a vector: `vector.at(candidate)` is its plan."""

    layer: int | None
    """None: no steering."""
    coeff: float = 1.0
    operator: Operator = "set_projection"
    positions: str | Window = "all"
    unit: Unit = "absolute"
    """Of the coefficient of `add`; see `SteeringVector.at`."""

    def __post_init__(self) -> None:
        # One spelling per rule, so that a candidate written two ways is one.
        object.__setattr__(self, "positions", str(as_window(self.positions)))


UNSTEERED = Candidate(None, coeff=0.0)


def grid(
    *,
    layers: Iterable[int],
    coeffs: Iterable[float] = (1.0,),
    operators: Operator | Sequence[Operator] = "set_projection",
    positions: str | Window | Sequence[str | Window] = "all",
    unit: Unit = "absolute",
) -> list[Candidate]:
    """Every combination: lower layers first, then operators and positions as given, then smaller coefficients.

    Args:
        unit: Of the coefficients of `add`; the other operators take a share, which has no unit.

    Raises:
        SteerlensError: if there is nothing to combine.

    >>> [candidate.layer for candidate in grid(layers=[4, 2])]
    [2, 4]
    """
    layers, coeffs = sorted(set(layers)), sorted(set(coeffs), key=abs)
    combinations = product(layers, _several(operators), _several(positions), coeffs)
    found = [
        Candidate(layer, coeff, operator, where, unit if operator == "add" else "absolute")
        for layer, operator, where, coeff in combinations
    ]
    if not found:
        raise SteerlensError(
            f"a search needs a layer and a coefficient to try, got layers {layers}, coeffs {coeffs}, operators "
            f"{_several(operators)} and positions {_several(positions)}"
        )
    return found


def draws(
    n: int,
    *,
    layers: Iterable[int],
    coeff_range: tuple[float, float] = (1.0, 1.0),
    operators: Operator | Sequence[Operator] = "set_projection",
    positions: str | Window | Sequence[str | Window] = "all",
    unit: Unit = "absolute",
    seed: int = 0,
) -> list[Candidate]:
    """n candidates at random, each part on its own; coefficients evenly on a log scale from low to high.

    The draws of two numbers with one seed are nested: the first n of a larger sweep are the smaller sweep.

    Raises:
        SteerlensError: for no layer, n below 1, or a range that is not positive and ordered.
    """
    low, high = coeff_range
    choices = sorted(set(layers))
    if n < 1 or not (choices and _several(operators) and _several(positions)) or not 0 < low <= high:
        raise SteerlensError(
            f"draws need n of at least 1, a layer, an operator, positions, and a range 0 < low <= high, got n {n}, "
            f"layers {choices}, coeff_range {coeff_range}; for negative coefficients use grid() or a list"
        )
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        layer, operator, where = rng.choice(choices), rng.choice(_several(operators)), rng.choice(_several(positions))
        coeff = math.exp(rng.uniform(math.log(low), math.log(high)))
        found.append(Candidate(layer, coeff, operator, where, unit if operator == "add" else "absolute"))
    return found


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
