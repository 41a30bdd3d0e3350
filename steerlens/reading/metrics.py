"""What is measured at the end of a patched run: a number of its next-token logits, or whether its text follows the instruction.

kl                 KL(instructed || patched) = sum over tokens of p log(p / q), in nats; 0 for the instructed run itself
logit_difference   logit(first) - logit(second)
followed           1 where the text that goes on from the patched prompt follows, loosely, as in an evaluation; else 0
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlens._typing import WholeNumber, several
from steerlens.checks.registry import check_all
from steerlens.data.pairs import InstructionPair
from steerlens.errors import SteerlensError
from steerlens.models.prompts import PromptFormat
from steerlens.reading.patches import NOTHING, Cell, PatchedRuns
from steerlens.reading.words import single_token
from steerlens.steering.sampling import generate
from steerlens.steering.settings import SamplingConfig

METRICS = ("kl", "logit_difference", "followed")

Metric = Callable[[Float[Tensor, "row d_vocab"]], Float[Tensor, " row"]]
"""A caller's number for the next-token logits of each row."""

Taken = tuple[Float[np.ndarray, " cell"], Float[np.ndarray, "pair 2"]]
"""The metric of each cell, and of each pair's plain and instructed run."""
Measure = Callable[[Float[Tensor, "row d_vocab"], Int[Tensor, " row"]], Float[Tensor, " row"]]
"""A number for the logits of each row, and the pair it is of."""


def measured(
    metric: str | Metric,
    tokens: Sequence[int] | None,
    runs: PatchedRuns,
    pairs: Sequence[InstructionPair],
    cells: Sequence[Cell],
) -> Taken:
    """A metric of next-token logits."""
    measure, every = _measure(metric, tokens, runs), torch.arange(len(pairs))
    ends = torch.stack([measure(runs.plain_logits, every), measure(runs.instructed_logits, every)], dim=1)
    found = np.full(len(cells), np.nan)
    for places, logits in runs.logits(cells):
        found[places] = measure(logits, torch.tensor([cells[place].pair for place in places])).numpy()
    return found, ends.double().numpy()


def _measure(metric: str | Metric, tokens: Sequence[int] | None, runs: PatchedRuns) -> Measure:
    if metric == "kl":
        instructed = runs.instructed_logits.log_softmax(-1)
        return lambda logits, pair: _kl(instructed[pair], logits.log_softmax(-1))
    if metric == "logit_difference":
        first, second = runs.instructed_logits.argmax(-1), runs.plain_logits.argmax(-1)
        if tokens is not None:
            first, second = (torch.full_like(first, token) for token in tokens)
        return lambda logits, pair: _logit_difference(logits, first[pair], second[pair])
    assert callable(metric)
    return lambda logits, _: _of_caller(metric, logits)


def _kl(p: Float[Tensor, "row d_vocab"], q: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
    """KL(p || q) of log probabilities, in nats."""
    return (p.exp() * (p - q)).sum(-1)


def _logit_difference(
    logits: Float[Tensor, "row d_vocab"], first: Int[Tensor, " row"], second: Int[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """The first token's logit minus the second's; nan where they are one token, which leaves nothing to restore."""
    found = logits.gather(-1, torch.stack([first, second], dim=1))
    return torch.where(first == second, torch.nan, found[:, 0] - found[:, 1])


def _of_caller(metric: Metric, logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
    found = torch.as_tensor(metric(logits)).detach().float().cpu()
    if found.shape != logits.shape[:1]:
        raise SteerlensError(
            f"a metric must give one number for each of {len(logits)} rows of logits, got shape {list(found.shape)}; keep the "
            "first axis, as in logits[:, token]"
        )
    return found


def followed(
    sampling: SamplingConfig,
    batch_size: int,
    prompt_format: PromptFormat,
    runs: PatchedRuns,
    pairs: Sequence[InstructionPair],
    cells: Sequence[Cell],
) -> Taken:
    """Whether each text follows its pair's instruction: the prompt is patched, and the text goes on from it as usual."""
    nothing = [Cell(place, NOTHING, 0, 0) for place in range(len(pairs))]
    rows = [*cells, *nothing, *nothing]  # the last with the instruction in the prompt
    conditions = ["none"] * (len(cells) + len(pairs)) + ["text"] * len(pairs)
    texts = generate(
        runs.model,
        [pairs[cell.pair].text(condition) for cell, condition in zip(rows, conditions, strict=True)],
        edits=runs.edits(rows),
        sampling=sampling,
        batch_size=batch_size,
        prompt_format=prompt_format,
    ).texts
    found = np.array([_follows(text, pairs[cell.pair]) for text, cell in zip(texts, rows, strict=True)], dtype=float)
    return found[: len(cells)], found[len(cells) :].reshape(2, len(pairs)).T


def _follows(text: str, pair: InstructionPair) -> bool:
    return all(verdict.loose for verdict in check_all(text, pair.instruction_ids, pair.kwargs))


def compared_tokens(model: Any, tokens: Sequence[str | WholeNumber]) -> list[int]:
    """The ids of the tokens whose logits are compared.

    Raises:
        SteerlensError: if they are not two, or one is not one token of the tokenizer.
    """
    found = [single_token(model, token) for token in several(tokens)]
    if len(found) != 2 or found[0] == found[1]:
        raise SteerlensError(f'tokens must be two that differ, such as (" yes", " no"), got {tokens!r}')
    return found
