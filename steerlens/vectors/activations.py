"""Recording the residual stream of the last prompt token, with and without an instruction.

For each pair and layer, `h = resid_post[last prompt token]`, once for the bare query and once for the query with its
instruction (Stolfo et al. 2025, section 2). Hooks keep `[batch, d_model]` per layer and nothing else: no cache of
activations, no logits beyond the last position. Results are float32 on the CPU, whatever the model's dtype.

The two prompts of a pair share their beginning (the system prompt, then the query), and all pairs share the system prompt:
each shared prefix is run once and its keys and values are handed on. What a hook reads is unchanged by that, to rounding.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, overload

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from steerlens._typing import WholeNumber, several
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.data.splits import query_ids
from steerlens.errors import DataError, SteerlensError
from steerlens.models.facts import check_layer, coordinate_frame, model_id, resid_post, versions_json
from steerlens.models.passes import forward
from steerlens.models.prompts import PromptFormat, encode_all, frame, pinned, template_digest
from steerlens.models.rows import left_pad, length_sorted_batches, pad_id

SIDES = ("without", "with")
"""The order of the `side` axis."""


@dataclass(frozen=True, eq=False)
class Activations:
    """Residuals of the last prompt token for each pair, side and layer.

    Example:
        >>> len(acts), acts[:2].resid.shape[1:]
        (8, torch.Size([2, 8, 160]))
    """

    resid: Float[Tensor, "pair side layer d_model"]
    """float32 on the CPU; side 0 is without the instruction, side 1 with it."""
    layers: tuple[int, ...]
    """The layer of each index of the layer axis."""
    prompt_ids: tuple[str, ...]
    instructions: tuple[str, ...]
    """The instruction id of each pair."""
    metadata: dict[str, str] = field(default_factory=dict)
    pairs: PairSet | None = None
    """What was recorded; None where only the numbers are known."""

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def __iter__(self) -> Iterator[Float[Tensor, "side layer d_model"]]:
        return iter(self.resid)

    @overload
    def __getitem__(self, index: int) -> Float[Tensor, "side layer d_model"]: ...
    @overload
    def __getitem__(self, index: slice) -> "Activations": ...
    def __getitem__(self, index: int | slice) -> Any:
        """One pair's residuals, or the activations of some pairs."""
        return self._of(range(len(self))[index]) if isinstance(index, slice) else self.resid[index]

    def to_frame(self) -> pd.DataFrame:
        """One row per pair and layer: prompt_id, instruction, layer, and the norms of both residuals and of their difference."""
        norms = {name: resid.norm(dim=-1).flatten().numpy() for name, resid in self._shown().items()}
        frame = pd.DataFrame({"prompt_id": self.prompt_ids, "instruction": self.instructions})
        frame = frame.loc[frame.index.repeat(len(self.layers))].reset_index(drop=True)
        return frame.assign(layer=self.layers * len(self), **norms)

    def _shown(self) -> dict[str, Float[Tensor, "pair layer d_model"]]:
        return {
            "norm_without": self.resid[:, 0],
            "norm_with": self.resid[:, 1],
            "norm_difference": self.differences,
        }

    def _of(self, keep: Sequence[int]) -> "Activations":
        instructions = tuple(self.instructions[index] for index in keep)
        pairs = None if self.pairs is None else PairSet(self.pairs[index] for index in keep)
        return Activations(
            resid=self.resid[list(keep)],
            layers=self.layers,
            prompt_ids=tuple(self.prompt_ids[index] for index in keep),
            instructions=instructions,
            metadata={**self.metadata, **_data_metadata(pairs, instructions)},
            pairs=pairs,
        )

    @property
    def differences(self) -> Float[Tensor, "pair layer d_model"]:
        """With minus without, per pair."""
        return self.resid[:, 1] - self.resid[:, 0]

    def by_instruction(self) -> dict[str, "Activations"]:
        """The same activations, one entry per instruction."""
        parts = {}
        for instruction in dict.fromkeys(self.instructions):
            keep = [index for index, other in enumerate(self.instructions) if other == instruction]
            parts[instruction] = self._of(keep)
        return parts

    def _repr_html_(self) -> str:
        means = self.to_frame().groupby("layer", sort=False)[[*self._shown()]].mean().reset_index()
        return f"<p>{self!r}; means over pairs:</p>{means.to_html(index=False, float_format='{:.2f}'.format)}"

    def __repr__(self) -> str:
        pairs, _, layers, d_model = self.resid.shape
        return f"Activations({pairs} pairs x 2 sides x {layers} layers x {d_model}, {len(set(self.instructions))} instructions)"


@dataclass(frozen=True, eq=False)
class ActivationMeans:
    """Means over any number of pairs, kept as running sums in float64.

    Example:
        >>> record_means(model, train[:2]).count
        2
    """

    mean: Float[Tensor, "side layer d_model"]
    mean_norm: Float[Tensor, "side layer"]
    """Mean residual norm."""
    count: int
    layers: tuple[int, ...]
    metadata: dict[str, str] = field(default_factory=dict)


def record_activations(
    model: Any,
    pairs: PairSet,
    *,
    layers: Iterable[WholeNumber] | None = None,
    batch_size: int = 32,
    prompt_format: PromptFormat = PromptFormat(),
    share_prefixes: bool = True,
    progress: bool = False,
) -> Activations:
    """The residual of the last prompt token of both prompts of every pair, in the pairs' order.

    Args:
        layers: Layers to keep, in this order; default all.
        batch_size: Pairs per batch; each pair is two rows.
        share_prefixes: Run what prompts have in common once. False runs every prompt whole.
        progress: Show a progress bar with pairs per second and time left.

    Returns:
        Residuals `[pair, side, layer, d_model]`, in the model's own units.

    Raises:
        DataError: if there are no pairs, or a pair has no bare query.
        SteerlensError: if a layer is out of range or a prompt exceeds the context.

    Example:
        >>> record_activations(model, train[:2], layers=[3]).resid.shape
        torch.Size([2, 2, 1, 160])
    """
    kept = _check_layers(model, layers)
    _check_pairs(pairs)
    prompt_format = pinned(model, prompt_format)
    resid = torch.empty(len(pairs), 2, len(kept), int(model.cfg.d_model))
    for batch in iter_activations(
        model,
        pairs,
        layers=kept,
        batch_size=batch_size,
        prompt_format=prompt_format,
        share_prefixes=share_prefixes,
        progress=progress,
    ):
        resid[batch.indices] = batch.resid
    return Activations(
        resid=resid,
        layers=kept,
        prompt_ids=tuple(pair.prompt_id for pair in pairs),
        instructions=tuple(pair.instruction_id for pair in pairs),
        metadata=capture_metadata(model, pairs, prompt_format),
        pairs=pairs,
    )


def record_means(
    model: Any,
    pairs: PairSet,
    *,
    layers: Iterable[WholeNumber] | None = None,
    batch_size: int = 32,
    prompt_format: PromptFormat = PromptFormat(),
    progress: bool = False,
) -> ActivationMeans:
    """The mean residual of each side and layer; memory does not grow with the number of pairs.

    Arguments and errors are those of `record_activations`; pairs of several instructions are an error, too, because sums
    cannot be taken apart again.

    Returns:
        Means `[side, layer, d_model]`, in the model's own units.

    Example:
        >>> record_means(model, train[:2], layers=[3]).mean.shape
        torch.Size([2, 1, 160])
    """
    kept = _check_layers(model, layers)
    _check_pairs(pairs)
    if len(pairs.instructions) > 1:
        raise SteerlensError(
            f"means are of one instruction, got pairs of {len(pairs.instructions)}; "
            "record each part of pairs.by_instruction()"
        )
    prompt_format = pinned(model, prompt_format)
    total = torch.zeros(2, len(kept), int(model.cfg.d_model), dtype=torch.float64)
    total_norm = torch.zeros(2, len(kept), dtype=torch.float64)
    for batch in iter_activations(
        model, pairs, layers=kept, batch_size=batch_size, prompt_format=prompt_format, progress=progress
    ):
        total += batch.resid.double().sum(0)
        total_norm += batch.resid.double().norm(dim=-1).sum(0)
    return ActivationMeans(
        mean=(total / len(pairs)).float(),
        mean_norm=(total_norm / len(pairs)).float(),
        count=len(pairs),
        layers=kept,
        metadata=capture_metadata(model, pairs, prompt_format),
    )


def capture_metadata(model: Any, pairs: PairSet, prompt_format: PromptFormat) -> dict[str, str]:
    """Where activations come from; vectors carry it on, and files hold it."""
    return {
        "model": model_id(model),
        "n_layers": str(model.cfg.n_layers),
        "d_model": str(model.cfg.d_model),
        "frame": coordinate_frame(model),
        "template": template_digest(model, prompt_format),
        "prompt": frame(model, prompt_format),
        "read_position": "last prompt token",
        **_data_metadata(pairs, [pair.instruction_id for pair in pairs]),
        "versions": versions_json(),
    }


def _data_metadata(pairs: PairSet | None, instructions: Sequence[str]) -> dict[str, str]:
    """What says which pairs something comes from, and which queries (`splits.without_queries`) are not to test it."""
    counts = {"instruction": " | ".join(dict.fromkeys(instructions)), "n_pairs": str(len(instructions))}
    if pairs is None:
        return {**counts, "data": "unknown", "queries": ""}
    queries = " ".join(sorted(query_ids(pairs)))
    return {**counts, **_shared_arguments(pairs), "data": pairs.content_hash, "queries": queries}


def _shared_arguments(pairs: PairSet) -> dict[str, str]:
    """The arguments of the instruction, such as a keyword, if all pairs have the same ones."""
    values = {
        ", ".join(
            str(word)
            for kwargs in pair.kwargs
            for value in kwargs.values()
            for word in several(value)
            if not pair.instruction_id.endswith(f"_{word}")  # a language is in the name already
        )
        for pair in pairs
    }
    return {"arguments": values.pop()} if len(values) == 1 and len(pairs.instructions) == 1 and values != {""} else {}


@dataclass(frozen=True, eq=False)
class ActivationBatch:
    """One batch of pairs, by their place in the pair set."""

    indices: list[int]
    resid: Float[Tensor, "pair side layer d_model"]


def iter_activations(
    model: Any,
    pairs: Sequence[InstructionPair],
    *,
    layers: Sequence[int],
    batch_size: int = 32,
    prompt_format: PromptFormat = PromptFormat(),
    share_prefixes: bool = True,
    progress: bool = False,
) -> Iterator[ActivationBatch]:
    """Batches of activations as they are computed, longest prompts first."""
    prompt_format = pinned(model, prompt_format)
    without = encode_all(model, [pair.text("none") for pair in pairs], prompt_format)
    with_ = encode_all(model, [pair.text("text") for pair in pairs], prompt_format)
    share = share_prefixes and _prefixes_can_be_shared(model)
    common = common_prefix(without + with_) if share else 0
    trunk = _Trunk(model, without[0][:common])
    lengths = [len(row) for row in with_]
    with tqdm(total=len(pairs), desc="record", unit="pair", disable=not progress) as bar:
        for indices in length_sorted_batches(lengths, batch_size):
            batch = [(without[index], with_[index]) for index in indices]
            yield ActivationBatch(indices, trunk.last_resid(batch, layers, share=share))
            bar.update(len(indices))


class _Trunk:
    """The keys and values of what all prompts share, and the passes that branch off from there."""

    def __init__(self, model: Any, prefix: list[int]) -> None:
        self.model = model
        self.length = len(prefix)
        self.cache = None
        if prefix:
            batch = left_pad([prefix])
            with torch.inference_mode():
                _, self.cache = forward(model, batch.tokens, batch.attention_mask)

    def last_resid(
        self, pairs: Sequence[tuple[list[int], list[int]]], layers: Sequence[int], *, share: bool
    ) -> Float[Tensor, "pair side layer d_model"]:
        """Residuals of both prompts of each pair: first what a pair shares, then the two endings."""
        splits = [common_prefix(pair) if share else 0 for pair in pairs]
        stems = [pair[0][self.length : split] for pair, split in zip(pairs, splits, strict=True)]
        endings = [side[split:] for pair, split in zip(pairs, splits, strict=True) for side in pair]
        with torch.inference_mode():
            cache = copy.deepcopy(self.cache)
            mask = torch.ones(len(pairs), self.length, dtype=torch.long)
            if cache is not None:
                cache.batch_repeat_interleave(len(pairs))
            if any(stems):
                batch = left_pad(stems, pad_id=pad_id(self.model))
                mask = torch.cat([mask, batch.attention_mask], dim=1)
                _, cache = forward(self.model, batch.tokens, mask, cache)
            if cache is not None:
                cache.batch_repeat_interleave(2)
            batch = left_pad(endings, pad_id=pad_id(self.model))
            mask = torch.cat([mask.repeat_interleave(2, dim=0), batch.attention_mask], dim=1)
            resid = _read_last(self.model, batch.tokens, mask, cache, layers)
        return rearrange(resid, "(pair side) layer d_model -> pair side layer d_model", side=2)


def _read_last(
    model: Any, tokens: Tensor, mask: Tensor, cache: Any, layers: Sequence[int]
) -> Float[Tensor, "row layer d_model"]:
    """The last column's residual at each layer of one forward pass."""
    found: dict[int, Tensor] = {}

    def keep(resid: Tensor, hook: Any, layer: int) -> None:
        # .to() of a slice may return a view, and a view would keep the whole activation alive.
        found[layer] = resid[:, -1].detach().to("cpu", torch.float32, copy=True)

    hooks = [(resid_post(layer), partial(keep, layer=layer)) for layer in layers]
    with model.hooks(fwd_hooks=hooks):
        forward(model, tokens, mask, cache)
    return torch.stack([found[layer] for layer in layers], dim=1)


def common_prefix(rows: Sequence[list[int]]) -> int:
    """How many first tokens all rows share, leaving each at least one of its own."""
    first, last = min(rows), max(rows)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(shared, min(map(len, rows)) - 1)


def _prefixes_can_be_shared(model: Any) -> bool:
    """Whether a masked gap inside a row changes nothing: not for recurrent state, nor for windows, which count columns."""
    config: Any = getattr(getattr(model, "original_model", None), "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    has_window = getattr(text_config, "sliding_window", None) is not None
    return not has_window and not getattr(model.cfg, "is_stateful", False)


def _check_layers(model: Any, layers: Iterable[WholeNumber] | None) -> tuple[int, ...]:
    chosen = range(int(model.cfg.n_layers)) if layers is None else several(layers)
    if not chosen:
        raise SteerlensError("activations need at least one layer, got none; leave layers out to keep all")
    return tuple(dict.fromkeys(check_layer(model, layer) for layer in chosen))


def _check_pairs(pairs: PairSet) -> None:
    if len(pairs) == 0:
        raise DataError("activations need at least one pair, got an empty pair set; check the filter and the split")
