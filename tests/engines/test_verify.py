"""verify on the real vLLM: it finds every planted fault, leaves nothing behind, says in one message what went wrong."""

import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from norm_plugin.tiny_models import checkpoint
from norm_plugin.verify.comparison import IDENTICAL, OUTSIDE
from norm_plugin.verify.runs import Plan, Run, execute
from norm_plugin.verify.verdict import Verdict, judged

ROOT = Path(__file__).resolve().parents[2]
FAULTS = {
    "none": "llama",
    "eps": "llama",
    "residual": "llama",
    "variance": "llama",
    "unpatched": "llama",
    "plus_one": "gemma3",
    "gate": "mamba2_groups",
    "group": "mamba2_groups",
}
MODELS = tuple(dict.fromkeys(FAULTS.values()))


@pytest.fixture(scope="session")
def python() -> str:
    """The Python of .venv-vllm."""
    made = subprocess.run([ROOT / "scripts" / "engine_vllm"], stdout=subprocess.PIPE, text=True, check=True)
    return made.stdout.split()[-1]


# --- planted faults -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verdicts(python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    """Stock, stock in another order, and one patched process that loads a model for each fault."""
    prompts: list[str | list[int]] = ["Hello", "The capital of France is", "1 2 4 8 16", "def f(x):\n    return x"]
    folder = tmp_path_factory.mktemp("verify")

    def outcomes(models: list[str], run: Run) -> list[Any]:
        plan = Plan("vllm", python, [checkpoint.make(name) for name in models], prompts, folder, ["--max-tokens", "8"])
        return execute(plan, run, lambda line, seconds: None)

    stock = outcomes(list(MODELS), Run("stock", {"NORM_PLUGIN": "off"}))
    again = outcomes(list(MODELS), Run("stock, another order", {"NORM_PLUGIN": "off"}, reverse=True))
    planted = {
        "NORM_PLUGIN": "native",
        "NORM_PLUGIN_FAULTS": ",".join(FAULTS),
        "PYTHONPATH": str(ROOT / "tests/engines/faults"),
    }
    patched = outcomes(list(FAULTS.values()), Run("patched", planted))
    place = {name: i for i, name in enumerate(MODELS)}
    return {
        fault: judged(stock[place[model]], again[place[model]], outcome)
        for (fault, model), outcome in zip(FAULTS.items(), patched, strict=True)
    }


def test_without_a_fault_every_bit_is_the_same(verdicts: dict[str, Verdict]) -> None:
    found = verdicts["none"]
    assert found.floor.identical
    assert (found.verdict, found.passed) == (IDENTICAL, True)
    assert (len(found.taken), found.others, found.kept, found.silent) == (7, [], {}, [])
    assert found.backends == ["native"]
    assert found.numerics == ["hf"]


@pytest.mark.parametrize("fault", sorted(set(FAULTS) - {"none", "unpatched"}))
def test_a_planted_fault_is_found(fault: str, verdicts: dict[str, Verdict]) -> None:
    found = verdicts[fault]
    assert (found.verdict, found.passed) == (OUTSIDE, False)
    assert found.patched.max > 1e-4
    assert found.floor.identical
    assert found.taken, "the fault is in what ours computed"


def test_a_layer_that_is_not_patched_is_named(verdicts: dict[str, Verdict]) -> None:
    found = verdicts["unpatched"]
    assert found.verdict == IDENTICAL, "its output is as before"
    assert found.silent == ["model.layers.1.input_layernorm"]
    assert (len(found.taken), found.others) == (6, found.silent)


# --- the command --------------------------------------------------------------------------------------------------


def command(python: str, *words: str) -> list[str]:
    return [str(Path(python).parent / "norm-plugin"), *words]


def said(python: str, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(python, *words), capture_output=True, text=True, timeout=600, env={**os.environ, **environ}
    )


def marked(mark: str) -> Iterator[int]:
    """The processes whose environment has the mark."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environ.read_bytes():
                yield int(environ.parent.name)
        except OSError:
            continue


@pytest.mark.parametrize("moment", ["at once", "an engine starts", "the second run"])
def test_killed_at_any_moment_nothing_is_left(moment: str, python: str, tmp_path: Path) -> None:
    name, value = "NORM_PLUGIN_TEST_MARK", str(uuid.uuid4())
    words = command(python, "verify", "--engine", "vllm", "--max-tokens", "4")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, env={**os.environ, name: value}, stdout=log, stderr=log)
    reached = {
        "at once": lambda: True,
        "an engine starts": lambda: len(list(marked(value))) >= 4,  # verify, its two leashes and the engine
        "the second run": lambda: "stock: " in (tmp_path / "log").read_text() and len(list(marked(value))) >= 4,
    }[moment]
    until(reached, 400)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not list(marked(value)), 30)


def until(reached: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_an_engine_that_does_not_start_says_so_in_its_own_words(python: str, tmp_path: Path) -> None:
    broken = shutil.copytree(checkpoint.make("llama"), tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(
        json.dumps({**config, "architectures": ["NoSuchModel"], "num_hidden_layers": -1})
    )
    done = said(python, "verify", "--engine", "vllm", "--model", str(broken))
    assert done.returncode == 2
    assert done.stdout == ""
    message = done.stderr[done.stderr.index("norm-plugin verify:") :]
    assert message.startswith(f"norm-plugin verify: vllm did not finish the run 'stock' of {broken} (exit code 1)")
    assert "Error" in message
    assert 2 < len(message.splitlines()) < 20
    log = Path(message.rstrip().rpartition("The whole log: ")[2])
    assert "Traceback (most recent call last):" in log.read_text()
    log.unlink()


def test_the_mode_of_a_server_is_tested(python: str) -> None:
    """As it is typed, with what is not for a few short requests in it. test_vllm_readme has a server that is eager."""
    serve = ["vllm", "serve", str(checkpoint.make("llama")), "--port", "1", "--max-model-len", "1024"]
    done = said(python, "verify", "--backend", "native", "--max-tokens", "4", "--", *serve)
    assert done.returncode == 2, done.stderr
    assert "compiled, bfloat16 on cpu: stock against nothing of ours (native was asked for)" in done.stdout
    assert "1 left to the compiler" in done.stdout


def test_several_ranks_are_tested(python: str) -> None:
    """In fp32: on a CPU vLLM's own all-reduce cuts a bf16 sum off where others round it, and verify finds that."""
    words = ["--engine", "vllm", "--tp", "2", "--backend", "native", "--dtype", "float32", "--max-tokens", "4"]
    found = said(python, "verify", *words)
    assert found.returncode == 0, found.stdout + found.stderr
    assert ", 2 ranks, eager, float32 on cpu: stock against native" in found.stdout
    assert " identical" in found.stdout
    assert "llama: all-reduce and norm are one op in model.layers.0.post_attention_layernorm" in found.stdout


def test_the_ranks_of_a_command_are_its_own(python: str) -> None:
    found = said(python, "verify", "--tp", "2", "--", "vllm", "serve", "m")
    assert found.returncode == 2
    assert "the command says what the tp is; leave that option out" in found.stderr


def test_report_runs_an_engine(python: str, tmp_path: Path) -> None:
    done = said(python, "report", "--engine", "vllm", "--model", "tiny:gemma3", "--json", f"{tmp_path}/r.json")
    assert done.returncode == 0, done.stderr
    (process,) = json.loads((tmp_path / "r.json").read_text())
    rows = {row["layer"]: row for row in process["rows"]}
    assert len(rows) == 3 * 6 + 1
    for layer, row in rows.items():
        assert row["calls"] > 0, layer
        assert row["implementations"][0]["numerics"].endswith("1 + w")
        assert row["implementations"][0]["backend"] == "native"
        assert row["width"] == (32 if "self_attn" in layer else 128)
    assert "model.layers.{0-2}.self_attn.k_norm: 3 layers" in done.stdout


def test_doctor_says_what_is_hooked(python: str, tmp_path: Path) -> None:
    done = said(
        python, "doctor", "--no-probe", "--json", f"{tmp_path}/d.json", "--", "vllm", "serve", "x", NORM_PLUGIN="auto"
    )
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "d.json").read_text())
    (engine,) = found["engines"]
    assert {"RMSNorm", "GemmaRMSNorm", "LayerNorm", "RMSNormGated", "Mixer2RMSNormGated"} <= set(engine["hooks"])
    assert engine["missing"] == {}
    assert any(one.startswith("vllm: compiled (its default): ") for one in found["bypassed"])


def test_doctor_says_that_a_filter_keeps_the_plugin_out(python: str) -> None:
    done = said(python, "doctor", "--no-probe", VLLM_PLUGINS="another")
    assert done.returncode == 1
    assert "VLLM_PLUGINS=another keeps vllm from loading norm_plugin" in done.stdout
