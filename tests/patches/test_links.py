"""Links in a tree of a stranger's making, and others where a file of ours or of the engine should be."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from norm_plugin.commands.errors import NOT_RUN
from norm_plugin.patching.tree import STATE
from tests.patches.conftest import VICTIM, contents
from tests.patches.planted import MIXER, record, typed

# --- links and others where a file or a folder of ours should be --------------------------------------------------


def state_is_a_link(folder: Path, outside: Path) -> None:
    (folder / STATE).symlink_to(outside)


def state_is_a_link_to_nowhere(folder: Path, outside: Path) -> None:
    (folder / STATE).symlink_to(outside / "new")


def state_is_a_file(folder: Path, outside: Path) -> None:
    (folder / STATE).touch()


def engines_state_is_a_link(folder: Path, outside: Path) -> None:
    (folder / STATE).mkdir()
    (folder / STATE / "vllm").symlink_to(outside)


def lock_is_a_link(folder: Path, outside: Path) -> None:
    (folder / STATE).mkdir()
    (folder / STATE / "vllm.lock").symlink_to(outside / "new")


def kept_is_a_link(folder: Path, outside: Path) -> None:
    (folder / STATE / "vllm").mkdir(parents=True)
    (folder / STATE / "vllm" / "kept").symlink_to(outside)


def record_is_a_link(folder: Path, outside: Path) -> None:
    (folder / STATE / "vllm").mkdir(parents=True)
    (outside / "new").write_bytes(record(MIXER))
    (folder / STATE / "vllm" / "record.json").symlink_to(outside / "new")


@pytest.mark.parametrize(
    "make",
    [
        state_is_a_link, state_is_a_link_to_nowhere, state_is_a_file, engines_state_is_a_link, lock_is_a_link,
        kept_is_a_link, record_is_a_link,
    ],
)  # fmt: skip
def test_the_state_leads_out_of_the_tree(
    make: Callable[[Path, Path], None], tree: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tree, outside)
    before = contents(tree.parent)
    status, out, err = typed(capsys, "apply", tree)
    assert (status, out) == (NOT_RUN, "")
    assert "is a link, or leads through one or through a file: put the real one in its place" in err
    assert contents(tree.parent) == before
    assert sorted(path.name for path in outside.iterdir()) == ["new", "own"][make is not record_is_a_link :]


def test_a_link_where_the_new_text_is_written(
    tree: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name is drawn by chance; whoever could guess it all the same gets nothing written."""
    guessed = f".{Path(MIXER).name}.{'ab' * 8}.norm_plugin"
    for name in (f".{Path(MIXER).name}.norm_plugin", guessed):
        (tree / MIXER).with_name(name).symlink_to(outside / "own")
    before = contents(tree / "vllm")
    monkeypatch.setattr(secrets, "token_hex", lambda size: "ab" * size)
    status, _, err = typed(capsys, "apply", tree, "mixer2-groups")
    assert status == NOT_RUN
    assert f"{MIXER}: File exists; the files are what was there" in err
    monkeypatch.undo()
    assert contents(tree / "vllm") == {name: text for name, text in before.items() if not name.endswith(guessed)}
    assert typed(capsys, "apply", tree, "mixer2-groups")[0] == 0
    assert (outside / "own").read_bytes() == VICTIM


def test_compiled_forms_behind_a_link(tree: Path, outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (outside / "mamba_mixer2.cpython-311.pyc").write_bytes(VICTIM)
    (tree / MIXER).with_name("__pycache__").symlink_to(outside)
    before = contents(tree)
    status, _, err = typed(capsys, "apply", tree)
    assert status == NOT_RUN
    assert "__pycache__ is a link" in err
    assert contents(tree) == before
    assert (outside / "mamba_mixer2.cpython-311.pyc").read_bytes() == VICTIM


# --- sources that are links or no files ---------------------------------------------------------------------------


def test_a_source_behind_a_link_in_the_tree(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "vllm/vendored").mkdir()
    (tree / MIXER).rename(tree / "vllm/vendored/mixer.py")
    (tree / MIXER).symlink_to("../../../vendored/mixer.py")
    before = contents(tree)
    said = f"  {MIXER} is a link: what is changed is vllm/vendored/mixer.py\n"
    assert said in typed(capsys, "check", tree, "mixer2-groups")[1]
    assert said in typed(capsys, "apply", tree, "mixer2-groups")[1]
    assert (tree / MIXER).is_symlink()
    assert contents(tree)["vllm/vendored/mixer.py"] != before["vllm/vendored/mixer.py"]
    assert said in typed(capsys, "revert", tree)[1]
    assert (tree / MIXER).is_symlink()
    assert contents(tree) == before


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_source_behind_a_link_out_of_the_tree(
    what: str, tree: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As uv links a file to its cache, and an engine is linked to where it is worked on."""
    place = tree / MIXER if what == "file" else (tree / MIXER).parent
    shutil.move(place, outside / place.name)
    place.symlink_to(outside / place.name)
    before = contents(tree.parent)
    for action in ("check", "apply"):
        status, _, err = typed(capsys, action, tree)
        assert status == NOT_RUN
        assert "name the folder that the package really lies in with --site, or put a copy of the file" in err
        assert contents(tree.parent) == before
        assert place.is_symlink()
    listed = json.loads(typed(capsys, "list", tree, "--json")[1])
    reasons = {patch["name"]: patch["reason"] for patch in listed["patches"]}
    assert "leads through a link to" in reasons["mixer2-groups"]
    assert (reasons["native-switch"] == "") == (what == "file")


def unlinked_then(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        place.unlink()
        make(place)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (unlinked_then(os.mkdir), "mamba_mixer2.py is not a file: "),
        (unlinked_then(os.mkfifo), "mamba_mixer2.py is not a file: "),
        (lambda place: os.truncate(place, 1 << 33), "mamba_mixer2.py is not the file of vllm 0.33.0"),
    ],
    ids=["a folder", "a pipe", "gigabytes of zeros"],
)
def test_a_source_that_is_none(
    change: Callable[[Path], None], reason: str, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(tree / MIXER)
    for action in ("check", "apply"):
        status, _, err = typed(capsys, action, tree)
        assert status == NOT_RUN
        assert reason in err
    assert not (tree / STATE).exists()
