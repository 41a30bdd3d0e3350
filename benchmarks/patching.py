"""How much faster a patching map is as rows of shared batches than as one run per cell.

    python benchmarks/patching.py --out runs/benchmarks/patching.json

The map: all layers x 24 positions of one pair (or a few), KL to the instructed run, on smollm2-135m; the instruction stands
before the query, so that as many positions align. One run per cell is the plain prompt alone with one patch, without the logits
of other tokens. They take turns, so that a busy machine slows both; what is reported is the ratio, per round, of seconds on the
clock and of the processor's. Values must agree.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro

import steerlens as sl
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.files import write_atomically
from steerlens.models.facts import library_versions, resid_post
from steerlens.models.passes import Read, run_pass
from steerlens.models.prompts import encode_all
from steerlens.models.rows import pad
from steerlens.reading.patches import Patch
from steerlens.reading.patching import patch

QUERIES = (
    "Why do leaves change their colour in autumn, and what happens to a tree in the weeks before the first snow falls?",
    "How would you explain to a child that the moon is not a lamp, though it looks so bright on a clear winter night?",
    "What should a small town look at before it decides to build a new bridge over the river next to the old mill?",
    "Which three things would you take along for a week in the mountains, if you had to carry all of them on your own?",
)
INSTRUCTION = "Answer in capital letters."


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    out: Path | None = None
    """A JSON file for the figures; default: print only."""
    model: str = "smollm2-135m"
    n_pairs: int = 1
    positions: int = 24
    batch_size: int = 64
    rounds: int = 3


def pairs_of(settings: Settings) -> PairSet:
    queries = QUERIES[: settings.n_pairs]
    return PairSet(InstructionPair(query, INSTRUCTION, prompt=f"{INSTRUCTION} {query}") for query in queries)


def by_cell(model: Any, pairs: PairSet, settings: Settings) -> list[float]:
    """KL of each cell, a run each."""
    layers = range(int(model.cfg.n_layers))
    offsets = torch.arange(-settings.positions, 0)
    found = []
    for pair in pairs:
        with_, without = encode_all(model, [pair.text("text"), pair.text("none")])
        reads = [Read(resid_post(layer), at=(len(with_) + offsets)[None]) for layer in layers]
        instructed = run_pass(model, pad([with_]), reads=reads)
        p = instructed.logits[0].float().log_softmax(-1)
        rows = pad([without])
        for layer in layers:
            for place, offset in enumerate(offsets):
                chosen, position = torch.tensor([place]), (len(without) + offset)[None]
                edit = Patch(resid_post(layer), instructed.reads[resid_post(layer)][0], chosen, position)
                q = run_pass(model, rows, edits=[edit]).logits[0].float().log_softmax(-1)
                found.append(float((p.exp() * (p - q)).sum()))
    return found


def clocks() -> tuple[float, float]:
    """Seconds on the clock, and of this process on the processor."""
    return time.perf_counter(), time.process_time()


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds of each round, the ratio, and the largest difference of a value."""
    model, pairs = sl.load_model(settings.model), pairs_of(settings)
    options: Any = {"positions": settings.positions, "control": False, "batch_size": settings.batch_size}
    patch(model, pairs[:1], **options | {"positions": 1})  # what the model can do is found out before
    rounds, differences = [], []
    for _ in range(settings.rounds):
        start = clocks()
        together = patch(model, pairs, **options).cells
        middle = clocks()
        one_by_one = by_cell(model, pairs, settings)
        end = clocks()
        differences.append(float((together["value"] - pd.Series(one_by_one)).abs().max()))
        rounds.append(
            {
                name: {"together": b - a, "one_by_one": c - b, "ratio": (c - b) / (b - a)}
                for name, a, b, c in zip(("wall", "processor"), start, middle, end, strict=True)
            }
        )
    return {
        "settings": {key: str(value) for key, value in asdict(settings).items()},
        "cells": len(one_by_one),
        "prompt_tokens": [len(ids) for ids in encode_all(model, pairs.prompts("none"))],
        "rounds": rounds,
        "ratio": statistics.median(one["wall"]["ratio"] for one in rounds),
        "largest_difference": max(differences),
        "versions": library_versions(),
    }


def main(settings: Settings) -> None:
    found = measure(settings)
    print(json.dumps(found, indent=2))
    if settings.out is not None:
        write_atomically(settings.out, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
