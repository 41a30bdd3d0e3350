"""What a caller may end a row with: texts, looked for with the special tokens that a row's text leaves out, and token ids."""

from collections.abc import Sequence
from typing import Any

from steerlens.errors import SteerlensError


def decode(tokenizer: Any, tokens: Sequence[int], *, specials: bool = False) -> str:
    """The text of tokens, without special tokens unless they are asked for."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=not specials, clean_up_tokenization_spaces=False))


def before_stop(tokenizer: Any, tokens: Sequence[int], stops: Sequence[str]) -> str | None:
    """The text before the first stop text, without special tokens; None where there is no stop text.

    A stop text may be, or hold, a special token.
    """
    text = decode(tokenizer, tokens, specials=True)
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    if not found:
        return None
    cut, whole = min(found), len(tokens)
    while len(said := decode(tokenizer, tokens[:whole], specials=True)) > cut:
        whole -= 1  # whole tokens before the stop text; the next one may begin before it, too
    # Special tokens among the whole ones are left out; what is said of the next token, before the cut, is text of its own.
    return decode(tokenizer, tokens[:whole]) + text[len(said) : cut]


def check_stop_ids(model: Any, ids: Sequence[int]) -> None:
    """Refuse an id that the model cannot say.

    Raises:
        SteerlensError: if one is not in its vocabulary.
    """
    d_vocab = int(model.cfg.d_vocab)
    if too_large := [stop for stop in ids if stop >= d_vocab]:
        raise SteerlensError(f"a stop id must be in [0, {d_vocab}), the model's vocabulary, got {too_large[0]}")
