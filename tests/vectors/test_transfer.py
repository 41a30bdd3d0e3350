"""Ridge maps between models: a planted map is found, and vectors go through it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import DataError, SteerlensError
from steerlens.vectors.activations import Activations, record_activations
from steerlens.vectors.estimators import fit_steering_vector
from steerlens.vectors.transfer import fit_ridge_map, matched_layers


def activations(n: int, *, width: int = 6, layers: int = 2, seed: int = 0, n_layers: int = 2) -> Activations:
    resid = torch.randn(n, 2, layers, width, generator=torch.Generator().manual_seed(seed))
    resid[:, 1] += torch.arange(width) / width  # the instruction's direction
    ids = tuple(f"{seed} {i}" for i in range(n))
    return Activations(resid, tuple(range(layers)), ids, ("a:a",) * n, {"n_layers": str(n_layers), "model": "source"})


def planted(source: Activations, weight: torch.Tensor, noise: float = 0.0) -> Activations:
    resid = source.resid @ weight + 3.0
    resid = resid + noise * torch.randn(resid.shape, generator=torch.Generator().manual_seed(9))
    return replace(source, resid=resid, metadata={"n_layers": "2", "model": "target"})


@pytest.fixture
def weight():
    return torch.randn(6, 9, generator=torch.Generator().manual_seed(5))


def test_a_planted_map_is_found_and_fits_unseen_texts(weight):
    train, test = activations(200), activations(50, seed=1)
    found = fit_ridge_map(train, planted(train, weight))
    scores = found.scores(test, planted(test, weight))
    assert (scores["r2"] > 0.9999).all()
    assert torch.allclose(found.weights[1], weight, atol=0.01)


def test_unrelated_residuals_have_no_r2_on_unseen_texts_and_a_strong_penalty():
    train, test = activations(40), activations(40, seed=1)
    noise_train, noise_test = (
        replace(activations(40, seed=s), prompt_ids=a.prompt_ids) for s, a in ((7, train), (8, test))
    )
    unrelated = replace(noise_train, resid=torch.randn(40, 2, 2, 6, generator=torch.Generator().manual_seed(3)))
    found = fit_ridge_map(train, unrelated)
    assert (found.scores(test, noise_test)["r2"] < 0.1).all()
    assert min(found.alphas.values()) >= 1.0


def test_copies_of_a_text_do_not_weaken_the_penalty():
    """Twelve copies of each row, unrelated to the target: leaving one copy out must not look like a good fit."""
    source = activations(30, width=24)
    target = replace(source, resid=torch.randn(30, 2, 2, 8, generator=torch.Generator().manual_seed(2)))
    once = fit_ridge_map(source, target)
    copies = [
        replace(
            one, resid=one.resid.repeat(12, 1, 1, 1), prompt_ids=one.prompt_ids * 12, instructions=one.instructions * 12
        )
        for one in (source, target)
    ]
    assert fit_ridge_map(*copies).alphas == pytest.approx(once.alphas)
    assert min(once.alphas.values()) >= 0.1


def test_a_mapped_vector_is_the_maps_image_with_projections_in_the_targets_units(weight):
    source = activations(300)
    target = planted(source, weight, noise=0.01)
    mapped = fit_steering_vector(fit_ridge_map(source, target).transform(source))
    own, origin = fit_steering_vector(target), fit_steering_vector(source)
    assert mapped.metadata["model"] == "target"
    assert mapped.metadata["mapped_from"] == "source"
    for layer in (0, 1):
        assert torch.allclose(mapped.directions[layer], weight.T @ origin.directions[layer], atol=0.02)
        assert mapped.cosine(own)[layer] > 0.999
        assert mapped.proj_with[layer] == pytest.approx(own.proj_with[layer], abs=0.05)


def test_layers_are_matched_by_their_share_of_the_depth():
    deep = activations(3, layers=12, n_layers=12)
    shallow = activations(3, layers=4, n_layers=4)
    assert matched_layers(shallow.layers, deep, shallow) == {0: 2, 1: 5, 2: 8, 3: 11}
    assert matched_layers([11, 0], shallow, deep) == {11: 3, 0: 0}


def test_a_vector_crosses_architectures(llama, gpt2):
    pairs = PairSet(
        InstructionPair(f"Say {word}.", "Use capitals.", "a:a")
        for word in ["one", "two", "three", "four", "five", "six"]
    )
    source, target = (record_activations(one.model, pairs) for one in (llama, gpt2))
    vector = fit_steering_vector(fit_ridge_map(source, target).transform(source))
    vector.check_fits(gpt2.model)
    assert vector.layers == (0, 1, 2, 3)


def test_other_texts_layers_and_widths_are_refused(weight):
    source = activations(5)
    target = planted(source, weight)
    with pytest.raises(DataError, match="the same texts in the same order"):
        fit_ridge_map(source, replace(target, prompt_ids=target.prompt_ids[::-1]))
    with pytest.raises(SteerlensError, match=r"one that was recorded, \[0, 1\], got 7"):
        fit_ridge_map(source, target, layers=[7])
    with pytest.raises(SteerlensError, match="the map reads residuals of width 6, got 9"):
        fit_ridge_map(source, target).transform(target)


def test_copies_of_a_text_are_found_however_another_batch_rounded_them():
    """Every copy has rounding of its own; a penalty that took them for other texts would be weak."""
    source = activations(30, width=24)
    target = replace(source, resid=torch.randn(30, 2, 2, 8, generator=torch.Generator().manual_seed(2)))
    copies = [
        replace(
            one, resid=one.resid.repeat(12, 1, 1, 1), prompt_ids=one.prompt_ids * 12, instructions=one.instructions * 12
        )
        for one in (source, target)
    ]
    noise = 1e-6 * torch.randn(copies[0].resid.shape, generator=torch.Generator().manual_seed(7))
    copies[0] = replace(copies[0], resid=copies[0].resid + noise)
    once, often = fit_ridge_map(source, target), fit_ridge_map(*copies)
    assert once.alphas == pytest.approx(often.alphas, rel=1e-3)


def test_target_layers_may_be_an_array_and_each_needs_its_source(weight):
    source = activations(20)
    found = fit_ridge_map(source, planted(source, weight), layers=np.array([1]), source_layers={np.int64(1): 0.0})
    assert dict(found.source_layers) == {1: 0}
    with pytest.raises(SteerlensError, match=r"must name a source layer for each target layer, got none for \[0\]"):
        fit_ridge_map(source, planted(source, weight), source_layers={1: 1})
