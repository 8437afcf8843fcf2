"""What a run of the benchmark leaves: a JSON that further runs of other parts are merged into."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Results = dict[str, Any]

#: Shown name -> what the distribution may be called, and the module that may know its version.
VERSIONS = {
    "torch": (("torch",), "torch"),
    "triton": (("triton",), "triton"),
    "FlashInfer": (("flashinfer-python", "flashinfer_python"), "flashinfer"),
    "Quack": (("quack-kernels",), "quack"),
    "Liger": (("liger-kernel",), "liger_kernel"),
    "FLA": (("fla-core", "flash-linear-attention"), "fla"),
    "sgl_kernel": (("sglang-kernel", "sgl-kernel"), "sgl_kernel"),
    "SGLang": (("sglang",), "sglang"),
    "vLLM": (("vllm",), "vllm"),
    "norm_plugin": (("norm-plugin",), "norm_plugin"),
}


def output_of(*command: str) -> str:
    """What a command prints; "" where there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def version(distributions: Sequence[str], module: str) -> str:
    """The version of whatever is there; "" where nothing is."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(getattr(sys.modules.get(module), "__version__", ""))


def commit() -> str:
    """NORM_PLUGIN_COMMIT, or what git says of this checkout."""
    here = str(Path(__file__).parent)
    return os.environ.get("NORM_PLUGIN_COMMIT") or output_of("git", "-C", here, "rev-parse", "--short=12", "HEAD")


def machine() -> dict[str, Any]:
    """Where a run was made, and of what."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: version(*where) for name, where in VERSIONS.items()},
        "commit": commit(),
    }


def empty() -> Results:
    return {"runs": {}, "points": [], "host": [], "memory": [], "left_out": [], "not_measured": []}


def point_key(point: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(point[name] for name in ("part", "op", "rows", "width", "group", "heads"))


def merged(old: Results, new: Results) -> Results:
    """Both; where both have a point, a part or a call, the new one."""
    points = {point_key(point): point for point in (*old["points"], *new["points"])}
    again = {(point["part"], point["label"]) for point in new["points"]} | {(part, "") for part in new["runs"]}
    left = [entry for entry in old["left_out"] if (entry["part"], entry["where"]) not in again]
    measured = {(point["part"], point["label"]) for point in points.values()}
    waiting = {(entry["part"], entry["label"]): entry for entry in (*old["not_measured"], *new["not_measured"])}
    return {
        "runs": {**old["runs"], **new["runs"]},
        "points": list(points.values()),
        "host": new["host"] or old["host"],
        "memory": new["memory"] or old["memory"],
        "left_out": left + new["left_out"],
        "not_measured": [entry for key, entry in waiting.items() if key not in measured],
    }


def of_part(results: Results, part: str, op: str | None = None) -> list[dict[str, Any]]:
    """The points of a part, or of one op there."""
    return [point for point in results["points"] if point["part"] == part and op in (None, point["op"])]


def load(path: Path) -> Results:
    found: Results = json.loads(path.read_text())
    return found


def save(path: Path, results: Results) -> None:
    """Through another file: a run that is stopped while it writes loses nothing."""
    beside = path.with_suffix(path.suffix + ".new")
    beside.write_text(json.dumps(results, indent=1) + "\n")
    beside.replace(path)
