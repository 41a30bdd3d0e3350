"""The harness of the benchmark beside peers, with contestants of a few lines and no peer installed."""

import io
import json
import subprocess
import sys

import pytest

from benchmarks.peers import bench, pool, worker
from benchmarks.peers.bench import (
    Contest,
    Settings,
    compared,
    cut,
    distinct,
    distinct_steered,
    limit_seconds,
    run_model,
)
from benchmarks.peers.contestants import CONTESTANTS
from benchmarks.peers.pool import AbsentError, Pool, Worker, model_folder
from benchmarks.peers.races import FULL, Material, Race, Races, Sizes, material
from benchmarks.peers.results import figure, goals, markdown, memory_cell, ratio
from steerlens.models.load import BUNDLED

ECHO = """
import json, sys
for line in sys.stdin:
    work = json.loads(line)
    print("noise", file=sys.stderr)
    if work["by"] == "dies":
        sys.exit("no more")
    print(json.dumps({"error": "cannot"} if work["by"] == "fails" else {"found": work["by"]}), flush=True)
"""


@pytest.fixture
def echo(tmp_path):
    one = Worker([sys.executable, "-c", ECHO], tmp_path / "log.txt")
    yield one
    one.close()


def test_a_worker_answers_line_by_line_and_what_it_prints_beside_is_no_answer(echo):
    assert [echo.ask({"by": name})["found"] for name in "abc"] == ["a", "b", "c"]


def test_work_that_fails_and_a_process_that_ends_are_absences_with_their_reason(echo):
    with pytest.raises(AbsentError, match="cannot"):
        echo.ask({"by": "fails"})
    assert echo.ask({"by": "a"})["found"] == "a"
    for _ in range(2):
        with pytest.raises(AbsentError, match="saying: no more"):
            echo.ask({"by": "dies"})


def test_the_worker_of_the_contestants_times_its_work_and_answers_what_goes_wrong():
    asked = [json.dumps({"n": n}) + "\n" for n in (3, 0)]
    answers = io.StringIO()
    worker.serve(lambda work: sum(range(10**6 // work["n"])) and work["n"], asked, answers)
    first, second = map(json.loads, answers.getvalue().splitlines())
    assert first["found"] == 3
    assert 0 < first["seconds"] < 60
    assert "ZeroDivisionError" in second["error"]


def test_a_peer_that_cannot_be_installed_is_absent_with_pips_reason_each_time_it_is_asked(tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, int("pip" in command), "", "a\nERROR: no such version\n")

    monkeypatch.setattr(pool.subprocess, "run", run)
    with Pool(tmp_path, 1, tmp_path) as peers:
        for _ in range(2):
            with pytest.raises(AbsentError, match="not installed, pip said: ERROR: no such version"):
                peers.ask("repeng", {"by": "repeng"})
    assert len(asked) == 2  # the environment, then pip, which is not tried again


class Scripted(Pool):
    """A pool whose contestants say what they are told to, without a process."""

    def __init__(self, said):
        self.said, self.order = said, []

    def worker(self, venv):
        raise AbsentError("no process")

    def ask(self, venv, work):
        self.order.append(work["by"])
        if work["by"] not in self.said:
            raise AbsentError("not here")
        found = self.said[work["by"]]
        return {"seconds": 1 + len(self.order), "processor": 1.0, "grown_mib": 2.5, "found": found}


class Silent:
    def __getattr__(self, name):
        return lambda *_, **__: None


REFERENCE = {"tokens": [[5, 6, 2, 0]], "gaps": [[1.0, 1.0, 1.0, 1.0]]}


def work(by):
    return {"do": "generate", "by": by, "ids": [[1, 4]], "rows": [[0, []]], "batch": 1, "new_tokens": 4, "stop": True}


def contest(**said):
    given = Material([], [], "", {"stop_ids": [2]})
    return Contest(Scripted({"reference": REFERENCE} | said), given, Silent())


def test_contestants_take_turns_in_every_round_and_who_fails_is_not_asked_again():
    one = contest(**{"Hugging Face": [[5, 6, 2, 0]], "steerlens": [[5, 6, 2]]})
    race = Race("fixed", "batch 1", {by: work(by) for by in ("Hugging Face", "repeng", "steerlens")}, rounds=3)
    entries = one.race(race)
    assert one.pool.order == ["Hugging Face", "reference", "repeng", "steerlens"] + 3 * ["Hugging Face", "steerlens"]
    assert entries["repeng"] == {"absent": "not here"}
    assert entries["steerlens"]["units"] == 3  # up to the token that stops the row, as Hugging Face's
    assert entries["steerlens"]["seconds"] == [7, 9, 11]
    assert entries["steerlens"]["grown_mib"] == [2.5, 2.5, 2.5]
    record = {"entries": entries}
    assert ratio(record, "steerlens", "Hugging Face") == [6 / 7, 8 / 9, 10 / 11]
    assert ratio(record, "repeng", "Hugging Face") == []


@pytest.mark.parametrize(
    ("said", "gaps", "tokens", "ties", "different"),
    [
        ([5, 6, 7], [1, 1, 1], 3, 0, 0),
        ([5, 9, 7], [1, 1, 1], 3, 0, 1),
        ([5, 6], [1, 1, 1], 3, 0, 1),
        ([5, 9, 9, 9], [1, 1e-5, 1], 1, 1, 0),
        ([4, 6, 7], [1, 1e-5, 1], 1, 1, 1),
    ],
)
def test_texts_are_compared_up_to_the_first_near_tie(said, gaps, tokens, ties, different):
    found = compared([([5, 6, 7], gaps)], [said])
    assert found == {"rows": 1, "tokens": tokens, "near_ties": ties, "different_rows": different}


def test_a_row_is_cut_after_its_stop_only_where_stops_count():
    assert cut([5, 2, 0], [2], True) == [5, 2]
    assert cut([5, 2, 0], [2], False) == [5, 2, 0]


def test_the_limit_is_of_distinct_prefixes_and_of_whichever_takes_longer_bytes_or_operations():
    assert distinct([[[1, 2], [1, 2, 3]], [[1, 2], [1, 9]]]) == 4
    prepared = {"parameters": 10, "embedding": 4, "lengths": [1.0] * 2, "pair_ids": [[[1, 2], [1, 2, 3]]]}
    machine = {"operations": 20.0, "bytes": 4.0}
    assert limit_seconds({"do": "capture", "texts": [0]}, 1, prepared, machine) == pytest.approx(3 * 2 * 6 / 20)
    asked = work("steerlens")
    few = limit_seconds(asked, 3, prepared, machine)  # two prompt tokens; then two steps that read all weights
    assert few == pytest.approx(2 * 2 * 6 / 20 + 2 * 10 + 2 * 4 / 20)
    many = asked | {"rows": [[0, []]] * 64, "batch": 64}  # a step of 64 rows computes longer than it reads
    assert limit_seconds(many, 128, prepared, machine) == pytest.approx((2 * 2 * 6 + 64 * 2 * 4) / 20 + 64)


def test_the_limit_runs_blocks_once_over_what_prompts_begin_with_up_to_where_they_are_steered():
    ids = [[1, 2, 3], [1, 2, 4, 5]]
    assert distinct_steered([[0, []], [1, []], [0, []]], ids, 4) == 5
    # A step after layer 1 is seen by layers 2 and 3, in tokens of its own there.
    after_1, after_3 = [[1, 7, 0.5]], [[3, 7, 0.5]]
    assert distinct_steered([[0, []], [0, after_1], [1, after_1], [1, after_3]], ids, 4) == (5 * 2 + 2 * 5 * 2) / 4
    assert distinct_steered([[0, [[0, row, 0.5], [2, row, 0.5]]] for row in range(3)], ids, 4) == 3 * (1 + 3 * 3) / 4


def prepared(n_layers, n_queries):
    return {"lengths": [1.0] * n_layers, "ids": [[1, 2]] * n_queries, "texts": [["a", "b"]] * 5000, "stop_ids": [2]}


def test_every_race_gives_all_who_are_compared_the_same_rows_vectors_and_new_tokens():
    given = material("tiny", "vectors.npy", 70)
    assert len({query for query, *_ in given.pairs}) == 70
    given.prepared = prepared(8, len(given.queries))
    races = list(Races(FULL["tiny"], given))
    assert len({(race.figure, race.setting) for race in races}) == len(races)
    (sweep,) = [race for race in races if race.figure == "sweep"]
    rows = {
        json.dumps(work["rows"])
        for label, work in sweep.entries.items()
        if label not in ("plain loop", "original recipe")
    }
    assert len(rows) == 1
    assert len(json.loads(rows.pop())) == 5 * 4 * 16
    (apart,) = {
        len({json.dumps(steps) for _, steps in race.entries["steerlens, every row at five layers"]["rows"]})
        for race in races
        if race.setting == "batch 32"
    }
    assert apart == 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(BUNDLED / "tiny", tmp_path_factory.mktemp("tiny"))


def test_the_contestants_of_our_own_say_the_same_steered_and_find_the_same_directions(folder):
    made = {name: kind(str(folder), **options) for name, (venv, kind, options) in CONTESTANTS.items() if venv == "own"}
    given = material("tiny", str(folder / "vectors.npy"), 16)
    given.prepared = made["steerlens"].prepare({**vars(given), "n_vectors": 64})
    assert [made["reference"].tokenizer(side)["input_ids"] for side in given.prepared["texts"][3]] == given.prepared[
        "pair_ids"
    ][3]
    races = Races(Sizes(), given)
    rows = [*races.apart([0, 5, 9], [2, 6]), (1, [])]
    said = made["reference"].generate(races.sampling("reference", rows, 4, 6))
    assert [len(gaps) for gaps in said["gaps"]] == [6] * 4
    assert len({tuple(row) for row in said["tokens"]}) == 4
    for by in ("Hugging Face", "TransformerLens", "steerlens", "plain loop", "original recipe"):
        batch = 1 if by in ("plain loop", "original recipe") else 4
        got = made[by].generate(races.sampling(by, rows, batch, 6))
        expected = list(zip(said["tokens"], said["gaps"], strict=True))
        assert compared(expected, got)["different_rows"] == 0, by
    entries = {
        by: {"units": 3, "directions": made[by].capture(races.capturing(by, 3))}
        for by in ("steerlens", "original recipe")
    }
    entries["Hugging Face, hook"] = {"units": 3, "directions": made["Hugging Face"].capture(races.capturing("", 3))}
    assert all(entry["difference"] < 1e-4 for entry in bench.with_differences(entries).values())


def test_what_was_measured_is_not_measured_again_until_a_setting_changes(tmp_path, monkeypatch, folder):
    order = []

    class Remembered(Scripted):
        def __init__(self, *_):
            super().__init__(
                {"Hugging Face": [[3] * 4], "steerlens": [[3] * 4], "reference": REFERENCE | {"tokens": [[3] * 4]}}
            )
            self.order = order

        def ask(self, venv, work):
            if work["do"] in ("prepare", "limits", "versions"):
                about = {"parameters": 10, "embedding": 4, "pair_ids": [[[1], [1]]] * 16}
                limits, versions = {"wall": {"operations": 1e9, "bytes": 1e9}}, {"python": "3"}
                return {
                    "found": {"prepare": prepared(8, 200) | about, "limits": limits, "versions": versions}[work["do"]]
                }
            return super().ask(venv, work)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(bench, "Pool", Remembered)
    monkeypatch.setattr(bench, "folder_of", lambda name: folder)
    sizes = Sizes(batches=(1,), new_tokens=4, rounds=2, pairs=16, figures=("fixed",))

    def run(**changes):
        order.clear()
        return run_model("tiny", Settings(models=("tiny",), **{"threads": 1, **changes}), sizes, tmp_path)

    found = run()
    n_asked = len(order)
    assert n_asked > 10
    assert run()["races"] == found["races"]
    assert order == []
    run(threads=2)
    assert len(order) == n_asked
    run(threads=2, fresh=True)
    assert len(order) == n_asked

    whole = {"date": "", "processor": "", "cores": 1, "threads": 1, "clock": "wall", "models": {"tiny": found}}
    text = markdown(whole)
    assert "Absent: repeng: not here" in text
    assert "0 rows differ" in text
    assert len(figure(whole).data) == 2  # marks, and their numbers
    assert [goal.met for goal in goals("tiny", found["races"]) if goal.found] == [
        False,
        True,
        True,
    ]  # later turns are slower here


def test_memory_that_grows_with_the_pairs_misses_its_goal():
    def races(*grown):
        return [{"figure": "memory", "setting": "", "entries": {"steerlens": {"grown_mib": mib}}} for mib in grown]

    def met(*grown):
        (goal,) = goals("tiny", races(*grown))
        return goal.met

    # One process may hold more than another does, whatever it is asked: the median counts.
    assert all(met(*grown) for grown in (([100], [90]), ([4], [19]), ([400], [439]), ([6, 30, 28], [64, 26, 31])))
    assert not any(
        met(*grown) for grown in (([4], [21]), ([400], [441]), ([30, 6, 28], [26, 64, 70]), ([6, 30, 28], [64, 47, 26]))
    )
    race = {"entries": {"a": {"grown_mib": [6, 30, 28], "units": 4, "seconds": [1, 2, 4]}}}
    assert memory_cell(race, "a") == "28 [6, 30] MiB at 2.0 pairs/s"


def test_memory_is_of_processes_of_their_own_for_steerlens_as_many_as_there_are_rounds(monkeypatch):
    made = []

    class Process(Scripted):
        def __enter__(self):
            made.append(self)
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(bench, "Pool", lambda *_: Process({"repeng": [], "steerlens": []}))
    one = contest()
    one.pool.folder = one.pool.threads = one.pool.home = None
    work = {"do": "capture", "pairs": [0] * 20, "texts": [0] * 20}
    works = {by: work | {"by": by} for by in ("repeng", "steerlens", "nnsight")}
    entries = one.race_apart(Race("memory", "20 pairs", works, 3, "pairs", apart=True))
    assert [process.order for process in made] == [["repeng"] * 2, *[["steerlens"] * 2] * 3, ["nnsight"] * 2]
    assert entries["steerlens"]["grown_mib"] == [2.5] * 3
    assert entries["steerlens"]["units"] == 20
    assert entries["nnsight"]["absent"] == "not here"


def told(record):
    """The report of one race."""
    machine = {"operations": 1e9, "bytes": 1e9}
    model = {"races": [record], "machine": machine, "versions": {}, "parameters": 10, "embedding": 4}
    return markdown({"date": "", "processor": "", "cores": 1, "threads": 1, "clock": "wall", "models": {"tiny": model}})


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (
            {"units": 60, "agreement": dict.fromkeys(("tokens", "near_ties", "different_rows"), 0) | {"rows": 4}}
            | {"seconds": [1.0], "limit_seconds": 0.1},
            "64 prompts: a row has 15 new tokens on average",
        ),
        ({"absent": "not here"}, "Absent: steerlens: not here"),
    ],
)
def test_natural_lengths_are_told_of_who_ran_them(ours, expected):
    record = {
        "figure": "natural",
        "setting": "64 prompts",
        "unit": "tokens",
        "load": 0.0,
        "entries": {"steerlens": ours},
    }
    assert expected in told(record)


def test_a_contestant_that_says_something_else_is_named():
    one = contest(**{"Hugging Face": [[5, 6, 2, 0]], "repeng": [[5, 7, 2, 0]]})
    race = Race("fixed", "batch 1", {by: work(by) for by in ("Hugging Face", "repeng")}, rounds=1)
    record = {"figure": "fixed", "setting": "batch 1", "unit": "tokens", "load": 0.0, "entries": one.race(race)}
    assert "1 rows differ: repeng (fixed, batch 1): 1 of 1" in told(record)
