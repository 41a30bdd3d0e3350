"""Activations made of numbers: planted differences on both sides of some queries, with a residual stream below them."""

import numpy as np
import torch

from steerlens.vectors.activations import Activations

INSTRUCTIONS = ("a:one", "b:two", "c:three")


def activations(
    differences: np.ndarray, instructions: list[str], queries: list[str], layers: tuple[int, ...] | None = None
) -> Activations:
    """Differences `[pair, layer, d_model]` on top of a residual that depends on the query; prompt ids stand for queries."""
    names = sorted(set(queries))
    base = 5 + np.random.default_rng(9).normal(size=(len(names), *differences.shape[1:]))
    without = base[[names.index(query) for query in queries]]
    resid = torch.tensor(np.stack([without, without + differences], axis=1)).float()
    layers = layers or tuple(range(differences.shape[1]))
    return Activations(resid, layers, tuple(queries), tuple(instructions))


def planted(
    *,
    size: float = 6.0,
    noise: float = 1.0,
    n_queries: int = 8,
    d_model: int = 24,
    layers: tuple[int, ...] = (2, 5),
    instructions: tuple[str, ...] = INSTRUCTIONS,
    seed: int = 0,
) -> Activations:
    """Every instruction moves every query along an axis of its own, at each layer by `size`, with noise of width `noise`."""
    rng = np.random.default_rng(seed)
    names = [name for name in instructions for _ in range(n_queries)]
    queries = [f"q{number}" for _ in instructions for number in range(n_queries)]
    axes = np.eye(d_model)[[instructions.index(name) for name in names]][:, None]
    drawn = rng.normal(size=(len(names), len(layers), d_model))
    return activations(size * axes + noise * drawn, names, queries, layers)


def reordered(acts: Activations, order: np.ndarray) -> Activations:
    """The same pairs in another order."""
    ids, names = (tuple(np.array(part)[order].tolist()) for part in (acts.prompt_ids, acts.instructions))
    return Activations(acts.resid[torch.tensor(order)], acts.layers, ids, names, acts.metadata)
