"""Sampling text, batched and with a key-value cache, while hooks steer.

One row is one prompt with its plan. Rows are sorted by length, padded on the left, prefilled once and then decoded a token at
a time; a row that stops leaves the batch. Rows of one prompt whose plans agree before its last token (trials; strengths that
steer only the last token or the generated ones) share their prefill.

A steered position is steered when it is computed, and its keys and values are cached
in that state, which is the same as re-running the whole steered prefix for every token (tests/reference/ does that).

A row's text does not depend on its companions: sampling draws each row's uniform numbers from the row's own seed, and picks the
token by inverting the row's cumulative distribution. In floating point another batch may round differently, so where two
tokens are nearly tied (about 1e-4 in logits) the texts can part.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack, overload

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from steerlens._typing import WholeNumber, plain, whole
from steerlens.errors import SteerlensError
from steerlens.models.backends import Cache
from steerlens.models.facts import forbidden_ids, model_device, resid_post, stop_ids
from steerlens.models.passes import Edit, Runner
from steerlens.models.probe import abilities
from steerlens.models.prompts import PromptFormat, encode_all, text_list
from steerlens.models.rows import pad, pad_id
from steerlens.models.stops import before_stop, check_stop_ids, decode
from steerlens.steering.plan import Plan, as_plan
from steerlens.steering.residual import check_plan, residual_edits
from steerlens.steering.settings import SamplingConfig, SamplingSettings, sampling_with

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Token:
    """One sampled token, as soon as it is there.

    Example:
        >>> next(stream_tokens(model, ["What is iron?"], max_new_tokens=4)).index
        0
    """

    index: int
    """Its row's place in the request."""
    id: int
    log_prob: float
    """Of the token after what stands before it, in the model as it ran, steered or not, at temperature 1; in nats."""


@dataclass(frozen=True)
class Generation:
    """One sampled continuation.

    Example:
        >>> generate(model, ["What is iron?"], max_new_tokens=4)[0].index
        0
    """

    index: int
    """The row's place in the request."""
    text: str
    """The new text, without special tokens and without a stop text."""
    prompt_tokens: tuple[int, ...]
    """The ids that were fed to the model."""
    tokens: tuple[int, ...]
    """The new ids, the stopping one included."""
    finish_reason: FinishReason
    seed: int
    n_steered: int
    """How many (position, intervention) places of this row were steered."""


class Generations(Sequence[Generation]):
    """Continuations in their prompts' order; shows prompt and text in a notebook.

    >>> rows = generate(model, ["What colour is snow?", "What is iron?"], max_new_tokens=8)
    >>> len(rows), len(rows[:1]), rows.texts == [row.text for row in rows]
    (2, 1, True)
    """

    def __init__(self, rows: Sequence[Generation], prompts: Sequence[str]) -> None:
        self._rows, self.prompts = tuple(rows), tuple(prompts)

    @property
    def texts(self) -> list[str]:
        """The new text of each prompt."""
        return [row.text for row in self]

    def to_frame(self) -> pd.DataFrame:
        """One row per continuation: prompt, text, n_tokens, finish_reason, seed, n_steered."""
        columns = ["prompt", "text", "n_tokens", "finish_reason", "seed", "n_steered"]
        values = [
            (prompt, row.text, len(row.tokens), row.finish_reason, row.seed, row.n_steered)
            for prompt, row in zip(self.prompts, self, strict=True)
        ]
        return pd.DataFrame(values, columns=columns)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Generation: ...
    @overload
    def __getitem__(self, index: slice) -> "Generations": ...
    def __getitem__(self, index: int | slice) -> "Generation | Generations":
        if isinstance(index, slice):
            return Generations(self._rows[index], self.prompts[index])
        return self._rows[index]

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Generations | list) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # compared by content, as a list is

    def _repr_html_(self) -> str:
        with pd.option_context("display.max_colwidth", None):
            return str(self.to_frame()[["prompt", "text", "finish_reason"]].to_html(index=False))

    def __repr__(self) -> str:
        lines = [f"  {prompt[:40]!r} -> {row.text[:60]!r}" for prompt, row in zip(self.prompts[:5], self, strict=False)]
        return "\n".join([f"Generations({len(self)} texts)", *lines, *(["  …"] if len(self) > 5 else [])])


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
    return Generations(sorted(finished, key=lambda generation: generation.index), job.prompts)


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

    def hear(rows: Sequence[_Row], logits: Float[Tensor, "row d_vocab"]) -> None:
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


class _Row:
    """One row on its way."""

    def __init__(self, index: int, prompt: list[int], plan: Plan, seed: int, sampling: SamplingConfig) -> None:
        self.index, self.prompt, self.plan, self.seed = index, prompt, plan, seed
        self.tokens: list[int] = []
        self.uniforms = _uniforms(seed, sampling.max_new_tokens) if sampling.temperature > 0 else None

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
        steered = 0
        for step in self.plan.active:
            low, high = step.bounds(len(self.prompt))
            steered += max(0, min(high, computed) - low)
        return Generation(self.index, text, tuple(self.prompt), tuple(self.tokens), reason, self.seed, steered)


def _uniforms(seed: int, count: int) -> Float[Tensor, " count"]:
    """A row's random numbers, all drawn before it begins, on the CPU: neither its companions nor the device change them."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
        encoded = encode_all(model, self.prompts, prompt_format, room=sampling.max_new_tokens)
        self.model, self.sampling, self.stops, self.more_edits = model, sampling, stop_ids(model), tuple(edits)
        # A vocabulary may be padded beyond its tokenizer, and what is no token is no text.
        self.forbidden = torch.tensor(forbidden_ids(model), dtype=torch.long, device=model_device(model))
        self.rows = [_Row(i, ids, plans[i], seeds[i], sampling) for i, ids in enumerate(encoded)]
        lengths = [len(row.prompt) for row in self.rows]
        self.able = abilities(model, max(lengths, default=0) + sampling.max_new_tokens) if lengths else None
        batches = self.able.batches(lengths, batch_size) if self.able else []
        # Taken from the end: the longest first.
        self.waiting = [[self.rows[index] for index in indices] for indices in reversed(batches)]
        self.batch: _Batch | None = None
        self.hear: Callable[[Sequence[_Row], Tensor], None] | None = None
        """Is told the rows of every step, with their new tokens, and the model's logits before these."""
        sites = {resid_post(step.layer) for plan in plans for step in plan.active}
        self.runner = Runner(model, sites | {edit.site for edit in self.more_edits})

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
            kind = _CachedBatch if self.able and self.able.cache else _WholeBatch
            self.batch = kind(self, self.waiting.pop())
        bar.step(len(self.batch.rows))
        finished = self.batch.step()
        if not self.batch.rows:
            self.batch = None
        for generation in finished:
            bar.finish(len(generation.tokens))
        return finished


class _Batch:
    """Rows that are decoded together."""

    def __init__(self, job: _Job, rows: list[_Row]) -> None:
        self.job, self.runner, self.model, self.rows = job, job.runner, job.model, rows
        self.edits: Sequence[Edit] = self.edits_of(rows)

    def edits_of(self, rows: Sequence[_Row]) -> Sequence[Edit]:
        plans, lengths = [row.plan for row in rows], [len(row.prompt) for row in rows]
        d_model = int(self.model.cfg.d_model)
        steered = residual_edits(plans, lengths, d_model=d_model, device=model_device(self.model))
        chosen = torch.tensor([row.index for row in rows])
        return [*steered, *(edit.select(chosen) for edit in self.job.more_edits)]

    def step(self) -> list[Generation]:
        """One token more for every row; rows that stop leave the batch."""
        logits = self.logits()
        allowed = logits
        if len(self.job.forbidden):
            allowed = logits.index_fill(-1, self.job.forbidden, float("-inf"))
        chosen = choose(allowed, self.job.sampling, _draws(self.rows, logits.device)).tolist()
        outcomes = []
        for row, token in zip(self.rows, chosen, strict=True):
            row.tokens.append(token)
            outcomes.append(row.finished(self.model.tokenizer, self.job.sampling, self.job.stops))
        if self.job.hear is not None:
            self.job.hear(self.rows, logits)
        stay = [place for place, outcome in enumerate(outcomes) if outcome is None]
        if len(stay) < len(self.rows):
            self.rows = [self.rows[place] for place in stay]
            keep = torch.tensor(stay, dtype=torch.long)
            self.edits = [edit.select(keep) for edit in self.edits]
            if self.rows:
                self.select(keep)
        return [outcome for outcome in outcomes if outcome is not None]

    def logits(self) -> Float[Tensor, "row d_vocab"]:
        """After each row's last token."""
        raise NotImplementedError

    def select(self, keep: Int[Tensor, " kept"]) -> None:
        """Drop the rows that stopped from what is kept between steps."""
        raise NotImplementedError


class _WholeBatch(_Batch):
    """Every row is run whole for every token: for models whose cache, or padding on the left, gives something else."""

    def logits(self) -> Float[Tensor, "row d_vocab"]:
        ids = [[*row.prompt, *row.tokens] for row in self.rows]
        lengths = [len(row.prompt) for row in self.rows]
        whole = pad(ids, side="right", pad_id=pad_id(self.model), prompt_lengths=lengths)
        return self.runner.run(whole, edits=self.edits).logits

    def select(self, keep: Int[Tensor, " kept"]) -> None:
        pass


class _CachedBatch(_Batch):
    """Rows padded on the left; after their prompts, one token a step, with a key-value cache."""

    def __init__(self, job: _Job, rows: list[_Row]) -> None:
        super().__init__(job, rows)
        self.cache: Cache | None = None
        self.fed = pad([row.prompt for row in rows], pad_id=pad_id(self.model)).to(model_device(self.model))
        stems = _stems(rows)
        # What more edits do to a prompt is not known, so rows with them share nothing.
        if len(set(stems)) < len(stems) and not job.more_edits:
            self._prefill_once(stems)

    def _prefill_once(self, stems: list[int]) -> None:
        """Run what rows have in common, their prompts up to the last token, once per stem, and hand it to each of its rows."""
        first = list(dict.fromkeys(stems))
        rows = [self.rows[place] for place in first]
        # Windows count from the whole prompt's end, though its last token comes later.
        lengths = [len(row.prompt) for row in rows]
        begun = pad([row.prompt[:-1] for row in rows], pad_id=pad_id(self.model), prompt_lengths=lengths)
        cache = self.runner.run(begun, edits=self.edits_of(rows), keep_cache=True).cache
        assert cache is not None
        share = torch.tensor([first.index(stem) for stem in stems])
        self.cache = cache.select(share)
        self.fed = begun.select(share).then(self.fed.tokens[:, -1:])

    def logits(self) -> Float[Tensor, "row d_vocab"]:
        if self.rows[0].tokens:
            self.fed = self.fed.then(torch.tensor([[row.tokens[-1]] for row in self.rows]))
        result = self.runner.run(self.fed, edits=self.edits, cache=self.cache, keep_cache=True)
        self.cache = result.cache
        return result.logits

    def select(self, keep: Int[Tensor, " kept"]) -> None:
        assert self.cache is not None
        self.cache, self.fed = self.cache.select(keep), self.fed.select(keep)


def _stems(rows: Sequence[_Row]) -> list[int]:
    """For each row the first one whose prompt, and what steers it before its last token, are the same."""
    first: dict[Any, int] = {}
    stems = []
    for place, row in enumerate(rows):
        end = len(row.prompt) - 1
        # Only what acts before the last token: rows that differ at it, or after it, still have the same keys and values here.
        early = Plan(tuple(step for step in row.plan.active if step.bounds(end + 1)[0] < end))
        alone = (place,) if end < 1 else ()  # nothing before the last token: nothing to share
        stems.append(first.setdefault((tuple(row.prompt), early.digest, *alone), place))
    return stems


def _draws(rows: list[_Row], device: torch.device) -> Float[Tensor, " batch"] | None:
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
