"""Tokenizer, streaming and chat templates."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tda_export.bench.random_model import BYTE_VOCABULARY, CHAT_TEMPLATE, SPECIAL_TOKENS, byte_tokenizer
from tda_export.errors import TdaError, UsageError
from tda_export.graph import contract
from tda_export.runtime import Model, Sampling, open_artifact
from tda_export.runtime.text import TOKENIZER_CONFIG_FILE, Text, TextStream
from tests.runtime.conftest import edit_manifest

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße, 世界 & <b>'quotes'</b> \"\n"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "{{ 1 + 1 }}"},
    ],
]
TEMPLATES = {
    "tiny": CHAT_TEMPLATE,
    "special tokens": "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}",
    "tojson": "{{ messages | tojson }} {{ messages | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}",
    "blocks are trimmed": "{% if messages %}\n    {% set x = 1 %}\n  body {{ x }}\n{% endif %}\n",
    "no tools": "{% if tools is none %}no tools{% else %}{{ tools | length }} tools{% endif %}",
    "no documents": "{% if documents is none %}no documents{% else %}documents{% endif %}",
    "today": "{{ strftime_now('%Y') | length }}",
}


def with_template(folder: Path, template: str) -> Text:
    """Return the text side of an artifact with another chat template."""
    artifact = open_artifact(folder)
    (folder / contract.CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
    return Text(artifact)


def pieces_of(stream: TextStream, tokens: list[int]) -> list[str]:
    """Return the text of every token, and the text held back to the end."""
    return [*(stream.add(token) for token in tokens), stream.finish()]


def streamed(text: Text, tokens: list[int], prompt: Sequence[int] = ()) -> str:
    return "".join(pieces_of(text.stream(prompt), tokens))


PLAIN = st.text().filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))
TOKENS = st.lists(st.integers(0, BYTE_VOCABULARY - 1), max_size=40)


@given(PLAIN)
@example("naïve 世界 👩‍👩‍👧 𝄞")
@example(f"ends in a real {REPLACEMENT}")
@example(" leading and trailing ")
def test_streamed_pieces_are_the_text(model: Model, content: str) -> None:
    tokens = model.text.encode(content)
    assert len(tokens) == len(content.encode())  # one token a byte
    assert streamed(model.text, tokens) == content


@given(PLAIN, PLAIN)
@example("世界世界世界", "世界")  # the stream begins inside a character of the prompt
@example("👩‍👩‍👧", "👩‍👩‍👧")
def test_the_prompts_text_is_not_repeated(model: Model, prompt: str, content: str) -> None:
    assert streamed(model.text, model.text.encode(content), model.text.encode(prompt)) == content


@given(TOKENS)
def test_streamed_pieces_are_the_full_decode(model: Model, tokens: list[int]) -> None:
    whole = byte_tokenizer().decode(tokens, skip_special_tokens=True)
    *pieces, held_back = pieces_of(model.text.stream([]), tokens)
    assert "".join(pieces) + held_back == whole
    assert held_back.strip(REPLACEMENT) == ""  # only an unfinished character is held back


def test_a_character_comes_with_its_last_token(model: Model) -> None:
    stream = model.text.stream([])
    assert pieces_of(stream, model.text.encode("a世b")) == ["a", "", "", "世", "b", ""]


@pytest.mark.parametrize(("missing", "held_back"), [(0, ""), (1, REPLACEMENT), (2, REPLACEMENT), (3, "")])
def test_finish_returns_an_unfinished_character(model: Model, missing: int, held_back: str) -> None:
    tokens = model.text.encode("a世")
    stream = model.text.stream(model.text.encode("prompt"))
    assert "".join(stream.add(token) for token in tokens[: 4 - missing]) == ("a世" if missing == 0 else "a")
    assert stream.finish() == held_back


def test_finish_of_nothing(model: Model) -> None:
    assert model.text.stream([]).finish() == ""
    assert model.text.stream(model.text.encode("prompt")).finish() == ""


def test_other_threads_run_while_text_is_tokenized(model: Model) -> None:
    begun, ended, ticks = threading.Event(), threading.Event(), 0

    def encode() -> None:
        begun.set()
        model.text.encode("1" * 1_000_000)
        ended.set()

    thread = threading.Thread(target=encode)
    thread.start()
    begun.wait()
    while not ended.is_set():
        time.sleep(1e-4)
        ticks += 1
    thread.join()
    assert ticks > 10  # once or twice where the tokenizer keeps Python to itself


def test_special_tokens_have_no_text(model: Model) -> None:
    tokens = model.text.encode("".join(SPECIAL_TOKENS))
    assert tokens == [0, 1, 2]
    assert streamed(model.text, tokens) == ""


@pytest.mark.parametrize("end", [[], [0, 1] * 100], ids=["text", "special"])
@pytest.mark.parametrize("first", ["a", "世"])
def test_a_token_takes_as_long_after_any_prompt(model: Model, first: str, end: list[int]) -> None:
    """After a long prompt, and after many tokens without text (here special ones, and one beyond the vocabulary)."""
    text = model.text
    lengths: list[int] = []

    class Counting:
        def decode(self, tokens: list[int], **options: bool) -> str:
            lengths.append(len(tokens))
            return str(text._tokenizer.decode(tokens, **options))

        id_to_token = text._tokenizer.id_to_token

    stream = TextStream(Counting(), text._special, [*text.encode(first * 5000), *end])  # type: ignore[arg-type]
    assert "".join(pieces_of(stream, [*[1, 300] * 200, *text.encode("the 世 sea")])) == "the 世 sea"
    assert max(lengths) <= 64


WORDS = ["<s>", "▁The", "▁sea", "▁is", "▁calm", "ly", ".", "▁"]


@pytest.fixture
def words(artifact_copy: Path) -> Text:
    """A Metaspace tokenizer like Llama 2's. Its decoder drops the space before the first token."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="▁"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>"])
    artifact = open_artifact(artifact_copy)
    tokenizer.save(str(artifact.file(contract.TOKENIZER_FILE)))
    return Text(artifact)


@pytest.mark.parametrize(
    ("prompt", "tokens", "pieces"),
    [
        ([1, 2], [3, 4, 5, 6], [" is", " calm", "ly", ".", ""]),
        ([0, 1, 2], [3, 4], [" is", " calm", ""]),
        ([0, 1, *[2] * 20], [3, 4], [" is", " calm", ""]),  # longer than the tokens that the stream begins with
        ([1, 2, 0], [3, 4], [" is", " calm", ""]),
        ([0, 1, 2, 3, 4], [5, 6], ["ly", ".", ""]),
        ([0], [1, 2], ["The", " sea", ""]),  # the text begins here
        ([], [1, 2], ["The", " sea", ""]),
    ],
    ids=["words", "special first", "long", "special last", "inside a word", "nothing but special", "nothing"],
)
def test_the_space_after_the_prompt(words: Text, prompt: list[int], tokens: list[int], pieces: list[str]) -> None:
    assert pieces_of(words.stream(prompt), tokens) == pieces


@pytest.fixture
def byte_fallback(artifact_copy: Path) -> Text:
    """A tokenizer of bytes like Llama 2's. Its decoder shows a run of bytes that is not text as � alone."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<unk>": 256, "<s>": 257, "▁a": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>"])
    artifact = open_artifact(artifact_copy)
    tokenizer.save(str(artifact.file(contract.TOKENIZER_FILE)))
    return Text(artifact)


def test_bytes_of_characters_stay_together_across_the_prompt(byte_fallback: Text) -> None:
    prompt, new = [257, *"世界世界世界".encode()], "是的,世界a"
    assert "".join(pieces_of(byte_fallback.stream(prompt), list(new.encode()))) == new


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([*"👍".encode(), 0xF0, 0x9F], "👍"),  # ends inside a character
        ([0x0A, 0xE6, 258], "\n"),  # a word follows half a character
        ([*"👍".encode(), 0xF0, 0x9F, 258, 258], "👍"),
    ],
)
def test_broken_characters_lose_no_text(byte_fallback: Text, tokens: list[int], text: str) -> None:
    shown = "".join(pieces_of(byte_fallback.stream([257, 258]), tokens))
    assert shown.startswith(text)
    assert "�" in shown
    assert shown.count(" a") == tokens.count(258)


@given(tokens=st.lists(st.one_of(st.integers(0, 255), st.just(258)), max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tokens_can_be_streamed(byte_fallback: Text, tokens: list[int]) -> None:
    shown = "".join(pieces_of(byte_fallback.stream([257, 258]), tokens))
    assert shown.count(" a") >= tokens.count(258)


CHARACTERS = ["é", "世", "👍", "a世", "世é"]


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("content", CHARACTERS)
@pytest.mark.parametrize("missing", [1, 2, 3])
def test_character_that_the_prompt_ends_inside(
    fallback: bool, content: str, missing: int, model: Model, byte_fallback: Text
) -> None:
    """It comes once, with the token that completes it, without the prompt's text before it."""
    text = byte_fallback if fallback else model.text
    tokens = [*(b"xy " + content.encode())] if fallback else model.text.encode("xy " + content)
    missing = min(missing, len(content[-1].encode()) - 1)
    prompt, rest = tokens[:-missing], tokens[-missing:]
    assert "".join(pieces_of(text.stream(prompt), rest)) == content[-1]
    more = [*b"z"] if fallback else text.encode("z")
    assert "".join(pieces_of(text.stream(prompt), [*rest, *more])) == content[-1] + "z"


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("content", CHARACTERS)
def test_half_a_character_of_the_prompt_is_not_repeated(
    fallback: bool, content: str, model: Model, byte_fallback: Text
) -> None:
    text = byte_fallback if fallback else model.text
    prompt = ([*content.encode()] if fallback else text.encode(content))[:-1]
    word = [258] if fallback else text.encode(" a")
    assert "".join(pieces_of(text.stream(prompt), word)) == " a"
    assert pieces_of(text.stream(prompt), []) == [""]


def test_prompt_that_ends_with_a_replacement_character(model: Model) -> None:
    assert streamed(model.text, model.text.encode("a"), model.text.encode("x" + REPLACEMENT)) == "a"


def test_token_beyond_the_vocabulary_is_named(artifact_copy: Path) -> None:
    """Gemma 3's tokenizer has tokens for images that its text model does not have."""
    artifact = open_artifact(artifact_copy)
    path = artifact.file(contract.TOKENIZER_FILE)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<image_soft_token>"])
    tokenizer.save(str(path))
    loaded = Model(artifact, "cpu")
    message = (
        r"^The text contains '<image_soft_token>', token 259 of the tokenizer, and the model's vocabulary ends at "
        r"258\. Leave it out of the text\.$"
    )
    penalty = Sampling(temperature=1.0, repetition_penalty=1.5, seed=1)
    for sampling in (Sampling(), penalty):
        with pytest.raises(UsageError, match=message):
            loaded.generate("a <image_soft_token> b", sampling=sampling)
    with pytest.raises(UsageError, match=message):
        loaded.generate("a <image_soft_token> b", chat=True)
    with pytest.raises(UsageError, match=message):
        loaded.text.encode("<image_soft_token>", special_tokens=False)


def test_prompt_and_pieces_make_the_whole_text(words: Text) -> None:
    tokens = words.encode("The sea is calm The sea is calm The sea is calm")
    assert len(tokens) == 12
    for split in range(1, len(tokens)):
        assert " ".join(["The sea is calm"] * 3).endswith(streamed(words, tokens[split:], tokens[:split]))
        assert streamed(words, tokens[split:], tokens[:split]).startswith(" ")


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one message", "conversation"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_chat_equals_transformers(artifact_copy: Path, template: str, messages: list[dict[str, str]]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = with_template(artifact_copy, template)
    assert text.chat(messages) == expected
    assert (
        text.encode(text.chat(messages), special_tokens=False)
        == tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
    )


def test_special_tokens_may_be_objects(artifact_copy: Path) -> None:
    text = with_template(artifact_copy, "{{ bos_token }}{{ eos_token }}")
    (artifact_copy / TOKENIZER_CONFIG_FILE).write_text('{"bos_token": {"content": "<s>"}, "eos_token": null}')
    assert text.chat([]) == "<s>"


def test_no_template(artifact_copy: Path) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["files"].pop(contract.CHAT_TEMPLATE_FILE))
    with pytest.raises(TdaError, match=r"this model has no chat template. Leave --chat out"):
        Text(open_artifact(artifact_copy)).chat(CONVERSATIONS[0])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.nothing() }}",
        "{% for %}",
        "{{ range(10 ** 9) }}",
        "{{ messages + 1 }}",
        "{{ 1 / 0 }}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    ],
)
def test_template_that_fails(artifact_copy: Path, template: str) -> None:
    text = with_template(artifact_copy, template)
    with pytest.raises(TdaError, match="the chat template cannot be rendered"):
        text.chat(CONVERSATIONS[0])


def test_generation_marks_are_just_their_content(artifact_copy: Path) -> None:
    text = with_template(artifact_copy, "{% generation %}{{ messages[0].role }}{% endgeneration %}!")
    assert text.chat(CONVERSATIONS[0]) == f"{CONVERSATIONS[0][0]['role']}!"


def test_damaged_tokenizer_config(artifact_copy: Path) -> None:
    (artifact_copy / TOKENIZER_CONFIG_FILE).write_text("{nope")
    edit_manifest(artifact_copy, lambda manifest: manifest["files"][TOKENIZER_CONFIG_FILE].update(size=5))
    with pytest.raises(TdaError, match=r"tokenizer_config\.json: not readable"):
        Text(open_artifact(artifact_copy)).chat(CONVERSATIONS[0])


def test_the_template_says_why(artifact_copy: Path) -> None:
    text = with_template(artifact_copy, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TdaError, match=r"chat_template.jinja: .*\(roles must alternate\)"):
        text.chat(CONVERSATIONS[0])


def test_damaged_tokenizer(artifact_copy: Path) -> None:
    artifact = open_artifact(artifact_copy)
    artifact.file(contract.TOKENIZER_FILE).write_text("{}")
    with pytest.raises(TdaError, match=r"tokenizer.json: not a readable tokenizer"):
        Text(artifact)


def test_text_that_is_not_unicode(model: Model) -> None:
    """Python reads invalid bytes of an argument or of standard input as lone surrogates."""
    with pytest.raises(TdaError, match="UTF-8"):
        model.text.encode("caf\udce9")
