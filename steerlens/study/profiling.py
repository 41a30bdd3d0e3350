"""Which heads are worth steering: each of them alone, on validation prompts (head profiling of PASTA; Zhang et al., ICLR 2024).

    gain[head]  =  rate with attention steered at this head alone  -  rate without steering

The instruction stands in every prompt. For each instruction heads are ranked by their rate; of equal rates the one with fewer
degenerate texts comes first, then the one that repeats less, then the lower layer and head. Several instructions are joined as
in the paper: the heads that are among the best k of each ("intersection"), or of any ("union"), of one alone, or of all but one.
Rates on few prompts tie often. So in an intersection all heads count that tie with the kth of an instruction, since one that does
not tell heads apart must not rule any out; of what is left, the k of the largest mean gain are taken. Heads that follow less
often than without steering are never chosen. The paper's lists are cut by rank alone.

A model has hundreds of heads, so whole layers may be tried first, and then the heads of the best ones only (AutoPASTA's way,
coarse to fine). All of them answer as rows of shared batches; what was answered is kept, so that a profile goes on where it was
cut short.

What a profile does not show. It is a choice and no estimate: the best of many heads on few prompts are so by luck in part, and
their gains shrink on others (`HeadProfile.held_out`). Heads that gain alone need not gain together, nor need those that gain
only together be found. What a choice is worth is seen by `evaluate` on test prompts, beside its control, as much attention on
random tokens at the same heads ("text+random").
"""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, get_args

import numpy as np
import pandas as pd

from steerlens._results import Result
from steerlens._typing import RealNumber, WholeNumber, several, whole
from steerlens.data.pairs import PairSet
from steerlens.errors import DataError, ModelError, SteerlensError, nearest
from steerlens.files import derived_seed, user_path, write_atomically
from steerlens.models.facts import check_layer, library_versions, model_id
from steerlens.stats.comparisons import bootstrap_mean
from steerlens.stats.rates import rates_and_quality, unit_labels
from steerlens.steering.attention import pasta
from steerlens.steering.edits import check_plan
from steerlens.steering.plan import Plan, as_plan
from steerlens.study.quality import Quality
from steerlens.study.responses import Request, Sampler, SamplerSettings, requests_for, sampler_of
from steerlens.study.scores import require_checks, score, start_results

if TYPE_CHECKING:
    import plotly.graph_objects as go

HeadMethod = Callable[..., Plan]
"""Makes a plan of `heads`, {layer: heads}, and perhaps of a coefficient before it: `pasta`, `instaboost`, `spotlight`,
`directer`, or a function of one's own."""

Combine = Literal["intersection", "union"]

Place = tuple[int, int | None]
"""Layer and head; head None is the whole layer."""

FILE = "profile.json"
FORMAT = 1
SHARE = 4
"""By default one of so many is among the best: about where the paper's lists for LLaMA-7B begin, 250 of its 1024 heads."""


@dataclass(frozen=True, eq=False, repr=False)
class HeadProfile(Result):
    """What steering each head alone gains: one row per instruction and head, or whole layer, whose head is missing.

    Columns: layer, head, instruction, rate with low and high (Wilson), baseline (without steering), gain, n, rank (1 is the best,
    of heads and of layers each), chosen (part of `heads()`; of layers that were tried first, those whose heads were), and how
    the texts read.

    >>> found = profile_heads(model, valid[:2], layers=[3], max_new_tokens=4)
    >>> len(found), sorted(found.table["rank"]) == [1, 2, 3, 4, 5]
    (5, True)
    """

    k: int
    """How many heads are among the best of an instruction, unless `heads` is told."""
    combine: Combine
    about: Mapping[str, Any]
    """What it was made with: model, n_layers, n_heads, method, pairs (their hash), seed, sampling, versions."""
    scores: pd.DataFrame | None = None
    """One row per response; a file does not hold them."""

    def heads(
        self,
        k: WholeNumber | None = None,
        *,
        combine: Combine | None = None,
        instruction: str | None = None,
        leave_out: str | None = None,
    ) -> dict[int, tuple[int, ...]]:
        """The chosen heads of each layer, for `pasta(heads=...)` and its like.

        Args:
            k: How many of an instruction's heads count as its best; of layers, where only these were tried.
            combine: "intersection" of the instructions' best, at most k, or their "union"; see the module's docstring.
            instruction: Of this one alone.
            leave_out: Of all but this one, to steer what the choice has not seen.

        Raises:
            SteerlensError: for an unknown instruction or way, and where no head is left.

        Example:
            >>> found = profile_heads(model, valid[:2], layers=[3], max_new_tokens=4)
            >>> sl.pasta(heads=found.heads(k=5)).layers
            (3,)
        """
        k, combine = self.k if k is None else whole(k, "k"), combine or self.combine
        _check_choice(k, combine)
        names = list(dict.fromkeys(self.table["instruction"]))
        for name in (instruction, leave_out):
            if name is not None and name not in names:
                raise SteerlensError(f"the profile did not cover {name!r}; {nearest(name, names)}")
        kept = [name for name in names if name != leave_out and instruction in (None, name)]
        found = _best(self.table[self.table["instruction"].isin(kept)], k, combine)
        if not found:
            raise SteerlensError(
                f"at least one head must be among the best {k} of {' and '.join(kept) or 'no instruction'}, and follow as often "
                'as without steering, got none; raise k, or give combine="union" or one instruction'
            )
        every = range(self.about["n_heads"])
        return {
            layer: tuple(head for one, head in found if one == layer and head is not None) or tuple(every)
            for layer in sorted({layer for layer, _ in found})
        }

    def heads_for(self, model: Any, k: WholeNumber | None = None, **options: Any) -> dict[int, tuple[int, ...]]:
        """As `heads`, for a model that is checked to be the one that was profiled.

        Raises:
            ModelError: for a model with other numbers of layers or heads; another model of the same size warns.
        """
        for what in ("n_layers", "n_heads"):
            if int(getattr(model.cfg, what)) != self.about[what]:
                raise ModelError(
                    f"a profile is of one model, and {self.about['model']} has {what} {self.about[what]}, got "
                    f"{getattr(model.cfg, what)}; profile this model"
                )
        if model_id(model) != self.about["model"]:
            warnings.warn(f"the heads were profiled in {self.about['model']}, not in {model_id(model)}", stacklevel=2)
        return self.heads(k, **options)

    def held_out(self, k: WholeNumber | None = None, *, folds: int = 4, seed: WholeNumber = 0) -> pd.DataFrame:
        """What the best heads gain, each alone, on prompts that did not choose them: how much of `gain` is luck.

        The prompts of an instruction are dealt into parts by query. For each part the best k heads are found on the others.

        Returns:
            One row per instruction: k, n (queries), gain (mean over the best k, on the prompts that chose them), held_out with
            low and high (the same on the others, and its interval by bootstrap over queries).

        Raises:
            SteerlensError: for a profile that was read from a file, or fewer queries than folds.

        Example:
            >>> found = profile_heads(model, valid[:4], layers=[3], max_new_tokens=4)
            >>> found.held_out(folds=2)["n"].tolist()
            [4]
        """
        if self.scores is None:
            raise SteerlensError(
                "held-out gains need every response, which a file does not hold; ask profile_heads again with the same out="
            )
        k = self.k if k is None else whole(k, "k")
        _check_choice(k, self.combine)
        rows = [
            _held_out(name, group, k, folds, whole(seed, "seed"))
            for name, group in self.scores.groupby("instruction", sort=False)
        ]
        return pd.DataFrame(rows)

    def plot(self, **options: Any) -> "go.Figure":
        """Layer by head, a panel per instruction, the chosen ones outlined; see `figures.attention.head_profile_map`."""
        from steerlens.figures.attention import head_profile_map  # plotly, where a picture is asked for

        return head_profile_map(self.table, **options)

    def save(self, path: str | Path) -> Path:
        """Write the profile to one JSON file, which appears whole or not at all."""
        content = {
            "format": FORMAT,
            "about": dict(self.about),
            "k": self.k,
            "combine": self.combine,
            "table": _records(self.table),
        }
        return write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "HeadProfile":
        """Read a file of `save`, or the folder of a profile with `out=`.

        Raises:
            DataError: if there is no such file, or it holds something else.
        """
        file = user_path(path)
        file = file / FILE if file.is_dir() else file
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}")
            table = _typed(pd.DataFrame(content["table"]))
            return cls(table, content["k"], content["combine"], content["about"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"a profile of heads must be a file that save() wrote, got {str(file)!r}: {error}; let the profile finish"
            ) from error

    def __repr__(self) -> str:
        names, found = list(dict.fromkeys(self.table["instruction"])), _best(self.table, self.k, self.combine)
        what = "layers" if self.table["head"].isna().all() else "heads"
        n = len(self.table[["layer", "head"]].drop_duplicates())
        shown = ", ".join(f"{layer}" if head is None else f"{layer}.{head}" for layer, head in found[:8])
        among = f"best {self.k} of each of {len(names)} instructions" if len(names) > 1 else f"best {self.k}"
        return f"HeadProfile({self.about['method']}; {n} tried; {among}: {what} {shown or 'none'}{', …' * (len(found) > 8)})"


def profile_heads(
    model: Any,
    pairs: PairSet,
    *,
    method: HeadMethod = pasta,
    coeff: RealNumber | None = None,
    by: Literal["heads", "layers"] = "heads",
    layers: WholeNumber | Iterable[WholeNumber] | None = None,
    best_layers: WholeNumber | None = None,
    k: WholeNumber | None = None,
    combine: Combine = "intersection",
    trials: WholeNumber = 1,
    seed: WholeNumber = 0,
    quality: Quality = Quality(perplexity=False),
    out: str | Path | None = None,
    **settings: Unpack[SamplerSettings],
) -> HeadProfile:
    """How often the instruction in the prompt is followed when attention is steered at a single head, for every head.

    Args:
        model: A model; or a `Sampler` of one, whose settings and journal then hold.
        pairs: Validation prompts, of one instruction or several: not those to be reported.
        method: What is done at a head: called as `method(heads={layer: (head,)})`, with the coefficient first where one is given.
        coeff: Of the method; default: its own.
        by: "heads", or "layers" for whole layers.
        layers: Which to look at; default all.
        best_layers: For "heads": try whole layers first, and then only the heads of so many layers, those of the largest mean
            gain over instructions.
        k, combine: What `chosen` and `heads()` go by; default: a quarter of the heads that were tried.
        trials: Responses per prompt and head; more than one needs a temperature.
        seed: Decides the samples, above temperature 0.
        quality: What is measured on the responses besides words.
        out: A folder that keeps every response as it is made (generations.jsonl), so that the same profile goes on where it was
            cut short; profile.json is written at the end, and `HeadProfile.load` reads it.
        settings: As in `sweep`; `progress=True` shows a bar.

    Returns:
        One row per instruction and head, with the rate without steering as `baseline`. The choice is made on these prompts, and
        its rate is no estimate of that on others.

    Raises:
        DataError: if there are no pairs, or an instruction has no check or stands nowhere in its prompt.
        SteerlensError: for a layer out of range, or a method that steers something else than the heads it is given.
        ModelError: if the model's attention cannot be steered.

    Example:
        >>> found = profile_heads(model, valid[:2], coeff=0.05, best_layers=1, layers=[3, 4], max_new_tokens=4)
        >>> found.table["head"].isna().sum(), found.table["head"].notna().sum()
        (np.int64(2), np.int64(5))
    """
    if by not in ("heads", "layers") or (by == "layers" and best_layers is not None):
        raise SteerlensError(
            f'by must be "heads" or "layers", the first with best_layers, got {by!r} and {best_layers}'
        )
    _check_choice(1 if k is None else whole(k, "k"), combine)
    if len(pairs) == 0:
        raise DataError("a profile needs at least one prompt, got none; check the split and the filter")
    options: dict[str, Any] = {"trials": whole(trials, "trials"), "seed": whole(seed, "seed")}
    with sampler_of(model, out, settings) as sampler:
        made = _Maker(sampler.model, method, coeff)
        chosen = range(made.n_layers) if layers is None else several(layers)
        wanted = sorted({check_layer(sampler.model, layer) for layer in chosen})
        coarse = by == "layers" or best_layers is not None
        first: list[Place] = [(layer, head) for layer in wanted for head in ([None] if coarse else range(made.n_heads))]
        if not first or (best_layers is not None and not 1 <= whole(best_layers, "best_layers") <= len(wanted)):
            raise SteerlensError(
                f"a profile needs a layer to look at, and best_layers in [1, {len(wanted)}], got layers {wanted} and "
                f"best_layers {best_layers}"
            )
        check_plan(sampler.model, made(first[0]))
        asked = _asked(made, pairs, [None, *first], options)
        if out is not None:
            said = {"method": made.text, "by": by, "layers": wanted, "best_layers": best_layers, **options}
            start_results(out, "head profile", sampler, asked[0], pairs, quality, (FILE,), **said)
        scores = _scored(sampler, *asked, quality)
        fine: list[int] = []
        if best_layers is not None:
            fine = _best_layers(_profile(scores), whole(best_layers, "best_layers"))
            places: list[Place] = [(layer, head) for layer in fine for head in range(made.n_heads)]
            more = _scored(sampler, *_asked(made, pairs, places, options), quality)
            scores = pd.concat([scores, more], ignore_index=True)
        about = {
            "model": model_id(sampler.model),
            "n_layers": made.n_layers,
            "n_heads": made.n_heads,
            "method": made.text,
            "pairs": pairs.content_hash,
            "n_pairs": len(pairs),
            **options,
            "sampling": asdict(sampler.sampling),
            "versions": library_versions(),
        }
    table = _profile(scores)
    n_tried = len(first) if best_layers is None else len(places)
    k = math.ceil(n_tried / SHARE) if k is None else whole(k, "k")
    best = set(_best(table, k, combine)) | {(layer, None) for layer in fine}
    table["chosen"] = [place in best for place in _places(table)]
    found = HeadProfile(table, k, combine, about, scores)
    if out is not None:
        found.save(Path(out) / FILE)
    return found


# --- asking ---------------------------------------------------------------------------------------------------------


class _Maker:
    """Makes the plan of a place by a method."""

    def __init__(self, model: Any, method: HeadMethod, coeff: RealNumber | None) -> None:
        self.method, self.given = method, () if coeff is None else (coeff,)
        self.n_layers, self.n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
        self.text = str(self((0, 0)).each(lambda step: replace(step, heads=None)))  # type: ignore[arg-type]
        """What is done, but for where."""

    def __call__(self, place: Place) -> Plan:
        layer, head = place
        heads = {layer: tuple(range(self.n_heads)) if head is None else (head,)}
        plan = as_plan(self.method(*self.given, heads=heads))
        if not plan.active or plan.residual or any(step.by_layer != heads for step in plan.attention):
            raise SteerlensError(
                f"a method must steer attention at the heads that it is given and nowhere else, got {plan} for {heads}; hand "
                "them on, as in lambda heads: sl.pasta(0.01, heads=heads)"
            )
        return plan


def _asked(
    made: _Maker, pairs: PairSet, places: Sequence[Place | None], options: Mapping[str, Any]
) -> tuple[list[Request], list[Place | None]]:
    """What is asked at each place, None being no steering, and the place of each request."""
    requests: list[Request] = []
    where: list[Place | None] = []
    for place in places:
        plan, condition = (Plan(), "text") if place is None else (made(place), "text+attention")
        rows = requests_for(pairs, plan, conditions=[condition], **options)
        requests += rows
        where += [place] * len(rows)
    require_checks(requests)
    return requests, where


def _scored(
    sampler: Sampler, requests: Sequence[Request], where: Sequence[Place | None], quality: Quality
) -> pd.DataFrame:
    """The scores of requests, with the layer and head that were steered."""
    scores = score(sampler, requests, quality=quality)
    layers, heads = zip(*((None, None) if place is None else place for place in where), strict=True)
    return scores.assign(layer=pd.array(layers, dtype="Int64"), head=pd.array(heads, dtype="Int64"))


def _check_choice(k: int, combine: str) -> None:
    if combine not in get_args(Combine) or k < 1:
        raise SteerlensError(
            f"combine must be one of {', '.join(get_args(Combine))} and k at least 1, got {combine!r} and {k}"
        )


# --- ranking --------------------------------------------------------------------------------------------------------


def _profile(scores: pd.DataFrame) -> pd.DataFrame:
    """The rows of a profile: the rate of each place beside that of no steering, and its rank."""
    found = rates_and_quality(scores, ["instruction", "layer", "head"])
    unsteered = found[found["layer"].isna()].set_index("instruction")["rate"]
    # By instruction in their order; whole layers come before heads.
    table = found[found["layer"].notna()].copy()
    table["place"] = table["instruction"].map({name: place for place, name in enumerate(unsteered.index)})
    by = ["place", "whole", "layer", "head"]
    table = table.assign(whole=table["head"].notna()).sort_values(by, kind="stable").drop(columns=by[:2])
    table = table.reset_index(drop=True)
    table["baseline"] = table["instruction"].map(unsteered)
    table["gain"] = table["rate"] - table["baseline"]
    table["rank"] = 0
    for _, group in table.groupby(["instruction", table["head"].isna()], sort=False):
        columns = [group[name].to_numpy(dtype=float) for name in ("rate", "degenerate", "mean_repetition")]
        table.loc[group.index[_order(*columns)], "rank"] = np.arange(1, len(group) + 1)
    table["chosen"] = False
    first = [
        "layer",
        "head",
        "instruction",
        "n",
        "followed",
        "rate",
        "low",
        "high",
        "baseline",
        "gain",
        "rank",
        "chosen",
    ]
    return _typed(table[[*first, *(name for name in table if name not in first)]])


def _order(rate: np.ndarray, degenerate: np.ndarray, repetition: np.ndarray) -> np.ndarray:
    """Places from the best to the worst, of rows by layer and head."""
    place = np.arange(len(rate))
    return np.lexsort((place, repetition, degenerate, -np.round(rate, 12)))


def _places(table: pd.DataFrame) -> list[Place]:
    return [
        (int(layer), None if pd.isna(head) else int(head))
        for layer, head in zip(table["layer"], table["head"], strict=True)
    ]


def _best(table: pd.DataFrame, k: int, combine: str) -> list[Place]:
    """The places that are among the best k of the table's instructions: its heads, or where it has none its layers."""
    rows = table[table["head"].notna()] if table["head"].notna().any() else table
    if combine == "union":
        found = set(_places(rows[(rows["rank"] <= k) & (rows["gain"] >= 0)]))
    else:
        # What ties with the kth counts, too: an instruction that does not tell heads apart rules none of them out.
        kth = rows.groupby("instruction")["rate"].transform(lambda rates: rates.nlargest(k).iloc[-1])
        among = (rows["rate"] >= kth - 1e-12) & (rows["gain"] >= 0)
        by = rows.assign(among=among).groupby(["layer", "head"], dropna=False)
        joined = by.agg(among=("among", "all"), gain=("gain", "mean"), rank=("rank", "sum")).reset_index()
        joined = joined[joined["among"]].assign(gain=lambda left: -left["gain"].round(12))
        found = set(_places(joined.sort_values(["gain", "rank", "layer", "head"])[:k]))
    return sorted(found, key=lambda place: (place[0], -1 if place[1] is None else place[1]))


def _best_layers(table: pd.DataFrame, n: int) -> list[int]:
    """The layers of the largest mean gain over instructions; ties as in a ranking."""
    means = table.groupby("layer")[["gain", "degenerate", "mean_repetition"]].mean().astype(float)
    return sorted(int(layer) for layer in means.index[_order(*means.to_numpy().T)[:n]])


def _held_out(name: Any, scores: pd.DataFrame, k: int, folds: int, seed: int) -> dict[str, Any]:
    """The row of one instruction."""
    asked = unit_labels(scores, "query")
    queries = sorted(asked.unique(), key=lambda query: derived_seed(seed, query))
    if not 2 <= folds <= len(queries):
        raise SteerlensError(f"folds must be in [2, {len(queries)}], the number of queries of {name!r}; got {folds}")
    steered = scores[scores["layer"].notna()]
    tried = steered[steered["head"].notna()] if steered["head"].notna().any() else steered
    keys = [tried["layer"].astype(int), tried["head"].fillna(-1).astype(int), asked[tried.index]]
    numbers = tried[["followed", "degenerate", "repetition"]].astype(float)
    # [place query] each, in the queries' order.
    followed, degenerate, repetition = (
        numbers[column].groupby(keys).mean().unstack()[queries].to_numpy() for column in numbers
    )
    raw = scores[scores["layer"].isna()]
    plain = raw["followed"].astype(float).groupby(asked[raw.index]).mean()[queries].to_numpy()
    fold = np.arange(len(queries)) % folds

    def gains(chosen_on: np.ndarray, seen_on: np.ndarray) -> np.ndarray:
        """Of each query the mean gain of the best k."""
        rate, without = followed[:, chosen_on].mean(1), plain[chosen_on].mean()
        best = _order(rate, degenerate[:, chosen_on].mean(1), _means(repetition[:, chosen_on]))[:k]
        best = best[rate[best] >= without - 1e-12]
        if not len(best):
            return np.zeros(int(seen_on.sum()))  # nothing would be steered
        found: np.ndarray = (followed[best][:, seen_on] - plain[seen_on]).mean(0)
        return found

    every = np.ones(len(queries), dtype=bool)
    others = np.concatenate([gains(fold != one, fold == one) for one in range(folds)])
    found = bootstrap_mean(others.tolist())
    said = {"instruction": name, "k": k, "n": len(queries), "gain": float(gains(every, every).mean())}
    return {**said, "held_out": found.mean, "low": found.low, "high": found.high}


def _means(table: np.ndarray) -> np.ndarray:
    """Of each row the mean of what is not missing."""
    there = ~np.isnan(table)
    with np.errstate(invalid="ignore"):
        found: np.ndarray = np.where(there, table, 0.0).sum(1) / there.sum(1)
    return found


# --- files ----------------------------------------------------------------------------------------------------------


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain data; what is missing is None."""
    plain = table.astype(object).where(table.notna(), None)
    return [
        {str(name): value.item() if hasattr(value, "item") else value for name, value in row.items()}
        for row in plain.to_dict("records")
    ]


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Layers and ranks as whole numbers, heads beside missing ones, and numbers that are all missing as numbers."""
    kinds: dict[Any, Any] = {"layer": int, "head": "Int64", "rank": int, "chosen": bool, "instruction": str}
    numbers = [name for name in table if name not in kinds and table[name].dtype == object]
    return table.astype({**kinds, **dict.fromkeys(numbers, float)})
