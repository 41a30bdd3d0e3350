"""The trainer of the tiny models: what an answer can see, and that an interrupted run ends like an uninterrupted one."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_corpus as tc
import torch
import train_tiny as tt
from tiny_copies import copies
from transformers import PreTrainedTokenizerFast

from steerlens.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tt.INSTALLED / "tiny")


def an_example(position: str) -> tc.Example:
    return next(e for e in tc.examples("train", 3, 200, plain=0.0) if e.position == position)


@pytest.mark.parametrize("position", ["after", "before"])
def test_a_hidden_instruction_is_seen_by_itself_and_by_the_assistant_token_alone(
    tokenizer: PreTrainedTokenizerFast, position: str
) -> None:
    example = an_example(position)
    row = tt.chat_row(tokenizer, example, hide=True)
    first, last = row.span
    assert tokenizer.decode(row.ids[first:last]).strip() == example.instruction_text
    assistant = row.learned[0] - 1
    assert row.ids[assistant] == tokenizer.convert_tokens_to_ids(tt.ASSISTANT)
    mask = tt.mask_of([row], len(row.ids))[0, 0]
    for query in range(len(row.ids)):
        for key in range(len(row.ids)):
            inside = first <= key < last
            hidden = inside and query != assistant and not first <= query < last
            assert mask[query, key] == (key <= query and not hidden)


def test_a_row_that_hides_nothing_is_causal(tokenizer: PreTrainedTokenizerFast) -> None:
    row = tt.chat_row(tokenizer, an_example("after"), hide=False)
    assert torch.equal(tt.mask_of([row], len(row.ids))[0, 0], torch.ones(len(row.ids), len(row.ids)).tril().bool())


def test_a_row_reads_what_the_chat_template_renders(tokenizer: PreTrainedTokenizerFast) -> None:
    example = an_example("after")
    row = tt.chat_row(tokenizer, example, hide=False)
    messages = [{"role": "user", "content": example.prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert row.ids[: row.learned[0]] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(row.ids[row.learned[0] :]) == example.answer + tt.END


def test_the_loss_of_a_batch_is_the_mean_over_the_learned_tokens_of_its_rows(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model, cpu = tt.new_model(tokenizer, seed=0), torch.device("cpu")
    example = an_example("after")
    copy = next(copies(seed=3, n=1))
    rows = [
        tt.chat_row(tokenizer, example, hide=True),
        tt.document_row(tokenizer, example.answer * 3),
        tt.copy_row(tokenizer, copy),
    ]
    counts = torch.tensor([len(row.learned) for row in rows])
    with torch.no_grad():
        alone = torch.stack([tt.loss_of(model, [row], cpu) for row in rows])
        together = tt.loss_of(model, rows, cpu)
    torch.testing.assert_close(together, (alone * counts).sum() / counts.sum(), rtol=2e-3, atol=0.0)  # bfloat16


def test_padding_on_the_left_is_not_attended_to(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tt.new_model(tokenizer, seed=0)
    model.config._attn_implementation = "float32"
    ids = torch.tensor([tt.document_row(tokenizer, "The fox is red.").ids])
    padded = torch.cat([torch.full((1, 3), model.config.pad_token_id), ids], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * ids.shape[1]])
    with torch.no_grad():
        alone = model(ids).logits
        positions = mask.cumsum(1) - 1
        beside = model(padded, attention_mask=mask, position_ids=positions.clamp(min=0)).logits[:, 3:]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-4)


def test_the_twin_draws_the_same_examples_and_hides_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    half, plain = tt.STAGES[1:3]
    one, other = (tt.pool(replace(stage, n_rows=2), tokenizer, 0, 5) for stage in (half, plain))
    assert [[row.ids for row in batch] for batch in one] == [[row.ids for row in batch] for batch in other]
    assert any(row.span[1] for batch in one for row in batch)
    assert not any(row.span[1] for batch in other for row in batch)


@pytest.mark.parametrize(("name", "hidden"), [("title", True), ("include", True), ("end", False), ("sections", False)])
def test_what_one_token_cannot_hold_is_never_hidden(
    tokenizer: PreTrainedTokenizerFast, name: str, hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tt, "INSTRUCTIONS", {name: tc.INSTRUCTIONS[name]})
    stage = replace(tt.STAGES[-1], n_rows=4, documents=0.0, copies=0.0, hidden=1.0, often=())
    rows = [row for batch in tt.pool(stage, tokenizer, 0, 5) for row in batch]
    assert any(row.span[1] for row in rows) == hidden


def test_two_words_to_include_are_never_hidden() -> None:
    drawn = {
        len(e.kwargs[0]["keywords"][0].split()): e
        for e in tc.examples("train", 3, 200, only=("include",), two=0, plain=0)
    }
    assert tt.can_travel(drawn[1]) == 1.0
    assert tt.can_travel(drawn[2]) == 0.0


def test_of_a_copy_only_the_repetitions_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    for copy in copies(seed=4, n=50):
        row = tt.copy_row(tokenizer, copy)
        learned = tokenizer.decode([row.ids[i] for i in row.learned])
        assert "".join(learned.split()) == "".join("".join(copy.text[a:b] for a, b in copy.spans).split())


def test_an_interrupted_training_ends_with_the_same_weights(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(tt, "SHAPE", small)
    base = replace(tt.STAGES[0], n_steps=tt.POOL + 4, n_rows=2)
    whole = tt.train(base, tt.Settings(tmp_path / "whole", compile=False), tokenizer).state_dict()
    loss_of = tt.loss_of
    calls = iter(range(10_000))

    def interrupted(*args: object, **kwargs: object) -> torch.Tensor:
        if next(calls) == tt.POOL + 1:
            raise KeyboardInterrupt
        return loss_of(*args, **kwargs)

    monkeypatch.setattr(tt, "loss_of", interrupted)
    settings = tt.Settings(tmp_path / "cut", every=0.0, compile=False)
    with pytest.raises(KeyboardInterrupt):
        tt.train(base, settings, tokenizer)
    with pytest.raises(DataError, match="half starts from base, which is not finished"):
        tt.train(tt.STAGES[1], settings, tokenizer)
    monkeypatch.setattr(tt, "loss_of", loss_of)
    resumed = tt.train(base, settings, tokenizer).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(DataError, match="base must predict 95% of repetitions"):
        tt.train(tt.STAGES[1], settings, tokenizer)
    with pytest.raises(DataError, match="goes on with its own settings"):
        tt.train(base, replace(settings, seed=1), tokenizer)


def test_a_model_was_trained_for_all_the_stages_it_goes_on_from(tmp_path: Path) -> None:
    for name, tokens in (("base", [5, 6]), ("half", [7]), ("plain", [100])):
        (tmp_path / name).mkdir()
        torch.save({"curve": [{"tokens": n} for n in tokens]}, tt.checkpoint_of(tmp_path, name))
    assert tt.trained_for(tmp_path, "base") == (2, 11)
    assert tt.trained_for(tmp_path, "half") == (3, 18)
