"""Steps that are started before the caller has the token before them, here on the CPU, where they end at once."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_export.errors import TdaError
from tda_export.runtime import Model, Token, cuda_stream, generate, load
from tda_export.runtime.deployment import PriceDeployment, Refresh
from tda_export.runtime.priced import PricedStep

PROMPT = list(b"the sea is calm, the sea is")
DENSE = PriceDeployment(0.0)


@pytest.fixture(scope="module")
def plain(priced_artifact: Path) -> Model:
    return load(priced_artifact, provider="cpu")


@pytest.fixture(scope="module")
def captured(priced_artifact: Path) -> Model:
    """Takes two bound calls in turns, as captures need."""
    model = load(priced_artifact, provider="cpu")
    model.sessions.captures = True
    return model


def ids(tokens: Iterator[Token]) -> list[int]:
    return [token.id for token in tokens]


def begun(model: Model) -> PricedStep:
    """Return a step that has read the prompt, with room for twelve tokens more."""
    step = PricedStep(model.sessions, model.artifact.shape, len(PROMPT) + 12)
    step.capture()
    step.begin(PROMPT, DENSE)
    step.follow(DENSE)
    return step


@settings(max_examples=60)
@given(calls=st.lists(st.tuples(st.sampled_from(["given", "last", "other", "logits", "settle"]), st.booleans())))
def test_any_order_of_calls(plain: Model, captured: Model, calls: list[tuple[str, bool]]) -> None:
    """Each call gives what the tokens before it give, whether it, or the one after it, was started ahead or not."""
    step, slow = begun(captured), begun(plain)
    token, chosen = 65, False  # the newest token, and whether the device has chosen it
    for kind, ahead in calls:
        if step.cache.length == step.cache.capacity:
            break
        if kind == "settle":
            step.settle()
            assert not step.is_ahead
            continue
        if kind == "other":
            token = token % 200 + 1
        expected = slow.logits(token)
        if kind == "logits":
            np.testing.assert_array_equal(step.logits(token), expected)
        else:
            found = step.greedy(None if kind == "last" and chosen else token, ahead=ahead)
            assert found == int(expected.argmax())
            assert step.is_ahead == (ahead and step.cache.length < step.cache.capacity)
        token, chosen = int(expected.argmax()), kind != "logits"
        assert step.cache.length == slow.cache.length


def test_a_call_that_is_not_captured_is_not_started_ahead(plain: Model) -> None:
    step = begun(plain)
    step.greedy(65, ahead=True)
    assert not step.is_ahead


@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_texts_of_any_length(plain: Model, captured: Model, count: int) -> None:
    """No step is started whose token nobody asked for."""
    expected = ids(plain.generate(PROMPT, max_new_tokens=count))
    seen, generation = [], captured.generate(PROMPT, max_new_tokens=count)
    for token in generation:
        seen.append(token.id)
        with captured.borrow_step(1) as other:
            assert not other.is_ahead
    assert seen == expected
    assert len(seen) == count


@pytest.mark.parametrize("room", [1, 2, 5])
def test_a_context_that_fills(plain: Model, captured: Model, room: int) -> None:
    prompt = (PROMPT * 40)[: plain.artifact.shape.max_positions - room]
    texts = [ids(model.generate(prompt, max_new_tokens=40)) for model in (plain, captured)]
    assert texts[0] == texts[1]


def test_texts_that_end_early(plain: Model, captured: Model) -> None:
    """By a stop string, by the caller, or by cancelling: the step is free for the next text, and the memory right."""
    memory, expected = captured.memory(), ids(plain.generate(PROMPT, max_new_tokens=30))
    whole = plain.generate(PROMPT, max_new_tokens=30)
    ids(whole)
    stop = whole.text[3:6]
    for _ in range(2):
        for end in ("close", "cancel", "stop"):
            generation = captured.generate(
                PROMPT, max_new_tokens=30, memory=memory, stop=[stop] if end == "stop" else []
            )
            seen = ids(itertools.islice(generation, 5 if end != "stop" else None))
            if end == "cancel":
                generation.cancel()
                assert list(generation) == []
            generation.close()
            assert seen == expected[: len(seen)]
            assert generation.metrics.finish_reason == ("stop" if end == "stop" else "")
            with memory.borrow_step(1) as step:
                assert not step.is_ahead
            assert ids(captured.generate(PROMPT, max_new_tokens=30, memory=memory)) == expected


@pytest.mark.parametrize("tokens", [2, 3, 5])
def test_refreshes(tiny_artifact: Path, tokens: int) -> None:
    """A refresh reads keys and values anew, so nothing may be under way."""
    texts = []
    for captures in (False, True):
        model = load(tiny_artifact, provider="cpu")
        model.sessions.captures = captures
        how = model.artifact.deployment.with_refresh(Refresh(tokens))
        generation = model.generate(PROMPT, max_new_tokens=23, deployment=how)
        texts.append(ids(generation))
        assert generation.metrics.refreshes > 2
    assert texts[0] == texts[1]


def test_time_between_tokens_counts_where_a_step_is_under_way(
    plain: Model, captured: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.count()
    monkeypatch.setattr(generate.time, "perf_counter", lambda: float(next(now)))

    def seconds(model: Model) -> float:
        generation = model.generate(PROMPT, max_new_tokens=12)
        for _ in generation:
            for _ in range(1000):
                next(now)
        return generation.metrics.decode_seconds

    assert seconds(plain) < 1000
    assert 10_000 < seconds(captured) < 11_000  # the first step is not started ahead


class Driver:
    """A driver whose functions return given errors."""

    def __init__(self, errors: dict[str, int]) -> None:
        self.calls: list[str] = []
        self._errors = errors

    def __getattr__(self, function: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(function)
            return self._errors.get(function, 0)

        return call


def test_a_gpu_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver({"cuEventSynchronize": 700})
    monkeypatch.setattr(cuda_stream, "cuda_driver", lambda: driver)
    mark = cuda_stream.Mark(cuda_stream.StepStream())
    mark.set()
    with pytest.raises(TdaError) as failed:
        mark.wait()
    assert str(failed.value) == (
        "The GPU failed (error 700 in cuEventSynchronize). Start the program again, or use --provider cpu."
    )
    del mark, failed
    gc.collect()
    assert driver.calls[-1] == "cuEventDestroy_v2"
    assert driver.calls[:4] == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
