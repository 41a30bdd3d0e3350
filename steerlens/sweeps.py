"""Search: at which layer, and how strongly, should a vector be applied?

Every candidate (no steering, then each layer x coefficient x operator) answers the same validation prompts, all as rows of
shared batches. A candidate's rate counts responses that follow the instruction; its degenerate share counts responses that
repeat themselves. As in Stolfo et al. (2025), a candidate that degenerates more often than no steering does is out, and the
highest rate wins. Their test for degeneration is a GPT-2 perplexity below 2.5; here it is a response that is empty, or half of
whose token trigrams repeat an earlier one, which needs no second model and looks for the same: looping text.

Ties go to no steering, then to the lowest layer, then to the smaller coefficient, in the order of the candidates. What is
searched here must not be reported on the same prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import pandas as pd

from steerlens._typing import Operator
from steerlens.data import PairSet
from steerlens.errors import DataError, SteerlensError, nearest
from steerlens.evaluation import Request, Sampler, requests_for, score
from steerlens.metrics import quality_table, rate_table
from steerlens.model import check_layer
from steerlens.plan import Plan
from steerlens.positions import Window
from steerlens.prompts import PromptFormat
from steerlens.sampling import SamplingConfig
from steerlens.vectors import SteeringVector


@dataclass(frozen=True)
class Best:
    """What a search chose; `vector.at(best)` applies it."""

    layer: int | None
    """None: no steering did at least as well as any candidate."""
    coeff: float
    operator: Operator
    rate: float
    """The chosen candidate's rate on the validation prompts; not an estimate of its rate elsewhere."""
    positions: str | Window = "all"
    """Where the candidates were applied."""
    unit: str = "absolute"
    """Of the coefficient; see `SteeringVector.at`."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """A finished search."""

    scores: pd.DataFrame
    """One row per validation response."""
    table: pd.DataFrame
    """One row per instruction and candidate: rate with its interval, quality, degenerate share, and which was chosen."""
    positions: str | Window = "all"
    unit: str = "absolute"

    def best(self, instruction: str | None = None) -> Best:
        """The choice for an instruction; it may be left out where there is one.

        Raises:
            SteerlensError: if the search covered several instructions and none is named, or it is unknown.
        """
        chosen = {row["instruction"]: row for row in self.table[self.table["chosen"]].to_dict("records")}
        if instruction is None and len(chosen) == 1:
            (instruction,) = chosen
        if instruction is None:
            raise SteerlensError(f"best() needs the name of one of the searched instructions: {', '.join(chosen)}")
        if instruction not in chosen:
            raise SteerlensError(f"the search did not cover {instruction!r}; {nearest(instruction, chosen)}")
        row = chosen[instruction]
        layer = None if pd.isna(row["layer"]) else int(row["layer"])
        return Best(layer, float(row["coeff"]), row["operator"], float(row["rate"]), self.positions, self.unit)

    def _repr_html_(self) -> str:
        return str(self.table.to_html(index=False, float_format="{:.3f}".format))

    def __repr__(self) -> str:
        return str(self.table.to_string(index=False, float_format="{:.3f}".format))


def candidate_layers(n_layers: int, *, step: int = 2) -> list[int]:
    """The paper's candidates: every second layer from a fifth of the depth on."""
    return list(range(n_layers // 5, n_layers, step))


def sweep(
    model: Any,
    vectors: SteeringVector | Mapping[str, SteeringVector],
    pairs: PairSet,
    *,
    layers: Sequence[int] | Literal["paper", "all"] = "paper",
    coeffs: Sequence[float] = (1.0,),
    operator: Operator = "set_projection",
    positions: str | Window = "all",
    unit: Literal["absolute", "resid_norm"] = "absolute",
    condition: Literal["vector", "text+vector"] = "vector",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    prompt_format: PromptFormat = PromptFormat(),
    progress: bool = False,
) -> Sweep:
    """The rate of every candidate on validation prompts, and the choice for each instruction.

    Args:
        vectors: One vector for all pairs, or one per instruction id.
        pairs: Validation prompts: not those the vectors were fitted on, nor those to be reported.
        layers: "paper" takes `candidate_layers`, "all" every layer of the vector.
        coeffs, operator, positions, unit: As in `SteeringVector.at`.
        condition: Search with the bare query, or with the instruction in the prompt.

    Raises:
        DataError: if there are no pairs, or an instruction has no vector.
        SteerlensError: if a layer is out of range or not in a vector, or there is no candidate.
    """
    sampler = Sampler(
        model,
        sampling=SamplingConfig(max_new_tokens, temperature),
        prompt_format=prompt_format,
        batch_size=batch_size,
        progress=progress,
    )
    return search(
        sampler,
        vectors,
        pairs,
        layers=layers,
        coeffs=coeffs,
        operator=operator,
        positions=positions,
        unit=unit,
        condition=condition,
        seed=seed,
    )


def search(
    sampler: Sampler,
    vectors: SteeringVector | Mapping[str, SteeringVector],
    pairs: PairSet,
    *,
    layers: Sequence[int] | Literal["paper", "all"] = "paper",
    coeffs: Sequence[float] = (1.0,),
    operator: Operator = "set_projection",
    positions: str | Window = "all",
    unit: Literal["absolute", "resid_norm"] = "absolute",
    condition: Literal["vector", "text+vector"] = "vector",
    seed: int = 0,
) -> Sweep:
    """`sweep` with a sampler of the caller's, so that its generations are kept and found again."""
    if len(pairs) == 0:
        raise DataError("a search needs at least one validation prompt, got none; check the split and the filter")
    by_instruction = dict.fromkeys(pairs.instructions, vectors) if isinstance(vectors, SteeringVector) else vectors
    unsteered = "none" if condition == "vector" else "text"
    requests: list[Request] = requests_for(pairs, Plan(), conditions=[unsteered], seed=seed)
    places: list[tuple[int | None, float]] = [(None, 0.0)] * len(requests)
    for name, group in pairs.by_instruction().items():
        if name not in by_instruction:
            raise DataError(
                f"every instruction needs a vector, got none for {name!r}; vectors: {', '.join(by_instruction)}"
            )
        vector = by_instruction[name]
        vector.check_fits(sampler.model)
        candidates = list(product(_layers(sampler.model, vector, layers), sorted(set(coeffs), key=abs)))
        if not candidates:
            raise SteerlensError(
                f"a search needs a layer and a coefficient to try, got layers {layers!r} and coeffs {coeffs!r} for a vector "
                f"with layers {list(vector.layers)}"
            )
        for layer, coeff in candidates:
            plan = vector.at(layer, coeff=coeff, operator=operator, positions=positions, unit=unit)
            rows = requests_for(group, plan, conditions=[condition], seed=seed)
            requests += rows
            places += [(layer, coeff)] * len(rows)
    # A row's place is set here, because a step of coefficient 0 is still a candidate of its own.
    scores = score(sampler, requests, perplexity=False).assign(
        layer=pd.array([layer for layer, _ in places], dtype="Int64"),
        coeff=[coeff for _, coeff in places],
        operator=operator,
    )
    return Sweep(scores, choose(scores), positions, unit)


def choose(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per instruction and candidate, in the order of the candidates, with the choice marked.

    A candidate is eligible if its degenerate share is at most that of no steering; the first eligible one of the highest rate
    is chosen. No steering is always eligible.
    """
    keys = ["instruction", "layer", "coeff", "operator"]
    table = rate_table(scores, by=keys).merge(quality_table(scores, by=keys), on=keys)
    degenerate = scores.groupby(keys, sort=False, dropna=False)["degenerate"].mean().reset_index()
    table = table.merge(degenerate, on=keys)
    table["eligible"] = False
    table["chosen"] = False
    for _, group in table.groupby("instruction", sort=False):
        baseline = group.loc[group["layer"].isna(), "degenerate"].iloc[0]
        eligible = group["degenerate"] <= baseline
        table.loc[group.index, "eligible"] = eligible
        table.loc[group.loc[eligible, "rate"].idxmax(), "chosen"] = True
    return table


def _layers(model: Any, vector: SteeringVector, layers: Sequence[int] | Literal["paper", "all"]) -> list[int]:
    if layers == "paper":
        return [layer for layer in candidate_layers(int(model.cfg.n_layers)) if layer in vector.directions]
    if layers == "all":
        return list(vector.layers)
    return sorted({check_layer(model, int(layer)) for layer in layers})
