"""Family `qknorm`: the norms of q and k have no class of their own, so they are known by their names in the model."""

from __future__ import annotations

from weakref import WeakSet

from torch import nn

_NAMES = {"q_norm", "k_norm", "v_norm", "q_layernorm", "k_layernorm", "query_norm", "key_norm", "qk_norm"}
_found: WeakSet[nn.Module] = WeakSet()


def learn(model: nn.Module) -> None:
    """Find the norms of q and k in a loaded model."""
    _found.update(layer for name, layer in model.named_modules() if name.rpartition(".")[2] in _NAMES)


def family(layer: nn.Module, otherwise: str) -> str:
    """The family of a layer: `qknorm`, or else the family of its class."""
    return "qknorm" if layer in _found else otherwise
