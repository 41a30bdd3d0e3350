"""How much faster a patching map is as rows of shared batches than as one run per cell.

    python benchmarks/patching.py --out runs/benchmarks/patching.json

The map: all layers x 24 positions of one pair (or a few), KL to the instructed run, on smollm2-135m; the instruction stands
before the query, so that as many positions align. One run per cell is the plain prompt alone with one patch, without the logits
of other tokens; TransformerLens' own is `patching.generic_activation_patch`, with them. What is reported is how many times the
seconds of the shared batches these take, on the clock and of the processor. Values must agree.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from contest import report, take_turns

import steerlens as sl
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.models.facts import resid_post
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


def by_transformer_lens(model: Any, pairs: PairSet, settings: Settings) -> list[float]:
    """The same by `patching.generic_activation_patch`."""
    from transformer_lens.patching import generic_activation_patch

    index = pd.DataFrame(
        product(range(int(model.cfg.n_layers)), range(-settings.positions, 0)), columns=["layer", "pos"]
    )
    found: list[float] = []
    for pair in pairs:
        with_, without = (torch.tensor([ids]) for ids in encode_all(model, [pair.text("text"), pair.text("none")]))
        with torch.inference_mode():
            logits, cache = model.run_with_cache(with_, names_filter=lambda name: name.endswith("hook_resid_post"))
            p = logits[0, -1].float().log_softmax(-1)

            def kl(logits: torch.Tensor, p: torch.Tensor = p) -> torch.Tensor:
                return (p.exp() * (p - logits[0, -1].float().log_softmax(-1))).sum()

            def write(resid: torch.Tensor, index: Any, clean: torch.Tensor) -> torch.Tensor:
                _, position = index
                resid[:, position] = clean[:, position]  # counted from the end, on both sides
                return resid

            values = generic_activation_patch(model, without, cache, kl, write, "resid_post", index_df=index)
        found += values.flatten().tolist()
    return found


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds and ratios, and the largest difference of a value."""
    model, pairs = sl.load_model(settings.model), pairs_of(settings)
    model.eval()
    options: Any = {"positions": settings.positions, "control": False, "batch_size": settings.batch_size}
    patch(model, pairs[:1], **options | {"positions": 1})  # what the model can do is found out before
    contestants = {
        "together": lambda: patch(model, pairs, **options).cells["value"].tolist(),
        "one_by_one": lambda: by_cell(model, pairs, settings),
        "transformer_lens": lambda: by_transformer_lens(model, pairs, settings),
    }
    results, found = take_turns(contestants, settings.rounds)
    values = torch.tensor([list(one.values()) for one in results])  # [round, contestant, cell]
    return {
        "cells": values.shape[-1],
        "prompt_tokens": [len(ids) for ids in encode_all(model, pairs.prompts("none"))],
        **found,
        "largest_value": float(values.max()),
        "largest_difference": float((values - values[:, :1]).abs().max()),
    }


if __name__ == "__main__":
    asked = tyro.cli(Settings)
    report(asked, measure(asked))
