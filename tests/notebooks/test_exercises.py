"""Checks of exercises: several right answers pass, wrong ones are told why, and whatever comes, nothing is raised."""

import inspect
import re
from typing import Any

import exercises
import pytest
import torch
from exercises import Verdict

from tests.notebooks.rules import FOLDER

CHECKS = {name: function for name, function in vars(exercises).items() if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize(
    "answer", [..., None, 0, "", [], {}, [...], {"a": ...}, lambda *_: ..., object(), float("nan")]
)
def test_whatever_comes_a_check_gives_a_verdict(name: str, answer: Any) -> None:
    given = [None] * (len(inspect.signature(inspect.unwrap(CHECKS[name])).parameters) - 1)
    verdict = CHECKS[name](answer, *given)
    assert isinstance(verdict, Verdict)
    assert verdict or verdict.hint
    assert not (verdict and exercises._has_dots(answer))


def test_every_notebook_stands_in_the_syllabus() -> None:
    syllabus = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in FOLDER.glob("*.ipynb") if f"]({path.name})" not in syllabus] == []


@pytest.mark.parametrize(
    "answer",
    [
        lambda resid: resid[:, 1].mean(0) - resid[:, 0].mean(0),
        lambda resid: (resid[:, 1] - resid[:, 0]).mean(0),
        lambda resid: resid.mean(0)[1] - resid.mean(0)[0],
        lambda resid: resid.diff(dim=1).mean(dim=(0, 1)),
    ],
)
def test_every_way_to_the_difference_of_means_is_right(answer: Any) -> None:
    assert exercises.check_01_1(answer)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda resid: resid[:, 0].mean(0) - resid[:, 1].mean(0), "the other way"),
        (lambda resid: resid[:, 1] - resid[:, 0], r"has the shape \[7\], and this one is \[5, 7\]"),
        (lambda resid: resid[:, 1].mean(0), "the shape is right"),
        (lambda resid: resid[:, 2], "IndexError"),
    ],
)
def test_a_wrong_difference_of_means_is_told_why(answer: Any, hint: str) -> None:
    verdict = exercises.check_01_1(answer)
    assert not verdict
    assert re.search(hint, verdict.hint)


def replaced(h: torch.Tensor, u: torch.Tensor, z: float) -> torch.Tensor:
    h -= (h @ u)[..., None] * u
    return h.add_(z * u)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda h, u, z: h + z * u, "not z at every token"),
        (lambda h, u, z: (z * u).expand_as(h), "across u"),
        (lambda h, u, z: (h + (z - h @ u)[..., None] * u)[0], "the shape of what came in"),
        (replaced, "in place"),
    ],
)
def test_a_wrong_projection_is_told_why(answer: Any, hint: str) -> None:
    verdict = exercises.check_01_2(answer)
    assert not verdict
    assert re.search(hint, verdict.hint)


def test_projections_by_einsum_and_by_parts_are_right() -> None:
    assert exercises.check_01_2(lambda h, u, z: h + (z - torch.einsum("bpd,d->bp", h, u))[..., None] * u)
    assert exercises.check_01_2(lambda h, u, z: h - torch.outer(h.flatten(0, 1) @ u, u).view(h.shape) + z * u)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda direction, unembedding, k: (direction @ unembedding).topk(k).indices, "the promoted ones"),
        (lambda direction, unembedding, k: (direction @ unembedding).argsort()[:k].flip(0), "another order"),
        (lambda direction, unembedding, k: (direction @ unembedding).argsort(), "four ids"),
        (lambda direction, unembedding, k: unembedding.sum(0).argsort()[:k], "whose are the lowest"),
    ],
)
def test_other_tokens_than_the_suppressed_are_told_why(answer: Any, hint: str) -> None:
    verdict = exercises.check_02_1(answer)
    assert not verdict
    assert re.search(hint, verdict.hint)


def test_lists_of_suppressed_tokens_are_right() -> None:
    assert exercises.check_02_1(
        lambda direction, unembedding, k: (-direction @ unembedding).argsort(descending=True)[:k].tolist()
    )
