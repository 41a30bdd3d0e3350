"""The report page: what it says, that it stands alone, and that a browser draws it without an error."""

import os
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import pandas as pd
import pytest

from steerlens.errors import DataError
from steerlens.figures.report import write_report
from steerlens.figures.samples import mark_changes
from steerlens.figures.summary import summarize
from steerlens.stats.rates import GATED, rate_table, wilson_interval
from steerlens.stats.words import distinct_n, repetition, words
from tests.browsers import CHROMIUM, needs_browser

# Per instruction: the share that follows under none, random, vector, text, text+vector.
RATES = {
    "change_case:english_lowercase": (0.02, 0.02, 0.85, 0.70, 0.92),
    "change_case:english_capital": (0.01, 0.02, 0.70, 0.62, 0.85),
    "detectable_format:json_format": (0.00, 0.00, 0.15, 0.80, 0.80),
    "detectable_format:title": (0.02, 0.02, 0.30, 0.85, 0.90),
    "detectable_format:number_highlighted_sections": (0.10, 0.10, 0.40, 0.75, 0.70),
    "detectable_format:multiple_sections": (0.05, 0.05, 0.10, 0.60, 0.55),
    "detectable_format:constrained_response": (0.00, 0.00, 0.00, 0.30, 0.35),
    "detectable_content:postscript": (0.00, 0.00, 0.10, 0.80, 0.85),
    "detectable_content:number_placeholders": (0.05, 0.05, 0.25, 0.60, 0.65),
    "startend:quotation": (0.02, 0.02, 0.30, 0.50, 0.55),
    "combination:two_responses": (0.00, 0.00, 0.05, 0.40, 0.45),
    "punctuation:no_comma": (0.30, 0.30, 0.20, 0.75, 0.80),
}
CONDITIONS = ("none", "random", "vector", "text", "text+vector")
HOSTILE = "<script>alert(1)</script> **bold** </div> & 'quotes' $title {braces}"
OTHER_SCRIPTS = "مرحبا بالعالم هذا نص طويل 雨は空から降る水です。 " + "pneumono" * 40
VOCABULARY = words(
    "rain falls when moist air rises and cools so that droplets grow heavy enough to fall, which farmers, sailors and"
    " gardeners have watched for as long as there were clouds. It fills rivers and lakes, and then it begins again."
)


def fake_scores(n_prompts: int = 13) -> pd.DataFrame:
    """A scores frame that looks like a run: 12 instructions x 13 prompts x 5 conditions."""
    random, rows = Random(0), []
    for instruction, rates in RATES.items():
        for prompt in range(n_prompts):
            query = f"Write a short note about topic {prompt} for a reader who has never heard of it."
            plain = random.choices(VOCABULARY, k=random.randint(20, 70))
            for condition, rate in zip(CONDITIONS, rates, strict=True):
                followed = random.random() < rate
                text = " ".join(word if random.random() < 0.7 else random.choice(VOCABULARY) for word in plain)
                if condition == "none":
                    text = " ".join(plain)
                if "lowercase" in instruction and followed:
                    text = text.lower()
                if "capital" in instruction and followed:
                    text = text.upper()
                if condition == "text+vector" and prompt == 2:
                    text, followed = "", False
                if condition == "vector" and prompt == 1:
                    text = HOSTILE
                if condition == "random" and prompt == 0:
                    text = OTHER_SCRIPTS
                row = {
                    "prompt_id": f"{instruction}-{prompt}",
                    "query": f"Query {prompt}",
                    "instruction": instruction,
                    "condition": condition,
                    "layer": 14 if "vector" in condition else pd.NA,
                    "operator": "set_projection",
                    "coeff": 1.0,
                    "positions": "all",
                    "trial": 0,
                    "seed": 0,
                    "prompt": query + (" Follow the rule as stated." if condition.startswith("text") else ""),
                    "response": text,
                    "n_tokens": 2 * len(text.split()),
                    "finish_reason": "length" if random.random() < 0.2 else "eos",
                    "followed": followed,
                    "followed_strict": followed and random.random() < 0.9,
                    "n_words": len(words(text)),
                    "repetition": repetition(text),
                    "distinct_2": distinct_n(text),
                    "perplexity": random.lognormvariate(2.0, 0.4) if text else float("nan"),
                }
                rows.append(row)
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def fake_search(n: int = 13) -> pd.DataFrame:
    """A search frame over the layers of a 30-layer model, with the unsteered row of each instruction."""
    random, rows = Random(1), []
    for instruction, (none, _, vector, *_) in RATES.items():
        candidates = [(pd.NA, none), *((layer, vector - 0.004 * (layer - 14) ** 2) for layer in range(4, 28, 2))]
        counts = [(layer, sum(random.random() < rate for _ in range(n))) for layer, rate in candidates]
        best = max(counts[1:], key=lambda pair: pair[1])
        for layer, followed in counts:
            low, high = wilson_interval(followed, n)
            rows.append(
                {
                    "instruction": instruction,
                    "layer": layer,
                    "operator": "none" if layer is pd.NA else "set_projection",
                    "positions": "all",
                    "coeff": float("nan") if layer is pd.NA else 1.0,
                    "n": n,
                    "followed": followed,
                    "rate": followed / n,
                    "low": low,
                    "high": high,
                    "mean_repetition": 0.1,
                    "median_perplexity": 8.0,
                    "degenerate": 0.0 if layer is pd.NA else max(0.0, 0.5 - layer / 12) + 0.05 * random.random(),
                    "chosen": layer is best[0],
                }
            )
    return pd.DataFrame(rows).astype({"layer": "Int64"})


SEARCH = {"vector": fake_search(), "text+vector": fake_search()}


FACTS = {
    "model": "example/model-135m-instruct",
    "dtype": "bfloat16",
    "prompts": 156,
    "chosen layers": {name.split(":")[1]: 14 for name in list(RATES)[:4]},
    "seeds": [0, 1, 2],
    "versions": {"torch": "2.13.0", "transformer-lens": "4.3.0"},
    "perplexity of the random text": float("nan"),
    "identity": "9f2c51aa03de77b1",
    "command": "steerlens sweep --model example/model-135m-instruct --layers all --coeffs 1 2 --out runs/<name>",
}
TITLE = "Does the vector do what the words do?"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_report(
        folder / "report.html",
        scores=fake_scores(),
        search=SEARCH,
        facts=FACTS,
        title=TITLE,
    )


class Elements(HTMLParser):
    """Every start tag of a page, as (tag, attributes), and the page's visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._inside):
            self.text += data


def outside_references(elements: Elements) -> list[str]:
    """What a browser would fetch for this page: everything but anchors inside it and data it already holds."""
    values = [
        value or ""
        for _, attributes in elements.tags
        for name, value in attributes.items()
        if name in {"src", "href", "srcset", "poster", "action", "data", "xlink:href"}
    ]
    return [value for value in values if not value.startswith(("#", "data:"))]


def test_page_holds_plotly_once_and_refers_to_nothing_outside(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"plotly\.js v\d", text)) == 1
    elements = Elements(text)
    assert outside_references(elements) == []
    assert not [tag for tag, _ in elements.tags if tag in {"link", "iframe", "img", "base"}]
    planted = Elements('<p><img src="https://example.invalid/x.png"><a href="#top">up</a></p>')
    assert outside_references(planted) == ["https://example.invalid/x.png"]


def test_hostile_text_is_escaped_wherever_it_enters(tmp_path: Path) -> None:
    scores = fake_scores(2)
    scores[["prompt", "response"]] = HOSTILE
    hostile_facts = {HOSTILE: HOSTILE, "list": [HOSTILE], "nested": {HOSTILE: HOSTILE}, "command": HOSTILE}
    page = write_report(tmp_path / "hostile.html", scores=scores, facts=hostile_facts, title=HOSTILE)
    text = page.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    clean = write_report(tmp_path / "clean.html", scores=fake_scores(2), facts=FACTS, title=TITLE).read_text("utf-8")
    count = [tag for tag, _ in Elements(text).tags].count("script")
    assert count == [tag for tag, _ in Elements(clean).tags].count("script")
    assert "$title {braces}" in Elements(text).text


def test_summary_states_the_rates_of_the_scores(page: Path) -> None:
    scores = fake_scores()
    text = Elements(page.read_text(encoding="utf-8")).text
    for condition in CONDITIONS:
        (row,) = rate_table(scores[scores["condition"] == condition], [], clusters="query").to_dict("records")
        assert f"{100 * row['rate']:.0f}\u00a0% [{100 * row['low']:.0f}, {100 * row['high']:.0f}]" in text


@pytest.mark.parametrize(
    ("followed", "verdict"),
    [(90, "lies above that of a random"), (11, "overlaps that of a random"), (0, "lies below that of a random")],
)
def test_summary_compares_the_vector_with_the_random_vector(followed: int, verdict: str) -> None:
    assert verdict in summarize(*overall_and_table({"vector": followed, "random": 10 if followed else 30}))


def test_summary_without_a_vector_leads_with_what_there_is() -> None:
    summary = summarize(*overall_and_table({"none": 10, "text": 60}))
    assert summary.startswith("Without steering, 10\u00a0% [")
    assert "vector" not in summary


def test_summary_names_the_instructions_for_which_the_search_chose_no_steering() -> None:
    search = fake_search()
    search.loc[search["instruction"] == "startend:quotation", "chosen"] = search["layer"].isna()
    rates = overall_and_table({"none": 10, "vector": 10})
    assert "For 1 of 12 instructions (quotation) the search chose no steering" in summarize(*rates, search)
    assert "chose no steering" not in summarize(*rates, fake_search())


def test_summary_does_not_call_the_absence_of_a_change_the_largest() -> None:
    scores = fake_scores(2).assign(followed=False)
    overall, table = rate_table(scores, ["condition"]), rate_table(scores, ["instruction", "condition"])
    quality = {"median_perplexity": 8.0, "mean_repetition": 0.1, "cut": 0.2}
    summary = summarize(overall.assign(**quality), table)
    assert "higher with the vector than without on 0 of 12 instructions." in summary
    assert "largest" not in summary


def overall_and_table(followed: dict[str, int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    scores = pd.DataFrame(
        [
            {"instruction": "startend:quotation", "condition": condition, "followed": index < count}
            for condition, count in followed.items()
            for index in range(100)
        ]
    )
    overall = rate_table(scores, ["condition"])
    table = rate_table(scores, ["instruction", "condition"])
    quality = {"median_perplexity": float("nan"), "mean_repetition": 0.1, "cut": 0.2}
    return overall.assign(**quality), table


def test_missing_numbers_are_dashes_and_never_nan(tmp_path: Path) -> None:
    scores = fake_scores(2).assign(perplexity=float("nan"), repetition=float("nan"))
    page = write_report(tmp_path / "report.html", scores=scores, facts={"seed": None}, title=TITLE)
    text = Elements(page.read_text(encoding="utf-8")).text
    assert not re.search(r"\bnan\b|\bNaN\b|<NA>|\bNone\b", text)
    assert "perplexity" not in text.partition("Overall")[0]
    assert text.count("\u2013") >= 2 * 13 * 5


@pytest.mark.parametrize("search", [None, {}, {"vector": fake_search().head(0)}])
def test_page_without_a_search_has_no_layer_section(tmp_path: Path, search: dict[str, pd.DataFrame] | None) -> None:
    page = write_report(tmp_path / "r.html", scores=fake_scores(2), search=search, facts=FACTS, title=TITLE)
    text = page.read_text(encoding="utf-8")
    assert "search-figure" not in text
    assert "Layer search" not in text


def test_page_says_what_a_gate_made_of_the_tokens(tmp_path: Path) -> None:
    scores = fake_scores(4)
    gated = scores["condition"] == "vector"
    for name, value in zip(GATED, (0.25, 0.1, 0.15, 0.6, 3.5, 0.75), strict=True):
        scores[name] = gated.map({True: value, False: float("nan")})
    text = write_report(tmp_path / "report.html", scores=scores, facts={}, title="A trial").read_text()
    row = text[text.index("extra passes per token") :].partition("</table>")[0]
    assert re.findall(r"<td[^>]*>(.*?)</td>", row) == [
        *("vector", "25\u00a0%", "10\u00a0%", "15\u00a0%", "60\u00a0%", "3.50", "0.75")
    ]
    plain = write_report(tmp_path / "plain.html", scores=fake_scores(4), facts={}, title="A trial").read_text()
    assert "extra passes" not in plain


def test_sample_shows_each_condition_beside_the_others_with_its_verdict(tmp_path: Path) -> None:
    scores = fake_scores(1)
    scores = scores[scores["instruction"] == "startend:quotation"].assign(followed=[False, False, True, True, False])
    scores["response"] = ["rain falls", "rain drops", '"rain falls"', "text", "both"]
    page = write_report(tmp_path / "r.html", scores=scores, facts={}, title=TITLE).read_text(encoding="utf-8")
    cards = re.findall(r'<article.*?<b>(.*?)</b>.*?<span class="badge (\w+)">', page)
    assert cards == [("none", "no"), ("random", "no"), ("vector", "yes"), ("text", "yes"), ("text+vector", "no")]
    assert "<mark>&quot;rain falls&quot;</mark>" in page
    assert '<b title="text conditions only"> Follow the rule as stated.</b>' in page


def test_changed_words_are_marked_in_runs_and_the_text_stays_whole() -> None:
    before, after = "rain falls on the <hill> today", "rain  FALLS ON\nthe <hill> at night"
    marked = mark_changes(before, after)
    assert marked == "rain  <mark>FALLS ON</mark>\nthe &lt;hill&gt; <mark>at night</mark>"
    assert mark_changes(after, after) == mark_changes("", "") + "rain  FALLS ON\nthe &lt;hill&gt; at night"


def test_a_frequent_word_of_a_text_of_ordinary_length_is_not_marked() -> None:
    # difflib drops frequent words of 200 and more by default, and would mark all of them here.
    assert mark_changes("rain " * 250, "rain " * 249 + "snow") == "rain " * 249 + "<mark>snow</mark>"


def test_texts_that_repeat_themselves_are_compared_quickly() -> None:
    # Exact matching needs minutes here; the test would hang rather than fail.
    assert mark_changes("a b " * 1000, "a b a c " * 700).count("c") >= 700


def test_write_replaces_the_page_at_once_and_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(path, scores=fake_scores(1), facts={}, title="first")

    def refuse(source: Path, target: Path) -> None:
        assert Path(source).parent == path.parent
        assert "second" in Path(source).read_text(encoding="utf-8")
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, scores=fake_scores(1), facts={}, title="second")
    assert "<h1>first</h1>" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_two_writes_of_the_same_run_are_the_same_page(tmp_path: Path, page: Path) -> None:
    again = write_report(
        tmp_path / "r.html",
        scores=fake_scores(),
        search=SEARCH,
        facts=FACTS,
        title=TITLE,
    )
    assert again.read_bytes() == page.read_bytes()


def test_scores_without_rows_or_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one row"):
        write_report(tmp_path / "r.html", scores=fake_scores().head(0), facts={}, title=TITLE)
    with pytest.raises(DataError, match="missing: response, followed"):
        write_report(
            tmp_path / "r.html", scores=fake_scores().drop(columns=["response", "followed"]), facts={}, title=TITLE
        )


# In a browser


def render(page: Path, profile: Path, address: str = "") -> tuple[str, list[str]]:
    """The page's DOM after its scripts ran, and what the browser wrote on its console.

    Args:
        address: where in the page it is opened, such as "#overall".
    """
    quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-sync", *quiet.split(), f"--user-data-dir={profile}"]
    options = ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=15000", "--dump-dom", page.as_uri() + address]
    done = subprocess.run([*command, *options], capture_output=True, encoding="utf-8", timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def with_script(page: Path, folder: Path, addition: str) -> Path:
    changed = folder / "changed.html"
    changed.write_text(page.read_text(encoding="utf-8").replace("</main>", f"{addition}</main>"), encoding="utf-8")
    return changed


@needs_browser
def test_browser_draws_every_figure_without_an_error(page: Path, tmp_path: Path) -> None:
    dom, console = render(page, tmp_path / "profile")
    assert console == []
    elements = Elements(dom)
    assert "data-errors" not in elements.tags[0][1]
    assert outside_references(elements) == []
    figures = re.split(r'id="(overall-figure|instruction-figure|search-figure-[a-z-]+)"', dom)
    drawn = dict(zip(figures[1::2], figures[2::2], strict=True))
    assert {name: 'class="main-svg"' in part for name, part in drawn.items()} == dict.fromkeys(drawn, True)
    assert len(drawn) == 4
    assert drawn["overall-figure"].count('class="point"') == len(CONDITIONS)
    assert drawn["instruction-figure"].count('class="point"') == len(CONDITIONS) * len(RATES)
    assert drawn["instruction-figure"].count('class="errorbar"') == len(CONDITIONS) * len(RATES)
    for condition in ("vector", "text-vector"):
        assert drawn[f"search-figure-{condition}"].count('class="js-line"') >= 2 * len(RATES)


@needs_browser
def test_browser_check_sees_a_planted_error_and_a_request(page: Path, tmp_path: Path) -> None:
    broken = with_script(
        page, tmp_path, "<script>throw new Error('planted')</script><img src='https://example.invalid/x.png'>"
    )
    dom, console = render(broken, tmp_path / "profile")
    elements = Elements(dom)
    assert "planted" in (elements.tags[0][1]["data-errors"] or "")
    assert any("planted" in line for line in console)
    assert any("Content Security Policy" in line for line in console)
    assert outside_references(elements) == ["https://example.invalid/x.png"]


@needs_browser
def test_scripts_in_responses_do_not_run(tmp_path: Path) -> None:
    attack = "<script>document.documentElement.dataset.attacked = 1</script>"
    scores = fake_scores(1).assign(response=attack, prompt=attack)
    page = write_report(tmp_path / "report.html", scores=scores, facts={attack: attack}, title=attack)
    dom, console = render(page, tmp_path / "profile")
    assert "data-attacked" not in Elements(dom).tags[0][1]
    assert console == []
    dom, _ = render(with_script(page, tmp_path, attack), tmp_path / "profile")  # unescaped, it would have run
    assert Elements(dom).tags[0][1]["data-attacked"] == "1"
