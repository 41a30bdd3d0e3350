"""What is raced: figures, each a number of settings in which the contestants take turns at the same work."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from steerlens.data.load import load_pairs

UNSTEERED, HOOK = "Hugging Face, unsteered", "Hugging Face, hook"
ORIGINAL, LOOP = "original recipe", "plain loop"
OURS, OURS_UNSTEERED, OURS_ROWS = "steerlens", "steerlens, unsteered", "steerlens, every row at five layers"
PEERS = ("TransformerLens", "steering-vectors", "repeng", "nnsight")
SIDE_BY_SIDE = {HOOK: "Hugging Face", **{name: name for name in PEERS}, OURS: "steerlens"}
"""Label -> contestant, of those who do the whole work whatever it is."""

Work = dict[str, Any]
Rows = list[tuple[int, list[tuple[int, int, float]]]]
"""A prompt, and its steps: layer, row of the table of vectors, coefficient."""


@dataclass(frozen=True)
class Race:
    """One setting of one figure."""

    figure: str
    setting: str
    entries: dict[str, Work]
    """The first is what the others are held against."""
    rounds: int
    unit: str = "tokens"
    apart: bool = False
    """A process of its own for each contestant, so that its peak of memory is its own."""


@dataclass(frozen=True)
class Sizes:
    """How much is asked."""

    batches: tuple[int, ...] = (1, 8, 32)
    new_tokens: int = 64
    rounds: int = 5
    pairs: int = 64
    memory: tuple[int, ...] = (64, 512, 4096)
    sweep: tuple[int, int, int] = (5, 4, 16)
    """Layers, coefficients, prompts."""
    natural: tuple[int, int] = (64, 128)
    """Prompts, and the limit of new tokens."""
    figures: tuple[str, ...] = ("fixed", "first", "natural", "capture", "memory", "sweep", "growth")

    @property
    def n_pairs(self) -> int:
        return max(self.pairs, *self.memory) if "memory" in self.figures else max(self.pairs, 16)


FULL = {
    "tiny": Sizes(rounds=7),
    "smollm2-135m": Sizes(new_tokens=24, rounds=3, pairs=32, memory=(64, 512), natural=(64, 160)),
}
QUICK = {
    "tiny": Sizes(batches=(1, 32), new_tokens=32, rounds=3, pairs=32, figures=("fixed", "capture")),
    "smollm2-135m": Sizes(batches=(1, 8), new_tokens=8, rounds=2, figures=("fixed",)),
}
LONG = (4, 16)
"""In queries, of the longer prompts that show growth."""


@dataclass
class Material:
    """What the works of a model are made of, and what steerlens prepares from it (`Steerlens.prepare`)."""

    queries: list[str]
    pairs: list[tuple[str, str, str]]
    vectors: str
    prepared: dict[str, Any] = field(default_factory=dict)


def material(model: str, vectors: str, n_pairs: int) -> Material:
    """Queries, and pairs of one instruction; where there are too few queries for these, numbered ones follow."""
    instruction = "change_case:english_lowercase"
    known = load_pairs("tiny" if model == "tiny" else "format", instructions=instruction)
    queries = [pair.query for pair in known]
    pairs = [
        (f"{queries[k % len(known)]}{f' ({k // len(known)})' * (k >= len(known))}", known[k % len(known)].instruction)
        for k in range(n_pairs)
    ]
    long = [" ".join((queries + queries)[row * n : row * n + n]) for n in LONG for row in range(8)]
    return Material(queries + long, [(*pair, instruction) for pair in pairs], vectors)


class Races:
    """The races of one model."""

    def __init__(self, sizes: Sizes, given: Material) -> None:
        self.sizes, self.given = sizes, given
        self.lengths = given.prepared["lengths"]
        self.n_layers = len(self.lengths)
        self.five = self.spaced(5)
        self.few = max(2, sizes.rounds // 2)

    def __iter__(self) -> Iterator[Race]:
        for figure in self.sizes.figures:
            yield from getattr(self, figure)()

    def spaced(self, n: int) -> list[int]:
        return [self.n_layers * (2 * k + 1) // (2 * n) for k in range(n)]

    def one(self, prompt: int, layer: int, share: float = 1.0) -> Any:
        """A row that adds as much as the layer's fitted direction is long, or a share of it."""
        return prompt, [(layer, layer, round(share * self.lengths[layer], 4))]

    def apart(self, prompts: list[int], layers: list[int]) -> Rows:
        """Rows of which each has vectors of its own at these layers."""
        return [
            (
                prompt,
                [
                    (layer, self.n_layers + row * len(layers) + k, self.lengths[layer] / 4)
                    for k, layer in enumerate(layers)
                ],
            )
            for row, prompt in enumerate(prompts)
        ]

    def sampling(self, by: str, rows: Rows, batch: int, new_tokens: int, *, stop: bool = False) -> Work:
        prompts = sorted({prompt for prompt, _ in rows})
        return {
            "do": "generate",
            "by": by,
            "queries": [self.given.queries[prompt] for prompt in prompts],
            "ids": [self.given.prepared["ids"][prompt] for prompt in prompts],
            "rows": [[prompts.index(prompt), steps] for prompt, steps in rows],
            "vectors": self.given.vectors,
            "batch": batch,
            "new_tokens": new_tokens,
            "stop": stop,
        }

    def steered(self, rows: Rows, batch: int, new_tokens: int, *, stop: bool = False) -> dict[str, Work]:
        """The works of all that steer the same rows; of the recipe without a cache, the first row."""
        everybody = {label: self.sampling(by, rows, batch, new_tokens, stop=stop) for label, by in SIDE_BY_SIDE.items()}
        return everybody | {by: self.sampling(by, rows[:1], 1, new_tokens, stop=stop) for by in (LOOP, ORIGINAL)}

    def side_by_side(self, figure: str, batch: int, new_tokens: int) -> Race:
        plain: Rows = [(row, []) for row in range(batch)]
        rows = [self.one(row, self.n_layers // 2) for row in range(batch)]
        entries = {UNSTEERED: self.sampling("Hugging Face", plain, batch, new_tokens)}
        entries |= self.steered(rows, batch, new_tokens)
        entries[OURS_UNSTEERED] = self.sampling("steerlens", plain, batch, new_tokens)
        entries[OURS_ROWS] = self.sampling("steerlens", self.apart([*range(batch)], self.five), batch, new_tokens)
        return Race(figure, f"batch {batch}", entries, self.sizes.rounds)

    def fixed(self) -> Iterator[Race]:
        return (self.side_by_side("fixed", batch, self.sizes.new_tokens) for batch in self.sizes.batches)

    def first(self) -> Iterator[Race]:
        yield self.side_by_side("first", 1, 1)

    def natural(self) -> Iterator[Race]:
        n, limit = self.sizes.natural
        # Half the direction's length: at the whole of it texts go wrong, and never stop. Held against those who say the same:
        # unsteered texts are of other lengths, and so are their rates.
        entries = self.steered([self.one(row, self.n_layers // 2, 0.5) for row in range(n)], 32, limit, stop=True)
        yield Race("natural", f"{n} prompts, batch 32, at most {limit} tokens", entries, self.sizes.rounds)

    def capturing(self, by: str, n: int) -> Work:
        pairs, texts = self.given.pairs[:n], self.given.prepared["texts"][:n]
        return {"do": "capture", "by": by, "pairs": pairs, "texts": texts, "batch": 8}

    def capture(self) -> Iterator[Race]:
        n = self.sizes.pairs
        entries = {label: self.capturing(by, n) for label, by in SIDE_BY_SIDE.items()}
        entries[ORIGINAL] = self.capturing(ORIGINAL, max(2, n // 8))
        yield Race("capture", f"{n} pairs", entries, self.sizes.rounds, "pairs")

    def memory(self) -> Iterator[Race]:
        for n in self.sizes.memory:
            labels = SIDE_BY_SIDE | ({ORIGINAL: ORIGINAL} if n < 100 else {})
            entries = {label: self.capturing(by, n) for label, by in labels.items()}
            yield Race("memory", f"{n} pairs", entries, 3, "pairs", apart=True)

    def sweep(self) -> Iterator[Race]:
        n_layers, n_coeffs, n_prompts = self.sizes.sweep
        strengths = [(layer, 0.5 * k) for layer in self.spaced(n_layers) for k in range(1, n_coeffs + 1)]
        rows = [self.one(prompt, *strength) for strength in strengths for prompt in range(n_prompts)]
        entries = self.steered(rows, n_prompts, self.sizes.new_tokens // 2)
        entries[OURS]["batch"] = 4 * n_prompts
        yield Race("sweep", f"{n_layers} layers x {n_coeffs} coefficients x {n_prompts} prompts", entries, self.few)

    def growth(self) -> Iterator[Race]:
        base = {"queries in a prompt": 1, "new tokens": 16, "rows": 8, "layers": 1}
        grown = zip(base, ((1, *LONG), (64, 256), (1, 32, 128), (3, 5, self.n_layers)), strict=True)
        short = len(self.given.queries) - 8 * len(LONG)
        for what, value in ((what, value) for what, values in grown for value in values):
            n, new_tokens, n_rows, n_layers = (base | {what: value}).values()
            start = 0 if n == 1 else short + 8 * LONG.index(n)
            prompts = [start + row % short for row in range(n_rows)]
            entries = {
                UNSTEERED: self.sampling("Hugging Face", [(prompt, []) for prompt in prompts], n_rows, new_tokens),
                OURS: self.sampling("steerlens", self.apart(prompts, self.spaced(n_layers)), n_rows, new_tokens),
            }
            yield Race("growth", f"{what} {value}", entries, self.few)
