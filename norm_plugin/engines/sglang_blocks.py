"""Which blocks leave their sum to the next norm, before SGLang has layer boundaries (0.5.17).

There a block's sum is either left by a layer communicator, or completed by its last projection. Once sums may be left,
the communicators of all models do so, but SGLang has tested a few models only. Two would be wrong: Qwen3-Next leaves
the sum of its last layer too, which nobody completes, and where a norm of Qwen3-VL completes a sum, what images add is
lost. The projections of Llama, Qwen2 and Qwen3 leave none, though their sums go to the next norm and nowhere else.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from torch import Tensor, nn

from norm_plugin.engines.common import Forward, traced
from norm_plugin.engines.installed_hooks import InstalledHooks

#: A norm that completes its sum takes no post_residual_addition.
UNSAFE = "Qwen3VLMoeForConditionalGeneration"

#: Decoders by module, and the layers that they must have: nobody but the next norm sees what a block returns.
KNOWN = {f"sglang.srt.models.{name.lower()}": name for name in ("Llama", "Qwen2", "Qwen3")}

#: How SGLang marks the part of a sum. A norm of a communicator looks for it.
MARK = "_sglang_needs_allreduce_fusion"


def prepare(model: nn.Module, hooks: InstalledHooks) -> None:
    """Have the blocks of a model leave the sums that a norm can complete, and no others."""
    decoder = getattr(model, "model", None)
    name = KNOWN.get(type(decoder).__module__, "")
    known = f"{name}Model" == type(decoder).__name__
    if layers := [layer for layer in model.modules() if hasattr(layer, "layer_communicator")]:
        _keep(layers, type(model).__name__, known, hooks)
    if known:
        blocks = [block for block in getattr(decoder, "layers", ()) if type(block).__name__ == f"{name}DecoderLayer"]
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            if not hasattr(block, "layer_communicator"):
                _leave(decoder, block.self_attn, "o_proj", block.post_attention_layernorm, hooks)
            if following is not None:  # else the sum may go to another host, or to whoever asks for the last layer
                _leave(decoder, block.mlp, "down_proj", following.input_layernorm, hooks)


def _keep(layers: list[Any], model: str, known: bool, hooks: InstalledHooks) -> None:
    """Have the last layer keep its sum, and all where it is not known that they may leave it."""
    tested = importlib.import_module("sglang.srt.arg_groups.overrides")._FLASHINFER_ALLREDUCE_FUSION_ARCHS
    leaves = known or (model in tested and model != UNSAFE)
    for layer in layers[-1:] if leaves else layers:
        communicator = layer.layer_communicator
        hooks.on_undo(partial(setattr, communicator, "is_last_layer", communicator.is_last_layer))
        communicator.is_last_layer = True


def _leave(decoder: Any, block: Any, projection: str, norm: Any, hooks: InstalledHooks) -> None:
    """Have a block leave the sum of its last projection to a norm."""
    if getattr(block, projection).reduce_results:  # else a communicator or a boundary does it
        for part, ours in ((block, partial(_part, decoder, block, projection)), (norm, partial(_completed, norm))):
            part.forward = partial(ours, part.forward)
            hooks.on_undo(partial(delattr, part, "forward"))


def _part(decoder: Any, block: Any, projection: str, original: Forward, *args: Any, **named: Any) -> Any:
    """What a block returns. Projections with LoRA always complete their sum, and must where a layer is captured."""
    if traced():
        return original(*args, **named)
    x = args[0] if args else named["hidden_states"]
    left = type(getattr(block, projection)).__name__ == "RowParallelLinear" and not decoder.layers_to_capture
    left = left and _module("layers.communicator").apply_flashinfer_allreduce_fusion(x.shape[0])
    with _module("runtime_context").get_forward().scoped(fuse_mlp_allreduce=left):
        out = original(*args, **named)
    if left:
        setattr(out, MARK, True)
    return out


def _completed(norm: Any, original: Forward, x: Tensor, *args: Any, **named: Any) -> Any:
    """What a norm returns, which completes a sum first if x is part of one."""
    if traced() or not getattr(x, MARK, False):
        return original(x, *args, **named)
    setattr(x, MARK, False)
    return norm.forward_with_allreduce_fusion(x, *args, **named)


def _module(name: str) -> Any:
    return importlib.import_module(f"sglang.srt.{name}")
