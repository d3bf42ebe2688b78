"""Distinguish models without reading all of their weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tda_export.models.spec import DecoderSpec, RopeSpec

BLOCKS = 4096
BLOCK_BYTES = 8 * 1024

# The fields of a spec that are hashed: fields that later families add must not change old models' fingerprints.
SPEC_FIELDS = (
    "architecture",
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "ffn_size",
    "activation",
    "norm_epsilon",
    "max_positions",
    "sliding_windows",
    "tied_head",
)
ROPE_FIELDS = (
    "theta",
    "scaling",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_positions",
)


def fingerprint(spec: DecoderSpec, weight_files: Iterable[Path]) -> str:
    """Hash a model's architecture and a sample of its weights.

    Files of up to 32 MiB are hashed whole, larger ones by their size and 4,096 evenly spaced blocks of 8 KiB, the first
    and the last bytes among them. In a shard of 5 GB that is a block for every 1.2 MB, so that a change of any large
    matrix is detected; a change of only a few small tensors may not be.

    Args:
        spec: The architecture.
        weight_files: The checkpoint's weight files; order and names do not matter, content does.

    Returns:
        64 hexadecimal digits.
    """
    content, rope = dataclasses.asdict(spec), dataclasses.asdict(spec.rope or RopeSpec(0.0))
    facts = {name: content[name] for name in SPEC_FIELDS} | {name: rope[name] for name in ROPE_FIELDS}
    # A field with its default is left out, as if it did not exist.
    facts |= _changed(spec, content) | _changed(spec.rope or RopeSpec(0.0), rope)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for part in sorted(_sample(path) for path in weight_files):
        digest.update(part)
    return digest.hexdigest()


def _changed(described: Any, content: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that a description sets to something other than their default, except names and the fields
    above."""
    known = {*SPEC_FIELDS, *ROPE_FIELDS, "names"}
    return {
        field.name: content[field.name]
        for field in dataclasses.fields(described)
        if field.default is not dataclasses.MISSING
        and field.name not in known
        and getattr(described, field.name) != field.default
    }


def _sample(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= BLOCKS * BLOCK_BYTES:
            digest.update(file.read())
        else:
            for block in range(BLOCKS):
                file.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.digest()
