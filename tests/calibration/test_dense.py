"""Statistics of dense sequences against transformers' own states and brute force."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tda_export.calibration.dense import DenseSequence, NeuronSums, blend, read_dense
from tests.calibration.kl_case import CONTINUATION, PROMPT, KlCase, make_case, seen_by_ffns

FAMILIES = ["llama", "llama-biases", "llama-multi-head", "mistral-window", "qwen2"]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KlCase:
    return make_case(tmp_path_factory.mktemp("dense"), request.param, sequences=2)


def direct_sums(case: KlCase, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute r_i(t)^2 and h_i(t) of a whole sequence in one pass and token by token, float64 [L, T, F] each."""
    squares, activations = [], []
    with torch.no_grad(), seen_by_ffns(case.model) as seen:
        case.model(case.tokens[number][None])
        for layer, block in enumerate(case.model.model.layers):
            h = (
                torch.nn.functional.silu(block.mlp.gate_proj(seen[layer][0])) * block.mlp.up_proj(seen[layer][0])
            ).double()
            norms = [float(column.norm()) for column in block.mlp.down_proj.weight.double().T]
            rows = []
            for token in h:
                magnitudes = torch.tensor([abs(float(value)) * norm for value, norm in zip(token, norms, strict=True)])
                rows.append((magnitudes / magnitudes.norm()) ** 2)
            squares.append(torch.stack(rows).double())
            activations.append(h)
    return torch.stack(squares), torch.stack(activations)


def test_sums_are_those_of_one_pass_without_the_first_token(case: KlCase) -> None:
    squares, activations = direct_sums(case, 1)
    read = case.sequences[1]
    for sums, part in ((read.prompt, slice(1, PROMPT)), (read.rest, slice(PROMPT, None))):
        torch.testing.assert_close(sums.score_square.double(), squares[:, part].sum(dim=1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(sums.activation.double(), activations[:, part].sum(dim=1), rtol=1e-4, atol=1e-4)
        assert sums.tokens == squares[:, part].shape[1]


def test_log_probabilities_are_those_of_one_pass(case: KlCase) -> None:
    for tokens, read in zip(case.tokens, case.sequences, strict=True):
        with torch.no_grad():
            expected = case.model(tokens[None]).logits[0, PROMPT:].log_softmax(dim=-1)
        assert read.log_probs.dtype == torch.float16
        torch.testing.assert_close(read.log_probs.float(), expected, rtol=2**-10, atol=1e-3)
        assert torch.equal(read.continuation[0], tokens[PROMPT:])


def test_every_pass_gets_a_fresh_cache(case: KlCase) -> None:
    read = case.sequences[0]
    with torch.no_grad():
        first, second = (
            case.model(read.continuation, past_key_values=read.cache(), use_cache=True).logits for _ in range(2)
        )
    assert torch.equal(first, second)
    assert read.cache().get_seq_length() == PROMPT


def test_sequences_are_told_one_by_one(kl_case: KlCase) -> None:
    told: list[int] = []
    read_dense(kl_case.model, kl_case.spec, kl_case.tokens[:3], PROMPT, told.append)
    assert told == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_float32_sums(kl_case: KlCase, tmp_path: Path, dtype: torch.dtype) -> None:
    half = make_case(tmp_path, dtype=dtype).sequences[0]
    full = kl_case.sequences[0]
    assert half.prompt.score_square.dtype == torch.float32
    torch.testing.assert_close(half.prompt.score_square, full.prompt.score_square, rtol=0.1, atol=0.02)
    torch.testing.assert_close(half.log_probs, full.log_probs, rtol=0.02, atol=0.1)


def sequence_of(prompt: NeuronSums, rest: NeuronSums) -> DenseSequence:
    return DenseSequence(torch.zeros(1, 0), torch.zeros(0, 0), prompt, rest, None)


def random_sequences(seed: int, number: int) -> list[DenseSequence]:
    generator = torch.Generator().manual_seed(seed)

    def sums(tokens: int) -> NeuronSums:
        # Over many orders of magnitude, like scores.
        squares = 10 ** (-8 * torch.rand(2, 5, generator=generator))
        return NeuronSums(squares, torch.randn(2, 5, generator=generator), tokens)

    return [sequence_of(sums(3 + i), sums(4)) for i in range(number)]


@given(seed=st.integers(0, 2**32), number=st.integers(2, 5), prior=st.floats(0.01, 1000))
def test_the_prior_is_the_mean_over_the_other_sequences(seed: int, number: int, prior: float) -> None:
    sequences = random_sequences(seed, number)
    for i, found in enumerate(blend(sequences, prior)):
        others = [part for j, other in enumerate(sequences) if j != i for part in (other.prompt, other.rest)]
        tokens = sum(part.tokens for part in others)
        own = sequences[i].prompt
        for name, blended in (("score_square", found.score_square), ("activation", found.mean_activation)):
            mean = torch.stack([getattr(part, name).double() for part in others]).sum(dim=0) / tokens
            expected = (getattr(own, name).double() + prior * mean) / (own.tokens + prior)
            torch.testing.assert_close(blended, expected.float(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(("number", "prior"), [(1, 64.0), (3, 0.0)])
def test_without_others_or_prior_tokens_a_prompt_stands_alone(number: int, prior: float) -> None:
    sequences = random_sequences(0, number)
    for sequence, found in zip(sequences, blend(sequences, prior), strict=True):
        torch.testing.assert_close(found.score_square, sequence.prompt.score_square / sequence.prompt.tokens)
        torch.testing.assert_close(found.mean_activation, sequence.prompt.activation / sequence.prompt.tokens)


def test_small_scores_of_others_survive_a_large_one_of_the_prompt_s_own() -> None:
    nothing = torch.zeros(1, 1)
    small = [sequence_of(NeuronSums(torch.full((1, 1), 1e-8), nothing, 2), NeuronSums(nothing, nothing, 2))] * 3
    large = sequence_of(NeuronSums(nothing, nothing, 2), NeuronSums(torch.ones(1, 1), nothing, 2))
    found = blend([*small, large], 4.0)[-1]
    torch.testing.assert_close(found.score_square, torch.full((1, 1), 4 * 3e-8 / 12 / 6))


def test_continuations_have_their_length(kl_case: KlCase) -> None:
    for sequence in kl_case.sequences:
        assert sequence.log_probs.shape == (CONTINUATION, kl_case.spec.vocab_size)
        assert sequence.rest.tokens == CONTINUATION
