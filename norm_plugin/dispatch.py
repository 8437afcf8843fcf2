"""Chooses the backend of each call, and says why not another.

A call has a signature: the op, its plain arguments, and for each tensor its dtype, device, strides and all sizes but
the number of rows. The first call of a signature is checked and resolved to a route. Later calls look it up and are
counted. A `Routes` has all routes of one state of the flags. A change of the flags replaces it as a whole, so no thread
can put a route of earlier flags among the current ones.
"""

from __future__ import annotations

import logging
import threading
import traceback
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from norm_plugin import checks, kernels, settings
from norm_plugin.native.compiled import CompilerError, compiled
from norm_plugin.op import Op

log = logging.getLogger("norm_plugin")

Signature = tuple[Any, ...]


class BackendError(RuntimeError):
    """A call cannot be done as asked, and NORM_PLUGIN_STRICT=1 forbids to fall back."""


class Declined(Exception):
    """No kernel can do a call of `op`, and `reason` says why. Nothing was written."""

    def __init__(self, op: str, reason: str) -> None:
        super().__init__(f"{op}: {reason}")
        self.op, self.reason = op, reason


@dataclass(eq=False)
class Route:
    """What the calls of one signature run. `fallback`: something else was asked for, and `reason` says why not.

    `writes` are the places of the arguments that are given and written; `written` picks them from a call. `proven`: a
    call with rows has succeeded. `bound` is None on a native route; `at` is its way to call by addresses.
    """

    op: Op
    signature: Signature
    backend: str
    reason: str
    fallback: bool
    run: Callable[..., Any]
    writes: tuple[int, ...]
    calls: int = 0
    proven: bool = False
    bound: kernels.Bound | None = None
    written: Callable[[tuple[Any, ...]], Sequence[Tensor]] = field(init=False)
    at: Callable[[Any, tuple[Any, ...]], bool] | None = field(init=False)

    def __post_init__(self) -> None:
        self.at = None if self.bound is None else self.bound.at
        first, *others = self.writes or (0,)
        self.written = itemgetter(first, *others) if others else itemgetter(slice(first, first + 1))

    def __del__(self) -> None:
        _deleted.append((self.op.name, self.backend, self.calls))


class Routes:
    """The routes of one state of the flags, and the kernels that have failed under it."""

    def __init__(self) -> None:
        self.routes: dict[Signature, Route] = {}
        self.broken: dict[tuple[str, torch.dtype, int, torch.device], str] = {}


#: More than a server needs. A program that makes ever new signatures (3-D inputs of changing length) starts over here.
MOST_ROUTES = 4096

_current = Routes()
_planned: set[Op] = set()
_lock = threading.RLock()

# A thread may still use, and count calls on, a route that is no longer current. So a route hands over its count when it
# is deleted.
_alive: weakref.WeakSet[Route] = weakref.WeakSet()
_deleted: deque[tuple[str, str, int]] = deque()
_counts: Counter[tuple[str, str]] = Counter()


def _key_of(value: Any, by_row: bool) -> Any:
    if isinstance(value, Tensor):
        shape = value.shape
        return (value.dtype, shape[1:] if by_row and len(shape) > 1 else shape, value.stride(), value.device)
    return value


_torch_watchers: list[Callable[[Op, tuple[Any, ...]], None]] = []


def on_torch_call(watcher: Callable[[Op, tuple[Any, ...]], None]) -> Callable[[], None]:
    """Calls `watcher` with every call through torch.ops, such as those of compiled code. Returns a function that
    unsubscribes."""
    _torch_watchers.append(watcher)
    return lambda: _torch_watchers.remove(watcher)


def call(op: Op, *args: Any) -> Any:
    """Does a call that came through torch.ops with real tensors."""
    for watcher in _torch_watchers:
        watcher(op, args)
    return run(find_route(op, args), args)


def run(route: Route, args: tuple[Any, ...], decline: bool = False) -> Any:
    """Does one call by its route. `decline`: raise Declined if a kernel was asked for and none can do it."""
    if decline and route.fallback:
        raise Declined(route.op.name, route.reason)
    if route.writes:
        advance_versions(route.written(args))
    route.calls += 1
    try:
        result = route.run(*args)
    except Exception as error:  # a compiler or a driver may raise anything
        return after_failure(route, error, args, decline)
    if not route.proven and args[route.op.x].numel():
        route.proven = True
    return result


#: Advances the version counters of tensors: autograd cannot see in another way that a kernel has written them.
advance_versions: Callable[[Sequence[Tensor]], None] = torch._C._increment_version


def find_route(op: Op, args: tuple[Any, ...]) -> Route:
    """Checks a call, and returns the route of its signature."""
    current = _current
    signature = (op.name, *map(_key_of, args, op.by_row))
    route = current.routes.get(signature)
    if route is None:
        checks.check(op, args)
    else:
        checks.check_shapes(op, args)
    if op.written:
        checks.check_memory(op, args)
    return _enter(current, _resolve(op, signature, args, current)) if route is None else route


def _enter(current: Routes, route: Route) -> Route:
    """Adds a route and returns it, or returns the one that another thread has added first."""
    with _lock:
        if len(current.routes) >= MOST_ROUTES and current is _current:
            start_over()
            current = _current
        route = current.routes.setdefault(route.signature, route)
        _alive.add(route)
    _routes_changed()
    return route


def is_current(route: Route) -> bool:
    """Whether the route is current, as it is until the flags change."""
    return _current.routes.get(route.signature) is route


def find_native(op: Op, args: tuple[Any, ...], reason: str) -> Route:
    """The native route, for a reason that is not part of the signature."""
    checks.check(op, args)
    current, signature = _current, (op.name, reason)
    expected = settings.get().backend == "native" or bool(kernels.unavailable(args[op.x].device))
    found = current.routes.get(signature)
    return found or _enter(current, _native(op, signature, reason, args, fallback=not expected))


def _resolve(op: Op, signature: Signature, args: tuple[Any, ...], current: Routes) -> Route:
    wanted = settings.get()
    x = args[op.x]
    if wanted.backend == "native":
        return _native(op, signature, "the native backend was asked for", args, fallback=False)
    if reason := current.broken.get((op.name, x.dtype, x.shape[-1], x.device)):
        return _native(op, signature, reason, args, fallback=True)
    try:
        bound = _bind_kernel(op, x.device, args)
    except kernels.Refusal as refusal:
        expected = wanted.backend == "triton" or x.device.type not in ("cpu", "meta")
        return _native(op, signature, str(refusal), args, fallback=expected)
    return Route(op, signature, "triton", "", False, bound.run, _writes(op, args), bound=bound)


def _writes(op: Op, args: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(i for i in op.written if args[i] is not None)


def _bind_kernel(op: Op, device: torch.device, args: tuple[Any, ...]) -> kernels.Bound:
    """What runs a signature on Triton. Raises Refusal with the reason if nothing can."""
    if reason := kernels.unavailable(device):
        raise kernels.Refusal(reason)
    try:
        bind = kernels.find(op.kind, op.name)
    except ImportError as error:  # Triton is installed but broken
        raise kernels.Refusal(f"the Triton kernels cannot be imported: {error}") from error
    if bind is None:
        raise kernels.Refusal(f"{op.name} has no Triton kernel")
    return bind(*args)


def _native(op: Op, signature: Signature, reason: str, args: tuple[Any, ...], *, fallback: bool) -> Route:
    wanted = settings.get()
    if fallback and wanted.strict:
        raise BackendError(
            f"{op.name} cannot run on Triton: {reason}. NORM_PLUGIN_STRICT=1 forbids the native path; "
            "unset it, or set NORM_PLUGIN=native."
        )
    if fallback:
        log_once(f"{op.name} runs on the native path: {reason}")
    route = Route(op, signature, "native", reason, fallback, op.native, _writes(op, args))
    if wanted.compile:
        route.backend = "native, compiled"
        route.run = compiled(op.native, op.written)
    return route


def after_failure(route: Route, error: Exception, args: tuple[Any, ...], decline: bool = False) -> Any:
    """Calls the native op instead, if the kernel is at fault and nothing was written. Otherwise raises the error,
    because the native op would read arguments that are half written."""
    if isinstance(error, (MemoryError, RecursionError, torch.OutOfMemoryError)) or route.backend == "native":
        raise error
    before_launch = isinstance(error, (kernels.NotLaunched, CompilerError))
    if "group" in route.op.arguments:  # the other ranks are in the kernel, and would wait for this one
        raise error
    if not before_launch and (route.proven or route.writes):
        raise error
    cause = error.__cause__ if before_launch and isinstance(error.__cause__, Exception) else error
    said = " ".join(traceback.format_exception_only(cause)).strip().splitlines()[0]
    reason = f"{'the Triton kernel' if route.backend == 'triton' else 'torch.compile'} failed: {said}"
    op, x = route.op, args[route.op.x]
    route.calls -= 1
    if settings.get().strict:
        raise BackendError(f"{op.name}: {reason}. NORM_PLUGIN_STRICT=1 forbids falling back.") from cause
    log_once(f"{op.name} stays on the eager native path: {reason}")
    native = Route(op, route.signature, "native", reason, True, op.native, route.writes)
    with _lock:
        if is_current(route):
            _current.broken[op.name, x.dtype, x.shape[-1], x.device] = reason
            _current.routes[route.signature] = native
            op.plans = tuple(plan for plan in op.plans if plan.route is not route)
        _alive.add(native)
    _routes_changed()
    return run(native, args, decline)


_route_watchers: list[Callable[[], None]] = []


def on_resolve(watcher: Callable[[], None]) -> Callable[[], None]:
    """Calls `watcher` whenever a route is new, or has become another. Returns a function that ends that."""
    _route_watchers.append(watcher)
    return lambda: _route_watchers.remove(watcher)


def _routes_changed() -> None:
    for watcher in _route_watchers:
        watcher()


@cache
def log_once(message: str) -> None:
    """Logs a warning, once for each message in a process."""
    log.warning(message)


def routes() -> tuple[Route, ...]:
    """The route of every signature in use, with its backend, reason and number of calls."""
    return tuple(_current.routes.values())


def keep_plan(route: Route, plan: Any, most: int) -> None:
    """Keeps a plan with its op until the flags change, and drops the oldest beyond `most`."""
    with _lock:
        if is_current(route):
            route.op.plans = (*route.op.plans, plan)[-most:]
            _planned.add(route.op)


def start_over() -> None:
    """Forgets all routes and plans, and keeps the counts."""
    global _current
    with _lock:
        _current = Routes()
        for op in _planned:
            op.plans = ()


settings.on_change(start_over)


def calls(op: str, backend: str | None = None) -> int:
    """How often `op` was called, on one backend or on all."""
    with _lock:
        alive = list(_alive)  # references, so that none is deleted before `_deleted` is counted
        while _deleted:
            name, where, number = _deleted.popleft()
            _counts[name, where] += number
        seen = Counter(_counts)
        for route in alive:
            seen[route.op.name, route.backend] += route.calls
    return sum(n for (name, where), n in seen.items() if name == op and backend in (None, where))


def reset() -> None:
    """Forgets all routes and counts."""
    with _lock:
        start_over()
        for route in _alive:
            route.calls = 0
        _deleted.clear()
        _counts.clear()
