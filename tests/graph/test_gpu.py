"""Half precision on CUDA: every family against transformers, and the driver's device paths."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from tda_export.graph import contract, kv_formats
from tda_export.graph.ffn import FfnForm
from tda_export.graph.storage import read_plan, storage_of
from tda_export.graph.verify import verify_artifact
from tda_export.models.source import resolve_model
from tda_export.runtime import Model, load
from tda_export.runtime.memory import PromptMemory
from tda_export.runtime.scoring import continuation_logits
from tests.ffn_model import ffn_session, random_feeds, run
from tests.graph.test_integers import build
from tests.graph.test_parity import build_tiny
from tests.graph.test_priced import build_priced
from tests.runtime.conftest import without_native_kernels
from tests.tiny import FAMILIES, save_tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_matches_transformers(family: str, dtype: str, tmp_path: Path) -> None:
    source = resolve_model(str(save_tiny_model(family, tmp_path / "model")))
    artifact = build_tiny(source, tmp_path / "artifact", dtype=dtype)
    checks = verify_artifact(artifact, lambda name: source, provider="cuda", quiet=True)
    assert len(checks) == 16
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, "float16") for family in FAMILIES), *((family, "bfloat16") for family in ("llama", "gemma2", "phi3"))],
)
def test_family_with_keys_and_values_of_8_bits(family: str, dtype: str, tmp_path: Path) -> None:
    """By the kernel in decode, with and without capture, and by stock operators in prefill."""
    source = resolve_model(str(save_tiny_model(family, tmp_path / "model")))
    artifact = build_tiny(source, tmp_path / "artifact", dtype=dtype, kv=kv_formats.KV_INT8)
    checks = verify_artifact(artifact, lambda name: source, provider="cuda", quiet=True)
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_prices_with_keys_and_values_of_8_bits(dtype: str, tiny_model: Path, tmp_path: Path) -> None:
    source = resolve_model(str(tiny_model))
    artifact = build_priced(source, tmp_path / "artifact", "sites", dtype=dtype, kv=kv_formats.KV_INT8)
    checks = verify_artifact(artifact, lambda name: source, provider="cuda", quiet=True)
    assert len(checks) == 11
    assert [check for check in checks if not check.passed] == []


GENERATIONS = [("tda", 100), ("dense", 100), ("tda", 30)]


@pytest.mark.parametrize("kv", [kv_formats.KV_FLOAT, kv_formats.KV_INT8])
def test_one_capture_serves_every_prompt(kv: str, tiny_model: Path, tmp_path: Path) -> None:
    """A sequence of prompts and masks gives what each gives alone in a fresh model, in this thread and in another."""
    artifact = build_tiny(resolve_model(str(tiny_model)), tmp_path / "artifact", dtype="float16", kv=kv)
    model = load(artifact)
    assert model.sessions.captures

    def generate(model: Model, number: int) -> list[int]:
        mask, count = GENERATIONS[number % len(GENERATIONS)]
        prompt = list(range(3 + number, 53 + 2 * number))
        return [token.id for token in model.generate(prompt, mask=mask, max_new_tokens=count)]  # type: ignore[arg-type]

    alone = [generate(load(artifact), number) for number in range(len(GENERATIONS))]
    first = [generate(model, number) for number in range(len(GENERATIONS))]
    step = model._idle
    with ThreadPoolExecutor(1) as other:
        elsewhere = list(other.map(lambda number: generate(model, number), range(len(GENERATIONS))))
    again = [generate(model, number) for number in range(len(GENERATIONS))]
    assert first == elsewhere == again == alone
    assert model._idle is step
    assert model.sessions.next_graph_id() == "3"  # two graphs so far, of one step


@pytest.fixture(params=["float", "int4"])
def either(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Model:
    """A model of prompt masks in float16, or of prices in four bits."""
    source, folder = resolve_model(str(tiny_model)), tmp_path / "artifact"
    if request.param == "float":
        return load(build_tiny(source, folder, dtype="float16"))
    return load(build(source, storage_of(source, "float16", read_plan(source, "int4", 32, ())), folder))


def test_steps_ahead(either: Model) -> None:
    """The GPU works on while the caller holds a token. What it does ahead changes no token, wherever the text ends."""
    model, prompt = either, list(range(3, 60))
    expected = one_by_one(model, prompt, 40)
    for _ in range(2):
        for count in (40, 1, 7):
            held = []
            generation = model.generate(prompt, max_new_tokens=40)
            for token in itertools.islice(generation, count):
                held.append(token.id)
                time.sleep(0.002)
            generation.close()
            assert held == expected[:count]


def one_by_one(model: Model, prompt: list[int], count: int) -> list[int]:
    """Decode by calls that wait for every token."""
    how = model.artifact.deployment
    with model.borrow_step(len(prompt) + count) as step:
        tokens = [int(step.begin(prompt, how).argmax())]
        step.follow(how)
        while len(tokens) < count:
            tokens.append(int(step.logits(tokens[-1]).argmax()))
    return tokens


def test_logits_that_are_not_finite_end_the_text(either: Model) -> None:
    """The step after them is under way then, with no token to read. The model can be used on."""
    model, prompt = either, list(range(3, 60))
    expected = [token.id for token in model.generate(prompt, max_new_tokens=20)]
    with model.borrow_step(100) as step:
        spoiled = step.cache.keys_and_values(0)[1]
        held = spoiled.numpy().copy()
        how = model.artifact.deployment
        step.begin(prompt, how)
        step.follow(how)
        step.capture()
        spoiled.update_inplace(np.full_like(held, np.nan))
        assert step.greedy(expected[0], ahead=True) == -1
        assert step.is_ahead
        step.settle()
        spoiled.update_inplace(held)
    assert [token.id for token in model.generate(prompt, max_new_tokens=20)] == expected


def test_threads_that_come_and_go(tiny_model: Path, tmp_path: Path) -> None:
    """A thread may get the id of one that has ended, but not its captured graph."""
    model = load(build_tiny(resolve_model(str(tiny_model)), tmp_path / "artifact", dtype="float16"))
    prompt = list(range(3, 60))
    expected = [token.id for token in model.generate(prompt, max_new_tokens=20)]
    found: list[list[int]] = []
    for _ in range(4):
        thread = threading.Thread(
            target=lambda: found.append([token.id for token in model.generate(prompt, max_new_tokens=20)])
        )
        thread.start()
        thread.join()
    assert found == [expected] * 4


def test_a_memory_goes_on_from_prompt_to_prompt(tiny_model: Path, tmp_path: Path) -> None:
    """The result is that of reading the whole prompt. Another thread, which captures the step anew, gives it too."""
    artifact = build_tiny(resolve_model(str(tiny_model)), tmp_path / "artifact", dtype="float16")
    prompt, more = list(range(3, 60)), list(range(90, 120))

    def turns(model: Model, memory: PromptMemory, elsewhere: bool) -> list[list[int]]:
        def turn(tokens: list[int]) -> list[int]:
            return [token.id for token in model.generate(tokens, max_new_tokens=20, memory=memory)]

        first = turn(prompt)
        with ThreadPoolExecutor(1) as other:
            second = other.submit(turn, prompt + first + more).result() if elsewhere else turn(prompt + first + more)
        return [first, second]

    model = load(artifact)
    assert model.sessions.captures
    memory = model.memory()
    here = turns(model, memory, elsewhere=False)
    assert here == turns(model, model.memory(), elsewhere=True)
    whole = [*prompt, *here[0], *more, 70, 71]
    how = model.artifact.deployment
    with model.borrow_step(len(whole)) as step:
        expected, alone = step.read(whole, how.thresholds, prior=how.prior)
        weight = alone.stats[contract.PAST_STATS_WEIGHT].numpy().copy()
    with memory.borrow_step(len(whole)) as step:
        logits, reused = memory.read(step, whole, how)
        mask = step.mask
    assert reused == len(whole) - 2
    np.testing.assert_allclose(logits, expected, atol=0.1)
    np.testing.assert_allclose(mask.stats[contract.PAST_STATS_WEIGHT].numpy(), weight)


def test_two_generations_at_once(tiny_model: Path, tmp_path: Path) -> None:
    artifact = build_tiny(resolve_model(str(tiny_model)), tmp_path / "artifact", dtype="float16")
    model = load(artifact)
    prompts = [list(range(3, 50)), list(range(60, 160))]
    alone = [[token.id for token in model.generate(prompt, max_new_tokens=60)] for prompt in prompts]
    both = [model.generate(prompt, max_new_tokens=60) for prompt in prompts]
    mixed = list(zip(*both, strict=True))
    assert [[token.id for token in column] for column in zip(*mixed, strict=True)] == alone
    for _ in range(4):  # threads begin at once, and each captures its own steps
        with ThreadPoolExecutor(4) as threads:
            parallel = list(threads.map(lambda p: [t.id for t in model.generate(p, max_new_tokens=60)], prompts * 4))
        assert parallel == alone * 4


# With codes, a key that is rounded differently may change a code, and so the mask. Only dense logits compare.
@pytest.mark.parametrize(("kv", "mask", "tolerance"), [("float", "tda", 0.05), ("int8", "dense", 0.1)])
def test_native_and_stock_agree(
    kv: str, mask: Literal["tda", "dense"], tolerance: float, tiny_model: Path, tmp_path: Path
) -> None:
    artifact = build_tiny(resolve_model(str(tiny_model)), tmp_path / "artifact", dtype="float16", kv=kv)
    prompt, continuation = list(range(3, 50)), list(range(60, 80))
    native = continuation_logits(load(artifact), prompt, continuation, mask=mask)
    with without_native_kernels():
        stock = continuation_logits(load(artifact), prompt, continuation, mask=mask)
    np.testing.assert_allclose(native, stock, atol=tolerance)


def test_indices_that_are_no_neurons_are_ignored_by_the_function_too() -> None:
    rng = np.random.default_rng(0)
    feeds = random_feeds(rng, tokens=1, hidden=16, neurons=8, indices=np.array([0, 5]), dtype="float16", threshold=0.0)
    session = ffn_session(FfnForm("silu"), dtype="float16", native=False)
    foreign = {"mask_indices": np.array([0, -7, 8, 5, -1, 2**30], np.int32)}
    np.testing.assert_allclose(run(session, feeds | foreign), run(session, feeds), rtol=1e-2, atol=1e-3)


def test_both_sessions_use_the_same_weights(tiny_model: Path, tmp_path: Path) -> None:
    model = load(build_tiny(resolve_model(str(tiny_model)), tmp_path / "artifact", dtype="float16"), provider="cuda")
    shared = set(model.artifact.manifest["weights"])
    used = model.artifact.manifest["graph_weights"]
    assert all(set(names) <= shared for names in used.values())
    assert set(model.sessions.shared_weights) == shared
