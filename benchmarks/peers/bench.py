"""steerlens beside its peers, in one run: the same weights, prompts, batches and numbers of new tokens; contestants take turns.

    make bench         everything, the peers' environments included; writes benchmarks/RESULTS.md (an hour or two on two cores)
    make bench-quick   the ratios in under three minutes, once the environments are there; writes to .bench/ only

Each contestant runs in an interpreter that has its packages (`pool`, `worker`), and all take a turn in every round, so that a
busy machine slows all of them; what counts is the median over rounds of the ratio of rates. The first turn is not timed. In
it the texts of those who should agree are compared with Hugging Face's own, token by token, up to a near tie. What was
measured is kept in .bench/ until the code, the settings or the versions change: a run that is killed goes on where it
stopped.
"""

import contextlib
import json
import os
import platform
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from benchmarks.contest import take_turns
from benchmarks.peers.contestants import CONTESTANTS
from benchmarks.peers.pool import HERE, HOME, ROOT, AbsentError, Pool, model_folder
from benchmarks.peers.races import (
    FULL,
    HOOK,
    LOOP,
    ORIGINAL,
    OURS,
    QUICK,
    Material,
    Race,
    Races,
    Rows,
    Sizes,
    Work,
    material,
)
from benchmarks.peers.results import write_results
from steerlens.files import content_key, write_atomically
from steerlens.models.load import BUNDLED, cache_folder, load_model
from tests.near_ties import NEAR_TIE

Said = tuple[list[int], list[float]]
"""A row's new tokens, and for each the gap between the two largest logits."""
VENVS = tuple(dict.fromkeys(venv for venv, *_ in CONTESTANTS.values()))
BAR = "{desc}: {percentage:3.0f}% |{bar:20}| {elapsed} gone, about {remaining} left{postfix}"


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    models: tuple[str, ...] = ("tiny", "smollm2-135m")
    threads: int = os.cpu_count() or 1
    """Of each contestant, of which one works at a time. Where other programs share the machine, take one."""
    quick: bool = False
    figures: tuple[str, ...] = ()
    """Default: all."""
    clock: Literal["wall", "processor"] = "wall"
    """Where other programs share the machine, seconds of the processor, in one thread, are steadier."""
    fresh: bool = False
    """Measure again what was measured before."""


def cut(tokens: list[int], stops: list[int], stop: bool) -> list[int]:
    """A row's own tokens: up to the first that stops it."""
    ends = [place + 1 for place, token in enumerate(tokens) if stop and token in stops]
    return tokens[: min(ends, default=len(tokens))]


def compared(expected: list[Said], got: list[list[int]]) -> dict[str, int]:
    """How many rows and tokens are as expected, up to a row's first near tie."""
    counts = {"rows": len(got), "tokens": 0, "near_ties": 0, "different_rows": 0}
    for (tokens, gaps), said in zip(expected, got, strict=True):
        clear = next((place for place, gap in enumerate(gaps[: len(tokens)]) if gap < NEAR_TIE), len(tokens))
        same = said[:clear] == tokens[:clear] and (clear < len(tokens) or len(said) == clear)
        counts["tokens"] += clear
        counts["near_ties"] += clear < len(tokens)
        counts["different_rows"] += not same
    return counts


def times(race: Race, label: str) -> int:
    """How often a contestant does its work: once without being timed, then in every round; or in processes of its own."""
    if not race.apart:
        return race.rounds + 1
    return race.rounds if label == OURS else 1


def cost(work: Work) -> float:
    """About how long a work takes, for the time that is left."""
    alone = 3 if work["by"] in (LOOP, ORIGINAL) else 1
    if work["do"] == "capture":
        return float(3 * alone * len(work["texts"]))
    n_rows = len(work["rows"])
    return work["new_tokens"] * alone * (n_rows / work["batch"] + n_rows / 16)


def cost_of(race: Race) -> float:
    """The same for all that a race asks for."""
    return sum(times(race, label) * cost(work) for label, work in race.entries.items())


class Contest:
    """The contestants of one model, taking turns."""

    def __init__(self, pool: Pool, given: Material, bar: Any) -> None:
        self.pool, self.given, self.bar = pool, given, bar
        self.said: dict[str, Said] = {}

    def ask(self, label: str, work: Work, pool: Pool | None = None) -> dict[str, Any]:
        self.bar.set_postfix_str(label)
        try:
            return (pool or self.pool).ask(CONTESTANTS[work["by"]][0], work)
        except AbsentError as reason:
            return {"error": str(reason)}
        finally:
            self.bar.update(cost(work))

    def expected(self, work: Work) -> list[Said]:
        """What the reference says for each row; it is asked once for each."""
        told = [work["new_tokens"], work["stop"]]
        keys = [content_key([work["ids"][prompt], steps, told]) for prompt, steps in work["rows"]]
        if not self.said.keys() >= {*keys}:
            found = self.pool.ask("own", work | {"by": "reference"})["found"]
            tokens = [cut(row, self.given.prepared["stop_ids"], work["stop"]) for row in found["tokens"]]
            self.said |= dict(zip(keys, zip(tokens, found["gaps"], strict=True), strict=True))
        return [self.said[key] for key in keys]

    def checked(self, work: Work, answer: dict[str, Any]) -> dict[str, Any]:
        """What a contestant found beside what it should find, and how many units of work that was."""
        if "error" in answer:
            return {"absent": answer["error"]}
        if work["do"] == "capture":
            return {"units": len(work["texts"]), "directions": answer["found"]}
        rows = [cut(row, self.given.prepared["stop_ids"], work["stop"]) for row in answer["found"]]
        return {"units": sum(map(len, rows)), "agreement": compared(self.expected(work), rows)}

    def race(self, race: Race) -> dict[str, Any]:
        """Everybody once without being timed, then in turns."""
        entries = {label: self.checked(work, self.ask(label, work)) for label, work in race.entries.items()}
        racing = {label: work for label, work in race.entries.items() if "absent" not in entries[label]}
        self.bar.update(race.rounds * sum(cost(work) for label, work in race.entries.items() if label not in racing))
        turns = {label: lambda label=label, work=work: self.ask(label, work) for label, work in racing.items()}
        rounds = take_turns(turns, race.rounds)[0] if racing else []
        for label in racing:
            entries[label] |= timed([one[label] for one in rounds])
        return with_differences(entries)

    def race_apart(self, race: Race) -> dict[str, Any]:
        """Everybody in a process of its own, which has done a little of the work before; steerlens in one for each round."""
        entries = {}
        for label, work in race.entries.items():
            answers = []
            little = work | {"pairs": work["pairs"][:8], "texts": work["texts"][:8]}
            for _ in range(times(race, label)):
                with Pool(self.pool.folder, self.pool.threads, self.pool.home) as pool:
                    with contextlib.suppress(AbsentError):  # which is told once the work itself is asked for
                        pool.ask(CONTESTANTS[work["by"]][0], little)
                    answers.append(self.ask(label, work, pool))
            entries[label] = {"units": len(work["texts"]), **timed(answers)}
        return entries


def timed(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds on the clock and of the processor in each round, and by how many MiB the process grew at the most."""
    if failed := next((answer["error"] for answer in answers if "error" in answer), ""):
        return {"absent": failed}
    return {key: [answer[key] for answer in answers] for key in ("seconds", "processor", "grown_mib")}


def with_differences(entries: dict[str, Any]) -> dict[str, Any]:
    """In place of directions, how far they are from Hugging Face's, where these are of the same pairs and layers."""
    expected = np.array(entries.get(HOOK, {}).get("directions", []))
    for entry in entries.values():
        found = np.array(entry.pop("directions", []))
        if found.size and found.shape == expected.shape and entry["units"] == entries[HOOK]["units"]:
            off = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
            entry["difference"] = float(off.max())
    return entries


def limit_seconds(work: Work, units: int, prepared: dict[str, Any], machine: dict[str, float]) -> float:
    """The least a work can take: operations over their measured peak or, for a step of few rows, bytes over their measured rate.

    Attention's own operations and the cache's bytes are left out. What texts begin with is run once, however many do, and however
    they are steered from some layer on: once up to that.
    """
    body = 2 * (prepared["parameters"] - prepared["embedding"]) / machine["operations"]
    if work["do"] == "capture":
        return body * distinct(prepared["pair_ids"][: len(work["texts"])])
    n_rows = len(work["rows"])
    batch, prompts = min(work["batch"], n_rows), distinct_steered(work["rows"], work["ids"], len(prepared["lengths"]))
    step = max(
        4 * prepared["parameters"] / machine["bytes"], 2 * batch * prepared["parameters"] / machine["operations"]
    )
    head = 2 * prepared["embedding"] / machine["operations"]
    return body * prompts + head * n_rows + step * (units - n_rows) / batch


def distinct(pairs: list[list[list[int]]]) -> int:
    """How many tokens are left when every shared prefix is run once."""
    sides = [side for pair in pairs for side in pair]
    return round(distinct_steered([(place, []) for place in range(len(sides))], sides, 1))


def distinct_steered(rows: Rows, ids: list[list[int]], n_layers: int) -> float:
    """How many tokens are left of rows' prompts when a block is run once over each prefix and whatever was done to it below."""
    nodes: dict[tuple[int, int], int] = {}
    seen = set()
    for prompt, steps in rows:
        below = [tuple(sorted(step for step in map(tuple, steps) if step[0] < layer)) for layer in range(n_layers)]
        node = 0
        for token in ids[prompt]:
            node = nodes.setdefault((node, token), len(nodes) + 1)
            seen.update((node, layer, what) for layer, what in enumerate(below))
    return len(seen) / n_layers


def folder_of(name: str) -> Path:
    """The weights of a named model, in a form that every contestant reads."""
    source = BUNDLED / name if (BUNDLED / name).is_dir() else cache_folder() / "models" / name
    if not source.is_dir():
        load_model(name)  # converts it
    return model_folder(source, HOME / "models" / name)


def run_model(name: str, settings: Settings, sizes: Sizes, kept: Path) -> dict[str, Any]:
    """The records of all races of a model; those in the folder `kept` that are still true are not run again."""
    folder = folder_of(name)
    given = material(name, str(folder / "vectors.npy"), sizes.n_pairs)
    with Pool(folder, settings.threads) as pool:
        for venv in VENVS:  # all at once, since most of a start is waiting for files
            with contextlib.suppress(AbsentError):
                pool.worker(venv)
        asked = {"queries": given.queries, "pairs": given.pairs, "vectors": given.vectors, "n_vectors": 1200}
        given.prepared = pool.ask("own", asked | {"do": "prepare", "by": "steerlens"})["found"]
        about = {key: given.prepared[key] for key in ("parameters", "embedding")}
        machine = pool.ask("own", about | {"do": "limits", "by": "machine"})["found"][settings.clock]
        versions = {venv: versions_of(pool, venv) for venv in VENVS}
        files = [*(ROOT / "steerlens").rglob("*.py"), HERE / "contestants.py", HERE / "worker.py"]
        common = [[file.read_text(encoding="utf-8") for file in sorted(files)], versions, settings.threads, name]
        common_key = content_key(common)
        races, records = list(Races(sizes, given)), []
        total = sum(map(cost_of, races))
        with tqdm(total=total, bar_format=BAR) as bar:
            contest = Contest(pool, given, bar)
            for race in races:
                path = kept / name / f"{race.figure}, {race.setting}.json"
                key = content_key([common_key, race.entries, race.rounds])
                record = json.loads(path.read_text()) if path.is_file() and not settings.fresh else {}
                if record.get("key") != key:
                    bar.set_description_str(f"{name}, {race.figure}, {race.setting}")
                    record = {"key": key, "figure": race.figure, "setting": race.setting, "unit": race.unit}
                    record["load"] = round(os.getloadavg()[0], 1)
                    record["entries"] = contest.race_apart(race) if race.apart else contest.race(race)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(path, json.dumps(record))
                else:
                    bar.update(cost_of(race))
                for label, entry in record["entries"].items():
                    if "seconds" in entry:
                        entry["seconds"] = entry["seconds" if settings.clock == "wall" else "processor"]
                        limit = limit_seconds(race.entries[label], entry["units"], given.prepared, machine)
                        entry["limit_seconds"] = limit
                records.append(record)
    return {"races": records, "machine": machine, "versions": versions, **about}


def versions_of(pool: Pool, venv: str) -> dict[str, str]:
    try:
        return dict(pool.ask(venv, {"do": "versions"})["found"])
    except AbsentError as reason:
        return {"absent": str(reason)}


def processor() -> str:
    """The processor's name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main(settings: Settings) -> None:
    kept, models = HOME / ("quick" if settings.quick else "races"), {}
    for name in settings.models:
        sizes = (QUICK if settings.quick else FULL)[name]
        sizes = replace(sizes, figures=settings.figures or sizes.figures)
        models[name] = run_model(name, settings, sizes, kept)
    machine = {"processor": processor(), "cores": os.cpu_count(), "threads": settings.threads, "clock": settings.clock}
    found = {"date": datetime.now(UTC).date().isoformat(), **machine, "models": models}
    whole = not (settings.quick or settings.figures) and settings.models == Settings.models
    print(write_results(found, HERE.parent if whole else kept, draw=whole))


if __name__ == "__main__":
    main(tyro.cli(Settings))
