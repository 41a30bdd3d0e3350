"""What is asked of the explorer, control by control: values as a page sends them, read or refused with a sentence."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from steerlens._typing import OPERATORS, Operator, Unit, real, several, whole
from steerlens.errors import SteerlensError, nearest
from steerlens.models.prompts import check_text
from steerlens.steering.plan import Plan
from steerlens.steering.positions import as_window
from steerlens.vectors.vector import SteeringVector


@dataclass(frozen=True)
class Settings:
    """One state of the controls.

    >>> Settings("Describe rain.", ("lowercase",), layer=4).operator
    'set_projection'
    """

    prompt: str
    vectors: tuple[str, ...]
    """Names of the vectors; their steps act in this order."""
    layer: int
    coeff: float = 1.0
    operator: Operator = "set_projection"
    positions: str = "all"
    max_new_tokens: int = 48

    def plan(self, vectors: Mapping[str, SteeringVector], *, unit: Unit = "resid_norm") -> Plan:
        """The plan of all chosen vectors.

        Args:
            unit: Of the coefficient of `add`.

        Raises:
            SteerlensError: as `SteeringVector.at` does.
        """
        options: dict[str, Any] = {"unit": unit} if self.operator == "add" else {}
        plan = Plan()
        for name in self.vectors:
            plan += vectors[name].at(
                self.layer, coeff=self.coeff, operator=self.operator, positions=self.positions, **options
            )
        return plan

    def asked(self) -> dict[str, Any]:
        """The state as a page sends it."""
        return {**asdict(self), "vectors": list(self.vectors)}


def read_settings(
    asked: Mapping[str, Any], vectors: Mapping[str, SteeringVector], *, unit: Unit = "resid_norm"
) -> tuple[Settings | None, dict[str, str]]:
    """The settings that a page asks for; or none, and for each control that cannot be so one sentence.

    >>> import torch
    >>> vector = SteeringVector({3: torch.tensor([0.0, 2.0])})
    >>> asked = {"prompt": "Hi", "vectors": ["a"], "layer": 4, "coeff": "1e", "operator": "add", "positions": "all"}
    >>> settings, problems = read_settings(asked | {"max_new_tokens": 9}, {"a": vector})
    >>> settings, sorted(problems)
    (None, ['coeff', 'layer'])
    """
    readers: dict[str, Callable[[Any], Any]] = {
        "prompt": _prompt,
        "vectors": lambda names: _names(names, vectors),
        "layer": lambda layer: whole(_number(layer), "layer"),
        "coeff": lambda coeff: real(_number(coeff), "the coefficient"),
        "operator": _operator,
        "positions": _positions,
        "max_new_tokens": _length,
    }
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for control, reader in readers.items():
        try:
            values[control] = reader(asked.get(control))
        except SteerlensError as error:
            problems[control] = str(error)
    control = "layer"
    try:
        if {"vectors", "layer"} <= {*values}:
            for name in values["vectors"]:
                vectors[name].unit(values["layer"])
        control = "operator"  # what is left to refuse is what an operator needs to know of a vector
        if len(values) == len(readers) and not problems:
            settings = Settings(**values)
            settings.plan(vectors, unit=unit)
            return settings, {}
    except SteerlensError as error:
        problems[control] = str(error)
    return None, problems


def _prompt(value: Any) -> str:
    check_text(value, "the prompt")
    if not value.strip():
        raise SteerlensError("the prompt must not be empty; write a question or a task")
    return str(value)


def _names(value: Any, vectors: Mapping[str, SteeringVector]) -> tuple[str, ...]:
    names = [] if value is None else several(value)
    if not names:
        raise SteerlensError("at least one instruction must be chosen; a coefficient of 0 is no steering")
    for name in names:
        if not isinstance(name, str) or name not in vectors:
            raise SteerlensError(
                f"an instruction must be one of the vectors', got {name!r}; {nearest(str(name), vectors)}"
            )
    return tuple(dict.fromkeys(names))


def _number(value: Any) -> Any:
    """A text that is a number as that number; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _operator(value: Any) -> Any:
    if value not in OPERATORS:
        raise SteerlensError(f"the operator must be one of steerlens', got {value!r}; {nearest(str(value), OPERATORS)}")
    return value


def _positions(value: Any) -> str:
    return str(as_window(value if isinstance(value, str) else repr(value)))


def _length(value: Any) -> int:
    length = whole(_number(value), "the number of new tokens")
    if length < 1:
        raise SteerlensError(f"the number of new tokens must be at least 1, got {length}")
    return length
