"""The rooms: a module imports only from its own room's earlier modules and from earlier rooms, and the first load no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import steerlens

PACKAGE = Path(steerlens.__file__).parent
ROOMS = {
    "": "_lazy errors _typing _results files",
    "stats": "words rates comparisons slopes pareto",
    "figures": "theme words marks multiples cells layers studies matrices measures geometry tokens lens effects patching "
    "attention gates methods page summary samples sections report",
    "checks": "arguments catalogue text ifeval registry",
    "data": "cells conditions readers pairs splits load families starter",
    "models": "facts load prompts stops rows lean parting backends prefixes static choice passes probe attention",
    "steering": "operators positions interventions gates plan residual scores edits attention directer candidates settings "
    "generations batches prefill cached gated sampling",
    "vectors": "formats vector activations estimators transfer",
    "reading": "readout words vocabulary lens effects examples embedding similarity probes diagnosis lines "
    "patches metrics patching attribution attention gating",
    "study": "config quality responses scores judge calibration sweeps arms methods layers profiling written engines seeing "
    "pages job opened",
    "explorer": "settings verdicts runs widget notebook",
}
ORDER = [f"{room}.{name}".lstrip(".") for room, names in ROOMS.items() for name in names.split()] + ["cli", "__main__"]
LOADS_NO_TORCH = [name for name in ORDER if name.startswith(("stats", "figures", "checks", "data")) or "." not in name]
LOADS_NO_TORCH += ["steering.candidates", "steering.settings", "study.config", "study.judge"]


def imports_of(module: str) -> set[str]:
    """The steerlens modules that a module imports, at the top, in a function or for type checking."""
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    paths = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    paths |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return {path.removeprefix("steerlens.") for path in paths if path.split(".")[0] == "steerlens"}


def test_the_order_names_every_module() -> None:
    found = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    assert sorted(name for name in found if not name.endswith("__init__")) == sorted(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_earlier_ones(module: str) -> None:
    assert imports_of(module) <= set(ORDER[: ORDER.index(module)])


def test_the_package_and_its_first_rooms_load_no_torch() -> None:
    check = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers', 'transformer_lens', 'lm_eval'} & set(sys.modules)\n"
        "    assert not heavy, (name, heavy)\n"
    )
    names = ["steerlens", *(f"steerlens.{module}" for module in LOADS_NO_TORCH)]
    result = subprocess.run([sys.executable, "-c", check, *names], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-1500:]
