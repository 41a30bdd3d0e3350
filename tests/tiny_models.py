"""Tiny seeded models with random weights, saved as Hugging Face folders: what most tests run on.

Two families, so that what holds for one way of doing positions is not taken for a law: a Llama (rotary positions, RMSNorm,
grouped query attention, a chat template that writes the beginning-of-sequence token) and a GPT-2 (learned positions,
LayerNorm with biases, no template). Weights are drawn wide, so that greedy text varies and near ties are rare. The tokenizer
is bytes, so any prompt is a few dozen tokens; the models only ever say ASCII or stop.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD, TURN = "<bos>", "<eos>", "<pad>", "<turn>"
SPECIALS = (BOS, EOS, PAD, TURN)
N_LAYERS, D_MODEL, N_CTX = 4, 32, 160
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant: {% endif %}"
)


def byte_tokenizer(
    *, chat_template: str | dict[str, str] | None = None, around: str = f"{BOS} $A", bos: str | None = BOS
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and four specials.

    Args:
        around: What its files put around a text: "$A" for nothing.
        bos: Its beginning-of-sequence token; None for a tokenizer without.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*SPECIALS, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single=around, pair=f"{around} $B", special_tokens=[(token, vocabulary[token]) for token in SPECIALS]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[TURN],
        model_max_length=N_CTX,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def widen(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, *, seed: int, eos_gain: float = 3.0) -> None:
    """Redraw every matrix with a standard deviation of 0.4; norms and biases get a little noise, too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.4 * noise)
            else:
                parameter.add_(0.1 * noise)
        silent = [id_ for token, id_ in tokenizer.get_vocab().items() if not (token.isascii() or token == "Ġ")]
        silent += [tokenizer.convert_tokens_to_ids(token) for token in (BOS, PAD, TURN)]
        readout = model.get_output_embeddings().weight
        readout[silent] = 0.0
        readout[tokenizer.eos_token_id] *= eos_gain  # so that some rows stop early


def save_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, *, d_vocab: int = 260) -> Path:
    """A tiny Llama of one layer, with a vocabulary of its own size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=d_vocab,
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=False,
        **special_ids(tokenizer),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_llama(folder: Path, *, seed: int = 0) -> Path:
    """A seeded Llama: 4 layers, d_model 32, 4 heads over 2 key-value heads, with a chat template that holds the BOS."""
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=N_CTX,
        tie_word_embeddings=False,
        **special_ids(tokenizer),
    )
    return save(LlamaForCausalLM(config), tokenizer, folder, seed=seed)


def save_tiny_gpt2(folder: Path, *, seed: int = 0) -> Path:
    """A seeded GPT-2: 4 layers, d_model 32, learned positions, no chat template."""
    tokenizer = byte_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=4,
        n_positions=N_CTX,
        n_ctx=N_CTX,  # as in the hub's own files; TransformerLens 3 reads it
        tie_word_embeddings=False,
        **special_ids(tokenizer),
    )
    return save(GPT2LMHeadModel(config), tokenizer, folder, seed=seed)


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def save(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path, *, seed: int, eos_gain: float = 3.0
) -> Path:
    """The model with wide weights as a Hugging Face folder; `eos_gain` is how readily it stops."""
    widen(model, tokenizer, seed=seed, eos_gain=eos_gain)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
