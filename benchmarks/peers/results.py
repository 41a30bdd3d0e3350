"""From the record of a run to its tables, its figure and RESULTS.md; nothing is measured here.

rate    units of work (new tokens, pairs) per second, the median over rounds
ratio   of two rates in the same round, the median over rounds with the lowest and the highest
limit   what the machine could do at most, see `bench.limit_seconds`
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.draw import save
from benchmarks.peers.races import HOOK, LOOP, ORIGINAL, OURS, OURS_ROWS, OURS_UNSTEERED, PEERS, UNSTEERED
from steerlens.figures.theme import CONDITION_COLORS, INK, MUTED
from steerlens.files import write_atomically

Record = dict[str, Any]
INTRODUCTION = f"""Contestants take turns in every round, with the same weights, prompts, batch and number of new tokens; a ratio
is that of two rates in the same round, given as the median over rounds with the lowest and the highest. Each has an interpreter
of its own where its packages ask for it. Steered means one vector at the middle layer, unless said otherwise. `{ORIGINAL}` and
`{LOOP}` go one row at a time without a cache, the one through TransformerLens as its authors did, the other over the bare model;
they are given one row, since their rate does not depend on how many follow (at natural lengths, on how long that row is). repeng
fits by PCA, the others a mean difference. At natural lengths the vector has half its length: at all of it `tiny` never stops.
Unsteered rows of a batch share what their prompts begin with, rows with vectors of their own only below the lowest layer that
they steer: what that gives stands in their overhead, too. In a sweep all but steerlens make one call per configuration. Memory is
of one process each, of steerlens' in several: the same work may hold 20 MiB more in one than in the next. The limit is what a
contestant could reach that takes no more time than the weights take to read or the products to compute, whichever is longer, as
fast as this machine was seen to do either; attention's own operations and the cache are not counted, and what prompts share is
run once, as if all were begun together.
"""
TITLES = {
    "fixed": "Sampling at a fixed length",
    "first": "The first token",
    "natural": "Sampling at natural lengths",
    "capture": "Fitting a vector",
    "memory": "Memory of a fit",
    "sweep": "A sweep",
    "growth": "Growth: every row with vectors of its own (8 rows of one query, 16 new tokens, one layer, but for what is named)",
}


def rates(entry: Record) -> list[float]:
    """Units per second of each round; none where the contestant is absent."""
    return [entry["units"] / seconds for seconds in entry.get("seconds", [])]


def ratio(race: Record, label: str, base: str) -> list[float]:
    """How many times the base's rate a contestant has in each round."""
    pair = [rates(race["entries"].get(name, {})) for name in (label, base)]
    return [one / other for one, other in zip(*pair, strict=True)] if all(pair) else []


def spread(values: list[float], form: str = "{:.2f}") -> str:
    """The median, and in brackets the lowest and the highest of several rounds."""
    ends = f" [{form.format(min(values))}, {form.format(max(values))}]" if len(values) > 1 else ""
    return form.format(median(values)) + ends


@dataclass(frozen=True)
class Goal:
    """One line of the table of goals: found values are held against the least, or the most, that they should be."""

    what: str
    found: list[float]
    goal: float
    at_most: bool = False
    form: str = "{:.2f}"
    limit: float | None = None
    """The value that the machine's limit would give."""

    @property
    def met(self) -> bool:
        return median(self.found) <= self.goal if self.at_most else median(self.found) >= self.goal

    def row(self) -> list[str]:
        verdict = "met" if self.found and self.met else "missed" if self.found else "not measured"
        limit = "" if self.limit is None else self.form.format(self.limit)
        wanted = ("<= " if self.at_most else ">= ") + self.form.format(self.goal)
        return [self.what, wanted, spread(self.found, self.form) if self.found else "", verdict, limit]


def faster(what: str, race: Record, base: str, goal: float) -> Goal:
    """A goal for steerlens' rate as a multiple of another's."""
    ours, other = race["entries"].get(OURS, {}), rates(race["entries"].get(base, {}))
    limit = ours["units"] / ours["limit_seconds"] / median(other) if other and rates(ours) else None
    return Goal(f"{what}, against {base}", ratio(race, OURS, base), goal, limit=limit)


def goals(model: str, races: list[Record]) -> Iterator[Goal]:
    """What a model's races are held against."""
    for race in races:
        figure, setting = race["figure"], race["setting"]
        if figure == "fixed":
            least = 1.2 if model == "tiny" else {"batch 1": 1.0, "batch 8": 1.05, "batch 32": 1.1}[setting]
            yield faster(f"fixed length, {setting}", race, UNSTEERED, least)
            for label, most in ((OURS, 3.0), (OURS_ROWS, 10.0)):
                over = [100 * (one - 1) for one in ratio(race, OURS_UNSTEERED, label)]
                what = "one vector" if label == OURS else "every row differently at five layers"
                yield Goal(f"overhead of {what}, {setting}, in %", over, most, at_most=True, form="{:.0f}")
            if setting == "batch 32":
                yield faster(f"fixed length, {setting}", race, ORIGINAL, 25)
        if figure == "natural":
            yield faster("natural lengths", race, HOOK, 1.5)
        if figure == "capture":
            for base, least in ((ORIGINAL, 6.0), ("steering-vectors", 3.0), ("repeng", 3.0)):
                yield faster("fit", race, base, least)
        if figure == "sweep":
            yield from (faster("sweep", race, base, 8) for base in (HOOK, *PEERS, ORIGINAL))
    grown = [race["entries"][OURS].get("grown_mib", [None]) for race in races if race["figure"] == "memory"]
    if len(grown) > 1 and all(None not in its for its in grown):
        # Flat: a tenth more, or what a garbage collector may leave lying about.
        what, flat = "memory of a fit, most pairs over fewest, in MiB", max(16, median(grown[0]) / 10)
        yield Goal(what, [median(grown[-1]) - median(grown[0])], flat, at_most=True, form="{:.0f}")


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)) + "\n"


def rate_cell(race: Record, label: str) -> str:
    """The rate, and how many times the first contestant's that is."""
    base = next(iter(race["entries"]))
    entry, times = race["entries"][label], ratio(race, label, base)
    return f"{median(rates(entry)):,.1f}" + (f" = {spread(times)} x" if times and label != base else "")


def first_cell(race: Record, label: str) -> str:
    return (
        f"{1000 * median(race['entries'][label]['seconds']):,.1f} ms, speed {spread(ratio(race, label, UNSTEERED))} x"
    )


def memory_cell(race: Record, label: str) -> str:
    grown, rate = race["entries"][label]["grown_mib"], rates(race["entries"][label])
    memory = "unknown" if None in grown else spread(grown, "{:,.0f}") + " MiB"
    return f"{memory} at {median(rate):,.1f} pairs/s"


CELLS: dict[str, Callable[[Record, str], str]] = {"first": first_cell, "memory": memory_cell}


def figure_table(figure: str, races: list[Record]) -> str:
    """A row for each contestant and a column for each setting, or the other way round where there are many settings."""
    labels = list(dict.fromkeys(label for race in races for label in race["entries"]))

    def cell(race: Record, label: str) -> str:
        entry = race["entries"].get(label, {})
        if not rates(entry):
            return "absent" if entry else ""
        return CELLS.get(figure, rate_cell)(race, label)

    columns = [[race["setting"], *(cell(race, label) for label in labels), limit_cell(race)] for race in races]
    head = [f"{races[0]['unit']}/s" if figure not in CELLS else "", *labels, "*limit of the machine*"]
    if len(races) > len(labels):
        return table(head, columns)
    return table(
        [head[0], *(column[0] for column in columns)], [list(row) for row in zip(head, *columns, strict=True)][1:]
    )


def mean_length(race: Record) -> str:
    """How long rows are that may stop by themselves."""
    said = race["entries"].get(OURS, {})
    if not rates(said):
        return ""
    length = said["units"] / said["agreement"]["rows"]
    return f"{race['setting']}: a row has {length:.0f} new tokens on average, what stops it included.\n"


def limit_cell(race: Record) -> str:
    ours = race["entries"].get(OURS, {})
    if not rates(ours):
        return ""
    share = ours["limit_seconds"] / median(ours["seconds"])
    return f"{ours['units'] / ours['limit_seconds']:,.1f}/s; {OURS} is at {share:.0%}"


def agreement(races: list[Record]) -> str:
    """How many rows and tokens were compared, and who differed where; and how far directions are apart."""
    entries = [(race, label, entry) for race in races for label, entry in race["entries"].items()]
    told = [
        (f"{label} ({race['figure']}, {race['setting']})", entry["agreement"])
        for race, label, entry in entries
        if "agreement" in entry
    ]
    total = {key: sum(one[key] for _, one in told) for key in ("rows", "tokens", "near_ties", "different_rows")}
    different = [f"{label}: {one['different_rows']} of {one['rows']}" for label, one in told if one["different_rows"]]
    off = {label: entry["difference"] for _, label, entry in entries if "difference" in entry and label != HOOK}
    return (
        f"Texts compared with Hugging Face's own in the same run: {total['rows']:,} rows, {total['tokens']:,} tokens, up to a "
        f"near tie in {total['near_ties']} rows; {total['different_rows']} rows differ"
        + f"{': ' * bool(different)}{'; '.join(different)}. Directions, against the hook's: "
        + f"{', '.join(f'{label} within {value:.0e}' for label, value in off.items()) or 'none'}.\n"
    )


def model_part(name: str, model: Record) -> str:
    races, machine, parameters = model["races"], model["machine"], model["parameters"]
    head = ["figure", "goal", "found, median [lowest, highest]", "", "at the machine's limit"]
    parts = [
        f"## {name}\n",
        table(head, [goal.row() for goal in goals(name, races)]),
        f"The machine: {machine['operations'] / 1e9:,.0f} GFLOP/s in a large float32 product, {machine['bytes'] / 1e9:,.1f} "
        f"GB/s of weights read. A step reads {4 * parameters / 1e6:,.0f} MB of weights, which takes at least "
        f"{4000 * parameters / machine['bytes']:,.2f} ms, and computes {2 * parameters / 1e9:,.3f} GFLOP for each row, at least "
        f"{2000 * parameters / machine['operations']:,.2f} ms.\n",
        agreement(races),
    ]
    for figure in dict.fromkeys(race["figure"] for race in races):
        shown = [race for race in races if race["figure"] == figure]
        parts += [f"### {TITLES[figure]}\n", figure_table(figure, shown)]
        if figure == "natural":
            parts += [mean_length(race) for race in shown]
    absent = {
        (label, entry["absent"]) for race in races for label, entry in race["entries"].items() if "absent" in entry
    }
    parts += [f"Absent: {label}: {reason}\n" for label, reason in sorted(absent)]
    return "\n".join(
        [*parts, f"Load of the machine when a figure began: at most {max(race['load'] for race in races)}.\n"]
    )


def markdown(found: Record) -> str:
    versions = next(iter(found["models"].values()))["versions"]
    names = list(dict.fromkeys(name for one in versions.values() for name in one))
    machine = f"{found['processor']}, {found['cores']} cores, {found['threads']} thread(s), {found['clock']} time"
    parts = [
        "# Speed and memory beside peers\n",
        f"`make bench` on {found['date']}: {machine}, float32, greedy. Written from `results.json` by `peers/results.py`.\n",
        INTRODUCTION,
        "![rates beside Hugging Face's](figures/peers.png)\n",
        *(model_part(name, model) for name, model in found["models"].items()),
        "## Versions\n",
        table(["", *names], [[venv, *(one.get(name, "") for name in names)] for venv, one in versions.items()]),
    ]
    return "\n".join(parts)


def figure(found: Record) -> go.Figure:
    """Each contestant's rate beside the first one's: sampling by batch, a fit and a sweep; a row of panels for each model."""
    shown = {"fixed": "", "natural": "natural lengths, ", "capture": "fit, ", "sweep": "sweep"}
    models = {
        name: [race for race in model["races"] if race["figure"] in shown] for name, model in found["models"].items()
    }
    titles = [
        f"{name}: {shown[race['figure']]}{race['setting'].split(',')[0] * (race['figure'] != 'sweep')}"
        for name, races in models.items()
        for race in races
    ]
    size = len(models), max(map(len, models.values()))
    fig = make_subplots(
        *size, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.015, vertical_spacing=0.16
    )
    labels = dict.fromkeys(label for races in models.values() for race in races for label in race["entries"])
    order = sorted((label for label in labels if label != UNSTEERED), key=lambda label: not label.startswith(OURS))[
        ::-1
    ]
    for row, races in enumerate(models.values(), 1):
        for column, race in enumerate(races, 1):
            place, base = {"row": row, "col": column}, next(iter(race["entries"]))
            found_here = {label: values for label in order if (values := ratio(race, label, base))}
            middle = [median(values) for values in found_here.values()]
            arms = {
                "array": [max(values) - m for values, m in zip(found_here.values(), middle, strict=True)],
                "arrayminus": [m - min(values) for values, m in zip(found_here.values(), middle, strict=True)],
            }
            colors = [CONDITION_COLORS["vector"] if label.startswith(OURS) else MUTED for label in found_here]
            fig.add_scatter(
                x=middle,
                y=list(found_here),
                error_x={**arms, "thickness": 1, "width": 3, "color": MUTED},
                mode="markers",
                marker={"size": 9, "color": colors},
                showlegend=False,
                **place,
            )
            fig.add_scatter(  # on the right, where no mark and no line is
                x=[25] * len(middle),
                y=list(found_here),
                mode="text",
                text=[f"{value:.2f}" for value in middle],
                textposition="middle left",
                textfont={"size": 11, "color": colors},
                showlegend=False,
                **place,
            )
            fig.add_vline(x=1, line={"color": INK, "width": 1, "dash": "dot"}, **place)
            ticks = {"tickvals": [0.03, 0.1, 0.3, 1, 3, 10], "range": [-1.8, 1.4]}
            fig.update_xaxes(type="log", title=f"times {base}", **ticks, **place)
    fig.update_yaxes(categoryorder="array", categoryarray=order)
    fig.update_annotations(font_size=12)
    return fig.update_layout(title="Rates in the same round: median, lowest and highest")


def write_results(found: Record, folder: Path, *, draw: bool) -> str:
    """Write `results.json` and RESULTS.md, and the figure if asked for; returns the text."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.json", json.dumps(found, indent=1) + "\n")
    text = markdown(found)
    write_atomically(folder / "RESULTS.md", text)
    if draw:
        save(figure(found), folder / "figures", "peers", width=1700, height=430 * len(found["models"]))
    return text
