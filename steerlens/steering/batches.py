"""Rows on their way, and batches of them that are decoded together; see `sampling`.

    WholeBatch    every row is run whole for every token
    CachedBatch   one token a step, with a key-value cache; see `cached`
    GatedBatch    the same, with trials beside it; see `gated`

What a batch does at a step is to give each row's logits; choosing from them, and when a row stops, is the same for all.
"""

from collections.abc import Callable, Sequence, Set
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlens.models.passes import Edit, Runner
from steerlens.models.probe import Abilities
from steerlens.models.rows import pad, pad_id
from steerlens.models.stops import before_stop, decode
from steerlens.steering.edits import plan_edits
from steerlens.steering.gates import GatedToken
from steerlens.steering.generations import FinishReason, Generation
from steerlens.steering.plan import Plan, Step
from steerlens.steering.settings import SamplingConfig


@runtime_checkable
class Job(Protocol):
    """What the batches of one request share."""

    model: Any
    runner: Runner
    sampling: SamplingConfig
    stops: tuple[int, ...]
    forbidden: Int[Tensor, " token"]
    more_edits: tuple[Edit, ...]
    hear: Callable[[Sequence["Row"], Tensor], None] | None
    able: Abilities | None


class Row:
    """One row on its way."""

    def __init__(self, index: int, prompt: list[int], plan: Plan, seed: int, sampling: SamplingConfig) -> None:
        self.index, self.prompt, self.plan, self.seed = index, prompt, plan, seed
        self.tokens: list[int] = []
        self.gated: list[GatedToken] = []
        self.uniforms = _uniforms(seed, sampling.max_new_tokens) if sampling.temperature > 0 else None

    @cached_property
    def always(self) -> list[tuple[Step, str, int, int]]:
        """What always acts on it: the step, its digest, and from which position on and up to which one it acts."""
        return [(step, Plan((step,)).digest, *step.bounds(len(self.prompt))) for step in self.plan.active.interventions]

    def finished(self, tokenizer: Any, sampling: SamplingConfig, stops: tuple[int, ...]) -> Generation | None:
        """The finished row, or None while it goes on."""
        before = before_stop(tokenizer, self.tokens, sampling.stop) if sampling.stop else None
        if self.tokens[-1] in stops:
            # Not every stop id is a special token of its tokenizer, so the text leaves the last one out by itself.
            return self._generation(decode(tokenizer, self.tokens[:-1]), "eos")
        if before is not None:
            return self._generation(before, "stop")
        if self.tokens[-1] in sampling.stop_ids:
            return self._generation(decode(tokenizer, self.tokens[:-1]), "stop")
        if len(self.tokens) >= sampling.max_new_tokens:
            return self._generation(decode(tokenizer, self.tokens), "length")
        return None

    def _generation(self, text: str, reason: FinishReason) -> Generation:
        computed = len(self.prompt) + len(self.tokens) - 1  # the last token is never fed
        steered = sum(token.n_layers > 0 for token in self.gated)
        for step in self.plan.active.interventions:
            low, high = step.bounds(len(self.prompt))
            steered += max(0, min(high, computed) - low)
        ids, gated = (tuple(self.prompt), tuple(self.tokens)), tuple(self.gated)
        return Generation(self.index, text, *ids, reason, self.seed, steered, gated)


def _uniforms(seed: int, count: int) -> Float[Tensor, " count"]:
    """A row's random numbers, all drawn before it begins, on the CPU: neither its companions nor the device change them."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Batch:
    """Rows that are decoded together."""

    def __init__(self, job: Job, rows: list[Row]) -> None:
        self.job, self.runner, self.model, self.rows = job, job.runner, job.model, rows
        self.edits: Sequence[Edit] = edits_of(job, rows)

    @property
    def n_left(self) -> int:
        """How many rows have not stopped."""
        return len(self.rows)

    @torch.inference_mode()
    def step(self) -> tuple[list[Generation], int]:
        """One token more for every row, or under a gate for some; rows that stop leave the batch. Also the number of tokens."""
        places, logits = self.next_logits()
        rows = [self.rows[place] for place in places]
        stopped: dict[int, Generation] = {}
        for place, row, token in zip(places, rows, self.choose(self.allowed(logits), rows).tolist(), strict=True):
            row.tokens.append(token)
            finished = row.finished(self.model.tokenizer, self.job.sampling, self.job.stops)
            if finished is not None:
                stopped[place] = finished
        if self.job.hear is not None:
            self.job.hear(rows, logits)
        if stopped:
            self.leave(set(stopped))
        return list(stopped.values()), len(places)

    def choose(self, logits: Float[Tensor, "row d_vocab"], rows: Sequence[Row]) -> Int[Tensor, " row"]:
        """The next token of some of the rows, from logits of what may be said."""
        return choose(logits, self.job.sampling, _draws(rows, logits.device))

    def allowed(self, logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, "row d_vocab"]:
        """The logits, of which those of what is no text are minus infinity."""
        return logits.index_fill(-1, self.job.forbidden, float("-inf")) if len(self.job.forbidden) else logits

    def next_logits(self) -> tuple[Sequence[int], Float[Tensor, "some d_vocab"]]:
        """The places of the rows that get a token now, in order, and the logits that it is chosen from."""
        raise NotImplementedError

    def leave(self, places: Set[int]) -> None:
        """Rows that stopped leave their places to the others."""
        stay = [place for place in range(len(self.rows)) if place not in places]
        self.rows = [self.rows[place] for place in stay]
        keep = torch.tensor(stay, dtype=torch.long)
        self.edits = [edit.select(keep) for edit in self.edits]
        if self.rows:
            self.select(keep)

    def select(self, keep: Int[Tensor, " kept"]) -> None:
        """Keep some rows of what is held between steps."""
        raise NotImplementedError


def edits_of(job: Job, rows: Sequence[Row]) -> list[Edit]:
    """What always acts on some rows."""
    steered = plan_edits(job.model, [row.plan.interventions for row in rows], [len(row.prompt) for row in rows])
    chosen = torch.tensor([row.index for row in rows], dtype=torch.long)
    return [*steered, *(edit.select(chosen) for edit in job.more_edits)]


class WholeBatch(Batch):
    """Every row is run whole for every token: for models whose cache, or padding on the left, gives something else."""

    def next_logits(self) -> tuple[Sequence[int], Float[Tensor, "row d_vocab"]]:
        ids = [[*row.prompt, *row.tokens] for row in self.rows]
        lengths = [len(row.prompt) for row in self.rows]
        whole = pad(ids, side="right", pad_id=pad_id(self.model), prompt_lengths=lengths)
        return range(len(self.rows)), self.runner.run(whole, edits=self.edits).logits

    def select(self, keep: Int[Tensor, " kept"]) -> None:
        pass


def _draws(rows: Sequence[Row], device: torch.device) -> Float[Tensor, " batch"] | None:
    """This step's uniform number of each row; None when greedy."""
    drawn = [row.uniforms[len(row.tokens)] for row in rows if row.uniforms is not None]
    return torch.stack(drawn).to(device) if drawn else None


def choose(
    logits: Float[Tensor, "batch d_vocab"],
    sampling: SamplingConfig,
    uniforms: Float[Tensor, " batch"] | None,
) -> Int[Tensor, " batch"]:
    """The next token of each row: the most likely one, or the one at `uniforms` of the row's cumulative distribution.

    Tokens are ordered by probability, cut by top-k and then top-p, and the row's number in [0, 1) is inverted over what is left.
    """
    if sampling.temperature == 0 or uniforms is None:
        if logits.device.type == "cpu" and logits.dtype == torch.float32:
            return torch.from_numpy(logits.numpy().argmax(-1))  # a tenth of the time that torch takes on a processor
        return logits.argmax(-1)
    # In float32 the rarest of a wide vocabulary add nothing to a cumulative sum, and could not be drawn.
    ordered, order = (logits.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ordered, order = ordered[:, : sampling.top_k], order[:, : sampling.top_k]
    probabilities = ordered.softmax(-1)
    # A token stays while those before it fall short of p: the one that reaches p is the last, and the first always stays.
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities * (before < sampling.top_p)
    # What is left sums to less than one, so the row's number is scaled to it; rounding may bring that up to the sum itself.
    cumulative = probabilities.cumsum(-1)
    picked = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(-1).clamp(max=order.shape[1] - 1)
    chosen: Tensor = order.gather(-1, picked[:, None])[:, 0]
    return chosen
