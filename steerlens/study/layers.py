"""Studies of layers: where a vector steers, where its direction is necessary, and whether it carries over to other layers.

Each study answers the same prompts under every cell of its plan, all as rows of shared batches, and counts responses that follow:

    steer_by_layer             the vector at each layer alone, at each layer and all above it, at all layers but one
    necessity                  the instruction stands in the prompt, and its direction is ablated at one layer, at a window of
                               neighbouring layers, everywhere
    transfer_between_layers    the direction of layer i, added at layer j

Beside each cell stand the same prompts without steering (`none`), with the instruction in the prompt (`text`), and steered by a
random direction in the vector's place (`random`): the amount that the plan would add along its direction goes along another one.

Ablation sets the projection on the unit direction u of a layer, at every token of prompt and response:

    h  <-  h + (z - h.u) u        z = the mean projection without the instruction ("mean"), or 0 ("zero")

"mean" is the default: residuals share a large mean, whose projection on u has no reason to be zero. So z = 0 may take away more
than the instruction wrote, and break the model for that alone; or less, where zero lies between the means with and without it.
The mean was taken at the last token of prompts, and other tokens are set to it, too; `positions` says which are.
"zero" is what Arditi et al. (2024) do to the refusal direction, one layer's at all layers (`direction_of`).

What these do not show. A direction that steers need not be what the instruction itself uses, and one whose ablation loses nothing
may still be used: later layers can write it anew, and other directions can stand in for it (McGrath et al. 2023, "The Hydra
effect"). One whose ablation loses the following may have been lost with everything else, since a model with a projection fixed at
every token is off the distribution it was trained on; so the share of degenerate texts stands beside each rate, and what the same
ablation of a random direction loses.

The prompts of a control share out eight random directions, drawn for its cell: its rate is that of random directions, not of one
that happened to be drawn.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

from steerlens._typing import Operator, RealNumber, Unit, WholeNumber, real, several, whole
from steerlens.data.pairs import PairSet
from steerlens.errors import SteerlensError, nearest
from steerlens.models.facts import check_layer
from steerlens.steering.plan import Plan
from steerlens.steering.positions import Window
from steerlens.study.arms import Arm, Control, LayerStudy, placebo, randomly_ablated, run_study
from steerlens.study.quality import Quality
from steerlens.study.responses import SamplerSettings
from steerlens.vectors.vector import SteeringVector

Mode = Literal["alone", "from", "without"]
"""At a layer alone, at it and all above it, at all layers but it."""
MODES: tuple[Mode, ...] = get_args(Mode)

ABLATED: dict[str, Control | None] = {
    "text+vector": None,
    "random": placebo,
    "random ablated": randomly_ablated,
}
"""The conditions of a necessity study, with what they make of the plan that ablates the direction."""


def steer_by_layer(
    model: Any,
    vectors: SteeringVector | Mapping[str, SteeringVector],
    pairs: PairSet,
    *,
    modes: Mode | Sequence[Mode] = MODES,
    layers: Iterable[WholeNumber] | None = None,
    coeff: RealNumber | None = None,
    operator: Operator = "set_projection",
    positions: str | Window = "all",
    unit: Unit = "absolute",
    trials: WholeNumber = 1,
    seed: WholeNumber = 0,
    quality: Quality = Quality(perplexity=False),
    out: str | Path | None = None,
    **settings: Unpack[SamplerSettings],
) -> LayerStudy:
    """How often the vector is followed when it is applied at each layer alone, from each layer on, and at all layers but one.

    "All" layers are those of the vector where its direction is not zero. `set_projection` reaches one goal at each of them; the
    steps of `add` add up from layer to layer, so that "from" and "without" steer more strongly than "alone" at the same coeff.

    Args:
        model: A model; or a `Sampler` of one, whose settings and journal then hold.
        vectors: One vector for all pairs, or one per instruction id.
        pairs: Prompts that the vectors were not fitted on.
        modes: "alone", "from", "without", or several.
        layers: Which layers to look at; default: all of the vector's. What "from" and "without" steer besides does not change.
        coeff, operator, positions, unit: As in `SteeringVector.at`.
        trials: Responses per prompt and cell; more than one needs a temperature.
        seed: Decides the random directions and, above temperature 0, the samples.
        quality: What is measured on the responses besides words.
        out: A folder that keeps every response as it is made (generations.jsonl), so that the same study goes on where it was cut
            short; its tables are written at the end, and `LayerStudy.load` reads them.
        settings: As in `sweep`; `progress=True` shows a bar.

    Returns:
        Conditions none, text, and for each mode and layer vector and random.

    Raises:
        DataError: if there are no pairs, or an instruction has no vector or no check.
        SteerlensError: for an unknown mode, a layer out of range or not in a vector, or what the operator lacks.

    Example:
        >>> found = steer_by_layer(model, vector, valid[:2], modes=["from"], layers=[6, 7], max_new_tokens=4)
        >>> found.comparisons[["baseline", "condition", "layer"]].values.tolist()[-2:]
        [['random', 'vector', 6], ['random', 'vector', 7]]
    """
    chosen = _choices(modes, MODES, "mode")
    options: Any = {"coeff": coeff, "operator": operator, "positions": positions, "unit": unit}

    def arms(model: Any, vector: SteeringVector) -> Iterator[Arm]:
        places, usable = layers_of(model, vector, layers)
        for mode in chosen:
            for layer in places:
                plan = vector.at(steered_layers(mode, layer, usable), **options)
                yield Arm("vector", plan, layer, {"mode": mode})
                yield Arm("random", plan, layer, {"mode": mode}, control=placebo)

    asked = {"modes": chosen, **{name: str(value) for name, value in options.items()}}
    return run_study("steering", model, vectors, pairs, arms, trials, seed, quality, out, settings, asked)


def necessity(
    model: Any,
    vectors: SteeringVector | Mapping[str, SteeringVector],
    pairs: PairSet,
    *,
    windows: int | str | Sequence[int | str] = (1, 3, "all"),
    layers: Iterable[WholeNumber] | None = None,
    to: Literal["mean", "zero"] = "mean",
    direction_of: WholeNumber | None = None,
    positions: str | Window = "all",
    trials: WholeNumber = 1,
    seed: WholeNumber = 0,
    quality: Quality = Quality(perplexity=False),
    out: str | Path | None = None,
    **settings: Unpack[SamplerSettings],
) -> LayerStudy:
    """How much of the following is lost when the direction is ablated while the instruction stands in the prompt.

    Two controls stand beside each ablation. `random` pushes the residual by the same amount at every token, but along a random
    direction: exactly so at one layer, about so in a window. `random ablated` is the same operation on a random direction (to
    zero, the mean of random directions' projections); it takes away less, since a residual has less of it. The loss is the
    direction's own where both controls lose less, and where their texts are no less degenerate than those of the ablated model.

    What ablation does not show is in the module's docstring: backup hides a loss, and a model off its distribution feigns one.

    Args:
        windows: How many neighbouring layers are ablated together, named by the middle one (the lower of two), all of them
            layers of the vector; "all": every layer of the vector at once.
        layers: Around which layers; default: all of the vector's. Windows that reach beyond the vector's layers are left out.
        to: "mean" sets the projection to its mean without the instruction, "zero" to zero; see the module's docstring.
        direction_of: The layer whose direction is ablated at every layer of a window, to zero; default: each layer's own. A
            layer's own direction holds all that the instruction wrote up to there, one layer's only what it wrote along that one.
        model, vectors, pairs, positions, trials, seed, quality, out, settings: As in `steer_by_layer`.

    Returns:
        Conditions none, text, and for each window and layer text+vector (the direction ablated), random, random ablated; layer
        is missing where all are ablated. `loss`, `loss_low` and `loss_high` are differences of rates in [-1, 1].

    Raises:
        DataError, SteerlensError: as for `steer_by_layer`; for a window that is none or fits nowhere, and where the mean
            projection without the instruction is not known.

    Example:
        >>> found = necessity(model, vector, valid[:2], windows=[1, "all"], layers=[4], max_new_tokens=4)
        >>> found.table["condition"].tolist()[2:5]
        ['text+vector', 'random', 'random ablated']
    """
    sizes = _windows(windows)
    if to not in ("mean", "zero") or (direction_of is not None and to == "mean"):
        raise SteerlensError(
            'to must be "mean" or "zero", and "zero" with direction_of, since one layer\'s direction has no known mean at '
            f'another; got {to!r} with direction_of {direction_of}; pass to="zero"'
        )

    def arms(model: Any, vector: SteeringVector) -> Iterator[Arm]:
        places, usable = layers_of(model, vector, layers)
        for size in sizes:
            for layer, window in windows_of(size, places, usable):
                plan = ablation(vector, window, to=to, direction_of=direction_of, positions=positions)
                for condition, control in ABLATED.items():
                    yield Arm(condition, plan, layer, {"window": str(size)}, with_text=True, control=control)

    asked = {"windows": sizes, "to": to, "direction_of": direction_of, "positions": str(positions)}
    return run_study("necessity", model, vectors, pairs, arms, trials, seed, quality, out, settings, asked)


def transfer_between_layers(
    model: Any,
    vector: SteeringVector | Mapping[str, SteeringVector],
    pairs: PairSet,
    *,
    layers: Iterable[WholeNumber] | None = None,
    coeff: RealNumber = 1.0,
    positions: str | Window = "all",
    trials: WholeNumber = 1,
    seed: WholeNumber = 0,
    quality: Quality = Quality(perplexity=False),
    out: str | Path | None = None,
    **settings: Unpack[SamplerSettings],
) -> LayerStudy:
    """How often the direction of layer i is followed when it is added at layer j, for all i and j.

        h_j  <-  h_j + coeff * |v_j| * u_i        v_j = u_j |v_j| the mean difference of layer j

    The strength is layer j's: whatever is added there, the random direction too, has the length of what the instruction itself
    changes there. So within a column nothing but the direction differs, and the diagonal adds each layer's own mean difference.
    One share of the residual norm for all layers would not do: what share an instruction moves varies with the layer, so that it
    would be too weak at some and break others. Nor would `set_projection`: a vector does not know the projections of layer j's
    residuals on another layer's direction.

    A direction may carry over only because layers' directions are alike (compare `vector.unit(i) @ vector.unit(j)`); and the
    stream may hold the same content along other directions at another layer, which this does not see.

    Args:
        vector: One vector for all pairs, or one per instruction id.
        layers: From and to which layers; default: all of the vector's, which makes as many cells as their square.
        coeff: In units of layer j's mean difference; negative ones subtract.
        model, pairs, positions, trials, seed, quality, out, settings: As in `steer_by_layer`.

    Returns:
        Conditions none, text, vector for each from_layer (i) and layer (j), and random for each layer, its from_layer missing.

    Raises:
        DataError, SteerlensError: as for `steer_by_layer`.

    Example:
        >>> found = transfer_between_layers(model, vector, valid[:2], layers=[3, 4], max_new_tokens=4)
        >>> len(found.table)
        8
    """
    size = real(coeff, "coeff")

    def arms(model: Any, vector: SteeringVector) -> Iterator[Arm]:
        places, _ = layers_of(model, vector, layers)
        for layer in places:
            options: Any = {"operator": "add", "coeff": size * float(vector[layer].norm()), "positions": positions}
            for source in places:
                steps = vector.at(source, **options).residual
                norm = vector.resid_norm.get(layer, float("nan"))
                plan = Plan(tuple(replace(step, layer=layer, resid_norm=norm) for step in steps))
                yield Arm("vector", plan, layer, {"from_layer": source})
            # One control for all: the amount, which is all that it takes from a plan, is the same.
            yield Arm("random", vector.at(layer, **options), layer, control=placebo)

    asked = {"coeff": size, "positions": str(positions)}
    return run_study("transfer", model, vector, pairs, arms, trials, seed, quality, out, settings, asked)


# What is done where.


def layers_of(model: Any, vector: SteeringVector, layers: Iterable[WholeNumber] | None) -> tuple[list[int], list[int]]:
    """The layers to look at, and all at which the vector can be applied: those where its direction is not zero."""
    usable = [layer for layer in vector if vector[layer].norm() > 0]
    if not usable:
        raise SteerlensError(f"a study needs a layer whose direction is not zero, got none in {vector!r}")
    if layers is None:
        return usable, usable
    places = sorted({check_layer(model, layer) for layer in several(layers)})
    if not places:
        raise SteerlensError(f"a study needs a layer to look at, got none; this vector has {usable}")
    for layer in places:
        vector.unit(layer)  # which says so where there is none
    return places, usable


def steered_layers(mode: Mode, layer: int, usable: Sequence[int]) -> list[int]:
    """Which layers a mode steers.

    >>> [steered_layers(mode, 2, [1, 2, 3]) for mode in MODES]
    [[2], [2, 3], [1, 3]]
    """
    keeps = {"alone": layer.__eq__, "from": layer.__le__, "without": layer.__ne__}[mode]
    found = [one for one in usable if keeps(one)]
    if not found:
        raise SteerlensError(
            f'mode "without" steers at all layers but one, and this vector has only layer {layer}; fit it at more layers'
        )
    return found


def windows_of(
    size: int | Literal["all"], places: Sequence[int], usable: Sequence[int]
) -> list[tuple[int | None, list[int]]]:
    """The layers of each window, with the one it is named by; None for all.

    >>> windows_of(3, [1, 2, 3], [1, 2, 3, 4])
    [(2, [1, 2, 3]), (3, [2, 3, 4])]
    """
    if size == "all":
        return [(None, list(usable))]
    spans = {layer: range(layer - (size - 1) // 2, layer + size // 2 + 1) for layer in places}
    found: list[tuple[int | None, list[int]]] = [
        (layer, list(span)) for layer, span in spans.items() if set(span) <= set(usable)
    ]
    if not found:
        raise SteerlensError(
            f"a window of {size} layers must lie within those of the vector, {list(usable)}, around one of {list(places)}; "
            'choose a smaller one, or "all"'
        )
    return found


def ablation(
    vector: SteeringVector,
    layers: Sequence[int],
    *,
    to: Literal["mean", "zero"] = "mean",
    direction_of: WholeNumber | None = None,
    positions: str | Window = "all",
) -> Plan:
    """The plan that ablates a vector's direction at some layers; see `necessity`.

    >>> ablation(vector, [4], to="zero") == vector.at(4, operator="ablate")
    True
    """
    if to == "zero":
        sources = layers if direction_of is None else [direction_of] * len(layers)
        steps = [
            step for source in sources for step in vector.at(source, operator="ablate", positions=positions).residual
        ]
        return Plan(tuple(replace(step, layer=layer) for step, layer in zip(steps, layers, strict=True)))
    unknown = [layer for layer in layers if layer not in vector.proj_without]
    if unknown:
        raise SteerlensError(
            f'to="mean" needs the mean projection without the instruction at layer {unknown[0]}, and this vector has none; '
            'pass to="zero", or fit the vector on pairs'
        )
    plans = [vector.at(layer, target=vector.proj_without[layer], positions=positions) for layer in layers]
    return Plan(tuple(step for plan in plans for step in plan))


def _choices(values: Any, known: Sequence[str], name: str) -> list[Any]:
    """One choice or several, each of them known, and each once."""
    found = list(dict.fromkeys(several(values)))
    unknown = [value for value in found if value not in known]
    if unknown or not found:
        got = repr(unknown[0]) if unknown else "none"
        raise SteerlensError(f"a {name} must be one of the study's, got {got}; {nearest(str(got), known)}")
    return found


def _windows(values: Any) -> list[Any]:
    """Sizes of windows: numbers from 1 on, or "all"."""
    found = list(dict.fromkeys(one if one == "all" else whole(one, "a window") for one in several(values)))
    if not found or any(one != "all" and one < 1 for one in found):
        raise SteerlensError(f'windows must be numbers of layers from 1 on, or "all", got {found}')
    return found
