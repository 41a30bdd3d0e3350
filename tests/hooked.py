"""A HookedTransformer over a local Hugging Face folder, made as its users make one; only TransformerLens 3 has the class."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer


def hooked_transformer(folder: Path, *, tokenizer: Any = None, processed: bool = False, **processing: bool) -> Any:
    """The model with its raw weights.

    Args:
        tokenizer: Default: the folder's.
        processed: Fold and centre the weights, as `HookedTransformer.from_pretrained` does by default.
        processing: Some of those steps alone, such as `center_writing_weights`.
    """
    from transformer_lens import HookedTransformer, loading_from_pretrained as loading

    steps = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), processed)
    steps |= processing
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the class warns that it is deprecated
        source = Path(scratch) / "model"  # a path with "llama" in it is taken for one of the hub's
        source.symlink_to(folder)
        hf = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        cfg = loading.get_pretrained_model_config(str(source), fold_ln=steps["fold_ln"], device="cpu")
        weights = loading.get_pretrained_state_dict(str(source), cfg, hf)
    cfg.model_name, cfg.tokenizer_name = folder.name, str(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = HookedTransformer(cfg, tokenizer or AutoTokenizer.from_pretrained(folder, local_files_only=True))
        model.load_and_process_state_dict(weights, **steps)
    return model
