"""The references of attention steering against what is known of them without them: Hugging Face's own text, published forms of
the same formulas, and the same passes with Hugging Face's cache."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from steerlens.models.load import BUNDLED
from tests.near_ties import assert_same_text
from tests.reference.plain_attention import (
    NOTHING,
    Change,
    Watched,
    attention_greedy,
    attention_pass,
    instaboost,
    load_plain,
    pasta,
    pasta_bias,
    scale_keys,
    spotlight,
)
from tests.reference.plain_directer import (
    cosine_distance,
    ladder,
    plain_directer,
    plain_gate,
    pre_and_post,
    sensitivities,
)
from tests.reference.plain_loop import PlainText, Step, plain_logits

PROMPTS = (
    "Describe rain. Answer in lower case.",
    "Write about snow. Answer in capitals please.",
    "Why is iron hard? Say it in one line.",
)
N_NEW = 10


@dataclass(frozen=True)
class Case:
    """A model with attention written out, the same as Hugging Face runs it, and a prompt with its span."""

    name: str
    folder: Path

    @cached_property
    def plain(self) -> Any:
        return load_plain(self.folder)

    @cached_property
    def eager(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            self.folder, attn_implementation="eager", dtype=torch.float32, local_files_only=True
        ).eval()

    @cached_property
    def prompts(self) -> list[list[int]]:
        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        return [list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]

    @property
    def prompt(self) -> list[int]:
        return self.prompts[0]

    @property
    def n(self) -> int:
        return len(self.prompt)

    @property
    def span(self) -> tuple[int, int]:
        """The last third of the prompt, but for its last token."""
        return 2 * self.n // 3, self.n - 1

    @property
    def two_spans(self) -> list[tuple[int, int]]:
        return [(1, 3), self.span]

    @property
    def stop_ids(self) -> list[int]:
        return [self.eager.config.eos_token_id]


@pytest.fixture(scope="module")
def cases(tiny_folders: dict[str, Path]) -> dict[str, Case]:
    folders = {**tiny_folders, "tiny": BUNDLED / "tiny"}
    return {name: Case(name, folder) for name, folder in folders.items()}


@pytest.fixture(params=["llama", "gpt2", "tiny"])
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


@pytest.fixture
def llama(cases: dict[str, Case]) -> Case:
    return cases["llama"]


def text_of(case: Case, change: Change = NOTHING, prompt: Sequence[int] | None = None) -> PlainText:
    return attention_greedy(
        case.plain, case.prompt if prompt is None else prompt, change, max_new_tokens=N_NEW, stop_ids=case.stop_ids
    )


def changes(case: Case, *, alpha: float, bias: float, spans: Sequence[tuple[int, int]]) -> dict[str, Change]:
    """Every additive edit and scaled keys, SpotLight left out: its strength is a target."""
    edits = {
        f"pasta {position} {mode}": pasta(alpha, spans, prompt_length=case.n, position=position, mode=mode)
        for position in ("exclude", "include", "generation")
        for mode in ("union", "reference")
    }
    return {**edits, "instaboost": instaboost(bias, spans), "scale_keys": scale_keys(alpha, spans)}


def spotlights(case: Case, target: float = 0.7) -> dict[str, Change]:
    return {
        granularity: spotlight(target, [case.span], granularity=granularity, prompt_length=case.n)
        for granularity in ("row", "head", "layer")
    }


# --- attention, edited by nothing ----------------------------------------------------------------------------------


def test_without_a_change_the_text_is_that_of_hugging_face_itself(case: Case) -> None:
    for prompt in case.prompts:
        said = case.eager.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=N_NEW,
            do_sample=False,
            pad_token_id=case.stop_ids[0],
        )
        assert_same_text([text_of(case, prompt=prompt)], [said[0, len(prompt) :].tolist()])


def test_logits_and_patterns_are_those_of_eager_attention(case: Case) -> None:
    got = attention_pass(case.plain, case.prompt)
    with torch.no_grad():
        eager = case.eager(torch.tensor([case.prompt]), output_attentions=True, use_cache=False)
    torch.testing.assert_close(got.logits, eager.logits[0])
    torch.testing.assert_close(got.patterns, torch.cat(eager.attentions))
    assert got.n_changed == 0


def test_a_strength_of_nothing_and_spans_without_a_token_change_nothing(case: Case) -> None:
    raw = text_of(case)
    idle = changes(case, alpha=1.0, bias=0.0, spans=case.two_spans)
    for spans in ([], [(4, 4)]):
        idle |= {f"{name} {spans}": edit for name, edit in changes(case, alpha=50.0, bias=5.0, spans=spans).items()}
        idle |= {
            f"spotlight {spans}": spotlight(0.5, spans),
            "layer": spotlight(0.5, spans, granularity="layer", prompt_length=9),
        }
    for name, change in idle.items():
        assert text_of(case, change) == raw, name


def test_every_change_is_strong_enough_to_show(case: Case) -> None:
    raw = [text_of(case, prompt=prompt).tokens for prompt in case.prompts]
    strong = changes(case, alpha=0.01, bias=6.0, spans=[case.span]) | {"scale_keys": scale_keys(100.0, [case.span])}
    for name, change in (strong | spotlights(case)).items():
        assert [text_of(case, change, prompt).tokens for prompt in case.prompts] != raw, name


# --- the edits against other forms of their formulas ---------------------------------------------------------------


def first_pattern(case: Case, change: Change = NOTHING) -> torch.Tensor:
    """The pattern of layer 0, before which no change has acted, with two rows of generated tokens, `[n_heads, q, k]`."""
    return attention_pass(case.plain, [*case.prompt, 5, 6], change).patterns[0]


def scaled_and_normed(pattern: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return pattern * factor / (pattern * factor).sum(-1, keepdim=True)


def test_pasta_is_the_papers_reweighting_of_the_pattern(case: Case) -> None:
    factor = torch.full((case.n + 2,), 0.2)
    factor[slice(*case.span)] = 1.0
    factor[case.n :] = 1.0
    got = first_pattern(case, pasta(0.2, [case.span], prompt_length=case.n))
    torch.testing.assert_close(got, scaled_and_normed(first_pattern(case), factor))


def test_instaboost_is_the_pattern_times_a_constant_on_the_span(case: Case) -> None:
    factor = torch.ones(case.n + 2)
    factor[slice(*case.span)] = 9.0
    got = first_pattern(case, instaboost(math.log(9.0), [case.span]))
    torch.testing.assert_close(got, scaled_and_normed(first_pattern(case), factor))


@pytest.mark.parametrize("granularity", ["row", "head", "layer"])
def test_spotlight_is_the_pattern_times_target_over_mass(case: Case, granularity: str) -> None:
    target = 0.35
    raw = first_pattern(case)
    expected = torch.empty_like(raw)
    for rows in (range(case.n), [case.n], [case.n + 1]):
        for head in range(raw.shape[0]):
            for row in rows:
                over = {
                    "row": raw[head, [row]],
                    "head": raw[head, list(rows)],
                    "layer": raw[:, list(rows)].flatten(0, 1),
                }[granularity]
                psi = float(over[:, slice(*case.span)].sum() / over.sum())
                factor = torch.ones(case.n + 2)
                if 0 < psi < target:
                    factor[slice(*case.span)] = target / psi
                expected[head, row] = scaled_and_normed(raw[head, row], factor)
    assert not torch.allclose(raw, expected, atol=0.01)
    got = first_pattern(case, spotlight(target, [case.span], granularity=granularity, prompt_length=case.n))
    torch.testing.assert_close(got, expected)


def test_spotlight_brings_the_mass_of_a_row_near_the_target_and_leaves_rows_that_are_above(case: Case) -> None:
    target = 0.35
    mass, raw = (
        first_pattern(case, change)[:, :, slice(*case.span)].sum(-1)
        for change in (spotlight(target, [case.span]), NOTHING)
    )
    below = (raw < target) & (raw > 0)
    assert below.any()
    assert (raw > target).any()
    assert bool((mass[below] >= target / (1 + target) - 1e-6).all())
    assert bool((mass[below] <= target + 1e-6).all())
    torch.testing.assert_close(mass[below], target / (1 - raw[below] + target))
    torch.testing.assert_close(mass[~below], raw[~below])


def test_include_is_exclude_with_the_reciprocal(case: Case) -> None:
    for spans in ([case.span], case.two_spans):
        include, exclude = (
            text_of(case, pasta(alpha, spans, prompt_length=case.n, position=position))
            for alpha, position in ((20.0, "include"), (1 / 20.0, "exclude"))
        )
        assert include.tokens == exclude.tokens


def test_the_published_sums_are_the_union_for_one_span_and_not_for_two() -> None:
    def bias(position: str, mode: str, *spans: tuple[int, int], exempt: Sequence[int] = ()) -> list[float]:
        found = pasta_bias(math.e, position, spans, 6, 8, mode=mode, exempt=exempt)
        return [round(x, 5) for x in found.tolist()]

    for position in ("exclude", "include", "generation"):
        assert bias(position, "union", (1, 3)) == bias(position, "reference", (1, 3))
    assert bias("exclude", "union", (1, 3), (4, 5)) == [1, 0, 0, 1, 0, 1, 0, 0]
    assert bias("exclude", "reference", (1, 3), (4, 5)) == [2, 1, 1, 2, 1, 2, 0, 0]
    assert bias("include", "union", (1, 3), (2, 5)) == [-1, 0, 0, 0, 0, -1, 0, 0]
    assert bias("include", "reference", (1, 3), (2, 5)) == [-1, 0, 1, 0, 0, -1, 0, 0]
    assert bias("generation", "union", (1, 3), (4, 5)) == [1] * 6 + [0] * 2
    assert bias("generation", "reference", (1, 3), (4, 5)) == [2] * 6 + [0] * 2
    assert bias("exclude", "union", (1, 3), exempt=[0, 5]) == [0, 0, 0, 1, 1, 0, 0, 0]


def test_pasta_steers_the_heads_it_is_given(llama: Case) -> None:
    raw = attention_pass(llama.plain, llama.prompt).patterns
    for heads, layer, steered in (({1: [0, 3]}, 1, [0, 3]), ([2], 2, [0, 1, 2, 3])):
        change = pasta(0.01, [llama.span], prompt_length=llama.n, heads=heads)
        got = attention_pass(llama.plain, llama.prompt, change)
        assert torch.equal(got.patterns[:layer], raw[:layer])
        moved = (got.patterns[layer] - raw[layer]).abs().amax((1, 2)) > 1e-3
        assert moved.nonzero().flatten().tolist() == steered
        assert got.n_changed == 1


def test_scaled_keys_are_scaled_columns_of_the_scores(case: Case) -> None:
    def columns(layer: int, scores: torch.Tensor) -> torch.Tensor:
        visible = scores > torch.finfo(scores.dtype).min / 2
        scaled = scores.clone()
        scaled[..., slice(*case.span)] *= 100.0
        return torch.where(visible, scaled, scores)

    for layers in (None, [1, 2]):
        keys = scale_keys(100.0, [case.span], layers)
        by_keys, by_scores = (
            attention_pass(case.plain, case.prompt, change)
            for change in (keys, Change(scores=columns, layers=keys.layers))
        )
        torch.testing.assert_close(by_keys.logits, by_scores.logits, rtol=1e-3, atol=1e-3)
        assert by_keys.n_changed == len(layers or by_keys.patterns)


# --- what sees what ------------------------------------------------------------------------------------------------


def test_the_last_prompt_token_moves_no_earlier_logits_where_rows_stand_alone(case: Case) -> None:
    other = [*case.prompt[:-1], case.prompt[-1] + 1]

    def moves(change: Change) -> bool:
        one, two = (attention_pass(case.plain, ids, change).logits[:-1] for ids in (case.prompt, other))
        return not torch.equal(one, two)

    edits = changes(case, alpha=7.0, bias=2.0, spans=[case.span]) | {"row": spotlights(case)["row"]}
    assert [name for name, change in edits.items() if moves(change)] == []
    # A pooled mass is of all the prompt's rows, so that earlier ones feel the last.
    assert moves(spotlights(case)["head"])
    assert moves(spotlights(case)["layer"])


def cached_greedy(case: Case, change: Change) -> list[int]:
    """The same with the plain model's cache: the prompt in one pass, then a token at a time."""
    cache, tokens = DynamicCache(), []
    new = list(case.prompt)
    while len(tokens) < N_NEW and (not tokens or tokens[-1] not in case.stop_ids):
        with torch.no_grad():
            logits = case.plain(
                torch.tensor([new]), past_key_values=cache, use_cache=True, plain=Watched(change)
            ).logits
        tokens.append(int(logits[0, -1].argmax()))
        new = tokens[-1:]
    return tokens


def test_the_whole_prefix_again_is_the_same_as_a_cache(case: Case) -> None:
    edits = changes(case, alpha=7.0, bias=3.0, spans=case.two_spans) | spotlights(case)
    expected = [text_of(case, change) for change in edits.values()]
    assert_same_text(expected, [cached_greedy(case, change) for change in edits.values()])


def test_a_change_of_the_newest_row_is_one_token_over_a_raw_cache_with_scaled_keys(case: Case) -> None:
    layers = [1, 3]
    cache = DynamicCache()
    with torch.no_grad():
        case.eager(torch.tensor([case.prompt[:-1]]), past_key_values=cache, use_cache=True)
        for layer in layers:
            cache.layers[layer].keys[:, :, slice(*case.span)] *= 100.0
        expected = case.eager(torch.tensor([case.prompt[-1:]]), past_key_values=cache, use_cache=True).logits[0, -1]
    got = attention_pass(case.plain, case.prompt, scale_keys(100.0, [case.span]).at(layers, newest=True))
    torch.testing.assert_close(got.logits[-1], expected, rtol=1e-3, atol=1e-3)
    raw = attention_pass(case.plain, case.prompt)
    assert torch.equal(got.logits[:-1], raw.logits[:-1])
    assert not torch.allclose(got.logits[-1], raw.logits[-1], atol=0.1)


# --- the gate ------------------------------------------------------------------------------------------------------


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities).log()


@pytest.mark.parametrize(
    ("raw", "rungs", "beta", "token", "outcome", "accepted", "n_extra"),
    [
        ((0.6, 0.25, 0.15), [(0, 1, 0)], 0.5, 0, "skipped", None, 0),
        ((0.5, 0.5, 0.0), [(0, 1, 0)], 1.0, 1, "accepted", 0, 1),  # as plausible as the threshold
        ((0.5, 0.3, 0.2), [(0, 1, 0)], 0.5, 1, "accepted", 0, 1),
        ((0.5, 0.3, 0.2), [(0, 0, 1), (0, 1, 0)], 0.5, 1, "accepted", 1, 2),
        ((0.5, 0.3, 0.2), [(0, 0, 1), (1, 0, 0), (0, 1, 0)], 0.5, 0, "accepted", 1, 2),
        ((0.5, 0.3, 0.2), [(0, 0, 1), (0, 0, 1)], 0.5, 0, "rejected", None, 2),
        ((0.9, 0.1, 0.0), [(0, 0, 1)], 0.0, 2, "accepted", 0, 1),
        ((0.5, 0.3, 0.2), [], 0.5, 0, "rejected", None, 0),
    ],
)
def test_the_gate_decides_as_its_rules_say(
    raw: Any, rungs: Any, beta: float, token: int, outcome: str, accepted: int | None, n_extra: int
) -> None:
    text = plain_gate(
        lambda ids, rung: log(*(raw if rung is None else rungs[rung])),
        [7],
        range(len(rungs)),
        beta=beta,
        max_new_tokens=1,
    )
    assert (text.tokens, text.outcomes, text.rungs, text.n_extra) == ([token], [outcome], [accepted], [n_extra])


@pytest.mark.parametrize(
    ("raw", "changed", "beta", "ratio"),
    [
        ((0.4, 0.38, 0.22), (0.1, 0.8, 0.1), 0.5, 0.4 / 0.38),  # the two largest of the raw pass
        ((0.5, 0.24, 0.23), (0.1, 0.8, 0.1), 0.5, 0.25 / 0.24),  # the second from its threshold
        ((0.5, 0.3, 0.2), (0.44, 0.48, 0.08), 0.3, 0.48 / 0.44),  # the two largest of the changed pass
        ((0.5, 0.4, 0.1), (0.1, 0.1, 0.8), 0.22, 0.11 / 0.1),  # the changed pass's token from its threshold
    ],
)
def test_the_gap_is_the_smallest_distance_from_another_decision(
    raw: Any, changed: Any, beta: float, ratio: float
) -> None:
    text = plain_gate(
        lambda ids, rung: log(*(raw if rung is None else changed)), [7], ["rung"], beta=beta, max_new_tokens=1
    )
    assert text.gaps == pytest.approx([math.log(ratio)], abs=1e-5)


def test_a_gate_around_a_push_says_what_its_extremes_say(llama: Case) -> None:
    direction = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)

    def logits_after(ids: Sequence[int], factor: Any) -> torch.Tensor:
        rule = ("start", len(ids) - 1, len(ids))
        steps = [] if factor is None else [Step(1, "add", direction, 20.0 * factor, rule=rule)]
        return plain_logits(llama.eager, ids, steps, llama.n)[0]

    def gated(beta: float) -> Any:
        return plain_gate(
            logits_after, llama.prompt, [1.0, 0.5], beta=beta, max_new_tokens=N_NEW, stop_ids=llama.stop_ids
        )

    raw, always = gated(1.01), gated(0.0)
    assert_same_text([text_of(llama)], [raw.tokens])
    assert set(raw.outcomes) == {"skipped"}
    for i, token in enumerate(always.tokens):
        assert token == int(logits_after([*llama.prompt, *always.tokens[:i]], 1.0).argmax())
    assert set(always.rungs) == {1.0}
    assert always.tokens != raw.tokens


# --- DIRECTER ------------------------------------------------------------------------------------------------------


def directer(case: Case, prompt: Sequence[int] | None = None, **options: Any) -> Any:
    options = {"spans": [case.span], "max_new_tokens": N_NEW, "stop_ids": case.stop_ids, **options}
    return plain_directer(case.plain, case.prompt if prompt is None else prompt, **options)


def test_directer_without_effect_is_the_models_own_text(case: Case) -> None:
    raw = text_of(case)
    for options in ({"beta": 1.01}, {"spans": []}, {"alpha": 1.0}, {"layers": [2], "fewest": 2}):
        assert directer(case, **options).tokens == raw.tokens, options


def test_directer_without_a_gate_says_what_all_layers_say(case: Case) -> None:
    text = directer(case, beta=0.0)
    change = scale_keys(100.0, [case.span])
    n_layers = len(text.ranking)
    for i, token in enumerate(text.tokens):
        ids = [*case.prompt, *text.tokens[:i]]
        logits = attention_pass(case.plain, ids, change.at(range(n_layers), newest=True)).logits[-1]
        assert token == int(logits.argmax())
    assert set(text.outcomes) == {"accepted"}
    assert text.n_active == [n_layers] * len(text.tokens)
    assert text.n_extra == [1] * len(text.tokens)


@pytest.mark.parametrize("ranking", ["paper", "reference_code"])
def test_what_directer_says_is_plausible_and_the_top_two_only_save_passes(case: Case, ranking: str) -> None:
    outcomes = set()
    for prompt in case.prompts:
        text = directer(case, prompt, ranking=ranking, beta=0.3)
        full = directer(case, prompt, ranking=ranking, beta=0.3, has_top_two_gate=False)
        assert_same_text([text], [full.tokens])
        outcomes |= set(text.outcomes)
        for i, (token, outcome) in enumerate(zip(text.tokens, text.outcomes, strict=True)):
            p = attention_pass(case.plain, [*prompt, *text.tokens[:i]]).logits[-1].softmax(-1)
            assert float(p[token]) >= 0.3 * float(p.max()) * (1 - 1e-5)
            assert (text.n_extra[i] == 0) == (outcome == "skipped")
            assert (text.n_active[i] > 0) == (outcome == "accepted")
    assert "accepted" in outcomes
    assert len(outcomes) > 1


def test_layer_sets_halve() -> None:
    assert [len(layers) for layers in ladder(range(32), 2)] == [32, 16, 8, 4, 2]
    assert [len(layers) for layers in ladder(range(28), 1)] == [28, 14, 7, 3, 1]
    assert ladder([3, 1, 0, 2], 1) == [(3, 1, 0, 2), (3, 1), (3,)]
    assert ladder([3], 2) == []


def test_the_scores_of_layers_are_those_of_one_probe_where_others_cannot_reach(case: Case) -> None:
    change = scale_keys(100.0, [case.span])
    n_layers = len(attention_pass(case.plain, case.prompt).patterns)
    layers = range(n_layers)
    pre, post = pre_and_post(case.plain, case.prompt)
    before = cosine_distance(pre, post)

    # Steering the last layer disturbs no input, and no output but its own.
    _, last_post = pre_and_post(case.plain, case.prompt, change.at([n_layers - 1], newest=True))
    own = cosine_distance(pre, last_post)[-1] - before[-1]
    by_paper = sensitivities(case.plain, case.prompt, change, layers)
    assert by_paper[n_layers - 1] == pytest.approx(float(own) / n_layers, abs=1e-6)

    # The first layer is disturbed by its own steering alone: its output, not its input.
    _, first_post = pre_and_post(case.plain, case.prompt, change.at([0], newest=True))
    own = cosine_distance(pre, first_post)[0] + before[0]
    by_code = sensitivities(case.plain, case.prompt, change, layers, ranking="reference_code")
    assert by_code[0] == pytest.approx((float(own) + (n_layers - 1) * 2 * float(before[0])) / n_layers, abs=1e-5)

    # What steering the first layer at the last token does to all layers, term by term.
    first_pre, _ = pre_and_post(case.plain, case.prompt, change.at([0], newest=True))
    terms = cosine_distance(pre, first_post) - before + cosine_distance(first_pre, post) - before
    assert by_paper[0] == pytest.approx(float(terms.sum()) / n_layers, abs=1e-6)
    _, with_earlier_rows = pre_and_post(case.plain, case.prompt, change.at([0]))
    assert not torch.allclose(first_post, with_earlier_rows, atol=1e-3)

    # Of one candidate, its own disturbance of itself and, by the paper, of every layer after it.
    alone = sensitivities(case.plain, case.prompt, change, [1])
    assert alone[1] == pytest.approx(by_paper[1])
    nothing = sensitivities(case.plain, case.prompt, scale_keys(100.0, []), layers)
    assert list(nothing.values()) == pytest.approx([0.0] * n_layers, abs=1e-6)
    nothing = sensitivities(case.plain, case.prompt, scale_keys(100.0, []), layers, ranking="reference_code")
    assert list(nothing.values()) == pytest.approx((2 * before).tolist(), abs=1e-5)


def test_layers_are_tried_by_falling_score_and_ties_by_their_place(case: Case) -> None:
    tried = set()
    for prompt in case.prompts:
        text = directer(case, prompt, beta=0.1, has_top_two_gate=False)
        assert text.scores == sensitivities(case.plain, prompt, scale_keys(100.0, [case.span]), range(len(text.scores)))
        falling = [text.scores[layer] for layer in text.ranking]
        assert falling == sorted(text.scores.values(), reverse=True)
        tried |= {n for n in text.n_active if n}
        for layers, n_extra in zip(text.rungs, text.n_extra, strict=True):
            assert layers is None or layers == tuple(text.ranking[: len(text.ranking) >> (n_extra - 1)])
    assert len(tried) > 1
    assert directer(case, spans=[]).ranking == sorted(text.ranking)
    assert sorted(directer(case, layers=[3, 1], max_new_tokens=1).ranking) == [1, 3]


def test_pre_and_post_are_what_the_attention_reads_and_writes(llama: Case) -> None:
    with torch.no_grad():
        block = llama.eager.model.layers[0]
        h = llama.eager.model.embed_tokens(torch.tensor([llama.prompt]))
        positions = llama.eager.model.rotary_emb(h, torch.arange(llama.n)[None])
        mask = torch.full((1, 1, llama.n, llama.n), -math.inf).triu(1)
        normed = block.input_layernorm(h)
        written = block.self_attn(normed, position_embeddings=positions, attention_mask=mask)[0]
    pre, post = pre_and_post(llama.plain, llama.prompt)
    torch.testing.assert_close(pre[0], normed[0, -1])
    torch.testing.assert_close(post[0], written[0, -1])
