"""The catalogue and the checks: tables of texts, IFEval's own evaluation as oracle, and what is refused."""

import contextlib
import functools
import inspect
import itertools
import logging
import os
import random
import string
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest

from steerlens.checks.catalogue import format_instructions
from steerlens.checks.ifeval import _environment
from steerlens.checks.registry import CheckResult, check, check_all, check_arguments, instruction_types, register_check
from steerlens.checks.text import sentence_splitter
from steerlens.errors import SteerlensError

PAPER = (
    "change_case:english_lowercase",
    "change_case:english_capital",
    "change_case:capital_word_frequency",
    "punctuation:no_comma",
    "detectable_format:json_format",
    "detectable_format:title",
    "detectable_format:number_bullet_lists",
    "detectable_format:number_highlighted_sections",
    "detectable_format:multiple_sections",
    "detectable_format:constrained_response",
    "startend:quotation",
    "startend:end_checker",
)
"""The twelve format instructions of the paper."""

YES, NO, LOOSE = (True, True), (False, False), (False, True)
LOWER = "the sky turns red at sunset because its light has a long way to travel through the air."
TWO_BULLETS = {"num_bullets": 2}
HIGHLIGHTS = {"num_highlights": 2}
SECTIONS = {"section_spliter": "SECTION", "num_sections": 2}
AT_LEAST_TWO = {"capital_frequency": 2, "capital_relation": "at least"}
FEWER_THAN_TWO = {"capital_frequency": 2, "capital_relation": "less than"}
END = {"end_phrase": "That is all."}

# Instruction, arguments, response, (strict, loose).
TABLE = [
    ("change_case:english_lowercase", {}, LOWER, YES),
    ("change_case:english_lowercase", {}, "what a fine day to walk by the sea with 2 old friends!", YES),
    ("change_case:english_lowercase", {}, f"Sure!\n{LOWER}", LOOSE),
    ("change_case:english_lowercase", {}, LOWER.replace("red", "Red"), NO),
    ("change_case:english_lowercase", {}, LOWER.upper(), NO),
    ("change_case:english_lowercase", {}, "der himmel ist heute blau und die sonne scheint sehr warm auf uns.", NO),
    ("change_case:english_capital", {}, LOWER.upper(), YES),
    ("change_case:english_capital", {}, "WHAT A FINE DAY TO WALK BY THE SEA WITH 2 OLD FRIENDS!", YES),
    ("change_case:english_capital", {}, f"{LOWER.upper()}\nI hope this helps!", LOOSE),
    ("change_case:english_capital", {}, LOWER, NO),
    ("change_case:english_capital", {}, LOWER.upper().replace("RED", "red"), NO),
    ("change_case:english_capital", {}, "НЕБО КРАСНОЕ, ПОТОМУ ЧТО СВЕТ ИДЁТ ДОЛГО.", NO),  # noqa: RUF001
    ("change_case:capital_word_frequency", AT_LEAST_TWO, "This is VERY, very IMPORTANT to me.", YES),
    ("change_case:capital_word_frequency", AT_LEAST_TWO, "A DOG", YES),
    ("change_case:capital_word_frequency", AT_LEAST_TWO, "This is VERY important.", NO),
    ("change_case:capital_word_frequency", AT_LEAST_TWO, "This Is Very Important.", NO),
    ("change_case:capital_word_frequency", FEWER_THAN_TWO, "This is VERY important.", YES),
    ("change_case:capital_word_frequency", FEWER_THAN_TWO, "MY ANSWER:\nThis is very important.", LOOSE),
    ("change_case:capital_word_frequency", FEWER_THAN_TWO, "This is VERY IMPORTANT.", NO),
    ("punctuation:no_comma", {}, "Red light travels further than blue; that is why.", YES),
    ("punctuation:no_comma", {}, "Red; blue: 3.5 (no more)...", YES),
    ("punctuation:no_comma", {}, "Sure, here it is:\nRed light travels further.", LOOSE),
    ("punctuation:no_comma", {}, "Red light travels further, that is why.", NO),
    ("punctuation:no_comma", {}, "Well, then:\nRed, not blue.\nAnything else, just ask.", NO),
    ("detectable_format:json_format", {}, '{"why": ["long way", "blue scatters"]}', YES),
    ("detectable_format:json_format", {}, '```json\n{"why": "long way"}\n```', YES),
    ("detectable_format:json_format", {}, 'Here is the JSON:\n{"why": "long way"}\nDone.', LOOSE),
    ("detectable_format:json_format", {}, 'The answer is {"why": "long way"}', NO),
    ("detectable_format:json_format", {}, "{'why': 'long way'}", NO),
    ("detectable_format:json_format", {}, "[" * 100_000, NO),
    ("detectable_format:title", {}, "<<Red skies>>\nLight travels far.", YES),
    ("detectable_format:title", {}, "Light travels far. <<Red skies>>", YES),
    ("detectable_format:title", {}, "<*<Red skies>*>", LOOSE),
    ("detectable_format:title", {}, "<Red skies>\nLight travels far.", NO),
    ("detectable_format:title", {}, "<< >>\nLight travels far.", NO),
    ("detectable_format:title", {}, "<<Red\nskies>>", NO),
    ("detectable_format:number_bullet_lists", TWO_BULLETS, "* one\n* two", YES),
    ("detectable_format:number_bullet_lists", TWO_BULLETS, "Two things:\n- one\n  * two", YES),
    ("detectable_format:number_bullet_lists", TWO_BULLETS, "* Bullets:\n* one\n* two", LOOSE),
    ("detectable_format:number_bullet_lists", TWO_BULLETS, "* one\n* two\n* three\n* four\n* five", NO),
    ("detectable_format:number_bullet_lists", TWO_BULLETS, "* only one", NO),
    ("detectable_format:number_bullet_lists", TWO_BULLETS, "1. one\n2. two", NO),
    ("detectable_format:number_highlighted_sections", HIGHLIGHTS, "It is *far* and *wide*.", YES),
    ("detectable_format:number_highlighted_sections", HIGHLIGHTS, "**Far** is what it is.", NO),
    ("detectable_format:number_highlighted_sections", HIGHLIGHTS, "**Far** and **wide** it is.", YES),
    ("detectable_format:number_highlighted_sections", HIGHLIGHTS, "It is *far* and wide.", NO),
    ("detectable_format:number_highlighted_sections", HIGHLIGHTS, "It is far and wide. ** **", NO),
    ("detectable_format:multiple_sections", SECTIONS, "SECTION 1\nfar\nSECTION 2\nwide", YES),
    ("detectable_format:multiple_sections", SECTIONS, "SECTION 1 far SECTION 2 wide SECTION 3", YES),
    ("detectable_format:multiple_sections", SECTIONS, "**SECTION** 1\nfar\n**SECTION** 2\nwide", LOOSE),
    ("detectable_format:multiple_sections", SECTIONS, "Section 1\nfar\nSection 2\nwide", NO),
    ("detectable_format:multiple_sections", SECTIONS, "SECTION 1\nfar", NO),
    ("detectable_format:multiple_sections", SECTIONS, "SECTION ONE\nfar\nSECTION TWO\nwide", NO),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", YES),
    ("detectable_format:constrained_response", {}, "Having thought about it: My answer is no.", YES),
    ("detectable_format:constrained_response", {}, "**My answer is **yes.", LOOSE),
    ("detectable_format:constrained_response", {}, "my answer is yes.", NO),
    ("detectable_format:constrained_response", {}, "My answer is yes", NO),
    ("detectable_format:constrained_response", {}, "Yes.", NO),
    ("startend:quotation", {}, '"Light travels far."', YES),
    ("startend:quotation", {}, '\n "Far," he said, "and wide" ', YES),
    ("startend:quotation", {}, 'Here you are:\n"Light travels far."', LOOSE),
    ("startend:quotation", {}, '*"Light travels far."*', LOOSE),
    ("startend:quotation", {}, '"Light travels far.', NO),
    ("startend:quotation", {}, "'Light travels far.'", NO),
    ("startend:quotation", {}, '"', NO),
    ("startend:end_checker", END, "Light travels far. That is all.", YES),
    ("startend:end_checker", END, 'Light travels far. "that is ALL."\n', YES),
    ("startend:end_checker", END, "Light travels far. That is all.\nAnything else?", LOOSE),
    ("startend:end_checker", END, "Light travels far. *That is all.*", LOOSE),
    ("startend:end_checker", END, "That is all. Or is it?", NO),
    ("startend:end_checker", END, "Light travels far. That is all", NO),
]

# One accepted and one refused response for each of the remaining types.
OTHERS = [
    ("combination:repeat_prompt", {"prompt_to_repeat": "Why?"}, "why? Because.", "Because. Why?"),
    ("combination:two_responses", {}, "One.\n******\nTwo.", "One.\n******\nOne."),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [city]", "[name] of a city"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. Write soon.", "Bye. PS write soon."),
    ("keywords:existence", {"keywords": ["red", "sky"]}, "A RED evening sky.", "A red evening."),
    ("keywords:forbidden_words", {"forbidden_words": ["red"]}, "A reddish sky.", "A red, red sky."),
    (
        "keywords:frequency",
        {"keyword": "red", "frequency": 2, "relation": "at least"},
        "Red on red.",
        "Red on blue.",
    ),
    (
        "keywords:letter_frequency",
        {"letter": "q", "let_frequency": 1, "let_relation": "less than"},
        "No such letter.",
        "Quite quiet.",
    ),
    (
        "language:response_language",
        {"language": "de"},
        "Der Himmel ist heute blau und die Sonne scheint.",
        "The sky is blue today and the sun is shining.",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First this.\n\nThen that.",
        "First this.\n\nNow that.",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo.", "One.\n\nTwo."),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        "Dr. Smith left. He was tired.",
        "He left. He slept. He woke.",
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
]


@pytest.mark.parametrize(("name", "kwargs", "response", "expected"), TABLE)
def test_paper_instructions_are_judged_strictly_and_loosely(name, kwargs, response, expected):
    assert check(response, name, kwargs) == CheckResult(*expected)


@pytest.mark.parametrize("name", PAPER)
def test_table_has_passing_and_failing_texts_for_every_paper_instruction(name):
    verdicts = [expected for row, _, _, expected in TABLE if row == name]
    assert verdicts.count(YES) >= 2
    assert verdicts.count(NO) >= 2


@pytest.mark.parametrize(("name", "kwargs", "good", "bad"), OTHERS)
def test_other_types_tell_a_good_from_a_bad_response(name, kwargs, good, bad):
    assert check(good, name, kwargs).strict
    assert check(bad, name, kwargs) == CheckResult(False, False)


def test_together_the_tables_cover_all_25_types():
    assert {row[0] for row in TABLE} | {row[0] for row in OTHERS} == set(instruction_types())
    assert len(instruction_types()) == 25


@pytest.mark.parametrize("response", ["", "  \n\t", "\n\n\n"])
@pytest.mark.parametrize("name", ["punctuation:no_comma", "change_case:english_lowercase"])
def test_an_empty_response_never_follows(name, response):
    assert check(response, name) == CheckResult(False, False)


def test_an_empty_variant_does_not_follow_loosely():
    # Removing the only line leaves nothing, and nothing has no comma.
    assert check("One, two.", "punctuation:no_comma") == CheckResult(False, False)


def test_agrees_with_lm_evals_own_strict_and_loose_evaluation():
    check("any", "punctuation:no_comma")  # makes lm-eval work offline
    from lm_eval.tasks.ifeval.utils import (
        InputExample,
        test_instruction_following_loose,
        test_instruction_following_strict,
    )

    rows = [(row[0], row[1], row[2]) for row in TABLE if len(row[2]) < 1000]
    rows += [(name, kwargs, text) for name, kwargs, *texts in OTHERS for text in texts]
    others = [text for _, _, text in rows[::6]]  # texts made for another type find the corners
    rows += [(name, kwargs, text) for name, kwargs, *_ in OTHERS for text in others]
    for name, kwargs, text in rows:
        example = InputExample(key=0, instruction_id_list=[name], prompt="Why?", kwargs=[kwargs])
        expected = (
            test_instruction_following_strict(example, text).follow_all_instructions,
            test_instruction_following_loose(example, text).follow_all_instructions,
        )
        assert check(text, name, kwargs) == CheckResult(*expected), (name, kwargs, text)


def test_types_and_argument_names_are_those_of_lm_evals_registry():
    check("any", "punctuation:no_comma")
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    from lm_eval.tasks.ifeval.instructions_util import LANGUAGE_CODES

    examples = {row[0]: row[1] for row in [*TABLE, *OTHERS]}
    assert set(instruction_types()) == set(INSTRUCTION_DICT)
    for name, checker in INSTRUCTION_DICT.items():
        parameters = set(inspect.signature(checker.build_description).parameters) - {"self"}
        assert set(check_arguments(name, examples[name])) == parameters
    for code in LANGUAGE_CODES:
        assert check_arguments("language:response_language", {"language": code}) == {"language": code}


def test_check_all_keeps_the_order_and_repeated_ids():
    ids = ["punctuation:no_comma", "length_constraints:number_words", "length_constraints:number_words"]
    kwargs = [{}, {"num_words": 2, "relation": "at least"}, {"num_words": 2, "relation": "less than"}]
    verdicts = check_all("two words", ids, kwargs)
    assert [verdict.strict for verdict in verdicts] == [True, True, False]


@pytest.mark.parametrize(("ids", "kwargs"), [(["punctuation:no_comma"], []), ("punctuation:no_comma", [{}])])
def test_check_all_wants_one_dict_per_id(ids, kwargs):
    with pytest.raises(SteerlensError, match="one dict of arguments per instruction id"):
        check_all("text", list(ids), kwargs)


# What is refused.


def test_an_unknown_id_names_the_nearest():
    with pytest.raises(SteerlensError, match="did you mean 'punctuation:no_comma'"):
        check("text", "punctuation:no_commas")


@pytest.mark.parametrize("value", [None, True, "3", 3.5, -1, float("nan"), float("inf"), [3], np.float64(3.5)])
def test_a_count_that_is_missing_or_not_whole_is_refused(value):
    with pytest.raises(SteerlensError, match=r"number_bullet_lists needs num_bullets: an integer >= 0; got"):
        check("* one", "detectable_format:number_bullet_lists", {"num_bullets": value})


@pytest.mark.parametrize("value", [3, 3.0, np.int64(3), np.float64(3.0), np.float32(3)])
def test_whole_numbers_of_any_type_become_integers(value):
    arguments = check_arguments("detectable_format:number_bullet_lists", {"num_bullets": value})
    assert arguments == {"num_bullets": 3}
    assert type(arguments["num_bullets"]) is int
    assert check("* a\n* b\n* c", "detectable_format:number_bullet_lists", {"num_bullets": value}).strict


def test_integers_survive_a_pandas_column_with_gaps():
    frame = pd.DataFrame({"num_bullets": [2, None]})  # becomes float
    name = "detectable_format:number_bullet_lists"
    assert check("* a\n* b", name, {"num_bullets": frame["num_bullets"][0]}).strict
    with pytest.raises(SteerlensError, match=r"got np\.float64\(nan\)"):
        check("* a\n* b", name, {"num_bullets": frame["num_bullets"][1]})


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("detectable_format:number_bullet_lists", None, "needs num_bullets.*got nothing"),
        ("change_case:capital_word_frequency", {"capital_frequency": 3}, "needs capital_relation"),
        ("punctuation:no_comma", {"num_bullets": 3}, "takes no arguments; got num_bullets=3"),
        (
            "detectable_format:title",
            {"title": "Rain"},
            "takes no arguments; got title='Rain'",
        ),
        ("startend:end_checker", {"end_phrases": "Bye."}, "takes end_phrase; got end_phrases"),
        ("startend:end_checker", {"end_phrase": " "}, "a text that is not empty; got ' '"),
        ("keywords:existence", {"keywords": []}, "a list of texts, not empty"),
        ("keywords:existence", {"keywords": "red"}, "a list of texts, not empty; got 'red'"),
        ("keywords:forbidden_words", {"forbidden_words": ["red", ""]}, "a list of texts, not empty"),
        (
            "length_constraints:number_words",
            {"num_words": 3, "relation": "at most"},
            "one of less than, at least; got 'at most'",
        ),
        (
            "language:response_language",
            {"language": "German"},
            r"a language's code; got 'German' \(str\); did you mean 'de' \(German\)\? .* ar, bg",
        ),
        (
            "keywords:letter_frequency",
            {"letter": "ab", "let_frequency": 1, "let_relation": "at least"},
            "a single character",
        ),
        ("combination:repeat_prompt", {}, "needs prompt_to_repeat"),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "then"},
            r"nth_paragraph in \[1, num_paragraphs\]; got 3 of 2",
        ),
    ],
)
def test_arguments_that_would_leave_the_requirement_open_are_refused(name, kwargs, message):
    with pytest.raises(SteerlensError, match=message):
        check("text", name, kwargs)


def test_none_counts_as_absent_as_in_the_hubs_ifeval_rows():
    kwargs = {"num_bullets": 2.0, "num_words": None, "relation": None}
    assert check("* a\n* b", "detectable_format:number_bullet_lists", kwargs).strict


# Determinism, and what lm-eval alone gets wrong.


class _NoDraws:
    def __getattr__(self, name):
        raise AssertionError(f"a requirement was drawn with random.{name}")


def test_no_requirement_is_drawn_at_random(monkeypatch):
    check("any", "punctuation:no_comma")
    from lm_eval.tasks.ifeval import instructions, instructions_util

    monkeypatch.setattr(instructions, "random", _NoDraws())
    monkeypatch.setattr(instructions_util, "random", _NoDraws())
    for name, kwargs, text, *_ in [*TABLE, *OTHERS]:
        check(text, name, kwargs)
    for letter in "#!é":
        kwargs = {"letter": letter, "let_frequency": 0, "let_relation": "at least"}
        assert check("text", "keywords:letter_frequency", kwargs).strict


def test_a_borderline_language_gets_one_answer_always():
    text = "I am"  # unseeded langdetect says Italian three times in five, and Catalan else
    verdicts = {check(text, "language:response_language", {"language": "it"}) for _ in range(40)}
    assert len(verdicts) == 1


def test_checks_in_threads_agree_with_checks_in_turn():
    rows = [row for row in TABLE if len(row[2]) < 1000] * 3
    verdicts = {}

    def judge(start):
        for i in range(start, len(rows), 4):
            name, kwargs, text, _ = rows[i]
            verdicts[i] = check(text, name, kwargs)

    threads = [threading.Thread(target=judge, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verdicts[i] for i in range(len(rows))] == [CheckResult(*row[3]) for row in rows]


@pytest.mark.parametrize("letter", ["#", "!", "é", "E"])
def test_a_letter_is_counted_also_where_lm_eval_would_draw_another(letter):
    kwargs = {"letter": letter, "let_frequency": 4, "let_relation": "at least"}
    assert check(letter * 4, "keywords:letter_frequency", kwargs).strict
    assert not check(letter * 3 + "xyz", "keywords:letter_frequency", kwargs).strict


def test_words_match_literally():
    assert check("I like C++.", "keywords:existence", {"keywords": ["C++"]}).strict
    assert not check("I like CCC.", "keywords:existence", {"keywords": ["C++"]}).strict
    assert check("UxS policy", "keywords:forbidden_words", {"forbidden_words": ["U.S"]}).strict
    kwargs = {"section_spliter": "Part (", "num_sections": 1}
    assert check("Part ( 1", "detectable_format:multiple_sections", kwargs).strict


def test_line_breaks_do_not_end_a_sentence():
    kwargs = {"num_sentences": 2, "relation": "less than"}
    assert check("Dear John\n\nI write to you about e.g. rain", "length_constraints:number_sentences", kwargs).strict


def test_a_text_without_letters_logs_nothing(capsys):
    root = logging.getLogger()
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    root.addHandler(handler)
    try:
        assert check("1234 5678", "language:response_language", {"language": "en"}).strict  # IFEval's rule
    finally:
        root.removeHandler(handler)
    assert records == []
    assert capsys.readouterr() == ("", "")


def test_first_check_is_silent_offline_and_leaves_the_process_as_it_was():
    code = """
import os, random, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("network")
socket.getaddrinfo = socket.socket.connect = refuse
from steerlens.checks import registry
assert not {"lm_eval", "nltk", "torch", "transformers"} & set(sys.modules)
registry.check_arguments("punctuation:no_comma")
assert "lm_eval" not in sys.modules
random.seed(3); state = random.getstate()
rank = os.environ.get("LOCAL_RANK")
assert registry.check("One day.", "change_case:capital_word_frequency",
                      {"capital_frequency": 1, "capital_relation": "less than"}).strict
import nltk, langdetect
assert os.environ.get("LOCAL_RANK") == rank and random.getstate() == state
assert langdetect.DetectorFactory.seed is None and not hasattr(nltk.word_tokenize, "keywords")
assert "torch" not in sys.modules
"""
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("before", [None, "0", "3"])
def test_local_rank_is_restored_also_when_the_import_fails(monkeypatch, before):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if before is not None:
        monkeypatch.setenv("LOCAL_RANK", before)
    seen = []
    with contextlib.suppress(ImportError), _environment("LOCAL_RANK", "1"):
        seen.append(os.environ["LOCAL_RANK"])
        raise ImportError
    assert seen == ["1"]
    assert os.environ.get("LOCAL_RANK") == before


def test_sentence_splitter_is_named():
    assert sentence_splitter().split()[0] in {"nltk", "pysbd"}


# Checks of one's own.


@pytest.fixture
def _registry_of_its_own(monkeypatch):
    monkeypatch.setattr("steerlens.checks.registry._REGISTERED", {})


own_checks = pytest.mark.usefixtures("_registry_of_its_own")


def rhymes(response, *, word) -> bool:
    return response.rstrip("!. ").endswith(word[-2:])


@own_checks
def test_a_registered_check_is_judged_strictly_and_loosely():
    assert register_check("my:rhymes", word=str)(rhymes) is rhymes
    moon = {"word": "moon"}
    assert check("It is noon.", "my:rhymes", moon) == CheckResult(True, True)
    assert check("It is noon.\nBye", "my:rhymes", moon) == CheckResult(False, True)  # without its last line
    assert check("It is **noon**", "my:rhymes", moon) == CheckResult(False, True)  # without asterisks
    assert check("It is late.", "my:rhymes", moon) == CheckResult(False, False)
    both = check_all("noon", ["my:rhymes", "punctuation:no_comma"], [moon, {}])
    assert both == [CheckResult(True, True)] * 2


@own_checks
def test_a_registered_id_is_listed_and_an_ifeval_id_stays():
    register_check("my:rhymes", word=str)(rhymes)
    assert len(instruction_types()) == 26
    assert instruction_types() == tuple(sorted(instruction_types()))
    assert "my:rhymes" in instruction_types()
    with pytest.raises(SteerlensError, match=r"did you mean 'my:rhymes'.*once register_check has run"):
        check("text", "my:rhyme")


@own_checks
def test_a_registered_check_never_sees_an_empty_text():
    seen = []

    def records(response) -> bool:
        seen.append(response)
        return False

    register_check("my:records")(records)
    assert check(" \n", "my:records") == CheckResult(False, False)
    assert check("*\n", "my:records") == CheckResult(False, False)
    assert seen == ["*\n", "*"]  # the other variants are empty


@own_checks
def test_each_type_of_argument_is_read_and_refused():
    def takes(response, *, a, b, c, d, e, unused=3) -> bool:
        return [type(value) for value in (a, b, c, d, e)] == [str, int, float, bool, list]

    register_check("my:takes", a=str, b=int, c=float, d=bool, e=list[str])(takes)
    good = {"a": "", "b": -3.0, "c": np.float64(2), "d": False, "e": ("x",)}
    assert check("text", "my:takes", good).strict
    assert check_arguments("my:takes", good)["b"] == -3
    bad = {"a": 1, "b": 2.5, "c": float("nan"), "d": 1, "e": "x"}
    for name, value in bad.items():
        with pytest.raises(SteerlensError, match=f"my:takes needs {name}: .*; got .*; put {name} into kwargs"):
            check("text", "my:takes", good | {name: value})
        with pytest.raises(SteerlensError, match=f"my:takes needs {name}: .*; got nothing"):
            check("text", "my:takes", {key: good[key] for key in good if key != name})
    with pytest.raises(SteerlensError, match="takes a, b, c, d, e; got f=1; remove it"):
        check("text", "my:takes", good | {"f": 1})


@own_checks
def test_an_argument_may_bear_the_name_of_one_of_ifevals():
    def paragraph(response, *, nth_paragraph) -> bool:
        return len(response.split("\n\n")) >= nth_paragraph

    register_check("my:paragraph", nth_paragraph=int)(paragraph)
    assert check("One.\n\nTwo.", "my:paragraph", {"nth_paragraph": 2}).strict


def test_large_integers_stay_exact():
    for number in (2**53 + 1, 10**400):
        arguments = check_arguments("detectable_format:number_bullet_lists", {"num_bullets": number})
        assert arguments == {"num_bullets": number}


@own_checks
def test_a_cell_can_be_run_twice_and_the_later_function_counts():
    def cell(answer):
        @register_check("my:constant")
        def constant(response) -> bool:
            return answer

    cell(True)
    assert check("text", "my:constant").strict
    cell(False)
    assert not check("text", "my:constant").strict


@own_checks
def test_an_id_names_one_check():
    def other(response) -> bool:
        return True

    register_check("my:rhymes", word=str)(rhymes)
    with pytest.raises(SteerlensError, match=r"'my:rhymes' is that of \S*rhymes; got \S*other; register it under"):
        register_check("my:rhymes")(other)
    with pytest.raises(SteerlensError, match=r"'punctuation:no_comma' is that of IFEval; got .*under another id"):
        register_check("punctuation:no_comma")(other)
    assert check("noon", "my:rhymes", {"word": "moon"}).strict
    assert not check("a, b", "punctuation:no_comma").strict


@own_checks
@pytest.mark.parametrize("value", [1, None, "yes", np.bool_(True)])
def test_a_verdict_that_is_not_true_or_false_is_refused(value):
    def odd(response):
        return value

    register_check("my:odd")(odd)
    with pytest.raises(SteerlensError, match=r"must return True or False, and \S*odd, .* returned .*; return bool"):
        check("text", "my:odd")


@own_checks
@pytest.mark.parametrize("error", [ZeroDivisionError, RecursionError, KeyError])
def test_an_exception_in_a_registered_check_travels(error):
    def broken(response) -> bool:
        raise error("own fault")

    register_check("my:broken")(broken)
    with pytest.raises(error, match="own fault"):
        check("text", "my:broken")


@own_checks
@pytest.mark.parametrize("name", ["rhymes", "", "my:", ":rhymes", "my:a+my:b", "my: rhymes", "a:b:c"])
def test_an_id_of_another_form_is_refused(name):
    with pytest.raises(SteerlensError, match="must be 'group:name' without spaces or '\\+', got"):
        register_check(name)


@own_checks
def test_a_check_that_cannot_be_called_so_is_refused():
    with pytest.raises(
        SteerlensError, match=r"type str, int, float, bool or list\[str\]; got word='moon'; pass the type"
    ):
        register_check("my:rhymes", word="moon")
    with pytest.raises(SteerlensError, match=r"got word=\['moon'\]; pass the type"):
        register_check("my:rhymes", word=["moon"])
    with pytest.raises(SteerlensError, match=r"must take the response, and by name nothing else; got rhymes\(response"):
        register_check("my:rhymes")(rhymes)
    with pytest.raises(SteerlensError, match="and by name word, line; got rhymes"):
        register_check("my:rhymes", word=str, line=int)(rhymes)
    for nameless in (lambda response: True, functools.partial(rhymes, word="moon"), str.isupper):
        with pytest.raises(SteerlensError, match=r"must be a function with a name.*write it with def"):
            register_check("my:rhymes")(nameless)
    assert "my:rhymes" not in instruction_types()


def test_words_with_other_signs_at_their_ends_are_forbidden_as_whole_words():
    assert not check("I like C++.", "keywords:forbidden_words", {"forbidden_words": ["C++"]}).strict
    assert check("I like C++11 and C.", "keywords:forbidden_words", {"forbidden_words": ["C++"]}).strict


# The catalogue.


def test_catalogue_is_the_papers_twelve_with_at_least_eight_phrasings():
    assert tuple(format_instructions()) == PAPER
    for name, instruction in format_instructions().items():
        assert instruction.id == name
        assert instruction.title
        assert len(set(instruction.phrasings)) == len(instruction.phrasings) >= 8
    titles = [instruction.title for instruction in format_instructions().values()]
    assert len(set(titles)) == 12


@pytest.mark.parametrize("name", PAPER)
def test_every_phrasing_states_every_argument_and_renders_ones_that_the_check_accepts(name):
    instruction = format_instructions()[name]
    for phrasing in instruction.phrasings:
        fields = {field for _, field, _, _ in string.Formatter().parse(phrasing) if field is not None}
        stated = set(instruction.arguments)
        assert fields == stated
        for values in itertools.product(*instruction.arguments.values()):
            kwargs = dict(zip(instruction.arguments, values, strict=True))
            assert check_arguments(name, kwargs) == kwargs
            assert not {"{", "}"} & set(phrasing.format(**kwargs))


STATED = {
    "change_case:english_lowercase": ("english",),
    "change_case:english_capital": ("english",),
    "detectable_format:json_format": ("json",),
    "detectable_format:title": ("<<", ">>", "title|heading"),
    "detectable_format:number_bullet_lists": ("*",),
    "detectable_format:number_highlighted_sections": ("*", "or more|at least"),
    "detectable_format:multiple_sections": ("section_spliter} 1|section_spliter} x|and its number",),
    "detectable_format:constrained_response": (
        "my answer is yes.",
        "my answer is no.",
        "my answer is maybe.",
    ),
    "startend:quotation": ('quot|"',),
    "punctuation:no_comma": ("comma",),
    "startend:end_checker": ("{end_phrase}",),
    "change_case:capital_word_frequency": ("capital|caps|upper",),
}


@pytest.mark.parametrize("name", PAPER)
def test_every_phrasing_names_what_its_checker_looks_for(name):
    for phrasing in format_instructions()[name].phrasings:
        for alternatives in STATED[name]:
            words = alternatives.split("|")
            assert any(word in phrasing.lower() for word in words), phrasing


def test_a_constrained_phrasing_offers_the_checkers_exact_sentences():
    sentences = [f"My answer is {word}." for word in ("yes", "no", "maybe")]
    for phrasing in format_instructions()["detectable_format:constrained_response"].phrasings:
        assert all(sentence in phrasing for sentence in sentences)
    assert all(check(s, "detectable_format:constrained_response").strict for s in sentences)


def test_every_choice_of_arguments_can_be_followed():
    for phrase in format_instructions()["startend:end_checker"].arguments["end_phrase"]:
        assert check(f"Some text. {phrase}", "startend:end_checker", {"end_phrase": phrase}).strict
    for word in format_instructions()["detectable_format:multiple_sections"].arguments["section_spliter"]:
        kwargs = {"section_spliter": word, "num_sections": 2}
        assert check(f"{word} 1\na\n{word} 2\nb", "detectable_format:multiple_sections", kwargs).strict


def test_render_depends_on_the_generator_alone():
    for instruction in format_instructions().values():
        drawn = [instruction.render(random.Random(5)) for _ in range(2)]
        assert drawn[0] == drawn[1]
        texts = {instruction.render(random.Random(seed))[0] for seed in range(200)}
        assert len(texts) >= len(instruction.phrasings)
