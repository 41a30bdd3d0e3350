"""The package's import layers: a module imports only from layers with smaller numbers, and the first ones load no torch."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import steerlens

PACKAGE = Path(steerlens.__file__).parent
LAYERS = {
    0: ("_typing", "errors"),
    1: ("instructions", "metrics", "operators", "positions", "records"),
    1.2: ("readers",),
    1.5: ("candidates", "comparisons", "data", "judge", "plan", "plot", "steerability"),
    1.6: ("families",),
    2: ("prompts", "model"),
    2.5: ("vectors",),
    3: ("capture",),
    4: ("estimators", "steering"),
    4.5: ("transfer",),
    5: ("sampling",),
    5.5: ("quality",),
    5.8: ("calibration",),
    6: ("evaluation",),
    6.5: ("engines",),
    7: ("sweeps",),
    8: ("report",),
    8.5: ("job",),
    9: ("cli",),
}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}
TORCH_FREE = (
    *(
        "_typing",
        "candidates",
        "cli",
        "comparisons",
        "data",
        "errors",
        "families",
        "instructions",
        "judge",
        "metrics",
        "plot",
        "readers",
    ),
    *("records", "report", "steerability"),
)
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imported_modules(source: str) -> set[str]:
    """The steerlens modules that a source names in any import, at the top, in a function or for type checking."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("steerlens.")}
            found |= {"__init__" for alias in node.names if alias.name == "steerlens"}
        elif isinstance(node, ast.ImportFrom):
            path = (node.module or "").split(".") if not node.level else ["steerlens", *(node.module or "").split(".")]
            if path[0] == "steerlens" and len(path) > 1 and path[1]:
                found.add(path[1])
            elif path[0] == "steerlens":
                found |= {alias.name if alias.name in MODULES else "__init__" for alias in node.names}
    return found


def test_every_module_has_its_layer() -> None:
    assert sorted(LAYER_OF) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_smaller_layers(module: str) -> None:
    imported = imported_modules((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    upward = {other: LAYER_OF.get(other) for other in imported if LAYER_OF.get(other, 99) >= LAYER_OF[module]}
    assert not upward, f"{module} is in layer {LAYER_OF[module]}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import steerlens.model", {"model"}),
        ("from steerlens.model import load_model", {"model"}),
        ("from steerlens import model", {"model"}),
        ("from steerlens import load_model", {"__init__"}),
        ("from .model import load_model", {"model"}),
        ("from . import plan", {"plan"}),
        ("def f():\n    import steerlens.plan as p", {"plan"}),
        ("import torch\nfrom steerlens_other import x", set()),
    ],
)
def test_every_way_to_import_is_seen(source: str, expected: set[str]) -> None:
    assert imported_modules(source) == expected


def test_the_package_and_its_first_layers_load_no_torch() -> None:
    check = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers', 'transformer_lens', 'lm_eval'} & set(sys.modules)\n"
        "    assert not heavy, (name, heavy)\n"
    )
    names = ["steerlens", *(f"steerlens.{module}" for module in TORCH_FREE)]
    result = subprocess.run([sys.executable, "-c", check, *names], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-1500:]


@pytest.mark.parametrize("name", steerlens.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(steerlens, name).__name__ == name
    assert name in dir(steerlens)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'steerlens' has no attribute 'steering_wheel'"):
        _ = steerlens.steering_wheel


def test_no_module_takes_the_place_of_a_public_name() -> None:
    """Importing a submodule sets it as an attribute of the package, over a function of the same name."""
    assert not set(steerlens.__all__) & set(MODULES)
    for module in MODULES:
        importlib.import_module(f"steerlens.{module}")
    assert callable(steerlens.steer)
    assert callable(steerlens.generate)
