"""From text to tokens: one beginning-of-sequence token at most, all of the text, and prompts that fit."""

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers import AutoTokenizer

from steerlens.errors import ModelError, SteerlensError
from steerlens.models import prompts
from steerlens.models.load import BUNDLED, NAMED_MODELS, load_model
from steerlens.models.prompts import (
    PromptFormat,
    encode,
    encode_all,
    fill_template,
    frame,
    pinned,
    render,
    template_digest,
    token_span,
)
from tests.conftest import Subject
from tests.tiny_models import BOS, CHAT_TEMPLATE, byte_tokenizer

FORMATS = [
    PromptFormat(),
    PromptFormat(style="plain"),
    PromptFormat(style="plain", plain_template="Q: {prompt}\nA:"),
    PromptFormat(system="Be brief."),
]
PROMPTS = ["Describe rain.", "é ß 日本", "", f"{BOS}Describe rain.", "  spaces  "]


def formats_of(subject: Subject) -> list[PromptFormat]:
    """Those that the model can take: a system message needs a chat template."""
    return [one for one in FORMATS if subject.model.tokenizer.chat_template or one.system is None]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_prompt_starts_with_exactly_one_bos_where_the_tokenizer_writes_it(tiny: Subject, prompt: str) -> None:
    for prompt_format in formats_of(tiny):
        ids = encode(tiny.model, prompt, prompt_format)
        bos = tiny.model.tokenizer.bos_token_id
        assert ids[0] == bos
        assert ids[1:2] != [bos]


def test_what_is_tokenized_is_the_rendered_text(tiny: Subject) -> None:
    for prompt_format in formats_of(tiny):
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


PLAIN = PromptFormat(style="plain")
TOKENIZERS: dict[str, dict[str, Any]] = {
    "writes BOS": {},
    "writes none": {"around": "$A"},
    "has none": {"around": "$A", "bos": None},
    "appends EOS": {"around": "$A <eos>"},
    "surrounds": {"around": "<bos> $A <eos>"},
    "two leading tokens": {"around": "<turn> <pad> $A"},
}


@pytest.fixture(scope="module")
def loaded(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model loaded with a tokenizer of the kinds above."""
    known: dict[str, Any] = {}

    def load(kind: str) -> Any:
        if kind not in known:
            folder = tmp_path_factory.mktemp("kind") / "model"
            shutil.copytree(tiny_folders["gpt2"], folder)
            byte_tokenizer(**TOKENIZERS[kind]).save_pretrained(folder)
            known[kind] = load_model(folder, progress=False)
        return known[kind]

    return load


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_plain_prompt_is_what_the_tokenizer_on_disk_feeds_without_what_it_puts_behind(loaded: Any, kind: str) -> None:
    model = loaded(kind)
    stored = AutoTokenizer.from_pretrained(model.cfg.model_name, local_files_only=True)
    for text in ("abc", "x", "<pad>", " é "):
        fed, bare = stored(text)["input_ids"], stored(text, add_special_tokens=False)["input_ids"]
        end = max(i for i in range(len(fed)) if fed[i : i + len(bare)] == bare) + len(bare)
        assert encode(model, text, PLAIN) == fed[:end]


def test_a_tokenizer_file_that_says_to_add_no_bos_is_believed(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folders["llama"], folder)
    byte_tokenizer(around="$A").save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": False}))
    model = load_model(folder, progress=False)
    assert model.tokenizer.decode(encode(model, "abc", PLAIN)) == "abc"


@pytest.mark.parametrize("kind", ["writes BOS", "writes none", "surrounds"])
def test_bos_can_be_asked_for_and_left_out(loaded: Any, kind: str) -> None:
    model = loaded(kind)
    for text in ("abc", f"{BOS}abc"):
        assert model.tokenizer.decode(encode(model, text, PromptFormat(bos=True))) == f"{BOS}abc"
        assert model.tokenizer.decode(encode(model, text, PromptFormat(bos=False))) == "abc"


def test_bos_can_be_left_out_of_a_chat_template(llama: Subject) -> None:
    whole = encode(llama.model, "Hi")
    assert encode(llama.model, "Hi", PromptFormat(bos=True)) == whole
    assert encode(llama.model, "Hi", PromptFormat(bos=False)) == whole[1:]


def test_bos_is_refused_where_the_tokenizer_has_none(loaded: Any) -> None:
    with pytest.raises(ModelError, match=r"bos=True needs a tokenizer with a beginning-of-sequence token"):
        encode(loaded("has none"), "abc", PromptFormat(bos=True))


def test_a_tokenizer_without_bos_may_repeat_what_transformer_lens_takes_for_one(loaded: Any) -> None:
    assert encode(loaded("has none"), "<eos><eos>a", PLAIN)[:2] == [1, 1]


def test_an_empty_prompt_without_bos_is_refused(loaded: Any) -> None:
    with pytest.raises(SteerlensError, match="at least one token, got an empty text"):
        encode(loaded("writes none"), "")


@pytest.mark.parametrize("name", [name for name, model in NAMED_MODELS.items() if not model.hub_id])
def test_the_tokenizers_of_the_bundled_models_start_a_text_as_in_training(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / name, local_files_only=True)
    assert tokenizer.decode(tokenizer("the fox")["input_ids"]) == "<|start|>the fox"


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
    digests = {template_digest(llama.model, one) for one in FORMATS}
    assert len(digests) == len(FORMATS)
    assert template_digest(gpt2.model, PromptFormat()) == template_digest(gpt2.model, PLAIN)
    assert template_digest(gpt2.model, PromptFormat(bos=False)) != template_digest(gpt2.model, PLAIN)


def test_a_prompt_and_its_room_must_fit_the_context(gpt2: Subject) -> None:
    assert len(encode_all(gpt2.model, ["b" * 149], room=10)[0]) == 150
    with pytest.raises(SteerlensError, match=r"context of 160 tokens, got 151 \+ 10 for prompt 1 \('bbb"):
        encode_all(gpt2.model, ["a", "b" * 150], room=10)


# --- templates as they are found ------------------------------------------------------------------------------------

GENERATION = "{% if add_generation_prompt %}<turn>assistant: {% endif %}"
LOOP = "{% for m in messages %}<turn>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + GENERATION
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<turn>system: You are helpful.\n{% endif %}"
    "{% for m in messages %}<turn>{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}" + GENERATION
)
DATED = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}Today: {{ date_string }}\n" + LOOP
)
FIXED_DATE = (
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}Today: {{ date_string }}\n"
    + LOOP
)
IGNORES_SYSTEM = "<turn>user: {{ messages[-1]['content'] }}\n" + GENERATION
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + LOOP
)
PARTS_ONLY = (
    "{% for m in messages %}<turn>{{ m['role'] }}: {% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}" + GENERATION
)
STRICT_PARTS = "{% for m in messages %}{{ m['role'] + m['content'][0].text }}{% endfor %}"
THINKING = LOOP + "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"


@pytest.fixture
def with_template(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny Llama with another chat template."""

    def model(template: Any) -> Any:
        monkeypatch.setattr(llama.model.tokenizer, "chat_template", template)
        return llama.model

    return model


@pytest.mark.parametrize("template", [CHATML, DATED, LOOP, PARTS_ONLY, STRICT_PARTS, THINKING], ids=str)
def test_prompt_and_system_message_reach_the_model(with_template: Any, template: str) -> None:
    model = with_template(template)
    for prompt in [*PROMPTS, "u", "assistant", "a <turn> in the text", "two\n\nlines\n"]:
        text = model.tokenizer.decode(encode(model, prompt, PromptFormat(system="Be  brief.\n")))
        assert "Be  brief." in text
        assert prompt.strip() in text


@pytest.mark.parametrize(
    ("template", "reason"),
    [(IGNORES_SYSTEM, "it leaves the text out"), (REFUSES_SYSTEM, "TemplateError: System role not supported")],
)
def test_a_template_that_takes_no_system_message_is_refused_with_one_and_used_without(
    with_template: Any, template: str, reason: str
) -> None:
    model = with_template(template)
    with pytest.raises(
        ModelError, match=rf"chat template takes no system message \({reason}\); leave it out, or write"
    ):
        encode(model, "Hi", PromptFormat(system="Be brief."))
    assert render(model, "Hi") == "<turn>user: Hi\n<turn>assistant: "


@pytest.mark.parametrize("name", ["tiny", "tiny-base"])
def test_the_bundled_models_refuse_a_system_message_that_they_would_not_read(
    llama: Subject, name: str, monkeypatch: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / name, local_files_only=True)
    monkeypatch.setattr(llama.model.tokenizer, "chat_template", tokenizer.chat_template)
    with pytest.raises(ModelError, match="takes no system message"):
        render(llama.model, "Hi", PromptFormat(system="Be brief."))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("<turn>user: {{ nothing }}", "it leaves the text out"),
        ("{% for m in messages %}{{ m.content.missing.more }}{% endfor %}", "UndefinedError: .* has no attribute"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ raise_exception('Not today') }}", "TemplateError: Not today"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError|leaves the text out"),
    ],
)
def test_a_template_that_cannot_write_the_prompt_is_refused_in_a_sentence(
    with_template: Any, template: str, reason: str
) -> None:
    model = with_template(template)
    for prompt_format in (PromptFormat(), PromptFormat(system="Be brief.")):
        with pytest.raises(ModelError, match=rf"a chat template must write the prompt.*({reason}).*use style=.plain"):
            encode(model, "Hi", prompt_format)
    assert render(model, "Hi", PLAIN) == "Hi"


def test_a_template_that_drops_some_contents_only_is_refused_for_those(with_template: Any) -> None:
    model = with_template("{% for m in messages %}{{ m.content.split('/think')[0] }}{% endfor %}")
    assert render(model, "Hi") == "Hi"
    with pytest.raises(ModelError, match="must write the user message, and it leaves out or changes 'Hi /think Ho'"):
        render(model, "Hi /think Ho")
    model = with_template(
        "{% for m in messages %}{% if 'x' in m.content %}{{ raise_exception('No x') }}{% endif %}" + LOOP[25:]
    )
    with pytest.raises(ModelError, match=r"cannot be filled in with 'a x' \(TemplateError: No x\)"):
        render(model, "a x")


def test_a_template_of_parts_writes_an_answer_too(with_template: Any) -> None:
    tokenizer = with_template(PARTS_ONLY).tokenizer
    text = fill_template(tokenizer, [("user", "Hi"), ("assistant", "Ho")], add_generation_prompt=False)
    assert text == "<turn>user: Hi<turn>assistant: Ho"


@pytest.mark.parametrize("as_list", [False, True])
def test_one_of_several_templates_is_the_default_or_chosen_by_name(with_template: Any, as_list: bool) -> None:
    several: Any = {"default": LOOP, "parts": PARTS_ONLY, "dated": DATED}
    model = with_template(several)
    if as_list:
        model.tokenizer.chat_template = [{"name": name, "template": text} for name, text in several.items()]
    assert render(model, "Hi") == "<turn>user: Hi\n<turn>assistant: "
    assert render(model, "Hi", PromptFormat(template="dated")).startswith("Today: ")
    with pytest.raises(
        ModelError, match=r"must name one of the tokenizer's chat templates, got 'part'; did you mean 'parts'\?"
    ):
        render(model, "Hi", PromptFormat(template="part"))


def test_several_templates_without_a_default_ask_for_a_name(with_template: Any) -> None:
    model = with_template({"rag": LOOP, "tools": PARTS_ONLY})
    with pytest.raises(ModelError, match=r"must name one .*, none is the default; known: rag, tools"):
        encode(model, "Hi")
    assert render(model, "Hi", PromptFormat(template="rag")) == "<turn>user: Hi\n<turn>assistant: "


def test_a_name_for_the_only_template_is_refused(llama: Subject) -> None:
    with pytest.raises(ModelError, match="got 'rag', and this model has just one; leave it out"):
        encode(llama.model, "Hi", PromptFormat(template="rag"))


# --- variables and dates --------------------------------------------------------------------------------------------


def test_a_template_variable_reaches_the_template_and_the_digest(with_template: Any) -> None:
    model = with_template(THINKING)
    off = PromptFormat(template_vars={"enable_thinking": False})
    assert render(model, "Hi", off) == render(model, "Hi") + "<think></think>"
    assert template_digest(model, off) != template_digest(model, PromptFormat())
    assert off == PromptFormat(template_vars={"enable_thinking": False})
    assert hash(off) == hash(PromptFormat(template_vars={"enable_thinking": False}))


def test_a_variable_that_the_template_does_not_have_is_refused(with_template: Any) -> None:
    with pytest.raises(ModelError, match="'enable_thinkin' does not occur in it; check the spelling"):
        encode(with_template(THINKING), "Hi", PromptFormat(template_vars={"enable_thinkin": False}))


def test_a_truth_value_in_words_is_refused_because_a_template_would_take_it_for_true() -> None:
    with pytest.raises(
        SteerlensError, match="a template variable must be True, False, a number or a text, got a='false'"
    ):
        PromptFormat(template_vars={"a": "false"})


class Midnight(datetime.date):
    """A day that passes whenever it is asked for."""

    days = 0

    @classmethod
    def today(cls) -> "Midnight":
        cls.days += 1
        return cls(2025, 1, cls.days)


def test_a_template_with_a_date_writes_today_as_hugging_face_does(with_template: Any) -> None:
    model = with_template(DATED)
    theirs = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert render(model, "Hi") == theirs == render(model, "Hi", pinned(model, PromptFormat()))


@pytest.mark.parametrize("template", [DATED, FIXED_DATE, DATED.replace("'%d %b %Y'", ' "%d %b %Y" ')])
def test_a_date_can_be_set(with_template: Any, template: str) -> None:
    text = render(with_template(template), "Hi", PromptFormat(date="2024-02-29"))
    assert text == "Today: 29 Feb 2024\n<turn>user: Hi\n<turn>assistant: "


def test_a_date_may_be_written_in_any_form(with_template: Any) -> None:
    model = with_template('{{ strftime_now("%Y-%m-%d") }} {{ strftime_now("it\'s %B") }} ' + LOOP)
    assert render(model, "Hi", PromptFormat(date="2024-02-29")).startswith("2024-02-29 it's February <turn>user: Hi")


def test_a_date_is_refused_where_nothing_would_write_it_or_it_is_none(llama: Subject) -> None:
    with pytest.raises(ModelError, match="a date needs a chat template that writes one, and this model's does not"):
        encode(llama.model, "Hi", PromptFormat(date="2024-02-29"))
    with pytest.raises(SteerlensError, match="a date must be a day such as 2025-01-31, got 'yesterday'"):
        PromptFormat(date="yesterday")


def test_the_digest_changes_with_the_day_that_a_template_writes_and_only_then(with_template: Any) -> None:
    model = with_template(DATED)
    today = template_digest(model, PromptFormat())
    assert today == template_digest(model, pinned(model, PromptFormat()))
    days = [template_digest(model, PromptFormat(date=day)) for day in ("2024-02-29", "2024-03-01", "2024-02-29")]
    assert days[0] == days[2]
    assert len({today, *days}) == 3


def test_prompts_of_one_call_have_one_date_though_midnight_passes(
    with_template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_template(DATED)
    monkeypatch.setattr(prompts, "date", Midnight)
    rows = encode_all(model, ["Hi", "Hi", "Hi"])
    assert rows[0] == rows[1] == rows[2] == encode(model, "Hi", PromptFormat(date=f"2025-01-0{Midnight.days}"))


def test_only_a_template_that_writes_the_date_is_pinned_and_a_folder_goes_on_with_its_own(
    with_template: Any, tmp_path: Path
) -> None:
    model = with_template(FIXED_DATE)
    assert pinned(model, PromptFormat()) == PromptFormat()
    model = with_template(DATED)
    assert pinned(model, PLAIN) == PLAIN
    (tmp_path / "config.json").write_text('{"config": {"prompt_format": {"date": "2020-01-01"}}}')
    assert pinned(model, PromptFormat(), tmp_path).date == "2020-01-01"
    assert pinned(model, PromptFormat(date="2021-01-01"), tmp_path).date == "2021-01-01"
    assert pinned(model, PromptFormat(), tmp_path / "none").date == datetime.date.today().isoformat()


def test_the_frame_shows_what_stands_around_a_prompt(llama: Subject, gpt2: Subject) -> None:
    assert frame(llama.model) == "<bos><turn>user: {prompt}\n<turn>assistant: "
    assert frame(gpt2.model, PromptFormat(plain_template="Q: {prompt}\nA:")) == "Q: {prompt}\nA:"


# --- what is no prompt ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [None, float("nan"), 3, ["a"], b"a", pd.NA, np.nan])
def test_what_is_no_text_is_refused_with_its_place(tiny: Subject, missing: Any) -> None:
    with pytest.raises(SteerlensError, match=r"prompt 1 must be a text, got .* \(\w+\); fill in or leave out"):
        encode_all(tiny.model, np.array(["a", missing], dtype=object))


def test_a_lone_surrogate_is_refused(tiny: Subject) -> None:
    with pytest.raises(SteerlensError, match=r"must be valid Unicode, got the lone surrogate '\\ud83d' in 'a\\ud83d'"):
        encode_all(tiny.model, ["a\ud83d"])
    with pytest.raises(SteerlensError, match="system must be valid Unicode"):
        PromptFormat(system="\udc00")


def test_a_series_of_prompts_is_as_good_as_a_list(tiny: Subject) -> None:
    series = pd.Series(["a", "b", "a"], index=[7, 7, 9])
    assert encode_all(tiny.model, series) == encode_all(tiny.model, ["a", "b", "a"])


@pytest.mark.parametrize(
    "setting", [{"system": "a"}, {"template": "a"}, {"template_vars": {"a": 1}}, {"date": "2025-01-01"}], ids=str
)
def test_what_only_a_chat_template_reads_is_refused_without_one(gpt2: Subject, setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(SteerlensError, match=f'{name} is for chat templates, and style="plain" uses none'):
        PromptFormat(style="plain", **setting)
    with pytest.raises(ModelError, match=f"{name} needs a tokenizer with a chat template"):
        encode(gpt2.model, "Hi", PromptFormat(**setting))


# --- spans -----------------------------------------------------------------------------------------------------------

SPANNED = "Describe rain. Use capitals."


@pytest.mark.parametrize(
    "prompt_format",
    [PromptFormat(), PromptFormat(system="Be brief."), PromptFormat(style="plain"), PromptFormat(bos=False)],
    ids=str,
)
def test_a_span_of_a_prompt_is_its_tokens_as_they_are_fed(tiny: Subject, prompt_format: PromptFormat) -> None:
    if tiny.name == "gpt2" and prompt_format.system:
        pytest.skip("this model has no chat template to carry a system message")
    ids = encode(tiny.model, SPANNED, prompt_format)
    start, stop = token_span(tiny.model, SPANNED, (15, 28), prompt_format)
    assert tiny.model.tokenizer.decode(ids[start:stop]) == "Use capitals."
    start, stop = token_span(tiny.model, SPANNED, (0, 8), prompt_format)
    assert tiny.model.tokenizer.decode(ids[start:stop]) == "Describe"


def test_the_span_of_a_text_that_stands_twice_is_the_one_asked_for(llama: Subject) -> None:
    prompt = "rain rain rain"
    spans = [token_span(llama.model, prompt, (place, place + 4)) for place in (0, 5, 10)]
    assert [start - spans[0][0] for start, _ in spans] == [0, 5, 10]  # a token a byte


def test_a_span_counts_characters_also_where_they_are_several_bytes(llama: Subject) -> None:
    prompt = "Café ☂ rain"
    ids = encode(llama.model, prompt)
    start, stop = token_span(llama.model, prompt, (5, 6))
    assert llama.model.tokenizer.decode(ids[start:stop]) == "☂"


def test_a_template_that_trims_a_prompt_moves_its_spans(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    template = CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim")
    monkeypatch.setattr(llama.model.tokenizer, "chat_template", template)
    ids = encode(llama.model, "  rain today ")
    start, stop = token_span(llama.model, "  rain today ", (2, 6))
    assert llama.model.tokenizer.decode(ids[start:stop]) == "rain"


@pytest.mark.parametrize("span", [(3, 3), (5, 99), (-1, 4), (8, 9)], ids=str)
def test_a_span_without_characters_of_the_prompt_is_refused(llama: Subject, span: tuple[int, int]) -> None:
    with pytest.raises(SteerlensError, match=r"a span must hold characters of the prompt, got \["):
        token_span(llama.model, "Describe rain.", span)


def test_a_template_that_rewrites_a_prompt_has_no_spans(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    template = CHAT_TEMPLATE.replace("m['content']", "m['content'] | replace(' ', '  ')")
    monkeypatch.setattr(llama.model.tokenizer, "chat_template", template)
    with pytest.raises(SteerlensError, match=r"writes the prompt as it is, and this one changes 'Describe rain\.'"):
        token_span(llama.model, "Describe rain.", (0, 8))
