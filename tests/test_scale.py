"""What does not grow with rows and pairs: operations and bytes are counted, nothing is timed."""

import gc
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import memory
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from steerlens.data.pairs import PairSet, pair_set
from steerlens.files import Journal, Records
from steerlens.models import facts
from steerlens.models.facts import model_digest
from steerlens.models.prompts import encode_all
from steerlens.stats import comparisons
from steerlens.stats.comparisons import bootstrap_columns
from steerlens.steering import interventions
from steerlens.steering.plan import Plan
from steerlens.study import quality, scores
from steerlens.study.quality import Quality
from steerlens.study.responses import Batch, Record, Sampler, requests_for
from steerlens.study.scores import score
from steerlens.study.sweeps import sweep
from steerlens.vectors import activations
from steerlens.vectors.activations import record_activations, record_means
from steerlens.vectors.vector import SteeringVector
from tests.conftest import Subject

NO_COMMA = "punctuation:no_comma"


def asked(n: int) -> PairSet:
    return pair_set([f"What is number {number}?" for number in range(n)], "No commas.", instruction_ids=NO_COMMA)


def planted(d_model: int = 32) -> SteeringVector:
    directions = {layer: torch.eye(d_model)[layer] for layer in range(4)}
    zeros, ones = dict.fromkeys(directions, 0.0), dict.fromkeys(directions, 1.0)
    return SteeringVector(directions, proj_with=ones, proj_without=zeros, resid_norm=ones)


def parrot(sampler: Sampler, batches: Sequence[Batch]) -> Iterator[tuple[int, list[Record]]]:
    """An engine without a model: it says one of three texts."""
    for place, batch in enumerate(batches):
        yield (
            place,
            [
                {
                    "prompt": request.prompt,
                    "text": ("yes", "no, no", "well")[len(request.prompt) % 3],
                    "finish_reason": "eos",
                    "seed": request.seed,
                    "n_steered": 0,
                    "plan": [],
                    "prompt_tokens": sampler.encode(request.prompt),
                    "tokens": [5, 6, len(request.prompt) % 3],
                }
                for request in batch
            ],
        )


class Watched:
    """How many of the things that were handed out are alive at once, at most."""

    def __init__(self) -> None:
        self.alive: list[weakref.ref[Any]] = []
        self.most = 0

    def __call__(self, thing: Any) -> Any:
        self.alive.append(weakref.ref(thing))
        self.most = max(self.most, sum(ref() is not None for ref in self.alive))
        return thing


def kept_bytes(work: Callable[[], Any]) -> tuple[Any, int, int]:
    """What the work returns, the bytes that are then held, and the most that were held meanwhile."""
    gc.collect()
    tracemalloc.start()
    try:
        result = work()
        gc.collect()
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return result, held, most


class TestJournals:
    def test_a_journal_holds_where_its_records_stand_and_not_the_records(self, tmp_path: Path) -> None:
        def write() -> Journal:
            journal = Journal(tmp_path / "journal.jsonl")
            for batch in range(100):
                journal.append({"key": f"{batch:08}{row:08}", "text": "x" * 5000} for row in range(10))
            return journal

        journal, held, _ = kept_bytes(write)
        with journal:
            assert len(journal.records) == 1000
            assert held < 1000 * 300

        again, held, _ = kept_bytes(lambda: Journal(tmp_path / "journal.jsonl"))
        with again:
            assert len(again.records["0000009900000009"]["text"]) == 5000
            assert held < 1000 * 300

    def test_records_are_read_while_others_are_written_and_after_the_journal_is_closed(self, tmp_path: Path) -> None:
        with Journal(tmp_path / "journal.jsonl") as journal:
            for key in "abc":
                journal.append([{"key": key, "text": f"ü {key}\u2028"}, {"key": key * 2}])
                assert {name: record["key"] for name, record in journal.records.items()} == {
                    name: name for name in journal.records
                }
        assert journal.records["b"] == {"key": "b", "text": "ü b\u2028"}
        assert "d" not in journal.records
        with pytest.raises(KeyError):
            journal.records["d"]


class TestRequests:
    def test_the_control_of_an_instruction_is_drawn_once_and_shared_by_its_pairs(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[int] = []
        placebo = Plan.placebo
        monkeypatch.setattr(
            Plan,
            "placebo",
            lambda plan, *, seed: drawn.append(seed) or placebo(plan, seed=seed),  # type: ignore[func-returns-value]
        )
        requests = requests_for(asked(20), planted().at(1))
        controls = [request.plan for request in requests if request.condition == "random"]
        assert len(controls) == 20
        assert len(drawn) == 1
        assert len({id(plan) for plan in controls}) == 1

    def test_the_numbers_of_a_plan_are_hashed_as_often_whatever_the_rows(
        self, tiny: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        count: Counter[str] = Counter()
        digest = interventions.tensor_digest

        def counted(tensor: torch.Tensor) -> str:
            count["digests"] += 1
            return digest(tensor)

        monkeypatch.setattr(interventions, "tensor_digest", counted)
        found = []
        for n in (4, 16):
            count.clear()
            options: Any = {"layers": [1, 2], "coeffs": [0.5, 1.0], "engine": parrot, "batch_size": 64}
            result = sweep(tiny.model, planted(), asked(n), out=tmp_path / str(n), **options)
            assert len(result.scores) == 5 * n
            found.append(count["digests"])
        assert found[0] == found[1] == 2 * 4  # the run's identity, and the answers' keys


class TestScores:
    def test_few_records_are_in_memory_at_once_and_each_is_read_once(
        self, tiny: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        class Watchable(dict[str, Any]):
            pass

        watched, read, count = Watched(), Records.__getitem__, Counter[str]()

        def counted(records: Records, key: str) -> Any:
            count[key] += 1
            return watched(Watchable(read(records, key)))

        monkeypatch.setattr(Records, "__getitem__", counted)
        monkeypatch.setattr(scores, "SCORED_AT_ONCE", 4)
        requests = requests_for(asked(10), planted().at(1), conditions=["none", "vector"])
        with Journal(tmp_path / "journal.jsonl") as journal:
            found = score(Sampler(tiny.model, journal=journal, engine=parrot), requests)
        assert len(found) == len(count) == 20
        assert sum(count.values()) < 2 * 20  # each one once, and some more where tests check types
        assert watched.most <= 4 + 1

    def test_scores_are_the_same_however_many_are_held_at_once(
        self, tiny: Subject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        requests = requests_for(asked(4), planted().at(1))
        sampler = Sampler(tiny.model, max_new_tokens=6)
        whole = score(sampler, requests, quality=Quality(kl=True))
        monkeypatch.setattr(scores, "SCORED_AT_ONCE", 3)
        pd.testing.assert_frame_equal(score(sampler, requests, quality=Quality(kl=True)), whole, rtol=1e-4)

    def test_equal_responses_are_judged_and_measured_once_in_all(
        self, tiny: Subject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        judged: list[str] = []
        measured: list[Any] = []
        check_all, log_probabilities = scores.check_all, quality.mean_log_probabilities
        monkeypatch.setattr(
            scores,
            "check_all",
            lambda text, *more: judged.append(text) or check_all(text, *more),  # type: ignore[func-returns-value]
        )
        monkeypatch.setattr(
            quality,
            "mean_log_probabilities",
            lambda model, rows, batch: measured.extend(rows) or log_probabilities(model, rows, batch),
        )
        monkeypatch.setattr(scores, "SCORED_AT_ONCE", 7)
        requests = requests_for(asked(9), planted().at(1), conditions=["none", "vector", "random"])
        found = score(Sampler(tiny.model, engine=parrot), requests)
        assert sorted(judged) == sorted(set(found["response"]))
        assert len(measured) == 9  # one text for each query, under every condition


class TestPairs:
    def test_tokens_are_held_of_some_pairs_at_a_time_and_the_means_are_those_of_all(
        self, llama: Subject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Tokens(list[int]):
            __hash__ = None  # type: ignore[assignment]

        watched = Watched()
        monkeypatch.setattr(
            activations, "encode_all", lambda *given: [watched(Tokens(row)) for row in encode_all(*given)]
        )
        whole, kept = record_means(llama.model, asked(11)), record_activations(llama.model, asked(11))
        assert watched.most >= 22
        watched.alive.clear()
        watched.most = 0
        monkeypatch.setattr(activations, "TOKENIZED_AT_ONCE", 4)
        parts, kept_parts = record_means(llama.model, asked(11)), record_activations(llama.model, asked(11))
        assert watched.most <= 2 * 4
        torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(kept_parts.resid, kept.resid, rtol=1e-3, atol=1e-3)

    def test_the_bytes_that_are_kept_of_a_pair_are_its_residuals(self, llama: Subject) -> None:
        layers, d_model = int(llama.model.cfg.n_layers), int(llama.model.cfg.d_model)
        for n in (1, 3):
            kept = record_activations(llama.model, asked(n)).resid
            assert kept.untyped_storage().nbytes() == n * 2 * layers * d_model * 4
            means = record_means(llama.model, asked(n))
            assert means.mean.untyped_storage().nbytes() == 2 * layers * d_model * 4
            assert means.mean_norm.untyped_storage().nbytes() == 2 * layers * 4

    def test_a_hash_of_pairs_holds_the_text_of_one_at_a_time(self) -> None:
        pairs = asked(4000)
        _, _, most = kept_bytes(lambda: pairs.content_hash)
        assert most < 4000 * 250  # what Python itself keeps of freed objects, and no text


class Largest(TorchDispatchMode):
    """The most numbers that a sum took at once."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "sum" in str(function):
            self.numbers = max(self.numbers, args[0].numel())
        return function(*args, **(kwargs or {}))


def test_a_digest_of_weights_sums_few_numbers_at_a_time(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    with Largest() as whole:
        digest = model_digest(llama.model)
    assert whole.numbers == max(parameter.numel() for parameter in llama.model.parameters())
    monkeypatch.setattr(facts, "SUMMED_AT_ONCE", 500)
    with Largest() as parts:
        assert model_digest(llama.model) == digest
    assert parts.numbers <= 500


def test_a_bootstrap_holds_no_table_of_clusters_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(4000, 1))
    draws, _, most = kept_bytes(lambda: bootstrap_columns(values, range(4000), n_resamples=50))
    assert most < 10 * comparisons.DRAWN_AT_ONCE
    monkeypatch.setattr(comparisons, "DRAWN_AT_ONCE", 9000)
    again, _, less = kept_bytes(lambda: bootstrap_columns(values, range(4000), n_resamples=50))
    assert less < most
    np.testing.assert_allclose(again, draws, rtol=1e-9)  # the same draws


def test_the_benchmark_of_memory_measures_each_case_in_a_process_of_its_own() -> None:
    held = np.ones(2**27)  # 1 GiB of this process: a child's own peak does not begin with its parent's
    found = memory.in_a_child("means", "tiny", 64)
    assert found["peak_mib"] < held.nbytes / 2**20
    assert (found["case"], found["n"], found["layers"]) == ("means", 64, 8)
    assert 5 < found["above_mib"] < found["peak_mib"] - found["weights_mib"]
    assert found["weights_mib"] == pytest.approx(11.73, abs=0.01)
    lines = memory.table([found]).splitlines()
    assert lines[2].startswith("| means | tiny | 64 |")
    (line,) = memory.figure([found, {**found, "n": 4, "above_mib": 1.0}]).data
    assert (line.x, line.y) == ((4, 64), (1.0, found["above_mib"]))
