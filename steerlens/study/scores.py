"""The four cells and their control: does a vector make a model follow an instruction?

For each pair and condition one response is generated and judged by the instruction's check:

    none          the bare query                         vector        the bare query, steered
    text          the query with its instruction         text+vector   that, steered
    random        the bare query, changed at every token by what the vector would add, along a random direction

A plan that steers attention, which points at the instruction in the prompt, has cells of its own:

    text+attention          the query with its instruction, its attention steered
    text+vector+attention   that, and the vector
    text+random             the control of the whole plan: random directions, and as much attention on random tokens

Random directions and tokens are one draw per instruction and plan (`Plan.placebo`).

`followed` is IFEval's loose verdict over all of a pair's instructions, as in Stolfo et al. (2025) for format instructions;
`followed_strict` stands beside it. Quality is measured on the same responses: words, repetition, distinct bigrams, and the
perplexity of the response under the unsteered model given the bare query (`quality` measures more). A high rate with
repetition is a broken model, and a rate that the random direction shares is not the vector's.
"""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

import pandas as pd

from steerlens._typing import WholeNumber, whole
from steerlens.checks.registry import check_all
from steerlens.data.pairs import PairSet
from steerlens.errors import DataError
from steerlens.files import content_key, json_lines, start_folder, user_path, write_atomically
from steerlens.models.choice import backend_used
from steerlens.models.facts import library_versions, model_id
from steerlens.stats.comparisons import compare_cells, mean_intervals
from steerlens.stats.rates import rates_and_quality
from steerlens.stats.words import distinct_n, distinct_share, repetition, words
from steerlens.steering.edits import edited_sites
from steerlens.steering.gates import GatedToken, gate_stats
from steerlens.steering.plan import Plan
from steerlens.steering.scores import bind
from steerlens.study.quality import Known, Quality, Response, measure
from steerlens.study.responses import Request, Sampler, SamplerSettings, requests_for, sampler_in

if TYPE_CHECKING:
    import plotly.graph_objects as go

NAN = float("nan")

DEGENERATE_REPETITION = 0.5
"""A response is degenerate when at least this share of its token trigrams repeats an earlier one, or when it is empty."""


RESULTS = ("scores.jsonl", "table.csv", "comparisons.csv")
"""What a finished evaluation leaves in its folder, besides its generations."""


SHOWN = (
    "instruction", "condition", "n", "followed", "rate", "low", "high", "strict", "mean_words", "mean_repetition",
    "mean_distinct_2", "median_perplexity", "mean_kl", "mean_reward", "cut", "degenerate",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scored responses: a sequence of rows, from which the tables are computed once.

    >>> found = evaluate(model, vector.at(4), test[:2], conditions=["none", "vector"], max_new_tokens=8)
    >>> len(found), found[0].condition, len(found[:3])
    (4, 'none', 3)
    """

    scores: pd.DataFrame
    """One row per response."""

    @cached_property
    def table(self) -> pd.DataFrame:
        """Rates with Wilson intervals, and quality with bootstrap intervals, per instruction and condition, then over all.

        Responses to one base query are not independent, be they trials or several instructions: intervals count `effective_n`.
        """
        overall = self.scores.assign(instruction="all")
        frame = pd.concat([self.scores, overall]) if self.scores["instruction"].nunique() > 1 else self.scores
        keys = ["instruction", "condition"]
        return rates_and_quality(frame, keys).merge(mean_intervals(frame, by=keys), on=keys)

    @cached_property
    def comparisons(self) -> pd.DataFrame:
        """Paired differences between cells, per instruction with Holm's correction, then over all of them."""
        return compare_cells(self.scores)

    @property
    def summary(self) -> pd.DataFrame:
        """The columns of `table` that fit on a screen: without the intervals of quality, and the spread of trials."""
        return self.table[[name for name in SHOWN if name in self.table]]

    def to_frame(self) -> pd.DataFrame:
        """The scores, one row per response, as a frame of the caller's own."""
        return self.scores.copy()

    def plot(self, **options: Any) -> "go.Figure":
        """Bars of the rate per condition with intervals, a panel per instruction; see `figures.four_cells`."""
        from steerlens.figures.cells import four_cells  # plotly, where a picture is asked for

        return four_cells(self.table, **options)

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.scores.itertuples(index=False, name="ScoredResponse"))

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> "Evaluation": ...
    def __getitem__(self, index: int | slice) -> Any:
        """One response, with the columns of `scores` as attributes; or the evaluation of some of them."""
        if isinstance(index, slice):
            return Evaluation(self.scores.iloc[index].reset_index(drop=True))
        return next(iter(Evaluation(self.scores.iloc[[index]])))

    def save(self, folder: str | Path) -> None:
        """Write scores.jsonl (one row per response), table.csv and comparisons.csv into a folder."""
        write_atomically(Path(folder) / "scores.jsonl", json_lines(self.scores))
        write_atomically(Path(folder) / "table.csv", self.table.to_csv(index=False))
        write_atomically(Path(folder) / "comparisons.csv", self.comparisons.to_csv(index=False))

    @classmethod
    def load(cls, folder: str | Path) -> "Evaluation":
        """Read what `save`, `evaluate(out=...)` or a run left in a folder.

        Raises:
            DataError: if the folder holds no scores, or those of a sweep or of a study of layers.
        """
        table = user_path(folder) / "table.csv"
        marks = {"gate": "a sweep, {}; use Sweep.load", "study": "a study of layers, {}; use LayerStudy.load"}
        columns = set(pd.read_csv(table, nrows=0)) if table.is_file() else set()
        for other in (marks[column] for column in marks if column in columns):
            raise DataError(
                f"an evaluation must be read from its folder, got that of {other.format(repr(str(folder)))}"
            )
        return cls(read_scores(folder))

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.summary.to_html(index=False, float_format='{:.3f}'.format)}"

    def __repr__(self) -> str:
        rates = self.scores.groupby("condition", sort=False)["followed"].mean()
        followed = ", ".join(f"{condition} {rate:.0%}" for condition, rate in rates.items())
        n = self.scores["instruction"].nunique()
        return f"Evaluation({len(self)} responses, {n} instruction{'s' * (n != 1)}; followed: {followed})"


def evaluate(
    model: Any,
    steering: Plan | Mapping[str, Plan],
    pairs: PairSet,
    *,
    conditions: Sequence[str] | None = None,
    trials: WholeNumber = 1,
    seed: WholeNumber = 0,
    quality: Quality = Quality(),
    out: str | Path | None = None,
    **settings: Unpack[SamplerSettings],
) -> Evaluation:
    """Responses of every pair under every condition, with verdicts and quality.

    Args:
        steering: One plan for all pairs, or one per instruction id.
        pairs: Prompts that neither the vector nor its layer was chosen on; their instructions need ids, which say how
            they are checked.
        conditions: Cells to fill; default: all that the plans have something for, with their controls; see `responses.cells_of`.
        trials: Responses per prompt and condition; more than one needs a temperature.
        seed: Decides the random directions of the control and, above temperature 0, the samples.
        quality: What is measured on the responses besides words.
        out: A folder that keeps every response as it is made (generations.jsonl), so that the same evaluation goes on where it
            was cut short; its tables are written at the end, and `Evaluation.load` reads them.
        settings: As in `Sampler`: batch_size, prompt_format, engine, progress, and how is sampled, as `sampling` or field by
            field (max_new_tokens, temperature, top_k, top_p, stop, stop_ids).

    Returns:
        `scores`, one row per pair, condition and trial. What steered it is told by `plan`, a text; by `layers`, a text, and
        `layer` where there is just one; by `coeff` in its `unit`, as they were given; and for `add` by `coeff_absolute` and
        `coeff_in_norms`, the step as a length and in mean residual norms. Where steps of a plan differ, these are missing.

    Raises:
        DataError: if there are no pairs, or an instruction has no plan or no check.
        SteerlensError: for steering that is no plan.

    Example:
        >>> found = evaluate(model, vector.at(4), test[:3], conditions=["none", "vector"], max_new_tokens=16)
        >>> found.table[["condition", "n"]].values.tolist()
        [['none', 3], ['vector', 3]]
    """
    trials, seed = whole(trials, "trials"), whole(seed, "seed")
    requests = requests_for(pairs, steering, conditions=conditions, trials=trials, seed=seed)
    require_checks(requests)
    with sampler_in(out, model, **settings) as sampler:
        if out is not None:
            start_results(
                out,
                "evaluation",
                sampler,
                requests,
                pairs,
                quality,
                RESULTS,
                conditions=list(dict.fromkeys(request.condition for request in requests)),
                trials=trials,
                seed=seed,
            )
        found = Evaluation(score(sampler, requests, quality=quality))
    if out is not None:
        found.save(out)
    return found


def start_results(
    folder: str | Path,
    kind: str,
    sampler: Sampler,
    requests: Sequence[Request],
    pairs: PairSet,
    quality: Quality,
    results: Sequence[str],
    **asked: Any,
) -> None:
    """Say in a folder's config.json what is asked for, and remove its results if they are of anything else.

    Args:
        kind: "sweep" or "evaluation".
        results: Names of the files that are made in the end.
        asked: What else the results depend on.
    """
    settings: dict[str, Any] = {
        **asked,
        "quality": asdict(quality),
        "versions": library_versions(),
        "model": model_id(sampler.model),
        "sampling": asdict(sampler.sampling),
        "prompt_format": asdict(sampler.prompt_format),
        "pairs": repr(pairs),
    }
    keys = sampler.keys(requests)
    identity = content_key([keys, {**settings, "quality": quality.content()}, pairs.content_hash])
    plans = {id(request.plan): request.plan for request in requests}.values()
    backend = backend_used(sampler.model, edited_sites(sampler.model, plans))
    start_folder(Path(folder), kind, identity, {**settings, "backend": backend}, results)


def require_checks(requests: Sequence[Request]) -> None:
    """Refuse what cannot be scored, before anything is generated.

    Raises:
        DataError: if there is nothing to score, or an instruction has no check.
    """
    if not requests:
        raise DataError("an evaluation needs at least one prompt, got none; check the instructions and the filter")
    for pair in {request.pair for request in requests}:
        pair.require_check()


def score(sampler: Sampler, requests: Sequence[Request], *, quality: Quality = Quality()) -> pd.DataFrame:
    """The scores of requests, one row each; missing generations are made first.

    Args:
        requests: What to answer; see `requests_for`.
        quality: What is measured on the responses besides words.

    Returns:
        One row per request, in their order.

    Raises:
        DataError: if there is nothing to score, or an instruction has no check.

    Example:
        >>> from steerlens.study import Sampler, requests_for
        >>> sampler = Sampler(model, max_new_tokens=8)
        >>> len(score(sampler, requests_for(test[:2], vector.at(4), conditions=["none", "vector"])))
        4
    """
    require_checks(requests)
    answers = sampler.generate(requests)
    judged: dict[str, tuple[bool, bool]] = {}
    known: Known = {}
    parts = []
    for start in range(0, len(requests), SCORED_AT_ONCE):
        some = slice(start, start + SCORED_AT_ONCE)
        parts.append(_scores(sampler, requests[some], list(answers[some]), quality, judged, known))
    return pd.concat(parts, ignore_index=True)


SCORED_AT_ONCE = 1024
"""Responses that are held at a time, beside the columns made of them."""


def _scores(
    sampler: Sampler,
    requests: Sequence[Request],
    records: Sequence[Mapping[str, Any]],
    quality: Quality,
    judged: dict[str, tuple[bool, bool]],
    known: Known,
) -> pd.DataFrame:
    """The scores of some of the requests; verdicts and qualities that are new are added to those of the others."""
    plans = {place: plan_columns(plan) for place, plan in {id(one.plan): one.plan for one in requests}.items()}
    frame = pd.DataFrame(
        [
            _score(request, record, plans[id(request.plan)], judged)
            for request, record in zip(requests, records, strict=True)
        ]
    )
    frame["layer"] = frame["layer"].astype("Int64")
    responses = [
        Response(
            query=request.pair.query or request.pair.prompt,
            text=record["text"],
            context=tuple(sampler.encode(request.pair.query or request.pair.prompt)),
            prompt=tuple(record["prompt_tokens"]),
            tokens=tuple(record["tokens"]),
            plan=bind(sampler.model, request.plan, request.prompt, sampler.prompt_format)
            if quality.kl
            else request.plan,
        )
        for request, record in zip(requests, records, strict=True)
    ]
    return frame.join(measure(sampler.model, responses, quality, batch_size=sampler.batch_size, known=known))


def _score(
    request: Request, record: Mapping[str, Any], plan: Mapping[str, Any], judged: dict[str, tuple[bool, bool]]
) -> dict[str, Any]:
    pair, text = request.pair, record["text"]
    case = content_key([text, pair.instruction_ids, pair.kwargs])
    if case not in judged:  # many candidates make a model say the same, and a language takes milliseconds to tell
        verdicts = check_all(text, pair.instruction_ids, pair.kwargs)
        judged[case] = all(verdict.loose for verdict in verdicts), all(verdict.strict for verdict in verdicts)
    followed, followed_strict = judged[case]
    return {
        "prompt_id": pair.prompt_id,
        "instruction": pair.instruction_id,
        "condition": request.condition,
        **plan,
        "trial": request.trial,
        "seed": request.seed,
        "followed": followed,
        "followed_strict": followed_strict,
        "degenerate": is_degenerate(text, record["tokens"]),
        "n_words": len(words(text)),
        "repetition": repetition(text),
        "distinct_2": distinct_n(text),
        "n_tokens": len(record["tokens"]),
        "finish_reason": record["finish_reason"],
        **_gate_columns(record),
        "query": pair.query or pair.prompt,
        "prompt": request.prompt,
        "response": text,
        "key": record["key"],
    }


def _gate_columns(record: Mapping[str, Any]) -> dict[str, float]:
    """What a gate made of a response's tokens; see `gates.gate_stats`."""
    if "gated" not in record:
        return {}
    # JSON has no nan.
    missing = {"p_proposed": NAN}
    tokens = [GatedToken(**token | (missing if token["p_proposed"] is None else {})) for token in record["gated"]]
    names = {"accepted", "weakened", "rejected", "skipped"}
    return {f"gate_{name}" if name in names else name: value for name, value in gate_stats(tokens).items()}


def read_scores(folder: str | Path) -> pd.DataFrame:
    """The scores in a folder of an evaluation, a sweep or a run, as they were before they were written, to ten decimals.

    Raises:
        DataError: if there are none, or a line is not JSON.
    """
    path = user_path(folder) / "scores.jsonl"
    if not path.is_file():
        raise DataError(
            f"a folder of results must hold scores.jsonl, got {str(folder)!r} without it; let the run finish"
        )
    with path.open(encoding="utf-8") as lines:
        try:
            frame = pd.DataFrame([json.loads(line) for line in lines])
        except ValueError as error:
            raise DataError(f"{path} must hold one JSON object a line: {error}; write it again with save()") from error
    # A number is a number also where every value of a column is missing.
    texts = {
        "prompt_id",
        "instruction",
        "condition",
        "operator",
        "positions",
        "unit",
        "layers",
        "plan",
        "finish_reason",
        "query",
        "prompt",
        "mode",
        "window",
        "method",
        "setting",
        "split",
    }
    numbers = [
        name for name in frame if name not in {*texts, "response", "key", "layer"} and frame[name].dtype == object
    ]
    return frame.astype({"layer": "Int64", **dict.fromkeys(numbers, float)})


def plan_columns(plan: Plan) -> dict[str, Any]:
    """What a table says of a plan; see `evaluate`.

    >>> plan_columns(Plan())["plan"]
    'no steering'
    """

    def common(name: str, otherwise: Any) -> Any:
        values = {getattr(step, name) for step in plan}
        return values.pop() if len(values) == 1 else otherwise

    return {
        "layer": common("layer", None),
        "layers": "all" if any(step.heads is None for step in plan.attention) else ", ".join(map(str, plan.layers)),
        "operator": " + ".join(dict.fromkeys(step.operator for step in plan)),
        "coeff": common("given", NAN),
        "unit": common("unit", ""),
        "coeff_absolute": common("coeff_absolute", NAN),
        "coeff_in_norms": common("coeff_in_norms", NAN),
        "positions": " + ".join(dict.fromkeys(str(step.positions) for step in plan)),
        "n_interventions": len(plan),
        "plan": str(plan),
    }


def is_degenerate(text: str, tokens: Sequence[int]) -> bool:
    """Whether a response is empty, or loops: at least half of its token trigrams repeat an earlier one.

    Tokens, not words: a line of dashes is one word.
    """
    return not text.strip() or 1.0 - distinct_share(tokens, 3) >= DEGENERATE_REPETITION
