"""Methods on priced artifacts: logits and counted bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tda_export.errors import UsageError
from tda_export.evaluation.methods import METHODS, Request, check_request, open_setting
from tda_export.evaluation.priced_setting import PricedSetting, counted_matrices, open_priced
from tda_export.evaluation.setting import Counted
from tda_export.graph import contract
from tda_export.models.row_dropping import dropping
from tda_export.models.source import ModelSource
from tda_export.runtime import Model
from tda_export.runtime.deployment import PriceDeployment
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.session import map_weight
from tests.runtime.conftest import row_prices

PROMPT, READ = list(range(5, 29)), [40, 41, 42, 43, 44]
HIDDEN, FFN, KEY_VALUES, LAYERS = 64, 96, 32, 3
OUTPUTS = {"q": HIDDEN, "k": KEY_VALUES, "v": KEY_VALUES, "o": HIDDEN, "gate": FFN, "up": FFN, "down": HIDDEN}
ATTENTION = ("q", "k", "v", "o")


def opened(model: Model, request: Request) -> PricedSetting:
    setting = open_setting(model.artifact, model.sessions, request)
    assert isinstance(setting, PricedSetting)
    return setting


def counted(setting: PricedSetting, tokens: list[int] = READ) -> Counted:
    cache = KvCache(setting.shape, "cpu", len(PROMPT) + len(tokens))
    _, mask = setting.read(PROMPT, cache)
    return setting.decode_counted(cache, tokens, mask)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7])
def test_bytes_are_those_that_transformers_would_read(
    priced_model: Model, source: ModelSource, reference: torch.nn.Module, sparsity: float
) -> None:
    setting = opened(priced_model, Request(sparsity=sparsity))
    with torch.inference_mode():
        past = reference(torch.tensor([PROMPT]), use_cache=True).past_key_values
        with dropping(reference, source.spec, row_prices(priced_model), setting.deployment.price) as rows:
            logits = reference(torch.tensor([READ]), past_key_values=past, use_cache=True).logits[0].numpy()
    read = {part: float(rows.read[part].sum()) / len(READ) * size for part, size in OUTPUTS.items()}
    whole = {part: LAYERS * (FFN if part == "down" else HIDDEN) * size for part, size in OUTPUTS.items()}
    found = counted(setting)
    np.testing.assert_allclose(found.logits, logits, atol=1e-3)
    ffn = [part for part in OUTPUTS if part not in ATTENTION]
    assert found.ffn_share == found.sparse_share == pytest.approx(sum(map(read.get, ffn)) / sum(map(whole.get, ffn)))
    assert found.attention_share == pytest.approx(sum(map(read.get, ATTENTION)) / sum(map(whole.get, ATTENTION)))
    kept = sum(float(rows.read[part].sum()) for part in OUTPUTS) / len(READ)
    assert found.density == pytest.approx(kept / (LAYERS * (6 * HIDDEN + FFN)))
    assert found.refresh_share == 0.0
    assert found.head_share == pytest.approx(float(rows.read["head"]) / len(READ) / HIDDEN)
    assert 0 < found.head_share < 1


def test_counted_tokens_are_those_of_steps(priced_model: Model) -> None:
    setting = opened(priced_model, Request())
    step = setting.open_step(len(PROMPT) + len(READ))
    step.begin(PROMPT, setting.deployment)
    step.follow(setting.deployment)
    one_by_one = np.stack([step.logits(token) for token in READ])
    together = counted(setting)
    np.testing.assert_allclose(together.logits, one_by_one, atol=1e-4)
    cache = KvCache(setting.shape, "cpu", len(PROMPT) + len(READ))
    _, mask = setting.read(PROMPT, cache)
    np.testing.assert_allclose(setting.decode(cache, READ, mask), one_by_one, atol=1e-4)
    cache.truncate(len(PROMPT))
    shares = [setting.decode_counted(cache, [token], mask).ffn_share for token in READ]
    assert together.ffn_share == pytest.approx(np.mean(shares))


@pytest.mark.parametrize("request_", [Request("dense"), Request(price=0.0), Request(sparsity=0.0)], ids=str)
def test_dense_reads_everything(priced_model: Model, request_: Request) -> None:
    setting = opened(priced_model, request_)
    found = counted(setting)
    assert (found.density, found.ffn_share, found.attention_share, found.head_share) == (1.0, 1.0, 1.0, 1.0)
    cache = KvCache(setting.shape, "cpu", len(PROMPT) + len(READ))
    setting.read(PROMPT, cache)
    np.testing.assert_allclose(setting.decode(cache, READ, None), found.logits, atol=1e-5)


def test_without_a_mask_is_dense(priced_model: Model) -> None:
    """Every measurement compares a method with it."""
    setting = opened(priced_model, Request(sparsity=0.7))
    cache = KvCache(setting.shape, "cpu", len(PROMPT) + len(READ))
    setting.read(PROMPT, cache)
    dense = setting.decode(cache, READ, None)
    np.testing.assert_allclose(dense, counted(opened(priced_model, Request("dense"))).logits, atol=1e-5)
    assert np.abs(dense - counted(setting).logits).max() > 1e-2


def test_other_prices_of_rows(priced_model: Model) -> None:
    """A row with an infinite price is always read, one with price 0 never. Other matrices keep their prices."""
    artifact, price = priced_model.artifact, PriceDeployment(1e-6)
    names = counted_matrices(artifact)
    assert len(names) == LAYERS * len(OUTPUTS) + 1
    sizes = {name: artifact.matrices[name].rows for name in names}
    never = {name: np.zeros(size, np.float32) for name, size in sizes.items()}
    always = {name: np.full(size, np.inf, np.float32) for name, size in sizes.items()}
    attention_alone = {name: (always if ".attention." in name else never)[name] for name in names}
    head_alone = never | {"head": always["head"]}
    for prices, shares in (
        (never, (0.0, 0.0, 0.0)),
        (always, (1.0, 1.0, 1.0)),
        (attention_alone, (0.0, 1.0, 0.0)),
        (head_alone, (0.0, 0.0, 1.0)),
    ):
        found = counted(open_priced("other", artifact, priced_model.sessions, price, {}, prices))
        assert (found.ffn_share, found.attention_share, found.head_share) == shares
    own = counted(open_priced("own", artifact, priced_model.sessions, price, {}))
    same = {name: np.array(map_weight(artifact, contract.row_price(name))) for name in names[:3]}
    changed = counted(open_priced("same", artifact, priced_model.sessions, price, {}, same))
    np.testing.assert_allclose(changed.logits, own.logits, atol=1e-5)
    assert changed.ffn_share == own.ffn_share


def test_budgets_are_described(priced_model: Model) -> None:
    assert opened(priced_model, Request()).budget == {"sparsity": 0.5}  # the budget that it was built with
    assert opened(priced_model, Request(max_kl=0.02)).budget == {"max_kl": 0.02}
    assert opened(priced_model, Request("priced", price=1e-7)).budget == {"price": 1e-7}
    dense = opened(priced_model, Request("dense"))
    assert (dense.method, dense.budget) == ("dense", {})
    setting = opened(priced_model, Request())
    assert setting.without_refresh() is setting
    assert setting.per_token


@pytest.mark.parametrize("method", [name for name, layouts in METHODS.items() if "priced" not in layouts])
def test_methods_of_masks(priced_model: Model, method: str) -> None:
    words = rf"has the layout priced, which runs priced.* and not {method}\. Build an artifact .* --method tda'\.$"
    with pytest.raises(UsageError, match=words):
        check_request(priced_model.artifact, Request(method, sparsity=0.5))


@pytest.mark.parametrize("method", [name for name, layouts in METHODS.items() if "indexed" not in layouts])
def test_methods_of_prices(model: Model, method: str) -> None:
    words = rf"has the layout indexed, which runs tda.* and not {method}\. Build an artifact .* --method priced'\.$"
    with pytest.raises(UsageError, match=words):
        check_request(model.artifact, Request(method))
