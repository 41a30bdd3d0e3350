"""What the model would say if it stopped after each layer, at each position of a text, steered or not.

    p = softmax(cap(norm(resid_post[layer, position]) @ W_U + b_U))

of a prompt, or of a prompt and what was generated after it. Positions count a text's own tokens, and at each of them the lens is
of the token that comes next. After the last layer it is the model's own distribution.

With a plan, the same tokens are read twice, and columns say what steering changed: KL(steered || unsteered) in nats, and
entropies, log-probabilities and ranks, steered minus unsteered. Below the first steered layer nothing changes.

TransformerLens' `logit_lens` reads prompts of one length, unsteered, for top tokens or for targets: texts of several lengths,
plans, and both selections at once are built on its `logit_readout` here.

What it does not show: a middle layer's residual is not made to be read by the last norm, so an odd token there says little.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens._results import Result
from steerlens._typing import WholeNumber, several
from steerlens.errors import SteerlensError
from steerlens.figures.lens import lens_heatmap
from steerlens.models.facts import check_layer, resid_post
from steerlens.models.passes import Read, Runner
from steerlens.models.probe import abilities
from steerlens.models.prompts import PromptFormat, encode_all
from steerlens.models.rows import pad, pad_id
from steerlens.reading.readout import check_readout, iter_logits, ranks
from steerlens.reading.words import single_token, told_apart, written
from steerlens.steering.edits import check_plan, edited_sites, plan_edits, require_ungated
from steerlens.steering.generations import Generations
from steerlens.steering.plan import Plan, as_plan
from steerlens.steering.positions import Window, as_window
from steerlens.steering.sampling import per_row
from steerlens.steering.scores import bind

if TYPE_CHECKING:
    import plotly.graph_objects as go

RESID_MEMORY = 2**29
"""Bytes that the residuals of one batch may take: every layer of every token is kept until it is read."""


@dataclass(frozen=True, eq=False, repr=False)
class PromptLens(Result):
    """The logit lens of texts: the frame of `prompt_lens`, one row per text, layer and position.

    Example:
        >>> lens = prompt_lens(model, "What is iron?", layers=[6, 7], positions="last")
        >>> len(lens), lens.steered
        (2, False)
    """

    targets: pd.DataFrame
    """One row per text, layer, position and target: its log-probability and rank (0: the most likely token)."""

    @property
    def steered(self) -> bool:
        """Whether a plan was given, and the columns of what it changes are there."""
        return "kl" in self.table

    def plot(self, **options: Any) -> "go.Figure":
        """Layer by position, the top token in each cell; see `figures.lens_heatmap`."""
        return lens_heatmap(self.table, self.targets, **options)


@dataclass(frozen=True, eq=False)
class _Text:
    """A row to be read."""

    tokens: tuple[int, ...]
    prompt_length: int
    plan: Plan
    positions: range
    """Those that are read."""


def prompt_lens(
    model: Any,
    prompts: str | Iterable[str] | Generations,
    *,
    steering: Plan | Sequence[Plan] | None = None,
    layers: WholeNumber | Iterable[WholeNumber] | None = None,
    positions: str | Window = "all",
    targets: str | WholeNumber | Iterable[str | WholeNumber] = (),
    batch_size: int = 8,
    prompt_format: PromptFormat = PromptFormat(),
) -> PromptLens:
    """The logit lens of each text, layer by position, and what steering changes in it.

    Args:
        prompts: One prompt or several, or what `generate` returned: then of each prompt with its new tokens.
        steering: One plan for all texts, or one per text. It changes what is read, not the text.
        layers: Default all.
        positions: A rule such as "last" or "generated", or a `Window`: a wide vocabulary at every token of long texts takes time.
        targets: Tokens to follow through the layers: texts of one token each, exactly as it is written (" rain"), or ids.
        batch_size: Texts per pass, or fewer where their residuals take too much memory.
        prompt_format: Chat template or plain, for prompts; generations have their tokens.

    Returns:
        One row per text (`row`, its place), layer and position: token_id and token there, generated (whether it is no token of
        the prompt), top_id and top (the most likely next token), probability, entropy in nats. With a plan the last four also
        steered, and kl, entropy_change, top_change (how much more likely, in log-probability, the steered top token became).
        `targets` has log_prob and rank, with a plan also steered, and their changes.

    Raises:
        SteerlensError: if a target is not one token, a plan or a prompt does not fit, or a text has no position to read.
        ModelError: if the model's logits are no readout of its last residual.

    Example:
        >>> lens = prompt_lens(model, "What is iron?", steering=vector.at(4), targets=" the")
        >>> lens.targets["layer"].nunique(), bool((lens.table.query("layer < 4")["kl"] == 0).all())
        (8, True)
    """
    check_readout(model)
    chosen = range(int(model.cfg.n_layers)) if layers is None else several(layers)
    kept = list(dict.fromkeys(check_layer(model, layer) for layer in chosen))
    if not kept:
        raise SteerlensError("a lens needs at least one layer, got none; leave layers out for all of them")
    wanted = list(dict.fromkeys(single_token(model, target) for target in several(targets)))
    texts = _texts(model, prompts, steering, as_window(positions), prompt_format)
    if not texts:
        raise SteerlensError("a lens needs at least one text, got none")
    parts: dict[int, dict[str, Tensor]] = {}
    for index, resids in _residuals(model, texts, kept, batch_size, steered=steering is not None):
        chunks = zip(*(iter_logits(model, resid) for resid in resids), strict=True)
        columns = [lens_columns(*(logits for _, logits in chunk), targets=wanted) for chunk in chunks]
        parts[index] = {name: torch.cat([part[name].cpu() for part in columns]) for name in columns[0]}
    values = {name: torch.cat([parts[index][name] for index in range(len(texts))]).numpy() for name in parts[0]}
    places = pd.concat([_places(row, text, kept) for row, text in enumerate(texts)], ignore_index=True)
    table = places.assign(**{name: column for name, column in values.items() if column.ndim == 1})
    of_targets = places[["row", "layer", "position"]].loc[np.repeat(places.index, len(wanted))].reset_index(drop=True)
    of_targets["target_id"] = wanted * len(places)
    of_targets["target"] = of_targets["target_id"].map(told_apart(model, wanted))
    of_targets = of_targets.assign(**{name: column.ravel() for name, column in values.items() if column.ndim == 2})
    return PromptLens(_with_texts(model, table), of_targets)


def lens_columns(
    plain: Float[Tensor, "n d_vocab"], steered: Float[Tensor, "n d_vocab"] | None = None, *, targets: Sequence[int] = ()
) -> dict[str, Tensor]:
    """What is said of logits, column by column: `[n]` of each place, `[n, target]` of each place's targets."""
    before = plain.log_softmax(-1)
    found = _said(before, targets)
    if steered is None:
        return found
    after = steered.log_softmax(-1)
    said = _said(after, targets)
    changes = {
        "kl": (after.exp() * (after - before)).sum(-1).clamp(min=0),  # rounding may bring a zero below it
        "entropy_change": said["entropy"] - found["entropy"],
        "top_change": (after - before).gather(1, said["top_id"][:, None])[:, 0],
        "log_prob_change": said["log_prob"] - found["log_prob"],
        "rank_change": said["rank"] - found["rank"],
    }
    return found | {f"{name}_steered": column for name, column in said.items()} | changes


def _said(log_probs: Float[Tensor, "n d_vocab"], targets: Sequence[int]) -> dict[str, Tensor]:
    top = log_probs.max(-1)
    at = log_probs[:, list(targets)]
    return {
        "top_id": top.indices,
        "probability": top.values.exp(),
        "entropy": torch.special.entr(log_probs.exp()).sum(-1),
        "log_prob": at,
        "rank": ranks(log_probs, at),
    }


def _texts(
    model: Any,
    prompts: str | Iterable[str] | Generations,
    steering: Any,
    positions: Window,
    prompt_format: PromptFormat,
) -> list[_Text]:
    """The rows, with their plans, each with at least one position to read."""
    if isinstance(prompts, Generations):
        written = list(prompts.prompts)
        rows = [((*one.prompt_tokens, *one.tokens), len(one.prompt_tokens)) for one in prompts]
    else:
        written = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = [(tuple(ids), len(ids)) for ids in encode_all(model, written, prompt_format)]
    plans = [as_plan(plan) for plan in per_row(Plan() if steering is None else steering, len(rows), "steering")]
    texts = []
    for row, ((tokens, length), plan) in enumerate(zip(rows, plans, strict=True)):
        check_plan(model, plan)
        require_ungated(plan)
        plan = bind(model, plan, written[row], prompt_format, what=f"text {row}")
        low, high = positions.bounds(length)
        read = range(low, min(high, len(tokens)))
        if not read:
            raise SteerlensError(
                f"positions must be among the tokens of each text, got {positions} for text {row} with {length} tokens of prompt "
                f"and {len(tokens) - length} generated; generate first, or choose others"
            )
        texts.append(_Text(tokens, length, plan, read))
    return texts


def _residuals(
    model: Any, texts: Sequence[_Text], layers: Sequence[int], batch_size: int, *, steered: bool
) -> Iterator[tuple[int, list[Float[Tensor, "layer_and_position d_model"]]]]:
    """Each text's place, and its residuals as they are, and steered."""
    lengths = [len(text.tokens) for text in texts]
    able = abilities(model, max(lengths))
    d_model, sites = int(model.cfg.d_model), [resid_post(layer) for layer in layers]
    fitting = RESID_MEMORY // (4 * max(lengths) * d_model * len(sites))
    reads = [Read(site, "all") for site in sites]
    plans = [text.plan for text in texts]
    edited = edited_sites(model, plans)
    with Runner(model, {*sites, *edited}) as runner:
        for indices in able.batches(lengths, max(1, min(batch_size, fitting))):
            batch = [texts[index] for index in indices]
            prompts = [text.prompt_length for text in batch]
            rows = pad([text.tokens for text in batch], side=able.side, pad_id=pad_id(model), prompt_lengths=prompts)
            edits = plan_edits(model, [text.plan for text in batch], prompts)
            passes = [runner.run(rows, reads=reads, edits=used).reads for used in ([(), edits] if steered else [()])]
            for place, (index, text) in enumerate(zip(indices, batch, strict=True)):
                at = (rows.positions[place] >= text.positions.start) & (rows.positions[place] < text.positions.stop)
                yield index, [torch.cat([found[site][place, at] for site in sites]) for found in passes]


def _places(row: int, text: _Text, layers: Sequence[int]) -> pd.DataFrame:
    """The rows of a text: its layers, and within each its positions."""
    read = text.positions
    tokens = text.tokens[read.start : read.stop]
    return pd.DataFrame(
        {
            "row": row,
            "layer": np.repeat(list(layers), len(read)),
            "position": [*read] * len(layers),
            "token_id": tokens * len(layers),
            "generated": [position >= text.prompt_length for position in read] * len(layers),
        }
    )


def _with_texts(model: Any, table: pd.DataFrame) -> pd.DataFrame:
    """The table with each token written after its id."""
    columns = {}
    for name, column in table.items():
        columns[name] = column
        if str(name).startswith(("token_id", "top_id")):
            unique = sorted(set(column.tolist()))
            columns[str(name).replace("_id", "")] = column.map(dict(zip(unique, written(model, unique), strict=True)))
    return pd.DataFrame(columns)
