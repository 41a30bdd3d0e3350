"""Vector files: one safetensors file per vector, written whole or not at all, and read with suspicion.

    blocks.{l}.hook_resid_post                  float32 [d_model]       the direction of layer l
    proj_with, proj_without, std_with, std_without, resid_norm          float64 [layer], nan where unknown
    metadata (strings)                          format_version, site, d_model, layers (JSON), and what the vector says of itself:
                                                model, n_layers, frame, template, read position, counts, hashes, seed, versions

What is read back is what was written, bit for bit. A file says nothing about whether its vector works.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steerlens._typing import whole
from steerlens.errors import SteerlensError
from steerlens.files import atomic_path, user_path
from steerlens.models.facts import resid_post

FORMAT_VERSION = "1"

SITE = "resid_post"

PROJECTIONS = ("proj_with", "proj_without", "std_with", "std_without", "resid_norm")
"""What a vector knows of each layer besides its direction."""


def write_vector(
    path: str | Path,
    directions: Mapping[int, Float[Tensor, " d_model"]],
    projections: Mapping[str, Mapping[int, float]],
    metadata: Mapping[str, str],
) -> Path:
    """Write a vector's file; missing folders are made.

    Raises:
        SteerlensError: if the file cannot be written there.
    """
    path = user_path(path)
    # safetensors refuses a tensor with gaps, such as a column of a matrix.
    tensors = {resid_post(layer): direction.contiguous() for layer, direction in directions.items()}
    for name in PROJECTIONS:
        values = [projections[name].get(layer, float("nan")) for layer in directions]
        tensors[name] = torch.tensor(values, dtype=torch.float64)
    about = {
        **metadata,
        "format_version": FORMAT_VERSION,
        "site": SITE,
        "d_model": str(len(next(iter(directions.values())))),
        "layers": json.dumps(list(directions)),
    }
    try:
        with atomic_path(path) as scratch:
            save_file(tensors, scratch, metadata=about)
    except (OSError, SafetensorError) as error:
        raise SteerlensError(
            f"a vector must be saved to a file that can be written, got {str(path)!r}: {error}; choose another"
        ) from error
    return path


def read_vector(path: str | Path) -> dict[str, Any]:
    """What `write_vector` wrote: "directions", "metadata", and each of `PROJECTIONS` by layer, where it is known.

    Raises:
        SteerlensError: if the file is missing, no vector, of another format, or contradicts itself.
    """
    path = user_path(path)
    if not path.is_file():
        raise SteerlensError(f"a vector file must exist, got {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise SteerlensError(f"a vector file must be safetensors, got {str(path)!r}: {error}") from error
    if metadata.get("format_version") != FORMAT_VERSION or "layers" not in metadata:
        raise SteerlensError(
            f"{str(path)!r} is not a steerlens vector of format {FORMAT_VERSION} "
            f"(it says {metadata.get('format_version')!r}); fit it again or update steerlens"
        )
    if fault := _fault(metadata, tensors):
        raise SteerlensError(f"{str(path)!r} is a damaged vector file: {fault}; fit and save the vector again")
    layers: list[int] = json.loads(metadata["layers"])
    known = {
        name: {layer: value for layer, value in zip(layers, tensors[name].tolist(), strict=True) if value == value}
        for name in PROJECTIONS
    }
    about = {key: value for key, value in metadata.items() if key not in ("format_version", "layers")}
    return {"directions": {layer: tensors[resid_post(layer)] for layer in layers}, "metadata": about, **known}


def _fault(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """The first thing in which a file contradicts itself or its format; "" for none."""
    try:
        layers = json.loads(metadata["layers"])
        sizes = {name: whole(json.loads(metadata[name]), name) for name in ("d_model", "n_layers") if name in metadata}
        for name in ("factor", "parts"):
            json.loads(metadata.get(name, "0"))
    except ValueError as error:
        return f"its metadata cannot be read ({error})"
    if not isinstance(layers, list) or not layers or not all(type(one) is int and one >= 0 for one in layers):
        return f"layers must be a list of block indices, got {metadata['layers']}"
    if len(set(layers)) < len(layers) or max(layers) >= sizes.get("n_layers", max(layers) + 1):
        return f"layers must differ and be below n_layers {sizes.get('n_layers', '')}, got {layers}"
    if metadata.get("site", SITE) != SITE:
        return f"its site must be {SITE}, got {metadata['site']!r}"
    wanted = {*map(resid_post, layers), *PROJECTIONS}
    if wanted != set(tensors):
        return f"it must hold {', '.join(sorted(wanted))}, and it holds {', '.join(sorted(tensors)) or 'nothing'}"
    width = sizes.get("d_model", tensors[resid_post(layers[0])].numel())
    for name, tensor in tensors.items():
        shape, dtype = ([len(layers)], torch.float64) if name in PROJECTIONS else ([width], torch.float32)
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            return f"{name} must be {dtype} of shape {shape}, got {tensor.dtype} of shape {list(tensor.shape)}"
    return ""
