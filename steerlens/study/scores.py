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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from steerlens.checks.registry import check_all
from steerlens.data.conditions import CONDITIONS
from steerlens.data.pairs import PairSet
from steerlens.errors import DataError
from steerlens.models.prompts import PromptFormat
from steerlens.stats.comparisons import compare_cells, mean_intervals
from steerlens.stats.rates import quality_table, rate_table
from steerlens.stats.words import distinct_n, distinct_share, repetition, words
from steerlens.steering.plan import Plan
from steerlens.steering.sampling import SamplingConfig
from steerlens.study.quality import Quality, Response, measure
from steerlens.study.responses import Request, Sampler, requests_for

DEGENERATE_REPETITION = 0.5
"""A response is degenerate when at least this share of its token trigrams repeats an earlier one, or when it is empty."""


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
