"""Interventions: one thing that is done to one row of a batch, as a value.

    Intervention            one operator at one layer's `resid_post`; see `operators`
    AttentionIntervention   one edit of the scores before the softmax of attention, at some layers and heads; see `scores`

Both compare and hash by content, so that the identity of a plan covers the very numbers that steer it. What they are called and
where a direction came from is no part of that.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens._typing import (
    ATTENTION_OPERATORS,
    OPERATORS,
    UNITS,
    AttentionOperator,
    Operator,
    RealNumber,
    Unit,
    WholeNumber,
    real,
    several,
    whole,
    whole_numbers,
)
from steerlens.errors import SteerlensError, nearest
from steerlens.steering.operators import affine
from steerlens.steering.positions import Window, as_window

UNIT_TOLERANCE = 1e-3
"""How far a unit vector's norm may be from one; rounding to bfloat16 moves it less than this from about 100 coordinates on."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """One operator at one layer; equal to any other that does the same.

    >>> Intervention(3, torch.tensor([0.0, 1.0]), coeff=2.0) == Intervention(3, torch.tensor([0.0, 1.0]), coeff=2.0)
    True
    """

    layer: WholeNumber
    """Block index; the site is `blocks.{layer}.hook_resid_post`."""
    direction: Float[Tensor, " d_model"]
    """The unit direction that is read and written; with `write`, what is read, of any norm; float32 on the CPU."""
    operator: Operator = "add"
    coeff: RealNumber = 1.0
    """`add`: the step in absolute units along the direction; other operators: the share of the full change."""
    target: RealNumber = 0.0
    """`set_projection`: the projection to reach, in absolute units; other operators do not read it."""
    positions: str | Window = "all"
    write: Float[Tensor, " d_model"] | None = None
    """Where the change goes, if not along `direction`: the placebo of equal norm."""
    resid_norm: RealNumber = float("nan")
    """Mean residual norm at this layer where the direction was fitted, to read `coeff` in those units; nan if unknown."""
    unit: Unit = "absolute"
    """The unit in which the coefficient was given; tables show it so. `coeff` itself is absolute."""
    name: str = ""
    """What the direction is called: its vector's name."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """"model", "n_layers" and "frame" of the model that the direction was fitted in, as far as they are known."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", whole(self.layer, "layer"))
        object.__setattr__(self, "resid_norm", float(self.resid_norm))
        if self.layer < 0:
            raise SteerlensError(f"layer counts blocks from zero, got {self.layer}")
        if self.operator not in OPERATORS:
            raise SteerlensError(
                f"operator must be one of steerlens', got {self.operator!r}; {nearest(self.operator, OPERATORS)}"
            )
        if self.unit not in UNITS:
            raise SteerlensError(f"unit must be one of steerlens', got {self.unit!r}; {nearest(self.unit, UNITS)}")
        for name in ("coeff", "target"):
            object.__setattr__(self, name, real(getattr(self, name), name))
        object.__setattr__(self, "positions", as_window(self.positions))
        for name in ("direction", "write"):
            vector = getattr(self, name)
            if vector is None:
                continue
            # A copy: what the caller does to the tensor later must not change what a plan says it does.
            vector = vector.detach().to("cpu", torch.float32, copy=True)
            free = name == "direction" and self.write is not None and 0 < vector.norm().item() < float("inf")
            if vector.ndim != 1 or not (free or abs(vector.norm().item() - 1.0) <= UNIT_TOLERANCE):
                raise SteerlensError(
                    f"{name} must be one unit vector, got shape {list(vector.shape)} and norm {vector.norm():.4g}; "
                    "divide it by its norm and keep the norm in coeff"
                )
            object.__setattr__(self, name, vector)

    @property
    def acts(self) -> bool:
        """Whether it changes anything."""
        return self.coeff != 0

    @property
    def affine(self) -> tuple[float, float]:
        """The (offset, slope) of the operator; see `operators.rank_one`."""
        return affine(self.operator, coeff=self.coeff, target=self.target)

    def bounds(self, prompt_length: int) -> tuple[int, int]:
        """The positions [low, high) that are steered in a row whose prompt has `prompt_length` tokens."""
        return as_window(self.positions).bounds(prompt_length)

    @property
    def coeff_in_norms(self) -> float:
        """For `add`, the step in units of the layer's mean residual norm; nan for other operators, and where that is unknown."""
        if self.operator != "add" or not self.resid_norm > 0:
            return float("nan")
        return float(f"{self.coeff / self.resid_norm:.12g}")  # 0.3 times a norm, over that norm, is 0.3 again

    @property
    def coeff_absolute(self) -> float:
        """For `add`, the length of the step; nan for other operators, whose coefficient is a share."""
        return self.coeff if self.operator == "add" else float("nan")

    @property
    def given(self) -> float:
        """The coefficient in the unit in which it was given."""
        return self.coeff_in_norms if self.unit == "resid_norm" else self.coeff

    def record(self) -> dict[str, Any]:
        """What the intervention does as plain data, the vectors by their digest; what does not act is None."""
        # Written along what is read, a step is the step without `write`.
        along = self.write is None or torch.equal(self.write, self.direction)
        return {
            "layer": self.layer,
            "operator": self.operator,
            "coeff": self.coeff,
            "target": self.target if self.operator == "set_projection" else None,
            "positions": str(self.positions),
            "direction": tensor_digest(self.direction),
            "write": None if along or self.write is None else tensor_digest(self.write),
        }

    def __eq__(self, other: object) -> bool:
        return self.record() == other.record() if isinstance(other, Intervention) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.record().values()))

    def __str__(self) -> str:
        size = f"{self.given:g} norms ({self.coeff:g})" if self.unit == "resid_norm" else f"{self.coeff:g}"
        what = f" along {self.name}" if self.name else ""
        where = "" if self.write is None else ", written along another direction"
        return f"{self.operator} {size}{what} at layer {self.layer}, positions {self.positions}{where}"


Heads = Mapping[Any, Any] | Sequence[Any] | None
"""{layer: heads}; or layers, of which every head counts; None: every head of every layer."""

Part = str | tuple[int, int]
"""A part of a prompt: a text that stands in it, or its characters [start, stop)."""

Keys = Literal["span", "rest", "prompt"]
Sections = Literal["union", "reference"]
Pool = Literal["row", "head", "layer"]
Exempt = Literal["first", "template"]


@dataclass(frozen=True)
class AttentionIntervention:
    """One edit of attention scores `s[head, query, key]`, after scaling and mask, before the softmax; see `scores`.

        bias    s + coeff * w[key]                              coeff in nats
        scale   s * coeff          where w[key] > 0             the keys, as it were, times coeff
        mass    s + log(coeff / m) where w[key] > 0, if m < coeff, with m the share of attention on these keys

    `w` is 1 on the keys that are meant and 0 elsewhere, but where sections add up. It follows from where the spans stand in a
    row's prompt: `on` says where, and `bind` works it out.

    >>> AttentionIntervention("bias", 2.0).on("Use capitals.") == AttentionIntervention("bias", 2, spans=("Use capitals.",))
    True
    """

    operator: AttentionOperator
    coeff: RealNumber
    """Nats, a factor above 0, or a share in [0, 1]."""
    heads: Heads = None
    spans: tuple[Part, ...] | None = None
    """What the instruction is: texts that stand in the prompt, each wherever it does, or characters [start, stop). None: the
    instruction of each pair, which whoever has pairs fills in."""
    keys: Keys = "span"
    """Which keys are meant: those of the spans, the rest of the prompt, or the whole prompt; never those of generated tokens."""
    sections: Sections = "union"
    """How several spans count: as one union, at all occurrences; "reference": the first occurrence of each, and the weights of
    all add up, as in the code that PASTA's authors published."""
    exempt: Exempt | Sequence[Exempt] = ()
    """Keys that are left alone: the "first" token, which many heads rest on, and those of the chat "template"."""
    positions: str | Window = "all"
    """Which queries are steered."""
    pool: Pool = "row"
    """For "mass": the share is that of each head and query ("row"), or of each head or the whole layer over all queries of the
    prompt at once and over each generated one, so that later tokens of a prompt act on earlier ones."""
    extra_tokens: WholeNumber = 0
    """So many tokens after each span count as part of it; the published code of DIRECTER has one."""
    name: str = ""
    """What the method is called."""
    placebo: WholeNumber | None = None
    """The control: in place of the spans' tokens, as many others of the prompt, which this seed draws, if there are as many."""
    weights: tuple[float, ...] | None = None
    """`w` of every token of the prompt, once it is bound to one."""

    def __post_init__(self) -> None:
        choices = {
            "operator": ATTENTION_OPERATORS,
            "keys": get_args(Keys),
            "sections": get_args(Sections),
            "pool": get_args(Pool),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise SteerlensError(f"{name} must be one of steerlens', got {getattr(self, name)!r}; known: {known}")
        object.__setattr__(self, "coeff", real(self.coeff, "coeff"))
        if self.operator == "scale" and not 1e-30 <= self.coeff <= 1e30:
            raise SteerlensError(
                f"keys are scaled by a factor above 0, got {self.coeff:g}; take one between 1e-30 and 1e30, 1 leaves them alone"
            )
        if self.operator == "mass" and not 0 <= self.coeff < 1:
            raise SteerlensError(f"a target is a share of attention in [0, 1), got {self.coeff:g}; 0 asks for nothing")
        object.__setattr__(self, "heads", _sorted_heads(self.heads))
        object.__setattr__(self, "positions", as_window(self.positions))
        exempt = several(self.exempt)
        if unknown := [name for name in exempt if name not in get_args(Exempt)]:
            raise SteerlensError(f"exempt must be of {', '.join(get_args(Exempt))}, got {unknown[0]!r}")
        object.__setattr__(self, "exempt", tuple(name for name in get_args(Exempt) if name in exempt))
        object.__setattr__(self, "extra_tokens", whole(self.extra_tokens, "extra_tokens"))
        if self.extra_tokens < 0:
            raise SteerlensError(
                f"extra_tokens must be at least 0, got {self.extra_tokens}; name a shorter span instead"
            )
        if self.spans is not None:
            object.__setattr__(self, "spans", _parts(self.spans))
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))

    @property
    def by_layer(self) -> dict[int, tuple[int, ...] | None] | None:
        """{layer: heads}, heads None for all of them; None for every head of every layer."""
        return None if self.heads is None else dict(self.heads)

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The layers, in order; None for every one."""
        return None if self.heads is None else tuple(self.by_layer or ())

    @property
    def layer(self) -> int | None:
        """The layer, where there is one."""
        return self.layers[0] if self.layers is not None and len(self.layers) == 1 else None

    @property
    def acts(self) -> bool:
        """Whether it changes anything."""
        neutral = 1.0 if self.operator == "scale" else 0.0
        somewhere = self.weights is None or any(self.weights)
        return self.coeff != neutral and self.heads != () and somewhere

    @property
    def pooled(self) -> bool:
        """Whether queries of a prompt depend on each other."""
        return self.operator == "mass" and self.pool != "row"

    @property
    def given(self) -> float:
        """The coefficient."""
        return self.coeff

    unit = "absolute"
    coeff_in_norms = float("nan")
    coeff_absolute = float("nan")

    def on(self, *spans: Any) -> "AttentionIntervention":
        """The same for these spans: texts, characters [start, stop), or a pair, whose instruction it is.

        Raises:
            SteerlensError: for no span, an empty one, or one that is neither.
            DataError: for a pair whose instruction stands nowhere in its prompt.
        """
        parts = [getattr(span, "instruction_span", span) for span in spans]
        return replace(self, spans=_parts(parts), weights=None)

    def bounds(self, prompt_length: int) -> tuple[int, int]:
        """The query positions [low, high) that are steered in a row whose prompt has `prompt_length` tokens."""
        return as_window(self.positions).bounds(prompt_length)

    def record(self) -> dict[str, Any]:
        """What the intervention does as plain data; once it is bound, the weights stand for what they were made of."""
        what: dict[str, Any] = {
            "operator": self.operator,
            "coeff": self.coeff,
            "heads": self.heads,
            "positions": str(self.positions),
        }
        if self.operator == "mass":
            what["pool"] = self.pool
        if self.weights is not None:
            return {**what, "weights": tensor_digest(torch.tensor(self.weights))}
        where = {
            name: getattr(self, name) for name in ("spans", "keys", "sections", "exempt", "extra_tokens", "placebo")
        }
        if self.placebo is not None:
            where["placebo_of"] = "others"  # than the spans' tokens
        return {**what, **where}

    def __eq__(self, other: object) -> bool:
        return self.record() == other.record() if isinstance(other, AttentionIntervention) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.record().values()))

    def __str__(self) -> str:
        what = {
            "bias": f"{self.coeff:+.4g} nats",
            "scale": f"keys times {self.coeff:g}",
            "mass": f"share {self.coeff:g}",
        }
        keys = {"span": "the instruction", "rest": "the rest of the prompt", "prompt": "the prompt"}[self.keys]
        if self.placebo is not None:
            keys += ", with random other tokens for the instruction's"
        where = "every layer" if self.heads is None else f"layer {', '.join(map(str, self.layers or ()))}"
        some = any(heads is not None for heads in (self.by_layer or {}).values())
        some_heads = f", {sum(len(heads or ()) for heads in (self.by_layer or {}).values())} heads" if some else ""
        settings = {
            f"share per {self.pool}": self.pooled,
            "sections add up": self.sections == "reference",
            f"without {' and '.join(self.exempt)}": bool(self.exempt),
            f"{self.extra_tokens} tokens more": bool(self.extra_tokens),
        }
        rest = "".join(f", {said}" for said, holds in settings.items() if holds)
        what_where = f"{what[self.operator]} on {keys} at {where}{some_heads}, positions {self.positions}"
        return f"{self.name or 'attention'} {what_where}{rest}"


def _sorted_heads(heads: Any) -> tuple[tuple[int, tuple[int, ...] | None], ...] | None:
    """The one spelling of layers and heads."""
    if heads is None:
        return None
    if isinstance(heads, tuple) and all(isinstance(one, tuple) for one in heads):
        heads = dict(heads)
    if not isinstance(heads, Mapping):
        heads = dict.fromkeys(whole_numbers(heads, "layer"))
    found = {
        whole(layer, "layer"): None if some is None else tuple(sorted({*whole_numbers(some, "head")}))
        for layer, some in heads.items()
    }
    if any(layer < 0 or min(some or (0,)) < 0 for layer, some in found.items()):
        raise SteerlensError(f"layers and heads count from zero, got {found}")
    return tuple((layer, found[layer]) for layer in sorted(found) if found[layer] != ())


def _parts(spans: Any) -> tuple[Part, ...]:
    """The one spelling of spans."""
    parts = [spans] if isinstance(spans, str) else list(spans)
    found: list[Part] = []
    for part in parts:
        if isinstance(part, str):
            if not part.strip():
                raise SteerlensError(
                    f"a span needs a text that is not empty, got {part!r}; name what stands in the prompt"
                )
            found.append(part)
        elif isinstance(part, Sequence) and len(part) == 2:
            start, stop = whole_numbers(part, "a span's end")
            found.append((start, stop))
        else:
            raise SteerlensError(f"a span is a text, or its characters (start, stop), got {part!r}")
    if not found:
        raise SteerlensError(
            "attention is steered towards at least one span, got none; give a text that stands in the prompt"
        )
    return tuple(found)


def tensor_digest(tensor: Tensor) -> str:
    """16 hex digits of a tensor's float32 content."""
    return hashlib.sha256(tensor.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()[:16]


def tables_digest(name: str, tables: Iterable[Tensor]) -> str:
    """16 hex digits of an edit's name and of every number in its tables."""
    content = hashlib.sha256(name.encode())
    for table in tables:
        content.update(table.cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]
