"""Peak memory: of loading, of the main job, of sweeps over rows, and of running sums over pairs.

    python benchmarks/memory.py --out benchmarks/memory.json --figures benchmarks      # half an hour on one core
    python benchmarks/memory.py --cases load means --n 64 1024 --model tiny            # some of it

Each figure is of a process of its own, so that no peak hides in that of another:

    peak    the most memory that was resident at any time of the process (`VmHWM` of Linux: `ru_maxrss` of a child starts with its
            parent's)
    above   the peak over what was resident once the model was loaded, had run a row, and everything needed was imported

    load     the model alone; `above` is over the imports: the bytes of the weights, where none is held twice
    run      `steerlens run` of one instruction
    sweep    n rows of a sweep of 24 candidates, 8 new tokens each, with perplexity, kept in a folder
    means    a vector of n pairs by running sums (`record_means`)
    kept     a vector of n pairs whose residuals are kept (`record_activations`): 2 x layers x d_model x 4 bytes each

Pages of a weights file that is mapped into memory count as resident. A case that is in the output already is not run again, so a
benchmark that was cut short goes on.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import plotly.graph_objects as go
import tyro

import steerlens as sl
from steerlens.data.pairs import PairSet
from steerlens.files import write_atomically
from steerlens.models.facts import library_versions
from steerlens.study.config import RunConfig
from steerlens.study.job import run as run_job
from steerlens.vectors.activations import record_means

sys.path.append(str(Path(__file__).resolve().parents[1] / "analysis"))

from draw import save  # how the figures of analysis are drawn

INSTRUCTION = "change_case:english_lowercase"

Case = Literal["load", "run", "sweep", "means", "kept"]


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    out: Path | None = None
    """A JSON file for the figures; default: print only."""
    cases: tuple[Case, ...] = ("load", "run", "sweep", "means", "kept")
    n: tuple[int, ...] = ()
    """Rows or pairs; default: those of each case."""
    model: str | None = None
    """Default: those of each case."""
    figures: Path | None = None
    """A folder for the picture, memory.html and (where there is a Chromium) memory.png; default: none is drawn."""
    child: bool = False
    """Measure the one case that is named, in this process."""


def planned(settings: Settings) -> Iterator[tuple[Case, str, int]]:
    """The cases, as (name, model, n)."""
    sizes: dict[Case, dict[str, tuple[int, ...]]] = {
        "load": {"smollm2-135m": (0,), "tiny": (0,)},
        "run": {"smollm2-135m": (0,)},
        "sweep": {"tiny": (1_000, 10_000)},
        "means": {"tiny": (64, 256, 1024, 4096, 100_000), "smollm2-135m": (64, 512, 4096)},
        "kept": {"tiny": (64, 256, 1024, 4096)},
    }
    for case in settings.cases:
        for model, counts in sizes[case].items():
            if settings.model in (None, model):
                yield from ((case, model, n) for n in (settings.n or counts))


def asked(n: int) -> PairSet:
    """Pairs of one instruction with as many short queries."""
    queries = [f"What is number {number}? Answer in one sentence." for number in range(n)]
    return sl.pair_set(queries, "Use small letters only.", instruction_ids=INSTRUCTION)


def sweep(model: Any, n: int) -> dict[str, Any]:
    vector = sl.fit_steering_vector(sl.record_activations(model, asked(8)))
    candidates = 24  # and no steering
    with tempfile.TemporaryDirectory() as folder:
        found = sl.sweep(
            model,
            vector,
            asked(n // (candidates + 1)),
            layers="all",
            coeffs=[0.5, 1.0, 1.5],
            gate="low_perplexity",
            max_new_tokens=8,
            out=folder,
        )
        journal = (Path(folder) / "generations.jsonl").stat().st_size
        scores = (Path(folder) / "scores.jsonl").stat().st_size
    rows = len(found.scores)
    distinct = len(found.scores[["query", "response"]].drop_duplicates())
    return {
        "rows": rows,
        "distinct": distinct,
        "journal_bytes_per_row": journal / rows,
        "scores_bytes_per_row": scores / rows,
    }


def means(model: Any, n: int) -> dict[str, Any]:
    return {"layers": len(sl.fit_steering_vector(record_means(model, asked(n))))}


def kept(model: Any, n: int) -> dict[str, Any]:
    return {"layers": len(sl.fit_steering_vector(sl.record_activations(model, asked(n))))}


def run(model: Any, n: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(pairs="format", instructions=(INSTRUCTION,), n_train=16, n_valid=4, n_test=8)
        return {"responses": len(run_job(config, folder, model=model, progress=False).evaluation)}


JOBS: dict[Case, Callable[[Any, int], dict[str, Any]]] = {"run": run, "sweep": sweep, "means": means, "kept": kept}


def peak() -> float:
    """MiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def measured(case: Case, name: str, n: int) -> dict[str, Any]:
    """What a child process finds out about itself."""
    sl.check("it rains.", INSTRUCTION)  # imports the checks, with what they know of languages
    imported = peak()
    model = sl.load_model(name, progress=False)
    sl.generate(model, ["What is iron?"], max_new_tokens=2)
    loaded = peak()
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    found = JOBS[case](model, n) if case in JOBS else {}
    base = imported if case == "load" else loaded
    return {
        "case": case,
        "model": name,
        "n": n,
        "peak_mib": peak(),
        "above_mib": peak() - base,
        "weights_mib": sum(weights.values()) / 2**20,
        **found,
    }


def in_a_child(case: Case, name: str, n: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", "--cases", case, "--model", name, "--n", str(n)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    lines = ["| case | model | n | peak MiB | above MiB |", "|---|---|---:|---:|---:|"]
    lines += [f"| {r['case']} | {r['model']} | {r['n']} | {r['peak_mib']:.0f} | {r['above_mib']:.0f} |" for r in found]
    return "\n".join(lines)


LINES = {
    ("sweep", "tiny"): ("rows of a sweep, tiny", "#D55E00"),
    ("means", "tiny"): ("pairs, running sums, tiny", "#0072B2"),
    ("kept", "tiny"): ("pairs, residuals kept, tiny", "#882255"),
    ("means", "smollm2-135m"): ("pairs, running sums, smollm2-135m", "#009E73"),
}


def figure(found: list[dict[str, Any]]) -> go.Figure:
    """Memory above the loaded model against the number of rows or pairs."""
    fig = go.Figure()
    for (case, model), (name, color) in LINES.items():
        some = sorted((one["n"], one["above_mib"]) for one in found if (one["case"], one["model"]) == (case, model))
        if some:
            fig.add_scatter(x=[n for n, _ in some], y=[mib for _, mib in some], name=name, line_color=color)
    fig.update_xaxes(type="log", title="rows or pairs", dtick=1)
    fig.update_yaxes(title="peak above the loaded model (MiB)", rangemode="tozero")
    return fig


def main(settings: Settings) -> None:
    if settings.child:
        ((case, name, n),) = planned(settings)
        print(json.dumps(measured(case, name, n)))
        return
    out = settings.out
    found = json.loads(out.read_text())["found"] if out is not None and out.is_file() else []
    for case, name, n in planned(settings):
        if (case, name, n) not in {(one["case"], one["model"], one["n"]) for one in found}:
            found.append(in_a_child(case, name, n))
            print(json.dumps(found[-1]), file=sys.stderr)
            if out is not None:
                record = {"found": found, "versions": library_versions()}
                write_atomically(out, json.dumps(record, indent=2) + "\n")
    print(table(found))
    if settings.figures is not None:
        save(figure(found), settings.figures, "memory", width=760, height=380)


if __name__ == "__main__":
    main(tyro.cli(Settings))
