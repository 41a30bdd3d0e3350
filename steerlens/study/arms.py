"""Arms of a study: what is done to the prompts of an instruction, answered in shared batches, and the result with its tables.

An arm is a plan in one place (a layer, a window of them), or the control of such a plan. All arms of all instructions answer
their prompts as rows of one sampler's batches; what was answered is kept, so that a study goes on where it was cut
short. See `layers`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from steerlens._results import Result
from steerlens._typing import WholeNumber, whole
from steerlens.data.pairs import PairSet
from steerlens.errors import DataError
from steerlens.files import derived_seed, json_lines, user_path, write_atomically
from steerlens.stats.comparisons import compare_conditions
from steerlens.stats.rates import rates_and_quality
from steerlens.steering.plan import Plan
from steerlens.study.quality import Quality
from steerlens.study.responses import Request, SamplerSettings, control_seed, requests_for, sampler_of
from steerlens.study.scores import read_scores, score, start_results
from steerlens.vectors.vector import SteeringVector

if TYPE_CHECKING:
    import plotly.graph_objects as go

Kind = Literal["steering", "necessity", "transfer"]
PLACES: dict[str, list[str]] = {
    "steering": ["mode", "layer"],
    "necessity": ["window", "layer"],
    "transfer": ["from_layer", "layer"],
}
"""Columns that say where a cell of each study steers."""

COMPARED = {
    "steering": [("none", "vector"), ("none", "random"), ("random", "vector")],
    "necessity": [
        ("text", "text+vector"),
        ("text", "random"),
        ("text", "random ablated"),
        ("random", "text+vector"),
        ("random ablated", "text+vector"),
    ],
    "transfer": [("none", "vector"), ("random", "vector")],
}
"""Which conditions are set side by side in each cell, prompt by prompt: baseline first."""

RESULTS = ("scores.jsonl", "table.csv", "comparisons.csv")
"""What a finished study leaves in its folder, besides its generations."""


Control = Callable[[Plan, int], Plan]
"""Makes of a plan, with a seed, its control for one prompt."""


N_DRAWS = 8
"""Random directions that are drawn for each control; a prompt's query decides which of them it takes."""

NOTHING = Plan()


@dataclass(frozen=True)
class Arm:
    """What is done to every prompt of an instruction, and what tables call it."""

    condition: str
    plan: Plan = NOTHING
    layer: int | None = None
    place: Mapping[str, Any] = field(default_factory=dict)
    """The other column that says where."""
    with_text: bool = False
    """Whether the instruction stands in the prompt."""
    control: Control | None = None
    """What makes of the plan, with a seed, its control for one prompt; None: the plan itself steers all of them."""

    def requests(self, pairs: PairSet, *, seed: int, trials: int) -> list[Request]:
        """What the pairs of one instruction ask."""
        cells = ("text", "text+vector") if self.with_text else ("none", "vector")
        drawn: dict[int, Plan] = {}
        found = []
        for pair in pairs:
            plan = self.plan
            if self.control is not None:
                number = derived_seed(pair.query or pair.prompt) % N_DRAWS
                if number not in drawn:
                    drawn[number] = self.control(plan, control_seed(plan, seed, pair.instruction_id, str(number)))
                plan = drawn[number]
            found += requests_for([pair], plan, conditions=[cells[bool(plan)]], seed=seed, trials=trials)
        return found


def placebo(plan: Plan, seed: int) -> Plan:
    """The control that pushes by the plan's amounts along random directions."""
    return plan.placebo(seed=seed)


def randomly_ablated(plan: Plan, seed: int) -> Plan:
    """The control that takes away the component along random directions: those of the placebo."""
    drawn = [(step, step.write) for step in plan.placebo(seed=seed).residual]
    options: Any = {"write": None, "operator": "ablate", "name": "a random direction"}
    return Plan(tuple(replace(step, direction=write, **options) for step, write in drawn if write is not None))


REFERENCES = (Arm("none"), Arm("text", with_text=True))


@dataclass(frozen=True, eq=False)
class LayerStudy(Result):
    """A finished study: `table` has a row per instruction, cell and condition, then over all instructions.

    The rate has its Wilson interval over base queries, and quality stands beside it. The necessity study adds `loss`, the rate of
    the instruction's text alone minus that under ablation, prompt by prompt, with its interval.

    >>> from steerlens.study import steer_by_layer
    >>> found = steer_by_layer(model, vector, valid[:2], modes=["alone"], layers=[3], max_new_tokens=4)
    >>> found.table["condition"].tolist(), found.table["layer"].dropna().tolist()
    (['none', 'text', 'vector', 'random'], [3, 3])
    """

    scores: pd.DataFrame
    """One row per response."""
    kind: Kind

    @classmethod
    def of(cls, scores: pd.DataFrame, kind: Kind) -> "LayerStudy":
        """The study of these scores."""
        place = PLACES[kind]
        frame = pd.concat(_groups(scores, place).values())
        table = rates_and_quality(frame, ["instruction", *place, "condition"])
        return cls(_with_loss(table, scores) if kind == "necessity" else table, scores, kind)

    @cached_property
    def comparisons(self) -> pd.DataFrame:
        """Paired differences between the conditions of each cell, per instruction and then over all of them.

        Columns instruction and the cell's, then as in `compare_conditions`; p_holm is corrected over the cells of a comparison.
        """
        return pd.concat([_compared(self.scores, self.kind, *pair) for pair in COMPARED[self.kind]], ignore_index=True)

    def plot(self, **options: Any) -> "go.Figure":
        """Rate or loss against layer, a panel per instruction and mode or window; of a transfer a heat map from layer to layer.

        Args:
            options: Of `figures.steering_by_layer`, `necessity_by_layer` or `transfer_matrix`, such as `title`.
        """
        from steerlens.figures.matrices import transfer_matrix  # plotly, where a picture is asked for
        from steerlens.figures.studies import necessity_by_layer, steering_by_layer

        draw: dict[str, Callable[..., go.Figure]] = {
            "steering": steering_by_layer,
            "necessity": necessity_by_layer,
            "transfer": transfer_matrix,
        }
        return draw[self.kind](self.table, **options)

    def save(self, folder: str | Path) -> None:
        """Write scores.jsonl (one row per response), table.csv and comparisons.csv into a folder."""
        write_atomically(Path(folder) / "scores.jsonl", json_lines(self.scores))
        write_atomically(Path(folder) / "table.csv", self.table.assign(study=self.kind).to_csv(index=False))
        write_atomically(Path(folder) / "comparisons.csv", self.comparisons.to_csv(index=False))

    @classmethod
    def load(cls, folder: str | Path) -> "LayerStudy":
        """Read what `save` or a study with `out=` left in a folder.

        Raises:
            DataError: if the folder holds no finished study of layers.
        """
        path = user_path(folder) / "table.csv"
        kinds = set(pd.read_csv(path).get("study", [])) if path.is_file() else set()
        if len(kinds) != 1 or not kinds <= set(PLACES):
            raise DataError(
                f"the folder of a study of layers must hold table.csv with its study, got {str(folder)!r}; "
                "let the study finish, or save it again"
            )
        (kind,) = kinds
        return cls.of(_typed(read_scores(folder)), kind)

    def __repr__(self) -> str:
        n, cells = self.scores["instruction"].nunique(), len(self.scores[PLACES[self.kind]].drop_duplicates())
        rates = self.scores.groupby("condition", sort=False)["followed"].mean()
        followed = ", ".join(f"{condition} {rate:.0%}" for condition, rate in rates.items())
        return (
            f"LayerStudy({self.kind}: {len(self.scores)} responses, {n} instruction{'s' * (n != 1)}, {cells} cells; "
            f"followed in the mean: {followed})"
        )


# How it is answered.


def run_study(
    kind: Kind,
    model: Any,
    vectors: SteeringVector | Mapping[str, SteeringVector],
    pairs: PairSet,
    arms: Callable[[Any, SteeringVector], Iterable[Arm]],
    trials: WholeNumber,
    seed: WholeNumber,
    quality: Quality,
    out: str | Path | None,
    settings: SamplerSettings,
    asked: Mapping[str, Any],
) -> LayerStudy:
    """The references and arms of every instruction, answered in shared batches and scored."""
    if len(pairs) == 0:
        raise DataError("a study needs at least one prompt, got none; check the split and the filter")
    by_instruction = dict.fromkeys(pairs.instructions, vectors) if isinstance(vectors, SteeringVector) else vectors
    options = {"trials": whole(trials, "trials"), "seed": whole(seed, "seed")}
    requests: list[Request] = []
    places: list[Arm] = []
    with sampler_of(model, out, settings) as sampler:
        for name, group in pairs.by_instruction().items():
            if name not in by_instruction:
                known = ", ".join(by_instruction)
                raise DataError(f"every instruction needs a vector, got none for {name!r}; vectors: {known}")
            vector = by_instruction[name]
            vector.check_fits(sampler.model)
            for arm in (*REFERENCES, *arms(sampler.model, vector)):
                rows = arm.requests(group, **options)
                requests += rows
                places += [arm] * len(rows)
        if out is not None:
            start_results(out, f"{kind} study", sampler, requests, pairs, quality, RESULTS, **options, **asked)
        scores = score(sampler, requests, quality=quality)
    first = PLACES[kind][0]
    columns: dict[str, Any] = {
        first: [arm.place.get(first) for arm in places],
        "layer": [arm.layer for arm in places],
        "condition": [arm.condition for arm in places],
    }
    found = LayerStudy.of(_typed(scores.assign(**columns)), kind)
    if out is not None:
        found.save(out)
    return found


def _typed(scores: pd.DataFrame) -> pd.DataFrame:
    """Layers as whole numbers beside missing ones."""
    return scores.astype(dict.fromkeys([name for name in ("layer", "from_layer") if name in scores], "Int64"))


# What is shown of it.


def _groups(scores: pd.DataFrame, place: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The scores of all instructions, each on its own, and "all" together where there are several.

    Together only in cells that every instruction has: others met easier or harder ones.
    """
    scores = scores.assign(asked=scores["instruction"])
    groups = {"": scores}
    if (n := scores["instruction"].nunique()) > 1:
        cells = scores.groupby([*place, "condition"], dropna=False)["instruction"].transform("nunique")
        groups["all"] = scores[cells == n].assign(instruction="all")
    return groups


def _compared(scores: pd.DataFrame, kind: Kind, baseline: str, condition: str) -> pd.DataFrame:
    """One condition against another in every cell, paired by prompt."""
    place = PLACES[kind]
    rows = scores[scores["condition"] == condition]
    cells = rows[["instruction", *place]].drop_duplicates()
    reference = scores[scores["condition"] == baseline]
    # A reference that has no place of its own stands beside every cell: none and text, and of a transfer the layer's control.
    shared = [name for name in place if reference[name].notna().any()]
    own = reference.drop(columns=[name for name in place if name not in shared])
    both = pd.concat([rows, own.merge(cells, on=["instruction", *shared])], ignore_index=True)
    parts = [
        compare_conditions(
            group,
            baseline=baseline,
            against=[condition],
            by=("instruction", *place),
            pair_on=("query", "asked", "prompt_id", "trial"),
        )
        for group in _groups(both, place).values()
    ]
    return pd.concat(parts, ignore_index=True)


def _with_loss(table: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """What each ablation loses of the following of the text alone: loss, loss_low and loss_high after the rate."""
    found = pd.concat([_compared(scores, "necessity", *pair) for pair in COMPARED["necessity"] if pair[0] == "text"])
    found = found.assign(loss=0.0 - found["difference"], loss_low=-found["high"], loss_high=-found["low"])
    keys = ["instruction", *PLACES["necessity"], "condition"]
    lost = table[keys].merge(found, on=keys, how="left")[["loss", "loss_low", "loss_high"]]
    at = list(table).index("high") + 1
    return pd.concat([table.iloc[:, :at], lost, table.iloc[:, at:]], axis=1)
