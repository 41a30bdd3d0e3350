"""What a model can do is found out on the model: once, unseen by the caller's hooks, and again past a window."""

from pathlib import Path
from typing import Any

import pytest
import torch

from steerlens.errors import ModelError
from steerlens.models import probe
from steerlens.models.load import load_model
from steerlens.models.probe import Abilities, abilities
from steerlens.steering.sampling import generate
from tests.conftest import Subject, hooks_on
from tests.zoo import save_animal

ALL = Abilities(cache=True, batch=True)


def animal(name: str, folder: Path) -> Any:
    return load_model(save_animal(name, folder), progress=False)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The lengths of every probe from here on."""
    seen: list[tuple[int, int]] = []
    real = probe._probe

    def spy(model: Any, lengths: tuple[int, int]) -> Abilities:
        seen.append(lengths)
        return real(model, lengths)

    monkeypatch.setattr(probe, "_probe", spy)
    return seen


def test_a_model_is_probed_once(tiny: Subject, probed: list[tuple[int, int]]) -> None:
    model = load_model(tiny.folder, progress=False)
    assert [abilities(model, width) for width in (5, 100, 5)] == [ALL] * 3
    assert probed == [probe.LENGTHS]


def test_a_model_with_a_window_is_probed_again_where_rows_outgrow_it(
    tmp_path: Path, probed: list[tuple[int, int]]
) -> None:
    model = animal("mistral", tmp_path)  # its window is 8
    assert [abilities(model, width) for width in (8, 9, 40, 8)] == [ALL] * 4
    assert probed == [(13, 6), (21, 6)]


def test_a_state_that_cannot_be_kept_as_a_cache_is_run_whole(tmp_path: Path) -> None:
    model = animal("mamba", tmp_path)
    found = abilities(model, 20)
    assert found == Abilities(cache=False, batch=True)
    assert found.side == "right"
    assert found.batches([3, 5, 4], 2) == [[1, 2], [0]]


def test_rotary_scaling_that_depends_on_the_width_runs_rows_alone_past_its_length(tmp_path: Path) -> None:
    model = animal("phi3-longrope", tmp_path)  # its frequencies change after 24 tokens
    assert abilities(model, 24) == ALL
    alone = abilities(model, 25)
    assert alone == Abilities(cache=False, batch=False)
    assert alone.batches([3, 5, 4], 2) == [[1], [2], [0]]


def test_a_way_that_gives_something_else_is_not_gone(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache whose rows come back in another order than they were asked for."""
    from steerlens.models.backends import BridgeCache

    model = load_model(tiny.folder, progress=False)
    real = BridgeCache.select
    monkeypatch.setattr(BridgeCache, "select", lambda self, keep: real(self, keep.flip(0)))
    assert abilities(model, 10) == Abilities(cache=False, batch=True)


def test_the_callers_hooks_neither_see_a_probe_nor_change_it(tiny: Subject) -> None:
    model = load_model(tiny.folder, progress=False)
    seen: list[str] = []

    def mine(resid: torch.Tensor, hook: Any) -> torch.Tensor:
        seen.append(hook.name)
        resid = resid.clone()
        resid[:, -1] = 0.0  # another token for each way of padding
        return resid

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", mine)]):
        before = hooks_on(model)
        assert abilities(model, 10) == ALL
        assert seen == []
        assert hooks_on(model) == before
        model(torch.tensor([[5, 6]]))
    assert len(seen) == 1
    assert hooks_on(model) == []


def test_a_model_that_does_not_run_is_refused_by_name_and_reason(
    tiny: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny.folder, progress=False)

    def broken(*args: Any, **options: Any) -> Any:
        raise AttributeError("no attribute 'rotary_emb'")

    monkeypatch.setattr(model.original_model, "forward", broken)
    with pytest.raises(ModelError, match=rf"{tiny.folder.name} does not: AttributeError: no attribute 'rotary_emb'"):
        generate(model, ["a"], max_new_tokens=1)
    assert hooks_on(model) == []
