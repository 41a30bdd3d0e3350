"""Residuals and mean differences the slow way: one prompt at a time through a raw Hugging Face model, sums in float64.

A plain forward hook on a decoder layer reads its output at the last token. (The model's own `hidden_states` would do for all
layers but the last, which they hold only after the final norm.)
"""

from collections.abc import Sequence
from typing import Any

import torch

from tests.reference.plain_loop import decoder_layers


def last_residuals(hf_model: Any, ids: Sequence[int]) -> torch.Tensor:
    """The output of every decoder layer at the last token, `[layer, d_model]`, float64."""
    found: list[torch.Tensor] = []

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        resid = output[0] if isinstance(output, tuple) else output
        found.append(resid[0, -1].double())

    handles = [layer.register_forward_hook(hook) for layer in decoder_layers(hf_model)]
    try:
        with torch.no_grad():
            hf_model(torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found)


def mean_difference(hf_model: Any, without: Sequence[Sequence[int]], with_: Sequence[Sequence[int]]) -> torch.Tensor:
    """`mean(h with) - mean(h without)` of every layer, `[layer, d_model]`, float64."""
    means = []
    for side in (with_, without):
        total = torch.zeros(())
        for ids in side:
            total = total + last_residuals(hf_model, ids)
        means.append(total / len(side))
    return means[0] - means[1]
