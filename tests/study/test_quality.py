"""Quality of responses: perplexity under any model, divergence from the unsteered model, reward."""

import math

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from steerlens.data.pairs import InstructionPair, PairSet
from steerlens.errors import ModelError
from steerlens.models.prompts import PromptFormat, encode
from steerlens.steering.interventions import Intervention
from steerlens.steering.plan import Plan
from steerlens.steering.sampling import generate
from steerlens.study.quality import Quality, Response, kl_from_unsteered, measure, rewards, text_perplexities
from steerlens.study.scores import evaluate
from tests.steps import unit
from tests.tiny_models import byte_tokenizer, special_ids


def plan(coeff: float = 6.0, positions: str = "all", layer: int = 1) -> Plan:
    return Plan((Intervention(layer, unit(3), "add", coeff=coeff, positions=positions),))


@pytest.fixture
def pairs():
    return PairSet(
        InstructionPair(query, "Use capitals.", "change_case:english_capital") for query in ("Why?", "Go on.")
    )


def test_a_texts_perplexity_is_that_of_its_tokens_after_the_first(tiny):
    texts = ["Rain falls.", "ab", "a", ""]
    found = text_perplexities(tiny.model, texts, batch_size=2)
    for text, value in zip(texts, found, strict=True):
        ids = encode(tiny.model, text, PromptFormat(style="plain")) if text else []
        if len(ids) < 2:
            assert math.isnan(value)
            continue
        with torch.inference_mode():
            loss = tiny.hf(torch.tensor([ids]), labels=torch.tensor([ids])).loss
        assert value == pytest.approx(float(loss.exp()), rel=1e-4)


def test_a_long_text_is_scored_on_its_last_tokens(llama):
    n_ctx = llama.model.cfg.n_ctx
    text = "".join(chr(97 + i * i % 26) for i in range(2 * n_ctx))
    ids = encode(llama.model, text, PromptFormat(style="plain"))[-n_ctx:]
    with torch.inference_mode():
        loss = llama.hf(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert text_perplexities(llama.model, [text])[0] == pytest.approx(float(loss.exp()), rel=1e-4)


@pytest.mark.parametrize("positions", ["all", "last", "generated"])
def test_the_divergence_is_the_mean_kl_of_the_plain_loop(llama, positions):
    """The oracle re-runs the steered model on every prefix with one hook, and compares with the raw model."""
    step = plan(positions=positions)
    (row,) = generate(llama.model, ["Tell me."], steering=step, max_new_tokens=6)
    prompt, new = list(row.prompt_tokens), list(row.tokens)
    low, high = step.interventions[0].positions.bounds(len(prompt))
    values = []
    for count in range(len(new)):
        ids = torch.tensor([prompt + new[:count]])
        change = torch.zeros(1, ids.shape[1], 32)
        change[:, low : min(high, ids.shape[1])] = 6.0 * unit(3)
        block = llama.hf.model.layers[1]
        handle = block.register_forward_hook(
            lambda module, args, out, change=change: (
                (out[0] + change, *out[1:]) if isinstance(out, tuple) else out + change
            )
        )
        with torch.inference_mode():
            steered = llama.hf(ids).logits[0, -1].log_softmax(-1)
        handle.remove()
        with torch.inference_mode():
            raw = llama.hf(ids).logits[0, -1].log_softmax(-1)
        values.append(float((steered.exp() * (steered - raw)).sum()))
    rows = [(prompt, new, step), (prompt[:5], new[:2], Plan()), (prompt, (), step)]
    found = kl_from_unsteered(llama.model, rows)
    assert found[0] == pytest.approx(sum(values) / len(values), rel=1e-3)
    assert found[0] > 1e-3
    assert found[1] == 0.0
    assert math.isnan(found[2])


def test_unsteered_cells_diverge_by_nothing_and_steered_ones_by_something(llama, pairs):
    scores = evaluate(llama.model, plan(), pairs, max_new_tokens=4, quality=Quality(kl=True)).scores
    steered = scores["condition"].isin(["vector", "text+vector", "random"])
    assert (scores.loc[~steered, "kl"] == 0).all()
    assert (scores.loc[steered, "kl"] > 0).all()


def test_another_quality_model_scores_the_text_alone(llama, pairs, tiny_folders):
    quality = Quality(quality_model=str(tiny_folders["gpt2"]))
    scores = evaluate(llama.model, plan(), pairs, conditions=["none"], max_new_tokens=8, quality=quality).scores
    from steerlens.models.load import load_model

    expected = text_perplexities(load_model(tiny_folders["gpt2"]), scores["response"].tolist())
    assert scores["perplexity"].tolist() == pytest.approx(expected, rel=1e-4)


def response(text: str, tokens: tuple[int, ...]) -> Response:
    return Response("Why?", text, (1, 70, 71), (1, 70, 71), tokens, Plan())


def test_an_empty_response_fails_the_gate_and_has_no_perplexity(llama):
    frame = measure(llama.model, [response(" ", ()), response("FG", (70, 71))], Quality())
    assert math.isnan(frame["perplexity"][0])
    assert frame["low_perplexity"].tolist() == [True, bool(frame["perplexity"][1] < 2.5)]


def test_without_perplexity_nothing_is_scored_and_the_gate_is_absent(llama):
    frame = measure(llama.model, [response("FG", (70, 71))], Quality(perplexity=False))
    assert list(frame) == ["perplexity"]
    assert frame["perplexity"].isna().all()


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = byte_tokenizer()
    settings = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(**settings, num_attention_heads=2, num_labels=1, **special_ids(tokenizer))
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_is_the_classifiers_logit_whatever_the_batch(reward_folder):
    pairs = [("Why?", "Because."), ("Go on.", "No."), ("Tell me about rain.", "It falls, and it is wet.")]
    together = rewards(str(reward_folder), pairs, batch_size=3)
    alone = [rewards(str(reward_folder), [pair], batch_size=1)[0] for pair in pairs]
    assert together == pytest.approx(alone, rel=1e-4)
    model = LlamaForSequenceClassification.from_pretrained(reward_folder).eval()
    ids = byte_tokenizer()("Why?", "Because.", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert together[0] == pytest.approx(float(model(ids).logits[0, 0]), rel=1e-4)


def test_what_is_measured_is_known_by_its_models_weights(reward_folder, tiny_folders, monkeypatch):
    monkeypatch.chdir(reward_folder.parent)
    monkeypatch.setenv("HOME", str(reward_folder.parent))
    names = [str(reward_folder), f"./{reward_folder.name}", f"~/{reward_folder.name}"]
    found = [Quality(reward_model=name).content() for name in names]
    assert found[0] == found[1] == found[2] != Quality().content()
    of_folders = [Quality(quality_model=str(folder)).content()["quality_model"] for folder in tiny_folders.values()]
    assert len(set(of_folders)) == 2


def test_rewards_stand_in_the_scores_and_their_means_in_the_table(llama, pairs, reward_folder):
    quality = Quality(perplexity=False, reward_model=str(reward_folder))
    result = evaluate(llama.model, plan(), pairs, conditions=["none", "vector"], max_new_tokens=4, quality=quality)
    means = result.scores.groupby("condition")["reward"].mean()
    table = result.table.set_index("condition")
    pd.testing.assert_series_equal(table["mean_reward"], means, check_names=False)


def test_a_model_that_is_no_reward_model_is_refused(tiny_folders, tmp_path):
    with pytest.raises(ModelError, match="a reward model must give one number by trained weights"):
        rewards(str(tiny_folders["llama"]), [("a", "b")])
    with pytest.raises(ModelError, match="a reward model must be a folder or a reachable hub id"):
        rewards(str(tmp_path / "nothing"), [("a", "b")])


def test_equal_responses_are_measured_once_also_for_their_divergence(llama, monkeypatch):
    measured = []

    def counting(model, rows, batch_size):
        measured.extend(rows)
        return kl_from_unsteered(model, rows, batch_size)

    monkeypatch.setattr("steerlens.study.quality.kl_from_unsteered", counting)
    prompt = tuple(encode(llama.model, "Why?"))
    rows = [Response("Why?", "ab", prompt, prompt, (70, 71), plan(coeff)) for coeff in (6.0, 6.0, 6.0, 3.0, 6.0)]
    kl = measure(llama.model, rows, Quality(perplexity=False, kl=True))["kl"].tolist()
    assert len(measured) == 2
    assert len(set(kl)) == 2
    assert kl[0] == kl[1] == kl[2] == kl[4]
