"""The tiny models' corpus: true to its world, true to its instructions, and really split.

The instructions' texts are judged by the package's IFEval checkers, which know nothing of how the texts were built.
"""

import random
import re
from collections import Counter

import pytest
import tiny_corpus as tc

from steerlens.checks.catalogue import format_instructions
from steerlens.checks.registry import check

NAMES = tuple(tc.world().instructions)
ENGLISH = tuple(name for name in NAMES if name != "spanish")
IDS = {name: section.note.split() for name, section in tc.world().instructions.items()}
SPLITS: tuple[tc.Split, ...] = ("train", "heldout")
# langdetect reads only the first letters of words in capitals and takes some English for German or Somali.
LEAST_PASS = {"uppercase": 0.94, "spanish": 0.98, "lowercase": 0.99}
SATISFIED_BY_ACCIDENT = {"few_capital_words"}  # "fewer than n" is true of every plain answer


def follows(example: tc.Example) -> list[bool]:
    """Whether the answer passes each of the example's checks."""
    pairs = zip(example.instruction_ids, example.kwargs, strict=True)
    return [check(example.answer, id_, kwargs).strict for id_, kwargs in pairs]


def checks_of(name: str, arguments: dict[str, object]) -> list[tuple[str, dict[str, object]]]:
    return list(zip(IDS[name], tc.INSTRUCTIONS[name].kwargs(arguments), strict=True))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_answers_follow_their_instruction(name: str, split: tc.Split) -> None:
    passed = [all(follows(e)) for e in tc.examples(split, 0, 100, only=(name,), plain=0, two=0)]
    assert sum(passed) / len(passed) >= LEAST_PASS.get(name, 1.0)


def test_answers_to_two_instructions_follow_both() -> None:
    seen: Counter[tuple[str, ...]] = Counter()
    failed: Counter[tuple[str, ...]] = Counter()
    for example in tc.examples("train", 1, 1000, plain=0, two=1):
        if len(example.instructions) == 2:
            pair = tuple(sorted(example.instructions))
            seen[pair] += 1
            failed[pair] += not all(follows(example))
    assert len(seen) > 50
    uncertain = {pair for pair in failed if set(pair) & set(LEAST_PASS)}
    assert not {pair: n for pair, n in failed.items() if n and pair not in uncertain}
    assert sum(failed.values()) / sum(seen.values()) < 0.02


@pytest.mark.parametrize("name", [n for n in NAMES if IDS[n][0] in format_instructions()])
def test_plain_answers_do_not_follow_by_accident(name: str) -> None:
    rng = random.Random(0)
    hits = []
    for example in tc.examples("train", 2, 200, plain=1):
        question = tc.Question("", "describe", (tc.entity_named(example.entity),))
        checks = checks_of(name, tc.draw_arguments(name, question, rng, "train"))
        hits.append(all(check(example.answer, id_, kwargs).strict for id_, kwargs in checks))
    rate = sum(hits) / len(hits)
    assert rate == 1.0 if name in SATISFIED_BY_ACCIDENT else rate < 0.1


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_holds_only_its_own_entities_and_phrasings(split: tc.Split) -> None:
    other: tc.Split = "heldout" if split == "train" else "train"
    strangers = {entity.name for entity in tc.world().entities if entity.heldout == (split == "train")}
    patterns = {
        name: re.compile("|".join(map(as_pattern, section.phrasings(other))), re.IGNORECASE)
        for name, section in tc.world().instructions.items()
    }
    for example in tc.examples(split, 3, 2000, two=0):
        assert not strangers & set(example.entities)
        for name in example.instructions:
            assert not patterns[name].fullmatch(example.instruction_text)


def as_pattern(phrasing: str) -> str:
    return re.sub(r"\\{\w+\\}", ".+", re.escape(phrasing).replace(r"\{n\}", r"\w+"))


def test_no_phrasing_is_in_both_splits() -> None:
    sections = [*tc.world().instructions.values(), *tc.world().questions.values()]
    sections += [section for category in tc.world().categories.values() for section in category.sections.values()]
    for section in sections:
        assert not set(section.train) & set(section.heldout), section.name
        assert len(set(section.train)) == len(section.train)
    for section in tc.world().instructions.values():
        assert len(section.train) >= 14
        assert len(section.heldout) >= 6


ARGUED = ("end", "sections", "include", "avoid")


def arguments_of(split: tc.Split, name: str) -> set[str]:
    keys = ("end_phrase", "section_spliter", "keywords", "forbidden_words")
    drawn = (e.kwargs[0] for e in tc.examples(split, 12, 200, only=(name,), plain=0, two=0))
    return {str(kwargs[key]).strip("[]'").lower() for kwargs in drawn for key in keys if key in kwargs}


@pytest.mark.parametrize("name", ARGUED)
def test_heldout_arguments_are_never_asked_for_in_training(name: str) -> None:
    train, heldout = arguments_of("train", name), arguments_of("heldout", name)
    assert len(train) > 40
    assert len(heldout) > 20
    assert not train & heldout


def test_argument_words_are_dealt_once() -> None:
    train, heldout = tc.argument_words("train"), tc.argument_words("heldout")
    assert not set(train) & set(heldout)
    assert len(heldout) > 80
    assert set(tc.keyword_frames("heldout")) <= set(heldout)


def test_every_instruction_has_a_grammar_and_all_its_arguments_are_filled() -> None:
    assert set(tc.grammars()) - {""} == set(tc.INSTRUCTIONS)
    for name, section in tc.grammars().items():
        here = tc.world().instructions.get(name)
        allowed = set() if here is None else {slot for line in here.train for slot in tc.slots(line)}
        for line in section.sentences:
            assert line.count("(") == line.count(")"), line
            assert set(tc.slots(line)) <= allowed, line


def test_a_grammar_draws_one_alternative_of_each_group_and_leaves_no_stray_space() -> None:
    line = "(Please | ) use (one | two) words (, no more | )."
    drawn = {tc.drawn_from(line, random.Random(i)) for i in range(60)}
    assert drawn == {
        f"{please}use {n} words{end}."
        for please in ("Please ", "")
        for n in ("one", "two")
        for end in (", no more", "")
    }


def test_heldout_questions_are_never_asked_in_training() -> None:
    asked = {example.query for example in tc.examples("train", 4, 2500)}
    assert not asked & {example.query for example in tc.examples("heldout", 4, 2500)}
    told = " ".join(tc.plain_documents(4, 2000))
    for phrasing in ("short portrait of", "Put together a few facts", "Is it a fact that"):
        assert phrasing not in told


def test_plain_documents_tell_the_facts_of_heldout_entities_without_instructions() -> None:
    told = "\n\n".join(tc.plain_documents(5, 5000))
    for entity in tc.world().entities:
        if entity.heldout:
            assert tc.names_entity(told, entity.name), entity.name
            about = [text for text in told.split("\n\n") if entity.name.lower() in text.lower()]
            assert any(tc.true_facts(text, entity.name) for text in about), entity.name
    phrasings = [p for s in tc.world().instructions.values() for p in s.train if "{" not in p]
    assert not [phrasing for phrasing in phrasings if phrasing in told]


def test_the_same_seed_gives_the_same_corpus() -> None:
    assert list(tc.examples("train", 6, 50)) == list(tc.examples("train", 6, 50))
    assert list(tc.examples("train", 6, 50)) != list(tc.examples("train", 7, 50))
    assert list(tc.plain_documents(6, 50)) == list(tc.plain_documents(6, 50))


def test_a_shorter_run_is_the_beginning_of_a_longer_one() -> None:
    assert list(tc.examples("train", 6, 60))[:20] == list(tc.examples("train", 6, 20))


@pytest.mark.parametrize("split", SPLITS)
def test_answers_name_the_entity_and_state_the_facts_they_claim(split: tc.Split) -> None:
    for example in tc.examples(split, 8, 1000):
        if "constrained" in example.instructions:
            assert example.facts == ()
            continue
        for name in example.entities:
            assert tc.names_entity(example.answer, name), example
        for name, attribute, _ in example.facts:
            if example.form != "yesno" or name == example.entity:
                assert attribute in tc.true_facts(example.answer, name), example


def test_facts_are_told_with_one_value_only() -> None:
    told: dict[tuple[str, str], str] = {}
    for split in SPLITS:
        for example in tc.examples(split, 9, 3000):
            for name, attribute, value in example.facts:
                assert told.setdefault((name, attribute), value) == value
    assert len(told) > 2000


def test_names_are_unique_and_capitals_lie_in_their_countries() -> None:
    entities = tc.world().entities
    assert len({entity.name.lower() for entity in entities}) == len(entities)
    countries = tc.world().categories["country"].entities
    capitals = {city: country.name for country in countries for city in country.facts["capital"]}
    for city in tc.world().categories["city"].entities:
        if city.name in capitals:
            assert city.facts["country"] == (capitals[city.name],)


def test_the_world_is_complete() -> None:
    for category in tc.world().categories.values():
        assert sum(entity.heldout for entity in category.entities) >= 2
        assert set(category.exclusive) <= set(category.attributes)
        for section in category.sections.values():
            assert section.train
            assert section.heldout
            assert any("," not in sentence for sentence in section.sentences)
            assert section.spanish
            for sentence in section.sentences:
                assert {"s", "o", "a"} & set(tc.slots(sentence)), sentence
        for name in category.attributes:
            core = category.sections[name].sentences[0]
            assert core.startswith("{s} ")
            assert "," not in core


def test_every_spanish_value_is_used_and_most_facts_can_be_told_in_spanish() -> None:
    facts = [(entity, name) for entity in tc.world().entities for name in entity.facts]
    spanish = sum(tc.values(entity, name, "es") is not None for entity, name in facts)
    assert spanish / len(facts) > 0.9


def test_yes_and_no_are_about_equally_often_right() -> None:
    answers = Counter(e.answer for e in tc.examples("train", 10, 1000, only=("constrained",), plain=0))
    assert set(answers) == {"My answer is yes.", "My answer is no.", "My answer is maybe."}
    assert 0.6 < answers["My answer is yes."] / answers["My answer is no."] < 1.7


def test_words_that_do_not_exist_are_arguments_in_training_only() -> None:
    made = re.compile(f"({'|'.join(tc.SYLLABLES)}){{2,3}}", re.IGNORECASE)
    shares = {}
    for split in ("train", "heldout"):
        drawn = [e.kwargs[0]["end_phrase"] for e in tc.examples(split, 12, 300, plain=0, two=0, only=("end",))]
        words = [word for phrase in drawn for word in re.findall(r"\w+", phrase)]
        shares[split] = sum(bool(made.fullmatch(word)) for word in words) / len(words)
    assert shares["train"] > 0.15
    assert shares["heldout"] == 0


def test_the_vocabulary_stays_small() -> None:
    english: set[str] = set()
    spanish: set[str] = set()
    for example in tc.examples("train", 11, 4000):
        target = spanish if "spanish" in example.instructions else english
        target.update(re.findall(r"[^\W\d_]+", example.answer.lower()))
        english.update(re.findall(r"[^\W\d_]+", example.prompt.lower()))
    english -= {word for word in english if re.fullmatch(f"({'|'.join(tc.SYLLABLES)})+", word)}  # invented arguments
    assert 1200 < len(english) < 2100
    assert len(english | spanish) < 3400


@pytest.mark.parametrize(
    ("noun", "expected"), [("otter", "an otter"), ("ukulele", "a ukulele"), ("fox", "a fox"), ("axe", "an axe")]
)
def test_articles_follow_the_sound(noun: str, expected: str) -> None:
    assert tc.a(noun) == expected


@pytest.mark.parametrize(
    ("items", "options", "expected"),
    [
        (("a", "b", "c"), {}, "a, b and c"),
        (("a", "b", "c"), {"commas": False}, "a and b"),
        (("aves", "insectos"), {"language": "es"}, "aves e insectos"),
        (("agua", "hielo"), {"language": "es"}, "agua y hielo"),
    ],
)
def test_lists_are_joined_in_words(items: tuple[str, ...], options: dict[str, object], expected: str) -> None:
    assert tc.join(items, **options) == expected
