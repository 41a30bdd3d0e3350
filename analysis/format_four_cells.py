"""Format instructions in the four cells, with and without the text, with and without the vector (Stolfo et al. 2025, figure 3).

    python analysis/format_four_cells.py --out runs/analysis/format_four_cells
    python analysis/format_four_cells.py --out runs/analysis/format_real --model smollm2-135m --positions all \\
        --data ifeval_single_instr_format.jsonl --n-test 6 --batch-size 32

Vectors, layers and tests are on prompts that share no query; the layer is searched with and without the text. Writes `table.csv`
(rates with intervals and quality), `comparisons.csv` (paired tests between the cells, Holm-corrected over the instructions),
the run itself with its report in `run/`, and the figures `overall` and `by_instruction`.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import tyro
from study import FormatStudy, Frames, conduct

from steerlens.job import run
from steerlens.plot import four_cells
from steerlens.records import RunConfig


@dataclass(frozen=True)
class Settings(FormatStudy):
    out: Path = Path("runs/analysis/format_four_cells")


def measure(settings: Settings) -> Frames:
    config = RunConfig(
        model=settings.model,
        data=None if settings.data is None else str(settings.data),
        instructions=settings.instructions,
        n_train=settings.n_train,
        n_valid=settings.n_valid,
        n_test=settings.n_test,
        layers=settings.layers,
        positions=settings.positions,  # type: ignore[arg-type]
        max_new_tokens=settings.max_new_tokens,
        search_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        seed=settings.seed,
        dtype=settings.dtype,
        kl=True,
    )
    evaluation = run(config, settings.out / "run", command=shlex.join(["python", *sys.argv])).evaluation
    return {"table": evaluation.table, "comparisons": evaluation.comparisons}


def draw(frames: Frames) -> dict[str, go.Figure]:
    table = frames["table"]
    several = (table["instruction"] == "all").any()  # one instruction is its own summary
    overall = four_cells((table[table["instruction"] == "all"] if several else table).drop(columns="instruction"))
    return {"overall": overall, "by_instruction": four_cells(table[table["instruction"] != "all"])}


if __name__ == "__main__":
    conduct(tyro.cli(Settings, description=__doc__), measure, draw, ["table", "comparisons"])
