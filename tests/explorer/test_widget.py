"""The widget without a page: what `explore` takes and refuses, and a run on a loop that hears the next value."""

import asyncio
import itertools
import sys
from typing import Any

import pytest

import steerlens as sl
from steerlens.errors import SteerlensError
from steerlens.explorer.runs import Explorer
from steerlens.explorer.settings import Settings
from steerlens.explorer.widget import ExplorerWidget
from tests.conftest import hooks_on
from tests.explorer.conftest import LOWERCASE, TITLE

SHORT = {"max_new_tokens": 4}


def test_explore_shows_what_it_is_given(model: Any, vectors: Any) -> None:
    widget = sl.explore(model, vectors, prompt="What is iron?", chosen=TITLE, layer=6, positions="last", **SHORT)
    expected = Settings("What is iron?", (TITLE,), 6, positions="last", max_new_tokens=4)
    assert widget.asked == expected.asked()
    assert widget.view["status"] == "finished"
    text = sl.generate(model, ["What is iron?"], steering=vectors[TITLE].at(6, positions="last"), **SHORT)[0].text
    assert widget.view["steered"]["text"] == text
    assert [one["title"] for one in widget.choices["vectors"]] == ["english lowercase", "title"]
    assert widget.choices["layers"] == list(range(8))


def test_one_vector_has_its_own_name_and_an_operator_that_it_can_serve(model: Any, vectors: Any) -> None:
    both = vectors[TITLE] + vectors[LOWERCASE]  # a sum has no projections
    widget = sl.explore(model, both, coeff=0.5, **SHORT)
    assert widget.asked["vectors"] == [both.name]
    assert (widget.asked["operator"], widget.asked["layer"]) == ("add", 4)
    assert widget.view["steered"]["verdicts"][0]["followed"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chosen": "titel"}, "an instruction must be one of the vectors', got 'titel'"),
        ({"layer": 9}, "got 9"),
        ({"positions": "lats"}, "did you mean 'last'"),
        ({"prompt": ""}, "must not be empty"),
        ({"arguments": {"x": {}}}, "got some of 'x'"),
    ],
)
def test_a_first_value_that_cannot_be_is_refused(
    model: Any, vectors: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SteerlensError, match=message):
        sl.explore(model, vectors, **options)


def test_the_plan_is_what_the_controls_say(model: Any, vectors: Any) -> None:
    widget = sl.explore(model, vectors, chosen=TITLE, layer=6, operator="add", coeff=0.3, **SHORT)
    assert widget.plan == vectors[TITLE].at(6, operator="add", coeff=0.3, unit="resid_norm")
    widget.asked = {**widget.asked, "layer": 1, "vectors": [LOWERCASE, TITLE], "operator": "ablate", "coeff": "1"}
    assert widget.plan == vectors[LOWERCASE].at(1, operator="ablate") + vectors[TITLE].at(1, operator="ablate")
    widget.asked = {**widget.asked, "coeff": "1e"}
    with pytest.raises(SteerlensError, match="coeff: the coefficient must be"):
        _ = widget.plan


def test_no_vectors_are_refused(model: Any) -> None:
    with pytest.raises(SteerlensError, match="needs a vector"):
        sl.explore(model, {})


def test_without_anywidget_a_sentence_says_what_to_install(
    model: Any, vectors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "steerlens.explorer.widget")
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(SteerlensError, match=r'needs anywidget.*pip install "steerlens\[notebook\]"'):
        sl.explore(model, vectors)


def test_a_value_that_cannot_be_is_said_and_the_next_one_is_heard(explorer: Explorer, settings: Settings) -> None:
    widget = ExplorerWidget(explorer, settings)
    widget.asked = {**widget.asked, "coeff": "much"}
    assert widget.view["status"] == "refused"
    assert widget.view["problems"][0][0] == "coeff"
    widget.asked = {**widget.asked, "coeff": "0"}
    assert widget.view["status"] == "finished"


def test_on_a_loop_a_new_value_ends_the_run_in_progress(explorer: Explorer, settings: Settings, model: Any) -> None:
    seen: list[dict[str, Any]] = []

    async def reader() -> None:
        widget = ExplorerWidget(explorer, settings)
        widget.observe(lambda change: seen.append(change.new), "view")
        assert widget.view["unsteered"]["tokens"] == (), "a run begins once the loop is free"
        while len(widget.view["steered"]["tokens"]) < 3:
            await asyncio.sleep(0)
        assert hooks_on(model) == []
        widget.asked = {**widget.asked, "layer": 5}
        while widget.view["status"] != "finished":
            await asyncio.sleep(0)

    asyncio.run(reader())
    plans = [view["plan"] for view in seen]
    changes = sum(before != after for before, after in itertools.pairwise(plans))
    assert changes == 1, "views of the two runs do not mix"
    assert "layer 1" in plans[0]
    assert "layer 5" in plans[-1]
    of_first = [view for view in seen if "layer 1" in view["plan"]]
    assert {view["status"] for view in of_first} == {"running"}


def test_a_stop_is_shown(explorer: Explorer, settings: Settings, model: Any) -> None:
    async def reader() -> ExplorerWidget:
        widget = ExplorerWidget(explorer, settings)
        while not widget.view["steered"]["tokens"]:
            await asyncio.sleep(0)
        widget.stopped += 1
        for _ in range(20):
            await asyncio.sleep(0)
        return widget

    widget = asyncio.run(reader())
    assert widget.view["status"] == "stopped"
    assert 0 < len(widget.view["steered"]["tokens"]) < 5
    assert hooks_on(model) == []
