"""norm_plugin in SGLang 0.5.17 to 0.5.23: what is hooked, when, and what the log says about it.

SGLang calls `register` in each of its processes before it imports a model. Methods are replaced on SGLang's classes, so
SGLang's subclasses, pinned backends and torch.compile mode work as before. `KernelBackend.PLUGIN` is no alternative: it
takes precedence over a subclass's own `forward_cuda`.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from norm_plugin import settings
from norm_plugin.dispatch import BackendError
from norm_plugin.engines import (
    call_counts,
    calls,
    installed_hooks,
    model_layers,
    qk_norms,
    report_file,
    sglang_gated,
    sglang_norms,
    sglang_ranks,
    source_patches,
    versions,
)
from norm_plugin.engines.common import asked, traced
from norm_plugin.engines.installed_hooks import InstalledHooks, installed
from norm_plugin.engines.on_import import after_import
from norm_plugin.version import __version__

log = logging.getLogger("norm_plugin")

_NORMS = "sglang.srt.layers.layernorm"
_GATED = ("sglang.kernels.ops.attention.fla", "sglang.srt.layers.attention.fla")  # since 0.5.16, before
_MIXER2 = "sglang.srt.layers.attention.mamba.mixer2_rms_norm_gated"
_ALL_REDUCE = "sglang.srt.layers.flashinfer_comm_fusion"
_QK_NORM = "sglang.srt.models.utils"
_RUNNER = "sglang.srt.model_executor.model_runner"

#: Sets one kind of hooks in a module of SGLang's.
HookModule = Callable[[ModuleType, InstalledHooks], None]


def register() -> None:
    """The entry point of the group sglang.srt.plugins. It may be called again."""
    try:
        backend = settings.get().backend
    except settings.SettingError as error:  # after any other exception SGLang goes on without us
        raise SystemExit(f"norm_plugin: {error}") from error
    if backend == "off" or "sglang" in installed:
        return
    calls.prepare()
    hooks = installed["sglang"] = InstalledHooks("sglang", versions.version_of("sglang", "of unknown version"))
    source_patches.note(hooks, "sglang")
    report_file.warn_if_unwritable()
    seam = sglang_ranks.Seam(hooks)
    for module, hook in _modules(seam).items():
        hooks.on_undo(after_import(module, partial(_apply, hook, hooks)))


#: Restores SGLang.
undo = partial(installed_hooks.undo, "sglang")


def _modules(seam: sglang_ranks.Seam) -> dict[str, HookModule]:
    def hook_norms(module: ModuleType, hooks: InstalledHooks) -> None:
        sglang_norms.hook(module, hooks, _method())
        seam.hook_answer(module, hooks)

    norms: dict[str, HookModule] = {
        _NORMS: hook_norms,
        _MIXER2: lambda module, hooks: sglang_gated.hook_mixer2(module, hooks, _method()),
        **{f"{package}.layernorm_gated": sglang_gated.hook_layernorm_gated for package in _GATED},
        **{f"{package}.fused_norm_gate": sglang_gated.hook_fused_norm_gate for package in _GATED},
    }
    counted = {_ALL_REDUCE: _count_all_reduce, _QK_NORM: _count_qk_norm}
    tested = {name: _where_tested(hook) for name, hook in norms.items()}
    across = {**dict.fromkeys(sglang_ranks.QUESTIONS, seam.hook_question), sglang_ranks.GROUPS: seam.hook_groups}
    return {**tested, **counted, **across, _RUNNER: partial(_hook_loading, seam)}


def _apply(hook: HookModule, hooks: InstalledHooks, module: ModuleType) -> None:
    """Set a hook. One that does not fit this version of SGLang is missing, and SGLang's norm stays."""
    try:
        hook(module, hooks)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        hooks.missing[module.__name__] = f"{type(error).__name__}: {error}"


# --- where SGLang dispatches to -----------------------------------------------------------------------------------


def _method() -> str:
    """The method that SGLang's layers call on this machine; "" where no replacement of it has been tested."""
    utils = importlib.import_module("sglang.srt.utils")
    if utils.is_cuda():
        return "forward_cuda"
    others = [name for name in ("is_hip", "is_npu", "is_xpu", "is_musa") if getattr(utils, name, bool)()]
    if others or utils.cpu_has_amx_support():
        return ""
    return "forward_native"


def _where_tested(hook: HookModule) -> HookModule:
    """The hook; on a machine where no replacement has been tested, it is missing."""

    def hook_or_miss(module: ModuleType, hooks: InstalledHooks) -> None:
        if _method():
            hook(module, hooks)
        else:
            hooks.missing[module.__name__] = "this machine has norms of its own (AMX, ROCm, NPU, XPU or MUSA)"

    return hook_or_miss


# --- what stays SGLang's, and is counted --------------------------------------------------------------------------


def _count_all_reduce(module: ModuleType, hooks: InstalledHooks) -> None:
    """Count the add and norm that SGLang fuses with an all-reduce in one kernel."""

    def count(result: Any, *args: Any, **named: Any) -> None:
        if not traced() and result[0] is not None:
            call_counts.count("fused_add_rmsnorm", result[0], named.get("weight"), "fused with an all-reduce")

    if asked("rmsnorm") or asked("gemma"):
        hooks.after("fused with an all-reduce", module, "flashinfer_allreduce_residual_rmsnorm", count)


def _count_qk_norm(module: ModuleType, hooks: InstalledHooks) -> None:
    """Count the norms of q and k that one kernel of SGLang computes in place."""

    def count(result: Any, *args: Any, **named: Any) -> None:
        for x, weight in (("q", "q_weight"), ("k", "k_weight")):
            if not traced() and isinstance(named.get(x), Tensor):
                call_counts.count("rmsnorm", named[x], named.get(weight), "one kernel for q and k")

    if asked("qknorm") and hasattr(module, "fused_inplace_qknorm"):
        hooks.after("one kernel for q and k", module, "fused_inplace_qknorm", count)


def _count_torch(model: nn.Module, hooks: InstalledHooks) -> None:
    """Count the norms of torch.nn in a model: they are PyTorch's, and stay."""
    ops = {nn.LayerNorm: "layernorm", nn.RMSNorm: "rmsnorm"}

    def count(layer: Any, args: tuple[Any, ...]) -> None:
        if args and not traced() and hooks.live:
            call_counts.count(ops[type(layer)], args[0], layer.weight, f"torch.nn.{type(layer).__name__}")

    for layer in model.modules():
        if type(layer) in ops:
            layer.register_forward_pre_hook(count)


# --- once a model is loaded ---------------------------------------------------------------------------------------


def _hook_loading(seam: sglang_ranks.Seam, module: ModuleType, hooks: InstalledHooks) -> None:
    hooks.after("layer names", module.ModelRunner, "load_model", partial(_loaded, hooks, seam))


def _loaded(hooks: InstalledHooks, seam: sglang_ranks.Seam, result: Any, runner: Any, *args: Any, **named: Any) -> None:
    """Learn the layers of a model and log what is hooked: by now SGLang logs, and an error stops the server."""
    if not hooks.live:
        return
    model: nn.Module = runner.model
    qk_norms.learn(model)
    path = getattr(getattr(runner, "model_config", None), "model_path", "")
    call_counts.name_layers(model, partial(_why, hooks), str(path))
    _count_torch(model, hooks)
    source_patches.warn(hooks)
    for hook, reason in hooks.missing.items():
        log.warning("norm_plugin: %s stays as it is: %s", hook, reason)
    if hooks.missing and settings.get().strict:
        raise BackendError(f"NORM_PLUGIN_STRICT=1, and these hooks are missing: {hooks.missing}.")
    layers = model_layers.described(model_layers.norms(model, partial(_why, hooks))) or "none"
    on = f"backend {settings.get().backend} on {'cuda' if torch.cuda.is_available() else 'cpu'}"
    log.info("norm_plugin %s, %s in %s; norm layers: %s", __version__, on, hooks.line(), layers)
    if across := seam.load(runner, _method() == "forward_cuda", partial(_why, hooks)):
        log.info("norm_plugin: %s", across)


def _why(hooks: InstalledHooks, layer: nn.Module) -> str:
    """Why a layer has no hook."""
    kind = type(layer)
    families = next((families for base in kind.__mro__ if (families := _families(base))), ())
    names = {kind.__name__, *(base.__module__ for base in kind.__mro__)}
    missing = next((reason for hook, reason in hooks.missing.items() if hook in names), "")
    calls_a_function = kind.__module__.startswith(_GATED)
    return model_layers.why_no_hook(layer, families, missing, "" if calls_a_function else _method())


def _families(kind: type) -> tuple[str, ...]:
    """The families that the layers of a class may belong to; () if the class is not hooked."""
    if kind.__module__ == _NORMS:
        families, _ = sglang_norms.CLASSES.get(kind.__name__, ((), None))
        return families
    return ("mixer2",) if kind.__module__ == _MIXER2 else ("gated",) if kind.__module__.startswith(_GATED) else ()
