"""The readout of the last residual is the model's own logits, or the model is refused."""

import sys
from pathlib import Path

import pytest
import torch

from steerlens.errors import ModelError
from steerlens.models.facts import resid_post
from steerlens.models.load import load_model
from steerlens.models.passes import Read, run_pass
from steerlens.models.prompts import encode_all
from steerlens.models.rows import pad
from steerlens.reading import readout
from steerlens.reading.readout import check_readout, iter_logits, ranks
from tests.conftest import Passes, Subject
from tests.reading.conftest import Animals
from tests.tiny_models import D_MODEL
from tests.zoo import save_animal

PROMPTS = ["Describe rain.", "Why?", "Name a river in the north."]
READOUTS = ["llama", "gpt2", "gemma2", "llama-tied", "cohere", "granite", "phi", "mamba"]
"""RMSNorm, LayerNorm with biases, a softcap, tied embeddings, two kinds of scaled logits, a bias after them, no attention."""


def last_resid(subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    """The last residuals of each prompt's tokens, one after another, and Hugging Face's own logits there."""
    site, resid, logits = resid_post(3), [], []
    for ids in encode_all(subject.model, PROMPTS):
        resid.append(run_pass(subject.model, pad([ids]), reads=[Read(site, "all")]).reads[site][0])
        with torch.no_grad():
            logits.append(subject.hf(torch.tensor([ids]), use_cache=False).logits[0])
    return torch.cat(resid), torch.cat(logits)


def read(subject: Subject, resid: torch.Tensor, *, raw: bool = False) -> torch.Tensor:
    check_readout(subject.model)
    return torch.cat([logits for _, logits in iter_logits(subject.model, resid, raw=raw)])


@pytest.mark.parametrize("name", READOUTS)
def test_the_last_residual_gives_hugging_faces_own_logits(animals: Animals, name: str) -> None:
    resid, logits = last_resid(animals(name))
    assert (read(animals(name), resid) - logits).abs().max() < 1e-4


def test_a_raw_readout_is_the_unembedding_alone(gpt2: Subject) -> None:
    resid, logits = last_resid(gpt2)
    expected = resid.double() @ gpt2.hf.lm_head.weight.detach().double().T
    assert torch.allclose(read(gpt2, resid, raw=True).double(), expected, atol=1e-4)
    assert not torch.allclose(expected.float(), logits, atol=0.1)


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_chunks_hold_as_many_rows_as_their_memory_allows_and_change_nothing(
    llama: Subject, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    resid, logits = last_resid(llama)
    monkeypatch.setattr(readout, "CHUNK_MEMORY", 4 * 260 * rows)
    chunks = list(iter_logits(llama.model, resid))
    assert max(len(chunk) for _, chunk in chunks) == min(rows, len(resid))
    for where, chunk in chunks:
        assert (chunk - logits[where]).abs().max() < 1e-4


def test_a_model_is_checked_once(tmp_path: Path, passes: Passes) -> None:
    model = load_model(save_animal("llama", tmp_path / "llama"), progress=False)
    check_readout(model)
    check_readout(model)
    assert len(passes) == 1


def test_a_model_in_training_mode_is_read_without_dropout_and_stays_in_it(tmp_path: Path) -> None:
    model = load_model(save_animal("gpt2", tmp_path / "gpt2"), progress=False)
    resid = torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(0))
    (_, quiet), *_ = iter_logits(model, resid)
    model.train()
    check_readout(model)
    (_, loud), *_ = iter_logits(model, resid)
    assert torch.equal(quiet, loud)
    assert model.training


def test_a_model_with_a_projection_after_its_last_block_is_refused(tmp_path: Path) -> None:
    model = load_model(
        save_animal("opt", tmp_path / "opt", word_embed_proj_dim=16, do_layer_norm_before=False), progress=False
    )
    with pytest.raises(
        ModelError, match=r"a lens needs a model whose last residual goes through one norm and one unembedding"
    ):
        check_readout(model)


def test_a_model_whose_logits_are_capped_in_a_way_that_is_unknown_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(save_animal("gemma2", tmp_path / "gemma2"), progress=False)
    monkeypatch.setattr(model.adapter, "apply_output_logits_transform", lambda logits: logits)
    with pytest.raises(
        ModelError, match=r"for gemma2 that misses the model's own log-probabilities by up to [\d.]+ of [\d.]+;"
    ):
        check_readout(model)


def test_a_transformer_lens_without_the_readout_is_refused_in_a_sentence(
    llama: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformer_lens.tools.analysis.logit_lens", None)
    with pytest.raises(
        ModelError, match=r"a lens needs the readout that TransformerLens has since version 4\.3, got [\d.]+;"
    ):
        list(iter_logits(llama.model, torch.zeros(1, D_MODEL)))


def test_a_rank_counts_the_larger_values_of_its_row() -> None:
    values = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    assert ranks(values, values).tolist() == [[3, 0, 2, 0]]
    assert ranks(values, values[:, []]).shape == (1, 0)
