"""One forward pass with its key-value cache."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from steerlens.models.facts import model_device


def forward(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch past_and_pos"],
    cache: Any = None,
) -> tuple[Float[Tensor, "batch d_vocab"], Any]:
    """Logits after the last column, and the key-value cache to go on from (a new one where none was given).

    Columns hidden by the mask do not count as positions, wherever they stand.
    """
    device = model_device(model)
    options: dict[str, Any] = {"use_cache": True}
    if cache is not None:
        options["past_key_values"] = cache
    if _keeps_logits(type(getattr(model, "original_model", model)).forward):
        options["logits_to_keep"] = 1
    logits, cache = model(
        tokens.to(device), attention_mask=attention_mask.to(device), return_type="logits_and_cache", **options
    )
    return logits[:, -1], cache


@functools.cache
def _keeps_logits(model_forward: Callable[..., Any]) -> bool:
    """Whether a Hugging Face model can leave out the logits of all but the last position."""
    return "logits_to_keep" in inspect.signature(model_forward).parameters
