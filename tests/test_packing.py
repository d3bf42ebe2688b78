"""The bytes of rows by their formats, and which matrices may be packed side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from tda_export.errors import UsageError
from tda_export.models.source import resolve_model
from tda_export.models.spec import DecoderSpec
from tda_export.packing import (
    HeadRows,
    RowBytes,
    can_read_head,
    chosen_head,
    linear_outputs,
    linear_parts,
    row_bytes_of,
)
from tda_export.weights.matrix import Major
from tda_export.weights.plan import plan_formats, read_rules
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def spec(tiny_model: Path) -> DecoderSpec:
    """Hidden size 64, 96 neurons, queries of 64 outputs, keys and values of 32."""
    return resolve_model(str(tiny_model)).spec


def rows(spec: DecoderSpec, rules: str = "", *, weights: str = "int4", group: int = 32, size: int = 4) -> RowBytes:
    parts, given = linear_parts(spec), read_rules([rules] if rules else [])
    plan = plan_formats(spec.num_layers, parts, tied_head=False, weights=weights, group=group, rules=given)
    return row_bytes_of(spec, size, plan)


def test_a_plain_label_is_of_every_linear(spec: DecoderSpec) -> None:
    assert rows(spec).label == "int4_g32"
    assert rows(spec, "head=float,embedding=int4").label == "int4_g32"
    assert rows(spec, weights="float").label == RowBytes(4).label == row_bytes_of(spec, 4, None).label == "float"
    assert rows(spec, "*=float,head=int4").label == "float"


@pytest.mark.parametrize(
    ("rules", "weights", "label"),
    [
        ("", "float", "float"),
        ("", "int4", "int4_g32+int8_g32"),
        ("head=int4", "int4", "int4_g32"),
        ("head=float", "int4", "int4_g32+float"),
        ("head=int8", "float", "float+int8_g32"),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_label_tells_of_a_head_with_prices(
    spec: DecoderSpec, rules: str, weights: str, label: str, tied: bool
) -> None:
    parts, given = linear_parts(spec), read_rules([rules] if rules else [])
    plan = plan_formats(spec.num_layers, parts, tied_head=tied, weights=weights, rules=given)
    found = row_bytes_of(spec, 4, plan, head=True)
    assert found.label == label
    format = plan.of("head")
    of_row = 4 * spec.vocab_size if format is None else format.row_bytes(spec.vocab_size)
    assert found.of(0, ("head",), linear_outputs(spec)) == of_row


@pytest.mark.parametrize(
    ("weights", "rules", "safe"),
    [("float", "", True), ("int4", "", True), ("int4", "head=int4", False), ("int8", "embedding=int4", True)],
)
@pytest.mark.parametrize("major", ["input", "output"])
def test_how_a_head_can_be_read(spec: DecoderSpec, weights: str, rules: str, safe: bool, major: Major) -> None:
    """Codes that lie the other way are rounded again; four bits would lose too much."""
    given, parts = read_rules([rules] if rules else []), linear_parts(spec)
    plan = plan_formats(spec.num_layers, parts, tied_head=False, weights=weights, rules=given, head_major=major)
    own: HeadRows = "priced" if major == "input" else "whole"
    other: HeadRows = "whole" if major == "input" else "priced"
    assert can_read_head(own, plan)
    assert can_read_head(other, plan) is safe
    assert chosen_head(None, plan, "M") == ("priced" if safe else own)
    assert chosen_head(own, plan, "M") == own
    if safe:
        assert chosen_head(other, plan, "M") == other
        return
    lies = "input" if major == "input" else "output"
    message = rf"^--head {other}: M has its head in four bits by {lies}, .* or quantise with --head {other}\.$"
    with pytest.raises(UsageError, match=message):
        chosen_head(other, plan, "M")


def test_heads_of_floats_can_be_read_either_way() -> None:
    assert can_read_head("priced", None)
    assert can_read_head("whole", None)


@pytest.mark.parametrize(
    "rules", ["layers.0.*=float", "*.gate=float", "layers.1.k=float", "*.v=int8", "layers.2.up=int4_g64"]
)
def test_other_labels_tell_formats_apart(spec: DecoderSpec, rules: str) -> None:
    label = rows(spec, rules).label
    assert label.startswith("mixed-")
    assert label == rows(spec, rules, size=2).label
    assert label != rows(spec, "layers.2.down=float").label


def test_a_label_of_a_model_without_gates(tmp_path: Path) -> None:
    spec = resolve_model(str(save_tiny_model("gpt2", tmp_path / "model"))).spec
    assert rows(spec).label == "int4_g32"
    assert rows(spec, "layers.0.up=float").label.startswith("mixed-")


def test_whether_there_are_floats(spec: DecoderSpec) -> None:
    assert RowBytes(4).has_floats
    assert rows(spec, "layers.0.q=float").has_floats
    assert not rows(spec).has_floats


@pytest.mark.parametrize(
    ("rules", "group", "suits"),
    [
        ("", 32, True),
        ("", 64, False),  # a row of keys is half a group
        ("*.q=int4_g32,*.k=int4_g32,*.v=int4_g32", 64, False),  # a row of the gate is one and a half groups
        ("*.q=int4_g32,*.k=int4_g32,*.v=int4_g32,*.gate=int4_g32,*.up=int4_g32", 128, True),
        ("*.q=float,*.k=float,*.v=float,*.gate=int4_g32,*.up=int4_g32", 128, True),
        ("*.v=int8", 32, False),
        ("layers.1.up=float", 32, False),
    ],
)
def test_what_may_lie_side_by_side(spec: DecoderSpec, rules: str, group: int, suits: bool) -> None:
    found = rows(spec, rules, group=group)
    assert found.suits(spec, "sites") == suits
    assert found.suits(spec, "separate")
