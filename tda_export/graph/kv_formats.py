"""How a cache stores keys and values: which tensors it has, of which dtype."""

from __future__ import annotations

from dataclasses import dataclass

# In the model's dtype, in float16 where that is float32, or as codes with a float32 scale for each token and head.
KV_FLOAT, KV_FLOAT16, KV_INT8 = "float", "float16", "int8"


@dataclass(frozen=True)
class CacheTensorKind:
    """A tensor that keys are stored in, and another one for values: of rows [1, KV, P, D], or of one number a row.

    `dtype` is a key of `contract.DTYPE_BYTES`, None for the model's.
    """

    dtype: str | None
    row: bool = True


# Each format's, in the order of the graphs' inputs and outputs.
CACHE_KINDS = {
    KV_FLOAT: (CacheTensorKind(None),),
    KV_FLOAT16: (CacheTensorKind("float16"),),
    KV_INT8: (CacheTensorKind("int8"), CacheTensorKind("float32", row=False)),
}
KV_FORMATS = tuple(CACHE_KINDS)
