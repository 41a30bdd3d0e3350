"""The explorer's front end in headless Chromium: what a reader does with mouse and keyboard, and what is then seen."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from steerlens.explorer.runs import Explorer
from steerlens.explorer.settings import Settings
from steerlens.explorer.widget import FRONT_END, ExplorerWidget
from tests.browsers import needs_browser
from tests.explorer.browser import Page
from tests.explorer.conftest import LOWERCASE, TITLE
from tests.explorer.stand_in import shown

STATUS = "document.querySelector('.steerlens-explorer').dataset.status"
FINISHED = f"{STATUS} === 'finished'"
LAYER = "input[id$='-layer']"


def text_of(name: str) -> str:
    """A JavaScript expression: what stands in one of the two texts."""
    return f"document.querySelector('.side.{name} .text').textContent.replace('■', '')"


@pytest.fixture
def visit(explorer: Explorer, settings: Settings, tmp_path: Path) -> Callable[..., None]:
    """Run what a reader does in a page whose first run is finished; at the end the console must be empty."""

    def run(reader: Callable[[Page, ExplorerWidget], Awaitable[None]]) -> None:
        async def session() -> None:
            widget = ExplorerWidget(explorer, settings)
            async with shown(widget, tmp_path) as page:
                await page.until(FINISHED)
                await reader(page, widget)
                assert page.complaints == []
            widget.close()

        asyncio.run(session())

    return run


@needs_browser
def test_dragging_the_layer_changes_the_steered_text_and_the_lens(visit: Callable[..., None]) -> None:
    async def reader(page: Page, widget: ExplorerWidget) -> None:
        before = [await page.value(text_of(name)) for name in ("unsteered", "steered")]
        assert before == [widget.view[name]["text"] for name in ("unsteered", "steered")]
        lens = await page.value("document.querySelector('.lens').textContent")
        await page.drag(LAYER, 0.16, 0.98)
        await page.until(f"document.querySelector({LAYER!r}).value === '7'")
        await page.until(f"document.querySelector('.plan').textContent.includes('layer 7') && {FINISHED}")
        assert widget.asked["layer"] == 7
        after = [await page.value(text_of(name)) for name in ("unsteered", "steered")]
        assert after == [widget.view[name]["text"] for name in ("unsteered", "steered")]
        assert after[0] == before[0]
        assert after[1] != before[1]
        assert await page.value("document.querySelector('.lens').textContent") != lens
        assert "at layer 7" in await page.value("document.querySelector('.lens').textContent")

    visit(reader)


@needs_browser
def test_tokens_verdicts_and_lens_are_those_of_the_view(visit: Callable[..., None]) -> None:
    async def reader(page: Page, widget: ExplorerWidget) -> None:
        colours = await page.value(
            "[...document.querySelectorAll('.side.steered .token')].map((one) => "
            "[Number(one.style.getPropertyValue('--surprise')), getComputedStyle(one).backgroundColor])"
        )
        likely = [token["probability"] for token in widget.view["steered"]["tokens"]]
        assert len(colours) == len(likely)
        rarest, surest = likely.index(min(likely)), likely.index(max(likely))
        assert colours[rarest][0] == max(colours)[0] > 0.5
        assert colours[surest][0] < 0.01
        assert colours[rarest][1] != colours[surest][1]
        sides = [
            await page.value(f"document.querySelector('.side.{one} .verdicts').textContent")
            for one in ("unsteered", "steered")
        ]
        assert sides == ["✗ does not follow title", "✓ follows title"]
        said = await page.value("[...document.querySelectorAll('.lens li')].map((one) => one.textContent)")
        expected = [token.replace(" ", "·") for row in widget.view["lens"] for token, *_ in row["tokens"]]
        assert said == expected

    visit(reader)


@needs_browser
def test_the_keyboard_reaches_every_control_in_order_and_moves_it(visit: Callable[..., None]) -> None:
    async def reader(page: Page, widget: ExplorerWidget) -> None:
        name = (
            "(() => { const at = document.activeElement, label = at.labels?.[0] ?? at; "
            "return (at.getAttribute('aria-label') ?? label.textContent).trim().slice(0, 60); })()"
        )
        ring = "getComputedStyle(document.activeElement).outlineStyle"
        order = []
        for _ in range(11):
            await page.press("Tab")
            order.append(await page.value(name))
            assert await page.value(ring) == "solid", f"the focus is not seen on {order[-1]}"
        assert order[:9] == [
            *("Prompt", "english lowercase", "title", "Layer", "Coefficient, as a slider", "Coefficient"),
            *("Operator", "Positions", "New tokens"),
        ]
        assert order[9] == "Stop"
        for _ in range(7):  # back to the layer
            await page.press("Tab", shift=True)
        assert await page.value(name) == "Layer"
        await page.press("ArrowRight")
        await page.until(f"document.querySelector('.plan').textContent.includes('layer 2') && {FINISHED}")
        await page.press("Tab", shift=True)
        await page.press("Tab", shift=True)
        await page.press(" ")
        await page.until(f"document.querySelector('.plan').textContent.includes('lowercase') && {FINISHED}")
        assert widget.asked["vectors"] == [LOWERCASE, TITLE]

    visit(reader)


@needs_browser
def test_arrows_walk_through_a_text_and_say_how_likely_its_tokens_were(visit: Callable[..., None]) -> None:
    async def reader(page: Page, widget: ExplorerWidget) -> None:
        await page.value("document.querySelector('.side.steered .text').focus()")
        await page.press("ArrowRight")
        first = await page.value("document.querySelector('.side.steered .detail').textContent")
        assert first.startswith("“<”: ")
        assert first.count("%") == 2
        await page.press("End")
        assert await page.value(
            "document.querySelector('.side.steered .token:last-child').classList.contains('cursor')"
        )

    visit(reader)


@needs_browser
def test_a_bad_coefficient_is_a_sentence_beside_it_and_goes_with_it(visit: Callable[..., None]) -> None:
    async def reader(page: Page, widget: ExplorerWidget) -> None:
        before = await page.value(text_of("steered"))
        box = "document.querySelector('input[id$=\"-coeff\"]')"
        await page.value(f"{box}.select() ?? {box}.focus()")
        await page.type("1e")
        await page.until(f"{STATUS} === 'refused'")
        problem = f"document.getElementById({box}.getAttribute('aria-describedby'))"
        assert await page.value(f"{problem}.textContent") == (
            "the coefficient must be a finite number, got '1e'; give one such as 1.5"
        )
        assert await page.value(f"{box}.getAttribute('aria-invalid')") == "true"
        assert await page.value(text_of("steered")) == before
        await page.value(f"{box}.select()")
        await page.type("0")
        await page.until(FINISHED)
        assert await page.value(f"{problem}.hidden && !{box}.hasAttribute('aria-invalid')")
        assert await page.value(text_of("steered")) == await page.value(text_of("unsteered"))

    visit(reader)


@needs_browser
def test_stop_ends_the_run_and_another_value_begins_one(visit: Callable[..., None]) -> None:
    async def reader(page: Page, widget: ExplorerWidget) -> None:
        views: list[dict[str, Any]] = []
        widget.observe(lambda change: views.append(change.new), "view")
        widget.asked = {**widget.asked, "max_new_tokens": 64, "coeff": 0.9}
        assert widget.explorer is not None
        await page.until(f"{STATUS} === 'running'")
        await page.value("document.querySelector('button.stop').click()")
        await page.until(f"{STATUS} === 'stopped'")
        count = len(views)
        await asyncio.sleep(0.3)
        assert len(views) == count
        assert views[-1]["status"] == "stopped"
        await page.drag(LAYER, 0.16, 0.5)
        await page.until(FINISHED)

    visit(reader)


@needs_browser
@pytest.mark.parametrize("width", [1200, 700, 400])
def test_nothing_is_wider_than_the_page_and_both_themes_can_be_read(
    visit: Callable[..., None], width: int, tmp_path: Path
) -> None:
    async def reader(page: Page, widget: ExplorerWidget) -> None:
        themes = {}
        for dark in (False, True):
            await page.picture(tmp_path / "page.png", width=width, dark=dark)
            assert await page.value("document.documentElement.scrollWidth <= innerWidth")
            themes[dark] = await page.value(
                "(() => { const root = document.querySelector('.steerlens-explorer'), style = getComputedStyle(root); "
                "return [root.dataset.theme, style.color, style.backgroundColor]; })()"
            )
        theme = "document.querySelector('.steerlens-explorer').dataset.theme"
        await page.value("document.body.style.background = '#ffffff'")  # a light notebook of a reader who prefers dark
        await page.until(f"{theme} === 'light'")
        await page.value("document.body.style.background = 'transparent'; document.body.className = 'vscode-dark'")
        await page.until(f"{theme} === 'dark'")
        assert themes[False] == ["light", "rgb(31, 35, 40)", "rgb(255, 255, 255)"]
        assert themes[True] == ["dark", "rgb(230, 232, 235)", "rgb(22, 25, 29)"]

    visit(reader)


@needs_browser
def test_a_page_that_is_left_is_left_alone(visit: Callable[..., None]) -> None:
    async def reader(page: Page, widget: ExplorerWidget) -> None:
        await page.value("window.cleanUp()")
        before = await page.value(text_of("steered"))
        widget.asked = {**widget.asked, "layer": 6}
        while widget.view["status"] != "finished" or "layer 6" not in widget.view["plan"]:
            await asyncio.sleep(0.05)
        assert await page.value(text_of("steered")) == before

    visit(reader)


def test_the_front_end_reaches_nothing_outside() -> None:
    for name in ("explorer.js", "explorer.css"):
        source = (FRONT_END / name).read_text(encoding="utf-8")
        assert not [
            word for word in ("http", "import ", "import(", "@import", "url(", "fetch", "eval") if word in source
        ]
