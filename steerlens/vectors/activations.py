"""Recording the residual stream of the last prompt token, with and without an instruction.

For each pair and layer, `h = resid_post[last prompt token]`, once for the bare query and once for the query with its
instruction (Stolfo et al. 2025, section 2). Hooks keep `[batch, d_model]` per layer and nothing else: no cache of
activations, no logits beyond the last position. Results are float32 on the CPU, whatever the model's dtype.

The two prompts of a pair share their beginning (the system prompt, then the query), and all pairs share the system prompt:
each shared prefix is run once and its keys and values are handed on. What a hook reads is unchanged by that, to rounding.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
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
from steerlens.models.backends import Cache
from steerlens.models.choice import backend_used
from steerlens.models.facts import check_layer, coordinate_frame, model_id, resid_post, versions_json
from steerlens.models.passes import Read, Runner, run_pass
from steerlens.models.prefixes import common_prefix, pays
from steerlens.models.probe import Abilities, abilities
from steerlens.models.prompts import PromptFormat, encode_all, frame, pinned, template_digest
from steerlens.models.rows import length_sorted_batches, pad, pad_id

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
    share_prefixes: bool | None = None,
    progress: bool = False,
) -> Activations:
    """The residual of the last prompt token of both prompts of every pair, in the pairs' order.

    Args:
        layers: Layers to keep, in this order; default all.
        batch_size: Pairs per batch; each pair is two rows.
        share_prefixes: Run what prompts have in common once. Default: where that pays; False runs every prompt whole.
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
        "backend": backend_used(model, map(resid_post, range(int(model.cfg.n_layers)))),
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
    share_prefixes: bool | None = None,
    progress: bool = False,
) -> Iterator[ActivationBatch]:
    """Batches of activations as they are computed; of each `TOKENIZED_AT_ONCE` pairs the longest prompts first."""
    prompt_format = pinned(model, prompt_format)
    sites = [resid_post(layer) for layer in layers]
    with tqdm(total=len(pairs), desc="record", unit="pair", disable=not progress) as bar:
        for start in range(0, len(pairs), TOKENIZED_AT_ONCE):
            some = pairs[start : start + TOKENIZED_AT_ONCE]
            for batch in _iter_part(model, some, sites, batch_size, prompt_format, share_prefixes):
                yield ActivationBatch([start + index for index in batch.indices], batch.resid)
                bar.update(len(batch.indices))


TOKENIZED_AT_ONCE = 1024
"""Pairs whose tokens are held at a time: lists of tokens are larger than texts, and memory is not to grow with the pairs."""


def _iter_part(
    model: Any,
    pairs: Sequence[InstructionPair],
    sites: Sequence[str],
    batch_size: int,
    prompt_format: PromptFormat,
    share_prefixes: bool | None,
) -> Iterator[ActivationBatch]:
    """Batches of some pairs, by their place among these."""
    without = encode_all(model, [pair.text("none") for pair in pairs], prompt_format)
    with_ = encode_all(model, [pair.text("text") for pair in pairs], prompt_format)
    able = abilities(model, max(map(len, without + with_), default=0))
    sides = list(zip(without, with_, strict=True))
    may_share = share_prefixes is not False and able.prefix
    trunk = _Trunk(model, sites, sides, able, always=bool(share_prefixes)) if may_share else None
    # A pair is two rows, so where rows must be alone, so must pairs, and their sides are run one after the other.
    batches = able.batches([len(row) for row in with_], batch_size) if trunk is None else trunk.batches(batch_size)
    for indices in batches:
        if trunk is not None and trunk.fits(indices) and trunk.pays(indices):
            found = trunk.last_resid(indices)
        else:
            found = whole_last_resid(model, sites, [sides[index] for index in indices], able)
        yield ActivationBatch(indices, rearrange(found, "(pair side) layer d_model -> pair side layer d_model", side=2))


Sides = tuple[list[int], list[int]]
"""The tokens of both prompts of a pair."""


def whole_last_resid(
    model: Any, sites: Sequence[str], pairs: Sequence[Sides], able: Abilities
) -> Float[Tensor, "row layer d_model"]:
    """Residuals of the last token of both prompts of each pair, every prompt run whole."""
    rows = [side for pair in pairs for side in pair]
    parts = [rows] if able.cache or able.batch else [[row] for row in rows]
    reads = [Read(site) for site in sites]
    with Runner(model, sites) as runner:
        found = [runner.run(pad(part, side=able.side, pad_id=pad_id(model)), reads=reads).reads for part in parts]
    return torch.cat([torch.stack([reads[site] for site in sites], dim=1) for reads in found])


class _Trunk:
    """What all prompts share is run once, and what the two prompts of a pair share once for both.

        trunk | padding | stem | rest of the first prompt                                 one pass
        trunk | padding | stem | (hidden) ............. | padding | rest of the second    the next pass, on the same cache

    To the second prompt the first one's own rest is a hidden gap, as padding is. Where a model counts columns (ALiBi, a local
    window, an attention chunk), a gap is not nothing, and pairs are run whole: see `Abilities.gaps`.
    """

    def __init__(
        self, model: Any, sites: Sequence[str], pairs: Sequence[Sides], able: Abilities, *, always: bool
    ) -> None:
        """
        Args:
            pairs: All of them; a batch is of some, by their places here.
            always: Share whether it pays or not.
        """
        self.model, self.sites, self.able, self.pad_id, self.always = model, sites, able, pad_id(model), always
        self.pairs, self.stems = pairs, [common_prefix(pair) for pair in pairs]
        prompts = [side for pair in pairs for side in pair]
        prefix = prompts[0][: common_prefix(prompts)]
        # What the two prompts of a pair share is run once anyway.
        worth = always or pays(model, len(prefix) * (len(pairs) - 1))
        self.rows = pad([prefix]) if prefix and worth else None

    @property
    def width(self) -> int:
        return 0 if self.rows is None else int(self.rows.tokens.shape[1])

    @cached_property
    def cache(self) -> Cache | None:
        return None if self.rows is None else run_pass(self.model, self.rows, keep_cache=True).cache

    def batches(self, batch_size: int) -> list[list[int]]:
        """Pairs that share a pass, the widest first (an out-of-memory shows at once).

        Both prompts' own tokens are padded, and their lengths have little to do with each other: pairs are sorted by the one and
        then the other, in the order of the two that pads less.
        """
        own = [(len(first), len(second) - stem) for (first, second), stem in zip(self.pairs, self.stems, strict=True)]
        most = 1 + max(max(lengths) for lengths in own)
        found = [
            length_sorted_batches([most * lengths[major] + lengths[1 - major] for lengths in own], batch_size)
            for major in (0, 1)
        ]
        least = min(found, key=lambda batches: sum(len(batch) * self.columns(batch) for batch in batches))
        return sorted(least, key=self.columns, reverse=True)

    def pays(self, batch: Sequence[int]) -> bool:
        """Whether the tokens of these pairs that need not be run, once the trunk was, are worth the pass more."""
        # Padding is run, too.
        whole = 2 * max(len(side) for index in batch for side in self.pairs[index])
        return self.always or pays(self.model, len(batch) * (whole - (self.columns(batch) - self.width)))

    def fits(self, batch: Sequence[int]) -> bool:
        """Whether hidden columns are nothing in rows of as many columns as these pairs make."""
        return self.columns(batch) <= self.able.gaps

    def columns(self, batch: Sequence[int]) -> int:
        """How many columns a batch of these pairs has in the end, the trunk's included."""
        rests = [len(self.pairs[index][1]) - self.stems[index] for index in batch]
        return max(len(self.pairs[index][0]) for index in batch) + max(rests)

    def last_resid(self, batch: Sequence[int]) -> Float[Tensor, "row layer d_model"]:
        """Residuals of the last token of both prompts of each pair, in rows of two."""
        pairs, stems = [self.pairs[index] for index in batch], [self.stems[index] for index in batch]
        reads = [Read(site) for site in self.sites]
        # The trunk's one row is handed to every pair.
        every = torch.zeros(len(pairs), dtype=torch.long)
        cache = None if self.cache is None else self.cache.copy().select(every)
        rows = pad([first[self.width :] for first, _ in pairs], pad_id=self.pad_id)
        if self.rows is not None:
            rows = self.rows.select(every).then(rows.tokens, rows.mask)
        with Runner(self.model, self.sites) as runner:
            without = runner.run(rows, cache=cache, reads=reads, keep_cache=True)
            mask = rows.mask.clone()
            for row, ((first, _), stem) in enumerate(zip(pairs, stems, strict=True)):
                mask[row, stem - len(first) :] = 0
            rest = pad([second[stem:] for (_, second), stem in zip(pairs, stems, strict=True)], pad_id=self.pad_id)
            rows = replace(rows, mask=mask).then(rest.tokens, rest.mask)
            with_ = runner.run(rows, cache=without.cache, reads=reads)
        sides = [torch.stack([its.reads[site] for site in self.sites], dim=1) for its in (without, with_)]
        return rearrange(sides, "side pair layer d_model -> (pair side) layer d_model")


def _check_layers(model: Any, layers: Iterable[WholeNumber] | None) -> tuple[int, ...]:
    chosen = range(int(model.cfg.n_layers)) if layers is None else several(layers)
    if not chosen:
        raise SteerlensError("activations need at least one layer, got none; leave layers out to keep all")
    return tuple(dict.fromkeys(check_layer(model, layer) for layer in chosen))


def _check_pairs(pairs: PairSet) -> None:
    if len(pairs) == 0:
        raise DataError("activations need at least one pair, got an empty pair set; check the filter and the split")
