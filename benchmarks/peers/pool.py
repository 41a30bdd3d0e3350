"""Contestants in interpreters of their own, asked one at a time: who is not asked waits for a line and uses no processor.

A peer that pins other packages lives in an environment that is made here, under .bench/, from a list of pins.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HOME = ROOT / ".bench"
PATIENCE = 3600
"""Seconds after which a worker that has not answered is taken for stuck, and ended."""


class AbsentError(Exception):
    """A contestant cannot take part; the message says why."""


def pins(venv: str) -> Path:
    return HERE / "requirements" / f"{venv}.txt"


def interpreter(venv: str, home: Path = HOME) -> Path:
    """The Python of a peer's environment, or our own; the environment is made once for each list of pins.

    Raises:
        AbsentError: if it cannot be installed; the message ends with pip's last line.
    """
    if venv == "own":
        return Path(sys.executable)
    folder = home / venv
    python, ready, wanted = folder / "bin" / "python", folder / ".ready", pins(venv).read_text()
    if ready.is_file() and ready.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    print(f"installing {venv} into {folder} (a few minutes, once) ...", file=sys.stderr, flush=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    torch = next(line for line in wanted.splitlines() if line.startswith("torch=="))
    # torch first and alone, as in the Makefile.
    for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, torch], [*pip, "-r", str(pins(venv))]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
            raise AbsentError(f"not installed, pip said: {said[-1]}")
    ready.write_text(wanted)
    return python


def model_folder(source: Path, folder: Path) -> Path:
    """A copy of a model's folder, its weights linked, that old and new interpreters read alike.

    transformers 4 looks for `rope_theta` in its old place, and where it is not silently takes 10000; nor does it know the new
    name of the tokenizer's class. A tokenizer that adds no token of its own gives a rendered text the same ids everywhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        target = folder / file.name
        target.unlink(missing_ok=True)
        if file.suffix == ".safetensors":
            target.symlink_to(file.resolve())
        else:
            shutil.copyfile(file, target)
    rope = json.loads((folder / "config.json").read_text(encoding="utf-8"))["rope_parameters"]
    changes = {
        "config.json": rope,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "padding_side": "left",
            "extra_special_tokens": {},
        },
        "tokenizer.json": {"post_processor": None},
    }
    for name, change in changes.items():
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | change), encoding="utf-8")
    return folder


class Worker:
    """A process that answers a line of JSON with a line of JSON."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log.open("w")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            list(command), env=environment, text=True, stdin=pipe, stdout=pipe, stderr=self.log
        )

    def ask(self, work: dict[str, Any]) -> dict[str, Any]:
        """The answer.

        Raises:
            AbsentError: if the process has ended, or the work failed.
        """
        asked, answers, line = self.process.stdin, self.process.stdout, ""
        assert asked is not None
        assert answers is not None
        late = threading.Timer(PATIENCE, self.process.kill)
        late.start()
        with contextlib.suppress(BrokenPipeError):
            asked.write(json.dumps(work) + "\n")
            asked.flush()
            line = answers.readline()
        late.cancel()
        if not line:
            said = Path(self.log.name).read_text().strip().splitlines() or ["nothing"]
            raise AbsentError(f"its process ended (status {self.process.wait()}), saying: {said[-1][:300]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise AbsentError(answer["error"])
        return answer

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError), self.process:  # closes its pipes and waits for its end
            self.log.close()


class Pool:
    """The workers of one model, started when they are first asked."""

    def __init__(self, folder: Path, threads: int, home: Path = HOME) -> None:
        self.folder, self.threads, self.home = folder, threads, home
        self.workers: dict[str, Worker] = {}
        self.absent: dict[str, str] = {}

    def ask(self, venv: str, work: dict[str, Any]) -> dict[str, Any]:
        """What a worker answers.

        Raises:
            AbsentError: if it cannot be installed, or the work failed.
        """
        return self.worker(venv).ask(work)

    def worker(self, venv: str) -> Worker:
        """The worker, as soon as it is started; its interpreter may still be reading its libraries.

        Raises:
            AbsentError: if it cannot be installed, now or before.
        """
        if venv in self.absent:
            raise AbsentError(self.absent[venv])
        if venv not in self.workers:
            try:
                command = [str(interpreter(venv, self.home)), str(HERE / "worker.py"), str(self.folder)]
            except AbsentError as error:
                self.absent[venv] = str(error)
                raise
            told = {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            path = {"PYTHONPATH": str(ROOT) if venv == "own" else ""}  # ours is no place for a peer to look
            self.workers[venv] = Worker(command, self.home / "logs" / f"{venv}.txt", os.environ | told | path)
        return self.workers[venv]

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()
