"""The command line: one command per step of the main job, and `run` for all of it.

Everything heavy is imported inside the commands, so that `--help` answers at once. Bad input ends with exit code 2 and one
sentence on standard error; Ctrl-C with 130, and the batches that a run finished are saved.
"""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from steerlens._typing import Gate, Operator, RuleName
from steerlens.errors import SteerlensError
from steerlens.files import user_path, writable_folder
from steerlens.models.prompts import PromptFormat
from steerlens.study.config import RunConfig, pairs_for

if TYPE_CHECKING:
    import pandas as pd

    from steerlens.steering.plan import Plan

Prompts = Annotated[PromptFormat, tyro.conf.arg(name="")]
"""Options for how a prompt's text becomes what the model reads."""

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
    """
    from steerlens.study.job import run as run_job

    result = run_job(config, out, command=shlex.join(["steerlens", *sys.argv[1:]]))
    _show(result.evaluation.summary)
    print(f"\nreport: {result.report}")


def sweep(
    out: Annotated[Path, tyro.conf.arg(help=OUT)] = Path("runs/sweep"),
    model: str = "tiny",
    pairs: str = "auto",
    instructions: tuple[str, ...] = (),
    layers: tuple[int, ...] = (),
    coeffs: tuple[float, ...] = (1.0,),
    operators: tuple[Operator, ...] = ("set_projection",),
    positions: tuple[RuleName, ...] = ("all",),
    unit: Literal["absolute", "resid_norm"] = "absolute",
    n_random: int | None = None,
    condition: Literal["vector", "text+vector"] = "vector",
    gate: Gate = "degenerate",
    quality_model: str | None = None,
    n_train: int = 48,
    n_valid: int = 8,
    trials: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    batch_size: int = 64,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    n_workers: int | None = None,
    prompt_format: Prompts = PromptFormat(),
) -> None:
    """Try layers, coefficients, operators and positions on validation prompts; keep every response, pick the best.

    For example:
      steerlens sweep --layers 1 3 5 7 --coeffs 0.5 1 1.5 --out runs/sweep
      steerlens sweep --operators add --unit resid_norm --coeffs 0.25 2 --n-random 40 --trials 3 --temperature 1

    Args:
        model: A local folder, a named model, or a hub id.
        pairs: "tiny" or "format" (bundled), or a JSONL file; auto is tiny for the tiny models, else format.
        instructions: Instruction ids; default all of the pairs.
        layers: Layers to try; default all.
        coeffs: Coefficients to try; with --n-random, the lowest and the highest.
        operators: set_projection, add, or ablate; several are tried.
        positions: Which tokens to steer; several rules are tried.
        unit: Of the coefficients of add: absolute, or the layer's mean residual norm.
        n_random: Draw this many candidates at random, instead of every combination.
        condition: With the bare query, or with the instruction in the prompt.
        gate: What bars a candidate: more degenerate texts than without steering, more of low perplexity, or any of those.
        quality_model: Whose perplexity the gate goes by: a name, folder or hub id; default the model itself.
        n_train: Training pairs per instruction, at most.
        n_valid: Validation prompts per instruction, at most.
        trials: Responses per prompt and candidate; more than one needs a temperature.
        temperature: 0 is greedy.
        max_new_tokens: At most this many new tokens for each response.
        seed: For splits, phrasings, draws and samples.
        batch_size: Rows per batch.
        engine: In this process, or on a Ray cluster.
        ray_address: Of a running Ray cluster; default: one is started here.
        n_workers: Ray workers; default: as many as the cluster's processors allow.
    """
    from steerlens.figures.layers import layer_curve
    from steerlens.files import write_atomically
    from steerlens.models.load import load_model
    from steerlens.models.prompts import pinned
    from steerlens.steering.candidates import draws, grid
    from steerlens.study.job import engine_for, select_pairs
    from steerlens.study.quality import Quality
    from steerlens.study.sweeps import sweep as run_sweep
    from steerlens.vectors.estimators import fit_vectors

    config = RunConfig(
        model=model,
        pairs=pairs_for(pairs, model),
        instructions=instructions,
        n_train=n_train,
        n_valid=n_valid,
        seed=seed,
        engine=engine,
        ray_address=ray_address,
        n_workers=n_workers,
    )
    folder = writable_folder(out)
    quality = Quality(gate != "degenerate" or quality_model is not None, quality_model)
    quality.load()
    train, valid, _, _ = select_pairs(config)
    loaded = load_model(model)
    chosen = layers or range(int(loaded.cfg.n_layers))
    options: dict[str, Any] = {"layers": chosen, "operators": operators, "positions": positions, "unit": unit}
    if n_random is None:
        candidates = grid(coeffs=coeffs, **options)
    else:
        candidates = draws(n_random, coeff_range=(min(coeffs), max(coeffs)), seed=seed, **options)
    prompt_format = pinned(loaded, prompt_format, folder)
    vectors = fit_vectors(
        loaded, train.by_instruction(), folder=folder / "vectors", prompt_format=prompt_format, progress=True
    )
    with engine_for(config) as workers:
        found = run_sweep(
            loaded,
            vectors,
            valid,
            candidates=candidates,
            condition=condition,
            gate=gate,
            quality=quality,
            trials=trials,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            prompt_format=prompt_format,
            out=folder,
            engine=workers,
            progress=True,
        )
    write_atomically(folder / "sweep.html", layer_curve(found.table).to_html())
    place = ["layer", "operator", "positions", "coeff", "unit"]
    columns = ["instruction", *place, "n", "rate", "low", "high", "degenerate"]
    _show(found.table.loc[found.table["chosen"], columns])
    print(
        f"\n{len(found.configurations)} candidates, {len(found.scores)} responses: {folder / 'table.csv'}, sweep.html"
    )


def fit(
    instruction: str,
    out: Path,
    model: str = "tiny",
    pairs: str = "auto",
    n_pairs: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    prompt_format: Prompts = PromptFormat(),
) -> None:
    """Fit one instruction's vector at every layer, and save it.

    For example:
      steerlens fit --instruction change_case:english_lowercase --out lowercase.safetensors

    Args:
        instruction: An instruction id; see `steerlens instructions`.
        out: The vector file to write.
        model: A local folder, a named model, or a hub id.
        pairs: "tiny" or "format" (bundled), or a JSONL file; auto is tiny for the tiny models, else format.
        n_pairs: Use this many of the training pairs; default all.
        seed: For phrasings and the split; `evaluate` tests on the test part of the same split.
        batch_size: Pairs per batch.
    """
    from steerlens.data.load import load_pairs
    from steerlens.data.splits import query_ids, three_parts
    from steerlens.models.load import load_model
    from steerlens.vectors.activations import record_activations
    from steerlens.vectors.estimators import fit_steering_vector

    writable_folder(out.parent)
    pairs = pairs_for(pairs, model)
    train, valid, _ = three_parts(load_pairs(pairs, instructions=[instruction], seed=seed), seed=seed)
    chosen = train if n_pairs is None else train.sample(n_pairs, seed=seed)
    activations = record_activations(
        load_model(model), chosen, batch_size=batch_size, prompt_format=prompt_format, progress=True
    )
    not_tested = " ".join(sorted(query_ids(train + valid)))
    vector = fit_steering_vector(activations).with_metadata(pairs=pairs, seed=str(seed), queries=not_tested)
    print(f"{vector.save(out)}: {vector!r}")


def generate(
    prompt: tuple[str, ...],
    model: str = "tiny",
    vector: Path | None = None,
    layer: int | None = None,
    coeff: float = 1.0,
    operator: Operator = "set_projection",
    positions: RuleName = "all",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    stop: tuple[str, ...] = (),
    stop_ids: tuple[int, ...] = (),
    seed: int = 0,
    prompt_format: Prompts = PromptFormat(),
) -> None:
    """Answer prompts, steered by a saved vector or not.

    For example:
      steerlens generate --prompt "Tell me about the fox." --vector lowercase.safetensors --layer 4

    Args:
        prompt: One prompt or more.
        model: A local folder, a named model, or a hub id.
        vector: A file made by `steerlens fit`; without it nothing is steered.
        layer: Where to steer; needed with a vector.
        coeff: Share of the full change, or for add the length of the step.
        operator: set_projection, add, or ablate.
        positions: Which tokens to steer.
        max_new_tokens: At most this many new tokens for each prompt.
        temperature: 0 is greedy.
        top_p: Sample among the fewest tokens whose probabilities reach this.
        top_k: Sample among this many most likely tokens.
        stop: Texts, special tokens among them, that end an answer, besides the model's own stop tokens.
        stop_ids: Token ids that do so.
        seed: Of the first prompt; the next ones count on from it.
    """
    from steerlens.models.load import load_model
    from steerlens.steering.plan import Plan
    from steerlens.steering.sampling import generate as sample

    loaded = load_model(model)
    plan = Plan() if vector is None else _plan(loaded, vector, layer, coeff, operator, positions)
    for row in sample(
        loaded,
        list(prompt),
        steering=plan,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=stop,
        stop_ids=stop_ids,
        prompt_format=prompt_format,
        seed=[seed + index for index in range(len(prompt))],
        progress=True,
    ):
        print(f"> {prompt[row.index]}\n{row.text}\n[{len(row.tokens)} tokens, stopped by {row.finish_reason}]\n")


def evaluate(
    vector: Path,
    layer: int,
    model: str = "tiny",
    data: str = "auto",
    coeff: float = 1.0,
    operator: Operator = "set_projection",
    positions: RuleName = "all",
    n_test: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    prompt_format: Prompts = PromptFormat(),
) -> None:
    """The four cells and the control for one saved vector at one layer.

    For example:
      steerlens evaluate --vector lowercase.safetensors --layer 4 --n-test 8

    Args:
        vector: A file made by `steerlens fit`.
        layer: Where to steer.
        model: The model that the vector was fitted in.
        data: Test prompts of the vector's instruction: "tiny" or "format" (bundled), or a JSONL file; auto is the set that the
            vector was fitted on. Queries that it was fitted on are left out, whatever the file.
        coeff: Share of the full change, or for add the length of the step.
        operator: set_projection, add, or ablate.
        positions: Which tokens to steer.
        n_test: At most this many prompts; default all.
        max_new_tokens: At most this many new tokens for each response.
        batch_size: Rows per batch.
    """
    from steerlens.data.load import load_pairs
    from steerlens.data.splits import at_most, without_queries
    from steerlens.models.load import load_model
    from steerlens.study.scores import evaluate as run_evaluation
    from steerlens.vectors.vector import SteeringVector

    metadata = SteeringVector.load(vector).metadata
    if "parts" in metadata:
        raise SteerlensError(
            f"a command evaluates the vector of one instruction, got {metadata['instruction']!r}; "
            "evaluate a sum in Python, on pairs that you choose: sl.evaluate(model, vector.at(layer), pairs)"
        )
    seed = int(metadata.get("seed", 0))
    data = metadata.get("pairs", pairs_for(data, model)) if data == "auto" else data
    loaded_pairs = load_pairs(data, instructions=[metadata.get("instruction", "")], seed=seed)
    pairs = without_queries(loaded_pairs, metadata.get("queries", "").split())
    if len(pairs) == 0:
        raise SteerlensError(
            f"a vector is tested on queries that it was not fitted on, and {data!r} has no other; use other prompts"
        )
    if len(pairs) < len(loaded_pairs):
        print(f"{len(loaded_pairs) - len(pairs)} of {len(loaded_pairs)} prompts left out: fitted on", file=sys.stderr)
    pairs = pairs if n_test is None else at_most(pairs, n_test, seed)
    loaded = load_model(model)
    plan = _plan(loaded, vector, layer, coeff, operator, positions)
    found = run_evaluation(
        loaded,
        plan,
        pairs,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
        prompt_format=prompt_format,
        progress=True,
    )
    _show(found.summary)


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


def instructions() -> None:
    """The bundled instructions, with an example of each."""
    import random

    from steerlens.checks.catalogue import format_instructions, language_instructions

    for name, instruction in (*format_instructions().items(), *language_instructions().items()):
        text, kwargs = instruction.render(random.Random(0))
        print(f"{name}  ({len(instruction.phrasings)} phrasings)\n    {text}{f'  {kwargs}' if kwargs else ''}")


COMMANDS: dict[str, Callable[..., Any]] = {
    "run": run,
    "sweep": sweep,
    "fit": fit,
    "generate": generate,
    "evaluate": evaluate,
    "info": info,
    "models": models,
    "instructions": instructions,
}


def main() -> None:
    """Entry point of the `steerlens` command."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="steerlens",
            description="Instruction vectors: fit, search, steer, evaluate, report.",
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


def _plan(model: Any, path: Path, layer: int | None, coeff: float, operator: Operator, positions: RuleName) -> "Plan":
    from steerlens.vectors.vector import SteeringVector

    vector = SteeringVector.load(path)
    vector.check_fits(model)
    if layer is None:
        raise SteerlensError(f"steering with a vector needs --layer, one of {list(vector.layers)}")
    return vector.at(layer, coeff=coeff, operator=operator, positions=positions)
