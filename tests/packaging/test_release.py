"""The release builds, has what it needs and nothing else, and works when installed."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

import norm_plugin
from norm_plugin import needs
from tests.packaging.fresh import Fresh, sources

#: Where the engines look for plugins.
ENTRY_POINTS = {
    ("vllm.general_plugins", "norm_plugin", "norm_plugin.engines.vllm:register"),
    ("sglang.srt.plugins", "norm_plugin", "norm_plugin.engines.sglang:register"),
    ("console_scripts", "norm-plugin", "norm_plugin.cli:main"),
}


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(archive.read(name).decode())


def test_twine_accepts_both(dist: Path) -> None:
    files = sorted(map(str, dist.iterdir()))
    assert [name.rpartition("norm_plugin-")[2] for name in files] == [
        f"{norm_plugin.__version__}-py3-none-any.whl", f"{norm_plugin.__version__}.tar.gz"
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_has_the_package_and_no_tests(wheel: Path, tmp_path: Path) -> None:
    """The wheel has every file that git has of the package, its metadata, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
    about = {name for name in found if name.startswith(f"norm_plugin-{norm_plugin.__version__}.dist-info/")}
    package = sources(tmp_path) / "norm_plugin"
    wanted = {str(path.relative_to(tmp_path)) for path in package.rglob("*") if path.is_file()}
    patches = tmp_path / "patches"  # the package has a link to them
    wanted |= {f"norm_plugin/{path.relative_to(tmp_path)}" for path in patches.rglob("*") if path.is_file()}
    assert found - about == wanted
    assert any(name.endswith("/licenses/LICENSE") for name in about)
    for name in ("py.typed", "kernels/configs.json", "kernels/backward_configs.json", "patches/index.json"):
        assert f"norm_plugin/{name}" in found
    assert sum(name.endswith(".diff") for name in found) > 10
    assert not [name for name in found if "test" in name.split("/")[0]]


def test_the_sdist_has_the_guide_and_no_tests(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
        assert not [one.name for one in archive.getmembers() if one.issym() or one.islnk()]
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/vllm.md", "pyproject.toml"} <= found
    assert {"norm_plugin/py.typed", "norm_plugin/patches/index.json"} <= found
    assert not [name for name in found if name.startswith(("tests", "scripts", "benchmarks", ".ci", ".venv"))]


def test_its_version_and_requirements(wheel: Path) -> None:
    found = metadata(wheel)
    assert found["Version"] == norm_plugin.__version__
    required = found.get_all("Requires-Dist") or []
    assert [line for line in required if "extra ==" not in line] == []
    oldest = ".".join(map(str, needs.OLDEST_TORCH))
    assert [line for line in required if line.startswith(("torch", "triton"))] == [f'torch>={oldest}; extra == "torch"']
    assert f"## {norm_plugin.__version__}" in (Path(__file__).parents[2] / "CHANGELOG.md").read_text()


def test_it_works_where_it_is_installed(installed: Fresh) -> None:
    said = installed.run("norm-plugin", "--version")
    assert (said.returncode, said.stdout) == (0, f"norm-plugin {norm_plugin.__version__}\n")
    doctor = installed.run("norm-plugin", "doctor", "--no-probe")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert "nothing wrong" in doctor.stdout


def test_the_engines_find_it(installed: Fresh) -> None:
    """Every entry point of the installed wheel can be loaded, and its patches are there."""
    code = (
        "import importlib.metadata as m, json, norm_plugin\n"
        "from norm_plugin.patching import catalog\n"
        "points = m.distribution('norm-plugin').entry_points\n"
        "loaded = [[p.group, p.name, p.value] for p in points if callable(p.load())]\n"
        "print(json.dumps([norm_plugin.__file__, loaded, len(catalog.patches())]))"
    )
    asked = installed.run("python", "-c", code)
    assert asked.returncode == 0, asked.stderr
    file, points, patches = json.loads(asked.stdout)
    assert file.startswith(str(installed.packages))
    assert {tuple(point) for point in points} == ENTRY_POINTS
    assert patches > 10


# --- pip, where an engine is -----------------------------------------------------------------------------------------


def planned(fresh: Fresh, plan: Path, *arguments: str) -> tuple[int, list[str]]:
    """What pip's resolver would install. It can only get packages that this machine offers as files."""
    done = fresh.pip("install", "--dry-run", "--no-index", "--report", str(plan), *arguments)
    names = [one["metadata"]["name"] for one in json.loads(plan.read_text())["install"]] if plan.exists() else []
    return done.returncode, names


@pytest.mark.parametrize("torch", ["2.4.1", "2.99.0"])
def test_pip_moves_no_torch(torch: str, wheel: Path, tmp_path: Path) -> None:
    """With an engine that requires exactly the installed torch and Triton, and with what the extras need."""
    fresh = Fresh(tmp_path / "venv")
    fresh.pretend("triton", "3.1.4")
    fresh.pretend("torch", torch, "triton==3.1.4")
    fresh.pretend("vllm", "0.26.0", f"torch=={torch}")
    eager = ("--upgrade", "--upgrade-strategy", "eager")
    for number, arguments in enumerate([(str(wheel),), (f"{wheel}[cli,plots]",), (*eager, f"{wheel}[cli]")]):
        assert planned(fresh, tmp_path / f"{number}.json", *arguments) == (0, ["norm-plugin"]), arguments
    # the plan could have a torch: the extra for people without an engine asks for one
    code, names = planned(fresh, tmp_path / "asked.json", f"{wheel}[torch]")
    assert (names == ["norm-plugin"]) == (torch == "2.99.0")
    assert code != 0 or "norm-plugin" in names


@pytest.mark.parametrize("extra", ["cli", "plots", "torch"])
def test_the_remedies_that_are_named_work(extra: str, installed: Fresh, tmp_path: Path) -> None:
    """norm_plugin is on no index, but pip can still add what an extra of the installed one needs."""
    assert planned(installed, tmp_path / "plan.json", f"norm-plugin[{extra}]") == (0, [])


# --- what is said where torch is missing, or too old ------------------------------------------------------------------


def imported(wheel: Path, place: Path, torch: str | None) -> subprocess.CompletedProcess[str]:
    """Imports the wheel in a Python that has no torch, or a torch that is only a version."""
    if torch is not None:
        (place / "torch").mkdir()
        (place / "torch" / "__init__.py").write_text(f"__version__ = {torch!r}\n")
    code = f"import sys; sys.path[:0] = [{str(place)!r}, {str(wheel)!r}]; import norm_plugin"
    return subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)


def test_without_torch(wheel: Path, tmp_path: Path) -> None:
    done = imported(wheel, tmp_path, None)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: norm_plugin needs PyTorch 2.11 or newer, and there is none here.")
    assert "pip install 'norm-plugin[torch]'" in last
    assert "During handling" not in done.stderr


@pytest.mark.parametrize("version", ["2.10.0", "2.4.1+cu124", "1.13.1"])
def test_with_a_torch_that_is_too_old(version: str, wheel: Path, tmp_path: Path) -> None:
    done = imported(wheel, tmp_path, version)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"ImportError: norm_plugin needs PyTorch 2.11 or newer, and here is {version}, in {tmp_path}"
    )
    assert "pip install --upgrade 'torch>=2.11'" in last


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+git1234", "2.20.1", "3.0.0", "a build of mine"])
def test_with_a_torch_that_is_new_enough(version: str, wheel: Path, tmp_path: Path) -> None:
    """The import goes on until it needs something that this torch lacks."""
    assert "needs PyTorch" not in imported(wheel, tmp_path, version).stderr.splitlines()[-1]


def test_the_version_needs_no_installation(tmp_path: Path) -> None:
    """From a checkout without metadata, with the torch of this environment by its path."""
    fresh = Fresh(tmp_path / "venv")
    copy = sources(tmp_path / "checkout")
    code = (
        "import importlib.metadata as m\n"
        "assert not list(m.distributions(name='norm-plugin'))\n"
        "from norm_plugin.verify import health\n"
        "print(health.versions()['norm_plugin'])\n"
        "from norm_plugin import cli; cli.main(['--version'])"
    )
    done = fresh.run("python", "-c", code, environ={"PYTHONPATH": str(copy)})
    said = f"{norm_plugin.__version__}\nnorm-plugin {norm_plugin.__version__}\n"
    assert (done.returncode, done.stdout) == (0, said), done.stderr
