"""A run that is killed, at every step: whoever comes next finds the engine whole."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from norm_plugin import cli
from norm_plugin.patching import PatchError, work
from norm_plugin.patching import site as sites
from norm_plugin.patching.tree import STATE, Tree
from tests.patches.conftest import Site, contents
from tests.patches.processes import in_a_process

ENGINE, WHEEL = "vllm", "vllm==0.33.0"
FIRST, SECOND = "native-switch", "strided-gate"

KILLED = -9


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process leaves its writes to the kernel, so nothing here waits for a disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def prepared(name: str, folder: Path) -> Callable[[], object]:
    """What is killed, after what must come before it."""
    found = sites.find(ENGINE, folder)
    if name == "apply":
        return lambda: work.apply(found, [FIRST])
    work.apply(found, [FIRST])
    if name == "apply a second":
        return lambda: work.apply(found, [SECOND])
    if name == "revert":
        return lambda: work.revert(found)
    work.apply(found, [SECOND])
    return lambda: work.revert(found, [FIRST])


@pytest.mark.parametrize("doing", ["apply", "apply a second", "revert", "revert one of two"])
def test_killed_at_every_step(doing: str, site: Site, tmp_path: Path) -> None:
    folder = site(ENGINE, WHEEL)
    released = contents(folder)
    found = sites.find(ENGINE, folder)
    do = prepared(doing, folder)
    before = contents(folder / ENGINE)
    shutil.copytree(folder, tmp_path / "kept")
    assert in_a_process(do) == 0
    after = contents(folder / ENGINE)
    assert after != before
    for step in range(1, 200):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "kept", folder)
        status = in_a_process(do, step, folder)
        assert status in (0, KILLED)
        now = contents(folder / ENGINE)
        for path in before:
            assert now[path] in (before[path], after[path]), f"{path} is torn after step {step}"
        states = {state.state for state in work.states(found)}
        torn = now not in ({**now, **before}, {**now, **after})
        assert not torn or states == {"interrupted"}, "what is half done must be said"
        if status == 0:
            break
        shutil.copytree(folder, tmp_path / "dead", dirs_exist_ok=True)
        in_a_process(do)  # the same again, as a user would: it may have been done already, or goes through now
        assert contents(folder / ENGINE) == after, f"after a kill at step {step} the same command does not finish"
        shutil.rmtree(folder)
        shutil.move(tmp_path / "dead", folder)
        work.revert(found)
        assert contents(folder) == released, f"after a kill at step {step} revert leaves something"
    else:
        pytest.fail("the command never came to its end")
    assert step > 10, "the steps were not seen"


def test_killed_again_while_it_recovers(site: Site, tmp_path: Path) -> None:
    folder = site(ENGINE, WHEEL)
    released = contents(folder)
    found = sites.find(ENGINE, folder)
    for step in range(1, 200):
        if in_a_process(lambda: work.apply(found, [FIRST, SECOND]), step, folder) == 0:
            break
        again = 1
        while in_a_process(lambda: work.revert(found), again, folder) == KILLED:
            again += 1
        assert contents(folder) == released
        assert not (folder / STATE).exists()
    assert step > 10


def test_what_fails_half_way_is_taken_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full at the nth file that is written, for every n."""
    folder = site(ENGINE, WHEEL)
    before = contents(folder)
    found = sites.find(ENGINE, folder)
    write, writes, full_at = Tree.write, 0, 0

    def limited(tree: Tree, path: str, text: bytes, instead_of: str | None = None) -> None:
        nonlocal writes
        writes += 1
        if writes == full_at:
            raise OSError(28, "No space left on device", str(path))
        write(tree, path, text, instead_of)

    monkeypatch.setattr(Tree, "write", limited)
    work.apply(found, [FIRST, SECOND])
    needed = writes
    assert needed > 6
    work.revert(found)
    for full_at in range(1, needed + 1):  # noqa: B007 - `limited` reads it
        writes = 0
        with pytest.raises(PatchError, match="No space left on device; the files are what was there"):
            work.apply(found, [FIRST, SECOND])
        assert contents(folder) == before


def test_ended_by_a_signal_at_every_step(site: Site) -> None:
    """SIGTERM lets the command take back what it has begun, so nothing is interrupted afterwards."""
    folder = site(ENGINE, WHEEL)
    released = contents(folder)
    found = sites.find(ENGINE, folder)
    for step in range(1, 200):
        status = in_a_process(
            lambda: cli.main(["patch", "apply", FIRST, "--engine", ENGINE, "--site", str(folder)]),
            step, folder, signal.SIGTERM,
        )  # fmt: skip
        assert status in (0, 128 + signal.SIGTERM)
        states = {state.state for state in work.states(found)}
        assert "interrupted" not in states
        if "applied" not in states:
            assert contents(folder) == released
        if status == 0:
            break
        work.revert(found)
        assert contents(folder) == released
    assert step > 10, "the steps were not seen"
