"""The Python interface: load an artifact and generate from it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tda_export.errors import TdaError, UsageError
from tda_export.runtime.artifact import Artifact, open_artifact
from tda_export.runtime.deployment import AnyDeployment, PriceDeployment
from tda_export.runtime.generate import Decoding, Generation, MaskMode
from tda_export.runtime.lookup import check_lookup
from tda_export.runtime.memory import PromptMemory
from tda_export.runtime.price_budget import chosen_price
from tda_export.runtime.providers import choose_provider
from tda_export.runtime.sampling import RepetitionPenalty, Sampling, make_sampler
from tda_export.runtime.session import Sessions
from tda_export.runtime.steps import open_step
from tda_export.runtime.stop_strings import StopStrings
from tda_export.runtime.text import Text
from tda_export.runtime.token_step import TokenStep

DEFAULT_NEW_TOKENS = 128
CAPACITY_STEP = 2048  # tokens


class Model:
    """An artifact with its sessions, ready to generate. One Generation is not safe for concurrent use; make several."""

    def __init__(self, artifact: Artifact, provider: str) -> None:
        self.artifact = artifact
        self.provider = provider
        self.text = Text(artifact)
        self.sessions = Sessions(artifact, provider)
        self._idle: TokenStep | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def borrow_step(self, tokens: int) -> Iterator[TokenStep]:
        """Lend a decode step with room for `tokens` tokens: the unused one from before if it is large enough, or a new
        one."""
        with self._lock:
            step, self._idle = self._idle, None
        if step is None or step.cache.capacity < tokens:
            step = self._new_step(tokens)
        step.cache.truncate(0)
        try:
            yield step
        finally:
            with self._lock:
                if self._idle is None or self._idle.cache.capacity < step.cache.capacity:
                    self._idle = step

    def _new_step(self, tokens: int) -> TokenStep:
        """Make a step with room for `tokens` tokens, or more where a new size would mean a new capture."""
        shape = self.artifact.shape
        if self.sessions.captures:
            tokens = min(-(-tokens // CAPACITY_STEP) * CAPACITY_STEP, shape.max_positions)
        return open_step(self.sessions, shape, tokens)

    def memory(self, *, context: int | None = None, keep_answers: bool = False) -> PromptMemory:
        """Make a memory for generations whose prompts each begin with the previous prompt, as in a chat.

        Args:
            context: The context of the generations, as for `generate`; the memory needs no room beyond it.
            keep_answers: Let the keys and values of answers stay as sparse steps have written them, instead of reading
                answers again, densely, with the next prompt.

        Raises:
            UsageError: The context is out of range, or `keep_answers` is set and the artifact has prompt masks.
        """
        if keep_answers:
            check_keeping(self.artifact)
        return PromptMemory(self._new_step, self.check_context(context), keep_answers=keep_answers)

    def at(
        self,
        *,
        price: float | None = None,
        sparsity: float | None = None,
        max_kl: float | None = None,
        prompt_tokens: int | None = None,
    ) -> PriceDeployment:
        """Return the deployment for one of three budgets of a priced artifact, for `generate(deployment=...)`.

        Args:
            price: The price of a byte of weights; 0 is dense.
            sparsity: Share of the bytes of the layers' linears not to read, in [0, 1).
            max_kl: The largest predicted KL to dense, in nats per token.
            prompt_tokens: The prompt length for which a KL is predicted, since short prompts lose more. None takes
                calibration's.

        Raises:
            UsageError: Not exactly one budget is given, it is out of range, or the artifact has no prices.
        """
        if not self.sessions.priced:
            raise UsageError(f"{self.artifact.folder} has masks and no prices, so it takes no price.")
        return chosen_price(self.artifact, price=price, sparsity=sparsity, max_kl=max_kl, prompt_tokens=prompt_tokens)

    def check_context(self, context: int | None) -> int:
        """Return the most tokens of prompt and answer together: `context`, or the model's maximum for None.

        Raises:
            UsageError: It is out of range.
        """
        limit = self.artifact.shape.max_positions
        if context is not None and not 1 < context <= limit:
            raise UsageError(f"A context of {context} tokens is outside [2, {limit}], the model's maximum.")
        return context or limit

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        chat: bool = False,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        mask: MaskMode | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        context: int | None = None,
        deployment: AnyDeployment | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        memory: PromptMemory | None = None,
        lookup: int = 0,
    ) -> Generation:
        """Begin a generation; iterate over the result for its tokens.

        Args:
            prompt: Text, or token ids.
            chat: Put the text into the model's chat template as a user's message.
            max_new_tokens: Stop after this many.
            mask: `tda` decodes with the prompt mask, `priced` by prices, `dense` reads every row; None is the
                artifact's own method.
            sampling: Greedy by default.
            context: The most tokens of prompt and answer together; None takes the model's maximum.
            deployment: Replaces the artifact's own thresholds or refresh: another budget, without another build.
            stop: Strings that end the answer; they are not part of its text.
            stop_token_ids: Tokens that end the answer beside the model's own; they are not part of it.
            ignore_eos: Do not end at the model's own end tokens.
            chat_template_kwargs: Further variables for the chat template, as for `Text.chat`.
            memory: Read only the new part of the prompt, and keep the prompt for the next one.
            lookup: The most drafted tokens, up to 15, that a step reads beside the newest one. Drafts are tokens that
                followed the same tokens earlier in the text; confirmed drafts need no step of their own. The answer is
                the same. Without native kernels, and on CUDA, it may differ where, within rounding, tokens tie or a row
                is just worth its price.

        Returns:
            An iterator of `Token` with `metrics` and `text`; `close()` ends it early.

        Raises:
            UsageError: An argument is out of range.
            TdaError: The prompt is empty or does not fit into the context; while iterating, logits were not finite, or
                the memory is in use.
        """
        limit, context = self.artifact.shape.max_positions, self.check_context(context)
        if max_new_tokens < 1:
            raise UsageError(f"{max_new_tokens} new tokens: give 1 or more.")
        check_lookup(lookup)
        if memory is not None and not memory.opens_by(self._new_step):
            raise UsageError("The memory belongs to another model. Make one with this model's memory().")
        own: MaskMode = "priced" if self.sessions.priced else "tda"
        mask = mask or own
        if mask not in (own, "dense"):
            raise UsageError(f"Mask {mask!r} is not one of this artifact's. Use {own} or dense.")
        how = deployment or self.artifact.deployment
        self._check(how)
        if isinstance(how, PriceDeployment) and mask == "dense":
            how = PriceDeployment(0.0)
        ends = self.end_tokens(stop_token_ids, ignore_eos=ignore_eos)
        tokens = self.tokenize(prompt, chat=chat, chat_template_kwargs=chat_template_kwargs)
        if len(tokens) >= context:
            raise TdaError(
                f"The prompt has {len(tokens)} tokens and the context {context}, which leaves no room for an answer. "
                f"Shorten the prompt{'' if context == limit else ', or raise the context'}."
            )
        decoding = Decoding(
            self.artifact,
            self.sessions,
            tokens,
            max_new_tokens=max_new_tokens,
            mask=mask,
            sampler=make_sampler(sampling),
            penalty=self._penalty(sampling, tokens),
            stream=self.text.stream(tokens),
            stops=StopStrings(stop),
            ends=ends,
            context=context,
            deployment=how,
            borrow_step=memory.borrow_step if memory else self.borrow_step,
            memory=memory,
            lookup=lookup,
        )
        return Generation(decoding)

    def _penalty(self, sampling: Sampling, tokens: list[int]) -> RepetitionPenalty | None:
        if sampling.repetition_penalty == 1:
            return None
        return RepetitionPenalty(sampling.repetition_penalty, self.artifact.shape.vocab_size, tokens)

    def _check(self, deployment: AnyDeployment) -> None:
        if isinstance(deployment, PriceDeployment):
            if not self.sessions.priced:
                raise UsageError(f"{self.artifact.folder} has masks and no prices, so it takes no price.")
            return
        if self.sessions.priced:
            raise UsageError(f"{self.artifact.folder} has prices and no masks, so it takes no thresholds.")
        layers, thresholds = self.artifact.shape.num_layers, deployment.thresholds
        if thresholds is not None and self.artifact.manifest["method"]["selection"] != "threshold":
            raise UsageError(f"{self.artifact.folder} selects its neurons by rank, so it takes no other budget.")
        for values in (thresholds, deployment.token_thresholds):
            if values is not None and len(values) != layers:
                raise UsageError(f"{len(values)} thresholds for {layers} layers.")
            if values is not None and not np.isfinite(values).all():
                raise UsageError("Thresholds must be finite.")
        if deployment.token_thresholds.any() and not self.sessions.two_levels:
            raise UsageError(f"{self.artifact.folder} was built without token thresholds, so it takes none.")

    def end_tokens(self, stop_token_ids: Sequence[int] = (), *, ignore_eos: bool = False) -> frozenset[int]:
        """Return the tokens that end an answer: the model's own unless they are ignored, and the given ones.

        Raises:
            UsageError: A token is outside the vocabulary.
        """
        vocabulary = self.artifact.shape.vocab_size
        for token in stop_token_ids:
            if not 0 <= token < vocabulary:
                raise UsageError(f"Stop token {token} is not in the vocabulary: ids lie in [0, {vocabulary}).")
        return frozenset(stop_token_ids) | (frozenset() if ignore_eos else self.artifact.eos_token_ids)

    def tokenize(
        self,
        prompt: str | Sequence[int],
        *,
        chat: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return a prompt's tokens; given ones are checked.

        Raises:
            UsageError: A token is outside the vocabulary, or variables for a chat template are given without a chat.
            TdaError: There are no tokens, the text is not valid, or the chat template refuses it.
        """
        if chat and not isinstance(prompt, str):
            raise UsageError("A chat prompt is text, not token ids.")
        if chat:
            return self.tokenize_chat([{"role": "user", "content": str(prompt)}], chat_template_kwargs)
        if chat_template_kwargs:
            raise UsageError("Variables for the chat template have no effect without it. Leave them out, or chat.")
        if isinstance(prompt, str):
            return self._checked(self.text.encode(prompt))
        given = list(prompt)
        if isinstance(prompt, bytes) or not all(hasattr(token, "__index__") for token in given):
            raise UsageError("A prompt is text, or whole numbers: token ids.")
        tokens = [int(token) for token in given]
        vocabulary = self.artifact.shape.vocab_size
        if any(not 0 <= token < vocabulary for token in tokens):
            raise UsageError(f"Token ids must lie in [0, {vocabulary}).")
        return self._checked(tokens)

    def tokenize_chat(
        self, messages: Sequence[Mapping[str, str]], chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the tokens of a chat, up to where the assistant's answer begins; arguments are those of `Text.chat`.

        Raises:
            UsageError: The text holds a token that the model does not have.
            TdaError: As `Text.chat`, or there are no tokens.
        """
        return self._checked(self.text.encode_chat(messages, chat_template_kwargs))

    @staticmethod
    def _checked(tokens: list[int]) -> list[int]:
        if not tokens:
            raise TdaError("The prompt is empty. Give some text.")
        return tokens


def check_keeping(artifact: Artifact) -> None:
    """Refuse to keep answers of artifacts with prompt masks, which need the statistics of all tokens, read densely.

    Raises:
        UsageError: The artifact has prompt masks.
    """
    if artifact.layout != "priced":
        raise UsageError(
            f"--keep-answers needs an artifact of prices, and {artifact.folder} has masks. Leave it out, or build one "
            "with 'tda-export build MODEL --method priced'."
        )


def load(folder: str | Path, *, provider: str = "auto") -> Model:
    """Load an artifact.

    Args:
        folder: A folder made by `tda-export build`.
        provider: `auto`, `cpu` or `cuda`.

    Raises:
        TdaError: The artifact is damaged, or the provider cannot be used.
        UsageError: The provider is unknown or does not fit the artifact.
    """
    artifact = open_artifact(folder)
    return Model(artifact, choose_provider(provider, artifact.shape.dtype))
