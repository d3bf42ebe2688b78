"""Which step decodes an artifact: by its layout."""

from __future__ import annotations

from tda_export.graph.contract import ModelShape
from tda_export.runtime.decode_step import DecodeStep
from tda_export.runtime.priced import PricedStep
from tda_export.runtime.session import Sessions
from tda_export.runtime.token_step import TokenStep


def open_step(sessions: Sessions, shape: ModelShape, capacity: int) -> TokenStep:
    """Bind decoding of one token after another, in its own cache of `capacity` tokens."""
    return (PricedStep if sessions.priced else DecodeStep)(sessions, shape, capacity)
