"""Methods on priced artifacts: thresholds against brute force, parts, bytes against transformers, refusals."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tda_export.calibration.file import read_calibration
from tda_export.calibration.magnitudes import Magnitudes, count_magnitudes
from tda_export.calibration.price_file import Priced
from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.methods import Request, check_request, open_setting
from tda_export.evaluation.row_methods import threshold_prices, uniform_densities
from tda_export.evaluation.text import TextSettings, evaluate_text
from tda_export.graph import contract
from tda_export.models.row_dropping import dropping
from tda_export.models.source import ModelSource
from tda_export.packing import (
    PACKINGS,
    Packing,
    Parts,
    RowBytes,
    droppable_matrices,
    linear_shape,
    packed_matrices,
    row_bytes_of,
)
from tda_export.runtime import Model, load
from tda_export.runtime.kv_cache import KvCache

PROMPT, READ = list(range(5, 29)), [40, 41, 42, 90, 17]
PARTS: tuple[Parts, ...] = ("all", "layers", "ffn", "attention")
SETTINGS = TextSettings(prompts=2, prompt_tokens=24, continuation_tokens=8)


@pytest.fixture(scope="module", params=PACKINGS)
def priced_model(priced_folders: dict[str, Path], request: pytest.FixtureRequest) -> Model:
    return load(priced_folders[request.param], provider="cpu")


def packing_of(model: Model) -> Packing:
    found: Packing = model.artifact.manifest["packing"]
    return found


def row_prices(model: Model, request: Request, source: ModelSource) -> tuple[dict[str, torch.Tensor], float]:
    """Return the expected row prices of the matrices that may skip rows, and the price, for transformers."""
    spec, packing, parts = source.spec, packing_of(model), request.parts or "all"
    priced = read_calibration(model.artifact.file(contract.CALIBRATION_FILE)).priced
    assert priced is not None
    table = model.artifact.price_table
    assert table is not None
    assert request.sparsity is not None
    if request.method == "priced":
        own = priced.sums.row_prices(spec, packing, row_bytes_of(spec, 4, None, head=True))
        kept = {name: own[name] for name in [*droppable_matrices(spec, packing, parts), *["head"] * (parts == "all")]}
        return kept, table.of_parts(parts).price_for(sparsity=request.sparsity)
    densities = uniform_densities(spec, packing, parts, request.sparsity)
    method: Any = request.method
    return threshold_prices(method, priced, spec, packing, densities), 1.0


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("method", ["priced", "teal", "wina"])
def test_logits_and_bytes_are_those_of_transformers(
    priced_model: Model, source: ModelSource, reference: Any, method: str, parts: Parts
) -> None:
    request = Request(method, sparsity=0.4, parts=parts)
    setting = open_setting(priced_model.artifact, priced_model.sessions, request)
    cache = KvCache(setting.shape, "cpu", len(PROMPT) + len(READ))
    _, mask = setting.read(PROMPT, cache)
    counted = setting.decode_counted(cache, READ, mask)
    cache.truncate(len(PROMPT))
    np.testing.assert_allclose(setting.decode(cache, READ, mask), counted.logits, atol=1e-4)

    prices, price = row_prices(priced_model, request, source)
    with torch.inference_mode():
        past = reference.base_model(torch.tensor([PROMPT]), use_cache=True).past_key_values
        with dropping(reference, source.spec, prices, price) as count:
            logits = reference(torch.tensor([READ]), past_key_values=past, use_cache=True).logits[0]
    np.testing.assert_allclose(counted.logits, logits.numpy(), atol=1e-3)
    read, whole = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    densities_of = count.densities(source.spec)
    head = densities_of.pop("head", torch.ones(1))
    assert counted.head_share == pytest.approx(float(head), abs=2e-3)
    assert (counted.head_share == 1.0) == (method != "priced" or parts != "all")
    for part, densities in densities_of.items():
        of_ffn, size = part not in "qkvo", np.prod(linear_shape(source.spec, part))
        read[of_ffn] += float(densities.sum()) * size
        whole[of_ffn] += 3 * size
    assert counted.ffn_share == pytest.approx(read[True] / whole[True], abs=2e-3)
    assert counted.attention_share == pytest.approx(read[False] / whole[False], abs=2e-3)
    assert (counted.ffn_share == 1.0) == (parts == "attention")
    assert (counted.attention_share == 1.0) == (parts == "ffn")


def test_bytes_of_all_linears(priced_model: Model) -> None:
    windows = [np.random.default_rng(i).integers(3, 200, SETTINGS.window).tolist() for i in range(2)]
    artifact = priced_model.artifact
    for parts in PARTS:
        request = Request("teal", sparsity=0.5, parts=parts)
        quality = evaluate_text(artifact, open_setting(artifact, priced_model.sessions, request), windows, SETTINGS)
        attention = artifact.linear_bytes - artifact.dense_ffn_bytes
        read = quality.linear_bytes - quality.ffn_bytes
        assert (read == pytest.approx(attention)) == (parts == "ffn")
        assert (quality.ffn_bytes == pytest.approx(artifact.dense_ffn_bytes)) == (parts == "attention")
        assert quality.dense_linear_bytes == artifact.linear_bytes == 3 * 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)


# Thresholds


def magnitudes_of(samples: dict[str, torch.Tensor], norms: dict[str, torch.Tensor], source: ModelSource) -> Priced:
    """Return calibration's counts of inputs [T, in] by site, equal in every layer."""
    sites = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
    counts = {site: count_magnitudes(x)[None].expand(3, -1) for site, x in samples.items()}
    weighted = {
        name: count_magnitudes(samples[sites.get(name, name)] * norm[0])[None].expand(3, -1)
        for name, norm in norms.items()
    }
    return Priced({}, None, Magnitudes(counts, weighted), norms, RowBytes(4), 8)  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("method", ["teal", "wina"])
def test_thresholds_are_quantiles(method: Any, packing: Packing, source: ModelSource) -> None:
    """Against sorting: the largest products |x_i| or |x_i| ||W_i|| are read, as many as asked for."""
    generator, spec = torch.Generator().manual_seed(0), source.spec
    matrices = packed_matrices(spec, packing)
    samples, norms = {}, {}
    for name, parts in matrices.items():
        size = linear_shape(spec, parts[0])[0]
        norms[name] = (torch.rand(1, size, generator=generator) + 0.1).expand(3, -1)
        site = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}.get(name, name)
        samples.setdefault(site, torch.randn(400, size, generator=generator) ** 3)
    priced = magnitudes_of(samples, norms, source)
    for sparsity in (0.1, 0.5, 0.85):
        densities = uniform_densities(spec, packing, "all", sparsity)
        for name, prices in threshold_prices(method, priced, spec, packing, densities).items():
            x = samples[{"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}.get(name, name)]
            size = x.abs() * (norms[name][0] if method == "wina" else 1.0)
            read = x.square() * prices[0] >= 1
            assert float(read.double().mean()) == pytest.approx(1 - sparsity, abs=0.003)
            exact = size.flatten().double().quantile(sparsity)
            assert (read == (size >= exact)).double().mean() > 0.99
            assert size[read].min() == pytest.approx(float(exact), rel=0.03)


@pytest.mark.parametrize("method", ["teal", "wina"])
def test_no_sparsity_reads_every_row(priced_model: Model, method: str) -> None:
    setting = open_setting(priced_model.artifact, priced_model.sessions, Request(method, sparsity=0.0))
    cache = KvCache(setting.shape, "cpu", len(PROMPT) + len(READ))
    _, mask = setting.read(PROMPT, cache)
    counted = setting.decode_counted(cache, READ, mask)
    assert (counted.ffn_share, counted.attention_share) == (1.0, 1.0)
    cache.truncate(len(PROMPT))
    np.testing.assert_allclose(setting.decode(cache, READ, None), counted.logits, atol=1e-5)


def test_a_part_has_the_price_of_its_share(priced_model: Model) -> None:
    table = priced_model.artifact.price_table
    assert table is not None
    row = table.rows[4]
    artifact, sessions = priced_model.artifact, priced_model.sessions
    for parts, share in (("ffn", row.ffn_share), ("attention", row.attention_share), ("all", row.share)):
        request = Request("priced", sparsity=1 - share, parts=parts)  # type: ignore[arg-type]
        assert open_setting(artifact, sessions, request).deployment.price == pytest.approx(row.price)


# Refusals


def without_calibration(model: Model) -> Any:
    manifest = copy.deepcopy(model.artifact.manifest)
    del manifest["files"][contract.CALIBRATION_FILE]
    return dataclasses.replace(model.artifact, manifest=manifest)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("teal"), r"^--method teal takes --sparsity, --parts and --calibration, and --densities\. Give these"),
        (Request("wina"), r"^--method wina takes --sparsity, --parts and --calibration\. Give these alone"),
        (Request("wina", sparsity=0.5, price=1.0), "wina takes --sparsity"),
        (Request("teal", sparsity=0.5, allocation="uniform"), "teal takes --sparsity"),
        (Request("teal", sparsity=1.0), r"^sparsity 1\.0 is outside \[0, 1\)\. Give a fraction"),
        (Request("wina", sparsity=0.5, densities=Path("x")), "^--densities is for --method teal"),
        (Request("priced", sparsity=0.5, densities=Path("x")), "^--densities is for --method teal"),
        (Request("dense", parts="ffn"), "^--parts has no effect with --method dense, but with priced, teal, wina"),
        (
            Request("priced", max_kl=0.1, parts="ffn"),
            r"^--parts ffn: KL was measured with all priced linears.* Give --sparsity",
        ),
        (Request(parts="attention"), r"^--parts attention: KL was measured"),
        (
            Request("priced", sparsity=0.99, parts="ffn"),
            r"^Sparsity 0\.99 is more than was measured .* Give a sparsity",
        ),
        (
            Request("teal", sparsity=0.5, densities=Path("gone.json")),
            r"^gone\.json: no such file\. Make one with bench",
        ),
        (Request("griffin", sparsity=0.5), r"runs priced, teal, wina, dense and not griffin.*--method tda'\.$"),
    ],
    ids=str,
)
def test_what_is_refused(priced_model: Model, request_: Request, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_request(priced_model.artifact, request_)


def test_methods_of_rows_on_an_artifact_of_masks(model: Model) -> None:
    for request in (Request("teal", sparsity=0.5), Request("wina", sparsity=0.5)):
        with pytest.raises(UsageError, match=r"has the layout indexed.*--method priced'\.$"):
            check_request(model.artifact, request)
    with pytest.raises(UsageError, match=r"^--parts has no effect with --method tda"):
        check_request(model.artifact, Request("tda", parts="ffn"))
    with pytest.raises(UsageError, match=r"^--densities has no effect with --method tda"):
        check_request(model.artifact, Request("tda", densities=Path("x")))


def test_thresholds_without_a_calibration(
    priced_model: Model, tiny_calibration: Path, tables_calibration: Path, source: ModelSource
) -> None:
    artifact, request = without_calibration(priced_model), Request("teal", sparsity=0.5)
    with pytest.raises(UsageError, match=r"contains no calibration, from which --method teal .* with --calibration"):
        check_request(artifact, request)
    with pytest.raises(UsageError, match=r"contains no sizes of inputs.*calibrate --method priced'.*--calibration"):
        check_request(artifact, dataclasses.replace(request, calibration=tiny_calibration))
    check_request(artifact, dataclasses.replace(request, calibration=tables_calibration))


def test_densities_that_are_none(priced_model: Model, tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    for content in ("{", "[]", json.dumps({"format": "other"})):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(
            TdaError, match=r"d\.json: not a file of greedy densities .* Make one with benchmarks/teal_densities"
        ):
            check_request(priced_model.artifact, Request("teal", sparsity=0.5, densities=path))
