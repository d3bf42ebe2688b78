"""The choice of the provider. Machines with and without a GPU are simulated, so that the tests pass on both."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tda_export.errors import TdaError, UsageError
from tda_export.runtime import cuda_stream, providers
from tda_export.runtime.providers import choose_provider, cuda_problem, provider_arguments

NO_GPU = "the NVIDIA driver finds no GPU here"


@pytest.fixture(params=[None, NO_GPU], ids=["with GPU", "without GPU"])
def problem(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    monkeypatch.setattr(providers, "cuda_problem", lambda: request.param)
    return request.param


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "cuda_problem", lambda: NO_GPU)


@pytest.mark.parametrize("name", ["", "CPU", "cuda:0", "tensorrt"])
def test_unknown(name: str) -> None:
    with pytest.raises(UsageError, match=f"Unknown provider '{name}'. Use auto, cpu or cuda"):
        choose_provider(name, "float32")


def test_auto_runs_float32_on_the_cpu(problem: str | None) -> None:
    assert choose_provider("auto", "float32") == "cpu"


def test_auto_runs_float16_where_a_gpu_is(problem: str | None) -> None:
    assert choose_provider("auto", "float16") == ("cpu" if problem else "cuda")


def test_auto_runs_bfloat16_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "cuda_problem", lambda: None)
    assert choose_provider("auto", "bfloat16") == "cuda"


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("requested", ["auto", "cpu"])
def test_bfloat16_does_not_run_on_the_cpu(requested: str) -> None:
    with pytest.raises(UsageError, match="The CPU does not run bfloat16 artifacts"):
        choose_provider(requested, "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cpu(problem: str | None, dtype: str) -> None:
    assert choose_provider("cpu", dtype) == "cpu"


def test_cuda_does_not_run_float32(problem: str | None) -> None:
    with pytest.raises(UsageError, match=r"this one is float32. Build it with --dtype fp16, or use --provider cpu"):
        choose_provider("cuda", "float32")


@pytest.mark.usefixtures("no_gpu")
def test_cuda_without_gpu() -> None:
    with pytest.raises(TdaError, match=rf"CUDA cannot be used: {NO_GPU}. Use --provider cpu") as error:
        choose_provider("cuda", "float16")
    assert not isinstance(error.value, UsageError)


def test_cuda_with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "cuda_problem", lambda: None)
    assert choose_provider("cuda", "float16") == "cuda"


class Driver:
    """Replaces libcuda: its calls return `status`, and it counts `gpus`."""

    def __init__(self, status: int, gpus: int) -> None:
        self.status, self.gpus = status, gpus

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.gpus
        return self.status


def simulate(monkeypatch: pytest.MonkeyPatch, load: Any, available: list[str]) -> None:
    monkeypatch.setattr(cuda_stream, "ctypes", SimpleNamespace(CDLL=load))
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: available)


BOTH = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def missing(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize(
    ("load", "available", "expected"),
    [
        (missing, BOTH[1:], "built without it (install onnxruntime-gpu)"),
        (missing, BOTH, "no NVIDIA driver is installed here"),
        (lambda name: Driver(100, 0), BOTH, NO_GPU),
        (lambda name: Driver(0, 0), BOTH, NO_GPU),
    ],
    ids=["CPU build", "no driver", "driver fails", "no GPU"],
)
def test_cuda_problem(monkeypatch: pytest.MonkeyPatch, load: Any, available: list[str], expected: str) -> None:
    simulate(monkeypatch, load, available)
    assert expected in str(cuda_problem())


def test_no_cuda_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, lambda name: Driver(0, 1), BOTH)
    assert cuda_problem() is None


def test_arguments_of_the_cpu() -> None:
    assert provider_arguments("cpu") == [("CPUExecutionProvider", {})]


def test_no_attention_that_plans_for_each_length() -> None:
    """cuDNN's kernels, ONNX Runtime's first choice on Hopper, compile a plan for every number of tokens and keep it."""
    (name, options), _ = provider_arguments("cuda")
    cudnn, others = 8, int(options["sdpa_kernel"])
    assert name == "CUDAExecutionProvider"
    assert not others & cudnn
    assert others > 0  # with 0 ONNX Runtime would choose
