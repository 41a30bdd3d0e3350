"""The main job, in one resumable folder: pairs, vectors, layer search, four cells, report.

    load the model -> record both sides of the training pairs -> one vector per instruction, at every layer
    -> search the layer on validation prompts, without and with the instruction in them
    -> answer the test prompts in all cells -> score -> tables
    -> what the vectors say, and how they lie (`seeing`) -> report.html

Training, validation and test prompts share no base query. Every generation is in `generations.jsonl` before it is scored, under
a key that covers all it depends on (`records`), so the same command goes on where a killed one stopped, and a changed setting
never finds an old answer.
"""

import contextlib
import html
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from steerlens.checks.catalogue import format_instructions, language_instructions
from steerlens.checks.text import sentence_splitter
from steerlens.data.conditions import CONDITIONS
from steerlens.data.load import BUNDLED_QUERIES, load_pairs
from steerlens.data.pairs import PairSet
from steerlens.data.splits import at_most, query_ids, three_parts
from steerlens.errors import DataError, SteerlensError
from steerlens.files import Journal, content_key, json_lines, start_folder, writable_folder, write_atomically
from steerlens.models.choice import backend_used
from steerlens.models.facts import check_layer, library_versions, model_digest, model_facts, model_id, resid_post
from steerlens.models.prompts import encode_all, frame, pinned, template_digest
from steerlens.models.stops import check_stop_ids
from steerlens.steering.candidates import Candidate, draws, grid
from steerlens.steering.edits import check_plan
from steerlens.steering.plan import Plan
from steerlens.steering.scores import bind
from steerlens.steering.settings import SamplingConfig
from steerlens.study.config import PLACE, RunConfig, SearchConfig, SweepConfig, pairs_for
from steerlens.study.pages import RESULTS, write_facts, write_run_report
from steerlens.study.quality import Quality
from steerlens.study.responses import Engine, Sampler, cells_of, requests_for
from steerlens.study.scores import Evaluation, score
from steerlens.study.seeing import Subject, see_geometry, see_lens
from steerlens.study.sweeps import Sweep, candidate_layers, method_candidates, sweep
from steerlens.study.written import around_of, by_strength, method
from steerlens.vectors.estimators import fit_vectors
from steerlens.vectors.vector import SteeringVector

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run made.

    Example:
        >>> len(run(RunConfig(n_test=4), "runs/tiny").evaluation)  # doctest: +SKIP
        240
    """

    folder: Path
    evaluation: Evaluation
    search: Mapping[str, Sweep]
    """The searches without ("vector") and with ("text+vector") the instruction in the prompt."""
    vectors: Mapping[str, SteeringVector]
    report: Path
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """The scores of the test prompts, one row per response."""
        return self.evaluation.to_frame()

    def plot(self, **options: Any) -> "go.Figure":
        """The cells of the test prompts; see `figures.four_cells`. `search["vector"].plot()` draws the search."""
        return self.evaluation.plot(**options)

    def _repr_html_(self) -> str:
        link = html.escape(str(self.report))
        return f'{self.evaluation._repr_html_()}<p>report: <a href="{link}">{link}</a></p>'

    def __repr__(self) -> str:
        return f"RunResult({str(self.folder)!r}, {len(self.vectors)} vectors, {self.evaluation!r})"


def run(
    config: RunConfig, out: str | Path, *, model: Any = None, progress: bool = True, command: str = ""
) -> RunResult:
    """Run the main job in a folder, or go on with it.

    Args:
        model: A loaded model, in place of `config.model`.
        command: What to print in the report as the way to repeat the run.

    Returns:
        What is in the folder, loaded.

    Raises:
        SteerlensError: before anything is generated, if a setting, a file or the folder will not do.

    Example:
        >>> run(RunConfig(n_test=4), "runs/tiny").report  # doctest: +SKIP
        PosixPath('runs/tiny/report.html')
    """
    if model is not None and config.engine == "ray":
        raise SteerlensError(
            "Ray workers load the model themselves, and one was handed over loaded; name it in the settings"
        )
    attention = Plan() if config.attention is None else method(config.attention)
    around = around_of(config.plausible, attention)
    folder = writable_folder(out)
    if model is not None:
        config = replace(config, model=model_id(model), dtype=str(model.cfg.dtype).removeprefix("torch."))
    config = replace(config, pairs=pairs_for(config.pairs, config.model))
    train, valid, test, notes = select_pairs(config, n_test=config.n_test)
    model = model if model is not None else config.load(progress=progress)
    config = replace(config, prompt_format=pinned(model, config.prompt_format, folder))
    _say(progress, f"{model_facts(model)['model']}: {train!r} to fit, {valid!r} to search, {test!r} to test")
    check_settings(config, model, valid, test, attention)
    quality = Quality(True, config.quality_model, config.kl, config.reward_model)
    quality.load()
    identity = run_identity(config, model, quality, train, valid, test)
    settings = {"config": asdict(config), "versions": library_versions(), "made_of": made_of(model, train, valid)}
    start_folder(folder, "run", identity, settings, RESULTS)
    vectors = vectors_in(folder, config, model, train, valid, progress=progress)
    with Journal(folder / "generations.jsonl") as journal, engine_for(config) as engine:

        def sampler(sampling: SamplingConfig) -> Sampler:
            return Sampler(
                model,
                journal=journal,
                sampling=sampling,
                prompt_format=config.prompt_format,
                batch_size=config.batch_size,
                engine=engine,
                progress=progress,
            )

        found: dict[str, Sweep] = {}
        for condition in SEARCHED:
            _say(progress, f"search: every candidate on the validation prompts, {_IN_WORDS[condition]}")
            found[condition] = sweep(
                sampler(search_sampling(config)),
                vectors,
                valid,
                layers=config.layers or "paper",
                coeffs=config.coeffs,
                operators=config.operators,
                positions=config.positions,
                unit=config.unit,
                condition=condition,
                around=around,
                gate=config.gate,
                quality=Quality.for_gate(config.gate, config.quality_model),
                seed=config.seed,
            )
        plans, text_plans = (
            {name: around(vector.at(found[condition].best(name)) + attention) for name, vector in vectors.items()}
            for condition in SEARCHED
        )
        _say(progress, "evaluate: the test prompts under every condition")
        # Where no vector was chosen at all, attention leaves nothing to its cells.
        cells = cells_of(plans, text_plans) if attention else CONDITIONS
        requests = requests_for(
            test, plans, text_plans=text_plans, conditions=cells, trials=config.trials, seed=config.seed
        )
        evaluation = Evaluation(score(sampler(config.sampling), requests, quality=quality))
    facts = _facts(config, model, identity, (train, valid, test), found, notes, command)
    _write_results(folder, evaluation, found)
    subject = subject_of(folder, config, model, vectors, train, valid)
    facts = {**facts, **_see(subject, progress=progress)}
    write_facts(folder, f"{facts['model']}: instruction vectors from {Path(config.pairs).name}", facts)
    return RunResult(folder, evaluation, found, vectors, write_run_report(folder), facts)


def run_sweep(config: SweepConfig, out: str | Path, *, progress: bool = True) -> Sweep:
    """Fit vectors and search with them in a folder, or go on with it; no test prompt is touched.

    With `config.attention`, the strength of that method is searched instead, and nothing is fitted.

    Returns:
        What is in the folder: the sweep (scores.jsonl, table.csv, and sweep.html, its picture), beside vectors and generations.

    Raises:
        SteerlensError: if a setting, a file or the folder will not do.

    Example:
        >>> run_sweep(SweepConfig(layers=(3, 4)), "runs/sweep").best("punctuation:no_comma")  # doctest: +SKIP
        Best(layer=3, coeff=1.0, operator='set_projection', positions='all', unit='absolute', rate=0.875)
    """
    by_coeff = _by_coeff(config)
    folder = writable_folder(out)
    config = replace(config, pairs=pairs_for(config.pairs, config.model))
    quality = Quality.for_gate(config.gate, config.quality_model)
    quality.load()
    train, valid, _, _ = select_pairs(config)
    model = config.load(progress=progress)
    config = replace(config, prompt_format=pinned(model, config.prompt_format, folder))
    searched: Any
    if by_coeff is None:
        searched = vectors_in(folder, config, model, train, valid, progress=progress)
        candidates = _candidates(config, int(model.cfg.n_layers))
    else:
        searched, candidates = by_coeff, method_candidates(by_coeff, config.coeffs)
        check_attention_on(model, by_coeff(config.coeffs[0]), valid, config)
    with engine_for(config) as engine:
        found = sweep(
            model,
            searched,
            valid,
            candidates=candidates,
            condition=config.condition if by_coeff is None else "text+attention",
            around=around_of(config.plausible),
            gate=config.gate,
            quality=quality,
            trials=config.trials,
            seed=config.seed,
            out=folder,
            sampling=config.sampling,
            prompt_format=config.prompt_format,
            batch_size=config.batch_size,
            engine=engine,
            progress=progress,
        )
    write_atomically(folder / "sweep.html", found.plot().to_html())
    return found


def _by_coeff(config: SweepConfig) -> Callable[[float], Plan] | None:
    """The method that is searched, by its first parameter; None where vectors are.

    Raises:
        SteerlensError: if it is not written as it should be, has no values to try, or comes with settings of vectors.
    """
    if config.attention is None:
        return None
    by_coeff = by_strength(config.attention)
    if not config.coeffs:
        raise SteerlensError(
            f"a search of {config.attention} tries values of its first parameter, got none; give them as coeffs"
        )
    default = SweepConfig()
    for name in ("layers", "operators", "positions", "unit", "n_random", "condition", "n_train"):
        if getattr(config, name) != getattr(default, name):
            raise SteerlensError(
                f"attention is searched over coeffs alone, got {name} as well, which is a setting of vectors; "
                "layers and positions are written with the method, as in pasta:heads=2-5,positions=prompt"
            )
    for coeff in config.coeffs:
        around_of(config.plausible, by_coeff(coeff))
    return by_coeff


def _candidates(config: SweepConfig, n_layers: int) -> list[Candidate]:
    options: Any = {"operators": config.operators, "positions": config.positions, "unit": config.unit}
    layers, coeffs = config.layers or candidate_layers(n_layers), config.coeffs or (1.0,)
    if config.n_random is None:
        return grid(layers=layers, coeffs=coeffs, **options)
    ends = min(coeffs), max(coeffs)
    return draws(config.n_random, layers=layers, coeff_range=ends, seed=config.seed, **options)


@contextlib.contextmanager
def engine_for(config: SearchConfig) -> Iterator[Engine | None]:
    """The engine that the settings ask for; None answers in this process.

    Raises:
        SteerlensError: if Ray is not installed or not reached.
    """
    if config.engine == "local":
        yield None
        return
    from steerlens.study.engines import ray_engine

    with ray_engine(
        config.model,
        address=config.ray_address,
        n_workers=config.n_workers,
        dtype=config.dtype,
        device=config.device,
        backend=config.backend,
    ) as engine:
        yield engine


SEARCHED: tuple[Literal["vector", "text+vector"], ...] = ("vector", "text+vector")


_IN_WORDS = {"vector": "without the instruction in the prompt", "text+vector": "with it"}


def select_pairs(config: SearchConfig, *, n_test: int | None = None) -> tuple[PairSet, PairSet, PairSet, list[str]]:
    """Training, validation and test pairs without a common base query, and notes on what was left out.

    Args:
        n_test: Test prompts per instruction, at most; default: all.

    Raises:
        DataError: if nothing is left to test.
    """
    data = None if config.data is None else load_pairs(config.data, seed=config.seed, queries=config.queries)
    wanted = config.instructions or None
    if wanted is None and data is not None and config.pairs in BUNDLED_QUERIES:
        # A language only where it is tested.
        wanted = (*format_instructions(), *(name for name in language_instructions() if name in data.instructions))
    pairs = load_pairs(config.pairs, instructions=wanted, seed=config.seed)
    notes: list[str] = []
    train, valid, test = three_parts(
        pairs, None if data is None else _test_pairs(config, data, pairs, notes), seed=config.seed
    )
    if data is not None and (left_out := len(pairs) - len(train) - len(valid)):
        notes.append(f"{left_out} fitting pairs left out, because their queries are test prompts")
    kept = set(test.instructions)
    if untested := sorted({*train.instructions, *valid.instructions} - kept):
        notes.append(f"not tested, for want of test prompts: {', '.join(untested)}")
    train, valid = (PairSet(pair for pair in part if pair.instruction_id in kept) for part in (train, valid))
    train, valid = (at_most(part, n, config.seed) for part, n in ((train, config.n_train), (valid, config.n_valid)))
    test = test if n_test is None else at_most(test, n_test, config.seed)
    for name, part in (("training", train), ("validation", valid), ("test", test)):
        missing = [one for one in test.instructions if one not in part.instructions]
        if len(part) == 0 or missing:
            raise DataError(
                f"every instruction needs {name} prompts, got none for {', '.join(missing) or 'any'}; use more queries"
            )
    return train, valid, test, notes


def _test_pairs(config: SearchConfig, data: PairSet, pairs: PairSet, notes: list[str]) -> PairSet:
    known = set(pairs.instructions)
    test = PairSet(pair for pair in data if pair.instruction_id in known and pair.query is not None)
    if len(test) == 0:
        raise DataError(
            f"no test prompts are left: {config.data!r} has {', '.join(data.instructions)}, and the vectors are for "
            f"{', '.join(pairs.instructions)}; test prompts also need a base query"
        )
    if absent := [name for name in config.instructions if name not in test.instructions]:
        raise DataError(
            f"every instruction asked for needs test prompts, and {config.data!r} has none for {', '.join(absent)}"
        )
    if len(test) < len(data):
        others = sorted({pair.instruction_id for pair in data} - known)
        notes.append(
            f"{len(data) - len(test)} of {len(data)} test prompts left out ({', '.join(others) or 'no base query'})"
        )
    return test


def run_identity(config: RunConfig, model: Any, quality: Quality, *parts: PairSet) -> str:
    """A hash of the settings, the models' weights, the prompts and their frame: equal for runs with equal results.

    Files, folders and models count by what is in them, not by how their paths are spelled.
    """
    settings = {key: value for key, value in asdict(config).items() if key not in (*BY_CONTENT, *PLACE)}
    if config.attention is not None:  # not how it is written
        settings["attention"] = method(config.attention).digest
    template = template_digest(model, config.prompt_format)
    hashes = [part.content_hash for part in parts]
    return content_key([settings, quality.content(), model_digest(model), template, hashes])


BY_CONTENT = ("model", "pairs", "data", "queries", "quality_model", "reward_model", "attention")
"""Settings that name what a run's identity holds by its content."""


def check_settings(config: RunConfig, model: Any, valid: PairSet, test: PairSet, attention: Plan) -> None:
    """Refuse, before anything is run, what would stop the job later.

    Raises:
        SteerlensError: for a setting out of range, a prompt that leaves no room for its answer, attention that the model does
            not have or cannot be steered, or an instruction that stands nowhere in its prompt.
    """
    if config.trials < 1 or (config.trials > 1 and config.sampling.greedy):
        raise SteerlensError(f"trials must be 1, or more with a temperature above 0; got {config.trials}")
    if not config.coeffs:
        raise SteerlensError("coeffs must name at least one coefficient, got none; 1 is the full change")
    for layer in config.layers:
        check_layer(model, layer)
    for pair in (*valid, *test):
        pair.require_check()
    check_attention_on(model, attention, test, config)
    check_stop_ids(model, config.sampling.stop_ids)
    for part, sampling in ((valid, search_sampling(config)), (test, config.sampling)):
        for condition in ("none", "text"):
            encode_all(model, part.prompts(condition), config.prompt_format, room=sampling.max_new_tokens)


def check_attention_on(model: Any, attention: Plan, pairs: PairSet, config: SearchConfig) -> None:
    """Refuse attention that cannot be steered towards the instructions of these pairs.

    Raises:
        SteerlensError: if the model does not have its layers or heads, or an instruction stands nowhere in its prompt.
    """
    check_plan(model, attention)
    for pair in pairs if attention else ():
        bind(model, attention.on(pair), pair.text("text"), config.prompt_format)


def search_sampling(config: RunConfig) -> SamplingConfig:
    """The search's answers may be shorter than the test's."""
    return replace(config.sampling, max_new_tokens=config.search_tokens)


def made_of(model: Any, train: PairSet, valid: PairSet) -> dict[str, str]:
    """What a run's vectors come from, by content: who looks at them later must have the same."""
    return {"weights": model_digest(model), "train": train.content_hash, "valid": valid.content_hash}


def subject_of(
    folder: Path,
    config: RunConfig,
    model: Any,
    vectors: Mapping[str, SteeringVector],
    train: PairSet,
    valid: PairSet,
) -> Subject:
    """A run's vectors as they are looked at: on training and validation prompts, so that no test prompt is."""
    search = pd.read_csv(folder / "search.csv", keep_default_na=False, na_values=[""])
    chosen: dict[str, int] = {}
    for condition in SEARCHED:  # the choice without the text, and where that is none, the one with it
        rows = search[search["chosen"] & (search["condition"] == condition)].dropna(subset="layer")
        chosen = {name: int(layer) for name, layer in zip(rows["instruction"], rows["layer"], strict=True)} | chosen
    return Subject(
        model,
        vectors,
        folder,
        train=train,
        held_out=valid,
        prompts=tuple(dict.fromkeys(pair.text("none") for pair in valid)),
        chosen=chosen,
        prompt_format=config.prompt_format,
        positions=config.positions[0],
        sampling=search_sampling(config),
        batch_size=config.batch_size,
        seed=config.seed,
    )


def _see(subject: Subject, *, progress: bool) -> dict[str, str]:
    """Look at the vectors; what cannot be seen of them is said, and is no reason to lose a run."""
    _say(progress, "see: what the vectors say, and how they lie")
    unseen = []
    for see in (see_lens, see_geometry):
        try:
            see(subject)
        except SteerlensError as error:
            unseen.append(str(error))
    return {"not shown": "; ".join(unseen)} if unseen else {}


def vectors_in(
    folder: Path, config: SearchConfig, model: Any, train: PairSet, valid: PairSet, *, progress: bool
) -> dict[str, SteeringVector]:
    """One vector per instruction, kept in the folder; each knows which queries may not test it."""
    queries = " ".join(sorted(query_ids(train + valid)))
    return fit_vectors(
        model,
        train.by_instruction(),
        folder=folder / "vectors",
        metadata={"pairs": config.pairs, "seed": str(config.seed), "queries": queries},
        batch_size=config.batch_size,
        prompt_format=config.prompt_format,
        progress=progress,
    )


def _facts(
    config: RunConfig,
    model: Any,
    identity: str,
    parts: tuple[PairSet, PairSet, PairSet],
    found: Mapping[str, Sweep],
    notes: list[str],
    command: str,
) -> dict[str, Any]:
    train, valid, test = parts
    scores = pd.concat([one.scores for one in found.values()])
    return {
        **model_facts(model),
        "backend": backend_used(model, map(resid_post, range(int(model.cfg.n_layers)))),
        "vectors from": f"{config.pairs}: {train!r}",
        "searched on": f"{config.pairs}: {valid!r}",
        "tested on": f"{config.data or config.pairs}: {test!r}",
        "left out": "; ".join(notes) or "nothing",
        "prompts": frame(model, config.prompt_format),
        "operator": f"{' or '.join(config.operators)} at {' or '.join(config.positions)} positions",
        "layers searched": ", ".join(str(x) for x in scores["layer"].dropna().unique()),
        "coefficients searched": ", ".join(f"{x:g}" for x in config.coeffs) + _in_unit(config.unit),
        "search answers cut at the limit": f"{(scores['finish_reason'] == 'length').mean():.0%}; "
        "checks of how an answer ends can fail for that alone",
        **_steered_besides(config),
        "quality gate of the search": config.gate,
        "perplexity under": config.quality_model or "the unsteered model, given the bare query",
        "chosen": _choices(found["vector"]),
        "chosen with the text": _choices(found["text+vector"]),
        "sampling": f"{_in_words(config.sampling)}, at most {config.sampling.max_new_tokens} new tokens "
        f"({config.search_tokens} in the search), {config.trials} per prompt",
        "stopped by": ", ".join(map(repr, (*config.sampling.stop, *config.sampling.stop_ids)))
        or "the model's own stop tokens",
        "seed": config.seed,
        "sentences split by": sentence_splitter(),
        "identity": identity,
        "versions": library_versions(),
        "command": command,
    }


def _steered_besides(config: RunConfig) -> dict[str, str]:
    """What steers besides vectors, and behind which gate, where that was asked for."""
    found = {}
    if config.attention is not None:
        found["attention"] = f"{config.attention}: {method(config.attention)}"
    if config.plausible is not None:
        found["steered tokens"] = f"have at least {config.plausible:g} of the largest unsteered probability"
    return found


def _in_words(sampling: SamplingConfig) -> str:
    if sampling.greedy:
        return "greedy"
    cuts = [f", top {sampling.top_k}"] * (sampling.top_k is not None) + [f", top p {sampling.top_p:g}"] * (
        sampling.top_p < 1
    )
    return f"temperature {sampling.temperature:g}{''.join(cuts)}"


def _choices(found: Sweep) -> str:
    chosen = {name: found.best(name) for name in dict.fromkeys(found.table["instruction"])}
    return "; ".join(
        f"{name}: no steering"
        if best.layer is None
        else f"{name}: layer {best.layer}, {best.operator} at {best.positions}, coeff {best.coeff:g}{_in_unit(best.unit)}"
        for name, best in chosen.items()
    )


def _in_unit(unit: str) -> str:
    return " mean residual norms" if unit == "resid_norm" else ""


def _write_results(folder: Path, evaluation: Evaluation, found: Mapping[str, Sweep]) -> None:
    searched = pd.concat([one.scores for one in found.values()])
    search_table = pd.concat([one.table.assign(condition=condition) for condition, one in found.items()])
    evaluation.save(folder)
    write_atomically(folder / "search_scores.jsonl", json_lines(searched))
    write_atomically(folder / "search.csv", search_table.to_csv(index=False))


def _say(progress: bool, text: str) -> None:
    if progress:
        print(text, file=sys.stderr, flush=True)
