"""`tda-export inspect`: describe a model or an artifact, and its largest possible speed-up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tda_export.cli.help_groups import command, option
from tda_export.cli.options import json_option
from tda_export.cli.quantize import describe_quantisation
from tda_export.float_kl import float_kl_text, integers_kl

CONTEXT = 1024  # default tokens in the cache
SPARSITIES = (0.3, 0.5, 0.7)
MIB = 2**20


@command()
@click.argument("name", metavar="MODEL|ARTIFACT")
@option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Dtype of the artifact that build would make of a MODEL.  [default: fp16]",
)
@option(
    "--context",
    type=click.IntRange(1),
    help="Tokens in the cache.  [default: 1024, or the model's maximum]",
)
@json_option
def inspect(name: str, dtype: str | None, context: int | None, as_json: bool) -> None:
    """Describe MODEL or ARTIFACT: architecture, size, and largest possible speed-up.

    No weights of a MODEL are read; figures are for the artifact of prices that build would make. The largest speed-up
    is the ratio of the bytes that a dense and a sparse step read, because decoding one token at a time is bound by
    memory bandwidth. A session holds the weights once, and the keys and values of the context.
    """
    from tda_export.errors import UsageError
    from tda_export.graph.contract import DTYPES, MANIFEST_FILE

    if (Path(name) / MANIFEST_FILE).is_file():
        if dtype:
            raise UsageError("--dtype is for a MODEL; an artifact has its own. Leave --dtype out.")
        result = _of_artifact(Path(name), context)
    else:
        result = _of_model(name, DTYPES[dtype or "fp16"], context)
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print(result)


def _of_model(name: str, dtype: str, context: int | None) -> dict[str, Any]:
    from tda_export.graph.requests import default_packing
    from tda_export.graph.sizes import planned_sizes
    from tda_export.graph.storage import storage_of
    from tda_export.models.skeleton import skeleton_shapes
    from tda_export.models.source import resolve_model
    from tda_export.packing import can_read_head

    source = resolve_model(name, notify=lambda line: click.echo(line, err=True))
    spec, storage = source.spec, storage_of(source, dtype)
    packing, head = default_packing(spec, storage), can_read_head("priced", source.formats)
    sizes = planned_sizes(spec, skeleton_shapes(source.config), storage, packing, head=head)
    quantised = {} if source.quantisation is None else {"quantization": source.quantisation}
    return _described(name, spec, sizes, dtype, context) | quantised


def _of_artifact(folder: Path, context: int | None) -> dict[str, Any]:
    from tda_export.graph.derive import artifact_spec
    from tda_export.graph.sizes import artifact_sizes
    from tda_export.runtime.artifact import open_artifact

    artifact = open_artifact(folder)
    spec, dtype = artifact_spec(artifact), artifact.shape.dtype
    sizes = artifact_sizes(spec, artifact)
    described = _described(artifact.name, spec, sizes, dtype, context)
    prices: dict[str, Any] = {
        name: artifact.manifest[name] for name in ("packing", "price", "price_table") if name in artifact.manifest
    }
    if artifact.has_integers:
        formats = {name: matrix.format.name for name, matrix in artifact.matrices.items()}
        prices["quantization"] = (artifact.manifest["model"].get("quantization") or {}) | {"formats": formats}
    return (
        described
        | prices
        | {
            "artifact": str(folder),
            "kv": artifact.shape.kv,
            "layout": artifact.layout,
            "method": artifact.manifest["method"]["name"],
            "budget": artifact.manifest["budget"],
            "expected_sparsity": artifact.manifest["expected"].get("sparsity"),
            "expected_kl": artifact.manifest["expected"].get("kl"),
            "artifact_bytes": sum(entry["size"] for entry in artifact.manifest["files"].values()),
        }
    )


def _described(name: str, spec: Any, sizes: Any, dtype: str, context: int | None) -> dict[str, Any]:
    from tda_export.errors import UsageError
    from tda_export.graph.kv_formats import KV_FLOAT
    from tda_export.graph.sizes import features

    if context is None:
        context = min(CONTEXT, spec.max_positions)
    if context > spec.max_positions:
        raise UsageError(f"{context} tokens are more than the model's {spec.max_positions} positions. Lower --context.")
    return {
        "model": name,
        "architecture": spec.architecture,
        "features": list(features(spec)),
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "head_size": spec.head_size,
        "ffn_size": spec.ffn_size,
        "ffn_matrices": len(spec.ffn_parts),
        "vocab_size": spec.vocab_size,
        "max_positions": spec.max_positions,
        "dtype": dtype,
        "kv": KV_FLOAT,
        "context": context,
        "artifact_bytes": sizes.stored,
        "bytes_per_token": sizes.read + sizes.cache_read(context),
        "ffn_bytes": sizes.ffn,
        "ffn_share": sizes.ffn / sizes.read,
        "linear_bytes": sizes.linears,
        "linear_formats": list(sizes.formats),
        "linear_share": sizes.linears / sizes.read,
        "ceiling": {str(sparsity): sizes.ceiling(sparsity, context) for sparsity in SPARSITIES},
        "linear_ceiling": {str(sparsity): sizes.ceiling(sparsity, context, linears=True) for sparsity in SPARSITIES},
        "cache_bytes": sizes.cache(context),
        "session_bytes": sizes.stored + sizes.cache(context),
    }


def _print(result: dict[str, Any]) -> None:
    from tda_export.cli.tables import print_prices
    from tda_export.pricing import PriceTable

    click.echo(f"{result['model']}: {result['architecture']}")
    click.echo(f"  {'; '.join(result['features'])}")
    click.echo(
        f"  {result['layers']} layers, hidden size {result['hidden_size']:,}, {result['heads']} heads of "
        f"{result['head_size']} over {result['kv_heads']} key-value heads, {result['ffn_size']:,} FFN neurons of "
        f"{result['ffn_matrices']} rows, {result['vocab_size']:,} tokens, {result['max_positions']:,} positions"
    )
    if "quantization" in result:
        click.echo(f"  {describe_quantisation(result['quantization'])}")
    if "artifact" in result:
        _print_build(result)
    click.echo(
        f"  linears of the layers {result['linear_bytes'] / MIB:,.0f} MiB in "
        f"{' and '.join(result['linear_formats'])}, "
        f"{result['linear_share']:.0%} of the weights that a token reads; the FFN's {result['ffn_bytes'] / MIB:,.0f} "
        f"MiB, {result['ffn_share']:.0%}; with {result['context']:,} tokens in the cache a token reads "
        f"{result['bytes_per_token'] / MIB:,.0f} MiB"
    )
    for sparsity, ceiling in result["ceiling"].items():
        click.echo(
            f"  at {float(sparsity):.0%} sparsity of the layers' linears at most "
            f"{result['linear_ceiling'][sparsity]:.2f} times as fast as dense, of the FFN {ceiling:.2f} "
            "(head read whole)"
        )
    click.echo(
        f"  artifact {result['artifact_bytes'] / MIB:,.0f} MiB, a session at least "
        f"{result['session_bytes'] / MIB:,.0f} MiB, {result['cache_bytes'] / MIB:,.0f} of them for the cache, "
        f"{_stored(result['kv'], result['dtype'])}"
    )
    if result.get("price_table"):
        print_prices(PriceTable.from_dict(result["price_table"]), integers_kl(result.get("quantization")))


def _stored(kv: str, dtype: str) -> str:
    """Describe how keys and values are stored."""
    from tda_export.graph.kv_formats import KV_FLOAT

    return f"keys and values in {dtype if kv == KV_FLOAT else kv}"


def _print_build(result: dict[str, Any]) -> None:
    expected, budget = (
        result["expected_sparsity"],
        ", ".join(f"{key} {value}" for key, value in result["budget"].items()),
    )
    what = "sparsity of the layers' linears" if result["layout"] == "priced" else "FFN sparsity"
    suffix = "" if expected is None else f", expected {what} {expected:.3f}"
    price = f", price {result['price']:.4g}, packing {result['packing']}" if result["layout"] == "priced" else ""
    click.echo(f"  built with {result['method']}, {budget}{price}{suffix}")
    integers, kl = integers_kl(result.get("quantization")), result["expected_kl"]
    if integers is not None and kl is not None:
        click.echo(f"  {float_kl_text(integers, kl)}")
