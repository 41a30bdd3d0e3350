"""Decoding on a GPU: Hugging Face's `generate` beside steerlens through hook points, without them, and as recorded steps.

    python benchmarks/gpu.py --out runs/benchmarks/gpu.json                 # tiny, and random Llamas of three sizes in bfloat16
    python benchmarks/gpu.py --models tiny --batches 4 --new-tokens 16      # a trial on a processor

All say the same number of tokens, greedily, to the same prompts; the vector is one direction at the middle layer, at every
position. What the weights are does not change the speed, so the larger models have random ones, in the shapes of SmolLM2-135M
and of Llamas of 1.2 and 6.7 billion parameters. Contestants take turns; what is reported is tokens per second, the median over
rounds of the ratio to Hugging Face unsteered, and in how many rows the steered texts are those of Hugging Face with a hook. In
bfloat16 another order of rounding makes other texts; float32 is what to judge by.
"""

import copy
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tyro
from contest import report, take_turns
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import steerlens as sl
from steerlens.models import use_backend
from steerlens.models.choice import BackendName
from steerlens.models.load import BUNDLED
from steerlens.models.prompts import encode_all
from steerlens.models.rows import pad, pad_id

SHAPES = {
    "llama-135m": (49152, 576, 1536, 30, 9, 3),
    "llama-1.2b": (32000, 2048, 5632, 22, 32, 4),
    "llama-6.7b": (32000, 4096, 11008, 32, 32, 32),
}
PUSH = 30.0
"""The vector's length."""
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    out: Path | None = None
    """A JSON file for the figures; default: print only."""
    models: tuple[str, ...] = ("tiny", *SHAPES)
    batches: tuple[int, ...] = (1, 8, 32, 128)
    new_tokens: int = 64
    rounds: int = 3
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def load(name: str, device: str) -> tuple[Any, Any]:
    """A bridge, and a Hugging Face model with the same weights that no token ends."""
    if name not in SHAPES:
        hf = AutoModelForCausalLM.from_pretrained(BUNDLED / name, local_files_only=True, dtype=torch.float32)
        hf = hf.to(device).eval()
        model = sl.load_model(name, device=device, progress=False)
    else:
        config = LlamaConfig(**dict(zip(SIZES, SHAPES[name], strict=True)), bos_token_id=1, eos_token_id=2)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config.save_pretrained(folder)
            save_tokenizer(Path(folder), config.vocab_size)
            torch.manual_seed(0)
            with torch.device(device):
                below = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
                # A bridge sets its model's configuration to eager attention, and a shared one would be the other's, too.
                hf = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16).eval()
            hf.load_state_dict(below.state_dict())
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = TransformerBridge.boot_transformers(
                folder, hf_model=below, tokenizer=tokenizer, dtype=torch.bfloat16, device=device
            ).eval()
    hf.generation_config.eos_token_id = None
    assert hf.config._attn_implementation == "sdpa", hf.config._attn_implementation
    return model, hf


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    """`tiny`'s tokenizer, with as many tokens as the vocabulary has."""
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        content = (BUNDLED / "tiny" / file).read_text(encoding="utf-8")
        if file == "tokenizer.json":
            tokenizer = json.loads(content)
            known = tokenizer["model"]["vocab"]
            known.update({f"<{place}>": place for place in range(len(known), vocabulary)})
            content = json.dumps(tokenizer)
        (folder / file).write_text(content, encoding="utf-8")


def contestants(model: Any, hf: Any, prompts: list[str], n_new: int) -> dict[str, Callable[[], list[list[int]]]]:
    """Name -> what gives each prompt's new tokens."""
    layer, d_model = int(model.cfg.n_layers) // 2, int(model.cfg.d_model)
    direction = torch.nn.functional.normalize(torch.randn(d_model, generator=torch.Generator().manual_seed(0)), dim=0)
    plan = sl.steering.Plan((sl.steering.Intervention(layer, direction, coeff=PUSH, operator="add"),))
    rows = pad(encode_all(model, prompts), pad_id=pad_id(model)).to(hf.device)
    push = (PUSH * direction).to(hf.device, hf.dtype)

    def hugging_face(steered: bool) -> list[list[int]]:
        block = hf.model.layers[layer]
        handle = block.register_forward_hook(lambda module, args, output: output + push) if steered else None
        try:
            with torch.inference_mode():
                out = hf.generate(
                    rows.tokens,
                    attention_mask=rows.mask,
                    max_new_tokens=n_new,
                    do_sample=False,
                    pad_token_id=pad_id(model),
                )
        finally:
            if handle is not None:
                handle.remove()
        return out[:, rows.tokens.shape[1] :].tolist()

    def steerlens(backend: BackendName) -> list[list[int]]:
        use_backend(model, backend)
        with patch("steerlens.steering.sampling.stop_ids", lambda _: ()):
            out = sl.generate(model, prompts, steering=plan, max_new_tokens=n_new, batch_size=len(prompts))
        return [list(row.tokens) for row in out]

    return {
        "Hugging Face": lambda: hugging_face(False),
        "Hugging Face, hook": lambda: hugging_face(True),
        "steerlens, hooks": lambda: steerlens("hooks"),
        "steerlens, lean": lambda: steerlens("lean"),
        "steerlens, graphs": lambda: steerlens("graphs"),
    }


def measure(settings: Settings) -> dict[str, Any]:
    """Of each model and batch: tokens per second, ratios, and whose texts are those of the hook."""
    gpu = torch.cuda.get_device_name() if settings.device == "cuda" else ""
    found: dict[str, Any] = {"gpu": gpu}
    for name in settings.models:
        model, hf = load(name, settings.device)
        queries = list(dict.fromkeys(pair.query for pair in sl.load_pairs("tiny")))
        for batch in settings.batches:
            prompts = [queries[row % len(queries)] for row in range(batch)]
            racing = contestants(model, hf, prompts, settings.new_tokens)
            said = {label: run() for label, run in racing.items()}
            _, record = take_turns(racing, settings.rounds)
            seconds = [{label: one[label]["wall"] for label in racing} for one in record["seconds"]]
            expected = said["Hugging Face, hook"]
            found[f"{name}, batch {batch}"] = {
                label: {
                    "tokens_per_second": batch * settings.new_tokens / statistics.median(one[label] for one in seconds),
                    "times_hugging_face": statistics.median(one["Hugging Face"] / one[label] for one in seconds),
                    "rows_like_the_hook": sum(a == b for a, b in zip(said[label], expected, strict=True)),
                }
                for label in racing
            }
            print(f"{name}, batch {batch}:", json.dumps(found[f"{name}, batch {batch}"]), flush=True)
        del model, hf
    return found


if __name__ == "__main__":
    asked = tyro.cli(Settings)
    report(asked, measure(asked))
