"""The ops in Triton, a module for each kind. Nothing here imports triton before a call needs a kernel."""

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
    """What a kernel has for one signature: `run` does a call; `launches` are what it launches, the norm itself first.

    `at` does the same by the addresses of the tensors, which the shortcut knows, or says that it has done nothing.
    """

    run: Callable[..., Any]
    launches: tuple[KernelLaunch, ...] = ()
    at: Callable[[Any, tuple[Any, ...]], bool] | None = None


#: Given the arguments of a first call, a kernel answers with what runs it and every later call of its signature.
Kernel = Callable[..., Bound]


class Refusal(Exception):
    """A kernel cannot do a call; the message says why."""


class NotLaunched(Exception):
    """A kernel failed before its launch began, as its cause says: nothing was written."""


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
    """The kernel of an op, or None where there is none."""
    if importlib.util.find_spec(f"norm_plugin.kernels.{kind}") is None:
        return None
    kernels: dict[str, Kernel] = importlib.import_module(f"norm_plugin.kernels.{kind}").KERNELS
    return kernels.get(op)
