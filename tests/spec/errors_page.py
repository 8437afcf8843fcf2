"""Writes docs/errors.md from the calls that the tests refuse: `python -m tests.spec.errors_page`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch

import norm_plugin
from norm_plugin.ops import OPS
from tests.spec.refused import REFUSED
from tests.spec.test_errors import BAD, Bad

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"

#: What is wrong, and what the whole message looks like then. Each message must be of one of these alone.
KINDS = {
    "a dtype that this argument cannot have": r"\w+ has dtype .* Cast it\.",
    "a tensor on another device than the input": r"\w+ is on .*; move .*",
    "nothing to normalize": r"\w+ has shape .* at least one element\.",
    "another shape than the input's": r"\w+ has shape .*; it must have the shape of .*",
    "not one number for each row": r"\w+ has shape .*, one number a row of .*",
    "another length than the rows of the input have, or than a linear layer has outputs":
        r"\w+ has shape .*; it must be \[\d+\], the (last dimension|number of rows) of .*",
    "a linear layer for rows of another length": r"\w+ has shape .*; it must be \[out_features, \d+\]\.",
    "more or less than one element": r"\w+ has shape .* exactly one element\.",
    "a size that does not go with the length of a row":
        r"\w+ is -?\d+; it must (divide|lie in|be at least) .*last dimension of .*",
    "a number that an eps cannot be": r"\w+ is .* finite number of at least 0\.",
    "a name that is not known": r"\w+ is '.*'; it must be one of .*",
    "None, where there must be something": r"\w+ is None, .*",
    "no tensor, where torch's schema wants one": r".* Expected a value of type .*",
    "written, with gaps between its elements": r"\w+ has strides .* its last stride must be 1\.",
    "written, with elements that are the same memory":
        r"\w+ (is expanded|has shape .* so some of its elements are the same memory).* clone it first\.",
    "two that are written, and are the same memory": r"\w+ and \w+ are the same memory, .*",
    "written, and in part the memory of another": r"\w+ and \w+ overlap in memory, .*",
    "written, and a leaf that requires a gradient": r"\w+ is a leaf that requires a gradient, .*",
    "written, and a view that torch does not let be written": r"\w+ is a view that torch does not let be written .*",
    "written outside of inference mode, and made in it": r"\w+ is an inference tensor, .*",
    "written by an op that has no gradient, and requires one": r"\w+ requires a gradient, .*",
    "written, and with the negative bit": r"\w+ has the negative bit, .*",
    "forward-mode differentiation of an op instead of a function": r".* has no formula for forward-mode .*",
}  # fmt: skip

HEAD = """\
# Which wrong call gets which error

All checks of a call pass before its first element is written, so a refused call has changed nothing.

A right call whose kernel fails is another matter:

- If the kernel fails before its launch began (it does not compile), nothing was written. Then the native op answers, or
  in an engine the engine's own norm. The call is counted and logged with the reason.
- If the kernel fails later, the same happens, unless the op writes its arguments or the kernel has run before: then the
  error itself is raised.
- `torch.OutOfMemoryError` is always raised.

`NORM_PLUGIN_STRICT=1` changes no row of this table. Under it each call that would go on to the native op or to the
engine's norm raises a `norm_plugin.dispatch.BackendError` instead, with the same reason.

The calls are from `tests/spec/test_errors.py` and `tests/spec/refused.py`; tests make them and compare the messages.
Inputs have 3 rows of 48 elements unless the call shows another shape. A call with only named arguments, such as
`rmsnorm(eps=nan)`, shows the wrong ones and leaves out the others. `tests/spec/refused.py` says what `leaf`, `chunk`
and other named tensors are.

<!-- made by: python -m tests.spec.errors_page -->
| what is wrong | error | for example |
|---|---|---|
"""


class Call(NamedTuple):
    """A refused call, as one would write it."""

    text: str
    error: type[Exception]
    message: str


def shown(value: Any) -> str:
    """A tensor as its dtype and shape, with strides and device where they are unusual."""
    if not isinstance(value, torch.Tensor):
        return repr(value).removeprefix("torch.")
    text = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    strides = "" if value.is_contiguous() else f" of strides {list(value.stride())}"
    return text + strides + (" on meta" if value.is_meta else "")


def written_out(bad: Bad) -> str:
    """By the function of that name, where there is one whose arguments are called so too, or else by the op."""
    takes = signature(getattr(norm_plugin, bad.op)).parameters if bad.op in norm_plugin.__all__ else {}
    function = bad.op if takes.keys() >= bad.wrong.keys() else f"torch.ops.norm_plugin.{bad.op}"
    arguments = (f"{name}={shown(value)}" for name, value in bad.wrong.items() if value is not None)
    return f"{function}({', '.join(arguments)})"


def calls() -> Iterator[Call]:
    """Every call that the tests refuse, the ops in the order in which they are defined."""
    for bad in sorted(BAD.values(), key=lambda bad: list(OPS).index(bad.op)):
        yield Call(written_out(bad), bad.error, bad.message)
    for refused in REFUSED:
        yield Call(refused.call, refused.error, refused.message)


def arguments(message: str) -> list[str]:
    """The arguments that a message begins with."""
    known = {name for op in OPS.values() for name in op.arguments}
    begin = re.match(r"(\w+)(?: and (\w+))? ", message)
    return [name for name in begin.groups() if name in known] if begin else []


def row(what: str, of_kind: list[Call]) -> str:
    errors = {call.error.__name__ for call in of_kind}
    if len(errors) != 1:
        raise ValueError(f"{what!r} must have calls of one error, and has {sorted(errors)}")
    named = dict.fromkeys(name for call in of_kind for name in arguments(call.message))
    where = f" ({', '.join(f'`{name}`' for name in named)})" if named else ""
    example = of_kind[0]
    return f"| {what}{where} | `{errors.pop()}` | `{example.text}`: {example.message} |\n"


def page() -> str:
    kinds: dict[str, list[Call]] = {what: [] for what in KINDS}
    for call in calls():
        found = [what for what, pattern in KINDS.items() if re.fullmatch(pattern, call.message)]
        if len(found) != 1:
            raise ValueError(f"a message must be of one kind of this file, not of {found}: {call.message}")
        kinds[found[0]].append(call)
    return HEAD + "".join(row(what, of_kind) for what, of_kind in kinds.items())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
