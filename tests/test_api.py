"""The public names: lazy, complete, never shadowed, and enough for the README's ten lines."""

import subprocess
import sys
from pathlib import Path

import pytest

import steerlens as sl

PACKAGE = Path(sl.__file__).parent


def test_import_is_quick_because_it_loads_nothing_heavy():
    code = "import sys, steerlens; print([n for n in ('torch', 'pandas', 'transformers', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_has_the_name_of_a_public_function():
    modules = {path.stem for path in PACKAGE.iterdir()}  # rooms, and the modules beside them
    assert not modules & set(sl.__all__)


def test_every_public_name_is_there_after_every_module_was_imported():
    for path in PACKAGE.rglob("[a-z]*.py"):
        __import__("steerlens." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    for name in sl.__all__:
        assert getattr(sl, name).__module__.startswith("steerlens.")
    assert set(sl.__all__) <= set(dir(sl))


def test_type_checkers_and_run_time_see_the_same_names():
    lines = (PACKAGE / "__init__.py").read_text().split("if TYPE_CHECKING:")[1].split("\n\n")[0].splitlines()
    declared = {name.strip() for line in lines if " import " in line for name in line.split(" import ")[1].split(",")}
    assert declared == set(sl.__all__)


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
