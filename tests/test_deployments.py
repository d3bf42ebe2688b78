"""From a budget that a user asks for to the inputs of decode."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tda_export.calibration.budgets import Budget
from tda_export.calibration.file import read_calibration
from tda_export.deployments import Asked, deployed, own_calibration
from tda_export.errors import TdaError, UsageError
from tda_export.graph import contract
from tda_export.runtime.artifact import Artifact, open_artifact
from tda_export.runtime.deployment import Deployment, PriceDeployment, Refresh


@pytest.fixture(scope="module")
def priced(priced_artifact: Path) -> Artifact:
    return open_artifact(priced_artifact)


@pytest.fixture(scope="module")
def indexed(tiny_artifact: Path) -> Artifact:
    return open_artifact(tiny_artifact)


def with_manifest(artifact: Artifact, **changes: Any) -> Artifact:
    return dataclasses.replace(artifact, manifest=artifact.manifest | changes)


def masks_of(artifact: Artifact, **asked: Any) -> Deployment:
    deployment = deployed(artifact, Asked(**asked))
    assert isinstance(deployment, Deployment)
    return deployment


def price_of(artifact: Artifact, **asked: Any) -> PriceDeployment:
    deployment = deployed(artifact, Asked(**asked))
    assert isinstance(deployment, PriceDeployment)
    return deployment


# Requests


def test_nothing_asked_is_no_budget() -> None:
    assert not Asked(refresh=Refresh(4), calibration=Path("x")).has_budget
    for name, value in {"price": 0.0, "sparsity": 0.0, "max_kl": 0.1, "cett": 0.0, "allocation": "kl"}.items():
        assert Asked(**{name: value}).has_budget, name  # type: ignore[arg-type]


def test_budget_of_masks() -> None:
    assert Asked(sparsity=0.5).budget() == Budget(sparsity=0.5, allocation="kl")
    assert Asked(max_kl=0.05).budget() == Budget(max_kl=0.05)
    with pytest.raises(UsageError, match="Give exactly one budget"):
        Asked(sparsity=0.5, cett=0.1).budget()


# Prices


def test_priced_artifact_has_a_price_of_its_own(priced: Artifact) -> None:
    own = price_of(priced)
    assert own == priced.deployment
    assert own.price == priced.manifest["price"] > 0
    assert own.share == pytest.approx(priced.manifest["expected"]["share"])


def test_price_by_budget(priced: Artifact) -> None:
    table = priced.price_table
    assert table is not None
    by_sparsity = price_of(priced, sparsity=0.3)
    assert by_sparsity.share == pytest.approx(0.7)
    assert table.predicted(by_sparsity.price).share == pytest.approx(0.7)
    by_kl = price_of(priced, max_kl=0.02)
    assert table.predicted(by_kl.price).kl == pytest.approx(0.02)
    given = price_of(priced, price=by_kl.price)
    assert given == by_kl
    assert 0 < by_sparsity.price < price_of(priced, sparsity=0.6).price


@pytest.mark.parametrize("asked", [{"price": 0.0}, {"sparsity": 0.0}])
def test_dense_prices(priced: Artifact, asked: dict[str, float]) -> None:
    deployment = price_of(priced, **asked)
    assert deployment.price <= 0
    assert deployment.share == 1.0
    assert deployment.by_calibration == ""


def test_price_beyond_the_table_is_refused(priced: Artifact) -> None:
    table = priced.price_table
    assert table is not None
    with pytest.raises(UsageError, match=r"^Price .* is beyond what was measured: up to .*Give a price up to that, or"):
        price_of(priced, price=10 * table.most_price)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"price": 0.1, "sparsity": 0.5},
            r"^Give exactly one budget: --price, --sparsity or --max-kl",
        ),
        (
            {"sparsity": 0.5, "max_kl": 0.1},
            r"^Give exactly one budget: --price, --sparsity or --max-kl",
        ),
        ({"price": float("nan")}, r"^A price of nan: give a finite number, 0 for dense\.$"),
        ({"price": float("inf")}, r"^A price of inf: give a finite number"),
        ({"sparsity": 0.99}, r"^Sparsity 0\.99 is more than was measured with prices .*Give a sparsity up to 0\."),
        ({"sparsity": 1.5}, r"^sparsity 1\.5 is outside \[0, 1\)"),
        ({"max_kl": 0.0}, r"^--max-kl 0\.0: give a positive number of nats a token"),
        ({"max_kl": 100.0}, r"^KL 100\.0 is more than was measured with prices .*Give a KL up to 0\."),
        ({"cett": 0.2}, r"^--cett needs an artifact with masks, and .* has prices\. Leave it out, or build"),
        ({"allocation": "kl"}, r"^--allocation needs an artifact with masks"),
        ({"sparsity": 0.5, "allocation": "uniform"}, r"^--allocation needs an artifact with masks"),
        ({"refresh": Refresh(4)}, r"^--refresh needs an artifact with masks.*'tda-export build MODEL --method tda'\.$"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_priced_artifacts_refuse(priced: Artifact, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        deployed(priced, Asked(**asked))


def test_artifact_without_a_table(priced: Artifact) -> None:
    """An artifact that was built without measurements takes prices, and refuses budgets that need the table."""
    artifact = with_manifest(priced, price_table=None)
    assert price_of(artifact, price=0.25) == PriceDeployment(0.25)
    for asked in ({"sparsity": 0.5}, {"max_kl": 0.05}):
        with pytest.raises(UsageError, match=r"no table of prices\. Give --price, or build it with --calibration"):
            deployed(artifact, Asked(**asked))


# Masks


def test_artifact_of_masks_takes_no_price(indexed: Artifact) -> None:
    for asked in (Asked(price=0.1), Asked(price=0.0, sparsity=0.5)):
        with pytest.raises(UsageError, match=r"^--price: .* has masks and no prices\. Build"):
            deployed(indexed, asked)


def test_artifact_of_masks_has_thresholds_of_its_own(indexed: Artifact) -> None:
    own, refreshed = masks_of(indexed), masks_of(indexed, refresh=Refresh(8, 0.5))
    assert own.thresholds is not None
    assert own.thresholds.tolist() == np.asarray(indexed.manifest["thresholds"], np.float32).tolist()
    assert refreshed.refresh == Refresh(8, 0.5)
    assert np.array_equal(refreshed.token_thresholds, own.token_thresholds)


def test_masks_by_budget(indexed: Artifact) -> None:
    own = masks_of(indexed)
    by_kl = masks_of(indexed, sparsity=0.3)
    assert by_kl.token_thresholds.any()
    assert by_kl.prior
    assert by_kl.tail_mean
    assert not np.array_equal(by_kl.token_thresholds, own.token_thresholds)
    assert masks_of(indexed, sparsity=0.3, refresh=Refresh(8)).refresh == Refresh(8)
    uniform = masks_of(indexed, sparsity=0.3, allocation="uniform")
    assert not uniform.token_thresholds.any()
    assert not uniform.prior
    assert not uniform.tail_mean  # the tail mean belonged to the allocation by KL


def test_tail_mean_that_was_asked_for_stays(indexed: Artifact) -> None:
    artifact = with_manifest(indexed, budget={"cett": 0.2})
    assert masks_of(artifact, cett=0.1).tail_mean


def test_calibration_of_another_file(indexed: Artifact, token_artifact: Path) -> None:
    path = token_artifact / contract.CALIBRATION_FILE
    expected = read_calibration(path).allocate(Budget(cett=0.3)).thresholds
    thresholds = masks_of(indexed, cett=0.3, calibration=path).thresholds
    assert thresholds is not None
    np.testing.assert_allclose(thresholds, expected, rtol=1e-6)


def test_calibration_of_another_model(indexed: Artifact) -> None:
    other = with_manifest(indexed, model=indexed.manifest["model"] | {"fingerprint": "0" * 64})
    with pytest.raises(UsageError, match=r"was calibrated on another model \(.*\) than .* with --calibration\.$"):
        own_calibration(other, indexed.file(contract.CALIBRATION_FILE))


def test_calibration_that_is_not_there(indexed: Artifact, tmp_path: Path) -> None:
    files = {name: entry for name, entry in indexed.manifest["files"].items() if name != contract.CALIBRATION_FILE}
    with pytest.raises(UsageError, match=r"contains no calibration, so its budget is fixed\. Leave the budget out"):
        deployed(with_manifest(indexed, files=files), Asked(sparsity=0.3))
    with pytest.raises(TdaError, match="no such calibration file"):
        deployed(indexed, Asked(sparsity=0.3, calibration=tmp_path / "none"))


def test_calibration_that_is_damaged(indexed: Artifact, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(indexed.folder, tmp_path / "artifact"))
    (folder / contract.CALIBRATION_FILE).write_bytes(b"x")
    with pytest.raises(TdaError, match=contract.CALIBRATION_FILE):
        deployed(dataclasses.replace(indexed, folder=folder), Asked(sparsity=0.3))
