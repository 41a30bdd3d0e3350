"""TransformerLens 3's HookedTransformer: what it does beside the bridge, in which coordinates, and what is asked of its files.

`make compat` runs these, and the tests of passes, sampling, recording and scores with `--hooked`, where the oracle is the plain
loop over the raw Hugging Face model.
"""

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from steerlens.data.load import load_pairs
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import ModelError, SteerlensError
from steerlens.models.facts import (
    coordinate_frame,
    forbidden_ids,
    model_device,
    model_digest,
    model_facts,
    model_id,
    resid_post,
    stop_ids,
)
from steerlens.models.load import BUNDLED, load_model
from steerlens.models.passes import Read, run_pass
from steerlens.models.probe import Abilities, abilities
from steerlens.models.prompts import PromptFormat, encode
from steerlens.models.rows import pad
from steerlens.reading.attribution import attribute
from steerlens.reading.effects import vector_effects
from steerlens.reading.embedding import embed
from steerlens.reading.lens import prompt_lens
from steerlens.reading.patching import patch
from steerlens.reading.vocabulary import logit_lens
from steerlens.steering.edits import steer
from steerlens.steering.sampling import SamplingConfig, generate
from steerlens.study.config import RunConfig
from steerlens.study.job import run
from steerlens.study.layers import steer_by_layer
from steerlens.vectors.activations import record_activations
from steerlens.vectors.estimators import fit_steering_vector
from steerlens.vectors.vector import SteeringVector
from tests.conftest import Subject, hooks_on
from tests.hooked import hooked_transformer
from tests.near_ties import assert_same_text
from tests.reference.plain_loop import plain_greedy
from tests.steps import as_plan, step, unit
from tests.tiny_models import N_CTX, byte_tokenizer, save_llama
from tests.zoo import save_animal

pytestmark = pytest.mark.skipif(
    not importlib.metadata.version("transformer-lens").startswith("3."),
    reason="TransformerLens 4 has no HookedTransformer; `make compat` runs these with 3.9",
)
PROMPTS = ["Describe rain.", "a", "Why is the sky blue?", "Name a river."]
LOWERCASE = "change_case:english_lowercase"
Build = Callable[..., Any]


@pytest.fixture(scope="module")
def build(tiny_folders: dict[str, Path]) -> Build:
    """A tiny model by name as a HookedTransformer; each is built once."""
    built: dict[str, Any] = {}

    def found(name: str, **options: bool) -> Any:
        key = f"{name}{sorted(options.items())}"
        if key not in built:
            built[key] = hooked_transformer(tiny_folders[name], **options)
        return built[key]

    return found


@pytest.fixture(scope="module")
def hooked_tiny() -> Any:
    return hooked_transformer(BUNDLED / "tiny")


@pytest.fixture(params=["llama", "gpt2"])
def hooked(request: pytest.FixtureRequest, build: Build) -> Any:
    return build(request.param)


def residuals(model: Any, prompt: str = PROMPTS[0]) -> torch.Tensor:
    reads = [Read(resid_post(layer), "all") for layer in range(4)]
    return torch.stack(list(run_pass(model, pad([encode(model, prompt)]), reads=reads).reads.values()))


# --- the coordinates -----------------------------------------------------------------------------------------------

STEPS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_that_were_folded_or_centred_are_another_frame_and_raw_ones_are_raw(build: Build, name: str) -> None:
    assert coordinate_frame(build(name)) == "raw"
    assert coordinate_frame(build(name, processed=True)) == "compatibility"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("one", STEPS)
def test_a_step_of_processing_that_moves_residuals_changes_the_frame(build: Build, name: str, one: str) -> None:
    model = build(name, **{one: True})
    moved = not torch.allclose(residuals(model), residuals(build(name)), rtol=1e-3, atol=1e-3)
    assert moved == (name == "gpt2" and one == "center_writing_weights")  # an RMSNorm allows no centring
    assert coordinate_frame(model) == ("compatibility" if moved or one == "fold_ln" else "raw")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_half_precision_hides_no_centring_and_shows_none(build: Build, dtype: torch.dtype) -> None:
    from steerlens.models.facts import _is_centred

    for centred in (False, True):
        embedding = build("gpt2", center_writing_weights=centred).W_E.detach().to(dtype).float()
        assert _is_centred(embedding) == centred
    wide = torch.randn(500, 4096, generator=torch.Generator().manual_seed(0))
    assert not _is_centred(wide.to(dtype).float())
    assert _is_centred((wide - wide.mean(-1, keepdim=True)).to(dtype).float())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_vector_says_its_frame_and_is_refused_in_the_other(build: Build, name: str, tmp_path: Path) -> None:
    pairs = load_pairs("tiny", instructions=LOWERCASE, n_queries=3)
    raw, processed = build(name), build(name, processed=True)
    style = PromptFormat(style="plain")
    vectors = [fit_steering_vector(record_activations(model, pairs, prompt_format=style)) for model in (raw, processed)]
    assert [vector.metadata["frame"] for vector in vectors] == ["raw", "compatibility"]
    for vector, own, other in [(vectors[0], raw, processed), (vectors[1], processed, raw)]:
        loaded = SteeringVector.load(vector.save(tmp_path / "vector.safetensors"))
        assert len(generate(own, ["a"], steering=loaded.at(1), max_new_tokens=2)) == 1
        with pytest.raises(ModelError, match="holds in the coordinates it was fitted in"):
            generate(other, ["a"], steering=loaded.at(1), max_new_tokens=2)


def test_a_processed_model_says_what_the_raw_one_says(build: Build, tiny: Subject) -> None:
    model = build(tiny.name, processed=True)
    expected = [
        plain_greedy(tiny.hf, encode(model, prompt), max_new_tokens=6, stop_ids=stop_ids(model)) for prompt in PROMPTS
    ]
    assert_same_text(expected, [row.tokens for row in generate(model, PROMPTS, max_new_tokens=6)])


def test_a_bridges_vector_is_a_hooked_transformers_own(build: Build, tiny_folders: dict[str, Path]) -> None:
    pairs, style = load_pairs("tiny", instructions=LOWERCASE, n_queries=4), PromptFormat(style="plain")
    for name in ("llama", "gpt2"):
        models = [load_model(tiny_folders[name], progress=False), build(name)]
        found = [fit_steering_vector(record_activations(model, pairs, prompt_format=style)) for model in models]
        for layer in range(4):
            torch.testing.assert_close(found[0].directions[layer], found[1].directions[layer], rtol=1e-3, atol=1e-3)
        texts = [generate(model, PROMPTS, steering=found[0].at(2), max_new_tokens=6) for model in models]
        assert [row.text for row in texts[0]] == [row.text for row in texts[1]]  # without a warning of another model


# --- what is asked of its settings and files -----------------------------------------------------------------------


def test_the_digest_follows_weights_settings_and_stops_and_leaves_the_model_alone(
    tiny_folders: dict[str, Path], build: Build
) -> None:
    model = hooked_transformer(tiny_folders["llama"])
    before = dict(model.cfg.to_dict())
    digest = model_digest(model)
    assert model.cfg.to_dict() == before
    assert digest == model_digest(build("llama"))
    digests = {digest, model_digest(build("llama", processed=True)), model_digest(build("gpt2"))}
    model.cfg.eps *= 2
    digests.add(model_digest(model))
    with torch.no_grad():
        model.unembed.W_U.mul_(1.01)
    digests.add(model_digest(model))
    assert len(digests) == 5


def test_what_stops_a_text_is_in_the_files_as_for_the_bridge(llama: Subject, tmp_path: Path) -> None:
    for place, (named, expected) in enumerate([(None, (1,)), (9, (1, 9)), ([9, 7], (1, 7, 9))]):
        folder = shutil.copytree(llama.folder, tmp_path / str(place))
        settings = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": named}))
        assert stop_ids(hooked_transformer(folder)) == expected
        assert stop_ids(load_model(folder, progress=False)) == expected
    (folder / "generation_config.json").unlink()
    assert stop_ids(hooked_transformer(folder)) == stop_ids(load_model(folder, progress=False)) == (1,)


def test_special_tokens_that_it_makes_up_stop_nothing_and_are_not_fed(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(around="$A")
    folder = save_llama(tmp_path / "bare", tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.unk_token = "<turn>"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text("{}")
    model = hooked_transformer(folder)
    assert model.tokenizer.eos_token is not None
    assert stop_ids(model) == ()
    assert encode(model, "Hm") == encode(load_model(folder, progress=False), "Hm")
    assert [len(row.tokens) for row in generate(model, ["Hm", "Describe rain."], max_new_tokens=3)] == [3, 3]


@pytest.mark.parametrize("around", ["$A", "<bos> $A", "<bos> $A <eos>"])
def test_prompts_are_what_the_tokenizers_files_feed(llama: Subject, tmp_path: Path, around: str) -> None:
    folder = shutil.copytree(llama.folder, tmp_path / "model")
    byte_tokenizer(chat_template="{{ messages[0]['content'] }}!", around=around).save_pretrained(folder)
    model, bridge = hooked_transformer(folder), load_model(folder, progress=False)
    for style in (PromptFormat(), PromptFormat(style="plain"), PromptFormat(bos=True), PromptFormat(bos=False)):
        assert encode(model, "Hm", style) == encode(bridge, "Hm", style)
    assert (encode(model, "Hm", PromptFormat(style="plain"))[0] == model.tokenizer.bos_token_id) == ("<bos>" in around)


def test_its_facts_are_the_bridges(tiny: Subject, build: Build) -> None:
    bridge = load_model(tiny.folder, device="cpu", progress=False)
    assert model_facts(build(tiny.name)) == model_facts(bridge)
    assert model_device(build(tiny.name)) == torch.device("cpu")


def test_its_name_is_the_whole_hub_id(tiny_folders: dict[str, Path]) -> None:
    model = hooked_transformer(tiny_folders["gpt2"])
    model.cfg.model_name, model.cfg.tokenizer_name = "pythia-70m", "EleutherAI/pythia-70m"
    assert model_id(model) == "EleutherAI/pythia-70m"
    model.cfg.tokenizer_name = "another/tokenizer"
    assert model_id(model) == "pythia-70m"
    model.cfg.tokenizer_name = None
    assert model_id(model) == "pythia-70m"


def test_ids_that_are_no_token_are_never_said(hooked: Any, tmp_path: Path) -> None:
    assert forbidden_ids(hooked) == ()
    padded = hooked_transformer(save_llama(tmp_path / "padded", byte_tokenizer(), d_vocab=300))
    assert forbidden_ids(padded) == tuple(range(260, 300))
    with torch.no_grad():
        padded.unembed.b_U[290] = 1e4
    (row,) = generate(padded, ["Hm"], max_new_tokens=3)
    assert max(row.tokens) < 260


def test_a_model_without_a_tokenizer_is_one_clear_sentence(tiny_folders: dict[str, Path]) -> None:
    model = hooked_transformer(tiny_folders["gpt2"])
    model.tokenizer = None
    pairs = load_pairs("tiny", instructions=LOWERCASE, n_queries=2)
    for use in (lambda: generate(model, ["a"], max_new_tokens=1), lambda: record_activations(model, pairs)):
        with pytest.raises(ModelError, match=r"needs a model with a tokenizer, .* model.set_tokenizer"):
            use()


# --- how it is run -------------------------------------------------------------------------------------------------


def test_a_model_is_padded_and_cached_where_that_gives_what_a_row_alone_gives(hooked: Any) -> None:
    assert abilities(hooked, 40) == Abilities(cache=True, batch=True, prefix=True, gaps=N_CTX)


def test_rotary_scaling_that_depends_on_the_width_runs_rows_alone_past_its_length(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hooked_transformer(tiny_folders["llama"])
    monkeypatch.setattr(model.cfg, "train_seq_length", 24)
    assert abilities(model, 40).cache
    for name in ("use_dynamic_ntk_rope", "use_logn_attn"):
        monkeypatch.setattr(model.cfg, name, True)
        assert abilities(model, 25) == Abilities(cache=False, batch=False)
        monkeypatch.setattr(model.cfg, name, False)


@pytest.mark.parametrize("name", ["mistral", "pythia", "gpt-neo", "bloom", "qwen2", "qwen3", "opt"])
def test_other_architectures_say_what_hugging_face_says(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_animal(name, tmp_path / "model")
    model = hooked_transformer(folder)
    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    steps = [step("add", "all", layer=1, seed=3, width=int(model.cfg.d_model))]
    expected = [plain_greedy(hf, encode(model, prompt), steps, max_new_tokens=5, stop_ids=[1]) for prompt in PROMPTS]
    rows = generate(model, PROMPTS, steering=as_plan(steps), max_new_tokens=5)
    assert_same_text(expected, [row.tokens for row in rows], what=name)


def test_hooks_of_the_callers_stay_and_fire(hooked: Any) -> None:
    """Temporary ones and permanent ones, at the sites that steerlens edits and at another."""
    fired: list[str] = []
    rows, steering = pad([encode(hooked, "Hm")]), as_plan([step("add", "all", layer=1)])
    plain = run_pass(hooked, rows).logits
    generate(hooked, ["Hm"], max_new_tokens=1)  # the model is known from here on
    hooked.add_perma_hook("hook_embed", lambda resid, hook: fired.append(hook.name))
    hooked.add_hook(resid_post(1), lambda resid, hook: fired.append(hook.name))
    hooked.add_hook(resid_post(2), lambda resid, hook: resid + 20 * unit(5))
    try:
        (row,) = generate(hooked, ["Hm"], steering=steering, max_new_tokens=3)
        assert fired == ["hook_embed", resid_post(1)] * len(row.tokens)
        assert not torch.allclose(run_pass(hooked, rows).logits, plain, atol=0.1)
        assert set(hooks_on(hooked)) == {"hook_embed", resid_post(1), resid_post(2)}
    finally:
        hooked.reset_hooks(including_permanent=True)


def test_every_modules_mode_comes_back(hooked: Any) -> None:
    modes = [module.training for module in hooked.modules()]
    assert hooked.training  # as it is loaded
    generate(hooked, ["Hm"], max_new_tokens=1)
    assert [module.training for module in hooked.modules()] == modes


def test_an_unknown_hook_point_is_refused(hooked: Any) -> None:
    with pytest.raises(ModelError, match="a hook point must be one of the model's"):
        run_pass(hooked, pad([[5, 6]]), reads=[Read("blocks.9.hook_resid_post")])
    assert hooks_on(hooked) == []


def test_a_pass_that_goes_on_from_its_cache_is_refused_in_a_block_of_steer(hooked: Any) -> None:
    tokens = torch.tensor([[5, 6, 7]])
    with steer(hooked, as_plan([step("add", "last")])):
        hooked(tokens)
        with pytest.raises(SteerlensError, match="this one goes on from a cache"):
            hooked.generate(tokens, max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)


# --- the whole job -------------------------------------------------------------------------------------------------


def test_a_run_with_it_says_what_a_run_with_the_bridge_says(hooked_tiny: Any, tmp_path: Path) -> None:
    config = RunConfig(
        model="tiny", pairs="tiny", instructions=(LOWERCASE,), n_train=6, n_valid=2, n_test=2, layers=(4,), kl=True,
        sampling=SamplingConfig(10), search_tokens=8,
    )  # fmt: skip
    bridge = load_model("tiny", device="cpu", progress=False)
    done = [
        run(config, tmp_path / name, model=model, progress=False) for name, model in [("a", hooked_tiny), ("b", bridge)]
    ]
    for which in ("scores.jsonl", "search_scores.jsonl"):
        found, expected = (pd.read_json(one.folder / which, lines=True) for one in done)
        keys = ["prompt_id", "instruction", "condition", "layer", "response", "followed"]
        same = (found[keys].fillna(-1) == expected[keys].fillna(-1)).all(axis=1)
        assert same.mean() >= 0.9, "near ties alone may part"
        for column in ("perplexity", "kl"):
            if column in found:
                torch.testing.assert_close(
                    torch.tensor(found.loc[same, column].to_numpy(float)),
                    torch.tensor(expected.loc[same, column].to_numpy(float)),
                    rtol=0.01, atol=1e-4, equal_nan=True,
                )  # fmt: skip
    again = run(config, tmp_path / "a", model=hooked_tiny, progress=False)
    assert again.facts["identity"] == done[0].facts["identity"]
    assert again.facts["identity"] != done[1].facts["identity"]  # other kernels, another digest, another run


# --- what it has not -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lens", [logit_lens, prompt_lens, vector_effects])
def test_a_lens_is_refused_in_a_sentence(build: Build, lens: Callable[..., Any]) -> None:
    vector, model = SteeringVector({1: unit(0)}), build("llama")
    arguments = {logit_lens: (vector,), prompt_lens: (PROMPTS,)}.get(lens, (vector, PROMPTS))
    with pytest.raises(
        ModelError, match=r"a lens needs the readout that TransformerLens has since version 4\.3, got 3\."
    ):
        lens(model, *arguments, **({"coeff": 1.0} if lens is vector_effects else {}))


# --- what is read of it --------------------------------------------------------------------------------------------

INSTRUCTED = PairSet(
    InstructionPair(query, text, name, prompt=f"{text} {query}")
    for text, name in (("Use capitals.", "change_case:english_capital"), ("No commas.", "punctuation:no_comma"))
    for query in ("Describe rain.", "Why is the sky blue?", "Name a river.")
)
STYLE = PromptFormat(style="plain")


@pytest.fixture
def both(build: Build, tiny: Subject) -> tuple[Any, Any]:
    """The HookedTransformer, and a bridge of the same weights."""
    return build(tiny.name), load_model(tiny.folder, device="cpu", progress=False)


def assert_same_numbers(found: pd.DataFrame, expected: pd.DataFrame, columns: list[str]) -> None:
    for column in columns:
        pd.testing.assert_series_equal(found[column], expected[column], rtol=1e-3, atol=1e-3)


def test_a_patched_cell_is_the_bridges(both: tuple[Any, Any]) -> None:
    for site in ("resid", "attn", "mlp"):
        options: Any = {"site": site, "layers": [0, 2], "positions": [-4, -1], "prompt_format": STYLE}
        found, expected = (patch(model, INSTRUCTED[:2], **options).cells for model in both)
        assert_same_numbers(found, expected, ["value", "control", "plain", "instructed"])
        assert (found["value"] - found["plain"]).abs().max() > 1e-2  # something was patched


def test_parts_write_what_the_bridges_do_and_sum_to_the_projection(both: tuple[Any, Any]) -> None:
    vector = SteeringVector({2: unit(0)})
    found, expected = (attribute(model, vector, INSTRUCTED, layer=2, prompt_format=STYLE).table for model in both)
    if not (expected["component"] == "attention bias").any():  # a HookedTransformer has one of zeros then
        bias = found["component"] == "attention bias"
        assert not found.loc[bias, "contribution"].any()
        found = found[~bias].reset_index(drop=True)
    assert_same_numbers(found, expected, ["contribution", "proj_with", "proj_without"])
    acts = record_activations(both[0], INSTRUCTED, prompt_format=STYLE)
    for name, part in acts.by_instruction().items():
        change = fit_steering_vector(part)[2] @ unit(0)
        parts = found.loc[found["instruction"] == name, "contribution"]
        assert parts.sum() == pytest.approx(float(change), rel=1e-3, abs=1e-3)


def test_what_instructions_change_lies_as_in_the_bridge(both: tuple[Any, Any]) -> None:
    found, expected = (
        embed(record_activations(model, INSTRUCTED, prompt_format=STYLE), method="pca", layers=2).to_frame()
        for model in both
    )
    assert_same_numbers(found, expected, ["x", "y"])


def test_a_study_of_layers_says_what_it_says_of_the_bridge(both: tuple[Any, Any]) -> None:
    vector = SteeringVector(dict.fromkeys([1, 2], 20 * unit(0)), proj_with=dict.fromkeys([1, 2], 20.0))
    options: Any = {"modes": ["alone", "from"], "max_new_tokens": 4, "prompt_format": STYLE}
    found, expected = (steer_by_layer(model, vector, INSTRUCTED[:2], **options).scores for model in both)
    assert found["response"].tolist() == expected["response"].tolist()
    assert found["response"].nunique() > 1
