"""What the benchmarks claim, on a small scale: ratios inside one run, and the same texts."""

import importlib.util
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_sweep_as_rows_is_at_least_five_times_as_fast_as_one_by_one_with_the_same_texts():
    benchmark = load("sweep")
    found = benchmark.measure(
        benchmark.Settings(
            instructions=("change_case:english_lowercase", "detectable_format:title", "punctuation:no_comma"),
            n_prompts=3,
            max_new_tokens=16,
            rounds=2,
        )
    )
    assert found["rows"] == 3 * found["configurations"] == 3 * 36
    assert found["different_texts"] == 0
    assert found["ratio"] >= 5
