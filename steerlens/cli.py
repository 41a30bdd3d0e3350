"""The command line: one command per step of the main job, and `run` for all of it.

Everything heavy is imported inside the commands, so that `--help` answers at once. Bad input ends with exit code 2 and one
sentence on standard error; Ctrl-C with 130, and the batches that a run finished are saved.
"""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from steerlens._typing import Operator, RuleName, Unit
from steerlens.errors import SteerlensError
from steerlens.files import user_path, writable_folder
from steerlens.models.prompts import PromptFormat
from steerlens.steering.settings import SamplingConfig
from steerlens.study.config import (
    AttentionConfig,
    LookConfig,
    ModelConfig,
    PairsConfig,
    RunConfig,
    SweepConfig,
    pairs_for,
)

if TYPE_CHECKING:
    import pandas as pd

    from steerlens.steering.generations import Generation
    from steerlens.steering.plan import Plan

Prompts = Annotated[PromptFormat, tyro.conf.arg(name="")]
"""Options for how a prompt's text becomes what the model reads."""

Sampling = Annotated[SamplingConfig, tyro.conf.arg(name="")]
Model = Annotated[ModelConfig, tyro.conf.arg(name="")]
Pairs = Annotated[PairsConfig, tyro.conf.arg(name="")]
Attention = Annotated[AttentionConfig, tyro.conf.arg(name="")]
Look = Annotated[LookConfig, tyro.conf.arg(name="")]
Places = Annotated[tuple[Path, ...], tyro.conf.Positional]


@dataclass(frozen=True)
class Step:
    """How a vector is applied at its layer."""

    coeff: float = 1.0
    """Share of the full change, or for add the length of the step."""
    operator: Operator = "set_projection"
    """set_projection, add, or ablate."""
    positions: RuleName = "all"
    """Which tokens to steer."""
    unit: Unit = "absolute"
    """Of the coefficient of add: absolute, or the layer's mean residual norm."""


Steering = Annotated[Step, tyro.conf.arg(name="")]

OUT = "Folder of the run; made if need be, gone on with if it was cut short."


def run(
    config: Annotated[RunConfig, tyro.conf.arg(name="")],
    out: Annotated[Path, tyro.conf.arg(help=OUT)] = Path("runs/latest"),
) -> None:
    """Fit vectors, search layers, evaluate the four cells and the control, write a report.

    For example:
      steerlens run --out runs/demo --n-test 4
      steerlens run --model smollm2-135m --pairs format --data prompts.jsonl --out runs/real
      steerlens run --instructions change_case:english_lowercase punctuation:no_comma --layers 3 4 5
      steerlens run --attention spotlight:target=0.3 --n-test 4 --out runs/attention
    """
    from steerlens.study.job import run as run_job

    result = run_job(config, out, command=shlex.join(["steerlens", *sys.argv[1:]]))
    _show(result.evaluation.summary)
    print(f"\nreport: {result.report}")


def sweep(
    config: Annotated[SweepConfig, tyro.conf.arg(name="")],
    out: Annotated[Path, tyro.conf.arg(help=OUT)] = Path("runs/sweep"),
) -> None:
    """Try layers, coefficients, operators and positions on validation prompts; keep every response, pick the best.

    With --attention, strengths of that method are tried in place of vectors.

    For example:
      steerlens sweep --layers 1 3 5 7 --coeffs 0.5 1 1.5 --out runs/sweep
      steerlens sweep --operators add --unit resid_norm --coeffs 0.25 2 --n-random 40 --trials 3 --temperature 1
      steerlens sweep --attention pasta:heads=2-5 --coeffs 0.1 0.01 0.001 --out runs/pasta
    """
    from steerlens.study.job import run_sweep

    found = run_sweep(config, out)
    place = ["layer", "operator", "positions", "coeff", "unit"]
    columns = ["instruction", *place, "n", "rate", "low", "high", "degenerate"]
    _show(found.table.loc[found.table["chosen"], columns])
    print(
        f"\n{len(found.configurations)} candidates, {len(found.scores)} responses: {user_path(out) / 'table.csv'}, sweep.html"
    )


def fit(
    instruction: str,
    out: Path,
    model: Model = ModelConfig(),
    pairs: Pairs = PairsConfig(),
    n_train: int | None = None,
    batch_size: int = 32,
    prompt_format: Prompts = PromptFormat(),
) -> None:
    """Fit one instruction's vector at every layer, and save it.

    For example:
      steerlens fit --instruction change_case:english_lowercase --out lowercase.safetensors

    Args:
        instruction: An instruction id; see `steerlens instructions`.
        out: The vector file to write. `evaluate` tests on the test part of the same split.
        n_train: Training pairs, at most; default all.
        batch_size: Pairs per batch.
    """
    from steerlens.data.load import load_pairs
    from steerlens.data.splits import at_most, query_ids, three_parts
    from steerlens.vectors.estimators import fit_vectors

    writable_folder(out.parent)
    name, seed = pairs_for(pairs.pairs, model.model), pairs.seed
    train, valid, _ = three_parts(load_pairs(name, instructions=[instruction], seed=seed), seed=seed)
    vectors = fit_vectors(
        model.load(),
        {instruction: train if n_train is None else at_most(train, n_train, seed)},
        metadata={"pairs": name, "seed": str(seed), "queries": " ".join(sorted(query_ids(train + valid)))},
        batch_size=batch_size,
        prompt_format=prompt_format,
        progress=True,
    )
    print(f"{vectors[instruction].save(out)}: {vectors[instruction]!r}")


def generate(
    prompt: tuple[str, ...],
    model: Model = ModelConfig(),
    vector: Path | None = None,
    layer: int | None = None,
    step: Steering = Step(),
    attention: Attention = AttentionConfig(),
    instruction: tuple[str, ...] = (),
    sampling: Sampling = SamplingConfig(),
    seed: int = 0,
    prompt_format: Prompts = PromptFormat(),
) -> None:
    """Answer prompts, steered by a saved vector, through attention, by both or not.

    For example:
      steerlens generate --prompt "Tell me about the fox." --vector lowercase.safetensors --layer 4 --positions prompt
      steerlens generate --prompt "Describe rain. Use capitals." --attention directer --instruction "Use capitals."

    Args:
        prompt: One prompt or more.
        vector: A vector file.
        layer: Where to steer; needed with a vector.
        instruction: What attention is steered towards: a text or more that stand in every prompt; needed with --attention.
        seed: Of the first prompt; the next ones count on from it.
    """
    from steerlens.steering.plan import Plan
    from steerlens.steering.sampling import generate as sample
    from steerlens.study.written import around_of

    if vector is None and layer is not None:
        raise SteerlensError(
            f"--layer {layer} needs --vector, a file made by `steerlens fit`; without it nothing is steered"
        )
    towards = _attention(attention, instruction)
    around = around_of(attention.plausible, towards)
    if attention.plausible is not None and vector is None and attention.attention is None:
        raise SteerlensError("--plausible needs something to be steered behind it; give --vector or --attention")
    loaded = model.load()
    plan = around((Plan() if vector is None else _plan(loaded, vector, layer, step)) + towards)
    for row in sample(
        loaded,
        list(prompt),
        steering=plan,
        sampling=sampling,
        prompt_format=prompt_format,
        seed=[seed + index for index in range(len(prompt))],
        progress=True,
    ):
        said = f"> {prompt[row.index]}\n{row.text}\n[{len(row.tokens)} tokens, stopped by {row.finish_reason}]"
        print(f"{said}{_gate_line(row)}\n")


def evaluate(
    vector: Path,
    layer: int,
    model: Model = ModelConfig(),
    data: str = "auto",
    step: Steering = Step(),
    attention: Attention = AttentionConfig(),
    n_test: int | None = None,
    trials: int = 1,
    sampling: Sampling = SamplingConfig(),
    batch_size: int = 16,
    prompt_format: Prompts = PromptFormat(),
) -> None:
    """The cells and the controls for one saved vector at one layer, with attention steered or not.

    For example:
      steerlens evaluate --vector lowercase.safetensors --layer 4 --positions prompt --n-test 8

    Args:
        vector: A vector file, of `steerlens fit` or from the folder of a run or sweep.
        layer: Where to steer.
        data: Test prompts of the vector's instruction: "tiny" or "format" (bundled), or a JSONL file; auto is the set that the
            vector was fitted on. Queries that it was fitted on are left out, whatever the file.
        n_test: At most this many prompts; default all.
        trials: Responses per prompt and condition; more than one needs a temperature.
        batch_size: Rows per batch.
    """
    from steerlens.data.load import load_pairs
    from steerlens.data.splits import at_most, without_queries
    from steerlens.study.scores import evaluate as run_evaluation
    from steerlens.study.written import around_of
    from steerlens.vectors.vector import SteeringVector

    towards = _attention(attention)
    around = around_of(attention.plausible, towards)
    metadata = SteeringVector.load(vector).metadata
    if "parts" in metadata:
        raise SteerlensError(
            f"a command evaluates the vector of one instruction, got {metadata['instruction']!r}; "
            "evaluate a sum in Python, on pairs that you choose: sl.evaluate(model, vector.at(layer), pairs)"
        )
    seed = int(metadata.get("seed", 0))
    data = metadata.get("pairs", pairs_for(data, model.model)) if data == "auto" else data
    loaded_pairs = load_pairs(data, instructions=[metadata.get("instruction", "")], seed=seed)
    pairs = without_queries(loaded_pairs, metadata.get("queries", "").split())
    if len(pairs) == 0:
        raise SteerlensError(
            f"a vector is tested on queries that it was not fitted on, and {data!r} has no other; use other prompts"
        )
    if len(pairs) < len(loaded_pairs):
        print(f"{len(loaded_pairs) - len(pairs)} of {len(loaded_pairs)} prompts left out: fitted on", file=sys.stderr)
    pairs = pairs if n_test is None else at_most(pairs, n_test, seed)
    loaded = model.load()
    found = run_evaluation(
        loaded,
        around(_plan(loaded, vector, layer, step) + towards),
        pairs,
        trials=trials,
        seed=seed,
        sampling=sampling,
        batch_size=batch_size,
        prompt_format=prompt_format,
        progress=True,
    )
    _show(found.summary)


def lens(
    places: Places, look: Look = LookConfig(), top_k: int = 10, targets: tuple[str, ...] = (), n_prompts: int = 8
) -> None:
    """What vectors say: the tokens that they promote and suppress at each layer, and their effect on the next token.

    Writes lens/tokens.csv and lens/effects.csv, and the report of a run, or lens.html.

    For example:
      steerlens lens runs/demo --targets rain
      steerlens lens lowercase.safetensors --out seen

    Args:
        places: A run's folder, or vector files.
        top_k: Tokens from each end.
        targets: Words to follow: their tokens' ranks at each layer.
        n_prompts: Bare queries of the effects, at most.
    """
    from steerlens.study.opened import look_at, write_seen
    from steerlens.study.seeing import see_lens

    subject = look_at(places, look, by_instruction=False)
    tables = see_lens(subject, top_k=top_k, targets=targets, n_prompts=n_prompts)
    said = tables["tokens"].query("chosen and kind == 'promoted' and sign == 1")
    for (name, layer), rows in said.groupby(["vector", "layer"], sort=False):
        print(f"{name} at layer {layer}: {', '.join(map(repr, rows['token']))}")
    print(f"\n{subject.folder / 'lens'}, {write_seen(subject, 'lens')}")


def geometry(places: Places, look: Look = LookConfig(), n_pairs: int = 20, n_layers: int = 10) -> None:
    """How the differences that instructions make lie: t-SNE and PCA at each layer, cosines, separability.

    Pairs are recorded again, those of a run's training part, or those that saved vectors name; so it takes a run of several
    instructions, or several vectors. Writes geometry/*.csv, and the report of a run, or geometry.html.

    For example:
      steerlens geometry runs/demo
      steerlens geometry lowercase.safetensors title.safetensors --out seen

    Args:
        places: A run's folder, or vector files.
        n_pairs: Pairs of each instruction, at most.
        n_layers: Layers, at most, spread over the depth; each costs a t-SNE.
    """
    from steerlens.study.opened import look_at, write_seen
    from steerlens.study.seeing import see_geometry

    subject = look_at(places, look)
    tables = see_geometry(subject, n_pairs=n_pairs, n_layers=n_layers)
    if "separability" in tables:
        _show(tables["separability"])
    print(f"\n{subject.folder / 'geometry'}, {write_seen(subject, 'geometry')}")


def layers(
    places: Places,
    look: Look = LookConfig(),
    studies: tuple[Literal["steering", "necessity", "transfer"], ...] = ("steering", "necessity", "transfer"),
    layers: tuple[int, ...] = (),
    n_prompts: int = 4,
    positions: RuleName | None = None,
    max_new_tokens: int | None = None,
) -> None:
    """Which layers matter: vectors steered, ablated and moved, layer by layer; the same command goes on with it.

    On a run's validation prompts, or on prompts that saved vectors were not fitted on. Writes a folder layers/<study> for each
    study, and the report of a run, or layers.html.

    For example:
      steerlens layers runs/demo
      steerlens layers lowercase.safetensors --studies steering --layers 2 3 4 --positions prompt --out seen

    Args:
        places: A run's folder, or vector files.
        studies: steering (at a layer alone, from it on, at all but it), necessity (ablated at a layer and at all, with the
            instruction in the prompt), transfer (a layer's direction at another: as many cells as the layers' square).
        layers: Default: every second one from a fifth of the depth on.
        n_prompts: Of each instruction, at most; each is answered once in every cell.
        positions: Which tokens to steer; default: the run's, or all. Ablation is at all.
        max_new_tokens: Of an answer; default: as in the run's search, or 64.
    """
    from steerlens.study.opened import look_at, write_seen
    from steerlens.study.seeing import see_layers

    subject = look_at(places, look)
    sampling = subject.sampling if max_new_tokens is None else replace(subject.sampling, max_new_tokens=max_new_tokens)
    subject = replace(subject, sampling=sampling, positions=positions or subject.positions)
    tables = see_layers(subject, studies=studies, layers=layers, n_prompts=n_prompts)
    for study, table in tables.items():
        first = table["instruction"].iloc[-1]  # all of them, where there are several
        print(f"{study}, {first}:")
        _show(table.loc[table["instruction"] == first, [*table.columns[1:8]]])
    print(f"\n{subject.folder / 'layers'}, {write_seen(subject, 'layers')}")


def info(path: Annotated[Path, tyro.conf.Positional]) -> None:
    """What a vector file, or the folder of a run, holds.

    For example:
      steerlens info runs/demo

    Args:
        path: A vector file or a run's folder.
    """
    path = user_path(path)
    if path.is_dir():
        import pandas as pd

        if not (path / "table.csv").is_file():
            raise SteerlensError(
                f"a run's folder must hold table.csv, got {str(path)!r} without it; let the run finish"
            )
        print((path / "config.json").read_text())
        _show(pd.read_csv(path / "table.csv"))
        return
    from steerlens.vectors.vector import SteeringVector

    vector = SteeringVector.load(path)
    print(vector)
    for key, value in sorted(vector.metadata.items()):
        print(f"  {key}: {value if len(value) <= 100 else f'{value[:90]}... ({len(value.split())} words)'}")
    print("  layer   norm   with  without  mean residual norm")
    for layer, direction in vector.directions.items():
        values = (vector.proj_with, vector.proj_without, vector.resid_norm)
        columns = "  ".join(f"{value.get(layer, float('nan')):7.2f}" for value in values)
        print(f"  {layer:5d}  {direction.norm():7.2f}  {columns}")


def models() -> None:
    """The models that have a name here, and where each would be loaded from."""
    from steerlens.models.load import NAMED_MODELS, where

    for name, model in NAMED_MODELS.items():
        print(f"{name}: {model.summary}\n    {where(name)}")
    print("\nA local folder in Hugging Face format, or a hub id, works as well.")


def methods() -> None:
    """How attention steering is written for --attention, each method with its parameters and their defaults."""
    from steerlens.study.written import written_methods

    for written, sentence in written_methods().items():
        print(f"{written}\n    {sentence}")
    print(
        "\nWrite what differs: pasta:alpha=0.1,heads=2-5. Heads are layers, of which every head counts, or the file of a profile."
        "\nMethods without beta may stand behind a gate: spotlight:target=0.3,gate=0.5; its other parameters may follow, such as"
        "\nweaken=coeff."
    )


def instructions() -> None:
    """The bundled instructions, with an example of each."""
    import random

    from steerlens.checks.catalogue import format_instructions, language_instructions

    for name, instruction in (*format_instructions().items(), *language_instructions().items()):
        text, kwargs = instruction.render(random.Random(0))
        print(f"{name}  ({len(instruction.phrasings)} phrasings)\n    {text}{f'  {kwargs}' if kwargs else ''}")


def new(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Write a folder to begin with: five pairs with an instruction and a check of your own, a notebook, a README.

    For example:
      steerlens new pirate

    Args:
        folder: A folder that does not exist yet, or is empty.
    """
    from steerlens.data.starter import new_folder

    made = new_folder(folder)
    print(f"{made}: {', '.join(sorted(file.name for file in made.iterdir()))}\nbegin with {made / 'README.md'}")


COMMANDS: dict[str, Callable[..., Any]] = {
    "new": new,
    "run": run,
    "sweep": sweep,
    "fit": fit,
    "generate": generate,
    "evaluate": evaluate,
    "lens": lens,
    "geometry": geometry,
    "layers": layers,
    "info": info,
    "models": models,
    "methods": methods,
    "instructions": instructions,
}


def main() -> None:
    """Entry point of the `steerlens` command."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="steerlens",
            description="Instruction vectors: fit, search, steer, evaluate, look at them, report.",
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except SteerlensError as error:
        print(f"steerlens: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "steerlens: interrupted; the batches that a run finished are saved, and the same command goes on",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:  # `steerlens instructions | head`
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(table: "pd.DataFrame") -> None:
    print(table.to_string(index=False, float_format="{:.3f}".format))


def _attention(config: AttentionConfig, instruction: tuple[str, ...] | None = None) -> "Plan":
    """The plan that steers attention, towards texts where a command asks for them."""
    from steerlens.steering.plan import Plan
    from steerlens.study.written import method

    if config.attention is None:
        if instruction:
            raise SteerlensError("--instruction needs --attention, the method that steers towards it")
        return Plan()
    plan = method(config.attention)
    if instruction is None:
        return plan
    if not instruction:
        raise SteerlensError("--attention needs --instruction, the text in the prompt that it is steered towards")
    return plan.on(*instruction)


def _gate_line(row: "Generation") -> str:
    """What a gate made of a row's tokens; nothing where there was none."""
    if not row.gated:
        return ""
    from steerlens.steering.gates import gate_stats

    found = gate_stats(row.gated)
    shares = ", ".join(f"{found[name]:.0%} {name}" for name in ("accepted", "rejected", "skipped"))
    means = f"{found['mean_active_layers']:.1f} layers active and {found['extra_passes']:.1f} extra passes per token"
    return f"\n[gate: {shares}; {means}]"


def _plan(model: Any, path: Path, layer: int | None, step: Step) -> "Plan":
    from steerlens.vectors.vector import SteeringVector

    vector = SteeringVector.load(path)
    vector.check_fits(model)
    if layer is None:
        raise SteerlensError(f"steering with a vector needs --layer, one of {list(vector.layers)}")
    return vector.at(layer, **asdict(step))
