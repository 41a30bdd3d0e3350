"""How much attention is on the instruction, head by head, and what steering makes of it.

With A the attention after the softmax, S the instruction's tokens and Q the queries that are asked about,

    mass[layer, head]  =  mean over i in Q of  sum over j in S of A[i, j]           of each text; then the mean over texts

"before" is the model as it is, "after" the same tokens under a plan: texts are read and not sampled anew, so that the difference
is the plan's and not that of another text. Sums are taken where attention is computed: of each text one number per head is kept.

Beside each mass stands what even attention would have, the instruction's share of the tokens that a query sees. What masses do
not show: a head that attends to the instruction need not use what it reads there, and what a token holds after some layers is
no longer that token alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steerlens._results import Result
from steerlens._typing import WholeNumber, several
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import SteerlensError
from steerlens.files import query_key
from steerlens.models.attention import attn_pattern
from steerlens.models.facts import check_layer
from steerlens.models.passes import Read, Runner
from steerlens.models.probe import abilities
from steerlens.models.prompts import PromptFormat, encode, pinned
from steerlens.models.rows import Rows, pad, pad_id
from steerlens.stats.comparisons import bootstrap_columns
from steerlens.steering.attention import parts_of, towards
from steerlens.steering.edits import check_plan, edited_sites, plan_edits
from steerlens.steering.generations import Generations
from steerlens.steering.interventions import AttentionIntervention, Part
from steerlens.steering.plan import Plan, as_plan
from steerlens.steering.positions import Window, as_window
from steerlens.steering.sampling import per_row
from steerlens.steering.scores import bind

if TYPE_CHECKING:
    import plotly.graph_objects as go

MARK = AttentionIntervention("bias", 1.0)
"""A step whose weights say which tokens are the instruction's."""

CONDITIONS = ("before", "after")


@dataclass(frozen=True, eq=False)
class MassRead(Read):
    """What is kept of a layer's attention: of each row and head the mean share on some keys, over some queries.

    Example:
        >>> half = torch.tensor([[True, False, False]])
        >>> read = MassRead("blocks.0.attn.hook_pattern", "all", keys=half, queries=torch.tensor([[False, True, False]]))
        >>> pattern = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
        >>> read(pattern, Rows(torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.long), (2,))).tolist()
        [[0.25]]
    """

    keys: Bool[Tensor, "row position_and_one"] = field(kw_only=True)
    """Of each position, whether its key counts; the last column is that of padding, which never does."""
    queries: Bool[Tensor, "row position_and_one"] = field(kw_only=True)

    def __call__(self, activation: Float[Tensor, "row head query key"], rows: Rows) -> Float[Tensor, "row head"]:
        """The mean shares, in float32 on the CPU."""
        # A window keeps the last keys.
        keys = _at(self.keys, rows.key_positions[:, -activation.shape[-1] :])
        queries = _at(self.queries, rows.positions)[:, None]
        mass = torch.einsum("rhqk,rk->rhq", activation.float(), keys.float())
        # A query that is padding may hold anything.
        total = torch.where(queries, mass, 0.0).sum(-1)
        # A half type rounds every share, so that all of them together may be a little above one.
        return (total / queries.sum(-1)).clamp(max=1.0).to("cpu", torch.float32)


def _at(table: Tensor, positions: Tensor) -> Tensor:
    """Of each column what a table says of its position."""
    last = table.shape[1] - 1
    return table.to(positions.device).gather(1, positions.masked_fill(positions < 0, last))


@dataclass(frozen=True, eq=False, repr=False)
class AttentionMass(Result):
    """The share of attention on the instruction, one row per condition, layer and head.

    Columns: condition ("before", and with a plan "after"), layer, head, mass with low and high (bootstrap over base queries),
    uniform (the share of even attention), n (texts).

    >>> found = attention_mass(model, pairs[:2], layers=[3], steering=sl.spotlight(0.5))
    >>> found.table.groupby("condition", sort=False)["head"].count().to_dict()
    {'before': 5, 'after': 5}
    """

    per_prompt: pd.DataFrame
    """Before the mean: row (the text's place), prompt, condition, layer, head, mass, uniform, n_queries."""

    def plot(self, **options: Any) -> "go.Figure":
        """Layer by head, a panel for each condition and one for the change; see `figures.attention.attention_mass_map`."""
        from steerlens.figures.attention import attention_mass_map  # plotly, where a picture is asked for

        return attention_mass_map(self.table, **options)


@dataclass(frozen=True, eq=False)
class _Text:
    """A row to be read."""

    prompt: str
    tokens: tuple[int, ...]
    prompt_length: int
    plan: Plan
    span: tuple[bool, ...]
    """Of each token of the prompt, whether it is the instruction's."""
    queries: range

    @property
    def uniform(self) -> float:
        """The mean share of the instruction's tokens among those that a query sees."""
        seen = np.cumsum([*self.span, *[False] * (len(self.tokens) - len(self.span))])
        return float(np.mean([seen[position] / (position + 1) for position in self.queries]))


Queries = Literal["response", "after"]


def attention_mass(
    model: Any,
    prompts: str | Iterable[str] | Iterable[InstructionPair] | Generations,
    *,
    on: Part | Sequence[Part] | None = None,
    answers: Generations | None = None,
    steering: Plan | Sequence[Plan] | None = None,
    layers: WholeNumber | Iterable[WholeNumber] | None = None,
    positions: Queries | str | Window = "response",
    batch_size: int = 8,
    prompt_format: PromptFormat = PromptFormat(),
) -> AttentionMass:
    """The share of attention on the instruction's tokens, of every layer and head, as the model is and under a plan.

    Args:
        prompts: Pairs, whose prompts carry their instructions; texts; or what `generate` returned for texts.
        on: For texts, where the instruction stands, as in `Plan.on`; default: where the plan's own steps on attention point.
        answers: What was generated for the prompts of pairs, or for the texts: it is read after each of them.
        steering: One plan for all texts, or one per text, with steps on attention, on the residual stream, or both. Attention of
            pairs is steered towards their instructions.
        layers: Default all.
        positions: Which queries. "response": the last token of the prompt and all new ones but the last, at which the answer's
            tokens are chosen; "after": the prompt from the instruction's last token on; or a rule of steering, such as "last"
            or "all", or a `Window`.
        batch_size: Texts per pass.
        prompt_format: Chat template or plain.

    Returns:
        Means over texts, with intervals by bootstrap over base queries; missing for fewer than two.

    Raises:
        SteerlensError: where it is not known where the instruction stands, a plan has a gate or does not fit the model, answers
            are not to these prompts, or a text has no such query.
        ModelError: if the model does not show its attention.

    Example:
        >>> found = attention_mass(model, "Describe rain. Use capitals.", on="Use capitals.", layers=[0])
        >>> bool(found.table["mass"].between(0, 1).all())
        True
    """
    chosen = range(int(model.cfg.n_layers)) if layers is None else several(layers)
    kept = list(dict.fromkeys(check_layer(model, layer) for layer in chosen))
    if not kept:
        raise SteerlensError("attention is read at one layer at least, got none; leave layers out for all of them")
    texts, units = _texts(model, prompts, on, answers, steering, positions, pinned(model, prompt_format))
    conditions = CONDITIONS if steering is not None else CONDITIONS[:1]
    masses = _masses(model, texts, kept, batch_size, steered=steering is not None)
    heads = masses["before"].shape[-1]
    places = pd.DataFrame({"layer": np.repeat(kept, heads), "head": [*range(heads)] * len(kept)})
    tables, each = [], []
    for condition in conditions:
        values = masses[condition].reshape(len(texts), -1)  # [text, layer and head]
        low, high = np.quantile(bootstrap_columns(values, units), [0.025, 0.975], axis=0)
        uniform = float(np.mean([text.uniform for text in texts]))
        columns: dict[str, Any] = {
            "mass": values.mean(0),
            "low": low,
            "high": high,
            "uniform": uniform,
            "n": len(texts),
        }
        tables.append(places.assign(**columns))
        tables[-1].insert(0, "condition", condition)
        for row, text in enumerate(texts):
            said: dict[str, Any] = {"row": row, "prompt": text.prompt, "condition": condition}
            own = places.assign(mass=values[row], uniform=text.uniform, n_queries=len(text.queries))
            each.append(own.assign(**said)[[*said, *own]])
    return AttentionMass(pd.concat(tables, ignore_index=True), pd.concat(each, ignore_index=True))


def _texts(
    model: Any, prompts: Any, on: Any, answers: Generations | None, steering: Any, positions: Any, form: PromptFormat
) -> tuple[list[_Text], list[str]]:
    """The rows with their plans and spans, and of each the unit that an interval counts."""
    if not isinstance(prompts, str | PairSet | Generations):
        prompts = list(prompts)
        prompts = PairSet(prompts) if any(isinstance(one, InstructionPair) for one in prompts) else prompts
    pairs = prompts if isinstance(prompts, PairSet) else None
    if isinstance(prompts, Generations):
        prompts, answers = prompts.prompts, answers or prompts
    written = pairs.prompts("text") if pairs is not None else [prompts] if isinstance(prompts, str) else list(prompts)
    if not written:
        raise SteerlensError("attention is read on one prompt at least, got none; check the filter and the split")
    if pairs is not None and on is not None:
        raise SteerlensError(f"pairs know where their instructions stand, got on={on!r} as well; leave it out")
    if answers is not None and list(answers.prompts) != written:
        raise SteerlensError(
            f"answers must be to the same prompts in their order, got {len(answers)} for {len(written)} prompts; pass what "
            'generate(model, pairs.prompts("text")) returned'
        )
    plans = [as_plan(plan) for plan in per_row(Plan() if steering is None else steering, len(written), "steering")]
    texts = []
    for row, (prompt, plan) in enumerate(zip(written, plans, strict=True)):
        _check(model, plan)
        where = on if pairs is None else [pairs[row]]
        if where is None:
            where = next((step.spans for step in plan.attention if step.spans), None)
        if where is None:
            raise SteerlensError(
                f"the mass on an instruction needs to know where it stands in text {row}, {prompt[:60]!r}; give pairs, or "
                "on='Use capitals.'"
            )
        what, ids = f"text {row}", encode(model, prompt, form)
        mark = bind(model, towards(Plan((MARK,)), where), prompt, form, what=what).attention[0]
        plan = bind(model, plan.filled(*parts_of(where)) if plan.unbound else plan, prompt, form, what=what)
        new = answers[row].tokens if answers is not None else ()
        if answers is not None and answers[row].prompt_tokens != tuple(ids):
            raise SteerlensError(
                f"answers must be to prompts in this format, and that of {what} has other tokens; pass the prompt_format that it "
                "was generated with"
            )
        span = tuple(weight > 0 for weight in mark.weights or ())
        queries = _queries(positions, span, len(ids), len(new), what)
        texts.append(_Text(prompt, (*ids, *new), len(ids), plan, span, queries))
    return texts, [pair.query_key for pair in pairs] if pairs is not None else [query_key(text) for text in written]


def _check(model: Any, plan: Plan) -> None:
    check_plan(model, plan)
    if plan.active.gate is not None:
        # What a gate lets pass acts on one query after another, over keys that are not steered: that is no single pass.
        raise SteerlensError(
            "a gate decides token by token, and attention is read in a single pass; see what it decided in gate_table, or read "
            "attention under its steps without it: Plan(plan.gate.interventions)"
        )


def _queries(positions: Any, span: Sequence[bool], prompt_length: int, n_new: int, what: str) -> range:
    """The positions of the queries that are asked about."""
    if positions == "response":
        return range(prompt_length - 1, prompt_length + max(n_new - 1, 0))
    if positions == "after":
        return range(max(position for position, inside in enumerate(span) if inside), prompt_length)
    low, high = as_window(positions).bounds(prompt_length)
    found = range(low, min(high, prompt_length + n_new))
    if not found:
        raise SteerlensError(
            f"positions must be among the tokens of each text, got {positions} for {what} with {prompt_length} tokens of prompt "
            f"and {n_new} generated; give answers, or choose others"
        )
    return found


def _masses(
    model: Any, texts: Sequence[_Text], layers: Sequence[int], batch_size: int, *, steered: bool
) -> Mapping[str, Float[np.ndarray, "text layer head"]]:
    """Condition -> the masses of every text."""
    lengths = [len(text.tokens) for text in texts]
    able, sites = abilities(model, max(lengths)), [attn_pattern(layer) for layer in layers]
    found = np.empty((1 + steered, len(texts), len(layers), int(model.cfg.n_heads)))
    edited = edited_sites(model, [text.plan for text in texts])
    with Runner(model, {*sites, *edited}) as runner:
        for indices in able.batches(lengths, batch_size):
            batch = [texts[index] for index in indices]
            prompts = [text.prompt_length for text in batch]
            rows = pad([text.tokens for text in batch], side=able.side, pad_id=pad_id(model), prompt_lengths=prompts)
            edits = plan_edits(model, [text.plan for text in batch], prompts)
            keys = torch.zeros(len(batch), max(map(len, (text.tokens for text in batch))) + 1, dtype=torch.bool)
            queries = keys.clone()
            for place, text in enumerate(batch):
                keys[place, : len(text.span)] = torch.tensor(text.span)
                queries[place, text.queries.start : text.queries.stop] = True
            reads = [MassRead(site, "all", keys=keys, queries=queries) for site in sites]
            for condition, used in enumerate([(), edits] if steered else [()]):
                masses = runner.run(rows, edits=used, reads=reads).reads
                found[condition, indices] = torch.stack([masses[site] for site in sites], dim=1).numpy()
    return dict(zip(CONDITIONS, found, strict=False))
