"""Where a model comes from: a Hugging Face folder, a hub id, a GGUF file, or the built-in model."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tda_export.errors import TdaError, first_line
from tda_export.models.builtin import BUILTIN_MODELS, fetch_builtin
from tda_export.models.families import check_architecture, read_spec
from tda_export.models.fingerprint import fingerprint
from tda_export.models.gguf_header import refuse_unread
from tda_export.models.spec import DecoderSpec
from tda_export.models.weights import StateDictWeights, Weights, open_safetensors

HUB_FILES = ["*.json", "model*.safetensors", "*.jinja", "tokenizer*", "merges.txt", "vocab.txt", "spiece.model"]
HUB_IGNORED = ["*/*", "consolidated*"]  # other layouts of the same weights
GENERATION_CONFIG_FILE = "generation_config.json"
LOADING_PROBLEMS = {
    "missing_keys": "missing",
    "mismatched_keys": "of another shape",
    "conversion_errors": "not converted",
}


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

        with _readable_errors(self):
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=False, **self._gguf_argument)

    @cached_property
    def spec(self) -> DecoderSpec:
        """The architecture."""
        if self.gguf:
            with _readable_errors(self):
                refuse_unread(self.folder / self.gguf, self.name)
        else:
            self._refuse_foreign_architecture()
        config = self.config
        with _readable_errors(self):
            return read_spec(config)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer (a fast one: the artifact carries its `tokenizer.json`)."""
        from transformers import AutoTokenizer

        with _readable_errors(self):
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, **self._gguf_argument)
        if not tokenizer.is_fast:
            raise TdaError(f"{self.name}: its tokenizer has no fast version (tokenizer.json), which artifacts need.")
        return tokenizer

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """What `generation_config.json` says, stop tokens among it, or else the configuration."""
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
        files = [self.folder / self.gguf] if self.gguf else open_safetensors(self.folder).files
        return fingerprint(self.spec, files)

    def weights(self) -> Weights:
        """Open the checkpoint's weights for reading one tensor at a time."""
        if self.gguf is None:
            return open_safetensors(self.folder)
        return StateDictWeights(self._dequantised.state_dict())

    def reference(self, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
        """Load the model in PyTorch with transformers, in evaluation mode."""
        if self.gguf is not None:
            # The cached model is the source of `weights()`: hand out a converted copy, never move it itself.
            if dtype == torch.float32 and device == "cpu":
                return self._dequantised
            import copy

            return copy.deepcopy(self._dequantised).to(device=device, dtype=dtype).eval()
        open_safetensors(self.folder)  # refuses pickled weights, and names a missing shard
        return self._load(dtype=dtype, use_safetensors=True).to(device)

    @cached_property
    def _dequantised(self) -> Any:
        from transformers import GgufConfig

        # The conversion draws a progress bar that nothing but this switches off; it takes a second.
        with contextlib.redirect_stderr(io.StringIO()):
            return self._load(gguf_file=self.gguf, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))

    def _load(self, **options: Any) -> Any:
        """Load the model, and refuse a checkpoint whose missing tensors transformers would draw at random."""
        from transformers import AutoModelForCausalLM

        if self.spec.attention_softcap is not None:
            options["attn_implementation"] = "eager"  # some releases choose one by default that ignores soft caps
        with _readable_errors(self):
            model, report = AutoModelForCausalLM.from_pretrained(
                self.folder, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        for problem, meaning in LOADING_PROBLEMS.items():
            # A mismatch comes with both shapes, a missing tensor as its name alone.
            found = sorted(key if isinstance(key, str) else str(key[0]) for key in report.get(problem) or ())
            if found:
                more = f" and {len(found) - 1} more" if len(found) > 1 else ""
                raise TdaError(
                    f"{self.name}: the checkpoint does not fit its configuration ({meaning}: {found[0]}{more}). "
                    "Download the model again."
                )
        return model.eval()

    def _refuse_foreign_architecture(self) -> None:
        """Name what is supported before transformers advises on its own."""
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            architectures = config.get("architectures")
        except (ValueError, AttributeError, RecursionError):
            return  # a damaged file: transformers says what is wrong with it
        if architectures and not isinstance(architectures, list):
            raise TdaError(f"{self.name}: architectures in config.json is no list. Download the model again.")
        if architectures:
            check_architecture(str(architectures[0]))

    @property
    def _gguf_argument(self) -> dict[str, str]:
        return {"gguf_file": self.gguf} if self.gguf else {}


def resolve_model(model: str, *, notify: Callable[[str], None] = print) -> ModelSource:
    """Find a model and bring it onto this machine if it is not there yet.

    Args:
        model: A Hugging Face folder, a `.gguf` file, `smollm2-135m`, or a hub id such as `org/name`.
        notify: Called with one line of text when something is downloaded.

    Returns:
        The model, not yet loaded.

    Raises:
        TdaError: It is none of these, or a download failed.
    """
    quiet_transformers()
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:  # the home of a user who does not exist
        raise TdaError(f"{model}: no such folder. {_way_out()}") from error
    if model in BUILTIN_MODELS:
        file = fetch_builtin(model, notify=notify)
        return ModelSource(model, file.parent, file.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise TdaError(f"{model}: no config.json there, so this is no Hugging Face model folder. {_way_out()}")
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


def quiet_transformers() -> None:
    """Silence transformers' own progress bars and advice; what matters of it (missing tensors) is an error here."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _magic(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def _download(model: str, notify: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download

    notify(f"Looking for {model} on the Hugging Face hub")
    try:
        # Without a network this answers from the cache, if the model is there.
        return Path(snapshot_download(model, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
    except Exception as error:  # the hub's many ways of saying no
        raise TdaError(
            f"{model}: no such folder, and the hub did not deliver it ({first_line(error)}). {_way_out()}"
        ) from error


def _way_out() -> str:
    return f"Give a model folder, a .gguf file, a hub id (org/name) or {', '.join(BUILTIN_MODELS)}."


@contextlib.contextmanager
def _readable_errors(source: ModelSource) -> Iterator[None]:
    """Turn what transformers raises on a damaged or foreign checkpoint into one line."""
    try:
        yield
    except TdaError:
        raise
    except Exception as error:  # parsers of damaged files raise anything
        reason = " ".join(str(error).split())[:300]
        raise TdaError(f"{source.name}: the model cannot be loaded ({reason}). {_way_out()}") from error
