"""Measure all methods on texts and prompt lengths, and print a table of them.

    python benchmarks/quality_table.py ARTIFACT TEXT... --token-calibration FILE [--prompt-tokens 32 384] [--json]

ARTIFACT is one of --method tda --allocation kl, FILE a calibration of the same model with --estimator token
--curves-only (for the paper's method and TT). Each TEXT is a UTF-8 file that calibration has not seen, or a .jsonl
file whose lines hold a "story" (as `tda-export eval-data` writes coqa.jsonl), of which each is read once.

By the strict protocol of `tda-export eval --text`: tda, uniform (masks alone), griffin, tt and paper on the artifact,
and static, cats and dejavu of `benchmarks/baselines.py` (without them: --no-baselines).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import baselines

from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.methods import Request, open_setting
from tda_export.evaluation.text import TextSettings, cut_windows, evaluate_text
from tda_export.runtime import Model, load

LARGEST_TT_SPARSITY = 1 / 3  # TT saves down rows alone
HEADER = ("method", "text", "prompt", "FFN bytes", "KL", "perplexity", "agreement")


def read_text(path: Path) -> str:
    """Read a text, or the stories of a .jsonl file, each once and in order."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file. Give a UTF-8 text, or a .jsonl file of stories.")
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return content
    return "\n\n".join(dict.fromkeys(json.loads(line)["story"] for line in content.splitlines()))


def requests(options: argparse.Namespace) -> list[Request]:
    """What is measured on the artifact."""
    tokens = options.token_calibration
    made = [Request("dense")]
    for sparsity in options.sparsity:
        made.append(Request("tda", sparsity=sparsity, allocation="kl"))
        made.append(Request("tda", sparsity=sparsity, allocation="uniform"))
        made.append(Request("griffin", sparsity=sparsity))
        if tokens is not None and sparsity < LARGEST_TT_SPARSITY:
            made.append(Request("tt", sparsity=sparsity, calibration=tokens))
    return [*made, *([Request("paper", calibration=tokens)] if tokens is not None else [])]


def artifact_rows(model: Model, text: str, name: str, prompt: int, options: argparse.Namespace) -> Iterator[Any]:
    """One row for each request."""
    settings = TextSettings(options.prompts, prompt, options.continuation_tokens)
    encode = model.text.encode
    windows = cut_windows(encode(text, special_tokens=False), encode(""), settings)
    for request in requests(options):
        setting = open_setting(model.artifact, model.sessions, request)
        quality = evaluate_text(model.artifact, setting, windows, settings)
        method = "uniform" if request.allocation == "uniform" else request.method
        yield {"method": method, "budget": setting.budget, "text": name, "prompt_tokens": prompt} | asdict(quality)


def fitted_baselines(options: argparse.Namespace, model: str) -> baselines.Baselines:
    """Fit the methods of `baselines.py`; what a text adds is given later."""
    given = ["any", "--model", model, "--prompts", str(options.prompts), "--json", "--sparsity"]
    given += [*map(str, options.sparsity), "--continuation-tokens", str(options.continuation_tokens)]
    return baselines.Baselines(baselines.arguments(given))


def line(row: dict[str, Any]) -> str:
    """One line of the Markdown table."""
    share = row["ffn_bytes"] / row["dense_ffn_bytes"]
    cells = (
        row["method"],
        row["text"],
        str(row["prompt_tokens"]),
        f"{share:.3f}",
        f"{row['kl']:.3f} ± {row['kl_stderr']:.3f}",
        f"{row['perplexity']:.2f} ± {row['perplexity_stderr']:.2f}",
        f"{row['agreement']:.3f} ± {row['agreement_stderr']:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure all methods on texts and prompt lengths.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    parser.add_argument("--token-calibration", type=Path, metavar="FILE")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.3, 0.5, 0.7])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[32, 384])
    parser.add_argument("--continuation-tokens", type=int, default=128)
    parser.add_argument("--model", help="For the baselines.  [default: what the artifact was built from]")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--json", action="store_true", help="Print one JSON object a line.")
    return parser.parse_args()


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All results, as they come."""
    model = load(options.artifact, provider="cpu")
    asked = [(read_text(path), path.stem, prompt) for path in options.texts for prompt in options.prompt_tokens]
    for text, name, prompt in asked:
        yield from artifact_rows(model, text, name, prompt, options)
    if not options.no_baselines:
        fitted = fitted_baselines(options, options.model or model.artifact.name)
        for text, name, prompt in asked:
            yield from (row | {"text": name} for row in fitted.measure(text, name, prompt))


def main() -> int:
    options = arguments()
    try:
        if not options.json:
            print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
        for row in rows(options):
            print(json.dumps(row) if options.json else line(row), flush=True)
    except TdaError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
