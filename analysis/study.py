"""What the scripts of this folder share: settings, prompts, a resumable sampler, saved frames, and figures drawn from them.

A script has `measure`, which runs the model and returns tables, and `draw`, which makes figures of the saved tables alone:
`--redraw` needs no model. Responses are kept in `generations.jsonl`, so a script that was cut short goes on.
"""

import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from draw import save

from steerlens.data.families import keyword_pairs
from steerlens.data.load import load_pairs
from steerlens.data.pairs import PairSet
from steerlens.data.splits import at_most, three_parts
from steerlens.errors import DataError, SteerlensError
from steerlens.files import Journal, content_key, start_folder, writable_folder, write_atomically
from steerlens.models.facts import library_versions
from steerlens.models.load import load_model
from steerlens.steering.candidates import Candidate, grid
from steerlens.steering.plan import Plan
from steerlens.steering.settings import SamplingConfig
from steerlens.study.config import RunConfig, pairs_for
from steerlens.study.job import run
from steerlens.study.responses import Sampler, requests_for
from steerlens.study.scores import Evaluation
from steerlens.study.sweeps import Best, choose, sweep
from steerlens.vectors.vector import SteeringVector

Frames = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Reading:
    """Settings of every script; those that sample have more."""

    out: Path
    """Folder for responses, tables and figures."""
    model: str = "tiny"
    """A local folder, a named model, or a hub id."""
    batch_size: int = 128
    dtype: str = "float32"
    """Of the weights; bfloat16 is faster for models of some size."""
    seed: int = 0
    redraw: bool = False
    """Only draw the figures again, from the tables in `out`."""

    @property
    def pairs(self) -> str:
        """The bundled prompts that suit the model."""
        return pairs_for("auto", self.model)


@dataclass(frozen=True)
class Study(Reading):
    """Settings of scripts that sample."""

    data: Path | None = None
    """Test prompts (JSONL, with base queries); default: bundled queries that nothing was fitted or searched on."""
    n_train: int = 32
    """Queries that vectors are fitted on, at most."""
    n_valid: int = 8
    """Validation prompts per instruction, at most."""
    n_test: int = 24
    """Test prompts per instruction, at most."""
    layers: tuple[int, ...] = ()
    """Layers to search; default: every second one from a fifth of the depth on."""
    positions: tuple[str, ...] = ("all", "last")
    """Which tokens to steer: rules to search."""
    max_new_tokens: int = 96


@dataclass(frozen=True)
class FormatStudy(Study):
    """Settings of scripts about format instructions."""

    instructions: tuple[str, ...] = ()
    """Ids; default: all twelve."""


def parts_for(settings: Study) -> Sequence[PairSet]:
    """Pairs to fit on, to search on and to test, without a common base query: bundled ones, or the settings' data to test.

    Raises:
        DataError: if no prompt of the data has a base query.
    """
    pairs = load_pairs(settings.pairs, seed=settings.seed)
    if settings.data is None:
        return three_parts(pairs, seed=settings.seed)
    asked = load_pairs(settings.data, seed=settings.seed, queries=getattr(settings, "queries", None))
    test = PairSet(pair for pair in asked if pair.query is not None)
    if len(test) == 0:
        raise DataError(f"test prompts need their base queries, and {settings.data} has none")
    return three_parts(pairs, test, seed=settings.seed)


class Lab:
    """A loaded model with its sampler and its queries, dealt into three parts that share none."""

    def __init__(self, settings: Study, journal: Journal) -> None:
        self.settings = settings
        self.model = load_model(settings.model, dtype=settings.dtype)
        self.sampler = Sampler(
            self.model,
            max_new_tokens=settings.max_new_tokens,
            temperature=getattr(settings, "temperature", 0.0),
            batch_size=settings.batch_size,
            journal=journal,
            progress=True,
        )
        self.parts = parts_for(settings)
        sizes = (settings.n_train, settings.n_valid, settings.n_test)
        self.train, self.valid, self.test = (
            list({pair.query_key: str(pair.query) for pair in part}.values())[:n]
            for part, n in zip(self.parts, sizes, strict=True)
        )

    @property
    def layers(self) -> Sequence[int]:
        n_layers = int(self.model.cfg.n_layers)
        return self.settings.layers or range(n_layers // 5, n_layers, 2)

    def format_pairs(self) -> tuple[PairSet, PairSet, PairSet]:
        """The bundled format instructions: pairs to fit on, to search on, and to test."""
        wanted = getattr(self.settings, "instructions", ())
        known = [name for name in self.parts[0].instructions if name in self.parts[2].instructions]
        parts = [part.filter(wanted or known) for part in self.parts]
        sizes = (self.settings.n_train, self.settings.n_valid, self.settings.n_test)
        train, valid, test = (at_most(part, n, self.settings.seed) for part, n in zip(parts, sizes, strict=True))
        return train, valid, test

    def said_words(self, queries: Sequence[str]) -> dict[str, str]:
        """For each query the longest new word of the model's own answer, each word once; queries without one are left out."""
        asked = keyword_pairs(queries, "xyzzy", "exclude")  # only the bare queries are asked
        records = self.sampler.generate(requests_for(asked, Plan(), conditions=["none"]))
        found: dict[str, str] = {}
        for pair, record in zip(asked, records, strict=True):
            query = str(pair.query)
            new = [word for word in re.findall(r"\b[a-z]{5,}\b", record["text"]) if word not in query.lower()]
            new = [word for word in new if word not in found.values()]
            if new:
                found[query] = max(new, key=len)
        return found

    def steps(self, *coeffs: float) -> list[Candidate]:
        """Candidates that add: coefficients in mean residual norms, at the layers and positions of the settings."""
        options: Any = {"positions": self.settings.positions, "operators": "add", "unit": "resid_norm"}
        return grid(layers=self.layers, coeffs=coeffs, **options)

    def best_for_all(
        self,
        groups: Sequence[tuple[SteeringVector, PairSet]],
        candidates: Sequence[Candidate],
        condition: Any = "vector",
        *,
        strict: bool = False,
    ) -> Best:
        """The one candidate that does best over all groups of validation pairs, each steered by its own vector.

        `strict`: by the strict verdicts. The loose ones may drop a line, which is not what a count or a forbidden word is about.
        """
        found = [
            sweep(self.sampler, vector, pairs, candidates=candidates, condition=condition) for vector, pairs in groups
        ]
        scores = pd.concat([one.scores for one in found]).assign(instruction="all")
        scores["followed"] = scores["followed_strict" if strict else "followed"]
        (row,) = choose(scores).query("chosen").to_dict("records")
        return Best.of(row)


def at_depth(model: Any, share: float) -> int:
    """The layer at a share of a model's depth, by which a layer of the paper's model (32 layers) has its like in others."""
    return int(share * int(model.cfg.n_layers))


@contextmanager
def lab(settings: Study) -> Iterator[Lab]:
    """The laboratory of a script; its responses are kept in the output folder."""
    with Journal(writable_folder(settings.out) / "generations.jsonl") as journal:
        yield Lab(settings, journal)


def run_cells(settings: FormatStudy, **more: Any) -> Evaluation:
    """The main job with a script's settings, in the folder `run` of its output; `more` are further fields of the job's."""
    config = RunConfig(
        model=settings.model,
        data=None if settings.data is None else str(settings.data),
        instructions=settings.instructions,
        n_train=settings.n_train,
        n_valid=settings.n_valid,
        n_test=settings.n_test,
        layers=settings.layers,
        positions=settings.positions,  # type: ignore[arg-type]
        sampling=SamplingConfig(settings.max_new_tokens),
        search_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        seed=settings.seed,
        dtype=settings.dtype,
        kl=True,
        **more,
    )
    return run(config, settings.out / "run", command=shlex.join(["python", *sys.argv])).evaluation


def described(settings: Reading) -> tuple[str, dict[str, Any]]:
    """An identity of the settings, and the settings: what config.json says of the tables beside it."""
    content = {"settings": {key: str(value) for key, value in asdict(settings).items() if key not in ("out", "redraw")}}
    return content_key(content), content | {"versions": library_versions()}


def conduct(
    settings: Reading,
    measure: Callable[[Any], Frames],
    draw: Callable[[Frames], Mapping[str, go.Figure]],
    names: Sequence[str],
) -> Frames:
    """Measure, save the tables as CSV, and draw the figures from what was saved."""
    if not settings.redraw:
        start_folder(
            writable_folder(settings.out), "measurement", *described(settings), [f"{name}.csv" for name in names]
        )
        try:
            measured = measure(settings)
        except SteerlensError as error:  # its message is all that a user of a script needs
            raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from error
        for name, frame in measured.items():
            write_atomically(settings.out / f"{name}.csv", frame.to_csv(index=False))
    frames = {name: pd.read_csv(settings.out / f"{name}.csv") for name in names}
    for name, frame in frames.items():
        if len(frame) <= 60:
            print(f"\n{name}\n{frame.to_string(index=False, float_format='{:.3f}'.format)}")
    for name, figure in draw(frames).items():
        save(figure, settings.out, name, width=int(figure.layout.width or 900), height=int(figure.layout.height or 480))
    return frames


def line(
    figure: go.Figure,
    rows: pd.DataFrame,
    x: str,
    name: str,
    color: str,
    *,
    y: str = "rate",
    dash: str = "solid",
    **place: Any,
) -> None:
    """A line with points through a table's rates, with their intervals where the table has them."""
    rows = rows.sort_values(x)
    bars = None
    if y == "rate":
        bars = {
            "array": rows["high"] - rows["rate"],
            "arrayminus": rows["rate"] - rows["low"],
            "thickness": 1,
            "width": 3,
        }
    trace = go.Scatter(
        x=rows[x], y=rows[y], name=name, mode="lines+markers", line={"color": color, "dash": dash}, marker={"size": 8},
        error_y=bars and {**bars, "type": "data", "color": color},
    )  # fmt: skip
    figure.add_trace(trace, **place)
