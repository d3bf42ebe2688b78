"""Keys and values in a format of their own in transformers: the slow reference of `stored_attention`."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from transformers import DynamicCache

from tda_export.graph import kv_formats
from tda_export.graph.cache_formats import LARGEST_CODE, hadamard
from tda_export.models.rope import rotary_order
from tda_export.models.spec import DecoderSpec


class IntegerCache(DynamicCache):
    """A cache that returns keys and values rounded to 8 bits, also those of the call's own tokens."""

    def __init__(self, model: Any, spec: DecoderSpec) -> None:
        super().__init__(config=model.config)
        self._turn = torch.from_numpy(hadamard(spec.head_size)).to(model.device)
        if spec.rotary_size is not None:  # the graphs order the elements of a head differently
            self._turn = self._turn[rotary_order(spec.head_size, spec.rotary_size).argsort()]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **settings: Any) -> Any:
        """Append keys and values [1, KV, S, D]."""
        kept = kept_of(key_states.float() @ self._turn) @ self._turn.T
        return super().update(kept.to(key_states), kept_of(value_states.float()).to(value_states), *args, **settings)


class HalfCache(DynamicCache):
    """A cache that returns keys and values rounded to float16, also those of the call's own tokens."""

    def __init__(self, model: Any, spec: DecoderSpec) -> None:
        super().__init__(config=model.config)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **settings: Any) -> Any:
        """Append keys and values [1, KV, S, D]."""
        kept = (states.half().to(states) for states in (key_states, value_states))
        return super().update(*kept, *args, **settings)


CACHES = {kv_formats.KV_FLOAT16: HalfCache, kv_formats.KV_INT8: IntegerCache}


def kept_of(x: torch.Tensor) -> torch.Tensor:
    """Round x [.., D] to 8 bits with a scale for each row, and return the rounded values, float32."""
    scale = x.abs().amax(dim=-1, keepdim=True) / LARGEST_CODE
    return (x / torch.where(scale > 0, scale, 1.0)).round().clamp(-LARGEST_CODE, LARGEST_CODE) * scale


def with_stored_cache(model: Any, spec: DecoderSpec, kv: str) -> Any:
    """Return a model of the same weights that stores keys and values as an artifact does.

    Args:
        model: A transformers model.
        spec: Its architecture.
        kv: One of `kv_formats.KV_FORMATS`.

    Returns:
        A model that creates such a cache in every call without one.
    """
    if kv == kv_formats.KV_FLOAT:
        return model
    weights = itertools.chain(model.parameters(), model.buffers())
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in weights})

    def give(module: Any, arguments: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if _cache_of(**settings) is None:
            settings = dict(settings, past_key_values=CACHES[kv](model, spec), use_cache=True)
        return arguments, settings

    for module in (model, model.base_model):  # OPT's model does not call its base model
        module.register_forward_pre_hook(give, with_kwargs=True)
    return model


def _cache_of(past_key_values: Any = None, **_: Any) -> Any:
    """Return the cache among the arguments of a transformers call, or None."""
    return past_key_values
