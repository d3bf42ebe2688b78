"""The ranks of a run: the processes that torchrun started, which share its sequences. A process alone is one rank.

The result that a rank computes for a sequence is sent to all ranks, and each rank adds results up in the order of the
sequences. So sums are the same on every rank, bit for bit those of a single process that computes in the same way, and
an interrupted run can resume with any number of ranks.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from tda_export.errors import TdaError, UsageError, first_line
from tda_export.signals import say_at_terminate

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")

LONGEST_WAIT = timedelta(hours=6)  # for a rank that does work the others do not, such as hashing a checkpoint
POLL_SECONDS = 0.0005  # between polls a signal can end the process
GOES_ON = "Start it again, with any number of ranks, to resume."
LOST = f"Another rank of this run has ended, and no rank can continue without it. {GOES_ON}"
ENDED = f"This run was ended, by torchrun because another rank has ended, or from outside. {GOES_ON}"


@dataclass(frozen=True)
class Ranks:
    """This process among the `count` that share a run: its `number`, and its number and the count on this machine.

    `device`: where tensors must be to be exchanged, `cpu` or this rank's GPU.
    """

    number: int = 0
    count: int = 1
    local_number: int = 0
    local_count: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.number == 0

    def own_device(self, device: str) -> str:
        """Return the device of this rank's model, given --device."""
        return f"cuda:{self.local_number}" if device == "cuda" and self.count > 1 else device

    def take_own_gpu(self, provider: str) -> None:
        """Make this rank's GPU the only one that this process sees, for code that always uses the first GPU.

        ONNX Runtime's sessions here are such code. Call it before anything initialises CUDA. It does nothing for one
        rank, on the CPU or without GPUs.

        Raises:
            UsageError: The provider may be CUDA, and this machine has fewer GPUs than ranks.
        """
        if self.count == 1 or provider == "cpu":
            return
        import torch

        gpus = torch.cuda.device_count()
        if not gpus:
            return
        if gpus < self.local_count:
            raise UsageError(_too_few(f"--provider {provider}", self.local_count, gpus))
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[self.local_number]

    def in_order(self, items: Sequence[T], work: Callable[[T, int], R]) -> Iterator[R]:
        """Yield the result of `work` for each item, in order, on every rank. Each rank works on every `count`-th item.

        Args:
            items: The items, the same on every rank.
            work: Called with an item and, for progress, the number of ranks that work on an item at this time. Its
                result is pickled; tensors must be on the CPU.

        Raises:
            TdaError: Another rank has ended.
        """
        for start in range(0, len(items), self.count):
            together = min(self.count, len(items) - start)
            mine = work(items[start + self.number], together) if self.number < together else None
            yield from self._gather(mine)[:together]

    def from_first(self, make: Callable[[], T]) -> T:
        """Have the first rank make something, and return it on every rank.

        Raises:
            TdaError: Another rank has ended.
        """
        if self.count == 1:
            return make()
        import torch
        from torch import distributed

        made = _packed(make()) if self.first else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(made)], device=self.device)
        _await(lambda: distributed.broadcast(size, 0, async_op=True))
        buffer = made.to(self.device) if self.first else torch.empty(int(size), dtype=torch.uint8, device=self.device)
        _await(lambda: distributed.broadcast(buffer, 0, async_op=True))
        return _unpacked(buffer.cpu())

    def first_here(self, make: Callable[[], T]) -> T:
        """Do something, such as a download, on one rank of each machine, and then on the others, which find it done.

        Raises:
            TdaError: Another rank has ended.
        """
        made = [make()] if self.local_number == 0 else []
        self._gather(None)
        return made[0] if made else make()

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replace a tensor in place by its sum over ranks. Rounding depends on the order of the sum.

        Raises:
            TdaError: Another rank has ended.
        """
        if self.count == 1:
            return
        from torch import distributed

        shared = tensor.to(self.device)
        _await(lambda: distributed.all_reduce(shared, async_op=True))
        if shared is not tensor:
            tensor.copy_(shared)

    def side_by_side(self, own: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Join the columns of all ranks, on the device of this rank's own.

        Args:
            own: [rows, n, ..], of the same dtype on every rank.
            sizes: n of each rank; it may be 0.

        Returns:
            [rows, sum of n, ..].

        Raises:
            TdaError: Another rank has ended.
        """
        if self.count == 1:
            return own
        import torch
        from torch import distributed

        padded = own.new_zeros(len(own), max(sizes), *own.shape[2:])
        padded[:, : own.shape[1]] = own
        shared = padded.to(self.device).view(torch.uint8)  # bytes, which every backend exchanges
        found = [torch.empty_like(shared) for _ in range(self.count)]
        _await(lambda: distributed.all_gather(found, shared, async_op=True))
        pieces = [each.view(own.dtype)[:, :size] for each, size in zip(found, sizes, strict=True)]
        return torch.cat(pieces, dim=1).to(own.device)

    def _gather(self, mine: Any) -> list[Any]:
        """Return each rank's value, by rank number."""
        if self.count == 1:
            return [mine]
        import torch
        from torch import distributed

        def gather(own: torch.Tensor) -> list[torch.Tensor]:
            found = [torch.empty_like(own) for _ in range(self.count)]
            _await(lambda: distributed.all_gather(found, own, async_op=True))
            return [each.cpu() for each in found]

        own = _packed(mine).to(self.device)
        sizes = [int(size) for size in gather(torch.tensor([len(own)], device=self.device))]
        padded = torch.cat([own, own.new_empty(max(sizes) - len(own))])
        return [_unpacked(each[:size]) for each, size in zip(gather(padded), sizes, strict=True)]


ALONE = Ranks()


@dataclass
class _Group:
    """The group that this process has joined: the store that all ranks see, and this process's standard error."""

    ranks: Ranks
    store: Any
    streams: contextlib.ExitStack


_joined: list[_Group] = []


def environment_rank() -> int:
    """Return this process's rank as torchrun set it, 0 for a single process."""
    return _number("RANK", 0)


def join(device: str) -> Ranks:
    """Join the ranks that torchrun started, by its environment variables; without them this process is the only rank.

    From then on only the first rank prints, and only the first of several errors is shown (`speaks`).

    Args:
        device: The value of --device; `cuda` is this rank's own GPU, and exchanges go through it.

    Raises:
        UsageError: Several ranks cannot use this device, or this machine has fewer GPUs than ranks.
        TdaError: The variables are not torchrun's, or the others cannot be reached.
    """
    count = _number("WORLD_SIZE", 1)
    if count == 1:
        return ALONE
    import torch
    from torch import distributed

    number, local_number, local_count = environment_rank(), _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", count)
    gpus = torch.cuda.device_count()
    enough = gpus >= local_count
    on_gpu = device in ("cuda", "auto") and enough and distributed.is_nccl_available()
    exchange = f"cuda:{local_number * (gpus // local_count if device == 'auto' else 1)}" if on_gpu else "cpu"
    ranks = Ranks(number, count, local_number, local_count, exchange)
    streams = contextlib.ExitStack()
    if not ranks.first:
        nowhere = streams.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - closed by leave
        streams.enter_context(contextlib.redirect_stdout(nowhere))
        streams.enter_context(contextlib.redirect_stderr(nowhere))
    try:
        store, _, _ = next(distributed.rendezvous("env://", timeout=LONGEST_WAIT))
        _joined.append(_Group(ranks, store, streams))
        say_at_terminate(_last_line)
        store.add("here", 1)
        while store.add("here", 0) < count:  # polls, since no signal would end a wait inside the store
            time.sleep(0.05)
        if on_gpu:
            torch.cuda.set_device(exchange)
        backend = "nccl" if on_gpu else "gloo"
        group = distributed.PrefixStore("group", store)
        distributed.init_process_group(backend, store=group, rank=number, world_size=count, timeout=LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise TdaError(f"Rank {number} cannot reach the others ({reason}). Start all with torchrun.") from error
    if device.startswith("cuda:"):
        raise UsageError(f"--device {device}: each of {count} ranks needs its own GPU. Give --device cuda.")
    if device in ("cuda", "auto") and gpus and not enough:
        raise UsageError(_too_few(f"--device {device}", local_count, gpus))
    return ranks


def _too_few(option: str, local_count: int, gpus: int) -> str:
    return (
        f"{option}: {local_count} ranks on this machine, and PyTorch finds {gpus} CUDA GPU here. Start torchrun with "
        f"--nproc-per-node {gpus}."
    )


def leave() -> None:
    """Leave the ranks that this process joined, once its work is done."""
    if not _joined:
        return
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
    _joined.pop().streams.close()


def speaks() -> bool:
    """Return whether this process reports why the run ends: the first rank that has an error to report does."""
    if not _joined:
        return environment_rank() == 0
    group = _joined[-1]
    own = str(group.ranks.number)
    try:
        first = group.store.compare_set("says", "", own).decode() == own
    except RuntimeError:  # the rank that kept the store has ended, and has said why
        first = False
    if first:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it soon; the message must come first, and once
        group.streams.close()
    return first


def _last_line() -> str:
    return f"Error: {ENDED}" if speaks() else ""


def _await(start: Callable[[], Any]) -> None:
    import torch

    try:
        work = start()
        while not work.is_completed():
            time.sleep(POLL_SECONDS)
        work.wait()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise TdaError(LOST) from error


class _Pickler(pickle.Pickler):
    """Pickles CPU tensors as NumPy arrays, which is many times faster than PyTorch's own pickling."""

    def reducer_override(self, value: Any) -> Any:
        import torch

        if type(value) is torch.Tensor:
            return torch.from_numpy, (value.detach().contiguous().numpy(),)
        return NotImplemented


def _packed(value: Any) -> torch.Tensor:
    import torch

    file = io.BytesIO()
    _Pickler(file, protocol=5).dump(value)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def _unpacked(buffer: torch.Tensor) -> Any:
    return pickle.loads(buffer.numpy().data)


def _number(variable: str, default: int) -> int:
    value = os.environ.get(variable, str(default))
    try:
        return int(value)
    except ValueError:
        raise TdaError(f"{variable}={value} is not a number. Start several processes with torchrun alone.") from None
