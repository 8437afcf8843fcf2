"""norm_plugin in vLLM: the entry point of the group vllm.general_plugins, which vLLM calls in each of its processes.

The `forward` of vLLM's norm classes is replaced. While vLLM's compiler traces it, the original runs, so Inductor and
the fusion passes see what they see without us. NORM_PLUGIN_SCOPE=all puts our ops into compiled code too, through a
provider of vLLM's IR if it has one.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from norm_plugin import dispatch, settings, split
from norm_plugin.dispatch import BackendError
from norm_plugin.engines import (
    call_counts,
    calls,
    installed_hooks,
    model_layers,
    qk_norms,
    report_file,
    source_patches,
    vllm_ir,
    vllm_layers,
    vllm_ranks,
)
from norm_plugin.engines.common import Answer, Forward, asked, replacement
from norm_plugin.engines.installed_hooks import InstalledHooks, installed
from norm_plugin.engines.on_import import after_import
from norm_plugin.engines.versions import fingerprint
from norm_plugin.op import Op

log = logging.getLogger("norm_plugin")


class Hook(NamedTuple):
    """A class of norm layers (or a `function`), the families it may belong to, and what runs instead of its forward.

    `in_ir`: vLLM's IR has an op for it.
    """

    families: tuple[str, ...]
    module: str
    layer: str
    ours: Callable[..., Answer]
    in_ir: bool = False
    function: bool = False


_NORMS = "vllm.model_executor.layers.layernorm"
_KDA = "vllm.third_party.flash_linear_attention.ops.kda"
_FLA = "vllm.third_party.flash_linear_attention.ops.layernorm_guard"
_MIXER2 = "vllm.model_executor.layers.mamba.mamba_mixer2"
_LOADERS = "vllm.model_executor.model_loader"

HOOKS = (
    Hook(("rmsnorm", "qknorm"), _NORMS, "RMSNorm", vllm_layers.rms_norm, in_ir=True),
    Hook(("gemma", "qknorm"), _NORMS, "GemmaRMSNorm", vllm_layers.gemma_rms_norm, in_ir=True),
    Hook(("layernorm",), _NORMS, "LayerNorm", vllm_layers.layer_norm),
    Hook(("gated",), _NORMS, "RMSNormGated", vllm_layers.rms_norm_gated),
    Hook(("gated",), _KDA, "FusedRMSNormGated", vllm_layers.fused_rms_norm_gated),
    Hook(("gated",), _FLA, "layernorm_fn", vllm_layers.fla_layer_norm, function=True),
    Hook(("gated",), _FLA, "rmsnorm_fn", vllm_layers.fla_rms_norm, function=True),
    Hook(("mixer2",), _MIXER2, "Mixer2RMSNormGated", vllm_layers.mixer2_rms_norm_gated),
)


def register() -> None:
    """Hook vLLM, if the flags say so. It may be called again. It raises only for a wrong or strict flag."""
    wanted = settings.get()
    if wanted.backend == "off" or "vllm" in installed:
        return
    import vllm

    hooks = installed["vllm"] = InstalledHooks("vLLM", vllm.__version__)
    _join_log(hooks)
    try:
        _install(hooks, wanted)
    except (AttributeError, ImportError, TypeError, ValueError, AssertionError) as error:  # a vLLM of another build
        hooks.undo()
        hooks.missing["everything"] = f"{type(error).__name__}: {error}"
    source_patches.note(hooks, "vllm")
    source_patches.warn(hooks)
    _say_what_is_missing(hooks)
    report_file.warn_if_unwritable()
    _say_once_vllm_logs(hooks, wanted)


def _say_what_is_missing(hooks: InstalledHooks) -> None:
    """Warn once of each hook that this vLLM does not have; under NORM_PLUGIN_STRICT=1 raise."""
    for hook, reason in hooks.missing.items():
        dispatch.log_once(f"norm_plugin: {hook} of vLLM {hooks.version} stays as it is: {reason}")
    if hooks.missing and settings.get().strict:
        raise BackendError(f"NORM_PLUGIN_STRICT=1, and these hooks are missing: {hooks.missing}.")


def _say_once_vllm_logs(hooks: InstalledHooks, wanted: settings.Settings) -> None:
    """Log one line in each process, once vLLM logs: from 0.32 on it sets up its log after it has called its plugins."""

    @cache
    def say() -> None:
        how = (wanted.backend, wanted.scope, hooks.line())
        log.info("norm_plugin, backend %s, scope %s, in %s; what is imported later follows then", *how)

    logger = importlib.import_module("vllm.logger")
    if logging.getLogger("vllm").handlers or not hasattr(logger, "configure_logging"):
        say()
    else:
        hooks.after("log", logger, "configure_logging", lambda *call, **named: say())
        del hooks.live["log"]


#: Restores vLLM.
undo = partial(installed_hooks.undo, "vllm")


def _join_log(hooks: InstalledHooks) -> None:
    """Make our logger a child of vLLM's: of other loggers, vLLM shows only warnings and errors."""
    before = log.parent
    log.parent = logging.getLogger("vllm")
    hooks.on_undo(lambda: setattr(log, "parent", before))


def _install(hooks: InstalledHooks, wanted: settings.Settings) -> None:
    from vllm import envs

    vllm_layers.forget_choices()
    calls.prepare()
    _mark_compiled_code(hooks, envs)
    if getattr(envs, "VLLM_BATCH_INVARIANT", False):
        hooks.missing["everything"] = "VLLM_BATCH_INVARIANT=1 is a promise of vLLM's own norms"
    else:
        _install_norms(hooks, wanted)
    for module, name, replace in vllm_ranks.places(hooks):
        _when_there(hooks, module, name, replace)
    _when_there(hooks, _LOADERS, "layer names", partial(_watch_loaders, hooks))


def _install_norms(hooks: InstalledHooks, wanted: settings.Settings) -> None:
    has_ir = importlib.util.find_spec("vllm.ir") is not None
    if has_ir and "rmsnorm" in wanted.ops:
        vllm_ir.install(hooks, first=wanted.scope == "all")
    for hook in HOOKS:
        if any(map(asked, hook.families)):
            # the fusion passes need the nodes of vLLM's IR in compiled code; our provider takes what they leave
            in_graphs = wanted.scope == "all" and not (has_ir and hook.in_ir)
            _when_there(hooks, hook.module, hook.layer, partial(_replace_forward, hooks, hook, in_graphs))
    if wanted.scope == "all":
        hooks.on_undo(dispatch.on_torch_call(_count_compiled))


def _when_there(hooks: InstalledHooks, module: str, name: str, do: Callable[[ModuleType], None]) -> None:
    """Call `do` with the module once it is imported; if this vLLM has no such module, the hook is missing."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a package above it does not exist
        found = None
    if found is None:
        hooks.missing[name] = f"there is no {module}"
        return

    def attempt(imported: ModuleType) -> None:
        try:
            do(imported)
        except (AttributeError, TypeError, ValueError) as error:  # vLLM's import must go on
            hooks.missing[name] = f"{type(error).__name__}: {error}"
        _say_what_is_missing(hooks)

    hooks.on_undo(after_import(module, attempt))


def _mark_compiled_code(hooks: InstalledHooks, envs: ModuleType) -> None:
    """Make our flags and sources part of the key of vLLM's compile cache, which ignores plugins."""
    flags = [flag.name for flag in settings.FLAGS if flag.name != "NORM_PLUGIN_REPORT"]
    facts: dict[str, Callable[[], Any]] = {flag: partial(os.environ.get, flag) for flag in flags}
    for name, value in (facts | {"NORM_PLUGIN_FINGERPRINT": fingerprint}).items():
        envs.environment_variables[name] = value
        hooks.on_undo(partial(envs.environment_variables.pop, name, None))


def _count_compiled(op: Op, args: tuple[Any, ...]) -> None:
    """Count an op that compiled code calls. A split norm is two ops; the second, which has the weight, counts both."""
    sums, norm = split.OPS
    weight = args[op.arguments.index("weight")] if "weight" in op.arguments else None
    for counted in () if op is sums else (sums, norm) if op is norm else (op,):
        call_counts.count(counted.name, args[op.x], weight)


# --- layers -------------------------------------------------------------------------------------------------------


def _replace_forward(hooks: InstalledHooks, hook: Hook, in_graphs: bool, module: ModuleType) -> None:
    def ours(original: Forward) -> Forward:
        return replacement(hooks, hook.families, original, hook.ours, in_graphs)

    if hook.function:
        hooks.replace(hook.layer, module, hook.layer, ours)
    else:
        hooks.replace_method(module, hook.layer, "forward", ours)


# --- once a model is loaded ---------------------------------------------------------------------------------------


def _watch_loaders(hooks: InstalledHooks, module: ModuleType) -> None:
    classes = [value for value in vars(module).values() if isinstance(value, type) and "load_model" in vars(value)]
    for loader in dict.fromkeys(classes):
        hooks.after("layer names", loader, "load_model", partial(_loaded, hooks))


def _loaded(hooks: InstalledHooks, model: nn.Module, *args: Any, **named: Any) -> None:
    config = next((c for c in (*args, *named.values()) if hasattr(c, "compilation_config")), None)
    if config is not None:
        how = config.compilation_config.inductor_compile_config
        vllm_layers.rounds_as_eager = bool(how.get("emulate_precision_casts"))
    vllm_layers.forget_choices()
    qk_norms.learn(model)
    path = getattr(getattr(config, "model_config", None), "model", "")
    why = _why(hooks, model)
    call_counts.name_layers(model, why, str(path))
    if config is not None:
        vllm_ranks.loaded(hooks, model, config, _compiled(model))
    layers = model_layers.described(model_layers.norms(model, why)) or "no norm layers"
    log.info("norm_plugin in %s; %s has %s", hooks.line(), type(model).__name__, layers)


COMPILED = "compiled by vLLM"


def _compiled(model: nn.Module) -> set[int]:
    """The ids of the modules that vLLM compiles."""
    parts = [part for part in model.modules() if getattr(part, "do_not_compile", True) is False]
    return {id(layer) for part in parts for layer in part.modules()}


def _why(hooks: InstalledHooks, model: nn.Module) -> model_layers.Why:
    """Returns what answers why a layer of this model has no hook."""
    compiled = _compiled(model)

    def why(layer: nn.Module) -> str:
        return _not_hooked(hooks, layer) or (COMPILED if id(layer) in compiled else "")

    return why


def _not_hooked(hooks: InstalledHooks, layer: nn.Module) -> str:
    kind = type(layer)
    classes = {(hook.module, hook.layer): hook for hook in HOOKS if not hook.function}
    functions = {hook.module: hook for hook in HOOKS if hook.function}
    hook = next((classes[at] for base in kind.__mro__ if (at := (base.__module__, base.__name__)) in classes), None)
    if hook is None and (hook := functions.get(kind.__module__)) is None:
        return model_layers.why_no_hook(layer, (), "", "")
    missing = next((hooks.missing[name] for name in ("everything", hook.layer) if name in hooks.missing), "")
    return model_layers.why_no_hook(layer, hook.families, missing, "" if hook.function else "forward")
