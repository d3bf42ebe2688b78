"""An artifact as a model of lm-evaluation-harness, registered there as `tda`.

`tda-export eval --tasks` uses it. lm-eval's own command line can use it where this module is imported first: `python -m
tda_export.evaluation --model tda --model_args artifact=DIR,method=tda,sparsity=0.5 --tasks …`. lm-eval does not
discover models of other packages, so its plain `lm_eval` command does not know the name.

Requests are scored one context after another (see `evaluation/scoring.py` for the protocols); all continuations of a
context share its prefill. Longer requests than the model's maximum lose tokens on the left, as with lm-eval's own
models. With method `dense` the results are those of its `hf` model on the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text

from tda_export.calibration.budgets import AllocationRule
from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.greedy import greedy_tokens, likeliest
from tda_export.evaluation.methods import Request, check_request, open_setting
from tda_export.evaluation.scoring import Score, Scorer
from tda_export.packing import Parts
from tda_export.progress import progress
from tda_export.runtime.artifact import open_artifact
from tda_export.runtime.deployment import Refresh
from tda_export.runtime.providers import choose_provider
from tda_export.runtime.session import Sessions
from tda_export.runtime.text import Text
from tda_export.runtime.token_step import TokenStep

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]  # the request's texts, context and continuation
NEW_TOKENS = 256  # default where a task sets none, as with the harness's own models


@register_model("tda")
class TdaLM(TemplateLM):
    """An artifact, a method and a protocol."""

    def __init__(
        self,
        artifact: str,
        method: str | None = None,
        sparsity: float | None = None,
        price: float | None = None,
        cett: float | None = None,
        allocation: AllocationRule | None = None,
        max_kl: float | None = None,
        refresh: int | None = None,
        calibration: str | None = None,
        parts: Parts | None = None,
        densities: str | None = None,
        prompt_tokens: int | None = None,
        protocol: str = "strict",
        provider: str = "auto",
        max_length: int | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """Open an artifact.

        Args:
            artifact: The artifact's folder.
            method: A key of `evaluation.methods.METHODS`; by default the artifact's own.
            sparsity: A budget, as in `evaluation.methods.Request`; likewise `price`, `cett`, `allocation` and `max_kl`.
            price: A budget.
            cett: A budget.
            allocation: A budget.
            max_kl: A budget.
            refresh: Tokens between refreshes while generating; by default the artifact's own.
            calibration: A calibration file that replaces the artifact's own.
            parts: The parts whose rows may be dropped (`all`, `ffn` or `attention`), for methods of priced artifacts.
            densities: A file of greedy densities, for `teal`.
            prompt_tokens: The prompt length for which `max_kl` is predicted; by default calibration's.
            protocol: `strict` or `griffin`.
            provider: `auto`, `cpu` or `cuda`.
            max_length: The most tokens that the model reads, at least 2; by default the model's maximum.
            device: Accepted but ignored, since lm-eval's command passes `cuda` by default. `provider` says where to
                run.
            batch_size: Accepted but ignored: requests are scored one by one, as the runtime generates.
            max_batch_size: Accepted but ignored, as `batch_size`.

        Raises:
            UsageError: An argument is unknown or out of range, or the artifact does not fit the method.
            TdaError: The artifact is damaged, or the provider cannot be used.
        """
        super().__init__()
        opened = open_artifact(Path(artifact))
        if max_length is not None and not 2 <= max_length <= opened.shape.max_positions:
            raise UsageError(
                f"A length of {max_length} tokens is outside [2, {opened.shape.max_positions}], the model's maximum."
            )
        request = Request(
            method,
            price=price,
            sparsity=sparsity,
            max_kl=max_kl,
            cett=cett,
            allocation=allocation,
            refresh=None if refresh is None else Refresh(refresh, opened.deployment.refresh.decay),
            calibration=None if calibration is None else Path(calibration),
            parts=parts,
            densities=None if densities is None else Path(densities),
            prompt_tokens=prompt_tokens,
        )
        check_request(opened, request)
        self.artifact, self.text = opened, Text(opened)
        self.max_length = max_length or opened.shape.max_positions
        sessions = Sessions(opened, choose_provider(provider, opened.shape.dtype))
        self.setting = open_setting(opened, sessions, request)
        self.scorer = Scorer(self.setting, protocol)
        self._step: TokenStep | None = None

    @classmethod
    def of(cls, artifact: Path, request: Request, *, protocol: str, provider: str) -> TdaLM:
        """Open an artifact for a request."""
        refresh = None if request.refresh is None else request.refresh.tokens
        given = ("calibration", request.calibration), ("densities", request.densities)
        files = {name: None if path is None else str(path) for name, path in given}
        arguments = asdict(request) | {"refresh": refresh} | files
        return cls(str(artifact), **arguments, protocol=protocol, provider=provider)

    # Text

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        eos = self.text.special_token("eos_token")
        return eos[0] if eos else min(self.artifact.eos_token_ids)

    @property
    def prefix_token_id(self) -> int:
        """The token that replaces an empty context: BOS, or EOS where there is no BOS."""
        bos = self.text.special_token("bos_token")
        return bos[0] if bos else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """The model's name, under which lm-eval caches requests."""
        return self.artifact.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenize, by default with the tokenizer's added tokens, unless the text already begins with them."""
        if add_special_tokens is None:
            spelled = self.text.special_token("bos_token") or self.text.special_token("eos_token")
            add_special_tokens = not has_bos_prefix(string, spelled[1] if spelled else None)
        return self.text.encode(string, special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render messages with the model's chat template."""
        if not add_generation_prompt:
            raise UsageError("An answer that begins in the prompt cannot be put into a chat template.")
        return self.text.chat(chat_history)

    # Scores

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise TdaError(
                    f"A continuation has {len(continuation)} tokens, and the model takes 1 to {self.max_length}. "
                    "Leave the task out, or raise max_length."
                )
            kept = self.max_length + 1 - len(continuation)
            groups.setdefault(tuple(context[-kept:]), []).append(index)
        scores: dict[int, Score] = {}
        if groups:
            self.scorer.reserve(
                max(len(prompt) + len(requests[i][2]) - 1 for prompt, ids in groups.items() for i in ids)
            )
        with progress("Scoring", len(requests), quiet=disable_tqdm) as advance:
            for prompt, group in groups.items():
                found = self.scorer.score(prompt, [requests[index][2] for index in group])
                for index, score in zip(group, found, strict=True):
                    scores[index] = score
                    if (texts := requests[index][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, (score.loglikelihood, score.greedy))
                advance(len(group))
        return [(scores[index].loglikelihood, scores[index].greedy) for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods of whole texts, in windows of the model's maximum.

        In the strict protocol a window's first half is context, and its second half is scored under that context's
        prompt mask. The first window's first half has no context: it is a prompt, and its tokens are scored densely. In
        the griffin protocol windows are the harness's (one token of context), and each window's last step is sparse. So
        `dense` equals `hf` in both where a text fits into one window, and in griffin always.
        """
        windows: list[Encoded] = []
        counts = []
        for (text,) in [request.args for request in requests]:
            tokens = self.tok_encode(text)
            cut = self._strict_windows(tokens) if self.scorer.protocol == "strict" else self._windows(tokens, 1)
            windows += [(None, *window) for window in cut]
            counts.append(len(cut))
        found = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(next(found)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _strict_windows(self, tokens: list[int]) -> list[tuple[list[int], list[int]]]:
        half = self.max_length // 2
        windows = self._windows(tokens, half)
        if not windows or len(windows[0][1]) < 2:
            return windows
        (context, first), *others = windows
        prompt = len(first) // 2
        return [(context, first[:prompt]), (context + first[:prompt], first[prompt:]), *others]

    def _windows(self, tokens: list[int], context: int) -> list[tuple[list[int], list[int]]]:
        """Cut a text into windows of context and continuation, of which the model reads `max_length` tokens
        together."""
        cut = utils.get_rolling_token_windows(
            token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=context
        )
        return [utils.make_disjoint_window(window) for window in cut]

    # Generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate greedily.

        In the strict protocol every new token comes from a sparse step: prefill reads the context without its last
        token. In the griffin protocol prefill reads all of it, so that the first new token is dense, as in normal use.

        Raises:
            UsageError: A task asks for sampling.
        """
        texts = []
        with progress("Generating", len(requests), quiet=disable_tqdm) as advance:
            for request in requests:
                context, options = request.args
                texts.append(self._generate(context, normalize_gen_kwargs(options, NEW_TOKENS)))
                self.cache_hook.add_partial("generate_until", request.args, texts[-1])
                advance(1)
        return texts

    def _generate(self, context: str, options: Any) -> str:
        if options["do_sample"]:
            raise UsageError("A task asks for sampling, and this model generates greedily. Set do_sample=False.")
        limit = min(options["max_gen_toks"], self.max_length - 1)
        tokens = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - limit) :]
        stops = [stop for stop in options["until"] if stop]
        stream, text = self.text.stream(tokens), ""
        step = self._borrow_step(len(tokens) + limit)
        for count, token in enumerate(greedy_tokens(self.setting, step, self._first(step, tokens)), 1):
            if token in self.artifact.eos_token_ids or token == self.eot_token_id:
                break
            if token < 0:
                raise TdaError("The logits are not finite. Build the artifact in another dtype.")
            text += stream.add(token)
            if any(stop in text for stop in stops) or count == limit:
                break
        return str(postprocess_generated_text(text + stream.finish(), stops, None))

    def _first(self, step: TokenStep, tokens: list[int]) -> int:
        """Read a prompt as the protocol says, and return the first new token."""
        setting, how = self.setting, self.setting.deployment
        prompt = tokens if self.scorer.protocol == "griffin" else tokens[:-1]
        logits = step.begin(prompt, how) if prompt else None
        step.follow(how if prompt and setting.masked else None)
        if logits is None or len(prompt) < len(tokens):
            return step.greedy(tokens[-1])
        return likeliest(logits)

    def _borrow_step(self, tokens: int) -> TokenStep:
        """Return a step with room for `tokens` tokens; a larger one is bound (and on CUDA captured) only if
        necessary."""
        if self._step is None or self._step.cache.capacity < tokens:
            self._step = self.setting.open_step(tokens)
            self._step.capture()
        self._step.cache.truncate(0)
        return self._step
