"""Fake kernels, to test the dispatch without a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from norm_plugin import dispatch, kernels
from norm_plugin.accuracy import inputs
from norm_plugin.native import rms


class FakeKernel:
    """A fake kernel of rmsnorm. It counts how often it was bound to a signature, and how often it ran."""

    def __init__(self, run: Callable[..., Any] | None = None, refusal: str = "") -> None:
        self.bound, self.ran, self.refusal = 0, 0, refusal
        self.body = run or (lambda *args: rms.rmsnorm(*args[:-1]))

    def __call__(self, *args: Any) -> kernels.Bound:
        self.bound += 1
        if self.refusal:
            raise kernels.Refusal(self.refusal)
        return kernels.Bound(self.run)

    def run(self, *args: Any) -> Any:
        self.ran += 1
        return self.body(*args)


#: The fixture `install`: makes a kernel that of rmsnorm, on any device, and returns it.
Install = Callable[[FakeKernel | None], FakeKernel]


def failing(error: BaseException) -> FakeKernel:
    """A kernel that raises whenever it runs."""

    def run(*args: Any) -> Any:
        raise error

    return FakeKernel(run)


def x_of(rows: int = 4, width: int = 48, dtype: torch.dtype = torch.float32) -> Tensor:
    return inputs.make("normal", (rows, width), dtype)


def the_route() -> dispatch.Route:
    """The only route."""
    (route,) = dispatch.routes()
    return route


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
