"""The vLLM child with vLLM's own norms as opaque ops in compiled code: python vllm_opaque.py and the child's arguments.

It is what NORM_PLUGIN_SCOPE=all does, with vLLM's PyTorch in the place of ours. Inductor then generates the same code
around the norms, and both norms call the same functions of PyTorch, so the answers have the same bits on every
processor. vLLM's compiled code as it is has other bits: Inductor sums a row in an order of its own.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm import envs
from vllm.model_executor.layers.layernorm import LayerNorm, RMSNorm
from vllm.model_executor.layers.mamba.mamba_mixer2 import Mixer2RMSNormGated

from norm_plugin.verify import vllm_child

#: The norms of the model that runs, as they were made: an op is told which one it is by its place here.
LAYERS: list[nn.Module] = []


@torch.library.custom_op("vllm_opaque::norm", mutates_args=())
def norm(inputs: list[Tensor], outputs: int, layer: int) -> list[Tensor]:
    """What the layer's own PyTorch answers."""
    found = LAYERS[layer].forward_native(*inputs)
    return [found] if outputs == 1 else list(found)


@norm.register_fake
def _(inputs: list[Tensor], outputs: int, layer: int) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs[:outputs]]


def opaque(kind: type[nn.Module]) -> None:
    """Put the op into the forward of a class of norms."""
    begin = kind.__init__

    def __init__(self: Any, *args: Any, **named: Any) -> None:
        begin(self, *args, **named)
        self.place_in_layers = len(LAYERS)
        LAYERS.append(self)

    def forward(self: Any, *inputs: Tensor) -> Any:
        outputs = len(inputs) if kind is RMSNorm else 1  # a sum with the residual comes out as well, a gate does not
        found = torch.ops.vllm_opaque.norm(list(inputs), outputs, self.place_in_layers)
        return found[0] if outputs == 1 else tuple(found)

    kind.__init__, kind.forward = __init__, forward  # type: ignore[method-assign]


def one_model(run: Any) -> Any:
    """vllm_child.run, with places that begin at 0: they stand in compiled code, which vLLM keeps for the next run."""

    def counted(*args: Any) -> Any:
        LAYERS.clear()
        return run(*args)

    return counted


if __name__ == "__main__":
    envs.environment_variables["VLLM_OPAQUE_NORMS"] = Path(__file__).read_text  # into the key of what vLLM keeps
    for kind in (RMSNorm, LayerNorm, Mixer2RMSNormGated):
        opaque(kind)
    vllm_child.run = one_model(vllm_child.run)
    vllm_child.main()
