"""The package as its users call it: without the type checks that these tests add, so that its own sentences are heard."""

import inspect
from collections.abc import Callable
from typing import Any


def unchecked(callable_: Any) -> Callable[..., Any]:
    """The function or class without added checks of its arguments' types."""
    if not inspect.isclass(callable_):
        return inspect.unwrap(callable_)

    def make(*args: Any, **kwargs: Any) -> Any:
        made = object.__new__(callable_)
        inspect.unwrap(callable_.__init__)(made, *args, **kwargs)
        return made

    return make
