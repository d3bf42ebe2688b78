"""Budgets of requests: one server answers at several qualities."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tda_export.runtime import Model, load
from tests.runtime.conftest import edit_manifest
from tests.serve.conftest import CONTEXT, NAME, Served, serving
from tests.serve.test_errors import CHAT, COMPLETIONS, HELLO, assert_error, post
from tests.serve.test_metrics import samples

PROMPT = "The sea is calm tonight"
ASK: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "temperature": 0, "max_tokens": 16}
READ, DENSE = "tda_export_skippable_read_bytes_total", "tda_export_skippable_dense_bytes_total"


def budgets(model: Model) -> list[dict[str, float]]:
    """Return several of each kind, including dense and the largest."""
    table = model.artifact.price_table
    assert table is not None
    return [
        {"price": 0.0},
        {"price": table.most_price},
        {"price": table.rows[4].price},
        {"sparsity": 0.3},
        {"sparsity": table.most_sparsity},
        {"max_kl": table.most_kl},
        {"max_kl": table.most_kl / 20},
    ]


def expected(model: Model, **options: Any) -> Any:
    generation = model.generate(PROMPT, max_new_tokens=16, context=CONTEXT, **options)
    list(generation)
    return generation


def test_answers_are_those_of_generate(priced_served: Served) -> None:
    """One after another, so that each reuses the prompt before it, and at the end with the server's own budget."""
    model, texts = priced_served.model, set()
    for budget in budgets(model):
        ours = expected(model, deployment=model.at(**budget, prompt_tokens=len(model.tokenize(PROMPT))))
        answer = post(priced_served, COMPLETIONS, ASK | budget).json()["choices"][0]["text"]
        assert answer == ours.text
        texts.add(answer)
        assert post(priced_served, COMPLETIONS, ASK).json()["choices"][0]["text"] == expected(model).text
    assert len(texts) > 1
    assert expected(model, deployment=model.at(price=0)).text == expected(model, mask="dense").text


def test_streams(priced_served: Served) -> None:
    model = priced_served.model
    for budget in ({"sparsity": 0.3}, {"price": 0.0}):
        chunks = priced_served.client().completions.create(stream=True, extra_body=budget, **ASK)
        text = "".join(chunk.choices[0].text for chunk in chunks)
        assert text == expected(model, deployment=model.at(**budget)).text


def test_the_budget_of_a_request_goes_before_the_server_s(priced_model: Model) -> None:
    with serving(priced_model, mask="dense") as served:
        for budget in ({}, {"sparsity": 0.5}, {}):
            ours = expected(priced_model, deployment=priced_model.at(**budget or {"price": 0.0}))
            assert post(served, COMPLETIONS, ASK | budget).json()["choices"][0]["text"] == ours.text


def test_bytes_are_those_of_all_linears_at_the_price(priced_model: Model) -> None:
    with serving(priced_model) as served:
        read = dense = 0.0
        for budget in ({"sparsity": 0.5}, {"price": 0.0}, {"sparsity": 0.3}):
            metrics = expected(priced_model, deployment=priced_model.at(**budget)).metrics
            post(served, COMPLETIONS, ASK | budget)
            read += metrics.decode_steps * metrics.bytes_per_token
            dense += metrics.decode_steps * priced_model.artifact.linear_bytes
            found = samples(served)
            assert (found[READ], found[DENSE]) == (read, dense)
            assert found["tda_export_skippable_bytes_share"] == pytest.approx(1 - metrics.sparsity)
        assert 0.4 < 1 - metrics.sparsity < 0.8


@pytest.mark.parametrize(
    ("change", "param", "text"),
    [
        ({"price": 1.0, "sparsity": 0.5}, "sparsity", "'price' and 'sparsity' are two budgets. Give only one."),
        ({"max_kl": 1, "price": 0}, "max_kl", "'price' and 'max_kl' are two budgets. Give only one."),
        ({"max_kl": 1, "price": 0, "sparsity": 0}, "sparsity", "two budgets. Give only one."),
        ({"price": -1}, "price", "greater than or equal to 0"),
        ({"price": "much"}, "price", "valid number"),
        ({"sparsity": 1}, "sparsity", "less than 1"),
        ({"sparsity": -0.1}, "sparsity", "greater than or equal to 0"),
        ({"sparsity": 0.999}, "sparsity", "Sparsity 0.999 is more than was measured with prices"),
        ({"max_kl": 0}, "max_kl", "greater than 0"),
        ({"max_kl": 1e6}, "max_kl", "KL 1000000.0 is more than was measured with prices"),
        ({"price": 1e30}, "price", "Price 1e+30 is beyond what was measured"),
    ],
    ids=str,
)
def test_budgets_that_cannot_be(priced_served: Served, change: dict[str, Any], param: str, text: str) -> None:
    for path, request in ((COMPLETIONS, ASK), (CHAT, {"model": NAME, "messages": HELLO})):
        answer = post(priced_served, path, request | change)
        assert_error(answer, 400, text, param=param, code="invalid_value")


def test_null_is_no_budget(priced_served: Served) -> None:
    nothing = {"price": None, "sparsity": None, "max_kl": None}
    assert post(priced_served, COMPLETIONS, ASK | nothing).status_code == 200
    assert post(priced_served, COMPLETIONS, ASK | nothing | {"max_kl": 0.001}).status_code == 200


@pytest.mark.parametrize("budget", [{"price": 0.0}, {"sparsity": 0.5}, {"max_kl": 0.1}], ids=str)
def test_artifacts_of_masks_have_no_price(served: Served, budget: dict[str, float]) -> None:
    (name,) = budget
    text = f"'{name}': this server's artifact has masks and no prices"
    assert_error(post(served, COMPLETIONS, ASK | budget), 400, text, param=name, code="unsupported_parameter")


def test_an_artifact_without_a_table_takes_a_price_alone(priced_artifact: Path, tmp_path: Path) -> None:
    copy = copied(priced_artifact, tmp_path / "artifact")
    edit_manifest(copy, lambda manifest: manifest.update(price_table=None))
    model = load(copy, provider="cpu")
    with serving(model) as served:
        answer = post(served, COMPLETIONS, ASK | {"sparsity": 0.5})
        text = "'sparsity': this server's artifact was built without a table of prices. Give 'price'"
        assert_error(answer, 400, text, param="sparsity", code="unsupported_parameter")
        ours = expected(model, deployment=model.at(price=1e30))
        assert post(served, COMPLETIONS, ASK | {"price": 1e30}).json()["choices"][0]["text"] == ours.text


def copied(artifact: Path, folder: Path) -> Path:
    return Path(shutil.copytree(artifact, folder))
