"""What can be seen of vectors, kept in a folder: what they say, how they lie, which layers matter.

    see_lens       tokens.csv of `logit_lens` at every layer, effects.csv of `vector_effects`: of one vector at every layer, of
                   several at the layer that is used, each by its mean difference
    see_geometry   points.csv and embeddings.csv of `embed` (t-SNE and PCA), cosines.csv, separability.csv
    see_layers     a folder for each study of layers: steering, necessity, transfer

Each has a subfolder with its settings (config.json). The same call finds its tables again, and goes on where it was cut short;
other settings, vectors or prompts remove them first. Tables are read back from their files, also by the call that wrote them.
"""

import csv
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from steerlens._typing import WholeNumber, several, whole
from steerlens.data.pairs import PairSet
from steerlens.data.splits import at_most
from steerlens.errors import DataError, SteerlensError
from steerlens.files import content_key, start_folder, write_atomically
from steerlens.models.facts import model_digest
from steerlens.models.prompts import PromptFormat, encode_all
from steerlens.reading.effects import vector_effects
from steerlens.reading.embedding import Embedding, embed
from steerlens.reading.probes import separability
from steerlens.reading.similarity import cosines
from steerlens.reading.vocabulary import logit_lens
from steerlens.steering.positions import Window
from steerlens.steering.settings import SamplingConfig
from steerlens.study.layers import necessity, steer_by_layer, transfer_between_layers
from steerlens.study.sweeps import candidate_layers
from steerlens.vectors.activations import Activations, record_activations
from steerlens.vectors.vector import SteeringVector

Study = Literal["steering", "necessity", "transfer"]
STUDIES: tuple[Study, ...] = ("steering", "necessity", "transfer")

LENS, GEOMETRY = ("tokens", "effects"), ("points", "embeddings", "cosines", "separability")
"""The tables of each, in the order in which they are made."""

SEEN = (
    *(f"lens/{name}.csv" for name in LENS),
    *(f"geometry/{name}.csv" for name in GEOMETRY),
    *(f"layers/{study}/{name}" for study in STUDIES for name in ("scores.jsonl", "table.csv", "comparisons.csv")),
)
"""What a folder may hold of it."""

_TEXTS = {
    *("vector", "norm", "kind", "token", "target", "text", "case", "condition", "effect", "measure"),
    *("method", "instruction", "prompt_id", "query", "first", "second"),
}
"""Columns that hold texts, also where these look like numbers or like nothing."""


@dataclass(frozen=True, eq=False)
class Subject:
    """Vectors, their model, and the prompts to look at them with.

    >>> Subject(model, {vector.name: vector}, folder).used_layers()
    {'change_case:english_lowercase': 4}
    """

    model: Any
    vectors: Mapping[str, SteeringVector]
    folder: Path
    train: PairSet = field(default_factory=lambda: PairSet([]))
    """Pairs that the vectors were fitted on."""
    held_out: PairSet = field(default_factory=lambda: PairSet([]))
    """Pairs of other queries."""
    prompts: tuple[str, ...] = ()
    """Bare queries."""
    chosen: Mapping[str, int | None] = field(default_factory=dict)
    """The layer of each vector that a search chose, if it did."""
    prompt_format: PromptFormat = PromptFormat()
    positions: str | Window = "all"
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=64)
    batch_size: int = 32
    seed: int = 0

    def used_layers(self) -> dict[str, int]:
        """The layer at which each vector is looked at alone: the chosen one, else the middle one of its layers."""
        found = {}
        for name, vector in self.vectors.items():
            there = [layer for layer in vector if bool(vector[layer].any())] or list(vector)
            chosen = self.chosen.get(name)
            found[name] = chosen if chosen in there else there[len(there) // 2]
        return found

    def digest(self) -> str:
        """What tells these vectors in this model, and how prompts become tokens, from others."""
        numbers = {
            name: [
                list(vector),
                hashlib.sha256(torch.stack([*vector.directions.values()]).numpy().tobytes()).hexdigest(),
            ]
            for name, vector in self.vectors.items()
        }
        fed = encode_all(self.model, self.prompts, self.prompt_format) if self.prompts else []
        return content_key(
            [model_digest(self.model), str(self.model.cfg.dtype), numbers, fed, self.seed, self.batch_size]
        )


def see_lens(
    subject: Subject, *, top_k: WholeNumber = 10, targets: str | Sequence[str] = (), n_prompts: WholeNumber = 8
) -> dict[str, pd.DataFrame]:
    """What the vectors say: their tokens at every layer, and their effects on the next token.

    Args:
        top_k: Tokens from each end.
        targets: Words to follow.
        n_prompts: Bare queries of the effects, at most.

    Returns:
        tokens, with `chosen`: whether the layer is the one that is used; effects, with the vector.

    Raises:
        SteerlensError: as for `logit_lens` and `vector_effects`.

    Example:
        >>> seen = see_lens(Subject(model, {"lower case": vector}, folder, prompts=tuple(queries)), top_k=3)
        >>> list(seen), len(seen["tokens"])
        (['tokens', 'effects'], 96)
    """
    words, used = [str(word) for word in several(targets)], subject.used_layers()
    prompts = list(subject.prompts[: whole(n_prompts, "n_prompts")])

    def tokens() -> pd.DataFrame:
        table = logit_lens(subject.model, subject.vectors, top_k=top_k, targets=words, seed=subject.seed).table
        return table.assign(chosen=table["layer"] == table["vector"].map(used))

    def effects() -> pd.DataFrame:
        alone = len(subject.vectors) == 1
        places = [
            (name, layer)
            for name, vector in subject.vectors.items()
            for layer in (vector if alone else [used[name]])
            if bool(vector[layer].any())
        ]
        return pd.concat([_effects(subject, *place, prompts).assign(vector=place[0]) for place in places])

    asked = {"top_k": whole(top_k, "top_k"), "targets": words, "prompts": prompts, "layers": used}
    return _kept(subject, "lens", asked, {"tokens": tokens, "effects": effects})


def _effects(subject: Subject, name: str, layer: int, prompts: Sequence[str]) -> pd.DataFrame:
    """Of adding the mean difference of a layer to it."""
    vector = subject.vectors[name]
    options: Any = {"seed": subject.seed, "batch_size": subject.batch_size, "prompt_format": subject.prompt_format}
    coeff = float(vector[layer].norm())
    return vector_effects(subject.model, vector, prompts, coeff=coeff, layers=[layer], **options).table


def see_geometry(subject: Subject, *, n_pairs: WholeNumber = 20, n_layers: WholeNumber = 10) -> dict[str, pd.DataFrame]:
    """How the differences of several instructions lie: their points at each layer, cosines, and how far they can be told apart.

    Args:
        n_pairs: Training pairs of each instruction, at most.
        n_layers: Layers, at most, spread over the depth; each costs a t-SNE.

    Returns:
        points (by method and layer), embeddings (perplexity of t-SNE, share of variance of PCA), cosines at the layer that is
        used most often, separability.

    Raises:
        DataError: for one instruction, or one with fewer than two queries.

    Example:
        >>> pairs = sl.load_pairs("tiny", instructions=["startend:quotation", "punctuation:no_comma"], n_queries=4)
        >>> vectors = sl.fit_vectors(model, pairs.by_instruction())
        >>> list(see_geometry(Subject(model, vectors, folder, train=pairs), n_layers=2))
        ['points', 'embeddings', 'cosines', 'separability']
    """
    pairs = at_most(subject.train, n_pairs, subject.seed)
    sizes = {name: len(pairs_of) for name, pairs_of in pairs.by_instruction().items()}
    if len(sizes) < 2 or min(sizes.values()) < 2:
        got = ", ".join(f"{name} ({n})" for name, n in sizes.items()) or "none"
        raise DataError(
            f"geometry compares at least two instructions with two pairs each, got {got}; "
            "take a run of several, or several vectors"
        )
    used = list(subject.used_layers().values())
    common = max(sorted(set(used)), key=used.count)
    layers = sorted({*_spread(int(subject.model.cfg.n_layers), whole(n_layers, "n_layers")), common})

    @cache
    def recorded() -> Activations:
        options: Any = {"batch_size": subject.batch_size, "prompt_format": subject.prompt_format}
        return record_activations(subject.model, pairs, layers=layers, **options)

    @cache
    def embedded() -> list[Embedding]:
        methods: tuple[Literal["tsne", "pca"], ...] = ("tsne", "pca")
        return [embed(recorded(), method=method, seed=subject.seed) for method in methods]

    def points() -> pd.DataFrame:
        tables: list[pd.DataFrame] = [one.table.assign(method=one.method) for one in embedded()]
        return pd.concat(tables)

    def embeddings() -> pd.DataFrame:
        tsne, pca = embedded()
        assert pca.explained is not None
        both = [pd.DataFrame({"layer": layers, "perplexity": tsne.perplexity}), pca.explained]
        return pd.concat([table.assign(method=name) for table, name in zip(both, ("tsne", "pca"), strict=True)])

    tables = {
        "points": points,
        "embeddings": embeddings,
        "cosines": lambda: cosines(recorded(), layer=common, seed=subject.seed).table.assign(layer=common),
        "separability": lambda: separability(recorded(), folds=min(5, *sizes.values()), seed=subject.seed).table,
    }
    fed = [encode_all(subject.model, pairs.prompts(side), subject.prompt_format) for side in ("none", "text")]
    asked = {"pairs": pairs.content_hash, "fed": content_key(fed), "layers": layers, "layer": common}
    return _kept(subject, "geometry", asked, tables)


def _spread(n_layers: int, most: int) -> list[int]:
    """At most so many layers, the first and the last among them, evenly over the depth.

    >>> _spread(30, 4)
    [0, 10, 19, 29]
    """
    if most < 2:
        raise SteerlensError(f"n_layers must be at least 2, the first layer and the last, got {most}")
    n = min(most, n_layers)
    return [round(place * (n_layers - 1) / max(1, n - 1)) for place in range(n)]


def see_layers(
    subject: Subject,
    *,
    studies: Study | Sequence[Study] = STUDIES,
    layers: Sequence[WholeNumber] = (),
    n_prompts: WholeNumber = 4,
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """Which layers matter: the studies of layers on prompts that the vectors were not fitted on, each resumable in its folder.

    Args:
        studies: steering, necessity, transfer, or several.
        layers: Default: the paper's, every second one from a fifth of the depth on.
        n_prompts: Of each instruction, at most.

    Returns:
        The table of each study.

    Raises:
        DataError: if there are no such prompts.
        SteerlensError: for an unknown study, or a layer that a vector does not have.

    Example:
        >>> subject = Subject(model, {vector.name: vector}, folder, held_out=valid, sampling=SamplingConfig(4))
        >>> see_layers(subject, studies="transfer", layers=[4], n_prompts=1, progress=False)["transfer"]["condition"].tolist()
        ['none', 'text', 'vector', 'random']
    """
    if len(subject.held_out) == 0:
        raise DataError("a study needs prompts that the vectors were not fitted on, got none; use other prompts")
    pairs = at_most(subject.held_out, n_prompts, subject.seed)
    chosen = list(layers) or candidate_layers(int(subject.model.cfg.n_layers))
    common: Any = {
        "layers": chosen,
        "seed": subject.seed,
        "sampling": subject.sampling,
        "prompt_format": subject.prompt_format,
        "batch_size": subject.batch_size,
        "progress": progress,
    }
    run: dict[str, Callable[..., Any]] = {
        "steering": lambda **options: steer_by_layer(positions=subject.positions, **options),
        "necessity": lambda **options: necessity(windows=(1, "all"), **options),
        "transfer": lambda **options: transfer_between_layers(positions=subject.positions, **options),
    }
    found = {}
    for study in dict.fromkeys(several(studies)):
        if study not in run:
            raise SteerlensError(f"studies must be among {', '.join(run)}, got {study!r}")
        arguments = {"model": subject.model, "pairs": pairs, "out": subject.folder / "layers" / study, **common}
        arguments["vector" if study == "transfer" else "vectors"] = subject.vectors
        found[study] = run[study](**arguments).table
    return found


Frames = dict[str, pd.DataFrame]


def _kept(
    subject: Subject, kind: str, asked: Mapping[str, Any], tables: Mapping[str, Callable[[], pd.DataFrame]]
) -> Frames:
    """The tables in the subject's folder of this kind; those that are missing are made first."""
    folder = subject.folder / kind
    names = [f"{name}.csv" for name in tables]
    start_folder(folder, kind, content_key([subject.digest(), asked]), {"asked": asked}, names)
    for name, make in tables.items():
        if not (folder / f"{name}.csv").is_file():
            write_atomically(folder / f"{name}.csv", table_text(make()))
    return {name: read_table(folder / f"{name}.csv") for name in tables}


def table_text(table: pd.DataFrame) -> str:
    """A table as CSV, every text in quotes: a token may be a line break."""
    return str(table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC))


def read_table(path: Path) -> pd.DataFrame:
    """A table as it was written: texts are texts, whatever they look like."""
    names = pd.read_csv(path, nrows=0).columns
    texts = [name for name in names if name in _TEXTS]
    missing = {name: [""] for name in names if name not in texts}
    return pd.read_csv(
        path,
        dtype=dict.fromkeys(texts, str),
        keep_default_na=False,
        na_values=missing,
    )
