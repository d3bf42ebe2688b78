"""`tda-export eval --tasks`: tasks of lm-evaluation-harness, from a local folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tda_export.evaluation.methods import Request

DATA_VARIABLE = "TDA_EXPORT_EVAL_DATA"  # as in evaluation/tasks/offline.py


def evaluate_tasks(
    artifact: Path,
    request: Request,
    *,
    tasks: str,
    limit: int | None,
    protocol: str,
    data: Path | None,
    reference: str | None,
    provider: str,
    as_json: bool,
) -> None:
    """Run the tasks and print their results. The arguments are the options of `eval`."""
    from tda_export.errors import UsageError

    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--tasks needs lm-evaluation-harness. Install 'tda-export[eval]'.")
    if data is None:
        raise UsageError(
            f"--tasks needs --data FOLDER (or {DATA_VARIABLE}), which 'tda-export eval-data FOLDER' writes."
        )
    from tda_export.evaluation.harness import TdaLM
    from tda_export.evaluation.run_tasks import check_data, chosen_tasks, reference_model, run_tasks
    from tda_export.models.source import resolve_model

    names = chosen_tasks([name.strip() for name in tasks.split(",") if name.strip()])
    check_data(data, names)
    lm = TdaLM.of(artifact, request, protocol=protocol, provider=provider)
    result: dict[str, Any] = {
        "model": lm.artifact.manifest["model"]["name"],
        "dtype": lm.artifact.shape.dtype,
        "provider": lm.scorer.setting.sessions.provider,
        "method": lm.scorer.setting.method,
        "budget": lm.scorer.setting.budget,
        "protocol": protocol,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "limit": limit,
        "tasks": _plain(run_tasks(lm, names, data, limit, notify=_say)),
    }
    if reference is not None:
        source = resolve_model(reference, notify=_say)
        device = _device(result["provider"])
        dtype = result["dtype"] if device == "cuda" else "float32"
        model = reference_model(source, dtype=dtype, device=device)
        result["reference"] = {
            "model": source.name,
            "dtype": dtype,
            "device": device,
            "tasks": _plain(run_tasks(model, names, data, limit, notify=_say)),
        }
    click.echo(json.dumps(result) if as_json else _summary(result))


def _say(line: str) -> None:
    click.echo(line, err=True)


def _device(provider: str) -> str:
    """Return the device for transformers: the artifact's, if this PyTorch supports it."""
    import torch

    return "cuda" if provider == "cuda" and torch.cuda.is_available() else "cpu"


def _plain(results: dict[str, Any]) -> dict[str, Any]:
    return {task: asdict(result) for task, result in results.items()}


def _summary(result: dict[str, Any]) -> str:
    budget = ", ".join(f"{name} {value}" for name, value in result["budget"].items())
    lines = [
        f"{result['model']}, {result['method']}{f' ({budget})' if budget else ''}, {result['protocol']} protocol",
        *_lines(result["tasks"]),
    ]
    if "reference" in result:
        lines += [f"{result['reference']['model']} in transformers", *_lines(result["reference"]["tasks"])]
    return "\n".join(lines)


def _lines(tasks: dict[str, Any]) -> list[str]:
    return [
        f"{task if index == 0 else '':15} {name:16} {metric['value']:9.4f}"
        + ("" if metric["stderr"] is None else f" ± {metric['stderr']:.4f}")
        + (f"   {found['questions']} questions" if index == 0 else "")
        for task, found in tasks.items()
        for index, (name, metric) in enumerate(found["metrics"].items())
    ]
