"""The four cells and their control: does a vector make a model follow an instruction?

For each pair and condition one response is generated and judged by the instruction's check:

    none          the bare query                         vector        the bare query, steered
    text          the query with its instruction         text+vector   that, steered
    random        the bare query, changed at every token by what the vector would add, along a random direction

The random direction is one draw per plan (`Plan.placebo`).

`followed` is IFEval's loose verdict over all of a pair's instructions, as in Stolfo et al. (2025) for format instructions;
`followed_strict` stands beside it. Quality is measured on the same responses: words, repetition, distinct bigrams, and the
perplexity of the response under the unsteered model given the bare query (`quality` measures more). A high rate with
repetition is a broken model, and a rate that the random direction shares is not the vector's.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
from tqdm import tqdm

from steerlens.comparisons import compare_cells, mean_intervals
from steerlens.data import CONDITIONS, InstructionPair, PairSet
from steerlens.errors import DataError, SteerlensError, nearest
from steerlens.instructions import check_all
from steerlens.metrics import distinct_n, distinct_share, quality_table, rate_table, repetition, words
from steerlens.model import model_digest
from steerlens.plan import Plan
from steerlens.prompts import PromptFormat, encode, length_sorted_batches
from steerlens.quality import Quality, Response, measure
from steerlens.records import Journal, content_key, derived_seed
from steerlens.sampling import Generation, SamplingConfig, stream

STEERED: frozenset[str] = frozenset({"vector", "text+vector", "random"})
"""Conditions that run with a plan."""

DEGENERATE_REPETITION = 0.5
"""A response is degenerate when at least this share of its token trigrams repeats an earlier one, or when it is empty."""


@dataclass(frozen=True)
class Request:
    """One response to be had: a pair under a condition, with the plan that steers it."""

    pair: InstructionPair
    condition: str
    plan: Plan
    trial: int
    seed: int

    @property
    def prompt(self) -> str:
        return self.pair.text(self.condition)


Batch = Sequence[Request]
Record = dict[str, Any]
Engine = Callable[["Sampler", Sequence[Batch]], Iterator[tuple[int, list[Record]]]]
"""What answers batches: for each its place and its records, as they are done."""


def requests_for(
    pairs: Iterable[InstructionPair],
    plans: Plan | Mapping[str, Plan],
    *,
    text_plans: Plan | Mapping[str, Plan] | None = None,
    conditions: Sequence[str] = CONDITIONS,
    trials: int = 1,
    seed: int = 0,
) -> list[Request]:
    """One request per pair, condition and trial.

    A row's seed depends on the run's seed, the query and the trial, so conditions of one pair share their random numbers.

    Args:
        plans: One plan for all pairs, or one per instruction id.
        text_plans: The same for `text+vector`, where the instruction's words may want another layer; default: `plans`.

    Raises:
        DataError: for an unknown condition, or an instruction without a plan.
    """
    for condition in conditions:
        if condition not in CONDITIONS:
            raise DataError(
                f"a condition must be one of the cells, got {condition!r}; {nearest(condition, CONDITIONS)}"
            )
    requests = []
    for pair in pairs:
        plan = _plan_of(pair, plans)
        text_plan = plan if text_plans is None else _plan_of(pair, text_plans)
        for condition in conditions:
            used = text_plan if condition == "text+vector" else plan if condition in STEERED else Plan()
            if condition == "random":
                used = plan.placebo(seed=derived_seed(seed, "random", pair.instruction_id, plan.digest))
            for trial in range(trials):
                row_seed = derived_seed(seed, pair.query or pair.prompt, trial)
                requests.append(Request(pair, condition, used, trial, row_seed))
    return requests


def _plan_of(pair: InstructionPair, plans: Plan | Mapping[str, Plan]) -> Plan:
    if isinstance(plans, Plan):
        return plans
    if pair.instruction_id not in plans:
        raise DataError(
            f"every instruction needs a plan, got none for {pair.instruction_id!r}; plans: {', '.join(plans)}"
        )
    return plans[pair.instruction_id]


class Sampler:
    """A model with fixed settings that answers requests, keeps what it answered, and never answers one twice.

    Args:
        journal: Where generations are kept; None keeps them in memory.
        batch_size: Rows per batch. A batch is written once all of its rows have stopped.
        engine: What answers batches, in any order; default: this process, one after another (see `engines` for Ray).
    """

    def __init__(
        self,
        model: Any,
        *,
        sampling: SamplingConfig = SamplingConfig(),
        prompt_format: PromptFormat = PromptFormat(),
        batch_size: int = 16,
        journal: Journal | None = None,
        engine: "Engine | None" = None,
        progress: bool = False,
    ) -> None:
        self.model, self.sampling, self.prompt_format = model, sampling, prompt_format
        self.engine = self._here if engine is None else partial(engine, self)
        self.batch_size, self.journal, self.progress = batch_size, journal, progress
        self.records: dict[str, dict[str, Any]] = {} if journal is None else journal.records
        self.greedy = sampling.temperature == 0
        # What greedy text does not depend on is left out.
        used = replace(sampling, top_k=None, top_p=1.0) if self.greedy else sampling
        self._settings = {"model": model_digest(model), "dtype": str(model.cfg.dtype), "sampling": asdict(used)}
        self._encoded: dict[str, list[int]] = {}

    def key(self, request: Request) -> str:
        """The hash of all that decides a request's text: model, tokens fed, plan with its numbers, sampling, seed."""
        seed = None if self.greedy else request.seed
        return content_key([self._settings, self.encode(request.prompt), request.plan.digest, seed])

    def encode(self, prompt: str) -> list[int]:
        """The tokens fed for a prompt."""
        if prompt not in self._encoded:
            self._encoded[prompt] = encode(self.model, prompt, self.prompt_format)
        return self._encoded[prompt]

    def generate(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """The record of each request, in order; what is missing is generated, batch by batch.

        Batches are formed over all requests, also those that are already answered, and written whole, so that a run that
        was cut short between two batches and goes on sees the same batches, and so the same rounding, as one that was not.

        Raises:
            SteerlensError: for several trials of greedy decoding, which would count one text several times.
        """
        if self.greedy and any(request.trial for request in requests):
            raise SteerlensError("several trials need a temperature above 0: greedy trials of a prompt are one text")
        request_keys = [self.key(request) for request in requests]
        by_key = dict(zip(request_keys, requests, strict=True))
        keys = list(by_key)
        lengths = [len(self.encode(by_key[key].prompt)) for key in keys]
        batches = [
            [keys[index] for index in batch if keys[index] not in self.records]
            for batch in length_sorted_batches(lengths, self.batch_size)
        ]
        missing = [batch for batch in batches if batch]
        total = sum(map(len, missing))
        with tqdm(total=total, desc="generate", unit="row", disable=not self.progress or not total) as bar:
            n_tokens = 0
            for place, found in self.engine([[by_key[key] for key in batch] for batch in missing]):
                batch = missing[place]
                self._keep({"key": key, **record} for key, record in zip(batch, found, strict=True))
                n_tokens += sum(len(record["tokens"]) for record in found)
                bar.update(len(batch))
                bar.set_postfix_str(f"{n_tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tok/s")
        return [self.records[key] for key in request_keys]

    def _here(self, batches: Sequence[Batch]) -> Iterator[tuple[int, list[Record]]]:
        for place, batch in enumerate(batches):
            yield place, answer(self.model, batch, self.sampling, self.prompt_format)

    def _keep(self, records: Iterable[dict[str, Any]]) -> None:
        if self.journal is not None:
            self.journal.append(records)
        else:
            self.records.update((record["key"], record) for record in records)


def answer(
    model: Any, batch: Batch, sampling: SamplingConfig, prompt_format: PromptFormat = PromptFormat()
) -> list[Record]:
    """The records of one batch of requests, in their order: text, tokens, and what they came from."""
    rows: list[Generation] = list(
        stream(
            model,
            [request.prompt for request in batch],
            steering=[request.plan for request in batch],
            sampling=sampling,
            seed=[request.seed for request in batch],
            batch_size=len(batch),
            prompt_format=prompt_format,
        )
    )
    rows.sort(key=lambda row: row.index)
    return [
        {
            "prompt": request.prompt,
            "text": row.text,
            "finish_reason": row.finish_reason,
            "seed": row.seed,
            "n_steered": row.n_steered,
            "plan": [step.record() for step in request.plan.active],
            "prompt_tokens": list(row.prompt_tokens),
            "tokens": list(row.tokens),
        }
        for request, row in zip(batch, rows, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scored responses."""

    scores: pd.DataFrame
    """One row per response."""

    @property
    def table(self) -> pd.DataFrame:
        """Rates with Wilson intervals, and quality with bootstrap intervals, per instruction and condition, then over all.

        Responses to one base query are not independent, be they trials or several instructions: intervals count `effective_n`.
        """
        overall = self.scores.assign(instruction="all")
        frame = pd.concat([self.scores, overall]) if self.scores["instruction"].nunique() > 1 else self.scores
        keys = ["instruction", "condition"]
        strict = rate_table(frame, by=keys, value="followed_strict").rename(columns={"rate": "strict"})
        broken = rate_table(frame, by=keys, value="degenerate").rename(columns={"rate": "degenerate"})
        table = rate_table(frame, by=keys, clusters="query")
        quality = quality_table(frame, by=keys), mean_intervals(frame, by=keys)
        for part in (strict[[*keys, "strict"]], *quality, broken[[*keys, "degenerate"]]):
            table = table.merge(part, on=keys)
        return table

    @property
    def comparisons(self) -> pd.DataFrame:
        """Paired differences between cells, per instruction with Holm's correction, then over all of them."""
        return compare_cells(self.scores)

    def _repr_html_(self) -> str:
        return str(self._shown.to_html(index=False, float_format="{:.3f}".format))

    def __repr__(self) -> str:
        return str(self._shown.to_string(index=False, float_format="{:.3f}".format))

    @property
    def _shown(self) -> pd.DataFrame:
        """The table without the intervals of quality, which would make it too wide to read."""
        return self.table.filter(regex="^(?!mean_.*_(low|high)$)")


def evaluate(
    model: Any,
    steering: Plan | Mapping[str, Plan],
    pairs: PairSet,
    *,
    conditions: Sequence[str] = CONDITIONS,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    trials: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    prompt_format: PromptFormat = PromptFormat(),
    quality: Quality = Quality(),
    progress: bool = False,
) -> Evaluation:
    """Responses of every pair under every condition, with verdicts and quality.

    Args:
        steering: One plan for all pairs, or one per instruction id.
        pairs: Prompts that neither the vector nor its layer was chosen on.
        quality: What is measured on the responses besides words.

    Raises:
        DataError: if there are no pairs, or an instruction has no plan.

    Example:
        >>> evaluate(model, vector.at(12), test).table                    # doctest: +SKIP
    """
    sampling = SamplingConfig(max_new_tokens, temperature, top_k, top_p)
    sampler = Sampler(model, sampling=sampling, prompt_format=prompt_format, batch_size=batch_size, progress=progress)
    requests = requests_for(pairs, steering, conditions=conditions, trials=trials, seed=seed)
    return Evaluation(score(sampler, requests, quality=quality))


def score(sampler: Sampler, requests: Sequence[Request], *, quality: Quality = Quality()) -> pd.DataFrame:
    """The scores of requests, one row each; missing generations are made first.

    Raises:
        DataError: if there is nothing to score.
    """
    if not requests:
        raise DataError("an evaluation needs at least one prompt, got none; check the instructions and the filter")
    for pair in {request.pair for request in requests}:
        pair.check()
    records = sampler.generate(requests)
    frame = pd.DataFrame(_score(request, record) for request, record in zip(requests, records, strict=True))
    frame["layer"] = frame["layer"].astype("Int64")
    responses = [
        Response(
            query=request.pair.query or request.pair.prompt,
            text=record["text"],
            context=tuple(sampler.encode(request.pair.query or request.pair.prompt)),
            prompt=tuple(record["prompt_tokens"]),
            tokens=tuple(record["tokens"]),
            plan=request.plan,
        )
        for request, record in zip(requests, records, strict=True)
    ]
    return frame.join(measure(sampler.model, responses, quality, batch_size=sampler.batch_size))


def _score(request: Request, record: Mapping[str, Any]) -> dict[str, Any]:
    pair, text = request.pair, record["text"]
    verdicts = check_all(text, pair.instruction_ids, pair.kwargs, prompt=pair.prompt)
    steps = request.plan.interventions
    first = steps[0] if steps else None
    return {
        "prompt_id": pair.prompt_id,
        "instruction": pair.instruction_id,
        "condition": request.condition,
        "layer": None if first is None else first.layer,
        "operator": "" if first is None else first.operator,
        "coeff": float("nan") if first is None else first.coeff,
        "coeff_in_norms": float("nan") if first is None or first.operator != "add" else first.coeff_in_norms,
        "positions": "" if first is None else str(first.positions),
        "n_interventions": len(steps),
        "trial": request.trial,
        "seed": request.seed,
        "followed": all(verdict.loose for verdict in verdicts),
        "followed_strict": all(verdict.strict for verdict in verdicts),
        "degenerate": is_degenerate(text, record["tokens"]),
        "n_words": len(words(text)),
        "repetition": repetition(text),
        "distinct_2": distinct_n(text),
        "n_tokens": len(record["tokens"]),
        "finish_reason": record["finish_reason"],
        "query": pair.query or pair.prompt,
        "prompt": request.prompt,
        "response": text,
        "key": record["key"],
    }


def is_degenerate(text: str, tokens: Sequence[int]) -> bool:
    """Whether a response is empty, or loops: at least half of its token trigrams repeat an earlier one.

    Tokens, not words: a line of dashes is one word.
    """
    return not text.strip() or 1.0 - distinct_share(tokens, 3) >= DEGENERATE_REPETITION
