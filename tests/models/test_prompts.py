"""From text to tokens: one beginning-of-sequence token at most, left padding, and prompts that fit."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steerlens.errors import ModelError, SteerlensError
from steerlens.models.prompts import PromptFormat, encode, encode_all, render, template_digest
from steerlens.models.rows import left_pad, length_sorted_batches, pad_id
from tests.conftest import Subject
from tests.tiny_models import BOS, CHAT_TEMPLATE

FORMATS = [
    PromptFormat(),
    PromptFormat(style="plain"),
    PromptFormat(style="plain", plain_template="Q: {prompt}\nA:"),
    PromptFormat(system="Be brief."),
]
PROMPTS = ["Describe rain.", "é ß 日本", "", f"{BOS}Describe rain.", "  spaces  "]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("prompt_format", FORMATS, ids=str)
def test_every_prompt_starts_with_exactly_one_bos(tiny: Subject, prompt_format: PromptFormat, prompt: str) -> None:
    ids = encode(tiny.model, prompt, prompt_format)
    bos = tiny.model.tokenizer.bos_token_id
    assert ids[0] == bos
    assert ids[1:2] != [bos]


def test_what_is_tokenized_is_the_rendered_text(tiny: Subject) -> None:
    for prompt_format in FORMATS:
        text = render(tiny.model, "Describe rain.", prompt_format)
        decoded = tiny.model.tokenizer.decode(encode(tiny.model, "Describe rain.", prompt_format))
        assert decoded.removeprefix(BOS) == text.removeprefix(BOS)


def test_a_template_that_writes_two_bos_is_refused(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.model.tokenizer, "chat_template", "{{ bos_token }}" + CHAT_TEMPLATE)
    with pytest.raises(SteerlensError, match=r"may start with one beginning-of-sequence token, got two \('<bos>'\)"):
        encode(llama.model, "Describe rain.")


def test_a_plain_text_that_starts_with_two_bos_is_refused(tiny: Subject) -> None:
    with pytest.raises(SteerlensError, match="got two"):
        encode(tiny.model, f"{BOS}{BOS}a", PromptFormat(style="plain"))


def test_a_template_without_bos_gets_none(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.model.tokenizer, "chat_template", CHAT_TEMPLATE.removeprefix("{{ bos_token }}"))
    assert llama.model.tokenizer.bos_token_id not in encode(llama.model, "Describe rain.")


def test_a_model_that_prepends_no_bos_gets_none(gpt2: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt2.model.cfg, "default_prepend_bos", False)
    assert gpt2.model.tokenizer.decode(encode(gpt2.model, "abc")) == "abc"
    with pytest.raises(SteerlensError, match="at least one token, got an empty text"):
        encode(gpt2.model, "")


def test_auto_is_the_chat_template_where_there_is_one(llama: Subject, gpt2: Subject) -> None:
    assert render(llama.model, "Hi") == "<bos><turn>user: Hi\n<turn>assistant: "
    assert render(gpt2.model, "Hi") == "Hi"


def test_the_chat_style_is_refused_without_a_template(gpt2: Subject) -> None:
    with pytest.raises(ModelError, match=r'style="chat" needs a tokenizer with a chat template.*use style="plain"'):
        encode(gpt2.model, "Hi", PromptFormat(style="chat"))


def test_a_system_message_stands_before_the_turn(llama: Subject) -> None:
    text = render(llama.model, "Hi", PromptFormat(system="Be brief."))
    assert text == "<bos><turn>system: Be brief.\n<turn>user: Hi\n<turn>assistant: "


def test_the_plain_frame_takes_the_prompt_as_it_is(gpt2: Subject) -> None:
    frame = PromptFormat(plain_template="Q: {prompt}\nA:")
    assert render(gpt2.model, "a {b} {prompt}", frame) == "Q: a {b} {prompt}\nA:"


def test_a_plain_frame_without_a_place_for_the_prompt_is_refused() -> None:
    with pytest.raises(SteerlensError, match=r"must contain \{prompt\}, got 'Q: A:'"):
        PromptFormat(plain_template="Q: A:")


def test_the_digest_changes_with_the_format_and_the_template(llama: Subject, gpt2: Subject) -> None:
    digests = {template_digest(subject.model, one) for subject in (llama, gpt2) for one in FORMATS}
    assert len(digests) == 2 * len(FORMATS)


def test_a_prompt_and_its_room_must_fit_the_context(gpt2: Subject) -> None:
    assert len(encode_all(gpt2.model, ["b" * 149], room=10)[0]) == 150
    with pytest.raises(SteerlensError, match=r"context of 160 tokens, got 151 \+ 10 for prompt 1 \('bbb"):
        encode_all(gpt2.model, ["a", "b" * 150], room=10)


def test_rows_are_padded_on_the_left_with_a_mask() -> None:
    batch = left_pad([[5, 6, 7], [8], []], pad_id=2)
    assert batch.tokens.tolist() == [[5, 6, 7], [2, 2, 8], [2, 2, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert batch.tokens.dtype == batch.attention_mask.dtype == torch.long


@pytest.mark.parametrize(("pad", "eos", "expected"), [(7, 3, 7), (None, 3, 3), (None, None, 0), (0, 3, 0)])
def test_padding_uses_the_pad_token_or_else_any_valid_id(pad: Any, eos: Any, expected: int) -> None:
    tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=eos)
    assert pad_id(SimpleNamespace(tokenizer=tokenizer)) == expected


def test_batches_hold_every_row_once_longest_first() -> None:
    assert length_sorted_batches([3, 9, 3, 5, 1], 2) == [[1, 3], [0, 2], [4]]
    assert length_sorted_batches([], 4) == []
    with pytest.raises(SteerlensError, match="batch_size must be at least 1, got 0"):
        length_sorted_batches([1], 0)
