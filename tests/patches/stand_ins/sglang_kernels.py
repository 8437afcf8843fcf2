"""TESTS ONLY. The deterministic mode's fused add in Triton's interpreter, and who takes it.

forward_cuda is called on the CPU; the mode and the target of its training partner are given in place of a server's.
"""

import types

import torch
from sglang.srt.batch_invariant_ops import batch_invariant_ops as ops
from sglang.srt.layers import layernorm

TORCH = torch.Generator().manual_seed(0)
fused = layernorm.fused_add_rms_norm_batch_invariant
calls = kept = 0


def counted(*args):
    global calls
    calls += 1
    return fused(*args)


assert fused is ops.fused_add_rms_norm_batch_invariant
layernorm.fused_add_rms_norm_batch_invariant = counted
layernorm.is_batch_invariant_mode_enabled = lambda: True
layernorm.get_exec = lambda: types.SimpleNamespace(deterministic=types.SimpleNamespace(rl_on_policy_target=None))


def drawn(shape, dtype):
    return torch.randn(shape, generator=TORCH).to(dtype)


def ulps(ours, native):
    """How many steps of the dtype lie between the two, at the most."""
    step = torch.finfo(native.dtype).eps * native.float().abs().clamp(min=torch.finfo(native.dtype).tiny)
    return ((ours.float() - native.float()).abs() / step).max().item()


worst = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), 0.0)
differ = depend = 0
for dtype in worst:
    for width in (64, 1000, 4096, 5120):
        for shape in ((9,), (3, 3)):
            for more in (False, True):
                layer = layernorm.RMSNorm(width, eps=1e-5).to(dtype)
                layer.weight.data = drawn(width, dtype)
                x, residual = drawn((*shape, width), dtype), drawn((*shape, 2 * width), dtype)[..., :width]
                post = drawn((*shape, width), dtype) if more else None
                kept_x, kept_residual = x.clone(), residual.clone()
                out, new = layer.forward_cuda(x, residual, post)
                want, new_want = layer.forward_native(x, residual, post)
                assert (out.shape, out.dtype, new.dtype) == (want.shape, want.dtype, new_want.dtype)
                assert torch.equal(x, kept_x)
                assert torch.equal(residual, kept_residual)
                worst[dtype] = max(worst[dtype], ulps(out, want))
                differ += not torch.equal(new, new_want)
                rows = [t if t is None else t.reshape(-1, width) for t in (x, residual, post)]
                for i in (0, 8):
                    alone = fused(*(t[i : i + 1] for t in rows[:2]), layer.weight.data, 1e-5,
                                  None if post is None else rows[2][i : i + 1])  # fmt: skip
                    depend += not torch.equal(alone[0][0], out.reshape(-1, width)[i])

in_all = calls
x, residual = drawn((2, 64), torch.bfloat16), drawn((2, 64), torch.bfloat16)
for how in ({"cast_x_before_out_mul": True}, {"fp32_residual": True}, {"override_orig_dtype": torch.float32}):
    layer = layernorm.RMSNorm(64, **how)
    for one, other in zip(layer.forward_cuda(x, residual), layer.forward_native(x, residual), strict=True):
        assert torch.equal(one, other)
    kept += calls == in_all
layernorm.get_exec = lambda: types.SimpleNamespace(deterministic=types.SimpleNamespace(rl_on_policy_target="fsdp"))
layernorm.RMSNorm(64).forward_cuda(x, residual)
kept += calls == in_all

for dtype, most in worst.items():
    print(f"{dtype}={most}")
print(f"residuals differ={differ}\nrows that depend on the batch={depend}")
print(f"calls of the kernel={in_all}\nleft to forward_native={kept}")
