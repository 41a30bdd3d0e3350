"""The card of the tiny models: which held-out phrasings are close to a training one."""

import tiny_card as card
import tiny_corpus as tc


def test_a_phrasing_is_close_if_one_word_differs_is_missing_or_is_more() -> None:
    known = card.one_word_less("Use at most {n} sentences.")
    for close in (
        "use at most {n} sentences",
        "Write at most {n} sentences.",
        "Use {n} sentences.",
        "Use at most {n} short sentences.",
    ):
        assert (not known.isdisjoint(card.one_word_less(close))) == (close != "Use {n} sentences.")
    assert known.isdisjoint(card.one_word_less("Write up to {n} sentences."))


def test_some_heldout_phrasings_are_close_and_most_are_not() -> None:
    found = [
        card.is_close(name, text, 500) for name in ("title", "brief") for text in tc.world().instructions[name].heldout
    ]
    assert 0 < sum(found) < len(found) / 2
