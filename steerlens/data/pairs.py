"""Pairs of a query and the same query with an instruction, and sets of them.

    without_i = query_i        with_i = query_i + " " + instruction_i

An instruction vector is the mean difference of activations over such pairs, and an evaluation compares responses to
the two sides (Stolfo et al., "Improving Instruction-Following in Language Models through Activation Steering", ICLR
2025). Any two prompts can be a pair (`contrast`); only an evaluation needs to know how its instruction is checked, by an
id. In names, an `instruction` is a text and an `instruction_id` what tables, vectors and checks know it by.

`load_pairs("format")` gives the bundled set: base queries written for this project x the paper's twelve format
instructions. Files of IFEval, of the paper's authors and of Split-IFEval load by their path.

Splits are made by base query: a query (up to its spelling, `files.query_key`) is in one split only, whatever its
instruction, so that a vector, its layer and its score never share a prompt. A split does not make two *similar* queries
independent.

Rows of data frames, and of Arrow files, may be handed over as they are: an absent value may be None or nan, a list an
array, and a number NumPy's.

Everything drawn here depends on a seed and on the text alone, through sha256: it is the same in every process, and for
a pair it stays the same when other pairs come or go.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, overload

from steerlens._typing import WholeNumber, whole
from steerlens.checks.arguments import LANGUAGE
from steerlens.checks.registry import check_arguments
from steerlens.data.cells import Text, arguments_of, listed, text_of
from steerlens.data.conditions import ALL_CONDITIONS, WITH_TEXT
from steerlens.data.readers import instruction_in
from steerlens.errors import DataError, nearest
from steerlens.files import content_key, query_key, write_atomically

if TYPE_CHECKING:
    import pandas as pd

LONGEST_NAME = 40
"""Characters of an instruction's text that name it in tables, where it has no id; a longer text is cut."""


@dataclass(frozen=True, init=False)
class InstructionPair:
    """A base query and the same query with an instruction.

    Only an evaluation needs an id, which says how responses are checked.

    >>> pair = InstructionPair("Describe rain.", "Use capitals.")
    >>> pair.text("none"), pair.text("text")
    ('Describe rain.', 'Describe rain. Use capitals.')
    >>> checked = InstructionPair("Describe rain.", "Use capitals.", "change_case:english_capital")
    """

    query: str | None
    """The base query; None where only the full prompt is known (official IFEval)."""
    instruction: str
    """The instruction's text as it stands in `prompt`; "" where it cannot be separated from the query."""
    instruction_ids: tuple[str, ...]
    """IFEval ids or those of `register_check`, usually one, or none; a bare string is taken as one id."""
    kwargs: tuple[Mapping[str, Any], ...]
    """The arguments of each id's check, without None values; a bare dict is taken as one. Default: no arguments."""
    prompt: str
    """The full text, query and instruction. Default: "{query} {instruction}"."""
    prompt_id: str
    """Names the pair in tables. Default: 12 hex digits of a sha256 over query, prompt, ids and kwargs."""
    source: str
    """Where it comes from: "format" or a file's name."""

    def __init__(
        self,
        query: Text,
        instruction: Text,
        instruction_ids: str | Iterable[str] = (),
        kwargs: Mapping[str, Any] | Iterable[Mapping[str, Any] | float | None] | float | None = (),
        prompt: Text = "",
        prompt_id: Text = "",
        source: Text = "",
    ) -> None:
        query = text_of(query, "query")
        instruction, prompt = text_of(instruction, "instruction") or "", text_of(prompt, "prompt") or ""
        prompt_id, source = text_of(prompt_id, "prompt_id") or "", text_of(source, "source") or ""
        ids = tuple(text_of(name, "instruction id") or "" for name in listed(instruction_ids))
        arguments = tuple(arguments_of(values) for values in listed(kwargs)) or ({},) * len(ids)
        prompt = prompt or (f"{query} {instruction}" if query and instruction else "")
        if not all(ids) or len(arguments) != len(ids):
            raise DataError(
                f"ids must not be empty, and each has one dict of arguments; got ids {ids} and {len(arguments)} "
                "dicts; leave kwargs out for instructions without arguments"
            )
        if not prompt.strip() or (query is not None and not query.strip()):
            raise DataError(
                "a pair needs a query and an instruction, or a prompt, none of them empty; "
                f"got query {query!r}, instruction {instruction!r}, prompt {prompt!r}"
            )
        if not ids and not instruction.strip():
            raise DataError(
                f"a pair needs an instruction or an id, by which tables name it; got neither for the prompt {prompt!r}; "
                "two prompts that differ in anything are a pair by contrast(with_, without)"
            )
        vars(self).update(  # the class is frozen
            query=query,
            instruction=instruction,
            instruction_ids=ids,
            kwargs=arguments,
            prompt=prompt,
            prompt_id=prompt_id or digest(query, prompt, ids, arguments)[:12],
            source=source,
        )

    def __hash__(self) -> int:
        return hash((self.prompt_id, self.prompt))  # kwargs are dicts

    @property
    def instruction_id(self) -> str:
        """The ids joined by "+", without any the instruction's text, shortened: the `instruction` column of every table.

        A language is part of the name (`language:response_language_de`): German and Thai have no vector in common.

        >>> InstructionPair("Describe rain.", "Use capitals.").instruction_id
        'Use capitals.'
        """
        if not self.instruction_ids:
            return _short(self.instruction)
        return "+".join(
            f"{name}_{arguments['language']}" if name == LANGUAGE and arguments.get("language") else name
            for name, arguments in zip(self.instruction_ids, self.kwargs, strict=True)
        )

    @property
    def query_key(self) -> str:
        """What spellings of the base query have in common (`files.query_key`); without one, of the prompt."""
        return query_key(self.prompt if self.query is None else self.query)

    @property
    def query_id(self) -> str:
        """12 hex digits of `query_key`: names the query in metadata, which do not hold its text."""
        return content_key(self.query_key)[:12]

    @property
    def instruction_span(self) -> tuple[int, int]:
        """Where `instruction` stands in `prompt`: the characters [start, end).

        At the prompt's end if it stands there, else at its start, else where it occurs once.

        Raises:
            DataError: if the instruction is woven into the query, so that no span of the prompt is it.

        >>> pair = InstructionPair("Describe rain.", "Use capitals.", "change_case:english_capital")
        >>> start, end = pair.instruction_span
        >>> pair.prompt[start:end]
        'Use capitals.'
        """
        text, end = self.instruction.strip(), len(self.prompt.rstrip())
        if text and self.prompt[:end].endswith(text):
            return end - len(text), end
        start = self.prompt.find(text)
        if not text or (self.prompt[:start].strip() and self.prompt.count(text) != 1):
            raise DataError(
                f"a span needs an instruction that stands in the prompt apart from the query, and pair {self.prompt_id} "
                f"has {self.instruction!r} in {self.prompt!r}; leave out pairs whose instruction is empty"
            )
        return start, start + len(text)

    def require_check(self) -> None:
        """Refuse an instruction that nothing can check, or arguments that its check does not take.

        Raises:
            SteerlensError: naming the id, with the nearest known one, or that there is none.

        >>> InstructionPair("Describe rain.", "Use capitals.", "change_case:english_capital").require_check()
        """
        if not self.instruction_ids:
            raise DataError(
                f"an evaluation must know how to check an instruction, and {self.instruction_id!r} has no id; give its "
                'pairs one of IFEval\'s, as in instruction_ids="punctuation:no_comma", or one of your own (register_check)'
            )
        for name, arguments in zip(self.instruction_ids, self.kwargs, strict=True):
            check_arguments(name, arguments)

    def text(self, condition: str) -> str:
        """What the model is asked under `condition`: `prompt` if the text carries the instruction, else `query`."""
        if condition not in ALL_CONDITIONS:
            raise DataError(f"unknown condition {condition!r}; {nearest(condition, ALL_CONDITIONS)}")
        if condition in WITH_TEXT:
            return self.prompt
        if self.query is None:
            raise DataError(
                f"condition {condition!r} needs the base query, and pair {self.prompt_id} has only its full prompt; "
                "join the queries with load_pairs(file, queries='ifeval_wo_instructions.jsonl')"
            )
        return self.query


class PairSet(Sequence[InstructionPair]):
    """An immutable sequence of pairs whose `prompt_id`s differ.

    >>> pairs = sl.load_pairs("format", instructions=["punctuation:no_comma"])
    >>> train, valid, test = pairs.split(seed=0)
    """

    def __init__(self, pairs: Iterable[InstructionPair]) -> None:
        self._pairs = tuple(pairs)
        seen: dict[str, InstructionPair] = {}
        for pair in self._pairs:
            if pair.prompt_id in seen:
                raise DataError(
                    f"prompt_ids of a set must differ, and {pair.prompt_id!r} comes twice: {seen[pair.prompt_id].prompt!r} "
                    f"and {pair.prompt!r}; drop one, or give it another prompt_id"
                )
            seen[pair.prompt_id] = pair

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[InstructionPair]:
        return iter(self._pairs)

    @overload
    def __getitem__(self, index: int) -> InstructionPair: ...
    @overload
    def __getitem__(self, index: slice) -> "PairSet": ...
    def __getitem__(self, index: int | slice) -> "InstructionPair | PairSet":
        return PairSet(self._pairs[index]) if isinstance(index, slice) else self._pairs[index]

    def __add__(self, other: "PairSet") -> "PairSet":
        return PairSet((*self, *other)) if isinstance(other, PairSet) else NotImplemented

    def __eq__(self, other: object) -> bool:
        return self._pairs == other._pairs if isinstance(other, PairSet) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._pairs)

    def to_frame(self) -> "pd.DataFrame":
        """One row per pair: prompt_id, instruction (its id), query, prompt, source.

        >>> pair_set(["Describe rain."], "Use capitals.").to_frame().loc[0, "prompt"]
        'Describe rain. Use capitals.'
        """
        import pandas as pd  # here, because pairs are wanted sooner than tables

        columns = ("prompt_id", "instruction_id", "query", "prompt", "source")
        frame = pd.DataFrame([[getattr(pair, name) for name in columns] for pair in self], columns=list(columns))
        return frame.rename(columns={"instruction_id": "instruction"})

    def _repr_html_(self) -> str:
        shown = self[:10]
        rest = f"<p>… and {len(self) - len(shown)} more</p>" if len(shown) < len(self) else ""
        return f"<p>{self!r}</p>{shown.to_frame().to_html(index=False)}{rest}"

    def __repr__(self) -> str:
        queries = len({pair.query_key for pair in self})
        counts = ((len(self), "pair"), (queries, "query"), (len(self.instructions), "instruction"))
        return f"PairSet({', '.join(_count(n, noun) for n, noun in counts)})"

    @property
    def instructions(self) -> tuple[str, ...]:
        """The distinct `instruction_id`s, in the order in which they first come."""
        return tuple(dict.fromkeys(pair.instruction_id for pair in self))

    @property
    def content_hash(self) -> str:
        """16 hex digits over the pairs in their order (without `source`): equal for equal content."""
        # As `digest` of the list of them all, pair by pair: the text of many is large.
        found = hashlib.sha256(b"[[")
        for place, pair in enumerate(self):
            found.update(b", " * (place > 0) + _json({**asdict(pair), "source": None}))
        found.update(b"]]")
        return found.hexdigest()[:16]

    def filter(self, instructions: str | Iterable[str]) -> "PairSet":
        """The pairs with one of these instruction ids, in their order."""
        wanted = known_ids(instructions, self.instructions)
        return PairSet(pair for pair in self if pair.instruction_id in wanted)

    def by_instruction(self) -> dict[str, "PairSet"]:
        """A set for each instruction id."""
        groups: dict[str, list[InstructionPair]] = {}
        for pair in self:
            groups.setdefault(pair.instruction_id, []).append(pair)
        return {name: PairSet(pairs) for name, pairs in groups.items()}

    def prompts(self, condition: str) -> list[str]:
        """What the model is asked under `condition`, pair by pair."""
        return [pair.text(condition) for pair in self]

    def split(self, *, seed: WholeNumber = 0, fractions: Iterable[float] = (0.6, 0.2, 0.2)) -> tuple["PairSet", ...]:
        """Sets that share no base query, one per fraction of the queries; by default train, validation and test.

        The order of the pairs, and which instructions they carry, do not change where a query goes. A pair without a
        base query counts by its prompt.

        Raises:
            DataError: for an empty set, fractions that are not positive or do not sum to 1, or too few queries.
        """
        fractions = tuple(float(part) for part in fractions)
        if not fractions or min(fractions) <= 0 or not math.isclose(sum(fractions), 1):
            raise DataError(f"fractions must be positive and sum to 1, got {fractions}")
        queries = ranked({pair.query_key for pair in self}, seed)
        # Ends are rounded, not sizes, so that the parts add up to all queries.
        ends = [round(sum(fractions[:i]) * len(queries)) for i in range(len(fractions) + 1)]
        parts = [set(queries[start:end]) for start, end in pairwise(ends)]
        if not all(parts):
            raise DataError(
                f"each split needs a base query, and {_count(len(queries), 'query')} split by {fractions} gives "
                f"{[len(part) for part in parts]}; use more queries or fewer splits"
            )
        return tuple(PairSet(pair for pair in self if pair.query_key in part) for part in parts)

    def sample(self, n: WholeNumber, *, seed: WholeNumber = 0) -> "PairSet":
        """`n` pairs in their order; a smaller sample with the same seed is part of a larger one."""
        if not 1 <= (n := whole(n, "n")) <= len(self):
            raise DataError(f"n must be in [1, {len(self)}], the number of pairs; got {n}")
        chosen = set(ranked({pair.prompt_id for pair in self}, seed)[:n])
        return PairSet(pair for pair in self if pair.prompt_id in chosen)

    def sample_per_instruction(self, n: WholeNumber, *, seed: WholeNumber = 0) -> "PairSet":
        """`n` pairs of every instruction, all in their order."""
        n, groups = whole(n, "n"), self.by_instruction()
        if short := [name for name, group in groups.items() if len(group) < n]:
            raise DataError(f"n is {n}, and {short[0]} has {_count(len(groups[short[0]]), 'pair')}; lower n")
        chosen = {pair.prompt_id for group in groups.values() for pair in group.sample(n, seed=seed)}
        return PairSet(pair for pair in self if pair.prompt_id in chosen)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object a line, all or nothing; `load_pairs(path)` gives an equal set."""
        lines = [json.dumps(_plain(asdict(pair)), ensure_ascii=False) + "\n" for pair in self]
        write_atomically(path, "".join(lines))


def pair_set(
    queries: Iterable[str],
    instruction: str,
    *,
    instruction_ids: str | Iterable[str] = (),
    kwargs: Mapping[str, Any] | Iterable[Mapping[str, Any]] = (),
) -> PairSet:
    """Each query without and with one instruction of your own.

    Args:
        queries: Base queries, all different.
        instruction: The text that follows each query.
        instruction_ids: How responses are checked: an id of IFEval's or of `register_check`; only an evaluation needs it.
        kwargs: The arguments of each id's check.

    Returns:
        One pair per query, in their order.

    Raises:
        DataError: if a query comes twice, or a text is empty.

    >>> pair_set(["Describe rain.", "Describe snow."], "Answer in one word.")
    PairSet(2 pairs, 2 queries, 1 instruction)
    """
    if isinstance(queries, str):
        raise DataError(f"queries must be a list of texts, got one text, {queries[:40]!r}; put it into a list")
    return PairSet(InstructionPair(query, instruction, instruction_ids, kwargs) for query in queries)


_Texts = list[str] | tuple[str, ...]


@overload
def contrast(with_: str, without: str, *, instruction_id: str = "contrast") -> InstructionPair: ...
@overload
def contrast(with_: _Texts, without: _Texts, *, instruction_id: str = "contrast") -> PairSet: ...
def contrast(
    with_: str | _Texts, without: str | _Texts, *, instruction_id: str = "contrast"
) -> InstructionPair | PairSet:
    """Two prompts that differ in anything as a pair, or two lists of them as a set: the vector leads from `without` to `with_`.

    Args:
        with_: The prompt whose behaviour is wanted, or a list of such prompts.
        without: Its counterpart, or one for each.
        instruction_id: What tables and vectors call the difference. Give each contrast its own where several are used
            together; that of a check (`register_check`) allows evaluations.

    Returns:
        A pair for two texts, a set for two lists.

    Raises:
        DataError: if the prompts are equal, or the lists differ in length.

    >>> contrast("Describe rain as a pirate.", "Describe rain as a nurse.").text("none")
    'Describe rain as a nurse.'
    >>> contrast(["Be brief. Hi!", "Be brief. Bye!"], ["Hi!", "Bye!"])
    PairSet(2 pairs, 2 queries, 1 instruction)
    """
    if isinstance(with_, str) and isinstance(without, str):
        if with_ == without:
            raise DataError(f"the prompts of a contrast must differ, got {with_!r} twice")
        return InstructionPair(without, instruction_in(with_, without), instruction_id, prompt=with_)
    if isinstance(with_, str) or isinstance(without, str) or len(with_) != len(without):
        raise DataError(
            "a contrast needs two texts, or two lists of equal length whose texts belong together; "
            f"got {_described(with_)} and {_described(without)}"
        )
    return PairSet(contrast(*sides, instruction_id=instruction_id) for sides in zip(with_, without, strict=True))


# Small helpers.


def _described(side: str | _Texts) -> str:
    return "one text" if isinstance(side, str) else f"{len(side)} texts"


def _short(instruction: str) -> str:
    """A text in one line; a long one is cut, with a few digits of its hash, so that other texts have other names."""
    line = " ".join(instruction.split())
    return line if len(line) <= LONGEST_NAME else f"{line[: LONGEST_NAME - 8].rstrip()}… {digest(line)[:6]}"


def ranked(names: Iterable[str], seed: WholeNumber) -> list[str]:
    """The names in an order that depends on the seed alone: two sets rank the names they share alike."""
    return sorted(names, key=lambda name: digest(seed, name))


def known_ids(wanted: str | Iterable[str], known: Iterable[str]) -> set[str]:
    """The ids that are wanted.

    Raises:
        DataError: if there is none, or one that is not known.
    """
    ids = [wanted] if isinstance(wanted, str) else list(wanted)
    known = list(known)
    if not ids:
        raise DataError(f"instructions must name at least one id, got none; known: {', '.join(known)}")
    if unknown := [name for name in ids if name not in known]:
        raise DataError(f"unknown instruction id {unknown[0]!r}; {nearest(unknown[0], known)}")
    return set(ids)


def digest(*values: Any) -> str:
    """64 hex digits of the values' content; see `_plain` for what is equal content."""
    return hashlib.sha256(_json(values)).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(_plain(value), sort_keys=True).encode()


def _plain(value: Any) -> Any:
    """JSON types only, with whole floats and NumPy numbers as Python integers, so that 3 and 3.0 are one content."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _count(n: int, noun: str) -> str:
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{n} {noun if n == 1 else plural}"
