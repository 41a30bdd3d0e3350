"""Words and tokens: which tokens a word has, in its spellings, and how a token is written.

A word has other tokens at a text's start than within it, so its tokens are those it has after a line break, where nothing is put
before it: tokenizers that begin every text with a space (SentencePiece's) would otherwise have one spelling for two.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from steerlens._typing import several, whole
from steerlens.errors import SteerlensError
from steerlens.models.facts import check_ids
from steerlens.models.prompts import check_text
from steerlens.models.stops import decode

BREAK = "\n"


@dataclass(frozen=True)
class Spelling:
    """One way to write a target word."""

    target: str
    """The word as it was given."""
    text: str
    case: str
    """ "lower", "capital", "upper", or "given" where it is none of these."""
    with_space: bool
    """Whether a space comes before it."""
    ids: tuple[int, ...]


def spellings(model: Any, words: str | Iterable[str]) -> list[Spelling]:
    """Each word in lower case, with a capital and in upper case, without and with a leading space.

    Equal words come once, and so do equal spellings of a word; those that the tokenizer does not know are left out.

    Raises:
        SteerlensError: for what is no text, or has no letter or sign in it, or no spelling that the tokenizer knows.
        ModelError: if a token is none of the model's.
    """
    found, words = [], several(words)
    for word in words:
        check_text(word, "a target word")
    for word in dict.fromkeys(words):
        bare = word.strip()
        if not bare:
            raise SteerlensError(
                f"a target word must have a letter or a sign, got {word!r}; remove it from the targets"
            )
        lower = bare.lower()
        forms = {"lower": lower, "capital": lower[:1].upper() + lower[1:], "upper": bare.upper(), "given": bare}
        known = []
        for text, space in product(dict.fromkeys(forms.values()), ("", " ")):
            ids = token_ids(model, space + text)
            case = next(case for case, form in forms.items() if form == text)
            if not _unknown(model, ids, space + text):
                known.append(Spelling(word, space + text, case, bool(space), tuple(ids)))
        if not known:
            raise SteerlensError(f"a target word must be known to the tokenizer, got {word!r}, which is not; remove it")
        found += known
    return found


def token_ids(model: Any, text: str) -> list[int]:
    """The tokens of a text within another one.

    Raises:
        ModelError: if one of them is none of the model's.
    """
    before, whole_text = (
        model.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (BREAK, BREAK + text)
    )
    # Some tokenizers have no line break, or join it with what comes after.
    apart = before and whole_text[: len(before)] == before
    ids = whole_text[len(before) :] if apart else model.tokenizer(text, add_special_tokens=False)["input_ids"]
    check_ids(model, ids)
    return [int(one) for one in ids]


def single_token(model: Any, target: Any) -> int:
    """The one token of a target: of an id itself, of a text exactly as it is written.

    Raises:
        SteerlensError: if the text is not one token, or the id none of the model's.
    """
    if not isinstance(target, str):
        number = whole(target, "a target's token id")
        check_ids(model, [number])
        return number
    ids = token_ids(model, target)
    if len(ids) == 1 and not _unknown(model, ids, target):
        return ids[0]
    spaced = f" {target.strip()}"
    one = spaced != target and len(token_ids(model, spaced)) == 1
    fix = f"{spaced!r}, with a space before it, is one" if one else "give one of these, or a token's id"
    raise SteerlensError(
        f"a target must be one token of the tokenizer, got {target!r}, which is {len(ids)}: {written(model, ids)}; {fix}"
    )


def told_apart(model: Any, ids: Sequence[int]) -> dict[int, str]:
    """Each token as it is written, with its id after it where two are written alike, as parts of one letter are."""
    texts = written(model, ids)
    return {
        token: text if texts.count(text) == 1 else f"{text} ({token})" for token, text in zip(ids, texts, strict=True)
    }


def _unknown(model: Any, ids: Sequence[int], text: str) -> bool:
    """Whether a token stands for what the tokenizer does not know."""
    tokenizer = model.tokenizer
    return tokenizer.unk_token_id in ids and tokenizer.unk_token not in text


def written(model: Any, ids: Sequence[int]) -> list[str]:
    """Each token as it is written within a text, its leading space included; `<396>` for an id that only pads the vocabulary."""
    # A token decoded alone loses its space in some tokenizers, so it is decoded after another.
    (anchor, *_) = model.tokenizer("a", add_special_tokens=False)["input_ids"] or [None]
    before = "" if anchor is None else decode(model.tokenizer, [anchor], specials=True)
    texts = []
    for token in ids:
        alone = decode(model.tokenizer, [token], specials=True)
        after = alone if anchor is None else decode(model.tokenizer, [anchor, token], specials=True)
        texts.append((after[len(before) :] if after.startswith(before) else alone) or f"<{token}>")
    return texts
