"""Names of a package that are imported when they are first used (PEP 562), so that importing the package loads nothing.

A package says once what it exports, in its `if TYPE_CHECKING:` block, which is what type checkers read:

    if TYPE_CHECKING:
        from steerlens.stats.rates import rate_table as rate_table

    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)

No exported name may be that of a module beside it: importing the module would put it in the name's place.
"""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_exports(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, from the imports in its `if TYPE_CHECKING:` block."""
    homes = exported(file)

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = homes[name]
        if module == package:  # a room
            return importlib.import_module(f"{package}.{name}")
        value = getattr(importlib.import_module(module), name)
        setattr(sys.modules[package], name, value)  # found at once next time
        return value

    def listed() -> list[str]:
        return sorted({*(name for name in vars(sys.modules[package]) if name.startswith("__")), *homes})

    return get, listed, sorted(homes)


def exported(file: str) -> dict[str, str]:
    """Name -> the module it is imported from, for the `if TYPE_CHECKING:` block of a file."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [line for block in blocks for line in block.body if isinstance(line, ast.ImportFrom)]
    return {alias.name: str(line.module) for line in imports for alias in line.names}
