"""Which backend answers a call, and why not another.

A call has a signature: the op, its plain arguments, and for each tensor its dtype, device, strides and all sizes but
the number of rows. The first call of a signature is checked and resolved to a route; later ones look it up and count.
"""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from norm_plugin import checks, kernels, settings
from norm_plugin.native.compiled import compiled

log = logging.getLogger("norm_plugin")

Signature = tuple[Any, ...]


class BackendError(RuntimeError):
    """NORM_PLUGIN_STRICT=1, and a call cannot be done as asked."""


@dataclass(frozen=True, eq=False)
class Op:
    """One op: its native twin, its arguments, which is normalized, which go with it by element or have one number for
    each of its rows, which are written."""

    name: str
    family: str
    native: Callable[..., Any]
    arguments: tuple[str, ...]
    defaults: tuple[Any, ...]
    x: int
    alike: tuple[int, ...]
    one_a_row: tuple[int, ...]
    written: tuple[int, ...]
    plans: list[Any] = field(default_factory=list)

    @cached_property
    def by_row(self) -> tuple[bool, ...]:
        """Whether an argument has a row for each row of x."""
        return tuple(i == self.x or i in self.alike or i in self.one_a_row for i in range(len(self.arguments)))

    def complete(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """All arguments: torch's dispatcher leaves out trailing ones that equal their defaults."""
        return args + self.defaults[len(args) :]

    def check(self, args: tuple[Any, ...]) -> None:
        """Everything, for a call that has no route yet or never gets one (a fake one)."""
        checks.Call(self.arguments[self.x], dict(zip(self.arguments, args, strict=True))).check()
        self.check_shapes(args)
        for i in self.written:
            if args[i] is not None:
                checks.writable(self.arguments[i], args[i])

    def check_shapes(self, args: tuple[Any, ...]) -> None:
        """What may change from call to call within one signature."""
        x = args[self.x]
        for i in self.alike:
            if args[i] is not None and args[i].shape != x.shape:
                checks.same_shape(self.arguments[i], args[i], self.arguments[self.x], x)
        for i in self.one_a_row:
            checks.one_a_row(self.arguments[i], args[i], self.arguments[self.x], x)

    def check_disjoint(self, args: tuple[Any, ...]) -> None:
        """No two of the arguments that are written may be one tensor; only real tensors can tell."""
        first, second = self.written
        if args[first] is not None and args[second] is not None:
            checks.disjoint(self.arguments[first], args[first], self.arguments[second], args[second])


@dataclass
class Route:
    """What one signature runs. `fallback` is True where something else was asked for; `reason` says why."""

    op: Op
    signature: Signature
    backend: str
    reason: str
    fallback: bool
    run: Callable[..., Any]
    calls: int = 0


_routes: dict[Signature, Route] = {}
_forgotten: Counter[tuple[str, str]] = Counter()
_broken: dict[tuple[str, torch.dtype, int], str] = {}
_logged: set[str] = set()

#: More than a server has; whoever makes new signatures for ever (3-D inputs of changing length) starts over here.
MOST_ROUTES = 4096


def _fact(value: Any, by_row: bool) -> Any:
    if isinstance(value, Tensor):
        shape = value.shape
        return (value.dtype, shape[1:] if by_row and len(shape) > 1 else shape, value.stride(), value.device)
    return value


_told: list[Callable[[Op, tuple[Any, ...]], None]] = []


def tell(told: Callable[[Op, tuple[Any, ...]], None]) -> Callable[[], None]:
    """Have `told` called with every call that comes through torch.ops, as those of compiled code do. Returns the end
    of that."""
    _told.append(told)
    return lambda: _told.remove(told)


def call(op: Op, *args: Any) -> Any:
    """Run `op` on real tensors by the route of its signature."""
    for told in _told:
        told(op, args)
    route = find_route(op, args)
    route.calls += 1
    return route.run(*args)


def find_route(op: Op, args: tuple[Any, ...]) -> Route:
    """The route of a call's signature, once the call is known to be right."""
    signature = (op.name, *map(_fact, args, op.by_row))
    route = _routes.get(signature)
    if route is None:
        op.check(args)
        if len(_routes) >= MOST_ROUTES:
            _forget_routes()
        route = _routes[signature] = _resolve(op, signature, args)
        _tell()
    else:
        op.check_shapes(args)
    if len(op.written) > 1:
        op.check_disjoint(args)
    return route


def _resolve(op: Op, signature: Signature, args: tuple[Any, ...]) -> Route:
    wanted = settings.get()
    x = args[op.x]
    if wanted.backend == "native":
        return _native(op, signature, "the native backend was asked for", fallback=False)
    if reason := _broken.get((op.name, x.dtype, x.shape[-1])):
        return _native(op, signature, reason, fallback=True)
    try:
        run = _bind_kernel(op, x.device, args)
    except kernels.Refusal as refusal:
        expected = wanted.backend == "triton" or x.device.type != "cpu"
        return _native(op, signature, str(refusal), fallback=expected)
    route = Route(op, signature, "triton", "", False, run)
    route.run = _guarded(route, run, "the Triton kernel failed")
    return route


def _bind_kernel(op: Op, device: torch.device, args: tuple[Any, ...]) -> Callable[..., Any]:
    """What runs a signature on Triton; raises Refusal with the reason where nothing can."""
    if reason := kernels.unavailable(device):
        raise kernels.Refusal(reason)
    try:
        bind = kernels.find(op.family, op.name)
    except ImportError as error:  # a Triton that is installed but broken
        raise kernels.Refusal(f"the Triton kernels cannot be imported: {error}") from error
    if bind is None:
        raise kernels.Refusal(f"{op.name} has no Triton kernel")
    return bind(*args)


def _native(op: Op, signature: Signature, reason: str, *, fallback: bool) -> Route:
    wanted = settings.get()
    if fallback and wanted.strict:
        raise BackendError(
            f"{op.name} cannot run on Triton: {reason}. NORM_PLUGIN_STRICT=1 forbids the native path; "
            "unset it, or set NORM_PLUGIN=native."
        )
    if fallback:
        log_once(f"{op.name} runs on the native path: {reason}")
    route = Route(op, signature, "native", reason, fallback, op.native)
    if wanted.compile:
        route.backend = "native, compiled"
        route.run = _guarded(route, compiled(op.native, op.written), "torch.compile failed")
    return route


def _guarded(route: Route, run: Callable[..., Any], what: str) -> Callable[..., Any]:
    """`run` for the first call: where it cannot be compiled or launched, this op, dtype and width stay native."""

    def first(*args: Any) -> Any:
        try:
            result = run(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler or a driver may raise anything; it is counted, logged or raised
            reason = f"{what}: {' '.join(traceback.format_exception_only(error)).strip().splitlines()[0]}"
            if settings.get().strict:
                raise BackendError(f"{route.op.name}: {reason}. NORM_PLUGIN_STRICT=1 forbids falling back.") from error
            log_once(f"{route.op.name} stays on the eager native path: {reason}")
            x = args[route.op.x]
            _broken[route.op.name, x.dtype, x.shape[-1]] = reason
            route.backend, route.reason, route.fallback, route.run = "native", reason, True, route.op.native
            _tell()
            return route.op.native(*args)
        route.run = run
        return result

    return first


_watchers: list[Callable[[], None]] = []


def on_resolve(tell: Callable[[], None]) -> None:
    """Have `tell` called whenever a route is new, or has become another."""
    _watchers.append(tell)


def _tell() -> None:
    for tell in _watchers:
        tell()


def log_once(message: str) -> None:
    """One warning for each message and process."""
    if message not in _logged:
        _logged.add(message)
        log.warning(message)


def routes() -> tuple[Route, ...]:
    """Every signature in use, with its backend, reason and number of calls."""
    return tuple(_routes.values())


def _forget_routes() -> None:
    """Resolve everything anew, and keep the counts."""
    for route in _routes.values():
        _forgotten[route.op.name, route.backend] += route.calls
    for op in {route.op for route in _routes.values()}:
        op.plans.clear()
    _routes.clear()
    _broken.clear()


settings.on_change(_forget_routes)


def calls(op: str, backend: str | None = None) -> int:
    """How often `op` was called, on one backend or on all."""
    seen = Counter(_forgotten)
    for route in _routes.values():
        seen[route.op.name, route.backend] += route.calls
    return sum(n for (name, where), n in seen.items() if name == op and backend in (None, where))


def reset() -> None:
    """Forget all routes and counts."""
    _forget_routes()
    _forgotten.clear()
