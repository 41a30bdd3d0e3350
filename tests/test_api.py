"""The public names: lazy, complete, never shadowed, and enough for the README's ten lines."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import steerlens as sl
from steerlens._lazy import exported

PACKAGE = Path(sl.__file__).parent
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def test_import_is_quick_because_it_loads_nothing_heavy():
    code = "import sys, steerlens; print([n for n in ('torch', 'pandas', 'transformers', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def public(package: ModuleType) -> dict[str, object]:
    return {name: getattr(package, name) for name in package.__all__}


@pytest.mark.parametrize("package", [sl, *map(sl.__getattr__, ROOMS)], ids=lambda package: package.__name__)
def test_every_public_name_is_the_thing_itself_after_every_module_was_imported(package):
    folder = Path(package.__file__).parent
    homes = exported(package.__file__)
    assert list(public(package)) == sorted(homes)
    assert {path.stem for path in folder.iterdir()} & set(homes) <= ({*ROOMS} if package is sl else set())
    for path in folder.rglob("[a-z]*.py"):
        importlib.import_module(".".join(("steerlens", *path.relative_to(PACKAGE).with_suffix("").parts)))
    for name, value in public(package).items():
        assert value is getattr(sys.modules[homes[name]], name)
        assert inspect.ismodule(value) == (name in ROOMS)
    assert {name for name in dir(package) if not name.startswith("_")} == set(homes)


def test_rooms_are_reached_from_the_package_and_light_ones_load_no_torch():
    code = (
        "import sys, steerlens as sl\n"
        "print(sl.stats.mcnemar([False], [True]).gained, sl.data.pair_set(['a?'], 'No b.'), sl.figures.four_cells.__name__)\n"
        "print([name for name in ('torch', 'transformers', 'lm_eval') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["1 PairSet(1 pair, 1 query, 1 instruction) four_cells", "[]"]


def test_the_top_holds_what_a_notebook_needs_and_no_more():
    assert 30 <= len(set(sl.__all__) - set(ROOMS)) <= 48


def test_star_imports_and_type_checkers_get_the_public_names():
    assert set(exported(sl.__file__)) == set(sl.__all__)
    names: dict[str, object] = {}
    exec("from steerlens.stats import *", names)
    assert set(sl.stats.__all__) <= set(names)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        sl.nothing  # noqa: B018


def test_the_readers_lines_run_on_the_model_they_name():
    readme = (PACKAGE.parent / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    for lines, fewer in {  # the same calls on fewer prompts
        "pairs.split(seed=0)": "(part.sample(6) for part in pairs.split(seed=0))",
        "valid, layers": "valid, batch_size=64, layers",
        "vector.at(best), test)": "vector.at(best), test, batch_size=64)",
    }.items():
        assert lines in code
        code = code.replace(lines, fewer)
    names: dict[str, object] = {}
    exec(code, names)
    assert len(names["out"]) == len(names["test"]) == 6
    assert set(names["table"].scores["condition"]) == {"none", "vector", "text", "text+vector", "random"}
    assert names["best"].rate > 0.5


def test_every_public_function_and_class_has_an_example():
    found = {value for package in (sl, *map(sl.__getattr__, ROOMS)) for value in public(package).values()}
    errors = {value for value in found if inspect.isclass(value) and issubclass(value, Exception)}
    callables = {value for value in found - errors if callable(value)}
    assert not [value.__qualname__ for value in callables if ">>>" not in (value.__doc__ or "")]
