"""Models whose readouts differ: with a softcap, with tied embeddings, with a planted answer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steerlens.models.load import load_model
from tests.conftest import LOADED, Subject
from tests.planted import save_planted
from tests.zoo import ZOO, save_animal

Animals = Callable[[str], Subject]


def _loaded(name: str, folder: Path) -> Subject:
    subject = Subject(name, folder, load_model(folder, progress=False))
    LOADED.append(subject.model)
    return subject


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The planted model."""
    return _loaded("planted", save_planted(tmp_path_factory.mktemp("planted") / "planted")).model


@pytest.fixture(scope="session")
def animals(tmp_path_factory: pytest.TempPathFactory, subjects: dict[str, Subject]) -> Animals:
    """Models of the zoo, and the two tiny ones, by name; each is built once."""
    built = dict(subjects)

    def animal(name: str) -> Subject:
        if name not in built:
            assert name in ZOO
            built[name] = _loaded(name, save_animal(name, tmp_path_factory.mktemp(name) / name))
        return built[name]

    return animal
