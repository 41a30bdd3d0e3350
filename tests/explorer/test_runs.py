"""Runs of the explorer without a page: the texts, probabilities, verdicts and lenses of the library, and nothing left behind."""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

import steerlens as sl
from steerlens.errors import SteerlensError
from steerlens.explorer import runs, verdicts
from steerlens.explorer.runs import Explorer, Side, View
from steerlens.explorer.settings import Settings
from steerlens.models.prompts import encode
from steerlens.steering import batches
from steerlens.vectors.vector import SteeringVector
from tests.conftest import Subject, hooks_on
from tests.explorer.conftest import LOWERCASE, TITLE
from tests.steps import unit


def last(explorer: Explorer, settings: Settings, **changes: Any) -> View:
    *_, view = explorer.run({**settings.asked(), **changes})
    return view


def plain_probabilities(model: Any, settings: Settings, tokens: tuple[int, ...]) -> list[float]:
    """Of each token, from one pass of the unsteered model over prompt and text."""
    prompt = encode(model, settings.prompt)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1]
    return logits.softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def test_texts_are_those_of_generate(explorer: Explorer, settings: Settings, model: Any, vectors: Any) -> None:
    cases = [(1, "set_projection", (TITLE,)), (5, "add", (LOWERCASE, TITLE)), (3, "ablate", (LOWERCASE,))]
    for layer, operator, names in cases:
        changed = replace(settings, layer=layer, operator=operator, vectors=names, coeff=0.9)
        view = last(explorer, changed)
        plan = changed.plan(vectors)
        plain, steered = (
            sl.generate(model, [settings.prompt], steering=steering, max_new_tokens=16)[0] for steering in (None, plan)
        )
        assert view.status == "finished"
        assert view.problems == ()
        assert (view.unsteered.text, view.steered.text) == (plain.text, steered.text)
        assert (view.unsteered.finish_reason, view.steered.finish_reason) == (
            plain.finish_reason,
            steered.finish_reason,
        )
        assert view.plan == str(plan)


def test_a_view_comes_with_each_token_and_texts_grow(explorer: Explorer, settings: Settings) -> None:
    views = list(explorer.run(settings.asked()))
    assert [view.status for view in views] == ["running"] * (len(views) - 2) + ["judging", "finished"]
    for name in ("unsteered", "steered"):
        sides: list[Side] = [getattr(view, name) for view in views]
        assert sides[0] == Side()
        assert {len(side.tokens) for side in sides} == set(range(len(sides[-1].tokens) + 1))
        for before, after in itertools.pairwise(sides):
            assert after.text.startswith(before.text)
        for side in sides:
            assert "".join(token.text for token in side.tokens) == side.text
        assert [token.ends for token in sides[-1].tokens].count(True) == (sides[-1].finish_reason == "eos")


@pytest.mark.parametrize("cached", [True, False])
def test_the_colour_is_the_probability_under_the_unsteered_model(
    explorer: Explorer, settings: Settings, model: Any, vectors: Any, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cached:
        whole = runs.abilities(model, 60)
        monkeypatch.setattr(runs, "abilities", lambda *_: replace(whole, cache=False))
    view = last(explorer, settings)
    for side, plan in ((view.unsteered, None), (view.steered, settings.plan(vectors))):
        row = sl.generate(model, [settings.prompt], steering=plan, max_new_tokens=16)[0]
        expected = plain_probabilities(model, settings, row.tokens)
        torch.testing.assert_close([token.probability for token in side.tokens], expected, rtol=1e-3, atol=1e-5)
    assert [one.probability for one in view.unsteered.tokens] == [one.steered for one in view.unsteered.tokens]
    assert view.steered.tokens[0].probability < 0.01 < 0.5 < view.steered.tokens[0].steered


def test_letters_of_several_tokens_are_written_once_they_are_whole(llama: Subject) -> None:
    text = runs._Text(llama.model.tokenizer)
    ids = llama.model.tokenizer("né…", add_special_tokens=False)["input_ids"]
    for token in ids:
        said = text.add(token, 0.5, 0.5)
        assert "\N{REPLACEMENT CHARACTER}" not in text.text
    assert "".join(one.text for one in said) == text.text == "né…"
    assert len(said) == len(ids) > 3
    cut = runs._Text(llama.model.tokenizer)
    cut.add(ids[0], 0.5, 0.5)
    cut.add(ids[1], 0.5, 0.5)
    assert [one.text for one in cut.finish("n\N{REPLACEMENT CHARACTER}", stopped=False)] == [
        "n",
        "\N{REPLACEMENT CHARACTER}",
    ]


def test_verdicts_are_those_of_the_checks(explorer: Explorer, settings: Settings) -> None:
    view = last(explorer, settings, vectors=[LOWERCASE, TITLE])
    for side in (view.unsteered, view.steered):
        assert [one.vector for one in side.verdicts] == [LOWERCASE, TITLE]
        for one in side.verdicts:
            expected = sl.check(side.text, one.vector)
            assert (one.followed, one.strict, one.note) == (expected.loose, expected.strict, "")
    assert view.steered.verdicts[1].followed
    assert not view.unsteered.verdicts[1].followed


def test_a_check_without_its_arguments_says_so_and_takes_them(vectors: dict[str, SteeringVector]) -> None:
    bullets = vectors[TITLE].with_metadata(instruction="detectable_format:number_bullet_lists")
    missing = verdicts.judge("* a\n* b", "mine", bullets)
    assert missing.followed is None
    assert "num_bullets" in missing.note
    assert "arguments={'mine'" in missing.note
    assert verdicts.judge("* a\n* b", "mine", bullets, {"mine": {"num_bullets": 2}}).followed
    german = vectors[TITLE].with_metadata(instruction="language:response_language_de")
    assert verdicts.judge("Das ist ein schöner Tag, und die Sonne scheint.", "german", german).followed
    nothing = SteeringVector({0: torch.ones(4)})
    assert "no instruction" in verdicts.judge("a", "unnamed", nothing).note


def test_the_lens_is_that_of_the_layer(explorer: Explorer, settings: Settings, model: Any, vectors: Any) -> None:
    view = last(explorer, settings, vectors=[TITLE, LOWERCASE], layer=6)
    assert [(one.vector, one.sign) for one in view.lens] == list(itertools.product((TITLE, LOWERCASE), (1, -1)))
    for one in view.lens:
        table = sl.logit_lens(model, vectors[one.vector], layer=6, top_k=8).table
        rows = table[(table["kind"] == "promoted") & (table["sign"] == one.sign)]
        assert [(token, logit) for token, logit, _ in one.tokens] == list(
            zip(rows["token"], rows["logit"], strict=True)
        )
        assert [beyond for *_, beyond in one.tokens] == (rows["logit"] > rows["random_high"]).tolist()


def test_a_coefficient_of_zero_shows_one_text_twice(explorer: Explorer, settings: Settings) -> None:
    view = last(explorer, settings, coeff=0)
    assert view.steered == view.unsteered


# --- one run at a time, and nothing left behind --------------------------------------------------------------------


def begun(explorer: Explorer, settings: Settings) -> Iterator[View]:
    views = explorer.run(settings.asked())
    for view in views:
        if len(view.steered.tokens) == 3:
            return views
    raise AssertionError("too short a run")


def test_a_new_run_ends_the_one_before_it(explorer: Explorer, settings: Settings, model: Any) -> None:
    old = begun(explorer, settings)
    new = explorer.run({**settings.asked(), "layer": 5})
    assert list(old) == []
    assert hooks_on(model) == []
    assert list(new)[-1].status == "finished"


def test_a_run_that_is_cancelled_comes_to_no_other_token(explorer: Explorer, settings: Settings, model: Any) -> None:
    views = begun(explorer, settings)
    explorer.cancel()
    assert list(views) == []
    assert hooks_on(model) == []


def test_the_model_is_free_between_two_views(explorer: Explorer, settings: Settings, model: Any) -> None:
    for _ in explorer.run(settings.asked()):
        assert hooks_on(model) == []
        assert not torch.is_inference_mode_enabled()


def test_a_failure_is_a_sentence_and_leaves_no_hook(
    explorer: Explorer, settings: Settings, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, real, calls = last(explorer, settings), batches.choose, itertools.count()

    def failing(*args: Any) -> torch.Tensor:
        if next(calls) == 3:
            raise RuntimeError("out of memory")
        return real(*args)

    monkeypatch.setattr(batches, "choose", failing)
    view = last(explorer, settings)
    assert (view.status, view.problems) == ("failed", (("run", "RuntimeError: out of memory"),))
    assert len(view.steered.tokens) == 3
    assert hooks_on(model) == []
    monkeypatch.undo()
    assert last(explorer, settings) == whole


def test_a_prompt_that_does_not_fit_is_a_sentence(explorer: Explorer, settings: Settings) -> None:
    view = last(explorer, settings, max_new_tokens=1000)
    assert view.status == "failed"
    assert "must fit the context" in dict(view.problems)["run"]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("control", "value", "message"),
    [
        ("prompt", " ", "must not be empty"),
        ("prompt", None, "the prompt must be a text"),
        ("vectors", [], "at least one instruction"),
        ("vectors", ["detectable_format:titel"], "did you mean 'detectable_format:title'"),
        ("layer", 8, r"must be one of the vector's \[0, 1, 2, 3, 4, 5, 6, 7\], got 8"),
        ("layer", None, "layer must be a whole number"),
        ("coeff", "1e", "the coefficient must be a finite number, got '1e'"),
        ("coeff", "nan", "the coefficient must be a finite number"),
        ("operator", "ad", "did you mean 'add'"),
        ("positions", "lats", "did you mean 'last'"),
        ("positions", None, "positions must be a rule's name"),
        ("max_new_tokens", "", "must be a whole number, got ''"),
        ("max_new_tokens", "0", "must be at least 1, got 0"),
    ],
)
def test_a_value_that_cannot_be_is_a_sentence_beside_its_control(
    explorer: Explorer, settings: Settings, control: str, value: Any, message: str
) -> None:
    view = last(explorer, settings, **{control: value})
    assert view.status == "refused"
    assert [name for name, _ in view.problems] == [control]
    assert re.search(message, dict(view.problems)[control])


def test_every_control_that_cannot_be_is_named_at_once(explorer: Explorer) -> None:
    (view,) = explorer.run({})
    assert [name for name, _ in view.problems] == list(asdict(Settings("", (), 0)))


def test_an_operator_that_needs_what_a_vector_lacks_is_refused_beside_it(model: Any, settings: Settings) -> None:
    bare = SteeringVector({1: unit(0, width=160)})
    view = last(Explorer(model, {"bare": bare}), settings, vectors=["bare"])
    assert [name for name, _ in view.problems] == ["operator"]
    explorer = Explorer(model, {"bare": bare})
    assert explorer.unit == "absolute"
    assert last(explorer, settings, vectors=["bare"], operator="add", coeff="2").status == "finished"


def test_numbers_as_a_page_sends_them_are_read(explorer: Explorer, settings: Settings) -> None:
    as_text = last(explorer, settings, coeff=" 1.0", layer="1", max_new_tokens="16")
    assert as_text == last(explorer, settings)


def test_a_view_is_plain_data(explorer: Explorer, settings: Settings) -> None:
    json.loads(json.dumps(asdict(last(explorer, settings)), allow_nan=False))


def test_vectors_of_another_model_and_unknown_arguments_are_refused(llama: Subject, vectors: Any, model: Any) -> None:
    with pytest.raises(SteerlensError):
        Explorer(llama.model, vectors)
    with pytest.raises(SteerlensError, match="got some of 'other'"):
        Explorer(model, vectors, arguments={"other": {}})
