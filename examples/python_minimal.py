"""Run an artifact with numpy, onnxruntime and tokenizers alone: `python python_minimal.py ARTIFACT "Once upon a time"`.

What is fed and what comes back is described in docs/artifact-format.md. This driver is as short as the contract
allows: no sampling, no shared buffers, no native kernels (without them sparse decoding costs more time than it saves).
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

NUMPY_TYPES = {"float32": np.float32, "float16": np.float16}  # numpy has no bfloat16


def open_graph(folder: Path, file: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # otherwise ONNX Runtime warns of every input that has a default
    return ort.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, feeds: dict) -> dict:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def sparse_inputs(manifest: dict, prefilled: dict, price: float | None) -> dict:
    """What decode takes beside tokens and cache: a price where rows have prices, otherwise the prompt's mask."""
    if manifest["layout"] == "priced":  # left out, it is manifest["price"], that of the budget
        return {} if price is None else {"price": np.array([price], np.float32)}
    mask = {}  # which neurons decode computes, and what stands in for the others
    for i in range(manifest["shape"]["num_layers"]):
        chosen = prefilled[f"present_mask_indices.{i}"]
        mask[f"mask_indices.{i}"] = chosen if len(chosen) else np.array([-1], np.int32)  # no neuron at all
        mask[f"tail_mean.{i}"] = prefilled[f"present_tail_mean.{i}"]
    return mask


def generate(folder: Path, prompt: list[int], *, dense: bool = False, price: float | None = None):
    """Yield the likeliest tokens, one after another, until the model ends its answer."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    shape, stored = manifest["shape"], manifest.get("kv", "float")
    if stored not in ("float", "float16"):
        sys.exit(f"{folder}: keys and values in {stored}, which this example does not read. Build it with --kv float.")
    layers = range(shape["num_layers"])
    prefill, decode = open_graph(folder, "prefill.onnx"), open_graph(folder, "decode.onnx")

    empty = np.zeros(
        (1, shape["num_kv_heads"], 0, shape["head_size"]), NUMPY_TYPES[shape["dtype"] if stored == "float" else stored]
    )
    cache = {f"past_key_values.{i}.{part}": empty for i in layers for part in ("key", "value")}
    sparse: dict[str, np.ndarray] = {}
    length, tokens, graph = 0, prompt, prefill
    while True:
        length += len(tokens)
        counted = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, length), np.int64)}
        outputs = run(graph, counted | cache | sparse)
        cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
        if graph is prefill and not dense:  # reading one token after another with the prefill graph is dense decoding
            graph, sparse = decode, sparse_inputs(manifest, outputs, price)  # which serve every token after the prompt
        token = int(outputs["logits"][0, -1].argmax())
        if length >= shape["max_positions"] or token in manifest["model"]["eos_token_ids"]:
            return
        yield token
        tokens = [token]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--dense", action="store_true", help="Read every weight.")
    parser.add_argument("--price", type=float, help="Read a row only if it is worth so much a byte (priced artifacts).")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--ids", action="store_true", help="Print token ids instead of text.")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.artifact / "tokenizer.json"))
    answer: list[int] = []
    prompt = tokenizer.encode(args.prompt).ids
    for token in generate(args.artifact, prompt, dense=args.dense, price=args.price):
        answer.append(token)
        if len(answer) == args.max_new_tokens:
            break
    print(*answer) if args.ids else print(tokenizer.decode(answer))
