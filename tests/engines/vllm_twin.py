"""The vLLM child whose linear layers sum over ranks as the native twin does: python vllm_twin.py and the child's
arguments.

It is what our ops across ranks are held against, bit for bit. vLLM's own all-reduce on a CPU, in shared memory, has
other bits: it cuts a bf16 sum off where others round it. vLLM's own processes import this file again.
"""

from types import ModuleType

from torch import Tensor

from norm_plugin import groups
from norm_plugin.engines.on_import import after_import
from norm_plugin.native.ranks import allreduce
from norm_plugin.verify import vllm_child


def as_the_twin(linear: ModuleType) -> None:
    """Replace the all-reduce of vLLM's linear layers."""
    from vllm.distributed import get_tp_group

    def all_reduce(part: Tensor) -> Tensor:
        return allreduce(part, groups.enter(get_tp_group().device_group))

    linear.tensor_model_parallel_all_reduce = all_reduce  # type: ignore[attr-defined]


after_import("vllm.model_executor.layers.linear", as_the_twin)

if __name__ == "__main__":
    vllm_child.main()
