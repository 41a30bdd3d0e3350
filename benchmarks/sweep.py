"""How much faster a sweep is as rows of shared batches than its configurations one after another.

    python benchmarks/sweep.py --out runs/benchmarks/sweep.json

The sweep: 4 layers x 3 coefficients x 12 instructions on `tiny`, greedy. Both contestants call `generate`: the sweep once
with all rows, the other one configuration at a time, each with its prompts as one batch. What is reported is how many
times the sweep's seconds these take. Texts must be identical.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from contest import report, take_turns

import steerlens as sl
from steerlens.data.pairs import PairSet
from steerlens.steering.candidates import Candidate, grid
from steerlens.steering.plan import Plan
from steerlens.vectors.vector import SteeringVector


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    out: Path | None = None
    """A JSON file for the figures; default: print only."""
    model: str = "tiny"
    pairs: str = "tiny"
    instructions: tuple[str, ...] = ()
    """Ids; default: all twelve."""
    layers: tuple[int, ...] = (1, 3, 5, 7)
    coeffs: tuple[float, ...] = (0.5, 1.0, 1.5)
    n_prompts: int = 4
    """Prompts per configuration."""
    max_new_tokens: int = 32
    batch_size: int = 256
    rounds: int = 3
    positions: str = "all"


def prepare(settings: Settings) -> tuple[Any, list[tuple[str, Plan]], list[list[tuple[str, Plan]]]]:
    """The model, all rows of the sweep, and the same rows by configuration."""
    model = sl.load_model(settings.model)
    train, valid, _ = sl.load_pairs(settings.pairs, instructions=settings.instructions or None).split()
    vectors = {
        name: sl.fit_steering_vector(sl.record_activations(model, group.sample(8)))
        for name, group in train.by_instruction().items()
    }
    candidates = grid(layers=settings.layers, coeffs=settings.coeffs, positions=settings.positions)
    parts = [
        configuration(vectors[name], candidate, group.sample(settings.n_prompts))
        for name, group in valid.by_instruction().items()
        for candidate in candidates
    ]
    return model, [row for part in parts for row in part], parts


def configuration(vector: SteeringVector, candidate: Candidate, pairs: PairSet) -> list[tuple[str, Plan]]:
    plan = vector.at(candidate)
    return [(prompt, plan) for prompt in pairs.prompts("none")]


def texts(model: Any, rows: list[tuple[str, Plan]], settings: Settings) -> list[str]:
    done = sl.generate(
        model,
        [prompt for prompt, _ in rows],
        steering=[plan for _, plan in rows],
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
    )
    return [row.text for row in done]


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds and ratios, and how many texts differ."""
    model, rows, parts = prepare(settings)
    contestants = {
        "together": lambda: texts(model, rows, settings),
        "one_by_one": lambda: [text for part in parts for text in texts(model, part, settings)],
    }
    results, found = take_turns(contestants, settings.rounds)
    return {
        "configurations": len(parts),
        "rows": len(rows),
        **found,
        "different_texts": sum(
            a != b for one in results for a, b in zip(one["together"], one["one_by_one"], strict=True)
        ),
    }


if __name__ == "__main__":
    asked = tyro.cli(Settings)
    report(asked, measure(asked))
