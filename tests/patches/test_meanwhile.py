"""What changes while a tree is patched, who may write there, and what its names do to a terminal."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from norm_plugin import cli
from norm_plugin.commands.errors import NOT_RUN
from norm_plugin.patching.tree import STATE, Tree
from tests.patches.conftest import VICTIM, Site, contents
from tests.patches.planted import GUARD, MIXER, all_refuse, typed
from tests.patches.processes import in_a_process

# --- what changes meanwhile, and who may write --------------------------------------------------------------------


@pytest.mark.parametrize("path", [MIXER, GUARD])
def test_a_file_that_changes_between_the_look_and_the_writing(
    path: str, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody's editor saves while the new text is on its way: theirs stays, and all that was done is taken back."""
    before = contents(tree)
    sync = os.fsync

    def saved(handle: int) -> None:
        if Path(path).name in os.readlink(f"/proc/self/fd/{handle}"):
            (tree / path).write_bytes(VICTIM)
        sync(handle)

    monkeypatch.setattr(os, "fsync", saved)
    status, _, err = typed(capsys, "apply", tree)
    assert status == NOT_RUN
    assert f"{path} was changed by somebody else meanwhile, and stays as it is" in err
    assert contents(tree) == {**before, path: VICTIM}


@pytest.mark.parametrize("part", ["", "vllm/model_executor"], ids=["the tree", "a folder in it"])
def test_a_folder_that_becomes_a_link_meanwhile(
    part: str, tree: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between the look at where a path leads and its opening, as whoever owns a tree can do it to root."""
    shutil.copytree(tree, outside / "other")
    before = contents(outside)
    real = Tree.real

    def swapped(of: Tree, path: str) -> str:
        found = real(of, path)
        place = tree / part
        if path == MIXER and not place.is_symlink():
            place.rename(outside.parent / "away")
            place.symlink_to(outside / "other" / part)
        return found

    monkeypatch.setattr(Tree, "real", swapped)
    status, out, err = typed(capsys, "apply", tree)
    assert (status, out) == (NOT_RUN, "")
    assert "is a link, or leads through one" in err or "leads through a link to" in err
    assert contents(outside) == before


@pytest.fixture
def anybodys() -> Iterator[Path]:
    """A folder that every user may look into, which pytest's are not."""
    folder = Path(tempfile.mkdtemp(prefix="patches.", dir=os.environ["PYTEST_DEBUG_TEMPROOT"]))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_folder_that_may_not_be_written(tree: Path, anybodys: Path) -> None:
    folder = Path(shutil.copytree(tree, anybodys / "site"))
    for place in (folder, *folder.rglob("*")):
        place.chmod(0o555 if place.is_dir() else 0o444)
    before = contents(folder)
    said = anybodys / "said"
    said.touch()
    said.chmod(0o666)

    def apply() -> None:
        if os.getuid() == 0:
            os.setuid(65534)  # root may write everywhere
        with pytest.raises(SystemExit, match=str(NOT_RUN)), said.open("w") as file, redirect_stderr(file):
            cli.main(["patch", "apply", "--engine", "vllm", "--site", str(folder)])

    assert in_a_process(apply) == 0
    line = said.read_text()
    assert line.startswith(f"norm-plugin patch: {folder / STATE}")
    assert line.endswith(": Permission denied: run it as somebody who may write there; the files are what was there.\n")
    assert contents(folder) == before


def test_nobody_gets_rights_by_it(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Root patches a tree of somebody else's: the new file is theirs as the old one was, and runs as nobody else."""
    if os.getuid() == 0:
        os.chown(tree / MIXER, 65534, 65534)
    (tree / MIXER).chmod(0o4755)
    owner = (tree / MIXER).stat().st_uid
    for action in ("apply", "revert"):
        assert typed(capsys, action, tree)[0] == 0
        now = (tree / MIXER).stat()
        assert (now.st_uid, now.st_mode & 0o7777) == (owner, 0o755)


# --- what reaches the terminal ------------------------------------------------------------------------------------


def test_names_that_a_terminal_would_obey(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    folder = site("vllm", "vllm==0.33.0", under="a\n[red]b\x1b[2J")
    shown = "a\\n[red]b\\x1b[2J"
    for action in ("list", "check", "apply", "revert"):
        status, out, err = typed(capsys, action, folder)
        assert (status, err) == (0, "")
        assert out.replace("\n", "").isprintable()
        assert shown in out
    (folder / MIXER).unlink()
    status, out, err = typed(capsys, "apply", folder)
    assert status == NOT_RUN
    assert shown in err
    assert err[:-1].isprintable()


@pytest.mark.parametrize("version", ["0.33.0+\x1b[2J", "0.33.0+" + "a" * 1000, "0.33.0 and more"])
def test_a_version_that_is_none(version: str, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(next(tree.glob("*.dist-info")))
    (tree / "vllm/_version.py").write_text(f"__version__ = '{version}'\n")
    all_refuse(capsys, tree, "which is no version: install it again")


def test_a_version_that_cannot_be_read(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next(tree.glob("*.dist-info/METADATA")).write_bytes(b"Name: vllm\nVersion: 0.33.0\nSummary: \xff\n")
    all_refuse(capsys, tree, "says in no readable way which vllm it is")
