"""Pictures of planted clusters, and the same picture whatever rotates between layers."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA

from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import SteerlensError
from steerlens.reading.embedding import aligned, embed
from steerlens.vectors.activations import Activations
from tests.reading.points import activations, planted, reordered
from tests.unchecked import unchecked


def rotation(d_model: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d_model, d_model)))[0]


def turned_between_layers(noise: float = 1.0) -> Activations:
    """The same differences at two layers, but for a rotation of the residual stream."""
    one = planted(layers=(0,), noise=noise).differences[:, 0].double().numpy()
    both = np.stack([one, one @ rotation(one.shape[1])], axis=1)
    return activations(both, list(planted().instructions), list(planted().prompt_ids))


def layer(table: pd.DataFrame, number: int) -> np.ndarray:
    rows = table[table["layer"] == number]
    return rows[[axis for axis in "xyz" if axis in rows]].to_numpy()


def shares(acts: Activations) -> pd.DataFrame:
    found = embed(acts, method="pca").explained
    assert found is not None
    return found


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.parametrize("n_components", [2, 3])
def test_planted_clusters_lie_apart(method: str, n_components: int) -> None:
    found = unchecked(embed)(planted(), method=method, n_components=n_components, perplexity=6)
    assert list(found.table.columns[4:]) == list("xyz"[:n_components])
    for number in (2, 5):
        points = layer(found.table, number)
        apart = np.linalg.norm(points[:, None] - points, axis=2)
        names = np.array(planted().instructions)
        assert (names[(apart + np.diag(np.full(24, np.inf))).argmin(axis=1)] == names).all()


def test_a_rotation_between_layers_gives_the_same_pca() -> None:
    found = embed(turned_between_layers(), method="pca").table
    assert layer(found, 1) == pytest.approx(layer(found, 0), abs=1e-4)


def test_a_rotation_between_layers_gives_nearly_the_same_t_sne() -> None:
    found = embed(turned_between_layers(), perplexity=8).table
    before, after = layer(found, 0), layer(found, 1)
    moved = np.linalg.norm(after - before, axis=1).mean() / np.linalg.norm(before, axis=1).mean()
    assert moved < 0.05


def test_alignment_undoes_a_planted_rotation_and_reflection_and_never_stretches() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(20, 3))
    points -= points.mean(axis=0)
    mirror = rotation(3) @ np.diag([1.0, 1.0, -1.0])
    assert aligned(points @ mirror + 7, points) == pytest.approx(points)
    unlike = aligned(points, rng.normal(size=(20, 3)))
    assert np.linalg.norm(unlike, axis=1) == pytest.approx(np.linalg.norm(points, axis=1))


def test_pca_is_the_plane_of_the_largest_variance_whatever_way_it_is_turned() -> None:
    acts = planted()
    found, explained = embed(acts, method="pca"), shares(acts).set_index("layer")
    for index, number in enumerate(acts.layers):
        fitted = PCA(2).fit(acts.differences[:, index].numpy())
        scores = fitted.transform(acts.differences[:, index].numpy())
        gram = layer(found.table, number) @ layer(found.table, number).T
        assert gram == pytest.approx(scores @ scores.T, abs=1e-2)
        assert explained.loc[number, "value"] == pytest.approx(fitted.explained_variance_ratio_.sum(), rel=1e-4)


def test_the_share_of_noise_is_that_of_random_directions_and_the_share_of_clusters_is_not() -> None:
    clusters, noise = (shares(planted(layers=(0,), n_queries=40, size=size)).iloc[0] for size in (6.0, 0.0))
    assert noise["value"] == pytest.approx(noise["control"], rel=0.1)
    assert clusters["low"] > 2 * clusters["control"]
    assert clusters["low"] < clusters["value"] < clusters["high"]


def test_a_few_long_differences_hold_as_much_of_the_controls_variance() -> None:
    """Of noise, in which two pairs are so much longer than the others that they span the plane."""
    noise = np.random.default_rng(0).normal(size=(40, 1, 20))
    noise[:2] *= 30
    found = shares(activations(noise, ["a:a"] * 40, [f"q{i}" for i in range(40)])).iloc[0]
    assert found["value"] > 0.9
    assert found["control"] == pytest.approx(found["value"], abs=0.05)


def test_another_order_of_the_pairs_changes_no_point() -> None:
    acts = planted()
    other = reordered(acts, np.random.default_rng(0).permutation(len(acts)))
    tables = [embed(each, method="pca").table for each in (acts, other)]
    one, two = (table.sort_values(["layer", "instruction", "prompt_id"])[["x", "y"]].to_numpy() for table in tables)
    assert two == pytest.approx(one, abs=1e-4)
    assert shares(other).to_numpy() == pytest.approx(shares(acts).to_numpy(), rel=1e-5)


def test_an_instruction_under_two_names_lies_on_itself() -> None:
    differences = planted(instructions=("a:one", "b:two")).differences.numpy()
    differences[8:] = differences[:8]
    names = ["a:one"] * 8 + ["b:two"] * 8
    acts = activations(differences, names, [f"q{number}" for number in range(8)] * 2)
    table = embed(acts, method="pca", layers=0).table
    assert layer(table, 0)[:8] == pytest.approx(layer(table, 0)[8:], abs=1e-4)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_layer_at_which_nothing_differs_is_one_point_and_the_next_one_is_drawn(method: str) -> None:
    acts = planted()
    acts.resid[:, 1, 0] = acts.resid[:, 0, 0]
    found = unchecked(embed)(acts, method=method, perplexity=6)
    assert not layer(found.table, 2).any()
    alone = unchecked(embed)(acts, method=method, perplexity=6, layers=5)
    assert layer(found.table, 5) == pytest.approx(layer(alone.table, 5))
    if method == "pca":
        assert np.isnan(found.explained["value"]).tolist() == [True, False]


def test_points_carry_the_query_of_their_pair() -> None:
    pairs = PairSet(
        InstructionPair(f"What is {word}?", "No commas.", "a:b") for word in ("rain", "snow", "tea", "iron")
    )
    resid = torch.randn(4, 2, 1, 8, generator=torch.Generator().manual_seed(0))
    ids = tuple(pair.prompt_id for pair in pairs)
    table = embed(Activations(resid, (3,), ids, ("a:b",) * 4, pairs=pairs), method="pca").table
    assert table["query"].tolist() == ["What is rain?", "What is snow?", "What is tea?", "What is iron?"]
    assert table["prompt_id"].tolist() == list(ids)


def test_perplexity_is_the_papers_or_a_third_of_few_pairs() -> None:
    assert embed(planted(), layers=2).perplexity == pytest.approx(23 / 3)
    assert embed(planted(), layers=2, method="pca").perplexity is None


def test_the_same_seed_gives_the_same_picture() -> None:
    one, two = (embed(planted(), layers=2, seed=3).table for _ in range(2))
    pd.testing.assert_frame_equal(one, two)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"perplexity": 24},
            "perplexity must be above 0 and below the number of pairs, 24, got 24; it counts neighbours",
        ),
        ({"perplexity": 0}, "perplexity must be above 0 and below the number of pairs, 24, got 0"),
        ({"perplexity": float("nan")}, "perplexity must be a finite number, got nan"),
        ({"method": "umap"}, 'an embedding is "tsne" or "pca" in 2 or 3 dimensions, got \'umap\' in 2'),
        ({"n_components": 4}, "in 2 or 3 dimensions, got 'tsne' in 4"),
        ({"layers": 9}, r"layers must be among the recorded \[2, 5\], got \[9\]"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(SteerlensError, match=message):
        unchecked(embed)(planted(), **options)


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(SteerlensError, match="in 3 dimensions needs at least 4 pairs, got 3; record more"):
        embed(planted()[:3], n_components=3)


def test_the_picture_says_how_it_was_made() -> None:
    acts = planted()
    assert "t-SNE, perplexity 6" in embed(acts, layers=2, perplexity=6).plot().layout.title.subtitle.text
    fig = embed(acts, method="pca").plot(title="mine")
    assert "of the variance; random directions" in fig.layout.title.subtitle.text
    assert fig.layout.title.text == "mine"
    assert [trace.name for trace in fig.data] == ["one", "two", "three"]
