"""Who writes the direction: what each attention head and each MLP adds along it, at the last prompt token.

    resid_post(layer)  =  embedding + sum over blocks up to the layer of (sum over heads of z_h W_O,h + b_O  +  MLP's output)
    contribution(part) =  part . u  with the instruction  -  the same without it                       u the unit direction

so the contributions sum to the difference of the residual's projections, within rounding. What stands between the heads' sum and
the residual is a linear map of each head once its scale is known, and is applied to each: a norm after the attention (Gemma 2 and
3, OLMo 2: its weight over the scale that this prompt had) or a fixed factor (Granite). The embedding is all that enters the first
block, positions included. Biases of keys, queries and values act inside the heads; `b_O` has a row of its own. It is the same on
both sides, so that it contributes only behind a norm.

All of this is seen on the model: a block whose heads and MLP do not add up to what it wrote, for any prompt, is refused by name.

TransformerLens' `ActivationCache.stack_head_results` holds every head's output at every position, and its
`direct_logit_attribution` wants processed weights, in whose coordinates a vector does not hold; here heads are projected from
`hook_z`, at the last token.

A contribution is direct: a head that makes a later MLP write the direction has none of its own, and a norm's scale, which depends
on all that went before it, counts as given. The control, random directions of the same norm, says how much of a part's change
falls along any direction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from steerlens._results import Result
from steerlens._typing import WholeNumber, whole
from steerlens.data.pairs import PairSet
from steerlens.errors import DataError, ModelError, SteerlensError
from steerlens.files import derived_seed
from steerlens.models.facts import check_layer, model_id, resid_post, tolerance
from steerlens.models.passes import Read, Runner
from steerlens.models.probe import abilities
from steerlens.models.prompts import PromptFormat, encode_all, pinned
from steerlens.models.rows import pad, pad_id
from steerlens.stats.comparisons import bootstrap_columns
from steerlens.steering.plan import random_directions
from steerlens.vectors.vector import SteeringVector

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Result):
    """What each part of the model adds along the direction, one row per instruction and part.

    Columns: instruction, layer (of the part; missing for the embedding), component ("embedding", "head", "attention bias",
    "mlp"), head, n, proj_without, proj_with, contribution with low and high, and random_mean and random_std, of the random
    directions' contributions.

    >>> found = attribute(model, vector, pairs[:2], layer=1)
    >>> found.table["component"].value_counts().to_dict()
    {'head': 10, 'mlp': 2, 'embedding': 1}
    """

    layer: int
    """Whose residual's direction it is."""

    def plot(self, **options: Any) -> "go.Figure":
        """Heads by layers, and the MLPs beside them; options as in `figures.patching.attribution_map`."""
        from steerlens.figures.patching import attribution_map

        return attribution_map(self.table, **options)


def attribute(
    model: Any,
    vector: SteeringVector | Mapping[str, SteeringVector],
    pairs: PairSet,
    *,
    layer: WholeNumber,
    n_random: WholeNumber = 20,
    seed: WholeNumber = 0,
    batch_size: int = 32,
    prompt_format: PromptFormat = PromptFormat(),
    progress: bool = False,
) -> Attribution:
    """What every head and MLP up to a layer adds along the layer's direction, with the instruction minus without.

    Args:
        vector: One vector for all pairs, or one per instruction id.
        layer: The direction is the vector's at this layer, and it is looked for in the residual after its block.
        n_random: Random directions per instruction, for the control.
        seed: Decides the random directions, with the instruction and the layer.
        batch_size: Pairs per batch; each pair is two rows.

    Returns:
        Means over pairs with bootstrap intervals over queries, and the mean and spread over random directions.

    Raises:
        DataError: if there are no pairs, or an instruction has no vector.
        SteerlensError: if the model or the vector has no such layer, or its direction there is zero.
        ModelError: for a model whose blocks are not the sum of attention heads and an MLP.

    Example:
        >>> table = attribute(model, vector, pairs[:2], layer=4).table
        >>> acts = sl.record_activations(model, pairs[:2], layers=[4])
        >>> bool(abs(table["contribution"].sum() - (acts.differences[:, 0] @ vector.unit(4)).mean()) < 1e-4)
        True
    """
    number, n_random = check_layer(model, layer), whole(n_random, "n_random")
    if len(pairs) == 0:
        raise DataError("attribution needs at least one pair, got an empty pair set; check the filter and the split")
    if n_random < 1:
        raise SteerlensError(f"n_random must be at least 1, got {n_random}; a spread wants some dozen")
    prompt_format, tables = pinned(model, prompt_format), []
    with tqdm(total=len(pairs), desc="attribute", unit="pair", disable=not progress) as bar:
        for name, group in pairs.by_instruction().items():
            directions = _directions(model, vector, name, number, n_random, whole(seed, "seed"))
            writers = _Writers(model, number, directions)
            found = _projections(model, group, writers, batch_size, prompt_format, bar)
            tables.append(_table(name, writers.parts, [pair.query_key for pair in group], found))
    return Attribution(pd.concat(tables, ignore_index=True), number)


def _directions(
    model: Any, vector: SteeringVector | Mapping[str, SteeringVector], name: str, layer: int, n_random: int, seed: int
) -> Float[Tensor, "d_model direction"]:
    """The unit direction, then random ones."""
    if not isinstance(vector, SteeringVector) and name not in vector:
        raise DataError(f"every instruction needs a vector, got none for {name!r}; vectors: {', '.join(vector)}")
    own = vector if isinstance(vector, SteeringVector) else vector[name]
    own.check_fits(model)
    unit = own.unit(layer).double()[:, None]
    seeds = [derived_seed(seed, "attribution", name, layer, turn) for turn in range(n_random)]
    return torch.cat([unit, *(random_directions(unit, seed=one) for one in seeds)], dim=1)


# --- the parts of a residual ----------------------------------------------------------------------------------------

Part = tuple[int | None, str, int | None]
"""Layer, component, head."""


class _Writers:
    """What writes to the residual up to a layer, and how much of it falls along each direction."""

    def __init__(self, model: Any, layer: int, directions: Float[Tensor, "d_model direction"]) -> None:
        self.model, self.directions = model, directions
        self.embedding = "blocks.0.hook_resid_pre"
        self.blocks = [_Block(model, one, directions) for one in range(layer + 1)]
        self.parts: list[Part] = [(None, "embedding", None)]
        for block in self.blocks:
            self.parts += block.parts

    @property
    def sites(self) -> list[str]:
        return [self.embedding, *(site for block in self.blocks for site in block.sites)]

    def project(self, reads: Mapping[str, Tensor]) -> Float[Tensor, "row part direction"]:
        """Of each row, every part along every direction.

        Raises:
            ModelError: if the parts of a block do not add up to what it wrote.
        """
        resid = reads[self.embedding]
        found = [(resid.double() @ self.directions)[:, None]]
        for block in self.blocks:
            found.append(block.project(reads, resid))
            resid = reads[block.resid]
        return torch.cat(found, dim=1)


class _Block:
    """One block: its heads, what stands after their sum, its MLP."""

    def __init__(self, model: Any, layer: int, directions: Float[Tensor, "d_model direction"]) -> None:
        self.model, self.layer, self.directions = model, layer, directions
        names = (f"blocks.{layer}.{name}" for name in ("attn.hook_z", "hook_attn_out", "hook_mlp_out"))
        self.z, self.attention, self.mlp = names
        self.resid, self.scale = resid_post(layer), f"blocks.{layer}.ln1_post.hook_scale"
        block, points = model.blocks[layer], model.hook_dict
        if missing := [site for site in (self.z, self.attention, self.mlp) if site not in points]:
            raise ModelError(self._refusal(f"has no {missing[0]}"))
        bias = block.attn.b_O
        self.bias = None if bias is None else bias.detach().to("cpu", torch.float64)
        # What is done to the heads' sum: a factor for each coordinate, over a scale for each row.
        self.factor = torch.full(
            directions.shape[:1], float(getattr(block, "residual_contribution_scale", 1.0))
        ).double()
        self.normed = self.scale in points
        if self.normed:
            norm = block.ln1_post
            self.factor *= norm.w.detach().to("cpu", torch.float64) + bool(getattr(norm, "uses_weight_offset", False))
        self.along = self.w_o.double() @ (self.factor[:, None] * directions)  # [head d_head direction]

    @property
    def w_o(self) -> Float[Tensor, "head d_head d_model"]:
        """In TransformerLens' layout, whatever the architecture's; read when needed, since all of them together are large."""
        weight: Tensor = self.model.blocks[self.layer].attn.W_O
        return weight.detach().to("cpu", torch.float32)

    @property
    def parts(self) -> list[Part]:
        heads: list[Part] = [(self.layer, "head", head) for head in range(len(self.along))]
        bias: list[Part] = [] if self.bias is None else [(self.layer, "attention bias", None)]
        return [*heads, *bias, (self.layer, "mlp", None)]

    @property
    def sites(self) -> list[str]:
        return [self.z, self.attention, self.mlp, self.resid, *([self.scale] if self.normed else [])]

    def project(
        self, reads: Mapping[str, Tensor], before: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "row part direction"]:
        """Of each row, every head, the bias and the MLP along every direction."""
        z = reads[self.z].double().flatten(1)
        if z.shape[1] != self.along[..., 0].numel():
            raise ModelError(
                self._refusal(f"has heads of {z.shape[1]} numbers, and weights for {self.along[..., 0].numel()}")
            )
        z = rearrange(z, "row (head d_head) -> row head d_head", head=len(self.along))
        scale = reads[self.scale].double() if self.normed else torch.ones(len(z), 1, dtype=torch.float64)
        self._check(reads, before, z, scale)
        found = [torch.einsum("rhe,hek->rhk", z, self.along) / scale[..., None]]
        if self.bias is not None:
            found.append((self.bias @ (self.factor[:, None] * self.directions) / scale)[:, None])
        return torch.cat([*found, (reads[self.mlp].double() @ self.directions)[:, None]], dim=1)

    def _check(
        self,
        reads: Mapping[str, Tensor],
        before: Float[Tensor, "row d_model"],
        z: Float[Tensor, "row head d_head"],
        scale: Float[Tensor, "row 1"],
    ) -> None:
        """The heads add up to what the attention wrote, and that and the MLP to what the block did."""
        heads = torch.einsum("rhe,hed->rd", z.float(), self.w_o) + (0 if self.bias is None else self.bias)
        written = reads[self.attention]
        if not self._close(heads * self.factor / scale, written):
            raise ModelError(self._refusal("does something else to its heads' sum than a norm or a factor"))
        if not self._close(before + written + reads[self.mlp], reads[self.resid]):
            raise ModelError(self._refusal("adds something else to the residual, too, or scales it"))

    def _close(self, found: Tensor, expected: Tensor) -> bool:
        return bool(((found - expected).norm(dim=-1) <= tolerance(self.model) * expected.norm(dim=-1)).all())

    def _refusal(self, why: str) -> str:
        return (
            f"who writes a direction is asked of blocks of attention heads and an MLP, and block {self.layer} of "
            f'{model_id(self.model)} {why}; patch(site="resid") takes any model'
        )


# --- running and summing up -----------------------------------------------------------------------------------------


def _projections(
    model: Any, pairs: PairSet, writers: _Writers, batch_size: int, prompt_format: PromptFormat, bar: Any
) -> Float[Tensor, "pair side part direction"]:
    """Of both prompts of each pair, every part along every direction."""
    sides = [encode_all(model, pairs.prompts(condition), prompt_format) for condition in ("none", "text")]
    able = abilities(model, max(len(ids) for side in sides for ids in side))
    found = torch.empty(len(pairs), 2, len(writers.parts), writers.directions.shape[1], dtype=torch.float64)
    reads = [Read(site) for site in writers.sites]
    for group in able.batches([len(ids) for ids in sides[1]], batch_size):
        rows = [(i, side) for i in group for side in (0, 1)]
        parts = [rows] if able.cache or able.batch else [[row] for row in rows]
        for part in parts:
            tokens = pad([sides[side][i] for i, side in part], side=able.side, pad_id=pad_id(model))
            with Runner(model, writers.sites) as runner:
                values = runner.run(tokens, reads=reads).reads
            places, which = zip(*part, strict=True)
            found[list(places), list(which)] = writers.project(values)
        bar.update(len(group))
    return found


def _table(
    name: str, parts: Sequence[Part], queries: Sequence[str], found: Float[Tensor, "pair side part direction"]
) -> pd.DataFrame:
    """One row per part."""
    without, with_ = found[..., 0].mean(0).numpy()
    differences = (found[:, 1] - found[:, 0]).numpy()  # [pair part direction]
    draws = bootstrap_columns(differences[..., 0], queries)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    random = differences[..., 1:].mean(0)
    layers, components, heads = zip(*parts, strict=True)
    return pd.DataFrame(
        {
            "instruction": name,
            "layer": pd.array(layers, dtype="Int64"),
            "component": components,
            "head": pd.array(heads, dtype="Int64"),
            "n": len(queries),
            "proj_without": without,
            "proj_with": with_,
            "contribution": with_ - without,
            "low": low,
            "high": high,
            "random_mean": random.mean(-1),
            "random_std": random.std(-1, ddof=1) if random.shape[-1] > 1 else np.nan,
        }
    )
