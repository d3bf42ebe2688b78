"""Choose the step that decodes an artifact by the artifact's layout."""

from __future__ import annotations

from tda_export.graph.contract import ModelShape
from tda_export.runtime.decode_step import DecodeStep
from tda_export.runtime.priced import PricedStep
from tda_export.runtime.session import Sessions
from tda_export.runtime.token_step import TokenStep


def open_step(sessions: Sessions, shape: ModelShape, capacity: int) -> TokenStep:
    """Make a step that decodes one token after another, with its own cache of `capacity` tokens."""
    return (PricedStep if sessions.priced else DecodeStep)(sessions, shape, capacity)
