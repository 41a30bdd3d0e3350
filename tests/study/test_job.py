"""The main job: one folder, resumable at any moment, the same result however often it was killed."""

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from steerlens.checks.registry import register_check
from steerlens.data.conditions import ALL_CONDITIONS
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import DataError, SteerlensError
from steerlens.models.prompts import PromptFormat
from steerlens.steering.settings import SamplingConfig
from steerlens.study.config import RunConfig
from steerlens.study.job import run, run_identity, select_pairs
from steerlens.study.quality import Quality
from steerlens.study.scores import Evaluation
from steerlens.study.seeing import GEOMETRY, LENS
from steerlens.study.sweeps import Best
from steerlens.vectors.vector import SteeringVector

NO_COMMA, LOWERCASE = "punctuation:no_comma", "change_case:english_lowercase"


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    queries = [
        f"Say {word}." for word in ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    ]
    pairs = PairSet(
        InstructionPair(query, text, name)
        for query in queries
        for text, name in (("Use no commas.", NO_COMMA), ("Use lowercase.", LOWERCASE))
    )
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    pairs.save(path)
    return path


@pytest.fixture
def config(tiny_folders, pairs_file):
    return RunConfig(
        model=str(tiny_folders["llama"]),
        pairs=str(pairs_file),
        n_train=4,
        n_valid=2,
        n_test=2,
        layers=(1, 3),
        sampling=SamplingConfig(12),
        search_tokens=8,
        batch_size=4,
    )


RESULTS = ("scores.jsonl", "search_scores.jsonl", "table.csv", "comparisons.csv", "search.csv")


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULTS}


def test_a_run_leaves_everything_it_promises(config, tmp_path):
    done = run(config, tmp_path / "run", progress=False, command="the command")
    assert repr(done).startswith(f"RunResult({str(tmp_path / 'run')!r}, ")
    assert len(repr(done)) < 200 + len(str(tmp_path))
    assert done.report.name in done._repr_html_()
    pd.testing.assert_frame_equal(Evaluation.load(tmp_path / "run").scores, done.to_frame(), atol=1e-8)
    names = {str(path.relative_to(done.folder)) for path in done.folder.rglob("*") if path.is_file()}
    vectors = {name for name in names if name.startswith("vectors/")}
    seen = {f"{kind}/{name}.csv" for kind, names in (("lens", LENS), ("geometry", GEOMETRY)) for name in names}
    seen |= {"lens/config.json", "geometry/config.json"}
    assert names == {*RESULTS, *vectors, *seen, "config.json", "generations.jsonl", "facts.json", "report.html"}
    assert set(done.evaluation.scores["instruction"]) == {NO_COMMA, LOWERCASE}
    stored = pd.read_json(done.folder / "scores.jsonl", lines=True)
    assert stored["response"].tolist() == done.evaluation.scores["response"].tolist()
    assert json.loads((done.folder / "config.json").read_text())["identity"] == done.facts["identity"]
    assert "the command" in done.report.read_text()
    ids = {f"vectors/{name.replace(':', '.')}" for name in (NO_COMMA, LOWERCASE)}
    assert {name.split("-")[0] for name in vectors} == ids
    loaded = SteeringVector.load(done.folder / max(vectors))
    assert loaded.layers == (0, 1, 2, 3)
    assert loaded.metadata["instruction"] == NO_COMMA


@pytest.fixture
def chosen_for_no_comma(monkeypatch):
    """Searches choose a vector for one instruction and no steering for the other: a random model's rates choose nothing."""
    best = {NO_COMMA: Best(1, 30.0, "add"), LOWERCASE: Best(None, 0.0)}
    monkeypatch.setattr("steerlens.study.sweeps.Sweep.best", lambda self, name, **_: best[name])


@pytest.mark.usefixtures("chosen_for_no_comma")
def test_a_run_with_attention_fills_its_cells_too_and_says_so(config, tmp_path):
    asked = replace(config, attention="pasta:alpha=0.1,heads=1-2", operators=("add",), coeffs=(30.0,), layers=(1,))
    done = run(asked, tmp_path, progress=False)
    plans = done.evaluation.scores.groupby("condition", sort=False)["plan"].unique()
    assert set(plans.index) == set(ALL_CONDITIONS)
    assert plans["none"].tolist() == plans["text"].tolist() == ["no steering"]
    assert plans["text+attention"].tolist() == [
        "pasta -2.303 nats on the rest of the prompt at layer 1, 2, positions all"
    ]
    steps = done.evaluation.scores.groupby(["instruction", "condition"])["n_interventions"].unique().str[0]
    cells = ["vector", "random", "text+vector", "text+attention", "text+vector+attention", "text+random"]
    assert steps[NO_COMMA][cells].tolist() == [1, 1, 1, 1, 2, 2]
    assert steps[LOWERCASE][cells].tolist() == [0, 0, 0, 1, 1, 1]
    assert done.facts["attention"].startswith("pasta:alpha=0.1,heads=1-2: pasta -2.303 nats")
    page = done.report.read_text()
    assert "pasta:alpha=0.1,heads=1-2" in page
    assert "text+vector+attention" in page


@pytest.mark.parametrize(
    "change",
    [{"attention": "instaboost:bias=2"}, {"attention": "directer:beta=0.2"}, {"attention": "pasta", "plausible": 0.2}],
)
def test_a_run_that_chose_no_vector_has_the_cells_of_attention_all_the_same(config, tmp_path, change):
    """The text of a random model follows nothing by a vector of strength 0.001."""
    asked = replace(config, operators=("add",), coeffs=(0.001,), **change)
    done = run(asked, tmp_path, progress=False)
    assert all(done.search["vector"].best(name).layer is None for name in done.vectors)
    assert list(dict.fromkeys(done.evaluation.scores["condition"])) == ["none", "text", "text+attention", "text+random"]
    gated = {"gate_accepted"} & set(done.evaluation.table)
    assert bool(gated) == (change["attention"] != "instaboost:bias=2")


def test_attention_is_part_of_a_runs_identity_by_what_it_does_not_by_how_it_is_written(config, llama):
    parts = select_pairs(config, n_test=2)[:3]

    def identity(**names: Any) -> str:
        return run_identity(replace(config, **names), llama.model, Quality(), *parts)

    written = ("pasta", "pasta:alpha=0.01", "pasta:positions=all,alpha=1e-2")
    assert len({identity(attention=one) for one in written}) == 1
    others = [{}, {"attention": "pasta"}, {"attention": "pasta:alpha=0.1"}, {"plausible": 0.5}, {"plausible": 0.2}]
    assert len({identity(**one) for one in others}) == len(others)


def test_attention_that_cannot_be_steered_stops_a_run_before_anything_is_done(config, tmp_path):
    woven = PairSet(InstructionPair(f"Say {n}.", "", NO_COMMA, prompt=f"Say {n}, no commas.") for n in range(8))
    woven.save(tmp_path / "woven.jsonl")
    for change, sentence in (
        ({"attention": "pasta:heads=9"}, r"layer must be in \[0, 4\), got 9"),
        ({"attention": "psta"}, "did you mean 'pasta'"),
        ({"attention": "pasta", "pairs": str(tmp_path / "woven.jsonl")}, "a span needs an instruction that stands in"),
    ):
        with pytest.raises(SteerlensError, match=sentence):
            run(replace(config, **change), tmp_path / "run", progress=False)
        assert not (tmp_path / "run" / "vectors").exists()


@pytest.mark.usefixtures("chosen_for_no_comma")
def test_a_gate_is_around_vectors_in_the_search_and_in_the_evaluation(config, tmp_path):
    asked = replace(config, plausible=0.3, operators=("add",), coeffs=(30.0,), layers=(1,))
    done = run(asked, tmp_path, progress=False)
    for scores in (*(one.scores for one in done.search.values()), done.evaluation.scores):
        steered = scores[scores["n_interventions"] > 0]
        assert steered["plan"].str.startswith("if plausible (beta 0.3").all()
        assert steered["gate_skipped"].notna().all()
    assert len(done.search["vector"].scores.query("layer == 1"))
    assert done.facts["steered tokens"] == "have at least 0.3 of the largest unsteered probability"


def test_a_second_run_generates_nothing_and_changes_nothing(config, tmp_path, monkeypatch):
    first = run(config, tmp_path, progress=False)
    before = results(tmp_path), (tmp_path / "generations.jsonl").read_bytes()
    monkeypatch.setattr("steerlens.study.responses.generate", None)
    monkeypatch.setattr("steerlens.vectors.estimators.record_activations", None)
    second = run(config, tmp_path, progress=False)
    assert (results(tmp_path), (tmp_path / "generations.jsonl").read_bytes()) == before
    assert first.facts["identity"] == second.facts["identity"]


def test_a_run_of_a_loaded_model_says_which_it_was(config, gpt2, tmp_path):
    asked = replace(config, layers=(1,), n_valid=1, n_test=1, model="tiny", dtype="bfloat16")
    done = run(asked, tmp_path, model=gpt2.model, progress=False)
    settings = json.loads((tmp_path / "config.json").read_text())["config"]
    assert (settings["model"], settings["dtype"]) == ("gpt2", "float32")
    assert done.facts["model"] == "gpt2"


def test_a_runs_identity_is_what_files_hold_not_how_their_paths_are_spelled(config, llama, tiny_folders, monkeypatch):
    root = tiny_folders["llama"].parent
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(root))
    parts = select_pairs(config, n_test=2)[:3]

    def identity(**names: Any) -> str:
        changed = replace(config, **names)
        return run_identity(changed, llama.model, Quality(quality_model=changed.quality_model), *parts)

    spellings = ["gpt2", "./gpt2", "~/gpt2", str(tiny_folders["gpt2"])]
    assert len({identity(quality_model=name, queries=name) for name in spellings}) == 1
    assert len({identity(quality_model=name) for name in ("gpt2", "llama", None)}) == 3


@pytest.fixture
def own_checks(monkeypatch):
    """Two checks whose ids differ in where a point and a colon stand."""
    monkeypatch.setattr("steerlens.checks.registry._REGISTERED", {})

    @register_check("my.x:y")
    def one(response):
        return "a" in response

    @register_check("my:x.y")
    def two(response):
        return "b" in response


def test_vectors_of_names_that_look_alike_or_are_long_are_kept_apart(config, own_checks, tmp_path):
    long = "+".join(f"keywords:{name}" for name in ["existence"] * 6)
    arguments = [{"keywords": [word]} for word in ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]]
    PairSet(
        InstructionPair(f"Say {n}.", text, ids.split("+"), kwargs)
        for n in range(6)
        for ids, text, kwargs in (("my.x:y", "Say a.", ()), ("my:x.y", "Write b.", ()), (long, "All six.", arguments))
    ).save(tmp_path / "pairs.jsonl")
    config = replace(config, pairs=str(tmp_path / "pairs.jsonl"), n_valid=1, n_test=1, layers=(1,))
    first = run(config, tmp_path / "run", progress=False)
    again = run(config, tmp_path / "run", progress=False)
    assert set(again.vectors) == {"my.x:y", "my:x.y", long}
    for name, vector in again.vectors.items():
        assert vector.metadata["instruction"] == name
        assert torch.equal(vector.directions[1], first.vectors[name].directions[1])


DATED = "{{ bos_token }}{{ strftime_now('%Y-%m-%d') }} {% for m in messages %}{{ m.content }}{% endfor %}"


class Days(datetime.date):
    """A calendar on which a day passes whenever it is looked at."""

    seen = 0

    @classmethod
    def today(cls):
        cls.seen += 1
        return cls(2025, 1, cls.seen)


def test_a_run_keeps_the_date_on_which_it_began_and_goes_on_with_it(config, tmp_path, tiny_folders, monkeypatch):
    shutil.copytree(tiny_folders["llama"], tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(DATED)
    config = replace(config, model=str(tmp_path / "model"))
    monkeypatch.setattr("steerlens.models.prompts.date", Days)
    first = run(config, tmp_path / "run", progress=False)
    assert first.facts["prompts"] == "<bos>2025-01-01 {prompt}"
    assert {vector.metadata["prompt"] for vector in first.vectors.values()} == {"<bos>2025-01-01 {prompt}"}
    before = (first.folder / "generations.jsonl").read_bytes()
    again = run(config, tmp_path / "run", progress=False)
    assert (again.folder / "generations.jsonl").read_bytes() == before
    assert again.facts["identity"] == first.facts["identity"]
    pinned = replace(config, prompt_format=PromptFormat(date="2025-01-01"))
    assert run(pinned, tmp_path / "pinned", progress=False).facts["identity"] == first.facts["identity"]
    other = run(replace(config, prompt_format=PromptFormat(date="2024-02-29")), tmp_path / "run", progress=False)
    assert other.facts["identity"] != first.facts["identity"]
    assert {vector.metadata["prompt"] for vector in other.vectors.values()} == {"<bos>2024-02-29 {prompt}"}


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": SamplingConfig(13)},
        {"sampling": SamplingConfig(12, stop="e")},
        {"seed": 1},
        {"n_train": 5},
        {"coeffs": (2.0,)},
    ],
)
def test_a_changed_setting_is_another_run_in_the_same_folder(config, tmp_path, change):
    first = run(config, tmp_path / "run", progress=False)
    changed = replace(config, **change)
    again = run(changed, tmp_path / "run", progress=False)
    fresh = run(changed, tmp_path / "fresh", progress=False)
    assert again.facts["identity"] == fresh.facts["identity"] != first.facts["identity"]
    assert results(tmp_path / "run") == results(tmp_path / "fresh")


def test_results_of_other_settings_are_gone_before_a_changed_run_can_be_cut_short(config, tmp_path, monkeypatch):
    run(config, tmp_path, progress=False)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("steerlens.study.job.sweep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(replace(config, coeffs=(2.0,)), tmp_path, progress=False)
    assert not [name for name in (*RESULTS, "report.html") if (tmp_path / name).exists()]
    assert lines(tmp_path / "generations.jsonl") > 0


def start(config: RunConfig, folder: Path) -> subprocess.Popen[bytes]:
    code = (
        "from steerlens.study.config import PromptFormat, RunConfig, SamplingConfig; from steerlens.study.job import run; "
        f"run(RunConfig(**{config.__dict__!r}), {str(folder)!r}, progress=False)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_run_killed_in_the_middle_goes_on_with_just_the_missing_rows(config, tmp_path, sent):
    config = replace(config, sampling=SamplingConfig(60), search_tokens=60, batch_size=2)
    whole = run(config, tmp_path / "whole", progress=False)
    total = lines(whole.folder / "generations.jsonl")

    folder, journal = tmp_path / "killed", tmp_path / "killed" / "generations.jsonl"
    process = start(config, folder)
    deadline = time.monotonic() + 120
    while lines(journal) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(sent)
    process.wait(60)
    kept = journal.read_bytes()
    n_kept = kept.count(b"\n")
    assert 4 <= n_kept < total, "the run was to be stopped in the middle"

    run(config, folder, progress=False)
    after = journal.read_bytes()
    assert after.startswith(kept[: kept.rindex(b"\n") + 1]), "what was finished is kept as it was"
    keys = [json.loads(line)["key"] for line in after.splitlines()]
    assert len(keys) == len(set(keys)) == total
    assert results(folder) == results(whole.folder)


def test_a_sweep_killed_in_the_middle_goes_on_to_the_same_table(tmp_path):
    settings = "sweep --layers 1 4 --n-train 4 --n-valid 2 --max-new-tokens 40 --batch-size 4"
    settings += " --instructions punctuation:no_comma detectable_format:title"
    command = [sys.executable, "-c", "from steerlens.cli import main; main()", *settings.split()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, **options)

    journal = tmp_path / "killed" / "generations.jsonl"
    process = subprocess.Popen([*command, "--out", str(tmp_path / "killed")], **options)
    while lines(journal) < 4 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait(60)
    total = lines(tmp_path / "whole" / "generations.jsonl")
    assert 4 <= lines(journal) < total, "the sweep was to be stopped in the middle"
    assert not (tmp_path / "killed" / "table.csv").exists()

    subprocess.run([*command, "--out", str(tmp_path / "killed")], check=True, **options)
    assert lines(journal) == total
    for name in ("table.csv", "scores.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_fits_the_languages_that_its_test_prompts_ask_for(tmp_path):
    asked = [("de", "Answer in German."), ("fr", "Answer in French.")]
    PairSet(
        InstructionPair(f"Describe {code}.", text, "language:response_language", {"language": code})
        for code, text in asked
    ).save(tmp_path / "data.jsonl")
    train, valid, test, notes = select_pairs(RunConfig(pairs="tiny", data=str(tmp_path / "data.jsonl")))
    names = {f"language:response_language_{code}" for code, _ in asked}
    assert set(train.instructions) == set(valid.instructions) == set(test.instructions) == names
    assert {pair.kwargs[0]["language"] for pair in train.filter("language:response_language_fr")} == {"fr"}
    assert [note for note in notes if note.startswith("not tested, for want of test prompts: change_case")]


def test_splits_of_a_run_share_no_query(config):
    train, valid, test, _ = select_pairs(config, n_test=2)
    queries = [{pair.query for pair in part} for part in (train, valid, test)]
    assert not queries[0] & queries[1]
    assert not queries[0] & queries[2]
    assert not queries[1] & queries[2]
    assert {len(part.by_instruction()[NO_COMMA]) for part in (valid, test)} == {2}


def test_test_prompts_from_a_file_are_kept_out_of_fitting_and_what_is_left_out_is_said(config, tmp_path):
    data = PairSet(
        [
            InstructionPair("say  ONE.", "Use no commas.", NO_COMMA),
            InstructionPair("Another query.", "Use no commas.", NO_COMMA),
            InstructionPair("Another query.", "Write a title.", "detectable_format:title"),
        ]
    )
    data.save(tmp_path / "data.jsonl")
    train, valid, test, notes = select_pairs(replace(config, data=str(tmp_path / "data.jsonl"), n_train=99, n_valid=99))
    assert [pair.query for pair in test] == ["say  ONE.", "Another query."]
    assert "Say one." not in {pair.query for pair in (*train, *valid)}
    assert set(train.instructions) == {NO_COMMA}
    assert "1 of 3 test prompts left out (detectable_format:title)" in notes
    assert any("fitting pairs left out" in note for note in notes)


def test_no_test_prompts_after_filtering_is_an_error_that_names_both_sides(config, tmp_path):
    PairSet([InstructionPair("A query.", "Write a title.", "detectable_format:title")]).save(tmp_path / "data.jsonl")
    with pytest.raises(DataError, match=r"no test prompts are left: .* has detectable_format:title, .* are for punct"):
        run(replace(config, data=str(tmp_path / "data.jsonl")), tmp_path / "run", progress=False)


def test_an_instruction_asked_for_by_name_must_have_test_prompts(config, tmp_path):
    PairSet([InstructionPair("A query.", "Use no commas.", NO_COMMA)]).save(tmp_path / "data.jsonl")
    asked = replace(config, data=str(tmp_path / "data.jsonl"), instructions=(NO_COMMA, LOWERCASE))
    with pytest.raises(DataError, match=f"has none for {LOWERCASE}"):
        select_pairs(asked)


def test_bad_settings_stop_a_run_before_it_generates(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="an output folder must be writable"):
        run(config, tmp_path / "file" / "run", progress=False)
    with pytest.raises(SteerlensError, match=r"layer must be in \[0, 4\), got 7"):
        run(replace(config, layers=(7,)), tmp_path / "run", progress=False)
    with pytest.raises(SteerlensError, match="numbers of prompts must be at least 1, got 0"):
        run(replace(config, n_valid=0), tmp_path / "run", progress=False)
    with pytest.raises(SteerlensError, match="max_new_tokens must be at least 1"):
        run(replace(config, search_tokens=0), tmp_path / "run", progress=False)
    with pytest.raises(SteerlensError, match="must fit the context of 160 tokens"):
        run(replace(config, sampling=SamplingConfig(150)), tmp_path / "run", progress=False)
    with pytest.raises(SteerlensError, match="trials must be 1, or more with a temperature"):
        run(replace(config, trials=3), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "vectors").exists(), "nothing was recorded"
    assert lines(tmp_path / "run" / "generations.jsonl") == 0
