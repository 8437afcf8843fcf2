"""TESTS ONLY. Plants a fault in each model that a child process of verify loads, in turn: $NORM_PLUGIN_FAULTS.

Python imports a module of this name at its start. A fault replaces what an op computes, and nothing that looks at it.
"""

import inspect
import os
import sys

NAMES = [name for name in os.environ.get("NORM_PLUGIN_FAULTS", "").split(",") if name]

if NAMES and "norm_plugin.verify.vllm_child" in sys.orig_argv:
    from types import MethodType

    from norm_plugin import dispatch, ops
    from norm_plugin.engines import call_counts
    from norm_plugin.native import rms

    NATIVE = {op: op.native for op in ops.OPS.values()}
    LEFT_OUT = "model.layers.1.input_layernorm"

    def changed(name, **values):
        """The op with other arguments than it is given; a callable makes one of the one that is given."""
        op = ops.OPS[name]

        def fault(*args):
            given = dict(zip(op.arguments, op.complete(args), strict=True))
            given |= {key: value(given[key]) if callable(value) else value for key, value in values.items()}
            return NATIVE[op](*given.values())

        plant(name, fault)

    def plant(name, fault):
        object.__setattr__(ops.OPS[name], "native", fault)

    def eps():
        for name in ("rmsnorm", "fused_add_rmsnorm"):
            changed(name, eps=lambda value: 10 * value)

    def residual():
        def not_updated(x, residual, *others):
            NATIVE[ops.FUSED_ADD_RMSNORM](x, residual.clone(), *others)

        plant("fused_add_rmsnorm", not_updated)

    def variance():
        def of_the_rounded_sum(x, residual, weight, eps, numerics, *others):
            residual.add_(x)
            x.copy_(rms.rmsnorm(residual, weight, eps, numerics))

        plant("fused_add_rmsnorm", of_the_rounded_sum)

    def plus_one():
        for name in ("rmsnorm", "add_rmsnorm"):
            changed(name, gemma=False)

    def gate():
        changed("gated_norm", norm_before_gate=lambda before: not before)

    def group():
        changed("gated_norm", group_size=None)

    def unpatched(model):
        layer = model.get_submodule(LEFT_OUT)
        layer.forward = MethodType(inspect.unwrap(type(layer).forward), layer)

    seen = []
    name_layers = call_counts.name_layers

    def next_fault(model, *how):
        if model not in seen:
            seen.append(model)
            for op, native in NATIVE.items():
                object.__setattr__(op, "native", native)
            name = NAMES[len(seen) - 1]
            if name == "unpatched":
                unpatched(model)
            elif name != "none":
                globals()[name]()
            dispatch.reset()
        name_layers(model, *how)

    call_counts.name_layers = next_fault
