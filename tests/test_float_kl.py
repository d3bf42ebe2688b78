"""The KL to the float model is the sum of the integers' and the prices'. Entries without the former are ignored."""

from __future__ import annotations

import pytest

from tda_export.float_kl import COLUMN, float_kl_cells, float_kl_columns, float_kl_text, integers_kl


def test_both_parts_and_their_sum() -> None:
    integers = integers_kl({"quantizer": {"name": "gptq"}, "loss": {"kl": 0.0241, "stderr": 0.001}})
    assert integers == 0.0241
    assert (float_kl_columns(integers), float_kl_cells(integers, 0.05)) == ([COLUMN], ["0.0741"])
    assert float_kl_text(integers, 0.05) == (
        "KL to the float model about 0.0741 nats a token: 0.0241 by the integers and 0.0500 by the rows that are left "
        "out"
    )


@pytest.mark.parametrize(
    "quantization",
    [
        None,
        {},
        {"loss": None},
        {"loss": {}},
        {"loss": {"kl": "much"}},
        {"loss": {"kl": float("nan")}},
        {"loss": {"kl": 10**400}},
        "int4",
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_was_not_measured_has_no_column(quantization: object) -> None:
    assert integers_kl(quantization) is None
    assert (float_kl_columns(None), float_kl_cells(None, 0.05)) == ([], [])
