"""What the benchmarks share: contestants take turns, so that a busy machine slows all of them, and ratios are per round."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steerlens.files import write_atomically
from steerlens.models.facts import library_versions

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
"""Seconds on the clock, and of this process on the processor."""


def take_turns(
    contestants: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What each contestant returned in each round, and a record of seconds and ratios: how many times the first one's."""
    results, seconds = [], []
    for _ in range(rounds):
        result, spent = {}, {}
        for name, run in contestants.items():
            start = {clock: now() for clock, now in CLOCKS.items()}
            result[name] = run()
            spent[name] = {clock: now() - start[clock] for clock, now in CLOCKS.items()}
        results.append(result)
        seconds.append(spent)
    first = next(iter(contestants))
    ratios = {
        name: {clock: statistics.median(one[name][clock] / one[first][clock] for one in seconds) for clock in CLOCKS}
        for name in contestants
    }
    return results, {"seconds": seconds, "ratios": ratios}


def report(settings: Any, found: dict[str, Any]) -> None:
    """Print what was found, and write it to the settings' `out`, if there is one."""
    asked = {key: str(value) for key, value in asdict(settings).items()}
    text = json.dumps({"settings": asked, **found, "versions": library_versions()}, indent=2)
    print(text)
    if settings.out is not None:
        write_atomically(Path(settings.out), text + "\n")
