"""Sampling text, batched and with a key-value cache, while hooks steer.

One row is one prompt with its plan. Rows are sorted by length, padded on the left, prefilled once and then decoded a token at
a time; rows that wait take the places of those that stop (see `cached`). Rows of one prompt whose plans agree before its last
token (trials; strengths that steer only the last token or the generated ones) share their prefill; others of one prompt share it
up to the layer that tells them apart (see `prefill`).

A steered position is steered when it is computed, and its keys and values are cached
in that state, which is the same as re-running the whole steered prefix for every token (tests/reference/ does that).

A row's text does not depend on its companions: sampling draws each row's uniform numbers from the row's own seed, and picks the
token by inverting the row's cumulative distribution. In floating point another batch may round differently, so where two
tokens are nearly tied (about 1e-4 in logits) the texts can part.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from steerlens._typing import WholeNumber, plain, whole
from steerlens.errors import SteerlensError
from steerlens.models.facts import forbidden_ids, model_device, stop_ids
from steerlens.models.passes import Edit, Runner
from steerlens.models.probe import abilities
from steerlens.models.prompts import PromptFormat, encode_all, pinned, text_list
from steerlens.models.stops import check_stop_ids
from steerlens.steering.batches import Batch, Row, WholeBatch
from steerlens.steering.cached import CachedBatch
from steerlens.steering.edits import check_plan, edited_sites
from steerlens.steering.gated import GatedBatch
from steerlens.steering.generations import Generation, Generations, Token
from steerlens.steering.plan import Plan, as_plan
from steerlens.steering.scores import bind
from steerlens.steering.settings import SamplingConfig, SamplingSettings, sampling_with


def generate(
    model: Any,
    prompts: Iterable[str],
    *,
    steering: Plan | Sequence[Plan] | None = None,
    sampling: SamplingConfig = SamplingConfig(),
    seed: WholeNumber | Iterable[WholeNumber] = 0,
    batch_size: int = 16,
    prompt_format: PromptFormat = PromptFormat(),
    edits: Sequence[Edit] = (),
    progress: bool = False,
    **settings: Unpack[SamplingSettings],
) -> Generations:
    """One continuation per prompt, in the prompts' order.

    Args:
        steering: One plan for all prompts, or one per prompt; None is no steering.
        sampling: How tokens are chosen, and when a row stops.
        seed: One seed for all rows, or one per row: it decides the random number of each of the row's tokens, and nothing
            where decoding is greedy. Rows with the same prompt, plan and seed get the same text.
        prompt_format: Chat template or plain; see `PromptFormat`.
        edits: More that is done in every pass, after the plans' steps; the rows of each edit are the prompts, in their order.
        progress: Show tokens per second and the time left.
        settings: Fields of `sampling` by name: max_new_tokens, temperature, top_k, top_p, stop, stop_ids.

    Raises:
        SteerlensError: if a prompt does not fit the context, a setting is out of range, or a plan does not fit the model.

    Example:
        >>> generate(model, ["What colour is snow?"], steering=vector.at(4), max_new_tokens=8)[0].finish_reason
        'length'
    """
    sampling = sampling_with(sampling, settings)
    job = _Job(model, prompts, steering, sampling, seed, batch_size, prompt_format, edits)
    finished: list[Generation] = []
    with Progress(len(job.rows), sampling.max_new_tokens, disable=not progress) as bar, job.runner:
        while job.left:
            finished += job.advance(bar)
    return Generations(sorted(finished, key=lambda generation: generation.index), job.prompts, job.runner.used)


def stream(
    model: Any,
    prompts: Iterable[str],
    *,
    steering: Plan | Sequence[Plan] | None = None,
    sampling: SamplingConfig = SamplingConfig(),
    seed: WholeNumber | Iterable[WholeNumber] = 0,
    batch_size: int = 16,
    prompt_format: PromptFormat = PromptFormat(),
    progress: bool = False,
    **settings: Unpack[SamplingSettings],
) -> Iterator[Generation]:
    """Continuations as they finish, in no fixed order; `generate` with results handed out early.

    Hooks are on the model only while rows are decoded, never while a result is in the caller's hands: the model may be used
    between two results, and stopping early, an exception or Ctrl-C leave nothing behind.

    Args:
        steering, sampling, seed, prompt_format, progress, settings: As in `generate`.

    Returns:
        An iterator of rows; `index` is each row's place in the prompts.

    Raises:
        SteerlensError: as for `generate`.

    Example:
        >>> sorted(row.index for row in stream(model, queries, max_new_tokens=4))
        [0, 1, 2]
    """
    sampling = sampling_with(sampling, settings)
    job = _Job(model, prompts, steering, sampling, seed, batch_size, prompt_format)
    with Progress(len(job.rows), sampling.max_new_tokens, disable=not progress) as bar:
        while job.left:
            with job.runner:
                finished = job.advance(bar)
            yield from finished


def stream_tokens(
    model: Any,
    prompts: Iterable[str],
    *,
    steering: Plan | Sequence[Plan] | None = None,
    sampling: SamplingConfig = SamplingConfig(),
    seed: WholeNumber | Iterable[WholeNumber] = 0,
    batch_size: int = 16,
    prompt_format: PromptFormat = PromptFormat(),
    **settings: Unpack[SamplingSettings],
) -> Iterator[Token | Generation]:
    """Each token as it is sampled, and a row's whole continuation once it stops: the same rows as `generate`'s.

    Hooks are on the model only while a token is computed, never while one is in the caller's hands, so closing the iterator
    early is a way to cancel.

    Args:
        steering, sampling, seed, prompt_format, settings: As in `generate`.

    Returns:
        An iterator: a token of every row of a batch, then those of its rows that stopped with it, and so on.

    Raises:
        SteerlensError: as for `generate`.

    Example:
        >>> [type(one).__name__ for one in stream_tokens(model, ["What is iron?"], max_new_tokens=2)]
        ['Token', 'Token', 'Generation']
    """
    sampling = sampling_with(sampling, settings)
    job = _Job(model, prompts, steering, sampling, seed, batch_size, prompt_format)
    said: list[Token] = []

    def hear(rows: Sequence[Row], logits: Float[Tensor, "row d_vocab"]) -> None:
        last = torch.tensor([row.tokens[-1] for row in rows], device=logits.device)
        log_probs = logits.float().log_softmax(-1).gather(1, last[:, None])[:, 0].tolist()
        said[:] = [Token(row.index, row.tokens[-1], value) for row, value in zip(rows, log_probs, strict=True)]

    job.hear = hear
    with Progress(len(job.rows), sampling.max_new_tokens, disable=True) as bar:
        while job.left:
            with job.runner:
                finished = job.step(bar)
            yield from said
            yield from finished


def per_row(value: Any, n_rows: int, name: str) -> list[Any]:
    """One value per row, from one for all or a sequence of the right length."""
    if not isinstance(value, Sequence):  # nor is a plan one
        return [value] * n_rows
    if len(value) != n_rows:
        raise SteerlensError(
            f"{name} must be one for all prompts or one per prompt, got {len(value)} for {n_rows} prompts"
        )
    return list(value)


class Progress:
    """A bar over new tokens: rate, time left, rows done. Tokens that a stopped row did not need leave the total."""

    def __init__(self, n_rows: int, max_new_tokens: int, *, disable: bool) -> None:
        self.budget, self.n_rows, self.done = max_new_tokens, n_rows, 0
        self.bar = tqdm(total=n_rows * max_new_tokens, desc="generate", unit="tok", disable=disable)

    def step(self, n_rows: int) -> None:
        self.bar.update(n_rows)

    def finish(self, n_tokens: int) -> None:
        self.done += 1
        if self.bar.total:
            self.bar.total -= self.budget - n_tokens
        self.bar.set_postfix_str(f"{self.done}/{self.n_rows} rows", refresh=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


class _Job:
    """One request: its rows in batches, and the hooks that serve them all."""

    def __init__(
        self,
        model: Any,
        prompts: Iterable[str],
        steering: Any,
        sampling: SamplingConfig,
        seed: WholeNumber | Iterable[WholeNumber],
        batch_size: int,
        prompt_format: PromptFormat,
        edits: Sequence[Edit] = (),
    ) -> None:
        self.prompts = text_list(prompts)
        n_rows = len(self.prompts)
        plans = [as_plan(one) for one in per_row(Plan() if steering is None else steering, n_rows, "steering")]
        seeds = [whole(one, "seed") for one in per_row(plain(seed), n_rows, "seed")]
        for value in seeds:
            if not 0 <= value < 2**63:
                raise SteerlensError(f"seed must be in [0, 2**63), got {value}")
        for plan in {id(plan): plan for plan in plans}.values():
            check_plan(model, plan)
        check_stop_ids(model, sampling.stop_ids)
        prompt_format = pinned(model, prompt_format)
        encoded = encode_all(model, self.prompts, prompt_format, room=sampling.max_new_tokens)
        self.model, self.sampling, self.stops, self.more_edits = model, sampling, stop_ids(model), tuple(edits)
        # A vocabulary may be padded beyond its tokenizer, and what is no token is no text.
        self.forbidden = torch.tensor(forbidden_ids(model), dtype=torch.long, device=model_device(model))
        # Each plan as it acts, and where: what does nothing, such as a gate that lets nothing pass, is left out here.
        acting = [
            bind(model, plan.active, prompt, prompt_format, what=f"row {row}")
            for row, (plan, prompt) in enumerate(zip(plans, self.prompts, strict=True))
        ]
        self.rows = [Row(i, ids, acting[i].active, seeds[i], sampling) for i, ids in enumerate(encoded)]
        longest = max((len(row.prompt) for row in self.rows), default=0)
        self.able = abilities(model, longest + sampling.max_new_tokens) if self.rows else None
        order, self.batch_size = self._order(batch_size)
        gated, plain_ = ([row for row in order if (row.plan.gate is None) == alone] for alone in (False, True))
        self.waiting = [rows for rows in (gated, plain_) if rows]
        """Rows of each kind; both are taken from the end, the longest first."""
        self.batch: Batch | None = None
        self.hear: Callable[[Sequence[Row], Tensor], None] | None = None
        """Is told the rows of every step, with their new tokens, and the model's logits before these."""
        sites = edited_sites(model, acting)
        self.runner = Runner(model, sites | {edit.site for edit in self.more_edits})

    def _order(self, batch_size: int) -> tuple[list[Row], int]:
        """The rows, the shortest first, those of one prompt side by side; and how many are decoded together."""
        if self.able is None:
            return [], batch_size
        batches = self.able.batches([len(row.prompt) for row in self.rows], batch_size)
        first: dict[tuple[int, ...], int] = {}
        key = {i: (-len(row.prompt), first.setdefault(tuple(row.prompt), i), i) for i, row in enumerate(self.rows)}
        return [self.rows[i] for i in sorted(key, key=key.__getitem__, reverse=True)], len(batches[0])

    @property
    def left(self) -> bool:
        return bool(self.waiting or self.batch)

    def advance(self, bar: "Progress") -> list[Generation]:
        """Decode, inside the runner's block, until at least one row stops; those rows leave their batch."""
        finished: list[Generation] = []
        while not finished:
            finished = self.step(bar)
        return finished

    def step(self, bar: "Progress") -> list[Generation]:
        """One token more, inside the runner's block, for every row of a batch; the rows that stop leave it."""
        if self.batch is None:
            self.batch = self._next_batch()
        finished, n_tokens = self.batch.step()
        bar.step(n_tokens)
        if not self.batch.n_left:
            self.batch = None
            self.waiting = [rows for rows in self.waiting if rows]
        for generation in finished:
            bar.finish(len(generation.tokens))
        return finished

    def _next_batch(self) -> Batch:
        waiting = self.waiting[-1]
        rows = [waiting.pop() for _ in range(min(self.batch_size, len(waiting)))]
        able = self.able
        assert able is not None
        if rows[0].plan.gate is not None:
            return GatedBatch(self, rows, cached=able.cache, together=able.batch)
        return CachedBatch(self, rows, waiting) if able.cache else WholeBatch(self, rows)
