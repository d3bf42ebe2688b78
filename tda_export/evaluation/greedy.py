"""Greedy decoding with a method, one token after another."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tda_export.evaluation.methods import AnySetting
from tda_export.runtime.token_step import TokenStep


def greedy_tokens(setting: AnySetting, step: TokenStep, token: int) -> Iterator[int]:
    """Generate without end from a token, with the method's refreshes.

    Args:
        setting: The method.
        step: Its step (`Setting.open_step`), which has read the context and follows the method.
        token: The first new token, which the step has not read.

    Yields:
        `token`, then the likeliest next token again and again, -1 where logits are not finite. Each is computed only
        when it is requested.
    """
    how, stale = setting.deployment, list[int]()
    while True:
        yield token
        stale.append(token)
        if setting.masked and len(stale) == how.refresh.tokens:
            token = likeliest(step.refresh(stale, how))
            step.follow(how)
            stale.clear()
        else:
            token = step.greedy(token)


def likeliest(logits: np.ndarray) -> int:
    """Return the likeliest token of logits [V], -1 if they are not finite."""
    return int(logits.argmax()) if np.isfinite(logits).all() else -1
