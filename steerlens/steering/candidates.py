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
from typing import Any

from steerlens._typing import (
    ATTENTION_OPERATORS,
    OPERATORS,
    UNITS,
    AttentionOperator,
    Operator,
    RealNumber,
    Unit,
    WholeNumber,
    real,
    real_numbers,
    whole,
    whole_numbers,
)
from steerlens.errors import SteerlensError, nearest
from steerlens.steering.positions import Window, as_window


@dataclass(frozen=True)
class Candidate:
    """One way to apply a vector: `vector.at(candidate)` is its plan.

    >>> Candidate(3, coeff=0.5, operator="add", unit="resid_norm").layer
    3
    """

    layer: WholeNumber | None
    """None: no steering, where the coefficient is 0; else a way to steer attention, which has layers of its own."""
    coeff: RealNumber = 1.0
    operator: Operator | AttentionOperator = "set_projection"
    positions: str | Window = "all"
    unit: Unit = "absolute"
    """Of the coefficient of `add`; see `SteeringVector.at`."""

    def __post_init__(self) -> None:
        # One spelling of each part, so that a candidate written two ways is one.
        object.__setattr__(self, "positions", str(as_window(self.positions)))
        object.__setattr__(self, "coeff", real(self.coeff, "coeff"))
        if self.layer is not None:
            object.__setattr__(self, "layer", whole(self.layer, "layer"))
        for name, value, known in (
            ("operator", self.operator, OPERATORS + ATTENTION_OPERATORS),
            ("unit", self.unit, UNITS),
        ):
            if value not in known:
                raise SteerlensError(f"{name} must be one of steerlens', got {value!r}; {nearest(str(value), known)}")


UNSTEERED = Candidate(None, coeff=0.0)


def grid(
    *,
    layers: Iterable[WholeNumber],
    coeffs: Iterable[RealNumber] = (1.0,),
    operators: Operator | Sequence[Operator] = "set_projection",
    positions: str | Window | Sequence[str | Window] = "all",
    unit: Unit = "absolute",
) -> list[Candidate]:
    """Every combination: lower layers first, then operators and positions as given, then smaller coefficients.

    Args:
        layers: Block indices, counted from zero; any list, range or array.
        coeffs: For `add` the length of the step in `unit`, for the others the share of the full change.
        operators, positions: One, or several.
        unit: Of the coefficients of `add`; the other operators take a share, which has no unit.

    Raises:
        SteerlensError: if there is nothing to combine, or a layer or coefficient is no number.

    >>> [candidate.layer for candidate in grid(layers=[4, 2])]
    [2, 4]
    """
    chosen, sizes = sorted(set(whole_numbers(layers, "layer"))), sorted(set(real_numbers(coeffs, "coeff")), key=abs)
    combinations = product(chosen, _several(operators), _several(positions), sizes)
    found = [
        Candidate(layer, coeff, operator, where, unit if operator == "add" else "absolute")
        for layer, operator, where, coeff in combinations
    ]
    if not found:
        raise SteerlensError(
            f"a search needs a layer and a coefficient to try, got layers {chosen}, coeffs {sizes}, operators "
            f"{_several(operators)} and positions {_several(positions)}"
        )
    return found


def draws(
    n: WholeNumber,
    *,
    layers: Iterable[WholeNumber],
    coeff_range: Iterable[RealNumber] = (1.0, 1.0),
    operators: Operator | Sequence[Operator] = "set_projection",
    positions: str | Window | Sequence[str | Window] = "all",
    unit: Unit = "absolute",
    seed: WholeNumber = 0,
) -> list[Candidate]:
    """n candidates at random, each part on its own; coefficients evenly on a log scale from low to high.

    The draws of two numbers with one seed are nested: the first n of a larger sweep are the smaller sweep.

    Args:
        n: How many.
        layers, operators, positions, unit: As in `grid`; each draw takes one of them.
        coeff_range: The smallest and the largest coefficient.
        seed: Decides every draw; the vector and the model have no part in it.

    Raises:
        SteerlensError: for no layer, n below 1, or a range that is not positive and ordered.

    >>> draws(2, layers=[3], operators="ablate") == 2 * [Candidate(3, 1.0, "ablate")]
    True
    """
    n, seed = whole(n, "n"), whole(seed, "seed")
    sizes = real_numbers(coeff_range, "coeff_range")
    low, high = sizes if len(sizes) == 2 else (0.0, 0.0)
    choices = sorted(set(whole_numbers(layers, "layer")))
    if n < 1 or not (choices and _several(operators) and _several(positions)) or not 0 < low <= high:
        raise SteerlensError(
            f"draws need n of at least 1, a layer, an operator, positions, and a range 0 < low <= high, got n {n}, "
            f"layers {choices}, coeff_range {sizes}; for negative coefficients use grid() or a list"
        )
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        layer, operator, where = rng.choice(choices), rng.choice(_several(operators)), rng.choice(_several(positions))
        coeff = min(max(math.exp(rng.uniform(math.log(low), math.log(high))), low), high)  # exp(log(3)) is above 3
        found.append(Candidate(layer, coeff, operator, where, unit if operator == "add" else "absolute"))
    return found


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
