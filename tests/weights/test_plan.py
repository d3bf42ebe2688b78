"""Formats by name: defaults, rules, and refusals."""

from __future__ import annotations

from typing import Any

import pytest

from tda_export.errors import UsageError
from tda_export.weights.formats import INTEGER_FORMATS
from tda_export.weights.plan import FormatPlan, plan_formats, read_format, read_rules

PARTS = ("q", "k", "v", "o", "gate", "up", "down")


def plan(weights: str = "int4", rules: str = "", **options: Any) -> FormatPlan:
    options = {"tied_head": False, **options}
    return plan_formats(2, PARTS, weights=weights, rules=read_rules([rules]) if rules else [], **options)


def names(found: FormatPlan) -> dict[str, str]:
    return found.to_dict()


def test_layers_are_what_was_asked_for_and_the_rest_is_int8() -> None:
    found = plan()
    assert {found.to_dict()[f"layers.{layer}.{part}"] for layer in (0, 1) for part in PARTS} == {"int4_g32"}
    assert found.to_dict()["embedding"] == found.to_dict()["head"] == "int8_g32"
    assert found.of("layers.1.down") == INTEGER_FORMATS["int4_g32"]
    assert len(found.integers) == 16


def test_groups() -> None:
    found = plan(group=128, rules="")
    assert (found.to_dict()["layers.0.q"], found.to_dict()["head"]) == ("int4_g128", "int8_g128")


def test_floats() -> None:
    assert set(plan("float").to_dict().values()) == {"float"}
    assert plan("float").of("head") is None
    assert not plan("float").integers


def test_the_last_rule_that_matches_wins() -> None:
    found = plan(rules="layers.*.v=int8, layers.1.*=float,head=int4_g64").to_dict()
    assert (found["layers.0.v"], found["layers.1.v"], found["layers.0.q"]) == ("int8_g32", "float", "int4_g32")
    assert (found["head"], found["embedding"]) == ("int4_g64", "int8_g32")


@pytest.mark.parametrize("rule", ["head=int4", "embedding=int4", "[eh]*=int4"])
def test_a_tied_head_is_the_embedding(rule: str) -> None:
    found = plan(rules=rule, tied_head=True)
    assert "head" not in found.formats
    assert found.of("head") == found.of("embedding") == INTEGER_FORMATS["int4_g32"]


def test_a_matrix_that_is_not_there() -> None:
    with pytest.raises(KeyError):
        plan().of("layers.2.q")


def test_plain_data() -> None:
    found = plan(rules="layers.0.q=float", tied_head=True)
    assert FormatPlan.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"head": "int3_g32"}, "the format of head is int3_g32, which is not known"),
        ({"head": ["int4"]}, "the format of head is"),
        ([], "formats are"),
    ],
)
def test_unknown_formats(content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FormatPlan.from_dict(content)


@pytest.mark.parametrize("rule", ["layers.*.x=int8", "layers.2.q=int8", "Head=int4"])
def test_a_rule_must_match(rule: str) -> None:
    message = (
        r"matches no matrix\. They are layers\.0\.q to layers\.1\.down \(q, k, v, o, gate, up, down in each layer\), "
        r"embedding and head\.$"
    )
    with pytest.raises(UsageError, match=message):
        plan(rules=rule)


@pytest.mark.parametrize("text", ["", "head", "head=", "=int4", "head=int4,"])
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--weights-for: '.*' is not PATTERN=FORMAT\. Give rules such as 'layers"):
        read_rules([text])


def test_what_is_no_format() -> None:
    with pytest.raises(
        UsageError, match=r"^--weights-for: int3 is not a format\. Give int4, int8 or float, with a group"
    ):
        read_rules(["head=int3"])
    with pytest.raises(UsageError, match=r"^A group of 48 is not known\. Give 32, 64, 128\.$"):
        read_format("int4", 48)
