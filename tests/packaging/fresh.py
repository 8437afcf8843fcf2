"""Makes a new environment in a second. It sees all packages of another environment except norm_plugin."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: As pip writes it. Without the condition a spawned child process would run the command again.
SCRIPT = """#!{python}
import sys
from {module} import {name}
if __name__ == "__main__":
    sys.exit({name}())
"""


def packages(python: str | Path) -> Path:
    """The site-packages of an interpreter."""
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())


def sources(place: Path) -> Path:
    """A copy of the files that git has or would add, so that a build leaves nothing in this checkout."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")):
        old, new = ROOT / name, place / name
        if old.is_symlink() or old.exists():  # git still lists deleted files
            new.parent.mkdir(parents=True, exist_ok=True)
            if old.is_symlink():
                new.symlink_to(os.readlink(old))
            else:
                new.write_bytes(old.read_bytes())
                new.chmod(old.stat().st_mode)
    return place


class Fresh:
    """An environment without norm_plugin, which sees the packages of `like`. Its Python runs `lines` at each start."""

    def __init__(self, place: Path, like: str | Path = sys.executable, lines: Iterable[str] = ()) -> None:
        self.place = place
        subprocess.run([like, "-m", "venv", "--without-pip", place], check=True)
        self.python = place / "bin" / "python"
        self.seen = place / "seen"
        self.seen.mkdir()
        for entry in packages(like).iterdir():
            if not entry.name.startswith(("norm_plugin", "__editable__")):
                (self.seen / entry.name).symlink_to(entry)
        (self.packages / "seen.pth").write_text("\n".join([str(self.seen), *lines]) + "\n")

    @property
    def packages(self) -> Path:
        """Where pip installs."""
        return packages(self.python)

    def program(self, distribution: str) -> None:
        """Makes the commands of a package of `like`, as pip would."""
        (found,) = importlib.metadata.distributions(name=distribution, path=[str(self.seen)])
        for point in found.entry_points.select(group="console_scripts"):
            script = self.place / "bin" / point.name
            script.write_text(SCRIPT.format(python=self.python, module=point.module, name=point.attr))
            script.chmod(0o755)

    def pretend(self, name: str, version: str, *needs: str) -> None:
        """Adds a distribution that is only a name and a version, which is enough for pip."""
        folder = self.packages / f"{name}-{version}.dist-info"
        folder.mkdir()
        lines = [
            "Metadata-Version: 2.1",
            f"Name: {name}",
            f"Version: {version}",
            *(f"Requires-Dist: {n}" for n in needs),
        ]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        (folder / "INSTALLER").write_text("pip\n")
        (folder / "RECORD").write_text("")

    def environ(self, **more: str) -> dict[str, str]:
        """This process's, with this environment first on the PATH and no flag of ours."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("NORM_PLUGIN", "USE_NATIVE", "PYTHONPATH"))}
        return {
            **kept,
            "PATH": f"{self.place / 'bin'}{os.pathsep}{kept['PATH']}",
            "VIRTUAL_ENV": str(self.place),
            **more,
        }

    def run(self, *command: str | Path, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a command in the environment, from an empty folder."""
        words = [str(self.place / "bin" / command[0]), *map(str, command[1:])]
        return subprocess.run(
            words, env=self.environ(**(environ or {})), cwd=self.place, capture_output=True, text=True, timeout=300
        )

    def pip(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Runs the pip of `like`, which installs into this environment and asks no index."""
        return self.run("python", "-m", "pip", "--no-input", *arguments)
