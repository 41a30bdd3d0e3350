"""The zoo: many architectures as tiny random models, to hold whatever runs models against Hugging Face itself.

Each is a line of one table: Hugging Face's name of the architecture and the settings that make it small, with its own peculiarity
(a window, a softcap, a state, tied weights) switched on and within the reach of a prompt of some dozen tokens. Tokenizer and wide
weights are those of the other tiny models.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from tests.tiny_models import byte_tokenizer, save, special_ids

WIDTH, DEPTH, LONGEST = 32, 4, 160

SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": LONGEST,
}
PLAIN = {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
GPT = {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4, "n_positions": LONGEST}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
STATE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
WINDOW = 8
"""Shorter than most prompts."""
GEMMA3 = SIZES | {"sliding_window": WINDOW, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8}


@dataclass(frozen=True)
class Animal:
    """One architecture of the zoo."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    auto: Any = AutoModelForCausalLM
    tied: bool = False
    """Whether the readout is the embedding."""
    seed: int = 0


ZOO: dict[str, Animal] = {
    "llama": Animal("llama", SIZES),
    "llama-tied": Animal("llama", SIZES, tied=True),
    "gpt2": Animal("gpt2", GPT),
    "pythia": Animal("gpt_neox", PLAIN),
    "gpt-neo": Animal(
        "gpt_neo",
        {
            "hidden_size": WIDTH,
            "num_layers": DEPTH,
            "num_heads": 4,
            "max_position_embeddings": LONGEST,
            "attention_types": [[["global", "local"], 2]],
            "window_size": WINDOW,
        },
    ),
    "gptj": Animal("gptj", GPT | {"rotary_dim": 4}),
    "opt": Animal("opt", PLAIN | {"ffn_dim": 64, "word_embed_proj_dim": WIDTH}),
    "bloom": Animal("bloom", {"hidden_size": WIDTH, "n_layer": DEPTH, "n_head": 4}),
    "mpt": Animal("mpt", {"d_model": WIDTH, "n_layers": DEPTH, "n_heads": 4, "max_seq_len": LONGEST}, tied=True),
    "falcon": Animal("falcon", {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4}),
    "gemma": Animal("gemma", SIZES, tied=True),
    "gemma2": Animal(
        "gemma2",
        SIZES
        | {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Animal("gemma3_text", GEMMA3),
    "gemma3-images": Animal(
        "gemma3",
        {
            "text_config": GEMMA3 | {"vocab_size": 260},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": 257,
            "eoi_token_index": 258,
            "image_token_index": 259,
        },
        AutoModelForImageTextToText,
    ),
    "qwen2": Animal("qwen2", SIZES),
    "qwen3": Animal("qwen3", SIZES),
    "qwen3-moe": Animal("qwen3_moe", SIZES | EXPERTS),
    "mistral": Animal("mistral", SIZES | {"sliding_window": WINDOW}),
    "mixtral": Animal("mixtral", SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi": Animal("phi", PLAIN, seed=1),
    "phi3-longrope": Animal(
        "phi3",
        SIZES
        | {
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [1.0, 2.0, 4.0, 8.0],
            },
        },
    ),
    "stablelm": Animal("stablelm", SIZES),
    "starcoder2": Animal("starcoder2", SIZES | {"sliding_window": None}),
    "olmo": Animal("olmo", SIZES),
    "olmo2": Animal("olmo2", SIZES),
    "cohere": Animal("cohere", SIZES, tied=True),
    "granite": Animal(
        "granite",
        SIZES | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "llama4-chunked": Animal(
        "llama4_text",
        SIZES
        | {
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "attention_chunk_size": 16,
            "no_rope_layers": [1, 1, 1, 0],
        },
    ),
    "mamba": Animal("mamba", {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "state_size": 8}),
    "mamba2": Animal(
        "mamba2",
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": DEPTH,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "falcon-mamba": Animal("falcon_mamba", {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "state_size": 8}),
    "rwkv": Animal(
        "rwkv",
        {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "attention_hidden_size": WIDTH, "context_length": LONGEST},
    ),
    "zamba2": Animal(
        "zamba2",
        SIZES
        | {
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "chunk_size": 16,
            "num_mem_blocks": 1,
            "hybrid_layer_ids": [1, 3],
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        },
    ),
    "glm-dsa": Animal(
        "glm_moe_dsa",
        PLAIN
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 16,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "index_topk": 24,
            "index_head_dim": 8,
            "index_n_heads": 2,
        },
    ),
    "recurrent-gemma": Animal(
        "recurrent_gemma", SIZES | {"num_key_value_heads": 1, "lru_width": WIDTH, "attention_window_size": WINDOW}
    ),
    "bamba": Animal("bamba", SIZES | STATE | {"attn_layer_indices": [1, 3]}),
    "jamba": Animal(
        "jamba",
        SIZES
        | {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "falcon-h1": Animal("falcon_h1", SIZES | STATE | {"mamba_d_ssm": 64}),
    "lfm2": Animal("lfm2", SIZES | {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}),
    "qwen3-next": Animal(
        "qwen3_next",
        SIZES
        | EXPERTS
        | {
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
}
"""Decoders, by a short name."""

OTHERS: dict[str, Animal] = {
    "t5": Animal(
        "t5",
        {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 2},
        AutoModelForSeq2SeqLM,
    ),
    "bart": Animal(
        "bart",
        {
            "d_model": WIDTH,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": LONGEST,
        },
        AutoModelForSeq2SeqLM,
    ),
    "bert": Animal("bert", PLAIN, AutoModelForMaskedLM),
    "roberta": Animal("roberta", PLAIN, AutoModelForMaskedLM),
    "persimmon": Animal("persimmon", PLAIN),
    "biogpt": Animal("biogpt", PLAIN),
    "helium": Animal("helium", SIZES),
    "granite-hybrid": Animal(
        "granitemoehybrid",
        SIZES
        | STATE
        | {"num_local_experts": 0, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"] * 2},
    ),
}
"""Not decoders, so that no text goes on from a prompt alone; or decoders that TransformerLens cannot bridge."""


def save_animal(name: str, folder: Path, **settings: Any) -> Path:
    """The model of that name, with other settings perhaps, the same one every time, as a Hugging Face folder."""
    animal = (ZOO | OTHERS)[name]
    tokenizer = byte_tokenizer()
    common = {"vocab_size": len(tokenizer), "tie_word_embeddings": animal.tied} | special_ids(tokenizer)
    config = AutoConfig.for_model(animal.model_type, **(common | animal.settings | settings))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(animal.seed)  # some architectures draw the decay of their states
        model = animal.auto.from_config(config)
    return save(model, tokenizer, folder, seed=animal.seed, eos_gain=1.5)
