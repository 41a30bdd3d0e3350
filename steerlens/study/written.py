"""Methods as they are written: how attention is steered, in one line of a command, a table or a file.

    spotlight                             a method with its defaults: pasta, instaboost, spotlight or directer
    pasta:alpha=0.01,heads=2-5            with values for its parameters, by name
    spotlight:target=0.3,gate=0.5         behind a gate: `plausible(plan, beta=0.5)`, whose other parameters may follow, too

Parameters, what they take and their defaults are those of the functions' own signatures; `on` is not written, because pairs or
`Plan.on` say where the instruction stands. Heads are layers, of which every head counts: "3", "2,5" or "2-5", both ends included;
or the best heads of a `HeadProfile`, by its file.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any, Literal, get_args, get_origin

from steerlens._typing import RealNumber
from steerlens.errors import SteerlensError, nearest
from steerlens.files import user_path
from steerlens.steering.attention import instaboost, pasta, spotlight
from steerlens.steering.directer import directer, plausible
from steerlens.steering.interventions import Heads
from steerlens.steering.plan import Plan
from steerlens.study.profiling import HeadProfile

METHODS: dict[str, Callable[..., Plan]] = {one.__name__: one for one in (pasta, instaboost, spotlight, directer)}
"""By name; the first parameter of each is its strength."""


def method(written: str) -> Plan:
    """The plan that a written method stands for.

    Args:
        written: A name, or a name with parameters, such as "pasta:alpha=0.01,heads=2-5,gate=0.5".

    Raises:
        SteerlensError: for an unknown name or parameter, or a value that the method does not take.

    Example:
        >>> method("pasta:alpha=0.01,heads=2-3") == sl.pasta(0.01, heads=[2, 3])
        True
        >>> method("spotlight:target=0.3,gate=0.5") == sl.plausible(sl.spotlight(0.3), beta=0.5)
        True
    """
    name, values = _read(written)
    return _made(name, values)


def by_strength(written: str) -> Callable[[RealNumber], Plan]:
    """The same as a function of the method's first parameter, which is not written: what `sweep` searches.

    Raises:
        SteerlensError: as for `method`, and if the first parameter is written.

    Example:
        >>> by_strength("pasta:heads=2-3")(0.1) == sl.pasta(0.1, heads=[2, 3])
        True
    """
    name, values = _read(written)
    strength = next(iter(_parameters(name)))
    if strength in values:
        raise SteerlensError(
            f"a search tries values of {strength}, {name}'s first parameter, which must not be written, got {written!r}; "
            "give them as coeffs"
        )
    return lambda coeff: _made(name, {strength: coeff, **values})


def around_of(beta: RealNumber | None, attention: Plan | None = None) -> Callable[[Plan], Plan]:
    """What puts plans behind a gate of this beta; no steering stays so, and with None every plan stays as it is.

    Args:
        attention: What the plans will hold besides vectors.

    Raises:
        SteerlensError: for a beta below 0, or attention with a gate of its own.

    Example:
        >>> around_of(0.5)(sl.pasta(0.1)) == sl.plausible(sl.pasta(0.1), beta=0.5)
        True
    """
    if beta is None:
        return lambda plan: plan
    if attention is not None and attention.gate is not None:
        raise SteerlensError(
            f"a plan has one gate, got plausible {beta:g} around attention that has its own; leave one of them out"
        )
    plausible(attention or pasta(), beta=beta)  # refuses what is no beta
    return lambda plan: plausible(plan, beta=beta) if plan else plan


def written_methods() -> dict[str, str]:
    """Each method with the parameters that have a value by default, and what it is in a sentence, the other parameters named.

    >>> list(written_methods())[1]
    'instaboost:bias=1.609,positions=all'
    """
    found = {}
    for name, function in METHODS.items():
        defaults = {one: of.default for one, of in _own_parameters(name).items()}
        others = [one for one, value in defaults.items() if value in (None, ())]
        shown = ",".join(f"{one}={_shown(value)}" for one, value in defaults.items() if one not in others)
        sentence = (function.__doc__ or "").partition("\n")[0]
        found[f"{name}:{shown}"] = f"{sentence} Also: {', '.join(others)}."
    return found


def _read(written: str) -> tuple[str, dict[str, Any]]:
    """A method's name, and the values of its parameters and of its gate's."""
    name, _, rest = (piece.strip() for piece in written.partition(":"))
    if name not in METHODS:
        raise SteerlensError(f"a method must be one of steerlens', got {written!r}; {nearest(name, METHODS)}")
    known = _parameters(name)
    values: dict[str, Any] = {}
    # A comma ends a value where a parameter follows.
    for part in re.split(r",(?=[^,]*=)", rest) if rest else ():
        parameter, equals, text = (piece.strip() for piece in part.partition("="))
        if not (equals and text):
            example = f"{name}:{parameter}=..." if equals else f"{name}:{next(iter(known))}={parameter or 0.5}"
            raise SteerlensError(
                f"a method's values are written by name, NAME:PARAMETER=VALUE,..., got {written!r}; write {example}"
            )
        if parameter not in known:
            raise SteerlensError(f"{name} has no parameter {parameter!r}; {nearest(parameter, known)}")
        if parameter in values:
            raise SteerlensError(f"a parameter is written once, got {parameter!r} twice in {written!r}")
        values[parameter] = _value(f"{parameter} of {name}", known[parameter], text)
    return name, values


def _made(name: str, values: Mapping[str, Any]) -> Plan:
    own = _own_parameters(name)
    plan = METHODS[name](**{one: value for one, value in values.items() if one in own})
    gate = {"beta" if one == "gate" else one: value for one, value in values.items() if one not in own}
    return plausible(plan, **gate) if gate else plan


def _parameters(name: str) -> dict[str, Parameter]:
    """What may be written of a method, its first parameter first; and of a gate, where it has none of its own."""
    own = _own_parameters(name)
    (_, *of_gate) = signature(plausible).parameters.items()
    gate = {"gate" if one == "beta" else one: parameter for one, parameter in of_gate}
    return own if "beta" in own else {**own, **gate}


def _own_parameters(name: str) -> dict[str, Parameter]:
    return {one: parameter for one, parameter in signature(METHODS[name]).parameters.items() if one != "on"}


def _value(what: str, parameter: Parameter, text: str) -> Any:
    """A value as its parameter's annotation wants it."""
    kinds = [parameter.annotation, *get_args(parameter.annotation)]
    if parameter.annotation == Heads:
        return _heads(what, text)
    for kind in kinds:
        if get_origin(kind) is Literal:
            several = any(get_origin(one) is Sequence for one in kinds)
            chosen = [_choice(what, one.strip(), get_args(kind)) for one in (text.split(",") if several else [text])]
            return chosen if several else chosen[0]
    return _number(what, text) if RealNumber in kinds else text


def _heads(what: str, text: str) -> Heads:
    """Layers from "3", "2,5" and "2-5", or the best heads of a profile's file."""
    if re.search(r"[^\d\s,-]", text) and user_path(text).exists():
        return HeadProfile.load(text).heads()
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(end) for end in (ends[1], ends[2] or ends[1])) if ends else (1, 0)
        if first > last:
            raise SteerlensError(
                f"{what} must be layers, such as 2-5 or 2,3, or the file of a profile, got {text!r}; layers count from zero"
            )
        found += range(first, last + 1)
    return found


def _choice(what: str, text: str, known: Sequence[str]) -> str:
    if text not in known:
        raise SteerlensError(f"{what} must be one of its choices, got {text!r}; {nearest(text, known)}")
    return text


def _number(what: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise SteerlensError(f"{what} must be a number, got {text!r}; give one such as 0.5") from error


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)
