"""One interpreter with its contestants: a line of JSON asks for work, a line of JSON answers with seconds and what was found.

    python worker.py MODEL_FOLDER

Between two lines it waits for its standard input. Whatever libraries print goes to standard error.
"""

import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

PACKAGES = ("torch", "transformers", "numpy", "transformer-lens", "steering-vectors", "repeng", "nnsight")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def memory(field: str) -> float | None:
    """MiB of this process: "VmRSS" now, "VmHWM" at the most; None where it is not Linux that tells."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def answer(do: Callable[[dict[str, Any]], Any], work: dict[str, Any]) -> dict[str, Any]:
    """Do one piece of work on the clock, and watch its peak of memory; what fails is an answer, too."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    held, start, processor = memory("VmRSS"), time.perf_counter(), time.process_time()
    try:
        found = do(work)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    spent = {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor}
    grown = None if held is None else round((memory("VmHWM") or held) - held, 1)
    return {**spent, "grown_mib": grown, "found": found}


def serve(do: Callable[[dict[str, Any]], Any], asked: Iterable[str], answers: TextIO) -> None:
    """Answer line by line, until there are no more."""
    for line in asked:
        print(json.dumps(answer(do, json.loads(line))), file=answers, flush=True)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not stand between two answers
    from contestants import CONTESTANTS

    made: dict[str, Any] = {}

    def do(work: dict[str, Any]) -> Any:
        if work["do"] == "versions":
            return versions()
        if (name := work["by"]) not in made:
            _, kind, options = CONTESTANTS[name]
            made[name] = kind(sys.argv[1], **options)
        return getattr(made[name], work["do"])(work)

    serve(do, sys.stdin, answers)


if __name__ == "__main__":
    main()
