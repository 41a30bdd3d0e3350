"""Facts about a model that the rest of steerlens asks for: layers, frame, device, what stops it, and a digest of its weights."""

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlens._typing import WholeNumber, whole
from steerlens.errors import ModelError, SteerlensError

# --- facts ---------------------------------------------------------------------------------------------------------


def resid_post(layer: int) -> str:
    """The hook name of a block's output: `blocks.{layer}.hook_resid_post`."""
    return f"blocks.{layer}.hook_resid_post"


def attn_scores(layer: int) -> str:
    """The hook name of a layer's scores before the softmax: `blocks.{layer}.attn.hook_attn_scores`."""
    return f"blocks.{layer}.attn.hook_attn_scores"


def attn_in(model: Any, layer: int) -> str:
    """The hook name of what goes into a layer's attention, after the norm; see `attention.normed`."""
    return f"blocks.{layer}.ln1.hook_normalized" if is_hooked_transformer(model) else f"blocks.{layer}.attn.hook_in"


def attn_out(model: Any, layer: int) -> str:
    """The hook name of what comes out of a layer's attention, after its output projection."""
    return f"blocks.{layer}.hook_attn_out" if is_hooked_transformer(model) else f"blocks.{layer}.attn.hook_out"


def layer_of(site: str) -> int:
    """The layer of a hook name: `blocks.{layer}.…`.

    >>> layer_of(resid_post(3))
    3
    """
    return int(site.split(".")[1])


def check_layer(model: Any, layer: WholeNumber) -> int:
    """The layer, if the model has it.

    Raises:
        SteerlensError: if it is no whole number, or out of range.
    """
    n_layers, number = int(model.cfg.n_layers), whole(layer, "layer")
    if not 0 <= number < n_layers:
        raise SteerlensError(f"layer must be in [0, {n_layers}), got {number}; layers count from zero")
    return number


def model_id(model: Any) -> str:
    """A name for the model that is the same on every machine: its hub id, or its folder's name."""
    name = str(model.cfg.model_name)
    if is_hooked_transformer(model) and Path(str(model.cfg.tokenizer_name)).name == name:
        name = str(model.cfg.tokenizer_name)  # the whole hub id, of which its name is the last part
    return Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name


def check_origin(model: Any, origin: Mapping[str, str]) -> None:
    """Refuse what was fitted in a model of another depth or coordinate frame; warn of another model.

    Args:
        origin: "model", "n_layers" and "frame" of the model it was fitted in, as far as they are known.

    Raises:
        ModelError: if it cannot hold in this model.
    """
    n_layers, frame = int(model.cfg.n_layers), coordinate_frame(model)
    if int(origin.get("n_layers", n_layers)) != n_layers:
        raise ModelError(
            f"a vector's model must have this model's {n_layers} layers, got {origin['n_layers']}; fit it in this model"
        )
    if origin.get("frame", frame) != frame:
        raise ModelError(
            f"a vector holds in the coordinates it was fitted in ({origin['frame']}), and this model is in {frame}; "
            "load the model without processing its weights"
        )
    if origin.get("model", model_id(model)) != model_id(model):
        warnings.warn(f"the vector was fitted in {origin['model']}, not in {model_id(model)}", stacklevel=4)


def is_hooked_transformer(model: Any) -> bool:
    """Whether a model is TransformerLens 3's HookedTransformer, which version 4 has dropped for the bridge."""
    return any(kind.__name__ == "HookedTransformer" for kind in type(model).__mro__)


def coordinate_frame(model: Any) -> str:
    """ "raw" for Hugging Face weights as they are, "compatibility" once TransformerLens has folded or centred them.

    A bridge in compatibility mode says so itself. One whose weights were processed without it, and a HookedTransformer, do not,
    and are told by their weights: centring leaves no row of the embedding a mean, which no raw embedding lacks, and where a
    HookedTransformer's norms were folded its `normalization_type` ends in "Pre".
    """
    if is_hooked_transformer(model):
        processed, embedding = str(model.cfg.normalization_type).endswith("Pre"), model.W_E
    else:
        embed = getattr(model, "original_model", model).get_input_embeddings()
        processed, embedding = getattr(model, "compatibility_mode", False), getattr(embed, "weight", None)
    centred = embedding is not None and _is_centred(embedding[:1000].detach().float())
    return "compatibility" if processed or centred else "raw"


def _is_centred(embedding: Float[Tensor, "token d_model"]) -> bool:
    """Whether no row has a mean, but for rounding; those of random rows are about their deviation / sqrt(d_model)."""
    return bool(embedding.mean(-1).norm() <= 1e-3 * embedding.norm() / embedding.shape[-1] ** 0.5)


def model_device(model: Any) -> torch.device:
    """The device that token ids go to."""
    return torch.device(model.cfg.device or "cpu")


def text_config(model: Any) -> dict[str, Any]:
    """The settings that a model was made with, by the names of its library.

    Example:
        >>> text_config(model)["num_hidden_layers"]
        8
    """
    if is_hooked_transformer(model):
        return dict(model.cfg.to_dict())
    config: Any = getattr(getattr(model, "original_model", None), "config", None)
    # Of a model that reads pictures, too, the text model's settings lie within.
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return config.to_dict() if config is not None else {}


def attention_window(config: Mapping[str, Any]) -> float:
    """In rows of how many columns every layer's mask is the causal one: fewer than infinitely many where there are local windows
    or chunks, and none where a layer does not attend, or the size of its window is not known.

    >>> attention_window({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4096})
    4096.0
    """
    kinds = {*(config.get("layer_types") or ()), "full_attention"}
    sizes = [size for name in ("sliding_window", "attention_chunk_size", "window_size") if (size := config.get(name))]
    if not kinds <= {"full_attention", "sliding_attention", "chunked_attention"} or (len(kinds) > 1 and not sizes):
        return 0.0
    return float(min(sizes, default=math.inf))


def tolerance(model: Any) -> float:
    """The largest relative difference of residuals that is rounding."""
    # A faulty row differs by 0.01 or more; float32 rounds to 1e-5 over some dozen layers, the half types to a few percent.
    return 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.05


def stop_ids(model: Any) -> tuple[int, ...]:
    """Token ids that end a generation: the tokenizer's, and all that the model's generation settings name."""
    tokenizer = model.tokenizer
    if is_hooked_transformer(model):
        settings = _settings_on_disk(str(getattr(tokenizer, "name_or_path", "")))
    else:
        settings = getattr(getattr(model, "original_model", None), "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    # HookedTransformer names an end-of-sequence token where a tokenizer has none; what is unknown stands for many things.
    made_up = tokenizer.unk_token_id if tokenizer.eos_token != tokenizer.unk_token else None
    return tuple(sorted(token for token in ids if token is not None and token != made_up))


def _settings_on_disk(name: str) -> Any:
    """The generation settings beside a tokenizer's files, as Hugging Face reads them; None where there are none."""
    from transformers import AutoConfig, GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        pass
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        return GenerationConfig.from_model_config(config)
    except (OSError, ValueError, KeyError):  # no files, or those of a tokenizer alone
        return None


def forbidden_ids(model: Any) -> tuple[int, ...]:
    """Ids in the model's vocabulary that are no token of its tokenizer, as where a vocabulary is padded; never to be said."""
    tokenizer, d_vocab = model.tokenizer, int(model.cfg.d_vocab)
    key = (id(tokenizer), len(tokenizer), d_vocab)  # of a wide vocabulary the search takes a step's time, or many
    known = _FORBIDDEN.get(model)
    if known is None or known[0] != key:
        tokens = set(tokenizer.get_vocab().values())
        known = _FORBIDDEN[model] = (key, tuple(token for token in range(d_vocab) if token not in tokens))
    return known[1]


_FORBIDDEN: "WeakKeyDictionary[Any, tuple[Any, tuple[int, ...]]]" = WeakKeyDictionary()


def check_ids(model: Any, ids: Sequence[int]) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        ModelError: if the tokenizer has more tokens than the model, and one of those is used.
    """
    d_vocab = int(model.cfg.d_vocab)
    beyond = next((token for token in ids if not 0 <= token < d_vocab), None)
    if beyond is not None:
        raise ModelError(
            f"a token must be one of the {d_vocab} that the model has embeddings for, got {beyond} "
            f"({model.tokenizer.decode([beyond])!r}) of a larger tokenizer; load the tokenizer that the model was trained with"
        )


def model_digest(model: Any) -> str:
    """16 hex digits that change with the weights, the configuration or what stops a generation.

    Of each parameter and each saved buffer the sums of every row and of every column of its bits are hashed, as whole numbers, so
    that they come out the same on every device: only an edit that keeps all of them goes unnoticed.
    """
    config = (
        model.cfg if is_hooked_transformer(model) else getattr(getattr(model, "original_model", None), "config", None)
    )
    return weights_digest(model, config, stop_ids(model))


def weights_digest(model: Any, config: Any, *more: Any) -> str:
    """`model_digest` of any module: of its parameters, its transformers configuration, and what more there is."""
    settings = dict(config.to_dict()) if config is not None else {}  # a HookedTransformer gives its own away
    for name in NO_NUMBER:
        settings.pop(name, None)
    digest = hashlib.sha256(json.dumps([settings, *more], sort_keys=True, default=str).encode())
    root = getattr(model, "original_model", model)
    saved = {
        f"{place}.{name}": buffer
        for place, module in (
            [] if is_hooked_transformer(model) else root.named_modules()
        )  # it saves rotary tables, too
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set  # the others are computed, as rotary tables are
    }
    for name, parameter in sorted([*model.named_parameters(), *saved.items()]):
        digest.update(f"{name}{parameter.dtype}{tuple(parameter.shape)}".encode())
        for sums in bit_sums(parameter):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


SUMMED_AT_ONCE = 2**20
"""Numbers of a parameter whose bits are summed at a time: a sum in int64 first copies all of them, eight bytes each."""


def bit_sums(weights: Tensor) -> tuple[Int[Tensor, " column"], Int[Tensor, " row"]]:
    """The sums of every column and of every row of a tensor's bits, as whole numbers: the same on every device."""
    bits = weights.detach().reshape(weights.shape or (1,)).contiguous().view(_BITS[weights.element_size()])
    table = bits.flatten(1) if bits.ndim > 1 else bits.reshape(1, -1)
    parts = torch.split(table, max(1, SUMMED_AT_ONCE // max(1, table.shape[1])))
    columns = torch.zeros(table.shape[1], dtype=torch.int64, device=table.device)
    for part in parts:
        columns += part.sum(0, dtype=torch.int64)
    return columns, torch.cat([part.sum(1, dtype=torch.int64) for part in parts])


NO_NUMBER = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "model_name",
    "tokenizer_name",
    "device",
    "n_devices",
)
"""Settings of a transformers configuration, or of a HookedTransformer's, that change no number."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The whole numbers of each size in bytes."""


def model_facts(model: Any) -> dict[str, str | int]:
    """What reports and vector files say about a model.

    Returns:
        model, n_layers, d_model, n_ctx, dtype, device, frame (see `coordinate_frame`), chat_template (whether there is one).

    Example:
        >>> model_facts(model)["d_model"]
        160
    """
    return {
        "model": model_id(model),
        "n_layers": int(model.cfg.n_layers),
        "d_model": int(model.cfg.d_model),
        "n_ctx": int(model.cfg.n_ctx),
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "device": str(model_device(model)),
        "frame": coordinate_frame(model),
        "chat_template": bool(getattr(model.tokenizer, "chat_template", None)),
    }


def library_versions() -> dict[str, str]:
    """Versions of the libraries that can change a number."""
    names = ("steerlens", "torch", "transformers", "transformer-lens", "lm-eval", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def versions_json() -> str:
    """`library_versions` as one line of JSON, for file metadata."""
    return json.dumps(library_versions(), sort_keys=True)
