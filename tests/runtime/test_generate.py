"""Generation against transformers, and its ends."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tda_export.calibration.file import read_calibration
from tda_export.errors import UsageError
from tda_export.ffn_share import GATED
from tda_export.graph import contract
from tda_export.graph.reference import masked_ffn
from tda_export.models.source import ModelSource
from tda_export.runtime import Model, Sampling, Token, load
from tda_export.runtime.deployment import Deployment, Refresh, one_level
from tests.runtime.conftest import (
    PROMPT,
    edit_manifest,
    mask_alone,
    prompt_mask,
    reference_mask,
    second_level,
)

PROMPTS = [PROMPT, "def add(a, b):\n    return", "In 1871 a watchmaker built a clock for the museum."]
NEURONS = 3 * 96


def ids(model: Model, prompt: Any, **options: Any) -> list[int]:
    return [token.id for token in model.generate(prompt, **options)]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["sea", "code", "clock"])
def test_dense_greedy_equals_transformers(model: Model, reference: Any, prompt: str) -> None:
    tokens = torch.tensor([model.text.encode(prompt)])
    with torch.inference_mode():
        expected = reference.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=64, pad_token_id=0
        )[0, tokens.shape[1] :].tolist()
    if expected[-1] in model.artifact.eos_token_ids:
        expected.pop()
    assert len(expected) > 32  # otherwise this compares too little
    assert ids(model, prompt, mask="dense", max_new_tokens=64) == expected


@pytest.mark.parametrize("levels", [1, 2], ids="levels={}".format)
@pytest.mark.parametrize("prompt", PROMPTS, ids=["sea", "code", "clock"])
def test_masked_greedy_equals_masked_transformers(
    model: Model, source: ModelSource, reference: Any, prompt: str, levels: int
) -> None:
    """The slow reference: dense prefill, then every token with the mask's neurons, or those that it keeps of them."""
    masks, tails = reference_mask(model, prompt_mask(model, prompt))
    own = model.artifact.deployment
    assert own.token_thresholds.all()
    level = second_level(model, own.token_thresholds) if levels == 2 else None
    expected: list[int] = []
    with torch.inference_mode():
        output = reference(torch.tensor([model.text.encode(prompt)]), use_cache=True)
        with masked_ffn(reference, source.spec, masks, tails, level):
            while len(expected) < 64 and (token := int(output.logits[0, -1].argmax())) not in (2,):
                expected.append(token)
                output = reference(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
    chosen = {1: mask_alone(model), 2: None}
    ours = ids(model, prompt, max_new_tokens=64, deployment=chosen[levels])
    assert ours == expected
    assert ours != ids(model, prompt, mask="dense", max_new_tokens=64)  # the mask has an effect
    assert ours != ids(model, prompt, max_new_tokens=64, deployment=chosen[3 - levels])  # so have token thresholds


def test_iterating_gives_tokens(model: Model) -> None:
    generation = model.generate(PROMPT, max_new_tokens=8)
    assert (generation.text, generation.metrics.new_tokens) == ("", 0)
    text = ""
    for count, token in enumerate(generation, start=1):
        assert isinstance(token, Token)
        text += token.text
        assert (generation.text, generation.metrics.new_tokens) == (text, count)
    assert count == 8
    assert list(generation) == []


def test_generations_are_independent(model: Model) -> None:
    """Two at once, token by token, give the same as one after the other."""
    alone = [ids(model, prompt, max_new_tokens=40) for prompt in PROMPTS[:2]]
    together = zip(*(model.generate(prompt, max_new_tokens=40) for prompt in PROMPTS[:2]), strict=True)
    assert [[token.id for token in tokens] for tokens in zip(*together, strict=True)] == alone


@pytest.mark.parametrize("prompt_tokens", [1, 30, 39])
@pytest.mark.parametrize("mask", ["tda", "dense"])
def test_stops_at_the_context(model: Model, prompt_tokens: int, mask: Any) -> None:
    """`context` is the maximum of tokens of prompt and answer together."""
    generation = model.generate([50] * prompt_tokens, context=40, mask=mask, max_new_tokens=100)
    tokens = [token.id for token in generation]
    assert generation.metrics.finish_reason == "context"
    assert prompt_tokens + len(tokens) == 40
    assert tokens == ids(model, [50] * prompt_tokens, mask=mask, max_new_tokens=len(tokens))


def test_stops_at_the_models_maximum(model: Model) -> None:
    generation = model.generate([50] * 500, max_new_tokens=100)
    assert len(list(generation)) == 12
    assert generation.metrics.finish_reason == "context"


@pytest.mark.parametrize("limit", [1, 7])
def test_stops_at_the_length(model: Model, limit: int) -> None:
    generation = model.generate(PROMPT, max_new_tokens=limit)
    assert len(list(generation)) == limit
    assert generation.metrics.finish_reason == "length"


@pytest.mark.parametrize("position", [0, 5])
def test_stops_at_any_end_token(model: Model, artifact_copy: Path, position: int) -> None:
    tokens = ids(model, PROMPT, max_new_tokens=32)
    end = tokens[position]
    edit_manifest(artifact_copy, lambda manifest: manifest["model"].update(eos_token_ids=[258, end]))
    generation = load(artifact_copy, provider="cpu").generate(PROMPT, max_new_tokens=32)
    assert [token.id for token in generation] == tokens[: tokens.index(end)]
    assert generation.metrics.finish_reason == "stop"
    assert generation.metrics.new_tokens == tokens.index(end)


@pytest.mark.parametrize("position", [0, 5])
def test_stops_at_given_tokens_too(model: Model, artifact_copy: Path, position: int) -> None:
    """Like the model's own, which can be ignored, they are not part of the answer."""
    tokens = ids(model, PROMPT, max_new_tokens=32)
    own, given = tokens[position + 3], tokens[position]
    edit_manifest(artifact_copy, lambda manifest: manifest["model"].update(eos_token_ids=[own]))
    other = load(artifact_copy, provider="cpu")
    for options, expected in (
        ({"stop_token_ids": [258, given]}, tokens[: min(tokens.index(given), tokens.index(own))]),
        ({"ignore_eos": True}, tokens),
        ({"ignore_eos": True, "stop_token_ids": [given]}, tokens[: tokens.index(given)]),
    ):
        generation = other.generate(PROMPT, max_new_tokens=32, **options)  # type: ignore[arg-type]
        assert [token.id for token in generation] == expected
        assert generation.metrics.finish_reason == ("length" if expected == tokens else "stop")


@pytest.mark.parametrize("token", [-1, 259])
def test_stop_tokens_outside_the_vocabulary(model: Model, token: int) -> None:
    with pytest.raises(UsageError, match=rf"Stop token {token} is not in the vocabulary: ids lie in \[0, 259\)"):
        model.generate(PROMPT, stop_token_ids=[5, token])


@pytest.mark.parametrize("end", ["length", "context", "stop"])
@pytest.mark.parametrize("content", ["a", "é", "世", "naïve 世界 👩‍👩‍👧"])
def test_text_is_the_decode_of_all_tokens(
    model: Model, monkeypatch: pytest.MonkeyPatch, content: str, end: str
) -> None:
    """Wherever the model stops, also in the middle of a character."""
    answer = model.text.encode(content)
    for length in range(1, len(answer) + 1):
        script = iter([*answer[:length], 2])
        monkeypatch.setattr("tda_export.runtime.model.make_sampler", lambda sampling, s=script: lambda _: next(s))
        limits = {"length": {"max_new_tokens": length}, "context": {"context": len(PROMPT) + length}, "stop": {}}
        generation = model.generate(PROMPT, **limits[end])
        tokens = list(generation)
        assert [token.id for token in tokens] == answer[:length]
        assert generation.metrics.finish_reason == end
        assert generation.text == content.encode()[:length].decode(errors="replace")
        # The pieces make the text, except an unfinished character at the end, which no token brings.
        pieces = "".join(token.text for token in tokens)
        assert pieces == (generation.text.rstrip("\N{REPLACEMENT CHARACTER}") if end == "stop" else generation.text)


@pytest.mark.parametrize("end", ["length", "context", "stop"])
def test_stop_strings_end_the_text(model: Model, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Across tokens, which here are bytes. No token brings a part of a stop string, whatever ends the generation."""
    content = "naïve ## 世界 ### rest"
    answer = model.text.encode(content)
    limits: dict[str, Any]
    for length in range(1, len(answer) + 1):
        script = iter([*answer[:length], 2])
        monkeypatch.setattr("tda_export.runtime.model.make_sampler", lambda sampling, s=script: lambda _: next(s))
        limits = {"length": {"max_new_tokens": length}, "context": {"context": len(PROMPT) + length}, "stop": {}}[end]
        generation = model.generate(PROMPT, stop=["###", "World"], **limits)
        pieces = "".join(token.text for token in generation)
        said = content.encode()[:length].decode(errors="replace")
        whole = "###" in said
        assert generation.text == said.partition("###")[0]
        assert generation.metrics.finish_reason == ("stop" if whole else end)
        assert generation.metrics.new_tokens == min(length, content.encode().index(b"###") + 3)
        assert generation.text.startswith(pieces)
        if end != "stop":
            assert pieces == generation.text


@pytest.mark.parametrize("limits", [{"max_new_tokens": 2}, {"context": len(PROMPT) + 2}], ids=["length", "context"])
def test_a_stop_string_that_the_end_completes(
    model: Model, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    """The replacement of an unfinished character counts as text."""
    script = iter([*model.text.encode("a"), model.text.encode("é")[0]])
    monkeypatch.setattr("tda_export.runtime.model.make_sampler", lambda sampling: lambda _: next(script))
    generation = model.generate(PROMPT, stop=["a\N{REPLACEMENT CHARACTER}"], **limits)  # type: ignore[arg-type]
    assert [token.text for token in generation] == ["", ""]
    assert (generation.text, generation.metrics.finish_reason) == ("", "stop")


def test_repetition_penalty_equals_transformers(model: Model, reference: Any) -> None:
    tokens = torch.tensor([model.text.encode(PROMPT)])
    with torch.inference_mode():
        expected = reference.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=48,
            pad_token_id=0,
            repetition_penalty=1.3,
        )[0, tokens.shape[1] :].tolist()
    if expected[-1] in model.artifact.eos_token_ids:
        expected.pop()
    assert len(expected) > 24
    sampling = Sampling(repetition_penalty=1.3)
    assert ids(model, PROMPT, mask="dense", max_new_tokens=48, sampling=sampling) == expected
    assert ids(model, PROMPT, mask="dense", max_new_tokens=48) != expected


@pytest.mark.parametrize("refresh", [0, 3])
def test_repetition_penalty_keeps_a_mask_and_its_refreshes(model: Model, refresh: int) -> None:
    """A penalty near 1 gives the same as greedy steps on the device. A large one repeats nothing."""
    how = model.artifact.deployment.with_refresh(Refresh(refresh))
    greedy = ids(model, PROMPT, max_new_tokens=24, deployment=how)
    near = Sampling(repetition_penalty=1 + 1e-7)
    assert ids(model, PROMPT, max_new_tokens=24, deployment=how, sampling=near) == greedy
    unlike = ids(model, PROMPT, max_new_tokens=24, deployment=how, sampling=Sampling(repetition_penalty=100.0))
    assert len({*unlike, *model.text.encode(PROMPT)}) == len(unlike) + len(set(model.text.encode(PROMPT)))


def test_repetition_penalty_comes_before_sampling(model: Model) -> None:
    """A tiny temperature takes the likeliest token after the penalty."""
    greedy = ids(model, PROMPT, max_new_tokens=24, sampling=Sampling(repetition_penalty=1.5))
    sampled = Sampling(temperature=1e-9, seed=0, repetition_penalty=1.5)
    assert ids(model, PROMPT, max_new_tokens=24, sampling=sampled) == greedy


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_cancelled_generation_ends_before_its_next_token(tiny_artifact: Path, after: int) -> None:
    model = load(tiny_artifact, provider="cpu")
    generation = model.generate(PROMPT, memory=model.memory() if after == 0 else None)
    for _ in range(after):
        next(generation)
    assert not generation.cancelled
    generation.cancel()
    assert list(generation) == []
    assert generation.cancelled
    assert (generation.metrics.new_tokens, generation.metrics.finish_reason) == (after, "")
    if after:
        assert model._idle is not None  # its step is free


def test_threshold_zero_is_dense(model: Model) -> None:
    generation = model.generate(PROMPT, deployment=one_level([0.0] * 3, 3, GATED), max_new_tokens=32)
    assert [token.id for token in generation] == ids(model, PROMPT, mask="dense", max_new_tokens=32)
    assert generation.metrics.density == 1.0


def test_threshold_beyond_every_score_keeps_nothing(model: Model) -> None:
    generation = model.generate(PROMPT, deployment=one_level([2.0] * 3, 3, GATED), max_new_tokens=8)
    assert len(list(generation)) == 8
    metrics = generation.metrics
    assert (metrics.density, metrics.sparsity, metrics.bytes_per_token) == (0.0, 1.0, 0)


def test_deployment_of_the_artifact_is_the_default(model: Model) -> None:
    manifest = model.artifact.manifest
    own = Deployment(
        np.asarray(manifest["thresholds"], np.float32),
        np.asarray(manifest["token_thresholds"], np.float32),
        survivors=np.asarray(manifest["survivors"], np.float32),
        ffn_matrices=GATED,
    )
    ours, default = (model.generate(PROMPT, max_new_tokens=24, deployment=how) for how in (own, None))
    assert [token.id for token in ours] == [token.id for token in default]
    assert ours.metrics.sparsity == default.metrics.sparsity


def test_one_token_prompt_is_dense_without_a_prior(model: Model) -> None:
    how = dataclasses.replace(model.artifact.deployment, prior=False, token_thresholds=np.zeros(3, np.float32))
    generation = model.generate("T", max_new_tokens=16, deployment=how)
    assert [token.id for token in generation] == ids(model, "T", mask="dense", max_new_tokens=16)
    assert generation.metrics.density == 1.0


def test_one_token_prompt_leans_on_the_prior(model: Model) -> None:
    """Its mask comes from the calibration's statistics."""
    calibration = read_calibration(model.artifact.file(contract.CALIBRATION_FILE))
    scores = (calibration.sums.score_square / calibration.sums.tokens).sqrt()  # [L, F]
    expected = int((scores >= torch.tensor(model.artifact.manifest["thresholds"])[:, None]).sum())
    generation = model.generate("T", max_new_tokens=16)
    assert [token.id for token in generation] != ids(model, "T", mask="dense", max_new_tokens=16)
    assert generation.metrics.density == pytest.approx(expected / NEURONS)
    assert 0 < expected < NEURONS


@pytest.mark.parametrize("close", [True, False], ids=["closed", "dropped"])
def test_a_generation_left_half_way_gives_its_step_back(tiny_artifact: Path, close: bool) -> None:
    """At once, and not at Python's next collection of cycles, because it holds a KV cache."""
    model = load(tiny_artifact, provider="cpu")
    gc.disable()
    try:
        generation = model.generate(PROMPT)
        next(generation)
        assert model._idle is None
        if close:
            generation.close()
            assert list(generation) == []
        else:
            del generation
        assert model._idle is not None
    finally:
        gc.enable()
