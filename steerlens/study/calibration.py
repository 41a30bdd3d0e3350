"""Coefficients of equal force: how strongly to steer at each layer so that the model is moved equally far.

    c(layer) such that  mean over tokens of KL(steered || unsteered) = target nats

on the model's own unsteered responses to some prompts. A coefficient in absolute units, or in residual norms, means another force
at every layer; a divergence in nats is the same everywhere, so layers can be compared at one price. The coefficient is found by
bisection on a log scale, for all layers at once: each step is one batch of teacher-forced passes and samples nothing.

What it does not show: whether the force goes where it should. Search the calibrated candidates as any others.
"""

import math
from collections.abc import Iterable
from typing import Any

from steerlens._typing import Operator, RealNumber, WholeNumber, real, whole, whole_numbers
from steerlens.errors import SteerlensError
from steerlens.models.prompts import PromptFormat, text_list
from steerlens.steering.candidates import Candidate
from steerlens.steering.positions import Window
from steerlens.steering.sampling import generate
from steerlens.study.quality import kl_from_unsteered
from steerlens.vectors.vector import SteeringVector

RANGE = (2.0**-8, 2.0**5)
"""Coefficients that are considered: steps in mean residual norms for `add`, shares of the full change for the others."""


def calibrate(
    model: Any,
    vector: SteeringVector,
    prompts: Iterable[str],
    *,
    target_kl: RealNumber = 0.5,
    layers: Iterable[WholeNumber] | None = None,
    operator: Operator = "add",
    positions: str | Window = "all",
    max_new_tokens: WholeNumber = 32,
    n_steps: WholeNumber = 12,
    batch_size: int = 32,
    prompt_format: PromptFormat = PromptFormat(),
) -> list[Candidate]:
    """A candidate per layer with the coefficient that moves the model by `target_kl` nats per token on average.

    Layers where no coefficient in `RANGE` meets the target, because all move the model less, or all more, are left out.

    Args:
        prompts: Validation prompts; the model's greedy, unsteered responses to them are what is moved.
        layers: Default: all of the vector.
        n_steps: Halvings of the range; 12 settle the coefficient to 0.2 %.

    Returns:
        Candidates for `sweep`; coefficients of `add` in mean residual norms, of the others as shares.

    Raises:
        SteerlensError: if there are no prompts, or the target is not positive.

    Example:
        >>> [one.layer for one in calibrate(model, vector, queries[:1], target_kl=0.1, layers=[4], max_new_tokens=4, n_steps=3)]
        [4]
    """
    prompts = text_list(prompts)
    goal, n_steps = real(target_kl, "target_kl"), whole(n_steps, "n_steps")
    if not prompts or goal <= 0:
        raise SteerlensError(f"calibration needs prompts and a target above 0 nats, got {len(prompts)} and {goal}")
    chosen = list(vector.layers) if layers is None else whole_numbers(layers, "layer")
    unit: Any = "resid_norm" if operator == "add" else "absolute"
    rows = [
        (row.prompt_tokens, row.tokens)
        for row in generate(
            model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, prompt_format=prompt_format
        )
    ]

    def candidate(layer: int, log_coeff: float) -> Candidate:
        return Candidate(layer, 2.0**log_coeff, operator, positions, unit)

    def divergence(logs: dict[int, float]) -> dict[int, float]:
        plans = {layer: vector.at(candidate(layer, log)) for layer, log in logs.items()}
        values = kl_from_unsteered(model, [(*row, plan) for plan in plans.values() for row in rows], batch_size)
        n = len(rows)
        return {layer: sum(values[i * n : (i + 1) * n]) / n for i, layer in enumerate(plans)}

    low, high = (dict.fromkeys(chosen, math.log2(end)) for end in RANGE)
    least, most = divergence(low), divergence(high)
    inside = [layer for layer in low if least[layer] < goal <= most[layer]]
    low, high = ({layer: ends[layer] for layer in inside} for ends in (low, high))
    for _ in range(n_steps if low else 0):
        middle = {layer: (low[layer] + high[layer]) / 2 for layer in low}
        for layer, value in divergence(middle).items():
            (high if value >= goal else low)[layer] = middle[layer]
    return [candidate(layer, high[layer]) for layer in high]
