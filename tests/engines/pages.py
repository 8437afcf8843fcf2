"""The pages "use with vLLM" and "use with SGLang", with their engines: every command that they show, in order."""

import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from norm_plugin.tiny_models import checkpoint
from tests.engines.runs import free_port
from tests.verify.guide import ROOT, commands

#: What a machine without a GPU needs besides; the pages are for those that have one.
ON_A_CPU: dict[str, dict[str, Any]] = {
    "vllm": {
        "serve": ["--max-model-len", "256", "--port"],
        "environ": {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
    },
    "sglang": {
        "serve": [
            *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
            *("--grammar-backend", "none", "--context-length", "512", "--max-total-tokens", "2048"),
            *("--disable-overlap-schedule", "--skip-server-warmup", "--mem-fraction-static", "0.9", "--port"),
        ],
        "environ": {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"},
    },
}


def as_the_readme_has_it(line: str) -> str:
    """A page's command without what it says otherwise than the README: the backend, and where the report is."""
    return line.partition("  #")[0].strip().replace(" --backend native", "").replace("/tmp/report", "report")


def follow(engine: str, tmp_path: Path) -> list[str]:
    """Type what the page of an engine shows, but for what test_vllm_readme types; returns the verbs."""
    readme = map(as_the_readme_has_it, commands(ROOT / "README.md")) if engine == "vllm" else ()
    followed = set(readme)
    shown = [line for line in commands(ROOT / "docs" / f"{engine}.md") if not line.startswith("pip ")]  # engine_* did
    left = [line for line in shown if as_the_readme_has_it(line) not in followed]
    typed(left, engine, tmp_path)
    return [shlex.split(line)[1] for line in left]


def typed(lines: list[str], engine: str, tmp_path: Path) -> None:
    """Each command, in an environment with the engine: verify finds all layers identical, a server serves, and the
    report counts the calls of every layer."""
    made = subprocess.run([ROOT / "scripts" / f"engine_{engine}"], stdout=subprocess.PIPE, text=True, check=True)
    programs = Path(made.stdout.split()[-1]).parent
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NORM_PLUGIN", "USE_NATIVE"))}
    environ = {
        **kept, **ON_A_CPU[engine]["environ"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    server, port = None, free_port()
    try:
        for line in lines:
            words = shlex.split(line.replace("/models/llama", str(checkpoint.make("llama"))))
            words = [word.replace("/tmp/report", str(tmp_path / "report")) for word in words]
            if words[1] == "verify":
                words += ON_A_CPU[engine]["serve"][:-1] if "--" in words else []  # of the server; it has no port
                said = ["--json", f"{tmp_path}/verify.json", "--html", f"{tmp_path}/verify.html", "--max-tokens", "4"]
                words[2:2] = said
            if words[1] == "run":
                words += [*ON_A_CPU[engine]["serve"], str(port)]
                server = serve(words, environ, tmp_path / "server.log", port)
                continue
            if words[1] == "report":
                words += ["--json", f"{tmp_path}/report.json"]
            with tempfile.TemporaryDirectory() as place:
                done = subprocess.run(
                    words, env=environ | {"TMPDIR": place}, capture_output=True, text=True, timeout=900
                )
                assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
                assert os.listdir(place) == [], f"{line} leaves this behind"
        if server is not None:
            server.send_signal(signal.SIGINT)
            server.wait(60)
    finally:
        if server is not None:
            stop(server)
    (model,) = json.loads((tmp_path / "verify.json").read_text())["models"]
    assert (model["model"], model["verdict"], len(model["taken"]), model["others"]) == ("llama", "identical", 7, [])
    assert "identical" in (tmp_path / "verify.html").read_text(encoding="utf-8")
    if server is None:
        return
    rows = [row for process in json.loads((tmp_path / "report.json").read_text()) for row in process["rows"]]
    assert {row["layer"] for row in rows} == {
        "model.norm", *(f"model.layers.{i}.{norm}_layernorm" for i in range(3) for norm in ("input", "post_attention"))
    }  # fmt: skip
    assert all(row["calls"] >= 8 and row["implementations"][0]["backend"] == "native" for row in rows)


def serve(words: list[str], environ: dict[str, str], log: Path, port: int) -> "subprocess.Popen[bytes]":
    """A server that has answered."""
    with log.open("wb") as output:
        server = subprocess.Popen(words, env=environ, stdout=output, stderr=output, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    end = time.monotonic() + 400
    while True:
        alive = server.poll() is None and time.monotonic() < end
        assert alive, log.read_text(errors="replace")[-3000:]
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).read()
            break
        except OSError:
            time.sleep(1)
    asked = {
        "model": str(checkpoint.make("llama")),
        "prompt": "Hello",
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    answer = json.loads(urllib.request.urlopen(request, timeout=300).read())
    assert answer["usage"]["completion_tokens"] == 8
    return server


def stop(server: "subprocess.Popen[bytes]") -> None:
    """Whatever it has started, too."""
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    server.wait()
