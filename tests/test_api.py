"""The public names: lazy, complete, never shadowed, and enough for the README's ten lines."""

import subprocess
import sys
from pathlib import Path

import pytest

import steerlens as sl
from steerlens.data import InstructionPair, PairSet

PACKAGE = Path(sl.__file__).parent
NO_COMMA = "punctuation:no_comma"


def test_import_is_quick_because_it_loads_nothing_heavy():
    code = "import sys, steerlens; print([n for n in ('torch', 'pandas', 'transformers', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_has_the_name_of_a_public_function():
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert not modules & set(sl.__all__)


def test_every_public_name_is_there_after_every_module_was_imported():
    for path in PACKAGE.glob("[a-z]*.py"):
        __import__(f"steerlens.{path.stem}")
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


def test_the_readers_lines_run_as_they_stand(tiny_folders, tmp_path):
    words = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    PairSet(InstructionPair(f"Say {word}.", "Use no commas.", NO_COMMA) for word in words).save(
        tmp_path / "pairs.jsonl"
    )
    readme = (PACKAGE.parent / "README.md").read_text()
    block = readme.split("```python\n")[1].split("```")[0]
    code = (
        block.replace('"smollm2-135m"', repr(str(tiny_folders["llama"])))
        .replace('"format"', repr(str(tmp_path / "pairs.jsonl")))
        .replace('"change_case:english_lowercase"', repr(NO_COMMA))
        .replace("max_new_tokens=64", "max_new_tokens=8")
        .replace("valid, layers", "valid, max_new_tokens=4, layers")
        .replace("vector.at(best), test)", "vector.at(best), test, max_new_tokens=4)")
    )
    names: dict[str, object] = {}
    exec(code, names)
    assert len(names["out"]) == len(names["test"])
    assert set(names["table"].scores["condition"]) == {"none", "vector", "text", "text+vector", "random"}
