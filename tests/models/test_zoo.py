"""Every architecture of the zoo is right or refused: it gives what Hugging Face gives for one prompt alone, or a sentence."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import steerlens as sl
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import ModelError
from steerlens.models.attention import attention_abilities, softcap
from steerlens.models.backends import LeanBackend
from steerlens.models.choice import backend_used
from steerlens.models.facts import resid_post
from steerlens.models.load import load_model
from steerlens.models.probe import Abilities, abilities
from steerlens.models.prompts import encode
from steerlens.steering.sampling import generate
from steerlens.vectors.activations import record_activations
from tests.conftest import hooks_on
from tests.near_ties import assert_same_text
from tests.reference.plain_capture import last_residuals
from tests.reference.plain_loop import PlainText, Step, plain_greedy
from tests.steps import as_plan, step
from tests.zoo import DEPTH, OTHERS, ZOO, save_animal

PROMPTS = [
    "a",
    "Why?",
    "Describe rain.",
    "Name a river in the north.",
    "Where do cats sleep at night, and why there?",
    "Write one line about the sea, then one about tea, and stop there.",
]
QUERIES = ["Hm", "Describe rain.", "Tell me about tea and coffee, please."]
INSTRUCTION = "Use capitals."
PAIRS = PairSet([InstructionPair(query, INSTRUCTION, "change_case:english_capital") for query in QUERIES])
NEW_TOKENS = 6
EOS_ID = 1
STEP = step("add", "all", layer=DEPTH // 2)


class Subject:
    """One animal: its folder, loaded by steerlens, and by Hugging Face alone."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.auto = name, folder, (ZOO | OTHERS)[name].auto

    @cached_property
    def model(self) -> Any:
        return load_model(self.folder, progress=False)

    @cached_property
    def hf(self) -> Any:
        # Eager attention: the fast kernels leave out softcaps.
        return self.auto.from_pretrained(self.folder, local_files_only=True, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    root = tmp_path_factory.mktemp("zoo")
    return {name: Subject(name, save_animal(name, root / name)) for name in ZOO | OTHERS}


def text(subject: Subject, *, steps: tuple[Step, ...] = (), trials: int = 1) -> None:
    """Greedy text of one batch is Hugging Face's own of each prompt alone; a stop text makes rows leave early."""
    plain = [
        plain_greedy(subject.hf, encode(subject.model, prompt), steps, max_new_tokens=NEW_TOKENS, stop_ids=[EOS_ID])
        for prompt in PROMPTS
    ]
    stop_id = next(one.tokens[2] for one in plain if EOS_ID not in one.tokens[:3])
    got = generate(
        subject.model,
        PROMPTS * trials,
        steering=as_plan(steps),
        max_new_tokens=NEW_TOKENS,
        stop=subject.model.tokenizer.decode([stop_id]),
    )
    assert_same_text([up_to(stop_id, one) for one in plain] * trials, [generation.tokens for generation in got])


def parting(subject: Subject) -> None:
    """Greedy text of prompts with several plans each is Hugging Face's own of each alone; what they share is run once."""
    prompts, plans = PROMPTS[2:], [(), *([step("add", "all", layer=layer, seed=layer)] for layer in range(DEPTH))]
    rows = [(prompt, plan) for prompt in prompts for plan in plans]
    plain = [
        plain_greedy(subject.hf, encode(subject.model, prompt), plan, max_new_tokens=NEW_TOKENS, stop_ids=[EOS_ID])
        for prompt, plan in rows
    ]
    with mock.patch.object(
        LeanBackend, "forward_parting", autospec=True, side_effect=LeanBackend.forward_parting
    ) as parted:
        got = generate(
            subject.model,
            [prompt for prompt, _ in rows],
            steering=[as_plan(plan) for _, plan in rows],
            max_new_tokens=NEW_TOKENS,
            batch_size=8,
        )
    assert_same_text(plain, [generation.tokens for generation in got])
    longest = max(len(generation.prompt_tokens) for generation in got) + NEW_TOKENS
    lean = backend_used(subject.model, [resid_post(0)]) == "lean"
    can = (
        lean and abilities(subject.model, longest).cache and subject.name != "glm-dsa"
    )  # whose cache is not keys and values
    assert parted.called == can


def up_to(stop_id: int, plain: PlainText) -> PlainText:
    """The text up to a token that ends it."""
    end = plain.tokens.index(stop_id) + 1 if stop_id in plain.tokens else len(plain.tokens)
    return replace(plain, tokens=plain.tokens[:end], gaps=plain.gaps[:end])


def activations(subject: Subject) -> None:
    """Recorded residuals are those of Hugging Face's decoder layers for each prompt alone."""
    acts = record_activations(subject.model, PAIRS, batch_size=1, share_prefixes=True)
    for pair, sides in zip(PAIRS, acts.resid, strict=True):
        for condition, got in zip(("none", "text"), sides, strict=True):
            expected = last_residuals(subject.hf, encode(subject.model, pair.text(condition)))
            error = (got - expected).abs().amax(-1) / expected.abs().amax(-1)
            assert float(error.max()) < 1e-4


CHECKS: dict[str, Callable[[Subject], None]] = {
    "text": text,
    "steered text": partial(text, steps=(STEP,)),
    "steered trials": partial(text, steps=(STEP,), trials=2),
    "steered at several layers": parting,
    "activations": activations,
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ZOO)
def test_an_architecture_gives_what_hugging_face_gives_for_one_prompt_alone(
    name: str, check: str, subjects: dict[str, Subject]
) -> None:
    subject = subjects[name]
    before = hooks_on(subject.model)  # TransformerLens keeps some of its own on some models
    CHECKS[check](subject)
    assert hooks_on(subject.model) == before


ATTENTION = {"pasta": sl.pasta(0.01), "spotlight": sl.spotlight(0.6), "directer": sl.directer(2.0, beta=0.1)}


@pytest.mark.parametrize("method", ATTENTION)
@pytest.mark.parametrize("name", ZOO)
def test_attention_is_steered_alike_in_a_batch_with_a_cache_and_alone_without_one_or_refused(
    name: str, method: str, subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = subjects[name].model
    # The last letters, which a window still holds.
    plan = [ATTENTION[method].on((max(0, len(prompt) - 4), len(prompt))) for prompt in PROMPTS]
    able = attention_abilities(model)
    before = hooks_on(model)
    if reason := able.scales if method == "directer" else able.edits:
        with pytest.raises(ModelError, match=re.escape(reason)):
            generate(model, PROMPTS, steering=plan, max_new_tokens=1)
        return
    together = generate(model, PROMPTS, steering=plan, max_new_tokens=NEW_TOKENS)
    monkeypatch.setattr("steerlens.steering.sampling.abilities", lambda *_: Abilities(cache=False, batch=False))
    alone = generate(model, PROMPTS, steering=plan, max_new_tokens=NEW_TOKENS)
    raw = generate(model, PROMPTS, max_new_tokens=NEW_TOKENS)
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert [one.tokens for one in alone] != [one.tokens for one in raw], "steering must show"
    assert hooks_on(model) == before


UNEDITED = {"gpt-neo", "gptj", "opt", "llama4-chunked", "falcon-h1"}
"""Their attention runs in Hugging Face's own code, or a state passes by it: an edit of the scores does nothing, or not all."""


def test_whose_attention_can_be_steered_is_found_out_on_the_model_itself(subjects: dict[str, Subject]) -> None:
    found = {name: attention_abilities(subjects[name].model) for name in ZOO}
    depends = {name for name, able in found.items() if "depends on it" in able.edits}
    assert depends == UNEDITED
    assert {name for name, able in found.items() if able.scales and not able.edits} == {"bloom", "mpt", "glm-dsa"}
    assert softcap(subjects["gemma2"].model, 0) == 3.0
    assert softcap(subjects["llama"].model, 0) is None


NO_DECODER = "a model must be a decoder, which goes on from a prompt, got {}; load a causal language model"
NO_BRIDGE = r"a model must be of an architecture that TransformerLens [\d.]+ bridges, got {}; load another model"
BROKEN_BRIDGE = r"cannot be read: {} is bridged by TransformerLens, and does not run: .*rotary_emb"
SENTENCES = {
    **dict.fromkeys(("t5", "bart", "bert", "roberta"), NO_DECODER),
    **dict.fromkeys(("persimmon", "biogpt", "helium"), NO_BRIDGE),
    "granite-hybrid": BROKEN_BRIDGE,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_text_goes_on_from_is_refused_by_name_when_loading(name: str, subjects: dict[str, Subject]) -> None:
    architecture = json.loads((subjects[name].folder / "config.json").read_text())["architectures"][0]
    with pytest.raises(ModelError, match=SENTENCES[name].format(architecture)):
        load_model(subjects[name].folder, progress=False)
