"""Gates: steering that is taken only where the unsteered model finds it plausible (DIRECTER; Kang and Kim 2026).

At every step of a generation the model runs unsteered, which gives p, and steered, which gives q. With i the steered token,

    min_p    p(i) >= beta * max p       DIRECTER's test; where even the second-largest p is below that, no other token could
                                        pass, and steering is not tried
    kl       KL(q || p) <= limit, in nats
    js       JS(q, p) <= limit, in nats

A token that passes is taken. Otherwise steering is weakened and tried again: on the more sensitive half of its layers, then on
half of these, down to `fewest` ("layers"); or at half the coefficient, and half of that ("coeff"). Where nothing passes, the
unsteered token is taken. What is kept of each token in the cache is unsteered: a gated plan acts on the newest token alone.

Here are the gate as a value, its tests as functions of logits, and what it said of each token; see `gated` for the loop.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens._typing import RealNumber, WholeNumber, real, whole
from steerlens.errors import SteerlensError
from steerlens.steering.interventions import AttentionIntervention, Intervention

Criterion = Literal["min_p", "kl", "js"]
Weaken = Literal["layers", "coeff"]
Ranking = Literal["paper", "reference_code"]
Outcome = Literal["skipped", "accepted", "weakened", "rejected"]


@dataclass(frozen=True)
class Gate:
    """What is tried at every step, when it is taken, and how it is weakened.

    Example:
        >>> Gate(tuple(vector.at(4)), beta=0.5, halvings=2).n_trials(1)
        3
    """

    interventions: tuple[Intervention | AttentionIntervention, ...]
    criterion: Criterion = "min_p"
    beta: RealNumber = 0.5
    """For "min_p": the share of the largest unsteered probability that a token must have; 1 and more is no steering."""
    limit: RealNumber = 0.1
    """For "kl" and "js": nats."""
    weaken: Weaken | None = None
    """What gives way; None: the layers where there are several, else the coefficient."""
    ranking: Ranking = "paper"
    """How layers are ranked; see `directer.sensitivities`."""
    fewest: WholeNumber = 1
    """The smallest number of layers that is tried; the published code stops before a single one."""
    halvings: WholeNumber = 4
    """For "coeff": how often the coefficient is halved before the unsteered token is taken."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "interventions", tuple(self.interventions))
        for name, known in (("criterion", Criterion), ("weaken", Weaken), ("ranking", Ranking)):
            if getattr(self, name) not in get_args(known) and (name != "weaken" or self.weaken is not None):
                raise SteerlensError(f"{name} must be one of {', '.join(get_args(known))}, got {getattr(self, name)!r}")
        for name in ("beta", "limit"):
            value = real(getattr(self, name), name)
            if value < 0:
                usual = "0.5 is the paper's" if name == "beta" else "0.1 nats is little"
                raise SteerlensError(f"{name} must be at least 0, got {value:g}; {usual}")
            object.__setattr__(self, name, value)
        for name, least in (("fewest", 1), ("halvings", 0)):
            value = whole(getattr(self, name), name)
            if value < least:
                raise SteerlensError(f"{name} must be at least {least}, got {value}")
            object.__setattr__(self, name, value)

    @property
    def threshold(self) -> float:
        """What its criterion compares with: `beta`, or for a divergence `limit`."""
        return self.beta if self.criterion == "min_p" else self.limit

    @property
    def gives_way(self) -> Weaken:
        """What is weakened: "layers" or "coeff"."""
        if self.weaken is not None:
            return self.weaken
        named = {step.layer for step in self.interventions}
        return "layers" if None in named or len(named) > 1 else "coeff"

    def sizes(self, n_layers: int) -> list[int]:
        """How many layers each trial steers: all, then half, a quarter, ... down to `fewest`."""
        found = [n_layers]
        while found[-1] // 2 >= self.fewest:
            found.append(found[-1] // 2)
        return found

    def n_trials(self, n_layers: int) -> int:
        """How many trials there are before the unsteered token is taken."""
        return len(self.sizes(n_layers)) if self.gives_way == "layers" else self.halvings + 1

    def strengths(self, ranked: Sequence[int], n_layers: int) -> Float[Tensor, "trial layer"]:
        """The share of the coefficient at which each trial steers each layer of a model.

        Args:
            ranked: The layers that are steered, the most sensitive first.
        """
        table = torch.zeros(self.n_trials(len(ranked)), n_layers)
        for trial in range(len(table)):
            if self.gives_way == "coeff":
                table[trial, list(ranked)] = 0.5**trial
            else:
                table[trial, list(ranked[: self.sizes(len(ranked))[trial]])] = 1.0
        return table

    def record(self) -> dict[str, Any]:
        """What the gate does as plain data; what does not count is None."""
        by_layers = self.gives_way == "layers"
        return {
            "interventions": [step.record() for step in self.interventions],
            "criterion": self.criterion,
            "threshold": self.threshold,
            "weaken": self.gives_way,
            "ranking": self.ranking if by_layers else None,
            "fewest": self.fewest if by_layers else None,
            "halvings": None if by_layers else self.halvings,
        }

    def __str__(self) -> str:
        test = f"beta {self.beta:g}" if self.criterion == "min_p" else f"{self.criterion} up to {self.limit:g} nats"
        less = "fewer layers" if self.gives_way == "layers" else "a smaller coefficient"
        if self.gives_way == "layers" and (self.ranking != "paper" or self.fewest > 1):
            less += f" by {self.ranking}, {self.fewest} at least"
        return f"if plausible ({test}, else {less}): {'; '.join(map(str, self.interventions))}"


def worth_trying(logits: Float[Tensor, "row d_vocab"], beta: Float[Tensor, " row"]) -> Bool[Tensor, " row"]:
    """Whether any token but the likeliest could pass the min_p test: DIRECTER's gate on the two likeliest.

    >>> worth_trying(torch.tensor([[0.0, -5.0], [0.0, -0.1]]), torch.tensor([0.5, 0.5])).tolist()
    [False, True]
    """
    first, second = logits.float().topk(2, dim=-1).values.unbind(-1)
    return second - first >= beta.log()


def plausible_tokens(
    raw: Float[Tensor, "row d_vocab"],
    steered: Float[Tensor, "row d_vocab"],
    token: Int[Tensor, " row"],
    criterion: Criterion,
    threshold: Float[Tensor, " row"],
) -> Bool[Tensor, " row"]:
    """Whether the steered model's token passes, given the unsteered logits.

    Example:
        >>> raw, steered = torch.tensor([[2.0, 1.5, -3.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> plausible_tokens(raw, steered, torch.tensor([1]), "min_p", torch.tensor([0.5])).item()
        True
        >>> plausible_tokens(raw, steered, torch.tensor([2]), "min_p", torch.tensor([0.5])).item()
        False
    """
    if criterion == "min_p":  # of logarithms, and what normalises both sides left out
        raw = raw.float()
        return raw.gather(1, token[:, None])[:, 0] - raw.amax(-1) >= threshold.log()
    log_p, log_q = raw.float().log_softmax(-1), steered.float().log_softmax(-1)
    if criterion == "kl":
        return divergence(log_q, log_p) <= threshold
    mixed = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return (divergence(log_p, mixed) + divergence(log_q, mixed)) / 2 <= threshold


def divergence(log_q: Float[Tensor, "row d_vocab"], log_p: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
    """KL(q || p) in nats; a token that q never says adds nothing."""
    terms = log_q.exp() * (log_q - log_p)
    return terms.masked_fill(log_q == float("-inf"), 0.0).sum(-1).clamp(min=0.0)


@dataclass(frozen=True)
class GatedToken:
    """What a gate made of one token.

    Example:
        >>> GatedToken("accepted", 1, n_layers=8, strength=1.0, proposed=5, raw=7, p_proposed=0.2, p_raw=0.3).extra_passes
        1
    """

    outcome: Outcome
    """ "skipped": nothing was tried; "accepted": taken as steered in full; "weakened": taken after weakening; "rejected": nothing
    passed, and the unsteered token was taken."""
    n_trials: int
    n_layers: int
    """Layers that steered the token that was taken."""
    strength: float
    """Of what could have steered it, the share that did: of the layers, or of the coefficient."""
    proposed: int | None
    """The token that steering in full wanted; None where it was not tried."""
    raw: int
    """The token of the unsteered model."""
    p_proposed: float = field(compare=False)
    """The unsteered probability of `proposed`; nan where it was not tried. Another batch may round it otherwise."""
    p_raw: float = field(compare=False)

    @property
    def extra_passes(self) -> int:
        """Forward passes of one token, besides the unsteered one, that trying one trial after another takes; all are run at once.
        Ranking layers takes more, once."""
        return self.n_trials


def gate_stats(tokens: Sequence[GatedToken]) -> dict[str, float]:
    """Shares of a generation's tokens that were accepted (at full strength or weakened), rejected and skipped; means of the rest.

    Example:
        >>> gate_stats([GatedToken("skipped", 0, 0, 0.0, None, 7, float("nan"), 0.9)])["skipped"]
        1.0
    """
    n = max(len(tokens), 1)
    share = {name: sum(token.outcome == name for token in tokens) / n for name in get_args(Outcome)}
    return {
        "accepted": share["accepted"] + share["weakened"],
        "weakened": share["weakened"],
        "rejected": share["rejected"],
        "skipped": share["skipped"],
        "mean_active_layers": sum(token.n_layers for token in tokens) / n,
        "extra_passes": sum(token.extra_passes for token in tokens) / n,
    }
