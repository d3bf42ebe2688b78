"""State across calls as in docs/artifact-format.md, in plain ONNX Runtime: pieces, refresh, fixed buffers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from tda_export.graph import contract
from tda_export.runtime import load
from tda_export.runtime.deployment import Refresh
from tests.examples.plain import PlainArtifact

PROMPT = list(range(40, 60))


@pytest.fixture(scope="module")
def plain(tiny_artifact: Path) -> PlainArtifact:
    return PlainArtifact(tiny_artifact)


def tokens_of(numbers: list[int]) -> np.ndarray:
    return np.array([numbers], np.int64)


def carried(plain: PlainArtifact, before: dict[str, np.ndarray], decay: float = 1.0) -> dict[str, np.ndarray]:
    """Return the statistics of a prefill as inputs of the next."""
    stats = {contract.past_neuron_stats(i): before[contract.present_neuron_stats(i)] for i in plain.layers}
    weight = {contract.PAST_STATS_WEIGHT: before[contract.PRESENT_STATS_WEIGHT]}
    return stats | weight | {contract.STATS_DECAY: np.array([decay], np.float32)}


def mask_of(plain: PlainArtifact, prefilled: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    indices = {contract.mask_indices(i): prefilled[contract.present_mask_indices(i)] for i in plain.layers}
    return indices | {contract.tail_mean(i): prefilled[contract.present_tail_mean(i)] for i in plain.layers}


def without_last(plain: PlainArtifact, outputs: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """Remove the last tokens from the keys and values of a call."""
    names = [name(i) for i in plain.layers for name in (contract.present_key, contract.present_value)]
    return {name: outputs[name][:, :, : outputs[name].shape[2] - number] for name in names}


def test_pieces_end_with_the_mask_of_the_whole(plain: PlainArtifact) -> None:
    whole = plain.run(contract.PREFILL_FILE, plain.needed(tokens_of(PROMPT)))
    first = plain.run(contract.PREFILL_FILE, plain.needed(tokens_of(PROMPT[:7])))
    rest = plain.needed(tokens_of(PROMPT[7:]), first) | carried(plain, first)
    second = plain.run(contract.PREFILL_FILE, rest)
    np.testing.assert_allclose(second[contract.LOGITS], whole[contract.LOGITS], atol=1e-4)
    for i in plain.layers:
        name = contract.present_mask_indices(i)
        np.testing.assert_array_equal(second[name], whole[name])
        np.testing.assert_allclose(
            second[contract.present_tail_mean(i)], whole[contract.present_tail_mean(i)], atol=1e-5
        )


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_refresh_is_that_of_our_driver(plain: PlainArtifact, decay: float) -> None:
    every, count = 4, 24
    model = load(plain.folder, provider="cpu")
    deployment = model.artifact.deployment
    refresh = deployment.with_refresh(Refresh(every, decay))
    expected = [token.id for token in model.generate(PROMPT, max_new_tokens=count, deployment=refresh)]
    assert expected != [token.id for token in model.generate(PROMPT, max_new_tokens=count, deployment=deployment)]

    prefilled = outputs = plain.run(contract.PREFILL_FILE, plain.needed(tokens_of(PROMPT)))
    answer = [int(outputs[contract.LOGITS][0, -1].argmax())]
    while len(answer) < count:
        if len(answer) % every == 0:
            kept = without_last(plain, outputs, every - 1)
            feeds = plain.needed(tokens_of(answer[-every:]), kept) | carried(plain, prefilled, decay)
            prefilled = outputs = plain.run(contract.PREFILL_FILE, feeds)
        else:
            feeds = plain.needed(tokens_of(answer[-1:]), outputs) | mask_of(plain, prefilled)
            outputs = plain.run(contract.DECODE_FILE, feeds)
        answer.append(int(outputs[contract.LOGITS][0, -1].argmax()))
    assert answer == expected


def test_fixed_buffers_and_tokens_that_feed_themselves(plain: PlainArtifact) -> None:
    """One buffer for past and present, a mask of its length, padded indices, and the next token written in place."""
    expected = [token.id for token in load(plain.folder, provider="cpu").generate(PROMPT, max_new_tokens=16)]
    shape, capacity, length = plain.shape, len(PROMPT) + 16, len(PROMPT)
    attended = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, capacity), np.int64))
    token = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, 1), np.int64))
    size = (1, shape.num_kv_heads, capacity, shape.head_size)
    pairs = [(contract.past_key, contract.present_key), (contract.past_value, contract.present_value)]
    buffers = {
        (past(i), present(i)): ort.OrtValue.ortvalue_from_numpy(np.zeros(size, np.float32))
        for past, present in pairs
        for i in plain.layers
    }

    def bound(file: str) -> tuple[ort.InferenceSession, ort.IOBinding]:
        session = ort.InferenceSession(plain.folder / file, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        binding.bind_ortvalue_input(contract.ATTENTION_MASK, attended)
        for (past, present), buffer in buffers.items():
            binding.bind_ortvalue_input(past, buffer)
            binding.bind_ortvalue_output(present, buffer)
        return session, binding

    def attend(total: int) -> None:
        attended.update_inplace((np.arange(capacity) < total).astype(np.int64)[None])

    prefill, reading = bound(contract.PREFILL_FILE)
    reading.bind_cpu_input(contract.INPUT_IDS, tokens_of(PROMPT))
    given = {contract.present_mask_indices(i): contract.mask_indices(i) for i in plain.layers}
    given |= {contract.present_tail_mean(i): contract.tail_mean(i) for i in plain.layers}
    for name in (contract.LOGITS, *given):
        reading.bind_output(name)
    attend(length)
    prefill.run_with_iobinding(reading)
    outputs = dict(
        zip([*(present for _, present in buffers), contract.LOGITS, *given], reading.get_outputs(), strict=True)
    )

    decode, step = bound(contract.DECODE_FILE)
    for name, value in outputs.items():
        if name in given:
            array = value.numpy()
            if array.dtype == np.int32:
                padding = shape.ffn_size - len(array)
                array = np.pad(array, (0, padding), constant_values=contract.PADDING_INDEX)
            step.bind_ortvalue_input(given[name], ort.OrtValue.ortvalue_from_numpy(array))
    step.bind_ortvalue_input(contract.INPUT_IDS, token)
    step.bind_ortvalue_output(contract.GREEDY_TOKENS, token)
    token.update_inplace(outputs[contract.LOGITS].numpy()[0].argmax(axis=-1, keepdims=True))
    answer = [int(token.numpy()[0, 0])]
    for total in range(length + 1, capacity):
        attend(total)
        decode.run_with_iobinding(step)
        answer.append(int(token.numpy()[0, 0]))
    assert answer == expected
