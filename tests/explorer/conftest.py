"""Two vectors of the bundled model, and what a page's controls say at first."""

from typing import Any

import pytest

import steerlens as sl
from steerlens.explorer.runs import Explorer
from steerlens.explorer.settings import Settings
from steerlens.vectors.vector import SteeringVector
from tests.conftest import LOADED

TITLE, LOWERCASE = "detectable_format:title", "change_case:english_lowercase"


@pytest.fixture(scope="session")
def model() -> Any:
    loaded = sl.load_model("tiny")
    LOADED.append(loaded)
    return loaded


@pytest.fixture(scope="session")
def vectors(model: Any) -> dict[str, SteeringVector]:
    pairs = sl.load_pairs("tiny", instructions=[TITLE, LOWERCASE], n_queries=20)
    return sl.fit_vectors(model, pairs.by_instruction())


@pytest.fixture
def explorer(model: Any, vectors: dict[str, SteeringVector]) -> Explorer:
    return Explorer(model, vectors)


@pytest.fixture
def settings() -> Settings:
    return Settings("What is snow?", (TITLE,), layer=1, positions="prompt", max_new_tokens=16)
