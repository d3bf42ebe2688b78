"""Answers with a lookup, against the slow reference: the same answers without it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tda_export.errors import UsageError
from tda_export.graph.storage import Storage
from tda_export.models.source import ModelSource
from tda_export.runtime import Conversation, Generation, Model, Sampling, Token, load
from tda_export.runtime.deployment import PriceDeployment, Refresh
from tda_export.runtime.lookup import LONGEST_MATCH, MOST_DRAFTS, SHORTEST_MATCH, Lookahead, TextIndex, next_length
from tda_export.runtime.priced import PricedStep
from tests.graph.test_integers import build, rounded
from tests.graph.test_priced import source_of  # noqa: F401 - a fixture

PHRASE = list(b"the sea is calm, ")
SOME_FAMILIES = ("llama-biases", "qwen2-window", "gemma2", "opt", "gpt-neox", "smollm3")
texts = st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=9), min_size=1, max_size=6).map(
    lambda phrases: [token for phrase in phrases for token in phrase * 2]
)


# Drafts


def slow_draft(tokens: list[int], most: int) -> list[int]:
    """Search the longest end of the text at every earlier place, the newest first, and copy from there."""
    for length in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
        for place in range(len(tokens) - 1, length - 1, -1):
            if len(tokens) > length and tokens[place - length : place] == tokens[-length:]:
                text = list(tokens)
                for i in range(most):
                    text.append(text[place + i])
                return text[len(tokens) :]
    return []


@given(tokens=st.lists(st.integers(0, 2), max_size=40), before=st.integers(0, 40), most=st.integers(0, 15))
def test_drafts_are_those_of_the_slow_search(tokens: list[int], before: int, most: int) -> None:
    index = TextIndex(tokens[:before])
    for token in tokens[before:]:
        index.add(token)
    assert index.draft(most) == slow_draft(tokens, most)


def test_a_text_that_repeats_itself_is_drafted_to_any_length() -> None:
    assert TextIndex([7, 8, 9, 7, 8, 9, 7]).draft(8) == [8, 9, 7, 8, 9, 7, 8, 9]
    assert TextIndex([7, 7, 7]).draft(3) == [7, 7, 7]
    assert TextIndex([7, 8, 9, 10]).draft(3) == []


def test_only_what_was_chosen_is_confirmed() -> None:
    ahead = Lookahead([5, 6, 7, 8], ["a", "b", "c"])  # a step that has read three of four
    assert (ahead.drafted, ahead.following) == (2, "a")
    assert not ahead.confirm(7)
    assert [ahead.confirm(6), ahead.following] == [True, "b"]
    assert [ahead.confirm(7), ahead.following] == [True, "c"]
    assert not ahead.confirm(8)
    assert ahead.accepted == 2
    assert not Lookahead().confirm(5)


def test_the_length_of_drafts_follows_what_comes_of_them() -> None:
    def tried(drafted: int, right: int) -> Lookahead[int]:
        ahead = Lookahead(list(range(drafted + 1)), list(range(drafted + 1)))
        for token in range(1, right + 1):
            assert ahead.confirm(token)
        return ahead

    assert [next_length(2, tried(2, 2), most) for most in (15, 3, 1)] == [4, 3, 1]
    assert [next_length(4, tried(4, right), 15) for right in (0, 1, 3)] == [1, 1, 3]
    assert next_length(4, tried(2, 2), 15) == 8  # shortened by a refresh or an end, and accepted
    assert [next_length(6, nothing, 5) for nothing in (tried(0, 0), Lookahead[int]())] == [5, 5]


# Answers


def whole(generation: Generation) -> tuple[list[Token], str, dict[str, Any]]:
    """Return the visible parts of an answer: tokens with texts, the text, and metrics except times and steps."""
    tokens = list(generation)
    metrics = dataclasses.asdict(generation.metrics)
    steps, accepted = metrics.pop("decode_steps"), metrics.pop("accepted")
    metrics["decoded"] = steps + accepted  # each gave one token
    assert accepted <= metrics.pop("drafted")
    for name in ("time_to_first_token", "decode_seconds", "decode_tokens_per_second"):
        metrics.pop(name)
    return tokens, generation.text, metrics


def assert_same(model: Model, prompt: Any, lookup: int, **options: Any) -> int:
    """Require the same answer with and without a lookup. Return the number of accepted drafted tokens."""
    generation = model.generate(prompt, lookup=lookup, **options)
    assert whole(generation) == whole(model.generate(prompt, **options))
    return generation.metrics.accepted


@pytest.fixture(scope="module")
def built(
    source_of: Callable[[str], ModelSource],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], Model]:
    """Loads the artifact of a family's tiny model, with float weights or integers of four bits."""

    @functools.cache
    def model(family: str, weights: str) -> Model:
        source, folder = source_of(family), tmp_path_factory.mktemp("lookup") / family
        storage = rounded(source) if weights == "int4" else Storage("float32")
        return load(build(source, storage, folder), provider="cpu")

    return model


@pytest.mark.parametrize("weights", ["float", "int4"])
@pytest.mark.parametrize("family", SOME_FAMILIES)
@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(prompt=texts, lookup=st.integers(1, MOST_DRAFTS), price=st.sampled_from([0.0, 0.0, 0.05, 0.5, 2.0]))
def test_greedy_answers_of_families(
    family: str, weights: str, prompt: list[int], lookup: int, price: float, built: Callable[[str, str], Model]
) -> None:
    """At any price, for any text."""
    model = built(family, weights)
    assert_same(model, prompt, lookup, max_new_tokens=24, deployment=PriceDeployment(price), ignore_eos=True)


def without_borders(model: Model, how: PriceDeployment) -> PriceDeployment:
    """Return a deployment whose answers depend on no rounding, up to ties.

    Stock operators round differently for other numbers of tokens of a step. A row at the border of its price is then
    read or not, which changes logits far more. So their steps read every row here.
    """
    return how if model.sessions.native else model.at(price=0)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(prompt=texts, lookup=st.integers(1, MOST_DRAFTS), sparsity=st.sampled_from([0.0, 0.3, 0.5]))
def test_greedy_answers_at_a_budget(priced_model: Model, prompt: list[int], lookup: int, sparsity: float) -> None:
    how = without_borders(priced_model, priced_model.at(sparsity=sparsity))
    assert_same(priced_model, prompt, lookup, max_new_tokens=40, deployment=how)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    prompt=texts,
    lookup=st.integers(1, MOST_DRAFTS),
    mask=st.sampled_from(["tda", "dense"]),
    refresh=st.sampled_from([0, 2, 3, 7]),
)
def test_greedy_answers_under_masks(model: Model, prompt: list[int], lookup: int, mask: Any, refresh: int) -> None:
    how = dataclasses.replace(model.artifact.deployment, refresh=Refresh(refresh))
    assert_same(model, prompt, lookup, max_new_tokens=30, mask=mask, deployment=how)


def test_tokens_are_accepted(priced_model: Model, model: Model) -> None:
    """Otherwise these tests would compare nothing."""
    for each, how in ((priced_model, PriceDeployment(0)), (model, None)):
        generation = each.generate(PHRASE * 4, lookup=5, max_new_tokens=160, ignore_eos=True, deployment=how)
        assert len(list(generation)) == 160
        metrics = generation.metrics
        assert metrics.decode_steps + metrics.accepted == 159
        assert 0 < metrics.accepted <= metrics.drafted <= 5 * metrics.decode_steps
        assert metrics.decode_steps < 130
        assert metrics.decode_tokens_per_second == pytest.approx(159 / metrics.decode_seconds)


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(
    prompt=texts,
    lookup=st.integers(1, MOST_DRAFTS),
    temperature=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 9),
)
def test_sampled_answers(
    priced_model: Model, prompt: list[int], lookup: int, temperature: float, penalty: float, seed: int
) -> None:
    """The same random numbers are drawn for the same positions."""
    sampling = Sampling(temperature=temperature, seed=seed, repetition_penalty=penalty)
    assert isinstance(priced_model.artifact.deployment, PriceDeployment)
    how = without_borders(priced_model, priced_model.artifact.deployment)
    assert_same(priced_model, prompt, lookup, sampling=sampling, max_new_tokens=30, deployment=how)


@pytest.mark.parametrize("lookup", [1, 4, 15])
@pytest.mark.parametrize("limit", [1, 2, 3, 9, 40])
def test_ends_of_answers(priced_model: Model, lookup: int, limit: int) -> None:
    """By length, by a full context, by end tokens and by stop strings, also inside drafts."""
    prompt = PHRASE * 3
    tokens = [token.id for token in priced_model.generate(prompt, max_new_tokens=limit, ignore_eos=True)]
    text = priced_model.text.decode(tokens)
    same = functools.partial(assert_same, priced_model, prompt, lookup, ignore_eos=True)
    same(max_new_tokens=limit)
    same(max_new_tokens=100, context=len(prompt) + limit)
    same(max_new_tokens=100, stop_token_ids=tokens[-1:])
    if text:
        same(max_new_tokens=100, stop=[text[-3:], "never"])


def test_the_models_maximum(priced_model: Model) -> None:
    assert assert_same(priced_model, (PHRASE * 40)[:480], 15, max_new_tokens=100) > 0


@pytest.mark.parametrize("keep_answers", [False, True])
def test_what_stays_for_the_next_prompt(priced_model: Model, keep_answers: bool) -> None:
    """An answer that ended inside accepted drafts leaves the same cache as one without a lookup."""
    answers = []
    for lookup in (0, 6):
        memory, prompt, shown = priced_model.memory(keep_answers=keep_answers), PHRASE * 3, []
        for read in (3, 5, 11):
            generation = priced_model.generate(prompt, lookup=lookup, memory=memory, ignore_eos=True)
            tokens = [next(generation).id for _ in range(read)]
            generation.cancel()
            assert list(generation) == []
            shown.append((tokens, generation.metrics.reused_tokens))
            prompt = [*prompt, *tokens, *PHRASE]
        answers.append(shown)
    assert answers[0] == answers[1]


def test_conversations(priced_model: Model) -> None:
    texts = []
    for lookup in (0, 5):
        chat = Conversation(priced_model, lookup=lookup)
        for _ in range(2):
            list(chat.say("the sea is calm, the sea is calm", max_new_tokens=24))
        texts.append(chat.messages)
    assert texts[0] == texts[1]


def test_logits_that_are_not_finite(priced_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an accepted token they are an error at its position. For others they have no effect."""
    model = load(priced_artifact, provider="cpu")
    expected = whole(model.generate(PHRASE * 3, max_new_tokens=40))
    own = PricedStep.greedy_each

    def spoiled(step: PricedStep, tokens: list[int], *, ahead: bool) -> np.ndarray:
        chosen = own(step, tokens, ahead=ahead)
        certain = 1
        while certain < len(chosen) and tokens[certain] == chosen[certain - 1]:
            certain += 1
        chosen[certain:] = -1
        return chosen

    monkeypatch.setattr(PricedStep, "greedy_each", spoiled)
    assert whole(model.generate(PHRASE * 3, max_new_tokens=40, lookup=5)) == expected


@pytest.mark.parametrize("lookup", [3, 15])
def test_steps_of_one_size_as_captures_need(priced_artifact: Path, lookup: int) -> None:
    """Here on the CPU, which has no captures: drafts are padded, and left out if the padding does not fit."""
    expected = load(priced_artifact, provider="cpu")
    model = load(priced_artifact, provider="cpu")
    model.sessions.captures = True
    for tokens in (30, 100, 440):
        prompt = (PHRASE * 40)[:tokens]
        how = {"max_new_tokens": 80, "deployment": PriceDeployment(0)}
        generation = model.generate(prompt, lookup=lookup, **how)
        shown = whole(generation)
        assert shown == whole(expected.generate(prompt, **how))
        assert generation.metrics.accepted > 0
    with model.borrow_step(1) as step:
        assert sorted(step._widths) == [1, 1 + lookup]


@pytest.mark.parametrize("lookup", [-1, 16])
def test_lookups_out_of_range(priced_model: Model, lookup: int) -> None:
    for call in (
        lambda: priced_model.generate("The sea", lookup=lookup),
        lambda: Conversation(priced_model, lookup=lookup),
    ):
        with pytest.raises(UsageError, match=rf"A lookup of {lookup} tokens is outside \[0, 15\]\. Give 0 for none\."):
            call()
