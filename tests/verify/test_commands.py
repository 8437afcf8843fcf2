"""The command line: wrong arguments get one line, what cannot be done too, and `run` becomes what it runs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the command line prints with rich")

from norm_plugin import cli
from norm_plugin.commands import verify
from norm_plugin.verify import health, runs
from tests.verify.samples import answer, outcome, row

VERBS = ("verify", "report", "doctor", "run", "patch", "bench", "tune")


def failed(given: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(given)
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["verify"], 2, "give --engine, or the command"),
        (["verify", "--", "true"], 2, "true starts no engine that is known: vllm, sglang"),
        (["verify", "--engine", "vllm", "--", "vllm", "serve", "/m"], 2, "the command says what the engine is"),
        (["verify", "--", "vllm", "serve", "--enforce-eager"], 2, "names no model"),
        (["verify", "--engine", "vllm", "--max-tokens", "0"], 2, "'0' is not a number from 1 on"),
        (["verify", "--engine", "vllm", "--backend", "triton", "--device", "cpu"], 2, "--backend triton cannot run"),
        (["verify", "--engine", "trt"], 2, "invalid choice: 'trt'"),
        (["verify", "--engine", "vllm", "--eager", "--compile"], 2, "not allowed with"),
        (["verify", "--engine", "vllm", "--max-tokens", "many"], 2, "'many' is not a number from 1 on"),
        (["report"], 2, "give a FOLDER"),
        (["report", "/nowhere"], 2, "there is no report in /nowhere"),
        (["run"], 2, "no command to run"),
        (["run", "--", "no-such-program"], 2, "no-such-program"),
        (
            ["run", "--report", "/dev/null/r", "--", "true"],
            2,
            "NORM_PLUGIN_REPORT=/dev/null/r: the report cannot be written",
        ),
        (["verify", "--engine", "vllm", "--html", "/nowhere/v.html"], 2, "/nowhere is not a folder"),
        (["verify", "--engine", "vllm", "--python", "/nowhere/python"], 2, "/nowhere/python does not run"),
    ],
)
def test_what_is_wrong_gets_one_line(
    given: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failed(given, capsys)[0] == code
    _, error = failed(given, capsys)
    assert error.count("\n") == 1
    assert error.startswith(f"norm-plugin {given[0]}: ")
    assert message in error


def test_report_does_not_run_another_backend_than_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, error = failed(["report", "--engine", "vllm", "--backend", "triton", "--device", "cpu"], capsys)
    assert code == 2
    assert error.count("\n") == 1
    assert error.startswith("norm-plugin report: --backend triton cannot run: Triton compiles for GPUs")


def test_help_names_every_verb_and_every_verb_has_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    help = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n    {verb} " in help
        with pytest.raises(SystemExit):
            cli.main([verb, "list", "--help"] if verb == "patch" else [verb, "--help"])
        own = capsys.readouterr().out
        assert "--json" in own
        assert "exit codes: " in own


# --- verify, up to the engine -------------------------------------------------------------------------------------


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """An engine that has answered already: what verify does with the answers is tested here, and runs elsewhere."""

    def answers(shift: float) -> None:
        def execute(plan: runs.Plan, run: runs.Run, watch: object) -> list[object]:
            given = shift if run.name == "patched" else 0.0
            return [
                outcome([answer([5, 6, 7], shift=given)], [row("model.norm")] if given or run.name == "patched" else [])
            ]

        monkeypatch.setattr(verify, "execute", execute)
        monkeypatch.setattr(verify, "check_engine", lambda engine, python: None)

    return answers


@pytest.mark.parametrize(("shift", "code"), [(0.0, 0), (0.01, 1)])
def test_the_exit_code_says_it(shift: float, code: int, engine: Callable[..., None], tmp_path: Path) -> None:
    engine(shift)
    assert cli.main(["verify", "--engine", "vllm", "--json", f"{tmp_path}/v.json"]) == code
    found = json.loads((tmp_path / "v.json").read_text())
    assert found["models"][0]["passed"] is (code == 0)
    assert found["models"][0]["patched"]["max"] == pytest.approx(shift)
    assert {"norm_plugin", "torch", "triton", "GPU", "vllm"} <= set(found["versions"])
    assert found["command"].startswith("norm-plugin ")
    assert found["date"].endswith("+00:00")


@pytest.mark.parametrize(("shift", "taken", "code"), [(0.0, False, 2), (0.01, False, 1), (0.0, True, 0)])
def test_what_the_compiler_has_is_not_tested_and_not_another(
    shift: float, taken: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `vllm serve` is by default; an answer that differs all the same stays one that differs."""
    plans: list[runs.Plan] = []

    def execute(plan: runs.Plan, run: runs.Run, watch: object) -> list[object]:
        plans.append(plan)
        rows = [row("model.norm", op="rmsnorm" if taken else "", calls=3 * taken)] if run.name == "patched" else []
        found = outcome([answer([5, 6, 7], shift=shift * (run.name == "patched"))], rows)
        found.mode = "compiled"
        return [found]

    monkeypatch.setattr(verify, "execute", execute)
    monkeypatch.setattr(verify, "check_engine", lambda engine, python: None)
    model = str(verify.find_models("tiny:llama", "vllm", "cpu")[0])
    given = ["verify", "--backend", "native", "--", "vllm", "serve", model, "--port", "1"]
    assert cli.main(given) == code
    out, error = capsys.readouterr()
    assert error.startswith("norm-plugin verify: compiled (its default): norm layers that vLLM compiles stay vLLM's")
    arguments = list(plans[0].arguments)
    assert arguments[arguments.index("--mode") + 1] == "compiled"
    assert json.loads(arguments[arguments.index("--served") + 1]) == [model, "--port", "1"]
    assert ("identical" in out) is taken
    if code == 2:
        assert "1 left to the compiler" in out
        assert "compiled by vllm, which is as fast: model.norm" in out
        assert "there was nothing to test. NORM_PLUGIN_SCOPE=all" in out


def test_what_was_asked_for_and_did_not_run_is_no_success(
    engine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows say native."""
    engine(0.0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    asked = verify.execute

    def execute(*given: object) -> list[object]:
        found = asked(*given)  # type: ignore[arg-type]
        found[0].flags = {"NORM_PLUGIN": "triton"}
        return list(found)

    monkeypatch.setattr(verify, "execute", execute)
    given = ["verify", "--engine", "vllm", "--backend", "triton", "--device", "cpu", "--dtype", "float32"]
    assert cli.main(given) == 2
    out = capsys.readouterr().out
    assert "stock against native (triton was asked for)" in out
    assert "triton was asked for, and native ran instead: asked for" in out


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_full_disk_is_said_in_one_line(
    option: str, engine: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    engine(0.0)
    code, error = failed(["verify", "--engine", "vllm", option, "/dev/full"], capsys)
    assert code == 2
    assert error.splitlines()[-1] == "norm-plugin verify: /dev/full cannot be written: No space left on device."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is not a list of"),
        ("[1]", "is not a list of"),
        (None, "cannot be read"),
    ],
)
def test_prompts_that_are_none(
    content: str | None, message: str, engine: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine(0.0)
    if content is not None:
        (tmp_path / "prompts.json").write_text(content)
    code, error = failed(["verify", "--engine", "vllm", "--prompts", f"{tmp_path}/prompts.json"], capsys)
    assert code == 2
    assert message in error


@pytest.mark.parametrize("model", ["tiny:lama", "tiny:llama,lama", "/nowhere", "."])
def test_a_model_that_does_not_exist(
    model: str, engine: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    engine(0.0)
    code, error = failed(["verify", "--engine", "vllm", "--model", model], capsys)
    assert code == 2
    assert error.count("\n") == 1
    assert error.startswith(f"norm-plugin verify: --model {model}: ")


def test_stock_is_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_NATIVE_LAYERNORM", "1")
    monkeypatch.setenv("NORM_PLUGIN", "triton")
    monkeypatch.setenv("NORM_PLUGIN_OPS", "gemma")
    options = cli.parser().parse_args(["verify", "--engine", "vllm", "--backend", "native"])
    stock, again, patched = verify.three_runs(options, "cpu")
    for run in (stock, again):
        ours = {name: value for name, value in runs.environment(run.flags).items() if "NORM" in name}
        assert ours == {"NORM_PLUGIN": "off"}
    assert again.reverse
    ours = {name: value for name, value in runs.environment(patched.flags).items() if "NORM" in name}
    assert ours == {"NORM_PLUGIN": "native", "NORM_PLUGIN_OPS": "gemma"}


def test_on_a_gpu_the_floor_has_other_batches_too() -> None:
    options = cli.parser().parse_args(["verify", "--engine", "vllm", "--set", "max_model_len=512"])
    _, again, _ = verify.three_runs(options, "cuda")
    assert list(again.arguments) == ["--set", "max_model_len=512", "max_num_seqs=3"]


# --- run, doctor --------------------------------------------------------------------------------------------------


def norm_plugin(*words: str, **environ: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from norm_plugin import cli; sys.exit(cli.main())", *words]


def test_run_becomes_the_command() -> None:
    program = "import os, sys; print(os.environ['NORM_PLUGIN'], os.getpid()); sys.exit(7)"
    words = norm_plugin("run", "--backend", "native", "--no-probe", "--", sys.executable, "-c", program)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 7
    assert out.split() == ["native", str(process.pid)]
    assert error == (
        "norm-plugin run: this starts no engine that norm_plugin knows; the flags are set for whatever it starts.\n"
    )


def test_run_says_before_the_start_what_will_be_ours(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\necho started\n")
    program.chmod(0o755)
    modes = {"--port=1": "compiled (its default): norm layers", "--enforce-eager": "eager (--enforce-eager)"}
    for more, expected in modes.items():
        words = norm_plugin("run", "--report", f"{tmp_path}/r", "--", str(program), "serve", "/m", more)
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, "started\n"), done.stderr
        assert done.stderr.startswith(f"norm-plugin run: {expected}")
        assert done.stderr.count("\n") == 1


def test_ctrl_c_reaches_the_command() -> None:
    program = (
        "import time\nprint('up', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('stopped'); raise SystemExit(3)"
    )
    words = norm_plugin("run", "--no-probe", "--", sys.executable, "-c", program)
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.stdout.read() == "stopped\n"
    assert process.wait(20) == 3


def test_run_does_not_start_what_doctor_warns_of() -> None:
    words = norm_plugin("run", "--backend", "triton", "--", sys.executable, "-c", "print('started')")
    environ = {**os.environ, "USE_NATIVE_LAYERNORM": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environ, timeout=120)
    assert done.returncode == 2
    assert "started" not in done.stdout
    assert "USE_NATIVE_LAYERNORM=1" in done.stderr
    assert "was not started" in done.stderr


def test_doctor_finds_an_op_that_is_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from norm_plugin.accuracy import table

    good = next(iter(table.rows(health.torch.device("cpu"))))
    bad = table.Row(**{**vars(good), "error": 9.0, "passed": False})
    monkeypatch.setattr(table, "rows", lambda device: iter([good, bad]))
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "is 9.000 ulps off" in out
    assert "1 of 2 op cases within their bounds" in out
    monkeypatch.setattr(table, "rows", lambda device: iter([good]))
    assert cli.main(["doctor"]) == 0


def test_doctor_names_a_flag_that_is_misspelt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(health, "look_at", lambda engine, found: None)
    monkeypatch.setenv("NORM_PLUGIN_BACKEND", "native")
    assert cli.main(["doctor", "--no-probe"]) == 0
    assert "NORM_PLUGIN_BACKEND is not a flag of norm_plugin, and does nothing. Was NORM_PLUGIN" in (
        capsys.readouterr().out
    )


def test_doctor_says_what_is_wrong_with_a_flag_and_not_that_there_is_no_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(health.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("NORM_PLUGIN", "yes")
    assert cli.main(["doctor", "--no-probe"]) == 1
    out = capsys.readouterr().out
    assert "NORM_PLUGIN='yes' is not one of its values: off, auto, triton, native." in out
    assert "no engine was looked at; 1 wrong" in out
