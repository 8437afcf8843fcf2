"""SGLang as a server with the plugin on: asked over HTTP, counted in its scheduler, and stopped by a misspelt flag."""

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from norm_plugin.engines import report_file
from tests.engines import runs, sglang_runs
from tests.engines.sglang_runs import NATIVE, STOCK, TOKENS, environment, model
from tests.engines.test_sglang import CALLS, FORWARDS, answers_of

SECONDS = 600
ON_CPU = {
    "SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def launch(flags, port, log):
    options = (
        "--device cpu --dtype bfloat16 --attention-backend torch_native --sampling-backend pytorch --random-seed 0 "
        "--grammar-backend none --disable-overlap-schedule --disable-radix-cache --max-total-tokens 4096 "
        "--max-running-requests 16 --context-length 512 --mem-fraction-static 0.9 --skip-server-warmup "
        "--skip-tokenizer-init --host 127.0.0.1"
    )
    command = [sglang_runs.python(), "-m", "sglang.launch_server", "--model-path", str(model("llama"))]
    command += [*options.split(), "--port", str(port)]
    env = environment(ON_CPU | flags)
    return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def post(port, path, body):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)


def wait_for(port, server):
    """By a question for which no model is run, as SGLang does for its health."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        assert server.poll() is None
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/model_info", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(f"no server after {SECONDS} s")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """What a server with native norms answers over HTTP; its log; and what its processes report."""
    place, port = tmp_path_factory.mktemp("server"), runs.free_port()
    flags = NATIVE | {"NORM_PLUGIN_REPORT": str(place / "report")}
    with (place / "log").open("w") as log:
        server = launch(flags, port, log)
    try:
        wait_for(port, server)
        how = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
        outputs = post(port, "/generate", {
            "input_ids": runs.PROMPTS, "sampling_params": how, "return_logprob": True, "top_logprobs_num": 5,
        })  # fmt: skip
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
    except BaseException:
        print((place / "log").read_text()[-3000:])
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
    return outputs, (place / "log").read_text(), report_file.read(place / "report"), status


def test_over_http_the_bits_of_stock(served):
    outputs, _, _, _ = served
    stock = answers_of("llama", *STOCK.items())
    assert [list(output["output_ids"]) for output in outputs] == [answer.tokens for answer in stock]
    logprobs = [[float(logprob) for logprob, *_ in o["meta_info"]["output_token_logprobs"]] for o in outputs]
    assert logprobs == [answer.logprobs for answer in stock]


def test_the_scheduler_counted(served):
    _, _, processes, _ = served
    called = [process for process in processes if any(row["calls"] for row in process["rows"])]
    assert [process["command"].split()[0] for process in called] == ["sglang::scheduler"]
    counted = {(row["op"], row["reason"]): 0 for row in called[0]["rows"]}
    for row in called[0]["rows"]:
        counted[row["op"], row["reason"]] += row["calls"]
    assert counted == {key: number * FORWARDS for key, number in CALLS["llama"].items()}


def test_the_log_says_so_and_the_server_ends_well(served):
    _, log, _, status = served
    lines = [line for line in log.splitlines() if "norm_plugin" in line and "backend native on cpu" in line]
    assert len(lines) == 1
    assert "RMSNorm=RMSNorm.forward_native" in lines[0]
    assert "norm layers: 7 RMSNorm (ours)" in lines[0]
    assert status == 0


def test_a_misspelt_flag_is_said_at_once(tmp_path):
    with (tmp_path / "log").open("w") as log:
        status = launch({"NORM_PLUGIN": "nativ"}, runs.free_port(), log).wait(SECONDS)
    assert status == 1
    text = (tmp_path / "log").read_text()
    assert text.splitlines()[-1].startswith("norm_plugin: NORM_PLUGIN='nativ' is not one of its values: off, auto,")
