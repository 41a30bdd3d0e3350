"""Engines: what answers the batches of a sampler, here or on a Ray cluster.

A batch is answered whole by one worker, and batches are formed by the sampler before an engine sees them. So rows share the same
batches, and round alike, on one machine and on many; workers use as many threads as this process. Every worker loads the model
once, says which weights it holds (a worker with others is refused), and answers batches until none is left. This process alone
writes what comes back, in the order in which it comes.

A worker that dies, with its node or without, takes only its batch with it: another one starts in its place, and the batch goes to
the next that is free. A batch that kills three workers is given up with an error.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from steerlens.errors import SteerlensError
from steerlens.models.choice import BackendName, use_backend
from steerlens.models.facts import model_device, model_digest
from steerlens.models.load import load_model
from steerlens.study.responses import Batch, Record, Sampler, answer

PATIENCE = 300
"""Seconds to wait until the first worker has found its place, or for an idle one to answer. Loading may take any time."""


TRIES = 3
"""So often a batch, or the start of a worker, may be cut short by a death before the run is given up."""


@contextmanager
def ray_engine(
    model: str,
    *,
    address: str | None = None,
    n_workers: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    backend: BackendName = "auto",
) -> Iterator["RayEngine"]:
    """An engine on a Ray cluster, shut down at the end; give it to a `Sampler` of the same model.

    Args:
        model: What workers load: a name or hub id, or a folder that every node can read.
        address: Of a running cluster; default: one is started on this machine.
        n_workers: Default: as many as the cluster's processors allow, each with this process's number of threads.
        backend: As for `use_backend`.

    Returns:
        The engine, inside a `with` block.

    Raises:
        SteerlensError: if Ray is not installed, or the cluster cannot be reached.

    Example:
        >>> with ray_engine("tiny") as engine:  # doctest: +SKIP
        ...     sampler = Sampler(model, engine=engine)
    """
    try:
        import ray
    except ImportError as error:
        raise SteerlensError('--engine ray needs Ray, which is not installed; pip install "steerlens[ray]"') from error
    mine = not ray.is_initialized()
    if mine:
        try:
            ray.init(
                address=address or "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise SteerlensError(
                f"a Ray cluster must answer at {address!r}: {error}; start one, or leave the address out"
            ) from error
    engine = RayEngine(ray, model, n_workers, torch.get_num_threads(), dtype, device, backend)
    try:
        yield engine
    finally:
        engine.close()
        if mine:
            ray.shutdown()


class _Worker:
    """What runs on a worker: a model, loaded once."""

    def __init__(self, n_threads: int) -> None:
        torch.set_num_threads(n_threads)

    def here(self) -> None:
        """Answered as soon as the worker has found its place."""

    def load(self, model: str, dtype: str, device: str | None, backend: BackendName) -> str:
        self.model = load_model(model, dtype=dtype, device=device, progress=False)
        use_backend(self.model, backend)
        return model_digest(self.model)

    def answer(self, batch: Batch, sampling: Any, prompt_format: Any) -> list[Record]:
        return answer(self.model, batch, sampling, prompt_format)


@dataclass
class RayEngine:
    """Workers that answer batches; made by `ray_engine`."""

    ray: Any
    model: str
    n_workers: int | None
    n_threads: int
    dtype: str
    device: str | None
    backend: BackendName = "auto"
    starting: dict[Any, Any] = field(default_factory=dict)
    """Reference to a worker's first answer -> the worker that waits for its place."""
    loading: dict[Any, Any] = field(default_factory=dict)
    """Reference to a worker's digest -> the worker that is loading its model."""
    idle: list[Any] = field(default_factory=list)
    held: str = ""
    """The digest of the weights that idle workers hold."""
    deaths: int = 0
    """Workers that died so far."""
    failed_starts: int = 0
    """Workers that died while they were starting, since one last started."""
    n_gpus: int = 0
    """Of each worker: one where this process's model is on a GPU."""

    def __call__(self, sampler: Sampler, batches: Sequence[Batch]) -> Iterator[tuple[int, list[Record]]]:
        """Each batch's place and records, as workers finish."""
        waiting = deque(range(len(batches)))
        tries: Counter[int] = Counter()
        busy: dict[Any, tuple[Any, int]] = {}
        expected = model_digest(sampler.model)
        if self.idle:
            self._check_weights(expected)  # the model may have been edited since the last call
        self.n_gpus = int(model_device(sampler.model).type == "cuda")
        for _ in range(min(self._size(), len(batches)) - len(self.idle) - len(self.coming)):
            self._start()
        try:
            while waiting or busy:
                while self.idle and waiting:
                    worker, place = self.idle.pop(), waiting.popleft()
                    busy[worker.answer.remote(batches[place], sampler.sampling, sampler.prompt_format)] = (
                        worker,
                        place,
                    )
                placed = busy or self.loading
                ready, _ = self.ray.wait([*busy, *self.coming], num_returns=1, timeout=None if placed else PATIENCE)
                if not ready:
                    raise SteerlensError(
                        f"a worker must find {self._processors():g} free processors, and none did in {PATIENCE} seconds; "
                        "wait until the cluster has room, or use another"
                    )
                (done,) = ready
                if done in self.coming:
                    self._come(done, expected)
                    continue
                worker, place = busy.pop(done)
                try:
                    records = self.ray.get(done)
                except self.ray.exceptions.RayTaskError:  # an error of the batch's own, not a death
                    raise
                except self.ray.exceptions.RayError as error:
                    self.deaths += 1
                    tries[place] += 1
                    if tries[place] >= TRIES:
                        raise SteerlensError(
                            f"a batch must not kill its worker, and one of {len(batches[place])} rows did so {TRIES} times: "
                            f"{error}; is the worker short of memory? Lower batch_size"
                        ) from error
                    waiting.appendleft(place)
                    self._drop_dead()
                    self._start()
                    continue
                self.idle.append(worker)
                yield place, records
        finally:
            for worker, _ in busy.values():  # cut short: what they are at is not wanted any more
                self.ray.kill(worker)

    @property
    def coming(self) -> dict[Any, Any]:
        return self.starting | self.loading

    def _size(self) -> int:
        fitting = int(self.ray.cluster_resources().get("CPU", 1)) // self.n_threads
        return max(1, fitting if self.n_workers is None else self.n_workers)

    def _processors(self) -> float:
        """Of one worker: one that asks for more than any node has would wait for ever."""
        largest = max((node["Resources"].get("CPU", 0) for node in self.ray.nodes() if node["Alive"]), default=1)
        return float(min(self.n_threads, largest))

    def _start(self) -> None:
        actor = self.ray.remote(_Worker).options(num_cpus=self._processors(), num_gpus=self.n_gpus)
        worker = actor.remote(self.n_threads)
        self.starting[worker.here.remote()] = worker

    def _drop_dead(self) -> None:
        """Forget idle workers that died, with their node perhaps, so that no batch is blamed for them."""
        alive = []
        for worker in self.idle:
            try:
                self.ray.get(worker.here.remote(), timeout=PATIENCE)
                alive.append(worker)
            except self.ray.exceptions.RayError:
                self.deaths += 1
        self.idle = alive

    def _come(self, done: Any, expected: str) -> None:
        """A worker has found its place, and loads the model; or has loaded it, and is idle; or has died of either."""
        stage = self.starting if done in self.starting else self.loading
        worker = stage.pop(done)
        try:
            digest = self.ray.get(done)
        except self.ray.exceptions.RayTaskError as error:
            raise SteerlensError(
                f"a worker must be able to load {self.model!r}, got: {error.cause}; every node needs steerlens and the model"
            ) from error
        except self.ray.exceptions.RayError as error:
            self.deaths += 1
            self.failed_starts += 1
            if self.failed_starts >= TRIES + self._size():
                raise SteerlensError(
                    f"workers must live long enough to load {self.model!r}, and {self.failed_starts} died: {error}"
                ) from error
            self._start()
            return
        if stage is self.starting:
            self.loading[worker.load.remote(self.model, self.dtype, self.device, self.backend)] = worker
            return
        self.held = digest
        self._check_weights(expected)
        self.failed_starts = 0
        self.idle.append(worker)

    def _check_weights(self, expected: str) -> None:
        if self.held != expected:
            raise SteerlensError(
                f"workers must hold this process's weights (digest {expected}), and one loaded {self.model!r} with {self.held}; "
                "use one folder that every node can read, with the weights that you steer"
            )

    def close(self) -> None:
        """End all workers."""
        for worker in [*self.idle, *self.coming.values()]:
            self.ray.kill(worker)
        self.idle, self.starting, self.loading = [], {}, {}
