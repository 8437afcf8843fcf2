"""The end of a block under tensor parallelism: all-reduce, add and norm in one op, at SGLang's own seam.

Before a block ends, SGLang asks a function by batch size whether its sum over ranks may be left to the next norm. Where
it may, the norm gets this rank's part, and `layernorm._forward_with_allreduce_fusion` completes both. SGLang says yes
only for FlashInfer's kernel. Here the answer is also yes where ours can do it, and then ours does.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial, wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from norm_plugin import ranks, settings
from norm_plugin.call import call
from norm_plugin.engines import call_counts, sglang_blocks, sglang_norms
from norm_plugin.engines.common import Answer, Forward, LeftToEngine, replacement, traced
from norm_plugin.engines.installed_hooks import InstalledHooks
from norm_plugin.engines.model_layers import Why
from norm_plugin.engines.sglang_norms import How
from norm_plugin.ranks import Workspace
from norm_plugin.ranks.ops import ALLREDUCE_ADD_RMSNORM

#: Where SGLang asks, since it has layer boundaries, and before.
QUESTIONS = {
    "sglang.srt.layers.layer_boundary.residual.add_norm": "flashinfer_ar_fusion_applies",
    "sglang.srt.layers.communicator": "apply_flashinfer_allreduce_fusion",
}
GROUPS = "sglang.srt.distributed.parallel_state"

#: The hook without which no sum may be left to a norm.
ANSWER = "all-reduce with a norm"

OP = ALLREDUCE_ADD_RMSNORM.name
NOT_AT_SEAM = "SGLang does not leave this sum to a norm"


class Seam:
    """What one process of SGLang may leave to us: everything in `norms`, unless `why_not` says why nothing."""

    def __init__(self, hooks: InstalledHooks) -> None:
        self.hooks = hooks
        self.coordinator: Any = None
        self.why_not = "no model is loaded"
        self.made: Workspace | None = None
        self.norms: dict[nn.Module, How | str] = {}  # how each of SGLang's norms with a seam is done, or why not

    # --- before a model is loaded -------------------------------------------------------------------------------

    def hook_question(self, module: ModuleType, hooks: InstalledHooks) -> None:
        """Replace the function that is asked, also where other modules have copied it already."""
        name = QUESTIONS[module.__name__]
        theirs: Callable[[int], bool] = getattr(module, name)

        @wraps(theirs)
        def applies(batch_size: int) -> bool:
            if not traced() and hooks.live and not self.why_not and batch_size > 0:
                return True
            return theirs(batch_size)

        for known, holder in list(sys.modules.items()):
            if known.startswith("sglang.") and getattr(holder, name, None) is theirs:
                hooks.replace("all-reduce left to a norm", holder, name, lambda _: applies)

    def hook_answer(self, module: ModuleType, hooks: InstalledHooks) -> None:
        """Replace the function in which a norm completes a sum."""

        def make(theirs: Forward) -> Forward:
            ours = replacement(hooks, (), apart, fused)

            @wraps(theirs)
            def complete(layer: Any, x: Tensor, residual: Tensor | None, *more: Any, **named: Any) -> Any:
                if self.why_not or residual is None:
                    return theirs(layer, x, residual, *more, **named)
                addition = more[0] if more else named.get("post_residual_addition")
                return ours(layer, x, residual, addition)

            return complete

        def apart(layer: Any, x: Tensor, residual: Tensor, addition: Tensor | None) -> Any:
            # whoever is at the seam counts on a new tensor for the sum
            return layer.forward(self.coordinator.all_reduce(x), residual.clone(), addition)

        def fused(layer: Any, x: Tensor, residual: Tensor, addition: Tensor | None) -> Answer:
            how = self.norms.get(layer, "its model was not loaded by a ModelRunner")
            if isinstance(how, str):
                return LeftToEngine(OP, how)
            if addition is not None:
                return LeftToEngine(OP, "an argument post_residual_addition")
            group = self.coordinator.device_group.group_name
            rest = (group, layer.variance_epsilon, how.numerics, how.gemma, None)
            answer: Answer = call(ALLREDUCE_ADD_RMSNORM, (x, residual, layer.weight), rest, decline=True)
            call_counts.count(OP, x, layer.weight)
            return answer

        hooks.replace(ANSWER, module, "_forward_with_allreduce_fusion", make)

    def hook_groups(self, module: ModuleType, hooks: InstalledHooks) -> None:
        """Count the all-reduces that no norm completes."""

        def count(result: Any, coordinator: Any, x: Tensor, *more: Any) -> None:
            if not traced() and hooks.live and coordinator is self.coordinator:
                call_counts.count(call_counts.ALLREDUCE, x, None, self.why_not or NOT_AT_SEAM)

        hooks.after("all-reduces apart", module.GroupCoordinator, "all_reduce", count)

    # --- once a model is loaded -----------------------------------------------------------------------------------

    def load(self, runner: Any, in_place: bool, why: Why) -> str:
        """Decide about a model, and make the memory that its ranks share. Every rank comes here, before any capture.
        Returns a line for the log; "" where there is one rank. `why` says of a norm why it has no hook."""
        context = importlib.import_module("sglang.srt.runtime_context")
        parallel, config = context.get_parallel(), runner.model_config
        if parallel.tp_size == 1:
            return ""
        self.coordinator = parallel.tp_group
        row = torch.empty(1, config.hidden_size, dtype=config.dtype)
        found = sglang_norms.at_seam(runner.model, row, in_place, why)
        self.norms |= found
        if self.why_not:  # what an earlier model leaves to us stays ours: its graphs are captured
            self.why_not = self._refusal(parallel, context.get_exec(), found) or self._prepare(runner)
        if not self.why_not:
            sglang_blocks.prepare(runner.model, self.hooks)
        told = f"SGLang's: {self.why_not}" if self.why_not else "ours where SGLang leaves a sum to a norm"
        return f"all-reduce over {parallel.tp_size} ranks with add and norm: {told}"

    def _refusal(self, parallel: Any, execution: Any, found: dict[nn.Module, How | str]) -> str:
        """Why no sum of a model can be ours, as far as is known without the memory."""
        if ANSWER not in self.hooks.live:
            return self.hooks.missing.get(ANSWER, "its norms have no hook")
        reasons = [how for how in found.values() if isinstance(how, str)]
        if len(reasons) == len(found):
            return reasons[0] if reasons else "SGLang leaves no sum to a norm of this model"
        theirs = execution.comm.flashinfer_allreduce_fusion_backend
        if theirs is not None and not execution.deterministic.enable_deterministic_inference:
            return f"SGLang completes sums in its norms itself (FlashInfer, {theirs})"
        if importlib.import_module("sglang.srt.layers.dp_attention").is_dp_attention_enabled():
            return "attention is data parallel"
        if getattr(parallel, "enable_attn_tp_input_scattered", False):
            return "attention gets a part of the rows on each rank (--enable-attn-tp-input-scattered)"
        over = {parallel.attn_tp_size, max(parallel.moe_tp_size, parallel.moe_ep_size)}
        if over != {parallel.tp_size}:
            return "attention or experts are not summed over all ranks of tensor parallelism"
        return ""

    def _prepare(self, runner: Any) -> str:
        """Make the memory, once. Without it SGLang's all-reduce and our norm are faster than our native op."""
        config, on_gpu = runner.model_config, runner.device == "cuda"
        if self.made is None:
            group = self.coordinator.device_group
            device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device(runner.device)
            self.made = ranks.prepare(group, width=config.hidden_size, dtype=config.dtype, device=device)
            self.hooks.on_undo(partial(ranks.free, group))
        native = settings.get().backend in (("native",) if on_gpu else ("native", "auto"))
        return "" if native else self.made.reason
