"""Decoding under a gate: every token is computed unsteered and, where that can matter, steered (see `gates`).

Where a row's newest token has not been run, it needs the unsteered logits; where these say that steering is worth trying, those
of its trials, from the strongest to the weakest. One pass serves all rows at once, with a row of the pass for every trial. Most
trials end with the unsteered token, so that one is run beside them, unsteered, before it is known: a row takes one pass a token,
one more wherever steering has changed it, and none waits for another:

    row a    | run token 1 | try 2, run unsteered 2 | run 3                  | try 4, run unsteered 4 |
    row b    | run token 1 | run 2                  | try 3, run unsteered 3 | run steered 3          |

What is kept is unsteered: trials are copies of their rows without the newest column, and go when the pass is over, as does the
column of a token that was run and not taken. So steering acts on the newest token, through its own queries and its own residual,
and on nothing that is kept. A column goes by being hidden; where one within a row would count, as in a window, the row steps back
by a column instead, with padding on its left.

The layers of all rows are ranked before the first trials of one, at their last tokens of prompt (see `directer`). Models that may
not keep a cache run whole rows; there, too, only the last token is steered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens.models.attention import normed
from steerlens.models.backends import Cache, LeanBackend
from steerlens.models.facts import attn_in, attn_out, layer_of
from steerlens.models.passes import Edit, PassResult, Read, Runner
from steerlens.models.rows import Rows, n_hidden, pad, pad_id
from steerlens.steering.batches import Batch, Job, Row
from steerlens.steering.directer import sensitivities
from steerlens.steering.edits import PlanEdit, plan_edits
from steerlens.steering.gates import Gate, GatedToken, plausible_tokens, worth_trying
from steerlens.steering.plan import Plan
from steerlens.steering.prefill import begin, pools

PASS_BYTES = 2**30
"""Of the cache of one pass that ranks layers, at most, or without one:"""
PASS_TOKENS = 8192
"""its tokens, at most."""


@dataclass(frozen=True, eq=False)
class _Unsteered:
    """What comes next without steering."""

    logits: Float[Tensor, " d_vocab"]
    token: int


class GatedBatch(Batch):
    """Rows whose plans have a gate."""

    def __init__(self, job: Job, rows: list[Row], *, cached: bool, together: bool) -> None:
        """
        Args:
            cached: Whether a cache may be kept.
            together: Whether rows may share a pass where they are run whole.
        """
        super().__init__(job, rows)
        self.together, self.n_layers = together, int(self.model.cfg.n_layers)
        self.gates = [_gate(row) for row in rows]
        self.layers = [_layers(gate, self.n_layers) for gate in self.gates]
        self.tried = plan_edits(
            self.model, [gate.interventions for gate in self.gates], [len(row.prompt) for row in rows]
        )
        self.raw: list[_Unsteered | None] = [None] * len(rows)
        """Of each row whose trials are to be run, what it has unsteered."""
        self.ahead: list[tuple[int, Tensor] | None] = [None] * len(rows)
        """Of each row whose newest token was run beside its trials, that token and the unsteered logits after it."""
        self.ranked: dict[int, list[int]] = {}
        """By a row's index in the request: its layers, the most sensitive first."""
        self.strengths: dict[int, Float[Tensor, "trial layer"]] = {}
        """By the same index, once they are known."""
        self.columns: _Columns | None = None
        if cached and not pools(rows):
            begun = begin(job, rows)
            if begun.cache is None or begun.cache.forks:
                # Hidden columns add up, so that any window would be outgrown.
                backend, able = self.runner.backend, job.able
                no_window = isinstance(backend, LeanBackend) and backend.tree.causal_alone
                gaps = no_window and able is not None and able.gaps > 0
                self.columns = _Columns(begun.cache, begun.mask, gaps=gaps)
        ranks = any(gate.gives_way == "layers" for gate in self.gates)
        self.start = _Start(rows, self.edits, self.tried, self.columns if ranks else None)

    # --- a step ------------------------------------------------------------------------------------------------------

    def next_logits(self) -> tuple[Sequence[int], Float[Tensor, "some d_vocab"]]:
        """The rows that get a token now, and the logits that it is chosen from: steered where that is plausible."""
        n, found = len(self.rows), self._sure(self._run_ahead())
        while not found:
            trying = [place for place in range(n) if self.raw[place] is not None]
            self._rank(trying)
            # The first n items are the rows, in order, unsteered: with the newest token, or with the one that may come next.
            owners, strengths = list(range(n)), [torch.zeros(n, self.n_layers)]
            items: dict[int, range] = {}
            """Of each row whose trials are run, their places among the items."""
            for place in trying:
                strengths.append(self._strengths(place))
                items[place] = range(len(owners), len(owners) + len(strengths[-1]))
                owners += [place] * len(strengths[-1])
            logits = self._run(owners, torch.cat(strengths))
            found = self._tried(items, logits)
            found |= self._sure({place: logits[place] for place in range(n) if place not in items})
            if self.columns is not None:
                self.columns.settle(without=[place for place in trying if self.ahead[place] is None])
        places = sorted(found)
        return places, torch.stack([found[place] for place in places])

    def _run_ahead(self) -> dict[int, Float[Tensor, " d_vocab"]]:
        """The unsteered logits of the rows whose newest token was run before it was known."""
        ahead = {place: it for place, it in enumerate(self.ahead) if it is not None}
        self.ahead = [None] * len(self.rows)
        # Rounding may choose another token here than where it was run: then that one goes.
        others = [place for place, (token, _) in ahead.items() if token != self.rows[place].tokens[-1]]
        if others and self.columns is not None:
            self.columns.settle(without=others)
        return {place: logits for place, (_, logits) in ahead.items() if place not in others}

    def _sure(self, fresh: Mapping[int, Float[Tensor, " d_vocab"]]) -> dict[int, Tensor]:
        """Of these rows' unsteered logits, those where steering need not be tried; of the other rows, they are kept."""
        if not fresh:
            return {}
        places, logits = list(fresh), torch.stack([*fresh.values()])
        gates = [self.gates[place] for place in places]
        # No other test than min_p rules anything out beforehand, nor does a beta of 0.
        beta = [gate.beta if gate.criterion == "min_p" else 0.0 for gate in gates]
        worth = worth_trying(logits, torch.tensor(beta, device=logits.device)).tolist()
        tokens = self.choose(logits, [self.rows[place] for place in places])
        found = {}
        for number, (tried, token, chance) in enumerate(
            zip(worth, tokens.tolist(), _chances(logits, tokens[:, None])[:, 0].tolist(), strict=True)
        ):
            place = places[number]
            if tried and self._reaches(place):
                self.raw[place] = _Unsteered(logits[number], token)
            else:
                self.rows[place].gated.append(GatedToken("skipped", 0, 0, 0.0, None, token, float("nan"), chance))
                found[place] = logits[number]
        return found

    def _reaches(self, place: int) -> bool:
        """Whether any of a gate's interventions is meant for the newest token."""
        row = self.rows[place]
        newest = len(row.prompt) + len(row.tokens) - 1
        bounds = [step.bounds(len(row.prompt)) for step in self.gates[place].interventions]
        return any(low <= newest < high for low, high in bounds)

    def _tried(self, items: Mapping[int, range], logits: Float[Tensor, "item d_vocab"]) -> dict[int, Tensor]:
        """The logits that each of these rows' tokens is chosen from: the first trial's that passes, or the unsteered ones.

        Where that gives the unsteered token, the logits after it are kept.

        Args:
            items: Of each row, its trials' places among the logits, the strongest first.
        """
        if not items:
            return {}
        places, owners = list(items), [place for place, some in items.items() for _ in some]
        held = [_held(self.raw[place]) for place in places]
        raw = torch.stack([one.logits for one in held])
        steered = logits[[item for some in items.values() for item in some]]
        plain = torch.tensor([one.token for one in held], device=raw.device)
        wanted = self.choose(steered, [self.rows[place] for place in owners])
        passed = self._passes(raw[[places.index(place) for place in owners]], steered, wanted, owners).tolist()
        in_full = wanted[[owners.index(place) for place in places]]
        chances = _chances(raw, torch.stack([in_full, plain], dim=1)).tolist()
        tokens = wanted.tolist()
        found, start = {}, 0
        for number, (place, some) in enumerate(items.items()):
            trial = next((trial for trial in range(len(some)) if passed[start + trial]), None)
            active = [] if trial is None else self._strengths(place)[trial][self.layers[place]].tolist()
            self.rows[place].gated.append(
                GatedToken(
                    outcome="rejected" if trial is None else "weakened" if trial else "accepted",
                    n_trials=len(some) if trial is None else trial + 1,
                    n_layers=sum(share > 0 for share in active),
                    strength=sum(active) / len(self.layers[place]),
                    proposed=tokens[start],
                    raw=held[number].token,
                    p_proposed=chances[number][0],
                    p_raw=chances[number][1],
                )
            )
            found[place] = raw[number] if trial is None else steered[start + trial]
            self.raw[place] = None
            if trial is None or tokens[start + trial] == held[number].token:
                self.ahead[place] = (held[number].token, logits[place])
            start += len(some)
        return found

    def _passes(
        self,
        raw: Float[Tensor, "trial d_vocab"],
        steered: Float[Tensor, "trial d_vocab"],
        tokens: Int[Tensor, " trial"],
        owners: Sequence[int],
    ) -> Bool[Tensor, " trial"]:
        """Which trials' tokens their rows' gates let pass."""
        gates = [self.gates[place] for place in owners]
        threshold = torch.tensor([gate.threshold for gate in gates], device=raw.device)
        found = torch.zeros(len(gates), dtype=torch.bool, device=raw.device)
        for criterion in dict.fromkeys(gate.criterion for gate in gates):
            its = torch.tensor([gate.criterion == criterion for gate in gates], device=raw.device)
            found[its] = plausible_tokens(raw[its], steered[its], tokens[its], criterion, threshold[its])
        return found

    def _strengths(self, place: int) -> Float[Tensor, "trial layer"]:
        """The share at which each of a row's trials steers each layer."""
        index, gate = self.rows[place].index, self.gates[place]
        if index not in self.strengths:
            ranked = self.ranked.get(index)
            self.strengths[index] = gate.strengths(ranked or self.layers[place], self.n_layers)
        return self.strengths[index]

    def select(self, keep: Int[Tensor, " kept"]) -> None:
        chosen = keep.tolist()
        self.gates = [self.gates[place] for place in chosen]
        self.layers = [self.layers[place] for place in chosen]
        self.raw = [self.raw[place] for place in chosen]
        self.ahead = [self.ahead[place] for place in chosen]
        self.tried = [edit.select(keep) for edit in self.tried]
        if self.columns is not None:
            self.columns.select(keep)

    # --- passes ------------------------------------------------------------------------------------------------------

    def _run(self, owners: Sequence[int], strengths: Float[Tensor, "item layer"]) -> Float[Tensor, "item d_vocab"]:
        """The logits after a token of each row, its newest or the unsteered one that may come next, and then of its trials."""
        # What is never said counts neither for nor against a token.
        return self.allowed(self._logits(owners, strengths))

    def _logits(self, owners: Sequence[int], strengths: Float[Tensor, "item layer"]) -> Float[Tensor, "item d_vocab"]:
        edits = _edits(self.edits, self.tried, owners, strengths)
        rows = [self.rows[place] for place in owners]
        lengths = tuple(len(row.prompt) for row in rows)
        guesses = [[] if it is None else [it.token] for it in self.raw] + [[]] * (len(owners) - len(self.raw))
        if self.columns is None:
            ids = [[*row.prompt, *row.tokens, *guess] for row, guess in zip(rows, guesses, strict=True)]
            return torch.cat([result.logits for result in self._whole(self.runner, ids, lengths, edits)])
        newest = [(guess or row.tokens or row.prompt)[-1] for row, guess in zip(rows, guesses, strict=True)]
        return self.columns.run(self.runner, newest, owners, lengths, [*edits[0], *edits[1]])

    def _whole(
        self,
        runner: Runner,
        ids: Sequence[list[int]],
        prompt_lengths: Sequence[int],
        edits: tuple[Sequence[Edit], Sequence[PlanEdit]],
        reads: Sequence[Read] = (),
    ) -> list[PassResult]:
        """Passes over whole rows, of which the gate's interventions steer the last token alone."""
        last = torch.tensor([len(one) - 1 for one in ids])
        used: list[Edit] = [*edits[0], *(edit.starting(last) for edit in edits[1])]
        groups = [list(range(len(ids)))] if self.together else [[item] for item in range(len(ids))]
        found = []
        for group in groups:
            chosen = torch.tensor(group)
            rows = pad(
                [ids[item] for item in group],
                side="right",
                pad_id=pad_id(self.model),
                prompt_lengths=[prompt_lengths[item] for item in group],
            )
            found.append(runner.run(rows, edits=[edit.select(chosen) for edit in used], reads=reads))
        return found

    # --- ranking -----------------------------------------------------------------------------------------------------

    def _rank(self, trying: Sequence[int]) -> None:
        """Rank the layers of all rows that give way by layers, once one of them needs it: one pass costs less than several."""
        yielding = [place for place, gate in enumerate(self.gates) if gate.gives_way == "layers"]
        if all(self.rows[place].index in self.ranked for place in trying if place in yielding):
            return
        places = [place for place in yielding if self.rows[place].index not in self.ranked]
        several = [place for place in places if len(self.layers[place]) > 1]
        self.ranked |= {self.rows[place].index: self.layers[place] for place in places}
        if not several:
            return
        # Each row as it is, and with each of its layers steered alone.
        probes = [(place, layer) for place in several for layer in (None, *self.layers[place])]
        strengths = torch.zeros(len(probes), self.n_layers)
        for item, (_, layer) in enumerate(probes):
            if layer is not None:
                strengths[item, layer] = 1.0
        reads = self._at_the_prompts_end([self.rows[place] for place, _ in probes], strengths)
        start = 0
        for place in several:
            layers = self.layers[place]
            inputs, outputs = (table[start : start + len(layers) + 1] for table in reads)
            scores = sensitivities(inputs, outputs, ranking=self.gates[place].ranking, probed=layers).tolist()
            by_score = sorted(range(len(layers)), key=lambda number: (-scores[number], layers[number]))
            self.ranked[self.rows[place].index] = [layers[number] for number in by_score]
            start += len(layers) + 1

    def _at_the_prompts_end(
        self, rows: Sequence[Row], strengths: Float[Tensor, "probe layer"]
    ) -> tuple[Float[Tensor, "probe layer d_model"], Float[Tensor, "probe layer d_model"]]:
        """What goes into and comes out of every layer's attention at rows' last tokens of prompt, under these strengths."""
        layers = range(self.n_layers)
        sites = [[attn_in(self.model, layer) for layer in layers], [attn_out(self.model, layer) for layer in layers]]
        reads = [Read(site) for some in sites for site in some]
        edited = {edit.site for some in (self.start.always, self.start.tried) for edit in some}
        parts: list[dict[str, Tensor]] = []
        with Runner(self.model, {*(read.site for read in reads), *edited}) as runner:
            most = PASS_TOKENS // max(len(row.prompt) for row in rows)
            n = max(1, most if self.start.columns is None else PASS_BYTES // self.start.columns.row_bytes)
            for first in range(0, len(rows), n):
                some = rows[first : first + n]
                owners = [self.start.place[row.index] for row in some]
                edits = _edits(self.start.always, self.start.tried, owners, strengths[first : first + n])
                ids, lengths = [row.prompt for row in some], [len(row.prompt) for row in some]
                if self.start.columns is None:
                    parts += [result.reads for result in self._whole(runner, ids, lengths, edits, reads)]
                else:
                    newest = [row.prompt[-1] for row in some]
                    parts.append(
                        self.start.columns.probe(runner, newest, owners, lengths, [*edits[0], *edits[1]], reads)
                    )
        inputs, outputs = ([torch.cat([part[site] for part in parts]) for site in some] for some in sites)
        inputs = [normed(self.model, layer, found) for layer, found in enumerate(inputs)]
        return torch.stack(inputs, dim=1), torch.stack(outputs, dim=1)


class _Columns:
    """The cache of a batch, and which of its columns hold tokens; one row for each of the batch's."""

    def __init__(self, cache: Cache | None, mask: Int[Tensor, "row past"], *, gaps: bool) -> None:
        """
        Args:
            gaps: Whether hidden columns may stand within rows.
        """
        self.cache, self.mask, self.gaps = cache, mask, gaps
        self.fallen: list[Tensor | None] = []
        """Of every table of the cache the columns, a row's each, that left a full window for the newest; None elsewhere."""

    def copy(self) -> "_Columns":
        """The columns as they are now; these are written into."""
        return _Columns(None if self.cache is None else self.cache.copy(), self.mask, gaps=self.gaps)

    @property
    def row_bytes(self) -> int:
        """What a row takes, at least 1."""
        held = 0 if self.cache is None else sum(table.tensor.nbytes for table in self.cache.tables)
        return max(held // len(self.mask), 1)

    def probe(
        self,
        runner: Runner,
        newest: Sequence[int],
        owners: Sequence[int],
        prompt_lengths: Sequence[int],
        edits: Sequence[Edit],
        reads: Sequence[Read],
    ) -> dict[str, Tensor]:
        """What a pass reads over a token of some rows, each as often as it comes; the columns stay as they are."""
        chosen = torch.tensor(owners)
        cache = None if self.cache is None else self.cache.fork().select(chosen)
        return runner.run(
            _after(self.mask[chosen], newest, prompt_lengths), edits=edits, reads=reads, cache=cache
        ).reads

    def run(
        self,
        runner: Runner,
        newest: Sequence[int],
        owners: Sequence[int],
        prompt_lengths: Sequence[int],
        edits: Sequence[Edit],
    ) -> Float[Tensor, "item d_vocab"]:
        """The logits of a pass over a token more of every row, and of some rows again, without their newest column.

        `settle` has to follow.
        """
        n, cache = len(self.mask), self.cache
        mask, before = self.mask[torch.tensor(owners)], cache.tables if cache is not None else []
        if cache is not None and len(owners) > n:
            cache = cache.extended(owners[n:])
            if self.gaps:
                mask[n:, -1] = 0
            else:
                self._step_back(cache, mask, range(n, len(owners)), owners[n:])
        result = runner.run(_after(mask, newest, prompt_lengths), edits=edits, cache=cache, keep_cache=True)
        assert result.cache is not None
        self.cache = result.cache.first(n)
        self.mask = torch.cat([self.mask, torch.ones(n, 1, dtype=torch.long)], dim=1)
        if not self.gaps:
            pairs = zip(self.cache.tables, before, strict=True) if before else ()
            self.fallen = [table.fallen(old) for table, old in pairs]
        return result.logits

    def settle(self, *, without: Sequence[int]) -> None:
        """Let go of the newest column of some rows."""
        if self.gaps:
            self.mask[without, -1] = 0
            return
        assert self.cache is not None
        if without:
            self._step_back(self.cache, self.mask, without, without)
        self._trim()

    def _trim(self) -> None:
        """Cut off what is padding in every row: a batch without gaps stays as wide as its longest row."""
        if self.cache is not None and (n := n_hidden(self.mask)):
            self.cache, self.mask = self.cache.without(n), self.mask[:, n:]

    def _step_back(
        self, cache: Cache, mask: Int[Tensor, "item past"], items: Sequence[int], rows: Sequence[int]
    ) -> None:
        """Items of a cache and of its mask as they were before the newest column; each is, or is a copy of, one of the rows."""
        where, owners = torch.tensor(items), torch.tensor(rows)
        for number, table in enumerate(cache.tables):
            fallen = self.fallen[number] if self.fallen else None
            table.step_back(where, None if fallen is None else fallen[owners.to(fallen.device)])
        mask[where] = mask[where].roll(1, 1)
        mask[where, 0] = 0

    def select(self, keep: Int[Tensor, " kept"]) -> None:
        """Keep some rows."""
        self.mask = self.mask[keep]
        self.fallen = [None if it is None else it[keep.to(it.device)] for it in self.fallen]
        if self.cache is not None:
            self.cache = self.cache.select(keep)
        if not self.gaps:
            self._trim()


class _Start:
    """How a batch began: its rows before their last tokens of prompt, to rank layers from."""

    def __init__(
        self, rows: Sequence[Row], always: Sequence[Edit], tried: Sequence[PlanEdit], columns: _Columns | None
    ) -> None:
        self.place = {row.index: place for place, row in enumerate(rows)}
        self.always, self.tried = always, tried
        self.columns = None if columns is None else columns.copy()


def _edits(
    always: Sequence[Edit], tried: Sequence[PlanEdit], owners: Sequence[int], strengths: Float[Tensor, "item layer"]
) -> tuple[list[Edit], list[PlanEdit]]:
    """The edits of some rows: what always acts, and the gate's at each layer's strength, where any item has some there."""
    items = torch.tensor(owners)
    acting = strengths.any(0).tolist()
    return [edit.select(items) for edit in always], [
        edit.select(items).weakened(strengths[:, layer]) for edit in tried if acting[layer := layer_of(edit.site)]
    ]


def _gate(row: Row) -> Gate:
    assert row.plan.gate is not None
    return row.plan.gate


def _layers(gate: Gate, n_layers: int) -> list[int]:
    """The layers that a gate's interventions steer."""
    plan = Plan(gate.interventions)
    everywhere = any(step.heads is None for step in plan.attention)
    return list(range(n_layers)) if everywhere else list(plan.layers)


def _chances(logits: Float[Tensor, "row d_vocab"], tokens: Int[Tensor, "row n"]) -> Float[Tensor, "row n"]:
    """The probabilities of some tokens of each row."""
    logits = logits.float()
    return (logits.gather(1, tokens) - logits.logsumexp(-1, keepdim=True)).exp()


def _held(unsteered: _Unsteered | None) -> _Unsteered:
    assert unsteered is not None
    return unsteered


def _after(mask: Int[Tensor, "item past"], newest: Sequence[int], prompt_lengths: Sequence[int]) -> Rows:
    """A token more of some rows."""
    tokens = torch.tensor(newest)[:, None]
    return Rows(tokens, torch.cat([mask, torch.ones_like(tokens)], dim=1), tuple(prompt_lengths))
