"""TESTS ONLY. Has vLLM on a CPU call the CUDA methods of its gated norms, which are what the patches change.

On a CPU vLLM calls forward_cpu, which is forward_native: the functions below forward_cuda would never run.
"""

import runpy

from vllm.model_executor.layers.layernorm import RMSNormGated
from vllm.model_executor.layers.mamba.mamba_mixer2 import Mixer2RMSNormGated

for layer in (RMSNormGated, Mixer2RMSNormGated):
    layer.forward_cpu = layer.forward_cuda

runpy.run_module("norm_plugin.verify.vllm_child", run_name="__main__", alter_sys=True)
