"""Format instructions in the four cells, with and without the text, with and without the vector (Stolfo et al. 2025, figure 3).

    python analysis/format_four_cells.py --out runs/analysis/format_four_cells
    python analysis/format_four_cells.py --out runs/analysis/format_real --model smollm2-135m --positions all \\
        --data ifeval_single_instr_format.jsonl --n-test 6 --batch-size 32

Vectors, layers and tests are on prompts that share no query; the layer is searched with and without the text. Writes `table.csv`
(rates with intervals and quality), `comparisons.csv` (paired tests between the cells, Holm-corrected over the instructions),
the run itself with its report in `run/`, and the figures `overall` and `by_instruction`.
"""

from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import tyro
from study import FormatStudy, Frames, conduct, run_cells

from steerlens.figures.cells import four_cells


@dataclass(frozen=True)
class Settings(FormatStudy):
    out: Path = Path("runs/analysis/format_four_cells")


def measure(settings: Settings) -> Frames:
    evaluation = run_cells(settings)
    return {"table": evaluation.table, "comparisons": evaluation.comparisons}


def draw(frames: Frames) -> dict[str, go.Figure]:
    table = frames["table"]
    several = (table["instruction"] == "all").any()  # one instruction is its own summary
    overall = four_cells((table[table["instruction"] == "all"] if several else table).drop(columns="instruction"))
    return {"overall": overall, "by_instruction": four_cells(table[table["instruction"] != "all"])}


if __name__ == "__main__":
    conduct(tyro.cli(Settings, description=__doc__), measure, draw, ["table", "comparisons"])
