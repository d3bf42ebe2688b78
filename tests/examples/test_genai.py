"""genai_config.json, and the limits of GenAI's pipelines that the documentation names."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from tda_export.graph import contract
from tests.examples.applications import run

SCRIPT = """
import sys
import numpy as np
import onnxruntime_genai as og
folder, batch, turns = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = og.Model(folder)
params = og.GeneratorParams(model)
params.set_search_options(max_length=100, batch_size=batch)
generator = og.Generator(model, params)
prompt = np.arange(40, 60, dtype=np.int32)
for turn in range(turns):
    generator.append_tokens(np.stack([prompt] * batch))
    for step in range(4):
        generator.generate_next_token()
"""


@pytest.fixture
def config(tiny_artifact: Path) -> dict[str, Any]:
    return json.loads((tiny_artifact / contract.GENAI_CONFIG_FILE).read_text())


def test_library_is_that_of_the_installed_onnxruntime() -> None:
    """GenAI asks for the package `onnxruntime`; installed without it, it takes the same files from onnxruntime-gpu."""
    code = "import os, onnxruntime_genai; print(os.environ['ORT_LIB_PATH'])"
    assert Path(run(sys.executable, "-c", code).strip()).is_relative_to(Path(ort.__file__).parent)


def test_stages_list_every_output_of_their_graphs(config: dict[str, Any], tiny_artifact: Path) -> None:
    """GenAI aborts at one that is not listed."""
    stages = config["model"]["decoder"]["pipeline"][0]
    assert [stage["filename"] for stage in stages.values()] == [contract.PREFILL_FILE, contract.DECODE_FILE]
    for stage in stages.values():
        session = ort.InferenceSession(tiny_artifact / stage["filename"], providers=["CPUExecutionProvider"])
        assert stage["outputs"] == [output.name for output in session.get_outputs()]
        known = [*session.get_inputs(), *session.get_overridable_initializers()]
        assert set(stage["inputs"]) <= {value.name for value in known}
    assert set(stages["prefill"]["output_names_forwarder"].values()) <= set(stages["decode"]["inputs"])


def test_configuration_is_that_of_the_model(config: dict[str, Any], tiny_artifact: Path) -> None:
    manifest = json.loads((tiny_artifact / contract.MANIFEST_FILE).read_text())
    model, shape = config["model"], manifest["shape"]
    assert model["eos_token_id"] == manifest["model"]["eos_token_ids"]
    assert model["context_length"] == config["search"]["max_length"] == shape["max_positions"]
    assert model["vocab_size"] == shape["vocab_size"]
    assert model["decoder"]["num_hidden_layers"] == shape["num_layers"]
    assert model["decoder"]["num_attention_heads"] == manifest["spec"]["num_heads"]


def test_no_library_is_named(config: dict[str, Any]) -> None:
    assert "custom_ops_library" not in json.dumps(config)


@pytest.mark.parametrize(("batch", "turns", "problem"), [(2, 1, "Got: 2 Expected: 1"), (1, 2, "total_sequence_length")])
def test_batches_and_second_prompts_are_refused(batch: int, turns: int, problem: str, tiny_artifact: Path) -> None:
    assert version("onnxruntime-genai") == "0.18.0"  # what the configuration is written for
    command = [sys.executable, "-c", SCRIPT, str(tiny_artifact)]
    assert subprocess.run([*command, "1", "1"]).returncode == 0
    done = subprocess.run([*command, str(batch), str(turns)], capture_output=True, text=True)
    assert done.returncode == 1
    assert problem in done.stderr
