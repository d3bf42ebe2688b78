"""Prompts read after held tokens, against the slow reference: a prefill of each whole prompt in a new cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tda_export.errors import TdaError, UsageError
from tda_export.ffn_share import GATED
from tda_export.graph import contract
from tda_export.runtime import Model, load, memory, open_artifact
from tda_export.runtime.decode_step import DecodeStep
from tda_export.runtime.deployment import Deployment, Refresh
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.memory import Cancelled, PromptMemory, common_prefix
from tda_export.runtime.phases import PromptMask, prefill

TEXT = "In 1871 a watchmaker built a clock for the museum, and nobody could say why it lost eleven minutes a day."


def statistics(mask: PromptMask) -> tuple[np.ndarray, float]:
    """Return the running statistics [L, 2, F] and their weight."""
    rows = [mask.stats[contract.past_neuron_stats(layer)].numpy().copy() for layer in range(3)]
    return np.stack(rows), float(mask.stats[contract.PAST_STATS_WEIGHT].numpy()[0])


def check_read(model: Model, held: PromptMemory, tokens: list[int], *, prior: bool = True) -> int:
    """Read a prompt with a memory, require the result of a whole prefill, and return the number of reused tokens."""
    how = dataclasses.replace(model.artifact.deployment, prior=prior)
    cache = KvCache(model.artifact.shape, "cpu", len(tokens))
    expected, whole = prefill(model.sessions, model.artifact.shape, tokens, cache, how.thresholds, prior=prior)
    with held.borrow_step(len(tokens) + 8) as step:
        logits, reused = held.read(step, tokens, how)
        assert isinstance(step, DecodeStep)
        mask = step.mask
        assert mask is not None
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        (rows, weight), (rows_whole, weight_whole) = statistics(mask), statistics(whole)
        np.testing.assert_allclose(rows, rows_whole, atol=1e-4)
        assert weight == pytest.approx(weight_whole)
        for layer in range(3):
            assert np.array_equal(mask.indices(layer), whole.indices(layer))
            for ours, dense in zip(step.cache.keys_and_values(layer), cache.keys_and_values(layer), strict=True):
                np.testing.assert_allclose(
                    ours.numpy()[:, :, : len(tokens)], dense.numpy()[:, :, : len(tokens)], atol=1e-4
                )
        assert step.cache.length == len(tokens)
        step.use(mask, how.token_thresholds)
        for token in tokens[:8]:  # a generation leaves these after the prompt
            step.logits(token)
    return reused


def test_turns_equal_one_prefill_of_the_whole(model: Model) -> None:
    """Each prompt continues the one before. The answer, which was decoded under a mask, is read again."""
    tokens, held = model.text.encode(TEXT), model.memory()
    assert check_read(model, held, tokens[:20]) == 0
    assert check_read(model, held, tokens[:50]) == 20
    assert check_read(model, held, tokens[:51]) == 50
    assert check_read(model, held, tokens) == 51


def test_prompts_that_differ_are_read_from_the_checkpoint_before(model: Model) -> None:
    tokens, held = model.text.encode(TEXT), model.memory()
    other = [70] * 12
    for end in (20, 50, 90):
        check_read(model, held, tokens[:end])
    assert check_read(model, held, tokens[:70] + other) == 50
    assert check_read(model, held, tokens[:50] + other) == 50
    assert check_read(model, held, tokens[:49] + other) == 20
    assert check_read(model, held, tokens[:30]) == 20  # shorter than before
    assert check_read(model, held, tokens[:30]) == 20  # the same prompt: its last token is read for the logits
    assert check_read(model, held, other) == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=5))
def test_any_sequence_of_prompts(model: Model, prompts: list[tuple[int, int]]) -> None:
    """Prompts of few kinds, with common beginnings of all lengths."""
    tokens, held = model.text.encode(TEXT), model.memory()
    kinds = [tokens, tokens[:12] + tokens[40:], tokens[:5] + [70] * 40, tokens[3:]]
    for kind, length in prompts:
        check_read(model, held, kinds[kind][:length])


def test_statistics_with_and_without_prior_are_not_mixed(model: Model) -> None:
    tokens, held = model.text.encode(TEXT), model.memory()
    assert check_read(model, held, tokens[:20]) == 0
    assert check_read(model, held, tokens[:40], prior=False) == 0
    assert check_read(model, held, tokens[:60], prior=False) == 40
    assert check_read(model, held, tokens[:60]) == 0


def test_pieces_are_checkpoints(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CHUNK_TOKENS", 16)
    tokens, held = model.text.encode(TEXT), model.memory()
    assert check_read(model, held, tokens[:60]) == 0
    assert check_read(model, held, tokens[:40] + [70] * 9) == 32
    monkeypatch.setattr(memory, "CHECKPOINTS", 2)
    assert check_read(model, held, tokens) == 32  # the older checkpoints are dropped
    assert check_read(model, held, tokens[:40] + [70] * 9) == 0


def test_memory_of_another_model(model: Model, priced_model: Model) -> None:
    with pytest.raises(
        UsageError, match=r"^The memory belongs to another model\. Make one with this model's memory\(\)"
    ):
        model.generate(TEXT, memory=priced_model.memory())


def test_more_room_than_before_reads_all_again(model: Model) -> None:
    tokens, rooms = model.text.encode(TEXT), list[int]()

    def open_step(room: int) -> DecodeStep:
        rooms.append(room)
        return DecodeStep(model.sessions, model.artifact.shape, room)

    held = PromptMemory(open_step, 90, first_room=30)
    assert check_read(model, held, tokens[:15]) == 0  # with room for 8 more tokens
    assert check_read(model, held, tokens[:22]) == 15
    assert check_read(model, held, tokens[:23]) == 0
    assert check_read(model, held, tokens[:52]) == 23
    assert check_read(model, held, tokens[:60]) == 0
    assert check_read(model, held, tokens[:82]) == 60
    assert rooms == [30, 60, 90]


@pytest.mark.parametrize(("most", "tokens", "room"), [(512, 20, 100), (512, 120, 120), (80, 20, 80)])
def test_the_first_room(model: Model, most: int, tokens: int, room: int) -> None:
    with PromptMemory(model._new_step, most, first_room=100).borrow_step(tokens) as step:
        assert step.cache.capacity == room


def test_room_ends_with_the_context(model: Model) -> None:
    """It never grows beyond the context. A generation with a larger context still gets its room."""
    held = model.memory(context=40)
    for tokens, room in ((20, 40), (40, 40), (41, 41), (50, 50)):
        with held.borrow_step(tokens) as step:
            assert step.cache.capacity == room
    with pytest.raises(UsageError, match=r"^A context of 513 tokens is outside \[2, 512\]"):
        model.memory(context=513)


def test_one_generation_at_a_time(model: Model) -> None:
    held = model.memory()
    first = model.generate(TEXT, memory=held)
    next(first)
    second = model.generate(TEXT, memory=held)
    with pytest.raises(TdaError, match=r"^The previous answer is not finished\. Read it to its end, or close"):
        next(second)
    first.close()
    assert next(model.generate(TEXT, memory=held))


def test_a_cancelled_reading_keeps_what_is_whole(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CHUNK_TOKENS", 16)
    tokens, held = model.text.encode(TEXT), model.memory()
    answers = iter([False, False, True])
    with held.borrow_step(len(tokens)) as step, pytest.raises(Cancelled):
        held.read(step, tokens, model.artifact.deployment, lambda: next(answers))
    assert check_read(model, held, tokens[:90]) == 32


def test_an_interrupted_reading_leaves_no_trace(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache and statistics may then have any content. The next prompt is read from the last checkpoint on."""
    tokens, held = model.text.encode(TEXT), model.memory()
    check_read(model, held, tokens[:20])

    def interrupted(*arguments: object, **options: object) -> None:
        read(*arguments, **options)
        raise KeyboardInterrupt

    with held.borrow_step(28) as step:
        read = step.read
        monkeypatch.setattr(step, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            held.read(step, tokens[:27], model.artifact.deployment)
        monkeypatch.undo()
    assert check_read(model, held, tokens[:20] + [70] * 8) == 20


def test_a_prompt_that_is_not_finite_is_not_kept(artifact_copy: Path) -> None:
    artifact = open_artifact(artifact_copy)
    entry = artifact.manifest["weights"][contract.COS_CACHE]
    path, shape = artifact.file(contract.WEIGHTS_FILE), tuple(entry["shape"])
    rows = np.memmap(path, np.float32, mode="r+", offset=entry["offset"], shape=shape)
    rows[30] = np.nan
    rows.flush()
    model = load(artifact_copy, provider="cpu")
    tokens, held = model.text.encode(TEXT), model.memory()
    assert check_read(model, held, tokens[:10]) == 0
    with pytest.raises(TdaError, match="not finite at token 40"):
        next(model.generate(tokens[:40], memory=held))
    held_again = model.generate(tokens[:12], memory=held, max_new_tokens=4)
    assert len(list(held_again)) == 4
    assert held_again.metrics.reused_tokens == 10
    assert check_read(model, held, tokens[:20]) == 12


@pytest.mark.parametrize("mask", ["tda", "dense"])
@pytest.mark.parametrize("refresh", [Refresh(), Refresh(3), Refresh(4, 0.5)], ids=str)
def test_generations_equal_those_without_a_memory(model: Model, mask: str, refresh: Refresh) -> None:
    held, prompt = model.memory(), model.text.encode(TEXT)[:30]
    how = model.artifact.deployment.with_refresh(refresh)
    for turn in range(3):
        ours, alone = (
            model.generate(prompt, mask=mask, deployment=how, max_new_tokens=12, memory=kept) for kept in (held, None)
        )
        tokens = [token.id for token in ours]
        assert tokens == [token.id for token in alone]
        assert ours.metrics.density == pytest.approx(alone.metrics.density)
        assert ours.metrics.sparsity == pytest.approx(alone.metrics.sparsity)
        assert ours.metrics.refreshes == alone.metrics.refreshes
        assert ours.metrics.prompt_tokens == len(prompt)
        assert alone.metrics.reused_tokens == 0
        assert ours.metrics.reused_tokens == (len(prompt) - 22 if turn else 0)
        prompt = prompt + tokens + [70] * 10


def test_another_budget_goes_on_with_the_same_statistics(model: Model) -> None:
    """Statistics do not depend on thresholds."""
    held, tokens = model.memory(), model.text.encode(TEXT)
    list(model.generate(tokens[:60], memory=held, max_new_tokens=40))
    other = Deployment(model.artifact.deployment.thresholds * 1.5, np.zeros(3, np.float32), ffn_matrices=GATED)
    ours, alone = (
        model.generate(tokens[:80], deployment=other, memory=kept, max_new_tokens=12) for kept in (held, None)
    )
    assert [token.id for token in ours] == [token.id for token in alone]
    assert ours.metrics.reused_tokens == 60
    assert ours.metrics.density == pytest.approx(alone.metrics.density)


@given(st.lists(st.integers(0, 1), max_size=6), st.lists(st.integers(0, 1), max_size=6))
def test_common_prefix(one: list[int], other: list[int]) -> None:
    length = common_prefix(one, other)
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]
