"""The metrics of /metrics, read by Prometheus's own parser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tda_export.runtime import Model, load
from tests.runtime.conftest import edit_manifest
from tests.serve.conftest import NAME, Gate, Served, serving, until


def samples(served: Served) -> dict[str, float]:
    """Return every sample by its name and labels."""
    answer = openai.DefaultHttpxClient().get(f"{served.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_an_answer_is_counted(model: Model) -> None:
    prompt = model.text.encode("The sea is calm tonight")
    ours = model.generate(prompt, max_new_tokens=12)
    list(ours)
    with serving(model) as served:
        ask: dict[str, Any] = {"model": NAME, "prompt": "The sea is calm tonight", "temperature": 0, "max_tokens": 12}
        before = samples(served)
        assert before["tda_export_generated_tokens_total"] == before["tda_export_queue_seconds_count"] == 0
        served.client().completions.create(**ask)
        found = samples(served)
        assert found["tda_export_requests_total{endpoint=completions,outcome=answered}"] == 1
        assert found["tda_export_prompt_tokens_total"] == len(prompt)
        assert found["tda_export_reused_prompt_tokens_total"] == 0
        assert found["tda_export_generated_tokens_total"] == 12
        assert found["tda_export_queue_seconds_count"] == found["tda_export_time_to_first_token_seconds_count"] == 1
        assert found["tda_export_tokens_per_second_count"] == 1
        assert found["tda_export_skippable_read_bytes_total"] == 11 * ours.metrics.bytes_per_token
        assert found["tda_export_skippable_dense_bytes_total"] == 11 * ours.metrics.dense_bytes_per_token
        assert found["tda_export_skippable_bytes_share"] == pytest.approx(1 - ours.metrics.sparsity)
        assert found["tda_export_queue_length"] == found["tda_export_running_requests"] == 0
        served.client().completions.create(**ask | {"prompt": "The sea is calm tonight, my love"})
        assert samples(served)["tda_export_reused_prompt_tokens_total"] == len(prompt)


def test_the_step_that_gives_an_end_token_is_counted(artifact_copy: Path) -> None:
    ask = {"prompt": "The sea is calm tonight", "max_new_tokens": 12}
    plain = [token.id for token in load(artifact_copy, provider="cpu").generate(**ask)]  # type: ignore[arg-type]
    end = next(i for i in range(2, 12) if plain[i] not in plain[:i])
    edit_manifest(artifact_copy, lambda manifest: manifest["model"].update(eos_token_ids=[plain[end]]))
    model = load(artifact_copy, provider="cpu")
    ours = model.generate(**ask)  # type: ignore[arg-type]
    assert len(list(ours)) == ours.metrics.decode_steps == end
    with serving(model) as served:
        answer = served.client().completions.create(
            model=NAME, prompt="The sea is calm tonight", temperature=0, max_tokens=12
        )
        assert answer.choices[0].finish_reason == "stop"
        found = samples(served)
        assert found["tda_export_generated_tokens_total"] == end
        assert found["tda_export_skippable_read_bytes_total"] == end * ours.metrics.bytes_per_token
        assert found["tda_export_skippable_dense_bytes_total"] == end * ours.metrics.dense_bytes_per_token


def test_refusals_cancellations_and_the_queue(model: Model, gate: Gate) -> None:
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    with serving(model, queue=1) as served:
        running = served.client().chat.completions.create(model=NAME, **ask)
        until(lambda: samples(served)["tda_export_running_requests"] == 1)
        waiting = served.client().chat.completions.create(model=NAME, **ask)
        until(lambda: samples(served)["tda_export_queue_length"] == 1)
        for name in (NAME, "gpt-9"):
            with pytest.raises(openai.APIStatusError):
                served.client().chat.completions.create(model=name, **ask)
        waiting.close()
        until(lambda: samples(served).get("tda_export_requests_total{endpoint=chat,outcome=cancelled}") == 1)
        running.close()
        job = served.worker._running
        assert job is not None
        until(lambda: job.cancelled)
        gate.open()
        until(lambda: samples(served).get("tda_export_requests_total{endpoint=chat,outcome=cancelled}") == 2)
        found = samples(served)
        assert found["tda_export_requests_total{endpoint=chat,outcome=refused}"] == 2
        assert "tda_export_requests_total{endpoint=chat,outcome=answered}" not in found
        assert found["tda_export_generated_tokens_total"] == gate.drawn - 1  # the last token came after the end
