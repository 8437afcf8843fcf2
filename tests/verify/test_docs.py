"""The guide: its commands exist, its links lead somewhere, its flags exist. tests/engines runs it."""

import contextlib
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the command line prints with rich")

from norm_plugin import cli, settings
from tests.verify.guide import PAGES, ROOT, commands

GUIDE = ("vllm", "sglang", "containers", "numerics", "fallbacks", "adding_an_op", "adding_an_engine")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_one(page: Path) -> None:
    for line in commands(page):
        words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
        if words[0] == "norm-plugin":
            with contextlib.redirect_stderr(None):
                cli.parser().parse_args(words[1:])
        elif words[0].startswith("scripts/"):
            assert (ROOT / words[0]).is_file()
        else:
            assert words[:2] in (["pip", "install"], ["python", "-m"]), f"{line}: nobody has checked this"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_flag_and_file_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    flags = {flag.name for flag in settings.FLAGS}
    assert set(re.findall(r"\b(?:NORM_PLUGIN\w*|USE_NATIVE\w*)", text)) <= flags
    for path in re.findall(r"`((?:norm_plugin|tests|scripts|benchmarks)/[\w/.]+)`", text):
        if "FAMILY" not in path and "ENGINE" not in path:
            assert (ROOT / path).exists(), path


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in GUIDE:
        assert f"](docs/{page}.md)" in readme
