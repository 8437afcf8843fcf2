"""norm_plugin in vLLM: the entry point of the group vllm.general_plugins, which vLLM calls in each of its processes.

The `forward` of vLLM's norm classes is replaced, and nothing that vLLM compiles: a traced call takes the way that it
takes without us, so Inductor and the fusion passes see what they always see. NORM_PLUGIN_SCOPE=all adds our ops to
compiled code as well, through a provider of vLLM's IR where there is one.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import partial, wraps
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from norm_plugin import dispatch, settings, split
from norm_plugin.dispatch import BackendError, Declined
from norm_plugin.engines import (
    call_counts,
    calls,
    model_layers,
    qk_norms,
    report_file,
    source_patches,
    vllm_ir,
    vllm_layers,
)
from norm_plugin.engines.common import asked, refused, traced
from norm_plugin.engines.fingerprint import fingerprint
from norm_plugin.engines.installed_hooks import Record
from norm_plugin.engines.on_import import after_import
from norm_plugin.engines.vllm_layers import Kept, LayerForward
from norm_plugin.op import Op

log = logging.getLogger("norm_plugin")


class Hook(NamedTuple):
    """One class of norm layers, the families of which it may be, what runs instead of its forward; or a function."""

    families: tuple[str, ...]
    module: str
    layer: str
    ours: LayerForward
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

_record: Record | None = None


def register() -> None:
    """Hook in, if the flags say so. It may be called again, and raises only for a misspelt flag or a strict one."""
    global _record
    wanted = settings.get()
    if wanted.backend == "off" or _record is not None:
        return
    import vllm

    record = _record = Record("vLLM", vllm.__version__)
    _join_log(record)
    try:
        _install(record, wanted)
    except (AttributeError, ImportError, TypeError, ValueError, AssertionError) as error:  # a vLLM built otherwise
        record.undo()
        record.missed("everything", f"{type(error).__name__}: {error}")
    source_patches.note(record, "vllm")
    source_patches.warn(record)
    _say_what_is_missing(record)
    report_file.warn_if_unwritable()
    _say_once_vllm_logs(record, wanted)


def _say_what_is_missing(record: Record) -> None:
    """One warning for each hook that this vLLM does not have; under NORM_PLUGIN_STRICT=1 an error."""
    for hook, reason in record.missing.items():
        dispatch.log_once(f"norm_plugin: {hook} of vLLM {record.version} stays as it is: {reason}")
    if record.missing and settings.get().strict:
        raise BackendError(f"NORM_PLUGIN_STRICT=1, and these hooks are missing: {record.missing}.")


def _say_once_vllm_logs(record: Record, wanted: settings.Settings) -> None:
    """One line a process; from 0.32 on vLLM sets up its log after it has called its plugins."""

    def say() -> None:
        how = (wanted.backend, wanted.scope, record.line())
        log.info("norm_plugin, backend %s, scope %s, in %s; what is imported later follows then", *how)

    def then_say(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def configure_logging(*args: Any, **named: Any) -> Any:
            result = original(*args, **named)
            if not said:
                said.append(True)
                say()
            return result

        return configure_logging

    said: list[bool] = []
    logger = importlib.import_module("vllm.logger")
    if logging.getLogger("vllm").handlers or not hasattr(logger, "configure_logging"):
        say()
    else:
        record.replace("log", logger, "configure_logging", then_say)
        del record.live["log"]


def undo() -> None:
    """vLLM as it was."""
    global _record
    if _record is not None:
        _record.undo()
    _record = None


def record() -> Record | None:
    """What is hooked in this process, or None where nothing was asked for."""
    return _record


def _join_log(record: Record) -> None:
    """vLLM shows what its own loggers write, and nobody else's below a warning."""
    before = log.parent
    log.parent = logging.getLogger("vllm")
    record.on_undo(lambda: setattr(log, "parent", before))


def _install(record: Record, wanted: settings.Settings) -> None:
    from vllm import envs

    if getattr(envs, "VLLM_BATCH_INVARIANT", False):
        record.missed("everything", "VLLM_BATCH_INVARIANT=1 is a promise of vLLM's own norms")
        return
    vllm_layers.forget_choices()
    calls.prepare()
    _mark_compiled_code(record, envs)
    has_ir = importlib.util.find_spec("vllm.ir") is not None
    if has_ir and "rmsnorm" in wanted.ops:
        vllm_ir.install(record, first=wanted.scope == "all")
    for hook in HOOKS:
        if any(map(asked, hook.families)):
            # the nodes of vLLM's IR must stay in compiled code, for the fusion passes: the provider takes them later
            in_graphs = wanted.scope == "all" and not (has_ir and hook.in_ir)
            _when_there(record, hook.module, hook.layer, partial(_replace_forward, record, hook, in_graphs))
    if wanted.scope == "all":
        record.on_undo(dispatch.on_torch_call(_count_compiled))
    _when_there(record, _LOADERS, "layer names", partial(_watch_loaders, record))


def _when_there(record: Record, module: str, name: str, do: Callable[[ModuleType], None]) -> None:
    """`do` with the module once it is imported; a module that this vLLM does not have is missing."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of a package above it
        found = None
    if found is None:
        record.missed(name, f"there is no {module}")
        return

    def attempt(imported: ModuleType) -> None:
        try:
            do(imported)
        except (AttributeError, TypeError, ValueError) as error:  # vLLM's import must go on
            record.missed(name, f"{type(error).__name__}: {error}")
        _say_what_is_missing(record)

    record.on_undo(after_import(module, attempt))


def _mark_compiled_code(record: Record, envs: ModuleType) -> None:
    """Make our flags and sources part of the key of vLLM's compile cache, which knows nothing of plugins."""
    flags = [flag.name for flag in settings.FLAGS if flag.name != "NORM_PLUGIN_REPORT"]
    facts: dict[str, Callable[[], Any]] = {flag: partial(os.environ.get, flag) for flag in flags}
    for name, value in (facts | {"NORM_PLUGIN_FINGERPRINT": fingerprint}).items():
        envs.environment_variables[name] = value
        record.on_undo(partial(envs.environment_variables.pop, name, None))


def _count_compiled(op: Op, args: tuple[Any, ...]) -> None:
    """Compiled code calls our ops by themselves. Of two that are one norm, the second has the layer's weight."""
    sums, norm = split.OPS
    weight = args[op.arguments.index("weight")] if "weight" in op.arguments else None
    for counted in () if op is sums else (sums, norm) if op is norm else (op,):
        call_counts.count(counted.name, args[op.x], weight)


# --- layers -------------------------------------------------------------------------------------------------------


def _replace_forward(record: Record, hook: Hook, in_graphs: bool, module: ModuleType) -> None:
    found = getattr(module, hook.layer, None)
    if found is None:
        record.missed(hook.layer, f"{module.__name__} has no {hook.layer}")
        return
    owner, name = (module, hook.layer) if hook.function else (found, "forward")
    record.replace(hook.layer, owner, name, lambda original: _forward(hook, original, in_graphs))


def _forward(hook: Hook, original: Callable[..., Any], in_graphs: bool) -> Callable[..., Any]:
    """Ours; or the original, where it is traced, where ours cannot, or where it was not asked for."""
    ours = hook.ours
    left_out = [family for family in hook.families if not asked(family)]

    @wraps(original)
    def forward(self: Any, *args: Any, **named: Any) -> Any:  # of a function, self is x
        if traced() and not in_graphs:
            return original(self, *args, **named)
        if left_out and qk_norms.family(self, hook.families[0]) in left_out:
            return original(self, *args, **named)
        try:
            found = ours(self, *args, **named)
            if type(found) is not Kept:
                return found
        except Declined as declined:
            found = Kept(declined.op, declined.reason)
        weight = getattr(self, "weight", None)
        x = next((value for value in (self, *args) if isinstance(value, Tensor)), weight)
        if isinstance(x, Tensor) and not traced():
            refused(found.op, x, weight, found.reason)
        return original(self, *args, **named)

    return forward


# --- once a model is loaded ---------------------------------------------------------------------------------------


def _watch_loaders(record: Record, module: ModuleType) -> None:
    loaders = {value for value in vars(module).values() if isinstance(value, type) and "load_model" in vars(value)}
    for loader in loaders:
        record.replace("layer names", loader, "load_model", partial(_load_model, record))


def _load_model(record: Record, original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @wraps(original)
    def load_model(*args: Any, **named: Any) -> nn.Module:
        model = original(*args, **named)
        config = next((c for c in (*args, *named.values()) if hasattr(c, "compilation_config")), None)
        if config is not None:
            how = config.compilation_config.inductor_compile_config
            vllm_layers.rounds_as_eager = bool(how.get("emulate_precision_casts"))
        vllm_layers.forget_choices()
        qk_norms.learn(model)
        call_counts.name_layers(
            model, _why(record, model), str(getattr(getattr(config, "model_config", None), "model", ""))
        )
        log.info("norm_plugin in %s; %s has %s", record.line(), type(model).__name__, _kinds(record, model))
        return model

    return load_model


COMPILED = "compiled by vLLM"


def _why(record: Record, model: nn.Module) -> model_layers.Why:
    """Why no hook will meet a layer of this model."""
    parts = [part for part in model.modules() if getattr(part, "do_not_compile", True) is False]
    compiled = {id(layer) for part in parts for layer in part.modules()}

    def why(layer: nn.Module) -> str:
        return _not_hooked(record, layer) or (COMPILED if id(layer) in compiled else "")

    return why


def _not_hooked(record: Record, layer: nn.Module) -> str:
    known = {(hook.module, hook.layer): hook for hook in HOOKS if not hook.function}
    kind = type(layer)
    hook = next((known[at] for base in kind.__mro__ if (at := (base.__module__, base.__name__)) in known), None)
    if kind.__module__ in {hook.module for hook in HOOKS if hook.function}:
        return ""  # it calls a function that is hooked
    if hook is None:
        return model_layers.not_hooked(kind)
    family = qk_norms.family(layer, hook.families[0])
    if not asked(family):
        return model_layers.left_out(family)
    for missing in ("everything", hook.layer):
        if missing in record.missing:
            return record.missing[missing]
    return "" if model_layers.is_ours(kind, "forward") else model_layers.overridden(kind, "forward")


def _kinds(record: Record, model: nn.Module) -> str:
    """The norm layers of a model, and whose each is."""
    why = _why(record, model)
    return model_layers.described(model_layers.norms(model, why)) or "no norm layers"
