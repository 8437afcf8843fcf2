"""Every patch on the released files of the version that it is for."""

from __future__ import annotations

import compileall
import shutil
import subprocess
from pathlib import Path

import pytest

from norm_plugin.patching import catalog, diff, work
from norm_plugin.patching import site as sites
from norm_plugin.patching.catalog import sha256
from tests.patches.conftest import INDEX, VERSIONS, Site, contents

EACH = [
    pytest.param(engine, requirement, patch.name, id=f"{requirement}-{patch.name}")
    for engine, requirement, _ in VERSIONS
    for patch in catalog.of(engine, requirement.split("==")[1])
]


@pytest.mark.parametrize(("engine", "requirement", "name"), EACH)
def test_applies_compiles_and_reverts_to_the_same_bytes(engine: str, requirement: str, name: str, site: Site) -> None:
    folder = site(engine, requirement)
    before = contents(folder)
    found = sites.find(engine, folder)
    assert work.apply(found, [name]) == (name,)
    (patch,) = catalog.named(catalog.of(engine, found.version), [name])
    changed = {path for path, text in before.items() if (folder / path).read_bytes() != text}
    assert changed == set(patch.files)
    for path in changed:
        assert compileall.compile_file(folder / path, quiet=1, force=True)
    assert work.revert(found) == (name,)
    shutil.rmtree(folder / engine / "__pycache__", ignore_errors=True)
    assert {path: text for path, text in contents(folder).items() if not path.endswith(".pyc")} == before


@pytest.mark.parametrize(("engine", "requirement", "name"), EACH)
def test_git_applies_the_same_by_hand(engine: str, requirement: str, name: str, site: Site) -> None:
    ours, by_hand = site(engine, requirement), site(engine, requirement, "by_hand")
    found = sites.find(engine, ours)
    work.apply(found, [name])
    (patch,) = catalog.named(catalog.of(engine, found.version), [name])
    subprocess.run(["git", "init", "-q"], cwd=by_hand, check=True)
    subprocess.run(["git", "apply", "--unidiff-zero", str(patch.place.resolve())], cwd=by_hand, check=True)
    for path in patch.files:
        assert (by_hand / path).read_bytes() == (ours / path).read_bytes()
    states = {state.patch.name: state for state in work.states(sites.find(engine, by_hand))}
    assert states[name].state == "refused"
    assert "not put there by this tool" in states[name].reason


@pytest.mark.parametrize(("engine", "requirement"), [(engine, requirement) for engine, requirement, _ in VERSIONS])
def test_all_that_need_no_name_go_together_and_come_back_one_by_one(engine: str, requirement: str, site: Site) -> None:
    folder = site(engine, requirement)
    before = contents(folder)
    found = sites.find(engine, folder)
    names = [patch.name for patch in catalog.of(engine, found.version) if patch.unasked]
    assert len(names) > 1
    work.apply(found, names)
    together = contents(folder / engine)
    for name in names:
        work.revert(found, [name])
        work.apply(found, [name])
        assert contents(folder / engine) == together, "the order of patches must not matter"
    for name in names:
        work.revert(found, [name])
    assert contents(folder) == before


@pytest.mark.parametrize("entry", INDEX, ids=lambda entry: f"{entry['engine']}-{entry['release']}")
def test_a_head_says_what_the_index_says_and_stays_small(entry: dict[str, object]) -> None:
    for patch in catalog.of(str(entry["engine"]), str(entry["release"])):
        lines = patch.diff.head.splitlines()
        assert lines[0] == f"{patch.name}: {patch.summary}"
        for part in ("For", "What", "Why", "Test", "How"):
            assert any(line.startswith(f"{part} ") for line in lines), f"{patch.place} has no {part}"
        assert ("only when it is named" in " ".join(patch.diff.head.split())) == (not patch.unasked)
        carried = sum(len(hunk.removed) for hunks in patch.diff.files.values() for hunk in hunks)
        assert carried <= 10, "a patch carries as few lines of the engine's text as can be"


def test_the_switch_and_the_direct_replacement_only_insert() -> None:
    for patch in catalog.patches():
        if patch.name.startswith("native-"):
            assert not any(hunk.removed for hunks in patch.diff.files.values() for hunk in hunks)


def test_no_diff_is_left_out_of_the_index() -> None:
    listed = {patch.place.resolve() for patch in catalog.patches()}
    assert listed == {path.resolve() for path in catalog.folder().glob("*/*/*.diff")}


def test_every_byte_outside_a_hunk_stays(tmp_path: Path) -> None:
    text = b"a\r\nb\nc\x0cd\n\xff last line without an end"
    hunk = diff.Hunk(1, (b"b\n",), (b"B\n", b"and more\n"))
    assert diff.apply(text, [hunk], "file.py") == b"a\r\nB\nand more\nc\x0cd\n\xff last line without an end"
    assert sha256(diff.apply(text, [], "file.py")) == sha256(text)
