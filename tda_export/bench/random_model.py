"""Checkpoints with random weights of a true shape: speed and memory do not depend on the values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tda_export.models.skeleton import skeleton_shapes

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTE_VOCABULARY = len(SPECIAL_TOKENS) + 256
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHARD_BYTES = 2 << 30


def byte_tokenizer() -> Any:
    """Make a transformers tokenizer of single bytes and three special tokens: it takes any text, in 259 tokens."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_random_model(config: Any, folder: Path, *, dtype: torch.dtype, seed: int = 0) -> Path:
    """Write a Hugging Face folder with random weights, shard by shard, and the byte tokenizer.

    Args:
        config: A transformers configuration with `architectures` set; its vocabulary holds at least 259 tokens.
        folder: The folder, created if missing.
        dtype: The dtype of the weights.
        seed: The seed of the weights, which are normal with a variance of 1 / inputs, so that activations keep their
            size.

    Returns:
        `folder`.
    """
    import json

    folder.mkdir(parents=True, exist_ok=True)
    shapes = skeleton_shapes(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    size = 0

    def flush() -> None:
        if shard:
            file = f"model-{len(set(weight_map.values())):05}.safetensors"
            save_file(shard, folder / file)
            weight_map.update(dict.fromkeys(shard, file))
            shard.clear()

    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator, device=device)
        norm = len(shape) == 1 and not name.endswith(".bias")
        tensor = float(norm) + 0.1 * tensor if len(shape) == 1 else tensor * shape[1] ** -0.5
        shard[name] = tensor.to(dtype).cpu()
        size += shard[name].nbytes
        if size >= SHARD_BYTES:
            flush()
            size = 0
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
