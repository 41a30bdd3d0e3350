"""What a model can do is found out on the model: once, unseen by the caller's hooks, and again past a window."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerlens.errors import ModelError
from steerlens.models import probe
from steerlens.models.facts import attention_window
from steerlens.models.load import load_model
from steerlens.models.probe import Abilities, abilities
from steerlens.steering.sampling import generate
from tests.conftest import Subject, hooks_on
from tests.tiny_models import N_CTX
from tests.zoo import LONGEST, save_animal

ALL = Abilities(cache=True, batch=True, prefix=True, gaps=N_CTX)


def animal(name: str, folder: Path) -> Any:
    return load_model(save_animal(name, folder), progress=False)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The longest row of every probe from here on."""
    seen: list[int] = []
    real = probe._probe

    def spy(model: Any, longest: int) -> Abilities:
        seen.append(longest)
        return real(model, longest)

    monkeypatch.setattr(probe, "_probe", spy)
    return seen


def test_a_model_is_probed_once_and_again_where_rows_outgrow_the_probe(tiny: Subject, probed: list[int]) -> None:
    model = load_model(tiny.folder, progress=False)
    assert [abilities(model, width) for width in (5, 13, 14, 26, 5, 100)] == [ALL] * 6
    assert probed == [13, 26, 104]


def test_a_probe_is_no_longer_than_the_context(tmp_path: Path, probed: list[int]) -> None:
    model = load_model(save_animal("gpt2", tmp_path, n_positions=8), progress=False)
    assert abilities(model, 8) == replace(ALL, gaps=0)  # there is no room for one
    assert probed == [8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "settings", "gaps"),
    [
        ("gpt2", {}, LONGEST),
        ("llama", {}, LONGEST),
        ("mistral", {"sliding_window": 100}, 100),
        ("mistral", {"sliding_window": 40}, 0),  # too few columns to try it in
        ("gemma3", {"sliding_window": 100}, 100),
        ("llama4-chunked", {"attention_chunk_size": 100}, 100),
        ("mpt", {}, 0),
        ("bloom", {}, 2048),  # Hugging Face's counts tokens
    ],
)
def test_a_hidden_column_is_nothing_only_where_none_are_counted(
    tmp_path: Path, name: str, settings: dict[str, int], gaps: int, dtype: torch.dtype
) -> None:
    model = load_model(save_animal(name, tmp_path, **settings), dtype=dtype, progress=False)
    assert abilities(model, 13).gaps == gaps


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({}, math.inf),
        ({"layer_types": ["full_attention"], "sliding_window": None}, math.inf),
        ({"sliding_window": 16, "attention_chunk_size": 8}, 8),
        ({"layer_types": ["sliding_attention", "full_attention"]}, 0),  # of what size is not known
        ({"layer_types": ["linear_attention", "full_attention"], "sliding_window": 16}, 0),
    ],
)
def test_windows_are_as_wide_as_the_configuration_says(config: dict[str, Any], window: float) -> None:
    assert attention_window(config) == window


def test_a_model_in_another_dtype_is_probed_anew(tiny: Subject, probed: list[int]) -> None:
    model = load_model(tiny.folder, progress=False)
    abilities(model, 5)
    model.to(torch.bfloat16)
    assert abilities(model, 5) == ALL
    assert probed == [13, 13]


def test_attention_to_the_largest_so_many_keys_is_found_out_once_rows_have_more(tmp_path: Path) -> None:
    model = animal("glm-dsa", tmp_path)  # 24 keys
    assert abilities(model, 13) == Abilities(cache=True, batch=True)
    assert abilities(model, 40) == Abilities(cache=False, batch=False)


def test_rotary_scaling_of_one_kind_of_layer_counts(tmp_path: Path) -> None:
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    long = plain | {
        "rope_type": "longrope",
        "original_max_position_embeddings": 24,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
    }
    scaling = {"sliding_attention": plain, "full_attention": long}
    model = load_model(save_animal("gemma3", tmp_path, rope_parameters=scaling), progress=False)
    assert abilities(model, 24) == Abilities(cache=True, batch=True)  # its windows of 8 hold no prefix
    assert abilities(model, 25) == Abilities(cache=False, batch=False)


def test_short_memory_is_an_error_and_no_inability(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny.folder, progress=False)

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(probe, "_cached", full)
        with pytest.raises(torch.OutOfMemoryError):
            abilities(model, 5)
    assert abilities(model, 5) == ALL


def test_a_state_that_cannot_be_kept_as_a_cache_is_run_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = animal("mamba", tmp_path)
    with caplog.at_level("WARNING", logger="steerlens"):
        found = abilities(model, 20)
    assert found == Abilities(cache=False, batch=True)
    assert "runs whole rows for every new token, in batches" in caplog.text
    assert found.side == "right"
    assert found.batches([3, 5, 4], 2) == [[1, 2], [0]]


def test_rotary_scaling_that_depends_on_the_width_runs_rows_alone_past_its_length(tmp_path: Path) -> None:
    model = animal("phi3-longrope", tmp_path)  # its frequencies change after 24 tokens
    assert abilities(model, 24) == Abilities(cache=True, batch=True, prefix=True)
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
