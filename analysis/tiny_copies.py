"""Texts in which something comes twice, from which the tiny models learn to copy (the base stage of `train_tiny.py`).

Each text holds a span and, some way further on, the span again: words drawn at random, invented words, whole sentences, the
entries of a dictionary, an item that is asked for; as it was, or in quotation marks, capitals or small letters. What stands
between is a sentence or two of the plain corpus. The second occurrence cannot be known from the language, only from the first:
words and sentences are drawn independently, so that no two texts hold the same span by more than chance. A model that predicts
it has looked it up, which is what induction heads do (Olsson et al. 2022, "In-context Learning and Induction Heads").

    from tiny_copies import copies
    next(copies(seed=0, n=1)).text
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from tiny_corpus import capital, invented, keyword_frames, plain_documents, vocabulary, world


@dataclass(frozen=True)
class Copy:
    """One text with its repetitions."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Characters [from, to) of each repetition."""
    kind: str


ASKED = (
    "Q: What did I say? I said: {x}\nA: ",
    'Q: Which words stand in quotation marks here: "{x}"?\nA: ',
    'She said: "{x}" And he said: ',
    "The sign reads {x}\nAnd the copy reads ",
)
SAID = (
    'The word of the day is "{word}".',
    "The word of the day is {word}.",
    'Somebody said "{word}" and went away.',
    "Somebody said {word} and went away.",
    'On the wall it says "{word}".',
)
VERBATIM = ("listed", "sentences", "asked", "looked up", "mentioned")
"""Kinds whose repetitions are letter for letter."""
CASES = (str, str, str, str.upper, str.lower, str.title)


def copies(seed: int, n: int, kinds: Sequence[str] = ()) -> Iterator[Copy]:
    """n texts, of these kinds only where some are given; the same for the same arguments."""
    rng = random.Random(f"copies {seed}")
    makers = (listed, listed, sentences, sentences, asked, asked, looked_up, mentioned, turned, turned, turned)
    chosen = [maker for maker in makers if not kinds or maker.__name__.replace("_", " ") in kinds]
    between = sentences_of(rng.randrange(2**32))
    for _ in range(n):
        yield rng.choice(chosen)(rng, between)


def sentences_of(seed: int) -> Iterator[str]:
    """Sentences of the plain corpus without end, each from another text."""
    while True:
        for document in plain_documents(seed, 4096, styled=0.0):
            found = [one for one in document.replace("\nA: ", "\n").splitlines()[-1].split(". ") if 10 < len(one) < 120]
            if found:
                yield capital(found[len(document) % len(found)].rstrip(".")) + "."
        seed += 1


@cache
def words() -> tuple[str, ...]:
    """What lists are made of: names, English and Spanish words of the world, those that are held out as arguments among them."""
    spanish = {word for table in world().spanish.values() for text in table.values() for word in text.split()}
    names = {word for entity in world().entities for word in entity.name.split()}
    return tuple(sorted({*vocabulary(), *keyword_frames("heldout"), *names, *(w for w in spanish if w.isalpha())}))


def some_words(rng: random.Random, low: int, high: int) -> list[str]:
    made = 0.15 if rng.random() < 0.5 else 0.0
    change = rng.choice((str, str, str, str.capitalize, str.upper))
    return [
        change(invented(rng) if rng.random() < made else rng.choice(words())) for _ in range(rng.randint(low, high))
    ]


def with_repetitions(parts: Sequence[tuple[str, bool]], kind: str) -> Copy:
    """The parts as one text; those marked are the repetitions."""
    text, spans = "", []
    for part, again in parts:
        if again:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return Copy(text, tuple(spans), kind)


def listed(rng: random.Random, between: Iterator[str]) -> Copy:
    """A list of words, now and then some sentences, and the list once or twice more."""
    sep = rng.choice((" ", " ", ", ", "\n", "\n* ", " and "))
    items = some_words(rng, 2, 16)
    text = sep.join(items)
    gap = "\n" + " ".join(next(between) for _ in range(rng.choice((0, 0, 1, 2)))) + "\n"
    return with_repetitions(
        [(text, False), (gap.replace("\n\n", "\n"), False), (text, True)]
        + [("\n", False), (text, True)] * rng.randint(0, 1),
        "listed",
    )


def sentences(rng: random.Random, between: Iterator[str]) -> Copy:
    """Sentences that have nothing to do with each other, and the same again in another order."""
    texts = [next(between) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.3:
        texts[0] = capital(" ".join(some_words(rng, 3, 9))) + rng.choice(".!?")
    again = rng.sample(texts, len(texts)) if rng.random() < 0.7 else list(texts)
    sep = rng.choice((" ", "\n"))
    parts = [(text + sep, False) for text in texts]
    for text in again:
        parts += [(text, True), (sep, False)]
    return with_repetitions(parts, "sentences")


def asked(rng: random.Random, between: Iterator[str]) -> Copy:
    """Words or a sentence that the text asks to hear again."""
    x = next(between) if rng.random() < 0.3 else " ".join(some_words(rng, 1, 6)) + rng.choice(("", ".", "?", "!"))
    before = f"{next(between)} " if rng.random() < 0.3 else ""
    return with_repetitions([(before + rng.choice(ASKED).format(x=x), False), (x, True)], "asked")


def looked_up(rng: random.Random, between: Iterator[str]) -> Copy:
    """Entries with a key and a value, and some of them again in another order."""
    n = rng.randint(2, 7)
    keys = list(dict.fromkeys(some_words(rng, n, n)))
    entries = {key: " ".join(some_words(rng, 1, 3)) for key in keys}
    line = rng.choice(("{k}: {v}", "{k} is {v}", 'The word for {k} is "{v}".', "{k} = {v}", '"{k}" means {v}'))
    before, after = line.split("{v}")
    parts = [(line.format(k=key, v=value) + "\n", False) for key, value in entries.items()]
    if rng.random() < 0.4:
        parts.append((next(between) + "\n", False))
    for key in rng.sample(keys, rng.randint(1, len(keys))):
        parts += [(before.format(k=key), False), (entries[key], True), (after + "\n", False)]
    return with_repetitions(parts, "looked up")


def mentioned(rng: random.Random, between: Iterator[str]) -> Copy:
    """A word or two, some sentences, and a sentence that holds them again."""
    word = " ".join(some_words(rng, 1, 2))
    before, after = rng.choice(SAID).split("{word}")
    topic = rng.choice(world().entities).subject
    start, end = rng.choice(world().phrases["any keyword"]).replace("{o}", topic).split("{word}")
    middle = " ".join(next(between) for _ in range(rng.randint(0, 2)))
    parts = [(f"{before}{word}{after} {middle}".strip() + f" {start}", False), (word, True), (end, False)]
    return with_repetitions(parts, "mentioned")


def turned(rng: random.Random, between: Iterator[str]) -> Copy:
    """A text, and the same in other letters or in quotation marks."""
    x = next(between) if rng.random() < 0.5 else " ".join(some_words(rng, 1, 8))
    before, after = rng.sample(CASES, 2)
    frames = ("{x}\n", '"{x}"\n', "<<{x}>>\n", "* {x}\n", "*{x}*\n", " {x}\n")
    one, two = rng.choice(frames).split("{x}"), rng.choice(frames).split("{x}")
    again = after(x) if after is not str else before(x)
    return with_repetitions(
        [(one[0] + before(x) + one[1], False), (two[0], False), (again, True), (two[1], False)], "turned"
    )
