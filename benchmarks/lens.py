"""What a lens costs: seconds against a readout per direction, and how much of the vocabulary is in memory at once.

    python benchmarks/lens.py --out runs/benchmarks/lens.json                                        # 12 vectors at 8 layers
    python benchmarks/lens.py --model smollm2-135m --n-vectors 1 --out runs/benchmarks/lens_smollm2.json   # 1 at 30 layers

One by one means TransformerLens' `logit_readout` of both signs of one direction, its ten highest and ten lowest tokens; the
lens' random directions are read by both, words are ranked by the lens only. Logits must agree.

Memory is counted where it is allocated: the peak during the lens, in tables of float32 logits [sign, vector and layer, d_vocab],
through the norm ("model") or as the bare `u @ W_U` ("none"). It must stay below one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from contest import report, take_turns
from torch.profiler import ProfilerActivity, profile

import steerlens as sl
from steerlens.models.backends import evaluation_mode
from steerlens.reading.vocabulary import N_RANDOM, VocabularyLens
from steerlens.vectors.vector import SteeringVector


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    out: Path | None = None
    """A JSON file for the figures; default: print only."""
    model: str = "tiny"
    n_vectors: int = 12
    targets: tuple[str, ...] = ("rain", "river")
    rounds: int = 5


def vectors_of(model: Any, n: int) -> dict[str, SteeringVector]:
    """Seeded random directions at all layers: what a lens costs does not depend on what they say."""
    generator = torch.Generator().manual_seed(0)
    shape = (n, int(model.cfg.n_layers), int(model.cfg.d_model))
    return {
        f"vector {place}": SteeringVector(dict(enumerate(layers)))
        for place, layers in enumerate(torch.randn(shape, generator=generator))
    }


def one_by_one(model: Any, vectors: dict[str, SteeringVector]) -> list[float]:
    """The ten highest logits of each direction, through the norm; the lowest ones are asked for, too."""
    from transformer_lens.tools.analysis.logit_lens import logit_readout

    units = [vector.unit(layer) for vector in vectors.values() for layer in vector.layers]
    control = vectors_of(model, N_RANDOM)  # what the lens reads for its ranges
    found: list[float] = []
    with evaluation_mode(model), torch.inference_mode():
        for unit in (*units, *(vector.unit(0) for vector in control.values())):
            for sign in (1.0, -1.0):
                direction = sign * float(model.cfg.d_model) ** 0.5 * unit
                logits = logit_readout(model, direction[None]).values[0].float()
                logits.topk(10, largest=False)
                found += logits.topk(10).values.tolist()
    return found[: 2 * 10 * len(units)]


def promoted(lens: VocabularyLens) -> list[float]:
    return lens.table.loc[lens.table["kind"] == "promoted", "logit"].tolist()


def peak_bytes(run: Any) -> int:
    """The most memory on the CPU that tensors allocated during a run took at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def tables_at_once(
    model: Any, vectors: dict[str, SteeringVector], norm: Literal["model", "none"], **options: Any
) -> float:
    """The peak of a lens, in tables of float32 logits [sign, vector and layer, d_vocab]."""
    rows = sum(len(vector.layers) for vector in vectors.values())
    peak = peak_bytes(lambda: sl.logit_lens(model, vectors, norm=norm, **options))
    return peak / (2 * 4 * rows * int(model.cfg.d_vocab))


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds and ratios, the largest difference of a logit, and tables at once."""
    model = sl.load_model(settings.model)
    vectors = vectors_of(model, settings.n_vectors)
    sl.logit_lens(model, vectors, layer=0)  # that the model's logits are such a readout is found out before
    contestants = {
        "together": lambda: promoted(sl.logit_lens(model, vectors, targets=settings.targets)),
        "one_by_one": lambda: one_by_one(model, vectors),
    }
    results, found = take_turns(contestants, settings.rounds)
    values = torch.tensor([list(one.values()) for one in results])  # [round, contestant, token]
    return {
        "directions": settings.n_vectors * int(model.cfg.n_layers),
        **found,
        "largest_difference": float((values - values[:, :1]).abs().max()),
        "tables_at_once": {
            norm: tables_at_once(model, vectors, norm, targets=settings.targets) for norm in ("model", "none")
        },
    }


if __name__ == "__main__":
    asked = tyro.cli(Settings)
    report(asked, measure(asked))
