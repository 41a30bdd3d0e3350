"""Pictures of steering through attention: maps of heads, gated texts and methods; what they hold and say, not how they look."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from steerlens.errors import DataError
from steerlens.figures.attention import attention_mass_by_layer, attention_mass_map, head_profile_map
from steerlens.figures.gates import OUTCOMES, active_layers, gated_text
from steerlens.figures.matrices import MISSING_CELL
from steerlens.figures.methods import instruction_strength_heatmap, method_comparison
from steerlens.figures.theme import CONDITION_COLORS, faded, method_style
from tests.unchecked import unchecked


def masses(*conditions: str, layers: tuple[int, ...] = (0, 2, 4), heads: int = 2) -> pd.DataFrame:
    """Masses of 1, 2, 3 ... hundredths, and twice, three times as much under later conditions."""
    rows = []
    for times, condition in enumerate(conditions, 1):
        for place, (layer, head) in enumerate(((layer, head) for layer in layers for head in range(heads)), 1):
            rows.append({"condition": condition, "layer": layer, "head": head, "mass": times * place / 100})
    return pd.DataFrame(rows)


def profile(*instructions: str, layers: int = 2, heads: int | None = 3) -> pd.DataFrame:
    """Gains of -1, 0, 1 ... tenths over a baseline of three tenths, the best one chosen."""
    cells = [(layer, head) for layer in range(layers) for head in (range(heads) if heads else [pd.NA])]
    rows = []
    for name in instructions:
        for place, (layer, head) in enumerate(cells):
            gain = (place - 1) / 10
            one = {"instruction": name, "layer": layer, "head": head, "rate": 0.3 + gain, "baseline": 0.3, "gain": gain}
            rows.append({**one, "n": 10, "rank": len(cells) - place, "chosen": place == len(cells) - 1})
    return pd.DataFrame(rows).astype({"head": "Int64"})


def steps(*outcomes: str, row: int = 0, prompt: str = "What is iron?", tokens: list[str] | None = None) -> pd.DataFrame:
    """A step per outcome; full strength is eight layers, weakened steering two."""
    layers = {"skipped": 0, "accepted": 8, "weakened": 2, "rejected": 0}
    rows = []
    for position, outcome in enumerate(outcomes):
        token = tokens[position] if tokens else f" new{position}"
        steered = outcome in ("accepted", "weakened")
        one = {"row": row, "prompt": prompt, "position": position, "token": token, "outcome": outcome}
        one |= {
            "strength": layers[outcome] / 8,
            "n_layers": layers[outcome],
            "n_trials": 0 if outcome == "skipped" else 2,
        }
        one |= {"proposed": "" if outcome == "skipped" else token, "raw": " old" if steered else token}
        rows.append({**one, "p_proposed": math.nan if outcome == "skipped" else 0.25, "p_raw": 0.5})
    return pd.DataFrame(rows)


def compared(*methods: str, alone: tuple[str, ...] = ("none", "text")) -> pd.DataFrame:
    """Methods with strengths 1, 2 and 4, and others without one; the later the row, the more it follows and the worse it is."""
    settings = [(name, "", math.nan) for name in alone]
    settings += [(name, f"alpha {strength:g}", strength) for name in methods for strength in (1.0, 2.0, 4.0)]
    rows = []
    for place, (method, setting, strength) in enumerate(settings):
        rate, quality = place / len(settings), 3 - place / 10
        one = {"method": method, "setting": setting, "strength": strength, "rate": rate, "rate_low": rate - 0.1}
        one |= {
            "rate_high": rate + 0.1,
            "quality": quality,
            "quality_low": quality - 0.2,
            "quality_high": quality + 0.2,
        }
        rows.append({**one, "tokens_per_second": 100.0 + place, "pareto": place >= len(settings) - 2})
    return pd.DataFrame(rows)


def by_setting(*instructions: str, methods: tuple[str, ...] = ("PASTA",), alone: tuple[str, ...] = ()) -> pd.DataFrame:
    columns = [(name, "") for name in alone] + [(name, f"alpha {alpha}") for name in methods for alpha in (5, 10)]
    return pd.DataFrame(
        {"instruction": name, "method": method, "setting": setting, "rate": place / 10, "n": 12}
        for name in instructions
        for place, (method, setting) in enumerate(columns)
    )


def maps(fig: go.Figure) -> list[go.Heatmap]:
    return [trace for trace in fig.data if trace.type == "heatmap"]


def named(fig: go.Figure, name: str) -> list[Any]:
    return [trace for trace in fig.data if trace.name == name]


def notes(fig: go.Figure) -> list[str]:
    return [re.sub(r"</?b>", "", note.text) for note in fig.layout.annotations]


# --- mass -----------------------------------------------------------------------------------------------------------


def test_a_mass_map_has_a_panel_per_condition_on_one_scale_and_their_difference_about_zero() -> None:
    fig = attention_mass_map(masses("before", "after"))
    assert notes(fig) == ["before", "after", "after minus before"]
    before, after, change = maps(fig)
    assert np.allclose(before.z, [[0.01, 0.02], [0.03, 0.04], [0.05, 0.06]])
    assert np.allclose(after.z, 2 * before.z)
    assert np.allclose(change.z, before.z)
    assert before.coloraxis == after.coloraxis == "coloraxis"
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (0, pytest.approx(0.12))
    signed = fig.layout[change.coloraxis]
    assert (signed.cmin, signed.cmid, signed.cmax) == (pytest.approx(-0.06), 0, pytest.approx(0.06))
    assert signed.colorbar.ticktext == ("-6", "0", "+6")
    assert (
        change.customdata[2][1]
        == "layer 4, head 1<br><b>+6 points</b><br>before: <b>6\u00a0%</b><br>after: <b>12\u00a0%</b>"
    )


def test_layers_with_gaps_stand_one_above_the_other_under_their_own_numbers() -> None:
    fig = attention_mass_map(masses("before"))
    assert list(maps(fig)[0].y) == [0, 1, 2]
    assert fig.layout.yaxis.ticktext == ("0", "2", "4")
    assert (fig.layout.yaxis.title.text, fig.layout.xaxis.title.text) == ("layer", "head")


@pytest.mark.parametrize("n", [1, 3, 5])
def test_a_difference_is_drawn_of_two_conditions_only(n: int) -> None:
    fig = attention_mass_map(masses(*(f"plan {place}" for place in range(n))))
    assert notes(fig) == [f"plan {place}" for place in range(n)]
    assert len(maps(fig)) == n


def test_a_mass_says_its_interval_and_a_head_that_is_missing_is_grey() -> None:
    table = masses("before").assign(low=0.0, high=0.5)
    fig = attention_mass_map(table)
    assert maps(fig)[0].customdata[0][0] == "layer 0, head 0<br>before: <b>1\u00a0%</b> [0, 50]"
    assert fig.layout.plot_bgcolor is None
    assert attention_mass_map(table.iloc[1:]).layout.plot_bgcolor == MISSING_CELL


def test_masses_over_layers_are_means_over_heads_with_the_range_of_heads() -> None:
    fig = attention_mass_by_layer(masses("before", "after"))
    (line,), (band,) = named(fig, "after"), named(fig, "after, all heads")
    assert list(line.x) == [0, 2, 4]
    assert np.allclose(line.y, [0.03, 0.07, 0.11])
    assert np.allclose(band.y, [0.04, 0.08, 0.12, 0.10, 0.06, 0.02])
    assert line.customdata[0] == "after, layer 0: <b>3\u00a0%</b><br>2 heads from 2\u00a0% to 4\u00a0%"
    assert [trace.name for trace in fig.data if trace.showlegend] == ["before", "after"]
    assert (fig.layout.xaxis.title.text, fig.layout.yaxis.title.text) == ("layer", "on the instruction (%)")


def test_masses_of_a_single_layer_stand_side_by_side() -> None:
    fig = attention_mass_by_layer(masses("before", "after", layers=(3,)))
    (before,), (after,) = named(fig, "before"), named(fig, "after")
    assert before.x[0] < 3 < after.x[0]
    assert before.error_y.visible


# --- profiles -------------------------------------------------------------------------------------------------------


def test_a_profile_has_a_panel_per_instruction_with_the_chosen_heads_outlined() -> None:
    fig = head_profile_map(profile("all", "startend:quotation"))
    assert notes(fig) == ["all instructions", "quotation"]
    cells = maps(fig)
    assert np.allclose(cells[0].z, [[-0.1, 0.0, 0.1], [0.2, 0.3, 0.4]])
    scale = fig.layout.coloraxis
    assert (scale.cmin, scale.cmid, scale.cmax) == (pytest.approx(-0.4), 0, pytest.approx(0.4))
    outline, _ = named(fig, "chosen")
    assert set(outline.x) == {None, 1.5, 2.5}
    assert set(outline.y) == {None, 0.5, 1.5}
    assert cells[1].customdata[1][2] == (
        "quotation<br>layer 1, head 2: <b>+40 points</b><br>70\u00a0%, without steering 30\u00a0%, 10 prompts<br>rank 1, chosen"
    )
    assert "10 points (10 prompts)" in fig.layout.title.subtitle.text


def test_whole_layers_stand_beside_the_heads_or_alone_as_bars() -> None:
    both = head_profile_map(pd.concat([profile("all"), profile("all", heads=None)]))
    heads, layers = maps(both)
    assert list(heads.x) == [0, 1, 2]
    assert list(layers.x) == [3.5]
    assert np.allclose(np.ravel(layers.z), [-0.1, 0.0])
    assert both.layout.xaxis.ticktext == ("0", "1", "2", "all")
    alone = head_profile_map(profile("all", layers=3, heads=None))
    (bars,) = named(alone, "bars")
    assert np.allclose(bars.x, [-0.1, 0.0, 0.1])
    assert (list(bars.y), list(bars.marker.line.width)) == ([0, 1, 2], [0, 0, 2])
    assert alone.layout.xaxis.title.text == "gain (points)"
    assert "each layer" in alone.layout.title.text
    assert alone.layout.coloraxis.showscale is False


def test_heads_that_were_not_tried_are_grey() -> None:
    assert head_profile_map(profile("all")).layout.plot_bgcolor is None
    assert head_profile_map(profile("all").iloc[1:]).layout.plot_bgcolor == MISSING_CELL


# --- gates ----------------------------------------------------------------------------------------------------------


def test_every_token_stands_once_in_the_colour_of_its_outcome_and_a_changed_one_is_underlined() -> None:
    fig = gated_text(steps("skipped", "accepted", "weakened", "rejected"))
    found = {name: trace for trace in fig.data for name, (words, _) in OUTCOMES.items() if trace.name == words}
    assert {name: trace.text for name, trace in found.items()} == {
        "skipped": ("\u00a0new0",),
        "accepted": ("\u00a0<b><u>new1</u></b>",),
        "weakened": ("\u00a0<b><u>new2</u></b>",),
        "rejected": ("\u00a0new3",),
    }
    assert {name: trace.marker.color for name, trace in found.items()} == {name: OUTCOMES[name][1] for name in OUTCOMES}
    (prompts,) = named(fig, "prompts")
    assert prompts.text[0].startswith("<b>What is iron?</b>")
    assert "4 tokens, 2 changed, 1 rejected" in prompts.text[0]


def test_an_accepted_token_that_the_raw_run_says_too_is_not_marked() -> None:
    fig = gated_text(steps("accepted").assign(raw=" new0"))
    assert named(fig, "accepted")[0].text == ("\u00a0new0",)


def test_tokens_of_a_line_touch_and_never_reach_beyond_it() -> None:
    rng = np.random.default_rng(0)
    tokens = [" " + "x" * int(rng.integers(1, 40)) for _ in range(80)]
    fig = gated_text(steps(*["skipped", "rejected"] * 40, tokens=tokens), width=50)
    boxes = [box for trace in fig.data if trace.type == "bar" for box in zip(trace.y, trace.base, trace.x, strict=True)]
    lines: dict[float, list[tuple[float, float]]] = {}
    for line, start, size in sorted(boxes):
        lines.setdefault(line, []).append((start, size))
    assert sorted(lines) == list(range(1, len(lines) + 1))
    for places in lines.values():
        ends = [0.0, *(start + size for start, size in places)]
        assert [start for start, _ in places] == pytest.approx(ends[:-1])
        assert ends[-1] <= 50
    assert fig.layout.width == pytest.approx(50 * 7.4 + 16)


def test_a_line_break_begins_a_line_and_hostile_tokens_are_seen_as_they_are() -> None:
    tokens = ["one\n", "<b>&", " ", "", "\t", "日本", "e\u0301", " two words"]
    fig = gated_text(steps(*["skipped"] * len(tokens), tokens=tokens))
    (trace,) = named(fig, "skipped (sure)")
    assert trace.text == ("one\\n", "&lt;b&gt;&amp;", "·", "∅", "\\t", "日本", "e\u0301", "\u00a0two·words")
    assert list(trace.y) == [1, *[2] * 7]
    width = dict(zip(tokens, trace.x, strict=True))
    assert width["日本"] > width["<b>&"] - 0.1
    assert width["e\u0301"] == pytest.approx(width[" "])


def test_hovering_tells_what_was_proposed_and_how_likely_it_was() -> None:
    fig = gated_text(steps("skipped", "weakened"))
    assert named(fig, "skipped (sure)")[0].hovertext == (
        "step 0, <b>·new0</b>: skipped<br>raw: ·new0 (raw probability 0.5)",
    )
    assert named(fig, "weakened")[0].hovertext == (
        "step 1, <b>·new1</b>: weakened<br>steering at full strength: ·new1 (raw probability 0.25)<br>"
        "raw: ·old (raw probability 0.5)<br>2 layers active, strength 25\u00a0%, 2 trials",
    )


def test_the_first_texts_are_shown_or_one_of_them() -> None:
    table = pd.concat([steps("accepted", "rejected", row=row, prompt=f"Prompt {row}?") for row in range(9)])
    fig = gated_text(table, top=4)
    (prompts,) = named(fig, "prompts")
    assert [text.split("?")[0] for text in prompts.text] == [f"<b>Prompt {row}" for row in range(4)]
    assert "5 more texts" in fig.layout.title.subtitle.text
    (prompts,) = named(gated_text(table, row=7), "prompts")
    assert prompts.text[0].startswith("<b>Prompt 7?")


def test_active_layers_are_a_line_per_text_with_the_mean_of_those_still_running() -> None:
    table = pd.concat([steps("accepted", "skipped", "weakened"), steps("rejected", row=1)])
    fig = active_layers(table, n_layers=16)
    assert [list(line.y) for line in named(fig, "each text")] == [[8, 0, 2], [0]]
    (mean,) = named(fig, "mean of those running")
    assert list(mean.y) == [4, 0, 2]
    assert mean.customdata[2] == "step 2: <b>2 layers</b> on average<br>1 text still running"
    crosses = [trace for trace in named(fig, "rejected (raw token)") if trace.type == "scatter"]
    assert [list(trace.x) for trace in crosses] == [[0]]
    assert fig.layout.yaxis.range == (pytest.approx(-0.8), pytest.approx(16.8))
    running = {trace.name: dict(zip(trace.x, trace.y, strict=True)) for trace in fig.data if trace.type == "bar"}
    assert running["accepted"] == {0: 1, 1: 0, 2: 0}
    assert sum(counts[0] for counts in running.values()) == 2


def test_active_shares_have_a_scale_up_to_all_of_the_steering() -> None:
    fig = active_layers(steps("weakened", "skipped"), value="strength")
    assert list(named(fig, "this text")[0].y) == [0.25, 0]
    assert fig.layout.yaxis.title.text == "active share (%)"
    assert not named(fig, "mean of those running")


def test_many_texts_are_squares_darker_where_more_of_them_are() -> None:
    short = [steps("accepted" if row < 15 else "skipped", row=row) for row in range(18)]
    fig = active_layers(pd.concat([*short, *(steps("skipped", "weakened", row=row) for row in (18, 19))]))
    (squares,) = named(fig, "texts (darker: more)")
    places = zip(squares.x, squares.y, strict=True)
    # The texts that have ended count no more.
    assert dict(zip(places, squares.marker.opacity, strict=True)) == {(0, 0): 0.25, (0, 8): 0.75, (1, 2): 1.0}
    assert not named(fig, "each text")


# --- methods --------------------------------------------------------------------------------------------------------


def test_a_method_is_a_line_over_its_strengths_and_a_level_where_it_has_none() -> None:
    fig = method_comparison(compared("PASTA"))
    rate, quality, against_quality, against_speed = named(fig, "PASTA")
    assert list(rate.x) == list(quality.x) == [1, 2, 4]
    assert np.allclose(rate.y, [0.4, 0.6, 0.8])
    assert np.allclose(rate.error_y.array, 0.1)
    assert np.allclose(quality.error_y.arrayminus, 0.2)
    assert (list(against_quality.x), list(against_quality.y)) == (list(quality.y), list(rate.y))
    assert list(against_speed.x) == [102, 103, 104]
    assert np.allclose(against_quality.error_x.array, 0.2)
    level = named(fig, "text")[0]
    assert (list(level.y), level.line.dash) == ([0.2, 0.2], "dash")
    assert level.x[0] < 1 < 4 < level.x[1]
    assert level.line.color == CONDITION_COLORS["text"]
    titles = [axis.title.text for axis in (*fig.select_xaxes(), *fig.select_yaxes())]
    strength = "strength (each method's own unit)"
    assert titles[:4] == [strength, strength, "quality", "tokens per second"]
    assert titles[4:] == ["follow (%)", "quality", "follow (%)", None]


def test_the_front_is_a_line_through_numbered_points_that_a_second_legend_names() -> None:
    table = compared("PASTA")
    fig = method_comparison(table)
    (front,) = named(fig, "Pareto front")
    chosen = table[table["pareto"]].sort_values("quality")
    assert (list(front.x), list(front.y)) == (chosen["quality"].tolist(), chosen["rate"].tolist())
    second = [trace for trace in fig.data if trace.legend == "legend2"]
    assert [trace.name for trace in second] == ["1: PASTA, alpha 4", "2: PASTA, alpha 2"]
    assert [trace.text for trace in second] == [("1",), ("2",)]
    assert "on the Pareto front" in second[0].customdata[0]


def test_strengths_that_differ_by_much_have_a_logarithmic_axis() -> None:
    table = compared("PASTA", "SpotLight")
    assert method_comparison(table).layout.xaxis.type is None
    table.loc[table["method"] == "SpotLight", "strength"] /= 10
    fig = method_comparison(table)
    assert fig.layout.xaxis.type == "log"
    low, high = fig.layout.xaxis.range
    assert low < math.log10(0.1) < math.log10(4) < high


def test_a_comparison_without_speed_or_strength_leaves_them_out() -> None:
    fig = method_comparison(compared().assign(tokens_per_second=math.nan))
    assert len(list(fig.select_xaxes())) == 3
    assert fig.layout.xaxis.title.text == "no method has a strength"


def test_methods_have_colours_apart_from_each_other_and_from_conditions() -> None:
    names = [f"method {place}" for place in range(12)]
    styles = method_style([*CONDITION_COLORS, *names])
    assert len(set(styles.values())) == len(styles)
    assert {styles[name][0] for name in CONDITION_COLORS} == set(CONDITION_COLORS.values())
    assert len({styles[name][0] for name in names[:7]} - set(CONDITION_COLORS.values())) == 7
    assert faded("#010203", 0.5) == "rgba(1, 2, 3, 0.5)"


def test_rates_by_setting_have_a_panel_per_method_and_one_for_all_with_a_single_setting() -> None:
    fig = instruction_strength_heatmap(
        by_setting("a:b", "c:d", methods=("PASTA", "InstABoost"), alone=("none", "text"))
    )
    assert notes(fig) == ["one setting each", "PASTA", "InstABoost"]
    single, pasta, _ = maps(fig)
    assert np.allclose(single.z, [[0.0, 0.1]] * 2)
    assert np.allclose(pasta.z, [[0.2, 0.3]] * 2)
    assert [list(line) for line in pasta.text] == [["20", "30"]] * 2
    assert fig.layout.xaxis.ticktext == ("none", "text")
    assert fig.layout.yaxis.ticktext == ("b ", "d ")
    assert pasta.customdata[1][0] == "d<br>PASTA, alpha 5: <b>20\u00a0%</b><br>12 responses"
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (0, 1)


def test_a_setting_that_was_not_run_is_grey_and_settings_stand_in_the_order_of_their_strength() -> None:
    table = by_setting("a:b", "c:d").assign(strength=[5, 10, 5, 10])
    fig = instruction_strength_heatmap(table.iloc[1:])
    rates, grey = maps(fig)
    assert fig.layout.xaxis.ticktext == ("alpha 5", "alpha 10")
    assert math.isnan(rates.z[0][0])
    assert grey.z[0][0] == 1
    assert {color for _, color in grey.colorscale} == {MISSING_CELL}


# --- bad input ------------------------------------------------------------------------------------------------------


def doubled(table: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([table, table.tail(1)])


REFUSED: dict[str, tuple[Callable[[], go.Figure], str]] = {
    "mass beyond 1": (lambda: attention_mass_map(masses("a").assign(mass=1.5)), r"share in \[0, 1\], got 1.5"),
    "mass missing": (lambda: attention_mass_map(masses("a").drop(columns="mass")), "missing: mass"),
    "mass twice": (lambda: attention_mass_by_layer(doubled(masses("a"))), "condition a, layer 4, head 1"),
    "no mass": (lambda: attention_mass_by_layer(masses("a").head(0)), "at least one row"),
    "profile twice": (lambda: head_profile_map(doubled(profile("all"))), "instruction all, layer 1, head 2"),
    "profile of no gain": (lambda: head_profile_map(profile("all").drop(columns="gain")), "missing: gain"),
    "unknown outcome": (lambda: gated_text(steps("accepted").assign(outcome="acepted")), "did you mean 'accepted'"),
    "unknown row": (lambda: gated_text(steps("accepted"), row=3), "row must be in the frame, got 3"),
    "no texts": (lambda: gated_text(steps("accepted"), top=0), "top of at least 1"),
    "narrow text": (lambda: gated_text(steps("accepted"), width=5), "at least 20 letters"),
    "step twice": (lambda: gated_text(doubled(steps("accepted"))), "row 0, position 0"),
    "few layers": (lambda: active_layers(steps("accepted"), n_layers=4), "at least the 8 that were active, got 4"),
    "unknown value": (lambda: unchecked(active_layers)(steps("accepted"), value="layers"), '"n_layers" or "strength"'),
    "no steps": (lambda: active_layers(steps("accepted").head(0)), "at least one row"),
    "method twice": (lambda: method_comparison(doubled(compared("PASTA"))), "method PASTA, setting alpha 4"),
    "no front": (lambda: method_comparison(compared("PASTA").drop(columns="pareto")), "missing: pareto"),
    "setting twice": (lambda: instruction_strength_heatmap(doubled(by_setting("a:b"))), "setting alpha 10"),
}


@pytest.mark.parametrize(("figure", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_drawn_is_refused(figure: Callable[[], go.Figure], message: str) -> None:
    with pytest.raises(DataError, match=message):
        figure()
