"""A small honest world and the questions, answers and instructions that the tiny models are trained on.

    world (facts) + question + instructions  ->  draft (sentences, layout)  ->  answer text

`tiny_world/` holds every fact and every phrasing; this file only combines them. An entity has attributes, an attribute
has sentences, a sentence states the facts whose `{attribute}` it names. A plain answer is a few such sentences. An
instruction acts twice: before the sentences are chosen, as a wish (how many, with or without commas, in which
language, without which word), and after, as a change to the draft's form (bullets, title, capitals, ...). `render` turns
the draft into text that makes the instruction's IFEval checker pass, because of how it is built and not by trial. (One
limit: the checkers of upper and lower case ask langdetect for the language, which takes one or two in a hundred short
English texts in capitals for another language.)

Held-out data. Entities, question phrasings and instruction phrasings (and some arguments, such as closing phrases and
keywords) are split once, in the data files or by a hash of the name. `examples("train", ...)` uses training parts only and
`examples("heldout", ...)` held-out parts only. A model that is asked about a held-out entity must still know its facts, so
`plain_documents` tells the facts of all entities, in paragraphs and in answers to training questions: no question with an
instruction is about a held-out entity during training (one may be a value there, as an orange is among the foods), and a held-out
phrasing is never seen at all, in whatever case and with whatever marks.

Facts about real things are true and coarse ("the fox lives in forests and fields"). What this does not show: knowledge of
anything outside this world, or instructions other than these. The texts use about 2000
English words and 1250 more in Spanish.

    from tiny_corpus import examples, plain_documents
    next(examples("train", seed=0, n=1)).prompt
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

FOLDER = Path(__file__).parent / "tiny_world"
OPEN, CLOSE = "\x01", "\x02"  # stand around the value of a fact inside a sentence until the draft is rendered
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
Split = Literal["train", "heldout"]
Fact = tuple[str, str, str]  # entity, attribute, value ("forests/fields")


# ---------------------------------------------------------------- the data files


@dataclass(frozen=True)
class Section:
    """One attribute of a category, one form of question, or one instruction: phrasings and sentences."""

    name: str
    note: str = ""
    """What follows the name in its line: an instruction's ids, the column names of the entities."""
    train: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    sentences: tuple[str, ...] = ()
    spanish: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)

    def phrasings(self, split: Split) -> tuple[str, ...]:
        return self.train if split == "train" else self.heldout


def read_sections(name: str) -> dict[str, Section]:
    """The `[name] note` sections of a data file; the lines before the first one are the section ""."""
    sections: dict[str, list[str]] = {"": []}
    notes = {"": ""}
    current = ""
    for line in (FOLDER / name).read_text("utf-8").splitlines():
        if line.startswith("["):
            current, _, note = line[1:].partition("]")
            sections[current], notes[current] = [], note.strip()
        elif line.strip() and not line.startswith("# "):
            sections[current].append(line.strip())
    return {name: _section(name, notes[name], lines) for name, lines in sections.items()}


def _section(name: str, note: str, lines: Sequence[str]) -> Section:
    def after(mark: str) -> tuple[str, ...]:
        return tuple(line.removeprefix(mark) for line in lines if line.startswith(mark))

    settings = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    rest = tuple(line for line in lines if not line.startswith(("? ", "?? ", "es ")))
    return Section(name, note, after("? "), after("?? "), rest, after("es "), settings)


@dataclass(frozen=True)
class Entity:
    """A thing of the world with its names and facts."""

    name: str
    category: str
    subject: str
    """As the subject of a sentence: "the fox", "Paris"."""
    indefinite: str
    spanish: str
    again: tuple[str, str]
    """A pronoun and a noun phrase for later mentions: "it", "this animal"."""
    facts: Mapping[str, tuple[str, ...]]
    heldout: bool


@dataclass(frozen=True)
class Category:
    name: str
    es_again: str
    exclusive: tuple[str, ...]
    """Attributes of which no other value is true, so that a yes/no question may have the answer no."""
    attributes: tuple[str, ...]
    sections: Mapping[str, Section]
    entities: tuple[Entity, ...]


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    sounds_like_y = noun.startswith(("uni", "uku", "eu", "one"))
    return f"an {noun}" if noun[0] in "aeiou" and not sounds_like_y else f"a {noun}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _category(name: str) -> Category:
    sections = read_sections(name)
    head, table = sections.pop("").settings, sections.pop("entities")
    attributes = tuple(table.note.split())
    rows = [[cell.strip() for cell in row.split("|")] for row in table.sentences]
    n_heldout = max(2, round(0.15 * len(rows)))
    heldout = {row[0] for row in sorted(rows, key=lambda row: _hash(row[0]))[:n_heldout]}
    pronoun, noun = (part.strip() for part in head["again"].split("|"))
    entities = []
    for mark, spanish, *cells in rows:
        bare = mark.strip("=*")
        counted = head["style"] == "count" and not mark.startswith("=")
        facts = {k: tuple(v.split("/")) for k, v in zip(attributes, cells, strict=True) if v != "-"}
        subject, indefinite = (f"the {bare}", a(bare)) if counted else (bare, bare)
        again = ("she" if mark.endswith("*") else pronoun, noun)
        entities.append(Entity(bare, head["category"], subject, indefinite, spanish, again, facts, mark in heldout))
    return Category(
        head["category"], head["es again"], tuple(head["exclusive"].split()), attributes, sections, tuple(entities)
    )


@dataclass(frozen=True)
class World:
    categories: Mapping[str, Category]
    questions: Mapping[str, Section]
    phrases: Mapping[str, tuple[str, ...]]
    instructions: Mapping[str, Section]
    spanish: Mapping[str, Mapping[str, str]]
    """Spanish for a value, per category."""

    @property
    def entities(self) -> tuple[Entity, ...]:
        return tuple(entity for category in self.categories.values() for entity in category.entities)

    def translate(self, value: str, category: str) -> str | None:
        words = self.spanish[category]
        number = re.search(r"\d+", value)
        if value in words or not number:
            return words.get(value)
        pattern = words.get(value.replace(number[0], "N"))
        return pattern and pattern.replace("N", number[0])


@cache
def world() -> World:
    """The world of `tiny_world/`, read once."""
    special = {"spanish", "questions", "phrases", "instructions", "rewordings", "grammars"}
    files = sorted(path.stem for path in FOLDER.glob("*.txt") if path.stem not in special)
    by_file = {name: _category(f"{name}.txt") for name in files}
    words = {name: _dictionary(section) for name, section in read_sections("spanish.txt").items()}
    everything = {k: v for section in reversed(words.values()) for k, v in section.items()}
    spanish = {by_file[name].name: everything | words.get(name, {}) for name in files}
    for category in by_file.values():
        for entity in category.entities:
            names = {v: v for vs in entity.facts.values() for v in vs if v.isdigit() or v.istitle()}
            spanish[category.name] = names | spanish[category.name]
    phrases = {name: section.sentences for name, section in read_sections("phrases.txt").items()}
    instructions = read_sections("instructions.txt")
    instructions.pop("")
    return World(
        {category.name: category for category in by_file.values()},
        read_sections("questions.txt"),
        phrases,
        instructions,
        spanish,
    )


def _dictionary(section: Section) -> dict[str, str]:
    pairs = (line.partition(" = ") for line in section.sentences)
    return {english: spanish for english, _, spanish in pairs}


# ---------------------------------------------------------------- sentences


@dataclass(frozen=True)
class Wish:
    """What the instructions ask of the sentences before these are chosen."""

    low: int = 1
    high: int = 8
    commas: bool = True
    language: str = "en"
    avoid: str = ""
    include: str = ""
    marked: bool = False
    """Whether each sentence must hold something to highlight."""
    joined: bool = True
    """Whether two facts may share a sentence."""


@dataclass(frozen=True)
class Sentence:
    text: str
    facts: tuple[Fact, ...] = ()
    opens_with_subject: bool = False


def join(items: Sequence[str], *, commas: bool = True, language: str = "en") -> str:
    """A list in words, "a, b and c"; without commas only the first two items, which is still true."""
    items = items if commas else items[:2]
    if len(items) == 1:
        return items[0]
    word = "and" if language == "en" else "e" if re.match(f"{OPEN}?h?i(?!e)", items[-1], re.IGNORECASE) else "y"
    return f"{', '.join(items[:-1])} {word} {items[-1]}"


def values(entity: Entity, attribute: str, language: str) -> tuple[str, ...] | None:
    """The values of one fact in a language, or None where the entity or the dictionary lacks them."""
    english = entity.facts.get(attribute)
    if english is None or language == "en":
        return english
    translated = tuple(world().translate(value, entity.category) for value in english)
    return None if None in translated else translated  # type: ignore[return-value]


@cache
def slots(template: str) -> tuple[str, ...]:
    return tuple(re.findall(r"{(\w+)}", template))


def sentence_from(template: str, entity: Entity, rng: random.Random, wish: Wish, *, first: bool) -> Sentence | None:
    """The template filled with the entity's facts, or None where a fact is missing or a wish is broken."""
    filled, facts = {}, []
    for slot in slots(template):
        if slot in ("s", "o", "a", "n", "other"):
            continue
        found = values(entity, slot, wish.language)
        if found is None:
            return None
        filled[slot] = OPEN + join(found, commas=wish.commas, language=wish.language) + CLOSE
        facts.append((entity.name, slot, "/".join(entity.facts[slot])))
    names = mentions(entity, rng, wish.language, full=first)
    if not facts:
        names = {k: name if name in ("", "it", "he", "she") else OPEN + name + CLOSE for k, name in names.items()}
    text = template.format_map(names | filled)
    if wish.language == "es":
        text = re.sub(rf"\b(de|a) ({OPEN}?)el ", r"\1l \2", text.strip()).replace("  ", " ")
    if (not wish.commas and "," in text) or (wish.marked and OPEN not in text):
        return None
    if avoided(text, wish):
        return None
    return Sentence(text, tuple(facts), template.startswith("{s} "))


def mentions(entity: Entity, rng: random.Random, language: str, *, full: bool) -> dict[str, str]:
    """What `{s}` (subject), `{o}` (object), `{a}` and `{n}` become; later mentions may be shorter."""
    if language == "es":
        again = world().categories[entity.category].es_again
        subject = entity.spanish if full else rng.choice((entity.spanish, again, "", ""))
        return {"s": subject, "o": entity.spanish, "a": entity.spanish, "n": entity.spanish}
    pronoun, noun = entity.again
    subject = other = entity.subject
    if not full:
        subject = rng.choice((pronoun, pronoun, noun, entity.subject))
        other = rng.choice((noun, entity.subject))
    return {"s": subject, "o": other, "a": entity.indefinite, "n": entity.name}


def capital(text: str) -> str:
    """The text with its first letter as a capital."""
    at = next((i for i, letter in enumerate(text) if letter.isalnum()), 0)
    return text[:at] + text[at].upper() + text[at + 1 :]


def strip(text: str) -> str:
    return text.replace(OPEN, "").replace(CLOSE, "")


def fit_sections(entity: Entity, form: str, rng: random.Random) -> list[Section]:
    """The sections that answer a question of this form, the asked one first."""
    category = world().categories[entity.category]
    attributes = [name for name in category.attributes if name in entity.facts and name != form]
    rng.shuffle(attributes)
    if form in ("describe", "list") and rng.random() < 0.7:
        attributes.sort(key=lambda name: name != category.attributes[0])
    forms = [name for name in ("why", "how", "advise") if name != form]
    rng.shuffle(forms)
    asked = [form, *([form] * (form in ("why", "how", "advise")))] if form in category.sections else []
    return [category.sections[name] for name in (*asked, *attributes, *forms)]


def sentences_about(entity: Entity, form: str, rng: random.Random, wish: Wish, n: int) -> list[Sentence]:
    """n sentences that answer a question of this form about one entity: new facts first, fewer if all is said."""
    chosen: list[Sentence] = []
    used: set[str] = set()
    stated: set[Fact] = set()
    sections = fit_sections(entity, form, rng)
    for section, may_repeat in (*((s, False) for s in sections), *((s, True) for s in sections)):
        templates = section.sentences if wish.language == "en" else section.spanish
        for template in rng.sample(templates, len(templates)) if len(chosen) < n else ():
            nameless = not {"s", "o", "a"} & set(slots(template))
            if template in used or (nameless and not chosen):
                continue
            sentence = sentence_from(template, entity, rng, wish, first=not chosen)
            if sentence is not None and (may_repeat or not sentence.facts or set(sentence.facts) - stated):
                used.add(template)
                stated.update(sentence.facts)
                chosen.append(sentence)
                break
    return link(chosen, entity, rng, wish)


def link(sentences: list[Sentence], entity: Entity, rng: random.Random, wish: Wish) -> list[Sentence]:
    """The sentences with openers; now and then two joined; at least one comma where commas are allowed."""
    phrases = world().phrases
    linked: list[Sentence] = []
    for sentence in sentences:
        opener = "openers" if linked else "first openers"
        opener = opener if wish.language == "en" else "es openers" if linked else ""
        if opener and sentence.opens_with_subject and rng.random() < 0.2:
            sentence = opened(sentence, phrases[opener], rng, wish)
        elif linked and wish.joined and wish.commas and rng.random() < 0.15 and wish.language == "en":
            start = entity.again[0] + " "
            before = linked[-1]
            if sentence.text.startswith(start) and before.opens_with_subject:
                linked[-1] = Sentence(f"{before.text[:-1]}, and {sentence.text}", before.facts + sentence.facts)
                continue
        linked.append(sentence)
    if wish.commas and not any("," in sentence.text for sentence in linked):
        for i, sentence in enumerate(linked):
            if sentence.opens_with_subject and (wish.language == "en" or i):
                key = "es openers" if wish.language == "es" else "openers" if i else "first openers"
                options = [phrase for phrase in phrases[key] if phrase.endswith(",")]
                linked[i] = opened(sentence, options, rng, wish)
                break
    return linked


def opened(sentence: Sentence, options: Sequence[str], rng: random.Random, wish: Wish) -> Sentence:
    """The sentence behind an opener such as "In fact,"."""
    fitting = [o for o in options if (wish.commas or "," not in o) and not avoided(o, wish)]
    if not fitting:
        return sentence
    return replace(sentence, text=f"{rng.choice(fitting)} {sentence.text}", opens_with_subject=False)


def avoided(text: str, wish: Wish) -> bool:
    """Whether the text holds the word that the wish forbids."""
    return bool(wish.avoid) and holds(strip(text), wish.avoid)


def holds(text: str, word: str) -> bool:
    """Whether the text holds the word or words, as such and in any case."""
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


# ---------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """What is asked: its text, its form, and the one or two entities."""

    text: str
    form: str
    entities: tuple[Entity, ...]
    claim: str = ""
    """The attribute that is asked for ("ask") or claimed ("yesno")."""
    true: bool = True


FORMS = ("ask", "why", "how", "advise", "describe", "list", "compare", "yesno")
SIZES = {"ask": (1, 3), "why": (1, 4), "how": (1, 4), "advise": (2, 4), "describe": (3, 6), "list": (3, 6)}
SIZES |= {"compare": (2, 4), "yesno": (1, 3)}


def ask(entity: Entity, form: str, rng: random.Random, split: Split, *, anyone: bool = False) -> Question:
    """A question of this form about the entity; `anyone` lets a second entity come from either split."""
    here = world().categories[entity.category]
    asked = rng.choice([name for name in here.attributes if name in entity.facts]) if form == "ask" else ""
    section = world().questions.get(form) or here.sections[asked or form]
    names = mentions(entity, rng, "en", full=True)
    others = [other for other in here.entities if other is not entity and (anyone or other.heldout == entity.heldout)]
    if form == "compare":
        other = rng.choice(others)
        return Question(_text(section, split, rng, names | {"other": other.subject}), form, (entity, other))
    if form != "yesno":
        return Question(_text(section, split, rng, names), form, (entity,), asked)
    true = rng.random() < 0.5
    claims = here.attributes if true and rng.random() < 0.5 else here.exclusive
    claim = rng.choice([name for name in claims if name in entity.facts] or [here.attributes[0]])
    said = entity.facts[claim]
    wrong = [other.facts[claim] for other in others if not set(other.facts.get(claim, said)) & set(said)]
    true = true or not wrong
    clause = replace(entity, facts={**entity.facts, claim: said if true else rng.choice(wrong)})
    sentence = sentence_from(here.sections[claim].sentences[0], clause, rng, Wish(), first=True)
    assert sentence is not None
    return Question(_text(section, split, rng, {"c": strip(sentence.text)[:-1]}), form, (entity,), claim, true)


def _text(section: Section, split: Split, rng: random.Random, names: Mapping[str, str]) -> str:
    return capital(rng.choice(section.phrasings(split)).format_map(names))


def answer(question: Question, rng: random.Random, wish: Wish) -> list[Sentence]:
    """The sentences that answer a question, as many as the wish and the question's form allow."""
    low, high = SIZES.get(question.form, SIZES["ask"])
    n = max(wish.low, min(wish.high, rng.randint(max(low, min(wish.low, high)), high)))
    entity = question.entities[0]
    if question.form == "compare":
        return compared(question.entities, rng, wish, n)
    if question.form != "yesno" or wish.language != "en":
        return sentences_about(entity, question.claim or question.form, rng, wish, n)
    key = "yes" if question.true else "no"
    template = world().categories[entity.category].sections[question.claim].sentences[0]
    core = sentence_from(template, entity, rng, wish, first=True)
    if core is None:
        return sentences_about(entity, "describe", rng, wish, n)
    options = [o for o in world().phrases[key] if wish.commas == ("," in o)]
    rest = sentences_about(entity, question.claim, rng, wish, n)[1:]
    return [opened(core, options, rng, wish), *rest]


def compared(pair: Sequence[Entity], rng: random.Random, wish: Wish, n: int) -> list[Sentence]:
    """Sentences that set two entities side by side, attribute by attribute, then facts of the first alone."""
    one, two = pair
    here, phrases = world().categories[one.category], world().phrases
    prefix = "es " if wish.language == "es" else ""
    sentences: list[Sentence] = []
    left_over = []
    for name in rng.sample(here.attributes, len(here.attributes)):
        section = here.sections[name]
        template = section.spanish[0] if prefix else section.sentences[0]
        left, right = (sentence_from(template, e, rng, wish, first=True) for e in pair)
        if len(sentences) == n or left is None or right is None or "{s}" not in template:
            left_over.append(section)
            continue
        same = one.facts[name] == two.facts[name]
        link_words = [p for p in phrases[prefix + ("too" if same else "but")] if wish.commas == p.startswith(",")]
        other = mentions(two, rng, wish.language, full=True)["o"]
        text = f"{left.text[:-1]} {rng.choice(link_words).format(other=other)}".replace(" ,", ",")
        text = text if same else f"{text} {right.text}"
        sentences.append(Sentence(text, left.facts + right.facts))
    for section in (*left_over, *(here.sections[name] for name in ("why", "how", "advise"))):
        templates = section.spanish if prefix else section.sentences
        extra = sentence_from(rng.choice(templates), one, rng, wish, first=True)
        if len(sentences) < n and extra is not None:
            sentences.append(extra)
    return sentences


# ---------------------------------------------------------------- instructions


@dataclass(frozen=True)
class Draft:
    """An answer before it becomes text: sentences and the form they will take."""

    question: Question
    sentences: tuple[Sentence, ...]
    language: str = "en"
    layout: Literal["prose", "bullets", "sections", "json", "choice"] = "prose"
    splitter: str = ""
    n_sections: int = 1
    title: str = ""
    marked: bool = False
    """Values of facts stand between stars."""
    capital_words: tuple[int, int] = (0, 0)
    """At least and at most so many words in capitals."""
    postscript: str = ""
    end: str = ""
    case: Callable[[str], str] = str
    quoted: bool = False


Arguments = Mapping[str, Any]


def _sentences(relation: str, n: int) -> dict[str, Any]:
    return {"num_sentences": n, "relation": relation}


def _nothing(arguments: Arguments) -> list[dict[str, Any]]:
    return [{}]


@dataclass(frozen=True)
class Rule:
    """What an instruction does: the arguments of its checks, its wish, and its change of the draft."""

    kwargs: Callable[[Arguments], list[dict[str, Any]]] = _nothing
    wish: Callable[[Wish, Arguments], Wish] = lambda w, a: w
    change: Callable[[Draft, Arguments], Draft] = lambda d, a: d


# In the order in which they act: wishes about sentences, then the draft's layout, its frame, and its letters.
INSTRUCTIONS: dict[str, Rule] = {
    "brief": Rule(lambda a: [_sentences("less than", 2)], lambda w, a: _count(w, 1, 1)),
    "verbose": Rule(lambda a: [_sentences("at least", 5)], lambda w, a: _count(w, 6, 8)),
    "exactly": Rule(
        lambda a: [_sentences("at least", a["n"]), _sentences("less than", a["n"] + 1)],
        lambda w, a: _count(w, a["n"], a["n"]),
    ),
    "at_most": Rule(lambda a: [_sentences("less than", a["n"] + 1)], lambda w, a: _count(w, a["n"] - 1, a["n"])),
    "at_least": Rule(lambda a: [_sentences("at least", a["n"])], lambda w, a: _count(w, a["n"], a["n"] + 1)),
    "no_comma": Rule(wish=lambda w, a: replace(w, commas=False)),
    "avoid": Rule(lambda a: [{"forbidden_words": [a["word"]]}], lambda w, a: replace(w, avoid=a["word"])),
    "include": Rule(
        lambda a: [{"keywords": [a["word"]]}], lambda w, a: replace(w, include=a["word"], low=max(w.low, 2))
    ),
    "spanish": Rule(
        lambda a: [{"language": "es"}],
        lambda w, a: replace(w, language="es", low=max(w.low, min(2, w.high)), joined=False),
        lambda d, a: replace(d, language="es"),
    ),
    "bullets": Rule(
        lambda a: [{"num_bullets": a["n"]}],
        lambda w, a: _count(w, a["n"], a["n"]),
        lambda d, a: replace(d, layout="bullets"),
    ),
    "highlights": Rule(
        lambda a: [{"num_highlights": a["n"]}],
        lambda w, a: replace(w, low=max(w.low, a["n"]), marked=True, joined=False),
        lambda d, a: replace(d, marked=True),
    ),
    "sections": Rule(
        lambda a: [{"section_spliter": a["splitter"], "num_sections": a["n"]}],
        lambda w, a: _count(w, a["n"], max(a["n"] + 2, w.low)),
        lambda d, a: replace(d, layout="sections", splitter=a["splitter"], n_sections=a["n"]),
    ),
    "json": Rule(change=lambda d, a: replace(d, layout="json")),
    "constrained": Rule(change=lambda d, a: replace(d, layout="choice")),
    "title": Rule(change=lambda d, a: replace(d, title=a["title"])),
    "postscript": Rule(
        lambda a: [{"postscript_marker": a["marker"]}],
        lambda w, a: replace(w, low=w.low + 1, high=w.high + 1),
        lambda d, a: replace(d, postscript=a["marker"]),
    ),
    "end": Rule(lambda a: [{"end_phrase": a["phrase"]}], change=lambda d, a: replace(d, end=a["phrase"])),
    "capital_words": Rule(
        lambda a: [{"capital_frequency": a["n"], "capital_relation": "at least"}],
        lambda w, a: replace(w, low=max(w.low, 2)),
        lambda d, a: replace(d, capital_words=(a["n"], 99)),
    ),
    "few_capital_words": Rule(
        lambda a: [{"capital_frequency": a["n"], "capital_relation": "less than"}],
        lambda w, a: _count(w, 1, 2),  # the checker counts every "A" that begins a sentence
        lambda d, a: replace(d, capital_words=(1, min(2, a["n"] - 1))),
    ),
    # langdetect, which the checker asks for English, is unsure of short texts, most of all in capitals.
    "lowercase": Rule(wish=lambda w, a: _count(w, 2, 8), change=lambda d, a: replace(d, case=str.lower)),
    "uppercase": Rule(wish=lambda w, a: _count(w, 3, 8), change=lambda d, a: replace(d, case=str.upper)),
    "quotation": Rule(change=lambda d, a: replace(d, quoted=True)),
}


def _count(wish: Wish, low: int, high: int) -> Wish:
    """The wish with a narrower number of sentences; the narrower of two wishes wins."""
    low, high = max(low, wish.low), min(high, wish.high)
    return replace(wish, low=min(low, high), high=high, joined=False)


@cache
def partners(name: str) -> tuple[str, ...]:
    """The instructions that may stand beside this one: each names the other in its `with` line."""
    table = {other: section.settings["with"].split() for other, section in world().instructions.items()}
    return tuple(other for other in table if name in table[other] and other in table[name])


def draw_arguments(name: str, question: Question, rng: random.Random, split: Split) -> dict[str, Any]:
    """Arguments of an instruction: from the data file's choices, words that suit the question, or any words of the split."""
    settings = world().instructions[name].settings
    drawn: dict[str, Any] = {}
    for key in ("n", "splitter", "phrase", "marker"):
        choices = (split == "heldout" and settings.get(f"== {key}")) or settings.get(f"= {key}")
        if choices:
            drawn[key] = rng.choice([choice.strip() for choice in choices.split("|")])
    if "n" in drawn:
        drawn["n"] = int(drawn["n"])
    if "phrase" in drawn and rng.random() < FREE:
        words = [free_word(rng, split) for _ in range(rng.randint(2, 6))]
        drawn["phrase"] = capital(" ".join(words)) + rng.choice(".?!")
    if "splitter" in drawn and rng.random() < FREE:
        word = next(word for word in iter(lambda: free_word(rng, split), "") if len(word) < 9)
        drawn["splitter"] = rng.choice((word.capitalize(), word.upper()))
    if name in ("include", "avoid"):
        drawn["word"] = draw_word(name, question, rng, split)
    if name == "title":
        drawn["title"] = rng.choice(world().phrases["titles"])
    return drawn


FREE = 0.7
"""Share of closing phrases and section marks that are random words; the others come from the lists in instructions.txt."""


SYLLABLES = (
    *("ba", "ki", "lo", "mu", "ne", "pa", "ri", "so", "tu", "ve", "zi"),
    *("dra", "gle", "fro", "sta", "plo", "kre", "wun", "tel", "mar"),
)
INVENTED = 0.35
"""Share of invented words among those that are drawn freely for training: a word that is seen once can only be copied."""


def invented(rng: random.Random) -> str:
    """A word that does not exist."""
    parts = rng.choices(SYLLABLES, k=rng.randint(2, 3))
    return "".join(parts)


def free_word(rng: random.Random, split: Split) -> str:
    """Any word for a closing phrase, a section mark or a keyword; in training it may be one that does not exist."""
    if split == "train" and rng.random() < INVENTED:
        return invented(rng)
    return rng.choice(argument_words(split))


def draw_word(name: str, question: Question, rng: random.Random, split: Split) -> str:
    """A word or two to include or to avoid; "" where the entity's facts have none of the split to avoid."""
    facts = [value for vs in question.entities[0].facts.values() for value in vs]
    if question.claim and rng.random() < 0.5:  # what a plain answer would say
        facts = list(question.entities[0].facts[question.claim])
    taken = " ".join(e.name for e in question.entities).lower()
    allowed = set(argument_words(split))
    natural = [w for value in facts for w in value.split() if w in allowed and w not in taken]
    pairs = [" ".join(two) for value in facts for two in pairwise(value.split()) if set(two) <= allowed]
    if rng.random() < 0.2 and (pairs or name == "include"):
        free = f"{free_word(rng, split)} {free_word(rng, split)}"
        return rng.choice(pairs) if pairs and (name == "avoid" or rng.random() < 0.5) else free
    if name == "include" and (dice := rng.random()) < 0.8:
        framed = [word for word in keyword_frames(split) if word in allowed]
        return free_word(rng, split) if dice < 0.6 else rng.choice(framed)
    return rng.choice(natural or [""])


@cache
def argument_words(split: Split) -> tuple[str, ...]:
    """What closing phrases, section marks and keywords are drawn from: one in seven, and held-out names, are held out."""
    fixed = {word: of for of in ("train", "heldout") for word in keyword_frames(of)}  # type: ignore[arg-type]
    fixed |= {entity.name: "heldout" for entity in world().entities if entity.heldout}

    def side(word: str) -> str:
        stem = re.sub(r"(ies|y|es|s)$", "", word)  # a word and its plural are on one side
        return fixed.get(word) or ("heldout" if int(_hash(stem), 16) % 7 == 0 else "train")

    return tuple(
        sorted(
            word
            for word in {*vocabulary(), *keyword_frames("train"), *keyword_frames("heldout")}
            if len(word) > 3 and side(word) == split
        )
    )


@cache
def vocabulary() -> tuple[str, ...]:
    """Words of the world's facts, for arguments that are to be copied."""
    words = {word for entity in world().entities for vs in entity.facts.values() for v in vs for word in v.split()}
    return tuple(sorted(word for word in words if word.isalpha() and word.islower() and len(word) > 2))


@cache
def keyword_frames(split: Split) -> dict[str, str]:
    """Words that can be asked for in any answer, each with a sentence that holds it."""
    pairs = (line.split(": ", 1) for line in world().phrases["keywords"])
    return {word.strip("*"): text for word, text in pairs if word.startswith("*") == (split == "heldout")}


def with_keyword(
    sentences: list[Sentence], entity: Entity, rng: random.Random, wish: Wish, split: Split
) -> list[Sentence]:
    """The sentences, one of them holding the word that the wish asks for."""
    if any(holds(strip(sentence.text), wish.include) for sentence in sentences):
        return sentences
    holding = [name for name, vs in entity.facts.items() if any(f" {wish.include} " in f" {v} " for v in vs)]
    here = world().categories[entity.category].sections
    frame = keyword_frames(split).get(wish.include)
    free = rng.choice(world().phrases["any keyword"]).replace("{word}", wish.include)
    own = frame or (here[holding[0]].sentences[0] if holding else free)
    template = rng.choice((own, free))
    kept = sentences[:-1] if len(sentences) >= wish.high or len(sentences) > 2 else sentences
    extra = sentence_from(template, entity, rng, wish, first=not kept)
    return [*kept, extra] if extra is not None else kept


# ---------------------------------------------------------------- text


def render(draft: Draft) -> str:
    """The answer as text."""
    if draft.layout == "choice":
        word = "maybe" if draft.question.form != "yesno" else "yes" if draft.question.true else "no"
        return draft.case(f"My answer is {word}.")
    texts = [capital(sentence.text) for sentence in draft.sentences]
    postscript = f"\n{draft.postscript} {texts.pop()}" if draft.postscript else ""
    if draft.layout == "json":
        body = json.dumps(as_object(draft), ensure_ascii=False)
    elif draft.layout == "bullets":
        body = "\n".join(f"* {text}" for text in texts)
    elif draft.layout == "sections":
        bounds = [round(i * len(texts) / draft.n_sections) for i in range(draft.n_sections + 1)]
        groups = [" ".join(texts[i:j]) for i, j in pairwise(bounds)]
        body = "\n".join(f"{draft.splitter} {i}\n{group}" for i, group in enumerate(groups, 1))
    else:
        body = " ".join(texts)
    body += postscript
    if draft.end:
        body += (" " if draft.layout == "prose" else "\n") + draft.end
    if draft.title:
        body = f"<<{title(draft)}>>\n{body}"
    if draft.capital_words[1]:
        body = stress(body, *draft.capital_words)
    text = draft.case(body.replace(OPEN, "*").replace(CLOSE, "*") if draft.marked else strip(body))
    return f'"{text}"' if draft.quoted else text


def title(draft: Draft) -> str:
    """The title: the topics inside a short phrase, in title case."""
    if draft.language == "es":
        return capital(join([entity.spanish for entity in draft.question.entities], language="es"))
    topics = join([re.sub(r"\b(?!the\b)[a-z]", lambda m: m[0].upper(), e.subject) for e in draft.question.entities])
    return draft.title.replace("{S}", topics if not draft.title.startswith("{S}") else capital(topics))


def as_object(draft: Draft) -> dict[str, Any]:
    """The answer as a JSON object: the facts of the sentences by attribute, or the sentences where they give advice."""
    entities = draft.question.entities
    facts: dict[str, dict[str, str]] = {entity.name: {} for entity in entities}
    for sentence in draft.sentences:
        for name, attribute, value in sentence.facts:
            facts[name][attribute] = join(value.split("/"))
    if len(entities) == 2:
        return facts
    if draft.question.form in ("ask", "describe", "list") and facts[entities[0].name]:
        return {"topic": entities[0].name} | facts[entities[0].name]
    text = " ".join(capital(strip(sentence.text)) for sentence in draft.sentences)
    return {"topic": entities[0].name, "answer": text}


def stress(text: str, low: int, high: int) -> str:
    """The text with at least `low` and at most `high` words in capitals: values of facts first, then long words."""
    parts = [part for part in re.split(f"({OPEN}[^{CLOSE}]*{CLOSE})", text) if part]

    def count() -> int:
        return sum(word.isupper() for word in re.findall(r"[^\W\d_][\w.]*", "".join(parts)))

    for shortest, in_values in ((2, True), (5, False), (2, False)):
        for i, part in enumerate(parts):
            room = high - count() if in_values else low - count()
            if room > 0 and (part[0] == OPEN) == in_values:
                parts[i] = re.sub(rf"\b(?=\w*[a-z])[A-Za-z]{{{shortest},}}\b", lambda m: m[0].upper(), part, count=room)
    return "".join(parts)


# ---------------------------------------------------------------- the corpus


@dataclass(frozen=True)
class Example:
    """One question, its instructions, and an answer that follows them."""

    query: str
    instruction_text: str
    phrasings: tuple[str, ...]
    """The instructions before their arguments were put in."""
    instructions: tuple[str, ...]
    """Names as in `tiny_world/instructions.txt`, such as "bullets"; empty for a plain answer."""
    instruction_ids: tuple[str, ...]
    kwargs: tuple[Mapping[str, Any], ...]
    position: Literal["after", "before"]
    answer: str
    form: str
    entities: tuple[str, ...]
    facts: tuple[Fact, ...]
    """The facts that the answer states (none for "My answer is yes.")."""

    @property
    def prompt(self) -> str:
        parts = (self.query, self.instruction_text)
        return " ".join(part for part in (parts if self.position == "after" else parts[::-1]) if part)

    @property
    def entity(self) -> str:
        return self.entities[0]


def examples(
    split: Split,
    seed: int,
    n: int,
    *,
    plain: float = 0.2,
    two: float = 0.15,
    only: Sequence[str] = (),
) -> Iterator[Example]:
    """n examples of a split; the same for the same arguments.

    Args:
        plain: share of examples without an instruction.
        two: share of examples with two compatible instructions.
        only: instructions to draw from; default all.
    """
    rng = random.Random(f"{split} {seed}")
    pool = [entity for entity in world().entities if entity.heldout == (split == "heldout")]
    names = tuple(only) or tuple(world().instructions)
    made = 0
    while made < n:
        chosen: tuple[str, ...] = ()
        if (dice := rng.random()) >= plain:
            chosen = (rng.choice(names),)
            if dice >= 1 - two and partners(chosen[0]):
                chosen += (rng.choice(partners(chosen[0])),)
        example = make_example(rng.choice(pool), chosen, rng, split)
        if example is not None:
            made += 1
            yield example


def make_example(
    entity: Entity,
    chosen: Sequence[str],
    rng: random.Random,
    split: Split,
    *,
    anyone: bool = False,
) -> Example | None:
    """One example about the entity, or None where its facts do not suffice for the instructions."""
    form = rng.choice(FORMS)
    if "constrained" in chosen and rng.random() < 0.7:
        form = "yesno"
    elif {"spanish", "include"} & set(chosen) and form == "yesno":
        form = "ask"
    question = ask(entity, form, rng, split, anyone=anyone)
    order = sorted(chosen, key=list(INSTRUCTIONS).index)
    arguments = {name: draw_arguments(name, question, rng, split) for name in order}
    if "" in (arguments[name].get("word") for name in order):
        return None
    wish = Wish()
    for name in order:
        wish = INSTRUCTIONS[name].wish(wish, arguments[name])
    sentences = answer(question, rng, wish)
    if wish.include:
        sentences = with_keyword(sentences, entity, rng, wish, split)
    if not wish.low <= len(sentences) <= wish.high:
        return None
    if wish.include and not holds(" ".join(strip(sentence.text) for sentence in sentences), wish.include):
        return None
    draft = Draft(question, tuple(sentences))
    for name in order:
        draft = INSTRUCTIONS[name].change(draft, arguments[name])
    text = render(draft)
    if avoided(text, wish):  # in a title or a closing phrase
        return None
    sections = [world().instructions[name] for name in chosen]
    templates = [phrasing(section, split, rng) for section in sections]
    texts = [phrase(template, arguments[s.name], rng) for template, s in zip(templates, sections, strict=True)]
    facts = () if draft.layout == "choice" else tuple(fact for s in sentences for fact in s.facts)
    return Example(
        question.text,
        " ".join(texts),
        tuple(templates),
        tuple(chosen),
        tuple(id_ for section in sections for id_ in section.note.split()),
        tuple(kwargs for name in chosen for kwargs in INSTRUCTIONS[name].kwargs(arguments[name])),
        "after" if rng.random() < 0.7 else "before",
        text,
        question.form,
        tuple(e.name for e in question.entities),
        facts,
    )


def phrase(template: str, arguments: Arguments, rng: random.Random) -> str:
    """A phrasing with its arguments; a number is written as a word in half of the cases."""
    number = arguments.get("n", 0)
    shown = NUMBERS[number] if rng.random() < 0.5 else str(number)
    if " " in arguments.get("word", ""):
        template = re.sub(r"\b(the|The) (word|term)\b", r"\1 \2s", template)
    return capital(template.format_map(dict(arguments) | {"n": shown}))


def phrasing(section: Section, split: Split, rng: random.Random) -> str:
    """A way to word an instruction; in training half of them from `grammars.txt`, and never one that is held out."""
    if split == "heldout":
        return rng.choice(section.heldout)
    while True:
        lines = grammars()[section.name].sentences
        drawn = rng.random() < 0.5
        text = drawn_from(rng.choice(lines), rng) if drawn else reworded(rng.choice(section.train), rng)
        if bare(text) not in heldout_phrasings():
            break
    if rng.random() < 0.1:
        opener = rng.choice(rewordings()[1])
        small = text[1:2].islower() and not text.startswith("I'")
        text = f"{opener} {text[0].lower() + text[1:] if small else text}"
    return text


def bare(text: str) -> str:
    """The text without case, marks and spaces."""
    return "".join(letter for letter in text.casefold() if letter.isalnum() or letter in "{}")


@cache
def heldout_phrasings() -> frozenset[str]:
    return frozenset(bare(text) for section in world().instructions.values() for text in section.heldout)


@cache
def grammars() -> dict[str, Section]:
    return read_sections("grammars.txt")


def drawn_from(line: str, rng: random.Random) -> str:
    """The line with one of each group's alternatives."""
    text = re.sub(r"\(([^()]*)\)", lambda match: rng.choice(match[1].split("|")).strip(), line)
    text = re.sub(r"\s+([,.:])", r"\1", re.sub(r"\s+", " ", text.strip()))
    return text.removesuffix(".") if text.endswith("{marker}.") else text


@cache
def rewordings() -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """For each phrase the phrases that can stand for it, longer phrases first; and what may stand before an instruction."""
    sections = read_sections("rewordings.txt")
    groups = [tuple(part.strip() for part in line.split("|")) for line in sections["groups"].sentences]
    found = {phrase: group for group in reversed(groups) for phrase in group if phrase != "{n}"}
    return dict(sorted(found.items(), key=lambda item: -len(item[0]))), sections["before"].sentences


def reworded(template: str, rng: random.Random) -> str:
    """The phrasing with some of its phrases exchanged."""
    groups, _ = rewordings()
    free = r"(?<![\w{])(?<!from )(?<!quotation )"
    pattern = "|".join(rf"{free}{re.escape(phrase)}(?![\w}}])" for phrase in groups)

    def exchange(match: re.Match[str]) -> str:
        return rng.choice(groups[match[0]]) if rng.random() < 0.5 else match[0]

    return re.sub(pattern, exchange, template)


def plain_documents(seed: int, n: int, *, styled: float = 0.3, spanish: float = 0.1) -> Iterator[str]:
    """n texts for the base model, about all entities and without any instruction.

    Args:
        styled: share of texts that merely look as if an instruction had been followed (a list, a title, capitals), so
            that the base model knows these forms without knowing how they are asked for.
        spanish: share of Spanish texts.
    """
    rng = random.Random(f"plain {seed}")
    pool = world().entities
    styles = [name for name in world().instructions if name not in ("constrained", "spanish", "end", "avoid")]
    made = 0
    while made < n:
        dice = rng.random()
        chosen = (rng.choice(styles),) if dice < styled else ("spanish",) if dice < styled + spanish else ()
        example = make_example(rng.choice(pool), chosen, rng, "train", anyone=True)
        if example is not None:
            made += 1
            show_question = example.form == "yesno" or (not chosen and rng.random() < 0.5)
            yield f"Q: {example.query}\nA: {example.answer}" if show_question else example.answer


# ---------------------------------------------------------------- checks of an answer's content


@cache
def entity_named(name: str) -> Entity:
    return next(entity for entity in world().entities if entity.name == name)


def names_entity(text: str, name: str) -> bool:
    """Whether the text names the entity, in English or Spanish."""
    entity = entity_named(name)
    spanish = re.sub(r"^(el|la|los|las) ", "", entity.spanish)
    return any(re.search(rf"(?<!\w){re.escape(n)}", text, re.IGNORECASE) for n in (entity.name, spanish))


def true_facts(text: str, name: str) -> tuple[str, ...]:
    """The attributes of the entity of which the text holds a value, in English or Spanish."""
    entity = entity_named(name)
    text = re.sub(r"[*]", "", text.lower())

    def stated(value: str) -> bool:
        forms = (value, world().translate(value, entity.category) or value)
        bare = (re.sub(r"^(an?|the|el|la|los|las|una?) ", "", form.lower()) for form in forms)
        return any(re.search(rf"(?<!\w){re.escape(form)}(?!\w)", text) for form in bare)

    return tuple(attribute for attribute, vs in entity.facts.items() if any(map(stated, vs)))
