"""The Node example's chat template and chat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tda_export.runtime import load
from tests.examples.applications import EXAMPLES, Applications, ids, run

pytestmark = pytest.mark.node

MESSAGES = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello. What is it?"},
    {"role": "user", "content": "Nothing, “really”"},
]
CHAT_IDS = """
import { load } from "./artifact.mjs";
const [folder, messages] = process.argv.slice(1);
console.log((await load(folder)).chat(JSON.parse(messages)).join(" "));
"""


def test_conversation_is_tokenized_as_by_our_driver(tiny_artifact: Path, applications: Applications) -> None:
    text = load(tiny_artifact, provider="cpu").text
    command = ("node", "--input-type=module", "-e", CHAT_IDS, tiny_artifact, json.dumps(MESSAGES))
    printed = run(*command, folder=applications.node_folder)
    assert ids(printed) == text.encode(text.chat(MESSAGES), special_tokens=False)


def test_chat_answers_every_line(tiny_artifact: Path, applications: Applications) -> None:
    command = ("node", "chat.mjs", tiny_artifact, "--max-new-tokens", "4")
    printed = run(*command, folder=applications.node_folder, text="Hello\nNothing\n")
    assert printed.count("> ") == 3


def test_chat_says_how_it_is_used(applications: Applications) -> None:
    with pytest.raises(AssertionError, match="Usage: node chat"):
        run("node", "chat.mjs", folder=applications.node_folder)


def test_example_is_short() -> None:
    assert sum(len(path.read_text().splitlines()) for path in (EXAMPLES / "node").glob("*.mjs")) < 150
