"""Texts in which something comes twice: what is marked as a repetition really is one, and no text comes twice itself."""

from tiny_copies import VERBATIM, copies


def bare(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def test_what_is_marked_stands_before_it_in_the_text() -> None:
    for copy in copies(seed=0, n=500):
        assert copy.spans
        for first, last in copy.spans:
            assert bare(copy.text[first:last])
            assert bare(copy.text[first:last]) in bare(copy.text[:first]), copy


def test_texts_are_the_same_for_the_same_seed_and_differ_otherwise() -> None:
    one, again, other = (list(copies(seed, n=300)) for seed in (1, 1, 2))
    assert one == again
    assert len({copy.text for copy in one}) > 295
    assert len({copy.text for copy in one} & {copy.text for copy in other}) < 5


def test_all_kinds_are_drawn_or_those_that_are_asked_for() -> None:
    assert {copy.kind for copy in copies(seed=3, n=300)} == {*VERBATIM, "turned"}
    assert {copy.kind for copy in copies(seed=3, n=300, kinds=VERBATIM)} == {*VERBATIM}


def test_verbatim_repetitions_are_letter_for_letter() -> None:
    for copy in copies(seed=4, n=300, kinds=VERBATIM):
        for first, last in copy.spans:
            assert copy.text[first:last] in copy.text[:first], copy
