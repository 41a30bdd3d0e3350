"""Sentences: what splits them reads every sign as itself."""

from pathlib import Path

import pysbd
import pytest

from steerlens.checks.registry import check
from steerlens.checks.text import PLACEHOLDERS, split_sentences
from steerlens.data.families import sentence_count

PUNCTUATION = "«»°ûũǃʼ،‘’“”⁃。「」！（）．？"  # noqa: RUF001
"""The signs beyond ASCII that pysbd reads as what they are."""

UNUSED = ("languages", "cleaner", "about", "__init__")
TEXTS = (
    "The horn part is written in B{}. The band plays at noon. We clap.",
    "One ends so{} Another begins. A third.",
    '{} He said "Go. Now!" (See p. 3.) She went{}',
    "Really?{}! Yes... No{}. 1. First 2. Second",
    "{}{}{}",
)


def test_the_placeholders_are_all_signs_of_its_source_that_are_no_punctuation() -> None:
    folder = Path(pysbd.__file__).parent
    files = [path for path in folder.glob("*.py") if path.stem not in UNUSED]
    files += [folder / "lang" / "english.py", *(folder / "lang" / "common").glob("*.py")]
    signs = {sign for path in files for sign in path.read_text(encoding="utf-8") if not sign.isascii()}
    assert signs - set(PUNCTUATION) == set(PLACEHOLDERS)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("sign", PLACEHOLDERS)
def test_a_placeholder_of_the_splitter_is_a_sign_like_any_other(text: str, sign: str) -> None:
    other = "x" if sign.isalpha() else "★"
    sentences = split_sentences(text.replace("{}", sign))
    assert [part.replace(sign, other) for part in sentences] == split_sentences(text.replace("{}", other))
    assert "".join(sentences) == text.replace("{}", sign)


@pytest.mark.parametrize(
    "text", ["We clap. . .?! Then\nhome.", "1) one (i) two ii) three.", "Ask “why?” Go. \\[a.b\\]", "!?!", " \n ", ""]
)
def test_sentences_make_up_the_text(text: str) -> None:
    assert "".join(split_sentences(text)) == " ".join(text.split())


def test_three_sentences_about_a_flat_are_three() -> None:
    text = TEXTS[0].format("\u266d")
    assert sentence_count(text) == 3
    less = {"num_sentences": 3, "relation": "less than"}
    assert not check(text, "length_constraints:number_sentences", less).strict
