"""`tda-export generate` from end to end on the tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tda_export.graph import contract
from tda_export.runtime import Sampling, load
from tests.cli.conftest import USAGE, assert_error
from tests.cli.results import PROMPT, generated, result_of
from tests.conftest import run_cli, run_ok
from tests.runtime.conftest import edit_manifest, replace_file

DENSE_FFN_BYTES = 3 * 96 * 3 * 64 * 4  # layers, neurons, matrices, hidden size, float32


def test_generate_says_how_often_it_refreshed(tiny_artifact: Path) -> None:
    result = run_ok("generate", tiny_artifact, PROMPT, "--max-new-tokens", 24, "--refresh", 8)
    assert ", 2 refreshes\n" in result.stderr
    assert "refreshes" not in run_ok("generate", tiny_artifact, PROMPT, "--max-new-tokens", 24).stderr


def test_generate_with_a_lookup(priced_artifact: Path) -> None:
    options = (priced_artifact, "the sea, the sea, the sea", "--max-new-tokens", 160, "--ignore-eos")
    alone, result = run_ok("generate", *options), run_ok("generate", *options, "--lookup", 4)
    assert result.stdout == alone.stdout
    found = re.search(r", (\d+) of (\d+) drafted tokens accepted, (\d+) steps\n", result.stderr)
    assert found is not None
    accepted, drafted, steps = map(int, found.groups())
    assert 0 < accepted <= drafted
    assert accepted + steps == 159
    assert "drafted" not in alone.stderr


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_lookups_out_of_range(command: str, priced_artifact: Path) -> None:
    prompt = ("The sea",) if command == "generate" else ()
    for given in (-1, 16):
        result = run_cli(command, priced_artifact, *prompt, "--lookup", given)
        assert_error(result, USAGE, f"A lookup of {given} tokens is outside [0, 15]. Give 0 for none.")


def test_generate_by_max_kl(tiny_artifact: Path) -> None:
    strict, loose = generated(tiny_artifact, "--max-kl", 0.02), generated(tiny_artifact, "--max-kl", 0.06)
    assert 0 < strict["metrics"]["sparsity"] < loose["metrics"]["sparsity"] < 1


def test_generate(tiny_artifact: Path) -> None:
    result = run_ok("generate", tiny_artifact, PROMPT, "--max-new-tokens", 24)
    expected = load(tiny_artifact).generate(PROMPT, max_new_tokens=24)
    list(expected)
    assert result.stdout == expected.text + "\n"
    assert f"{len(PROMPT)} prompt tokens, 24 new (token limit reached), tda on cpu, FFN sparsity 0." in result.stderr
    assert "s to the first token" in result.stderr
    assert "MiB of FFN weights a token" in result.stderr


def test_generate_json(tiny_artifact: Path) -> None:
    result = generated(tiny_artifact)
    generation = load(tiny_artifact).generate(PROMPT, max_new_tokens=24)
    assert result["tokens"] == [token.id for token in generation]
    assert result["text"] == generation.text
    metrics = result["metrics"]
    assert (metrics["mask"], metrics["provider"], metrics["finish_reason"]) == ("tda", "cpu", "length")
    assert (metrics["prompt_tokens"], metrics["new_tokens"]) == (len(PROMPT), 24)
    assert 1 - metrics["density"] < metrics["sparsity"] == generation.metrics.sparsity
    assert metrics["bytes_per_token"] == round((1 - metrics["sparsity"]) * DENSE_FFN_BYTES)
    assert metrics["dense_bytes_per_token"] == DENSE_FFN_BYTES
    assert metrics["decode_tokens_per_second"] == pytest.approx(23 / metrics["decode_seconds"])


def test_generate_one_token(tiny_artifact: Path) -> None:
    """There is no rate, since rates start at the second token."""
    result = run_ok("generate", tiny_artifact, PROMPT, "--max-new-tokens", 1)
    assert "1 new (token limit reached)" in result.stderr
    assert "tokens/s" not in result.stderr


@pytest.mark.parametrize(
    ("text", "prompt"),
    [(PROMPT, PROMPT), (f"{PROMPT}\n", PROMPT), (f"{PROMPT}\n\n", f"{PROMPT}\n"), (f"\n{PROMPT} ", f"\n{PROMPT} ")],
    ids=["as it is", "echo's newline", "only one newline", "nothing else"],
)
def test_prompt_from_standard_input(tiny_artifact: Path, text: str, prompt: str) -> None:
    options = ("--json", "--max-new-tokens", 24)
    result = run_cli("generate", tiny_artifact, *options, input=text)
    assert result.exit_code == 0
    metrics = json.loads(result.stdout)["metrics"]
    assert metrics["prompt_tokens"] == len(prompt)
    assert json.loads(result.stdout)["tokens"] == result_of("generate", tiny_artifact, prompt, *options[1:])["tokens"]
    dash = run_cli("generate", tiny_artifact, "-", *options, input=text)
    assert json.loads(dash.stdout)["tokens"] == json.loads(result.stdout)["tokens"]


def test_standard_input_is_documented() -> None:
    shown = " ".join(run_ok("generate", "--help").stdout.split())
    assert "ARTIFACT [PROMPT|-]" in shown
    assert "Without PROMPT, or if it is -, the prompt is all of standard input" in shown


def test_generated_text_ends_in_half_a_character(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-back text is printed at the end, whether the length or an end of text stops the generation."""
    text = load(tiny_artifact).text
    half = [*text.encode("é"), text.encode("世")[0]]
    for tokens, count in ((half, len(half)), ([*half, 2], 10)):
        script = iter(tokens)
        monkeypatch.setattr("tda_export.runtime.model.make_sampler", lambda sampling, s=script: lambda _: next(s))
        result = run_ok("generate", tiny_artifact, PROMPT, "--max-new-tokens", count)
        assert result.stdout == "é\N{REPLACEMENT CHARACTER}\n"


def test_chat(tiny_artifact: Path) -> None:
    rendered = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    expected = result_of("generate", tiny_artifact, rendered, "--max-new-tokens", 24)
    assert generated(tiny_artifact, "--chat")["tokens"] == expected["tokens"]
    assert generated(tiny_artifact)["tokens"] != expected["tokens"]


def test_dense(tiny_artifact: Path) -> None:
    dense = generated(tiny_artifact, "--mask", "dense")
    assert (dense["metrics"]["mask"], dense["metrics"]["sparsity"]) == ("dense", 0.0)
    assert dense["metrics"]["bytes_per_token"] == DENSE_FFN_BYTES
    assert dense["tokens"] != generated(tiny_artifact)["tokens"]
    assert generated(tiny_artifact, "--sparsity", "0")["tokens"] == dense["tokens"]


def test_sampling(tiny_artifact: Path) -> None:
    options = ("--temperature", "1", "--top-k", "50", "--top-p", "0.9", "--seed")
    one, again, other = (generated(tiny_artifact, *options, seed)["tokens"] for seed in (1, 1, 2))
    assert one == again != other


def test_stop_strings(tiny_artifact: Path) -> None:
    text = generated(tiny_artifact)["text"]
    first, second = text[6:8], text[3:5]
    stopped = generated(tiny_artifact, "--stop", first, "--stop", second)
    cut = min(text.index(first), text.index(second))
    assert (stopped["text"], stopped["metrics"]["finish_reason"]) == (text[:cut], "stop")
    result = run_ok("generate", tiny_artifact, PROMPT, "--stop", first, "--stop", second)
    assert result.stdout == f"{text[:cut]}\n"


def test_stop_tokens(tiny_artifact: Path) -> None:
    tokens = generated(tiny_artifact)["tokens"]
    stopped = generated(tiny_artifact, "--stop-token-id", tokens[7], "--stop-token-id", tokens[4])
    assert stopped["tokens"] == tokens[: min(tokens.index(tokens[7]), tokens.index(tokens[4]))]
    assert stopped["metrics"]["finish_reason"] == "stop"


def test_end_tokens_can_be_ignored(artifact_copy: Path) -> None:
    tokens = generated(artifact_copy)["tokens"]
    edit_manifest(artifact_copy, lambda manifest: manifest["model"].update(eos_token_ids=[tokens[3]]))
    assert generated(artifact_copy)["tokens"] == tokens[: tokens.index(tokens[3])]
    assert generated(artifact_copy, "--ignore-eos")["tokens"] == tokens


def test_min_p(tiny_artifact: Path) -> None:
    """At 1 only the likeliest token is left."""
    options = ("--temperature", "1", "--seed", "1")
    assert generated(tiny_artifact, *options, "--min-p", "1")["tokens"] == generated(tiny_artifact)["tokens"]
    assert generated(tiny_artifact, *options)["tokens"] != generated(tiny_artifact)["tokens"]


def test_variables_for_the_chat_template(artifact_copy: Path) -> None:
    """They work with generate and with chat."""
    replace_file(artifact_copy, contract.CHAT_TEMPLATE_FILE, b"{% if short %}A{% else %}ABCDE{% endif %}")
    variables = ("--chat-template-kwargs", '{"short": true}')
    assert generated(artifact_copy, "--chat")["metrics"]["prompt_tokens"] == 5
    assert generated(artifact_copy, "--chat", *variables)["metrics"]["prompt_tokens"] == 1
    result = run_cli("chat", artifact_copy, "--max-new-tokens", "2", *variables, input="Hi")
    assert "1 of 1 prompt tokens read" in result.stderr


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("{", "--chat-template-kwargs is not valid JSON ("),
        ("[" * 100_000, "--chat-template-kwargs is not valid JSON ("),
        ("[1]", "--chat-template-kwargs is not a JSON object. Give names and values"),
        ('{"messages": []}', "variable 'messages' cannot be set by the caller. Leave it out."),
        ('{"x": NaN}', "variable 'x' is not plain JSON"),
    ],
    ids=["cut", "deep", "list", "taken", "NaN"],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_variables_that_cannot_be(tmp_path: Path, command: str, given: str, text: str) -> None:
    """They are refused before a model is loaded."""
    arguments = ["x", "--chat"] if command == "generate" else []
    assert_error(run_cli(command, tmp_path / "none", *arguments, "--chat-template-kwargs", given), USAGE, text)


def test_variables_without_a_chat(tmp_path: Path) -> None:
    result = run_cli("generate", tmp_path / "none", "x", "--chat-template-kwargs", '{"a": 1}')
    assert_error(result, USAGE, "--chat-template-kwargs has no effect without --chat. Give both, or neither.")


def test_repetition_penalty(tiny_artifact: Path) -> None:
    sampling = Sampling(repetition_penalty=1.4)
    expected = load(tiny_artifact).generate(PROMPT, max_new_tokens=24, sampling=sampling)
    ours = generated(tiny_artifact, "--repetition-penalty", 1.4)
    assert ours["tokens"] == [token.id for token in expected] != generated(tiny_artifact)["tokens"]


def test_context(tiny_artifact: Path) -> None:
    result = generated(tiny_artifact, "--context", len(PROMPT) + 5)
    assert len(result["tokens"]) == 5
    assert result["metrics"]["finish_reason"] == "context"
