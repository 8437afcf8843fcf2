"""Calls in any order: a state machine that mixes functions, rows, strides, offsets, dtypes, gradients and flags.

A call may depend on the state of norm_plugin: routes, plans, flags. Every example starts without any, so that a failure
repeats. hypothesis prints the shortest sequence that fails.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from norm_plugin import dispatch, settings
from tests.kernels.device import COMPILED, INTERPRETED
from tests.sequences.calls import INNER, OFFSETS, ROWS, WRITABLE, Step, first, steps
from tests.sequences.placing import completed, place
from tests.sequences.running import Died, perform

#: The calls of one example. There are more than MOST_PLANS of one op, so that plans are dropped too.
AN_EXAMPLE = 50

FLAGS = st.sampled_from(
    ({"backend": "native"}, {"backend": "triton"}, {"backend": "triton"}, {"backend": "auto"},
     {"pdl": True}, {"pdl": False}, {"pdl": None})
)  # fmt: skip


@contextmanager
def dying() -> Iterator[None]:
    """Makes the next launch raise after its kernel has run."""
    if COMPILED:
        from triton import knobs

        def leave(*_: Any) -> None:
            raise Died("a hook of the launch died")

        def enter(*_: Any) -> None:
            """A hook on launches, so that Triton does them, and calls the other hook too."""

        hooks = {knobs.runtime.launch_enter_hook: enter, knobs.runtime.launch_exit_hook: leave}
        for hook, seen in hooks.items():
            hook.add(seen)
        try:
            yield
        finally:
            for hook, seen in hooks.items():
                hook.remove(seen)
        return
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def run_and_die(self: Any, *args: Any, **named: Any) -> None:
        run(self, *args, **named)
        raise Died("a program died")

    with mock.patch.object(GridExecutor, "__call__", run_and_die):
        yield


@dataclass
class Counts:
    """What all examples did so far."""

    steps: int = 0


DONE = Counts()


class Sequences(RuleBasedStateMachine):
    """Calls in any order."""

    #: The backend while no block of flags is open. Without kernels all calls run natively.
    backend = "triton" if COMPILED or INTERPRETED else "native"

    def __init__(self) -> None:
        super().__init__()
        self.open: list[AbstractContextManager[Any]] = []
        self.made: list[Step] = []
        self.faulty = False
        self.outside = ExitStack()
        self.outside.enter_context(settings.override(backend=self.backend, strict=False, compile=False, pdl=None))
        self.flags = settings.get()
        dispatch.reset()

    def teardown(self) -> None:
        for block in self.open:  # the oldest is closed first, because blocks may overlap
            block.__exit__(None, None, None)
        assert settings.get() == self.flags, "the flags are not what they were before all blocks"
        self.outside.close()
        dispatch.reset()

    def perform(self, step: Step, **how: Any) -> None:
        DONE.steps += 1
        self.made.append(step)
        perform(step, faulty=self.faulty, **how)

    @rule(step=steps())
    def call(self, step: Step) -> None:
        """Any call."""
        self.perform(step)

    @precondition(lambda self: self.made)
    @rule(which=st.integers(0, 9), rows=st.sampled_from(ROWS), offset=st.sampled_from(OFFSETS))
    def call_with_other_rows(self, which: int, rows: int, offset: int) -> None:
        """A signature again, with other rows."""
        step = self.made[-1 - which % len(self.made)]
        self.perform(replace(step, rows=None if step.rows is None else rows, offset=offset))

    @precondition(lambda self: self.made)
    @rule(which=st.integers(0, 9), rows=st.sampled_from(ROWS), mode=st.sampled_from(("plain", "no_grad", "inference")))
    def call_in_another_mode(self, which: int, rows: int, mode: str) -> None:
        step = self.made[-1 - which % len(self.made)]
        self.perform(replace(step, rows=None if step.rows is None else rows, mode=mode))

    @precondition(lambda self: self.made)
    @rule(which=st.integers(0, 9), layout=st.sampled_from(tuple(WRITABLE)), inner=st.sampled_from(INNER))
    def call_in_another_layout(self, which: int, layout: str, inner: tuple[int, ...]) -> None:
        step = self.made[-1 - which % len(self.made)]
        self.perform(replace(step, layouts=(layout, step.layouts[1], layout), inner=inner))

    @precondition(lambda self: len(self.open) < 4)
    @rule(fields=FLAGS)
    def open_flags(self, fields: dict[str, Any]) -> None:
        """Opens a block of other flags. Blocks end in any order."""
        block = settings.override(**fields)
        block.__enter__()
        self.open.append(block)
        assert all(getattr(settings.get(), key) == value for key, value in fields.items())

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 3))
    def close_flags(self, which: int) -> None:
        self.open.pop(which % len(self.open)).__exit__(None, None, None)

    @rule(step=steps())
    def call_on_meta_tensors(self, step: Step) -> None:
        """They have no values, and must not change any later call."""
        placed = place(replace(completed(step), mode="plain", relation="apart"))
        a = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in placed.a.items()}
        if any(v.shape[-1] > 1 and v.stride(-1) != 1 for k, v in a.items() if k in placed.written):
            return
        for output in first(placed.f.call(a)):
            assert output.device.type == "meta"
            assert math.prod(output.shape[:-1]) == math.prod(step.shape[:-1])

    @precondition(lambda self: (COMPILED or INTERPRETED) and settings.get().backend != "native")
    @rule(step=steps())
    def call_that_dies(self, step: Step) -> None:
        """A launch that fails after it began. Either the result is right, or the call raises."""
        self.faulty = True
        self.perform(replace(step, mode="plain" if step.mode == "backward" else step.mode), fault=dying)

    @precondition(lambda self: self.faulty)
    @rule()
    def forget_what_died(self) -> None:
        """Until then, ops that fell back may stay native."""
        dispatch.reset()
        self.faulty = False


#: The calls of one run of hypothesis. Each run has its own seed.
A_SLICE = 500


def about(*functions: str) -> type[Sequences]:
    """A machine that calls only these functions."""

    class About(Sequences):
        @rule(step=steps(functions))
        def call(self, step: Step) -> None:
            self.perform(step)

        @precondition(lambda self: (COMPILED or INTERPRETED) and settings.get().backend != "native")
        @rule(step=steps(functions))
        def call_that_dies(self, step: Step) -> None:
            self.faulty = True
            self.perform(replace(step, mode="plain" if step.mode == "backward" else step.mode), fault=dying)

    return About


def run(count: int, seed: int, *, shrink: bool = True, until: float = math.inf, of: type[Sequences] = Sequences) -> int:
    """Makes at least `count` calls, or fewer if time.monotonic() passes `until`, and returns their number. The same
    seed makes the same calls."""
    DONE.steps = 0
    while DONE.steps < count and time.monotonic() < until:
        left = min(A_SLICE, count - DONE.steps)  # some rules make no call, so one more slice may be needed
        how = hypothesis.settings(
            max_examples=max(1, left // AN_EXAMPLE),
            stateful_step_count=min(left, AN_EXAMPLE),
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )

        class Seeded(of):  # type: ignore[valid-type,misc]
            pass

        run_state_machine_as_test(hypothesis.seed(seed + DONE.steps)(Seeded), settings=how)
    return DONE.steps
