"""Greedy text that tries a change at every token and keeps it only where the model itself finds the outcome plausible.

The slow way: one prompt, no cache, every pass over the whole prefix again. With p the model's own distribution after the prefix
and p~ that of a changed pass, at each token

    1.  p(second) < beta p(first): no other token could be accepted; say argmax p
    2.  for each rung of a ladder, strongest first:   p(argmax p~) >= beta max p: say argmax p~
    3.  no rung accepted: say argmax p

A changed pass changes the newest position alone: what a step tried is thrown away, so every earlier position is the model's own.

DIRECTER (arXiv 2603.06745) is that with scaled keys, k_j -> alpha k_j for j in the span, in fewer and fewer layers: all L
candidates, then the L // 2 most sensitive, L // 4, ... The order is found once, at the last token of the prompt: one layer l
alone is steered, and at every layer j are read the input of its attention after the norm (pre) and its output after o_proj
(post). With d the cosine distance, 1 - cos,

    paper            S(l) = mean over j of  d(pre_j, post_j^(l)) - d(pre_j, post_j)  +  d(pre_j^(l), post_j) - d(pre_j, post_j)
    reference_code   S(j) = mean over l of  max(d(pre_j, post_j^(l)), 0)  +  max(d(pre_j^(l), post_j), 0)

"paper" asks how much steering l disturbs all layers, "reference_code" how much layer j is disturbed by the steering of others;
j runs over all layers in the first, over the candidates in the second, l over the candidates. This shares no code with
steerlens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.reference.plain_attention import NOTHING, Change, Spans, attention_pass, scale_keys
from tests.reference.plain_loop import decoder_layers

LogitsAfter = Callable[[Sequence[int], Any], torch.Tensor]
"""From a prefix and a rung, or None for the model as it is, to the logits after the prefix, `[d_vocab]`."""


@dataclass(frozen=True)
class GatedText:
    """What the loop said, and how it came to each token."""

    tokens: list[int]
    gaps: list[float]
    """Per token: the smallest distance of any decision that led to it from going the other way, in logits: the two largest of
    each pass, and how far a probability lies from its threshold, in logarithms."""
    outcomes: list[str]
    """Per token: "skipped" (1.), "accepted" (2.) or "rejected" (3.)."""
    rungs: list[Any]
    """Per token: the rung that was accepted, or None."""
    n_extra: list[int]
    """Per token: changed passes."""


@dataclass(frozen=True)
class Choice:
    """One token of the loop."""

    token: int
    gap: float
    outcome: str
    rung: Any
    n_extra: int


def top_gap(logits: torch.Tensor) -> float:
    """The difference of the two largest logits."""
    first, second = logits.topk(2).values.tolist()
    return first - second


def choose(
    logits_after: LogitsAfter, ids: Sequence[int], rungs: Sequence[Any], *, beta: float, has_top_two_gate: bool = True
) -> Choice:
    """The next token by rules 1 to 3; softmax in float32."""
    raw = logits_after(ids, None).float()
    p = raw.softmax(-1)
    best, second = p.topk(2).values.tolist()
    log_beta = math.log(beta) if beta > 0 else -math.inf
    gaps = [top_gap(raw)]
    if has_top_two_gate:
        gaps.append(abs(top_gap(raw) + log_beta))
        if second < beta * best:
            return Choice(int(raw.argmax()), min(gaps), "skipped", None, 0)
    for n_extra, rung in enumerate(rungs, start=1):
        changed = logits_after(ids, rung).float()
        token = int(changed.argmax())
        gaps.append(top_gap(changed))
        if token != int(raw.argmax()):  # the model's own choice is as plausible as can be, whatever the rounding
            gaps.append(abs(float(raw[token] - raw.max()) - log_beta))
        if float(p[token]) >= beta * best:
            return Choice(token, min(gaps), "accepted", rung, n_extra)
    return Choice(int(raw.argmax()), min(gaps), "rejected", None, len(rungs))


def plain_gate(
    logits_after: LogitsAfter,
    prompt: Sequence[int],
    rungs: Sequence[Any],
    *,
    beta: float,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    has_top_two_gate: bool = True,
) -> GatedText:
    """Token after token by rules 1 to 3, until a stop id or the limit.

    Args:
        logits_after: Called with (ids, rung). For a push of the residual h + c u, with factors of c as rungs, it is
            `plain_logits` with a step at the last position alone.
        rungs: Strongest first. Without any, every token is the model's own.
        has_top_two_gate: False leaves out rule 1, which saves passes; the text is the same.
    """
    chosen: list[Choice] = []
    tokens: list[int] = []
    while len(tokens) < max_new_tokens and (not tokens or tokens[-1] not in stop_ids):
        ids = [*prompt, *tokens]
        chosen.append(choose(logits_after, ids, rungs, beta=beta, has_top_two_gate=has_top_two_gate))
        tokens.append(chosen[-1].token)
    return GatedText(
        tokens,
        [choice.gap for choice in chosen],
        [choice.outcome for choice in chosen],
        [choice.rung for choice in chosen],
        [choice.n_extra for choice in chosen],
    )


# --- which layers --------------------------------------------------------------------------------------------------


def attention_of(block: torch.nn.Module) -> torch.nn.Module:
    """The attention of a block: what is between its norm and its sum with the residual."""
    return next(block.get_submodule(name) for name in ("self_attn", "attn", "attention") if hasattr(block, name))


def pre_and_post(
    plain_model: Any, prompt: Sequence[int], change: Change = NOTHING
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input (after the norm, with its weight) and output (after o_proj) of every attention at the last token.

    Returns:
        Two tensors `[layer, d_model]`, float32.
    """
    pre: list[torch.Tensor] = []
    post: list[torch.Tensor] = []

    def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        normed = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        pre.append(normed[0, -1].float())
        post.append(output[0][0, -1].float())

    handles = [
        attention_of(block).register_forward_hook(hook, with_kwargs=True) for block in decoder_layers(plain_model)
    ]
    try:
        attention_pass(plain_model, prompt, change)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(pre), torch.stack(post)


def cosine_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1 - cos of the angle between rows, `[layer]`."""
    return 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)


def sensitivities(
    plain_model: Any, prompt: Sequence[int], change: Change, layers: Sequence[int], *, ranking: str = "paper"
) -> dict[int, float]:
    """The score of each candidate layer, by one of the two formulas above."""
    pre, post = pre_and_post(plain_model, prompt)
    before = cosine_distance(pre, post)
    direct: list[torch.Tensor] = []
    propagated: list[torch.Tensor] = []
    for layer in layers:
        probed_pre, probed_post = pre_and_post(plain_model, prompt, change.at([layer], newest=True))
        direct.append(cosine_distance(pre, probed_post))
        propagated.append(cosine_distance(probed_pre, post))
    one, other = torch.stack(direct), torch.stack(propagated)  # [probe, layer]
    if ranking == "paper":
        score = ((one - before) + (other - before)).mean(dim=1)
    elif ranking == "reference_code":
        score = (one.clamp(min=0) + other.clamp(min=0)).mean(dim=0)[list(layers)]
    else:
        raise AssertionError(ranking)
    return dict(zip(layers, score.tolist(), strict=True))


def ladder(ranked: Sequence[int], fewest: int) -> list[tuple[int, ...]]:
    """The layer sets that are tried: all, then the first half of them, a quarter, ..., while at least `fewest` are left."""
    sets = []
    n_layers = len(ranked)
    while n_layers >= max(fewest, 1):
        sets.append(tuple(ranked[:n_layers]))
        n_layers //= 2
    return sets


@dataclass(frozen=True)
class DirecterText(GatedText):
    """A gated text, with the layers it tried."""

    scores: dict[int, float]
    """Of each candidate layer."""
    ranking: list[int]
    """The candidates by falling score; of equal scores the earlier layer first."""

    @property
    def n_active(self) -> list[int]:
        """Per token: the number of layers in the accepted set; 0 where none was."""
        return [len(rung or ()) for rung in self.rungs]


def plain_directer(
    plain_model: Any,
    prompt: Sequence[int],
    spans: Spans,
    *,
    alpha: float = 100.0,
    beta: float = 0.5,
    layers: Sequence[int] | None = None,
    ranking: str = "paper",
    fewest: int = 1,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    has_top_two_gate: bool = True,
) -> DirecterText:
    """DIRECTER's text from a model of `load_plain`; the last prompt token's own pass is the first that is steered.

    Args:
        layers: The candidates; None for all layers.
        ranking: "paper" or "reference_code".
        fewest: The size of the smallest set that is tried; the published code never tries one layer, which is 2.
    """
    candidates = sorted(range(len(decoder_layers(plain_model))) if layers is None else layers)
    change = scale_keys(alpha, spans)
    scores = sensitivities(plain_model, prompt, change, candidates, ranking=ranking)
    ranked = sorted(candidates, key=lambda layer: (-scores[layer], layer))
    sets = ladder(ranked, fewest)

    def logits_after(ids: Sequence[int], rung: Any) -> torch.Tensor:
        return attention_pass(plain_model, ids, NOTHING if rung is None else change.at(rung, newest=True)).logits[-1]

    text = plain_gate(
        logits_after,
        prompt,
        sets,
        beta=beta,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        has_top_two_gate=has_top_two_gate,
    )

    def border(layer_set: tuple[int, ...]) -> float:
        """How much more the last layer of a set scores than the first outside it."""
        n = len(layer_set)
        return math.inf if n == len(ranked) else scores[ranked[n - 1]] - scores[ranked[n]]

    gaps = [
        min([gap, *(border(tried) for tried in sets[:n_extra])])
        for gap, n_extra in zip(text.gaps, text.n_extra, strict=True)
    ]
    return DirecterText(text.tokens, gaps, text.outcomes, text.rungs, text.n_extra, scores, ranked)
