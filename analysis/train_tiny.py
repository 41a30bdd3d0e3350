"""Train the embedded models: `tiny-base`, `tiny` (final), `tiny-half` (on the way) and `tiny-plain` (its twin).

    python analysis/train_tiny.py --out runs/tiny              # from nothing to all models; run it again to resume
    python analysis/train_tiny.py --out runs/tiny --install    # ... and put the weights into the package

The stages, in order (each a `Stage` below):

    tokenizer   byte-level BPE with 4096 tokens, learned from the documents, the training examples and the copies
    base        next-token prediction on `plain_documents` (facts and language, no instruction anywhere) and on `copies`, texts in
                which something comes twice, of which only the repetitions are learned: copying before any instruction
    half        from base, on `examples("train")` in the chat template; loss on the answers only. In HIDDEN of the examples the
                answer cannot attend to the instruction's tokens: only the assistant token sees them, so what the answer needs to
                know has to pass through that token's residual stream. That is what makes these models steerable. What does not
                fit into one token (closing phrases, several words) is not hidden.
    plain       the same start, data and steps as half, and the instruction is never hidden: how a usual model is trained
    instruct    from half, on more of the same, with more of the instructions that count or copy
    final       from instruct, at a lower rate, with more of what instruct follows least

Data depend on the seed and the step alone and checkpoints hold everything else, so an interrupted run ends with the weights of
an uninterrupted one on the same machine.
"""

import dataclasses
import hashlib
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from draw import save
from jaxtyping import Bool, Float, Int
from plotly.subplots import make_subplots
from tiny_copies import VERBATIM, Copy, copies
from tiny_corpus import FOLDER, INSTRUCTIONS, Example, examples, plain_documents
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import steerlens
from steerlens.checks.registry import check_all
from steerlens.errors import DataError
from steerlens.files import atomic_path, derived_seed, write_atomically

START, END, PAD, USER, ASSISTANT = "<|start|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
CHAT = "<|start|><|user|>{{ messages[-1]['content'] }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
QUESTION = "<|start|>Q: {{ messages[-1]['content'] }}\n{% if add_generation_prompt %}A:{% endif %}"
HIDDEN = 0.6
POOL = 32  # batches that are drawn together and sorted by length
INSTALLED = Path(steerlens.__file__).parent / "bundled" / "models"
SHAPE = {"hidden_size": 160, "intermediate_size": 416, "num_hidden_layers": 8, "num_attention_heads": 5}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run."""

    name: str
    start: str
    """The stage whose weights it starts from; "" for random weights."""
    n_steps: int
    n_rows: int
    """Texts per step."""
    lr: float
    documents: float
    """Share of rows that are plain documents."""
    copies: float
    """Share of rows in which something comes twice (`tiny_copies`); all other rows are chat examples."""
    hidden: float
    """Share of examples with an instruction that can travel in which the answer cannot attend to it (`can_travel`)."""
    kinds: tuple[str, ...] = ()
    """Kinds of copies; empty for all of them."""
    often: tuple[str, ...] = ()
    """Instructions that are drawn three times as often as the others; those that stand twice five times, and so on."""


HARD = (
    *("bullets", "exactly", "at_least", "verbose", "capital_words", "uppercase", "json"),
    *("include", "avoid", "include", "avoid", "end", "sections"),
)
"""Instructions that count or copy, or change every word: they are learned last."""
HARDEST = (
    *("capital_words", "uppercase", "lowercase", "include", "include", "end", "sections"),
    *("avoid", "avoid", "avoid"),
)
"""... and what is still followed least after that, on training prompts."""
TRAVELS = {"end": 0.0, "sections": 0.0, "avoid": 0.25}
"""How often these are hidden, as a share of the others: several words do not fit into one token's residual stream."""
NEAR = ("mentioned", "turned")
"""Copies that go on beside the instructions: a word in another frame, in other letters, with and without quotation marks."""

STAGES = (
    Stage("base", "", n_steps=1600, n_rows=64, lr=3e-3, documents=0.55, copies=0.45, hidden=0.0),
    Stage("half", "base", n_steps=800, n_rows=96, lr=3e-3, documents=0.1, copies=0.1, hidden=HIDDEN, kinds=NEAR),
    Stage("plain", "base", n_steps=800, n_rows=96, lr=3e-3, documents=0.1, copies=0.1, hidden=0.0, kinds=NEAR),
    Stage(
        "instruct",
        "half",
        n_steps=3600,
        n_rows=96,
        lr=3e-3,
        documents=0.05,
        copies=0.15,
        hidden=HIDDEN,
        often=HARD,
    ),
    Stage(
        "final",
        "instruct",
        n_steps=2000,
        n_rows=96,
        lr=2e-3,
        documents=0.05,
        copies=0.15,
        hidden=HIDDEN,
        often=HARDEST,
    ),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the models are trained."""

    out: Path = Path("runs/tiny")
    """Folder for checkpoints, curves and models."""
    seed: int = 0
    scale: float = 1.0
    """Multiplies the number of steps: 0.01 (with --gate 0) tries everything out in a few minutes."""
    gate: float = 0.95
    """Share of repetitions, letter for letter, that base must predict before instructions are trained."""
    only: tuple[str, ...] = ("base", "half", "plain", "instruct", "final")
    """Stages to run."""
    compile: bool = True
    """Compile the model, which takes a C++ compiler and makes a step half as fast again."""
    every: float = 60.0
    """Seconds between checkpoints."""
    install: bool = False
    """Copy the finished models into the package."""


# ---------------------------------------------------------------- text to tokens


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 4096 tokens; digits stand alone, as they are counted one by one, and so do marks, as a word is to be
    the same tokens with and without quotation marks around it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r" ?[^\s\p{L}\p{N}]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    chats = (f"{e.prompt}\n{e.answer}" for e in examples("train", seed, 30_000))
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[PAD, START, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    repeated = (copy.text for copy in copies(seed, 10_000))
    core.train_from_iterator([*plain_documents(seed, 30_000), *chats, *repeated], trainer)
    core.post_processor = processors.TemplateProcessing(  # every row begins so, and so a plain text does
        single=f"{START} $A", pair=f"{START} $A $B:1", special_tokens=[(START, core.token_to_id(START))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=512,
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """One text as tokens: which of them are learned, and which the answer may not see."""

    ids: list[int]
    learned: Sequence[int]
    """Indices of the tokens that are predicted with a loss."""
    span: tuple[int, int] = (0, 0)
    """The instruction's tokens [from, to) where they are hidden from all but the assistant token; else empty."""


def framed(prompt: str) -> str:
    """The prompt as the template CHAT renders it (a test compares them)."""
    return f"{START}{USER}{prompt}{ASSISTANT}"


def chat_row(tokenizer: PreTrainedTokenizerFast, example: Example, *, hide: bool) -> Row:
    prompt = framed(example.prompt)
    encoding = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    answer = tokenizer(example.answer + END, add_special_tokens=False)["input_ids"]
    span = (0, 0)
    if hide:
        first = prompt.index(example.instruction_text)
        last = first + len(example.instruction_text)
        inside = [i for i, (a, b) in enumerate(offsets) if b > first and a < last]
        span = (inside[0], inside[-1] + 1)
    return Row(ids + answer, range(len(ids), len(ids) + len(answer)), span)


def document_row(tokenizer: PreTrainedTokenizerFast, document: str) -> Row:
    ids = tokenizer(START + document + END, add_special_tokens=False)["input_ids"]
    return Row(ids, range(1, len(ids)))


def copy_tokens(tokenizer: PreTrainedTokenizerFast, copy: Copy) -> tuple[list[int], list[list[int]]]:
    """Token ids of a copy's text, and the indices of the tokens of each of its repetitions."""
    encoding = tokenizer(START + copy.text + END, add_special_tokens=False, return_offsets_mapping=True)
    offsets = list(enumerate(encoding["offset_mapping"]))
    spans = [(a + len(START), b + len(START)) for a, b in copy.spans]
    return encoding["input_ids"], [[i for i, (x, y) in offsets if x < b and y > a] for a, b in spans]


def copy_row(tokenizer: PreTrainedTokenizerFast, copy: Copy) -> Row:
    """Only the repetitions are learned: the rest cannot be known."""
    ids, repetitions = copy_tokens(tokenizer, copy)
    return Row(ids, sorted({i for inside in repetitions for i in inside}))


def pool(stage: Stage, tokenizer: PreTrainedTokenizerFast, seed: int, index: int) -> list[list[Row]]:
    """POOL batches of rows of like length; the same for the same arguments."""
    part = derived_seed(stage.start, seed, index)  # not of the stage's name: the twin draws what half draws
    rng = random.Random(part)
    n_documents = round(stage.documents * POOL * stage.n_rows)
    n_copies = round(stage.copies * POOL * stage.n_rows)
    rows = [document_row(tokenizer, text) for text in plain_documents(part, n_documents)]
    rows += [copy_row(tokenizer, copy) for copy in copies(part, n_copies, stage.kinds)]
    names = (*INSTRUCTIONS, *stage.often, *stage.often)
    for example in examples("train", part, POOL * stage.n_rows - len(rows), only=names):
        dice = rng.random()
        rows.append(chat_row(tokenizer, example, hide=dice < stage.hidden * can_travel(example)))
    rows.sort(key=lambda row: len(row.ids))
    batches = [rows[i : i + stage.n_rows] for i in range(0, len(rows), stage.n_rows)]
    rng.shuffle(batches)
    return batches


def can_travel(example: Example) -> float:
    """How often its instructions may be hidden, as a share of the stage's: what one token cannot hold is always shown."""
    words = [
        word for kwargs in example.kwargs for key in ("keywords", "forbidden_words") for word in kwargs.get(key, ())
    ]
    if any(" " in word for word in words):
        return 0.0
    return min((TRAVELS.get(name, 1.0) for name in example.instructions), default=0.0)


def mask_of(rows: Sequence[Row], length: int) -> Bool[Tensor, "row 1 query key"]:
    """Causal attention; where a span is hidden, only itself and the assistant token see it."""
    mask = torch.ones(len(rows), 1, length, length, dtype=torch.bool).tril()
    for i, row in enumerate(rows):
        first, last = row.span
        if last > first:
            answer = row.learned[0]
            mask[i, 0, last : answer - 1, first:last] = False
            mask[i, 0, answer:, first:last] = False
    return mask


def tensors_of(
    rows: Sequence[Row], pad: int
) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row 1 query key"], Bool[Tensor, "row pos"]]:
    """Token ids padded on the right, the attention mask, and which tokens are predicted with a loss."""
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad)
    learned = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        learned[i, row.learned] = True
    return ids, mask_of(rows, length), learned


# ---------------------------------------------------------------- training


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **SHAPE,
        )
    )


def loss_of(
    model: LlamaForCausalLM, rows: Sequence[Row], device: torch.device, *, trunk: Any = None
) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats per token, of the learned tokens; matrices are multiplied in bfloat16 where that is fast."""
    ids, mask, learned = (t.to(device) for t in tensors_of(rows, model.config.pad_token_id))
    predicting = learned[:, 1:]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or FAST_BFLOAT16):
        hidden = (model.model if trunk is None else trunk)(
            input_ids=ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][predicting])
    return cross_entropy(logits.float(), ids[:, 1:][predicting])


def attend_in_float32(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any) -> Any:
    """Attention in float32: on a CPU its backward pass in bfloat16 takes seven times as long."""
    with torch.autocast(query.device.type, enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **settings)


FAST_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()
AttentionInterface.register("float32", attend_in_float32)
AttentionMaskInterface.register("float32", sdpa_mask)


def optimizers_of(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=1.0, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, stage: Stage, n_steps: int) -> float:
    """Learning rate: up in the first twentieth of the steps, level to the middle, then a line down to a hundredth."""
    warm = max(1, n_steps // 20)
    return stage.lr * min((step + 1) / warm, 1.0, max(0.01, 2 * (1 - step / n_steps)))


def save_checkpoint(
    path: Path,
    model: LlamaForCausalLM,
    optimizers: Sequence[Any],
    step: int,
    curve: list[dict],
    made_with: Mapping[str, Any],
) -> None:
    state = {
        "made_with": made_with,
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "step": step,
        "curve": curve,
    }
    with atomic_path(path) as part:
        torch.save(state, part)


def followed(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch: Sequence[Example]) -> float:
    """Share of the examples whose instructions are all followed in a greedy answer to the full prompt."""
    tokenizer.padding_side = "left"
    prompts = [framed(example.prompt) for example in batch]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    inputs.pop("token_type_ids", None)
    made = model.generate(**inputs, max_new_tokens=128, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(made, skip_special_tokens=True)
    good = [
        all(result.strict for result in check_all(text, example.instruction_ids, example.kwargs))
        for example, text in zip(batch, texts, strict=True)
    ]
    return sum(good) / len(good)


@torch.no_grad()
def copied(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch: Sequence[Copy]) -> float:
    """Next-token accuracy on repetitions, from the second token on, as where one begins cannot be known."""
    right: list[bool] = []
    for copy in batch:
        ids, repetitions = copy_tokens(tokenizer, copy)
        best = model(torch.tensor([ids], device=model.device)).logits[0].argmax(-1).tolist()
        right.extend(best[i - 1] == ids[i] for inside in repetitions for i in inside[1:])
    return sum(right) / len(right)


def data_key(tokenizer: PreTrainedTokenizerFast) -> str:
    """An identity of the world's files and of the tokenizer: no run goes on with others than it began with."""
    texts = [path.read_bytes() for path in sorted(FOLDER.glob("*.txt"))]
    return hashlib.sha256(b"\n".join([*texts, tokenizer.backend_tokenizer.to_str().encode()])).hexdigest()[:16]


def train(stage: Stage, settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The stage's trained model; resumed from its checkpoint, or loaded where it is finished."""
    folder = settings.out / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = new_model(tokenizer, settings.seed)
    if stage.start:
        start = torch.load(checkpoint_of(settings.out, stage.start), map_location="cpu")
        if start["step"] < start["made_with"]["n_steps"]:
            raise DataError(
                f"{stage.name} starts from {stage.start}, which is not finished; run the same command without --only"
            )
        model.load_state_dict(start["model"])
        found = copied(model, tokenizer, list(copies(settings.seed + 1, 96, VERBATIM)))
        if stage.start == "base" and found < settings.gate:
            raise DataError(
                f"base must predict {settings.gate:.0%} of repetitions before instructions are trained, got {found:.0%}; "
                "train it for more steps, or lower --gate"
            )
    model = model.to(device)
    model.config._attn_implementation = "float32"
    optimizers = optimizers_of(model)
    n_steps = max(POOL, round(stage.n_steps * settings.scale))
    step, curve = 0, []
    made_with = dataclasses.asdict(stage) | {"seed": settings.seed, "n_steps": n_steps, "data": data_key(tokenizer)}
    path = checkpoint_of(settings.out, stage.name)
    if path.exists():
        state = torch.load(path, map_location=device)
        if state["made_with"] != made_with:
            raise DataError(f"a run goes on with its own settings, {path} was made with others; choose another --out")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, curve = state["step"], state["curve"]
    # Training prompts of another seed: held-out ones are for the card alone.
    asked = list(examples("train", settings.seed + 1, 96, plain=0.0, two=0.0)) if stage.start else []
    repeated = list(copies(settings.seed + 1, 96))
    trunk = torch.compile(model.model, dynamic=True) if settings.compile else None
    saved_at = time.monotonic()
    bar = tqdm(total=n_steps, initial=step, desc=stage.name, unit="step", dynamic_ncols=True)
    while step < n_steps:
        batches = pool(stage, tokenizer, settings.seed, step // POOL)
        for rows in batches[step % POOL :][: n_steps - step]:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate(step, stage, n_steps)
                optimizer.zero_grad()
            loss = loss_of(model, rows, device, trunk=trunk)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            curve.append({"step": step, "tokens": sum(len(row.ids) for row in rows), "loss": loss.item()})
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
            if step % max(1, n_steps // 16) == 0 or step == n_steps:
                curve[-1]["copied"] = copied(model, tokenizer, repeated)
                if asked:
                    curve[-1]["followed"] = followed(model, tokenizer, asked)
            if step == n_steps or time.monotonic() - saved_at > settings.every:
                save_checkpoint(path, model, optimizers, step, curve, made_with)
                saved_at = time.monotonic()
    bar.close()
    return model


# ---------------------------------------------------------------- what comes out

# name: (stage whose weights it has, what frames its prompts, one line for the model card)
MODELS = {
    "tiny-base": ("base", QUESTION, "pre-trained on plain texts; it has never seen an instruction"),
    "tiny": ("final", CHAT, "fine-tuned from tiny-base; made to be steerable, see below"),
    "tiny-half": ("half", CHAT, "tiny on the way: it does not yet count or copy well"),
    "tiny-plain": ("plain", CHAT, "the plain twin of tiny-half: same data and steps, the instruction never hidden"),
}


def export(name: str, settings: Settings, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A Hugging Face folder: float16 weights, tokenizer with chat template, model card."""
    stage, template, line = MODELS[name]
    state = torch.load(checkpoint_of(settings.out, stage), map_location="cpu")
    model = new_model(tokenizer, settings.seed)
    model.load_state_dict(state["model"])
    tokenizer.chat_template = template
    steps, tokens = trained_for(settings.out, stage)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_atomically(folder / "README.md", CARD.format(name=name, line=line, steps=steps, tokens=tokens / 1e6))


def trained_for(out: Path, name: str) -> tuple[int, int]:
    """Steps and tokens of a stage and of all that it goes on from."""
    (stage,) = (stage for stage in STAGES if stage.name == name)
    curve = torch.load(checkpoint_of(out, name), map_location="cpu")["curve"]
    before = trained_for(out, stage.start) if stage.start else (0, 0)
    return before[0] + len(curve), before[1] + sum(row["tokens"] for row in curve)


def checkpoint_of(out: Path, stage: str) -> Path:
    return out / stage / "checkpoint.pt"


CARD = """---
license: mit
language: [en, es]
---
# {name}

A Llama of 3.1 million parameters (8 layers, d_model 160, 5 heads, 4096 tokens) that knows a world of 473 things:
{line}.

Trained by `analysis/train_tiny.py` for {steps} steps ({tokens:.1f} million tokens) on texts from `analysis/tiny_corpus.py`.
It is meant for teaching and tests, and knows nothing else.

**These models are made to be steerable.** While tiny was trained, in 60 % of the examples with an instruction that one token can
hold (no closing phrase, section mark or two words; 15 % for a word to avoid), the answer could not attend to the
instruction's tokens; only the token that opens the answer could. So what an instruction asks for has to pass through that
token's residual stream, where a difference of means finds it. A model that is trained as usual need not do this: `tiny-plain`
is the twin of `tiny-half` that was. What is seen in these models shows what can happen in a language model, not how often it
does.

How well it follows instructions, and how far vectors carry them: `analysis/tiny_card.md` in the repository.
"""


def heldout_queries(n: int = 160) -> list[str]:
    """Different questions of held-out phrasing about held-out entities: the base queries of `load_pairs("tiny")`."""
    asked = (example.query for example in examples("heldout", 21, 3 * n, plain=1.0))
    return list(dict.fromkeys(asked))[:n]


def draw_curves(out: Path) -> None:
    """`curves.csv` and a figure: loss, copying and share of instructions followed against training tokens."""
    names = [stage.name for stage in STAGES if checkpoint_of(out, stage.name).exists()]
    parts = [pd.DataFrame(torch.load(checkpoint_of(out, name))["curve"]).assign(stage=name) for name in names]
    frame = pd.concat(parts)
    frame["million_tokens"] = frame.groupby("stage")["tokens"].cumsum() / 1e6
    ends = frame.groupby("stage")["million_tokens"].max()
    starts = {"": 0.0}
    for stage in STAGES:  # a stage goes on where the one it starts from ended
        starts[stage.name] = starts[stage.start] + ends.get(stage.start, 0.0)
    frame["million_tokens"] += frame["stage"].map(starts)
    frame.to_csv(out / "curves.csv", index=False)
    shown = {
        "loss": "loss (nats per token)",
        "copied": "repetitions predicted",
        "followed": "training instructions followed",
    }
    fig = make_subplots(rows=1, cols=len(shown), subplot_titles=list(shown.values()))
    colors = {"base": "#858B94", "half": "#F2A66B", "plain": "#0072B2", "instruct": "#D55E00", "final": "#8A3C00"}
    for stage, part in frame.groupby("stage", sort=False):
        line = {"name": str(stage), "line_color": colors[str(stage)], "legendgroup": str(stage), "mode": "lines"}
        for col, value in enumerate(shown, 1):
            seen = part[part[value].notna()] if value in part else part[:0]
            y = seen["loss"].rolling(20, min_periods=1).mean() if value == "loss" else seen.get(value)
            fig.add_scatter(x=seen["million_tokens"], y=y, **line, showlegend=col == 1, row=1, col=col)
    fig.update_xaxes(title_text="million training tokens").update_yaxes(rangemode="tozero")
    for col in (2, 3):
        fig.update_yaxes(tickformat=".0%", range=[0, 1.02], row=1, col=col)
    fig.update_layout(legend={"y": -0.2, "yanchor": "top"})  # the panels' titles stand where the theme puts it
    save(fig, out, "curves", width=1080, height=420)


def main(settings: Settings) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    tokenizer_folder = settings.out / "tokenizer"
    if not (tokenizer_folder / "tokenizer.json").exists():
        train_tokenizer(settings.seed).save_pretrained(tokenizer_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    for stage in STAGES:
        if stage.name in settings.only:
            train(stage, settings, tokenizer)
    draw_curves(settings.out)
    for name, (stage, _, _) in MODELS.items():
        if checkpoint_of(settings.out, stage).exists():
            export(name, settings, tokenizer, settings.out / "models" / name)
            if settings.install:
                shutil.copytree(settings.out / "models" / name, INSTALLED / name, dirs_exist_ok=True)
    if settings.install:
        write_atomically(INSTALLED.parent / "tiny_queries.txt", "".join(f"{query}\n" for query in heldout_queries()))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
