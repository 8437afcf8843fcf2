"""The norms of q and k: no class of their own, so they are known by their names in the model. Family `qknorm`."""

from __future__ import annotations

from weakref import WeakSet

from torch import nn

_NAMES = {"q_norm", "k_norm", "v_norm", "q_layernorm", "k_layernorm", "query_norm", "key_norm", "qk_norm"}
_found: WeakSet[nn.Module] = WeakSet()


def learn(model: nn.Module) -> None:
    """Find them in a model that is loaded."""
    _found.update(layer for name, layer in model.named_modules() if name.rpartition(".")[2] in _NAMES)


def family(layer: nn.Module, otherwise: str) -> str:
    """`qknorm`, or for every other layer the family of its class."""
    return "qknorm" if layer in _found else otherwise
