"""At which layers is an instruction's direction necessary, and does a layer's direction steer at other layers?

    python analysis/necessity.py --out runs/analysis/necessity
    python analysis/necessity.py --out runs/analysis/necessity_real --model smollm2-135m --batch-size 32 --n-train 12 \\
        --n-test 4 --instructions detectable_format:title detectable_format:multiple_sections --layers 10 20 --windows 1 all \\
        --max-new-tokens 32 --no-transfer

    necessity.csv     the instruction stands in the prompt, and its direction is set to its mean without it, at every token: at
                      one layer, or at all; what is lost of the text's following, beside two controls
    transfer.csv      the direction of layer i added at layer j to bare queries, as long as the mean difference of j
    comparisons.csv   paired differences of both, with tests

A direction that steers need not be one that the instruction itself goes through, and one whose ablation loses nothing may be
written anew by later layers. Where the ablation breaks texts, the share of degenerate ones says so. See `steerlens.study.layers`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import tyro
from study import FormatStudy, Frames, conduct, lab

import steerlens as sl
from steerlens.figures.matrices import transfer_matrix
from steerlens.figures.studies import necessity_by_layer
from steerlens.figures.theme import short_label


@dataclass(frozen=True)
class Settings(FormatStudy):
    out: Path = Path("runs/analysis/necessity")
    n_test: int = 6
    layers: tuple[int, ...] = ()
    """Around which layers to ablate; default: all."""
    windows: tuple[str, ...] = ("1", "all")
    """How many neighbouring layers are ablated together, or all."""
    transfer: bool = True
    """Whether to transfer between layers, too: as many cells as the square of their number."""
    transfer_layers: tuple[int, ...] = ()
    """From and to which layers; default: every second of those that are ablated."""
    transfer_positions: str = "last"
    """Which tokens to steer in the transfer."""


def measure(settings: Settings) -> Frames:
    windows: list[Any] = [size if size == "all" else int(size) for size in settings.windows]
    with lab(settings) as here:
        train, _, test = here.format_pairs()
        vectors = sl.fit_vectors(here.model, train.by_instruction(), batch_size=settings.batch_size, progress=True)
        layers = settings.layers or tuple(range(int(here.model.cfg.n_layers)))
        asked: Any = (here.sampler, vectors, test)
        studies = {"necessity": sl.study.necessity(*asked, windows=windows, layers=layers, seed=settings.seed)}
        if settings.transfer:
            places = settings.transfer_layers or layers[::2]
            options: Any = {"layers": places, "positions": settings.transfer_positions, "seed": settings.seed}
            studies["transfer"] = sl.study.transfer_between_layers(*asked, **options)
    return {
        "necessity": studies["necessity"].to_frame(),
        "transfer": studies["transfer"].to_frame() if settings.transfer else studies["necessity"].to_frame().iloc[:0],
        "comparisons": pd.concat(study.comparisons.assign(study=name) for name, study in studies.items()),
    }


def draw(frames: Frames) -> dict[str, go.Figure]:
    lost = typed(frames["necessity"])
    figures = {
        "necessity": necessity_by_layer(lost, instructions=list(lost["instruction"])[-1]).update_layout(width=900),
        "necessity_by_instruction": draw_by_instruction(lost),
    }
    if len(frames["transfer"]):
        transfer = typed(frames["transfer"])
        last = list(transfer["instruction"])[-1]
        figures["transfer"] = transfer_matrix(transfer, instructions=last).update_layout(width=900)
    return figures


def typed(table: pd.DataFrame) -> pd.DataFrame:
    """A study's table as it was before it was a file: layers as whole numbers, windows as texts."""
    table = table.astype({name: "Int64" for name in ("layer", "from_layer") if name in table})
    if "window" in table:
        table["window"] = [size if pd.isna(size) or size == "all" else f"{float(size):.0f}" for size in table["window"]]
    return table


def draw_by_instruction(table: pd.DataFrame) -> go.Figure:
    """What ablating the direction at single layers, and at all, loses of each instruction, more than a random push does."""
    rows = table[(table["window"].isin(["1", "all"])) & (table["instruction"] != "all")]
    rows = rows.assign(where=[str(layer) if layer is not pd.NA else "all" for layer in rows["layer"]])
    names, places = list(dict.fromkeys(rows["instruction"])), list(dict.fromkeys(rows["where"]))
    lost = {
        condition: part.pivot(index="instruction", columns="where", values="loss").loc[names, places]
        for condition, part in rows.groupby("condition")
    }
    own, random = lost["text+vector"], lost["random"]
    difference = own - random
    cells = go.Heatmap(
        z=100 * difference,
        x=places,
        y=[short_label(name) for name in names],
        zmid=0,
        zmin=-100,
        zmax=100,
        colorscale="RdBu_r",
        text=[[f"{100 * value:.0f}" for value in row] for row in difference.to_numpy()],
        texttemplate="%{text}",
        customdata=[
            [[100 * a, 100 * b] for a, b in zip(*pair, strict=True)]
            for pair in zip(own.to_numpy(), random.to_numpy(), strict=True)
        ],
        hovertemplate="%{y}, layer %{x}<br>lost %{customdata[0]:.0f} points, random push %{customdata[1]:.0f}<extra></extra>",
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": "points", "side": "right"}, "thickness": 14},
    )
    figure = go.Figure(cells)
    figure.update_xaxes(title_text="ablated layer", type="category", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    n = int(rows["n"].max())
    # Labels are long, so the title begins where the figure does.
    title = {"text": f"Lost by ablation, beyond a random push (n = {n} each)", "xref": "container", "pad": {"l": 8}}
    height = max(320, 34 * len(names) + 130)
    return figure.update_layout(title=title, width=900, height=height, margin={"t": 70})


if __name__ == "__main__":
    conduct(tyro.cli(Settings, description=__doc__), measure, draw, ["necessity", "transfer", "comparisons"])
