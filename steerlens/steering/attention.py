"""Attention steering: more weight on the instruction's tokens, in the scores before the softmax.

    PASTA       log(alpha) on the keys that are not meant, in chosen heads         Zhang et al., ICLR 2024
    InstABoost  a constant bias on the instruction's keys, everywhere              Guardieiro et al. 2025
    SpotLight   as much bias as takes the instruction's share of attention to a target      Venkateswaran and Contractor 2025
    DIRECTER    the instruction's keys scaled, behind a gate; see `directer`       Kang and Kim 2026

Each is a plan, so it adds up with others, goes into `generate`, `evaluate` and `sweep`, and may stand behind a gate (see
`plausible`). Where the instruction stands is told by `on`, or by the pairs of an evaluation. All of them act on prompts that
carry the instruction: on others they have nothing to point at.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from steerlens._typing import RealNumber, plain, real
from steerlens.errors import SteerlensError
from steerlens.steering.interventions import AttentionIntervention, Exempt, Heads, Part, Pool, Sections
from steerlens.steering.plan import Plan
from steerlens.steering.positions import Window

Scaled = Literal["include", "exclude", "generation"]

DEFAULT_BIAS = math.log(5.0)
"""Of InstABoost: five times the attention, before it is normalised again."""


def pasta(
    alpha: RealNumber = 0.01,
    *,
    scale: Scaled = "exclude",
    heads: Heads = None,
    on: Part | Sequence[Part] | None = None,
    spans: Sections = "union",
    exempt: Exempt | Sequence[Exempt] = (),
    positions: str | Window = "all",
) -> Plan:
    """PASTA: attention to the rest of the prompt times `alpha`, before it is normalised again (Zhang et al. 2024).

    Multiplying attention before normalising is adding log(alpha) to scores. Keys of generated tokens are never touched.

    Args:
        alpha: Above 0. Below 1 with "exclude" and above 1 with "include" attention goes to the instruction.
        scale: "exclude": the rest of the prompt gets + log(alpha), the paper's; "include": - log(alpha), as the published code
            does it, which with one span is "exclude" with 1/alpha; "generation": the whole prompt gets log(alpha).
        heads: {layer: heads}, as head profiling finds them, or layers; default: every head of every layer.
        on: The instruction, as in `Plan.on`; default: that of each pair.
        spans: "union", or "reference" for the sums over spans of the published code; see `AttentionIntervention.sections`.
        exempt: Of the rest of the prompt, keys that are left alone: the "first" token, those of the "template".
        positions: The queries that are steered.

    Raises:
        SteerlensError: for alpha of 0 or less.

    Example:
        >>> pasta(0.01) == pasta(100, scale="include")
        True
    """
    alpha = real(alpha, "alpha")
    if not alpha > 0:
        raise SteerlensError(
            f"alpha must be above 0, got {alpha:g}; attention is multiplied by it, and 1 leaves it as it is"
        )
    if scale not in get_args(Scaled):
        raise SteerlensError(f"scale must be one of {', '.join(get_args(Scaled))}, got {scale!r}")
    size, against = math.log(alpha), math.log(1 / alpha)
    common: dict[str, Any] = {"heads": heads, "exempt": exempt, "positions": positions, "name": "pasta"}
    if scale == "include" and spans == "reference":
        steps: tuple[AttentionIntervention, ...] = (
            AttentionIntervention("bias", size, keys="span", sections=spans, **common),
            AttentionIntervention("bias", against, keys="prompt", **common),
        )
    else:
        keys: Literal["rest", "prompt"] = "prompt" if scale == "generation" else "rest"
        steps = (
            AttentionIntervention("bias", against if scale == "include" else size, keys=keys, sections=spans, **common),
        )
    return towards(Plan(steps), on)


def instaboost(
    bias: RealNumber = DEFAULT_BIAS,
    *,
    heads: Heads = None,
    on: Part | Sequence[Part] | None = None,
    positions: str | Window = "all",
) -> Plan:
    """InstABoost: a constant bias on the instruction's scores (Guardieiro et al. 2025).

    Args:
        bias: In nats; log(M) multiplies attention on the instruction by M before it is normalised again. The paper searches M
            from 1 to 19 on validation prompts.
        heads, on, positions: As in `pasta`.

    Example:
        >>> instaboost(0.0).active
        Plan(no steering)
    """
    step = AttentionIntervention("bias", bias, heads, positions=positions, name="instaboost")
    return towards(Plan((step,)), on)


def spotlight(
    target: RealNumber = 0.2,
    *,
    heads: Heads = None,
    on: Part | Sequence[Part] | None = None,
    granularity: Pool = "row",
    positions: str | Window = "all",
) -> Plan:
    """SpotLight: where the instruction's share of attention m is below a target, + log(target / m).

    Venkateswaran and Contractor (2025). By "row" the share becomes target / (1 + target - m): near the target, and below it.

    Args:
        target: A share in [0, 1); 0.2 is the default of IBM's code.
        heads, on, positions: As in `pasta`.
        granularity: "row": m of each head and query. "head", "layer": m over all queries of the prompt at once, and for "layer"
            over all heads, too, as in IBM's code; there later tokens of a prompt act on earlier ones.

    Raises:
        SteerlensError: for a target that is no share.

    Example:
        >>> spotlight(0.0).active
        Plan(no steering)
    """
    step = AttentionIntervention("mass", target, heads, positions=positions, pool=granularity, name="spotlight")
    return towards(Plan((step,)), on)


def towards(plan: Plan, on: Any) -> Plan:
    """The plan on one span, on several, or with None on that of each pair."""
    return plan if on is None else plan.on(*parts_of(on))


def parts_of(on: Any) -> list[Any]:
    """The spans of `on`, which may be one."""
    is_range = isinstance(on, tuple) and len(on) == 2 and all(isinstance(plain(end), int) for end in on)
    return [on] if isinstance(on, str) or is_range else list(on)
