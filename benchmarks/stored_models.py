"""The models that `peer_quality.py` compares: ours, llama.cpp's and GenAI's, de-quantised into PyTorch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_peers import gguf_names, write_gguf

from tda_export.calibration.corpus import load_corpus
from tda_export.models.linear_modules import layer_linears
from tda_export.models.source import ModelSource, resolve_model
from tda_export.packing import HeadRows, RowBytes, linear_shape, row_bytes_of
from tda_export.quantization.nearest import round_matrix
from tda_export.weights.formats import FLOAT_FORMATS, IntegerFormat, WeightFormat
from tda_export.weights.plan import HEAD, FormatPlan, part_name

BITS = ("5.2", "5.8", "6.4")  # mean bits of a weight of the linears, of which some are int8 and the others int4
QUANTISED = {
    "int8": ["--weights", "int8", "--quantizer", "rtn"],
    "int4": ["--weights", "int4"],
    "int4, head int4": ["--weights", "int4", "--weights-for", "head=int4"],
    **{f"{bits} bits": ["--bits-per-weight", bits] for bits in BITS},
    "5.8 bits, head int4": ["--bits-per-weight", "5.8", "--weights-for", "head=int4"],
}
MIXED = {  # the parts that are int8; the others are int4
    "int4, v int8": ("v",),
    "int4, v and o int8": ("v", "o"),
    "int4, v, o and down int8": ("v", "o", "down"),
}
LLAMA = ("Q4_0", "Q4_K_M", "Q8_0")
IMATRIX = ("Q4_0", "Q4_K_M")
IMATRIX_SEQUENCES, IMATRIX_LENGTH = 16, 384
GENAI: dict[str, list[str]] = {
    "int4": [],
    "int4 k_quant, head int8": ["algo_config=k_quant_last", "is_symmetric=false"],
    "int4 k_quant, mixed": ["algo_config=k_quant_mixed", "is_symmetric=false"],
}

Make = Callable[[], "Stored"]


@dataclass(frozen=True)
class Stored:
    """A model of de-quantised weights, and their bytes as stored.

    `row_bytes`: the bytes of a row for our models, whose rows have prices; None for others, for which `linear_bytes`
    are the bytes of the linears of a layer.
    """

    model: Any
    head_bytes: int
    linear_bytes: int = 0
    row_bytes: RowBytes | None = None


def _head_by_input(model: Any, format: WeightFormat) -> Any:
    """Give a model a head of its own, rounded by input channel as an artifact stores it where rows have prices."""
    if isinstance(format, IntegerFormat):
        head = model.get_output_embeddings()
        codes = round_matrix(HEAD, head.weight.detach().T.contiguous(), format, symmetric=False)
        head.weight = torch.nn.Parameter(torch.from_numpy(codes.decode()).T.contiguous(), requires_grad=False)
    return model


def run(*words: Any) -> None:
    subprocess.run([str(word) for word in words], check=True, stdout=sys.stderr, stderr=sys.stderr)


class Stacks:
    """The models to compare. Each is made when it is first used."""

    def __init__(self, folder: Path, llama: Path, head: HeadRows) -> None:
        self.folder, self.llama, self.copy, self.head = folder, llama, folder / "scaled", head
        if not (self.copy / "config.json").is_file():
            run(sys.executable, Path(__file__).with_name("copies.py"), "smollm2-135m", "scaled", self.copy)
        self.source = resolve_model(str(self.copy))

    def ours(self) -> dict[str, Make]:
        def folder(name: str) -> Make:
            return lambda: self._own(self.quantised(name))

        mixed = {name: self._mixed(parts) for name, parts in MIXED.items()}
        return {"float16": lambda: self._own(self.source), **{name: folder(name) for name in QUANTISED}, **mixed}

    def peers(self) -> dict[str, Make]:
        found = {f"llama.cpp {kind}": self._gguf(kind, imatrix=False) for kind in LLAMA}
        found |= {f"llama.cpp {kind}, imatrix": self._gguf(kind, imatrix=True) for kind in IMATRIX}
        return found | {f"GenAI {name}": self._genai(name, words) for name, words in GENAI.items()}

    def quantised(self, name: str) -> ModelSource:
        folder = self.folder / (name if self.head == "whole" else f"{name}, head priced")
        if not (folder / "config.json").is_file():
            words = (*QUANTISED[name], "--head", self.head)
            run(sys.executable, "-m", "tda_export", "quantize", self.copy, "-o", folder, *words)
        return resolve_model(str(folder))

    def _own(self, source: ModelSource, plan: FormatPlan | None = None) -> Stored:
        plan, spec = plan or source.formats, source.spec
        head = (plan.of(HEAD) if plan else None) or FLOAT_FORMATS["float16"]
        drops = self.head == "priced"
        sizes = (spec.hidden_size, spec.vocab_size) if drops else (spec.vocab_size, spec.hidden_size)
        head_bytes = sizes[0] * head.row_bytes(sizes[1])
        rounds = drops and (plan is None or plan.head_major == "output")
        model = _head_by_input(source.reference(), head) if rounds else source.reference()
        return Stored(model, head_bytes, row_bytes=row_bytes_of(spec, 2, plan, head=drops))

    def _mixed(self, parts: tuple[str, ...]) -> Make:
        def make() -> Stored:
            fours, eights = self.quantised("int4"), self.quantised("int8")
            assert fours.formats is not None
            assert eights.formats is not None
            names = {part_name(layer, part) for layer in range(fours.spec.num_layers) for part in parts}
            wide = {name: eights.formats.of(name) for name in names}
            plan = FormatPlan({**fours.formats.formats, **wide}, fours.formats.head_major)
            stored, finer = self._own(fours, plan), eights.reference()
            for layer in range(fours.spec.num_layers):
                theirs = layer_linears(finer, fours.spec, layer)
                for part, linear in layer_linears(stored.model, fours.spec, layer).items():
                    if part_name(layer, part) in names:
                        linear.set_weight(theirs[part].weight)
            return stored

        return make

    def _with(self, weights: dict[str, torch.Tensor]) -> Any:
        """Return the copy of the model with other matrices, given by their names in the checkpoint."""
        model = self.source.reference()
        with torch.no_grad():
            for name, value in weights.items():
                model.get_parameter(name).copy_(value)
        return model

    def _gguf(self, kind: str, *, imatrix: bool) -> Make:
        def make() -> Stored:
            import gguf

            floats, path = self.folder / "f16.gguf", self.folder / f"{kind}{'-imatrix' if imatrix else ''}.gguf"
            if not floats.is_file():
                write_gguf(self.copy, floats)
            if not path.is_file():
                words = ["--imatrix", self._imatrix()] if imatrix else []
                run(self.llama / "llama-quantize", *words, floats, path, kind)
            names = {
                target: name for name, target in gguf_names(self.source.config, self.source.weights().names).items()
            }
            weights, linear, head = {}, 0, 0
            for tensor in gguf.GGUFReader(path).tensors:
                weights[names[tensor.name]] = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
                if tensor.name == "token_embd.weight":
                    head = int(tensor.n_bytes)
                elif len(tensor.shape) == 2:
                    linear += int(tensor.n_bytes)
            return Stored(self._with(weights), head, linear)

        return make

    def _imatrix(self) -> Path:
        """Write llama.cpp's importance matrix: the mean squares of the inputs of every linear over text."""
        import gguf

        path, spec = self.folder / "imatrix.gguf", self.source.spec
        if path.is_file():
            return path
        corpus = load_corpus(
            "builtin",
            self.source.tokenizer,
            text_column=None,
            sequences=IMATRIX_SEQUENCES,
            length=IMATRIX_LENGTH,
            seed=0,
            vocab_size=spec.vocab_size,
        )
        model, sums = self.source.reference(), {}

        def add(name: str, inputs: torch.Tensor) -> None:
            sums[name] += inputs.double().square().sum((0, 1))

        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                sums[name] = torch.zeros(module.in_features, dtype=torch.float64)
                module.register_forward_pre_hook(lambda module, inputs, name=name: add(name, inputs[0]))
        with torch.no_grad():
            for tokens in corpus.tokens:
                model(tokens[None], use_cache=False)
        targets = gguf_names(self.source.config, self.source.weights().names)
        writer = gguf.GGUFWriter(path, "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", ["builtin"])
        writer.add_uint32("imatrix.chunk_count", len(corpus.tokens))
        writer.add_uint32("imatrix.chunk_size", IMATRIX_LENGTH)
        for name, total in sums.items():
            target = targets.get(f"{name}.weight", "token_embd.weight")  # for a tied head
            writer.add_tensor(f"{target}.in_sum2", total.float().numpy()[None])
            writer.add_tensor(f"{target}.counts", np.full((1, 1), len(corpus.tokens) * IMATRIX_LENGTH, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _genai(self, name: str, words: list[str]) -> Make:
        def make() -> Stored:
            folder = self.folder / f"genai-{list(GENAI).index(name)}"
            if not (folder / "model.onnx").is_file():
                command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", self.copy, "-o", folder]
                command += ["-p", "int4", "-e", "cpu", "-c", self.folder / "cache"]
                run(*command, "--extra_options", "block_size=32", *words)
            weights, linear, head = {}, 0, 0
            for matrix, value, size in onnx_matrices(folder / "model.onnx"):
                if matrix.startswith("lm_head"):
                    head, weights["model.embed_tokens.weight"] = size, value
                    continue
                linear += size
                layer, module, part = matrix.removeprefix("/").split("/")[1:4]
                owner = {"attn": "self_attn"}.get(module, module)
                stem = f"model.{layer}.{owner}"
                parts = {part: value}
                if part == "qkv_proj":
                    spec = self.source.spec
                    sizes = [linear_shape(spec, name)[1] for name in "qkv"]
                    parts = {f"{one}_proj": rows for one, rows in zip("qkv", value.split(sizes), strict=True)}
                weights |= {f"{stem}.{one}.weight": rows for one, rows in parts.items()}
            return Stored(self._with(weights), head, linear)

        return make


def onnx_matrices(path: Path) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yield each MatMulNBits: its place (`model/layers.0/attn/qkv_proj`), its matrix [out, in], and its bytes."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        numbers = {attribute.name: attribute.i for attribute in node.attribute}
        arrays = [numpy_helper.to_array(tensors[name]) for name in node.input[1:4] if name]
        bits, rows, columns = numbers["bits"], numbers["N"], numbers["K"]
        codes = unpacked(arrays[0].reshape(rows, -1), bits)
        blocks = codes.reshape(rows, -1, numbers["block_size"])  # [N, blocks, block]
        zero: Any = 2 ** (bits - 1)
        if len(arrays) > 2:
            zero = unpacked(arrays[2].reshape(rows, -1), bits)[:, : blocks.shape[1], None]
        value = (blocks - zero) * arrays[1].reshape(rows, -1, 1).astype(np.float32)
        matrix = torch.from_numpy(value.reshape(rows, -1)[:, :columns].astype(np.float32))
        yield node.name.replace("/MatMul_Q4", "").removeprefix("/"), matrix, sum(array.nbytes for array in arrays)


def unpacked(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return the numbers that are packed in bytes, as float32. The first of a byte is in its low bits."""
    if bits == 8:
        return codes.astype(np.float32)
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1).astype(np.float32)
