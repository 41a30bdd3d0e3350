"""Attention steering against the plain loop, which recomputes everything for one prompt at a time, and against what must hold."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

import steerlens as sl
from steerlens.errors import DataError, ModelError, SteerlensError
from steerlens.models.attention import attention_abilities, attn_pattern, attn_scores
from steerlens.models.facts import stop_ids
from steerlens.models.load import BUNDLED
from steerlens.models.passes import Read, Runner, run_pass
from steerlens.models.probe import Abilities
from steerlens.models.prompts import encode
from steerlens.models.rows import pad
from steerlens.steering.edits import plan_edits, steer
from steerlens.steering.interventions import AttentionIntervention
from steerlens.steering.plan import Plan
from steerlens.steering.sampling import generate
from steerlens.steering.scores import bind, key_weights, log_mass, pooled, scaled, visible
from steerlens.study.responses import requests_for
from tests.conftest import LOADED, Subject, hooks_on
from tests.near_ties import assert_same_text
from tests.reference.plain_attention import (
    NOTHING,
    Change,
    attention_greedy,
    instaboost,
    load_plain,
    pasta,
    scale_keys,
    spotlight,
)
from tests.unchecked import unchecked

SPAN, OTHER = "Answer in lower case", "rain"
PROMPTS = (
    "Describe rain. Answer in lower case.",
    "Answer in lower case: why does rain fall on hills, and on rain?",
    "Is rain wet? Answer in lower case, or not. Answer in lower case!",
)
N_NEW = 10

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Case:
    """A model, and the same weights with attention written out."""

    name: str
    folder: Path
    model: Any

    @cached_property
    def plain(self) -> Any:
        return load_plain(self.folder)

    def ids(self, prompt: str) -> list[int]:
        return encode(self.model, prompt)

    def spans(self, plan: Plan, prompt: str) -> Spans:
        """The runs of tokens that the first step means."""
        step = replace(plan.attention[0], keys="span", sections="union", exempt=())
        held = key_weights(self.model, step, prompt, sl.PromptFormat(), what="it")
        starts = [at for at, one in enumerate(held) if one and not (at and held[at - 1])]
        return [
            (start, next(at for at in range(start, len(held) + 1) if at == len(held) or not held[at]))
            for start in starts
        ]

    def oracle(self, prompt: str, change: Change) -> Any:
        ids = self.ids(prompt)
        return attention_greedy(self.plain, ids, change, max_new_tokens=N_NEW, stop_ids=stop_ids(self.model))


@pytest.fixture(scope="module")
def cases(subjects: dict[str, Subject]) -> dict[str, Case]:
    found = {name: Case(name, subject.folder, subject.model) for name, subject in subjects.items()}
    tiny = sl.load_model("tiny", progress=False)
    LOADED.append(tiny)
    return {**found, "tiny": Case("tiny", BUNDLED / "tiny", tiny)}


@pytest.fixture(params=["llama", "gpt2", "tiny"])
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


@pytest.fixture
def llama(cases: dict[str, Case]) -> Case:
    return cases["llama"]


# --- the plain loop ----------------------------------------------------------------------------------------------------

HEADS = {0: [1, 3], 2: [0]}

Method = tuple[Plan, Callable[[Spans, int], Change]]
METHODS: dict[str, Method] = {
    "nothing": (Plan(), lambda spans, n: NOTHING),
    "exclude": (sl.pasta(0.01, on=SPAN), lambda spans, n: pasta(0.01, spans, prompt_length=n)),
    "include": (
        sl.pasta(20, scale="include", on=SPAN, heads=HEADS),
        lambda spans, n: pasta(20, spans, prompt_length=n, position="include", heads=HEADS),
    ),
    "generation": (
        sl.pasta(0.1, scale="generation", on=SPAN, heads=[1, 2]),
        lambda spans, n: pasta(0.1, spans, prompt_length=n, position="generation", heads=[1, 2]),
    ),
    "several": (sl.pasta(0.02, on=[SPAN, OTHER]), lambda spans, n: pasta(0.02, spans, prompt_length=n)),
    "first": (
        sl.pasta(0.01, on=SPAN, exempt="first"),
        lambda spans, n: pasta(0.01, spans, prompt_length=n, exempt={0}),
    ),
    "instaboost": (sl.instaboost(2.5, on=SPAN), lambda spans, n: instaboost(2.5, spans)),
    "row": (sl.spotlight(0.4, on=SPAN), lambda spans, n: spotlight(0.4, spans)),
    "head": (
        sl.spotlight(0.4, on=SPAN, granularity="head"),
        lambda spans, n: spotlight(0.4, spans, granularity="head", prompt_length=n),
    ),
    "layer": (
        sl.spotlight(0.4, on=SPAN, granularity="layer"),
        lambda spans, n: spotlight(0.4, spans, granularity="layer", prompt_length=n),
    ),
    "keys": (
        Plan((AttentionIntervention("scale", 3.0, [0, 2], spans=(SPAN,)),)),
        lambda spans, n: scale_keys(3.0, spans, [0, 2]),
    ),
}
"""Each as a plan and as the plain loop's change of scores or keys."""


@pytest.mark.parametrize("batch_size", [1, 16])
def test_every_method_gives_the_plain_loops_text_alone_and_in_one_batch(case: Case, batch_size: int) -> None:
    requests = [(name, prompt) for name in METHODS for prompt in PROMPTS]
    expected = []
    for name, prompt in requests:
        plan, change = METHODS[name]
        spans = case.spans(plan, prompt) if plan else []
        expected.append(case.oracle(prompt, change(spans, len(case.ids(prompt)))))
    prompts, plans = [prompt for _, prompt in requests], [METHODS[name][0] for name, _ in requests]
    found = generate(case.model, prompts, steering=plans, max_new_tokens=N_NEW, batch_size=batch_size)
    assert_same_text(expected, [one.tokens for one in found], what=case.name)
    texts = {
        name: [one.tokens for one, (whose, _) in zip(found, requests, strict=True) if whose == name] for name in METHODS
    }
    assert sum(texts[name] != texts["nothing"] for name in METHODS) >= len(METHODS) - 3, "steering must show"


@pytest.mark.parametrize("scale", ["exclude", "include", "generation"])
def test_several_spans_add_up_as_in_the_published_code_where_that_is_asked_for(llama: Case, scale: Any) -> None:
    prompt = PROMPTS[1]  # each text twice or once; the published code takes the first
    plan = sl.pasta(0.3, scale=scale, on=[SPAN, OTHER], spans="reference")
    first = [case_span(llama, prompt, text) for text in (SPAN, OTHER)]
    change = pasta(0.3, first, prompt_length=len(llama.ids(prompt)), position=scale, mode="reference")
    found = generate(llama.model, [prompt], steering=plan, max_new_tokens=N_NEW)
    assert_same_text([llama.oracle(prompt, change)], [found[0].tokens])


def case_span(case: Case, prompt: str, text: str) -> tuple[int, int]:
    """The tokens of a text where it first stands."""
    from steerlens.models.prompts import token_span

    start = prompt.index(text)
    return token_span(case.model, prompt, (start, start + len(text)))


def test_attention_and_residual_add_up_and_the_rest_of_the_batch_is_left_alone(llama: Case) -> None:
    push = sl.SteeringVector({2: torch.ones(32)}).at(2, operator="add", coeff=12.0)
    both = sl.pasta(0.01, on=SPAN) + push
    plans = [both, Plan(), push, sl.pasta(0.01, on=SPAN)]
    together = generate(llama.model, [PROMPTS[0]] * 4, steering=plans, max_new_tokens=N_NEW)
    alone = [generate(llama.model, [PROMPTS[0]], steering=plan, max_new_tokens=N_NEW)[0] for plan in plans]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert len({one.tokens for one in together}) == 4
    assert both.digest not in {push.digest, sl.pasta(0.01, on=SPAN).digest}


# --- what must hold ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        sl.pasta(1.0, on=SPAN),
        sl.instaboost(0.0, on=SPAN),
        sl.spotlight(0.0, on=SPAN),
        sl.directer(1.0, on=SPAN),
        sl.directer(beta=1.5, on=SPAN),
        sl.pasta(0.01, on=SPAN, heads=[]),
        sl.pasta(0.01, on=SPAN, heads={1: []}),
    ],
    ids=str,
)
def test_neutral_settings_are_no_steering(case: Case, plan: Plan) -> None:
    assert not plan.active
    assert plan.digest == ""
    raw = generate(case.model, PROMPTS, max_new_tokens=N_NEW)
    assert generate(case.model, PROMPTS, steering=plan, max_new_tokens=N_NEW).texts == raw.texts


def test_include_is_exclude_with_the_inverse_for_one_span(llama: Case) -> None:
    include, exclude = sl.pasta(20, scale="include", on=SPAN), sl.pasta(1 / 20, on=SPAN)
    assert include == exclude
    one, other = (
        generate(
            llama.model,
            [PROMPTS[0]],
            steering=sl.pasta(alpha, scale=scale, on=SPAN, spans="reference"),
            max_new_tokens=8,
        )
        for alpha, scale in ((20, "include"), (1 / 20, "exclude"))
    )
    assert one.texts == other.texts


def patterns(case: Case, plan: Plan, prompts: Sequence[str]) -> list[torch.Tensor]:
    """Of each prompt `[layer, head, query, key]`, run in one batch padded on the left."""
    ids = [case.ids(prompt) for prompt in prompts]
    bound = [bind(case.model, plan, prompt) for prompt in prompts]
    lengths = [len(one) for one in ids]
    sites = [attn_pattern(layer) for layer in range(case.model.cfg.n_layers)]
    edits = plan_edits(case.model, bound, lengths)
    reads = run_pass(case.model, pad(ids), edits=edits, reads=[Read(site, "all") for site in sites]).reads
    return [torch.stack([reads[site][row] for site in sites])[:, :, -n:, -n:] for row, n in enumerate(lengths)]


@pytest.mark.parametrize("target", [0.05, 0.3, 0.8])
def test_spotlight_brings_the_share_near_its_target_and_never_beyond(llama: Case, target: float) -> None:
    # At the first layer alone: further up, the scores themselves differ.
    plan = sl.spotlight(target, on=SPAN, heads=[0])
    for prompt, before, after in zip(
        PROMPTS, patterns(llama, Plan(), PROMPTS), patterns(llama, plan, PROMPTS), strict=True
    ):
        held = torch.tensor(bind(llama.model, plan, prompt).attention[0].weights) == 1
        was, now = (table[0][..., held].sum(-1) for table in (before, after))
        low = (was > 0) & (was < target)
        assert bool(low.any())
        assert bool((now[low] >= target / (1 + target) - 1e-5).all())
        assert bool((now[low] <= target + 1e-5).all())
        torch.testing.assert_close(now[low], target / (1 + target - was[low]), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(now[~low], was[~low])


def test_scaling_keys_is_scaling_columns_of_scores(llama: Case) -> None:
    rows, columns = pad([llama.ids(PROMPTS[0])]), slice(4, 9)
    site, keys = attn_scores(1), "blocks.1.attn.hook_rot_k"

    class Scale:
        digest = ""

        def __init__(self, site: str) -> None:
            self.site = site

        def __call__(self, activation: torch.Tensor, rows: Any) -> torch.Tensor:
            activation = activation.clone()
            activation[:, columns] *= 3.0  # row pos head d_head
            return activation

        def select(self, keep: torch.Tensor) -> "Scale":
            return self

    with Runner(llama.model, [site, keys]) as runner:
        plain = runner.run(rows, reads=[Read(site, "all")]).reads[site]
        expected = runner.run(rows, edits=[Scale(keys)], reads=[Read(site, "all")]).reads[site]
    factor = torch.ones(plain.shape[-1])
    factor[columns] = 3.0
    seen = visible(plain)
    torch.testing.assert_close(scaled(plain, factor.expand_as(plain))[seen], expected[seen])
    assert not torch.allclose(plain[seen], expected[seen])


CAUSAL = {
    **{name: plan for name, (plan, _) in METHODS.items() if name not in ("head", "layer")},
    "small": Plan((AttentionIntervention("scale", 1e-4, spans=(SPAN,)),)),
    "small, then mass": Plan((AttentionIntervention("scale", 0.4, spans=("on rain",)),))
    + sl.spotlight(0.4, on="on rain"),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_later_token_moves_no_earlier_logit_padded_or_not(case: Case, name: str) -> None:
    plan, prompt = CAUSAL[name], PROMPTS[1]
    ids = case.ids(prompt)
    bound = bind(case.model, plan, prompt)
    other = [*ids[:-1], ids[-1] - 1]
    for width in ([ids, other], [ids, other, [*ids, *ids[1:9]]]):
        lengths = [len(ids), len(ids), *(len(one) for one in width[2:])]
        plans = [bound, bound, *(Plan() for _ in width[2:])]
        logits = run_pass(case.model, pad(width), edits=plan_edits(case.model, plans, lengths), logits="all").logits
        one, two = (logits[row, -len(ids) : -1] for row in (0, 1))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_queries_before_a_window_are_left_alone(llama: Case) -> None:
    late = sl.instaboost(3.0, on=SPAN, positions="last")
    for before, after in zip(patterns(llama, Plan(), PROMPTS), patterns(llama, late, PROMPTS), strict=True):
        torch.testing.assert_close(before[:, :, :-1], after[:, :, :-1])
        assert not torch.allclose(before[:, :, -1], after[:, :, -1])


def test_the_same_plan_steers_single_passes_of_the_callers_own(llama: Case) -> None:
    prompt = PROMPTS[0]
    plan = bind(llama.model, sl.spotlight(0.5, on=SPAN), prompt)
    ids = llama.ids(prompt)
    with steer(llama.model, plan):
        logits = llama.model(torch.tensor([ids]))
    edits = plan_edits(llama.model, [plan], [len(ids)])
    torch.testing.assert_close(logits[0], run_pass(llama.model, pad([ids]), edits=edits, logits="all").logits[0])
    assert hooks_on(llama.model) == []
    with (
        pytest.raises(SteerlensError, match="needs the instruction's place among a row's"),
        steer(llama.model, sl.spotlight(0.5, on=SPAN)),
    ):
        llama.model(torch.tensor([ids]))
    assert hooks_on(llama.model) == []


# --- arithmetic --------------------------------------------------------------------------------------------------------


def test_masked_keys_stay_masked_whatever_is_done() -> None:
    masked = torch.finfo(torch.float32).min
    scores = torch.tensor([[[[0.5, masked, float("-inf"), -1.0]]]])
    chosen = torch.tensor([[[[True, True, True, False]]]])
    share = log_mass(scores, chosen)
    assert share.exp().item() == pytest.approx(math.exp(0.5) / (math.exp(0.5) + math.exp(-1)))
    assert log_mass(scores, torch.tensor([[[[False, True, True, False]]]])).item() == float("-inf")
    found = scaled(scores, torch.full_like(scores, 100.0))
    assert found[..., 0].item() == 50.0
    assert found[..., 1].item() == masked
    assert scaled(scores, torch.full_like(scores, 0.01))[..., 1].item() == masked
    assert found[..., 2].item() == float("-inf")


def test_a_softcap_is_taken_off_before_keys_are_scaled() -> None:
    raw = torch.tensor([[[[0.3, -2.0, 5.0]]]])
    cap = 4.0
    capped = cap * torch.tanh(raw / cap)
    factor = torch.tensor([[[[2.0, 3.0, 1.0]]]])
    torch.testing.assert_close(scaled(capped, factor, cap), cap * torch.tanh(raw * factor / cap))


def test_pooled_shares_are_means_over_prompt_queries_and_heads() -> None:
    share = torch.rand(2, 3, 4, 1, generator=torch.Generator().manual_seed(0))
    in_prompt = torch.tensor([[False, True, True, False], [True, True, True, True]])
    yes, no = torch.tensor([True, True]), torch.tensor([False, False])
    by_head = pooled(share.log(), in_prompt, yes, no).exp()
    torch.testing.assert_close(by_head[0, :, 1:3], share[0, :, 1:3].mean(1, keepdim=True).expand(3, 2, 1))
    torch.testing.assert_close(by_head[0, :, [0, 3]], share[0, :, [0, 3]])
    by_layer = pooled(share.log(), in_prompt, yes, yes).exp()
    torch.testing.assert_close(by_layer[1], share[1].mean().expand(3, 4, 1))
    torch.testing.assert_close(pooled(share.log(), in_prompt, no, no).exp(), share)


# --- where -------------------------------------------------------------------------------------------------------------


def test_a_span_is_all_its_occurrences_and_exemptions_are_left_out(llama: Case) -> None:
    prompt = PROMPTS[2]

    def held(**options: Any) -> list[str]:
        weights = bind(llama.model, sl.pasta(0.01, on=SPAN, **options), prompt).attention[0].weights
        return [
            "".join(llama.model.tokenizer.decode(one))
            for one, w in zip(llama.ids(prompt), weights or (), strict=True)
            if w
        ]

    inside = bind(llama.model, sl.instaboost(1.0, on=SPAN), prompt).attention[0].weights
    assert inside is not None
    text = "".join(llama.model.tokenizer.decode(one) for one, w in zip(llama.ids(prompt), inside, strict=True) if w)
    assert text == SPAN * 2
    everything, exempt = held(), held(exempt="template")
    assert "".join(exempt) == "Is rain wet? , or not. !"
    assert len(everything) > len(exempt)
    assert held(exempt="first") == everything[1:]


def test_a_pairs_instruction_is_found_in_its_prompt(llama: Case) -> None:
    pair = sl.InstructionPair("Describe rain.", "Use capitals.", "change_case:english_capital")
    plan = sl.spotlight(0.2).on(pair)
    weights = bind(llama.model, plan, pair.prompt).attention[0].weights
    assert weights is not None
    tokens = [one for one, w in zip(llama.ids(pair.prompt), weights, strict=True) if w]
    assert llama.model.tokenizer.decode(tokens) == "Use capitals."


def test_the_control_points_at_as_many_other_tokens(llama: Case) -> None:
    prompt = PROMPTS[1]
    plan = sl.instaboost(2.0, on=SPAN)
    own = bind(llama.model, plan, prompt).attention[0].weights or ()
    drawn = [bind(llama.model, plan.placebo(seed=seed), prompt).attention[0].weights or () for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sum(drawn[0]) == sum(own)
    assert not any(a and b for a, b in zip(own, drawn[0], strict=True))
    assert plan.placebo(seed=0).digest != plan.digest
    # Nor the first token, nor the template's.
    inside = bind(llama.model, sl.instaboost(1.0, on=(0, len(prompt))), prompt).attention[0].weights or ()
    assert all(b for a, b in zip(drawn[0], inside, strict=True) if a)
    # All the others, where there are fewer; and the steps of a sum point at the same ones.
    short = "Rain! Answer in lower case"
    both = bind(llama.model, (plan + sl.pasta(0.1, on=SPAN)).placebo(seed=0), short)
    instaboosted, demoted = (step.weights or () for step in both.attention)
    assert 0 < sum(instaboosted) < sum(bind(llama.model, plan, short).attention[0].weights or ())
    assert all(a + b == 1 for a, b in zip(instaboosted, demoted, strict=True))
    with pytest.raises(SteerlensError, match="needs tokens beside the instruction, and the prompt of row 0 has none"):
        generate(llama.model, [SPAN], steering=plan.placebo(seed=0), max_new_tokens=1)


def test_steps_that_were_told_their_spans_keep_them_where_pairs_tell_the_others() -> None:
    pair = sl.InstructionPair("Describe rain.", "Use capitals.", "change_case:english_capital")
    plan = sl.pasta(0.1, on="rain") + sl.spotlight()
    (request,) = requests_for([pair], plan, conditions=["text+attention"])
    told, filled = request.plan.attention
    assert told.spans == ("rain",)
    assert filled.spans == ((15, 28),)


def test_pooled_shares_are_those_of_a_row_alone_whoever_shares_its_prompt(llama: Case) -> None:
    for granularity in ("head", "layer"):
        pooled_plan = sl.spotlight(0.4, on=SPAN, granularity=granularity)  # type: ignore[arg-type]
        plans = [
            pooled_plan,
            Plan(),
            Plan(),
            pooled_plan + sl.directer(2.0, beta=0.3, on=SPAN),
            pooled_plan + sl.directer(beta=1, on=SPAN),
            sl.plausible(pooled_plan, beta=0.1),
        ]
        together = generate(llama.model, [PROMPTS[0]] * len(plans), steering=plans, max_new_tokens=N_NEW)
        alone = [generate(llama.model, PROMPTS[:1], steering=plan, max_new_tokens=N_NEW)[0] for plan in plans]
        assert [one.tokens for one in together] == [one.tokens for one in alone]
        assert together[4].tokens == together[0].tokens
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("steerlens.steering.sampling.abilities", lambda *_: Abilities(cache=False, batch=True))
            whole = generate(llama.model, [PROMPTS[0]] * len(plans), steering=plans, max_new_tokens=N_NEW)
        assert [one.tokens for one in whole] == [one.tokens for one in together]


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sl.pasta(0), "alpha must be above 0, got 0"),
        (lambda: sl.pasta(-1.0), "alpha must be above 0, got -1"),
        (lambda: unchecked(sl.pasta)(0.1, scale="both"), "scale must be one of include, exclude, generation"),
        (lambda: sl.directer(0), "scaled by a factor above 0, got 0"),
        (lambda: sl.directer(beta=-0.1), "beta must be at least 0, got -0.1"),
        (lambda: sl.spotlight(1.0), r"a target is a share of attention in \[0, 1\), got 1"),
        (
            lambda: unchecked(AttentionIntervention)("bias", 1, exempt="last"),
            "exempt must be of first, template, got 'last'",
        ),
        (lambda: sl.pasta(on=""), "a span needs a text that is not empty"),
        (lambda: sl.pasta(on=[]), "towards at least one span, got none"),
        (lambda: unchecked(sl.pasta)(on=[3]), r"a span is a text, or its characters \(start, stop\), got 3"),
        (lambda: sl.directer(extra_tokens=-1, on="x"), "extra_tokens must be at least 0"),
        (lambda: sl.directer(1e-50, on="x"), "scaled by a factor above 0"),
        (lambda: sl.pasta(heads=[-1]), "layers and heads count from zero"),
        (lambda: sl.pasta(heads={0: ["a"]}), "head must be a whole number"),
        (lambda: sl.directer() + sl.directer(), "a plan has one gate"),
        (lambda: sl.plausible(Plan()), "got no steering"),
        (lambda: sl.plausible(sl.directer()), "got one with a gate"),
    ],
)
def test_settings_out_of_range_are_refused_in_a_sentence(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SteerlensError, match=message):
        make()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (sl.pasta(), "row 1 was not told which"),
        (sl.pasta(on="in verse"), "'in verse' is not in that of row 1"),
        (sl.pasta(on=(0, 400)), r"a span must hold characters of the prompt, got \[0, 400\)"),
        (sl.pasta(on=SPAN, heads=[4]), r"layer must be in \[0, 4\), got 4"),
        (sl.pasta(on=SPAN, heads={1: [4]}), r"head must be in \[0, 4\), got 4 at layer 1"),
    ],
)
def test_what_does_not_fit_the_prompt_or_the_model_is_refused(llama: Case, plan: Plan, message: str) -> None:
    with pytest.raises(SteerlensError, match=message):
        generate(llama.model, PROMPTS[:2], steering=[Plan(), plan], max_new_tokens=2)
    assert hooks_on(llama.model) == []


def test_a_condition_without_the_instruction_has_nothing_to_point_at(llama: Case) -> None:
    pair = sl.InstructionPair("Describe rain.", "Use capitals.", "change_case:english_capital")
    with pytest.raises(DataError, match="got 'vector' for pasta"):
        sl.evaluate(llama.model, sl.pasta(0.01), sl.PairSet([pair]), conditions=["vector"])
    woven = sl.InstructionPair("Describe rain.", "shout", "change_case:english_capital", prompt="SHOUT about rain now.")
    with pytest.raises(DataError, match="a span needs an instruction that stands in the prompt"):
        sl.evaluate(llama.model, sl.pasta(0.01), sl.PairSet([woven]))


def test_a_model_whose_scores_cannot_be_edited_is_refused_with_the_reason(
    llama: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attention_abilities(llama.model).edits == ""
    monkeypatch.setattr("steerlens.models.attention._KNOWN", {})
    monkeypatch.setattr("steerlens.models.attention._Cut.__call__", lambda self, scores, rows: scores + 0)
    with pytest.raises(ModelError, match="depends on it though no query sees its key"):
        generate(llama.model, PROMPTS[:1], steering=sl.pasta(0.01, on=SPAN), max_new_tokens=2)
