"""The quality of responses, as models see it: perplexity, divergence from the unsteered model, reward.

    perplexity       exp of the mean negative log probability of the response's tokens. By default under the unsteered model,
                     given the bare query in every cell, so that cells stand on the same footing; under another causal LM
                     (GPT-2 in Stolfo et al. 2025), of the text alone, its last 1024 tokens.
    low_perplexity   a perplexity below 2.5, their mark of looping text; a response without any text counts as one, too.
    kl               KL(steered || unsteered) of the next-token distribution in nats, the mean over the response's tokens, both
                     models reading the same prompt and response. What steering does to the model, whatever it says.
    reward           a reward model's logit for the query and the response.

What these do not show: whether the response answers the query. A fluent answer to another question has a fine perplexity.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlens._typing import Gate
from steerlens.errors import ModelError, SteerlensError
from steerlens.files import content_key
from steerlens.models.facts import model_digest, weights_digest
from steerlens.models.load import in_one_line, load_model
from steerlens.models.passes import run_pass
from steerlens.models.probe import abilities
from steerlens.models.prompts import PromptFormat, encode, fill_template
from steerlens.models.rows import Rows, pad, pad_id
from steerlens.steering.edits import plan_edits
from steerlens.steering.plan import Plan

LOW_PERPLEXITY = 2.5


LAST_TOKENS = 1024


LOGITS_MEMORY = 2**28
"""Bytes that the logits of one batch may take: a vocabulary is wide."""


@dataclass(frozen=True)
class Quality:
    """What is measured on each response.

    Example:
        >>> Quality(kl=True).perplexity
        True
    """

    perplexity: bool = True
    quality_model: str | None = None
    """Whose perplexity: a name, folder or hub id of a causal LM; None is the unsteered model itself, given the bare query."""
    kl: bool = False
    """Also the divergence of each response from the unsteered model."""
    reward_model: str | None = None
    """A folder or hub id of a sequence classifier with one label; None measures no reward."""

    @classmethod
    def for_gate(cls, gate: Gate, quality_model: str | None = None) -> "Quality":
        """What a search needs: perplexity where its gate asks for it, or a model is named for it.

        >>> Quality.for_gate("degenerate").perplexity
        False
        """
        return cls(perplexity=gate != "degenerate" or quality_model is not None, quality_model=quality_model)

    def load(self) -> None:
        """Load the models that are named, so that a wrong name shows before anything is generated.

        Raises:
            ModelError: if one cannot be loaded, or is no reward model.
        """
        if self.quality_model is not None:
            _causal_lm(self.quality_model)
        if self.reward_model is not None:
            _classifier(self.reward_model)

    def content(self) -> dict[str, Any]:
        """What is measured, with the models that measure by their weights: the same wherever they lie."""
        found = asdict(self)
        if self.quality_model is not None:
            found["quality_model"] = model_digest(_causal_lm(self.quality_model))
        if self.reward_model is not None:
            classifier = _classifier(self.reward_model)[0]
            found["reward_model"] = weights_digest(classifier, classifier.config)
        return found


@dataclass(frozen=True)
class Response:
    """A response and what it answered."""

    query: str
    """The bare query, or the whole prompt where there is none."""
    text: str
    context: tuple[int, ...]
    """The tokens of the bare query as they are fed."""
    prompt: tuple[int, ...]
    """The tokens that were fed."""
    tokens: tuple[int, ...]
    """The new tokens, the stopping one included."""
    plan: Plan
    """Bound to the prompt."""


Known = dict[str, float]
"""Values by a key of what they were measured on: that of many responses is far smaller than the responses."""


def measure(
    model: Any,
    responses: Sequence[Response],
    quality: Quality,
    *,
    batch_size: int = 8,
    known: Known | None = None,
) -> pd.DataFrame:
    """One row per response: perplexity and low_perplexity, and where they are asked for kl and reward. nan: not defined.

    Equal responses are measured once.

    Args:
        known: What was measured before, of other responses, under the same model and quality; what is new is added to it.
    """
    once = partial(_once, {} if known is None else known)
    columns: dict[str, list[float]] = {"perplexity": [float("nan")] * len(responses)}
    if quality.perplexity and quality.quality_model is None:
        rows = [(one.context, one.tokens) for one in responses]
        columns["perplexity"] = once(
            "perplexity", rows, lambda new: (-mean_log_probabilities(model, new, batch_size)).exp().tolist()
        )
    elif quality.perplexity:
        texts = [(one.text,) for one in responses]
        columns["perplexity"] = once(
            "perplexity",
            texts,
            lambda new: text_perplexities(_causal_lm(quality.quality_model), [text for (text,) in new]),
        )
    if quality.kl:
        steps = [(one.prompt, one.tokens, one.plan) for one in responses]
        columns["kl"] = once("kl", steps, lambda new: kl_from_unsteered(model, new, batch_size))
    if quality.reward_model is not None:
        pairs = [(one.query, one.text) for one in responses]
        columns["reward"] = once("reward", pairs, lambda new: rewards(str(quality.reward_model), new))
    frame = pd.DataFrame(columns)
    if quality.perplexity:
        empty = pd.Series([not one.text.strip() for one in responses])
        frame.insert(1, "low_perplexity", (frame["perplexity"] < LOW_PERPLEXITY) | empty)
    return frame


def _once(known: Known, what: str, items: Sequence[Any], values: Callable[[list[Any]], list[float]]) -> list[float]:
    """The value of each item, each distinct one computed once, and not at all where it is known."""
    digests = {id(part): part.digest for item in items for part in item if isinstance(part, Plan)}
    keys = [
        content_key([what, *(digests[id(part)] if isinstance(part, Plan) else part for part in item)]) for item in items
    ]
    new = {key: item for key, item in zip(keys, items, strict=True) if key not in known}
    known.update(zip(new, values(list(new.values())), strict=True))
    return [known[key] for key in keys]


def mean_log_probabilities(
    model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 8
) -> Float[Tensor, " row"]:
    """Mean log probability, in nats, of each row's second part after its first; nan where the second part is empty."""
    if any(len(new) and not len(given) for given, new in rows):
        raise SteerlensError(
            "a token's probability needs a token before it, got a row with nothing given; start with the first token"
        )
    found = torch.full((len(rows),), float("nan"))
    for indices, batch in _batches(model, [(*row, Plan()) for row in rows], batch_size):
        logits = run_pass(model, batch, logits="all").logits
        for place, index in enumerate(indices):
            new = list(rows[index][1])
            if new:
                scores = _before(logits[place], batch, place, len(new)).log_softmax(-1)
                found[index] = scores.gather(-1, torch.tensor(new)[:, None]).mean()
    return found


def _before(logits: Float[Tensor, "pos d_vocab"], batch: Rows, place: int, n_new: int) -> Float[Tensor, "new d_vocab"]:
    """The logits that a row's last tokens were chosen from, float32 on the CPU."""
    end = int(batch.last[place])
    return logits[end - n_new : end].float().cpu()


def text_perplexities(model: Any, texts: Sequence[str], batch_size: int = 8) -> list[float]:
    """Perplexity of each text on its own, its last 1024 tokens; nan for a text of fewer than two tokens.

    The first token, the beginning-of-sequence token where the model's tokenizer writes one, is given and not scored.
    """
    plain = PromptFormat(style="plain")
    room = min(LAST_TOKENS, int(model.cfg.n_ctx))
    rows = []
    for text in texts:
        ids = encode(model, text, plain)[-room:] if text else []
        rows.append((ids[:1], ids[1:]))
    values: list[float] = (-mean_log_probabilities(model, rows, batch_size)).exp().tolist()
    return values


def kl_from_unsteered(
    model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int], Plan]], batch_size: int = 8
) -> list[float]:
    """KL(steered || unsteered) in nats, the mean over each response's tokens; 0 where nothing steers, nan without tokens.

    Nan, too, under a gate: whether it steered a token is not told by one pass over the response.
    """
    found = [float("nan") if not new or plan.active.gate else 0.0 for _, new, plan in rows]
    active = [index for index, (_, new, plan) in enumerate(rows) if new and plan.active and not plan.active.gate]
    steered = [rows[index] for index in active]
    for indices, batch in _batches(model, steered, max(1, batch_size // 2)):
        plans = [steered[index][2] for index in indices]
        edits = plan_edits(model, plans, batch.prompt_lengths)
        both = [run_pass(model, batch, edits=used, logits="all").logits for used in (edits, ())]
        for place, index in enumerate(indices):
            n_new = len(steered[index][1])
            p, q = (_before(logits[place], batch, place, n_new).log_softmax(-1) for logits in both)
            found[active[index]] = float((p.exp() * (p - q)).sum(-1).mean())
    return found


def _batches(
    model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int], Plan]], batch_size: int
) -> Iterator[tuple[list[int], Rows]]:
    """Places of the rows that are run together, as many as their logits allow, and the rows; empty ones are left out."""
    filled = [index for index, (first, second, _) in enumerate(rows) if len(first) + len(second)]
    if not filled:
        return
    lengths = [len(rows[index][0]) + len(rows[index][1]) for index in filled]
    able = abilities(model, max(lengths))
    fitting = LOGITS_MEMORY // (4 * max(lengths) * int(model.cfg.d_vocab))
    for batch in able.batches(lengths, max(1, min(batch_size, fitting))):
        indices = [filled[place] for place in batch]
        ids = [[*rows[index][0], *rows[index][1]] for index in indices]
        prompts = [len(rows[index][0]) for index in indices]
        yield indices, pad(ids, side=able.side, pad_id=pad_id(model), prompt_lengths=prompts)


@cache
def _causal_lm(name: str) -> Any:
    return load_model(name, progress=False)


@cache
def _classifier(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name = os.path.expanduser(name)
    try:
        classifier, info = AutoModelForSequenceClassification.from_pretrained(
            name, output_loading_info=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever third parties raise for files that will not do
        raise ModelError(
            f"a reward model must be a folder or a reachable hub id, got {name!r}: {in_one_line(error)}"
        ) from error
    if classifier.config.num_labels != 1 or info["missing_keys"]:
        raise ModelError(
            f"a reward model must give one number by trained weights, got {name!r} with {classifier.config.num_labels} labels "
            f"and {len(info['missing_keys'])} missing weights; choose a model that was trained as a reward model"
        )
    if tokenizer.chat_template:
        _chat(tokenizer, "a", "b")  # a template that cannot do it is refused before anything is generated
    if classifier.config.pad_token_id is None:
        classifier.config.pad_token_id = tokenizer.pad_token_id
    return classifier.eval(), tokenizer


def _chat(tokenizer: Any, query: str, text: str) -> str:
    return fill_template(tokenizer, [("user", query), ("assistant", text)], add_generation_prompt=False)


def rewards(name: str, pairs: Sequence[tuple[str, str]], batch_size: int = 8) -> list[float]:
    """The reward model's logit for each (query, response): as a chat where its tokenizer has a template, else as two texts.

    Raises:
        ModelError: if the model cannot be loaded, or has more than one label.
    """
    classifier, tokenizer = _classifier(name)
    # Another token in the place of padding would be taken for the text's end, so without one texts go one by one.
    batch_size = batch_size if tokenizer.pad_token_id is not None else 1
    takes_segments = "token_type_ids" in inspect.signature(classifier.forward).parameters
    values: list[float] = []
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        options = {"return_tensors": "pt", "padding": batch_size > 1, "truncation": True}
        if tokenizer.chat_template:
            rendered = [_chat(tokenizer, query, text) for query, text in part]
            batch = tokenizer(rendered, add_special_tokens=False, **options)
        else:
            batch = tokenizer([query for query, _ in part], [text for _, text in part], **options)
        if not takes_segments:
            batch.pop("token_type_ids", None)
        with torch.inference_mode():
            values += classifier(**batch.to(classifier.device)).logits[:, 0].float().tolist()
    return values
