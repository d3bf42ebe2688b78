"""The model class of lm-evaluation-harness, beside lm-eval's own for transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.harness import TdaLM
from tda_export.models.source import ModelSource

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
    if length == 200:  # one window: the protocols differ in nothing that a dense model would see
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
            {"sparsity": 0.5, "protocol": "griffin"},
            {"method": "griffin", "sparsity": 0.5},
        )
    ]
    assert len({round(result, 4) for result in results}) == 4


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
    with pytest.raises(UsageError, match="begun in the prompt"):
        lm.apply_chat_template(message, add_generation_prompt=False)


def test_lm_evals_own_command_knows_the_model() -> None:
    command = [sys.executable, "-m", "tda_export.evaluation", "run", "--model", "tda", "--model_args", "x=1", "--help"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
