"""The Python interface: prompts and arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tda_export.errors import TdaError, UsageError
from tda_export.ffn_share import GATED
from tda_export.graph import contract
from tda_export.runtime import Conversation, Model, Sampling, load
from tda_export.runtime.deployment import Deployment, Refresh, one_level
from tests.runtime.conftest import PROMPT, add_unknown_token, edit_manifest, replace_file


def ids(model: Model, prompt: Any, **options: Any) -> list[int]:
    return [token.id for token in model.generate(prompt, max_new_tokens=16, **options)]


def test_token_ids_are_a_prompt(model: Model) -> None:
    tokens = model.text.encode(PROMPT)
    assert ids(model, tokens) == ids(model, tuple(tokens)) == ids(model, np.array(tokens)) == ids(model, PROMPT)


def test_chat_prompt_is_the_rendered_template(model: Model) -> None:
    rendered = model.text.chat([{"role": "user", "content": PROMPT}])
    assert rendered == f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    tokens = model.text.encode(rendered, special_tokens=False)
    assert ids(model, PROMPT, chat=True) == ids(model, tokens)
    assert ids(model, PROMPT, chat=True) != ids(model, PROMPT)


def test_seed_repeats_a_generation(model: Model) -> None:
    def sampled(seed: int) -> list[int]:
        return ids(model, PROMPT, sampling=Sampling(temperature=1.0, seed=seed))

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


@pytest.mark.parametrize("prompt", ["", [], np.array([], np.int64)], ids=["text", "list", "array"])
def test_empty_prompt(model: Model, prompt: Any) -> None:
    with pytest.raises(TdaError, match="The prompt is empty"):
        model.generate(prompt)


@pytest.mark.parametrize("length", [512, 600])
def test_prompt_longer_than_the_model(model: Model, length: int) -> None:
    with pytest.raises(TdaError, match=rf"The prompt has {length} tokens and the context 512.*Shorten the prompt\.$"):
        model.generate("x" * length)


def test_prompt_longer_than_the_context(model: Model) -> None:
    with pytest.raises(TdaError, match=r"The prompt has 40 tokens and the context 40.*or raise the context\.$"):
        model.generate("x" * 40, context=40)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_new_tokens": 0}, "0 new tokens: give 1 or more"),
        ({"mask": "sparse"}, "Mask 'sparse' is not one of this artifact's. Use tda or dense"),
        ({"context": 513}, r"A context of 513 tokens is outside \[2, 512\]"),
        ({"context": 1}, r"A context of 1 tokens is outside \[2, 512\]"),
        ({"context": 0}, r"A context of 0 tokens is outside \[2, 512\]"),
        ({"deployment": one_level([0.1], 3, GATED)}, "1 thresholds for 3 layers"),
        ({"deployment": one_level([], 3, GATED)}, "0 thresholds for 3 layers"),
        ({"deployment": one_level([0.1] * 3, 2, GATED)}, "2 thresholds for 3 layers"),
        ({"deployment": Deployment(None, np.full(4, 0.1), ffn_matrices=GATED)}, "4 thresholds for 3 layers"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_argument_out_of_range(model: Model, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        model.generate(PROMPT, **options)


def test_threshold_that_is_no_number(model: Model) -> None:
    """No score reaches NaN, so all neurons would be skipped silently."""
    bad = [0.1, float("nan"), 0.1]
    for how in (one_level(bad, 3, GATED), Deployment(None, np.array(bad, np.float32), ffn_matrices=GATED)):
        with pytest.raises(UsageError, match=r"^Thresholds must be finite\.$"):
            model.generate(PROMPT, deployment=how)


def test_token_thresholds_of_a_graph_without_a_second_level(artifact_copy: Path) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["method"].update(two_levels=False))
    loaded = load(artifact_copy, provider="cpu")
    with pytest.raises(UsageError, match="was built without token thresholds, so it takes none"):
        loaded.generate(PROMPT, deployment=Deployment(None, np.full(3, 0.1, np.float32), ffn_matrices=GATED))


@pytest.mark.parametrize(
    ("refresh", "text"),
    [
        ({"tokens": 1}, r"^A refresh after every 1 tokens: give 2 or more, or 0 for none\.$"),
        ({"tokens": -2}, "A refresh after every -2 tokens"),
        ({"tokens": 8, "decay": 1.1}, r"^A decay of 1\.1 is outside \[0, 1\]\.$"),
        ({"decay": -0.1}, "A decay of -0.1"),
        ({"decay": float("nan")}, "A decay of nan"),
    ],
    ids=str,
)
def test_refresh_out_of_range(refresh: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Refresh(**refresh)


@pytest.mark.parametrize(("tokens", "share"), [(0, 0.4), (2, 0.7), (4, 0.55), (60, 0.41)])
def test_share_of_refreshes(tokens: int, share: float) -> None:
    """One of N tokens is read densely."""
    assert Refresh(tokens).ffn_share(0.4) == pytest.approx(share)


def test_thresholds_for_top_k_selection(artifact_copy: Path) -> None:
    """Its graph reads no thresholds, so they would have no effect."""
    edit_manifest(artifact_copy, lambda manifest: manifest["method"].update(selection="topk", density=0.5))
    with pytest.raises(UsageError, match="selects its neurons by rank, so it takes no other budget"):
        load(artifact_copy, provider="cpu").generate(PROMPT, deployment=one_level([0.1] * 3, 3, GATED))


@pytest.mark.parametrize("token", [-1, 259])
def test_token_outside_the_vocabulary(model: Model, token: int) -> None:
    with pytest.raises(UsageError, match=r"Token ids must lie in \[0, 259\)"):
        model.generate([5, token])


@pytest.mark.parametrize("prompt", [[1.5, 2.0], b"abc", ["a"]], ids=str)
def test_a_prompt_of_something_else(model: Model, prompt: Any) -> None:
    with pytest.raises(UsageError, match=r"^A prompt is text, or whole numbers: token ids"):
        model.generate(prompt)


def test_token_ids_of_numpy(model: Model) -> None:
    expected = list(model.generate([5, 6, 7], max_new_tokens=4))
    assert list(model.generate(np.array([5, 6, 7]), max_new_tokens=4)) == expected


def test_text_with_a_token_that_the_model_does_not_have(artifact_copy: Path) -> None:
    """The tokenizer gives the token for text, but the model has no embedding for it."""
    add_unknown_token(artifact_copy)
    model = load(artifact_copy, provider="cpu")
    text = "contains '<image>', token 259 of the tokenizer"
    for ask in (
        lambda: model.generate("See <image>"),
        lambda: model.generate("See <image>", chat=True),
        lambda: Conversation(model).say("See <image>"),
        lambda: Conversation(model, system="<image>").say("See"),
    ):
        with pytest.raises(UsageError, match=text):
            ask()


def test_variables_without_a_chat(model: Model) -> None:
    with pytest.raises(UsageError, match="Variables for the chat template have no effect without it"):
        model.generate(PROMPT, chat_template_kwargs={"a": 1})


def test_variables_of_a_conversation(artifact_copy: Path) -> None:
    """They apply to every turn. Reserved names are refused at once."""
    template = b"{% for m in messages %}{{ m.content }}{% endfor %}{{ mark }}"
    replace_file(artifact_copy, contract.CHAT_TEMPLATE_FILE, template)
    model = load(artifact_copy, provider="cpu")
    chat = Conversation(model, chat_template_kwargs={"mark": "!" * 30})
    for _ in range(2):
        answer = chat.say("Hi", max_new_tokens=2)
        list(answer)
        assert answer.metrics.prompt_tokens >= 32
    with pytest.raises(UsageError, match="variable 'tools'"):
        Conversation(model, chat_template_kwargs={"tools": []})


def test_chat_of_token_ids(model: Model) -> None:
    with pytest.raises(UsageError, match="A chat prompt is text"):
        model.generate([5, 6], chat=True)


def test_load_takes_text_and_paths(tiny_artifact: Path, model: Model) -> None:
    loaded = load(str(tiny_artifact))
    assert loaded.artifact == model.artifact
    assert loaded.provider == "cpu"  # for float32 on any machine
