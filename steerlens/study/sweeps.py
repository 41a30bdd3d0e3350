"""Sweeps: many ways to apply a vector, and the choice among them.

Every candidate (no steering first, then those of the spec) answers the same validation prompts, all as rows of shared batches. A
candidate's rate counts responses that follow the instruction. A candidate that does not pass the quality gate is out, and the
highest rate wins. The gates:

    "degenerate"          no more responses than without steering are empty or loop (half of the token trigrams repeat an earlier
                          one); needs no second model
    "low_perplexity"      no more responses than without steering have a perplexity below 2.5: looping text is all too likely.
                          What Stolfo et al. (2025) ask of base models, with GPT-2 as the judge
    "no_low_perplexity"   no response has one: what they ask of instruction-tuned models

The last two want a judge of their own (`Quality(quality_model=...)`): a model finds most of its own texts likely.

Ties go to no steering, then to the first candidate: the lowest layer, then the smaller coefficient. The candidates of one prompt
and trial share their random numbers, so that differences between them are not the sampler's.

What is searched must not be reported on the same prompts: `Sweep.nested` reports each prompt under the choice that the other
prompts made, and generates nothing for that.
"""

import html
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, Unpack, get_args, overload

import numpy as np
import pandas as pd

from steerlens._typing import (
    AttentionOperator,
    Gate,
    Operator,
    RealNumber,
    Unit,
    WholeNumber,
    real_numbers,
    several,
    whole,
)
from steerlens.data.pairs import PairSet
from steerlens.errors import DataError, SteerlensError, nearest
from steerlens.files import derived_seed, json_lines, user_path, write_atomically
from steerlens.models.facts import check_layer
from steerlens.stats.pareto import pareto_front
from steerlens.stats.rates import rates_and_quality, unit_labels
from steerlens.steering.candidates import UNSTEERED, Candidate, grid
from steerlens.steering.plan import Plan
from steerlens.steering.positions import Window
from steerlens.study.quality import Quality
from steerlens.study.responses import Request, SamplerSettings, requests_for, sampler_of
from steerlens.study.scores import read_scores, score, start_results
from steerlens.vectors.vector import SteeringVector

if TYPE_CHECKING:
    import plotly.graph_objects as go

Method = Callable[[float], Plan]
"""A way to steer, by its coefficient: `pasta`, `spotlight`, or a function of one's own."""

Spec = Sequence[Candidate] | Callable[[SteeringVector], Iterable[Candidate]]
"""What to try: a list (also of `grid` or `draws`), or a function of each instruction's vector."""


Searched = Literal["vector", "text+vector", "text+attention", "text+vector+attention"]
"""The conditions under which a sweep can search."""


CANDIDATE = [field.name for field in fields(Candidate)]
"""Columns that name a candidate; `coeff` is in its `unit`."""


SIZES = ("coeff_absolute", "coeff_in_norms")
"""Columns of an `add` step's size in both units; where a row of a table joins steps of several sizes, they are missing."""


RESULTS = ("scores.jsonl", "table.csv", "sweep.html")
"""What a finished sweep leaves in its folder, besides its generations."""


@dataclass(frozen=True)
class Best(Candidate):
    """What a search chose; `vector.at(best)` applies it. Layer None: no steering did at least as well as any candidate.

    Example:
        >>> Best(4, coeff=0.5, rate=0.75).positions
        'all'
    """

    rate: float = float("nan")
    """The chosen candidate's rate on the validation prompts; not an estimate of its rate elsewhere."""

    @classmethod
    def of(cls, row: Mapping[Any, Any]) -> "Best":
        """The candidate of a row of `Sweep.table`."""
        layer = None if pd.isna(row["layer"]) else int(row["layer"])
        return cls(layer, float(row["coeff"]), row["operator"], row["positions"], row["unit"], rate=float(row["rate"]))


@dataclass(frozen=True, eq=False)
class Sweep:
    """A finished sweep: a sequence of candidates with their rates, one per row of `table`.

    >>> found = sweep(model, vector, valid[:2], layers=[3, 4], max_new_tokens=8)
    >>> len(found), found[1].layer
    (3, 3)
    """

    scores: pd.DataFrame
    """One row per response."""
    table: pd.DataFrame
    """One row per instruction and candidate: rate with its interval, quality, whether it passed the gate, which was chosen."""
    gate: Gate = "degenerate"

    @cached_property
    def configurations(self) -> pd.DataFrame:
        """One row per candidate over all instructions that tried it (n_instructions): rate, spread of trials, quality."""
        counts = self.scores.groupby(CANDIDATE, sort=False, dropna=False)["instruction"].nunique()
        table = with_sizes(rates_and_quality(self.scores, CANDIDATE), self.scores, CANDIDATE)
        return table.merge(counts.rename("n_instructions").reset_index(), on=CANDIDATE)

    def best(
        self,
        instruction_id: str | None = None,
        *,
        objective: str = "rate",
        subject_to: str = "eligible",
    ) -> Best:
        """The choice for an instruction, by its id; it may be left out where there is one.

        Args:
            objective: The column of `table` to make as large as possible; "-" before it: as small as possible.
            subject_to: A condition on the columns of `table` as in `DataFrame.query`, such as
                "median_perplexity < 8 and mean_repetition < 0.2". Default: the gate.

        Raises:
            SteerlensError: if the search covered several instructions and none is named, a name is unknown, or nothing meets
                the condition.
        """
        names = list(dict.fromkeys(self.table["instruction"]))
        if instruction_id is None and len(names) == 1:
            (instruction_id,) = names
        if instruction_id is None:
            raise SteerlensError(f"best() needs the name of one of the searched instructions: {', '.join(names)}")
        if instruction_id not in names:
            raise SteerlensError(f"the search did not cover {instruction_id!r}; {nearest(instruction_id, names)}")
        return _best(self.table[self.table["instruction"] == instruction_id], objective, subject_to)

    def pareto(
        self, *, maximize: Sequence[str] = ("rate",), minimize: Sequence[str] = ("degenerate", "mean_repetition")
    ) -> pd.DataFrame:
        """The rows of `configurations` that no other row beats in one of these columns without losing in another.

        Only candidates that every instruction tried are compared: others met easier or harder instructions.
        """
        table = self.configurations
        return pareto_front(
            table[table["n_instructions"] == table["n_instructions"].max()], maximize=maximize, minimize=minimize
        )

    def nested(self, *, folds: int = 4, seed: int = 0) -> pd.DataFrame:
        """Each prompt's responses under the candidate that the other folds' prompts chose: scores to report.

        The prompts of an instruction are dealt into `folds` parts by query; the choice for a part is made on the others. The
        rate of these rows estimates how well *searching* works, without the optimism of reporting the winner's own rate.

        Raises:
            SteerlensError: if an instruction has fewer prompts than folds, or folds is below 2.
        """
        parts = []
        for name, group in self.scores.groupby("instruction", sort=False):
            asked = unit_labels(group, "query")
            queries = sorted(asked.unique(), key=lambda query: derived_seed(seed, query))
            if not 2 <= folds <= len(queries):
                raise SteerlensError(
                    f"folds must be in [2, {len(queries)}], the number of queries of {name!r}; got {folds}"
                )
            fold = asked.map({query: place % folds for place, query in enumerate(queries)})
            for held_out in range(folds):
                chosen = choose(group[fold != held_out], self.gate)
                (row,) = chosen[chosen["chosen"]].to_dict("records")
                parts.append(_rows_of(group[fold == held_out], row).assign(fold=held_out))
        return pd.concat(parts, ignore_index=True)

    def save(self, folder: str | Path) -> None:
        """Write scores.jsonl (one row per response) and table.csv (one per instruction and candidate) into a folder."""
        write_atomically(Path(folder) / "scores.jsonl", json_lines(self.scores))
        write_atomically(Path(folder) / "table.csv", self.table.assign(gate=self.gate).to_csv(index=False))

    @classmethod
    def load(cls, folder: str | Path) -> "Sweep":
        """Read what `save` or `sweep(out=...)` left in a folder.

        Raises:
            DataError: if the folder holds no finished sweep.
        """
        scores, path = read_scores(folder), user_path(folder) / "table.csv"
        gates = set(pd.read_csv(path).get("gate", [])) if path.is_file() else set()
        if len(gates) != 1:
            raise DataError(
                f"the folder of a sweep must hold table.csv with its gate, got {str(folder)!r}; save it again"
            )
        (gate,) = gates
        return cls(scores, choose(scores, gate), gate)

    def to_frame(self) -> pd.DataFrame:
        """The table, one row per instruction and candidate, as a frame of the caller's own."""
        return self.table.copy()

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Best]:
        return map(Best.of, self.table.to_dict("records"))

    @overload
    def __getitem__(self, index: int) -> Best: ...
    @overload
    def __getitem__(self, index: slice) -> list[Best]: ...
    def __getitem__(self, index: int | slice) -> Best | list[Best]:
        return list(self)[index]

    def plot(self, **options: Any) -> "go.Figure":
        """Rate against layer, a panel per instruction, with the chosen layer; see `figures.layer_curve`.

        Of a method's strengths, which have no layer, rate against coefficient: `figures.coeff_curve`.
        """
        from steerlens.figures.layers import coeff_curve, layer_curve  # plotly, where a picture is asked for

        draw = layer_curve if self.table["layer"].notna().any() else coeff_curve
        return draw(self.table, **options)

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.table.to_html(index=False, float_format='{:.3f}'.format)}"

    def __repr__(self) -> str:
        n = self.table["instruction"].nunique()
        which = "; ".join(
            f"{row['instruction']}: {_in_words(row)} {row['rate']:.0%}"
            for row in self.table[self.table["chosen"]].head(3).to_dict("records")
        )
        return f"Sweep({len(self.configurations)} candidates, {len(self.scores)} responses; {which}{'; …' * (n > 3)})"


def _in_words(row: Mapping[Any, Any]) -> str:
    if not pd.isna(row["layer"]):
        return f"layer {row['layer']}"
    return "no steering" if row["coeff"] == UNSTEERED.coeff else f"coefficient {row['coeff']:g}"


def candidate_layers(n_layers: int, *, step: int = 2) -> list[int]:
    """The paper's candidates: every second layer from a fifth of the depth on.

    Args:
        n_layers: Of the model.
        step: Every how many layers.

    Returns:
        Block indices, counted from zero.

    Example:
        >>> candidate_layers(8)
        [1, 3, 5, 7]
    """
    return list(range(n_layers // 5, n_layers, step))


def sweep(
    model: Any,
    vectors: SteeringVector | Mapping[str, SteeringVector] | Method,
    pairs: PairSet,
    *,
    candidates: Spec | None = None,
    layers: Iterable[WholeNumber] | Literal["paper", "all"] = "paper",
    coeffs: Iterable[RealNumber] = (1.0,),
    operators: Operator | Sequence[Operator] = "set_projection",
    positions: str | Window | Sequence[str | Window] = "all",
    unit: Unit = "absolute",
    condition: Searched | None = None,
    around: Callable[[Plan], Plan] | None = None,
    gate: Gate = "degenerate",
    quality: Quality | None = None,
    trials: WholeNumber = 1,
    seed: WholeNumber = 0,
    out: str | Path | None = None,
    **settings: Unpack[SamplerSettings],
) -> Sweep:
    """The rate of every candidate on validation prompts, and the choice for each instruction.

    Args:
        model: A model; or a `Sampler` of one, whose settings and journal then hold.
        vectors: One vector for all pairs, or one per instruction id; or a function that makes a plan of a coefficient, such as
            `pasta`, which is tried at the `coeffs`.
        pairs: Validation prompts: not those the vectors were fitted on, nor those to be reported.
        candidates: What to try. Default: the grid of the next five arguments.
        layers: "paper" takes `candidate_layers`, "all" every layer of the vector.
        coeffs, operators, positions, unit: As in `SteeringVector.at`; one operator and rule, or several. A function is searched
            over `coeffs` alone, which must be given.
        condition: Search with the bare query ("vector"), or with the instruction in the prompt; default for a function: what it
            steers, with the instruction in the prompt.
        around: What is made of each candidate's plan, such as `plausible`, its gate. `vector.at(best)` is the plan without it.
        gate: The quality that a candidate must not lose.
        quality: What scores the responses; default: perplexity under the model itself where the gate asks for it.
        trials: Responses per prompt and candidate; more than one needs a temperature.
        seed: Decides the samples, above temperature 0; greedy sweeps do not depend on it.
        out: A folder that keeps every response as it is made (generations.jsonl), so that the same sweep goes on where it was
            cut short and a larger one generates only what is new; scores.jsonl and table.csv are written at the end.
        settings: As in `evaluate`; here batch_size is 64 by default, because candidates share their prompts.

    Returns:
        The scores of all responses, and a table with one row per instruction and candidate.

    Raises:
        DataError: if there are no pairs, or an instruction has no vector.
        SteerlensError: if a layer is out of range or not in a vector, there is no candidate, or settings come with a sampler,
            which has its own.

    Example:
        >>> found = sweep(model, vector, valid[:2], layers=[3, 4], positions="last", max_new_tokens=8)
        >>> found.best().layer in (None, 3, 4)
        True
    """
    measured = quality or Quality.for_gate(gate)
    trials, seed = whole(trials, "trials"), whole(seed, "seed")
    coeffs = real_numbers(coeffs, "coeff")
    if _is_method(vectors):
        given = {"layers": layers != "paper", "operators": operators != "set_projection"}
        given |= {"positions": positions != "all", "unit": unit != "absolute"}
        for name in (name for name, is_given in given.items() if is_given):
            raise SteerlensError(
                f"a function is searched over coeffs alone, got {name} as well; set it in the function"
            )
        if candidates is None and coeffs == [1.0]:
            raise SteerlensError(
                "a search over a function needs the coefficients to try, got none; give coeffs=[0.1, 0.01]"
            )
    if condition is None and _is_method(vectors):
        listed = candidates if isinstance(candidates, Sequence) else []
        sizes = [*(candidate.coeff for candidate in listed), *coeffs]
        condition = _condition_of(vectors, sizes[0]) if sizes else "text+attention"
    condition = condition or "vector"
    rules = {
        f"condition must be one of {', '.join(get_args(Searched))}": condition in get_args(Searched),
        f"gate must be one of {', '.join(get_args(Gate))}, all but the first with perplexity measured": gate
        == "degenerate"
        or (gate in get_args(Gate) and measured.perplexity),
        "trials must be at least 1": trials >= 1,
    }
    for rule, holds in rules.items():
        if not holds:
            raise SteerlensError(f"{rule}, got condition {condition!r}, gate {gate!r}, {measured}, trials {trials}")
    if len(pairs) == 0:
        raise DataError("a search needs at least one validation prompt, got none; check the split and the filter")
    by_instruction = vectors if isinstance(vectors, Mapping) else dict.fromkeys(pairs.instructions, vectors)
    with sampler_of(model, out, settings) as sampler:
        if candidates is None and _is_method(vectors):
            candidates = method_candidates(vectors, coeffs)
        elif candidates is None:
            options: Any = {"coeffs": coeffs, "operators": operators, "positions": positions, "unit": unit}
            candidates = _grid_over(sampler.model, layers, options)
        tried, requests = _rows(sampler.model, by_instruction, pairs, candidates, condition, around, trials, seed)
        if out is not None:
            names = [str(one) for one in dict.fromkeys(tried)]
            asked = {"condition": condition, "gate": gate, "trials": trials, "seed": seed, "candidates": names}
            start_results(out, "sweep", sampler, requests, pairs, measured, RESULTS, **asked)
        scores = score(sampler, requests, quality=measured)
    # A row's candidate is set here, because a step of coefficient 0 is still a candidate of its own.
    places = pd.DataFrame([asdict(candidate) for candidate in tried])
    scores = scores.assign(**{name: places[name].to_numpy() for name in CANDIDATE}).astype({"layer": "Int64"})
    found = Sweep(scores, choose(scores, gate), gate)
    if out is not None:
        found.save(out)
    return found


def _grid_over(model: Any, layers: Any, options: Mapping[str, Any]) -> Spec:
    """The grid over the layers that a vector has."""
    wanted: Any = layers if isinstance(layers, str) else several(layers)
    if isinstance(wanted, str) and wanted not in ("paper", "all"):
        raise SteerlensError(f'layers must be numbers, "paper" or "all", got {wanted!r}')

    def spec(vector: SteeringVector) -> list[Candidate]:
        if wanted == "paper":
            chosen = [layer for layer in candidate_layers(int(model.cfg.n_layers)) if layer in vector]
        elif wanted == "all":
            chosen = list(vector)
        else:
            chosen = [check_layer(model, layer) for layer in wanted]
        if not chosen:
            raise SteerlensError(f"a search needs a layer to try, got {wanted!r} for {vector!r} of {list(vector)}")
        return grid(layers=chosen, **options)

    return spec


def _rows(
    model: Any,
    vectors: Mapping[str, SteeringVector | Method],
    pairs: PairSet,
    candidates: Spec,
    condition: str,
    around: Callable[[Plan], Plan] | None,
    trials: int,
    seed: int,
) -> tuple[list[Candidate], list[Request]]:
    """Each response's candidate and request: every pair without steering, then under every candidate for its instruction."""
    unsteered = "none" if condition == "vector" else "text"
    requests: list[Request] = requests_for(pairs, Plan(), conditions=[unsteered], trials=trials, seed=seed)
    tried = [UNSTEERED] * len(requests)
    for name, group in pairs.by_instruction().items():
        if name not in vectors:
            raise DataError(f"every instruction needs a vector, got none for {name!r}; vectors: {', '.join(vectors)}")
        vector = vectors[name]
        if isinstance(vector, SteeringVector):
            vector.check_fits(model)
        for candidate in _listed(candidates, vector):
            plan = vector.at(candidate) if isinstance(vector, SteeringVector) else vector(candidate.coeff)
            plan = plan if around is None else around(plan)
            rows = requests_for(group, plan, conditions=[condition], trials=trials, seed=seed)
            requests += rows
            tried += [candidate] * len(rows)
    return tried, requests


def _is_method(vectors: Any) -> TypeGuard[Method]:
    return callable(vectors) and not isinstance(vectors, SteeringVector | Mapping)


def method_candidates(method: Method, coeffs: Iterable[RealNumber]) -> list[Candidate]:
    """A method's strengths as candidates, in the order given."""
    return [Candidate(None, coeff, _method_operator(method(coeff))) for coeff in real_numbers(coeffs, "coeff")]


def _condition_of(method: Method, coeff: float) -> Searched:
    """The cell of all that a method steers, with the instruction in the prompt."""
    plan = method(coeff)
    if not plan.attention:
        return "text+vector"
    return "text+vector+attention" if plan.residual else "text+attention"


def _method_operator(plan: Plan) -> Operator | AttentionOperator:
    """What a table calls what a method does: its first step on attention, or its first."""
    if not plan:
        raise SteerlensError("a search over a function needs one that makes a plan that steers, got no steering")
    return plan.attention[0].operator if plan.attention else plan.residual[0].operator


def _listed(candidates: Spec, vector: SteeringVector | Method) -> list[Candidate]:
    spec: Any = candidates
    found: list[Candidate] = list(dict.fromkeys(spec(vector) if callable(spec) else spec))
    found = [candidate for candidate in found if candidate != UNSTEERED]
    if not found:
        raise SteerlensError(f"a search needs a candidate to try, got none for {vector!r}")
    for candidate in found:
        if candidate.layer is None and isinstance(vector, SteeringVector):
            raise SteerlensError("a candidate needs a layer; no steering is always part of a search")
    return found


def choose(scores: pd.DataFrame, gate: Gate = "degenerate") -> pd.DataFrame:
    """One row per instruction and candidate, in the order of the candidates, with the choice marked.

    A candidate is eligible if its share of responses that fail the gate is at most that of no steering, for "no_low_perplexity"
    if it is zero; the first eligible one of the highest rate is chosen. No steering is always eligible.

    Raises:
        DataError: if the scores do not have the gate's column, or lack a value there.
    """
    failed = gate.removeprefix("no_")
    if failed not in scores or scores[failed].isna().any():
        raise DataError(
            f"the gate {gate!r} needs the column {failed!r} without missing values; score the responses with it"
        )
    keys = ["instruction", *CANDIDATE]
    table = with_sizes(rates_and_quality(scores, keys), scores, keys)
    table["eligible"] = False
    table["chosen"] = False
    for _, group in table.groupby("instruction", sort=False):
        unsteered = group["layer"].isna() & (group["coeff"] == UNSTEERED.coeff)
        allowed = 0.0 if gate == "no_low_perplexity" else group.loc[unsteered, failed].iloc[0]
        eligible = unsteered | (group[failed] <= allowed)
        table.loc[group.index, "eligible"] = eligible
        table.loc[group.loc[eligible, "rate"].idxmax(), "chosen"] = True
    return table


def with_sizes(table: pd.DataFrame, scores: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """A summary with the steps' sizes in both units after its keys, where the scores hold them and a row has one size."""
    names = [name for name in SIZES if name in scores]
    if not names:
        return table
    groups = scores.groupby(list(keys), sort=False, dropna=False)[names]
    found = groups.first().where(groups.nunique() <= 1).reset_index()
    return table[list(keys)].merge(found, on=list(keys)).merge(table, on=list(keys))


def _best(table: pd.DataFrame, objective: str, subject_to: str) -> Best:
    sign, column = (-1.0, objective[1:]) if objective.startswith("-") else (1.0, objective)
    if column not in table or not pd.api.types.is_numeric_dtype(table[column]):
        raise SteerlensError(
            f"the objective must be a number in the table, got {objective!r}; {nearest(column, table.columns)}"
        )
    try:
        kept = table.query(subject_to)
    except Exception as error:  # whatever pandas' parser raises
        raise SteerlensError(
            f"subject_to must be a condition on the table's columns, got {subject_to!r}: {error}; "
            f"columns: {', '.join(table.columns)}"
        ) from error
    values = sign * kept[column].astype(float)
    if values.isna().all():
        raise SteerlensError(f"no candidate meets {subject_to!r} with a value of {column!r}; loosen the condition")
    return Best.of(kept.iloc[int(np.nanargmax(values.to_numpy()))].to_dict())


def _rows_of(scores: pd.DataFrame, candidate: Mapping[Any, Any]) -> pd.DataFrame:
    """The scores of one candidate."""
    same = np.ones(len(scores), dtype=bool)
    for name in CANDIDATE:
        value = candidate[name]
        same &= (scores[name].isna() if pd.isna(value) else (scores[name] == value).fillna(False)).to_numpy(dtype=bool)
    return scores[same]
