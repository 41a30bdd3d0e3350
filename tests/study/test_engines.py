"""The Ray engine on a real cluster of two nodes: the same rows, whatever dies on the way."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

from steerlens.data.conditions import ALL_CONDITIONS
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import SteerlensError
from steerlens.files import Journal
from steerlens.steering.attention import pasta, spotlight
from steerlens.steering.directer import directer, plausible
from steerlens.steering.settings import SamplingConfig
from steerlens.study.config import RunConfig
from steerlens.study.engines import ray_engine
from steerlens.study.job import run
from steerlens.study.responses import Sampler, requests_for
from steerlens.study.sweeps import sweep
from steerlens.vectors.vector import SteeringVector

ray = pytest.importorskip("ray", reason="Ray is not installed")
# Ray leaves sockets and files to the garbage collector, and warns of its own defaults.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one processor each, as processes of their own."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture
def vector(llama):
    directions = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    return SteeringVector(dict(enumerate(directions)), proj_with=dict.fromkeys(range(4), 3.0))


@pytest.fixture
def pairs():
    words = ("rain", "snow", "wind", "sun", "a fox", "bread")
    return PairSet(
        InstructionPair(f"Tell me about {word}.", "Use no commas.", "punctuation:no_comma") for word in words
    )


def test_a_sweep_on_two_nodes_is_the_local_one_row_for_row(llama, vector, pairs, cluster, tmp_path):
    options = {"layers": [1, 3], "coeffs": [1.0, 2.0], "max_new_tokens": 24, "batch_size": 4}
    local = sweep(llama.model, vector, pairs, **options)
    with ray_engine(str(llama.folder), address=cluster.address) as engine:
        far = sweep(llama.model, vector, pairs, engine=engine, out=tmp_path, **options)
        assert len(engine.idle) + len(engine.coming) == 2
        # The first worker may have answered all before the second one has found its place.
        end = time.monotonic() + 120
        while len({actor["NodeID"] for actor in ray_actors()}) < 2:
            assert time.monotonic() < end, "both workers are on one node"
            time.sleep(0.2)
    pd.testing.assert_frame_equal(far.scores, local.scores)
    pd.testing.assert_frame_equal(far.table, local.table)


def test_attention_and_gates_on_two_nodes_are_the_local_ones_row_for_row(llama, vector, pairs, cluster):
    step = vector.at(1, operator="add", coeff=4.0)
    plans = {
        "attention": step + pasta(0.1, heads={1: [0, 2], 3: [1]}) + spotlight(0.3),
        "gated": plausible(step + pasta(0.1), beta=0.2),
        "directer": step + directer(beta=0.2),
    }
    requests = [one for plan in plans.values() for one in requests_for(pairs[:3], plan)]
    sampling = SamplingConfig(12)
    expected = Sampler(llama.model, sampling=sampling, batch_size=8).generate(requests)
    with ray_engine(str(llama.folder), address=cluster.address) as engine:
        found = Sampler(llama.model, sampling=sampling, batch_size=8, engine=engine).generate(requests)
    assert found == expected
    assert {request.condition for request in requests} == set(ALL_CONDITIONS)
    assert any("gated" in record for record in found)


def ray_actors():
    from ray._private.state import actors

    return [{"NodeID": one["Address"]["NodeID"]} for one in actors().values() if one["State"] == "ALIVE"]


def busy_workers() -> list[psutil.Process]:
    """Processes of this test's own cluster that are answering a batch."""
    mine = psutil.Process().children(recursive=True)
    return [one for one in mine if one.is_running() and "ray::_Worker.answer" in " ".join(one.cmdline())]


def test_a_worker_killed_in_the_middle_is_replaced_and_nothing_is_lost_or_doubled(
    llama, vector, pairs, cluster, tmp_path
):
    requests = requests_for(pairs, vector.at(1), conditions=["none", "vector"], trials=8)
    sampling = SamplingConfig(48, temperature=1.0)
    expected = Sampler(llama.model, sampling=sampling, batch_size=4).generate(requests)
    killed, done = [], threading.Event()

    def kill_one(path: Path) -> None:
        while not killed and not done.is_set():
            if path.exists() and path.read_bytes().count(b"\n") >= 8:
                for process in busy_workers()[:1]:
                    process.kill()
                    killed.append(process.pid)
            time.sleep(0.002)

    path = tmp_path / "generations.jsonl"
    thread = threading.Thread(target=kill_one, args=(path,), daemon=True)
    with ray_engine(str(llama.folder), address=cluster.address) as engine, Journal(path) as journal:
        sampler = Sampler(llama.model, sampling=sampling, batch_size=4, journal=journal, engine=engine)
        thread.start()
        found = sampler.generate(requests)
        done.set()
        thread.join()
        assert killed
        assert engine.deaths == 1
    texts = [(record["key"], record["text"], record["tokens"]) for record in found]
    assert texts == [(record["key"], record["text"], record["tokens"]) for record in expected]
    keys = [line.split('"')[3] for line in path.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == len({record["key"] for record in expected})


def test_a_batch_that_kills_every_worker_is_given_up(llama, vector, pairs, cluster, monkeypatch):
    class Deadly(SamplingConfig):
        def __reduce__(self):
            return (os._exit, (1,))

    requests = requests_for(pairs[:1], vector.at(1), conditions=["none"])
    with ray_engine(str(llama.folder), address=cluster.address) as engine:
        sampler = Sampler(llama.model, sampling=Deadly(4), engine=engine)
        with pytest.raises(SteerlensError, match="a batch must not kill its worker"):
            sampler.generate(requests)


def test_workers_with_other_weights_are_refused(llama, tiny_folders, vector, pairs, cluster):
    requests = requests_for(pairs[:1], vector.at(1), conditions=["none"])
    with ray_engine(str(tiny_folders["gpt2"]), address=cluster.address) as engine:
        sampler = Sampler(llama.model, engine=engine)
        with pytest.raises(SteerlensError, match="workers must hold this process's weights"):
            sampler.generate(requests)


def test_weights_that_were_edited_after_the_workers_loaded_them_are_refused(tiny_folders, vector, pairs, cluster):
    from steerlens.models.load import load_model

    model = load_model(tiny_folders["llama"], progress=False)
    requests = requests_for(pairs[:2], vector.at(1), conditions=["none"])
    with ray_engine(str(tiny_folders["llama"]), address=cluster.address, n_workers=1) as engine:
        Sampler(model, sampling=SamplingConfig(2), engine=engine).generate(requests[:1])
        with torch.no_grad():
            next(iter(model.parameters()))[0] += 1.0
        with pytest.raises(SteerlensError, match="workers must hold this process's weights"):
            Sampler(model, sampling=SamplingConfig(2), engine=engine).generate(requests)


def test_a_model_that_workers_cannot_load_is_an_error_and_not_a_wait(llama, vector, pairs, cluster, tmp_path):
    requests = requests_for(pairs[:1], vector.at(1), conditions=["none"])
    with ray_engine(str(tmp_path / "nothing"), address=cluster.address) as engine:
        sampler = Sampler(llama.model, engine=engine)
        with pytest.raises(SteerlensError, match="a worker must be able to load"):
            sampler.generate(requests)


def test_a_run_on_ray_killed_in_the_middle_goes_on_to_the_same_results(tiny_folders, pairs, cluster, tmp_path):
    many = PairSet(InstructionPair(f"Say {number}.", "Use no commas.", "punctuation:no_comma") for number in range(30))
    many.save(tmp_path / "pairs.jsonl")
    config = RunConfig(
        model=str(tiny_folders["llama"]),
        pairs=str(tmp_path / "pairs.jsonl"),
        n_train=4,
        n_valid=4,
        n_test=6,
        layers=(1, 3),
        sampling=SamplingConfig(40),
        search_tokens=24,
        batch_size=4,
        engine="ray",
        ray_address=cluster.address,
    )
    code = (
        "from steerlens.study.config import PromptFormat, RunConfig, SamplingConfig; from steerlens.study.job import run; "
        f"run(RunConfig(**{config.__dict__!r}), {str(tmp_path / 'run')!r}, progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    journal = tmp_path / "run" / "generations.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 8:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    ray.shutdown()
    run(config, tmp_path / "run", progress=False)
    from dataclasses import replace

    run(replace(config, engine="local", ray_address=None), tmp_path / "local", progress=False)
    for name in ("scores.jsonl", "table.csv", "search.csv"):
        assert sorted((tmp_path / "run" / name).read_text().splitlines()) == sorted(
            (tmp_path / "local" / name).read_text().splitlines()
        )


def test_a_loaded_model_cannot_be_sent_to_workers(llama, tmp_path):
    with pytest.raises(SteerlensError, match="Ray workers load the model themselves"):
        run(
            RunConfig(model="tiny", engine="ray", n_valid=1, n_test=1, n_train=2),
            tmp_path,
            model=llama.model,
            progress=False,
        )
