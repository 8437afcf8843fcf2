"""What `norm-plugin doctor` finds: versions, flags, the hooks of each installed engine, and every op's accuracy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from norm_plugin import settings
from norm_plugin.accuracy import table
from norm_plugin.engines import ENGINES
from norm_plugin.engines.versions import version_of
from norm_plugin.verify.served import plan, served
from norm_plugin.version import __version__

GROUPS = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}
FILTERS = {"vllm": "VLLM_PLUGINS", "sglang": "SGLANG_PLUGINS"}

#: A program that hooks an engine, imports the modules that the hooks wait for, and prints which hooks are live.
PROBE = """
import importlib, json, sys
from norm_plugin.engines import installed_hooks, on_import, {engine} as adapter
adapter.register()
failed = {{}}
for name in on_import.waiting():
    try:
        importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and (name + ".").startswith(error.name + "."):
            continue  # only another version of the engine has this module
        failed[name] = f"{{type(error).__name__}}: {{error}}".splitlines()[0]
hooks = installed_hooks.installed["{engine}"]
print(json.dumps([hooks.engine, hooks.version, hooks.live, hooks.missing, failed]))
"""


@dataclass
class Health:
    """What was found. `wrong` decides the exit code; `bypassed` is not wrong, but good to know."""

    versions: dict[str, str]
    flags: dict[str, str]
    engines: list[dict[str, Any]] = field(default_factory=list)
    bypassed: list[str] = field(default_factory=list)
    probe: list[dict[str, Any]] = field(default_factory=list)
    misspelt: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def well(self) -> bool:
        return not self.wrong


def examine(command: Sequence[str] = (), probe: bool = True) -> Health:
    """Check everything. `command` starts a server; it is read for what it switches off."""
    health = _of_flags()
    if health.wrong:
        return health
    for engine in ENGINES:
        if importlib.util.find_spec(engine) is not None:
            look_at(engine, health)
    health.bypassed += bypasses(command)
    if probe:
        judge(table.rows(_device()), health)
    return health


def before_start(engine: str | None, probe: bool = True) -> Health:
    """Check in seconds, before an engine starts, what can be known without importing it, and one op."""
    health = _of_flags()
    if health.wrong:
        return health
    if engine is not None and importlib.util.find_spec(engine) is not None:
        loads(engine, health)
    backend = settings.read(os.environ).backend
    if reason := why_not(backend, _device().type):
        health.wrong.append(f"NORM_PLUGIN={backend} cannot run: {reason}")
    elif probe:
        judge([next(iter(table.rows(_device())))], health)
    return health


def _of_flags() -> Health:
    """The versions and the flags, and whether a flag has a wrong value."""
    health = Health(versions(), settings.given(os.environ), misspelt=settings.misspelt(os.environ))
    try:
        settings.read(os.environ)
    except settings.SettingError as error:
        health.wrong.append(str(error))
    return health


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def why_not(backend: str, device: str, dtype: str = "") -> str:
    """Why a backend cannot run on a device, and what to do; "" if it can.

    `dtype`: that of a model whose answers will be compared. It may be bf16 if it is auto.
    """
    if backend != "triton":
        return ""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed here: install it, or ask for the backend native (or auto)."
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "Triton compiles for GPUs, and the engine would run on a CPU: torch finds no GPU here, or a CPU was asked "
            "for. Ask for the backend native (or auto), use a machine with a GPU, or set TRITON_INTERPRET=1 to "
            "interpret the kernels, slowly."
        )
    if device == "cpu" and dtype in ("bfloat16", "auto"):
        return (
            "Triton's interpreter cuts fp32 off to bf16 where a GPU rounds, so answers in bf16 are not those of a GPU. "
            "Compare in another dtype: --dtype float32."
        )
    return ""


def judge(rows: Iterable[table.Row], health: Health) -> None:
    """Note how far each op is from its oracle."""
    health.probe = [asdict(row) for row in rows]
    for row in health.probe:
        if not row["passed"]:
            what = f"{row['op']} {row['variant']}, {row['numerics']}, {row['dtype']}, on {row['backend']}"
            health.wrong.append(f"{what} is {row['error']:.3f} ulps off; {row['bound']:.3f} are allowed")


def line(health: Health) -> str:
    """All that was found, in a few words."""
    engines = ", ".join(f"{e['engine']} {e['version']} with {len(e['hooks'])} hooks" for e in health.engines)
    probed = f"{sum(row['passed'] for row in health.probe)} of {len(health.probe)} op cases within their bounds"
    installed = any(importlib.util.find_spec(engine) is not None for engine in ENGINES)
    none = "no engine was looked at" if installed else "no engine is installed here"
    said = [engines or none, *([probed] if health.probe else [])]
    return "; ".join([*said, f"{len(health.wrong)} wrong" if health.wrong else "nothing wrong"])


def versions() -> dict[str, str]:
    """The versions, the GPU and the engines of this machine."""
    found = {"norm_plugin": __version__, "python": f"{platform.python_version()} ({sys.executable})"}
    found["torch"] = torch.__version__
    found["triton"] = version_of("triton")
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found["GPU"] = f"{torch.cuda.get_device_name()} (sm_{major}{minor}), {torch.cuda.device_count()} of them"
        found["driver"] = _driver()
    else:
        found["GPU"] = "none that torch can use: ops run on their native path"
    return found | {engine: version_of(engine) for engine in ENGINES}


def _driver() -> str:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"


def loads(engine: str, health: Health) -> None:
    """Note if an engine will not load the plugin."""
    points = importlib.metadata.entry_points(group=GROUPS[engine])
    if not any(point.value.startswith("norm_plugin.") for point in points):
        said = f"{engine} will not load norm_plugin: it is no entry point of {GROUPS[engine]}; reinstall it"
        health.wrong.append(said)
    name, allowed = FILTERS[engine], os.environ.get(FILTERS[engine])
    if allowed is not None and "norm_plugin" not in allowed.split(","):
        health.wrong.append(f"{name}={allowed} keeps {engine} from loading norm_plugin; add it, or unset that")


def look_at(engine: str, health: Health) -> None:
    """Hook an engine in a new process, and note which hooks are live."""
    loads(engine, health)
    environ = dict(os.environ)
    if settings.read(environ).backend == "off":
        environ["NORM_PLUGIN"] = "auto"  # to see what would be hooked
    asked = subprocess.run(
        [sys.executable, "-c", PROBE.format(engine=engine)], env=environ, capture_output=True, text=True
    )
    try:
        name, version, live, missing, failed = json.loads(asked.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (asked.stderr.strip().splitlines() or ["it said nothing"])[-1]
        health.wrong.append(f"{engine} could not be hooked: {last}")
        return
    absent = {f"{module} (not importable here)": reason for module, reason in failed.items()}
    health.engines.append({"engine": name, "version": version, "hooks": live, "missing": {**missing, **absent}})
    health.wrong += [f"{name}: the hook {hook} is missing: {reason}" for hook, reason in missing.items()]


#: Words of a command line that switch hooks off, and what happens instead.
WORDS = {
    "--enable-torch-compile": "what SGLang compiles stays SGLang's own norm",
    "--enable-deterministic-inference": "SGLang's own norms stay where ours promise no bits",
    "--enable-flashinfer-allreduce-fusion": "an add and norm fused with an all-reduce stays SGLang's; it is counted",
}


def bypasses(command: Sequence[str]) -> Iterator[str]:
    """What will not reach a hook, according to the environment and the command."""
    wanted = settings.read(os.environ)
    if wanted.backend == "off":
        yield "NORM_PLUGIN is off: every norm is the engine's own; set NORM_PLUGIN=auto, or use `norm-plugin run`"
    if (serves := served(command, os.environ)) and wanted.backend != "off":
        yield f"{serves.engine}: {plan(serves, wanted, os.environ)}"
    elif os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
        yield "VLLM_BATCH_INVARIANT=1: vLLM's own norms stay"
    for word, meaning in WORDS.items():
        if word in command:
            yield f"{word}: {meaning}"
