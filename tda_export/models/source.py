"""The source of a model: a Hugging Face folder, a hub id, a GGUF file, or the built-in model."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tda_export.errors import TdaError, first_line
from tda_export.models.builtin import BUILTIN_MODELS, fetch_builtin
from tda_export.models.config_sizes import check_sizes
from tda_export.models.families import check_architecture, read_spec
from tda_export.models.fingerprint import fingerprint
from tda_export.models.gguf_file import GgufHeader, read_gguf_header
from tda_export.models.gguf_header import check_gguf_header
from tda_export.models.gguf_tokenizer import correct_gguf_tokenizer
from tda_export.models.notes import nothing_but_notes, quiet_transformers, say
from tda_export.models.placement import AUTO, Memory, check_places, own_memory, spread
from tda_export.models.quantised import QuantisedWeights, read_quantisation
from tda_export.models.skeleton import skeleton_shapes
from tda_export.models.spec import DecoderSpec
from tda_export.models.weights import (
    OTHER_FILES,
    SINGLE_FILE,
    SafetensorsWeights,
    StateDictWeights,
    Weights,
    has_own_head,
    has_safetensors,
    open_safetensors,
)
from tda_export.weights.integers import Codes
from tda_export.weights.plan import FormatPlan

HUB_FILES = ["*.json", "model*.safetensors", "*.jinja", "tokenizer*", "merges.txt", "vocab.txt", "spiece.model"]
HUB_IGNORED = ["*/*", "consolidated*"]  # other layouts of the same weights
GENERATION_CONFIG_FILE = "generation_config.json"
LOADING_PROBLEMS = {
    "missing_keys": "missing",
    "mismatched_keys": "of another shape",
    "conversion_errors": "not converted",
}
MOST_ABSENT = 2  # times the checkpoint's weights; the missing tensors are named if they are fewer
OTHER_WEIGHTS = "transformers_weights"
MISTRAL_FIX = "fix_mistral_regex"
TOKENIZER_OPTIONS = {"mistral": {MISTRAL_FIX: True}}  # by model type; transformers says which checkpoints need it


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine. `name` is what the user asked for; `gguf` names a file of `folder` or is None."""

    name: str
    folder: Path
    gguf: str | None = None

    @cached_property
    def config(self) -> Any:
        """The transformers configuration."""
        from transformers import AutoConfig

        if self.gguf:
            check_gguf_header(self.header, self.name)
        else:
            self._check_configuration_file()
        with _readable_errors(self):
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False, **self._gguf_argument)
        if self.quantisation is not None:  # the returned configuration is the de-quantised model's
            del config.quantization_config
        return config

    @cached_property
    def quantisation(self) -> dict[str, Any] | None:
        """The quantisation entry of config.json in folders of `tda-export quantize`, None for other models."""
        return None if self.gguf else read_quantisation(self.folder)

    @property
    def formats(self) -> FormatPlan | None:
        """The formats of a quantised folder's matrices, None for a float model."""
        return None if self.quantisation is None else self._quantised.plan

    @property
    def codes(self) -> Mapping[str, Codes]:
        """The matrices that the folder has as integers, exactly; none of a float model.

        By name: `layers.{i}.{part}` [in, out] (`Layout.part` transposed), `embedding` [V, M], and `head` [M, V] or
        [V, M] (`FormatPlan.head_major`). A tied head is the embedding and has no entry. Each is read from the file on
        access.
        """
        return {} if self.quantisation is None else self._quantised.codes

    @cached_property
    def _quantised(self) -> QuantisedWeights:
        assert self.quantisation is not None
        with _readable_errors(self):
            return QuantisedWeights(self.folder, read_spec(self.config), self.quantisation)

    @cached_property
    def header(self) -> GgufHeader:
        """The header of the GGUF file."""
        assert self.gguf is not None
        with _readable_errors(self):
            return read_gguf_header(self.folder / self.gguf)

    @cached_property
    def spec(self) -> DecoderSpec:
        """The architecture."""
        config = self.config
        with _readable_errors(self):
            spec = read_spec(config)
        if self.gguf or not has_safetensors(self.folder):
            return spec
        weights = self._checkpoint
        if spec.num_layers > len(weights.names):
            raise TdaError(
                f"{self.name}: num_hidden_layers in config.json is {spec.num_layers} and the checkpoint has "
                f"{len(weights.names)} tensors. {OTHER_FILES}"
            )
        return dataclasses.replace(spec, tied_head=spec.tied_head and not has_own_head(spec, weights))

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer (a fast one: the artifact carries its `tokenizer.json`)."""
        from transformers import AutoTokenizer

        options: dict[str, Any] = self._gguf_argument | TOKENIZER_OPTIONS.get(self.config.model_type, {})
        with _readable_errors(self):
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, **options)
        if not tokenizer.is_fast:
            raise TdaError(f"{self.name}: its tokenizer has no fast version (tokenizer.json), which artifacts need.")
        # Some of transformers' tokenizers (Gemma, Qwen2, GPT-2) are made with special tokens alone if there is no file.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise TdaError(
                f"{self.name}: its tokenizer has no tokens except special ones: tokenizer.json is missing or empty. "
                "Download the model again."
            )
        if self.gguf:
            correct_gguf_tokenizer(tokenizer, self.header, self.name)
        elif getattr(tokenizer.backend_tokenizer, MISTRAL_FIX, False):
            say(f"{self.name}: text is split as Mistral's corrected tokenizers do it (transformers' {MISTRAL_FIX}).")
        return tokenizer

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """The content of `generation_config.json`, with stop tokens, or of the configuration where there is none."""
        from transformers import GenerationConfig

        if not self.gguf and (self.folder / GENERATION_CONFIG_FILE).is_file():
            with _readable_errors(self):
                return dict(GenerationConfig.from_pretrained(self.folder).to_diff_dict())
        return dict(GenerationConfig.from_model_config(self.config).to_diff_dict())

    @cached_property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a generation: the generation configuration's and the tokenizer's."""
        eos = self.generation_config.get("eos_token_id", self.config.eos_token_id)
        ids = set(eos) if isinstance(eos, list) else {eos}
        return sorted(int(token) for token in ids | {self.tokenizer.eos_token_id} if token is not None)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of architecture and weights (see `tda_export.models.fingerprint`)."""
        files = [self.folder / self.gguf] if self.gguf else self._checkpoint.files
        return fingerprint(self.spec, files)

    def weights(self) -> Weights:
        """Open the checkpoint's weights for reading one tensor at a time."""
        if self.gguf is None:
            return self._checkpoint
        return StateDictWeights(self._dequantised.state_dict())

    @property
    def _checkpoint(self) -> SafetensorsWeights | QuantisedWeights:
        """The weights of a folder."""
        return open_safetensors(self.folder) if self.quantisation is None else self._quantised

    def reference(
        self, *, dtype: torch.dtype = torch.float32, device: str = "cpu", memory: Memory | None = None
    ) -> Any:
        """Load the model in PyTorch with transformers, in evaluation mode.

        Args:
            dtype: The dtype of its weights.
            device: `auto` spreads it over this machine's GPUs and the CPU's memory (`placement`).
            memory: The memory that `auto` may fill, all by default.

        Raises:
            TdaError: The checkpoint is damaged, or larger than this memory.
        """
        if device == AUTO:
            return self._spread(dtype, own_memory() if memory is None else memory)
        if self.gguf is not None:
            # The cached model is the source of `weights()`: return a converted copy, and never move the cached one.
            if dtype == torch.float32 and device == "cpu":
                return self._dequantised
            return copy.deepcopy(self._dequantised).to(device=device, dtype=dtype).eval()
        checkpoint = self._checkpoint  # refuses pickled weights, and names a missing shard
        if isinstance(checkpoint, QuantisedWeights):
            tensors = {name: checkpoint.load(name) for name in checkpoint.names}
            return self._load(None, dtype=dtype, config=self.config, state_dict=tensors).to(device)
        return self._load(self.folder, dtype=dtype, use_safetensors=True).to(device)

    def _spread(self, dtype: torch.dtype, memory: Memory) -> Any:
        if self.gguf is not None or self.quantisation is not None:  # made in the CPU's memory in any case
            model = self.reference(dtype=dtype)
            return spread(copy.deepcopy(model) if self.gguf is not None else model, memory)
        return self._load(self.folder, dtype=dtype, use_safetensors=True, device_map=AUTO, max_memory=memory)

    @cached_property
    def _dequantised(self) -> Any:
        from transformers import GgufConfig

        with nothing_but_notes():  # the conversion draws a progress bar
            return self._load(
                self.folder, gguf_file=self.gguf, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )

    def _load(self, folder: Path | None, **options: Any) -> Any:
        """Load the model, and refuse a checkpoint with missing tensors, which transformers would initialise at random.

        Args:
            folder: The model's folder, None where `options` have configuration and tensors.
        """
        from transformers import AutoModelForCausalLM

        self._check_parameters()
        options |= attention_options(self.spec)
        with _readable_errors(self):
            loader = AutoModelForCausalLM
            if folder is None:  # a model's class accepts None, Auto classes do not
                loader = AutoModelForCausalLM._model_mapping[type(self.config)]
            else:
                options["trust_remote_code"] = False
            model, report = loader.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        for problem, meaning in LOADING_PROBLEMS.items():
            # A mismatch is reported with both shapes, a missing tensor only by its name.
            found = sorted(key if isinstance(key, str) else str(key[0]) for key in report.get(problem) or ())
            if found:
                more = f" and {len(found) - 1} more" if len(found) > 1 else ""
                raise TdaError(
                    f"{self.name}: the checkpoint does not fit its configuration ({meaning}: {found[0]}{more}). "
                    f"{OTHER_FILES}"
                )
        check_places(getattr(model, "hf_device_map", {}))
        return model.eval()

    def _check_parameters(self) -> None:
        """Refuse a configuration of a far larger model than the checkpoint, before anything of that size is
        allocated."""
        with _readable_errors(self):
            wanted = sum(math.prod(shape) for shape in skeleton_shapes(self.config).values())
        if self.gguf:
            shapes = list(self.header.tensors.values())
        else:
            weights = self._checkpoint
            shapes = [weights.shape(name) for name in weights.names]
        present = sum(math.prod(shape) for shape in shapes)
        if wanted > MOST_ABSENT * present:
            raise TdaError(
                f"{self.name}: the configuration is of a model of {wanted:,} weights, and the checkpoint has "
                f"{present:,}. {OTHER_FILES}"
            )

    def _check_configuration_file(self) -> None:
        """Refuse unsupported architectures and impossible sizes before transformers reads them."""
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            architectures = config.get("architectures")
        except (ValueError, AttributeError, RecursionError):
            return  # a damaged file: transformers reports what is wrong
        if architectures and not isinstance(architectures, list):
            raise TdaError(f'{self.name}: architectures in config.json is not a list. Write it as one: ["NAME"].')
        if architectures:
            check_architecture(str(architectures[0]))
        check_sizes(config, self.name, "config.json")
        if config.get(OTHER_WEIGHTS):
            raise TdaError(
                f"{self.name}: config.json has {OTHER_WEIGHTS}, weights in a file of another name, which is not read. "
                f"Name that file {SINGLE_FILE}, and remove the field."
            )

    @property
    def _gguf_argument(self) -> dict[str, str]:
        return {"gguf_file": self.gguf} if self.gguf else {}


def attention_options(spec: DecoderSpec) -> dict[str, str]:
    """Return the attention implementation for transformers: some releases choose one by default that ignores soft
    caps."""
    return {} if spec.attention_softcap is None else {"attn_implementation": "eager"}


def resolve_model(model: str, *, notify: Callable[[str], None] = print) -> ModelSource:
    """Find a model, and download it if it is not on this machine yet.

    Args:
        model: A Hugging Face folder, a `.gguf` file, `smollm2-135m`, or a hub id such as `org/name`.
        notify: Called with one line of text when something is downloaded.

    Returns:
        The model, not yet loaded.

    Raises:
        TdaError: `model` is none of these, or a download failed.
    """
    quiet_transformers()
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:  # `~user` for a user that does not exist
        raise TdaError(f"{model}: no such folder. {_way_out()}") from error
    if model in BUILTIN_MODELS:
        file = fetch_builtin(model, notify=notify)
        return ModelSource(model, file.parent, file.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise TdaError(
                f"{model}: there is no config.json, so this is not a Hugging Face model folder. {_way_out()}"
            )
        return ModelSource(model, path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise TdaError(f"{model}: no such file. {_way_out()}")
        if _magic(path) != b"GGUF":
            raise TdaError(f"{model}: not a GGUF file. {_way_out()}")
        return ModelSource(model, path.parent, path.name)
    if path.exists():
        raise TdaError(f"{model}: neither a model folder nor a .gguf file. {_way_out()}")
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise TdaError(f"{model}: no such folder. {_way_out()}")
    return ModelSource(model, _download(model, notify))


def _magic(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def _download(model: str, notify: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download

    notify(f"Looking for {model} on the Hugging Face hub")
    try:
        # Without a network this answers from the cache, if the model is there.
        return Path(snapshot_download(model, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
    except Exception as error:  # the hub raises many kinds of errors
        raise TdaError(
            f"{model}: no such folder, and it could not be downloaded from the hub ({first_line(error)}). {_way_out()}"
        ) from error


def _way_out() -> str:
    return f"Give a model folder, a .gguf file, a hub id (org/name) or {', '.join(BUILTIN_MODELS)}."


@contextlib.contextmanager
def _readable_errors(source: ModelSource) -> Iterator[None]:
    """Turn transformers' errors about a damaged or foreign checkpoint into one line."""
    try:
        yield
    except TdaError:
        raise
    except Exception as error:  # parsers of damaged files raise any kind of error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        reason = f"{reason} is missing" if isinstance(error, KeyError) else reason
        raise TdaError(f"{source.name}: the model cannot be loaded ({reason}). {_way_out()}") from error
