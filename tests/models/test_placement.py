"""Models with weights offloaded between calls by accelerate's hooks, against the same models in one place."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate.hooks import attach_align_device_hook

from tda_export.calibration.corpus import Corpus
from tda_export.calibration.magnitudes import row_norms
from tda_export.calibration.price_file import Priced, priced_tensors
from tda_export.calibration.price_run import PriceSettings, begin_priced, price_rows
from tda_export.calibration.prices import price_continuation, read_prompt, sampled_labels
from tda_export.calibration.run import CalibrationSettings, calibrate
from tda_export.errors import TdaError, UsageError
from tda_export.models import placement
from tda_export.models.layerwise import layer_module
from tda_export.models.placement import is_offloaded, module_device, own_memory, present, spread, weights_fetched_again
from tda_export.models.source import ModelSource, resolve_model
from tda_export.models.spec import DecoderSpec
from tda_export.packing import PACKINGS, row_bytes_of
from tda_export.quantization.run import quantize
from tda_export.quantization.settings import QuantizeSettings
from tests.calibration.shown import Shown
from tests.few_prices import few_prices  # noqa: F401 -- a fixture
from tests.tiny import FAMILIES

Family = Callable[[str], tuple[Any, DecoderSpec]]
TOKENS = torch.arange(5, 53).reshape(4, 12)
PROMPT = 8
TOO_LARGE = (
    r"^The model does not fit the memory of the GPUs and the CPU together\. Use a smaller --dtype, more GPUs, or"
)


def offload(model: Any, spec: DecoderSpec) -> Any:
    """Return a copy in which the head and all layers but the first have weights only during their calls."""
    model = copy.deepcopy(model)
    if not spec.tied_head:
        attach_align_device_hook(model.get_output_embeddings(), execution_device="cpu", offload=True)
    for layer in range(1, spec.num_layers):
        attach_align_device_hook(layer_module(model, spec, layer), execution_device="cpu", offload=True)
    return model


def priced(model: Any, spec: DecoderSpec) -> Priced:
    settings = PriceSettings(PROMPT, 2, 0, PACKINGS, head=True, refine_steps=2)
    begun = begin_priced(spec, settings, row_norms(model, spec), row_bytes_of(spec, 4, None, head=True), 4)
    return price_rows(model, spec, TOKENS, settings, begun, show=Shown())


@pytest.mark.parametrize("name", FAMILIES)
def test_prices_of_offloaded_layers(family: Family, name: str) -> None:
    """Norms, prices and their factors by backward passes, and tables by skipped rows, with packed matrices too."""
    model, spec = family(name)
    expected, found = (priced_tensors(priced(each, spec)) for each in (model, offload(model, spec)))
    for tensor, value in expected.items():
        assert torch.equal(found[tensor], value), tensor


def test_backward_passes_fetch_weights_again(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix of an offloaded layer is fetched once for each label, since the graph keeps none of them."""
    model, spec = family("llama-biases")
    model = offload(model, spec).requires_grad_(False)
    fetched: Counter[str] = Counter()
    fetch = placement._Elsewhere.fetch

    def counted(self: Any) -> torch.Tensor:
        fetched[self.name] += 1
        return fetch(self)

    monkeypatch.setattr(placement._Elsewhere, "fetch", counted)
    cache = read_prompt(model, TOKENS[0, :PROMPT])
    price_continuation(model, spec, cache, TOKENS[0, PROMPT:], sampled_labels(2, 0, 0))
    assert fetched["weight"] >= 2 * 7 * (spec.num_layers - 1)

    linear = layer_module(model, spec, 1).mlp.down_proj
    x = torch.randn(3, spec.ffn_size, requires_grad=True)
    with weights_fetched_again(model):
        y = linear(x)
    before = fetched["weight"]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert fetched["weight"] > before
    assert torch.equal(gradient, torch.ones_like(y) @ linear._hf_hook.weights_map["weight"])


def test_weights_are_present_in_the_block_alone(family: Family) -> None:
    model, spec = family("llama")
    own = layer_module(model, spec, 1).mlp.down_proj
    linear = layer_module(offload(model, spec), spec, 1).mlp.down_proj
    assert (is_offloaded(own), is_offloaded(linear)) == (False, True)
    assert module_device(own) == module_device(linear) == torch.device("cpu")
    with present(linear):
        weight = linear.weight.detach()
    assert linear.weight.device.type == "meta"
    with present(own):
        assert torch.equal(weight, own.weight)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> ModelSource:
    return resolve_model(str(tiny_model))


def test_calibration_of_a_spread_model(tiny: ModelSource) -> None:
    """Without a GPU the whole model is in the CPU's memory."""
    corpus, lengths = (
        Corpus(TOKENS, "some.txt", "0" * 64),
        {"prompt_tokens": PROMPT, "continuation_tokens": 4, "refine_steps": 2},
    )
    found = []
    for device in ("cpu", "auto"):
        calibration = calibrate(tiny, corpus, CalibrationSettings(device=device, **lengths), {}, show=Shown())  # type: ignore[arg-type]
        assert calibration.priced is not None
        found.append(priced_tensors(calibration.priced))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


def test_quantising_on_any_device(tiny: ModelSource) -> None:
    """Without a GPU, layers are on the CPU."""
    corpus = Corpus(TOKENS, "some.txt", "0" * 64)
    options = {"sequences": 3, "kl_sequences": 1, "prompt_tokens": PROMPT, "continuation_tokens": 4}
    one, other = (
        quantize(tiny, corpus, QuantizeSettings(device=device, **options), show=Shown())  # type: ignore[arg-type]
        for device in ("cpu", "auto")
    )
    assert one.loss == other.loss
    assert all((codes.codes == other.codes[name].codes).all() for name, codes in one.codes.items())


def test_a_model_that_is_too_large(tiny: ModelSource) -> None:
    with pytest.raises(TdaError, match=TOO_LARGE):
        tiny.reference(device="auto", memory={"cpu": 100_000})
    with pytest.raises(TdaError, match=TOO_LARGE):
        spread(tiny.reference(), {"cpu": 100_000})


def test_without_accelerate(tiny: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    message = (
        r"^--device auto spreads a model with accelerate, which is missing here\. Install it with 'pip install "
        r"accelerate'\.$"
    )
    with pytest.raises(TdaError, match=message):
        tiny.reference(device="auto")


def test_shares_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes get two of 5 GPUs each, and half of the CPU's memory."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: ((gpu + 1) * 1000, 10**6))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=900))
    assert own_memory() == {0: 850, 1: 1700, 2: 2550, 3: 3400, 4: 4250, "cpu": 900}
    assert own_memory(1, 2) == {2: 2550, 3: 3400, "cpu": 450}


def test_what_is_not_done_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = r"^--device auto calibrates prices only\. Give --method priced, or --device cuda\.$"
    with pytest.raises(UsageError, match=message):
        CalibrationSettings(device="auto", method="all")
    with pytest.raises(UsageError, match=r"^--dtype fp16 on the CPU is slow and imprecise\. Use fp32, or"):
        CalibrationSettings(device="auto", dtype="fp16")
