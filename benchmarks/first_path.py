"""Speed and memory of the first path, as ratios inside one run.

    python benchmarks/first_path.py                      # smollm2-135m, a few minutes on two cores
    python benchmarks/first_path.py --model FOLDER --tokens 16 --rounds 1

The contestants take turns, round after round, so that whatever else the machine does hits all of them; the table gives the
median over rounds and the ratio to the contestant named in the first row of its group.

    sampling   steered tokens per second at batch 1 and 16, against plain loops (batch 1, no cache, the whole prefix for every
               token: through the bridge, as TransformerLens users write it, and over the bare Hugging Face model, which is
               tests/reference/plain_loop.py), and against Hugging Face's own unsteered generate (sdpa attention);
               no row stops early, so all work at their full batch
    capture    pairs per second, against run_with_cache of everything, one prompt at a time
    memory     peak resident memory of a process that records 64 or 512 pairs, as running means and as kept examples
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from steerlens.data.load import load_pairs
from steerlens.data.pairs import PairSet
from steerlens.models.load import load_model
from steerlens.models.prompts import encode
from steerlens.models.rows import pad, pad_id
from steerlens.steering import sampling as sampling_module
from steerlens.steering.edits import steer
from steerlens.steering.sampling import generate
from steerlens.vectors.activations import record_activations, record_means
from steerlens.vectors.estimators import fit_steering_vector
from tests.reference.plain_loop import Step, plain_greedy

Contestant = Callable[[], float]
"""Runs once and returns units (tokens or pairs) per second."""


def timed(units: Callable[[], int]) -> float:
    start = time.perf_counter()
    count = units()
    return count / (time.perf_counter() - start)


def alternate(contestants: dict[str, Contestant], rounds: int) -> dict[str, float]:
    """The median rate of each contestant; they take turns, after one untimed turn each."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            rate = run()
            if turn:
                rates[name].append(rate)
            print(f"\r  round {turn}/{rounds}: {name:<60}", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 90 + "\r", end="", file=sys.stderr)
    return {name: statistics.median(values) for name, values in rates.items()}


def show(title: str, unit: str, rates: dict[str, float]) -> None:
    print(f"\n{title}")
    base = next(iter(rates.values()))
    for name, rate in rates.items():
        print(f"  {name:<60} {rate:8.1f} {unit}  {rate / base:6.2f}x")


def sampling_contestants(model: Any, hf: Any, pairs: PairSet, n_tokens: int) -> dict[str, Contestant]:
    vector = fit_steering_vector(record_activations(model, pairs[:8]))
    layer = int(model.cfg.n_layers) // 2
    plan = vector.at(layer)
    step = Step(layer, "set_projection", vector.unit(layer), 1.0, vector.proj_with[layer])
    prompts = pairs.prompts("none")[:16]

    def plain() -> int:
        return len(plain_greedy(hf, encode(model, prompts[0]), [step], max_new_tokens=n_tokens).tokens)

    def plain_through_the_bridge() -> int:
        ids = encode(model, prompts[0])
        with torch.inference_mode(), steer(model, plan):
            for _ in range(n_tokens):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        return n_tokens

    def steered(batch: int) -> int:
        rows = generate(model, prompts[:batch], steering=plan, max_new_tokens=n_tokens, batch_size=batch)
        return sum(len(row.tokens) for row in rows)

    def unsteered(batch: int) -> int:
        ids = pad([encode(model, prompt) for prompt in prompts[:batch]], pad_id=pad_id(model))
        options = {
            "max_new_tokens": n_tokens,
            "min_new_tokens": n_tokens,
            "do_sample": False,
            "pad_token_id": pad_id(model),
        }
        with torch.inference_mode():
            out = hf.generate(ids.tokens, attention_mask=ids.mask, **options)
        return (out.shape[1] - ids.tokens.shape[1]) * batch

    return {
        "plain loop through the bridge, steered, batch 1": lambda: timed(plain_through_the_bridge),
        "plain loop over Hugging Face, steered, batch 1": lambda: timed(plain),
        "steerlens, steered, batch 1": lambda: timed(lambda: steered(1)),
        "steerlens, steered, batch 16": lambda: timed(lambda: steered(16)),
        "Hugging Face generate, unsteered, batch 1": lambda: timed(lambda: unsteered(1)),
        "Hugging Face generate, unsteered, batch 16": lambda: timed(lambda: unsteered(16)),
    }


def capture_contestants(model: Any, pairs: PairSet) -> dict[str, Contestant]:
    few = pairs[:4]

    def one_at_a_time() -> int:
        layers = range(int(model.cfg.n_layers))
        for pair in few:
            for condition in ("none", "text"):
                tokens = torch.tensor([encode(model, pair.text(condition))])
                with torch.inference_mode():
                    _, cache = model.run_with_cache(tokens)
                torch.stack([cache[f"blocks.{layer}.hook_resid_post"][0, -1] for layer in layers])
        return len(few)

    def record(share_prefixes: bool) -> int:
        record_activations(model, pairs[:16], share_prefixes=share_prefixes)
        return 16

    return {
        "run_with_cache of everything, one prompt at a time": lambda: timed(one_at_a_time),
        "steerlens, whole prompts": lambda: timed(lambda: record(False)),
        "steerlens, shared prefixes": lambda: timed(lambda: record(True)),
    }


def peak_memory(model: str, kind: str, n_pairs: int) -> float:
    """Peak resident MiB of a process that records `n_pairs` pairs; 0 pairs gives the model's own share."""
    command = [sys.executable, __file__, "--model", model, "--measure", kind, "--pairs", str(n_pairs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return float(json.loads(done.stdout)["peak_mib"])


def measure(model_name: str, kind: str, n_pairs: int) -> None:
    """What the child process of `peak_memory` does."""
    model = load_model(model_name, progress=False)
    if n_pairs:
        record = {"means": record_means, "examples": record_activations}[kind]
        record(model, load_pairs("format")[:n_pairs], batch_size=16)
    print(json.dumps({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--skip-capture", action="store_true")
    parser.add_argument("--measure", choices=["means", "examples"], help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.model, options.measure, options.pairs)

    from transformers import AutoModelForCausalLM

    sampling_module.stop_ids = lambda model: ()  # every contestant's rows run to their full length
    warnings.simplefilter("ignore")
    model = load_model(options.model, progress=False)
    hf = AutoModelForCausalLM.from_pretrained(str(model.cfg.model_name), local_files_only=True).eval()
    pairs = load_pairs("format", instructions=["change_case:english_lowercase"])
    print(f"{options.model}: {torch.get_num_threads()} threads, {options.tokens} new tokens, {options.rounds} rounds")
    sampling = alternate(sampling_contestants(model, hf, pairs, options.tokens), options.rounds)
    show("sampling", "tok/s  ", sampling)
    for batch in (1, 16):
        ratio = (
            sampling[f"steerlens, steered, batch {batch}"]
            / sampling[f"Hugging Face generate, unsteered, batch {batch}"]
        )
        print(f"  steered against Hugging Face's unsteered generate at batch {batch}: {ratio:.2f}x")
    if not options.skip_capture:
        show("capture", "pairs/s", alternate(capture_contestants(model, pairs), options.rounds))
    if not options.skip_memory:
        print("\nmemory, peak MiB above the loaded model")
        base = peak_memory(options.model, "means", 0)
        for kind in ("means", "examples"):
            peaks = {n: peak_memory(options.model, kind, n) - base for n in (64, 512)}
            print(f"  {kind:<60} {peaks[64]:8.0f} at 64 pairs {peaks[512]:8.0f} at 512 pairs")
    return None


if __name__ == "__main__":
    main()
