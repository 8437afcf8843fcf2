"""The real SGLang with patches: the tokens of stock."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

from norm_plugin.verify.outcome import Outcome
from tests.engines.runs import TOKENS, furthest, python
from tests.patches.engines import STAND_INS, folder, patched, run, same_tokens

ENGINE = "sglang"
MODELS = ("mamba2_groups",)
CHILD = ("-m", "norm_plugin.verify.sglang_child")
CLOSE = 2e-5  # as in test_vllm.py


@functools.cache
def site() -> Path:
    """The patched engine, and the plugin that has it call its CUDA method."""
    made = patched(ENGINE, folder(ENGINE) / "site", ["native-switch", "deterministic-add"])
    shutil.copy(STAND_INS / "sglang_cuda_methods.py", made)
    about = made / "sglang_cuda_methods-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang-cuda-methods\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[sglang.srt.plugins]\ncuda_methods = sglang_cuda_methods:register\n")
    return made


@functools.cache
def runs() -> tuple[Outcome, Outcome, Outcome, str]:
    """Stock; patched; patched with the plugin on, and the log of that."""
    flags = {"PYTHONPATH": str(site()), "USE_NATIVE_LAYERNORM": "1", "TRITON_INTERPRET": "1"}
    started = [
        run(ENGINE, MODELS, "float32", CHILD, **named)
        for named in (
            {"SGLANG_PLUGINS": "none", "TRITON_INTERPRET": "1"},
            {**flags, "SGLANG_PLUGINS": "cuda_methods"},
        )
    ]
    (stock,), (ours,) = (begun.outcomes() for begun in started)
    last = run(ENGINE, MODELS, "float32", CHILD, **flags, SGLANG_PLUGINS="norm_plugin")
    (both,) = last.outcomes()
    return stock, ours, both, last.log.read_text()


def test_the_tokens_of_stock() -> None:
    stock, ours, _, _ = runs()
    assert len(ours.answers[0].tokens) == TOKENS
    assert same_tokens(stock, ours)
    assert furthest(stock, ours) <= CLOSE


def test_the_patch_answered_every_gated_norm() -> None:
    stock, ours, _, _ = runs()
    assert [row for row in stock.rows if row["calls"]] == []
    called = [row for row in ours.rows if row["calls"]]
    assert [(row["op"], row["reason"], row["calls"]) for row in called] == [("gated_norm", "", TOKENS)] * 2


def test_patch_and_plugin_together_are_said() -> None:
    stock, _, both, log = runs()
    assert same_tokens(stock, both)
    for name in ("native-switch", "deterministic-add"):
        assert f"source patch {name}" in both.hooks
        assert f"sglang has {name} in its source" in log


def test_the_deterministic_add_in_the_interpreter() -> None:
    """The patched module's kernel and the patched forward_cuda beside forward_native, in SGLang's environment."""
    ran = subprocess.run(
        [python(ENGINE), STAND_INS / "sglang_kernels.py"], capture_output=True, text=True, cwd=folder(ENGINE),
        env={"TRITON_INTERPRET": "1", "PYTHONPATH": str(site()), "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = dict(line.split("=", 1) for line in ran.stdout.splitlines() if "=" in line)
    # one rounding may fall to the other side; in fp32 the sum's order, its square root and two products have their say
    worst = {name: float(said.pop(name)) for name in ("torch.float32", "torch.float16", "torch.bfloat16")}
    assert worst["torch.float32"] <= 4
    assert max(worst["torch.float16"], worst["torch.bfloat16"]) <= 1
    assert said == {
        "residuals differ": "0",
        "rows that depend on the batch": "0",
        "calls of the kernel": "48",
        "left to forward_native": "4",
    }
