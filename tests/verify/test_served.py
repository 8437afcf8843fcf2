"""What a command that serves is read for, before anything starts: the engine, the model, the mode, and what is ours."""

import json
from pathlib import Path

import pytest

from norm_plugin import settings
from norm_plugin.verify import health
from norm_plugin.verify.served import plan, served

VLLM = ("vllm", "serve", "/m")


@pytest.mark.parametrize(
    ("more", "mode", "because"),
    [
        ("", "compiled", "its default"),
        ("--enforce-eager", "eager", "--enforce-eager"),
        ("--enforce_eager", "eager", "--enforce-eager"),
        ("--enforce-eager --no-enforce-eager", "compiled", "its default"),
        ("--port 8000 -O0", "eager", "-O0"),
        ("-O 0", "eager", "-O0"),
        ("-O=3", "compiled", "-O3"),
        ("--optimization-level O0", "eager", "-O0"),
        ("-cc.mode=0", "eager", "compilation mode 0"),
        ("--compilation_config.mode none", "eager", "compilation mode none"),
        ('--compilation-config={"mode":"NONE"}', "eager", "compilation mode NONE"),
        ('-cc {"mode":3}', "compiled", "compilation mode 3"),
        ('-cc {"cudagraph_mode":0}', "compiled", "its default"),
        ("-cc {", "compiled", "its default"),
    ],
)
def test_the_mode_of_vllm(more: str, mode: str, because: str) -> None:
    found = served([*VLLM, *more.split()], {})
    assert found is not None
    assert (found.engine, found.model, found.mode, found.because) == ("vllm", "/m", mode, because)


@pytest.mark.parametrize(
    ("command", "engine", "model"),
    [
        ("/opt/bin/vllm serve org/name --port 1", "vllm", "org/name"),
        ("numactl -N 0 vllm serve --model=/m", "vllm", "/m"),
        ("python -m vllm.entrypoints.openai.api_server --model /m", "vllm", "/m"),
        ("python3 -m sglang.launch_server --model-path /m", "sglang", "/m"),
        ("sglang serve --model-path=/m", "sglang", "/m"),
        ("vllm serve --enforce-eager", "vllm", None),
        ("vllm bench", None, None),
        ("true", None, None),
        ("", None, None),
    ],
)
def test_the_engine_and_the_model(command: str, engine: str | None, model: str | None) -> None:
    found = served(command.split(), {})
    assert (found and found.engine, found and found.model) == (engine, model)


def said(command: str, **environ: str) -> str:
    found = served(command.split(), environ)
    assert found is not None
    return plan(found, settings.read({"NORM_PLUGIN": "auto", **environ}), environ)


def test_what_is_ours_in_vllm() -> None:
    compiled = said("vllm serve /m")
    assert compiled.startswith("compiled (its default): norm layers that vLLM compiles stay vLLM's, because Inductor")
    for word in ("as fast", "vision and audio encoders", "--enforce-eager", "NORM_PLUGIN_SCOPE=all"):
        assert word in compiled
    assert said("vllm serve /m --enforce-eager") == (
        "eager (--enforce-eager): every norm layer that norm_plugin hooks will be ours"
    )
    assert "in compiled code too (NORM_PLUGIN_SCOPE=all)" in said("vllm serve /m", NORM_PLUGIN_SCOPE="all")
    assert "of the families gated, mixer2" in said("vllm serve /m --enforce-eager", NORM_PLUGIN_OPS="mixer2,gated")
    assert said("vllm serve /m --enforce-eager", VLLM_BATCH_INVARIANT="1").startswith("no layer will be ours:")
    assert "norms that do an all-reduce" in said("vllm serve /m --enforce-eager -tp 2", VLLM_BATCH_INVARIANT="1")
    assert said("vllm serve /m", TORCH_COMPILE_DISABLE="1").startswith("eager (TORCH_COMPILE_DISABLE=1): every norm")


def test_what_is_ours_in_sglang() -> None:
    launch = "python -m sglang.launch_server --model-path /m"
    assert said(launch).startswith("every norm layer that norm_plugin hooks will be ours, inside CUDA graphs too")
    assert "what SGLang compiles stays SGLang's" in said(f"{launch} --enable-torch-compile")
    assert "do not depend on the batch" in said(f"{launch} --enable-deterministic-inference")
    assert "but for the residual norms" in said(f"{launch} --rl-on-policy-target fsdp")


@pytest.mark.parametrize(("config", "none"), [({}, True), ({"vision_config": {}}, False)])
def test_a_model_without_an_encoder_has_probably_nothing_of_ours(config: object, none: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ("so probably none" in said(f"vllm serve {tmp_path}")) is none


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in health.why_not("triton", "cpu")
    assert "native" in health.why_not("triton", "cpu")
    for backend, device in (("triton", "cuda"), ("auto", "cpu"), ("native", "cpu")):
        assert health.why_not(backend, device) == ""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert health.why_not("triton", "cpu") == health.why_not("triton", "cpu", "float32") == ""
    assert "--dtype float32" in health.why_not("triton", "cpu", "bfloat16"), "its interpreter does not round to bf16"
    assert health.why_not("triton", "cuda", "bfloat16") == ""
    monkeypatch.setattr(health.importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in health.why_not("triton", "cuda")
