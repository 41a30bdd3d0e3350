"""From text to tokens: chat template, beginning-of-sequence token, left padding. Nothing else tokenizes.

    chat    the template filled in with the prompt as one user turn, encoded without special tokens: a template writes its own
    plain   the special tokens that the tokenizer's files put before a text, if any, then the framed text; none after it

More than one beginning-of-sequence token at the start is an error, never fed to a model. So is text that does not arrive: a
template may leave out or refuse a system message, or drop a prompt that is not a list of parts. What went in must stand in what
comes out, spaces aside; contents are handed over as text, or as parts where only those arrive.

A template may write today's date. `pinned` fixes it, so that the prompts of one run agree.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any, NoReturn, get_args
from weakref import WeakKeyDictionary

from steerlens._typing import Style
from steerlens.errors import ModelError, SteerlensError, nearest

Scalar = bool | int | float | str


class TemplateVars(dict[str, Scalar]):
    """Variables of a chat template; hashable, as a part of a `PromptFormat`."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt's text becomes what the model reads.

    Example:
        >>> render(model, "Describe rain.", PromptFormat(style="plain", plain_template="Q: {prompt}"))
        'Q: Describe rain.'
    """

    style: Style = "auto"
    """ "chat" renders one user turn with the tokenizer's template; "plain" feeds the text; "auto" is chat where it can be."""
    system: str | None = None
    """A system message for the chat template; None leaves the template's own default."""
    plain_template: str = "{prompt}"
    """The frame of a plain prompt, for base models: for example "Q: {prompt}\\nA:" (Stolfo et al. 2025)."""
    template: str | None = None
    """The name of a chat template, where the tokenizer has several."""
    template_vars: Mapping[str, Scalar] = field(default_factory=TemplateVars)
    """Variables of the chat template by name, such as enable_thinking False."""
    date: str | None = None
    """The day that a chat template writes as today's, such as 2025-01-31; default: the day on which a run begins."""
    bos: bool | None = None
    """Whether prompts start with the beginning-of-sequence token; default: as the tokenizer's files, or the template, say."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "template_vars", TemplateVars(self.template_vars))
        if self.style not in get_args(Style):
            raise SteerlensError(f"style must be one of {', '.join(get_args(Style))}, got {self.style!r}")
        for name in ("plain_template", *(["system"] if self.system is not None else [])):
            check_text(getattr(self, name), name)
        if "{prompt}" not in self.plain_template:
            raise SteerlensError(f"plain_template must contain {{prompt}}, got {self.plain_template!r}")
        for name, value in self.template_vars.items():
            # To a template the text "false" is true, as any text that is not empty.
            if type(value) not in get_args(Scalar) or value in ("true", "false"):
                raise SteerlensError(
                    f"a template variable must be True, False, a number or a text, got {name}={value!r}"
                )
        if self.date is not None:
            _day(self.date)
        if self.style == "plain" and (ignored := self._for_chat()):
            raise SteerlensError(
                f'{ignored} is for chat templates, and style="plain" uses none; leave one of the two out'
            )

    def _for_chat(self) -> str:
        """The first setting that only a chat template would heed, if any is made."""
        made = {name: getattr(self, name) for name in ("system", "template", "template_vars", "date")}
        return next((name for name, value in made.items() if value not in (None, {})), "")


def check_text(value: Any, what: str = "a prompt") -> None:
    """Refuse what is no text, or cannot be encoded.

    Raises:
        SteerlensError: for None, a number or another object, or a text with a lone surrogate.
    """
    if not isinstance(value, str):
        raise SteerlensError(
            f"{what} must be a text, got {value!r:.60} ({type(value).__name__}); fill in or leave out what is missing"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SteerlensError(
            f"{what} must be valid Unicode, got the lone surrogate {value[error.start]!r} in {value[:60]!r}; "
            "read the text with its own encoding"
        ) from error


def text_list(prompts: Iterable[str]) -> list[str]:
    """Prompts in a list, whatever held them: a list, a Series, an array.

    Raises:
        SteerlensError: if they are one text, nothing, or hold what is no text.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise SteerlensError(f"prompts must be a list of texts, got {prompts!r:.60}; put one text into a list")
    texts = list(prompts)
    for index, prompt in enumerate(texts):
        check_text(prompt, f"prompt {index}")
    return texts


def template_digest(model: Any, prompt_format: PromptFormat) -> str:
    """8 hex digits that change with the chat template, its variables, and the tokens fed around a prompt."""
    source = _source(model.tokenizer, prompt_format) if is_chat(model, prompt_format) else ""
    content = [source, sorted(prompt_format.template_vars.items()), encode(model, MARK, prompt_format)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]


def frame(model: Any, prompt_format: PromptFormat = PromptFormat()) -> str:
    """The text around a prompt, with {prompt} in its place."""
    return render(model, MARK, prompt_format).replace(MARK, "{prompt}")


def pinned(model: Any, prompt_format: PromptFormat, folder: Path | None = None) -> PromptFormat:
    """The format with its date settled, where the template writes one: the one given, else the folder's, else today's.

    Args:
        folder: Of a run; its config.json says with which date it began, so that it goes on with the same prompts.
    """
    if prompt_format.date is not None or not is_chat(model, prompt_format):
        return prompt_format
    if not _TODAY.search(_source(model.tokenizer, prompt_format)):
        return prompt_format
    config = folder / "config.json" if folder is not None else None
    begun = json.loads(config.read_text(encoding="utf-8")) if config is not None and config.is_file() else {}
    begun_with = begun.get("config", begun).get("prompt_format", {}).get("date")
    return replace(prompt_format, date=begun_with or date.today().isoformat())


def render(model: Any, prompt: str, prompt_format: PromptFormat = PromptFormat()) -> str:
    """The text that is tokenized for a prompt: the chat template filled in, or the plain frame.

    Raises:
        ModelError: if the chat style is asked of a tokenizer without a chat template, or the template does not do its work.
    """
    if not is_chat(model, prompt_format):
        return prompt_format.plain_template.replace("{prompt}", prompt)  # format() would read the frame's other braces
    turns = [("user", prompt)] if prompt_format.system is None else [("system", prompt_format.system), ("user", prompt)]
    text = fill_template(model.tokenizer, turns, prompt_format)
    for role, content in turns:
        if not _stands_in(content, text):
            raise ModelError(
                f"the chat template must write the {role} message, and it leaves out or changes {content[:60]!r}; "
                "reword it, or use another template or style"
            )
    return text


def is_chat(model: Any, prompt_format: PromptFormat) -> bool:
    """Whether prompts go through the tokenizer's chat template.

    Raises:
        ModelError: if the model has no tokenizer, as a HookedTransformer may not, or the template that is asked for is not there.
    """
    if model.tokenizer is None:
        raise ModelError(
            "text needs a model with a tokenizer, and this one has none; give it one with model.set_tokenizer(...)"
        )
    has_template = bool(getattr(model.tokenizer, "chat_template", None))
    asked = 'style="chat"' if prompt_format.style == "chat" else prompt_format._for_chat()
    if asked and not has_template:
        raise ModelError(
            f"{asked} needs a tokenizer with a chat template, and this model's has none; "
            'use style="plain", with plain_template="Q: {prompt}\\nA:" for a base model'
        )
    return has_template and prompt_format.style != "plain"


def encode(model: Any, prompt: str, prompt_format: PromptFormat = PromptFormat()) -> list[int]:
    """The token ids fed to the model for a prompt, with at most one beginning-of-sequence token.

    Raises:
        SteerlensError: if the prompt is no text, nothing is left to feed, or the text would start with two
            beginning-of-sequence tokens.

    Example:
        >>> from steerlens.models import encode
        >>> [model.tokenizer.decode(token) for token in encode(model, "What is iron?")]
        ['<|start|>', '<|user|>', 'What', ' is', ' iron', '?', '<|assistant|>']
    """
    check_text(prompt)
    tokenizer = model.tokenizer
    ids: list[int] = tokenizer(render(model, prompt, prompt_format), add_special_tokens=False)["input_ids"]
    lead, bos = _on_disk(tokenizer)
    if prompt_format.bos and bos is None:
        raise ModelError("bos=True needs a tokenizer with a beginning-of-sequence token, and this model's has none")
    starts = bos is not None and ids[:1] == [bos]
    if prompt_format.bos is False:
        ids = ids[1:] if starts else ids
    elif prompt_format.bos and bos is not None:
        ids = ids if starts else [bos, *ids]
    elif not starts and not is_chat(model, prompt_format):
        ids = [*lead, *ids]
    if not ids:
        raise SteerlensError("a prompt must have at least one token, got an empty text; remove it from the prompts")
    if bos is not None and ids[:2] == [bos, bos]:
        raise SteerlensError(
            f"a prompt may start with one beginning-of-sequence token, got two ({tokenizer.decode([bos])!r}); "
            "remove it from the text or from the chat template"
        )
    return ids


def encode_all(
    model: Any,
    prompts: Iterable[str],
    prompt_format: PromptFormat = PromptFormat(),
    *,
    room: int = 0,
) -> list[list[int]]:
    """Token ids of each prompt, all short enough to leave `room` tokens of the context free.

    Raises:
        SteerlensError: if a prompt is no text, or it and the room together exceed the model's context.
    """
    # Not above: the command line's help names a PromptFormat, and loads no torch.
    from steerlens.models.facts import check_ids

    texts = text_list(prompts)
    prompt_format = pinned(model, prompt_format)
    encoded = [encode(model, prompt, prompt_format) for prompt in texts]
    n_ctx = int(model.cfg.n_ctx)
    for index, ids in enumerate(encoded):
        check_ids(model, ids)
        if len(ids) + room > n_ctx:
            raise SteerlensError(
                f"a prompt and its new tokens must fit the context of {n_ctx} tokens, got {len(ids)} + {room} "
                f"for prompt {index} ({texts[index][:60]!r}); shorten the prompt or lower max_new_tokens"
            )
    return encoded


def token_span(
    model: Any, prompt: str, span: tuple[int, int], prompt_format: PromptFormat = PromptFormat()
) -> tuple[int, int]:
    """The positions [start, stop) of the tokens, as fed, that hold the prompt's characters [start, end).

    Found by the tokenizer's character offsets, never by searching for ids: a word has other tokens in other places. A token
    that reaches over an end of the span belongs to it.

    Raises:
        SteerlensError: if the span holds no character of the prompt, or the template changes the prompt.
        ModelError: if the tokenizer gives no offsets.

    Example:
        >>> start, stop = token_span(model, "Describe rain. Use capitals.", (15, 28))
        >>> model.tokenizer.decode(encode(model, "Describe rain. Use capitals.")[start:stop])
        ' Use capitals.'
    """
    low, high = span
    if not 0 <= low < high <= len(prompt) or not prompt[low:high].strip():
        raise SteerlensError(
            f"a span must hold characters of the prompt, got [{low}, {high}) of the {len(prompt)} of {prompt[:60]!r}"
        )
    text = render(model, prompt, prompt_format)
    before, _, after = frame(model, prompt_format).partition("{prompt}")
    written = next((form for form in (prompt, prompt.strip()) if text == before + form + after), None)
    if written is None:
        raise SteerlensError(
            f"a span needs a chat template that writes the prompt as it is, and this one changes {prompt[:60]!r}; "
            'use style="plain", or another prompt'
        )
    if not getattr(model.tokenizer, "is_fast", False):
        raise ModelError(
            "a span needs a tokenizer that gives character offsets (a fast one), and this model's does not"
        )
    fed = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # Tokens that are fed before the text; below zero where one of the text's own, the first, is taken off.
    shift = len(encode(model, prompt, prompt_format)) - len(fed["input_ids"])
    trimmed = prompt.index(written)
    start, stop = (len(before) + place - trimmed for place in (low, high))
    inside = [place for place, (a, b) in enumerate(fed["offset_mapping"]) if a < stop and b > start and b > a]
    if not inside:
        raise SteerlensError(f"no token holds {prompt[low:high]!r} of {prompt[:60]!r}; the template may trim it")
    return inside[0] + shift, inside[-1] + 1 + shift


# --- chat templates -------------------------------------------------------------------------------------------------

MARK = "PromptStandsHere"
"""What stands for a prompt where the text around it is looked at."""

Turns = Sequence[tuple[str, str]]
"""Roles and contents."""


def fill_template(tokenizer: Any, turns: Turns, prompt_format: PromptFormat = PromptFormat(), **options: Any) -> str:
    """The chat template filled in with the turns' contents: as they are, or as parts where only those arrive.

    Raises:
        ModelError: if the template cannot be filled in, or does not write contents of these roles.
    """
    template = _Template(tokenizer, prompt_format, {"add_generation_prompt": True, **options})
    form = template.form([role for role, _ in turns])
    try:
        return template.fill(turns, form)
    except _RefusedError as error:
        raise ModelError(
            f"the chat template cannot be filled in with {turns[-1][1][:60]!r} ({error}); reword it, or use another style"
        ) from error


class _RefusedError(Exception):
    """What a template raised."""


class _Template:
    """A chat template with its settings."""

    def __init__(self, tokenizer: Any, prompt_format: PromptFormat, options: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.source, variables = _dated(_source(tokenizer, prompt_format), prompt_format)
        self.options = options | variables

    def fill(self, turns: Turns, form: str) -> str:
        messages = [
            {"role": role, "content": [{"type": "text", "text": content}] if form == "parts" else content}
            for role, content in turns
        ]
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, chat_template=self.source, tokenize=False, **self.options
            )
        except Exception as error:  # a template is a program of its own, and may raise anything
            raise _RefusedError(" ".join(f"{type(error).__name__}: {error}".split())[:200]) from error
        return text

    def form(self, roles: Sequence[str]) -> str:
        """In which form contents arrive, "text" or "parts"; seen once per tokenizer, with marks in their place.

        Raises:
            ModelError: if they arrive in neither.
        """
        known = _FORMS.setdefault(self.tokenizer, {})
        key = (self.source, repr((roles, sorted(self.options.items()))))
        if key not in known:
            lost = {form: self._lost(roles, form) for form in ("text", "parts")}
            known[key] = next((form for form, reason in lost.items() if not reason), None) or self._blame(roles, lost)
        return known[key]

    def _lost(self, roles: Sequence[str], form: str) -> str:
        """Why contents do not arrive; empty if they do."""
        marks = [f"{role}{place}StandsHere" for place, role in enumerate(roles)]
        try:
            text = self.fill(list(zip(roles, marks, strict=True)), form)
        except _RefusedError as error:
            return str(error)
        return "" if all(mark in text for mark in marks) else "it leaves the text out"

    def _blame(self, roles: Sequence[str], lost: Mapping[str, str]) -> NoReturn:
        others = [role for role in roles if role != "system"]
        if others != list(roles) and not all(self._lost(others, form) for form in lost):
            raise ModelError(
                f"this model's chat template takes no system message ({lost['text']}); leave it out, or write it into the prompts"
            )
        raise ModelError(
            f'a chat template must write the prompt, and this model\'s does not ({lost["text"]}); use style="plain", '
            "another template, or other template variables"
        )


_FORMS: WeakKeyDictionary[Any, dict[tuple[str, str], str]] = WeakKeyDictionary()
"""Per tokenizer: the form in which contents arrive, by template, roles and settings."""


def _source(tokenizer: Any, prompt_format: PromptFormat) -> str:
    """The text of the chat template that is used."""
    templates = tokenizer.chat_template
    if isinstance(templates, list):
        templates = {one["name"]: one["template"] for one in templates}
    name = prompt_format.template
    if isinstance(templates, Mapping):
        if (name or "default") not in templates:
            came = f"got {name!r}" if name else "none is the default"
            raise ModelError(
                f"template must name one of the tokenizer's chat templates, {came}; {nearest(name or '', templates)}"
            )
        return str(templates[name or "default"])
    if name is not None:
        raise ModelError(
            f"template must name one of several chat templates, got {name!r}, and this model has just one; leave it out"
        )
    return str(templates)


_TODAY = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<form>.*?)(?P=quote)\s*\)""")
"""A template's call for today's date."""


def _dated(source: str, prompt_format: PromptFormat) -> tuple[str, dict[str, Scalar]]:
    """The template with its date written in, and its variables."""
    variables = dict(prompt_format.template_vars)
    for name in variables:
        if not re.search(rf"\b{re.escape(name)}\b", source):
            raise ModelError(
                f"template_vars must be variables of the chat template, and {name!r} does not occur in it; check the spelling"
            )
    if prompt_format.date is None:
        return source, variables
    day = _day(prompt_format.date)
    if _TODAY.search(source):
        # What is a text to JSON is the same text to the template.
        return _TODAY.sub(lambda match: json.dumps(day.strftime(match["form"])), source), variables
    if not re.search(r"\bdate_string\b", source):
        raise ModelError("a date needs a chat template that writes one, and this model's does not; leave it out")
    return source, {"date_string": day.strftime("%d %b %Y"), **variables}  # the form of Llama 3


def _day(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError) as error:
        raise SteerlensError(f"a date must be a day such as 2025-01-31, got {text!r}") from error


def _stands_in(content: str, text: str) -> bool:
    """Whether a text holds a content, spaces aside: templates trim and indent."""
    return "".join(content.split()) in "".join(text.split())


# --- the tokenizer's files ------------------------------------------------------------------------------------------


def _on_disk(tokenizer: Any) -> tuple[list[int], int | None]:
    """The special tokens that the tokenizer's files put before a text, and its beginning-of-sequence token.

    TransformerLens' bridge makes its tokenizer write such a token whatever the files say, and takes the end-of-sequence token
    where there is none. A tokenizer without files speaks for itself.
    """
    if tokenizer not in _LEADS:
        stored = _stored(tokenizer)
        probe = stored("a", return_special_tokens_mask=True)
        ids, bos = probe["input_ids"], stored.bos_token_id
        mask = probe["special_tokens_mask"]
        text_from = mask.index(0) if 0 in mask else int(ids[:1] == [bos])  # "a" may be unknown to a tokenizer
        _LEADS[tokenizer] = (ids[:text_from], bos)
    return _LEADS[tokenizer]


def _stored(tokenizer: Any) -> Any:
    from transformers import AutoTokenizer

    name = getattr(tokenizer, "name_or_path", "")
    try:
        if name:
            return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):  # its files are gone, or need code of their own
        pass
    return tokenizer


_LEADS: WeakKeyDictionary[Any, tuple[list[int], int | None]] = WeakKeyDictionary()
