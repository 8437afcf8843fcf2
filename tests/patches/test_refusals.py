"""What is refused, with which words, and that nothing has changed then."""

from __future__ import annotations

import os
import py_compile
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from norm_plugin.patching import PatchError, work
from norm_plugin.patching import site as sites
from tests.patches.conftest import Site, contents

GUARD = "vllm/third_party/flash_linear_attention/ops/layernorm_guard.py"
MIXER = "vllm/model_executor/layers/mamba/mamba_mixer2.py"


@pytest.fixture
def vllm(site: Site) -> Path:
    return site("vllm", "vllm==0.33.0")


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"# mine\n")


def becomes(version: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        metadata = next(folder.glob("*.dist-info/METADATA"))
        metadata.write_text(metadata.read_text().replace("Version: 0.33.0", f"Version: {version}", 1))

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (becomes("0.33.1"), r"no patches for vllm 0\.33\.1; there are for 0\.26\.0, 0\.32\.0, 0\.33\.0"),
        (becomes("0.32.0"), r"mamba_mixer2\.py is not the file of vllm 0\.32\.0: its sha256 is \w+, not \w+"),
        (lambda folder: append(folder / MIXER), r"mamba_mixer2\.py is not the file of vllm 0\.33\.0"),
        (lambda folder: (folder / MIXER).unlink(), r"mamba_mixer2\.py does not exist"),
    ],
    ids=["unknown version", "files of another version", "changed file", "missing file"],
)
def test_an_engine_that_is_not_what_it_says(vllm: Path, change: Callable[[Path], None], reason: str) -> None:
    change(vllm)
    before = contents(vllm)
    for do in (work.check, work.apply):
        with pytest.raises(PatchError, match=reason):
            do(sites.find("vllm", vllm), ["native-switch", "mixer2-groups"])
        assert contents(vllm) == before


def test_one_that_does_not_go_keeps_the_others_out(vllm: Path) -> None:
    append(vllm / GUARD)
    before = contents(vllm)
    found = sites.find("vllm", vllm)
    with pytest.raises(PatchError, match="layernorm_guard"):
        work.apply(found, ["mixer2-groups", "strided-gate"])
    assert contents(vllm) == before
    states = {state.patch.name: state.state for state in work.states(found)}
    assert states == {
        "mixer2-groups": "ready", "native-direct": "refused", "native-switch": "refused", "strided-gate": "refused",
    }  # fmt: skip


def test_two_for_the_same_lines(vllm: Path) -> None:
    found = sites.find("vllm", vllm)
    with pytest.raises(PatchError, match=r"native-(direct|switch) and native-(direct|switch) change the same lines"):
        work.apply(found, ["native-direct", "native-switch"])
    work.apply(found, ["native-direct"])
    with pytest.raises(PatchError, match="apply one of them, and revert the other first"):
        work.apply(found, ["native-switch"])


def test_a_name_that_is_none(vllm: Path) -> None:
    with pytest.raises(PatchError, match="no patch 'mixer' here; there are mixer2-groups, native-direct"):
        work.apply(sites.find("vllm", vllm), ["mixer"])
    with pytest.raises(PatchError, match="mixer2-groups is not applied here; applied are: none"):
        work.revert(sites.find("vllm", vllm), ["mixer2-groups"])


def test_changed_after_it_was_patched(vllm: Path) -> None:
    found = sites.find("vllm", vllm)
    original = (vllm / MIXER).read_bytes()
    work.apply(found, ["mixer2-groups"])
    append(vllm / MIXER)
    before = contents(vllm)
    for do in (lambda: work.revert(found), lambda: work.apply(found, ["native-switch"])):
        with pytest.raises(
            PatchError, match=r"was changed after mixer2-groups had been applied: its original is"
        ) as no:
            do()
        assert Path(str(no.value).split(" its original is ")[1]).read_bytes() == original
        assert contents(vllm) == before


def test_a_kill_and_then_somebody_elses_change(vllm: Path) -> None:
    found = sites.find("vllm", vllm)
    from tests.patches.processes import in_a_process

    step = 1
    while not (vllm / ".norm_plugin_patches/vllm/pending.json").exists():
        assert in_a_process(lambda: work.apply(found, ["mixer2-groups"]), step, vllm) == -9
        step += 1
    append(vllm / MIXER)
    (vllm / ".norm_plugin_patches/vllm.lock").unlink()  # the killed run's: the next one takes it away
    before = contents(vllm)
    with pytest.raises(PatchError, match="somebody else has changed it since"):
        work.revert(found)
    assert contents(vllm) == before


@pytest.mark.parametrize("version", ["0.33.0", "0.32.0"])
def test_an_engine_that_was_installed_anew_is_new(site: Site, version: str) -> None:
    folder = site("vllm", "vllm==0.33.0")
    work.apply(sites.find("vllm", folder), ["mixer2-groups", "native-switch"])
    for metadata in folder.glob("*.dist-info/METADATA"):
        metadata.unlink()
    site("vllm", f"vllm=={version}")
    found = sites.find("vllm", folder)
    assert {state.state for state in work.states(found)} == {"ready"}
    assert work.revert(found) == ()
    before = contents(folder)
    work.apply(found, ["mixer2-groups"])
    work.revert(found)
    assert contents(folder) == before


def test_no_compiled_form_of_the_old_text_stays(vllm: Path) -> None:
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compiled = Path(py_compile.compile(str(vllm / MIXER), invalidation_mode=mode, doraise=True))
    assert compiled.is_file()
    work.apply(sites.find("vllm", vllm), ["mixer2-groups"])
    assert not compiled.exists()


def test_hard_links_and_modes(vllm: Path, tmp_path: Path) -> None:
    (vllm / MIXER).chmod(0o640)
    os.link(vllm / MIXER, tmp_path / "cache.py")  # as uv has it
    original = (vllm / MIXER).read_bytes()
    work.apply(sites.find("vllm", vllm), ["mixer2-groups"])
    assert (tmp_path / "cache.py").read_bytes() == original != (vllm / MIXER).read_bytes()
    assert (vllm / MIXER).stat().st_mode & 0o777 == 0o640


def test_where_the_engine_is(vllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(vllm), *sys.path])
    assert sites.find("vllm", None) == sites.Site("vllm", vllm.resolve(), "0.33.0")
    next(vllm.glob("*.dist-info/METADATA")).unlink()
    assert sites.find("vllm", vllm).version.startswith("0.33.0"), "a source tree has _version.py"
    (vllm / "vllm/_version.py").unlink()
    with pytest.raises(PatchError, match="its version is unknown"):
        sites.find("vllm", vllm)
    with pytest.raises(PatchError, match=r"has no package vllm in it: name the folder that vllm/ lies in"):
        sites.find("vllm", tmp_path)
    with pytest.raises(PatchError, match="this Python cannot import sglang: install it, or say where it lies"):
        sites.find("sglang", None)
