"""What is seen of vectors is kept, found again, gone on with, and gone when anything that it depends on changes."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import DataError, SteerlensError
from steerlens.files import write_atomically
from steerlens.steering.settings import SamplingConfig
from steerlens.study.config import RunConfig
from steerlens.study.job import run
from steerlens.study.opened import look_at
from steerlens.study.pages import tables_in
from steerlens.study.seeing import GEOMETRY, LENS, Subject, read_table, see_geometry, see_layers, see_lens, table_text
from steerlens.vectors.activations import record_activations
from steerlens.vectors.estimators import fit_vectors
from tests.unchecked import unchecked

NO_COMMA, LOWERCASE = "punctuation:no_comma", "change_case:english_lowercase"
PAIRS = PairSet(
    InstructionPair(f"Say {i}.", text, name)
    for i in range(6)
    for text, name in (("Use no commas.", NO_COMMA), ("Use lowercase.", LOWERCASE))
)


@pytest.fixture
def subject(llama, tmp_path):
    train, held_out = PAIRS[:8], PAIRS[8:]
    prompts = tuple(dict.fromkeys(pair.text("none") for pair in held_out))
    vectors = fit_vectors(llama.model, train.by_instruction())
    return Subject(llama.model, vectors, tmp_path, train=train, held_out=held_out, prompts=prompts)


def test_tables_are_kept_and_found_again_without_the_model(subject, monkeypatch):
    first = [see_lens(subject), see_geometry(subject)]
    for name in ("logit_lens", "vector_effects", "record_activations"):
        monkeypatch.setattr(f"steerlens.study.seeing.{name}", None)
    again = [see_lens(subject), see_geometry(subject)]
    for one, other, names in zip(first, again, (LENS, GEOMETRY), strict=True):
        assert tuple(one) == tuple(other) == names
        for name in names:
            pd.testing.assert_frame_equal(one[name], other[name])
    found = tables_in(subject.folder)
    assert set(found) == {"lens", "geometry", "layers"}
    assert found["layers"] == {}


def test_what_was_cut_short_goes_on_with_the_tables_that_are_missing(subject, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("steerlens.study.seeing.vector_effects", interrupted)
        with pytest.raises(KeyboardInterrupt):
            see_lens(subject)
    assert sorted(path.name for path in (subject.folder / "lens").iterdir()) == ["config.json", "tokens.csv"]
    assert "lens" not in tables_in(subject.folder)
    monkeypatch.setattr("steerlens.study.seeing.logit_lens", None)
    assert list(see_lens(subject)) == list(LENS)


@pytest.mark.parametrize(
    "change",
    [
        lambda subject: {"vectors": {name: -vector for name, vector in subject.vectors.items()}},
        lambda subject: {"prompts": (*subject.prompts, "Another one.")},
        lambda subject: {"chosen": {NO_COMMA: 3}},
        lambda subject: {"seed": 1},
    ],
)
def test_other_vectors_prompts_or_settings_are_never_answered_with_old_tables(subject, change):
    before = see_lens(subject)
    changed = replace(subject, **change(subject))
    after = see_lens(changed)
    assert not before["effects"].equals(after["effects"])
    fresh = see_lens(replace(changed, folder=subject.folder / "fresh"))
    pd.testing.assert_frame_equal(after["effects"], fresh["effects"])
    pd.testing.assert_frame_equal(after["tokens"], fresh["tokens"])


def test_several_vectors_are_looked_at_where_they_are_used_and_one_at_every_layer(subject):
    several = replace(subject, chosen={NO_COMMA: 1})
    assert several.used_layers() == {NO_COMMA: 1, LOWERCASE: 2}
    seen = see_lens(several, n_prompts=1)
    places = {(row.vector, row.layer) for row in seen["effects"].itertuples()}
    assert (
        places
        == {(NO_COMMA, 1), (LOWERCASE, 2)}
        == {(row.vector, row.layer) for row in seen["tokens"].itertuples() if row.chosen}
    )
    assert set(seen["tokens"]["layer"]) == {0, 1, 2, 3}
    assert set(seen["effects"]["n"]) == {1}
    alone = see_lens(replace(several, vectors={NO_COMMA: subject.vectors[NO_COMMA]}))
    assert set(alone["effects"]["layer"]) == {0, 1, 2, 3}


def test_geometry_shows_the_layers_asked_for_and_the_one_that_is_used(subject):
    used = replace(subject, chosen={NO_COMMA: 1, LOWERCASE: 1})
    seen = see_geometry(used, n_pairs=3, n_layers=2)
    assert set(seen["points"]["layer"]) == {0, 1, 3}
    assert set(seen["points"]["method"]) == {"tsne", "pca"}
    assert len(seen["points"]) == 2 * 3 * 2 * 3
    assert seen["cosines"]["layer"].tolist() == [1]
    acts = record_activations(subject.model, PAIRS[:8], layers=[1]).by_instruction()
    assert set(acts) == set(seen["cosines"].loc[0, ["first", "second"]])


def test_a_study_of_layers_is_kept_with_its_responses(subject):
    small = replace(subject, sampling=replace(subject.sampling, max_new_tokens=4))
    table = see_layers(small, studies="transfer", layers=[1, 2], n_prompts=1, progress=False)["transfer"]
    assert table["condition"].value_counts().to_dict() == {"vector": 12, "random": 6, "none": 3, "text": 3}
    found = tables_in(subject.folder)["layers"]
    assert list(found) == ["transfer"]
    pd.testing.assert_frame_equal(found["transfer"], table, check_dtype=False)


def test_what_cannot_be_looked_at_is_said_in_a_sentence(subject):
    one = replace(subject, train=subject.train.filter(NO_COMMA))
    with pytest.raises(
        DataError, match=r"at least two instructions with two pairs each, got punctuation:no_comma \(4\)"
    ):
        see_geometry(one)
    with pytest.raises(DataError, match=r"two pairs each, got .* take a run of several, or several vectors"):
        see_geometry(subject, n_pairs=1)
    with pytest.raises(SteerlensError, match="n_layers must be at least 2, the first layer and the last, got 1"):
        see_geometry(subject, n_layers=1)
    with pytest.raises(DataError, match="a study needs prompts that the vectors were not fitted on, got none"):
        see_layers(replace(subject, held_out=PairSet([])))
    with pytest.raises(SteerlensError, match="studies must be among steering, necessity, transfer, got 'flying'"):
        unchecked(see_layers)(subject, studies="flying")


TOKENS = [
    "nan",
    "NA",
    "null",
    "1",
    "1.50",
    "",
    " ",
    "\n",
    "\r",
    "\r\n",
    "\t",
    '"',
    ",",
    "\\",
    "\x00",
    "a\x00b",
    "\u2028",
    "é",
]


def test_tokens_are_read_as_they_were_written(tmp_path):
    table = pd.DataFrame({"token": TOKENS, "logit": [1 / 3] * len(TOKENS), "piece": float("nan"), "chosen": True})
    path = tmp_path / "tokens.csv"
    write_atomically(path, table_text(table))
    pd.testing.assert_frame_equal(read_table(path), table)


def test_a_run_whose_vectors_cannot_be_compared_says_so_and_loses_nothing(tiny_folders, tmp_path):
    PAIRS.filter(NO_COMMA).save(tmp_path / "pairs.jsonl")
    sizes = {"n_train": 3, "n_valid": 1, "n_test": 1, "layers": (1,), "search_tokens": 4, "sampling": SamplingConfig(4)}
    config = RunConfig(model=str(tiny_folders["llama"]), pairs=str(tmp_path / "pairs.jsonl"), **sizes)
    done = run(config, tmp_path / "run", progress=False)
    assert done.facts["not shown"].startswith("geometry compares at least two instructions")
    text = done.report.read_text(encoding="utf-8")
    assert "geometry compares at least two instructions" in text
    assert [name in text for name in ("What the vectors say", "How they lie")] == [True, False]


def test_a_changed_run_removes_what_was_seen_before_it_can_be_cut_short(tiny_folders, tmp_path, monkeypatch):
    PAIRS.save(tmp_path / "pairs.jsonl")
    sizes = {"n_train": 3, "n_valid": 1, "n_test": 1, "layers": (1,), "search_tokens": 4, "sampling": SamplingConfig(4)}
    config = RunConfig(model=str(tiny_folders["llama"]), pairs=str(tmp_path / "pairs.jsonl"), **sizes)
    folder = run(config, tmp_path / "run", progress=False).folder
    assert set(tables_in(folder)) >= {"lens", "geometry"}
    assert set(json.loads((folder / "config.json").read_text())["made_of"]) == {"weights", "train", "valid"}

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("steerlens.study.job.sweep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(replace(config, seed=1), folder, progress=False)
    assert tables_in(folder) == {"layers": {}}
    assert not [name for name in ("facts.json", "report.html") if (folder / name).exists()]


def test_what_is_seen_of_saved_vectors_needs_a_folder_to_be_kept_in(tmp_path):
    (tmp_path / "v.safetensors").touch()
    with pytest.raises(SteerlensError, match="must be kept in a folder, got none; give --out"):
        look_at([tmp_path / "v.safetensors"])
