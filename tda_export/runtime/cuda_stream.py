"""The CUDA stream of captured steps, which they are put on without waiting for them, and marks on it to wait for."""

from __future__ import annotations

import ctypes
import functools
import sys
import weakref
from typing import Any

from tda_export.errors import TdaError

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: work of the default stream, such as copies of tokens, does not wait for it
WITHOUT_TIME = 2  # CU_EVENT_DISABLE_TIMING


def cuda_driver() -> Any:
    """Load NVIDIA's driver.

    Raises:
        OSError: There is none.
    """
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


class Mark:
    """A place in the stream: all that was put on it before. It may be set again."""

    def __init__(self, stream: StepStream) -> None:
        self._stream = stream
        self._event = stream.created("cuEventCreate", WITHOUT_TIME)
        # At the end of the process the driver frees all by itself, and may be gone before.
        weakref.finalize(self, stream.check, "cuEventDestroy_v2", self._event).atexit = False

    def set(self) -> None:
        """Set the mark after what is on the stream now."""
        self._stream.check("cuEventRecord", self._event, self._stream.handle)

    def wait(self) -> None:
        """Wait until the GPU has come to the mark.

        Raises:
            TdaError: What was put on the stream failed.
        """
        self._stream.check("cuEventSynchronize", self._event)


class StepStream:
    """A stream of GPU 0, in the context that ONNX Runtime uses too. It lives as long as the process."""

    def __init__(self) -> None:
        self._driver = cuda_driver()
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self.handle = self.created("cuStreamCreate", NON_BLOCKING)

    def created(self, function: str, flags: int) -> ctypes.c_void_p:
        """Create a stream or an event with one function of the driver."""
        created = ctypes.c_void_p()
        self.check(function, ctypes.byref(created), flags)
        return created

    def check(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver in the context of GPU 0, whichever thread this is."""
        self._call("cuCtxSetCurrent", self._context)
        self._call(function, *arguments)

    def _call(self, function: str, *arguments: Any) -> None:
        if error := getattr(self._driver, function)(*arguments):
            name = ctypes.c_char_p()
            self._driver.cuGetErrorName(error, ctypes.byref(name))
            what = name.value.decode() if name.value else f"error {error}"
            raise TdaError(f"The GPU failed ({what} in {function}). Start the program again, or use --provider cpu.")


@functools.cache
def step_stream() -> StepStream:
    """Return the process's stream for captured steps, created on first use."""
    return StepStream()
