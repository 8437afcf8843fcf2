"""Finds the norms of a loaded model: the path and class of each, and why it has no hook."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from norm_plugin import settings
from norm_plugin.engines import qk_norms

#: Answers why a layer has no hook; "" if it has one.
Why = Callable[[nn.Module], str]

NO_HOOK = "no hook of norm_plugin takes this class"
TORCHS = "PyTorch's own class; norm_plugin takes those of the engine"

_NAMED_NORM = re.compile(r"norm(?!al(?!iz))", re.IGNORECASE)


class Layer(NamedTuple):
    """A norm of a model. `weight` is the address of its weight, by which its calls are known; 0 without a weight."""

    path: str
    kind: str
    weight: int
    why: str


def norms(model: nn.Module, why: Why) -> Iterator[Layer]:
    """All norms of a model: modules whose class or a base of it is called a norm, or that are and have a weight."""
    for path, module in model.named_modules():
        weight = _weight(module)
        below = next(module.children(), None)
        named = any(_NAMED_NORM.search(base.__name__) for base in type(module).__mro__)
        by_class = named and (below is None or weight is not None)
        by_name = _NAMED_NORM.search(path.rpartition(".")[2]) and below is None and weight is not None
        if by_class or by_name:
            yield Layer(path, qualified(type(module)), 0 if weight is None else weight.data_ptr(), why(module))


def _weight(module: nn.Module) -> Tensor | None:
    found = getattr(module, "weight", None)
    if not isinstance(found, Tensor):  # it may be called gamma or scale
        found = next(module.parameters(recurse=False), None)
    return found if found is not None and found.numel() and not found.is_meta else None


def qualified(kind: type) -> str:
    """The name of a class with its module, because engines have several classes of one name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def why_no_hook(layer: nn.Module, families: tuple[str, ...], missing: str, method: str) -> str:
    """Why no hook will meet a layer of a class whose layers may belong to `families` (none: the class is not hooked).

    `missing`: why the hook of the class could not be set. `method`: what is hooked of the class, "" for a function.
    """
    kind = type(layer)
    if not families:
        return TORCHS if kind.__module__.startswith("torch.nn.") else NO_HOOK
    family = qk_norms.family(layer, families[0])
    if family not in settings.get().ops:
        return f"NORM_PLUGIN_OPS leaves the family {family} out"
    if missing or not method or _is_ours(kind, method):
        return missing
    owner = next((base for base in kind.__mro__ if method in vars(base)), kind)
    return f"{qualified(owner)} has a {method} of its own, which no hook takes"


def _is_ours(kind: type, method: str) -> bool:
    """Whether norm_plugin has put this method there, and no subclass has overridden it."""
    globals_of = getattr(getattr(kind, method, None), "__globals__", {})
    return str(globals_of.get("__name__")).startswith("norm_plugin.")


def described(layers: Iterable[Layer]) -> str:
    """The layers by class and reason, for the log."""
    kinds = Counter((layer.kind, layer.why) for layer in layers)
    return ", ".join(
        f"{number} {kind if why else kind.rpartition('.')[2]} ({why or 'ours'})"
        for (kind, why), number in kinds.items()
    )
