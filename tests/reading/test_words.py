"""Words and their tokens: every spelling, whatever the tokenizer puts before a text."""

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steerlens.errors import ModelError, SteerlensError
from steerlens.reading.words import single_token, spellings, token_ids, told_apart, written
from tests.conftest import Subject

PIECES = ["<unk>", "▁", "▁rain", "rain", "▁a", "a", "\n", "▁\n", "Rain", "▁Rain", "s", "▁RAIN"]


@pytest.fixture
def sentencepiece() -> Any:
    """A model of whose tokenizer every text begins with a space, as SentencePiece's do."""
    core = Tokenizer(
        models.Unigram([(piece, -float(i)) for i, piece in enumerate(PIECES)], unk_id=0, byte_fallback=False)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    return SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(d_vocab=len(PIECES)))


def pieces(model: Any, text: str) -> list[str]:
    return model.tokenizer.convert_ids_to_tokens(token_ids(model, text))


def test_a_word_is_spelled_in_three_cases_without_and_with_a_space(llama: Subject) -> None:
    found = spellings(llama.model, ["rain"])
    assert [(one.text, one.case, one.with_space) for one in found] == [
        ("rain", "lower", False), (" rain", "lower", True), ("Rain", "capital", False),
        (" Rain", "capital", True), ("RAIN", "upper", False), (" RAIN", "upper", True),
    ]  # fmt: skip
    assert all(llama.model.tokenizer.decode(one.ids) == one.text for one in found)
    assert {one.target for one in found} == {"rain"}


@pytest.mark.parametrize(
    ("word", "texts", "cases"),
    [
        ("3", ["3", " 3"], {"lower"}),
        ("a", ["a", " a", "A", " A"], {"lower", "capital"}),
        (" iPad ", ["ipad", " ipad", "Ipad", " Ipad", "IPAD", " IPAD", "iPad", " iPad"], {"lower", "capital", "upper", "given"}),
    ],
)  # fmt: skip
def test_equal_spellings_come_once_and_the_given_one_is_among_them(
    llama: Subject, word: str, texts: list[str], cases: set[str]
) -> None:
    found = spellings(llama.model, word)
    assert [one.text for one in found] == texts
    assert {one.case for one in found} == cases


def test_a_word_that_is_given_twice_comes_once(llama: Subject) -> None:
    assert spellings(llama.model, ["rain", "rain"]) == spellings(llama.model, "rain")


def test_a_space_before_a_word_is_its_own_where_a_tokenizer_begins_every_text_with_one(sentencepiece: Any) -> None:
    assert sentencepiece.tokenizer.tokenize("rain") == ["▁rain"]  # what the two spellings would share
    assert [pieces(sentencepiece, text) for text in ("rain", " rain", "rains")] == [["rain"], ["▁rain"], ["rain", "s"]]
    assert single_token(sentencepiece, "rain") != single_token(sentencepiece, " rain")
    assert written(sentencepiece, [single_token(sentencepiece, "rain"), single_token(sentencepiece, " rain")]) == [
        "rain",
        " rain",
    ]


def test_tokens_are_written_so_that_they_join_to_the_text(llama: Subject) -> None:
    text = "One, two  lines\nof <rain>."
    assert "".join(written(llama.model, token_ids(llama.model, text))) == text


def test_tokens_that_are_written_alike_are_told_apart_by_their_ids(llama: Subject) -> None:
    first, second = token_ids(llama.model, "é")  # two bytes of one letter
    (letter,) = token_ids(llama.model, "a")
    assert told_apart(llama.model, [first, letter, second]) == {
        first: f"\ufffd ({first})",
        letter: "a",
        second: f"\ufffd ({second})",
    }


def test_an_id_that_no_text_has_is_written_as_its_number(llama: Subject) -> None:
    (letter,) = token_ids(llama.model, "a")
    assert written(llama.model, [letter, 396]) == ["a", "<396>"]


def test_a_target_is_a_text_of_one_token_or_an_id(llama: Subject) -> None:
    assert single_token(llama.model, "a") == single_token(llama.model, single_token(llama.model, "a"))
    assert single_token(llama.model, "<eos>") == llama.model.tokenizer.eos_token_id


def test_a_target_of_several_tokens_is_refused_with_its_tokens(llama: Subject, sentencepiece: Any) -> None:
    with pytest.raises(
        SteerlensError, match=r"must be one token of the tokenizer, got 'ab', which is 2: \['a', 'b'\]; give one of"
    ):
        single_token(llama.model, "ab")
    with pytest.raises(
        SteerlensError, match=r"got 'RAIN', which is 1: \['<unk>'\]; ' RAIN', with a space before it, is one"
    ):
        single_token(sentencepiece, "RAIN")


def test_an_id_beyond_the_vocabulary_or_no_id_is_refused(llama: Subject) -> None:
    with pytest.raises(ModelError, match=r"a token must be one of the 260 .* got 999"):
        single_token(llama.model, 999)
    with pytest.raises(SteerlensError, match=r"a target's token id must be a whole number, got 1\.5"):
        single_token(llama.model, 1.5)


def test_spellings_that_a_tokenizer_does_not_know_are_left_out(sentencepiece: Any) -> None:
    assert [one.text for one in spellings(sentencepiece, "rain")] == ["rain", " rain", "Rain", " Rain", " RAIN"]
    with pytest.raises(SteerlensError, match="a target word must be known to the tokenizer, got 'snow'"):
        spellings(sentencepiece, "snow")


@pytest.mark.parametrize("word", ["", "  "])
def test_a_word_without_a_letter_is_refused(llama: Subject, word: str) -> None:
    with pytest.raises(SteerlensError, match="a target word must have a letter or a sign"):
        spellings(llama.model, [word])
