"""Measure priced rows beside TEAL, WINA, tda and Griffin on texts and prompt lengths, in one run of many processes.

    python benchmarks/priced_table.py MODEL FOLDER --text wikitext2_valid.txt --text coqa.jsonl [--jobs 16] [--free 512]
        [--parts ffn all] [--methods priced teal-uniform]

The script calibrates MODEL on the built-in text (unless --calibration FILE, of --method all, is given), builds
artifacts of both layouts, and searches TEAL's greedy densities. FOLDER keeps all of it, and every measured row
(rows.jsonl), so that an interrupted run resumes. --text is a UTF-8 text that calibration has not read, or a .jsonl file
of stories. Prompts of --prompt-tokens are read densely, and every token after them is sparse.

Prices and thresholds come from the calibration alone, so bytes asked for are printed beside bytes read. For each
--sparsity, methods are compared at the same bytes, of the FFN, of attention, of the layers' linears, or of these and
the head: the KL is interpolated between two settings of a method, --around below and above the sparsity. With --around
0 each sparsity itself is measured, and methods are compared at --shares between them. Methods of the FFN alone read all
rows of attention, and only priced rows drop rows of the head, in the last of these comparisons.

It prints a row for each setting (asked and read), then a row for each comparison; --json FILE has all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pool import Pool, free_task, open_pool, text_task
from quality_table import read_text
from rows import Row, Rows, artifact_id, file_id
from same_bytes import kl_at
from teal_densities import search

from tda_export.calibration.file import read_calibration
from tda_export.deployments import deployed
from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.free import summarise_free
from tda_export.evaluation.greedy_densities import write_densities
from tda_export.evaluation.methods import Request, check_request
from tda_export.evaluation.text import TextSettings, cut_windows, summarise
from tda_export.models.source import resolve_model
from tda_export.packing import PACKINGS, Parts
from tda_export.progress import progress
from tda_export.runtime.artifact import Artifact, open_artifact
from tda_export.runtime.text import Text

AROUND = 0.03  # below and above a sparsity: the settings between which KL is interpolated
SCOPES: dict[Parts, str] = {
    "ffn": "ffn_share",
    "layers": "linear_share",
    "all": "all_share",
    "attention": "attention_share",
}
BYTES_OF = {"layers": "the layers' linears", "all": "the linears and the head"}
MASKS = ("tda", "griffin")
METHODS = ("priced", "teal-uniform", "teal-greedy", "wina", *MASKS)
KEYS = (
    *("artifact", "method", "parts", "densities", "sparsity", "text"),
    *("prompt_tokens", "prompts", "continuation_tokens", "new_tokens"),
)


@dataclass(frozen=True)
class Cell:
    """A setting: a method, the parts that may skip rows, and the sparsity asked for in these parts."""

    method: str
    parts: Parts
    sparsity: float
    densities: str | None = None

    @property
    def name(self) -> str:
        """The method, with a name for each kind of TEAL."""
        return self.method if self.densities is None else f"{self.method}-{self.densities}"


@dataclass(frozen=True)
class Prepared:
    """The inputs of the measurements: artifacts by layout, and files of greedy densities by parts."""

    artifacts: dict[str, Artifact]
    densities: dict[Parts, Path]
    masks: tuple[str, ...]

    def request(self, cell: Cell) -> Request:
        """Return the request of `tda-export eval` for a cell."""
        if cell.method == "tda":
            return Request("tda", sparsity=cell.sparsity, allocation="kl")
        if cell.method == "griffin":
            return Request("griffin", sparsity=cell.sparsity)
        densities = self.densities[cell.parts] if cell.densities == "greedy" else None
        return Request(cell.method, sparsity=cell.sparsity, parts=cell.parts, densities=densities)

    def artifact(self, cell: Cell) -> Artifact:
        """Return the artifact that runs a cell."""
        return self.artifacts["indexed" if cell.method in MASKS else "priced"]


def prepare(options: argparse.Namespace) -> Prepared:
    """Calibrate, build and search, unless FOLDER has the result."""
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    calibration = options.calibration or folder / "calibration.safetensors"
    if not calibration.exists():
        _tda_export("calibrate", options.model, "-o", str(calibration), "--method", "all")
    found = read_calibration(calibration)
    source = resolve_model(options.model, notify=lambda line: print(line, file=sys.stderr))
    if found.model_fingerprint != source.fingerprint:
        raise UsageError(f"{calibration} is of another model than {options.model}. Give another FOLDER.")
    masks = MASKS if found.kl is not None else ("griffin",)
    chosen = ("--calibration", str(calibration))
    built = {
        "priced": (f"priced-{options.packing}", ("--method", "priced", "--packing", options.packing, *chosen)),
        "indexed": ("tda", ("--method", "tda", *chosen))
        if "tda" in masks
        else ("griffin", ("--method", "griffin", "--sparsity", "0.5")),
    }
    artifacts = {}
    for layout, (name, how) in built.items():
        if not (folder / name).exists():
            _tda_export("build", options.model, *how, "--no-verify", "-o", str(folder / name))
        artifacts[layout] = open_artifact(folder / name)
    densities: dict[Parts, Path] = {}
    for parts in set(options.parts) - {"all"} if "teal-greedy" in options.methods else ():
        of = "all" if parts == "layers" else parts
        densities[parts] = path = folder / f"densities-{of}-{options.packing}.json"
        if not path.exists():
            write_densities(search(source, calibration, options.packing, of), path)
    return Prepared(artifacts, densities, masks)


def _tda_export(*arguments: str) -> None:
    print(f"tda-export {' '.join(arguments)}", file=sys.stderr)
    done = subprocess.run([sys.executable, "-m", "tda_export", *arguments], stdout=sys.stderr, check=False)
    if done.returncode:
        raise TdaError(f"tda-export {arguments[0]} failed. Its own line above says why.")


def cells(options: argparse.Namespace, prepared: Prepared) -> list[Cell]:
    """List the settings: those around each sparsity, and for priced rows the sparsity itself too."""
    steps = sorted({-options.around, options.around})
    around = [round(sparsity + step, 4) for sparsity in options.sparsity for step in steps]
    listed = []
    for parts in options.parts:
        listed += [Cell("priced", parts, sparsity) for sparsity in sorted({*around, *options.sparsity})]
        if parts == "all":
            continue
        listed += [Cell("teal", parts, sparsity, kind) for kind in ("uniform", "greedy") for sparsity in around]
        if parts != "attention":
            listed += [Cell("wina", parts, sparsity) for sparsity in around]
    artifact = prepared.artifacts["priced"]
    whole = artifact.linear_bytes / artifact.dense_ffn_bytes
    of_ffn = sorted({*around, *(round(sparsity * whole, 4) for sparsity in around)})
    listed += [Cell(name, "ffn", sparsity) for name in prepared.masks for sparsity in of_ffn]
    return [cell for cell in listed if cell.name in options.methods and _reachable(prepared, cell)]


def _reachable(prepared: Prepared, cell: Cell) -> bool:
    """Return whether the calibration reaches a setting. If it does not, print why."""
    try:
        check_request(prepared.artifact(cell), prepared.request(cell))
        if cell.method == "tda":
            deployed(prepared.artifact(cell), prepared.request(cell))
        return True
    except UsageError as error:
        print(f"{cell.name} of {cell.parts} at sparsity {cell.sparsity} is left out: {error}", file=sys.stderr)
        return False


def measured(options: argparse.Namespace, prepared: Prepared, pool: Pool) -> Iterator[Row]:
    """Return the rows of all settings on all texts and prompt lengths, and of free generation, kept rows included."""
    rows = Rows(options.folder / "rows.jsonl", KEYS)
    listed = cells(options, prepared)
    texts = {path.stem: read_text(path) for path in options.text}
    if len(texts) < len(options.text):
        raise UsageError("Two texts have the same name, which rows would share. Rename one.")
    for (name, content), prompt in product(texts.items(), options.prompt_tokens):
        settings = TextSettings(options.prompts, prompt, options.continuation_tokens)
        yield from _measured(rows, listed, prepared, pool, name, content, settings, free=False)
    if options.free:
        free = [cell for cell in listed if cell.sparsity in options.sparsity or cell.method in MASKS]
        free = [cell for cell in free if cell.parts in ("layers", "all") or cell.method in MASKS]
        settings = TextSettings(options.free_prompts, options.prompt_tokens[0], options.free)
        name = next(iter(texts))
        yield from _measured(rows, free, prepared, pool, name, texts[name], settings, free=True)


def _measured(
    rows: Rows,
    listed: list[Cell],
    prepared: Prepared,
    pool: Pool,
    name: str,
    content: str,
    settings: TextSettings,
    *,
    free: bool,
) -> Iterator[Row]:
    about = {"text": name, "prompt_tokens": settings.prompt_tokens, "prompts": settings.prompts}
    about |= {"continuation_tokens": None, "new_tokens": None}
    about |= {"new_tokens" if free else "continuation_tokens": settings.continuation_tokens}
    asked = {
        cell: about
        | {"method": cell.method, "parts": cell.parts, "sparsity": cell.sparsity, "name": cell.name}
        | {"artifact": artifact_id(prepared.artifact(cell))}
        | {"densities": file_id(prepared.densities[cell.parts]) if cell.densities == "greedy" else cell.densities}
        for cell in listed
    }
    for artifact in prepared.artifacts.values():
        ours = [cell for cell in listed if prepared.artifact(cell) is artifact]
        missing = [cell for cell in ours if rows.get(asked[cell]) is None]
        if missing:
            windows = _windows(artifact, content, settings, free=free)
            requests = [prepared.request(cell) for cell in missing]
            task = (
                free_task(artifact.folder, requests, settings.continuation_tokens)
                if free
                else text_task(artifact.folder, requests, settings)
            )
            shown = f"{name}, {settings.prompt_tokens} tokens, {artifact.layout}"
            with progress(shown, len(windows), quiet=not sys.stderr.isatty()) as advance:
                found = pool.measure(task, windows, advance)
            for cell, one in zip(missing, found, strict=True):
                rows.add(asked[cell] | _quality(artifact, cell, one.windows, one.price, settings, free=free))
        for cell in ours:
            row = rows.get(asked[cell])
            assert row is not None
            yield row


def _windows(artifact: Artifact, content: str, settings: TextSettings, *, free: bool) -> list[list[int]]:
    text = Text(artifact)
    if free:  # then a window is a prompt
        settings = TextSettings(settings.prompts, settings.prompt_tokens, 1)
    windows = cut_windows(text.encode(content, special_tokens=False), text.encode(""), settings)
    return [window[: settings.prompt_tokens] for window in windows] if free else windows


def _quality(
    artifact: Artifact, cell: Cell, windows: list[Any], price: float | None, settings: TextSettings, *, free: bool
) -> Row:
    sizes = artifact.dense_ffn_bytes, artifact.linear_bytes
    quality: Row
    if free:
        quality = asdict(summarise_free(windows, settings.continuation_tokens, *sizes))
    else:
        quality = asdict(summarise(windows, *sizes))
    ffn, linears = quality["ffn_bytes"] / sizes[0], quality["linear_bytes"] / sizes[1]
    attention = (quality["linear_bytes"] - quality["ffn_bytes"]) / (sizes[1] - sizes[0])
    row = quality | {"model": artifact.name, "dtype": artifact.shape.dtype, "price": price}
    row |= {"ffn_share": ffn, "linear_share": linears, "attention_share": attention}
    head = artifact.head.bytes
    row["all_share"] = (quality["linear_bytes"] + quality.get("head_share", 1.0) * head) / (sizes[1] + head)
    row["budget"] = {"sparsity": cell.sparsity, "parts": cell.parts}
    table = artifact.price_table if artifact.layout == "priced" else None
    if cell.method == "priced" and cell.parts == "all" and table is not None:
        predicted = table.predicted(price or 0.0)
        row |= {"predicted_kl": predicted.kl, "predicted_share": predicted.share}
    return row


def comparisons(rows: list[Row], shares: list[float]) -> Iterator[Row]:
    """Compare the KL of all methods at the same bytes, and of priced rows with the better TEAL."""
    texts = list(dict.fromkeys((row["text"], row["prompt_tokens"]) for row in rows if row["new_tokens"] is None))
    for (text, prompt), (parts, read), share in product(texts, SCOPES.items(), shares):
        here = [row for row in rows if (row["text"], row["prompt_tokens"], row["new_tokens"]) == (text, prompt, None)]
        here = [row for row in here if _compared(row, parts)]
        names = dict.fromkeys(row["name"] for row in here)
        kl = {name: kl_at([(row[read], row["kl"]) for row in here if row["name"] == name], share) for name in names}
        teal = min((value for name, value in kl.items() if value and name.startswith("teal")), default=None)
        ours = kl.get("priced")
        yield {
            "text": text,
            "prompt_tokens": prompt,
            "bytes_of": BYTES_OF.get(parts, parts),
            "share": round(share, 4),
            "kl": kl,
            "priced_to_teal": None if teal is None or ours is None else ours / teal,
        }


def _compared(row: Row, parts: Parts) -> bool:
    """Return whether a setting is compared at the bytes of these parts."""
    if row["method"] in MASKS:
        return parts != "attention"
    return bool(row["parts"] == (parts if row["method"] == "priced" or parts != "all" else "layers"))


def setting_line(row: Row) -> str:
    """Return a measured setting as a line of text."""
    if row["new_tokens"] is not None:
        kl = " ".join(f"{value:.3f}" for value in row["kl"])
        return (
            f"{row['text']} {row['prompt_tokens']}+{row['new_tokens']} free {row['name']} {row['parts']} "
            f"{row['sparsity']:g}: read {row['linear_share']:.3f} of the layers' linears, {row['ffn_share']:.3f} of "
            f"the FFN; same text {row['divergence']:.1f} ± {row['divergence_stderr']:.1f} tokens; KL {kl}"
        )
    read = row["linear_share" if row["parts"] == "all" else SCOPES[row["parts"]]]  # what was asked for
    predicted = ""
    if "predicted_kl" in row:
        predicted = f"; predicted {row['predicted_kl']:.4f}, measured {row['kl'] / row['predicted_kl'] - 1:+.1%}"
    return (
        f"{row['text']} {row['prompt_tokens']} {row['name']} {row['parts']}: asked {1 - row['sparsity']:.3f}, read "
        f"{read:.3f} (the layers' linears {row['linear_share']:.3f}), KL {row['kl']:.4f} ± {row['kl_stderr']:.4f}, "
        f"agreement {row['agreement']:.3f}{predicted}"
    )


def comparison_line(row: Row) -> str:
    """Return all methods at the same bytes as a line of text."""
    kl = ", ".join(f"{name} {'–' if value is None else f'{value:.4f}'}" for name, value in row["kl"].items())
    ratio = "" if row["priced_to_teal"] is None else f"; priced / better TEAL {row['priced_to_teal']:.2f}"
    return f"{row['text']} {row['prompt_tokens']}, {row['share']:g} of the bytes of {row['bytes_of']}: KL {kl}{ratio}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure priced rows beside other methods, in many processes.")
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True, help="Text to measure on. Repeatable.")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="Use this calibration (of --method all).")
    parser.add_argument("--packing", choices=PACKINGS, default="separate")
    parser.add_argument("--parts", nargs="+", choices=tuple(SCOPES), default=list(SCOPES), help="Parts that skip rows.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--around", type=float, default=AROUND, metavar="STEP", help=f"See above.  [{AROUND}]")
    parser.add_argument("--shares", nargs="+", type=float, help="Fractions of bytes to compare.  [1 - each --sparsity]")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[384, 32])
    parser.add_argument("--continuation-tokens", type=int, default=128)
    parser.add_argument("--free", type=int, default=0, metavar="TOKENS", help="Also generate after each prompt.")
    parser.add_argument("--free-prompts", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="Processes.  [default: one for each core]")
    parser.add_argument("--threads", type=int, default=1, help="Threads of each process.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write all rows here, one JSON object a line.")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    try:
        prepared = prepare(options)
        with open_pool(options.jobs, options.threads) as pool:
            rows = []
            for row in measured(options, prepared, pool):
                print(setting_line(row), flush=True)
                rows.append(row)
        compared = list(comparisons(rows, options.shares or [1 - sparsity for sparsity in options.sparsity]))
        for row in compared:
            print(comparison_line(row))
        if options.json:
            options.json.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *compared]), encoding="utf-8")
    except TdaError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
