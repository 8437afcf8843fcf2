"""The function that a patched engine calls, and what it does when the flags or the package are wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from norm_plugin.engines import call_counts, patched
from norm_plugin.native import _layer_norm_fwd_native
from norm_plugin.patching import site as sites
from norm_plugin.patching import work
from tests.patches.conftest import Site

T, H, N = 5, 4, 32


@pytest.fixture(autouse=True)
def _counted_from_zero() -> None:
    call_counts.reset()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x by rows, its weight, and a gate that is a slice of a wider projection."""
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(T, 3 * H * N, generator=generator)
    return (
        torch.randn(T * H, N, generator=generator),
        torch.randn(N, generator=generator),
        projected[:, H * N : 2 * H * N].unflatten(-1, (H, N)),
    )


@pytest.mark.parametrize("how", [(None, True, True, "swish"), (8, False, False, "sigmoid")])
def test_the_native_function_with_either_form_of_the_gate(how: tuple[int | None, bool, bool, str]) -> None:
    x, weight, z = inputs()
    want = _layer_norm_fwd_native(x, weight, None, 1e-5, z.reshape(x.shape), None, *how)
    for gate in (z, z.reshape(x.shape)):
        got = patched.layer_norm_fwd(x, weight, None, 1e-5, gate, None, *how)
        for ours, theirs in zip(got, want, strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert call_counts.calls(patched.OP) == 2


def test_out_is_written_and_returned() -> None:
    x, weight, z = inputs()
    out = torch.empty_like(x)
    y, _, _ = patched.layer_norm_fwd(x, weight, None, 1e-5, z, out)
    assert y is out
    assert torch.equal(out, patched.layer_norm_fwd(x, weight, None, 1e-5, z)[0])


def test_what_stays_with_the_engine_is_counted_with_its_reason() -> None:
    x, weight, _ = inputs()
    patched.kept(x, weight, "FP8 output")
    assert call_counts.calls(patched.OP) == 0
    assert call_counts.calls(patched.OP, "FP8 output") == 1


def test_it_can_be_traced() -> None:
    x, weight, z = inputs()

    def norm(x: torch.Tensor) -> torch.Tensor:
        return patched.layer_norm_fwd(x, weight, None, 1e-5, z, None, None, True, True, "silu")[0]

    traced = torch.compile(norm, backend="eager", fullgraph=True)(x)
    assert torch.equal(traced, norm(x))


def inserted(folder: Path, flag: str | None, norm_plugin: bool) -> subprocess.CompletedProcess[str]:
    """What the lines before the function do, in a Python of their own: the rest of the module wants a GPU."""
    text = (folder / "sglang/kernels/ops/attention/fla/layernorm_gated.py").read_text()
    lines = text[text.index("# norm_plugin, native-") : text.index("def _layer_norm_fwd(")]
    without = [] if norm_plugin else ["-S"]  # no site-packages, so no norm_plugin
    return subprocess.run(
        [sys.executable, *without, "-c", f"{lines}\nprint(_norm_plugin)"], capture_output=True, text=True, cwd=folder,
        env={} if flag is None else {"USE_NATIVE_LAYERNORM": flag},
    )  # fmt: skip


def test_the_switch(site: Site) -> None:
    folder = site("sglang", "sglang==0.5.23")
    work.apply(sites.find("sglang", folder), ["native-switch"])
    for flag in (None, "0"):
        assert inserted(folder, flag, norm_plugin=True).stdout == "None\n"
        assert inserted(folder, flag, norm_plugin=False).stdout == "None\n"
    assert "norm_plugin.engines.patched" in inserted(folder, "1", norm_plugin=True).stdout
    misspelt = inserted(folder, "true", norm_plugin=True)
    assert misspelt.returncode != 0
    assert "USE_NATIVE_LAYERNORM='true' is not one of its values: 0, 1" in misspelt.stderr
    assert "ModuleNotFoundError" in inserted(folder, "1", norm_plugin=False).stderr


def test_the_direct_replacement(site: Site) -> None:
    folder = site("sglang", "sglang==0.5.23")
    work.apply(sites.find("sglang", folder), ["native-direct"])
    assert "norm_plugin.engines.patched" in inserted(folder, None, norm_plugin=True).stdout
    without = inserted(folder, None, norm_plugin=False)
    assert without.stdout == "None\n"
    assert "norm_plugin, which is not installed: the Triton kernel stays" in without.stderr
