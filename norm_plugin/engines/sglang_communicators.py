"""Which feed-forwards leave their sum to the next layer, while SGLang's layers have communicators (0.5.17).

Once a sum may be left to a norm, SGLang lets the feed-forwards of every model do so, but it has tested a few models
only. Two would be wrong: Qwen3-Next leaves the sum of its last layer too, which nobody completes, and where a norm of
Qwen3-VL completes a sum, what images add is lost. Layer boundaries, which came later, need none of this.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from torch import Tensor, nn

from norm_plugin.engines.common import Forward
from norm_plugin.engines.installed_hooks import InstalledHooks

#: A norm that completes its sum takes no post_residual_addition.
UNSAFE = "Qwen3VLMoeForConditionalGeneration"
#: It leaves no sum by itself, and nobody but the next layer sees what its feed-forward returns.
QWEN3 = "Qwen3ForCausalLM"


def prepare(model: nn.Module, hooks: InstalledHooks) -> None:
    """Have the layers of a model leave the sums that their next layer can complete, and no others."""
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "layer_communicator")]
    if not layers:
        return
    overrides = importlib.import_module("sglang.srt.arg_groups.overrides")
    name = type(model).__name__
    leaves = name == QWEN3 or (name in overrides._FLASHINFER_ALLREDUCE_FUSION_ARCHS and name != UNSAFE)
    for layer in layers[-1:] if leaves else layers:  # a last layer completes its own sum
        communicator = layer.layer_communicator
        hooks.on_undo(partial(setattr, communicator, "is_last_layer", communicator.is_last_layer))
        communicator.is_last_layer = True
    if name == QWEN3:
        for layer in layers:
            layer.mlp.forward = partial(_feed_forward, model.model, layer, layer.mlp.forward)
            hooks.on_undo(partial(delattr, layer.mlp, "forward"))


def _feed_forward(decoder: Any, layer: Any, original: Forward, x: Tensor, forward_batch: Any) -> Tensor:
    """A feed-forward of Qwen3, which leaves its sum to the next layer. LoRA's projections always complete it, and
    layers whose output is captured must."""
    plain = type(layer.mlp.down_proj).__name__ == "RowParallelLinear" and not decoder.layers_to_capture
    leave = plain and layer.layer_communicator.should_fuse_mlp_allreduce_with_next_layer(forward_batch)
    context = importlib.import_module("sglang.srt.runtime_context")
    with context.get_forward().scoped(fuse_mlp_allreduce=leave):
        out: Tensor = original(x, forward_batch)
    if leave:
        out._sglang_needs_allreduce_fusion = True  # type: ignore[attr-defined]
    return out
