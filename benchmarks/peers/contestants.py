"""The contestants: the same work done by steerlens, by what people write themselves, and by the toolkits that they install.

    generate   rows of a prompt and steps (layer, vector, coeff), each adding coeff times a unit vector to a block's output at
               every position; greedy, float32. Who cannot give each row its own steps makes one call per steering and batch
    capture    the direction between two lists of texts at every layer, read at the last token: a mean difference, or what repeng
               makes of it (PCA)

Everybody is given the same folder of weights, token ids or texts that become these ids, vectors, and batch size; `races`
writes the works. This file is read by old interpreters, too: each contestant imports what it needs by itself.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch

Work = dict[str, Any]
Added = list[tuple[int, torch.Tensor]]
"""Layer, and what is added there."""


@cache
def hugging_face(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32).eval()


@cache
def tokenizer_of(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@cache
def bridge_of(folder: str) -> Any:
    from steerlens.models.load import load_model

    return load_model(folder, progress=False)


@cache
def nnsight_of(folder: str) -> Any:
    from nnsight import TransformersModel

    return TransformersModel(hugging_face(folder), tokenizer=tokenizer_of(folder), task="text-generation")


def first(out: Any) -> torch.Tensor:
    """A block's hidden state; blocks of other versions return a tuple."""
    return out[0] if isinstance(out, tuple) else out


class Contestant:
    """Hugging Face's `generate` with a forward hook for each steered layer, as anybody would write it."""

    load: Callable[[str], Any] = staticmethod(hugging_face)

    def __init__(self, folder: str, **options: Any) -> None:
        self.model, self.tokenizer, self.folder, self.options = self.load(folder), tokenizer_of(folder), folder, options

    @torch.inference_mode()
    def generate(self, work: Work) -> Any:
        """The new tokens of each row."""
        vectors, found, groups = (
            torch.from_numpy(np.load(work["vectors"])),
            dict[int, list[int]](),
            dict[str, list[int]](),
        )
        for row, (_, steps) in enumerate(work["rows"]):
            groups.setdefault(json.dumps(steps), []).append(row)
        for steps, members in groups.items():
            added = [(layer, coeff * vectors[index]) for layer, index, coeff in json.loads(steps)]
            for start in range(0, len(members), work["batch"]):
                chunk = members[start : start + work["batch"]]
                ids = [work["ids"][work["rows"][row][0]] for row in chunk]
                width, pad = max(map(len, ids)), self.tokenizer.pad_token_id
                tokens = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
                mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
                out = self.sample({"input_ids": tokens, "attention_mask": mask}, added, work)
                found |= dict(zip(chunk, out[:, width:].tolist(), strict=True))
        self.order = list(found)
        return [found[row] for row in range(len(found))]

    def sample(self, batch: dict[str, torch.Tensor], added: Added, work: Work) -> torch.Tensor:
        with self.steered(added):
            return self.model.generate(**batch, **settings(work))

    @contextmanager
    def steered(self, added: Added) -> Iterator[None]:
        def hook_for(vector: torch.Tensor) -> Callable[..., Any]:
            return lambda _, __, out: (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

        with ExitStack() as stack:
            for layer, vector in added:
                stack.callback(self.model.model.layers[layer].register_forward_hook(hook_for(vector)).remove)
            yield

    @torch.inference_mode()
    def capture(self, work: Work) -> list[list[float]]:
        """The mean difference at each layer."""
        means = []
        for side in zip(*work["texts"], strict=True):
            parts = [list(side[start : start + work["batch"]]) for start in range(0, len(side), work["batch"])]
            kept = [self.last_hidden(self.tokenizer(part, return_tensors="pt", padding=True)) for part in parts]
            means.append(torch.cat(kept).mean(0))
        return (means[1] - means[0]).tolist()

    def last_hidden(self, batch: Any) -> torch.Tensor:
        """The last token's hidden state after each block `[row, layer, d_model]`."""
        kept: list[torch.Tensor] = []
        with ExitStack() as stack:
            for block in self.model.model.layers:
                stack.callback(
                    block.register_forward_hook(lambda _, __, out: kept.append(first(out)[:, -1].clone())).remove
                )
            self.model(**batch)
        return torch.stack(kept, dim=1)


def settings(work: Work) -> dict[str, Any]:
    """Hugging Face's; no token has the id -1, so that rows which are not to stop run to their full length."""
    stop = {} if work["stop"] else {"eos_token_id": [-1]}
    return {"do_sample": False, "max_new_tokens": work["new_tokens"], **stop}


class Reference(Contestant):
    """What the others must say: the hook's tokens, each with the gap between its two largest logits."""

    def generate(self, work: Work) -> Any:
        self.gaps: list[list[float]] = []
        tokens = super().generate(work)
        return {"tokens": tokens, "gaps": [gaps for _, gaps in sorted(zip(self.order, self.gaps, strict=True))]}

    def sample(self, batch: dict[str, torch.Tensor], added: Added, work: Work) -> torch.Tensor:
        with self.steered(added):
            out = self.model.generate(**batch, **settings(work), output_logits=True, return_dict_in_generate=True)
        high, low = torch.stack(out.logits, dim=1).topk(2).values.unbind(-1)  # [row, new token]
        self.gaps += (high - low).tolist()
        return out.sequences


class PlainLoop(Contestant):
    """The original recipe over the bare model: one prompt, no cache, the steered prefix again for every token."""

    def sample(self, batch: dict[str, torch.Tensor], added: Added, work: Work) -> torch.Tensor:
        tokens, stop = batch["input_ids"], self.tokenizer.eos_token_id if work["stop"] else None
        for _ in range(work["new_tokens"]):
            tokens = torch.cat([tokens, self.logits(tokens, added)[:, -1].argmax(-1, keepdim=True)], dim=1)
            if tokens[0, -1] == stop:
                break
        return tokens

    def logits(self, tokens: torch.Tensor, added: Added) -> torch.Tensor:
        with self.steered(added):
            return self.model(tokens, use_cache=False).logits


class TransformerLens(Contestant):
    """TransformerLens' own `generate` and `run_with_cache`, with hooks at resid_post."""

    load = staticmethod(bridge_of)

    def hooks(self, added: Added) -> list[tuple[str, Any]]:
        return [(resid_post(layer), lambda resid, hook, vector=vector: resid + vector) for layer, vector in added]

    def sample(self, batch: dict[str, torch.Tensor], added: Added, work: Work) -> torch.Tensor:
        told = {"do_sample": False, "max_new_tokens": work["new_tokens"], "stop_at_eos": work["stop"], "verbose": False}
        with self.model.hooks(fwd_hooks=self.hooks(added)):
            return self.model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **told)

    def last_hidden(self, batch: Any) -> torch.Tensor:
        told = {
            "names_filter": lambda name: name.endswith("hook_resid_post"),
            "attention_mask": batch["attention_mask"],
        }
        _, held = self.model.run_with_cache(batch["input_ids"], **told)
        return torch.stack([held[resid_post(layer)][:, -1] for layer in range(self.model.cfg.n_layers)], dim=1)


def resid_post(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


class Original(TransformerLens):
    """The recipe of Stolfo et al. (2025), written by ourselves: one prompt at a time, no cache while sampling, hooks attached
    again for every token, and a cache of every activation where a few are wanted."""

    sample = PlainLoop.sample

    def logits(self, tokens: torch.Tensor, added: Added) -> torch.Tensor:
        return self.model.run_with_hooks(tokens, fwd_hooks=self.hooks(added))

    def last_hidden(self, batch: Any) -> torch.Tensor:
        rows = []
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            _, held = self.model.run_with_cache(ids[mask.bool()][None])
            rows.append(torch.stack([held[resid_post(layer)][0, -1] for layer in range(self.model.cfg.n_layers)]))
        return torch.stack(rows)


class SteeringVectors(Contestant):
    """steering-vectors: `apply` around Hugging Face's generate, and `train_steering_vector`."""

    def steered(self, added: Added) -> AbstractContextManager[None]:
        from steering_vectors import SteeringVector

        return SteeringVector(dict(added)).apply(self.model)

    def capture(self, work: Work) -> list[list[float]]:
        from steering_vectors import train_steering_vector

        texts = [(with_, without) for without, with_ in work["texts"]]
        vector = train_steering_vector(self.model, self.tokenizer, texts, batch_size=work["batch"])
        return [vector.layer_activations[layer].tolist() for layer in sorted(vector.layer_activations)]


class Repeng(Contestant):
    """repeng: a `ControlModel` around the layers that are steered, and `ControlVector.train` (PCA of the differences)."""

    @contextmanager
    def steered(self, added: Added) -> Iterator[None]:
        from repeng import ControlModel, ControlVector

        control = ControlModel(self.model, [layer for layer, _ in added])
        vectors = {layer: vector.numpy() for layer, vector in added}
        control.set_control(ControlVector(self.model.config.model_type, vectors))
        try:
            yield
        finally:
            control.unwrap()

    def capture(self, work: Work) -> list[list[float]]:
        from repeng import ControlVector, DatasetEntry

        data = [DatasetEntry(positive=with_, negative=without) for without, with_ in work["texts"]]
        vector = ControlVector.train(self.model, self.tokenizer, data, batch_size=work["batch"])
        return [vector.directions[layer].tolist() for layer in sorted(vector.directions)]


class NNsight(Contestant):
    """nnsight: a trace around generate in which each step adds to a block's output, and traces that save the last token."""

    load = staticmethod(nnsight_of)

    def sample(self, batch: dict[str, torch.Tensor], added: Added, work: Work) -> torch.Tensor:
        model = self.model
        with model.generate(**settings(work)) as tracer:
            with tracer.invoke(batch):
                for _ in tracer.iter[:] if added else ():  # it would wait forever for a step that asks for nothing
                    for layer, vector in added:
                        model.model.layers[layer].output = model.model.layers[layer].output + vector
            with tracer.invoke():
                out = tracer.result.save()
        return out

    def last_hidden(self, batch: Any) -> torch.Tensor:
        model = self.model
        with model.trace(dict(batch)):
            found = torch.stack([block.output[:, -1] for block in model.model.layers], dim=1).save()
        return found  # noqa: RET504 -- what stands in the block is traced, a return would not be


class Steerlens(Contestant):
    """steerlens: all rows in one `generate`, which takes the contestant's options, and a vector of running means."""

    load = staticmethod(bridge_of)

    def generate(self, work: Work) -> Any:
        from steerlens.steering import sampling
        from steerlens.steering.interventions import Intervention
        from steerlens.steering.plan import Plan

        vectors = torch.from_numpy(np.load(work["vectors"]))
        plans = {
            text: Plan(
                tuple(Intervention(layer, vectors[index], coeff=coeff) for layer, index, coeff in json.loads(text))
            )
            for text in {json.dumps(steps) for _, steps in work["rows"]}
        }
        with nullcontext() if work["stop"] else _without_stops(sampling):
            done = sampling.generate(
                self.model,
                [work["queries"][prompt] for prompt, _ in work["rows"]],
                steering=[plans[json.dumps(steps)] for _, steps in work["rows"]],
                max_new_tokens=work["new_tokens"],
                batch_size=work["batch"],
                **self.options,
            )
        return [list(row.tokens) for row in done]

    def capture(self, work: Work) -> list[list[float]]:
        from steerlens.data.pairs import InstructionPair, PairSet
        from steerlens.vectors.activations import record_means
        from steerlens.vectors.estimators import fit_steering_vector

        pairs = PairSet(InstructionPair(*pair) for pair in work["pairs"])
        vector = fit_steering_vector(record_means(self.model, pairs, batch_size=work["batch"]))
        return [vector.directions[layer].tolist() for layer in sorted(vector.directions)]

    def prepare(self, work: Work) -> dict[str, Any]:
        """What everybody is given: ids of the queries, texts of the pairs, and on disk a table of unit vectors, first the fitted
        direction of each layer, then some drawn at random; with them, what the limit of the machine is computed from.
        """
        from steerlens.models.facts import stop_ids
        from steerlens.models.prompts import encode_all, render

        model = self.model
        fitted = np.array(self.capture({"pairs": work["pairs"][:16], "batch": 8}))
        drawn = np.random.default_rng(0).standard_normal((work["n_vectors"], fitted.shape[1]))
        vectors = np.concatenate([fitted, drawn])
        np.save(work["vectors"], (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32))
        sides = [(query, f"{query} {instruction}") for query, instruction, _ in work["pairs"]]
        return {
            "ids": encode_all(model, work["queries"]),
            "texts": [[render(model, side) for side in pair] for pair in sides],
            "pair_ids": [encode_all(model, pair) for pair in sides],
            "lengths": np.linalg.norm(fitted, axis=1).tolist(),
            "stop_ids": stop_ids(model),
            "parameters": sum(weights.numel() for weights in hugging_face(self.folder).parameters()),
            "embedding": hugging_face(self.folder).get_input_embeddings().weight.numel(),
        }


@contextmanager
def _without_stops(sampling: Any) -> Iterator[None]:
    kept, sampling.stop_ids = sampling.stop_ids, lambda model: ()
    try:
        yield
    finally:
        sampling.stop_ids = kept


class Machine(Contestant):
    """What the machine does at its best, with the threads that the contestants have."""

    def limits(self, work: Work) -> dict[str, dict[str, float]]:
        """By clock: operations per second of large products, and bytes per second of as many weights as the model has."""
        x, weights = torch.randn(1024), torch.randn(work["parameters"] // 1024, 1024)
        squares = {side: (torch.randn(side, side), torch.randn(side, side)) for side in (512, 1024, 2048)}
        return {
            clock: {
                "operations": max(
                    2 * side**3 / _least(now, lambda a=a, b=b: a @ b) for side, (a, b) in squares.items()
                ),
                "bytes": 4 * weights.numel() / min(_least(now, lambda: weights @ x), _least(now, weights.sum)),
            }
            for clock, now in {"wall": time.perf_counter, "processor": time.process_time}.items()
        }


def _least(now: Callable[[], float], do: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few runs."""
    seconds = []
    for _ in range(20):
        start = now()
        do()
        seconds.append(now() - start)
    return min(seconds)


CONTESTANTS: dict[str, tuple[str, type[Contestant], dict[str, Any]]] = {
    "machine": ("own", Machine, {}),
    "reference": ("own", Reference, {}),
    "Hugging Face": ("own", Contestant, {}),
    "plain loop": ("own", PlainLoop, {}),
    "original recipe": ("own", Original, {}),
    "TransformerLens": ("own", TransformerLens, {}),
    "steerlens": ("own", Steerlens, {}),
    "steering-vectors": ("steering-vectors", SteeringVectors, {}),
    "repeng": ("repeng", Repeng, {}),
    "nnsight": ("nnsight", NNsight, {}),
}
"""Name -> the interpreter it lives in, what it does, and its options: another way of steerlens' is one more line."""
