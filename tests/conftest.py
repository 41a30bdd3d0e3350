"""Fixtures: tiny seeded models of two families, the real small model where it can be had, and a guard against left hooks."""

import os

# Before torch and transformers are imported: tests never reach for the network, and one thread is fastest at this size.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from steerlens.errors import ModelError
from steerlens.models import choice, probe as probing
from steerlens.models.load import load_model
from steerlens.models.passes import PassResult, Runner
from steerlens.models.rows import Rows
from tests.hooked import hooked_transformer
from tests.near_ties import LEDGER
from tests.tiny_models import save_tiny_gpt2, save_tiny_llama

BUILDERS = {"llama": save_tiny_llama, "gpt2": save_tiny_gpt2}
LOADED: list[Any] = []
"""Every model that a fixture handed out; the guard below looks at all of them."""


@dataclass(frozen=True)
class Subject:
    """A model under test: its folder, its bridge, and the same weights as a raw Hugging Face model for the oracle."""

    name: str
    folder: Path
    model: Any

    @cached_property
    def hf(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, local_files_only=True).eval()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--hooked",
        action="store_true",
        help="run tests of the tiny models on HookedTransformers, under TransformerLens 3",
    )


def _subject(name: str, folder: Path, *, hooked: bool) -> Subject:
    subject = Subject(name, folder, hooked_transformer(folder) if hooked else load_model(folder))
    LOADED.append(subject.model)
    return subject


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: build(root / name) for name, build in BUILDERS.items()}


@pytest.fixture(scope="session")
def subjects(tiny_folders: dict[str, Path], request: pytest.FixtureRequest) -> dict[str, Subject]:
    hooked = request.config.getoption("--hooked")
    return {name: _subject(name, folder, hooked=hooked) for name, folder in tiny_folders.items()}


@pytest.fixture(params=BUILDERS)
def tiny(request: pytest.FixtureRequest, subjects: dict[str, Subject]) -> Subject:
    """Each tiny model in turn."""
    return subjects[request.param]


@pytest.fixture
def llama(subjects: dict[str, Subject]) -> Subject:
    return subjects["llama"]


@pytest.fixture
def gpt2(subjects: dict[str, Subject]) -> Subject:
    return subjects["gpt2"]


@pytest.fixture(scope="session")
def smollm2() -> Subject:
    """The real 135M model, or a skip that says why not."""
    try:
        model = load_model("smollm2-135m", progress=False)
    except ModelError as error:
        pytest.skip(f"smollm2-135m cannot be had here: {error}")
    LOADED.append(model)
    return Subject("smollm2-135m", Path(model.cfg.model_name), model)


def hooks_on(model: Any) -> list[str]:
    """Names of the hook points that carry a hook, and of the plain modules below them that do."""
    points = [name for name, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]
    known = model.__dict__.get(choice.KNOWN)
    tree = known.tree if known is not None else None
    modules = [] if tree is None else list(tree.root.named_modules())
    return points + [
        name
        for name, module in modules
        if module._forward_hooks or module._forward_pre_hooks or module.__dict__.get("steerlens_hooks")
    ]


Passes = list[tuple[Rows, torch.Tensor]]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """The rows and the logits of every pass from here on, but for those that find out what a model can do."""
    seen: Passes = []
    run = Runner.run
    probes = 0

    def spy(self: Runner, rows: Rows, **options: Any) -> PassResult:
        result = run(self, rows, **options)
        if not probes:
            seen.append((rows, result.logits.clone()))
        return result

    def unseen(probe: Callable[..., Any]) -> Callable[..., Any]:
        def run_unseen(*args: Any) -> Any:
            nonlocal probes
            probes += 1
            try:
                return probe(*args)
            finally:
                probes -= 1

        return run_unseen

    monkeypatch.setattr(Runner, "run", spy)
    for name in ("_probe", "_try_parting"):
        monkeypatch.setattr(probing, name, unseen(getattr(probing, name)))
    return seen


@pytest.fixture(autouse=True)
def models_are_clean() -> Iterator[None]:
    """After every test, whatever happened in it, no model has a hook left."""
    yield
    left = {str(model.cfg.model_name): hooks_on(model) for model in LOADED if hooks_on(model)}
    for model in LOADED:
        model.reset_hooks()  # one test's leak is not the next one's failure
    assert not left, f"hooks are left on {left}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands its ledger to the process that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["ledger"] = [LEDGER.rows, LEDGER.tokens, LEDGER.ties]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    LEDGER.add(*getattr(node, "workeroutput", {}).get("ledger", (0, 0, ())))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LEDGER.rows:
        terminalreporter.write_line(f"greedy rows against the plain loop: {LEDGER}")
