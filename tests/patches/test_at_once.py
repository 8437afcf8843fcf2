"""Two at once."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack

import pytest

from norm_plugin.patching import PatchError, catalog, work
from norm_plugin.patching import site as sites
from norm_plugin.patching.store import Store
from tests.patches.conftest import Site, contents
from tests.patches.processes import in_a_process

ENGINE, WHEEL = "vllm", "vllm==0.33.0"


def started(do: object) -> int:
    """A process of its own for this, which is not waited for."""
    child = os.fork()
    if child == 0:
        os._exit(in_a_process(do) & 0xFF)  # type: ignore[arg-type]
    return child


def test_many_at_once_end_as_one_after_another(site: Site) -> None:
    folder = site(ENGINE, WHEEL)
    released = contents(folder)
    found = sites.find(ENGINE, folder)
    names = [patch.name for patch in catalog.of(ENGINE, found.version) if patch.unasked]
    work.apply(found, names)
    together = contents(folder / ENGINE)
    for _ in range(5):
        work.revert(found)
        assert contents(folder) == released
        children = [started(lambda name=name: work.apply(found, [name])) for name in [*names, *names]]
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * len(children)
        assert contents(folder / ENGINE) == together
        children = [started(lambda: work.revert(found)) for _ in range(4)]
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
        assert contents(folder) == released


def test_a_lock_is_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that has it ends while another sleeps, for the third time."""
    store = Store(site(ENGINE, WHEEL), ENGINE)
    slept: list[float] = []
    with ExitStack() as other_run:
        other_run.enter_context(store.tree.held(store.lock))

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == 3:
                other_run.close()

        monkeypatch.setattr(time, "sleep", sleep)
        with store.tree.held(store.lock):
            assert len(slept) == 3


def test_a_lock_that_stays_taken_is_given_up_with_a_reason(site: Site) -> None:
    store = Store(site(ENGINE, WHEEL), ENGINE)
    with (
        store.tree.held(store.lock),
        pytest.raises(PatchError, match="another run of norm-plugin patch"),
        store.tree.held(store.lock, 0.3),
    ):
        pass
    with store.tree.held(store.lock, 0):
        pass


def test_a_killed_runs_lock_is_free(site: Site) -> None:
    store = Store(site(ENGINE, WHEEL), ENGINE)

    def die() -> None:
        with store.tree.held(store.lock):
            os.kill(os.getpid(), 9)

    assert in_a_process(die) == -9
    with store.tree.held(store.lock, 0):
        pass
