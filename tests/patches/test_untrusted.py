"""A tree of somebody else's making: whatever is in it, nothing outside it is touched, and a refusal is one line."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from norm_plugin import cli
from norm_plugin.commands.errors import NOT_RUN
from norm_plugin.patching.catalog import sha256
from norm_plugin.patching.tree import STATE, Tree
from tests.patches.conftest import Site, contents
from tests.patches.processes import in_a_process

MIXER = "vllm/model_executor/layers/mamba/mamba_mixer2.py"
GUARD = "vllm/third_party/flash_linear_attention/ops/layernorm_guard.py"
VICTIM, PAYLOAD = b"the user's own\n", b"planted = True\n"

Plant = Callable[[Path, str], None]


@pytest.fixture
def vllm(site: Site) -> Path:
    """A tree in a folder that has something of the user's beside it."""
    folder = site("vllm", "vllm==0.33.0")
    (folder.parent / "victim.py").write_bytes(VICTIM)
    return folder


def typed(capsys: pytest.CaptureFixture[str], action: str, folder: Path, *names: str) -> tuple[int, str, str]:
    status = 0
    try:
        cli.main(["patch", action, *names, "--engine", "vllm", "--site", str(folder)])
    except SystemExit as end:
        status = int(end.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def all_refuse(
    capsys: pytest.CaptureFixture[str], folder: Path, *reasons: str, actions: tuple[str, ...] = ("list", "check")
) -> None:
    """Every action says one of the reasons in one line, and changes nothing, in the tree or beside it."""
    before = contents(folder.parent)
    for action in (*actions, "apply", "revert"):
        status, out, err = typed(capsys, action, folder)
        assert (status, out) == (NOT_RUN, ""), action
        assert err.startswith("norm-plugin patch: ")
        assert err.endswith("\n")
        assert err[:-1].isprintable()
        assert any(reason in err for reason in reasons), err
        assert contents(folder.parent) == before, action


def record(*paths: str) -> bytes:
    """One that has the payload as the original of these files, and what the victim has as the patched text."""
    change = {"before": sha256(PAYLOAD), "after": sha256(VICTIM)}
    return json.dumps(
        {"version": "0.33.0", "patches": ["mixer2-groups"], "files": dict.fromkeys(paths, change)}
    ).encode()


def plant(folder: Path, name: str, text: bytes) -> None:
    """A state of somebody's making."""
    state = folder / STATE / "vllm"
    (state / "kept").mkdir(parents=True, exist_ok=True)
    for kept in (PAYLOAD, VICTIM):
        (state / "kept" / sha256(kept)).write_bytes(kept)
    (state / name).write_bytes(text)
    if name == "pending.json":  # a run that was killed while nothing was applied
        (state / "record.json").write_bytes(b'{"version": "0.33.0", "patches": [], "files": {}}')


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
    path: str, name: str, vllm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(vllm, name, record(path.format(outside=vllm.parent)))
    all_refuse(capsys, vllm, f"{name} is no record of norm-plugin patch: ", actions=("list", "check")[: name[0] == "r"])


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
    make: Plant, path: str, name: str, vllm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(vllm, "linked.py")
    plant(vllm, name, record(path))
    all_refuse(capsys, vllm, "leads through a link to", actions=("list", "check")[: name[0] == "r"])


def test_a_record_with_a_link_to_the_state_itself(vllm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (vllm / "vllm" / "linked.py").symlink_to(f"../{STATE}/vllm/kept/{sha256(VICTIM)}")
    plant(vllm, "record.json", record("vllm/linked.py"))
    all_refuse(capsys, vllm, "leads through a link to")


@pytest.mark.parametrize("how", [os.symlink, os.link])
def test_a_record_with_one_file_twice(
    how: Callable[[Path, Path], None], vllm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (vllm / "vllm/one.py").write_bytes(VICTIM)
    how(vllm / "vllm/one.py", vllm / "vllm/two.py")
    plant(vllm, "record.json", record("vllm/one.py", "vllm/two.py"))
    all_refuse(capsys, vllm, "vllm/two.py and vllm/one.py are one file")


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
def test_a_broken_record(text: bytes, name: str, vllm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(vllm, name, text)
    remedy = f"Nothing was changed. Install the engine again, and remove {vllm / STATE / 'vllm'}"
    all_refuse(capsys, vllm, remedy, actions=("list", "check")[: name[0] == "r"])


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["a folder", "a pipe"])
def test_a_record_that_is_no_file(make: Callable[[Path], None], vllm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(vllm, "record.json", b"")
    (vllm / STATE / "vllm/record.json").unlink()
    make(vllm / STATE / "vllm/record.json")
    before = sorted(vllm.rglob("*"))
    for action in ("list", "check", "apply", "revert"):
        status, _, err = typed(capsys, action, vllm)
        assert status == NOT_RUN
        assert "record.json is not a file: move it away" in err
        assert sorted(vllm.rglob("*")) == before


# --- links and others where a file or a folder of ours should be --------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "own").write_bytes(VICTIM)
    return tmp_path / "outside"


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
    make: Callable[[Path, Path], None], vllm: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(vllm, outside)
    before = contents(vllm.parent)
    status, out, err = typed(capsys, "apply", vllm)
    assert (status, out) == (NOT_RUN, "")
    assert "is a link, or leads through one or through a file: put the real one in its place" in err
    assert contents(vllm.parent) == before
    assert sorted(path.name for path in outside.iterdir()) == ["new", "own"][make is not record_is_a_link :]


def test_a_link_where_the_new_text_is_written(
    vllm: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name is drawn by chance; whoever could guess it all the same gets nothing written."""
    guessed = f".{Path(MIXER).name}.{'ab' * 8}.norm_plugin"
    for name in (f".{Path(MIXER).name}.norm_plugin", guessed):
        (vllm / MIXER).with_name(name).symlink_to(outside / "own")
    before = contents(vllm / "vllm")
    monkeypatch.setattr(secrets, "token_hex", lambda size: "ab" * size)
    status, _, err = typed(capsys, "apply", vllm, "mixer2-groups")
    assert status == NOT_RUN
    assert f"{MIXER}: File exists; the files are what was there" in err
    monkeypatch.undo()
    assert contents(vllm / "vllm") == {name: text for name, text in before.items() if not name.endswith(guessed)}
    assert typed(capsys, "apply", vllm, "mixer2-groups")[0] == 0
    assert (outside / "own").read_bytes() == VICTIM


def test_compiled_forms_behind_a_link(vllm: Path, outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (outside / "mamba_mixer2.cpython-311.pyc").write_bytes(VICTIM)
    (vllm / MIXER).with_name("__pycache__").symlink_to(outside)
    before = contents(vllm)
    status, _, err = typed(capsys, "apply", vllm)
    assert status == NOT_RUN
    assert "__pycache__ is a link" in err
    assert contents(vllm) == before
    assert (outside / "mamba_mixer2.cpython-311.pyc").read_bytes() == VICTIM


# --- sources that are links or no files ---------------------------------------------------------------------------


def test_a_source_behind_a_link_in_the_tree(vllm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (vllm / "vllm/vendored").mkdir()
    (vllm / MIXER).rename(vllm / "vllm/vendored/mixer.py")
    (vllm / MIXER).symlink_to("../../../vendored/mixer.py")
    before = contents(vllm)
    said = f"  {MIXER} is a link: what is changed is vllm/vendored/mixer.py\n"
    assert said in typed(capsys, "check", vllm, "mixer2-groups")[1]
    assert said in typed(capsys, "apply", vllm, "mixer2-groups")[1]
    assert (vllm / MIXER).is_symlink()
    assert contents(vllm)["vllm/vendored/mixer.py"] != before["vllm/vendored/mixer.py"]
    assert said in typed(capsys, "revert", vllm)[1]
    assert (vllm / MIXER).is_symlink()
    assert contents(vllm) == before


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_source_behind_a_link_out_of_the_tree(
    what: str, vllm: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As uv links a file to its cache, and an engine is linked to where it is worked on."""
    place = vllm / MIXER if what == "file" else (vllm / MIXER).parent
    shutil.move(place, outside / place.name)
    place.symlink_to(outside / place.name)
    before = contents(vllm.parent)
    for action in ("check", "apply"):
        status, _, err = typed(capsys, action, vllm)
        assert status == NOT_RUN
        assert "name the folder that the package really lies in with --site, or put a copy of the file" in err
        assert contents(vllm.parent) == before
        assert place.is_symlink()
    listed = json.loads(typed(capsys, "list", vllm, "--json")[1])
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
    change: Callable[[Path], None], reason: str, vllm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(vllm / MIXER)
    for action in ("check", "apply"):
        status, _, err = typed(capsys, action, vllm)
        assert status == NOT_RUN
        assert reason in err
    assert not (vllm / STATE).exists()


# --- what changes meanwhile, and who may write --------------------------------------------------------------------


@pytest.mark.parametrize("path", [MIXER, GUARD])
def test_a_file_that_changes_between_the_look_and_the_writing(
    path: str, vllm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody's editor saves while the new text is on its way: theirs stays, and all that was done is taken back."""
    before = contents(vllm)
    sync = os.fsync

    def saved(handle: int) -> None:
        if Path(path).name in os.readlink(f"/proc/self/fd/{handle}"):
            (vllm / path).write_bytes(VICTIM)
        sync(handle)

    monkeypatch.setattr(os, "fsync", saved)
    status, _, err = typed(capsys, "apply", vllm)
    assert status == NOT_RUN
    assert f"{path} was changed by somebody else meanwhile, and stays as it is" in err
    assert contents(vllm) == {**before, path: VICTIM}


@pytest.mark.parametrize("part", ["", "vllm/model_executor"], ids=["the tree", "a folder in it"])
def test_a_folder_that_becomes_a_link_meanwhile(
    part: str, vllm: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between the look at where a path leads and its opening, as whoever owns a tree can do it to root."""
    shutil.copytree(vllm, outside / "other")
    before = contents(outside)
    real = Tree.real

    def swapped(tree: Tree, path: str) -> str:
        found = real(tree, path)
        place = vllm / part
        if path == MIXER and not place.is_symlink():
            place.rename(outside.parent / "away")
            place.symlink_to(outside / "other" / part)
        return found

    monkeypatch.setattr(Tree, "real", swapped)
    status, out, err = typed(capsys, "apply", vllm)
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


def test_a_folder_that_may_not_be_written(vllm: Path, anybodys: Path) -> None:
    folder = Path(shutil.copytree(vllm, anybodys / "site"))
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


def test_nobody_gets_rights_by_it(vllm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Root patches a tree of somebody else's: the new file is theirs as the old one was, and runs as nobody else."""
    if os.getuid() == 0:
        os.chown(vllm / MIXER, 65534, 65534)
    (vllm / MIXER).chmod(0o4755)
    owner = (vllm / MIXER).stat().st_uid
    for action in ("apply", "revert"):
        assert typed(capsys, action, vllm)[0] == 0
        now = (vllm / MIXER).stat()
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
def test_a_version_that_is_none(version: str, vllm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(next(vllm.glob("*.dist-info")))
    (vllm / "vllm/_version.py").write_text(f"__version__ = '{version}'\n")
    all_refuse(capsys, vllm, "which is no version: install it again")


def test_a_version_that_cannot_be_read(vllm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next(vllm.glob("*.dist-info/METADATA")).write_bytes(b"Name: vllm\nVersion: 0.33.0\nSummary: \xff\n")
    all_refuse(capsys, vllm, "says in no readable way which vllm it is")
