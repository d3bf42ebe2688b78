"""The model class for lm-evaluation-harness, against lm-eval's own for transformers."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.harness import TdaLM
from tda_export.evaluation.methods import Request
from tda_export.models.source import ModelSource
from tda_export.runtime import load
from tda_export.runtime.deployment import Refresh

LOG = 1e-3
PAIRS = [
    ("The boats come home", " at dusk"),
    ("The boats come home", " at noon, and the gulls"),
    ("The boats come home", " late"),
    ("", "An empty context"),
    ("A trailing space ", "goes to the continuation"),
    ("x", "y"),
    ("long " * 200, "is cut on the left"),
]


@pytest.fixture(scope="module")
def hf(source: ModelSource) -> HFLM:
    return HFLM(pretrained=source.reference(), tokenizer=source.tokenizer, batch_size=1)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]


def make(artifact: Path, **arguments: Any) -> TdaLM:
    return TdaLM(artifact=str(artifact), provider="cpu", **arguments)


@pytest.mark.parametrize("protocol", ["strict", "griffin"])
def test_dense_loglikelihoods_are_those_of_hf(tiny_artifact: Path, hf: HFLM, protocol: str) -> None:
    requests = instances("loglikelihood", PAIRS)
    expected = hf.loglikelihood(requests, disable_tqdm=True)
    found = make(tiny_artifact, method="dense", protocol=protocol).loglikelihood(requests, disable_tqdm=True)
    for (value, greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(wanted, abs=LOG)
        assert greedy == wanted_greedy


@pytest.mark.parametrize("length", [2, 3, 16, 17, 200])
def test_dense_rolling_loglikelihoods_are_those_of_hf(tiny_artifact: Path, source: ModelSource, length: int) -> None:
    hf = HFLM(pretrained=source.reference(), tokenizer=source.tokenizer, batch_size=1, max_length=length)
    requests = instances("loglikelihood_rolling", [("The boats come home at dusk, and the gulls with them.",), ("A",)])
    expected = hf.loglikelihood_rolling(requests, disable_tqdm=True)
    found = make(tiny_artifact, method="dense", protocol="griffin", max_length=length)
    assert found.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(expected, abs=LOG)
    if length == 200:  # one window, in which a dense model gives the same by both protocols
        strict = make(tiny_artifact, method="dense", max_length=length)
        assert strict.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(expected, abs=LOG)


@pytest.mark.parametrize("length", [2, 3, 16, 17, 200])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 16, 17, 18, 40])
def test_strict_windows_predict_each_token_once(tiny_artifact: Path, length: int, tokens: int) -> None:
    text = list(range(10, 10 + tokens))
    windows = make(tiny_artifact, max_length=length)._strict_windows(text)
    whole = [-1, *text]  # with the prefix
    predicted: list[int] = []
    for index, (context, continuation) in enumerate(windows):
        assert len(context) + len(continuation) - 1 <= length
        end = len(predicted) + 1
        assert context[1:] == whole[end - len(context) + 1 : end]
        if index > 1:
            assert len(context) >= length // 2
        predicted += continuation
    assert predicted == text


@pytest.mark.parametrize("protocol", ["strict", "griffin"])
def test_dense_generations_are_those_of_hf(tiny_artifact: Path, hf: HFLM, protocol: str) -> None:
    options = {"until": ["q", "\n\n"], "max_gen_toks": 12, "do_sample": False}
    requests = instances("generate_until", [("The boats come home", options), ("Gulls", {"max_gen_toks": 3})])
    expected = hf.generate_until(requests, disable_tqdm=True)
    lm = make(tiny_artifact, method="dense", protocol=protocol)
    assert lm.generate_until(requests, disable_tqdm=True) == expected


def test_methods_and_protocols_differ(tiny_artifact: Path) -> None:
    requests = instances("loglikelihood", PAIRS[:3])
    results = [
        make(tiny_artifact, **arguments).loglikelihood(requests, disable_tqdm=True)[1][0]
        for arguments in (
            {"method": "dense"},
            {"sparsity": 0.5},
            {"sparsity": 0.5, "allocation": "uniform"},
            {"max_kl": 2.0},
            {"sparsity": 0.5, "protocol": "griffin"},
            {"method": "griffin", "sparsity": 0.5},
        )
    ]
    assert len({round(result, 4) for result in results}) == 6


@pytest.mark.parametrize("refresh", [None, 0, 3])
@pytest.mark.parametrize("method", ["own", "uniform"])
def test_griffin_generations_are_those_of_the_driver(tiny_artifact: Path, method: str, refresh: int | None) -> None:
    """By this protocol the first new token is dense, as in use. Refreshes and token thresholds are the driver's."""
    lm = make(
        tiny_artifact,
        protocol="griffin",
        refresh=refresh,
        **{} if method == "own" else {"sparsity": 0.5, "allocation": "uniform"},
    )
    options = {"until": ["\0"], "max_gen_toks": 14, "do_sample": False}
    (found,) = lm.generate_until(instances("generate_until", [("The boats come home", options)]), disable_tqdm=True)
    driver = load(tiny_artifact, provider="cpu")
    generation = driver.generate("The boats come home", max_new_tokens=14, deployment=lm.setting.deployment)
    list(generation)
    assert generation.metrics.refreshes == (4 if refresh else 0)
    assert found == generation.text


@pytest.mark.parametrize("refresh", [2, 5])
def test_strict_generations_with_refreshes_equal_a_loop(tiny_artifact: Path, refresh: int) -> None:
    """Against steps by hand. Scoring has no refreshes."""
    lm = make(tiny_artifact, refresh=refresh)
    how, tokens, new = lm.setting.deployment, lm.text.encode("The boats come home"), list[int]()
    step = lm.setting.open_step(len(tokens) + 12)
    _, mask = step.read(tokens[:-1], how.thresholds, prior=how.prior)
    step.use(mask, how.token_thresholds, tail_mean=how.tail_mean)
    new.append(step.greedy(tokens[-1]))
    while len(new) < 12:
        if len(new) % refresh == 0:
            logits, mask = step.reread(new[-refresh:], how.thresholds, how.refresh.decay)
            step.use(mask, how.token_thresholds, tail_mean=how.tail_mean)
            new.append(int(logits.argmax()))
        else:
            new.append(step.greedy(new[-1]))
    options = {"until": ["\0"], "max_gen_toks": 12, "do_sample": False}
    (found,) = lm.generate_until(instances("generate_until", [("The boats come home", options)]), disable_tqdm=True)
    stream = lm.text.stream(tokens)
    assert found == "".join(stream.add(token) for token in new) + stream.finish()
    requests = instances("loglikelihood", PAIRS[:3])
    plain = make(tiny_artifact).loglikelihood(requests, disable_tqdm=True)
    assert lm.loglikelihood(requests, disable_tqdm=True) == plain


def test_a_request_becomes_arguments(tiny_artifact: Path, tiny_calibration: Path) -> None:
    request = Request(max_kl=2.0, refresh=Refresh(4), calibration=tiny_calibration)
    lm = TdaLM.of(tiny_artifact, request, protocol="griffin", provider="cpu")
    expected = make(tiny_artifact, max_kl=2.0, refresh=4, calibration=str(tiny_calibration), protocol="griffin")
    assert lm.setting.budget == expected.setting.budget == {"max_kl": 2.0, "refresh": 4}
    assert lm.scorer.protocol == "griffin"
    for ours, theirs in zip(
        dataclasses.astuple(lm.setting.deployment), dataclasses.astuple(expected.setting.deployment), strict=True
    ):
        assert np.array_equal(ours, theirs)


def test_results_are_kept_where_lm_eval_asks(tiny_artifact: Path) -> None:
    kept: dict[Any, Any] = {}

    class Hook:
        def add_partial(self, kind: str, arguments: Any, result: Any) -> None:
            kept[kind, str(arguments)] = result

    lm = make(tiny_artifact)
    lm.set_cache_hook(Hook())
    (found,) = lm.loglikelihood(instances("loglikelihood", [("a", "b")]), disable_tqdm=True)
    assert kept == {("loglikelihood", "('a', 'b')"): found}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "wanda"}, "Method 'wanda' is not known"),
        ({"protocol": "loose"}, "Protocol 'loose' is not known"),
        ({"max_length": 1}, r"A length of 1 tokens is outside \[2, 512\]"),
        ({"max_length": 513}, r"A length of 513 tokens is outside \[2, 512\]"),
        ({"method": "griffin"}, "griffin takes --sparsity"),
        ({"refresh": 1}, "A refresh after every 1 tokens"),
        ({"max_kl": 0.0}, "--max-kl 0.0: give a positive number"),
        ({"calibration": "x"}, "--calibration has no effect without a budget"),
    ],
)
def test_arguments_that_are_refused(tiny_artifact: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make(tiny_artifact, **arguments)


def test_continuation_that_does_not_fit(tiny_artifact: Path) -> None:
    lm = make(tiny_artifact, max_length=8)
    with pytest.raises(TdaError, match=r"^A continuation has 20 tokens, and the model takes 1 to 8\. Leave the task"):
        lm.loglikelihood(instances("loglikelihood", [("a", "b" * 20)]), disable_tqdm=True)


def test_sampling_is_refused(tiny_artifact: Path) -> None:
    options = {"do_sample": True, "temperature": 1.0}
    with pytest.raises(UsageError, match="A task asks for sampling"):
        make(tiny_artifact).generate_until(instances("generate_until", [("a", options)]), disable_tqdm=True)


def test_what_lm_evals_command_adds_is_ignored(tiny_artifact: Path) -> None:
    lm = make(tiny_artifact, device="cuda", batch_size=1, max_batch_size=64)
    assert lm.scorer.setting.sessions.provider == "cpu"


def test_chat_template(tiny_artifact: Path) -> None:
    lm = make(tiny_artifact)
    message = [{"role": "user", "content": "Hi"}]
    assert lm.apply_chat_template(message) == lm.text.chat(message)
    with pytest.raises(UsageError, match="begins in the prompt"):
        lm.apply_chat_template(message, add_generation_prompt=False)


def test_lm_evals_own_command_knows_the_model() -> None:
    command = [sys.executable, "-m", "tda_export.evaluation", "run", "--model", "tda", "--model_args", "x=1", "--help"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
