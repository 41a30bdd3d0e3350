"""Every check against IFEval's definitions: hand-made cases, a plain reference of each type, and lm-eval's own evaluation.

The verdicts of `CASES` were worked out by hand from the definitions (Zhou et al., "Instruction-Following Evaluation for Large
Language Models", 2023). `REFERENCES` says the same without regular expressions, and judges every text made for any type.
"""

# ruff: noqa: RUF001

import json
import os
import re
import subprocess
import sys
from itertools import groupby

import pytest

from steerlens.checks.registry import CheckResult, check, check_arguments, instruction_types
from steerlens.errors import SteerlensError

YES, NO, LOOSE = (True, True), (False, False), (False, True)

ENGLISH = "the sky turns red at sunset because its light has a long way to travel through the air."
GERMAN = "Der Himmel wird am Abend rot, weil das Licht einen langen Weg durch die Luft hat."
PREFACE = "Certainly, here is the answer that you have asked for, and I hope that you will find it quite useful today:"
PARAGRAPHS = {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "then"}
ASKED = {"prompt_to_repeat": "Why is the sky red?"}
END = {"end_phrase": "That is all."}

# For each type: arguments, and (response, (strict, loose)) for them.
CASES = {
    "keywords:existence": [
        (
            {"keywords": ["red", "sky"]},
            ("The sky is red.", YES),
            ("THE SKY IS RED.", YES),
            ("A skyline, reddish", YES),  # a part of a word will do
            ("sky\nred", YES),
            ("The **sky** is **red**.", YES),
            ("r*ed sky", LOOSE),
            ("The sky is blue.", NO),
            ("red", NO),
            ("re d sky", NO),
            ("", NO),
        ),
        (
            {"keywords": ["blue moon"]},
            ("A Blue Moon rose.", YES),
            ("A *blue* moon rose.", LOOSE),
            ("A blue\nmoon rose.", NO),
            ("A blue  moon rose.", NO),
        ),
        ({"keywords": ["Émile"]}, ("émile zola", YES), ("emile zola", NO)),
        ({"keywords": ["C++"]}, ("I like c++.", YES), ("I like c.", NO)),
    ],
    "keywords:frequency": [
        (
            {"keyword": "red", "frequency": 2, "relation": "at least"},
            ("Red on red.", YES),
            ("redder reds", YES),
            ("RED rEd red", YES),
            ("red and r*ed", LOOSE),
            ("red", NO),
            ("re-d red", NO),
        ),
        (
            {"keyword": "red", "frequency": 2, "relation": "less than"},
            ("red", YES),
            ("no such colour", YES),
            ("Red:\nred", LOOSE),
            ("red\nred\nred", LOOSE),
            ("red red\ngreen\nred red", LOOSE),
            ("red red", NO),
            ("a\nred red\nb", NO),
        ),
        ({"keyword": "aa", "frequency": 2, "relation": "at least"}, ("aaaa", YES), ("aaa", NO)),
        ({"keyword": " red ", "frequency": 1, "relation": "at least"}, ("reddish", YES)),
        ({"keyword": "red", "frequency": 1, "relation": "less than"}, ("blue", YES), ("infrared", NO)),
        ({"keyword": "a.b", "frequency": 1, "relation": "at least"}, ("a.b", YES), ("axb", NO)),
    ],
    "keywords:forbidden_words": [
        (
            {"forbidden_words": ["red", "blue moon"]},
            ("A reddish sky.", YES),
            ("infrared", YES),
            ("red_sky", YES),
            ("redé", YES),
            ("re*d", YES),
            ("blue moons", YES),
            ("Red sky:\nblue sea", LOOSE),
            ("green\nred", LOOSE),
            ("green\nred\ngreen", NO),
            ("A red sky.", NO),
            ("RED!", NO),
            ("red-hot", NO),
            ("(red)", NO),
            ("*red*", NO),
            ("a Blue Moon", NO),
        ),
        ({"forbidden_words": ["C++"]}, ("I like C.", YES), ("C++11", YES), ("I like C++.", NO), ("C++", NO)),
        ({"forbidden_words": ["U.S."]}, ("the USA", YES), ("the U.S. policy", NO)),
        ({"forbidden_words": ["नमस्ते"]}, ("धन्यवाद दोस्त", YES), ("नमस्ते दोस्त", NO)),
    ],
    "keywords:letter_frequency": [
        (
            {"letter": "q", "let_frequency": 2, "let_relation": "at least"},
            ("quite quiet", YES),
            ("Q q", YES),
            ("queue", NO),
            ("none", NO),
        ),
        (
            {"letter": "q", "let_frequency": 2, "let_relation": "less than"},
            ("quite", YES),
            ("none", YES),
            ("Q:\nquite", LOOSE),
            ("quite\nquiet", LOOSE),
            ("quite\nnone\nquiet", LOOSE),
            ("qq", NO),
            ("quite\nquaint quip\nquiet", NO),
        ),
        ({"letter": "E", "let_frequency": 1, "let_relation": "at least"}, ("apple", YES), ("é", NO), ("sky", NO)),
        ({"letter": "#", "let_frequency": 2, "let_relation": "at least"}, ("# a\n## b", YES), ("# a", NO)),
        (
            {"letter": "!", "let_frequency": 2, "let_relation": "less than"},
            ("Hi!", YES),
            ("Wow!!\nGood.", LOOSE),
            ("Hi!!", NO),
        ),
    ],
    "language:response_language": [
        (
            {"language": "de"},
            (GERMAN, YES),
            (f"**{GERMAN}**", YES),
            ("1234 5678", YES),  # nothing to detect counts as followed
            ("!!!", YES),
            (f"{PREFACE} {PREFACE}\n{GERMAN}", LOOSE),
            (f"{GERMAN}\n{PREFACE} {PREFACE}", LOOSE),
            (ENGLISH, NO),
            (" \n", NO),
        ),
        ({"language": "en"}, (ENGLISH, YES), (PREFACE, YES), (GERMAN, NO)),
    ],
    "length_constraints:number_sentences": [
        (
            {"num_sentences": 3, "relation": "at least"},
            ("It rained. We left. We slept.", YES),
            ("Why? Because! It rained.", YES),
            ("It rained. We left.\nWe slept. We woke.", YES),
            ("It rained. We left.", NO),
            ("one line\ntwo lines\nthree lines", NO),
            ("Dr. Smith left. He slept.", NO),
        ),
        (
            {"num_sentences": 3, "relation": "less than"},
            ("It rained. We left.", YES),
            ("It rained", YES),
            ("We paid 3.5 dollars to Mr. Smith.", YES),
            ("Sure. Here it is.\nIt rained. We left.", LOOSE),
            ("It rained. We left.\nBye now.", LOOSE),
            ("It rained. We left. We slept.", NO),
            ("Sure.\nIt rained. We left. We slept.\nBye.", NO),
        ),
        ({"num_sentences": 2, "relation": "less than"}, ("It was cold, e.g. in May.", YES), ("Why? So.", NO)),
    ],
    "length_constraints:number_paragraphs": [
        (
            {"num_paragraphs": 2},
            ("One.\n***\nTwo.", YES),
            ("One.***Two.", YES),
            ("One. *** Two.", YES),
            ("***\nOne.\n***\nTwo.\n***", YES),  # empty ones at the ends do not count
            ("One.\n****\nTwo.", YES),  # "*" begins the second
            ("One.\n\n***\n\nTwo.\nand more", YES),
            ("One.\n***\nTwo.\n***\nThree.", LOOSE),
            ("One.\n***\nTwo.\n***\nThree.\n***\nFour.", LOOSE),
            ("a\nOne.\n***\nTwo.\n***\nThree.\nb", NO),
            ("One.\n***\n***\nTwo.", NO),  # an empty one between
            ("One.\n\nTwo.", NO),
            ("One.\n* * *\nTwo.", NO),
            ("One.\n---\nTwo.", NO),
            ("Only one.", NO),
        ),
        ({"num_paragraphs": 1}, ("Only one.", YES), ("One.\n***\nTwo.", LOOSE), ("***", NO)),
    ],
    "length_constraints:number_words": [
        (
            {"num_words": 3, "relation": "at least"},
            ("one two three", YES),
            ("don't go", YES),
            ("3.5 _", YES),
            ("日本語 です ね", YES),
            ("धन्यवाद दोस्त", YES),  # a sign for a vowel is no letter to Python's re, and ends a word
            ("o*ne two", YES),
            ("well-known", NO),
            ("one two", NO),
            ("日本語です", NO),
            ("- ... !", NO),
        ),
        (
            {"num_words": 3, "relation": "less than"},
            ("one two", YES),
            ("...", YES),
            ("Sure thing:\none two", LOOSE),
            ("one two\nthat's it", LOOSE),
            ("o*ne two", LOOSE),
            ("one two three", NO),
            ("a\nb b b\nc", NO),
        ),
    ],
    "length_constraints:nth_paragraph_first_word": [
        (
            PARAGRAPHS,
            ("First.\n\nThen that.\n\nLast.", YES),
            ("First.\n\nTHEN, that.\n\nLast.", YES),
            ('First.\n\n"Then" that.\n\nLast.', YES),
            ("First.\n\n'Then' that.\n\nLast.", YES),
            ("First.\n\nThen.now\n\nLast.", YES),
            ("First.\n\n\nThen that.\n\nLast.", YES),  # the third line break belongs to the paragraph
            ("First.\n\nThen that.\n\nLast.\n\n", YES),
            ("First.\n\n**Then** that.\n\nLast.", LOOSE),
            ("\n\nFirst.\n\nThen that.\n\nLast.", LOOSE),  # an empty one is not counted, but has a place
            ("Sure!\n\nFirst.\n\nThen that.\n\nLast.", LOOSE),
            ("First.\n\nThen that.\n\nLast.\n\nBye!", LOOSE),
            ("First.\n\n\n\nThen that.\n\nLast.", NO),
            ("First.\n\nThence that.\n\nLast.", NO),
            ("First.\n\nThen-now that.\n\nLast.", NO),
            ("First.\n\n“Then” that.\n\nLast.", NO),
            ("First.\n\n- Then that.\n\nLast.", NO),
            ("First.\n\nNow that.\n\nThen.", NO),
            ("First.\n\nThen that.", NO),
            ("First.\n \nThen that.\n\nLast.", NO),
            ("First.\nThen that.\nLast.", NO),
        ),
        (PARAGRAPHS | {"first_word": "THEN"}, ("First.\n\nThen that.\n\nLast.", YES)),
        (PARAGRAPHS | {"num_paragraphs": 2}, ("One.\n\nThen.", YES), ("One.\n\nThen.\n\nMore.\nMore.", NO)),
    ],
    "detectable_content:number_placeholders": [
        (
            {"num_placeholders": 2},
            ("[name] of [city]", YES),
            ("[] []", YES),
            ("[a][b][c]", YES),
            ("[link](http://x.org) by [name]", YES),
            ("**[a]** [b]", YES),
            ("[name] of the city", NO),
            ("[[a] b]", NO),
            ("[a\nb] [c]", NO),
            ("[a] ]b[", NO),
            ("(a) {b} <c>", NO),
        ),
        ({"num_placeholders": 1}, ("To [name]:", YES), ("[name\n]", NO)),
    ],
    "detectable_content:postscript": [
        (
            {"postscript_marker": "P.S."},
            ("Bye.\nP.S. Write soon.", YES),
            ("Bye. p.s. write soon", YES),
            ("P. S. Write", YES),
            ("P.\nS. Write", YES),
            ("P.P.S. Write", YES),
            ("Bye.\n**P.S.** Write", YES),
            ("a p.s.a. on air", YES),
            ("P.*S.* Write", LOOSE),
            ("P.S Write", NO),
            ("PS: Write", NO),
            ("P.  S. Write", NO),
            ("Postscript: write", NO),
        ),
        (
            {"postscript_marker": "P.P.S"},
            ("P.P.S Write", YES),
            ("Bye.\np.p.s. write", YES),
            ("P. P. S Write", YES),
            ("P.P.*S*", LOOSE),
            ("P.S. Write", NO),
            ("PPS Write", NO),
            ("P.PS Write", NO),
        ),
        (
            {"postscript_marker": "PS:"},
            ("ps: write", YES),
            ("P*S*: write", LOOSE),
            ("P.S.: write", NO),
            ("PS write", NO),
        ),
        ({"postscript_marker": "P.S:"}, ("P.S: write", YES), ("PxS: write", NO)),
    ],
    "detectable_format:number_bullet_lists": [
        (
            {"num_bullets": 2},
            ("* one\n* two", YES),
            ("- one\n- two", YES),
            ("* one\n- two", YES),
            ("  * one\n\t- two", YES),
            ("*one\n-two", YES),
            ("Intro:\n* one\n* two\nOutro.", YES),
            ("* **one**\n* **two**", YES),
            ("- one\n\n\n- two", YES),
            ("***\n- a\n- b", YES),
            ("* \n* two", YES),
            ("-\n-", YES),
            ("-5 degrees\n-6 degrees", YES),
            ("* a\n  more - and more\n* b", YES),
            ("* one\n* two\n* three", LOOSE),
            ("* one\n* two\n* three\n* four", LOOSE),
            ("* one\n---\n* two", LOOSE),  # a rule of dashes is a bullet, and a line that can be dropped
            ("x\n- a\n* c\n- b\ny", LOOSE),
            ("* 1\n* 2\n* 3\n* 4\n* 5", NO),
            ("* one", NO),
            ("*\n* two", NO),  # the first takes the second for its text
            ("**one**\n**two**", NO),
            ("• one\n• two", NO),
            ("\u2013 one\n\u2013 two", NO),
            ("+ one\n+ two", NO),
            ("1. one\n2. two", NO),
            ("a - b\nc * d", NO),
        ),
        ({"num_bullets": 1}, ("* one\ntwo", YES), ("* one\n* two", LOOSE), ("none", NO)),
    ],
    "detectable_format:constrained_response": [
        (
            {},
            ("My answer is yes.", YES),
            ("My answer is no.\n", YES),
            ("After some thought: My answer is maybe. I am unsure.", YES),
            ("My answer is yes. My answer is no.", YES),
            ("**My answer is yes.**", YES),
            ("My answer is *yes*.", LOOSE),
            ("My **answer** is maybe.", LOOSE),
            ("MY ANSWER IS NO.", NO),
            ("Oh my answer is no.", NO),
            ("My answer is yes!", NO),
            ("My answer is: yes.", NO),
            ("My answer is not sure.", NO),
            ("My answer is\nyes.", NO),
            ("My  answer is no.", NO),
            ("Yes.", NO),
        )
    ],
    "detectable_format:number_highlighted_sections": [
        (
            {"num_highlights": 2},
            ("It is *far* and *wide*.", YES),
            ("**Far** and **wide**.", YES),
            ("*far* and **wide**", YES),
            ("***far***", YES),  # counted as *far* and as **far**
            ("*a**b*", YES),
            ("*a*b*c*", YES),
            ("*far\n* *wide* and *high*", NO),  # "* *" is blank, and uses up the star before "wide"
            ("*far*\n**wide**", YES),
            ("*far*", NO),
            ("**far**", NO),
            ("*a*b*", NO),
            ("* a\n* b", NO),
            ("* a * b", NO),
            ("*far\nwide* *", NO),
            ("_far_ and _wide_", NO),
            ("** ** **  **", NO),
            ("far and wide", NO),
        ),
        ({"num_highlights": 1}, ("* a * b", YES), ("**far**", YES), ("****", NO)),
    ],
    "detectable_format:multiple_sections": [
        (
            {"section_spliter": "Section", "num_sections": 2},
            ("Section 1\nfar\nSection 2\nwide", YES),
            ("Section1 far Section2 wide", YES),
            ("## Section 1\nfar\n## Section 2\nwide", YES),
            ("**Section 1**\nfar\n**Section 2**\nwide", YES),
            ("Section\n1 far Section\n2 wide", YES),
            ("Section 1 far Section 1 wide", YES),
            ("XSection 1 XSection 2", YES),
            ("Section 1 Section 2 Section 3", YES),
            ("Section *1* far Section *2* wide", LOOSE),
            ("Section 1\nfar", NO),
            ("Section 12", NO),
            ("section 1 far section 2 wide", NO),
            ("Section  1 far Section  2 wide", NO),
            ("Section I far Section II wide", NO),
            ("Sections 1 and Sections 2", NO),
            ("Section: 1 Section: 2", NO),
        ),
        ({"section_spliter": " Day ", "num_sections": 1}, ("Day 1", YES), ("Day one", NO), ("Daytime 1", NO)),
        ({"section_spliter": "Part (", "num_sections": 1}, ("Part ( 1", YES), ("Part 1", NO)),
    ],
    "detectable_format:json_format": [
        (
            {},
            ('{"a": 1}', YES),
            (' \n{"a": [1, 2]}\n ', YES),
            ("[1, 2]", YES),
            ('"text"', YES),
            ("42", YES),
            ("null", YES),
            ('{"a": "*"}', YES),
            ('```json\n{"a": 1}\n```', YES),
            ('```JSON\n{"a": 1}\n```', YES),
            ('```Json\n{"a": 1}\n```', YES),
            ('```\n{"a": 1}\n```', YES),
            ('```json\n{"a": 1}', YES),
            ('json\n{"a": 1}', LOOSE),
            ('Here it is:\n```json\n{"a": 1}\n```', LOOSE),
            ('Here it is:\n\n```json\n{"a": 1}\n```\n\nDone.', LOOSE),
            ('**{"a": 1}**', LOOSE),
            ('{"a": 1}\n{"b": 2}', LOOSE),
            ('~~~\n{"a": 1}\n~~~', LOOSE),
            ('```jSON\n{"a": 1}', LOOSE),  # the fence's line is the first
            ('Two\nlines\n{"a": 1}', NO),
            ('{"a": 1} and more', NO),
            ('{"a": 1', NO),
            ('{"a": 1,}', NO),
            ("{'a': 1}", NO),
            ("True", NO),
            ("Red skies", NO),
        )
    ],
    "detectable_format:title": [
        (
            {},
            ("<<Red skies>>\nLight travels far.", YES),
            ("Light <<Red skies>> travels far.", YES),
            ("<<<Red skies>>>", YES),
            ("**<<Red skies>>**", YES),
            ("<<*>>", YES),
            ("<<>> <<Red>>", YES),
            ("<*<Red skies>*>", LOOSE),
            ("<Red skies>", NO),
            ("<<>>", NO),
            ("<< >>", NO),
            ("<<<>>>", NO),
            ("<<Red\nskies>>", NO),
            ("<<Red skies> >", NO),
            ("# Red skies", NO),
            ("\u00abRed skies\u00bb", NO),
            (">>Red skies<<", NO),
        )
    ],
    "combination:two_responses": [
        (
            {},
            ("One.\n******\nTwo.", YES),
            ("One.******Two.", YES),
            ("One.\n*******\nTwo.", YES),
            ("******\nOne.\n******\nTwo.\n******", YES),
            ("one\n******\nOne", YES),
            ("Sure:\nOne.\n******\nOne.", YES),
            ("One.\n******\nTwo.\n******\nThree.", LOOSE),
            ("Hello!\n******\nOne.\nMore.\n******\nTwo.\nMore.", LOOSE),
            ("One.\nMore.\n******\nTwo.\nMore.\n******\nThree.\nMore.", NO),
            ("One.\n******\nOne.", NO),
            ("One.\n******\n One. ", NO),
            ("One.\n******\n******\nTwo.", NO),
            ("One.\n************\nTwo.", NO),
            ("One.\n*****\nTwo.", NO),
            ("One.\n* * * * * *\nTwo.", NO),
            ("One.\n******", NO),
            ("One.\n\nTwo.", NO),
        )
    ],
    "combination:repeat_prompt": [
        (
            ASKED,
            ("Why is the sky red? Because.", YES),
            ("why is the SKY red?", YES),
            ("  \nWhy is the sky red?\nBecause.", YES),
            ("Why is the sky red?Because.", YES),
            ("Sure!\nWhy is the sky red?\nBecause.", LOOSE),
            ("**Why is the sky red?** Because.", LOOSE),
            ('"Why is the sky red?" Because.', NO),
            ("Why is the sky red", NO),
            ("Why  is the sky red?", NO),
            ("Why is the\nsky red?", NO),
            ("Because. Why is the sky red?", NO),
            ("A\nB\nWhy is the sky red?", NO),
        ),
        ({"prompt_to_repeat": " Why?\n"}, ("Why? So.", YES), ("Why not?", NO)),
        ({"prompt_to_repeat": "Use *stars*."}, ("Use *stars*. Fine.", YES), ("Use stars. Fine.", NO)),
    ],
    "startend:end_checker": [
        (
            END,
            ("Light travels far. That is all.", YES),
            ("Light travels far. THAT IS ALL. \n", YES),
            ('Light travels far. "That is all."', YES),
            ('"Light travels far. That is all."""', YES),
            ("farThat is all.", YES),
            ("Light travels far. That is all.\nAnything else?", LOOSE),
            ("Light travels far. That is all.\n\nAnything else?", LOOSE),
            ("Light travels far. **That is all.**", LOOSE),
            ("Light travels far. That is all.*", LOOSE),
            ('Light travels far. That is all. "', NO),  # the blank before the quote stays
            ("Light travels far. 'That is all.'", NO),
            ("Light travels far. “That is all.”", NO),
            ("Light travels far. (That is all.)", NO),
            ("Light travels far. That is all", NO),
            ("Light travels far. That is all..", NO),
            ("Light travels far. That is  all.", NO),
            ("That is all. Or is it?", NO),
            ("That is all.\nOne more.\nAnd more.", NO),
        ),
        ({"end_phrase": " Bye! "}, ("ok bye!", YES), ("bye", NO)),
        ({"end_phrase": 'say "hi"'}, ('I say "hi"', NO)),  # quotes are taken off the response alone
    ],
    "startend:quotation": [
        (
            {},
            ('"Light travels far."', YES),
            (' \n"Light travels far." ', YES),
            ('"Far," he said, "and wide"', YES),
            ('""', YES),
            ('"\n"', YES),
            ('**"Light travels far."**', LOOSE),
            ('"Light travels far."*', LOOSE),
            ('Sure:\n"Light travels far."', LOOSE),
            ('"Light travels far."\nBye.', LOOSE),
            ('Sure:\n"Light\ntravels far."\nBye.', LOOSE),
            ('Here\nit is:\n"Light travels far."', NO),
            ('"Light travels far.', NO),
            ('Light travels far."', NO),
            ('"Light travels far".', NO),
            ('"', NO),
            ('*"*', NO),
            ("'Light travels far.'", NO),
            ("“Light travels far.”", NO),
            ("``Light travels far.``", NO),
        )
    ],
    "change_case:capital_word_frequency": [
        (
            {"capital_frequency": 3, "capital_relation": "at least"},
            ("This is VERY VERY GOOD.", YES),
            ("I AM a DOG", YES),
            ("IT'S FINE", YES),  # IT, 'S, FINE
            ("CANNOT STOP", YES),  # CAN, NOT, STOP
            ("WE DON'T. They stop.", YES),  # WE, DO, N'T
            ("NASA has 3D X", YES),
            ("ÄÖ É Ñ", YES),
            ("WELL-KNOWN FACTS", NO),
            ("This Is Not Enough", NO),
            ("iPhone iPad eBay", NO),
            ("12 34 56", NO),
        ),
        (
            {"capital_frequency": 3, "capital_relation": "less than"},
            ("VERY GOOD", YES),
            ("fine", YES),
            ("MY ANSWER:\nVERY good", LOOSE),
            ("I do.\nI am.\nI go.", LOOSE),
            ("VERY VERY GOOD", NO),
            ("A\nTHE BIG DOG\nB", NO),
        ),
    ],
    "change_case:english_capital": [
        (
            {},
            (ENGLISH.upper(), YES),
            (f"**{ENGLISH.upper()}**\n\n{PREFACE.upper()} 123!", YES),
            (f"Sure!\n{ENGLISH.upper()}", LOOSE),
            (f"{ENGLISH.upper()}\nI hope that this helps.", LOOSE),
            (ENGLISH, NO),
            (ENGLISH.upper().replace("RED", "ReD"), NO),
            (f"FINE.\nSure!\n{ENGLISH.upper()}", NO),
            ("НЕБО КРАСНОЕ ВЕЧЕРОМ ПОТОМУ ЧТО СВЕТ ИДЁТ ЧЕРЕЗ ВОЗДУХ ДОЛГО.", NO),
            ("1234", NO),
        )
    ],
    "change_case:english_lowercase": [
        (
            {},
            (ENGLISH, YES),
            (f"**{ENGLISH}**\n\n{PREFACE.lower().replace(' i ', ' we ')} 123!", YES),
            (f"Sure!\n{ENGLISH}", LOOSE),
            (f"{ENGLISH}\nI hope that this helps.", LOOSE),
            (ENGLISH.upper(), NO),
            (ENGLISH.replace("red", "Red"), NO),
            (f"fine.\nSure!\n{ENGLISH}", NO),
            (GERMAN.lower(), NO),
            ("天空在日落时变红", NO),  # letters without case are not lower case
            ("1234", NO),
        )
    ],
    "punctuation:no_comma": [
        (
            {},
            ("Red; blue: 3.5 (no more)...", YES),
            ("红色\uff0c蓝色", YES),  # other scripts' commas are not meant
            ("أحمر، أزرق", YES),
            ("\u201aquoted\u2018", YES),
            ("Well, here:\nRed.", LOOSE),
            ("Red.\nThat, and no more.", LOOSE),
            ("Well, here:\nRed.\nThat, and no more.", LOOSE),
            ("Red, blue.", NO),
            ("1,000", NO),
            ("a\n,\nb", NO),
            ("*,*", NO),
            (",", NO),
        )
    ],
}
FLAT = [
    (name, kwargs, response, expected)
    for name, groups in CASES.items()
    for kwargs, *rows in groups
    for response, expected in rows
]
TEXTS = list(dict.fromkeys(response for _, _, response, _ in FLAT))

# Where this package departs from lm-eval on purpose, as the module says: words match literally and as whole words.
LITERAL = {"I like c.", "axb", "I like C.", "C++11", "the U.S. policy", "नमस्ते दोस्त", "PxS: write", "Part ( 1"}


@pytest.mark.parametrize(("name", "kwargs", "response", "expected"), FLAT)
def test_a_response_is_judged_as_the_definition_says(name, kwargs, response, expected):
    assert check(response, name, kwargs) == CheckResult(*expected)


def test_the_cases_are_several_hundred_and_cover_every_type_both_ways():
    assert set(CASES) == set(instruction_types())
    assert len(FLAT) > 300
    # A dropped line or asterisk adds no placeholder and no highlight, so that loose and strict agree on them.
    never_loose = {"detectable_content:number_placeholders", "detectable_format:number_highlighted_sections"}
    for name in CASES:
        verdicts = {expected for row, _, _, expected in FLAT if row == name}
        assert verdicts == ({YES, NO} if name in never_loose else {YES, NO, LOOSE}), name


def test_the_cases_get_the_same_verdicts_from_lm_evals_evaluation():
    check("any", "punctuation:no_comma")  # makes lm-eval work offline
    from lm_eval.tasks.ifeval.utils import (
        InputExample,
        test_instruction_following_loose,
        test_instruction_following_strict,
    )

    departures = set()
    for name, kwargs, response, expected in FLAT:
        if kwargs.get("letter") in ("#", "!"):
            continue  # lm-eval draws another letter
        example = InputExample(key=0, instruction_id_list=[name], prompt="Why?", kwargs=[kwargs])
        try:
            official = (
                test_instruction_following_strict(example, response).follow_all_instructions,
                test_instruction_following_loose(example, response).follow_all_instructions,
            )
        except re.error:  # "Part (" is no regular expression
            official = None
        if official != expected:
            departures.add(response)
    assert departures <= LITERAL | {"Part 1"}
    assert len(departures) >= 6


# The references: each definition once more, in plain string operations.


def is_word(character):
    return character.isalnum() or character == "_"


def related(count, number, relation):
    return count < number if relation == "less than" else count >= number


def existence(text, *, keywords):
    return all(word.lower() in text.lower() for word in keywords)


def frequency(text, *, keyword, frequency, relation):
    return related(text.lower().count(keyword.strip().lower()), frequency, relation)


def forbidden_words(text, *, forbidden_words):
    padded = f" {text.lower()} "
    for word in map(str.lower, forbidden_words):
        for at in range(1, len(padded) - len(word)):
            alone = not is_word(padded[at - 1]) and not is_word(padded[at + len(word)])
            if padded.startswith(word, at) and alone:
                return False
    return True


def letter_frequency(text, *, letter, let_frequency, let_relation):
    return related(text.lower().count(letter.lower()), let_frequency, let_relation)


def number_paragraphs(text, *, num_paragraphs):
    parts = [part.strip() for part in text.split("***")]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def number_words(text, *, num_words, relation):
    return related(sum(word for word, _ in groupby(text, key=is_word)), num_words, relation)


def nth_paragraph_first_word(text, *, num_paragraphs, nth_paragraph, first_word):
    parts = [part.strip() for part in text.split("\n\n")]
    if sum(map(bool, parts)) != num_paragraphs or not parts[nth_paragraph - 1]:
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    end = min((word.index(mark) for mark in ".,?!'\"" if mark in word), default=len(word))
    return word[:end].lower() == first_word.lower()


def number_placeholders(text, *, num_placeholders):
    count = 0
    for line in text.split("\n"):
        while "[" in line and "]" in line[line.index("[") :]:
            line = line[line.index("[") :].partition("]")[2]
            count += 1
    return count >= num_placeholders


def postscript(text, *, postscript_marker):
    text = text.lower()
    pieces = {"P.S.": ["p.", "s."], "P.P.S": ["p.", "p.", "s"]}.get(postscript_marker, [postscript_marker.lower()])

    def stands(at):
        for i, piece in enumerate(pieces):
            at += i > 0 and text[at : at + 1].isspace()
            if not text.startswith(piece, at):
                return False
            at += len(piece)
        return True

    return any(stands(at) for at in range(len(text)))


def number_bullet_lists(text, *, num_bullets):
    lines = [line.lstrip() for line in text.split("\n")]
    stars, i = 0, 0
    while i < len(lines):
        bare = lines[i] == "*" and i + 1 < len(lines)  # takes the next line for its text
        stars += bare or (lines[i][:1] == "*" and lines[i][1:2] not in ("", "*"))
        i += 1 + bare
    return stars + sum(line.startswith("-") for line in lines) == num_bullets


def constrained_response(text):
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


def number_highlighted_sections(text, *, num_highlights):
    count = 0
    for line in text.split("\n"):
        for star in ("*", "**"):
            at = line.find(star)
            while at >= 0:
                close = line.find("*", at + len(star))
                if close >= 0 and line.startswith(star, close):
                    count += bool(line[at + len(star) : close].strip())
                    at = close + len(star) - 1
                at = line.find(star, at + 1)
    return count >= num_highlights


def multiple_sections(text, *, section_spliter, num_sections):
    count = 0
    for rest in text.split(section_spliter.strip())[1:]:
        rest = rest[1:] if rest[:1].isspace() else rest
        count += rest[:1].isdecimal()
    return count >= num_sections


def json_format(text):
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text[len(fence) :] if text.startswith(fence) else text
    text = text[:-3] if text.endswith("```") else text
    try:
        json.loads(text.strip())
    except ValueError:
        return False
    return True


def title(text):
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if start >= 0 and end > start + 2 and line[start : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def two_responses(text):
    parts = [part.strip() for part in text.split("******")]
    given = [part for part in parts if part]
    return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


def repeat_prompt(text, *, prompt_to_repeat):
    return text.lower().lstrip().startswith(prompt_to_repeat.lower().strip())


def end_checker(text, *, end_phrase):
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text):
    text = text.strip()
    return len(text) >= 2 and text[0] == text[-1] == '"'


def no_comma(text):
    return "," not in text


PLAIN = (
    existence, frequency, forbidden_words, letter_frequency, number_paragraphs, number_words, nth_paragraph_first_word,
    number_placeholders, postscript, number_bullet_lists, constrained_response, number_highlighted_sections,
    multiple_sections, json_format, title, two_responses, repeat_prompt, end_checker, quotation, no_comma,
)  # fmt: skip
# Left out: what needs a tokenizer (sentences, capital words) or a language detector.
REFERENCES = {name: function for name in CASES for function in PLAIN if name.endswith(f":{function.__name__}")}


def verdict(reference, text, kwargs):
    lines = text.split("\n")
    texts = [text, *("\n".join(cut).strip() for cut in (lines[1:], lines[:-1], lines[1:-1]))]
    texts += [text.replace("*", "") for text in texts]
    verdicts = [bool(text.strip()) and reference(text, **kwargs) for text in texts]
    return CheckResult(verdicts[0], any(verdicts))


@pytest.mark.parametrize("name", REFERENCES)
def test_a_plain_reference_gives_every_text_the_checks_verdict(name):
    for kwargs, *rows in CASES[name]:
        for response, expected in rows:
            assert verdict(REFERENCES[name], response, kwargs) == CheckResult(*expected), response
        for text in TEXTS:
            assert check(text, name, kwargs) == verdict(REFERENCES[name], text, kwargs), (kwargs, text)


def test_references_are_there_for_all_but_five_types():
    assert len(REFERENCES) == 20 == len(PLAIN)


@pytest.mark.parametrize("text", TEXTS[::4])
def test_english_in_one_case_needs_that_case_and_english(text):
    english = check(text, "language:response_language", {"language": "en"})
    assert check(text, "change_case:english_capital").strict == (text.isupper() and english.strict)
    assert check(text, "change_case:english_lowercase").strict == (text.islower() and english.strict)


# Languages.

SENTENCES = {
    "ar": "السماء حمراء عند الغروب لأن الضوء يقطع طريقا طويلا في الهواء.",
    "bg": "Небето е червено при залез, защото светлината изминава дълъг път през въздуха.",
    "bn": "সূর্যাস্তের সময় আকাশ লাল হয় কারণ আলো বাতাসের মধ্য দিয়ে অনেক পথ যায়।",
    "de": GERMAN,
    "en": ENGLISH,
    "es": "El cielo es rojo al atardecer porque la luz recorre un largo camino por el aire.",
    "fa": "آسمان هنگام غروب سرخ است چون نور راه درازی را در هوا می‌پیماید و این زیباست.",
    "fi": "Taivas on illalla punainen, koska valo kulkee pitkän matkan ilman läpi.",
    "fr": "Le ciel est rouge le soir parce que la lumière fait un long chemin dans l'air.",
    "gu": "સાંજે આકાશ લાલ હોય છે કારણ કે પ્રકાશ હવામાં લાંબો રસ્તો કાપે છે.",
    "he": "השמיים אדומים בשקיעה כי האור עובר דרך ארוכה באוויר.",
    "hi": "शाम को आकाश लाल होता है क्योंकि प्रकाश हवा में लंबा रास्ता तय करता है।",
    "it": "Il cielo è rosso la sera perché la luce fa una lunga strada attraverso l'aria.",
    "ja": "夕方の空が赤いのは、光が空気の中を長く進むからです。",
    "kn": "ಸಂಜೆ ಆಕಾಶವು ಕೆಂಪಾಗಿರುತ್ತದೆ ಏಕೆಂದರೆ ಬೆಳಕು ಗಾಳಿಯಲ್ಲಿ ದೂರ ಸಾಗುತ್ತದೆ.",
    "ko": "저녁 하늘이 붉은 것은 빛이 공기 속에서 먼 길을 가기 때문입니다.",
    "ml": "വൈകുന്നേരം ആകാശം ചുവന്നിരിക്കുന്നു കാരണം വെളിച്ചം വായുവിലൂടെ ഏറെ ദൂരം പോകുന്നു.",
    "mr": "संध्याकाळी आकाश लाल असते कारण प्रकाश हवेतून खूप लांबचा प्रवास करतो आणि ते सुंदर दिसते.",
    "ne": "साँझमा आकाश रातो हुन्छ किनभने प्रकाशले हावामा धेरै लामो बाटो पार गर्छ र यो राम्रो देखिन्छ।",
    "pa": "ਸ਼ਾਮ ਨੂੰ ਅਸਮਾਨ ਲਾਲ ਹੁੰਦਾ ਹੈ ਕਿਉਂਕਿ ਰੌਸ਼ਨੀ ਹਵਾ ਵਿੱਚ ਲੰਮਾ ਰਾਹ ਤੈਅ ਕਰਦੀ ਹੈ।",
    "pl": "Niebo jest wieczorem czerwone, ponieważ światło przebywa długą drogę w powietrzu.",
    "pt": "O céu fica vermelho ao entardecer porque a luz percorre um longo caminho através do ar.",
    "ru": "Вечером небо красное, потому что свет проходит длинный путь через воздух.",
    "sw": "Anga ni nyekundu wakati wa jioni kwa sababu mwanga husafiri njia ndefu kupitia hewa.",
    "ta": "மாலையில் வானம் சிவப்பாக இருக்கிறது ஏனெனில் ஒளி காற்றில் நீண்ட தூரம் செல்கிறது.",
    "te": "సాయంత్రం ఆకాశం ఎర్రగా ఉంటుంది ఎందుకంటే కాంతి గాలిలో చాలా దూరం వెళుతుంది.",
    "th": "ท้องฟ้ายามเย็นเป็นสีแดงเพราะแสงเดินทางไกลผ่านอากาศ",
    "uk": "Увечері небо червоне, тому що світло проходить довгий шлях крізь повітря.",
    "ur": "شام کو آسمان سرخ ہوتا ہے کیونکہ روشنی ہوا میں لمبا راستہ طے کرتی ہے۔",
    "vi": "Bầu trời buổi chiều có màu đỏ vì ánh sáng đi một quãng đường dài qua không khí.",
}
FORMAT_SET = ("ar", "de", "fa", "gu", "hi", "kn", "ko", "mr", "ne", "pa", "ru", "sw", "te", "ur")
"""The languages of the paper's format set: 17 of its 163 prompts."""
IFEVAL = (*FORMAT_SET, "bg", "bn", "fi", "it", "pt", "ta", "th", "vi")
"""The languages of IFEval's 541 prompts."""


@pytest.mark.parametrize("code", SENTENCES)
def test_a_sentence_follows_its_own_language_and_no_other(code):
    followed = {
        other for other in SENTENCES if check(SENTENCES[code], "language:response_language", {"language": other}).strict
    }
    assert followed == {code}


def test_every_language_of_the_papers_data_is_known():
    assert set(FORMAT_SET) < set(IFEVAL) < set(SENTENCES)
    for code in IFEVAL:
        assert check_arguments("language:response_language", {"language": code}) == {"language": code}


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("German", r"did you mean 'de' \(German\)"),
        ("hindu", r"did you mean 'hi' \(Hindi\)"),
        ("pt-BR", r"did you mean 'pt' \(Portuguese\)"),
        ("DE", r"did you mean 'de' \(German\)"),
        ("eng", r"did you mean 'en' \(English\)"),
        ("zh", r"got 'zh' \(str\); IFEval detects ar, bg"),
        (None, "got nothing; put language into kwargs"),
        (["de"], r"got \['de'\] \(list\)"),
    ],
)
def test_an_unknown_language_is_refused_with_the_nearest_code(asked, hint):
    with pytest.raises(SteerlensError, match=f"language:response_language needs language: a language's code; .*{hint}"):
        check("text", "language:response_language", {"language": asked})


def test_borderline_languages_are_judged_alike_in_every_process():
    texts = ["I am", "no", "ja", "la luz", "é", "Hola, my friend", "небо", "sol", "ok ok"]
    codes = ["de", "en", "es", "fi", "it", "pt", "ru", "uk"]
    code = """
import json, sys
from steerlens.checks.registry import check
texts, codes = json.loads(sys.argv[1])
print([[code for code in codes if check(text, "language:response_language", {"language": code}).strict] for text in texts])
"""
    here = [
        [code for code in codes if check(text, "language:response_language", {"language": code}).strict]
        for text in reversed(texts)
    ]
    command = [sys.executable, "-c", code, json.dumps([texts, codes])]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    there = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert there.strip() == str(here[::-1])
