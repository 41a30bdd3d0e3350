"""The names that the examples in docstrings use: built on first use, so that an example that needs no model loads none.

model, vector               the model "tiny", and its vector for answers in lower case
pairs, train, valid, test   its pairs for that instruction, and their split
acts                        activations of some training pairs
scores                      an evaluation's scores: six prompts, without steering and with the vector
queries                     three base queries
folder                      an empty folder
"""

import re
from functools import cache
from typing import Any

import pytest

import steerlens as sl
from steerlens.checks import registry

LOWERCASE = "change_case:english_lowercase"


@cache
def built(name: str) -> Any:
    """One of the names; each is built once per run."""
    if name in ("train", "valid", "test"):
        return dict(zip(("train", "valid", "test"), built("pairs").split(seed=0), strict=True))[name]
    return {
        "sl": lambda: sl,
        "model": lambda: sl.load_model("tiny"),
        "pairs": lambda: sl.load_pairs("tiny", instructions=LOWERCASE, n_queries=40),
        "acts": lambda: sl.record_activations(built("model"), built("train")[:8]),
        "vector": lambda: sl.fit_steering_vector(built("acts")),
        "scores": lambda: (
            sl.evaluate(
                built("model"),
                built("vector").at(4),
                built("test")[:6],
                conditions=["none", "vector"],
                max_new_tokens=16,
            ).scores
        ),
        "queries": lambda: ["What colour is snow?", "What is iron?", "Describe rain."],
    }[name]()


NAMES = ("sl", "model", "pairs", "train", "valid", "test", "acts", "vector", "scores", "queries")


@pytest.fixture(autouse=True)
def names_of_examples(
    request: pytest.FixtureRequest,
    doctest_namespace: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not isinstance(request.node, pytest.DoctestItem):
        return
    # What an example registers is gone after it: other tests count the checks.
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    source = " ".join(example.source for example in request.node.dtest.examples)
    doctest_namespace.clear()
    doctest_namespace.update({name: built(name) for name in NAMES if re.search(rf"\b{name}\b", source)})
    if "folder" in source:
        doctest_namespace["folder"] = tmp_path_factory.mktemp("example")
