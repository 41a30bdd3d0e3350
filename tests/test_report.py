"""The report page: what it says, that it stands alone, and that a browser draws it without an error."""

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import pandas as pd
import pytest

from steerlens.errors import DataError
from steerlens.metrics import distinct_n, rate_table, repetition, wilson_interval, words
from steerlens.report import mark_changes, summarize, write_report

# Per instruction: the share that follows under none, random, vector, text, text+vector.
RATES = {
    "change_case:english_lowercase": (0.02, 0.02, 0.85, 0.70, 0.92),
    "change_case:english_capital": (0.01, 0.02, 0.70, 0.62, 0.85),
    "detectable_format:json_format": (0.00, 0.00, 0.15, 0.80, 0.80),
    "detectable_format:title": (0.02, 0.02, 0.30, 0.85, 0.90),
    "detectable_format:number_highlighted_sections": (0.10, 0.10, 0.40, 0.75, 0.70),
    "detectable_format:multiple_sections": (0.05, 0.05, 0.10, 0.60, 0.55),
    "detectable_format:constrained_response": (0.00, 0.00, 0.00, 0.30, 0.35),
    "detectable_content:postscript": (0.00, 0.00, 0.10, 0.80, 0.85),
    "detectable_content:number_placeholders": (0.05, 0.05, 0.25, 0.60, 0.65),
    "startend:quotation": (0.02, 0.02, 0.30, 0.50, 0.55),
    "combination:two_responses": (0.00, 0.00, 0.05, 0.40, 0.45),
    "punctuation:no_comma": (0.30, 0.30, 0.20, 0.75, 0.80),
}
CONDITIONS = ("none", "random", "vector", "text", "text+vector")
HOSTILE = "<script>alert(1)</script> **bold** </div> & 'quotes' $title {braces}"
OTHER_SCRIPTS = "مرحبا بالعالم هذا نص طويل 雨は空から降る水です。 " + "pneumono" * 40
VOCABULARY = (
    "rain falls when moist air rises and cools so that droplets grow heavy enough to fall, which farmers, sailors and"
    " gardeners have watched for as long as there were clouds. It fills rivers and lakes, and then it begins again."
).split()


def fake_scores(n_prompts: int = 13) -> pd.DataFrame:
    """A scores frame that looks like a run: 12 instructions x 13 prompts x 5 conditions."""
    random, rows = Random(0), []
    for instruction, rates in RATES.items():
        for prompt in range(n_prompts):
            query = f"Write a short note about topic {prompt} for a reader who has never heard of it."
            plain = random.choices(VOCABULARY, k=random.randint(20, 70))
            for condition, rate in zip(CONDITIONS, rates, strict=True):
                followed = random.random() < rate
                text = " ".join(word if random.random() < 0.7 else random.choice(VOCABULARY) for word in plain)
                if condition == "none":
                    text = " ".join(plain)
                if "lowercase" in instruction and followed:
                    text = text.lower()
                if "capital" in instruction and followed:
                    text = text.upper()
                if condition == "text+vector" and prompt == 2:
                    text = ""
                if condition == "vector" and prompt == 1:
                    text = HOSTILE
                if condition == "random" and prompt == 0:
                    text = OTHER_SCRIPTS
                row = {
                    "prompt_id": f"{instruction}-{prompt}",
                    "instruction": instruction,
                    "condition": condition,
                    "layer": 14 if "vector" in condition else pd.NA,
                    "operator": "set_projection",
                    "coeff": 1.0,
                    "positions": "all",
                    "trial": 0,
                    "seed": 0,
                    "prompt": query + (" Follow the rule as stated." if condition.startswith("text") else ""),
                    "response": text,
                    "n_tokens": 2 * len(text.split()),
                    "finish_reason": "length" if random.random() < 0.2 else "eos",
                    "followed": followed,
                    "followed_strict": followed and random.random() < 0.9,
                    "n_words": len(words(text)),
                    "repetition": repetition(text),
                    "distinct_2": distinct_n(text),
                    "perplexity": random.lognormvariate(2.0, 0.4) if text else float("nan"),
                }
                rows.append(row)
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def fake_search(n: int = 13) -> pd.DataFrame:
    """A search frame over the layers of a 30-layer model, with the unsteered row of each instruction."""
    random, rows = Random(1), []
    for instruction, (none, _, vector, *_) in RATES.items():
        candidates = [(pd.NA, none), *((layer, vector - 0.004 * (layer - 14) ** 2) for layer in range(4, 28, 2))]
        counts = [(layer, sum(random.random() < rate for _ in range(n))) for layer, rate in candidates]
        best = max(counts[1:], key=lambda pair: pair[1])
        for layer, followed in counts:
            low, high = wilson_interval(followed, n)
            rows.append(
                {
                    "instruction": instruction,
                    "layer": layer,
                    "operator": "none" if layer is pd.NA else "set_projection",
                    "coeff": float("nan") if layer is pd.NA else 1.0,
                    "n": n,
                    "followed": followed,
                    "rate": followed / n,
                    "low": low,
                    "high": high,
                    "mean_repetition": 0.1,
                    "median_perplexity": 8.0,
                    "degenerate": 0.0 if layer is pd.NA else max(0.0, 0.5 - layer / 12) + 0.05 * random.random(),
                    "chosen": layer is best[0],
                }
            )
    return pd.DataFrame(rows).astype({"layer": "Int64"})


FACTS = {
    "model": "example/model-135m-instruct",
    "dtype": "bfloat16",
    "prompts": 156,
    "chosen layers": {name.split(":")[1]: 14 for name in list(RATES)[:4]},
    "seeds": [0, 1, 2],
    "versions": {"torch": "2.13.0", "transformer-lens": "4.3.0"},
    "perplexity of the random text": float("nan"),
    "identity": "9f2c51aa03de77b1",
    "command": "steerlens sweep --model example/model-135m-instruct --layers all --coeffs 1 2 --out runs/<name>",
}
