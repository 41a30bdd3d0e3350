"""Patching the slow way: a raw Hugging Face model, one prompt, one run per cell, plain PyTorch hooks; no code of steerlens."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.reference.plain_loop import decoder_layers


def site_module(hf_model: Any, layer: int, site: str) -> torch.nn.Module:
    """What writes the activation: the block, its attention or its MLP."""
    block = decoder_layers(hf_model)[layer]
    names = {"resid": ("",), "attn": ("self_attn", "attn"), "mlp": ("mlp",)}[site]
    return next(block.get_submodule(name) for name in names if name == "" or hasattr(block, name))


def _hooked(hf_model: Any, ids: Sequence[int], module: torch.nn.Module, change: Callable[[torch.Tensor], None]) -> Any:
    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        activation = (output[0] if isinstance(output, tuple) else output).clone()
        change(activation)
        return (activation, *output[1:]) if isinstance(output, tuple) else activation

    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            return hf_model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    finally:
        handle.remove()


def read_at(hf_model: Any, ids: Sequence[int], layer: int, site: str, offset: int) -> torch.Tensor:
    """The activation at a position counted from the end."""
    found = []
    _hooked(hf_model, ids, site_module(hf_model, layer, site), lambda activation: found.append(activation[0, offset]))
    return found[0]


def patched_logits(
    hf_model: Any, base: Sequence[int], value: torch.Tensor, layer: int, site: str, position: int
) -> torch.Tensor:
    """Logits after the last token, with the value in the place of the activation at a position, counted from the first token."""

    def write(activation: torch.Tensor) -> None:
        activation[0, position] = value

    return _hooked(hf_model, base, site_module(hf_model, layer, site), write)


def patched_greedy(
    hf_model: Any,
    prompt: Sequence[int],
    value: torch.Tensor,
    layer: int,
    site: str,
    position: int,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
) -> tuple[list[int], list[float]]:
    """Greedy tokens after the patched prompt, the whole prefix again for every token, and the gaps they were chosen by."""
    tokens: list[int] = []
    gaps: list[float] = []
    while len(tokens) < max_new_tokens and (not tokens or tokens[-1] not in stop_ids):
        logits = patched_logits(hf_model, [*prompt, *tokens], value, layer, site, position)
        first, second = logits.topk(2).values.tolist()
        tokens.append(int(logits.argmax()))
        gaps.append(first - second)
    return tokens, gaps
