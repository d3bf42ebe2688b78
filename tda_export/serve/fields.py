"""Fields of requests that this server does not act on: which of them have no effect, and which are refused."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from tda_export.serve.errors import invalid

LONGEST_NAME = 60  # characters shown of an arbitrary name

# Fields of the API that are meant for the operator of the service. They change no token.
WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "user",
    }
)

# Fields of the API, and of similar servers, that would change an answer, with the values that have no effect. None
# never has an effect.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "best_of": (1,),
    "continue_final_message": (False,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "grammar": ("",),
    "guided_json": (),
    "include_stop_str_in_output": (False,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": (),
    "repeat_penalty": (1, 1.0),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "typical_p": (1, 1.0),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Clients send an answer back unchanged, with all of its fields.
UNSUPPORTED_OF_MESSAGES: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "refusal": (),
    "tool_calls": ([],),
}
UNSUPPORTED_OF_STREAMS: dict[str, tuple[Any, ...]] = {
    "continuous_usage_stats": (False,),
    "include_obfuscation": (False, True),  # this server sends no obfuscation
}


def check_fields(
    given: Mapping[str, Any] | None,
    supported: Collection[str],
    unsupported: Mapping[str, tuple[Any, ...]],
    *,
    where: str = "",
) -> None:
    """Refuse fields that would silently be ignored.

    Args:
        given: The fields other than the supported ones.
        supported: Names of supported fields, to suggest for a misspelt one.
        unsupported: Known fields, with the values that have no effect.
        where: The parent of the fields, with a dot: `messages[0].`; empty for the request itself.

    Raises:
        ApiError: A field is unknown, or has a value that is not supported.
    """
    for name, value in (given or {}).items():
        if name in WITHOUT_EFFECT and not where:
            continue
        shown = where + (name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…")
        if name not in unsupported:
            near = difflib.get_close_matches(name[:LONGEST_NAME], supported, 1)
            way_out = f"Did you mean '{near[0]}'?" if near else "Leave it out."
            raise invalid(f"Unknown parameter: '{shown}'. {way_out}", param=shown, code="unknown_parameter")
        meaningless = [value == other and type(value) is type(other) for other in unsupported[name]]
        if value is not None and not any(meaningless):
            raise invalid(
                f"'{shown}' is not supported by this server. Leave it out.", param=shown, code="unsupported_parameter"
            )
