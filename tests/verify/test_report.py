"""What `norm-plugin report` shows: groups of layers, whole names, nothing that a terminal or a browser would obey."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("rich", reason="the command line prints with rich")

from rich.console import Console

from norm_plugin import cli
from norm_plugin.engines import model_layers
from norm_plugin.reporting import groups, page, terminal
from tests.verify.test_page import browser  # noqa: F401
from tests.verify.test_report_file import MODEL

EVIL = "norm[red]\x1b[31m<script>alert(1)</script>\u202e\x9b2J\n"
LONG = "a_norm_with_a_name_that_is_as_long_as_names_of_layers_get_in_the_models_that_people_serve_today"


def row(layer: str, op: str = "rmsnorm", reason: str = "", calls: int = 10, kind: str = "m.RMSNorm") -> dict[str, Any]:
    how = [{"backend": "triton", "because": "", "numerics": "hf", "configuration": "4 warps"}] if not reason else []
    return {
        "layer": layer, "class": kind, "op": op, "reason": reason, "width": 64 if op else 0, "calls": calls,
        "dtype": "bfloat16" if op else "", "strides": [[64, 1]] if op else [], "implementations": how, "replayed": 0,
    }  # fmt: skip


def process(*more: dict[str, Any]) -> dict[str, Any]:
    rows = [row(f"model.layers.{i}.input_layernorm", calls=7) for i in range(36)]
    rows += [row(f"model.layers.{i}.{LONG}", "", "compiled by vLLM", 0) for i in range(36)]
    return {
        "host": "host", "pid": 1, "started": "2026-01-01T00:00:00+00:00", "command": "VLLM::EngineCore",
        "started as": "vllm serve m", "models": ["/models/m (M)"], "flags": {"NORM_PLUGIN": "auto"},
        "versions": {"norm_plugin": "0.1.0", "torch": "2.13.0", "triton": "3.7.1", "GPU": "a GPU", "driver": "580"},
        "engines": [{"engine": "vLLM", "version": "0.32.0", "hooks": {}, "missing": {}}], "rows": [*rows, *more],
    }  # fmt: skip


def shown(found: dict[str, Any], width: int, is_terminal: bool = True) -> str:
    out = io.StringIO()
    terminal.show(found, Console(file=out, width=width, force_terminal=is_terminal, color_system=None, highlight=False))
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120, 160])
def test_no_name_is_cut_and_no_line_is_longer_than_the_terminal(width: int) -> None:
    text = shown(process(), width)
    assert max(map(len, text.split("\n"))) <= width
    joined = re.sub(r"\n +", "", text)
    assert f"model.layers.{{0-35}}.{LONG}" in joined
    assert "…" not in text
    assert text.count("input_layernorm") == 1, "36 layers of one kind are one line"
    assert "36 layers, 252 calls" in text


def test_in_a_pipe_a_line_is_whole() -> None:
    assert f"  model.layers.{{0-35}}.{LONG}: 36 layers\n" in shown(process(), 80, is_terminal=False)


def test_what_is_compiled_is_counted_and_never_called_uncalled() -> None:
    assert groups.summary(process()) == (
        "252 calls in 36 layers ran here; 0 were left to the engine; 36 layers compiled by vLLM."
    )
    assert "never called" not in shown(process(), 100)


def test_nothing_in_a_name_is_obeyed() -> None:
    evil = process(row(EVIL, reason=EVIL, kind=EVIL), row(EVIL, "", EVIL))
    evil |= {"started as": EVIL, "command": EVIL, "models": [EVIL], "flags": {"NORM_PLUGIN": EVIL}, "host": EVIL}
    evil["engines"] = [{"engine": EVIL, "version": EVIL, "hooks": {}, "missing": {EVIL: EVIL}}]
    text = shown(evil, 100, is_terminal=False)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert "norm[red]\\x1b[31m<script>alert(1)</script>\\u202e\\x9b2J\\n" in text
    html = page.page([evil], {EVIL: EVIL})
    assert "<script" not in html
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", html)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0.n", "a.1.n", "a.2.n", "a.5.n"], ["a.{0-2,5}.n"]),
        (["a.3.n"], ["a.3.n"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], ["a.{0-1}.b.{0-1}"]),
        (["a.0.b.1", "a.1.b.0"], ["a.0.b.1", "a.1.b.0"]),
        (["n", "#.#"], ["n", "#.#"]),
        (["a.007", "a." + "9" * 6000], ["a.007", "a." + "9" * 6000]),
    ],
)
def test_the_names_of_a_group_are_those_of_its_layers(names: list[str], expected: list[str]) -> None:
    assert groups.ranges(names) == expected


def test_every_norm_of_a_model_has_its_path_its_class_and_the_reason() -> None:
    class LayerNorm(nn.Module):
        """An engine's model has a class of this name too."""

        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(4))

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    model = nn.Module()
    model.first, model.second, model.q_norm = LayerNorm(), nn.LayerNorm(4), Scale()
    model.norm, model.act, model.normal, model.linear = nn.Identity(), nn.SiLU(), Scale(), nn.Linear(4, 4)
    found = {
        layer.path: layer for layer in model_layers.norms(model, lambda one: model_layers.why_no_hook(one, (), "", ""))
    }
    assert set(found) == {"first", "second", "q_norm"}
    assert found["first"].kind == f"{__name__}.{LayerNorm.__qualname__}"
    assert found["first"].why == found["q_norm"].why == "no hook of norm_plugin takes this class"
    assert found["second"].why.startswith("PyTorch's own class")
    assert all(layer.weight for layer in found.values())


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a process wrote, and a file of somebody else's."""
    folder = tmp_path_factory.mktemp("written") / "report"
    environ = {**os.environ, "NORM_PLUGIN_REPORT": str(folder)}
    subprocess.run([sys.executable, "-c", MODEL + "forward(3)", "--api-key", "K1"], env=environ, check=True)
    (folder / "\x1b[31mother.json").write_text("{}")
    return folder


def test_report_shows_what_is_there_and_names_what_is_not(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page_at, json_at = written.parent / "r.html", written.parent / "r.json"
    assert cli.main(["report", str(written), "--html", str(page_at), "--json", str(json_at)]) == 0
    out = capsys.readouterr().out
    assert "5 layers, 15 calls" in out
    assert "\\x1b[31mother.json is no report: it is another program's" in out
    assert "\x1b" not in out
    assert [r["calls"] for r in json.loads(json_at.read_text())[0]["rows"]] == [3] * 5
    html = page_at.read_text()
    for fact in ("command line", "--api-key ***", "torch " + torch.__version__, "python 3.", "GPU", "written at 20"):
        assert fact in html
    assert not re.search(r"https?://|<script|<link|<img|url\(|@import", html)


def test_a_folder_without_a_report_says_what_else_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "\x1bempty.json").touch()
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path)])
    error = capsys.readouterr().err
    assert "\\x1bempty.json is no report: it is empty" in error
    assert "\x1b" not in error


#: Added to the page by the test: what the browser made of it, as the title.
MEASURE = """<script>
const groups = [...document.querySelectorAll('details')];
const closed = groups[0].getBoundingClientRect().height;
groups.forEach(group => group.open = true);
document.title = JSON.stringify([groups.length, closed < groups[0].getBoundingClientRect().height / 5,
  groups[0].querySelectorAll('tr').length, document.documentElement.scrollWidth <= innerWidth]);
</script>"""


@pytest.mark.parametrize("width", [1100, 420])
def test_a_browser_shows_it(width: int, browser: str, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "page.html"
    file.write_text(page.page([process()], {}).replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    options = ["--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", f"--window-size={width},900"]
    dumped = subprocess.run(
        [browser, "--headless", *options, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120
    )
    title = re.search(r"<title>(.*?)</title>", dumped.stdout)
    assert title is not None, dumped.stderr[-2000:]
    lines, opens, layers, fits = json.loads(title[1])
    assert lines == 2
    assert opens
    assert layers == 1 + 36
    assert fits, f"the page is wider than a window of {width}"
