"""FFNs that drop neurons, against the reference of the graph's tests and explicit loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tda_export.calibration.dense import Blended
from tda_export.calibration.masked import LayerRun, Masking, choose_masking, masked_kl, two_level_ffn
from tda_export.graph.reference import SecondLevel, masked_ffn, reference_scores, reference_tails
from tests.calibration.kl_case import PROMPT, KlCase, make_case, read_case, seen_by_ffns


@pytest.fixture(scope="module", params=["llama", "llama-biases", "mistral-window", "qwen2"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KlCase:
    return make_case(tmp_path_factory.mktemp("masked"), request.param, sequences=2)


def half_masking(case: KlCase, number: int = 0, token: float = 0.05) -> Masking:
    """Mask about half of the neurons of a sequence; of these, skip some for each token."""
    blended = case.blended[number]
    thresholds = torch.full((case.spec.num_layers,), token)
    return choose_masking(case.down, blended, blended.score_square.median(dim=1).values, thresholds, case.scale)


def full_masking(case: KlCase) -> Masking:
    nothing = torch.zeros(case.spec.num_layers)
    return choose_masking(case.down, case.blended[0], nothing, nothing, case.scale)


def logits(case: KlCase, number: int = 0) -> torch.Tensor:
    sequence = case.sequences[number]
    with torch.no_grad():
        return case.model(sequence.continuation, past_key_values=sequence.cache(), use_cache=True).logits[0]


def test_logits_are_those_of_the_reference(case: KlCase) -> None:
    masking = half_masking(case)
    second = SecondLevel(list(case.scale), masking.token_thresholds.tolist())
    with masked_ffn(case.model, case.spec, list(masking.keep.float()), list(masking.tail), second):
        expected = logits(case)
    with two_level_ffn(case.model, case.spec, masking):
        found = logits(case)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, logits(case), atol=1e-2)


def test_outputs_are_sums_over_surviving_neurons(case: KlCase) -> None:
    masking = half_masking(case)
    with two_level_ffn(case.model, case.spec, masking), seen_by_ffns(case.model) as seen:
        logits(case)
    skipped = 0
    for layer, block in enumerate(case.model.model.layers):
        x, output = seen[layer]
        with torch.no_grad():
            gate = torch.nn.functional.silu(block.mlp.gate_proj(x)).double()
            up = block.mlp.up_proj(x).double()
        for token in range(len(x)):
            expected = masking.tail[layer].double()
            if block.mlp.down_proj.bias is not None:
                expected = expected + block.mlp.down_proj.bias.detach().double()
            for neuron in range(case.spec.ffn_size):
                estimate = abs(float(gate[token, neuron])) * float(case.scale[layer, neuron])
                if masking.keep[layer, neuron] and estimate >= float(masking.token_thresholds[layer]):
                    weight = block.mlp.down_proj.weight[:, neuron].detach().double()
                    expected = expected + gate[token, neuron] * up[token, neuron] * weight
                else:
                    skipped += int(masking.keep[layer, neuron])
            torch.testing.assert_close(output[token].double(), expected, rtol=1e-4, atol=1e-5)
    assert skipped


def test_nothing_dropped_is_dense_to_the_bit(case: KlCase) -> None:
    dense = logits(case)
    masking = full_masking(case)
    assert masking.keep.all()
    assert not masking.tail.any()
    with two_level_ffn(case.model, case.spec, masking):
        assert torch.equal(logits(case), dense)
        assert abs(float(masked_kl(case.model, case.sequences[0]))) < 1e-5


def test_masks_and_tails_are_those_of_prefill(case: KlCase) -> None:
    alone = read_case(case.model, case.spec, case.tokens, prior_tokens=0.0)
    prompt = case.tokens[1, :PROMPT].tolist()
    scores = torch.stack(reference_scores(case.model, case.spec, prompt, magnitude=True))
    ordered = scores.sort(dim=1).values
    thresholds = (ordered[:, 40] + ordered[:, 41]) / 2
    masking = choose_masking(alone.down, alone.blended[1], thresholds.square(), torch.zeros(3), alone.scale)
    assert torch.equal(masking.keep, scores >= thresholds[:, None])
    tails = torch.stack(reference_tails(case.model, case.spec, prompt, list(masking.keep)))
    torch.testing.assert_close(masking.tail, tails, rtol=1e-4, atol=1e-6)


def test_the_tail_is_the_mean_of_what_was_dropped(kl_case: KlCase) -> None:
    blended = kl_case.blended[0]
    masking = half_masking(kl_case)
    for layer, down in enumerate(kl_case.down):
        expected = torch.zeros(down.shape[0], dtype=torch.float64)
        for neuron in range(kl_case.spec.ffn_size):
            if not masking.keep[layer, neuron]:
                expected += down[:, neuron].double() * float(blended.mean_activation[layer, neuron])
        torch.testing.assert_close(masking.tail[layer].double(), expected, rtol=1e-4, atol=1e-6)


def test_everything_dropped_leaves_the_tail_alone(kl_case: KlCase) -> None:
    layers = kl_case.spec.num_layers
    masking = choose_masking(
        kl_case.down, kl_case.blended[0], torch.full((layers,), 2.0), torch.zeros(layers), kl_case.scale
    )
    assert not masking.keep.any()
    with two_level_ffn(kl_case.model, kl_case.spec, masking), seen_by_ffns(kl_case.model) as seen:
        logits(kl_case)
    for layer in range(layers):
        torch.testing.assert_close(seen[layer][1], masking.tail[layer].expand_as(seen[layer][1]))


def test_layers_that_are_not_named_stay_dense(kl_case: KlCase) -> None:
    masking, full = half_masking(kl_case), full_masking(kl_case)
    alone = {name: getattr(full, name).clone() for name in ("keep", "tail", "token_thresholds")}
    for name, tensor in alone.items():
        tensor[1] = getattr(masking, name)[1]
    with two_level_ffn(kl_case.model, kl_case.spec, Masking(scale=kl_case.scale, **alone)):
        expected = logits(kl_case)
    with two_level_ffn(kl_case.model, kl_case.spec, masking, layers=range(1, 2)):
        assert torch.equal(logits(kl_case), expected)


def test_hooks_are_gone_even_after_a_failure(kl_case: KlCase) -> None:
    dense = logits(kl_case)
    with pytest.raises(KeyboardInterrupt), two_level_ffn(kl_case.model, kl_case.spec, half_masking(kl_case)):
        raise KeyboardInterrupt
    assert torch.equal(logits(kl_case), dense)


def test_observers_see_every_layer_and_its_gradient(kl_case: KlCase) -> None:
    masking = half_masking(kl_case)
    runs: dict[int, LayerRun] = {}
    with two_level_ffn(kl_case.model, kl_case.spec, masking, runs.__setitem__):
        masked_kl(kl_case.model, kl_case.sequences[0]).backward()
    assert sorted(runs) == [0, 1, 2]
    for layer, run in runs.items():
        assert torch.equal(run.used.detach()[0], run.h * run.survivors)
        assert torch.equal(run.survivors, masking.keep[layer] & (run.estimates >= masking.token_thresholds[layer]))
        assert run.used.grad is not None
        assert run.used.grad[0][~run.survivors].abs().sum() > 0  # dropped neurons have a price too
    assert all(parameter.grad is None for parameter in kl_case.model.parameters())


def test_the_divergence_is_the_mean_over_tokens(kl_case: KlCase) -> None:
    with two_level_ffn(kl_case.model, kl_case.spec, half_masking(kl_case)):
        sparse, found = logits(kl_case), masked_kl(kl_case.model, kl_case.sequences[0])
    p, q = logits(kl_case).double().softmax(dim=-1), sparse.double().softmax(dim=-1)
    expected = 0.0
    for token in range(len(p)):
        expected += sum(float(a * (a / b).log()) for a, b in zip(p[token], q[token], strict=True)) / len(p)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-3)


def test_small_divergences_survive_the_rounding_of_dense_probabilities(kl_case: KlCase) -> None:
    blended = kl_case.blended[0]
    second = blended.score_square.sort(dim=1).values[:, 1]
    masking = choose_masking(kl_case.down, blended, second, torch.zeros(3), kl_case.scale)
    last = range(2, 3)
    with torch.no_grad(), two_level_ffn(kl_case.model, kl_case.spec, masking, layers=last):
        sparse, found = logits(kl_case), float(masked_kl(kl_case.model, kl_case.sequences[0]))
    p, q = logits(kl_case).double().log_softmax(dim=-1), sparse.double().log_softmax(dim=-1)
    expected = float((p.exp() * (p - q)).sum(dim=-1).mean())
    assert 0 < expected < 1e-3
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(kl_case: KlCase, tmp_path: Path, dtype: torch.dtype) -> None:
    case = make_case(tmp_path, dtype=dtype)
    masking = half_masking(kl_case)
    kls = []
    for one in (kl_case, case):
        with torch.no_grad(), two_level_ffn(one.model, one.spec, masking):
            kls.append(float(masked_kl(one.model, one.sequences[0])))
    assert kls[1] == pytest.approx(kls[0], rel=0.1)


def test_scores_at_the_threshold_are_kept() -> None:
    blended = Blended(torch.tensor([[0.1, 0.2, 0.3]]), torch.ones(1, 3))
    masking = choose_masking([torch.eye(3)], blended, torch.tensor([0.2]), torch.zeros(1), torch.ones(1, 3))
    assert masking.keep.tolist() == [[False, True, True]]
    assert masking.tail.tolist() == [[1.0, 0.0, 0.0]]
