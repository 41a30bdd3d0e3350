"""A world planted by construction: a Llama whose weights are set so that every reading of it has a known answer.

    every token     writes CONST; the byte "!" writes ASKED besides; all embeddings have one norm
    WRITER_HEAD     looks from every position at the "!" of the prompt and writes DIRECTION where there is one, else nothing
    READER_MLP      reads DIRECTION and writes ANSWER
    unembedding     "C" reads CONST, "B" reads DIRECTION, "A" reads ANSWER; no other token reads these axes

So "!" is an instruction to answer "A": without it the model says "C". Residuals with and without it differ, after the last
prompt token, by nothing below layer 1, along DIRECTION at layer 1, and along DIRECTION and ANSWER from layer 2 on. The
direction's own unembedding says "B", which the model never says: what the later layers make of it says "A".
"""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steerlens.data.pairs import InstructionPair, PairSet
from tests.tiny_models import D_MODEL, N_CTX, N_LAYERS, byte_tokenizer, special_ids

CONST, ASKED, DIRECTION, ANSWER = 0, 1, 2, 3
"""Axes of the residual stream; bytes are told apart on axes from 8 on."""
WRITER_HEAD, READER_MLP = (1, 2), 2
"""(layer, head), and the layer whose MLP turns the direction into the answer."""
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<turn>{% endif %}"
)
N_HEADS = 4
D_HEAD = D_MODEL // N_HEADS
SLOW = D_HEAD // 2 - 1
"""The axis of a head that rotary positions hardly turn."""


def save_planted(folder: Path) -> Path:
    """The planted model and its byte tokenizer, as a Hugging Face folder."""
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        intermediate_size=4,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        max_position_embeddings=N_CTX,
        rope_theta=1e9,
        tie_word_embeddings=False,
        **special_ids(tokenizer),
    )
    model = LlamaForCausalLM(config)
    token = {name: tokenizer.convert_tokens_to_ids(name) for name in "!ABC"}
    noise = torch.randn(len(tokenizer), D_MODEL - 8, generator=torch.Generator().manual_seed(0))
    noise = 0.5 * noise / noise.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        embed, unembed = model.model.embed_tokens.weight, model.lm_head.weight
        embed[:, CONST], embed[:, 8:] = 1.0, noise
        embed[token["!"], ASKED], embed[token["!"], 8:] = 0.5, 0.0
        unembed[:, 8:] = 0.1 * noise
        unembed[token["C"], CONST], unembed[token["B"], DIRECTION], unembed[token["A"], ANSWER] = 2.0, 0.5, 3.0
        layer, head = WRITER_HEAD
        attention, first = model.model.layers[layer].self_attn, head * D_HEAD
        attention.q_proj.weight[first + SLOW, CONST] = 10.0
        attention.k_proj.weight[first + SLOW, ASKED] = 10.0
        attention.v_proj.weight[first, ASKED] = 1.0
        attention.o_proj.weight[DIRECTION, first] = 1.0
        mlp = model.model.layers[READER_MLP].mlp
        mlp.gate_proj.weight[0, CONST] = 2.0
        mlp.up_proj.weight[0, DIRECTION] = 1.0
        mlp.down_proj.weight[ANSWER, 0] = 0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def planted_pairs(n: int = 6) -> PairSet:
    """Queries of several lengths, with the instruction "!", which is followed by saying "A"."""
    queries = ["abcdefgh"[: 2 + i % 5] + "xyz"[i % 3] for i in range(n)]
    return PairSet(InstructionPair(query, "!", "keywords:existence", {"keywords": ["A"]}) for query in queries)
