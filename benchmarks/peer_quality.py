"""KL to the float model against the weight bytes that a token reads: our formats at prices, llama.cpp's, and GenAI's.

    python benchmarks/peer_quality.py FOLDER --text valid.txt --llama LLAMA_CPP_BIN [--prices CALIBRATION]
        [--windows 12] [--only NAME ...] [--results FILE] [--chart FILE.svg]

All models are made in FOLDER from the scaled copy of SmolLM2-135M (see `copies.py`), and measured by the same code:
weights are de-quantised into PyTorch, float32, and each model reads windows of 384 + 128 tokens itself. Activations are
floats here. On the CPU llama.cpp and GenAI round them to 8 bits, which adds to their loss.

- Ours: float16; int8 by `quantize --quantizer rtn`; int4 by `quantize` (GPTQ); `quantize --bits-per-weight`, in which
  some linears are int8; int4 with some parts from the int8 folder, as `--weights-for` would store them. Each is
  measured dense, and at prices after a dense prompt. For every format c² of rows comes from CALIBRATION, by default
  that of `tda-export calibrate FOLDER/int4 --packing sites`. λ comes from its table, scaled by the bytes of a row. In a
  mixed folder the fraction of rows read differs a little from the one in the label, which is of the layers' linears.
  Rows of the head drop as well, if CALIBRATION has prices for them; names say so, and folders are made with
  `quantize --head priced`, otherwise with `--head whole`.
- llama.cpp: `llama-quantize` with its default mixtures, without and with an importance matrix, which is made here from
  the text that GPTQ reads. `cpu_peers.py` says how to build it. LLAMA_CPP_BIN is the folder of the program.
- GenAI: its builder, int4 in blocks of 32, with the default and with `k_quant` and an int8 head, alone and mixed.

Bytes are those that a token reads of the layers' linears and of the head, scales and zero points included, in each
model's own format. Norms and the row of the embedding are left out. Rows in --results are not measured again. All rows
are printed as a table and drawn as a chart. Most of the time goes to GPTQ, for six folders.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from stored_models import Stacks, Stored, run

from tda_export.calibration.file import read_calibration
from tda_export.calibration.prices import read_prompt
from tda_export.models.row_dropping import dropping
from tda_export.packing import Packing, RowBytes, linear_outputs, linear_shape, packed_matrices
from tda_export.quantization.kl import Compared, compare, continuations, summarise
from tda_export.report.axes import around
from tda_export.report.charts import line_chart
from tda_export.report.colours import css_variables
from tda_export.report.drawing import Series
from tda_export.weights.plan import HEAD

PACKING: Packing = "sites"
PROMPT, CONTINUATION = 384, 128
SPARSITIES = (0.05, 0.15, 0.3, 0.5)
LIGHT = "--page:#fff;--ink:#1b1b1b;--quiet:#595959;--grid:#e8e8e8;"
DARK = "--page:#15171a;--ink:#e8e8e8;--quiet:#a6a6a6;--grid:#2a2e33;"
STYLE = """text{fill:var(--ink);font:12px system-ui,sans-serif}.tick,.note{fill:var(--quiet)}.grid{stroke:var(--grid)}
.axis{stroke:var(--quiet)}.line{fill:none;stroke-width:2}.error{stroke-width:1.4}.mark{stroke:var(--page)}"""

# Our models in the chart. The table has all of them.
CHARTED = (
    *("ours float16", "ours int8", "ours int4, head priced", "ours 5.8 bits, head priced"),
    *("ours int4, head int4, head priced", "ours 5.8 bits, head int4, head priced"),
)

Row = dict[str, Any]


@torch.no_grad()
def measure(
    stored: Stored,
    spec: Any,
    windows: torch.Tensor,
    dense: list[torch.Tensor],
    prices: dict[float, float],
    squares: Any,
) -> Iterator[Row]:
    """Yield the bytes and the KL at each price, by the fraction of rows that it is for."""
    rows = {}
    if stored.row_bytes is not None:
        packing: Packing = PACKING if stored.row_bytes.suits(spec, PACKING) else "separate"
        rows = squares.row_prices(spec, packing, stored.row_bytes)
    compared: dict[float, list[Compared]] = {share: [] for share in prices}
    densities: dict[float, list[dict[str, torch.Tensor]]] = {share: [] for share in prices}
    for window, target in zip(windows, dense, strict=True):
        cache = read_prompt(stored.model, window[:PROMPT])
        for share, price in prices.items():
            with dropping(stored.model, spec, rows, price) as count:
                logits = stored.model(window[None, PROMPT:], past_key_values=copy.deepcopy(cache)).logits[0]
            compared[share].append(compare(target, logits.float().log_softmax(dim=-1)))
            densities[share].append(count.densities(spec))
    for share in prices:
        read = [
            stored.linear_bytes if stored.row_bytes is None else linear_bytes(stored.row_bytes, spec, each)
            for each in densities[share]
        ]
        heads = [float(each.get(HEAD, torch.ones(1))) * stored.head_bytes for each in densities[share]]
        head = sum(heads) / len(heads)
        each = [round(one.kl, 6) for one in compared[share]]
        yield {
            "share": round(share, 2),
            "price": prices[share],
            "megabytes": round((sum(read) / len(read) + head) / 1e6, 3),
            "head_megabytes": round(head / 1e6, 3),
            **summarise(compared[share]).describe(),
            "windows": each,
        }


def float_continuations(source: Any, windows: torch.Tensor, path: Path) -> list[torch.Tensor]:
    """Return the float model's log-probabilities on windows, from a file if it has them."""
    if path.is_file():
        kept = torch.load(path)
        if torch.equal(kept["windows"], windows):
            return list(kept["log_probs"])
    found = list(continuations(source.reference(), windows, PROMPT))
    torch.save({"windows": windows, "log_probs": found}, path)
    return found


def linear_bytes(row_bytes: RowBytes, spec: Any, densities: dict[str, torch.Tensor]) -> float:
    """Return the bytes that a token read of the linears of all layers."""
    outputs = linear_outputs(spec)
    return sum(
        float(densities[part][layer]) * linear_shape(spec, part)[0] * row_bytes.of(layer, (part,), outputs)
        for layer in range(spec.num_layers)
        for part in densities
        if part != HEAD
    )


def prices_of(priced: Any, spec: Any, row_bytes: RowBytes) -> dict[float, float]:
    """Return λ by the fraction of rows that it reads in the calibration's table, per byte of this format's rows.

    If all matrices have one format, these rows are read. If formats are mixed, rows of more bytes need a larger effect,
    so fewer of them are read.
    """
    outputs, table = linear_outputs(spec), priced.table(PACKING)
    theirs, own = (
        sum(
            each.of(layer, parts, outputs) * linear_shape(spec, parts[0])[0]
            for layer in range(spec.num_layers)
            for parts in packed_matrices(spec, "separate").values()
        )
        for each in (priced.row_bytes, row_bytes)
    )
    factor = theirs / own
    return {1.0: 0.0} | {1 - s: table.price_for(sparsity=s) * factor for s in SPARSITIES}


def chart(every_row: list[Row]) -> str:
    rows = [row for row in every_row if not row["ours"] or row["name"] in CHARTED]
    series = []
    for style, name in enumerate(dict.fromkeys(row["series"] for row in rows)):
        mine = sorted((row for row in rows if row["series"] == name), key=lambda row: row["megabytes"])
        columns = [[row[key] for row in mine] for key in ("megabytes", "kl", "stderr", "label")]
        own = name.startswith("ours")
        series.append(Series(name, columns[0], columns[1], style, own, True, errors=columns[2], names=columns[3]))
    x = around("weight bytes that a token reads, MB", [row["megabytes"] for row in rows], log=True)
    y = around("KL to float, nats a token", [row["kl"] for row in rows], log=True)
    drawn = str(line_chart("KL to the float model against weight bytes a token", series, x, y))
    light, dark = (
        "".join(f"--{name}:{value};" for name, value in css_variables()[mode].items() if name.startswith("series"))
        for mode in ("light", "dark")
    )
    root = f"svg{{{LIGHT}{light}background:var(--page)}}@media(prefers-color-scheme:dark){{svg{{{DARK}{dark}}}}}"
    style = f"<style>{root}{STYLE}</style>"
    return drawn.replace(">", ">" + style, 1) + "\n"


def table(rows: list[Row]) -> Iterator[str]:
    yield "| | MB a token | of it head | KL to float | same token | best of ours at its bytes or fewer |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        best = min(
            (own for own in rows if own["ours"] and own["megabytes"] <= row["megabytes"]),
            key=lambda own: own["kl"],
            default=None,
        )
        beside = (
            ""
            if row["ours"]
            else "none"
            if best is None
            else f"{best['label']}: {best['megabytes']:.1f} MB, {best['kl']:.4f}"
        )
        figures = f"{row['megabytes']:.1f} | {row['head_megabytes']:.1f} | {row['kl']:.4f} ± {row['stderr']:.4f}"
        yield f"| {row['label']} | {figures} | {row['agreement']:.3f} | {beside} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--llama", type=Path, required=True, help="folder of llama-quantize")
    parser.add_argument("--prices", type=Path, help="calibration file of a quantised folder of the copy")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--only", nargs="+", help="models by their names without ', head priced'; all by default")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "data" / "peer_quality.jsonl")
    parser.add_argument("--chart", type=Path, help="SVG file to write")
    options = parser.parse_args()
    priced = read_calibration(options.prices).priced if options.prices else None
    whole = priced is not None and HEAD not in priced.sums.square
    stacks = Stacks(options.folder, options.llama, "whole" if whole else "priced")
    source, spec, length = stacks.source, stacks.source.spec, PROMPT + CONTINUATION
    text = options.text.read_text(encoding="utf-8")[: 16 * length * options.windows]
    tokens = torch.tensor(source.tokenizer(text, add_special_tokens=False).input_ids)
    windows = tokens[: length * options.windows].view(-1, length)
    known = options.results.read_text(encoding="utf-8").splitlines() if options.results.is_file() else []
    rows: list[Row] = [json.loads(line) for line in known]
    dense: list[torch.Tensor] = []
    of_heads = "" if whole else ", head priced"
    makers = {f"ours {name}{of_heads}": make for name, make in stacks.ours().items()} | stacks.peers()
    for name, make in makers.items():
        plain = name.removesuffix(of_heads)
        if (options.only and plain not in options.only) or any(row["name"] == name for row in rows):
            continue
        stored, prices = make(), {1.0: 0.0}
        dense = dense or float_continuations(source, windows, options.folder / "float.pt")
        ours = stored.row_bytes is not None
        if ours:
            if priced is None:
                path = options.folder / "prices.safetensors"
                if not path.is_file():
                    words = ["--packing", PACKING, "-o", path]
                    run(sys.executable, "-m", "tda_export", "calibrate", stacks.quantised("int4").folder, *words)
                priced = read_calibration(path).priced
            assert priced is not None
            assert stored.row_bytes is not None
            prices = prices_of(priced, spec, stored.row_bytes)
        for found in measure(stored, spec, windows, dense, prices, priced and priced.sums):
            part = f"{name}, {found['share']:.2f} of rows" if found["share"] < 1 else name
            series = name if ours else name.split()[0]
            rows.append({"name": name, "label": part, "series": series, "ours": ours, **found})
            options.results.parent.mkdir(parents=True, exist_ok=True)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(part, found["megabytes"], found["kl"], file=sys.stderr, flush=True)
    rows.sort(key=lambda row: -row["megabytes"])
    print("\n".join(table(rows)))
    if options.chart:
        options.chart.write_text(chart(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
