"""A finished run's folder, or saved vectors, opened again to be looked at: the model, the vectors, and prompts for them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from steerlens.data.load import load_pairs
from steerlens.data.pairs import PairSet
from steerlens.data.splits import query_ids, without_queries
from steerlens.errors import DataError, SteerlensError
from steerlens.files import user_path, writable_folder
from steerlens.models.load import load_model
from steerlens.models.prompts import PromptFormat, pinned
from steerlens.steering.settings import SamplingConfig
from steerlens.study.config import LookConfig, RunConfig, pairs_for
from steerlens.study.job import made_of, select_pairs, subject_of, vectors_in
from steerlens.study.pages import require_run, write_run_report, write_vector_page
from steerlens.study.seeing import Subject
from steerlens.vectors.vector import SteeringVector


def look_at(places: Iterable[str | Path], config: LookConfig = LookConfig(), *, by_instruction: bool = True) -> Subject:
    """What one run's folder, or vector files, hold, with their model loaded.

    Args:
        places: A run's folder, or files of vectors.
        by_instruction: Whether pairs of each vector's instruction are needed, or bare queries are enough.

    Raises:
        SteerlensError: if a place is neither, a setting does not go with it, or a run's model or pairs have changed.

    Example:
        >>> from steerlens.study.config import LookConfig
        >>> look_at([vector.save(folder / "v.safetensors")], LookConfig(folder / "seen", model="tiny")).used_layers()
        {'change_case:english_lowercase': 4}
    """
    paths = [user_path(place) for place in places]
    if not paths:
        raise SteerlensError("there must be something to look at, got nothing; give a run's folder, or vector files")
    if missing := [path for path in paths if not path.exists()]:
        raise SteerlensError(f"a run's folder or a vector file must exist, got {str(missing[0])!r}; check its name")
    if not any(path.is_dir() for path in paths):
        if config.out is None:
            raise SteerlensError("what is seen of saved vectors must be kept in a folder, got none; give --out")
        return _of_files(paths, config.out, config, by_instruction)
    if len(paths) > 1:
        raise SteerlensError(f"a run's folder is looked at alone, got {len(paths)} places; give one, or vector files")
    given = [name for name in ("out", "pairs", "prompt_format") if getattr(config, name) != getattr(LookConfig(), name)]
    if given:
        raise SteerlensError(f"a run has its own folder, pairs and prompt format, got {given[0]} as well; leave it out")
    return _of_run(paths[0], config)


def _of_run(folder: Path, look: LookConfig) -> Subject:
    """The subject of a finished run, if its model and its pairs are still the same."""
    require_run(folder)
    kept = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = _config(kept["config"])
    place = {name: value for name in ("model", "dtype", "device") if (value := getattr(look, name)) is not None}
    config = replace(config, **place)
    train, valid, _, _ = select_pairs(config, n_test=config.n_test)
    loaded = load_model(config.model, dtype=config.dtype, device=config.device)
    now = made_of(loaded, train, valid)
    if changed := [name for name, value in kept["made_of"].items() if now[name] != value]:
        what = "model has other weights" if "weights" in changed else "pairs are others"
        raise DataError(f"a run is looked at with the model and pairs it was made of, and its {what} now; run it again")
    vectors = vectors_in(folder, config, loaded, train, valid, progress=False)
    return subject_of(folder, config, loaded, vectors, train, valid)


def _config(kept: dict[str, Any]) -> RunConfig:
    """A run's settings as config.json holds them."""
    sampling, prompt_format = SamplingConfig(**_tuples(kept["sampling"])), PromptFormat(**kept["prompt_format"])
    return RunConfig(**{**_tuples(kept), "sampling": sampling, "prompt_format": prompt_format})


def _tuples(kept: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where settings have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}


def _of_files(paths: Sequence[Path], out: Path, config: LookConfig, by_instruction: bool) -> Subject:
    """The subject of saved vectors of one model."""
    vectors = {path: SteeringVector.load(path) for path in paths}
    names = [vector.name for vector in vectors.values()]
    named = {
        vector.name if names.count(vector.name) == 1 else f"{vector.name} ({path.stem})": vector
        for path, vector in vectors.items()
    }
    first = vectors[paths[0]]
    name = config.model or first.metadata.get("model")
    if name is None:
        raise SteerlensError(f"a vector must name its model, and {str(paths[0])!r} names none; give --model")
    sources = {
        one: config.pairs or vector.metadata.get("pairs") or pairs_for("auto", name) for one, vector in named.items()
    }
    seed = int(first.metadata.get("seed", 0))
    parts = [_pairs_of(vector, sources[one], seed, by_instruction) for one, vector in named.items()]
    fitted_on = {query for vector in named.values() for query in vector.metadata.get("queries", "").split()}
    every = PairSet(dict.fromkeys(pair for part in parts for pair in part))
    held_out = without_queries(every, fitted_on)
    known = query_ids(held_out)
    train = PairSet(pair for pair in every if pair.query_id not in known)
    loaded = load_model(name, dtype=config.dtype or "float32", device=config.device)
    for vector in named.values():
        vector.check_fits(loaded)
    return Subject(
        loaded,
        named,
        writable_folder(out),
        train=train if len(train) else every,
        held_out=held_out,
        prompts=tuple(dict.fromkeys(pair.text("none") for pair in (held_out or every))),
        prompt_format=pinned(loaded, config.prompt_format),
        seed=seed,
    )


def _pairs_of(vector: SteeringVector, source: str, seed: int, by_instruction: bool) -> PairSet:
    if not by_instruction:
        return load_pairs(source, seed=seed)
    instruction = vector.metadata.get("instruction", "")
    if "parts" in vector.metadata or not instruction:
        what = "a sum" if "parts" in vector.metadata else "of none"
        raise SteerlensError(
            f"a vector must be that of one instruction, whose prompts it is looked at with, and {vector.name!r} is {what}; "
            "give its parts"
        )
    return load_pairs(source, instructions=[instruction], seed=seed)


def write_seen(subject: Subject, kind: str) -> Path:
    """Write the page of what has been seen: a run's report with the section of this kind, or the page of saved vectors."""
    return (
        write_run_report(subject.folder)
        if (subject.folder / "facts.json").is_file()
        else write_vector_page(subject, kind)
    )
