"""The real vLLM with patches: the tokens of stock.

Both sides run in fp32, where the only difference is the order of a sum: 2e-5 in a logprob is what 16 times that error
through these models' few layers comes to at most, and a norm that is wrong is far beyond it (the last test).
"""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import pytest

from norm_plugin.verify.outcome import Outcome
from tests.engines.runs import TOKENS, furthest, python
from tests.patches.engines import STAND_INS, folder, patched, run, same_tokens

ENGINE = "vllm"
MODELS = ("mamba2_groups", "nemotron_h")
GATED = {"mamba2_groups": "Mixer2RMSNormGated", "nemotron_h": "Mixer2RMSNormGated", "qwen3_next": "RMSNormGated"}
CLOSE = 2e-5
CHILD = ("-m", "norm_plugin.verify.vllm_child")
CUDA_METHODS = (str(STAND_INS / "vllm_cuda_methods.py"),)
GUARD = "vllm/third_party/flash_linear_attention/ops/layernorm_guard.py"
MAMBA = "vllm/model_executor/layers/mamba/ops/layernorm_gated.py"


@functools.cache
def site() -> Path:
    return patched(ENGINE, folder(ENGINE) / "site", ["native-switch", "mixer2-groups", "strided-gate"])


def from_site(place: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(place), "USE_NATIVE_LAYERNORM": "1", "VLLM_PLUGINS": "none"}


@functools.cache
def runs() -> dict[str, tuple[Outcome, Outcome]]:
    """Stock and patched of each model; Qwen3-Next in bf16, which is all that vLLM's CPU attention has for it."""
    found = {}
    for dtype, models in (("float32", MODELS), ("bfloat16", ("qwen3_next",))):
        stock = run(ENGINE, models, dtype, CHILD, VLLM_PLUGINS="none")
        ours = run(ENGINE, models, dtype, CUDA_METHODS, **from_site(site()))
        found |= {one.model: (one, other) for one, other in zip(stock.outcomes(), ours.outcomes(), strict=True)}
    return found


@pytest.mark.parametrize("name", GATED)
def test_the_tokens_of_stock(name: str) -> None:
    stock, ours = runs()[name]
    assert len(ours.answers[0].tokens) == TOKENS
    assert same_tokens(stock, ours)
    assert furthest(stock, ours) <= CLOSE


@pytest.mark.parametrize("name", GATED)
def test_the_patch_answered_every_gated_norm(name: str) -> None:
    stock, ours = runs()[name]
    assert stock.rows == []
    assert {row["op"] for row in ours.rows} == {"gated_norm"}
    assert all(row["calls"] == TOKENS and row["reason"] == "" for row in ours.rows)
    assert len(ours.rows) == {"mamba2_groups": 2, "nemotron_h": 2, "qwen3_next": 3}[name]


def test_a_wrong_norm_below_the_patch_is_seen() -> None:
    """The same comparison with an eps ten times larger: the patch is what computes, and the bound is narrow."""
    wrong = patched(ENGINE, folder(ENGINE) / "wrong", ["native-switch", "mixer2-groups"])
    for file in (GUARD, MAMBA):
        text = (wrong / file).read_text()
        assert text.count("x, weight, bias, eps, z, out,") == 1
        (wrong / file).unlink()  # it is linked to the one that others run
        (wrong / file).write_text(text.replace("x, weight, bias, eps, z, out,", "x, weight, bias, 10 * eps, z, out,"))
    (ours,) = run(ENGINE, MODELS[:1], "float32", CUDA_METHODS, **from_site(wrong)).outcomes()
    assert furthest(runs()[MODELS[0]][0], ours) > 3 * CLOSE


def test_the_kernels_of_the_fixes_in_the_interpreter() -> None:
    """Not the engine, but its patched modules: the gate is read where it lies, Mixer2's groups are the kernel's, and
    a plugin that is on as well says so."""
    alone = patched(ENGINE, folder(ENGINE) / "fixes", ["mixer2-groups", "strided-gate"])
    script = STAND_INS / "vllm_kernels.py"
    said, logs = {}, {}
    for name, place in (("stock", ""), ("fixed", str(alone))):
        ran = subprocess.run(
            [python(ENGINE), script], capture_output=True, text=True,
            env={"TRITON_INTERPRET": "1", "PYTHONPATH": place, "NORM_PLUGIN": "native", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr[-3000:]
        logs[name] = ran.stderr + ran.stdout
        said[name] = dict(line.split("=", 1) for line in ran.stdout.splitlines() if "=" in line)
    assert said["stock"]["gate"] == said["fixed"]["gate"], "the same bits"
    assert (said["stock"]["copies of the gate"], said["fixed"]["copies of the gate"]) == ("4", "0")
    assert (said["stock"]["kernels of Mixer2"], said["fixed"]["kernels of Mixer2"]) == ("1", "3")
    assert float(said["fixed"]["ulps of Mixer2 from its native"]) <= 8  # two silus of 2 each, a root and three products
    assert said["stock"]["patch and plugin"] == ""
    assert said["fixed"]["patch and plugin"] == "source patch mixer2-groups, source patch strided-gate"
    for name in ("mixer2-groups", "strided-gate"):
        assert f"vLLM has {name} in its source" in logs["fixed"]
        assert f"vLLM has {name} in its source" not in logs["stock"]
