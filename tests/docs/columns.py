"""The columns of every table that the package makes, from small runs on `tiny`, in every setting that adds some."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

import steerlens as sl
from steerlens.steering.settings import SamplingConfig
from steerlens.study.arms import LayerStudy

LOWER, JSON = "change_case:english_lowercase", "detectable_format:json_format"
FEW: Any = {"max_new_tokens": 4, "batch_size": 64}

Columns = dict[str, list[str]]


def keys(path: Path) -> list[str]:
    """Of the records of a JSON Lines file."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(key for record in records for key in record))


def of(*frames: pd.DataFrame) -> list[str]:
    """In the order in which they are met, each once."""
    return list(dict.fromkeys(str(name) for frame in frames for name in frame.columns))


def all_columns(folder: Path) -> Columns:
    """Table -> columns; a table's name here is the heading of its part of docs/tables.md."""
    model = sl.load_model("tiny")
    pairs = sl.load_pairs("tiny", instructions=[LOWER, JSON], n_queries=12)
    train, valid, test = pairs.split(seed=0)
    acts = sl.record_activations(model, train)
    vectors = {name: sl.fit_steering_vector(part) for name, part in acts.by_instruction().items()}
    return {
        **inputs(model, train, acts, vectors[LOWER]),
        **evaluations(model, vectors, test[:4], folder / "evaluation"),
        **sweeps(model, vectors, valid[:4], folder / "sweep"),
        **runs(model, folder / "run"),
        **vocabulary(model, vectors[LOWER]),
        **geometry(model, vectors, acts, pairs),
        **studies(model, vectors, valid[:2], folder / "layers"),
        **attention(model, valid[:4]),
        **methods(model, vectors, test[:4], valid[:2], folder / "methods"),
        **statistics(),
    }


def inputs(model: Any, train: sl.PairSet, acts: sl.Activations, vector: sl.SteeringVector) -> Columns:
    out = sl.generate(model, train.prompts("none")[:1], steering=vector.at(4), max_new_tokens=2)
    return {
        "PairSet": of(train.to_frame()),
        "Activations": of(acts.to_frame()),
        "SteeringVector": of(vector.to_frame()),
        "Generations": of(out.to_frame()),
        "RidgeMap.scores": of(sl.vectors.fit_ridge_map(acts, acts, layers=[4]).scores(acts, acts)),
    }


def evaluations(model: Any, vectors: Mapping[str, sl.SteeringVector], test: sl.PairSet, out: Path) -> Columns:
    """With a made-up reward: a reward model is no part of the package."""
    plans = {name: vector.at(4, positions="prompt") for name, vector in vectors.items()}
    found = sl.evaluate(model, plans, test, trials=2, temperature=1.0, quality=sl.Quality(kl=True), out=out, **FEW)
    rewarded = sl.Evaluation(found.scores.assign(reward=0.0))
    gated = sl.evaluate(model, sl.plausible(sl.pasta(0.1)), test[:1], out=out / "gated", **FEW)
    return {
        "generations.jsonl": keys(out / "generations.jsonl") + keys(out / "gated" / "generations.jsonl"),
        "scores": of(rewarded.scores, gated.scores),
        "table": of(rewarded.table, gated.table),
        "comparisons": of(found.comparisons),
    }


def sweeps(model: Any, vectors: Mapping[str, sl.SteeringVector], valid: sl.PairSet, out: Path) -> Columns:
    options: Any = {"trials": 2, "temperature": 1.0, "quality": sl.Quality(kl=True), "out": out, **FEW}
    found = sl.sweep(model, vectors, valid, layers=[3, 4], operators="add", coeffs=[4.0], **options)
    return {
        "Sweep.table": of(pd.read_csv(out / "table.csv")),
        "Sweep.configurations": of(found.configurations),
        "Sweep.nested": of(found.nested(folds=2)),
    }


def runs(model: Any, out: Path) -> Columns:
    """A run with everything that is seen of its vectors, and every file that it leaves."""
    sizes: Any = {"n_train": 4, "n_valid": 2, "n_test": 2, "layers": (4,), "search_tokens": 4, "batch_size": 64}
    config = sl.study.RunConfig(instructions=(LOWER, JSON), sampling=SamplingConfig(4), kl=True, **sizes)
    sl.study.run(config, out, model=model, progress=False)
    return {
        "search.csv": of(pd.read_csv(out / "search.csv")),
        **{
            f"{path.parent.name}/{path.name}": of(pd.read_csv(path))
            for kind in ("lens", "geometry")
            for path in sorted((out / kind).glob("*.csv"))
        },
    }


def vocabulary(model: Any, vector: sl.SteeringVector) -> Columns:
    read = sl.prompt_lens(model, "Describe rain.", steering=vector.at(4), targets=" the", layers=[4])
    effects = sl.reading.vector_effects(model, vector, ["Describe rain."], coeff=4.0, layers=[4])
    return {
        "logit_lens": of(sl.logit_lens(model, vector, layer=4, top_k=1, targets="rain").table),
        "vector_effects": of(effects.table),
        "vector_effects per_prompt": of(effects.per_prompt),
        "prompt_lens": of(read.table),
        "prompt_lens targets": of(read.targets),
    }


def geometry(model: Any, vectors: Mapping[str, sl.SteeringVector], acts: sl.Activations, pairs: sl.PairSet) -> Columns:
    space = sl.embed(acts, layers=4, method="pca", n_components=3)
    measured, patched = (
        sl.reading.diagnose(acts, layers=4),
        sl.reading.patch(model, pairs[:2], layers=[4], positions=[-1]),
    )
    queries = ["Describe rain.", "What is iron?", "What is snow?"]
    asked = sl.PairSet([pair for n in (1, 2, 3) for pair in sl.sentence_pairs(queries, "at_most", n)])
    numbers = [pair.kwargs[0]["num_sentences"] for pair in asked]
    lengths = sl.reading.line(sl.record_activations(model, asked), numbers, layers=4)
    assert space.explained is not None
    return {
        "embed": of(space.table),
        "embed explained": of(space.explained),
        "cosines": of(sl.cosines(vectors, layer=4).table, sl.reading.layer_cosines(vectors[LOWER]).table),
        "separability": of(sl.reading.separability(acts, layers=4, folds=2).table),
        "diagnose": of(measured.table),
        "diagnose profiles": of(measured.profiles),
        "line": of(lengths.table),
        "line points": of(lengths.points),
        "patch": of(patched.table),
        "patch cells": of(patched.cells),
        "attribute": of(sl.reading.attribute(model, vectors, pairs[:4], layer=3, n_random=2).table),
    }


def studies(model: Any, vectors: Mapping[str, sl.SteeringVector], valid: sl.PairSet, out: Path) -> Columns:
    ask: dict[str, Any] = {
        "steer_by_layer": sl.study.steer_by_layer,
        "necessity": sl.study.necessity,
        "transfer_between_layers": sl.study.transfer_between_layers,
    }
    found: dict[str, LayerStudy] = {
        name: study(model, vectors, valid, layers=[4], out=out / name, **FEW) for name, study in ask.items()
    }
    return {
        **{name: of(pd.read_csv(out / name / "table.csv")) for name in ask},
        "study scores": of(*(one.scores for one in found.values())),
        "study comparisons": of(*(one.comparisons for one in found.values())),
    }


def attention(model: Any, valid: sl.PairSet) -> Columns:
    masses = sl.attention_mass(model, valid, steering=sl.pasta(), layers=[3])
    gated = sl.generate(
        model, valid.prompts("text"), steering=[sl.directer().on(pair) for pair in valid], max_new_tokens=2
    )
    profile = sl.profile_heads(model, valid, layers=[3], **FEW)
    return {
        "attention_mass": of(masses.table),
        "attention_mass per_prompt": of(masses.per_prompt),
        "gate_table": of(sl.reading.gate_table(model, gated)),
        "profile_heads": of(profile.table),
        "profile_heads scores": of(*(one for one in [profile.scores] if one is not None)),
        "HeadProfile.held_out": of(profile.held_out(folds=2)),
    }


def methods(
    model: Any, vectors: Mapping[str, sl.SteeringVector], test: sl.PairSet, valid: sl.PairSet, out: Path
) -> Columns:
    """With a gate, and timed; a made-up divergence and reward."""
    plans = {name: sl.plausible(vector.at(4)) for name, vector in vectors.items()}
    options: dict[str, Any] = {"valid": valid, "rounds": 1, "trials": 2, "temperature": 1.0, "out": out, **FEW}
    found = sl.study.compare_methods(model, {"gated": plans}, test, **options)
    more = sl.study.MethodComparison.of(found.scores.assign(kl=0.0, reward=0.0))
    return {
        "compare_methods": of(pd.read_csv(out / "table.csv"), more.table),
        "compare_methods validation": of(more.validation),
        "compare_methods comparisons": of(found.comparisons),
        "compare_methods by instruction": of(more.by_instruction),
        "compare_methods scores": of(more.scores),
        "measure_speed": of(pd.read_csv(out / "speed.csv")),
    }


def statistics() -> Columns:
    """Of functions that take a frame: what they add to it, or make of it."""
    curve = pd.DataFrame({"prompt_id": "a", "coeff": [0.0, 1.0], "propensity": [0.0, 3.0]})
    asked = pd.DataFrame({"query": [None], "response": ["Rain."]})
    judged = sl.study.judge_frame(asked, sl.study.Judge("http://localhost:1/v1", "none"), progress=False)
    return {
        "sample_slopes": of(sl.stats.sample_slopes(curve)),
        "judge_frame": [name for name in judged if name not in asked],
    }
