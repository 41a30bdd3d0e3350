"""What a vector does to the next token: directly, by its own unembedding, and in all, with what later layers make of it.

    direct   logits(h + c u) - logits(h)        h: the last residual of the run without steering, u added to it alone
    total    logits of the run with c u added at layer l, minus logits(h)

for the token after each prompt, at each layer l. What the two share (their correlation over the vocabulary) is what the vector
says by itself; where they share nothing, it is a message to later layers, and its own vocabulary projection says nothing about
what it does. Added at the last layer, it has no effect but the direct one.

The control is the same length along a random direction, another one for each prompt, so that the interval over prompts is one
over random directions, too. Intervals: bootstrap over prompts.

What it does not show: an effect over more than one token. Nor that the vector is why: a random direction of the same length has
effects, too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens._results import Result
from steerlens._typing import RealNumber, Unit, WholeNumber, several, whole, whole_numbers
from steerlens.errors import SteerlensError
from steerlens.figures.effects import effect_curves
from steerlens.files import derived_seed, query_key
from steerlens.models.facts import model_device, resid_post
from steerlens.models.passes import PassResult, Read, Runner
from steerlens.models.probe import abilities
from steerlens.models.prompts import PromptFormat, encode_all, text_list
from steerlens.models.rows import pad, pad_id
from steerlens.reading.readout import check_readout, iter_logits
from steerlens.reading.words import single_token, told_apart
from steerlens.stats.comparisons import bootstrap_mean
from steerlens.steering.plan import Plan
from steerlens.steering.positions import Window, as_window
from steerlens.steering.residual import ResidualEdit, residual_edits
from steerlens.vectors.vector import SteeringVector

if TYPE_CHECKING:
    import plotly.graph_objects as go

MEASURED = ["layer", "condition", "effect", "measure", "target"]
"""Columns that name what a number is."""


@dataclass(frozen=True, eq=False, repr=False)
class VectorEffects(Result):
    """Direct and total effects, layer by layer: the frame of `vector_effects`, means over prompts with intervals.

    Example:
        >>> effects = vector_effects(model, vector, queries, layers=[7], coeff=2)
        >>> effects.table.query("condition == 'vector' and measure == 'correlation'")["mean"].round(3).tolist()
        [1.0]
    """

    per_prompt: pd.DataFrame
    """One number per row, of each prompt."""

    def plot(self, **options: Any) -> "go.Figure":
        """Direct and total effects by layer, beside those of random directions; see `figures.effect_curves`."""
        return effect_curves(self.table, **options)


@dataclass(frozen=True, eq=False)
class _Row:
    """A prompt that is steered in one way."""

    prompt: int
    layer: int
    condition: str
    plan: Plan


def vector_effects(
    model: Any,
    vector: SteeringVector,
    prompts: Iterable[str],
    *,
    coeff: RealNumber,
    unit: Unit = "absolute",
    layers: WholeNumber | Iterable[WholeNumber] | None = None,
    positions: str | Window = "all",
    targets: str | WholeNumber | Iterable[str | WholeNumber] = (),
    seed: WholeNumber = 0,
    batch_size: int = 32,
    prompt_format: PromptFormat = PromptFormat(),
) -> VectorEffects:
    """How adding the vector at each layer changes the next token, directly and in all, beside random directions.

    Args:
        coeff, unit: The length of the step, absolute or in units of the layer's mean residual norm.
        layers: Default: the vector's own, but for those where its direction is zero.
        positions: Which tokens of the prompts are steered; the direct effect is always of the last one, which the prompt's answer
            follows.
        targets: Tokens to follow: texts of one token each, exactly as it is written (" rain"), or ids.
        seed: Decides the random directions, with the layer and the prompt's text.
        batch_size: Rows per pass; a row is a prompt at one layer, along the vector or along a random direction.

    Returns:
        One row per layer, condition ("vector", "random"), effect and measure: the mean over prompts, its interval (low, high),
        and n. Of the effects "direct" and "total": kl (to the distribution without steering, in nats), and for each target
        logit_change and log_prob_change. Of "both": correlation, of direct and total changes of the logits over the vocabulary
        (missing where one of them does not change).

    Raises:
        SteerlensError: if a target is not one token, the vector has no such layer, there are no prompts, or one of them has no
            token to steer.
        ModelError: if the vector does not fit the model, or its logits are no readout of its last residual.

    Example:
        >>> effects = vector_effects(model, vector, queries, layers=[4, 6], coeff=2)
        >>> effects.table.query("measure == 'kl'")["effect"].tolist()
        ['direct', 'total', 'direct', 'total', 'direct', 'total', 'direct', 'total']
    """
    check_readout(model)
    texts = text_list(prompts)
    tokens = encode_all(model, texts, prompt_format)
    if not tokens:
        raise SteerlensError("effects need at least one prompt, got none")
    _check_positions(as_window(positions), texts, tokens)
    wanted = list(dict.fromkeys(single_token(model, target) for target in several(targets)))
    rows = _rows(
        model, vector, texts, layers, {"coeff": coeff, "unit": unit, "positions": positions}, whole(seed, "seed")
    )
    found = _measured(model, tokens, rows, wanted, batch_size)
    names = told_apart(model, wanted)
    numbers = [
        (row.layer, row.condition, effect, measure, "" if target is None else names[target], texts[row.prompt], value)
        for row, line in zip(rows, found, strict=True)
        for (effect, measure, target), value in line
    ]
    per_prompt = pd.DataFrame(numbers, columns=[*MEASURED, "prompt", "value"])
    return VectorEffects(_means(per_prompt), per_prompt)


def _check_positions(positions: Window, texts: Sequence[str], tokens: Sequence[list[int]]) -> None:
    """Refuse a rule that steers nothing in a prompt: of its total effect only rounding would be left."""
    for text, ids in zip(texts, tokens, strict=True):
        low, high = positions.bounds(len(ids))
        if low >= min(high, len(ids)):
            raise SteerlensError(
                f"positions must be among the tokens of each prompt, got {positions} for the {len(ids)} of {text!r:.60}; "
                "effects are on the token after a prompt"
            )


Name = tuple[str, str, int | None]
"""What a number is: effect, measure, and of which target."""


def effect_numbers(
    base: Float[Tensor, "n d_vocab"],
    direct: Float[Tensor, "n d_vocab"],
    total: Float[Tensor, "n d_vocab"],
    targets: Sequence[int] = (),
) -> list[list[tuple[Name, float]]]:
    """For each row the numbers of its direct and total effect, from the logits without steering and with each of the two."""
    before = base.log_softmax(-1)
    columns: dict[Name, Tensor] = {}
    for effect, logits in (("direct", direct), ("total", total)):
        after = logits.log_softmax(-1)
        # Rounding may bring a zero below it.
        columns[effect, "kl", None] = (after.exp() * (after - before)).sum(-1).clamp(min=0)
        for target in targets:
            columns[effect, "logit_change", target] = (logits - base)[:, target]
            columns[effect, "log_prob_change", target] = (after - before)[:, target]
    columns["both", "correlation", None] = _correlation(direct - base, total - base)
    lines = torch.stack([*columns.values()], dim=1).tolist()
    return [list(zip(columns, line, strict=True)) for line in lines]


def _correlation(first: Float[Tensor, "n d_vocab"], second: Float[Tensor, "n d_vocab"]) -> Float[Tensor, " n"]:
    """Pearson's, row by row; nan where one of the two is constant."""
    first, second = (values - values.mean(-1, keepdim=True) for values in (first, second))
    found: Tensor = (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))
    return found


def _rows(
    model: Any, vector: SteeringVector, texts: Sequence[str], layers: Any, step: dict[str, Any], seed: int
) -> list[_Row]:
    """Every prompt at every layer, along the vector and along a random direction."""
    vector.check_fits(model)
    rows = []
    moved = [layer for layer in vector.layers if bool(vector[layer].any())]
    for layer in dict.fromkeys(moved if layers is None else whole_numbers(layers, "layer")):
        plan = vector.at(layer, operator="add", **step)
        for prompt, text in enumerate(texts):
            control = plan.placebo(seed=derived_seed("vector_effects", seed, layer, text))
            rows += [_Row(prompt, layer, "vector", plan), _Row(prompt, layer, "random", control)]
    if not rows:
        raise SteerlensError(
            "effects need at least one layer with a direction, got none; leave layers out for all of the vector's"
        )
    return rows


def _measured(
    model: Any, tokens: Sequence[list[int]], rows: Sequence[_Row], targets: Sequence[int], batch_size: int
) -> list[list[tuple[Name, float]]]:
    """The numbers of each row."""
    last = resid_post(int(model.cfg.n_layers) - 1)
    able = abilities(model, max(map(len, tokens)))
    found: list[list[tuple[Name, float]]] = [[] for _ in rows]
    with Runner(model, {last, *(resid_post(row.layer) for row in rows)}) as runner:

        def run(indices: Sequence[int], edits: Sequence[ResidualEdit] = ()) -> PassResult:
            batch = pad([tokens[index] for index in indices], side=able.side, pad_id=pad_id(model))
            return runner.run(batch, edits=edits, reads=[Read(last)])

        resid = torch.empty(len(tokens), int(model.cfg.d_model))
        base = torch.empty(len(tokens), int(model.cfg.d_vocab))
        for batch in able.batches([len(one) for one in tokens], batch_size):
            result = run(batch)
            resid[batch], base[batch] = result.reads[last], result.logits.float().cpu()
        for batch in able.batches([len(tokens[row.prompt]) for row in rows], batch_size):
            prompts, plans = [rows[index].prompt for index in batch], [rows[index].plan for index in batch]
            lengths = [len(tokens[prompt]) for prompt in prompts]
            edits = residual_edits(
                [plan.residual for plan in plans], lengths, d_model=resid.shape[1], device=model_device(model)
            )
            total = run(prompts, edits).logits.float()
            moved = resid[prompts] + torch.stack([_step(plan) for plan in plans])
            direct = torch.cat([logits for _, logits in iter_logits(model, moved)])
            numbers = effect_numbers(base[prompts].to(total.device), direct.to(total.device), total, targets)
            for index, line in zip(batch, numbers, strict=True):
                found[index] = line
    return found


def _step(plan: Plan) -> Float[Tensor, " d_model"]:
    """What a plan of one `add` adds to a residual."""
    (step,) = plan.residual
    return step.coeff * (step.direction if step.write is None else step.write)


def _means(per_prompt: pd.DataFrame) -> pd.DataFrame:
    """Means over prompts with their intervals; spellings of one prompt are one cluster."""
    rows = []
    for keys, group in per_prompt.groupby(MEASURED, sort=False):
        found = bootstrap_mean(group["value"], clusters=group["prompt"].map(query_key), n_resamples=2000)
        numbers = {"mean": found.mean, "low": found.low, "high": found.high, "n": found.n}
        rows.append({**dict(zip(MEASURED, keys, strict=True)), **numbers})
    return pd.DataFrame(rows)
