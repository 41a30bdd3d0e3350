"""What a gate costs: DIRECTER's time per token against unsteered sampling, and against its plain loop.

    python benchmarks/directer.py --out runs/benchmarks/directer.json
    python benchmarks/directer.py --model smollm2-135m --rounds 3 --out runs/benchmarks/directer_smollm2.json

All say the same number of tokens, greedily, to the same prompts: unsteered, PASTA, SpotLight and DIRECTER as one batch, and
DIRECTER's plain loop (tests/reference: a prompt at a time, each pass over the whole prefix) to the first few. Contestants
take turns, and what is reported is time per token. The loop's tokens must be DIRECTER's, up to a near tie.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import tyro
from contest import report, take_turns

import steerlens as sl
from steerlens.models.load import BUNDLED
from steerlens.models.prompts import encode, token_span
from steerlens.steering.gates import gate_stats
from steerlens.study.config import pairs_for

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.near_ties import clear_length
from tests.reference.plain_attention import load_plain
from tests.reference.plain_directer import plain_directer


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    out: Path | None = None
    """A JSON file for the figures; default: print only."""
    model: str = "tiny"
    n_prompts: int = 8
    """Of one batch."""
    n_plain: int = 1
    """Of these, how many the plain loop answers."""
    max_new_tokens: int = 48
    rounds: int = 3


def prompts_of(settings: Settings) -> list[sl.InstructionPair]:
    """Pairs of several instructions, whose text is the whole prompt."""
    pairs = sl.load_pairs(pairs_for("auto", settings.model), n_queries=40)
    groups = list(pairs.by_instruction().values())
    return [groups[place % len(groups)][place] for place in range(settings.n_prompts)]


def measure(settings: Settings) -> dict[str, Any]:
    """Time per token of each contestant, in milliseconds and as ratios, and how far the plain loop's texts agree."""
    model = sl.load_model(settings.model, progress=False)
    folder = BUNDLED / settings.model
    plain_model = load_plain(folder if folder.is_dir() else Path(model.cfg.model_name))
    pairs = prompts_of(settings)
    prompts, n_new = [pair.prompt for pair in pairs], settings.max_new_tokens
    plans = {"unsteered": sl.Plan(), "pasta": sl.pasta(), "spotlight": sl.spotlight(), "directer": sl.directer()}

    def batched(name: str) -> Any:
        steering = [plans[name].on(pair) for pair in pairs]
        with patch("steerlens.steering.sampling.stop_ids", lambda _: ()):  # every text has the same length
            return sl.generate(model, prompts, steering=steering, max_new_tokens=n_new, batch_size=len(prompts))

    def plain() -> Any:
        found = []
        for pair in pairs[: settings.n_plain]:
            span = token_span(model, pair.prompt, pair.instruction_span)
            found.append(plain_directer(plain_model, encode(model, pair.prompt), [span], max_new_tokens=n_new))
        return found

    for name in plans:
        batched(name)  # what is found out about a model once is found out before
    contestants = {name: lambda name=name: batched(name) for name in plans} | {"plain_loop": plain}
    results, found = take_turns(contestants, settings.rounds)
    n_tokens = {name: n_new * (settings.n_plain if name == "plain_loop" else len(prompts)) for name in contestants}
    times = {name: [1000 * one[name]["processor"] / n_tokens[name] for one in found["seconds"]] for name in contestants}
    texts, expected = [row.tokens for row in results[-1]["directer"]], results[-1]["plain_loop"]
    clear = [clear_length(one) for one in expected]
    return {
        "n_tokens": n_tokens,
        "ms_per_token": {name: {"median": median(ms), "each": ms} for name, ms in times.items()},
        "times_unsteered": {name: _ratios(times, name, "unsteered") for name in plans},
        "plain_loop_times_directer": _ratios(times, "plain_loop", "directer"),
        "compared_tokens": sum(clear),
        "different_tokens": sum(
            mine != its
            for text, one, n in zip(texts, expected, clear, strict=False)
            for mine, its in zip(text[:n], one.tokens[:n], strict=True)
        ),
        "gate": gate_stats([token for row in results[-1]["directer"] for token in row.gated]),
    }


def _ratios(times: dict[str, list[float]], one: str, other: str) -> dict[str, Any]:
    """Of one contestant's time per token to another's: each round's, and their median."""
    each = [a / b for a, b in zip(times[one], times[other], strict=True)]
    return {"median": median(each), "each": each}


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = tyro.cli(Settings)
    report(asked, measure(asked))
