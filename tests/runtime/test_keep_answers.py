"""Answers kept as sparse steps wrote them, against the slow reference: the same tokens written into a new cache."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_export.errors import TdaError, UsageError
from tda_export.graph import contract
from tda_export.runtime import Conversation, Model, load
from tda_export.runtime.deployment import PriceDeployment
from tda_export.runtime.memory import PromptMemory, common_prefix
from tda_export.runtime.steps import open_step
from tda_export.runtime.token_step import TokenStep

TEXT = "In 1871 a watchmaker built a clock for the museum, and nobody could say why it lost eleven minutes a day."
TURNS = ["The sea is calm tonight", "Why?", "Tell me more about the moon, the tide and the cliffs."]
READ = None  # for a token that a prefill read; otherwise the price at which it was decoded

Written = list[tuple[int, float | None]]


def replay(model: Model, written: Written) -> tuple[TokenStep, np.ndarray]:
    """Write tokens into a new cache: runs of prefilled ones by prefill, the others one by one."""
    step = open_step(model.sessions, model.artifact.shape, len(written) + 64)
    for price, run in itertools.groupby(written, lambda entry: entry[1]):
        tokens = [token for token, _ in run]
        if price is None:
            logits = step.begin(tokens, PriceDeployment(0.0))
        else:
            step.follow(PriceDeployment(price))
            for token in tokens:
                logits = step.logits(token)
    return step, logits


def keys_and_values(step: TokenStep, layers: int, length: int) -> np.ndarray:
    values = [value.numpy()[:, :, :length] for layer in range(layers) for value in step.cache.keys_and_values(layer)]
    return np.stack(values)


def answer(held: PromptMemory, model: Model, prompt: list[int], price: float, tokens: Sequence[int]) -> Any:
    """Read a prompt and decode given tokens after it. Return logits and the number of reused tokens."""
    with held.borrow_step(len(prompt) + len(tokens) + 1) as step:
        how = PriceDeployment(price)
        logits, reused = held.read(step, prompt, how)
        step.follow(how)
        for token in tokens:
            step.logits(token)
        held.keep(tokens, how)
        return logits, reused, keys_and_values(step, model.artifact.shape.num_layers, len(prompt) + len(tokens))


def prices(model: Model) -> tuple[float, float]:
    """Return two prices that skip many rows."""
    table = model.artifact.price_table
    assert table is not None
    return table.price_for(sparsity=0.4), table.most_price


def test_a_turn_goes_on_behind_the_kept_answer(priced_model: Model) -> None:
    tokens, (price, _) = priced_model.text.encode(TEXT), prices(priced_model)
    held = priced_model.memory(keep_answers=True)
    assert answer(held, priced_model, tokens[:20], price, tokens[20:30])[1] == 0
    logits, reused, _ = answer(held, priced_model, tokens[:50], price, [])
    assert reused == 30
    written: Written = [(t, price if 20 <= i < 30 else READ) for i, t in enumerate(tokens[:50])]
    expected = replay(priced_model, written)[1]
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    dense = replay(priced_model, [(token, READ) for token in tokens[:50]])[1]
    assert np.abs(logits - dense).max() > 1e-3  # sparse keys and values have an effect


def test_without_it_answers_are_read_again(priced_model: Model) -> None:
    tokens, (price, _) = priced_model.text.encode(TEXT), prices(priced_model)
    held = priced_model.memory()
    answer(held, priced_model, tokens[:20], price, tokens[20:30])
    logits, reused, _ = answer(held, priced_model, tokens[:50], price, [])
    assert reused == 20
    np.testing.assert_allclose(logits, replay(priced_model, [(t, READ) for t in tokens[:50]])[1], atol=1e-4)
    assert answer(held, priced_model, tokens[:35], price, [])[1] == 34  # it can go back to any length


def test_what_was_written_at_a_higher_price_is_read_again(priced_model: Model) -> None:
    tokens, (low, high) = priced_model.text.encode(TEXT), prices(priced_model)
    for price, expected in ((high, 30), (low, 30), (low / 2, 20), (0.0, 20)):
        held = priced_model.memory(keep_answers=True)
        answer(held, priced_model, tokens[:20], low, tokens[20:30])
        assert answer(held, priced_model, tokens[:50], price, [])[1] == expected
    held = priced_model.memory(keep_answers=True)
    answer(held, priced_model, tokens[:20], 0.0, tokens[20:30])
    answer(held, priced_model, tokens[:40], low, tokens[40:50])
    assert answer(held, priced_model, tokens[:60], 0.0, [])[1] == 40  # dense steps wrote dense values


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 30), st.integers(0, 2), st.integers(0, 8)), min_size=1, max_size=4
    )
)
@settings(max_examples=25)
def test_any_prompts_in_any_order(priced_model: Model, order: list[tuple[int, int, int, int]]) -> None:
    """The cache follows the rule: the longest beginning written at no higher price is kept, and the rest is read."""
    text, held, written = priced_model.text.encode(TEXT), priced_model.memory(keep_answers=True), Written()
    steps = (0.0, *prices(priced_model))
    for other, length, level, new in order:
        price = steps[level]
        tail = [(70 + other) if other else text[i] for i in range(length // 2, length)]
        prompt, decoded = [*text[: length // 2], *tail], text[length : length + new]
        kept: Written = []
        for token, entry in zip(prompt[:-1], written, strict=False):
            if entry[0] != token or (entry[1] or 0.0) > price:
                break
            kept.append(entry)
        logits, reused, found = answer(held, priced_model, prompt, price, decoded)
        assert reused == len(kept)
        written = kept + [(token, READ) for token in prompt[len(kept) :]]
        expected = replay(priced_model, written)[1]
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        written += [(token, price) for token in decoded]
        step = replay(priced_model, written)[0]
        layers = priced_model.artifact.shape.num_layers
        np.testing.assert_allclose(found, keys_and_values(step, layers, len(written)), atol=1e-4)


def finish(generation: Any) -> list[int]:
    return [token.id for token in generation]


def test_a_chat_keeps_its_answers(priced_model: Model) -> None:
    """Equal, token by token, to a replay of the read and the decoded tokens. The last token of an answer is read."""
    how = priced_model.at(sparsity=0.4)
    chat, written = Conversation(priced_model, deployment=how, keep_answers=True), Written()
    kept = 0
    for text in TURNS:
        generation = chat.say(text, max_new_tokens=12)
        prompt = priced_model.text.encode_chat(chat.messages[:-1])
        tokens = finish(generation)
        common = common_prefix(prompt, [token for token, _ in written])
        assert generation.metrics.reused_tokens == common
        kept += sum(price is not READ for _, price in written[:common])
        written = written[:common] + [(token, READ) for token in prompt[common:]]
        step, logits = replay(priced_model, written)
        step.follow(how)
        expected = [int(logits.argmax())]
        while len(expected) < len(tokens):
            expected.append(int(step.logits(expected[-1]).argmax()))
        assert tokens == expected
        written += [(token, how.price) for token in tokens[:-1]]
    assert kept > 0  # random tokens do not all tokenize back to themselves


def test_dense_answers_are_the_same_either_way(priced_model: Model) -> None:
    chats = [Conversation(priced_model, mask="dense", keep_answers=keep) for keep in (False, True)]
    for text in TURNS:
        reread, kept = (chat.say(text, max_new_tokens=12) for chat in chats)
        assert finish(reread) == finish(kept)
    assert kept.metrics.reused_tokens > reread.metrics.reused_tokens


@pytest.mark.parametrize("how", ["stop", "cancel", "close", "refused"])
def test_however_an_answer_ends(priced_model: Model, how: str) -> None:
    """Decoded tokens that are not in the text of the chat, or are tokenized differently, are read again."""
    deployment = priced_model.at(sparsity=0.4)
    plain = Conversation(priced_model, deployment=deployment)
    finish(plain.say(TURNS[0], max_new_tokens=12))
    text = plain.messages[1]["content"]
    chat = Conversation(priced_model, deployment=deployment, keep_answers=True)
    generation = chat.say(TURNS[0], max_new_tokens=12, stop=[text[4:6]] if how == "stop" else [])
    for number, _ in enumerate(generation):
        if how != "stop" and number == 5:
            (generation.cancel if how == "cancel" else generation.close)()
    if how == "refused":
        with pytest.raises(TdaError, match="leaves no room for an answer"):
            chat.say("x" * 5000)
    last = chat.say(TURNS[1], max_new_tokens=12)
    finish(last)
    prompt = priced_model.text.encode_chat(chat.messages[:-1])
    before = len(priced_model.text.encode_chat(chat.messages[:1]))
    assert before <= last.metrics.reused_tokens < len(prompt)


def test_a_template_that_renders_earlier_turns_differently(priced_artifact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(priced_artifact, tmp_path / "artifact"))
    template = (
        "{% for m in messages %}[{{ m.role }}{% if loop.last %}, now{% endif %}] {{ m.content }}\n{% endfor %}[you]"
    )
    model = load(copy, provider="cpu")
    (copy / contract.CHAT_TEMPLATE_FILE).write_text(template)
    chat = Conversation(model, deployment=model.at(sparsity=0.4), keep_answers=True)
    before: list[int] = []
    for text in TURNS:
        generation = chat.say(text, max_new_tokens=12)
        prompt = model.text.encode_chat(chat.messages[:-1])
        tokens = finish(generation)
        assert generation.metrics.reused_tokens == common_prefix(before, prompt)
        assert not before or 0 < generation.metrics.reused_tokens < len(before) - len(tokens)
        before = prompt + tokens[:-1]


def test_masks_do_not_keep_answers(model: Model) -> None:
    for make in (model.memory, lambda **options: Conversation(model, **options)):
        with pytest.raises(UsageError, match="has masks"):
            make(keep_answers=True)
