"""The embedded models: small, offline, and able to do what their card says, by a loose margin.

The exact figures are in `analysis/tiny_card.md`; these tests answer fewer prompts and ask for less.
"""

import pytest
import tiny_card as card
import tiny_corpus as tc
import train_tiny as tt
from safetensors import safe_open

import steerlens as sl
from steerlens.data.load import bundled_queries
from steerlens.models.load import BUNDLED, NAMED_MODELS
from steerlens.study.quality import Quality
from tests.conftest import LOADED

NAMES = tuple(name for name, model in NAMED_MODELS.items() if not model.hub_id)
CARRIED = ("lowercase", "no_comma", "title", "quotation", "spanish")  # what a vector alone brings about in tiny


@pytest.fixture(scope="module")
def models() -> dict[str, object]:
    loaded = {name: sl.load_model(name, progress=False) for name in NAMES}
    LOADED.extend(loaded.values())
    return loaded


def rates(model: object, names: tuple[str, ...], conditions: list[str], n: int = 8) -> dict[str, dict[str, float]]:
    """Share of held-out prompts followed, per instruction and condition; vectors act at layer 2, on the last token."""
    vectors = card.fit(model, names, 24)
    found = {}
    for name in names:
        pairs, _ = card.pairs_of("heldout", name, 5, n)
        plan = vectors[name].at(2, coeff=1.0, positions="last")
        scores = sl.evaluate(
            model,
            plan,
            pairs,
            conditions=conditions,
            max_new_tokens=100,
            batch_size=64,
            quality=Quality(perplexity=False),
        ).scores
        found[name] = dict(scores.groupby("condition")["followed"].mean())
    return found


def mean(found: dict[str, dict[str, float]], condition: str) -> float:
    return sum(one[condition] for one in found.values()) / len(found)


@pytest.mark.parametrize("name", NAMES)
def test_an_embedded_model_is_at_most_8_megabytes_of_half_precision(name: str) -> None:
    folder = BUNDLED / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8_000_000
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}  # noqa: SIM118
    assert f"# {name}" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_instruct_models_and_their_base_have_one_architecture_and_tokenizer(models: dict[str, object]) -> None:
    base = models["tiny-base"]
    for model in models.values():
        assert model.cfg.n_layers == base.cfg.n_layers == 8
        assert model.cfg.d_model == base.cfg.d_model
        assert model.tokenizer.get_vocab() == base.tokenizer.get_vocab()


def test_the_bundled_queries_are_held_out_questions() -> None:
    assert list(bundled_queries("tiny")) == tt.heldout_queries()


def test_tiny_follows_instructions_in_the_prompt_and_not_without_them(models: dict[str, object]) -> None:
    found = rates(models["tiny"], (*CARRIED, "uppercase", "json", "constrained"), ["none", "text"])
    assert mean(found, "text") > 0.65
    assert mean(found, "none") < 0.15


def test_vectors_alone_carry_instructions_in_tiny_and_a_random_direction_does_not(models: dict[str, object]) -> None:
    found = rates(models["tiny"], CARRIED, ["vector", "random"])
    assert mean(found, "vector") > 0.6
    assert mean(found, "random") < 0.2


def test_the_base_model_knows_the_world_and_follows_no_instruction(models: dict[str, object]) -> None:
    found = rates(models["tiny-base"], ("title", "uppercase", "json"), ["text"])
    assert mean(found, "text") < 0.1
    pairs, examples = card.pairs_of("heldout", "lowercase", 5, 24)
    rows = sl.generate(models["tiny-base"], pairs.prompts("none"), max_new_tokens=60, batch_size=24)
    told = [tc.true_facts(row.text, examples[pair.prompt_id].entity) for row, pair in zip(rows, pairs, strict=True)]
    assert sum(map(bool, told)) >= 16
