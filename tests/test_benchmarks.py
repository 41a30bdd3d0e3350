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
    assert found["ratios"]["one_by_one"]["wall"] >= 5


def test_a_lens_agrees_with_a_readout_per_direction_and_never_holds_the_table_of_all_logits():
    benchmark = load("lens")
    found = benchmark.measure(benchmark.Settings(rounds=1))
    assert found["directions"] == 96
    assert found["largest_difference"] < 1e-4
    assert all(0.1 < tables < 1 for tables in found["tables_at_once"].values())  # 0 would be a count of nothing


def test_directer_says_what_its_plain_loop_says_in_less_time():
    """How much less, the benchmark tells: here types are checked at every call, and few tokens pay for the ranking."""
    benchmark = load("directer")
    found = benchmark.measure(benchmark.Settings(max_new_tokens=24, rounds=1))
    assert found["compared_tokens"] > 12
    assert found["different_tokens"] == 0
    assert 0 < found["gate"]["skipped"] < 1
    assert found["plain_loop_times_directer"]["median"] > 1


def test_a_patching_map_as_rows_is_faster_than_runs_per_cell_with_the_same_values():
    """On tiny; the ratios of the 135M model, of which at least five is asked, are those of the benchmark itself."""
    benchmark = load("patching")
    found = benchmark.measure(benchmark.Settings(model="tiny", positions=12, rounds=1))
    assert found["cells"] == 8 * 12
    assert found["largest_value"] > 100 * found["largest_difference"]
    assert found["largest_difference"] < 1e-4
    assert min(found["ratios"][name]["processor"] for name in ("one_by_one", "transformer_lens")) > 2
