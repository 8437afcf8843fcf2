"""A record of a stranger's making: nothing outside the tree is touched, and what is no record is one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from norm_plugin.commands.errors import NOT_RUN
from norm_plugin.patching.catalog import sha256
from norm_plugin.patching.tree import STATE
from tests.patches.conftest import VICTIM
from tests.patches.planted import MIXER, Plant, all_refuse, plant, record, typed

# --- the paths that a record names --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["record.json", "pending.json"])
@pytest.mark.parametrize(
    "path",
    [
        "../victim.py", "{outside}/victim.py", "vllm/../../victim.py", "vllm/./x.py", "vllm//x.py", "./vllm/x.py",
        "vllm/", "vllm", "", ".", "victim.py", "sglang/x.py", f"{STATE}/vllm/record.json", "vllm/\x00", "vllm/a\nb.py",
        "vllm/\x1b[2J.py", "vllm/\ud800.py",
    ],
)  # fmt: skip
def test_a_record_that_names_another_place(
    path: str, name: str, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tree, name, record(path.format(outside=tree.parent)))
    all_refuse(capsys, tree, f"{name} is no record of norm-plugin patch: ", actions=("list", "check")[: name[0] == "r"])


def link_to_the_victim(folder: Path, name: str) -> None:
    (folder / "vllm" / name).symlink_to("../../victim.py")


def link_to_its_folder(folder: Path, name: str) -> None:
    (folder / "vllm" / "out").symlink_to(folder.parent)


def link_over_a_link(folder: Path, name: str) -> None:
    (folder / "vllm" / "more").symlink_to("..")
    (folder / "vllm" / name).symlink_to("more/../victim.py")


@pytest.mark.parametrize("name", ["record.json", "pending.json"])
@pytest.mark.parametrize(
    ("make", "path"),
    [
        (link_to_the_victim, "vllm/linked.py"),
        (link_to_its_folder, "vllm/out/victim.py"),
        (link_over_a_link, "vllm/linked.py"),
    ],
)
def test_a_record_that_names_a_link_out_of_the_tree(
    make: Plant, path: str, name: str, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tree, "linked.py")
    plant(tree, name, record(path))
    all_refuse(capsys, tree, "leads through a link to", actions=("list", "check")[: name[0] == "r"])


def test_a_record_with_a_link_to_the_state_itself(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "vllm" / "linked.py").symlink_to(f"../{STATE}/vllm/kept/{sha256(VICTIM)}")
    plant(tree, "record.json", record("vllm/linked.py"))
    all_refuse(capsys, tree, "leads through a link to")


@pytest.mark.parametrize("how", [os.symlink, os.link])
def test_a_record_with_one_file_twice(
    how: Callable[[Path, Path], None], tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "vllm/one.py").write_bytes(VICTIM)
    how(tree / "vllm/one.py", tree / "vllm/two.py")
    plant(tree, "record.json", record("vllm/one.py", "vllm/two.py"))
    all_refuse(capsys, tree, "vllm/two.py and vllm/one.py are one file")


# --- records that are none ----------------------------------------------------------------------------------------

GOOD = {"version": "0.33.0", "patches": ["mixer2-groups"], "files": {MIXER: {"before": "0" * 64, "after": "1" * 64}}}
BROKEN = {
    "empty": b"",
    "white": b" \n",
    "half": json.dumps(GOOD).encode()[:-9],
    "not UTF-8": b'{"version": "\xff"}',
    "a list": b"[]",
    "null": b"null",
    "a number": b"1" * 5000,
    "no files": json.dumps({**GOOD, "files": {}}).encode(),
    "no patches": json.dumps({**GOOD, "patches": []}).encode(),
    "a field is missing": json.dumps({"version": "0.33.0", "patches": []}).encode(),
    "a field of a later form": json.dumps({**GOOD, "form": 2}).encode(),
    "the version is a number": json.dumps({**GOOD, "version": 33}).encode(),
    "the version is null": json.dumps({**GOOD, "version": None}).encode(),
    "the version has an escape": json.dumps({**GOOD, "version": "\x1b[2J"}).encode(),
    "the patches are a text": json.dumps({**GOOD, "patches": "mixer2-groups"}).encode(),
    "a patch is a list": json.dumps({**GOOD, "patches": [[]]}).encode(),
    "a patch twice": json.dumps({**GOOD, "patches": ["mixer2-groups"] * 2}).encode(),
    "a patch with an end of line": json.dumps({**GOOD, "patches": ["a\nb"]}).encode(),
    "the files are a list": json.dumps({**GOOD, "files": [MIXER]}).encode(),
    "a change is a text": json.dumps({**GOOD, "files": {MIXER: "0" * 64}}).encode(),
    "a hash is a path": json.dumps({**GOOD, "files": {MIXER: {"before": "../../x", "after": "1" * 64}}}).encode(),
    "a hash in capitals": json.dumps({**GOOD, "files": {MIXER: {"before": "A" * 64, "after": "1" * 64}}}).encode(),
    "a hash is missing": json.dumps({**GOOD, "files": {MIXER: {"before": "0" * 64}}}).encode(),
    "a file twice": json.dumps(GOOD).encode().replace(b'"files": {', b'"files": {"%s": {},' % MIXER.encode()),
    "deep": b"[" * 100_000,
    "huge": json.dumps({**GOOD, "patches": ["a"] * 200_000}).encode(),
}


@pytest.mark.parametrize("name", ["record.json", "pending.json"])
@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_record(text: bytes, name: str, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tree, name, text)
    remedy = f"Nothing was changed. Install the engine again, and remove {tree / STATE / 'vllm'}"
    all_refuse(capsys, tree, remedy, actions=("list", "check")[: name[0] == "r"])


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["a folder", "a pipe"])
def test_a_record_that_is_no_file(make: Callable[[Path], None], tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tree, "record.json", b"")
    (tree / STATE / "vllm/record.json").unlink()
    make(tree / STATE / "vllm/record.json")
    before = sorted(tree.rglob("*"))
    for action in ("list", "check", "apply", "revert"):
        status, _, err = typed(capsys, action, tree)
        assert status == NOT_RUN
        assert "record.json is not a file: move it away" in err
        assert sorted(tree.rglob("*")) == before
