"""Responses: which are asked for, how they are sampled, and where they are kept.

A request is a pair under a condition with the plan that steers it. A `Sampler` answers requests batch by batch, keeps what it
answered under a key of all that decides a text, and never answers one twice.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack, overload

from tqdm import tqdm

from steerlens._typing import WholeNumber, whole
from steerlens.data.conditions import ALL_CONDITIONS, STEERED, WITH_TEXT
from steerlens.data.pairs import InstructionPair
from steerlens.errors import DataError, SteerlensError, nearest
from steerlens.files import Journal, content_key, derived_seed, writable_folder
from steerlens.models.facts import model_digest
from steerlens.models.prompts import PromptFormat, encode, pinned
from steerlens.models.rows import length_sorted_batches
from steerlens.steering.generations import Generation
from steerlens.steering.plan import Plan, as_plan
from steerlens.steering.sampling import generate
from steerlens.steering.settings import SamplingConfig, SamplingSettings, sampling_with


@dataclass(frozen=True)
class Request:
    """One response to be had: a pair under a condition, with the plan that steers it."""

    pair: InstructionPair
    condition: str
    plan: Plan
    trial: int
    seed: int

    @property
    def prompt(self) -> str:
        return self.pair.text(self.condition)


Batch = Sequence[Request]


Record = dict[str, Any]


Engine = Callable[["Sampler", Sequence[Batch]], Iterator[tuple[int, list[Record]]]]
"""What answers batches: for each its place and its records, as they are done."""


class Answers(Sequence[Record]):
    """The record of each request, in order; one that a journal holds is read each time that it is asked for.

    >>> answers = Sampler(model, max_new_tokens=4).generate(requests_for(test[:2], Plan(), conditions=["none"]))
    >>> len(answers), len(answers[:1]), answers[0]["finish_reason"]
    (2, 1, 'length')
    """

    def __init__(self, records: Mapping[str, Record], keys: Sequence[str]) -> None:
        self._records, self.keys = records, keys

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "Answers": ...
    def __getitem__(self, index: int | slice) -> "Record | Answers":
        if isinstance(index, slice):
            return Answers(self._records, self.keys[index])
        return self._records[self.keys[index]]

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Answers | list) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # compared by content, as a list is

    def __repr__(self) -> str:
        return f"Answers({len(self)} records)"


def requests_for(
    pairs: Iterable[InstructionPair],
    plans: Plan | Mapping[str, Plan],
    *,
    text_plans: Plan | Mapping[str, Plan] | None = None,
    conditions: Sequence[str] | None = None,
    trials: WholeNumber = 1,
    seed: WholeNumber = 0,
) -> list[Request]:
    """One request per pair, condition and trial.

    A row's seed depends on the run's seed, the query and the trial, so conditions of one pair share their random numbers.

    Args:
        plans: One plan for all pairs, or one per instruction id.
        text_plans: The same for `text+vector`, where the instruction's words may want another layer; default: `plans`.
        seed: Decides the samples of each query and trial, and the random directions of each instruction, which are drawn for
            the layers and the names of a plan's vectors: never from its numbers, which another processor rounds otherwise.
        conditions: Default: the cells that any of the plans has something for; see `cells_of`. An instruction whose own plan
            has nothing for one, such as attention alone for "vector", is answered without steering there.

    Returns:
        Requests pair by pair, condition by condition, trial by trial.

    Raises:
        DataError: for an unknown condition, an instruction without a plan, no trials, or attention to be steered towards an
            instruction that stands nowhere in a pair's prompt.
        SteerlensError: for steering that is no plan.

    Example:
        >>> [one.condition for one in requests_for(test[:1], vector.at(4), conditions=["none", "vector"])]
        ['none', 'vector']
    """
    trials, seed = whole(trials, "trials"), whole(seed, "seed")
    for condition in conditions or ():
        if condition not in ALL_CONDITIONS:
            raise DataError(
                f"a condition must be one of the cells, got {condition!r}; {nearest(condition, ALL_CONDITIONS)}"
            )
    every = _every(plans, text_plans)
    if conditions is None:
        conditions = cells_of(plans, text_plans)
    for condition in conditions:
        if condition in STEERED and any(every) and not any(_acting(plan, condition) for plan in every):
            raise DataError(
                f"a condition must have something of a plan to run with, got {condition!r} for {every[0]}; "
                f"conditions for it: {', '.join(cells_of(plans, text_plans))}"
            )
    if trials < 1:
        raise DataError(f"trials must be at least 1, got {trials}; 1 is one response per prompt and condition")
    requests = []
    acting: dict[tuple[int, str, str], tuple[Plan, Plan]] = {}
    # Pairs share what acts, so that a row costs no copy of its directions; the plan it was made of is kept, for its id.
    for pair in pairs:
        plan = plan_of(pair, plans)
        text_plan = plan if text_plans is None else plan_of(pair, text_plans)
        for condition in conditions:
            whole_plan = text_plan if condition in WITH_TEXT else plan
            case = (id(whole_plan), condition, pair.instruction_id)
            if case not in acting:
                used = _acting(whole_plan, condition)
                if condition in ("random", "text+random"):
                    used = used.placebo(seed=control_seed(used, seed, pair.instruction_id))
                acting[case] = (whole_plan, used)
            _, used = acting[case]
            if used.unbound:
                used = used.filled(pair)
            for trial in range(trials):
                row_seed = derived_seed(seed, pair.query or pair.prompt, trial)
                requests.append(Request(pair, condition, used, trial, row_seed))
    return requests


def _acting(plan: Plan, condition: str) -> Plan:
    """What of a plan a condition runs with."""
    if condition not in STEERED:
        return Plan()
    if condition == "text+attention":
        return plan.part("attention")
    whole_plan = condition in ("text+vector+attention", "text+random") or not plan.attention
    return plan if whole_plan else plan.part("residual")


def cells_of(*plans: Any) -> list[str]:
    """The conditions that plans have something for: without the instruction in the prompt, attention has nothing to point at.

    Args:
        plans: Plans, or plans per instruction id; None is left out.

    >>> cells_of(vector.at(4))
    ['none', 'vector', 'text', 'text+vector', 'random']
    >>> cells_of(sl.pasta(0.01))
    ['none', 'text', 'text+attention', 'text+random']
    """
    every = _every(*plans)
    attention = any(plan.attention for plan in every)
    residual = not attention or any(plan.residual for plan in every)
    needs = {
        "none": True,
        "vector": residual,
        "text": True,
        "text+vector": residual,
        "random": residual,
        "text+attention": attention,
        "text+vector+attention": attention and residual,
        "text+random": attention,
    }
    return [condition for condition, needed in needs.items() if needed]


def _every(*plans: Any) -> list[Plan]:
    found = [
        one for some in plans if some is not None for one in (some.values() if isinstance(some, Mapping) else [some])
    ]
    return [as_plan(one) for one in found]


def control_seed(plan: Plan, seed: WholeNumber, *names: str) -> int:
    """What decides a control's random directions: a seed, names such as the instruction's, the plan's layers and vectors' names.

    >>> control_seed(vector.at(4), 0, "a:b") == control_seed(vector.at(4, operator="ablate"), 0, "a:b")
    True
    """
    return derived_seed(seed, "random", *names, *((step.layer, step.name) for step in plan))


def plan_of(pair: InstructionPair, plans: Any) -> Plan:
    """The plan of a pair: the one plan of all, or that of its instruction.

    Raises:
        DataError: if its instruction has none.
        SteerlensError: for steering that is no plan.

    >>> plan_of(test[0], {test[0].instruction_id: vector.at(4)}).layers
    (4,)
    """
    if not isinstance(plans, Mapping):
        return as_plan(plans)
    if pair.instruction_id not in plans:
        raise DataError(
            f"every instruction needs a plan, got none for {pair.instruction_id!r}; plans: {', '.join(plans)}"
        )
    return as_plan(plans[pair.instruction_id])


class Sampler:
    """A model with fixed settings that answers requests, keeps what it answered, and never answers one twice.

    Args:
        journal: Where generations are kept; None keeps them in memory.
        batch_size: Rows per batch. A batch is written once all of its rows have stopped.
        engine: What answers batches, in any order; default: this process, one after another (see `engines` for Ray).
        settings: Fields of `sampling` by name, as in `generate`.

    Example:
        >>> sampler = Sampler(model, max_new_tokens=4)
        >>> [record["seed"] >= 0 for record in sampler.generate(requests_for(test[:1], Plan(), conditions=["none"]))]
        [True]
    """

    def __init__(
        self,
        model: Any,
        *,
        journal: Journal | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        prompt_format: PromptFormat = PromptFormat(),
        batch_size: int = 16,
        engine: "Engine | None" = None,
        progress: bool = False,
        **settings: Unpack[SamplingSettings],
    ) -> None:
        self.model, self.sampling = model, sampling_with(sampling, settings)
        self.prompt_format = pinned(model, prompt_format, None if journal is None else journal.path.parent)
        self.engine = self._here if engine is None else partial(engine, self)
        self.batch_size, self.journal, self.progress = batch_size, journal, progress
        self._kept: dict[str, Record] = {}
        self.records: Mapping[str, Record] = self._kept if journal is None else journal.records
        self.greedy = self.sampling.greedy
        # What greedy text does not depend on is left out.
        used = replace(self.sampling, top_k=None, top_p=1.0) if self.greedy else self.sampling
        self._settings = {"model": model_digest(model), "dtype": str(model.cfg.dtype), "sampling": asdict(used)}
        self._encoded: dict[str, list[int]] = {}

    def key(self, request: Request) -> str:
        """The hash of all that decides a request's text: model, tokens fed, plan with its numbers, sampling, seed."""
        return self.keys([request])[0]

    def keys(self, requests: Sequence[Request]) -> list[str]:
        """The key of each request; the numbers of a plan that several share are hashed once."""
        digests = {
            place: plan.digest for place, plan in {id(request.plan): request.plan for request in requests}.items()
        }
        return [self._key(request, digests[id(request.plan)]) for request in requests]

    def _key(self, request: Request, plan_digest: str) -> str:
        seed = None if self.greedy else request.seed
        key = [self._settings, self.encode(request.prompt), plan_digest, seed]
        # Characters are counted in the prompt as it was written, before a template trims it.
        lead = len(request.prompt) - len(request.prompt.lstrip())
        return content_key([*key, lead] if lead and request.plan.attention else key)

    def encode(self, prompt: str) -> list[int]:
        """The tokens fed for a prompt."""
        if prompt not in self._encoded:
            self._encoded[prompt] = encode(self.model, prompt, self.prompt_format)
        return self._encoded[prompt]

    def generate(self, requests: Sequence[Request]) -> Answers:
        """The record of each request, in order; what is missing is generated, batch by batch.

        Batches are formed over all requests, also those that are already answered, and written whole, so that a run that
        was cut short between two batches and goes on sees the same batches, and so the same rounding, as one that was not.

        Raises:
            SteerlensError: for several trials of greedy decoding, which would count one text several times.
        """
        if self.greedy and any(request.trial for request in requests):
            raise SteerlensError("several trials need a temperature above 0: greedy trials of a prompt are one text")
        request_keys = self.keys(requests)
        by_key = dict(zip(request_keys, requests, strict=True))
        keys = list(by_key)
        lengths = [len(self.encode(by_key[key].prompt)) for key in keys]
        batches = [
            [keys[index] for index in batch if keys[index] not in self.records]
            for batch in length_sorted_batches(lengths, self.batch_size)
        ]
        missing = [batch for batch in batches if batch]
        total = sum(map(len, missing))
        with tqdm(total=total, desc="generate", unit="row", disable=not self.progress or not total) as bar:
            n_tokens = 0
            for place, found in self.engine([[by_key[key] for key in batch] for batch in missing]):
                batch = missing[place]
                self._keep({"key": key, **record} for key, record in zip(batch, found, strict=True))
                n_tokens += sum(len(record["tokens"]) for record in found)
                bar.update(len(batch))
                bar.set_postfix_str(f"{n_tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tok/s")
        return Answers(self.records, request_keys)

    def _here(self, batches: Sequence[Batch]) -> Iterator[tuple[int, list[Record]]]:
        for place, batch in enumerate(batches):
            yield place, answer(self.model, batch, self.sampling, self.prompt_format)

    def _keep(self, records: Iterable[dict[str, Any]]) -> None:
        if self.journal is not None:
            self.journal.append(records)
        else:
            self._kept.update((record["key"], record) for record in records)


class SamplerSettings(SamplingSettings, total=False):
    """What a `Sampler` takes besides its model and journal, as keywords of a call that makes one."""

    sampling: SamplingConfig
    prompt_format: PromptFormat
    batch_size: int
    engine: Engine | None
    progress: bool


@contextmanager
def sampler_in(folder: str | Path | None, model: Any, **settings: Unpack[SamplerSettings]) -> Iterator[Sampler]:
    """A sampler whose generations are kept in a folder, in generations.jsonl; in memory where there is none.

    Raises:
        DataError: if the folder cannot be written to, or another run holds its journal.
    """
    with nullcontext() if folder is None else Journal(writable_folder(folder) / "generations.jsonl") as journal:
        yield Sampler(model, journal=journal, **settings)


def sampler_of(model: Any, out: str | Path | None, settings: SamplerSettings) -> AbstractContextManager[Sampler]:
    """The caller's sampler where one is given for the model, or a new one, in larger batches: candidates share their prompts.

    Raises:
        SteerlensError: if settings or a folder come with a sampler, which has its own.
    """
    if not isinstance(model, Sampler):
        by_default: SamplerSettings = {"batch_size": 64}
        return sampler_in(out, model, **(by_default | settings))
    if out is not None or settings:
        given = ", ".join([*settings, *["out"] * (out is not None)])
        raise SteerlensError(f"a sampler has settings and a journal of its own, got {given} as well; give them to it")
    return nullcontext(model)


def answer(
    model: Any, batch: Batch, sampling: SamplingConfig, prompt_format: PromptFormat = PromptFormat()
) -> list[Record]:
    """The records of one batch of requests, in their order: text, tokens, and what they came from."""
    rows = generate(
        model,
        [request.prompt for request in batch],
        steering=[request.plan for request in batch],
        sampling=sampling,
        seed=[request.seed for request in batch],
        batch_size=len(batch),
        prompt_format=prompt_format,
    )
    plans = {id(request.plan): request.plan for request in batch}
    steps = {place: [step.record() for step in plan.active.interventions] for place, plan in plans.items()}
    return [
        {
            "prompt": request.prompt,
            "text": row.text,
            "finish_reason": row.finish_reason,
            "seed": row.seed,
            "n_steered": row.n_steered,
            "plan": steps[id(request.plan)],
            **_gate_record(request.plan, row),
            "prompt_tokens": list(row.prompt_tokens),
            "tokens": list(row.tokens),
        }
        for request, row in zip(batch, rows, strict=True)
    ]


def _gate_record(plan: Plan, row: Generation) -> dict[str, Any]:
    """What a record says of a gate: its settings, and what it made of each token."""
    gate = plan.active.gate
    if gate is None:
        return {}
    tokens = [{name: None if value != value else value for name, value in asdict(token).items()} for token in row.gated]
    return {"gate": gate.record(), "gated": tokens}
