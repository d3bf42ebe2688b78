"""Commands on artifacts of priced rows: budgets, output, and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from tda_export.calibration.file import DIGEST_KEY, METADATA_KEY
from tda_export.graph import contract
from tda_export.pricing import PriceTable
from tda_export.runtime import load
from tests.cli.conftest import FAILURE, USAGE, assert_error
from tests.cli.results import PROMPT, generated, result_of
from tests.conftest import PRICE_TINY, build_tda, run_cli, run_ok
from tests.runtime.conftest import edit_manifest

LINEARS = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)  # elements: layers times those of q, o, k, v and the FFN
CHECK_NAMES = [
    "files match their hashes",
    "prefill.onnx passes onnx.checker",
    "decode.onnx passes onnx.checker",
    "decode_explicit.onnx passes onnx.checker",
    "manifest is that of the graphs",
    "prefill logits",
    "keys and values after chunked prefill",
    "decode at price 0",
    "decode at a price",
    "rows read at a price",
    "decode token by token",
]
SMALL = ("--prompts", 2, "--prompt-tokens", 24, "--continuation-tokens", 8)


@pytest.fixture(scope="module")
def table(priced_artifact: Path) -> PriceTable:
    table = load(priced_artifact, provider="cpu").artifact.price_table
    assert table is not None
    return table


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The sea was calm, and nobody had come down to the harbour since the morning. " * 3)
    return path


# Build


def test_build(tiny_model: Path, priced_calibration: Path, tmp_path: Path) -> None:
    output = tmp_path / "a"
    result = result_of("build", tiny_model, "--calibration", priced_calibration, "-o", output)
    assert result["budget"] == {"sparsity": 0.5}  # the calibration's own
    assert result["expected"]["sparsity"] == pytest.approx(0.5)
    assert 0 < result["expected"]["kl"] < 1
    assert [check["name"] for check in result["checks"]] == CHECK_NAMES
    assert all(check["passed"] for check in result["checks"])
    manifest = json.loads((output / contract.MANIFEST_FILE).read_text())
    assert (manifest["layout"], manifest["method"], manifest["packing"]) == ("priced", {"name": "priced"}, "separate")
    assert PriceTable.from_dict(manifest["price_table"]).predicted(manifest["price"]).share == pytest.approx(0.5)


def test_build_says_what_to_expect(tiny_model: Path, priced_calibration: Path, tmp_path: Path) -> None:
    options = ("--calibration", priced_calibration, "--no-verify", "-o", tmp_path / "a", "--max-kl", 0.05)
    printed = run_ok("build", tiny_model, *options).stdout
    assert f"{tiny_model}, max_kl 0.05: expected sparsity 0." in printed
    assert " of the layers' linears, predicted KL 0.050 nats a token\n" in printed


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        (["--sparsity", 0.3], {"sparsity": 0.3}),
        (["--price", 1e-7], {"price": 1e-7}),
        (["--price", 0], {"price": 0.0}),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_budgets_of_build_and_generate_are_alike(
    options: list[object],
    budget: dict[str, float],
    tiny_model: Path,
    priced_calibration: Path,
    priced_artifact: Path,
    tmp_path: Path,
) -> None:
    arguments = ("--calibration", priced_calibration, *options, "--no-verify", "-o", tmp_path / "a")
    result = result_of("build", tiny_model, *arguments)
    assert result["budget"] == budget
    built, chosen = generated(tmp_path / "a"), generated(priced_artifact, *options)
    assert built["tokens"] == chosen["tokens"]
    assert built["metrics"]["sparsity"] == pytest.approx(chosen["metrics"]["sparsity"], abs=1e-9)
    assert built["metrics"]["sparsity"] == pytest.approx(result["expected"]["sparsity"])


def test_build_by_max_kl_knows_no_prompt(
    tiny_model: Path, priced_calibration: Path, table: PriceTable, tmp_path: Path
) -> None:
    """build uses the table of calibration's own prompts."""
    options = ("--calibration", priced_calibration, "--max-kl", 0.02, "--no-verify", "-o", tmp_path / "a")
    assert result_of("build", tiny_model, *options)["budget"] == {"max_kl": 0.02}
    price = json.loads((tmp_path / "a" / contract.MANIFEST_FILE).read_text())["price"]
    assert price == pytest.approx(table.price_for(max_kl=0.02))


def test_dense_prices_are_written_as_0(tiny_model: Path, priced_calibration: Path, tmp_path: Path) -> None:
    options = ("--calibration", priced_calibration, "--price", -1, "--no-verify", "-o", tmp_path / "a")
    run_ok("build", tiny_model, *options)
    assert json.loads((tmp_path / "a" / contract.MANIFEST_FILE).read_text())["price"] == 0.0
    assert generated(tmp_path / "a")["metrics"]["sparsity"] == 0.0


@pytest.mark.parametrize("command", [("generate", PROMPT), ("chat",)], ids=["generate", "chat"])
def test_prices_beyond_the_table_are_refused(command: tuple[str, ...], priced_artifact: Path) -> None:
    """Their bytes are not known."""
    name, *rest = command
    result = run_cli(name, priced_artifact, *rest, "--price", 1e9)
    assert_error(result, USAGE, "Price 1e+09 is beyond what was measured: up to ")


def test_packing_and_dtype(tiny_model: Path, priced_calibration: Path, tmp_path: Path) -> None:
    """Rows of half the size have twice the price, and are packed by site unless an option says otherwise."""
    prices = {}
    for name, options in {
        "fp32": [],
        "sites": ["--packing", "sites"],
        "fp16": ["--dtype", "fp16"],
        "apart": ["--dtype", "fp16", "--packing", "separate"],
    }.items():
        arguments = ("--calibration", priced_calibration, *options, "--no-verify", "-o", tmp_path / name)
        run_ok("build", tiny_model, *arguments)
        manifest = json.loads((tmp_path / name / contract.MANIFEST_FILE).read_text())
        prices[name] = manifest["price"]
        assert manifest["packing"] == ("sites" if name in ("sites", "fp16") else "separate")
        qkv = contract.linear_weight(0, "qkv")
        assert (qkv in manifest["matrices"]) == (manifest["packing"] == "sites")
    assert prices["fp16"] == pytest.approx(2 * prices["sites"])
    assert prices["apart"] == pytest.approx(2 * prices["fp32"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cett", 0.2], "--cett has no effect with --method priced. Leave it out, or build with --method tda."),
        (
            ["--sparsity", 0.5, "--allocation", "kl"],
            "--allocation has no effect with --method priced. Leave it out, or",
        ),
        (["--refresh", 0], "--refresh has no effect with --method priced. Leave it out, or build with --method tda."),
        (["--tail", "mean"], "--tail has no effect with --method priced. Leave it out, or build with --method tda."),
        (["--price", 0.1, "--sparsity", 0.5], "Give exactly one budget: --price, --sparsity or --max-kl."),
        (["--sparsity", 0.95], "Sparsity 0.95 is more than was measured with prices"),
        (["--max-kl", 100], "KL 100.0 is more than was measured with prices"),
        (["--price", "nan"], "Price nan is beyond what was measured"),
        (["--price", "inf"], "Price inf is beyond what was measured"),
        (
            ["--method", "tda"],
            "contains no CETT curves. Calibrate again with 'tda-export calibrate --method tda', or",
        ),
        (["--method", "tda", "--price", 0.1], "--price has no effect with --method tda. Leave it out, or build with"),
        (
            ["--method", "tda", "--packing", "sites"],
            "--packing has no effect with --method tda. Leave it out",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_build_refuses(
    options: list[object], words: str, tiny_model: Path, priced_calibration: Path, outputs: Path
) -> None:
    result = run_cli("build", tiny_model, "--calibration", priced_calibration, *options, "-o", outputs / "x")
    assert_error(result, USAGE, words)


@pytest.mark.parametrize("option", [["--price", "0.1"], ["--packing", "sites"]], ids=" ".join)
def test_griffin_takes_no_price(outputs: Path, tiny_model: Path, option: list[str]) -> None:
    result = run_cli("build", tiny_model, "--method", "griffin", "--sparsity", "0.5", *option, "-o", outputs / "x")
    assert_error(result, USAGE, "--method griffin takes --sparsity, and neither")


def test_calibration_of_masks_has_no_prices(tiny_model: Path, tiny_calibration: Path, outputs: Path) -> None:
    result = run_cli("build", tiny_model, "--calibration", tiny_calibration, "-o", outputs / "x")
    assert_error(
        result, USAGE, "contains no prices. Calibrate again with 'tda-export calibrate --method priced', or build"
    )


def test_calibration_of_another_packing(tiny_model: Path, outputs: Path, tmp_path: Path) -> None:
    run_ok("calibrate", tiny_model, "-o", tmp_path / "c", "--sparsity", 0.5, *PRICE_TINY, "--packing", "sites")
    arguments = ("build", tiny_model, "--calibration", tmp_path / "c", "-o")
    words = (
        "no table of prices for --packing separate. Calibrate again without --packing, or build with --packing sites."
    )
    assert_error(run_cli(*arguments, outputs / "x"), USAGE, words)
    run_ok(*arguments, tmp_path / "a", "--packing", "sites", "--no-verify")


def test_verify(priced_artifact: Path) -> None:
    result = result_of("verify", priced_artifact)
    assert [check["name"] for check in result["checks"]] == CHECK_NAMES


# Generate and chat


def test_generate(priced_artifact: Path) -> None:
    result = run_ok("generate", priced_artifact, PROMPT, "--max-new-tokens", 24)
    expected = load(priced_artifact).generate(PROMPT, max_new_tokens=24)
    list(expected)
    assert result.stdout == expected.text + "\n"
    assert ", priced on cpu, linear sparsity 0.500\n" in result.stderr
    assert "MiB of linear weights a token" in result.stderr


def test_generate_json(priced_artifact: Path, table: PriceTable) -> None:
    sparser = generated(priced_artifact, "--price", table.price_for(sparsity=0.6))
    metrics = sparser["metrics"]
    assert (metrics["mask"], metrics["matrices"], metrics["refreshes"]) == ("priced", "linears", 0)
    assert metrics["sparsity"] == pytest.approx(0.6)
    assert metrics["dense_bytes_per_token"] == 4 * LINEARS
    assert metrics["bytes_per_token"] == pytest.approx(0.4 * 4 * LINEARS, abs=1)
    assert sparser == {**generated(priced_artifact, "--sparsity", 0.6), "metrics": metrics}
    assert sparser["tokens"] != generated(priced_artifact)["tokens"]


def test_generate_by_max_kl(priced_artifact: Path, table: PriceTable) -> None:
    strict, loose = (generated(priced_artifact, "--max-kl", kl)["metrics"]["sparsity"] for kl in (0.01, 0.1))
    assert 0 < strict < loose < 1
    metrics = generated(priced_artifact, "--max-kl", 0.1)["metrics"]
    here = table.after(metrics["prompt_tokens"])
    assert here != table  # this prompt is shorter than those of calibration
    assert here.predicted(here.price_for(sparsity=metrics["sparsity"])).kl == pytest.approx(0.1)


def test_a_kl_that_short_prompts_alone_reach(priced_artifact: Path, table: PriceTable) -> None:
    """The table of the prompt's own length counts, also for the largest KL."""
    long, here = table.rows[-1].kl, table.after(1).rows[-1].kl
    assert long < here
    asked = ("generate", priced_artifact, "S", "--max-new-tokens", 2, "--max-kl")
    assert 0 < result_of(*asked, (long + here) / 2)["metrics"]["sparsity"] < table.rows[-1].sparsity
    for prompt, kl in (("S", 1.01 * here), (PROMPT * 9, (long + here) / 2)):
        result = run_cli("generate", priced_artifact, prompt, "--max-kl", kl)
        assert_error(result, USAGE, "is more than was measured with prices")


@pytest.mark.parametrize("options", [["--price", 0], ["--sparsity", 0]], ids=str)
def test_dense(priced_artifact: Path, options: list[object]) -> None:
    dense = generated(priced_artifact, "--mask", "dense")
    assert (dense["metrics"]["mask"], dense["metrics"]["sparsity"]) == ("dense", 0.0)
    free = generated(priced_artifact, *options)
    assert free["tokens"] == dense["tokens"] != generated(priced_artifact)["tokens"]
    assert (free["metrics"]["mask"], free["metrics"]["sparsity"]) == ("priced", 0.0)


REFUSED = [
    (["--refresh", 8], "--refresh needs an artifact with masks, and "),
    (["--cett", 0.2], "--cett needs an artifact with masks, and "),
    (["--sparsity", 0.5, "--allocation", "uniform"], "--allocation needs an artifact with masks, and "),
    (["--price", "nan"], "A price of nan: give a finite number, 0 for dense."),
    (["--price", "-1"], "A price of -1 is negative. Give 0 for dense, or more."),
    (["--price", 1, "--max-kl", 0.1], "Give exactly one budget: --price, --sparsity or --max-kl."),
    (["--sparsity", 0.95], "Sparsity 0.95 is more than was measured with prices"),
]


@pytest.mark.parametrize("command", [("generate", PROMPT), ("chat",)], ids=lambda words: words[0])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        *REFUSED,
        (
            ["--mask", "tda"],
            "has prices and no masks. Leave it out, or build an artifact with",
        ),
        (
            ["--mask", "dense", "--price", 1],
            "--mask dense reads every row, so a budget has no effect. Leave one",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_generate_and_chat_refuse(
    priced_artifact: Path, command: tuple[str, ...], options: list[object], words: str
) -> None:
    name, *more = command
    assert_error(run_cli(name, priced_artifact, *more, *options, input=""), USAGE, words)


@pytest.mark.parametrize("command", [("generate", PROMPT), ("chat",)], ids=lambda words: words[0])
def test_price_of_masks(tiny_artifact: Path, command: tuple[str, ...]) -> None:
    name, *more = command
    result = run_cli(name, tiny_artifact, *more, "--price", 0.1, input="")
    assert_error(result, USAGE, "--price: ", "has masks and no prices. Build one with 'tda-export")


def test_chat(priced_artifact: Path) -> None:
    options = ("--max-new-tokens", 12)
    result = run_cli("chat", priced_artifact, *options, "--sparsity", 0.3, input="Hello\nAnd then?\n")
    assert result.exit_code == 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("[")]
    assert len(lines) == 2
    assert all(line.startswith("[70% of linear bytes read (as calibrated), ") for line in lines)
    dense = run_cli("chat", priced_artifact, *options, "--price", 0, input="Hello\n")
    assert dense.stderr.startswith("[100% of linear bytes read, ")
    assert dense.stdout == run_cli("chat", priced_artifact, *options, "--mask", "dense", input="Hello\n").stdout


# Eval


def test_eval(priced_artifact: Path, text: Path) -> None:
    own = result_of("eval", priced_artifact, "--text", text, *SMALL)
    assert (own["method"], own["budget"]) == ("priced", {"sparsity": 0.5})
    assert own["kl"] > 0
    assert own["ffn_bytes"] < own["dense_ffn_bytes"] == 4 * 3 * 3 * 64 * 96
    other = result_of("eval", priced_artifact, "--text", text, *SMALL, "--max-kl", 0.01)
    assert other["budget"] == {"max_kl": 0.01}
    assert own["ffn_bytes"] < other["ffn_bytes"]
    assert other["kl"] < own["kl"]
    dense = result_of("eval", priced_artifact, "--text", text, *SMALL, "--method", "dense")
    assert dense["kl"] == pytest.approx(0.0, abs=1e-6)
    assert dense["ffn_bytes"] == dense["dense_ffn_bytes"]


@pytest.mark.parametrize("method", ["tda", "paper", "griffin", "tt"])
def test_eval_of_masks_on_prices(priced_artifact: Path, text: Path, method: str) -> None:
    result = run_cli("eval", priced_artifact, "--text", text, "--method", method, "--sparsity", 0.5)
    way_out = "Build an artifact for it with 'tda-export build MODEL --method tda'."
    assert_error(result, USAGE, "has the layout priced, which runs priced", f"and not {method}.", way_out)


def test_eval_of_prices_on_masks(tiny_artifact: Path, text: Path) -> None:
    result = run_cli("eval", tiny_artifact, "--text", text, "--method", "priced")
    way_out = "Build an artifact for it with 'tda-export build MODEL --method priced'."
    assert_error(result, USAGE, "has the layout indexed, which runs ", "and not priced.", way_out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *REFUSED,
        (
            ["--calibration", "x"],
            "--calibration: an artifact with prices contains its own table. Build it again with another",
        ),
        (["--method", "dense", "--price", 1], "--method dense reads every neuron, so a budget has no effect."),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_eval_refuses(priced_artifact: Path, text: Path, options: list[object], words: str) -> None:
    assert_error(run_cli("eval", priced_artifact, "--text", text, *options), USAGE, words)


@pytest.mark.parametrize("method", [None, "paper", "griffin", "tt"])
def test_eval_by_price_on_masks(tiny_artifact: Path, text: Path, method: str | None) -> None:
    named = [] if method is None else ["--method", method]
    result = run_cli("eval", tiny_artifact, "--text", text, *named, "--price", 0.1)
    assert_error(result, USAGE, "--price needs an artifact of --method priced.")


# Formats


@pytest.mark.parametrize("command", [("generate", PROMPT), ("inspect",), ("verify",)], ids=lambda words: words[0])
def test_artifact_of_the_format_before(tiny_artifact: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    """Every command gives one line."""
    folder = Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))

    def older(manifest: dict[str, object]) -> None:
        manifest["format_version"] = 3
        for name in ("layout", "matrices"):
            del manifest[name]

    edit_manifest(folder, older)
    name, *more = command
    words = "artifact format 3 is older than this tda-export's (4). Build the artifact again.\n"
    assert assert_error(run_cli(name, folder, *more), FAILURE, words).endswith(words)


def test_calibration_of_the_version_before_serves_masks(
    tiny_model: Path, tiny_calibration: Path, tiny_artifact: Path, outputs: Path, tmp_path: Path
) -> None:
    """And it is not taken for one of prices."""
    path = tmp_path / "calibration.safetensors"
    with safe_open(tiny_calibration, framework="pt") as file:
        content = json.loads(file.metadata()[METADATA_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    content["format_version"] = 3
    del content["settings"]["method"], content[DIGEST_KEY]
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(content)})
    run_ok(*build_tda(tiny_model, path), "--no-verify", "-o", tmp_path / "a")
    assert generated(tmp_path / "a")["tokens"] == generated(tiny_artifact)["tokens"]
    result = run_cli("build", tiny_model, "--calibration", path, "-o", outputs / "x")
    assert_error(result, USAGE, "contains no prices. Calibrate again with 'tda-export calibrate --method priced', or")
