"""What a vector says: its direction read through the unembedding, at each layer, for both signs.

    norm="model"    cap(norm(+-u * sqrt(d_model)) @ W_U + b_U)      the model's own last norm, unembedding and softcap
    norm="none"     +-u @ W_U                                       of the unit direction u (Stolfo et al. 2025, their lens)

The model norm of a bare direction answers: what would the model say if nothing else were in its last residual? It forgets the
direction's length (which is why u has a residual's root mean square of one here, against the norm's epsilon) and, where the model
has biases, adds to both signs what these say alone. An RMSNorm multiplies by its gain, so it orders the tokens as the paper's own
`u @ W_U` does: its authors' models have that gain folded into W_U. `"none"` leaves it out.

Beside each logit stands what a random direction has in its place: the range over 39 of them, of the same rank for the most
promoted and most suppressed tokens, of the same token for targets. A further random direction is beyond it one time in twenty.

What it does not show: what the layers after it make of the direction, which is often another thing (see `effects`). And tokens of
large norm in W_U come first for any direction, which the range of the random ones shows.

TransformerLens' `logit_readout` reads one selection of one model-normed stack; signs, targets beside top tokens, many vectors and
the random range are built on it here.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlens._results import Result
from steerlens._typing import WholeNumber, whole, whole_numbers
from steerlens.errors import SteerlensError
from steerlens.figures.tokens import token_table
from steerlens.files import derived_seed
from steerlens.models.facts import forbidden_ids
from steerlens.reading.readout import check_readout, iter_logits, ranks
from steerlens.reading.words import Spelling, spellings, written
from steerlens.vectors.vector import SteeringVector

if TYPE_CHECKING:
    import plotly.graph_objects as go

Norm = Literal["model", "none"]
"""Through the model's last norm, unembedding and softcap, or only through W_U."""

N_RANDOM = 39
"""Random directions of the range: the next one is below it one time in forty, and above it another one."""


@dataclass(frozen=True, eq=False)
class VocabularyLens(Result):
    """What vectors say in the vocabulary: the frame of `logit_lens`, and how many tokens there are to be ranked.

    Example:
        >>> VocabularyLens(pd.DataFrame({"layer": [4]}), n_tokens=1600).n_tokens
        1600
    """

    n_tokens: int
    """Tokens of the tokenizer that the model can say; ranks are below it."""

    def plot(self, **options: Any) -> "go.Figure":
        """The most promoted and most suppressed tokens; see `figures.token_table`."""
        return token_table(self.table, **options)

    def __repr__(self) -> str:
        top = self.table[(self.table["sign"] == 1) & (self.table["kind"] == "promoted")]
        last = top[top["layer"] == top.groupby("vector")["layer"].transform("max")]
        lines = [
            f"  {name} at layer {rows['layer'].iloc[0]}: {', '.join(map(repr, rows['token'][:6]))}"
            for name, rows in last.groupby("vector", sort=False)
        ]
        more = ["  …"] if len(lines) > 12 else []
        return "\n".join([f"VocabularyLens({len(self)} rows), most promoted tokens:", *lines[:12], *more])


def logit_lens(
    model: Any,
    vectors: SteeringVector | Mapping[str, SteeringVector],
    *,
    layer: WholeNumber | Iterable[WholeNumber] | Literal["all"] | None = None,
    top_k: WholeNumber = 10,
    targets: str | Iterable[str] = (),
    norm: Norm = "model",
    seed: WholeNumber = 0,
) -> VocabularyLens:
    """The tokens that each vector promotes and suppresses at each layer, and where target words stand among all tokens.

    Args:
        vectors: One, or several by name, of any number of layers.
        layer: One or several that every vector has; default, and "all": each vector's own, but for those where its direction
            is zero.
        top_k: How many tokens from each end.
        targets: Words; each is looked up in lower case, with a capital, in upper case, without and with a leading space, and
            where such a spelling is several tokens, each of these.
        norm: "model": what the model would say if nothing but the direction, as long as its norm makes it, were in its last
            residual, with the biases and the softcap that it has. "none": the bare `u @ W_U`.
        seed: Decides the random directions.

    Returns:
        One row per vector, layer, sign (+1 or -1, of the direction that is read) and token:
        kind ("promoted", "suppressed" or "target"), rank (0: the largest logit of all tokens), token_id, token, logit,
        random_low and random_high (the range of random directions: at this rank, for targets of this token), and for targets
        target (the word as given), text (its spelling), case, with_space, piece (which of the spelling's tokens).
        Tokens that only pad the vocabulary are left out.

    Raises:
        SteerlensError: if a vector lacks the layer or is zero there, or a setting is out of range.
        ModelError: if a vector does not fit the model, or the model's logits are no readout of its last residual.

    Example:
        >>> lens = logit_lens(model, vector, layer=4, top_k=3, targets="rain")
        >>> lens.table.query("kind == 'promoted'")[["sign", "rank"]].to_numpy().tolist()
        [[1, 0], [1, 1], [1, 2], [-1, 0], [-1, 1], [-1, 2]]
    """
    named = _named(vectors)
    for vector in named.values():
        vector.check_fits(model)
    if norm not in ("model", "none"):
        raise SteerlensError(f'norm must be "model" or "none", got {norm!r}; "none" is the bare u @ W_U')
    check_readout(model)
    places = [(name, one) for name, vector in named.items() for one in _layers(name, vector, layer)]
    units = torch.stack([named[name].unit(one) for name, one in places])
    words = spellings(model, targets)
    real = _real_tokens(model)
    top_k = whole(top_k, "top_k")
    if not 1 <= top_k <= len(real):
        raise SteerlensError(f"top_k must be in [1, {len(real)}], the tokens of the model, got {top_k}")
    wanted = torch.tensor([token for word in words for token in word.ids], dtype=torch.long)
    pick = _Pick(real, top_k, torch.searchsorted(real, wanted))
    control = _random_units(len(units[0]), whole(seed, "seed"))
    found = _read(model, units, norm, pick)
    return VocabularyLens(
        _frame(model, places, norm, found, _labels(words, pick, _read(model, control, norm, pick))), len(real)
    )


@dataclass(frozen=True, eq=False)
class _Picked:
    """Of each sign and direction: the top tokens, the bottom ones with the lowest first, and the targets."""

    ids: Int[Tensor, "sign direction picked"]
    logits: Float[Tensor, "sign direction picked"]
    ranks: Int[Tensor, "sign direction picked"]


@dataclass(frozen=True, eq=False)
class _Pick:
    """What is kept of the logits of a chunk of directions."""

    real: Int[Tensor, " real"]
    """The ids of the tokens that are ranked."""
    top_k: int
    targets: Int[Tensor, " target"]
    """The places of target tokens among the real ones."""

    def __call__(self, logits: Float[Tensor, "n d_vocab"]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, logits and ranks, each `[n, picked]` on the CPU."""
        real, targets = self.real.to(logits.device), self.targets.to(logits.device)
        logits = logits if len(real) == logits.shape[1] else logits[:, real]
        top, bottom = logits.topk(self.top_k), logits.topk(self.top_k, largest=False)
        at = logits[:, targets]
        from_top = torch.arange(self.top_k, device=logits.device).expand(len(logits), -1)
        places = torch.cat([top.indices, bottom.indices, targets.expand(len(logits), -1)], 1)
        values = torch.cat([top.values, bottom.values, at], 1)
        standing = torch.cat([from_top, len(real) - 1 - from_top, ranks(logits, at)], 1)
        return real[places].cpu(), values.cpu(), standing.cpu()


def _read(model: Any, units: Float[Tensor, "direction d_model"], norm: Norm, pick: _Pick) -> _Picked:
    """What is picked of both signs of each direction, in parts: with all copies, less than their table is in memory at once."""
    if norm == "none":  # the signs share the product
        chunks = [(pick(logits), pick(-logits)) for _, logits in iter_logits(model, units, raw=True, parts=8)]
        parts = [chunk[sign] for sign in (0, 1) for chunk in chunks]
    else:  # a norm may subtract a mean, and add a bias, so that minus u is not minus what u is
        scaled = math.sqrt(units.shape[1]) * units
        parts = [pick(logits) for _, logits in iter_logits(model, torch.cat([scaled, -scaled]), parts=8)]
    return _Picked(*(torch.cat(part).reshape(2, len(units), -1) for part in zip(*parts, strict=True)))


def _frame(
    model: Any, places: Sequence[tuple[str, int]], norm: Norm, found: _Picked, labels: pd.DataFrame
) -> pd.DataFrame:
    """The tidy frame: places first, then signs, then what was picked."""
    n = found.ids.shape[2]
    names, layers = zip(*places, strict=True)
    token_ids = _place_first(found.ids)
    texts = dict(zip(unique := sorted(set(token_ids)), written(model, unique), strict=True))
    repeated = labels.loc[np.tile(np.arange(n), 2 * len(places))].reset_index(drop=True)
    columns = {
        "vector": np.repeat(names, 2 * n),
        "layer": np.repeat(layers, 2 * n),
        "sign": np.tile(np.repeat([1, -1], n), len(places)),
        "norm": norm,
        "kind": repeated.pop("kind"),
        "rank": _place_first(found.ranks),
        "token_id": token_ids,
        "token": [texts[token] for token in token_ids],
        "logit": _place_first(found.logits),
    }
    return pd.concat([pd.DataFrame(columns), repeated], axis=1)


def _place_first(values: Tensor) -> list[Any]:
    flat: list[Any] = values.transpose(0, 1).flatten().tolist()
    return flat


def _labels(words: Sequence[Spelling], pick: _Pick, control: _Picked) -> pd.DataFrame:
    """What is the same for every direction: the kind, the spelling of a target, and the range of random directions."""
    spelled = [(word, piece) for word in words for piece in range(len(word.ids))]
    blank, missing = [""] * 2 * pick.top_k, [None] * 2 * pick.top_k
    return pd.DataFrame(
        {
            "kind": ["promoted"] * pick.top_k + ["suppressed"] * pick.top_k + ["target"] * len(spelled),
            "random_low": control.logits[0].amin(0).tolist(),
            "random_high": control.logits[0].amax(0).tolist(),
            "target": [*blank, *(word.target for word, _ in spelled)],
            "text": [*blank, *(word.text for word, _ in spelled)],
            "case": [*blank, *(word.case for word, _ in spelled)],
            "with_space": pd.array([*missing, *(word.with_space for word, _ in spelled)], dtype="boolean"),
            "piece": pd.array([*missing, *(piece for _, piece in spelled)], dtype="Int64"),
        }
    )


def _named(vectors: Any) -> dict[str, SteeringVector]:
    named = {vectors.name: vectors} if isinstance(vectors, SteeringVector) else vectors
    if not isinstance(named, Mapping) or not all(isinstance(one, SteeringVector) for one in named.values()):
        raise SteerlensError(
            f"vectors must be a steering vector, or several by name, got {vectors!r:.80}; "
            "give a dict of them, and make a vector of a tensor with SteeringVector({layer: tensor})"
        )
    if not named:
        raise SteerlensError("a lens needs a vector, got none; fit one with fit_steering_vector")
    return dict(named)


def _layers(name: str, vector: SteeringVector, layer: Any) -> list[int]:
    if layer is None or (isinstance(layer, str) and layer == "all"):
        chosen = [one for one in vector.layers if bool(vector[one].any())]
        if not chosen:
            raise SteerlensError(
                f"a direction must not be zero, and {name!r} is zero at every layer; were its sides equal?"
            )
        return chosen
    if isinstance(layer, str):
        raise SteerlensError(f'layer must be a number, several, or "all", got {layer!r}')
    chosen = list(dict.fromkeys(whole_numbers(layer, "layer")))
    if not chosen or (missing := [one for one in chosen if one not in vector]):
        got = f"{missing[0]}; layers count from zero" if chosen else "none; leave layer out for all of them"
        raise SteerlensError(f"layer must be one of {list(vector.layers)}, those of the vector {name!r}, got {got}")
    return chosen


def _real_tokens(model: Any) -> Int[Tensor, " real"]:
    """The ids of the model's vocabulary that are tokens of its tokenizer, in order."""
    there = torch.ones(int(model.cfg.d_vocab), dtype=torch.bool)
    there[list(forbidden_ids(model))] = False
    return there.nonzero()[:, 0]


def _random_units(d_model: int, seed: int) -> Float[Tensor, "direction d_model"]:
    generator = torch.Generator().manual_seed(derived_seed("logit_lens", seed))
    drawn = torch.randn(N_RANDOM, d_model, generator=generator, dtype=torch.float64)
    units: Tensor = (drawn / drawn.norm(dim=-1, keepdim=True)).float()
    return units
