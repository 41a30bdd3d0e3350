"""What a reading or a study returns: a short text, a table that shows what it holds as it is, and a picture."""

from typing import Any

import pandas as pd
import pytest

from steerlens._results import Result
from steerlens.errors import SteerlensError
from steerlens.reading.attribution import Attribution
from steerlens.reading.diagnosis import diagnose
from steerlens.reading.effects import VectorEffects
from steerlens.reading.embedding import embed
from steerlens.reading.examples import recorded_layers
from steerlens.reading.lens import PromptLens
from steerlens.reading.lines import line
from steerlens.reading.patching import PatchingMap
from steerlens.reading.probes import separability
from steerlens.reading.similarity import cosines
from steerlens.reading.vocabulary import VocabularyLens
from steerlens.study.arms import LayerStudy
from steerlens.study.scores import Evaluation
from steerlens.study.sweeps import Sweep
from tests.figures import test_lens, test_patching, test_pictures, test_report
from tests.reading.points import planted
from tests.unchecked import unchecked

FRAME = pd.DataFrame()
RESULTS: dict[str, Any] = {
    "embedding": lambda: embed(planted(), layers=2, method="pca"),
    "cosines": lambda: cosines(planted(), layer=2),
    "diagnosis": lambda: diagnose(planted(), layers=2),
    "separability": lambda: separability(planted(), layers=2, folds=2),
    "line": lambda: line(planted(), range(len(planted())), layers=2),
    "vocabulary lens": lambda: VocabularyLens(test_lens.vocabulary(["<i>x</i>"], [2]), n_tokens=40),
    "prompt lens": lambda: PromptLens(*test_lens.lens()),
    "vector effects": lambda: VectorEffects(test_lens.effects(), per_prompt=FRAME),
    "patching map": lambda: PatchingMap(test_patching.patched("<i>x</i>"), cells=FRAME),
    "attribution": lambda: Attribution(test_patching.written("<i>x</i>"), layer=1),
}


@pytest.mark.parametrize("make", RESULTS.values(), ids=RESULTS)
def test_a_result_is_a_short_text_a_table_and_a_picture(make: Any) -> None:
    found = make()
    assert isinstance(found, Result)
    text = repr(found)
    assert text.startswith(f"{type(found).__name__}(")
    assert len(text) < 400
    page = found._repr_html_()
    assert page.count("<table") == 1
    assert "<i>" not in page
    assert len(found.plot().data) > 0


def test_the_parts_of_a_repr_of_several_lines_stay_apart_in_a_notebook() -> None:
    found = VocabularyLens(test_lens.vocabulary(["one", "two"], [2]), n_tokens=40)
    assert repr(found).count("\n") == 2
    assert '<p style="white-space: pre-line">VocabularyLens' in found._repr_html_()


def test_a_table_shows_spaces_and_what_is_missing() -> None:
    table = pd.DataFrame(
        {"token": [" a", "b", "\n"], "piece": pd.array([1, None, 2], dtype="Int64"), "logit": [0.5, float("nan"), 1]}
    )
    page = Result(table)._repr_html_()
    for cell in ("' a'", "b", "'\\n'", "\u2013", "0.500"):
        assert f"<td>{cell}</td>" in page
    assert page.count("\u2013") == 2
    assert "NA" not in page


def test_an_evaluation_draws_its_cells_and_a_sweep_its_layers() -> None:
    scores = test_report.fake_scores(3)
    fig = Evaluation(scores).plot()
    assert {bar.name for bar in fig.select_traces("bar")} == set(scores["condition"])
    assert fig.layout.annotations[-1].text == "<b>all instructions</b>"
    search = Sweep(scores, test_pictures.search_of("a:b", [1, 2]))
    assert "layer" in search.plot().layout.title.text


def test_what_are_no_activations_is_refused() -> None:
    with pytest.raises(
        SteerlensError, match="geometry needs activations, got dict; record them with record_activations"
    ):
        unchecked(recorded_layers)({}, None)


def test_vectors_without_names_are_refused() -> None:
    with pytest.raises(SteerlensError, match="cosines compares vectors by name, or activations, got list; give a dict"):
        unchecked(cosines)([], layer=4)


def test_every_kind_of_result_has_a_picture() -> None:
    assert {kind for kind in Result.__subclasses__() if kind.plot is Result.plot} == set()
    assert LayerStudy in Result.__subclasses__()
