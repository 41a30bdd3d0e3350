"""Methods as they are written: the same plans as the functions give, or one sentence why not."""

from inspect import signature
from pathlib import Path

import pytest

import steerlens as sl
from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import SteerlensError
from steerlens.steering.plan import Plan
from steerlens.study.written import METHODS, around_of, by_strength, method, written_methods


@pytest.mark.parametrize(
    ("written", "plan"),
    [
        ("pasta", lambda: sl.pasta()),
        ("pasta:alpha=0.1", lambda: sl.pasta(0.1)),
        (" pasta : alpha = 1e-3 , heads = 2 - 4 ", lambda: sl.pasta(0.001, heads=[2, 3, 4])),
        ("pasta:heads=0,3-4,7,alpha=0.1", lambda: sl.pasta(0.1, heads=[0, 3, 4, 7])),
        ("pasta:scale=include,spans=reference,alpha=9", lambda: sl.pasta(9, scale="include", spans="reference")),
        ("pasta:exempt=first", lambda: sl.pasta(exempt="first")),
        (
            "pasta:exempt=first,template,positions=prompt",
            lambda: sl.pasta(exempt=("first", "template"), positions="prompt"),
        ),
        ("instaboost:bias=-2", lambda: sl.instaboost(-2)),
        ("instaboost:positions=generation[-2:3]", lambda: sl.instaboost(positions=sl.Window(-2, 3, "generation"))),
        ("spotlight:target=0.3,granularity=head", lambda: sl.spotlight(0.3, granularity="head")),
        ("directer:alpha=10,beta=0.2,fewest=2", lambda: sl.directer(10, beta=0.2, fewest=2)),
        (
            "directer:ranking=reference_code,extra_tokens=1",
            lambda: sl.directer(ranking="reference_code", extra_tokens=1),
        ),
        ("spotlight:target=0.3,gate=0.5", lambda: sl.plausible(sl.spotlight(0.3), beta=0.5)),
        (
            "instaboost:criterion=js,limit=0.2,weaken=coeff,halvings=2",
            lambda: sl.plausible(sl.instaboost(), criterion="js", limit=0.2, weaken="coeff", halvings=2),
        ),
    ],
)
def test_a_written_method_is_the_plan_of_its_function(written, plan):
    assert method(written) == plan()
    assert method(written).digest == plan().digest


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_of_every_function_may_be_written(name):
    for one, parameter in signature(METHODS[name]).parameters.items():
        if one == "on":
            continue
        value = {"heads": "0-7", "exempt": "first"}.get(one, str(parameter.default))
        assert method(f"{name}:{one}={value}").interventions or method(name).gate
        if one not in ("heads", "exempt"):
            assert method(f"{name}:{one}={value}") == method(name)


def test_all_methods_are_listed_with_defaults_that_may_be_written():
    assert [written.partition(":")[0] for written in written_methods()] == [*METHODS]
    for written, sentence in written_methods().items():
        assert str(method(written)) == str(method(written.partition(":")[0]))
        assert sentence.endswith(".")


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("", "a method must be one of steerlens', got ''; known: pasta, instaboost, spotlight, directer"),
        ("psta:alpha=1", "got 'psta:alpha=1'; did you mean 'pasta'"),
        ("pasta,alpha=1", "did you mean 'pasta'"),
        ("pasta:alhpa=1", "pasta has no parameter 'alhpa'; did you mean 'alpha'"),
        ("pasta:on=Use capitals.", "pasta has no parameter 'on'"),
        ("directer:gate=0.5", "directer has no parameter 'gate'"),
        ("pasta:0.01", "written by name, NAME:PARAMETER=VALUE,..., got 'pasta:0.01'; write pasta:alpha=0.01"),
        ("pasta:alpha=", "got 'pasta:alpha='; write pasta:alpha=..."),
        ("pasta:alpha=1,alpha=2", "a parameter is written once, got 'alpha' twice"),
        ("pasta:alpha=much", "alpha of pasta must be a number, got 'much'"),
        ("pasta:alpha=nan", "alpha must be a finite number, got nan"),
        ("pasta:alpha=0", "alpha must be above 0, got 0"),
        ("spotlight:target=1", "a target is a share of attention in [0, 1), got 1"),
        ("pasta:heads=5-2", "heads of pasta must be layers, such as 2-5 or 2,3, or the file of a profile, got '5-2'"),
        ("pasta:heads=profile.json", "heads of pasta must be layers"),
        ("pasta:exempt=frist", "exempt of pasta must be one of its choices, got 'frist'; did you mean 'first'"),
        ("pasta:scale=inclde", "did you mean 'include'"),
        ("pasta:positions=first", "positions must be a rule's name or a Window, got 'first'"),
        ("spotlight:gate=-1", "beta must be at least 0, got -1"),
        ("directer:fewest=1.5", "fewest must be a whole number, got 1.5"),
    ],
)
def test_what_is_no_method_is_refused_in_a_sentence(written, sentence):
    with pytest.raises(SteerlensError) as error:
        method(written)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_heads_may_be_the_file_of_a_profile(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = PairSet(InstructionPair(f"Say {n}.", "Use no commas.", "punctuation:no_comma") for n in range(2))
    profile = sl.study.profile_heads(llama.model, pairs, layers=[1, 2], k=3, max_new_tokens=2, out="profile")
    profile.save("best.json")
    plan = sl.pasta(0.1, heads=profile.heads())
    assert sum(len(heads) for heads in profile.heads().values()) == 3
    assert method("pasta:alpha=0.1,heads=best.json") == method("pasta:heads=profile,alpha=0.1") == plan
    Path("other.json").write_text("{}")
    with pytest.raises(
        SteerlensError, match=r"a profile of heads must be a file that save\(\) wrote, got 'other.json'"
    ):
        method("pasta:heads=other.json")


def test_a_search_takes_the_first_parameter_and_keeps_the_others():
    assert by_strength("spotlight:granularity=head,gate=0.5")(0.4) == method(
        "spotlight:target=0.4,granularity=head,gate=0.5"
    )
    with pytest.raises(SteerlensError, match="a search tries values of target, spotlight's first parameter"):
        by_strength("spotlight:target=0.3")


def test_a_gate_goes_around_everything_that_steers_and_around_nothing_else():
    plan = sl.pasta(0.1)
    assert around_of(None)(plan) is plan
    assert around_of(0.5)(plan) == sl.plausible(plan, beta=0.5)
    assert around_of(0.5)(Plan()) == Plan()
    with pytest.raises(
        SteerlensError, match=r"a plan has one gate, got plausible 0\.5 around attention that has its own"
    ):
        around_of(0.5, sl.directer())
    with pytest.raises(SteerlensError, match="beta must be at least 0, got -1"):
        around_of(-1)
