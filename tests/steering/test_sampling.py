"""Sampling: the same text every way, exact limits and reasons, and a model that is left as it was."""

import copy
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from steerlens.errors import ModelError, SteerlensError
from steerlens.models.facts import stop_ids
from steerlens.models.load import load_model
from steerlens.models.prompts import PromptFormat, encode
from steerlens.models.rows import Rows
from steerlens.models.stops import before_stop, decode
from steerlens.steering import batches
from steerlens.steering.batches import choose
from steerlens.steering.edits import steer
from steerlens.steering.generations import Generation, Token
from steerlens.steering.interventions import Intervention
from steerlens.steering.plan import Plan
from steerlens.steering.residual import ResidualEdit
from steerlens.steering.sampling import generate, stream, stream_tokens
from steerlens.steering.settings import SamplingConfig, sampling_with
from steerlens.vectors.vector import SteeringVector
from tests.conftest import Passes, Subject, hooks_on
from tests.near_ties import assert_same_text
from tests.reference.plain_loop import PlainText, Rule, Step, plain_greedy
from tests.steps import OPERATORS, RULES, as_plan, step, unit
from tests.tiny_models import byte_tokenizer
from tests.unchecked import unchecked
from tests.zoo import save_animal

PROMPTS = [
    "a",
    "Describe rain.",
    "Why is the sky blue?",
    "xyz",
    "One two three four five six",
    "Name a river.",
    "What is up, my friend?",
    "Hm",
    "List three birds",
    "Tell me about tea and coffee.",
    "0123456789",
    "Who?",
    "Say it in one word",
    "stone",
    "Where do cats sleep at night?",
    "A b c",
    "Go.",
    "Write a line about the sea",
]
CHECKED = slice(0, None, 5)
"""Rows that the slow loop speaks for where every prompt would take too long; the others are their companions."""
EVERY_THIRD = slice(0, None, 3)
NEW_TOKENS = 6
SEEDS = list(range(100, 100 + len(PROMPTS)))


def oracle(
    subject: Subject, prompts: Sequence[str], steps: Sequence[Sequence[Step]], *, max_new_tokens: int = NEW_TOKENS
) -> list[PlainText]:
    return [
        plain_greedy(
            subject.hf,
            encode(subject.model, prompt),
            row_steps,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids(subject.model),
        )
        for prompt, row_steps in zip(prompts, steps, strict=True)
    ]


def token_rows(subject: Subject, prompts: Sequence[str], plans: Any = None, **options: Any) -> list[tuple[int, ...]]:
    options = {"max_new_tokens": NEW_TOKENS, "batch_size": 16, **options}
    return [row.tokens for row in generate(subject.model, prompts, steering=plans, **options)]


def shuffled_rows(
    subject: Subject, prompts: Sequence[str], plans: Sequence[Plan], **options: Any
) -> list[tuple[int, ...]]:
    """Token rows in the prompts' order, sampled in another order and other groups."""
    order = random.Random(1).sample(range(len(prompts)), k=len(prompts))
    seeds = options.pop("seed", [0] * len(prompts))
    rows = token_rows(
        subject,
        [prompts[i] for i in order],
        [plans[i] for i in order],
        seed=[seeds[i] for i in order],
        **{"batch_size": 9, **options},
    )
    return [tokens for _, tokens in sorted(zip(order, rows, strict=True))]


def assert_same_every_way(
    subject: Subject,
    steps: Sequence[Sequence[Step]],
    *,
    checked: slice = slice(None),
    max_new_tokens: int = NEW_TOKENS,
) -> list[PlainText]:
    """Every prompt, each with its steps, alone, in batches of 16 and shuffled, against the plain loop."""
    plans = [as_plan(row_steps) for row_steps in steps]
    options = {"max_new_tokens": max_new_tokens}
    expected = oracle(subject, PROMPTS[checked], steps[checked], **options)
    alone = token_rows(subject, PROMPTS[checked], plans[checked], batch_size=1, **options)
    assert_same_text(expected, alone, what="batch 1")
    assert_same_text(expected, token_rows(subject, PROMPTS, plans, **options)[checked], what="batch 16")
    assert_same_text(expected, shuffled_rows(subject, PROMPTS, plans, **options)[checked], what="shuffled")
    return expected


def n_different(expected: Sequence[PlainText], rows: Sequence[Sequence[int]]) -> int:
    return sum(tuple(plain.tokens) != tuple(tokens) for plain, tokens in zip(expected, rows, strict=True))


@pytest.fixture(scope="module")
def unsteered(subjects: dict[str, Subject]) -> dict[str, list[tuple[int, ...]]]:
    return {name: token_rows(subject, PROMPTS) for name, subject in subjects.items()}


# --- the same text every way ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_greedy_text_equals_the_plain_loop_for_every_operator_and_position_rule(
    tiny: Subject, operator: str, rule: Rule, unsteered: dict[str, list[tuple[int, ...]]]
) -> None:
    strength = 64.0 if rule == "last" else 16.0  # one token of many must be pushed harder to be heard
    steps = [step(operator, rule, seed=3, strength=strength)]
    expected = assert_same_every_way(tiny, [steps] * len(PROMPTS), checked=CHECKED)
    assert n_different(expected, unsteered[tiny.name][CHECKED]) >= 1, "the steering is too weak to show a fault"


def test_unsteered_greedy_text_equals_the_plain_loop_and_rows_stop_at_different_times(tiny: Subject) -> None:
    expected = assert_same_every_way(tiny, [[]] * len(PROMPTS), checked=EVERY_THIRD, max_new_tokens=24)
    lengths = {len(plain.tokens) for plain in expected}
    assert len(lengths) >= 2, f"too few rows stop early to show a fault: {sorted(lengths)}"


def test_one_batch_holds_rows_of_different_layers_operators_and_position_rules(tiny: Subject) -> None:
    plans: list[list[Step]] = []
    for row in range(len(PROMPTS)):
        first = step(OPERATORS[row % 3], RULES[row % 5], layer=row % 4, seed=row)
        second = step(OPERATORS[(row + 1) % 3], RULES[(row + 3) % 5], layer=(row * 3 + 1) % 4, seed=row + 50)
        plans.append([[first], [first, second], []][row % 3])
    assert_same_every_way(tiny, plans, checked=EVERY_THIRD)


def test_interventions_at_one_layer_act_in_their_order(tiny: Subject) -> None:
    one = step("set_projection", "all", seed=1)
    mixed = one.direction + unit(2)
    other = Step(layer=1, operator="ablate", direction=mixed / mixed.norm(), coeff=1.0)
    forward = assert_same_every_way(tiny, [[one, other]] * len(PROMPTS), checked=CHECKED)
    backward = assert_same_every_way(tiny, [[other, one]] * len(PROMPTS), checked=CHECKED)
    assert n_different(forward, [plain.tokens for plain in backward]) >= 1


def test_interventions_at_several_layers_act_together(tiny: Subject) -> None:
    everywhere = [step(OPERATORS[layer % 3], "all", layer=layer, seed=layer, strength=8.0) for layer in (3, 0, 2, 1)]
    assert_same_every_way(tiny, [everywhere] * len(PROMPTS), checked=CHECKED)


def test_the_placebo_writes_along_another_direction_as_the_plain_loop_does(tiny: Subject) -> None:
    steps = [Step(layer=1, operator="set_projection", direction=unit(3), coeff=1.0, target=16.0, write=unit(9))]
    assert_same_every_way(tiny, [steps] * len(PROMPTS), checked=CHECKED)


def test_a_plain_prompt_equals_the_plain_loop_where_the_model_has_a_template(llama: Subject) -> None:
    style = PromptFormat(style="plain", plain_template="Q: {prompt}\nA:")
    rows = generate(llama.model, PROMPTS[:6], prompt_format=style, max_new_tokens=NEW_TOKENS)
    expected = [
        plain_greedy(
            llama.hf, encode(llama.model, prompt, style), max_new_tokens=NEW_TOKENS, stop_ids=stop_ids(llama.model)
        )
        for prompt in PROMPTS[:6]
    ]
    assert_same_text(expected, [row.tokens for row in rows])
    assert [list(row.prompt_tokens) for row in rows] == [encode(llama.model, p, style) for p in PROMPTS[:6]]


@pytest.mark.smollm2
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_real_model_says_what_the_plain_loop_says(smollm2: Subject, operator: str) -> None:
    prompts = ["Describe rain.", "Name three rivers of Europe and their lengths.", "Why is the sky blue? Be brief."]
    steps = [step(operator, "all", layer=12, seed=5, strength=20.0, width=int(smollm2.model.cfg.d_model))]
    expected = oracle(smollm2, prompts, [steps] * 3, max_new_tokens=12)
    rows = token_rows(smollm2, prompts, as_plan(steps), max_new_tokens=12)
    assert_same_text(expected, rows)
    alone = token_rows(smollm2, prompts, as_plan(steps), max_new_tokens=12, batch_size=1)
    assert_same_text(expected, alone)


# --- steering that does nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_coefficient_of_zero_is_no_steering_bit_for_bit(tiny: Subject, operator: Any, passes: Passes) -> None:
    zero = Plan((Intervention(1, unit(0), operator, coeff=0.0, target=5.0),))
    plain = token_rows(tiny, PROMPTS[:5])
    without = [logits for _, logits in passes]
    passes.clear()
    assert token_rows(tiny, PROMPTS[:5], zero) == plain
    assert len(passes) == len(without)
    assert all(torch.equal(a, b) for (_, a), b in zip(passes, without, strict=True))


def test_an_unsteered_row_is_untouched_bit_for_bit_beside_steered_companions(tiny: Subject, passes: Passes) -> None:
    steered = as_plan([step("add", "all", seed=1), step("ablate", "all", layer=3, seed=2)])
    zero = Plan((Intervention(1, unit(0), "add", coeff=0.0),))
    plans = [steered, Plan(), steered, zero, steered]
    token_rows(tiny, PROMPTS[:5], max_new_tokens=1)
    token_rows(tiny, PROMPTS[:5], plans, max_new_tokens=1)
    without, with_ = (logits for _, logits in passes)
    order = sorted(range(5), key=lambda i: -len(encode(tiny.model, PROMPTS[i])))  # rows are sorted by length
    same = {i: torch.equal(without[place], with_[place]) for place, i in enumerate(order)}
    assert same == {0: False, 1: True, 2: False, 3: True, 4: False}


# --- what reaches the residual -------------------------------------------------------------------------------------


def test_rows_that_share_a_prefill_say_what_the_plain_loop_says(tiny: Subject) -> None:
    """Several strengths at the last and the generated tokens, and two that steer the prompt, for prompts of several lengths."""
    kinds: list[list[Step]] = [
        [],
        [step("add", "last", layer=1, strength=64.0, seed=3)],
        [step("add", "last", layer=2, strength=96.0, seed=3)],
        [step("set_projection", "generated", layer=1, seed=3)],
        [step("add", "all", layer=0, seed=4)],
        [step("add", "all", layer=0, seed=4), step("add", "last", layer=2, strength=64.0, seed=3)],
    ]
    prompts = [prompt for prompt in PROMPTS[:4] for _ in kinds]
    steps = [row_steps for _ in PROMPTS[:4] for row_steps in kinds]
    expected = oracle(tiny, prompts, steps, max_new_tokens=NEW_TOKENS)
    found = token_rows(tiny, prompts, [as_plan(row_steps) for row_steps in steps], batch_size=len(prompts))
    assert_same_text(expected, found, what="shared prefill")
    assert len({tuple(plain.tokens) for plain in expected}) > len(prompts) // 2


def test_a_shared_prompt_is_run_once_and_steered_prompts_are_not_shared(llama: Subject, passes: Passes) -> None:
    def widths() -> list[tuple[int, ...]]:
        shapes = [tuple(rows.tokens.shape) for rows, _ in passes]
        passes.clear()
        return shapes

    lasts = [as_plan([step("add", "last", strength=float(size))]) for size in range(1, 6)]
    alls = [as_plan([step("add", "all", strength=float(size))]) for size in range(1, 6)]
    prompt = "Tell me about it."
    token_rows(llama, [prompt] * 5, lasts, max_new_tokens=1)
    n_tokens = passes[0][0].tokens.shape[1] + 1
    assert widths() == [(1, n_tokens - 1), (5, 1)]
    token_rows(llama, [prompt] * 5, alls, max_new_tokens=1)
    assert widths() == [(5, n_tokens)]
    token_rows(llama, [prompt] * 6, [alls[0]] * 3 + [alls[1]] * 3, max_new_tokens=1)
    assert widths() == [(2, n_tokens - 1), (6, 1)]


def test_set_projection_reaches_its_target_at_every_sampled_token(tiny: Subject) -> None:
    plan = as_plan([step("set_projection", "all", layer=1, strength=7.0, seed=4)])
    projections: list[torch.Tensor] = []

    def read(resid: torch.Tensor, hook: Any) -> None:
        projections.append((resid @ unit(4))[0])

    with tiny.model.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", read)]):
        [row] = generate(tiny.model, ["Describe rain."], steering=plan, max_new_tokens=5)
    seen = torch.cat(projections)
    assert len(seen) == len(row.prompt_tokens) + len(row.tokens) - 1
    assert (seen - 7.0).abs().max() < 1e-3


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_number_of_steered_places_is_exact(tiny: Subject, rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [step("add", rule, layer=1, seed=3), step("ablate", "generated", layer=2, seed=4)]
    made = 0
    real = ResidualEdit.__call__

    def counting(self: ResidualEdit, resid: torch.Tensor, rows: Rows) -> torch.Tensor:
        nonlocal made
        for low, high in zip(self.low, self.high, strict=True):
            made += int(((rows.positions >= low[:, None]) & (rows.positions < high[:, None])).sum())
        return real(self, resid, rows)

    monkeypatch.setattr(ResidualEdit, "__call__", counting)
    rows = generate(tiny.model, PROMPTS[:4], steering=as_plan(steps), max_new_tokens=NEW_TOKENS, batch_size=4)
    assert [row.n_steered for row in rows] == [plain.n_steered for plain in oracle(tiny, PROMPTS[:4], [steps] * 4)]
    assert sum(row.n_steered for row in rows) == made > 0


def test_steps_that_change_nothing_are_not_counted(tiny: Subject) -> None:
    zero = Plan((Intervention(1, unit(0), "add", coeff=0.0),))
    [row] = generate(tiny.model, ["a"], steering=zero, max_new_tokens=2)
    assert row.n_steered == 0


# --- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.5, "top_k": 20}], ids=str
)
def test_a_sampled_row_has_the_same_text_whatever_its_batch_and_order(tiny: Subject, options: dict[str, Any]) -> None:
    prompts, seeds = PROMPTS[:9], SEEDS[:9]
    plans = [as_plan([step(OPERATORS[row % 3], "all", seed=row)]) for row in range(9)]
    whole = token_rows(tiny, prompts, plans, seed=seeds, **options)
    assert token_rows(tiny, prompts, plans, seed=seeds, batch_size=1, **options) == whole
    assert shuffled_rows(tiny, prompts, plans, seed=seeds, batch_size=4, **options) == whole
    assert token_rows(tiny, prompts, plans, **options) != whole
    assert token_rows(tiny, prompts, plans) != whole


def test_one_seed_gives_one_text_and_other_seeds_give_others(llama: Subject) -> None:
    rows = token_rows(llama, ["Describe rain."] * 8, temperature=1.0, seed=[1, 2, 3, 4, 1, 2, 3, 4])
    assert rows[:4] == rows[4:]
    assert len(set(rows)) == 4


def test_sampling_leaves_the_global_generator_alone(llama: Subject) -> None:
    state = torch.random.get_rng_state()
    token_rows(llama, PROMPTS[:2], temperature=1.0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_top_k_of_one_and_a_tiny_top_p_are_greedy(tiny: Subject) -> None:
    greedy = token_rows(tiny, PROMPTS[:6])
    assert token_rows(tiny, PROMPTS[:6], temperature=1.3, top_k=1, seed=SEEDS[:6]) == greedy
    assert token_rows(tiny, PROMPTS[:6], temperature=1.3, top_p=1e-9, seed=SEEDS[:6]) == greedy


LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.3, -4.0, 1.9, 0.0])
N_DRAWS = 8000


def drawn_rates(config: SamplingConfig) -> torch.Tensor:
    """How often each token is chosen over evenly spread uniform numbers: its probability, to one in `N_DRAWS`."""
    uniforms = (torch.arange(N_DRAWS, dtype=torch.float64) + 0.5) / N_DRAWS
    chosen = choose(LOGITS.expand(N_DRAWS, -1), config, uniforms)
    return torch.bincount(chosen, minlength=len(LOGITS)).double() / N_DRAWS


def kept_softmax(temperature: float, keep: Sequence[int]) -> torch.Tensor:
    weights = torch.zeros(len(LOGITS), dtype=torch.float64)
    weights[list(keep)] = (LOGITS.double() / temperature).exp()[list(keep)]
    return weights / weights.sum()


def fewest_that_reach(p: float, temperature: float) -> list[int]:
    probabilities = kept_softmax(temperature, range(len(LOGITS))).tolist()
    kept: list[int] = []
    for token in sorted(range(len(LOGITS)), key=lambda token: -probabilities[token]):
        if sum(probabilities[one] for one in kept) < p:
            kept.append(token)
    return kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_their_softmax_probabilities(temperature: float) -> None:
    rates = drawn_rates(SamplingConfig(temperature=temperature))
    assert (rates - kept_softmax(temperature, range(8))).abs().max() < 2 / N_DRAWS


@pytest.mark.parametrize(("top_k", "keep"), [(1, [1]), (3, [1, 6, 3]), (4, [1, 6, 3, 0]), (100, range(8))])
def test_top_k_draws_among_the_k_most_likely_tokens(top_k: int, keep: Sequence[int]) -> None:
    rates = drawn_rates(SamplingConfig(temperature=1.0, top_k=top_k))
    assert (rates - kept_softmax(1.0, keep)).abs().max() < 2 / N_DRAWS


@pytest.mark.parametrize("top_p", [0.01, 0.35, 0.5, 0.75, 0.95, 1.0])
def test_top_p_draws_among_the_fewest_tokens_that_reach_p(top_p: float) -> None:
    rates = drawn_rates(SamplingConfig(temperature=0.8, top_p=top_p))
    assert (rates - kept_softmax(0.8, fewest_that_reach(top_p, 0.8))).abs().max() < 2 / N_DRAWS


def test_the_ends_of_the_unit_interval_choose_the_most_and_the_least_likely_token_kept() -> None:
    ends = torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64)
    chosen = choose(LOGITS.expand(2, -1), SamplingConfig(temperature=1.0, top_k=3), ends)
    assert chosen.tolist() == [1, 3]


def test_greedy_takes_the_first_of_equals() -> None:
    assert choose(torch.tensor([[1.0, 3.0, 3.0]]), SamplingConfig(), None).tolist() == [1]


# --- when a row stops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_max_new_tokens_is_exact(tiny: Subject, limit: int) -> None:
    for row in generate(tiny.model, PROMPTS, max_new_tokens=limit):
        assert len(row.tokens) <= limit
        assert (row.finish_reason == "length") == (len(row.tokens) == limit and row.tokens[-1] != 1)


def test_a_stop_text_ends_the_row_before_it_and_only_where_it_comes(tiny: Subject) -> None:
    free = generate(tiny.model, PROMPTS, max_new_tokens=20)
    stop = next(row.text[3:5] for row in free if row.finish_reason == "length")
    cut = generate(tiny.model, PROMPTS, max_new_tokens=20, stop=["never said", stop])
    reasons = set()
    for before, after in zip(free, cut, strict=True):
        reasons.add(after.finish_reason)
        assert after.text == before.text.split(stop)[0]
        assert (after.finish_reason == "stop") == (stop in before.text)
        assert after.tokens == before.tokens[: len(after.tokens)]
        if after.finish_reason == "stop":
            assert stop in tiny.model.tokenizer.decode(after.tokens)
            assert stop not in tiny.model.tokenizer.decode(after.tokens[:-1])
    assert "stop" in reasons
    assert len(reasons) > 1


def test_the_earliest_of_several_stop_texts_ends_the_text(llama: Subject) -> None:
    [free] = generate(llama.model, ["Describe rain."], max_new_tokens=20)
    late_but_longer, short = free.text[4:8], free.text[7]
    assert short not in free.text[:7]
    [row] = generate(llama.model, ["Describe rain."], max_new_tokens=20, stop=[short, late_but_longer])
    assert row.text == free.text[:4]
    [same] = generate(llama.model, ["Describe rain."], max_new_tokens=20, stop=short)
    assert same.text == free.text[:7]


@pytest.mark.parametrize("and_before", [False, True])
def test_a_stop_text_may_be_or_hold_a_special_token(
    llama: Subject, monkeypatch: pytest.MonkeyPatch, and_before: bool
) -> None:
    [free] = generate(llama.model, ["Describe rain."], max_new_tokens=20)
    character = free.text[7]
    assert character not in free.text[:7]
    tokenizer = copy.deepcopy(llama.model.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [character]})
    monkeypatch.setattr(llama.model, "tokenizer", tokenizer)
    stop = free.text[6:8] if and_before else character
    [row] = generate(llama.model, ["Describe rain."], max_new_tokens=20, stop=stop)
    assert (row.tokens, row.finish_reason) == (free.tokens[:8], "stop")
    assert row.text == free.text[: 6 if and_before else 7]


def test_the_text_before_a_stop_leaves_out_special_tokens() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer("a<turn>bé<turn>cd", add_special_tokens=False)["input_ids"]
    expected = {"é": "ab", "<turn>c": "abé", "é<turn>": "ab", "d": "abéc", "b": "a", "<turn>": "a", "a": "", "z": None}
    assert {stop: before_stop(tokenizer, tokens, [stop]) for stop in expected} == expected


def test_stop_ids_end_a_row_and_its_text_leaves_them_out(tiny: Subject) -> None:
    free = generate(tiny.model, PROMPTS, max_new_tokens=20)
    stop = next(row.tokens[4] for row in free if row.finish_reason == "length")
    cut = generate(tiny.model, PROMPTS, max_new_tokens=20, stop_ids=[stop])
    for before, after in zip(free, cut, strict=True):
        if stop not in before.tokens:
            assert after == before
            continue
        length = before.tokens.index(stop) + 1
        assert (after.tokens, after.finish_reason) == (before.tokens[:length], "stop")
        assert after.text == decode(tiny.model.tokenizer, before.tokens[: length - 1])


def test_a_stop_id_outside_the_vocabulary_is_refused(tiny: Subject) -> None:
    with pytest.raises(SteerlensError, match=r"a stop id must be in \[0, 260\), the model's vocabulary, got 260"):
        generate(tiny.model, ["a"], stop_ids=[3, 260])


@pytest.mark.bridge
def test_every_stop_id_of_the_model_ends_a_row_and_its_text_leaves_it_out(
    tiny: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = generate(tiny.model, PROMPTS, max_new_tokens=20)
    extra = next(row.tokens[5] for row in free if row.finish_reason == "length")
    monkeypatch.setattr(tiny.model.original_model.generation_config, "eos_token_id", [1, extra])
    assert stop_ids(tiny.model) == tuple(sorted({1, extra}))
    ended_by = set()
    for before, after in zip(free, generate(tiny.model, PROMPTS, max_new_tokens=20), strict=True):
        stops = [i for i, token in enumerate(before.tokens) if token in (1, extra)]
        length = stops[0] + 1 if stops else 20
        assert after.tokens == before.tokens[:length]
        assert after.finish_reason == ("eos" if stops else "length")
        if stops:
            ended_by.add(after.tokens[-1])
            assert after.text == tiny.model.tokenizer.decode(before.tokens[: length - 1])
    assert ended_by == {1, extra}


def test_text_holds_no_special_token(tiny: Subject) -> None:
    rows = generate(tiny.model, PROMPTS, max_new_tokens=30)
    assert any(row.finish_reason == "eos" for row in rows)
    assert not any(special in row.text for row in rows for special in tiny.model.tokenizer.all_special_tokens)


# --- streaming, and the model afterwards ---------------------------------------------------------------------------


def open_stream(subject: Subject, **options: Any) -> Iterator[Generation]:
    plans = [as_plan([step("add", "all", layer=row % 4, seed=row)]) for row in range(len(PROMPTS))]
    config = SamplingConfig(max_new_tokens=20)
    return stream(subject.model, PROMPTS, steering=plans, sampling=config, batch_size=6, **options)


def test_stream_yields_every_row_once_and_the_model_is_free_in_between(tiny: Subject) -> None:
    tokens = torch.tensor([encode(tiny.model, "Hello")])
    untouched = tiny.model(tokens)
    seen = []
    for generation in open_stream(tiny):
        seen.append(generation.index)
        assert hooks_on(tiny.model) == []
        assert not torch.is_inference_mode_enabled()
        assert torch.equal(tiny.model(tokens), untouched)
    assert sorted(seen) == list(range(len(PROMPTS)))
    assert seen != sorted(seen), "rows come as they finish"


def test_stream_and_generate_give_the_same_rows_in_the_prompts_order(tiny: Subject) -> None:
    config = SamplingConfig(max_new_tokens=20)
    streamed = {generation.index: generation for generation in stream(tiny.model, PROMPTS, sampling=config)}
    assert [streamed[i] for i in range(len(PROMPTS))] == generate(tiny.model, PROMPTS, max_new_tokens=20)


def test_closing_a_stream_early_leaves_nothing_behind(tiny: Subject) -> None:
    rows = open_stream(tiny)
    next(rows)
    rows.close()
    assert hooks_on(tiny.model) == []
    assert list(rows) == []


def test_tokens_are_streamed_as_they_come_and_the_model_is_free_in_between(tiny: Subject) -> None:
    plans = [as_plan([step("add", "all", layer=row % 4, seed=row)]) for row in range(len(PROMPTS))]
    said: dict[int, list[int]] = {row: [] for row in range(len(PROMPTS))}
    finished: list[Generation] = []
    for one in stream_tokens(tiny.model, PROMPTS, steering=plans, max_new_tokens=20, batch_size=6):
        assert hooks_on(tiny.model) == []
        if isinstance(one, Token):
            said[one.index].append(one.id)
        else:
            assert one.tokens == tuple(said[one.index]), "a row's tokens come before the row"
            finished.append(one)
    assert sorted(finished, key=lambda row: row.index) == generate(
        tiny.model, PROMPTS, steering=plans, max_new_tokens=20, batch_size=6
    )


def test_a_streamed_token_has_its_log_probability_under_the_model_as_it_ran(tiny: Subject, passes: Passes) -> None:
    plan = as_plan([step("add", "all", layer=1, seed=0)])
    rows = stream_tokens(tiny.model, PROMPTS[:1], steering=plan, max_new_tokens=5, temperature=0.5)
    tokens = [one for one in rows if isinstance(one, Token)]
    expected = [logits.log_softmax(-1)[0, one.id].item() for (_, logits), one in zip(passes, tokens, strict=True)]
    assert [one.log_prob for one in tokens] == expected


def test_closing_a_stream_of_tokens_early_leaves_nothing_behind(tiny: Subject) -> None:
    rows = stream_tokens(tiny.model, PROMPTS, steering=as_plan([step("add", "all", layer=1, seed=0)]), max_new_tokens=5)
    next(rows)
    rows.close()
    assert hooks_on(tiny.model) == []
    assert list(rows) == []


def save_all(rows: Iterator[Generation], saved: list[Generation]) -> None:
    for row in rows:
        saved.append(row)  # one by one, so that what came before a failure is there


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_the_middle_keeps_what_was_finished_and_leaves_no_hook(
    tiny: Subject, failure: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(open_stream(tiny))
    hooks_at_failure: list[str] = []
    finished: list[Generation] = []
    real = batches.choose

    def failing(*args: Any) -> torch.Tensor:
        if finished:
            hooks_at_failure.extend(hooks_on(tiny.model))
            raise failure
        return real(*args)

    monkeypatch.setattr(batches, "choose", failing)
    with pytest.raises(failure):
        save_all(open_stream(tiny), finished)
    assert finished == whole[: len(finished)]
    assert hooks_at_failure, "the failure must come while hooks are on"
    assert hooks_on(tiny.model) == []
    monkeypatch.undo()
    assert list(open_stream(tiny)) == whole


def test_the_callers_own_hooks_stay_and_see_the_passes(tiny: Subject) -> None:
    calls = 0

    def mine(resid: torch.Tensor, hook: Any) -> None:
        nonlocal calls
        calls += 1

    with tiny.model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", mine)]):
        token_rows(tiny, PROMPTS[:1], as_plan([step("add", "all", layer=1)]), max_new_tokens=2)
        assert len(hooks_on(tiny.model)) >= 1
    assert calls == 2


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (
            Plan((Intervention(4, unit(0)),)),
            SteerlensError,
            r"layer must be in \[0, 4\), got 4; layers count from zero",
        ),
        (Plan((Intervention(9, unit(0), coeff=0.0),)), SteerlensError, "got 9"),
        (Plan((Intervention(0, unit(0), coeff=1.0), Intervention(1, unit(0, 48)))), ModelError, "d_model 32, got 48"),
    ],
    ids=["layer", "layer of an idle step", "width"],
)
def test_a_plan_that_does_not_fit_is_refused_before_any_hook_is_set(
    tiny: Subject, plan: Plan, error: type[Exception], message: str, passes: Passes
) -> None:
    with pytest.raises(error, match=message):
        generate(tiny.model, PROMPTS[:2], steering=[as_plan([step("add", "all")]), plan], max_new_tokens=2)
    assert hooks_on(tiny.model) == []
    assert passes == []


def test_ids_that_are_no_tokens_are_never_said(tmp_path: Path) -> None:
    """A vocabulary padded beyond its tokenizer, with the largest logits there."""
    folder = save_animal("llama", tmp_path, vocab_size=300)
    model = load_model(folder, progress=False)
    with torch.no_grad():
        model.original_model.get_output_embeddings().weight[260:] = 9.0
    greedy, sampled = (
        generate(model, PROMPTS[:4], max_new_tokens=6, temperature=heat, seed=range(4)) for heat in (0.0, 3.0)
    )
    assert max(token for row in (*greedy, *sampled) for token in row.tokens) < 260


# --- requests ------------------------------------------------------------------------------------------------------


def test_a_prompt_that_does_not_fit_the_context_is_refused(tiny: Subject) -> None:
    with pytest.raises(SteerlensError, match=r"fit the context of 160 tokens, got \d+ \+ 8 for prompt 1 \('bbbb"):
        generate(tiny.model, ["a", "b" * 160], max_new_tokens=8)


def test_a_prompt_may_fill_the_context_to_the_last_token(gpt2: Subject) -> None:
    prompt = "b" * (160 - 1 - 4)
    expected = plain_greedy(gpt2.hf, encode(gpt2.model, prompt), max_new_tokens=4, stop_ids=[1])
    assert_same_text([expected], token_rows(gpt2, [prompt], max_new_tokens=4))
    with pytest.raises(SteerlensError, match=r"got 156 \+ 5"):
        generate(gpt2.model, [prompt], max_new_tokens=5)


def test_no_prompts_give_no_rows(llama: Subject) -> None:
    assert generate(llama.model, []) == []


@pytest.mark.parametrize(("name", "value"), [("steering", [Plan()] * 3), ("seed", [1, 2, 3])])
def test_a_list_of_another_length_than_the_prompts_is_refused(llama: Subject, name: str, value: Any) -> None:
    with pytest.raises(SteerlensError, match=f"{name} must be one for all prompts or one per prompt, got 3 for 2"):
        generate(llama.model, ["a", "b"], **{name: value})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\]"),
        ({"stop": ("",)}, r"stop must be texts that are not empty, got \('',\)"),
        ({"stop_ids": (-1,)}, r"stop_ids must be whole numbers from 0 on, got \(-1,\)"),
    ],
    ids=str,
)
def test_a_sampling_setting_out_of_range_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(SteerlensError, match=message):
        SamplingConfig(**setting)


def test_a_batch_size_below_one_is_refused(llama: Subject) -> None:
    with pytest.raises(SteerlensError, match="batch_size must be at least 1, got 0"):
        generate(llama.model, ["a"], batch_size=0)


def test_results_hold_what_was_fed_and_said(tiny: Subject) -> None:
    for index, row in enumerate(generate(tiny.model, PROMPTS[:4], max_new_tokens=5, seed=[7, 8, 9, 10])):
        assert row.index == index
        assert list(row.prompt_tokens) == encode(tiny.model, PROMPTS[index])
        assert row.text == tiny.model.tokenizer.decode(row.tokens, skip_special_tokens=True)
        assert row.seed == 7 + index


def test_the_progress_bar_counts_every_token_and_row(tiny: Subject, capsys: pytest.CaptureFixture[str]) -> None:
    rows = generate(tiny.model, PROMPTS, max_new_tokens=20, progress=True)
    last = capsys.readouterr().err.strip().split("\r")[-1]
    assert f"{sum(len(row.tokens) for row in rows)}/{sum(len(row.tokens) for row in rows)}" in last
    assert "18/18 rows" in last
    assert "tok/s" in last


def test_no_progress_bar_is_shown_unasked(llama: Subject, capsys: pytest.CaptureFixture[str]) -> None:
    generate(llama.model, ["a"], max_new_tokens=2)
    assert capsys.readouterr() == ("", "")


def test_a_series_of_prompts_and_an_array_of_them_are_as_good_as_a_list(tiny: Subject) -> None:
    listed = generate(tiny.model, PROMPTS[:3], max_new_tokens=3)
    assert generate(tiny.model, pd.Series(PROMPTS[:3], index=[5, 5, 7]), max_new_tokens=3) == listed
    assert generate(tiny.model, np.array(PROMPTS[:3]), max_new_tokens=3) == listed


def test_missing_prompts_are_refused_before_the_model_runs(tiny: Subject) -> None:
    with pytest.raises(SteerlensError, match=r"prompt 1 must be a text, got nan \(float\)"):
        generate(tiny.model, pd.Series(["a", None], dtype="str"))
    with pytest.raises(SteerlensError, match=r"prompt 1 must be a text, got None \(NoneType\)"):
        generate(tiny.model, pd.Series(["a", None], dtype=object))


def test_one_bare_text_is_not_taken_for_a_list_of_letters(llama: Subject) -> None:
    with pytest.raises(SteerlensError, match=r"prompts must be a list of texts, got 'Describe rain\.'; put one"):
        generate(llama.model, "Describe rain.")
    assert SamplingConfig(stop="END").stop == ("END",)


def test_seeds_out_of_range_are_refused(llama: Subject) -> None:
    with pytest.raises(SteerlensError, match=r"seed must be in \[0, 2\*\*63\), got -1"):
        generate(llama.model, ["a"], seed=-1)


def test_generations_show_each_prompt_with_its_text(llama: Subject) -> None:
    rows = generate(llama.model, ["a < b", "c", "d"], max_new_tokens=4)
    frame = rows.to_frame()
    assert frame["prompt"].tolist() == list(rows.prompts) == ["a < b", "c", "d"]
    assert frame["text"].tolist() == rows.texts == [row.text for row in rows]
    assert rows[1:].to_frame()["prompt"].tolist() == ["c", "d"]
    assert rows[-1] == rows[2]
    assert "a &lt; b" in rows._repr_html_()
    assert repr(rows).splitlines()[0] == "Generations(3 texts)"
    assert len(repr(generate(llama.model, ["a" * 90] * 9, max_new_tokens=2)).splitlines()) == 7


@pytest.mark.parametrize(
    "seed", [np.array([5, 6]), torch.tensor([5, 6]), pd.Series([5, 6]), (5.0, np.int64(6))], ids=repr
)
def test_seeds_and_settings_may_be_of_another_library(llama: Subject, seed: Any) -> None:
    rows = generate(
        llama.model, ["a", "b"], seed=seed, max_new_tokens=np.int64(3), temperature=np.float32(1.0), top_k=np.int64(9)
    )
    assert rows == generate(llama.model, ["a", "b"], seed=[5, 6], max_new_tokens=3, temperature=1.0, top_k=9)
    assert [type(row.seed) for row in rows] == [int, int]


def test_a_vector_in_the_place_of_a_plan_is_told_how_to_become_one(llama: Subject) -> None:
    vector = SteeringVector({1: unit(0)})
    message = r"steering must be a plan, got SteeringVector\(.*a vector becomes one by vector.at\(layer\)"
    for n, steering in ((1, vector), (1, [vector]), (2, [Plan(), vector])):
        with pytest.raises(SteerlensError, match=message):
            list(unchecked(stream)(llama.model, ["a"] * n, steering=steering))
        with pytest.raises(SteerlensError, match=message):
            next(unchecked(steer)(llama.model, steering))


def test_a_setting_of_a_call_takes_the_place_of_the_configurations_and_nothing_else_does(llama: Subject) -> None:
    config = SamplingConfig(max_new_tokens=5, temperature=1.0, top_k=7)
    merged = sampling_with(config, {"top_k": None, "stop": ["e", "x"], "stop_ids": range(2, 4)})
    assert merged == SamplingConfig(max_new_tokens=5, temperature=1.0, stop=("e", "x"), stop_ids=(2, 3))
    whole = generate(llama.model, PROMPTS[:2], sampling=SamplingConfig(max_new_tokens=4, temperature=1.0, top_k=7))
    assert generate(llama.model, PROMPTS[:2], sampling=config, max_new_tokens=4) == whole
    assert (
        sorted(stream(llama.model, PROMPTS[:2], sampling=config, max_new_tokens=4), key=lambda row: row.index) == whole
    )
    for call in (generate, stream):
        with pytest.raises(TypeError, match="unexpected keyword argument 'max_tokens'"):
            list(unchecked(call)(llama.model, PROMPTS[:1], max_tokens=3))
