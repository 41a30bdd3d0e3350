"""Methods of steering beside each other: how well each is followed, what it costs in quality and time, at each of its strengths.

Every method has settings, such as a few strengths; all of them answer the same prompts as rows of shared batches, beside the
prompts without steering, bare (`none`) and with the instruction (`text`). Strengths are not comparable between methods, and the
best of many is too good to be seen again, so a setting is chosen on validation prompts, and methods are compared on others:

    rate          the share that follows, by the loose or the strict verdict, with Wilson's interval over base queries
    quality       the mean reward where one is measured, else the mean log probability of a response's tokens under the
                  unsteered model given the bare query, in nats: -log(perplexity); with its bootstrap interval over base queries
    chosen        the setting of each method with the highest rate on the validation prompts, among those that are degenerate no
                  more often than the instruction alone; ties go to the first
    pareto        no other setting that is degenerate no more often than the instruction alone has a higher rate without a lower
                  quality, or a higher quality without a lower rate
    control       the chosen setting along random directions, or with as much attention on random tokens (`Plan.placebo`)

What these do not show: whether a response answers its query. A high quality may be a loop, which a model finds likely: the
shares of repeated and of degenerate text stand beside it. Time depends on the machine and on what else it does.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np
import pandas as pd

from steerlens._results import Result
from steerlens._typing import RealNumber, WholeNumber, real, real_numbers, whole
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import DataError, SteerlensError
from steerlens.files import json_lines, user_path, write_atomically
from steerlens.models.prompts import PromptFormat
from steerlens.stats.comparisons import bootstrap_mean, compare_conditions, holm
from steerlens.stats.pareto import pareto_front
from steerlens.stats.rates import rates_and_quality, unit_labels
from steerlens.steering.plan import Plan
from steerlens.steering.sampling import generate
from steerlens.study.quality import Quality
from steerlens.study.responses import Request, Sampler, SamplerSettings, plan_of, requests_for, sampler_of
from steerlens.study.scores import read_scores, score, start_results

if TYPE_CHECKING:
    import plotly.graph_objects as go

Verdict = Literal["loose", "strict"]

Steering = Plan | Mapping[str, Plan] | Callable[[InstructionPair], Plan]
"""One plan for all pairs, one per instruction id, or a function of the pair."""

REFERENCES = ("none", "text")
"""What every method stands beside: the bare query, and the query with its instruction."""

KEYS = ["method", "setting"]
"""Columns that name a configuration."""

RESULTS = ("scores.jsonl", "table.csv", "comparisons.csv", "speed.csv")
"""What a finished comparison leaves in its folder, besides its generations."""


@dataclass(frozen=True)
class Setting:
    """One way to use a method.

    Example:
        >>> Setting(sl.pasta(10, scale="include"), "alpha 10", 10).with_text is None
        True
    """

    plan: Steering
    name: str = ""
    """In words, such as "alpha 10"; tables and figures show it."""
    strength: RealNumber = float("nan")
    """What a curve is drawn over; missing where a method has no strength."""
    with_text: bool | None = None
    """Whether the instruction stands in the prompt; default: where the plan steers attention, which needs it."""

    def __post_init__(self) -> None:
        if self.strength == self.strength:
            object.__setattr__(self, "strength", real(self.strength, "strength"))

    def requests(
        self, pairs: Iterable[InstructionPair], *, trials: int = 1, seed: int = 0, control: bool = False
    ) -> list[Request]:
        """What the pairs ask; as the control, in random directions and towards random tokens.

        Raises:
            SteerlensError: if attention is to be steered without the instruction in the prompt.
        """
        found = []
        for pair in pairs:
            plan = plan_of(pair, self.plan(pair) if callable(self.plan) else self.plan)
            cell = _cell(plan, self.with_text, control=control)
            found += requests_for([pair], plan, conditions=[cell], trials=trials, seed=seed)
        return found


def _cell(plan: Plan, with_text: bool | None, *, control: bool) -> str:
    """The condition that a plan runs under."""
    attention = bool(plan.attention)
    with_text = attention if with_text is None else with_text
    if attention and not with_text:
        raise SteerlensError(
            f"attention is steered towards the instruction in the prompt, got with_text=False for {plan}; leave it out"
        )
    if not plan:
        return "text" if with_text else "none"
    if control:
        return "text+random" if with_text else "random"
    parts = ["text"] * with_text + ["vector"] * bool(plan.residual) + ["attention"] * attention
    return "+".join(parts)


def swept(
    make: Callable[..., Steering],
    strengths: Iterable[RealNumber],
    name: str = "",
    *,
    with_text: bool | None = None,
    **options: Any,
) -> list[Setting]:
    """A method at several strengths: what a function makes of each.

    Args:
        make: Of a strength, such as `sl.pasta` or `sl.spotlight`.
        strengths: From the weakest on: ties go to the first.
        name: What the strength is, as in "alpha".
        with_text: As in `Setting`.
        options: Of the function.

    Example:
        >>> [setting.name for setting in swept(sl.pasta, [5, 10], "alpha", scale="include")]
        ['alpha 5', 'alpha 10']
    """
    return [
        Setting(make(strength, **options), f"{name} {strength:g}".strip(), strength, with_text)
        for strength in real_numbers(strengths, "strength")
    ]


@dataclass(frozen=True, eq=False)
class MethodComparison(Result):
    """Scored methods: `table` has a row per method and setting over all test prompts.

    >>> found = compare_methods(model, {"InstABoost": sl.instaboost(1.0)}, test[:2], max_new_tokens=4)
    >>> found.table[["method", "control"]].values.tolist()[1:]
    [['text', False], ['InstABoost', False], ['InstABoost', True]]
    """

    scores: pd.DataFrame
    """One row per response, those to validation prompts (`split` "valid") among them."""
    verdict: Verdict = "loose"
    """Whether a rate counts loose or strict verdicts."""
    speed: pd.DataFrame | None = None
    """Tokens per second and seconds to the first token, where they were measured."""

    @classmethod
    def of(
        cls, scores: pd.DataFrame, verdict: Verdict = "loose", speed: pd.DataFrame | None = None
    ) -> "MethodComparison":
        """The comparison of these scores."""
        table = _table(_judged(scores, verdict))
        if speed is not None:
            table = table.merge(speed.assign(control=False), on=[*KEYS, "control"], how="left")
        return cls(table, scores, verdict, speed)

    @cached_property
    def validation(self) -> pd.DataFrame:
        """The rates of all settings on the validation prompts, and which was chosen; no row where there were none."""
        return _validation(_judged(self.scores, self.verdict))

    @cached_property
    def by_instruction(self) -> pd.DataFrame:
        """One row per instruction, method and setting: rates and quality on the test prompts, without controls."""
        tested = _judged(self.scores, self.verdict).query("split == 'test' and not control")
        strengths = tested.groupby(KEYS, sort=False)["strength"].first().reset_index()
        return rates_and_quality(tested, ["instruction", *KEYS]).merge(strengths, on=KEYS)

    @cached_property
    def comparisons(self) -> pd.DataFrame:
        """Each method's chosen setting beside none, text and its own control, prompt by prompt on the test prompts.

        Of a method without a choice, every setting. p_holm is corrected over the methods that stand beside one baseline.
        """
        return _compared(_judged(self.scores, self.verdict), self.table)

    def plot(self, **options: Any) -> "go.Figure":
        """Rate and quality against strength, and the trade-offs; see `figures.method_comparison`."""
        from steerlens.figures.methods import method_comparison  # plotly, where a picture is asked for

        table = self.table[~self.table["control"]].rename(columns={"low": "rate_low", "high": "rate_high"})
        given = {"quality": "reward" if "mean_reward" in table else "log probability (nats)"}
        return method_comparison(
            table.reindex(columns=list(dict.fromkeys([*table, "tokens_per_second"]))), **(given | options)
        )

    def save(self, folder: str | Path) -> None:
        """Write scores.jsonl (one row per response), table.csv, comparisons.csv and, if measured, speed.csv into a folder."""
        folder = Path(folder)
        write_atomically(folder / "scores.jsonl", json_lines(self.scores))
        write_atomically(folder / "table.csv", self.table.assign(verdict=self.verdict).to_csv(index=False))
        write_atomically(folder / "comparisons.csv", self.comparisons.to_csv(index=False))
        if self.speed is not None:
            write_atomically(folder / "speed.csv", self.speed.to_csv(index=False))

    @classmethod
    def load(cls, folder: str | Path) -> "MethodComparison":
        """Read what `save` or `compare_methods(out=...)` left in a folder.

        Raises:
            DataError: if the folder holds no finished comparison of methods.
        """
        path = user_path(folder)
        found = set(pd.read_csv(path / "table.csv").get("verdict", [])) if (path / "table.csv").is_file() else set()
        if len(found) != 1:
            raise DataError(
                f"the folder of a comparison of methods must hold table.csv with its verdict, got {str(folder)!r}; let it finish"
            )
        (verdict,) = found
        speed = path / "speed.csv"
        return cls.of(
            read_scores(path), verdict, pd.read_csv(speed, keep_default_na=False) if speed.is_file() else None
        )

    def __repr__(self) -> str:
        shown = self.table[~self.table["control"]]
        rates = "; ".join(
            f"{row['method']} {row['rate']:.0%}{' at ' + row['setting'] if row['setting'] else ''}"
            for row in shown[shown["chosen"]].to_dict("records")
        )
        n = int((self.scores["split"] == "test").sum())
        return f"MethodComparison({shown['method'].nunique()} methods, {len(shown)} settings, {n} responses; {rates})"


def compare_methods(
    model: Any,
    methods: Mapping[str, Steering | Sequence[Setting]],
    pairs: PairSet,
    *,
    valid: PairSet | None = None,
    verdict: Verdict = "loose",
    controls: bool = True,
    rounds: WholeNumber = 0,
    trials: WholeNumber = 1,
    seed: WholeNumber = 0,
    quality: Quality = Quality(),
    out: str | Path | None = None,
    **settings: Unpack[SamplerSettings],
) -> MethodComparison:
    """Every method at each of its settings on the same prompts, beside no steering and the instruction alone.

    Args:
        model: A model; or a `Sampler` of one, whose settings and journal then hold.
        methods: By name, a plan (for all pairs, per instruction id, or a function of the pair) or several settings; see `swept`.
        pairs: Test prompts: what is reported, and nothing is chosen on.
        valid: Validation prompts, on which each method's setting is chosen; None chooses nothing.
        verdict: Which verdict counts: IFEval's strict one reads the text as it is.
        controls: Whether the chosen setting of each method, or its only one, has a control.
        rounds: How often each method's chosen setting is timed, in turns; 0 times nothing. See `measure_speed`.
        trials: Responses per prompt and setting; more than one needs a temperature.
        seed: Decides the controls and, above temperature 0, the samples.
        quality: What is measured on the responses besides words.
        out: A folder that keeps every response as it is made (generations.jsonl), so that the same comparison goes on where it
            was cut short; its tables are written at the end, and `MethodComparison.load` reads them.
        settings: As in `sweep`; `progress=True` shows a bar.

    Returns:
        The scores of all responses, with the table, the choices and the paired comparisons that are made of them.

    Raises:
        DataError: if there are no pairs, an instruction has no plan or no check, or two settings of a method have one name.
        SteerlensError: for no method, one with the name of a reference, or a setting that is no plan.

    Example:
        >>> methods = {"PASTA": swept(sl.pasta, [5, 10], "alpha", scale="include"), "vector": vector.at(4)}
        >>> found = compare_methods(model, methods, test[:2], valid=valid[:2], max_new_tokens=4)
        >>> found.table.query("not control")[["method", "setting", "n"]].values.tolist()[1:]
        [['text', '', 2], ['PASTA', 'alpha 5', 2], ['PASTA', 'alpha 10', 2], ['vector', '', 2]]
    """
    trials, seed, rounds = whole(trials, "trials"), whole(seed, "seed"), whole(rounds, "rounds")
    if verdict not in ("loose", "strict"):
        raise SteerlensError(f"verdict must be loose or strict, got {verdict!r}")
    if len(pairs) == 0:
        raise DataError("a comparison needs at least one prompt, got none; check the split and the filter")
    if valid is not None and len(valid) == 0:
        raise DataError("validation needs at least one prompt, got none; give None to choose nothing")
    options: Any = {"trials": trials, "seed": seed}
    tried = _settings(methods, pairs if valid is None else PairSet([*pairs, *valid]))
    with sampler_of(model, out, settings) as sampler:
        searched = [] if valid is None else _rows(tried, valid, "valid", **options)
        tested = _rows(tried, pairs, "test", **options)
        if out is not None:
            asked = {"verdict": verdict, "controls": controls, "rounds": rounds, **options}
            requests = [request for _, request in searched + tested]
            start_results(out, "comparison of methods", sampler, requests, pairs, quality, RESULTS, **asked)
        found = _scored(sampler, searched, quality)
        chosen = _chosen(tried, found, verdict)
        if controls:
            placebos = {name: one for name, one in chosen.items() if name not in REFERENCES}
            tested += _rows({name: [one] for name, one in placebos.items()}, pairs, "test", control=True, **options)
        found = pd.concat([one for one in (found, _scored(sampler, tested, quality)) if len(one)], ignore_index=True)
        speed = None
        if rounds:
            runs = {(name, one.name): one.requests(pairs[:TIMED_ROWS], seed=seed) for name, one in chosen.items()}
            speed = measure_speed(
                sampler.model,
                {key: [(request.prompt, request.plan) for request in requests] for key, requests in runs.items()},
                max_new_tokens=sampler.sampling.max_new_tokens,
                rounds=rounds,
                prompt_format=sampler.prompt_format,
            )
    result = MethodComparison.of(found, verdict, speed)
    if out is not None:
        result.save(out)
    return result


# How it is asked.


def _settings(
    methods: Mapping[str, Steering | Sequence[Setting]], pairs: Iterable[InstructionPair]
) -> dict[str, list[Setting]]:
    """The settings of each method, the references first; the bare query is one where every pair has it."""
    if not methods or set(methods) & set(REFERENCES):
        raise SteerlensError(
            f"a comparison needs methods, and {' and '.join(REFERENCES)} are always part of it; got {list(methods)}"
        )
    bare = all(pair.query is not None for pair in pairs)
    found = {"none": [Setting(Plan(), with_text=False)]} if bare else {}
    found["text"] = [Setting(Plan(), with_text=True)]
    for name, given in methods.items():
        several = isinstance(given, Sequence)
        found[name] = list(given) if several else [Setting(given)]  # type: ignore[arg-type]
        names = [one.name if isinstance(one, Setting) else None for one in found[name]]
        if not names or None in names or len(set(names)) < len(names):
            raise DataError(f"a method needs settings with names that differ, got {names} for {name!r}; see swept()")
    return found


def _rows(
    tried: Mapping[str, Sequence[Setting]], pairs: PairSet, split: str, *, trials: int, seed: int, control: bool = False
) -> list[tuple[dict[str, Any], Request]]:
    """What is asked, each with what tables say of it."""
    return [
        (
            {"split": split, "method": name, "setting": one.name, "strength": float(one.strength), "control": control},
            request,
        )
        for name, settings in tried.items()
        for one in settings
        for request in one.requests(pairs, trials=trials, seed=seed, control=control)
    ]


def _scored(sampler: Sampler, rows: Sequence[tuple[dict[str, Any], Request]], quality: Quality) -> pd.DataFrame:
    if not rows:
        return pd.DataFrame()
    scores = score(sampler, [request for _, request in rows], quality=quality)
    return pd.DataFrame([label for label, _ in rows]).join(scores)


# What is made of it.


def _judged(scores: pd.DataFrame, verdict: Verdict) -> pd.DataFrame:
    """The scores whose `followed` is the verdict that counts; `loose` keeps the other one."""
    if scores.empty:
        return scores
    return scores.assign(
        loose=scores["followed"], followed=scores["followed_strict" if verdict == "strict" else "followed"]
    )


def _validation(judged: pd.DataFrame) -> pd.DataFrame:
    searched = judged[judged["split"] == "valid"] if len(judged) else judged
    if searched.empty:
        return pd.DataFrame(columns=[*KEYS, "rate", "eligible", "chosen"])
    table = rates_and_quality(searched, KEYS)
    table["eligible"] = table["degenerate"] <= _allowed(table)
    table["chosen"] = False
    for _, rows in table.groupby("method", sort=False):
        # Where none is eligible, the one that breaks the fewest responses.
        kept = rows[rows["eligible"]]
        place = kept["rate"].idxmax() if len(kept) else rows["degenerate"].idxmin()
        table.loc[place, "chosen"] = True
    return table


def _allowed(table: pd.DataFrame) -> float:
    """The share of degenerate responses of the instruction alone."""
    return float(table.loc[table["method"] == "text", "degenerate"].iloc[0])


def _chosen(tried: Mapping[str, Sequence[Setting]], searched: pd.DataFrame, verdict: Verdict) -> dict[str, Setting]:
    """The chosen setting of each method; of a method with one setting, that."""
    table = _validation(_judged(searched, verdict))
    names: dict[str, str] = dict(table.loc[table["chosen"].astype(bool), KEYS].itertuples(index=False))
    return {
        name: next(one for one in settings if one.name == names.get(name, one.name))
        for name, settings in tried.items()
        if name in names or len(settings) == 1
    }


def _table(judged: pd.DataFrame) -> pd.DataFrame:
    """One row per method, setting and control over all test prompts."""
    by = [*KEYS, "control"]
    tested = judged[judged["split"] == "test"]
    table = rates_and_quality(tested, by)
    groups = tested.groupby(by, sort=False, dropna=False)
    table = table.merge(groups["loose"].mean().reset_index(), on=by)
    table.insert(2, "strength", groups["strength"].first().to_numpy())
    table.insert(4, "condition", groups["condition"].first().to_numpy())
    measure = tested["reward"] if "reward" in tested else -np.log(tested["perplexity"].astype(float))
    means = [
        bootstrap_mean(measure[rows.index], clusters=unit_labels(rows, "query"), n_resamples=2000) for _, rows in groups
    ]
    for name, field in (("quality", "mean"), ("quality_low", "low"), ("quality_high", "high")):
        table[name] = [getattr(one, field) for one in means]
    found = _validation(judged)
    found = found[[*KEYS, "rate", "chosen"]].rename(columns={"rate": "valid_rate"}).assign(control=False)
    table = table.merge(found, on=by, how="left")
    # An only setting needs no choice.
    alone = (table.groupby("method")["setting"].transform("nunique") == 1) & ~table["control"]
    table["chosen"] = (table["chosen"] == True) | alone  # noqa: E712  # a control has none
    shown = table[~table["control"]]
    front = pareto_front(shown[shown["degenerate"] <= _allowed(shown)], maximize=["rate", "quality"])
    table["pareto"] = table.index.isin(front.index)
    return table


def _compared(judged: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    tested = judged[judged["split"] == "test"]
    has_choice = table.groupby("method")["chosen"].transform("any")
    kept = table[(table["chosen"] | ~has_choice) & ~table["control"]]
    parts: list[pd.DataFrame] = []
    for baseline in (*REFERENCES, "control"):
        found = []
        for method, setting in kept[KEYS].itertuples(index=False):
            own = (tested["method"] == method) & (tested["setting"] == setting)
            against = own & tested["control"] if baseline == "control" else tested["method"] == baseline
            if method == baseline or not against.any():
                continue
            both = pd.concat(
                [tested[against].assign(condition=baseline), tested[own & ~tested["control"]].assign(condition=method)]
            )
            one = compare_conditions(
                both, baseline=baseline, by=(), pair_on=("query", "instruction", "prompt_id", "trial")
            )
            found.append(one.assign(setting=setting))
        if found:
            together = pd.concat(found, ignore_index=True).rename(columns={"condition": "method"})
            first = ["baseline", "method", "setting"]
            together = together[[*first, *(name for name in together if name not in first)]]
            parts.append(together.assign(p_holm=holm(together["p_value"])))
    return pd.concat(parts, ignore_index=True)


# Time.

TIMED_ROWS = 8
"""Prompts of the batch that is timed."""


def measure_speed(
    model: Any,
    runs: Mapping[tuple[str, str], Sequence[tuple[str, Plan]]],
    *,
    max_new_tokens: WholeNumber = 64,
    rounds: WholeNumber = 3,
    prompt_format: PromptFormat = PromptFormat(),
) -> pd.DataFrame:
    """How fast each run decodes its prompts in one batch: medians over rounds in which the runs take turns.

    A busy machine slows all of them alike that way; repeated measurements still differ. Every run is warmed up first.

    Args:
        runs: By method and setting, prompts with their plans.
        max_new_tokens: Of each prompt; a row that stops sooner leaves the batch.

    Returns:
        Columns method, setting, tokens_per_second, with reading the prompts, and first_token: seconds until every prompt has one.

    Example:
        >>> measure_speed(model, {("none", ""): [("What is iron?", sl.Plan())]}, max_new_tokens=4, rounds=1)["method"].tolist()
        ['none']
    """

    def run(rows: Sequence[tuple[str, Plan]], n: int) -> tuple[float, int]:
        start = time.perf_counter()
        found = generate(
            model,
            [prompt for prompt, _ in rows],
            steering=[plan for _, plan in rows],
            max_new_tokens=n,
            batch_size=len(rows),
            prompt_format=prompt_format,
        )
        return time.perf_counter() - start, sum(len(row.tokens) for row in found)

    length = whole(max_new_tokens, "max_new_tokens")
    for rows in runs.values():
        run(rows, 2)
    first: dict[Any, list[float]] = {key: [] for key in runs}
    rates: dict[Any, list[float]] = {key: [] for key in runs}
    for _ in range(whole(rounds, "rounds")):
        for key, rows in runs.items():
            first[key].append(run(rows, 1)[0])
            seconds, n_tokens = run(rows, length)
            rates[key].append(n_tokens / seconds)
    columns = [*KEYS, "tokens_per_second", "first_token"]
    return pd.DataFrame(
        [(*key, statistics.median(rates[key]), statistics.median(first[key])) for key in runs], columns=columns
    )
