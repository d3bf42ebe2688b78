"""`tda-export bench`: compare ways of generating, in one run."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tda_export.cli.help_groups import command, option
from tda_export.cli.options import FRACTION, PATH, json_option, provider_option, weight_options

if TYPE_CHECKING:
    from tda_export.packing import HeadRows

MILD_SPARSITY = 0.3  # a second sparsity that --shape always measures
METHODS = ("dense", "dense_native", "tda", "two_levels", "griffin", "tt", "priced")  # those of tda_export.bench.decode


@command(rare=("group", "weights_for", "head"))
@click.argument("artifact", type=PATH, required=False)
@option("--shape", help="Use random weights of a real shape instead: a name such as llama-2-7b, or a config.json.")
@option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(METHODS),
    help="What to compare. Repeatable.  [default: dense, dense_native, priced; with integers not dense; with masks "
    "dense, dense_native, tda, two_levels, griffin]",
)
@option(
    "--sparsity",
    type=FRACTION,
    default=0.5,
    show_default=True,
    help="Fraction of weight bytes to skip: of the layers' linears with prices, of the FFN with masks.",
)
@option("--prompt-tokens", type=click.IntRange(2), default=1024, show_default=True, help="Length of the prompt.")
@option("--new-tokens", type=click.IntRange(16), default=256, show_default=True, help="Tokens to decode.")
@option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="With --shape.  [default: fp16 on CUDA, fp32 on the CPU]",
)
@weight_options("float", "int8", "int4")
@option(
    "--head",
    type=click.Choice(["priced", "whole"]),
    help="With --shape: rows of the head have prices too, or every token reads all of them.  [default: priced]",
)
@provider_option
@json_option
def bench(
    artifact: Path | None,
    shape: str | None,
    methods: tuple[str, ...],
    sparsity: float,
    prompt_tokens: int,
    new_tokens: int,
    dtype: str | None,
    weights: str,
    group: int | None,
    weights_for: tuple[str, ...],
    head: HeadRows | None,
    provider: str,
    as_json: bool,
) -> None:
    """Compare ways of generating from ARTIFACT, side by side in one run.

    dense: ONNX Runtime's own operators. dense_native: the decode graph, all rows. priced: the decode graph at
    --sparsity (with --shape also at 0.3, and rows drawn at random). tda, griffin: a prompt's mask. two_levels: a mask
    and a token threshold. tt: each token drops its own down rows. All masks read the same bytes. Logits are checked
    first. Times are medians over rounds of 16 tokens; speed-ups are ratios within a round. The artifact of a --shape
    is temporary (TMPDIR).
    """
    from tda_export.bench.decode import BenchSettings, default_methods
    from tda_export.errors import UsageError
    from tda_export.graph.contract import DTYPES
    from tda_export.runtime.artifact import open_artifact
    from tda_export.runtime.providers import choose_provider, cuda_problem
    from tda_export.temporary import owned_folder

    if artifact is None and shape is None:
        raise UsageError("Give an ARTIFACT, or a --shape to bench with random weights.")
    if artifact is not None and shape is not None:
        raise UsageError("Give either an ARTIFACT or a --shape, not both.")
    of_shape = {
        "--dtype": dtype,
        "--weights": weights if weights != "float" else None,
        "--group": group,
        "--weights-for": weights_for or None,
        "--head": head,
    }
    if given := [option for option, value in of_shape.items() if value is not None and artifact]:
        raise UsageError(f"{given[0]} is for --shape only; an artifact has its own. Leave it out.")
    settings = partial(BenchSettings, sparsity=sparsity, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    settings(methods or ("dense",))  # wrong settings are refused before anything is built
    if artifact:
        opened = open_artifact(artifact)
        chosen_methods = methods or default_methods(opened, new_tokens)
        result = _run(opened, choose_provider(provider, opened.shape.dtype), settings(chosen_methods), as_json)
    else:
        from tda_export.bench.artifact import build_random_artifact, build_random_priced
        from tda_export.bench.random_codes import random_storage
        from tda_export.bench.shapes import random_source
        from tda_export.graph.storage import read_plan

        assert shape is not None
        on_gpu = provider == "cuda" or (provider == "auto" and cuda_problem() is None)
        chosen = DTYPES[dtype or ("fp16" if on_gpu else "fp32")]
        resolved = choose_provider(provider, chosen)
        source = random_source(shape)
        storage = random_storage(chosen, read_plan(source, weights, group, weights_for))
        with owned_folder(Path(tempfile.gettempdir()), "tda-export-bench") as folder:
            place, prices = folder / "artifact", None
            if masks := set(methods) & {"tda", "two_levels", "griffin", "tt"}:
                if head is not None:
                    raise UsageError(
                        f"--head has no effect with {min(masks)}, which reads the head whole. Leave it out."
                    )
                if storage.has_integers:
                    raise UsageError(f"{min(masks)} needs float weights. Leave --weights and --weights-for out.")
                if "priced" in methods:
                    raise UsageError(f"priced and {min(masks)} need different artifacts. Bench one after the other.")
                opened = build_random_artifact(source, place, chosen, sparsity, quiet=as_json)
            else:
                sparsities = sorted({MILD_SPARSITY, sparsity})
                opened, drawn = build_random_priced(
                    source, place, storage, sparsities, head=head or "priced", quiet=as_json
                )
                prices = {f"priced_{1 - share:.2f}": price for share, price in drawn.items()}
            chosen_methods = methods or default_methods(opened, new_tokens)
            result = _run(opened, resolved, settings(chosen_methods, prices=prices), as_json)
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print(result)


def _run(artifact: Any, provider: str, settings: Any, as_json: bool) -> dict[str, Any]:
    from itertools import cycle, islice

    from tda_export.bench.decode import run_bench
    from tda_export.calibration.corpus import builtin_folder
    from tda_export.runtime.text import Text

    files = sorted(builtin_folder().glob("*.txt"))
    tokens = Text(artifact).encode("\n\n".join(file.read_text(encoding="utf-8") for file in files))
    prompt = list(islice(cycle(tokens), settings.prompt_tokens))
    return run_bench(
        artifact, provider, settings, prompt, lambda line: None if as_json else click.echo(f"{line}…", err=True)
    )


def _print(result: dict[str, Any]) -> None:
    from tda_export.cli.tables import print_table

    rows = []
    for name, row in result.items():
        if not isinstance(row, dict) or "ms_per_token" not in row:
            continue
        low, high = row["ms_per_token_range"]
        rows.append(
            [
                name,
                f"{row['ms_per_token']:.2f}",
                f"{low:.2f}-{high:.2f}",
                f"{row['speedup']:.2f}" if "speedup" in row else "",
                f"{row['prefill_ms']:.1f}",
                f"{row['skippable_bytes_per_token'] / 2**20:,.0f}",
                f"{row['bytes_per_token'] / 2**20:,.0f}",
                f"{row['share_of_copy_bandwidth']:.2f}",
            ]
        )
    columns = ["decode", "ms", "from-to", "faster", "prefill", "rows", "MiB", "of copy"]
    click.echo(
        f"{result['model']} in {result['dtype']} on {result['device']}, {result['prompt_tokens']} + "
        f"{result['new_tokens']} tokens, {'native kernels' if result['native'] else 'no native kernels'}, "
        f"copy {result['copy_gb_per_second']:,.0f} GB/s"
    )
    title = (
        "Milliseconds a token and of prefill, times faster than dense, MiB that a token reads of matrices whose rows "
        "may be skipped and in all, and the bandwidth of a whole step beside a copy's"
    )
    print_table(title, columns, rows)
