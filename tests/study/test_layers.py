"""Studies of layers: what a planted world must answer, what equals what, and what is refused."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import DataError, ModelError, SteerlensError
from steerlens.models.load import load_model
from steerlens.models.passes import Read, run_pass
from steerlens.models.prompts import encode_all
from steerlens.models.rows import pad
from steerlens.steering.interventions import Intervention
from steerlens.steering.plan import Plan
from steerlens.steering.residual import residual_edits
from steerlens.steering.sampling import generate
from steerlens.study.arms import N_DRAWS
from steerlens.study.layers import (
    ablation,
    necessity,
    steer_by_layer,
    steered_layers,
    transfer_between_layers,
    windows_of,
)
from steerlens.study.responses import Sampler
from steerlens.study.sweeps import sweep
from steerlens.vectors.activations import record_activations
from steerlens.vectors.estimators import fit_steering_vector
from steerlens.vectors.vector import SteeringVector
from tests.conftest import LOADED
from tests.planted import planted_pairs, save_planted
from tests.unchecked import unchecked

NO_COMMA, CAPITAL = "punctuation:no_comma", "change_case:english_capital"


# --- the planted world ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The planted model, and the vector of its "!": layer 1 holds DIRECTION, layers 2 and 3 DIRECTION and ANSWER."""
    model = load_model(save_planted(tmp_path_factory.mktemp("planted")))
    LOADED.append(model)
    return model, fit_steering_vector(record_activations(model, planted_pairs()))


def rates(study, *columns):
    """The rates of one column of conditions, by what the other columns say."""
    table = study.table.dropna(subset=[columns[0]])
    keys = [tuple(None if pd.isna(value) else value for value in row) for row in table[[*columns]].to_numpy()]
    return dict(zip([key if len(key) > 1 else key[0] for key in keys], table["rate"], strict=True))


def test_the_planted_vector_steers_at_each_layer_that_has_it_and_words_do_so_too(planted):
    model, vector = planted
    found = steer_by_layer(model, vector, planted_pairs(), max_new_tokens=3)
    references = found.table[found.table["mode"].isna()].set_index("condition")["rate"]
    assert references.to_dict() == {"none": 0.0, "text": 1.0}
    steered = rates(found, "mode", "layer", "condition")
    for mode in ("alone", "from", "without"):
        # Nothing differs at layer 0, so there is no direction to steer with.
        assert {layer: steered.get((mode, layer, "vector")) for layer in range(4)} == {0: None, 1: 1, 2: 1, 3: 1}


def test_a_direction_that_nothing_reads_steers_nothing_and_is_not_necessary(planted):
    model, vector = planted
    idle = SteeringVector(
        dict.fromkeys(vector.layers, torch.eye(32)[5]),
        proj_with=dict.fromkeys(vector.layers, 4.0),
        proj_without=dict.fromkeys(vector.layers, 0.0),
    )
    steered = steer_by_layer(model, idle, planted_pairs(), max_new_tokens=3).scores
    unsteered = set(steered.loc[steered["condition"] == "none", "response"])
    assert unsteered == set(steered.loc[steered["condition"] == "vector", "response"]) == {"CCC"}
    ablated = necessity(model, idle, planted_pairs(), max_new_tokens=3).table
    assert (ablated.loc[ablated["condition"] == "text+vector", "loss"] == 0).all()


@pytest.mark.parametrize("to", ["mean", "zero"])  # without "!" no token has any of it, so both are zero here
def test_each_layers_own_direction_is_necessary_from_the_layer_on_that_writes_it_and_a_random_one_is_not(planted, to):
    model, vector = planted
    found = necessity(model, vector, planted_pairs(), to=to, max_new_tokens=3)
    table = found.table.dropna(subset=["window"])
    places = [("1", 1), ("1", 2), ("1", 3), ("3", 2), ("all", None)]
    ablated = rates(found, "window", "layer", "condition")
    assert [ablated[(*place, "text+vector")] for place in places] == [0.0] * 5
    assert [ablated[(*place, "random ablated")] for place in places] == [1.0] * 5
    # As large a push may turn CONST round in so small a space, which closes the gate of the MLP; most do not.
    assert min(ablated[(*place, "random")] for place in places) > 0.5
    assert table["loss"].tolist() == pytest.approx((1 - table["rate"]).tolist())
    assert (table["loss_low"] > 0).tolist() == (table["condition"] == "text+vector").tolist()


def test_the_direction_that_the_head_writes_is_necessary_only_before_the_mlp_has_read_it(planted):
    """Ablated at layer 1, the MLP of layer 2 finds nothing; after that MLP, "A" stands on an axis of its own."""
    model, vector = planted
    options = {"to": "zero", "direction_of": 1, "max_new_tokens": 3}
    found = rates(necessity(model, vector, planted_pairs(), **options), "window", "layer", "condition")
    ablated = {place: found[(*place, "text+vector")] for place in [("1", 1), ("1", 2), ("1", 3), ("3", 2)]}
    assert ablated == {("1", 1): 0.0, ("1", 2): 1.0, ("1", 3): 1.0, ("3", 2): 0.0}
    assert found["all", None, "text+vector"] == 0.0


def test_a_direction_transfers_to_where_the_model_reads_it(planted):
    """Layer 1's direction says "B" after layer 2, where only the unembedding reads it; the others hold ANSWER and say "A"."""
    model, vector = planted
    found = transfer_between_layers(model, vector, planted_pairs(), max_new_tokens=3)
    moved = rates(found, "from_layer", "layer")
    assert moved == {
        **{(1, 1): 1.0, (1, 2): 0.0, (1, 3): 0.0},
        **{(source, layer): 1.0 for source in (2, 3) for layer in (1, 2, 3)},
    }
    late = found.scores[(found.scores["from_layer"] == 1) & (found.scores["layer"] > 1)]
    assert set(late["response"]) == {"BBB"}
    # In so small a space a random direction of that length may have enough of ANSWER; few have.
    controls = found.table[found.table["condition"] == "random"]
    assert controls["rate"].mean() < 0.5 < found.table.loc[found.table["condition"] == "vector", "rate"].mean()


# --- what equals what ----------------------------------------------------------------------------------------------


@pytest.fixture
def vector(llama):
    directions = 3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    layers = range(4)
    return SteeringVector(
        dict(enumerate(directions)),
        proj_with={layer: 5.0 + layer for layer in layers},
        proj_without={layer: 1.0 - layer for layer in layers},
        resid_norm=dict.fromkeys(layers, 5.0),
    )


@pytest.fixture
def pairs():
    queries = ("Describe rain.", "Why?")
    texts = (("Use no commas.", NO_COMMA), ("Use capitals.", CAPITAL))
    return PairSet(InstructionPair(query, *text) for query in queries for text in texts)


def part(study, **where):
    """The rows of the scores that have these values."""
    scores = study.scores
    for name, value in where.items():
        scores = scores[scores[name].isna() if value is None else scores[name] == value]
    assert len(scores)
    return scores


def alone(model, pairs, plan, condition):
    rows = generate(model, pairs.prompts(condition), steering=plan, max_new_tokens=6, batch_size=1)
    return [row.text for row in rows]


def test_every_steered_row_is_what_its_plan_gives_on_its_own(llama, vector, pairs):
    found = steer_by_layer(llama.model, vector, pairs, layers=[0, 2], max_new_tokens=6, batch_size=5)
    plans = {
        ("alone", 2): vector.at(2),
        ("from", 2): vector.at(2) + vector.at(3),
        ("without", 2): vector.at(0) + vector.at(1) + vector.at(3),
    }
    for (mode, layer), plan in plans.items():
        for name, group in pairs.by_instruction().items():
            rows = part(found, mode=mode, layer=layer, condition="vector", instruction=name)
            assert rows["response"].tolist() == alone(llama.model, group, plan, "none")
    for name, group in pairs.by_instruction().items():
        for condition in ("none", "text"):
            rows = part(found, condition=condition, instruction=name)
            assert rows["response"].tolist() == alone(llama.model, group, Plan(), condition)


def test_every_ablated_row_is_what_its_plan_gives_on_its_own(llama, vector, pairs):
    found = necessity(llama.model, vector, pairs, max_new_tokens=6, batch_size=5)
    steps = [vector.at(layer, target=1.0 - layer) for layer in range(4)]
    plans = {
        ("1", 3): steps[3],
        ("3", 1): steps[0] + steps[1] + steps[2],
        ("all", None): steps[0] + steps[1] + steps[2] + steps[3],
    }
    for (window, layer), plan in plans.items():
        for name, group in pairs.by_instruction().items():
            rows = part(found, window=window, layer=layer, condition="text+vector", instruction=name)
            assert rows["response"].tolist() == alone(llama.model, group, plan, "text")
    assert found.table.dropna(subset=["window"])["layer"].dropna().unique().tolist() == [0, 1, 2, 3]


def test_every_transferred_row_is_one_layers_direction_at_another_with_that_layers_length(llama, vector, pairs):
    found = transfer_between_layers(llama.model, vector, pairs, layers=[1, 3], coeff=2, max_new_tokens=6, batch_size=5)
    direction = vector[3] / vector[3].norm()
    plan = Plan((Intervention(1, direction, "add", coeff=2 * float(vector[1].norm())),))
    for name, group in pairs.by_instruction().items():
        rows = part(found, from_layer=3, layer=1, condition="vector", instruction=name)
        assert rows["response"].tolist() == alone(llama.model, group, plan, "none")
    own = steer_by_layer(
        llama.model,
        vector,
        pairs,
        modes="alone",
        layers=[3],
        operator="add",
        coeff=2 * float(vector[3].norm()),
        max_new_tokens=6,
    )
    for condition in ("vector", "random"):
        source = 3 if condition == "vector" else None
        on_diagonal = part(found, from_layer=source, layer=3, condition=condition)
        assert on_diagonal["response"].tolist() == part(own, mode="alone", condition=condition)["response"].tolist()


def test_a_layer_alone_is_a_candidate_of_a_sweep(llama, vector, pairs):
    found = steer_by_layer(llama.model, vector, pairs, modes=["alone"], max_new_tokens=6)
    searched = sweep(llama.model, vector, pairs, layers="all", max_new_tokens=6)
    columns = ["instruction", "layer", "n", "followed", "rate", "low", "high", "degenerate", "mean_words"]
    mine = found.table[(found.table["condition"] == "vector") & (found.table["instruction"] != "all")]
    theirs = searched.table.dropna(subset=["layer"])
    pd.testing.assert_frame_equal(mine[columns].reset_index(drop=True), theirs[columns].reset_index(drop=True))


def test_from_the_last_layer_on_is_the_last_layer_alone(llama, vector, pairs):
    found = steer_by_layer(llama.model, vector, pairs, modes=["alone", "from"], layers=[3], max_new_tokens=6)
    for condition in ("vector", "random"):
        one, other = (part(found, mode=mode, condition=condition)["response"].tolist() for mode in ("alone", "from"))
        assert one == other


@pytest.mark.parametrize("operator", ["add", "set_projection", "ablate"])
def test_a_coefficient_of_zero_is_no_steering(llama, vector, pairs, operator):
    sampler = Sampler(llama.model, max_new_tokens=6)
    found = steer_by_layer(sampler, vector, pairs, layers=[1], coeff=0, operator=operator)
    assert (
        len(sampler.records) == 2 * len(pairs) - len(pairs) // 2
    )  # the bare queries are the same for both instructions
    none = part(found, condition="none")["response"].tolist()
    for mode in ("alone", "from", "without"):
        for condition in ("vector", "random"):
            rows = part(found, mode=mode, condition=condition)
            assert rows["response"].tolist() == none


def test_an_ablated_direction_is_at_its_goal_at_every_token_of_each_ablated_layer(tiny, vector):
    rows = pad(encode_all(tiny.model, ["Describe rain.", "Why?"]))
    layers = [1, 2]
    reads = [Read(f"blocks.{layer}.hook_resid_post", "all") for layer in layers]
    tokens = rows.mask.bool()

    def projections(plan, directions):
        edits = residual_edits([plan] * 2, rows.prompt_lengths, d_model=32)
        found = run_pass(tiny.model, rows, edits=edits, reads=reads).reads
        return [found[read.site][tokens] @ u for read, u in zip(reads, directions, strict=True)]

    own = [vector.unit(layer) for layer in layers]
    for projection in projections(ablation(vector, layers, to="zero"), own):
        torch.testing.assert_close(projection, torch.zeros(len(projection)), atol=1e-4, rtol=0)
    for projection in projections(ablation(vector, layers, to="zero", direction_of=3), [vector.unit(3)] * 2):
        torch.testing.assert_close(projection, torch.zeros(len(projection)), atol=1e-4, rtol=0)
    for layer, projection in zip(layers, projections(ablation(vector, layers), own), strict=True):
        torch.testing.assert_close(projection, torch.full((len(projection),), 1.0 - layer), atol=1e-4, rtol=0)
    assert max(float(projection.abs().max()) for projection in projections(Plan(), own)) > 0.1


def test_controls_share_out_eight_random_directions_that_the_vectors_numbers_do_not_change(llama, vector):
    many = PairSet(InstructionPair(f"Say {number}.", "Use no commas.", NO_COMMA) for number in range(30))
    rounded = replace(vector, directions={layer: (1 + 1e-6) * vector[layer] for layer in vector})
    plans = [
        part(steer_by_layer(llama.model, one, many, modes="alone", layers=[1], max_new_tokens=1), condition="random")
        for one in (vector, rounded)
    ]
    assert 4 < plans[0]["key"].nunique() <= 30
    sampler = Sampler(llama.model, max_new_tokens=1)
    steer_by_layer(sampler, vector, many, modes="alone", layers=[1])
    written = {record["plan"][0]["write"] for record in sampler.records.values() if record["plan"]} - {None}
    assert 4 < len(written) <= N_DRAWS
    assert plans[0]["response"].tolist() == plans[1]["response"].tolist()


def test_modes_and_windows_name_their_layers():
    assert [steered_layers(mode, 2, [1, 2, 3]) for mode in ("alone", "from", "without")] == [[2], [2, 3], [1, 3]]
    assert windows_of(1, [2], [1, 2, 3]) == [(2, [2])]
    assert windows_of(2, [1, 2, 3], [1, 2, 3]) == [(1, [1, 2]), (2, [2, 3])]
    assert windows_of(3, [1, 2, 3], [1, 2, 3]) == [(2, [1, 2, 3])]
    assert windows_of("all", [2], [1, 3]) == [(None, [1, 3])]
    assert windows_of(3, [2, 5], [1, 2, 3, 5, 6]) == [(2, [1, 2, 3])]  # 4 is missing


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("study", "options", "message"),
    [
        (steer_by_layer, {"modes": "alon"}, r"a mode must be one of the study's, got 'alon'; did you mean 'alone'\?"),
        (steer_by_layer, {"modes": []}, "a mode must be one of the study's, got none"),
        (steer_by_layer, {"layers": [9]}, r"layer must be in \[0, 4\), got 9"),
        (steer_by_layer, {"layers": []}, "a study needs a layer to look at, got none"),
        (steer_by_layer, {"operator": "add"}, 'operator="add" needs coeff'),
        (steer_by_layer, {"trials": 0}, "trials must be at least 1, got 0"),
        (steer_by_layer, {"trials": 2}, "several trials need a temperature above 0"),
        (necessity, {"windows": [0]}, r'windows must be numbers of layers from 1 on, or "all", got \[0\]'),
        (necessity, {"windows": []}, r"windows must be numbers of layers from 1 on, or \"all\", got \[\]"),
        (necessity, {"windows": "some"}, "a window must be a whole number, got 'some'"),
        (necessity, {"windows": [5]}, r"a window of 5 layers must lie within those of the vector, \[0, 1, 2, 3\]"),
        (necessity, {"to": "none"}, 'to must be "mean" or "zero"'),
        (necessity, {"direction_of": 1}, "got 'mean' with direction_of 1; pass to=\"zero\""),
        (necessity, {"direction_of": 7, "to": "zero"}, r"layer must be one of the vector's \[0, 1, 2, 3\], got 7"),
        (transfer_between_layers, {"coeff": float("nan")}, "coeff must be a finite number, got nan"),
        (transfer_between_layers, {"layers": [1, 4]}, r"layer must be in \[0, 4\), got 4"),
    ],
)
def test_bad_studies_are_refused_before_anything_is_generated(
    llama, vector, pairs, monkeypatch, study, options, message
):
    monkeypatch.setattr("steerlens.study.responses.generate", None)
    with pytest.raises(SteerlensError, match=message) as caught:
        unchecked(study)(llama.model, vector, pairs, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("study", [steer_by_layer, necessity, transfer_between_layers])
def test_pairs_and_vectors_that_do_not_fit_are_refused(llama, vector, pairs, study):
    with pytest.raises(DataError, match="a study needs at least one prompt, got none"):
        study(llama.model, vector, PairSet([]))
    with pytest.raises(DataError, match="every instruction needs a vector, got none for 'punctuation:no_comma'"):
        study(llama.model, {"a:b": vector}, pairs)
    with pytest.raises(ModelError, match="must have this model's 4 layers, got 40"):
        study(llama.model, vector.with_metadata(n_layers="40"), pairs)
    partial = replace(vector, directions={2: vector[2]})
    with pytest.raises(SteerlensError, match=r"layer must be one of the vector's \[2\], got 1"):
        study(llama.model, partial, pairs, layers=[1])
    nothing = SteeringVector({1: torch.zeros(32)})
    with pytest.raises(SteerlensError, match="a study needs a layer whose direction is not zero, got none"):
        study(llama.model, nothing, pairs)
    unknown = PairSet([InstructionPair("Describe rain.", "Rhyme.", "poetry:rhyme")])
    with pytest.raises(SteerlensError, match="unknown instruction"):
        study(llama.model, vector, unknown, layers=[1], max_new_tokens=1)


def test_all_layers_but_the_only_one_and_a_mean_that_is_not_known_are_refused(llama, vector, pairs):
    partial = replace(vector, directions={2: vector[2]})
    with pytest.raises(SteerlensError, match=r'mode "without" .* this vector has only layer 2; fit it at more layers'):
        steer_by_layer(llama.model, partial, pairs)
    with pytest.raises(SteerlensError, match='to="mean" needs the mean projection without the instruction at layer 0'):
        necessity(llama.model, vector + vector, pairs)
