"""The docstrings of this package as Markdown, as an extension of griffe: sections become lists, examples become code.

A section is a line such as "Args:" with an indented block; where its lines are "name: text", each is an item. An example is a
run of lines that begins with ">>>"; indented equations are code blocks as they are.
"""

import re
from inspect import cleandoc
from textwrap import dedent
from typing import Any

from griffe import Extension

TITLES = {"Args": "Arguments", "Returns": "Returns", "Yields": "Yields", "Raises": "Raises", "Example": "Example"}
LISTS = ("Args", "Raises")


class Docstrings(Extension):
    """Rewrites each docstring once, before it is shown."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring as Markdown.

    >>> print(as_markdown("The sum.\\n\\nArgs:\\n    a: The first\\n        one.\\n    b: Two.\\n\\n>>> 1 + 1\\n2"))
    The sum.
    <BLANKLINE>
    **Arguments**
    <BLANKLINE>
    - `a`: The first one.
    - `b`: Two.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    section = rf"^({'|'.join(TITLES)}):[ \t]*(.*)\n((?:[ \t]+.*\n|\n)*)"
    blocks = re.split(section, cleandoc(text) + "\n", flags=re.MULTILINE)
    found = [with_examples(blocks[0])]
    for name, rest, block, after in zip(*(iter(blocks[1:]),) * 4, strict=True):
        body = dedent(block).strip("\n")
        inner = items(body) if name in LISTS and not rest else with_examples("\n".join(filter(None, [rest, body])))
        found += [f"**{TITLES[name]}**", inner, with_examples(after)]
    return "\n\n".join(part.strip("\n") for part in found if part.strip()).strip()


def items(block: str) -> str:
    """Lines "name: text", with their indented continuations, as a list."""
    found = re.split(r"^(?=\S)", block, flags=re.MULTILINE)[1:]
    lines = []
    for item in found:
        name, _, text = " ".join(item.split()).partition(": ")
        names = ", ".join(f"`{one}`" for one in name.split(", "))
        lines.append(f"- {names}: {text}" if text else f"- {name}")
    return "\n".join(lines)


def with_examples(text: str) -> str:
    """Runs of ">>>" as fenced code, up to the next empty line."""
    run = re.compile(r"^([ \t]*)>>> .*\n?(?:.*\S.*\n?)*", flags=re.MULTILINE)
    return run.sub(lambda found: f"```pycon\n{dedent(found[0]).rstrip()}\n```\n", text)
