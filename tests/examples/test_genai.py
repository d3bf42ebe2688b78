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
from tda_export.runtime import load
from tda_export.runtime.steps import open_step
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


SECOND_PROMPT = """
import sys
import numpy as np
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
params = og.GeneratorParams(model)
params.set_search_options(max_length=64, do_sample=False)
generator = og.Generator(model, params)
for prompt, count in (({first}, 3), ({second}, 1)):
    generator.append_tokens(np.array([prompt], np.int32))
    for step in range(count):
        generator.generate_next_token()
        print(generator.get_next_tokens()[0])
"""


@pytest.fixture
def config(tiny_artifact: Path) -> dict[str, Any]:
    return json.loads((tiny_artifact / contract.GENAI_CONFIG_FILE).read_text())


def test_library_is_that_of_the_installed_onnxruntime() -> None:
    """GenAI asks for the package `onnxruntime`; installed without it, it takes the same files from onnxruntime-gpu."""
    code = "import os, onnxruntime_genai; print(os.environ['ORT_LIB_PATH'])"
    assert Path(run(sys.executable, "-c", code).strip()).is_relative_to(Path(ort.__file__).parent)


def test_stages_list_every_output_of_their_graphs(config: dict[str, Any], tiny_artifact: Path) -> None:
    """GenAI aborts at an output that is not listed."""
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


@pytest.mark.parametrize("built", ["tiny_artifact", "priced_artifact"])
def test_no_library_is_named(built: str, request: pytest.FixtureRequest) -> None:
    config = (request.getfixturevalue(built) / contract.GENAI_CONFIG_FILE).read_text()
    assert "custom_ops_library" not in config


def test_prices_need_no_pipeline(config: dict[str, Any], priced_artifact: Path) -> None:
    """Their configuration is that of a plain decoder with the decode graph. The entries on the model are the same."""
    priced = json.loads((priced_artifact / contract.GENAI_CONFIG_FILE).read_text())
    decoder = priced["model"].pop("decoder")
    assert (priced["model"]["type"], decoder.pop("filename")) == ("llama", contract.DECODE_FILE)
    pipeline = config["model"].pop("decoder")
    assert decoder == {name: value for name, value in pipeline.items() if name != "pipeline"}
    assert priced["model"] == config["model"] | {"type": "llama"}


def test_prompts_after_the_first_are_read_at_the_price(priced_artifact: Path) -> None:
    """A plain decoder takes them, unlike a pipeline, and they have a past."""
    model = load(priced_artifact, provider="cpu")
    first, second = list(range(40, 60)), list(range(60, 70))
    step = open_step(model.sessions, model.artifact.shape, 64)
    how = model.artifact.deployment
    tokens = [int(step.begin(first, how).argmax())]
    step.follow(how)
    while len(tokens) < 3:
        tokens.append(step.greedy(tokens[-1]))
    step.logits(tokens[-1])  # GenAI has the last token in the cache when a prompt follows it
    for token in second:
        logits = step.logits(token)
    code = SECOND_PROMPT.format(first=first, second=second)
    printed = [int(word) for word in run(sys.executable, "-c", code, priced_artifact).split()]
    assert printed == [*tokens, int(logits.argmax())]


@pytest.mark.parametrize(("batch", "turns", "problem"), [(2, 1, "Got: 2 Expected: 1"), (1, 2, "total_sequence_length")])
def test_batches_and_second_prompts_are_refused(batch: int, turns: int, problem: str, tiny_artifact: Path) -> None:
    assert version("onnxruntime-genai") == "0.18.0"  # the version that the configuration is written for
    command = [sys.executable, "-c", SCRIPT, str(tiny_artifact)]
    assert subprocess.run([*command, "1", "1"]).returncode == 0
    done = subprocess.run([*command, str(batch), str(turns)], capture_output=True, text=True)
    assert done.returncode == 1
    assert problem in done.stderr
