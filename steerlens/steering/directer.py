"""DIRECTER: keys of the instruction scaled where that stays plausible, in as many layers as that allows (Kang and Kim 2026).

    k'_j = alpha * k_j    for j in the instruction, in candidate layers      alpha = 100
    accept the steered token i where p(i) >= beta * max p, p unsteered        beta = 0.5
    else the more sensitive half of the layers, and so on down to one; then the unsteered token

The layers are ranked once, at the last token of the prompt, each steered alone. With pre_j and post_j the input and the output of
layer j's attention, of the unsteered model, post_j^(l) where layer l is steered, and d the cosine distance, the paper's

    sensitivity(l) = mean_j  d(pre_j, post_j^(l)) - d(pre_j, post_j)  +  d(pre_j^(l), post_j) - d(pre_j, post_j)

says how much steering l disturbs. The published code has the mean over l of d(pre_j, post_j^(l)) + d(post_j, pre_j^(l)) instead,
which says how much j is disturbed, without the distance that is there anyway ("reference_code").

A negative score times alpha shuts a key out, a positive one takes nearly all attention: the effect depends on the sign, and
hardly on alpha. `plausible` is the gate alone, around any plan.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens._typing import RealNumber, WholeNumber
from steerlens.errors import SteerlensError
from steerlens.steering.attention import towards
from steerlens.steering.gates import Criterion, Gate, Ranking, Weaken
from steerlens.steering.interventions import AttentionIntervention, Heads, Part
from steerlens.steering.plan import Plan, as_plan


def directer(
    alpha: RealNumber = 100.0,
    *,
    beta: RealNumber = 0.5,
    heads: Heads = None,
    on: Part | Sequence[Part] | None = None,
    ranking: Ranking = "paper",
    fewest: WholeNumber = 1,
    extra_tokens: WholeNumber = 0,
) -> Plan:
    """The plan that scales the instruction's keys by `alpha` wherever the steered token is plausible.

    Args:
        alpha: The factor; the paper's 100. It must be above 0, and 1 is no steering.
        beta: The share of the largest unsteered probability that a steered token must have; from 1 on nothing is steered.
        heads: The candidate layers, or {layer: heads}; default: every layer, as in the paper.
        on: The instruction, as in `Plan.on`; default: that of each pair.
        ranking: "paper", or "reference_code" for the order that the published code gives.
        fewest: The smallest number of layers that is tried; the published code stops at 2.
        extra_tokens: Tokens after the instruction that are scaled, too; the published code has 1.

    Raises:
        SteerlensError: for alpha of 0 or less, or beta below 0.

    Example:
        >>> plan = directer(on="Use capitals.")
        >>> len(sl.generate(model, ["Describe rain. Use capitals."], steering=plan, max_new_tokens=4)[0].gated)
        4
    """
    step = AttentionIntervention("scale", alpha, heads, name="directer", extra_tokens=extra_tokens)
    return plausible(towards(Plan((step,)), on), beta=beta, ranking=ranking, fewest=fewest)


def plausible(
    plan: Plan,
    *,
    beta: RealNumber = 0.5,
    criterion: Criterion = "min_p",
    limit: RealNumber = 0.1,
    weaken: Weaken | None = None,
    ranking: Ranking = "paper",
    fewest: WholeNumber = 1,
    halvings: WholeNumber = 4,
) -> Plan:
    """The plan behind a gate: it acts on a token only where the unsteered model finds the steered one plausible.

    Under a gate a plan acts on the newest token alone, since the cache stays unsteered: a vector that steers every position
    without a gate steers the prompt, too.

    Args:
        plan: Any plan without a gate.
        beta: For "min_p": the share of the largest unsteered probability that the steered token must have.
        criterion: "min_p", or the divergence of the two distributions, "kl" or "js".
        limit: The largest divergence, in nats, for "kl" and "js".
        weaken: What gives way where a token is not plausible: "layers", half of them at a time, or the "coeff", halved each time.
            Default: the layers where there are several, else the coefficient.
        ranking, fewest: Of the layers; see `directer`.
        halvings: Of the coefficient.

    Raises:
        SteerlensError: for a plan that has a gate or no interventions, or numbers below 0.

    Example:
        >>> plausible(vector.at(4), beta=0.5).gate.gives_way
        'coeff'
    """
    plan = as_plan(plan)
    if plan.gate is not None or not plan.interventions:
        came = "one with a gate" if plan.gate is not None else "no steering"
        raise SteerlensError(f"a gate goes around a plan with interventions and no gate yet, got {came}")
    return Plan(gate=Gate(plan.interventions, criterion, beta, limit, weaken, ranking, fewest, halvings))


def sensitivities(
    inputs: Float[Tensor, "probe_and_one layer d_model"],
    outputs: Float[Tensor, "probe_and_one layer d_model"],
    *,
    ranking: Ranking = "paper",
    probed: Sequence[int],
) -> Float[Tensor, " probe"]:
    """The sensitivity of each layer that was steered alone.

    Args:
        inputs, outputs: Of every layer's attention at the last token of the prompt: first unsteered, then with each of the probed
            layers steered.
        probed: The layers, in the order of the probes.

    Returns:
        "paper": how much steering each probed layer disturbs; "reference_code": how much each is disturbed.

    Example:
        >>> unsteered, steered = torch.eye(2), torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> sensitivities(torch.stack([unsteered] * 2), torch.stack([unsteered, steered]), probed=[1]).item() > 0
        True
    """
    pre, post = inputs[0].float(), outputs[0].float()
    direct, propagated = _distance(pre, outputs[1:].float()), _distance(inputs[1:].float(), post)  # probe layer
    if ranking == "paper":
        found: Tensor = (direct + propagated - 2 * _distance(pre, post)).mean(1)
        return found
    return (direct.clamp(min=0) + propagated.clamp(min=0)).mean(0)[list(probed)]


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return 1 - torch.cosine_similarity(one, other, dim=-1)
