"""Activation patching: at which layers and tokens does the instruction's effect on the next token pass by?

    h(layer, position) of the run without the instruction  <-  the same activation of the run with it          one cell at a time

    value        the metric after the patch; `plain` and `instructed` are the metric of the two runs themselves
    restored     (value - plain) / (instructed - plain), of means over pairs: 0 the plain run, 1 the instructed run
    control      the metric with the activation of another query's run without the instruction in the same place

Positions are counted from the end of the prompt, -1 the last token, and what is patched must be the same token on both sides:
only the tokens that both prompts end in can be patched. Those are the template's closing tokens where the instruction stands at
the end, and the query, too, where it stands at the start. Nothing else is left to ask: before the instruction both runs are one.

Method and words: Meng et al. 2022, Wang et al. 2023; metrics: Zhang & Nanda 2024. A cell that restores much says that what the
later layers need stands there; neither that it was written there, nor that no other place holds it, too. Cells do not add up.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from tqdm import tqdm

from steerlens._results import Result
from steerlens._typing import WholeNumber, several, whole, whole_numbers
from steerlens.data.pairs import PairSet
from steerlens.errors import DataError, SteerlensError
from steerlens.models.facts import check_layer
from steerlens.models.probe import abilities
from steerlens.models.prompts import PromptFormat, encode_all, pinned
from steerlens.reading.metrics import METRICS, Metric, compared_tokens, followed, measured
from steerlens.reading.patches import INSTRUCTED, OTHER, Cell, PatchedRuns, Prompts
from steerlens.stats.comparisons import bootstrap_columns
from steerlens.steering.settings import SamplingConfig

if TYPE_CHECKING:
    import plotly.graph_objects as go

SITES = {"resid": "hook_resid_post", "attn": "hook_attn_out", "mlp": "hook_mlp_out"}
"""What is patched: the residual after a block, or what the block's attention or MLP adds to it."""
VARIED = "…"
"""Stands for a token that differs between pairs."""
SAME = 1e-6
"""Where the means of the two runs are nearer than this, there is nothing to restore."""


@dataclass(frozen=True, eq=False, repr=False)
class PatchingMap(Result):
    """Means over pairs, one row per instruction, layer and position; `cells` has the pairs one by one.

    >>> found = patch(model, pairs[:2], layers=[3, 4])
    >>> len(found), len(found.cells)
    (2, 4)
    """

    cells: pd.DataFrame
    """One row per pair, layer and position: prompt_id, instruction, query, site, metric, layer, position, token, value, plain,
    instructed, control (missing where an instruction has one query only)."""

    def plot(self, **options: Any) -> "go.Figure":
        """Heat maps of layer by position, the control beside each; options as in `figures.patching.patching_map`."""
        from steerlens.figures.patching import patching_map

        return patching_map(self.table, **options)


def patch(
    model: Any,
    pairs: PairSet,
    *,
    layers: Iterable[WholeNumber] | None = None,
    positions: WholeNumber | Iterable[WholeNumber] | None = None,
    site: Literal["resid", "attn", "mlp"] = "resid",
    metric: Literal["kl", "logit_difference", "followed"] | Metric = "kl",
    tokens: Sequence[str | WholeNumber] | None = None,
    control: bool = True,
    batch_size: int = 64,
    prompt_format: PromptFormat = PromptFormat(),
    sampling: SamplingConfig = SamplingConfig(),
    progress: bool = False,
) -> PatchingMap:
    """What each activation of the run with the instruction does in the run without it, layer by position.

    Args:
        layers: Default all.
        positions: How many tokens from the end, or which ones, counted from the end (-1 the last). Default: all that every pair
            ends in on both sides.
        site: The residual after a block, or the output of its attention or MLP, as it is added to the residual.
        metric: "kl": from the instructed run's next-token distribution to the patched run's, in nats; "logit_difference": of two
            tokens; "followed": whether the text after the patched prompt follows the instruction (loosely, by the pair's check);
            or a function of next-token logits `[row, d_vocab]` that gives `[row]`.
        tokens: The two tokens of the logit difference, first minus second, as ids or single-token texts. Default: each pair's
            likeliest token with the instruction minus its likeliest without; pairs where these agree are left out.
        control: Patch with another query's activations, too: twice the rows.
        batch_size: Rows per pass; each cell of each pair is a row.
        sampling: How "followed" decodes; greedy by default.

    Returns:
        Means with bootstrap intervals over queries, and all cells.

    Raises:
        DataError: if there are no pairs, the prompts of a pair do not end in as many equal tokens, or no pair has the metric.
        SteerlensError: for a layer, position, site, metric or token that does not exist.

    Example:
        >>> found = patch(model, pairs[:2], layers=[3, 4], positions=[-1])
        >>> found.table[["layer", "position", "n"]].values.tolist()
        [[3, -1, 2], [4, -1, 2]]
    """
    _check(pairs, site, metric, tokens, batch_size)
    kept, prompt_format = _layers(model, layers), pinned(model, prompt_format)
    without, with_ = (encode_all(model, pairs.prompts(side), prompt_format) for side in ("none", "text"))
    offsets = _offsets(pairs, without, with_, positions)
    others = _other_queries(pairs) if control else {}
    if metric == "followed":
        room, take = sampling.max_new_tokens, partial(followed, sampling, batch_size, prompt_format)
    else:
        room, take = 0, partial(measured, metric, None if tokens is None else compared_tokens(model, tokens))
    able = abilities(model, max(map(len, with_ + without)) + room)
    values = np.full((len(pairs), 2, len(kept), len(offsets)), np.nan)
    ends = np.full((len(pairs), 2), np.nan)
    with tqdm(total=len(pairs), desc="patch", unit="pair", disable=not progress) as bar:
        # The cells of a group's pairs at one position about fill a pass.
        for group in able.batches([len(ids) for ids in with_], max(1, batch_size // ((1 + bool(others)) * len(kept)))):
            runs = PatchedRuns(
                model,
                [Prompts(without[i], with_[i], without[others.get(i, i)]) for i in group],
                sites=[f"blocks.{layer}.{SITES[site]}" for layer in kept],
                offsets=offsets,
                able=able,
                batch_size=batch_size,
            )
            cells = [
                Cell(place, source, layer, offset)
                for place, i in enumerate(group)
                for source in ((INSTRUCTED, OTHER) if i in others else (INSTRUCTED,))
                for layer, offset in product(range(len(kept)), range(len(offsets)))
            ]
            found, ends[group] = take(runs, [pairs[i] for i in group], cells)
            for cell, value in zip(cells, found, strict=True):
                values[group[cell.pair], cell.source, cell.site, cell.offset] = value
            bar.update(len(group))
    there = [[model.tokenizer.decode([ids[offset]]) for offset in offsets] for ids in without]
    index = pd.DataFrame(product(kept, offsets), columns=["layer", "position"])
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)
    return _as_map(pairs, index.assign(site=site, metric=name), there, values, ends)


# --- what is asked for ----------------------------------------------------------------------------------------------


def _check(pairs: PairSet, site: str, metric: str | Metric, tokens: Any, batch_size: int) -> None:
    if len(pairs) == 0:
        raise DataError("patching needs at least one pair, got an empty pair set; check the filter and the split")
    if site not in SITES:
        raise SteerlensError(f"site must be one of {', '.join(SITES)}, got {site!r}; heads are not patched here")
    if not callable(metric) and metric not in METRICS:
        raise SteerlensError(
            f"metric must be one of {', '.join(METRICS)}, or a function of logits [row, d_vocab], got {metric!r}"
        )
    if tokens is not None and metric != "logit_difference":
        raise SteerlensError(
            f'tokens are for metric="logit_difference", got {tokens!r} with {metric!r}; leave them out'
        )
    if batch_size < 1:
        raise SteerlensError(f"batch_size must be at least 1, got {batch_size}")
    if metric == "followed":
        for pair in pairs:
            pair.require_check()


def _layers(model: Any, layers: Iterable[WholeNumber] | None) -> list[int]:
    chosen = range(int(model.cfg.n_layers)) if layers is None else several(layers)
    if not chosen:
        raise SteerlensError("patching needs at least one layer, got none; leave layers out to take all")
    return sorted({check_layer(model, layer) for layer in chosen})


def _offsets(
    pairs: PairSet,
    without: Sequence[list[int]],
    with_: Sequence[list[int]],
    positions: WholeNumber | Iterable[WholeNumber] | None,
) -> list[int]:
    """The positions, ascending, counted from the end; all of them hold the same token on both sides of every pair."""
    shared = [_shared_end(*sides) for sides in zip(without, with_, strict=True)]
    least = int(np.argmin(shared))
    if positions is None:
        offsets = [*range(-shared[least], 0)]
    elif isinstance(positions, Iterable):
        offsets = sorted({*whole_numbers(positions, "position")})
    else:
        number = whole(positions, "position")
        offsets = [number] if number < 0 else [*range(-number, 0)]
    if not offsets and positions is not None:
        raise SteerlensError(
            f"patching needs at least one position, got {positions!r}; leave positions out to take all"
        )
    if offsets and offsets[-1] >= 0:
        raise SteerlensError(
            f"positions count from the end, -1 the last token, got {offsets[-1]}; give a number below zero"
        )
    if not offsets or -offsets[0] > shared[least]:
        asked = f", got {offsets[0]}" if offsets else ""
        raise DataError(
            "patched positions must hold the same tokens on both sides, counted from the end, and the prompts of pair "
            f"{pairs[least].prompt_id} share their last {shared[least]} only{asked}; ask for fewer, use a chat template, or let "
            "the instruction come before the query"
        )
    return offsets


def _shared_end(first: Sequence[int], second: Sequence[int]) -> int:
    """How many last tokens two prompts share."""
    differ = (i for i, (a, b) in enumerate(zip(reversed(first), reversed(second), strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))


def _other_queries(pairs: PairSet) -> dict[int, int]:
    """For each pair the next one of its instruction that asks another query, if there is one."""
    found: dict[int, int] = {}
    for name in pairs.instructions:
        places = [i for i, pair in enumerate(pairs) if pair.instruction_id == name]
        for turn, i in enumerate(places):
            others = (j for j in places[turn + 1 :] + places[:turn] if pairs[j].query_key != pairs[i].query_key)
            if (other := next(others, None)) is not None:
                found[i] = other
    return found


# --- tables ---------------------------------------------------------------------------------------------------------


def _as_map(
    pairs: PairSet,
    index: pd.DataFrame,
    tokens: Sequence[Sequence[str]],
    values: Float[np.ndarray, "pair 2 layer offset"],
    ends: Float[np.ndarray, "pair 2"],
) -> PatchingMap:
    """All cells, and their means over the pairs of each instruction."""
    if np.isnan(ends).all():
        raise DataError(
            f"a metric must be a number for some pair, and {index['metric'][0]} is for none of {len(pairs)}; a logit difference "
            'needs likeliest next tokens that differ with the instruction: give two tokens, or take metric="kl"'
        )
    about = pairs.to_frame()[["prompt_id", "instruction"]]
    about["query"] = [pair.prompt if pair.query is None else pair.query for pair in pairs]
    cells = about.merge(index, how="cross").assign(
        token=[token for row in tokens for _ in range(values.shape[2]) for token in row],
        value=values[:, INSTRUCTED].ravel(),
        plain=ends[:, 0].repeat(len(index)),
        instructed=ends[:, 1].repeat(len(index)),
        control=values[:, OTHER].ravel(),
    )
    means = []
    for name in pairs.instructions:
        some = [i for i, pair in enumerate(pairs) if pair.instruction_id == name]
        shared = [here[0] if len({*here}) == 1 else VARIED for here in zip(*(tokens[i] for i in some), strict=True)]
        numbers = _means([pairs[i].query_key for i in some], values[some].reshape(len(some), 2, -1), ends[some])
        means.append(index.assign(token=shared * values.shape[2], **numbers).assign(instruction=name))
    table = pd.concat(means, ignore_index=True)
    return PatchingMap(table[["instruction", *table.columns.drop("instruction")]], cells)


def _means(
    queries: Sequence[str], values: Float[np.ndarray, "pair 2 cell"], ends: Float[np.ndarray, "pair 2"]
) -> Mapping[str, Any]:
    """Means over the pairs that have the metric, and intervals from resampled queries, the same ones for a ratio's parts."""
    kept = ~np.isnan(ends).any(axis=1)
    columns = np.concatenate([values[:, INSTRUCTED], values[:, OTHER], ends], axis=1)[kept]
    draws = bootstrap_columns(columns, [query for query, there in zip(queries, kept, strict=True) if there])
    mean = columns.mean(axis=0) if len(columns) else np.full(columns.shape[1], np.nan)
    n_cells = values.shape[2]
    low, high = np.quantile(draws[:, :n_cells], [0.025, 0.975], axis=0)
    restored_low, restored_high = np.quantile(_restored(draws, n_cells), [0.025, 0.975], axis=0)[:, :n_cells]
    restored = _restored(mean[None], n_cells)[0]
    return {
        "n": len(columns),
        "value": mean[:n_cells],
        "low": low,
        "high": high,
        "restored": restored[:n_cells],
        "restored_low": restored_low,
        "restored_high": restored_high,
        "control": mean[n_cells:-2],
        "control_restored": restored[n_cells:],
        "plain": mean[-2],
        "instructed": mean[-1],
    }


def _restored(means: Float[np.ndarray, "draw column"], n_cells: int) -> Float[np.ndarray, "usable cell"]:
    """How far values and controls lead from the plain to the instructed run; draws that differ by nothing are left out."""
    plain, instructed = means[:, -2:-1], means[:, -1:]
    gap = np.where(np.abs(instructed - plain) > SAME, instructed - plain, np.nan)
    found = (means[:, : 2 * n_cells] - plain) / gap + 0.0  # no negative zeros
    usable = ~np.isnan(gap[:, 0])
    return np.asarray(found[usable] if usable.any() else found)
