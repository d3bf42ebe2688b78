"""Chats of several turns, against generations that read each whole chat again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tda_export.errors import TdaError, UsageError
from tda_export.graph import contract
from tda_export.runtime import Conversation, Model, open_artifact
from tda_export.runtime.model import load
from tests.runtime.conftest import edit_manifest

TURNS = ["The sea is calm tonight", "Why?", "Tell me more about the moon, the tide and the cliffs."]


def anew(model: Model, messages: list[dict[str, str]], **options: Any) -> str:
    """Return the answer to messages that are read without a memory."""
    generation = model.generate(model.text.encode_chat(messages), **options)
    list(generation)
    return generation.text


def finish(generation: Any) -> str:
    list(generation)
    return str(generation.text)


@pytest.mark.parametrize("mask", ["tda", "dense"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_every_turn_equals_reading_the_whole_chat(model: Model, mask: Any, system: str | None) -> None:
    chat = Conversation(model, system=system, mask=mask)
    messages = [] if system is None else [{"role": "system", "content": system}]
    reused = []
    for text in TURNS:
        messages.append({"role": "user", "content": text})
        expected = anew(model, messages, mask=mask, max_new_tokens=16)
        answer = chat.say(text, max_new_tokens=16)
        assert finish(answer) == expected
        messages.append({"role": "assistant", "content": expected})
        assert chat.messages == messages
        reused.append(answer.metrics.reused_tokens)
    assert chat.dropped_turns == 0
    assert reused[0] == 0
    assert reused[2] > 0  # the second turn had room for the third


def test_a_template_that_renders_earlier_turns_differently(artifact_copy: Path) -> None:
    """This template marks the last message, so that a prompt is not the beginning of the next one."""
    template = (
        "{% for m in messages %}[{{ m.role }}{% if loop.last %}, now{% endif %}] {{ m.content }}\n{% endfor %}[you]"
    )
    model = load(artifact_copy, provider="cpu")
    (artifact_copy / contract.CHAT_TEMPLATE_FILE).write_text(template)
    chat, messages = Conversation(model), []
    for text in TURNS:
        messages.append({"role": "user", "content": text})
        expected = anew(model, messages, max_new_tokens=16)
        assert finish(chat.say(text, max_new_tokens=16)) == expected
        messages.append({"role": "assistant", "content": expected})


def test_an_answer_cut_short_stays_as_far_as_it_came(model: Model) -> None:
    chat = Conversation(model)
    first = chat.say(TURNS[0])
    for _ in range(5):
        next(first)
    said = first.text
    assert said
    messages = [{"role": "user", "content": TURNS[0]}, {"role": "assistant", "content": said}]
    assert chat.messages == messages
    second = chat.say(TURNS[1], max_new_tokens=8)  # ends the first generation
    assert list(first) == []
    messages.append({"role": "user", "content": TURNS[1]})
    assert finish(second) == anew(model, messages, max_new_tokens=8)


def test_a_cancelled_answer(model: Model) -> None:
    chat = Conversation(model)
    first = chat.say(TURNS[0])
    next(first)
    first.cancel()
    assert list(first) == []
    assert first.cancelled
    assert (first.metrics.new_tokens, first.metrics.finish_reason) == (1, "")


def test_an_answer_without_text_is_forgotten_with_its_message(model: Model) -> None:
    chat = Conversation(model)
    chat.say("never read")
    answer = chat.say(TURNS[0], max_new_tokens=8)
    assert finish(answer) == anew(model, [{"role": "user", "content": TURNS[0]}], max_new_tokens=8)
    assert [message["content"] for message in chat.messages] == [TURNS[0], answer.text]


def test_an_answer_that_is_just_an_end_counts(artifact_copy: Path) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["model"].update(eos_token_ids=list(range(259))))
    chat = Conversation(load(artifact_copy, provider="cpu"))
    assert finish(chat.say(TURNS[0])) == ""
    chat.say(TURNS[1])
    assert chat.messages[1] == {"role": "assistant", "content": ""}


def test_stop_strings_stay_out_of_the_chat(model: Model) -> None:
    plain = anew(model, [{"role": "user", "content": TURNS[0]}], max_new_tokens=16)
    stop = plain[4:6]
    chat = Conversation(model)
    answer = chat.say(TURNS[0], max_new_tokens=16, stop=[stop])
    assert finish(answer) == plain[: plain.index(stop)]
    assert chat.messages[1]["content"] == plain[: plain.index(stop)]


def test_reset_forgets_all_but_the_system(model: Model) -> None:
    chat = Conversation(model, system="Be brief.")
    finish(chat.say(TURNS[0], max_new_tokens=40))
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    messages = [*chat.messages, {"role": "user", "content": TURNS[1]}]
    assert finish(chat.say(TURNS[1], max_new_tokens=8)) == anew(model, messages, max_new_tokens=8)


def test_the_oldest_turns_make_room(model: Model) -> None:
    """Then a quarter of the context is free again. The system's message stays."""
    chat = Conversation(model, system="Be brief.", context=200)
    system = {"role": "system", "content": "Be brief."}
    dropped = []
    for number in range(8):
        text = f"{number}. What of the sea?"
        answer = chat.say(text, max_new_tokens=6)
        prompt = chat.messages[:-1]
        assert prompt[0] == system
        assert prompt[1]["role"] == "user"
        assert prompt[-1] == {"role": "user", "content": text}
        before, length = chat.dropped_turns, len(model.text.encode_chat(prompt))
        if dropped and before > dropped[-1]:
            assert length <= 150
        assert finish(answer) == anew(model, prompt, max_new_tokens=6, context=200)
        assert answer.metrics.finish_reason == "length"
        dropped.append(before)
    assert dropped[0] == 0
    assert dropped[-1] > 1
    assert len(set(dropped)) < len(dropped) - 1  # not at every turn, since each time the whole chat is read again
    users = [message["content"] for message in chat.messages if message["role"] == "user"]
    assert users == [f"{number}. What of the sea?" for number in range(8)][dropped[-1] :]


def test_a_message_that_alone_is_too_long(model: Model) -> None:
    chat = Conversation(model, context=120)
    finish(chat.say("Hi", max_new_tokens=4))
    before = chat.messages
    with pytest.raises(TdaError, match=r"The prompt has \d+ tokens and the context 120.*or raise the context"):
        chat.say("x" * 120)
    assert chat.messages == before
    assert chat.dropped_turns == 0
    finish(chat.say("x" * 60, max_new_tokens=4))  # less than a quarter is free, but an answer fits
    assert chat.messages[-2]["content"] == "x" * 60


def test_a_model_without_a_chat_template(artifact_copy: Path) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["files"].pop(contract.CHAT_TEMPLATE_FILE))
    model = Model(open_artifact(artifact_copy), "cpu")
    with pytest.raises(TdaError, match=r"no chat template, so it cannot chat\. Give it text.*tda-export generate"):
        Conversation(model)


@pytest.mark.parametrize("context", [0, 1, 513])
def test_context_out_of_range(model: Model, context: int) -> None:
    with pytest.raises(UsageError, match=rf"A context of {context} tokens is outside \[2, 512\]"):
        Conversation(model, context=context)


def test_the_room_of_keys_and_values_is_the_context(model: Model) -> None:
    conversation = Conversation(model, context=300)
    list(conversation.say("Hi", max_new_tokens=2))
    with conversation._memory.borrow_step(1) as step:
        assert step.cache.capacity == 300
