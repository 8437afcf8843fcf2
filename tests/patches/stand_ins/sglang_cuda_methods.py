"""TESTS ONLY. A plugin that has SGLang on a CPU call the CUDA method of Mixer2's norm, below which a patch is.

Of this method's two ways the one to forward_native is for groups across ranks, and is not taken here.
"""


def register() -> None:
    from sglang.srt.layers.attention.mamba.mixer2_rms_norm_gated import Mixer2RMSNormGated

    Mixer2RMSNormGated.forward_native = Mixer2RMSNormGated.forward_cuda
