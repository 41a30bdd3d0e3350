"""Gated decoding against the plain loop, which tries one thing after another for one prompt, and against what must hold."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import steerlens as sl
from steerlens.errors import SteerlensError
from steerlens.models.choice import use_backend
from steerlens.models.facts import stop_ids
from steerlens.models.probe import Abilities
from steerlens.models.prompts import encode
from steerlens.steering.directer import sensitivities
from steerlens.steering.gated import GatedBatch, _Columns
from steerlens.steering.gates import Gate, GatedToken, gate_stats, plausible_tokens, worth_trying
from steerlens.steering.generations import Generation
from steerlens.steering.interventions import AttentionIntervention
from steerlens.steering.plan import Plan
from steerlens.steering.sampling import generate, stream_tokens
from tests.conftest import Passes, Subject, hooks_on
from tests.near_ties import assert_same_text, clear_length
from tests.reference.plain_attention import Change, attention_pass, pasta, scale_keys, spotlight
from tests.reference.plain_directer import GatedText, plain_directer, plain_gate
from tests.reference.plain_loop import Step, plain_logits
from tests.steering.test_attention import PROMPTS, SPAN, Case, Spans, case, cases, llama
from tests.steps import unit
from tests.unchecked import unchecked
from tests.zoo import save_animal

__all__ = ["case", "cases", "llama"]

N_NEW = 12
ALPHA = {"llama": 2.0, "gpt2": 2.0, "tiny": 100.0}
"""Wide random weights make scores so large that a factor of 100 leaves nothing plausible."""


def steered_by(plan: Plan, case: Case, prompt: str) -> Spans:
    return case.spans(Plan(plan.gate.interventions) if plan.gate else plan, prompt)


def directers_text(case: Case, prompt: str, **options: Any) -> GatedText:
    plan = sl.directer(on=SPAN)
    return plain_directer(
        case.plain,
        case.ids(prompt),
        steered_by(plan, case, prompt),
        max_new_tokens=N_NEW,
        stop_ids=stop_ids(case.model),
        **options,
    )


def assert_same_verdicts(expected: Sequence[GatedText], found: Sequence[Generation]) -> Counter[str]:
    """Tokens, outcomes and numbers of trials are the oracle's, up to the first near tie; returns how often each outcome came."""
    assert_same_text(expected, [one.tokens for one in found])  # type: ignore[arg-type]
    seen: Counter[str] = Counter()
    for plain, one in zip(expected, found, strict=True):
        clear = clear_length(plain)  # type: ignore[arg-type]
        outcomes = [token.outcome.replace("weakened", "accepted") for token in one.gated]
        assert outcomes[:clear] == plain.outcomes[:clear]
        assert [token.n_trials for token in one.gated][:clear] == plain.n_extra[:clear]
        seen.update(token.outcome for token in one.gated[:clear])
    return seen


# --- the plain loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 0.05])
@pytest.mark.parametrize("ranking", ["paper", "reference_code"])
def test_directer_gives_the_plain_loops_text_and_verdicts(case: Case, ranking: Any, beta: float) -> None:
    alpha = ALPHA[case.name]
    expected = [directers_text(case, prompt, alpha=alpha, beta=beta, ranking=ranking) for prompt in PROMPTS]
    plan = sl.directer(alpha, beta=beta, ranking=ranking, on=SPAN)
    found = generate(case.model, PROMPTS, steering=plan, max_new_tokens=N_NEW)
    assert_same_verdicts(expected, found)
    for plain, one in zip(expected, found, strict=True):
        clear = clear_length(plain)  # type: ignore[arg-type]
        assert [token.n_layers for token in one.gated][:clear] == plain.n_active[:clear]  # type: ignore[attr-defined]
    alone = [generate(case.model, [prompt], steering=plan, max_new_tokens=N_NEW)[0] for prompt in PROMPTS]
    assert [replace(one, index=0) for one in found] == alone


def test_every_outcome_is_met_and_each_row_has_layers_of_its_own(cases: dict[str, Case]) -> None:
    seen: Counter[str] = Counter()
    layers: set[int] = set()
    for name, one in cases.items():
        for beta in (0.5, 0.05):
            plan = sl.directer(ALPHA[name], beta=beta, on=SPAN)
            found = generate(one.model, PROMPTS, steering=plan, max_new_tokens=N_NEW)
            seen.update(token.outcome for row in found for token in row.gated)
            layers.update(token.n_layers for row in found for token in row.gated)
    assert set(seen) == {"skipped", "accepted", "weakened", "rejected"}
    assert len(layers) > 2


def test_candidate_layers_and_the_smallest_set_are_the_oracles(llama: Case) -> None:
    options: dict[str, Any] = {"alpha": 2.0, "beta": 0.3, "fewest": 2}
    expected = [directers_text(llama, prompt, layers=[0, 1, 3], **options) for prompt in PROMPTS]
    plan = sl.directer(2.0, beta=0.3, fewest=2, heads=[0, 1, 3], on=SPAN)
    assert_same_verdicts(expected, generate(llama.model, PROMPTS, steering=plan, max_new_tokens=N_NEW))
    # The published code scales one token more.
    plan = sl.directer(2.0, beta=0.3, on=SPAN, extra_tokens=1)
    spans = [(start, stop + 1) for start, stop in steered_by(sl.directer(on=SPAN), llama, PROMPTS[0])]
    one = plain_directer(
        llama.plain,
        llama.ids(PROMPTS[0]),
        spans,
        alpha=2.0,
        beta=0.3,
        max_new_tokens=N_NEW,
        stop_ids=stop_ids(llama.model),
    )
    assert_same_verdicts([one], generate(llama.model, PROMPTS[:1], steering=plan, max_new_tokens=N_NEW))


def halved(change: Callable[[float], Change], case: Case, prompt: str, *, beta: float, halvings: int) -> GatedText:
    """The plain loop around a change of scores whose coefficient is halved."""

    def logits_after(ids: Sequence[int], rung: Any) -> torch.Tensor:
        changed = Change() if rung is None else change(rung).at(range(case.model.cfg.n_layers), newest=True)
        return attention_pass(case.plain, ids, changed).logits[-1]

    rungs = [0.5**number for number in range(halvings + 1)]
    return plain_gate(
        logits_after, case.ids(prompt), rungs, beta=beta, max_new_tokens=N_NEW, stop_ids=stop_ids(case.model)
    )


@pytest.mark.parametrize("name", ["pasta", "spotlight"])
def test_a_gate_around_attention_halves_its_coefficient(case: Case, name: str) -> None:
    plans = {"pasta": sl.pasta(math.exp(-8.0), on=SPAN), "spotlight": sl.spotlight(0.8, on=SPAN)}
    expected = []
    for prompt in PROMPTS:
        spans, n = case.spans(plans[name], prompt), len(case.ids(prompt))

        def change(factor: float, spans: Spans = spans, n: int = n) -> Change:
            if name == "pasta":
                return pasta(math.exp(-8.0 * factor), spans, prompt_length=n)
            return spotlight(0.8 * factor, spans)

        expected.append(halved(change, case, prompt, beta=0.4, halvings=3))
    plan = sl.plausible(plans[name], beta=0.4, weaken="coeff", halvings=3)
    found = generate(case.model, PROMPTS, steering=plan, max_new_tokens=N_NEW)
    assert_same_verdicts(expected, found)


@pytest.mark.parametrize("operator", ["add", "set_projection"])
def test_a_gate_around_a_vector_pushes_the_newest_token_alone(tiny: Subject, operator: Any) -> None:
    push = Step(1, operator, unit(0), coeff=20.0 if operator == "add" else 1.0, target=20.0)
    vector = sl.SteeringVector({1: unit(0)})
    options: Any = {"coeff": 20.0} if operator == "add" else {"target": 20.0}
    plan = sl.plausible(vector.at(1, operator=operator, **options), beta=0.2, halvings=4)
    expected = []
    for prompt in PROMPTS:
        ids = encode(tiny.model, prompt)

        def logits_after(prefix: Sequence[int], rung: Any, n: int = len(ids)) -> torch.Tensor:
            step = replace(push, coeff=push.coeff * (rung or 0.0), rule=("start", len(prefix) - 1, len(prefix)))
            return plain_logits(tiny.hf, prefix, [] if rung is None else [step], n)[0]

        rungs = [0.5**number for number in range(5)]
        expected.append(
            plain_gate(logits_after, ids, rungs, beta=0.2, max_new_tokens=N_NEW, stop_ids=stop_ids(tiny.model))
        )
    seen = assert_same_verdicts(expected, generate(tiny.model, PROMPTS, steering=plan, max_new_tokens=N_NEW))
    assert len(seen) > 1


# --- what must hold ----------------------------------------------------------------------------------------------------


def test_from_beta_one_on_the_text_is_the_unsteered_one(case: Case) -> None:
    raw = generate(case.model, PROMPTS, max_new_tokens=N_NEW)
    for beta in (1.0, 2.0):
        plan = sl.directer(ALPHA[case.name], beta=beta, on=SPAN)
        assert generate(case.model, PROMPTS, steering=plan, max_new_tokens=N_NEW).texts == raw.texts


def test_at_beta_zero_every_token_is_the_one_that_steering_in_full_wants(case: Case) -> None:
    alpha = ALPHA[case.name]
    expected = [directers_text(case, prompt, alpha=alpha, beta=0.0) for prompt in PROMPTS]
    found = generate(case.model, PROMPTS, steering=sl.directer(alpha, beta=0.0, on=SPAN), max_new_tokens=N_NEW)
    assert assert_same_verdicts(expected, found).keys() == {"accepted"}
    for one in found:
        assert [token.proposed for token in one.gated] == list(one.tokens)
        assert all(token.n_layers == case.model.cfg.n_layers for token in one.gated)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_accepted_token_is_plausible_and_any_other_is_the_unsteered_one(case: Case, temperature: float) -> None:
    beta = 0.3
    plan = sl.directer(ALPHA[case.name], beta=beta, on=SPAN)
    found = generate(
        case.model, PROMPTS * 3, steering=plan, max_new_tokens=N_NEW, temperature=temperature, seed=range(9)
    )
    n_accepted = 0
    for one in found:
        ids = list(one.prompt_tokens)
        for token, verdict in zip(one.tokens, one.gated, strict=True):
            p = attention_pass(case.plain, ids).logits[-1].softmax(-1)
            if verdict.outcome in ("accepted", "weakened"):
                n_accepted += 1
                assert float(p[token]) >= beta * float(p.max()) * (1 - 1e-4)
            else:
                assert token == verdict.raw
            if verdict.outcome == "skipped":
                assert float(p.topk(2).values[1]) <= beta * float(p.max()) * (1 + 1e-4)
            assert verdict.p_raw == pytest.approx(float(p[verdict.raw]), rel=1e-3, abs=1e-5)
            if verdict.proposed is not None:
                assert verdict.p_proposed == pytest.approx(float(p[verdict.proposed]), rel=1e-3, abs=1e-5)
            ids.append(token)
    assert n_accepted


def test_gated_and_plain_rows_share_a_request_and_leave_as_they_stop(llama: Case) -> None:
    plans = [
        sl.directer(2.0, on=SPAN),
        Plan(),
        sl.pasta(0.01, on=SPAN),
        sl.plausible(sl.spotlight(0.5, on=SPAN), criterion="kl", limit=0.5),
        sl.plausible(
            sl.SteeringVector({2: torch.ones(32)}).at(2, operator="add", coeff=9.0), criterion="js", limit=0.05
        ),
        sl.directer(2.0, beta=0.1, on=SPAN) + sl.SteeringVector({1: torch.ones(32)}).at(1, operator="add", coeff=9.0),
    ]
    prompts = [PROMPTS[number % 3] for number in range(len(plans))]
    stop = generate(llama.model, prompts, steering=plans, max_new_tokens=24, stop=["a", "9"])
    alone = [
        generate(llama.model, [prompt], steering=plan, max_new_tokens=24, stop=["a", "9"])[0]
        for prompt, plan in zip(prompts, plans, strict=True)
    ]
    assert [replace(one, index=0) for one in stop] == alone
    assert len({len(one.tokens) for one in stop}) > 1
    assert hooks_on(llama.model) == []


@pytest.mark.parametrize("batch", [True, False])
def test_a_model_that_may_keep_no_cache_gives_the_same(
    case: Case, batch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [
        sl.directer(ALPHA[case.name], beta=0.1, on=SPAN),
        sl.plausible(sl.spotlight(0.6, on=SPAN), beta=0.1),
        sl.directer(ALPHA[case.name], beta=0.1, on=SPAN) + sl.pasta(0.5, on=SPAN),
    ]
    cached = generate(case.model, PROMPTS, steering=plans, max_new_tokens=N_NEW)
    monkeypatch.setattr("steerlens.steering.sampling.abilities", lambda *_: Abilities(cache=False, batch=batch))
    assert generate(case.model, PROMPTS, steering=plans, max_new_tokens=N_NEW) == cached


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_trials_leave_nothing_behind_whether_columns_are_hidden_or_taken_back(
    name: str, tmp_path: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sl.load_model(save_animal(name, tmp_path / name), progress=False)
    taken: list[int] = []
    step_back = _Columns._step_back

    def counted(self: _Columns, cache: Any, mask: Any, items: Sequence[int], rows: Sequence[int]) -> None:
        taken.extend(items)
        step_back(self, cache, mask, items, rows)

    monkeypatch.setattr(_Columns, "_step_back", counted)
    plans = [sl.directer(3.0, beta=0.3, on=SPAN), sl.plausible(sl.spotlight(0.6, on=SPAN), beta=0.1), Plan()] * 2
    found = generate(model, PROMPTS * 2, steering=plans, max_new_tokens=2 * N_NEW)
    assert sum(token.outcome != "skipped" for one in found for token in one.gated) > 10
    assert bool(taken) == (name != "llama")  # a window would count a hidden column
    use_backend(model, "hooks")
    taken.clear()
    passes.clear()
    through_hooks = generate(model, PROMPTS * 2, steering=plans, max_new_tokens=2 * N_NEW)
    assert taken
    longest = max(len(row.prompt_tokens) + len(row.tokens) for row in through_hooks)
    assert max(rows.mask.shape[1] for rows, _ in passes) <= longest
    monkeypatch.setattr("steerlens.steering.sampling.abilities", lambda *_: Abilities(cache=False, batch=False))
    assert found == through_hooks == generate(model, PROMPTS * 2, steering=plans, max_new_tokens=2 * N_NEW)


def test_a_batch_without_gaps_is_never_wider_than_its_longest_row(
    llama: Case, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steerlens.steering.sampling.stop_ids", lambda _: ())
    prompts = sorted(PROMPTS, key=lambda prompt: -len(llama.ids(prompt)))
    # The longest row's trials never change a token, and so it leaves first; those of the others always do.
    push = sl.SteeringVector({1: torch.ones(32)}).at(1, operator="add", coeff=50.0)
    plans = [sl.plausible(sl.pasta(0.999, on=SPAN), beta=0.0), *[sl.plausible(push, beta=0.0)] * (len(prompts) - 1)]
    use_backend(llama.model, "hooks")
    try:
        generate(llama.model, prompts, steering=plans, max_new_tokens=1)
        passes.clear()
        found = generate(llama.model, prompts, steering=plans, max_new_tokens=N_NEW)
    finally:
        use_backend(llama.model, "auto")
    assert n_passes(found[0]) < min(map(n_passes, found[1:]))
    longest = len(found[0].prompt_tokens) + N_NEW
    assert len(found[0].prompt_tokens) > max(len(one.prompt_tokens) for one in found[1:])
    assert max(rows.mask.shape[1] for rows, _ in passes) <= longest


@pytest.mark.bridge
def test_a_token_that_was_run_and_is_not_the_one_chosen_leaves_nothing(
    llama: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = sl.directer(2.0, beta=0.3, on=SPAN)
    expected = generate(llama.model, PROMPTS, steering=plan, max_new_tokens=N_NEW)
    tried, wrong = GatedBatch._tried, []

    def mistaken(self: GatedBatch, *args: Any) -> Any:
        found = tried(self, *args)
        wrong.extend(it for it in self.ahead if it is not None)
        self.ahead = [None if it is None else (it[0] + 1, it[1]) for it in self.ahead]
        return found

    monkeypatch.setattr(GatedBatch, "_tried", mistaken)
    for backend in ("lean", "hooks"):
        use_backend(llama.model, backend)
        try:
            assert generate(llama.model, PROMPTS, steering=plan, max_new_tokens=N_NEW) == expected
        finally:
            use_backend(llama.model, "auto")
    assert wrong


def test_tokens_that_no_step_is_meant_for_are_not_steered(llama: Case) -> None:
    plans = [
        sl.plausible(sl.instaboost(3.0, on=SPAN, positions="prompt"), beta=0.0),
        sl.plausible(
            sl.SteeringVector({1: torch.ones(32)}).at(1, operator="add", coeff=9.0, positions="last"), beta=0.0
        ),
    ]
    for one in generate(llama.model, PROMPTS[:2], steering=plans, max_new_tokens=6):
        assert [token.outcome for token in one.gated][:2] == ["accepted", "skipped"]
        assert {token.outcome for token in one.gated[1:]} == {"skipped"}
        assert one.n_steered == 1


def test_what_is_never_said_counts_neither_for_nor_against_a_token(
    llama: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, raw = sl.directer(2.0, beta=0.3, on=SPAN), generate(llama.model, PROMPTS[:1], max_new_tokens=1)
    never = (raw[0].tokens[0],)
    monkeypatch.setattr("steerlens.steering.sampling.forbidden_ids", lambda _: never)
    (one,) = generate(llama.model, PROMPTS[:1], steering=plan, max_new_tokens=1)
    logits = attention_pass(llama.plain, list(one.prompt_tokens)).logits[-1]
    logits[never[0]] = float("-inf")
    p = logits.softmax(-1)
    assert one.gated[0].raw == int(p.argmax())
    assert one.gated[0].p_raw == pytest.approx(float(p.max()), rel=1e-3)
    assert (one.gated[0].outcome == "skipped") == (float(p.topk(2).values[1]) < 0.3 * float(p.max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_from_beta_one_on_half_types_say_what_they_say_unsteered(dtype: torch.dtype) -> None:
    model = sl.load_model("tiny", dtype=dtype, progress=False)
    prompts = [
        f"Describe {what}. {SPAN}." for what in ("rain", "snow", "iron", "tea", "the sea", "a cat", "milk", "wool")
    ]
    raw = generate(model, prompts, max_new_tokens=16)
    assert generate(model, prompts, steering=sl.directer(beta=1, on=SPAN), max_new_tokens=16).texts == raw.texts


def test_streamed_tokens_come_with_the_probability_they_were_taken_at(llama: Case) -> None:
    plan = sl.directer(2.0, beta=0.0, on=SPAN)
    said = list(stream_tokens(llama.model, PROMPTS[:1], steering=plan, max_new_tokens=4))
    ids, spans = llama.ids(PROMPTS[0]), llama.spans(Plan(plan.gate.interventions if plan.gate else ()), PROMPTS[0])
    change = scale_keys(2.0, spans).at(range(4), newest=True)
    for one in said[:4]:
        log_p = attention_pass(llama.plain, ids, change).logits[-1].log_softmax(-1)
        assert one.log_prob == pytest.approx(float(log_p[one.id]), abs=1e-3)  # type: ignore[union-attr]
        ids.append(one.id)  # type: ignore[union-attr]


def test_a_failure_in_a_trial_leaves_no_hook(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("steerlens.steering.gated.sensitivities", fail)
    with pytest.raises(KeyboardInterrupt):
        generate(llama.model, PROMPTS, steering=sl.directer(100.0, beta=0.5, on=SPAN), max_new_tokens=24)
    assert hooks_on(llama.model) == []


def n_passes(one: Generation) -> int:
    """How many passes a row takes after its prompt: one a token, one more wherever steering has changed it, or tried the last."""
    steps = list(zip(one.gated, one.tokens, strict=True))
    changed = sum(step.outcome != "skipped" and step.raw != token for step, token in steps[:-1])
    return len(steps) + changed + (one.gated[-1].outcome != "skipped")


def test_a_token_costs_one_pass_and_one_more_where_steering_has_changed_it(llama: Case, passes: Passes) -> None:
    plan = sl.directer(2.0, beta=0.3, on=SPAN)
    generate(
        llama.model, PROMPTS[:1], max_new_tokens=1, steering=plan
    )  # what is found out about a model is found out before
    passes.clear()
    (one,) = generate(llama.model, PROMPTS[:1], steering=plan, max_new_tokens=N_NEW)
    n_tried = sum(token.outcome != "skipped" for token in one.gated)
    assert 0 < n_tried < len(one.tokens)
    assert len(one.tokens) < n_passes(one) < len(one.tokens) + n_tried
    widths = [tuple(rows.tokens.shape) for rows, _ in passes]
    n_layers = llama.model.cfg.n_layers
    assert widths[0] == (1, len(one.prompt_tokens) - 1)
    # The ranking: the row as it is and with each layer steered alone.
    assert widths.count((1 + n_layers, 1)) == 1
    # Beside the row, its trials: all layers, half of them, and so on.
    assert widths.count((1 + 3, 1)) == n_tried
    assert widths.count((1, 1)) == n_passes(one) - n_tried
    assert len(widths) == 2 + n_passes(one)


def test_rows_do_not_wait_for_each_other(llama: Case, passes: Passes) -> None:
    plan = sl.directer(2.0, beta=0.3, on=SPAN)
    generate(llama.model, PROMPTS, max_new_tokens=1, steering=plan)
    passes.clear()
    found = generate(llama.model, PROMPTS * 2, steering=plan, max_new_tokens=N_NEW, batch_size=6)
    decoded = [rows for rows, _ in passes[1:] if rows.tokens.shape != (1 + llama.model.cfg.n_layers, 1)]
    n_ranking = sum(rows.tokens.shape[0] % (1 + llama.model.cfg.n_layers) == 0 for rows in decoded)
    assert len(decoded) - n_ranking <= max(n_passes(one) for one in found)


# --- parts -------------------------------------------------------------------------------------------------------------


def test_the_tests_are_the_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    raw, steered = (torch.randn(6, 9, generator=generator) * 2 for _ in range(2))
    token = steered.argmax(-1)
    p, q = raw.softmax(-1), steered.softmax(-1)
    threshold = torch.tensor([0.0, 0.1, 0.3, 0.5, 1.0, 2.0])
    expected = p[range(6), token] >= threshold * p.amax(-1)
    assert plausible_tokens(raw, steered, token, "min_p", threshold).tolist() == expected.tolist()
    kl = (q * (q / p).log()).sum(-1)
    assert plausible_tokens(raw, steered, token, "kl", kl + 1e-4).all()
    assert not plausible_tokens(raw, steered, token, "kl", kl - 1e-4).any()
    m = (p + q) / 2
    js = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    assert plausible_tokens(raw, steered, token, "js", js + 1e-4).all()
    assert not plausible_tokens(raw, steered, token, "js", js - 1e-4).any()
    two = p.topk(2, dim=-1).values
    for beta in (0.0, 0.2, 0.9):
        tried = worth_trying(raw, torch.full((6,), beta))
        assert tried.tolist() == (two[:, 1] >= beta * two[:, 0]).tolist()


def test_layers_are_halved_down_to_the_fewest() -> None:
    gate = sl.directer(on="x").gate
    assert gate is not None
    assert gate.sizes(28) == [28, 14, 7, 3, 1]
    assert replace(gate, fewest=2).sizes(32) == [32, 16, 8, 4, 2]
    table = gate.strengths([3, 1, 0, 2], 5)
    assert table.tolist() == [[1, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 0, 0, 1, 0]]
    by_coeff = replace(gate, weaken="coeff", halvings=2).strengths([1, 2], 3)
    assert by_coeff.tolist() == [[0, 1, 1], [0, 0.5, 0.5], [0, 0.25, 0.25]]


def test_the_two_rankings_ask_who_disturbs_and_who_is_disturbed() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = torch.randn(2, 1, 4, 8, generator=generator).repeat(1, 4, 1, 1).unbind(0)
    inputs, outputs = inputs.clone(), outputs.clone()
    # Steering layer 1 (probe 2) turns the output of layer 3 round; nothing else moves.
    outputs[2, 3] = -outputs[2, 3]
    paper = sensitivities(inputs, outputs, probed=[0, 1, 2])
    assert paper.tolist() == [pytest.approx(0, abs=1e-6), pytest.approx(float(paper[1])), pytest.approx(0, abs=1e-6)]
    assert abs(float(paper[1])) > 1e-3
    code = sensitivities(inputs, outputs, ranking="reference_code", probed=[0, 1, 2])
    pre, post = inputs[0], outputs[0]
    expected = 2 * (1 - torch.cosine_similarity(pre, post, dim=-1))
    torch.testing.assert_close(code, expected[:3])  # undisturbed: what is there anyway


def test_statistics_are_shares_of_tokens() -> None:
    nan = float("nan")
    tokens = [
        GatedToken("skipped", 0, 0, 0.0, None, 1, nan, 0.9),
        GatedToken("accepted", 1, 8, 1.0, 2, 1, 0.3, 0.4),
        GatedToken("weakened", 3, 2, 0.25, 5, 1, 0.01, 0.4),
        GatedToken("rejected", 4, 0, 0.0, 5, 1, 0.01, 0.4),
    ]
    assert gate_stats(tokens) == {
        "accepted": 0.5,
        "weakened": 0.25,
        "rejected": 0.25,
        "skipped": 0.25,
        "mean_active_layers": 2.5,
        "extra_passes": 2.0,
    }


def test_gates_are_values() -> None:
    one, other = sl.directer(on=SPAN), sl.directer(100, beta=0.5, on=SPAN)
    assert one == other
    assert hash(one) == hash(other)
    assert one.digest == other.digest != sl.directer(beta=0.4, on=SPAN).digest
    assert one.digest != Plan(one.gate.interventions).digest  # type: ignore[union-attr]
    push = sl.SteeringVector({1: torch.ones(4)}).at(1, operator="add", coeff=2.0)
    assert (one + push).interventions == push.interventions
    assert (push + one) == (one + push)
    gate = sl.plausible(push, beta=0.5).gate
    assert gate is not None
    # What does not count makes no difference.
    assert replace(gate, limit=3.0, fewest=4, ranking="reference_code").record() == gate.record()
    assert sl.plausible(push).placebo(seed=0).gate != gate
    # A part of a plan is weakened as it would be by itself.
    assert sl.plausible(push + sl.pasta(on=SPAN)).part("residual") == sl.plausible(push)
    assert sl.plausible(push).at_positions("last").gate != gate
    assert str(one).startswith("if plausible (beta 0.5, else fewer layers): directer keys times 100 on the instruction")


@pytest.mark.parametrize(
    "setting", [{"criterion": "p"}, {"weaken": "heads"}, {"ranking": "mine"}, {"fewest": 0}, {"halvings": -1}]
)
def test_settings_of_a_gate_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    step = AttentionIntervention("bias", 1.0)
    with pytest.raises(SteerlensError, match=f"{next(iter(setting))} must be"):
        unchecked(Gate)(
            (step,),
            **{
                "criterion": "min_p",
                "beta": 0.5,
                "limit": 0.1,
                "weaken": "layers",
                "ranking": "paper",
                "fewest": 1,
                "halvings": 4,
            }
            | setting,
        )


def test_a_single_pass_has_no_gate(llama: Case) -> None:
    with (
        pytest.raises(SteerlensError, match="a gate compares passes for every new token"),
        sl.steer(llama.model, sl.directer(on=SPAN)),
    ):
        pass


def test_prompts_of_one_token_have_nothing_before_it_and_are_steered_alike(llama: Case) -> None:
    alone = sl.PromptFormat(style="plain", bos=False)
    options: Any = {"steering": sl.directer(2.0, beta=0.2, on=(0, 1)), "max_new_tokens": N_NEW, "prompt_format": alone}
    together = generate(llama.model, ["a", "b", "c"], **options)
    assert {len(one.prompt_tokens) for one in together} == {1}
    for one, prompt in zip(together, "abc", strict=True):
        ids = [*one.prompt_tokens]
        expected = plain_directer(
            llama.plain, ids, [(0, 1)], alpha=2.0, beta=0.2, max_new_tokens=N_NEW, stop_ids=stop_ids(llama.model)
        )
        assert_same_verdicts([expected], [one])
        assert generate(llama.model, [prompt], **options)[0].tokens == one.tokens
