"""What verify prints in terminals of any width: nothing of it is cut."""

import io

import pytest

pytest.importorskip("rich", reason="a console with a width is rich's")
from rich.console import Console

from norm_plugin.verify import terminal
from norm_plugin.verify.verdict import judged
from tests.verify.samples import answer, outcome, row

ABOUT = {
    "engine": "vllm", "version": "0", "mode": "eager", "dtype": "bfloat16", "device": "cpu", "backend": "native",
    "tp": 1, "prompts": 1, "max_tokens": 3, "floor": "order", "seconds": 1.0, "flags": {},
}  # fmt: skip


@pytest.mark.parametrize("width", [40, 80, 120, 160])
def test_no_cell_is_cut(width: int) -> None:
    stock = outcome([answer([5, 6, 7])], [])
    patched = outcome([answer([5, 6, 7], shift=0.01)], [row("model.norm", op="rmsnorm", calls=3)])
    verdict = judged(stock, stock, patched)
    out = io.StringIO()
    terminal.show([verdict], ABOUT, Console(file=out, width=width, color_system=None, force_terminal=True))
    for cell in terminal.row(verdict):
        assert cell in out.getvalue()
    assert "…" not in out.getvalue()
    in_a_table = out.getvalue().splitlines()[1].split()[:2] == ["model", "norms"]
    assert in_a_table is (width >= 120)
