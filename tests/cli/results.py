"""What tests of several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.conftest import run_ok

PROMPT = "The sea is calm tonight"


def result_of(*arguments: object) -> Any:
    """Run with --json and require that standard output is JSON and nothing else."""
    result = run_ok(*arguments, "--json")
    assert result.stderr == ""
    return json.loads(result.stdout)


def generated(artifact: Path, *options: object) -> Any:
    return result_of("generate", artifact, PROMPT, "--max-new-tokens", 24, *options)
