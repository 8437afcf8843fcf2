"""The .pth of `norm-plugin autoload`, in an environment of its own: what stays behind after pip uninstall."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the command line prints with rich")

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = "import sys, sglang.srt.layers, sglang.kernels.ops; print('imported', 'norm_plugin' in sys.modules)"


def pip(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class Environment:
    """A Python with norm_plugin from a wheel and a package that has the names of SGLang's."""

    def __init__(self, place: Path) -> None:
        venv.create(place / "env", with_pip=False, symlinks=True)
        self.python = place / "env" / "bin" / "python"
        ask = [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        self.site = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
        for package in ("sglang/srt/layers", "sglang/kernels/ops"):
            (self.site / package).mkdir(parents=True)
            (self.site / package / "__init__.py").touch()
        source = place / "source"
        shutil.copytree(ROOT / "norm_plugin", source / "norm_plugin", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(place), str(source))
        (wheel,) = place.glob("*.whl")
        self.pip("install", "--no-deps", "--no-index", str(wheel))

    def pip(self, *words: str) -> None:
        """The pip of this Python, for that one."""
        pip("--python", str(self.python), *words)

    def run(self, *words: str, **flags: str) -> "subprocess.CompletedProcess[str]":
        """That Python, which borrows what norm_plugin needs from this one, and nothing that a .pth names there."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("NORM_PLUGIN", "USE_NATIVE", "PYTHON"))}
        environ = {**kept, "PYTHONPATH": sysconfig.get_path("purelib"), **flags}
        return subprocess.run([self.python, *words], env=environ, capture_output=True, text=True, cwd=self.site)

    def autoload(self, action: str) -> None:
        done = self.run("-c", "import sys; from norm_plugin import cli; sys.exit(cli.main())", "autoload", action)
        assert done.returncode == 0, done.stderr

    def left(self) -> list[str]:
        """What has a name of ours."""
        return sorted(str(path.relative_to(self.site)) for path in self.site.rglob("*norm_plugin*"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("autoload"))


def test_off_leaves_nothing(environment: Environment) -> None:
    environment.autoload("on")
    assert environment.run("-c", IMPORTS, NORM_PLUGIN="native").returncode == 0
    assert len([path for path in environment.left() if "norm_plugin_autoload" in path]) >= 2
    environment.autoload("off")
    assert not [path for path in environment.left() if "norm_plugin_autoload" in path]


def test_off_does_nothing_and_what_stays_behind_is_inert(environment: Environment) -> None:
    environment.autoload("on")
    asked = environment.run("-c", IMPORTS, NORM_PLUGIN="native")
    assert (asked.stdout, asked.returncode) == ("imported True\n", 0), asked.stderr
    off = {"NORM_PLUGIN": "off"}, {"NORM_PLUGIN": ""}, {"USE_NATIVE_LAYERNORM": "0"}, {}
    for flags in off:
        done = environment.run("-c", IMPORTS + "; print('norm_plugin_autoload' in sys.modules)", **flags)
        assert (done.stdout, done.stderr) == ("imported False\nFalse\n", ""), flags

    environment.pip("uninstall", "-y", "norm-plugin")
    assert "norm_plugin_autoload.pth" in environment.left()
    for flags in off:
        done = environment.run("-c", IMPORTS, **flags)
        assert (done.stdout, done.stderr, done.returncode) == ("imported False\n", "", 0), flags
    for flags in ({"NORM_PLUGIN": "auto"}, {"USE_NATIVE_LAYERNORM": "1"}, {"NORM_PLUGIN": "misspelt"}):
        done = environment.run("-c", IMPORTS, **flags)
        assert (done.stdout, done.returncode) == ("imported False\n", 0), flags
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("norm_plugin: a flag asks for it")
        assert f"remove {environment.site}/norm_plugin_autoload.py and the .pth beside it" in done.stderr
    elsewhere = environment.run("-c", "print('nothing of SGLang')", NORM_PLUGIN="auto")
    assert (elsewhere.stdout, elsewhere.stderr) == ("nothing of SGLang\n", "")

    (environment.site / "norm_plugin_autoload.py").unlink()
    done = environment.run("-c", IMPORTS, NORM_PLUGIN="auto")
    assert (done.stdout, done.stderr) == ("imported False\n", ""), "a .pth that has lost its module"
