"""What the pages are made with: docstrings, formulas and outputs as Markdown and HTML."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

DOCS = Path(__file__).parents[2] / "docs"


def loaded(name: str) -> ModuleType:
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


docstrings, formulas, pages = loaded("docstrings"), loaded("formulas"), loaded("pages")


def test_sections_of_a_docstring_become_lists_and_examples_code() -> None:
    text = "The sum.\n\n    a + b\n\nArgs:\n    a, b: Two\n        numbers.\n\nReturns:\n    Theirs.\n"
    text += "\nExample:\n    >>> 1 + 1\n    2\n"
    assert docstrings.as_markdown(text).split("\n\n") == [
        "The sum.",
        "    a + b",
        "**Arguments**",
        "- `a`, `b`: Two numbers.",
        "**Returns**",
        "Theirs.",
        "**Example**",
        "```pycon\n>>> 1 + 1\n2\n```",
    ]


def test_a_docstring_without_sections_is_what_it_was() -> None:
    assert docstrings.as_markdown("Of the rows.\n\n>>> 1\n1") == "Of the rows.\n\n```pycon\n>>> 1\n1\n```"


@pytest.mark.parametrize(
    ("formula", "inside"),
    [
        (r"h \cdot u", "<mi>h</mi><mo>⋅</mo><mi>u</mi>"),
        (r"v_\ell", "<msub><mi>v</mi><mi>ℓ</mi></msub>"),  # noqa: RUF001
        (r"\frac1n", "<mfrac><mn>1</mn><mi>n</mi></mfrac>"),
        (r"\hat Y", '<mover accent="true"><mi>Y</mi><mo>^</mo></mover>'),
        (r"e^{a+b}", "<msup><mi>e</mi><mrow><mi>a</mi><mo>+</mo><mi>b</mi></mrow></msup>"),
        (r"\sum_i", "<munder><mo>∑</mo><mi>i</mi></munder>"),
        (r"\text{a b}_i", "<msub><mtext>a b</mtext><mi>i</mi></msub>"),
    ],
)
def test_a_formula_is_drawn(formula: str, inside: str) -> None:
    assert formulas.mathml(formula) == f"<math><mrow>{inside}</mrow></math>"


@pytest.mark.parametrize("formula", [r"\unheard", r"{a", r"\frac1", r"a_"])
def test_a_formula_is_drawn_whole_or_refused(formula: str) -> None:
    with pytest.raises(ValueError, match="formula"):
        formulas.mathml(formula)


def test_formulas_are_found_outside_code_and_prices_are_none() -> None:
    shown = formulas.with_formulas("$a$ and `$b$`, 5$ or $6.\n\n```\n$c$\n```\n\n$$d$$")
    assert shown.count("<math") == 2
    assert "`$b$`, 5$ or $6." in shown
    assert "$c$" in shown


def test_a_notebook_is_shown_with_its_outputs_and_without_its_progress_bars() -> None:
    v4 = nbformat.v4
    bar = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "Loading: 0%|   |"}
    outputs = [
        v4.new_output("stream", text="a < b"),
        v4.new_output("display_data", data=bar),
        v4.new_output(
            "display_data", data={"application/vnd.plotly.v1+json": {"data": [], "layout": {"title": "</script>"}}}
        ),
        v4.new_output("execute_result", data={"text/html": "<b>1</b>", "text/plain": "1"}),
    ]
    solution = "<details><summary>Solution</summary>\n\n```python\n1\n```\n\n</details>"
    cells = [v4.new_code_cell("f()", outputs=outputs, execution_count=1), v4.new_markdown_cell(solution)]
    markdown, found = pages.notebook_page(v4.new_notebook(cells=cells))
    assert "```python\nf()\n```" in markdown
    assert '<details markdown="1">' in markdown
    assert len(found) == 1
    assert "<pre>a &lt; b</pre>" in found[0]
    assert "<b>1</b>" in found[0]
    assert "Loading" not in found[0]
    assert found[0].count("</script>") == 1  # the figure's own: a title ends no script


def test_a_page_has_one_title() -> None:
    assert pages.with_one_title("# A\n\n## B\n\n# C\n\n## D\n") == "# A\n\n## B\n\n## C\n\n### D\n"
    assert pages.with_one_title("No title.\n\n## B\n") == "No title.\n\n## B\n"
