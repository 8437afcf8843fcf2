"""Runs one step: makes the call, and compares everything that can be seen of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from norm_plugin import dispatch, settings
from norm_plugin.accuracy import inputs
from tests.kernels.device import COMPILED, DEVICE, INTERPRETED
from tests.sequences import limits
from tests.sequences.calls import READABLE, SAME, Step, first
from tests.sequences.guards import Buffer, Fresh, extent, fresh
from tests.sequences.placing import Placed, completed, place
from tests.spec import judge

#: The reasons for which a kernel may refuse these calls. Any other reason to run natively is a failure.
REFUSALS = ("the last stride is", "blocks of", "the rows do not lie on a grid", "the variance is of the first")

KERNELS = COMPILED or INTERPRETED

Fault = Callable[[], AbstractContextManager[None]]


def perform(step: Step, *, fault: Fault = nullcontext, faulty: bool = False) -> None:
    """Makes a call in its mode, and checks it. With a `fault` it may raise, and counts as made."""
    placed = place(completed(step))
    step = placed.step
    backward = step.mode == "backward"
    leaves = prepared(placed)
    placed.seal()
    refused, either = placed.shared()
    outlaw = forbidden(placed)
    versions = versions_of(placed)
    before = dispatch.calls(placed.f.op.name)
    natively = dispatch.calls(placed.f.op.name, "native")
    incoming: list[Buffer] = []
    with fresh() as made:
        try:
            with mode(step.mode), fault():
                returned = first(placed.f.call(placed.a))
        except Exception as error:
            if faulty and isinstance(error, Died):
                return died(placed, made)
            unchanged(placed, made)
            if not (refused or either or outlaw):
                raise
            right_error(error, refused or either, outlaw)
            return None
        assert not refused, f"{sorted(refused)} share elements, and the call was made"
        assert not outlaw, f"{outlaw}, and the call was made"
        if returned and "out" in placed.written:  # the function returns the tensor that it was given
            assert returned[0] is placed.a["out"]
            returned = ()
        outputs = (*returned, *(placed.a[name] for name in placed.written))
        if backward:
            differentiated(placed, outputs, leaves, incoming)
    with torch.no_grad():
        intact(placed, made, incoming)
        if not backward:
            moved(placed, versions, either)
        on_kernel = counted(placed, before, natively, backward, faulty)
        for output in returned:
            contiguous(output)
            assert not on_kernel or made.guards(output), "a kernel wrote an output that lies in no guarded memory"
        judge.check(placed.f.op, placed.before, outputs)
    return None


class Died(RuntimeError):
    """The error of a planted fault."""


@contextmanager
def mode(name: str) -> Iterator[None]:
    with {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(name, nullcontext)():
        yield


def prepared(placed: Placed) -> dict[str, Tensor]:
    """Asks for gradients if the mode says so. Returns the tensors that get them."""
    a, mode = placed.a, placed.step.mode
    asked = [n for n in (*placed.f.by_row, "weight", "bias", "linear_weight", "linear_bias") if a.get(n) is not None]
    asked = [n for n in asked if n != "out"]
    leaves: dict[str, Tensor] = {}
    if mode in ("no_grad", "inference"):
        for name in asked[:: 1 + placed.step.seed % 2]:
            a[name].requires_grad_()
    elif mode == "leaf" and placed.written:
        a[placed.written[-1]].requires_grad_(a[placed.written[-1]].is_floating_point())
    elif mode == "backward":
        same = placed.step.relation == SAME and "out" in placed.written
        if same:
            a["out"] = a["input"]
        for name in asked[: 1 if placed.step.seed % 3 == 0 else None]:
            if name in placed.written or (same and name == "input"):
                leaf = a[name].detach().clone(memory_format=torch.contiguous_format).requires_grad_()
                if len(placed.buffer_of(name).inside[name]) == a[name].numel():
                    a[name].copy_(leaf)
                leaves[name] = leaf
            else:
                leaves[name] = a[name].requires_grad_()
    return leaves


def forbidden(placed: Placed) -> str:
    """Why torch or a rule of ours forbids to write a tensor, or ''."""
    for name in placed.written:
        t = placed.a[name]
        if t.shape[-1] > 1 and t.stride(-1) != 1:
            return f"{name} has a last stride of {t.stride(-1)}"
        if placed.step.mode == "inference tensors":
            return f"{name} is an inference tensor"
        if placed.step.mode == "leaf" and t.requires_grad:
            return f"{name} is a leaf that requires a gradient"
    return ""


def right_error(error: Exception, shared: set[str], outlaw: str) -> None:
    """A ValueError that names what shares memory, or an error about what may not be written."""
    if shared:
        assert isinstance(error, ValueError) or outlaw, f"{type(error).__name__}: {error}"
        assert any(name in str(error) for name in shared) or outlaw, f"{error} names none of {sorted(shared)}"
    else:
        assert isinstance(error, (ValueError, RuntimeError)), f"{type(error).__name__}: {error}"


def versions_of(placed: Placed) -> dict[str, int]:
    tensors = {name: t for name, t in placed.a.items() if isinstance(t, Tensor)}
    return {name: t._version for name, t in tensors.items() if not t.is_inference()}


def moved(placed: Placed, versions: dict[str, int], either: set[str]) -> None:
    """Asserts that the version counters of the written tensors have advanced, and no others."""
    for name, version in versions.items():
        t = placed.a[name]
        if name in placed.written:
            assert t.numel() == 0 or t._version > version, f"the version counter of {name} did not advance"
        else:
            assert t._version == version or name in either, f"the version counter of {name} advanced"


def intact(placed: Placed, made: Fresh, incoming: list[Buffer]) -> None:
    for buffer in placed.buffers:
        buffer.check(*placed.written)
    for buffer in incoming:
        buffer.check()
    made.check()


def unchanged(placed: Placed, made: Fresh) -> None:
    """Asserts that a call that raised has written nothing."""
    for buffer in placed.buffers:
        buffer.check()
    made.check()


def died(placed: Placed, made: Fresh) -> None:
    """Asserts that a call whose launch died has changed nothing except the tensors that it writes."""
    intact(placed, made, [])


def counted(placed: Placed, before: int, natively: int, backward: bool, faulty: bool) -> bool:
    """Asserts that the call was counted once and ran on the right backend. Returns whether that was a kernel."""
    op, wanted = placed.f.op.name, settings.get().backend
    if backward:  # autograd runs other ops for an op that writes
        return False
    assert dispatch.calls(op) == before + 1, f"{op} was counted {dispatch.calls(op) - before} times"
    ran_natively = dispatch.calls(op, "native") - natively
    if wanted == "native" or not KERNELS:
        assert ran_natively == 1, f"{op} ran on Triton under {wanted}"
    elif ran_natively and not faulty:
        reasons = {route.reason for route in dispatch.routes() if route.op.name == op and route.backend == "native"}
        assert any(reason.startswith(REFUSALS) for reason in reasons), f"{op} ran natively: {reasons}"
    return ran_natively == 0 and op != "layernorm_linear"  # its output comes from torch's product


def contiguous(output: Tensor) -> None:
    """Asserts that an output has the strides of a new tensor of its shape."""
    dense = torch.empty(output.shape, device="meta").stride()
    assert output.stride() == dense, f"an output of shape {list(output.shape)} has strides {output.stride()}"


def differentiated(
    placed: Placed, outputs: tuple[Tensor, ...], leaves: dict[str, Tensor], incoming: list[Buffer]
) -> None:
    """Computes the gradients from incoming ones in guarded memory, and checks them."""
    step = placed.step
    grads: list[Tensor | None] = []
    for number, output in enumerate(outputs):
        layout = tuple(READABLE)[(step.seed + 3 * number) % len(READABLE)]
        shape = tuple(output.shape)
        strides = step.strides(layout) if shape == step.shape else torch.empty(shape, device="meta").stride()
        buffer = Buffer(extent(shape, strides), output.dtype, DEVICE)
        grads.append(buffer.tensor("grad", shape, strides))
        buffer.fill("grad", inputs.randn([len(buffer.inside["grad"])], 100 + step.seed + number))
        buffer.seal()
        incoming.append(buffer)
    if len(grads) > 1 and step.seed % 4:  # through one output only
        grads[step.seed % 2] = None
    used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    outs, out_grads = map(list, zip(*used, strict=True))
    found = torch.autograd.grad(outs, list(leaves.values()), out_grads, allow_unused=True)
    given = {key: gradient for key, gradient in zip(leaves, found, strict=True) if gradient is not None}
    for key, gradient in given.items():
        assert (gradient.shape, gradient.dtype) == (leaves[key].shape, leaves[key].dtype)
        if key in placed.f.by_row and grads[0] is not None:  # with only a sum, it is the incoming one
            contiguous(gradient)
    limits.right(placed.f.op.name, placed.before, given, grads)
