"""The lean pass gives what the hook points give, sees every edit of the model, and steps aside where it would not."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

import steerlens as sl
from steerlens.errors import ModelError, SteerlensError
from steerlens.models import choice, lean, static
from steerlens.models.backends import ROOMY, SPARE, BridgeCache
from steerlens.models.choice import BackendName, backend_used, use_backend
from steerlens.models.facts import attn_scores, resid_post
from steerlens.models.load import load_model
from steerlens.models.passes import Read, Runner, run_pass
from steerlens.models.rows import pad
from steerlens.steering.sampling import stream_tokens
from tests.conftest import Subject, hooks_on
from tests.steps import as_plan, step
from tests.unchecked import unchecked
from tests.zoo import save_animal

IDS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
PROMPTS = ["a", "Tell me about tea.", "Name a river in the north.", "Why?"]
SITES = [resid_post(0), resid_post(2), attn_scores(1)]


@pytest.fixture
def fresh(tiny: Subject) -> Any:
    """A model of its own, to be changed."""
    return load_model(tiny.folder, progress=False)


def read(model: Any) -> list[Tensor]:
    """Logits and residuals of one pass, padded on the left."""
    result = run_pass(model, pad(IDS, pad_id=2), reads=[Read(resid_post(layer)) for layer in range(3)])
    return [result.logits, *result.reads.values()]


def assert_both_ways_agree(model: Any, expected: str) -> None:
    """The pass as it is chosen is the hook points' own; `expected` starts what is said of the choice."""
    assert backend_used(model).startswith(expected)
    found = read(model)
    use_backend(model, "hooks")
    for one, other in zip(found, read(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    use_backend(model, "auto")


PLANS = {
    "nothing": sl.Plan(),
    "add": as_plan([step("add", "all", layer=1)]),
    "generated": as_plan([step("add", "generated", layer=0)]),
    "several layers": as_plan([step("set_projection", "all", layer=0), step("ablate", "last", layer=2)]),
    "pasta": sl.pasta(0.05, on="a"),
    "spotlight": sl.spotlight(0.6, on="a"),
    "both": as_plan([step("add", "all", layer=1)]) + sl.instaboost(2.0, on="a"),
    "first three": sl.spotlight(0.9, on="a", positions=sl.Window(0, 3, "generation")),
    "from the third": sl.instaboost(5.0, on="a", positions=sl.Window(2, None, "generation")),
    "gate": sl.plausible(as_plan([step("add", "all", layer=1)]), beta=0.3),
}


@pytest.mark.parametrize("backend", ["lean", "graphs"])
@pytest.mark.parametrize("name", PLANS)
def test_texts_are_those_of_the_hook_points(tiny: Subject, name: str, backend: BackendName) -> None:
    model = tiny.model
    prompts = [prompt for prompt in PROMPTS if "a" in prompt]
    use_backend(model, backend)
    found = sl.generate(model, prompts, steering=PLANS[name], max_new_tokens=40)
    use_backend(model, "hooks")
    try:
        expected = sl.generate(model, prompts, steering=PLANS[name], max_new_tokens=40)
    finally:
        use_backend(model, "auto")
    assert [row.tokens for row in found] == [row.tokens for row in expected]


def test_nothing_is_held_twice(fresh: Any) -> None:
    read(fresh)
    tree = choice._known(fresh).tree
    assert tree is not None
    for kind in (nn.Module.parameters, nn.Module.buffers):
        assert {id(one) for one in kind(tree.root)} <= {id(one) for one in kind(fresh.original_model)}


def test_a_model_is_let_go_and_a_copy_finds_out_for_itself(fresh: Any) -> None:
    read(fresh)
    sl.generate(fresh, PROMPTS[:1], max_new_tokens=2)
    twin = copy.deepcopy(fresh)
    assert twin.__dict__[choice.KNOWN] is None
    with torch.no_grad():
        twin.blocks[1].mlp.out.weight.mul_(-1.5)
    assert_both_ways_agree(twin, "lean")
    assert not torch.allclose(read(twin)[0], read(fresh)[0], atol=1e-2)
    held = weakref.ref(twin)
    del twin
    gc.collect()
    assert held() is None


# --- edits of the model are seen ------------------------------------------------------------------------------------------


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.blocks[1].mlp.out.weight.mul_(-1.5)


def through_data(model: Any) -> None:
    model.blocks[1].mlp.out.weight.data.mul_(-1.5)


def queries(model: Any) -> None:
    model.blocks[0].attn.q.weight.data.mul_(3.0)


def another_parameter(model: Any) -> None:
    out = model.blocks[1].mlp.out.original_component
    out.weight = nn.Parameter(-1.5 * out.weight.detach())


def another_query_parameter(model: Any) -> None:
    q = model.blocks[0].attn.q.original_component
    q.weight = nn.Parameter(3.0 * q.weight.detach())


def another_module(model: Any) -> None:
    out = model.blocks[1].mlp.out.original_component
    model.blocks[1].mlp.out._modules["_original_component"] = nn.Sequential(out, nn.Tanh())


def another_setting(model: Any) -> None:
    model.blocks[1].ln1.original_component.eps = 10.0
    model.blocks[1].ln1.original_component.variance_epsilon = 10.0


EDITS = [in_place, through_data, queries, another_parameter, another_query_parameter, another_module, another_setting]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_the_model_is_seen_at_once(fresh: Any, edit: Callable[[Any], None]) -> None:
    before = read(fresh)
    edit(fresh)
    after = read(fresh)
    use_backend(fresh, "hooks")
    expected = read(fresh)
    for one, other in zip(after, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    # A setting that the bridge reads elsewhere changes nothing for either.
    assert edit is another_setting or not torch.allclose(before[0], expected[0], atol=1e-2)


@pytest.mark.parametrize("name", ["pythia", "gpt2"])
def test_split_weights_are_watched(tmp_path: Path, name: str) -> None:
    model = load_model(save_animal(name, tmp_path / name), progress=False)
    assert_both_ways_agree(model, "lean")
    model.blocks[0].attn.q.weight.data.mul_(3.0)
    # Where the wrapper holds a copy, the plain modules do not see this: they must step aside.
    assert_both_ways_agree(model, "hooks" if name == "pythia" else "lean")
    model.blocks[0].attn.q.weight.data.div_(3.0)
    assert_both_ways_agree(model, "lean")


# --- where it steps aside -------------------------------------------------------------------------------------------------


def test_hooks_of_the_callers_fire(fresh: Any) -> None:
    site = resid_post(1)
    assert backend_used(fresh) == "lean"
    plain = read(fresh)
    with fresh.hooks(fwd_hooks=[(site, lambda value, hook: 2 * value)]):
        assert_both_ways_agree(fresh, "hooks (it has hooks of the caller's")
        assert not torch.allclose(read(fresh)[0], plain[0], atol=1e-3)
    handle = fresh.blocks[1].original_component.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
    assert_both_ways_agree(fresh, "hooks (it has hooks of the caller's")
    handle.remove()
    assert backend_used(fresh) == "lean"
    torch.testing.assert_close(read(fresh), plain)


def test_a_module_with_a_forward_of_its_own_is_not_copied(fresh: Any) -> None:
    block = fresh.blocks[1].original_component
    real = block.forward
    block.forward = lambda *args, **options: real(*args, **options)
    assert_both_ways_agree(fresh, "hooks (a ")


def test_processed_weights_are_run_through_hook_points(fresh: Any) -> None:
    assert backend_used(fresh) == "lean"
    fresh.enable_compatibility_mode(disable_warnings=True)
    assert backend_used(fresh) == "hooks (TransformerLens has processed its weights)"


def test_other_sites_are_seen_at_hook_points(fresh: Any) -> None:
    assert backend_used(fresh, SITES) == "lean"
    assert backend_used(fresh, [*SITES, "blocks.1.hook_mlp_out"]) == "hooks (blocks.1.hook_mlp_out is seen there alone)"
    found = run_pass(fresh, pad(IDS, pad_id=2), reads=[Read("blocks.1.hook_mlp_out")])
    assert len(found.reads["blocks.1.hook_mlp_out"]) == 3


def test_attention_that_computes_something_else_is_found_out(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface

    def scaled(module: nn.Module, query: Tensor, *args: Any, **options: Any) -> Any:
        return lean.open_attention(module, 1.1 * query, *args, **options)

    AttentionInterface.register(lean.OPEN, scaled)
    try:
        assert backend_used(fresh) == "lean"
        said = backend_used(fresh, [attn_scores(0)])
        assert said.startswith("hooks (its plain modules compute another ")
    finally:
        AttentionInterface.register(lean.OPEN, lean.open_attention)


def test_attention_is_closed_in_passes_that_do_not_edit_it(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    function = lean.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def counted(*args: Any, **kwargs: Any) -> Any:
        closed.append(args[0].layer_idx)
        return function(*args, **kwargs)

    monkeypatch.setitem(lean.ALL_ATTENTION_FUNCTIONS, "sdpa", counted)
    rows, sites = pad(IDS, pad_id=2), [attn_scores(1), attn_scores(3)]
    with Runner(tiny.model, sites) as runner:
        closed.clear()  # the model may have been tried
        alone = runner.run(rows)
        assert closed == [0, 1, 2, 3]
        closed.clear()
        read = runner.run(rows, reads=[Read(attn_scores(3), "all")])
        assert closed == [0, 1, 2]
    torch.testing.assert_close(alone.logits, read.logits)


def test_what_may_be_asked_for(fresh: Any) -> None:
    use_backend(fresh, "hooks")
    assert backend_used(fresh) == "hooks (as asked)"
    use_backend(fresh, "lean")
    assert backend_used(fresh) == "lean"
    with pytest.raises(SteerlensError, match='backend must be "auto", "hooks", "lean" or "graphs", got \'fast\''):
        unchecked(use_backend)(fresh, "fast")
    fresh.blocks[0].hook_in.add_hook(lambda value, hook: value)
    use_backend(fresh, "auto")
    with pytest.raises(ModelError, match=r"cannot \(it has hooks of the caller's"):
        use_backend(fresh, "lean")
    assert backend_used(fresh).startswith("hooks (it has")


# --- windows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gemma2"])
def test_windows_are_kept_beyond_their_width(tmp_path: Path, name: str) -> None:
    model = load_model(save_animal(name, tmp_path / name), progress=False)
    assert backend_used(model, [resid_post(0), attn_scores(0)]) == "lean"
    prompts = ["Tell me about tea and coffee, please, and then about the sea and the north wind.", "Why?"]
    found = sl.generate(model, prompts, max_new_tokens=16)
    use_backend(model, "hooks")
    assert [row.tokens for row in found] == [row.tokens for row in sl.generate(model, prompts, max_new_tokens=16)]


# --- the cache ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is made for however few columns."""
    monkeypatch.setattr("steerlens.models.backends.ROOMY", 0)


def caches(n_rows: int = 3) -> tuple[BridgeCache, DynamicCache]:
    """The same columns in a cache with room, and in one without."""
    cache, plain = DynamicCache(), DynamicCache()
    for layer in range(2):
        start = torch.randn(n_rows, 2, 5, 4)
        for one in (cache, plain):
            one.update(start.clone(), 2 * start, layer)
    return BridgeCache(cache).with_room(), plain


def append(cache: Any, n_columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in range(2):
        new = torch.randn(len(cache.layers[layer].keys), 2, n_columns, 4, generator=generator)
        cache.update(new, 3 * new, layer)


def assert_same(cache: BridgeCache, plain: DynamicCache) -> None:
    for one, other in zip(cache.cache.layers, plain.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("roomy_from", [0, 40, 1000])
def test_a_cache_with_room_holds_what_one_without_holds(roomy_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerlens.models.backends.ROOMY", roomy_from)
    cache, plain = caches()
    for turn in range(3 * SPARE):
        append(cache.cache, 1 + turn % 3, turn)
        append(plain, 1 + turn % 3, turn)
        assert_same(cache, plain)
        if turn == SPARE:
            cache = cache.select(torch.tensor([2, 0]))
            plain.batch_select_indices(torch.tensor([2, 0]))


def test_few_columns_lie_side_by_side() -> None:
    cache, _ = caches()
    for turn in range(ROOMY - 5):
        append(cache.cache, 1, turn)
    (layer, _) = cache.cache.layers
    assert layer.keys.shape[-2] == ROOMY
    assert layer.keys.is_contiguous()
    append(cache.cache, 1, 0)
    assert not layer.keys.is_contiguous()


@pytest.mark.usefixtures("roomy")
def test_room_is_made_once_in_so_many_columns() -> None:
    cache, _ = caches()
    held = set()
    for turn in range(2 * SPARE + 1):
        append(cache.cache, 1, turn)
        held.add(cache.cache.layers[0].room[0].data_ptr())
    assert len(held) == 2  # with 5 + 1 + SPARE columns, and with twice as many to spare


def test_rows_are_taken_in_beside_those_that_are_held_and_leave_again() -> None:
    cache, plain = caches()
    append(cache.cache, 1, 0)
    append(plain, 1, 0)
    for turn, more in enumerate(([2, 2, 0], [1], [0, 1, 1, 1, 2])):  # fewer than before, and more
        cache = cache.extended(more)
        held = copy.deepcopy(plain)
        held.batch_select_indices(torch.tensor([0, 1, 2, *more]))
        assert_same(cache, held)
        append(cache.cache, 1, turn)
        append(held, 1, turn)
        assert_same(cache, held)
        cache, plain = cache.first(3), held
        plain.batch_select_indices(torch.tensor([0, 1, 2]))
        assert_same(cache, plain)


@pytest.mark.usefixtures("roomy")
def test_what_goes_on_in_two_ways_shares_no_column() -> None:
    cache, plain = caches()
    append(cache.cache, 1, 0)
    append(plain, 1, 0)
    other = cache.fork()
    assert not any("room" in layer.__dict__ for layer in other.cache.layers)
    append(other.cache, 2, 1)
    append(cache.cache, 2, 2)
    append(plain, 2, 2)
    assert_same(cache, plain)


def test_hooks_are_gone_after_every_exit(tiny: Subject) -> None:
    class Failing:
        digest = ""

        def __init__(self, site: str) -> None:
            self.site = site

        def __call__(self, activation: Tensor, rows: Any, /) -> Tensor:
            raise KeyboardInterrupt

        def select(self, keep: Tensor) -> "Failing":
            return self

    for site in SITES:
        with pytest.raises(KeyboardInterrupt):
            run_pass(tiny.model, pad(IDS, pad_id=2), edits=[Failing(site)])
        assert hooks_on(tiny.model) == []
    assert backend_used(tiny.model, SITES) == "lean"


@pytest.fixture(autouse=True)
def _as_before(tiny: Subject) -> Iterator[None]:
    yield
    use_backend(tiny.model, "auto")


# --- fixed tensors --------------------------------------------------------------------------------------------------------


def test_steps_over_fixed_tensors_begin_anew_only_where_they_must(
    tiny: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = static.StaticSteps.__init__

    def counted(self: Any, backend: Any, rows: Any, *args: Any) -> None:
        made.append(len(rows.tokens))
        real(self, backend, rows, *args)

    def never(model: Any) -> tuple[int, ...]:
        return ()

    monkeypatch.setattr(static.StaticSteps, "__init__", counted)
    monkeypatch.setattr("steerlens.steering.sampling.stop_ids", never)
    settings: dict[str, Any] = {"steering": PLANS["several layers"], "max_new_tokens": 21}
    expected = sl.generate(tiny.model, PROMPTS, **settings)
    assert made == []
    use_backend(tiny.model, "graphs")
    assert sl.generate(tiny.model, PROMPTS, **settings).texts == expected.texts
    assert made == [4]
    monkeypatch.setattr(static, "ROOM", 8)
    made.clear()
    assert sl.generate(tiny.model, PROMPTS, **settings).texts == expected.texts
    assert made == [4, 4, 4]  # 20 steps after the prompts, in 8 columns each


def test_no_step_is_recorded_while_tokens_are_handed_out(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(tiny.model, "graphs")
    monkeypatch.setattr(static.StaticSteps, "__init__", lambda *args: pytest.fail("a step was made"))
    assert len(list(stream_tokens(tiny.model, PROMPTS[:1], max_new_tokens=4))) == 5


@pytest.mark.parametrize("plan", ["nothing", "add"])
def test_places_are_filled_again_beside_steps_over_fixed_tensors(tiny: Subject, plan: str) -> None:
    """Rows of one length leave at once; with a text that stops them they leave one by one, and others take their places."""
    prompts = [f"{word} {'x' * n}" for n, word in enumerate(["a", "tea", "sea", "north", "river", "why", "hm"] * 3)]
    settings: dict[str, Any] = {"steering": PLANS[plan], "max_new_tokens": 30, "batch_size": 8, "stop": ["a", "e"]}
    expected = sl.generate(tiny.model, prompts, **settings)
    assert len({len(row.tokens) for row in expected}) > 3
    use_backend(tiny.model, "graphs")
    assert sl.generate(tiny.model, prompts, **settings) == expected
