"""The explorer in a page without a notebook: a small object stands in for Jupyter's model, and the widget is the real one.

python -m tests.explorer.stand_in        draws the README's picture, analysis/figures/explorer.png
"""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import steerlens as sl
from steerlens.explorer.widget import FRONT_END, ExplorerWidget
from tests.explorer.browser import Page, opened

HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>explorer</title><link rel="icon" href="data:,">
<style>%(css)s</style>
<style>body { margin: 16px; background: #fff; } @media (prefers-color-scheme: dark) { body { background: #111; } }</style>
</head><body><main></main>
<script type="text/plain" id="front-end">%(js)s</script>
<script>
const heard = {};
const model = {
  state: {},
  get: (name) => model.state[name],
  set: (name, value) => { model.state[name] = value; },
  save_changes: () => toPython(JSON.stringify(model.state)),
  on: (name, function_) => (heard[name] ??= new Set()).add(function_),
  off: (name, function_) => heard[name]?.delete(function_),
};
function fromPython(name, value) {
  model.state[name] = value;
  for (const function_ of heard[`change:${name}`] ?? []) function_();
}
async function begin(state) {
  model.state = state;
  const source = new Blob([document.getElementById("front-end").textContent], { type: "text/javascript" });
  const front = await import(URL.createObjectURL(source));
  window.cleanUp = front.default.render({ model, el: document.querySelector("main") });
}
</script></body></html>
"""
TRAITS = ("choices", "asked", "stopped", "view")


@asynccontextmanager
async def shown(widget: ExplorerWidget, folder: Path, **size: Any) -> AsyncIterator[Page]:
    """The widget in a page, each listening to the other."""
    page = folder / "explorer.html"
    parts = {kind: (FRONT_END / f"explorer.{kind}").read_text(encoding="utf-8") for kind in ("js", "css")}
    assert "</script" not in parts["js"]
    page.write_text(HTML % parts, encoding="utf-8")
    async with opened(page, folder / "profile", **size) as view:

        def to_python(text: str) -> None:
            state = json.loads(text)
            widget.asked, widget.stopped = state["asked"], state["stopped"]

        await view.bind("toPython", to_python)

        def to_page(change: Any) -> None:
            view.tell("Runtime.evaluate", expression=f"fromPython({change.name!r}, {json.dumps(change.new)})")

        widget.observe(to_page, ["asked", "view"])
        state = {name: getattr(widget, name) for name in TRAITS}
        await view.value(f"begin({json.dumps(state)})")
        yield view
        widget.unobserve(to_page, ["asked", "view"])


async def draw(path: Path) -> None:
    """The explorer after a run, with the first token of the steered text pointed at."""
    model = sl.load_model("tiny")
    vectors = sl.fit_vectors(model, sl.load_pairs("tiny", n_queries=20).by_instruction())
    title = "detectable_format:title"
    widget = sl.explore(model, vectors, prompt="What is snow?", chosen=title, layer=1, positions="prompt")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        async with shown(widget, Path(folder)) as page:
            await page.until("document.querySelector('.steerlens-explorer').dataset.status === 'finished'")
            await page.value("document.querySelector('.side.steered .text').focus()")
            await page.press("ArrowRight")
            height = int(await page.value("document.querySelector('.steerlens-explorer').offsetHeight")) + 32
            await page.picture(path, width=1000, dark=False, height=height)


if __name__ == "__main__":
    asyncio.run(draw(Path(__file__).parents[2] / "analysis/figures/explorer.png"))
