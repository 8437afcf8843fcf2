"""TESTS ONLY. vLLM's gated kernels in Triton's interpreter, which vLLM turns off where Triton has no driver."""

import hashlib
import types

import triton.backends

triton.backends.backends["cpu"] = types.SimpleNamespace(driver=types.SimpleNamespace(is_active=lambda: True))
import vllm.triton_utils  # noqa: E402, F401 - it looks for a driver while it is imported

del triton.backends.backends["cpu"]
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from vllm.model_executor.layers.mamba import mamba_mixer2  # noqa: E402
from vllm.third_party.flash_linear_attention.ops import layernorm_guard  # noqa: E402

layernorm_guard.num_compute_units = lambda index: 4  # of a GPU; it chooses how many rows a program takes

T, H, N = 7, 4, 64
TORCH = torch.Generator().manual_seed(0)


class Copies(TorchDispatchMode):
    """Counts the copies of a gate: the interpreter moves whole storages, which are not [T, H, N]."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.clone.default and tuple(args[0].shape) == (T, H, N):
            self.seen += 1
        return func(*args, **(kwargs or {}))


def gates() -> None:
    digest, copies = hashlib.sha256(), 0
    for dtype in (torch.float32, torch.float16):
        projected = torch.randn(T, 3 * H * N, generator=TORCH).to(dtype)
        z = projected[:, H * N : 2 * H * N].unflatten(-1, (H, N))
        x, weight = torch.randn(T, H, N, generator=TORCH).to(dtype), torch.randn(N, generator=TORCH).to(dtype)
        for before, activation in ((True, "silu"), (False, "sigmoid")):
            with Copies() as counted:
                y = layernorm_guard.rmsnorm_fn(
                    x, weight, None, z=z, eps=1e-6, norm_before_gate=before, activation=activation
                )
            copies += counted.seen
            digest.update(y.numpy().tobytes())
    print(f"gate={digest.hexdigest()}\ncopies of the gate={copies}")


def groups() -> None:
    """The real methods on a stand-in for the module, which would need a process group."""
    kernel, kernels, error = mamba_mixer2.rms_norm_gated, 0, 0.0

    def counted(*args, **kwargs):
        nonlocal kernels
        kernels += 1
        return kernel(*args, **kwargs)

    mamba_mixer2.rms_norm_gated = counted
    layer = mamba_mixer2.Mixer2RMSNormGated
    for n_groups in (1, 2, 8):
        weight = torch.randn(256, generator=TORCH)
        one = types.SimpleNamespace(
            use_rms_norm=True, n_groups=n_groups, tp_size=1, group_size=256 // n_groups, variance_epsilon=1e-5,
            weight=weight, per_rank_hidden_size=256, tp_rank=0,
        )  # fmt: skip
        one.forward_native = types.MethodType(layer.forward_native, one)
        x, gate = torch.randn(5, 256, generator=TORCH), torch.randn(5, 512, generator=TORCH)[:, 256:]
        native = one.forward_native(x, gate)
        apart = (layer.forward_cuda(one, x, gate) - native).abs() / (torch.finfo(x.dtype).eps * native.abs())
        error = max(error, apart.max().item())
    print(f"kernels of Mixer2={kernels}\nulps of Mixer2 from its native={error}")


def plugin() -> None:
    from norm_plugin.engines import vllm as adapter
    from norm_plugin.engines.installed_hooks import installed

    adapter.register()
    print("patch and plugin=" + ", ".join(hook for hook in installed["vllm"].live if hook.startswith("source patch")))


gates()
groups()
plugin()
