"""Importing norm_plugin: no engine, no Triton, nothing registered, and no more read than the ops need."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

#: Modules that an import of norm_plugin must not import.
FORBIDDEN = ("triton", "vllm", "sglang", "flashinfer", "torch._inductor", "torch._dynamo")

#: The only folders of the package that it reads: what an import costs is the files that it reads and runs.
FOLDERS = {"norm_plugin", "norm_plugin.kernels", "norm_plugin.native"}


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_it_imports_no_engine_and_no_triton() -> None:
    """Except those that torch itself imports."""
    code = (
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        "import norm_plugin, norm_plugin.layers, norm_plugin.accuracy.oracle\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    imported = json.loads(in_a_process(code).stdout)
    assert "norm_plugin" in imported
    for name in FORBIDDEN:
        assert not [module for module in imported if module == name or module.startswith(f"{name}.")], name


def test_it_works_without_triton() -> None:
    """If the import of triton fails, every op still gives values, gradients and its reason."""
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "import torch, norm_plugin\n"
        "from norm_plugin import dispatch\n"
        "x = torch.randn(4, 64, requires_grad=True)\n"
        "norm_plugin.rmsnorm(x, None).sum().backward()\n"
        "norm_plugin.layernorm(x.detach(), None, None)\n"
        "norm_plugin.rmsnorm_fn(x.detach(), None, None, x.detach())\n"
        "norm_plugin.rmsnorm_dynamic_quant(x.detach(), None)\n"
        "print({r.op.name + ': ' + r.backend + ', ' + r.reason for r in dispatch.routes()})"
    )
    seen = in_a_process(code).stdout
    for op in ("rmsnorm", "layernorm", "gated_norm", "rmsnorm_dynamic_quant"):
        assert f"{op}: native, triton is not installed" in seen


def test_it_reads_its_own_code_and_nothing_else() -> None:
    """No table of the kernels, no room of the engines or of the commands, and no process is started."""
    code = (
        "import json, sys, torch\n"
        "before, opened, started = set(sys.modules), [], []\n"
        "def note(event, args):\n"
        "    if event == 'open':\n"
        "        opened.append(str(args[0]))\n"
        "    elif event in ('subprocess.Popen', 'os.fork', 'os.posix_spawn', 'socket.connect', 'ctypes.dlopen'):\n"
        "        started.append(event)\n"
        "sys.addaudithook(note)\n"
        "import norm_plugin\n"
        "added = [sys.modules[name] for name in set(sys.modules) - before if name not in sys.stdlib_module_names]\n"
        "print(json.dumps([[m.__name__ if hasattr(m, '__path__') else m.__package__ for m in added], opened, started]))"
    )
    folders, opened, started = json.loads(in_a_process(code).stdout)
    assert set(folders) == FOLDERS
    assert [Path(path).name for path in opened if not re.search(r"/norm_plugin/.*\.pyc?(\.\d+)?$", path)] == []
    assert started == []


def test_it_registers_nothing() -> None:
    """An engine that was imported before stays as it is."""
    code = (
        "import sys, types\n"
        "engines = [types.ModuleType(name) for name in ('vllm', 'sglang')]\n"
        "sys.modules.update({engine.__name__: engine for engine in engines})\n"
        "before = [dict(vars(engine)) for engine in engines]\n"
        "import norm_plugin\n"
        "assert [vars(engine) for engine in engines] == before"
    )
    in_a_process(code)
