"""Steered greedy text the slow way: one prompt, no cache, the whole prefix again for every token, plain PyTorch hooks.

    add             h + c u
    set_projection  h + c (z - h.u) u
    ablate          h - c (h.u) u

on the output of a decoder layer of a Hugging Face model, at one token after another. This is the oracle for every operator,
position rule, batch and cache; it shares no code with steerlens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Rule = str | tuple[str, int | None, int | None]
"""A rule's name, or ("start" | "generation", start, stop) for a half-open window."""


@dataclass(frozen=True)
class Step:
    """One intervention."""

    layer: int
    operator: str
    direction: torch.Tensor
    coeff: float
    target: float = 0.0
    rule: Rule = "all"
    write: torch.Tensor | None = None


@dataclass(frozen=True)
class PlainText:
    """What the loop said."""

    tokens: list[int]
    gaps: list[float]
    """Per token: the difference of the two largest logits it was chosen from."""
    n_steered: int
    """Changes made in the last pass, which holds every token but the last."""


def is_steered(rule: Rule, position: int, prompt_length: int) -> bool:
    """Whether a rule covers a token; positions count the row's own tokens from 0."""
    if rule == "all":
        return True
    if rule == "prompt":
        return position < prompt_length
    if rule == "generated":
        return position >= prompt_length
    if rule == "last":
        return position == prompt_length - 1
    anchor, start, stop = rule
    counted = position - (prompt_length if anchor == "generation" else 0)
    return (start is None or counted >= start) and (stop is None or counted < stop)


def changed(h: torch.Tensor, step: Step) -> torch.Tensor:
    """One token's residual after one step."""
    u = step.direction
    along = float(torch.dot(h, u))
    if step.operator == "add":
        amount = step.coeff
    elif step.operator == "set_projection":
        amount = step.coeff * (step.target - along)
    elif step.operator == "ablate":
        amount = -step.coeff * along
    else:
        raise AssertionError(step.operator)
    return h + amount * (u if step.write is None else step.write)


LAYER_LISTS = (
    "model.layers",
    "model.language_model.layers",
    "model.decoder.layers",
    "gpt_neox.layers",
    "backbone.layers",
    "transformer.h",
    "transformer.blocks",
    "rwkv.blocks",
)
"""Where Hugging Face's decoders keep their blocks."""


def decoder_layers(hf_model: Any) -> Sequence[torch.nn.Module]:
    """The blocks of a decoder."""
    modules = dict(hf_model.named_modules())
    (found,) = (modules[name] for name in LAYER_LISTS if name in modules)
    return found


def plain_logits(
    hf_model: Any, ids: Sequence[int], steps: Sequence[Step], prompt_length: int
) -> tuple[torch.Tensor, int]:
    """Logits after the last token of a steered pass, and how many changes were made."""
    count = 0

    def hook_for(layer: int) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
            nonlocal count
            resid = (output[0] if isinstance(output, tuple) else output).clone()
            for position in range(resid.shape[1]):
                for step in steps:
                    if step.layer == layer and is_steered(step.rule, position, prompt_length):
                        resid[0, position] = changed(resid[0, position], step)
                        count += 1
            return (resid, *output[1:]) if isinstance(output, tuple) else resid

        return hook

    handles = [
        decoder_layers(hf_model)[layer].register_forward_hook(hook_for(layer))
        for layer in sorted({step.layer for step in steps})
    ]
    try:
        with torch.no_grad():
            logits = hf_model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    return logits, count


def plain_greedy(
    hf_model: Any,
    prompt: Sequence[int],
    steps: Sequence[Step] = (),
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
) -> PlainText:
    """The most likely token, again and again, until a stop id or the limit."""

    def after(ids: Sequence[int]) -> tuple[torch.Tensor, int]:
        return plain_logits(hf_model, ids, steps, len(prompt))

    return greedy(after, prompt, max_new_tokens=max_new_tokens, stop_ids=stop_ids)


def greedy(
    after: Callable[[Sequence[int]], tuple[torch.Tensor, int]],
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
) -> PlainText:
    """The most likely token, again and again, of what gives the logits after a prefix, and how many changes were made."""
    tokens: list[int] = []
    gaps: list[float] = []
    n_steered = 0
    while len(tokens) < max_new_tokens and (not tokens or tokens[-1] not in stop_ids):
        logits, n_steered = after([*prompt, *tokens])
        first, second = logits.topk(2).values.tolist()
        tokens.append(int(logits.argmax()))
        gaps.append(first - second)
    return PlainText(tokens, gaps, n_steered)
