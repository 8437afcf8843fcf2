"""The ops in plain PyTorch: they specify the kernels, and run where no kernel can."""

from norm_plugin.native.gated import _layer_norm_fwd_native, layernorm_fn_native, rmsnorm_fn_native
from norm_plugin.native.layer import simple_layernorm_native

__all__ = ["_layer_norm_fwd_native", "layernorm_fn_native", "rmsnorm_fn_native", "simple_layernorm_native"]
