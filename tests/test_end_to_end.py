"""The whole pipeline on a real model, SmolLM2-135M in float32 on the CPU, with the native kernels and without."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch

from tda_export.calibration import kl_plan, kl_run
from tda_export.calibration.budgets import Budget
from tda_export.calibration.file import allocation_from
from tda_export.cli.demo import places
from tda_export.models.source import resolve_model
from tda_export.runtime import Model, load
from tda_export.runtime.generate import MaskMode
from tests.conftest import build_tda, run_ok
from tests.examples.applications import Applications, ours, run
from tests.examples.test_same_tokens import NAMES
from tests.runtime.conftest import without_native_kernels

pytestmark = [pytest.mark.real_model, pytest.mark.long]

MODEL = "smollm2-135m"
# Here no neuron is within rounding (1e-6) of its token threshold. Otherwise applications might differ.
PROMPT = "The lighthouse on the northern cape was built in"
GREEDY_TOKENS = 64
LARGEST_LOGIT_DIFFERENCE = 2e-3
LOGIT_CHECKS = (
    "prefill logits",
    "decode with all neurons",
    "decode with the prompt's mask",
    "decode with every second neuron",
    "decode token by token",
    "decode with token thresholds",
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact calibrated on two short sequences of the built-in text. The commands' results are beside it.

    Each layer alone is measured on one of them, which no test here reads. It is most of the forward passes.
    """
    folder = tmp_path_factory.mktemp("real")
    short = ("--method", "tda", "--sequences", 2, "--prompt-tokens", 96, "--continuation-tokens", 12)
    with pytest.MonkeyPatch.context() as patch:
        for module in (kl_plan, kl_run):
            patch.setattr(module, "SENSITIVITY_SEQUENCES", 1)
        calibrated = run_ok("calibrate", MODEL, "-o", folder / "calibration.safetensors", *short, "--json")
    (folder / "calibrated.json").write_text(calibrated.stdout)
    built = run_ok(
        *build_tda(MODEL, folder / "calibration.safetensors"),
        "-o",
        folder / "artifact",
        "--json",
    )
    (folder / "built.json").write_text(built.stdout)
    return folder / "artifact"


@pytest.fixture(scope="module", params=["native", "stock"])
def model(artifact: Path, request: pytest.FixtureRequest) -> Model:
    with without_native_kernels() if request.param == "stock" else contextlib.nullcontext():
        return load(artifact, provider="cpu")


@pytest.fixture(scope="module")
def transformers_tokens(artifact: Path) -> list[int]:
    """The greedy tokens of transformers after the prompt."""
    tokens = load(artifact, provider="cpu").text.encode(PROMPT)
    reference = resolve_model(MODEL).reference()
    text = reference.generate(torch.tensor([tokens]), max_new_tokens=GREEDY_TOKENS, do_sample=False)[0]
    return text[len(tokens) :].tolist()  # type: ignore[no-any-return]


def test_numbers_are_those_of_transformers(artifact: Path) -> None:
    checks = {check["name"]: check for check in json.loads((artifact.parent / "built.json").read_text())["checks"]}
    assert all(check["passed"] for check in checks.values())
    for name in LOGIT_CHECKS:
        assert checks[name]["difference"] <= LARGEST_LOGIT_DIFFERENCE


def test_paper_budget_leaves_the_last_layer_sparsest(artifact: Path) -> None:
    allocation = allocation_from(artifact.parent / "calibration.safetensors", Budget(cett=0.2))
    assert all(cett <= 0.2 for cett in allocation.cett)
    assert 0.1 < allocation.sparsity < 0.3
    assert min(allocation.density) == allocation.density[-1]


def test_kl_of_the_path_rises(artifact: Path) -> None:
    allocation = json.loads((artifact.parent / "calibrated.json").read_text())["allocation"]
    assert allocation["sparsity"] == pytest.approx(0.5, abs=0.01)
    path = artifact.parent / "calibration.safetensors"
    kls = [allocation_from(path, Budget(sparsity=sparsity)).kl for sparsity in (0.2, 0.35, 0.5, 0.65)]
    assert kls == sorted(kls)
    assert kls[2] == pytest.approx(allocation["kl"])
    assert 0 < kls[0] < kls[-1]


def test_dense_greedy_text_is_that_of_transformers(model: Model, transformers_tokens: list[int]) -> None:
    ours = [token.id for token in model.generate(PROMPT, mask="dense", max_new_tokens=GREEDY_TOKENS)]
    assert ours == transformers_tokens[: len(ours)]
    assert len(ours) == GREEDY_TOKENS


def test_mask_reads_fewer_bytes(model: Model) -> None:
    generation = model.generate(PROMPT, max_new_tokens=8)
    assert len(list(generation)) == 8
    metrics = generation.metrics
    assert 0 < metrics.sparsity < 1
    assert metrics.bytes_per_token == pytest.approx((1 - metrics.sparsity) * metrics.dense_bytes_per_token)
    assert metrics.dense_bytes_per_token == 30 * 3 * 576 * 1536 * 4


def test_chat_answers_and_stops(model: Model) -> None:
    generation = model.generate("What is the capital of France?", chat=True, mask="dense", max_new_tokens=64)
    list(generation)
    assert "Paris" in generation.text
    assert generation.metrics.finish_reason == "stop"


@pytest.mark.parametrize("mask", ["tda", "dense"])
@pytest.mark.parametrize("name", NAMES)
def test_other_applications_give_the_same_tokens(
    name: str, mask: MaskMode, artifact: Path, applications: Applications
) -> None:
    expected = ours(artifact, PROMPT, mask, GREEDY_TOKENS)
    assert len(expected) == GREEDY_TOKENS
    assert applications.named(name)(artifact, PROMPT, mask, GREEDY_TOKENS) == expected


@pytest.mark.node
def test_chat_in_node(artifact: Path, applications: Applications) -> None:
    question = "What is the capital of France?"
    printed = run("node", "chat.mjs", artifact, "--dense", folder=applications.node_folder, text=f"{question}\n")
    generation = load(artifact, provider="cpu").generate(question, chat=True, mask="dense", max_new_tokens=256)
    list(generation)
    assert generation.metrics.finish_reason == "stop"
    assert f"> {generation.text}\n" in printed


def test_another_budget_without_the_model(artifact: Path) -> None:
    result = run_ok("generate", artifact, PROMPT, "--sparsity", 0.75, "--max-new-tokens", 4, "--json")
    sparse = json.loads(result.stdout)["metrics"]["sparsity"]
    result = run_ok("generate", artifact, PROMPT, "--max-new-tokens", 4, "--json")
    assert sparse > json.loads(result.stdout)["metrics"]["sparsity"] + 0.1


def test_demo_compares_five_ways(artifact: Path, tmp_path: Path) -> None:
    """The results are made in less time: other thresholds, rounding to nearest, few sequences."""
    at = places(tmp_path)
    at.tda.symlink_to(artifact)
    at.tda_calibration.symlink_to(artifact.parent / "calibration.safetensors")
    run_ok("quantize", MODEL, "-o", at.int4_model, "--quantizer", "rtn", "--kl-sequences", 0)
    short = ("--packing", "sites", "--sequences", 2, "--prompt-tokens", 96, "--continuation-tokens", 32)
    run_ok("calibrate", at.int4_model, "-o", at.int4_calibration, *short)
    result = run_ok("demo", "--artifacts", tmp_path)
    ways = ["float32, dense", "float32, TDA", "int4, dense", "int4, --max-kl 0.05", "int4, --sparsity 0.5"]
    rows = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines()]
    names, mib, kls = zip(*((row[0], float(row[2]), float(row[3])) for row in rows if row[0] in ways), strict=True)
    assert list(names) == ways
    assert mib[0] > mib[1] > 2 * mib[2] > 2 * mib[3] > 2 * mib[4]
    assert 0 == kls[0] < kls[2] < kls[4] < 2
