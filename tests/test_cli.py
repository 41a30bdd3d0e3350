"""The command line as a user meets it: its output and its exit code."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from steerlens.cli import main
from steerlens.data.load import load_pairs
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.steering.settings import SamplingConfig
from steerlens.study.config import RunConfig
from steerlens.study.job import run
from steerlens.study.responses import answer
from steerlens.study.scores import read_scores
from steerlens.vectors.vector import SteeringVector

NO_COMMA = "punctuation:no_comma"


@dataclass
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def steerlens(capfd, monkeypatch):
    """Run the command in this process: importing torch anew for each would take most of the time."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["steerlens", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Done(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "pairs.jsonl"
    PairSet(InstructionPair(f"Say {i}.", "Use no commas.", NO_COMMA) for i in range(8)).save(path)
    return path


def test_help_is_quick_and_has_examples():
    code = "import sys; sys.argv = ['steerlens', 'run', '--help']\nfrom steerlens.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules, 'help imports torch'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "steerlens run --model smollm2-135m" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "new",
        "run",
        "sweep",
        "fit",
        "generate",
        "evaluate",
        "lens",
        "geometry",
        "layers",
        "info",
        "models",
        "methods",
        "instructions",
    ],
)
def test_every_command_explains_itself(steerlens, command):
    done = steerlens(command, "--help")
    assert done.returncode == 0
    assert "usage: steerlens" in done.stdout


SHARED = {
    "model": ("--model", "--dtype", "--device"),
    "sampling": ("--max-new-tokens", "--temperature", "--top-k", "--top-p", "--stop", "--stop-ids"),
    "format": ("--style", "--system", "--date"),
    "attention": ("--attention", "--plausible"),
}


@pytest.mark.parametrize("command", ["run", "sweep", "fit", "generate", "evaluate"])
def test_options_have_one_name_on_every_command(steerlens, command):
    words = set(steerlens(command, "--help").stdout.split())
    for group, flags in SHARED.items():
        assert (command == "fit" and group in ("sampling", "attention")) or words >= set(flags)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--operators", "sub"], "invalid choice 'sub'"),
        (["fit", "--instruction", "no:such", "--out", "v.safetensors"], "unknown instruction id"),
        (["info", "nothing.safetensors"], "a vector file must exist, got 'nothing.safetensors'"),
        (["generate", "--prompt", "Hi", "--model", "./nowhere"], "a model path must be a folder"),
        (["run", "--pairs", "nothing.jsonl"], "nothing.jsonl"),
        (["generate", "--prompt", "Hi", "--temperature", "-1"], "temperature must be 0 (greedy) or above"),
        (["fly"], "fly"),
        (["new"], "folder"),
        (["lens"], "there must be something to look at, got nothing"),
        (["lens", "nothing.safetensors"], "a vector file must exist, got 'nothing.safetensors'"),
        (["geometry", "nothing.safetensors", "--out", "seen"], "a vector file must exist, got 'nothing.safetensors'"),
        (["layers", "."], "a folder to look at must be that of a run, got one without a run"),
        (["lens", ".", "."], "a run's folder is looked at alone, got 2 places"),
        (["lens", ".", "--out", "seen"], "a run has its own folder, pairs and prompt format, got out as well"),
        (["layers", ".", "--studies", "flying"], "invalid choice 'flying'"),
    ],
)
def test_bad_arguments_end_with_code_2_and_say_why(steerlens, arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = steerlens(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_fit_info_generate_and_evaluate_work_together(steerlens, tiny_folders, pairs_file, tmp_path):
    vector = tmp_path / "v.safetensors"
    common = ["--model", tiny_folders["llama"]]
    fitted = steerlens("fit", *common, "--instruction", NO_COMMA, "--pairs", pairs_file, "--out", vector)
    assert fitted.returncode == 0, fitted.stderr
    shown = steerlens("info", vector)
    assert f"instruction: {NO_COMMA}" in shown.stdout
    steering = ["--vector", vector, "--layer", 2, "--max-new-tokens", 5]
    plain = steerlens("generate", *common, "--prompt", "Hello", "--max-new-tokens", 5)
    steered = steerlens("generate", *common, "--prompt", "Hello", *steering, "--operator", "add", "--coeff", 30)
    assert plain.returncode == steered.returncode == 0, steered.stderr
    assert "> Hello" in steered.stdout
    assert plain.stdout != steered.stdout
    table = steerlens("evaluate", *common, "--data", pairs_file, "--n-test", 2, *steering)
    assert table.returncode == 0, table.stderr
    assert all(condition in table.stdout for condition in ("none", "vector", "text+vector", "random"))


def test_a_tilde_is_the_home_folder_also_where_the_shell_left_it(
    steerlens, tiny_folders, pairs_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model = ["--model", tiny_folders["llama"]]
    done = steerlens("fit", *model, "--instruction", NO_COMMA, "--pairs", pairs_file, "--out", "~/v/a.safetensors")
    assert done.returncode == 0, done.stderr
    assert f"instruction: {NO_COMMA}" in steerlens("info", "~/v/a.safetensors").stdout
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_queries_that_a_vector_was_fitted_on_do_not_test_it_whatever_the_file(
    steerlens, tiny_folders, pairs_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(pairs_file.parent)
    vector, common = tmp_path / "v.safetensors", ["--model", tiny_folders["llama"]]
    steerlens("fit", *common, "--instruction", NO_COMMA, "--pairs", pairs_file, "--out", vector)
    respelled = PairSet(InstructionPair(f"SAY  {i}.", "No comma.", NO_COMMA) for i in range(8))
    respelled.save(tmp_path / "respelled.jsonl")
    fitted_on = SteeringVector.load(vector).metadata["queries"].split()
    PairSet(pair for pair in respelled if pair.query_id in fitted_on).save(tmp_path / "seen.jsonl")
    steering = [*common, "--vector", vector, "--layer", 2, "--max-new-tokens", 2]
    by_default = steerlens("evaluate", *steering)
    for data in (pairs_file, f"./{pairs_file.name}", tmp_path / "respelled.jsonl"):
        done = steerlens("evaluate", *steering, "--data", data)
        assert "6 of 8 prompts left out" in done.stderr
        assert [line.split()[2] for line in done.stdout.splitlines()[1:]] == ["2"] * 5
        if data != tmp_path / "respelled.jsonl":
            assert done.stdout == by_default.stdout
    refused = steerlens("evaluate", *steering, "--data", tmp_path / "seen.jsonl")
    assert refused.returncode == 2
    assert "a vector is tested on queries that it was not fitted on" in refused.stderr


THINKING = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking is false %}<turn>{% endif %}"
    "{{ strftime_now('%Y-%m-%d') }}"
)


def test_prompts_are_formatted_and_stopped_as_asked(steerlens, tiny_folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folders["llama"], folder)
    (folder / "chat_template.jinja").write_text(THINKING)
    command = ["generate", "--model", folder, "--prompt", "Hello", "--max-new-tokens", 4]
    texts = {
        steerlens(*command, *options).stdout
        for options in ([], ["--template-vars", "enable_thinking", False], ["--date", "2024-02-29"], ["--bos", False])
    }
    assert len(texts) == 4
    free = steerlens(*command, "--style", "plain").stdout
    said = free.splitlines()[1]
    stopped = steerlens(*command, "--style", "plain", "--stop", said[1])
    assert f"\n{said[0]}\n[2 tokens, stopped by stop]" in stopped.stdout
    every = steerlens(*command, "--stop-ids", *range(260))
    assert "[1 tokens, stopped by" in every.stdout


def test_a_system_message_that_the_model_would_not_read_is_refused(steerlens, tmp_path):
    for command in (["generate", "--prompt", "Hi"], ["run", "--out", tmp_path / "run", "--n-test", 1]):
        done = steerlens(*command, "--system", "Be brief.")
        assert done.returncode == 2
        assert "this model's chat template takes no system message (it leaves the text out)" in done.stderr


def test_a_vector_without_a_layer_is_refused(steerlens, tiny_folders, pairs_file, tmp_path):
    vector = tmp_path / "v.safetensors"
    steerlens(
        "fit", "--model", tiny_folders["llama"], "--instruction", NO_COMMA, "--pairs", pairs_file, "--out", vector
    )
    done = steerlens("generate", "--model", tiny_folders["llama"], "--prompt", "Hello", "--vector", vector)
    assert done.returncode == 2
    assert "needs --layer, one of [0, 1, 2, 3]" in done.stderr


def test_run_prints_the_table_and_the_report_and_info_shows_it_again(steerlens, tiny_folders, pairs_file, tmp_path):
    sizes = ["--n-train", 2, "--n-valid", 1, "--n-test", 1, "--layers", 1, "--max-new-tokens", 4, "--search-tokens", 4]
    done = steerlens("run", "--model", tiny_folders["llama"], "--pairs", pairs_file, "--out", tmp_path / "run", *sizes)
    assert done.returncode == 0, done.stderr
    assert f"report: {tmp_path / 'run' / 'report.html'}" in done.stdout
    assert "text+vector" in steerlens("info", tmp_path / "run").stdout


ATTENTION = ["generate", "--prompt", "Hi", "--model", "nothing-of-this-name", "--attention"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([*ATTENTION, "psta", "--instruction", "Hi"], "got 'psta'; did you mean 'pasta'?"),
        ([*ATTENTION, "pasta:alhpa=1", "--instruction", "Hi"], "pasta has no parameter 'alhpa'; did you mean 'alpha'?"),
        ([*ATTENTION, "pasta:alpha=x", "--instruction", "Hi"], "alpha of pasta must be a number, got 'x'"),
        ([*ATTENTION, "pasta"], "--attention needs --instruction, the text in the prompt that it is steered towards"),
        ([*ATTENTION[:-1], "--instruction", "Hi"], "--instruction needs --attention"),
        ([*ATTENTION, "pasta", "--instruction", " "], "a span needs a text that is not empty, got ' '"),
        ([*ATTENTION[:-1], "--plausible", "0.5"], "--plausible needs something to be steered behind it"),
        ([*ATTENTION, "directer", "--instruction", "Hi", "--plausible", "0.5"], "a plan has one gate"),
        ([*ATTENTION, "pasta", "--instruction", "Hi", "--plausible", "-1"], "beta must be at least 0, got -1"),
        (["run", "--attention", "psta"], "got 'psta'; did you mean 'pasta'?"),
        (["run", "--plausible", "half"], "half"),
        (["run", "--attention", "directer", "--plausible", "0.5"], "a plan has one gate"),
        (["sweep", "--attention", "pasta"], "a search of pasta tries values of its first parameter, got none"),
        (
            ["sweep", "--attention", "pasta:alpha=0.1", "--coeffs", "0.1"],
            "which must not be written, got 'pasta:alpha=0.1'",
        ),
        (["sweep", "--attention", "pasta", "--coeffs", "0.1", "-1"], "alpha must be above 0, got -1"),
        (
            ["sweep", "--attention", "pasta", "--coeffs", "0.1", "--layers", "3"],
            "attention is searched over coeffs alone",
        ),
        (["sweep", "--attention", "pasta", "--coeffs", "0.1", "--condition", "text+vector"], "got condition as well"),
        (["evaluate", "--vector", "v.safetensors", "--layer", "1", "--attention", "psta"], "did you mean 'pasta'?"),
    ],
)
def test_attention_that_is_asked_for_wrongly_is_refused_in_a_sentence_before_a_model_loads(
    steerlens, arguments, sentence, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("steerlens.models.load.load_model", None)
    done = steerlens(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("attention", "instruction", "sentence"),
    [
        (
            "pasta",
            "Use rhymes.",
            "a span must stand in its prompt as it is written, and 'Use rhymes.' is not in that of",
        ),
        ("pasta:heads=4", "Use no commas.", "layer"),
    ],
)
def test_attention_that_does_not_fit_the_prompt_or_the_model_is_refused(
    steerlens, tiny_folders, attention, instruction, sentence
):
    command = [
        "generate",
        "--model",
        tiny_folders["llama"],
        "--prompt",
        "Say one. Use no commas.",
        "--attention",
        attention,
    ]
    done = steerlens(*command, "--instruction", instruction, "--max-new-tokens", 2)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_answers_are_steered_through_attention_by_a_vector_and_by_both(steerlens, tiny_folders, pairs_file, tmp_path):
    vector, common = tmp_path / "v.safetensors", ["--model", tiny_folders["llama"]]
    steerlens("fit", *common, "--instruction", NO_COMMA, "--pairs", pairs_file, "--out", vector)
    command = ["generate", *common, "--prompt", "Say one. Use no commas.", "--max-new-tokens", 8]
    attention = ["--attention", "instaboost:bias=4", "--instruction", "Use no commas."]
    steering = ["--vector", vector, "--layer", 2, "--operator", "add", "--coeff", 30]
    said = [steerlens(*command, *options) for options in ([], attention, steering, [*attention, *steering])]
    assert [one.returncode for one in said] == [0] * 4, [one.stderr for one in said]
    assert len({one.stdout for one in said}) == 4
    assert not any("[gate" in one.stdout for one in said)
    gated = steerlens(*command, *attention, "--plausible", 0.1)
    written = steerlens(*command, "--attention", "instaboost:bias=4,gate=0.1", *attention[2:])
    assert gated.stdout == written.stdout
    line = gated.stdout.strip().splitlines()[-1]
    assert re.fullmatch(
        r"\[gate: \d+% accepted, \d+% rejected, \d+% skipped; .* layers active and .* per token\]", line
    )
    table = steerlens("evaluate", *common, "--vector", vector, "--layer", 2, *attention[:2], "--max-new-tokens", 2)
    assert table.returncode == 0, table.stderr
    assert len(table.stdout.splitlines()) == 1 + 8


def test_the_strengths_of_a_method_are_swept_without_any_vector(steerlens, tiny_folders, pairs_file, tmp_path):
    command = ("sweep", "--model", tiny_folders["llama"], "--pairs", pairs_file, "--out", tmp_path, "--n-valid", 2)
    done = steerlens(*command, "--attention", "pasta:heads=1-2", "--coeffs", 0.1, 0.01, "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    assert "3 candidates, 3 responses" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.json", "generations.jsonl", "scores.jsonl", "table.csv", "sweep.html"),
    }
    assert "coefficient" in (tmp_path / "sweep.html").read_text()
    scores = read_scores(tmp_path)
    assert set(scores["condition"]) == {"text", "text+attention"}
    assert scores["layers"].unique().tolist() == ["", "1, 2"]


def test_lists_name_models_methods_and_instructions(steerlens):
    assert "smollm2-135m" in steerlens("models").stdout
    assert "\nspotlight:target=0.2,granularity=row,positions=all\n" in steerlens("methods").stdout
    listed = steerlens("instructions").stdout
    assert listed.count("phrasings)") == 12 + 30  # the paper's formats, and IFEval's languages
    assert "language:response_language_de" in listed
    assert NO_COMMA in listed


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -c 'from steerlens.cli import main; main()' instructions | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_sweep_keeps_its_responses_and_prints_what_it_chose(steerlens, tiny_folders, pairs_file, tmp_path):
    command = ("sweep", "--model", tiny_folders["llama"], "--pairs", pairs_file, "--layers", 1, 3, "--out", tmp_path)
    common = (*command, "--max-new-tokens", 6, "--n-valid", 2)
    done = steerlens(*common, "--coeffs", 0.5, 1, "--operators", "set_projection", "ablate")
    assert done.returncode == 0, done.stderr
    assert "9 candidates, 9 responses" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        *("vectors", "config.json", "generations.jsonl", "scores.jsonl", "table.csv", "sweep.html"),
    }
    vectors = list((tmp_path / "vectors").iterdir())
    assert [path.name.split("-")[0] for path in vectors] == ["punctuation.no_comma"]
    steering = ("--model", tiny_folders["llama"], "--vector", vectors[0], "--layer", 1, "--max-new-tokens", 2)
    assert "6 of 8 prompts left out: fitted on" in steerlens("evaluate", *steering, "--stop", "e").stderr
    drawn = steerlens(*common, "--n-random", 3, "--coeffs", 0.5, 2, "--temperature", 1, "--trials", 2)
    assert "4 candidates, 8 responses" in drawn.stdout
    refused = steerlens(*common, "--trials", 2)
    assert refused.returncode == 2
    assert "several trials need a temperature" in refused.stderr


def test_a_layer_without_a_vector_is_refused_before_the_model_loads(steerlens):
    done = steerlens("generate", "--prompt", "a", "--layer", 3, "--model", "nothing-of-this-name")
    assert done.returncode == 2
    assert "--layer 3 needs --vector" in done.stderr


LOWERCASE = "change_case:english_lowercase"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_folders):
    """A finished run of two instructions on a model of four layers."""
    root = tmp_path_factory.mktemp("looked")
    PairSet(
        InstructionPair(f"Say {i}.", text, name)
        for i in range(12)
        for text, name in (("Use no commas.", NO_COMMA), ("Use lowercase.", LOWERCASE))
    ).save(root / "pairs.jsonl")
    config = RunConfig(
        model=str(tiny_folders["llama"]),
        pairs=str(root / "pairs.jsonl"),
        n_train=4,
        n_valid=2,
        n_test=1,
        layers=(1,),
        sampling=SamplingConfig(4),
        search_tokens=4,
        batch_size=8,
    )
    run(config, root / "run", progress=False)
    return root / "run"


@pytest.fixture
def looked(run_folder, tmp_path):
    """A copy of that run, to look at."""
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


SECTIONS = {"lens": "What the vectors say", "geometry": "How they lie", "layers": "Which layers matter"}
FEW = ["--studies", "steering", "--layers", 1, 2, "--n-prompts", 1]


def sections(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [kind for kind, name in SECTIONS.items() if f"<h2>{name}</h2>" in text or f">{name}</h2>" in text]


def test_a_run_is_looked_at_again_and_its_report_grows(steerlens, looked):
    assert sections(looked / "report.html") == ["lens", "geometry"]
    before = (looked / "report.html").read_bytes()
    same = steerlens("lens", looked)
    assert same.returncode == 0, same.stderr
    assert (looked / "report.html").read_bytes() == before
    assert f"{NO_COMMA} at layer" in same.stdout
    more = steerlens("lens", looked, "--targets", "rain", "--top-k", 3)
    assert more.returncode == 0, more.stderr
    assert b"targets-figure" in (looked / "report.html").read_bytes()
    assert "probe" in steerlens("geometry", looked, "--n-layers", 2).stdout
    done = steerlens("layers", looked, *FEW)
    assert done.returncode == 0, done.stderr
    assert str(looked / "report.html") in done.stdout
    assert sections(looked / "report.html") == ["lens", "geometry", "layers"]
    assert {path.name for path in (looked / "layers" / "steering").iterdir()} == {
        *("config.json", "generations.jsonl", "scores.jsonl", "table.csv", "comparisons.csv")
    }


def test_a_second_look_runs_no_model(steerlens, looked, monkeypatch):
    steerlens("layers", looked, *FEW)
    for name in ("logit_lens", "vector_effects", "record_activations"):
        monkeypatch.setattr(f"steerlens.study.seeing.{name}", None)
    monkeypatch.setattr("steerlens.study.responses.answer", None)
    for command in (["lens", looked], ["geometry", looked], ["layers", looked, *FEW]):
        done = steerlens(*command)
        assert done.returncode == 0, done.stderr


def test_a_look_that_is_cut_short_goes_on_with_what_is_missing(steerlens, looked, monkeypatch):
    whole = steerlens("layers", looked, *FEW)
    rows = (looked / "layers" / "steering" / "generations.jsonl").read_bytes().count(b"\n")
    shutil.rmtree(looked / "layers")
    asked = []

    def cut_short(model, batch, *rest):
        if asked:
            raise KeyboardInterrupt
        asked.extend(batch)
        return answer(model, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("steerlens.study.responses.answer", cut_short)
        stopped = steerlens("layers", looked, *FEW)
        assert stopped.returncode == 130
        assert "the same command goes on" in stopped.stderr
        assert sections(looked / "report.html") == ["lens", "geometry", "layers"]  # as it was

        def counted(model, batch, *rest):
            asked.extend(batch)
            return answer(model, batch, *rest)

        patch.setattr("steerlens.study.responses.answer", counted)
        again = steerlens("layers", looked, *FEW)
    assert again.returncode == 0, again.stderr
    assert len(asked) == rows
    assert again.stdout == whole.stdout


def test_a_run_whose_model_or_pairs_have_changed_is_refused(steerlens, looked, tiny_folders):
    done = steerlens("lens", looked, "--model", tiny_folders["gpt2"])
    assert done.returncode == 2
    assert "its model has other weights now" in done.stderr
    (looked / "facts.json").unlink()
    done = steerlens("layers", looked)
    assert done.returncode == 2
    assert "a run must be finished to be looked at" in done.stderr


def test_saved_vectors_are_looked_at_with_prompts_that_they_were_not_fitted_on(
    steerlens, run_folder, tiny_folders, tmp_path
):
    vectors = sorted((run_folder / "vectors").iterdir())
    common = ["--model", tiny_folders["llama"], "--out", tmp_path / "seen"]
    for command in (["lens", vectors[0]], ["geometry", *vectors], ["layers", *vectors, *FEW]):
        done = steerlens(*command, *common)
        assert done.returncode == 0, done.stderr
        page = tmp_path / "seen" / f"{command[0]}.html"
        assert sections(page) == [command[0]]
        assert '<details class="section"' not in page.read_text(encoding="utf-8")
    alone = steerlens("geometry", vectors[0], *common)
    assert alone.returncode == 2
    assert f"geometry compares at least two instructions with two pairs each, got {LOWERCASE}" in alone.stderr
    fitted_on = SteeringVector.load(vectors[0]).metadata["queries"].split()
    scores = read_scores(tmp_path / "seen" / "layers" / "steering")
    assert not {InstructionPair(query, "Text.", NO_COMMA).query_id for query in scores["query"]} & set(fitted_on)
    total = SteeringVector.load(vectors[0]) + SteeringVector.load(vectors[1])
    total.save(tmp_path / "sum.safetensors")
    assert steerlens("lens", tmp_path / "sum.safetensors", *common).returncode == 0
    refused = steerlens("layers", tmp_path / "sum.safetensors", *common)
    assert refused.returncode == 2
    assert "a vector must be that of one instruction" in refused.stderr


def test_a_new_folder_does_what_its_readme_says(steerlens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = steerlens("new", "mine")
    assert done.returncode == 0, done.stderr
    assert f"begin with {Path('mine', 'README.md')}" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}
    monkeypatch.chdir("mine")
    readme = Path("README.md").read_text(encoding="utf-8").splitlines()
    assert len(readme) == 10
    commands = [shlex.split(line) for line in readme if line.startswith("    steerlens")]
    said = [steerlens(*command[1:]) for command in commands]
    assert [one.returncode for one in said] == [0] * len(commands), [one.stderr for one in said]
    assert " el " in f" {said[1].stdout.splitlines()[1].lower()}"
    assert Path("seen", "lens.html").is_file()
    assert {line for line in readme if ".ipynb" in line} == {
        "Open `first_contact.ipynb` in Jupyter or VS Code and run all cells, or stay on the command line:"
    }
    notebook = nbformat.read("first_contact.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=300).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert {output.output_type for output in outputs} <= {"execute_result", "display_data"}
    rates = next(output.data["text/plain"] for output in outputs if "followed: none" in str(output.get("data")))
    assert "none 0%" in rates
    assert "random 0%" in rates
    assert "vector 0%" not in rates


def test_the_five_pairs_of_a_new_folder_are_checked_by_its_own_check(steerlens, tmp_path):
    steerlens("new", tmp_path / "mine")
    pairs = load_pairs(tmp_path / "mine" / "pairs.jsonl")
    assert len(pairs) == 5
    code = "import my_check, steerlens as sl; print(sl.check('El zorro es un animal.', 'my:spanish').strict)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "mine", capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.stdout == "True\n", done.stderr
    assert pairs.instructions == ("my:spanish",)


def test_a_new_folder_takes_nothing_that_is_there(steerlens, tmp_path, monkeypatch):
    kept = tmp_path / "kept" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    for place in (kept.parent, kept):
        done = steerlens("new", place)
        assert done.returncode == 2
        assert "a new folder must be absent or empty" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert [*kept.parent.iterdir()] == [kept]
    assert kept.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert steerlens("new", ".").returncode == 0
    assert len(list(Path().iterdir())) == 4


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_new_folder_that_fails_leaves_nothing(steerlens, tmp_path, monkeypatch, there, step):
    home, calls = (Path, [0]) if step == "write_bytes" else (os, [0 if there else 2])
    real = getattr(home, step)

    def full(*arguments):
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    if there:
        (tmp_path / "mine").mkdir()
    monkeypatch.setattr(home, step, full)
    done = steerlens("new", tmp_path / "mine")
    monkeypatch.undo()
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"] * there
