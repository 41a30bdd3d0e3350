"""From text to tokens: chat template, beginning-of-sequence token, left padding. Nothing else tokenizes.

A chat template's text already holds the beginning-of-sequence token, so it is encoded without special tokens; plain text gets
one if TransformerLens would prepend one for this model. More than one at the start is an error, never fed to a model.
Batches are padded on the left with an explicit mask, so the last column is the last token of every row.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steerlens._typing import Style
from steerlens.errors import ModelError, SteerlensError


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt's text becomes what the model reads."""

    style: Style = "auto"
    """ "chat" renders one user turn with the tokenizer's template; "plain" feeds the text; "auto" is chat where it can be."""
    system: str | None = None
    """A system message for the chat template; None leaves the template's own default."""
    plain_template: str = "{prompt}"
    """The frame of a plain prompt, for base models: for example "Q: {prompt}\\nA:" (Stolfo et al. 2025)."""

    def __post_init__(self) -> None:
        if "{prompt}" not in self.plain_template:
            raise SteerlensError(f"plain_template must contain {{prompt}}, got {self.plain_template!r}")


def template_digest(model: Any, prompt_format: PromptFormat) -> str:
    """8 hex digits that change with the chat template or the prompt format."""
    text = f"{getattr(model.tokenizer, 'chat_template', None)}{prompt_format}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def render(model: Any, prompt: str, prompt_format: PromptFormat = PromptFormat()) -> str:
    """The text that is tokenized for a prompt: the chat template filled in, or the plain frame.

    Raises:
        ModelError: if the chat style is asked of a tokenizer without a chat template.
    """
    if not is_chat(model, prompt_format):
        return prompt_format.plain_template.replace("{prompt}", prompt)
    messages = [{"role": "user", "content": prompt}]
    if prompt_format.system is not None:
        messages.insert(0, {"role": "system", "content": prompt_format.system})
    text: str = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def is_chat(model: Any, prompt_format: PromptFormat) -> bool:
    """Whether prompts go through the tokenizer's chat template."""
    has_template = bool(getattr(model.tokenizer, "chat_template", None))
    if prompt_format.style == "chat" and not has_template:
        raise ModelError(
            'style="chat" needs a tokenizer with a chat template, and this model\'s has none; '
            'use style="plain", with plain_template="Q: {prompt}\\nA:" for a base model'
        )
    return has_template and prompt_format.style != "plain"


def encode(model: Any, prompt: str, prompt_format: PromptFormat = PromptFormat()) -> list[int]:
    """The token ids fed to the model for a prompt, with at most one beginning-of-sequence token.

    Raises:
        SteerlensError: if nothing is left to feed, or the text would start with two beginning-of-sequence tokens.
    """
    tokenizer = model.tokenizer
    ids: list[int] = tokenizer(render(model, prompt, prompt_format), add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if not is_chat(model, prompt_format) and bos is not None and model.cfg.default_prepend_bos and ids[:1] != [bos]:
        ids = [bos, *ids]
    if not ids:
        raise SteerlensError("a prompt must have at least one token, got an empty text; remove it from the prompts")
    if bos is not None and ids[:2] == [bos, bos]:
        raise SteerlensError(
            f"a prompt may start with one beginning-of-sequence token, got two ({tokenizer.bos_token!r}); "
            "remove it from the text or from the chat template"
        )
    return ids


def encode_all(
    model: Any,
    prompts: Sequence[str],
    prompt_format: PromptFormat = PromptFormat(),
    *,
    room: int = 0,
) -> list[list[int]]:
    """Token ids of each prompt, all short enough to leave `room` tokens of the context free.

    Raises:
        SteerlensError: if a prompt and the room together exceed the model's context.
    """
    encoded = [encode(model, prompt, prompt_format) for prompt in prompts]
    n_ctx = int(model.cfg.n_ctx)
    for index, ids in enumerate(encoded):
        if len(ids) + room > n_ctx:
            raise SteerlensError(
                f"a prompt and its new tokens must fit the context of {n_ctx} tokens, got {len(ids)} + {room} "
                f"for prompt {index} ({prompts[index][:60]!r}); shorten the prompt or lower max_new_tokens"
            )
    return encoded
