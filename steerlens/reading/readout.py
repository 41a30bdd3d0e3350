"""From a residual to logits: the model's own final norm, unembedding and softcap, through which every lens reads.

    logits = cap(norm(x) @ W_U + b_U)

TransformerLens' `logit_readout` is the kernel: it runs the model's own norm, and what the model does to its logits. It selects
top tokens or targets, one of the two per call; here both are taken from one product, so it is asked for the whole vocabulary, a
chunk of rows at a time: no `[layer, d_vocab]` table of a whole prompt or of many vectors is ever made.

That a model's logits are this function of its last block's output is no law: it is checked once on the model itself, and a model
for which it does not hold is refused (projections after the last block, several residual streams, logits that are scaled in a way
unknown to TransformerLens).
"""

import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlens.errors import ModelError
from steerlens.models.backends import evaluation_mode
from steerlens.models.facts import model_id, resid_post, tolerance
from steerlens.models.passes import Read, run_pass
from steerlens.models.probe import SHORTEST
from steerlens.models.rows import pad

CHUNK_MEMORY = 2**26
"""Bytes that the float32 logits of one chunk may take: a vocabulary is wide."""

_CHECKED: "WeakKeyDictionary[Any, set[Any]]" = WeakKeyDictionary()
"""Model -> the (dtype, device) in which its readout was found to be right."""


def iter_logits(
    model: Any, resid: Float[Tensor, "n d_model"], *, raw: bool = False, parts: int = 1
) -> Iterator[tuple[slice, Float[Tensor, "chunk d_vocab"]]]:
    """Which of the rows, and their logits in float32 on the model's device, a chunk at a time; of a model that was checked.

    Args:
        raw: Only `x @ W_U`: without norm, bias and softcap.
        parts: As many chunks at least. The kernel holds some four copies of a chunk, for entropies.
    """
    readout = _kernel()
    step = max(1, min(CHUNK_MEMORY // (4 * int(model.cfg.d_vocab)), len(resid) // parts))
    for start in range(0, len(resid), step):
        rows = resid[start : start + step]
        if raw:
            with torch.no_grad():
                logits = rows.to(model.W_U.device, model.W_U.dtype) @ model.W_U
        else:
            with evaluation_mode(model):
                logits = readout(model, rows, chunk_size=len(rows)).values
        yield slice(start, start + len(rows)), logits.float()


def ranks(values: Float[Tensor, "n d_vocab"], at: Float[Tensor, "n target"]) -> Int[Tensor, "n target"]:
    """How many values of its row are larger than each of these; 0 for the largest."""
    # One target at a time: side by side they would be a [n, target, d_vocab] table.
    above = [(values > one[:, None]).sum(-1) for one in at.T]
    return torch.stack(above, dim=1) if above else torch.zeros_like(at, dtype=torch.long)


def check_readout(model: Any) -> None:
    """Refuse a model whose logits are not the readout of its last block's output; tried once, on a few random tokens.

    Raises:
        ModelError: saying what differs.
    """
    weights = next(model.parameters())
    key = (weights.dtype, weights.device)
    known = _CHECKED.setdefault(model, set())
    if key in known:
        return
    readout, name = _kernel(), model_id(model)
    limit = min(int(model.cfg.d_vocab), len(model.tokenizer))
    length = min(SHORTEST, int(model.cfg.n_ctx))
    tokens = torch.randint(limit, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    site = resid_post(int(model.cfg.n_layers) - 1)
    found = run_pass(model, pad([tokens]), reads=[Read(site, "all")], logits="all")
    try:
        with evaluation_mode(model):
            logits = readout(model, found.reads[site]).values
    except (ValueError, TypeError, NotImplementedError) as error:  # its refusals
        raise ModelError(
            f"a lens needs a model whose last residual goes through one norm and one unembedding, and {name}'s does not: {error}"
        ) from error
    # A model in compatibility mode has logits that are centred, and others that are as likely.
    ours, own = (part.float().cpu().log_softmax(-1) for part in (logits, found.logits))
    worst, spread = float((ours - own).abs().max()), float((own - own.mean(-1, keepdim=True)).abs().max())
    if not worst <= tolerance(model) * spread:
        raise ModelError(
            f"a lens reads the last residual through the final norm and the unembedding, and for {name} that misses the model's "
            f"own log-probabilities by up to {worst:.3g} of {spread:.3g}; a lens of this model would show another model"
        )
    known.add(key)


def _kernel() -> Callable[..., Any]:
    try:
        from transformer_lens.tools.analysis.logit_lens import logit_readout
    except ImportError as error:
        version = importlib.metadata.version("transformer-lens")
        raise ModelError(
            f"a lens needs the readout that TransformerLens has since version 4.3, got {version}; install a newer one"
        ) from error
    kernel: Callable[..., Any] = logit_readout
    return kernel
