"""Find the native library in the installed package, and register it with a session's options."""

from __future__ import annotations

import functools
import sys

import onnxruntime as ort

from tda_export.errors import TdaError, first_line
from tda_export.native.build import LIBRARY
from tda_export.switches import switched_on

SWITCH = "TDA_EXPORT_NATIVE"  # environment variable: 0 disables the library


@functools.cache
def native_problem() -> str | None:
    """Return why the native kernels cannot be used here, or None where they can. Tried once per process."""
    if not switched_on(SWITCH):
        return f"{SWITCH}=0 leaves them out"
    if not LIBRARY.is_file():
        return "the library was not built with the package (needs Linux or macOS and a C++ compiler)"
    try:
        ort.SessionOptions().register_custom_ops_library(str(LIBRARY))
    except Exception as error:  # ONNX Runtime's exceptions share no narrower base
        return f"the library cannot be loaded ({first_line(error)})"
    return None


def register_native(options: ort.SessionOptions) -> None:
    """Let sessions made with `options` use the native kernels.

    Raises:
        TdaError: They cannot be used here (`native_problem`).
    """
    if problem := native_problem():
        raise TdaError(f"The native kernels cannot be used: {problem}.")
    options.register_custom_ops_library(str(LIBRARY))


@functools.cache
def warn_once(problem: str) -> None:
    """Print on standard error, once for each reason, that the slower function body runs."""
    print(f"tda-export runs without its native kernels, which is slower: {problem}.", file=sys.stderr)
