"""SGLang 0.5.17 to 0.5.23: what is hooked, when, and what the log says of it.

SGLang calls `register` in each of its processes before it imports a model. Methods are replaced on SGLang's classes, so
its subclasses, its pins and its torch.compile mode keep their meaning; `KernelBackend.PLUGIN` would go before a
subclass's own `forward_cuda`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
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
    model_layers,
    qk_norms,
    report_file,
    sglang_gated,
    sglang_norms,
    source_patches,
)
from norm_plugin.engines.common import asked, traced
from norm_plugin.engines.installed_hooks import Record
from norm_plugin.engines.on_import import after_import
from norm_plugin.version import __version__

log = logging.getLogger("norm_plugin")

_NORMS = "sglang.srt.layers.layernorm"
_GATED = ("sglang.kernels.ops.attention.fla", "sglang.srt.layers.attention.fla")  # since 0.5.16, before
_MIXER2 = "sglang.srt.layers.attention.mamba.mixer2_rms_norm_gated"
_ALL_REDUCE = "sglang.srt.layers.flashinfer_comm_fusion"
_QK_NORM = "sglang.srt.models.utils"
_RUNNER = "sglang.srt.model_executor.model_runner"

_record: Record | None = None


def register() -> None:
    """The entry point in the group sglang.srt.plugins; may be called again."""
    global _record
    try:
        backend = settings.get().backend
    except settings.SettingError as error:  # of any other exception SGLang writes a line and goes on without us
        raise SystemExit(f"norm_plugin: {error}") from error
    if backend == "off" or _record is not None:
        return
    calls.prepare()
    record = _record = Record("sglang", _version("sglang"))
    source_patches.note(record, "sglang")
    report_file.warn_if_unwritable()
    for module, hook in _hooks():
        record.on_undo(after_import(module, partial(_apply, hook, record)))


def undo() -> None:
    """SGLang as it was."""
    global _record
    if _record is not None:
        _record.undo()
    _record = None


def record() -> Record | None:
    """What is hooked in this process, or None where nothing was asked for."""
    return _record


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # a source tree on the PYTHONPATH
        return "of unknown version"


def _hooks() -> list[tuple[str, Callable[[ModuleType, Record], None]]]:
    gated = {"layernorm_gated": sglang_gated.hook_layernorm_gated, "fused_norm_gate": sglang_gated.hook_fused_norm_gate}
    return [
        (_NORMS, _hook_norms),
        *((f"{package}.{name}", _on_known_platforms(hook)) for package in _GATED for name, hook in gated.items()),
        (_MIXER2, _hook_mixer2),
        (_ALL_REDUCE, _count_all_reduce),
        (_QK_NORM, _count_qk_norm),
        (_RUNNER, _hook_loading),
    ]


def _apply(hook: Callable[[ModuleType, Record], None], record: Record, module: ModuleType) -> None:
    """A hook that does not fit this version of SGLang leaves SGLang's norm, and says so."""
    try:
        hook(module, record)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        record.missed(module.__name__, f"{type(error).__name__}: {error}")


# --- where SGLang dispatches to -----------------------------------------------------------------------------------


def _method() -> str:
    """The method that SGLang calls on this machine; "" where norm_plugin has nothing tested to put there."""
    utils = importlib.import_module("sglang.srt.utils")
    if utils.is_cuda():
        return "forward_cuda"
    others = [name for name in ("is_hip", "is_npu", "is_xpu", "is_musa") if getattr(utils, name, bool)()]
    if others or utils.cpu_has_amx_support():
        return ""
    return "forward_native"


def _hook_norms(module: ModuleType, record: Record) -> None:
    if method := _method():
        sglang_norms.hook(module, record, method)
    else:
        record.missed(module.__name__, "this machine has norms of its own (AMX, ROCm, NPU, XPU or MUSA)")


def _on_known_platforms(
    hook: Callable[[ModuleType, Record], None],
) -> Callable[[ModuleType, Record], None]:
    return lambda module, record: hook(module, record) if _method() else None


def _hook_mixer2(module: ModuleType, record: Record) -> None:
    if method := _method():
        sglang_gated.hook_mixer2(module, record, method)


# --- what stays SGLang's, and is counted --------------------------------------------------------------------------


def _count_all_reduce(module: ModuleType, record: Record) -> None:
    """The add and norm that a kernel does together with an all-reduce."""

    def make(original: Any) -> Any:
        def flashinfer_allreduce_residual_rmsnorm(*args: Any, **named: Any) -> Any:
            result = original(*args, **named)
            if not traced() and result[0] is not None:
                call_counts.count("fused_add_rmsnorm", result[0], named.get("weight"), "fused with an all-reduce")
            return result

        return flashinfer_allreduce_residual_rmsnorm

    if asked("rmsnorm") or asked("gemma"):
        record.replace("fused with an all-reduce", module, "flashinfer_allreduce_residual_rmsnorm", make)


def _count_qk_norm(module: ModuleType, record: Record) -> None:
    """The norms of q and k that SGLang's one kernel does in place."""

    def make(original: Any) -> Any:
        def fused_inplace_qknorm(*args: Any, **named: Any) -> Any:
            if not traced():
                for x, weight in (("q", "q_weight"), ("k", "k_weight")):
                    if isinstance(named.get(x), Tensor):
                        call_counts.count("rmsnorm", named[x], named.get(weight), "one kernel for q and k")
            return original(*args, **named)

        return fused_inplace_qknorm

    if asked("qknorm") and hasattr(module, "fused_inplace_qknorm"):
        record.replace("one kernel for q and k", module, "fused_inplace_qknorm", make)


def _count_torch(model: nn.Module) -> None:
    """torch.nn's norms, which are PyTorch's and not SGLang's to replace."""
    ops = {nn.LayerNorm: "layernorm", nn.RMSNorm: "rmsnorm"}

    def count(layer: Any, args: tuple[Any, ...]) -> None:
        if args and not traced() and _record is not None:
            call_counts.count(ops[type(layer)], args[0], layer.weight, f"torch.nn.{type(layer).__name__}")

    for layer in model.modules():
        if type(layer) in ops:
            layer.register_forward_pre_hook(count)


# --- once a model is loaded ---------------------------------------------------------------------------------------


def _hook_loading(module: ModuleType, record: Record) -> None:
    def make(original: Any) -> Any:
        def load_model(self: Any, *args: Any, **named: Any) -> Any:
            result = original(self, *args, **named)
            if record is _record:
                _loaded(self.model, record, str(getattr(getattr(self, "model_config", None), "model_path", "")))
            return result

        return load_model

    record.replace("layer names", module.ModelRunner, "load_model", make)


def _loaded(model: nn.Module, record: Record, called: str) -> None:
    """By now SGLang's logger is set up, and an error stops the server where the user sees it."""
    qk_norms.learn(model)
    call_counts.name_layers(model, partial(_why, record), called)
    _count_torch(model)
    source_patches.warn(record)
    for hook, reason in record.missing.items():
        log.warning("norm_plugin: %s stays as it is: %s", hook, reason)
    if record.missing and settings.get().strict:
        raise BackendError(f"NORM_PLUGIN_STRICT=1, and these hooks are missing: {record.missing}.")
    layers = model_layers.described(model_layers.norms(model, partial(_why, record))) or "none"
    log.info("norm_plugin %s, %s in %s; norm layers: %s", __version__, _asked_for(), record.line(), layers)


def _why(record: Record, layer: nn.Module) -> str:
    """Why no hook will meet a layer."""
    kind, method = type(layer), _method()
    families = next((families for base in kind.__mro__ if (families := _families(base))), ())
    if not families:
        return model_layers.not_hooked(kind)
    family = qk_norms.family(layer, families[0])
    if not asked(family):
        return model_layers.left_out(family)
    modules = {base.__module__ for base in kind.__mro__}
    for missing, reason in record.missing.items():
        if missing in modules or missing == kind.__name__:
            return reason
    if kind.__module__.startswith(_GATED):  # it calls a function that is hooked
        return ""
    return "" if model_layers.is_ours(kind, method) else model_layers.overridden(kind, method)


def _families(kind: type) -> tuple[str, ...]:
    """Those that layers of a class of SGLang's may be; () of one that is not hooked."""
    if kind.__module__ == _NORMS:
        return next((families for cls, families, _ in sglang_norms.CLASSES if cls == kind.__name__), ())
    return ("mixer2",) if kind.__module__ == _MIXER2 else ("gated",) if kind.__module__.startswith(_GATED) else ()


def _asked_for() -> str:
    backend = settings.get().backend
    where = "cuda" if torch.cuda.is_available() else "cpu"
    return f"backend {backend} on {where}"
