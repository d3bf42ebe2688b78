"""The thread that runs the model: one answer after another, in order of arrival."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from tda_export.errors import TdaError, UsageError
from tda_export.runtime import Generation, Metrics, Model
from tda_export.runtime.deployment import AnyDeployment
from tda_export.runtime.generate import MaskMode
from tda_export.serve.errors import ApiError, internal, invalid
from tda_export.serve.metrics import Outcome, ServerMetrics
from tda_export.serve.protocol import Order

LONGEST_RETRY = 60  # seconds

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class Done:
    """The answer's end: the text that was held back, and the metrics."""

    text: str
    metrics: Metrics


@dataclass(frozen=True)
class Failed:
    """The answer failed: nothing more comes."""

    error: ApiError


Event = Piece | Done | Failed


@dataclass(eq=False)
class Job:
    """A request on its way through the worker, which calls `deliver` from its own thread.

    After a `Done` or `Failed` nothing more is delivered. After cancellation at most one of these two is delivered.
    """

    endpoint: str
    order: Order
    deliver: Callable[[Event], None]
    arrived: float = field(default_factory=time.monotonic)  # the time of arrival, before its prompt was read
    started: float = math.nan
    generation: Generation | None = None
    cancelled: bool = False


class Worker:
    """A bounded queue and the thread that empties it.

    Prompts are read into one `PromptMemory`: a chat's next request reads only what is new, if no other request came in
    between.
    """

    def __init__(
        self,
        model: Model,
        *,
        queue_size: int,
        context: int,
        mask: MaskMode | None,
        deployment: AnyDeployment,
        metrics: ServerMetrics,
        keep_answers: bool = False,
        lookup: int = 0,
    ) -> None:
        """Prepare the worker; `start` starts it.

        Args:
            model: The model, which only this worker uses from now on.
            queue_size: The most requests that wait besides the running one.
            context: The most tokens of prompt and answer.
            mask: How to decode.
            deployment: The deployment for requests that do not ask for one.
            metrics: The counters of requests.
            keep_answers: As for `Model.memory`.
            lookup: As for `Model.generate`, for every request.
        """
        self.model, self.context, self.metrics = model, context, metrics
        self._mask, self._deployment, self._queue_size = mask, deployment, queue_size
        self._lookup = lookup
        self._memory = model.memory(context=context, keep_answers=keep_answers)
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False  # whether new jobs are refused
        self._stopping = False
        self._failed = False
        self._mean_seconds = 1.0  # mean time of an answer
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        metrics.watch(lambda: self.waiting, lambda: int(self._running is not None))

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def state(self) -> Literal["ok", "stopping", "failed"]:
        """`ok` while jobs are accepted, `stopping` once they no longer are; `failed` where the thread has crashed."""
        return "failed" if self._failed else "stopping" if self._closed else "ok"

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        with self._changed:
            return not self._waiting and self._running is None

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Accept no more jobs. Queued and running jobs continue."""
        with self._changed:
            self._closed = True

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue.

        Raises:
            ApiError: The queue is full, the server is shutting down, or its thread has crashed.
        """
        with self._changed:
            self.check_room()
            self._waiting.append(job)
            self._changed.notify()

    def check_room(self) -> None:
        """Refuse a job if the queue is full or the server is shutting down.

        Raises:
            ApiError: The queue is full, the server is shutting down, or its thread has crashed.
        """
        with self._changed:
            self.check_open()
            # An idle worker takes the first job of the queue at once, so that job does not count as waiting.
            if len(self._waiting) - (self._running is None) >= self._queue_size:
                wait = math.ceil(self._mean_seconds * (len(self._waiting) + 1))
                raise ApiError(
                    503,
                    f"{len(self._waiting)} requests are waiting already. Try again later.",
                    code="queue_full",
                    retry_after=min(wait, LONGEST_RETRY),
                )

    def check_open(self) -> None:
        """Refuse a job if the server is shutting down.

        Raises:
            ApiError: The server is shutting down, or its thread has crashed.
        """
        if self._closed:
            raise internal() if self._failed else stopping()

    def cancel(self, job: Job) -> None:
        """Take a job out of the queue, or end its answer before the next token; do nothing if it has ended."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                self.metrics.ended(job.endpoint, "cancelled")
            if job.generation is not None:
                job.generation.cancel()

    def stop(self) -> None:
        """Refuse waiting jobs, end the running answer and chat template, and wait for the thread."""
        with self._changed:
            self._closed = self._stopping = True
            if self._running is not None and self._running.generation is not None:
                self._running.generation.cancel()
            self._changed.notify()
        self._refuse_waiting(stopping())
        self.model.text.close()
        if self._thread.is_alive():
            self._thread.join()

    def _refuse_waiting(self, error: ApiError) -> None:
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        for job in waiting:
            self._end(job, "failed", Failed(error))

    def _work(self) -> None:
        try:
            while (job := self._next()) is not None:
                self._run(job)
        except BaseException:  # without this thread the server is dead, and nobody may wait for it
            logger.exception("The model's thread broke down. Start the server again")
            with self._changed:
                self._closed = self._failed = True
            self._refuse_waiting(internal())

    def _next(self) -> Job | None:
        """Wait for a job; None ends the thread."""
        with self._changed:
            while not self._waiting and not self._stopping:
                self._changed.wait()
            if self._stopping:
                return None
            self._running = job = self._waiting.popleft()
            job.started = time.monotonic()
            return job

    def _run(self, job: Job) -> None:
        try:
            self.metrics.started(job.started - job.arrived)
            self._answer(job)
        except UsageError as error:
            self._end(job, "refused", Failed(invalid(str(error), code="invalid_value")))
        except TdaError as error:
            logger.error("%s", error)
            self._end(job, "failed", Failed(ApiError(500, str(error), code="model_error")))
        except Exception:
            logger.exception("A request failed")
            self._end(job, "failed", Failed(internal()))
        except BaseException:
            self._end(job, "failed", Failed(internal()))
            raise
        finally:
            self._free(job)

    def _answer(self, job: Job) -> None:
        order = job.order
        given = order.deployment is not None
        generation = self.model.generate(
            order.prompt,
            max_new_tokens=order.max_new_tokens,
            mask=None if given else self._mask,
            sampling=order.sampling,
            context=self.context,
            deployment=order.deployment if given else self._deployment,
            stop=order.stop,
            stop_token_ids=order.stop_token_ids,
            ignore_eos=order.ignore_eos,
            memory=self._memory,
            lookup=self._lookup,
        )
        with self._changed:
            job.generation = generation
            if job.cancelled or self._stopping:
                generation.cancel()
        shown = 0
        try:
            for token in generation:
                if generation.metrics.new_tokens == 1:
                    self.metrics.first_token(time.monotonic() - job.arrived)
                shown += len(token.text)
                if token.text and not job.cancelled:
                    job.deliver(Piece(token.text))
        finally:
            generation.close()
            self.metrics.generated(generation.metrics)
        if generation.metrics.finish_reason:
            self._end(job, "answered", Done(generation.text[shown:], generation.metrics))
        elif job.cancelled:
            self.metrics.ended(job.endpoint, "cancelled")
        else:
            self._end(job, "failed", Failed(stopping()))

    def _free(self, job: Job) -> None:
        """Free the place of a job that has run, once."""
        with self._changed:
            if self._running is job:
                self._running = None
                self._mean_seconds += 0.2 * (time.monotonic() - job.started - self._mean_seconds)

    def _end(self, job: Job, outcome: Outcome, event: Done | Failed) -> None:
        self._free(job)  # first, since a client that is told of the end may ask again at once
        self.metrics.ended(job.endpoint, outcome)
        job.deliver(event)


def stopping() -> ApiError:
    """Make the error for a server that is shutting down."""
    return ApiError(503, "The server is shutting down. Try again later.", code="shutting_down", retry_after=10)
