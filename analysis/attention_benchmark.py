"""Steering through attention, through the residual stream, and by both: who follows, at what price in quality and time?

    python analysis/attention_benchmark.py --out runs/analysis/attention_benchmark

The design is that of AISteer360's notebook on PASTA: single-instruction prompts of four types of IFEval, at most twelve of
each, a sweep over strengths, strict accuracy beside quality. Here every method of steering stands beside every other:

    PASTA          alpha times the attention on the instruction: all heads; the notebook's middle layers; profiled heads
    SpotLight      the instruction's share of attention is taken to a target
    InstABoost     M times the attention on the instruction
    DIRECTER       the instruction's keys times alpha, where that is plausible (beta)
    vector         format vectors, added with a coefficient in mean residual norms; to avoid words, the vectors of asking for
                   them are subtracted
    ... + gate     the same, where that is plausible (beta), else with a smaller coefficient or on fewer layers

`PASTA` with alpha 100 is the paper's default: alpha 0.01 on the rest of the prompt. What the notebook does not have: settings
are chosen on validation prompts of other queries and reported on the test prompts, beside the whole sweep; intervals are over
prompts, tests are paired with the instruction alone; every chosen setting has its control, random directions or random
tokens; text and seeds are kept, so a run that was cut short goes on.

Prompts are bundled ones, or those of a file: Split-IFEval, the files of llm-steer-instruct, or IFEval with its base queries:

    python analysis/attention_benchmark.py --model smollm2-135m --data input_data.jsonl --queries ifeval_wo_instructions.jsonl ...

Prompts whose instruction is woven into the query, so that no span of the prompt is it, are left out (prompts.csv counts
them). Words to avoid in bundled prompts are words that the model says without the instruction, so `none` is at zero there by
construction.

Tables: `methods` has a row per method and setting on the test prompts, `validation` what was chosen on, `comparisons` the
paired tests of chosen settings, `by_instruction` the rates of each type, `sensitivity` how the rate goes with the strength,
`heads` what single heads gain, `examples` a row per response. `profiles.json` has all of it by method. The figure `gates`
shows the same strengths with and without a gate.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import tyro
from plotly.subplots import make_subplots
from study import Frames, Lab, Study, conduct, lab

from steerlens.checks.arguments import LANGUAGE
from steerlens.data.families import keyword_pairs
from steerlens.data.load import load_pairs
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import DataError, SteerlensError
from steerlens.figures.attention import head_profile_map
from steerlens.figures.methods import instruction_strength_heatmap, method_comparison
from steerlens.figures.theme import CONDITION_COLORS
from steerlens.files import write_atomically
from steerlens.stats.slopes import steerability_summary
from steerlens.steering.attention import instaboost, pasta, spotlight
from steerlens.steering.candidates import grid
from steerlens.steering.directer import directer, plausible
from steerlens.steering.plan import Plan
from steerlens.study.methods import MethodComparison, Setting, compare_methods, swept
from steerlens.study.profiling import HeadProfile, profile_heads
from steerlens.study.quality import Quality
from steerlens.vectors.estimators import fit_vectors
from steerlens.vectors.vector import SteeringVector

FORBIDDEN = "keywords:forbidden_words"
TYPES = (FORBIDDEN, "detectable_format:number_highlighted_sections", LANGUAGE, "startend:end_checker")
"""The notebook's instruction types."""
TINY_TYPES = (*TYPES, "change_case:english_capital", "change_case:english_lowercase")
"""... and two more that the tiny models know, and do not always follow."""


PROFILED = "PASTA, profiled heads"


@dataclass(frozen=True)
class Settings(Study):
    out: Path = Path("runs/analysis/attention_benchmark")
    n_train: int = 20
    n_valid: int = 6
    n_test: int = 12
    """Test prompts of each type, at most."""
    max_new_tokens: int = 128
    queries: Path | None = None
    """Base queries of official IFEval, by key."""
    instructions: tuple[str, ...] = ()
    """Types; default: the notebook's four, and for the tiny models two more."""
    methods: tuple[str, ...] = ()
    """Which to run; default: all."""
    trials: int = 1
    """Responses per prompt and setting; more than one needs a temperature."""
    temperature: float = 0.0
    pasta_alphas: tuple[float, ...] = (5, 10, 15, 20, 25, 30, 100)
    spotlight_targets: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    instaboost_multiples: tuple[float, ...] = (2, 5, 10, 20)
    directer_betas: tuple[float, ...] = (0.75, 0.5, 0.25, 0.1)
    """From the weakest on; the strength of a curve is 1/beta."""
    directer_alphas: tuple[float, ...] = (2, 10, 1000)
    """At beta 0.5, besides 100."""
    coeffs: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    """Of vectors, in mean residual norms."""
    text_coeffs: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    """... where the instruction stands in the prompt."""
    n_profile: int = 6
    """Validation prompts of each type on which heads are profiled; 0 leaves profiled heads out."""
    profile_layers: tuple[int, ...] = ()
    """Layers whose heads are tried; default: all."""
    best_layers: int | None = None
    """Try whole layers first, and then the heads of so many; default: all heads."""
    profile_alpha: float = 0.01
    """Of the rest of the prompt's attention, at a single head."""
    gate_betas: tuple[float, ...] = (0.5, 0.01)
    """Of the gates around vectors and PASTA: DIRECTER's, and one that lets more pass."""
    gate_kls: tuple[float, ...] = ()
    """Of more gates around vectors: the largest divergence of steered from unsteered that they let pass, in nats."""
    rounds: int = 3
    """Of timing, a batch of eight prompts; 0 times nothing."""
    reward_model: str | None = None
    """A folder or hub id of a sequence classifier with one label, which then is the quality."""


@dataclass(frozen=True)
class Prompts:
    """Pairs to fit on by the name of a vector, to choose on, and to test."""

    train: Mapping[str, PairSet]
    valid: PairSet
    test: PairSet
    counts: pd.DataFrame


def words_of(pair: InstructionPair) -> list[str]:
    """The words that a pair asks to avoid."""
    return [word for kwargs in pair.kwargs for word in kwargs.get("forbidden_words", [])]


def per_type(pairs: Iterable[InstructionPair], n: int, seed: int) -> PairSet:
    """Of each type n pairs, or all where there are fewer; languages are one type."""
    groups: dict[str, list[InstructionPair]] = {}
    for pair in pairs:
        groups.setdefault(pair.instruction_ids[0], []).append(pair)
    return PairSet(pair for group in groups.values() for pair in PairSet(group).sample(min(n, len(group)), seed=seed))


def stands_apart(pair: InstructionPair) -> bool:
    """Whether the instruction is a span of the prompt."""
    try:
        return pair.instruction_span[0] < pair.instruction_span[1]
    except DataError:
        return False


def gather(here: Lab, settings: Settings) -> Prompts:
    """The prompts of every type: tested ones from the file or the bundle, all others from the bundle."""
    types = settings.instructions or (TINY_TYPES if settings.pairs == "tiny" else TYPES)
    left_out: dict[str, int] = {}
    languages = [f"{LANGUAGE}_es"]
    if settings.data is None:
        test = dealt(here, types, languages, 2, settings.n_test)
    else:
        single = [pair for pair in here.parts[2] if len(pair.instruction_ids) == 1 and pair.instruction_ids[0] in types]
        test = [pair for pair in single if stands_apart(pair)]
        for pair in single:
            left_out[pair.instruction_ids[0]] = left_out.get(pair.instruction_ids[0], 0) + (not stands_apart(pair))
    tested = per_type(test, settings.n_test, settings.seed)
    names = [name for name in tested.instructions if name != FORBIDDEN]
    languages = [name for name in names if name.startswith(LANGUAGE)]
    chosen_on = PairSet(dealt(here, types, languages, 1, settings.n_valid))
    train = PairSet(bundled(settings, names, here.train)).by_instruction()
    for word in dict.fromkeys(word for pair in (*tested, *chosen_on) for word in words_of(pair)):
        train[f"include {word}"] = keyword_pairs(here.train, word, "include", seed=settings.seed)
    counts = [
        {
            "instruction": name,
            "n_test": sum(pair.instruction_ids[0] == name for pair in tested),
            "n_valid": sum(pair.instruction_ids[0] == name for pair in chosen_on),
            "left_out": left_out.get(name, 0),
        }
        for name in types
    ]
    return Prompts(train, chosen_on, tested, pd.DataFrame(counts))


def dealt(here: Lab, types: Sequence[str], languages: Sequence[str], part: int, n: int) -> list[InstructionPair]:
    """n bundled pairs of each type, on queries of one part; types share queries only where there are too few."""
    queries = list({pair.query_key: str(pair.query) for pair in here.parts[part]}.values())
    found = []
    for place, name in enumerate(types):
        own = [queries[(place * n + i) % len(queries)] for i in range(min(n, len(queries)))]
        if name == FORBIDDEN:
            found += excluded(here, own)
        elif name == LANGUAGE:
            for i, query in enumerate(own[: n if languages else 0]):
                found += bundled(here.settings, [languages[i % len(languages)]], [query])
        else:
            found += bundled(here.settings, [name], own)
    return found


def bundled(settings: Study, ids: Sequence[str], queries: Sequence[str]) -> list[InstructionPair]:
    """The bundled pairs of these instructions and queries."""
    wanted = set(queries)
    pairs = load_pairs(settings.pairs, instructions=ids, seed=settings.seed) if ids else []
    return [pair for pair in pairs if pair.query in wanted]


def excluded(here: Lab, queries: Sequence[str]) -> list[InstructionPair]:
    """Each query with a word to avoid that the model says in its answer."""
    return [
        pair
        for query, word in here.said_words(queries).items()
        for pair in keyword_pairs([query], word, "exclude", seed=here.settings.seed)
    ]


# --- methods ---------------------------------------------------------------------------------------------------------


def steered(
    coeff: float,
    vectors: Mapping[str, SteeringVector],
    layer: int,
    positions: str,
    gate: Mapping[str, Any] | None = None,
) -> Callable[[InstructionPair], Plan]:
    """What adds the vector of a pair's instruction, or subtracts those of its words; behind a gate where one is described."""

    def plan_of(pair: InstructionPair) -> Plan:
        options: Any = {"operator": "add", "unit": "resid_norm", "positions": positions}
        plan = Plan()
        for word in words_of(pair):
            plan += vectors[f"include {word}"].at(layer, coeff=-coeff, **options)
        if not plan:
            plan = vectors[pair.instruction_id].at(layer, coeff=coeff, **options)
        return plan if gate is None else plausible(plan, **gate)

    return plan_of


def search(
    here: Lab, vectors: Mapping[str, SteeringVector], valid: PairSet, condition: str, positions: str, coeffs: Any
) -> int:
    """The layer that does best on the validation prompts of all types; the middle one where none beats no steering."""
    groups: dict[str, list[InstructionPair]] = {}
    for pair in valid:
        words = words_of(pair)
        groups.setdefault(f"include {words[0]}" if words else pair.instruction_id, []).append(pair)
    signed = [
        (-1.0 * vectors[name] if name.startswith("include ") else vectors[name], PairSet(group))
        for name, group in groups.items()
    ]
    steps = grid(layers=here.layers, coeffs=coeffs, operators="add", positions=positions, unit="resid_norm")
    best = here.best_for_all(signed, steps, condition, strict=True)
    return here.layers[len(here.layers) // 2] if best.layer is None else int(best.layer)


def profiled(here: Lab, settings: Settings, valid: PairSet) -> HeadProfile:
    """What each head gains alone, on few validation prompts of each type; languages are left out where they are several."""
    few = per_type(valid, settings.n_profile, settings.seed)
    several = sum(name.startswith(LANGUAGE) for name in few.instructions) > 1
    return profile_heads(
        here.sampler,
        PairSet(pair for pair in few if not (several and pair.instruction_ids[0] == LANGUAGE)),
        coeff=settings.profile_alpha,
        layers=settings.profile_layers or None,
        best_layers=settings.best_layers,
        seed=settings.seed,
    )


def best_heads(profile: HeadProfile) -> dict[int, tuple[int, ...]]:
    """The heads among the best quarter of every instruction; where there are none, among the best half, and so on."""
    for times in (1, 2, 3):
        try:
            return profile.heads(k=times * profile.k)
        except SteerlensError:
            continue
    return profile.heads(combine="union")


def all_methods(
    here: Lab, settings: Settings, prompts: Prompts, profile: HeadProfile | None
) -> dict[str, list[Setting]]:
    """The settings of every method that is wanted."""
    n_layers = int(here.model.cfg.n_layers)
    middle = range(n_layers * 8 // 28, n_layers * 24 // 28)  # the notebook's layers 8 to 23 of 28
    include: Any = {"scale": "include"}
    found: dict[str, list[Setting]] = {
        "PASTA": swept(pasta, settings.pasta_alphas, "alpha", **include),
        "PASTA, middle layers": swept(pasta, settings.pasta_alphas, "alpha", heads=list(middle), **include),
        "PASTA + gate": swept(gated_pasta, settings.pasta_alphas, "alpha", beta=settings.gate_betas[0]),
        "SpotLight": swept(spotlight, settings.spotlight_targets, "target"),
        "InstABoost": swept(lambda m: instaboost(math.log(m)), settings.instaboost_multiples, "M"),
        "DIRECTER": [Setting(directer(beta=beta), f"beta {beta:g}", 1 / beta) for beta in settings.directer_betas],
        "DIRECTER by alpha": swept(directer, settings.directer_alphas, "alpha"),
    }
    if profile is not None:
        found[PROFILED] = swept(pasta, settings.pasta_alphas, "alpha", heads=best_heads(profile), **include)
    wanted = settings.methods
    if not wanted or any("vector" in name for name in wanted):
        found |= vector_methods(here, settings, prompts)
    if unknown := set(wanted) - set(found):
        raise DataError(f"no method is called {sorted(unknown)[0]!r}; there are {', '.join(found)}")
    return {name: rows for name, rows in found.items() if not wanted or name in wanted}


def vector_methods(here: Lab, settings: Settings, prompts: Prompts) -> dict[str, list[Setting]]:
    """Vectors at the layers that the validation prompts choose, without and with the instruction, without and with a gate."""
    vectors = fit_vectors(here.model, dict(prompts.train), progress=True)
    found = {}
    for condition, coeffs in (("vector", settings.coeffs), ("text+vector", settings.text_coeffs)):
        for positions in settings.positions:
            name = condition if positions == "all" else f"{condition}, {positions} token"
            layer = search(here, vectors, prompts.valid, condition, positions, sorted(coeffs)[1:3])
            options: Any = {"vectors": vectors, "layer": layer, "positions": positions}
            with_text = condition.startswith("text")
            gates: dict[str, Any] = {name: None}
            if positions == "all":  # a gate steers new tokens, of which the prompt's last one opens only the first
                gates |= {
                    f"{name} + gate" + f", beta {beta:g}" * bool(place): {"beta": beta}
                    for place, beta in enumerate(settings.gate_betas)
                }
                gates |= {
                    f"{name} + gate, KL {limit:g}": {"criterion": "kl", "limit": limit} for limit in settings.gate_kls
                }
            for label, gate in gates.items():
                make = partial(steered, gate=gate, **options)
                found[label] = [
                    Setting(make(coeff), f"{coeff:g} at layer {layer}", coeff, with_text) for coeff in coeffs
                ]
    return found


def gated_pasta(alpha: float, beta: float) -> Plan:
    """PASTA where it is plausible."""
    return plausible(pasta(alpha, scale="include"), beta=beta)


# --- what is measured ------------------------------------------------------------------------------------------------


def measure(settings: Settings) -> Frames:
    with lab(settings) as here:
        prompts = gather(here, settings)
        profile = None
        if settings.n_profile and (not settings.methods or PROFILED in settings.methods):
            profile = profiled(here, settings, prompts.valid)
            profile.save(settings.out / "heads.json")
        found = compare_methods(
            here.sampler,
            all_methods(here, settings, prompts, profile),
            prompts.test,
            valid=prompts.valid,
            verdict="strict",
            rounds=settings.rounds,
            trials=settings.trials,
            seed=settings.seed,
            quality=Quality(reward_model=settings.reward_model),
        )
    write_atomically(settings.out / "profiles.json", json.dumps(profiles(found), indent=1) + "\n")
    columns = [
        *("prompt_id", "instruction", "method", "setting", "strength", "control", "trial", "seed"),
        *("followed_strict", "followed", "degenerate", "perplexity", "repetition", "n_tokens", "finish_reason"),
        *("reward" for _ in range(settings.reward_model is not None)),
    ]
    tested = found.scores[found.scores["split"] == "test"]
    return {
        "prompts": prompts.counts,
        "methods": found.table,
        "validation": found.validation,
        "comparisons": found.comparisons,
        "by_instruction": by_type(found),
        "sensitivity": sensitivity(tested),
        "heads": pd.DataFrame(columns=["instruction", "layer", "head", "gain"]) if profile is None else profile.table,
        "examples": tested[columns],
    }


def by_type(found: MethodComparison) -> pd.DataFrame:
    """The rates of each type; the languages together."""
    names = found.scores["instruction"].str.replace(rf"^{LANGUAGE}_\w+$", LANGUAGE, regex=True)
    return MethodComparison.of(found.scores.assign(instruction=names), found.verdict).by_instruction


def sensitivity(tested: pd.DataFrame) -> pd.DataFrame:
    """How each method's strict rate goes with its strength: the slope per doubling, and prompts that go the other way.

    `unsettled` is the share of prompts that some strengths follow on and others do not.
    """
    rows = []
    for method, scores in tested[~tested["control"] & (tested["strength"] > 0)].groupby("method", sort=False):
        mean = scores.groupby(["prompt_id", "strength"])["followed_strict"].mean().rename("followed").reset_index()
        rates = mean.groupby("strength")["followed"].mean()
        if len(rates) < 2:
            continue
        slope = steerability_summary(mean.assign(coeff=np.log2(mean["strength"])), value="followed")
        varies = mean.groupby("prompt_id")["followed"].agg(lambda one: one.max() > one.min())
        row = (slope.n, rates.index[0], rates.index[-1], rates.min(), rates.max(), slope.slope, slope.spearman)
        rows.append(
            (method, *row, slope.anti_steerable, slope.anti_steerable_low, slope.anti_steerable_high, varies.mean())
        )
    columns = ["method", "n", "weakest", "strongest", "lowest_rate", "highest_rate", "slope_per_doubling", "spearman"]
    return pd.DataFrame(rows, columns=[*columns, "anti_steerable", "anti_low", "anti_high", "unsettled"])


def profiles(found: MethodComparison) -> dict[str, list[dict[str, Any]]]:
    """By method, its settings with their rates and the verdict on every prompt."""
    tested = found.scores[found.scores["split"] == "test"]
    groups = dict(list(tested.groupby(["method", "setting", "control"], sort=False)))
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in found.table.to_dict("records"):
        rows = groups[row["method"], row["setting"], row["control"]]
        verdicts = rows.groupby("prompt_id", sort=False)["followed_strict"].agg(list).to_dict()
        plain = {name: None if value != value else value for name, value in row.items() if name != "method"}
        by_method.setdefault(row["method"], []).append(plain | {"followed_strict": verdicts})
    return json.loads(json.dumps(by_method, default=lambda value: value.item()))  # type: ignore[no-any-return]


# --- figures ---------------------------------------------------------------------------------------------------------


def draw(frames: Frames) -> dict[str, go.Figure]:
    table = frames["methods"].fillna({"setting": ""})
    shown = table[~table["control"]].rename(columns={"low": "rate_low", "high": "rate_high"})
    if "tokens_per_second" not in shown:
        shown = shown.assign(tokens_per_second=np.nan)
    quality = "reward" if "mean_reward" in shown else "log probability (nats)"
    return {
        "methods": method_comparison(shown, quality=quality),
        "by_instruction": instruction_strength_heatmap(frames["by_instruction"].fillna({"setting": ""})),
        "comparisons": draw_comparisons(frames["comparisons"]),
        **({"heads": head_profile_map(typed(frames["heads"]))} if len(frames["heads"]) else {}),
        **({"gates": draw_gates(table)} if any(table["method"].str.contains(" + gate", regex=False)) else {}),
    }


def typed(table: pd.DataFrame) -> pd.DataFrame:
    """Heads as whole numbers beside missing ones."""
    return table.astype({"head": "Int64"})


def draw_comparisons(table: pd.DataFrame) -> go.Figure:
    """The difference of each chosen setting to the instruction alone, and to its own control."""
    figure = go.Figure()
    colors = {"text": CONDITION_COLORS["text"], "control": CONDITION_COLORS["random"]}
    for baseline, color in colors.items():
        rows = table[(table["baseline"] == baseline) & (table["method"] != "none")].iloc[::-1]
        labels = [
            f"{row.method}{f', {row.setting}' if isinstance(row.setting, str) and row.setting else ''}"
            for row in rows.itertuples()
        ]
        figure.add_scatter(
            x=rows["difference"], y=labels, mode="markers", marker={"size": 10, "color": color},
            name={"text": "minus the instruction alone", "control": "minus its control"}[baseline],
            error_x={
                "array": rows["high"] - rows["difference"], "arrayminus": rows["difference"] - rows["low"],
                "type": "data", "color": color, "thickness": 1,
            },
            hovertext=[f"p {p:.3g}, by Holm {adjusted:.3g}" for p, adjusted in zip(rows["p_value"], rows["p_holm"], strict=True)],
        )  # fmt: skip
    figure.add_vline(x=0, line={"color": "#1F2328", "width": 1})
    figure.update_xaxes(title_text="difference of the strict rates on test prompts", tickformat="+.0%")
    n = len(table.loc[table["baseline"] == "text"])
    return figure.update_layout(
        title_text="Settings chosen on validation prompts, on test prompts", showlegend=True, width=1000,
        height=180 + 34 * n, margin={"t": 90, "l": 320},
    )  # fmt: skip


def draw_gates(table: pd.DataFrame) -> go.Figure:
    """Following against quality along the strengths, with and without a gate: what the gate does to the trade-off."""
    table = table[~table["control"]].assign(base=table["method"].str.split(" + gate", regex=False).str[0])
    groups = {str(name): rows for name, rows in table.groupby("base", sort=False) if rows["method"].nunique() > 1}
    colors = [CONDITION_COLORS[name] for name in ("random", "vector", "text", "text+vector")] + ["#CC79A7", "#56B4E9"]
    figure = make_subplots(
        rows=len(groups), cols=2, shared_yaxes=True, horizontal_spacing=0.06, vertical_spacing=0.3 / len(groups),
        row_titles=list(groups),
    )  # fmt: skip
    for row, (base, steered) in enumerate(groups.items(), 1):
        for (name, rows), color in zip(steered.groupby("method", sort=False), cycle(colors), strict=False):
            label = str(name).removeprefix(f"{base} + ") if name != base else "without a gate"
            for col, x in ((1, "mean_repetition"), (2, "median_perplexity")):
                figure.add_scatter(
                    x=rows[x], y=rows["rate"], mode="lines+markers+text", line={"color": color}, marker={"size": 8},
                    text=[f"{strength:g}" * (name == base) for strength in rows["strength"]],
                    hovertext=[f"{strength:g}" for strength in rows["strength"]], textposition="top center", name=label,
                    showlegend=col == 1 and label not in {trace.name for trace in figure.data}, legendgroup=label,
                    row=row, col=col,
                )  # fmt: skip
        figure.update_yaxes(title_text="followed, strictly", tickformat="~%", range=[-0.05, 1.1], row=row, col=1)
        figure.update_xaxes(tickformat="~%", row=row, col=1)
        figure.update_xaxes(type="log", row=row, col=2)
    figure.update_xaxes(title_text="repeated trigrams", row=len(groups), col=1)
    figure.update_xaxes(title_text="median perplexity, unsteered model", row=len(groups), col=2)
    return figure.update_layout(
        title_text="The same strengths (numbers) with and without a gate", showlegend=True, width=1000,
        height=140 + 280 * len(groups), margin={"t": 90},
    )  # fmt: skip


TABLES = ["prompts", "methods", "validation", "comparisons", "by_instruction", "sensitivity", "heads", "examples"]

if __name__ == "__main__":
    conduct(tyro.cli(Settings, description=__doc__), measure, draw, TABLES)
