"""A backend as a test sees it: where its tensors lie, and how an op is called and compared.

The tests that take the fixture `backend` run on either: natively, or on the kernels (tests/kernels/twins.py has those).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from norm_plugin.accuracy import inputs
from norm_plugin.op import Op
from tests.spec import samples


class Backend(NamedTuple):
    """`outputs` returns what a call returns and writes; on the kernels it also compares that with the native twin."""

    device: torch.device
    call: Callable[..., Any]
    outputs: Callable[..., tuple[Tensor, ...]]

    def make(self, *given: Any, **named: Any) -> Tensor:
        return inputs.make(*given, **named, device=self.device)

    def weights(self, *given: Any) -> Tensor:
        return inputs.weights(*given, device=self.device)

    def biases(self, *given: Any) -> Tensor:
        return inputs.biases(*given, device=self.device)

    def arguments(self, op: Op, shape: Sequence[int], *given: Any, **named: Any) -> samples.Arguments:
        return samples.arguments(op, shape, *given, **named, device=self.device)


NATIVE = Backend(samples.CPU, samples.call, samples.outputs)
