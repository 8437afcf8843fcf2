"""`vllm serve`, as a user starts it: with the flag, with a plugin that cannot be imported, and with a misspelt flag."""

import json
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from norm_plugin.engines import report_file
from tests.engines import runs
from tests.engines.runs import NATIVE, PROMPTS, SECONDS, TOKENS, model
from tests.engines.test_vllm import stock

ALWAYS = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "0"}


class Server:
    """A server on a free port; what it says goes to a file."""

    def __init__(self, flags):
        place = runs.folder() / f"serve-{time.time_ns()}"
        self.report = place / "report"
        self.report.mkdir(parents=True)
        self.port = runs.free_port()
        command = [
            str(Path(runs.python("vllm")).with_name("vllm")), "serve", str(model("llama")), "--host", "127.0.0.1",
            "--port", str(self.port), "--served-model-name", "tiny", "--dtype", "bfloat16", "--max-model-len", "256",
            "--max-num-seqs", "8", "--max-num-batched-tokens", "512", "--kv-cache-memory-bytes", str(64 << 20),
            "--seed", "0", "--enforce-eager",
        ]  # fmt: skip
        self.log = place / "log"
        wanted = runs.environment({**ALWAYS, "NORM_PLUGIN_REPORT": str(self.report), **flags})
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=wanted, stdout=log, stderr=log, cwd=place)

    def said(self):
        return self.log.read_text()

    def ready(self):
        """Once it answers; what it said where it does not."""
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            assert self.process.poll() is None, self.said()[-3000:]
            try:
                return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.said()[-3000:])

    def answers(self):
        """(tokens, their logprobs) of every prompt."""
        body = {
            "model": "tiny", "prompt": PROMPTS, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        where = f"http://127.0.0.1:{self.port}/v1/completions"
        asked = urllib.request.Request(where, json.dumps(body).encode(), {"Content-Type": "application/json"})
        choices = json.load(urllib.request.urlopen(asked, timeout=SECONDS))["choices"]
        return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        finally:
            self.process.kill()


def offline():
    return [(answer.tokens, answer.logprobs) for answer in stock()["llama"].answers]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """One that is patched, and one whose plugin cannot be imported."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "sitecustomize.py").write_text("import sys; sys.modules['norm_plugin.engines.vllm'] = None\n")
    started = {
        "patched": Server({**NATIVE, "VLLM_LOGGING_LEVEL": "INFO"}),
        "broken": Server({**NATIVE, "PYTHONPATH": str(folder)}),
    }
    try:
        yield started
    finally:
        for server in started.values():
            server.stop()


def test_the_same_answers_over_http(servers):
    server = servers["patched"]
    assert server.ready()
    assert server.answers() == offline()
    rows = [row for process in report_file.read(server.report) for row in process["rows"] if row["calls"]]
    assert {row["op"] for row in rows} == {"rmsnorm", "fused_add_rmsnorm"}
    assert min(row["calls"] for row in rows) >= TOKENS
    for process in ("MainProcess", "EngineCore", "VllmWorker"):
        lines = [line for line in server.said().splitlines() if f"({process}" in line and "norm_plugin" in line]
        assert any("backend native, scope eager, in vLLM" in line for line in lines), process
    assert "LlamaForCausalLM has 7 RMSNorm (ours)" in server.said()


def test_a_plugin_that_cannot_be_imported_leaves_a_server(servers):
    server = servers["broken"]
    assert server.ready()
    assert server.answers() == offline()
    assert "Failed to load plugin norm_plugin" in server.said()
    assert not report_file.read(server.report)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"NORM_PLUGIN": "atuo"}, "NORM_PLUGIN='atuo' is not one of its values: off, auto, triton, native."),
        ({"USE_NATIVE_LAYERNORM": "1", "NORM_PLUGIN": "triton"}, "USE_NATIVE_LAYERNORM=1 asks for the native path"),
    ],
)
def test_a_misspelt_flag(flags, says):
    server = Server(flags)
    try:
        assert server.process.wait(SECONDS) != 0
    finally:
        server.process.kill()
    last = [line for line in server.said().splitlines() if line.strip()][-1]
    assert last.startswith("norm_plugin.settings.SettingError: "), server.said()[-2000:]
    assert says in last
