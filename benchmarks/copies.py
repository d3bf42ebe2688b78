"""Write a copy of a Llama that computes the same function with weights that are not on a 4-bit grid.

The weights of a model from a 4-bit file have 16 values in each group. Quantisers then seem to lose nothing, or far too
much. So measure them on copies:

    python benchmarks/copies.py smollm2-135m scaled /tmp/scaled
    python benchmarks/copies.py smollm2-135m rotated /tmp/rotated
    tda-export quantize /tmp/scaled -o /tmp/scaled-int4
    python benchmarks/quantised_kl.py /tmp/scaled /tmp/scaled-int4 --text valid.txt

*scaled*: random factors e^u, u in [-0.4, 0.4], on the channels between norms and linears, on neurons between up and
down, and on values between v and o. *rotated*: norms are folded into linears, and the residual stream is multiplied by
a random orthogonal matrix. A rotated copy has no sparse inputs, so do not measure prices on it. The logits of the copy
must agree with the model's to 1e-3.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tda_export.models.source import resolve_model

EXPONENT = 0.4
TOLERANCE = 1e-3  # the largest difference of logits
TOKENS = 64  # on which logits are compared


def scaled(model: Any, generator: torch.Generator) -> None:
    """Multiply channels by random factors, and divide where they are read."""

    def factors(count: int) -> torch.Tensor:
        return (EXPONENT * (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1)).exp()

    for layer in model.model.layers:
        attention, ffn = layer.self_attn, layer.mlp
        hidden = layer.input_layernorm.weight.numel()
        norms = {
            layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            layer.post_attention_layernorm: (ffn.gate_proj, ffn.up_proj),
        }
        for norm, readers in norms.items():
            by = factors(hidden)
            _set(norm.weight, norm.weight.double() * by)
            for linear in readers:
                _set(linear.weight, linear.weight.double() / by)
        by = factors(ffn.up_proj.weight.shape[0])
        _scale_outputs(ffn.up_proj, by)
        _set(ffn.down_proj.weight, ffn.down_proj.weight.double() / by)
        by = factors(attention.v_proj.weight.shape[0])
        _scale_outputs(attention.v_proj, by)
        heads = by.unflatten(0, (-1, attention.head_dim))  # [KV, D]
        repeated = heads.repeat_interleave(attention.num_key_value_groups, dim=0).flatten()  # [H D]
        _set(attention.o_proj.weight, attention.o_proj.weight.double() / repeated)


def rotated(model: Any, generator: torch.Generator) -> None:
    """Fold norms into the linears that read them, and rotate the residual stream. This unties the head."""
    body, config = model.model, model.config
    size = config.hidden_size
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    if model.lm_head.weight is body.embed_tokens.weight:
        model.lm_head.weight = torch.nn.Parameter(body.embed_tokens.weight.detach().clone())
        config.tie_word_embeddings = False
    _set(body.embed_tokens.weight, body.embed_tokens.weight.double() @ rotation)
    norms = {body.norm: (model.lm_head,)}
    for layer in body.layers:
        attention, ffn = layer.self_attn, layer.mlp
        norms[layer.input_layernorm] = (attention.q_proj, attention.k_proj, attention.v_proj)
        norms[layer.post_attention_layernorm] = (ffn.gate_proj, ffn.up_proj)
        for linear in (attention.o_proj, ffn.down_proj):
            _set(linear.weight, rotation.T @ linear.weight.double())
            if linear.bias is not None:
                _set(linear.bias, linear.bias.double() @ rotation)
    for norm, readers in norms.items():
        for linear in readers:
            _set(linear.weight, (linear.weight.double() * norm.weight.double()) @ rotation)
        _set(norm.weight, torch.ones(size))


KINDS: dict[str, Callable[[Any, torch.Generator], None]] = {"scaled": scaled, "rotated": rotated}


def make_copy(model: Any, kind: str, seed: int) -> tuple[Any, float]:
    """Return a copy of a transformers Llama, and the largest difference of its logits."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (1, TOKENS), generator=generator)
    with torch.no_grad():
        KINDS[kind](other, generator)
        return other, float((model(tokens).logits - other(tokens).logits).abs().max())


def _scale_outputs(linear: torch.nn.Linear, by: torch.Tensor) -> None:
    _set(linear.weight, linear.weight.double() * by[:, None])
    if linear.bias is not None:
        _set(linear.bias, linear.bias.double() * by)


def _set(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    parameter.data = value.to(parameter.dtype).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Llama: a Hugging Face folder, a .gguf file, a hub id or smollm2-135m")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    source = resolve_model(options.model)
    if source.spec.architecture != "LlamaForCausalLM":
        parser.error(f"{options.model} is a {source.spec.architecture}, and copies are made of LlamaForCausalLM.")
    other, difference = make_copy(source.reference(), options.kind, options.seed)
    if difference > TOLERANCE:
        parser.error(f"logits differ by {difference:.2e}, which is more than {TOLERANCE}: this is no copy.")
    # The quantisation of a GGUF file is not that of the copy.
    if hasattr(other.config, "quantization_config"):
        del other.config.quantization_config
    other.config.architectures = ["LlamaForCausalLM"]
    other.generation_config.save_pretrained(options.output)
    other.save_pretrained(options.output)
    source.tokenizer.save_pretrained(options.output)
    print(f"Wrote {options.output}: {options.kind}, seed {options.seed}, logits within {difference:.2e}")


if __name__ == "__main__":
    main()
