"""The Triton kernels, a module for each kind of op. triton is imported only when a call needs a kernel."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from norm_plugin.kernels.launch import KernelLaunch


@dataclass(frozen=True, eq=False)
class Bound:
    """What runs the calls of one signature: `run` does a call through `launches`, the first of which is the norm.

    `at` does a call by the addresses of its tensors, which the shortcut knows. It returns False if it did nothing.
    """

    run: Callable[..., Any]
    launches: tuple[KernelLaunch, ...] = ()
    at: Callable[[Any, tuple[Any, ...]], bool] | None = None


#: Gets the arguments of the first call of a signature. Returns what runs this call and all later ones.
Kernel = Callable[..., Bound]


class Refusal(Exception):
    """A kernel cannot do a call; the message says why."""


class NotLaunched(Exception):
    """A kernel failed before its launch began, so nothing was written. Its cause says why."""


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: torch.device) -> str:
    """Why no Triton kernel can run on `device`, or ''."""
    if device.type == "meta":
        return "a meta tensor has no values"
    if device.type == "cpu" and not interpreted():
        return "Triton compiles for GPUs, and the tensors are on the CPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return ""


@cache
def find(kind: str, op: str) -> Kernel | None:
    """The kernel of an op, or None."""
    if importlib.util.find_spec(f"norm_plugin.kernels.{kind}") is None:
        return None
    kernels: dict[str, Kernel] = importlib.import_module(f"norm_plugin.kernels.{kind}").KERNELS
    return kernels.get(op)
