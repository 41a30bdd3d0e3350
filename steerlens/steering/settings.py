"""How tokens are chosen and when a row stops: the settings that everything that samples has in common."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from steerlens._typing import RealNumber, WholeNumber, plain, real, several, whole, whole_numbers
from steerlens.errors import SteerlensError


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen and when a row stops.

    Example:
        >>> SamplingConfig(stop="\\n").stop == ("\\n",)
        True
    """

    max_new_tokens: int = 128
    """At most this many new tokens for each prompt."""
    temperature: float = 0.0
    """0 is greedy: the most likely token, the first of equals."""
    top_k: int | None = None
    """Sample among the k most likely tokens."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach p (Holtzman et al. 2020); at least one."""
    stop: str | tuple[str, ...] = ()
    """Texts that end a row, special tokens among them; a row's text ends before them, its tokens hold them."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end a row, besides those that the model names itself."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(whole_numbers(self.stop_ids, "stop_ids")))
        for name, number in (("max_new_tokens", whole), ("top_k", whole), ("temperature", real), ("top_p", real)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, number(getattr(self, name), name))
        rules = [
            ("max_new_tokens", "must be at least 1", self.max_new_tokens >= 1),
            ("temperature", "must be 0 (greedy) or above", self.temperature >= 0),
            ("top_k", "must be at least 1, or None", self.top_k is None or self.top_k >= 1),
            ("top_p", "must be in (0, 1]", 0 < self.top_p <= 1),
            ("stop", "must be texts that are not empty", all(isinstance(one, str) and one for one in self.stop)),
            (
                "stop_ids",
                "must be whole numbers from 0 on",
                all(type(one) is int and one >= 0 for one in self.stop_ids),
            ),
        ]
        for name, rule, holds in rules:
            if not holds:
                raise SteerlensError(f"{name} {rule}, got {getattr(self, name)!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class SamplingSettings(TypedDict, total=False):
    """The fields of `SamplingConfig` as keywords of a call; each takes the place of the field of a `sampling` given with it."""

    max_new_tokens: WholeNumber
    temperature: RealNumber
    top_k: WholeNumber | None
    top_p: RealNumber
    stop: str | Sequence[str]
    stop_ids: Sequence[int]


def sampling_with(sampling: SamplingConfig, settings: SamplingSettings) -> SamplingConfig:
    """The configuration with the fields that a call names.

    Raises:
        TypeError: for a name that is no field.
        SteerlensError: for a setting out of range.

    >>> sampling_with(SamplingConfig(top_p=0.9), {"temperature": 1.0}).top_p
    0.9
    """
    lists = ("stop", "stop_ids")
    found: dict[str, Any] = {
        name: tuple(several(value)) if name in lists else plain(value) for name, value in settings.items()
    }
    return replace(sampling, **found)
