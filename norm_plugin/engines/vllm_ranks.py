"""vLLM's all-reduces in one op with the norm that follows: where vLLM does not compile, and VLLM_BATCH_INVARIANT=1 too.

The all-reduce that ends a linear layer or experts is left pending (`ranks.pending`), if they stand in a block with
norms of their width. The norm that gets the pending sum takes the part of this rank. A layer whose sum something else
uses first is vLLM's again from its next call on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial, wraps
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from norm_plugin import ranks, settings
from norm_plugin.call import call
from norm_plugin.dispatch import Declined
from norm_plugin.engines import call_counts
from norm_plugin.engines.common import Forward, asked, traced
from norm_plugin.engines.installed_hooks import InstalledHooks
from norm_plugin.engines.model_layers import Layer, qualified
from norm_plugin.engines.vllm_layers import arguments_of_rms_norm, why_not
from norm_plugin.numerics import FP32
from norm_plugin.op import Op
from norm_plugin.ranks.ops import ALLREDUCE_ADD_RMSNORM, ALLREDUCE_NORM_ADD_NORM, ALLREDUCE_RMSNORM
from norm_plugin.ranks.pending import Pending

_NORMS = "vllm.model_executor.layers.layernorm"

#: The classes of norms, and their families.
NORMS = {"RMSNorm": "rmsnorm", "GemmaRMSNorm": "gemma"}

#: The classes with a method that ends in an all-reduce, by their modules.
REDUCING = {
    "vllm.model_executor.layers.linear": ("RowParallelLinear", "forward"),
    "vllm.model_executor.layers.fused_moe.runner.moe_runner": ("MoERunner", "_maybe_reduce_final_output"),
}


@dataclass
class Reducing:
    """A layer whose all-reduce may be left pending: over which group, why vLLM does it after all, and whether a norm
    has ever taken it. `multicast` says which parts vLLM adds up faster. `mark`: what its calls are counted by, as a
    weight may be moved or dropped."""

    group: str
    multicast: Callable[[Tensor], bool]
    why_not: str = ""
    fused: bool = False
    mark: Tensor = field(default_factory=lambda: torch.empty(1))

    def count(self, part: Tensor, reason: str) -> None:
        """Count an all-reduce that vLLM does."""
        call_counts.count(call_counts.ALLREDUCE, part, self.mark, reason)

    def used(self, part: Tensor, by: str) -> None:
        """Something has used the sum before a norm came."""
        reason = f"its sum goes to {by}"
        self.count(part, reason)
        if not self.fused:
            self.why_not = reason


_layers: WeakKeyDictionary[nn.Module, Reducing] = WeakKeyDictionary()
_workspaces: dict[str, tuple[int, ranks.Workspace]] = {}  # by group: the bytes of the widest row, and the workspace
_running = threading.local()  # `layer`: the one of these that this thread is in


def places(hooks: InstalledHooks) -> Iterator[tuple[str, str, Callable[[ModuleType], None]]]:
    """The modules of vLLM, what is hooked there, and what hooks it."""
    wanted = [name for name, family in NORMS.items() if asked(family)]
    if wanted:
        for module, (layer, method) in REDUCING.items():
            yield module, f"{layer} across ranks", partial(_replace_all_reduce, hooks, layer, method)
        yield _NORMS, "norms across ranks", partial(_replace_norms, hooks, wanted)


# --- the all-reduce -----------------------------------------------------------------------------------------------


def _replace_all_reduce(hooks: InstalledHooks, layer: str, method: str, module: ModuleType) -> None:
    def noted(original: Forward) -> Forward:
        @wraps(original)
        def forward(self: nn.Module, *args: Any, **named: Any) -> Any:
            found = None if traced() else _layers.get(self)
            if found is None:
                return original(self, *args, **named)
            _running.layer = found
            try:
                return original(self, *args, **named)
            finally:
                _running.layer = None

        return forward

    def pending(original: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        @wraps(original)
        def all_reduce(part: Tensor) -> Tensor:
            found: Reducing | None = None if traced() else getattr(_running, "layer", None)
            if found is None or part.requires_grad:
                return original(part)
            if reason := found.why_not or ("NVLink multicast is faster" if found.multicast(part) else ""):
                found.count(part, reason)
                return original(part)
            return Pending(part, original, partial(found.used, part), found)

        return all_reduce

    if hooks.replace_method(module, layer, method, noted):
        hooks.replace(f"all-reduce of {layer}", module, "tensor_model_parallel_all_reduce", pending)


# --- the norm -----------------------------------------------------------------------------------------------------


class Norm(NamedTuple):
    """A norm of a sum over ranks."""

    weight: Tensor | None
    group: str
    eps: float
    numerics: str
    gemma: bool

    def run(self, op: Op, part: Tensor, *tensors: Tensor | None) -> Any:
        """The result of one of our ops; raises Declined where a kernel was asked for and none can do it."""
        return call(op, (part, *tensors), (*self[1:], None), decline=True)


def _replace_norms(hooks: InstalledHooks, wanted: list[str], module: ModuleType) -> None:
    for name in wanted:
        if (layer := getattr(module, name, None)) is None:
            hooks.missing[name] = f"{module.__name__} has no {name}"
        else:
            hooks.replace(f"{name} across ranks", layer, "forward", partial(_of_pending, name))


def _of_pending(name: str, original: Forward) -> Forward:
    """The forward that takes what is pending, and else does as before."""

    @wraps(original)
    def forward(layer: Any, x: Tensor, residual: Tensor | None = None, *rest: Any, **others: Any) -> Any:
        if traced() or type(x) is not Pending:
            return original(layer, x, residual, *rest, **others)
        if type(residual) is Pending:
            residual = residual.total("the residual of a norm")
        reason = ""
        if not x.done:
            reason = why_not(rest, others, x.part, residual)
            answer = reason or _taken(partial(original, layer), name == "GemmaRMSNorm", layer, x, residual)
            if not isinstance(answer, str):
                return answer
            reason = f"a norm that is vLLM's: {answer}"
        return original(layer, x.total(reason), residual, *rest, **others)

    return forward


def _taken(
    original: Callable[[Tensor], Tensor], gemma: bool, layer: Any, x: Pending, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor] | str:
    """What the norm makes of a pending sum, or why not. The norm of a sum is pending too: the next norm may take it."""
    if residual is not None and residual.dtype != x.dtype:
        return f"x has dtype {x.dtype} and the residual {residual.dtype}"
    if gemma:
        norm = Norm(layer.weight, x.source.group, layer.variance_epsilon, FP32.name, True)
    else:
        arguments = arguments_of_rms_norm(layer, x.part, residual)
        if isinstance(arguments, str):
            return arguments
        weight, eps, numerics, size = arguments
        if size is not None:
            return "it takes the variance of part of a row"
        norm = Norm(weight, x.source.group, eps, numerics, False)
    post = x.source if isinstance(x.source, Norm) else None
    if residual is None:
        return "a norm of a norm" if post is not None else _norm_of_sum(original, norm, x)
    if post is not None and (post[1:] != norm[1:] or post.weight is None):
        return "it is of another kind than the norm before"
    tensors = (residual, norm.weight) if post is None else (residual, post.weight, norm.weight)
    op = ALLREDUCE_ADD_RMSNORM if post is None else ALLREDUCE_NORM_ADD_NORM
    try:
        answer: tuple[Tensor, Tensor] = norm.run(op, x.part, *tensors)
    except Declined as declined:
        return declined.reason
    for weight in tensors[1:]:
        call_counts.count(op.name, x.part, weight)
    if post is None:
        x.source.fused = True
    return answer


def _norm_of_sum(original: Callable[[Tensor], Tensor], norm: Norm, x: Pending) -> Pending:
    def reduce(part: Tensor) -> Tensor:
        try:
            normed: Tensor = norm.run(ALLREDUCE_RMSNORM, part, norm.weight)
        except Declined as declined:
            return original(x.total(f"a norm that is vLLM's: {declined.reason}"))
        call_counts.count(ALLREDUCE_RMSNORM.name, part, norm.weight)
        return normed

    x.source.fused = x.shared = True
    return Pending(x.part, reduce, lambda by: None, norm)


# --- once a model is loaded ---------------------------------------------------------------------------------------


def loaded(hooks: InstalledHooks, model: nn.Module, config: Any, compiled: set[int]) -> None:
    """Make ready for a model. Every rank of the group comes here, once it has loaded its part.

    `compiled`: the ids of the modules that vLLM compiles.
    """
    from vllm.distributed.parallel_state import get_tp_group, model_parallel_is_initialized

    if not model_parallel_is_initialized() or (tp := get_tp_group()).world_size == 1:
        return
    width = config.model_config.get_hidden_size()
    layers = dict(_before_norms(model, width, compiled))
    if not layers:
        return
    reason = "two forwards run at once" if config.parallel_config.use_ubatching else ""
    reason = reason or _prepared(hooks, tp.device_group, width, config.model_config.dtype, tp.device)
    for path, layer in layers.items():
        found = _layers[layer] = Reducing(tp.device_group.group_name, partial(_by_multicast, tp), reason)
        call_counts.name_layer(Layer(path, qualified(type(layer)), found.mark.data_ptr(), ""))
    hooks.on_undo(_layers.clear)
    hooks.on_undo(model.register_forward_hook(_nothing_pending).remove)


def _before_norms(model: nn.Module, width: int, compiled: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """The layers that end in an all-reduce, inside blocks that have norms of this width of their own."""
    modules = dict(model.named_modules())
    blocks = {
        path and f"{path}." for path, block in modules.items() if any(_is_norm(m, width) for m in block.children())
    }
    kinds = {name for name, _ in REDUCING.values()}
    for path, layer in modules.items():
        reducing = any(base.__name__ in kinds for base in type(layer).__mro__) and id(layer) not in compiled
        if reducing and getattr(layer, "output_size", width) == width and any(map(path.startswith, blocks)):
            yield path, layer


def _is_norm(module: nn.Module, width: int) -> bool:
    kinds = {base.__name__ for base in type(module).__mro__ if base.__module__ == _NORMS}
    return any(name in kinds and asked(NORMS[name]) for name in NORMS) and len(module.weight) == width  # type: ignore


def _prepared(hooks: InstalledHooks, group: Any, width: int, dtype: torch.dtype, device: torch.device) -> str:
    """Make the workspace of a group, as large as its widest model needs. Returns why vLLM must do the all-reduces all
    the same."""
    name, row_bytes = group.group_name, width * dtype.itemsize
    if name not in _workspaces or _workspaces[name][0] < row_bytes:
        _workspaces[name] = row_bytes, ranks.prepare(group, width=width, dtype=dtype, device=device)
        hooks.on_undo(partial(ranks.free, group))
        hooks.on_undo(_workspaces.clear)
    backend = settings.get().backend
    natively = backend == "native" or (backend == "auto" and device.type == "cpu")
    return "" if natively else _workspaces[name][1].reason


def _by_multicast(tp: Any, part: Tensor) -> bool:
    """Whether vLLM adds up so large a part by NVLink multicast, and nobody has asked for bits."""
    from vllm import envs

    custom, multicast = (getattr(tp.device_communicator, name, None) for name in ("ca_comm", "symm_mem_comm"))
    if multicast is None or multicast.disabled or getattr(envs, "VLLM_BATCH_INVARIANT", False):
        return False
    small = custom is not None and not custom.disabled and custom.should_custom_ar(part)
    return bool(not small and multicast.should_use_symm_mem(part))


def _nothing_pending(model: nn.Module, args: Any, output: Any) -> Any:
    """Whatever leaves a model is a sum: a CUDA graph that ends here must have made it."""

    def total(pending: Pending) -> Tensor:
        return pending.total("what the model returns")

    if isinstance(getattr(output, "tensors", None), dict):  # between the stages of a pipeline
        output.tensors = tree_map_only(Pending, total, output.tensors)
        return output
    return tree_map_only(Pending, total, output)
