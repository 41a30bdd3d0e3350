"""The folded sections of a page: what they hold, and that a browser opens them, draws them and moves their layer slider."""

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pytest

from steerlens.figures.page import Section, write_page
from steerlens.figures.report import write_report
from steerlens.figures.sections import sections_of
from tests.browsers import needs_browser
from tests.figures.test_report import (
    FACTS,
    HOSTILE,
    RATES,
    SEARCH,
    TITLE,
    Elements,
    fake_scores,
    outside_references,
    render,
    with_script,
)

NAMES, LAYERS = list(RATES), range(10)
FOLDS = ("what-the-vectors-say", "how-they-lie", "which-layers-matter")


def fake_lens(names: list[str], token: str = " rain") -> dict[str, pd.DataFrame]:
    """Every second token is beyond the random directions; layer 4 is the one that is used."""
    random = {"random_low": -1.0, "random_high": 4.5}
    blank = {"target": "", "text": "", "piece": float("nan"), "norm": "model"}
    tokens = [
        {"vector": name, "layer": layer, "sign": sign, "kind": "promoted", "rank": rank, "token": f"{token}{rank}"}
        | {"logit": 4.0 + rank % 2, "chosen": layer == 4, **random, **blank}
        for name in names
        for layer in LAYERS
        for sign in (1, -1)
        for rank in range(10)
    ]
    measured = [("total", "kl", 2.5), ("direct", "kl", 0.5), ("both", "correlation", 0.25)]
    effects = [
        {"vector": name, "layer": layer, "condition": condition, "effect": effect, "measure": measure, "target": ""}
        | {"mean": mean * scale, "low": mean * scale - 0.1, "high": mean * scale + 0.1, "n": 8}
        for name in names
        for layer in (LAYERS if len(names) == 1 else [4])
        for condition, scale in (("vector", 1.0), ("random", 0.1))
        for effect, measure, mean in measured
    ]
    return {"tokens": pd.DataFrame(tokens), "effects": pd.DataFrame(effects)}


def fake_geometry(names: list[str], n_pairs: int = 20) -> dict[str, pd.DataFrame]:
    """The x of every point is its layer, and a little noise."""
    random = Random(0)
    points = [
        {
            "method": method,
            "layer": layer,
            "instruction": name,
            "prompt_id": f"{name}-{pair}",
            "query": f"Query {pair}?",
        }
        | {"x": layer + random.random() / 9, "y": random.random()}
        for method in ("tsne", "pca")
        for layer in LAYERS
        for name in names
        for pair in range(n_pairs)
    ]
    numbers = {"value": 0.7, "low": 0.6, "high": 0.8, "control": 0.1, "control_low": 0.0, "control_high": 0.2}
    embeddings = [{"method": "tsne", "layer": layer, "perplexity": 33.0} for layer in LAYERS]
    embeddings += [{"method": "pca", "layer": layer, **numbers} for layer in LAYERS]
    cosines = [
        {"first": first, "second": second, "cosine": 0.5, "control_low": -0.15, "control_high": 0.15, "layer": 4}
        for place, first in enumerate(names)
        for second in names[place + 1 :]
    ]
    separability = [
        {"layer": layer, "measure": measure, **numbers} for layer in LAYERS for measure in ("probe", "silhouette")
    ]
    tables = {"points": points, "embeddings": embeddings, "cosines": cosines, "separability": separability}
    return {name: pd.DataFrame(rows) for name, rows in tables.items()}


def fake_studies(names: list[str]) -> dict[str, pd.DataFrame]:
    def row(**cell: Any) -> dict[str, Any]:
        numbers = {"n": 4, "followed": 2, "rate": 0.5, "low": 0.15, "high": 0.85, "degenerate": 0.0}
        return {"mode": None, "window": None, "from_layer": pd.NA, "layer": pd.NA, **cell, **numbers}

    every = [*names, "all"]
    bare = [row(instruction=name, condition=condition) for name in every for condition in ("none", "text")]
    places = [(name, layer) for name in every for layer in (2, 4)]
    steering = [
        row(instruction=name, layer=layer, mode=mode, condition=condition)
        for name, layer in places
        for mode in ("alone", "from")
        for condition in ("vector", "random")
    ]
    lost = {"loss": 0.25, "loss_low": 0.0, "loss_high": 0.5}
    necessity = [
        row(instruction=name, layer=layer, window="1", condition=condition) | lost
        for name, layer in places
        for condition in ("text+vector", "random", "random ablated")
    ]
    transfer = [row(instruction=name, layer=layer, from_layer=2, condition="vector") for name, layer in places]
    transfer += [row(instruction=name, layer=layer, condition="random") for name, layer in places]
    tables = {"steering": steering, "necessity": necessity, "transfer": transfer}
    return {
        name: pd.DataFrame(bare + rows).astype({"layer": "Int64", "from_layer": "Int64"})
        for name, rows in tables.items()
    }


def everything(names: list[str] = NAMES) -> dict[str, dict[str, pd.DataFrame]]:
    return {"lens": fake_lens(names), "geometry": fake_geometry(names), "layers": fake_studies(names)}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sections") / "report.html"
    return write_report(path, scores=fake_scores(2), search=SEARCH, seen=everything(), facts=FACTS, title=TITLE)


def test_sections_are_folded_and_the_contents_lead_to_them(page: Path) -> None:
    elements = Elements(page.read_text(encoding="utf-8"))
    folds = [
        attributes for tag, attributes in elements.tags if tag == "details" and attributes.get("class") == "section"
    ]
    assert [(fold["id"], "open" in fold) for fold in folds] == [(name, False) for name in FOLDS]
    links = [attributes.get("href") for tag, attributes in elements.tags if tag == "a"]
    assert [link for link in links if link in {f"#{name}" for name in FOLDS}] == [f"#{name}" for name in FOLDS]


def test_the_page_is_one_small_file_that_may_ask_for_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 15e6
    assert len(re.findall(r"plotly\.js v\d", text)) == 1
    assert outside_references(Elements(text)) == []
    rule = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
    assert f"content=\"{rule}form-action 'none'\"" in text


def test_sections_are_there_for_the_frames_that_are() -> None:
    seen = everything()
    for kinds in (["lens"], ["geometry", "layers"], []):
        found = [section.name for section in sections_of({kind: seen[kind] for kind in kinds})]
        wanted = {"lens": "What the vectors say", "geometry": "How they lie", "layers": "Which layers matter"}
        assert found == [wanted[kind] for kind in kinds]
    (only,) = sections_of({"layers": {"steering": seen["layers"]["steering"]}})
    assert set(re.findall(r'<div id="([a-z-]+)"', only.content)) == {"steering-figure", "steering-each-figure"}


def test_the_table_says_tokens_of_the_used_layer_and_marks_those_beyond_random_directions() -> None:
    lens = fake_lens(NAMES[:2], token="<b>")
    lens["tokens"].loc[lens["tokens"]["layer"] != 4, "token"] = "elsewhere"
    section = sections_of({"lens": lens}, order=NAMES[1::-1])[0]
    table = section.content.partition("Direct and total effect")[0]
    assert list(re.findall(r'<td class="name">(.*?)</td>', table)[::4]) == [
        "english capital",
        "english lowercase",
    ]
    assert "elsewhere" not in table
    assert '<span class="token">&lt;b&gt;0</span><span class="token"><b>&lt;b&gt;1</b></span>' in table


def test_effects_stand_beside_those_of_random_directions_and_are_curves_where_there_is_one_vector() -> None:
    several, one = (sections_of({"lens": fake_lens(NAMES[:n])})[0].content for n in (2, 1))
    (row, *_) = re.findall(r"<td>4</td>(.*?)</tr>", several.partition("Direct and total effect")[2])
    assert re.findall(r"<td>(.*?) \[", row) == ["2.50", "0.25", "0.50", "0.05", "0.25"]
    assert "effects-figure" not in several
    assert "effects-figure" in one
    assert "Direct and total effect" not in one


def test_texts_of_figures_end_no_script(tmp_path: Path) -> None:
    geometry = fake_geometry(NAMES[:2], 2)
    geometry["points"]["query"] = HOSTILE
    seen = {"lens": fake_lens([HOSTILE, "b"], token=HOSTILE), "geometry": geometry}
    text = write_page(tmp_path / "page.html", sections_of(seen), title=HOSTILE).read_text(encoding="utf-8")
    clean = write_page(tmp_path / "clean.html", sections_of({**seen, "lens": fake_lens(["a", "b"])}), title="clean")
    count = [tag for tag, _ in Elements(text).tags].count("script")
    assert count == [tag for tag, _ in Elements(clean.read_text(encoding="utf-8")).tags].count("script")


# In a browser

WATCH = """<script>
const said = {}, wait = (ms) => new Promise((done) => setTimeout(done, ms));
// Under virtual time a headless browser makes few frames, and a slider waits for one.
window.requestAnimationFrame = (draw) => setTimeout(() => draw(performance.now()), 16);
const folds = () => [...document.querySelectorAll("details.section")];
const seen = () => [...document.querySelectorAll(".section .main-svg")].length;
const fits = (id) => {
  const place = document.getElementById(id), drawn = place.querySelector(".main-svg");
  return Math.abs(drawn.getBoundingClientRect().width - place.getBoundingClientRect().width) < 2 && drawn.clientWidth > 300;
};
const state = (id) => {
  const plot = document.getElementById(id);
  const shown = plot.querySelector(".points path.point");
  return {x: (plot._fullData[0].x || [])[0], path: shown && shown.getAttribute("transform"),
    visible: plot.data.map((trace) => trace.visible), title: plot.querySelector(".gtitle-subtitle, .gsubtitle")?.textContent};
};
const slide = async (id) => {
  const rail = document.getElementById(id).querySelector(".slider-rail-touch-rect"), box = rail.getBoundingClientRect();
  const at = {clientX: box.left + 3, clientY: box.top + box.height / 2, bubbles: true, view: window};
  rail.dispatchEvent(new MouseEvent("mousedown", at));
  rail.dispatchEvent(new MouseEvent("mouseup", at));
  await wait(1500);
};
window.addEventListener("load", async () => {
  await wait(300);
  said.openedByAddress = folds().filter((fold) => fold.open).map((fold) => fold.id);
  said.drawnFolded = seen();
  document.querySelector('nav a[href="#how-they-lie"]').click();
  await wait(1000);
  said.openedByLink = folds().filter((fold) => fold.open).map((fold) => fold.id);
  folds().forEach((fold) => { fold.open = true; });
  await wait(1500);
  said.fit = [...document.querySelectorAll(".section .js-plotly-plot")].map((place) => [place.id, fits(place.id)]);
  said.before = {tsne: state("tsne-figure"), lens: state("lens-figure")};
  await slide("tsne-figure");
  await slide("lens-figure");
  said.after = {tsne: state("tsne-figure"), lens: state("lens-figure")};
  document.querySelectorAll(".section details").forEach((fold) => { fold.open = true; });
  await wait(1500);
  said.undrawn = document.querySelectorAll("script.drawing").length;
  document.body.dataset.said = JSON.stringify(said);
});
</script>"""


@needs_browser
def test_browser_opens_the_sections_draws_them_to_their_width_and_moves_the_slider(page: Path, tmp_path: Path) -> None:
    dom, console = render(with_script(page, tmp_path, WATCH), tmp_path / "profile")
    elements = Elements(dom)
    assert console == []
    assert "data-errors" not in elements.tags[0][1]
    assert outside_references(elements) == []
    (body,) = (attributes for tag, attributes in elements.tags if tag == "body")
    said = json.loads(body["data-said"] or "")
    assert said["openedByAddress"] == []
    assert said["drawnFolded"] == 0
    assert said["openedByLink"] == ["how-they-lie"]
    of_lens, of_geometry = ["lens-figure"], ["tsne-figure", "pca-figure", "cosines-figure", "separability-figure"]
    of_layers = ["steering-figure", "necessity-figure", "transfer-figure"]
    assert dict(said["fit"]) == dict.fromkeys([*of_lens, *of_geometry, *of_layers], True)
    tsne, lens = ((said["before"][name], said["after"][name]) for name in ("tsne", "lens"))
    assert int(tsne[0]["x"]) == len(LAYERS) // 2
    assert int(tsne[1]["x"]) == 0
    assert tsne[0]["path"] != tsne[1]["path"]
    assert lens[0]["visible"] == [False] * 18 + [True] * 2
    assert lens[1]["visible"] == [True] * 2 + [False] * 18
    assert said["undrawn"] == 0


@needs_browser
def test_an_address_of_a_section_opens_it(page: Path, tmp_path: Path) -> None:
    dom, console = render(page, tmp_path / "profile", address="#which-layers-matter")
    assert console == []
    opened = [
        attributes.get("id") for tag, attributes in Elements(dom).tags if tag == "details" and "open" in attributes
    ]
    assert [name for name in opened if name in FOLDS] == ["which-layers-matter"]
    drawn = {
        name: 'class="main-svg"' in dom.partition(f'id="{name}-figure"')[2][:2000] for name in ("steering", "tsne")
    }
    assert drawn == {"steering": True, "tsne": False}


def test_a_section_without_content_is_left_out(tmp_path: Path) -> None:
    page = write_page(tmp_path / "page.html", [Section("Empty", ""), Section("Full", "<p>text</p>")], title="Two")
    assert re.findall(r'href="(#.*?)"', page.read_text(encoding="utf-8")) == ["#full"]
