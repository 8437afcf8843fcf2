"""Eight threads call all functions while flags flip: every result right, every call counted, nothing stale.

If kernels can run here, they do, and the bits of a result say which backend it came from, as far as the two differ.
Otherwise stand-ins replace the kernels: they compute as the native op and record that they ran. So routes and plans of
both backends are made and dropped some hundred times a second.

SEQUENCE_SECONDS   how long each of the two tests runs
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from norm_plugin import dispatch, kernels, settings
from norm_plugin.gradients import BACKWARD_OPS
from norm_plugin.kernels import Bound
from norm_plugin.ops import OPS
from tests.kernels.device import COMPILED, INTERPRETED
from tests.sequences.samples import Sample, same, samples

SECONDS = float(os.environ.get("SEQUENCE_SECONDS", 3))
THREADS = 8
REAL = COMPILED or INTERPRETED


class Ran(threading.local):
    """How often a stand-in ran in this thread."""

    count = 0


RAN = Ran()


def stand_in(kind: str, op: str) -> Callable[..., Bound]:
    """A kernel that runs the native op and counts."""
    native = (OPS | BACKWARD_OPS)[op].native

    def bind(*_: Any) -> Bound:
        def run(*args: Any) -> Any:
            RAN.count += 1
            return native(*args)

        return Bound(run)

    return bind


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not REAL:
        monkeypatch.setattr(kernels, "unavailable", lambda device: "")
        monkeypatch.setattr(kernels, "find", stand_in)
    with settings.override(backend="triton", strict=False, compile=False, pdl=None):
        dispatch.reset()
        yield
    dispatch.reset()


class Flips:
    """Threads that open and close blocks of flags. `number` is odd while a block asks for native."""

    def __init__(self) -> None:
        self.number = 0
        self.end = threading.Event()
        self.seen = threading.Event()  # a call that ran while `number` was odd

    def backend(self) -> None:
        chance = random.Random(1)
        while not self.end.is_set():
            with settings.override(backend="native"):
                self.number += 1
                if self.number % 20 == 1:  # on a busy machine no call would fit between two flips
                    self.seen.clear()
                    self.seen.wait(1)
                time.sleep(chance.choice((0, 0.0005, 0.003)))
                self.number += 1
            time.sleep(chance.choice((0, 0.0005, 0.003)))

    def others(self) -> None:
        """Blocks of another flag, which overlap those and each other."""
        chance = random.Random(2)
        while not self.end.is_set():
            first, second = settings.override(pdl=False), settings.override(report=None, pdl=True)
            first.__enter__()
            second.__enter__()
            time.sleep(chance.choice((0, 0.001)))
            first.__exit__(None, None, None)
            time.sleep(chance.choice((0, 0.001)))
            second.__exit__(None, None, None)


class Worker(threading.Thread):
    """Makes calls, and collects what was wrong with them."""

    def __init__(self, number: int, made: list[Sample], flips: Flips, until: float) -> None:
        super().__init__(daemon=True)
        self.made, self.flips, self.until = made, flips, until
        self.chance = random.Random(100 + number)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.natively = 0

    def run(self) -> None:
        while time.monotonic() < self.until and len(self.wrong) < 3:
            sample = self.chance.choice(self.made)
            try:
                self.call(sample)
            except Exception as error:
                self.wrong.append(f"{sample.f.name}: {type(error).__name__}: {error}")

    def call(self, sample: Sample) -> None:
        self.counts.update(sample.ops)
        before, ran = self.flips.number, RAN.count
        found = sample.run()
        native_all_along = before % 2 == 1 and self.flips.number == before
        if not sample.right(found):
            self.wrong.append(f"{sample.f.name}: a wrong result")
        if native_all_along:
            self.natively += 1
            self.flips.seen.set()
            if RAN.count != ran or not same(found, sample.native):
                self.wrong.append(f"{sample.f.name}: ran on Triton while the flags said native")


def quietly_native(made: list[Sample]) -> None:
    """Asserts that no earlier route is used once native is asked for."""
    with settings.override(backend="native"):
        counts = {op: dispatch.calls(op, "triton") for sample in made for op in sample.ops}
        ran = RAN.count
        for sample in made:
            assert same(sample.run(), sample.native), sample.f.name
        assert RAN.count == ran, "a stale plan or route was used"
        assert {op: dispatch.calls(op, "triton") for op in counts} == counts
        assert {route.backend for route in dispatch.routes()} == {"native"}


@pytest.mark.parametrize("most", [None, 8], ids=["few signatures", "more than MOST_ROUTES"])
def test_threads_that_call_while_flags_flip(most: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if most is not None:
        monkeypatch.setattr(dispatch, "MOST_ROUTES", most)
    made = samples(kernels=lambda: settings.override(backend="triton"))
    asked = settings.get()
    before = {op: dispatch.calls(op) for sample in made for op in sample.ops}
    flips = Flips()
    flippers = [threading.Thread(target=run, daemon=True) for run in (flips.backend, flips.others)]
    workers = [Worker(n, made, flips, time.monotonic() + SECONDS) for n in range(THREADS)]
    for thread in (*workers, *flippers):
        thread.start()
    for worker in workers:
        worker.join()
    flips.end.set()
    for flipper in flippers:
        flipper.join()
    wrong = [line for worker in workers for line in worker.wrong]
    assert not wrong, "\n".join(sorted(set(wrong))[:20])
    counts = sum((worker.counts for worker in workers), Counter())
    found = {op: dispatch.calls(op) - before[op] for op in before}
    assert found == {op: counts[op] for op in before}, "calls were counted wrong"
    assert sum(worker.natively for worker in workers) > 0, "no call began and ended while the flags said native"
    assert settings.get() == asked, "the flags are not what they were before all blocks"
    quietly_native(made)
    triton = {op: dispatch.calls(op, "triton") for op in before}
    for sample in made:
        assert same(sample.run(), sample.triton), sample.f.name
    assert all(dispatch.calls(op, "triton") > triton[op] for op in before), "an op stays native"


def test_stand_ins_say_that_they_ran() -> None:
    """So that the test above can fail."""
    if REAL:
        pytest.skip("the kernels themselves run here, and the bits of their results say so")
    made = samples(kernels=lambda: settings.override(backend="triton"))
    ran = RAN.count
    for sample in made:
        sample.run()
    assert ran + sum(len(sample.ops) for sample in made) == RAN.count
