"""Measure all methods on texts and prompt lengths at the same bytes, and print a table of them.

    python benchmarks/quality_table.py ARTIFACT TEXT... --priced ARTIFACT [--of ffn linears] [--token-calibration FILE]
        [--densities FILE] [--prompt-tokens 32 384] [--rows FILE]

ARTIFACT is built with --method tda --allocation kl, that of --priced with --method priced, from the same model. The
FILE of --token-calibration is a calibration with --estimator token --curves-only (for the paper's method and TT). Those
of --densities are written by benchmarks/teal_densities.py (for TEAL's greedy densities). Each TEXT is a UTF-8 file that
calibration has not read, or a .jsonl file whose lines have a "story" (such as the coqa.jsonl of `tda-export
eval-data`). Each story is read once.

All methods follow the strict protocol of `tda-export eval --text`. ARTIFACT runs tda, uniform (masks alone), griffin,
tt and paper. The priced artifact runs priced, teal and wina, which skip rows of the FFN alone if FFN bytes are
compared, and of all linears if those are. static, cats, dejavu, moe-true and moe are those of `benchmarks/baselines.py`
(leave them out with --no-baselines). Methods of the FFN alone read all rows of attention.

A threshold that was calibrated on other text or longer prompts reads more or fewer bytes than it was chosen for. If a
method misses the bytes of --sparsity by more than --within, it is measured again at another sparsity (the column
"asked"), and once more on the other side of the bytes. "KL there" is interpolated between the two. The paper's method
chooses its own bytes.

--rows keeps the measurements, one JSON object a line, so that an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import baselines
from rows import Row, Rows, artifact_id, file_id, print_rows
from same_bytes import Cell, at_same_bytes, require_same_bytes

from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.greedy_densities import read_densities
from tda_export.evaluation.methods import Request, open_setting
from tda_export.evaluation.text import TextSettings, cut_windows, evaluate_text
from tda_export.packing import Parts
from tda_export.runtime import Model, load

LARGEST_TT_SPARSITY = 1 / 3  # TT skips down rows alone
KEYS = (
    "artifact",
    "token_calibration",
    "method",
    "sparsity",
    "text",
    "prompt_tokens",
    "prompts",
    "continuation_tokens",
    "within",
    "share",
    "densities",
)
HEADER = ("method", "sparsity", "of", "asked", "text", "prompt", "FFN bytes", "all linears", "KL", "KL there")
HEADER += ("perplexity", "agreement")
SHARES = {"ffn": "ffn_share", "linears": "linear_share"}


def read_text(path: Path) -> str:
    """Read a text, or the stories of a .jsonl file, in order and without repetitions."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file. Give a UTF-8 text, or a .jsonl file of stories.")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TdaError(f"{path}: not valid UTF-8 text. Convert it to UTF-8.") from error
    if path.suffix != ".jsonl":
        return content
    stories: dict[str, None] = {}  # keys in order, without repetitions
    for number, line in enumerate(content.splitlines(), 1):
        try:
            stories[json.loads(line)["story"]] = None
        except (ValueError, KeyError, TypeError) as error:
            raise TdaError(f"{path}, line {number}: no JSON object with a story. Give what eval-data wrote.") from error
    return "\n\n".join(stories)


def artifact_cells(options: argparse.Namespace) -> list[Cell]:
    """List the cells to measure on the artifact with masks."""
    cells = [Cell("dense")]
    for sparsity, share in product(options.sparsity, options.shares):
        cells += [Cell("tda", sparsity, share), Cell("uniform", sparsity, share), Cell("griffin", sparsity, share)]
        if options.token_calibration is not None and share == "ffn_share" and sparsity < LARGEST_TT_SPARSITY:
            cells.append(Cell("tt", sparsity))
    return [*cells, *([Cell("paper")] if options.token_calibration is not None else [])]


def priced_cells(options: argparse.Namespace) -> list[Cell]:
    """List the cells to measure on the priced artifact."""
    methods = ["priced", "teal", "wina"]
    return [
        Cell(method, sparsity, share)
        for sparsity, share in product(options.sparsity, options.shares)
        for method in [*methods, *(["teal-greedy"] if _densities(options, share) else [])]
    ]


def _densities(options: argparse.Namespace, share: str) -> Path | None:
    """Return the file of greedy densities for the compared bytes."""
    parts = _parts(share)
    return next((path for path in options.densities if read_densities(path).parts == parts), None)


def _parts(share: str) -> Parts:
    return "ffn" if share == "ffn_share" else "all"


def request(cell: Cell, options: argparse.Namespace) -> Request:
    """Return the request of `tda-export eval` for a cell."""
    tokens = options.token_calibration
    match cell.method:
        case "priced" | "teal" | "wina":
            parts = _parts(cell.share)  # at the same bytes of the layers' linears, all methods read the head whole
            return Request(cell.method, sparsity=cell.sparsity, parts="layers" if parts == "all" else parts)
        case "teal-greedy":
            densities = _densities(options, cell.share)
            return Request("teal", sparsity=cell.sparsity, parts=_parts(cell.share), densities=densities)
        case "tda":
            return Request("tda", sparsity=cell.sparsity, allocation="kl")
        case "uniform":
            return Request("tda", sparsity=cell.sparsity, allocation="uniform")
        case "tt" | "paper":
            return Request(cell.method, sparsity=cell.sparsity, calibration=tokens)
        case _:
            return Request(cell.method, sparsity=cell.sparsity)


def with_share(row: Row) -> Row:
    """Add the fractions of bytes read, of the FFN and of all linears."""
    linears = row["linear_bytes"] / row["dense_linear_bytes"]
    return row | {"ffn_share": row["ffn_bytes"] / row["dense_ffn_bytes"], "linear_share": linears}


class OnArtifact:
    """Measures cells on an artifact."""

    def __init__(self, options: argparse.Namespace, artifact: Path) -> None:
        self.options = options
        self.model: Model = load(artifact, provider="cpu")

    def measure(self, text: str, prompt_tokens: int, cell: Cell) -> Row:
        """Measure a cell on a text, with prompts of a length."""
        settings = TextSettings(self.options.prompts, prompt_tokens, self.options.continuation_tokens)
        artifact, encode = self.model.artifact, self.model.text.encode
        windows = cut_windows(encode(text, special_tokens=False), encode(""), settings)
        setting = open_setting(artifact, self.model.sessions, request(cell, self.options))
        quality = asdict(evaluate_text(artifact, setting, windows, settings))
        described = {"model": artifact.name, "dtype": artifact.shape.dtype, "budget": setting.budget}
        return with_share(described | quality)


class InPyTorch:
    """Measures the methods of `baselines.py`, which are fitted when they are first used."""

    def __init__(self, options: argparse.Namespace, model: str) -> None:
        given = ["any", "--model", model, "--prompts", str(options.prompts), "--json", "--sparsity"]
        given += [*map(str, options.sparsity), "--continuation-tokens", str(options.continuation_tokens)]
        self.fitted = baselines.Baselines(baselines.arguments(given))
        self.cells = [Cell(one.method, one.sparsity, share) for one in self.fitted.wanted for share in options.shares]

    def measure(self, text: str, prompt_tokens: int, cell: Cell) -> Row:
        """Measure a cell on a text, with prompts of a length."""
        self.fitted.fit(self.fitted.wanted)  # all at once, since fitting reads the calibration text
        wanted = [baselines.Wanted(cell.method, cell.sparsity)]  # type: ignore[arg-type]
        [row] = self.fitted.measure(text, "any", prompt_tokens, wanted)
        return with_share(row)


def line(row: Row) -> str:
    """Return a line of the Markdown table."""
    cells = (
        row["method"],
        "" if row["sparsity"] is None else f"{row['sparsity']:g}",
        {"ffn_share": "FFN", "linear_share": "all linears"}[row["share"]],
        "" if row["asked"] is None else f"{row['asked']:.3f}",
        row["text"],
        str(row["prompt_tokens"]),
        f"{row['ffn_share']:.3f}",
        f"{row['linear_share']:.3f}",
        f"{row['kl']:.3f} ± {row['kl_stderr']:.3f}",
        "" if row.get("kl_at") is None else f"{row['kl_at']:.3f}",
        f"{row['perplexity']:.2f} ± {row['perplexity_stderr']:.2f}",
        f"{row['agreement']:.3f} ± {row['agreement_stderr']:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure all methods on texts and prompt lengths at the same bytes.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    parser.add_argument("--priced", type=Path, metavar="ARTIFACT", help="Priced artifact of the same model.")
    parser.add_argument("--of", nargs="+", choices=tuple(SHARES), default=["ffn"], help="Matrices to compare bytes of.")
    parser.add_argument("--densities", type=Path, nargs="+", default=[], metavar="FILE", help="TEAL's densities.")
    parser.add_argument("--token-calibration", type=Path, metavar="FILE")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.3, 0.5, 0.7])
    parser.add_argument("--within", type=float, default=0.01, help="Fraction of dense bytes.  [default: 0.01]")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[32, 384])
    parser.add_argument("--continuation-tokens", type=int, default=128)
    parser.add_argument("--model", help="Model of the baselines.  [default: the artifact's]")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="Keep measurements here, and resume from them.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object a line.")
    options = parser.parse_args()
    options.shares = [SHARES[name] for name in options.of]
    return options


def measured(options: argparse.Namespace) -> Iterator[Row]:
    """Yield all rows as they are measured, kept rows included.

    Raises:
        TdaError: At the end, if rows missed their bytes.
    """
    names = [path.stem for path in options.texts]
    if len(set(names)) < len(names):
        raise UsageError("Two texts have the same name, which rows would share. Rename one.")
    texts = dict(zip(names, map(read_text, options.texts), strict=True))
    rows = Rows(options.rows, KEYS)
    yielded: list[Row] = []

    def of(where: OnArtifact | InPyTorch, cells: list[Cell]) -> Iterator[Row]:
        for name, prompt, cell in product(texts, options.prompt_tokens, cells):
            asked = described | cell._asdict() | {"text": name, "prompt_tokens": prompt}
            if (row := rows.get(asked)) is None:
                found = at_same_bytes(cell, options.within, partial(where.measure, texts[name], prompt), between=True)
                row = rows.add(found | asked)
            yielded.append(row)
            yield row

    on_artifact = OnArtifact(options, options.artifact)
    on_priced = None if options.priced is None else OnArtifact(options, options.priced)
    fingerprints = {on.model.artifact.manifest["model"]["fingerprint"] for on in (on_artifact, on_priced) if on}
    if len(fingerprints) > 1:
        raise UsageError(f"{options.priced} is of another model than {options.artifact}. Give artifacts of one model.")
    artifact = on_artifact.model.artifact
    described = {
        "artifact": artifact_id(artifact),
        "token_calibration": None if options.token_calibration is None else file_id(options.token_calibration),
        "prompts": options.prompts,
        "continuation_tokens": options.continuation_tokens,
        "within": options.within,
        "densities": None,
    }
    yield from of(on_artifact, artifact_cells(options))
    if on_priced is not None:
        masks = described
        described = masks | {"artifact": artifact_id(on_priced.model.artifact)}
        described |= {"densities": " ".join(map(file_id, options.densities))}
        yield from of(on_priced, priced_cells(options))
        described = masks
    if not options.no_baselines:
        in_pytorch = InPyTorch(options, options.model or artifact.name)
        yield from of(in_pytorch, in_pytorch.cells)
    require_same_bytes(yielded)


def main() -> int:
    options = arguments()
    if options.json:
        return print_rows(measured(options))
    return print_rows(measured(options), line, f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")


if __name__ == "__main__":
    sys.exit(main())
