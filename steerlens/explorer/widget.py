"""The explorer as a widget: values of controls come from a page, views go to it. All else is in `runs`.

A run is a task of the loop that also reads the page's messages, a token at a time, so a control that is moved is heard between
two tokens, and no thread shares the model with the reader's cells. Where no loop runs, as in a script, a run goes to its end.

The front end is one module and one style sheet beside this file, with nothing to build or to fetch.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from steerlens._typing import OPERATORS
from steerlens.errors import SteerlensError
from steerlens.explorer.runs import Explorer, View
from steerlens.explorer.settings import Settings, read_settings
from steerlens.figures.theme import short_label
from steerlens.steering.plan import Plan
from steerlens.steering.positions import RULES

FRONT_END = Path(__file__).parent


class ExplorerWidget(anywidget.AnyWidget):
    """What `explore` shows; `asked` may be set from Python, too.

    >>> widget = ExplorerWidget(Explorer(model, {"lowercase": vector}), Settings("What is iron?", ("lowercase",), 4))
    >>> widget.view["status"]
    'finished'
    """

    _esm = FRONT_END / "explorer.js"
    _css = FRONT_END / "explorer.css"
    choices = traitlets.Dict().tag(sync=True)
    """What the controls offer."""
    asked = traitlets.Dict().tag(sync=True)
    """The controls' values; a change starts a run, and ends the one before it."""
    stopped = traitlets.Int(0).tag(sync=True)
    """Counts how often the page asked to stop."""
    view = traitlets.Dict().tag(sync=True)
    """A `View` as plain data."""

    def __init__(self, explorer: Explorer, settings: Settings) -> None:
        self.explorer = explorer
        self._task: asyncio.Task[None] | None = None
        super().__init__(choices=choices_of(explorer), asked=settings.asked(), view=asdict(View()))
        self.observe(self._run, "asked")
        self.observe(self._stop, "stopped")
        self._run()

    @property
    def plan(self) -> Plan:
        """What the controls say now, to go on with in code: `sl.generate(model, prompts, steering=widget.plan)`.

        Raises:
            SteerlensError: if a control has a value that cannot be.
        """
        settings, problems = read_settings(self.asked, self.explorer.vectors, unit=self.explorer.unit)
        if settings is None:
            raise SteerlensError("; ".join(f"{control}: {problem}" for control, problem in problems.items()))
        return settings.plan(self.explorer.vectors, unit=self.explorer.unit)

    def _stop(self, _: Any) -> None:
        self.explorer.cancel()
        self.view = {**self.view, "status": "stopped"}

    def _run(self, _: Any = None) -> None:
        views = self.explorer.run(self.asked)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            for view in views:
                self.view = asdict(view)
        else:
            self._task = loop.create_task(self._show(views))  # kept, as a loop forgets its tasks

    async def _show(self, views: Iterator[View]) -> None:
        for view in views:
            self.view = asdict(view)
            await asyncio.sleep(0)  # here the page is heard


def choices_of(explorer: Explorer) -> dict[str, Any]:
    """What the controls offer, as plain data."""
    layers = {layer for vector in explorer.vectors.values() for layer in vector.layers}
    return {
        "vectors": [{"name": name, "title": short_label(name)} for name in explorer.vectors],
        "layers": sorted(layers),
        "operators": list(OPERATORS),
        "positions": list(RULES),
        "unit": {"resid_norm": "mean residual norms", "absolute": "absolute units"}[explorer.unit],
    }
